"""Commands on a real pseudo-terminal of some size."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import sys
import termios
from collections.abc import Mapping
from typing import NamedTuple

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
    pid, terminal = pty.fork()
    if pid == 0:
        left_out = ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR")
        kept = {name: value for name, value in os.environ.items() if name not in left_out}
        kept |= {"TERM": "xterm", "PAGER": "cat", **(environment or {})}
        fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        os.execve(sys.executable, [sys.executable, "-c", _PROGRAM, *arguments], kept)
    if typed:
        os.write(terminal, typed.encode())
    text = b""
    while True:
        try:
            part = os.read(terminal, 4_096)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        text += part
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.close(terminal)
    return Shown(status, text.decode().replace("\r\n", "\n"))
