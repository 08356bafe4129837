"""Processes that agree: on values, on errors, and on who did not come."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from together import start, together

from registry.live.ranks import Ranks, count, mine
from registry.store.errors import Incompatible, RegistryError


def test_alone_every_step_is_simply_called() -> None:
    ranks = Ranks()
    assert (count(), mine(), ranks.leads) == (1, 0, True)
    assert ranks.leader(lambda: 3, "x") == 3
    assert ranks.gather(lambda: 3, "x") == [3]
    with pytest.raises(ZeroDivisionError):
        ranks.leader(lambda: 1 // 0, "x")
    ranks.close()


class _Special(Exception):
    """Of the user's: other processes need not know the class."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__(f"{a} and {b}")


def agree() -> list[object]:
    ranks = Ranks()
    calls: list[int] = []

    def step() -> str:
        calls.append(1)
        return f"by {ranks.rank}"

    def fail(error: Exception) -> str:
        raise error

    found: list[object] = [ranks.leader(step, "a"), len(calls), ranks.gather(step, "b")]
    errors = [
        lambda: ranks.leader(lambda: fail(Incompatible("no fit")), "c"),
        lambda: ranks.leader(lambda: fail(_Special(1, 2)), "d"),
        lambda: ranks.gather(lambda: fail(Incompatible("no fit")) if ranks.rank == 2 else "", "e"),
        lambda: ranks.gather(lambda: fail(_Special(1, 2)) if ranks.rank == 1 else "", "f"),
    ]
    for attempt in errors:
        try:
            attempt()
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")
    found.append(ranks.leader(lambda: "still friends", "g"))
    ranks.close()
    return found


def test_a_value_or_an_error_of_one_reaches_all() -> None:
    results = together(3, agree)
    for rank, found in enumerate(results):
        value, calls, gathered, *errors, last = found
        assert value == "by 0"
        assert calls == (1 if rank == 0 else 0)
        assert gathered == ["by 0", "by 1", "by 2"]
        assert errors == [
            "Incompatible: no fit",
            "_Special: 1 and 2" if rank == 0 else "RuntimeError: _Special: 1 and 2",
            "Incompatible: no fit" if rank == 2 else "Incompatible: rank 2: no fit",
            "_Special: 1 and 2" if rank == 1 else "RuntimeError: _Special: 1 and 2",
        ]
        assert last == "still friends"


def one_is_late(how: str) -> object:
    rank = dist.get_rank()
    if how == "never" and rank == 1:
        time.sleep(6)
        os._exit(0)
    try:
        ranks = Ranks(timeout=3)
    except RegistryError as error:
        Path(os.environ["TOLD"], str(rank)).write_text(f"{type(error).__name__}: {error}")
        time.sleep(1)
        os._exit(0)
    ranks.gather(lambda: None, "to begin")
    if ranks.rank == 1:
        if how == "dead":
            os._exit(0)
        time.sleep(6)
        os._exit(0)
    began = time.monotonic()
    try:
        ranks.leader(lambda: None, "net/run-1: a save")
    except RegistryError as error:
        Path(os.environ["TOLD"], str(ranks.rank)).write_text(f"{type(error).__name__}: {error}")
        assert time.monotonic() - began < 20
    time.sleep(1)  # the group's messages go through rank 0
    os._exit(0)


@pytest.mark.parametrize("how", ["dead", "slow", "never"])
def test_who_does_not_come_is_named(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOLD", str(tmp_path))
    for process in start(3, one_is_late, how):
        process.wait()
    what = (
        "a run in several processes, each of which has to begin it" if how == "never" else "net/run-1: a save"
    )
    expected = f"Conflict: {what}: rank 1 did not come within 3 s, or has ended; its own messages say why"
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"0": expected, "2": expected}
