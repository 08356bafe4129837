"""What the depth of differences costs a load: the tree that `registry compact` makes, against flatter ones and a star.

In the tree most versions rest on a near one, and up to four differences are turned back one after the other. In a star each rests on
the anchor alone: it takes more bytes, and a load turns back one difference. Trees of two and three levels lie between.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from itertools import islice
from pathlib import Path
from unittest import mock

import torch

from benchmarks.measure import Contender, Result, Scale, Section, Table, ratio, take_turns
from benchmarks.series import CHECKPOINTS
from benchmarks.tasks import Task, digits, fine_tuned, parameters_as, text
from registry import Registry
from registry.upkeep import choosing

RATE = 1e-5
DEPTHS = {1: "a star", 2: "2 levels", 3: "3 levels", 4: "4 levels (ours)"}
STAR, TREE, WHOLE = 1, 4, 0


def measure(folder: Path, scale: Scale) -> Section:
    """Measure the slowest load of a tree, of flatter ones, of a star, and of versions that are whole; and their bytes."""
    section = Section()
    for task in (digits(64),) if scale.quick else (digits(64), text()):
        _measure(task, folder / task.name, scale, section)
    return section


def _measure(task: Task, folder: Path, scale: Scale, section: Section) -> None:
    registries = {depth: Registry(folder / str(depth)) for depth in (WHOLE, *DEPTHS)}
    for state in islice(fine_tuned(task, RATE), CHECKPOINTS):
        for registry in registries.values():
            registry.save("net", parameters_as(state, torch.bfloat16))
    for depth in DEPTHS:
        with mock.patch.object(choosing, "_on_the_way", partial(_on_the_way, depth)):
            registries[depth].compact()
    sizes = {}
    for depth, registry in registries.items():
        registry.collect_garbage(grace=0)
        sizes[depth] = registry.status().stored
    versions = [f"net:v{number}" for number in range(1, CHECKPOINTS + 1)]
    slowest = {}
    for depth, registry in registries.items():
        times = take_turns({version: _load(registry, version) for version in versions}, 1)
        slowest[depth] = max(times, key=lambda version: times[version][0])
    times = take_turns(
        {str(depth): _load(registry, slowest[depth]) for depth, registry in registries.items()}, scale.rounds
    )
    for registry in registries.values():
        registry.catalog.close()
    what = f"{task.name}, {CHECKPOINTS} checkpoints, AdamW {RATE:g}, bf16"
    smaller = {depth: sizes[WHOLE] / size for depth, size in sizes.items()}
    loads = {
        depth: [
            ratio(f"{what}: the slowest load of the tree", times, str(depth), str(other), goal, name)
            for other, goal, name in (
                (STAR, 1.5, "the star's slowest"),
                (WHOLE, None, "a version that is whole"),
            )
        ]
        for depth in DEPTHS
    }
    section.results += [
        *loads[TREE],
        Result(
            f"{what}: bytes of the tree, against the star",
            sizes[TREE] / sizes[STAR],
            None,
            f"{smaller[TREE]:.2f} times smaller than whole versions, against {smaller[STAR]:.2f}",
        ),
    ]
    rows = [
        [name, f"{smaller[depth]:.2f}", *(f"{result.value:.2f}" for result in loads[depth])]
        for depth, name in DEPTHS.items()
    ]
    columns = ["", "times smaller", "slowest load, of the star's", "slowest load, of a whole one's"]
    section.tables.append(Table(f"{what}: what each level saves and costs", columns, rows))


def _on_the_way(depth: int, position: int, anchor: int, _resting: Collection[int]) -> int:
    """As `choosing._on_the_way` of versions that are all differences, with no more than some levels."""
    side = 1 if position > anchor else -1
    distance = abs(position - anchor)
    distance &= distance - 1
    while distance.bit_count() >= depth:
        distance &= distance - 1
    return anchor + side * distance


def _load(registry: Registry, version: str) -> Contender:
    return (lambda: None, lambda: registry[version].load(copy=True))
