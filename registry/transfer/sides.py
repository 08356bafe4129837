"""Sides: the named tensors of a checkpoint, a file or a live network. A tensor is read when it is asked for."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy
import torch
from torch import nn

from registry.checkpoints.checkpoint import Checkpoint
from registry.live import builders, components
from registry.log.metrics import with_metrics
from registry.store.digest import digest as digest_of
from registry.store.digest import tensor_digest
from registry.store.errors import Invalid, RegistryError, Unsupported
from registry.store.tree import CUT, Leaf, is_cut
from registry.store.usual import TORCH_TYPES

_CHUNK = 1 << 19
"""Bytes that are compared at once, so that what is written of them stays in the processor's cache."""


class StateEntry(NamedTuple):
    """One name of a state dict.

    Attributes:
        kind: `parameter` or `buffer`; None where a file does not say.
        tie: equal for names that share memory.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    kind: str | None
    tie: object

    @property
    def elements(self) -> int:
        """How many elements the tensor has."""
        return math.prod(self.shape)


class Side:
    """One of the two sides of a diff, or the source of a transfer; see `registry.transfer.sources.side_of`.

    Args:
        tensor: reads the tensor of a name; None if the tensors have no memory.
        digests: digests of tensors that are known already, by name.
        shards: digests of all shards of a name together, where the digest of the whole is not known.

    Attributes:
        label: what to call it.
        entries: by name, in the order of the state dict.
        module: the live network, if it is one.
        checkpoint: the version in the registry, if it is one.
        metadata: the `_metadata` of a state dict, if it has one.
        notes: what is worth saying about how it was read.
        derived: names that only the network's `state_dict()` makes; no parameter or buffer has them.
    """

    def __init__(
        self,
        label: str,
        entries: Iterable[StateEntry],
        tensor: Callable[[str], torch.Tensor] | None,
        *,
        module: nn.Module | None = None,
        checkpoint: Checkpoint | None = None,
        digests: Mapping[str, str] | None = None,
        shards: Mapping[str, str] | None = None,
        metadata: Any = None,
        notes: Iterable[str] = (),
        derived: Iterable[str] = (),
    ) -> None:
        self.label = label
        self.entries = {entry.name: entry for entry in entries}
        self.module = module
        self.checkpoint = checkpoint
        self.notes = tuple(notes)
        self.derived = frozenset(derived)
        self.metadata = metadata
        self._tensor = tensor
        self._digests = dict(digests or {})
        self._shards = dict(shards or {})

    @property
    def has_values(self) -> bool:
        """Whether there are tensors to compare or copy; those of a network on the meta device have no values."""
        return self._tensor is not None

    @property
    def elements(self) -> int:
        """How many elements all tensors have together."""
        return sum(entry.elements for entry in self.entries.values())

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor of a name; on the CPU for a stored one.

        Raises:
            Invalid: if the tensors have no values, or the memory of this one was freed.
        """
        if self._tensor is None:
            raise Invalid(f"{self.label} is on the meta device and has no values")
        tensor = self._tensor(name)
        if is_cut(tensor):
            raise Invalid(f"{name} of {self.label} is {CUT}")
        return tensor

    def digest(self, name: str) -> str | None:
        """The digest of the tensor of a name, computed at most once; None where it has no values.

        Raises:
            Unsupported: if tensors of its type cannot be stored.
        """
        if name not in self._digests and self.has_values:
            entry, tensor = self.entries[name], self.tensor(name).detach()
            if tensor.dtype not in TORCH_TYPES:
                raise Unsupported(
                    f"{name} of {self.label} is {entry.dtype}, whose values cannot be stored or transferred",
                    "convert it first",
                )
            leaf = Leaf.of(tensor)
            self._digests[name] = tensor_digest(entry.dtype, entry.shape, leaf.buffer())
        return self._digests.get(name)

    def stored_digest(self, name: str) -> str | None:
        """The digest of a version's tensor, whose values never change; None for any other, and where it is not known yet."""
        return self._digests.get(name) if self.checkpoint is not None else None

    def equals(self, name: str, other: Side, its_name: str) -> bool | None:
        """Whether two tensors of equal dtype and shape are the same, bit for bit; None where one has no values.

        If one of the two digests is known, digests are compared; otherwise the bits.
        """
        if not (self.has_values and other.has_values):
            return None
        if name in self._shards and self._shards[name] == other._shards.get(its_name):
            return True
        if name in self._digests or its_name in other._digests:
            return self.digest(name) == other.digest(its_name)
        return _same(components.bits(self.tensor(name)), components.bits(other.tensor(its_name)))

    def explained_by(self, module: nn.Module, live: Side) -> Side:
        """The same tensors as a side of a live network, which says what is a parameter and what a buffer.

        Args:
            live: the side of that network.
        """
        entries = [
            entry._replace(kind=live.entries[name].kind) if name in live.entries else entry
            for name, entry in self.entries.items()
        ]
        return Side(
            self.label,
            entries,
            self.tensor,
            module=module,
            checkpoint=self.checkpoint,
            digests=self._digests,
            metadata=self.metadata,
            notes=self.notes,
        )

    @functools.cached_property
    def structure(self) -> str:
        """A digest of names, dtypes and shapes."""
        lines = (f"{entry.name} {entry.dtype} {list(entry.shape)}\n" for entry in self.entries.values())
        return digest_of("".join(sorted(lines)).encode())

    @functools.cached_property
    def content(self) -> str | None:
        """A digest of all tensors with their names; None for a live network, which may change at any time."""
        if not self.has_values or (self.module is not None and self.checkpoint is None):
            return None
        return digest_of("".join(f"{name} {self.digest(name)}\n" for name in sorted(self.entries)).encode())

    @functools.cached_property
    def network(self) -> nn.Module | None:
        """The live network, or the one that a checkpoint's registered builder makes, without values."""
        if self.module is not None or self.checkpoint is None:
            return self.module
        about = self.checkpoint.provenance
        if "builder" not in about:
            return None
        try:
            make = builders.builder(about["builder"])
            return builders.on_meta(lambda: make.build(about.get("network")))
        except RegistryError:
            # The builder is not known here, or takes another configuration by now.
            return None

    @property
    def config(self) -> Mapping[str, Any]:
        """The configuration of the checkpoint or of the live network; empty where neither has one."""
        if self.checkpoint is not None:
            return self.checkpoint.config or {}
        return (builders.config_of(self.module) if self.module is not None else None) or {}

    @property
    def metrics(self) -> Mapping[str, float]:
        """The loss and the metrics of the checkpoint; empty where there is none."""
        if self.checkpoint is None:
            return {}
        loss = {} if self.checkpoint.loss is None else {"loss": self.checkpoint.loss}
        return with_metrics(loss, self.checkpoint.metrics)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two rows of integers of one type are equal; nothing is read behind the chunk of the first difference.

    All threads of `torch.equal` wait for one another at every tensor, and it reads less than half as fast.
    """
    if a.shape != b.shape:
        return False
    one, other = (numpy.ascontiguousarray(row.numpy()).view(numpy.uint8) for row in (a, b))
    # Words of 64 bits are compared fastest.
    whole = len(one) // 8 * 8
    words, others = one[:whole].view(numpy.uint64), other[:whole].view(numpy.uint64)
    step = _CHUNK // 8
    return numpy.array_equal(one[whole:], other[whole:]) and all(
        numpy.array_equal(words[start : start + step], others[start : start + step])
        for start in range(0, len(words), step)
    )
