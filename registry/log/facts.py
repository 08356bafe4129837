"""Facts: what the catalog shows of a checkpoint, taken from the record in its manifest.

A manifest may come from anywhere. A value of the wrong type is left out here, so that no reader of the catalog meets
it, and `verify` names it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from registry.log.entries import MAX_NUMBER
from registry.log.metrics import is_metric
from registry.log.reference import MAX_EDGE, check_run_name
from registry.store.digest import is_digest
from registry.store.errors import Corrupt, RegistryError
from registry.store.manifest import Manifest, untagged
from registry.store.text import quoted

_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:]{8}(\.[0-9]{1,6})?Z\Z")


class Facts(NamedTuple):
    """What the catalog has of a version.

    Attributes:
        loss: None for NaN too, which never counts as best.
        metrics: by name; None for NaN likewise.
        lineage: kind and parent of each edge.
        shown: everything else that is shown, as plain values.
        problems: the fields that were left out because of their type, in words.
    """

    created: str
    epoch: int | None
    step: int | None
    loss: float | None
    run: str | None
    metrics: Mapping[str, float | None]
    lineage: Sequence[tuple[str, str]]
    shown: Mapping[str, Any]
    problems: Sequence[str]


UNKNOWN = Facts(
    created="",
    epoch=None,
    step=None,
    loss=None,
    run=None,
    metrics={},
    lineage=(),
    shown={"components": {}},
    problems=("the manifest cannot be read",),
)
"""The facts of a manifest that cannot be read."""


def facts_of(manifest: Manifest) -> Facts:
    """What the catalog shows of a checkpoint."""
    record: dict[str, Any] = {}
    problems = []
    for key, value in manifest.record.items():
        is_right = _FIELDS.get(key)
        if value is None or is_right is None or is_right(value):
            record[key] = value
        else:
            problems.append(f"{quoted(key)} in its record is malformed")
    provenance = record.get("provenance")
    if provenance is not None:
        provenance = {key: value for key, value in provenance.items() if value is not None}
        wrong = _malformed_in_provenance(provenance)
        problems += [f"{quoted(f'provenance/{key}')} in its record is malformed" for key in wrong]
        record["provenance"] = {key: value for key, value in provenance.items() if key not in wrong}
    loss = record.get("loss")
    shown = {
        key: value
        for key, value in record.items()
        if value is not None and key not in ("epoch", "step", "loss", "metrics", "dcp")
    }
    shown["components"] = manifest.contents
    if loss is not None and math.isnan(loss):
        shown["loss_is_nan"] = True
    return Facts(
        created=record.get("created") or "",
        epoch=record.get("epoch"),
        step=record.get("step"),
        loss=number(loss),
        run=record.get("run"),
        metrics={name: number(value) for name, value in (record.get("metrics") or {}).items()},
        lineage=list(dict.fromkeys((edge["kind"], edge["parent"]) for edge in record.get("lineage") or ())),
        shown=shown,
        problems=problems,
    )


def malformed(record: Mapping[str, Any]) -> str | None:
    """The first field of a record that has the wrong type; None if all are right.

    A None in its provenance is no fault: `facts_of` leaves it out.
    """
    if isinstance(provenance := record.get("provenance"), Mapping):
        given = {key: value for key, value in provenance.items() if value is not None}
        record = {**record, "provenance": given}
    wrong = _malformed_fields(record)
    return None if not wrong else wrong[0] if wrong[0] in _FIELDS else f"provenance/{wrong[0]}"


def check_shown(record: Mapping[str, Any]) -> None:
    """Check that all fields of a version's record in the catalog have the right types.

    Raises:
        Corrupt: if one has not.
    """
    wrong, components = _malformed_fields(record), record.get("components")
    if components is not None and not _is_contents(components):
        wrong.append("components")
    if wrong:
        raise Corrupt(
            f"the catalog holds a damaged record ({quoted(wrong[0])} is malformed)",
            "recreate it with: registry rebuild",
        )


def sound_run(record: Any) -> dict[str, Any]:
    """The record of a run, from its JSON, without the fields that have the wrong type."""
    return _sound(record, _RUN_FIELDS)


def sound_artifact(record: Any) -> dict[str, Any]:
    """The record of an artifact, from its JSON, without the fields that have the wrong type."""
    return _sound(record, _ARTIFACT_FIELDS)


def _sound(record: Any, fields: Mapping[str, Callable[[Any], bool]]) -> dict[str, Any]:
    """A record from its JSON, without the fields that have the wrong type; empty if it is no object."""
    try:
        plain = untagged(record)
    except Corrupt:
        return {}
    if not isinstance(plain, Mapping):
        return {}
    return {
        key: value
        for key, value in plain.items()
        if value is not None and (key not in fields or fields[key](value))
    }


def _malformed_fields(record: Mapping[str, Any]) -> list[str]:
    """The fields of a record that have the wrong type; if there are none, those of its provenance."""
    wrong = [
        key for key, is_right in _FIELDS.items() if record.get(key) is not None and not is_right(record[key])
    ]
    return wrong or _malformed_in_provenance(record.get("provenance") or {})


def _malformed_in_provenance(provenance: Mapping[str, Any]) -> list[str]:
    """The fields of a provenance that have the wrong type."""
    return [
        key
        for key, is_right in _PROVENANCE_FIELDS.items()
        if key in provenance and not is_right(provenance[key])
    ]


def _is_contents(value: Any) -> bool:
    """Whether a value counts the tensors of each component, as `Manifest.contents` does."""
    counts = ("tensors", "elements", "bytes")
    return _is_table(value) and all(
        _is_table(part) and all(type(part.get(count)) is int for count in counts) for part in value.values()
    )


def number(value: Any) -> float | None:
    """A number for the catalog; None for NaN, so that it never sorts as best. The manifest keeps the exact value."""
    try:
        found = float(value)
    except (TypeError, OverflowError):
        return None
    return None if math.isnan(found) else found


def _is_whole(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_NUMBER


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isinstance(value, float) or abs(value) <= 1 << 1000


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_table(value: Any) -> bool:
    return isinstance(value, Mapping)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(map(_is_text, value))


def _is_text_or_texts(value: Any) -> bool:
    return _is_text(value) or _is_texts(value)


def _is_table_of(is_right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, Mapping) and all(map(is_right, value.values()))


def _is_files(value: Any) -> bool:
    """Whether a value lists files by path and digest, as the record of an artifact does."""
    return isinstance(value, list) and all(
        _is_table(file) and _is_text(file.get("path")) and _is_text(file.get("digest")) for file in value
    )


def _has_form(check: Callable[[str], object]) -> Callable[[Any], bool]:
    def is_right(value: Any) -> bool:
        try:
            check(value)
        except (RegistryError, TypeError):
            return False
        return True

    return is_right


def _is_metrics(value: Any) -> bool:
    return isinstance(value, Mapping) and all(is_metric(k) and _is_number(v) for k, v in value.items())


def _is_lineage(value: Any) -> bool:
    def is_edge(edge: Any) -> bool:
        return (
            isinstance(edge, Mapping)
            and _is_text(edge.get("kind"))
            and _is_text(edge.get("parent"))
            and max(len(edge["kind"]), len(edge["parent"])) <= MAX_EDGE
        )

    return isinstance(value, list | tuple) and all(map(is_edge, value))


def _is_time(value: Any) -> bool:
    return isinstance(value, str) and _TIME.match(value) is not None


_FIELDS: dict[str, Callable[[Any], bool]] = {
    "kind": _is_text,
    "model": _is_text,
    "created": _is_time,
    "epoch": _is_whole,
    "step": _is_whole,
    "loss": _is_number,
    "metrics": _is_metrics,
    "config": _is_table,
    "meta": _is_table,
    "source": _is_table,
    "run": _has_form(check_run_name),
    "parent": _is_text,
    "provenance": _is_table,
    "dcp": _is_table,
    "thinned-from": is_digest,
    "lineage": _is_lineage,
    "torch-registry": _is_text,
}
"""What the fields of a record must be. Other fields may hold anything."""

_RUN_FIELDS: dict[str, Callable[[Any], bool]] = {
    "state": _is_text,
    "config": _is_table,
    "dataset": _is_text,
    "artifacts": _is_texts,
    "resumed": _is_text,
}
"""What the fields of a run's record must be."""

_ARTIFACT_FIELDS: dict[str, Callable[[Any], bool]] = {
    "function": _is_text,
    "parameters": _is_table,
    "files": _is_table_of(_is_files),
    "seconds": _is_number,
}
"""What the fields of an artifact's record must be."""

_PROVENANCE_FIELDS: dict[str, Callable[[Any], bool]] = {
    "kinds": _is_table_of(_is_text),
    "buffers": _is_table_of(_is_texts),
    "frozen": _is_table_of(_is_texts),
    "going_on": _is_table_of(_is_texts),
    "plan": _is_table,
    "builder": _is_text,
    "network": _is_table,
    "unrecorded": _is_text,
    "config_digest": _is_text,
    "dataset": _is_text,
    "artifacts": _is_texts,
    "seconds": _is_number,
    "devices": _is_text_or_texts,
    "processes": _is_whole,
    "command": _is_texts,
    "git": lambda value: isinstance(value, Mapping) and _is_text(value.get("commit")),
    "python": _is_text,
    "torch": _is_text,
    "system": _is_text,
}
"""What the fields of a record's provenance must be."""
