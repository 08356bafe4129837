"""The outbox: what was saved while a shared registry could not be reached, in a registry of its own on this computer.

Its versions are *pending*, and are called `lenet5:pending-1`. Once the shared registry answers, they are copied there, in the
order in which they were saved, and get the next numbers of their models. They keep their ids.
"""

from __future__ import annotations

import functools
import json
import logging
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from registry.catalog.lookups import Reader
from registry.catalog.naming import point_best, removal
from registry.catalog.resolving import ambiguous
from registry.catalog.versions import Version, by_id, find_versions
from registry.home import OUTBOX, Home
from registry.log.metrics import Monitor
from registry.log.reference import PENDING, Reference, is_name
from registry.remote.bucket import Unreachable
from registry.store import durable, places
from registry.store.errors import Corrupt, Invalid, NotFound, RegistryError
from registry.store.text import quoted
from registry.upkeep.copying import Copied, Removed, copy_pending
from registry.upkeep.garbage import collect_garbage
from registry.upkeep.verification import verify

if TYPE_CHECKING:
    from registry.catalog.catalog import Catalog
    from registry.catalog.transactions import View
    from registry.log.entries import Record

VARIABLE = "REGISTRY_UNREACHABLE"
"""Set to `fail` where a save that cannot be shared is to be an error, as on a computer that does not last."""

_MONITORS = "monitors.json"
_LONGEST = 1 << 20

_logger = logging.getLogger(__name__)


