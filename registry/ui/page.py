"""A page: what one address shows, before it is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, urlencode

from registry.catalog.versions import Version
from registry.store.errors import Invalid, RegistryError

BASE = ContextVar("BASE", default="")
"""What the addresses of the present request begin with, such as `/proxy/6007`."""

Args = Mapping[str, str]
"""What stands behind the question mark of an address."""


@dataclass(frozen=True)
class Page:
    """What one address shows.

    Attributes:
        template: the name of the template that draws it.
        place: which entry of the navigation it belongs to.
        document: the same for programs, in the shape that the command's `--json` prints.
        rows: the same for a spreadsheet; empty if it is no table.
        command: the command line that shows the same.
        python: the same in Python.
        context: what the template draws.
    """

    template: str
    title: str
    place: str
    document: Any
    rows: Sequence[Mapping[str, Any]] = ()
    command: str = ""
    python: str = ""
    context: Mapping[str, Any] = field(default_factory=dict)
    problem: RegistryError | None = None
    """What is wrong with what was typed into the page's form. The page shows all that it can without it."""


@dataclass(frozen=True)
class Moved:
    """Another address shows what was asked for."""

    to: str


def whole(args: Args, name: str, default: int, most: int) -> int:
    """A whole number of an address, from 0 on.

    Raises:
        Invalid: if it is no such number.
    """
    text = args.get(name, "")
    if not text:
        return default
    if not (text.isascii() and text.isdecimal() and len(text) < 12):
        raise Invalid(f"{name} is not a number", f"leave it out or give one from 0 to {most:,}")
    return min(int(text), most)


def address(*parts: str, **given: Any) -> str:
    """The address of a page, such as `/m/lenet5?sort=accuracy`; what is empty or None is left out."""
    path = f"{BASE.get()}/" + "/".join(quote(part, safe=":@") for part in parts)
    asked = {name: value for name, value in given.items() if value not in (None, "")}
    return f"{path}?{urlencode(asked)}" if asked else path


def address_of(version: Version) -> str:
    """The address of a version's page."""
    return address("m", version.model, version.name.partition(":")[2])


def address_of_name(name: str) -> str:
    """The address of the page of `lenet5:v3`."""
    model, _, number = name.partition(":")
    return address("m", model, number) if number else address("m", model)
