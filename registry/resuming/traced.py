"""The program that runs a training script under observation: `python -m registry.resuming.traced FOLDER KILL SCRIPT ...`.

FOLDER gets a trace for each process, and all registries that the script opens, so that none of the user's is touched.
KILL is the number of steps after which the process ends itself by SIGKILL, 0 for never.
"""

from __future__ import annotations

import functools
import os
import runpy
import sys
from pathlib import Path
from typing import Any

from registry.home import Home, default_root
from registry.resuming.observing import Observer
from registry.resuming.scratch import COPIES, scratch_root, trace_file


def main() -> None:
    """Run a script as `python SCRIPT ...` does, and write its trace."""
    folder, kill, script, *arguments = sys.argv[1:]
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(script).resolve().parent)
    _redirect(Path(folder))
    rank = int(os.environ.get("RANK") or 0)
    with trace_file(Path(folder), rank).open("w") as file:
        observer = Observer(file, int(kill))
        observer.attach()
        try:
            # The result keeps the script's objects alive.
            left = runpy.run_path(script, run_name="__main__")
        except SystemExit as ended:
            if ended.code not in (None, 0):
                raise
            left = {}
        observer.finish()
        left.clear()


def _redirect(folder: Path) -> None:
    """Let every registry of this process be in the folder."""
    make = Home.__init__
    copies = bool(os.environ.get(COPIES))

    @functools.wraps(make)
    def made(self: Home, root: Path | str | None = None, **given: Any) -> None:
        wanted = Path(default_root() if root is None else root)
        make(self, scratch_root(folder, wanted, copies=copies), **given)

    Home.__init__ = made  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
