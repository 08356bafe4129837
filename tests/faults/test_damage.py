"""Damage: found by verify and by loading, named exactly, contained, and healed where it can be."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import (
    broken_rules,
    check_whole,
    collect,
    copy,
    dump,
    files,
    is_state,
    save,
    state,
)

from registry import Registry
from registry.catalog.catalog import Catalog
from registry.log import entries
from registry.log.entries import pack_record
from registry.store import header
from registry.store.digest import digest as digest_of
from registry.store.errors import Corrupt, NotFound, RegistryError, StorageError, Unsupported
from registry.store.pack import PackedTensor, PackInfo, pack_path
from registry.upkeep.garbage import GRACE

SAVED = {"net:v1": 1, "net:v2": 2}


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two versions in two packs; the first pack has the shared tensor, which the second version needs too."""
    registry = Registry(tmp_path_factory.mktemp("golden") / "r")
    for number in (1, 2):
        save(registry, number)
    registry.set_alias("net:v1", "good")
    registry.set_tag("net:v2", "paper")
    registry.add_note("net:v1", "checked by hand")
    registry.catalog.close()
    return registry.root


@pytest.fixture
def root(golden: Path, tmp_path: Path) -> Path:
    return copy(golden, tmp_path / "r")


def pack_of(registry: Registry, path: str, name: str) -> tuple[Path, int, int]:
    """The pack file that holds a tensor of a version, and the range of its bytes."""
    for tensor_path, _, _, digest in registry[name].parameters():
        if tensor_path == path:
            location = registry.catalog.locate([digest])[digest]
            size = next(
                t.size for t in registry.store.manifest(registry[name].id).tensors if t.digest == digest
            )
            return registry.store.pack_path(location.pack), location.start, location.start + size
    raise AssertionError(path)


def change_byte(path: Path, offset: int) -> None:
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 0x40]))


def test_a_flipped_byte_in_a_tensor_is_named_exactly_and_contained(root: Path) -> None:
    registry = Registry(root)
    pack, start, end = pack_of(registry, "model/own", "net:v2")
    change_byte(pack, random.Random(1).randrange(start, end))
    (problem,) = registry.verify().problems
    assert problem.message.startswith("model/own: ")
    assert str(pack) in problem.message
    assert problem.checkpoints == ("net:v2",)
    for load in (
        lambda: registry["net:v2"].load(),
        lambda: registry["net:v2"].load(copy=True),
        lambda: registry["net:v2"].load_into(model={"own": torch.zeros(50, 30)}),
    ):
        with pytest.raises(
            Corrupt, match=rf"^net:v2: model/own: the bytes {start} to {end} of pack {pack.name}"
        ):
            load()
    assert is_state(registry["net:v1"].load(), 1)
    assert torch.equal(registry["net:v2"].load("model/shared")["model"]["shared"], torch.arange(2_000.0))


def test_loading_into_a_live_model_changes_nothing_when_a_byte_is_wrong(root: Path) -> None:
    registry = Registry(root)
    pack, start, _ = pack_of(registry, "model/own", "net:v2")
    change_byte(pack, start)
    live = {"shared": torch.zeros(2_000), "own": torch.zeros(50, 30)}
    with pytest.raises(Corrupt):
        registry["net:v2"].load_into(model=live)
    assert not live["shared"].any()
    assert not live["own"].any()


def test_a_flipped_byte_anywhere_in_a_pack_is_found(golden: Path, tmp_path: Path) -> None:
    chance = random.Random(2)
    for _ in range(30):
        root = copy(golden, tmp_path / "r")
        registry = Registry(root)
        pack = chance.choice(sorted(root.glob("packs/*/*")))
        change_byte(pack, chance.randrange(pack.stat().st_size))
        problems = registry.verify().problems
        assert problems
        assert all(pack.name in problem.message for problem in problems)


