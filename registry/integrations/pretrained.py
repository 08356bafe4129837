"""Networks of transformers: the builder `transformers`, which makes one again by its class and configuration.

    net = registry.build("bert@best")

A network of transformers that a run saves is recorded so, and so is one that was imported from a hub's folder. Only
transformers' own classes are made; nothing is downloaded, and code beside the parameters is not run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from registry.integrations import check_release
from registry.live.builders import register_model
from registry.store.errors import Incompatible, Invalid, Unsupported
from registry.store.text import quoted

check_release("transformers")

import transformers  # noqa: E402
from huggingface_hub.errors import StrictDataclassError  # noqa: E402
from transformers.core_model_loading import revert_weight_conversion  # noqa: E402


def _load(network: nn.Module, state: Mapping[str, torch.Tensor]) -> nn.Module:
    """A network with a stored state, under the names of the live network or those that `save_pretrained` writes.

    Raises:
        Incompatible: if something is missing, has another shape, or is unknown.
        Unsupported: if the parameters have several dtypes of floating point.
    """
    dtypes = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    if len(dtypes) > 1:
        raise Unsupported(
            f"its parameters have the dtypes {', '.join(sorted(map(str, dtypes)))}",
            "build the network yourself, then restore it",
        )
    kind: Any = type(network)
    loaded, found = kind.from_pretrained(
        None,
        config=network.config,
        state_dict=dict(state),
        dtype=next(iter(dtypes), torch.float32),
        output_loading_info=True,
    )
    wrong = {
        "are missing": found["missing_keys"],
        "have another shape": {str(one[0]) for one in found["mismatched_keys"]},
        "are not the network's": found["unexpected_keys"],
    }
    for what, names in wrong.items():
        if names:
            listed = ", ".join(quoted(name) for name in sorted(names)[:3])
            raise Incompatible(f"{len(names)} parameters of {kind.__name__} {what}: {listed}")
    return loaded  # type: ignore[no-any-return]


def _on_disk(network: nn.Module, state: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """A state of the live network under the names that `save_pretrained` writes.

    Raises:
        Incompatible: if the state is not that of the network.
    """
    unknown = next((name for name in state if name not in network.state_dict()), None)
    if unknown is not None:
        raise Incompatible(f"{type(network).__name__} has no {quoted(unknown)}")
    converted: Mapping[str, torch.Tensor] = revert_weight_conversion(cast(Any, network), dict(state))
    return converted


@register_model("transformers", load=_load, on_disk=_on_disk)
def build(**recorded: Any) -> nn.Module:
    """A network of transformers with new parameters.

    Args:
        recorded: `class`, the name of one of transformers' own classes, and `config`, its configuration as plain values.

    Raises:
        Invalid: if transformers has no such network, or its configuration does not fit.
        Unsupported: if the network is quantized.
    """
    name, config = recorded.get("class"), recorded.get("config")
    kind = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
    if (
        not isinstance(kind, type)
        or not issubclass(kind, transformers.PreTrainedModel)
        or not kind.__module__.startswith("transformers.models.")
    ):
        raise Invalid(
            f"transformers {transformers.__version__} has no network {quoted(str(name))} of its own"
        )
    if not isinstance(config, Mapping):
        raise Invalid(f"the configuration of {kind.__name__} is not recorded")
    if config.get("quantization_config"):
        raise Unsupported(f"{kind.__name__} is quantized", "open an exported folder with from_pretrained")
    try:
        made: nn.Module = kind(cast(Any, kind).config_class.from_dict(_harmless(config)))
    except (StrictDataclassError, TypeError, ValueError, AttributeError, KeyError) as error:
        raise Invalid(f"{kind.__name__} cannot take this configuration: {quoted(str(error))}") from None
    return made


def _harmless(value: Any) -> Any:
    """A configuration without what would fetch code or parameters, such as an implementation from a hub."""
    if isinstance(value, Mapping):
        return {
            key: False if key == "use_pretrained_backbone" else _harmless(item)
            for key, item in value.items()
            if key != "auto_map" and not key.endswith(("_implementation", "_implementation_internal"))
        }
    return [_harmless(item) for item in value] if isinstance(value, list) else value
