"""The training loop: what it learns, what it writes for TensorBoard, and how it stops and goes on."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import Subset

from registry import Registry, Run
from registry.catalog.versions import list_versions
from registry.models import data as data_sets
from registry.models import training
from registry.models.data import Data
from registry.models.measuring import evaluate
from registry.models.training import Epoch, TrainConfig, Training, TrainingState, Watcher, train
from registry.store.errors import Incompatible, NotFound


@pytest.fixture(scope="module")
def digits() -> Data:
    return data_sets.load("digits")


@pytest.fixture
def few(digits: Data) -> Data:
    return Data("digits", Subset(digits.train, range(200)), Subset(digits.test, range(60)), *few_of(digits))


def few_of(digits: Data) -> tuple[tuple[str, ...], int, str]:
    return digits.classes, digits.channels, digits.digest


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "r")


def states_equal(registry: Registry, left: str, right: str) -> bool:
    a, b = (registry[name].load(["model", "optimizer", "scheduler"]) for name in (left, right))
    one, other = (registry.store.manifest(registry[name].id) for name in (left, right))
    digests = [{path: m.tensors[slot].digest for path, slot in m.slots} for m in (one, other)]
    for key in digests:
        for path in [path for path in key if path.startswith(("rng", "loader"))]:
            del key[path]
    return digests[0] == digests[1] and a["scheduler"] == b["scheduler"]


def test_lenet5_learns_the_digits(registry: Registry, digits: Data) -> None:
    run = train(registry, TrainConfig(), digits)
    best = registry["lenet5@best"]
    assert best.metrics["accuracy"] >= 0.97
    _, accuracy, _ = evaluate(registry.build("lenet5@best"), digits.test)
    assert accuracy == best.metrics["accuracy"]
    assert [version.epoch for version in list_versions(registry.catalog, "lenet5")[0]] == [*range(10, 0, -1)]
    assert run.name == "lenet5/run-1"
    steps = [event.step for event in events(run).Scalars("Training/Accuracy")]
    assert steps == [*range(9, 451, 9)]  # a fifth of an epoch of 45 batches


def events(run: Run) -> EventAccumulator:
    found = EventAccumulator(str(run.folder), size_guidance={"scalars": 0, "histograms": 0, "images": 0})
    found.Reload()
    return found


def test_tensorboard_reads_everything_that_was_written(registry: Registry, few: Data) -> None:
    config = TrainConfig(epochs=2, log_every=3, batch_size=32, lr=0.01, warmup_steps=4)
    run = train(registry, config, few)
    found = events(run)
    tags = found.Tags()
    assert set(tags["scalars"]) >= {
        *("Training/Accuracy", "Training/Loss", "Training/Learning Rate"),
        *("Testing/Accuracy", "Testing/Loss", "hparam/accuracy"),
    }
    losses = [(event.step, event.value) for event in found.Scalars("Training/Loss")]
    assert [step for step, _ in losses] == [3, 6, 7, 10, 13, 14]  # 7 batches an epoch
    logged = re.findall(r"batch\[\d+/7\] -- Acc: ([\d.]+) -- loss: ([\d.]+)", run.log_file.read_text())
    assert [f"{value:.4f}" for _, value in losses] == [loss for _, loss in logged]
    rates = [event.value for event in found.Scalars("Training/Learning Rate")]
    assert rates[0] == pytest.approx(0.01 * 3 / 5)
    assert rates[-1] < rates[1]
    versions = list_versions(registry.catalog, "lenet5")[0][::-1]
    tested = [(event.step, round(event.value, 6)) for event in found.Scalars("Testing/Accuracy")]
    assert tested == [(v.epoch, round(v.metrics["accuracy"], 6)) for v in versions]
    assert tags["graph"]
    assert {event.step for event in found.Histograms("Weights/conv.0.weight")} == {1, 2}
    (picture,) = found.Images("Testing/Predictions")
    assert picture.encoded_image_string.startswith(b"\x89PNG")
    assert (picture.width, picture.height) > (400, 200)
    (points,) = run.folder.rglob("tensors.tsv")
    names = (points.parent / "metadata.tsv").read_text().split()
    rows = points.read_text().splitlines()
    assert (len(rows), len(names), len(rows[0].split("\t"))) == (60, 60, 10)
    assert (points.parent / "sprite.png").is_file()
    assert str(points.relative_to(run.folder)) in (run.folder / "projector_config.pbtxt").read_text()
    assert "_hparams_/session_start_info" in found.summary_metadata
    logs = [path for path in registry.root.glob("runs/**/events*") if path.parent != run.folder]
    assert logs == []  # hparams are in the same run


def test_every_method_of_the_writer_works(registry: Registry) -> None:
    with registry.run("x") as run:
        writer = run.writer
        writer.add_scalars("both", {"a": 1.0, "b": 2.0}, 1)
        writer.add_images("images", torch.rand(2, 3, 8, 8), 1)
        writer.add_text("text", "hello", 1)
        writer.add_pr_curve("curve", torch.tensor([0, 1, 1]), torch.tensor([0.1, 0.8, 0.6]), 1)
    found = events(run)
    assert "images" in found.Tags()["images"]
    assert {"text/text_summary", "curve"} <= set(found.Tags()["tensors"])
    assert sorted(path.name for path in run.folder.iterdir() if path.is_dir()) == ["both_a", "both_b"]


# -- stopping and going on -----------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_training_is_repeatable_and_resumes_exactly(registry: Registry, few: Data, optimizer: str) -> None:
    config = TrainConfig(epochs=3, optimizer=optimizer, lr=0.01)  # type: ignore[arg-type]
    train(registry, config, few, name="whole")
    train(registry, config, few, name="again")
    assert states_equal(registry, "whole", "again")
    train(registry, config, few, name="rest", resume=registry["whole:v1"])
    assert [v.epoch for v in list_versions(registry.catalog, "rest")[0]] == [3, 2]
    assert states_equal(registry, "whole", "rest")
    assert registry["rest:v1"].lineage[0]["parent"] == registry["whole:v1"].id


def test_the_loss_of_a_version_is_the_mean_of_its_epoch(registry: Registry, few: Data) -> None:
    run = train(registry, TrainConfig(epochs=2, batch_size=64, log_every=1), few)
    losses = [event.value for event in events(run).Scalars("Training/Loss")]
    assert len(losses) == 8  # Three batches of 64 samples and one of 8, twice.
    for epoch in (1, 2):
        of_batches = losses[4 * epoch - 4 : 4 * epoch]
        mean = sum(loss * count for loss, count in zip(of_batches, (64, 64, 64, 8), strict=True)) / 200
        assert registry[f"lenet5:v{epoch}"].loss == pytest.approx(mean, rel=1e-6)
    log = (run.folder / "run.log").read_text()
    assert f"-- training loss: {registry['lenet5:v2'].loss:.4f}" in log


class Interrupting(Watcher):
    """Presses Ctrl-C at a step."""

    def __init__(self, at: int, times: int = 1) -> None:
        self._at, self._times = at, times

    def steps(self, training: Training, state: TrainingState, run: Any) -> None:
        if state.step == self._at:
            for _ in range(self._times):
                signal.raise_signal(signal.SIGINT)


class Epochs(Watcher):
    """Keeps what it is told of each epoch."""

    def __init__(self) -> None:
        self.found: list[Epoch] = []

    def finishes(self, epoch: Epoch, run: Any) -> None:
        self.found.append(epoch)


@pytest.mark.parametrize("at", [1, 6, 7, 8])  # of 7 batches an epoch
def test_an_interrupted_training_resumes_at_the_very_batch(registry: Registry, few: Data, at: int) -> None:
    config = TrainConfig(epochs=2, lr=0.01)
    train(registry, config, few, name="whole")

    with pytest.raises(KeyboardInterrupt):
        train(registry, config, few, name="part", watcher=Interrupting(at))
    assert registry["part"].step == at
    assert registry.runs["part/run-1"].state == "interrupted"
    train(registry, config, few, name="part", resume=registry["part"])
    assert registry["part"].step == 14
    assert states_equal(registry, "whole", "part")
    assert registry["part"].loss == registry["whole"].loss


@pytest.mark.parametrize("at", [3, 10])  # of 7 batches an epoch
def test_the_means_of_an_epoch_are_those_of_a_training_in_one_go(
    registry: Registry, few: Data, at: int
) -> None:
    config = TrainConfig(epochs=2, lr=0.01)
    whole, part = Epochs(), Epochs()
    train(registry, config, few, name="whole", watcher=whole)
    with pytest.raises(KeyboardInterrupt):
        train(registry, config, few, name="part", watcher=Interrupting(at))
    train(registry, config, few, name="part", resume=registry["part"], watcher=part)
    assert [one.number for one in whole.found] == [1, 2]
    told = {one.number: (one.loss, one.accuracy, one.test_loss, one.test_accuracy) for one in part.found}
    assert (
        told.items()
        <= {
            one.number: (one.loss, one.accuracy, one.test_loss, one.test_accuracy) for one in whole.found
        }.items()
    )
    assert max(told) == 2
    assert 0 < whole.found[0].accuracy < whole.found[1].accuracy <= 1
    assert whole.found[1].loss == registry["whole"].loss
    assert whole.found[1].test_accuracy == registry["whole"].metrics["accuracy"]


def test_a_second_interrupt_comes_through_at_once(registry: Registry, few: Data) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(registry, TrainConfig(epochs=1), few, watcher=Interrupting(3, times=2))
    with pytest.raises(NotFound):
        registry["lenet5"]
    assert signal.getsignal(signal.SIGINT) is before


def test_patience_ends_a_training_that_learns_no_more(registry: Registry, few: Data) -> None:
    train(registry, TrainConfig(epochs=30, lr=1e-9, patience=2), few)
    assert registry["lenet5"].epoch == 3


def test_evaluation_changes_nothing(few: Data) -> None:
    from registry.models import LeNet5

    net = LeNet5().train()
    state, generator = {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()
    loss, accuracy, logits = evaluate(net, few.test, 7)
    assert net.training
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(state[name], tensor) for name, tensor in net.state_dict().items())
    x = torch.stack([few.test[i][0] for i in range(60)])
    y = torch.tensor([int(few.test[i][1]) for i in range(60)])
    expected = net.eval()(x)
    assert torch.allclose(logits, expected, atol=1e-5)
    assert accuracy == int((expected.argmax(1) == y).sum()) / 60
    assert loss == pytest.approx(torch.nn.functional.cross_entropy(expected, y).item(), abs=1e-5)


def test_what_cannot_be_resumed_is_refused(registry: Registry, few: Data) -> None:
    train(registry, TrainConfig(epochs=1), few)
    with pytest.raises(
        Incompatible, match="lenet5:v1 is complete after 1 epochs; to train on: --set epochs=2"
    ):
        train(registry, TrainConfig(epochs=1), few, resume=registry["lenet5"])
    other = Data("other", few.train, few.test, few.classes, 1, "ab" * 32)
    with pytest.raises(Incompatible, match="trained on other data than other"):
        train(registry, TrainConfig(epochs=2), other, resume=registry["lenet5"])
    with pytest.raises(Incompatible, match=r"fc.7.weight is not in the checkpoint"):
        train(registry, TrainConfig(epochs=2, model="lenet6"), few, resume=registry["lenet5"])
    with pytest.raises(Incompatible, match="is a SGD, the checkpoint has the state of a AdamW"):
        train(registry, TrainConfig(epochs=2, optimizer="sgd"), few, resume=registry["lenet5"])
    assert len(list_versions(registry.catalog, "lenet5")[0]) == 1


def test_ctrl_c_while_a_batch_is_measured_is_not_lost(
    registry: Registry, few: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading a loss waits for the device, so that this is where most signals arrive."""
    measured, calls = training.mean_over_ranks, []

    def interrupted(*given: Any) -> tuple[float, float, int | None]:
        calls.append(given)
        found = measured(*given)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return found

    monkeypatch.setattr(training, "mean_over_ranks", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(registry, TrainConfig(epochs=2), few)
    assert registry["lenet5"].step == 2
