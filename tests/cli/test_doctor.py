"""registry doctor: what is well, what is not, and what to do."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import Run

from registry import Registry
from registry.store import splitting
from registry.store.durable import host
from registry.upkeep import examination


def findings(run: Run) -> dict[str, Any]:
    return {one["topic"]: one for one in run("doctor", "--json").json["findings"]}


def test_all_is_well(filled: Registry, run: Run) -> None:
    done = run("doctor")
    assert (done.status, done.err) == (0, "")
    lines = done.out.splitlines()
    assert all(line.startswith("✓ ") for line in lines)
    topics = [line.split()[1] for line in lines]
    assert topics == [
        *("torch-registry", "python", "torch", "registry"),
        *("log", "packs", "locks", "runs", "leftovers", "space", "disk"),
    ]
    assert run("doctor", "--json").json["is_well"] is True


def test_whether_differences_are_compiled(
    filled: Registry, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    way = "compiled" if splitting.COMPILED else "by numpy, more slowly"
    assert findings(run)["python"]["text"].endswith(f", differences {way}")
    monkeypatch.setattr(examination, "find_spec", lambda name: None)
    assert findings(run)["python"]["text"].endswith(", differences by numpy, more slowly")


def test_a_registry_that_is_not_there(tmp_path: Path, run: Run) -> None:
    done = run("--root", tmp_path / "none", "doctor")
    assert done.status == 1
    assert f"✗ registry        there is no registry at {tmp_path}/none" in done.out
    assert f"make one with: registry --root {tmp_path}/none init" in done.out
    assert not (tmp_path / "none").exists()


@pytest.mark.damages
def test_a_damaged_log(filled: Registry, run: Run) -> None:
    (segment,) = [path for path in (filled.root / "journal").iterdir() if path.name != "lock"]
    lines = segment.read_bytes().splitlines(keepends=True)
    segment.write_bytes(b"".join([lines[0], b"#" + lines[1][1:], *lines[2:]]))
    done = run("doctor")
    assert done.status == 1
    assert "✗ log " in done.out


def test_a_lock_that_another_process_holds(filled: Registry, run: Run) -> None:
    program = (
        "import fcntl, sys; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); input()"
    )
    command = [sys.executable, "-c", program, str(filled.root / "journal" / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline()
        locks = findings(run)["locks"]
        holder.communicate(b"\n")
    assert locks["state"] == "note"
    assert f"process {holder.pid} (python" in locks["text"]


def test_what_a_dead_process_left(filled: Registry, run: Run) -> None:
    left, used = filled.root / "tmp" / f"{host()}-1-ab", filled.root / "tmp" / f"{host()}-2-cd"
    left.write_bytes(bytes(2_000_000))
    used.write_bytes(b"x")
    with used.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        one = findings(run)["leftovers"]
    assert (one["state"], one["advice"]) == ("note", "free it with: registry gc")
    assert one["text"] == "1 temporary file of processes that are gone, 2.0 MB"
    left.unlink()
    used.unlink()


def test_a_lost_run_and_little_space(filled: Registry, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    program = "import os; from registry import Registry; Registry().run('lenet5').__enter__(); os._exit(0)"
    subprocess.run([sys.executable, "-c", program], check=True, env=dict(os.environ))
    assert findings(run)["runs"]["text"] == "the process is gone of lenet5/run-1"

    class Usage(NamedTuple):
        free: int

    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(50 * 10**6))
    done = run("doctor")
    assert done.status == 1
    assert "✗ space           0.1 GB free" in done.out


@pytest.mark.damages
@pytest.mark.parametrize("how", ["gone", "cut", "all"])
def test_packs_that_are_not_there(filled: Registry, run: Run, how: str) -> None:
    pack = next((filled.root / "packs").glob("*/*.safetensors"))
    if how == "all":
        shutil.rmtree(filled.root / "packs")
    elif how == "gone":
        pack.unlink()
    else:
        os.truncate(pack, pack.stat().st_size - 1)
    assert run("doctor").status == 1
    found = findings(run)["packs"]
    assert found["state"] == "bad"
    assert "not there in full, such as packs/" in found["text"]
    assert "registry verify" in found["advice"]
