"""Rows of a report: one for each name, or one for many layers that differ alike, as `layers.{0-3,5}.weight`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

from registry.reports.merged_names import merge_names
from registry.reports.words import shape
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
    """How the two tensors of one name differ: norms to seven digits, the angle, and the share of elements that changed."""

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
    merged = merge_names([row.shown_name for row in rows], [_alike(row) for row in rows])
    return [Group(name, [rows[i] for i in places]) for name, places in merged]


def _alike(row: Row) -> tuple[object, ...] | None:
    """What a row must have in common with others; None for one whose name differs on the two sides."""
    if row.a and row.b and row.a != row.b:
        return None
    return (row.category, row.shape_a, row.shape_b, row.dtype_a, row.dtype_b, row.kind, row.equal)


def _shape(sizes: tuple[int, ...] | None) -> str:
    return "" if sizes is None else shape(sizes)
