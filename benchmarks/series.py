"""Bytes on the disk of real training series: networks that were trained for a while, and then train on.

Each series has 20 checkpoints, three steps apart: a new head on a frozen network, fine-tuning of the whole network by AdamW at
two learning rates, and the parameters of such a fine-tuning in bfloat16. Beside each ratio stands how much of it is due to
elements that never move.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.measure import Result, Scale, Section, Table
from benchmarks.peers import COMPACTED, OURS, PEERS, TORCH, Peer, PeerFailed, Worker
from benchmarks.tasks import STEPS, State, Task, digits, fine_tuned, frozen, parameters_as, text

CHECKPOINTS = 20
"""Checkpoints of a series."""

IDLE = 0.05
"""The part of moments that are zero from which on a series is said to shrink more than others."""


class _Series(NamedTuple):
    """A series that is made of a training's checkpoints.

    Attributes:
        dtype: of the network alone, whose floats are turned into it; None for checkpoints as they are.
        goal: the part of the copies' bytes that it may take.
        is_compared: whether all tools store it.
    """

    name: str
    dtype: torch.dtype | None
    goal: float | None
    is_compared: bool = False


class _Still(NamedTuple):
    """How much of a series does not move.

    Attributes:
        zeros: the part of Adam's moments that are exactly zero; None without moments.
        unchanged: the part of a network's floats whose bits are those of the checkpoint before.
    """

    zeros: float | None
    unchanged: float

    def __str__(self) -> str:
        zeros = "" if self.zeros is None else f"{self.zeros:.0%} of the moments zero, "
        return f"{zeros}{self.unchanged:.0%} of the parameters unchanged since the checkpoint before"


def measure(folder: Path, scale: Scale) -> Section:
    """Measure the bytes of each series, and those that other tools take for some, against a copy of each file."""
    count = 4 if scale.quick else CHECKPOINTS
    peers = (OURS, COMPACTED, TORCH) if scale.quick else (OURS, COMPACTED, *_others())
    sizes: dict[str, dict[Peer, int | str]] = {}
    results, notes = [], []
    for name, series, files in _written(folder, scale, count):
        tools = peers if series.is_compared else (OURS, COMPACTED, TORCH)
        found = {peer: _size(peer, files, folder / "store") for peer in tools}
        still = _still(*files[-2:])
        if series.is_compared:
            sizes[name] = found
        copies, ours, plain = found[TORCH], found[COMPACTED], found[OURS]
        if isinstance(copies, int) and isinstance(ours, int) and isinstance(plain, int):
            detail = f"{copies / 1e6:,.0f} MB as copies, {plain / 1e6:,.0f} MB shared, {ours / 1e6:,.0f} MB compacted; {still}"
            what = f"{count} checkpoints, {name}: {copies / ours:.2f} times smaller"
            results.append(Result(what, ours / copies, None if scale.quick else series.goal, detail))
        if (still.zeros or 0) > IDLE:
            notes.append(
                f"In the series {name}, {still.zeros:.0%} of Adam's moments are exactly zero, as a ResNet18 has maps of a "
                "single pixel there. A network that uses all of its parameters shrinks less."
            )
    rows = [[peer.name, *(_shown(found[peer]) for found in sizes.values())] for peer in peers]
    reasons = {
        f"{peer.name} cannot store {name}: {size}"
        for name, found in sizes.items()
        for peer, size in found.items()
        if isinstance(size, str) and not size.endswith("not exact")
    }
    table = Table(f"bytes on the disk of {count} checkpoints, {STEPS} steps apart", ["", *sizes], rows)
    return Section(results, tables=[table], notes=[*notes, *sorted(reasons)])


def _written(folder: Path, scale: Scale, count: int) -> Iterator[tuple[str, _Series, Sequence[Path]]]:
    """Each series by its name, with the files of its checkpoints; they are there until the next one."""
    for task, states, all_series in _trainings(scale):
        trained = _write(folder / "trained", islice(states, count))
        for series in all_series:
            files: Sequence[Path] = trained
            if series.dtype is not None:
                converted = (parameters_as(torch.load(file), series.dtype) for file in trained)
                files = _write(folder / "converted", converted)
            yield f"{task.name}, {series.name}", series, files
        for part in ("trained", "converted"):
            shutil.rmtree(folder / part, ignore_errors=True)


def _trainings(scale: Scale) -> Iterator[tuple[Task, Iterator[State], Sequence[_Series]]]:
    """Trainings, one network after the other, and the series that are made of each."""
    images = digits(64)
    yield (
        images,
        frozen(images),
        [_Series("new head, frozen network", None, None if scale.quick else 1 / 19, True)],
    )
    if scale.quick:
        yield images, fine_tuned(images, 1e-5), [_in_bfloat16(1e-5, None, is_compared=True)]
        return
    for task, goal in ((images, 1 / 8), (text(), 1 / 9)):
        yield task, fine_tuned(task, 1e-4), [_whole(1e-4, None), _in_bfloat16(1e-4, None)]
        # Other tools but one take a copy of each, whatever the network is.
        compared = task is images
        yield (
            task,
            fine_tuned(task, 1e-5),
            [
                _whole(1e-5, 1 / 1.5, is_compared=compared),
                _in_bfloat16(1e-5, goal, is_compared=compared),
            ],
        )
    small = digits(32)
    yield small, fine_tuned(small, 1e-5), [_whole(1e-5, None), _in_bfloat16(1e-5, 1 / 11)]


def _whole(rate: float, goal: float | None, *, is_compared: bool = False) -> _Series:
    return _Series(f"AdamW {rate:g}, fp32", None, goal, is_compared)


def _in_bfloat16(rate: float, goal: float | None, *, is_compared: bool = False) -> _Series:
    return _Series(f"AdamW {rate:g}, bf16 parameters", torch.bfloat16, goal, is_compared)


def _still(before: Path, file: Path) -> _Still:
    """How much of a series does not move, by two files of it."""
    old, new = torch.load(before), torch.load(file)
    state = new.get("optimizer", {"state": {}})["state"]
    moments = [one[name] for one in state.values() for name in ("exp_avg", "exp_avg_sq")]
    floats = [name for name, value in new["model"].items() if value.is_floating_point()]
    same = sum(int((new["model"][name] == old["model"][name]).sum()) for name in floats)
    zeros = sum(int((moment == 0).sum()) for moment in moments)
    return _Still(
        zeros=zeros / sum(moment.numel() for moment in moments) if moments else None,
        unchanged=same / sum(new["model"][name].numel() for name in floats),
    )


def _others() -> tuple[Peer, ...]:
    """The peers that differ in how they store. Two ways to load can share one way to store."""
    return tuple(peer for peer in PEERS if peer.key not in ("registry", "registry owned", "torch mmap"))


def _shown(size: int | str) -> str:
    if isinstance(size, int):
        return f"{size / 1e6:,.0f} MB"
    return size if size.endswith("not exact") else "cannot"


def _write(folder: Path, states: Iterable[State]) -> Sequence[Path]:
    """Write each state into a file of its own, in a new folder."""
    folder.mkdir()
    files = []
    for number, state in enumerate(states):
        files.append(folder / f"{number}.pt")
        torch.save(state, files[-1])
    return files


def _size(peer: Peer, files: Sequence[Path], folder: Path) -> int | str:
    """The bytes that a peer takes for all files, or the reason why it cannot store them."""
    try:
        with Worker(peer, 600.0) as worker:
            worker.ask("open", folder=str(folder))
            for file in files:
                worker.ask("state", file=str(file))
                worker.ask("save")
            if worker.ask("load", update=False, check=True)["differs"]:
                return f"{worker.ask('close')['bytes'] / 1e6:,.0f} MB, not exact"
            return int(worker.ask("close")["bytes"])
    except PeerFailed as failed:
        return str(failed)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
