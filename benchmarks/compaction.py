"""Compaction of real training series against plain copies of every file, and the speed of its coding.

A ResNet18 is trained on digits for a while, and then four times 20 checkpoints are taken: a new head on a frozen
network, and fine-tuning of all of it by AdamW, at two learning rates, and with weights kept in bfloat16.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from benchmarks.measure import Result
from registry import Registry
from registry.models import data
from registry.models.resnet import ResNet18, ResNet18Config
from registry.store import differences
from registry.store.loading import in_parallel

CHECKPOINTS = 20
STEPS = 3
BATCH = 32

Series = Callable[[], Iterator[dict[str, Any]]]


def measure(folder: Path, rounds: int) -> list[Result]:
    """Bytes of each series after `gc`, the copies being 1, and seconds that a gigabyte takes."""
    batches = _batches()
    network = ResNet18(ResNet18Config(channels=1))
    _train(network, torch.optim.AdamW(network.parameters(), 1e-3), batches, 40)

    def frozen() -> Iterator[dict[str, Any]]:
        model = copy.deepcopy(network)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith("fc."))
        model.eval()  # its BatchNorm layers stay as they are
        yield from _fine_tuned(model, torch.optim.AdamW(model.fc.parameters(), 1e-3), batches)

    def fine_tuned(rate: float, dtype: torch.dtype | None = None) -> Series:
        def series() -> Iterator[dict[str, Any]]:
            model = copy.deepcopy(network)
            optimizer = torch.optim.AdamW(model.parameters(), rate)
            for state in _fine_tuned(model, optimizer, batches):
                if dtype:
                    weights = {
                        k: v.to(dtype) if v.is_floating_point() else v for k, v in state["model"].items()
                    }
                    state = {"model": weights}
                yield state

        return series

    cases: list[tuple[str, Series, float | None]] = [
        ("new head on a frozen network", frozen, 1 / 19),
        ("AdamW at 1e-4, float32", fine_tuned(1e-4), None),
        ("AdamW at 1e-5, float32", fine_tuned(1e-5), 1 / 1.5),
        ("AdamW at 1e-5, weights in bfloat16", fine_tuned(1e-5, torch.bfloat16), 1 / 6.6),
    ]
    found = [_size(name, series, goal, folder / f"series{i}") for i, (name, series, goal) in enumerate(cases)]
    return found + _speed(network, batches, rounds)


def _size(name: str, series: Series, goal: float | None, folder: Path) -> Result:
    registry = Registry(folder)
    copies = 0
    last: dict[str, Any] = {}
    for last in series():
        copies += registry.save("net", last).size
    shared = registry.status().stored
    began = time.perf_counter()
    registry.compact()
    seconds = time.perf_counter() - began
    registry.collect_garbage(grace=0)
    stored = registry.status().stored
    assert not registry.verify().problems
    detail = (
        f"{copies / 1e6:,.0f} MB as copies, {shared / 1e6:,.0f} MB shared, {stored / 1e6:,.1f} MB compacted in "
        f"{seconds:.1f} s: {copies / stored:.2f} times smaller"
    )
    return Result(f"compact: {name}", stored / copies, goal, detail)


def _speed(network: nn.Module, batches: Sequence[Any], rounds: int) -> list[Result]:
    """Seconds that coding and decoding the weights takes for each gigabyte."""
    model = copy.deepcopy(network)
    _train(model, torch.optim.AdamW(model.parameters(), 1e-5), batches, STEPS)
    both = (_bytes(model), _bytes(network))
    new, old = memoryview(both[0]), memoryview(both[1])
    back = bytearray(len(new))

    def run(jobs: Sequence[Any], work: Callable[[Any], None]) -> None:
        in_parallel(jobs, work, [differences.CHUNK] * len(jobs))

    coding, decoding = [], []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        coded = differences.encode(new, old, 4, run)
        coding.append(time.perf_counter() - began)
        began = time.perf_counter()
        task = differences.Decoding(memoryview(coded), old, 4, memoryview(back))
        run(range(task.chunks), task.work)
        decoding.append(time.perf_counter() - began)
    assert back == both[0]
    size = len(new) / 1e9

    def result(what: str, times: list[float], goal: float) -> Result:
        seconds = min(times[1:]) / size
        return Result(f"compact: {what} a gigabyte", seconds, goal, f"{1 / seconds:.2f} GB/s", unit="s")

    return [result("encode", coding, 1 / 0.8), result("decode", decoding, 1.0)]


def _bytes(model: nn.Module) -> bytes:
    flat = torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])
    return flat.numpy().tobytes()


def _fine_tuned(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: Sequence[Any]
) -> Iterator[dict[str, Any]]:
    for number in range(CHECKPOINTS):
        _train(model, optimizer, batches[number:] + batches[:number], STEPS)
        yield {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Sequence[Any], steps: int) -> None:
    for step in range(steps):
        images, labels = batches[step % len(batches)]
        loss = functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def _batches() -> list[Any]:
    torch.manual_seed(0)
    found = data.load("digits", None, seed=0)
    pad = lambda images: functional.pad(images, (2, 2, 2, 2))  # noqa: E731 - a ResNet18 takes 32 pixels
    loader = torch.utils.data.DataLoader(found.train, BATCH, shuffle=True, drop_last=True)
    return [(pad(images), labels) for images, labels in loader]
