"""The collector is off during work on many tensors alone, and on again however that ends, in forked processes too."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from registry import Registry
from registry.store import pausing
from registry.store.pausing import MANY, SMALL, collector_off, collector_paused
from registry.store.store import Store


@pytest.fixture(autouse=True)
def on_again() -> Iterator[None]:
    yield
    gc.enable()


ENOUGH = [SMALL] * MANY


def test_it_is_off_for_many_small_ones_alone_and_on_behind_the_block() -> None:
    for sizes in (ENOUGH[1:], [*ENOUGH, SMALL + 1]):
        with collector_paused(sizes):
            assert gc.isenabled()
    with collector_paused(ENOUGH):
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError), collector_paused(ENOUGH):
        _ = 1 / 0
    assert gc.isenabled()


def test_a_collector_that_is_off_stays_off() -> None:
    gc.disable()
    with collector_paused(ENOUGH):
        assert not gc.isenabled()
    assert not gc.isenabled()


def test_it_is_off_for_a_moment_whatever_is_done() -> None:
    with collector_off():
        assert not gc.isenabled()
        with collector_off():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()


def test_a_process_that_is_forked_meanwhile_collects() -> None:
    with collector_paused(ENOUGH):
        pid = os.fork()
        if not pid:
            os._exit(0 if gc.isenabled() else 1)
        assert os.waitpid(pid, 0)[1] == 0
        assert not gc.isenabled()


def test_a_process_that_is_forked_keeps_a_collector_off_that_its_parent_had_turned_off() -> None:
    gc.disable()
    pid = os.fork()
    if not pid:
        os._exit(1 if gc.isenabled() else 0)
    assert os.waitpid(pid, 0)[1] == 0


def test_a_save_of_many_tensors_is_not_looked_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states: list[bool] = []
    put = Store.put

    def putting(*given: object, **more: object) -> object:
        states.append(gc.isenabled())
        return put(*given, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(Store, "put", putting)
    monkeypatch.setattr(pausing, "MANY", 3)
    registry = Registry(tmp_path / "r")
    for count in (2, 3):
        registry.save("net", {"model": {f"{i}": torch.full((3,), count + i) for i in range(count)}})
    assert states == [True, False]
    assert gc.isenabled()
