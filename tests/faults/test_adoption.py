"""Adoption: what both the log and the catalog have lost is named, and what lies there is taken in, whatever comes between."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from support import all_versions, collect, fork, in_child, is_state, kill_me, save, state, wait

from registry import Registry
from registry.catalog.catalog import Catalog
from registry.log import entries, history, journal
from registry.log.entries import Entry
from registry.log.journal import Journal, Position
from registry.store.errors import Corrupt


def lose_catalog(root: Path) -> None:
    for path in root.glob("catalog.sqlite*"):
        path.unlink()


def keep_catalog(registry: Registry) -> dict[str, bytes]:
    """The catalog's files as they are now, with everything in them."""
    registry.catalog.close()
    return {path.name: path.read_bytes() for path in registry.root.glob("catalog.sqlite*")}


def put_back(root: Path, files: dict[str, bytes]) -> None:
    lose_catalog(root)
    for name, data in files.items():
        (root / name).write_bytes(data)


def damage(root: Path, *numbers: int) -> None:
    """Flip a bit in some lines of the log, by their number from 0 on."""
    (segment,) = root.glob("journal/*.log")
    lines = segment.read_bytes().splitlines(keepends=True)
    for number in numbers:
        line = bytearray(lines[number])
        line[len(line) // 2] ^= 1
        lines[number] = bytes(line)
    segment.write_bytes(b"".join(lines))


def killed_behind(count: int) -> None:
    """In this process: the end, once the log has got so many entries more."""
    append, calls = Journal.append, itertools.count(1)

    def counted(self: Journal, entry: Entry, end: Position) -> Position:
        found = append(self, entry, end)
        if next(calls) == count:
            kill_me()
        return found

    Journal.append = counted  # type: ignore[method-assign]


def names(registry: Registry) -> list[str]:
    return sorted(version.name for version in all_versions(registry))


def test_what_is_adopted_may_be_more_than_an_entry_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Registry(tmp_path / "r")
    for number in range(6):
        registry.save("net", state(number), meta={"log": "x" * 1000})
    registry.set_alias("net:v2", "prod")
    registry.catalog.close()
    for path in (*registry.root.glob("catalog.sqlite*"), *(registry.root / "journal").glob("*.log")):
        path.unlink()
    monkeypatch.setattr(entries, "MAX_LINE", 9_000)
    monkeypatch.setattr(entries, "_PART", 2_000)
    registry = Registry(registry.root)
    rebuilt = registry.rebuild(adopt=True)
    assert len(rebuilt.adopted) == 6
    assert registry.catalog.ledger().seq > 2
    assert registry.verify().problems == ()
    for number in range(6):
        assert is_state(registry[f"net:v{number + 1}"].load(), number)
    assert registry.rebuild(adopt=True).adopted == ()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_an_adoption_that_was_killed_between_its_entries_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """Until the last of its entries is there, the log has a gap: gc deletes nothing, and names wait for their versions."""
    registry = Registry(tmp_path / "r")
    for number in range(5):
        registry.save("net", state(number), meta={"log": "x" * 1000})
    for number in range(5):
        registry.set_alias(f"net:v{number + 1}", f"a{number + 1}")
        registry.set_tag(f"net:v{number + 1}", "good")
        registry.add_note(f"net:v{number + 1}", f"note {number}")
    registry.catalog.close()
    for path in registry.root.glob("catalog.sqlite*"):
        path.unlink()
    (segment,) = (registry.root / "journal").glob("*.log")
    lines = segment.read_bytes().splitlines(keepends=True)
    segment.write_bytes(b"".join(line.replace(b'"op":"publish"', b'"op":"pubXish"') for line in lines))
    monkeypatch.setattr(entries, "_PART", 2_000)

    def killed() -> None:
        killed_behind(count)
        Registry(registry.root).rebuild(adopt=True)

    assert in_child(killed) == -signal.SIGKILL
    registry = Registry(registry.root)
    if registry.catalog.gaps():
        with pytest.raises(Corrupt, match="--adopt"):
            collect(registry, grace=0)
    registry.rebuild(adopt=True)
    collect(registry, grace=0)
    assert registry.verify().problems == ()
    for number in range(5):
        version = registry[f"net@a{number + 1}"]
        assert version.name == f"net:v{number + 1}"
        assert is_state(version.load(), number)
        assert version.tags == ("good",)
        assert [text for _, text in version.notes] == [f"note {number}"]


@pytest.mark.parametrize("killed", [1, 2, 3])
def test_a_save_between_an_adoption_that_was_killed_and_its_repetition_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: int
) -> None:
    """Nothing is damaged: an older log was put back, and the catalog was deleted."""
    registry = Registry(tmp_path / "r")
    for number in range(2):
        save(registry, number)
    (segment,) = registry.root.glob("journal/*.log")
    old = segment.read_bytes()
    for number in range(2, 8):
        registry.save("net", state(number), meta={"log": "x" * 1000})
    registry.catalog.close()
    segment.write_bytes(old)
    lose_catalog(registry.root)
    monkeypatch.setattr(entries, "_PART", 2_000)

    def adopt() -> None:
        killed_behind(killed)
        Registry(registry.root).rebuild(adopt=True)

    assert in_child(adopt) == -signal.SIGKILL
    registry = Registry(registry.root)
    saved = save(registry, 99)
    registry.rebuild(adopt=True)
    assert registry.rebuild(adopt=True).adopted == ()
    registry.add_note(saved, "x")
    collect(registry, grace=0)
    assert registry.verify().problems == ()
    assert len(names(registry)) == 9
    assert is_state(registry[saved].load(), 99)
    found = [registry[name].load() for name in names(registry)]
    assert all(any(is_state(tree, number) for tree in found) for number in range(8))


