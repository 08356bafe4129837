"""Coding of a difference by classes of elements, by pcodec: small, and what packs of version 2 may have.

Whether training moves a parameter, and how far, depends mostly on how large the parameter is. So the elements are put into
*classes* by the exponents of the tensor that the difference is taken from, which the reader has as well. The differences
of each class have a narrow distribution of their own. pcodec codes them close to their entropy, also below one bit for
an element. `docs/FORMAT.md` describes the bytes.
"""

from __future__ import annotations

import struct
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from pcodec import ChunkConfig, DeltaSpec, ModeSpec, PagingSpec
from pcodec.wrapped import FileCompressor, FileDecompressor

from registry.store import splitting
from registry.store.errors import Corrupt

if TYPE_CHECKING:
    from registry.store.parallel import Run

CODER = 2
"""The number of this coding in a pack."""

ITEM_SIZES = (2, 4)
"""Bytes that an element may have: those of floats whose exponent begins within the first byte behind the sign."""

BLOCK = 1 << 18
"""Elements that are coded at a time: what is worked on fits a processor's cache, and a stream costs little by itself."""

CLASSES = 8
"""Classes of a tensor, about equally large."""

WAY = splitting.COMPILED or splitting.BY_NUMPY
"""How elements are put into classes and back."""

_LARGEST_BLOCK = 1 << 20
"""Elements of the largest block that is read, which bounds the memory that turning one back takes."""

_STEP = 61
"""Of so many elements one is looked at to choose the classes. An odd number, so that it meets all columns of a matrix."""

_LEVELS = {2: 8, 4: 6}
"""How hard pcodec looks for the best bins, by the bytes of an element. Floats of 4 bytes gain less from more: level 8 would make
them half a percent smaller, and take up to 1.5 times as long.
"""

_HEAD = struct.Struct("<IBBI")
_PLAIN = 0
"""The first byte of a stream: numbers as they are, no differences between them. Other ways would take memory of their own."""

_LONGEST_HEADER = 16
_KINDS = {2: "i16", 4: "i32"}
_SIGNED = {size: np.dtype(f"i{size}") for size in ITEM_SIZES}
_UNSIGNED = {size: np.dtype(f"u{size}") for size in ITEM_SIZES}


