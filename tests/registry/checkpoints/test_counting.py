"""Counting: parameters without buffers, tied tensors once, and modules that are alike as one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from registry import Checkpoint, Registry, freeze
from registry.checkpoints.counting import Module, Network, modules, networks


def saved(root: Path, **components: Any) -> Checkpoint:
    registry = Registry(root)
    with registry.run("net") as run:
        checkpoint = run.save(**components)
    assert checkpoint is not None
    return checkpoint


def counted(checkpoint: Checkpoint) -> list[Network]:
    return networks(checkpoint.store.manifest(checkpoint.id).listed, checkpoint.provenance)


def folded(checkpoint: Checkpoint) -> list[Module]:
    return modules(checkpoint.store.manifest(checkpoint.id).listed)


def test_buffers_are_no_parameters(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    freeze(net, "0.*")
    (found,) = counted(saved(tmp_path / "r", model=net))
    parameters = sum(parameter.numel() for parameter in net.parameters())
    assert found == Network("model", parameters + 4 + 4 + 1, parameters, 16, ("float32",))


def test_tied_tensors_count_once(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    (found,) = counted(saved(tmp_path / "r", model=net))
    assert found.parameters == sum(parameter.numel() for parameter in net.parameters()) == 24


def test_every_network_is_counted_by_its_name(tmp_path: Path) -> None:
    checkpoint = saved(
        tmp_path / "r", generator=nn.Linear(2, 2), judges=[nn.Linear(3, 1), nn.Linear(1, 1)], extra={"a": 1}
    )
    assert [(one.component, one.parameters) for one in counted(checkpoint)] == [
        ("generator", 6),
        ("judges/0", 4),
        ("judges/1", 2),
    ]


def test_without_a_record_of_the_buffers_values_are_counted(tmp_path: Path) -> None:
    checkpoint = Registry(tmp_path / "r").save("net", {"model": nn.BatchNorm1d(4).half().state_dict()})
    assert counted(checkpoint) == [Network("model", 17, None, 0, ("float16", "int64"))]
    assert counted(Registry(tmp_path / "r").save("net", {"other": {"w": torch.ones(1)}})) == []


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(2, 2) for _ in range(3)])
        self.norm = nn.LayerNorm(2)


def test_modules_that_differ_in_numbers_alone_are_one(tmp_path: Path) -> None:
    net = nn.ModuleDict({"layers": nn.ModuleList([Block() for _ in range(4)]), "head": nn.Linear(2, 5)})
    found = folded(Registry(tmp_path / "r").save("net", {"model": net.state_dict()}))
    assert [(one.name, one.modules, one.values, one.bytes) for one in found] == [
        ("model/layers.{0-3}.experts.{0-2}", 12, 72, 288),
        ("model/layers.{0-3}.norm", 4, 16, 64),
        ("model/head", 1, 15, 60),
    ]
    assert found[0].tensors == (("weight", "float32", (2, 2)), ("bias", "float32", (2,)))


def test_modules_of_other_shapes_or_dtypes_stay_apart(tmp_path: Path) -> None:
    state = {
        "a.0.w": torch.ones(2),
        "a.1.w": torch.ones(3),
        "a.2.w": torch.ones(2).half(),
        "w": torch.ones(1),
    }
    found = folded(Registry(tmp_path / "r").save("net", {"model": state}))
    assert [one.name for one in found] == ["model/a.0", "model/a.1", "model/a.2", "model"]
