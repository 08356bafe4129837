"""The packs in a bucket, and what a host keeps of them: all headers, and the files that were needed here."""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import shutil
import threading
import time
from collections.abc import Collection, Container, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

from registry.remote.bucket import Bucket
from registry.store import durable, heads, places
from registry.store.digest import digest as digest_of
from registry.store.digest import is_digest
from registry.store.errors import Corrupt, Invalid, Missing, RegistryError, storage_errors
from registry.store.folder_index import Headers, names_of
from registry.store.header import MAX_HEADER
from registry.store.locating import Part
from registry.store.pack import INNER, PackInfo, pack_path
from registry.store.places import status_of
from registry.store.text import quoted

FOLDER = "packs"
_PART = 16 << 20
_AT_ONCE = 8
"""Requests that are under way at a time."""
_GAP = 1 << 20
"""Bytes between two parts of a pack that are brought too, so that one request brings both."""
_PATIENCE, _SLOW = 60.0, 1 << 20
"""Seconds for which another process may take to bring a pack, and bytes for each second more."""
_DELETED_AT_ONCE = 1000
_USED_LATELY = 3_600.0
_AMOUNT = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) ?GB\Z")


class _Run(NamedTuple):
    """Neighbouring parts of a pack, which are brought together.

    Attributes:
        parts: the first byte and the size of each.
        memory: where they go.
    """

    pack: str
    start: int
    size: int
    parts: Sequence[tuple[int, int]]
    memory: mmap.mmap


