"""Loaders of torchdata and Accelerate inside a `ResumableLoader`: training goes on bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from registry import Registry, ResumableLoader
from registry.store.errors import Incompatible

STEPS = 26
SAMPLES, BATCH = 40, 4


class Rows(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Samples that may draw random numbers, as an augmentation does."""

    def __init__(self, draws: bool) -> None:
        self.draws = draws

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        return (torch.randn(8) if self.draws else torch.zeros(8)) + i / SAMPLES, torch.tensor(i % 2)


class Stream(IterableDataset[tuple[torch.Tensor, torch.Tensor]]):
    """A stream with a cursor and an epoch of its own, on which its order depends."""

    def __init__(self) -> None:
        self.epoch = self.at = 0

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        while self.at < SAMPLES:
            self.at += 1
            i = order[self.at - 1]
            yield torch.zeros(8) + i / SAMPLES, torch.tensor(i % 2)
        self.epoch, self.at = self.epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.at = state["epoch"], state["at"]


def torchdata(data: str, workers: int = 0, own: bool = False) -> Callable[[int], ResumableLoader]:
    def make(seed: int) -> ResumableLoader:
        if data == "stream":
            return ResumableLoader(StatefulDataLoader(Stream(), batch_size=BATCH, num_workers=workers))
        generator = torch.Generator().manual_seed(seed) if own else None
        return ResumableLoader(
            StatefulDataLoader(
                Rows(data == "draws"),
                batch_size=BATCH,
                shuffle=True,
                num_workers=workers,
                generator=generator,
            )
        )

    return make


def accelerated(
    stateful: bool = False, workers: int = 0, seedable: bool = False
) -> Callable[[int], ResumableLoader]:
    def make(seed: int) -> ResumableLoader:
        chosen = DataLoaderConfiguration(use_stateful_dataloader=stateful, use_seedable_sampler=seedable)
        loader = DataLoader(Rows(draws=True), batch_size=BATCH, shuffle=True, num_workers=workers)
        return ResumableLoader(Accelerator(cpu=True, dataloader_config=chosen).prepare(loader))

    return make


class Training:
    """A network with dropout, trained for some steps over a loader."""

    def __init__(self, make: Callable[[int], ResumableLoader], seed: int) -> None:
        torch.manual_seed(seed)
        self.network = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 2))
        self.optimizer = torch.optim.AdamW(self.network.parameters(), 1e-2)
        self.loader = make(seed)

    def run(
        self, step: int, save: Callable[[int, bool], object] = lambda step, between: None
    ) -> torch.Tensor:
        """Train up to `STEPS`; `save` is called after each step, and between epochs."""
        while step < STEPS:
            for x, y in self.loader:
                if step == STEPS:
                    break
                loss = nn.functional.cross_entropy(self.network(x), y)
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                step += 1
                save(step, False)
            else:
                save(step, True)
        return torch.cat([parameter.detach().flatten() for parameter in self.network.parameters()])

    @property
    def components(self) -> dict[str, Any]:
        return {"model": self.network, "optimizer": self.optimizer, "loader": self.loader}


LOADERS = {
    "torchdata": torchdata("plain"),
    "torchdata, data that draw": torchdata("draws"),
    "torchdata, a generator of its own": torchdata("draws", own=True),
    "torchdata, workers": torchdata("draws", workers=2),
    "torchdata, a stream": torchdata("stream"),
    "torchdata, a stream, one worker": torchdata("stream", workers=1),
    "accelerate": accelerated(),
    "accelerate, workers": accelerated(workers=2),
    "accelerate, a seedable sampler": accelerated(seedable=True),
    "accelerate, torchdata": accelerated(stateful=True),
    "accelerate, torchdata, a seedable sampler": accelerated(stateful=True, seedable=True),
}


@pytest.mark.parametrize("name", LOADERS)
def test_training_goes_on_exactly(tmp_path: Path, name: str) -> None:
    """From the middle of an epoch, its last batch, and between two; saving changes nothing."""
    make, registry = LOADERS[name], Registry(tmp_path / "r")
    expected = Training(make, seed=0).run(0)
    training, saved = Training(make, seed=0), []
    with registry.run("net") as run:

        def save(step: int, between: bool) -> None:
            if (step, between) in ((3, False), (14, False), (20, False), (20, True)):
                run.save(**training.components, step=step)
                saved.append(step)

        assert torch.equal(training.run(0, save), expected), "saving changed the training"
    assert saved == [3, 14, 20, 20]
    wrong = []
    for version in registry.versions("net"):
        going_on = Training(make, seed=99)
        torch.manual_seed(777)
        registry[version.name].restore(**going_on.components)
        assert version.step is not None
        if not torch.equal(going_on.run(version.step), expected):
            wrong.append(version.name)
    assert wrong == []


def test_saving_before_the_first_epoch_changes_nothing(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "r")
    for make in (torchdata("stream"), torchdata("draws"), accelerated(stateful=True)):
        expected = Training(make, seed=0).run(0)
        training = Training(make, seed=0)
        with registry.run("net") as run:
            run.save(**training.components, step=0)
        assert torch.equal(training.run(0), expected)
        going_on = Training(make, seed=1)
        registry["net"].restore(**going_on.components)
        assert torch.equal(going_on.run(0), expected)
        with registry.run("net") as run:
            again = Training(make, seed=2)
            registry["net"].restore(**again.components)
            run.save(**again.components, step=0)
        last = Training(make, seed=3)
        registry["net"].restore(**last.components)
        assert torch.equal(last.run(0), expected)


def test_another_kind_of_loader_is_refused(tmp_path: Path) -> None:
    stream, plain = torchdata("stream")(0), torchdata("plain")(0)
    next(iter(stream))
    next(iter(plain))
    with pytest.raises(
        Incompatible, match="the recorded loader keeps the state of its data set, this one does not"
    ):
        plain.load_state_dict(stream.state_dict())
    with pytest.raises(
        Incompatible, match="the present loader keeps the state of its data set, the recorded one"
    ):
        stream.load_state_dict(plain.state_dict())


def test_a_data_set_with_a_state_in_a_plain_loader_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    ResumableLoader(DataLoader(Stream(), batch_size=BATCH))
    assert "the data set has a state_dict(), which a DataLoader does not keep" in caplog.text
