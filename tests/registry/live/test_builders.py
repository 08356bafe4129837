"""Builders: a network is built again from the configuration that was recorded with it."""

from __future__ import annotations

import random
from argparse import Namespace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_network import equal
from torch import nn

from registry import Config, Registry, register_model
from registry.store.errors import Conflict, Incompatible, Invalid, NotFound


class NetConfig(Config):
    width: int = 3


@register_model("tests-net", config=NetConfig)
class Net(nn.Module):
    def __init__(self, config: NetConfig) -> None:
        super().__init__()
        self.config = config
        self.fc = nn.Linear(2, config.width)
        self.drop = nn.Dropout(0.5)


def test_a_network_is_built_again_from_what_was_recorded(registry: Registry) -> None:
    net = Net(NetConfig(width=7)).train()
    with registry.run("any-name") as run:
        run.save(model=nn.DataParallel(net))
    built = registry.build("any-name")
    assert isinstance(built, Net)
    assert built.config.width == 7
    assert not built.training
    assert equal(built.state_dict(), net.state_dict())
    state = random.getstate()
    registry.build("any-name")
    assert random.getstate() == state


def test_nothing_that_a_file_names_is_imported(registry: Registry) -> None:
    with registry.run("x", builder="this.module.does_not.exist") as run:
        run.save(model=nn.Linear(1, 1))
    with pytest.raises(NotFound, match=r"no builder 'this.module.does_not.exist' is registered; import"):
        registry.build("x")
    with registry.run("x", builder="tests-ent") as run:
        run.save(model=nn.Linear(1, 1))
    with pytest.raises(NotFound, match="did you mean 'tests-net'"):
        registry.build("x")
    with registry.run("x", builder="tests-net") as run:
        run.save(model=nn.Linear(1, 1))
    with pytest.raises(Incompatible, match=r"fc\.weight is not in the checkpoint"):
        registry.build("x")


def test_a_builders_name_is_its_own(registry: Registry) -> None:
    with pytest.raises(Conflict, match="registered already"):
        register_model("tests-net")(nn.Linear)
    with pytest.raises(Invalid, match="cannot be the name of a builder"):
        register_model("a/b")


class ForeignConfig:
    """As those of Hugging Face: no `Config`, but it has `to_dict` and `from_dict`."""

    def __init__(self, width: int = 2) -> None:
        self.width = width

    def to_dict(self) -> dict[str, Any]:
        return {"width": self.width, "torch_dtype": torch.float32}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ForeignConfig:
        return cls(values["width"])


@register_model("tests-foreign")
class Foreign(nn.Linear):
    config_class = ForeignConfig

    def __init__(self, config: ForeignConfig | None = None) -> None:
        self.config = config or ForeignConfig()
        super().__init__(self.config.width, 1)


class Odd:
    """A configuration of which nothing is known."""


@register_model("tests-unrecorded")
class Unrecorded(nn.Linear):
    def __init__(self, width: int = 2) -> None:
        super().__init__(width, 1)
        self.config = Odd()


@register_model("tests-plain")
class WithoutConfig(nn.Linear):
    def __init__(self, width: int = 2) -> None:
        super().__init__(width, 1)


def test_a_configuration_with_to_dict_is_recorded_and_built_from(registry: Registry) -> None:
    net = Foreign(ForeignConfig(5))
    with registry.run("x") as run:
        run.save(model=net)
    assert registry["x"].provenance["network"] == {"width": 5, "torch_dtype": "torch.float32"}
    assert torch.equal(registry.build("x").weight, net.weight)


@pytest.mark.parametrize("config", [{"width": 5}, SimpleNamespace(width=5), Namespace(width=5)])
def test_a_configuration_of_plain_values_is_recorded(registry: Registry, config: Any) -> None:
    net = nn.Linear(2, 2)
    net.config = config
    with registry.run("x") as run:
        run.save(model=net)
    assert registry["x"].provenance["network"] == {"width": 5}


def test_labels_that_are_numbered_are_recorded_as_json_has_them(registry: Registry) -> None:
    """As transformers numbers its labels."""
    net = nn.Linear(2, 2)
    net.config = SimpleNamespace(to_dict=lambda: {"id2label": {0: "cat", 1: "dog"}, "nested": [{1: 2}]})
    with registry.run("x") as run:
        run.save(model=net)
    assert registry["x"].provenance["network"] == {
        "id2label": {"0": "cat", "1": "dog"},
        "nested": [{"1": 2}],
    }


def test_a_configuration_that_is_not_recorded_is_said_and_no_default_is_built(registry: Registry) -> None:
    with registry.run("x") as run:
        run.save(model=Unrecorded(5))
    with pytest.raises(
        Invalid, match=r"does not record its network's configuration, a 'Odd': .*restore\(model="
    ):
        registry.build("x")


def test_a_default_that_does_not_fit_says_what_was_not_recorded(registry: Registry) -> None:
    for width in (2, 5):
        with registry.run("x") as run:
            run.save(model=WithoutConfig(width))
    registry.build("x:v1")
    with pytest.raises(
        Incompatible, match=r"x:v2 does not record how its network was made.*restore\(model=network\)"
    ):
        registry.build("x:v2")
