"""The training loop of the reference networks: small enough to read in one sitting, complete enough to use."""

from __future__ import annotations

import logging
import random
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, Subset

from registry import Config, Registry, ResumableLoader, Run, parallelize
from registry.checkpoints.checkpoint import Checkpoint
from registry.live import freezing, ranks
from registry.live.builders import builder
from registry.models.data import Data, few
from registry.models.pictures import embedding_of, figure_of_predictions
from registry.runs.process import Interrupts
from registry.store.errors import Incompatible
from registry.transfer.planning import plan_transfer
from registry.transfer.sources import Source

_logger = logging.getLogger(__name__)

Progress = Callable[[int, int, float, float], None]
"""Told steps done and in all, the loss and the accuracy of the last batch."""


class TrainConfig(Config):
    """Hyperparameters of a training."""

    model: str = "lenet5"
    data: str = "digits"
    epochs: int = Field(default=10, ge=1)
    batch_size: int = Field(default=32, ge=1)  # in each process
    optimizer: Literal["adam", "adamw", "sgd"] = "adamw"
    lr: float = Field(default=2e-3, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    warmup_steps: int | None = Field(default=None, ge=0)  # a tenth of all steps
    patience: int | None = Field(default=None, ge=1)  # epochs without a better accuracy before training stops
    log_every: int | None = Field(default=None, ge=1)  # steps: 50, or a fifth of an epoch if that is fewer
    workers: int = Field(default=0, ge=0)
    samples: int | None = Field(default=None, ge=1)  # train on so many only
    seed: int = 0


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
    progress: Progress = lambda done, total, loss, accuracy: None,
    **options: Any,
) -> Run:
    """Train a network, and record every epoch.

    A version's `loss` is the mean over the samples of its epoch; the events have that of each batch.

    Training that is interrupted records where it is, so that it can be resumed at the very batch. Under `torchrun`
    each process takes its share of the data; the leading one records the means over all of them.

    Args:
        name: the model to save under; the network's own name unless given.
        resume: a checkpoint to go on from, bit for bit.
        source: where the first weights come from: whatever fits of a reference, a file or `torchvision:NAME`.
        rename, allow_cast: for the source, as `plan_transfer` takes them.
        freeze: `loaded`, or a pattern of names.
        devices: what `get_devices` gave; several of them share each batch.
        options: `keep_last`, `keep_best`, `keep_optimizer` and `compact` of `Registry.run`.

    Raises:
        Incompatible: if the checkpoint to resume was trained on other data or is complete, or there are more
            processes than samples.
        KeyboardInterrupt: after the state was saved.
    """
    if config.samples is not None:
        data = few(data, config.samples)
    count, rank, device = ranks.count(), ranks.mine(), devices[0]
    samples = len(data.train)  # type: ignore[arg-type]
    if samples < count:
        raise Incompatible(
            f"{data.name} has {samples} samples to train on, too few for {count} processes; start fewer"
        )
    _seed(config.seed)
    network: nn.Module = builder(config.model).build(
        {"channels": data.channels, "classes": len(data.classes)}
    )
    plan = None
    if source is not None:
        plan = plan_transfer(
            source,
            network,
            everything=True,
            rename=rename,
            allow_cast=allow_cast,
            freeze=freeze,
            registry=registry,
        )
        plan.apply(network, registry=registry)
        if rank == 0:
            _logger.info("%s from %s", plan.summary, plan.source)
    elif freeze:
        freezing.freeze(network, freeze)
    elif resume and (frozen := resume.provenance.get("frozen", {}).get("model")):
        freezing.freeze_again(network, frozen, resume.provenance.get("going_on", {}).get("model", ()))
    plain, network = network, parallelize(network, devices, exact=True)
    optimizer = _optimizer(config, plain)
    sampler: DistributedSampler[Any] | None = None
    if count > 1:
        _seed(config.seed + rank)  # the networks are equal by now
        sampler = DistributedSampler(data.train, seed=config.seed)
    loader = ResumableLoader(
        DataLoader(
            data.train, config.batch_size, shuffle=not sampler, sampler=sampler, num_workers=config.workers
        )
    )
    total = config.epochs * len(loader)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, _schedule(config, total))
    everything: dict[str, Any] = {
        "model": network,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "loader": loader,
    }
    epoch, step, best, stale = 0, 0, -1.0, 0
    seen, summed = 0, 0.0  # samples of the epoch, and their losses
    if resume:
        if resume.provenance.get("dataset") not in (None, data.digest):
            raise Incompatible(
                f"{resume.name} was trained on other data than {data.name}; resume on the same"
            )
        epoch, step = resume.epoch or 0, resume.step or 0
        if epoch >= config.epochs:
            raise Incompatible(
                f"{resume.name} is complete after {epoch} epochs; to train on: --set epochs={epoch + config.epochs}"
            )
        resume.restore(**everything)
        before = resume.extra
        best, stale = before.get("best", -1.0), before.get("stale", 0)
        seen, summed = before.get("seen", 0), before.get("summed", 0.0)
    every = config.log_every or max(1, min(50, len(loader) // 5))

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

        def save(loss: float, wait: bool = False, **measured: float) -> None:
            extra = {"best": best, "stale": stale, "classes": list(data.classes), "data": data.name}
            extra |= {"seen": seen, "summed": summed}
            run.save(
                **everything, epoch=epoch, step=step, loss=loss, metrics=measured, extra=extra, wait=wait
            )

        if rank == 0:
            where = ", ".join(map(str, devices))
            _logger.info("training on %s; processes: %d", where, count, extra={"detail": True})
        with warnings.catch_warnings(), _random_state_kept():
            warnings.simplefilter("ignore")  # of the tracer
            run.writer.add_graph(plain, torch.zeros(1, data.channels, 28, 28, device=device))
        with Interrupts() as interrupts:
            while epoch < config.epochs and not (config.patience and stale >= config.patience):
                network.train()
                if sampler:
                    sampler.set_epoch(epoch)
                for images, labels in loader:
                    images, labels = images.to(device), labels.to(device)
                    loss, logits = network(images, labels)
                    loss = loss.mean()  # of the devices
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    rate = scheduler.get_last_lr()[0]
                    scheduler.step()
                    step += 1
                    accuracy = (logits.argmax(1) == labels).float().mean()
                    loss_value, accuracy, signals = _over_ranks(loss, accuracy, interrupts.pending or 0)
                    interrupts.pending = int(signals) or None
                    seen, summed = seen + len(labels), summed + loss_value * len(labels)
                    progress(step, total, loss_value, accuracy)
                    if loader.position % every == 0 or loader.position == len(loader):
                        run.writer.add_scalar("Training/Accuracy", accuracy, step)
                        run.writer.add_scalar("Training/Loss", loss_value, step)
                        run.writer.add_scalar("Training/Learning Rate", rate, step)
                        if rank == 0:
                            _logger.info(
                                "Epochs[%d/%d] -- batch[%d/%d] -- Acc: %.3f -- loss: %.4f",
                                *(epoch + 1, config.epochs, loader.position, len(loader)),
                                *(accuracy, loss_value),
                                extra={"detail": loader.position < len(loader)},
                            )
                    if interrupts.pending and loader.position < len(loader):
                        save(summed / seen, wait=True)
                        interrupts.deliver()
                epoch += 1
                mean_loss = summed / seen if seen else float("nan")
                seen, summed = 0, 0.0
                test_loss, test_accuracy = _test(plain, data.test, config.batch_size)
                best, stale = (test_accuracy, 0) if test_accuracy > best else (best, stale + 1)
                if rank == 0:
                    _logger.info(
                        "Epochs[%d/%d] -- Testing Acc: %.4f -- loss: %.4f -- training loss: %.4f",
                        *(epoch, config.epochs, test_accuracy, test_loss, mean_loss),
                    )
                run.writer.add_scalar("Testing/Accuracy", test_accuracy, epoch)
                run.writer.add_scalar("Testing/Loss", test_loss, epoch)
                save(mean_loss, accuracy=test_accuracy, test_loss=test_loss)
                for parameter_name, parameter in plain.named_parameters():
                    run.writer.add_histogram(f"Weights/{parameter_name}", parameter, epoch)
                interrupts.deliver()
        if rank == 0:
            _draw(run, config, data, plain, best)
    return run


@torch.inference_mode()
def evaluate(network: nn.Module, data: Any, batch_size: int = 256) -> tuple[float, float, Tensor]:
    """Mean loss, accuracy and logits over a data set; leaves the network in the mode that it was in."""
    device = next(network.parameters()).device
    training = network.training
    network.eval()
    losses, right, outputs = 0.0, 0, []
    with _random_state_kept():
        for images, labels in DataLoader(data, batch_size):
            labels = labels.to(device)
            loss, logits = network(images.to(device), labels)
            losses += loss.item() * len(labels)
            right += int((logits.argmax(1) == labels).sum())
            outputs.append(logits.cpu())
    network.train(training)
    count = sum(map(len, outputs))
    return losses / count, right / count, torch.cat(outputs)


def _test(network: nn.Module, data: Any, batch_size: int) -> tuple[float, float]:
    """Mean loss and accuracy over a data set, of which each process takes its share."""
    count = ranks.count()
    if count == 1:
        return evaluate(network, data, batch_size)[:2]
    for buffer in network.buffers():  # all test the network that the leading process saves
        dist.broadcast(buffer, 0)
    share = range(ranks.mine(), len(data), count)
    loss, accuracy = evaluate(network, Subset(data, share), batch_size)[:2] if share else (0.0, 0.0)
    device = next(network.parameters()).device
    sums = torch.tensor([loss * len(share), accuracy * len(share)], dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    return tuple((sums / len(data)).tolist())


def _over_ranks(loss: Tensor, accuracy: Tensor, signal: int) -> tuple[float, float, float]:
    """The means of a loss and an accuracy over all processes, and a signal that any of them was sent."""
    if ranks.count() == 1:
        return loss.item(), accuracy.item(), signal
    mine = torch.stack([loss.detach().float(), accuracy, accuracy.new_tensor(signal)])
    all_of_them = [torch.empty_like(mine) for _ in range(ranks.count())]
    dist.all_gather(all_of_them, mine)
    losses, accuracies, signals = torch.stack(all_of_them).T
    return losses.mean().item(), accuracies.mean().item(), signals.max().item()


class _random_state_kept:
    """Evaluation must not change what training draws next: a `DataLoader` takes a random number."""

    def __enter__(self) -> None:
        self._state = torch.get_rng_state()

    def __exit__(self, *_: object) -> None:
        torch.set_rng_state(self._state)


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _optimizer(config: TrainConfig, network: nn.Module) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, config.lr, momentum=config.momentum, weight_decay=config.weight_decay
        )
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return kind(parameters, config.lr, weight_decay=config.weight_decay)


def _schedule(config: TrainConfig, total: int) -> Callable[[int], float]:
    """Linear warm-up, then half a cosine down to zero, as factors of the learning rate."""
    warmup = config.warmup_steps if config.warmup_steps is not None else total // 10

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        done = (step - warmup) / max(1, total - warmup)
        return 0.5 * (1 + float(np.cos(np.pi * min(1.0, done))))

    return factor


def _draw(run: Run, config: TrainConfig, data: Data, network: nn.Module, best: float) -> None:
    """What is drawn once, at the end: sample predictions, the embedding of the test images, hyperparameters."""
    _, accuracy, logits = evaluate(network, data.test, config.batch_size)
    figure = figure_of_predictions(data, logits)
    run.writer.add_figure("Testing/Predictions", figure, config.epochs)
    features, labels, images = embedding_of(data, logits)
    run.writer.add_embedding(features, labels, images, config.epochs, tag="Testing/Logits")
    values = {key: value for key, value in config.to_dict().items() if value is not None}
    run.writer.add_hparams(values, {"hparam/accuracy": accuracy, "hparam/best": best}, run_name=".")
