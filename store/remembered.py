"""Digests remembered: bytes that are still what they were when they were last hashed need not be hashed again.

Training saves the same tensors over and over, and those that are frozen do not change. XXH3 reads them several times
as fast as BLAKE3 does; its 128 bits are no cryptographic digest, so they never leave this process: with a seed that
nobody knows they only tell whether the bytes at one place in memory are those whose digest was computed there before.
Every byte is read at every save.
"""

from __future__ import annotations

import secrets
from typing import NamedTuple

import xxhash

from registry.store.digest import tensor_digest

SMALLEST = 4 << 10
"""Bytes below which hashing costs less than remembering."""

_MOST = 1 << 17  # entries, some 300 bytes each

Place = tuple[int, str, tuple[int, ...]]
"""Where a tensor lies in memory, its dtype and its shape."""


class _Entry(NamedTuple):
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
        threads: int | None = None,
    ) -> str:
        """As `tensor_digest`, of a tensor that may be the same as when it was last seen at its place.

        Args:
            address: where its values lie in memory; 0 if that tells nothing.
        """
        if not address or len(data) < SMALLEST:
            return tensor_digest(dtype, shape, data, threads=threads)
        place = (address, dtype, shape)
        before = self._entries.get(place)
        fingerprint = None
        if before is None or before.fingerprint is not None:
            fingerprint = self._fingerprint(data)
            if before is not None and before.fingerprint == fingerprint:
                return before.digest
        digest = tensor_digest(dtype, shape, data, threads=threads)
        if before is not None:
            if before.digest == digest:
                self._entries.pop(place, None)  # it changes no longer
            else:
                self._entries[place] = _Entry(digest, None)
        elif self._fingerprint(data) == fingerprint:  # else another thread changed it while it was hashed
            if len(self._entries) >= _MOST:
                self._entries.clear()
            self._entries[place] = _Entry(digest, fingerprint)
        return digest

    def forget(self) -> None:
        """Hash everything anew."""
        self._entries.clear()

    def _fingerprint(self, data: memoryview) -> bytes:
        return xxhash.xxh3_128_digest(data, seed=self._seed)


remembered = Remembered()
"""What this process remembers."""
