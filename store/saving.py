"""The save pipeline: encode, snapshot, hash, look up, write.

An `Encoded` state may be copied into an `Arena` first, so that training goes on while it is saved.

Threads hash tensors ahead of the writer (the hashes release the GIL). The writer starts with the first batch that
holds a new tensor, so that a small save gets an exactly sized header and an unchanged one writes no pack at all. From then
on the threads write large tensors themselves, part by part while they are hashed, as long as all were new.
"""

from __future__ import annotations

import contextlib
import logging
import operator
import os
import random
import threading
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from registry.store import header
from registry.store.digest import ALL_CORES, preamble
from registry.store.digest import digest as digest_of
from registry.store.errors import StorageError
from registry.store.fingerprints import SMALLEST, remembered
from registry.store.manifest import TensorInfo
from registry.store.pack import Changed, PackInfo, PackWriter, index_bound
from registry.store.tree import Leaf

FIRST_BATCH = 4 << 20
"""Bytes to hash before looking up which of them are new, and writing those."""
BATCH = 16 << 20
"""The same, once the writer is at work."""

AHEAD = 32 << 20
"""Bytes that are hashed and not yet written, from which on hashing leaves a core to the writer."""

RUN = 2 << 20
"""Bytes of small tensors that a thread hashes at a time."""

COPIES_IN_FLIGHT = 32 << 20
"""Bytes of host copies (of device tensors and views that are not contiguous) that may wait for the writer."""

ALONE = 64 << 10
"""Bytes from which on a tensor is written alone."""

MANY = 1 << 16
"""Tensors from which on all are hashed before the first is written, unless they are likely to be new: the header has room for each
that may be.
"""

_TRIED = 64
"""Tensors of so many that are hashed to see whether they are new."""

_logger = logging.getLogger(__name__)

_ALIGNMENT = 64
_LARGE = 32 << 20
"""Bytes from which on all cores hash a tensor at once, so that it is not left over at the end."""

_THREADS = min(os.cpu_count() or 1, 4)


class Mark(Protocol):
    """A mark in the work of a device, such as a `torch.cuda.Event`."""

    def synchronize(self) -> None:
        """Wait until the device has done what stands before the mark."""
        ...


class Copying:
    """Copies that devices have still to make.

    Args:
        marks: behind the copies, one for each device.
        sources: what is copied; its memory is given to nobody else before that is done.
    """

    def __init__(self, marks: Sequence[Mark] = (), sources: Sequence[torch.Tensor] = ()) -> None:
        self._marks, self._sources = marks, sources

    def wait(self) -> None:
        """Wait until all are made.

        Raises:
            StorageError: if a device reports that it failed.
        """
        try:
            for mark in self._marks:
                mark.synchronize()
        except RuntimeError as error:
            raise StorageError(f"the device did not copy what was to be saved: {error}") from error
        self._sources = ()


@dataclass(slots=True)
class Encoded:
    """Encoded components, ready to be put: the trees' documents and their distinct tensors.

    Attributes:
        copying: what devices have still to do before the tensors' bytes are there.
    """

    components: dict[str, Any]
    leaves: list[Leaf]
    copying: Copying = field(default_factory=Copying)
    digests: list[str | None] = field(init=False)

    def __post_init__(self) -> None:
        self.digests = [None] * len(self.leaves)

    def tensors(self) -> list[TensorInfo]:
        """The tensors as the manifest lists them; every digest must be known."""
        pairs = zip(self.leaves, self.digests, strict=True)
        return [TensorInfo(leaf.dtype, leaf.shape, digest or "") for leaf, digest in pairs]


