"""The `registry` command. Each group of commands has one module.

It may import every other layer. No module imports torch, numpy or pydantic at its top, so commands that read only
metadata never load them. To add a command, write a function in the module of its group, add a row to `_ROWS` in `app`,
and add a test.
"""

from __future__ import annotations


def main() -> None:
    """Run the command line (the console script `registry`)."""
    # Lazy: start-up.
    from registry.cli.app import app

    app()
