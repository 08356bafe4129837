"""Diff reports: what differs between two models, by name, shape, dtype, kind and value."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from registry.catalog.ancestry import ancestors
from registry.configs.documents import differences
from registry.live.freezing import frozen_names
from registry.transfer.matching import LOADABLE, Category, Pair, match
from registry.transfer.plan import FrozenPart, TransferPlan
from registry.transfer.sides import Side
from registry.transfer.sources import Source, side_of
from registry.transfer.suggestions import suggestions

if TYPE_CHECKING:
    from registry.home import Home

SCHEMA = 1
_CHUNK = 1 << 18
_BLOCK = 1 << 13
_Doubles = numpy.ndarray[Any, numpy.dtype[numpy.float64]]
Verdict = Literal["IDENTICAL", "SAME STRUCTURE", "COMPATIBLE", "INCOMPATIBLE"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class SideInfo(_Part):
    """One side: what it is called, how much it holds, and the digests of its structure and its content."""

    label: str
    id: str | None = None
    names: int
    elements: int
    parameters: int | None
    buffers: int | None
    structure: str
    content: str | None
    notes: tuple[str, ...] = ()


class Row(_Part):
    """One name of either side or of both."""

    category: Category
    a: str | None = None
    b: str | None = None
    shape_a: tuple[int, ...] | None = None
    shape_b: tuple[int, ...] | None = None
    dtype_a: str | None = None
    dtype_b: str | None = None
    kind: str | None = None
    equal: bool | None = None
    note: str = ""

    @property
    def name(self) -> str:
        return self.b or self.a or ""

    @property
    def elements(self) -> int:
        shape = self.shape_b if self.shape_b is not None else self.shape_a
        return math.prod(shape or ())


class Count(_Part):
    names: int
    elements: int


class Change(_Part):
    """How the values of one name differ, in float64: norms, the angle, and the share of elements that changed."""

    name: str
    norm: float
    relative: float
    cosine: float | None
    largest: float
    changed: float
    nonfinite_a: int
    nonfinite_b: int


class ModuleChange(_Part):
    """The change of all tensors below a module."""

    module: str
    tensors: int
    norm: float
    relative: float


class LayerDifference(_Part):
    """Where the architectures of two live networks differ at one path."""

    path: str
    a: str | None
    b: str | None


class Field_(_Part):
    key: str
    a: Any = None
    b: Any = None


class DiffReport(_Part):
    """Everything that a diff found; text, JSON, Markdown and HTML are made from it."""

    schema_version: int = Field(default=SCHEMA, alias="schema")
    a: SideInfo
    b: SideInfo
    verdict: Verdict
    exceptions: int
    loadable: Count
    target: Count
    counts: dict[Category, Count]
    rows: tuple[Row, ...]
    architecture: tuple[LayerDifference, ...] = ()
    config: tuple[Field_, ...] = ()
    metrics: tuple[Field_, ...] = ()
    changes: tuple[Change, ...] = ()
    modules: tuple[ModuleChange, ...] = ()
    related: bool = False
    plan: TransferPlan | None = None
    frozen: tuple[FrozenPart, ...] = ()
    suggestions: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    command: str = ""

    @property
    def is_same(self) -> bool:
        """Whether nothing differs."""
        return self.verdict == "IDENTICAL"

    @property
    def headline(self) -> str:
        """The verdict in one line."""
        if self.verdict != "COMPATIBLE":
            return self.verdict
        return f"COMPATIBLE with {self.exceptions} exception{'s' if self.exceptions != 1 else ''}"

    @property
    def coverage(self) -> float:
        """Share of the target's parameters that can be loaded as they are."""
        return self.loadable.elements / self.target.elements if self.target.elements else 0.0

    def __str__(self) -> str:
        from registry.reports.text import as_text

        return as_text(self)

    def _repr_html_(self) -> str:
        from registry.reports.html import as_html

        return as_html(self, whole=False)


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
    """Compare two models. Structure alone is read from manifests and headers; no tensor is touched.

    Args:
        a, b: each a reference, a file, `torchvision:NAME`, a live network, or a pair of a network and a reference.
        registry: where references are looked up.
        values: also say how far the values of pairs moved.
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
    moved = [pair for pair, row in zip(pairs, rows, strict=True) if not row.equal]
    changes = tuple(_changes(moved, left, right)) if values else ()
    warnings = [*_warnings(rows)]
    if values and not related:
        warnings.append(
            "the two were not trained from one another: equal networks may differ by the order of their neurons, "
            "so distances between their values say little"
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
        changes=changes,
        modules=tuple(_rolled_up(changes, pairs)),
        related=related,
        plan=plan,
        frozen=tuple(_frozen(left, right, plan)),
        suggestions=tuple(str(found) for found in suggestions(left, right, pairs)),
        warnings=tuple(warnings),
        command=_command(left, right, values, rules, patterns),
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


def _fields(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[Field_, ...]:
    """The values that differ; none where only one side has any."""
    if not a or not b:
        return ()
    return tuple(Field_(key=d.key, a=d.left, b=d.right) for d in differences(a, b))


def _are_alike(left: Side, right: Side) -> bool:
    """Whether both have hyperparameters, or both only the configuration of a network."""
    return (left.checkpoint is None) == (right.checkpoint is None)


def _related(left: Side, right: Side, registry: Home | None) -> bool:
    """Whether the lineage ties the two sides: one was trained on from the other, or both from a third."""
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


# -- values --------------------------------------------------------------------------------------------------


def _changes(pairs: Sequence[Pair], left: Side, right: Side) -> Iterator[Change]:
    """How far the values of pairs of equal shape moved, for those that moved at all."""
    if not (left.has_values and right.has_values):
        return
    room = _Room()
    for pair in pairs:
        if pair.a and pair.b and pair.a.shape == pair.b.shape:
            change = _change(pair.b.name, left.tensor(pair.a.name), right.tensor(pair.b.name), room)
            if change is not None:
                yield change


class _Room:
    """Memory for a chunk of two tensors in float64, which stays in the processor's cache."""

    def __init__(self) -> None:
        self.before, self.step = (numpy.empty(_CHUNK) for _ in range(2))
        self.moved = numpy.empty(_CHUNK, dtype=numpy.bool_)


