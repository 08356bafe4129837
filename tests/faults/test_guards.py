"""Each guard of the rules that hold in every registry, by itself: what breaks one is refused, whoever asks for it.

An entry that contradicts those before it is refused before it is written. If one stands in the log all the same, written by a
program at fault or by an enemy, it has no effect: neither where a catalog catches up nor where it is made anew.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from support import (
    all_versions,
    broken_rules,
    collect,
    copy,
    dump,
    files,
    in_steps,
    is_in_a_commit,
    is_state,
    save,
    state,
)
from unsynced import Unsynced

from registry import Registry
from registry.cache.keys import Key
from registry.catalog.transactions import View
from registry.log import entries
from registry.log.entries import Record, pack_record
from registry.store import durable, planes
from registry.store.digest import digest, tensor_digest
from registry.store.errors import RegistryError
from registry.store.pack import PackWriter
from registry.upkeep.garbage import GRACE

KEY = digest(b"key")
OTHER = digest(b"nothing")
AT = "2026-01-01T00:00:00.000000Z"


def near(number: int) -> torch.Tensor:
    """A tensor that is stored as a small difference from the others."""
    tensor = torch.randn(60, 50, generator=torch.Generator().manual_seed(0))
    tensor[number] += 0.001
    return tensor


class Facts(NamedTuple):
    """What records are made of: ids of versions by name, their packs by name, and what was doomed."""

    ids: dict[str, str]
    packs: dict[str, str]
    gone: str
    gone_pack: str
    artifact: str


def make(root: Path) -> Facts:
    """A registry with names, an artifact, differences, and a version that was removed and doomed with its pack."""
    registry = Registry(root)
    for number in (1, 2, 3, 4):
        save(registry, number)
    save(registry, 5, "other")
    registry.set_alias("net:v1", "prod")
    registry.set_tag("net:v1", "paper")
    registry.artifacts.put(Key(KEY, "f", {}, {}), {"a": torch.ones(9)}, version=None, seconds=0.0)
    for number in range(4):
        registry.save("near", {"model": {"w": near(number)}})
    registry.compact(["near"])
    ids = {version.name: version.id for version in all_versions(registry)}
    packs = {name: own_pack(registry, name) for name in ids if not name.startswith("near")}
    removed = registry.store.pack_path(packs["net:v4"])
    data = removed.read_bytes()
    registry.remove(["net:v4"])
    collect(registry, grace=0)
    assert not removed.exists()
    removed.write_bytes(data)
    artifact = registry.artifacts[KEY].id
    registry.catalog.close()
    return Facts(ids, packs, ids["net:v4"], packs["net:v4"], artifact)


def own_pack(registry: Registry, name: str) -> str:
    """The pack that was written for a version alone."""
    tensors = registry.store.tensors_of(registry[name].id)
    places = registry.catalog.locate(tensors)
    return max(
        places.values(),
        key=lambda place: registry.catalog.query("SELECT number FROM packs WHERE digest = ?", [place.pack])[
            0
        ][0],
    ).pack


@pytest.fixture(autouse=True, scope="module")
def unsynced() -> Iterator[None]:
    plain, durable.disk = durable.disk, Unsynced()
    yield
    durable.disk = plain


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Facts]:
    root = tmp_path_factory.mktemp("golden") / "r"
    return root, make(root)


# -- what contradicts the log --------------------------------------------------------------------------------


def bytes_of(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.numpy().reshape(-1).view("u1"))


def publish(manifest_id: str, version: int, **more: Any) -> Record:
    return {"op": "publish", "id": manifest_id, "model": "net", "version": version, **more}


def remove(manifest_id: str, aliases: Sequence[str] = (), tags: Sequence[str] = ()) -> Record:
    return {"op": "remove", "id": manifest_id, "aliases": [*aliases], "tags": [*tags]}


def alias(manifest_id: str, was: str | None, name: str = "prod", model: str = "net") -> Record:
    return {"op": "alias", "model": model, "alias": name, "id": manifest_id, "was": was}


CONTRADICTIONS: dict[str, Callable[[Facts], list[Record]]] = {
    "a pack again": lambda f: [{"op": "pack", "digest": f.packs["net:v1"], "size": 9_000}],
    "a pack that was doomed": lambda f: [{"op": "pack", "digest": f.gone_pack, "size": 9_000}],
    "a pack in its own place": lambda f: [
        {"op": "replace", "old": f.packs["net:v1"], "new": f.packs["net:v1"]}
    ],
    "an unknown pack in the place of one": lambda f: [
        {"op": "replace", "old": f.packs["net:v1"], "new": OTHER}
    ],
    "a doomed pack in the place of one": lambda f: [
        {"op": "replace", "old": f.packs["net:v1"], "new": f.gone_pack}
    ],
    "doom of an unknown pack": lambda f: [{"op": "doom", "packs": [OTHER], "manifests": []}],
    "doom of a version": lambda f: [{"op": "doom", "packs": [], "manifests": [f.ids["net:v2"]]}],
    "doom of an artifact": lambda f: [{"op": "doom", "packs": [], "manifests": [f.artifact]}],
    "damage of a doomed pack": lambda f: [{"op": "damaged", "pack": f.gone_pack}],
    "a version again": lambda f: [publish(f.ids["net:v1"], 9)],
    "a doomed manifest without its text": lambda f: [publish(f.gone, 9)],
    "a doomed artifact without its text": lambda f: [
        {"op": "artifact", "key": OTHER, "id": f.gone, "at": AT, "record": {}, "was": None}
    ],
    "a number again": lambda f: [remove(f.ids["net:v2"]), publish(f.ids["net:v2"], 3)],
    "a removed number again": lambda f: [remove(f.ids["net:v2"]), publish(f.ids["net:v2"], 4)],
    "the place of a version that stays": lambda f: [
        remove(f.ids["net:v2"]),
        publish(f.ids["net:v2"], 3, instead=f.ids["net:v3"]),
    ],
    "the place of a version under another number": lambda f: [
        remove(f.ids["net:v2"]),
        publish(f.ids["net:v2"], 4, instead=f.ids["net:v2"]),
    ],
    "a lower next number": lambda f: [{"op": "next", "model": "net", "version": 4}],
    "an alias of a removed version": lambda f: [alias(f.gone, None, "new")],
    "an alias of another model's version": lambda f: [alias(f.ids["other:v1"], None, "new")],
    "an alias that points elsewhere": lambda f: [alias(f.ids["net:v2"], f.ids["net:v3"])],
    "an alias that is there": lambda f: [alias(f.ids["net:v2"], None)],
    "taking an alias from where it is not": lambda f: [
        {"op": "unalias", "model": "net", "alias": "prod", "was": f.ids["net:v2"]}
    ],
    "a tag of a removed version": lambda f: [{"op": "tag", "id": f.gone, "tag": "t"}],
    "taking a tag off a removed version": lambda f: [{"op": "untag", "id": f.gone, "tag": "t"}],
    "a note of a removed version": lambda f: [{"op": "note", "id": f.gone, "at": AT, "text": "t"}],
    "removal again": lambda f: [remove(f.gone)],
    "removal without an alias": lambda f: [remove(f.ids["net:v1"], tags=["paper"])],
    "removal without a tag": lambda f: [remove(f.ids["net:v1"], aliases=["prod"])],
    "removal with another alias": lambda f: [remove(f.ids["net:v1"], ["prod", "gold"], ["paper"])],
    "an artifact in the place of none": lambda f: [
        {"op": "artifact", "key": KEY, "id": f.artifact, "at": AT, "record": {}, "was": None}
    ],
    "dropping another artifact": lambda f: [{"op": "drop-artifact", "key": KEY, "was": f.gone}],
    "dropping an artifact that is not there": lambda f: [
        {"op": "drop-artifact", "key": OTHER, "was": f.artifact}
    ],
}


def check_as_before(registry: Registry, before: dict[str, list[str]], problems: int = 0) -> None:
    assert dump(registry) == before
    found = broken_rules(registry)
    assert len(found) == problems
    assert all("has no effect" in problem for problem in found)
    for number in (1, 2, 3):
        assert is_state(registry[f"net:v{number}"].load(), number)


def check_refused(root: Path, compute: Callable[[Registry], list[Record]]) -> None:
    """Assert that nobody can record something."""
    registry = Registry(root, create=False)
    before, seq = dump(registry), registry.catalog.ledger().seq
    records = compute(registry)
    with pytest.raises(RegistryError):
        registry.catalog.commit(lambda view: records)
    assert registry.catalog.ledger().seq == seq
    assert dump(registry) == before
    registry.catalog.close()


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_what_contradicts_the_log_is_refused(golden: tuple[Path, Facts], tmp_path: Path, name: str) -> None:
    root = copy(golden[0], tmp_path / "r")
    check_refused(root, lambda registry: CONTRADICTIONS[name](golden[1]))


@pytest.mark.parametrize("anew", [False, True], ids=["caught up", "made anew"])
@pytest.mark.parametrize("name", CONTRADICTIONS)
@pytest.mark.damages
def test_what_contradicts_the_log_and_stands_in_it_has_no_effect(
    golden: tuple[Path, Facts], tmp_path: Path, name: str, anew: bool
) -> None:
    root = copy(golden[0], tmp_path / "r")
    registry = Registry(root, create=False)
    before, ledger = dump(registry), registry.catalog.ledger()
    entry = entries.write(ledger.seq + 1, ledger.digest, CONTRADICTIONS[name](golden[1]))
    registry.catalog.journal.append(entry, ledger.end)
    registry.catalog.close()
    if anew:
        for path in root.glob("catalog.sqlite*"):
            path.unlink()
    registry = Registry(root, create=False)
    check_as_before(registry, before, problems=1)
    assert save(registry, 6) == "net:v5"
    assert len(broken_rules(registry)) == 1
    registry.catalog.close()


@pytest.mark.damages
def test_where_tensors_lie_does_not_follow_from_what_has_no_effect(tmp_path: Path) -> None:
    """An entry that is undone had been applied in part, in the transaction that then decides where tensors lie."""
    registry = Registry(tmp_path / "r")
    version = registry.save("net", {"model": {"w": torch.ones(7)}})
    (digest,) = registry.store.tensors_of(version.id)
    first = registry.catalog.locate([digest])[digest].pack
    registry.catalog.commit(lambda view: [{"op": "damaged", "pack": first}])
    copied = registry.store.copy_to_new_pack([digest])
    ledger = registry.catalog.ledger()
    contradiction = [pack_record(copied), {"op": "damaged", "pack": "0" * 64}]
    registry.catalog.journal.append(entries.write(ledger.seq + 1, ledger.digest, contradiction), ledger.end)
    found: list[str] = []

    def look(view: View) -> list[Record]:
        found.append(view.locate([digest])[digest].pack)
        return []

    registry.catalog.commit(look)
    assert found == [first]
    registry.catalog.close()


# -- what the packs do not bear out --------------------------------------------------------------------------


def test_a_version_whose_tensors_no_pack_has_is_refused(golden: tuple[Path, Facts], tmp_path: Path) -> None:
    root = copy(golden[0], tmp_path / "r")

    def unstored(registry: Registry) -> list[Record]:
        stored = registry.store.put({"model": {"w": torch.full((7,), 0.125)}}, {"kind": "checkpoint"})
        return [publish(stored.digest, 5, **entries.manifest_text(stored.text))]

    check_refused(root, unstored)


@pytest.mark.parametrize("change", ["gone", "shorter"])
def test_a_version_whose_pack_is_not_whole_is_refused(
    golden: tuple[Path, Facts], tmp_path: Path, change: str
) -> None:
    root = copy(golden[0], tmp_path / "r")

    def lost(registry: Registry) -> list[Record]:
        stored = registry.store.put({"model": {"w": torch.full((7,), 0.125)}}, {"kind": "checkpoint"})
        (pack,) = stored.packs
        lose(registry, pack.digest, change)
        return [pack_record(pack), publish(stored.digest, 5, **entries.manifest_text(stored.text))]

    check_refused(root, lost)


@pytest.mark.parametrize("change", ["gone", "shorter"])
def test_a_pack_that_is_not_whole_takes_no_place(
    golden: tuple[Path, Facts], tmp_path: Path, change: str
) -> None:
    root, facts = copy(golden[0], tmp_path / "r"), golden[1]

    def replacement(registry: Registry) -> list[Record]:
        old = facts.packs["net:v2"]
        new = registry.store.copy_to_new_pack(list(registry.store.pack_info(old).places))
        registry.store.pack_info(new.digest)
        lose(registry, new.digest, change)
        return [pack_record(new), {"op": "replace", "old": old, "new": new.digest}]

    check_refused(root, replacement)


def lose(registry: Registry, pack: str, change: str) -> None:
    """Take a pack's file away, or its last byte."""
    path = registry.store.pack_path(pack)
    if change == "gone":
        path.unlink()
    else:
        path.chmod(0o600)
        os.truncate(path, path.stat().st_size - 1)


