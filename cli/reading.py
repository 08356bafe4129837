"""What is there: list, show, status."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from registry.catalog.resolving import no_such_metric
from registry.catalog.versions import Version, list_models, list_versions, name_of, rank_versions
from registry.cli.options import ReferenceType, command, direction
from registry.cli.output import (
    counted,
    number,
    print_facts,
    print_json,
    print_table,
    say,
    size,
    time_of,
    version_document,
)
from registry.log.metrics import is_smallest_best
from registry.store.text import quoted

if TYPE_CHECKING:
    from registry.registry import Registry

_MANY = 4
"""The most metrics that get a column each in a table of versions."""

_TEXTS = ("MODEL", "NAME", "LATEST", "METRICS", "ALIASES", "TAGS", "CREATED", "ID")
"""Columns of text in a table of versions."""


@command("list", "registry list\nregistry list lenet5 --sort accuracy --limit 5")
@click.argument("model", required=False, type=ReferenceType())
@click.option("--sort", "metric", metavar="METRIC", help="Order by a metric or the loss, the best first.")
@direction
@click.option("--tag", metavar="TAG", help="Only versions with this tag.")
@click.option(
    "--limit", default=20, show_default=True, type=click.IntRange(0), help="Number of rows; 0 shows all."
)
def list_(
    model: str | None,
    metric: str | None,
    smallest: bool | None,
    tag: str | None,
    limit: int,
    registry: Registry,
    as_json: bool,
) -> None:
    """List the models, or a model's versions.

    The newest versions come first. --sort puts the best first. If a metric's name does not say which value is better,
    --sort puts the largest first.
    """
    if model is None and not (metric or tag):
        _list_models(registry, as_json)
        return
    if model is not None:
        model = registry.resolve(model).model
    if metric:
        versions, total = rank_versions(
            registry.catalog,
            model,
            metric,
            smallest=bool(is_smallest_best(metric) if smallest is None else smallest),
            tag=tag,
            limit=limit or None,
        )
        if not total and not tag:
            raise no_such_metric(registry.catalog, model, metric)
    else:
        versions, total = list_versions(registry.catalog, model, tag=tag, limit=limit or None)
    if as_json:
        print_json({"total": total, "versions": [version_document(version) for version in versions]})
        return
    columns, rows = _table(versions)
    named = [(version.name, *row) for version, row in zip(versions, rows, strict=True)]
    print_table(columns, named, left=_TEXTS)
    if total > len(versions):
        say(f"{counted(len(versions), 'version')} of {total:,}; --limit 0 shows all")


def _list_models(registry: Registry, as_json: bool) -> None:
    models = list_models(registry.catalog)
    if as_json:
        print_json(
            {
                "models": [
                    {
                        "name": m.name,
                        "versions": m.versions,
                        "latest": version_document(m.latest),
                    }
                    for m in models
                ]
            }
        )
        return
    if not models:
        say("No models yet; store one with: registry import FILE --name MODEL")
        return
    columns, rows = _table([m.latest for m in models])
    counts = [(m.name, m.versions, m.latest.name) for m in models]
    print_table(
        ("MODEL", "VERSIONS", "LATEST", *columns[1:]),
        [(*count, *row) for count, row in zip(counts, rows, strict=True)],
        left=_TEXTS,
    )


def _table(versions: Sequence[Version]) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
    """The headings, and a row for each version without its name. Up to `_MANY` metrics get a column each."""
    names = list(dict.fromkeys(name for version in versions for name in version.metrics))
    each = names if len(names) <= _MANY else []
    columns = ("NAME", "EPOCH", "STEP", "LOSS", *map(str.upper, each), "METRICS", "ALIASES", "TAGS")
    rows = [
        (
            version.epoch,
            version.step,
            version.loss,
            *[version.metrics.get(name) for name in each],
            [] if each else [f"{name}={number(value)}" for name, value in version.metrics.items()],
            version.aliases,
            version.tags,
            size(version.size),
            time_of(version.created),
            version.id[:12],
        )
        for version in versions
    ]
    return (*columns, "SIZE", "CREATED", "ID"), rows


@command("show", "registry show lenet5@best --params")
@click.argument("reference", type=ReferenceType())
@click.option("--params", is_flag=True, help="List every tensor: name, dtype, shape, digest.")
def show(reference: str, params: bool, registry: Registry, as_json: bool) -> None:
    """Show what is recorded about a checkpoint."""
    version = registry.resolve(reference)
    tensors = list(registry[version.name].parameters()) if params else []
    if as_json:
        document = version_document(version)
        if params:
            document["parameters"] = [
                {"path": path, "dtype": dtype, "shape": list(shape), "digest": digest}
                for path, dtype, shape, digest in tensors
            ]
        print_json(document)
        return
    _show_facts(registry, version)
    components = version.record.get("components", {})
    click.echo()
    print_table(
        ("COMPONENT", "TENSORS", "ELEMENTS", "SIZE"),
        [
            (name, part["tensors"], f"{part['elements']:,}", size(part["bytes"]))
            for name, part in components.items()
        ],
        left=("COMPONENT",),
    )
    if params:
        click.echo()
        print_table(
            ("PATH", "DTYPE", "SHAPE", "ELEMENTS", "DIGEST"),
            [
                (path, dtype, "x".join(map(str, shape)) or "scalar", f"{math.prod(shape):,}", digest[:12])
                for path, dtype, shape, digest in tensors
            ],
            left=("PATH", "DTYPE", "SHAPE", "DIGEST"),
        )


def _show_facts(registry: Registry, version: Version) -> None:
    # Lazy: start-up.
    from registry.configs.documents import flatten

    record = version.record
    facts: list[tuple[str, Any]] = [
        ("name", version.name),
        ("id", version.id),
        ("created", time_of(version.created)),
        ("epoch", version.epoch),
        ("step", version.step),
        ("loss", version.loss),
        *version.metrics.items(),
        ("aliases", version.aliases),
        ("tags", version.tags),
        ("size", f"{size(version.size)} in {counted(version.tensors, 'tensor')}"),
        ("run", record.get("run")),
        ("parent", record.get("parent")),
        *[
            ("lineage", f"{edge['kind']} {_known(registry, edge['parent'])}")
            for edge in record.get("lineage", [])
        ],
        *[(f"source.{k}", v) for k, v in (record.get("source") or {}).items() if isinstance(v, str | int)],
        *[(f"meta.{key}", value) for key, value in flatten(record.get("meta", {})).items()],
        *_made(record.get("provenance", {}), registry),
        *[(f"config.{key}", value) for key, value in flatten(record.get("config") or {}).items()],
        *[("note", f"{time_of(written)}  {text}") for written, text in version.notes],
    ]
    print_facts([(quoted(name).strip("'"), value) for name, value in facts])


def _known(registry: Registry, parent: str) -> str:
    """The name of the version whose id an edge gives. Otherwise the edge's own text, such as a file."""
    return name_of(registry.catalog, parent) or parent


