"""Conditions: which versions are asked for, as people write it, such as `accuracy > 0.95 and epoch <= 20`.

A condition is read here and becomes SQL with parameters: no text of it is run.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from registry.catalog.lookups import Reader
from registry.catalog.resolving import hint
from registry.catalog.versions import Condition, metric_names
from registry.log.metrics import bare
from registry.store.errors import Invalid, NotFound
from registry.store.text import quoted

FIELDS = {
    "loss": "v.loss",
    "epoch": "v.epoch",
    "step": "v.step",
    "version": "v.version",
    "size": "(SELECT size FROM manifests WHERE id = v.id)",
    "created": "v.created",
}
"""What a comparison can name beside metrics, and where SQL finds it."""

_MOST = 20
"""Comparisons in one condition."""

_TOKEN = re.compile(
    r"""\s*(?:(?P<sign><=|>=|==|!=|<|>|=)|(?P<quoted>"[^"]*"|'[^']*')|(?P<word>[^\s<>=!"']+)|(?P<odd>\S))"""
)
_NUMBER = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]{1,4})?\Z")
_SHAPE = "expected comparisons such as accuracy > 0.95, joined by and"


class _Token(NamedTuple):
    """A word, a text in quotes or a sign, and the character that it begins at, counted from 1."""

    kind: str
    text: str
    at: int


def parse_condition(catalog: Reader, text: str, model: str | None = None) -> Condition:
    """Read a condition over versions: comparisons of a name with a value, joined by `and`.

    A name is a metric, such as `val/loss`, or one of `loss`, `epoch`, `step`, `version`, `size` (bytes) and `created` (a date
    or a time, in UTC unless it says otherwise). A metric with spaces or signs in its name stands in quotes. A version
    without a value, or with NaN, is left out.

    Args:
        model: whose metrics there are; those of all models unless given.

    Raises:
        Invalid: if the text is no condition, naming the character.
        NotFound: if no version has a metric of the name.
    """
    if not isinstance(text, str):
        raise Invalid(f"where is {quoted(str(text))}, expected a text such as 'accuracy > 0.95'")
    tokens = _tokens(text)
    known = metric_names(catalog, model)
    parts: list[Condition] = []
    while tokens:
        if parts:
            joint = tokens.pop(0)
            if joint.kind != "word" or joint.text.lower() != "and":
                raise _wrong(joint.at, f"has {quoted(joint.text)} where 'and' should be")
        if len(parts) == _MOST:
            raise Invalid(f"where has more than {_MOST} comparisons", "give fewer")
        if len(tokens) < 3:
            at = tokens[0].at if tokens else len(text) + 1
            raise _wrong(at, "has the beginning of a comparison")
        parts.append(_comparison(*tokens[:3], known=known, model=model))
        del tokens[:3]
    if not parts:
        raise Invalid("where is empty", _SHAPE)
    return Condition(
        " AND ".join(f"({part.sql})" for part in parts), [one for part in parts for one in part.parameters]
    )


def _tokens(text: str) -> list[_Token]:
    found = []
    text = text.rstrip()
    place = 0
    while place < len(text):
        match = _TOKEN.match(text, place)
        assert match is not None
        assert match.lastgroup is not None
        token = _Token(match.lastgroup, match[match.lastgroup], match.start(match.lastgroup) + 1)
        if token.kind == "odd":
            raise _wrong(token.at, f"has {quoted(token.text)}")
        found.append(token)
        place = match.end()
    return found


