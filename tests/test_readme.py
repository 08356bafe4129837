"""The README: everything that it says to type works, and prints what it says."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from terminal import Session

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCK = re.compile(r"```(python|console)\n(.*?)```", re.DOTALL)


def without_what_varies(text: str) -> str:
    text = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d", "TIME", text)
    text = re.sub(r"\b[0-9a-f]{12}\b", "ID", text)
    text = re.sub(r"\d+(\.\d+)?( [kM]?B\b)", r"SIZE\2", text)
    text = re.sub(
        r"\d+\.\d+\b|\b0\b|\d+%", "NUMBER", text
    )  # accuracies and losses differ a little with the processor
    text = re.sub(r"\d+ (distinct|stored tensors)", r"COUNT \1", text)
    text = re.sub(r"\d versions in \d packs", "COUNT", text)  # the best one is not among them
    text = re.sub(r" +", " ", text.replace(" best", "").replace("best ", ""))
    text = re.sub(r"lenet5:v\d", "lenet5:v", text)  # which one is the best, by a few digits, too
    return re.sub(r"free space.*", "free space", text)


def test_the_first_session_can_be_typed_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("REGISTRY_ROOT", raising=False)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # which torchrun would set, with a warning
    kinds = []
    for kind, text in BLOCK.findall(README):
        kinds.append(kind)
        if kind == "python":
            exec(compile(text, "README.md", "exec", dont_inherit=True), {})  # each as if it were pasted alone
            continue
        for command, expected in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", text, re.MULTILINE):
            shell = Session(words=["/bin/bash", "-c", command], lines=60)
            assert shell.end() == 0
            assert without_what_varies("\n".join([*shell.shown(), ""])) == without_what_varies(expected)
    assert kinds == ["console", "console", "python", "python", "python", "console", "console", "console"]
    assert re.match(
        r"Checkpoint\(name=mine:v[12], id=[0-9a-f]{12}, epoch=[12], loss=0\.\d+\)\n"
        r"loaded 8 of 12 tensors, 90\.9% of parameters\n",
        capsys.readouterr().out,
    )


@pytest.mark.parametrize("page", ["training.md", "transfer.md", "caching.md"])
def test_the_examples_of_a_page_run_from_top_to_bottom(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("REGISTRY_ROOT", raising=False)
    names: dict[str, object] = {"__name__": "page"}
    text = (Path(__file__).parents[1] / "docs" / page).read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, page, "exec", dont_inherit=True), names)


@pytest.mark.slow
def test_the_page_on_several_processes_shows_what_happens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("REGISTRY_ROOT", raising=False)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # which torchrun would set, with a warning
    text = (Path(__file__).parents[1] / "docs" / "distributed.md").read_text()
    commands = 0
    for kind, block in BLOCK.findall(text):
        if kind == "python":
            if name := re.match(r"# (\w+\.py)\n", block):
                (tmp_path / name[1]).write_text(block)
            else:
                exec(compile(block, "distributed.md", "exec", dont_inherit=True), {})
            continue
        for command, expected in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", block, re.MULTILINE):
            done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
            assert done.returncode == (1 if " diff " in command else 0), done.stderr
            told = without_what_varies(re.sub(r"\d\.\d{3,}", "0.5", done.stdout))
            assert told == without_what_varies(re.sub(r"\d\.\d{3,}", "0.5", expected))
            commands += 1
    assert commands == 7
    two = [line for line in text.splitlines() if "--node-rank" in line]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    small = [line.replace("node-0", "127.0.0.1").replace("per-node=8", "per-node=1") for line in two]
    here = [line.replace("29500", port) for line in small]
    started = [subprocess.Popen(line, shell=True, stderr=subprocess.PIPE, text=True) for line in here]
    for process in started:
        _, told = process.communicate(timeout=120)
        assert process.returncode == 0, told


def test_every_command_of_the_program_is_reachable_from_the_readme() -> None:
    assert "(docs/cli.md)" in README
    assert "(docs/FORMAT.md)" in README
    assert "(docs/configs.md)" in README
    assert "(docs/training.md)" in README
    assert "(docs/transfer.md)" in README
    assert "(docs/caching.md)" in README
    assert "(docs/distributed.md)" in README
