"""Files in and out: init, import, export."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from registry.cli.options import Reference, command, pairs
from registry.cli.output import counted, print_json, progress, say, size, version_document
from registry.store.errors import Invalid
from registry.store.text import quoted

if TYPE_CHECKING:
    from registry.registry import Registry


@command("init", "registry init\nregistry init --root /data/models")
@click.argument("folder", required=False)
def init(folder: str | None, root: str | None, as_json: bool) -> None:
    """Make a new registry.

    In FOLDER, or else --root, $REGISTRY_ROOT or ./.registry. One that is there already is left as it is.
    """
    from registry.registry import SETTINGS, Registry, default_root

    place = Path(folder or root or default_root())
    fresh = not (place / SETTINGS).is_file()
    Registry(place)
    if as_json:
        print_json({"root": str(place), "created": fresh})
    else:
        say(f"{'Made a registry' if fresh else 'There is a registry already'} at {place}")


@command("import", "registry import best.pt --name lenet5 --meta epoch=3 --metric accuracy=0.91")
@click.argument("files", nargs=-1, required=True, type=click.Path(), metavar="FILE...")
@click.option("--name", "model", required=True, metavar="MODEL", help="The model that gets new versions.")
@click.option(
    "--meta",
    multiple=True,
    callback=pairs,
    metavar="NAME=VALUE",
    help="A fact to record; epoch, step and loss fill the fields of these names.",
)
@click.option("--metric", multiple=True, callback=pairs, metavar="NAME=NUMBER", help="A measured value.")
@click.option("--config", type=click.Path(exists=True), help="Hyperparameters: a JSON, YAML or TOML file.")
@click.option("--tag", "tags", multiple=True, metavar="TAG", help="A tag to attach.")
@click.option("--weights", metavar="NAME", help="Of torchvision:NAME: published weights, to be downloaded.")
@click.option(
    "--file",
    "weights_file",
    type=click.Path(),
    metavar="FILE",
    help="Of torchvision:NAME: weights fetched by hand.",
)
@click.option("--random", "seed", type=int, metavar="SEED", help="Of torchvision:NAME: random weights.")
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
) -> None:
    """Store checkpoint files, or a network of torchvision, as new versions.

    Each FILE becomes one version of the model; torchvision:resnet18 stands for that network with --weights, --file or --random. Reads .pt and .pth (without running code that they hold), .safetensors, and folders of shards with their
    index. What the file says of epoch and loss is kept unless --meta says otherwise.
    """
    from registry.catalog.reference import check_name
    from registry.documents import read_document
    from registry.importing import import_checkpoint, read_checkpoint_file

    if any(file.startswith("torchvision:") for file in files):
        _import_network(registry, files, model, weights, weights_file, seed, tags, as_json)
        return
    if weights or weights_file or seed is not None:
        raise click.UsageError("--weights, --file and --random go with torchvision:NAME")
    for file in files:
        if not os.path.lexists(file):
            raise click.BadParameter(f"Path {file!r} does not exist.", param_hint="'FILE...'")
    fields = _fields(meta)
    metrics = {name: _number(value, f"--metric {name}") for name, value in metric.items()}
    document = read_document(Path(config)) if config else None
    for name in (model, *tags):
        check_name(name, "tag" if name in tags else "model")
    read = [read_checkpoint_file(Path(file)) for file in files]
    imported = []
    for file, content in zip(files, read, strict=True):
        before = registry.status().stored
        with progress(f"importing {Path(file).name}") as report:
            checkpoint = import_checkpoint(
                registry, content, model, metrics=metrics, config=document, progress=report, **fields
            )
        for tag in tags:
            registry.set_tag(checkpoint.name, tag)
        written = registry.status().stored - before
        imported.append(
            {"file": file, "written": written, **version_document(registry.resolve(checkpoint.name))}
        )
        if not as_json:
            say(
                f"{checkpoint.name}  {checkpoint.id[:12]}  {counted(imported[-1]['tensors'], 'tensor')}, "
                f"{size(checkpoint.size)}, {size(written)} new"
            )
    if as_json:
        print_json({"imported": imported})


def _import_network(
    registry: Registry,
    files: tuple[str, ...],
    model: str,
    weights: str | None,
    weights_file: str | None,
    seed: int | None,
    tags: tuple[str, ...],
    as_json: bool,
) -> None:
    from registry.catalog.reference import check_name
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
    version = registry.resolve(checkpoint.name)
    written = registry.status().stored - before
    if as_json:
        print_json({"imported": [{"file": files[0], "written": written, **version_document(version)}]})
    else:
        about = f"{counted(version.tensors, 'tensor')}, {size(version.size)}, {size(written)} new"
        say(f"{version.name}  {version.id[:12]}  {about}")


def _fields(meta: Mapping[str, str]) -> dict[str, Any]:
    """The named fields among the facts, typed; the rest as the value that it reads as."""
    from registry.documents import read_value

    rest = {name: read_value(text) for name, text in meta.items()}
    fields: dict[str, Any] = {}
    for name in ("epoch", "step", "loss"):
        if name in rest:
            value = rest.pop(name)
            fields[name] = _number(meta[name], f"--meta {name}") if name == "loss" else value
    return {**fields, "meta": rest}


def _number(text: str, what: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise Invalid(f"{what} is {quoted(text)}, expected a number") from None


@command("export", "registry export lenet5@best lenet5.safetensors")
@click.argument("reference", type=Reference())
@click.argument("file", type=click.Path())
@click.option("--component", metavar="NAME", help="Export this component alone. [default: all of a .pt file]")
@click.option("--force", is_flag=True, help="Overwrite FILE.")
def export(
    reference: str, file: str, component: str | None, force: bool, registry: Registry, as_json: bool
) -> None:
    """Write a checkpoint to a file.

    FILE ends in .safetensors or .pt. A .safetensors file holds one component's tensors (by default the model's). A .pt file that was imported
    comes back in the layout that it had.
    """
    from registry.exporting import export as write

    checkpoint = registry[reference]
    with progress(f"exporting {checkpoint.name}") as report:
        path = write(checkpoint, Path(file), component=component, force=force, progress=report)
    count = path.stat().st_size
    if as_json:
        print_json({"name": checkpoint.name, "file": str(path), "size": count})
    else:
        say(f"{checkpoint.name} -> {path}  {size(count)}")
