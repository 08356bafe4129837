"""Numbers of versions: none is given twice, and what a model may have lost is known."""

from __future__ import annotations

import pytest

from registry.log.numbers import Numbers
from registry.log.refusals import Refused
from registry.log.undoing import Undo


@pytest.fixture
def undo() -> Undo:
    return Undo()


def test_a_number_is_given_once_and_they_only_rise(undo: Undo) -> None:
    numbers = Numbers(undo)
    numbers.give("net", 1, is_adopted=False)
    with pytest.raises(Refused, match="net has had a version v1"):
        numbers.give("net", 1, is_adopted=False)
    numbers.go_on_at("net", 7)
    with pytest.raises(Refused, match="net has had a version v6"):
        numbers.go_on_at("net", 6)
    assert numbers.next == {"net": 7}
    assert numbers.missing == {}


def test_only_what_is_adopted_may_take_a_number_that_is_missing(undo: Undo) -> None:
    numbers = Numbers(undo)
    numbers.give("net", 5, is_adopted=False)
    assert numbers.missing == {"net": (range(1, 5),)}
    with pytest.raises(Refused):
        numbers.give("net", 3, is_adopted=False)
    numbers.give("net", 3, is_adopted=True)
    assert numbers.missing == {"net": (range(1, 3), range(4, 5))}
    for version in (1, 2, 4):
        numbers.give("net", version, is_adopted=True)
    assert numbers.missing == {}
    assert numbers.next == {"net": 6}


def test_what_was_given_since_the_beginning_is_taken_back(undo: Undo) -> None:
    numbers = Numbers(undo)
    numbers.give("net", 1, is_adopted=False)
    undo.begin()
    numbers.give("net", 4, is_adopted=False)
    numbers.give("other", 1, is_adopted=False)
    undo.take_back()
    assert numbers.next == {"net": 2}
    assert numbers.missing == {}
