"""Exact resume: k epochs, a new process, and the rest end bit for bit where training in one go ends."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, TensorDataset

from registry import Registry, ResumableLoader, freeze, unfreeze
from registry.store.errors import Incompatible, Invalid, Unsupported

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01),
    "adadelta": lambda p: torch.optim.Adadelta(p),
    "adagrad": lambda p: torch.optim.Adagrad(p),
    "adamax": lambda p: torch.optim.Adamax(p),
    "asgd": lambda p: torch.optim.ASGD(p),
    "nadam": lambda p: torch.optim.NAdam(p),
    "radam": lambda p: torch.optim.RAdam(p),
    "rmsprop": lambda p: torch.optim.RMSprop(p, momentum=0.9, centered=True),
    "rprop": lambda p: torch.optim.Rprop(p),
    "lbfgs": lambda p: torch.optim.LBFGS(p, 0.1, max_iter=2),
    "adafactor": lambda p: torch.optim.Adafactor(p, 0.01),
    "muon": lambda p: torch.optim.Muon([one for one in p if one.dim() == 2], 0.01),
}


def test_every_optimizer_of_torch_is_covered() -> None:
    theirs = {
        name.lower()
        for name, kind in vars(torch.optim).items()
        if isinstance(kind, type)
        and issubclass(kind, torch.optim.Optimizer)
        and kind is not torch.optim.Optimizer
    }
    assert theirs - {"sparseadam"} <= set(OPTIMIZERS)  # which takes sparse gradients only: tested below


class Noisy(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Samples with augmentation by all three generators."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(40, 6, generator=generator)
        self.y = (self.x.sum(1) > 0).long()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        noise = random.random() + float(np.random.rand()) + torch.rand(6)
        return self.x[i] + 0.1 * noise, self.y[i]


class Training:
    """A whole training whose every part draws random numbers or has a state."""

    def __init__(self, optimizer: str, loader: dict[str, Any] | None = None) -> None:
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.3), nn.Linear(12, 2)
        )
        self.optimizer = OPTIMIZERS[optimizer](list(self.net.parameters()))
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 15)
        given = {"batch_size": 8, "shuffle": True, **(loader or {})}
        self.loader = ResumableLoader(DataLoader(given.pop("dataset", Noisy()), **given))

    @property
    def parts(self) -> dict[str, Any]:
        return {
            "model": self.net,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "loader": self.loader,
        }

    def steps(self) -> Iterator[int]:
        """Train on and on; gives the batch's number within the epoch."""
        while True:
            self.net.train()
            for x, y in self.loader:

                def closure(x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
                    self.optimizer.zero_grad()
                    loss = nn.functional.cross_entropy(self.net(x), y)
                    loss.backward()
                    return loss

                self.optimizer.step(closure)
                self.scheduler.step()
                yield self.loader.position

    def run(self, count: int) -> None:
        if count:
            steps = self.steps()
            for _ in range(count):
                next(steps)

    def values(self) -> list[Any]:
        flat: list[Any] = []

        def visit(value: Any) -> None:
            if isinstance(value, torch.Tensor):
                flat.append((value.dtype, tuple(value.shape), value.detach().contiguous().numpy().tobytes()))
            elif isinstance(value, dict):
                for key, item in value.items():
                    flat.append(key)
                    visit(item)
            elif isinstance(value, list | tuple):
                for item in value:
                    visit(item)
            else:
                flat.append(value)

        visit([self.net.state_dict(), self.optimizer.state_dict(), self.scheduler.state_dict()])
        return flat


def scramble() -> None:
    """What another program does to the generators before it resumes."""
    random.seed(99), np.random.seed(98), torch.manual_seed(97)
    random.random(), np.random.rand(3), torch.rand(5)


def check_resume(
    registry: Registry, optimizer: str, before: int, after: int, loader: dict[str, Any] | None = None
) -> None:
    whole = Training(optimizer, loader)
    whole.run(before + after)
    first = Training(optimizer, loader)
    first.run(before)
    with registry.run("net") as run:
        run.save(**first.parts)
    second = Training(optimizer, loader)
    scramble()
    registry["net"].restore(**second.parts)
    second.run(after)
    assert second.values() == whole.values()
    third = Training(optimizer, loader)
    third.run(after)
    assert third.values() != whole.values()  # so that the comparison says something


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("before", [5, 7])  # at the end of an epoch of 5 batches, and in the middle of one
def test_resuming_is_exact(registry: Registry, optimizer: str, before: int) -> None:
    check_resume(registry, optimizer, before, 6)


@pytest.mark.parametrize("before", [1, 5, 8])
@pytest.mark.parametrize(
    "loader",
    [
        {"num_workers": 2},
        {"num_workers": 1, "prefetch_factor": 4, "shuffle": False},
        {"generator": torch.Generator()},
        {"sampler": RandomSampler(range(40), generator=torch.Generator()), "shuffle": None},
        {"drop_last": True, "batch_size": 7},
    ],
    ids=["workers", "one worker ahead", "own generator", "own sampler", "last batch dropped"],
)
def test_resuming_is_exact_with_any_loader(registry: Registry, loader: dict[str, Any], before: int) -> None:
    for one in (loader.get("generator"), getattr(loader.get("sampler"), "generator", None)):
        if one is not None:
            one.manual_seed(5)
    if "generator" in loader or "sampler" in loader:  # which a new training makes anew
        sampler = "sampler" in loader

        def fresh() -> dict[str, Any]:
            generator = torch.Generator().manual_seed(5)
            if sampler:
                return {"sampler": RandomSampler(range(40), generator=generator), "shuffle": None}
            return {"generator": generator}

        whole = Training("sgd", fresh())
        whole.run(before + 6)
        first = Training("sgd", fresh())
        first.run(before)
        with registry.run("net") as run:
            run.save(**first.parts)
        second = Training("sgd", fresh())
        scramble()
        registry["net"].restore(**second.parts)
        second.run(6)
        assert second.values() == whole.values()
        return
    check_resume(registry, "sgd", before, 6, loader)


class Stream(IterableDataset[tuple[torch.Tensor, torch.Tensor]]):
    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for _ in range(20):
            yield torch.randn(6), torch.randint(2, ())


def test_resuming_in_a_stream_is_exact(registry: Registry) -> None:
    check_resume(registry, "adamw", 2, 3, {"dataset": Stream(), "shuffle": None})


PROGRAM = """
import sys
sys.path.insert(0, {folder!r})
import torch
from registry import Registry
from test_resume import Training

training = Training("adamw", {{"num_workers": 2}})
registry = Registry({root!r})
registry["net"].restore(**training.parts)
training.run(6)
torch.save(training.net.state_dict(), sys.argv[1])
"""


def test_a_new_process_goes_on_exactly(registry: Registry, tmp_path: Path) -> None:
    first = Training("adamw", {"num_workers": 2})
    first.run(7)
    with registry.run("net") as run:
        run.save(**first.parts, wait=False)
    text = PROGRAM.format(folder=str(Path(__file__).parent), root=str(registry.root))
    subprocess.run([sys.executable, "-c", text, str(tmp_path / "out.pt")], check=True)
    whole = Training("adamw", {"num_workers": 2})
    whole.run(13)
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.net.state_dict().items())


