"""The tree of a diff report: modules, each with its tensors, what became of them, and how far they moved."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from registry.reports.words import shape
from registry.transfer.matching import LOADABLE, Category
from registry.transfer.report_rows import Row, ValueChange


class TensorChange(NamedTuple):
    """A tensor of either side or of both.

    Attributes:
        name: the last part of its name; both names where they differ.
        status: what a diff says of it, such as `MATCH`, or `VALUES` where only its elements differ.
        sign: `=` for equal, `~` for changed, `+` for only on the right, `-` for only on the left.
        shape: or both, where they differ; and both dtypes where these differ.
        relative: the norm of the change against the norm before; None where it was not measured.
        cosine: of the angle between the two.
        largest: the largest change of an element.
    """

    name: str
    status: str
    sign: str
    shape: str
    dtype: str
    elements: int
    note: str
    relative: float | None = None
    cosine: float | None = None
    largest: float | None = None


class ModuleChanges(NamedTuple):
    """The tensors of a module.

    Attributes:
        path: its path; empty for the tensors that lie in none.
        relative: the norm of the change of all its tensors against the norm before; None where it was not measured.
    """

    path: str
    tensors: Sequence[TensorChange]
    relative: float | None = None

    @property
    def elements(self) -> int:
        """How many numbers its tensors hold."""
        return sum(tensor.elements for tensor in self.tensors)

    @property
    def changed(self) -> int:
        """How many of its tensors are not equal on both sides."""
        return sum(tensor.sign != "=" for tensor in self.tensors)


def modules(
    rows: Sequence[Row], changes: Sequence[ValueChange], *, is_measured: bool, depth: int | None = None
) -> list[ModuleChanges]:
    """The modules of a diff, in the order of the network.

    Args:
        is_measured: whether it was measured how far tensors moved.
        depth: parts of a path at most. What lies deeper counts for the module above it. All unless given.
    """
    moved = {change.name: change for change in changes}
    found: dict[str, list[TensorChange]] = {}
    of: dict[str, list[ValueChange]] = {}
    for row in rows:
        parts = row.name.split(".")
        path = ".".join(parts[:-1][:depth])
        change = moved.get(row.name)
        tensor = _tensor(row, change)
        if depth is not None and len(parts) - 1 > depth and tensor.name == parts[-1]:
            tensor = tensor._replace(name=".".join(parts[depth:]))
        found.setdefault(path, []).append(tensor)
        of.setdefault(path, []).extend([change] if change and not is_counter(row) else [])
    return [
        ModuleChanges(path, tensors, _relative(tensors, of[path]) if is_measured else None)
        for path, tensors in found.items()
    ]


def is_counter(row: Row) -> bool:
    """Whether a tensor is a whole number alone, as BatchNorm counts its batches. How far it moved says nothing of its module."""
    dtype = row.dtype_b or row.dtype_a or ""
    return row.elements == 1 and dtype.removeprefix("torch.").startswith(("int", "uint"))


def together(changes: Sequence[ValueChange]) -> tuple[float, float]:
    """The norm of the change of several tensors together, and the same against the norm of these before."""
    after = sum(change.norm**2 for change in changes)
    before = sum(
        (change.norm / change.relative) ** 2
        for change in changes
        if change.relative and math.isfinite(change.relative)
    )
    return math.sqrt(after), math.sqrt(after / before) if before else math.inf


def _relative(tensors: Sequence[TensorChange], changes: Sequence[ValueChange]) -> float | None:
    """How far the tensors of a module moved; None where nothing of it can be measured."""
    if changes:
        return together(changes)[1]
    return 0.0 if _are_equal(tensors) else None


def _are_equal(tensors: Sequence[TensorChange]) -> bool:
    return all(tensor.sign == "=" for tensor in tensors)


def _tensor(row: Row, change: ValueChange | None) -> TensorChange:
    last = row.name.rpartition(".")[2]
    is_renamed = row.a and row.b and row.a != row.b
    return TensorChange(
        name=f"{row.a} → {row.b}" if is_renamed else last,
        status=row.status,
        sign=_sign(row),
        shape=_between(*(shape(one) if one is not None else "" for one in (row.shape_a, row.shape_b))),
        dtype=_between(row.dtype_a or "", row.dtype_b or ""),
        elements=row.elements,
        note=row.note,
        relative=change.relative if change else None,
        cosine=change.cosine if change else None,
        largest=change.largest if change else None,
    )


def _sign(row: Row) -> str:
    if row.category == Category.ONLY_A:
        return "-"
    if row.category == Category.ONLY_B:
        return "+"
    return "=" if row.category in LOADABLE and row.equal is not False else "~"


def _between(a: str, b: str) -> str:
    """One text where both are equal or one is missing, both otherwise."""
    return f"{a} → {b}" if a and b and a != b else b or a