class Arena:
    """Host memory for one snapshot at a time, used again by the next; it grows to the largest and is kept.

    Faulting in fresh memory costs twice as much as the copy itself, so it is worth keeping. Where tensors come
    from a CUDA device the memory is pinned, and the device copies on its current stream. It does so behind all work that it was
    given before, and ahead of all that it is given later, so the program need not wait.
    """

    def __init__(self) -> None:
        self._memory = _host_memory(0)
        self._layout: list[tuple[str, tuple[int, ...]]] = []
        self._addresses: list[int] = []
        self._parts: list[torch.Tensor] = []
        self._leaves: list[Leaf] = []
        self._copying = Copying()

    def snapshot(self, state: Encoded) -> Encoded:
        """The state as it is now, whatever becomes of the live tensors; valid until the next snapshot.

        Streams of a device other than its current one must wait for that one before they change a tensor.
        """
        # Copies that are under way write to the memory that is used again.
        self._copying.wait()
        tensors = [leaf for leaf in state.leaves if _is_tensor(leaf)]
        copies = iter(self._copied(tensors))
        if len(tensors) == len(state.leaves):
            return Encoded(state.components, list(copies), self._copying)
        leaves = []
        for leaf in state.leaves:
            if _is_tensor(leaf):
                leaves.append(next(copies))
            elif isinstance(leaf.source, np.ndarray):
                leaves.append(leaf._replace(source=leaf.source.copy(), is_plain=True, is_live=False))
            else:
                # Others may change mapped files.
                leaves.append(leaf.copied() if leaf.is_live and leaf.size else leaf)
        return Encoded(state.components, leaves, self._copying)

    def _copied(self, leaves: Sequence[Leaf]) -> list[Leaf]:
        """The leaves of tensors, with copies of their values; the same as last time where the same tensors come again."""
        tensors: list[torch.Tensor] = [leaf.source for leaf in leaves]
        on_cuda = any(map(operator.attrgetter("is_cuda"), tensors))
        layout = list(map(operator.attrgetter("dtype", "shape"), leaves))
        addresses = [leaf.address for leaf in leaves]
        if layout != self._layout or (on_cuda and not self._memory.is_pinned()):
            # No layout holds until there is memory for it.
            self._layout, self._leaves = [], []
            # The memory may be written to in any mode.
            with torch.inference_mode(False):
                self._lay_out(tensors, pinned=on_cuda)
            self._layout = layout
        with torch.no_grad():
            if tensors:
                torch._foreach_copy_(self._parts, tensors, non_blocking=on_cuda)
        devices = {tensor.device for tensor in tensors if tensor.is_cuda} if on_cuda else ()
        marks = [torch.cuda.current_stream(device).record_event() for device in devices]
        self._copying = Copying(marks, tensors if marks else ())
        if not self._leaves:
            self._leaves, self._addresses = list(leaves), [-1] * len(leaves)
        for i, (leaf, address, before) in enumerate(zip(leaves, addresses, self._addresses, strict=True)):
            if address != before:
                self._leaves[i] = leaf._replace(source=self._parts[i], is_plain=True, is_live=False)
        self._addresses = addresses
        return self._leaves

    def _lay_out(self, tensors: list[torch.Tensor], *, pinned: bool) -> None:
        """Give each tensor a part of the memory."""
        self._parts, starts, end = [], [], 0
        for tensor in tensors:
            starts.append(end)
            end += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        if end > len(self._memory) or (pinned and not self._memory.is_pinned()):
            # The old memory is freed before the larger one is asked for.
            self._memory = _host_memory(0)
            self._memory = _host_memory(end, pinned=pinned)
        for tensor, start in zip(tensors, starts, strict=True):
            part = self._memory[start : start + tensor.nbytes]
            self._parts.append(part.view(tensor.dtype).view(tensor.shape))


def _host_memory(size: int, *, pinned: bool = False) -> torch.Tensor:
    """New bytes in the machine's own memory, whatever the default device is."""
    return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=pinned)


def _is_tensor(leaf: Leaf) -> bool:
    return isinstance(leaf.source, torch.Tensor) and leaf.size > 0


class Known(Protocol):
    """Knows what is stored."""

    def __call__(self, digests: Collection[str]) -> Collection[str]:
        """Those of the digests whose tensors are stored and intact."""
        ...


def write_new(
    state: Encoded, known: Known, *, tmp: Path, packs: Path, progress: Callable[[int, int], None]
) -> PackInfo | None:
    """Hash a state's tensors and write those that are not known into one pack.

    A tensor that another thread changes meanwhile is saved from one copy, which may have caught it in the middle of a change.

    Args:
        known: tells which tensors are stored.
        tmp: the folder where the pack lies until it is complete.
        packs: the folder of the packs.
        progress: told the bytes done and the bytes in all.

    Returns:
        The published pack, or None if every tensor was known. Fills in `state.digests`.

    Raises:
        StorageError: if the disk is full or refuses, or a device did not copy its tensors.
    """
    state.copying.wait()
    any_may_be_new = False
    times_changed = 0
    while True:
        try:
            return _write_new(state, known, any_may_be_new, tmp=tmp, packs=packs, progress=progress)
        except _Gone:
            any_may_be_new = True
        except Changed as error:
            if not times_changed:
                _logger.warning(
                    "another thread changed %d of %d tensors while they were saved: each is saved from one copy, but not "
                    "all as they were at the same moment; pause that thread while you save",
                    len(error.digests),
                    len(state.leaves),
                )
            for slot, leaf in enumerate(state.leaves):
                if leaf.is_live and (times_changed or state.digests[slot] in error.digests):
                    state.leaves[slot], state.digests[slot] = leaf.copied(), None
            times_changed += 1


