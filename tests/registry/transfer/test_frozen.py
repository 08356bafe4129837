"""Frozen versions: what moved between two of them, and why."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from registry import Checkpoint, Registry, freeze
from registry.store.errors import Incompatible, Invalid
from registry.transfer.frozen import check_frozen


def _saved(registry: Registry, name: str, *networks: nn.Module) -> list[Checkpoint]:
    with registry.run(name) as run:
        found = [run.save(model=network) for network in networks]
    return [checkpoint for checkpoint in found if checkpoint is not None]


def _network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))


def test_what_did_not_move_is_not_named(tmp_path: Path) -> None:
    registry, net = Registry(tmp_path / "r"), _network()
    freeze(net, ["0.*", "1.*"])
    (first,) = _saved(registry, "net", net)
    with torch.no_grad():
        net[2].weight.add_(1)
    (second,) = _saved(registry, "net", net)
    found = check_frozen(first, second)
    assert (dict(found.moved), dict(found.went_on)) == ({}, {})
    buffers = ("num_batches_tracked", "running_mean", "running_var")
    assert sorted(found.frozen) == [
        "0.bias",
        "0.weight",
        "1.bias",
        *(f"1.{name}" for name in buffers),
        "1.weight",
    ]


def test_every_name_that_moved_has_its_reason(tmp_path: Path) -> None:
    registry, net = Registry(tmp_path / "r"), _network()
    freeze(net, "1.*")
    (first,) = _saved(registry, "net", net)
    freeze(net, "0.*")
    with torch.no_grad():
        for tensor in (net[0].weight, net[1].weight, net[1].running_mean):
            tensor.add_(1)
    (second,) = _saved(registry, "net", net)
    assert dict(check_frozen(first, second).moved) == {
        "0.weight": "it was not frozen yet in the first",
        "1.weight": "something wrote to it, or the optimizer had it",
        "1.running_mean": "a buffer: its layer was in training mode, or writes to it in evaluation mode, too",
    }


@pytest.mark.parametrize("is_asked_for", [True, False])
def test_statistics_that_went_on_are_told_apart(tmp_path: Path, is_asked_for: bool) -> None:
    registry, net = Registry(tmp_path / "r"), _network()
    if is_asked_for:
        freeze(net, "1.*", bn="update")
    else:
        net[1].requires_grad_(False)
    (first,) = _saved(registry, "net", net)
    net(torch.randn(8, 3))
    (second,) = _saved(registry, "net", net)
    found = check_frozen(first, second)
    assert dict(found.moved) == {}
    reason = (
        "its statistics go on, as was asked for"
        if is_asked_for
        else "the parameters of its layer are frozen, and it was not held"
    )
    assert dict(found.went_on) == {
        f"1.{name}": reason for name in ("running_mean", "running_var", "num_batches_tracked")
    }


def test_versions_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    registry, net = Registry(tmp_path / "r"), _network()
    (plain,) = _saved(registry, "net", net)
    with pytest.raises(Invalid, match="net:v1 was saved without anything frozen"):
        check_frozen(plain, plain)
    freeze(net, "0.*")
    (frozen,) = _saved(registry, "net", net)
    (other,) = _saved(registry, "other", nn.Linear(3, 1))
    with pytest.raises(Incompatible, match=r"other:v1 has no '0\.\w+', which is frozen in net:v2"):
        check_frozen(other, frozen)
