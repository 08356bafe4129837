"""How far tensors moved: norms, angles and the share of elements that changed, for each tensor and each module."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch

from registry.store.errors import Unsupported
from registry.store.parallel import in_parallel
from registry.store.usual import TORCH_TYPES
from registry.transfer.matching import Pair
from registry.transfer.report_rows import ModuleChange, ValueChange
from registry.transfer.report_tree import together
from registry.transfer.sides import Side

try:
    from registry.store._split import sums as _compiled
except ImportError:
    # No compiler built it. numpy does the same, in several passes.
    _compiled = None  # type: ignore[assignment]

_CHUNK = 1 << 18
"""Elements that are worked on at once: what is computed of them stays in the processor's cache."""

_BLOCK = 1 << 12
"""Elements of one scalar product."""

_FEW = 1 << 14
"""Elements of a tensor below which float64 costs nothing that could be felt."""

_TINY = 1e-15
"""The largest number of a chunk below which float32 could lose its square."""

_CANCELLED = 0.1
"""The part of a chunk's squares below which those of the new one are not told by sums over the old one and the step."""

_SINGLES = frozenset({torch.float32, torch.bfloat16, torch.float16})
"""Types whose numbers are float32 without loss."""

_Floats = numpy.ndarray[Any, numpy.dtype[numpy.floating[Any]]]


@dataclass(slots=True)
class _Sums:
    """What is known of the difference of two tensors, or of a part of it: sums of squares and products, and counts."""

    moved: float = 0.0
    before: float = 0.0
    after: float = 0.0
    product: float = 0.0
    largest: float = 0.0
    changed: int = 0
    bad_a: int = 0
    bad_b: int = 0

    def add(self, other: _Sums) -> None:
        """Take in another part."""
        self.moved += other.moved
        self.before += other.before
        self.after += other.after
        self.product += other.product
        self.largest = max(self.largest, other.largest)
        self.changed += other.changed
        self.bad_a += other.bad_a
        self.bad_b += other.bad_b


def changes(pairs: Sequence[Pair], left: Side, right: Side) -> Iterator[ValueChange]:
    """How far the tensors of pairs of equal shape moved, for those that moved at all.

    Floats of 32 bits and fewer are subtracted and multiplied in float32, and summed up in float64 by blocks, so norms are right
    to seven digits; small tensors, wider types and numbers near the ends of float32 are computed in float64 throughout.

    Raises:
        Unsupported: if a tensor is of a type that torch cannot compute with.
    """
    if not (left.has_values and right.has_values):
        return
    alike = [
        (pair.b.name, left.tensor(pair.a.name), right.tensor(pair.b.name))
        for pair in pairs
        if pair.a and pair.b and pair.a.shape == pair.b.shape
    ]
    found: dict[int, ValueChange] = {}
    rooms = threading.local()

    def measure(place: int) -> None:
        if not hasattr(rooms, "own"):
            rooms.own = _Rooms()
        name, before, after = alike[place]
        for tensor in (before, after):
            if tensor.dtype not in TORCH_TYPES or "float4" in str(tensor.dtype):
                raise Unsupported(f"{name} is {tensor.dtype}, whose values cannot be compared")
        if before.is_complex() != after.is_complex():
            # Complex numbers have two parts.
            kind = torch.promote_types(before.dtype, after.dtype)
            before, after = before.detach().to(kind), after.detach().to(kind)
        a, b = _real(before), _real(after)
        sums = _sums_of(a, b, rooms.own)
        if sums.changed or sums.bad_a or sums.bad_b:
            found[place] = _change(name, len(a), sums)

    in_parallel(range(len(alike)), measure, [before.nbytes + after.nbytes for _, before, after in alike])
    yield from (found[place] for place in sorted(found))


def by_module(moved: Sequence[ValueChange]) -> Iterator[ModuleChange]:
    """The change of each module: the norms of its tensors' changes, combined."""
    below: dict[str, list[ValueChange]] = {}
    for change in moved:
        below.setdefault(change.name.rpartition(".")[0], []).append(change)
    for module, found in below.items():
        norm, relative = together(found)
        yield ModuleChange(module=module, tensors=len(found), norm=norm, relative=relative)


class _Rooms:
    """Memory for a chunk of two tensors, which stays in the processor's cache."""

    def __init__(self) -> None:
        self.singles = [numpy.empty(_CHUNK, numpy.float32) for _ in range(3)]
        self.doubles = [numpy.empty(_CHUNK) for _ in range(2)]
        self.moved = numpy.empty(_CHUNK, numpy.bool_)


# Numbers that are not finite are no error here: they are counted.
@numpy.errstate(all="ignore")
def _sums_of(a: torch.Tensor, b: torch.Tensor, rooms: _Rooms) -> _Sums:
    """The sums of two tensors, chunk by chunk."""
    found = _Sums()
    is_narrow = len(a) >= _FEW and {a.dtype, b.dtype} <= _SINGLES
    for x, y in zip(torch.split(a, _CHUNK), torch.split(b, _CHUNK), strict=True):
        sums = _in_float32(x, y, rooms) if is_narrow else None
        found.add(sums or _in_float64(x, y, rooms))
    return found


