"""Attached files: they live as long as their version, through thinning, rebuilding and garbage collection."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from registry import Registry
from registry.store.errors import Conflict, Corrupt, Invalid, NotFound, RegistryError

LARGE = os.urandom(2 << 20)


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    registry = Registry(tmp_path / "registry")
    optimizer = {"state": {0: torch.ones(9)}, "param_groups": []}
    for i in range(2):
        registry.save("net", {"model": {"w": torch.full((3,), float(i))}, "optimizer": optimizer})
    return registry


@pytest.fixture
def onnx(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    path.write_bytes(LARGE)
    return path


def collect(registry: Registry) -> None:
    registry.collect_garbage(grace=0)
    assert registry.verify().problems == ()


def test_a_file_lives_as_long_as_its_version(registry: Registry, onnx: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    found = registry.attach("net:v1", onnx, tmp_path / "empty.txt")
    assert [(one.version, one.name, one.size) for one in found] == [
        ("net:v1", "model.onnx", len(LARGE)),
        ("net:v1", "empty.txt", 0),
    ]
    assert [(file.name, file.size) for file in registry.files("net:v1")] == [
        ("empty.txt", 0),
        ("model.onnx", len(LARGE)),
    ]
    assert registry.files("net:v2") == []
    before = registry["net:v1"].id
    assert registry.thin("net:v1").id != before
    collect(registry)
    registry.rebuild()
    again = Registry(registry.root)
    assert again.read_file("net:v1", "model.onnx") == LARGE
    assert again.read_file("net:v1", "empty.txt") == b""
    again.remove(["net:v1"])
    assert again.status().stored > len(LARGE)
    collect(again)
    assert again.status().stored < 100_000
    assert again.status().artifacts == 0
    with pytest.raises(NotFound):
        again.files("net:v1")


def test_the_same_file_is_stored_once_and_another_needs_force(registry: Registry, onnx: Path) -> None:
    first = registry.attach("net:v1", onnx)
    assert registry.attach("net:v1", onnx)[0].id == first[0].id
    registry.attach("net:v2", onnx)
    assert registry.status().stored < len(LARGE) + 100_000
    onnx.write_bytes(b"new")
    with pytest.raises(Conflict, match=r"net:v1 has another file 'model.onnx' already; .*force=True"):
        registry.attach("net:v1", onnx)
    assert registry.read_file("net:v1", "model.onnx") == LARGE
    registry.attach("net:v1", onnx, force=True)
    assert registry.read_file("net:v1", "model.onnx") == b"new"
    collect(registry)
    assert registry.read_file("net:v2", "model.onnx") == LARGE


def test_cached_results_and_attached_files_are_kept_apart(registry: Registry, onnx: Path) -> None:
    registry.cached(lambda size: [size])(3)
    registry.attach("net", onnx)
    assert len(registry.artifacts.find()) == 1
    registry.artifacts.remove(one.key for one in registry.artifacts.find())
    collect(registry)
    assert [file.name for file in registry.files("net")] == ["model.onnx"]


def test_files_of_a_folder_are_listed_without_reading_them(registry: Registry, onnx: Path) -> None:
    kept = {"a.txt": b"x" * 2_000, "sub/b": b"yy", "$c": b""}
    registry.save("hub", {"model": {"w": torch.ones(1)}, "files": kept})
    registry.attach("hub", onnx)
    found = registry.files("hub")
    assert {file.name: file.size for file in found if file.attached is None} == {
        "a.txt": 2_000,
        "sub/b": 2,
        "$c": 0,
    }
    assert registry.read_file("hub", "sub/b") == b"yy"
    with pytest.raises(NotFound, match=r"hub:v1 has no file 'none'; registry files hub:v1 lists them"):
        registry.read_file("hub", "none")


def test_what_cannot_be_attached_is_named_and_nothing_is(
    registry: Registry, onnx: Path, tmp_path: Path
) -> None:
    registry.save("hub", {"model": {"w": torch.ones(1)}, "files": {"model.onnx": b"x"}})
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "a\nb").touch()
    cases: list[tuple[str, Any, type[RegistryError], str]] = [
        ("hub", onnx, Invalid, "there is a file 'model.onnx' already"),
        ("net", tmp_path / "none", NotFound, "none: there is no such file"),
        ("net", tmp_path, Invalid, "not a regular file"),
        ("net", tmp_path / "pipe", Invalid, "not a regular file"),
        ("net", tmp_path / "a\nb", Invalid, "cannot be called so; rename it"),
        ("none", onnx, NotFound, "none"),
    ]
    for reference, path, kind, told in cases:
        with pytest.raises(kind, match=told):
            registry.attach(reference, onnx, path)
    assert registry.files("net") == []
    assert registry.status().artifacts == 0


@pytest.mark.parametrize(
    "record",
    [
        {"attached": 5, "name": "a", "size": 1},
        {"attached": "net:v1", "name": 5, "size": 1},
        {"attached": "net:v1", "name": "a", "size": "1"},
        {"attached": "../x", "name": "a", "size": 1},
    ],
)
def test_a_malformed_record_is_passed_over(registry: Registry, onnx: Path, record: dict[str, Any]) -> None:
    registry.attach("net:v1", onnx)
    ((manifest_id,),) = registry.catalog.query("SELECT id FROM artifacts")
    forged = {"op": "artifact", "key": "0" * 64, "id": manifest_id, "at": "2026-01-01T00:00:00.000000Z"}
    registry.catalog.commit(lambda view: [{**forged, "record": record, "was": None}])
    assert [file.name for file in registry.files("net:v1")] == ["model.onnx"]
    collect(registry)
    assert registry.read_file("net:v1", "model.onnx") == LARGE


def test_a_version_without_files_of_its_own_raises_nothing(registry: Registry) -> None:
    registry.save("odd", {"model": {"w": torch.ones(1)}, "files": [1, {"a": 2}]})
    assert registry.files("odd") == []
    with pytest.raises(Corrupt, match="odd:v1: the component files does not hold files"):
        registry.read_file("odd", "a")
