"""What may go wrong between hosts: crashes, races, edited buckets, hostile entries. Each time every host sees the same in
the end, numbers are dense, what was acknowledged loads, and `verify` finds nothing."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hosts import Team, save, state, value
from support import fork, wait

from registry import Registry
from registry.catalog.versions import Version
from registry.log import entries
from registry.remote import shared_log
from registry.remote.bucket import Unreachable
from registry.store import durable
from registry.store.errors import NotFound, StorageError
from registry.upkeep.copying import Copied, Removed, copy_pending

pytestmark = [pytest.mark.damages, pytest.mark.usefixtures("asks_at_once")]
"""Its folders cannot be opened without the bucket that they belong to."""


# -- races ---------------------------------------------------------------------------------------------------


def stopped_at(team: Team, moment: str, folder: str, run: Callable[[Registry], object]) -> int:
    """Start a process that stops at a request of a host, and wait until it has."""

    def at(number: int, what: str, key: str) -> None:
        if what == moment and key.startswith(folder) and not stopped:
            stopped.append(True)
            os.kill(os.getpid(), signal.SIGSTOP)

    stopped: list[bool] = []
    pid = fork(lambda: run(team.host("a", at=at)))
    _, status = os.waitpid(pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    return pid


def goes_on(pid: int) -> int:
    os.kill(pid, signal.SIGCONT)
    return wait(pid)


def test_a_save_that_sleeps_after_its_upload_while_gc_runs_twice_writes_its_pack_again(team: Team) -> None:
    save(team.host("a"), 1)
    pid = stopped_at(team, "before create", "journal", lambda registry: save(registry, 2))
    uploaded = {held.key for held in team.bucket.list("packs")}
    for _ in range(2):
        team.host("b").collect_garbage(grace=0)
    assert len([*team.bucket.list("packs")]) == 1
    assert goes_on(pid) == 0
    assert len({held.key for held in team.bucket.list("packs")} - uploaded) == 1
    team.check({"net:v1": 1, "net:v2": 2})


def test_equal_tensors_saved_while_their_pack_is_being_deleted_get_a_new_one(team: Team) -> None:
    a = team.host("a")
    for number in (1, 2):
        save(a, number)
    a.remove(["net:v2"])
    dead: set[str] = set()

    def at(number: int, what: str, key: str) -> None:
        if what == "before delete" and not dead:
            dead.add(key)
            save(a, 2)

    team.host("b", at=at).collect_garbage(grace=0)
    assert dead
    assert dead.isdisjoint(held.key for held in team.bucket.list("packs"))
    team.check({"net:v1": 1, "net:v3": 2})


def test_two_collections_at_once(team: Team) -> None:
    a = team.host("a")
    for number in (1, 2, 3):
        save(a, number)
    a.remove(["net:v1", "net:v3"])
    other = team.host("b")

    def at(number: int, what: str, key: str) -> None:
        if what == "before delete":
            other.collect_garbage(grace=0)

    team.host("c", at=at).collect_garbage(grace=0)
    assert len([*team.bucket.list("packs")]) == 2
    team.check({"net:v2": 2})


def test_an_upload_that_ends_after_its_pack_was_deleted_is_deleted_again(team: Team) -> None:
    save(team.host("a"), 1)
    pid = stopped_at(team, "after put", "packs", lambda registry: save(registry, 2))
    names = {held.key for held in team.bucket.list("packs")}
    copies = {key: (team.bucket.root / key).read_bytes() for key in names}
    team.host("b").collect_garbage(grace=0)
    (dead,) = names - {held.key for held in team.bucket.list("packs")}
    (team.folder / "late").write_bytes(copies[dead])
    team.bucket.put_file(dead, team.folder / "late")
    assert goes_on(pid) == 0
    team.host("b").collect_garbage(grace=0)
    assert dead not in {held.key for held in team.bucket.list("packs")}
    team.check({"net:v1": 1, "net:v2": 2})


def test_a_name_that_another_host_has_made_a_moment_ago_is_found(
    team: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_log, "_REFRESH", 3600.0)
    a, b = team.host("a"), team.host("b")
    save(a, 1)
    assert len(b.versions("net")) == 1
    save(a, 2)
    a.set_alias("net:v2", "production")
    assert len(b.versions("net")) == 1  # as nobody asks yet
    assert b["net@production"].name == "net:v2"
    assert "net:v3" not in b
    assert len(b.versions("net")) == 2


def test_a_version_that_is_removed_and_collected_while_it_is_loaded_is_not_there(
    team: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_log, "_REFRESH", 3600.0)
    a = team.host("a")
    for number in (1, 2):
        save(a, number)

    def at(number: int, what: str, key: str) -> None:
        with reading:
            if what == "before get" and key.startswith("packs") and not done:
                done.append(True)
                a.remove(["net:v2"])
                a.collect_garbage(grace=0)

    # Packs come side by side.
    done, reading = list[bool](), threading.Lock()
    with pytest.raises(NotFound, match="net:v2 was removed while it was read"):
        team.host("b", at=at)["net:v2"].load()
    team.check({"net:v1": 1})


def test_a_version_that_is_compacted_while_it_is_loaded_is_read_at_its_new_place(
    team: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_log, "_REFRESH", 3600.0)
    a = team.host("a")
    for number in (1, 2, 3):
        a.save("net", state(number, 50_000), epoch=number)
    done, reading = list[bool](), threading.Lock()

    def at(number: int, what: str, key: str) -> None:
        with reading:
            if what == "before get" and key.startswith("packs") and not done:
                done.append(True)
                a.compact()
                a.collect_garbage(grace=0)

    before = {held.key for held in team.bucket.list("packs")}
    assert value(team.host("b", at=at), "net:v1") == 1
    assert done
    assert {held.key for held in team.bucket.list("packs")} != before
    team.check({f"net:v{number}": number for number in (1, 2, 3)})


def test_verify_beside_a_collection_of_another_host_raises_no_alarm(
    team: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_log, "_REFRESH", 3600.0)
    a = team.host("a")
    for number in (1, 2):
        save(a, number)
    done: list[bool] = []

    def at(number: int, what: str, key: str) -> None:
        if what == "before list" and key == "packs" and not done:
            done.append(True)
            a.remove(["net:v2"])
            a.collect_garbage(grace=0)

    assert team.host("b", at=at).verify().problems == ()
    assert done
    team.check({"net:v1": 1})


@pytest.mark.parametrize("references", [[], ["net:v1"]])
def test_a_store_that_does_not_answer_is_no_damage(team: Team, references: list[str]) -> None:
    save(team.host("a"), 1)

    def at(number: int, what: str, key: str) -> None:
        if key.startswith("packs"):
            raise Unreachable("the store does not answer; repeat")

    b = team.host("b", at=at)
    before = len([*team.bucket.list("journal")])
    with pytest.raises(StorageError, match="does not answer"):
        b.verify(references)
    assert len([*team.bucket.list("journal")]) == before
    team.check({"net:v1": 1})


# -- disks and clocks --------------------------------------------------------------------------------------


class Full(durable.Disk):
    """A disk without room."""

    def write(self, fd: int, path: Path, data: memoryview) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


@pytest.mark.parametrize("moment", ["before create", "after create"])
def test_a_disk_that_is_full_at_the_commit_loses_nothing(
    team: Team, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    save(team.host("a"), 1)
    with monkeypatch.context() as patch:

        def at(number: int, what: str, key: str) -> None:
            if what == moment and key.startswith("journal"):
                patch.setattr(durable, "disk", Full())

        a = team.host("a", at=at)
        if moment == "after create":
            # It has happened, for all hosts.
            assert save(a, 2) == "net:v2"
        else:
            with pytest.raises(StorageError, match="no space left on the device"):
                save(a, 2)
    number = len(team.host("b").versions("net")) + 1
    save(team.host("a"), number)
    team.check({f"net:v{one}": one for one in range(1, number + 1)})
    assert number == (3 if moment == "after create" else 2)


@pytest.mark.parametrize("years", [1, -1])
def test_a_host_whose_clock_is_a_year_off_takes_nothing_from_others(
    team: Team, monkeypatch: pytest.MonkeyPatch, years: int
) -> None:
    a = team.host("a")
    for number in (1, 2):
        save(a, number)
    a.remove(["net:v2"])
    pid = stopped_at(team, "before create", "journal", lambda registry: save(registry, 3))
    clock, seconds = time.time, years * 365 * 86_400.0
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: clock() + seconds)
        patch.setattr(
            entries, "now", lambda: datetime.fromtimestamp(time.time(), UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        )
        b = team.host("b")
        # The upload of another host is young by the store's clock, whatever this one says.
        b.collect_garbage(grace=3600)
        save(b, 4)
    assert goes_on(pid) == 0
    assert len({held.key for held in team.bucket.list("packs")}) >= 3
    team.host("a").collect_garbage(grace=0)
    packs = {row[0] for row in team.host("a").catalog.query("SELECT digest FROM packs")}
    assert {held.key[-76:-12] for held in team.bucket.list("packs")} == packs
    team.check({"net:v1": 1, "net:v3": 4, "net:v4": 3})


# -- copies ------------------------------------------------------------------------------------------------


def beside(team: Team, folder: Path) -> tuple[Registry, Version]:
    """A folder's registry with one version, which will be the second one of a model that the team has."""
    save(team.host("a"), 1)
    registry = Registry(folder / "beside")
    save(registry, 2)
    (version,) = registry.versions("net")
    return registry, version


