"""The reader: one thread that asks the registry, so that pages never hold up a save.

SQLite counts the locks of one process as one. Where several threads read a catalog without a write-ahead log, statements
that overlap never let the writer of another process in. So all that pages ask is asked in one thread, one question after
the other. Each statement is fetched whole, and nothing is held while a page is drawn or sent.
"""

from __future__ import annotations

import contextvars
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

from registry.catalog.runs import INNER, LOG, RunInfo
from registry.catalog.scalars import SCALARS
from registry.registry import Registry
from registry.store import places
from registry.ui.kept import last_entry

T = TypeVar("T")


class State(NamedTuple):
    """What tells that a page has changed.

    Attributes:
        seq: the number of the log's last entry.
        folder: tells the registry's folder from another one that gets its name.
        open_runs: the runs that have not ended, each with whether its process is gone and the bytes that it has written.
    """

    seq: int
    open_runs: tuple[tuple[str, bool, int], ...] = ()
    folder: int = 0

    @property
    def tag(self) -> str:
        """The same as a short text."""
        return f"{self.seq}-{zlib.crc32(repr((self.open_runs, self.folder)).encode()):x}"

    @property
    def of_log(self) -> State:
        """The part of it that does not change while runs only write."""
        return self._replace(open_runs=())


class Reader:
    """Asks a registry, one question after the other.

    Args:
        root: the registry's folder or URL; `REGISTRY_ROOT` or `./.registry` unless given.

    Raises:
        NotFound: if there is no registry.
    """

    def __init__(self, root: Path | str | None) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="registry-reader")
        try:
            self.registry = self._thread.submit(Registry, root, create=False).result()
        except BaseException:
            self._thread.shutdown()
            raise

    def ask(self, question: Callable[[Registry], T]) -> T:
        """What a function finds out from the registry, in the reader's thread; raises what it raises."""
        context = contextvars.copy_context()
        return self._thread.submit(context.run, question, self.registry).result()

    def state(self) -> State:
        """What tells that a page has changed."""
        return self.ask(_state)

    def close(self) -> None:
        """Let go of the registry."""
        self._thread.submit(self.registry.catalog.close).result()
        self._thread.shutdown()


def _state(registry: Registry) -> State:
    runs = registry.runs
    seq, folder = last_entry(registry)
    open_runs = tuple((info.name, runs.is_lost(info), _size(registry, info)) for info in runs.open())
    return State(seq, open_runs, folder)


def _size(registry: Registry, info: RunInfo) -> int:
    """Bytes of what a run writes as it goes on."""
    folder = registry.root / "runs" / info.name
    found = [places.status_of(folder / name, inner=INNER) for name in (LOG, SCALARS)]
    return sum(status.st_size for status in found if status is not None)
