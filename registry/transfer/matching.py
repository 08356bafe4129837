"""Matching: every name of two sides falls in exactly one category."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from typing import NamedTuple

from registry.patterns import fits, meant, unused
from registry.store.errors import Conflict, Invalid, RegistryError
from registry.store.text import quoted
from registry.transfer.positions import positional
from registry.transfer.renames import Rename, torch_rename, without_wrappers
from registry.transfer.sides import Side, StateEntry


class Category(StrEnum):
    """What became of a name; `registry.transfer.report.MEANING` says what each category means."""

    MATCH = "MATCH"
    RENAMED = "RENAMED"
    PREFIX = "PREFIX"
    TIED = "TIED"
    CAST = "CAST"
    ADAPTED = "ADAPTED"
    SHAPE = "SHAPE"
    KIND = "KIND"
    POSITIONAL = "POSITIONAL"
    AMBIGUOUS = "AMBIGUOUS"
    ONLY_A = "ONLY_A"
    ONLY_B = "ONLY_B"
    EXCLUDED = "EXCLUDED"


LOADABLE = frozenset({Category.MATCH, Category.RENAMED, Category.PREFIX, Category.TIED})
"""The categories of what can be loaded as it is."""


class Pair(NamedTuple):
    """A name on one side or on both, and its category."""

    category: Category
    a: StateEntry | None
    b: StateEntry | None
    note: str = ""

    @property
    def name(self) -> str:
        """The name in B; in A where B does not have it."""
        entry = self.b or self.a
        assert entry is not None
        return entry.name

    @property
    def kind(self) -> str:
        """`parameter` or `buffer`; where neither side says, by the names that torch's own layers give buffers."""
        for entry in (self.b, self.a):
            if entry and entry.kind:
                return entry.kind
        leaf = self.name.rpartition(".")[2]
        return "buffer" if leaf in ("running_mean", "running_var", "num_batches_tracked") else "parameter"


def match(
    a: Side, b: Side, *, rename: Iterable[str] = (), exclude: Iterable[str] = (), apart: Iterable[str] = ()
) -> list[Pair]:
    """Put every name of both sides in one category.

    Args:
        rename: rules for the names of A; the first that fits a name wins; see `registry.transfer.renames.Rename`.
        exclude: glob patterns of names, on either side, to leave out.
        apart: glob patterns of names that are known to be on one side only. They are left out where the numbers of
            layers are compared.

    Raises:
        Conflict: if rules bring two names of A to one of B.
        Invalid: if a rule is malformed, or fits nothing.
    """
    pairs: list[Pair] = []
    left, right = dict(a.entries), dict(b.entries)
    _excluded(left, right, exclude, pairs=pairs)
    _by_rules(left, right, rename, pairs=pairs)
    shifted = positional(a, b, list(apart))
    for name in [name for name in left if name in right]:
        pairs.append(_compared(left.pop(name), right.pop(name), Category.MATCH, note=shifted.get(name, "")))
    _by_torch_renames(left, right, pairs)
    _by_prefix(left, right, pairs)
    partnered = [(pair.a.name, pair.b.name) for pair in pairs if pair.a and pair.b]
    ours, theirs = {name for name, _ in partnered}, {name for _, name in partnered}
    for category, entry, note in _left_over(a, left, partnered=ours, alone=Category.ONLY_A):
        pairs.append(Pair(category, entry, None, note=note))
    for category, entry, note in _left_over(b, right, partnered=theirs, alone=Category.ONLY_B):
        pairs.append(Pair(category, None, entry, note=note))
    _check(a, b, pairs)
    order = {name: i for i, name in enumerate([*b.entries, *a.entries][::-1])}
    return sorted(pairs, key=lambda pair: -order[pair.name])


def _excluded(
    left: dict[str, StateEntry], right: dict[str, StateEntry], patterns: Iterable[str], pairs: list[Pair]
) -> None:
    """Take out the names that were to be left out."""
    for given in patterns:
        pattern = meant(given, {**left, **right})
        names = [name for name in (*left, *right) if fits(name, pattern)]
        if not names:
            raise unused(f"the pattern {quoted(given)}", given, (*left, *right))
        for name in dict.fromkeys(names):
            pairs.append(Pair(Category.EXCLUDED, left.pop(name, None), right.pop(name, None)))


