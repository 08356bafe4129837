"""Looking back: log, history, best."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from registry.catalog.ancestry import Branch, descendants, origins
from registry.catalog.chains import CONTINUED, Chain, Node, chains, named, read_nodes, related
from registry.catalog.documents import version_document
from registry.catalog.versions import Version, list_versions, own_sizes, values_by_id
from registry.cli.completing import completes, metrics
from registry.cli.options import ReferenceType, RunType, command, direction
from registry.cli.output import ago, nothing, number, print_json, say, size, tip
from registry.cli.reading import fields_of, heading_of, left_out
from registry.cli.suggestions import WrongUse
from registry.cli.tables import Column, Field, TableView, print_table
from registry.reports.text_charts import lanes
from registry.reports.words import measured

if TYPE_CHECKING:
    from registry.registry import Registry


_NAMES = 30
"""Columns of a terminal that a graph leaves to the names."""


@command("history", "registry history lenet5")
@click.argument("model", type=ReferenceType())
@click.option(
    "--limit", default=50, show_default=True, type=click.IntRange(0), help="Number of rows; 0 shows all."
)
def history(model: str, limit: int, registry: Registry, view: TableView, as_json: bool) -> None:
    """Show how a model came to be, version by version.

    PARENT is the version that training continued from. OWN is the size of what was written for the version alone.
    """
    model = registry.resolve(model).model
    versions, total = list_versions(registry.catalog, model, limit=limit or None)
    own = own_sizes(registry.catalog, model, min((v.version for v in versions), default=1))
    if as_json:
        rows = [
            {
                **version_document(version),
                "run": version.record.get("run"),
                "parent": version.record.get("parent"),
                "own": own.get(version.id, 0),
            }
            for version in versions
        ]
        print_json({"total": total, "versions": rows})
        return
    fields = [
        *fields_of(versions, registry.runs.monitors().get(model), is_every_metric=bool(view.columns)),
        (Column("PARENT", 2, is_text=True), lambda one: one.record.get("parent")),
        (Column("RUN", 4, is_text=True), lambda one: one.record.get("run")),
        (Column("OWN", 4), lambda one: size(own.get(one.id, 0))),
    ]
    print_table(fields, versions, view, below=left_out(versions, total))


@command("best", "registry best lenet5 --by accuracy\nregistry best lenet5 --by val/loss")
@click.argument("model", type=ReferenceType())
@click.option(
    "--by",
    "metric",
    metavar="METRIC",
    shell_complete=completes(metrics),
    help="A metric, or loss. [default: what the model's runs follow]",
)
@direction
def best(model: str, metric: str | None, smallest: bool | None, registry: Registry, as_json: bool) -> None:
    """Find the best version of a model."""
    metric = metric or registry.runs.headline({registry.resolve(model).model}) or "loss"
    found = registry.best(model, metric, smallest=smallest)
    version = registry.resolve(found.name)
    if as_json:
        print_json(version_document(version))
        return
    value = version.value(metric)
    at = "" if version.epoch is None else f"  epoch {version.epoch}"
    say(f"{version.name}  {metric} {number(value or 0.0)}{at}")


@command("log", "registry log\nregistry log lenet5@best --full")
@click.argument("source", required=False, type=RunType(), metavar="[MODEL|REFERENCE|RUN]")
@click.option("--full", "is_full", is_flag=True, help="Give every version a line of its own.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["text", "mermaid"]),
    default="text",
    show_default=True,
    help="Draw lines, or write a diagram for a Markdown page.",
)
def log(
    source: str | None, is_full: bool, form: str, registry: Registry, view: TableView, as_json: bool
) -> None:
    """Draw what came from what: versions, runs, models.

    For a version, or for all versions of a model or a run, the command shows what they came from and what came from
    them, and without an argument everything. The newest is at the top. Versions of one run, one after the other, share
    a line. A filled circle has an alias. --json needs a reference, and prints a tree. registry logs shows the log file
    of a run.
    """
    is_run = source is not None and "/" in source
    if as_json:
        if source is None or is_run:
            raise WrongUse("--json prints the tree of one version", "name it")
        version = registry.resolve(source)
        sources = _documents(origins(registry.catalog, version))
        print_json(
            {**_about(version), "from": sources, "led_to": _documents(descendants(registry.catalog, version))}
        )
        return
    nodes = read_nodes(registry.catalog)
    if source is not None:
        nodes = related(nodes, _named(registry, nodes, source))
    found = chains(nodes, is_full=is_full)
    if not found:
        what = (
            f"{source} saved no version"
            if is_run
            else "no models yet; store one with: registry import FILE --name MODEL"
        )
        nothing(what)
    elif form == "mermaid":
        for line in _mermaid(found):
            say(line)
    else:
        _print_graph(registry, found, view)
    if is_run:
        tip(f"its log file: registry logs {source}")


def _named(registry: Registry, nodes: dict[str, Node], source: str) -> list[str]:
    """The ids of the versions that a reference, a model or a run stands for."""
    found = named(registry.catalog, nodes, source)
    if not found:
        # A run that does not exist is an error, which suggests the nearest.
        registry.runs[source]
    return found


def _print_graph(registry: Registry, found: Sequence[Chain], view: TableView) -> None:
    """Print chains as a graph."""
    metric = registry.runs.headline({node.model for chain in found for node in chain.nodes})
    values = values_by_id(registry.catalog, metric) if metric else {}
    of = {node.id: chain.name for chain in found for node in chain.nodes}
    by_name = {chain.name: chain for chain in found}

    def course(chain: Chain) -> str:
        ends = list(dict.fromkeys([chain.nodes[0].id, chain.nodes[-1].id]))
        return " → ".join(measured(values[one]) for one in ends if one in values)

    drawn = lanes(
        [
            (
                chain.name,
                list(dict.fromkeys(of[parent] for _, parent in chain.parents if parent in of)),
                bool(chain.nodes[-1].aliases),
            )
            for chain in found
        ]
    )
    rows = [(_cut(line), by_name.get(name)) for line, name in drawn]
    fields: list[Field[tuple[str, Chain | None]]] = [
        (Column("VERSIONS", is_text=True), lambda row: row[1] and row[1].name),
        (Column("ALIASES", 2, is_text=True), lambda row: row[1] and " ".join(row[1].nodes[-1].aliases)),
        (
            Column("LOSS" if metric == "loss" else heading_of(metric or "-"), 3, is_text=True),
            lambda row: row[1] and course(row[1]),
        ),
        (Column("HOW", 1, is_text=True), lambda row: row[1] and row[1].how),
        (Column("MADE", 4), lambda row: row[1] and ago(row[1].nodes[-1].created)),
        (Column("RUN", 5, is_text=True), lambda row: row[1] and row[1].nodes[0].run),
    ]
    if view.is_quiet:
        print_table(fields, [row for row in rows if row[1]], view)
    else:
        print_table([(Column(""), lambda row: row[0]), *fields], rows, view)


def _cut(line: str) -> str:
    """A line of a graph, which leaves room for the names on a terminal."""
    room = max(1, shutil.get_terminal_size().columns - _NAMES) if sys.stdout.isatty() else len(line)
    return line if len(line) <= room else f"{line[: room - 1]}…"


def _mermaid(found: Sequence[Chain]) -> list[str]:
    """Chains as a diagram of Mermaid."""
    of = {node.id: f"n{i}" for i, chain in enumerate(found) for node in chain.nodes}
    lines = ["graph BT"]
    for i, chain in enumerate(found):
        shown = " ".join([chain.name, *(f"({alias})" for alias in chain.nodes[-1].aliases)])
        lines.append(f'  n{i}["{shown}"]')
        for kind, parent in chain.parents:
            if parent in of:
                label = "" if kind == CONTINUED else f'|"{kind.removesuffix("-from")}"|'
                lines.append(f"  {of[parent]} -->{label} n{i}")
    return lines


def _documents(branches: Sequence[Branch]) -> list[dict[str, Any]]:
    """Branches in the shape that `--json` prints. The branches below one stand under `from`, in either direction."""
    documents = []
    for branch in branches:
        about = _about(branch.version) if branch.version else {"name": branch.name}
        document = {"kind": branch.kind, **about, "from": _documents(branch.branches)}
        if branch.cut:
            document["more"] = "above" if branch.cut == "repeated" else f"registry log {branch.name}"
        documents.append(document)
    return documents


def _about(version: Version) -> dict[str, Any]:
    return {
        "name": version.name,
        "id": version.id,
        "epoch": version.epoch,
        "metrics": dict(version.metrics),
        "run": version.record.get("run"),
    }
