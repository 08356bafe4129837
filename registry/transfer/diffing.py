"""Diffs: what differs between two models, by name, shape, dtype, kind and value."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from registry.catalog.ancestry import ancestors
from registry.configs.documents import differences
from registry.live.freezing import frozen_names
from registry.transfer.matching import LOADABLE, Category, Pair, match
from registry.transfer.plan import FrozenPart, TransferPlan
from registry.transfer.report import (
    SCHEMA,
    Count,
    DiffReport,
    FieldDifference,
    LayerDifference,
    SideInfo,
    Verdict,
)
from registry.transfer.report_rows import Row
from registry.transfer.report_tree import is_counter
from registry.transfer.sides import Side
from registry.transfer.sources import Source, side_of
from registry.transfer.suggestions import suggestions
from registry.transfer.values import by_module, changes

if TYPE_CHECKING:
    from registry.home import Home


def diff(
    a: Source,
    b: Source,
    *,
    registry: Home | None = None,
    values: bool = False,
    rename: Iterable[str] = (),
    exclude: Iterable[str] = (),
    component: str = "model",
    plan: TransferPlan | None = None,
) -> DiffReport:
    """Compare two models.

    Names, shapes and dtypes are read from manifests and headers. Values are compared by their digests where these are
    known, and otherwise bit for bit.

    Args:
        a, b: each a reference, a file, `torchvision:NAME`, a live network, or a pair of a network and a reference.
        registry: where references are looked up.
        values: also say how far the tensors of pairs moved.
        rename: rules for the names of `a`, such as `backbone.*=*`.
        exclude: glob patterns of names to leave out.
        component: the component of checkpoints and files.
        plan: a plan from `a` to `b`, to be shown with the report.

    Raises:
        NotFound, Invalid, Unsupported: if a side cannot be read.
        Incompatible: if the plan was made for other sides.
        Conflict: if rules bring two names to one.
    """
    rules = list(rename)
    patterns = list(exclude)
    left = side_of(a, registry, component=component)
    right = side_of(b, registry, component=component)
    if plan is not None:
        plan.check(left, right)
    pairs = match(left, right, rename=rules, exclude=patterns)
    rows = tuple(_row(pair, left, right) for pair in pairs)
    related = _related(left, right, registry)
    unequal = [pair for pair, row in zip(pairs, rows, strict=True) if not row.equal]
    moved = tuple(changes(unequal, left, right)) if values else ()
    counters = {row.name for row in rows if is_counter(row)}
    warnings = [*_warnings(rows)]
    if values and not related:
        warnings.append(
            "neither was trained from the other: equal networks may differ by the order of their neurons, "
            "so distances between their tensors say little"
        )
    counted = [row for row in rows if row.b and row.category not in (Category.EXCLUDED,)]
    trainable = [row for row in counted if row.kind != "buffer"]
    loadable = [row for row in trainable if row.category in LOADABLE]
    return DiffReport(
        schema=SCHEMA,
        a=_info(left),
        b=_info(right),
        verdict=_verdict(rows, loadable),
        exceptions=sum(row.category not in (*LOADABLE, Category.EXCLUDED) for row in rows),
        loadable=_count(loadable),
        target=_count(trainable),
        counts={c: _count([row for row in rows if row.category == c]) for c in _present(rows)},
        rows=rows,
        architecture=tuple(_architecture(left.network, right.network)),
        config=_fields(left.config, right.config) if _are_alike(left, right) else (),
        metrics=_fields(left.metrics, right.metrics),
        changes=moved,
        modules=tuple(by_module([one for one in moved if one.name not in counters])),
        related=related,
        plan=plan,
        frozen=tuple(_frozen(left, right, plan)),
        suggestions=tuple(str(found) for found in suggestions(left, right, pairs)),
        warnings=tuple(warnings),
        command=_command(left, right, values=values, rename=rules, exclude=patterns),
    )


def _row(pair: Pair, left: Side, right: Side) -> Row:
    a, b = pair.a, pair.b
    equal = None
    if a and b and a.shape == b.shape and a.dtype == b.dtype:
        equal = left.equals(a.name, right, b.name)
    return Row(
        category=pair.category,
        a=a.name if a else None,
        b=b.name if b else None,
        shape_a=a.shape if a else None,
        shape_b=b.shape if b else None,
        dtype_a=a.dtype if a else None,
        dtype_b=b.dtype if b else None,
        kind=pair.kind,
        equal=equal,
        note=pair.note,
    )


def _verdict(rows: Sequence[Row], loadable: Sequence[Row]) -> Verdict:
    kept = [row for row in rows if row.category != Category.EXCLUDED]
    if all(row.category == Category.MATCH for row in kept):
        return "IDENTICAL" if all(row.equal for row in kept) else "SAME STRUCTURE"
    return "COMPATIBLE" if loadable else "INCOMPATIBLE"


def _count(rows: Sequence[Row]) -> Count:
    return Count(names=len(rows), elements=sum(row.elements for row in rows))


def _present(rows: Sequence[Row]) -> list[Category]:
    return [category for category in Category if any(row.category == category for row in rows)]


def _info(side: Side) -> SideInfo:
    kinds = [entry.kind for entry in side.entries.values()]
    known = None not in kinds
    return SideInfo(
        label=side.label,
        id=side.checkpoint.id if side.checkpoint else None,
        names=len(side.entries),
        elements=side.elements,
        parameters=kinds.count("parameter") if known else None,
        buffers=kinds.count("buffer") if known else None,
        structure=side.structure,
        content=side.content if side.checkpoint else None,
        notes=side.notes,
    )


def _fields(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[FieldDifference, ...]:
    """The values that differ; none where only one side has any."""
    if not a or not b:
        return ()
    return tuple(FieldDifference(key=d.key, a=d.left, b=d.right) for d in differences(a, b))


def _are_alike(left: Side, right: Side) -> bool:
    """Whether both have hyperparameters, or both only the configuration of a network."""
    return (left.checkpoint is None) == (right.checkpoint is None)


def _related(left: Side, right: Side, registry: Home | None) -> bool:
    """Whether the lineage ties the two sides: one was continued from the other, or both from a third."""
    if not left.checkpoint or not right.checkpoint or registry is None:
        return False
    above = ancestors(registry.catalog, left.checkpoint.name)
    return bool(above & ancestors(registry.catalog, right.checkpoint.name))


def _frozen(left: Side, right: Side, plan: TransferPlan | None) -> Iterator[FrozenPart]:
    """What is frozen on each side, as recorded or as it stands, and what the plan freezes."""
    for side in (left, right):
        if side.checkpoint:
            names = side.checkpoint.provenance.get("frozen", {}).get("model", ())
        else:
            names = frozen_names(side.module) if side.module else ()
        sizes = {entry.name: entry.elements for entry in side.entries.values() if entry.kind != "buffer"}
        if names:
            yield FrozenPart.of(side.label, sizes, set(names))
    if plan and (part := plan.frozen_part):
        yield part


def _architecture(a: nn.Module | None, b: nn.Module | None) -> Iterator[LayerDifference]:
    """Layers of two live networks that differ in class or arguments, parameter-free ones included."""
    if a is None or b is None:
        return
    ours, theirs = _layers(a), _layers(b)
    for path in dict.fromkeys([*ours, *theirs]):
        if ours.get(path) != theirs.get(path):
            yield LayerDifference(path=path, a=ours.get(path), b=theirs.get(path))


def _layers(module: nn.Module) -> dict[str, str]:
    """Class and arguments by path: stride, eps, the p of a dropout, and so on."""
    found = {}
    for path, part in module.named_modules():
        is_leaf = not any(True for _ in part.children())
        found[path] = f"{type(part).__name__}({part.extra_repr()})" if is_leaf else type(part).__name__
    return found


def _warnings(rows: Sequence[Row]) -> Iterator[str]:
    positional = [row for row in rows if row.category == Category.POSITIONAL]
    if positional:
        tensors = "tensor agrees" if len(positional) == 1 else "tensors agree"
        yield (
            f"{len(positional)} {tensors} in name and shape but may be of another layer, as a numbered container "
            f"has another length or other classes: {positional[0].note}"
        )
    benign = [
        row for row in rows if row.name.endswith("num_batches_tracked") and row.category not in LOADABLE
    ]
    if benign:
        yield f"{len(benign)} num_batches_tracked on one side only: harmless, old files lack them"


def _command(left: Side, right: Side, values: bool, rename: Sequence[str], exclude: Sequence[str]) -> str:
    """The command line of the same diff; empty if a side is a live network of this program."""
    if (left.module and ":" not in left.label) or (right.module and ":" not in right.label):
        return ""
    words = ["registry", "diff", left.label, right.label]
    words += ["--values"] if values else []
    for rule in rename:
        words += ["--rename", rule]
    for pattern in exclude:
        words += ["--exclude", pattern]
    return shlex.join(words)
