"""Patterns of names: as for files, but a name that is written out always fits itself.

`*` stands for anything, dots included, `?` for one character, `[ab]` for one of several. So a bracket that belongs to a
name, as in `blocks[0].weight`, is written `[[]`, unless the pattern is the whole name.
"""

from __future__ import annotations

import fnmatch
import glob
from collections.abc import Container, Iterable


def fits(name: str, pattern: str) -> bool:
    """Whether a pattern fits a name.

    >>> fits("blocks[0].weight", "blocks[[]0].*"), fits("fc.1.weight", "fc.?.*")
    (True, True)
    """
    return name == pattern or fnmatch.fnmatchcase(name, pattern)


def below(parent: str) -> str:
    """The pattern of all names below one, which is empty for the names of the network itself.

    >>> below("fc.5"), below("blocks[0]"), below("")
    ('fc.5.*', 'blocks[[]0].*', '*')
    """
    return f"{escaped(parent)}.*" if parent else "*"


def escaped(name: str) -> str:
    """The pattern that fits one name alone."""
    return glob.escape(name)


def meant(pattern: str, names: Container[str]) -> str:
    """The pattern that somebody means: where it is one of some names, that name alone.

    >>> meant("blocks[0].weight", ["blocks[0].weight", "blocks0.weight"])
    'blocks[[]0].weight'
    """
    return escaped(pattern) if pattern in names else pattern


def unused(pattern: str, names: Iterable[str]) -> str:
    """Why a pattern fits none of some names, for an error."""
    plain = pattern.replace("[", "[[]")
    if "[" in pattern and any(fnmatch.fnmatchcase(name, plain) for name in names):
        return f"matches nothing, as brackets stand for one of several characters; write it as {plain}"
    return "matches nothing; it is a typo"
