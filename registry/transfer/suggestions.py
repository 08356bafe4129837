"""Suggestions: rules of renaming that may explain the names without a partner. They are only shown, never applied."""

from __future__ import annotations

import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from registry.transfer.matching import LOADABLE, Category, Pair
from registry.transfer.positions import aligned
from registry.transfer.renames import Rename, escaped
from registry.transfer.sides import Side, StateEntry

_SWAPPED = "with the other prefix"
"""The evidence for another prefix in the place of one."""

_MOST_LAYERS = 50
"""Layers for which a rule each is suggested."""

_TRIED = 5
"""How many changes of a prefix are tried out, those that fit the most names first."""

_MOST_ALIKE = 8
"""Names with the same end that are looked at; more say nothing."""


_Leaves = tuple[tuple[str, tuple[int, ...]], ...]
"""Last components of the names in one layer, each with its shape."""

_EVIDENCE: tuple[tuple[str, Callable[[StateEntry], object]], ...] = (
    ("the only ones of shape {shape}", lambda entry: entry.shape),
    ("the only {leaf} of shape {shape}", lambda entry: (entry.name.rpartition(".")[2], entry.shape)),
    (
        "the only ones of shape {shape} in {parent}",
        lambda entry: (entry.name.rpartition(".")[0], entry.shape),
    ),
)
"""What speaks for a pair of single names: in words, and what the two must have in common."""


class Suggestion(NamedTuple):
    """Rules for the names of A, and what speaks for them."""

    rules: tuple[str, ...]
    evidence: str

    def __str__(self) -> str:
        return f"{' '.join(f'--rename {shlex.quote(rule)}' for rule in self.rules)}  ({self.evidence})"


def suggestions(left: Side, right: Side, pairs: Sequence[Pair]) -> Iterator[Suggestion]:
    """Rules that may explain what is left over, each with its evidence.

    The rules that map the most names at once come first: a prefix that one side adds or changes.
    Then come layers of the same shapes in the same order, then single names.
    """
    ours = [pair.a for pair in pairs if pair.category == Category.ONLY_A and pair.a]
    theirs = [pair.b for pair in pairs if pair.category == Category.ONLY_B and pair.b]
    yield from _moved(left, right, pairs)
    before = sum(pair.category in LOADABLE or pair.category == Category.CAST for pair in pairs)
    mine, others = _layers_of(ours), _layers_of(theirs)
    are_alike = len(mine) > 1 and list(mine.values()) == list(others.values())
    gain, whole = _whole(left, right, before=before, ours=ours, theirs=theirs)
    if whole is not None and not (are_alike and gain < len(ours)):
        yield whole
        return
    if are_alike and len(mine) <= _MOST_LAYERS:
        rules = _in_order(mine, others)
        if _fitting(rules, left.entries, right.entries) == before + len(ours):
            yield Suggestion(rules, f"the same {len(mine)} shapes in the same order")
            return
    yield from _single(ours, theirs)


def _in_order(mine: Mapping[str, _Leaves], others: Mapping[str, _Leaves]) -> tuple[str, ...]:
    """Rules that rename each layer of one side to the layer in the same place of the other."""
    # The deeper ones first, as the first rule that fits a name is the one that counts.
    moves = sorted(zip(mine, others, strict=True), key=lambda pair: -pair[0].count("."))
    return tuple(
        rule
        for a, b in moves
        if a != b
        for rule in ([f"{escaped(a)}.*={b}.*"] if a and b else _leaf_rules(a, b, mine[a]))
    )


def _single(ours: Sequence[StateEntry], theirs: Sequence[StateEntry]) -> Iterator[Suggestion]:
    """A rule for each name that matches only one name of the other side, by the first evidence that says so."""
    by_key: list[tuple[dict[object, list[StateEntry]], Counter[object]]] = []
    for _, key in _EVIDENCE:
        places: dict[object, list[StateEntry]] = defaultdict(list)
        for other in theirs:
            places[key(other)].append(other)
        by_key.append((places, Counter(map(key, ours))))
    for entry in ours:
        if not entry.shape:
            continue
        for (told, key), (places, count) in zip(_EVIDENCE, by_key, strict=True):
            same = places.get(key(entry), ())
            if len(same) == count[key(entry)] == 1:
                parent, _, leaf = entry.name.rpartition(".")
                why = told.format(shape=list(entry.shape), leaf=leaf, parent=parent)
                yield Suggestion((f"{escaped(entry.name)}={same[0].name}",), why)
                break


