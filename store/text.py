"""Text that users and others give: lists of it, and making it harmless for a terminal, a log or an error message."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

_LIMIT = 80
"""Characters of a text that `quoted` shows in full."""


def texts(given: str | Iterable[str]) -> list[str]:
    """Texts as a list; a single text is one of them, not its characters.

    >>> texts("lenet5:v3"), texts(("a", "b"))
    (['lenet5:v3'], ['a', 'b'])
    """
    return [given] if isinstance(given, str) else list(given)


def printable(text: str) -> str:
    """The text with control, bidirectional and unassigned characters spelled out.

    >>> printable("fc.weight")
    'fc.weight'
    >>> printable("\\x1b[31mred")
    '\\\\x1b[31mred'
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        c if unicodedata.category(c)[0] not in "CZ" or c == " " else c.encode("unicode_escape").decode()
        for c in text
    )


def quoted(text: str) -> str:
    """The text in quotes, harmless and short, for use inside a message."""
    if len(text) > _LIMIT:
        text = f"{text[: _LIMIT // 2]}…{text[-_LIMIT // 4 :]}"
    return f"'{printable(text)}'"
