"""Components: live objects whose state a checkpoint records, and putting that state back, all or nothing.

Anything with `state_dict()` and `load_state_dict()` is a component, and so is a list of such objects: a part of one
is called by its position, as `optimizers/0`. Wrappers (`DataParallel`, `DistributedDataParallel`, `torch.compile`) are
seen through, wherever in a network they sit: what is stored has the names of the plain module.

A component says more by attributes. If `per_rank` is true, each of several processes records its own state. `adapter_of` is
the id of the version, or the digest of the parameters, that the component adapts; the lineage records it.
"""

from __future__ import annotations

import contextlib
import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from registry.store.errors import Incompatible, Invalid, NotFound, RegistryError, Unsupported
from registry.store.text import quoted

_SHOWN = 3
"""Problems that an error names."""

_INNER = {
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "OptimizedModule": "_orig_mod",
}
"""The attribute in which each wrapper has the network that it wraps."""

_SHAPED_LIKE_PARAMETERS = frozenset(
    {
        "Adadelta",
        "Adagrad",
        "Adam",
        "AdamW",
        "Adamax",
        "ASGD",
        "NAdam",
        "RAdam",
        "RMSprop",
        "Rprop",
        "SGD",
        "SparseAdam",
    }
)
"""Optimizers whose state tensors have the shape of their parameter, or no dimension."""

_UNKNOWN_KINDS = frozenset({None, "dict", "OrderedDict"})
"""What is recorded of a component that was given as a state, which says nothing of its class."""

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""The integer type of as many bytes as an element has."""


def capture(name: str, component: Any) -> Any:
    """The state of a component, under the names of the plain module; tensors are not copied.

    Raises:
        Invalid: if the object has no state to record.
    """
    if isinstance(component, Mapping):
        return component
    if isinstance(component, list | tuple):
        return [capture(f"{name}/{i}", part) for i, part in enumerate(component)]
    if isinstance(component, nn.Module):
        with _blaming(name, component):
            state = _plain_state(component)
        return _not_sharded(name, state)
    if isinstance(component, torch.utils.data.DataLoader) and not hasattr(component, "state_dict"):
        raise Invalid(
            f"{name}: a DataLoader does not know its position",
            "wrap it: ResumableLoader(loader) from registry",
        )
    if not callable(getattr(component, "state_dict", None)):
        raise Invalid(
            f"{name}: {type(component).__qualname__} has no state_dict()", "give plain values as extra={...}"
        )
    with _blaming(name, component):
        return component.state_dict()


def flat(components: Mapping[str, Any]) -> dict[str, Any]:
    """Components by name, with the parts of a list by their positions, such as `optimizers/0`."""
    found: dict[str, Any] = {}
    for name, component in components.items():
        if isinstance(component, list | tuple):
            found |= flat({f"{name}/{i}": part for i, part in enumerate(component)})
        else:
            found[name] = component
    return found


def kinds_of(components: Mapping[str, Any]) -> dict[str, str]:
    """The class of each component; a state in hand has none."""
    parts = flat(components)
    return {name: kind_of(part) for name, part in parts.items() if not isinstance(part, Mapping)}


def live_state(module: nn.Module) -> OrderedDict[str, Any]:
    """The state of a network under the names of the plain module, with its own parameters and buffers in it."""
    return _plain_state(module, keep_vars=True)


def kind_of(component: Any) -> str:
    """The class of a component, which is recorded to explain what does not fit later."""
    return class_of(component).__qualname__


def class_of(component: Any) -> type:
    """The class of a component, as it was before it was wrapped or sharded."""
    kind = type(plain_module(component))
    # FSDP puts a class of its own before the network's class.
    if any(base.__name__ == "FSDPModule" for base in kind.__bases__):
        return kind.__bases__[-1]
    return kind


def plain_module(component: Any) -> Any:
    """The object inside wrappers; the object itself if it is not wrapped."""
    while isinstance(component, nn.Module) and (inner := _inner(component)):
        component = getattr(component, inner)
    return component


def restore(states: Mapping[str, Any], components: Mapping[str, Any], kinds: Mapping[str, str]) -> None:
    """Put recorded states into live components: all of them, or none if one does not fit.

    Args:
        states: what `capture` gave, by component name; components other than networks may keep its tensors.
        components: live objects, or lists of them, of the same names.
        kinds: classes of the recorded components, where they are known.

    Raises:
        Incompatible: saying what differs; nothing was changed.
    """
    components, states = flat(components), _flat_states(states, components)
    states = {name: _adapted(components.get(name), state) for name, state in states.items()}
    for name, component in components.items():
        check(name, component, states[name], kind=kinds.get(name))
    undo: dict[str, Callable[[], object]] = {}
    try:
        # Networks come last: what could still fail then is only their own hooks.
        for name, component in sorted(components.items(), key=lambda item: isinstance(item[1], nn.Module)):
            undo[name] = _way_back(component)
            _put(component, states[name])
    except BaseException as error:
        stuck = []
        for changed, go_back in undo.items():
            try:
                go_back()
            except Exception:
                stuck.append(changed)
        if isinstance(error, Exception):
            others = f"all but {', '.join(stuck)} is as before" if stuck else "nothing was changed"
            what, advice = (error.message, error.fixes) if isinstance(error, RegistryError) else (error, ())
            raise Incompatible(f"{name}: {what}; {others}", *advice) from error
        raise


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The elements of a tensor in a row, as integers."""
    row = tensor.detach().cpu().resolve_conj().resolve_neg().reshape(-1)
    row = torch.view_as_real(row).reshape(-1) if row.is_complex() else row
    return row.view(_INTEGERS[row.dtype.itemsize])


