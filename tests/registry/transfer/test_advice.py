"""Advice: what a plan leaves to train, and which of the four cases it is."""

from __future__ import annotations

import pytest

from registry import plan_transfer
from registry.models import LeNet5, LeNet6
from registry.transfer.advice import Counts, advise


def test_the_head_is_what_was_not_loaded() -> None:
    counts = Counts.of(plan_transfer(LeNet5(), LeNet6(), everything=True))
    assert counts == Counts(trainable=66_946, head=6_090, layers=6, is_new=True)
    advice = advise(counts, samples=60, similar=True)
    assert (advice.case, advice.option) == ("small and similar", "--freeze loaded")
    assert (advice.per_sample_all, advice.per_sample_head) == (66_946 / 60, 101.5)


def test_the_head_is_the_last_layer_where_everything_was_loaded() -> None:
    counts = Counts.of(plan_transfer(LeNet5(), LeNet5(), everything=True))
    assert counts == Counts(trainable=61_706, head=850, layers=5, is_new=False)
    assert advise(counts, samples=60, similar=True).option == "--freeze first:-1"


@pytest.mark.parametrize(
    ("samples", "similar", "case", "option"),
    [
        (609, True, "small and similar", "--freeze loaded"),
        (610, True, "large and similar", ""),
        (609, False, "small and different", "--freeze first:2"),
        (610, False, "large and different", ""),
    ],
)
def test_ten_samples_for_a_thousand_parameters_are_where_much_data_begins(
    samples: int, similar: bool, case: str, option: str
) -> None:
    counts = Counts(trainable=61_000, head=850, layers=5, is_new=True)
    advice = advise(counts, samples=samples, similar=similar)
    assert (advice.case, advice.option) == (case, option)
