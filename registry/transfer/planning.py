"""Planning a transfer: what of a source fits a network, from names and shapes alone."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal

from torch import nn

from registry.home import Home
from registry.live.freezing import Freeze, expanded
from registry.live.layers import in_order
from registry.patterns import escaped, fits, meant, unused
from registry.store.errors import Conflict, Incompatible, Invalid, fix
from registry.store.text import quoted
from registry.transfer.adapters import ADAPTERS, check_adapter, needs_source
from registry.transfer.decisions import EXPECTATIONS, Terms, decide
from registry.transfer.matching import match
from registry.transfer.plan import SCHEMA, Step, TransferPlan, percent
from registry.transfer.refusals import nothing_loaded, unexpected
from registry.transfer.rows import Rows
from registry.transfer.sides import Side
from registry.transfer.sources import Source, side_of

_logger = logging.getLogger(__name__)


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
        allow_cast: copy to dtypes that cannot hold every value of the source's.
        allow_positional: copy names whose numbers may have shifted.
        allow_nan: copy tensors that hold NaN or infinity.
        adapters: names of adapters, by glob pattern of the target's names; see
            `registry.transfer.adapters.ADAPTERS`.
        classes: names of the classes of the source and of the target, for adapters that take the rows of a classifier.
        everything: every difference is expected; what fits is loaded.
        registry: where references are looked up.

    Raises:
        Incompatible: if nothing would be loaded, with the reason; if a difference is not expected; if the coverage is
            too small.
        Invalid: if a pattern matches nothing, or source and target are the same network.
        Conflict: if two names of the source go to one of the target.
    """
    _check_arguments(expect=expect, adapters=adapters, rename=rename, freeze=freeze)
    wanted = {**dict.fromkeys(adapters or {}, "adapt"), **(expect or {})}
    _check_words(wanted, adapters or {}, min_coverage)
    left, right = side_of(source, registry), side_of(target, registry)
    _check_distinct(left, right)
    names = {**left.entries, **right.entries}
    expected = {meant(pattern, names): meaning for pattern, meaning in wanted.items()}
    chosen = {meant(pattern, names): name for pattern, name in (adapters or {}).items()}
    pairs = match(left, right, rename=list(rename), apart=_apart(expected, chosen))
    terms = Terms(
        expect=expected,
        adapters=chosen,
        rows=Rows.by_class(*classes) if classes else None,
        allow_cast=allow_cast,
        allow_positional=allow_positional,
    )
    decisions = [decide(pair, terms) for pair in pairs]
    steps = tuple(decision.step for decision in decisions)
    if not any(step.action == "copy" and not step.buffer for step in steps):
        raise nothing_loaded(left, right, pairs)
    refused = [decision.pair for decision in decisions if decision.is_refused]
    if refused and not everything:
        raise unexpected(refused, left, right, pairs=pairs)
    _check_used(expected, {decision.pattern for decision in decisions if decision.pattern}, names)
    _check_ties(left, right, steps)
    plan = TransferPlan(
        schema=SCHEMA,
        source=left.label,
        source_id=left.checkpoint.id if left.checkpoint else None,
        source_digest=left.content,
        target=right.label,
        target_digest=right.structure,
        steps=steps,
        freeze=_frozen(freeze, steps, right),
        bn=bn,
        min_coverage=min_coverage,
        allow_nan=allow_nan,
        notes=(*left.notes, *_identities(steps, right)),
    )
    plan.remember(source, registry)
    if plan.coverage < min_coverage:
        raise Incompatible(f"{plan.summary}, less than the {percent(min_coverage)} that was asked for")
    return plan


def from_pretrained(
    registry: Home, make: Any, source: Source, *, freeze: bool | str | Sequence[str] = False, **given: Any
) -> nn.Module:
    """A new network with whatever fits from a source; every difference is expected, loading nothing is an error.

    What was loaded is logged.

    Args:
        make: a network, or its class or a function that makes it.
        freeze: freeze what was loaded (`True`), or patterns of names.
        given: arguments for `make`.

    Raises:
        Incompatible: if nothing would be loaded, with the reason.
        Invalid: if `given` has arguments for a network that is made already, or a pattern matches nothing.
    """
    if isinstance(make, nn.Module) and given:
        raise Invalid(
            f"{', '.join(given)}: the network is made already", "use plan_transfer for more than freeze="
        )
    model = make if isinstance(make, nn.Module) else make(**given)
    what: Any = "loaded" if freeze is True else freeze or None
    left = side_of(source, registry)
    plan = plan_transfer(left, model, everything=True, freeze=what, registry=registry)
    plan.apply(model, left)
    # A warning, so that it is shown where nobody has set logging up.
    _logger.warning("%s", plan.summary)
    return model