class _Gone(Exception):
    """Tensors that were known are not any more: another process removed them."""


def _write_new(
    state: Encoded,
    known: Known,
    any_may_be_new: bool,
    *,
    tmp: Path,
    packs: Path,
    progress: Callable[[int, int], None],
) -> PackInfo | None:
    """One attempt of `write_new`.

    Args:
        any_may_be_new: whether the header needs room for all, also for those that are known when it begins.

    Raises:
        _Gone: if it has no room for one that was known, and is not any more.
    """
    if not any_may_be_new and _may_be_known(state, known):
        _hash(state)
    # Slots that may be new and are in no batch yet.
    possible = set(range(len(state.leaves)))
    if not any_may_be_new and state.digests and None not in state.digests:
        # Of equal ones the first, which is the first to be hashed as well.
        slots = {digest: slot for slot, digest in reversed([*enumerate(state.digests)]) if digest}
        possible = {slots[digest] for digest in slots.keys() - known(slots.keys())}
    has_room = frozenset(possible)
    writer: PackWriter | None = None
    are_new = True
    total = sum(leaf.size for leaf in state.leaves)
    done = 0
    seen: set[str] = set()
    hashing = _Hashing(state)
    try:
        with contextlib.closing(hashing.batches()) as batches:
            for batch in batches:
                new, rest = _parted(batch, known, seen)
                if not has_room.issuperset(item.slot for item in new):
                    raise _Gone
                hashing.release(rest, writing=bool(new))
                possible.difference_update(item.slot for item in batch)
                # Where one is stored, others are likely to be.
                are_new = are_new and not any(item.leaf.size >= ALONE for item in rest)
                if new and not writer:
                    writer = _writer_of(state, new, possible=possible, tmp=tmp)
                hashing.writer = writer if are_new else None
                if writer:
                    _leave(writer, rest)
                    _write(writer, new, hashing)
                done += sum(item.leaf.size for item in batch)
                progress(done, total)
        return writer.finish(packs) if writer else None
    except BaseException:
        if writer:
            writer.discard()
        raise


def _parted(batch: Sequence[_Hashed], known: Known, seen: set[str]) -> tuple[list[_Hashed], list[_Hashed]]:
    """The tensors of a batch that are new, the first of equal ones, and the others.

    Args:
        seen: digests of the new ones so far; those of this batch are added.
    """
    stored = known({item.digest for item in batch} - seen)
    new, rest = [], []
    for item in batch:
        if item.digest in stored or item.digest in seen:
            rest.append(item)
        else:
            seen.add(item.digest)
            new.append(item)
    return new, rest


def _writer_of(state: Encoded, new: Sequence[_Hashed], possible: Collection[int], tmp: Path) -> PackWriter:
    """A writer with room in the header for tensors that are new, and for those that may be."""
    leaves = [*(item.leaf for item in new), *(state.leaves[slot] for slot in possible)]
    return PackWriter(tmp, [(leaf.dtype, leaf.shape) for leaf in leaves])


def _leave(writer: PackWriter, known: Sequence[_Hashed]) -> None:
    """Leave the room of tensors that were written before it was known that they are stored."""
    for item in known:
        if item.start is not None:
            writer.leave(item.start, item.leaf.size)


def _write(writer: PackWriter, new: Sequence[_Hashed], hashing: _Hashing) -> None:
    written: list[_Hashed] = []
    size = 0
    for item in new:
        if item.start is not None:
            writer.add_written(item.digest, item.leaf.dtype, item.leaf.shape, item.start)
            continue
        leaf, data = item.leaf, item.leaf.buffer() if item.data is None else item.data
        writer.add(
            item.digest,
            leaf.dtype,
            leaf.shape,
            data=data,
            is_sure=item.is_sure,
            fingerprint=item.fingerprint,
        )
        written.append(item)
        size += leaf.size
        if size >= RUN:
            hashing.release(written, writing=True)
            written, size = [], 0
    hashing.release(written, writing=True)


