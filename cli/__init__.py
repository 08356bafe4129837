"""The `registry` command: one module for each group of commands.

Nothing here imports torch, numpy or pydantic at the top, and commands that only read metadata never do.
"""

from __future__ import annotations


def main() -> None:
    """Run the command line (the console script `registry`)."""
    from registry.cli.app import app

    app()
