"""The catalog with 10 and with 10,000 checkpoints, and the command line with 10,000."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from statistics import median

import torch

from benchmarks.measure import Contender, Result, Scale, Section, absolute, ratio, spoken, take_turns
from registry import Registry
from registry.store import durable

FEW = 10
"""Checkpoints of the small registry."""

_COMMANDS = ("--help", "ls", "ls net", "show net", "show net --params", "status")


class _Unsynced(durable.Disk):
    """A disk that syncs nothing. It fills registries quickly, where a power cut does not matter."""

    def sync(self, fd: int, path: Path) -> None:
        pass

    def sync_folder(self, path: Path, folder: int) -> None:
        pass


def measure(folder: Path, scale: Scale) -> Section:
    """Measure a small save in both registries, and the commands on the large one."""
    count = 1_000 if scale.quick else 10_000
    few, many = filled(folder / "few", FEW), filled(folder / "many", count)
    return Section(
        [_saving(few, many, count=count, rounds=scale.rounds), *_commands(folder, count, scale.rounds)]
    )


def filled(root: Path, count: int) -> Registry:
    """Make a registry with a number of small checkpoints."""
    registry = Registry(root)
    disk, durable.disk = durable.disk, _Unsynced()
    registry.catalog.connection().execute("PRAGMA synchronous = OFF")
    try:
        for i in range(count):
            save(registry, i)
    finally:
        durable.disk = disk
        registry.catalog.connection().execute("PRAGMA synchronous = FULL")
    os.sync()
    return registry


def save(registry: Registry, i: int) -> None:
    """Save a checkpoint with 110 elements."""
    state = {"model": {"fc.weight": torch.full((10, 10), float(i)), "fc.bias": torch.zeros(10)}}
    registry.save("net", state, epoch=i, loss=1 / (i + 1), metrics={"accuracy": 1 - 1 / (i + 1)})


def _saving(few: Registry, many: Registry, count: int, rounds: int) -> Result:
    counter = iter(range(count, 1 << 30))

    def saving(registry: Registry) -> Contender:
        return (lambda: None, lambda: save(registry, next(counter)))

    t = take_turns({"few": saving(few), "many": saving(many)}, rounds * 30)
    return ratio(
        f"a small save, {count:,} checkpoints against {FEW}",
        t,
        ours="many",
        peer="few",
        goal=1.25,
        name=f"{FEW}",
    )


def _commands(folder: Path, count: int, rounds: int) -> list[Result]:
    contenders: dict[str, Contender] = {"bare": (lambda: None, lambda: _run("-c", "pass"))}
    for command in _COMMANDS:
        arguments = ["-m", "registry.cli", "--root", str(folder / "many"), *command.split()]
        contenders[command] = (lambda: None, lambda arguments=arguments: _run(*arguments))  # type: ignore[misc]
    t = take_turns(contenders, rounds * 2)
    return [
        absolute(
            f"registry {command}, {count:,} checkpoints, over bare Python",
            [ours - bare for ours, bare in zip(t[command], t["bare"], strict=True)],
            goal=0.1,
            detail=f"{spoken(median(t[command]))} against {spoken(median(t['bare']))} of python -c pass",
        )
        for command in _COMMANDS
    ]


def _run(*arguments: str) -> None:
    environment = {**os.environ}
    # Modules are compiled, as after an installation.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, env=environment)
