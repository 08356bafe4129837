"""Saving components and restoring them: all of them or none, through wrappers, tied or frozen."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small_network import copied, equal, made, step
from torch import nn

from registry import Registry
from registry.store.errors import Incompatible, Invalid, NotFound, Unsupported


@pytest.mark.parametrize(
    ("given", "error", "told"),
    [
        ({}, Invalid, "nothing to save"),
        ({"model": 3}, Invalid, "model: int has no state_dict"),
        ({"model": nn.Linear(1, 1), "metrics": {"accuracy": "high"}}, Invalid, "expected a number"),
        ({"model": nn.Linear(1, 1), "loss": torch.ones(2)}, Invalid, "loss is"),
        ({"model": nn.Linear(1, 1), "epoch": -1}, Invalid, "epoch is '-1'"),
        ({"model": nn.Linear(1, 1), "extra": {"f": print}}, Unsupported, "extra/f"),
        ({"model": nn.Linear(1, 1), "rng": {}}, Invalid, "rng is no state of the random number generators"),
        (
            {"model": nn.Linear(1, 1), "states": {"model": {}}},
            Invalid,
            "model is given as an object and as a state",
        ),
        ({"states": {"ranks": {}}}, Invalid, "'ranks' is not the name"),
        ({"states": {"model": {}}, "kinds": {"optimizer": "SGD"}}, Invalid, "kinds names optimizer"),
    ],
)
@pytest.mark.parametrize("wait", [True, False])
def test_what_cannot_be_saved_is_refused_at_once(
    registry: Registry, given: dict[str, Any], error: type[Exception], told: str, wait: bool
) -> None:
    with registry.run("net") as run, pytest.raises(error, match=told):
        run.save(**given, wait=wait)
        run.wait()
    with pytest.raises(NotFound):
        registry["net"]
    assert list((registry.root / "packs").rglob("*.safetensors")) == []


def test_what_does_not_fit_changes_nothing(registry: Registry) -> None:
    net, optimizer = made()
    step(net, optimizer)
    with registry.run("net") as run:
        run.save(model=net, optimizer=optimizer)
    checkpoint = registry["net"]
    larger = nn.Sequential(nn.Linear(4, 9), nn.BatchNorm1d(9), nn.Linear(9, 2))
    more = nn.Sequential(*net, nn.Linear(2, 2))  # type: ignore[misc]
    cases: list[tuple[dict[str, Any], str]] = [
        ({"model": larger}, r"0.weight has shape \[9, 4\], stored is \[8, 4\].*; and \d more"),
        ({"model": more}, "3.weight is not in the checkpoint"),
        ({"model": nn.Linear(4, 8)}, "weight is not in the checkpoint"),
        ({"optimizer": torch.optim.SGD(net.parameters(), 0.1)}, "is a SGD, the checkpoint has .* a AdamW"),
        ({"optimizer": torch.optim.AdamW(net[0].parameters())}, "group 0 has 2 parameters, the checkpoint 6"),  # type: ignore[index]
        ({"optimizer": torch.optim.AdamW(larger.parameters())}, "exp_avg of parameter 0 has shape"),
        ({"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1)}, "no component 'scheduler'; it has"),
    ]
    fresh, other = made()
    with torch.no_grad():
        fresh[0].weight.zero_()  # type: ignore[index, union-attr, operator]
    for given, told in cases:
        live = {"model": fresh, **given}
        before = copied(fresh)
        state = torch.get_rng_state()
        with pytest.raises((Incompatible, NotFound), match=told) as caught:
            checkpoint.restore(**live)
        assert str(caught.value).startswith("net:v1")
        assert "\n" not in str(caught.value)
        assert equal(copied(fresh), before)
        assert torch.equal(torch.get_rng_state(), state)
    assert other.state == {}


class Stubborn:
    """A component that refuses every state."""

    def state_dict(self) -> dict[str, Any]:
        return {"value": 1}

    def load_state_dict(self, state: Any) -> None:
        raise RuntimeError("not today")


class Counter:
    def __init__(self) -> None:
        self.value = 0

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


def test_a_component_that_fails_undoes_the_others(registry: Registry) -> None:
    net, optimizer = made()
    step(net, optimizer)
    counter = Counter()
    counter.value = 5
    with registry.run("net") as run:
        run.save(model=net, optimizer=optimizer, counter=counter, stubborn=Stubborn())
    fresh, other = made()
    other.param_groups[0]["lr"] = 0.77
    mine = Counter()
    before = copied(fresh)
    with pytest.raises(Incompatible, match="stubborn: not today; all but stubborn is as before"):
        registry["net"].restore(model=fresh, counter=mine, optimizer=other, stubborn=Stubborn())
    assert equal(copied(fresh), before)
    assert (mine.value, other.param_groups[0]["lr"], dict(other.state)) == (0, 0.77, {})
    other.step()
    registry["net"].restore(model=fresh, counter=mine, optimizer=other)
    assert mine.value == 5


def test_anything_with_a_state_is_a_component(registry: Registry) -> None:
    net, optimizer = made()
    second = torch.optim.SGD(net.parameters(), 0.3, momentum=0.5)
    average = torch.optim.swa_utils.AveragedModel(net)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)  # type: ignore[attr-defined]
    step(net, optimizer), step(net, second), average.update_parameters(net)
    with registry.run("net") as run:
        run.save(model=net, optimizer=optimizer, second=second, ema=average, scaler=scaler)
    net2, optimizer2 = made()
    second2 = torch.optim.SGD(net2.parameters(), 0.1, momentum=0.5)
    average2 = torch.optim.swa_utils.AveragedModel(net2)
    scaler2 = torch.amp.GradScaler("cpu")  # type: ignore[attr-defined]
    registry["net"].restore(model=net2, optimizer=optimizer2, second=second2, ema=average2, scaler=scaler2)
    assert equal(average2.state_dict(), average.state_dict())
    assert second2.param_groups[0]["lr"] == 0.3
    assert scaler2.get_scale() == scaler.get_scale()


class Nested(nn.Module):
    def __init__(self, wrap: bool) -> None:
        super().__init__()
        features = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.features = nn.DataParallel(features) if wrap else features
        self.module = nn.Linear(4, 2)  # a name that only looks like a wrapper's


def test_wrappers_are_seen_through_both_ways(registry: Registry) -> None:
    wraps = {
        "plain": lambda net: net,
        "parallel": nn.DataParallel,
        "compiled": torch.compile,
        "both": lambda net: torch.compile(nn.DataParallel(net)),
    }
    for name, wrap in wraps.items():
        for inside in (False, True):
            torch.manual_seed(hash(name) % 1_000 + inside)
            net = Nested(inside)
            live = wrap(net)  # type: ignore[no-untyped-call]
            with registry.run("net") as run:
                run.save(model=live)
            stored = registry["net"].state_dict()
            assert set(stored) == set(Nested(False).state_dict())
            assert registry["net"].provenance["kinds"] == {"model": "Nested"}
            for other in wraps.values():
                for other_inside in (False, True):
                    fresh = Nested(other_inside)
                    registry["net"].restore(model=other(fresh))  # type: ignore[no-untyped-call]
                    assert equal(
                        dict(enumerate(fresh.state_dict().values())),  # type: ignore[arg-type]
                        dict(enumerate(net.state_dict().values())),  # type: ignore[arg-type]
                    )


DISTRIBUTED = """
import os, sys, torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from registry import Registry