def test_an_adoption_beside_a_save_takes_nothing_from_it(tmp_path: Path) -> None:
    """What the save has written, and not published yet, is adopted. The save then makes another version of its own."""
    registry = Registry(tmp_path / "r")
    save(registry, 0)

    def saving() -> None:
        mine = Registry(tmp_path / "r")
        commit, calls = mine.catalog.commit, itertools.count()

        def late(compute: Any) -> Any:
            if next(calls) == 0:
                adopted = Registry(tmp_path / "r")
                assert adopted.rebuild(adopt=True).adopted == ("net:v2",)
                adopted.catalog.close()
            else:
                # The next attempt never comes.
                kill_me()
            return commit(compute)

        mine.catalog.commit = late  # type: ignore[method-assign]
        save(mine, 7)

    assert in_child(saving) == -signal.SIGKILL
    assert registry.verify().problems == ()
    assert is_state(registry["net:v2"].load(), 7)


def test_the_number_of_a_version_that_was_removed_is_not_given_to_a_later_leftover(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "r")
    for number in range(3):
        save(registry, number)
    registry.remove(["net:v3"])
    collect(registry, grace=0)
    save(registry, 4)
    registry.catalog.close()

    def interrupted() -> None:
        Catalog.commit = lambda self, compute: os._exit(9)  # type: ignore[method-assign, assignment]
        save(Registry(tmp_path / "r"), 99)

    assert wait(fork(interrupted)) == 9
    lines = (tmp_path / "r/journal/0000000000000001.log").read_bytes().splitlines()
    lost = [
        i
        for i, line in enumerate(lines)
        if b'"version":3' in line or b'"op":"remove"' in line or b'"doom"' in line
    ]
    damage(tmp_path / "r", *lost)
    lose_catalog(tmp_path / "r")
    registry = Registry(tmp_path / "r")
    assert registry.rebuild(adopt=True).adopted == ("net:v5",)
    assert is_state(registry["net:v5"].load(), 99)
    assert is_state(registry["net:v4"].load(), 4)


