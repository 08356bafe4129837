"""Thinning: a version gives up the states of its optimizers and its random state; only training on would need them."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from registry.catalog.naming import removal
from registry.catalog.resolving import resolve
from registry.catalog.versions import Version, find_versions, with_descendants
from registry.log.entries import Record, manifest_text
from registry.store.errors import NotFound
from registry.upkeep.repacking import tidy

if TYPE_CHECKING:
    from registry.catalog.catalog import Catalog
    from registry.catalog.transactions import View
    from registry.store.store import Store


def thin(catalog: Catalog, store: Store, reference: str) -> str:
    """Drop the states of optimizers and the random state of a version. Its other components stay, and its id changes.

    A version that others descend from, or that has no network under the name `model`, stays as it is.
    `collect_garbage` frees the space.

    Returns:
        The name of the version.
    """
    version = resolve(catalog, reference)
    manifest = store.manifest(version.id)
    kept = [name for name, tree in manifest.components.items() if not _only_for_training(name, tree)]
    if not {"model", "models"} & {*kept} or len(kept) == len(manifest.components):
        return version.name
    reduced = manifest.reduced(kept, {**manifest.record, "thinned-from": version.id})
    manifest_id, text = store.write_manifest(reduced)
    carried = manifest_text(text)

    def compute(view: View) -> list[Record]:
        present = find_versions(view, "v.id = ?", [version.id])
        is_taken = view.query("SELECT 1 FROM versions WHERE id = ?", [manifest_id])
        if not present or is_taken or with_descendants(view, [version.id]):
            return []
        # Garbage collection took the file, and the text is too large for the log.
        if not carried and not view.store.has(manifest_id):
            view.store.write_manifest(reduced)
        return _in_its_place(present[0], manifest_id, carried)

    if catalog.commit(compute):
        # Garbage collection took the file before the commit. Reading the manifest writes it again, from the log.
        if not store.has(manifest_id):
            # Another process has removed the version already.
            with contextlib.suppress(NotFound):
                store.manifest(manifest_id)
        places = catalog.locate({tensor.digest for tensor in manifest.tensors})
        tidy(catalog, store, {place.pack for place in places.values()})
    return version.name


def _in_its_place(version: Version, manifest_id: str, text: Mapping[str, str]) -> list[Record]:
    """The records that give a version another manifest; it keeps its number and all its names."""
    publish = {"op": "publish", "id": manifest_id, "model": version.model, "version": version.version}
    alias = {"op": "alias", "model": version.model, "id": manifest_id, "was": None}
    return [
        removal(version),
        {**publish, "instead": version.id, **text},
        *({**alias, "alias": name} for name in version.aliases),
        *({"op": "tag", "id": manifest_id, "tag": name} for name in version.tags),
        *({"op": "note", "id": manifest_id, "at": at, "text": note} for at, note in version.notes),
    ]


def _only_for_training(name: str, tree: Any) -> bool:
    """Whether a component is the state of an optimizer or of a list of them, or that of random generators."""
    parts = tree if isinstance(tree, list) and tree else [tree]
    return name == "rng" or all(map(_is_of_optimizer, parts))


def _is_of_optimizer(tree: Any) -> bool:
    if isinstance(tree, Mapping) and "$ordered" in tree:
        tree = tree["$ordered"]
    return isinstance(tree, Mapping) and {"state", "param_groups"} <= set(tree)