def _made(provenance: Mapping[str, Any], registry: Registry) -> list[tuple[str, Any]]:
    """How a checkpoint was made, one fact a line."""
    git = provenance.get("git")
    code = f"{git['commit'][:12]}{' with changes' if git.get('dirty') else ''}" if git else None
    kinds = [f"{name}: {kind}" for name, kind in provenance.get("kinds", {}).items()]
    software = [f"{name} {provenance[name]}" for name in ("python", "torch") if name in provenance]
    return [
        ("dataset", _data(provenance, registry)),
        ("after", f"{provenance['seconds']:.1f} s" if "seconds" in provenance else None),
        ("classes", kinds),
        ("command", " ".join(provenance.get("command", []))),
        ("git", code),
        ("software", [*software, provenance["system"]] if software else None),
        ("devices", provenance.get("devices")),
        ("processes", provenance.get("processes")),
    ]


def _data(provenance: Mapping[str, Any], registry: Registry) -> str | None:
    """The digest of the data set, and the cached function that made it."""
    digests = [provenance["dataset"]] if "dataset" in provenance else list(provenance.get("artifacts", ()))
    made = {one.id: one.function for one in registry.artifacts.find()} if digests else {}
    return ", ".join(f"{made[one]} {one}" if one in made else one for one in digests) or None


def _nearby(path: str) -> str:
    """A path relative to the working directory, if it lies below it; otherwise the path itself."""
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except (OSError, ValueError):
        return path


@command("status", "registry status")
def status(registry: Registry, as_json: bool) -> None:
    """Sum up what is stored and what sharing saved."""
    found = registry.status()
    if as_json:
        print_json({**found._asdict(), "saved": found.saved})
        return
    ways = "sharing and differences" if found.differences else "sharing"
    shared = f" ({found.saved / found.logical:.0%} saved by {ways})" if found.logical else ""
    coded = f", {found.differences:,} of them as differences" if found.differences else ""
    print_facts(
        [
            ("registry", _nearby(registry.place)),
            ("holds", f"{counted(found.models, 'model')}, {counted(found.versions, 'version')}"),
            ("tensors", f"{found.tensors:,} distinct, in {counted(found.packs, 'pack')}{coded}"),
            ("artifacts", found.artifacts or None),
            ("size", f"{size(found.stored)} instead of {size(found.logical)}{shared}"),
            ("unneeded", f"{size(found.unused)}; free it with: registry gc" if found.unused else None),
            ("free space", size(found.free)),
        ]
    )
