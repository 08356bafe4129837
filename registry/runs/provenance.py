"""Provenance: how a checkpoint was made, and on which kinds of devices.

It names no people, no machines, and no folders outside the working directory.
"""

from __future__ import annotations

import functools
import operator
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

_ABSOLUTE = re.compile(r"(?:[A-Za-z]:)?[/\\~]")


@functools.cache
def of_process() -> Mapping[str, Any]:
    """What does not change while a program runs: its command, code, and software."""
    found: dict[str, Any] = {
        "command": [_without_place(word) for word in sys.argv],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
    }
    if git := _git():
        found["git"] = git
    return found


def devices(tensors: Iterable[torch.Tensor]) -> list[str]:
    """The kinds of devices that tensors are on, such as `cpu` and an accelerator's model."""
    kinds = set(map(operator.attrgetter("device"), tensors))
    return sorted({torch.cuda.get_device_name(d) if d.type == "cuda" else d.type for d in kinds})


def _without_place(word: str) -> str:
    """A word of the command line; a path outside the working directory, or a URL, is cut down to its last part."""
    option, equals, value = word.partition("=")
    if equals and option.startswith("-"):
        return f"{option}={_without_place(value)}"
    if "://" in word:
        # It may hold a password, or a token behind `?`.
        path = re.split(r"[?#]", word.partition("://")[2].partition("/")[2])[0]
        return f".../{re.split('[/@]', path)[-1]}"
    if not _ABSOLUTE.match(word):
        return word
    try:
        return str(Path(word).relative_to(Path.cwd()))
    except ValueError:
        return f".../{Path(word).name}"


def _git() -> dict[str, Any] | None:
    """The commit of the working directory, and whether tracked files differ from it."""
    quiet = {**os.environ, "GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"}

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *words], capture_output=True, text=True, timeout=5, env=quiet, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    if not commit:
        return None
    changes = git("status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": bool(changes) if changes is not None else None}