def raise_problems(name: str, problems: list[str]) -> None:
    """Raise an error that names the problems of a component, if there are any.

    Raises:
        Incompatible: with the first few of them.
    """
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise Incompatible(f"{name}: {'; '.join(problems[:_SHOWN])}{more}")


def missing(name: str, reference: str, present: tuple[str, ...]) -> NotFound:
    """The error for a component that a checkpoint does not have."""
    return NotFound(f"{reference} has no component {quoted(name)}", f"it has {', '.join(present)}")


def _flat_states(states: Mapping[str, Any], components: Mapping[str, Any]) -> dict[str, Any]:
    """States under the names that `flat` gives their components.

    Raises:
        Incompatible: if a list has another length than the recorded one.
    """
    found: dict[str, Any] = {}
    for name, state in states.items():
        parts = components.get(name)
        if not isinstance(parts, list | tuple):
            found[name] = state
            continue
        if not isinstance(state, list | tuple) or len(state) != len(parts):
            held = f"a list of {len(state)}" if isinstance(state, list | tuple) else "no list"
            raise Incompatible(f"{name} is a list of {len(parts)}, the checkpoint has {held} under this name")
        found |= _flat_states(
            {f"{name}/{i}": part for i, part in enumerate(state)},
            {f"{name}/{i}": part for i, part in enumerate(parts)},
        )
    return found


@contextlib.contextmanager
def _blaming(name: str, component: Any) -> Iterator[None]:
    """Name the component whose own code fails."""
    try:
        yield
    except RegistryError:
        raise
    except Exception as error:
        kind = type(component).__qualname__
        raise Invalid(f"{name}: state_dict() of {kind} failed: {type(error).__name__}: {error}") from error


def _not_sharded(name: str, state: OrderedDict[str, Any]) -> OrderedDict[str, Any]:
    """The state of a network; one that is sharded over processes is refused."""
    if any(hasattr(value, "device_mesh") for value in state.values()):
        raise Unsupported(
            f"{name} is sharded over processes",
            "each saves its own part with "
            "dcp.save(state, storage_writer=run.sharded(...)), see docs/distributed.md",
        )
    return state


def check(name: str, component: Any, state: Any, kind: str | None) -> None:
    """See that a state fits a component, before anything is changed.

    Raises:
        Incompatible, Invalid: if it does not.
    """
    if isinstance(component, nn.Module):
        _check_module(name, component, state)
    elif isinstance(component, torch.optim.Optimizer):
        _check_optimizer(name, component, state, kind=kind)
    elif not callable(getattr(component, "load_state_dict", None)):
        raise Invalid(f"{name}: {type(component).__qualname__} has no load_state_dict()")
    elif kind not in _UNKNOWN_KINDS and kind_of(component) != kind:
        raise Incompatible(f"{name} is a {kind_of(component)}, the checkpoint has the state of a {kind}")