def test_a_pack_that_lacks_what_is_needed_takes_no_place(golden: tuple[Path, Facts], tmp_path: Path) -> None:
    root, facts = copy(golden[0], tmp_path / "r"), golden[1]
    records = [{"op": "replace", "old": facts.packs["net:v2"], "new": facts.packs["net:v3"]}]
    check_refused(root, lambda registry: records)


def test_a_pack_that_is_needed_is_not_doomed(golden: tuple[Path, Facts], tmp_path: Path) -> None:
    root, facts = copy(golden[0], tmp_path / "r"), golden[1]
    records = [{"op": "doom", "packs": [facts.packs["net:v2"]], "manifests": []}]
    check_refused(root, lambda registry: records)


def anchor_of(registry: Registry) -> tuple[str, str]:
    """The version that the others of its model are stored as differences from, and its pack."""
    ((base,),) = registry.catalog.query("SELECT DISTINCT base FROM tensors WHERE base IS NOT NULL")
    (anchor,) = [one.name for one in all_versions(registry) if base in registry.store.tensors_of(one.id)]
    return anchor, registry.catalog.locate([base])[base].pack


def test_a_pack_that_differences_rest_on_is_not_doomed(golden: tuple[Path, Facts], tmp_path: Path) -> None:
    root = copy(golden[0], tmp_path / "r")
    registry = Registry(root, create=False)
    anchor, pack = anchor_of(registry)
    registry.remove([anchor])
    registry.catalog.close()
    check_refused(root, lambda registry: [{"op": "doom", "packs": [pack], "manifests": []}])
    registry = Registry(root, create=False)
    collect(registry, grace=0)
    for version in all_versions(registry):
        registry[version.name].load()
    assert broken_rules(registry) == []


