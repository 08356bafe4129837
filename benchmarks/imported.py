"""Models that were imported without a history: what `registry compact` saves of them, alone and by finding what is near.

One network is trained on several times, at other rates and for longer or shorter. Some of the results have other names for their
layers, in another order. They are imported shuffled, each as a model of its own. What is saved is compared with what is
saved where it is known from which network each came.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from itertools import islice
from pathlib import Path

import torch

from benchmarks.compaction import bytes_of, encode, run
from benchmarks.measure import Result, Scale, Section, spoken
from benchmarks.tasks import Task, digits, fine_tuned, parameters_as, text
from registry import Registry
from registry.store.recoding import SMALLEST, WORTH_IT

RATES = ((1e-5, 1), (1e-5, 7), (3e-5, 7), (1e-4, 1), (1e-4, 7))
"""For each fine-tune the learning rate, and the checkpoints of the series after which it ends."""

ALONE = {torch.bfloat16: 0.67, torch.float32: 0.84}
"""What a network may take that is coded by itself."""

Network = Mapping[str, torch.Tensor]


def measure(folder: Path, scale: Scale) -> Section:
    """Measure what is saved of fine-tunes without a history, and of first checkpoints."""
    section = Section()
    for task in (digits(64),) if scale.quick else (digits(64), text()):
        networks = _networks(task)
        for dtype in (torch.bfloat16, torch.float32):
            typed = {
                name: parameters_as({"model": network}, dtype)["model"] for name, network in networks.items()
            }
            name = f"{task.name}, {str(dtype).removeprefix('torch.')}"
            section.results += _near(name, typed, folder / f"{task.name} {dtype}")
            section.results.append(
                _alone(name, typed["base"], folder / f"{task.name} {dtype} alone", ALONE[dtype])
            )
    return section


def _networks(task: Task) -> dict[str, Network]:
    """The network that all came from, and the fine-tunes."""
    found: dict[str, Network] = {"base": task.network.state_dict()}
    for number, (rate, count) in enumerate(RATES):
        *_, last = islice(fine_tuned(task, rate), count)
        network = {name: value.clone() for name, value in last["model"].items()}
        if number % 2:
            network = {f"backbone.{name}": value for name, value in reversed(network.items())}
        found[f"tuned{number}"] = network
    return found


def _near(name: str, networks: Mapping[str, Network], folder: Path) -> list[Result]:
    """What is saved of the fine-tunes, and the part of the time that is spent on finding what is near."""
    registry = Registry(folder)
    order = sorted(networks)
    random.Random(0).shuffle(order)
    for model in order:
        registry.save(model, {"model": networks[model]})
    began = time.perf_counter()
    registry.compact(similar=True, dry_run=True)
    searched = time.perf_counter() - began
    began = time.perf_counter()
    done = registry.compact(similar=True)
    took = time.perf_counter() - began
    assert not registry.verify().problems
    saved = sum(one.before - (one.after or 0) for one in done)
    known = _saved_by_history(networks)
    size = sum(_size(network) for model, network in networks.items() if model != "base")
    registry.catalog.close()
    return [
        Result(
            f"{name}: {len(RATES)} fine-tunes without a history, saved with it over saved without",
            known / saved,
            1 / 0.9,
            f"of {size / 1e6:,.0f} MB {known / 1e6:,.0f} MB are saved if it is known, {saved / 1e6:,.0f} MB by looking",
        ),
        Result(
            f"{name}: the part of compaction that looks for what is near",
            searched / took,
            0.05,
            f"{spoken(searched)} of {spoken(took)}",
        ),
    ]


def _saved_by_history(networks: Mapping[str, Network]) -> int:
    """Bytes that are saved if each fine-tune is coded as the difference from the network that it came from."""
    saved = 0
    for model, network in networks.items():
        for name, value in network.items() if model != "base" else ():
            old = networks["base"][name.removeprefix("backbone.")]
            if value.is_floating_point() and value.nbytes >= SMALLEST:
                coded = encode(bytes_of(value), bytes_of(old), item_size=value.element_size(), run=run)
                saved += value.nbytes - len(coded) if len(coded) <= WORTH_IT * value.nbytes else 0
    return saved


def _alone(name: str, network: Network, folder: Path, goal: float) -> Result:
    """What is left of a first checkpoint that is coded by itself."""
    registry = Registry(folder)
    registry.save("net", {"model": network})
    (done,) = registry.compact(alone=True)
    assert not registry.verify().problems
    registry.catalog.close()
    size = _size(network)
    return Result(
        f"{name}: a first checkpoint, coded by itself",
        (done.after or size) / size,
        goal,
        f"{size / 1e6:,.1f} MB became {(done.after or size) / 1e6:,.1f} MB",
    )


def _size(network: Network) -> int:
    return sum(value.nbytes for value in network.values())
