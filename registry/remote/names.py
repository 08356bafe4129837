"""Names of places: a user calls a registry `team`, and no longer types its URL.

The names are a user's own, in a small file of the configuration folder. It holds places alone, never keys. The file may have
been edited, so it is read as anything that comes from outside.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path

from registry.log.reference import check_name, is_name
from registry.remote.urls import is_url, parse
from registry.store import durable, places
from registry.store.errors import Conflict, Invalid, NotFound, StorageError, naming, storage_errors
from registry.store.text import printable, quoted

_TABLE = "remotes"
_LONGEST = 64 << 10
"""Bytes of the file."""
_SHOWN = 10
"""Names that a message lists at most."""
_HEAD = "# Names of places; see: registry remote --help\n"


def named_places() -> dict[str, str]:
    """The user's names, sorted, and the place of each: a URL, or the absolute path of a folder.

    Raises:
        Invalid: if the file holds anything else. A URL with a password in it is not repeated.
        StorageError: if the file cannot be read.
    """
    return _read(_path())


def add_name(name: str, place: str) -> str:
    """Give a place a name. It may be repeated.

    Args:
        name: with the characters of a model's name.
        place: a URL, or a folder; nothing need be there.

    Returns:
        The place as it is kept: a URL, or the absolute path of a folder.

    Raises:
        Invalid: if the name or the place cannot be one, or a folder of this name would be taken for it.
        Conflict: if the name stands for another place.
        StorageError: if the file cannot be read or written; it stays as it was.
    """
    check_name(name, "place")
    place = _checked(place if is_url(place) else os.path.abspath(place))
    path = _path()
    with storage_errors(path):
        durable.make_folder(path.parent)
        with places.opened_folder(path.parent) as folder:
            durable.lock(folder)
            known = _read(path)
            if known.get(name) == place:
                return place
            if name in known:
                raise Conflict(
                    f"{name} is {known[name]} already", f"remove that first: registry remote remove {name}"
                )
            if os.path.isdir(name):
                raise Invalid(
                    f"{quoted(name)} is a folder here, and a folder goes before a name", "choose another name"
                )
            _write(path, {**known, name: place})
    return place


def remove_name(name: str) -> str:
    """Forget a name. The registry that it stands for stays as it is.

    Returns:
        The place that it stood for.

    Raises:
        NotFound: if no place has this name.
        Invalid: if the file holds anything else than names.
        StorageError: if the file cannot be read or written; it stays as it was.
    """
    path = _path()
    known = _read(path)
    if name in known:
        with storage_errors(path), places.opened_folder(path.parent) as folder:
            durable.lock(folder)
            known = _read(path)
            if (place := known.pop(name, None)) is not None:
                _write(path, known)
                return place
    raise NotFound(f"no place is called {quoted(name)}", _listed(known))


def place_of(text: str) -> str:
    """The place that a user means: a URL, a folder, or what a name stands for. A folder goes before a name.

    Raises:
        NotFound: if it is none of these; the names are listed.
        Invalid, StorageError: as `named_places`.
    """
    if is_url(text) or os.path.isdir(text) or not is_name(text):
        return text
    known = named_places()
    if text not in known:
        make = f"make a registry there with: registry --root {text} init"
        raise NotFound(
            f"there is no folder {quoted(text)} here, and no place is called so",
            _listed(known) if known else make,
        )
    return known[text]


def _listed(known: Mapping[str, str]) -> str:
    if not known:
        return "name a place with: registry remote add NAME PLACE"
    names = list(known)
    more = f" and {len(names) - _SHOWN} more; see registry remote list" if len(names) > _SHOWN else ""
    return f"the names are {', '.join(names[:_SHOWN])}{more}"


def _path() -> Path:
    try:
        folder = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser()
    except RuntimeError:
        raise StorageError(
            "this user has no home folder for names of places", "set XDG_CONFIG_HOME to a folder"
        ) from None
    return folder / "torch-registry" / "remotes.toml"


def _checked(place: str) -> str:
    """A place as it is kept.

    Raises:
        Invalid: if it is malformed, or has characters that are not shown.
    """
    if is_url(place):
        return str(parse(place))
    if not os.path.isabs(place) or printable(place) != place:
        raise Invalid(
            f"{quoted(place)} is no place for a registry",
            "give a URL, or the path of a folder without control characters",
        )
    return place


def _read(path: Path) -> dict[str, str]:
    with storage_errors(path):
        try:
            # Users keep such files elsewhere, behind a link.
            data = places.read_file(Path(os.path.realpath(path)), _LONGEST + 1)
        except FileNotFoundError:
            return {}
    if len(data) > _LONGEST:
        raise Invalid(f"{path}: has more than {_LONGEST:,} bytes", "correct it, or delete it")
    try:
        document = tomllib.loads(data.decode())
    except (RecursionError, ValueError):
        raise Invalid(f"{path}: is no TOML", "correct it, or delete it") from None
    table = document.pop(_TABLE, {})
    if document or not isinstance(table, dict):
        raise Invalid(
            f"{path}: expected names in a table [{_TABLE}] and nothing else", "correct it, or delete it"
        )
    found = {}
    for name in sorted(table):
        if not is_name(name) or not isinstance(table[name], str):
            raise Invalid(f"{path}: {quoted(name)} is no name with a text", "correct it, or delete it")
        with naming(f"{path}: {name}"):
            found[name] = _checked(table[name])
    return found


def _write(path: Path, known: Mapping[str, str]) -> None:
    lines = [
        f"{json.dumps(name)} = {json.dumps(known[name], ensure_ascii=False)}\n" for name in sorted(known)
    ]
    data = f"{_HEAD}[{_TABLE}]\n{''.join(lines)}".encode()
    if len(data) > _LONGEST:
        raise Conflict(
            f"{path}: would have more than {_LONGEST:,} bytes", "remove names that you do not need"
        )
    durable.write_file(path, data)
