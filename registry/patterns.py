"""Glob patterns of names, as for files. A pattern that spells out a whole name always fits that name.

`*` stands for any text, dots included, `?` for one character, `[ab]` for one of several. A bracket that belongs to a
name, as in `blocks[0].weight`, is therefore written `[[]`, unless the pattern is the whole name.
"""

from __future__ import annotations

import fnmatch
import glob
from collections.abc import Container, Iterable

from registry.store.errors import Invalid


def fits(name: str, pattern: str) -> bool:
    """Whether a pattern fits a name.

    >>> fits("blocks[0].weight", "blocks[[]0].*"), fits("fc.1.weight", "fc.?.*")
    (True, True)
    """
    return name == pattern or fnmatch.fnmatchcase(name, pattern)


def below(parent: str) -> str:
    """The pattern of all names below a parent; an empty parent is the network itself.

    >>> below("fc.5"), below("blocks[0]"), below("")
    ('fc.5.*', 'blocks[[]0].*', '*')
    """
    return f"{escaped(parent)}.*" if parent else "*"


def escaped(name: str) -> str:
    """The pattern that fits this name and no other."""
    return glob.escape(name)


def meant(pattern: str, names: Container[str]) -> str:
    """The pattern that the user means: one that is itself among the names stands for that name alone.

    >>> meant("blocks[0].weight", ["blocks[0].weight", "blocks0.weight"])
    'blocks[[]0].weight'
    """
    return escaped(pattern) if pattern in names else pattern


def unused(what: str, pattern: str, names: Iterable[str]) -> Invalid:
    """The error about a pattern that fits none of the names.

    Args:
        what: what to call the pattern in the error.
    """
    plain = pattern.replace("[", "[[]")
    if "[" in pattern and any(fnmatch.fnmatchcase(name, plain) for name in names):
        why = "matches nothing, as brackets stand for one of several characters"
        return Invalid(f"{what} {why}", f"write it as {plain}")
    return Invalid(f"{what} matches nothing", "it is a typo")
