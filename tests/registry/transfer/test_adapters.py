"""Adapters: what each row of the table promises, and that nothing else has to know a name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from registry import plan_transfer
from registry.store.errors import Incompatible, Invalid
from registry.transfer import adapters
from registry.transfer.adapters import ADAPTERS, Adapter, adapt
from registry.transfer.rows import Rows

PAGE = Path(__file__).parents[3] / "docs" / "transfer.md"


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_adapter_is_in_the_table_of_the_page(name: str) -> None:
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    assert any(f"`{name}`" in line.split("|")[1] for line in lines)


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_adapter_refuses_a_shape_in_words_and_leaves_the_target_alone(name: str) -> None:
    target = torch.full((2, 3, 4, 5, 6), 7.0)
    value = torch.zeros(1, 1) if ADAPTERS[name].needs_source else None
    with pytest.raises(Incompatible, match=rf"the adapter {name} (takes|needs|makes) .*, not \["):
        adapt(name, value, target)
    assert torch.equal(target, torch.full((2, 3, 4, 5, 6), 7.0))


def _transposed(value: torch.Tensor, target: torch.Tensor, rows: Rows | None) -> torch.Tensor:
    if value.dim() != 2 or value.shape[::-1] != target.shape:
        raise ValueError("takes [out, in] to [in, out]")
    return value.T.clone()


def _first_rows(value: torch.Tensor, target: torch.Tensor, rows: Rows | None) -> torch.Tensor:
    assert rows is not None
    return value[: rows.of].clone()


def _zeros(value: torch.Tensor | None, target: torch.Tensor, rows: Rows | None) -> torch.Tensor:
    return torch.zeros_like(target)


NEW = {
    "transposed": Adapter(_transposed),
    "first-rows": Adapter(_first_rows, takes_rows=True),
    "zeros": Adapter(_zeros, needs_source=False),
    "quiet": Adapter(_zeros, needs_source=False, after_relu=True),
}


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of adapters with four more rows."""
    for name, row in NEW.items():
        monkeypatch.setitem(adapters.ADAPTERS, name, row)


def _layers(**shapes: tuple[int, ...]) -> nn.Module:
    module = nn.ParameterDict({name: torch.randn(shape) for name, shape in shapes.items()})
    return nn.ModuleDict({"net": module})


def test_a_new_row_is_planned_and_applied(table: None) -> None:
    source, target = _layers(a=(2, 3), b=(4,)), _layers(a=(3, 2), b=(4,))
    plan = plan_transfer(source, target, adapters={"*.a": "transposed"})
    plan.apply(target, source)
    assert torch.equal(target.get_parameter("net.a"), source.get_parameter("net.a").T)
    with pytest.raises(Incompatible, match=r"the adapter transposed takes .*, not \[4\] to \[4\]"):
        plan_transfer(source, target, adapters={"*.b": "transposed"}, everything=True)


def test_only_a_row_that_takes_the_rows_of_classes_gets_them(table: None) -> None:
    source, target = _layers(a=(4, 3), b=(4,)), _layers(a=(2, 3), b=(4,))
    given: Any = {"classes": (["w", "x", "y", "z"], ["w", "x"])}
    plan = plan_transfer(source, target, adapters={"*.a": "first-rows"}, **given)
    (step,) = [step for step in plan.steps if step.adapter]
    assert step.rows is not None
    turned = _layers(a=(3, 4), b=(4,))
    plan = plan_transfer(source, turned, adapters={"*.a": "transposed"}, **given)
    assert [step.rows for step in plan.steps] == [None, None]


def test_a_new_row_that_needs_no_source_makes_its_tensor(table: None) -> None:
    source, target = _layers(b=(4,)), _layers(a=(3, 2), b=(4,))
    for name, notes in (("zeros", 0), ("quiet", 1)):
        plan = plan_transfer(source, target, adapters={"*.a": name})
        assert [(step.target, step.action) for step in plan.steps] == [("net.a", "make"), ("net.b", "copy")]
        # Only a layer that begins as the identity has to stand after a ReLU.
        assert len(plan.notes) == notes
        assert plan == type(plan).from_json(plan.to_json())
        plan.apply(target, source)
        assert not target.get_parameter("net.a").any()
    wrong = plan.to_json().replace('"quiet"', '"transposed"')
    with pytest.raises(Invalid, match="needs a target and the adapter identity or zeros or quiet"):
        type(plan).from_json(wrong)


def test_a_name_that_is_no_adapter_is_told_what_there_is(table: None) -> None:
    with pytest.raises(
        Invalid, match=r"there is no adapter 'sum'; the adapters are .*identity, transposed, first-rows"
    ):
        plan_transfer(nn.Linear(2, 2), nn.Linear(2, 2), adapters={"weight": "sum"})