def _check_module(name: str, module: nn.Module, state: Any) -> None:
    """See that a state has exactly the names and shapes of a network."""
    if not isinstance(state, Mapping):
        raise Incompatible(f"{name}: the checkpoint holds no state dict of a network under this name")
    live = _plain_state(module)
    problems = [f"{key} is not in the checkpoint" for key in live if key not in state]
    problems += [f"the network has no {key}" for key in state if key not in live]
    for key, tensor in live.items():
        stored = state.get(key)
        if not isinstance(tensor, torch.Tensor) or not isinstance(stored, torch.Tensor):
            continue
        if is_lazy(tensor):
            continue
        if tensor.shape != stored.shape:
            problems.append(f"{key} has shape {list(tensor.shape)}, stored is {list(stored.shape)}")
        elif tensor.is_floating_point() != stored.is_floating_point():
            problems.append(f"{key} is {tensor.dtype}, stored is {stored.dtype}")
    raise_problems(name, problems or _torn_ties(live, state))


def _torn_ties(live: Mapping[str, Any], state: Mapping[str, Any]) -> list[str]:
    """Pairs of names that share memory in a network and have different values in a state, in words."""
    first: dict[tuple[int, tuple[int, ...], tuple[int, ...]], str] = {}
    problems = []
    for key, tensor in live.items():
        if not isinstance(tensor, torch.Tensor) or is_lazy(tensor) or tensor.is_meta or not tensor.numel():
            continue
        if tensor.layout != torch.strided or not isinstance(state.get(key), torch.Tensor):
            continue
        other = first.setdefault((tensor.data_ptr(), tuple(tensor.shape), tensor.stride()), key)
        if other != key and not torch.equal(bits(state[other]), bits(state[key])):
            problems.append(f"{other} and {key} share memory, and have different values in the checkpoint")
    return problems


def _check_optimizer(name: str, optimizer: torch.optim.Optimizer, state: Any, kind: str | None) -> None:
    """See that a state is of the same class of optimizer, over groups of the same sizes."""
    if not isinstance(state, Mapping) or not {"state", "param_groups"} <= set(state):
        raise Incompatible(f"{name}: the checkpoint holds no state of an optimizer under this name")
    if kind not in _UNKNOWN_KINDS and kind != type(optimizer).__qualname__:
        raise Incompatible(
            f"{name} is a {type(optimizer).__qualname__}, the checkpoint has the state of a {kind}"
        )
    live, stored = optimizer.param_groups, state["param_groups"]
    problems = []
    if len(live) != len(stored):
        problems.append(f"it has {len(live)} parameter groups, the checkpoint {len(stored)}")
    for i, (ours, theirs) in enumerate(zip(live, stored, strict=False)):
        if len(ours["params"]) != len(theirs["params"]):
            problems.append(
                f"group {i} has {len(ours['params'])} parameters, the checkpoint {len(theirs['params'])}"
            )
        if missing := sorted(set(ours) - set(theirs) - {"param_names"}):
            problems.append(f"group {i} has {', '.join(missing)}, which the checkpoint lacks")
    if not problems and type(optimizer).__qualname__ in _SHAPED_LIKE_PARAMETERS:
        problems += _other_shapes(optimizer, state)
    raise_problems(name, problems)


