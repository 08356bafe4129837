"""Loads when nothing of the files is in memory, against a plain read of the same pack past the page cache.

Before each turn every file is dropped from the page cache, and `mincore` counts what is left. A round in which more than 1%
of a file stayed does not count. Free memory is touched before each turn as well, since the host of a virtual machine takes it
back and gives it again more slowly than a disk reads. What a host keeps of a file cannot be seen from inside.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

from benchmarks.floors import touch_free_pages
from benchmarks.measure import Scale, Section, Times, ratio, rotated
from benchmarks.states import flat, new_registry, resnet50_with_adam, zeroed
from registry.store.direct import direct_packs

_READ, _REQUESTS = 8 << 20, 4
"""Bytes of one plain read, and how many are in flight."""

_BLOCK = 4 << 10
_LEFT = 0.01
"""Part of a file that may be in memory when a turn begins."""

_TRIES = 5
"""How often a file is dropped before its round is given up."""

_MOST_LEFT_OUT = 3
"""Rounds that may be left out for each one that counts."""


def measure(folder: Path, scale: Scale) -> Section:
    """Measure cold loads of one state."""
    state = resnet50_with_adam()
    tensors = flat(state)
    size = sum(tensor.nbytes for tensor in tensors.values())
    checkpoint = new_registry(folder / "registry").save("model", state)
    torch.save(state, folder / "peer.pt")
    safetensors.torch.save_file(tensors, folder / "peer.safetensors")
    (pack,) = (folder / "registry").glob("packs/*/*")
    files = [pack, folder / "peer.pt", folder / "peer.safetensors"]
    live = {key: zeroed(tree) for key, tree in state.items()}
    room = np.ones(pack.stat().st_size, np.uint8)
    try:
        plain_read(pack)
    except OSError as error:
        return Section(notes=[f"not measured: this file system refuses O_DIRECT ({error.strerror})"])
    loads: dict[str, Callable[[], object]] = {
        "a plain direct read": lambda: plain_read(pack),
        "a plain direct read and a copy": lambda: np.copyto(
            room, np.frombuffer(plain_read(pack), np.uint8)[: len(room)]
        ),
        "torch.load": lambda: torch.load(folder / "peer.pt", weights_only=True),
        "safetensors": lambda: _touched(safetensors.torch.load_file(folder / "peer.safetensors")),
        "copied": lambda: checkpoint.load(copy=True),
        "mapped": lambda: _touched(flat(checkpoint.load())),
        "into a live model": lambda: checkpoint.load_into(**live),
    }
    load = os.getloadavg()[0]
    t, left_out = _take_cold_turns(loads, files, rounds=scale.rounds, size=size)
    plain, plain_copied = "a plain direct read", "a plain direct read and a copy"
    return Section(
        [
            ratio("cold load, copied and verified", t, ours="copied", peer=plain, goal=1 / 0.85),
            ratio("cold load, mapped, verified and touched", t, ours="mapped", peer=plain, goal=1 / 0.75),
            ratio("cold load, copied and verified", t, ours="copied", peer="torch.load", goal=1.0),
            ratio("cold load, mapped, verified and touched", t, ours="mapped", peer="torch.load", goal=1.0),
            ratio("cold load, mapped, verified and touched", t, ours="mapped", peer="safetensors", goal=None),
            ratio(
                "cold load into a live model, verified",
                t,
                ours="into a live model",
                peer=plain,
                goal=1 / 0.85,
            ),
            ratio(
                "cold load into a live model, verified",
                t,
                ours="into a live model",
                peer=plain_copied,
                goal=None,
            ),
        ],
        notes=[
            f"the load of the machine was {load:.1f} before and {os.getloadavg()[0]:.1f} afterwards, on {os.cpu_count()} "
            f"cores; the system reads {_read_ahead(pack)} ahead; {left_out} rounds were left out, as a file stayed in memory",
            "a plain direct read is one of the same pack into new memory, past the page cache, "
            f"{_REQUESTS} x {_READ >> 20} MB at a time; it verifies nothing",
            "a load into a live model changes nothing before all is verified, so its copy comes behind its last read",
            "each turn is like the first load of a process: it has forgotten which packs were read past the page cache",
        ],
    )


def plain_read(path: Path) -> mmap.mmap:
    """Read a file past the page cache into new memory, four large reads at a time, and do nothing else.

    Raises:
        OSError: if the file system refuses.
    """
    size = path.stat().st_size
    room = mmap.mmap(-1, math.ceil(size / _BLOCK) * _BLOCK, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):
        room.madvise(mmap.MADV_HUGEPAGE)
    memory = memoryview(room)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)

    def read(start: int) -> None:
        wanted = min(_READ, size - start)
        if os.preadv(fd, [memory[start : start + _READ]], start) != wanted:
            raise OSError(f"{path}: a short read at {start}")

    try:
        with ThreadPoolExecutor(_REQUESTS) as pool:
            for _ in pool.map(read, range(0, size, _READ)):
                pass
    finally:
        os.close(fd)
    return room


def _take_cold_turns(
    loads: Mapping[str, Callable[[], object]], files: Sequence[Path], rounds: int, size: int
) -> tuple[Times, int]:
    """As `take_turns`, with nothing of the files in memory. Also how many rounds were left out."""
    times: Times = {name: [] for name in loads}
    left_out = -1
    for turn in range((1 + _MOST_LEFT_OUT) * rounds + 1):
        found = {}
        for name in rotated([*loads], turn):
            if not _dropped(files):
                break
            direct_packs.forget()
            touch_free_pages(2 * size)
            start = time.perf_counter()
            kept = loads[name]()
            found[name] = time.perf_counter() - start
            del kept
        # The first round warms up.
        if not turn or len(found) < len(loads):
            left_out += 1
            continue
        for name, seconds in found.items():
            times[name].append(seconds)
        if len(times["copied"]) == rounds:
            break
    if not times["copied"]:
        raise RuntimeError("the files stay in memory; choose a folder on a disk with --folder")
    return times, left_out


def _dropped(files: Sequence[Path]) -> bool:
    """Drop files from the page cache; whether that worked."""
    for _ in range(_TRIES):
        for path in files:
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)
        if all(_in_memory(path) <= _LEFT for path in files):
            return True
    return False


def _in_memory(path: Path) -> float:
    """The part of a file's pages that is in memory. The system tells only a file's owner."""
    size = path.stat().st_size
    with (
        path.open("rb") as file,
        contextlib.closing(mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ)) as mapping,
    ):
        pages = np.zeros(math.ceil(size / mmap.PAGESIZE), np.uint8)
        view = np.frombuffer(mapping, np.uint8)
        libc = ctypes.CDLL(None, use_errno=True)
        failed = libc.mincore(
            ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(size), ctypes.c_void_p(pages.ctypes.data)
        )
        del view
        if failed:
            raise OSError(ctypes.get_errno(), "mincore")
        return float((pages & 1).mean())


def _touched(tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """Read a byte of every page of some tensors."""
    for tensor in tensors.values():
        int(tensor.reshape(-1).view(torch.uint8).numpy()[:: mmap.PAGESIZE].sum())
    return tensors


def _read_ahead(path: Path) -> str:
    """How far the system reads ahead of whoever reads a file in order."""
    device = path.stat().st_dev
    block = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    for place in (block, block.resolve().parent):
        with contextlib.suppress(OSError):
            return (place / "queue/read_ahead_kb").read_text().strip() + " KiB"
    return "an unknown number of KiB"