@pytest.mark.parametrize("count", [12, 2])
def test_differences_that_rest_on_one_another_too_deeply_are_refused(
    golden: tuple[Path, Facts], tmp_path: Path, count: int
) -> None:
    """A chain of twelve; and two that rest on each other, which is a chain without an end."""
    root = copy(golden[0], tmp_path / "r")

    def chained(registry: Registry) -> list[Record]:
        tensors = [near(number) for number in range(20, 20 + count)]
        data = [bytes_of(tensor) for tensor in tensors]
        digests = [tensor_digest("float32", (60, 50), part) for part in data]
        writer = PackWriter(
            registry.store.tmp, [("float32", (60, 50))] * count, coded=[("float32", (60, 50))] * count
        )
        for i in range(count):
            base = (i - 1) % count
            if i or count == 2:
                coded = planes.encode(data[i], data[base], 4, lambda jobs, work: [*map(work, jobs)])
                writer.add_coded(digests[i], "float32", (60, 50), digests[base], memoryview(coded))
            else:
                writer.add(digests[i], "float32", (60, 50), data[i])
        pack = writer.finish(registry.store.packs)
        stored = registry.store.put({"model": {"w": tensors[-1]}}, {"kind": "checkpoint"})
        return [pack_record(pack), publish(stored.digest, 5, **entries.manifest_text(stored.text))]

    check_refused(root, chained)


