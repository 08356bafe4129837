"""How far tensors moved: norms, angles and the share of elements that changed, for each tensor and each module."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy
import torch

from registry.transfer.matching import Pair
from registry.transfer.report_rows import ModuleChange, ValueChange
from registry.transfer.report_tree import together
from registry.transfer.sides import Side

_CHUNK = 1 << 18
"""Elements that are widened to float64 at once."""

_BLOCK = 1 << 13
"""Elements of one scalar product."""

_Doubles = numpy.ndarray[Any, numpy.dtype[numpy.float64]]


def changes(pairs: Sequence[Pair], left: Side, right: Side) -> Iterator[ValueChange]:
    """How far the tensors of pairs of equal shape moved, for those that moved at all."""
    if not (left.has_values and right.has_values):
        return
    buffers = _Buffers()
    for pair in pairs:
        if pair.a and pair.b and pair.a.shape == pair.b.shape:
            before, after = left.tensor(pair.a.name), right.tensor(pair.b.name)
            change = _change(pair.b.name, before, after, buffers=buffers)
            if change is not None:
                yield change


def by_module(moved: Sequence[ValueChange]) -> Iterator[ModuleChange]:
    """The change of each module: the norms of its tensors' changes, combined."""
    below: dict[str, list[ValueChange]] = {}
    for change in moved:
        below.setdefault(change.name.rpartition(".")[0], []).append(change)
    for module, found in below.items():
        norm, relative = together(found)
        yield ModuleChange(module=module, tensors=len(found), norm=norm, relative=relative)


class _Buffers:
    """Memory for a chunk of two tensors in float64, which stays in the processor's cache."""

    def __init__(self) -> None:
        self.before, self.step = (numpy.empty(_CHUNK) for _ in range(2))
        self.moved = numpy.empty(_CHUNK, dtype=numpy.bool_)


# Numbers that are not finite are no error here: they are counted.
@numpy.errstate(all="ignore")
def _change(name: str, a: torch.Tensor, b: torch.Tensor, buffers: _Buffers) -> ValueChange | None:
    """The change of one tensor, chunk by chunk; None if there is none.

    It computes in one thread, by numpy: waking other threads for such small steps can take longer than the steps.
    """
    one, other = (_real(t) for t in (a, b))
    moved = before = cross = largest = 0.0
    changed = bad_a = bad_b = 0
    for x, y in zip(torch.split(one, _CHUNK), torch.split(other, _CHUNK), strict=True):
        wide, step = _widened(x, buffers.before), _widened(y, buffers.step)
        step -= wide
        squares, size = _dot(step, step), _dot(wide, wide)
        if not math.isfinite(squares) or not math.isfinite(size):
            good = (x.isfinite() & y.isfinite()).numpy()
            bad_a += int((~x.isfinite()).sum())
            bad_b += int((~y.isfinite()).sum())
            changed += int(((x != y) & ~(x.isnan() & y.isnan())).numpy()[~good].sum())
            wide, step = wide[good], step[good]
            squares, size = _dot(step, step), _dot(wide, wide)
        before += size
        if squares == 0.0:
            continue
        moved += squares
        cross += _dot(wide, step)
        largest = max(largest, float(step.max()), -float(step.min()))
        changed += int(numpy.count_nonzero(numpy.not_equal(step, 0, out=buffers.moved[: len(step)])))
    if not (changed or bad_a or bad_b):
        return None
    after = before + 2 * cross + moved
    scale = math.sqrt(before) * math.sqrt(max(after, 0.0))
    return ValueChange(
        name=name,
        norm=math.sqrt(moved),
        relative=math.sqrt(moved / before) if before else math.inf if moved else 0.0,
        cosine=max(-1.0, min(1.0, (before + cross) / scale)) if scale else None,
        largest=largest,
        changed=changed / max(1, len(one)),
        nonfinite_a=bad_a,
        nonfinite_b=bad_b,
    )


def _widened(part: torch.Tensor, room: _Doubles) -> _Doubles:
    """A chunk in float64, in the memory given."""
    wide = room[: len(part)]
    # numpy has no bfloat16.
    if part.dtype is torch.bfloat16:
        torch.from_numpy(wide).copy_(part)
    else:
        numpy.copyto(wide, part.numpy())
    return wide


def _dot(a: _Doubles, b: _Doubles) -> float:
    """The scalar product, in blocks that are too short for the linear algebra library to use its threads."""
    whole = len(a) // _BLOCK * _BLOCK
    blocks = a[:whole].reshape(-1, 1, _BLOCK) @ b[:whole].reshape(-1, _BLOCK, 1)
    return float(blocks.sum()) + float(a[whole:].dot(b[whole:]))


def _real(tensor: torch.Tensor) -> torch.Tensor:
    """The elements in a row; of complex numbers, both parts; of types that torch cannot compute with, wider ones."""
    flat = tensor.detach().cpu().resolve_neg().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat.resolve_conj()).reshape(-1)
    narrow = flat.is_floating_point() and flat.dtype.itemsize == 1
    return flat.to(torch.float32) if narrow or flat.dtype is torch.bool else flat
