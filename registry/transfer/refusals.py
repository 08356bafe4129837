"""Refusals: why a plan cannot be made as it was asked for, and what to add to the call so that it can."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from registry.patterns import below, escaped
from registry.store.errors import Difference, Fix, Incompatible, fix
from registry.transfer.matching import Category, Pair
from registry.transfer.sides import Side
from registry.transfer.suggestions import suggestions

_SHOWN = 3
"""Differences that an error describes."""

_MOST_ADVISED = 12
"""Patterns or rules that an error names; more would not be read."""

_MEANINGS = {Category.SHAPE: "skip", Category.ONLY_A: "unused", Category.ONLY_B: "new"}
"""The expectation by which a difference of a category is accepted."""

_CONSENTS = {Category.CAST: "allow_cast", Category.POSITIONAL: "allow_positional"}
"""The argument that lets names of a category be copied."""


def unexpected(found: Sequence[Pair], left: Side, right: Side, pairs: Sequence[Pair]) -> Incompatible:
    """The error for differences that were not expected.

    Args:
        found: the differences that were not expected.
        pairs: all pairs of the two sides.
    """
    described = "; ".join(_described(pair) for pair in found[:_SHOWN])
    more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    meanings = {pair.name: _MEANINGS.get(pair.category, "") for pair in found}
    wanted = _patterns({pair.name: meanings.get(pair.name, "") for pair in pairs})
    advised: dict[str, Any] = {}
    if wanted:
        advised = {"expect": wanted} if len(wanted) <= _MOST_ADVISED else {"everything": True}
    categories = {pair.category for pair in found}
    advised |= {name: True for category, name in _CONSENTS.items() if category in categories}
    fixes = _renames(left, right, pairs)
    if advised:
        fixes.append(fix("if that is meant", **advised))
    error = Incompatible(f"{described}{more}: not expected", *fixes)
    tensors = "a tensor that was" if len(found) == 1 else f"{len(found)} tensors that were"
    error.summary = f"{left.label} and {right.label} differ in {tensors} not expected to"
    error.differences = [_difference(pair, left, right) for pair in found]
    return error


def nothing_loaded(left: Side, right: Side, pairs: Sequence[Pair]) -> Incompatible:
    """The error for a plan that would load no parameter: the reason, as far as it can be found, and what may help."""
    why, fixes = _why_nothing(left, right, pairs)
    return Incompatible(f"nothing would be loaded from {left.label}: {why}", *fixes)


def _described(pair: Pair) -> str:
    """One difference in words."""
    a, b = pair.a, pair.b
    match pair.category:
        case Category.SHAPE if a and b:
            return f"{b.name} has shape {list(b.shape)}, the source {list(a.shape)}"
        case Category.ONLY_B if b:
            return f"{b.name} is in the target only"
        case Category.ONLY_A if a:
            return f"{a.name} is in the source only"
        case Category.CAST if a and b:
            return f"{b.name} is {b.dtype}, the source {a.dtype}"
        case Category.POSITIONAL:
            return f"{pair.name}: {pair.note}"
        case _:
            return f"{pair.name}: {pair.category} {pair.note}".strip()


def _difference(pair: Pair, left: Side, right: Side) -> Difference:
    """One difference for a table."""
    a, b = pair.a, pair.b
    match pair.category:
        case Category.SHAPE if a and b:
            return Difference("~", b.name, f"{_shape(a.shape)} → {_shape(b.shape)}", "other shape")
        case Category.ONLY_B if b:
            return Difference("+", b.name, _shape(b.shape), f"only in {right.label}")
        case Category.ONLY_A if a:
            return Difference("-", a.name, _shape(a.shape), f"only in {left.label}")
        case Category.CAST if a and b:
            return Difference("~", b.name, f"{a.dtype} → {b.dtype}", "other dtype")
        case _:
            return Difference("~", pair.name, pair.note, str(pair.category))


def _shape(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape)) or "scalar"


def _patterns(meanings: Mapping[str, str]) -> dict[str, str]:
    """Expectations by pattern: a whole layer where all of it has one meaning, and single names elsewhere.

    Args:
        meanings: what is expected of each name of both sides; empty where nothing has to be.
    """
    below_it: dict[str, set[str]] = defaultdict(set)
    for name, meaning in meanings.items():
        for dot in re.finditer(r"\.", name):
            below_it[name[: dot.start()]].add(meaning)
    found = {}
    for name, meaning in meanings.items():
        parent = name.rpartition(".")[0]
        if meaning:
            found[below(parent) if below_it[parent] == {meaning} else escaped(name)] = meaning
    return found


def _why_nothing(left: Side, right: Side, pairs: Sequence[Pair]) -> tuple[str, list[Fix]]:
    """Why nothing would be loaded, by the first reason that applies, and what may help."""
    names = list(left.entries)
    if inner := _containers(left, right):
        give = f"give source{' or source'.join(inner)}"
        return "the names fit inside another container", [Fix("", give, "")]
    renames = _renames(left, right, pairs)
    first = names[0].partition(".")[0]
    if renames and all(name.startswith(f"{first}.") for name in names):
        return f"all {len(names)} source names start with {first}.", renames
    for pair in pairs:
        if pair.category == Category.CAST and pair.kind == "parameter" and pair.a and pair.b:
            differs = f"{pair.b.name} is {pair.b.dtype} against {pair.a.dtype}"
            return f"no dtype fits, {differs}", [fix("if that is meant", allow_cast=True)]
    if why := _no_shape_fits(pairs):
        return why, []
    for pair in pairs:
        if pair.category == Category.POSITIONAL:
            allow = fix("if the numbers still mean the same layers", allow_positional=True)
            return f"the numbers have shifted, {pair.note}", [allow]
    if renames:
        return "no name fits", renames
    mine, theirs = next(iter(left.entries)), next(iter(right.entries))
    return f"no name fits, the source begins with {mine}, the target with {theirs}; another architecture", []


def _containers(left: Side, right: Side) -> list[str]:
    """The subscripts of the source that lead to containers with names of the target."""
    found = {}
    for name in left.entries:
        container, _, bare = name.rpartition("/")
        if container and bare in right.entries:
            found[container] = "".join(f"[{key!r}]" for key in container.split("/"))
    return list(found.values())


def _no_shape_fits(pairs: Sequence[Pair]) -> str:
    """Why no shape fits, where shapes are the reason; otherwise empty."""
    if not all(pair.category in (Category.SHAPE, Category.ONLY_A, Category.ONLY_B) for pair in pairs):
        return ""
    shapes = [(pair.a, pair.b, pair.note) for pair in pairs if pair.category == Category.SHAPE]
    turned = [b.name for _, b, note in shapes if b and note == "transposed"]
    if turned:
        return f"{len(turned)} shapes are transposed, such as {turned[0]}"
    for a, b, _ in shapes:
        if a and b:
            shown = f"{b.name} is {list(b.shape)} against {list(a.shape)}"
            return f"every shape differs, {shown}; another architecture"
    return ""


def _renames(left: Side, right: Side, pairs: Sequence[Pair]) -> list[Fix]:
    """The first rules of renaming that may help."""
    found = next(suggestions(left, right, pairs), None)
    if found is None or len(found.rules) > _MOST_ADVISED:
        return []
    return [fix("maybe", found.evidence, rename=list(found.rules))]