def test_a_plain_copy_takes_over_from_a_difference(golden: tuple[Path, Facts], tmp_path: Path) -> None:
    registry = Registry(copy(golden[0], tmp_path / "r"), create=False)
    query = registry.catalog.query
    names = {tensor_digest("float32", (60, 50), bytes_of(near(number))): number for number in range(4)}
    coded = [name for (name,) in query("SELECT digest FROM tensors WHERE base IS NOT NULL") if name in names]
    assert len(coded) == 3
    writer = PackWriter(registry.store.tmp, [("float32", (60, 50))] * 3)
    for name in coded:
        writer.add(name, "float32", (60, 50), bytes_of(near(names[name])))
    pack = writer.finish(registry.store.packs)
    registry.catalog.commit(lambda view: [pack_record(pack)])
    assert {place.pack for place in registry.catalog.locate(coded).values()} == {pack.digest}
    assert broken_rules(registry) == []
    collect(registry, grace=0)
    assert broken_rules(registry) == []
    for number in range(4):
        assert torch.equal(registry[f"near:v{number + 1}"].load()["model"]["w"], near(number))
    assert query("SELECT 1 FROM tensors WHERE base IS NOT NULL") == []
    registry.catalog.close()


# -- a catalog that lies -------------------------------------------------------------------------------------