@numpy.errstate(all="ignore")  # what is not finite is counted
def _change(name: str, a: torch.Tensor, b: torch.Tensor, room: _Room) -> Change | None:
    """The change of one tensor, chunk by chunk; None if there is none.

    On one thread, by numpy: to wake another one for each of these small steps can take longer than the step.
    """
    one, other = (_real(t) for t in (a, b))
    moved = before = cross = largest = 0.0
    changed = bad_a = bad_b = 0
    for x, y in zip(torch.split(one, _CHUNK), torch.split(other, _CHUNK), strict=True):
        wide, step = _widened(x, room.before), _widened(y, room.step)
        step -= wide
        squares, size = _dot(step, step), _dot(wide, wide)
        if not math.isfinite(squares) or not math.isfinite(size):
            good = (x.isfinite() & y.isfinite()).numpy()
            bad_a += int((~x.isfinite()).sum())
            bad_b += int((~y.isfinite()).sum())
            changed += int(((x != y) & ~(x.isnan() & y.isnan())).numpy()[~good].sum())
            wide, step = wide[good], step[good]
            squares, size = _dot(step, step), _dot(wide, wide)
        before += size
        if squares == 0.0:
            continue
        moved += squares
        cross += _dot(wide, step)
        largest = max(largest, float(step.max()), -float(step.min()))
        changed += int(numpy.count_nonzero(numpy.not_equal(step, 0, out=room.moved[: len(step)])))
    if not (changed or bad_a or bad_b):
        return None
    after = before + 2 * cross + moved
    scale = math.sqrt(before) * math.sqrt(max(after, 0.0))
    return Change(
        name=name,
        norm=math.sqrt(moved),
        relative=math.sqrt(moved / before) if before else math.inf if moved else 0.0,
        cosine=max(-1.0, min(1.0, (before + cross) / scale)) if scale else None,
        largest=largest,
        changed=changed / max(1, len(one)),
        nonfinite_a=bad_a,
        nonfinite_b=bad_b,
    )


def _widened(part: torch.Tensor, room: _Doubles) -> _Doubles:
    """A chunk in float64, in the memory given."""
    wide = room[: len(part)]
    if part.dtype is torch.bfloat16:  # which numpy lacks
        torch.from_numpy(wide).copy_(part)
    else:
        numpy.copyto(wide, part.numpy())
    return wide


def _dot(a: _Doubles, b: _Doubles) -> float:
    """The scalar product, in blocks that are too short for the linear algebra library to use its threads."""
    whole = len(a) // _BLOCK * _BLOCK
    blocks = a[:whole].reshape(-1, 1, _BLOCK) @ b[:whole].reshape(-1, _BLOCK, 1)
    return float(blocks.sum()) + float(a[whole:].dot(b[whole:]))


def _real(tensor: torch.Tensor) -> torch.Tensor:
    """The elements in a row; of complex numbers, both parts; of types that torch cannot compute with, wider ones."""
    flat = tensor.detach().cpu().resolve_neg().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat.resolve_conj()).reshape(-1)
    narrow = flat.is_floating_point() and flat.dtype.itemsize == 1
    return flat.to(torch.float32) if narrow or flat.dtype is torch.bool else flat


def _rolled_up(changes: Sequence[Change], pairs: Sequence[Pair]) -> Iterator[ModuleChange]:
    """The change of each module: the norms of its tensors' changes, combined."""
    if not changes:
        return
    sums: dict[str, list[float]] = {}
    for change in changes:
        module = change.name.rpartition(".")[0]
        own = sums.setdefault(module, [0, 0.0, 0.0])
        own[0] += 1
        own[1] += change.norm**2
        if change.relative and math.isfinite(change.relative):
            own[2] += (change.norm / change.relative) ** 2
    for module, (count, moved, before) in sums.items():
        relative = math.sqrt(moved / before) if before else math.inf
        yield ModuleChange(module=module, tensors=int(count), norm=math.sqrt(moved), relative=relative)


# -- architecture --------------------------------------------------------------------------------------------


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


# -- what to say ---------------------------------------------------------------------------------------------


def _warnings(rows: Sequence[Row]) -> Iterator[str]:
    positional = [row for row in rows if row.category == Category.POSITIONAL]
    if positional:
        names = "name agrees" if len(positional) == 1 else "names agree"
        yield (
            f"{len(positional)} {names} in name and shape and may be another layer, as a numbered container has "
            f"another length or other classes: {positional[0].note}"
        )
    benign = [
        row for row in rows if row.name.endswith("num_batches_tracked") and row.category not in LOADABLE
    ]
    if benign:
        yield f"{len(benign)} num_batches_tracked on one side only: harmless, old files lack them"


def _command(left: Side, right: Side, values: bool, rename: Sequence[str], exclude: Sequence[str]) -> str:
    if (left.module and ":" not in left.label) or (right.module and ":" not in right.label):
        return ""
    words = ["registry", "diff", left.label, right.label]
    words += ["--values"] if values else []
    for rule in rename:
        words += ["--rename", rule]
    for pattern in exclude:
        words += ["--exclude", pattern]
    return shlex.join(words)