@pytest.mark.parametrize("is_waiting", [False, True])
def test_a_version_that_is_copied_twice_at_the_same_instant_is_one_version(
    team: Team, tmp_path: Path, is_waiting: bool
) -> None:
    local, version = beside(team, tmp_path)
    done: list[Sequence[Copied]] = []

    def at(number: int, what: str, key: str) -> None:
        if what == "before create" and key.startswith("journal") and not done:
            done.append(())
            done[:] = [local.copy_to(team.host("b"))]

    host = team.host("a", at=at)
    if is_waiting:
        copied = copy_pending(local, host, version, lambda view: [])
    else:
        (copied,) = local.copy_to(host)
    assert [copied.id] == [other.id for (other,) in done] == [version.id]
    assert copied.target == "net:v2"
    team.check({"net:v1": 1, "net:v2": 2})


def test_versions_that_are_copied_twice_or_by_two_at_once_are_there_once(team: Team, tmp_path: Path) -> None:
    local = Registry(tmp_path / "local")
    for number in (1, 2):
        save(local, number)
    save(team.host("a"), 7)
    ids = [local[f"net:v{number}"].id for number in (1, 2)]
    children = [fork(lambda name=name: Registry(local.root).copy_to(team.host(name))) for name in "ab"]
    assert [wait(pid) for pid in children] == [0, 0]
    again = local.copy_to(team.host("c"))
    assert [copied.is_new for copied in again] == [False, False]
    # The same name, and another id: the registry there gives the number.
    assert {copied.source: copied.id for copied in again} == dict(zip(["net:v1", "net:v2"], ids, strict=True))
    assert sorted(copied.target for copied in again) == ["net:v2", "net:v3"]
    numbers = {copied.target: int(copied.source[-1]) for copied in again}
    team.check({"net:v1": 7, **numbers})


