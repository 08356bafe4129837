"""The commands: which module has each, and how advice names one so that it can be pasted."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence

_MODULES = (
    ("files", "init import_ export"),
    ("training", "train eval_ predict"),
    ("transfers", "diff plan transfer verify_frozen compare advise"),
    ("reading", "list_ show"),
    ("runs", "history best lineage runs log board"),
    ("reading", "status"),
    ("caches", "cache"),
    ("naming", "alias tag note rm"),
    ("upkeep", "verify gc compact rebuild"),
    ("configs", "config"),
    ("shell", "completion"),
)
COMMANDS = {
    function.rstrip("_").replace("_", "-"): (module, function)
    for module, functions in _MODULES
    for function in functions.split()
}
"""Module and function of each command, in the order of their use."""

_MENTIONED = re.compile(rf"\bregistry (?=(?:{'|'.join(COMMANDS)})\b)")


def with_root(text: str) -> str:
    """A text in which every command has the option `--root`, if this one was given it."""
    root = _given(sys.argv[1:])
    return _MENTIONED.sub(lambda _: f"registry --root {shlex.quote(root)} ", text) if root else text


def _given(words: Sequence[str]) -> str:
    """The folder that the option `--root` of a command line names; empty if it has none."""
    for i, word in enumerate(words):
        if word == "--root":
            return "".join(words[i + 1 : i + 2])
        if word.startswith("--root="):
            return word.partition("=")[2]
    return ""
