"""The catalog and the command line, with 10 and with 10,000 checkpoints."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.measure import Contender, Result, take_turns
from registry import Registry
from registry.store import durable

FEW, MANY = 10, 10_000
_COMMANDS = ("--help", "list", "list net", "show net", "show net --params", "status")


class _Unsynced(durable.Disk):
    """A disk for filling registries quickly, where a power cut does not matter."""

    def sync(self, fd: int, path: Path) -> None:
        pass

    def sync_folder(self, path: Path) -> None:
        pass


def measure(folder: Path, rounds: int) -> list[Result]:
    """How saving and the commands scale."""
    few, many = _filled(folder / "few", FEW), _filled(folder / "many", MANY)
    return [_saving(few, many, rounds), *_commands(folder, rounds)]


def _filled(root: Path, count: int) -> Registry:
    registry = Registry(root)
    disk, durable.disk = durable.disk, _Unsynced()
    registry.catalog.connection().execute("PRAGMA synchronous = OFF")
    try:
        for i in range(count):
            _save(registry, i)
    finally:
        durable.disk = disk
        registry.catalog.connection().execute("PRAGMA synchronous = FULL")
    os.sync()
    return registry


def _save(registry: Registry, i: int) -> None:
    state = {"model": {"fc.weight": torch.full((10, 10), float(i)), "fc.bias": torch.zeros(10)}}
    registry.save("net", state, epoch=i, loss=1 / (i + 1), metrics={"accuracy": i / MANY})


def _saving(few: Registry, many: Registry, rounds: int) -> Result:
    counter = iter(range(MANY, 1 << 30))

    def save(registry: Registry) -> Contender:
        return (lambda: None, lambda: _save(registry, next(counter)))

    t = take_turns({"few": save(few), "many": save(many)}, rounds * 30)
    detail = f"{t['many'] * 1e3:.1f} ms with {MANY:,}, {t['few'] * 1e3:.1f} ms with {FEW}"
    return Result("a small save, 10,000 checkpoints against 10", t["many"] / t["few"], 1.25, detail)


def _commands(folder: Path, rounds: int) -> list[Result]:
    contenders: dict[str, Contender] = {"bare": (lambda: None, lambda: _run("-c", "pass"))}
    for command in _COMMANDS:
        arguments = ["-m", "registry.cli", "--root", str(folder / "many"), *command.split()]
        contenders[command] = (lambda: None, lambda arguments=arguments: _run(*arguments))  # type: ignore[misc]
    t = take_turns(contenders, rounds * 3)
    return [
        Result(
            f"registry {command}, over bare Python",
            t[command] - t["bare"],
            0.12,
            f"{t[command] * 1e3:.0f} ms against {t['bare'] * 1e3:.0f} ms of python -c pass",
            unit=" s",
        )
        for command in _COMMANDS
    ]


def _run(*arguments: str) -> None:
    environment = {**os.environ}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # as after an installation, modules are compiled
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, env=environment)
