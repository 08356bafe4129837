"""Digests remembered: bytes that are still what they were when they were last hashed need not be hashed again.

Training saves the same tensors over and over, and those that are frozen do not change. XXH3 reads them several times
as fast as BLAKE3 does. Its 128 bits are a *fingerprint* and no cryptographic digest, so they never leave this process:
with a seed that nobody knows, they only tell whether the bytes at one place in memory are those whose digest was
computed there before. Every byte is read at every save.
"""

from __future__ import annotations

import secrets
from typing import NamedTuple

import numpy as np
import xxhash

from registry.store.digest import tensor_digest, tensor_hasher

SMALLEST = 4 << 10
"""Bytes below which hashing costs less than remembering."""

_PART = 1 << 20
_LARGE_PART = 8 << 20
"""Bytes that several cores hash at a time."""

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
    ) -> str:
        """As `tensor_digest`, of a tensor that may be the same as when it was last seen at its place.

        Args:
            address: where its values lie in memory; 0 if that tells nothing.
        """
        if not address or len(data) < SMALLEST:
            return tensor_digest(dtype, shape, data, threads=threads)
        place = (address, dtype, shape)
        before = self._entries.get(place)
        if before is None:
            return self._hash_and_remember(place, data, threads)
        if before.fingerprint and before.fingerprint == self._fingerprint(data):
            return before.digest
        digest = tensor_digest(dtype, shape, data, threads=threads)
        if before.digest == digest:
            # It has stopped changing. Its fingerprint is taken when it is seen next.
            self._entries.pop(place, None)
        else:
            self._entries[place] = _Entry(digest, None)
        return digest

    def forget(self) -> None:
        """Forget all digests, so that everything is hashed anew."""
        self._entries.clear()

    def _hash_and_remember(self, place: Place, data: memoryview, threads: int) -> str:
        """The digest of a tensor that is expected to stay as it is; it is remembered with the fingerprint.

        It is read part by part, each into memory of this thread, so that the digest and the fingerprint are of the same
        bytes, whatever other threads do to the tensor meanwhile.
        """
        _, dtype, shape = place
        hasher = tensor_hasher(dtype, shape, threads)
        fingerprint = xxhash.xxh3_128(seed=self._seed)
        size = _PART if threads == 1 else _LARGE_PART
        memory = np.empty(min(size, len(data)), np.uint8)
        source = np.frombuffer(data, np.uint8)
        for start in range(0, len(data), size):
            part = memory[: len(data) - start]
            np.copyto(part, source[start : start + size])
            fingerprint.update(part.data)
            hasher.update(part.data)
        if len(self._entries) >= _MOST:
            self._entries.clear()
        digest = hasher.hexdigest()
        self._entries[place] = _Entry(digest, fingerprint.digest())
        return digest

    def _fingerprint(self, data: memoryview) -> bytes:
        return xxhash.xxh3_128_digest(data, seed=self._seed)


remembered = Remembered()
"""State of the process: digests by the places of tensors in its memory. `remembered.forget()` forgets them."""