def test_a_flipped_byte_anywhere_in_a_manifest_is_found_and_put_back(golden: Path, tmp_path: Path) -> None:
    chance = random.Random(3)
    for _ in range(10):
        root = copy(golden, tmp_path / "r")
        registry = Registry(root)
        path = registry.store.manifest_path(registry["net:v2"].id)
        before = path.read_bytes()
        change_byte(path, chance.randrange(path.stat().st_size))
        found = registry.verify()
        (mended,) = found.mended
        assert path.name in mended.message
        assert "it was written again from the log" in mended.message
        assert path.read_bytes() == before
        assert found.problems == ()
        assert registry.verify().mended == ()
        change_byte(path, chance.randrange(path.stat().st_size))
        assert is_state(registry["net:v2"].load(), 2)
        assert path.read_bytes() == before


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda path: os.truncate(path, path.stat().st_size - 1), r"has \d+ bytes instead of \d+"),
    "emptied": (lambda path: os.truncate(path, 0), "has 0 bytes instead of"),
    "extended": (lambda path: os.truncate(path, path.stat().st_size + 1), r"has \d+ bytes instead of \d+"),
    "missing": (lambda path: path.unlink(), "the file is missing"),
    "a link": (
        lambda path: (path.rename(path.with_suffix(".x")), path.symlink_to(path.with_suffix(".x"))),
        "is a symbolic link, not a regular file",
    ),
    "a pipe": (lambda path: (path.unlink(), os.mkfifo(path)), "is a pipe, not a regular file"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "is a folder, not a regular file"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_pack_is_found_and_healed_by_saving_again(root: Path, name: str) -> None:
    damage, message = DAMAGES[name]
    registry = Registry(root)
    pack, _, _ = pack_of(registry, "model/own", "net:v2")
    pack.chmod(0o644)
    damage(pack)
    found = registry.verify().problems
    assert any(pack.name in problem.message and problem.checkpoints == ("net:v2",) for problem in found)
    for load in (lambda: registry["net:v2"].load(), lambda: registry["net:v2"].load(copy=True)):
        with pytest.raises(Corrupt, match=rf"^net:v2: .*{pack.name}: {message}|^net:v2: .*{message}"):
            load()
    assert is_state(registry["net:v1"].load(), 1)
    assert save(registry, 2) == "net:v3"
    assert is_state(registry["net:v3"].load(), 2)
    assert is_state(registry["net:v2"].load(), 2)
    if name in ("a link", "a pipe", "a folder"):  # Somebody put it there; it is theirs to remove.
        with pytest.raises(Corrupt, match=message):
            registry.collect_garbage(grace=0)
        pack.rmdir() if name == "a folder" else pack.unlink()
    registry.catalog.close()
    for stray in root.glob("packs/*/*.x"):
        stray.unlink()
    check_whole(root, {**SAVED, "net:v3": 2})


@pytest.mark.parametrize("path", ["model/own", "model/shared"])
def test_what_verify_finds_is_written_again_by_the_next_program_that_saves_it(root: Path, path: str) -> None:
    """`verify` in one program, and the save in another, which has not seen the damage itself."""
    registry = Registry(root)
    entry = registry.catalog.ledger().seq
    assert registry.verify().problems == ()
    assert registry.catalog.ledger().seq == entry  # It writes nothing where nothing is damaged.
    pack, start, _ = pack_of(registry, path, "net:v1")
    change_byte(pack, start)
    for _ in range(2):
        (problem,) = registry.verify().problems
        assert pack.name in problem.message
    assert registry.catalog.ledger().seq == entry + 1
    assert broken_rules(registry) == []
    registry.catalog.close()
    for drops in (False, True):
        later = Registry(root)
        number = save(later, 1).partition(":v")[2]
        assert is_state(later[f"net:v{number}"].load(verify=True), 1)
        assert is_state(later["net:v1"].load(verify=True), 1)
        assert is_state(later["net:v2"].load(verify=True), 2)
        assert broken_rules(later) == []
        later.collect_garbage(grace=0)
        later.catalog.close()
        if drops:
            continue
        for one in root.glob("catalog.sqlite*"):
            one.unlink()
    check_whole(root, {**SAVED, "net:v3": 1, "net:v4": 1})


def test_gc_tells_of_a_damaged_pack_that_another_has_replaced(root: Path) -> None:
    registry = Registry(root)
    pack, start, _ = pack_of(registry, "model/own", "net:v2")
    change_byte(pack, start)
    with pytest.raises(Corrupt):
        registry["net:v2"].load()
    tree = state(2)
    tree["model"]["more"] = torch.ones(3)
    registry.save("net", tree)
    told: list[tuple[Path, int]] = []
    size = pack.stat().st_size
    found = registry.collect_garbage(grace=0, tell=lambda path, size: told.append((path, size)))
    assert told == [(pack, size)]
    assert (found.packs, found.bytes) == (1, size)
    assert not pack.exists()
    assert is_state(registry["net:v2"].load(), 2)


def test_a_missing_manifest_is_put_back_by_who_reads_it_or_a_rebuild(root: Path) -> None:
    registry = Registry(root)
    path = registry.store.manifest_path(registry["net:v2"].id)
    path.unlink()
    assert is_state(registry["net:v2"].load(), 2)
    path.unlink()
    assert registry.rebuild().healed == 1
    registry.catalog.close()
    check_whole(root, SAVED)


@pytest.mark.damages
def test_a_manifest_that_neither_its_file_nor_the_log_has_is_named(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that is too large for the log."""
    registry = Registry(root)
    with monkeypatch.context() as patch:
        patch.setattr("registry.catalog.commit.manifest_text", lambda text: {})
        save(registry, 3)
    path = registry.store.manifest_path(registry["net:v3"].id)
    path.unlink()
    (problem,) = registry.verify().problems
    assert problem.checkpoints == ("net:v3",)
    with pytest.raises(NotFound, match=r"^net:v3: .*the manifest is missing"):
        registry["net:v3"].load()
    (damaged,) = registry.rebuild().damaged
    assert damaged.startswith("net:v3: ")
    assert is_state(registry["net:v2"].load(), 2)


def test_a_forged_manifest_of_the_right_digest_is_refused(tmp_path: Path) -> None:
    """Somebody who can write may put anything there, but it is answered with an error of ours."""
    from registry.store.digest import digest
    from registry.store.store import Store

    store = Store(tmp_path)
    good = {"format": 1, "record": {}, "components": {}, "tensors": []}
    none = ["float32", [1], "0" * 64]
    forged = [
        b"[]",
        b"{",
        b"\xff",
        b'{"a":' + b"[" * 100_000,
        {**good, "components": {"model": {"$tensor": 0}}},
        {**good, "components": {"model": {"$tensor": -1}}, "tensors": [none]},
        {**good, "components": {"model": {"$tensor": 0}}, "tensors": [none]},
        {**good, "components": {"model": {"$evil": 0}}},
        {**good, "components": {"model": {"$scalar": ["object", "00"]}}},
        {**good, "components": {"model": {"$dtype": "load"}}},
        {**good, "components": {"model": {"$size": ["a"]}}},
        {**good, "components": {"model": {"$dict": [[[], 1]]}}},
        {**good, "components": {"model": {"$dict": 1}}},
        {**good, "components": {"model": {"$counter": 1}}},
        {**good, "tensors": [["float32", [-1], "0" * 64]]},
        {**good, "tensors": [["float32", [1 << 70], "0" * 64]]},
        {**good, "tensors": [["object", [1], "0" * 64]]},
        {**good, "tensors": [["float32", [1], "../../etc"]]},
        {**good, "format": 2},
    ]
    for document in forged:
        data = document if isinstance(document, bytes) else json.dumps(document).encode()
        path = store.manifest_path(digest(data))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        with pytest.raises((Corrupt, Unsupported)):
            store.get(digest(data))


LOSSES: dict[str, Callable[[Path], object]] = {
    "lost": lambda path: path.unlink(),
    "emptied": lambda path: os.truncate(path, 0),
    "overwritten": lambda path: path.write_bytes(os.urandom(8_192)),
    "cut short": lambda path: os.truncate(path, path.stat().st_size // 2),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_lost_catalog_is_rebuilt_equal(root: Path, name: str) -> None:
    registry = Registry(root)
    registry.remove(["net:v2"], force=True)
    assert save(registry, 3) == "net:v3"
    before = dump(registry)
    registry.catalog.close()
    LOSSES[name](root / "catalog.sqlite")
    damaged = Registry(root, create=False)
    assert damaged["net"].name == "net:v3"  # Whoever finds it damaged makes it anew.
    assert dump(damaged) == before
    assert damaged.rebuild().damaged == ()
    assert dump(damaged) == before
    assert damaged["net@good"].notes[0][1] == "checked by hand"
    damaged.catalog.close()
    check_whole(root, {"net:v1": 1, "net:v3": 3})


MUTILATIONS = {
    "no state": "DROP TABLE state",
    "empty state": "DELETE FROM state",
    "half a state": "DELETE FROM state WHERE key = 'digest'",
    "a place that is none": "UPDATE state SET value = '-3' WHERE key = 'offset'",
    "no log": "DELETE FROM log",
    "a trigger": "CREATE TRIGGER t AFTER INSERT ON runs BEGIN DELETE FROM versions; END",
    "a view": "CREATE VIEW v AS SELECT * FROM versions",
    "text as schema": "UPDATE state SET value = 'x' WHERE key = 'schema'",
    "no tensors": "DROP TABLE tensors",
    "no packs": "PRAGMA foreign_keys = OFF; DROP TABLE packs",
    "a column less": "ALTER TABLE versions DROP COLUMN epoch",
    "an index less": "DROP INDEX metrics_by_value",
    "a table more": 'CREATE TABLE "odd "" name" (x REFERENCES models (name))',
    "rows of nothing": "PRAGMA foreign_keys = OFF; INSERT INTO uses VALUES ('x', 9); DELETE FROM packs",
}


@pytest.mark.parametrize("name", MUTILATIONS)
def test_a_catalog_with_other_tables_is_rebuilt_equal(root: Path, name: str) -> None:
    registry = Registry(root)
    before = dump(registry)
    tables = "SELECT type, name, sql FROM sqlite_master ORDER BY name"
    intact = registry.catalog.query(tables)
    assert registry.catalog.problems() == []
    registry.catalog.close()
    with contextlib.closing(sqlite3.connect(root / "catalog.sqlite")) as connection:
        connection.executescript(MUTILATIONS[name])
    mutilated = Registry(root, create=False)
    with contextlib.suppress(Corrupt):  # which says to rebuild, where it does harm
        assert mutilated["net"].name == "net:v2"
    assert mutilated.rebuild().damaged == ()
    assert dump(mutilated) == before
    assert mutilated.catalog.query(tables) == intact
    mutilated.catalog.close()
    check_whole(root, SAVED)


@pytest.mark.damages
def test_rebuild_leaves_a_newer_catalog_alone(root: Path) -> None:
    with contextlib.closing(sqlite3.connect(root / "catalog.sqlite")) as connection:
        connection.execute("UPDATE state SET value = 99 WHERE key = 'schema'")
        connection.commit()
    before = (root / "catalog.sqlite").read_bytes()
    with pytest.raises(Unsupported, match="has schema 99"):
        Registry(root, create=False).rebuild()
    assert (root / "catalog.sqlite").read_bytes() == before


def test_a_flipped_bit_in_the_catalog_never_gives_a_wrong_weight(golden: Path, tmp_path: Path) -> None:
    chance = random.Random(4)
    for _ in range(40):
        root = copy(golden, tmp_path / "r")
        change_byte(root / "catalog.sqlite", chance.randrange((root / "catalog.sqlite").stat().st_size))
        registry = Registry(root, create=False)
        for name, number in SAVED.items():
            try:
                assert is_state(registry[name].load(), number)
            except RegistryError as error:
                assert "\n" not in str(error)
        try:
            registry.rebuild()
        finally:
            registry.catalog.close()
        check_whole(root, SAVED)


@pytest.mark.damages
@pytest.mark.parametrize("table", ["versions", "artifacts"])
def test_a_row_of_the_catalog_without_an_id_is_told(root: Path, table: str) -> None:
    registry = Registry(root)
    registry.cached(Box.make)()
    connection = registry.catalog.connection()
    connection.execute("PRAGMA foreign_keys = OFF")
    column = "id" if table == "versions" else "key"
    connection.execute(f"UPDATE {table} SET {column} = NULL WHERE rowid = (SELECT MIN(rowid) FROM {table})")
    registry.catalog.close()
    later = Registry(root)
    assert any(f"of the table {table}" in problem.message for problem in later.verify().problems)
    later.rebuild()
    assert later.verify().problems == ()
    later.catalog.close()


class Box:
    @staticmethod
    def make() -> torch.Tensor:
        return torch.ones(3)


def test_an_older_catalog_catches_up(root: Path) -> None:
    old = (root / "catalog.sqlite").read_bytes()
    registry = Registry(root)
    save(registry, 3)
    registry.set_alias("net:v3", "good")
    registry.remove(["net:v1"])
    after = dump(registry)
    registry.catalog.close()
    (root / "catalog.sqlite").write_bytes(old)
    registry = Registry(root, create=False)
    assert dump(registry) == after
    registry.catalog.close()
    check_whole(root, {"net:v2": 2, "net:v3": 3})


def log_of(root: Path) -> Path:
    (path,) = root.glob("journal/*.log")
    return path


def flip(path: Path, what: bytes) -> None:
    """Damage a file where it has some bytes."""
    data = path.read_bytes()
    assert data.count(what) == 1
    path.write_bytes(data.replace(what, bytes([what[0] ^ 1]) + what[1:]))


ENTRIES = {"a version": b'"version":1', "an alias": b'"alias":"good"', "the last one": b"checked by hand"}


@pytest.mark.parametrize("what", ENTRIES)
def test_a_damaged_entry_of_the_log_comes_back_from_the_catalog(root: Path, what: str) -> None:
    before, log = dump(Registry(root)), log_of(root).read_bytes()
    flip(log_of(root), ENTRIES[what])
    registry = Registry(root)
    assert any("registry rebuild puts it back" in problem for problem in registry.catalog.problems())
    assert dump(registry) == before
    assert registry.rebuild().healed == 1
    assert log_of(root).read_bytes() == log
    assert dump(registry) == before
    registry.catalog.close()
    check_whole(root, SAVED)


@pytest.mark.parametrize("lost", ["file", "folder", "half"])
def test_a_lost_log_is_written_again_from_the_catalog(root: Path, lost: str) -> None:
    before, log = dump(Registry(root)), log_of(root).read_bytes()
    if lost == "file":
        log_of(root).unlink()
    elif lost == "folder":
        shutil.rmtree(root / "journal")
    else:
        log_of(root).write_bytes(log[: len(log) // 2])
    registry = Registry(root)
    registry.set_tag("net:v1", "later")
    registry.remove_tag("net:v1", "later")
    registry.catalog.close()
    assert log_of(root).read_bytes().startswith(log)
    (root / "catalog.sqlite").unlink()
    assert registry.rebuild().damaged == ()
    assert dump(registry) == before


def damage_both(root: Path, what: bytes) -> None:
    flip(log_of(root), what)
    for path in root.glob("catalog.sqlite*"):
        path.unlink()


@pytest.mark.parametrize("what", ["a version", "an alias"])
def test_what_is_damaged_in_both_copies_is_named_and_nothing_is_changed_before_it_is_accepted(
    root: Path, what: str
) -> None:
    registry = Registry(root)
    for number in (3, 4):
        save(registry, number)
    registry.remove(["net:v4"])
    registry.catalog.close()
    damage_both(root, ENTRIES[what])
    before, before_adoption = files(root), {*root.glob("manifests/*/*.json")}
    registry = Registry(root)
    lost = {"net:v1"} if what == "a version" else set()
    for name, number in {**SAVED, "net:v3": 3}.items():
        if name not in lost:
            assert is_state(registry[name].load(), number)
    assert registry["net"].name == "net:v3"
    for change in (
        lambda: save(registry, 9),
        lambda: registry.set_tag("net:v2", "x"),
        lambda: registry.remove(["net:v3"]),
        lambda: registry.collect_garbage(grace=0),
    ):
        with pytest.raises(Corrupt, match=r"entry \d+ of the log cannot be read.*rebuild --adopt"):
            change()
    assert {*root.glob("manifests/*/*.json")} == before_adoption  # The save that was refused wrote nothing.
    found = registry.rebuild()
    assert any(
        re.search(r"entry \d+ of the log cannot be read, written .*before 2", text) for text in found.damaged
    )
    assert len(found.unnamed) == len(lost)
    assert before.items() <= files(root).items()
    registry = Registry(root)
    adopted = registry.rebuild(adopt=True)
    assert adopted.adopted == tuple(sorted(lost))  # Under its own number.
    assert adopted.latest == ()
    assert broken_rules(registry) == []
    assert registry["net"].name == "net:v3"
    with pytest.raises(NotFound):
        registry["net:v4"]  # What was removed stays removed.
    if lost:
        assert registry["net:v1"].aliases == ("good",)
        assert registry["net:v1"].notes[0][1] == "checked by hand"
    assert save(registry, 5) == "net:v5"
    registry.catalog.close()
    check_whole(root, {**SAVED, "net:v3": 3, "net:v5": 5})


def test_a_log_that_is_gone_with_the_catalog_keeps_everything_until_it_is_adopted(root: Path) -> None:
    shutil.rmtree(root / "journal")
    for path in root.glob("catalog.sqlite*"):
        path.unlink()
    before = files(root / "packs"), files(root / "manifests")
    registry = Registry(root, create=False)
    for change in (lambda: registry.collect_garbage(grace=0), lambda: save(registry, 3)):
        with pytest.raises(Corrupt, match=r"the log is gone.*rebuild --adopt"):
            change()
    assert all(
        old.items() <= files(root / kind).items()
        for kind, old in zip(("packs", "manifests"), before, strict=True)
    )
    found = registry.rebuild(adopt=True)
    assert found.adopted == ("net:v1", "net:v2")
    assert found.latest == ("net:v2",)
    registry.catalog.close()
    check_whole(root, SAVED)


def test_an_old_log_that_names_nothing_lets_gc_remove_nothing(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As where the log of the first day was put back, and the catalog was deleted."""
    data = log_of(root).read_bytes()
    log_of(root).write_bytes(data[: data.index(b"\n") + 1])
    for path in root.glob("catalog.sqlite*"):
        path.unlink()
    before = files(root / "packs"), files(root / "manifests")
    registry = Registry(root, create=False)
    collect(registry, grace=0, now=time.time() + 2 * GRACE)
    assert (files(root / "packs"), files(root / "manifests")) == before
    assert "registry rebuild --adopt takes them in" in caplog.text
    assert registry.rebuild(adopt=True).adopted == ("net:v1", "net:v2")
    registry.catalog.close()
    check_whole(root, SAVED)


def test_where_catalog_log_and_a_pack_are_lost_the_rest_comes_back(root: Path) -> None:
    registry = Registry(root)
    pack_of(registry, "model/own", "net:v2")[0].unlink()
    registry.catalog.close()
    shutil.rmtree(root / "journal")
    for path in root.glob("catalog.sqlite*"):
        path.unlink()
    found = registry.rebuild(adopt=True)
    assert (found.versions, found.adopted, len(found.unnamed)) == (1, ("net:v1",), 1)
    registry.catalog.close()
    (orphan,) = (path for path in root.glob("manifests/*/*.json") if path.stem == found.unnamed[0])
    orphan.unlink()
    check_whole(root, {"net:v1": 1})


@pytest.mark.damages
def test_two_histories_are_told_apart_and_nothing_is_changed(root: Path, tmp_path: Path) -> None:
    """As where a backup of the log was put back, and a program without the catalog went on from it."""
    other = copy(root, tmp_path / "other")
    for place, number in ((root, 3), (other, 4)):
        registry = Registry(place)
        save(registry, number)
        registry.catalog.close()
    log_of(root).write_bytes(log_of(other).read_bytes())
    before = files(root)
    registry = Registry(root)
    for change in (lambda: save(registry, 9), lambda: registry.rebuild()):
        with pytest.raises(Corrupt, match=r"different histories from entry \d+ on"):
            change()
    assert {path: data for path, data in files(root).items() if "lock" not in path} == {
        path: data for path, data in before.items() if "lock" not in path
    }


def test_a_rebuild_that_fails_leaves_no_empty_catalog(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which gc would take for one in which nothing is needed any more."""
    (root / "catalog.sqlite").unlink()
    registry = Registry(root)
    with monkeypatch.context() as patched:
        patched.setattr("registry.catalog.refolding.fill", lambda *_, **__: exec("raise MemoryError"))
        with pytest.raises(MemoryError):
            registry.rebuild()
    before = files(root / "packs"), files(root / "manifests")
    Registry(root).collect_garbage(grace=0)
    assert (files(root / "packs"), files(root / "manifests")) == before
    registry.catalog.close()
    check_whole(root, SAVED)


def test_a_catalog_that_another_process_holds_is_not_taken_for_a_damaged_one(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("registry.catalog.database.BUSY_SECONDS", 0.1)
    with contextlib.closing(sqlite3.connect(root / "catalog.sqlite", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(StorageError, match="locked"):
            Registry(root).rebuild()
        other.execute("ROLLBACK")
    assert not list(root.glob("*damaged*"))
    check_whole(root, SAVED)


def append(root: Path, *several: list[dict[str, Any]]) -> None:
    """Write entries behind the last one, as another program might."""
    ledger = Registry(root).catalog.ledger()
    seq, digest = ledger.seq, ledger.digest
    with log_of(root).open("ab") as file:
        for records in several:
            entry = entries.write(seq + 1, digest, records)
            file.write(entry.line)
            seq, digest = entry.seq, entry.digest


MALFORMED: list[dict[str, Any]] = [
    {"op": "publish"},
    {"op": "alias", "model": "net"},
    {"op": "tag", "id": 3},
    {"op": "publish", "id": "../x", "model": "net", "version": 9},
    {"op": "publish", "id": "0" * 64, "model": "../x", "version": 9},
    {"op": "publish", "id": "0" * 64, "model": "net", "version": 1 << 70},
    {"op": "run", "name": "../../x", "model": "net", "at": "2026-01-01T00:00:00.000000Z", "record": {}},
    {"op": "doom", "packs": ["/etc/passwd"], "manifests": []},
    {"op": "alias", "model": "net", "alias": "x", "id": "0" * 64},
    {"op": "artifact", "key": "0" * 64, "id": "0" * 64, "at": "2026-01-01T00:00:00.000000Z", "record": {}},
]


@pytest.mark.parametrize("record", MALFORMED, ids=str)
def test_a_malformed_entry_is_damage(root: Path, record: dict[str, Any]) -> None:
    append(root, [record], [{"op": "next", "model": "other", "version": 9}])
    registry = Registry(root)
    assert registry["net"].name == "net:v2"
    with pytest.raises(Corrupt, match="cannot be read"):
        registry.set_tag("net:v1", "x")
    assert registry.rebuild(adopt=True).damaged == ()
    registry.catalog.close()
    check_whole(root, SAVED)


@pytest.mark.parametrize(
    "record",
    [
        {"op": "tag", "id": "0" * 64, "tag": "x"},
        {"op": "alias", "model": "net", "alias": "good", "id": "0" * 64, "was": None},
        {"op": "publish", "id": "0" * 64, "model": "net", "version": 1},
        {"op": "replace", "old": "0" * 64, "new": "1" * 64},
        {"op": "unalias", "model": "net", "alias": "good", "was": "0" * 64},
    ],
    ids=lambda record: record["op"],
)
@pytest.mark.damages
def test_an_entry_that_contradicts_the_others_has_no_effect_and_is_named(
    root: Path, record: dict[str, Any]
) -> None:
    before = dump(Registry(root))
    number = {"op": "next", "model": "other", "version": 7}
    append(root, [number, record])
    registry = Registry(root)
    assert dump(registry) == before  # The whole of it, also what would have been right.
    assert any("has no effect" in problem for problem in registry.catalog.problems())
    assert save(registry, 3) == "net:v3"
    registry.rebuild()
    assert save(registry, 4) == "net:v4"
    collect(registry, grace=0)
    for name, number_of in {**SAVED, "net:v3": 3, "net:v4": 4}.items():
        assert is_state(registry[name].load(), number_of)


@pytest.mark.parametrize("table", ["versions", "runs"])
@pytest.mark.damages
def test_a_damaged_record_in_the_catalog_is_named(root: Path, table: str) -> None:
    registry = Registry(root)
    with registry.run("net") as run:
        run.save(model=torch.nn.Linear(1, 1))
    registry.catalog.connection().execute(f"UPDATE {table} SET record = '[' || record")
    with pytest.raises(Corrupt, match="registry rebuild"):
        registry["net"] if table == "versions" else registry.runs.find()


@pytest.mark.damages
def test_loading_into_a_live_model_changes_nothing_when_a_pack_is_gone(root: Path) -> None:
    registry = Registry(root)
    pack_of(registry, "model/own", "net:v2")[0].unlink()
    live = {"shared": torch.zeros(4_000)[::2], "own": torch.zeros(50, 30)}  # a view with gaps is filled first
    with pytest.raises(Corrupt, match="missing"):
        registry["net:v2"].load_into(model=live, verify=False)
    assert not live["shared"].any()


def test_what_an_older_log_does_not_know_is_adopted_on_request(root: Path) -> None:
    old = log_of(root).read_bytes(), (root / "catalog.sqlite").read_bytes()
    registry = Registry(root)
    save(registry, 3)
    registry.catalog.close()
    log_of(root).write_bytes(old[0])
    (root / "catalog.sqlite").write_bytes(old[1])
    registry = Registry(root)
    found = registry.rebuild()
    assert (found.adopted, len(found.unnamed)) == ((), 1)
    found = registry.rebuild(adopt=True)
    assert (found.adopted, found.latest, found.unnamed) == (("net:v3",), ("net:v3",), ())
    registry.catalog.close()
    check_whole(root, {**SAVED, "net:v3": 3})


def newer_settings(root: Path) -> None:
    (root / "registry.toml").chmod(0o644)
    (root / "registry.toml").write_text("format = 3\n")


def newer_schema(root: Path) -> None:
    with sqlite3.connect(root / "catalog.sqlite") as connection:
        connection.execute("UPDATE state SET value = 99 WHERE key = 'schema'")
    connection.close()


def newer_operation(root: Path) -> None:
    append(root, [{"op": "teleport", "id": "x"}])


def newer_pack(root: Path) -> None:
    """A pack that counts, of a version that this program does not know."""
    tensor = PackedTensor(digest="0" * 64, dtype="uint8", shape=(64,), start=4_096)
    text = header.render(
        [(tensor.digest, "U8", (64,), 0, 64)], {"format": "torch-registry pack 3", "salt": "0" * 32}
    )
    head = header.framed(text, 4_096)
    path = pack_path(root / "packs", digest_of(head))
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(head + bytes(64))
    append(root, [pack_record(PackInfo(digest_of(head), 4_160, (tensor,)))])


@pytest.mark.parametrize("make", [newer_settings, newer_schema, newer_operation, newer_pack])
@pytest.mark.damages
def test_what_a_newer_version_wrote_is_refused_and_left_alone(
    root: Path, make: Callable[[Path], None]
) -> None:
    make(root)
    before = files(root)
    for use in (
        lambda: Registry(root, create=False)["net"],
        lambda: save(Registry(root), 3),
        lambda: Registry(root).collect_garbage(grace=0),
    ):
        with pytest.raises(Unsupported, match="pip install -U torch-registry"):
            use()
    now = {
        name: data
        for name, data in files(root).items()
        if not name.startswith(("packs", "manifests/", "tmp"))
    }
    assert now.items() <= before.items()
    log = str(log_of(root).relative_to(root))
    assert files(root)[log] == before[log]


@pytest.mark.damages
def test_verify_does_not_call_a_newer_pack_damaged(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as newer:
        newer.setattr("registry.store.pack._VERSION", 3)
        newer_pack(root)
        save(Registry(root), 3)
    before = files(root)
    problems = [problem.message for problem in Registry(root).verify().problems]
    assert len(problems) == 1
    assert "was written by a newer torch-registry" in problems[0]
    log = str(log_of(root).relative_to(root))
    assert files(root)[log] == before[log]


@pytest.mark.damages
def test_settings_that_make_no_sense_are_refused(root: Path) -> None:
    path = root / "registry.toml"
    path.chmod(0o644)
    for text in ("", "format = 'x'", "format = 0", "format = [", "\0"):
        path.write_text(text)
        with pytest.raises(RegistryError, match=r"registry\.toml"):
            Registry(root)


def test_garbage_collection_waits_for_its_grace_by_the_clock(root: Path) -> None:
    registry = Registry(root)
    registry.remove(["net:v2"], force=True)
    now = time.time()
    assert collect(registry, grace=3_600, now=now).packs == 0
    assert collect(registry, grace=3_600, now=now - 1e6).packs == 0  # The clock went back.
    assert collect(registry, grace=3_600, now=now + 3_590).packs == 0
    assert collect(registry, grace=3_600, now=now + 3_610).packs == 1


def test_verify_writes_a_manifest_that_is_missing_again_from_the_log(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "r")
    save(registry, 1)
    path = registry.store.manifest_path(registry["net"].id)
    text = path.read_bytes()
    path.unlink()
    found = registry.verify()
    assert found.problems == ()
    assert [mended.path for mended in found.mended] == [str(path)]
    assert path.read_bytes() == text


def test_verify_names_a_damaged_manifest_that_it_cannot_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Registry(tmp_path / "r")
    save(registry, 1)
    path = registry.store.manifest_path(registry["net"].id)
    change_byte(path, 100)

    def refused(*_: object, **__: object) -> None:
        raise StorageError("read-only")

    monkeypatch.setattr("registry.store.folder_index.write_file", refused)
    found = registry.verify()
    (problem,) = found.problems
    assert "the log has it, and registry rebuild puts it back" in problem.message
    assert found.mended == ()


def test_rebuild_names_nothing_that_others_remove_while_it_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry, other = Registry(tmp_path / "r"), Registry(tmp_path / "r")
    save(registry, 1)
    save(registry, 2)
    locate = Catalog.locate

    def removed_first(self: Catalog, digests: Any) -> Any:
        monkeypatch.setattr(Catalog, "locate", locate)
        other.remove(["net:v1", "net:v2"], force=True)
        collect(other, grace=0, now=time.time() + 2 * GRACE)
        return locate(self, digests)

    monkeypatch.setattr(Catalog, "locate", removed_first)
    assert list(registry.rebuild().damaged) == []
    assert list((tmp_path / "r").glob("packs/*/*")) == []


@pytest.mark.damages
def test_a_save_writes_again_what_lies_in_a_pack_with_a_damaged_header(tmp_path: Path) -> None:
    backbone = torch.arange(100.0)
    registry = Registry(tmp_path / "r")
    registry.save("net", {"model": {"backbone": backbone, "head": torch.zeros(3)}})
    (pack,) = (tmp_path / "r").glob("packs/*/*")
    data = bytearray(pack.read_bytes())
    data[30] ^= 1
    pack.chmod(0o644)
    pack.write_bytes(data)
    for number in range(2):
        registry = Registry(tmp_path / "r")
        saved = registry.save(
            "net", {"model": {"backbone": backbone, "head": torch.full((3,), 1.0 + number)}}
        )
        assert torch.equal(saved.state_dict()["backbone"], backbone)
    assert torch.equal(registry["net:v2"].state_dict()["backbone"], backbone)
    told = [problem.message for problem in registry.verify().problems]
    assert len(told) == 1, told
    assert "head" in told[0] or pack.name in told[0]


@pytest.mark.damages
def test_who_needs_a_pack_is_known_though_its_tensors_lay_in_one_that_could_not_be_read(
    tmp_path: Path,
) -> None:
    weights = {"model": {"w": torch.arange(100.0)}}
    root = tmp_path / "r"
    registry = Registry(root)
    registry.save("net", weights)
    registry.catalog.close()
    (pack,) = root.glob("packs/*/*")
    change_byte(pack, 30)
    (root / "catalog.sqlite").unlink()
    registry = Registry(root)
    assert registry.catalog.query("SELECT 1 FROM lacks")
    # The second save brings the tensor to another pack, which the first version relies on from then on.
    registry.save("net", weights)
    registry.save("net", weights)
    assert torch.equal(registry["net:v1"].state_dict()["w"], weights["model"]["w"])
    used = registry.catalog.query("SELECT pack FROM uses GROUP BY pack HAVING COUNT(*) = 3")
    assert len(used) == 1
    assert registry.catalog.query("SELECT 1 FROM lacks") == []
    for rule in broken_rules(registry):
        assert pack.stem[:12] in rule or pack.name in rule, rule
    before = dump(registry)
    registry.rebuild()
    assert dump(registry) == before


@pytest.mark.parametrize("command", [["list"], ["alias", "net:v1", "x"], ["verify"], ["gc"], ["rebuild"]])
def test_too_few_files_are_one_line_that_says_so(tmp_path: Path, command: list[str]) -> None:
    registry = Registry(tmp_path / "r")
    save(registry, 1)
    registry.catalog.close()
    for count in range(5, 12):
        words = [sys.executable, "-m", "registry.cli", "--root", str(tmp_path / "r"), *command]
        limited = ["bash", "-c", 'ulimit -n "$0"; exec "$@"', str(count), *words]
        done = subprocess.run(limited, capture_output=True, text=True, check=False)
        if done.returncode and "Fatal Python error" not in done.stderr and "error: " in done.stderr:
            assert "too many open files\nhint:  raise the limit" in done.stderr, done.stderr
    assert is_state(Registry(tmp_path / "r")["net"].load(), 1)


def test_manifests_heal_where_the_folder_of_temporary_files_was_not_copied(tmp_path: Path) -> None:
    """As a copy that leaves out empty folders."""
    registry = Registry(tmp_path / "r")
    save(registry, 1)
    path = registry.store.manifest_path(registry["net"].id)
    text = path.read_bytes()
    change_byte(path, 50)
    (tmp_path / "r" / "tmp").rmdir()
    assert len(registry.verify().mended) == 1
    assert path.read_bytes() == text
    change_byte(path, 50)
    (tmp_path / "r" / "tmp").rmdir()
    assert registry.rebuild().healed == 1
    assert path.read_bytes() == text


@pytest.mark.damages
def test_rebuild_counts_no_manifest_that_it_could_not_write(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "r")
    save(registry, 1)
    path = registry.store.manifest_path(registry["net"].id)
    path.unlink()
    path.mkdir()
    assert registry.rebuild().healed == 0


@pytest.mark.damages
def test_packs_that_a_log_without_entries_does_not_name_are_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As where the log, the catalog and all manifests are lost at once."""
    registry = Registry(tmp_path / "r")
    save(registry, 1)
    save(registry, 2)
    registry.catalog.close()
    for path in (*(tmp_path / "r").glob("catalog.sqlite*"), *(tmp_path / "r").glob("journal/*.log")):
        path.unlink()
    for path in (tmp_path / "r").glob("manifests/*/*"):
        path.unlink()
    packs = sorted((tmp_path / "r").glob("packs/*/*"))
    with contextlib.suppress(RegistryError):
        collect(Registry(tmp_path / "r", create=False), grace=0)
    assert sorted((tmp_path / "r").glob("packs/*/*")) == packs
