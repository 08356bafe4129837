"""The page cache: whether packs are in it, and having them read into it ahead of whoever maps them.

All of this is a hint. A wrong answer costs time, and never changes what is read.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import mmap
import os
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from registry.store.errors import RegistryError
from registry.store.locating import Location, Part, Wanted
from registry.store.pack import INNER, pack_path
from registry.store.places import OpenFiles

COLD = 16 << 20
"""Bytes from which on it pays to ask, and to read in another way."""

_PLACES = 16
"""Pages that are asked about."""

_MISSING = 4
"""Pages of these that must be missing."""

_PART = 2 << 20
"""Bytes of one read ahead. Large pages have as many on most machines."""

_REQUESTS = 8
"""Reads ahead in flight."""

_MADV_POPULATE_READ = 22
"""The advice of Linux 5.14 to read a part of a mapping."""

_GAP = 64 << 10
"""Bytes between two tensors that are read too."""


def uncached(packs: Path, items: Iterable[Wanted], files: OpenFiles) -> list[Wanted]:
    """Those of some tensors that lie in packs that are mostly not in the page cache, in the order of their places.

    None if they take less than `COLD` bytes together.

    Args:
        files: where the packs are opened.

    Raises:
        Corrupt: if a pack is missing or has another size than the catalog says.
        StorageError: if the system refuses.
    """
    stored = [item for item in items if item.stored_size and item.held is None]
    if sum(item.stored_size for item in stored) < COLD:
        return []
    stored.sort(key=place_of)
    missing: list[Wanted] = []
    for pack, group in itertools.groupby(stored, key=lambda item: item.location.pack):
        those = list(group)
        fd = files.open(pack_path(packs, pack), those[0].location.pack_size, inner=INNER)
        if not _seem_cached(fd, those):
            missing += those
    return missing if sum(item.stored_size for item in missing) >= COLD else []


def neighbours(items: Iterable[Wanted], gap: int) -> Iterator[list[Wanted]]:
    """Tensors that lie one behind the other in a pack, without overlaps.

    Args:
        items: in the order of their places.
        gap: bytes that may lie between two of them.
    """
    run: list[Wanted] = []
    for item in items:
        if run:
            last = run[-1]
            space = item.location.start - last.location.start - last.stored_size
            if item.location.pack != last.location.pack or not 0 <= space <= gap:
                yield run
                run = []
        run.append(item)
    if run:
        yield run


def place_of(item: Wanted) -> Part:
    """The place that sorts tensors as they lie in their packs."""
    return item.location.pack, item.location.start


def _seem_cached(fd: int, items: Sequence[Wanted]) -> bool:
    """Whether reads that refuse to wait for the disk succeed at most of a few places of some tensors.

    True where the system cannot tell, as of files that live in memory.
    """
    flag = getattr(os, "RWF_NOWAIT", None)
    if flag is None:
        return True
    ends = list(itertools.accumulate(item.stored_size for item in items))
    page = [memoryview(bytearray(mmap.PAGESIZE))]
    missing = 0
    for i in range(_PLACES):
        wanted = ends[-1] * i // _PLACES
        which = bisect_right(ends, wanted)
        place = items[which].location.start + items[which].stored_size - (ends[which] - wanted)
        try:
            os.preadv(fd, page, place // mmap.PAGESIZE * mmap.PAGESIZE, flag)
        except BlockingIOError:
            missing += 1
            if missing == _MISSING:
                return False
        except OSError:
            return True
    return True


class _Part(NamedTuple):
    """Bytes of a pack that are read at once."""

    mapping: mmap.mmap
    fd: int
    start: int
    size: int


class ReadAhead:
    """Has the system read stored tensors into the page cache, and into the mappings of their packs, in the order of their places.

    Args:
        items: in that order.
        mappings: of whole packs, by digest.
        descriptors: of the same files.
    """

    def __init__(
        self, items: Iterable[Wanted], mappings: Mapping[str, mmap.mmap], descriptors: Mapping[str, int]
    ) -> None:
        self._parts: list[_Part] = []
        self._runs: dict[Part, tuple[int, int]] = {}
        self._stop = threading.Event()
        self._changed = threading.Condition()
        self._here: set[int] = set()
        self._first_missing = 0
        for run in neighbours(items, _GAP):
            location, last = run[0].location, run[-1]
            mapping = mappings[location.pack]
            begin, end = location.start // _PART * _PART, last.location.start + last.stored_size
            self._runs |= {place_of(item): (len(self._parts), begin) for item in run}
            if end - location.start >= _PART:
                _advise_large_pages(mapping, begin, end - begin)
            for start in range(begin, end, _PART):
                size = min(_PART, end - start)
                part = _Part(mapping=mapping, fd=descriptors[location.pack], start=start, size=size)
                self._parts.append(part)

    def wait_for(self, item: Wanted, end: int) -> None:
        """Wait until the first bytes of a tensor were read. Where that failed, who touches them reads them.

        Args:
            end: how many bytes.
        """
        found = self._runs.get(place_of(item))
        if found is not None:
            first, begin = found
            part = first + (item.location.start + end - 1 - begin) // _PART
            with self._changed:
                self._changed.wait_for(lambda: self._first_missing > part)

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Read while the body runs."""
        jobs = iter(range(len(self._parts)))
        with ThreadPoolExecutor(_REQUESTS, "registry-ahead") as pool:
            try:
                for _ in range(_REQUESTS):
                    pool.submit(self._read, jobs)
                yield
            finally:
                self._stop.set()

    def _read(self, jobs: Iterator[int]) -> None:
        scratch: memoryview | None = None
        while True:
            with self._changed:
                number = next(jobs, None)
            if number is None:
                return
            part = self._parts[number]
            try:
                # Reading itself tells of trouble.
                if not self._stop.is_set() and not _populate(part):
                    scratch = scratch or memoryview(bytearray(_PART))
                    with contextlib.suppress(OSError):
                        os.preadv(part.fd, [scratch[: part.size]], part.start)
            finally:
                with self._changed:
                    self._here.add(number)
                    while self._first_missing in self._here:
                        self._here.remove(self._first_missing)
                        self._first_missing += 1
                    self._changed.notify_all()


