"""The errors that this project raises.

Every one of them says what was wrong, where, and what to do next, in one line. Arguments that would help are named as
Python has them, or as options where the command line prints the line. They live in the lowest layer so that every other
layer can raise them.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

_OPTIONS = {"adapters": "adapt"}
"""What the command line calls an argument, where it is not the same word."""

_TWO_PARTS = re.compile(r"((?:'[^']*'|.)*?)(?:; (?!expected )(.*))?", re.DOTALL)
"""What was wrong, and what to do, which a semicolon outside of quotes divides."""

_ADVICE = {
    errno.ENOSPC: "no space left on the device; free some and repeat",
    errno.EDQUOT: "the disk quota is used up; free some space and repeat",
    errno.EFBIG: "the file would exceed the allowed file size; raise the limit (ulimit -f) and repeat",
    errno.EROFS: "the file system is read-only; use another --root or remount it",
    errno.EMFILE: "too many open files; raise the limit (ulimit -n) and repeat",
    errno.EIO: "the disk reports an I/O error; check the disk",
}
"""What to do where the operating system refuses."""


class Fix(NamedTuple):
    """What to add to a call so that it works.

    Attributes:
        lead: what comes before it, such as `if that is meant`; empty for none.
        python: arguments.
        options: the same for the command line.
        evidence: why it may help.
    """

    lead: str
    python: str
    options: str
    evidence: str = ""

    def told(self, words: str) -> str:
        """The whole advice.

        Args:
            words: `python` or `options`.
        """
        lead = f"{self.lead}: " if self.lead else ""
        return f"{lead}{words}{f'  ({self.evidence})' if self.evidence else ''}"


def fix(lead: str = "", evidence: str = "", /, **arguments: Any) -> Fix:
    """The advice to give some arguments.

    >>> fix("if that is meant", expect={"fc.5.*": "skip"}, allow_cast=True).options
    "--expect 'fc.5.*=skip' --allow-cast"
    >>> fix(rename=["backbone.*=*"]).python
    "rename=['backbone.*=*']"
    """
    options = []
    for name, value in arguments.items():
        option = f"--{_OPTIONS.get(name, name).replace('_', '-')}"
        if value is True:
            options.append(option)
            continue
        several = [f"{key}={one}" for key, one in value.items()] if isinstance(value, dict) else value
        for one in several if isinstance(several, list | tuple) else [several]:
            options.append(f"{option} {shlex.quote(str(one))}")
    python = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    return Fix(lead=lead, python=python, options=" ".join(options), evidence=evidence)


class Difference(NamedTuple):
    """A tensor in which two models differ, as an error shows it.

    Attributes:
        sign: `~` for changed, `+` for new, `-` for gone.
        what: such as two shapes.
    """

    sign: str
    name: str
    what: str
    why: str


def in_two_parts(message: str) -> tuple[str, str]:
    """What was wrong, and what to do; the latter is empty if the message does not say.

    A semicolon inside of quotes is part of a name.

    >>> in_two_parts("there is no model 'a; b'; did you mean 'a'?")
    ("there is no model 'a; b'", "did you mean 'a'?")
    >>> in_two_parts("'it's; x' cannot be a name")
    ("'it's; x' cannot be a name", '')
    """
    match = _TWO_PARTS.fullmatch(message)
    what, advice = match.groups() if match else (message, None)
    # A name with an apostrophe: the semicolon behind it is inside of quotes.
    is_inside = advice is not None and advice.count("'") % 2 and not advice.count("'s ")
    return (message, "") if is_inside else (what, advice or "")


class RegistryError(Exception):
    """Base of every error that the registry raises on purpose.

    Args:
        message: what was wrong, and where.
        fixes: what to add to the call, in the order in which it is told.
    """

    summary: str = ""
    """A shorter message, where `differences` has the rest of it."""

    differences: Sequence[Difference] = ()
    """What the error is about, one by one."""

    def __init__(self, message: str = "", *fixes: Fix) -> None:
        super().__init__(message, *fixes)
        self.fixes = fixes

    def __str__(self) -> str:
        return self._with(fix.told(fix.python) for fix in self.fixes)

    def for_command_line(self) -> tuple[str, str]:
        """What was wrong and where; and what to do, with options in the place of arguments, or an empty text."""
        message = self.summary or (str(self.args[0]) if self.args else "")
        what, advice = in_two_parts(message)
        fixes = [fix.told(fix.options) for fix in self.fixes if fix.options]
        return what, "; ".join([*([advice] if advice else []), *fixes])

    def _with(self, advice: Iterable[str]) -> str:
        return "; ".join([str(self.args[0]) if self.args else "", *advice])


class NotFound(RegistryError):
    """A model, version, alias, name or file that does not exist."""


class Conflict(RegistryError):
    """What was asked for contradicts what is there, such as a file that would be overwritten."""


class Corrupt(RegistryError):
    """Stored bytes are not what was written: a flipped byte, a missing pack, an edited manifest."""

    pack: str | None = None
    """The pack that is damaged, where it is one."""


class Missing(Corrupt):
    """A file of the store that should be there is not."""


class Incompatible(RegistryError):
    """Two things that should fit do not: names, shapes or dtypes differ."""


class Unsupported(RegistryError):
    """Something that cannot be represented or read here, such as a sparse tensor or a newer format."""


class Invalid(RegistryError):
    """Input that breaks a rule: a malformed file, a bad name, a configuration with a wrong value."""


class StorageError(RegistryError):
    """The operating system refused to read or write: no space, no permission, an I/O error."""


@contextlib.contextmanager
def storage_errors(path: Path | str) -> Iterator[None]:
    """Turn an operating system's refusal into a `StorageError` that names the file and what to do."""
    try:
        yield
    except OSError as error:
        where = error.filename or path
        if error.errno in (errno.EACCES, errno.EPERM):
            advice = f"permission denied{_owner(Path(os.fsdecode(where)))}; ask its owner for access"
        else:
            advice = _ADVICE.get(error.errno or 0) or (error.strerror or str(error))
        raise StorageError(f"{os.fsdecode(where)}: {advice}") from error


@contextlib.contextmanager
def naming(label: str) -> Iterator[None]:
    """Put the name of the checkpoint that is being read in front of what goes wrong."""
    try:
        yield
    except RegistryError as error:
        named = type(error)(f"{label}: {error}")
        if isinstance(error, Corrupt) and isinstance(named, Corrupt):
            named.pack = error.pack
        raise named from error.__cause__


def _owner(path: Path) -> str:
    """Who owns a path, or the nearest folder above it that can be seen; a part of a message."""
    for place in (path, *path.parents):
        with contextlib.suppress(OSError):
            owner = place.stat().st_uid
            return f" ({place} belongs to user {owner}, this process runs as {os.geteuid()})"
    return ""
