"""Freezing that holds, the proof that it held, and optimizers that fit."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from registry import (
    Registry,
    check_optimizer,
    freeze,
    frozen_proof,
    param_groups,
    plan_transfer,
    remap_optimizer,
    unfreeze,
)
from registry.live.freezing import frozen_names
from registry.live.proof import Thawed
from registry.store.errors import Incompatible, Invalid, Unsupported


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5))
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).mean((2, 3)))  # type: ignore[no-any-return]


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    net.train()
    for _ in range(steps):
        optimizer.zero_grad()
        net(torch.randn(8, 1, 6, 6)).square().sum().backward()
        optimizer.step()


def decaying(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, 0.1, weight_decay=0.5)


def test_frozen_means_frozen() -> None:
    net = Net()
    train(net, decaying(net.parameters()))
    names, before = list(net.state_dict()), {n: t.clone() for n, t in net.state_dict().items()}
    kinds = [type(part) for part in net.modules()]
    found = freeze(net, "body.*")
    assert found.parameters == ("body.0.weight", "body.0.bias", "body.1.weight", "body.1.bias")
    assert found.held == ("body.1",)
    assert found.trainable == 10
    assert all(p.grad is None for n, p in net.named_parameters() if n.startswith("body"))
    train(net, decaying(net.parameters()))  # with the frozen ones in it, and decay
    moved = [n for n, t in net.state_dict().items() if not torch.equal(t, before[n])]
    assert moved == ["head.weight", "head.bias"]
    assert (list(net.state_dict()), [type(part) for part in net.modules()]) == (names, kinds)
    assert net.body[1].training is False
    assert net.body[3].training is True  # dropout goes on
    net.eval()
    net.train()
    assert net.body[1].training is False


def test_without_holding_batchnorm_the_statistics_move() -> None:
    net = Net()
    found = freeze(net, "body.*", bn="update")
    assert "statistics inside the frozen part go on" in found.notes[0]
    before = net.body[1].running_mean.clone()
    train(net, decaying(net.head.parameters()))
    assert not torch.equal(net.body[1].running_mean, before)


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm1d(3),
        nn.BatchNorm2d(3),
        nn.BatchNorm3d(3),
        nn.SyncBatchNorm(3),
        nn.InstanceNorm2d(3, affine=True, track_running_stats=True),
    ],
    ids=lambda norm: type(norm).__name__,
)
def test_every_norm_with_statistics_is_held(norm: nn.Module) -> None:
    net = nn.ModuleDict({"norm": norm, "head": nn.Linear(3, 2)})
    assert freeze(net, "norm.*").held == ("norm",)
    net.train()
    assert not norm.training


def test_a_norm_without_statistics_or_only_partly_frozen_goes_on() -> None:
    plain = nn.ModuleDict({"norm": nn.BatchNorm1d(3, track_running_stats=False), "head": nn.Linear(3, 2)})
    assert freeze(plain, "norm.*").held == ()
    partly = nn.ModuleDict({"norm": nn.BatchNorm1d(3), "head": nn.Linear(3, 2)})
    assert freeze(partly, "norm.weight").held == ()
    partly.train()
    assert partly["norm"].training


def test_freezing_again_adds_and_nothing_is_thawed_unasked() -> None:
    net = Net()
    freeze(net, "body.0.*")
    first = frozen_names(net)
    freeze(net, "body.0.*")
    assert frozen_names(net) == first
    freeze(net, "body.1.*")
    assert set(frozen_names(net)) > set(first)
    assert unfreeze(net, "body.0.*") == ("body.0.weight", "body.0.bias")
    net.train()
    assert not net.body[1].training
    unfreeze(net)
    net.train()
    assert net.body[1].training
    assert frozen_names(net) == ()


def test_a_frozen_network_can_be_copied_and_pickled() -> None:
    net = Net()
    freeze(net, "body.*")
    memory = io.BytesIO()
    torch.save(net, memory)
    memory.seek(0)
    for other in (copy.deepcopy(net), torch.load(memory, weights_only=False)):
        other.train()
        assert not other.body[1].training
        unfreeze(other)
        other.train()
        assert other.body[1].training
        assert not net.body[1].training


@pytest.mark.parametrize(("patterns", "told"), [("bdy.*", "matches nothing"), ("*", "leaves no parameter")])
def test_a_freeze_that_makes_no_sense_changes_nothing(patterns: str, told: str) -> None:
    net = Net()
    with pytest.raises(Invalid, match=told):
        freeze(net, patterns)
    assert all(p.requires_grad for p in net.parameters())
    with pytest.raises(Invalid, match="matches nothing"):
        unfreeze(net, "nothing.*")


@pytest.mark.parametrize(
    ("which", "frozen"),
    [
        ("first:1", ["body.0.weight", "body.0.bias"]),
        ("first:2", ["body.0.weight", "body.0.bias", "body.1.weight", "body.1.bias"]),
        ("first:-1", ["body.0.weight", "body.0.bias", "body.1.weight", "body.1.bias"]),
    ],
)
def test_freezing_by_depth(which: str, frozen: list[str]) -> None:
    net = Net()
    assert list(freeze(net, which).parameters) == frozen


@pytest.mark.parametrize("which", ["first:0", "first:3", "first:-3", "first:x"])
def test_a_depth_that_the_network_does_not_have(which: str) -> None:
    with pytest.raises(Invalid, match="is not a number of the 3 layers; write first:3, or first:-1"):
        freeze(Net(), which)


def test_what_is_not_initialised_cannot_be_frozen() -> None:
    net = nn.ModuleDict({"a": nn.LazyLinear(3), "b": nn.Linear(2, 2)})
    with pytest.raises(Unsupported, match=r"a\.weight is not initialised yet; run one batch"):
        freeze(net, "b.*")
    assert net["b"].weight.requires_grad


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """A process group of one."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_freezing_comes_before_wrapping(one_process: None, tmp_path: Path) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    from registry import plan_transfer

    sharded = Net()
    fully_shard(sharded)
    wrapped: list[tuple[nn.Module, str]] = [
        (nn.parallel.DistributedDataParallel(Net()), "wrapped in DistributedDataParallel; freeze before"),
        (FullyShardedDataParallel(Net(), device_id=torch.device("cpu")), "FullyShardedDataParallel; freeze"),
        (sharded, r"body\.0\.weight is sharded; freeze before the network is sharded"),
    ]
    for net, told in wrapped:
        for act in (freeze, unfreeze):
            with pytest.raises(Unsupported, match=told):
                act(net, "*head*")
        assert all(p.requires_grad for p in net.parameters())
    for net, _ in wrapped[1:]:
        with pytest.raises(Unsupported, match="before"):
            plan_transfer(Net(), net)
    plan = plan_transfer(Net(), wrapped[0][0], freeze="body.*")
    source = Net()
    before = {name: tensor.clone() for name, tensor in wrapped[0][0].state_dict().items()}
    with pytest.raises(Unsupported, match="freeze before wrapping"):
        plan.apply(wrapped[0][0], source)
    assert all(torch.equal(before[n], t) for n, t in wrapped[0][0].state_dict().items())
    net = Net()
    freeze(net, "body.*")
    optimizer = decaying([p for p in net.parameters() if p.requires_grad])
    registry = Registry(tmp_path / "r")
    with registry.run("x") as run:
        run.save(model=net, optimizer=optimizer)
    parallel = nn.parallel.DistributedDataParallel(net)
    registry["x"].restore(model=parallel, optimizer=optimizer)
    with frozen_proof(parallel):
        train(parallel, optimizer)


