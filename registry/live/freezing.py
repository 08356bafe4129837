"""Freezing that lasts, also after `train()`: of parameters, and of buffers that layers write to while training.

`registry.live.proof` shows that nothing frozen has moved. `registry.live.optimizers` is about the optimizers of what
still trains.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

from torch import nn
from torch.nn.parameter import is_lazy

from registry.live import components
from registry.live.layers import buffers_of, in_order, is_frozen, joined, layer_of, owner_of
from registry.patterns import escaped, fits, meant, unused
from registry.store.errors import Invalid, Unsupported
from registry.store.text import quoted

_HELD = "_registry_frozen"
"""Attribute of a layer that is held in evaluation mode."""

_GOES_ON = "_registry_goes_on"
"""Attribute of a frozen layer whose statistics go on."""

_ASKED = "_registry_asked"
"""Attribute of a layer: names of its buffers that were to be frozen and cannot be held."""

_FIRST = "first:"


class Freeze:
    """Names, and glob patterns of names, that are frozen."""

    def __init__(self, patterns: Iterable[str]) -> None:
        self.patterns = tuple(dict.fromkeys(patterns))
        self._names = frozenset(self.patterns)
        self._globs = [pattern for pattern in self._names if {*pattern} & {*"*?["}]

    def covers(self, name: str) -> bool:
        """Whether a name is frozen."""
        return name in self._names or any(fits(name, glob) for glob in self._globs)


class Frozen(NamedTuple):
    """What a freeze did.

    Attributes:
        parameters: names of all that are frozen now.
        held: paths of the layers that this freeze keeps in evaluation mode; in training mode they may write to their
            buffers.
        notes: what is worth saying.
        trainable: elements of the parameters that are left to train.
    """

    parameters: tuple[str, ...]
    held: tuple[str, ...]
    notes: tuple[str, ...]
    trainable: int


def freeze(
    model: nn.Module,
    patterns: str | Iterable[str],
    *,
    bn: Literal["freeze", "update"] = "freeze",
) -> Frozen:
    """Freeze parameters by pattern; calling it again adds to what is frozen.

    Their gradients are dropped, since an optimizer would still apply a stale one. A layer that has buffers of its own,
    such as BatchNorm's statistics or the vectors of a spectral norm, stays in evaluation mode once all its parameters
    are frozen, also after `model.train()`: in training mode it may write to them. Layers without buffers keep their
    mode, so a Dropout in the frozen part goes on dropping. To stop that, call its `eval()` after each `train()`.

    Args:
        patterns: globs of names, such as `conv.*`, or `first:3` for the first three layers that have parameters, in
            the order in which the network registers them; `first:-1` for all but the last.
        bn: `freeze` holds the statistics of frozen layers, `update` lets them go on.

    Raises:
        Invalid: if a pattern matches nothing, or nothing would be left to train.
        Unsupported: if the network is wrapped for several processes already, or sharded.
    """
    if bn not in ("freeze", "update"):
        raise Invalid(f"bn is {quoted(str(bn))}, expected 'freeze' or 'update'")
    return _freeze(model, patterns, bn)


def unfreeze(model: nn.Module, patterns: str | Iterable[str] = "*") -> tuple[str, ...]:
    """Thaw parameters, and the layers that they belong to; returns the names.

    Raises:
        Invalid: if a pattern matches nothing.
    """
    refuse_wrapped(model)
    plain: nn.Module = components.plain_module(model)
    names = dict(plain.named_parameters(remove_duplicate=False))
    buffers = [name for name, _ in plain.named_buffers(remove_duplicate=False)]
    order = in_order(plain)
    rule = Freeze(expanded(_listed(patterns), names, [*names, *buffers], layers=order, what="unfreeze"))
    thawed = tuple(name for name, p in names.items() if rule.covers(name) and not p.requires_grad)
    held = {path: part for path, part in plain.named_modules() if _HELD in part.__dict__}
    complete = {path for path in held if is_frozen(owner_of(plain, path)[1])}
    for name in thawed:
        names[name].requires_grad_(True)
    for path, part in held.items():
        is_thawed = path in complete and not is_frozen(owner_of(plain, path)[1])
        if is_thawed or any(map(rule.covers, buffers_of(plain, path))):
            _release(part, plain.training)
    return thawed


def check_again(model: nn.Module, names: Collection[str]) -> None:
    """See that `freeze_again` will do what it says, before anything is changed.

    Raises:
        Unsupported: if the network was wrapped before it was frozen.
    """
    if not set(names) <= set(frozen_names(model)):
        refuse_wrapped(model)


def freeze_again(model: nn.Module, names: Sequence[str], going_on: Collection[str] = ()) -> None:
    """Freeze what a checkpoint recorded as frozen, unless all of it is frozen already.

    Args:
        going_on: the layers whose statistics go on.
    """
    if set(names) <= set(frozen_names(model)):
        return
    plain: nn.Module = components.plain_module(model)
    to_hold = {path for path, _ in plain.named_modules() if set(buffers_of(plain, path)) <= set(names)}
    rule = Freeze(map(escaped, names))
    _freeze(model, names, "update", may_be_whole=True)
    for path, part in _complete(plain, rule):
        if path not in going_on:
            part.__dict__.pop(_GOES_ON, None)
        if path in to_hold:
            _hold(part)


def frozen_names(model: nn.Module) -> tuple[str, ...]:
    """Names of frozen parameters, and of the buffers of layers that are held."""
    plain: nn.Module = components.plain_module(model)
    found = [name for name, p in plain.named_parameters(remove_duplicate=False) if not p.requires_grad]
    for path, part in plain.named_modules():
        if _HELD in part.__dict__:
            found += buffers_of(plain, path)
    return tuple(found)


def parts_going_on(model: nn.Module) -> tuple[str, ...]:
    """The frozen layers whose statistics go on by `bn="update"`."""
    plain: nn.Module = components.plain_module(model)
    return tuple(path for path, part in plain.named_modules() if _GOES_ON in part.__dict__)


def watched_names(model: nn.Module) -> tuple[str, ...]:
    """Names that must not move: frozen parameters, and buffers of layers that are held or have nothing left to train.

    Buffers whose statistics go on by `bn="update"` are left out. Buffers that were to be frozen and cannot be held are
    included.
    """
    plain: nn.Module = components.plain_module(model)
    found = [name for name, p in plain.named_parameters(remove_duplicate=False) if not p.requires_grad]
    for path, part in plain.named_modules():
        _, owner = owner_of(plain, path)
        is_complete = is_frozen(owner) and next(owner.parameters(), None) is not None
        asked = part.__dict__.get(_ASKED, ())
        is_whole = _HELD in part.__dict__ or (is_complete and _GOES_ON not in part.__dict__)
        found += [
            joined(path, name) for name, _ in part.named_buffers(recurse=False) if is_whole or name in asked
        ]
    return tuple(found)


def rule_for(
    model: nn.Module, patterns: str | Iterable[str], *, may_be_whole: bool = False
) -> tuple[Freeze, dict[int, nn.Parameter]]:
    """Check a freeze before anything is changed.

    Args:
        may_be_whole: allow that no parameter is left to train.

    Returns:
        The rule, and the parameters that it freezes, by the `id` of each.

    Raises:
        Invalid: if a pattern matches nothing, or nothing would be left to train.
        Unsupported: if the network is wrapped for several processes already, or sharded.
    """
    refuse_wrapped(model)
    plain: nn.Module = components.plain_module(model)
    names = dict(plain.named_parameters(remove_duplicate=False))
    buffers = [name for name, _ in plain.named_buffers(remove_duplicate=False)]
    rule = Freeze(expanded(_listed(patterns), names, [*names, *buffers], layers=in_order(plain)))
    chosen = {id(p): p for name, p in names.items() if rule.covers(name)}
    if not may_be_whole and all(id(p) in chosen or not p.requires_grad for p in names.values()):
        raise Invalid("freezing that leaves no parameter to train", "leave the head out")
    return rule, chosen


def expanded(
    patterns: Iterable[str],
    parameters: Iterable[str],
    names: Collection[str],
    layers: Sequence[str] = (),
    *,
    what: str = "freeze",
) -> list[str]:
    """Patterns with `first:N` replaced by the names of the first layers' parameters.

    Args:
        parameters: names of parameters in the order of the network's registration.
        names: of everything that a pattern may match.
        layers: names of parameters, and of the buffers of layers without parameters, in the order of the layers. Such
            buffers are frozen with the layers before them.
        what: what to call it in an error.

    Raises:
        Invalid: if a pattern matches nothing, or there are not as many layers.
    """
    found: list[str] = []
    for pattern in patterns:
        if pattern.startswith(_FIRST):
            found += _first(pattern, list(parameters), layers)
        elif any(fits(name, pattern) for name in names):
            found.append(meant(pattern, names))
        else:
            raise unused(f"{what}: the pattern {quoted(pattern)}", pattern, names)
    return found


def refuse_wrapped(model: nn.Module) -> None:
    """Refuse a network whose parameters are not its own plain ones.

    Raises:
        Unsupported: if the network is wrapped for several processes, or its parameters are sharded, flat, or not
            initialised yet.
    """
    for part in model.modules():
        kind = type(part).__name__
        if kind in ("DistributedDataParallel", "FullyShardedDataParallel"):
            raise Unsupported(f"the network is wrapped in {kind}", "freeze before wrapping it")
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise Unsupported(f"{name} is not initialised yet", "run one batch through the network first")
        if hasattr(parameter, "device_mesh"):
            raise Unsupported(f"{name} is sharded", "freeze before the network is sharded")


def _freeze(
    model: nn.Module,
    patterns: str | Iterable[str],
    bn: Literal["freeze", "update"],
    *,
    may_be_whole: bool = False,
) -> Frozen:
    """Freeze as `freeze` does; `may_be_whole` as for `rule_for`."""
    rule, chosen = rule_for(model, patterns, may_be_whole=may_be_whole)
    plain: nn.Module = components.plain_module(model)
    names = dict(plain.named_parameters(remove_duplicate=False))
    notes = [
        f"{name} is frozen too, as it shares memory with a frozen tensor"
        for name, parameter in names.items()
        if id(parameter) in chosen and not rule.covers(name)
    ]
    for parameter in chosen.values():
        parameter.requires_grad_(False)
        parameter.grad = None
    held: dict[int, str] = {}
    if bn == "update":
        for _, part in _complete(plain, rule):
            _let_go_on(part, plain.training)
        notes.append("statistics inside the frozen part go on")
    else:
        for path, part in _complete(plain, rule):
            _hold(part)
            held.setdefault(id(part), path)
        notes += [
            f"{name} is not held, as its layer has parameters that are trained"
            for name in _note_asked(plain, rule)
        ]
    return Frozen(
        parameters=tuple(name for name, p in names.items() if not p.requires_grad),
        held=tuple(held.values()),
        notes=tuple(notes),
        trainable=sum(p.numel() for p in plain.parameters() if p.requires_grad),
    )


def _note_asked(model: nn.Module, rule: Freeze) -> list[str]:
    """Note at their layers the buffers that were to be frozen and cannot be held; returns their names."""
    found = []
    for path, part in model.named_modules(remove_duplicate=False):
        for name in buffers_of(model, path):
            if rule.covers(name) and _HELD not in part.__dict__:
                object.__setattr__(part, _ASKED, {*part.__dict__.get(_ASKED, ()), name.rpartition(".")[2]})
                found.append(name)
    return found


def _listed(patterns: str | Iterable[str]) -> list[str]:
    """The patterns as a list.

    Raises:
        Invalid: if one is no text.
    """
    several = not isinstance(patterns, str | nn.Module) and isinstance(patterns, Iterable)
    found: list[Any] = list(patterns) if several else [patterns]
    for pattern in found:
        if not isinstance(pattern, str):
            raise Invalid(
                f"a {type(pattern).__name__} is not a pattern of names",
                "write 'conv.*', 'loaded' or 'first:3'",
            )
    return found


def _first(pattern: str, parameters: Sequence[str], order: Sequence[str]) -> list[str]:
    """What `first:N` stands for: patterns of the names of the first layers."""
    layers = list(dict.fromkeys(layer_of(name) for name in parameters))
    try:
        count = int(pattern.removeprefix(_FIRST))
    except ValueError:
        count = 0
    if not count or abs(count) >= len(layers):
        raise Invalid(
            f"freeze: {quoted(pattern)} is not a number of the {len(layers)} layers",
            "write first:3, or first:-1 for all but the last",
        )
    chosen = set(layers[:count])
    known = set(parameters)
    is_left = [name in known and layer_of(name) not in chosen for name in order]
    rest = is_left.index(True) if any(is_left) else len(order)
    between = [name for name in order[:rest] if name not in known]
    return [escaped(name) for name in [*(n for n in parameters if layer_of(n) in chosen), *between]]


def _complete(model: nn.Module, rule: Freeze) -> Iterator[tuple[str, nn.Module]]:
    """The layers that have buffers of their own, that a rule is about, and that have nothing left to train.

    For a layer without parameters, a pattern that fits one of its buffers is enough, as it can only be held as a whole.
    """
    for path, part in model.named_modules(remove_duplicate=False):
        buffers = [joined(path, name) for name, _ in part.named_buffers(recurse=False)]
        if not buffers:
            continue
        above, owner = owner_of(model, path)
        parameters = [joined(above, name) for name, _ in owner.named_parameters(remove_duplicate=False)]
        is_about = any(map(rule.covers, [*buffers, *parameters]))
        enough = all if ".parametrizations." in f".{path}" else any
        is_named = owner is not part and enough(map(rule.covers, buffers))
        if is_about and (is_named or (is_frozen(owner) and next(owner.parameters(), None) is not None)):
            yield path, part


def _hold(part: nn.Module) -> None:
    """Keep a layer in evaluation mode, also after `train()`; its class, its names and the mode of its children stay."""
    part.training = False
    part.__dict__.pop(_GOES_ON, None)
    if _HELD not in part.__dict__:
        object.__setattr__(part, _HELD, True)
        object.__setattr__(part, "train", _StayInEval(part))


def _let_go_on(part: nn.Module, mode: bool) -> None:
    """Let the statistics of a frozen layer go on."""
    _release(part, mode)
    object.__setattr__(part, _GOES_ON, True)


def _release(part: nn.Module, mode: bool) -> None:
    """Let a layer that is held follow `train()` again."""
    if part.__dict__.pop(_HELD, None):
        del part.__dict__["train"]
        part.training = mode


class _StayInEval:
    """Takes the place of a layer's `train`; can be copied and pickled with the layer."""

    def __init__(self, part: nn.Module) -> None:
        self._part = part

    def __call__(self, mode: bool = True) -> nn.Module:
        for child in self._part.children():
            child.train(mode)
        self._part.training = False
        return self._part
