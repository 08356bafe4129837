"""Layers of a network: the order of their names, their own buffers, and whose parameters decide about those.

A path leads to a layer from the network, as in `nn.Module.get_submodule`; it is empty for the network itself.
"""

from __future__ import annotations

from torch import nn


def in_order(model: nn.Module) -> list[str]:
    """Names of the parameters, and of the buffers of layers without parameters, in the order of the layers."""
    found = []
    for path, part in model.named_modules(remove_duplicate=False):
        own = [name for name, _ in part.named_parameters(recurse=False)]
        if not own and owner_of(model, path)[1] is not part and ".parametrizations." not in f".{path}":
            own = [name for name, _ in part.named_buffers(recurse=False)]
        found += [joined(path, name) for name in own]
    return found


def layer_of(name: str) -> str:
    """The path of the layer that a parameter belongs to; a parametrized layer counts as one."""
    layer, is_parametrized, _ = name.partition(".parametrizations.")
    return layer if is_parametrized else name.rpartition(".")[0]


def owner_of(model: nn.Module, path: str) -> tuple[str, nn.Module]:
    """The layer whose parameters decide about the buffers of a layer, and its path.

    It is the layer itself, or the next above it that has parameters, as for a parametrization.
    """
    part = model.get_submodule(path)
    while path and next(part.parameters(), None) is None:
        path = path.rpartition(".")[0]
        part = model.get_submodule(path)
    return path, part


def is_frozen(part: nn.Module) -> bool:
    """Whether nothing in a layer is left to train; true for a layer without parameters."""
    return not any(parameter.requires_grad for parameter in part.parameters())


def buffers_of(model: nn.Module, path: str) -> list[str]:
    """Names of a layer's own buffers, without those that no state dict has."""
    part = model.get_submodule(path)
    left_out = part._non_persistent_buffers_set
    return [joined(path, name) for name, _ in part.named_buffers(recurse=False) if name not in left_out]


def joined(path: str, name: str) -> str:
    """A name below a path, which is empty for the network itself."""
    return f"{path}.{name}" if path else name
