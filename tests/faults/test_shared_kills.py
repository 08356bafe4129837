"""Processes that change a shared registry are killed at each request to the bucket: a few in the suite, all in a soak."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hosts import Team, save
from support import fork, kill_me, wait

from registry import Registry

MOMENTS = 4
"""Moments at which the suite kills a process of each kind."""


@pytest.fixture
def team(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Team:
    # It is changed by `Team.host`, and put back behind the test.
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    return Team(tmp_path / "team")


def save_another(registry: Registry) -> None:
    save(registry, 3)


def push(registry: Registry) -> None:
    Registry(os.environ["LOCAL"]).copy_to(registry)


def remove_and_collect(registry: Registry) -> None:
    if "net:v1" in [version.name for version in registry.versions("net")]:
        registry.remove(["net:v1"])
    registry.collect_garbage(grace=0)


def compact(registry: Registry) -> None:
    registry.compact()
    registry.collect_garbage(grace=0)


def chosen(moments: int) -> Sequence[int]:
    return range(moments) if "SOAK_SECONDS" in os.environ else random.sample(range(moments), MOMENTS)


@pytest.mark.damages  # its folders cannot be opened without the bucket
@pytest.mark.parametrize("change", [save_another, push, remove_and_collect, compact])
def test_a_process_killed_at_a_request_loses_nothing_and_is_repeated(
    tmp_path: Path, team: Team, monkeypatch: pytest.MonkeyPatch, change: Callable[[Registry], None]
) -> None:
    monkeypatch.setenv("LOCAL", str(tmp_path / "local"))
    local = Registry(tmp_path / "local")
    ids = {save(local, number, "other"): local[f"other:v{number}"].id for number in (1, 2)}
    local.set_tag("other:v1", "kept")
    for number in (1, 2):
        save(team.host("a"), number)
    save(team.host("b"), 9, "second")
    moments: list[int] = []
    with team.kept():
        change(team.host("a", at=lambda number, what, key: moments.append(number)))
    for moment in chosen(len(moments)):

        def at(number: int, what: str, key: str, moment: int = moment) -> None:
            if number == moment:
                kill_me()

        with team.kept():
            assert wait(fork(lambda at=at: change(team.host("a", at=at)))) == -signal.SIGKILL, moment
            team.check(names="b")
            change(team.host("a"))
            team.host("b").collect_garbage(grace=0)
            team.check()
            packs = {row[0] for row in team.host("a").catalog.query("SELECT digest FROM packs")}
            assert {held.key[-76:-12] for held in team.bucket.list("packs")} == packs
            there = {version.name: version for version in team.host("b").versions()}
            assert {"second:v1", "net:v2"} <= there.keys()
            if change is push:
                assert {name: version.id for name, version in there.items() if name in ids} == ids
                assert there["other:v1"].tags == ("kept",)
