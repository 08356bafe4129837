"""Optimizers of a network that is frozen in part: what they hold, their groups, and their state under other groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from registry.live import components
from registry.patterns import fits, meant, unused
from registry.store.errors import Incompatible, Invalid
from registry.store.text import quoted


class OptimizerProblem(NamedTuple):
    """A parameter that an optimizer should not have, or lacks.

    Attributes:
        problem: `frozen`, it cannot train; `missing`, it trains and the optimizer lacks it; `stale`, the network does
            not have it; `duplicated`, the optimizer has it twice.
        name: of the parameter; for a stale one its place and its shape.
    """

    problem: Literal["frozen", "missing", "stale", "duplicated"]
    name: str


def check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[OptimizerProblem]:
    """Compare an optimizer with the parameters of a network that train. They are told apart by identity, not by value.

    Returns:
        The problems, in the order of the optimizer, and then what it lacks, in the order of the network. An empty list
        means that the optimizer has exactly the trainable parameters.
    """
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
        layer_decay: each of the network's top-level blocks has the learning rate of the next one times this.

    Returns:
        Groups with `params`, `lr`, `weight_decay` and `param_names`.

    Raises:
        Invalid: if nothing is trainable, or a pattern matches nothing.
    """
    plain: nn.Module = components.plain_module(model)
    trainable = {name: p for name, p in plain.named_parameters() if p.requires_grad}
    if not trainable:
        raise Invalid("no parameter is trainable", "unfreeze some first")
    for pattern in rates or {}:
        if not any(fits(name, pattern) for name in trainable):
            what = f"rates: the pattern {quoted(pattern)}, among what is trainable,"
            raise unused(what, pattern, trainable)
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
