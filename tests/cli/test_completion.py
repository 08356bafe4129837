"""The shell completes commands, options and references."""

from __future__ import annotations

import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
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


def test_what_the_catalog_has_is_completed(filled: Registry) -> None:
    with filled.run("lenet5", monitor="accuracy"):
        pass
    filled.save("resnet", {"model": {"w": torch.ones(1)}}, metrics={"f1": 0.5, "val/loss": 0.1})
    assert completed("registry ls lenet5 --sort ") == ["accuracy", "loss"]
    assert completed("registry ls --sort ") == ["accuracy", "f1", "val/loss", "loss"]
    assert completed("registry best resnet@latest --by v") == ["val/loss"]
    assert completed("registry compare resnet --metric ") == ["f1", "val/loss", "loss"]
    assert completed("registry ls --tag ") == ["paper"]
    assert completed("registry tag resnet p") == ["paper"]
    assert completed("registry logs lenet5/") == ["lenet5/run-1"]
    assert completed("registry log lenet5/") == ["lenet5/run-1"]
    assert completed("registry board len") == ["lenet5", "lenet5/run-1"]
    assert completed("registry export lenet5:v1 --component m") == ["model"]
    assert completed("registry ls nothing --sort ") == ["loss"]


def test_networks_are_completed_without_loading_them(filled: Registry) -> None:
    assert completed("registry train lenet") == ["lenet5", "lenet6"]
    assert completed("registry train --data cif") == ["cifar10"]
    assert completed("registry plan lenet5 lenet") == ["lenet5", "lenet6"]
    program = "import sys\nfrom registry.cli import main\ntry: main()\nexcept SystemExit: print(*sys.modules)"
    words = "registry train lenet"
    environment = {"_REGISTRY_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": "2"}
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.argv[0] = 'registry'; {program}"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "lenet6" in done.stdout
    assert not {"torch", "numpy", "pydantic"} & set(done.stdout.split())


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


@pytest.fixture
def named(filled: Registry, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """A registry, and the command `registry` on the path."""
    monkeypatch.setenv("PATH", f"{SCRIPT.parent}:{os.environ['PATH']}")
    return filled


@pytest.mark.skipif(not shutil.which("fish"), reason="needs fish, as from: apt-get install fish")
def test_fish_completes(named: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))

    def offered(line: str) -> list[str]:
        program = f"registry completion fish | source; complete --do-complete '{line}'"
        done = subprocess.run(["fish", "-c", program], capture_output=True, text=True, check=True)
        assert done.stderr == ""
        return [text.partition("\t")[0] for text in done.stdout.splitlines()]

    assert offered("registry sh") == ["show"]
    assert "--params" in offered("registry show --")
    assert offered("registry show len") == ["lenet5"]
    assert sorted(offered("registry rm lenet5:")) == [f"lenet5:v{number}" for number in (1, 2, 3, 4)]
    assert offered("registry export lenet5@p") == ["lenet5@production"]
    assert offered("registry ls lenet5 --sort a") == ["accuracy"]
    assert offered("registry show nothing") == []


def zsh_makes(*lines: str) -> list[str]:
    """The lines that a real zsh makes of some when the tabulator is pressed at their end."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ["TERM"] = "dumb"
        os.execvp("zsh", ["zsh", "-f", "-i"])
    # What is on the line goes to a file when Return is pressed, and is not run.
    setup = (
        'PS1= PS2=; autoload -U compinit; compinit -u -D; eval "$(registry completion zsh)"; '
        'tell() { print -r -- $BUFFER >> told; BUFFER=; zle accept-line }; zle -N tell; bindkey "^X" tell\n'
    )
    os.write(terminal, setup.encode())
    told = Path("told")
    found: list[str] = []
    try:
        for line in lines:
            os.write(terminal, f"{line}\t\x18".encode())
            end = time.monotonic() + 60
            while len(found) < 1 or len(found) <= lines.index(line):
                assert time.monotonic() < end, found
                if select.select([terminal], [], [], 0.05)[0]:
                    os.read(terminal, 4096)
                found = told.read_text().splitlines() if told.exists() else []
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(terminal)
    return found


@pytest.mark.skipif(not shutil.which("zsh"), reason="needs zsh, as from: apt-get install zsh")
def test_zsh_completes(named: Registry) -> None:
    made = zsh_makes(
        "registry sho",
        "registry show --para",
        "registry show res",
        "registry show lenet5@p",
        "registry show lenet5:",
        "registry ls lenet5 --sort a",
        "registry show nothing",
    )
    assert [line.rstrip() for line in made] == [
        "registry show",
        "registry show --params",
        "registry show resnet",
        "registry show lenet5@production",
        "registry show lenet5:v",
        "registry ls lenet5 --sort accuracy",
        "registry show nothing",
    ]


def test_an_unknown_shell_is_a_usage_error(run: Run) -> None:
    assert run("completion", "tcsh").status == 2
