"""Retention: which of a run's versions are kept, and which of them keep the state of their optimizers.

The rules unite: a version that one of them keeps is kept. It is applied after a new version is published, never
before, and only to versions of the same run and of those that it was resumed from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from registry.catalog.lookups import Reader, marks
from registry.catalog.naming import removal
from registry.catalog.versions import SAVED_HERE, find_versions, with_descendants
from registry.log.metrics import Monitor, monitored
from registry.store.errors import Invalid, NotFound, RegistryError
from registry.store.text import quoted
from registry.upkeep.garbage import collect_garbage
from registry.upkeep.repacking import packs_of, tidy_behind
from registry.upkeep.thinning import thin

if TYPE_CHECKING:
    from registry.catalog.catalog import Catalog
    from registry.catalog.transactions import View
    from registry.catalog.versions import Version
    from registry.log.entries import Record
    from registry.store.store import Store


class Retention(NamedTuple):
    """What of a run stays. Nothing is removed unless `keep_last` or `keep_best` is given.

    Attributes:
        monitor: the metric that says which version is the best.
        keep_last: how many of the newest versions stay.
        keep_best: how many of the best versions stay.
        keep_optimizer: how many of the newest versions keep what training on from them needs.
    """

    monitor: Monitor | None = None
    keep_last: int | None = None
    keep_best: int | None = None
    keep_optimizer: int | None = None

    @classmethod
    def of(
        cls,
        monitor: str | None,
        mode: str | None,
        keep_last: int | None,
        keep_best: int | None,
        keep_optimizer: int | None,
    ) -> Retention:
        """Check the rules that a user gives.

        Raises:
            Invalid: saying which is wrong.
        """
        if monitor is None and (keep_best is not None or mode is not None):
            raise Invalid("the best version needs a metric: monitor='accuracy', mode='max'")
        for name, count in (
            ("keep_last", keep_last),
            ("keep_best", keep_best),
            ("keep_optimizer", keep_optimizer),
        ):
            if count is not None and (type(count) is not int or count < 1):
                raise Invalid(f"{name} is {quoted(str(count))}, expected a whole number of 1 or more")
        by = None if monitor is None else monitored(monitor, mode)
        return cls(by, keep_last=keep_last, keep_best=keep_best, keep_optimizer=keep_optimizer)

    def apply(self, catalog: Catalog, store: Store, runs: Sequence[str], model: str) -> None:
        """Remove, and thin, what the rules no longer keep.

        Args:
            runs: a run and those that it was resumed from, whose versions the rules are about.

        Raises:
            RegistryError: if a version could not be thinned; all the rest is done by then.
        """
        if self.keep_last is None and self.keep_best is None and self.keep_optimizer is None:
            return

        packs: set[str] = set()

        def compute(view: View) -> list[Record]:
            versions = self.superfluous(view, runs, model)
            packs.update(packs_of(view.query, [version.id for version in versions]))
            return [removal(version) for version in versions]

        removed = None
        if self.keep_last is not None or self.keep_best is not None:
            removed = catalog.commit(compute)
            tidy_behind(catalog, store, packs)
        failed = [] if self.keep_optimizer is None else self._thin(catalog, store, _of(catalog, runs, model))
        if removed or self.keep_optimizer is not None:
            collect_garbage(catalog, store)
        if failed:
            raise failed[0]

    def superfluous(self, view: Reader, runs: Sequence[str], model: str) -> list[Version]:
        """The versions of some runs that the rules no longer keep."""
        if self.keep_last is None and self.keep_best is None:
            return []
        versions = _of(view, runs, model)
        best = self._best(versions)
        if self.keep_best is not None and not best:
            # It is not known which one is the best, so none may go.
            return []
        kept = {version.id for version in versions[: self.keep_last or 1]}
        kept |= {version.id for version in best}
        kept |= {version.id for version in versions if version.aliases or version.tags}
        kept |= with_descendants(view, [version.id for version in versions])
        return [version for version in versions if version.id not in kept]

    def _thin(self, catalog: Catalog, store: Store, versions: Sequence[Version]) -> list[RegistryError]:
        """Thin all versions but the newest; what prevents it for some does not keep the others from it."""
        failed = []
        for version in versions[self.keep_optimizer :]:
            if "thinned-from" not in version.record:
                try:
                    thin(catalog, store, version.name)
                except NotFound:
                    # Another process has removed it meanwhile.
                    continue
                except RegistryError as error:
                    failed.append(error)
        return failed

    def _best(self, versions: Sequence[Version]) -> list[Version]:
        if self.monitor is None or self.keep_best is None:
            return []
        ranked = []
        for version in versions:
            value = self.monitor.value(version.loss, version.metrics)
            # NaN is never the best.
            if value is not None and value == value:
                ranked.append((value if self.monitor.smallest else -value, version.version, version))
        return [version for _, _, version in sorted(ranked, key=lambda item: item[:2])[: self.keep_best]]


def _of(catalog: Reader, runs: Sequence[str], model: str) -> list[Version]:
    """Versions of a model that some runs have saved, the newest first."""
    return find_versions(
        catalog, f"v.model = ? AND v.run IN ({marks(runs)}) AND {SAVED_HERE}", [model, *runs]
    )
