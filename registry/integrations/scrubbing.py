"""Scrubbing: states of frameworks without the paths of this machine, and with those of the machine that loads them.

state = scrubbed(trainer_state, {"checkpoints": folder})
trainer_state = unscrubbed(state, {"checkpoints": other_folder})
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_MARK = "torch-registry:"
"""What a path begins with whose folder was taken away; the name of the folder follows, then `/` and the rest."""


def scrubbed(state: Any, folders: Mapping[str, str | os.PathLike[str]]) -> Any:
    """A tree in which each absolute path below a known folder names that folder instead.

    The working directory and the home directory are always known. A path below none of them stays as it is.

    >>> scrubbed({"best": "/data/run/a.ckpt", "score": 0.5}, {"checkpoints": "/data/run"})
    {'best': 'torch-registry:checkpoints/a.ckpt', 'score': 0.5}

    Args:
        state: dicts, lists and tuples; keys that are paths are scrubbed too. Nothing in it is changed.
        folders: names for folders of this program; the deepest one that holds a path is taken.
    """
    known = sorted(_known(folders).items(), key=lambda item: -len(item[1]))

    def without_folder(text: str) -> str:
        for name, folder in known:
            if text == folder or text.startswith(folder.rstrip("/") + "/"):
                return f"{_MARK}{name}{text[len(folder.rstrip('/')) :]}"
        return text

    return _mapped(state, without_folder)


def unscrubbed(state: Any, folders: Mapping[str, str | os.PathLike[str]]) -> Any:
    """What `scrubbed` was given, with the folders of this program.

    Args:
        folders: as for `scrubbed`; a path below a folder that has no name here stays scrubbed.
    """
    known = _known(folders)

    def with_folder(text: str) -> str:
        name, slash, rest = text.removeprefix(_MARK).partition("/")
        if not text.startswith(_MARK) or name not in known:
            return text
        return known[name].rstrip("/") + slash + rest

    return _mapped(state, with_folder)


def without_folders(state: Any) -> Any:
    """A tree in which each absolute path is its last part alone, for what no program will ever look up again.

    >>> without_folders({"output_dir": "/home/ann/out/", "seed": 3})
    {'output_dir': 'out', 'seed': 3}
    """
    return _mapped(state, lambda text: os.path.basename(text.rstrip("/")) if os.path.isabs(text) else text)


def _known(folders: Mapping[str, str | os.PathLike[str]]) -> dict[str, str]:
    own = {name: os.path.abspath(folder) for name, folder in folders.items()}
    return {"home": str(Path.home()), "working": str(Path.cwd()), **own}


def _mapped(tree: Any, change: Callable[[str], str]) -> Any:
    """A copy of a tree in which a function has changed every text; containers of other kinds stay as they are."""
    if isinstance(tree, str):
        return change(tree)
    if isinstance(tree, os.PathLike):
        return change(os.fsdecode(os.fspath(tree)))
    if type(tree) is dict:
        return {_mapped(key, change): _mapped(value, change) for key, value in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(_mapped(item, change) for item in tree)
    return tree
