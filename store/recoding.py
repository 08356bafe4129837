"""Copying stored tensors into a new pack, as they are or as differences from others."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from registry.store import differences, header, loading
from registry.store.digest import tensor_digest
from registry.store.dtypes import ELEMENT_TYPES
from registry.store.locating import Locator, Wanted
from registry.store.pack import Changed, PackInfo, PackWriter, difference_bound, index_bound
from registry.store.parallel import SMALL, in_parallel

SMALLEST = 4 << 10
"""Bytes of a tensor from which on a difference is tried."""

DEEPEST = 4
"""How many differences rest on one another, at most, where a new one is made."""

_WORTH_IT = 0.9
"""Part of a tensor's bytes that its difference may take at most."""

_TOGETHER = 16 << 20
"""Bytes of tensors that are worked on at a time, with those that they may become differences from."""

_LEVEL_WORTH_IT = 0.03
"""Part of a tensor's bytes that resting on one more difference must save, as each slows a load."""


def copy_to_new_pack(
    locator: Locator,
    digests: Collection[str],
    bases: Mapping[str, Sequence[str]],
    *,
    whole: Collection[str] = (),
    source: Path,
    packs: Path,
    tmp: Path,
) -> PackInfo:
    """Copy stored tensors to a pack of their own, verified, so that the packs they are in can go.

    Args:
        locator: finds the tensors.
        digests: which to copy.
        bases: by digest, stored tensors of the same dtype and shape, the one that is likely to be the nearest first. The
            copy is stored as the difference from one of them where that saves a tenth. One that is a difference itself
            must save more, by `_LEVEL_WORTH_IT`, than one that is not.
        whole: which of those that are stored as differences are turned back, and copied whole.
        source: the folder of the packs that have them.
        packs: the folder of the new one.
        tmp: the folder where the new one lies until it is complete.

    Raises:
        Corrupt: if a byte is not what was saved.
    """
    wanted = locator.by_digest(digests)
    # What rests on nothing that is there is no base.
    stored_bases = locator.by_digest({base for several in bases.values() for base in several}, broken={})
    mapped = loading.Mapped(source)
    sound: set[str] = set()
    differing = _differing(wanted, {item.info.digest: item for item in stored_bases}, bases)
    types = [(item.info.dtype, item.info.shape) for item in wanted]
    coded_types = [
        type_ for item, type_ in zip(wanted, types, strict=True) if item.base or item.info.digest in differing
    ]
    writer = PackWriter(tmp, types, coded=coded_types)
    try:
        for batch in _batches(wanted, differing):
            rest = []
            for item in batch:
                if item.base and item.info.digest not in whole:
                    _copy_difference(source, item, mapped=mapped, writer=writer)
                else:
                    rest.append(item)
            candidates = {
                base.info.digest: base for item in rest for base in differing.get(item.info.digest, ())
            }
            mapped.decode([*rest, *candidates.values()])
            unsure = [base for name, base in candidates.items() if name not in sound]
            loading.verify(source, [*rest, *unsure], mapped)
            sound |= candidates.keys()
            coded = _differences([item for item in rest if item.info.digest in differing], differing, mapped)
            for item in rest:
                info = item.info
                if found := coded.get(info.digest):
                    base, data = found
                    writer.add_difference(
                        info.digest, info.dtype, info.shape, base=base, coded=memoryview(data)
                    )
                else:
                    writer.add(info.digest, info.dtype, info.shape, data=mapped.bytes(item), is_sure=False)
            for item in (*rest, *candidates.values()):
                mapped.forget(item)
        return writer.finish(packs)
    except Changed as error:
        # The pack that it was copied from has changed since it was checked.
        writer.discard()
        changed = next(one for one in wanted if one.info.digest in error.digests)
        raise loading.damaged(source, changed) from None
    except BaseException:
        writer.discard()
        raise


