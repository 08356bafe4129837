"""Choosing: which tensors of a model become differences, from which others; which are coded by themselves.

A few of the versions of a model are anchors and stay as they are. Those up to twenty before and after an anchor are
stored as differences, name by name, in a tree of which the anchor is the root: the one at distance 12 from it rests on
the one at distance 8, that on the anchor (see `_on_the_way`). So most rest on a near one, and none is more than four
differences away from whole tensors.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from registry.catalog.versions import find_versions
from registry.store.dtypes import ELEMENT_TYPES
from registry.store.errors import Corrupt, NotFound, Unsupported
from registry.store.manifest import Manifest, TensorInfo
from registry.upkeep import nearness

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


class Plan(NamedTuple):
    """What to do for one model.

    Attributes:
        all_versions: ids of the model's versions.
        versions: ids of those with tensors that are coded, or turned back.
        packs: sizes of the packs to rewrite, by digest.
        bases: which tensor becomes a difference from one of which others, by pack.
        alone: which tensors are coded by themselves, by pack.
        measured: names of versions, and of those of other models that they rest on.
    """

    model: str
    all_versions: Sequence[str]
    versions: Collection[str]
    packs: Mapping[str, int]
    bases: Mapping[str, Mapping[str, Sequence[str]]] = MappingProxyType({})
    alone: Mapping[str, Collection[str]] = MappingProxyType({})
    measured: Mapping[str, str] = MappingProxyType({})

    @property
    def size(self) -> int:
        return sum(self.packs.values())


def plan_of(
    catalog: Catalog,
    store: Store,
    model: str,
    staying: Collection[str],
    bases: Collection[str],
    kept: set[str],
) -> Plan:
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
        digests = tensors_of(store, version.id)
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
    plan = Plan(model, [version.id for version in versions], versions=chosen, packs={})
    return _with_pairs(catalog, plan, candidates)


def _with_pairs(catalog: Catalog, plan: Plan, pairs: Mapping[str, Sequence[str]]) -> Plan:
    """A plan, with more tensors that become differences. Those that are differences already stay so."""
    packs, bases = dict(plan.packs), {pack: dict(found) for pack, found in plan.bases.items()}
    places = catalog.locate(pairs)
    # What others rest on comes before them.
    for digest in pairs:
        place = places.get(digest)
        if place and not place.base:
            packs[place.pack] = place.pack_size
            bases.setdefault(place.pack, {})[digest] = pairs[digest]
    return plan._replace(packs=packs, bases=bases)


def with_similar(catalog: Catalog, store: Store, plans: Sequence[Plan], kept: Collection[str]) -> list[Plan]:
    """Plans, with tensors that become differences from near ones of any version; see `nearness`.

    Args:
        kept: digests that must stay plain.
    """
    # Lazy: loads torch.
    from registry.store.recoding import is_worth_trying

    planned = {digest for plan in plans for found in plan.bases.values() for digest in found}
    chosen = {version_id for plan in plans for version_id in plan.all_versions}
    versions = find_versions(catalog, "1", order="v.created, v.model, v.version")
    manifest = functools.lru_cache(_MANIFESTS)(_manifest_in(store))
    first: dict[str, int] = {}
    movable: set[str] = set()
    for number, version in enumerate(versions):
        tensors = manifest(version.id).tensors
        compared = {one.digest for one in tensors if is_worth_trying(one)} - planned
        for digest in compared:
            first.setdefault(digest, number)
        if version.id in chosen:
            movable |= compared.difference(kept)
    found = [
        nearness.Found(info, first[info.digest], info.digest not in movable, sketch=sketch)
        for info, sketch in _sketches(catalog, store, first)
    ]
    rests = nearness.bases_of(found)
    names = {version.id: version.name for version in versions}
    extended = []
    for plan in plans:
        near: dict[str, Counter[int]] = {}
        pairs: dict[str, list[str]] = {}
        for version_id in plan.all_versions:
            for tensor in manifest(version_id).tensors:
                if base := rests.get(tensor.digest):
                    pairs[tensor.digest] = [base]
                    near.setdefault(version_id, Counter())[first[base]] += tensor.size
        measured = {
            names[version_id]: versions[count.most_common(1)[0][0]].name
            for version_id, count in near.items()
            if version_id in names
        }
        plan = plan._replace(versions={*plan.versions, *near}, measured=measured)
        extended.append(_with_pairs(catalog, plan, pairs))
    return extended


def _sketches(catalog: Catalog, store: Store, digests: Collection[str]) -> Iterator[tuple[TensorInfo, Any]]:
    """Stored tensors that are no differences, each with its sketch. Those that cannot be read are left out."""
    # Lazy: loads torch.
    from registry.store import loading

    by_pack: dict[str, list[str]] = {}
    for digest, place in catalog.locate(digests).items():
        if not place.base:
            by_pack.setdefault(place.pack, []).append(digest)
    for there in by_pack.values():
        mapped = loading.Mapped(store.packs)
        # The next verify names what is damaged.
        with contextlib.suppress(Corrupt, Unsupported):
            for item in store.wanted(there):
                mapped.decode([item])
                yield item.info, nearness.sketch_of(mapped.bytes(item), item.info.dtype)
                mapped.forget(item)


def with_alone(catalog: Catalog, store: Store, plan: Plan, staying: Collection[str]) -> Plan:
    """A plan, with the tensors that are coded by themselves where they do not become differences.

    Args:
        staying: digests that must stay as they are.
    """
    # Lazy: loads torch.
    from registry.store.recoding import is_worth_trying

    manifest = _manifest_in(store)
    of_version = {
        version_id: {one.digest for one in manifest(version_id).tensors if is_worth_trying(one)}.difference(
            staying
        )
        for version_id in plan.all_versions
    }
    packs, alone = dict(plan.packs), dict[str, set[str]]()
    places = catalog.locate(set().union(*of_version.values()))
    for digest, place in places.items():
        if not place.is_coded:
            packs[place.pack] = place.pack_size
            alone.setdefault(place.pack, set()).add(digest)
    new = set().union(*alone.values())
    versions = {version_id for version_id, digests in of_version.items() if not new.isdisjoint(digests)}
    return plan._replace(packs=packs, alone=alone, versions={*plan.versions, *versions})


def turning_back(catalog: Catalog, store: Store, model: str) -> Plan:
    """A plan of the packs that have tensors of a model coded."""
    versions: list[str] = []
    packs: dict[str, int] = {}
    ids = [version_id for (version_id,) in catalog.query("SELECT id FROM versions WHERE model = ?", [model])]
    for version_id in ids:
        places = catalog.locate(tensors_of(store, version_id)).values()
        coded = {place.pack: place.pack_size for place in places if place.is_coded}
        packs |= coded
        if coded:
            versions.append(version_id)
    return Plan(model, ids, versions=versions, packs=packs)


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


def tensors_of(store: Store, manifest_id: str) -> frozenset[str]:
    """The tensors of a manifest; none if it was removed meanwhile."""
    try:
        return store.tensors_of(manifest_id)
    except NotFound:
        return frozenset()
