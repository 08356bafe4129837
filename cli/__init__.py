"""The `registry` command. Each group of commands has one module.

It may import every other layer. No module imports torch, numpy or pydantic at its top, so commands that read only
metadata never load them. To add a command, write a function in the module of its group, add a row to `_GROUPS` in
`app`, and add a test.
"""

from __future__ import annotations

import gc
import signal
import sys


def main() -> None:
    """Run the command line (the console script `registry`)."""
    # What is loaded here stays until the end, so Python's garbage collector would look at it in vain. It would do so while this is
    # loaded, and several times as the process ends: a sixth of the time of a quick command.
    gc.disable()
    try:
        # Lazy: start-up.
        from registry.cli.app import app

        gc.enable()
        app()
    except KeyboardInterrupt:
        # Before the command line could say so itself, or after its work.
        print("interrupted; nothing is half done", file=sys.stderr)
        sys.exit(130)
    finally:
        # Libraries that torch loads complain of what is left.
        if "torch" not in sys.modules:
            gc.freeze()
            # All is done, so an interruption ends the process at once.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
