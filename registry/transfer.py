"""Transfer: a diff becomes a plan, data that can be read, edited and replayed, and the plan is applied whole or not at all."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from registry import components, freezing
from registry.adapters import ADAPTERS, adapt
from registry.diffing import suggestions
from registry.freezing import Freeze
from registry.matching import LOADABLE, Category, Pair, match
from registry.sides import Side, Source, side_of
from registry.store.durable import write_file
from registry.store.errors import Conflict, Incompatible, Invalid, NotFound
from registry.store.text import printable, quoted

if TYPE_CHECKING:
    from registry.registry import Registry

SCHEMA = 1
Action = Literal["copy", "keep", "unused"]
EXPECTATIONS = ("skip", "new", "unused", "adapt")


class Step(BaseModel):
    """What happens to one name.

    Attributes:
        action: `copy` from the source, `keep` the target's own value, or leave a name of the source `unused`.
        why: the category of the diff, or the expectation that covers it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    action: Action
    target: str | None = None
    source: str | None = None
    why: str = ""
    adapter: str | None = None
    cast: bool = False
    elements: int = 0
    buffer: bool = False


class TransferPlan(BaseModel):
    """Which tensors of a source go where in a target: made, printed, edited, saved and replayed.

    Attributes:
        source, target: labels for people.
        source_digest: of the source's names and values, unless it is a live network; checked when the plan is applied.
        target_digest: of the target's names, dtypes and shapes; likewise.
        freeze: patterns of names to freeze after the copy.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = Field(default=SCHEMA, alias="schema")
    source: str
    source_id: str | None = None
    source_digest: str | None
    target: str
    target_digest: str
    steps: tuple[Step, ...]
    freeze: tuple[str, ...] = ()
    bn: Literal["freeze", "update"] = "freeze"
    min_coverage: float = Field(default=0.0, ge=0, le=1)
    allow_nan: bool = False
    notes: tuple[str, ...] = ()

    @property
    def loaded(self) -> tuple[Step, ...]:
        """The steps that copy."""
        return tuple(step for step in self.steps if step.action == "copy")

    @property
    def parameters(self) -> tuple[int, int]:
        """Elements of the target's parameters that are loaded, and all of them."""
        own = [step for step in self.steps if step.target and not step.buffer]
        return sum(s.elements for s in own if s.action == "copy"), sum(s.elements for s in own)

    @property
    def coverage(self) -> float:
        """Share of the elements of the target's parameters that are loaded."""
        loaded, all_of_them = self.parameters
        return loaded / all_of_them if all_of_them else 0.0

    @property
    def summary(self) -> str:
        """What is loaded, in one line."""
        targets = sum(step.target is not None for step in self.steps)
        return f"loaded {len(self.loaded)} of {targets} tensors, {percent(self.coverage)} of parameters"

    def __str__(self) -> str:
        from registry.reports import plan_text

        return plan_text(self)

    def to_json(self) -> str:
        return self.model_dump_json(by_alias=True, indent=2, exclude_defaults=False) + "\n"

    def save(self, path: Path | str) -> None:
        """Write the plan as JSON, whole or not at all.

        Raises:
            StorageError: if the system refuses.
        """
        write_file(Path(path), self.to_json().encode())

    @classmethod
    def load(cls, path: Path | str) -> TransferPlan:
        """Read a plan that was saved, and perhaps edited.

        Raises:
            NotFound: if there is no such file.
            Invalid: naming what is wrong with it.
        """
        path = Path(path)
        try:
            text = path.read_text("utf-8")
        except FileNotFoundError:
            raise NotFound(f"{path}: there is no such file") from None
        except (OSError, UnicodeDecodeError) as error:
            raise Invalid(f"{path}: cannot be read ({printable(str(error))})") from None
        return cls.from_json(text, source=printable(str(path)))

    @classmethod
    def from_json(cls, text: str, *, source: str = "the plan") -> TransferPlan:
        """Check a plan that is written as JSON."""
        try:
            plan = cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise Invalid(f"{source}: {quoted(where)}: {printable(first['msg'])}") from None
        if plan.schema_version != SCHEMA:
            raise Invalid(f"{source}: has schema {plan.schema_version}, this version knows {SCHEMA}")
        seen: dict[str, str | None] = {}
        for step in plan.steps:
            if step.action == "copy" and (step.target is None or step.source is None):
                raise Invalid(f"{source}: a step that copies needs a source and a target")
            if step.target is not None:
                if step.target in seen:
                    raise Conflict(
                        f"{source}: {seen[step.target]} and {step.source} both go to {step.target}; keep one"
                    )
                seen[step.target] = step.source
        return plan

    def apply(
        self, model: nn.Module, source: Source | None = None, *, registry: Registry | None = None
    ) -> nn.Module:
        """Copy what the plan says into a live network and freeze what it says: all of it, or nothing.

        Args:
            source: where the values come from; by default the reference, file or name that the plan was made from.
            registry: where references are looked up.

        Returns:
            The network.

        Raises:
            Incompatible: if the source or the network is another than the plan was made for, or a step does not fit.
            Invalid: if values are NaN or infinite and the plan does not allow it.
            Corrupt: if a stored byte is not what was saved.
        """
        left = side_of(source if source is not None else self.source, registry)
        right = side_of(model)
        self._check(left, right)
        live = components.capture("model", model)
        copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        for step in self.loaded:
            assert step.target is not None
            assert step.source is not None
            value = left.tensor(step.source)
            if step.adapter:
                value = adapt(step.adapter, value, tuple(live[step.target].shape))
            if not self.allow_nan and not _is_finite(value):
                raise Invalid(
                    f"{step.source} of {left.label} holds NaN or infinity; load it only with allow_nan=True"
                )
            copies.append((live[step.target].detach(), value))
        with torch.no_grad():
            for target, value in copies:
                target.copy_(value)
        if self.freeze:
            freezing.freeze(model, self.freeze, bn=self.bn)
        return model

    def _check(self, left: Side, right: Side) -> None:
        if right.structure != self.target_digest:
            raise Incompatible(
                f"the plan was made for another {self.target}: names, shapes or dtypes of this network differ; "
                "make a new plan"
            )
        if self.source_digest is not None and left.content != self.source_digest:
            raise Incompatible(
                f"the plan was made from {self.source} with other values or names; make a new plan"
            )
        named = {step.target for step in self.steps if step.target}
        for name in right.entries:
            if name not in named:
                raise Incompatible(f"the plan says nothing of {name}; let it be copied, or kept")
        for step in self.steps:
            if step.target is not None and step.target not in right.entries:
                raise Incompatible(f"the network has no {step.target}, which the plan names")
            if step.source is not None and step.source not in left.entries:
                raise Incompatible(f"{left.label} has no {step.source}, which the plan names")
            if step.action == "copy" and step.target and step.source:
                _check_copy(step, left, right)


