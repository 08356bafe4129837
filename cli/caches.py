"""The results of cached functions: cache list, show, rm, clear."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from registry.cli.options import Group, command, example_text, seconds
from registry.cli.output import GC_FREES, ago, counted, nothing, print_facts, print_json, say, size, time_of
from registry.cli.tables import Column, Field, TableView, print_table

if TYPE_CHECKING:
    from registry.cache.artifacts import Artifact
    from registry.registry import Registry


@click.group(
    "cache",
    cls=Group,
    epilog=example_text("registry cache list\nregistry cache clear --older-than 30d --unused"),
)
def cache() -> None:
    """Show and clear cached datasets.

    The registry keeps what a function under @cached returned as an artifact. The artifact's key covers everything
    that the result depends on.
    """


@command("list", "registry cache list")
def list_(registry: Registry, view: TableView, as_json: bool) -> None:
    """List artifacts, the newest first."""
    found = registry.artifacts.find()
    if as_json:
        print_json([one.document for one in found])
        return
    if not found:
        nothing("nothing is cached; put @cached from registry above a function that prepares data")
        return
    fields: list[Field[Artifact]] = [
        (Column("KEY", is_text=True), lambda one: one.key[:12]),
        (Column("FUNCTION", 1, is_text=True), lambda one: one.function),
        (Column("SIZE", 2), lambda one: size(one.size)),
        (Column("CREATED", 4), lambda one: time_of(one.created)),
        (Column("USED", 3), lambda one: ago(one.used)),
        (Column("BY RUNS", 5, is_text=True), lambda one: ", ".join(one.runs) or "-"),
    ]
    print_table(fields, found, view)


@command("show", "registry cache show 3f2a91c04b7e")
@click.argument("key")
def show(key: str, registry: Registry, as_json: bool) -> None:
    """Show what an artifact was made from and what it holds."""
    one = registry.artifacts[key]
    if as_json:
        print_json(one.document)
        return
    record = one.record
    files = [
        (f"file.{name}", f"{file['path']}  {file['digest'][:12]}")
        for name, found in record.get("files", {}).items()
        for file in found
    ]
    print_facts(
        [
            ("function", one.function),
            ("key", one.key),
            ("dataset", one.id),
            ("version", record.get("version")),
            *[(f"parameter.{name}", value) for name, value in record.get("parameters", {}).items()],
            *files,
            ("holds", f"{counted(one.tensors, 'tensor')}, {size(one.size)}"),
            ("took", f"{record['seconds']:.3f} s" if "seconds" in record else None),
            ("created", time_of(one.created)),
            ("used", ago(one.used)),
            ("runs", ", ".join(one.runs) or None),
        ]
    )


@command("rm", "registry cache rm 3f2a91c04b7e")
@click.argument("keys", nargs=-1, required=True, metavar="KEY...")
def rm(keys: tuple[str, ...], registry: Registry, as_json: bool) -> None:
    """Remove cached artifacts.

    They are computed again when they are needed. The next registry gc frees their bytes.
    """
    chosen = [registry.artifacts[key] for key in keys]
    registry.artifacts.remove(one.key for one in chosen)
    _tell(chosen, as_json)


@command("clear", "registry cache clear --older-than 30d --unused")
@click.option(
    "--older-than",
    callback=lambda ctx, param, text: None if text is None else seconds(ctx, param, text),
    metavar="TIME",
    help="Only artifacts that were not used for this time, such as 30d.",
)
@click.option("--unused", is_flag=True, help="Only artifacts that no run was trained on.")
def clear(older_than: float | None, unused: bool, registry: Registry, as_json: bool) -> None:
    """Remove cached artifacts: all, or the old or unused ones.

    The next registry gc frees their bytes.
    """
    _tell(registry.artifacts.clear(older_than=older_than, unused=unused), as_json)


def _tell(gone: list[Artifact], as_json: bool) -> None:
    if as_json:
        print_json([one.document for one in gone])
        return
    for one in gone:
        say(f"{one.key[:12]}  {one.function}  {size(one.size)}")
    say(f"{counted(len(gone), 'artifact')} removed; {GC_FREES}")


for one in (list_, show, rm, clear):
    cache.add_command(one)