def test_what_was_frozen_is_frozen_again_when_training_goes_on(tmp_path: Path) -> None:
    registry, net = Registry(tmp_path / "r"), Net()
    freeze(net, "body.*")
    optimizer = decaying(net.head.parameters())
    with registry.run("x") as run:
        run.save(model=net, optimizer=optimizer)
    other = Net()
    again = decaying(other.head.parameters())
    registry["x"].restore(model=other)
    assert frozen_names(other) == ()  # for inference, nothing needs to be
    registry["x"].restore(model=other, optimizer=again)
    assert frozen_names(other) == frozen_names(net)
    with frozen_proof(other, again):
        train(other, again)


def test_freezing_one_of_two_tied_names_freezes_both_and_says_so() -> None:
    net = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5), "x": nn.Linear(1, 1)})
    net["head"].weight = net["embed"].weight
    found = freeze(net, "embed.*")
    assert found.notes == ("head.weight is frozen too, as it shares memory with a frozen tensor",)
    assert not net["head"].weight.requires_grad


# -- layers of any kind that write to their buffers -----------------------------------------------------------


class Counting(nn.Module):
    """A norm that somebody wrote by hand."""

    def __init__(self, *, affine: bool = True) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        if affine:
            self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.mean(0).detach()  # Another tensor each time.
        return (x - self.mean) * getattr(self, "weight", 1.0)


