"""Files in and out: init, import, export."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from registry.catalog.documents import version_document
from registry.cli import completing
from registry.cli.completing import completes
from registry.cli.options import ReferenceType, byte_count, command, pairs
from registry.cli.output import (
    counted,
    in_one_line,
    print_json,
    progress_bar,
    say,
    size,
    warn,
)
from registry.cli.suggestions import WrongUse
from registry.configs.documents import read_document, read_value
from registry.files.exporting import export as export_checkpoint
from registry.files.formats import FORMATS, listed
from registry.log.reference import check_name
from registry.store.errors import Invalid, NotFound, RegistryError, Unsupported
from registry.store.text import printable, quoted

if TYPE_CHECKING:
    from registry.checkpoints.checkpoint import Checkpoint
    from registry.registry import Registry

_READABLE = ", ".join(
    listed(row.suffixes, "and") + (f" ({row.reading})" if row.reading else "") for row in FORMATS
)
_WRITABLE = listed(row.suffixes[0] for row in FORMATS)
_WHOLE = listed(row.suffixes[0] for row in FORMATS if row.holds_all)
_ABOUT = " ".join(row.about for row in FORMATS)


def _told(function: Callable[..., Any]) -> Callable[..., Any]:
    """Fill a command's help with the texts of the table of formats."""
    function.__doc__ = (function.__doc__ or "").format(readable=_READABLE, writable=_WRITABLE, about=_ABOUT)
    return function


@command("init", "registry init\nregistry init --root /data/models")
@click.argument("folder", required=False)
@click.option(
    "--log",
    metavar="URL",
    help="Keep the log of a registry in a bucket in PostgreSQL: postgresql://HOST/DATABASE, without user and password.",
)
def init(folder: str | None, log: str | None, root: str | None, as_json: bool) -> None:
    """Make a new registry.

    Its folder is FOLDER, or else --root, $REGISTRY_ROOT or ./.registry. A registry that is there already stays as it
    is.
    """
    # Lazy: start-up.
    from registry.home import default_root
    from registry.registry import Registry

    place = folder or root or default_root()
    if log is not None:
        # Lazy: start-up.
        from registry.remote.remote import put_log_in

        put_log_in(place, log)
    try:
        Registry(place, create=False)
        fresh = False
    except NotFound:
        Registry(place)
        fresh = True
    if as_json:
        print_json({"root": str(place), "created": fresh})
    else:
        say(f"{'Made a registry' if fresh else 'There is a registry already'} at {place}")


@command(
    "import",
    "registry import best.pt --name lenet5 --meta epoch=3 --metric accuracy=0.91\nregistry import ./llama --name llama",
)
@click.argument("files", nargs=-1, required=True, type=click.Path(readable=False), metavar="FILE...")
@click.option("--name", "model", required=True, metavar="MODEL", help="The model that gets new versions.")
@click.option(
    "--meta",
    multiple=True,
    callback=pairs,
    metavar="NAME=VALUE",
    help="A fact to record. epoch, step and loss set the fields of these names.",
)
@click.option("--metric", multiple=True, callback=pairs, metavar="NAME=NUMBER", help="A measured value.")
@click.option("--config", type=click.Path(exists=True), help="Hyperparameters: a JSON, YAML or TOML file.")
@click.option(
    "--tag",
    "tags",
    multiple=True,
    metavar="TAG",
    shell_complete=completes(completing.tags),
    help="A tag to attach.",
)
@click.option("--weights", metavar="NAME", help="For torchvision:NAME: the pretrained weights to download.")
@click.option(
    "--file",
    "weights_file",
    type=click.Path(),
    metavar="FILE",
    help="For torchvision:NAME: a file of pretrained weights.",
)
@click.option("--random", "seed", type=int, metavar="SEED", help="For torchvision:NAME: random parameters.")
@_told
def import_(
    files: tuple[str, ...],
    model: str,
    meta: dict[str, str],
    metric: dict[str, str],
    config: str | None,
    tags: tuple[str, ...],
    weights: str | None,
    weights_file: str | None,
    seed: int | None,
    registry: Registry,
    as_json: bool,
) -> int:
    """Store files, folders or torchvision networks as versions.

    Each FILE becomes one version of the model. The command reads {readable}, and folders as Hugging Face, timm, PEFT,
    Trainer, Accelerate and torch.distributed.checkpoint write them. Of a folder every file is kept, or named with the reason why it is not.
    torchvision:resnet18 stands for that network, with --weights, --file or --random. The epoch and the loss come from
    FILE unless --meta gives them. If a FILE cannot be read, the command names it and stores the others. The exit status
    is then 1.
    """
    if any(file.startswith("torchvision:") for file in files):
        _import_network(
            registry,
            files,
            model,
            weights=weights,
            weights_file=weights_file,
            seed=seed,
            tags=tags,
            as_json=as_json,
        )
        return 0
    if weights or weights_file or seed is not None:
        raise click.UsageError("--weights, --file and --random go with torchvision:NAME")
    if len(files) == 1 and not os.path.lexists(files[0]):
        raise click.BadParameter(f"Path {files[0]!r} does not exist.", param_hint="'FILE...'")
    facts = _facts(meta, metric, config)
    for name in (model, *tags):
        check_name(name, "tag" if name in tags else "model")
    imported, failed = [], []
    for file in files:
        before = registry.status().stored
        try:
            checkpoint, left_out = _import_file(registry, file, model, facts=facts)
        except RegistryError as error:
            if len(files) == 1 and not as_json:
                raise
            failed.append({"file": file, "error": _named(error, file)})
            warn(f"error: {failed[-1]['error']}")
            continue
        for tag in tags:
            registry.set_tag(checkpoint.name, tag)
        document = _stored(registry, checkpoint.name, before, about={"left_out": left_out}, as_json=as_json)
        imported.append({"file": file, **document})
    _sum_up(imported, failed, as_json)
    return 1 if failed else 0


