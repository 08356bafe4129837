"""Naming: aliases, tags, notes, and taking versions out of the catalog."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from registry.catalog.lookups import Reader, best_id
from registry.catalog.resolving import hint, resolve
from registry.catalog.versions import Version
from registry.log.entries import Record, now
from registry.log.reference import RESERVED_ALIASES, check_name, check_text
from registry.store.errors import Conflict, Invalid, NotFound, fix
from registry.store.text import quoted, texts

if TYPE_CHECKING:
    from registry.catalog.catalog import Catalog
    from registry.catalog.transactions import View
    from registry.log.metrics import Monitor


def set_alias(catalog: Catalog, reference: str, alias: str) -> Version:
    """Point an alias of the checkpoint's model at the checkpoint.

    Raises:
        Invalid: if the alias is malformed or kept by the registry (`latest`, `best`).
    """
    _check_alias(alias)
    return _change(
        catalog, reference, lambda view, version: point(view, version.model, alias, manifest_id=version.id)
    )


def point(view: Reader, model: str, alias: str, manifest_id: str) -> list[Record]:
    """The record that points an alias at a version; none if it points there already."""
    was = pointed_at(view, model, alias)
    if was == manifest_id:
        return []
    return [{"op": "alias", "model": model, "alias": alias, "id": manifest_id, "was": was}]


def point_best(view: Reader, model: str, by: Monitor, manifest_id: str, value: float | None) -> list[Record]:
    """The record that points `best` at the best version once one more is published; none if it points there already.

    NaN never wins; of equal values the earlier one does.

    Args:
        by: which version is the best.
        manifest_id, value: of the one that is published.
    """
    best = best_id(view.query, model, by.metric, smallest=by.smallest)
    if value is not None and not math.isnan(value):
        is_better = best is None or (value < best[1] if by.smallest else value > best[1])
        best = (manifest_id, value) if is_better else best
    return point(view, model, "best", manifest_id=best[0]) if best else []


def pointed_at(view: Reader, model: str, alias: str) -> str | None:
    """The id that an alias points at; None if there is no such alias."""
    rows = view.query("SELECT id FROM aliases WHERE model = ? AND name = ?", [model, alias])
    return rows[0][0] if rows else None


def remove_alias(catalog: Catalog, model: str, alias: str) -> None:
    """Take an alias away; the checkpoint stays."""
    _check_alias(alias)

    def take_off(view: View, version: Version) -> list[Record]:
        return [{"op": "unalias", "model": model, "alias": alias, "was": version.id}]

    _change(catalog, f"{model}@{alias}", take_off)


def set_tag(catalog: Catalog, reference: str, tag: str) -> Version:
    """Attach a tag to a checkpoint."""
    check_name(tag, "tag")

    def attach(view: View, version: Version) -> list[Record]:
        return [] if tag in version.tags else [{"op": "tag", "id": version.id, "tag": tag}]

    return _change(catalog, reference, attach)


def remove_tag(catalog: Catalog, reference: str, tag: str) -> Version:
    """Take a tag off a checkpoint."""

    def take_off(view: View, version: Version) -> list[Record]:
        if tag not in version.tags:
            raise NotFound(f"{version.name} has no tag {quoted(tag)}", hint(tag, version.tags))
        return [{"op": "untag", "id": version.id, "tag": tag}]

    return _change(catalog, reference, take_off)


def add_note(catalog: Catalog, reference: str, text: str) -> Version:
    """Attach a note, any text, to a checkpoint.

    Raises:
        Invalid: if it is no text, or longer than a note may be.
    """
    check_text(text, "note")
    written = now()
    return _change(
        catalog,
        reference,
        lambda view, version: [{"op": "note", "id": version.id, "at": written, "text": text}],
    )


def removal(version: Version) -> Record:
    """The record that removes a version with its aliases and tags."""
    return {"op": "remove", "id": version.id, "aliases": [*version.aliases], "tags": [*version.tags]}


def remove(
    catalog: Catalog, references: str | Sequence[str], *, force: bool = False, dry_run: bool = False
) -> list[Version]:
    """Take versions out of the catalog, all or none.

    Args:
        references: one or several.
        force: also versions that have an alias or a tag.
        dry_run: only say which versions it would be.

    Raises:
        Conflict: if an alias or a tag holds one of them.
    """
    found: list[Version] = []

    def compute(view: Reader) -> list[Record]:
        versions = {version.id: version for version in (resolve(view, one) for one in texts(references))}
        for version in versions.values():
            held = [f"alias {name}" for name in version.aliases] + [f"tag {name}" for name in version.tags]
            if held and not force:
                raise Conflict(
                    f"{version.name} is held by {', '.join(held)}",
                    "take that off first",
                    fix("or use", force=True),
                )
        found[:] = versions.values()
        return [removal(version) for version in found]

    if dry_run:
        compute(catalog)
    else:
        catalog.commit(compute)
    return found


def _check_alias(alias: str) -> None:
    check_name(alias, "alias")
    if alias in RESERVED_ALIASES:
        raise Invalid(f"the alias {quoted(alias)} is kept by the registry", "choose another name")


def _change(catalog: Catalog, reference: str, records: Callable[[View, Version], list[Record]]) -> Version:
    """Record something about the version that a reference names, and return the version as it was before."""
    found: list[Version] = []

    def compute(view: View) -> list[Record]:
        found[:] = [resolve(view, reference)]
        return records(view, found[0])

    catalog.commit(compute)
    return found[0]
