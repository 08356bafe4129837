"""Accelerate: a training that is killed goes on bit for bit, alone, with workers, and in two processes."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from killed import examples_of, train
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from registry import Registry, check_resume
from registry.files.folder_writing import checkout
from registry.integrations import accelerate as ours
from registry.integrations import check_release
from registry.integrations.accelerate import RegistryTracker, load_state, save_state
from registry.store.errors import Incompatible, Invalid, Unsupported

SCRIPT = "train_accelerate.py"


@pytest.mark.parametrize(
    ("kill", "words", "count"),
    [(12, [], 1), (17, [], 1), (16, ["--early"], 1), (17, ["--workers", "2"], 1), (12, [], 2)],
    ids=["at an epoch's end", "inside a window", "during a save", "workers", "two processes"],
)
def test_a_training_that_is_killed_goes_on_exactly(
    tmp_path: Path, kill: int, words: list[str], count: int
) -> None:
    """Inside a window of accumulated gradients, too: each saves every 5 steps, and a window has 2."""
    whole = train(SCRIPT, tmp_path / "whole", *words, count=count)
    assert whole == train(SCRIPT, tmp_path / "silent", *words, "--silent", count=count)
    train(SCRIPT, tmp_path / "r", "--kill", kill, *words, count=count, killed=True)
    assert train(SCRIPT, tmp_path / "r", "--kill", kill, "--resume", *words, count=count) == whole
    registry = Registry(tmp_path / "r")
    saved = registry.versions("net")
    assert [version.step for version in saved][-1] == 5
    assert len({version.step for version in saved}) == len(saved) == 4
    assert registry["net"].lineage or registry["net"].parent
    assert registry.verify().problems == ()


def test_the_harness_tells_what_differs(tmp_path: Path) -> None:
    """Accelerate's own checkpoint inside a window, and ours without the loader, are not exact."""
    whole = train(SCRIPT, tmp_path / "whole")
    for words in (["--native"], ["--plain"]):
        root = tmp_path / words[0]
        train(SCRIPT, root, "--kill", 17, *words, killed=True)
        assert train(SCRIPT, root, "--kill", 17, "--resume", *words) != whole


STOCK = """
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

epochs = 2
torch.manual_seed(0)
torch.set_num_threads(1)
data = TensorDataset(torch.rand(160, 8), torch.randint(2, (160,)))
model = nn.Sequential(nn.Linear(8, 4), nn.Dropout(0.2), nn.Linear(4, 2))
optimizer = torch.optim.AdamW(model.parameters())
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 320)
accelerator = Accelerator(cpu=True)
model, optimizer, loader, scheduler = accelerator.prepare(
    model, optimizer, DataLoader(data, shuffle=True), scheduler
)


def trained(batch):
    optimizer.zero_grad()
    inputs, targets = batch
    loss = nn.functional.cross_entropy(model(inputs), targets)
    accelerator.backward(loss)
    optimizer.step()
    scheduler.step()
    return loss


"""
"""A training as Accelerate's quick tour has it, up to its loop."""


def test_the_loop_of_the_page_resumes_exactly(tmp_path: Path) -> None:
    (loop,) = examples_of("Accelerate")
    assert loop.count("...  #") == 1
    script = tmp_path / "train.py"
    script.write_text(STOCK + loop.replace("...  #", "loss = trained(batch)  #"))
    found = check_resume(script, at=250)
    found.assert_exact()
    assert (found.steps, found.resumed) == (320, 200)


def prepared(width: int = 2, networks: int = 1) -> Accelerator:
    accelerator = Accelerator(cpu=True)
    for _ in range(networks):
        net = nn.Linear(2, width)
        accelerator.prepare(net, torch.optim.SGD(net.parameters(), 0.1))
    return accelerator


def test_several_networks_are_lists(tmp_path: Path) -> None:
    registry, accelerator = Registry(tmp_path / "r"), prepared(networks=2)
    with registry.run("net") as run:
        save_state(run, accelerator)
    assert {"models", "optimizers"} <= set(registry["net"].components)
    before = [model.weight.clone() for model in accelerator._models]
    other = prepared(networks=2)
    load_state(registry["net"], other)
    assert all(torch.equal(a, b.weight) for a, b in zip(before, other._models, strict=True))
    with pytest.raises(Incompatible, match="models is a list of 3"):
        load_state(registry["net"], prepared(networks=3))


@pytest.mark.parametrize("networks", [1, 2])
def test_a_checkout_is_what_accelerate_loads(tmp_path: Path, networks: int) -> None:
    registry, accelerator = Registry(tmp_path / "r"), prepared(networks=networks)
    accelerator.step = 3
    with registry.run("net") as run:
        save_state(run, accelerator)
    drawn = torch.rand(3)
    before = [model.weight.clone() for model in accelerator._models]
    other = prepared(networks=networks)
    other.load_state(str(checkout(registry["net"], tmp_path / "out")))
    assert all(torch.equal(a, b.weight) for a, b in zip(before, other._models, strict=True))
    assert other.step == 3
    assert torch.equal(torch.rand(3), drawn)


def test_another_network_changes_nothing(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "r")
    with registry.run("net") as run:
        save_state(run, prepared())
    other = prepared(width=3)
    before = other._models[0].weight.clone()
    with pytest.raises(Incompatible, match="weight has shape"):
        load_state(registry["net"], other)
    assert torch.equal(other._models[0].weight, before)


def test_what_cannot_be_saved_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    registry = Registry(tmp_path / "r")
    with registry.run("net") as run:
        with pytest.raises(Invalid, match="prepared no network yet"):
            save_state(run, Accelerator(cpu=True))
        accelerator = prepared()
        with pytest.raises(Invalid, match="save_state takes a run first"):
            save_state(accelerator, run)  # type: ignore[arg-type]
        with pytest.raises(Invalid, match="load_state takes a checkpoint first"):
            load_state("net@latest", accelerator)  # type: ignore[arg-type]
        accelerator.prepare(DataLoader(TensorDataset(torch.ones(2))))
        with caplog.at_level(logging.WARNING):
            save_state(run, accelerator)
        assert "the position in the data is not saved" in caplog.text

        class Sharded:
            distributed_type = type("Kind", (), {"name": "FSDP"})

        with pytest.raises(Unsupported, match="networks under FSDP are sharded"):
            save_state(run, Sharded())  # type: ignore[arg-type]
    assert registry["net"].version == 1


def test_what_is_logged_is_in_the_events(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "r")
    with registry.run("net") as run:
        accelerator = Accelerator(cpu=True, log_with=RegistryTracker(run))
        accelerator.init_trackers("project", config={"lr": 0.1})
        accelerator.log({"loss": 0.5, "note": "x", "odd": object()}, step=1)
        accelerator.end_training()
    assert list(run.folder.glob("events.*"))


def test_a_release_that_is_not_supported_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ours.Accelerator is Accelerator
    for release in ("0.34.2", "2.0.0"):
        monkeypatch.setattr("registry.integrations.version", lambda name, release=release: release)
        with pytest.raises(
            ImportError, match=rf"accelerate {release} is not supported, accelerate>=1.10,<2 is"
        ):
            check_release("accelerate")
