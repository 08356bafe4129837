"""Second copies: a folder or a bucket that may have what a registry has lost.

What is read there may be anything. So it is asked for by digest, and whoever asks compares.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from registry.log import settings
from registry.log.entries import Entry
from registry.log.journal import Journal
from registry.remote.bucket import Absent, Bucket
from registry.remote.journal import entry_key
from registry.remote.packs import FOLDER as PACKS
from registry.remote.packs import pack_key
from registry.remote.remote import open_remote
from registry.remote.shared_log import unpacked
from registry.remote.urls import is_url
from registry.store import header, heads, places
from registry.store.digest import digest as digest_of
from registry.store.digest import is_digest
from registry.store.errors import Corrupt, Invalid, NotFound, RegistryError, StorageError, storage_errors
from registry.store.folder_index import names_of
from registry.store.manifest import MAX_SIZE
from registry.store.pack import INNER, PackInfo, info_from, pack_path
from registry.store.places import open_regular

_PART = 16 << 20
"""Bytes that are brought from a bucket at a time."""
_LARGEST = 64 << 20


class SecondCopy(Protocol):
    """A place that may have packs, manifests and entries of a log.

    Attributes:
        place: where it is.
    """

    place: str

    def packs(self) -> Iterable[str]:
        """The names of the packs that lie there."""
        ...

    def size(self, pack: str) -> int:
        """Bytes of a pack; 0 if it is not there."""
        ...

    def read(self, pack: str, start: int, size: int) -> bytes:
        """Bytes of a pack; fewer where it ends before, or cannot be read.

        Raises:
            StorageError: if the place cannot be reached.
        """
        ...

    def manifest(self, manifest_id: str) -> bytes:
        """What stands in the place of a manifest; empty if nothing does."""
        ...

    def entries(self, numbers: range) -> Iterator[Entry]:
        """Those entries with some numbers that can be read, in their order."""
        ...

    def header(self, pack: str) -> Mapping[str, Any] | None:
        """A pack's header as an entry of a shared log carries it; None if there is none. Its name need not cover it."""
        ...


class Head(NamedTuple):
    """The first bytes of a pack, which its name covers, and what they say."""

    data: bytes
    info: PackInfo


def head_of(copy: SecondCopy, pack: str, size: int) -> Head | None:
    """The header of a pack; None if it is not there, or not the one that the name covers.

    Args:
        size: bytes that the whole pack must have.
    """
    first = copy.read(pack, 0, 8)
    length = int.from_bytes(first, "little")
    if len(first) < 8 or not 0 < length <= min(header.MAX_HEADER, size):
        return None
    data = copy.read(pack, 0, 8 + length)
    if digest_of(data) != pack:
        return None
    try:
        return Head(data, info_from(pack, header.parse(data, size), size))
    except Invalid:
        return None


class FolderCopy:
    """The folder of a registry, or of a host for a shared one; a `SecondCopy`.

    Its files alone count. No catalog is opened, and nothing is changed there.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.place = str(root)
        self._packs, self._heads = root / "packs", root / heads.FOLDER

    @functools.cached_property
    def url(self) -> str | None:
        """The shared registry that it is a host's folder for; None for a registry of its own."""
        with contextlib.suppress(RegistryError):
            return settings.shared_url(self.root)
        return None

    def packs(self) -> Iterable[str]:
        """See `SecondCopy.packs`."""
        with contextlib.suppress(RegistryError):
            return names_of(self._packs, ".safetensors")
        return ()

    def size(self, pack: str) -> int:
        """See `SecondCopy.size`."""
        with contextlib.suppress(RegistryError, OSError):
            status = places.status_of(pack_path(self._packs, pack), inner=INNER)
            return status.st_size if status else 0
        return 0

    def read(self, pack: str, start: int, size: int) -> bytes:
        """See `SecondCopy.read`. A block that the disk cannot read counts as damaged."""
        # The name of a pack may be read before the size of its tensors is known to be one that exists.
        size = max(0, min(size, self.size(pack) - start))
        with (
            contextlib.suppress(RegistryError, OSError),
            open_regular(pack_path(self._packs, pack), inner=INNER) as file,
            memoryview(bytearray(size)) as data,
        ):
            done = 0
            while done < size and (count := os.preadv(file.fileno(), [data[done:]], start + done)):
                done += count
            return bytes(data[:done])
        return b""

    def manifest(self, manifest_id: str) -> bytes:
        """See `SecondCopy.manifest`."""
        if is_digest(manifest_id):
            path = self.root / "manifests" / manifest_id[:2] / f"{manifest_id}.json"
            with contextlib.suppress(RegistryError, OSError):
                return places.read_file(path, MAX_SIZE + 1, inner=INNER)
        return b""

    def entries(self, numbers: range) -> Iterator[Entry]:
        """See `SecondCopy.entries`."""
        # What a newer program wrote is read up to there.
        with contextlib.suppress(RegistryError, OSError):
            for line in Journal(self.root).read():
                if line.entry is not None and line.entry.seq in numbers:
                    yield line.entry

    def header(self, pack: str) -> Mapping[str, Any] | None:
        """See `SecondCopy.header`."""
        for read, path in (
            (heads.text_in, pack_path(self._packs, pack)),
            (heads.text_kept_in, heads.head_path(self._heads, pack)),
        ):
            with contextlib.suppress(RegistryError, UnicodeDecodeError):
                text, head, size = read(path)
                return {"digest": pack, "size": size, "head": head, "header": text.decode()}
        return None