@pytest.mark.parametrize("is_collected", [False, True])
def test_what_waited_in_an_outbox_does_not_come_back_once_it_was_shared_and_removed(
    team: Team, tmp_path: Path, is_collected: bool
) -> None:
    waiting, version = beside(team, tmp_path)
    done: list[bool] = []

    def at(number: int, what: str, key: str) -> None:
        if what == "before create" and key.startswith("journal") and not done:
            done.append(True)
            b = team.host("b")
            assert copy_pending(waiting, b, version, lambda view: []).target == "net:v2"
            b.remove(["net:v2"])
            if is_collected:
                b.collect_garbage(grace=0)

    with pytest.raises(Removed):
        copy_pending(waiting, team.host("a", at=at), version, lambda view: [])
    team.check({"net:v1": 1})


def test_a_version_that_was_removed_and_collected_comes_back_when_it_is_copied_again(
    team: Team, tmp_path: Path
) -> None:
    local = Registry(tmp_path / "local")
    save(local, 1)
    a, b = team.host("a"), team.host("b")
    local.copy_to(a)
    a.remove(["net:v1"])
    a.collect_garbage(grace=0)
    (copied,) = local.copy_to(b)
    assert (copied.is_new, copied.target, copied.id) == (True, "net:v2", local["net:v1"].id)
    a.collect_garbage(grace=0)
    team.check({"net:v2": 1})
