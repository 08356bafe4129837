"""Finite: NaN and infinity are found wherever they are, and no number is taken for one."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator

import pytest
import torch

from registry.transfer import finite
from registry.transfer.finite import first_not_finite

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def found(*tensors: torch.Tensor) -> int | None:
    return first_not_finite(tensors, [None] * len(tensors))


@pytest.fixture(autouse=True, params=["compiled", "by torch"])
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "by torch":
        monkeypatch.setattr(finite, "any_with", None)
    elif finite.any_with is None:
        pytest.skip("no compiler built the helper")


@pytest.fixture(autouse=True)
def _no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("count", [1, 5, 4095, 4096, 4097, 20_001, 2_300_000])
def test_one_that_is_not_finite_is_found_at_any_place(dtype: torch.dtype, count: int) -> None:
    tensor = torch.ones(count, dtype=dtype)
    assert found(tensor) is None
    for place in {0, count // 2, count - 1}:
        for bad in (math.nan, -math.nan, math.inf, -math.inf):
            tensor[place] = bad
            assert found(torch.ones(3), tensor) == 1, (place, bad)
        tensor[place] = 1


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("count", [6, 5000, 600_000])
def test_the_largest_and_the_smallest_numbers_are_finite(dtype: torch.dtype, count: int) -> None:
    limits = torch.finfo(dtype)
    kinds = torch.tensor(
        [limits.max, limits.min, limits.tiny, limits.smallest_normal / 2, -0.0, 0.0], dtype=dtype
    )
    for numbers in (kinds.repeat(count // 6), kinds[:1].repeat(count), kinds[1:2].repeat(count)):
        assert found(numbers) is None


def test_small_tensors_are_told_apart_and_the_first_is_named() -> None:
    tensors = [torch.ones(100, dtype=FLOATS[i % 4]) for i in range(12_000)]
    assert found(*tensors) is None
    for place in (11_999, 7_001, 3):
        tensors[place][99] = math.inf
        assert found(*tensors) == place
        tensors[place][99] = 1


def test_other_tensors_have_no_such_numbers_and_those_in_any_order_are_looked_at() -> None:
    others = [
        torch.empty(0),
        torch.arange(5),
        torch.ones(5, dtype=torch.bool),
        torch.ones(5).to(torch.float8_e4m3fn),
        torch.tensor(1.0),
        torch._neg_view(torch.ones(5)),
        torch.ones(200, 300).T[5:, ::2],
    ]
    assert found(*others) is None
    assert found(*others, torch.tensor(math.nan)) == len(others)
    across = torch.ones(200, 300)
    across[7, 9] = math.nan
    assert found(*others, across.T[5:, ::2]) is None
    assert found(*others, across.T[5:, 1::2]) == len(others)


def test_elements_may_begin_at_any_byte() -> None:
    for dtype in FLOATS:
        shifted = torch.frombuffer(bytearray(8 * 40_000 + 1), dtype=dtype, offset=1)
        shifted.fill_(2)
        assert found(shifted) is None
        shifted[39_000] = -math.inf
        assert found(shifted) == 0
