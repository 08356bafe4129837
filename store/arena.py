"""Snapshots: a state's tensors copied to host memory that is used again by the next snapshot."""

from __future__ import annotations

import numpy as np
import torch

from registry.store.saving import State
from registry.store.tree import Leaf

_ALIGNMENT = 64


class Arena:
    """Host memory for one snapshot at a time; it grows to the largest and is kept.

    Faulting in fresh memory costs twice as much as the copy itself, so it is worth keeping. Where tensors come
    from a CUDA device the memory is pinned.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._layout: list[tuple[torch.dtype, tuple[int, ...]]] = []
        self._parts: list[torch.Tensor] = []

    def snapshot(self, state: State) -> State:
        """The state as it is now, whatever becomes of the live tensors; valid until the next snapshot."""
        tensors = [leaf.source for leaf in state.leaves if _is_copied(leaf)]
        copies = iter(self._copied([t.detach() if t.requires_grad else t for t in tensors]))
        leaves = []
        for leaf in state.leaves:
            if _is_copied(leaf):
                leaves.append(leaf._replace(source=next(copies), is_plain=True, is_live=False))
            elif isinstance(leaf.source, np.ndarray):
                leaves.append(leaf._replace(source=leaf.source.copy(), is_plain=True, is_live=False))
            else:
                leaves.append(leaf)
        return State(state.components, leaves)

    def _copied(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        on_cuda = any(tensor.is_cuda for tensor in tensors)
        layout = [(tensor.dtype, tuple(tensor.shape)) for tensor in tensors]
        if layout != self._layout or (on_cuda and not self._memory.is_pinned()):
            self._lay_out(tensors, pinned=on_cuda)
            self._layout = layout
        with torch.no_grad():
            torch._foreach_copy_(self._parts, tensors, non_blocking=on_cuda)
        for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
            torch.cuda.synchronize(device)
        return self._parts

    def _lay_out(self, tensors: list[torch.Tensor], *, pinned: bool) -> None:
        """Give each tensor a part of the memory."""
        self._parts, starts, end = [], [], 0
        for tensor in tensors:
            starts.append(end)
            end += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        if end > len(self._memory) or (pinned and not self._memory.is_pinned()):
            self._memory = torch.empty(0, dtype=torch.uint8)  # freed before the larger one is asked for
            self._memory = torch.empty(end, dtype=torch.uint8, pin_memory=pinned)
        for tensor, start in zip(tensors, starts, strict=True):
            part = self._memory[start : start + tensor.nbytes]
            self._parts.append(part.view(tensor.dtype).view(tensor.shape))


def _is_copied(leaf: Leaf) -> bool:
    return isinstance(leaf.source, torch.Tensor) and leaf.size > 0
