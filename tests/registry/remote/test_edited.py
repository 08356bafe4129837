"""Buckets and folders that somebody has edited, put back or damaged, and entries that no sound program writes: nothing is
written, or what is wrong is left out, on all hosts alike."""

from __future__ import annotations

import contextlib
import random
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hosts import Team, entries_of, save, value

from registry import Registry
from registry.log import entries
from registry.log.entries import Entry
from registry.remote.bucket import Held
from registry.remote.shared_log import packed
from registry.store.digest import digest
from registry.store.errors import Corrupt, Unsupported

# Its folders cannot be opened without the bucket that they belong to.
pytestmark = [pytest.mark.damages, pytest.mark.usefixtures("asks_at_once")]


def key_of(seq: int) -> str:
    return f"journal/{seq:016d}.zst"


def objects(team: Team) -> dict[str, bytes]:
    """Everything in the bucket."""
    found = [held.key for folder in ("journal", "packs") for held in team.bucket.list(folder)]
    return {key: (team.bucket.root / key).read_bytes() for key in found}


# -- the log -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("missing", "names"), [([1], "c"), ([3], "c"), ([2, 3], "c"), ([4], "bc")])
def test_an_entry_that_is_missing_before_others_is_noticed_and_nothing_written(
    team: Team, missing: list[int], names: str
) -> None:
    """By a host that knows the three entries before, and by one that knows none."""
    a, b = team.host("a"), team.host("b")
    save(a, 1)
    save(a, 2)
    assert value(b, "net:v2") == 2
    for number in (3, 4):
        save(a, number)
    team.bucket.delete([key_of(seq) for seq in missing])
    before = objects(team)
    for name in names:
        with pytest.raises(Corrupt, match=r"history of the registry changed: entry \d is missing there"):
            save(team.host(name), 5)
    assert {key for key in objects(team) if key.startswith("journal")} == {
        key for key in before if key.startswith("journal")
    }
    assert value(team.host("b"), "net:v2") == 2


@pytest.mark.parametrize("seed", range(3))
def test_a_listing_that_is_incomplete_late_or_unordered_costs_time_alone(team: Team, seed: int) -> None:
    chance = random.Random(seed)
    a = team.host("a")
    for number in range(1, 13):
        save(a, number)
    a.remove(["net:v3"])

    def sees(held: Iterable[Held]) -> Iterable[Held]:
        shown = [one for one in held if chance.random() < 0.6]
        chance.shuffle(shown)
        return shown

    b = team.host("b", sees=sees)
    assert value(b, "net:v12") == 12
    save(b, 13)
    b.collect_garbage(grace=0)
    a.collect_garbage(grace=0)
    team.check({f"net:v{number}": number for number in range(1, 14) if number != 3})


@pytest.mark.parametrize("old", [False, True])
def test_a_folder_of_a_host_that_is_lost_or_older_catches_up(team: Team, old: bool) -> None:
    a, b = team.host("a"), team.host("b")
    save(a, 1)
    shutil.copytree(team.home("a"), team.home("a").with_name("older"))
    save(a, 2)
    b.remove(["net:v1"])
    b.collect_garbage(grace=0)
    save(b, 3)
    a.catalog.close()
    shutil.rmtree(team.home("a"))
    if old:
        shutil.move(team.home("a").with_name("older"), team.home("a"))
    save(team.host("a"), 4)
    team.check({"net:v2": 2, "net:v3": 3, "net:v4": 4})


@pytest.mark.parametrize("count", [1, 5])
def test_a_folder_of_a_host_that_is_of_another_registry_is_refused(
    team: Team, tmp_path: Path, count: int
) -> None:
    other = Team(tmp_path / "other")
    for number in (1, 2):
        save(team.host("a"), number)
    for number in range(count):
        save(other.host("a"), number)
    (folder,) = team.home("a").glob("torch-registry/*")
    (its,) = other.home("a").glob("torch-registry/*")
    shutil.rmtree(its)
    shutil.copytree(folder, its)
    before = objects(other)
    with pytest.raises(Corrupt, match="history of the registry changed"):
        save(other.host("a"), 9)
    assert {key for key in objects(other) if "journal" in key} == {key for key in before if "journal" in key}
    other.check(names="b")


