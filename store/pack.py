"""Packs: immutable safetensors files whose tensor names are digests.

A pack is named by the digest of its header, which in turn names the digest of every tensor, so the name covers
every byte. A salt in the header makes the name one that no other pack has or had. Tensors start at multiples of 64
bytes; safetensors allows no holes, so entries named `pad.<n>` of zero bytes fill the gaps.
"""

from __future__ import annotations

import functools
import mmap
import os
import re
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from registry.store import header
from registry.store.digest import digest as digest_of
from registry.store.digest import is_digest, salt, tensor_digest, tensor_hasher
from registry.store.dtypes import BY_CODE, ELEMENT_TYPES, byte_count
from registry.store.durable import NewFile
from registry.store.errors import Conflict, Corrupt, Invalid, Unsupported, storage_errors
from registry.store.locating import Location
from registry.store.places import open_regular
from registry.store.text import quoted

ALIGNMENT = 64
INNER = 2
"""Folders that a pack or a manifest is in, below the registry's own: `packs/ab`."""

_DIGEST = 64
_LONGEST_CODE = max(map(len, BY_CODE))
_LONGEST_OPAQUE = max(len(name) for name, kind in ELEMENT_TYPES.items() if kind.pack_code is None)
"""Characters of the longest name of an *opaque* type: one that has no code in a pack, and stands there as U8."""

_FORMAT = re.compile("torch-registry pack ([0-9]{1,9})")
_VERSION = 2
"""The latest version of packs. One in which nothing is coded, or only as older programs can, says 1, so that older programs read it."""

_ALONE = "self"
"""What stands for the base of a tensor that is coded by itself."""

_MOST_TIMES = 1 << 18
"""How many times smaller such a tensor can be in a pack. It bounds the memory that a malformed one takes."""

_COALESCE = 64 << 10
"""Bytes below which a tensor is written together with its neighbours."""

_BUFFER = 1 << 20
"""Bytes that are collected for one such write."""

_LARGE_FILE = 1 << 20
"""Bytes from which on a user's file stays in the memory that it was read into."""


class PackedTensor(NamedTuple):
    """Where a tensor lies in a pack; `start` counts bytes from the start of the file.

    Attributes:
        base: digest of the tensor that it is stored as a difference from, if it is.
        coded: how many bytes it takes if it is coded: as a difference, or by itself.
    """

    digest: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    base: str | None = None
    coded: int | None = None

    @property
    def is_coded(self) -> bool:
        """Whether the bytes in the pack are not the tensor's own."""
        return self.coded is not None

    @property
    def size(self) -> int:
        """Bytes in the pack."""
        return byte_count(self.dtype, self.shape) if self.coded is None else self.coded


@dataclass(frozen=True)
class PackInfo:
    """What a pack holds; its size is in bytes."""

    digest: str
    size: int
    tensors: tuple[PackedTensor, ...]

    @functools.cached_property
    def places(self) -> Mapping[str, Location]:
        """Where each tensor lies, by digest. Of one that is there twice, the place where it needs least to be read."""
        places = [
            (
                tensor.digest,
                Location(
                    pack=self.digest,
                    start=tensor.start,
                    pack_size=self.size,
                    base=tensor.base,
                    coded=tensor.coded,
                ),
            )
            for tensor in self.tensors
        ]
        return dict(sorted(places, key=lambda place: place[1].rank, reverse=True))


class Changed(Exception):
    """Tensors changed between being hashed and being written, so that a pack does not hold what it should.

    Attributes:
        digests: those of the tensors as they were hashed.
    """

    def __init__(self, digests: frozenset[str]) -> None:
        super().__init__(f"{len(digests)} tensors changed")
        self.digests = digests


