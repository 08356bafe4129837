"""A command line in this process, and a registry to use it on."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import click
import pytest
import torch

from registry import Registry
from registry.cli.app import app


class Done(NamedTuple):
    """What a command did."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        assert self.status in (0, 1), self.err
        return json.loads(self.out)


Run = Callable[..., Done]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs `registry` with arguments, as in a pipe; text for its standard input may be given."""

    def execute(*arguments: object, typed: str = "") -> Done:
        words = [str(argument) for argument in arguments]
        monkeypatch.setattr(sys, "argv", ["registry", *words])
        monkeypatch.setattr(sys, "stdin", StringIO(typed))
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            app.main(args=words, prog_name="registry")
        code = caught.value.code
        assert isinstance(code, int)
        return Done(code, *capfd.readouterr())

    return execute


def commands(command: click.Command = app, path: tuple[str, ...] = ()) -> Iterator[tuple[str, click.Command]]:
    """A command and all below it, each with the words that are typed for it."""
    yield " ".join(("registry", *path)), command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            assert below is not None
            yield from commands(below, (*path, name))


def examples(command: click.Command) -> list[str]:
    """The examples at the end of a command's help."""
    assert command.epilog is not None
    return [line.strip() for line in command.epilog.partition("Example:")[2].splitlines() if line.strip()]


def words_of(line: str) -> list[str]:
    """The words of an example's first command, from `registry` on; it may stand inside `eval "$(...)"`."""
    if line.startswith("eval"):
        line = line.partition("$(")[2].rstrip(')"')
    words = shlex.split(line)
    return words[: words.index("|")] if "|" in words else words


def fill(root: Path) -> Registry:
    """A registry with four versions of a model, and one of another."""
    registry = Registry(root)
    for epoch in range(1, 5):
        state = {
            "model": {"fc.weight": torch.full((10, 4), float(epoch)), "fc.bias": torch.zeros(10)},
            "optimizer": {"lr": 0.1, "steps": [epoch]},
        }
        registry.save(
            "lenet5",
            state,
            epoch=epoch,
            loss=float("nan") if epoch == 3 else 1 / epoch,
            metrics={"accuracy": epoch / 10},
            config={"optimizer": {"lr": 0.1 * epoch}, "layers": [6, 16]},
            meta={"seed": epoch},
        )
    registry.save("resnet", {"model": {"w": torch.ones(3)}})
    registry.set_alias("lenet5:v2", "production")
    registry.set_tag("lenet5:v3", "paper")
    registry.add_note("lenet5:v2", "red \x1b[31malert\x1b[0m")
    return registry


@pytest.fixture
def filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """The registry that the commands use, and a working directory beside it."""
    registry = fill(tmp_path / "r")
    monkeypatch.setenv("REGISTRY_ROOT", str(registry.root))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TZ", "UTC")
    return registry
