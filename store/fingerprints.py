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

from registry.store.digest import digest, preamble, tensor_digest, tensor_hasher

SMALLEST = 4 << 10
"""Bytes below which hashing costs less than remembering."""

_PART = 2 << 20
"""Bytes that are copied at a time: they stay in the cache until they are hashed and written."""
_LARGE_PART = 8 << 20
"""The same, where several cores hash them."""

_FEW = 64 << 10
"""Bytes below which a copy is made in one step, as other threads wait for the interpreter lock no longer than that takes."""

_MOST = 1 << 17
"""Entries that are kept, some 300 bytes each."""

Place = tuple[int, str, tuple[int, ...]]
"""Where a tensor lies in memory, its dtype and its shape."""


class _Entry(NamedTuple):
    """A digest that is remembered."""

    digest: str
    fingerprint: bytes | None
    """None for a tensor that had changed when it was last seen, and is expected to change again."""


class Found(NamedTuple):
    """What was found of a tensor's bytes.

    Attributes:
        digest: the tensor's.
        fingerprint: of the same bytes, whatever other threads did to the tensor meanwhile; None if nobody asked for it.
    """

    digest: str
    fingerprint: bytes | None


class Remembered:
    """Digests of tensors by their places; safe to use from several threads."""

    def __init__(self) -> None:
        self._entries: dict[Place, _Entry] = {}
        self._seed = secrets.randbits(64)

    def find(
        self,
        address: int,
        dtype: str,
        shape: tuple[int, ...],
        data: memoryview,
        *,
        threads: int = 1,
        is_live: bool = False,
        use: Callable[[memoryview], object] | None = None,
    ) -> Found:
        """As `tensor_digest`, of a tensor that may be the same as when it was last seen at its place.

        Args:
            address: where its values lie in memory; 0 if that tells nothing.
            is_live: whether other threads may change the bytes, so that the fingerprint is wanted as well.
            use: is given the bytes part by part if they have to be hashed: those that have the digest, whatever other
                threads do to the tensor. A tensor of less than 64 KiB is one part, which can be kept.
        """
        if not address or len(data) < SMALLEST:
            return self._hash(dtype, shape, data, threads, is_live, use)
        place = (address, dtype, shape)
        before = self._entries.get(place)
        if before is None:
            found = self._hash(dtype, shape, data, threads, True, use)
            if len(self._entries) >= _MOST:
                self._entries.clear()
            self._entries[place] = _Entry(*found)
            return found
        if before.fingerprint and before.fingerprint == self.fingerprint(data):
            return Found(*before)
        found = self._hash(dtype, shape, data, threads, is_live, use)
        if before.digest == found.digest:
            # It has stopped changing. Its fingerprint is taken when it is seen next.
            self._entries.pop(place, None)
        else:
            self._entries[place] = _Entry(found.digest, None)
        return found

    def fingerprinting(self) -> xxhash.xxh3_128:
        """What makes a fingerprint of the bytes that it is fed."""
        return xxhash.xxh3_128(seed=self._seed)

    def fingerprint(self, data: memoryview | bytes) -> bytes:
        """The fingerprint of some bytes."""
        return xxhash.xxh3_128_digest(data, seed=self._seed)

    def fingerprint_of(self, digest: str, address: int, dtype: str, shape: tuple[int, ...]) -> bytes | None:
        """The fingerprint of the bytes with this digest, if they were the last that were seen at a place."""
        entry = self._entries.get((address, dtype, shape))
        return entry.fingerprint if entry and entry.digest == digest else None

    def forget(self) -> None:
        """Forget all digests, so that everything is hashed anew."""
        self._entries.clear()

    def _hash(
        self,
        dtype: str,
        shape: tuple[int, ...],
        data: memoryview,
        threads: int,
        fingerprinted: bool,
        use: Callable[[memoryview], object] | None,
    ) -> Found:
        if len(data) < _FEW:
            # One copy, which is hashed in one go: there may be many of them.
            begin = preamble(dtype, shape)
            whole = begin + data
            copy = memoryview(whole)[len(begin) :]
            if use:
                use(copy)
            seen = xxhash.xxh3_128_digest(copy, seed=self._seed) if fingerprinted else None
            return Found(digest(whole), seen)
        if not (fingerprinted or use):
            return Found(tensor_digest(dtype, shape, data, threads=threads), None)
        fingerprint = self.fingerprinting() if fingerprinted else None
        hasher = tensor_hasher(dtype, shape, threads)

        def update(part: memoryview) -> None:
            hasher.update(part)
            if fingerprint:
                fingerprint.update(part)
            if use:
                use(part)

        copied(data, update, _PART if threads == 1 else _LARGE_PART)
        return Found(hasher.hexdigest(), fingerprint.digest() if fingerprint else None)


def copied(data: memoryview, use: Callable[[memoryview], object], size: int = _PART) -> None:
    """Copy bytes part by part, and give each part on from the copy, which no other thread can change.

    All that is done with a part reads it from the cache, so the copy costs little. A part is not written to again if it is the
    only one.
    """
    if len(data) < _FEW:
        use(memoryview(bytes(data)))
        return
    source, copy = np.frombuffer(data, np.uint8), np.empty(min(size, len(data)), np.uint8)
    for start in range(0, len(data), size):
        part = copy[: len(data) - start]
        np.copyto(part, source[start : start + size])
        use(part.data)


remembered = Remembered()
"""State of the process: digests by the places of tensors in its memory. `remembered.forget()` forgets them."""
