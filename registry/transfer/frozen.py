"""Frozen versions: whether the frozen tensors of a version are the same in an earlier one, and if not, why."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

from registry.checkpoints.checkpoint import Checkpoint
from registry.store.errors import Incompatible, Invalid
from registry.store.text import quoted

_MODEL = "model"
"""The component whose frozen tensors are compared."""

_NOT_YET = "it was not frozen yet in the first"
_A_BUFFER = "a buffer: its layer was in training mode, or writes to it in evaluation mode, too"
_WRITTEN = "something wrote to it, or the optimizer had it"
_ASKED_FOR = "its statistics go on, as was asked for"
_NOT_HELD = "the parameters of its layer are frozen, and it was not held"


class FrozenCheck(NamedTuple):
    """Which tensors that are frozen in the second of two versions have moved since the first.

    Attributes:
        frozen: the names of the frozen tensors.
        moved: the names of those that differ, each with the reason, as far as it can be known.
        went_on: the names of buffers that differ and are not frozen themselves, though all parameters of their layer
            are; each with the reason.
    """

    frozen: tuple[str, ...]
    moved: Mapping[str, str]
    went_on: Mapping[str, str]


def check_frozen(before: Checkpoint, after: Checkpoint) -> FrozenCheck:
    """Compare two versions by digest, over the tensors that are frozen in `after`. No tensor is read.

    Raises:
        Invalid: if nothing was frozen in `after`.
        Incompatible: if `before` lacks a frozen tensor.
    """
    frozen = _recorded(after, "frozen")
    if not frozen:
        raise Invalid(f"{after.name} was saved without anything frozen")
    old, new = _digests(before), _digests(after)
    lost = [name for name in frozen if name not in old]
    if lost:
        raise Incompatible(f"{before.name} has no {quoted(lost[0])}, which is frozen in {after.name}")
    were_frozen = _recorded(before, "frozen")
    buffers, going_on = _recorded(after, "buffers"), _recorded(after, "going_on")
    return FrozenCheck(
        frozen=tuple(frozen),
        moved={name: _reason(name, were_frozen, buffers) for name in frozen if old[name] != new[name]},
        went_on={
            name: _ASKED_FOR if name.rpartition(".")[0] in going_on else _NOT_HELD
            for name in _not_held(frozen, new.keys(), buffers)
            if old.get(name) != new[name]
        },
    )


def _recorded(checkpoint: Checkpoint, what: str) -> Collection[str]:
    """Names that were recorded when a version was saved: `frozen`, `buffers`, or layers as `going_on`."""
    found: Collection[str] = checkpoint.provenance.get(what, {}).get(_MODEL, ())
    return found


def _digests(checkpoint: Checkpoint) -> dict[str, str]:
    """The digests of a version's tensors by name."""
    return {
        path.partition("/")[2]: digest
        for path, _, _, digest in checkpoint.parameters()
        if path.startswith(f"{_MODEL}/")
    }


def _not_held(frozen: Collection[str], names: Collection[str], buffers: Collection[str]) -> list[str]:
    """The buffers that are not frozen, of layers that have parameters, all of them frozen."""
    is_frozen = set(frozen)
    layers: dict[str, list[str]] = {}
    for name in set(names) - set(buffers):
        layers.setdefault(name.rpartition(".")[0], []).append(name)
    found = []
    for name in buffers:
        own = layers.get(name.rpartition(".")[0])
        if own and name in names and name not in is_frozen and is_frozen.issuperset(own):
            found.append(name)
    return found


def _reason(name: str, were_frozen: Collection[str], buffers: Collection[str]) -> str:
    """Why a frozen tensor has moved, as far as it can be known."""
    if name not in were_frozen:
        return _NOT_YET
    return _A_BUFFER if name in buffers else _WRITTEN
