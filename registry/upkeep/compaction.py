"""Compaction: older versions of a model are stored as differences from a neighbour, bit for bit.

A few of the versions of a model are anchors and stay as they are. Those up to twenty before and after an anchor are
stored as differences, name by name, in a tree of which the anchor is the root: the one at distance 12 from it rests on
the one at distance 8, that on the anchor (see `_on_the_way`). So most rest on a near one, and none is more than four
differences away from whole tensors. Each tensor goes only as deep as that saves bytes. The newest version, those with an
alias, and artifacts stay plain too, so that the usual load is not slowed. A load turns differences back, and checks the
digests of what was saved.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from registry.catalog.resolving import resolve
from registry.catalog.versions import find_versions
from registry.log.reference import check_name
from registry.store.dtypes import ELEMENT_TYPES
from registry.store.errors import Corrupt, NotFound, Unsupported
from registry.store.manifest import Manifest, TensorInfo
from registry.store.text import texts
from registry.upkeep.repacking import needed_of, packs_of, repack, tidy, unless_gone

if TYPE_CHECKING:
    from registry.catalog.catalog import Catalog
    from registry.store.store import Store

REACH = 20
"""How many versions before and after an anchor are stored as differences.

The more there are the fewer versions stay plain, and the farther away from it some are: no more than four steps, as no
number up to 20 has more than four bits that are set.
"""

_MANIFESTS = 128
"""Manifests that are held in memory at a time."""

_WORTH_IT = 0.9
"""A pack of which a larger part is needed stays as it is."""


class Compacted(NamedTuple):
    """What became of one model; sizes in bytes.

    Attributes:
        versions: how many are stored as differences, or would be.
        before: bytes of the packs that were rewritten.
        after: bytes of those that took their place; None for a dry run.
        problem: why some packs could not be rewritten; those that were are in order.
    """

    model: str
    versions: int
    packs: int
    before: int
    after: int | None
    problem: str | None = None


CompactionProgress = Callable[[int, int, int], None]
"""Called with the bytes that were looked at, the bytes in all, and the bytes saved so far."""


def compact(
    catalog: Catalog,
    store: Store,
    models: str | Sequence[str] = (),
    *,
    dry_run: bool = False,
    progress: CompactionProgress = lambda done, total, saved: None,
) -> list[Compacted]:
    """Store older versions as differences from a neighbour, bit for bit; `collect_garbage` frees the space.

    Packs of which half or more is not needed any more become smaller as well. The newest version of each model, those
    with an alias, and one in some forty stay as they are. A model that cannot be compacted, such as for a byte that is
    not what was saved, does not stop the others.

    Args:
        models: all of them unless given.
        dry_run: only say which packs would be rewritten.
        progress: told the bytes done, the bytes in all, and the bytes saved so far.

    Raises:
        NotFound: if there is no such model.
    """
    models = texts(models)
    for model in models:
        resolve(catalog, check_name(model, "model"))
    staying, bases = _staying(catalog)
    kept = bases.union(*(_tensors_of(store, manifest_id) for manifest_id in staying))
    names = list(dict.fromkeys(models)) or [
        name for (name,) in catalog.query("SELECT DISTINCT model FROM versions ORDER BY model")
    ]
    plans = [_plan(catalog, store, model, staying=staying, bases=bases, kept=kept) for model in names]
    total = sum(plan.size for plan in plans)
    done = saved = 0
    found = []
    for plan in plans:
        packs = before = after = 0
        problem = None
        for pack, size in plan.packs.items():
            pairs = {digest: found for digest, found in plan.bases[pack].items() if digest not in kept}
            try:
                new = None if dry_run or not pairs else _rewrite(catalog, store, pack, size=size, bases=pairs)
            except (Corrupt, Unsupported) as error:
                new, problem = None, problem or str(error)
            if dry_run or new is not None:
                packs, before, after = packs + 1, before + size, after + (new or 0)
            done += size
            saved += 0 if new is None else size - new
            progress(done, total, saved)
        rest = packs_of(catalog.query, plan.all_versions) - plan.packs.keys()
        try:
            tidied = tidy(catalog, store, sorted(rest), dry_run=dry_run, most_users=None)
        except (Corrupt, Unsupported) as error:
            tidied, problem = [], problem or str(error)
        packs += len(tidied)
        before += sum(one.before for one in tidied)
        after += sum(one.after or 0 for one in tidied)
        versions = len(plan.versions) if packs > len(tidied) else 0
        found.append(
            Compacted(
                model=plan.model,
                versions=versions,
                packs=packs,
                before=before,
                after=None if dry_run else after,
                problem=problem,
            )
        )
    return found


class _Plan(NamedTuple):
    """What to do for one model.

    Attributes:
        all_versions: ids of the model's versions.
        versions: ids of those with tensors that become differences.
        packs: sizes of the packs to rewrite, by digest.
        bases: which tensor becomes a difference from one of which others, by pack.
    """

    model: str
    all_versions: Sequence[str]
    versions: Sequence[str]
    packs: Mapping[str, int]
    bases: Mapping[str, Mapping[str, Sequence[str]]]

    @property
    def size(self) -> int:
        return sum(self.packs.values())


def _staying(catalog: Catalog) -> tuple[set[str], set[str]]:
    """Ids of the versions and artifacts that stay as they are, and digests that differences rest on already."""
    ids = catalog.query(
        "SELECT v.id FROM versions v WHERE v.version = (SELECT MAX(o.version) FROM versions o WHERE o.model = v.model) "
        "UNION SELECT id FROM aliases UNION SELECT id FROM artifacts"
    )
    bases = catalog.query("SELECT DISTINCT base FROM tensors WHERE base IS NOT NULL")
    return {version_id for (version_id,) in ids}, {digest for (digest,) in bases}


def _tensors_of(store: Store, manifest_id: str) -> frozenset[str]:
    """The tensors of a manifest; none if it was removed meanwhile."""
    try:
        return store.tensors_of(manifest_id)
    except NotFound:
        return frozenset()


def _plan(
    catalog: Catalog,
    store: Store,
    model: str,
    staying: Collection[str],
    bases: Collection[str],
    kept: set[str],
) -> _Plan:
    """Choose anchors, and find what can become a difference from them.

    Args:
        staying: ids of the versions that stay as they are.
        bases: digests that differences rest on already.
        kept: digests that must stay plain; those of the anchors are added.
    """
    manifest = functools.lru_cache(_MANIFESTS)(_manifest_in(store))
    versions = find_versions(catalog, "v.model = ?", [model], order="v.version")
    plain, based, differences = [], [], set()
    for position, version in enumerate(versions):
        digests = _tensors_of(store, version.id)
        if any(place.base for place in catalog.locate(digests).values()):
            differences.add(position)
            continue
        plain.append(position)
        if not digests.isdisjoint(bases):
            based.append(position)
    anchors = _anchors(plain, based, [i for i in plain if versions[i].id in staying])
    for position in {*anchors.values()}:
        kept.update(tensor.digest for tensor in manifest(versions[position].id).tensors)
    candidates: dict[str, list[str]] = {}
    chosen: list[str] = []
    resting = differences | anchors.keys()
    # What others rest on comes before them.
    for position in sorted(anchors, key=lambda position: abs(position - anchors[position])):
        nearest = _on_the_way(position, anchors[position], resting)
        tensors = [
            dict(_named(manifest(versions[other].id)))
            for other in dict.fromkeys((nearest, anchors[position]))
        ]
        pairs: dict[str, list[str]] = {}
        for name, tensor in _named(manifest(versions[position].id)):
            alike = [base[name].digest for base in tensors if name in base and _alike(tensor, base[name])]
            # Values that two versions have swapped would rest on one another.
            alike = [
                base
                for base in alike
                if tensor.digest not in (*candidates.get(base, ()), *pairs.get(base, ()))
            ]
            if alike and tensor.digest not in alike and tensor.digest not in kept:
                pairs[tensor.digest] = list(dict.fromkeys(alike))
        if pairs:
            chosen.append(versions[position].id)
            for digest, found in pairs.items():
                candidates.setdefault(digest, found)
    packs: dict[str, int] = {}
    pairs_of: dict[str, dict[str, list[str]]] = {}
    places = catalog.locate(candidates)
    for digest in candidates:
        place = places.get(digest)
        if place and not place.base:
            packs[place.pack] = place.pack_size
            pairs_of.setdefault(place.pack, {})[digest] = candidates[digest]
    return _Plan(model, [version.id for version in versions], versions=chosen, packs=packs, bases=pairs_of)


def _manifest_in(store: Store) -> Callable[[str], Manifest]:
    """Reads manifests; one that was removed meanwhile has no tensors."""

    def manifest(manifest_id: str) -> Manifest:
        try:
            return store.manifest(manifest_id)
        except NotFound:
            return Manifest({}, {}, ())

    return manifest


def _anchors(plain: Sequence[int], based: Collection[int], staying: Collection[int]) -> dict[int, int]:
    """The position of an anchor for each position that is to become a difference.

    Positions that differences rest on already (`based`) come first, as they stay anyway. Then come those that stay for
    now (`staying`). Another one is chosen only where neither is within reach.
    """
    anchors = {*based}

    def nearest(position: int, among: Collection[int]) -> int | None:
        near = [other for other in among if abs(other - position) <= REACH]
        return min(near, key=lambda other: (abs(other - position), other), default=None)

    free = [position for position in plain if position not in anchors and position not in staying]
    for position in reversed(free):
        if nearest(position, anchors) is None:
            found = nearest(position, staying)
            anchors.add(next(p for p in free if p >= position - REACH) if found is None else found)
    chosen = {position: nearest(position, anchors) for position in free if position not in anchors}
    return {position: anchor for position, anchor in chosen.items() if anchor is not None}


def _on_the_way(position: int, anchor: int, resting: Collection[int]) -> int:
    """The position that one rests on, in a tree with an anchor as its root.

    The lowest bit of the distance from the anchor is taken away, until one is reached that is a difference as well, or
    the anchor.

    >>> [_on_the_way(position, 100, range(101, 121)) for position in (101, 104, 107, 114, 120)]
    [100, 100, 106, 112, 116]
    """
    side = 1 if position > anchor else -1
    distance = abs(position - anchor)
    while distance:
        distance &= distance - 1
        if anchor + side * distance in resting:
            break
    return anchor + side * distance


def _named(manifest: Manifest) -> Iterator[tuple[tuple[str, int], TensorInfo]]:
    """Tensors by path, and by their number there where several processes stored the shards of one."""
    counts: dict[str, int] = {}
    for path, slot in manifest.slots:
        number = counts[path] = counts.get(path, -1) + 1
        yield (path, number), manifest.tensors[slot]


def _alike(a: TensorInfo, b: TensorInfo) -> bool:
    """Whether a difference between two tensors is likely to be small: floats of one dtype and shape."""
    kind = ELEMENT_TYPES[a.dtype]
    return kind.is_float and kind.size > 1 and (a.dtype, a.shape) == (b.dtype, b.shape)


def _rewrite(
    catalog: Catalog, store: Store, pack: str, size: int, bases: Mapping[str, Sequence[str]]
) -> int | None:
    """Put a smaller pack in the place of one, and return its size.

    None if that would save too little, or another process has changed the pack first.
    """
    with unless_gone(catalog, pack):
        needed = needed_of(catalog.query, store, pack)
        if needed:
            chosen = {digest: found for digest, found in bases.items() if digest in needed}
            new = repack(
                catalog, store, pack=pack, needed=needed, bases=chosen, at_most=int(_WORTH_IT * size)
            )
            return new.size if new else None
    return None
