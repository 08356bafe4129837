"""Adapters: named ways to make a tensor of another shape, used only where a plan asks for one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from registry.store.errors import Incompatible

Shape = tuple[int, ...]


def _channels_sum(value: torch.Tensor, shape: Shape) -> torch.Tensor:
    """Three input channels to one: their sum, so that a grey image gives what it gave in colour."""
    if value.dim() != 4 or shape != (value.shape[0], 1, *value.shape[2:]):
        raise ValueError("takes [out, channels, height, width] to one channel")
    return value.sum(1, keepdim=True)


def _channels_repeat(value: torch.Tensor, shape: Shape) -> torch.Tensor:
    """One input channel to several: repeated and divided, so that a grey image in colour gives what it gave."""
    if value.dim() != 4 or value.shape[1] != 1 or shape[:1] + shape[2:] != (value.shape[0], *value.shape[2:]):
        raise ValueError("takes one channel of [out, 1, height, width] to several")
    return value.expand(shape) / shape[1]


def _positions(value: torch.Tensor, shape: Shape) -> torch.Tensor:
    """Position embeddings [1, 1 + n*n, width] of a square grid to another, by bicubic interpolation."""
    if value.dim() != 3 or len(shape) != 3 or value.shape[::2] != (shape[0], shape[2]):
        raise ValueError("takes [1, 1 + n*n, width] to another n")
    old, new = (round((n - 1) ** 0.5) for n in (value.shape[1], shape[1]))
    if old * old + 1 != value.shape[1] or new * new + 1 != shape[1]:
        raise ValueError("takes one class token and a square grid")
    grid = value[:, 1:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid.float(), (new, new), mode="bicubic", align_corners=False)
    tail = grid.permute(0, 2, 3, 1).reshape(1, new * new, -1).to(value.dtype)
    return torch.cat([value[:, :1], tail], 1)


ADAPTERS: dict[str, Callable[[torch.Tensor, Shape], torch.Tensor]] = {
    "channels-sum": _channels_sum,
    "channels-repeat": _channels_repeat,
    "positions": _positions,
}


def adapt(name: str, value: torch.Tensor, shape: Shape) -> torch.Tensor:
    """Make a tensor of another shape.

    Raises:
        Incompatible: if the adapter does not fit the shapes.
    """
    try:
        found = ADAPTERS[name](value, shape)
    except ValueError as error:
        raise Incompatible(f"the adapter {name} {error}, not {list(value.shape)} to {list(shape)}") from None
    return found


def class_rows(
    value: torch.Tensor, old: Sequence[str], new: Sequence[str], fresh: torch.Tensor
) -> torch.Tensor:
    """Rows of a classifier by the names of its classes; classes that are new keep their fresh rows.

    Args:
        value: of the source, one row for each of `old`.
        fresh: of the target, one row for each of `new`.
    """
    places: Mapping[str, int] = {name: i for i, name in enumerate(old)}
    rows = fresh.clone()
    for i, name in enumerate(new):
        if name in places:
            rows[i] = value[places[name]]
    return rows
