"""One version on one screen: show."""

from __future__ import annotations

import math
import shlex
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import click

from registry.catalog.ancestry import children
from registry.catalog.documents import version_document
from registry.catalog.versions import Version, name_of
from registry.cli.options import ReferenceType, command
from registry.cli.output import counted, encodable, number, print_json, size, text_of, time_of
from registry.cli.tables import Column, Field, print_table, width_of
from registry.log.metrics import with_metrics
from registry.reports.text_charts import sparkline
from registry.reports.words import shape
from registry.store.errors import NotFound, RegistryError

if TYPE_CHECKING:
    from registry.checkpoints.checkpoint import Checkpoint
    from registry.checkpoints.counting import Module, Network
    from registry.checkpoints.statistics import Statistics
    from registry.registry import Registry

_LABEL = 11
"""Cells of the names of facts, with the blanks behind them."""

_WIDTH = 80
"""Cells of a line in a pipe, and at most on a terminal."""

_MOST_LINES = 3
"""Lines of a configuration that are shown on a terminal."""

_MOST_NAMES = 6
"""Versions that came from this one that are named."""


@command(
    "show", "registry show lenet5@best\nregistry show lenet5@best --tree\nregistry show lenet5@best --params"
)
@click.argument("reference", type=ReferenceType())
@click.option("--tree", is_flag=True, help="List the tensors by module; modules that are alike share a line.")
@click.option("--params", is_flag=True, help="List every tensor: name, dtype, shape, digest.")
@click.option("--stats", is_flag=True, help="Read every tensor: norm, mean, spread, extremes, zeros.")
def show(reference: str, tree: bool, params: bool, stats: bool, registry: Registry, as_json: bool) -> None:
    """Show a version: metrics, provenance, tensors.

    Parameters are counted without buffers; the values of a component are all its numbers.
    """
    checkpoint = registry[reference]
    modules = _modules(checkpoint) if tree else []
    tensors = list(checkpoint.parameters()) if params else []
    measured = _statistics(checkpoint) if stats else []
    if as_json:
        document = version_document(checkpoint.row)
        if tree:
            document["modules"] = [_module_document(one) for one in modules]
        if params:
            document["parameters"] = [
                {"path": path, "dtype": dtype, "shape": list(shape), "digest": digest}
                for path, dtype, shape, digest in tensors
            ]
        if stats:
            document["statistics"] = [{"path": path, **found._asdict()} for path, found in measured]
        print_json(document)
        return
    _print_version(registry, checkpoint)
    if tree:
        click.echo()
        print_table(_OF_MODULES, modules)
    if params:
        click.echo()
        print_table(_OF_TENSORS, tensors)
    if stats:
        click.echo()
        print_table(_OF_STATISTICS, measured)


def _statistics(checkpoint: Checkpoint) -> list[tuple[str, Statistics]]:
    # Lazy: start-up.
    from registry.checkpoints.measured import measure

    return list(measure(checkpoint, [path for path, *_ in checkpoint.parameters()]))


def _modules(checkpoint: Checkpoint) -> list[Module]:
    # Lazy: start-up.
    from registry.checkpoints.counting import modules

    return modules(checkpoint.store.manifest(checkpoint.id).listed)


def _module_document(one: Module) -> dict[str, Any]:
    tensors = [{"name": name, "dtype": dtype, "shape": list(shape)} for name, dtype, shape in one.tensors]
    return {**one._asdict(), "tensors": tensors}


_OF_MODULES: list[Field[Any]] = [
    (Column("MODULE", is_text=True), lambda one: one.name),
    (
        Column("TENSORS", 1, is_text=True),
        lambda one: [f"{name} {shape(s)}" for name, _, s in one.tensors],
    ),
    (Column("DTYPE", 3, is_text=True), lambda one: list(dict.fromkeys(dtype for _, dtype, _ in one.tensors))),
    (Column("VALUES", 2), lambda one: f"{one.values:,}"),
    (Column("SIZE", 4), lambda one: size(one.bytes)),
]

_OF_STATISTICS: list[Field[Any]] = [
    (Column("PATH", is_text=True), lambda one: one[0]),
    (Column("NORM", 1), lambda one: number(one[1].norm)),
    (Column("MEAN", 3), lambda one: number(one[1].mean)),
    (Column("STD", 2), lambda one: number(one[1].std)),
    (Column("MIN", 4), lambda one: number(one[1].least)),
    (Column("MAX", 4), lambda one: number(one[1].most)),
    (Column("ZEROS", 3), lambda one: f"{one[1].zeros:.1%}"),
    (Column("NOT FINITE", 2), lambda one: one[1].nonfinite or None),
    (Column("HISTOGRAM", 5, is_text=True), lambda one: sparkline(one[1].histogram, 16)),
]

