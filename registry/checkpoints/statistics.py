"""Statistics of stored tensors: norm, mean, spread, extremes, zeros, and a histogram, tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import numpy
import torch

from registry.checkpoints.checkpoint import Checkpoint
from registry.store.errors import NotFound
from registry.store.text import quoted

BINS = 64
"""Bins of a histogram."""

_CHUNK = 1 << 20
"""Elements that are widened to float64 at once."""

_ALL = 4 << 20
"""Elements up to which all are counted in the histogram. Of more, a million at equal distances are."""


class Statistics(NamedTuple):
    """What the elements of a tensor are like. Those that are not finite are counted, and left out of all else.

    Attributes:
        norm: the square root of the sum of squares.
        std: the standard deviation, of all elements and not of a sample.
        least, most: the smallest and the largest element; 0 if there is none.
        zeros: the share of elements that are 0.
        nonfinite: how many are NaN or infinite.
        histogram: how many lie in each of `BINS` equal parts from `least` to `most`.
    """

    elements: int
    norm: float
    mean: float
    std: float
    least: float
    most: float
    zeros: float
    nonfinite: int
    histogram: tuple[int, ...]


def statistics(checkpoint: Checkpoint, paths: Collection[str]) -> Iterator[tuple[str, Statistics]]:
    """Path and statistics of some tensors of a checkpoint, one after the other.

    Args:
        paths: such as `model/fc.1.weight`, as `checkpoint.parameters()` has them.

    Raises:
        NotFound: if the checkpoint has no tensor of a path.
        Corrupt: if a byte is not what was saved.
    """
    named = checkpoint.store.manifest(checkpoint.id).named
    for path in paths:
        found = named.get(path)
        if found is None:
            raise NotFound(f"{checkpoint.name} has no single tensor {quoted(path)}")
        slots = {slot: path for _, slot in found.shards}
        parts = checkpoint.store.tensors_at(checkpoint.id, slots, label=checkpoint.name)
        yield path, of_tensors(list(parts.values()))


@numpy.errstate(all="ignore")
def of_tensors(parts: Collection[torch.Tensor]) -> Statistics:
    """The statistics of the elements of some tensors together; of complex numbers, of both parts."""
    rows = [_row(part) for part in parts]
    count = sum(len(row) for row in rows)
    finite = zeros = 0
    total = squares = 0.0
    least, most = math.inf, -math.inf
    for chunk in _chunks(rows):
        good = chunk[numpy.isfinite(chunk)]
        if not len(good):
            continue
        finite += len(good)
        total += float(good.sum())
        squares += float(good @ good)
        zeros += int(numpy.count_nonzero(good == 0))
        least, most = min(least, float(good.min())), max(most, float(good.max()))
    mean = total / finite if finite else 0.0
    return Statistics(
        elements=count,
        norm=math.sqrt(squares),
        mean=mean,
        std=math.sqrt(max(0.0, squares / finite - mean**2)) if finite else 0.0,
        least=least if finite else 0.0,
        most=most if finite else 0.0,
        zeros=zeros / count if count else 0.0,
        nonfinite=count - finite,
        histogram=_histogram(rows, count, least, most) if finite else (0,) * BINS,
    )


def _histogram(rows: Collection[torch.Tensor], count: int, least: float, most: float) -> tuple[int, ...]:
    step = 1 if count <= _ALL else count >> 20
    found = numpy.zeros(BINS, dtype=numpy.int64)
    for chunk in _chunks([row[::step] for row in rows]):
        good = chunk[numpy.isfinite(chunk)]
        if most > least:
            # The distance of two huge numbers may be infinite, and half of a tiny one 0.
            half = 1 if math.isfinite(most - least) else 2
            place = (good / half - least / half) / (most / half - least / half) * BINS
            found += numpy.bincount(numpy.minimum(place.astype(numpy.int64), BINS - 1), minlength=BINS)
        else:
            found[BINS // 2] += len(good)
    return tuple(int(one) for one in found)


def _chunks(rows: Collection[torch.Tensor]) -> Iterator[numpy.ndarray[Any, numpy.dtype[numpy.float64]]]:
    for row in rows:
        for part in torch.split(row, _CHUNK):
            yield part.to(torch.float64).numpy()


def _row(tensor: torch.Tensor) -> torch.Tensor:
    """The elements in a row."""
    flat = tensor.detach().reshape(-1)
    return torch.view_as_real(flat.resolve_conj()).reshape(-1) if flat.is_complex() else flat
