"""References: how people name a checkpoint."""

from __future__ import annotations

import re
from typing import NamedTuple

from registry.store.errors import Corrupt, Invalid
from registry.store.text import quoted

MAX_NAME = 128
MAX_EDGE = 2_048
"""Bytes of the kind, and of the parent, of an edge of the lineage."""

RESERVED_ALIASES = ("latest", "best")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\Z")
_VERSION = re.compile(r"v([1-9][0-9]{0,8})\Z")
PENDING = re.compile(r"pending-([1-9][0-9]{0,8})\Z")
"""What stands behind the colon for a version that waits to be shared; see `registry.upkeep.outbox`."""

_PREFIX = re.compile(r"[0-9a-f]{4,64}\Z")


class Reference(NamedTuple):
    """A parsed reference: a model with a version, with an alias, or alone, which means its latest version.

    A model alone may also be an id prefix.
    """

    model: str
    version: int | None = None
    alias: str | None = None

    @property
    def id_prefix(self) -> str | None:
        """The reference as an id prefix, if it can be read as one."""
        bare = self.version is None and self.alias is None
        return self.model if bare and _PREFIX.match(self.model) else None

    def __str__(self) -> str:
        if self.version is not None:
            return f"{self.model}:v{self.version}"
        return f"{self.model}@{self.alias}" if self.alias else self.model


def parse_reference(text: str) -> Reference:
    """Read `lenet5`, `lenet5:v3`, `lenet5@best` or an id prefix.

    >>> parse_reference("lenet5:v3")
    Reference(model='lenet5', version=3, alias=None)

    Raises:
        Invalid: if the text has none of these forms.
    """
    if "/" in text:
        raise Invalid(
            f"{quoted(text)} is a run or a path, expected a model or a version, such as lenet5:v3",
            "registry log RUN "
            "shows the versions of a run, and registry import FILE --name MODEL stores a file",
        )
    model, colon, version = text.partition(":")
    if colon:
        match = _VERSION.match(version)
        if PENDING.match(version):
            raise Invalid(
                f"{quoted(text)}: such a version can be loaded and shown, and gets a number once it is shared: registry outbox"
            )
        if not match:
            raise Invalid(f"{quoted(text)}: a version is written as v and its number, such as lenet5:v3")
        return Reference(check_name(model, "model"), version=int(match[1]))
    model, at, alias = text.partition("@")
    if at:
        return Reference(check_name(model, "model"), alias=check_name(alias, "alias"))
    return Reference(check_name(model, "model"))


def check_name(name: str, kind: str) -> str:
    """Check the name of a model, an alias, a tag or a run.

    Raises:
        Invalid: if it has other characters than letters, digits, dot, hyphen and underscore, or is too long.
    """
    if not is_name(name):
        raise Invalid(
            f"{quoted(name)} cannot be the name of {'an' if kind == 'alias' else 'a'} {kind}: use up to {MAX_NAME} "
            "letters, digits, '.', '_' and '-', starting with a letter or digit"
        )
    return name


def is_name(name: str) -> bool:
    """Whether a text is the name of a model, an alias, a tag or a run."""
    return len(name) <= MAX_NAME and _NAME.match(name) is not None


def check_version_name(text: str) -> str:
    """Check the name of a version, such as `lenet5:v3`.

    Raises:
        Invalid: if it has another form.
    """
    if parse_reference(text).version is None:
        raise Invalid(
            f"{quoted(text)}: the name of a version is a model's name, ':v' and a number, such as lenet5:v3"
        )
    return text


def check_run_name(name: str) -> str:
    """Check the full name of a run, which is a path below the folder of runs: a model, a slash and the run's own name.

    Raises:
        Corrupt: if it has another form, and so could lead out of that folder.
    """
    try:
        model, run = name.split("/")
        check_name(model, "model")
        check_name(run, "run")
    except (Invalid, ValueError, AttributeError):
        raise Corrupt(
            f"the registry has a run called {quoted(str(name))}, which is not a model's name, '/' and a name"
        ) from None
    return name


def check_text(text: str, what: str, longest: int = 1 << 20) -> str:
    """Check free text, such as a note.

    Args:
        what: what to call it in an error.
        longest: bytes in UTF-8 that it may have.

    Raises:
        Invalid: if it is no text, too long, or holds half a character (a lone surrogate), which UTF-8 cannot encode.
    """
    if not isinstance(text, str):
        raise Invalid(f"{what}: must be text, not {type(text).__qualname__}")
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise Invalid(f"{what}: {quoted(text)} is not valid Unicode text") from None
    if size > longest:
        raise Invalid(
            f"{what}: the text has {size:,} bytes, at most {longest:,} are kept", "put it into a file"
        )
    return text