LIES = {
    "nothing uses a pack": ["DELETE FROM uses"],
    "there are no versions": [
        f"DELETE FROM {table}"
        for table in (
            "aliases",
            "tags",
            "notes",
            "metrics",
            "lineage",
            "versions",
            "artifacts",
            "uses",
            "manifests",
        )
    ],
    "the next number is low": ["UPDATE models SET next_version = 2"],
    "the next number is twice low": ["UPDATE models SET next_version = 2, next_again = 2"],
    "a pack lies elsewhere": ["UPDATE tensors SET pack = (SELECT MAX(number) FROM packs)"],
    "everything is plain": ["UPDATE tensors SET base = NULL", "UPDATE packs SET differences = 0"],
    "nothing uses a pack, and everything is plain": ["DELETE FROM uses", "UPDATE tensors SET base = NULL"],
    "everything was released": [
        "INSERT OR IGNORE INTO released SELECT id FROM manifests",
        "DELETE FROM uses",
    ],
}


def path_is_needed(registry: Registry, path: str) -> bool:
    """Whether a file is that of a pack or a manifest that counts."""
    query, name = registry.catalog.query, Path(path).stem
    return bool(
        query("SELECT 1 FROM packs WHERE digest = ?", [name])
        + query("SELECT 1 FROM manifests WHERE id = ?", [name])
    )


