"""The training loop of the reference networks, in one file that you can read at once and copy.

It reads from top to bottom. `train` sets up the network and its optimizer, and restores a checkpoint if there is one.
Then it trains and tests, epoch after epoch, inside a run of the registry. `_train_epoch` is the loop over the batches.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

from registry import Config, Registry, ResumableLoader, Run, TransferPlan, parallelize
from registry.checkpoints.checkpoint import Checkpoint
from registry.live import freezing, ranks
from registry.live.builders import builder
from registry.models.data import Data, few
from registry.models.measuring import evaluate, evaluate_together, mean_over_ranks
from registry.models.pictures import draw_graph, draw_predictions
from registry.runs.process import Interrupts
from registry.store.errors import Incompatible
from registry.transfer.planning import plan_transfer
from registry.transfer.sources import Source

_logger = logging.getLogger(__name__)


class TrainConfig(Config):
    """Hyperparameters of a training.

    Attributes:
        model: the name of a registered network.
        data: the name of a data set, as `registry.models.data.load` takes it.
        epochs: passes over the data.
        batch_size: samples of a batch in each process.
        optimizer: the optimizer's name.
        lr: the highest learning rate; see `warmup_steps`.
        weight_decay: of the optimizer.
        momentum: of `sgd`.
        warmup_steps: steps in which the learning rate rises; by default a tenth of all steps.
        patience: epochs without a better accuracy before training stops; by default it does not stop early.
        log_every: steps from one line of the log to the next; by default 50, or a fifth of an epoch if that is fewer.
        workers: processes that load data.
        samples: the number of samples to train on; by default all.
        seed: the seed of the initial parameters, of the order of the data, and of its split.
    """

    model: str = "lenet5"
    data: str = "digits"
    epochs: int = Field(default=10, ge=1)
    batch_size: int = Field(default=32, ge=1)
    optimizer: Literal["adam", "adamw", "sgd"] = "adamw"
    lr: float = Field(default=2e-3, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    warmup_steps: int | None = Field(default=None, ge=0)
    patience: int | None = Field(default=None, ge=1)
    log_every: int | None = Field(default=None, ge=1)
    workers: int = Field(default=0, ge=0)
    samples: int | None = Field(default=None, ge=1)
    seed: int = 0


@dataclass
class TrainingState:
    """The progress of a training. A checkpoint records all of it.

    Attributes:
        epoch: complete epochs.
        step: complete steps, over all epochs.
        best: the best accuracy on the held-out data, from 0 to 1; -1 before the first epoch is complete.
        stale: epochs since the best one.
        seen: samples of the current epoch so far.
        summed: the sum of the losses of these samples.
        hits: how many of these samples were classified correctly, each before the step that trained on it.
    """

    epoch: int = 0
    step: int = 0
    best: float = -1.0
    stale: int = 0
    seen: int = 0
    summed: float = 0.0
    hits: float = 0.0

    @property
    def mean_accuracy(self) -> float:
        """The share of the samples of the current epoch so far that were classified correctly; NaN before the first."""
        return self.hits / self.seen if self.seen else float("nan")

    @property
    def mean_loss(self) -> float:
        """The mean loss of the samples of the current epoch so far; NaN before the first sample."""
        return self.summed / self.seen if self.seen else float("nan")

    def is_over(self, config: TrainConfig) -> bool:
        """Whether all epochs are complete, or the accuracy has not improved for `patience` epochs."""
        is_stale = config.patience is not None and self.stale >= config.patience
        return self.epoch >= config.epochs or is_stale


@dataclass(frozen=True)
class Training:
    """A training: the network, its data, and the objects that train it.

    Attributes:
        plain: the network as its builder made it.
        network: the same network, spread over all devices and processes. It takes images and labels, and gives losses
            and logits.
        loader: the batches of this process.
        sampler: the share of this process, if several processes train together.
        devices: the devices of this process. Several devices share each batch.
    """

    config: TrainConfig
    data: Data
    plain: nn.Module
    network: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    loader: ResumableLoader
    sampler: DistributedSampler[Any] | None
    devices: Sequence[torch.device]

    @property
    def components(self) -> dict[str, Any]:
        """The components that a checkpoint saves and restores."""
        return {
            "model": self.network,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "loader": self.loader,
        }

    @property
    def steps(self) -> int:
        """The number of steps of all epochs."""
        return self.config.epochs * len(self.loader)

    @property
    def log_every(self) -> int:
        """Steps from one line of the log to the next."""
        return self.config.log_every or max(1, min(50, len(self.loader) // 5))


class Epoch(NamedTuple):
    """A complete epoch.

    Attributes:
        number: of the epoch, from 1 on.
        loss, accuracy: means over the samples that it trained on.
        test_loss, test_accuracy: of the held-out data.
        seconds: that it took in this process, with the test.
        is_best: whether it has the best accuracy on the held-out data of this training so far. The alias `best` is the
            best of all versions of the model, which may be another.
    """

    number: int
    loss: float
    accuracy: float
    test_loss: float
    test_accuracy: float
    seconds: float
    is_best: bool


class Watcher:
    """Sees a training as it goes. Its methods do nothing; override those that you want."""

    def begins(self, training: Training, run: Run) -> None:
        """The run has begun."""

    def steps(self, training: Training, state: TrainingState, run: Run) -> None:
        """A step is complete."""

    def finishes(self, epoch: Epoch, run: Run) -> None:
        """An epoch is complete. Its version may not be stored yet; see `Run.saved`."""


def train(
    registry: Registry,
    config: TrainConfig,
    data: Data,
    *,
    name: str | None = None,
    resume: Checkpoint | None = None,
    source: Source | None = None,
    rename: Sequence[str] = (),
    allow_cast: bool = False,
    freeze: str | None = None,
    devices: Sequence[torch.device] = (torch.device("cpu"),),
    watcher: Watcher | None = None,
    **options: Any,
) -> Run:
    """Train a network, and record every epoch.

    The `loss` of a version is the mean over the samples of its epoch. The TensorBoard events have the loss of each
    logged batch. An interrupted training saves its state, so that it can be resumed at the next batch. Under `torchrun`
    each process takes its share of the data, and the leading process records the means over all processes.

    Args:
        registry: the registry that gets the versions.
        config: the hyperparameters.
        data: the data set.
        name: the model to save under; by default the name of the network.
        resume: a checkpoint to continue from, bit for bit.
        source: a reference, a file or `torchvision:NAME`. The training starts with those of its tensors that fit.
        rename, allow_cast: as `plan_transfer` takes them, for `source`.
        freeze: `loaded`, or a pattern of names of tensors.
        devices: the devices that `get_devices` gave. Several devices share each batch.
        watcher: told of each step and epoch.
        options: `keep_last`, `keep_best`, `keep_optimizer` and `compact` of `Registry.run`.

    Returns:
        The run, which has ended.

    Raises:
        Incompatible: if `resume` was trained on other data or is complete, or a process has no sample.
        KeyboardInterrupt: if the training was interrupted. The state is saved then.
    """
    data = _training_data(config, data)
    network = _network(config, data)
    rules = {"rename": rename, "allow_cast": allow_cast}
    plan = _first_weights(network, registry, resume=resume, source=source, freeze=freeze, rules=rules)
    training = _set_up(network, config=config, data=data, devices=devices)
    state = _resume(training, resume) if resume else TrainingState()
    with registry.run(
        name or config.model,
        config=config,
        dataset=data.digest,
        resume=resume,
        plan=plan,
        monitor="accuracy",
        mode="max",
        **options,
    ) as run:
        watcher = watcher or Watcher()
        watcher.begins(training, run)
        _show_beginning(training, run)
        with Interrupts() as interrupts:
            while not state.is_over(config):
                began = time.monotonic()
                _train_epoch(training, state, run, interrupts=interrupts, watcher=watcher)
                epoch = _finish_epoch(training, state, run)
                watcher.finishes(epoch._replace(seconds=time.monotonic() - began), run)
                interrupts.deliver()
        _show_end(training, state, run)
    return run


def _training_data(config: TrainConfig, data: Data) -> Data:
    """The data to train on: all of it, or `config.samples` of it.

    Raises:
        Invalid: if the data set has fewer samples.
        Incompatible: if there are fewer samples than processes.
    """
    if config.samples is not None:
        data = few(data, config.samples)
    samples, processes = len(data.train), ranks.count()  # type: ignore[arg-type]
    if samples < processes:
        raise Incompatible(
            f"{data.name} has {samples} samples to train on, too few for {processes} processes", "start fewer"
        )
    return data


def _network(config: TrainConfig, data: Data) -> nn.Module:
    """A new network for the data, the same in every process."""
    _seed(config.seed)
    network: nn.Module = builder(config.model).build(
        {"channels": data.channels, "classes": len(data.classes)}
    )
    return network


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _first_weights(
    network: nn.Module,
    registry: Registry,
    *,
    resume: Checkpoint | None,
    source: Source | None,
    freeze: str | None,
    rules: Mapping[str, Any],
) -> TransferPlan | None:
    """Load what fits of a source, and freeze what is asked for. Returns the plan of the load; None without a source.

    Args:
        resume: the checkpoint that is resumed. What was frozen in it is frozen again.
        rules: `rename` and `allow_cast` of `plan_transfer`.
    """
    if source is not None:
        plan = plan_transfer(source, network, everything=True, freeze=freeze, registry=registry, **rules)
        plan.apply(network, registry=registry)
        if ranks.mine() == 0:
            _logger.info("%s from %s", plan.summary, plan.source)
        return plan
    if freeze:
        freezing.freeze(network, freeze)
    # The optimizer takes only parameters that are not frozen, so this comes before it. `_resume` restores the tensors.
    elif resume and (frozen := resume.provenance.get("frozen", {}).get("model")):
        freezing.freeze_again(network, frozen, resume.provenance.get("going_on", {}).get("model", ()))
    return None


def _set_up(
    plain: nn.Module, *, config: TrainConfig, data: Data, devices: Sequence[torch.device]
) -> Training:
    """Spread a network over devices and processes, and make its optimizer, scheduler and loader."""
    network = parallelize(plain, devices, exact=True)
    optimizer = _optimizer(config, plain)
    sampler: DistributedSampler[Any] | None = None
    if ranks.count() > 1:
        # The networks of all processes are equal now. From here on each process draws its own random numbers.
        _seed(config.seed + ranks.mine())
        sampler = DistributedSampler(data.train, seed=config.seed)
    loader = ResumableLoader(
        DataLoader(
            data.train,
            config.batch_size,
            shuffle=sampler is None,
            sampler=sampler,
            num_workers=config.workers,
        )
    )
    schedule = _schedule(config, config.epochs * len(loader))
    return Training(
        config=config,
        data=data,
        plain=plain,
        network=network,
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, schedule),
        loader=loader,
        sampler=sampler,
        devices=devices,
    )


def _optimizer(config: TrainConfig, network: nn.Module) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, config.lr, momentum=config.momentum, weight_decay=config.weight_decay
        )
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return kind(parameters, config.lr, weight_decay=config.weight_decay)


def _schedule(config: TrainConfig, total: int) -> Callable[[int], float]:
    """The factor of the learning rate by step: a linear warm-up, then half a cosine down to zero.

    Args:
        total: the steps of all epochs.
    """
    warmup = config.warmup_steps if config.warmup_steps is not None else total // 10

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        done = (step - warmup) / max(1, total - warmup)
        return 0.5 * (1 + float(np.cos(np.pi * min(1.0, done))))

    return factor


def _resume(training: Training, checkpoint: Checkpoint) -> TrainingState:
    """Restore a checkpoint, with its random numbers and its place in the data. Returns its progress.

    Raises:
        Incompatible: if the checkpoint was trained on other data, or is complete.
    """
    config, data = training.config, training.data
    if checkpoint.provenance.get("dataset") not in (None, data.digest):
        raise Incompatible(
            f"{checkpoint.name} was trained on other data than {data.name}", "resume on the same"
        )
    epoch = checkpoint.epoch or 0
    if epoch >= config.epochs:
        raise Incompatible(
            f"{checkpoint.name} is complete after {epoch} epochs",
            f"to train on: --set epochs={epoch + config.epochs}",
        )
    checkpoint.restore(**training.components)
    recorded = checkpoint.extra
    return TrainingState(
        epoch=epoch,
        step=checkpoint.step or 0,
        best=recorded.get("best", -1.0),
        stale=recorded.get("stale", 0),
        seen=recorded.get("seen", 0),
        summed=recorded.get("summed", 0.0),
        hits=recorded.get("hits", 0.0),
    )


def _train_epoch(
    training: Training, state: TrainingState, run: Run, *, interrupts: Interrupts, watcher: Watcher
) -> None:
    """Train on every batch of the data. An epoch that was interrupted goes on at its next batch.

    Raises:
        KeyboardInterrupt, SystemExit: if any process was told to stop. The state is saved then.
    """
    network, optimizer, scheduler = training.network, training.optimizer, training.scheduler
    loader, device = training.loader, training.devices[0]
    network.train()
    if training.sampler:
        training.sampler.set_epoch(state.epoch)
    for images, labels in loader:
        images, labels = images.to(device), labels.to(device)
        loss, logits = network(images, labels)
        # `DataParallel` returns one loss for each device.
        loss = loss.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate = float(scheduler.get_last_lr()[0])
        scheduler.step()
        accuracy = (logits.argmax(1) == labels).float().mean()
        mean_loss, mean_accuracy, signal = mean_over_ranks(loss, accuracy, interrupts.pending or 0)
        interrupts.pending = signal or interrupts.pending
        state.step += 1
        state.seen += len(labels)
        state.summed += mean_loss * len(labels)
        state.hits += mean_accuracy * len(labels)
        watcher.steps(training, state, run)
        if loader.position % training.log_every == 0 or loader.position == len(loader):
            _show_batch(training, state, run, loss=mean_loss, accuracy=mean_accuracy, rate=rate)
        # With several processes, a signal that came after `mean_over_ranks` waits until all hear of it with the next
        # batch.
        is_told = interrupts.pending if ranks.count() == 1 else signal
        if is_told and loader.position < len(loader):
            _save(training, state, run, loss=state.mean_loss, wait=True)
            interrupts.deliver()


def _finish_epoch(training: Training, state: TrainingState, run: Run) -> Epoch:
    """Test the network and save it as a version."""
    writer, plain = run.writer, training.plain
    loss, training_accuracy = state.mean_loss, state.mean_accuracy
    state.epoch += 1
    state.seen, state.summed, state.hits = 0, 0.0, 0.0
    test_loss, accuracy = evaluate_together(plain, training.data.test, training.config.batch_size)
    is_best = accuracy > state.best
    if is_best:
        state.best, state.stale = accuracy, 0
    else:
        state.stale += 1
    if ranks.mine() == 0:
        _logger.info(
            "Epochs[%d/%d] -- Testing Acc: %.4f -- loss: %.4f -- training loss: %.4f",
            state.epoch,
            training.config.epochs,
            accuracy,
            test_loss,
            loss,
            extra={"detail": True},
        )
    writer.add_scalar("Testing/Accuracy", accuracy, state.epoch)
    writer.add_scalar("Testing/Loss", test_loss, state.epoch)
    _save(training, state, run, loss=loss, metrics={"accuracy": accuracy, "test_loss": test_loss})
    for name, parameter in plain.named_parameters():
        # TensorBoard has no histogram of NaN.
        if parameter.isfinite().all():
            writer.add_histogram(f"Weights/{name}", parameter, state.epoch)
    if not math.isfinite(loss):
        _logger.warning("the loss of epoch %d is not finite; a smaller lr may help", state.epoch)
    return Epoch(state.epoch, loss, training_accuracy, test_loss, accuracy, 0.0, is_best)


def _save(
    training: Training,
    state: TrainingState,
    run: Run,
    *,
    loss: float,
    metrics: Mapping[str, float] | None = None,
    wait: bool = False,
) -> None:
    """Save a version, with all that `_resume` needs.

    Args:
        wait: return only once the version is stored. Otherwise the training goes on meanwhile.
    """
    extra = {
        "best": state.best,
        "stale": state.stale,
        "classes": list(training.data.classes),
        "data": training.data.name,
        "seen": state.seen,
        "summed": state.summed,
        "hits": state.hits,
    }
    run.save(
        **training.components,
        epoch=state.epoch,
        step=state.step,
        loss=loss,
        metrics=metrics or {},
        extra=extra,
        wait=wait,
    )


def _show_beginning(training: Training, run: Run) -> None:
    """Log where the training runs, and draw the network's graph."""
    if ranks.mine() == 0:
        where = ", ".join(map(str, training.devices))
        _logger.info("training on %s; processes: %d", where, ranks.count(), extra={"detail": True})
    draw_graph(run.writer, training.plain, channels=training.data.channels, device=training.devices[0])


