"""What the depth of differences costs a load: the tree that `registry compact` makes, against a star.

In the tree most versions rest on a near one, and up to four differences are turned back one after the other. In a star each rests on
the anchor alone: it takes more bytes, and a load turns back one difference.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from unittest import mock

import torch

from benchmarks.measure import Contender, Result, Scale, Section, ratio, take_turns
from benchmarks.series import CHECKPOINTS
from benchmarks.tasks import Task, digits, fine_tuned, parameters_as, text
from registry import Registry
from registry.upkeep import choosing

RATE = 1e-5


def measure(folder: Path, scale: Scale) -> Section:
    """Measure the slowest load of a tree, of a star, and of versions that are whole; and their bytes."""
    section = Section()
    for task in (digits(64),) if scale.quick else (digits(64), text()):
        section.results += _measured(task, folder / task.name, scale)
    return section


def _measured(task: Task, folder: Path, scale: Scale) -> list[Result]:
    registries = {name: Registry(folder / name) for name in ("tree", "star", "whole")}
    for state in islice(fine_tuned(task, RATE), CHECKPOINTS):
        for registry in registries.values():
            registry.save("net", parameters_as(state, torch.bfloat16))
    registries["tree"].compact()
    with mock.patch.object(choosing, "_on_the_way", lambda position, anchor, resting: anchor):
        registries["star"].compact()
    sizes = {}
    for name, registry in registries.items():
        registry.collect_garbage(grace=0)
        sizes[name] = registry.status().stored
    versions = [f"net:v{number}" for number in range(1, CHECKPOINTS + 1)]
    slowest = {}
    for name, registry in registries.items():
        times = take_turns({version: _load(registry, version) for version in versions}, 1)
        slowest[name] = max(times, key=lambda version: times[version][0])
    times = take_turns(
        {name: _load(registry, slowest[name]) for name, registry in registries.items()}, scale.rounds
    )
    for registry in registries.values():
        registry.catalog.close()
    what = f"{task.name}, {CHECKPOINTS} checkpoints, AdamW {RATE:g}, bf16"
    smaller = {name: sizes["whole"] / sizes[name] for name in ("tree", "star")}
    return [
        ratio(f"{what}: the slowest load of the tree", times, "tree", "star", 1.5, "the star's slowest"),
        ratio(
            f"{what}: the slowest load of the tree", times, "tree", "whole", None, "a version that is whole"
        ),
        Result(
            f"{what}: bytes of the tree, against the star",
            sizes["tree"] / sizes["star"],
            None,
            f"{smaller['tree']:.2f} times smaller than whole versions, against {smaller['star']:.2f}",
        ),
    ]


def _load(registry: Registry, version: str) -> Contender:
    return (lambda: None, lambda: registry[version].load(copy=True))