def _is_finite(value: torch.Tensor) -> bool:
    if not value.is_floating_point() or value.dtype.itemsize == 1:
        return True
    total = value.detach().sum(dtype=torch.float64 if value.dtype is torch.float64 else torch.float32)
    return bool(total.isfinite()) or bool(value.isfinite().all())


def percent(share: float) -> str:
    """A share that never rounds up to all.

    >>> percent(0.99954), percent(1.0), percent(0.999999)
    ('99.95 %', '100 %', '99.99 %')
    """
    if share == 1:
        return "100 %"
    return f"{math.floor(share * 10_000) / 100:.2f} %"


def _check_copy(step: Step, left: Side, right: Side) -> None:
    assert step.target is not None
    assert step.source is not None
    a, b = left.entries[step.source], right.entries[step.target]
    if step.adapter:
        if step.adapter not in ADAPTERS:
            raise Invalid(f"there is no adapter {quoted(step.adapter)}; there are {', '.join(ADAPTERS)}")
    elif a.shape != b.shape:
        raise Incompatible(f"{step.source} has shape {list(a.shape)}, {step.target} has {list(b.shape)}")
    if a.dtype != b.dtype and not step.cast:
        raise Incompatible(f"{step.source} is {a.dtype}, {step.target} is {b.dtype}; allow the cast")


