"""Observing: looks at a training from within its process, by hooks of torch, and changes nothing that it sees."""

from __future__ import annotations

import functools
import json
import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TextIO

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.data import DataLoader

from registry.live import rng
from registry.live.components import bits, plain_module
from registry.store.digest import digest, tensor_digest

_SHORT = 16
"""Hex digits of a digest that a trace keeps."""

_ROWS = 256
"""Samples of a batch that get a digest of their own."""


class Observer:
    """Writes one line of JSON for each optimizer step of this process, just before the step is made.

    A line has the digests of parameters, buffers, gradients, optimizer states, learning rates and the states of the
    random number generators, and those of the batches that have gone into a network since the step before.

    Args:
        file: where the lines go.
        kill: the number of steps after which the process is ended by SIGKILL; 0 for never.
    """

    def __init__(self, file: TextIO, kill: int) -> None:
        self._file = file
        self._kill = kill
        self._pid = os.getpid()
        self._steps = 0
        self._batches: list[dict[str, Any]] = []
        self._has_loader = False
        self._modules: dict[int, weakref.ref[nn.Module]] = {}
        self._networks: list[nn.Module] = []
        self._optimizers: list[torch.optim.Optimizer] = []
        self._calls = threading.local()
        self._unused = _generators()

    def attach(self) -> None:
        """Begin to look, for as long as the process lives."""
        nn.Module.__init__ = _followed(nn.Module.__init__, self._note_module)  # type: ignore[method-assign]
        nn.Module.__setstate__ = _followed(nn.Module.__setstate__, self._note_module)  # type: ignore[method-assign]
        DataLoader.__init__ = _followed(DataLoader.__init__, self._note_loader)  # type: ignore[method-assign]
        register_module_forward_pre_hook(self._before_call)
        register_module_forward_hook(self._after_call, with_kwargs=True, always_call=True)
        register_optimizer_step_pre_hook(self._before_step)
        register_optimizer_step_post_hook(self._after_step)

    def finish(self) -> None:
        """Write down how the training has ended."""
        self._write(end=True)
        self._file.close()

    def _note_module(self, module: nn.Module) -> None:
        key = id(module)
        # A copy is noted again where it is made by `__init__` and `__setstate__` both.
        self._modules.pop(key, None)
        self._modules[key] = weakref.ref(module, lambda _: self._modules.pop(key, None))

    def _note_loader(self, loader: DataLoader[Any]) -> None:
        self._has_loader = True

    def _before_call(self, module: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling():
            self._calls.depth = getattr(self._calls, "depth", 0) + 1

    def _after_call(self, module: nn.Module, args: tuple[Any, ...], *rest: Any) -> None:
        """Note a batch.

        Args:
            rest: the keyword arguments and the result. Where the call has failed, torch gives no keyword arguments.
        """
        if torch.compiler.is_compiling():
            return
        self._calls.depth -= 1
        is_outermost = (
            not self._calls.depth and module.training and torch.is_grad_enabled() and len(rest) == 2
        )
        # Inside a backward pass, checkpointed layers are called once more.
        if (
            is_outermost
            and torch._C._current_graph_task_id() == -1
            and any(True for _ in module.parameters())
        ):
            given = [*args, *rest[0].values()]
            rows = next((one for one in _tensors(given) if one.dim()), torch.zeros(0))
            self._batches.append({"digest": digest_of(given), "rows": list(map(digest_of, rows[:_ROWS]))})

    def _before_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, Any] | None:
        """Write a line. With a closure, which Lightning uses, the line is written behind its first call.

        Returns:
            The arguments of the step, if its closure is another one now.
        """
        if os.getpid() != self._pid:
            return None
        if all(optimizer is not one for one in self._optimizers):
            self._optimizers.append(optimizer)
        itself, *given = args
        closure = given[0] if given else kwargs.get("closure")
        if closure is None:
            self._write()
            return None
        calls = 0

        def observed() -> Any:
            nonlocal calls
            result = closure()
            calls += 1
            if calls == 1:
                self._write()
            return result

        return ((itself, observed, *given[1:]), kwargs) if given else (args, {**kwargs, "closure": observed})

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if os.getpid() == self._pid:
            self._steps += 1
            if self._steps == self._kill:
                os.kill(self._pid, signal.SIGKILL)

    def _write(self, end: bool = False) -> None:
        line = {
            "end": end,
            "loader": self._has_loader,
            "seen": dict(self._seen(with_gradients=not end)),
            "batches": self._batches,
        }
        self._batches = []
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def _seen(self, with_gradients: bool) -> Iterator[tuple[str, str]]:
        """Digests of all that training goes on with, by kind and name, such as `parameter/Net/fc.weight`."""
        self._networks = self._outermost()
        trained = {
            id(one) for made in self._optimizers for group in made.param_groups for one in group["params"]
        }
        names: dict[int, str] = {}
        for title, network in _numbered(map(plain_module, self._networks)):
            parameters = dict(network.named_parameters())
            is_trained = any(id(one) in trained for one in parameters.values())
            for name, one in parameters.items():
                names.setdefault(id(one), f"{title}/{name}")
                yield f"{'parameter' if is_trained else 'other'}/{title}/{name}", digest_of(one)
                if with_gradients and one.grad is not None:
                    yield f"gradient/{title}/{name}", digest_of(one.grad)
            for name, one in network.named_buffers():
                yield f"{'buffer' if is_trained else 'other'}/{title}/{name}", digest_of(one)
        for title, optimizer in _numbered(self._optimizers):
            yield from _of_optimizer(title, optimizer, names)
        for name, state in _generators().items():
            # One that was neither seeded nor drawn from began at random.
            if state != self._unused.get(name):
                yield f"random/{name}", state

    def _outermost(self) -> list[nn.Module]:
        """The networks that are in no other one, in the order in which they were made."""
        alive = [module for one in list(self._modules.values()) if (module := one()) is not None]
        inner = {id(child) for module in alive for child in module.children()}
        return [module for module in alive if id(module) not in inner]