class RemotePacks:
    """The packs of a shared registry; a `registry.store.folder_index.Elsewhere`, safe to use from several threads.

    Args:
        bucket: where they lie.
        root: this host's folder.

    Attributes:
        bound: bytes of packs that it keeps, except those that are needed at the moment.
        was_missing: whether one was not there, since it was last asked what other hosts have added. They may have
            removed it, or stored its tensors anew.
    """

    def __init__(self, bucket: Bucket, root: Path) -> None:
        self._bucket = bucket
        self._packs, self._heads, self._tmp = root / FOLDER, root / heads.FOLDER, root / "tmp"
        self._lock = threading.Lock()
        self._uploaded: set[str] = set()
        # What an entry brings is asked for at once.
        self._checked = Headers()
        self.bound = cache_bound(root)
        self.was_missing = False

    def info(self, digest: str) -> PackInfo:
        """What a pack holds, from the header that is kept here, or from the bucket's."""
        if found := self._checked.get(digest):
            return found
        try:
            return heads.read(self._heads, digest)
        except Corrupt:
            # It is missing or damaged here.
            return self.keep_header(self._header_there(digest))

    def has(self, digest: str, size: int) -> bool:
        """Whether a pack of this size is in the bucket: an entry names it if its header is kept here."""
        if heads.size_of(self._heads, digest) == size:
            return True
        # A power cut may have taken the header.
        with contextlib.suppress(RegistryError):
            return self.info(digest).size == size
        return False

    def read(self, parts: Mapping[Part, int]) -> Mapping[Part, memoryview]:
        """Parts of packs, in memory of their own; neighbours come in one request, and several requests at a time."""
        runs = list(_runs(parts))
        jobs = [
            (run, done, min(_PART, run.size - done)) for run in runs for done in range(0, run.size, _PART)
        ]

        def bring(job: tuple[_Run, int, int]) -> None:
            run, done, size = job
            data = self._range(run.pack, run.start + done, size)
            if len(data) != size:
                raise self._odd(run.pack, "it is cut short")
            run.memory[done : done + size] = data

        with ThreadPoolExecutor(_AT_ONCE, "registry-read") as pool:
            _all_of([pool.submit(bring, job) for job in jobs])
        found = {}
        for run in runs:
            memory = memoryview(run.memory)
            for start, size in run.parts:
                found[run.pack, start] = memory[start - run.start : start - run.start + size]
        return found

    def fetch(self, packs: Mapping[str, int]) -> None:
        """Bring packs to this host's folder, each whole or not at all; those that were used longest ago may go for it.

        Several come at a time, and a large one in several parts. What another process brings is waited for.
        """
        with (
            ThreadPoolExecutor(_AT_ONCE, "registry-part") as parts,
            ThreadPoolExecutor(_AT_ONCE, "registry-fetch") as pool,
        ):
            _all_of([pool.submit(self._fetch, digest, size, parts) for digest, size in packs.items()])
        self._trim(packs)

    @contextlib.contextmanager
    def undisturbed(self) -> Iterator[None]:
        """While it lasts, what `fetch` brings stays here, as no process of this host removes packs."""
        with places.opened_folder(self._packs, 1) as folder:
            durable.lock(folder, seconds=_PATIENCE)
            try:
                yield
            finally:
                durable.unlock(folder)

    def used(self, packs: Collection[str]) -> None:
        """Note that packs of this host's folder are used."""
        for digest in packs:
            path = pack_path(self._packs, digest)
            status = status_of(path, inner=INNER)
            if status is not None and time.time() - status.st_mtime > _USED_LATELY:
                durable.mark_used(path, inner=INNER)

    def _trim(self, needed: Container[str]) -> None:
        """Remove packs of this host's folder that the bucket has, those first that were used longest ago.

        Only as many as lie above the bound, and none while somebody reads undisturbed. A program that has mapped one keeps it.
        """
        with places.opened_folder(self._packs, 1) as folder:
            if durable.try_lock(folder):
                try:
                    self._trim_alone(needed)
                finally:
                    durable.unlock(folder)

    def _trim_alone(self, needed: Container[str]) -> None:
        found = []
        for digest in names_of(self._packs, ".safetensors"):
            status = status_of(pack_path(self._packs, digest), inner=INNER)
            if status is not None:
                found.append((status.st_mtime, status.st_size, digest))
        excess = sum(size for _, size, _ in found) - self.bound
        for _, size, digest in sorted(found) if excess > 0 else ():
            # One whose header is not kept may be a save of this host that no entry names yet.
            if excess > 0 and digest not in needed and self.has(digest, size):
                durable.unlink(pack_path(self._packs, digest), inner=INNER)
                excess -= size

    def ages(self) -> Mapping[str, tuple[float, int]]:
        """All packs in the bucket: seconds by which each is older than the newest one, and bytes."""
        found = {}
        for held in self._bucket.list(FOLDER):
            digest = held.key.rpartition("/")[2].removesuffix(".safetensors")
            if is_digest(digest) and held.key == pack_key(digest):
                found[digest] = held
        newest = max((held.modified for held in found.values()), default=0.0)
        return {digest: (newest - held.modified, held.size) for digest, held in found.items()}

    def delete(self, packs: Collection[str]) -> None:
        """Delete packs that were doomed."""
        keys = [pack_key(digest) for digest in packs]
        for start in range(0, len(keys), _DELETED_AT_ONCE):
            self._bucket.delete(keys[start : start + _DELETED_AT_ONCE])

    def upload(self, packs: Collection[str]) -> None:
        """Bring packs of this host to the bucket, unless this process has done so."""
        for digest in packs:
            with self._lock:
                is_there = digest in self._uploaded
            # One that another host has uploaded, and that this one dooms, is not here.
            if not is_there and not heads.is_kept(self._heads, digest):
                if places.status_of(pack_path(self._packs, digest), inner=INNER) is None:
                    # Another process of this host has collected its file meanwhile, and the bucket may have it.
                    self.keep_header(self._header_there(digest))
                    continue
                self._bucket.put_file(pack_key(digest), pack_path(self._packs, digest))
                with self._lock:
                    self._uploaded.add(digest)

    def put_back(self, digest: str) -> None:
        """Bring a pack of this host to the bucket, in the place of one that is damaged or missing there."""
        self._bucket.put_file(pack_key(digest), pack_path(self._packs, digest))

    def headers(self, packs: Collection[str]) -> Sequence[Mapping[str, Any]]:
        """The headers of packs of this host, as an entry of the log carries them.

        Raises:
            Corrupt: if one is not there, or not what its name covers; such an entry no host could read.
        """
        return [self._header(digest) for digest in packs]

    def keep_header(self, found: Mapping[str, Any]) -> PackInfo:
        """Keep a header that an entry carries, if the pack's name covers it. Returns what the pack holds.

        Raises:
            Corrupt: if it does not.
        """
        digest, head, size = found["digest"], found["head"], found["size"]
        # What is no text in JSON's sense is found below, as no name covers it.
        text = found["header"].encode(errors="surrogatepass")
        info = heads.pack_of(digest, text, head, size)
        with storage_errors(self._heads):
            heads.write(self._heads, self._tmp, digest, text, head=head, size=size)
        self._checked.keep(digest, info)
        return info

    def _header(self, digest: str) -> Mapping[str, Any]:
        # It may be missing or damaged here.
        with contextlib.suppress(Corrupt):
            return self._header_in(digest, *heads.text_in(pack_path(self._packs, digest)))
        with contextlib.suppress(Corrupt):
            return self._header_in(digest, *heads.kept_text(self._heads, digest))
        found = self._header_there(digest)
        self.keep_header(found)
        return found

    @staticmethod
    def _header_in(digest: str, text: bytes, head: int, size: int) -> Mapping[str, Any]:
        heads.pack_of(digest, text, head, size)
        return {"digest": digest, "size": size, "head": head, "header": text.decode()}

    def _header_there(self, digest: str) -> Mapping[str, Any]:
        held = self._bucket.head(pack_key(digest))
        first = held and self._bucket.get_range(pack_key(digest), 0, 8)
        if not held or not first:
            raise self._missing(digest)
        length = int.from_bytes(first, "little")
        text = self._bucket.get_range(pack_key(digest), 8, length) if 0 < length <= MAX_HEADER else None
        try:
            header = (text or b"").rstrip(b" ").decode()
        except UnicodeDecodeError:
            header = ""
        return {"digest": digest, "size": held.size, "head": length + 8, "header": header}

    def _fetch(self, digest: str, size: int, pool: ThreadPoolExecutor) -> None:
        """Bring a pack, unless another process brings it meanwhile.

        Args:
            pool: brings its parts.
        """
        path = pack_path(self._packs, digest)
        with storage_errors(self._tmp):
            durable.make_folder(self._tmp, inner=1)
            with durable.alone(self._tmp / f"{digest}.fetch", seconds=_PATIENCE + size / _SLOW):
                status = status_of(path, inner=INNER)
                if status is None or status.st_size != size:
                    self._bring(digest, size, path, pool)

    def _bring(self, digest: str, size: int, path: Path, pool: ThreadPoolExecutor) -> None:
        file = durable.NewFile(self._tmp)

        def part(start: int) -> None:
            file.write_at(self._range(digest, start, min(_PART, size - start)), start)

        try:
            file.skip_to(size)
            _all_of([pool.submit(part, start) for start in range(0, size, _PART)])
            head = self._head_of(file)
            count = os.fstat(file.fd).st_size
            if count != size or digest_of(head) != digest:
                raise self._odd(digest, f"it has {count:,} of {size:,} bytes" if count != size else "")
            file.sync(head)
            file.publish(path, inner=INNER)
        except BaseException:
            file.discard()
            raise

    def _range(self, digest: str, start: int, size: int) -> bytes:
        data = self._bucket.get_range(pack_key(digest), start, size)
        if data is None:
            raise self._missing(digest)
        return data

    @staticmethod
    def _head_of(file: durable.NewFile) -> bytes:
        """What a pack's name covers: its header, with the length before it."""
        length = int.from_bytes(os.pread(file.fd, 8, 0), "little")
        return os.pread(file.fd, 8 + min(length, MAX_HEADER), 0)

    def _missing(self, digest: str) -> Missing:
        self.was_missing = True
        return Missing(f"{self._bucket.url}/{pack_key(digest)}: the pack is missing")

    def _odd(self, digest: str, problem: str) -> Corrupt:
        error = Corrupt(
            f"{self._bucket.url}/{pack_key(digest)}: the pack is not what was saved"
            f"{f' ({problem})' if problem else ''}",
            "put it back with: registry repair --from A-COPY",
        )
        error.pack = digest
        return error


