"""Diff, plan and apply, on states of 1.5 GB and on 10,000 tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import torch
import torchvision
from torch import nn

from benchmarks.measure import Contender, Result, Scale, Section, absolute, ratio, take_turns
from benchmarks.states import gpt2_small_with_adam
from registry import Registry, diff, plan_transfer

_CHUNK = 1 << 19
"""Bytes that a comparison takes at once, so that what it writes stays in the processor's cache."""


def measure(folder: Path, scale: Scale) -> Section:
    """Measure all ratios and times of transfer."""
    rounds = scale.rounds
    return Section([*_diffs(folder, rounds), _planning(rounds), *_applying(folder / "applied", rounds)])


def _diffs(folder: Path, rounds: int) -> list[Result]:
    registry = Registry(folder / "registry")
    state = gpt2_small_with_adam()
    moments = {f"{i}.{k}": v for i, one in state["optimizer"]["state"].items() for k, v in one.items()}
    tensors = {**state["model"], **moments}
    other = {name: tensor + 1e-3 for name, tensor in tensors.items()}
    registry.save("a", {"model": tensors})
    registry.save("b", {"model": other})

    same = {name: tensor.clone() for name, tensor in tensors.items()}
    words = [
        tuple(one.reshape(-1).view(torch.uint8).numpy() for one in (tensor, same[name]))
        for name, tensor in tensors.items()
    ]

    def compare() -> None:
        for one, other in words:
            for start in range(0, len(one), _CHUNK):
                numpy.array_equal(*(_wide(part[start : start + _CHUNK]) for part in (one, other)))

    contenders: dict[str, Contender] = {
        "structure": (lambda: None, lambda: registry.diff("a", "b")),
        "values": (lambda: None, lambda: diff(tensors, other, values=True)),
        "one pass": (lambda: None, compare),
    }
    t = take_turns(contenders, rounds)
    size = sum(tensor.nbytes for tensor in tensors.values()) / 1e9
    return [
        absolute(
            f"structural diff, {len(tensors):,} tensors, {size:.1f} GB, none of it read", t["structure"], 0.1
        ),
        ratio(
            "value diff",
            t,
            ours="values",
            peer="one pass",
            goal=1.5,
            name="one pass over both, in one thread",
        ),
    ]


def _wide(part: numpy.ndarray[Any, Any]) -> numpy.ndarray[Any, Any]:
    """Bytes as words of 64 bits, where they are whole ones."""
    return part.view(numpy.uint64) if len(part) % 8 == 0 else part


def _planning(rounds: int) -> Result:
    with torch.device("meta"):
        source, target = (
            nn.ModuleDict({f"layer{i}": nn.Linear(2, 2) for i in range(5_000)}) for _ in range(2)
        )
    t = take_turns({"plan": (lambda: None, lambda: plan_transfer(source, target))}, rounds)
    return absolute("planning for 10,000 tensors", t["plan"], 0.5)


def _applying(folder: Path, rounds: int) -> list[Result]:
    source, target = torchvision.models.resnet50(), torchvision.models.resnet50()
    plan = plan_transfer(source, target)
    trusted = plan.model_copy(update={"source_digest": None, "allow_nan": True})
    state = source.state_dict()
    registry = Registry(folder)
    registry.save("net", {"model": state})
    stored = plan_transfer("net", target, registry=registry)
    torch.save(state, folder / "peer.pt")
    contenders: dict[str, Contender] = {
        "load_state_dict": (lambda: None, lambda: target.load_state_dict(state)),
        "apply": (lambda: None, lambda: plan.apply(target, source)),
        "looked at": (lambda: None, lambda: _checked(target, state)),
        "trusted": (lambda: None, lambda: trusted.apply(target, source)),
        "stored": (lambda: None, lambda: stored.apply(target)),
        "torch.load": (
            lambda: None,
            lambda: target.load_state_dict(torch.load(folder / "peer.pt", weights_only=True)),
        ),
    }
    t = take_turns(contenders, rounds)
    return [
        ratio("plan.apply, tensors checked to be finite", t, ours="apply", peer="load_state_dict", goal=1.3),
        ratio(
            "plan.apply, tensors checked to be finite",
            t,
            ours="apply",
            peer="looked at",
            goal=None,
            name="torch.isfinite and load_state_dict",
        ),
        ratio("plan.apply, tensors not checked", t, ours="trusted", peer="load_state_dict", goal=None),
        ratio(
            "plan.apply from a version, verified and checked to be finite",
            t,
            ours="stored",
            peer="torch.load",
            goal=None,
            name="torch.load + load_state_dict",
        ),
    ]


def _checked(target: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Load a state, once all its numbers have been seen to be finite."""
    assert all(bool(tensor.isfinite().all()) for tensor in state.values())
    target.load_state_dict(state)