def _advise_large_pages(mapping: mmap.mmap, start: int, size: int) -> None:
    """Have a mapped file read in large pages, each at once, however little the system reads ahead otherwise."""
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # A kernel may be built without them.
        with contextlib.suppress(OSError):
            mapping.madvise(mmap.MADV_HUGEPAGE, start, size)


def _populate(part: _Part) -> bool:
    """Read a part of a mapped file, as if it were touched. False where the system cannot, or the file has become shorter."""
    # `mmap.madvise` would keep the interpreter lock meanwhile.
    place = ctypes.addressof(ctypes.c_char.from_buffer(part.mapping, part.start))
    code = _libc().madvise(ctypes.c_void_p(place), ctypes.c_size_t(part.size), _MADV_POPULATE_READ)
    return bool(code == 0)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


@contextlib.contextmanager
def read_ahead(
    packs: Path, items: Iterable[Wanted], map_pack: Callable[[Location], mmap.mmap]
) -> Iterator[ReadAhead | None]:
    """Read stored tensors ahead of a body that maps them. None where they are few, or seem to be in the page cache.

    Args:
        map_pack: the mapping that the body uses of the pack that a location is in.

    Raises:
        Corrupt, StorageError: as `map_pack`.
    """
    with OpenFiles() as files:
        missing: list[Wanted] = []
        # That a pack has gone or changed is for the body to find: it may have mapped it before.
        with contextlib.suppress(RegistryError):
            missing = uncached(packs, items, files)
        locations = {item.location.pack: item.location for item in missing}
        mappings = {pack: map_pack(location) for pack, location in locations.items()}
        descriptors = {
            pack: files.open(pack_path(packs, pack), location.pack_size, inner=INNER)
            for pack, location in locations.items()
        }
        if not missing:
            yield None
            return
        ahead = ReadAhead(missing, mappings, descriptors)
        with ahead.reading():
            yield ahead