def _by_rules(
    left: dict[str, StateEntry], right: dict[str, StateEntry], rules: Iterable[str], pairs: list[Pair]
) -> None:
    """Pair the names that the rules bring together."""
    goals: dict[str, str] = {}
    for rule in map(Rename, rules):
        is_used = False
        for name in left:
            new = rule(name)
            if new is not None:
                is_used = True
                goals.setdefault(name, new)
        if not is_used:
            raise Invalid(f"the rename {quoted(rule.rule)} fits no name", "it is a typo, or already done")
    sources: dict[str, str] = {}
    for name, new in goals.items():
        if new in sources:
            raise Conflict(f"{sources[new]} and {name} are both renamed to {new}")
        if new in left and new not in goals and new in right:
            raise Conflict(f"{name} is renamed to {new}, which the source has as well")
        sources[new] = name
    for new, name in sources.items():
        if new in right:
            pairs.append(_compared(left.pop(name), right.pop(new), Category.RENAMED, note="by rule"))


def _by_torch_renames(left: dict[str, StateEntry], right: dict[str, StateEntry], pairs: list[Pair]) -> None:
    """Pair the names that differ only because torch itself has renamed them."""
    for name in list(left):
        other = torch_rename(name, right)
        if other is not None:
            note = "torch's own rename"
            pairs.append(_compared(left.pop(name), right.pop(other), Category.RENAMED, note=note))


def _by_prefix(left: dict[str, StateEntry], right: dict[str, StateEntry], pairs: list[Pair]) -> None:
    """Pair the names that are equal without the components that wrappers add."""
    ours: dict[str, list[str]] = defaultdict(list)
    theirs: dict[str, list[str]] = defaultdict(list)
    for name in left:
        ours[without_wrappers(name)].append(name)
    for name in right:
        theirs[without_wrappers(name)].append(name)
    for plain, names in ours.items():
        others = theirs.get(plain, [])
        if len(names) == len(others) == 1:
            note = "a wrapper's prefix"
            pairs.append(_compared(left.pop(names[0]), right.pop(others[0]), Category.PREFIX, note=note))
        elif names and others:
            note = f"could be any of {', '.join(others)}"
            pairs += [Pair(Category.AMBIGUOUS, left.pop(name), None, note=note) for name in names]
            pairs += [Pair(Category.AMBIGUOUS, None, right.pop(name)) for name in others]


def _compared(a: StateEntry, b: StateEntry, category: Category, note: str) -> Pair:
    """The pair of two names, in the category of their difference, or in the given one if there is none."""
    if a.shape != b.shape:
        return Pair(Category.SHAPE, a, b, note=_shape_note(a.shape, b.shape))
    if a.kind and b.kind and a.kind != b.kind:
        return Pair(Category.KIND, a, b, note=f"{a.kind} against {b.kind}")
    if category == Category.MATCH and note:
        return Pair(Category.POSITIONAL, a, b, note=note)
    if a.dtype != b.dtype:
        return Pair(Category.CAST, a, b, note=note)
    return Pair(category, a, b, note=note)


def _shape_note(a: Sequence[int], b: Sequence[int]) -> str:
    return "transposed" if len(a) == 2 and tuple(a) == tuple(b)[::-1] else ""


def _left_over(
    side: Side, entries: Mapping[str, StateEntry], partnered: Collection[str], alone: Category
) -> Iterator[tuple[Category, StateEntry, str]]:
    """The names of one side that are left over: category, entry and note.

    Args:
        partnered: names of that side that have a partner.
        alone: the category of a name that shares memory with none of those.
    """
    sharing: dict[object, list[str]] = defaultdict(list)
    for entry in side.entries.values():
        sharing[entry.tie].append(entry.name)
    for entry in entries.values():
        tied = next((name for name in sharing[entry.tie] if name in partnered), None)
        if tied is None:
            yield alone, entry, ""
        else:
            yield Category.TIED, entry, f"shares memory with {tied}"


def _check(a: Side, b: Side, pairs: Sequence[Pair]) -> None:
    """See that each name of both sides is in one pair, and that their elements add up."""
    for side, entries in (
        (a, [pair.a for pair in pairs if pair.a]),
        (b, [pair.b for pair in pairs if pair.b]),
    ):
        names = Counter(entry.name for entry in entries)
        total = sum(entry.elements for entry in entries)
        if names != Counter(list(side.entries)) or total != side.elements:
            raise RegistryError(f"the categories do not add up to {side.label}", "please report this")