torch.distributed.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=0, world_size=1)
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
wrapped = DistributedDataParallel(net)
registry = Registry(sys.argv[1])
with registry.run("net") as run:
    run.save(model=wrapped)
assert list(registry["net"].state_dict()) == list(net.state_dict())
other = DistributedDataParallel(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)))
registry["net"].restore(model=other)
assert torch.equal(other.module[0].weight, net[0].weight)
torch.distributed.destroy_process_group()
"""


def test_distributed_data_parallel_is_seen_through(registry: Registry, tmp_path: Path) -> None:
    command = [sys.executable, "-c", DISTRIBUTED, str(registry.root), str(tmp_path / "meet")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    plain = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    registry["net"].restore(model=plain)
    plain.load_state_dict(registry["net"].state_dict())


def test_a_teacher_that_was_frozen_wholly_is_restored_with_the_rest(registry: Registry) -> None:
    net, teacher = nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    with registry.run("x") as run:
        run.save(model=net, ema=teacher, optimizer=optimizer)
    other, ema = nn.Linear(2, 2), nn.Linear(2, 2)
    registry["x"].restore(model=other, ema=ema, optimizer=torch.optim.SGD(other.parameters(), 0.1))
    assert torch.equal(other.weight, net.weight)
    assert torch.equal(ema.weight, teacher.weight)
    assert not any(parameter.requires_grad for parameter in ema.parameters())


def test_values_that_differ_are_not_restored_into_a_network_that_ties_them(registry: Registry) -> None:
    checkpoint = registry.save(
        "x",
        {
            "model": {
                "embed.weight": torch.ones(5, 3),
                "head.weight": torch.zeros(5, 3),
                "head.bias": torch.ones(5),
            }
        },
    )
    target = Tied()
    before = target.embed.weight.detach().clone()
    with pytest.raises(
        Incompatible, match=r"embed\.weight and head\.weight share memory, and have different values"
    ):
        checkpoint.restore(model=target)
    assert torch.equal(target.embed.weight, before)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5)
        self.head.weight = self.embed.weight


@pytest.mark.parametrize("kept", ["embed.weight", "head.weight"])
def test_a_tied_tensor_that_a_file_has_once_is_restored(registry: Registry, kept: str) -> None:
    source, target = Tied(), Tied()
    state = {
        name: value
        for name, value in source.state_dict().items()
        if not name.endswith("weight") or name == kept
    }
    registry.save("net", {"model": state})
    registry["net"].restore(model=target)
    assert torch.equal(target.embed.weight, source.embed.weight)
    assert target.head.weight is target.embed.weight
    del state[kept]
    registry.save("net", {"model": state})
    with pytest.raises(Incompatible, match=r"embed\.weight is not in the checkpoint"):
        registry["net"].restore(model=target)


def test_an_untied_tensor_that_is_not_there_is_missed(registry: Registry) -> None:
    source, target = Tied(), Tied()
    target.head.weight = nn.Parameter(target.head.weight.detach().clone())
    state = source.state_dict()
    del state["head.weight"]
    registry.save("net", {"model": state})
    with pytest.raises(Incompatible, match=r"head\.weight is not in the checkpoint"):
        registry["net"].restore(model=target)


def test_an_error_in_somebody_elses_state_dict_names_the_component(registry: Registry) -> None:
    class Broken:
        def state_dict(self) -> dict[str, Any]:
            raise KeyError("moment")

        def load_state_dict(self, state: dict[str, Any]) -> None: ...

    with (
        registry.run("x") as run,
        pytest.raises(Invalid, match=r"sampler: state_dict\(\) of .*Broken failed: KeyError: 'moment'"),
    ):
        run.save(model=nn.Linear(1, 1), sampler=Broken())