def limits_of(base: memoryview, item_size: int) -> bytes:
    """The exponents at which a new class begins, in rising order: at most `CLASSES - 1`, so that all are about as large.

    Args:
        base: bytes of the tensor that a difference is taken from.
        item_size: bytes of an element: 2 or 4.
    """
    sample = np.sort(splitting.exponents(np.frombuffer(base, _UNSIGNED[item_size])[::_STEP]))
    ends = {int(sample[len(sample) * i // CLASSES]) for i in range(1, CLASSES)} if len(sample) else set()
    return bytes(sorted(ends - {0}))


def encode(data: memoryview, base: memoryview, item_size: int, run: Run, *, limits: bytes) -> bytes:
    """Code `data` as its difference from `base`; the result may be longer than `data`.

    Args:
        data, base: contiguous bytes, of the same length.
        item_size: bytes of an element: 2 or 4.
        run: does the work, block by block.
        limits: the exponents at which a new class begins, from `limits_of`; none for a single class.
    """
    new, old = (np.frombuffer(part, _UNSIGNED[item_size]) for part in (data, base))
    starts = range(0, len(new), BLOCK)
    streams: list[list[bytes]] = [[] for _ in starts]

    def work(i: int) -> None:
        part = slice(i * BLOCK, (i + 1) * BLOCK)
        streams[i] = _streams(new[part], old[part], limits)

    run(range(len(starts)), work)
    lengths = np.array([len(stream) for block in streams for stream in block], "<u4")
    head = _HEAD.pack(0, CODER, len(limits) + 1, BLOCK) + limits + lengths.tobytes()
    coded = [stream for block in streams for stream in block]
    return b"".join([head, bytes(FileCompressor().write_header()), *coded])


class Decoding:
    """Bytes that `encode` made; see `differences.Decoding`.

    Raises:
        Corrupt: if the bytes are malformed.
    """

    def __init__(self, coded: memoryview, base: memoryview, item_size: int, out: memoryview) -> None:
        if len(coded) < _HEAD.size:
            raise Corrupt("a difference is cut short")
        zero, coder, classes, self.chunk = _HEAD.unpack(coded[: _HEAD.size])
        if (zero, coder) != (0, CODER) or item_size not in ITEM_SIZES:
            raise Corrupt(f"a difference has the unknown coding {coder} for elements of {item_size} bytes")
        self._old = np.frombuffer(base, _UNSIGNED[item_size])
        self._new = np.frombuffer(out, _UNSIGNED[item_size])
        if not classes or not 0 < self.chunk <= _LARGEST_BLOCK or len(self._new) != len(self._old):
            raise Corrupt("a difference is malformed")
        self.chunks = -(-len(self._old) // self.chunk)
        start = _HEAD.size + classes - 1
        self._limits = bytes(coded[_HEAD.size : start])
        table = start + 4 * self.chunks * classes
        if len(coded) < table:
            raise Corrupt("a difference is cut short")
        if list(self._limits) != sorted(set(self._limits)):
            raise Corrupt("the classes of a difference are not in order")
        lengths = np.frombuffer(coded[start:table], "<u4").astype(np.int64)
        try:
            self._pcodec, used = FileDecompressor.new(bytes(coded[table : table + _LONGEST_HEADER]))
        except RuntimeError as error:
            raise Corrupt(f"a difference cannot be decoded: {error}") from None
        ends = table + used + np.cumsum(lengths)
        if (int(ends[-1]) if len(ends) else table + used) != len(coded):
            raise Corrupt("a difference is cut short")
        self._lengths, self._ends = (part.reshape(self.chunks, classes) for part in (lengths, ends))
        self._coded = coded

    def work(self, i: int) -> None:
        """Turn a block back.

        Raises:
            Corrupt: if it is malformed.
        """
        part = slice(i * self.chunk, (i + 1) * self.chunk)
        old, new = self._old[part], self._new[part]
        streams = [
            self._coded[end - length : end]
            for length, end in zip(self._lengths[i].tolist(), self._ends[i].tolist(), strict=True)
        ]
        if not any(map(len, streams)):
            new[:] = old
            return
        if len(streams) == 1:
            difference = np.empty(len(old), _SIGNED[old.itemsize])
            self._read(streams[0], difference)
            np.add(old, difference.view(old.dtype), out=new)
            return
        readers = [partial(self._read, stream) if len(stream) else None for stream in streams]
        WAY.join(old, self._limits, readers, new)

    def _read(self, stream: memoryview, into: Any) -> None:
        """Read the numbers of a stream, as many as there is room for."""
        if stream[0] != _PLAIN or not len(into):
            raise Corrupt("a stream of a difference is malformed")
        data = bytes(stream)
        try:
            numbers, used = self._pcodec.chunk_decompressor(data, _KINDS[into.itemsize])
            progress, size = numbers.read_page_into(data[used:], len(into), into)
        except RuntimeError as error:
            raise Corrupt(f"a stream of a difference cannot be decoded: {error}") from None
        if progress.n_processed != len(into) or used + size != len(data):
            raise Corrupt("a stream of a difference has another length than it should")


def _streams(new: Any, old: Any, limits: bytes) -> list[bytes]:
    """The streams of a block, one for each class."""
    if not limits:
        return [_stream((new - old).view(_SIGNED[new.itemsize]))]
    return [_stream(part) for part in WAY.split(new, old, limits)]


def _stream(values: Any) -> bytes:
    """Some differences; empty if all of them are zero."""
    if not values.any():
        return b""
    config = ChunkConfig(
        compression_level=_LEVELS[values.itemsize],
        mode_spec=ModeSpec.classic(),
        delta_spec=DeltaSpec.no_op(),
        paging_spec=PagingSpec.exact_page_sizes([len(values)]),
    )
    coder = FileCompressor().chunk_compressor(values, config)
    return bytes(coder.write_meta()) + bytes(coder.write_page(0))