def _comparison(
    name: _Token, sign: _Token, value: _Token, *, known: Sequence[str], model: str | None
) -> Condition:
    if name.kind == "sign":
        raise _wrong(name.at, f"has {quoted(name.text)} where a name should be")
    if sign.kind != "sign":
        raise _wrong(sign.at, f"has {quoted(sign.text)} where a sign such as > should be")
    if value.kind == "sign":
        raise _wrong(value.at, f"has {quoted(value.text)} where a value should be")
    field = name.text.strip("\"'") if name.kind == "quoted" else name.text
    compare = "=" if sign.text == "==" else sign.text
    if field == "created":
        return _when(compare, value)
    if not _NUMBER.match(value.text):
        raise _wrong(value.at, f"has {quoted(value.text)} where a number should be")
    # A float, as SQLite has no larger whole numbers than 64 bits; it compares both kinds exactly.
    number = float(value.text)
    if field in FIELDS:
        return Condition(f"{FIELDS[field]} {compare} ?", [number])
    field = bare(field)
    if field not in known:
        raise _no_such_name(name.at, field, known, model)
    sql = f"EXISTS (SELECT 1 FROM metrics c WHERE c.id = v.id AND c.name = ? AND c.value {compare} ?)"
    return Condition(sql, [field, number])


def _when(compare: str, value: _Token) -> Condition:
    """A comparison with a time, or with a day, which is all of its hours."""
    text = value.text.strip("\"'") if value.kind == "quoted" else value.text
    try:
        moment = datetime.datetime.fromisoformat(text)
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=datetime.UTC)
        is_day = len(text) <= len("2026-11-01") and "T" not in text
        after = moment + datetime.timedelta(days=1) if is_day else moment
        start, end = _stamp(moment), _stamp(after)
    except (ValueError, OverflowError):
        raise _wrong(value.at, f"has {quoted(text)} where a date such as 2026-11-01 should be") from None
    if not is_day:
        return Condition(f"v.created {compare} ?", [start])
    sql, given = {
        "=": ("v.created >= ? AND v.created < ?", [start, end]),
        "!=": ("v.created < ? OR v.created >= ?", [start, end]),
        "<": ("v.created < ?", [start]),
        "<=": ("v.created < ?", [end]),
        ">": ("v.created >= ?", [end]),
        ">=": ("v.created >= ?", [start]),
    }[compare]
    return Condition(sql, list[Any](given))


def _stamp(moment: datetime.datetime) -> str:
    """A time as records have it."""
    return moment.astimezone(datetime.UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def _wrong(at: int, problem: str) -> Invalid:
    return Invalid(f"where {problem}, at character {at}", _SHAPE)


def _no_such_name(at: int, name: str, known: Sequence[str], model: str | None) -> NotFound:
    whose = f" of {model}" if model else ""
    names = ", ".join([*known[:20], *(["..."] if len(known) > 20 else []), *FIELDS])
    near = hint(name, [*known, *FIELDS]) if name else ""
    suggestion = f"{near} " if near.startswith("did you mean") else ""
    return NotFound(
        f"where names {quoted(name)} at character {at}, which no version{whose} has",
        f"{suggestion}there are {names}",
    )


_TEXTS = (
    "v.model || ':v' || v.version LIKE ? ESCAPE '!'",
    "EXISTS (SELECT 1 FROM aliases n WHERE n.id = v.id AND n.model || '@' || n.name LIKE ? ESCAPE '!')",
    "EXISTS (SELECT 1 FROM tags n WHERE n.id = v.id AND n.name LIKE ? ESCAPE '!')",
    "EXISTS (SELECT 1 FROM notes n WHERE n.id = v.id AND n.text LIKE ? ESCAPE '!')",
)
"""Conditions over the table `v`: a text of the version has a pattern."""


_COMPARES = re.compile(r"[<>=]")


def matching(catalog: Reader, text: str, model: str | None = None) -> Condition:
    """Versions with a text in a name, tag, alias or note, or at the beginning of their id; case does not count.

    A text with a sign of comparison is a condition, as in `accuracy>0.95`; see `parse_condition`.
    """
    return parse_condition(catalog, text, model) if _COMPARES.search(text) else containing(text)


def containing(text: str) -> Condition:
    """Versions with a text in a name, tag, alias or note, or at the beginning of their id; case does not count."""
    escaped = re.sub("[!%_]", r"!\g<0>", text)
    given = [*[f"%{escaped}%"] * len(_TEXTS), f"{escaped}%"]
    return Condition(f"{' OR '.join(_TEXTS)} OR v.id LIKE ? ESCAPE '!'", given)