_OF_TENSORS: list[Field[Any]] = [
    (Column("PATH", is_text=True), lambda one: one[0]),
    (Column("DTYPE", 2), lambda one: one[1]),
    (Column("SHAPE", 1), lambda one: shape(one[2])),
    (Column("VALUES", 3), lambda one: f"{math.prod(one[2]):,}"),
    (Column("DIGEST", 4), lambda one: one[3][:12]),
]


def _print_version(registry: Registry, checkpoint: Checkpoint) -> None:
    """Print all that is recorded of a version but its tensors."""
    version = checkpoint.row
    record, provenance = version.record, version.record.get("provenance") or {}
    names = [version.name, version.id[:12], *version.aliases]
    _print_ends(names, time_of(version.created), is_first=True)
    _print_ends(_networks(checkpoint), f"{size(version.size)} in {counted(version.tensors, 'tensor')}")
    fields = {"epoch": version.epoch, "step": version.step, "loss": version.loss}
    measured = with_metrics(fields, version.metrics)
    for line in _wrapped(_pairs(measured), _width(), gap=3):
        click.echo(line)
    whole = f"registry config show {version.name}"
    facts: list[tuple[str, list[str]]] = [
        ("tags", _joined(version.tags)),
        ("from", _joined(_origins(registry, version))),
        ("used by", _joined(_users(registry, version))),
        ("run", _joined([str(record["run"])] if record.get("run") else [])),
        ("made by", [*_joined([_command(provenance.get("command", []))]), *_joined(_software(provenance))]),
        ("config", _few(_pairs(_flat(record.get("config"))), whole)),
        ("meta", _few(_pairs(_flat(record.get("meta"))), f"registry show {version.name} --json")),
        ("source", _wrapped(_pairs(_source(record)), _width() - _LABEL)),
        ("note", [f"{time_of(written)}  {text_of(text)}" for written, text in version.notes]),
    ]
    for label, lines in facts:
        for i, line in enumerate(lines):
            click.echo((click.style(label.ljust(_LABEL), bold=True) if i == 0 else " " * _LABEL) + line)
    _print_components(record.get("components", {}), provenance.get("kinds", {}))


def _width() -> int:
    return min(shutil.get_terminal_size().columns, _WIDTH) if sys.stdout.isatty() else _WIDTH


def _print_ends(left: Sequence[str], right: str, *, is_first: bool = False) -> None:
    """Print a line with something at its left and its right end; two lines where they do not fit into one."""
    texts = [text_of(one) for one in left]
    between = "   " if is_first else ", "
    plain = between.join(texts)
    shown = between.join([click.style(texts[0], fg="cyan"), *texts[1:]]) if is_first else plain
    room = _width() - width_of(plain) - width_of(right)
    if not plain or room < 2:
        click.echo("\n".join(filter(None, [shown, right])))
    else:
        click.echo(shown + " " * room + right)


def _networks(checkpoint: Checkpoint) -> list[str]:
    """The networks of a version, each with what is known of it; empty where its manifest is damaged."""
    # Lazy: start-up.
    from registry.checkpoints.counting import networks

    try:
        listed = checkpoint.store.manifest(checkpoint.id).listed
    except RegistryError:
        # What the catalog has of the version is shown all the same.
        return []
    found = networks(listed, checkpoint.provenance)
    return [part for one in found for part in _about(one, checkpoint.provenance.get("kinds", {}), len(found))]


def _about(network: Network, kinds: Mapping[str, str], count: int) -> list[str]:
    """What is known of a network.

    Args:
        count: how many networks the version has; of several, each has its name.
    """
    kind = kinds.get(network.component)
    name = [network.component] if count > 1 else []
    if network.parameters is None:
        amount = counted(network.values, "value")
    else:
        amount = f"{counted(network.parameters, 'parameter')} ({network.frozen:,} frozen)"
    return [" ".join([*name, *([kind] if kind else [])]), amount, " and ".join(network.dtypes)][
        0 if name or kind else 1 :
    ]


def _origins(registry: Registry, version: Version) -> list[str]:
    """What a version came from: other versions, files, data."""
    record = version.record
    found = [
        f"{name_of(registry.catalog, edge['parent']) or edge['parent']} ({_how(edge['kind'])})"
        for edge in record.get("lineage", [])
    ]
    if not found and record.get("parent"):
        resumed = _resumed(registry, record.get("run"))
        more = f", resumed from {resumed}" if resumed else ""
        found = [f"{record['parent']} (same run{more})"]
    return [*found, *_data(registry, record.get("provenance") or {})]


def _how(kind: str) -> str:
    """The kind of an edge in one word, such as `resumed`."""
    return kind.removesuffix("-from")


