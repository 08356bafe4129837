"""Scratch: the folder of one run of a script, with its traces and with the registries that stand for the user's own."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from registry.log import settings
from registry.store.digest import digest

COPIES = "REGISTRY_CHECK_COPIES"
"""The variable that says whether a registry begins as a copy of the user's own; otherwise it begins empty."""

_REGISTRIES = "registries"


def trace_file(folder: Path, rank: int) -> Path:
    """The trace of one of the processes that train together."""
    return folder / f"trace-{rank}.jsonl"


def scratch_root(folder: Path, root: Path, *, copies: bool) -> Path:
    """The folder that stands for a registry's own.

    Args:
        copies: let it begin with all that is in the registry.
    """
    root = Path(os.path.abspath(root))
    if root.is_relative_to(folder):
        return root
    inside = folder / _REGISTRIES / f"{root.name}-{digest(str(root).encode())[:8]}"
    if copies and not inside.exists() and settings.are_there(root):
        shutil.copytree(root, inside)
    return inside


def registries(folder: Path) -> list[Path]:
    """The registries that a script has made."""
    return [root for root in sorted((folder / _REGISTRIES).glob("*")) if settings.are_there(root)]
