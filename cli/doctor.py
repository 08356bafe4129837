"""Whether all is well: doctor."""

from __future__ import annotations

import click

from registry.cli.options import command
from registry.cli.output import encodable, print_json, text_of, with_root
from registry.store.text import printable

_SIGNS = {"good": ("✓", "green"), "note": ("~", "yellow"), "bad": ("✗", "red")}


@command("doctor", "registry doctor")
def doctor(root: str | None, as_json: bool) -> int:
    """Check versions, log, locks and space in a moment.

    The command reads no tensor; registry verify compares every stored byte. The exit status is 1 if something is wrong.
    """
    # Lazy: start-up.
    from registry.upkeep.examination import examine

    found = examine(root)
    is_bad = any(one.state == "bad" for one in found)
    if as_json:
        print_json({"is_well": not is_bad, "findings": [one._asdict() for one in found]})
        return int(is_bad)
    width = max(len(one.topic) for one in found)
    for one in found:
        sign, color = _SIGNS[one.state]
        click.echo(f"{click.style(encodable(sign), fg=color)} {one.topic.ljust(width)}  {text_of(one.text)}")
        if one.advice:
            click.echo(f"  {' ' * width}  {encodable(with_root(printable(one.advice)))}")
    return int(is_bad)