def _resumed(registry: Registry, run: Any) -> str | None:
    """The version that a run was resumed from."""
    try:
        before = registry.runs[run].record.get("resumed") if isinstance(run, str) else None
    except NotFound:
        return None
    return name_of(registry.catalog, before) if isinstance(before, str) else None


def _data(registry: Registry, provenance: Mapping[str, Any]) -> list[str]:
    """The data sets of a training: the cached function that made each, and the beginning of its digest."""
    return [f"{one.function or 'data'} {one.digest[:12]}" for one in registry.artifacts.used_by(provenance)]


def _users(registry: Registry, version: Version) -> list[str]:
    """The versions that came from a version."""
    found = [f"{child.name} ({_how(kind)})" for child, kind in children(registry.catalog, version)]
    more = len(found) - _MOST_NAMES
    return [*found[:_MOST_NAMES], *([f"and {more:,} more"] if more > 0 else [])]


def _command(words: Sequence[str]) -> str:
    """A command line as it can be typed again: the program without its place."""
    if not words:
        return ""
    name = PurePosixPath(words[0]).name
    if name == "registry":
        return shlex.join([name, *words[1:]])
    return shlex.join(["python", *words] if name.endswith(".py") else list(words))


def _software(provenance: Mapping[str, Any]) -> list[str]:
    """What a version was made with, and how long its run had taken by then."""
    if "python" not in provenance:
        return []
    git, devices = provenance.get("git"), provenance.get("devices", [])
    many = provenance.get("processes", 1)
    seconds = provenance.get("seconds")
    return [
        *(f"{name} {provenance[name]}" for name in ("python", "torch") if name in provenance),
        *([provenance["system"]] if "system" in provenance else []),
        *([devices] if isinstance(devices, str) else devices),
        *([f"{many:,} processes"] if many > 1 else []),
        f"git {git['commit'][:12]}{' with changes' if git.get('dirty') else ''}" if git else "no git",
        *([f"run time {seconds:.1f} s"] if seconds is not None else []),
    ]


def _flat(document: Any) -> Mapping[str, Any]:
    # Lazy: start-up.
    from registry.configs.documents import flatten

    return flatten(document or {})


def _source(record: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of the file that a version was imported from."""
    return {key: value for key, value in (record.get("source") or {}).items() if isinstance(value, str | int)}


def _pairs(values: Mapping[str, Any]) -> list[str]:
    """Names with their values; those without a value are left out."""
    return [
        f"{text_of(name)} {text_of(value)}"
        for name, value in values.items()
        if value not in (None, "", (), [], {})
    ]


def _joined(items: Iterable[str]) -> list[str]:
    """The lines of a list with commas."""
    texts = [text_of(item) for item in items if item]
    return _wrapped([f"{text}," for text in texts[:-1]] + texts[-1:], _width() - _LABEL, gap=1)


def _few(items: Sequence[str], whole: str) -> list[str]:
    """The lines of some items. A terminal gets the first ones, and the command that shows the rest.

    Args:
        whole: the command that shows all.
    """
    lines = _wrapped(items, _width() - _LABEL)
    if len(lines) <= _MOST_LINES or not sys.stdout.isatty():
        return lines
    return [*lines[:_MOST_LINES], f"{encodable('…')} all: {whole}"]


def _wrapped(items: Sequence[str], width: int, *, gap: int = 2) -> list[str]:
    """Items in lines that are no longer than a width, unless one item is."""
    lines: list[str] = []
    for item in items:
        if lines and width_of(lines[-1]) + gap + width_of(item) <= width:
            lines[-1] += " " * gap + item
        else:
            lines.append(item)
    return lines


def _print_components(components: Mapping[str, Mapping[str, int]], kinds: Mapping[str, str]) -> None:
    """Print the components that have tensors as a table, and the others in a line."""

    def kind_of(name: str) -> str:
        parts = [kind for part, kind in kinds.items() if part == name or part.startswith(f"{name}/")]
        return ", ".join(dict.fromkeys(parts))

    fields: list[Field[str]] = [
        (Column("COMPONENT", is_text=True), lambda name: name),
        (Column("TENSORS", 2), lambda name: components[name]["tensors"]),
        (Column("VALUES", 3), lambda name: f"{components[name]['elements']:,}"),
        (Column("SIZE", 4), lambda name: size(components[name]["bytes"])),
        (Column("TYPE", 1, is_text=True), kind_of),
    ]
    filled = [name for name in components if components[name]["tensors"]]
    if filled:
        print_table(fields, filled)
    empty = [
        name + (f" ({kind_of(name)})" if kind_of(name) else "") for name in components if name not in filled
    ]
    if empty:
        for line in _wrapped(
            [f"{one}," for one in empty[:-1]] + empty[-1:], _width() - len("no tensors: "), gap=1
        ):
            click.echo(f"no tensors: {text_of(line)}")