def plan_transfer(
    source: Source,
    target: Source,
    *,
    expect: Mapping[str, str] | None = None,
    rename: Iterable[str] = (),
    freeze: str | Sequence[str] | None = None,
    bn: Literal["freeze", "update"] = "freeze",
    min_coverage: float = 0.0,
    allow_cast: bool = False,
    allow_positional: bool = False,
    allow_nan: bool = False,
    adapters: Mapping[str, str] | None = None,
    everything: bool = False,
    registry: Registry | None = None,
) -> TransferPlan:
    """Plan which tensors of a source go into a target network. Nothing is read but names and shapes.

    Args:
        source: a reference, a file, `torchvision:NAME`, a live network, or a pair of a network and a reference.
        target: a live network, or anything else whose structure is the target's.
        expect: what may differ, by glob pattern of names: `skip` (on both sides and not copied), `new` (in the target
            only), `unused` (in the source only), `adapt` (by an adapter). Any other difference is an error.
        rename: rules for the source's names, such as `backbone.*=*`.
        freeze: `loaded`, or glob patterns of names to freeze after the copy.
        bn: `freeze` keeps BatchNorm's statistics inside the frozen part as they are, `update` lets them go on.
        min_coverage: share of the target's parameters that must be loaded.
        allow_cast: copy between dtypes that lose something.
        allow_positional: copy names whose numbers may have shifted.
        allow_nan: copy values that are NaN or infinite.
        adapters: by pattern of the target's names; see `registry.adapters`.
        everything: every difference is expected; what fits is loaded.
        registry: where references are looked up.

    Raises:
        Incompatible: if nothing would be loaded, with the reason; if a difference is not expected; if the coverage is
            too small.
        Invalid: if a pattern matches nothing, or source and target are the same network.
        Conflict: if two names of the source go to one of the target.
    """
    rules = list(rename)
    wanted = dict(expect or {})
    for pattern, meaning in wanted.items():
        if meaning not in EXPECTATIONS:
            raise Invalid(
                f"expect[{pattern!r}] is {quoted(str(meaning))}, expected {', '.join(EXPECTATIONS)}"
            )
    left, right = side_of(source, registry), side_of(target, registry)
    if left.module is not None and left.module is right.module and left.checkpoint is None:
        raise Invalid("source and target are the same network")
    pairs = match(left, right, rename=rules)
    used: set[str] = set()
    steps = [_step(pair, wanted, used, adapters or {}, allow_cast, allow_positional) for pair in pairs]
    unexpected = [(s, p) for s, p in zip(steps, pairs, strict=True) if s.why.startswith("!")]
    copied = [step for step in steps if step.action == "copy"]
    if not any(not step.buffer for step in copied):
        raise Incompatible(f"nothing would be loaded from {left.label}: {_why_nothing(left, right, pairs)}")
    if unexpected and not everything:
        raise Incompatible(_unexpected(unexpected, left, right, pairs))
    for pattern in wanted:
        if pattern not in used:
            raise Invalid(f"expect[{pattern!r}] matches nothing; it is a typo")
    steps = [
        step.model_copy(update={"why": step.why.lstrip("!")}) if step.why.startswith("!") else step
        for step in steps
    ]
    _check_ties(left, right, steps)
    plan = TransferPlan(
        schema=SCHEMA,
        source=left.label,
        source_id=left.checkpoint.id if left.checkpoint else None,
        source_digest=left.content,
        target=right.label,
        target_digest=right.structure,
        steps=tuple(steps),
        freeze=_frozen(freeze, steps, right),
        bn=bn,
        min_coverage=min_coverage,
        allow_nan=allow_nan,
        notes=left.notes,
    )
    if plan.coverage < min_coverage:
        raise Incompatible(
            f"{plan.summary}, less than the {percent(min_coverage)} that min_coverage asks for"
        )
    return plan


def from_pretrained(
    registry: Registry, make: Any, source: Source, *, freeze: bool | str | Sequence[str] = False, **given: Any
) -> nn.Module:
    """A new network with whatever fits from a source; every difference is expected, loading nothing is an error.

    Args:
        make: a network, or its class or a function that makes it.
        freeze: freeze what was loaded (`True`), or patterns of names.
        given: arguments for `make`.
    """
    model = make if isinstance(make, nn.Module) else make(**given)
    what: Any = "loaded" if freeze is True else freeze or None
    left = side_of(source, registry)
    plan = plan_transfer(left, model, everything=True, freeze=what, registry=registry)
    plan.apply(model, left)
    print(plan.summary)
    return model


