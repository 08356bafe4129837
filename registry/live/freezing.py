"""Freezing that holds: parameters, stale gradients and what layers count in buffers, also after `train()`; and the proof."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from registry.live import components
from registry.patterns import escaped, fits, meant, unused
from registry.store.digest import tensor_digest
from registry.store.errors import Incompatible, Invalid, RegistryError, Unsupported
from registry.store.text import quoted
from registry.store.tree import Leaf

_HELD = "_registry_frozen"
_GOES_ON = "_registry_goes_on"
_ASKED = "_registry_asked"
"""Attributes of a layer: it is held; its statistics go on; buffers that were to be frozen, and cannot be held."""

_FIRST = "first:"


class Thawed(RegistryError):
    """Something that was frozen has changed."""


class Freeze:
    """Names, and glob patterns of names, that are frozen."""

    def __init__(self, patterns: Iterable[str]) -> None:
        self.patterns = tuple(dict.fromkeys(patterns))
        self._names = frozenset(self.patterns)
        self._globs = [pattern for pattern in self._names if {*pattern} & {*"*?["}]

    def covers(self, name: str) -> bool:
        return name in self._names or any(fits(name, glob) for glob in self._globs)


class Frozen(NamedTuple):
    """What a freeze did.

    Attributes:
        parameters: names of all that are frozen now.
        held: layers that this freeze keeps in evaluation mode, as they would write to buffers of theirs otherwise.
        notes: what is worth saying.
        trainable: how many values are left to train.
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

    Their gradients are dropped, as a stale gradient would still be stepped. A layer that has buffers of its own, such as
    BatchNorm's statistics or the vectors of a spectral norm, stays in evaluation mode once all its parameters are frozen,
    also after `model.train()`: in training mode it may write to them. Layers without buffers keep their mode, so a
    Dropout within the frozen part goes on dropping; `eval()` it after each `train()` where it should not.

    Args:
        patterns: globs of names, such as `conv.*`, or `first:3` for the first three layers that have parameters, in
            the order in which the network registers them; `first:-1` for all but the last.
        bn: `update` lets the statistics of frozen layers go on.

    Raises:
        Invalid: if a pattern matches nothing, or nothing would be left to train.
        Unsupported: if the network is wrapped for several processes already, or sharded.
    """
    if bn not in ("freeze", "update"):
        raise Invalid(f"bn is {quoted(str(bn))}, expected 'freeze' or 'update'")
    return _freeze(model, patterns, bn)


def _freeze(
    model: nn.Module,
    patterns: str | Iterable[str],
    bn: Literal["freeze", "update"],
    *,
    may_be_whole: bool = False,
) -> Frozen:
    rule, chosen = check(model, patterns, may_be_whole=may_be_whole)
    plain: nn.Module = components.plain_module(model)
    names = dict(plain.named_parameters(remove_duplicate=False))
    notes = []
    for name, parameter in names.items():
        if id(parameter) in chosen and not rule.covers(name):
            notes.append(f"{name} is frozen too, as it shares memory with a frozen name")
    for parameter in chosen.values():
        parameter.requires_grad_(False)
        parameter.grad = None
    held: dict[int, str] = {}
    for path, part in _complete(plain, rule):
        if bn == "freeze":
            _hold(part)
            held.setdefault(id(part), path)
        else:
            _release(part, plain.training)
            object.__setattr__(part, _GOES_ON, True)
    if bn == "update":
        notes.append("statistics inside the frozen part go on")
    for path, part in plain.named_modules(remove_duplicate=False) if bn == "freeze" else ():
        for name in _buffers_of(plain, path):
            if rule.covers(name) and _HELD not in part.__dict__:
                notes.append(f"{name} is not held, as its layer has parameters that are trained")
                object.__setattr__(part, _ASKED, {*part.__dict__.get(_ASKED, ()), name.rpartition(".")[2]})
    frozen = tuple(name for name, p in names.items() if not p.requires_grad)
    trainable = sum(p.numel() for p in plain.parameters() if p.requires_grad)
    return Frozen(frozen, tuple(held.values()), tuple(notes), trainable)


def check_again(model: nn.Module, names: Collection[str]) -> None:
    """See that `freeze_again` will do what it says, before anything is changed.

    Raises:
        Unsupported: if the network was wrapped before it was frozen.
    """
    if not set(names) <= set(frozen_names(model)):
        refuse_wrapped(model)


def freeze_again(model: nn.Module, names: Sequence[str], going_on: Collection[str] = ()) -> None:
    """Freeze what a checkpoint recorded as frozen, unless it is already, as in a network that was wrapped since.

    Args:
        going_on: the layers whose statistics were let go on.
    """
    if set(names) <= set(frozen_names(model)):
        return
    plain: nn.Module = components.plain_module(model)
    is_held = {
        path: part for path, part in plain.named_modules() if set(_buffers_of(plain, path)) <= set(names)
    }
    rule = Freeze(map(escaped, names))
    _freeze(model, names, "update", may_be_whole=True)
    for path, part in _complete(plain, rule):
        if path not in going_on:
            part.__dict__.pop(_GOES_ON, None)
        if path in is_held:
            _hold(part)


def check(
    model: nn.Module, patterns: str | Iterable[str], *, may_be_whole: bool = False
) -> tuple[Freeze, dict[int, nn.Parameter]]:
    """Whether a freeze makes sense, before anything is changed: the rule, and the parameters by their ids.

    Raises:
        Invalid: if a pattern matches nothing, or nothing would be left to train.
        Unsupported: if the network is wrapped for several processes already, or sharded.
    """
    refuse_wrapped(model)
    plain: nn.Module = components.plain_module(model)
    names = dict(plain.named_parameters(remove_duplicate=False))
    buffers = [name for name, _ in plain.named_buffers(remove_duplicate=False)]
    rule = Freeze(resolved(_listed(patterns), names, [*names, *buffers], in_order(plain)))
    chosen = {id(p): p for name, p in names.items() if rule.covers(name)}
    if not may_be_whole and all(id(p) in chosen or not p.requires_grad for p in names.values()):
        raise Invalid("freezing that leaves no parameter to train; leave the head out")
    return rule, chosen


def _listed(patterns: str | Iterable[str]) -> list[str]:
    """
    Raises:
        Invalid: if they are no patterns.
    """
    several = not isinstance(patterns, str | nn.Module) and isinstance(patterns, Iterable)
    found: list[Any] = list(patterns) if several else [patterns]
    for pattern in found:
        if not isinstance(pattern, str):
            raise Invalid(
                f"a {type(pattern).__name__} is no pattern of names; write 'conv.*', 'loaded' or 'first:3'"
            )
    return found


def in_order(model: nn.Module) -> list[str]:
    """Names of the parameters, and of the buffers of layers without parameters, in the order of the layers."""
    found = []
    for path, part in model.named_modules(remove_duplicate=False):
        own = [name for name, _ in part.named_parameters(recurse=False)]
        if not own and _owner(model, path)[1] is not part and ".parametrizations." not in f".{path}":
            own = [name for name, _ in part.named_buffers(recurse=False)]
        found += [_joined(path, name) for name in own]
    return found


def resolved(
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
        layers: names of parameters, and of the buffers of layers without parameters, in the order of the layers; those
            of the second kind go with the layers before them.
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
            raise Invalid(f"{what}: the pattern {quoted(pattern)} {unused(pattern, names)}")
    return found


def _first(pattern: str, parameters: Sequence[str], order: Sequence[str]) -> list[str]:
    layers = list(dict.fromkeys(_layer(name) for name in parameters))
    try:
        count = int(pattern.removeprefix(_FIRST))
    except ValueError:
        count = 0
    if not count or abs(count) >= len(layers):
        raise Invalid(
            f"freeze: {quoted(pattern)} is no number of the {len(layers)} layers; write first:3, or first:-1 for all "
            "but the last"
        )
    chosen = set(layers[:count])
    known = set(parameters)
    rest = next(
        (i for i, name in enumerate(order) if name in known and _layer(name) not in chosen), len(order)
    )
    between = [name for name in order[:rest] if name not in known]
    return [escaped(name) for name in [*parameters, *between] if name not in known or _layer(name) in chosen]


def _layer(name: str) -> str:
    """The layer that a parameter belongs to; a parametrized one is one layer."""
    return (
        name.partition(".parametrizations.")[0] if ".parametrizations." in name else name.rpartition(".")[0]
    )


def refuse_wrapped(model: nn.Module) -> None:
    """
    Raises:
        Unsupported: if the network is wrapped for several processes, or its parameters are sharded, flat, or not
            initialised yet.
    """
    for part in model.modules():
        kind = type(part).__name__
        if kind in ("DistributedDataParallel", "FullyShardedDataParallel"):
            raise Unsupported(f"the network is wrapped in {kind}; freeze before wrapping it")
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise Unsupported(f"{name} is not initialised yet; run one batch through the network first")
        if hasattr(parameter, "device_mesh"):
            raise Unsupported(f"{name} is sharded; freeze before the network is sharded")


def _complete(model: nn.Module, rule: Freeze) -> Iterator[tuple[str, nn.Module]]:
    """The layers with buffers of their own of which nothing is left to train, as far as a rule is about them.

    Of a layer without parameters one buffer is enough, as it can be held as a whole only.
    """
    for path, part in model.named_modules(remove_duplicate=False):
        buffers = [_joined(path, name) for name, _ in part.named_buffers(recurse=False)]
        if not buffers:
            continue
        above, owner = _owner(model, path)
        parameters = [_joined(above, name) for name, _ in owner.named_parameters(remove_duplicate=False)]
        is_about = any(map(rule.covers, [*buffers, *parameters]))
        enough = all if ".parametrizations." in f".{path}" else any
        is_named = owner is not part and enough(map(rule.covers, buffers))
        if is_about and (is_named or (_is_frozen(owner) and next(owner.parameters(), None) is not None)):
            yield path, part


def _owner(model: nn.Module, path: str) -> tuple[str, nn.Module]:
    """The layer whose parameters a layer with buffers belongs to: itself, or the next above it that has any, as for a
    parametrization."""
    part = model.get_submodule(path)
    while path and next(part.parameters(), None) is None:
        path = path.rpartition(".")[0]
        part = model.get_submodule(path)
    return path, part


def _is_frozen(part: nn.Module) -> bool:
    return not any(parameter.requires_grad for parameter in part.parameters())


def _buffers_of(model: nn.Module, path: str) -> list[str]:
    """Names of a layer's own buffers that its state dict has."""
    part = model.get_submodule(path)
    left_out = part._non_persistent_buffers_set
    return [_joined(path, name) for name, _ in part.named_buffers(recurse=False) if name not in left_out]


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _release(part: nn.Module, mode: bool) -> None:
    """Let a layer that is held follow `train()` again."""
    if part.__dict__.pop(_HELD, None):
        del part.__dict__["train"]
        part.training = mode


