"""Finding: what a text in the find box means."""

from __future__ import annotations

import shlex

from registry.catalog.conditions import containing, matching
from registry.catalog.documents import version_document
from registry.catalog.resolving import resolve
from registry.catalog.versions import Version, find_versions
from registry.registry import Registry
from registry.store.errors import Invalid, RegistryError
from registry.ui.page import Args, Moved, Page, address, address_of

_MOST = 50
_LONGEST = 200
_COMPARES = frozenset("<>=")


def find(registry: Registry, args: Args) -> Page | Moved:
    """What a text names, or the models, runs and versions that have it in a name, an alias, a tag or a note."""
    text = args.get("q", "").strip()[:_LONGEST]
    versions: list[Version] = []
    models = [name for name in registry.names() if text.lower() in name.lower()] if text else []
    runs = [name for name in registry.runs if text.lower() in name.lower()][:_MOST] if text else []
    if text and not args.get("format"):
        if text in models:
            return Moved(address("m", text))
        if text in runs:
            return Moved(address("r", *text.split("/")))
        try:
            return Moved(address_of(resolve(registry.catalog, text)))
        except RegistryError:
            # It is no reference, but may be a part of something.
            pass
    if text:
        try:
            also = matching(registry.catalog, text)
        except Invalid:
            # It has a sign of comparison, and is no condition.
            also = containing(text)
        versions = find_versions(
            registry.catalog, also.sql, also.parameters, order="v.created DESC", limit=_MOST
        )
    return Page(
        template="find.html",
        title=f"Find {text}" if text else "Find",
        place="",
        document={
            "models": models[:_MOST],
            "runs": runs,
            "versions": [version_document(one) for one in versions],
        },
        command=shlex.join(["registry", "ls", "--match", text]) if text else "",
        python=f"registry.versions(where={text!r})" if _COMPARES & set(text) else "",
        rows=[{"name": one.name, "created": one.created, "id": one.id} for one in versions],
        context={"text": text, "models": models[:_MOST], "runs": runs, "versions": versions},
    )
