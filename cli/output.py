"""What commands print: lines, facts, JSON, sizes, progress. Tables are in `registry.cli.tables`."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TextIO

import click

from registry.reports.words import ago as ago
from registry.reports.words import counted as counted
from registry.reports.words import number as number
from registry.reports.words import size as size
from registry.reports.words import time_of as time_of
from registry.store.text import printable

if TYPE_CHECKING:
    from registry.store.errors import Difference, RegistryError

_PATIENCE = 1.0
"""Seconds of work before a bar appears."""

INTERRUPTED = "Interrupted"
"""The kind of what Ctrl-C ends."""

_MOST_DIFFERENCES = 20
"""Differences that an error shows."""

_COLOURS = {"~": "yellow", "+": "green", "-": "red"}

_STAND_INS = {
    "…": "..",
    "●": "*",
    "○": "o",
    "│": "|",
    "─": "-",
    "├": "|",
    "└": "'",
    "┴": "+",
    "╯": "'",
    "╮": ".",
    "╭": ".",
    "┬": "+",
    "┤": "|",
    "┼": "+",
    "→": "->",
    "✓": "ok",
    "✗": "x",
    "×": "x",
    "−": "-",
} | dict(zip("▁▂▃▄▅▆▇█▏▎▍▌▋▊▉", "_.-:=+*#   ####", strict=True))
"""What is printed for a character that the output's encoding does not have; for all others an escape such as `\\xfc`."""


_commands: list[str] = []
"""The names of the commands. This is state of the process; `registry.cli.app` sets it as it is loaded."""

GC_FREES = "registry gc frees the space in an hour, or at once with --grace 0"
"""What is said of space that something has let go."""


def name_commands(names: Iterable[str]) -> None:
    """Set the words after `registry` that are commands, so that `with_root` finds commands in advice."""
    _commands[:] = names


def with_root(text: str) -> str:
    """Add `--root` to every command in a text, if this command line has that option."""
    root = _given(sys.argv[1:])
    if not root:
        return text
    mentioned = rf"\bregistry (?=(?:{'|'.join(_commands)})\b)"
    return re.sub(mentioned, lambda _: f"registry --root {as_word(root)} ", text)


def as_word(text: str) -> str:
    """A text as a word of a command that can be pasted, also where the output cannot show all of its characters.

    It is in the form `$'pr\\xc3\\xbcf'` then, which bash and zsh read.
    """
    word = shlex.quote(text)
    if encodable(word) == encodable(word, sys.stderr) == printable(word) == word:
        return word
    plain = (chr(byte) for byte in os.fsencode(text))
    return (
        "$'" + "".join(c if " " <= c <= "~" and c not in "\\'" else f"\\x{ord(c):02x}" for c in plain) + "'"
    )


def _given(words: Sequence[str]) -> str:
    """The folder that the option `--root` of a command line names; empty without that option."""
    # The last one counts, as the option of a command goes before that of the group.
    for i, word in reversed([*enumerate(words)]):
        if word == "--root":
            return "".join(words[i + 1 : i + 2])
        if word.startswith("--root="):
            return word.partition("=")[2]
    return ""


def complain(kind: str, message: str, hint: str = "", differences: Sequence[Difference] = ()) -> None:
    """Print an error and what to do about it, a line each, to the error stream; with `--json` also as a document.

    Args:
        kind: the name of the kind of error, for programs. `INTERRUPTED` is none.
        hint: what to do. The user can paste what it says to type.
        differences: what the error is about, a line each.
    """
    message, hint = with_root(printable(message)), printable(hint)
    if _is_json() and not _documents:
        document: dict[str, Any] = {"kind": kind, "message": message, "hint": with_root(hint) or None}
        if differences:
            document["differences"] = [one._asdict() for one in differences]
        with contextlib.suppress(OSError):
            print_json({"error": document})
    label = "" if kind == INTERRUPTED else f"{click.style('error:', fg='red', bold=True)} "
    for line in (f"{label}{message}", *_lines_of(differences)):
        click.echo(encodable(line, sys.stderr), err=True, color=_color())
    if hint:
        tip(hint)


def tip(text: str) -> None:
    """Print a line that says what to type, to the error stream."""
    label = click.style("hint:", fg="cyan", bold=True)
    click.echo(f"{label}  {encodable(with_root(printable(text)), sys.stderr)}", err=True, color=_color())


def _color() -> bool | None:
    """Whether to use colours; None lets the stream decide.

    The context of a command, which knows the option `--color`, is closed where its error is printed. The option sets these
    variables.
    """
    return False if os.environ.get("NO_COLOR") else True if os.environ.get("FORCE_COLOR") else None


