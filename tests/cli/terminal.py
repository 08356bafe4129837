"""Commands on a real pseudo-terminal of some size."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import sys
import termios
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import pyte

_PROGRAM = """
import sys
from registry.cli import main, output
output.ago = lambda stamp: "5 min ago"
sys.argv = ["registry", *sys.argv[1:]]
main()
"""
"""The command line, by whose clock all is five minutes old."""


class Shown(NamedTuple):
    """What a command showed.

    Attributes:
        raw: with the sequences for colours and the cursor.
    """

    status: int
    raw: str

    @property
    def text(self) -> str:
        """Without them."""
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.raw)


def on_a_terminal(
    *arguments: str,
    columns: int = 80,
    lines: int = 40,
    typed: str = "",
    environment: Mapping[str, str] | None = None,
) -> Shown:
    """Run `registry` with arguments on a terminal."""
    pid, terminal = _started(_words(arguments), columns, lines, environment or {})
    if typed:
        os.write(terminal, typed.encode())
    text = b""
    while part := _part(terminal):
        text += part
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.close(terminal)
    return Shown(status, text.decode().replace("\r\n", "\n"))


def _words(arguments: Sequence[str]) -> list[str]:
    return [sys.executable, "-c", _PROGRAM, *arguments]


def _started(
    words: Sequence[str], columns: int, lines: int, environment: Mapping[str, str]
) -> tuple[int, int]:
    """The process id of a command, and its terminal."""
    pid, terminal = pty.fork()
    if pid == 0:
        left_out = ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR")
        kept = {name: value for name, value in os.environ.items() if name not in left_out}
        kept |= {"TERM": "xterm", "PAGER": "cat", **environment}
        fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        os.execve(words[0], words, kept)
    return pid, terminal


def _part(terminal: int) -> bytes:
    """What comes next; empty at the end."""
    try:
        return os.read(terminal, 4_096)
    except OSError:  # the other end is closed
        return b""


class Session:
    """A command on a terminal, to type into while it runs. What is on its screen is a list of lines."""

    def __init__(
        self, *arguments: str, columns: int = 80, lines: int = 24, words: Sequence[str] = ()
    ) -> None:
        """
        Args:
            arguments: of `registry`.
            words: another command, in the place of `registry`.
        """
        self.screen = pyte.Screen(columns, lines)
        self._stream = pyte.ByteStream(self.screen)
        self._pid, self._terminal = _started(words or _words(arguments), columns, lines, {})

    def shown(self) -> list[str]:
        """The lines of the screen that are not empty."""
        return [line.rstrip() for line in self.screen.display if line.strip()]

    def wait_for(self, pattern: str, seconds: float = 120) -> list[str]:
        """Follow until a line of the screen matches, and return the screen."""
        end = time.monotonic() + seconds
        while not any(re.search(pattern, line) for line in self.shown()):
            if time.monotonic() > end or not self._read():
                raise AssertionError(f"{pattern!r} did not appear:\n" + "\n".join(self.shown()))
        return self.shown()

    def type(self, text: str) -> None:
        """Press keys."""
        os.write(self._terminal, text.encode())

    def end(self) -> int:
        """Follow to the end, and return the exit status."""
        while self._read():
            pass
        os.close(self._terminal)
        return os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])

    def _read(self) -> bool:
        part = _part(self._terminal)
        self._stream.feed(part)
        return bool(part)
