"""The disk: du, prune."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from registry.cli.options import ReferenceType, command
from registry.cli.output import counted, nothing, print_facts, print_json, progress_bar, say, size, warn
from registry.cli.tables import Column, Field, TableView, print_table
from registry.store.errors import Conflict

if TYPE_CHECKING:
    from registry.registry import Registry
    from registry.upkeep.compaction import Compacted
    from registry.upkeep.garbage import Collected
    from registry.upkeep.usage import ModelUsage, Usage, VersionUsage


@command("du", "registry du\nregistry du lenet5")
@click.argument("model", required=False, type=ReferenceType())
@click.option(
    "--limit", type=click.IntRange(0), help="Number of rows; 0 shows all. [default: 20, and all with -q]"
)
def du(model: str | None, limit: int | None, registry: Registry, view: TableView, as_json: bool) -> None:
    """Say who holds the bytes on the disk.

    OWN is what was written for the versions of a model, or for a version, first. FREES is what removing them alone would
    free. UNHELD is the number of a model's versions that have no alias and no tag, are not the latest, and that nothing
    came from; MAY GO is what removing these would free. registry ls MODEL --unheld lists them.
    """
    if model is not None:
        _print_versions(registry, registry.resolve(model).model, limit, view, as_json)
        return
    # Lazy: start-up.
    from registry.upkeep.usage import usage

    found = usage(registry.catalog)
    if as_json:
        print_json(found.document)
        return
    if not found.models:
        nothing("no models yet; store one with: registry import FILE --name MODEL")
        return
    shown, left = _first(found.models, limit, view)
    fields: list[Field[ModelUsage]] = [
        (Column("MODEL", is_text=True), lambda one: one.name),
        (Column("VERSIONS", 4), lambda one: one.versions),
        (Column("OWN", 1), lambda one: size(one.own)),
        (Column("FREES", 2), lambda one: size(one.freed)),
        (Column("AS FILES", 5), lambda one: size(one.size)),
        (Column("UNHELD", 3), lambda one: one.unheld or None),
        (Column("MAY GO", 3), lambda one: size(one.unheld_freed) if one.unheld else None),
    ]
    print_table(fields, shown, view, below=[*left, *_sums(found)])


def _print_versions(
    registry: Registry, model: str, limit: int | None, view: TableView, as_json: bool
) -> None:
    # Lazy: start-up.
    from registry.upkeep.usage import usage_of

    found = usage_of(registry.catalog, model)
    if as_json:
        print_json({"model": model, "versions": [one._asdict() for one in found]})
        return
    shown, left = _first(found, limit, view)
    fields: list[Field[VersionUsage]] = [
        (Column("NAME", is_text=True), lambda one: one.name),
        (Column("OWN", 1), lambda one: size(one.own)),
        (Column("FREES", 2), lambda one: size(one.freed)),
        (Column("AS FILE", 4), lambda one: size(one.size)),
        (Column("HELD BY", 3, is_text=True), lambda one: one.held_by or "-"),
    ]
    print_table(fields, shown, view, below=left)


_ROWS = 20
"""Rows of a table, unless another number is asked for."""


def _first(found: Any, limit: int | None, view: TableView) -> tuple[Any, list[str]]:
    """The rows to show, and the line that says how many were left out."""
    most = limit if limit is not None else 0 if view.is_quiet else _ROWS
    shown = found[: most or len(found)]
    left = [f"{len(shown):,} of {len(found):,} rows; --limit 0 shows all"] if len(shown) < len(found) else []
    return shown, left


def _sums(found: Usage) -> list[str]:
    """What the whole registry takes, a line each."""
    shared = f"; sharing saves {size(found.saved)}, {found.saved / found.logical:.0%}" if found.saved else ""
    return [
        f"{size(found.stored)} on disk, {size(found.logical)} as separate files{shared}",
        *([f"{size(found.cached)} of cached results; see registry cache list"] if found.cached else []),
        *([f"{size(found.unneeded)} unneeded; free it with: registry gc"] if found.unneeded else []),
    ]


@command("prune", "registry prune -n\nregistry prune --yes")
@click.option("--dry-run", "-n", is_flag=True, help="Only show what could be freed.")
@click.option("--yes", "-y", is_flag=True, help="Free it without asking.")
def prune(dry_run: bool, yes: bool, registry: Registry, as_json: bool) -> int:
    """Free what can be had without losing anything.

    The command shows what could be freed, asks, stores older versions as differences (as registry compact), and removes
    what nothing needs (as registry gc). It never removes a version or a cached result; it names those that may go, and
    the commands for that. The exit status is 1 if a model cannot be compacted.
    """
    with progress_bar("looking") as report:
        compacted = registry.compact(dry_run=True, progress=report)
    garbage = registry.collect_garbage(dry_run=True)
    if not as_json:
        _tell(registry, garbage, compacted)
    if dry_run:
        if as_json:
            print_json(_document(registry, garbage, compacted, dry_run=True))
        return _status(compacted)
    has_work = garbage.packs or garbage.manifests or garbage.temporary or any(one.packs for one in compacted)
    if has_work:
        if not yes:
            if as_json or not sys.stdin.isatty():
                raise Conflict("nothing was freed", "add --yes to free it without a question")
            if not click.confirm("Compact and collect?", err=True):
                raise Conflict("nothing was freed")
        with progress_bar("compacting") as report:
            compacted = registry.compact(progress=report)
        garbage = registry.collect_garbage()
    if as_json:
        print_json(_document(registry, garbage, compacted, dry_run=False))
        return _status(compacted)
    _tell_done(garbage, compacted)
    return _status(compacted)


def _status(compacted: list[Compacted]) -> int:
    return int(any(one.problem for one in compacted))


def _document(
    registry: Registry, garbage: Collected, compacted: list[Compacted], *, dry_run: bool
) -> dict[str, Any]:
    """What could be freed, or was, in the shape that `--json` prints."""
    unused, held = _unused(registry)
    found = _usage(registry)
    return {
        "dry_run": dry_run,
        "gc": asdict(garbage),
        "compact": [one._asdict() for one in compacted],
        "cache": {"unused": unused, "bytes": held},
        "unheld": {
            "versions": sum(one.unheld for one in found.models),
            "bytes": sum(one.unheld_freed for one in found.models),
        },
    }


def _usage(registry: Registry) -> Usage:
    # Lazy: start-up.
    from registry.upkeep.usage import usage

    return usage(registry.catalog)


def _unused(registry: Registry) -> tuple[int, int]:
    """How many cached results no run was trained on, and what removing them would free."""
    # Lazy: start-up.
    from registry.upkeep.usage import freed_by

    unused = [one.id for one in registry.artifacts.find() if not one.runs]
    return len(unused), freed_by(registry.catalog, unused)


def _tell(registry: Registry, garbage: Collected, compacted: list[Compacted]) -> None:
    """Say what could be freed, and by which command."""
    parts = [
        counted(garbage.packs, "pack"),
        counted(garbage.manifests, "manifest"),
        counted(garbage.temporary, "temporary file"),
    ]
    waiting = f"{size(garbage.waiting_bytes)} more within {garbage.wait_seconds / 60:.0f} min"
    rewritten = sum(one.before for one in compacted)
    models = counted(sum(bool(one.packs) for one in compacted), "model")
    versions = counted(sum(one.versions for one in compacted), "version")
    unused, held = _unused(registry)
    found = _usage(registry)
    unheld = sum(one.unheld for one in found.models)
    may_go = sum(one.unheld_freed for one in found.models)
    print_facts(
        [
            ("gc", f"{size(garbage.bytes)}: {', '.join(parts)}"),
            ("", waiting if garbage.waiting else None),
            (
                "compact",
                f"{size(rewritten)} may become smaller: {versions} of {models} as differences"
                if rewritten
                else "nothing",
            ),
            (
                "cache",
                f"{size(held)}: {counted(unused, 'result')} that no run used; registry cache clear --unused"
                if unused
                else None,
            ),
            (
                "versions",
                f"{size(may_go)}: {counted(unheld, 'version')} that nothing holds; registry ls --unheld"
                if unheld
                else None,
            ),
        ]
    )


def _tell_done(garbage: Collected, compacted: list[Compacted]) -> None:
    """Say what was freed, and which models could not be compacted."""
    for one in compacted:
        if one.problem:
            warn(f"error: {one.model}: {one.problem}")
    saved = sum(one.before - (one.after or 0) for one in compacted)
    if saved:
        say(
            f"compacted: {size(saved)} less, which registry gc frees in an hour, as somebody may still read it"
        )
    say(f"freed {size(garbage.bytes)}")