def _may_be_known(state: Encoded, known: Known) -> bool:
    """Whether there are so many tensors that room in the header for all would be a waste, if most of them are stored already."""
    if len(state.leaves) <= MANY or None not in state.digests:
        return False
    if not header.has_room(index_bound((leaf.dtype, leaf.shape) for leaf in state.leaves)):
        return True
    # Not at equal distances, as networks repeat themselves; the generator is not that of the user's program.
    chosen = random.Random(len(state.leaves)).sample(state.leaves, min(_TRIED, len(state.leaves)))
    tried = Encoded({}, [leaf for leaf in chosen if leaf.size < ALONE])
    _hash(tried)
    return bool(known({digest for digest in tried.digests if digest}))


def _hash(state: Encoded) -> None:
    """Find all digests of a state, and write nothing."""
    hashing = _Hashing(state)
    with contextlib.closing(hashing.batches()) as batches:
        for batch in batches:
            hashing.release(batch, writing=False)


class _Hashed(NamedTuple):
    """A tensor of a state with its digest."""

    slot: int
    digest: str
    leaf: Leaf
    data: memoryview | None
    """The bytes, where the copy that was hashed is kept; None where they can be had from the leaf for nothing."""
    is_sure: bool
    """Whether what will be written is what was hashed, whatever other threads do."""
    fingerprint: bytes | None = None
    """Of what was hashed, where it is not sure."""
    start: int | None = None
    """Where it was written already, in the pack's file."""


class _Room:
    """Room in a pack, reserved once the first part of a tensor is written.

    Attributes:
        start: where it begins; None until then.
    """

    def __init__(self, writer: PackWriter, size: int) -> None:
        self._writer, self._size = writer, size
        self.start: int | None = None
        self._written = 0

    def write(self, part: memoryview) -> None:
        """Write the next part."""
        if self.start is None:
            self.start = self._writer.reserve(self._size)
        self._writer.write(part, self.start + self._written)
        self._written += len(part)


class _Run(NamedTuple):
    """Tensors that a thread hashes at a time: their bytes, and how many of them may be copied for it."""

    slots: Sequence[int]
    size: int
    copied: int


