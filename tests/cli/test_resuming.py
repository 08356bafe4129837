"""`registry check-resume`: what it prints, its exit status, and that it leaves everything else alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Run

from registry import Registry

pytestmark = pytest.mark.slow

SCRIPT = """
import sys
import torch
from registry import Registry

torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout())
optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
registry = Registry({root})
before = "net" if {resumes} else None
step = 0
with registry.run("net", resume=before) as run:
    if before:
        run.resumed.restore(model=net, optimizer=optimizer)
        step = run.resumed.step
    while step < {steps}:
        optimizer.zero_grad()
        net(torch.randn(2, 4)).square().mean().backward()
        optimizer.step()
        step += 1
        if step % {every} == 0:
            run.save(model=net, optimizer=optimizer, step=step)
"""
AUTOMATIC = '"net" in registry'


def write(
    folder: Path, *, root: str = "", resumes: str = AUTOMATIC, steps: str = "6", every: int = 2
) -> Path:
    script = folder / "train.py"
    script.write_text(SCRIPT.format(root=root, resumes=resumes, steps=steps, every=every))
    return script


def test_a_script_that_resumes_exactly_is_told_so_and_no_registry_is_touched(
    filled: Registry, tmp_path: Path, run: Run
) -> None:
    """Neither the one that it names, nor that of the environment."""
    write(tmp_path, root="'mine'", resumes="'--resume' in sys.argv", steps="int(sys.argv[1])")
    before = {path: path.stat().st_mtime_ns for path in filled.root.rglob("*")}
    done = run("check-resume", "train.py", "--at", 5, "--resume-with", "--resume", "--json", "--", 6)
    assert done.status == 0, done.err
    assert done.err == ""
    found = done.json
    assert (found["exact"], found["repeats"], found["difference"]) == (True, True, None)
    assert (found["steps"], found["killed"], found["resumed"], found["version"]) == (6, 5, 4, "net:v2")
    assert set(found["first"].values()) == {None}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r", "train.py"]
    assert {path: path.stat().st_mtime_ns for path in filled.root.rglob("*")} == before


def test_a_difference_is_told_within_80_columns(tmp_path: Path, run: Run) -> None:
    """The script keeps its optimizer, and begins from a version of the user's own registry."""
    script = write(tmp_path, root="", resumes=AUTOMATIC)
    text = script.read_text().replace(
        "restore(model=net, optimizer=optimizer)", "restore(model=net, rng=True)"
    )
    script.write_text(text + "\nassert 'lenet5' in registry\n")
    Registry(tmp_path / "own").save("lenet5", {"model": {}})
    done = run("check-resume", script, "--root", tmp_path / "own", "--copy")
    assert done.status == 1, done.err
    assert done.out.startswith(
        "train.py does not resume exactly: killed after step 4 of 6, resumed from net:v1"
    )
    assert "optimizer state  differ from step 3 on" in done.out
    assert "Usual cause: an optimizer that is not restored" in done.out
    assert "net:v1 has one; see that it is restored" in " ".join(done.out.split())
    assert max(map(len, done.out.splitlines())) <= 80
    assert list(Registry(tmp_path / "own")) == ["lenet5"]


@pytest.mark.parametrize(
    ("parts", "words", "message"),
    [
        (
            {"every": 5},
            ["--at", 3],
            "train.py saved nothing before step 3, so there is nothing to resume\nhint:  save",
        ),
        (
            {"resumes": "False"},
            ["--at", 3],
            "net:v1 was there, and the new process began anew\nhint:  add: before =",
        ),
        (
            {},
            ["--at", 6],
            "train.py ended before step 7: it makes 6 steps\nhint:  kill it after one from 1 to 5",
        ),
        ({"steps": "0"}, [], "train.py made no step of an optimizer of torch"),
        ({"steps": "6 / 0"}, [], "train.py failed with status 1: ZeroDivisionError: division by zero"),
        (None, [], "there is no script train.py"),
    ],
)
def test_what_cannot_be_checked_is_said_in_one_line(
    tmp_path: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    parts: dict[str, str],
    words: list[object],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    if parts is not None:
        write(tmp_path, **parts)  # type: ignore[arg-type]
    done = run("check-resume", "train.py", *words)
    assert done.status == 2
    assert done.out == ""
    assert message in done.err


def test_checkpoints_outside_the_registry_are_noticed(tmp_path: Path, run: Run) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "import os, torch\n"
        "net = torch.nn.Linear(2, 2)\n"
        "optimizer = torch.optim.SGD(net.parameters(), 0.1)\n"
        f"place = {str(tmp_path / 'last.pt')!r}\n"
        "if os.path.exists(place): net.load_state_dict(torch.load(place))\n"
        "for step in range(4):\n"
        "    net(torch.ones(1, 2)).sum().backward()\n"
        "    optimizer.step()\n"
        "    if step < 3: torch.save(net.state_dict(), place)\n"
    )
    done = run("check-resume", script)
    assert done.status == 2
    assert "train.py went on where its first run had ended" in done.err
