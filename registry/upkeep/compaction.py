"""Compaction: older versions of a model are stored as differences from a neighbour, bit for bit.

Which tensors rest on which others is chosen in `choosing`. Each tensor goes only as deep as that saves bytes. The newest
version, those with an alias, and artifacts stay plain, so that the usual load is not slowed. A load turns differences
back, and checks the digests of what was saved.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from registry.catalog.resolving import resolve
from registry.log.reference import check_name
from registry.store.errors import Corrupt, Unsupported
from registry.store.text import texts
from registry.upkeep.choosing import Plan, plan_of, tensors_of, turning_back, with_alone, with_similar
from registry.upkeep.repacking import needed_of, packs_of, repack, tidy, unless_gone

if TYPE_CHECKING:
    from registry.catalog.catalog import Catalog
    from registry.store.store import Store

_WORTH_IT = 0.9
"""A pack of which a larger part is needed stays as it is."""

_PINNED = "SELECT id FROM aliases UNION SELECT id FROM artifacts"
"""The versions that users gave an alias, and cached artifacts: they always stay as they are."""

_NEWEST = "SELECT v.id FROM versions v WHERE v.version = (SELECT MAX(o.version) FROM versions o WHERE o.model = v.model)"
_NEWEST_OF_SEVERAL = (
    f"{_NEWEST} AND v.version > (SELECT MIN(o.version) FROM versions o WHERE o.model = v.model)"
)


class Compacted(NamedTuple):
    """What became of one model; sizes in bytes.

    Attributes:
        versions: how many are stored as differences or coded by themselves, or would be; of `expand`, how many are whole again.
        before: bytes of the packs that were rewritten.
        after: bytes of those that took their place; None for a dry run.
        problem: why some packs could not be rewritten; those that were are in order.
        measured: versions of other models that were found to be near, by the name of the version that rests on them.
    """

    model: str
    versions: int
    packs: int
    before: int
    after: int | None
    problem: str | None = None
    measured: Mapping[str, str] = MappingProxyType({})


CompactionProgress = Callable[[int, int, int], None]
"""Called with the bytes that were looked at, the bytes in all, and the bytes saved so far."""


def compact(
    catalog: Catalog,
    store: Store,
    models: str | Sequence[str] = (),
    *,
    similar: bool = False,
    alone: bool = False,
    dry_run: bool = False,
    progress: CompactionProgress = lambda done, total, saved: None,
) -> list[Compacted]:
    """Store older versions as differences from a neighbour, bit for bit; `collect_garbage` frees the space.

    Packs of which half or more is not needed any more become smaller as well. The newest version of each model, those
    with an alias, and one in some forty stay as they are. A model that cannot be compacted, such as for a byte that is
    not what was saved, does not stop the others.

    Args:
        models: all of them unless given.
        similar: store tensors as differences from those of other models, too, where they are near: a model's only version
            as well. They are compared by some of their values, so names do not matter.
        alone: code by itself what does not become a difference, the newest version as well: floats of 2 bytes to two
            thirds, those of 4 bytes to five sixths. A load of it then takes memory of its own, and is slower.
        dry_run: only say which packs would be rewritten.
        progress: told the bytes done, the bytes in all, and the bytes saved so far.

    Raises:
        NotFound: if there is no such model.
    """
    names = _names(catalog, models)
    pinned = _ids(catalog, _PINNED)
    staying = pinned | _ids(catalog, _NEWEST_OF_SEVERAL if similar else _NEWEST)
    bases = {
        digest for (digest,) in catalog.query("SELECT DISTINCT base FROM tensors WHERE base IS NOT NULL")
    }
    kept = bases.union(*(tensors_of(store, manifest_id) for manifest_id in staying))
    plans = [plan_of(catalog, store, model, staying=staying, bases=bases, kept=kept) for model in names]
    if similar:
        plans = with_similar(catalog, store, plans, kept=kept)
    if alone:
        by_alias = frozenset[str]().union(*(tensors_of(store, manifest_id) for manifest_id in pinned))
        plans = [with_alone(catalog, store, plan, staying=by_alias) for plan in plans]

    def rewrite(plan: Plan, pack: str, size: int) -> int | None:
        pairs = {digest: found for digest, found in plan.bases.get(pack, {}).items() if digest not in kept}
        by_itself = plan.alone.get(pack, ())
        if not pairs and not by_itself:
            return None
        return _rewrite(catalog, store, pack, bases=pairs, alone=by_itself, at_most=int(_WORTH_IT * size))

    found = []
    for plan, one in zip(plans, _run(plans, rewrite, dry_run=dry_run, progress=progress), strict=True):
        rest = packs_of(catalog.query, plan.all_versions) - plan.packs.keys()
        problem = one.problem
        try:
            tidied = tidy(catalog, store, sorted(rest), dry_run=dry_run, most_users=None)
        except (Corrupt, Unsupported) as error:
            tidied, problem = [], problem or str(error)
        found.append(
            one._replace(
                packs=one.packs + len(tidied),
                before=one.before + sum(pack.before for pack in tidied),
                after=None if one.after is None else one.after + sum(pack.after or 0 for pack in tidied),
                problem=problem,
            )
        )
    return found


def expand(
    catalog: Catalog,
    store: Store,
    models: str | Sequence[str] = (),
    *,
    dry_run: bool = False,
    progress: CompactionProgress = lambda done, total, saved: None,
) -> list[Compacted]:
    """Store versions as they are again, which undoes `compact`. They take more space, and loads are as fast as without it.

    Args:
        models: all of them unless given.
        dry_run: only say which packs would be rewritten.
        progress: told the bytes done, the bytes in all, and the bytes saved so far, which are less than none.

    Raises:
        NotFound: if there is no such model.
    """
    plans = [turning_back(catalog, store, model) for model in _names(catalog, models)]

    def rewrite(plan: Plan, pack: str, size: int) -> int | None:
        return _rewrite(catalog, store, pack, whole=store.pack_info(pack).places)

    return list(_run(plans, rewrite, dry_run=dry_run, progress=progress))


def _run(
    plans: Sequence[Plan],
    rewrite: Callable[[Plan, str, int], int | None],
    *,
    dry_run: bool,
    progress: CompactionProgress,
) -> Iterator[Compacted]:
    """Rewrite the packs of some plans, and tell what became of each model.

    Args:
        rewrite: puts another pack in the place of one of some size, and returns its size; None if it does not.
    """
    total = sum(plan.size for plan in plans)
    done = saved = 0
    for plan in plans:
        packs = before = after = 0
        problem = None
        for pack, size in plan.packs.items():
            try:
                new = None if dry_run else rewrite(plan, pack, size)
            except (Corrupt, Unsupported) as error:
                new, problem = None, problem or str(error)
            if dry_run or new is not None:
                packs, before, after = packs + 1, before + size, after + (new or 0)
            done += size
            saved += 0 if new is None else size - new
            progress(done, total, saved)
        yield Compacted(
            model=plan.model,
            versions=len(plan.versions) if packs else 0,
            packs=packs,
            before=before,
            after=None if dry_run else after,
            problem=problem,
            measured=dict(plan.measured) if packs else {},
        )


def _names(catalog: Catalog, models: str | Sequence[str]) -> list[str]:
    """The models that were named, each once; all of them if none was."""
    models = texts(models)
    for model in models:
        resolve(catalog, check_name(model, "model"))
    return list(dict.fromkeys(models)) or [
        name for (name,) in catalog.query("SELECT DISTINCT model FROM versions ORDER BY model")
    ]


def _ids(catalog: Catalog, sql: str) -> set[str]:
    return {manifest_id for (manifest_id,) in catalog.query(sql)}


def _rewrite(
    catalog: Catalog,
    store: Store,
    pack: str,
    *,
    bases: Mapping[str, Sequence[str]] = MappingProxyType({}),
    alone: Collection[str] = (),
    whole: Collection[str] = (),
    at_most: int | None = None,
) -> int | None:
    """Put another pack in the place of one, and return its size; see `repack`.

    None if that would save too little, or another process has changed the pack first.
    """
    with unless_gone(catalog, pack):
        needed = needed_of(catalog.query, store, pack)
        if needed:
            chosen = {digest: found for digest, found in bases.items() if digest in needed}
            new = repack(
                catalog,
                store,
                pack=pack,
                needed=needed,
                bases=chosen,
                alone=alone,
                whole=whole,
                at_most=at_most,
            )
            return new.size if new else None
    return None
