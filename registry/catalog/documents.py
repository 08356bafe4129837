"""What the catalog knows as plain documents, in the shape that `--json` prints."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from registry.catalog.runs import RunInfo
from registry.catalog.versions import Model, Version


def version_document(version: Version) -> dict[str, Any]:
    """A version."""
    record = version.record
    return {
        "name": version.name,
        "model": version.model,
        "version": version.version,
        "id": version.id,
        "created": version.created,
        "epoch": version.epoch,
        "step": version.step,
        "loss": version.loss,
        "metrics": dict(version.metrics),
        "aliases": list(version.aliases),
        "tags": list(version.tags),
        "notes": [{"written": written, "text": text} for written, text in version.notes],
        "size": version.size,
        "tensors": version.tensors,
        "components": record.get("components", {}),
        "config": record.get("config"),
        "meta": record.get("meta", {}),
        "lineage": record.get("lineage", []),
        "source": record.get("source"),
    }


def model_document(model: Model) -> dict[str, Any]:
    """A model, with its latest version."""
    return {"name": model.name, "versions": model.versions, "latest": version_document(model.latest)}


def run_document(info: RunInfo, *, state: str, versions: int) -> dict[str, Any]:
    """A run.

    Args:
        state: `info.state`, unless its process is gone.
        versions: how many versions it saved.
    """
    return {
        "name": info.name,
        "model": info.model,
        "state": state,
        "started": info.started,
        "ended": info.ended,
        "versions": versions,
        "config": info.record.get("config", {}),
    }


def data_of(record: Mapping[str, Any]) -> list[str]:
    """The digests of the data that something was made with: the data set, or else the cached results that were used.

    Args:
        record: a run's, or the provenance of a version.
    """
    named = record.get("dataset")
    return [named] if named else list(record.get("artifacts") or ())


def finite(value: Any) -> Any:
    """A document with null for NaN and the infinities, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value
