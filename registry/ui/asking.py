"""Asking the worker: starting it when it is needed, and keeping what it answered."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import threading
from collections import OrderedDict
from typing import Any

from registry.store import errors
from registry.store.errors import RegistryError, StorageError

_PATIENCE_SECONDS = 300.0
"""How long an answer may take."""

_MOST_BYTES = 32 << 20
"""Bytes of answers that are kept."""


class Asking:
    """Asks the worker of a registry, one request at a time.

    Args:
        place: the registry's folder or URL.
    """

    def __init__(self, place: str) -> None:
        self._place = place
        # The worker answers one request at a time.
        self._lock = threading.Lock()
        self._keeping = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._answers: OrderedDict[str, str] = OrderedDict()
        self._bytes = 0
        self._is_closed = False

    def ask(self, key: str, **request: Any) -> dict[str, Any]:
        """What the worker answers.

        Args:
            key: tells requests apart whose answers differ. An answer is kept under it.

        Raises:
            RegistryError: of the kind that the worker met, or if it does not answer.
        """
        key = f"{key} {json.dumps(request, sort_keys=True)}"
        answer = self._kept(key)
        if answer is None:
            with self._lock:
                # Another browser may have asked the same, and waited before this one.
                answer = self._kept(key)
                if answer is None:
                    answer = self._asked(request)
                    if "error" not in answer:
                        self._keep(key, json.dumps(answer))
        if error := answer.get("error"):
            kind = getattr(errors, error["kind"], RegistryError)
            raise kind(error["message"], error["hint"])
        return answer

    def _kept(self, key: str) -> dict[str, Any] | None:
        """The answer that is kept under a key. It waits for none that is being made."""
        with self._keeping:
            if key not in self._answers:
                return None
            self._answers.move_to_end(key)
            line = self._answers[key]
        return dict(json.loads(line))

    def _keep(self, key: str, line: str) -> None:
        with self._keeping:
            self._bytes += len(line) - len(self._answers.pop(key, ""))
            self._answers[key] = line
            while self._bytes > _MOST_BYTES:
                self._bytes -= len(self._answers.popitem(last=False)[1])

    def close(self) -> None:
        """End the worker, also one that is at work."""
        self._is_closed = True
        if process := self._process:
            process.kill()
        with self._lock:
            self._end()

    def _asked(self, request: dict[str, Any]) -> dict[str, Any]:
        line = ""
        # It may have ended since it was asked last, as nobody asked.
        for _ in range(0 if self._is_closed else 2):
            process = self._running()
            with contextlib.suppress(OSError, ValueError):
                process.stdin.write(json.dumps(request) + "\n")  # type: ignore[union-attr]
                process.stdin.flush()  # type: ignore[union-attr]
                line = self._line(process)
            if line or self._is_closed:
                break
            self._end()
        try:
            return dict(json.loads(line))
        except ValueError:
            raise StorageError(
                "the process that reads tensors ended without an answer",
                "try it in a terminal with: registry diff",
            ) from None

    def _line(self, process: subprocess.Popen[str]) -> str:
        """The next line of a process; empty if there is none in time."""
        assert process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            return process.stdout.readline() if selector.select(_PATIENCE_SECONDS) else ""

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            words = [sys.executable, "-m", "registry.ui.worker", self._place]
            # One thread of torch, as somebody may be training on the other cores.
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            self._process = subprocess.Popen(
                words,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                encoding="utf-8",
                env=environment,
                # Ctrl-C ends the server, which ends the worker.
                start_new_session=True,
            )
        return self._process

    def _end(self) -> None:
        if self._process is not None:
            for pipe in (self._process.stdin, self._process.stdout):
                with contextlib.suppress(OSError):
                    pipe.close()  # type: ignore[union-attr]
            self._process.terminate()
            self._process.wait()
            self._process = None