@pytest.mark.parametrize("lie", LIES)
def test_a_catalog_that_lies_makes_nobody_lose_anything(
    golden: tuple[Path, Facts], tmp_path: Path, lie: str
) -> None:
    root = copy(golden[0], tmp_path / "r")
    registry = Registry(root, create=False)
    registry.remove([anchor_of(registry)[0]])
    before, needed = dump(registry), {path for path in files(root) if path_is_needed(registry, path)}
    trees = {version.name: registry[version.name].load(copy=True) for version in all_versions(registry)}
    registry.catalog.close()
    with contextlib.closing(sqlite3.connect(root / "catalog.sqlite")) as connection:
        for sql in LIES[lie]:
            with contextlib.suppress(sqlite3.IntegrityError):
                connection.execute(sql)
        connection.commit()
    registry = Registry(root, create=False)
    assert broken_rules(registry) != []
    with contextlib.suppress(RegistryError):
        collect(registry, grace=0, now=time.time() + 2 * GRACE)
    assert needed <= set(files(root))
    saved = None
    with contextlib.suppress(RegistryError):
        saved = save(registry, 6)
    assert saved in (None, "net:v5")
    registry.rebuild()
    if saved:
        registry.remove([saved], force=True)
    for name, tree in trees.items():
        for path, tensor in tree["model"].items():
            assert torch.equal(registry[name].load()["model"][path], tensor)
    assert set(trees) == {version.name for version in all_versions(registry)}
    assert broken_rules(registry) == []
    if not saved:
        assert dump(registry)["versions"] == before["versions"]
    registry.catalog.close()


def test_a_number_that_a_catalog_gives_again_is_refused(golden: tuple[Path, Facts], tmp_path: Path) -> None:
    root = copy(golden[0], tmp_path / "r")
    registry = Registry(root, create=False)
    registry.remove(["net:v2"])
    stored = registry.store.put({"model": {}}, {"kind": "checkpoint"})
    registry.catalog.close()
    with contextlib.closing(sqlite3.connect(root / "catalog.sqlite")) as connection:
        connection.execute("UPDATE models SET next_version = 2, next_again = 2 WHERE name = 'net'")
        connection.commit()
    registry = Registry(root, create=False)
    with pytest.raises(RegistryError):
        registry.catalog.commit(
            lambda view: [publish(stored.digest, 2, **entries.manifest_text(stored.text))]
        )
    assert save(registry, 6) == "net:v5"
    assert broken_rules(registry) == []
    registry.catalog.close()


# -- manifests and gc ----------------------------------------------------------------------------------------


def change_beside_gc(root: Path, change: Callable[[Registry], object], word: str) -> None:
    """Run a change, and gc as by another process once a file whose path has a word is there, before the commit."""
    plain, done = durable.disk, []

    def at(count: int, when: str, path: Path) -> None:
        if when == "after" and word in str(path) and path.suffix and not done and not is_in_a_commit(root):
            if not path.exists():
                return
            done.append(path)
            steps, durable.disk = durable.disk, plain
            other = Registry(root, create=False)
            collect(other, grace=0)
            other.catalog.close()
            durable.disk = steps
            assert not path.exists()

    in_steps(root, change, at)
    assert done


CHANGES: dict[str, Callable[[Registry], object]] = {
    "save": lambda registry: save(registry, 6),
    "save what is there": lambda registry: save(registry, 2),
    "save what was removed": lambda registry: save(registry, 3),
    "put": lambda registry: registry.artifacts.put(
        Key(OTHER, "f", {}, {}), {"a": torch.ones(3)}, version=None, seconds=0.0
    ),
    "thin": lambda registry: registry.thin("whole:v1"),
}


