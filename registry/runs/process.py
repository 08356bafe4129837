"""The process of a run: who it is, how it is asked to stop, how it ended, and a writer that writes nothing.

Two handlers of SIGTERM nest. The outer one, `sigterm_as_exit`, belongs to a run: it turns SIGTERM into an exception, so
that contexts are left. It is set only where the program has no handler of its own. The inner one, `Interrupts`, belongs
to a training loop inside the run: it holds signals back until the loop can be left, and raises the same exceptions.
`Interrupts` is entered after the run and left before it, and then puts the run's handler back.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, Self

from registry.store.durable import host


def this_process() -> str:
    """The line by which other processes find out whether this one still runs: machine and process id."""
    return f"{host()} {os.getpid()}\n"


def ending(error: BaseException) -> str:
    """How a run ended, by the exception that ended it: `interrupted`, or `failed: ` and the exception's class."""
    if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit):
        return "interrupted"
    return f"failed: {type(error).__name__}"


@contextlib.contextmanager
def sigterm_as_exit() -> Iterator[None]:
    """Let SIGTERM unwind the program, so that contexts are left, unless the program handles it itself.

    Only the main thread can set a handler; in others nothing is changed.

    Raises:
        SystemExit: with 128 and the signal's number, in the main thread, when SIGTERM comes.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class Interrupts:
    """Holds Ctrl-C and SIGTERM back until a batch is complete, so that what is saved then can be resumed exactly.

    A second signal comes through at once. Only the main thread can hold signals back; in others nothing is changed.

    Attributes:
        pending: the number of the signal that is held back; None if there is none.
    """

    def __init__(self) -> None:
        self.pending: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def deliver(self) -> None:
        """Raise what was held back.

        Raises:
            KeyboardInterrupt: for Ctrl-C.
            SystemExit: with 128 and the signal's number, for SIGTERM.
        """
        if self.pending == signal.SIGINT:
            raise KeyboardInterrupt
        if self.pending is not None:
            raise SystemExit(128 + self.pending)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.pending is not None:
            self.deliver()
        self.pending = number


class Mute:
    """Stands in for a `SummaryWriter` where nothing is to be written: each of its methods does nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None