def _differing(
    wanted: Sequence[Wanted], stored_bases: Mapping[str, Wanted], bases: Mapping[str, Sequence[str]]
) -> dict[str, list[Wanted]]:
    """The tensors to try as differences, and their bases: the largest, as long as a pack's index has room."""
    found = {}
    types = [(item.info.dtype, item.info.shape) for item in wanted]
    room = header.MAX_HEADER - (64 << 10) - index_bound(types)
    room -= sum(difference_bound(item.info.dtype, item.info.shape) for item in wanted if item.base)
    for item in sorted(wanted, key=lambda item: -item.size):
        candidates = [stored_bases[base] for base in bases.get(item.info.digest, ()) if base in stored_bases]
        candidates = [base for base in candidates if _can_differ(item, base)]
        if item.base or not candidates:
            continue
        room -= difference_bound(item.info.dtype, item.info.shape)
        if room < 0:
            break
        found[item.info.digest] = candidates
    return found


def _batches(wanted: Sequence[Wanted], differing: Mapping[str, Sequence[Wanted]]) -> Iterator[list[Wanted]]:
    """Tensors that are worked on at a time, so that all cores have work, and little memory is taken."""
    batch: list[Wanted] = []
    size = 0
    for item in wanted:
        taken = item.size + sum(base.size for base in differing.get(item.info.digest, ()))
        if batch and size + taken > _TOGETHER:
            yield batch
            batch, size = [], 0
        batch.append(item)
        size += taken
    if batch:
        yield batch


def _differences(
    items: Sequence[Wanted], differing: Mapping[str, Sequence[Wanted]], mapped: loading.Mapped
) -> dict[str, tuple[str, bytes]]:
    """By digest, what each tensor is stored as a difference from, and the difference, where it saves enough."""
    found: dict[str, tuple[str, bytes]] = {}

    def work(item: Wanted) -> None:
        data = mapped.bytes(item)
        base = _nearest(item, data, [(one, mapped.bytes(one)) for one in differing[item.info.digest]])
        if coded := _difference(item, data, mapped.bytes(base)):
            found[item.info.digest] = base.info.digest, coded

    in_parallel(items, work, [item.size for item in items])
    return found


def _nearest(item: Wanted, data: memoryview, bases: Sequence[tuple[Wanted, memoryview]]) -> Wanted:
    """The base with which a difference costs least, by some runs of the tensor, and by what it slows a load."""
    if len(bases) == 1:
        return bases[0][0]
    new = differences.sampled(data)

    def cost(base: tuple[Wanted, memoryview]) -> float:
        coded = _encode(item.info.dtype, new, differences.sampled(base[1]))
        return len(coded) / len(new) + _LEVEL_WORTH_IT * len(base[0].chain)

    return min(bases, key=cost)[0]


def _copy_difference(packs: Path, item: Wanted, mapped: loading.Mapped, writer: PackWriter) -> None:
    """Copy a difference as it is, after a check that it gives what was saved."""
    loading.verify(packs, [item], loading.Mapped(packs))
    info, place = item.info, item.location
    assert place.base is not None
    coded = mapped.stored(item)
    writer.add_difference(info.digest, info.dtype, info.shape, base=place.base, coded=coded)


def _can_differ(item: Wanted, base: Wanted) -> bool:
    info = item.info
    size = ELEMENT_TYPES[info.dtype].size
    alike = (info.dtype, info.shape) == (base.info.dtype, base.info.shape)
    if not alike or size not in differences.ITEM_SIZES or item.size < SMALLEST:
        return False
    return len(base.chain) <= DEEPEST and all(link.info.digest != info.digest for link in base.chain)


def _difference(item: Wanted, data: memoryview, base: memoryview) -> bytes | None:
    """The difference of a tensor from its base; None if that saves too little, or does not give the tensor back."""
    coded = _encode(item.info.dtype, data, base)
    if len(coded) > _WORTH_IT * len(data):
        return None
    back = bytearray(len(data))
    size = ELEMENT_TYPES[item.info.dtype].size
    decoding = differences.decoding(memoryview(coded), base, item_size=size, out=memoryview(back))
    _run(range(decoding.chunks), decoding.work)
    is_right = tensor_digest(item.info.dtype, item.info.shape, memoryview(back)) == item.info.digest
    return coded if is_right else None


def _encode(dtype: str, data: memoryview, base: memoryview) -> bytes:
    kind = ELEMENT_TYPES[dtype]
    return differences.encode(data, base, item_size=kind.size, run=_run, is_float=kind.is_float)


def _run(jobs: Sequence[Any], work: Callable[[Any], None]) -> None:
    # Two chunks are enough to start a thread for.
    in_parallel(jobs, work, [SMALL // 2] * len(jobs))
