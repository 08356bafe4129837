"""push and pull on the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from registry import Registry


def run(root: Path, *words: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "registry.cli", "--root", str(root), *words], capture_output=True, text=True
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def roots(tmp_path: Path) -> tuple[Path, Path]:
    here, there = Registry(tmp_path / "here"), Registry(tmp_path / "there")
    here.save("net", {"model": {"w": torch.ones(10_000)}})
    here.save("net", {"model": {"w": torch.zeros(10_000)}})
    there.save("net", {"model": {"w": torch.arange(10_000.0)}})
    return here.root, there.root


def test_versions_are_pushed_and_told(roots: tuple[Path, Path]) -> None:
    here, there = roots
    status, out, err = run(here, "push", "net:v2", "--to", str(there))
    assert (status, err) == (0, "")
    assert out.splitlines() == ["net:v2 -> net:v2  44.1 kB", f"1 version copied to {there}"]
    status, out, _ = run(here, "push", "--all", "--to", str(there), "--json")
    found = json.loads(out)
    assert status == 0
    assert [(one["source"], one["target"], one["is_new"]) for one in found] == [
        ("net:v1", "net:v3", True),
        ("net:v2", "net:v2", False),
    ]
    assert Registry(there)["net:v3"].id == Registry(here)["net:v1"].id


def test_versions_are_pulled(roots: tuple[Path, Path]) -> None:
    here, there = roots
    status, out, _ = run(here, "pull", "net:v1", "--from", there.as_posix())
    assert status == 0
    assert out.splitlines()[0].startswith("net:v1 -> net:v3  ")
    assert torch.equal(Registry(here)["net:v3"].load()["model"]["w"], torch.arange(10_000.0))


def test_mistakes_are_one_line(roots: tuple[Path, Path], tmp_path: Path) -> None:
    here, there = roots
    nothing = tmp_path / "nothing"
    for words, said in (
        (
            ["push", "--to", str(there)],
            "name the versions, such as lenet5@best, or give --all for all of them",
        ),
        (["push", "net", "--all", "--to", str(there)], "name the versions"),
        (["push", "net", "--to", str(nothing)], f"make one with: registry --root {nothing} init"),
        (["push", "other", "--to", str(there)], "there is no model 'other'"),
        (["pull", "net", "--from", "http://x/y"], "'http' is no kind of place for a registry"),
        (["pull", "net", "--from", "s3://a:b@c/d"], "without keys, passwords"),
    ):
        status, out, err = run(here, *words)
        assert (status, out) == (1, "")
        assert said in err
        assert len(err.splitlines()) == 1
    assert not nothing.exists()
