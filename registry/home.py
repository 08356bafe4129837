"""The home of a registry: its folder, its catalog and its store.

Functions of this package take a `Home`, or only its catalog or its store. `Registry`, the class for users, is a `Home`.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING, Self

from registry.catalog.catalog import Catalog
from registry.log import settings
from registry.release import VERSION
from registry.store import durable
from registry.store.errors import Conflict, NotFound, storage_errors

if TYPE_CHECKING:
    from registry.remote.remote import Remote
    from registry.store.store import Store

OUTBOX = "outbox"
"""In a computer's folder for a shared registry: the folder of its outbox."""

SETTINGS = settings.NAME
"""The name of the file in which a registry's folder says what it is."""


def default_root() -> str:
    """`REGISTRY_ROOT`, or `.registry` in the working directory."""
    return os.environ.get("REGISTRY_ROOT") or ".registry"


class Home:
    """The folder of a registry, with its catalog and its store.

    Attributes:
        root: the folder, as an absolute path.
        catalog: the models, versions and runs that the registry knows.

    Args:
        root: the folder, or the URL of a shared registry; `REGISTRY_ROOT` or `./.registry` unless given.
        create: make a new registry if the folder does not hold one.

    Raises:
        NotFound: if there is no registry and `create` is false.
        Conflict: if the folder is the bucket of a shared registry, or there is the registry of a folder at the URL.
        Unsupported: if a newer version of this package made it.
    """

    def __init__(self, root: Path | str | None = None, *, create: bool = True) -> None:
        self._outbox: Home | None = None
        given = str(root) if root is not None else default_root()
        self.remote = _remote_at(given)
        # A program may change its working directory.
        self.root = self.remote.folder if self.remote else Path(os.path.abspath(given))
        if self.remote is None and settings.are_of_a_bucket(self.root):
            raise Conflict(
                f"{self.root} is the bucket of a shared registry",
                f"open it with its URL, such as file://{self.root}",
            )
        self.catalog = Catalog(self.root, lambda: self.store, self.remote.log if self.remote else None)
        if not settings.are_there(self.root):
            is_there = self.remote is not None and self.remote.is_there()
            if not create and not is_there:
                raise NotFound(f"there is no registry at {given}", "make one with: registry init")
            if self.remote and not is_there:
                self.remote.prepare()
            self._create()
        self.catalog.format = settings.read_format(self.root)

    @functools.cached_property
    def store(self) -> Store:
        """The store of tensors; it asks the catalog where they lie."""
        # Lazy: start-up.
        from registry.store.store import Store

        return Store(self.root, self.catalog, self.remote.packs if self.remote else None)

    @property
    def outbox_home(self) -> Home:
        """The registry that keeps what cannot be shared yet; it is made if need be. See `registry.upkeep.outbox`."""
        # Its folder may be deleted once nothing waits in it.
        if self._outbox is None or not settings.are_there(self._outbox.root):
            self._outbox = Home(self.root / OUTBOX)
        return self._outbox

    @property
    def place(self) -> str:
        """Where the registry is: its folder, or its URL."""
        return self.remote.url if self.remote else str(self.root)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.place!r})"

    def __reduce__(self) -> tuple[type[Self], tuple[str]]:
        return type(self), (self.place,)

    def _create(self) -> None:
        # Lazy: start-up.
        from registry.store.store import FOLDERS

        holds_something = any(any((self.root / name).glob("*")) for name in ("packs", "manifests"))
        # Another process may just have made the settings.
        if holds_something and not settings.are_there(self.root):
            raise Conflict(
                f"{self.root} holds a registry without {settings.NAME}",
                f"if the file was lost, recreate it with one line: format = {settings.FORMAT}",
            )
        with storage_errors(self.root):
            is_own = not self.root.is_dir() or not any(self.root.iterdir())
            for folder in FOLDERS:
                durable.make_folder(self.root / folder, inner=1)
            created_by = f"torch-registry {VERSION}"
            if self.remote:
                settings.share(self.root, self.remote.url, self.remote.log_place)
            self.catalog.create(created_by)
            settings.create(self.root, created_by)
            if is_own:
                settings.hide_from_git(self.root)


def _remote_at(place: str) -> Remote | None:
    """The shared registry at a URL, or the one that a host's folder is for; None for a folder of its own."""
    is_url = ":" in place and _is_url(place)
    url = place if is_url else settings.shared_url(Path(place))
    if url is None:
        return None
    # Lazy: start-up.
    from registry.remote.remote import open_remote

    return open_remote(url, None if is_url else Path(os.path.abspath(place)))


def _is_url(place: str) -> bool:
    # Lazy: start-up.
    from registry.remote.urls import is_url

    return is_url(place)
