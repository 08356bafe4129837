"""Where stored tensors lie."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple, Protocol


class Location(NamedTuple):
    """A tensor's place: its pack, the first byte in it, and the size of the whole pack.

    Attributes:
        base: digest of the tensor that the bytes there are a difference from; None where they are the tensor's own.
        coded: how many bytes the difference takes.
        is_damaged: whether a part of the pack is known to be damaged.
    """

    pack: str
    start: int
    pack_size: int
    base: str | None = None
    coded: int | None = None
    is_damaged: bool = False


class Index(Protocol):
    """What a store asks about what it holds."""

    def locate(self, digests: Collection[str]) -> dict[str, Location]:
        """The locations of those of the digests that are stored."""
        ...

    def manifest_text(self, manifest_id: str) -> bytes | None:
        """A second copy of a manifest that counts; None if there is none."""
        ...

    def was_removed(self, manifest_id: str) -> bool:
        """Whether a manifest counted once, and does not any more."""
        ...
