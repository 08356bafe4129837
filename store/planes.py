"""Coding of a difference in planes of bytes, by zstd: fast, and all that packs of version 1 have.

The differences of the elements are folded, so that small ones of either sign become small numbers, and split into
*planes* of equally significant bytes. Where training moved parameters a little, the high planes are almost all zero,
and zstd takes them down to next to nothing. `docs/FORMAT.md` describes the bytes.
"""

from __future__ import annotations

import struct
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import zstandard

from registry.store.errors import Corrupt

if TYPE_CHECKING:
    from registry.store.parallel import Run

ITEM_SIZES = (2, 4, 8)
"""Bytes that an element may have: numpy has whole numbers of these sizes."""

CHUNK = 1 << 17
"""Elements that are coded at a time: what is worked on fits a processor's cache."""

_LARGEST_CHUNK = 1 << 20
"""Elements of the largest chunk that is read, which bounds the memory that turning one back takes."""

_HEAD = struct.Struct("<II")
_SIGNED = {size: np.dtype(f"i{size}").type for size in ITEM_SIZES}
_UNSIGNED = {size: np.dtype(f"u{size}").type for size in ITEM_SIZES}
_PARAMETERS = zstandard.ZstdCompressionParameters(
    strategy=zstandard.STRATEGY_FAST,
    window_log=17,
    hash_log=8,
    chain_log=6,
    search_log=1,
    min_match=7,
    target_length=0,
)
"""Few and long matches: what a plane holds is runs and uneven frequencies, and short matches by chance cost both time
and bytes."""

_WORTH_IT = 0.98
"""Part of a plane's bytes below which its compressed form is kept."""

_local = threading.local()
"""State of the process: the zstd coder and decoder of each thread. They keep nothing of what they have coded."""


def encode(data: memoryview, base: memoryview, item_size: int, run: Run) -> bytes:
    """Code `data` as its difference from `base`; the result may be longer than `data`.

    Args:
        data, base: contiguous bytes, of the same length.
        item_size: bytes of an element: 2, 4 or 8.
        run: does the work, chunk by chunk.
    """
    new, old = (np.frombuffer(part, _UNSIGNED[item_size]) for part in (data, base))
    starts = range(0, len(new), CHUNK)
    planes: list[list[bytes]] = [[] for _ in starts]

    def work(i: int) -> None:
        part = slice(i * CHUNK, (i + 1) * CHUNK)
        planes[i] = _planes(new[part], old[part], item_size)

    run(range(len(starts)), work)
    lengths = np.array([len(plane) for chunk in planes for plane in chunk], "<u4")
    coded = [plane for chunk in planes for plane in chunk]
    return b"".join([_HEAD.pack(CHUNK, len(starts)), lengths.tobytes(), *coded])


class Decoding:
    """Bytes that `encode` made; see `differences.Decoding`.

    Raises:
        Corrupt: if the bytes are malformed.
    """

    def __init__(self, coded: memoryview, base: memoryview, item_size: int, out: memoryview) -> None:
        if item_size not in ITEM_SIZES:
            raise Corrupt(f"there cannot be a difference of elements of {item_size} bytes")
        self._item_size = item_size
        self._old = np.frombuffer(base, _UNSIGNED[item_size])
        self._new = np.frombuffer(out, _UNSIGNED[item_size])
        if len(coded) < _HEAD.size:
            raise Corrupt("a difference is cut short")
        self.chunk, self.chunks = _HEAD.unpack(coded[: _HEAD.size])
        table = _HEAD.size + 4 * self.chunks * item_size
        expected = -(-len(self._old) // self.chunk) if self.chunk else -1
        if (
            self.chunk > _LARGEST_CHUNK
            or self.chunks != expected
            or len(coded) < table
            or len(self._new) != len(self._old)
        ):
            raise Corrupt("a difference is malformed")
        self._lengths = np.frombuffer(coded[_HEAD.size : table], "<u4").astype(np.int64)
        self._ends = table + np.cumsum(self._lengths)
        if (int(self._ends[-1]) if len(self._ends) else table) != len(coded):
            raise Corrupt("a difference is cut short")
        self._coded = coded

    def work(self, i: int) -> None:
        """Turn a chunk back.

        Raises:
            Corrupt: if it is malformed.
        """
        old = self._old[i * self.chunk : (i + 1) * self.chunk]
        kind = _UNSIGNED[self._item_size]
        total: Any = None
        for plane in range(self._item_size):
            place = i * self._item_size + plane
            length, end = int(self._lengths[place]), int(self._ends[place])
            if not length:
                continue
            raw = self._plane(self._coded[end - length : end], len(old)).astype(kind)
            if plane:
                raw <<= kind(8 * plane)
            total = raw if total is None else np.bitwise_or(total, raw, out=total)
        new = self._new[i * self.chunk : (i + 1) * self.chunk]
        if total is None:
            new[:] = old
            return
        sign = (-(total & kind(1)).astype(_SIGNED[self._item_size])).view(kind)
        np.add((total >> kind(1)) ^ sign, old, out=new)

    @staticmethod
    def _plane(coded: memoryview, count: int) -> Any:
        if len(coded) == count:
            return np.frombuffer(coded, np.uint8)
        try:
            # The frame is asked before memory is reserved for it.
            if zstandard.frame_content_size(coded) != count:
                raise Corrupt("a plane of a difference has another length than it should")
            return np.frombuffer(_codecs()[1].decompress(coded, max_output_size=count), np.uint8)
        except zstandard.ZstdError as error:
            raise Corrupt(f"a plane of a difference cannot be decompressed: {error}") from None


def compressor() -> zstandard.ZstdCompressor:
    """The compressor of planes; any zstd decompressor reads the result."""
    return zstandard.ZstdCompressor(compression_params=_PARAMETERS)


def _planes(new: Any, old: Any, item_size: int) -> list[bytes]:
    """The planes of a chunk, each compressed if that is worth it; empty for one that is zero, as all above it."""
    kind = _UNSIGNED[item_size]
    difference = (new - old).view(_SIGNED[item_size])
    sign = difference >> (8 * item_size - 1)
    difference <<= 1
    difference ^= sign
    folded = difference.view(kind)
    largest = int(folded.max())
    planes = []
    for plane in range(item_size):
        if not largest >> (8 * plane):
            planes.append(b"")
            continue
        part = (folded >> kind(8 * plane) if plane else folded).astype(np.uint8)
        packed = _codecs()[0].compress(part)
        planes.append(packed if len(packed) < _WORTH_IT * len(part) else part.tobytes())
    return planes


def _codecs() -> tuple[zstandard.ZstdCompressor, zstandard.ZstdDecompressor]:
    """The compressor and the decompressor of this thread."""
    if not hasattr(_local, "codecs"):
        _local.codecs = compressor(), zstandard.ZstdDecompressor()
    return _local.codecs  # type: ignore[no-any-return]