def _generators() -> dict[str, str]:
    return {name: digest_of(state) for name, state in rng.capture().items()}


def digest_of(value: Any) -> str:
    """The digest of a tensor, or of all that a tree of values holds."""
    if isinstance(value, torch.Tensor):
        return _of_tensor(value)
    if isinstance(value, Mapping):
        text = ",".join(f"{key!r}:{digest_of(one)}" for key, one in value.items())
    elif isinstance(value, list | tuple):
        text = ",".join(map(digest_of, value))
    elif isinstance(value, bool | int | float | complex | str | bytes | None):
        text = repr(value)
    else:
        # The text of any other object may have its address.
        text = type(value).__qualname__
    return digest(text.encode())[:_SHORT]


def _of_tensor(tensor: torch.Tensor) -> str:
    tensor = tensor.detach()
    if hasattr(tensor, "to_local"):
        # The part of a sharded tensor that this process holds.
        tensor = tensor.to_local()
    if tensor.is_meta:
        return "meta"
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    data = bits(tensor).contiguous().numpy().data.cast("B") if tensor.numel() else b""
    return tensor_digest(str(tensor.dtype), tensor.shape, data)[:_SHORT]


def _of_optimizer(
    title: str, optimizer: torch.optim.Optimizer, names: Mapping[int, str]
) -> Iterator[tuple[str, str]]:
    for place, group in enumerate(optimizer.param_groups):
        for key, value in group.items():
            if key != "params":
                yield f"schedule/{title}/group {place}: {key}", digest_of(value)
        for number, one in enumerate(group["params"]):
            name = names.get(id(one), f"group {place}, parameter {number}")
            for key, value in optimizer.state.get(one, {}).items():
                yield f"optimizer/{title}/{name}: {key}", digest_of(value)


def _numbered(parts: Any) -> Iterator[tuple[str, Any]]:
    """Each object with its class, and from the second of a class on with its number among these."""
    counts: dict[str, int] = {}
    for part in parts:
        kind = type(part).__name__
        counts[kind] = counts.get(kind, 0) + 1
        yield f"{kind} {counts[kind]}" if counts[kind] > 1 else kind, part


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one)


def _followed(method: Callable[..., Any], note: Callable[[Any], None]) -> Callable[..., Any]:
    """A method after which its object is noted."""

    @functools.wraps(method)
    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = method(self, *args, **kwargs)
        note(self)
        return result

    return called
