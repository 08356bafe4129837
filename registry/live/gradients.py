"""Gradients: what a window of accumulated gradients has added up, as a component."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from registry.live.components import live_state, raise_problems


class Gradients:
    """The `.grad` of a network's parameters, to be saved with it inside a window of accumulated gradients.

        run.save(model=model, optimizer=optimizer, gradients=Gradients(model), step=step)

    Between two windows no parameter has a gradient, and this takes no room. Parameters are called by their names in the
    plain network, without those that wrappers add. Restoring sets the gradients of parameters that had none to None.

    Args:
        model: the network, wrapped or not.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The gradients by the name of their parameter, each with its shape and dtype."""
        return {name: one.grad for name, one in self._parameters().items() if one.grad is not None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set the gradients; nothing is changed if one does not fit.

        Raises:
            Incompatible: naming the parameters that are not there or have another shape.
        """
        parameters = self._parameters()
        problems = [f"the network has no parameter {name}" for name in state if name not in parameters]
        for name, grad in state.items():
            if name in parameters and grad.shape != parameters[name].shape:
                problems.append(
                    f"{name} has shape {list(parameters[name].shape)}, its gradient {list(grad.shape)}"
                )
        raise_problems("gradients", problems)
        for name, parameter in parameters.items():
            grad = state.get(name)
            parameter.grad = None if grad is None else grad.to(parameter.device, parameter.dtype, copy=True)

    def _parameters(self) -> dict[str, nn.Parameter]:
        """The parameters by name; tied ones, which have one gradient, by their first name."""
        found: dict[int, tuple[str, nn.Parameter]] = {}
        for name, one in live_state(self._model).items():
            if isinstance(one, nn.Parameter):
                found.setdefault(id(one), (name, one))
        return dict(found.values())
