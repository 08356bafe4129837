"""Output that can show no more than ASCII: nothing breaks, all stays readable, and what is to be typed can be pasted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from registry import Registry

PLAIN = {"LC_ALL": "C", "LANG": "C", "PYTHONIOENCODING": "ascii"}
OTHERS = [{}, {"PYTHONUTF8": "0"}, {"PYTHONUTF8": "0", "PYTHONIOENCODING": ""}]
"""What else may be set. Without the mode of UTF-8 the names of files are no text to Python."""

COMMANDS = [
    ("init",),
    ("ls",),
    ("ls", "net"),
    ("log",),
    ("history", "net"),
    ("show", "net"),
    ("show", "net", "--params"),
    ("show", "nothing"),
    ("diff", "net:v1", "net:v2"),
    ("status",),
    ("du",),
    ("runs",),
    ("verify",),
    ("gc",),
    ("config", "show", "net"),
    ("export", "net", "größe.pt"),
    ("remote", "list"),
    ("outbox",),
]


def told(root: Path, *words: str, **others: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **PLAIN, **others}
    command = [sys.executable, "-m", "registry.cli", "--root", str(root), *words]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        encoding="ascii",
        check=False,
        env=environment,
        cwd=root.parent,
    )


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A registry whose folder, and much that it holds, has names that ASCII lacks."""
    root = tmp_path / "prüf 'ß" / "網"
    registry = Registry(root)
    for value in (1.0, 2.0):
        state = {"model": {"größe.weight": torch.full((2,), value)}}
        registry.save("net", state, metrics={"höhe": value}, config={"größe": "größer"}, meta={"wer": "Åsa"})
    registry.set_tag("net:v1", "paper")
    registry.add_note("net:v2", "schön")
    return root


@pytest.mark.parametrize("others", OTHERS)
@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_nothing_breaks_where_ascii_is_all(
    foreign: Path, words: tuple[str, ...], others: dict[str, str]
) -> None:
    done = told(foreign, *words, **others)
    assert "Traceback" not in done.stderr
    assert "unexpected" not in done.stderr
    assert done.returncode == (1 if words[-1] in ("nothing", "outbox") or words[0] == "diff" else 0), (
        done.stderr
    )


@pytest.mark.parametrize("others", OTHERS)
def test_a_hint_can_be_pasted(tmp_path: Path, others: dict[str, str]) -> None:
    root = tmp_path / "prüf 'ß" / "網"
    root.parent.mkdir()
    hint = told(root, "ls", **others).stderr.splitlines()[-1]
    assert hint.startswith("hint:  make one with: registry --root $'")
    pasted = hint.partition("registry ")[2]
    environment = {**os.environ, **PLAIN, **others}
    line = f"{sys.executable} -m registry.cli {pasted}"
    subprocess.run(["bash", "-c", line], check=True, env=environment, cwd=tmp_path, capture_output=True)
    assert (root / "registry.toml").exists()


def test_what_ascii_lacks_is_spelled_out(foreign: Path) -> None:
    shown = told(foreign, "show", "net").stdout
    assert r"h\xf6he 2" in shown
    assert r"sch\xf6n" in shown
    assert "->" in told(foreign, "diff", "net:v1", "net:v2").stdout
