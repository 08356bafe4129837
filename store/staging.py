"""Snapshots: a state's tensors copied to host memory that is used again by the next snapshot."""

from __future__ import annotations

from collections.abc import Sequence

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

    def snapshot(self, state: State) -> State:
        """The state as it is now, whatever becomes of the live tensors; valid until the next snapshot."""
        tensors = [leaf for leaf in state.leaves if isinstance(leaf.source, torch.Tensor) and leaf.size]
        copies = dict(zip(map(id, tensors), self._copied(tensors), strict=True))
        leaves = []
        for leaf in state.leaves:
            source = copies.get(id(leaf), leaf.source)
            if isinstance(source, np.ndarray):
                source = source.copy()
            leaves.append(Leaf.of(leaf.dtype, leaf.shape, source))
        return State(state.components, leaves)

    def _copied(self, leaves: Sequence[Leaf]) -> list[torch.Tensor]:
        starts, end = [], 0
        for leaf in leaves:
            starts.append(end)
            end += -(-leaf.size // _ALIGNMENT) * _ALIGNMENT
        on_cuda = any(leaf.source.is_cuda for leaf in leaves)
        if end > len(self._memory) or (on_cuda and not self._memory.is_pinned()):
            self._memory = torch.empty(0, dtype=torch.uint8)  # freed before the larger one is asked for
            self._memory = torch.empty(end, dtype=torch.uint8, pin_memory=on_cuda)
        sources = [leaf.source.detach() for leaf in leaves]
        copies = []
        for leaf, start, source in zip(leaves, starts, sources, strict=True):
            part = self._memory[start : start + leaf.size]
            copies.append(part.view(source.dtype).view(leaf.shape))
        with torch.no_grad():
            torch._foreach_copy_(copies, sources, non_blocking=on_cuda)
        if on_cuda:
            torch.cuda.synchronize()
        return copies
