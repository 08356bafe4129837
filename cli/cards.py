"""A model card: card."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from registry.cli.options import ReferenceType, command
from registry.cli.output import encodable, print_json, say
from registry.reports import html, markdown
from registry.store.durable import write_file
from registry.store.errors import Invalid

if TYPE_CHECKING:
    from registry.registry import Registry

_FORMS = {".md": markdown.render, ".html": html.render}


@command("card", "registry card lenet5@best\nregistry card lenet5@best -o card.html")
@click.argument("reference", type=ReferenceType())
@click.option("--output", "-o", type=click.Path(), metavar="FILE", help="Write to a file: .md or .html.")
def card(reference: str, output: str | None, registry: Registry, as_json: bool) -> None:
    """Write a model card from what was recorded.

    What was not recorded is said to be so, and nothing is guessed. The keys license, intended_use, limitations,
    evaluation_data and contact are read from the meta or the config of the version.
    """
    # Lazy: start-up.
    from registry.checkpoints.card import card as blocks_of

    form = Path(output).suffix.lower() if output else ".md"
    if form not in _FORMS:
        raise Invalid(f"{output}: a card is written as .md or .html", "give one of these endings")
    checkpoint = registry[reference]
    text = _FORMS[form](blocks_of(registry, checkpoint))
    if as_json:
        print_json({"name": checkpoint.name, "id": checkpoint.id, "card": text})
    elif output is None:
        click.echo(encodable(text), nl=False)
    else:
        write_file(Path(output), text.encode())
        say(f"wrote {output}")