# -- making a plan -------------------------------------------------------------------------------------------


def _step(
    pair: Pair,
    expect: Mapping[str, str],
    used: set[str],
    adapters: Mapping[str, str],
    allow_cast: bool,
    allow_positional: bool,
) -> Step:
    a, b = pair.a, pair.b
    buffer = pair.b is not None and pair.kind == "buffer"
    fields: dict[str, Any] = {
        "target": b.name if b else None,
        "source": a.name if a else None,
        "elements": (b or a).elements,  # type: ignore[union-attr]
        "buffer": buffer,
    }
    category = pair.category
    meaning, pattern = _expected(pair, expect)
    if pattern and _fits(meaning, pair):
        used.add(pattern)
        if meaning == "adapt":
            name = _adapter(pair, adapters)
            return Step(action="copy", why=Category.ADAPTED, adapter=name, **fields)
        return Step(action="unused" if b is None else "keep", why=meaning, **fields)
    if a and b and category in LOADABLE:
        return Step(action="copy", why=category, **fields)
    if category == Category.TIED:
        return Step(action="keep" if b else "unused", why=f"{category}: {pair.note}", **fields)
    if a and b and category == Category.CAST and (allow_cast or _is_lossless(a.dtype, b.dtype)):
        return Step(action="copy", why=category, cast=True, **fields)
    if a and b and category == Category.POSITIONAL and allow_positional:
        return Step(action="copy", why=category, **fields)
    if buffer_is_benign(pair):
        return Step(action="keep" if b else "unused", why="harmless: old files lack it", **fields)
    return Step(action="keep" if b else "unused", why=f"!{category}", **fields)


def buffer_is_benign(pair: Pair) -> bool:
    """Whether a difference means nothing: counters of batches that files from before torch 0.4.1 do not have."""
    return pair.name.endswith("num_batches_tracked") and not (pair.a and pair.b)


def _expected(pair: Pair, expect: Mapping[str, str]) -> tuple[str, str]:
    names = [entry.name for entry in (pair.b, pair.a) if entry]
    for pattern, meaning in expect.items():
        if any(fnmatch.fnmatchcase(name, pattern) for name in names):
            return meaning, pattern
    return "", ""


def _fits(meaning: str, pair: Pair) -> bool:
    match meaning:
        case "skip":
            return pair.a is not None and pair.b is not None
        case "new":
            return pair.a is None
        case "unused":
            return pair.b is None
        case _:
            return pair.category == Category.SHAPE


def _adapter(pair: Pair, adapters: Mapping[str, str]) -> str:
    for pattern, name in adapters.items():
        if fnmatch.fnmatchcase(pair.name, pattern):
            if name not in ADAPTERS:
                raise Invalid(f"there is no adapter {quoted(name)}; there are {', '.join(ADAPTERS)}")
            return name
    raise Invalid(
        f"{pair.name} is to be adapted, and no adapter is named for it: adapters={{{pair.name!r}: ...}} with one of "
        f"{', '.join(ADAPTERS)}"
    )


def _is_lossless(a: str, b: str) -> bool:
    """Whether every value of one dtype is a value of the other."""
    one, other = getattr(torch, a), getattr(torch, b)
    same_kind: bool = one.is_floating_point == other.is_floating_point
    return same_kind and torch.promote_types(one, other) == other


def _unexpected(found: Sequence[tuple[Step, Pair]], left: Side, right: Side, pairs: Sequence[Pair]) -> str:
    described = []
    for _, pair in found[:3]:
        a, b = pair.a, pair.b
        if pair.category == Category.SHAPE and a and b:
            described.append(f"{b.name} has shape {list(b.shape)}, the source {list(a.shape)}")
        elif pair.category == Category.ONLY_B and b:
            described.append(f"{b.name} is in the target only")
        elif pair.category == Category.ONLY_A and a:
            described.append(f"{a.name} is in the source only")
        elif pair.category == Category.CAST and a and b:
            described.append(f"{b.name} is {b.dtype}, the source {a.dtype} (allow_cast)")
        elif pair.category == Category.POSITIONAL:
            described.append(f"{pair.name}: {pair.note} (allow_positional)")
        else:
            described.append(f"{pair.name}: {pair.category} {pair.note}".strip())
    more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
    hints = list(suggestions(left, right, pairs))
    hint = f"; maybe {hints[0]}" if hints else ""
    wanted = {_pattern(pair): _meaning(pair) for _, pair in found if _meaning(pair)}
    advice = f"; if that is meant: expect={wanted}" if wanted else ""
    return f"{'; '.join(described)}{more}: not expected{hint}{advice}"


