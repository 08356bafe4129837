"""What the rest is measured against: writing the bytes as they are, hashing all of them, copying them."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from blake3 import blake3

from benchmarks.measure import Contender

_EARLY = 16 << 20  # bytes after which the disk is told to begin
_BATCH = 1 << 20


def plain_write(tensors: Sequence[torch.Tensor], path: Path) -> None:
    """One sequential write with early writeback, and fsync of the file and its folder."""
    begin = getattr(ctypes.CDLL(None), "sync_file_range", None)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    written = begun = 0
    try:
        for tensor in tensors:
            data = _memory(tensor)
            while data:
                count = os.write(fd, data[:_EARLY])
                data, written = data[count:], written + count
                if written - begun >= _EARLY and begin is not None:
                    begin(fd, ctypes.c_int64(begun), ctypes.c_int64(written - begun), 2)
                    begun = written
        os.fsync(fd)
    finally:
        os.close(fd)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def touch_free_memory(folder: Path, size: int) -> None:
    """Have the free memory that a write of `size` bytes will take next touched before it is timed.

    A virtual machine's host takes free memory back after a second or two, and touching it again then costs several times
    as much as the write itself. Who is measured next should not pay for how long the machine has been idle.
    """
    scratch = folder / "scratch"
    nothing = bytes(_EARLY)
    with scratch.open("wb", buffering=0) as file:
        for _ in range(0, size, _EARLY):
            file.write(nothing)
    scratch.unlink()


def second_in_a_row(load: Callable[[], object]) -> Contender:
    """A load that is timed the second time in a row: the memory that it needs was touched the first time.

    It has gone back to the system meanwhile, as who loads once has to ask for it.
    """

    def prepare() -> None:
        load()
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)

    return prepare, load


def hash_all(tensors: Sequence[torch.Tensor]) -> None:
    """BLAKE3 of every tensor, on as many threads as there are cores, small ones in batches."""
    batches: list[list[memoryview]] = [[]]
    size = 0
    for tensor in sorted(tensors, key=lambda tensor: -tensor.nbytes):
        if size >= _BATCH:
            batches.append([])
            size = 0
        batches[-1].append(_memory(tensor))
        size += tensor.nbytes
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for _ in pool.map(lambda batch: [blake3(data).digest() for data in batch], batches):
            pass


def _memory(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
