"""Training and using networks: train, eval, predict."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from registry.catalog.documents import version_document
from registry.catalog.versions import Condition, rank_versions
from registry.cli.completing import completes, data_sets, networks
from registry.cli.options import ReferenceType, casts, command, renames
from registry.cli.output import (
    INTERRUPTED,
    Told,
    complain,
    number,
    print_facts,
    print_json,
    say,
)
from registry.cli.suggestions import WrongUse
from registry.cli.tables import columns_of, print_table
from registry.configs.documents import read_document
from registry.store.errors import Incompatible, Invalid

if TYPE_CHECKING:
    import logging

    import torch

    from registry.checkpoints.checkpoint import Checkpoint
    from registry.cli.epochs import EpochTable
    from registry.models.data import Data
    from registry.models.training import TrainConfig
    from registry.registry import Registry
    from registry.runs.run import Run

_DATA = "digits (the default), fashion-mnist, mnist, cifar10, or folder (your own images, a folder for each class)"
"""The data sets, for the help of an option."""


@command(
    "train",
    "registry train lenet5 --epochs 3 --set lr=0.01\nregistry train lenet5 --resume lenet5 --set epochs=20",
)
@click.argument("model", required=False, shell_complete=completes(networks))
@click.option(
    "--data", metavar="NAME", shell_complete=completes(data_sets), help=f"The data to train on: {_DATA}."
)
@click.option("--data-dir", type=click.Path(), metavar="DIR", help="The folder of the data.")
@click.option("--download", is_flag=True, help="Download missing data to --data-dir.")
@click.option("--epochs", type=int, help="Passes over the data.")
@click.option("--config", type=click.Path(), metavar="FILE", help="Hyperparameters: JSON, YAML or TOML.")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Override a hyperparameter.")
@click.option("--resume", type=ReferenceType(), metavar="REF", help="Resume from a version, bit for bit.")
@click.option(
    "--from", "source", metavar="REF", help="Start with the tensors of a version or a file that fit."
)
@renames
@casts
@click.option("--freeze", metavar="loaded|PATTERN", help="Freeze loaded tensors, or tensors that match.")
@click.option("--name", metavar="NAME", help="The model to save under. [default: MODEL]")
@click.option(
    "--devices",
    "--device",
    metavar="DEVICES",
    help="cpu, mps, cuda:1, how many (2), or which (0,3). [default: cpu]",
)
@click.option("--keep-last", type=int, metavar="N", help="Keep the run's N newest versions.")
@click.option("--keep-best", type=int, metavar="N", help="Keep the run's N most accurate versions.")
@click.option(
    "--keep-optimizer", type=int, metavar="N", help="Only the N newest versions keep the optimizer's state."
)
@click.option(
    "--compact", is_flag=True, help="Store older versions as differences when the run has finished."
)
def train(
    model: str | None,
    data: str | None,
    data_dir: str | None,
    download: bool,
    epochs: int | None,
    config: str | None,
    assignments: tuple[str, ...],
    resume: str | None,
    source: str | None,
    rules: tuple[str, ...],
    allow_cast: bool,
    freeze: str | None,
    name: str | None,
    devices: str | None,
    registry: Registry,
    as_json: bool,
    # The options from --keep-last to --compact, named as `Registry.run` names them.
    **keep: Any,
) -> None:
    """Train a network and record every epoch.

    MODEL is the name of a network: lenet5, lenet6, or one that an installed package provides. Ctrl-C saves at the next
    batch and shows how to resume. To train in several processes, run: torchrun --nproc-per-node=2 -m registry.cli train
    MODEL.
    """
    # Lazy: loads torch.
    from registry.live.devices import get_devices
    from registry.models.data import load
    from registry.models.training import train as run_training

    _check_start(resume, source, freeze, has_rules=bool(rules or allow_cast))
    resumed = registry[resume] if resume else None
    given = {"model": model, "data": data, "epochs": epochs}
    settings = _settings(given, config, resumed).override(*assignments)
    place = name or (resumed.model if resumed else settings.model)
    chosen = get_devices(devices or "cpu")
    with (
        _several_processes(chosen[0]) as leads,
        _shown_training(settings.data, is_quiet=as_json, leads=leads) as watcher,
    ):
        content = load(settings.data, data_dir, download=download, seed=settings.seed)
        run = run_training(
            registry,
            settings,
            content,
            name=place,
            resume=resumed,
            source=source,
            rename=rules,
            allow_cast=allow_cast,
            freeze=freeze,
            devices=chosen,
            watcher=watcher,
            **keep,
        )
        if watcher:
            watcher.ends(run)
    if leads:
        _tell(registry, run, place, as_json=as_json)


def _check_start(resume: str | None, source: str | None, freeze: str | None, *, has_rules: bool) -> None:
    """Refuse options that contradict each other.

    Args:
        has_rules: whether `--rename` or `--allow-cast` is given.

    Raises:
        click.UsageError: if two options contradict each other.
    """
    if resume and (source or freeze):
        raise WrongUse("--resume keeps what was loaded and frozen", "leave --from and --freeze out")
    if freeze == "loaded" and not source:
        raise click.UsageError("--freeze loaded needs --from, which says what is loaded")
    if has_rules and not source:
        raise click.UsageError("--rename and --allow-cast go with --from, which says what is loaded")


def _tell(registry: Registry, run: Run, model: str, *, as_json: bool) -> None:
    """Print the result of a training, once its last version is stored."""
    last = run.wait()
    best = registry[f"{model}@best"]
    if as_json:
        latest = version_document(registry.resolve(last.name)) if last else None
        document = {"run": run.name, "log": str(run.log_file), "latest": latest}
        print_json({**document, "best": version_document(registry.resolve(best.name))})
        return
    own, _ = rank_versions(
        registry.catalog, model, "accuracy", also=Condition("v.run = ?", [run.name]), limit=1
    )
    shown = f"{best.name}, accuracy {number(best.metrics['accuracy'])}"
    if own and own[0].id != best.id:
        its = f"{own[0].name}, accuracy {number(own[0].metrics['accuracy'])}"
        say(f"{run.name} finished: its best is {its}; the best of {model} stays {shown}")
    else:
        say(f"{run.name} finished: the best is {shown}")
    say(f"see it with: registry history {model}, registry board {run.name}")


def _settings(given: Mapping[str, Any], config: str | None, resumed: Checkpoint | None) -> TrainConfig:
    """The hyperparameters of a training, from the checkpoint to resume or from a file.

    Args:
        given: hyperparameters that have an option of their own. They win. None means that the option is not given.

    Raises:
        Invalid: if a value is not allowed, or both a file and a checkpoint are given.
        Incompatible: if the checkpoint cannot be resumed, or holds another network than the one that is named.
        click.UsageError: if nothing names a network.
    """
    # Lazy: loads torch.
    from registry.models.training import TrainConfig

    if resumed and config:
        raise Invalid(
            "--resume takes the recorded hyperparameters", "override them with --set, not with --config"
        )
    document: dict[str, Any] = {}
    source = ""
    if config:
        document, source = read_document(Path(config)), config
    elif resumed:
        if not resumed.config or "optimizer" not in resumed.components:
            raise Incompatible(
                f"{resumed.name} cannot be resumed: it has no {'optimizer' if resumed.config else 'configuration'}"
            )
        document, source = dict(resumed.config), resumed.name
    for key, value in given.items():
        if value is None:
            continue
        if resumed and key == "model" and value != document.get("model"):
            raise Incompatible(f"{resumed.name} is a {document.get('model')}, not a {value}")
        document[key] = value
    if "model" not in document:
        raise click.UsageError("name a network, such as: registry train lenet5")
    return TrainConfig.from_dict(document, source=source)


@contextlib.contextmanager
def _several_processes(device: torch.device) -> Iterator[bool]:
    """Join the processes that torchrun started with this one. Yields whether this process speaks for all."""
    # Lazy: loads torch.
    from registry.live import ranks

    if ranks.started() == 1 or ranks.count() > 1:
        yield ranks.mine() == 0
        return
    # Lazy: loads torch.
    import torch
    import torch.distributed as dist

    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield ranks.mine() == 0
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _shown_training(data: str, *, is_quiet: bool, leads: bool) -> Iterator[EpochTable | None]:
    """Show a training, and how to resume it if it is interrupted.

    Yields what the training tells of itself; None in a process that does not speak for all.

    Args:
        data: the name of the data that is loaded first.
        is_quiet: whether to show an interruption alone.

    Raises:
        Told: in the place of KeyboardInterrupt.
    """
    # Lazy: start-up.
    import logging

    # Lazy: loads torch.
    from registry.cli.epochs import EpochTable

    if not leads:
        yield None
        return
    table = EpochTable(is_quiet=is_quiet)
    try:
        with contextlib.ExitStack() as stack:
            if not is_quiet:
                logger = logging.getLogger("registry.models.training")
                logger.setLevel(logging.INFO)
                handler = _handler(table.say)
                logger.addHandler(handler)
                stack.callback(logger.removeHandler, handler)
                # Below the live line nothing is printed, and once it is gone all that is stored has its line.
                stack.callback(table.leaves)
                stack.enter_context(table.alive(f"loading {data} ..."))
            yield table
    except (KeyboardInterrupt, SystemExit) as error:
        complain(INTERRUPTED, *table.interrupted())
        if isinstance(error, KeyboardInterrupt):
            raise Told from None
        raise


def _handler(line: Callable[[str], None]) -> logging.Handler:
    """A handler that passes messages on without time and place.

    It leaves out the details within an epoch, which the log file has.
    """
    # Lazy: start-up.
    import logging

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if not getattr(record, "detail", False):
                line(record.getMessage())

    return Lines(logging.INFO)


@command("eval", "registry eval lenet5@best --data digits")
@click.argument("reference", type=ReferenceType())
@click.option(
    "--data", metavar="NAME", shell_complete=completes(data_sets), help=f"The data to test on: {_DATA}."
)
@click.option("--data-dir", type=click.Path(), metavar="DIR", help="The folder of the data.")
@click.option("--download", is_flag=True, help="Download missing data to --data-dir.")
def eval_(
    reference: str, data: str | None, data_dir: str | None, download: bool, registry: Registry, as_json: bool
) -> None:
    """Measure a version on held-out data."""
    # Lazy: loads torch.
    from registry.models.data import load
    from registry.models.measuring import evaluate
    from registry.models.pictures import labels_of

    checkpoint = registry[reference]
    trained = checkpoint.config or {}
    content = load(
        data or trained.get("data", "digits"), data_dir, download=download, seed=trained.get("seed", 0)
    )
    network = registry.build(checkpoint.name)
    _check_fit(checkpoint, network, content)
    loss, accuracy, logits = evaluate(network, content.test)
    labels = labels_of(content)
    rows = _by_class(content.classes, labels, logits.argmax(1))
    if as_json:
        classes = [
            {"class": name, "images": count, "accuracy": share, "mistaken_for": mistaken or None}
            for name, count, share, mistaken in rows
        ]
        print_json(
            {
                "name": checkpoint.name,
                "data": content.name,
                "images": len(labels),
                "loss": loss,
                "accuracy": accuracy,
                "classes": classes,
            }
        )
        return
    facts = [("checkpoint", checkpoint.name), ("data", content.name), ("images", len(labels))]
    print_facts([*facts, ("accuracy", accuracy), ("loss", loss)])
    click.echo()
    headings = ("CLASS", "IMAGES", "ACCURACY", "MISTAKEN FOR")
    print_table(columns_of(headings, texts=("CLASS", "MISTAKEN FOR")), rows)


def _by_class(
    classes: Sequence[str], labels: torch.Tensor, guesses: torch.Tensor
) -> list[tuple[str, int, float, str]]:
    """A row for each class: its name, its number of images, its accuracy, and the class it is mistaken for most.

    Args:
        labels, guesses: int64 [images].
    """
    rows = []
    for place, name in enumerate(classes):
        mine = labels == place
        share = (guesses[mine] == place).float().mean().item() if mine.any() else float("nan")
        wrong = guesses[mine & (guesses != place)]
        mistaken = classes[int(wrong.mode().values)] if len(wrong) else ""
        rows.append((name, int(mine.sum()), share, mistaken))
    return rows


def _check_fit(checkpoint: Checkpoint, network: Any, content: Data) -> None:
    """Check that a network fits the data.

    Raises:
        Incompatible: if the images have other channels, or the number of classes differs.
    """
    config = network.config
    if (config.channels, config.classes) != (content.channels, len(content.classes)):
        raise Incompatible(
            f"{checkpoint.name} takes images of {config.channels} channels in {config.classes} classes, "
            f"{content.name} has {content.channels} channels and {len(content.classes)} classes"
        )


@command("predict", "registry predict lenet5@best digit.png photo.jpg --fit")
@click.argument("reference", type=ReferenceType())
@click.argument("images", nargs=-1, required=True, type=click.Path(), metavar="IMAGE...")
@click.option("--fit", is_flag=True, help="Scale images of another size, and convert colour.")
@click.option("--invert", is_flag=True, help="Turn dark on bright into bright on dark, as in digits.")
def predict(
    reference: str, images: tuple[str, ...], fit: bool, invert: bool, registry: Registry, as_json: bool
) -> None:
    """Classify images."""
    # Lazy: loads torch.
    from registry.models.predicting import predict as classify

    checkpoint = registry[reference]
    network = registry.build(checkpoint.name)
    classes = checkpoint.extra.get("classes") or [str(i) for i in range(network.config.classes)]  # type: ignore[union-attr, arg-type]
    found = classify(network, classes, [Path(image) for image in images], fit=fit, invert=invert)
    if as_json:
        print_json({"name": checkpoint.name, "predictions": [one._asdict() for one in found]})
        return
    rows = [
        (one.image, one.label, f"{one.probability:.1%}", f"{one.second} {one.second_probability:.1%}")
        for one in found
    ]
    headings = ("IMAGE", "CLASS", "PROBABILITY", "OR")
    print_table(columns_of(headings, texts=("IMAGE", "CLASS", "OR")), rows)
