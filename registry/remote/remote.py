"""A shared registry as this host has it: the bucket, and a folder of this host for it."""

from __future__ import annotations

import contextlib
import os
import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

from registry.log import settings
from registry.log.settings import FORMAT
from registry.remote.accounts import endpoint_of
from registry.remote.bucket import Absent, Bucket
from registry.remote.folder import FolderBucket
from registry.remote.forked import ForkSafe
from registry.remote.journal import FOLDER as JOURNAL
from registry.remote.journal import BucketJournal, Journal
from registry.remote.packs import FOLDER as PACKS
from registry.remote.packs import RemotePacks
from registry.remote.probe import probe
from registry.remote.shared_log import SharedLog
from registry.remote.urls import Address, is_url, log_place, parse
from registry.store.digest import digest as digest_of
from registry.store.errors import Conflict, Invalid, Unsupported

if TYPE_CHECKING:
    from registry.remote.postgresql import PostgresJournal

SETTINGS = "registry.toml"
_LONGEST = 64 << 10
"""Bytes of the settings that are read at most."""
_FORMAT = re.compile(r"(?m)^format = ([0-9]{1,9})$")


class Remote:
    """A shared registry.

    Attributes:
        url: where it is, without keys.
        folder: this host's folder for it, with a copy of the log, the catalog, and packs that were needed here.
        log_place: where its log lies; empty for its bucket.
        bucket: where it is.
        log, packs: those that hosts share.
    """

    def __init__(self, url: str, bucket: Bucket, folder: Path, log_place: str = "") -> None:
        self.url = url
        self.folder = folder
        self.log_place = log_place
        self.bucket = bucket
        self.packs = RemotePacks(bucket, folder)
        journal: Journal = _in_postgresql(log_place) if log_place else BucketJournal(bucket)
        self.log = SharedLog(journal, self.packs, folder)

    def is_there(self) -> bool:
        """Whether there is a registry.

        Raises:
            Unsupported: if a newer version of this package made it.
            Conflict: if it is that of a folder, which is not shared.
            Corrupt: if the beginning of its log is missing.
        """
        text = (self.bucket.get(SETTINGS, _LONGEST) or b"").decode(errors="replace")
        if settings.are_of_a_folder(text):
            raise Conflict(
                f"{self.url} holds the registry of a folder, which is not shared",
                "open the folder as it is, and copy it to another URL with: registry push --all --to URL",
            )
        found = _FORMAT.search(text)
        if found and int(found[1]) > FORMAT:
            raise Unsupported(
                f"{self.url} has format {found[1]}, this version of torch-registry reads format {FORMAT}",
                "upgrade with: pip install -U torch-registry",
            )
        try:
            return self.log.is_there()
        except Absent:
            return False

    def prepare(self) -> None:
        """See that a registry can be made there. Where its log is in PostgreSQL, `put_log_in` has done so.

        Raises:
            Unsupported: if the store does not keep to what is asked of it.
            Conflict: if another host has made one at this moment, whose log lies elsewhere; or if packs are there already,
                which a collection of garbage would delete.
            StorageError: if it cannot be reached, or refuses.
        """
        if self.log_place:
            return
        packs = None
        # A folder in which nothing was made yet has none.
        with contextlib.suppress(Absent):
            packs = next(iter(self.bucket.list(PACKS)), None)
        if packs:
            raise Conflict(
                f"{self.url} has packs, and no log that names them",
                "put journal/ back from a backup, or use another URL",
            )
        if problem := probe(self.bucket):
            raise Unsupported(f"{self.url}: this store cannot hold a shared registry: {problem}")
        self.bucket.create(SETTINGS, b"format = %d\n" % FORMAT)
        if _log_place_in(self.bucket):
            raise Conflict(f"{self.url}: somebody has made a registry there at this moment", "repeat")


def open_remote(text: str, folder: Path | None = None) -> Remote:
    """The shared registry that a URL names. It may not be there yet.

    Args:
        folder: this host's folder for it; see `folder_for`.

    Raises:
        Invalid: if the URL is malformed, or there are no keys.
        Unsupported: if the client for it is not installed.
        StorageError: if this host has no folder for it yet, and it cannot be reached, or refuses.
    """
    address = parse(text)
    bucket = _bucket(address)
    folder = folder or folder_for(address)
    place = settings.shared_log(folder) if settings.are_there(folder) else _log_place_in(bucket)
    return Remote(str(address), bucket, folder, place or "")


def put_log_in(text: str, log: str) -> None:
    """Say that the log of a shared registry, which is not there yet, lies in PostgreSQL. It may be repeated.

    Args:
        text: the URL of the registry.
        log: that of the database.

    Raises:
        Invalid: if a URL is malformed, or there are no keys.
        Unsupported: if a client is not installed.
        Conflict: if there is a registry whose log lies elsewhere, or the database has another log for this URL.
        StorageError: if bucket or database cannot be reached, or refuse.
    """
    if not is_url(text):
        raise Invalid(
            "only the log of a shared registry can lie in PostgreSQL",
            "give its URL, such as s3://BUCKET/PREFIX",
        )
    address = parse(text)
    place = log_place(log, _name_of(address))
    bucket = _bucket(address)
    url, folder = str(address), folder_for(address)
    found = _log_place_in(bucket)
    if found is None and not Remote(url, bucket, folder).is_there():
        _in_postgresql(place).make()
        if not Remote(url, bucket, folder, place).is_there():
            bucket.create(SETTINGS, f'format = {FORMAT}\nlog = "{place}"\n'.encode())
        found = _log_place_in(bucket)
        if found is None:
            raise Conflict(
                f"{place}: the table has the log of a registry that is not at {url} any more",
                "drop it, or use another URL",
            )
    if (found or "").partition("#")[0] != log:
        raise Conflict(
            f"{url}: the log of this registry lies in {found or 'the bucket'} already, and stays there"
        )


def folder_for(address: Address) -> Path:
    """This host's folder for a shared registry: among the user's data, as it may hold the only copy of a save."""
    home = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(home).expanduser() / "torch-registry" / _name_of(address)


def _name_of(address: Address) -> str:
    return digest_of(f"{address} {endpoint_of(address)}".encode())[:16]


def _bucket(address: Address) -> Bucket:
    if address.scheme == "file":
        return FolderBucket(Path(address.prefix), marks=(SETTINGS, JOURNAL))
    try:
        # Lazy: loads obstore.
        from registry.remote.objects import is_usable
        from registry.remote.services import open_bucket
    except ImportError:
        raise Unsupported(
            f"{address.scheme}:// needs a client", "run: pip install 'torch-registry[s3]'"
        ) from None
    return ForkSafe(open_bucket(address), is_usable)


def _log_place_in(bucket: Bucket) -> str | None:
    """Where a registry says that its log lies: empty for its bucket. None if there are no settings."""
    data = bucket.get(SETTINGS, _LONGEST)
    if data is None:
        return None
    try:
        found = tomllib.loads(data.decode()).get("log", "")
    except (RecursionError, ValueError):
        raise Invalid(f"{bucket.url}/{SETTINGS}: is no TOML", "correct it") from None
    return str(found)


def _in_postgresql(place: str) -> PostgresJournal:
    try:
        # Lazy: loads psycopg.
        from registry.remote.postgresql import PostgresJournal
    except ImportError:
        raise Unsupported(
            "a log in PostgreSQL needs a client", "run: pip install 'torch-registry[postgresql]'"
        ) from None
    return PostgresJournal(place)