def _hold(part: nn.Module) -> None:
    """Keep a layer in evaluation mode, also after `train()`, without changing its class, its names, or its layers' mode."""
    part.training = False
    part.__dict__.pop(_GOES_ON, None)
    if _HELD not in part.__dict__:
        object.__setattr__(part, _HELD, True)
        object.__setattr__(part, "train", _StayInEval(part))


class _StayInEval:
    """Takes the place of a layer's `train`; can be copied and pickled with the layer."""

    def __init__(self, part: nn.Module) -> None:
        self._part = part

    def __call__(self, mode: bool = True) -> nn.Module:
        for child in self._part.children():
            child.train(mode)
        self._part.training = False
        return self._part


def unfreeze(model: nn.Module, patterns: str | Iterable[str] = "*") -> tuple[str, ...]:
    """Thaw parameters, and the layers that they belong to; returns the names.

    Raises:
        Invalid: if a pattern matches nothing.
    """
    refuse_wrapped(model)
    plain: nn.Module = components.plain_module(model)
    names = dict(plain.named_parameters(remove_duplicate=False))
    buffers = [name for name, _ in plain.named_buffers(remove_duplicate=False)]
    rule = Freeze(resolved(_listed(patterns), names, [*names, *buffers], in_order(plain), what="unfreeze"))
    thawed = tuple(name for name, p in names.items() if rule.covers(name) and not p.requires_grad)
    held = {path: part for path, part in plain.named_modules() if _HELD in part.__dict__}
    complete = {path for path in held if _is_frozen(_owner(plain, path)[1])}
    for name in thawed:
        names[name].requires_grad_(True)
    for path, part in held.items():
        is_thawed = path in complete and not _is_frozen(_owner(plain, path)[1])
        if is_thawed or any(map(rule.covers, _buffers_of(plain, path))):
            _release(part, plain.training)
    return thawed


