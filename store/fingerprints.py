"""Digests remembered: bytes that are still what they were when they were last hashed need not be hashed again.

Training saves the same tensors over and over, and those that are frozen do not change. XXH3 reads them several times
as fast as BLAKE3 does. Its 128 bits are a *fingerprint* and no cryptographic digest, so they never leave this process:
with a seed that nobody knows, they only tell whether the bytes at one place in memory are those whose digest was
computed there before. Every byte is read at every save.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import xxhash

from registry.store.digest import tensor_digest, tensor_hasher

SMALLEST = 4 << 10
"""Bytes below which hashing costs less than remembering."""

_PART = 1 << 20
_LARGE_PART = 8 << 20
"""Bytes that several cores hash at a time."""

_KEPT = 32 << 20
"""Bytes of memory that are kept for the copies of later saves."""

_MOST = 1 << 17
"""Entries that are kept, some 300 bytes each."""

Place = tuple[int, str, tuple[int, ...]]
"""Where a tensor lies in memory, its dtype and its shape."""


class _Entry(NamedTuple):
    """A digest that is remembered."""

    digest: str
    fingerprint: bytes | None
    """None for a tensor that had changed when it was last seen, and is expected to change again."""


class Remembered:
    """Digests of tensors by their places; safe to use from several threads."""

    def __init__(self) -> None:
        self._entries: dict[Place, _Entry] = {}
        self._seed = secrets.randbits(64)

    def digest(
        self,
        address: int,
        dtype: str,
        shape: tuple[int, ...],
        data: memoryview,
        *,
        threads: int = 1,
        memory: Callable[[], memoryview | None] = lambda: None,
        copied: bool = False,
    ) -> str:
        """As `tensor_digest`, of a tensor that may be the same as when it was last seen at its place.

        Args:
            address: where its values lie in memory; 0 if that tells nothing.
            memory: gives room for a copy, if there is any; called if the tensor has to be hashed. Then the copy has the
                bytes of the digest, whatever other threads do to the tensor.
            copied: make the copy in any case.
        """
        if not address or len(data) < SMALLEST:
            return _hash(dtype, shape, data, threads=threads, into=memory())
        place = (address, dtype, shape)
        before = self._entries.get(place)
        if before is None:
            return self._hash_and_remember(place, data, threads, memory())
        into = memory() if copied else None
        if before.fingerprint and before.fingerprint == self._fingerprint(data, into):
            return before.digest
        digest = _hash(dtype, shape, data, threads=threads, into=memory() if into is None else into)
        if before.digest == digest:
            # It has stopped changing. Its fingerprint is taken when it is seen next.
            self._entries.pop(place, None)
        else:
            self._entries[place] = _Entry(digest, None)
        return digest

    def forget(self) -> None:
        """Forget all digests, so that everything is hashed anew."""
        self._entries.clear()

    def _hash_and_remember(
        self, place: Place, data: memoryview, threads: int, into: memoryview | None
    ) -> str:
        """The digest of a tensor that is expected to stay as it is; it is remembered with the fingerprint.

        Both are of the same bytes, whatever other threads do to the tensor meanwhile.
        """
        _, dtype, shape = place
        fingerprint = xxhash.xxh3_128(seed=self._seed)
        size = _PART if threads == 1 else _LARGE_PART
        into = np.empty(min(size, len(data)), np.uint8).data if into is None else into
        digest = _hash(dtype, shape, data, threads=threads, into=into, also=fingerprint.update)
        if len(self._entries) >= _MOST:
            self._entries.clear()
        self._entries[place] = _Entry(digest, fingerprint.digest())
        return digest

    def _fingerprint(self, data: memoryview, into: memoryview | None = None) -> bytes:
        if into is None:
            return xxhash.xxh3_128_digest(data, seed=self._seed)
        fingerprint = xxhash.xxh3_128(seed=self._seed)
        _copy(data, into, fingerprint.update)
        return fingerprint.digest()


def _hash(
    dtype: str,
    shape: tuple[int, ...],
    data: memoryview,
    *,
    threads: int,
    into: memoryview | None,
    also: Callable[[memoryview], object] = lambda part: None,
) -> str:
    """The digest of a tensor.

    Args:
        into: memory of this thread. The tensor is copied there part by part, and hashed there, which costs no more than
            to hash it where it lies. See `_copy`.
        also: is given each part.
    """
    if into is None:
        return tensor_digest(dtype, shape, data, threads=threads)
    hasher = tensor_hasher(dtype, shape, threads)

    def update(part: memoryview) -> None:
        also(part)
        hasher.update(part)

    _copy(data, into, update, size=_PART if threads == 1 else _LARGE_PART)
    return hasher.hexdigest()


def _copy(
    data: memoryview, into: memoryview, update: Callable[[memoryview], object], *, size: int = _PART
) -> None:
    """Copy part by part, and give each part on from the copy, while it is in the cache.

    Args:
        into: if it is smaller than the data, only the last part stays there.
    """
    source, copy = np.frombuffer(data, np.uint8), np.frombuffer(into, np.uint8)
    for start in range(0, len(data), size):
        place = start if len(into) >= len(data) else 0
        part = copy[place : place + min(size, len(data) - start)]
        np.copyto(part, source[start : start + size])
        update(part.data)


class Copies:
    """Memory for copies of tensors, which later tensors and saves use again; safe to use from several threads.

    To fault in fresh memory costs as much as to hash what is copied there.
    """

    def __init__(self) -> None:
        # A dict, as its single operations need no lock, which a child forked meanwhile would inherit.
        self._free: dict[int, memoryview] = {}

    def take(self, size: int) -> memoryview:
        """Memory of this many bytes, with any content."""
        for key, memory in reversed(list(self._free.items())):
            if size <= len(memory) <= 2 * size and self._free.pop(key, None) is not None:
                return memory[:size]
        return np.empty(size, np.uint8).data

    def give_back(self, memory: memoryview) -> None:
        """Nobody uses the memory any more."""
        whole = memoryview(memory.obj)
        self._free[id(memory.obj)] = whole
        kept = list(self._free.items())
        excess = sum(len(memory) for _, memory in kept) - _KEPT
        for key, memory in kept:
            if excess > 0 and self._free.pop(key, None) is not None:
                excess -= len(memory)


remembered = Remembered()
"""State of the process: digests by the places of tensors in its memory. `remembered.forget()` forgets them."""

copies = Copies()
"""State of the process: memory that no save uses at present."""