class Codebook(nn.Module):
    """Only buffers, which follow the data: a codebook learned by moving averages. It is a Dropout's parent, too."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.randn(4, 4))
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.codes.lerp_(x[:4].detach(), 0.1)
        return self.drop(x + self.codes.mean(0))


LAYERS: dict[str, Any] = {
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)),
    "spectral norm by a hook": lambda: nn.utils.spectral_norm(nn.Linear(4, 4)),
    "spectral norm on weight norm": lambda: nn.utils.parametrizations.spectral_norm(
        nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    ),
    "batch norm": lambda: nn.BatchNorm1d(4),
    "batch norm without parameters": lambda: nn.BatchNorm1d(4, affine=False),
    "by hand": Counting,
    "by hand without parameters": lambda: Counting(affine=False),
    "codebook": Codebook,
    "in a block": lambda: nn.Sequential(nn.Linear(4, 4), nn.Sequential(Counting(), nn.Dropout()), Codebook()),
}


class Around(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.body = layer
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))  # type: ignore[no-any-return]


def fit(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    net.train()
    for _ in range(steps):
        optimizer.zero_grad()
        net(torch.randn(8, 4)).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_of_any_kind_is_held(kind: str, tmp_path: Path) -> None:
    net = Around(LAYERS[kind]())
    fit(net, decaying(net.parameters()))
    before = copy.deepcopy(net.state_dict())
    freeze(net, "body.*")
    optimizer = decaying(net.head.parameters())
    with frozen_proof(net, optimizer) as watched:
        fit(net, optimizer)
    buffers = {name for name, _ in net.named_buffers()}
    assert buffers <= set(watched)
    assert {n for n, t in net.state_dict().items() if not torch.equal(t, before[n])} == {
        "head.weight",
        "head.bias",
    }
    assert all(part.training for part in net.modules() if isinstance(part, nn.Dropout))

    registry = Registry(tmp_path / "r")
    with registry.run("x") as run:
        run.save(model=net, optimizer=optimizer)
    other = Around(LAYERS[kind]())
    again = decaying(other.head.parameters())
    registry["x"].restore(model=other, optimizer=again)
    assert set(frozen_names(other)) == set(frozen_names(net))
    with frozen_proof(other, again):
        fit(other, again)

    unfreeze(other)
    assert all(part.training for part in other.modules())
    fit(other, decaying(other.parameters()))
    assert any(not torch.equal(t, before[n]) for n, t in other.state_dict().items() if n in buffers)


def test_what_cannot_be_held_is_named() -> None:
    class Always(Counting):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.mean += 1
            return x * self.weight

    net = Around(Always())
    freeze(net, "body.*")
    with (
        pytest.raises(
            Thawed, match=r"body\.mean \(its Always or what calls it writes to it in evaluation mode"
        ),
        frozen_proof(net),
    ):
        fit(net, decaying(net.head.parameters()))


def test_freezing_by_hand_is_proved_too() -> None:
    net = Around(Counting())
    net.body.requires_grad_(False)
    with pytest.raises(Thawed, match=r"body\.mean \(its Counting was in training mode\)"), frozen_proof(net):
        fit(net, decaying(net.head.parameters()))


def test_statistics_that_are_to_go_on_break_no_proof() -> None:
    net = Around(Counting())
    freeze(net, "body.*", bn="update")
    before = net.body.mean.clone()
    with frozen_proof(net):
        fit(net, decaying(net.head.parameters()))
    assert not torch.equal(net.body.mean, before)


def test_a_buffer_beside_what_is_trained_is_not_held_and_that_is_said() -> None:
    net = Around(nn.Sequential(nn.Linear(4, 4), Counting()))
    found = freeze(net, ["body.0.*", "body.1.mean"])
    assert found.notes == ("body.1.mean is not held, as its layer has parameters that are trained",)


def test_training_that_was_frozen_by_hand_goes_on_as_it_was(tmp_path: Path) -> None:
    """Statistics that went on before the save go on after it."""
    registry, net = Registry(tmp_path / "r"), Around(nn.BatchNorm1d(4))
    net.body.requires_grad_(False)
    optimizer = decaying(net.head.parameters())
    with registry.run("x") as run:
        run.save(model=net, optimizer=optimizer)
    other = Around(nn.BatchNorm1d(4))
    registry["x"].restore(model=other, optimizer=decaying(other.head.parameters()))
    other.train()
    assert [name for name, p in other.named_parameters() if not p.requires_grad] == [
        "body.weight",
        "body.bias",
    ]
    assert other.body.training


def test_statistics_that_were_let_go_on_do_so_after_a_resume_and_the_proof_knows(tmp_path: Path) -> None:
    registry, net = Registry(tmp_path / "r"), Around(nn.BatchNorm1d(4))
    freeze(net, "body.*", bn="update")
    with registry.run("x") as run:
        run.save(model=net, optimizer=decaying(net.head.parameters()))
    assert registry["x"].provenance["going_on"] == {"model": ["body"]}
    other = Around(nn.BatchNorm1d(4))
    optimizer = decaying(other.head.parameters())
    registry["x"].restore(model=other, optimizer=optimizer)
    other.train()
    before = other.body.running_mean.clone()
    with frozen_proof(other, optimizer):
        fit(other, optimizer)
    assert not torch.equal(other.body.running_mean, before)


def test_a_held_layer_with_layers_of_its_own_can_be_copied_and_pickled() -> None:
    net = Around(LAYERS["in a block"]())
    freeze(net, "body.*")
    for other in (copy.deepcopy(net), torch.load(_saved(net), weights_only=False)):
        other.eval().train()
        with frozen_proof(other):
            fit(other, decaying(other.head.parameters()))
        assert other.body[2].drop.training


def _saved(net: nn.Module) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return file


def test_a_parametrized_layer_counts_as_one() -> None:
    net = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4), nn.Linear(4, 4)
    )
    freeze(net, "first:2")
    assert {n for n, p in net.named_parameters() if p.requires_grad} == {"2.weight", "2.bias"}


def without_parameters() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 2))


@pytest.mark.parametrize("patterns", ["first:1", "first:-1", ["0.*", "1.*"], ["0.*", "1.running_*"]])
def test_statistics_of_a_layer_without_parameters_are_held_with_those_before_it(patterns: Any) -> None:
    net = without_parameters()
    assert freeze(net, patterns).held == ("1",)
    before = net[1].running_mean.clone()
    with frozen_proof(net) as watched:
        net.train()
        net(torch.randn(8, 4))
    assert {"1.running_mean", "1.running_var"} <= set(watched)
    assert torch.equal(net[1].running_mean, before)
    unfreeze(net, patterns)
    net.train()
    net(torch.randn(8, 4))
    assert not torch.equal(net[1].running_mean, before)


def test_a_layer_without_parameters_that_was_loaded_is_held() -> None:
    target = without_parameters()
    source = {name: value for name, value in without_parameters().state_dict().items() if "num_" not in name}
    plan_transfer(source, target, expect={"2.*": "skip"}, freeze="loaded").apply(target)
    before = target[1].running_mean.clone()
    target.train()
    target(torch.randn(8, 4))
    assert torch.equal(target[1].running_mean, before)


class OneOfTwo(nn.Module):
    """A layer with two parameters, and a buffer that it writes in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
        self.register_buffer("m", torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.m.add_(1)
        return x * self.w + self.b


def test_a_buffer_that_was_named_and_cannot_be_held_is_in_the_proof() -> None:
    net = nn.Sequential(OneOfTwo())
    assert freeze(net, ["0.w", "0.m"]).notes == (
        "0.m is not held, as its layer has parameters that are trained",
    )
    with pytest.raises(Thawed, match=r"0\.m"), frozen_proof(net):
        net(torch.ones(2, 3))


def test_a_layer_with_two_names_is_held_by_either() -> None:
    shared = nn.BatchNorm1d(3)
    net = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(shared), "head": nn.Linear(3, 1)})
    found = freeze(net, "b.*")
    assert found.held == ("b.0",)
    assert not [note for note in found.notes if "not held" in note]
    net.train()
    assert not shared.training
    assert len(freeze(net, ["a.*", "b.*"]).held) == 1