def _check_arguments(
    *,
    expect: Mapping[str, str] | None,
    adapters: Mapping[str, str] | None,
    rename: Iterable[str],
    freeze: str | Sequence[str] | None,
) -> None:
    """Refuse arguments of another type, which would be read as something else.

    Raises:
        Invalid: saying what was expected.
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


def _check_words(expect: Mapping[str, str], adapters: Mapping[str, str], min_coverage: float) -> None:
    """Refuse unknown expectations and adapters, and a coverage that is no share.

    Raises:
        Invalid: with what is possible.
    """
    for name in adapters.values():
        check_adapter(name)
    for pattern, meaning in expect.items():
        if meaning not in EXPECTATIONS:
            raise Invalid(
                f"what is expected of {quoted(pattern)} is {quoted(str(meaning))}, not one of {', '.join(EXPECTATIONS)}"
            )
    if not 0 <= min_coverage <= 1:
        raise Invalid(f"the least coverage is {min_coverage}, expected a share from 0 to 1")


def _check_distinct(left: Side, right: Side) -> None:
    """Refuse a source that is the target.

    Raises:
        Invalid: if both are one network, or one checkpoint.
    """
    if left.module is not None and left.module is right.module and left.checkpoint is None:
        raise Invalid("source and target are the same network")
    if left.checkpoint and right.checkpoint and left.checkpoint.id == right.checkpoint.id:
        raise Invalid(f"source and target are the same version, {left.label}")


def _apart(expect: Mapping[str, str], adapters: Mapping[str, str]) -> list[str]:
    """The patterns of names that are known to be on one side only."""
    found = [pattern for pattern, meaning in expect.items() if meaning in ("new", "unused")]
    return found + [pattern for pattern, name in adapters.items() if not needs_source(name)]


def _check_used(expect: Mapping[str, str], used: Collection[str], names: Collection[str]) -> None:
    """Refuse an expected pattern that decided about no pair.

    Raises:
        Invalid: saying whether it fits no name, or fits names that cannot be what is expected.
    """
    for pattern, meaning in expect.items():
        if pattern not in used:
            what = f"the expected pattern {quoted(pattern)}"
            if any(fits(name, pattern) for name in names):
                raise Invalid(f"{what} matches nothing that can be {meaning!r}")
            raise unused(what, pattern, names)


def _identities(steps: Sequence[Step], right: Side) -> list[str]:
    """Notes on new layers that begin as the identity, which only a ReLU before them makes exact.

    Raises:
        Incompatible: if another activation stands before one.
    """
    notes = []
    begun = [step.target or "" for step in steps if step.adapter and ADAPTERS[step.adapter].after_relu]
    for layer in dict.fromkeys(name.rpartition(".")[0] for name in begun):
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
    """The module before a layer of a `Sequential`, past dropout and reshaping; None if it is not known."""
    path, _, leaf = layer.rpartition(".")
    if module is None or not isinstance(module.get_submodule(path), nn.Sequential):
        return None
    children = list(module.get_submodule(path).named_children())
    earlier = children[: [name for name, _ in children].index(leaf)]
    passing = (nn.Dropout, nn.Identity, nn.Flatten)
    return next((part for _, part in reversed(earlier) if not isinstance(part, passing)), None)


def _check_ties(left: Side, right: Side, steps: Sequence[Step]) -> None:
    """See that names of the target that share memory get one value.

    Raises:
        Conflict: if two of them would get different ones.
    """
    first: dict[object, Step] = {}
    for step in steps:
        if step.action != "copy" or step.target is None or step.source is None:
            continue
        other = first.setdefault(right.entries[step.target].tie, step)
        if other is step or other.source is None:
            continue
        are_tied = left.entries[other.source].tie == left.entries[step.source].tie
        if not are_tied and left.digest(other.source) != left.digest(step.source):
            raise Conflict(
                f"{other.target} and {step.target} share memory in {right.label} and have different values in "
                f"{left.label}",
                fix("leave one of them out", expect={escaped(step.target): "skip"}),
            )


def _frozen(freeze: str | Sequence[str] | None, steps: Sequence[Step], right: Side) -> tuple[str, ...]:
    """The patterns of all that is frozen after the copy.

    Raises:
        Invalid: if a pattern matches nothing, or nothing would be left to train.
    """
    if freeze is None:
        return ()
    names: list[str] = []
    parameters = [step.target for step in steps if step.target and not step.buffer]
    for pattern in [freeze] if isinstance(freeze, str) else freeze:
        if pattern == "loaded":
            names += [escaped(step.target) for step in steps if step.action == "copy" and step.target]
        else:
            layers = in_order(right.module) if right.module is not None else ()
            names += expanded([pattern], parameters, right.entries, layers=layers)
    found = Freeze(tuple(dict.fromkeys(names)))
    if all(map(found.covers, parameters)):
        raise Invalid("freezing that leaves no parameter to train", "leave the head out")
    return found.patterns
