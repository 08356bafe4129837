"""Digests: BLAKE3-256 in lower-case hex."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Sequence

from blake3 import blake3

ALL_CORES: int = blake3.AUTO
_PARALLEL = 1 << 20
"""Bytes below which starting threads costs more than they save."""

_HEX = re.compile(r"[0-9a-f]{64}\Z")

Buffer = bytes | bytearray | memoryview

_is_forked = False
"""State of the process: whether it was forked from one that hashed. It stays so until the process ends."""


def _note_fork() -> None:
    """The threads that hash together stay behind in the parent: a child that waited for them would wait for ever."""
    global _is_forked
    _is_forked = True


os.register_at_fork(after_in_child=_note_fork)


def digest(data: Buffer) -> str:
    """Digest of plain bytes."""
    return hasher(data, ALL_CORES if len(data) > _PARALLEL else 1).hexdigest()


def hasher(data: Buffer = b"", threads: int = ALL_CORES) -> blake3:
    """A hasher that gives the digest of some bytes and of those that are fed to it afterwards."""
    return blake3(data, max_threads=1 if _is_forked else threads)


def preamble(dtype: str, shape: Sequence[int]) -> bytes:
    """What is hashed before a tensor's bytes, so that equal bytes of another dtype or shape differ.

    >>> preamble("float32", (6, 1, 5, 5))
    b'float32 [6,1,5,5]\\n'
    """
    return _preamble(dtype, tuple(shape))


def salt() -> str:
    """32 random hexadecimal digits. What holds them has a digest that nothing else has or had."""
    # The module `secrets` asks the same source, and loads OpenSSL: a tenth of the start of a command.
    return os.urandom(16).hex()


@functools.lru_cache(maxsize=1024)
def _preamble(dtype: str, shape: tuple[int, ...]) -> bytes:
    """As `preamble`.

    State of the process: what was made last is kept, as many tensors have the same. `_preamble.cache_clear()` forgets it.
    """
    return f"{dtype} [{','.join(map(str, shape))}]\n".encode()


def tensor_digest(dtype: str, shape: Sequence[int], data: Buffer, *, threads: int | None = None) -> str:
    """Digest of a tensor: its dtype, its shape and its contiguous little-endian bytes.

    Args:
        threads: threads to hash with; all cores for large tensors unless given.
    """
    if threads is None:
        threads = ALL_CORES if len(data) > _PARALLEL else 1
    return tensor_hasher(dtype, shape, threads).update(data).hexdigest()


def tensor_hasher(dtype: str, shape: Sequence[int], threads: int) -> blake3:
    """A hasher that gives a tensor's digest once the tensor's bytes are fed to it."""
    return hasher(preamble(dtype, shape), threads)


def is_digest(text: object) -> bool:
    """Whether something has the form of a digest: 64 lower-case hex digits."""
    return isinstance(text, str) and _HEX.match(text) is not None
