"""Attached files: they live as long as their version, through thinning, rebuilding and garbage collection."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import in_child

from registry import Registry
from registry.log.journal import Journal
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


def test_of_several_files_all_are_attached_or_none(registry: Registry, onnx: Path, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a")
    (tmp_path / "b").write_bytes(b"a")
    (tmp_path / "c").write_bytes(LARGE)
    registry.attach("net:v1", tmp_path / "b")
    (tmp_path / "b").write_bytes(b"new")
    with pytest.raises(Conflict, match=r"net:v1 has another file 'b' already"):
        registry.attach("net:v1", tmp_path / "a", tmp_path / "b")
    assert [file.name for file in registry.files("net:v1")] == ["b"]
    (tmp_path / "b").write_bytes(b"a")
    before = registry.catalog.ledger().seq
    files = [tmp_path / "a", tmp_path / "b", tmp_path / "c", onnx]
    assert [one.name for one in registry.attach("net:v1", *files)] == ["a", "b", "c", "model.onnx"]
    assert registry.catalog.ledger().seq == before + 1
    collect(registry)
    assert [registry.read_file("net:v1", path.name) for path in files] == [b"a", b"a", LARGE, LARGE]


SHRINKING = """
import os, sys
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
print(flush=True)
while True:
    os.pwrite(fd, b"x" * (8 << 20), 0)
    os.ftruncate(fd, 0)
"""


def test_a_file_that_others_cut_short_is_refused_or_whole(registry: Registry, tmp_path: Path) -> None:
    path = tmp_path / "f"
    with subprocess.Popen(
        [sys.executable, "-c", SHRINKING, path], stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        try:
            for _ in range(15):
                with contextlib.suppress(Conflict):
                    registry.attach("net:v1", path, force=True)
                    assert set(registry.read_file("net:v1", "f")) <= set(b"x")
        finally:
            writer.kill()
    collect(registry)


def test_a_file_whose_size_is_not_that_of_its_bytes_is_refused(registry: Registry) -> None:
    with pytest.raises(
        Invalid, match=r"/proc/.*/maps: does not have the 0 bytes that its size says; copy it"
    ):
        registry.attach("net:v1", "/proc/self/maps")
    assert registry.files("net:v1") == []


@pytest.mark.parametrize("is_thin", [False, True])
def test_a_version_that_is_adopted_under_another_number_keeps_its_files(
    registry: Registry, onnx: Path, is_thin: bool
) -> None:
    registry.attach("net:v2", onnx)
    registry.save("net", {"model": {"w": torch.ones(3)}})
    version_id = (registry.thin("net:v2") if is_thin else registry["net:v2"]).id
    registry.catalog.close()

    def killed() -> None:
        # A save that is killed before its entry leaves an orphan, so that it is not certain which number was whose.
        Journal.append = lambda *_: os._exit(9)  # type: ignore[method-assign]
        Registry(registry.root).save("net", {"model": {"w": torch.zeros(5)}})

    assert in_child(killed) == 9
    (segment,) = (registry.root / "journal").glob("*.log")
    lines = segment.read_bytes().splitlines(keepends=True)
    segment.write_bytes(
        b"".join(b"#" * (len(line) - 1) + b"\n" if _publishes(line, 2) else line for line in lines)
    )
    for path in registry.root.glob("catalog*"):
        path.unlink()
    again = Registry(registry.root, create=False)
    adopted = again.rebuild(adopt=True).adopted
    name = again.resolve(version_id).name
    assert name in adopted
    assert name != "net:v2"
    again.collect_garbage(grace=0)
    assert again.read_file(name, "model.onnx") == LARGE


def _publishes(line: bytes, version: int) -> bool:
    records = json.loads(line.split(b"\t")[0])["records"]
    return any(one["op"] == "publish" and one["version"] == version for one in records)


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
        {"name": 5, "size": 1},
        {"name": "a", "size": "1"},
        {"attached": "../x", "name": "a", "size": 1},
    ],
)
def test_a_malformed_record_is_passed_over(registry: Registry, onnx: Path, record: dict[str, Any]) -> None:
    registry.attach("net:v1", onnx)
    ((manifest_id,),) = registry.catalog.query("SELECT id FROM artifacts")
    record = {"attached": registry["net:v1"].id, **record}
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
