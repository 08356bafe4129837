"""What may go wrong between hosts: crashes, races, edited buckets, hostile entries. Each time every host sees the same in
the end, numbers are dense, what was acknowledged loads, and `verify` finds nothing."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from hosts import Team, save, state, value
from support import fork, wait

from registry import Registry
from registry.remote import shared_log
from registry.store.errors import NotFound

pytestmark = pytest.mark.damages
"""Its folders cannot be opened without the bucket that they belong to."""


@pytest.fixture(autouse=True)
def asks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reader asks what other hosts have added, and each writer whether the last entry is still there."""
    monkeypatch.setattr(shared_log, "_REFRESH", 0.0)
    monkeypatch.setattr(shared_log, "_CONFIRM", 0.0)


@pytest.fixture
def team(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Team:
    # It is changed by `Team.host`, and put back behind the test.
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    return Team(tmp_path / "team")


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


def test_a_version_that_is_removed_and_collected_while_it_is_loaded_is_not_there(
    team: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_log, "_REFRESH", 3600.0)
    a = team.host("a")
    for number in (1, 2):
        save(a, number)

    def at(number: int, what: str, key: str) -> None:
        if what == "before get" and key.startswith("packs") and not done:
            done.append(True)
            a.remove(["net:v2"])
            a.collect_garbage(grace=0)

    done: list[bool] = []
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
    done: list[bool] = []

    def at(number: int, what: str, key: str) -> None:
        if what == "before get" and key.startswith("packs") and not done:
            done.append(True)
            a.compact()
            a.collect_garbage(grace=0)

    before = {held.key for held in team.bucket.list("packs")}
    assert value(team.host("b", at=at), "net:v1") == 1
    assert done
    assert {held.key for held in team.bucket.list("packs")} != before
    team.check({f"net:v{number}": number for number in (1, 2, 3)})
