"""Names and removal: alias, tag, note, rm."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from registry.catalog.documents import version_document
from registry.catalog.versions import list_aliases
from registry.cli import completing
from registry.cli.completing import completes
from registry.cli.options import ReferenceType, command
from registry.cli.output import GC_FREES, counted, nothing, print_json, say, size, text_of
from registry.cli.tables import Column, Field, TableView, print_table
from registry.log.reference import parse_reference
from registry.store.errors import Conflict

if TYPE_CHECKING:
    from registry.registry import Registry


@command("alias", "registry alias lenet5:v3 production\nregistry alias --remove lenet5@production")
@click.argument("reference", required=False, type=ReferenceType())
@click.argument("name", required=False)
@click.option("--remove", "-d", is_flag=True, help="Remove the alias REFERENCE. The version stays.")
def alias(
    reference: str | None, name: str | None, remove: bool, registry: Registry, view: TableView, as_json: bool
) -> None:
    """Point an alias at a version.

    From then on, NAME points at REFERENCE. Without arguments, the command lists the aliases. The registry itself sets
    the aliases latest and best.
    """
    if remove:
        parsed = parse_reference(reference or "")
        if parsed.alias is None or name:
            raise click.UsageError("name one alias to remove, such as lenet5@production")
        registry.remove_alias(parsed.model, parsed.alias)
        print_json({"removed": str(parsed)}) if as_json else say(f"{parsed} removed")
    elif reference and name:
        checkpoint = registry.set_alias(reference, name)
        target = f"{checkpoint.model}@{name}"
        print_json({"alias": target, "name": checkpoint.name, "id": checkpoint.id}) if as_json else say(
            f"{target} → {checkpoint.name}"
        )
    elif reference:
        raise click.UsageError("give the alias a name, such as: registry alias lenet5:v3 production")
    else:
        found = list_aliases(registry.catalog)
        rows = [
            {"alias": f"{model}@{alias}", "name": f"{model}:v{number}", "id": version_id}
            for model, alias, number, version_id in found
        ]
        if as_json:
            print_json({"aliases": rows})
        elif not rows:
            nothing("no aliases yet; set one with: registry alias lenet5:v3 production")
        else:
            fields: list[Field[dict[str, str]]] = [
                (Column("ALIAS", is_text=True), lambda row: row["alias"]),
                (Column("VERSION", is_text=True), lambda row: row["name"]),
                (Column("ID", 1), lambda row: row["id"][:12]),
            ]
            print_table(fields, rows, view)


@command("tag", "registry tag lenet5:v3 paper\nregistry tag --remove lenet5:v3 paper")
@click.argument("reference", type=ReferenceType())
@click.argument("tags", nargs=-1, required=True, metavar="TAG...", shell_complete=completes(completing.tags))
@click.option("--remove", "-d", is_flag=True, help="Remove the tags.")
def tag(reference: str, tags: tuple[str, ...], remove: bool, registry: Registry, as_json: bool) -> None:
    """Attach tags to a version."""
    name = registry.resolve(reference).name
    for word in tags:
        (registry.remove_tag if remove else registry.set_tag)(name, word)
    version = registry.resolve(name)
    if as_json:
        print_json({"name": name, "tags": list(version.tags)})
    else:
        say(f"{name}  {', '.join(version.tags) or 'no tags'}")


@command("note", 'registry note lenet5:v3 "trained with the corrected labels"')
@click.argument("reference", type=ReferenceType())
@click.argument("text")
def note(reference: str, text: str, registry: Registry, as_json: bool) -> None:
    """Attach a note to a version."""
    checkpoint = registry.add_note(reference, text)
    if as_json:
        written = [{"written": when, "text": words} for when, words in checkpoint.notes]
        print_json({"name": checkpoint.name, "notes": written})
    else:
        say(f"{checkpoint.name}  {counted(len(checkpoint.notes), 'note')}")


@command("rm", "registry rm lenet5:v1 lenet5:v2 --dry-run")
@click.argument("references", nargs=-1, required=True, type=ReferenceType(), metavar="REFERENCE...")
@click.option("--force", is_flag=True, help="Also remove versions that have an alias or a tag.")
@click.option("--yes", "-y", is_flag=True, help="Remove without asking.")
@click.option("--dry-run", "-n", is_flag=True, help="Only show what would be removed.")
def rm(
    references: tuple[str, ...], force: bool, yes: bool, dry_run: bool, registry: Registry, as_json: bool
) -> None:
    """Remove versions, all of them or none.

    The command shows what it will remove, and asks first. Tensors that other versions share stay. registry gc frees
    the space.
    """
    versions = registry.remove(references, force=force, dry_run=True)
    if not as_json:
        for version in versions:
            held = [*version.aliases, *version.tags]
            say(
                f"{version.name}  {version.id[:12]}  {size(version.size)}"
                + (f"  {text_of(held)}" if held else "")
            )
    if not dry_run:
        if not yes:
            if as_json or not sys.stdin.isatty():
                raise Conflict("nothing was removed", "add --yes to remove without a question")
            if not click.confirm(f"Remove {counted(len(versions), 'version')}?", err=True):
                raise Conflict("nothing was removed")
        registry.remove([version.name for version in versions], force=force)
    if as_json:
        print_json({"removed": [version_document(version) for version in versions], "dry_run": dry_run})
    else:
        word = "would be removed" if dry_run else f"removed; {GC_FREES}"
        say(f"{counted(len(versions), 'version')} {word}")