def test_statistics_of_what_is_held_may_be_let_go_on_later() -> None:
    net = Around(nn.BatchNorm1d(4))
    freeze(net, "body.*")
    freeze(net, "body.*", bn="update")
    net.train()
    assert net.body.training


@pytest.mark.parametrize(
    ("patterns", "options", "told"),
    [
        ("body.*", {"bn": "Freeze"}, "expected 'freeze' or 'update'"),
        (None, {}, "a NoneType is not a pattern of names"),
        (nn.Linear(1, 1), {}, "a Linear is not a pattern of names"),
        ([3], {}, "a int is not a pattern of names"),
    ],
)
def test_what_is_no_pattern_is_refused(patterns: Any, options: dict[str, Any], told: str) -> None:
    with pytest.raises(Invalid, match=told):
        freeze(Around(nn.BatchNorm1d(4)), patterns, **options)


# -- the proof -----------------------------------------------------------------------------------------------


def test_the_proof_holds_when_nothing_moves() -> None:
    net = Net()
    freeze(net, "body.*")
    optimizer = decaying(net.parameters())
    with frozen_proof(net, optimizer) as names:
        train(net, optimizer)
    assert "body.1.running_mean" in names


def write(net: Net, optimizer: torch.optim.Optimizer) -> None:
    with torch.no_grad():
        net.body[0].weight.add_(1)


