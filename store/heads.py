"""Headers of packs that are not on this host: a small file for each, which says what the pack holds.

The file has the pack's size and that of its header, eight bytes each, and the header's text without what fills it up. The
pack's name covers the header, so that a damaged file is found.
"""

from __future__ import annotations

import os
from pathlib import Path

from registry.store import durable, header, places
from registry.store.digest import digest as digest_of
from registry.store.digest import is_digest
from registry.store.errors import Corrupt, Invalid, Missing
from registry.store.pack import INNER, PackInfo, info_from
from registry.store.text import quoted

FOLDER = "heads"
_LARGEST = header.MAX_HEADER + 24


def head_path(folder: Path, digest: str) -> Path:
    """Where the file for a pack is.

    Raises:
        Corrupt: if that is no digest, and so might name any file.
    """
    if not is_digest(digest):
        raise Corrupt(f"{quoted(digest)} names no pack, as it is not a digest")
    return folder / digest[:2] / f"{digest}.head"


def pack_of(digest: str, text: bytes, head: int, size: int) -> PackInfo:
    """What a pack holds.

    Args:
        text: its header's, without what fills it up.
        head: bytes before its first tensor.
        size: bytes of its file.

    Raises:
        Corrupt: if that is not the header that its name covers.
    """
    if not len(text) + 8 <= head <= min(header.MAX_HEADER + 8, size):
        raise Corrupt(f"pack {digest[:12]}: its header does not have the size that is said")
    whole = header.framed(text, head)
    if digest_of(whole) != digest:
        raise Corrupt(f"pack {digest[:12]}: the header is not the one that its name covers")
    try:
        return info_from(digest, header.parse(whole, size), size)
    except Invalid as error:
        raise Corrupt(f"pack {digest[:12]}: {error}") from None


def write(folder: Path, tmp: Path, digest: str, text: bytes, *, head: int, size: int) -> None:
    """Keep a header; see `pack_of`. What a power cut takes is brought again."""
    data = size.to_bytes(8, "little") + head.to_bytes(8, "little") + text
    durable.note(head_path(folder, digest), data, folder=tmp, inner=INNER)


def size_of(folder: Path, digest: str) -> int | None:
    """Bytes of a pack's file, as its kept header says; None if that is not kept."""
    try:
        with places.open_regular(head_path(folder, digest), inner=INNER) as file:
            return int.from_bytes(file.read(8), "little")
    except Missing:
        return None


def is_kept(folder: Path, digest: str) -> bool:
    """Whether a pack's header is kept."""
    return size_of(folder, digest) is not None


def read(folder: Path, digest: str) -> PackInfo:
    """What a pack holds, from its kept header.

    Raises:
        Missing: if it is not kept.
        Corrupt: if it is damaged.
    """
    return pack_of(digest, *kept_text(folder, digest))


def kept_text(folder: Path, digest: str) -> tuple[bytes, int, int]:
    """A kept header; see `text_in`.

    Raises:
        Missing: if it is not kept.
    """
    return text_kept_in(head_path(folder, digest))


def text_kept_in(path: Path) -> tuple[bytes, int, int]:
    """The header in the file for a pack; see `text_in`.

    Raises:
        Missing: if it is not kept.
    """
    with places.open_regular(path, inner=INNER) as file:
        data = file.read(_LARGEST)
    size, head = (int.from_bytes(data[start : start + 8], "little") for start in (0, 8))
    return data[16:], head, size


def text_in(path: Path) -> tuple[bytes, int, int]:
    """The header of a pack's file without what fills it up, the bytes before its first tensor, and those of the file.

    Raises:
        Corrupt: if the file is missing, or no pack.
    """
    with places.open_regular(path, inner=INNER) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            first = file.read(8)
            length = header.announced_length(first, size)
        except Invalid as error:
            raise Corrupt(f"{path}: {error}") from None
        return file.read(length).rstrip(b" "), length + 8, size