class Told(click.Abort):
    """Ctrl-C, of which the user was told."""


def complain_of(error: RegistryError) -> None:
    """Print an error of the registry; see `complain`."""
    complain(type(error).__name__, *error.for_command_line(), error.differences)


def in_one_line(error: RegistryError) -> str:
    """An error of the registry and what to do about it, as one line of several."""
    return with_root(printable("; ".join(filter(None, error.for_command_line()))))


def _lines_of(differences: Sequence[Difference]) -> list[str]:
    """A line for each of some differences, aligned; of many the first alone."""
    shown = [tuple(map(text_of, one)) for one in differences[:_MOST_DIFFERENCES]]
    names, whats = (max((len(one[i]) for one in shown), default=0) for i in (1, 2))
    lines = [
        f"  {click.style(sign, fg=_COLOURS[sign])} {name.ljust(names)}  {what.ljust(whats)}  {why}"
        for sign, name, what, why in shown
    ]
    more = len(differences) - len(shown)
    return [*lines, f"  and {more:,} more"] if more else lines


def _is_json() -> bool:
    """Whether the command line asks for a JSON document."""
    words = sys.argv[1 : sys.argv.index("--") if "--" in sys.argv else None]
    return "--json" in words


def encodable(text: str, stream: TextIO | None = None) -> str:
    """A text with stand-ins for the characters that the encoding of standard output, or of a stream, does not have."""
    encoding = getattr(stream or sys.stdout, "encoding", None) or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return "".join(_encodable(character, encoding) for character in text)
    return text


def _encodable(character: str, encoding: str) -> str:
    try:
        character.encode(encoding)
    except UnicodeEncodeError:
        return _STAND_INS.get(character) or character.encode("ascii", "backslashreplace").decode()
    return character


def width_of_terminal() -> int | None:
    """Characters of a line of the terminal that the standard output goes to; None if it goes elsewhere."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def say(text: str) -> None:
    """Print a line for people."""
    click.echo(encodable(with_root(printable(text))))


def warn(text: str) -> None:
    """Print a line to the standard error stream."""
    click.echo(encodable(with_root(printable(text)), sys.stderr), err=True)


_documents: list[bool] = []
"""Whether a JSON document was printed. This is state of the process."""


def begin() -> None:
    """Forget what an earlier command line of this process printed."""
    _documents.clear()


def print_json(document: Any) -> None:
    """Print one JSON document. NaN and infinity become null, because JSON has neither."""
    # Lazy: start-up.
    from registry.catalog.documents import finite

    _documents.append(True)
    click.echo(json.dumps(finite(document), indent=2))


def print_facts(facts: Sequence[tuple[str, Any]]) -> None:
    """Print one fact a line, its name and its value. Facts with an empty value are left out."""
    shown = [(name, text_of(value)) for name, value in facts if value not in (None, "", (), [], {})]
    width = max((len(name) for name, _ in shown), default=0)
    for name, value in shown:
        click.echo(f"{click.style(encodable(name).ljust(width), bold=True)}  {value}")


def text_of(value: Any) -> str:
    """A value as one harmless line that standard output can encode; empty for None."""
    if value is None:
        return ""
    if isinstance(value, float):
        return number(value)
    if isinstance(value, list | tuple):
        return ", ".join(map(text_of, value))
    return encodable(printable(str(value)))


def nothing(why: str) -> None:
    """Say that there is nothing to show, and why. It goes to the error stream, as what is shown may be piped on."""
    warn(why)


@contextlib.contextmanager
def progress_bar(label: str) -> Iterator[Callable[..., None]]:
    """Yield a callback that reports the progress of long work.

    A bar appears on a terminal's error stream after a second. The callback takes the bytes that are done, the bytes in
    all, and optionally the bytes saved so far.

    Args:
        label: plain text. It may hold a name from outside.
    """
    if sys.stderr is None or not sys.stderr.isatty():
        yield lambda done, total, saved=0: None
        return
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        bar: list[Any] = []

        def report(done: int, total: int, saved: int = 0) -> None:
            # Lazy: loads rich.
            from rich.markup import escape

            if not bar and time.monotonic() - started < _PATIENCE:
                return
            description = escape(printable(label)) + (f", {size(saved)} saved" if saved else "")
            if not bar:
                bar.append(stack.enter_context(_bar()))
                bar.append(bar[0].add_task(description, total=total))
            bar[0].update(bar[1], completed=done, total=total, description=description)

        yield report


def _bar() -> Any:
    # Lazy: loads rich.
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)
