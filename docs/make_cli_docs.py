"""Write docs/cli.md from the commands' own help. With --check, only say whether it is up to date."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click

from registry.cli.app import app

PAGE = Path(__file__).with_name("cli.md")
INTRODUCTION = """# The command line

`make docs` writes this page from the commands' own help. Every command takes `--json` for one JSON document of a stable
shape, `--root` (or `REGISTRY_ROOT`) for the registry's folder, and `--debug` for a traceback. A terminal shows drawn
tables, and a pipe gets plain aligned text. The exit status is 0 when all went well, 1 when something failed or was found
damaged, and 2 when a command was called wrongly.
"""


def helps(
    command: click.Command, name: str, parent: click.Context | None = None
) -> Iterator[tuple[str, str]]:
    """The name and the help of a command, and of every command below it."""
    context = click.Context(command, info_name=name, parent=parent, max_content_width=100, terminal_width=100)
    yield context.command_path, command.get_help(context)
    if isinstance(command, click.Group):
        for below in command.list_commands(context):
            found = command.get_command(context, below)
            assert found is not None
            yield from helps(found, below, context)


def page() -> str:
    """The text of docs/cli.md."""
    parts = [f"## {path}\n\n```text\n{text.rstrip()}\n```\n" for path, text in helps(app, "registry")]
    return "\n".join([INTRODUCTION, *parts])


if __name__ == "__main__":
    if "--check" in sys.argv[1:]:
        sys.exit(0 if PAGE.read_text("utf-8") == page() else "docs/cli.md is out of date; run: make docs")
    PAGE.write_text(page(), "utf-8")
