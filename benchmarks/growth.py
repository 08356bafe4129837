"""The time of operations as work grows: more tensors, more bytes, more checkpoints."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks import catalogs
from benchmarks.measure import Contender, Curve, Scale, Section, take_turns
from benchmarks.states import new_registry
from registry import Registry

Tensors = dict[str, torch.Tensor]

_PARTS = 64
_MB = 1_000_000


def measure(folder: Path, scale: Scale) -> Section:
    """Measure curves of save, load, diff, list, best, verify and gc."""
    quick = scale.quick
    rounds = min(scale.rounds, 3)
    tensors = (10, 100, 1_000) if quick else (10, 100, 1_000, 10_000, 100_000)
    megabytes = (1, 16, 128) if quick else (1, 16, 256, 1_024, 4_096)
    checkpoints = (10, 100) if quick else (10, 100, 1_000, 10_000)
    found = _curves(
        tensors, "tensors", contenders=lambda n: _content(n, _many_tensors), folder=folder, rounds=rounds
    )
    found += _curves(megabytes, "MB", contenders=lambda n: _content(n, _bytes), folder=folder, rounds=rounds)
    found += _curves(
        checkpoints, "checkpoints", contenders=lambda n: _checkpoints(n), folder=folder, rounds=rounds
    )
    return Section(curves=found)


def _curves(
    sizes: Sequence[int],
    unit: str,
    contenders: Callable[[int], Callable[[Path], dict[str, Contender]]],
    folder: Path,
    rounds: int,
) -> list[Curve]:
    points: dict[str, list[tuple[float, float]]] = {}
    for size in sizes:
        place = folder / f"{size}"
        for name, times in take_turns(contenders(size)(place), rounds).items():
            points.setdefault(name, []).append((float(size), statistics.median(times)))
        shutil.rmtree(place)
    return [Curve(name, unit, found) for name, found in points.items()]


def _content(size: int, make: Callable[[int], Tensors]) -> Callable[[Path], dict[str, Contender]]:
    """The operations on two checkpoints that differ in every tensor."""

    def contenders(folder: Path) -> dict[str, Contender]:
        state = make(size)
        other = {name: tensor + 1 for name, tensor in state.items()}
        registry = Registry(folder / "registry")
        registry.save("net", {"model": other})
        del other
        registry.save("net", {"model": state})
        empty = folder / "new"

        def fresh() -> None:
            new_registry(empty)

        def save_new() -> object:
            return Registry(empty).save("net", {"model": state})

        def first() -> None:
            fresh()
            save_new()

        return {
            "save, all new": (fresh, save_new),
            "save, unchanged": (first, save_new),
            "load, verified": (_nothing, lambda: registry["net"].load()),
            "load, owned": (_nothing, lambda: registry["net"].load(copy=True)),
            "diff": (_nothing, lambda: registry.diff("net:v1", "net:v2")),
            "verify": (_nothing, lambda: registry.verify()),
            "gc": (_nothing, lambda: registry.collect_garbage()),
        }

    return contenders


def _checkpoints(count: int) -> Callable[[Path], dict[str, Contender]]:
    def contenders(folder: Path) -> dict[str, Contender]:
        registry = catalogs.filled(folder, count)
        counter = iter(range(count, 1 << 30))
        return {
            "save, all new": (_nothing, lambda: catalogs.save(registry, next(counter))),
            "load, verified": (_nothing, lambda: registry["net"].load()),
            "diff": (_nothing, lambda: registry.diff(f"net:v{count - 1}", f"net:v{count}")),
            "list": (_nothing, lambda: registry.names()),
            "best": (_nothing, lambda: registry.best("net", "accuracy")),
            "verify": (_nothing, lambda: registry.verify()),
            "gc": (_nothing, lambda: registry.collect_garbage()),
        }

    return contenders


def _many_tensors(count: int) -> Tensors:
    values = torch.randn(count, 16)
    return {f"layer{i}": values[i].clone() for i in range(count)}


def _bytes(megabytes: int) -> Tensors:
    each = megabytes * _MB // 4 // _PARTS
    return {f"part{i}": torch.randn(each) for i in range(_PARTS)}


def _nothing() -> None:
    pass