# -- packs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["flip the head", "flip a tensor", "short", "other", "empty"])
def test_a_pack_that_was_changed_is_refused_and_not_kept(team: Team, damage: str) -> None:
    a = team.host("a")
    for number in (1, 2):
        save(a, number)
    (bad,) = {
        place.pack
        for place in a.catalog.locate([p[3] for p in a["net:v2"].parameters() if p[0] == "model/w"]).values()
    }
    key = f"packs/{bad[:2]}/{bad}.safetensors"
    path = team.bucket.root / key
    good = path.read_bytes()
    (other,) = [text for one, text in objects(team).items() if one.startswith("packs") and one != key]
    path.chmod(0o600)
    path.write_bytes(
        {
            "flip the head": good[:30] + bytes([good[30] ^ 1]) + good[31:],
            "flip a tensor": good[:-3] + bytes([good[-3] ^ 1]) + good[-2:],
            "short": good[:-5],
            "other": other,
            "empty": b"",
        }[damage]
    )
    b = team.host("b")
    with pytest.raises(Corrupt, match=bad[:12]) as caught:
        b["net:v2"].load()
    assert "\n" not in str(caught.value)
    assert value(b, "net:v1") == 1
    path.write_bytes(good)
    assert value(team.host("b"), "net:v2") == 2
    team.check({"net:v1": 1, "net:v2": 2})


# -- entries that no sound program writes ------------------------------------------------------------------


def last_of(registry: Registry) -> Entry:
    registry.catalog.commit(lambda view: [])
    return [item.entry for item in registry.catalog.journal.read() if item.entry][-1]


def add(team: Team, registry: Registry, records: list[dict[str, Any]], headers: Any = ()) -> None:
    """Put an entry into the bucket that no program checks."""
    last = last_of(registry)
    entry = entries.write(last.seq + 1, last.digest, records)
    assert team.bucket.create(key_of(entry.seq), packed(entry, headers))


@pytest.mark.parametrize(
    "records",
    [
        [{"op": "alias", "model": "net", "alias": "../../x", "id": "a" * 64, "was": None}],
        [{"op": "publish", "id": "../" * 20, "model": "net", "version": 2}],
        [{"op": "publish", "id": "a" * 64, "model": "net", "version": 2, "manifest": "{}"}],
        [{"op": "pack", "digest": "../../../etc", "size": 99}],
        [{"op": "doom", "packs": ["x"], "manifests": []}],
        [{"op": "later"}],
        "too many",
    ],
)
def test_an_entry_that_no_program_writes_is_refused_by_all_hosts_alike(team: Team, records: Any) -> None:
    a = team.host("a")
    save(a, 1)
    assert value(team.host("b"), "net") == 1
    if records == "too many":
        last = last_of(a)
        record = {"op": "tag", "id": a["net"].id, "tag": "x"}
        text = entries.json.dumps(
            {
                "seq": last.seq + 1,
                "at": last.at,
                "prev": last.digest,
                "nonce": "0" * 32,
                "records": [record] * 150_000,
            }
        ).encode()
        line = b"%s\t%s\n" % (text, digest(text).encode())
        assert team.bucket.create(key_of(last.seq + 1), zstandard.compress(line + b"[]"))
    else:
        add(team, a, records)
    before = objects(team)
    with pytest.raises((Corrupt, Unsupported), match=r"[0-9]{16}\.zst|upgrade with"):
        team.host("new")
    for name in "ab":
        host = team.host(name)
        assert value(host, "net") == 1
        with pytest.raises((Corrupt, Unsupported), match=r"[0-9]{16}\.zst|upgrade with"):
            save(host, 2)
        with contextlib.suppress(Corrupt, Unsupported):
            host.collect_garbage(grace=3600)
    after = objects(team)
    assert before.items() <= after.items()
    assert {key for key in after if "journal" in key} == {key for key in before if "journal" in key}