def _runs(parts: Mapping[Part, int]) -> Iterator[_Run]:
    """Parts of packs, grouped into runs of neighbours."""
    group: list[tuple[int, int]] = []
    last, end = "", 0
    for (pack, start), size in [*sorted(parts.items()), (("", 0), 0)]:
        if group and (pack != last or start > end + _GAP):
            first = group[0][0]
            yield _Run(last, first, end - first, parts=group, memory=mmap.mmap(-1, end - first))
            group = []
        group.append((start, size))
        end = start + size if len(group) == 1 else max(end, start + size)
        last = pack


def _all_of(futures: Sequence[Future[None]]) -> None:
    """Wait until all is done; the first error ends what has not begun."""
    try:
        for future in futures:
            future.result()
    except BaseException:
        for future in futures:
            future.cancel()
        wait(futures)
        raise


def cache_bound(root: Path) -> int:
    """Bytes of packs that a host keeps: `REGISTRY_CACHE_SIZE`, else 50 GB or a fifth of the disk, the smaller.

    Raises:
        Invalid: if the variable is not an amount.
    """
    text = os.environ.get("REGISTRY_CACHE_SIZE")
    if text:
        match = _AMOUNT.match(text)
        if not match:
            raise Invalid(f"REGISTRY_CACHE_SIZE is {quoted(text)}; expected an amount in GB, such as 20GB")
        return int(float(match[1]) * 1e9)
    place = next(folder for folder in (root, *root.parents) if folder.exists())
    return min(50 * 10**9, shutil.disk_usage(place).total // 5)


def pack_key(digest: str) -> str:
    """The key of a pack in a bucket."""
    return f"{FOLDER}/{digest[:2]}/{digest}.safetensors"
