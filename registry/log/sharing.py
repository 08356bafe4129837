"""A log that several hosts share: what a host asks of the place that they share it in."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Protocol

from registry.store.errors import Corrupt

if TYPE_CHECKING:
    from registry.log.entries import Entry


class Behind(Exception):
    """Another host has added an entry first, so the change is worked out again. Never reaches users."""


def history_changed(url: str, problem: str) -> Corrupt:
    """The error for a shared log that is not the one that this host has followed.

    Args:
        problem: goes on behind "the history of the registry changed".
    """
    return Corrupt(
        f"{url}: the history of the registry changed{problem}; somebody has edited the log or put back an older state. "
        "Nothing is written"
    )


class Shared(Protocol):
    """A log that several hosts share; each keeps a copy in its own folder. Safe to use from several threads."""

    @property
    def url(self) -> str:
        """Where it is, without keys."""
        ...

    def as_of(self) -> str:
        """When this host last saw the log, in words, such as `09:12, 3 h ago`."""
        ...

    def is_due(self) -> bool:
        """Whether it is time to ask for what other hosts have added."""
        ...

    def ask_again(self) -> None:
        """Let the next look ask for what other hosts have added, however short a time ago that was asked."""
        ...

    def is_likely_last(self) -> bool:
        """Whether the last entry that this host has is likely the last of all, so that one may be added without asking."""
        ...

    def news(self, seq: int, digest: str) -> Iterator[Entry]:
        """The entries behind one, in order.

        Args:
            seq, digest: of the last entry that this host has; zero for none.

        Raises:
            Corrupt: if they do not follow from that one, as where an older state of the log was put back.
            StorageError: if the place cannot be reached, or refuses.
        """
        ...

    def upload(self, packs: Collection[str]) -> None:
        """Bring packs of this host to where all hosts find them, unless they are there."""
        ...

    def add(self, entry: Entry) -> None:
        """Add an entry behind the last one, with the packs that it names.

        Raises:
            Behind: if another entry has its number.
            StorageError: if the place cannot be reached, or refuses. Where its answer was lost, the entry may be there.
        """
        ...
