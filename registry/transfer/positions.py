"""Positions: in a numbered container, such as a `Sequential`, an equal name may belong to another layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from registry.patterns import fits
from registry.transfer.sides import Side


class _NumberedLayer(NamedTuple):
    """One child of a numbered container.

    Attributes:
        number: its name in the container.
        kind: its class, where that is known on both sides; otherwise empty.
        shapes: the name below it and the shape of each of its tensors, in order.
    """

    number: int
    kind: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]

    @property
    def looks(self) -> tuple[object, ...]:
        """What two layers must have in common to be aligned."""
        return self.kind, self.shapes


def positional(a: Side, b: Side, apart: Sequence[str] = ()) -> dict[str, str]:
    """Names that are equal on both sides and may still be another layer, each with the reason.

    In a numbered container whose length or classes differ, a name is safe only if every best alignment of the two
    containers by class and shapes puts it opposite its namesake.

    Args:
        apart: glob patterns of names that are known to be on one side only; they are left out of the alignment.
    """
    alone = {
        name for name in a.entries.keys() ^ b.entries.keys() if any(fits(name, pattern) for pattern in apart)
    }
    found: dict[str, str] = {}
    for path, left, right in _opposite(a, b, alone):
        for number, reason in _doubts(path, left, right):
            start = f"{path}{number}."
            found.update({name: reason for name in a.entries if name.startswith(start) and name in b.entries})
    return found


def aligned(a: Side, b: Side) -> dict[str, list[tuple[int, int]]]:
    """Numbers that moved in a numbered container, where every layer of A has one place in B; by path."""
    found = {}
    for path, left, right in _opposite(a, b, set()):
        options = _alignments([layer.looks for layer in left], [layer.looks for layer in right])
        if all(len(places) == 1 for places in options):
            moves = [
                (layer.number, right[place].number)
                for layer, (place,) in zip(left, options, strict=True)
                if layer.number != right[place].number
            ]
            found[path] = moves
    return found


def _doubts(
    path: str, left: Sequence[_NumberedLayer], right: Sequence[_NumberedLayer]
) -> Iterator[tuple[int, str]]:
    """Numbers that two containers share and that may be different layers, each with the reason."""
    if [(layer.number, layer.kind) for layer in left] == [(layer.number, layer.kind) for layer in right]:
        return
    options = _alignments([layer.looks for layer in left], [layer.looks for layer in right])
    places = {layer.number: place for place, layer in enumerate(right)}
    for layer, possible in zip(left, options, strict=True):
        place = places.get(layer.number)
        if place is None or not layer.shapes or possible == {place}:
            continue
        if not possible and layer.shapes != right[place].shapes:
            # Its shapes differ, which is said anyway.
            continue
        name = f"{path}{layer.number}"
        where = " or ".join(f"{path}{right[other].number}" for other in sorted(possible))
        yield layer.number, f"{name} may be {where}" if where else f"{name} has no clear partner"


def _opposite(
    a: Side, b: Side, alone: set[str]
) -> Iterator[tuple[str, list[_NumberedLayer], list[_NumberedLayer]]]:
    """The numbered containers that both sides have: path, with the last dot, and the layers of each side."""
    know_classes = a.module is not None and b.module is not None
    ours, theirs = (_containers(side, know_classes, alone) for side in (a, b))
    for path, layers in ours.items():
        if path in theirs:
            yield path, layers, theirs[path]


def _containers(side: Side, know_classes: bool, alone: set[str]) -> dict[str, list[_NumberedLayer]]:
    """Numbered containers by path, with the last dot: their layers in the order of the numbers.

    Args:
        know_classes: whether the classes of both sides are known.
        alone: names to leave out.
    """
    shapes: dict[str, dict[int, list[tuple[str, tuple[int, ...]]]]] = defaultdict(lambda: defaultdict(list))
    for name, entry in side.entries.items():
        parts = name.split(".") if name not in alone else []
        for depth, part in enumerate(parts[:-1]):
            if part.isdecimal():
                path = "".join(f"{one}." for one in parts[:depth])
                shapes[path][int(part)].append((".".join(parts[depth + 1 :]), entry.shape))
    modules = dict(side.module.named_modules()) if know_classes and side.module is not None else {}
    found: dict[str, list[_NumberedLayer]] = {}
    for path, children in shapes.items():
        found[path] = []
        for number in sorted(children):
            module = modules.get(f"{path}{number}")
            kind = type(module).__name__ if module is not None else ""
            found[path].append(_NumberedLayer(number, kind, tuple(children[number])))
    return found


def _alignments(left: Sequence[object], right: Sequence[object]) -> list[set[int]]:
    """For each item of the left, the places on the right that some longest common subsequence gives it."""
    n, m = len(left), len(right)
    before = [[0] * (m + 1) for _ in range(n + 1)]
    after = [[0] * (m + 1) for _ in range(n + 1)]
    for i in range(n):
        for j in range(m):
            one = before[i][j] + 1 if left[i] == right[j] else 0
            before[i + 1][j + 1] = max(one, before[i][j + 1], before[i + 1][j])
    for i in reversed(range(n)):
        for j in reversed(range(m)):
            one = after[i + 1][j + 1] + 1 if left[i] == right[j] else 0
            after[i][j] = max(one, after[i + 1][j], after[i][j + 1])
    best = before[n][m]
    return [
        {j for j in range(m) if left[i] == right[j] and before[i][j] + 1 + after[i + 1][j + 1] == best}
        for i in range(n)
    ]
