"""Which stored tensors are near one another, where no history says so: imported models, other names, another order.

Of each tensor a few values at fixed places are kept, its *sketch*. The mean number of bits in the differences of two
sketches tells what a difference between the tensors would cost. Only tensors of one dtype and shape are compared, so
names do not matter. In each cluster of near tensors one stays whole, and the others rest on the nearest that is placed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from registry.store.differences import DEEPEST, LEVEL_WORTH_IT
from registry.store.dtypes import ELEMENT_TYPES

if TYPE_CHECKING:
    from registry.store.manifest import TensorInfo

_NEAR = 0.7
"""Part of a tensor that a difference between near ones may leave at most, by their sketches. Two that have nothing to do with
one another have 0.75 and more, as half of their signs differ.
"""

_RUNS, _RUN = 16, 16
"""How many runs of elements a sketch has, and the elements of each. A run lies in one page of memory, or in two."""

_COMPARED = 512
"""Tensors that are compared with one another, at most. More are put in order by their sketches, and compared in parts."""

_KEY, _KEY_BITS = 4, 12
"""For that order: how many values of a sketch count, and how many of their highest bits."""


class Found(NamedTuple):
    """A tensor that may be near others.

    Attributes:
        version: the number of the first version that has it.
        is_fixed: whether it must stay whole.
        sketch: some of its values, as unsigned whole numbers.
    """

    info: TensorInfo
    version: int
    is_fixed: bool
    sketch: Any


Cluster = tuple[Sequence[Found], Any]
"""Tensors that are near, and what a difference between any two would leave."""


def sketch_of(data: memoryview, dtype: str) -> Any:
    """Some values of a tensor, as unsigned whole numbers; always at the same places for one number of elements."""
    values = np.frombuffer(data, f"u{ELEMENT_TYPES[dtype].size}")
    starts = np.linspace(0, len(values) - _RUN, _RUNS).astype(np.int64)
    return values[(starts[:, None] + np.arange(_RUN)).ravel()]


def bases_of(found: Sequence[Found]) -> dict[str, str]:
    """From which tensor each is best stored as a difference, by digest. Those that stay whole are left out.

    No more than `DEEPEST` rest on one another. What stays whole in a cluster comes from one version, if possible, so that this
    version needs no other.
    """
    clusters = [one for group in _groups(found) for one in _clusters(group)]
    loss = _losses(clusters)
    return {
        members[i].info.digest: members[base].info.digest
        for members, cost in clusters
        for i, base in _tree(cost, [one.is_fixed for one in members], [loss[one.version] for one in members])
    }


def _groups(found: Sequence[Found]) -> Iterator[list[Found]]:
    """Tensors that are compared with one another: of one dtype and shape."""
    alike: dict[tuple[str, tuple[int, ...]], list[Found]] = {}
    for one in found:
        alike.setdefault((one.info.dtype, one.info.shape), []).append(one)
    for group in alike.values():
        if len(group) > _COMPARED:
            bits = 8 * ELEMENT_TYPES[group[0].info.dtype].size
            group.sort(key=lambda one: tuple((one.sketch[:_KEY] >> (bits - _KEY_BITS)).tolist()))
        parts = (group[i : i + _COMPARED] for i in range(0, len(group), _COMPARED))
        yield from (part for part in parts if len(part) > 1 and not all(one.is_fixed for one in part))


def _costs(sketches: Sequence[Any]) -> Any:
    """What a difference between any two would leave of a tensor, by their sketches; infinite if they are not near."""
    values = np.stack(sketches)
    bits = 8 * values.itemsize
    cost = np.empty((len(values), len(values)), np.float32)
    for i, one in enumerate(values):
        difference = (values - one).view(f"i{values.itemsize}")
        # The bits of a number, and its sign.
        cost[i] = (np.frexp(difference.astype(np.float64))[1].mean(1) + 1) / bits
    cost[cost > _NEAR] = np.inf
    np.fill_diagonal(cost, np.inf)
    return cost


def _clusters(group: Sequence[Found]) -> Iterator[Cluster]:
    """Sets of tensors that lead to one another, each from near to near; those near none are left out."""
    cost = _costs([one.sketch for one in group])
    left = set(range(len(cost)))
    while left:
        found, edge = set[int](), {left.pop()}
        while edge:
            found |= edge
            edge = {i for one in edge for i in np.flatnonzero(np.isfinite(cost[one])).tolist()} & left
            left -= edge
        if len(found) > 1:
            places = sorted(found)
            yield [group[i] for i in places], cost[np.ix_(places, places)]


def _losses(clusters: Sequence[Cluster]) -> Mapping[int, float]:
    """By version, how many bytes more its clusters would take if its tensors stayed whole, and not those in the middle."""
    loss: dict[int, float] = defaultdict(float)
    for members, cost in clusters:
        means = np.minimum(cost, 1).mean(1)
        for one, more in zip(members, (means - means.min()).tolist(), strict=True):
            loss[one.version] += one.info.size * len(members) * more
    return loss


def _tree(cost: Any, is_fixed: Sequence[bool], loss: Sequence[float]) -> Iterator[tuple[int, int]]:
    """What rests on what, each behind what it rests on: always the one that is cheapest to add (as Prim's algorithm does).

    Args:
        cost: of a difference between any two of a cluster.
        loss: of two that could stay whole, the one with less does.
    """
    depths = {i: 0 for i, stays in enumerate(is_fixed) if stays}
    left = [i for i, stays in enumerate(is_fixed) if not stays]
    while left:
        found = _cheapest(cost, left, depths)
        if found is None:
            root = min(left, key=lambda i: (loss[i], i))
            depths[root] = 0
            left.remove(root)
            continue
        i, base = found
        depths[i] = depths[base] + 1
        left.remove(i)
        yield i, base


def _cheapest(cost: Any, left: Sequence[int], depths: Mapping[int, int]) -> tuple[int, int] | None:
    """Which of those that are left to add, and on what; None if all are far from those that may carry one more."""
    carrying = [i for i, depth in depths.items() if depth < DEEPEST]
    if not carrying:
        return None
    level = LEVEL_WORTH_IT * np.array([depths[i] for i in carrying])
    total = cost[np.ix_(left, carrying)] + level
    i, base = divmod(int(total.argmin()), len(carrying))
    return (left[i], carrying[base]) if np.isfinite(total[i, base]) else None
