"""Saving what a framework hands over: states instead of objects, lists of objects, gradients, random numbers of another moment."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from small_network import copied, equal, made, step
from torch import nn

from registry import Gradients, Registry, freeze
from registry.live import rng
from registry.store.errors import Incompatible, Invalid


def test_states_are_restored_into_objects(registry: Registry) -> None:
    net, optimizer = made()
    step(net, optimizer)
    with registry.run("net") as run:
        run.save(states={"model": net.state_dict(), "optimizer": optimizer.state_dict()}, epoch=1)
        run.save(model=net.state_dict(), optimizer=optimizer.state_dict())
    for name in ("net:v1", "net:v2"):
        assert "kinds" not in registry[name].provenance
        other, its = made()
        registry[name].restore(model=other, optimizer=its)
        assert equal(copied(other), copied(net))
        step(other, its)
    assert registry["net:v2"].parent == "net:v1"


def test_the_class_of_a_state_is_compared_where_it_is_given(registry: Registry) -> None:
    net, optimizer = made()
    step(net, optimizer)
    with registry.run("net") as run:
        run.save(states={"optimizer": optimizer.state_dict()}, kinds={"optimizer": "AdamW"})
    registry["net"].restore(optimizer=optimizer)
    with pytest.raises(Incompatible, match="optimizer is a SGD, the checkpoint has the state of a AdamW"):
        registry["net"].restore(optimizer=torch.optim.SGD(net.parameters()))


def test_a_state_that_was_recorded_as_a_dict_is_restored(registry: Registry) -> None:
    """As versions before this one recorded it."""
    net, optimizer = made()
    step(net, optimizer)
    tree = {"model": net.state_dict(), "optimizer": optimizer.state_dict()}
    registry.save("net", tree, provenance={"kinds": {"model": "OrderedDict", "optimizer": "dict"}})
    registry["net"].restore(model=net, optimizer=optimizer)


def test_lists_of_objects_are_restored_in_their_order(registry: Registry) -> None:
    pairs = [made() for _ in range(2)]
    for net, optimizer in pairs:
        step(net, optimizer)
    schedulers = tuple(torch.optim.lr_scheduler.StepLR(one, 3) for _, one in pairs)
    nets, optimizers = [net for net, _ in pairs], [one for _, one in pairs]
    with registry.run("net") as run:
        run.save(models=nets, optimizers=optimizers, schedulers=schedulers)
    assert registry["net"].provenance["kinds"]["optimizers/1"] == "AdamW"
    fresh = [made() for _ in range(2)]
    others = [net for net, _ in fresh]
    registry["net"].restore(models=others, optimizers=[one for _, one in fresh])
    for there, here in zip(others, nets, strict=True):
        assert equal(copied(there), copied(here))
    with pytest.raises(Incompatible, match="optimizers is a list of 1, the checkpoint has a list of 2"):
        registry["net"].restore(optimizers=optimizers[:1])
    with pytest.raises(Incompatible, match=r"models/1: 0\.weight has shape"):
        registry["net"].restore(
            models=[others[0], nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))]
        )
    with pytest.raises(Incompatible, match="optimizers/1 is a SGD"):
        registry["net"].restore(optimizers=[optimizers[0], torch.optim.SGD(nets[1].parameters())])


def test_a_frozen_network_in_a_list_is_frozen_again(registry: Registry) -> None:
    first, second = made()[0], made()[0]
    freeze(second, "0.*")
    with registry.run("net") as run:
        run.save(models=[first, second], optimizer=torch.optim.SGD(first.parameters()))
    others = [made()[0], made()[0]]
    registry["net"].restore(models=others, optimizer=torch.optim.SGD(others[0].parameters()))
    assert all(one.requires_grad for one in others[0].parameters())
    assert not others[1][0].weight.requires_grad  # type: ignore[index, union-attr]


def test_a_list_of_states_and_plain_values_is_kept(registry: Registry) -> None:
    with registry.run("net") as run:
        run.save(states={"loops": [{"step": 3}, {"batches": [1, 2.5, None]}]}, optimizers=[{"state": {}}])
    assert registry["net"].load()["loops"] == [{"step": 3}, {"batches": [1, 2.5, None]}]
    assert registry["net"].load("optimizers")["optimizers"] == [{"state": {}}]


def test_lists_of_optimizers_are_dropped_from_older_versions(registry: Registry) -> None:
    """Equal values, retention, compaction and gc together."""
    pairs = [made() for _ in range(2)]
    nets, optimizers = [net for net, _ in pairs], [one for _, one in pairs]
    with registry.run("net", keep_optimizer=1, compact=True) as run:
        for number in range(4):
            for net, optimizer in pairs if number != 2 else ():
                step(net, optimizer)
            run.save(models=nets, optimizers=optimizers, states={"loops": [{"step": number}]}, wait=False)
    registry.collect_garbage(grace=0)
    held = {version.name: set(registry[version.name].components) for version in registry.versions("net")}
    assert held.pop("net:v4") == {"models", "optimizers", "loops", "rng"}
    assert all(components == {"models", "loops"} for components in held.values())
    fresh = [made()[0] for _ in range(2)]
    registry["net:v3"].restore(models=fresh)
    assert registry["net:v3"].load("loops")["loops"] == [{"step": 2}]
    assert registry.verify().problems == ()


def test_random_numbers_of_another_moment_are_saved(registry: Registry) -> None:
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    then = rng.capture()
    expected = (random.random(), np.random.rand(), torch.rand(1).item())
    net, _ = made()
    with registry.run("net") as run:
        run.save(model=net, rng=then)
    registry["net"].restore(rng=True)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected


def test_one_process_saves_the_random_numbers_of_all(registry: Registry) -> None:
    states = []
    for seed in range(3):
        torch.manual_seed(seed)
        states.append(rng.capture())
    net, _ = made()
    with registry.run("net", together=False) as run:
        run.save(model=net, rng=states)
        with pytest.raises(Invalid, match="rng is no state"):
            run.save(model=net, rng=[{}])
    checkpoint = registry["net"]
    assert checkpoint.provenance["processes"] == 3
    for rank in (1, 2):
        own = checkpoint.load(f"ranks/{rank}")["ranks"][str(rank)]["rng"]
        assert torch.equal(own["torch"], states[rank]["torch"])


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 3), nn.Linear(3, 3)
        self.outer.weight = self.inner.weight
        self.alone = nn.Parameter(torch.ones(3))


def test_gradients_of_a_window_are_restored(registry: Registry) -> None:
    net = Tied()
    net.outer(net.inner(torch.randn(2, 3))).sum().backward()
    expected = {name: None if one.grad is None else one.grad.clone() for name, one in net.named_parameters()}
    assert expected["alone"] is None
    with registry.run("net") as run:
        run.save(model=net, gradients=Gradients(net))
        net.zero_grad()
        run.save(model=net, gradients=Gradients(net))
    other = torch.compile(Tied())
    other.alone.grad = torch.ones(3)
    registry["net:v1"].restore(model=other, gradients=Gradients(other))
    for name, one in Tied.named_parameters(other._orig_mod):
        assert (one.grad is None) == (expected[name] is None)
        assert one.grad is None or torch.equal(one.grad, expected[name])
    registry["net:v2"].restore(model=other, gradients=Gradients(other))
    assert all(one.grad is None for one in other.parameters())


def test_gradients_of_another_network_change_nothing(registry: Registry) -> None:
    net = nn.Linear(2, 2)
    net(torch.ones(1, 2)).sum().backward()
    before = net.weight.grad.clone()  # type: ignore[union-attr]
    with pytest.raises(Incompatible, match="the network has no parameter other; weight has shape"):
        Gradients(net).load_state_dict({"other": torch.ones(1), "weight": torch.ones(3)})
    assert torch.equal(net.weight.grad, before)  # type: ignore[arg-type]
    assert (Gradients(net).state_dict().keys()) == {"weight", "bias"}


def test_wrong_calls_are_told(registry: Registry) -> None:
    net, _ = made()
    with registry.run("net") as run:
        calls: list[tuple[dict[str, Any], str]] = [
            ({"states": {"model": {}}, "model": net}, "model is given as an object and as a state"),
            ({"states": {"extra": {}}}, "'extra' is not the name of a component"),
            ({"files": {}, "states": {"files": {}}}, "'files' is not the name of a component"),
            ({"model": net, "files": {"a.txt": "text"}}, "files gives 'a.txt' a str, expected the bytes"),
            ({"model": net, "kinds": {"model": "Linear"}}, "kinds names model"),
            ({"model": net, "rng": {}}, "rng is no state of the random number generators"),
        ]
        for given, told in calls:
            with pytest.raises(Invalid, match=told):
                run.save(**given)
    assert registry.names() == []


@pytest.mark.parametrize("wait", [True, False])
def test_files_are_kept_byte_for_byte(registry: Registry, wait: bool) -> None:
    net, _ = made()
    files = {"config.json": b"{}", "sub/$odd.bin": bytes(range(256)) * 8, "empty": b""}
    with registry.run("net") as run:
        run.save(model=net, files=files, wait=wait)
    assert registry["net"].load("files")["files"] == files


class Part:
    """A component that adapts something."""

    adapter_of = "0" * 64

    def state_dict(self) -> dict[str, int]:
        return {"x": 1}


def test_the_lineage_tells_what_a_component_adapts(registry: Registry) -> None:
    with registry.run("net") as run:
        run.save(part=Part())
        run.save(parts=[Part()])
    edge = {"kind": "adapter-of", "parent": "0" * 64}
    assert all(registry[name].lineage == [edge] for name in ("net:v1", "net:v2"))
    assert "lineage" not in registry["net"].provenance
    assert registry.verify().problems == ()
