"""The folders of a store: its packs and manifests by digest, and an index of what the packs hold.

Packs and manifests never change, so what was read of them is kept in memory.
"""

from __future__ import annotations

import contextlib
import re
import stat
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Container, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from registry.store.digest import digest as digest_of
from registry.store.digest import is_digest
from registry.store.durable import write_file
from registry.store.errors import Corrupt, Invalid, Missing, NotFound, StorageError, storage_errors
from registry.store.locating import Index, Location, Part
from registry.store.manifest import MAX_SIZE, Manifest, TensorInfo, parse
from registry.store.pack import INNER, PackInfo, pack_path, read_pack_info
from registry.store.places import names_in, open_regular, status_of
from registry.store.text import quoted

_MOST_KEPT = 200_000
"""Tensors that all headers in memory list together, at most."""

_MOST_MANIFESTS = 256
"""Manifests whose tensors are kept in memory, at most."""

_REQUEST = 1 << 20
"""Bytes that cost as much time as a request does."""

_SHARD = re.compile(r"[0-9a-f]{2}\Z")


class Elsewhere(Protocol):
    """Where packs lie that this host has only the headers of."""

    def info(self, digest: str) -> PackInfo:
        """What a pack holds.

        Raises:
            Corrupt: if it is not there, or its header is not the one that its name covers.
            StorageError: if the place cannot be reached.
        """
        ...

    def has(self, digest: str, size: int) -> bool:
        """Whether a pack of this size is there, as far as this host knows."""
        ...

    def used(self, packs: Collection[str]) -> None:
        """Note that packs of this host are used."""
        ...

    def ages(self) -> Mapping[str, tuple[float, int]]:
        """All packs that lie there: seconds by which each is older than the newest one, and bytes.

        Raises:
            StorageError: if the place cannot be reached.
        """
        ...

    def delete(self, packs: Collection[str]) -> None:
        """Delete packs that were doomed; one that is not there is fine.

        Raises:
            StorageError: if the place cannot be reached, or refuses.
        """
        ...

    def read(self, parts: Mapping[Part, int]) -> Mapping[Part, memoryview]:
        """Parts of packs, with their bytes, in memory of their own; nothing is kept.

        Raises:
            Corrupt: if a pack is not there, or ends before.
            StorageError: if the place cannot be reached.
        """
        ...

    def undisturbed(self) -> AbstractContextManager[None]:
        """While it lasts, what `fetch` brings stays here, as no process of this host removes packs."""
        ...

    def fetch(self, packs: Mapping[str, int]) -> None:
        """Bring packs of some sizes, in bytes, to this host. Those that were used longest ago may go for it.

        Raises:
            Corrupt: if one is not there, or not what its name covers.
            StorageError: if the place cannot be reached.
        """
        ...