def _show_batch(
    training: Training, state: TrainingState, run: Run, *, loss: float, accuracy: float, rate: float
) -> None:
    """Log the batch that is done.

    Args:
        rate: the learning rate of the batch.
    """
    run.writer.add_scalar("Training/Accuracy", accuracy, state.step)
    run.writer.add_scalar("Training/Loss", loss, state.step)
    run.writer.add_scalar("Training/Learning Rate", rate, state.step)
    if ranks.mine() == 0:
        position, batches = training.loader.position, len(training.loader)
        _logger.info(
            "Epochs[%d/%d] -- batch[%d/%d] -- Acc: %.3f -- loss: %.4f",
            state.epoch + 1,
            training.config.epochs,
            position,
            batches,
            accuracy,
            loss,
            extra={"detail": True},
        )


def _show_end(training: Training, state: TrainingState, run: Run) -> None:
    """Draw sample predictions, the embedding of the test images, and the hyperparameters."""
    if ranks.mine() != 0:
        return
    config, data = training.config, training.data
    _, accuracy, logits = evaluate(training.plain, data.test, config.batch_size)
    draw_predictions(run.writer, data, logits, epoch=config.epochs)
    values = {key: value for key, value in config.to_dict().items() if value is not None}
    measured = {"hparam/accuracy": accuracy, "hparam/best": state.best}
    run.writer.add_hparams(values, measured, run_name=".")
