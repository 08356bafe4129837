"""Adapters: named ways to make a tensor that does not fit as it is, used only where a plan asks for one.

To add one: a function here and a row in `ADAPTERS`, a row in the table of docs/transfer.md, and a test. What is
planned, applied, printed and offered by the command line follows from the row. The help of the command line reads the
names, so this module loads torch only where a tensor is made.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from registry.store.errors import Incompatible, Invalid
from registry.store.text import quoted

if TYPE_CHECKING:
    import torch

    from registry.transfer.rows import Rows


class Adapter(NamedTuple):
    """A way to make a tensor that fits a target.

    Attributes:
        make: takes the source's tensor, the target's with its present values, and the rows of classes. It returns a new
            tensor of the target's shape, and changes neither. For shapes that it does not take it raises a
            `ValueError`, whose words follow the adapter's name in a sentence. Plans try it on the meta device, where
            tensors have no values.
        needs_source: whether it makes its tensor from one of the source; otherwise it makes a new one.
        takes_rows: whether it is given the rows of classes; the others get None.
        after_relu: whether it makes a layer that begins as the identity, which is exact only after a ReLU.
    """

    make: Callable[[Any, torch.Tensor, Rows | None], torch.Tensor]
    needs_source: bool = True
    takes_rows: bool = False
    after_relu: bool = False


def check_adapter(name: str) -> None:
    """See that there is an adapter of a name.

    Raises:
        Invalid: if there is none, with the names of those that there are.
    """
    if name not in ADAPTERS:
        raise Invalid(f"there is no adapter {quoted(name)}", f"the adapters are {', '.join(ADAPTERS)}")


def needs_source(name: str) -> bool:
    """Whether an adapter makes its tensor from one of the source; true for a name that is no adapter."""
    return name not in ADAPTERS or ADAPTERS[name].needs_source


def adapt(
    name: str, value: torch.Tensor | None, target: torch.Tensor, rows: Rows | None = None
) -> torch.Tensor:
    """Make a tensor that fits a target.

    Args:
        value: of the source; None for an adapter that needs none.
        target: the tensor to fit, with its present values; it is not changed.
        rows: for an adapter that takes them.

    Raises:
        Invalid: if there is no such adapter.
        Incompatible: if the adapter does not fit the shapes.
    """
    check_adapter(name)
    try:
        return ADAPTERS[name].make(value, target.detach(), rows)
    except ValueError as error:
        shapes = f"{list(target.shape)}" if value is None else f"{list(value.shape)} to {list(target.shape)}"
        raise Incompatible(f"the adapter {name} {error}, not {shapes}") from None


def _channels_sum(value: torch.Tensor, target: torch.Tensor, rows: Rows | None) -> torch.Tensor:
    """Three input channels to one: their sum, so that a grey image gives what it gave in colour."""
    if value.dim() != 4 or target.shape != (value.shape[0], 1, *value.shape[2:]):
        raise ValueError("takes [out, channels, height, width] to one channel")
    return value.sum(1, keepdim=True)


def _channels_repeat(value: torch.Tensor, target: torch.Tensor, rows: Rows | None) -> torch.Tensor:
    """One input channel to several: repeated and divided, so that a grey image in colour gives what it gave."""
    fits = value.dim() == target.dim() == 4 and value.shape[1] == 1
    if not fits or value.shape[::2] != target.shape[::2] or value.shape[3] != target.shape[3]:
        raise ValueError("takes one channel of [out, 1, height, width] to several")
    return value.expand(target.shape) / target.shape[1]


def _positions(value: torch.Tensor, target: torch.Tensor, rows: Rows | None) -> torch.Tensor:
    """Position embeddings [1, 1 + n*n, width] of a square grid to another, by bicubic interpolation."""
    if value.dim() != 3 or target.dim() != 3 or value.shape[::2] != target.shape[::2]:
        raise ValueError("takes [1, 1 + n*n, width] to another n")
    # Lazy: loads torch.
    import torch

    old, new = (math.isqrt(t.shape[1] - 1) for t in (value, target))
    if old * old + 1 != value.shape[1] or new * new + 1 != target.shape[1]:
        raise ValueError("takes one class token and a square grid")
    grid = value[:, 1:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid.float(), (new, new), mode="bicubic", align_corners=False)
    tail = grid.permute(0, 2, 3, 1).reshape(1, new * new, -1).to(value.dtype)
    return torch.cat([value[:, :1], tail], 1)


def _class_rows(value: torch.Tensor, target: torch.Tensor, rows: Rows | None) -> torch.Tensor:
    """Rows of a classifier by the names of their classes; classes that are new keep the target's own rows."""
    # Lazy: loads torch.
    import torch

    if rows is None:
        raise ValueError("needs the classes of both sides")
    if not value.dim() or not target.dim() or value.shape[1:] != target.shape[1:]:
        raise ValueError("takes rows of one width")
    if len(target) != rows.of or any(a >= len(value) or b >= rows.of or min(a, b) < 0 for a, b in rows.pairs):
        raise ValueError(f"was given {rows.of} classes of the target")
    found = target.clone()
    ours, theirs = (torch.tensor(list(side), device=value.device) for side in zip(*rows.pairs, strict=True))
    return found.to(value.device).index_copy(0, theirs, value.index_select(0, ours).to(found.dtype))


def _identity(value: torch.Tensor | None, target: torch.Tensor, rows: Rows | None) -> torch.Tensor:
    """A new layer that changes nothing: the identity for a square weight, zeros for a bias. Exact only after a ReLU."""
    # Lazy: loads torch.
    import torch

    if target.dim() == 1:
        return torch.zeros_like(target)
    square = target.dim() >= 2 and target.shape[0] == target.shape[1]
    if not square or any(size % 2 == 0 for size in target.shape[2:]):
        raise ValueError("makes square tensors for Linear, or for Conv with odd kernels")
    found = torch.zeros_like(target)
    return torch.nn.init.eye_(found) if target.dim() == 2 else torch.nn.init.dirac_(found)


ADAPTERS = {
    "channels-sum": Adapter(_channels_sum),
    "channels-repeat": Adapter(_channels_repeat),
    "positions": Adapter(_positions),
    "class-rows": Adapter(_class_rows, takes_rows=True),
    "identity": Adapter(_identity, needs_source=False, after_relu=True),
}
"""Every adapter by its name."""
