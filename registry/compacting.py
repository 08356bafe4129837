"""Compaction: older versions of a model are stored as differences from a neighbour, bit for bit.

Of the versions of a model one in sixteen is an anchor and stays as it is; those between are stored as differences from
the anchor before them, name by name. The newest version, those with an alias, and artifacts stay plain too, so that
the usual load is not slowed. A load turns differences back, and checks the digests of what was saved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from registry.progress import Progress, silent
from registry.reference import check_name
from registry.store.dtypes import ELEMENT_TYPES
from registry.store.manifest import Manifest, TensorInfo
from registry.thinning import needed_of, users_of
from registry.versions import Version, find_versions

if TYPE_CHECKING:
    from registry.registry import Registry

REACH = 15
"""How many versions after an anchor are stored as differences from it.

One that is farther away gives larger differences, and fewer versions that stay plain: in the series of
`benchmarks/compaction.py` 12 took less than 7, and 19 less than 12.
"""

_WORTH_IT = 0.9  # of a pack's bytes, above which it stays as it is
_FLOATS = ("float", "bfloat")


class Compacted(NamedTuple):
    """What became of one model; sizes in bytes.

    Attributes:
        versions: how many are stored as differences, or would be.
        before: bytes of the packs that were rewritten.
        after: bytes of those that took their place; None for a dry run.
    """

    model: str
    versions: int
    packs: int
    before: int
    after: int | None


def compact(
    registry: Registry, models: Sequence[str] = (), *, dry_run: bool = False, progress: Progress = silent
) -> list[Compacted]:
    """See `Registry.compact`."""
    for model in models:
        registry.resolve(check_name(model, "model"))
    kept = _plain(registry)
    names = list(dict.fromkeys(models)) or [
        name for (name,) in registry.catalog.query("SELECT DISTINCT model FROM versions ORDER BY model")
    ]
    plans = [_plan(registry, model, kept) for model in names]
    total = sum(plan.size for plan in plans)
    done = 0
    found = []
    for plan in plans:
        packs = before = after = 0
        for pack, size in plan.packs.items():
            bases = {digest: base for digest, base in plan.bases[pack].items() if digest not in kept}
            new = None if dry_run or not bases else _rewrite(registry, pack, size, bases, plan.manifest)
            if dry_run or new is not None:
                packs, before, after = packs + 1, before + size, after + (new or 0)
            done += size
            progress(done, total)
        versions = len(plan.versions) if packs else 0
        found.append(Compacted(plan.model, versions, packs, before, None if dry_run else after))
    return found


class _Plan(NamedTuple):
    """What to do for one model: by pack, its size, and which of its tensors become a difference from which other."""

    model: str
    versions: Sequence[str]
    packs: Mapping[str, int]
    bases: Mapping[str, Mapping[str, str]]
    manifest: Callable[[str], Manifest]

    @property
    def size(self) -> int:
        return sum(self.packs.values())


def _plain(registry: Registry) -> set[str]:
    """Digests of the tensors that stay as they are, whatever else is done."""
    query = registry.catalog.query
    ids = query(
        "SELECT v.id FROM versions v WHERE v.version = (SELECT MAX(o.version) FROM versions o WHERE o.model = v.model) "
        "UNION SELECT id FROM aliases UNION SELECT id FROM artifacts"
    )
    kept = {digest for (digest,) in query("SELECT DISTINCT base FROM tensors WHERE base IS NOT NULL")}
    for (id,) in ids:
        kept.update(tensor.digest for tensor in registry.store.manifest(id).tensors)
    return kept


def _plan(registry: Registry, model: str, kept: set[str]) -> _Plan:
    """Choose anchors, which are added to what is kept, and find what can become a difference from them."""
    manifests: dict[str, Manifest] = {}

    def manifest(id: str) -> Manifest:
        if id not in manifests:
            manifests[id] = registry.store.manifest(id)
        return manifests[id]

    versions = find_versions(registry.catalog, "v.model = ?", [model], order="v.version")
    coded = _coded(registry, versions, manifest)
    candidates: dict[str, str] = {}
    chosen: list[str] = []
    anchor: dict[tuple[str, int], TensorInfo] = {}
    since = REACH
    for version in versions:
        if version.id in coded:
            since += 1
            continue
        tensors = dict(_named(manifest(version.id)))
        if since >= REACH:
            anchor, since = tensors, 0
            kept.update(tensor.digest for tensor in tensors.values())
            continue
        since += 1
        pairs = {
            tensor.digest: anchor[name].digest
            for name, tensor in tensors.items()
            if name in anchor and _alike(tensor, anchor[name])
        }
        pairs = {digest: base for digest, base in pairs.items() if digest != base and digest not in kept}
        if pairs:
            chosen.append(version.id)
            for digest, base in pairs.items():
                candidates.setdefault(digest, base)
    packs: dict[str, int] = {}
    bases: dict[str, dict[str, str]] = {}
    for digest, place in registry.catalog.locate(candidates).items():
        if not place.base:
            packs[place.pack] = place.pack_size
            bases.setdefault(place.pack, {})[digest] = candidates[digest]
    return _Plan(model, chosen, packs, bases, manifest)


def _coded(registry: Registry, versions: Sequence[Version], manifest: Callable[[str], Manifest]) -> set[str]:
    """Versions that are stored as differences already, which cannot be anchors."""
    if not registry.catalog.query("SELECT 1 FROM tensors WHERE base IS NOT NULL LIMIT 1"):
        return set()
    found = set()
    for version in versions:
        located = registry.catalog.locate({tensor.digest for tensor in manifest(version.id).tensors})
        if any(place.base for place in located.values()):
            found.add(version.id)
    return found


def _named(manifest: Manifest) -> Iterator[tuple[tuple[str, int], TensorInfo]]:
    """Tensors by path, and by their number there where several processes stored the shards of one."""
    counts: dict[str, int] = {}
    for path, slot in manifest.slots:
        number = counts[path] = counts.get(path, -1) + 1
        yield (path, number), manifest.tensors[slot]


def _alike(a: TensorInfo, b: TensorInfo) -> bool:
    is_float = a.dtype.startswith(_FLOATS) and ELEMENT_TYPES[a.dtype].size > 1
    return is_float and (a.dtype, a.shape) == (b.dtype, b.shape)


def _rewrite(
    registry: Registry,
    pack: str,
    size: int,
    bases: Mapping[str, str],
    manifest: Callable[[str], Manifest],
) -> int | None:
    """Put a smaller pack in the place of one; its size, or None if it would save too little or others came first."""
    users = users_of(registry, pack)
    needed, _ = needed_of(registry, pack, [manifest(id) for id in users])
    if not needed:
        return None
    copied = registry.store.copy_to_new_pack(
        needed, {digest: base for digest, base in bases.items() if digest in needed}
    )
    if copied.digest == pack:
        return None
    if copied.size <= _WORTH_IT * size:
        with registry.catalog.change() as change:
            if change.can_replace(pack, copied, users):
                change.replace_pack(pack, copied)
                return copied.size
    registry.discard_pack(copied.digest)
    return None
