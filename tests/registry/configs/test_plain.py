"""Hyperparameters and extras as programs keep them, and what is recorded of them."""

from __future__ import annotations

import argparse
import enum
from collections import defaultdict, deque
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import BaseModel

from registry import Registry
from registry.configs.plain import lenient_table, plain_table
from registry.store.errors import Invalid


class Colour(enum.StrEnum):
    RED = "red"


class Level(enum.IntEnum):
    HIGH = 3


class Mode(enum.Enum):
    FAST = "fast"


class Name(str):
    pass


@dataclass
class Inner:
    width: int = 4
    out: Path = Path("/a/b")


@dataclass
class Outer:
    inner: Inner = field(default_factory=Inner)


class Model(BaseModel):
    device: Any = torch.device("cuda", 1)


PLAIN: list[tuple[Any, Any]] = [
    (Path("/x/y"), "/x/y"),
    (torch.device("cuda:0"), "cuda:0"),
    (torch.float32, "torch.float32"),
    (np.dtype("f8"), "float64"),
    (np.float32(0.5), 0.5),
    (np.int64(3), 3),
    (np.bool_(True), True),
    (np.str_("a"), "a"),
    (torch.tensor(3), 3),
    (torch.tensor(0.5), 0.5),
    (torch.Size([2, 3]), [2, 3]),
    (Colour.RED, "red"),
    (Level.HIGH, 3),
    (Mode.FAST, "fast"),
    (Name("x"), "x"),
    (Outer(), {"inner": {"width": 4, "out": "/a/b"}}),
    (argparse.Namespace(a=argparse.Namespace(b=Path("c"))), {"a": {"b": "c"}}),
    (SimpleNamespace(a=1), {"a": 1}),
    (Model(), {"device": "cuda:1"}),
    ((1, [2, (3,)]), [1, [2, [3]]]),
    (defaultdict(int, a=1), {"a": 1}),
    (float("inf"), float("inf")),
    (None, None),
]


@pytest.mark.parametrize(("value", "expected"), PLAIN, ids=lambda value: type(value).__name__)
def test_hyperparameters_are_recorded_as_the_plain_values_they_stand_for(
    tmp_path: Path, value: Any, expected: Any
) -> None:
    registry = Registry(tmp_path / "r")
    with registry.run("net", config={"x": value}) as run:
        run.save(model=torch.nn.Linear(1, 1))
    registry.rebuild()
    found = registry["net"].config["x"]
    assert found == expected
    assert type(found) is type(expected)


def test_a_namespace_is_a_configuration(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "r")
    with registry.run("net", config=argparse.Namespace(lr=0.1, out=Path("runs"))) as run:
        run.save(model=torch.nn.Linear(1, 1))
    assert registry["net"].config == {"lr": 0.1, "out": "runs"}


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"a": {"b": {3, 1}}}, r"^'config.a.b' is a set, .*; it has no order, give sorted\(\.\.\.\)$"),
        ({"a": [object()]}, r"^'config.a\[0\]' is a object, which cannot be recorded"),
        ({"a": {1: 2}}, r"^'config.a' has the key '1'; keys must be texts, give str\(key\)$"),
        ({"a": {"$b": 2}}, r"a key cannot begin with '\$'"),
        ({"a": torch.ones(2)}, r"^'config.a' is a Tensor, .*\.tolist\(\)$"),
        ({"a": np.ones(2)}, r"^'config.a' is a ndarray"),
        ({"a": lambda: 0}, r"^'config.a' is a function"),
        ([1], r"^config must be a table"),
    ],
)
def test_what_cannot_be_recorded_is_named_before_training(tmp_path: Path, config: Any, told: str) -> None:
    registry = Registry(tmp_path / "r")
    with pytest.raises(Invalid, match=told):
        registry.run("net", config=config)
    assert registry.runs.find() == []


def test_a_table_that_holds_itself_is_refused() -> None:
    table: dict[str, Any] = {}
    table["a"] = table
    with pytest.raises(Invalid, match="nested too deep"):
        plain_table(table, "config")


@pytest.mark.parametrize("epoch", [np.int64(3), torch.tensor(3), np.uint8(3), Level.HIGH])
def test_an_epoch_is_any_whole_number(tmp_path: Path, epoch: Any) -> None:
    found = Registry(tmp_path / "r").save("net", {"model": {"w": torch.ones(1)}}, epoch=epoch, step=epoch)
    assert (found.epoch, found.step) == (3, 3)
    assert type(found.epoch) is int


@pytest.mark.parametrize(
    "epoch", [True, 3.0, "3", -1, 1 << 63, torch.ones(2), torch.tensor(0.5), np.float64(3)]
)
def test_an_epoch_is_nothing_else(tmp_path: Path, epoch: Any) -> None:
    with pytest.raises(Invalid, match="expected a whole number"):
        Registry(tmp_path / "r").save("net", {"model": {"w": torch.ones(1)}}, epoch=epoch)


EXTRA: list[tuple[Any, Any]] = [
    (torch.__version__, str(torch.__version__)),
    (np.str_("añ"), "añ"),
    (Name("x"), "x"),
    (Colour.RED, "red"),
    (Level.HIGH, 3),
    (deque([1, torch.ones(1)]), [1, torch.ones(1)]),
    (defaultdict(list, a=[1]), {"a": [1]}),
    ({Colour.RED: 1, Level.HIGH: 2}, {"red": 1, 3: 2}),
]


@pytest.mark.parametrize(("value", "expected"), EXTRA, ids=lambda value: type(value).__name__)
def test_extras_of_derived_kinds_come_back_as_the_plain_kind(
    tmp_path: Path, value: Any, expected: Any
) -> None:
    registry = Registry(tmp_path / "r")
    with registry.run("net") as run:
        run.save(model=torch.nn.Linear(1, 1), extra={"x": value})
    found = registry["net"].extra["x"]
    assert found == expected
    assert type(found) is type(expected)
    if isinstance(found, dict):
        assert [type(key) for key in found] == [type(key) for key in expected]


@dataclass
class Odd:
    net: Any
    width: int = 4


def test_what_a_framework_hands_over_is_never_refused() -> None:
    loop: dict[str, Any] = {}
    loop["again"] = loop
    given = {
        "out": Path("/x"),
        "mode": Mode.FAST,
        "space": argparse.Namespace(rate=np.float32(0.5), targets={"v", "q"}),
        "odd": Odd(net=object()),
        "several": (1, [object]),
        3: None,
        "$type": {"$x": 1},
        "loop": loop,
    }
    found, as_text = lenient_table(given)
    assert as_text[:2] == ["odd.net", "several[1][0]"]
    assert len(as_text) == 3
    loop_found = found.pop("loop")
    assert isinstance(loop_found, dict)
    assert found == {
        "out": "/x",
        "mode": "fast",
        "space": {"rate": 0.5, "targets": ["q", "v"]},
        "odd": {"net": "<object object>", "width": 4},
        "several": [1, ["<class 'object'>"]],
        "3": None,
        "type": {"x": 1},
    }
    assert plain_table(found, "config") == found


def test_a_registry_in_a_frameworks_table_is_the_same_whatever_it_holds(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "r")
    before = lenient_table({"registry": registry})
    registry.save("net", {})
    assert lenient_table({"registry": registry}) == before == ({"registry": "<Registry>"}, ["registry"])