class Headers:
    """Headers of packs in memory, those that were asked for first leaving first; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[object, PackInfo] = OrderedDict()
        self._size = 0

    def get(self, key: object) -> PackInfo | None:
        with self._lock:
            return self._kept.get(key)

    def keep(self, key: object, info: PackInfo) -> None:
        with self._lock:
            if key not in self._kept:
                self._kept[key] = info
                self._size += len(info.tensors)
                while self._size > _MOST_KEPT and len(self._kept) > 1:
                    _, oldest = self._kept.popitem(last=False)
                    self._size -= len(oldest.tensors)


_headers_of_files = Headers()
"""State of the process: headers that were read and checked, by digest and what the system knows of the file. A registry that
is opened again need not read them again."""


class PackFolder:
    """The packs of a store; safe to use from several threads.

    Args:
        folder: where they lie.
        elsewhere: has those that are not there.
    """

    def __init__(self, folder: Path, elsewhere: Elsewhere | None = None) -> None:
        self._folder = folder
        self._elsewhere = elsewhere
        self._kept = Headers()
        self._lock = threading.Lock()
        # Bytes that were asked of packs that are not here, and what the requests cost.
        self._asked: dict[str, int] = {}

    def path(self, digest: str) -> Path:
        """Where a pack's file is; see `registry.store.pack.pack_path`."""
        return pack_path(self._folder, digest)

    def digests(self) -> list[str]:
        """The digests of all pack files, sorted; see `names_of`."""
        return names_of(self._folder, ".safetensors")

    def is_whole(self, digest: str, size: int) -> bool:
        """Whether a pack's file is there in its full size, in bytes; here or elsewhere."""
        is_here = self.is_here(digest, size)
        return is_here or (self._elsewhere is not None and self._elsewhere.has(digest, size))

    def is_here(self, digest: str, size: int) -> bool:
        """Whether a pack's file is in the folder in its full size, in bytes."""
        status = status_of(self.path(digest), inner=INNER)
        return status is not None and stat.S_ISREG(status.st_mode) and status.st_size == size

    def bring(self, packs: Mapping[str, int]) -> None:
        """Bring those of some packs, of sizes in bytes, that lie elsewhere.

        Raises:
            Corrupt, StorageError: as `Elsewhere.fetch`.
        """
        if self._elsewhere is not None:
            absent = {digest: size for digest, size in packs.items() if not self.is_here(digest, size)}
            if absent:
                self._elsewhere.fetch(absent)
            self._elsewhere.used(packs.keys() - absent.keys())

    def bring_parts(self, parts: Mapping[Part, int], sizes: Mapping[str, int]) -> Mapping[Part, memoryview]:
        """Bring what is needed of packs that lie elsewhere; see `registry.store.locating.Packs`.

        A pack of which much is needed, sooner or later, is brought whole and kept.
        """
        if self._elsewhere is None:
            return {}
        absent = {pack for pack, size in sizes.items() if not self.is_here(pack, size)}
        costs = dict.fromkeys(absent, 0)
        for (pack, _), size in parts.items():
            if pack in absent:
                costs[pack] += size
        with self._lock:
            for pack, cost in costs.items():
                costs[pack] = self._asked[pack] = self._asked.get(pack, 0) + cost + _REQUEST
        whole = {pack for pack in absent if 2 * costs[pack] >= sizes[pack]}
        self.bring({pack: size for pack, size in sizes.items() if pack not in absent - whole})
        few = {part: size for part, size in parts.items() if part[0] in absent - whole}
        return self._elsewhere.read(few) if few else {}

    def info(self, digest: str) -> PackInfo:
        """What a pack holds, from its header, which is kept in memory.

        Raises:
            Corrupt: if the header is not the one that the pack's name covers.
        """
        found = self._kept.get(digest)
        if found is None:
            found = self._read(digest)
            self._kept.keep(digest, found)
        return found

    def listed(self, digest: str, only: Container[str]) -> Iterable[tuple[TensorInfo, int]]:
        """Those of some tensors that a pack's header lists, and the first byte of each.

        Args:
            digest: the pack's.
            only: digests of the tensors.

        Raises:
            Corrupt: as `info`.
        """
        for tensor in self.info(digest).tensors:
            if tensor.digest in only:
                yield TensorInfo(tensor.dtype, tensor.shape, tensor.digest), tensor.start

    def keep(self, info: PackInfo) -> None:
        """Keep the header of a pack that was just written, and compared with its file, in memory."""
        self._kept.keep(info.digest, info)
        if file := self._file(info.digest):
            _headers_of_files.keep(file, info)

    def _read(self, digest: str) -> PackInfo:
        file = self._file(digest)
        if file and (found := _headers_of_files.get(file)):
            return found
        try:
            found = read_pack_info(self.path(digest))
        except Corrupt:
            # It is missing or damaged here.
            if self._elsewhere is None:
                raise
            return self._elsewhere.info(digest)
        if file:
            _headers_of_files.keep(file, found)
        return found

    def _file(self, digest: str) -> tuple[object, ...] | None:
        """What tells the file of a pack, as it is now, from any other; None if there is none."""
        path = self.path(digest)
        with storage_errors(path):
            status = status_of(path, inner=INNER)
        if status is None or not stat.S_ISREG(status.st_mode):
            return None
        return digest, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