def _in_float32(x: torch.Tensor, y: torch.Tensor, rooms: _Rooms) -> _Sums | None:
    """The sums of a chunk; None where float32 could not hold a number or a square."""
    before, after, step = (room[: len(x)] for room in rooms.singles)
    one = x.numpy() if x.dtype is torch.float32 else _widened(x, before)
    other = y.numpy() if y.dtype is torch.float32 else _widened(y, after)
    # Elements of a tensor may begin anywhere, such as those of `torch.frombuffer`.
    if _compiled is not None and one.flags.aligned and other.flags.aligned:
        moved, squares, cross, largest, changed = _compiled(one, other)
        sums = _Sums(moved=moved, before=squares, largest=largest, changed=changed)
    else:
        numpy.subtract(other, one, out=step)
        sums = _Sums(largest=max(float(step.max()), -float(step.min())), before=_dot(one, one))
        cross = 0.0
        if sums.largest:
            sums.moved, cross, sums.changed = _dot(step, step), _dot(one, step), _count(step, rooms)
    sums.product, sums.after = sums.before + cross, sums.before + 2 * cross + sums.moved
    if not _TINY**2 * len(x) <= sums.before < math.inf:
        return None
    if sums.changed and not (sums.largest >= _TINY and sums.moved < math.inf):
        return None
    if sums.after < _CANCELLED * sums.before:
        return None
    return sums


def _in_float64(x: torch.Tensor, y: torch.Tensor, rooms: _Rooms) -> _Sums:
    """The sums of a chunk, without numbers that are not finite; these are counted."""
    wide, step = (_widened(part, room) for part, room in zip((x, y), rooms.doubles, strict=True))
    after, product = _dot(step, step), _dot(wide, step)
    step -= wide
    sums = _Sums(moved=_dot(step, step), before=_dot(wide, wide), after=after, product=product)
    if not math.isfinite(sums.moved) or not math.isfinite(sums.before):
        good = (x.isfinite() & y.isfinite()).numpy()
        sums.bad_a, sums.bad_b = int((~x.isfinite()).sum()), int((~y.isfinite()).sum())
        sums.changed = int(((x != y) & ~(x.isnan() & y.isnan())).numpy()[~good].sum())
        wide, step = wide[good], step[good]
        sums.moved, sums.before = _dot(step, step), _dot(wide, wide)
        new = wide + step
        sums.after, sums.product = _dot(new, new), _dot(wide, new)
    if sums.moved:
        sums.largest = max(float(step.max()), -float(step.min()))
        sums.changed += _count(step, rooms)
    return sums


def _count(step: _Floats, rooms: _Rooms) -> int:
    """How many numbers of a chunk are not zero."""
    return int(numpy.count_nonzero(numpy.not_equal(step, 0, out=rooms.moved[: len(step)])))


def _change(name: str, count: int, sums: _Sums) -> ValueChange:
    """The change of a tensor of so many elements."""
    before, moved = sums.before, sums.moved
    scale = math.sqrt(before) * math.sqrt(sums.after)
    return ValueChange(
        name=name,
        norm=math.sqrt(moved),
        relative=math.sqrt(moved / before) if before else math.inf if moved else 0.0,
        cosine=max(-1.0, min(1.0, sums.product / scale)) if scale else None,
        largest=sums.largest,
        changed=sums.changed / max(1, count),
        nonfinite_a=sums.bad_a,
        nonfinite_b=sums.bad_b,
    )


def _widened(part: torch.Tensor, room: _Floats) -> _Floats:
    """A chunk in the memory given, and in its type."""
    wide = room[: len(part)]
    if part.dtype is torch.bfloat16:
        # numpy has no bfloat16, which is the upper half of a float32. torch would use all its threads in each of ours.
        single = wide if wide.dtype == numpy.float32 else numpy.empty(len(wide), numpy.float32)
        upper = single.view(numpy.uint32)
        numpy.copyto(upper, part.view(torch.uint16).numpy())
        numpy.left_shift(upper, 16, out=upper)
        if single is not wide:
            numpy.copyto(wide, single)
    else:
        numpy.copyto(wide, part.numpy())
    return wide


def _dot(a: _Floats, b: _Floats) -> float:
    """The scalar product, in blocks that are too short for the linear algebra library to use its threads."""
    whole = len(a) // _BLOCK * _BLOCK
    blocks = a[:whole].reshape(-1, 1, _BLOCK) @ b[:whole].reshape(-1, _BLOCK, 1)
    return float(blocks.sum(dtype=numpy.float64)) + float(a[whole:].dot(b[whole:]))


def _real(tensor: torch.Tensor) -> torch.Tensor:
    """The elements in a row; of complex numbers, both parts; of types that torch cannot compute with, wider ones."""
    flat = tensor.detach().cpu().resolve_neg().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat.resolve_conj()).reshape(-1)
    narrow = flat.is_floating_point() and flat.dtype.itemsize == 1
    return flat.to(torch.float32) if narrow or flat.dtype is torch.bool else flat
