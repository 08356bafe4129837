"""Lower bounds for the other measurements: writing the bytes as they are, and hashing all of them."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from blake3 import blake3

from benchmarks.measure import Contender

_EARLY = 16 << 20
"""Bytes after which the disk is told to begin writing."""

_BATCH = 1 << 20
"""Bytes of small tensors that one thread hashes at a time."""


def plain_write(tensors: Sequence[torch.Tensor], path: Path) -> None:
    """Write tensors one after the other, with early writeback, and sync the file and its folder."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    written = begun = 0
    try:
        for tensor in tensors:
            data = _memory(tensor)
            while data:
                count = os.write(fd, data[:_EARLY])
                data, written = data[count:], written + count
                if written - begun >= _EARLY:
                    _start_writeback(fd, begun, written - begun)
                    begun = written
        os.fsync(fd)
    finally:
        os.close(fd)
    sync(path.parent)


def hashed_write(tensors: Sequence[torch.Tensor], path: Path) -> None:
    """As `plain_write`, while threads, one for each core, hash each tensor with BLAKE3 and write what they have hashed."""
    places, end = [], 0
    for tensor in sorted(tensors, key=lambda tensor: -tensor.nbytes):
        places.append((_memory(tensor), end))
        end += tensor.nbytes
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    dirty = 0

    def write(place: tuple[memoryview, int]) -> None:
        nonlocal dirty
        data, start = place
        hasher = blake3()
        for done in range(0, len(data), _BATCH):
            part = data[done : done + _BATCH]
            hasher.update(part)
            if os.pwrite(fd, part, start + done) != len(part):
                raise OSError(f"{path}: a short write at {start + done}")
            dirty += len(part)
            if dirty >= _EARLY:
                dirty = 0
                _start_writeback(fd, 0, 0)

    try:
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            for _ in pool.map(write, places):
                pass
        os.fsync(fd)
    finally:
        os.close(fd)
    sync(path.parent)


def sync(path: Path) -> None:
    """Sync a file, or the names in a folder."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def touch_free_memory(folder: Path, size: int) -> None:
    """Touch the free memory that a write of `size` bytes will take next, before that write is timed.

    The host of a virtual machine takes free memory back after a second or two. Touching it again then costs several
    times as much as the write itself. The next contender should not pay for the time that the machine was idle.
    """
    scratch = folder / "scratch"
    nothing = bytes(_EARLY)
    with scratch.open("wb", buffering=0) as file:
        for _ in range(0, size, _EARLY):
            file.write(nothing)
    scratch.unlink()


def touch_free_pages(size: int) -> None:
    """As `touch_free_memory`, without a file: nothing is left to be written, and every page is touched."""
    room = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.closing(room):
        # A kernel may be built without large pages.
        with contextlib.suppress(OSError):
            room.madvise(mmap.MADV_HUGEPAGE)
        for start in range(0, size, mmap.PAGESIZE):
            room[start] = 1


def second_in_a_row(load: Callable[[], object]) -> Contender:
    """A load of which only the second in a row is timed. The first one touches the memory that it needs.

    In between, that memory goes back to the system, because a program that loads once must ask for it too.
    """

    def prepare() -> None:
        load()
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)

    return prepare, load


def hash_all(tensors: Sequence[torch.Tensor]) -> None:
    """Hash every tensor with BLAKE3, on as many threads as there are cores. Small tensors are hashed in batches."""
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


def _start_writeback(fd: int, offset: int, size: int) -> None:
    """Let the disk begin with a part of a file; with all of it if both are 0."""
    begin = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if begin is not None:
        begin(fd, ctypes.c_int64(offset), ctypes.c_int64(size), 2)


def _memory(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
