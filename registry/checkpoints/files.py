"""Files of a version: those that its folder had when it was imported, and those that were attached to it since."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from registry.catalog.attached import MARK, Attached, Attachment, attached, attachment
from registry.catalog.commit import publish_all
from registry.catalog.resolving import resolve
from registry.checkpoints.checkpoint import Checkpoint
from registry.log.reference import MAX_NAME
from registry.store.digest import digest
from registry.store.errors import Invalid, NotFound
from registry.store.pack import contents_of
from registry.store.text import printable, quoted

if TYPE_CHECKING:
    from registry.catalog.transactions import View
    from registry.home import Home
    from registry.log.entries import Record

FILES = "files"
"""The component that holds the files of an imported folder: bytes by relative name."""

_RESULT = "result"
"""The component of an artifact's manifest."""


class File(NamedTuple):
    """A file of a version.

    Attributes:
        name: relative to the folder, with `/` between its parts.
        size: in bytes.
        attached: when it was attached, in UTC, ISO 8601; None if it came with an imported folder.
    """

    name: str
    size: int
    attached: str | None


def attach(home: Home, reference: str, paths: Sequence[Path | str], *, force: bool = False) -> list[Attached]:
    """Attach files to a version, such as what was made from it: all of them, or none. They stay as long as the version does.

    Args:
        paths: the files; each is attached under its name without the folder.
        force: take the place of attached files of these names.

    Raises:
        NotFound: if there is no such version or file.
        Invalid: if one is no regular file, cannot be called so, or has other bytes than its size says.
        Conflict: if the version has another file of this name and `force` is false, or somebody is writing to a file.
        StorageError: if the disk is full or refuses.
    """
    kept = {file.name for file in files_of(home, reference) if file.attached is None}
    names = [_name_of(Path(path)) for path in paths]
    for name in names:
        if name in kept or names.count(name) > 1:
            raise Invalid(f"there is a file {quoted(name)} already", "give yours another name")
    contents = [contents_of(Path(os.path.realpath(path))) for path in paths]
    digests = [digest(memoryview(data)) for _, data in contents]
    # Equal files are one artifact.
    distinct = {one: data for one, (_, data) in zip(digests, contents, strict=True)}
    made: list[Attached] = []

    def records(view: View, stored: Sequence[tuple[str, Mapping[str, str]]]) -> list[Record]:
        made.clear()
        version = resolve(view, reference)
        by_digest = dict(zip(distinct, stored, strict=True))
        found: list[Record] = []
        for name, one, (status, _) in zip(names, digests, contents, strict=True):
            artifact_id, text = by_digest[one]
            file = Attachment(name=name, size=status.st_size, id=artifact_id)
            record = attachment(view, version, file, force=force)
            about = {"at": record["at"], "key": record["key"], "to": record["record"][MARK]}
            made.append(Attached(version=version.name, **about, **file._asdict()))
            found += [] if record["was"] == artifact_id else [{**record, **text}]
        return found

    publish_all(
        home.catalog,
        home.store,
        [home.store.encode({_RESULT: data}) for data in distinct.values()],
        record={"kind": "artifact"},
        records=records,
        what=", ".join(map(printable, names)),
    )
    return made


def files_of(home: Home, reference: str) -> list[File]:
    """The files of a version, by name; no file is read.

    Raises:
        NotFound: if there is no such version.
    """
    checkpoint = Checkpoint.named(home, reference)
    found = [File(one.name, one.size, one.at) for one in attached(home.catalog, checkpoint.row)]
    manifest = checkpoint.store.manifest(checkpoint.id)
    for name, slot in _kept(manifest.components.get(FILES)):
        size = len(slot) // 2 if isinstance(slot, str) else manifest.tensors[slot].size
        found.append(File(name, size, None))
    return sorted(found)


def read_file(home: Home, reference: str, name: str) -> bytes:
    """The bytes of a file of a version.

    Raises:
        NotFound: if the version has no such file.
        Corrupt: if a byte is not what was stored.
    """
    checkpoint = Checkpoint.named(home, reference)
    for one in attached(home.catalog, checkpoint.row):
        if one.name == name:
            data = home.store.get(one.id, only=None, label=f"{checkpoint.name}: {printable(name)}")[_RESULT]
            return bytes(data)
    kept = checkpoint.files
    if name not in kept:
        raise NotFound(
            f"{checkpoint.name} has no file {quoted(name)}", f"registry files {checkpoint.name} lists them"
        )
    return kept[name]


def _name_of(path: Path) -> str:
    name, shown = path.name, printable(str(path))
    if not path.exists():
        raise NotFound(f"{shown}: there is no such file")
    if not path.is_file():
        raise Invalid(f"{shown}: not a regular file")
    if printable(name) != name or len(name) > MAX_NAME:
        raise Invalid(f"{shown}: a file that is attached cannot be called so", "rename it")
    return name


def _kept(document: Any) -> Iterator[tuple[str, str | int]]:
    """Name and bytes of each file, by the document of the component; anything else in it is passed over."""
    pairs = document.items() if isinstance(document, Mapping) else ()
    if isinstance(document, Mapping) and "$dict" in document:
        pairs = document["$dict"]
    for name, value in pairs:
        if isinstance(name, str) and isinstance(value, Mapping) and "$bytes" in value:
            yield name, value["$bytes"]
