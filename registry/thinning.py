"""Thinning: a version keeps its weights, and gives up what only training on from it would need."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from registry.change import USERS, Stale, locate

if TYPE_CHECKING:
    from registry.checkpoint import Checkpoint
    from registry.registry import Registry
    from registry.store.manifest import Manifest
    from registry.store.pack import PackInfo

_WASTE = 0.5
"""Share of a pack's bytes that nothing needs, from which on the rest is copied to a new pack."""

_MAX_USERS = 20  # manifests to read to know what of a pack is needed


def thin(registry: Registry, reference: str) -> Checkpoint:
    """See `Registry.thin`."""
    version = registry.resolve(reference)
    manifest = registry.store.manifest(version.id)
    kept = [name for name, tree in manifest.components.items() if not _only_for_training(name, tree)]
    if "model" not in kept or len(kept) == len(manifest.components):
        return registry[version.name]
    if registry.with_descendants([version.id]):
        return registry[version.name]
    reduced = manifest.reduced(kept, {**manifest.record, "thinned-from": version.id})
    id = registry.store.write_manifest(reduced)
    with registry.catalog.change() as change:
        if not change.connection.execute("SELECT 1 FROM versions WHERE id = ?", (version.id,)).fetchone():
            return registry[version.name]
        try:
            change.use(id, reduced, (), strict=False)
        except Stale:
            return registry[version.name]
        change.apply({"op": "remove", "id": version.id})
        change.apply({"op": "publish", "id": id, "model": version.model, "version": version.version})
        for alias in version.aliases:
            change.apply({"op": "alias", "model": version.model, "alias": alias, "id": id})
        for tag in version.tags:
            change.apply({"op": "tag", "id": id, "tag": tag})
        for written, text in version.notes:
            change.apply({"op": "note", "id": id, "at": written, "text": text})
    located = registry.catalog.locate({tensor.digest for tensor in reduced.tensors})
    for pack in {location.pack for location in located.values()}:
        _compact(registry, pack)
    return registry[version.name]


def _only_for_training(name: str, tree: Any) -> bool:
    """Whether a component is an optimizer's state, or the random state that goes with it."""
    if isinstance(tree, Mapping) and "$ordered" in tree:
        tree = tree["$ordered"]
    return name == "rng" or (isinstance(tree, Mapping) and {"state", "param_groups"} <= set(tree))


def _compact(registry: Registry, pack: str) -> None:
    """Copy what is needed of a pack to a new one, if most of it is not; gc takes the old one later."""
    users = users_of(registry, pack)
    if len(users) > _MAX_USERS:
        return
    manifests = [registry.store.manifest(id) for id in users]
    needed, size = needed_of(registry, pack, manifests)
    (total,) = registry.catalog.query("SELECT size FROM packs WHERE digest = ?", [pack])[0]
    if not needed or size > total * (1 - _WASTE):
        return
    copied: PackInfo = registry.store.copy_to_new_pack(needed)
    if copied.digest == pack:  # it holds nothing else, in the same order
        return
    with registry.catalog.change() as change:
        if change.can_replace(pack, copied, users):
            change.replace_pack(pack, copied)
            return
    registry.discard_pack(copied.digest)


def users_of(registry: Registry, pack: str) -> set[str]:
    """Ids of the manifests that rely on a pack."""
    return {id for (id,) in registry.catalog.query(USERS, [pack])}


def needed_of(registry: Registry, pack: str, manifests: Collection[Manifest]) -> tuple[set[str], int]:
    """Digests and bytes of the tensors in a pack that manifests have, or that those they have are differences from."""
    sizes = {tensor.digest: tensor.size for manifest in manifests for tensor in manifest.tensors}
    located = locate(registry.catalog.connection(), sizes)
    sizes |= {place.base: sizes[digest] for digest, place in located.items() if place.base}
    located |= registry.store.bases(located)
    needed = {digest for digest, place in located.items() if place.pack == pack}
    taken = {digest: located[digest].coded or sizes.get(digest, 0) for digest in needed}
    return needed, sum(taken.values())