def _import_file(
    registry: Registry, file: str, model: str, *, facts: Mapping[str, Any]
) -> tuple[Checkpoint, Mapping[str, str]]:
    """Store a file as a new version. Returns the version, and why something in a folder was left out, by name."""
    # Lazy: loads torch.
    from registry.files.importing import import_checkpoint
    from registry.files.reading import read_checkpoint_file

    content = read_checkpoint_file(Path(file))
    with progress_bar(f"importing {printable(Path(file).name)}") as report:
        return import_checkpoint(registry, content, model, progress=report, **facts), content.left_out


def _stored(
    registry: Registry, name: str, before: int, *, about: Mapping[str, Any], as_json: bool
) -> dict[str, Any]:
    """Print what was stored, unless JSON is asked for. Returns it as a document.

    Args:
        before: bytes that the registry held before.
        about: further keys of the document. `left_out` says why something was not stored, by name.
    """
    version = registry.resolve(name)
    written = registry.status().stored - before
    if not as_json:
        amount = (
            f"{counted(version.tensors, 'tensor')}, {size(version.size)}, {size(written)} more on the disk"
        )
        say(f"{version.name}  {version.id[:12]}  {amount}")
        for left_out, reason in about.get("left_out", {}).items():
            say(f"left out: {printable(left_out)} ({reason})")
    return {"written": written, **about, **version_document(version)}


def _sum_up(imported: Sequence[Any], failed: Sequence[Mapping[str, str]], as_json: bool) -> None:
    """Print the document of an import, and name the files that failed."""
    if as_json:
        print_json({"imported": imported, **({"failed": failed} if failed else {})})
    if failed:
        names = _listed([one["file"] for one in failed])
        total = len(imported) + len(failed)
        warn(f"error: {len(imported)} of {total} files were imported; these were not: {names}")


def _named(error: RegistryError, file: str) -> str:
    """The text of an error, with the name of the file."""
    text = in_one_line(error)
    return text if printable(file) in text else f"{printable(file)}: {text}"


