"""Rows of a report: one for each name, or one for many layers that differ alike, as `layers.{0-3,5}.weight`."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

from registry.reports.words import ranges, shape
from registry.transfer.matching import LOADABLE, Category


class Part(BaseModel):
    """A part of a report: never changed, and strict about its fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Row(Part):
    """One name of either side or of both."""

    category: Category
    a: str | None = None
    b: str | None = None
    shape_a: tuple[int, ...] | None = None
    shape_b: tuple[int, ...] | None = None
    dtype_a: str | None = None
    dtype_b: str | None = None
    kind: str | None = None
    equal: bool | None = None
    note: str = ""

    @property
    def name(self) -> str:
        """The name on the right; the one on the left where there is no other."""
        return self.b or self.a or ""

    @property
    def elements(self) -> int:
        """Elements on the right; those on the left where there are no others."""
        shape = self.shape_b if self.shape_b is not None else self.shape_a
        return math.prod(shape or ())

    @property
    def shown_name(self) -> str:
        """The name, or both where they differ."""
        return f"{self.a} → {self.b}" if self.a and self.b and self.a != self.b else self.name

    @property
    def shown_shape(self) -> str:
        """The shape, or both where they differ; and both dtypes where these differ."""
        a, b = (_shape(shape) for shape in (self.shape_a, self.shape_b))
        shapes = f"{a} → {b}" if a and b and a != b else a or b
        if self.dtype_a and self.dtype_b and self.dtype_a != self.dtype_b:
            return f"{shapes} {self.dtype_a} → {self.dtype_b}"
        return shapes

    @property
    def status(self) -> str:
        """The category, or `VALUES` where a tensor could be loaded as it is and differs in its elements."""
        return "VALUES" if self.category in LOADABLE and self.equal is False else str(self.category)


class ValueChange(Part):
    """How the two tensors of one name differ, in float64: norms, the angle, and the share of elements that changed."""

    name: str
    norm: float
    relative: float
    cosine: float | None
    largest: float
    changed: float
    nonfinite_a: int
    nonfinite_b: int


class ModuleChange(Part):
    """The change of all tensors below a module."""

    module: str
    tensors: int
    norm: float
    relative: float


class Group(NamedTuple):
    """Rows that differ in one number of their names alone, under the name that stands for all."""

    name: str
    rows: Sequence[Row]


def grouped(rows: Iterable[Row]) -> list[Group]:
    """Merge rows of one status, shape and dtype whose names differ in one number: `layers.{0-3,5}.weight`."""
    rows = list(rows)
    options: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        for pattern in _patterns(row):
            options[pattern].append(i)
    taken: dict[int, tuple[object, ...]] = {}
    for pattern, members in sorted(options.items(), key=lambda item: -len(item[1])):
        free = [i for i in members if i not in taken]
        if len(free) > 1:
            taken.update(dict.fromkeys(free, pattern))
    groups: dict[object, list[Row]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(taken.get(i, i), []).append(row)
    return [Group(_merged_name(key, members), members) for key, members in groups.items()]


def _patterns(row: Row) -> list[tuple[object, ...]]:
    """What a row has in common with others, once for each number in its name."""
    if row.a and row.b and row.a != row.b:
        return []
    parts = row.name.split(".")
    alike = (row.category, row.shape_a, row.shape_b, row.dtype_a, row.dtype_b, row.kind, row.equal)
    return [
        (*alike, tuple(parts[:i]), tuple(parts[i + 1 :])) for i, part in enumerate(parts) if part.isdecimal()
    ]


def _merged_name(key: object, rows: Sequence[Row]) -> str:
    if not isinstance(key, tuple) or len(rows) == 1:
        return rows[0].shown_name
    before, after = key[-2], key[-1]
    numbers = sorted(int(row.name.split(".")[len(before)]) for row in rows)
    return ".".join([*before, "{" + ranges(numbers) + "}", *after])


def _shape(sizes: tuple[int, ...] | None) -> str:
    return "" if sizes is None else shape(sizes)
