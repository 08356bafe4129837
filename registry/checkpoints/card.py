"""Model cards: what is recorded of a version, for whoever is to use it. What is not recorded is said to be so."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from registry.catalog.ancestry import children
from registry.catalog.documents import data_of
from registry.catalog.versions import by_id
from registry.checkpoints.checkpoint import Checkpoint
from registry.checkpoints.counting import networks
from registry.configs.documents import flatten
from registry.home import Home
from registry.log.metrics import with_metrics
from registry.release import VERSION
from registry.reports.blocks import Block, Code, Column, Lines, Table, Title
from registry.reports.words import counted, number, size, time_of

NOT_RECORDED = "not recorded"

_BY_HAND = {
    "Licence": ("license", "licence"),
    "Intended use": ("intended_use", "use"),
    "Limitations": ("limitations", "bias", "risks"),
    "Evaluation data": ("evaluation_data", "test_data"),
    "Contact": ("contact", "author", "authors"),
}
"""What only a person knows, and the keys of the meta or the config under which it may be recorded."""


def card(home: Home, checkpoint: Checkpoint) -> list[Block]:
    """The model card of a version, for a renderer such as `registry.reports.markdown.render`.

    After Mitchell and others, Model cards for model reporting (2019).

    Args:
        home: the registry that holds it.
    """
    record, provenance = checkpoint.record, checkpoint.provenance
    config = flatten(checkpoint.config or {})
    return [
        Title(f"Model card of {checkpoint.name}", lines=[_about(checkpoint)]),
        *_by_hand(flatten(checkpoint.meta), config),
        _facts("Results", _results(checkpoint)),
        _facts("Where it comes from", _origin(home, checkpoint)),
        _facts(
            "Settings", [(key, "none" if value is None else _text(value)) for key, value in config.items()]
        ),
        _facts("How it was made", _made(record, provenance)),
        _holds(checkpoint),
        _facts("Notes", [(time_of(written), text) for written, text in checkpoint.notes]),
        Code(
            "Use",
            "\n".join(["from registry import Registry", "registry = Registry()", *checkpoint.how_to_load()]),
        ),
        Lines("", [f"{checkpoint.id}, torch-registry {VERSION}"]),
    ]


def _about(checkpoint: Checkpoint) -> str:
    """The network in a sentence."""
    kinds = checkpoint.provenance.get("kinds", {})
    found = []
    for one in networks(checkpoint.store.manifest(checkpoint.id).listed, checkpoint.provenance):
        amount = (
            counted(one.values, "value")
            if one.parameters is None
            else f"{counted(one.parameters, 'parameter')}, {one.frozen:,} of them frozen"
        )
        found.append(", ".join([str(kinds.get(one.component, one.component)), amount, *one.dtypes]))
    return f"{'; '.join(found) or NOT_RECORDED}. Saved on {time_of(checkpoint.created)}."


def _by_hand(meta: Mapping[str, Any], config: Mapping[str, Any]) -> list[Block]:
    """What only a person knows."""
    rows = [
        (name, _text(next((found[key] for found in (meta, config) for key in keys if found.get(key)), None)))
        for name, keys in _BY_HAND.items()
    ]
    known = {key for keys in _BY_HAND.values() for key in keys}
    rest = [(key, _text(value)) for key, value in meta.items() if key not in known]
    return [_table("", rows), *([_table("Also recorded", rest)] if rest else [])]


def _results(checkpoint: Checkpoint) -> list[tuple[str, str]]:
    measured = {**with_metrics({}, checkpoint.metrics), "loss": checkpoint.loss}
    found = [(name, number(value)) for name, value in measured.items() if value is not None]
    reached = {"epochs": checkpoint.epoch, "steps": checkpoint.step}
    return found + [(name, f"{value:,}") for name, value in reached.items() if value is not None]


def _origin(home: Home, checkpoint: Checkpoint) -> list[tuple[str, str]]:
    """The versions, files and data that it came from, and what came from it."""
    found = []
    for edge in checkpoint.lineage:
        parent = by_id(home.catalog, edge["parent"])
        found.append(
            (edge["kind"].removesuffix("-from") + " from", parent.name if parent else edge["parent"])
        )
    if not found and checkpoint.parent:
        found.append(("continued from", checkpoint.parent))
    found.append(("data", ", ".join(data_of(checkpoint.provenance)) or NOT_RECORDED))
    found += [("used by", child.name) for child, _ in children(home.catalog, checkpoint.row)]
    source = checkpoint.record.get("source") or {}
    return found + [(f"source {key}", _text(value)) for key, value in source.items() if value is not None]


def _made(record: Mapping[str, Any], provenance: Mapping[str, Any]) -> list[tuple[str, str]]:
    git = provenance.get("git")
    command = provenance.get("command")
    known = {
        "run": record.get("run"),
        "command": " ".join(map(str, command)) if isinstance(command, list) else command,
        "code": f"git {git['commit']}{' with changes' if git.get('dirty') else ''}" if git else None,
        "python": provenance.get("python"),
        "torch": provenance.get("torch"),
        "system": provenance.get("system"),
        "devices": provenance.get("devices"),
        "seconds": provenance.get("seconds"),
    }
    if not any(value is not None for value in known.values()):
        return []
    return [(name, _text(value)) for name, value in known.items()]


def _holds(checkpoint: Checkpoint) -> Table:
    kinds = checkpoint.provenance.get("kinds", {})
    columns = (
        Column("component"),
        Column("class"),
        *(Column(head, is_number=True) for head in ("tensors", "values", "size")),
    )
    rows = [
        (name, str(kinds.get(name, "")), f"{part['tensors']:,}", f"{part['elements']:,}", size(part["bytes"]))
        for name, part in checkpoint.record.get("components", {}).items()
    ]
    return Table("What it holds", columns, rows)


def _facts(title: str, rows: Sequence[tuple[str, str]]) -> Block:
    """Names and values under a heading, or that nothing was recorded."""
    return _table(title, rows) if rows else Title(title, lines=[NOT_RECORDED], level=2)


def _table(title: str, rows: Iterable[tuple[str, str]]) -> Table:
    return Table(title, (Column("what"), Column("value")), list(rows))


def _text(value: Any) -> str:
    if value is None or value == "":
        return NOT_RECORDED
    if isinstance(value, float):
        return number(value)
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
