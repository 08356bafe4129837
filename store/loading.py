"""Getting tensors out of packs: mapped, or into buffers of their own.

Every way verifies digests in parallel threads unless told not to.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

from registry.store import direct
from registry.store.differences import Decoding, decoding
from registry.store.digest import tensor_digest, tensor_hasher
from registry.store.dtypes import ELEMENT_TYPES
from registry.store.errors import Corrupt, StorageError
from registry.store.locating import Location, Wanted
from registry.store.manifest import TensorInfo
from registry.store.pack import INNER, map_file, pack_path
from registry.store.page_cache import ReadAhead, place_of, read_ahead
from registry.store.parallel import SMALL, in_order, in_parallel
from registry.store.places import FileState, OpenFiles, is_local, state_of
from registry.store.tree import memory_of, torch_type

_ARENA = 64 << 20
"""Bytes of memory that tensors share; see `owned`."""

_READ = 8 << 20
"""Bytes of one read at most."""

_GAP = 4 << 10
"""Bytes between two tensors that are read too, so that one call reads both."""

_MAX_BUFFERS = 1_000
"""Buffers of one read; the system takes 1,024."""

_BATCH = 32 << 20
"""Bytes of small coded tensors that are turned back at a time, before they are copied to where they stay."""

_PART = 1 << 17
"""Elements that a thread turns back at a time, at least, however small the chunks are."""

_REMAP = 1 << 20
"""Bytes from which on a tensor has memory of its own: a second use of the same stored one is mapped again, not copied."""


class Mapped:
    """Tensors that view packs mapped copy-on-write; they may be trained in place and never change the store."""

    def __init__(self, packs: Path) -> None:
        self._packs = packs
        self._maps: dict[tuple[str, int], mmap.mmap] = {}
        self._uses: dict[tuple[str, int], int] = {}
        self._states: dict[str, FileState | None] = {}
        self._decoded: dict[str, mmap.mmap] = {}

    def decode(self, items: Iterable[Wanted]) -> None:
        """Turn coded tensors back. That must be done before these are asked for.

        What they rest on takes no memory of its own, unless it is among the items.

        Raises:
            Corrupt: naming the tensor and the pack, if that is not possible.
        """
        coded = {item.info.digest: item for item in items if item.is_coded and item.size}
        rest = {digest: item for digest, item in coded.items() if digest not in self._decoded}
        if not rest:
            return
        with self.reading_ahead(link for item in rest.values() for link in item.chain):
            while rest:
                first = {
                    digest: item
                    for digest, item in rest.items()
                    if not any(link.info.digest in rest for link in item.chain[1:])
                }
                self._decode(first.values())
                rest = {digest: item for digest, item in rest.items() if digest not in first}

    def reading_ahead(self, items: Iterable[Wanted]) -> contextlib.AbstractContextManager[ReadAhead | None]:
        """Have the system read the stored bytes of some tensors while the body uses them; see `page_cache.read_ahead`."""
        distinct = {place_of(item): item for item in items if item.held is None}
        return read_ahead(self._packs, distinct.values(), lambda location: self._map(location, 0))

    def forget(self, item: Wanted) -> None:
        """Free the memory of a coded tensor that was turned back, once nobody uses it any more."""
        self._decoded.pop(item.info.digest, None)

    def _decode(self, items: Collection[Wanted]) -> None:
        """Turn coded tensors back that do not rest on one another."""
        decoded = {item.info.digest: _anonymous(item.size) for item in items}
        jobs: list[tuple[Sequence[tuple[Wanted, Decoding]], int, int]] = []
        sizes = []
        for item in items:
            levels = self._levels(item, memoryview(decoded[item.info.digest])[: item.size])
            # Part by part through all levels; a part has whole chunks of each, which may be coded with several sizes.
            elements = item.size // ELEMENT_TYPES[item.info.dtype].size
            step = math.lcm(*(level.chunk for _, level in levels))
            step *= max(1, _PART // step)
            parts = [(start, min(start + step, elements)) for start in range(0, elements, step)]
            jobs += [(levels, *part) for part in parts]
            sizes += [item.size // len(parts)] * len(parts)
        in_parallel(jobs, self._decode_part, sizes)
        self._decoded |= decoded

    def _levels(self, item: Wanted, out: memoryview) -> list[tuple[Wanted, Decoding]]:
        """What turns a coded tensor back, from the one that rests on a whole tensor or none up to the item, all in one memory.

        Args:
            out: zeros. One that is coded by itself is a difference from them.
        """
        links = [item]
        while (base := links[-1].base) and base.is_coded and base.info.digest not in self._decoded:
            links.append(base)
        levels: list[tuple[Wanted, Decoding]] = []
        for link in reversed(links):
            old = out if levels or base is None else self.bytes(base)
            size = ELEMENT_TYPES[link.info.dtype].size
            try:
                levels.append((link, decoding(self.stored(link), old, item_size=size, out=out)))
            except Corrupt as error:
                raise damaged(self._packs, link) from error
        return levels

    def _decode_part(self, job: tuple[Sequence[tuple[Wanted, Decoding]], int, int]) -> None:
        levels, start, end = job
        for item, level in levels:
            try:
                for i in range(start // level.chunk, -(-end // level.chunk)):
                    level.work(i)
            except Corrupt as error:
                raise damaged(self._packs, item) from error

    def open(self, items: Iterable[Wanted]) -> None:
        """Map the packs of some tensors.

        Raises:
            Corrupt: if one is missing or has another size than the catalog says.
        """
        chosen = [item for item in items if item.size and item.held is None]
        for location in {item.location.pack: item.location for item in chosen}.values():
            self._map(location, 0)

    def tensor(self, wanted: Wanted) -> torch.Tensor:
        """The tensor; each call gives memory of its own, also when two names hold equal tensors."""
        location = wanted.location
        if wanted.size == 0:
            return view(memoryview(b""), wanted.info, 0)
        place = (location.pack, location.start)
        use = self._uses.get(place, 0)
        self._uses[place] = use + 1
        if use and wanted.size < _REMAP:
            return self._view(wanted, 0).clone()
        return self._view(wanted, use)

    def stored(self, wanted: Wanted) -> memoryview:
        """The bytes of a tensor as they are in the pack."""
        if wanted.held is not None:
            return wanted.held
        place = wanted.location
        return memoryview(self._map(place, 0))[place.start : place.start + wanted.stored_size]

    def bytes(self, wanted: Wanted) -> memoryview:
        """The bytes of a tensor, to be read only."""
        if wanted.size == 0:
            # Its pack need not be here.
            return memoryview(b"")
        if wanted.is_coded:
            return memoryview(self._decoded[wanted.info.digest])[: wanted.size]
        return self.stored(wanted)

    def is_unchanged(self) -> bool:
        """Whether the system says that no mapped file has changed since before it was mapped."""
        return is_local(self._packs) and all(
            state is not None
            and state.is_settled
            and state_of(pack_path(self._packs, pack), inner=INNER) == state
            for pack, state in self._states.items()
        )

    def _view(self, wanted: Wanted, use: int) -> torch.Tensor:
        if wanted.is_coded:
            tensor = view(self._decoded[wanted.info.digest], wanted.info, 0)
            return tensor.clone() if use else tensor
        if wanted.held is not None:
            tensor = view(wanted.held, wanted.info, 0)
            return tensor.clone() if use else tensor
        return view(self._map(wanted.location, use), wanted.info, wanted.location.start)

    def _map(self, location: Location, use: int) -> mmap.mmap:
        mapping = self._maps.get((location.pack, use))
        if mapping is None:
            path = pack_path(self._packs, location.pack)
            if location.pack not in self._states:
                self._states[location.pack] = state_of(path, inner=INNER)
            mapping = map_file(path, location.pack_size, inner=INNER)
            self._maps[location.pack, use] = mapping
        return mapping


class Read(Mapped):
    """Reads stored bytes instead of mapping them, as a file that shrinks meanwhile would end the process otherwise."""

    def stored(self, wanted: Wanted) -> memoryview:
        """The bytes of a tensor as they are in the pack, in memory of their own."""
        if wanted.held is not None:
            return wanted.held
        size = wanted.stored_size
        data = memoryview(bytearray(size))
        with OpenFiles() as files:
            job = _ReadJob(item=wanted, start=wanted.location.start, size=size, buffers=[data])
            _read(self._packs, files, job)
        return data

    def reading_ahead(self, items: Iterable[Wanted]) -> contextlib.AbstractContextManager[ReadAhead | None]:
        """Nothing is read ahead, as nothing is mapped."""
        return contextlib.nullcontext()


def view(buffer: mmap.mmap | memoryview, info: TensorInfo, offset: int) -> torch.Tensor:
    """A tensor over a part of a writable buffer, without copying."""
    dtype, shape = torch_type(info.dtype), info.shape
    count = math.prod(shape)
    if count == 0:
        return torch.empty(shape, dtype=dtype, device="cpu")
    flat = torch.frombuffer(buffer, dtype=dtype, count=count, offset=offset)
    return flat if len(shape) == 1 else flat.view(shape)


def verify(packs: Path, items: Sequence[Wanted], mapped: Mapped, stop: threading.Event | None = None) -> None:
    """Check the digests of mapped tensors, each stored tensor once.

    Args:
        stop: ends it early, with some tensors left unchecked.

    Raises:
        Corrupt: naming the tensor and the pack.
    """
    mapped.decode(items)
    distinct = list({item.info.digest: item for item in items if item.size}.values())
    sizes = [item.size for item in distinct]
    with mapped.reading_ahead(item for item in distinct if not item.is_coded) as ahead:
        if ahead is None:
            in_parallel(distinct, lambda item: _check(packs, item, mapped.bytes(item)), sizes, stop=stop)
            return
        distinct.sort(key=place_of)
        in_order(
            iter(distinct),
            lambda item: _check_behind(packs, item, data=mapped.bytes(item), ahead=ahead),
            size=sum(sizes),
            stop=stop,
        )


@contextlib.contextmanager
def steady(packs: Path, items: Sequence[Wanted], mapped: Mapped) -> Iterator[None]:
    """Verify mapped tensors that the body copies elsewhere, and check behind it that it copied what was verified.

    Every byte of a file is read twice, and it may change in between. Unless the system vouches that none has, the tensors are
    verified once more, through another mapping, as users may write to theirs.

    Raises:
        Corrupt: as `verify`. Behind the body it says that what was filled may be wrong.
    """
    in_files = [item for item in items if not item.is_in_memory]
    again = Mapped(packs)
    again.open(in_files)
    verify(packs, items, mapped)
    yield
    if mapped.is_unchanged():
        return
    try:
        verify(packs, in_files, again)
    except Corrupt as error:
        changed = Corrupt(
            f"{error.message}; it changed while it was copied, so what was filled may be wrong",
            "load it again",
            *error.fixes,
        )
        changed.pack = error.pack
        raise changed from None


@contextlib.contextmanager
def verifying(packs: Path, items: Sequence[Wanted], mapped: Mapped) -> Iterator[None]:
    """As `verify`, while the body runs. Errors are raised behind it."""
    if sum(item.size for item in items) < SMALL:
        yield
        verify(packs, items, mapped)
        return
    stop = threading.Event()
    with ThreadPoolExecutor(1, "registry-verify") as pool:
        verification = pool.submit(verify, packs, items, mapped, stop)
        try:
            yield
            verification.result()
        except BaseException:
            # The body may have been interrupted, as by Ctrl-C.
            stop.set()
            raise


def _check(packs: Path, item: Wanted, data: memoryview) -> None:
    if tensor_digest(item.info.dtype, item.info.shape, data, threads=1) != item.info.digest:
        raise damaged(packs, item)


def _check_behind(packs: Path, item: Wanted, data: memoryview, ahead: ReadAhead) -> None:
    """As `_check`, of a tensor that the system may be reading meanwhile."""
    hasher = tensor_hasher(item.info.dtype, item.info.shape, 1)
    for done in range(0, len(data), _READ):
        part = data[done : done + _READ]
        if not item.is_coded:
            ahead.wait_for(item, done + len(part))
        hasher.update(part)
    if hasher.hexdigest() != item.info.digest:
        raise damaged(packs, item)


def damaged(packs: Path, item: Wanted) -> Corrupt:
    """The error for a tensor whose bytes are not what was saved."""
    end = item.location.start + item.stored_size
    error = Corrupt(
        f"{item.name}: the bytes {item.location.start} to {end} of pack "
        f"{pack_path(packs, item.location.pack).name} are not what was saved",
        "put them back with: registry repair --from A-COPY, or load another version",
    )
    error.pack = item.location.pack
    return error


class _ReadJob(NamedTuple):
    """One system call: tensors that lie one after the other in a pack, from `item` on, and the gaps between."""

    item: Wanted
    start: int
    size: int
    buffers: list[memoryview]


def read_into(packs: Path, items: Iterable[Wanted], memory: Callable[[Wanted], memoryview]) -> None:
    """Fill memory with stored bytes, straight from the files.

    Neighbours in a pack are read together, as thousands of small reads cost more than their bytes. All packs are opened before
    the first byte is read.

    Args:
        items: tensors with at least one byte.
        memory: where the bytes of an item go.

    Raises:
        Corrupt: if a pack is missing or has another size than the catalog says.
    """
    first: dict[tuple[str, int], Wanted] = {}
    repeated = []
    for item in items:
        if item.held is not None:
            memory(item)[:] = item.held
            continue
        place = (item.location.pack, item.location.start)
        if first.setdefault(place, item) is not item:
            repeated.append((item, first[place]))
    ordered = [first[place] for place in sorted(first)]
    with OpenFiles() as files:
        for location in {item.location.pack: item.location for item in ordered}.values():
            files.open(pack_path(packs, location.pack), location.pack_size, inner=INNER)
        reads, size = _reads(ordered, memory), sum(item.size for item in ordered)
        in_order(reads, lambda one: _read(packs, files, one), size)
    for item, source in repeated:
        memory(item)[:] = memory(source)


def _reads(items: Iterable[Wanted], memory: Callable[[Wanted], memoryview]) -> Iterator[_ReadJob]:
    """Group distinct tensors, in the order of their places, into system calls."""
    between = memoryview(bytearray(_GAP))
    run: _ReadJob | None = None
    size = 0
    for item in items:
        location, buffer = item.location, memory(item)
        for done in range(0, item.size, _READ):
            start = location.start + done
            part = buffer[done : done + _READ] if item.size > _READ else buffer
            gap = start - run.start - size if run else -1
            if (
                run is None
                or run.item.location.pack != location.pack
                or not 0 <= gap <= _GAP
                or size + len(part) > _READ
                or len(run.buffers) > _MAX_BUFFERS
            ):
                if run:
                    yield run._replace(size=size)
                run, size, gap = _ReadJob(item=item, start=start, size=0, buffers=[]), 0, 0
            if gap:
                run.buffers.append(between[:gap])
            run.buffers.append(part)
            size = start + len(part) - run.start
    if run:
        yield run._replace(size=size)


def _read(packs: Path, files: OpenFiles, job: _ReadJob) -> None:
    location = job.item.location
    path, end = pack_path(packs, location.pack), job.start + job.size
    is_read = files.read(path, location.pack_size, start=job.start, end=end, buffers=job.buffers, inner=INNER)
    if not is_read:
        raise damaged(packs, job.item)


def owned(packs: Path, items: Sequence[Wanted], *, check: bool) -> dict[int, torch.Tensor]:
    """Tensors in fresh memory of their own, ready to be trained in place at full speed.

    Memory comes in arenas of about 64 MB on huge pages where the system has them, since faulting in small
    pages costs more than reading; an arena is freed when its last tensor is. Tensors that are not in the page cache are verified
    while they are read; see `registry.store.direct`.
    """
    buffers: dict[int, memoryview] = {}
    tensors: dict[int, torch.Tensor] = {}

    def place(arenas: Iterable[tuple[mmap.mmap, list[tuple[Wanted, int]]]]) -> None:
        for arena, placed in arenas:
            for item, offset in placed:
                buffers[item.slot] = memoryview(arena)[offset : offset + item.size]
                tensors[item.slot] = view(arena, item.info, offset)

    place(direct.read_verified(packs, items, _anonymous, lambda item: damaged(packs, item)) if check else [])
    verified = {item.info.digest: item for item in items if item.slot in buffers}
    repeated = [item for item in items if item.slot not in buffers and item.info.digest in verified]
    rest = [item for item in items if item.info.digest not in verified]
    # A large coded one keeps the memory that it is turned back in.
    large = [item for item in rest if item.is_coded and item.size >= _REMAP]
    small = [item for item in rest if item.is_coded and item.size < _REMAP]
    plain = [item for item in rest if not item.is_coded]
    place(_arenas([*repeated, *small, *plain]))
    read_into(packs, [item for item in plain if item.size], lambda item: buffers[item.slot])
    for item in repeated:
        buffers[item.slot][:] = buffers[verified[item.info.digest].slot]
    mapped = Mapped(packs)
    mapped.decode(large)
    for item in large:
        tensors[item.slot] = mapped.tensor(item)
        buffers[item.slot] = memory_of(tensors[item.slot], item.info.dtype)
    for batch in _batches(small):
        mapped.decode(batch)
        for item in batch:
            buffers[item.slot][:] = mapped.bytes(item)
        for item in batch:
            mapped.forget(item)
    if check:
        sizes = [item.size for item in rest]
        in_parallel(rest, lambda item: _check(packs, item, buffers[item.slot]), sizes)
    return tensors


def _batches(items: Iterable[Wanted]) -> Iterator[list[Wanted]]:
    """Tensors in lists of about `_BATCH` bytes."""
    batch: list[Wanted] = []
    size = 0
    for item in items:
        batch.append(item)
        size += item.size
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _arenas(items: Sequence[Wanted]) -> list[tuple[mmap.mmap, list[tuple[Wanted, int]]]]:
    arenas: list[tuple[mmap.mmap, list[tuple[Wanted, int]]]] = []
    placed: list[tuple[Wanted, int]] = []
    size = 0
    for item in items:
        if placed and size + item.size > _ARENA:
            arenas.append((_anonymous(size), placed))
            placed, size = [], 0
        placed.append((item, size))
        size += -(-item.size // 64) * 64
    if placed:
        arenas.append((_anonymous(size), placed))
    return arenas


def _anonymous(size: int) -> mmap.mmap:
    """Fresh memory, on huge pages where the system has them."""
    try:
        mapping = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError, MemoryError):
        raise StorageError(f"there is no memory for {size:,} bytes", "free some and repeat") from None
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # A kernel may be built without huge pages.
        with contextlib.suppress(OSError):
            mapping.madvise(mmap.MADV_HUGEPAGE)
    return mapping


def load(packs: Path, items: Sequence[Wanted], *, copy: bool, check: bool) -> dict[int, torch.Tensor]:
    """Tensors by the callers' keys, mapped or in memory of their own.

    Args:
        copy: read them into fresh memory; else they are mapped copy-on-write.
        check: check their digests.

    Raises:
        Corrupt: naming the tensor and the pack, if a byte is not what was saved.
    """
    if copy:
        return owned(packs, items, check=check)
    mapped = Mapped(packs)
    mapped.decode(items)
    with verifying(packs, items, mapped) if check else contextlib.nullcontext():
        return {item.slot: mapped.tensor(item) for item in items}


def lent(
    packs: Path, items: Sequence[Wanted], checks: contextlib.ExitStack | None
) -> dict[int, torch.Tensor]:
    """Mapped tensors by the callers' keys, to be copied elsewhere.

    Args:
        checks: to be closed behind the copying; it then checks that what was copied is what was verified. None to check
            nothing.

    Raises:
        Corrupt: as `steady`.
    """
    mapped = Mapped(packs)
    mapped.decode(items)
    if checks is not None:
        checks.enter_context(steady(packs, items, mapped))
    return {item.slot: mapped.tensor(item) for item in items}