def stale(net: Net, optimizer: torch.optim.Optimizer) -> None:
    net.body[0].weight.grad = torch.ones_like(net.body[0].weight)
    optimizer.step()


def statistics(net: Net, optimizer: torch.optim.Optimizer) -> None:
    nn.Module.train(net.body[1], True)
    net.body[1].training = True
    net(torch.randn(8, 1, 6, 6))


def thawed(net: Net, optimizer: torch.optim.Optimizer) -> None:
    unfreeze(net, "body.0.*")
    train(net, optimizer)


def tied(net: Net, optimizer: torch.optim.Optimizer) -> None:
    net.other = nn.Linear(1, 1, bias=False)
    net.other.weight = nn.Parameter(net.body[0].weight.detach())  # the same memory
    with torch.no_grad():
        net.other.weight.add_(1)


def swapped(net: Net, optimizer: torch.optim.Optimizer) -> None:
    net.body[0] = nn.Conv2d(1, 4, 3)


def replaced(net: Net, optimizer: torch.optim.Optimizer) -> None:
    net.body[0] = nn.Identity()


@pytest.mark.parametrize(
    ("act", "told"),
    [
        (write, r"body.0.weight \(it is in the optimizer"),
        (stale, r"body.0.weight \(it is in the optimizer, with a stale gradient\)"),
        (statistics, r"body.1.running_mean \(its BatchNorm2d was in training mode\)"),
        (thawed, r"body.0.weight \(it was thawed\)"),
        (tied, r"body.0.weight \(it shares memory with other.weight, which is trainable\)"),
        (swapped, r"body.0.weight \(it was replaced or removed\)"),
        (replaced, r"body.0.weight \(it was replaced or removed\)"),
    ],
)
def test_the_proof_names_what_moved_and_why(act: Any, told: str) -> None:
    net = Net()
    freeze(net, "body.*")
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    with pytest.raises(Thawed, match=told), frozen_proof(net, optimizer):
        act(net, optimizer)


