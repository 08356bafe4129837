"""The log that hosts share: one object for each entry, which is created if there is none of its number.

An object is the entry's line, as in a folder's log, and a line of JSON with the headers of the packs that the entry names,
compressed together.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import zstandard

from registry.log import entries, settings
from registry.log.entries import START, Entry
from registry.log.sharing import Behind, history_changed
from registry.remote.bucket import Unreachable
from registry.remote.journal import Journal
from registry.remote.packs import RemotePacks
from registry.store import durable, header, places
from registry.store.errors import Corrupt, Invalid, Missing, StorageError

_LARGEST = 64 << 20
"""Bytes of an object, compressed and not."""
_REFRESH = 5.0
"""Seconds in which a host does not ask again what others have added."""
_CONFIRM = 60.0
"""Seconds after which a host sees again, before it adds an entry, that the last one is still there."""
_REST = 20.0
"""Seconds for which nothing that can do without it tries a bucket that could not be reached, as that costs seconds."""
_AT_ONCE = 16
_MANY = 256
"""Entries that are asked for in one go, where all of them are."""
_PATIENCE = 60.0
"""Seconds for which it is asked again whether an entry whose answer was lost is there."""


class SharedLog:
    """The log of a shared registry; a `registry.log.sharing.Shared`, safe to use from several threads.

    Args:
        journal: its objects.
        packs: those in the bucket.
        root: this host's folder.
    """

    def __init__(self, journal: Journal, packs: RemotePacks, root: Path) -> None:
        self._journal = journal
        self._packs = packs
        self._settings = root / settings.SHARED
        self._asked = self._confirmed = self._overtaken = -_CONFIRM
        self._failed = -_REST

    @property
    def url(self) -> str:
        """Where it is, without keys."""
        return self._journal.url

    def is_there(self) -> bool:
        """Whether the log has an entry.

        Raises:
            Corrupt: if the first one is missing, and others are there.
        """
        if self._object(1) is not None:
            return True
        self._check_no_hole(0, self._journal.last())
        return False

    def is_due(self) -> bool:
        """Whether it is time to ask for what other hosts have added."""
        return self._packs.was_missing or (not self.rests() and self._asked + _REFRESH <= time.monotonic())

    def ask_again(self) -> None:
        """Let `is_due` be true; see `registry.log.sharing.Shared.ask_again`."""
        self._asked = -math.inf

    def is_likely_last(self) -> bool:
        """Whether neither others have added an entry lately, nor the log may have been put back."""
        since = time.monotonic() - _CONFIRM
        return self._overtaken < since < self._confirmed and not self._packs.was_missing

    def rests(self) -> bool:
        """Whether the bucket could not be reached a moment ago."""
        return time.monotonic() < self._failed + _REST

    def as_of(self) -> str:
        """When this host last saw the log, in words; see `registry.log.sharing.Shared.as_of`."""
        status = places.status_of(self._settings)
        if status is None:
            return "an unknown time"
        age, clock = time.time() - status.st_mtime, time.strftime("%H:%M", time.localtime(status.st_mtime))
        hours, minutes = divmod(int(max(age, 0)) // 60, 60)
        ago = f"{hours // 24} days ago" if hours > 48 else f"{hours} h ago" if hours else f"{minutes} min ago"
        return f"{clock}, {ago}"

    def news(self, seq: int, digest: str) -> Iterator[Entry]:
        """The entries behind one, in order; see `registry.log.sharing.Shared.news`."""
        with self._reaching():
            yield from self._news(seq, digest)

    def _news(self, seq: int, digest: str) -> Iterator[Entry]:
        # Also where the answer does not come: otherwise each call would wait for it.
        self._asked = time.monotonic()
        self._packs.was_missing = False
        found = self._first_behind(seq, digest)
        if found is None:
            return
        self._overtaken = time.monotonic()
        prev = digest if seq else START
        for number, data in self._from(seq + 1, found):
            entry = self._taken(number, data)
            if entry.prev != prev:
                raise history_changed(self.url, f" at entry {number}: it does not follow from this host's")
            yield entry
            prev = entry.digest
        self._confirmed = time.monotonic()

    def upload(self, packs: Collection[str]) -> None:
        """Bring packs of this host to the bucket, unless they are there."""
        with self._reaching():
            self._packs.upload(packs)

    def add(self, entry: Entry) -> None:
        """Add an entry behind the last one; see `registry.log.sharing.Shared.add`."""
        with self._reaching():
            self._add(entry)

    def _add(self, entry: Entry) -> None:
        packs = [record["digest"] for record in entry.records if record["op"] == "pack"]
        try:
            self._packs.upload(packs)
            headers = self._packs.headers(packs)
        except Missing:
            if self._object(entry.seq) is None:
                raise
            # Another host has doomed one meanwhile, and removed it.
            self._overtaken = time.monotonic()
            raise Behind from None
        data = packed(entry, headers)
        until = time.monotonic() + _PATIENCE
        while not self._journal.create(entry.seq, data):
            there = self._object(entry.seq)
            if there == data:
                # It was this one, and its answer was lost.
                break
            if there is not None:
                self._overtaken = time.monotonic()
                raise Behind
            if time.monotonic() > until:
                raise Unreachable(f"{self.url}: the store takes no entry", "repeat")
            time.sleep(0.2)
        # So that the files of the packs may go. The entry is there, also where this disk is full.
        with contextlib.suppress(StorageError):
            for found in headers:
                self._packs.keep_header(found)
        self._asked = self._confirmed = time.monotonic()

    @contextlib.contextmanager
    def _reaching(self) -> Iterator[None]:
        """Note whether the bucket was reached."""
        try:
            yield
        except Unreachable:
            self._failed = time.monotonic()
            raise
        self._failed = -_REST
        durable.mark_used(self._settings)

    def entries(self) -> Iterator[tuple[int, Entry | None]]:
        """All numbers up to the last one that is listed, with their entries; None for one that is missing or damaged."""
        last = self._journal.last()
        numbers = range(1, last + 1)
        with ThreadPoolExecutor(_AT_ONCE, "registry-log") as pool:
            for start in range(0, last, _MANY):
                part = numbers[start : start + _MANY]
                yield from zip(part, pool.map(self._readable, part), strict=True)

    def put_back(self, entry: Entry) -> None:
        """Put an entry in its place in the bucket, where it is missing or damaged.

        Raises:
            Corrupt: if another entry is there, or the header of a pack that the entry names cannot be had.
            StorageError: if the place cannot be reached, or refuses.
        """
        packs = [record["digest"] for record in entry.records if record["op"] == "pack"]
        data = packed(entry, self._packs.headers(packs))
        if self._journal.create(entry.seq, data):
            return
        there = self._readable(entry.seq)
        if there is None:
            # Not deleted and created, as another host could take the number in between.
            self._journal.put(entry.seq, data)
        elif there.digest != entry.digest:
            raise history_changed(self.url, f": entry {entry.seq} is another one there")

    def _first_behind(self, seq: int, digest: str) -> bytes | None:
        """The object behind an entry that this host has.

        Now and then it is seen, too, that this entry is still there, and so nothing older was put back. That is asked at the
        same time.
        """
        if not seq or self._confirmed + _CONFIRM > time.monotonic():
            return self._object(seq + 1)
        with ThreadPoolExecutor(2, "registry-log") as pool:
            own, last = pool.submit(self._object, seq), pool.submit(self._journal.last, seq)
            found = self._object(seq + 1)
        if found is None:
            data = own.result()
            if data is None or unpacked(data)[0].digest != digest:
                lost = "is missing" if data is None else "is another one"
                raise history_changed(self.url, f": entry {seq}, which this host has, {lost} there")
            self._check_no_hole(seq, last.result())
            self._confirmed = time.monotonic()
        return found

    def _check_no_hole(self, seq: int, last: int) -> None:
        """See that no entries are there whose predecessor, the one behind a number, is missing.

        Args:
            last: the highest number that is known to have one.
        """
        if last > seq and self._object(seq + 1) is None:
            raise self._hole(seq + 1)

    def _hole(self, seq: int) -> Corrupt:
        return history_changed(self.url, f": entry {seq} is missing there, and later ones are there")

    def _from(self, seq: int, first: bytes) -> Iterator[tuple[int, bytes]]:
        """The objects of the log from a number on, of which the first was read."""
        yield seq, first
        last = seq
        # What it gives may lag. What counts is that an entry is there.
        for last, found in self._journal.behind(seq, _LARGEST):
            if last != seq + 1:
                break
            seq = last
            yield seq, found
        while (data := self._object(seq + 1)) is not None:
            seq += 1
            yield seq, data
        if last > seq:
            raise self._hole(seq + 1)

    def _object(self, seq: int) -> bytes | None:
        return self._journal.get(seq, _LARGEST)

    def _readable(self, seq: int) -> Entry | None:
        """The entry of a number; None if it is missing or damaged."""
        data = self._object(seq)
        with contextlib.suppress(Corrupt):
            entry = unpacked(data)[0] if data is not None else None
            return entry if entry is None or entry.seq == seq else None
        return None

    def _taken(self, seq: int, data: bytes) -> Entry:
        """An entry, whose headers of packs are kept on this host from now on."""
        try:
            entry, headers = unpacked(data)
            if entry.seq != seq:
                raise Corrupt(f"it is entry {entry.seq}")
            for found in headers:
                self._packs.keep_header(found)
        except Corrupt as error:
            raise Corrupt(
                f"{self._journal.name(seq)}: {error.message}; nothing is written", *error.fixes
            ) from None
        return entry


def packed(entry: Entry, headers: Sequence[Mapping[str, Any]]) -> bytes:
    """The object that stands for an entry.

    Args:
        headers: of the packs that it names; see `registry.remote.packs.RemotePacks.headers`.

    Raises:
        Invalid: if it would be larger than what can be read again.
    """
    text = json.dumps(headers, separators=(",", ":"), ensure_ascii=True).encode()
    size = len(entry.line) + len(text)
    data = zstandard.ZstdCompressor(level=6).compress(entry.line + text) if size <= 2 * _LARGEST else b""
    if not 0 < len(data) <= _LARGEST:
        raise Invalid(
            f"an entry with the headers of its packs would take {size >> 20} MB", "do it in smaller steps"
        )
    return data


def unpacked(data: bytes) -> tuple[Entry, list[dict[str, Any]]]:
    """The entry that an object stands for, and the headers of the packs that it names.

    Raises:
        Corrupt: if it is damaged, or nothing that `packed` makes.
        Unsupported: if a newer version of this package wrote it.
    """
    try:
        size = zstandard.frame_content_size(data)
        if not 0 < size <= 2 * _LARGEST:
            raise Corrupt(f"it would unpack to {size} bytes")
        raw = zstandard.ZstdDecompressor().decompress(data, max_output_size=2 * _LARGEST)
    except zstandard.ZstdError:
        raise Corrupt("its bytes are not what was written") from None
    line, end, text = raw.partition(b"\n")
    entry = entries.parse(line + end)
    try:
        headers = json.loads(text)
    except (ValueError, RecursionError):
        raise Corrupt("the headers of its packs are not JSON") from None
    if not isinstance(headers, list) or not all(map(_is_header, headers)):
        raise Corrupt("the headers of its packs are malformed")
    return entry, headers


_HEADER: Mapping[str, Callable[[Any], bool]] = {
    "digest": lambda value: isinstance(value, str),
    "size": lambda value: type(value) is int and 0 < value < 1 << 63,
    "head": lambda value: type(value) is int and 8 <= value <= header.MAX_HEADER + 8,
    "header": lambda value: isinstance(value, str),
}


def _is_header(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == _HEADER.keys()
        and all(check(value[name]) for name, check in _HEADER.items())
    )