@pytest.mark.parametrize("kind", ["bomb", "no size", "lies", "junk"])
def test_an_entry_that_unpacks_to_more_than_it_may_is_refused_before_memory_is_taken(
    team: Team, kind: str
) -> None:
    a = team.host("a")
    save(a, 1)
    assert value(team.host("b"), "net") == 1
    zeros = bytes(1 << 20)
    if kind == "no size":
        packer = zstandard.ZstdCompressor(write_content_size=False).compressobj()
        data = b"".join(packer.compress(zeros) for _ in range(300)) + packer.flush()
    elif kind == "junk":
        data = random.Random(1).randbytes(1000)
    else:
        packer = zstandard.ZstdCompressor().compressobj(size=300 << 20)
        data = b"".join(packer.compress(zeros) for _ in range(300)) + packer.flush()
        if kind == "lies":
            # The size that the frame states follows its magic number and descriptor.
            at = data.index((300 << 20).to_bytes(4, "little"))
            data = data[:at] + (1000).to_bytes(4, "little") + data[at + 4 :]
    team.bucket.create(key_of(last_of(a).seq + 1), data)
    for name in "ab":
        assert value(team.host(name), "net") == 1
        with pytest.raises(Corrupt, match=r"[0-9]{16}\.zst: .*; nothing is written"):
            save(team.host(name), 2)


@pytest.mark.parametrize(
    "records",
    [
        [{"op": "tag", "id": "a" * 64, "tag": "x"}],
        [{"op": "alias", "model": "net", "alias": "x", "id": "a" * 64, "was": None}],
        [{"op": "doom", "packs": ["a" * 64], "manifests": []}],
        "doom a manifest",
        "a number again",
    ],
)
def test_an_entry_that_contradicts_those_before_has_no_effect_on_any_host_and_is_named(
    team: Team, records: Any
) -> None:
    a = team.host("a")
    save(a, 1)
    if records == "doom a manifest":
        records = [{"op": "doom", "packs": [], "manifests": [a["net"].id]}]
    if records == "a number again":
        records = [{"op": "publish", "id": "b" * 64, "model": "net", "version": 1}]
    # The whole entry has none.
    add(team, a, [{"op": "note", "id": a["net"].id, "at": entries.now(), "text": "x"}, *records])
    seen = []
    for name in "abc":
        host = team.host(name)
        assert value(host, "net") == 1
        assert host["net"].notes == ()
        (problem,) = host.verify().problems
        assert "of the log, written" in problem.message
        assert "has no effect" in problem.message
        seen.append(entries_of(host))
    assert seen[0] == seen[1] == seen[2]
    save(team.host("a"), 2)
    assert value(team.host("b"), "net:v2") == 2


@pytest.mark.parametrize("op", ["doom", "replace"])
def test_an_entry_that_takes_away_a_pack_that_is_needed_is_taken_in_by_no_host(team: Team, op: str) -> None:
    a = team.host("a")
    for number in (1, 2):
        save(a, number)
    a.remove(["net:v1"])
    a.collect_garbage(grace=0)
    save(a, 3)
    assert value(team.host("b"), "net:v3") == 3
    packs = [row[0] for row in a.catalog.query("SELECT digest FROM packs ORDER BY number")]
    record = {
        "doom": {"op": "doom", "packs": packs[:1], "manifests": []},
        "replace": {"op": "replace", "old": packs[0], "new": packs[1]},
    }[op]
    note = {"op": "note", "id": a["net:v3"].id, "at": entries.now(), "text": "x"}
    add(team, a, [note, record])
    bad = last_seq = len([*team.bucket.list("journal")])
    before = objects(team)
    with pytest.raises(Corrupt, match=f"entry {bad} of the log is not sound: .* needs? pack {packs[0][:12]}"):
        team.host("new")
    for name in "ab":
        host = team.host(name)
        with pytest.raises(Corrupt, match=f"entry {bad} of the log is not sound"):
            save(host, 4)
        with contextlib.suppress(Corrupt):
            host.collect_garbage(grace=0)
        assert [value(host, f"net:v{number}") for number in (2, 3)] == [2, 3]
        assert host["net:v3"].notes == ()
    assert {key for key in before if key.startswith("packs/")} >= {
        f"packs/{pack[:2]}/{pack}.safetensors" for pack in packs
    }
    assert before.items() <= objects(team).items()
    team.bucket.delete([key_of(last_seq)])
    save(team.host("b"), 4)
    team.check({"net:v2": 2, "net:v3": 3, "net:v4": 4})


def test_a_registry_of_a_newer_format_is_refused(team: Team) -> None:
    save(team.host("a"), 1)
    path = team.bucket.root / "registry.toml"
    path.chmod(0o600)
    path.write_text("format = 3\n")
    before = objects(team)
    with pytest.raises(Unsupported, match=r"has format 3, .* upgrade with"):
        team.host("b")
    assert objects(team) == before
