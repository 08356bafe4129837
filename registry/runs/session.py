"""What of a run decides about its next version, for whichever process publishes that."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from registry.catalog.runs import Runs
from registry.catalog.versions import SAVED_HERE, find_versions
from registry.store.errors import RegistryError
from registry.upkeep.retention import Retention

if TYPE_CHECKING:
    from registry.catalog.versions import Version
    from registry.home import Home

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Session:
    """A run, as another process may have it: `async_save` of torch publishes in one of its own.

    Attributes:
        name: of the run.
        model: that gets new versions.
        retention: the rules of what stays.
    """

    name: str
    model: str
    retention: Retention

    def origin(self, home: Home, first: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of the next version that say where it comes from.

        Args:
            first: what they are if it is the first version of the run.
        """
        where = f"v.model = ? AND v.run = ? AND {SAVED_HERE}"
        newest = find_versions(home.catalog, where, [self.model, self.name], limit=1)
        if not newest:
            return dict(first)
        provenance = {key: value for key, value in (first["provenance"] or {}).items() if key != "plan"}
        return {**first, "lineage": [], "parent": newest[0].name, "provenance": provenance}

    def superfluous(self, home: Home, saved_in: Home | None = None) -> list[Version]:
        """The versions that `retain` would remove now.

        Args:
            saved_in: as of `retain`.
        """
        chain = Runs(home.catalog, home.root).chain(self.name)
        return self.retention.superfluous((saved_in or home).catalog, runs=chain, model=self.model)

    def retain(self, home: Home, saved_in: Home | None = None) -> None:
        """Remove, and thin, what the run's rules no longer keep.

        Args:
            saved_in: where the new version is, if not there: in the outbox, whose versions the rules are about then.

        The new version is safe by now, so a failure is only logged. The next save tries again.
        """
        try:
            chain = Runs(home.catalog, home.root).chain(self.name)
            kept = saved_in or home
            self.retention.apply(kept.catalog, kept.store, runs=chain, model=self.model)
        except RegistryError as error:
            _logger.warning("%s: older versions stay, as the rules of the run fail: %s", self.name, error)
