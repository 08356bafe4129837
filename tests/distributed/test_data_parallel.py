"""Runs of several processes under `DistributedDataParallel`: one writes, all agree, and resuming is exact."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from together import start, together
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from registry import Checkpoint, Registry, RegistryError, ResumableLoader, Run, get_devices, parallelize
from registry.store import durable

EPOCHS, BATCH = 3, 4


class Training:
    """A small training with everything that resuming must restore: dropout, momentum, noise of each rank."""

    def __init__(self, registry: Registry, resume: Checkpoint | None = None) -> None:
        rank = dist.get_rank()
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))
        self.net = parallelize(net, get_devices("cpu"), exact=True)
        assert isinstance(self.net, DistributedDataParallel) == (dist.get_world_size() > 1)
        self.optimizer = torch.optim.Adam(self.net.parameters(), 0.01)
        data = TensorDataset(torch.randn(40, 6), torch.randn(40, 1))
        self.sampler = DistributedSampler(data, seed=5)
        self.loader = ResumableLoader(DataLoader(data, BATCH, sampler=self.sampler))
        for seed in (torch.manual_seed, random.seed, np.random.seed):
            seed(100 + rank)
        self.registry, self.resume = registry, resume
        self.epoch = 0
        if resume:
            resume.restore(**self.parts)
            self.epoch = resume.epoch or 0

    @property
    def parts(self) -> dict[str, Any]:
        return {"model": self.net, "optimizer": self.optimizer, "loader": self.loader}

    def run(self, name: str, stop: tuple[int, int] | None = None, **how: Any) -> None:
        """Train to the end, or up to a batch of an epoch."""
        with self.registry.run("net", name=name, resume=self.resume, monitor="loss", **how) as run:
            while self.epoch < EPOCHS:
                self.sampler.set_epoch(self.epoch)
                for inputs, labels in self.loader:
                    noise = torch.rand(1).item() + random.random() + np.random.rand()
                    loss = ((self.net(inputs) - labels) ** 2).mean() + 0 * noise
                    self.optimizer.zero_grad()
                    (loss * (1 + noise)).backward()
                    self.optimizer.step()
                    run.writer.add_scalar("loss", loss.item())
                    if stop == (self.epoch, self.loader.position):
                        self.save(run)
                        return
                self.epoch += 1
                self.save(run, wait=self.epoch == EPOCHS)

    def save(self, run: Run, wait: bool = True) -> None:
        run.save(**self.parts, epoch=self.epoch, loss=1.0 / (1 + self.epoch), wait=wait)


def fingerprint(checkpoint: Checkpoint) -> dict[str, str]:
    skipped = "loader/"  # which holds where an interrupted epoch began
    return {path: digest for path, _, _, digest in checkpoint.parameters() if not path.startswith(skipped)}


def train_and_resume(root: str) -> list[Any]:
    registry = Registry(root)
    Training(registry).run("whole")
    Training(registry).run("half", stop=(1, 3))  # with four processes that is the last batch of the epoch
    rest = Training(registry, registry["net"])
    rest.run("rest")
    return [registry["net"].name, rest.epoch]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_resuming_is_exact_and_one_process_writes(tmp_path: Path, count: int) -> None:
    assert together(count, train_and_resume, tmp_path) == [["net:v7", EPOCHS]] * count
    registry = Registry(tmp_path, create=False)
    ends = {info.name: info.state for info in registry.runs.find()}
    assert ends == dict.fromkeys(("net/whole", "net/half", "net/rest"), "finished")
    saved = [registry[f"net:v{version}"] for version in range(1, 8)]
    assert [one.run for one in saved] == ["net/whole"] * 3 + ["net/half"] * 2 + ["net/rest"] * 2
    assert [one.epoch for one in saved] == [1, 2, 3, 1, 1, 2, 3]
    whole = fingerprint(saved[2])
    assert any(path.startswith("ranks/1/rng") for path in whole) == (count > 1)
    assert fingerprint(saved[6]) == whole
    assert fingerprint(saved[5]) == fingerprint(saved[1])
    assert saved[0].provenance.get("processes", 1) == count
    for name in ends:
        folder = tmp_path / "runs" / name
        assert len(list(folder.glob("events*"))) == 1
        assert (folder / "run.log").read_text().count("began") == 1
    assert registry.verify().problems == ()


def go_on_with_another_number(root: str) -> list[str]:
    registry = Registry(root)
    found = []
    for name in ("net:v1", "net:v2"):
        try:
            Training(registry, registry[name])
            found.append("")
        except RegistryError as error:
            found.append(f"{type(error).__name__}: {error}")
    return [*found, str(torch.initial_seed())]


def save_between_and_in_the_middle(root: str) -> None:
    registry = Registry(root)
    training = Training(registry)
    with registry.run("net") as run:
        training.save(run)
    Training(registry).run("middle", stop=(0, 2))


def test_another_number_of_processes_resumes_between_epochs_only(tmp_path: Path) -> None:
    together(2, save_between_and_in_the_middle, tmp_path)
    results = together(1, go_on_with_another_number, tmp_path)
    (first, second, _) = results[0]
    assert first == ""
    assert second.startswith("Incompatible: net:v2: loader: 2 processes were in the middle of an epoch")
    assert second.endswith("nothing was changed; start 2, or resume from the end of an epoch")


# -- what goes wrong, on every rank --------------------------------------------------------------------------


class Bad:
    def __init__(self, value: object) -> None:
        self._value = value

    def state_dict(self) -> dict[str, object]:
        return {"value": self._value}


def failures(root: str) -> list[str]:
    registry = Registry(root)
    net = DistributedDataParallel(nn.Linear(2, 1))
    found: list[str] = []

    def note(attempt: Any) -> None:
        try:
            found.append(f"fine: {attempt()}")
        except RegistryError as error:
            found.append(f"{type(error).__name__}: {error}")

    with registry.run("net", name="one") as run:
        note(lambda: run.save(model=net).name)  # type: ignore[union-attr]
        note(lambda: run.save(model=net, bad=Bad(object())))
        note(lambda: run.save(model=net, bad=Bad(object()), wait=False))
        if dist.get_rank() == 0:
            durable.disk.write = _no_space  # type: ignore[method-assign]
        note(lambda: run.save(model=net, more={"new": torch.ones(3)}))
        note(lambda: run.save(model=net, more={"new": torch.ones(3)}, wait=False))
        note(run.wait)
        if dist.get_rank() == 0:
            del durable.disk.write  # type: ignore[method-assign]
        note(lambda: run.save(model=net).name)  # type: ignore[union-attr]
    note(lambda: registry.run("net", name="one"))
    note(lambda: registry.run("net", monitor="a b"))
    return found


def _no_space(fd: int, path: Path, data: memoryview) -> int:
    raise OSError(28, "No space left on device")


def test_what_one_cannot_write_is_the_same_error_on_all(tmp_path: Path) -> None:
    results = together(2, failures, tmp_path)
    assert results[0] == results[1]
    first, refused, refused_later, full, begun, full_later, second, taken, malformed = results[0]
    assert first == "fine: net:v1"
    assert refused.startswith("Unsupported: bad/value: a value of type builtins.object")
    assert refused_later == refused
    assert full.startswith("StorageError: ")
    assert "no space" in full
    assert begun == "fine: None"
    assert full_later.startswith("StorageError: ")
    assert second == "fine: net:v2"
    assert taken.startswith("Conflict: net has a run 'one' already")
    assert malformed.startswith("Invalid: ")
    registry = Registry(tmp_path, create=False)
    assert registry.verify().problems == ()


def killed_in_a_save(root: str, who: str) -> None:
    registry = Registry(root)
    net = DistributedDataParallel(nn.Linear(2, 1))
    run = registry.run("net", timeout=4).__enter__()
    run.save(model=net)
    with torch.no_grad():
        net.module.weight.fill_(7.0)
    if dist.get_rank() == int(who):
        if who == "0":
            durable.disk.rename = lambda *_: os._exit(9)  # type: ignore[method-assign]
        else:
            os._exit(9)
    began = time.monotonic()
    try:
        run.save(model=net)
    except RegistryError as error:
        assert time.monotonic() - began < 30
        Path(root, f"told-{dist.get_rank()}").write_text(str(error))
    time.sleep(1)
    os._exit(0)


@pytest.mark.parametrize("who", [0, 1])
def test_a_process_killed_in_a_save_leaves_the_earlier_checkpoint(tmp_path: Path, who: int) -> None:
    for process in start(3, killed_in_a_save, tmp_path, who):
        process.wait()
    told = {path.name: path.read_text() for path in tmp_path.glob("told-*")}
    assert set(told) == {f"told-{rank}" for rank in range(3) if rank != who}
    assert set(told.values()) == {
        f"net/run-1: a save: rank {who} did not come within 4 s, or has ended; its own messages say why"
    }
    registry = Registry(tmp_path, create=False)
    assert registry["net"].name == "net:v1"
    assert registry.verify().problems == ()
    registry.collect_garbage(grace=0)
    assert len(list(registry.store.pack_digests())) == 1
    assert not list((tmp_path / "tmp").iterdir())
    info = registry.runs["net/run-1"]
    assert registry.runs.is_lost(info)
