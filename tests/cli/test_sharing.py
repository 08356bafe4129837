"""push and pull on the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import Run

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
    assert out.splitlines() == ["net:v2 → net:v2  44.1 kB", f"1 version copied to {there}"]
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
    assert out.splitlines()[0].startswith("net:v1 → net:v3  ")
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
        assert len(err.splitlines()) <= 2
    assert not nothing.exists()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, and a user without names."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def test_places_are_named_listed_and_forgotten(roots: tuple[Path, Path], here: Path) -> None:
    mine, there = roots
    assert run(mine, "remote", "list") == (
        0,
        "",
        f"no place has a name; add one with: registry --root {mine} remote add NAME PLACE\n",
    )
    for _ in range(2):
        assert run(mine, "remote", "add", "backup", str(there))[1] == f"backup is {there}\n"
    assert run(mine, "remote", "add", "a", "s3://models/team")[1] == "a is s3://models/team\n"
    assert run(mine, "remote", "list")[1].splitlines() == [
        "NAME    PLACE",
        "a       s3://models/team",
        f"backup  {there}",
    ]
    assert json.loads(run(mine, "remote", "list", "--json")[1]) == [
        {"name": "a", "place": "s3://models/team"},
        {"name": "backup", "place": str(there)},
    ]
    assert run(mine, "remote", "remove", "a")[1] == "a is no longer s3://models/team\n"
    assert [one["name"] for one in json.loads(run(mine, "remote", "list", "--json")[1])] == ["backup"]


def test_a_name_stands_for_a_place_in_push_pull_and_repair(roots: tuple[Path, Path], here: Path) -> None:
    mine, there = roots
    run(mine, "remote", "add", "backup", str(there))
    assert run(mine, "push", "net:v1", "--to", "backup")[1].endswith(f"copied to {there}\n")
    assert run(mine, "pull", "net:v1", "--from", "backup")[1].startswith("net:v1 → net:v3  ")
    run(mine, "push", "--all", "--to", "backup")
    for pack in mine.glob("packs/*/*.safetensors"):
        pack.unlink()
    status, out, _ = run(mine, "repair", "--from", "backup")
    assert status == 0
    assert out.startswith("put back ")


def test_what_no_name_stands_for_is_one_line(roots: tuple[Path, Path], here: Path) -> None:
    mine, there = roots
    run(mine, "remote", "add", "backup", str(there))
    run(mine, "remote", "add", "gone", str(there / "gone"))
    (here / "folder").mkdir()
    for words, said in (
        (
            ["push", "net", "--to", "bakcup"],
            "no folder 'bakcup' here, and no place is called so\nhint:  the names are backup, gone",
        ),
        (["repair", "--from", "bakcup"], "the names are backup, gone"),
        (["pull", "net", "--from", "folder"], "make one with: registry --root folder init"),
        (["push", "net", "--to", "gone"], f"make one with: registry --root {there / 'gone'} init"),
        (["remote", "remove", "bakcup"], "the names are backup, gone"),
        (["remote", "add", "backup", "/srv"], f"backup is {there} already\nhint:  remove that first"),
        (["remote", "add", "folder", "/srv"], "'folder' is a folder here"),
        (["remote", "add", "x", "s3://a:CANARY@c/d"], "without keys, passwords"),
    ):
        status, out, err = run(mine, *words)
        assert (status, out) == (1, "")
        assert said in err
        assert "CANARY" not in err
        assert len(err.splitlines()) <= 2
    (here / "backup").mkdir()
    _, _, err = run(mine, "push", "net", "--to", "backup")
    assert f"backup also names {there}, but a folder goes before a name" in err


def test_versions_are_copied_between_any_two_registries(filled: Registry, run: Run, tmp_path: Path) -> None:
    there = Registry(tmp_path / "there")
    there.catalog.close()
    done = run("copy", filled.root, tmp_path / "there", "--json")
    assert done.status == 0
    assert {copied["is_new"] for copied in json.loads(done.out)} == {True}
    ids = {version.id for model in filled for version in filled.versions(model, limit=None)}
    assert {version.id for model in there for version in there.versions(model, limit=None)} == ids
    again = run("copy", filled.root, tmp_path / "there")
    assert again.out.splitlines()[-1].startswith("0 versions copied to ")
    missing = run("copy", tmp_path / "nowhere", tmp_path / "there")
    assert missing.status == 1
    assert "nowhere" in missing.err
