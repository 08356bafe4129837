"""The shell completes commands, options and references."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Run

from registry import Registry

SCRIPT = Path(sys.executable).with_name("registry")


def completed(line: str) -> list[str]:
    """What bash would offer for the last word of a line."""
    words = line.split(" ")
    environment = {**os.environ, "_REGISTRY_COMPLETE": "bash_complete", "COMP_WORDS": line}
    environment["COMP_CWORD"] = str(len(words) - 1)
    done = subprocess.run([SCRIPT], env=environment, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    return [text.partition(",")[2] for text in done.stdout.splitlines() if text]


def test_commands_and_options_are_completed(filled: Registry) -> None:
    assert completed("registry sh") == ["show"]
    assert "--params" in completed("registry show --")
    assert completed("registry config v") == ["validate"]


def test_references_are_completed_from_the_catalog(filled: Registry) -> None:
    assert completed("registry show ") == ["lenet5", "resnet"]
    assert completed("registry show len") == ["lenet5"]
    assert completed("registry rm lenet5:") == ["lenet5:v4", "lenet5:v3", "lenet5:v2", "lenet5:v1"]
    assert completed("registry export lenet5@p") == ["lenet5@production"]
    assert completed("registry show nothing") == []


def test_completing_without_a_registry_is_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGISTRY_ROOT", str(tmp_path / "none"))
    assert completed("registry show x") == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_for_a_shell_is_printed(run: Run, shell: str) -> None:
    done = run("completion", shell)
    assert done.status == 0
    assert "_REGISTRY_COMPLETE" in done.out
    if shell == "bash":
        program = f"{done.out}\ncomplete -p registry; case $COMP_WORDBREAKS in *[:@]*) exit 3;; esac"
        subprocess.run(["bash", "--norc", "-i"], input=program, text=True, check=True, capture_output=True)


def test_an_unknown_shell_is_a_usage_error(run: Run) -> None:
    assert run("completion", "tcsh").status == 2
