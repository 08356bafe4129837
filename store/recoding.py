"""Copying stored tensors into a new pack: as they are, as differences from others, or coded by themselves."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from registry.store import differences, header, loading
from registry.store.digest import tensor_digest
from registry.store.dtypes import ELEMENT_TYPES
from registry.store.locating import Locator, Wanted
from registry.store.manifest import TensorInfo
from registry.store.pack import Changed, PackInfo, PackWriter, coded_bound, index_bound
from registry.store.parallel import SMALL, in_parallel

SMALLEST = 4 << 10
"""Bytes of a tensor from which on coding is tried."""

WORTH_IT = 0.9
"""Part of a tensor's bytes that it may take at most when it is coded."""

_TOGETHER = 16 << 20
"""Bytes of tensors that are worked on at a time, with those that they may become differences from."""


def copy_to_new_pack(
    locator: Locator,
    digests: Collection[str],
    bases: Mapping[str, Sequence[str]],
    *,
    alone: Collection[str] = (),
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
            must save more, by `differences.LEVEL_WORTH_IT`, than one that is not.
        alone: which are coded by themselves where that saves a tenth, and a difference does not.
        whole: which of those that are stored coded are turned back, and copied whole.
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
    trying = _to_code(wanted, {item.info.digest: item for item in stored_bases}, bases=bases, alone=alone)
    types = [(item.info.dtype, item.info.shape) for item in wanted]
    coded_types = [
        type_
        for item, type_ in zip(wanted, types, strict=True)
        if item.is_coded or item.info.digest in trying
    ]
    writer = PackWriter(tmp, types, coded=coded_types)
    try:
        for batch in _batches(wanted, trying):
            rest = []
            for item in batch:
                if item.is_coded and item.info.digest not in whole and item.info.digest not in trying:
                    _copy_coded(source, item, mapped=mapped, writer=writer)
                else:
                    rest.append(item)
            candidates = {
                base.info.digest: base for item in rest for base in trying.get(item.info.digest, ())
            }
            mapped.decode([*rest, *candidates.values()])
            unsure = [base for name, base in candidates.items() if name not in sound]
            loading.verify(source, [*rest, *unsure], mapped)
            sound |= candidates.keys()
            # One that is coded by itself stays so if a difference saves nothing.
            by_itself = {*alone, *(item.info.digest for item in rest if item.is_coded)}
            coded = _coded([item for item in rest if item.info.digest in trying], trying, by_itself, mapped)
            for item in rest:
                info = item.info
                if found := coded.get(info.digest):
                    base, data = found
                    writer.add_coded(info.digest, info.dtype, info.shape, base=base, coded=memoryview(data))
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


def _to_code(
    wanted: Sequence[Wanted],
    stored_bases: Mapping[str, Wanted],
    *,
    bases: Mapping[str, Sequence[str]],
    alone: Collection[str],
) -> dict[str, list[Wanted]]:
    """The tensors to try to code, and their bases, if any: the largest, as long as a pack's index has room."""
    found = {}
    types = [(item.info.dtype, item.info.shape) for item in wanted]
    room = header.MAX_HEADER - (64 << 10) - index_bound(types)
    room -= sum(coded_bound(item.info.dtype, item.info.shape) for item in wanted if item.is_coded)
    for item in sorted(wanted, key=lambda item: -item.size):
        candidates = [stored_bases[base] for base in bases.get(item.info.digest, ()) if base in stored_bases]
        candidates = [base for base in candidates if _can_differ(item, base)]
        is_new = not item.is_coded and item.info.digest in alone and is_worth_trying(item.info)
        if item.base or not (candidates or is_new):
            continue
        room -= coded_bound(item.info.dtype, item.info.shape)
        if room < 0:
            break
        found[item.info.digest] = candidates
    return found


def is_worth_trying(info: TensorInfo) -> bool:
    """Whether a tensor may become smaller when it is coded: real floats of more than a byte, and not few of them."""
    kind = ELEMENT_TYPES[info.dtype]
    return kind.is_float and kind.size in differences.ITEM_SIZES and info.size >= SMALLEST


def _batches(wanted: Sequence[Wanted], trying: Mapping[str, Sequence[Wanted]]) -> Iterator[list[Wanted]]:
    """Tensors that are worked on at a time, so that all cores have work, and little memory is taken."""
    batch: list[Wanted] = []
    size = 0
    for item in wanted:
        taken = item.size + sum(base.size for base in trying.get(item.info.digest, ()))
        if batch and size + taken > _TOGETHER:
            yield batch
            batch, size = [], 0
        batch.append(item)
        size += taken
    if batch:
        yield batch


def _coded(
    items: Sequence[Wanted],
    trying: Mapping[str, Sequence[Wanted]],
    by_itself: Collection[str],
    mapped: loading.Mapped,
) -> dict[str, tuple[str | None, bytes]]:
    """By digest, what each tensor is stored as a difference from, if any, and its coded bytes, where that saves enough."""
    found: dict[str, tuple[str | None, bytes]] = {}

    def work(item: Wanted) -> None:
        data, digest = mapped.bytes(item), item.info.digest
        if bases := [(base, mapped.bytes(base)) for base in trying[digest]]:
            base, old = _nearest(item, data, bases)
            if coded := _smaller(item, data, old):
                found[digest] = base.info.digest, coded
                return
        if digest in by_itself and (coded := _smaller(item, data, None)):
            found[digest] = None, coded

    in_parallel(items, work, [item.size for item in items])
    return found


def _nearest(
    item: Wanted, data: memoryview, bases: Sequence[tuple[Wanted, memoryview]]
) -> tuple[Wanted, memoryview]:
    """The base with which a difference costs least, by some runs of the tensor, and by what it slows a load."""
    if len(bases) == 1:
        return bases[0]
    new = differences.sampled(data)

    def cost(base: tuple[Wanted, memoryview]) -> float:
        coded = _encode(item.info.dtype, new, differences.sampled(base[1]))
        return len(coded) / len(new) + differences.LEVEL_WORTH_IT * len(base[0].chain)

    return min(bases, key=cost)


def _copy_coded(packs: Path, item: Wanted, mapped: loading.Mapped, writer: PackWriter) -> None:
    """Copy a tensor that is stored coded as it is, after a check that this gives what was saved."""
    loading.verify(packs, [item], loading.Mapped(packs))
    info = item.info
    writer.add_coded(info.digest, info.dtype, info.shape, base=item.location.base, coded=mapped.stored(item))


def _can_differ(item: Wanted, base: Wanted) -> bool:
    info = item.info
    size = ELEMENT_TYPES[info.dtype].size
    alike = (info.dtype, info.shape) == (base.info.dtype, base.info.shape)
    if not alike or size not in differences.ITEM_SIZES or item.size < SMALLEST:
        return False
    return len(base.chain) <= differences.DEEPEST and all(
        link.info.digest != info.digest for link in base.chain
    )


def _smaller(item: Wanted, data: memoryview, base: memoryview | None) -> bytes | None:
    """A tensor coded as the difference from its base, or by itself; None if that saves too little, or does not give it back."""
    coded = _encode(item.info.dtype, data, base)
    if len(coded) > WORTH_IT * len(data):
        return None
    back = bytearray(len(data))
    size = ELEMENT_TYPES[item.info.dtype].size
    old = memoryview(back) if base is None else base
    decoding = differences.decoding(memoryview(coded), old, item_size=size, out=memoryview(back))
    _run(range(decoding.chunks), decoding.work)
    is_right = tensor_digest(item.info.dtype, item.info.shape, memoryview(back)) == item.info.digest
    return coded if is_right else None


def _encode(dtype: str, data: memoryview, base: memoryview | None) -> bytes:
    kind = ELEMENT_TYPES[dtype]
    return differences.encode(data, base, item_size=kind.size, run=_run, is_float=kind.is_float)


def _run(jobs: Sequence[Any], work: Callable[[Any], None]) -> None:
    # Two chunks are enough to start a thread for.
    in_parallel(jobs, work, [SMALL // 2] * len(jobs))
