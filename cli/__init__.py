"""The `registry` command: one module for each group of commands.

It imports everything below. No torch, numpy or pydantic stands at the top of a module; commands that need the metadata alone
never load them. To add a command: a function in its group's file, a row of `_ROWS` in `app`, a test.
"""

from __future__ import annotations


def main() -> None:
    """Run the command line (the console script `registry`)."""
    # Lazy: start-up.
    from registry.cli.app import app

    app()
