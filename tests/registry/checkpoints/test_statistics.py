"""Statistics of stored tensors, against those that torch computes."""

from __future__ import annotations

import math

import pytest
import torch

from registry import Registry
from registry.checkpoints.statistics import BINS, of_tensors, statistics
from registry.store.errors import NotFound


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int16]
)
def test_they_are_what_torch_computes(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensor = (torch.randn(3, 1_000) * 5).to(dtype)
    tensor[0, :300] = torch.zeros(300).to(dtype)
    wide = tensor.to(torch.float64)
    found = of_tensors([tensor])
    assert found.elements == 3_000
    assert found.norm == pytest.approx(wide.norm().item())
    assert found.mean == pytest.approx(wide.mean().item())
    assert found.std == pytest.approx(wide.std(correction=0).item())
    assert (found.least, found.most) == (wide.min().item(), wide.max().item())
    assert found.zeros == (wide == 0).double().mean().item()
    counts = torch.histc(wide, BINS, min=found.least, max=found.most)
    # An element on the edge of two parts may fall into either.
    assert sum(found.histogram) == 3_000
    assert sum(abs(a - b) for a, b in zip(found.histogram, counts.tolist(), strict=True)) <= 12


def test_what_is_not_finite_is_counted_and_left_out() -> None:
    found = of_tensors([torch.tensor([1.0, math.nan, math.inf, -math.inf, 3.0])])
    assert (found.nonfinite, found.mean, found.least, found.most) == (3, 2.0, 1.0, 3.0)
    assert sum(found.histogram) == 2
    none = of_tensors([torch.tensor([math.nan])])
    assert (none.nonfinite, none.norm, sum(none.histogram)) == (1, 0.0, 0)
    assert of_tensors([torch.empty(0)]).elements == 0


def test_huge_and_equal_numbers_have_a_histogram() -> None:
    huge = torch.finfo(torch.float64).max
    assert sum(of_tensors([torch.tensor([-huge, huge], dtype=torch.float64)]).histogram) == 2
    assert of_tensors([torch.full((7,), 2.5)]).histogram[BINS // 2] == 7
    assert sum(of_tensors([torch.tensor([5e-324, 0.0], dtype=torch.float64)]).histogram) == 2


def test_parts_count_together_and_complex_numbers_twice() -> None:
    whole = torch.randn(100)
    assert of_tensors([whole[:30], whole[30:]]).norm == pytest.approx(of_tensors([whole]).norm)
    assert of_tensors([torch.tensor([3 + 4j])]).norm == pytest.approx(5)


def test_a_stored_tensor_is_read_by_its_path(registry: Registry) -> None:
    weight = torch.arange(6.0).reshape(2, 3)
    registry.save("net", {"model": {"fc.weight": weight, "odd[0]": torch.ones(2)}})
    found = dict(statistics(registry["net"], ["model/fc.weight", "model/odd[0]"]))
    assert found["model/fc.weight"].norm == pytest.approx(weight.norm().item())
    assert found["model/odd[0]"].zeros == 0
    with pytest.raises(NotFound, match="no single tensor 'model/none'"):
        list(statistics(registry["net"], ["model/none"]))
