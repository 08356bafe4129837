"""PEFT: an adapter as a component, with the base network that it belongs to.

    from registry.integrations.peft import adapter

    with registry.run("base") as run:  # once, before get_peft_model
        base = run.save(model=network)
    run.save(adapter=adapter(model, base=base), optimizer=optimizer, step=step)
    checkpoint.restore(adapter=adapter(model), optimizer=optimizer)

A version holds the adapter's parameters alone, under the names that PEFT gives them in a file. The digest of the base network
is recorded with them. `restore` refuses an adapter over another base.
"""

from __future__ import annotations

import logging
import os
import weakref
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from registry.checkpoints.building import under_names_on_disk
from registry.checkpoints.checkpoint import Checkpoint
from registry.configs.plain import lenient_table
from registry.integrations import check_release
from registry.live.components import plain_module, raise_problems
from registry.store.digest import digest, tensor_digest
from registry.store.errors import Incompatible, Invalid, Unsupported
from registry.store.text import quoted
from registry.store.tree import Leaf

check_release("peft")

from peft import (  # noqa: E402
    PeftModel,
    get_base_model_state_dict,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)

_logger = logging.getLogger(__name__)

_bases: weakref.WeakKeyDictionary[nn.Module, tuple[Any, str]] = weakref.WeakKeyDictionary()
"""The digest of each base network, with what would tell that its parameters were changed since."""


