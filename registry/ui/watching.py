"""Watching: browsers are told of a change when it happens, by one thread that looks while anybody listens."""

from __future__ import annotations

import json
import logging
import queue
import threading
from collections.abc import Iterator

from registry.store.errors import RegistryError
from registry.ui.reader import Reader, State

_LOOK_SECONDS = 0.25
_LOOK_SHARED_SECONDS = 5.0
"""Each look at a shared registry may be a request to its bucket."""

_REST_SECONDS = 0.75
"""Time between two events at least, beside that of a look."""

_QUIET_SECONDS = 3.0
"""Silence after which a stream says that it is alive, so that a closed one is noticed."""

MOST_STREAMS = 32

_logger = logging.getLogger(__name__)


class Watch:
    """Tells streams what changes.

    An event has the state of the log, and of all that pages show, as the pages themselves have it.

    Args:
        begun: tells this server from an earlier one.
    """

    def __init__(self, reader: Reader, begun: str) -> None:
        self._begun = begun
        self._reader = reader
        self._seconds = _LOOK_SHARED_SECONDS if reader.registry.remote else _LOOK_SECONDS
        self._lock = threading.Lock()
        self._streams: list[queue.SimpleQueue[str | None]] = []
        self._thread: threading.Thread | None = None
        self._is_closed = threading.Event()

    @property
    def is_full(self) -> bool:
        """Whether no further stream may begin."""
        return len(self._streams) >= MOST_STREAMS

    def stream(self, since: State) -> Iterator[str]:
        """Events in the form of server-sent ones, until the watch is closed or nobody listens.

        Args:
            since: the state of the page that listens.
        """
        mine: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        with self._lock:
            self._streams.append(mine)
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._look, args=(since,), daemon=True)
                self._thread.start()
        try:
            # What has changed between the page and this stream is told at once.
            yield f"retry: 2000\n\n{self._event(since)}"
            while not self._is_closed.is_set():
                try:
                    event = mine.get(timeout=_QUIET_SECONDS)
                except queue.Empty:
                    event = ": quiet\n\n"
                if event is None:
                    return
                yield event
        finally:
            with self._lock:
                self._streams.remove(mine)

    def close(self) -> None:
        """End all streams."""
        self._is_closed.set()
        self._send(None)

    def _send(self, event: str | None) -> None:
        with self._lock:
            for stream in self._streams:
                stream.put(event)

    def _look(self, seen: State) -> None:
        """Look for changes as long as anybody listens."""
        while not self._is_closed.wait(self._seconds):
            with self._lock:
                if not self._streams:
                    self._thread = None
                    return
            try:
                state = self._reader.state()
                if state == seen:
                    continue
            except RuntimeError:
                # The reader was closed at this moment.
                return
            except RegistryError as error:
                # The page shows the error itself once it asks again.
                _logger.debug("%s", error)
                continue
            seen = state
            self._send(self._event(state))
            # Whoever follows a fast training asks once a second, all at the same time.
            self._is_closed.wait(_REST_SECONDS)

    def _event(self, state: State) -> str:
        document = {
            "seq": state.seq,
            "log": f"{self._begun}-{state.of_log.tag}",
            "all": f"{self._begun}-{state.tag}",
            "runs": [name for name, *_ in state.open_runs],
        }
        return f"id: {state.seq}\ndata: {json.dumps(document)}\n\n"