class Outbox:
    """The pending versions of a shared registry on this computer.

    Args:
        home: the shared registry.
    """

    def __init__(self, home: Home) -> None:
        self._home = home

    @property
    def home(self) -> Home:
        """The registry that has them; it is made if need be."""
        return self._home.outbox_home

    def __bool__(self) -> bool:
        """Whether there is a pending version."""
        return bool(self.versions())

    def versions(self, model: str | None = None) -> list[Version]:
        """The pending versions, of a model or of all, in the order in which they were saved."""
        if not self._folder.is_dir():
            return []
        where, given = ("1", []) if model is None else ("v.model = ?", [model])
        found = find_versions(self.home.catalog, where, given, order="v.created, v.model, v.version")
        return [version._replace(is_pending=True) for version in found]

    def find(self, reference: str) -> Version | None:
        """The pending version that a reference names: by its number, its id, or as the latest of its model.

        Returns:
            None if it names none.

        Raises:
            NotFound: if it is the name of a pending version that is not there.
            Conflict: if it is the beginning of several ids.
        """
        model, colon, rest = reference.partition(":")
        match = PENDING.match(rest)
        if colon and not match:
            return None
        if not match:
            model, _, alias = reference.partition("@")
            pending = self.versions(model) if alias in ("", "latest") and is_name(model) else []
            return pending[-1] if pending else self._with_id(reference)
        number = int(match[1])
        for version in self.versions(model):
            if version.version == number:
                return version
        raise NotFound(
            f"no version {quoted(reference)} is pending",
            f"if it was shared, it has a number now: registry ls {model}",
        )

    def check_numbered(self, references: Iterable[str]) -> None:
        """Refuse references that name a pending version, where one that has a number is wanted.

        Raises:
            Invalid: if one does, such as the latest of its model.
            NotFound, Conflict: as `find`.
        """
        for reference in references:
            if version := self.find(reference):
                raise Invalid(
                    f"{quoted(reference)}: {version.name} is on this computer alone, and gets a number once it is shared: "
                    "registry outbox"
                )

    def change(self, reference: str, change: Callable[[Catalog, str], Version]) -> Version | None:
        """Change the tags or notes of a pending version, which it keeps when it is shared.

        Args:
            change: changes them, given the catalog that has the version, and its name there.

        Returns:
            The version as it was before; None if the reference names no pending one.

        Raises:
            NotFound: if another process has shared it at this moment, or from `change`.
        """
        version = self.find(reference)
        if version is None:
            return None
        try:
            change(self.home.catalog, _name_here(version))
        except NotFound:
            self.find(version.name)
            raise
        return version

    def takes(self) -> bool:
        """Whether what cannot be shared is to be kept here.

        Raises:
            Invalid: if `REGISTRY_UNREACHABLE` is set to something else than `fail` or `keep`.
        """
        wanted = os.environ.get(VARIABLE) or "keep"
        if wanted not in ("keep", "fail"):
            raise Invalid(f"{VARIABLE} is {quoted(wanted)}; expected keep or fail")
        return wanted == "keep"

    def watch(self, model: str, by: Monitor) -> None:
        """Note by which metric the alias `best` of a model moves, once its pending versions are shared."""
        known = self._monitors()
        if known.get(model) != by:
            table = {name: [*one] for name, one in {**known, model: by}.items()}
            durable.write_file(
                self._folder / _MONITORS, json.dumps(table).encode(), folder=self.home.store.tmp
            )

    def share(self) -> list[Copied]:
        """Copy all pending versions to the shared registry, and remove them here.

        If it is interrupted, it is repeated: what is there already is not copied again. A version that is damaged here stays
        pending, and a warning names it; those behind it are shared.

        Raises:
            Unreachable: if the shared registry cannot be reached; what is pending stays so.
            StorageError, Corrupt: as `registry.upkeep.copying.copy_versions`.
        """
        pending = self.versions()
        if not pending:
            return []
        monitors, found = self._monitors(), []
        for version in pending:
            records = functools.partial(self._best, version, monitors.get(version.model))
            try:
                found.append(copy_pending(self.home, self._home, version, records))
                _logger.info("%s is %s now", version.name, found[-1].target)
            except Removed:
                # Another process has shared it, and somebody has removed it then.
                pass
            except (Corrupt, NotFound) as error:
                if not self._cannot_be_shared(version, error):
                    raise
                continue
            self._let_go(version)
        collect_garbage(self.home.catalog, self.home.store, grace=0)
        return found

    def share_if_possible(self) -> list[Copied]:
        """As `share`; where the shared registry cannot be reached, or refuses, what is pending stays so."""
        try:
            return self.share()
        except Unreachable as error:
            _logger.debug("%s", error)
        except RegistryError as error:
            _logger.warning("%s; what waits to be shared stays on this computer", error)
        return []

    def drop(self, references: Sequence[str] = ()) -> list[Version]:
        """Give up pending versions; all of them unless they are named.

        Raises:
            NotFound: if one is not there; none is given up then.
        """
        named: dict[str, Version] = {}
        for reference in references:
            version = self.find(reference)
            if version is None:
                raise NotFound(f"{quoted(reference)} names no pending version; nothing is given up")
            named[version.id] = version
        chosen = list(named.values()) if references else self.versions()
        if chosen:
            self._remove(chosen)
            collect_garbage(self.home.catalog, self.home.store, grace=0)
        return chosen

    @property
    def _folder(self) -> Path:
        return self._home.root / OUTBOX

    def _with_id(self, reference: str) -> Version | None:
        """The pending version whose id begins so; None if there is none, or a model is called so."""
        if not (prefix := Reference(reference).id_prefix):
            return None
        if self._home.catalog.query("SELECT 1 FROM versions WHERE model = ? LIMIT 1", [prefix]):
            return None
        matches = [version for version in self.versions() if version.id.startswith(prefix)]
        if len(matches) > 1:
            raise ambiguous(prefix, matches)
        return matches[0] if matches else None

    def _cannot_be_shared(self, version: Version, error: RegistryError) -> bool:
        """Whether an error comes of what this computer has of a version, and not of the shared registry."""
        if by_id(self.home.catalog, version.id) is None:
            # Another process has shared it, thinned it, or given it up.
            return True
        if not verify(self.home.catalog, self.home.store, _name_here(version)).problems:
            return False
        _logger.warning(
            "%s is damaged and cannot be shared (%s); give it up with: registry outbox --drop %s",
            version.name,
            error,
            version.name,
        )
        return True

    def _remove(self, versions: Sequence[Version]) -> None:
        def compute(view: View) -> list[Record]:
            there = [by_id(view, version.id) for version in versions]
            return [removal(version) for version in there if version]

        self.home.catalog.commit(compute)

    def _let_go(self, version: Version) -> None:
        """Remove a pending version that is shared now, once its tags and notes are there, which may have changed meanwhile."""
        while (now := by_id(self.home.catalog, version.id)) is not None:
            self._tell(now, taken_off=set(version.tags) - set(now.tags))
            self._remove_unchanged(now)
            version = now

    def _remove_unchanged(self, version: Version) -> None:
        """Remove a version, unless its tags or notes are others by now."""

        def compute(view: View) -> list[Record]:
            there = by_id(view, version.id)
            if there is None or (there.tags, there.notes) != (version.tags, version.notes):
                return []
            return [removal(there)]

        self.home.catalog.commit(compute)

    def _tell(self, version: Version, taken_off: Collection[str]) -> None:
        """Give a version in the shared registry the tags and notes that it lacks there.

        Args:
            taken_off: tags that it had here.
        """

        def compute(view: Reader) -> list[Record]:
            there = by_id(view, version.id)
            if there is None:
                return []
            return [
                *({"op": "untag", "id": version.id, "tag": tag} for tag in there.tags if tag in taken_off),
                *(
                    {"op": "tag", "id": version.id, "tag": tag}
                    for tag in version.tags
                    if tag not in there.tags
                ),
                *(
                    {"op": "note", "id": version.id, "at": at, "text": text}
                    for at, text in version.notes
                    if (at, text) not in there.notes
                ),
            ]

        if compute(self._home.catalog):
            self._home.catalog.commit(compute)

    @staticmethod
    def _best(version: Version, by: Monitor | None, view: View) -> list[Record]:
        """What moves the alias `best` of the shared registry, where the run that saved a version wanted that."""
        if by is None:
            return []
        value = by.value(version.loss, version.metrics)
        return point_best(view, version.model, by, manifest_id=version.id, value=value)

    def _monitors(self) -> Mapping[str, Monitor]:
        """By which metric the alias `best` of a model moves."""
        path = self._folder / _MONITORS
        if places.status_of(path) is None:
            return {}
        try:
            table = json.loads(places.read_file(path, _LONGEST))
            return {
                str(model): Monitor(str(metric), bool(smallest))
                for model, (metric, smallest) in table.items()
            }
        except (ValueError, TypeError, AttributeError):
            _logger.warning("%s is damaged; no alias `best` moves by it", path)
            return {}


def _name_here(version: Version) -> str:
    """The name of a pending version in the registry that has it."""
    return version._replace(is_pending=False).name