class Adapter:
    """An adapter in a `PeftModel`, as a component; made by `adapter`."""

    def __init__(self, model: Any, name: str, base: Checkpoint | None) -> None:
        self._model = model
        self._name = name
        self._base = base

    @property
    def adapter_of(self) -> str:
        """The id of the base network's version if it was given, else the digest of its parameters."""
        return self._base.id if self._base is not None else base_digest(self._model)

    def state_dict(self) -> OrderedDict[str, Any]:
        """The adapter's parameters by the names that PEFT gives them in a file; its configuration is in `_metadata`.

        Raises:
            Unsupported: if parameters of the base are trained, which no adapter holds.
        """
        _refuse_trained(self._model)
        state = self._parameters()
        config, _ = lenient_table(self._model.peft_config[self._name].to_dict())
        if os.path.isabs(str(config.get("base_model_name_or_path"))):
            config["base_model_name_or_path"] = os.path.basename(config["base_model_name_or_path"])
        name = self._base.name if self._base is not None else config.get("base_model_name_or_path")
        about = {"config": config, "base": base_digest(self._model), "base_name": name or None}
        state._metadata = OrderedDict({"": about})  # type: ignore[attr-defined]
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load an adapter that was trained over the same base.

        Raises:
            Incompatible: if the base is another one, or the adapter has other parameters; nothing was changed.
        """
        self.check_base(state)
        live = self._parameters()
        problems = [f"{name} is not in the checkpoint" for name in live if name not in state]
        problems += [f"the adapter has no {name}" for name in state if name not in live]
        problems += [
            f"{name} has shape {list(tensor.shape)}, stored is {list(state[name].shape)}"
            for name, tensor in live.items()
            if name in state and state[name].shape != tensor.shape
        ]
        raise_problems(f"adapter {quoted(self._name)}", problems)
        before = {name: tensor.clone() for name, tensor in live.items()}
        set_peft_model_state_dict(self._model, dict(state), adapter_name=self._name)
        # PEFT passes over what it does not know, without a word.
        after = self._parameters()
        lost = [name for name, tensor in after.items() if not torch.equal(tensor.cpu(), state[name].cpu())]
        if lost:
            set_peft_model_state_dict(self._model, before, adapter_name=self._name)
            raise_problems(f"adapter {quoted(self._name)}", [f"PEFT does not load {name}" for name in lost])

    def check_base(self, state: Mapping[str, Any]) -> None:
        """See that a recorded adapter was trained over this base network.

        Raises:
            Incompatible: naming the recorded base.
        """
        about = getattr(state, "_metadata", {}).get("", {})
        if "base" not in about:
            _logger.warning("the checkpoint does not say over which base the adapter was trained")
            return
        present = base_digest(self._model)
        if about["base"] != present:
            name = about.get("base_name") or "another base network"
            raise Incompatible(
                f"the adapter was trained over {name} (parameters {about['base'][:12]}), and the base network here is another "
                f"one ({present[:12]})",
                "load that base first",
            )

    def _parameters(self) -> OrderedDict[str, torch.Tensor]:
        # The base is known by its digest, so its embeddings need not be here; and to look for them, PEFT would go online.
        found = get_peft_model_state_dict(self._model, adapter_name=self._name, save_embedding_layers=False)
        return OrderedDict(sorted(found.items()))


def adapter(model: nn.Module, name: str | None = None, *, base: Checkpoint | None = None) -> Adapter:
    """An adapter of a network as a component of a version.

        run.save(adapter=adapter(model), optimizer=optimizer, step=step)
        checkpoint.restore(adapter=adapter(model), optimizer=optimizer)

    Args:
        model: what `get_peft_model` or `PeftModel.from_pretrained` returned, wrapped or not.
        name: the adapter's name; by default the one that is active.
        base: the version of the base network, to which the lineage leads as `adapter-of`. Without it the lineage has the
            digest of the base's parameters.

    Raises:
        Invalid: if the network has no such adapter, several are active and none is named, or `base` is no version.
        Incompatible: if the base network has not the parameters of `base`, naming the first that differ.
    """
    model = plain_module(model)
    if not isinstance(model, PeftModel):
        raise Invalid(
            f"{type(model).__qualname__} is no PeftModel", "give what get_peft_model(network, config) returns"
        )
    if name is None:
        name, *others = model.active_adapters
        if others:
            raise Invalid(f"several adapters are active: {', '.join([name, *others])}", "name one of them")
    if name not in model.peft_config:
        raise Invalid(f"there is no adapter {quoted(name)}", f"there are {', '.join(model.peft_config)}")
    if base is not None:
        if not isinstance(base, Checkpoint):
            raise Invalid(f"base is {quoted(str(base))}, expected a version: base=registry['base']")
        _check_version(model, base)
    return Adapter(model, name, base)


def base_digest(model: nn.Module) -> str:
    """The digest of the parameters of the network under the adapters: of their names, dtypes, shapes and values.

    They are hashed again if they may have been changed since the last time.
    """
    parameters = _base_parameters(model)
    seen = [(name, tensor.data_ptr(), tensor._version) for name, tensor in parameters.items()]
    if model not in _bases or _bases[model][0] != seen:
        lines = [f"{name} {_digest_of(tensor)}" for name, tensor in sorted(parameters.items())]
        _bases[model] = seen, digest("\n".join(lines).encode())
    return _bases[model][1]


def _base_parameters(model: Any) -> dict[str, torch.Tensor]:
    """The parameters of the base by their own names, without biases that the adapter holds."""
    places = {parameter.data_ptr() for parameter in model.parameters()}
    has_biases = any(getattr(config, "bias", "none") != "none" for config in model.peft_config.values())
    return {
        name: tensor
        for name, tensor in get_base_model_state_dict(model).items()
        if isinstance(tensor, torch.Tensor)
        and tensor.data_ptr() in places
        and not (has_biases and name.endswith("bias"))
    }


def _refuse_trained(model: nn.Module) -> None:
    trained = {parameter.data_ptr() for parameter in model.parameters() if parameter.requires_grad}
    for name, tensor in _base_parameters(model).items():
        if tensor.data_ptr() in trained:
            raise Unsupported(
                f"{name} of the base network is trained, and an adapter does not hold it",
                "name its layer in modules_to_save, or save the whole network as model=model",
            )


def _check_version(model: nn.Module, base: Checkpoint) -> None:
    """See that the base network has the parameters of a version."""
    recorded = {
        name.removeprefix("model/"): found
        for name, _, _, found in base.parameters()
        if name.startswith("model/")
    }
    parameters: Mapping[str, torch.Tensor] = _base_parameters(model)
    if "source" in base.record:
        # A file may have other names than the network.
        parameters = under_names_on_disk(base, parameters)
    # A file holds tied parameters once.
    held = {tensor.data_ptr() for name, tensor in parameters.items() if name in recorded}
    problems = []
    for name, tensor in parameters.items():
        if name not in recorded and tensor.data_ptr() in held:
            continue
        if name not in recorded:
            problems.append(f"{base.name} has no {name}")
        elif recorded[name] != _digest_of(tensor):
            problems.append(f"{name} is not that of {base.name}")
    raise_problems("the base network", problems)


def _digest_of(tensor: torch.Tensor) -> str:
    leaf = Leaf.of(tensor)
    return tensor_digest(leaf.dtype, leaf.shape, leaf.buffer())