def _other_shapes(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> Iterator[str]:
    """The tensors of an optimizer's state whose shape is not that of their parameter, in words."""
    places = (place for group in state["param_groups"] for place in group["params"])
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    for place, parameter in zip(places, parameters, strict=True):
        for key, value in state["state"].get(place, {}).items():
            if isinstance(value, torch.Tensor) and value.dim() and value.shape != parameter.shape:
                yield (
                    f"{key} of parameter {place} has shape {list(value.shape)}, the parameter "
                    f"{list(parameter.shape)}"
                )


def _adapted(component: Any, state: Any) -> Any:
    """A state in the form that its component takes."""
    if isinstance(component, torch.optim.Optimizer):
        return _by_parameter(state)
    if isinstance(component, nn.Module) and isinstance(state, Mapping):
        return _with_tied_names(component, state)
    return state


def _with_tied_names(module: nn.Module, state: Mapping[str, Any]) -> Mapping[str, Any]:
    """A network's state with every name of its tied tensors; the given state may have only one of them."""
    live = live_state(module)
    lacking = [name for name in live if name not in state]
    if not lacking:
        return state
    names: dict[int, list[str]] = {}
    for name, tensor in live.items():
        names.setdefault(id(tensor), []).append(name)
    found = OrderedDict(state)
    for name in lacking:
        other = next((tied for tied in names[id(live[name])] if tied in state), None)
        if other is not None and isinstance(live[name], torch.Tensor):
            found[name] = state[other]
    if hasattr(state, "_metadata"):
        found._metadata = state._metadata  # type: ignore[attr-defined]
    return found


def _by_parameter(state: Any) -> Any:
    """An optimizer's state under the keys that its groups name; `dcp.save` has turned numbers into text."""
    if not isinstance(state, Mapping) or not isinstance(state.get("state"), Mapping):
        return state
    known = {str(key): key for group in state.get("param_groups", ()) for key in group["params"]}
    return {**state, "state": {known.get(str(key), key): value for key, value in state["state"].items()}}


def _put(component: Any, state: Any) -> None:
    """Put a state that fits into a component."""
    if isinstance(component, nn.Module):
        names = _plain_names(component, component.state_dict())
        renamed = OrderedDict((actual, state[plain]) for actual, plain in names.items() if plain in state)
        if hasattr(state, "_metadata"):
            renamed._metadata = _unfolded(component, state._metadata)  # type: ignore[attr-defined]
        component.load_state_dict(renamed)
    else:
        component.load_state_dict(state)


def _way_back(component: Any) -> Callable[[], object]:
    """A function that undoes a failed `load_state_dict`."""
    if isinstance(component, torch.optim.Optimizer):
        # Loading replaces the state and the groups' values; it does not write into the old tensors.
        state, groups = component.state, [dict(group) for group in component.param_groups]
        return lambda: component.__setstate__({"state": state, "param_groups": groups})
    if isinstance(component, nn.Module) and not _has_own_loading(component):
        return lambda: None
    before = copy.deepcopy(component.state_dict())
    return lambda: component.load_state_dict(before)


def _has_own_loading(module: nn.Module) -> bool:
    """Whether code of the user's runs while the state is loaded, and may fail after the checks."""
    return any(
        part._load_state_dict_pre_hooks
        or part._load_state_dict_post_hooks
        or type(part).load_state_dict is not nn.Module.load_state_dict
        or type(part)._load_from_state_dict is not nn.Module._load_from_state_dict
        or type(part).set_extra_state is not nn.Module.set_extra_state
        for part in module.modules()
        if not type(part).__module__.startswith("torch.")
    )


def _plain_state(module: nn.Module, *, keep_vars: bool = False) -> OrderedDict[str, Any]:
    """The state of a network, and its `_metadata`, under the names of the plain module."""
    state: OrderedDict[str, Any] = module.state_dict(keep_vars=keep_vars)  # type: ignore[assignment]
    if not any(map(_inner, module.modules())):
        return state
    names = _plain_names(module, state)
    plain = OrderedDict((names[actual], value) for actual, value in state.items())
    metadata = getattr(state, "_metadata", {})
    folded = OrderedDict((_plain_name(module, actual), value) for actual, value in metadata.items())
    plain._metadata = folded  # type: ignore[attr-defined]
    return plain


def _unfolded(module: nn.Module, metadata: Mapping[str, Any]) -> OrderedDict[str, Any]:
    """A stored state's metadata under the live module's own names."""
    paths = [name for name, _ in module.named_modules(remove_duplicate=False)]
    plain = ((path, _plain_name(module, path)) for path in paths)
    return OrderedDict((path, metadata[name]) for path, name in plain if name in metadata)


def _plain_names(module: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """The plain name of each of a network's names."""
    return {name: _plain_name(module, name) for name in names}


def _plain_name(module: nn.Module, name: str) -> str:
    """A name without the parts that wrappers put into it."""
    parts: list[str] = []
    inside: Any = module
    for part in name.split("."):
        if not (isinstance(inside, nn.Module) and part == _inner(inside)):
            parts.append(part)
        inside = inside._modules.get(part) if isinstance(inside, nn.Module) else None
    return ".".join(parts)


def _inner(module: nn.Module) -> str | None:
    """The attribute in which a wrapper has its network; None for what is no wrapper."""
    name = _INNER.get(type(module).__name__)
    return name if name in module._modules else None
