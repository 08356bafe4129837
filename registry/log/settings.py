"""The settings of a registry: one small file that says which format it has."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from registry.store import durable, places
from registry.store.errors import Invalid, Unsupported, storage_errors
from registry.store.text import printable, quoted

FORMAT = 2
"""The present format of a registry."""

NAME = "registry.toml"
SHARED = "shared-url"
"""In a host's folder for a shared registry: where that is."""

_LONGEST = 64 << 10
"""Bytes of the settings that are read at most."""

_AS_WRITTEN = re.compile(r'format = (\d{1,9})\ncreated_by = "[^"\\]*"\n\Z')
"""The settings as `create` writes them. They are read without a TOML parser."""

_FORMAT_LINE = re.compile(r"(?m)^(\s*format\s*=\s*)1(\s*(#.*)?)$")


def are_there(root: Path) -> bool:
    """Whether a folder has settings, and so is a registry."""
    with storage_errors(root / NAME):
        return places.status_of(root / NAME) is not None


def create(root: Path, created_by: str) -> None:
    """Write the settings of a new registry."""
    text = f'format = {FORMAT}\ncreated_by = "{created_by}"\n'
    durable.write_file(root / NAME, text.encode(), folder=root / "tmp")


def are_of_a_folder(text: str) -> bool:
    """Whether settings are those of a registry in a folder, and not of one in a bucket."""
    return "created_by" in text


def share(root: Path, url: str, log: str = "") -> None:
    """Note which shared registry this host's folder is for.

    Args:
        log: where its log lies, if not in the bucket.
    """
    durable.write_file(root / SHARED, f"{url}\n{log}".encode(), folder=root / "tmp")


def are_of_a_bucket(root: Path) -> bool:
    """Whether a folder is one that stands for a bucket: its log has an object for each entry.

    The first one is called as in `registry.remote.journal.entry_key`, which is too far up to be asked.
    """
    first = root / "journal" / f"{1:016d}.zst"
    with storage_errors(first):
        return places.status_of(first, inner=1) is not None


def shared_url(root: Path) -> str | None:
    """The shared registry that a host's folder is for; None for one of its own."""
    return _shared(root)[0].strip() or None


def shared_log(root: Path) -> str:
    """Where the log of the shared registry lies that a host's folder is for; empty for its bucket."""
    return _shared(root)[2].strip()


def _shared(root: Path) -> tuple[str, str, str]:
    path = root / SHARED
    with storage_errors(path):
        if places.status_of(path) is None:
            return "", "", ""
        return places.read_file(path, _LONGEST).decode("utf-8", errors="replace").partition("\n")


def hide_from_git(root: Path) -> None:
    """Let Git ignore a registry that lies in a working tree, unless the registry has a `.gitignore` already."""
    path = root / ".gitignore"
    if places.status_of(path) is None and any((folder / ".git").exists() for folder in root.parents):
        durable.write_file(path, b"*\n", folder=root / "tmp")


def read_format(root: Path) -> int:
    """The format that a registry has.

    Raises:
        Invalid: if the settings make no sense.
        Unsupported: if this program does not know the format.
        StorageError: if they cannot be read.
    """
    path = root / NAME
    text = _text(path)
    match = _AS_WRITTEN.match(text)
    found = int(match[1]) if match else _format_in(text, path)
    if type(found) is not int or found < 1:
        raise Invalid(f"{path}: format is {quoted(str(found))}, expected the number {FORMAT}")
    if found > FORMAT:
        raise Unsupported(
            f"{root} has format {found}, this version of torch-registry reads format {FORMAT}",
            "upgrade with: pip install -U torch-registry",
        )
    return found


def switch_format(root: Path) -> None:
    """Write into the settings that the registry has the present format from now on. Their other lines stay."""
    path = root / NAME
    text = _text(path)
    changed, count = _FORMAT_LINE.subn(rf"\g<1>{FORMAT}\g<2>", text)
    if count != 1:
        raise Invalid(f"{path}: has no line of its own that says format = 1", "write one, and repeat")
    durable.write_file(path, changed.encode(), folder=root / "tmp")


def _text(path: Path) -> str:
    with storage_errors(path):
        return places.read_file(path, _LONGEST).decode("utf-8", errors="replace")


def _format_in(text: str, path: Path) -> Any:
    """The format in settings that a user has edited."""
    # Lazy: start-up.
    import tomllib

    try:
        return tomllib.loads(text).get("format")
    except (RecursionError, ValueError) as error:
        # A number of thousands of digits is a ValueError, too.
        problem = "nested too deep" if isinstance(error, RecursionError) else printable(str(error))
        raise Invalid(f"{path}: {problem}", f"it needs one line: format = {FORMAT}") from None
