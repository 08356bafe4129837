"""Decisions: what a plan does about each pair, by what is expected of it and by its category."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from registry.patterns import escaped, fits
from registry.store.errors import Incompatible, Invalid, fix
from registry.transfer.adapters import ADAPTERS, adapt, needs_source
from registry.transfer.matching import LOADABLE, Category, Pair
from registry.transfer.plan import Step
from registry.transfer.rows import Rows
from registry.transfer.sides import StateEntry

EXPECTATIONS = ("skip", "new", "unused", "adapt")
"""What may be expected of a difference."""


class Terms(NamedTuple):
    """What the caller of a plan expects and allows.

    Attributes:
        expect: what may differ, by pattern: `skip`, `new`, `unused` or `adapt`.
        adapters: names of adapters, by pattern.
        rows: the rows of classes, for adapters that take them.
        allow_cast: copy to dtypes that cannot hold every value of the source's.
        allow_positional: copy names whose numbers may have shifted.
    """

    expect: Mapping[str, str]
    adapters: Mapping[str, str]
    rows: Rows | None
    allow_cast: bool
    allow_positional: bool


class Decision(NamedTuple):
    """What is done about a pair.

    Attributes:
        step: the step of the plan.
        pattern: the expected pattern that decided it; empty where none did.
        is_refused: whether it is a difference that was not expected.
    """

    pair: Pair
    step: Step
    pattern: str = ""
    is_refused: bool = False


def decide(pair: Pair, terms: Terms) -> Decision:
    """Decide about a pair: by what is expected of it, or else by what its category allows.

    Raises:
        Invalid: if it is to be adapted, and no adapter is named for it.
        Incompatible: if the adapter does not fit the shapes, or casts what may not be cast.
    """
    meaning, pattern = _expected(pair, terms.expect)
    if meaning == "adapt":
        adapter = _adapter(pair, terms.adapters)
        if pair.b is not None and (pair.a is not None) == needs_source(adapter):
            return Decision(pair, _adapted(pair, adapter, terms), pattern)
    elif pattern and _is_possible(meaning, pair):
        return Decision(pair, _left_alone(pair, meaning), pattern)
    found = _by_category(pair, terms)
    if found is not None:
        return Decision(pair, found)
    return Decision(pair, _left_alone(pair, f"{pair.category}"), is_refused=True)


def is_benign(pair: Pair) -> bool:
    """Whether a difference means nothing: counters of batches that files from before torch 0.4.1 do not have."""
    return pair.name.endswith("num_batches_tracked") and not (pair.a and pair.b)


def is_lossless(a: str, b: str) -> bool:
    """Whether every value of one dtype is a value of the other."""
    one, other = getattr(torch, a), getattr(torch, b)
    if one.is_floating_point != other.is_floating_point:
        return False
    try:
        return bool(torch.promote_types(one, other) == other)
    except RuntimeError:
        # Torch does not promote float8, which therefore counts as lossy.
        return False


def _by_category(pair: Pair, terms: Terms) -> Step | None:
    """The step that a category allows; None for a difference that must be expected."""
    a, b, category = pair.a, pair.b, pair.category
    if a and b and _is_copied(a, b, category, terms=terms):
        is_cast = category in (Category.CAST, Category.POSITIONAL) and a.dtype != b.dtype
        return Step(action="copy", why=category, cast=is_cast, **_place(pair))
    if category == Category.TIED:
        return _left_alone(pair, f"{category}: {pair.note}")
    if is_benign(pair):
        return _left_alone(pair, "harmless: old files lack it")
    return None


def _is_copied(a: StateEntry, b: StateEntry, category: Category, terms: Terms) -> bool:
    """Whether a name is copied to its partner without being expected."""
    if category == Category.CAST:
        return terms.allow_cast or is_lossless(a.dtype, b.dtype)
    return category in LOADABLE or (category == Category.POSITIONAL and terms.allow_positional)


def _left_alone(pair: Pair, why: str) -> Step:
    """The step for a name that is not copied."""
    return Step(action="unused" if pair.b is None else "keep", why=why, **_place(pair))


def _place(pair: Pair) -> dict[str, Any]:
    """The fields of a step that say where it is."""
    entry = pair.b or pair.a
    assert entry is not None
    return {
        "target": pair.b.name if pair.b else None,
        "source": pair.a.name if pair.a else None,
        "elements": entry.elements,
        "buffer": pair.b is not None and pair.kind == "buffer",
    }


def _adapted(pair: Pair, adapter: str, terms: Terms) -> Step:
    """The step that adapts a tensor; the adapter is tried on the shapes.

    Raises:
        Incompatible: if the adapter does not fit the shapes, or another dtype is not allowed.
    """
    a, b = pair.a, pair.b
    assert b is not None
    rows = terms.rows if ADAPTERS[adapter].takes_rows else None
    like = torch.empty(b.shape, dtype=getattr(torch, b.dtype), device="meta")
    value = torch.empty(a.shape, dtype=getattr(torch, a.dtype), device="meta") if a else None
    adapt(adapter, value, like, rows=rows)
    if a is None:
        return Step(action="make", why=Category.ADAPTED, adapter=adapter, **_place(pair))
    is_cast = a.dtype != b.dtype
    if is_cast and not (terms.allow_cast or is_lossless(a.dtype, b.dtype)):
        raise Incompatible(
            f"{b.name} is {b.dtype}, the source {a.dtype}", fix("if that is meant", allow_cast=True)
        )
    return Step(action="copy", why=Category.ADAPTED, adapter=adapter, rows=rows, cast=is_cast, **_place(pair))


def _expected(pair: Pair, expect: Mapping[str, str]) -> tuple[str, str]:
    """What is expected of a pair, and the pattern that says so, which is the first that fits; empty for none."""
    names = [entry.name for entry in (pair.b, pair.a) if entry]
    for pattern, meaning in expect.items():
        if any(fits(name, pattern) for name in names):
            return meaning, pattern
    return "", ""


def _is_possible(meaning: str, pair: Pair) -> bool:
    """Whether a pair can be what is expected of it."""
    match meaning:
        case "new":
            return pair.a is None
        case "unused":
            return pair.b is None
        case _:
            return pair.a is not None and pair.b is not None


def _adapter(pair: Pair, adapters: Mapping[str, str]) -> str:
    """The adapter that is named for a pair.

    Raises:
        Invalid: if none is.
    """
    for pattern, name in adapters.items():
        if fits(pair.name, pattern):
            return name
    raise Invalid(
        f"{pair.name} is to be adapted, but no adapter is named for it",
        f"the adapters are {', '.join(ADAPTERS)}",
        fix("such as", adapters={escaped(pair.name): next(iter(ADAPTERS))}),
    )