class PackWriter:
    """Writes one pack; after an error only `discard` may follow.

    Args:
        tmp: folder on the same file system as the packs.
        candidates: dtype and shape of every tensor that may be added, which bounds the header's size.
        coded: likewise, of those that may be added coded.

    Raises:
        Unsupported: if there are so many that the header would be larger than a reader takes.
    """

    def __init__(
        self,
        tmp: Path,
        candidates: Iterable[tuple[str, Sequence[int]]],
        *,
        coded: Iterable[tuple[str, Sequence[int]]] = (),
    ) -> None:
        bound = index_bound(candidates) + sum(coded_bound(dtype, shape) for dtype, shape in coded)
        self._head = header.padded(bound)
        if not header.has_room(bound):
            raise Unsupported(
                f"the index of this save's new tensors would take {self._head >> 20} MB, at most "
                f"{header.MAX_HEADER >> 20} are stored",
                "stack small tensors into larger ones, or save in parts",
            )
        self._file = NewFile(tmp)
        self._lock = threading.Lock()
        self._end = self._head
        self._buffer = bytearray()
        self._buffer_start = 0
        self._tensors: list[PackedTensor] = []
        self._changed: set[str] = set()
        self._version = 1

    def add(
        self,
        digest: str,
        dtype: str,
        shape: Sequence[int],
        data: memoryview,
        *,
        is_sure: bool = True,
        fingerprint: bytes | None = None,
    ) -> None:
        """Add a tensor.

        Args:
            is_sure: whether nobody can have changed the bytes since they were hashed. Otherwise they are written from a
                copy that is checked, and `finish` tells of those that had changed.
            fingerprint: what to check them by, if this process has found it; else they are hashed again.
        """
        start = self.reserve(len(data))
        self.add_written(digest, dtype, shape, start)
        if is_sure:
            self._write(data, start)
        elif not self._write_checked(self._tensors[-1], data, fingerprint):
            self._changed.add(digest)

    def add_coded(
        self, digest: str, dtype: str, shape: Sequence[int], base: str | None, coded: memoryview
    ) -> None:
        """Add a tensor as its difference from another one, or coded by itself if there is no base."""
        start = self.reserve(len(coded))
        self._version = max(self._version, version_of(coded) if base else _VERSION)
        self._tensors.append(
            PackedTensor(digest, dtype, shape=tuple(shape), start=start, base=base, coded=len(coded))
        )
        self._write(coded, start)

    def reserve(self, size: int) -> int:
        """Room in the file for a tensor of so many bytes, which then is written, added as written, or left; from any thread.

        Returns:
            Where it begins, in bytes from the start of the file.
        """
        if size == 0:
            # Behind the last byte it would need bytes before it that nobody writes.
            return self._head
        with self._lock:
            start = -(-self._end // ALIGNMENT) * ALIGNMENT
            self._end = start + size
        return start

    def write(self, part: memoryview, start: int) -> None:
        """Write a part of a tensor into room that was reserved; from any thread."""
        self._file.write_at(part, start)

    def add_written(self, digest: str, dtype: str, shape: Sequence[int], start: int) -> None:
        """Add a tensor that was written, or will be, into room that was reserved."""
        self._tensors.append(PackedTensor(digest, dtype, shape=tuple(shape), start=start))

    def leave(self, start: int, size: int) -> None:
        """Leave room that was reserved, and perhaps written, unused: it holds zeros."""
        zeros = memoryview(bytes(min(size, _BUFFER)))
        for done in range(0, size, _BUFFER):
            self._file.write_at(zeros[: size - done], start + done)

    def finish(self, packs: Path) -> PackInfo:
        """Publish the pack below `packs`, durably.

        Raises:
            Changed: if the bytes of a tensor that was added as not sure had changed; nothing is published.
        """
        if self._changed:
            raise Changed(frozenset(self._changed))
        self._flush()
        # Those without bytes come before the one that begins where they are.
        tensors = sorted(self._tensors, key=lambda tensor: (tensor.start, tensor.size))
        about = {"format": f"torch-registry pack {self._version}", "salt": salt()}
        text = header.render(self._laid_out(tensors, about), about)
        head = header.framed(text, self._head)
        name = digest_of(head)
        self._file.write_at(head, 0)
        self._file.skip_to(self._end)
        self._file.sync(head)
        self._file.publish(pack_path(packs, name))
        return PackInfo(name, self._end, tuple(tensors))

    def discard(self) -> None:
        """Remove what was written."""
        self._file.discard()

    def _laid_out(
        self, tensors: Iterable[PackedTensor], about: dict[str, str]
    ) -> list[tuple[str, str, Sequence[int], int, int]]:
        """The entries of the header: in order, and without holes, as safetensors wants it.

        Args:
            tensors: sorted by where they begin.
            about: is given the types that safetensors lacks, by name.
        """
        laid_out: list[tuple[str, str, Sequence[int], int, int]] = []
        position = self._head

        def lay(name: str, code: str, shape: Sequence[int], size: int) -> None:
            nonlocal position
            start = position - self._head
            laid_out.append((name, code, shape, start, start + size))
            position += size

        def pad(end: int) -> None:
            if end > position:
                lay(f"pad.{len(laid_out)}", "U8", (end - position,), end - position)

        for tensor in tensors:
            pad(tensor.start)
            name = f"{tensor.digest}.{tensor.base or _ALONE}" if tensor.is_coded else tensor.digest
            code = None if tensor.is_coded else ELEMENT_TYPES[tensor.dtype].pack_code
            if code is not None:
                lay(name, code, tensor.shape, tensor.size)
            else:
                about[name] = _type_and_shape(tensor.dtype, tensor.shape)
                lay(name, "U8", (tensor.size,), tensor.size)
        pad(self._end)
        return laid_out

    def _write(self, data: memoryview, start: int) -> None:
        """Write a tensor's bytes; small neighbours are collected, and written together."""
        if len(data) >= _COALESCE:
            self._file.write_at(data, start)
            return
        gap = start - self._buffer_start - len(self._buffer)
        if self._buffer and 0 <= gap < ALIGNMENT and len(self._buffer) < _BUFFER:
            self._buffer += bytes(gap)
        else:
            self._flush()
            self._buffer_start = start
        self._buffer += data

    def _write_checked(self, tensor: PackedTensor, data: memoryview, fingerprint: bytes | None) -> bool:
        """Write from a copy, and tell whether that has the fingerprint, or the tensor's digest if there is none."""
        # Lazy: loads numpy.
        from registry.store.fingerprints import copied, remembered

        if len(data) < _COALESCE:
            copy = bytes(data)
            self._write(memoryview(copy), tensor.start)
            if fingerprint:
                return remembered.fingerprint(copy) == fingerprint
            return tensor_digest(tensor.dtype, tensor.shape, copy) == tensor.digest
        check = remembered.fingerprinting() if fingerprint else tensor_hasher(tensor.dtype, tensor.shape, 1)
        start = tensor.start

        def write(part: memoryview) -> None:
            nonlocal start
            check.update(part)
            self._write(part, start)
            start += len(part)

        copied(data, write)
        return check.digest() == (fingerprint or bytes.fromhex(tensor.digest))

    def _flush(self) -> None:
        if self._buffer:
            self._file.write_at(self._buffer, self._buffer_start)
            self._buffer = bytearray()


def version_of(coded: memoryview) -> int:
    """The version of packs that may have a difference: its first number is 0 only from version 2 on."""
    return 2 if bytes(coded[:4]) == bytes(4) else 1


def _type_and_shape(dtype: str, shape: Sequence[int]) -> str:
    return f"{dtype} {','.join(map(str, shape))}"


def index_bound(tensors: Iterable[tuple[str, Sequence[int]]]) -> int:
    """Bytes of header that tensors take at most if none of them is coded."""
    kinds = Counter((dtype, tuple(shape)) for dtype, shape in tensors)
    return 128 + sum(count * _entry_bound(dtype, shape) for (dtype, shape), count in kinds.items())


def coded_bound(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of header that a tensor takes at most beyond its entry if it is coded."""
    return 3 * 65 + len(_type_and_shape(dtype, shape)) + len('"":"",')


def _entry_bound(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of header that a tensor takes at most, its padding entry and opaque type included."""
    dimensions = sum(len(str(n)) + 1 for n in shape)
    entry = (
        _DIGEST + _LONGEST_CODE + len('"":{"dtype":"","shape":[],"data_offsets":[,]},') + dimensions + 2 * 15
    )
    padding = len('"pad.1000000":{"dtype":"U8","shape":[63],"data_offsets":[,]},') + 2 * 15
    if ELEMENT_TYPES[dtype].pack_code is not None:
        return entry + padding
    return entry + padding + _DIGEST + _LONGEST_OPAQUE + len('"":" ",') + dimensions


def pack_path(packs: Path, digest: str) -> Path:
    """Where a pack's file is.

    Raises:
        Corrupt: if that is no digest, and so might name any file.
    """
    if not is_digest(digest):
        raise Corrupt(
            f"the catalog names a pack {quoted(digest)}, which is not a digest", "run: registry rebuild"
        )
    return packs / digest[:2] / f"{digest}.safetensors"


def read_pack_info(path: Path) -> PackInfo:
    """Read a pack's header and check it against the pack's name.

    Raises:
        Corrupt: if the file is missing, cut short, or its header is not the one that its name covers.
        Unsupported: if a newer program wrote it.
    """
    with open_regular(path, inner=INNER) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            head = file.read(8)
            length = header.announced_length(head, size)
            head += file.read(length)
            parsed = header.parse(head, size)
        except Invalid as error:
            raise Corrupt(f"{path}: {error}") from None
    name = path.name.removesuffix(".safetensors")
    if digest_of(head) != name:
        raise Corrupt(f"{path}: the header is not the one that the file's name covers")
    try:
        return info_from(name, parsed, size)
    except Invalid as error:
        raise Corrupt(f"{path}: {error}") from None


def info_from(name: str, parsed: header.Header, size: int) -> PackInfo:
    """What a pack holds, from its header.

    Args:
        size: of its file, in bytes.

    Raises:
        Invalid: naming the tensor that has a malformed type.
        Unsupported: if a newer program wrote it.
    """
    version = _FORMAT.fullmatch(parsed.metadata.get("format", ""))
    if version and int(version[1]) > _VERSION:
        raise Unsupported(
            f"pack {name[:12]} was written by a newer torch-registry: it has version {version[1]}, and this one reads {_VERSION}",
            "upgrade with: pip install -U torch-registry",
        )
    tensors = []
    for entry in parsed.entries:
        digest, dot, base = entry.name.partition(".")
        if dot and is_digest(digest) and (is_digest(base) or base == _ALONE):
            dtype, shape = _opaque(parsed.metadata.get(entry.name, ""))
            coded = entry.end - entry.start
            is_right = dtype in ELEMENT_TYPES and entry.code == "U8"
            if not is_right or (base == _ALONE and byte_count(dtype, shape) > _MOST_TIMES * coded):
                raise Invalid(f"tensor {entry.name} has a malformed type")
            tensors.append(
                PackedTensor(
                    digest,
                    dtype,
                    shape=shape,
                    start=entry.start,
                    base=None if base == _ALONE else base,
                    coded=coded,
                )
            )
            continue
        if not is_digest(entry.name):
            continue
        dtype, shape = BY_CODE.get(entry.code, ""), entry.shape
        if entry.name in parsed.metadata:
            dtype, shape = _opaque(parsed.metadata[entry.name])
        if dtype not in ELEMENT_TYPES or byte_count(dtype, shape) != entry.end - entry.start:
            raise Invalid(f"tensor {entry.name} has a malformed type")
        tensors.append(PackedTensor(entry.name, dtype, shape=shape, start=entry.start))
    return PackInfo(name, size, tuple(tensors))


def _opaque(text: str) -> tuple[str, tuple[int, ...]]:
    """Element type and shape as they stand in a pack's metadata; no type if they are malformed."""
    dtype, _, dimensions = text.partition(" ")
    sizes = dimensions.split(",") if dimensions else []
    if len(sizes) > header.MAX_DIMENSIONS or not all(re.fullmatch("[0-9]{1,18}", n) for n in sizes):
        return "", ()
    return dtype, tuple(map(int, sizes))


def map_file(path: Path, size: int, *, inner: int = 0) -> mmap.mmap:
    """Map a file copy-on-write: what is written to the mapping never reaches the file.

    Args:
        size: how many bytes the file must have.
        inner: as for `open_regular`.

    Raises:
        Corrupt: if the file does not have `size` bytes.
    """
    with open_regular(path, inner=inner) as file, storage_errors(path):
        actual = os.fstat(file.fileno()).st_size
        if actual != size:
            raise Corrupt(f"{path}: has {actual} bytes instead of {size}")
        return mmap.mmap(file.fileno(), size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)


def contents_of(path: Path) -> tuple[os.stat_result, bytes | mmap.mmap]:
    """A user's file byte for byte, in memory, and its status.

    It is read, not mapped: a mapped file that is cut short meanwhile ends the process.

    Raises:
        Conflict: if somebody is writing to it.
        Corrupt: if it is no regular file.
        Invalid: if its size is not that of its bytes, as of a file in /proc.
        StorageError: if the system refuses.
    """
    with open_regular(path) as file, storage_errors(path):
        status = os.fstat(file.fileno())
        size, count = status.st_size, 0
        data = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with memoryview(data) as whole:
            while count < size and (part := os.preadv(file.fileno(), [whole[count:size]], count)):
                count += part
        is_whole = count == size and not os.pread(file.fileno(), 1, size)
        now = os.fstat(file.fileno())
    if (now.st_size, now.st_mtime_ns) != (status.st_size, status.st_mtime_ns):
        raise Conflict(f"{path}: changed while it was read", "repeat it when nobody writes to it")
    if not is_whole:
        raise Invalid(
            f"{path}: does not have the {size:,} bytes that its size says", "copy it and give the copy"
        )
    return status, data if size >= _LARGE_FILE else data[:size]
