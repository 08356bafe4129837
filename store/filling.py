"""Filling live tensors with stored ones: all of them once all were verified, or none. `copy_all` takes any others.

Nothing is read past the page cache here. Between the verification and the copying the bytes must be somewhere, and the page cache
holds them without memory of the process's own.
"""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.autograd.graph import increment_version

from registry.store.loading import Mapped, read_into, steady, view
from registry.store.locating import Wanted
from registry.store.parallel import in_order, portions
from registry.store.tree import is_plain, memory_of
from registry.store.usual import CLASSES

_PART = 4 << 20
"""Bytes that a thread copies at a time."""

_FEW = 64 << 10
"""Bytes below which a copy keeps the interpreter lock: threads that hand it over for each would take longer than all the copies."""

Copy = tuple[memoryview, memoryview]
"""Where bytes go, and as many bytes."""


def fill(packs: Path, tensors: Sequence[torch.Tensor], items: Sequence[Wanted], *, check: bool) -> None:
    """Copy stored tensors into live ones.

    Args:
        tensors: the live ones, by the callers' keys.
        check: check the digests before the first one is changed.

    Raises:
        Corrupt: as `steady`.
    """
    mapped = Mapped(packs)
    mapped.decode(items)
    mapped.open(items)
    filled = [item for item in items if item.size]
    memory = _memory(tensors, filled)
    # To read is faster than to copy what has not been verified, and so is not in memory yet.
    straight = [
        item
        for item in filled
        if not check and item.slot in memory and not item.is_coded and item.held is None
    ]
    read = {item.slot for item in straight}
    copied = [item for item in filled if item.slot not in read]
    with steady(packs, items, mapped) if check else contextlib.nullcontext():
        # What autograd has kept for its backward pass is not what it was any more, as after `copy_`.
        increment_version([tensors[slot] for slot in memory])
        for item in copied:
            if item.slot not in memory:
                _copy_one(tensors[item.slot], view(mapped.bytes(item), item.info, 0))
        plain = [item for item in copied if item.slot in memory]
        copies = ((memory[item.slot], mapped.bytes(item)) for item in plain)
        in_order(_parts(copies), _copy, size=sum(item.size for item in plain))
    read_into(packs, straight, lambda item: memory[item.slot])


def copy_all(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """Copy tensors into live ones, without gradients. What lies in the memory of a live one is read before that changes.

    Those of one type in memory that no other live one shares are copied as bytes, on all cores.

    Args:
        targets: none of which `tree.unfillable` refuses.
    """
    filled, read = _storages(targets), _storages(sources)
    inside = _touching(read, filled.values())
    sources = [source.clone() if place in inside else source for place, source in enumerate(sources)]
    # torch copies few bytes in this thread anyway.
    many = {place for place in filled if targets[place].is_cpu and targets[place].nbytes >= _FEW}
    many -= _sharing(filled)
    plain = [place for place in sorted(many) if _are_bytes_alike(targets[place], sources[place])]
    with torch.no_grad():
        increment_version([targets[place] for place in plain])
        later = set(plain)
        for place, (target, source) in enumerate(zip(targets, sources, strict=True)):
            if place not in later:
                _copy_one(target, source)
    copies = ((_bytes_of(targets[place]), _bytes_of(sources[place])) for place in plain)
    in_order(_parts(copies), _copy, size=sum(targets[place].nbytes for place in plain))


def _copy_one(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy a tensor as torch does."""
    # torch refuses to change one that was made in inference mode outside of it, after it has changed it.
    with torch.inference_mode() if target.is_inference() else contextlib.nullcontext():
        target.copy_(source)


def _storages(tensors: Sequence[torch.Tensor]) -> dict[int, torch.UntypedStorage]:
    """The memory of tensors, by their places. Other classes of tensors may have their own way, and no memory."""
    return {
        place: tensor.untyped_storage()
        for place, tensor in enumerate(tensors)
        if type(tensor) in CLASSES and tensor.layout is torch.strided
    }


def _touching(
    storages: Mapping[int, torch.UntypedStorage], others: Iterable[torch.UntypedStorage]
) -> set[int]:
    """The keys of storages that overlap one of the others."""
    spans: list[tuple[int, int]] = []
    for start, end in sorted((one.data_ptr(), one.data_ptr() + one.nbytes()) for one in others):
        if spans and start < spans[-1][1]:
            spans[-1] = spans[-1][0], max(end, spans[-1][1])
        else:
            spans.append((start, end))
    found = set()
    for key, one in storages.items():
        end = one.data_ptr() + one.nbytes()
        # The last span that begins before its end is the only one that can reach into it.
        place = bisect.bisect_left(spans, (end, 0)) - 1
        if place >= 0 and one.nbytes() and spans[place][1] > one.data_ptr():
            found.add(key)
    return found


def _are_bytes_alike(target: torch.Tensor, source: torch.Tensor) -> bool:
    """Whether to copy bytes is all that `copy_` would do."""
    return (
        target.dtype == source.dtype
        and target.shape == source.shape
        and target.layout is source.layout is torch.strided
        and not target.is_inference()
        and is_plain(target)
        and is_plain(source)
    )


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a plain tensor that is not empty."""
    return memory_of(tensor.detach(), str(tensor.dtype).removeprefix("torch."))


def _memory(tensors: Sequence[torch.Tensor], items: Sequence[Wanted]) -> dict[int, memoryview]:
    """The memory of live tensors that takes bytes as they are stored, by the callers' keys.

    Those that share memory are left out: of them the last one counts, and memory is not filled in their order.
    """
    shared = _sharing({item.slot: tensors[item.slot].untyped_storage() for item in items})
    return {
        item.slot: memory_of(tensors[item.slot], item.info.dtype)
        for item in items
        if item.slot not in shared and is_plain(tensors[item.slot])
    }


def _sharing(storages: Mapping[int, torch.UntypedStorage]) -> set[int]:
    """The keys of storages that overlap others."""
    found: set[int] = set()
    longest, end = -1, 0
    for start, size, key in sorted((one.data_ptr(), one.nbytes(), key) for key, one in storages.items()):
        if start < end:
            found |= {longest, key}
        if start + size >= end:
            longest, end = key, start + size
    return found


def _parts(copies: Iterable[Copy]) -> Iterator[list[Copy]]:
    """Copies in lists of about `_PART` bytes."""
    pieces = (
        (target[start : start + _PART], source[start : start + _PART])
        for target, source in copies
        for start in range(0, len(target), _PART)
    )
    return portions(pieces, lambda piece: len(piece[0]), _PART)


def _copy(part: Iterable[Copy]) -> None:
    """Copy bytes. torch would have all its threads wait for one another at every tensor, long where cores are busy."""
    for target, source in part:
        if len(target) < _FEW:
            target[:] = source
        else:
            np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))
