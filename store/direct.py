"""Tensors that are not in the page cache, read from the disk into memory of their own, and verified on the way.

The system reads past its page cache (`O_DIRECT`), with several requests in flight, and each piece is hashed as soon as it is
there. Such reads want memory, offset and length in whole blocks. So an *arena*, the memory that tensors share, holds whole
*spans*: tensors that lie one behind the other in a pack, at the places that they have there, from the block that the first one
begins in. Where the system or the disk refuses, the same is read through the page cache, four requests at a time.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from registry.store.digest import tensor_hasher
from registry.store.errors import Corrupt, storage_errors
from registry.store.locating import Wanted
from registry.store.pack import ALIGNMENT, INNER, pack_path
from registry.store.page_cache import neighbours, place_of, uncached
from registry.store.parallel import in_order
from registry.store.places import OpenFiles, is_local

_BLOCK = 4 << 10
"""Bytes to which memory, offset and length are aligned. Disks with larger blocks refuse, and are read in the usual way."""

_PIECE = 2 << 20
"""Bytes of one read."""

_REQUESTS = 8
"""Reads in flight past the page cache."""

_CACHED_REQUESTS = 4
"""Reads in flight through it."""

_SHORTEST = 256 << 10
"""Bytes of tensors side by side from which on they become a span."""

_MOST_SPANS = 2_000
"""Spans of a load. Each takes up to two blocks more than its tensors do."""

_ARENA = 64 << 20
"""Bytes of an arena, unless one tensor has more."""

Placed = tuple[mmap.mmap, list[tuple[Wanted, int]]]
"""An arena, and its tensors with the first byte of each in it."""


class _DirectPacks:
    """Packs that were read past the page cache. The next load reads them into it, so that later ones find them there."""

    _MOST = 10_000

    def __init__(self) -> None:
        self._packs: dict[str, None] = {}

    def add(self, pack: str) -> bool:
        """Add a pack; whether it is new."""
        is_new = pack not in self._packs
        self._packs[pack] = None
        if len(self._packs) > self._MOST:
            with contextlib.suppress(KeyError, RuntimeError):
                del self._packs[next(iter(self._packs))]
        return is_new

    def forget(self) -> None:
        """Forget all."""
        self._packs.clear()


direct_packs = _DirectPacks()
"""State of the process: which packs it has read past the page cache. `direct_packs.forget()` forgets them."""


def read_verified(
    packs: Path,
    items: Sequence[Wanted],
    memory: Callable[[int], mmap.mmap],
    damaged: Callable[[Wanted], Corrupt],
) -> list[Placed]:
    """Read those of some tensors that are not in the page cache, and check their digests.

    Tensors that are few, lie apart, are in memory already or are stored coded are left out, and so is a second one of
    the same bytes.

    Args:
        memory: makes new memory of some bytes that begins a page, all zeros.
        damaged: makes the error for a tensor whose bytes are not what was saved.

    Returns:
        Arenas with those that were read.

    Raises:
        Corrupt: naming the tensor and the pack, if a byte is not what was saved.
        StorageError: if the system refuses.
    """
    whole = {
        (place_of(item), item.info.digest): item
        for item in reversed(items)
        if item.size and not item.is_coded
    }
    with OpenFiles() as files:
        groups = _side_by_side(uncached(packs, whole.values(), files))
        arenas, spans = _laid_out(groups, memory)
        if not spans:
            return []
        names = {span.items[0].location.pack: span.items[0].location for span in spans}
        descriptors = {
            pack: files.open(pack_path(packs, pack), location.pack_size, inner=INNER)
            for pack, location in names.items()
        }
        is_allowed = is_local(packs)
        direct = [
            pack
            for pack, fd in descriptors.items()
            if is_allowed and direct_packs.add(pack) and _make_direct(fd)
        ]
        pieces = _pieces(packs, spans, descriptors)
        in_order(
            pieces,
            lambda piece: _read(piece, damaged),
            size=sum(span.end - span.start for span in spans),
            threads=_REQUESTS if direct else _CACHED_REQUESTS,
        )
    return arenas


def _side_by_side(items: Sequence[Wanted]) -> list[list[Wanted]]:
    """Groups of tensors that become spans, in the order of their places."""
    groups = []
    for run in neighbours(items, ALIGNMENT - 1):
        group: list[Wanted] = []
        for item in run:
            if group and _end(item) - group[0].location.start > _ARENA:
                groups.append(group)
                group = []
            group.append(item)
        groups.append(group)
    long = [group for group in groups if _end(group[-1]) - group[0].location.start >= _SHORTEST]
    if len(long) > _MOST_SPANS:
        long.sort(key=lambda group: group[0].location.start - _end(group[-1]))
        long = sorted(long[:_MOST_SPANS], key=lambda group: place_of(group[0]))
    return long


def _end(item: Wanted) -> int:
    return item.location.start + item.size


def _laid_out(
    groups: Sequence[Sequence[Wanted]], memory: Callable[[int], mmap.mmap]
) -> tuple[list[Placed], list[_Span]]:
    """Arenas for groups of tensors, and the spans to read into them."""
    shelves: list[list[tuple[Sequence[Wanted], int]]] = []
    size = 0
    for group in groups:
        start = group[0].location.start // _BLOCK * _BLOCK
        length = -(-(_end(group[-1]) - start) // _BLOCK) * _BLOCK
        if not shelves or size + length > _ARENA:
            shelves.append([])
            size = 0
        shelves[-1].append((group, length))
        size += length
    arenas: list[Placed] = []
    spans = []
    for shelf in shelves:
        arena = memory(sum(length for _, length in shelf))
        placed: list[tuple[Wanted, int]] = []
        at = 0
        for group, length in shelf:
            start = group[0].location.start // _BLOCK * _BLOCK
            placed += [(item, at + item.location.start - start) for item in group]
            part = memoryview(arena)[at : at + length]
            spans.append(_Span(items=group, start=start, end=_end(group[-1]), memory=part))
            at += length
        arenas.append((arena, placed))
    return arenas, spans


class _Span(NamedTuple):
    """Tensors side by side in a pack, to be read into an arena.

    Attributes:
        start, end: the bytes of the pack to read; `start` begins a block.
        memory: as long, in whole blocks.
    """

    items: Sequence[Wanted]
    start: int
    end: int
    memory: memoryview


class _Piece(NamedTuple):
    """One read.

    Attributes:
        start, end: the bytes of the pack to read; `start` begins a block.
        memory: where they go, in whole blocks.
        tensors: those with bytes among them.
    """

    fd: int
    path: Path
    start: int
    end: int
    memory: memoryview
    tensors: Sequence[_Tensor]


class _Tensor:
    """A tensor that is hashed as its bytes come in, in their order."""

    def __init__(self, item: Wanted, memory: memoryview) -> None:
        self.item = item
        self._memory = memory
        self._hasher = tensor_hasher(item.info.dtype, item.info.shape, 1)
        self._hashed = 0
        self._ready: dict[int, int] = {}
        self._is_hashing = False
        self._lock = threading.Lock()

    def take(self, start: int, end: int) -> bool:
        """Take bytes that are there, and hash what can be hashed. One thread does so at a time.

        Args:
            start, end: bytes of the tensor.

        Returns:
            False if all were hashed, and are not what was saved.
        """
        with self._lock:
            self._ready[start] = end
            if self._is_hashing:
                return True
            self._is_hashing = True
        while True:
            with self._lock:
                until = self._ready.pop(self._hashed, None)
                if until is None:
                    self._is_hashing = False
                    return True
            self._hasher.update(self._memory[self._hashed : until])
            self._hashed = until
            if until == len(self._memory):
                return self._hasher.hexdigest() == self.item.info.digest


def _pieces(packs: Path, spans: Sequence[_Span], descriptors: dict[str, int]) -> Iterator[_Piece]:
    """The reads of some spans, in their order."""
    for span in spans:
        pack = span.items[0].location.pack
        rest = iter(span.items)
        tensor: _Tensor | None = None
        for start in range(span.start, span.end, _PIECE):
            end = min(start + _PIECE, span.end)
            # One that the read before ended in goes on.
            tensors = [tensor] if tensor and _end(tensor.item) > start else []
            while not tensor or _end(tensor.item) < end:
                item = next(rest, None)
                if item is None:
                    break
                at = item.location.start - span.start
                tensor = _Tensor(item, span.memory[at : at + item.size])
                tensors.append(tensor)
            yield _Piece(
                fd=descriptors[pack],
                path=pack_path(packs, pack),
                start=start,
                end=end,
                memory=span.memory[start - span.start : start - span.start + _PIECE],
                tensors=tensors,
            )


def _read(piece: _Piece, damaged: Callable[[Wanted], Corrupt]) -> None:
    """Read a piece, and hash what it has of each tensor."""
    count = _fill(piece)
    for tensor in piece.tensors:
        first = tensor.item.location.start
        end = min(piece.end, _end(tensor.item))
        # The file has become shorter.
        if piece.start + count < end:
            raise damaged(tensor.item)
        if first < end and not tensor.take(max(piece.start, first) - first, end - first):
            raise damaged(tensor.item)


def _fill(piece: _Piece) -> int:
    """Read the bytes of a piece; how many there are."""
    done, size = 0, piece.end - piece.start
    has_failed = False
    with storage_errors(piece.path):
        while done < size:
            try:
                count = os.preadv(piece.fd, [piece.memory[done:]], piece.start + done)
            except OSError as error:
                if error.errno != errno.EINVAL or has_failed:
                    raise
                has_failed = True
                fcntl.fcntl(piece.fd, fcntl.F_SETFL, 0)
                continue
            if not count:
                break
            done += count
    return done


def _make_direct(fd: int) -> bool:
    """Have a file read past the page cache from now on; False where that cannot be."""
    flag = getattr(os, "O_DIRECT", None)
    if flag is None:
        return False
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flag)
    except OSError:
        return False
    return True
