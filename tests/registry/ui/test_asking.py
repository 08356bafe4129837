"""Asking the worker, and what it answered before."""

from __future__ import annotations

import contextlib
import threading

import pytest

from registry import Registry
from registry.store.errors import NotFound
from registry.ui.asking import Asking


def test_an_answer_that_is_kept_waits_for_no_other_one(
    filled: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    with contextlib.closing(Asking(filled.place)) as asking:
        known = asking.ask("known", a="net:v1", b="net:v2")
        begun, may_end = threading.Event(), threading.Event()

        def slow(request: object) -> dict[str, object]:
            begun.set()
            may_end.wait(30)
            return {"made": request}

        monkeypatch.setattr(asking, "_asked", slow)
        other = threading.Thread(target=asking.ask, args=("other",), kwargs={"a": "net:v1", "b": "net:v3"})
        other.start()
        assert begun.wait(30)
        found: list[object] = []
        again = threading.Thread(target=lambda: found.append(asking.ask("known", a="net:v1", b="net:v2")))
        again.start()
        again.join(10)
        before_the_other = list(found)
        may_end.set()
        other.join()
        again.join()
        assert before_the_other == [known]


def test_what_two_ask_at_a_time_is_made_once(filled: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    with contextlib.closing(Asking(filled.place)) as asking:
        made: list[object] = []
        monkeypatch.setattr(asking, "_asked", lambda request: made.append(request) or {"made": len(made)})
        threads = [threading.Thread(target=asking.ask, args=("key",), kwargs={"a": "x"}) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(made) == 1


def test_an_error_is_asked_for_again(filled: Registry) -> None:
    with contextlib.closing(Asking(filled.place)) as asking:
        for _ in range(2):
            with pytest.raises(NotFound):
                asking.ask("key", of="net:v1", path="model/none")
