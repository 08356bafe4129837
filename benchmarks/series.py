"""Bytes on the disk of real training series. A ResNet18 was trained on digits for a while, and then trains on.

Each series has 20 checkpoints: a new head on a frozen network, fine-tuning of the whole network by AdamW at two learning
rates, and the parameters of such a fine-tuning in bfloat16.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from benchmarks.measure import Result, Scale, Section, Table
from benchmarks.peers import COMPACTED, OURS, PEERS, TORCH, Peer, PeerFailed, Worker
from registry.models import data
from registry.models.resnet import ResNet18, ResNet18Config

CHECKPOINTS = 20
"""Checkpoints of a series."""

STEPS = 3
"""Steps from one checkpoint to the next."""

BATCH = 32
"""Samples of a batch."""

Series = Callable[[], Iterator[dict[str, Any]]]
"""Gives the states of a series, one checkpoint after the other."""


def measure(folder: Path, scale: Scale) -> Section:
    """Measure the bytes of each series in every peer, against a copy of each file."""
    count = 4 if scale.quick else CHECKPOINTS
    batches = digit_batches()
    network = trained(batches)
    series: dict[str, tuple[Series, float | None]] = {
        "new head, frozen network": (frozen(network, batches), 1 / 19),
        "AdamW 1e-4, fp32": (fine_tuned(network, batches, 1e-4), None),
        "AdamW 1e-5, fp32": (fine_tuned(network, batches, 1e-5), 1 / 1.5),
        "AdamW 1e-5, bf16 parameters": (
            fine_tuned(network, batches, rate=1e-5, weights_as=torch.bfloat16),
            1 / 6.6,
        ),
    }
    peers = (OURS, COMPACTED, TORCH) if scale.quick else (OURS, COMPACTED, *_others())
    if scale.quick:
        series = {name: series[name] for name in list(series)[::3]}
    sizes: dict[tuple[str, Peer], int | str] = {}
    zeros: dict[str, float] = {}
    results = []
    for name, (states, goal) in series.items():
        files = _write(folder, states, count)
        for peer in peers:
            sizes[name, peer] = _size(peer, files, folder / "store")
        zeros[name] = zero_moments(files[-1])
        for file in files:
            file.unlink()
        copies, ours, plain = sizes[name, TORCH], sizes[name, COMPACTED], sizes[name, OURS]
        if isinstance(copies, int) and isinstance(ours, int) and isinstance(plain, int):
            detail = f"{copies / 1e6:,.0f} MB as copies, {plain / 1e6:,.0f} MB shared, {ours / 1e6:,.0f} MB compacted"
            results.append(
                Result(
                    f"{count} checkpoints, {name}: {copies / ours:.2f} times smaller",
                    ours / copies,
                    goal=None if scale.quick else goal,
                    detail=detail,
                )
            )
    rows = [[peer.name, *(_shown(sizes[name, peer]) for name in series)] for peer in peers]
    reasons = {
        f"{peer.name} cannot store {name}: {size}"
        for (name, peer), size in sizes.items()
        if isinstance(size, str) and not size.endswith("not exact")
    }
    table = Table(f"bytes on the disk of {count} checkpoints of a ResNet18", ["", *series], rows)
    notes = [
        f"In the series {name}, {share:.0%} of the elements of Adam's moments are exactly zero: a ResNet18 made for "
        "images of 224 pixels has maps of a single pixel on digits. A network that uses all of its parameters shrinks "
        "less."
        for name, share in zeros.items()
        if share > 0.05
    ]
    return Section(results, tables=[table], notes=[*notes, *sorted(reasons)])


def zero_moments(file: Path) -> float:
    """The share of zeros among the moments of Adam in a file; 0 if it has none."""
    state = torch.load(file).get("optimizer", {"state": {}})["state"]
    moments = [one[name] for one in state.values() for name in ("exp_avg", "exp_avg_sq")]
    count = sum(moment.numel() for moment in moments)
    return sum(int((moment == 0).sum()) for moment in moments) / count if count else 0.0


def _others() -> tuple[Peer, ...]:
    """The peers that differ in how they store. Two ways to load can share one way to store."""
    return tuple(peer for peer in PEERS if peer.key not in ("registry", "registry owned", "torch mmap"))


def _shown(size: int | str) -> str:
    if isinstance(size, int):
        return f"{size / 1e6:,.0f} MB"
    return size if size.endswith("not exact") else "cannot"


def _write(folder: Path, states: Series, count: int) -> list[Path]:
    files = []
    for number, state in zip(range(count), states(), strict=False):
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


def digit_batches() -> list[Any]:
    """Batches of 32 real handwritten digits, float32 [32, 1, 32, 32], with their labels."""
    torch.manual_seed(0)
    found = data.load("digits", None, seed=0)
    loader = torch.utils.data.DataLoader(found.train, BATCH, shuffle=True, drop_last=True)
    return [(functional.pad(images, (2, 2, 2, 2)), labels) for images, labels in loader]


def trained(batches: Sequence[Any]) -> nn.Module:
    """A ResNet18 after 40 steps."""
    network = ResNet18(ResNet18Config(channels=1))
    _train(network, torch.optim.AdamW(network.parameters(), 1e-3), batches, steps=40)
    return network


def frozen(network: nn.Module, batches: Sequence[Any]) -> Series:
    """The series in which only the last layer is trained. BatchNorm layers stay as they are."""

    def series() -> Iterator[dict[str, Any]]:
        model = copy.deepcopy(network)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith("fc."))
        model.eval()
        head: Any = model.fc
        yield from _checkpoints(model, torch.optim.AdamW(head.parameters(), 1e-3), batches)

    return series


def fine_tuned(
    network: nn.Module, batches: Sequence[Any], rate: float, weights_as: torch.dtype | None = None
) -> Series:
    """The series in which the whole network is trained.

    Args:
        rate: the learning rate.
        weights_as: cast the tensors to this dtype, and leave out the optimizer's state.
    """

    def series() -> Iterator[dict[str, Any]]:
        model = copy.deepcopy(network)
        for state in _checkpoints(model, torch.optim.AdamW(model.parameters(), rate), batches):
            if weights_as is None:
                yield state
                continue
            yield {
                "model": {
                    name: value.to(weights_as) if value.is_floating_point() else value
                    for name, value in state["model"].items()
                }
            }

    return series


def _checkpoints(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: Sequence[Any]
) -> Iterator[dict[str, Any]]:
    number = 0
    while True:
        start = number % len(batches)
        _train(model, optimizer, [*batches[start:], *batches[:start]], steps=STEPS)
        yield {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        number += 1


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Sequence[Any], steps: int) -> None:
    for step in range(steps):
        images, labels = batches[step % len(batches)]
        loss = functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