@pytest.mark.parametrize("lost", [(-3, -2, -1), (-2, -1), (-3, -2)])
def test_what_is_lost_behind_the_end_of_an_older_catalog_is_named(
    tmp_path: Path, lost: tuple[int, ...]
) -> None:
    """The last entry, damaged in both of its places, cannot be told from one that a crash cut short."""
    registry = Registry(tmp_path / "r")
    for number in range(4):
        save(registry, number)
    old = keep_catalog(registry)
    registry = Registry(tmp_path / "r")
    for number in range(4, 6):
        save(registry, number)
    registry.catalog.close()
    damage(tmp_path / "r", *lost)
    put_back(tmp_path / "r", old)
    registry = Registry(tmp_path / "r")
    assert any("cannot be read" in problem.message for problem in registry.verify().problems)
    with pytest.raises(Corrupt, match="--adopt"):
        registry.add_note("net:v1", "x")
    with pytest.raises(Corrupt, match="--adopt"):
        collect(registry, grace=0)
    registry.rebuild(adopt=True)
    assert names(registry) == [f"net:v{number}" for number in range(1, 7)]
    for number in range(6):
        assert is_state(registry[f"net:v{number + 1}"].load(), number)
    assert registry.verify().problems == ()


def test_a_segment_that_is_lost_behind_the_end_of_an_older_catalog_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (journal, history):
        monkeypatch.setattr(module, "SEGMENT", 2_000)
    registry, root = Registry(tmp_path / "r"), tmp_path / "r"
    count, old = 0, dict[str, bytes]()
    while len(list(root.glob("journal/*.log"))) < 4:
        save(registry, count)
        count += 1
        if len(list(root.glob("journal/*.log"))) == 1:
            old = keep_catalog(registry)
            registry = Registry(root)
    registry.catalog.close()
    put_back(root, old)
    sorted(root.glob("journal/*.log"))[1].unlink()
    registry = Registry(root)
    with pytest.raises(Corrupt, match="--adopt"):
        save(registry, 99)
    registry.rebuild(adopt=True)
    assert len(names(registry)) == count
    for number in range(count):
        assert is_state(registry[f"net:v{number + 1}"].load(), number)
    save(registry, 99)
    assert registry.verify().problems == ()


@pytest.mark.parametrize("lines", [(20, 21), (39, 40), (5, 41)], ids=["middle", "end", "most"])
def test_a_block_that_cannot_be_read_costs_no_entry_that_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: tuple[int, int]
) -> None:
    """The catalog lacks the last entry, as after a kill behind the sync of the log."""
    registry, root = Registry(tmp_path / "r"), tmp_path / "r"
    for number in range(40):
        save(registry, number)
    old = keep_catalog(registry)
    registry = Registry(root)
    save(registry, 40)
    registry.catalog.close()
    (segment,) = root.glob("journal/*.log")
    starts = [0, *itertools.accumulate(map(len, segment.read_bytes().splitlines(keepends=True)))]
    bad = range(starts[lines[0]] + 10, starts[lines[1]] - 10)
    put_back(root, old)
    read, reader, damaged = os.pread, Journal._reader, segment.stat().st_ino

    def pread(fd: int, count: int, offset: int) -> bytes:
        if os.fstat(fd).st_ino == damaged and offset < bad.stop and bad.start < offset + count:
            raise OSError(5, "Input/output error")
        return read(fd, count, offset)

    class Failing:
        def readline(self, size: int) -> bytes:
            raise OSError(5, "Input/output error")

    @contextlib.contextmanager
    def failing(self: Journal, number: int, offset: int) -> Any:
        with reader(self, number, offset) as file:
            yield Failing() if os.fstat(file.fileno()).st_ino == damaged else file

    monkeypatch.setattr(os, "pread", pread)
    monkeypatch.setattr(Journal, "_reader", failing)
    monkeypatch.setattr(journal, "_BLOCK", 64)
    registry = Registry(root)
    registry.rebuild()
    monkeypatch.setattr(os, "pread", read)
    monkeypatch.setattr(Journal, "_reader", reader)
    registry = Registry(root)
    registry.rebuild(adopt=True)
    assert is_state(registry["net:v41"].load(), 40)
    assert registry.verify().problems == ()
    assert len(names(registry)) == 41
