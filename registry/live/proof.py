"""The proof of a freeze: digests before and after a block of code, and why a tensor moved."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from registry.live import components
from registry.live.freezing import watched_names
from registry.store.digest import tensor_digest
from registry.store.errors import Invalid, RegistryError
from registry.store.tree import Leaf


class Thawed(RegistryError):
    """Something that was frozen has changed."""


@contextlib.contextmanager
def frozen_proof(
    model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> Iterator[tuple[str, ...]]:
    """Prove that what is frozen does not move: digests before and after the block.

    Every frozen parameter is watched, and every buffer of layers that are held or have no parameter left to train.
    Buffers whose statistics go on by `bn="update"` are not.

    Args:
        optimizer: helps to name the cause.

    Yields:
        The names of the tensors that are watched.

    Raises:
        Invalid: if nothing is frozen.
        Thawed: if a tensor moved. The message names those that did, and why, as far as it can be known.
    """
    names = watched_names(model)
    if not names:
        raise Invalid("nothing is frozen", "freeze first")
    before, objects = _digests(model, names), _named(components.plain_module(model))
    yield names
    after = _digests(model, names)
    moved = [name for name in names if before[name] != after.get(name)]
    if moved:
        causes = [f"{name} ({_cause(model, optimizer, name, was=objects[name])})" for name in moved[:3]]
        more = f", and {len(moved) - 3} more" if len(moved) > 3 else ""
        raise Thawed(f"{len(moved)} of {len(names)} frozen tensors moved: {', '.join(causes)}{more}")


def _digests(model: nn.Module, names: Sequence[str]) -> dict[str, str]:
    """Digests of the tensors that are still there, by name."""
    state = _named(components.plain_module(model))
    found = {}
    for name in names:
        if name in state:
            tensor = state[name].detach()
            leaf = Leaf.of(tensor)
            found[name] = tensor_digest(leaf.dtype, leaf.shape, leaf.buffer())
    return found


def _named(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name, with every name of a tensor that has several."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def _cause(model: nn.Module, optimizer: torch.optim.Optimizer | None, name: str, was: torch.Tensor) -> str:
    """Why a tensor may have moved, as far as it can be known.

    Args:
        was: the tensor that had the name before.
    """
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
    for other, its_tensor in state.items():
        if other != name and its_tensor.data_ptr() == tensor.data_ptr() and its_tensor.requires_grad:
            return f"it shares memory with {other}, which is trainable"
    if optimizer is not None and any(
        p is tensor for group in optimizer.param_groups for p in group["params"]
    ):
        is_stale = tensor.grad is not None
        return "it is in the optimizer, with a stale gradient" if is_stale else "it is in the optimizer"
    return "something wrote to it"
