"""Names of layers that are alike and differ in one number alone, as one name: `layers.{0-3,5}.weight`."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Hashable, Sequence

from registry.reports.words import ranges

_SEPARATOR = re.compile(r"([./])")


def merge_names(names: Sequence[str], alike: Sequence[Hashable | None]) -> list[tuple[str, list[int]]]:
    """Merge names that differ in one number, which is a part of its own between dots or slashes.

    >>> merge_names(["a.0.w", "a.1.w", "b"], [1, 1, 1])
    [('a.{0-1}.w', [0, 1]), ('b', [2])]

    Args:
        alike: for each name what it must have in common with others; None for a name that is never merged.

    Returns:
        The merged names, and the positions of those that each stands for, in the order of the first of them.
    """
    options: dict[Hashable, list[int]] = defaultdict(list)
    for i, (name, key) in enumerate(zip(names, alike, strict=True)):
        if key is not None:
            for before, _, after in _numbers(name):
                options[key, before, after].append(i)
    taken: dict[int, Hashable] = {}
    for option, members in sorted(options.items(), key=lambda item: -len(item[1])):
        free = [i for i in members if i not in taken]
        if len(free) > 1:
            taken.update(dict.fromkeys(free, option))
    groups: dict[Hashable, list[int]] = {}
    for i in range(len(names)):
        groups.setdefault(taken.get(i, i), []).append(i)
    return [(_merged(option, [names[i] for i in found]), found) for option, found in groups.items()]


def _numbers(name: str) -> list[tuple[str, str, str]]:
    """What stands before each number of a name, the number, and what stands after it."""
    parts = _SEPARATOR.split(name)
    return [
        ("".join(parts[:i]), part, "".join(parts[i + 1 :]))
        for i, part in enumerate(parts)
        if part.isdecimal()
    ]


def _merged(option: Hashable, names: Sequence[str]) -> str:
    """The name that stands for some names."""
    if len(names) == 1 or not isinstance(option, tuple):
        return names[0]
    _, start, end = option
    numbers = sorted(int(name[len(start) : len(name) - len(end)]) for name in names)
    return f"{start}{{{ranges(numbers)}}}{end}"