def test_sparse_adam_resumes_exactly(registry: Registry) -> None:
    def made() -> tuple[nn.Embedding, torch.optim.Optimizer]:
        torch.manual_seed(0)
        net = nn.Embedding(10, 3, sparse=True)
        return net, torch.optim.SparseAdam(net.parameters(), 0.1)

    def step(net: nn.Embedding, optimizer: torch.optim.Optimizer, i: int) -> None:
        optimizer.zero_grad()
        net(torch.tensor([i % 10, 3])).square().sum().backward()
        optimizer.step()

    net, optimizer = made()
    for i in range(3):
        step(net, optimizer, i)
    with registry.run("net") as run:
        run.save(model=net, optimizer=optimizer)
    other, resumed = made()
    registry["net"].restore(model=other, optimizer=resumed)
    for i in range(3, 6):
        step(net, optimizer, i)
        step(other, resumed, i)
    assert torch.equal(net.weight, other.weight)


def test_restoring_for_inference_leaves_the_generators_alone(registry: Registry) -> None:
    training = Training("sgd")
    with registry.run("net") as run:
        run.save(**training.parts)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    registry["net"].restore(model=training.net)
    assert torch.equal(torch.rand(4), expected)
    torch.manual_seed(3)
    registry["net"].restore(model=training.net, rng=True)
    assert not torch.equal(torch.rand(4), expected)


class Wrapped:
    """An optimizer that somebody put into a class of their own."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner

    def state_dict(self) -> dict[str, Any]:
        return {"inner": self.inner.state_dict(), "calls": 3}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state["inner"])


def test_a_wrapped_optimizer_means_that_training_goes_on(
    registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    def made() -> tuple[nn.Module, Wrapped]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 2))
        freeze(net, ["0.*", "1.*"])
        return net, Wrapped(torch.optim.AdamW(net[3].parameters(), 0.1))

    def go_on(net: nn.Module, optimizer: Wrapped) -> dict[str, torch.Tensor]:
        net.train()
        for _ in range(4):
            optimizer.inner.zero_grad()
            net(torch.randn(8, 6)).square().sum().backward()
            optimizer.inner.step()
        return {name: value.clone() for name, value in net.state_dict().items()}

    net, optimizer = made()
    go_on(net, optimizer)
    with registry.run("net") as run:
        run.save(model=net, optimizer=optimizer)
    expected = go_on(net, optimizer)

    other, again = made()
    unfreeze(other)
    torch.manual_seed(99)
    with caplog.at_level("INFO"):
        registry["net"].restore(model=other, optimizer=again)
    assert "net:v1 was restored: model, optimizer; 7 tensors of model are frozen again; " in caplog.text
    assert "the random numbers go on as they were" in caplog.text
    assert not other[0].weight.requires_grad
    found = go_on(other, again)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_what_cannot_be_resumed_exactly_is_refused(registry: Registry) -> None:
    data = TensorDataset(torch.randn(8, 2))
    with pytest.raises(Unsupported, match="persistent_workers=False"):
        ResumableLoader(DataLoader(data, num_workers=1, persistent_workers=True))
    with registry.run("net") as run, pytest.raises(Invalid, match=r"wrap it: ResumableLoader\(loader\)"):
        run.save(loader=DataLoader(data))
    with registry.run("net") as run:
        run.save(loader=ResumableLoader(DataLoader(data)))
    other = ResumableLoader(DataLoader(data, generator=torch.Generator()))
    with pytest.raises(Incompatible, match="0 generators of its own, this one 1"):
        registry["net"].restore(loader=other)


def test_a_loader_begins_anew_after_the_epoch_that_was_resumed(registry: Registry) -> None:
    data = TensorDataset(torch.arange(10))
    loader = ResumableLoader(DataLoader(data, 2))
    taken = iter(loader)
    next(taken), next(taken)
    assert (loader.position, len(loader)) == (2, 5)
    state = loader.state_dict()
    other = ResumableLoader(DataLoader(data, 2))
    other.load_state_dict(state)
    assert [batch[0].tolist() for batch in other] == [[4, 5], [6, 7], [8, 9]]
    assert len(list(other)) == 5
    assert other.position == 0