class BucketCopy:
    """A bucket of a shared registry; a `SecondCopy`."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket
        self.place = bucket.url
        self._read: tuple[str, int, bytes] = ("", 0, b"")
        self._headers: dict[str, Mapping[str, Any]] = {}

    @functools.cached_property
    def _sizes(self) -> Mapping[str, int]:
        sizes = {}
        for held in self._bucket.list(PACKS):
            digest = held.key.rpartition("/")[2].removesuffix(".safetensors")
            if is_digest(digest) and held.key == pack_key(digest):
                sizes[digest] = held.size
        return sizes

    def packs(self) -> Iterable[str]:
        """See `SecondCopy.packs`."""
        return sorted(self._sizes)

    def size(self, pack: str) -> int:
        """See `SecondCopy.size`."""
        return self._sizes.get(pack, 0)

    def read(self, pack: str, start: int, size: int) -> bytes:
        """See `SecondCopy.read`. More than was asked for is brought, as what lies behind is asked for next."""
        name, first, data = self._read
        if pack != name or not first <= start <= start + size <= first + len(data):
            if pack not in self._sizes or start >= self._sizes[pack]:
                return b""
            first, data = start, b""
            with contextlib.suppress(Corrupt):
                data = self._bucket.get_range(pack_key(pack), start, max(size, _PART)) or b""
            self._read = pack, first, data
        return data[start - first : start - first + size]

    def manifest(self, manifest_id: str) -> bytes:
        """A bucket has manifests in its log alone."""
        return b""

    def entries(self, numbers: range) -> Iterator[Entry]:
        """See `SecondCopy.entries`."""
        for number in numbers:
            with contextlib.suppress(Corrupt):
                data = self._bucket.get(entry_key(number), _LARGEST)
                if data is None:
                    continue
                entry, found = unpacked(data)
                self._headers |= {one["digest"]: one for one in found}
                if entry.seq == number:
                    yield entry

    def header(self, pack: str) -> Mapping[str, Any] | None:
        """See `SecondCopy.header`."""
        return self._headers.get(pack)


def second_copy(place: str) -> FolderCopy | BucketCopy:
    """The second copy at a place.

    Args:
        place: a folder, or a URL.

    Raises:
        NotFound: if no registry is there.
        StorageError: if it cannot be read.
        Invalid: if the URL is malformed, or there are no keys.
    """
    if is_url(place):
        found: FolderCopy | BucketCopy = BucketCopy(open_remote(place).bucket)
        try:
            is_there = next(iter(found.entries(range(1, 2))), None) is not None or any(found.packs())
        except Absent:
            is_there = False
    else:
        root = Path(os.path.abspath(place))
        found = FolderCopy(root)
        with storage_errors(root):
            names = os.listdir(root) if os.path.isdir(root) else []
        is_there = not {"packs", "manifests", "journal"}.isdisjoint(names)
        for name in ("packs", "manifests", "journal"):
            if name in names and not os.access(root / name, os.R_OK | os.X_OK):
                raise StorageError(f"{root / name}: permission denied", "ask its owner for access")
    if not is_there:
        raise NotFound(f"there is no registry at {place}", "give the folder or the URL of a second copy")
    return found
