"""One log file for all modules: it takes the records of every module that uses `logging`.

[2026-11-23 14:05:01] - INFO: [train.py][42] Epochs[1/3] -- loss: 0.3906
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from registry.store.errors import Invalid, StorageError
from registry.store.places import open_file
from registry.store.text import printable, quoted

_FORMAT = "[%(asctime)s] - %(levelname)s: [%(filename)s][%(lineno)d] %(message)s"


def setup_logging(
    name: str = "monitor", level: str | int = "INFO", directory: Path | str = "logs", file_only: bool = False
) -> Path:
    """Send the records of all modules to a file of the day, and to the console.

    Calling it again replaces what the earlier call set up; handlers of others stay. Under `torchrun` only the first
    process writes the file. The others show their warnings and errors on the console, marked with their rank.

    Args:
        name: the file is `<name>_<date>.txt`, appended to; at midnight the next day's file begins.
        level: `DEBUG`, `INFO`, `WARNING`, `ERROR` or `CRITICAL`, or a number.
        directory: made if it is not there.
        file_only: leave the console (the standard error stream) alone.

    Returns:
        The file's path.

    Raises:
        Invalid: if the level is unknown or the name cannot be part of a file's.
        StorageError: if the file cannot be written.
    """
    number = logging.getLevelNamesMapping().get(level.upper()) if isinstance(level, str) else level
    if not isinstance(number, int):
        raise Invalid(f"level is {quoted(str(level))}, expected DEBUG, INFO, WARNING, ERROR or CRITICAL")
    if not name or name.startswith(".") or set(name) & set("/\\\0"):
        raise Invalid(f"name is {quoted(name)}, which cannot begin the name of a file")
    try:
        file = _DayFile(Path(directory), name)
    except ValueError as error:
        # The path holds a null byte or half a character.
        raise Invalid(f"{quoted(f'{directory}/{name}')} cannot be a path ({printable(str(error))})") from None
    except OSError as error:
        where = printable(str(error.filename or directory))
        raise StorageError(
            f"{where}: the log cannot be written ({error.strerror})", "choose another directory"
        ) from error
    handlers: list[logging.Handler] = [file] if file_only else [file, _Console(sys.stderr)]
    form, rank = _FORMAT, os.environ.get("RANK", "0")
    if rank != "0":
        file.close()
        handlers = [_Console(sys.stderr)]
        number, form = max(number, logging.WARNING), f"[rank {printable(rank)}] {_FORMAT}"
    root = logging.getLogger()
    for old in [handler for handler in root.handlers if isinstance(handler, _DayFile | _Console)]:
        root.removeHandler(old)
        old.close()
    for handler in handlers:
        handler.setFormatter(_OneRecord(form, "%Y-%m-%d %H:%M:%S"))
        root.addHandler(handler)
    root.setLevel(number)
    logging.captureWarnings(True)
    return Path(file.baseFilename)


@contextlib.contextmanager
def run_log(path: Path, *, inner: int = 0) -> Iterator[None]:
    """Send the records of all modules, from INFO on, to a file as well, while the context is open.

    The console shows what it showed before.

    Args:
        inner: how many of the folders above the file belong to a registry; links to these are not followed.

    Raises:
        Corrupt: if something that is no file has this name.
    """
    os.close(open_file(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, inner=inner))
    root = logging.getLogger()
    handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(_OneRecord(_FORMAT, "%Y-%m-%d %H:%M:%S"))
    handler.setLevel(logging.INFO)
    console = None
    # Without a handler warnings went to the console by default, and they still should.
    if not root.handlers:
        console = _Console(sys.stderr)
        console.setLevel(logging.WARNING)
        root.addHandler(console)
    level, levels = root.level, [(other, other.level) for other in root.handlers]
    if level > logging.INFO:
        for other, own in levels:
            other.setLevel(max(level, own))
        root.setLevel(logging.INFO)
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        handler.close()
        root.setLevel(level)
        for other, own in levels:
            other.setLevel(own)
        if console:
            root.removeHandler(console)


class _Console(logging.StreamHandler):  # type: ignore[type-arg]
    """A handler for the console, which its class tells from the handlers of others."""


class _DayFile(logging.FileHandler):
    """A file named after the day, which changes with it."""

    def __init__(self, directory: Path, name: str) -> None:
        self._directory = directory.absolute()
        self._prefix = name
        self._directory.mkdir(parents=True, exist_ok=True)
        super().__init__(self._path(datetime.now()), encoding="utf-8", errors="backslashreplace")

    def _path(self, moment: datetime) -> Path:
        return self._directory / f"{self._prefix}_{moment:%Y-%m-%d}.txt"

    def emit(self, record: logging.LogRecord) -> None:
        path = str(self._path(datetime.fromtimestamp(record.created)))
        try:
            if path != self.baseFilename:
                self.close()
                self.baseFilename = path
                self._directory.mkdir(parents=True, exist_ok=True)
            super().emit(record)
        except OSError:
            # The new day's file cannot be opened. That is reported, and the program goes on.
            self.handleError(record)


class _OneRecord(logging.Formatter):
    """Indents what follows a line break and spells out control characters, so that no message looks like two."""

    def format(self, record: logging.LogRecord) -> str:
        lines = super().format(record).rstrip("\n").split("\n")
        return "\n    ".join(printable(line.expandtabs()) for line in lines)