def _pattern(pair: Pair) -> str:
    prefix, dot, _ = pair.name.rpartition(".")
    return f"{prefix}{dot}*"


def _meaning(pair: Pair) -> str:
    return {Category.SHAPE: "skip", Category.ONLY_A: "unused", Category.ONLY_B: "new"}.get(pair.category, "")


def _why_nothing(left: Side, right: Side, pairs: Sequence[Pair]) -> str:
    """The reason that nothing fits, as far as it can be found."""
    names = list(left.entries)
    first = names[0].partition(".")[0]
    if all(name.startswith(f"{first}.") for name in names):
        rest = [name.partition(".")[2] for name in names]
        if sum(name in right.entries for name in rest):
            return f"all {len(names)} source names start with {first}.; --rename '{first}.*=*'"
    if all(pair.category in (Category.SHAPE, Category.ONLY_A, Category.ONLY_B) for pair in pairs):
        turned = [p for p in pairs if p.category == Category.SHAPE and p.note == "transposed"]
        if turned:
            return f"{len(turned)} shapes are transposed, such as {turned[0].name}"
        shapes = [pair for pair in pairs if pair.category == Category.SHAPE]
        if shapes:
            a, b = shapes[0].a, shapes[0].b
            assert a is not None
            assert b is not None
            return f"every shape differs, {b.name} is {list(b.shape)} against {list(a.shape)}; another architecture"
    positional = [pair for pair in pairs if pair.category == Category.POSITIONAL]
    if positional:
        return f"the numbers have shifted, {positional[0].note}; if the numbers still mean the same layers: allow_positional=True"
    hints = list(suggestions(left, right, pairs))
    if hints:
        return f"no name fits; maybe {hints[0]}"
    mine, theirs = next(iter(left.entries)), next(iter(right.entries))
    return f"no name fits, the source begins with {mine}, the target with {theirs}; another architecture"


def _check_ties(left: Side, right: Side, steps: Sequence[Step]) -> None:
    """Names of the target that share memory must get one value."""
    first: dict[object, Step] = {}
    for step in steps:
        if step.action != "copy" or step.target is None or step.source is None:
            continue
        other = first.setdefault(right.entries[step.target].tie, step)
        if other is step or other.source is None:
            continue
        if left.entries[other.source].tie != left.entries[step.source].tie and left.digest(
            other.source
        ) != left.digest(step.source):
            raise Conflict(
                f"{other.target} and {step.target} share memory in {right.label} and have different values in "
                f"{left.label}; expect one of them as 'skip'"
            )


def _frozen(freeze: str | Sequence[str] | None, steps: Sequence[Step], right: Side) -> tuple[str, ...]:
    if freeze is None:
        return ()
    patterns = [freeze] if isinstance(freeze, str) else list(freeze)
    names: list[str] = []
    for pattern in patterns:
        if pattern == "loaded":
            names += [step.target for step in steps if step.action == "copy" and step.target]
            continue
        if not any(fnmatch.fnmatchcase(name, pattern) for name in right.entries):
            raise Invalid(f"freeze: the pattern {quoted(pattern)} matches nothing; it is a typo")
        names.append(pattern)
    found = Freeze(tuple(dict.fromkeys(names)))
    trainable = [
        step.target for step in steps if step.target and not step.buffer and not found.covers(step.target)
    ]
    if not trainable:
        raise Invalid("freezing that leaves no parameter to train; leave the head out")
    return found.patterns


def plan_document(plan: TransferPlan) -> dict[str, Any]:
    """The plan as plain values, as it is recorded with the checkpoint that came of it."""
    return plan.model_dump(mode="json", by_alias=True)