class ManifestFolder:
    """The manifests of a store; safe to use from several threads.

    Args:
        folder: where they lie.
        tmp: where a new one lies until it is complete.
        index: gives a second copy of one whose file is missing or damaged.
    """

    def __init__(self, folder: Path, tmp: Path, index: Index) -> None:
        self._folder = folder
        self._tmp = tmp
        self._index = index
        self._lock = threading.Lock()
        self._tensors: OrderedDict[str, frozenset[str]] = OrderedDict()
        self._written: tuple[str, Manifest] | None = None
        self._recent: tuple[tuple[object, ...], Manifest] | None = None

    def path(self, digest: str) -> Path:
        """Where a manifest's file is.

        Raises:
            Corrupt: if that is no digest, and so might name any file.
        """
        if not is_digest(digest):
            raise Corrupt(f"{quoted(digest)} names no manifest, as it is not a digest")
        return self._folder / digest[:2] / f"{digest}.json"

    def digests(self) -> list[str]:
        """The digests of all manifest files, sorted; see `names_of`."""
        return names_of(self._folder, ".json")

    def has(self, digest: str) -> bool:
        """Whether a manifest of this digest is stored."""
        status = status_of(self.path(digest), inner=INNER) if is_digest(digest) else None
        return status is not None and stat.S_ISREG(status.st_mode)

    def write(self, manifest: Manifest) -> tuple[str, bytes]:
        """Write a manifest, and return its digest and its bytes.

        It is durable, unless the index keeps a second copy.

        Raises:
            Invalid: if it is too large.
        """
        data = manifest.render()
        if len(data) > MAX_SIZE:
            raise Invalid(
                f"the plain values of this checkpoint take {len(data) >> 20} MB, at most {MAX_SIZE >> 20} are "
                "stored",
                "put long lists into tensors or arrays",
            )
        digest = digest_of(data)
        self._write(digest, data)
        return digest, data

    def read(self, digest: str, *, text_of: Callable[[str], bytes | None] | None = None) -> Manifest:
        """Read a manifest and check it against its digest; needs no torch.

        Args:
            text_of: gives a second copy, where the file is missing or damaged; by default the index does, and the file
                is written again.

        Raises:
            Invalid: if this is no digest.
            NotFound: if it is not stored.
            Corrupt: if its bytes are not what was saved.
        """
        if not is_digest(digest):
            raise Invalid(f"{quoted(digest)} is not a digest of 64 hex digits")
        path = self.path(digest)
        try:
            with open_regular(path, inner=INNER) as file:
                data = file.read(MAX_SIZE + 1)
            if digest_of(data) != digest:
                raise Corrupt(
                    f"{path}: the manifest is not what was saved",
                    "put it back with: registry repair --from A-COPY",
                )
        except Corrupt as error:
            text = (text_of or self._index.manifest_text)(digest)
            if text is None or digest_of(text) != digest:
                if isinstance(error, Missing):
                    raise NotFound(f"{path}: the manifest is missing") from None
                raise
            data = text
            if text_of is None:
                with contextlib.suppress(StorageError):
                    self._write(digest, data)
        return parse(data)

    def recent(self, digest: str) -> Manifest:
        """As `read`, but the last manifest is not read again while its file stays as it was."""
        status = status_of(self.path(digest), inner=INNER) if is_digest(digest) else None
        if status is None:
            return self.read(digest)
        state = (digest, status.st_ino, status.st_size, status.st_mtime_ns)
        if self._recent is None or self._recent[0] != state:
            self._recent = state, self.read(digest)
        return self._recent[1]

    def tensors_of(
        self, digest: str, *, text_of: Callable[[str], bytes | None] | None = None
    ) -> frozenset[str]:
        """The digests of a manifest's tensors, which are kept in memory.

        Raises:
            NotFound, Corrupt: as `read`.
        """
        with self._lock:
            found = self._tensors.get(digest)
        if found is None:
            manifest = self.just_written(digest) or self.read(digest, text_of=text_of)
            found = frozenset(tensor.digest for tensor in manifest.tensors)
            with self._lock:
                self._tensors[digest] = found
                while len(self._tensors) > _MOST_MANIFESTS:
                    self._tensors.popitem(last=False)
        return found

    def keep(self, digest: str, manifest: Manifest) -> None:
        """Keep a manifest that was just written, until the next one is."""
        self._written = digest, manifest

    def just_written(self, digest: str) -> Manifest | None:
        """The manifest of this digest, if it is the last one that was written here."""
        written = self._written
        return written[1] if written and written[0] == digest else None

    def _write(self, digest: str, data: bytes) -> None:
        write_file(
            self.path(digest),
            data,
            folder=self._tmp,
            inner=INNER,
            read_only=True,
            is_durable=not self._index.keeps(data),
        )


class FolderIndex:
    """Finds tensors by reading the headers of the packs in a folder; for a store without a catalog.

    It is an `Index`, and safe to use from several threads.
    """

    def __init__(self, packs: Path) -> None:
        self._packs = packs
        self._read: set[str] = set()
        self._located: dict[str, Location] = {}
        self._lock = threading.Lock()

    def locate(self, digests: Collection[str]) -> dict[str, Location]:
        """The locations of those of the digests that are stored.

        Raises:
            Corrupt: if the header of a pack cannot be read.
        """
        with self._lock:
            self._refresh()
            return {digest: self._located[digest] for digest in digests if digest in self._located}

    def manifest_text(self, manifest_id: str) -> bytes | None:
        """There is no second copy."""
        return None

    def keeps(self, text: bytes) -> bool:
        """There is no second copy."""
        return False

    def look_again(self) -> None:
        """A folder is looked at for each question."""

    def was_removed(self, manifest_id: str) -> bool:
        """A folder does not tell what was removed."""
        return False

    def _refresh(self) -> None:
        present = names_of(self._packs, ".safetensors")
        gone = self._read.difference(present)
        if gone:
            self._read.clear()
            self._located.clear()
        for name in present:
            if name not in self._read:
                info = read_pack_info(pack_path(self._packs, name))
                self._read.add(name)
                for digest, place in info.places.items():
                    known = self._located.setdefault(digest, place)
                    # One that takes less to read is better.
                    if place.rank < known.rank:
                        self._located[digest] = place


def names_of(folder: Path, suffix: str) -> list[str]:
    """The digests that files below a folder of packs or manifests are named by, sorted.

    Raises:
        Corrupt: if something else stands in the place of a folder.
    """
    found = []
    for part in names_in(folder, inner=1):
        if _SHARD.match(part):
            names = names_in(folder / part, inner=INNER)
            found += [name.removesuffix(suffix) for name in names if name.endswith(suffix)]
    return sorted(filter(is_digest, found))