@pytest.mark.parametrize(
    ("name", "word"),
    [*((name, "manifests") for name in CHANGES), ("save", "packs"), ("put", "packs")],
)
@pytest.mark.parametrize("is_large", [False, True], ids=["in the log", "in its file alone"])
def test_gc_before_the_commit_takes_nothing_from_a_version(
    golden: tuple[Path, Facts],
    tmp_path: Path,
    name: str,
    word: str,
    is_large: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = copy(golden[0], tmp_path / "r")
    registry = Registry(root)
    optimizer = {"state": {}, "param_groups": [], "moment": torch.ones(5)}
    registry.save("whole", {"model": {"w": torch.ones(4)}, "optimizer": optimizer})
    if name == "save what was removed":
        registry.remove(["net:v3"])
    before = {version.name for version in all_versions(registry)}
    registry.catalog.close()
    if is_large:  # As if the manifest were too large for the log.
        for module in ("registry.catalog.commit", "registry.upkeep.thinning"):
            monkeypatch.setattr(f"{module}.manifest_text", lambda data: {})
    change_beside_gc(root, CHANGES[name], word)
    registry = Registry(root, create=False)
    for (manifest_id,) in registry.catalog.query("SELECT id FROM manifests"):
        assert registry.store.has(manifest_id)
    assert broken_rules(registry) == []
    for version in all_versions(registry):
        registry[version.name].load()
    found = {version.name for version in all_versions(registry)}
    assert found - before == ({"net:v5"} if name.startswith("save") else set())
    if name == "thin":
        assert registry["whole:v1"].components == ("model",)
    registry.catalog.close()


@pytest.mark.parametrize("name", CHANGES)
def test_a_manifest_without_its_file_is_read_from_the_log(
    golden: tuple[Path, Facts], tmp_path: Path, name: str
) -> None:
    root = copy(golden[0], tmp_path / "r")
    registry = Registry(root)
    optimizer = {"state": {}, "param_groups": [], "moment": torch.ones(5)}
    registry.save("whole", {"model": {"w": torch.ones(4)}, "optimizer": optimizer})
    CHANGES[name](registry)
    ids = [manifest_id for (manifest_id,) in registry.catalog.query("SELECT id FROM manifests")]
    for manifest_id in ids:
        registry.store.manifest_path(manifest_id).unlink()
    registry.catalog.close()
    registry = Registry(root)
    assert registry.rebuild().healed == len(ids)
    for version in all_versions(registry):
        registry[version.name].load()
    assert all(registry.store.has(manifest_id) for manifest_id in ids)
    assert broken_rules(registry) == []
    registry.catalog.close()


def test_gc_leaves_a_manifest_that_came_back_since_it_looked(tmp_path: Path) -> None:
    registry, other = Registry(tmp_path / "r"), Registry(tmp_path / "r")
    keys = [Key(digest(b"%d" % i), "f", {}, {}) for i in range(6)]

    def put(registry: Registry, i: int) -> str:
        return registry.artifacts.put(keys[i], {"a": torch.full((3,), float(i))}, version=None, seconds=0.0)

    ids = [put(registry, i) for i in range(6)]
    registry.artifacts.remove(key.digest for key in keys)
    last = ids.index(max(ids))
    told: list[Path] = []

    def tell(path: Path, size: int) -> None:
        if path.suffix == ".json" and not told:
            told.append(path)
            put(other, last)

    collect(registry, grace=0, tell=tell)
    assert told
    assert registry.store.has(ids[last])
    registry.artifacts.load(ids[last])
    assert broken_rules(registry) == []


def test_what_came_back_and_went_again_is_doomed_again(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "r")
    for _ in range(3):
        key = Key(KEY, "f", {}, {})
        manifest_id = registry.artifacts.put(key, {"a": torch.ones(9)}, version=None, seconds=0.0)
        assert registry.store.has(manifest_id)
        registry.artifacts.remove([KEY])
        assert broken_rules(registry) == []
        collect(registry)
        assert registry.store.has(manifest_id)
        collect(registry, now=time.time() + 2 * GRACE)
        assert not registry.store.has(manifest_id)
        assert broken_rules(registry) == []
    registry.catalog.close()


def test_equal_versions_of_one_instant_are_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("registry.checkpoints.saving.now", lambda: AT)
    registry = Registry(tmp_path / "r")
    assert [registry.save("net", {"model": state(1)}).name for _ in range(3)] == [
        "net:v1",
        "net:v2",
        "net:v3",
    ]
    assert len({version.id for version in all_versions(registry)}) == 3
    assert broken_rules(registry) == []