def _listed(names: Sequence[str]) -> str:
    """The first five names, and the number of the others."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{', '.join(printable(name) for name in names[:5])}{more}"


def _import_network(
    registry: Registry,
    files: tuple[str, ...],
    model: str,
    *,
    weights: str | None,
    weights_file: str | None,
    seed: int | None,
    tags: tuple[str, ...],
    as_json: bool,
) -> None:
    """Store a network of torchvision as a new version."""
    # Lazy: loads torch.
    from registry.models.classifiers import import_torchvision

    if len(files) > 1:
        raise click.UsageError("import one network of torchvision at a time")
    for tag in tags:
        check_name(tag, "tag")
    file = Path(weights_file) if weights_file else None
    before = registry.status().stored
    checkpoint = import_torchvision(registry, files[0], model, weights=weights, file=file, seed=seed)
    for tag in tags:
        registry.set_tag(checkpoint.name, tag)
    document = _stored(registry, checkpoint.name, before, about={}, as_json=as_json)
    if as_json:
        print_json({"imported": [{"file": files[0], **document}]})


def _facts(meta: Mapping[str, str], metric: Mapping[str, str], config: str | None) -> dict[str, Any]:
    """The facts that the options record for every file, as arguments of `import_checkpoint`."""
    fields = _fields(meta)
    metrics = {name: _number(value, f"--metric {name}") for name, value in metric.items()}
    return {**fields, "metrics": metrics, "config": read_document(Path(config)) if config else None}


def _fields(meta: Mapping[str, str]) -> dict[str, Any]:
    """The fields among the facts (`epoch`, `step`, `loss`), and the other facts as `meta`, all as typed values."""
    rest = {name: read_value(text) for name, text in meta.items()}
    fields: dict[str, Any] = {}
    for name in ("epoch", "step", "loss"):
        if name in rest:
            value = rest.pop(name)
            fields[name] = _number(meta[name], f"--meta {name}") if name == "loss" else value
    return {**fields, "meta": rest}


def _number(text: str, what: str) -> float:
    """Read a number.

    Args:
        what: the option that gave the text, for the error.

    Raises:
        Invalid: if the text is not a number.
    """
    try:
        return float(text)
    except ValueError:
        raise Invalid(f"{what} is {quoted(text)}, expected a number") from None


@command(
    "export",
    "registry export lenet5@best lenet5.safetensors\nregistry export llama@best llama/\nregistry export tuned@best out/ --merge",
)
@click.argument("reference", type=ReferenceType())
@click.argument("file", type=click.Path(), metavar="FILE|FOLDER")
@click.option(
    "--component",
    shell_complete=completes(completing.components),
    metavar="NAME",
    help=f"Export this component alone. [default: all components in a {_WHOLE} file]",
)
@click.option(
    "--max-shard-size",
    metavar="SIZE",
    callback=byte_count,
    help="For a folder: how large its files of tensors get, such as 500MB. [default: 5GB]",
)
@click.option("--merge", is_flag=True, help="Merge an adapter of PEFT into its base network, to a FOLDER.")
@click.option(
    "--base",
    type=ReferenceType(),
    help="With --merge: the version of the base network. [default: the one that the adapter's lineage leads to]",
)
@click.option("--force", is_flag=True, help="Overwrite FILE. A folder is never overwritten.")
@_told
def export(
    reference: str,
    file: str,
    component: str | None,
    max_shard_size: int | None,
    merge: bool,
    base: str | None,
    force: bool,
    registry: Registry,
    as_json: bool,
) -> None:
    """Write a version to a file, or to a folder.

    FILE ends in {writable}. {about} FOLDER has no suffix, or a / at its end. It holds the parameters as safetensors, and
    every other file that an imported folder had, so that from_pretrained opens it.
    """
    if merge and component:
        raise WrongUse("--merge takes the adapter", "leave --component out")
    if base and not merge:
        raise click.UsageError("--base goes with --merge")
    checkpoint = registry[reference]
    if merge:
        path = _merged(registry, reference, file, base=base, max_shard_size=max_shard_size)
        _wrote(checkpoint.name, path, as_json)
        return
    with progress_bar(f"exporting {checkpoint.name}") as report:
        path = export_checkpoint(
            checkpoint,
            file,
            component=component,
            force=force,
            max_shard_size=max_shard_size,
            progress=report,
        )
    _wrote(checkpoint.name, path, as_json)


def _merged(
    registry: Registry, reference: str, folder: str, *, base: str | None, max_shard_size: int | None
) -> Path:
    """Write an adapter, merged into its base network, to a folder."""
    # Lazy: start-up.
    from registry.integrations import NotInstalled

    try:
        # Lazy: loads torch.
        from registry.files.folder_writing import SHARD
        from registry.integrations.merging import export_merged
    except NotInstalled as error:
        raise Unsupported(f"--merge: {error.message}", error.advice) from None
    except ImportError as error:
        raise Unsupported(f"--merge: {error}") from None
    with progress_bar(f"merging {printable(reference)}") as report:
        return export_merged(
            registry, reference, folder, base=base, max_shard_size=max_shard_size or SHARD, progress=report
        )


@command("checkout", "registry checkout bert@latest resume/")
@click.argument("reference", type=ReferenceType())
@click.argument("folder", type=click.Path())
def checkout(reference: str, folder: str, registry: Registry, as_json: bool) -> None:
    """Write the folder that training goes on from.

    The checkpoint must have been imported from a checkpoint folder of transformers' Trainer, or from a folder of
    Accelerate's save_state. FOLDER is such a folder again, for resume_from_checkpoint and load_state.
    """
    # Lazy: loads torch.
    from registry.files.folder_writing import checkout as check_out

    checkpoint = registry[reference]
    with progress_bar(f"writing {checkpoint.name}") as report:
        path = check_out(checkpoint, folder, progress=report)
    _wrote(checkpoint.name, path, as_json)


def _wrote(name: str, path: Path, as_json: bool) -> None:
    """Say what a file or a folder was made of, and how large it is."""
    files = [path, *path.rglob("*")]
    count = sum(file.stat().st_size for file in files if file.is_file())
    if as_json:
        print_json({"name": name, "file": str(path), "size": count})
    else:
        say(f"{name} → {path}  {size(count)}")
