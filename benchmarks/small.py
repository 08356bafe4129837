"""Saving many small tensors, and saving little, against a plain write of the same bytes and safetensors; all of it durable."""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import safetensors.torch
import torch
from blake3 import blake3

from benchmarks.floors import plain_write, sync, touch_free_memory
from benchmarks.measure import Contender, Result, Scale, Section, Table, ratio, spoken, take_turns
from benchmarks.states import new_registry
from registry import Registry
from registry.store.pausing import collector_paused

KB = 1 << 10

_SAVES = 10
"""Saves whose syncs are counted."""

_PLAIN_SYNCS = 2
"""Syncs of a plain write: of the file, and of the folder that its name is in."""


def measure(folder: Path, scale: Scale) -> Section:
    """Measure 100,000 tensors of 16 KiB and of 64 bytes, and a save of eight tensors."""
    count = 20_000 if scale.quick else 100_000
    rounds = min(scale.rounds, 3)
    large = f"{count:,} tensors of 16 KiB: save, all new"
    parts = [_parts(count, size, folder=folder, rounds=rounds) for size in (16 * KB, 64)]
    columns = [
        "",
        "in all",
        "looked at",
        "hashed, written, synced",
        "log and catalog",
        "BLAKE3 alone, one core",
    ]
    where = Table("where the time of a save goes", columns, parts)
    times = _many(count, 16 * KB, folder=folder, rounds=rounds)
    found = [
        ratio(large, times, ours="save", peer="plain", goal=3.0, name="a plain write"),
        ratio(large, times, ours="save", peer="safetensors", goal=None),
    ]
    times = _many(count, 64, folder=folder, rounds=scale.rounds)
    found.append(
        ratio(
            f"{count:,} tensors of 64 bytes: save, all new", times, ours="save", peer="safetensors", goal=1.0
        )
    )
    found.append(_little(folder, 10 * scale.rounds))
    if shutil.which("strace") is None:
        return Section(
            found, tables=[where], notes=["the syncs of a save were not counted: strace is not there"]
        )
    return Section([*found, _syncs(folder)], tables=[where])


def _parts(count: int, size: int, folder: Path, rounds: int) -> list[str]:
    """How long each part of a save of so many tensors of so many bytes takes, and what hashing them takes at least."""
    values = torch.randn(count, size // 4)
    tensors = {f"layer{i}": values[i].clone() for i in range(count)}
    buffers = [memoryview(tensor.numpy()).cast("B") for tensor in tensors.values()]
    root, found = folder / "parts", []
    for _ in range(rounds):
        store = new_registry(root).store
        # As `save` does it.
        with collector_paused([size] * count):
            began = time.perf_counter()
            encoded = store.encode({"model": tensors})
            looked_at = time.perf_counter()
            store.put(encoded)
            stored = time.perf_counter()
        registry = new_registry(root)
        ready = time.perf_counter()
        registry.save("net", {"model": tensors})
        saved = time.perf_counter()
        for buffer in buffers:
            blake3(buffer).digest()
        hashed = time.perf_counter()
        rest = (saved - ready) - (stored - began)
        found.append((saved - ready, looked_at - began, stored - looked_at, rest, hashed - saved))
    shutil.rmtree(root)
    each = f"{count:,} tensors of {size:,} bytes"
    return [each, *(spoken(statistics.median(part)) for part in zip(*found, strict=True))]


def _many(count: int, size: int, folder: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds of saves of so many tensors of so many bytes each, of the same in safetensors, and of a plain write."""
    values = torch.randn(count, size // 4)
    tensors = {f"layer{i}": values[i].clone() for i in range(count)}
    total = values.nbytes
    del values
    root, plain, peer = (folder / name for name in ("registry", "plain", "peer.safetensors"))

    def settle() -> None:
        plain.unlink(missing_ok=True)
        peer.unlink(missing_ok=True)
        new_registry(root)
        touch_free_memory(folder, total)

    def safetensors_save() -> None:
        safetensors.torch.save_file(tensors, peer)
        sync(peer)

    contenders: dict[str, Contender] = {
        "plain": (settle, lambda: plain_write([*tensors.values()], plain)),
        "safetensors": (settle, safetensors_save),
        "save": (settle, lambda: Registry(root).save("net", {"model": tensors})),
    }
    times = take_turns(contenders, rounds)
    settle()
    return times


def _eight() -> dict[str, torch.Tensor]:
    """Eight tensors of 30 KB."""
    return {f"layer{i}": torch.randn(7_600) for i in range(8)}


def _little(folder: Path, rounds: int) -> Result:
    """A small save of a training, where the registry is there and the tensors are new."""
    tensors = _eight()
    registry = new_registry(folder / "little")

    def change() -> None:
        for tensor in tensors.values():
            tensor.add_(1)

    contenders: dict[str, Contender] = {
        "plain": (change, lambda: plain_write([*tensors.values()], folder / "plain")),
        "save": (change, lambda: registry.save("net", {"model": tensors})),
    }
    t = take_turns(contenders, rounds)
    return ratio(
        "8 tensors, 243 KB: save, all new", t, ours="save", peer="plain", goal=None, name="a plain write"
    )


def _syncs(folder: Path) -> Result:
    """How often a small save syncs: what a process of several saves does more than one of a single save."""
    most, first = (_syncs_of(folder / f"{count}", count) for count in (_SAVES + 1, 1))
    each = (most - first) / _SAVES
    return Result(
        "8 tensors, 243 KB: syncs of a save, all new",
        each / _PLAIN_SYNCS,
        goal=None,
        detail=f"{each:.1f} syncs against {_PLAIN_SYNCS} of a plain write",
    )


def _syncs_of(root: Path, saves: int) -> int:
    """The syncs of a process that saves so often into a new registry."""
    trace = root.with_suffix(".strace")
    command = ["strace", "-f", "--seccomp-bpf", "-e", "trace=fsync,fdatasync", "-o", str(trace)]
    subprocess.run([*command, sys.executable, "-m", __name__, str(root), str(saves)], check=True)
    return sum("sync(" in line for line in trace.read_text().splitlines())


def _save_often(root: Path, saves: int) -> None:
    registry = Registry(root)
    for _ in range(saves):
        registry.save("net", {"model": _eight()})


if __name__ == "__main__":
    _save_often(Path(sys.argv[1]), int(sys.argv[2]))
