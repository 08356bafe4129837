"""Resolving: from a reference, as people write it, to the one version that it names."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from registry.catalog.lookups import Reader
from registry.catalog.versions import Version, find_versions, metric_names, rank_versions
from registry.log.metrics import check_metric, is_smallest_best, smallest_is_best
from registry.log.reference import Reference, parse_reference
from registry.store.errors import Conflict, Fix, NotFound
from registry.store.text import quoted

_ADD_A_DIRECTION = Fix("", "add smallest=True or smallest=False", "add --smallest or --largest")


def resolve(catalog: Reader, text: str) -> Version:
    """The version that a reference names.

    Raises:
        Invalid: if the text is no reference.
        NotFound: if nothing has that name; suggests the nearest.
        Conflict: if an id prefix is ambiguous.
    """
    reference = parse_reference(text)
    found = _find(catalog, reference)
    if found:
        return found[0]
    if reference.id_prefix:
        # A range, not LIKE, so that SQLite uses the index.
        prefix = reference.id_prefix
        matches = find_versions(catalog, "v.id >= ? AND v.id < ?", [prefix, prefix + "g"], limit=4)
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise ambiguous(prefix, matches)
    raise _missing(catalog, reference)


def ambiguous(prefix: str, matches: Sequence[Version]) -> Conflict:
    """The error about the beginning of several ids."""
    names = ", ".join(f"{version.name} ({version.id[:12]})" for version in matches)
    return Conflict(f"{prefix} is the beginning of several ids: {names}", "give more digits")


def no_such_metric(catalog: Reader, model: str | None, metric: str) -> NotFound:
    """The error of asking for a metric that no version (of a model) has."""
    having = f"no version of {model} has" if model else "no version has"
    return NotFound(f"{having} the metric {quoted(metric)}", hint(metric, metric_names(catalog, model)))


def hint(text: str, names: Sequence[str]) -> str:
    """The advice of an error about a name that does not exist: suggest the nearest one, or list some; empty for none."""
    near = [name for name in names if name.startswith(text)] or difflib.get_close_matches(text, names, 1)
    if near:
        return f"did you mean {quoted(near[0])}?"
    some = f"there are {', '.join(sorted(names)[:5])}" if names else ""
    return f"{some} and {len(names) - 5} more" if len(names) > 5 else some


def direction_of(catalog: Reader, model: str | None, metric: str, smallest: bool | None) -> bool:
    """Whether the smallest value of a metric is the best: as given, else as its name says.

    Raises:
        NotFound: if the name does not tell, and no version of the model (or of any) has the metric.
        Invalid: if the name does not tell.
    """
    if smallest is not None:
        return smallest
    if (
        is_smallest_best(check_metric(metric)) is None
        and not rank_versions(catalog, model, metric, limit=1)[1]
    ):
        if model is not None:
            resolve(catalog, model)
        raise no_such_metric(catalog, model, metric)
    return smallest_is_best(metric, _ADD_A_DIRECTION)


def _find(catalog: Reader, reference: Reference) -> list[Version]:
    """The version that a reference names, unless it is an id prefix; empty if there is none."""
    named = [reference.model, reference.version or reference.alias]
    if reference.version is not None:
        return find_versions(catalog, "v.model = ? AND v.version = ?", named)
    if reference.alias not in (None, "latest"):
        pointed = "v.id = (SELECT id FROM aliases WHERE model = ? AND name = ?)"
        return find_versions(catalog, pointed, named)
    return find_versions(catalog, "v.model = ?", [reference.model], limit=1)


def _missing(catalog: Reader, reference: Reference) -> NotFound:
    """The error about a reference that names no version."""
    # What is missing may be named in a part of the log that cannot be read.
    has_gaps = catalog.query("SELECT 1 FROM state WHERE key = 'gaps'")
    gaps = "a part of the log cannot be read, registry verify says which" if has_gaps else ""
    versions = catalog.query(
        "SELECT version FROM versions WHERE model = ? ORDER BY version DESC LIMIT 5", [reference.model]
    )
    if not versions:
        models = [row[0] for row in catalog.query("SELECT DISTINCT model FROM versions")]
        return NotFound(f"there is no model {quoted(reference.model)}", hint(reference.model, models), gaps)
    if reference.alias:
        rows = catalog.query("SELECT name FROM aliases WHERE model = ?", [reference.model])
        meant = hint(reference.alias, [row[0] for row in rows] + ["latest"])
        return NotFound(f"{reference.model} has no alias {quoted(reference.alias)}", meant, gaps)
    newest = ", ".join(f"v{row[0]}" for row in versions)
    what = f"{reference.model} has no version v{reference.version}"
    return NotFound(what, f"its newest are {newest}", gaps)
