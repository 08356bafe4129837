"""Matching: every name of two sides falls in exactly one category."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from typing import NamedTuple

from registry.patterns import fits, meant, unused
from registry.store.errors import Conflict, Invalid, RegistryError
from registry.store.text import quoted
from registry.transfer.sides import Entry, Side

WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})

# torch's own renames: weight norm before and after it became a parametrization
_TORCH_RENAMES = (
    (re.compile(r"(.*\.)?parametrizations\.weight\.original0\Z"), "weight_g"),
    (re.compile(r"(.*\.)?parametrizations\.weight\.original1\Z"), "weight_v"),
)


class Category(StrEnum):
    """What became of a name; the first ones can be loaded as they are."""

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


class Pair(NamedTuple):
    """A name on one side or on both, and its category."""

    category: Category
    a: Entry | None
    b: Entry | None
    note: str = ""

    @property
    def name(self) -> str:
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


class Rename:
    """A rule that renames names of side A: `old=new`.

    In a glob, `*` stands for one component of a name, and as the last component for all that are left; `**` for any
    number. A rule that begins with `re:` is a regular expression for the whole name, with `\\1` in the new one.

    >>> Rename("backbone.*=*")("backbone.conv1.weight")
    'conv1.weight'
    >>> Rename("fc.weight=head.weight")("fc.bias") is None
    True
    """

    def __init__(self, rule: str) -> None:
        self.rule = rule
        old, equals, new = rule.removeprefix("re:").partition("=")
        if not equals or not old or not new:
            raise Invalid(
                f"the rename {quoted(rule)} is malformed; write it as old=new, such as backbone.*=*"
            )
        try:
            if rule.startswith("re:"):
                self._pattern, self._new = re.compile(old), new
                re.compile(old).sub(new, "")
            else:
                self._pattern, self._new = _glob(old, new, rule)
        except (re.error, IndexError) as error:
            raise Invalid(f"the rename {quoted(rule)} is malformed: {error}") from None

    def __call__(self, name: str) -> str | None:
        match = self._pattern.fullmatch(name)
        return match.expand(self._new) if match else None


def _glob(old: str, new: str, rule: str) -> tuple[re.Pattern[str], str]:
    parts = old.split(".")
    found = []
    for i, part in enumerate(parts):
        if part == "**" or (part == "*" and i == len(parts) - 1):
            found.append("(.+)")
        else:
            found.append(re.escape(part).replace(r"\*", r"([^.]*)" if part != "*" else r"([^.]+)"))
    stars = iter(range(1, 100))
    count = len(re.findall(r"\*+", new))
    if count > len(re.findall(r"\*+", old)):
        raise Invalid(f"the rename {quoted(rule)} has more stars on the right than on the left")
    text = re.sub(r"\*+", lambda _: rf"\{next(stars)}", new.replace("\\", r"\\"))
    return re.compile(r"\.".join(found)), text


def match(
    a: Side, b: Side, *, rename: Iterable[str] = (), exclude: Iterable[str] = (), apart: Iterable[str] = ()
) -> list[Pair]:
    """Put every name of both sides in one category.

    Args:
        rename: rules for the names of A, the first that fits a name wins; see `Rename`.
        exclude: glob patterns of names, on either side, to leave out.
        apart: glob patterns of names that are known to be on one side only, and so shift no numbers unseen.

    Raises:
        Conflict: if rules bring two names of A to one of B.
        Invalid: if a rule is malformed, or fits nothing.
    """
    pairs: list[Pair] = []
    left, right = dict(a.entries), dict(b.entries)
    for given in exclude:
        pattern = meant(given, {**left, **right})
        names = [name for name in (*left, *right) if fits(name, pattern)]
        if not names:
            raise Invalid(f"the pattern {quoted(given)} {unused(given, (*left, *right))}")
        for name in dict.fromkeys(names):
            pairs.append(Pair(Category.EXCLUDED, left.pop(name, None), right.pop(name, None)))
    _by_rules(left, right, rename, pairs)
    shifted = positional(a, b, list(apart))
    for name in [name for name in left if name in right]:
        pairs.append(_compared(left.pop(name), right.pop(name), Category.MATCH, shifted.get(name, "")))
    _by_torch_renames(left, right, pairs)
    _by_prefix(left, right, pairs)
    partners = _ties(pairs)
    for entries, category in ((left, Category.ONLY_A), (right, Category.ONLY_B)):
        side = a if entries is left else b
        for entry in entries.values():
            same = [
                other.name for other in side.entries.values() if other.tie == entry.tie and other != entry
            ]
            tied = next((name for name in same if name in partners[category]), None)
            note = f"shares memory with {tied}" if tied else ""
            found = Category.TIED if tied else category
            pairs.append(
                Pair(found, entry, None, note) if entries is left else Pair(found, None, entry, note)
            )
    _check(a, b, pairs)
    order = {name: i for i, name in enumerate([*b.entries, *a.entries][::-1])}
    return sorted(pairs, key=lambda pair: -order[pair.name])


def _by_rules(
    left: dict[str, Entry], right: dict[str, Entry], rules: Iterable[str], pairs: list[Pair]
) -> None:
    goals: dict[str, str] = {}
    for rule in map(Rename, rules):
        is_used = False
        for name in left:
            new = rule(name)
            if new is not None:
                is_used = True
                goals.setdefault(name, new)
        if not is_used:
            raise Invalid(f"the rename {quoted(rule.rule)} fits no name; it is a typo, or already done")
    sources: dict[str, str] = {}
    for name, new in goals.items():
        if new in sources:
            raise Conflict(f"{sources[new]} and {name} are both renamed to {new}")
        if new in left and new not in goals and new in right:
            raise Conflict(f"{name} is renamed to {new}, which the source has as well")
        sources[new] = name
    for new, name in sources.items():
        if new in right:
            pairs.append(_compared(left.pop(name), right.pop(new), Category.RENAMED, "by rule"))


def _by_torch_renames(left: dict[str, Entry], right: dict[str, Entry], pairs: list[Pair]) -> None:
    for name in list(left):
        other = _torch_rename(name, right)
        if other is not None:
            pairs.append(_compared(left.pop(name), right.pop(other), Category.RENAMED, "torch's own rename"))


def _torch_rename(name: str, right: Mapping[str, Entry]) -> str | None:
    for pattern, old in _TORCH_RENAMES:
        if match := pattern.match(name):
            candidate = f"{match[1] or ''}{old}"
            return candidate if candidate in right else None
        prefix, dot, leaf = name.rpartition(".")
        if leaf == old:
            number = 0 if old == "weight_g" else 1
            candidate = f"{prefix}{dot}parametrizations.weight.original{number}"
            return candidate if candidate in right else None
    return None


def without_wrappers(name: str) -> str:
    """A name without the components that wrappers add, at any depth.

    >>> without_wrappers("module._orig_mod.layer.module.weight")
    'layer.weight'
    """
    kept = [part for part in name.split(".") if part not in WRAPPERS]
    return ".".join(kept) or name


def _by_prefix(left: dict[str, Entry], right: dict[str, Entry], pairs: list[Pair]) -> None:
    ours: dict[str, list[str]] = defaultdict(list)
    theirs: dict[str, list[str]] = defaultdict(list)
    for name in left:
        ours[without_wrappers(name)].append(name)
    for name in right:
        theirs[without_wrappers(name)].append(name)
    for plain, names in ours.items():
        others = theirs.get(plain, [])
        if len(names) == len(others) == 1:
            pairs.append(
                _compared(left.pop(names[0]), right.pop(others[0]), Category.PREFIX, "a wrapper's prefix")
            )
        elif names and others:
            note = f"could be any of {', '.join(others)}"
            pairs += [Pair(Category.AMBIGUOUS, left.pop(name), None, note) for name in names]
            pairs += [Pair(Category.AMBIGUOUS, None, right.pop(name), "") for name in others]


def _compared(a: Entry, b: Entry, category: Category, note: str) -> Pair:
    if a.shape != b.shape:
        return Pair(Category.SHAPE, a, b, _shape_note(a.shape, b.shape))
    if a.kind and b.kind and a.kind != b.kind:
        return Pair(Category.KIND, a, b, f"{a.kind} against {b.kind}")
    if category == Category.MATCH and note:
        return Pair(Category.POSITIONAL, a, b, note)
    if a.dtype != b.dtype:
        return Pair(Category.CAST, a, b, note)
    return Pair(category, a, b, note)


def _shape_note(a: Sequence[int], b: Sequence[int]) -> str:
    return "transposed" if len(a) == 2 and tuple(a) == tuple(b)[::-1] else ""


def _ties(pairs: Sequence[Pair]) -> dict[Category, set[str]]:
    """Names that have a partner, by the category that a name of the same side without one would get."""
    both = [pair for pair in pairs if pair.a and pair.b]
    return {
        Category.ONLY_A: {pair.a.name for pair in both if pair.a},
        Category.ONLY_B: {pair.b.name for pair in both if pair.b},
    }


def _check(a: Side, b: Side, pairs: Sequence[Pair]) -> None:
    """Every name once, and the elements of both sides in all."""
    for side, entries in (
        (a, [pair.a for pair in pairs if pair.a]),
        (b, [pair.b for pair in pairs if pair.b]),
    ):
        names = Counter(entry.name for entry in entries)
        total = sum(entry.elements for entry in entries)
        if names != Counter(list(side.entries)) or total != side.elements:
            raise RegistryError(f"the categories do not add up to {side.label}; please report this")


# -- positions -----------------------------------------------------------------------------------------------


def positional(a: Side, b: Side, apart: Sequence[str] = ()) -> dict[str, str]:
    """Names that are equal on both sides and may still be another layer, each with the reason.

    In a numbered container whose length or classes differ, a name is safe only if every best alignment of the two
    containers by class and shapes puts it opposite its namesake.
    """
    found: dict[str, str] = {}
    classes = a.module is not None and b.module is not None
    alone = {
        name for name in a.entries.keys() ^ b.entries.keys() if any(fits(name, pattern) for pattern in apart)
    }
    ours, theirs = _containers(a, classes, alone), _containers(b, classes, alone)
    for path in ours.keys() & theirs.keys():
        left, right = ours[path], theirs[path]
        if [(i, kind) for i, kind, _ in left] == [(i, kind) for i, kind, _ in right]:
            continue
        options = _alignments([(k, s) for _, k, s in left], [(k, s) for _, k, s in right])
        places = {i: n for n, (i, _, _) in enumerate(right)}
        for n, (i, _, signature) in enumerate(left):
            if not signature or i not in places:
                continue
            possible = options[n]
            if possible == {places[i]} or (
                not possible and left[n][2] != right[places[i]][2]
            ):  # its shapes differ, which is said anyway
                continue
            where = [f"{path}{right[m][0]}" for m in sorted(possible)]
            reason = f"{path}{i} may be {' or '.join(where)}" if where else f"{path}{i} has no clear partner"
            for name in a.entries:
                if name.startswith(f"{path}{i}.") and name in b.entries:
                    found[name] = reason
    return found


def aligned(a: Side, b: Side) -> dict[str, list[tuple[int, int]]]:
    """Numbers that moved in a numbered container, where every layer of A has one place in B; by path."""
    classes = a.module is not None and b.module is not None
    ours, theirs = _containers(a, classes, set()), _containers(b, classes, set())
    found = {}
    for path in ours.keys() & theirs.keys():
        left, right = ours[path], theirs[path]
        options = _alignments([(k, s) for _, k, s in left], [(k, s) for _, k, s in right])
        if all(len(places) == 1 for places in options):
            pairs = [(left[n][0], right[next(iter(places))][0]) for n, places in enumerate(options)]
            found[path] = [(i, j) for i, j in pairs if i != j]
    return found


_Child = tuple[int, str, tuple[tuple[str, tuple[int, ...]], ...]]


def _containers(side: Side, classes: bool, alone: set[str]) -> dict[str, list[_Child]]:
    """Numbered containers by path (with the last dot): number, class if known, and shapes of each child in order."""
    shapes: dict[str, dict[int, list[tuple[str, tuple[int, ...]]]]] = defaultdict(lambda: defaultdict(list))
    for name, entry in side.entries.items():
        parts = name.split(".") if name not in alone else []
        for depth, part in enumerate(parts[:-1]):
            if part.isdigit():
                path = "".join(f"{one}." for one in parts[:depth])
                shapes[path][int(part)].append((".".join(parts[depth + 1 :]), entry.shape))
    modules = dict(side.module.named_modules()) if classes and side.module is not None else {}
    found: dict[str, list[_Child]] = {}
    for path, children in shapes.items():
        numbers = sorted(children)
        found[path] = []
        for number in numbers:
            module = modules.get(f"{path}{number}")
            kind = type(module).__name__ if module is not None else ""
            found[path].append((number, kind, tuple(children[number])))
    return found


def _alignments(left: Sequence[object], right: Sequence[object]) -> list[set[int]]:
    """For each item of the left the items of the right that it has in some longest common subsequence."""
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
