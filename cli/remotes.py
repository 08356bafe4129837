"""Names of places: remote add, list, remove."""

from __future__ import annotations

import click

from registry.cli.options import Group, command, example_text
from registry.cli.output import nothing, print_json, say
from registry.cli.tables import Column, Field, print_table


@click.group(
    "remote",
    cls=Group,
    epilog=example_text("registry remote add team s3://models/team\nregistry remote list"),
)
def remote() -> None:
    """Name places of registries, for --to and --from.

    A name stands for a place in push, pull and repair, such as in: registry push lenet5@best --to team. The names are
    your own. They lie in $XDG_CONFIG_HOME/torch-registry/remotes.toml, or below ~/.config, without keys. A folder goes
    before a name: a name counts only if there is no folder of that name in the working directory.
    """


@command("add", "registry remote add team s3://models/team\nregistry remote add backup /backup/models")
@click.argument("name")
@click.argument("place")
def add(name: str, place: str, as_json: bool) -> None:
    """Name the registry at a URL or in a folder.

    Nothing is made there, and nothing is asked of it. A folder is kept as an absolute path.
    """
    # Lazy: start-up.
    from registry.remote.names import add_name

    place = add_name(name, place)
    print_json({"name": name, "place": place}) if as_json else say(f"{name} is {place}")


@command("list", "registry remote list")
def list_(as_json: bool) -> None:
    """List the names and their places."""
    # Lazy: start-up.
    from registry.remote.names import named_places

    found = named_places()
    if as_json:
        print_json([{"name": name, "place": place} for name, place in found.items()])
    elif found:
        fields: list[Field[tuple[str, str]]] = [
            (Column("NAME", is_text=True), lambda one: one[0]),
            (Column("PLACE", is_text=True), lambda one: one[1]),
        ]
        print_table(fields, list(found.items()))
    else:
        nothing("no place has a name; add one with: registry remote add NAME PLACE")


@command("remove", "registry remote remove team")
@click.argument("name")
def remove(name: str, as_json: bool) -> None:
    """Forget a name. The registry stays as it is."""
    # Lazy: start-up.
    from registry.remote.names import remove_name

    place = remove_name(name)
    print_json({"removed": name, "place": place}) if as_json else say(f"{name} is no longer {place}")


for one in (add, list_, remove):
    remote.add_command(one)
