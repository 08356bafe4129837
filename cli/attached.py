"""Files of a checkpoint: files, attach."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from registry.cli.options import ReferenceType, command
from registry.cli.output import nothing, print_json, say, size, time_of
from registry.cli.tables import Column, Field, print_table
from registry.store.durable import write_file
from registry.store.errors import Conflict
from registry.store.text import printable

if TYPE_CHECKING:
    from registry.checkpoints.files import File
    from registry.registry import Registry


@command("files", "registry files lenet5@best\nregistry files lenet5:v3 model.onnx --output model.onnx")
@click.argument("reference", type=ReferenceType())
@click.argument("name", required=False)
@click.option("--output", "-o", metavar="FILE", type=click.Path(), help="Write the file NAME to FILE.")
def files(reference: str, name: str | None, output: str | None, registry: Registry, as_json: bool) -> None:
    """List the files of a version, or write one of them.

    These are the files that an imported folder had beside its parameters, and those that were attached.
    """
    if (name is None) != (output is None):
        raise click.UsageError("to write a file, give NAME and --output")
    if name is not None and output is not None:
        if Path(output).exists():
            raise Conflict(f"{printable(output)}: the file exists", "choose another name")
        data = registry.read_file(reference, name)
        write_file(Path(output), data)
        if as_json:
            print_json({"name": name, "file": output, "size": len(data)})
        else:
            say(f"{printable(name)} → {printable(output)}  {size(len(data))}")
        return
    found = registry.files(reference)
    if as_json:
        print_json([one._asdict() for one in found])
    elif not found:
        nothing(f"{registry.resolve(reference).name} has no files")
    else:
        fields: list[Field[File]] = [
            (Column("FILE", is_text=True), lambda one: one.name),
            (Column("SIZE"), lambda one: size(one.size)),
            (Column("ATTACHED"), lambda one: time_of(one.attached) if one.attached else "-"),
        ]
        print_table(fields, found)


@command("attach", "registry attach lenet5:v3 model.onnx")
@click.argument("reference", type=ReferenceType())
@click.argument("paths", nargs=-1, required=True, type=click.Path(), metavar="FILE...")
@click.option("--force", is_flag=True, help="Replace attached files of these names.")
def attach(reference: str, paths: tuple[str, ...], force: bool, registry: Registry, as_json: bool) -> None:
    """Attach files that were made from a version to it.

    The registry keeps each FILE as long as the checkpoint.
    """
    found = registry.attach(reference, *paths, force=force)
    if as_json:
        print_json([{"name": one.version, "file": one.name, "size": one.size} for one in found])
    for one in found if not as_json else ():
        say(f"{printable(one.name)} → {one.version}  {size(one.size)}")
