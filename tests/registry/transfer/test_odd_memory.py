"""Applying a plan where memory is shared, missing, or of another mode: exact, or refused before anything changes."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from registry import diff, plan_transfer
from registry.store.errors import Invalid, Unsupported


def pair(size: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(size, size, bias=False), nn.Linear(size, size, bias=False))


@pytest.mark.parametrize("size", [10, 200])
def test_what_lies_in_the_network_itself_is_read_before_it_changes(size: int) -> None:
    net, new = pair(size), torch.randn(size, size)
    old = [layer.weight.detach().clone() for layer in net]  # type: ignore[union-attr, operator]
    state = {"0.weight": net[1].weight.detach(), "1.weight": new}
    plan_transfer(state, net).apply(net, state)
    assert torch.equal(net[0].weight, old[1])  # type: ignore[arg-type]
    assert torch.equal(net[1].weight, new)  # type: ignore[arg-type]
    state = {"0.weight": net[1].weight.detach(), "1.weight": net[0].weight.detach()}
    plan_transfer(state, net).apply(net, state)
    assert torch.equal(net[0].weight, new)  # type: ignore[arg-type]
    assert torch.equal(net[1].weight, old[1])  # type: ignore[arg-type]


def cut(weight: torch.Tensor) -> None:
    weight.data.untyped_storage().resize_(weight.nbytes // 2)


def freed(weight: torch.Tensor) -> None:
    weight.data.untyped_storage().resize_(0)


def expanded(weight: torch.Tensor) -> None:
    weight.data = torch.zeros(1, weight.shape[1]).expand(weight.shape)


@pytest.mark.parametrize("size", [10, 300])
@pytest.mark.parametrize("harm", [cut, freed, expanded])
def test_a_target_that_cannot_be_filled_is_refused_before_anything_changes(
    size: int, harm: Callable[[torch.Tensor], None]
) -> None:
    source, net = pair(size), pair(size)
    with torch.no_grad():
        net[0].weight.fill_(7)  # type: ignore[union-attr, operator]
    plan = plan_transfer(source, net)
    harm(net[1].weight)  # type: ignore[arg-type]
    with pytest.raises(Invalid, match=r"1\.weight of .* is .*(freed or cut|expanded)"):
        plan.apply(net, source)
    assert bool((net[0].weight == 7).all())


@pytest.mark.parametrize("harm", [cut, freed])
def test_a_source_without_its_memory_is_refused(harm: Callable[[torch.Tensor], None]) -> None:
    source, net = pair(50), pair(50)
    plan = plan_transfer(source, net)
    harm(source[1].weight)  # type: ignore[arg-type]
    with pytest.raises(Invalid, match=r"1\.weight of .* freed or cut"):
        plan.apply(net, source)


@pytest.mark.parametrize("size", [3, 300])
def test_a_layer_that_was_made_in_inference_mode_is_filled(size: int) -> None:
    source, net = pair(size), pair(size)
    with torch.inference_mode():
        net[1] = nn.Linear(size, size, bias=False)
    plan_transfer(source, net).apply(net, source)
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), net.parameters(), strict=True))


class Buffer(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("w", torch.ones(40).to(dtype))
        self.layer = nn.Linear(2, 2)


@pytest.mark.parametrize(
    "dtype", [torch.complex64, torch.complex128, torch.float8_e5m2, torch.float8_e4m3fn, torch.float16]
)
def test_nan_is_found_in_every_type_that_has_it(dtype: torch.dtype) -> None:
    source, net = Buffer(dtype), Buffer(dtype)
    plan_transfer(source, net).apply(net, source)
    source.w[3:4].copy_(torch.tensor([math.nan]).to(dtype))  # type: ignore[union-attr, operator, index]
    with pytest.raises(Invalid, match=r"w of .* holds NaN or infinity"):
        plan_transfer(source, net).apply(net, source)


def test_numbers_that_a_cast_makes_infinite_are_refused() -> None:
    source, net = nn.Linear(3, 3), nn.Linear(3, 3).half()
    plan = plan_transfer(source, net, allow_cast=True)
    plan.apply(net, source)
    source.weight.data[1, 1] = 1e30
    with pytest.raises(Invalid, match=r"too large for torch\.float16 of weight"):
        plan_transfer(source, net, allow_cast=True).apply(net, source)
    plan_transfer(source, net, allow_cast=True, allow_nan=True).apply(net, source)
    assert bool(net.weight.isinf()[1, 1])


class Row(nn.Module):
    def __init__(self, row: torch.Tensor) -> None:
        super().__init__()
        self.row = nn.Parameter(row)


@pytest.mark.parametrize(
    ("number", "of", "into"),
    [
        (1e39 + 0j, torch.complex128, torch.complex64),
        (-1e39j, torch.complex128, torch.complex64),
        (1e39, torch.float64, torch.complex64),
        (-1e5, torch.float32, torch.complex32),
        (500.0, torch.float32, torch.float8_e4m3fn),
        (-500.0, torch.bfloat16, torch.float8_e4m3fn),
        (57344.0, torch.float8_e5m2, torch.float8_e4m3fn),
        (70_000, torch.int64, torch.float8_e5m2),
        (-1.0, torch.float32, torch.float8_e8m0fnu),
        (0.0, torch.float8_e4m3fn, torch.float8_e8m0fnu),
    ],
    ids=str,
)
def test_no_narrower_type_takes_numbers_that_are_too_large(
    number: complex, of: torch.dtype, into: torch.dtype
) -> None:
    net = Row(torch.zeros(3, dtype=into))
    row = torch.tensor([1, 2, 4]).to(of)
    expected = row.to(into).view(torch.uint8)
    plan_transfer({"row": row}, net, allow_cast=True).apply(net)
    assert torch.equal(net.row.detach().view(torch.uint8), expected)
    row[1] = number
    with pytest.raises(Invalid, match=rf"too large for {into} of row"):
        plan_transfer({"row": row}, net, allow_cast=True).apply(net)
    assert torch.equal(net.row.detach().view(torch.uint8), expected)


@pytest.mark.parametrize(
    ("source", "advice"),
    [
        (torch.eye(3).to_sparse(), "to_dense"),
        (torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]), "unbind"),
    ],
)
def test_a_source_whose_elements_lie_in_no_rows_is_refused(source: torch.Tensor, advice: str) -> None:
    with pytest.raises(Unsupported, match=r"row of a state dict is a") as refused:
        plan_transfer({"row": source}, Row(torch.zeros(3, 3)))
    assert advice in str(refused.value)


def test_a_cast_that_torch_does_not_know_is_refused_before_anything_changes() -> None:
    net = nn.Module()
    net.first = nn.Parameter(torch.ones(3))
    net.register_buffer("second", torch.zeros(4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2))
    source = {"first": torch.zeros(3), "second": torch.ones(4)}
    with pytest.raises(Invalid, match=r"torch cannot cast torch\.float32 of a state dict to torch\.float4"):
        plan_transfer(source, net, allow_cast=True, allow_nan=True).apply(net)
    assert torch.equal(net.first, torch.ones(3))


def test_quantized_and_lazy_tensors_of_a_source_are_refused() -> None:
    quantized = torch.zeros(3, dtype=torch.uint8)
    quantized = torch._make_per_tensor_quantized_tensor(quantized, 0.1, 0)
    with pytest.raises(Unsupported, match=r"row of a state dict is quint8"):
        plan_transfer({"row": quantized}, Row(torch.zeros(3)), allow_cast=True)
    with pytest.raises(Unsupported, match=r"row is torch\.quint8, whose values cannot be compared"):
        diff({"row": quantized}, {"row": torch.ones(3)}, values=True)
    with pytest.raises(Unsupported, match=r"row of a state dict is not initialised yet"):
        plan_transfer({"row": nn.UninitializedParameter()}, Row(torch.zeros(3)))


def test_freed_memory_is_handed_to_nobody() -> None:
    plan = plan_transfer({"row": torch.ones(3)}, Row(torch.zeros(3)))
    source = {"row": torch.ones(3)}
    freed(source["row"])
    with pytest.raises(Invalid, match=r"row of a state dict is a tensor whose memory was freed or cut"):
        plan.state_dict(Row(torch.zeros(3)), source)
    with pytest.raises(Invalid, match=r"row of a state dict is a tensor whose memory was freed or cut"):
        diff(source, {"row": torch.zeros(3)}, values=True)


@pytest.mark.parametrize("kind", [torch.int64, torch.float32, torch.bfloat16, torch.complex64])
def test_tensors_with_steps_are_compared(kind: torch.dtype) -> None:
    row = torch.arange(400).to(kind)
    found = diff({"w": row[::2]}, {"w": row[:200].clone()}, values=True)
    assert [change.name for change in found.changes] == ["w"]
    assert not diff({"w": row[::2]}, {"w": row[::2].clone()}, values=True).changes
    assert not diff({"w": row[-1::3]}, {"w": row[-1:].clone()}, values=True).changes


def test_complex_and_real_numbers_are_compared() -> None:
    found = diff({"w": torch.tensor([3 + 4j, 1])}, {"w": torch.tensor([3.0, 1.0])}, values=True)
    (change,) = found.changes
    assert (change.norm, change.largest, change.changed) == (4.0, 4.0, 0.25)


def test_a_source_without_values_is_planned_and_not_applied() -> None:
    net = nn.Linear(3, 3)
    with torch.device("meta"):
        source = {"weight": torch.empty(3, 3), "bias": torch.empty(3)}
    plan = plan_transfer(source, net)
    assert [step.action for step in plan.steps] == ["copy", "copy"]
    before = net.weight.detach().clone()
    with pytest.raises(Invalid, match="on the meta device and has no values"):
        plan.apply(net, source)
    assert torch.equal(net.weight, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("factor", [0.5, 1e-2, 1e-4, 1e-6, -1e-4, 1e4])
@pytest.mark.parametrize("count", [100, 40_000])
def test_the_cosine_is_right_however_far_a_tensor_shrinks(
    dtype: torch.dtype, factor: float, count: int
) -> None:
    chance = torch.Generator().manual_seed(0)
    old = torch.randn(count, generator=chance).to(dtype)
    new = (old.double() * factor + 0.1 * abs(factor) * torch.randn(count, generator=chance)).to(dtype)
    (found,) = diff({"w": old}, {"w": new}, values=True).changes
    a, b = old.double(), new.double()
    assert found.cosine == pytest.approx(float(a @ b / a.norm() / b.norm()), abs=1e-6)
