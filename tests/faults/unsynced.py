"""A disk that nobody waits for. A process that is killed loses nothing that it has written, so that only tests of power cuts need more."""

from __future__ import annotations

from pathlib import Path

from registry.store import durable


class Unsynced(durable.Disk):
    """The durable steps, without the waiting."""

    def sync(self, fd: int, path: Path) -> None:
        pass

    def sync_folder(self, path: Path, folder: int) -> None:
        pass