def frozen_names(model: nn.Module) -> tuple[str, ...]:
    """Names of frozen parameters, and of the buffers of layers that are held."""
    plain: nn.Module = components.plain_module(model)
    found = [name for name, p in plain.named_parameters(remove_duplicate=False) if not p.requires_grad]
    for path, part in plain.named_modules():
        if _HELD in part.__dict__:
            found += _buffers_of(plain, path)
    return tuple(found)


def parts_going_on(model: nn.Module) -> tuple[str, ...]:
    """The frozen layers whose statistics go on by `bn="update"`."""
    plain: nn.Module = components.plain_module(model)
    return tuple(path for path, part in plain.named_modules() if _GOES_ON in part.__dict__)


# -- the proof -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def frozen_proof(
    model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> Iterator[tuple[str, ...]]:
    """Prove that what is frozen does not move: digests before and after the block.

    Args:
        optimizer: helps to name the cause.

    Every frozen parameter is watched, and every buffer of layers that are held or have no parameter left to train;
    except those whose statistics go on by `bn="update"`.

    Yields:
        The names that are watched.

    Raises:
        Invalid: if nothing is frozen.
        Thawed: with the names that moved, and why, as far as it can be known.
    """
    names = _watched(model)
    if not names:
        raise Invalid("nothing is frozen; freeze first")
    before, objects = _digests(model, names), _named(components.plain_module(model))
    yield names
    after = _digests(model, names)
    moved = [name for name in names if before[name] != after.get(name)]
    if moved:
        causes = [f"{name} ({_cause(model, optimizer, name, objects[name])})" for name in moved[:3]]
        more = f", and {len(moved) - 3} more" if len(moved) > 3 else ""
        raise Thawed(f"{len(moved)} of {len(names)} frozen names moved: {', '.join(causes)}{more}")


