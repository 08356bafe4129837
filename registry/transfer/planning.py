"""Transfer: what of a source fits a network, planned from names and shapes alone."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import nn

from registry.live.freezing import Freeze, expanded, in_order
from registry.patterns import below, escaped, fits, meant, unused
from registry.store.errors import Conflict, Fix, Incompatible, Invalid, fix
from registry.store.text import quoted
from registry.transfer.adapters import ADAPTERS, Rows, adapt, check_adapter, needs_source
from registry.transfer.matching import LOADABLE, Category, Pair, match
from registry.transfer.plan import SCHEMA, Step, TransferPlan, percent
from registry.transfer.sides import Side
from registry.transfer.sources import Source, side_of
from registry.transfer.suggestions import suggestions

if TYPE_CHECKING:
    from registry.home import Home

_MOST_ADVISED = 12
"""Patterns or rules that an error names; more would not be read."""

EXPECTATIONS = ("skip", "new", "unused", "adapt")


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
    classes: tuple[Sequence[str], Sequence[str]] | None = None,
    everything: bool = False,
    registry: Home | None = None,
) -> TransferPlan:
    """Plan which tensors of a source go into a target network. Nothing is read but names and shapes.

    Args:
        source: a reference, a file, `torchvision:NAME`, a live network, or a pair of a network and a reference.
        target: a live network, or anything else whose structure is the target's.
        expect: what may differ, by glob pattern of names: `skip` (on both sides and not copied), `new` (in the target
            only), `unused` (in the source only), `adapt` (by an adapter, which `adapters` also says). Any other
            difference is an error.
        rename: rules for the source's names, such as `backbone.*=*`.
        freeze: what to freeze after the copy: `loaded`, glob patterns of names, or `first:N` for the first N layers
            (`first:-1` for all but the last).
        bn: `freeze` keeps BatchNorm's statistics inside the frozen part as they are, `update` lets them go on.
        min_coverage: share of the target's parameters that must be loaded.
        allow_cast: copy between dtypes that lose something.
        allow_positional: copy names whose numbers may have shifted.
        allow_nan: copy values that are NaN or infinite.
        adapters: what makes tensors fit, by glob pattern of the target's names: `channels-sum`, `channels-repeat`,
            `positions`, `class-rows` (with `classes`), `identity` (for a new square layer after a ReLU).
        classes: names of the classes of the source and of the target, by which the rows of a classifier are copied.
        everything: every difference is expected; what fits is loaded.
        registry: where references are looked up.

    Raises:
        Incompatible: if nothing would be loaded, with the reason; if a difference is not expected; if the coverage is
            too small.
        Invalid: if a pattern matches nothing, or source and target are the same network.
        Conflict: if two names of the source go to one of the target.
    """
    for name, table in (("expect", expect), ("adapters", adapters)):
        if not isinstance(table, Mapping | None):
            raise Invalid(f"{name} is a {type(table).__name__}, expected a dict by pattern of names")
    if isinstance(rename, str | Mapping):
        raise Invalid(
            f"rename is a {type(rename).__name__}, expected a list of rules such as ['backbone.*=*']"
        )
    if isinstance(freeze, bool):
        raise Invalid("freeze is a bool, expected 'loaded', or patterns of names")
    rules = list(rename)
    wanted = {**dict.fromkeys(adapters or {}, "adapt"), **(expect or {})}
    for name in (adapters or {}).values():
        check_adapter(name)
    for pattern, meaning in wanted.items():
        if meaning not in EXPECTATIONS:
            raise Invalid(
                f"what is expected of {quoted(pattern)} is {quoted(str(meaning))}, not one of {', '.join(EXPECTATIONS)}"
            )
    if not 0 <= min_coverage <= 1:
        raise Invalid(f"the least coverage is {min_coverage}, expected a share from 0 to 1")
    left, right = side_of(source, registry), side_of(target, registry)
    if left.module is not None and left.module is right.module and left.checkpoint is None:
        raise Invalid("source and target are the same network")
    if left.checkpoint and right.checkpoint and left.checkpoint.id == right.checkpoint.id:
        raise Invalid(f"source and target are the same checkpoint, {left.label}")
    names = {**left.entries, **right.entries}
    wanted = {meant(pattern, names): meaning for pattern, meaning in wanted.items()}
    adapters = {meant(pattern, names): name for pattern, name in (adapters or {}).items()}
    apart = [pattern for pattern, meaning in wanted.items() if meaning in ("new", "unused")]
    apart += [pattern for pattern, name in adapters.items() if not needs_source(name)]
    pairs = match(left, right, rename=rules, apart=apart)
    used: set[str] = set()
    consents = _Rules(
        wanted,
        adapters,
        Rows.by_class(*classes) if classes else None,
        allow_cast=allow_cast,
        allow_positional=allow_positional,
        used=used,
    )
    steps = [_step(pair, consents) for pair in pairs]
    unexpected = [(s, p) for s, p in zip(steps, pairs, strict=True) if s.why.startswith("!")]
    copied = [step for step in steps if step.action == "copy"]
    if not any(not step.buffer for step in copied):
        why, fixes = _why_nothing(left, right, pairs)
        raise Incompatible(f"nothing would be loaded from {left.label}: {why}", *fixes)
    if unexpected and not everything:
        raise _unexpected(unexpected, left, right, pairs)
    for pattern in wanted:
        if pattern not in used:
            is_there = any(fits(name, pattern) for name in names)
            why = f"matches nothing that can be {wanted[pattern]!r}" if is_there else unused(pattern, names)
            raise Invalid(f"the expected pattern {quoted(pattern)} {why}")
    steps = [
        step.model_copy(update={"why": step.why.lstrip("!")}) if step.why.startswith("!") else step
        for step in steps
    ]
    _check_ties(left, right, steps)
    notes = [*left.notes, *_identities(steps, right)]
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
        notes=tuple(notes),
    )
    plan.remember(source, registry)
    if plan.coverage < min_coverage:
        raise Incompatible(f"{plan.summary}, less than the {percent(min_coverage)} that was asked for")
    return plan


def from_pretrained(
    registry: Home, make: Any, source: Source, *, freeze: bool | str | Sequence[str] = False, **given: Any
) -> nn.Module:
    """A new network with whatever fits from a source; every difference is expected, loading nothing is an error.

    Args:
        make: a network, or its class or a function that makes it.
        freeze: freeze what was loaded (`True`), or patterns of names.
        given: arguments for `make`.
    """
    if isinstance(make, nn.Module) and given:
        raise Invalid(
            f"{', '.join(given)}: the network is made already; use plan_transfer for more than freeze="
        )
    model = make if isinstance(make, nn.Module) else make(**given)
    what: Any = "loaded" if freeze is True else freeze or None
    left = side_of(source, registry)
    plan = plan_transfer(left, model, everything=True, freeze=what, registry=registry)
    plan.apply(model, left)
    print(plan.summary)
    return model


# -- making a plan -------------------------------------------------------------------------------------------


class _Rules(NamedTuple):
    """What the caller allows; `used` collects the patterns that were of use."""

    expect: Mapping[str, str]
    adapters: Mapping[str, str]
    rows: Rows | None
    allow_cast: bool
    allow_positional: bool
    used: set[str]


def _step(pair: Pair, rules: _Rules) -> Step:
    a, b = pair.a, pair.b
    fields: dict[str, Any] = {
        "target": b.name if b else None,
        "source": a.name if a else None,
        "elements": (b or a).elements,  # type: ignore[union-attr]
        "buffer": b is not None and pair.kind == "buffer",
    }
    category = pair.category
    meaning, pattern = _expected(pair, rules.expect)
    adapter = _adapter(pair, rules.adapters) if meaning == "adapt" else ""
    if pattern and _fits(meaning, pair, adapter):
        rules.used.add(pattern)
        if meaning == "adapt":
            return _adapted(pair, adapter, rules, fields)
        return Step(action="unused" if b is None else "keep", why=meaning, **fields)
    lossless = bool(a and b and a.dtype != b.dtype and is_lossless(a.dtype, b.dtype))
    if a and b and category in LOADABLE:
        return Step(action="copy", why=category, **fields)
    if category == Category.TIED:
        return Step(action="keep" if b else "unused", why=f"{category}: {pair.note}", **fields)
    if a and b and category == Category.CAST and (rules.allow_cast or lossless):
        return Step(action="copy", why=category, cast=True, **fields)
    if a and b and category == Category.POSITIONAL and rules.allow_positional:
        return Step(action="copy", why=category, cast=a.dtype != b.dtype, **fields)
    if is_benign(pair):
        return Step(action="keep" if b else "unused", why="harmless: old files lack it", **fields)
    return Step(action="keep" if b else "unused", why=f"!{category}", **fields)


def _adapted(pair: Pair, adapter: str, rules: _Rules, fields: dict[str, Any]) -> Step:
    """The step that adapts a tensor; the adapter is tried on the shapes."""
    a, b = pair.a, pair.b
    assert b is not None
    rows = rules.rows if adapter == "class-rows" else None
    like = torch.empty(b.shape, dtype=getattr(torch, b.dtype), device="meta")
    value = torch.empty(a.shape, dtype=getattr(torch, a.dtype), device="meta") if a else None
    adapt(adapter, value, like, rows)
    if a is None:
        return Step(action="make", why=Category.ADAPTED, adapter=adapter, **fields)
    cast = a.dtype != b.dtype
    if cast and not (rules.allow_cast or is_lossless(a.dtype, b.dtype)):
        raise Incompatible(
            f"{b.name} is {b.dtype}, the source {a.dtype}", fix("if that is meant", allow_cast=True)
        )
    return Step(action="copy", why=Category.ADAPTED, adapter=adapter, rows=rows, cast=cast, **fields)


def is_benign(pair: Pair) -> bool:
    """Whether a difference means nothing: counters of batches that files from before torch 0.4.1 do not have."""
    return pair.name.endswith("num_batches_tracked") and not (pair.a and pair.b)


def _expected(pair: Pair, expect: Mapping[str, str]) -> tuple[str, str]:
    names = [entry.name for entry in (pair.b, pair.a) if entry]
    for pattern, meaning in expect.items():
        if any(fits(name, pattern) for name in names):
            return meaning, pattern
    return "", ""


def _fits(meaning: str, pair: Pair, adapter: str) -> bool:
    match meaning:
        case "skip":
            return pair.a is not None and pair.b is not None
        case "new":
            return pair.a is None
        case "unused":
            return pair.b is None
        case _:
            return pair.b is not None and (pair.a is not None) == needs_source(adapter)


def _adapter(pair: Pair, adapters: Mapping[str, str]) -> str:
    for pattern, name in adapters.items():
        if fits(pair.name, pattern):
            return name
    raise Invalid(
        f"{pair.name} is to be adapted, and no adapter is named for it; there are {', '.join(ADAPTERS)}",
        fix("such as", adapters={escaped(pair.name): next(iter(ADAPTERS))}),
    )


def is_lossless(a: str, b: str) -> bool:
    """Whether every value of one dtype is a value of the other."""
    one, other = getattr(torch, a), getattr(torch, b)
    same_kind: bool = one.is_floating_point == other.is_floating_point
    return same_kind and torch.promote_types(one, other) == other


def _unexpected(
    found: Sequence[tuple[Step, Pair]], left: Side, right: Side, pairs: Sequence[Pair]
) -> Incompatible:
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
            described.append(f"{b.name} is {b.dtype}, the source {a.dtype}")
        elif pair.category == Category.POSITIONAL:
            described.append(f"{pair.name}: {pair.note}")
        else:
            described.append(f"{pair.name}: {pair.category} {pair.note}".strip())
    more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
    categories = {pair.category for _, pair in found}
    meanings = {pair.name: _meaning(pair) for _, pair in found}
    meanings = {pair.name: meanings.get(pair.name, "") for pair in pairs}
    below_it: dict[str, set[str]] = defaultdict(set)
    for name, meaning in meanings.items():
        for dot in re.finditer(r"\.", name):
            below_it[name[: dot.start()]].add(meaning)
    wanted = {}
    for name, meaning in meanings.items():
        parent = name.rpartition(".")[0]
        if meaning:  # The whole layer, unless others of it are to be loaded, or expected otherwise.
            wanted[below(parent) if below_it[parent] == {meaning} else escaped(name)] = meaning
    allowed = {
        name: True
        for name, category in (("allow_cast", Category.CAST), ("allow_positional", Category.POSITIONAL))
        if category in categories
    }
    differences = {"expect": wanted} if len(wanted) <= _MOST_ADVISED else {"everything": True}
    advised = {**(differences if wanted else {}), **allowed}
    fixes = [*_renames(left, right, pairs), *([fix("if that is meant", **advised)] if advised else [])]
    return Incompatible(f"{'; '.join(described)}{more}: not expected", *fixes)


def _renames(left: Side, right: Side, pairs: Sequence[Pair]) -> list[Fix]:
    """The first rules of renaming that may help."""
    found = next(suggestions(left, right, pairs), None)
    return (
        []
        if found is None or len(found.rules) > _MOST_ADVISED
        else [fix("maybe", found.evidence, rename=list(found.rules))]
    )


def _meaning(pair: Pair) -> str:
    return {Category.SHAPE: "skip", Category.ONLY_A: "unused", Category.ONLY_B: "new"}.get(pair.category, "")


def _why_nothing(left: Side, right: Side, pairs: Sequence[Pair]) -> tuple[str, list[Fix]]:
    """The reason that nothing fits, as far as it can be found, and what may help."""
    names = list(left.entries)
    keys = {}
    for name in names:
        container, _, bare = name.rpartition("/")
        if container and bare in right.entries:
            keys[container] = "".join(f"[{key!r}]" for key in container.split("/"))
    if keys:
        inner = f"give source{' or source'.join(keys.values())}"
        return "the names fit inside another container", [Fix("", inner, "")]
    renames = _renames(left, right, pairs)
    first = names[0].partition(".")[0]
    if renames and all(name.startswith(f"{first}.") for name in names):
        return f"all {len(names)} source names start with {first}.", renames
    casts = [pair for pair in pairs if pair.category == Category.CAST and pair.kind == "parameter"]
    if casts:
        a, b = casts[0].a, casts[0].b
        assert a is not None
        assert b is not None
        return f"no dtype fits, {b.name} is {b.dtype} against {a.dtype}", [
            fix("if that is meant", allow_cast=True)
        ]
    if all(pair.category in (Category.SHAPE, Category.ONLY_A, Category.ONLY_B) for pair in pairs):
        turned = [p for p in pairs if p.category == Category.SHAPE and p.note == "transposed"]
        if turned:
            return f"{len(turned)} shapes are transposed, such as {turned[0].name}", []
        shapes = [pair for pair in pairs if pair.category == Category.SHAPE]
        if shapes:
            a, b = shapes[0].a, shapes[0].b
            assert a is not None
            assert b is not None
            shown = f"{b.name} is {list(b.shape)} against {list(a.shape)}"
            return f"every shape differs, {shown}; another architecture", []
    positional = [pair for pair in pairs if pair.category == Category.POSITIONAL]
    if positional:
        allow = fix("if the numbers still mean the same layers", allow_positional=True)
        return f"the numbers have shifted, {positional[0].note}", [allow]
    if renames:
        return "no name fits", renames
    mine, theirs = next(iter(left.entries)), next(iter(right.entries))
    return f"no name fits, the source begins with {mine}, the target with {theirs}; another architecture", []


def _identities(steps: Sequence[Step], right: Side) -> list[str]:
    """Notes on new layers that begin as the identity, which only a ReLU before them makes exact.

    Raises:
        Incompatible: if another activation stands before one.
    """
    notes = []
    for layer in dict.fromkeys((s.target or "").rpartition(".")[0] for s in steps if s.adapter == "identity"):
        before = _before(right.module, layer)
        if before is None:
            notes.append(
                f"{layer} begins as the identity, which is exact after a ReLU only; none is known before it"
            )
        elif not isinstance(before, nn.ReLU):
            raise Incompatible(
                f"{layer} cannot begin as the identity: before it stands {type(before).__name__}, and only after a "
                "ReLU nothing changes"
            )
    return notes


def _before(module: nn.Module | None, layer: str) -> nn.Module | None:
    """The module before a layer of a `Sequential` that does more than to drop out or to reshape."""
    path, _, leaf = layer.rpartition(".")
    if module is None or not isinstance(module.get_submodule(path), nn.Sequential):
        return None
    children = list(module.get_submodule(path).named_children())
    earlier = children[: [name for name, _ in children].index(leaf)]
    passing = (nn.Dropout, nn.Identity, nn.Flatten)
    return next((part for _, part in reversed(earlier) if not isinstance(part, passing)), None)


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
                f"{left.label}",
                fix("leave one of them out", expect={escaped(step.target): "skip"}),
            )


def _frozen(freeze: str | Sequence[str] | None, steps: Sequence[Step], right: Side) -> tuple[str, ...]:
    if freeze is None:
        return ()
    names: list[str] = []
    parameters = [step.target for step in steps if step.target and not step.buffer]
    for pattern in [freeze] if isinstance(freeze, str) else freeze:
        if pattern == "loaded":
            names += [escaped(step.target) for step in steps if step.action == "copy" and step.target]
        else:
            layers = in_order(right.module) if right.module is not None else ()
            names += expanded([pattern], parameters, right.entries, layers)
    found = Freeze(tuple(dict.fromkeys(names)))
    if all(map(found.covers, parameters)):
        raise Invalid("freezing that leaves no parameter to train; leave the head out")
    return found.patterns
