"""The errors that this project raises.

Every one of them says what was wrong and where, and apart from that what to do next. In Python both stand in one line; the
command line prints two. Arguments that would help are named as Python has them, or as options on the command line. The
errors live in the lowest layer so that every other layer can raise them.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

_OPTIONS = {"adapters": "adapt"}
"""What the command line calls an argument, where it is not the same word."""

_REFUSALS = {
    errno.ENOSPC: ("no space left on the device", "free some and repeat"),
    errno.EDQUOT: ("the disk quota is used up", "free some space and repeat"),
    errno.EFBIG: ("the file would exceed the allowed file size", "raise the limit (ulimit -f) and repeat"),
    errno.EROFS: ("the file system is read-only", "use another --root or remount it"),
    errno.EMFILE: ("too many open files", "raise the limit (ulimit -n) and repeat"),
    errno.EIO: ("the disk reports an I/O error", "check the disk"),
}
"""What is wrong where the operating system refuses, and what to do."""


class Fix(NamedTuple):
    """What to do about an error, such as what to add to a call so that it works.

    Attributes:
        lead: what comes before it, such as `if that is meant`; empty for none.
        python: arguments, or a sentence.
        options: the same for the command line; empty if it has nothing like it.
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


class RegistryError(Exception):
    """Base of every error that the registry raises on purpose.

    Args:
        message: what was wrong, and where.
        advice: what to do, in the order in which it is told. A text is the same in Python and on the command line; a
            `Fix` has words for each.

    >>> str(Conflict("model.pt: the file exists", "choose another name"))
    'model.pt: the file exists; choose another name'
    """

    summary: str = ""
    """A shorter message, where `differences` has the rest of it."""

    differences: Sequence[Difference] = ()
    """What the error is about, one by one."""

    def __init__(self, message: str = "", *advice: Fix | str) -> None:
        super().__init__(message, *advice)
        self.message = message
        self.fixes = tuple(Fix("", one, one) if isinstance(one, str) else one for one in advice if one)

    def __str__(self) -> str:
        return "; ".join([self.message, *(fix.told(fix.python) for fix in self.fixes)])

    def for_command_line(self) -> tuple[str, str]:
        """What was wrong and where; and what to do, with options in the place of arguments, or an empty text."""
        advice = [fix.told(fix.options) for fix in self.fixes if fix.options]
        return self.summary or self.message, "; ".join(advice)

    def about(self, what: str) -> Self:
        """The same error with a name in front of its message: of the file, checkpoint or argument that it is about."""
        return type(self)(f"{what}: {self.message}", *self.fixes)


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
        where = os.fsdecode(error.filename or path)
        if error.errno in (errno.EACCES, errno.EPERM):
            problem, *advice = f"permission denied{_owner(Path(where))}", "ask its owner for access"
        else:
            problem, *advice = _REFUSALS.get(error.errno or 0) or (error.strerror or str(error),)
        raise StorageError(f"{where}: {problem}", *advice) from error


@contextlib.contextmanager
def naming(label: str) -> Iterator[None]:
    """Put the name of the checkpoint that is being read in front of what goes wrong."""
    try:
        yield
    except RegistryError as error:
        named = error.about(label)
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
