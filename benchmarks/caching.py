"""The cache against joblib.Memory, torch.save and torch.load, and computing, for three kinds of results."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import joblib
import torch

from benchmarks.measure import Contender, Result, Scale, Section, ratio, spoken, take_turns
from registry import Registry

Make = Callable[[], Any]
"""A function whose result is cached."""


def tensors() -> dict[str, torch.Tensor]:
    """500 MB in 20 tensors, float32 [2500, 2500]. Subtracting the mean of each row is a little work."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for i in range(20):
        raw = torch.randn(2_500, 2_500, generator=generator)
        found[f"part {i}"] = raw - raw.mean(1, keepdim=True)
    return found


def small_tensors() -> list[torch.Tensor]:
    """100,000 tensors of 1 to 64 elements."""
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(1 + i % 64, generator=generator) for i in range(100_000)]


def strings() -> list[str]:
    """1,000,000 strings of 2 to 32 characters: a number and the beginning of the alphabet."""
    return [f"{i:x}-{'abcdefghijklmnopqrstuvwxyz'[: i % 27]}" for i in range(1_000_000)]


def measure(folder: Path, scale: Scale) -> Section:
    """Measure a hit and a miss for each kind of result."""
    cases: dict[str, Make] = {
        "500 MB of tensors": tensors,
        "100,000 small tensors": small_tensors,
        "1,000,000 strings": strings,
    }
    if scale.quick:
        del cases["1,000,000 strings"]
    found = [
        _case(name, make, folder=folder / name.split()[0], rounds=scale.rounds)
        for name, make in cases.items()
    ]
    return Section([result for case in found for result in case])


def _case(name: str, make: Make, folder: Path, rounds: int) -> list[Result]:
    folder.mkdir()
    memory = joblib.Memory(folder / "joblib", verbose=0)
    file = folder / "result.pt"
    registry = Registry(folder / "registry")
    ours, theirs = registry.cached(make), memory.cache(make)

    began = time.perf_counter()
    ours()
    miss = time.perf_counter() - began
    began = time.perf_counter()
    theirs()
    miss_joblib = time.perf_counter() - began
    began = time.perf_counter()
    torch.save(make(), file)
    miss_torch = time.perf_counter() - began
    contenders: dict[str, Contender] = {
        "hit": (lambda: None, ours),
        "joblib": (lambda: None, theirs),
        "torch": (lambda: None, lambda: torch.load(file, weights_only=True)),
        "none": (lambda: None, make),
    }
    t = take_turns(contenders, rounds)
    fastest = min(_LABELS, key=lambda name: median(t[name]))
    others = ", ".join(f"{spoken(median(t[key]))} of {label}" for key, label in _LABELS.items())
    misses = (
        f"{spoken(miss)} against {spoken(miss_joblib)} of joblib.Memory, {spoken(miss_torch)} of torch.save"
    )
    hit = ratio(f"{name}: hit against the fastest other", t, ours="hit", peer=fastest, goal=1.0)
    return [
        replace(hit, detail=f"{spoken(median(t['hit']))} against {others}"),
        Result(f"{name}: miss against joblib.Memory, once", miss / miss_joblib, goal=None, detail=misses),
    ]


_LABELS = {"joblib": "joblib.Memory", "torch": "torch.load", "none": "computing"}
