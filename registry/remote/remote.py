"""A shared registry as this host has it: the bucket, and a folder of this host for it."""

from __future__ import annotations

import os
from pathlib import Path

from registry.remote.bucket import Bucket
from registry.remote.folder import FolderBucket
from registry.remote.forked import ForkSafe
from registry.remote.keys import find_places
from registry.remote.packs import RemotePacks
from registry.remote.probe import probe
from registry.remote.shared_log import SharedLog
from registry.remote.urls import Address, parse
from registry.store.digest import digest as digest_of
from registry.store.errors import Unsupported

SETTINGS = "registry.toml"


class Remote:
    """A shared registry.

    Attributes:
        url: where it is, without keys.
        folder: this host's folder for it, with a copy of the log, the catalog, and packs that were needed here.
        bucket: where it is.
        log, packs: those in the bucket.
    """

    def __init__(self, url: str, bucket: Bucket, folder: Path) -> None:
        self.url = url
        self.folder = folder
        self.bucket = bucket
        self.packs = RemotePacks(bucket, folder)
        self.log = SharedLog(bucket, self.packs)

    def is_there(self) -> bool:
        """Whether there is a registry."""
        return self.log.is_there()

    def prepare(self) -> None:
        """See that a registry can be made there.

        Raises:
            Unsupported: if the store does not keep to what is asked of it.
            StorageError: if it cannot be reached, or refuses.
        """
        if problem := probe(self.bucket):
            raise Unsupported(f"{self.url}: this store cannot hold a shared registry: {problem}")
        self.bucket.create(SETTINGS, b"format = 2\n")


def open_remote(text: str, folder: Path | None = None) -> Remote:
    """The shared registry that a URL names. It may not be there yet.

    Args:
        folder: this host's folder for it; see `folder_for`.

    Raises:
        Invalid: if the URL is malformed, or there are no keys.
        Unsupported: if the client for it is not installed.
    """
    address = parse(text)
    return Remote(str(address), _bucket(address), folder or folder_for(address))


def folder_for(address: Address) -> Path:
    """This host's folder for a shared registry: among the user's data, as it may hold the only copy of a save."""
    home = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    endpoint = find_places().get("endpoint", "") if address.scheme == "s3" else ""
    name = digest_of(f"{address} {endpoint}".encode())[:16]
    return Path(home).expanduser() / "torch-registry" / name


def _bucket(address: Address) -> Bucket:
    if address.scheme == "file":
        return FolderBucket(Path(address.prefix))
    if address.scheme != "s3":
        raise Unsupported(f"{address.scheme}:// is not supported yet; s3:// and file:// are")
    try:
        # Lazy: loads obstore.
        from registry.remote.s3 import S3Bucket, is_usable
    except ImportError:
        raise Unsupported("s3:// needs a client; run: pip install 'torch-registry[s3]'") from None
    return ForkSafe(S3Bucket(address), is_usable)