def _watched(model: nn.Module) -> tuple[str, ...]:
    plain: nn.Module = components.plain_module(model)
    found = [name for name, p in plain.named_parameters(remove_duplicate=False) if not p.requires_grad]
    for path, part in plain.named_modules():
        _, owner = _owner(plain, path)
        is_complete = _is_frozen(owner) and next(owner.parameters(), None) is not None
        asked = part.__dict__.get(_ASKED, ())
        is_whole = _HELD in part.__dict__ or (is_complete and _GOES_ON not in part.__dict__)
        found += [
            _joined(path, name) for name, _ in part.named_buffers(recurse=False) if is_whole or name in asked
        ]
    return tuple(found)


def _digests(model: nn.Module, names: Sequence[str]) -> dict[str, str]:
    state = _named(components.plain_module(model))
    found = {}
    for name in names:
        if name in state:
            tensor = state[name].detach()
            leaf = Leaf.of(tensor)
            found[name] = tensor_digest(leaf.dtype, leaf.shape, leaf.buffer())
    return found


def _named(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def _cause(model: nn.Module, optimizer: torch.optim.Optimizer | None, name: str, was: torch.Tensor) -> str:
    plain: nn.Module = components.plain_module(model)
    state = _named(plain)
    if name not in state or (isinstance(was, nn.Parameter) and state[name] is not was):
        return "it was replaced or removed"
    tensor = state[name]
    module = plain.get_submodule(name.rpartition(".")[0])
    if name.rpartition(".")[2] in dict(module.named_buffers(recurse=False)):
        kind = type(module).__name__
        if module.training:
            return f"its {kind} was in training mode"
        return f"its {kind} or what calls it writes to it in evaluation mode, too; nothing here can hold it"
    if tensor.requires_grad:
        return "it was thawed"
    others = [
        n for n, t in state.items() if n != name and t.data_ptr() == tensor.data_ptr() and t.requires_grad
    ]
    if others:
        return f"it shares memory with {others[0]}, which is trainable"
    if optimizer is not None and any(p is tensor for g in optimizer.param_groups for p in g["params"]):
        stale = tensor.grad is not None
        return "it is in the optimizer, with a stale gradient" if stale else "it is in the optimizer"
    return "something wrote to it"


# -- optimizers ----------------------------------------------------------------------------------------------


class OptimizerProblem(NamedTuple):
    """A parameter that an optimizer should not have, or lacks."""

    problem: Literal["frozen", "missing", "stale", "duplicated"]
    name: str


def check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[OptimizerProblem]:
    """Compare an optimizer with what is trainable, by identity: frozen in it, trainable not in it, stale, duplicated."""
    plain: nn.Module = components.plain_module(model)
    names = {id(p): name for name, p in plain.named_parameters()}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    found: list[OptimizerProblem] = []
    seen: set[int] = set()
    for i, parameter in enumerate(held):
        name = names.get(id(parameter))
        if name is None:
            found.append(OptimizerProblem("stale", f"parameter {i} of shape {list(parameter.shape)}"))
        elif id(parameter) in seen:
            found.append(OptimizerProblem("duplicated", name))
        elif not parameter.requires_grad:
            found.append(OptimizerProblem("frozen", name))
        seen.add(id(parameter))
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad and id(parameter) not in seen:
            found.append(OptimizerProblem("missing", name))
    return found


def param_groups(
    model: nn.Module,
    lr: float,
    *,
    weight_decay: float = 0.0,
    rates: Mapping[str, float] | None = None,
    layer_decay: float | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: what is trainable, without weight decay on norms and biases.

    Args:
        lr: the learning rate where nothing else is said.
        rates: learning rates by glob pattern of names; the first that fits wins.
        layer_decay: each of the network's top-level blocks has this times the rate of the one behind it.

    Returns:
        Groups with `params`, `lr`, `weight_decay` and `param_names`.

    Raises:
        Invalid: if nothing is trainable, or a pattern matches nothing.
    """
    plain: nn.Module = components.plain_module(model)
    trainable = {name: p for name, p in plain.named_parameters() if p.requires_grad}
    if not trainable:
        raise Invalid("no parameter is trainable; unfreeze some first")
    for pattern in rates or {}:
        if not any(fits(name, pattern) for name in trainable):
            raise Invalid(
                f"rates: the pattern {quoted(pattern)}, among what is trainable, {unused(pattern, trainable)}"
            )
    rates = {meant(pattern, trainable): rate for pattern, rate in (rates or {}).items()}
    blocks = list(dict.fromkeys(name.partition(".")[0] for name in trainable))
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in trainable.items():
        rate = next((r for pattern, r in rates.items() if fits(name, pattern)), lr)
        if layer_decay is not None:
            rate *= layer_decay ** (len(blocks) - 1 - blocks.index(name.partition(".")[0]))
        decay = weight_decay if parameter.dim() > 1 else 0.0
        group = groups.setdefault(
            (rate, decay), {"params": [], "lr": rate, "weight_decay": decay, "param_names": []}
        )
        group["params"].append(parameter)
        group["param_names"].append(name)
    return list(groups.values())


def remap_optimizer(
    state: Mapping[str, Any], old_names: Sequence[str], optimizer: torch.optim.Optimizer, model: nn.Module
) -> list[str]:
    """Give an optimizer the state of another by parameter name, when its groups have changed.

    Args:
        state: `state_dict()` of the old optimizer.
        old_names: names of its parameters, in order.
        optimizer: the new one, over parameters of `model`.

    Returns:
        Names whose state was dropped, as the new optimizer does not have them.

    Raises:
        Incompatible: if the names do not fit the state.
    """
    places = [place for group in state["param_groups"] for place in group["params"]]
    if len(places) != len(old_names):
        raise Incompatible(f"{len(old_names)} names for the {len(places)} parameters of the old optimizer")
    by_name = {
        name: state["state"][place]
        for name, place in zip(old_names, places, strict=True)
        if place in state["state"]
    }
    plain: nn.Module = components.plain_module(model)
    names = {id(p): name for name, p in plain.named_parameters()}
    fresh = optimizer.state_dict()
    number, taken = 0, {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names.get(id(parameter), "")
            if name in by_name:
                taken[number] = by_name.pop(name)
            number += 1
    optimizer.load_state_dict({"state": taken, "param_groups": fresh["param_groups"]})
    return sorted(by_name)