def _leaf_rules(a: str, b: str, leaves: _Leaves) -> list[str]:
    """A rule for each name of a layer, where one of the two is the network itself."""
    return [f"{escaped(f'{a}.{leaf}' if a else leaf)}={f'{b}.' if b else ''}{leaf}" for leaf, _ in leaves]


def _whole(
    left: Side, right: Side, before: int, ours: Sequence[StateEntry], theirs: Sequence[StateEntry]
) -> tuple[int, Suggestion | None]:
    """How many more names fit under the rules that map the most, and these rules.

    Args:
        before: how many names fit without a rule.
        ours, theirs: the names without a partner on each side.
    """
    best: tuple[int, Suggestion | None] = (0, None)
    for rules, how in _prefixes(ours, theirs):
        fits = _fitting(rules, left.entries, right.entries)
        gain = fits - before
        # Another prefix says something only if it holds for most of what is left.
        if gain > best[0] and (2 * gain > max(len(ours), 2) or how != _SWAPPED):
            best = gain, Suggestion(rules, f"{fits} of {len(left.entries)} names fit {how}")
    return best


def _fitting(rules: Sequence[str], ours: Mapping[str, StateEntry], theirs: Mapping[str, StateEntry]) -> int:
    """How many names have a partner of their shape under some rules."""
    renames = [Rename(rule) for rule in rules]
    goals: Counter[str] = Counter()
    fits = 0
    for name, entry in ours.items():
        new = next((goal for goal in (rename(name) for rename in renames) if goal is not None), name)
        goals[new] += 1
        other = theirs.get(new)
        fits += other is not None and other.shape == entry.shape
    return fits if max(goals.values(), default=1) == 1 else 0


def _prefixes(ours: Iterable[StateEntry], theirs: Iterable[StateEntry]) -> list[tuple[tuple[str, ...], str]]:
    """Changes of a prefix by which names of one side may become names of the other, the most frequent first."""
    ends: dict[str, list[StateEntry]] = defaultdict(list)
    for entry in theirs:
        for _, end in _cuts(entry.name):
            if len(ends[end]) < _MOST_ALIKE:
                ends[end].append(entry)
    changes: Counter[tuple[str, str]] = Counter()
    for entry in ours:
        for start, end in _cuts(entry.name):
            partners = [other for other in ends.get(end, ()) if other.shape == entry.shape]
            changes.update({(start, other.name.removesuffix(end)) for other in partners})
            if partners:
                break
    return [(_prefix_rule(old, new), _how(old, new)) for (old, new), _ in changes.most_common(_TRIED)]


def _cuts(name: str) -> Iterator[tuple[str, str]]:
    """A name cut in two at each dot, the shortest start first, which may be empty."""
    yield "", name
    for match in re.finditer(r"\.", name):
        yield name[: match.end()], name[match.end() :]


def _prefix_rule(old: str, new: str) -> tuple[str, ...]:
    """The rule that changes one prefix into another; either may be empty."""
    return (f"{escaped(old)}*={new}*" if old else f"**={new}**",)


def _how(old: str, new: str) -> str:
    """A change of a prefix in words."""
    if old and new:
        return _SWAPPED
    return "without the prefix" if old else "with the prefix"


def _moved(left: Side, right: Side, pairs: Sequence[Pair]) -> Iterator[Suggestion]:
    """The renames that undo shifted numbers, where class and shapes leave no choice."""
    if not any(pair.category == Category.POSITIONAL for pair in pairs):
        return
    for path, moves in aligned(left, right).items():
        if moves:
            rules = tuple(f"{escaped(f'{path}{a}')}.*={path}{b}.*" for a, b in moves)
            yield Suggestion(rules, "the only order in which the layers fit")


def _layers_of(entries: Sequence[StateEntry]) -> dict[str, _Leaves]:
    """The leaves and shapes of each layer, in order."""
    found: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for entry in entries:
        layer, _, leaf = entry.name.rpartition(".")
        found.setdefault(layer, []).append((leaf, entry.shape))
    return {layer: tuple(leaves) for layer, leaves in found.items()}
