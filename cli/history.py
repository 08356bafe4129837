"""Looking back: history, best, lineage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from registry.catalog.ancestry import Branch, descendants, origins
from registry.catalog.versions import Version, list_versions, own_sizes
from registry.cli.options import ReferenceType, command, direction
from registry.cli.output import number, print_json, say, size, version_document
from registry.cli.reading import fields_of, left_out
from registry.cli.tables import Column, TableView, print_table

if TYPE_CHECKING:
    from registry.registry import Registry


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
        *fields_of(versions, registry.runs.monitors().get(model)),
        (Column("PARENT", 2, is_text=True), lambda one: one.record.get("parent")),
        (Column("RUN", 4, is_text=True), lambda one: one.record.get("run")),
        (Column("OWN", 4), lambda one: size(own.get(one.id, 0))),
    ]
    print_table(fields, versions, view, below=left_out(versions, total))


@command("best", "registry best lenet5 --by accuracy\nregistry best lenet5 --by val/loss")
@click.argument("model", type=ReferenceType())
@click.option("--by", "metric", required=True, metavar="METRIC", help="A metric, or loss.")
@direction
def best(model: str, metric: str, smallest: bool | None, registry: Registry, as_json: bool) -> None:
    """Find the best version of a model."""
    found = registry.best(model, metric, smallest=smallest)
    version = registry.resolve(found.name)
    if as_json:
        print_json(version_document(version))
        return
    value = version.loss if metric == "loss" else version.metrics[metric]
    say(f"{version.name}  {metric} {number(value or 0.0)}  epoch {version.epoch}")


@command("lineage", "registry lineage lenet5@best")
@click.argument("reference", type=ReferenceType())
def lineage(reference: str, registry: Registry, as_json: bool) -> None:
    """Show what a checkpoint came from, and what from it."""
    version = registry.resolve(reference)
    sources = _documents(origins(registry.catalog, version))
    led_to = _documents(descendants(registry.catalog, version))
    document = {**_about(version), "from": sources, "led_to": led_to}
    if as_json:
        print_json(document)
        return
    say(_label(document))
    _print_branches(sources, "")
    if led_to:
        say("")
        say("led to")
        _print_branches(led_to, "")


def _documents(branches: Sequence[Branch]) -> list[dict[str, Any]]:
    """Branches in the shape that `--json` prints. The branches below one stand under `from`, in either direction."""
    documents = []
    for branch in branches:
        about = _about(branch.version) if branch.version else {"name": branch.name}
        document = {"kind": branch.kind, **about, "from": _documents(branch.branches)}
        if branch.cut:
            document["more"] = "above" if branch.cut == "repeated" else f"registry lineage {branch.name}"
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


def _label(node: dict[str, Any]) -> str:
    """The line for a version of the tree."""
    parts = [node["name"]]
    if node.get("epoch") is not None:
        parts.append(f"epoch {node['epoch']}")
    parts += [f"{name} {number(value)}" for name, value in node.get("metrics", {}).items()]
    if node.get("run"):
        parts.append(node["run"])
    if node.get("more"):
        parts.append(f"(more: {node['more']})")
    return "  ".join(parts)


def _print_branches(nodes: list[dict[str, Any]], indent: str) -> None:
    for i, node in enumerate(nodes):
        last = i == len(nodes) - 1
        say(f"{indent}{'└── ' if last else '├── '}{node['kind']}  {_label(node)}")
        _print_branches(node["from"], indent + ("    " if last else "│   "))