class _Hashing:
    """Threads that hash a state's tensors, and bound the copies that they have to make.

    A thread claims a run of small tensors at a time, as handing over single ones costs more than hashing them.

    Attributes:
        writer: where large tensors that have to be hashed are written at once, from the copy that is hashed, as they are
            likely to be new; None for nowhere.
    """

    def __init__(self, state: Encoded) -> None:
        self._state = state
        self._runs = list(_runs(state.leaves))
        lock = threading.Lock()
        self._progress = threading.Condition(lock)
        self._room = threading.Condition(lock)
        self._claimed = self._copied = self._ahead = 0
        self._batch = FIRST_BATCH
        self._writing = False
        self.writer: PackWriter | None = None
        self._finished: dict[int, list[_Hashed]] = {}
        self._in_order = 0
        self._ready: list[_Hashed] = []
        self._ready_bytes = 0
        self._waiting = 0
        self._waits_for_room = self._stopped = False
        self._error: BaseException | None = None

    def batches(self) -> Generator[list[_Hashed]]:
        """Hashed tensors, in batches worth a look-up and a write."""
        # Never in the caller's thread, which may be in a mode of torch that gives tensors another meaning.
        threads = [
            threading.Thread(target=self._work, args=(i,), name="registry-hash", daemon=True)
            for i in range(min(_THREADS, len(self._runs)))
        ]
        for thread in threads:
            thread.start()
        try:
            given = 0
            while given < len(self._state.leaves):
                with self._progress:
                    self._progress.wait_for(self._has_batch)
                    if self._error:
                        raise self._error
                    batch, self._ready, self._ready_bytes = self._ready, [], 0
                for item in batch:
                    self._state.digests[item.slot] = item.digest
                given += len(batch)
                yield batch
        finally:
            with self._room:
                self._stopped = True
                self._room.notify_all()
            for thread in threads:
                thread.join()

    def release(self, items: Sequence[_Hashed], *, writing: bool) -> None:
        """The bytes of items are no longer needed.

        Args:
            writing: whether the last batch is being written; where nothing is, larger batches save look-ups.
        """
        size = sum(item.leaf.size for item in items if item.start is None)
        copied = sum(item.leaf.size for item in items if item.data is not None)
        with self._room:
            self._ahead -= size
            self._copied -= copied
            self._writing = writing
            self._batch = BATCH if writing else 16 * self._batch
            if self._waiting:
                self._room.notify_all()

    def _has_batch(self) -> bool:
        if self._error or self._ready_bytes >= self._batch or self._in_order == len(self._runs):
            return True
        return self._waits_for_room and bool(self._ready)

    def _work(self, thread: int) -> None:
        try:
            while (number := self._claim(thread)) is not None:
                run = self._runs[number]
                items = [self._hash(slot) for slot in run.slots]
                unused = run.copied - sum(item.leaf.size for item in items if item.data is not None)
                with self._progress:
                    self._finished[number] = items
                    self._copied -= unused
                    if unused and self._waiting:
                        self._room.notify_all()
                    self._ahead += sum(item.leaf.size for item in items if item.start is None)
                    while self._in_order in self._finished:
                        self._ready += self._finished.pop(self._in_order)
                        self._ready_bytes += self._runs[self._in_order].size
                        self._in_order += 1
                    if self._has_batch():
                        self._progress.notify()
        except BaseException as error:
            # It reaches the caller of `batches`.
            with self._progress:
                self._error = error
                self._progress.notify()

    def _hash(self, slot: int) -> _Hashed:
        leaf = self._state.leaves[slot]
        data = leaf.buffer()
        digest = self._state.digests[slot]
        if leaf.size < SMALLEST and digest is None:
            # The copy is hashed, and written. There may be many of them, so this is all that is done.
            begin = preamble(leaf.dtype, leaf.shape)
            small = begin + data
            return _Hashed(slot, digest_of(small), leaf, memoryview(small)[len(begin) :], True)
        is_copied = _is_copied(leaf)
        if is_copied and leaf.is_plain:
            data = memoryview(bytes(data))
        copy = data if is_copied else None
        is_sure = not leaf.is_live or (is_copied and digest is None)
        if digest is not None:
            known = remembered.fingerprint_of(digest, leaf.address, dtype=leaf.dtype, shape=leaf.shape)
            return _Hashed(slot, digest, leaf=leaf, data=copy, is_sure=is_sure, fingerprint=known)
        writer = self.writer if leaf.size >= ALONE and not is_sure else None
        room = _Room(writer, leaf.size) if writer else None
        kept: list[memoryview] = []
        keep = kept.append if leaf.size < ALONE and not is_sure else None
        found = remembered.find(
            leaf.address,
            dtype=leaf.dtype,
            shape=leaf.shape,
            data=data,
            threads=ALL_CORES if leaf.size >= _LARGE else 1,
            is_live=not is_sure,
            use=room.write if room else keep,
        )
        if room and room.start is not None:
            return _Hashed(slot, found.digest, leaf=leaf, data=None, is_sure=True, start=room.start)
        if kept:
            return _Hashed(slot, found.digest, leaf=leaf, data=kept[0], is_sure=True)
        return _Hashed(
            slot, found.digest, leaf=leaf, data=copy, is_sure=is_sure, fingerprint=found.fingerprint
        )

    def _claim(self, thread: int) -> int | None:
        """The next run to hash, in order, once there is room for the copies that it may need.

        Where the writer has enough to do, the threads but the first wait, as it needs a core as well.
        """
        with self._room:
            while not self._stopped and not self._error and self._claimed < len(self._runs):
                size = self._runs[self._claimed].copied
                fits = not size or not self._copied or self._copied + size <= COPIES_IN_FLIGHT
                if fits and not (thread and self._writing and self._ahead >= AHEAD):
                    self._copied += size
                    self._claimed += 1
                    return self._claimed - 1
                if not fits:
                    self._waits_for_room = True
                    self._progress.notify()
                self._waiting += 1
                self._room.wait()
                self._waiting -= 1
                self._waits_for_room = self._waits_for_room and fits
            return None


def _is_copied(leaf: Leaf) -> bool:
    """Whether a tensor's bytes are copied to be hashed: where they must be, and where that costs almost nothing."""
    return leaf.size < SMALLEST or not leaf.is_plain


def _runs(leaves: Sequence[Leaf]) -> Iterator[_Run]:
    """The largest tensors first, each alone; small ones by the dozen.

    Large ones keep the interpreter lock free for long, so that the writer is soon at work.
    """
    slots: list[int] = []
    size = copied = 0
    for slot in sorted(range(len(leaves)), key=lambda slot: -leaves[slot].size):
        leaf = leaves[slot]
        if slots and size + leaf.size > RUN:
            yield _Run(slots, size, copied)
            slots, size, copied = [], 0, 0
        slots.append(slot)
        size += leaf.size
        copied += leaf.size if leaf.size < ALONE or not leaf.is_plain else 0
    if slots:
        yield _Run(slots, size, copied)