def test_a_proof_of_nothing_is_refused() -> None:
    with pytest.raises(Invalid, match="nothing is frozen"), frozen_proof(Net()):
        pass


# -- optimizers ----------------------------------------------------------------------------------------------


def test_an_optimizer_is_checked_by_identity() -> None:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    assert check_optimizer(net, optimizer) == []
    freeze(net, "body.0.*")
    net.head = nn.Linear(4, 2)
    optimizer.param_groups[0]["params"].append(net.body[1].weight)
    found = {(problem.problem, problem.name) for problem in check_optimizer(net, optimizer)}
    assert found == {
        ("frozen", "body.0.weight"),
        ("frozen", "body.0.bias"),
        ("stale", "parameter 4 of shape [2, 4]"),
        ("stale", "parameter 5 of shape [2]"),
        ("duplicated", "body.1.weight"),
        ("missing", "head.weight"),
        ("missing", "head.bias"),
    }


def test_parameter_groups() -> None:
    net = Net()
    groups = param_groups(net, 0.1, weight_decay=0.01, rates={"body.*": 0.001})
    found = {name: (g["lr"], g["weight_decay"]) for g in groups for name in g["param_names"]}
    assert found == {
        "body.0.weight": (0.001, 0.01),
        "body.0.bias": (0.001, 0.0),
        "body.1.weight": (0.001, 0.0),
        "body.1.bias": (0.001, 0.0),
        "head.weight": (0.1, 0.01),
        "head.bias": (0.1, 0.0),
    }
    decayed = param_groups(net, 0.1, layer_decay=0.5)
    assert {g["lr"] for g in decayed} == {0.05, 0.1}
    torch.optim.AdamW(groups)
    with pytest.raises(Invalid, match="among what is trainable, matches nothing"):
        param_groups(net, 0.1, rates={"bdy.*": 1.0})
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(Invalid, match="no parameter is trainable"):
        param_groups(net, 0.1)


def test_the_state_of_an_optimizer_follows_names() -> None:
    net = Net()
    optimizer = decaying(net.parameters())
    train(net, optimizer)
    state, names = optimizer.state_dict(), [name for name, _ in net.named_parameters()]
    freeze(net, "body.*")
    smaller = decaying([p for p in net.parameters() if p.requires_grad])
    dropped = remap_optimizer(state, names, smaller, net)
    assert dropped == ["body.0.bias", "body.0.weight", "body.1.bias", "body.1.weight"]
    for parameter in (net.head.weight, net.head.bias):
        assert torch.equal(smaller.state[parameter]["exp_avg"], optimizer.state[parameter]["exp_avg"])
    with pytest.raises(Incompatible, match="3 names for the 6 parameters"):
        remap_optimizer(state, names[:3], smaller, net)
