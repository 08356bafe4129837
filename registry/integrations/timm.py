"""timm: the builder `timm`, which makes a network again by its architecture and the arguments that it was made with.

    net = registry.build("resnet18-mine@best")

A network of timm that a run saves is recorded so, and so is one that was imported from timm's own checkpoints and
folders. `registry export resnet18-mine@best out/` writes a folder for `timm.create_model("local-dir:out",
pretrained=True)`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import nn

from registry.integrations import check_release
from registry.live.builders import register_model
from registry.store.errors import Invalid
from registry.store.text import quoted

check_release("timm")

import timm  # noqa: E402
from timm.models import PretrainedCfg  # noqa: E402

_OWN = frozenset(
    (
        *(
            "pretrained",
            "pretrained_cfg",
            "pretrained_cfg_overlay",
            "checkpoint_path",
            "cache_dir",
            "scriptable",
        ),
        *("exportable", "no_jit", "device", "dtype", "model_name", "pretrained_model_args"),
    )
)
"""Arguments of `timm.create_model` that are not the network's."""

_FIELDS = frozenset(field.name for field in dataclasses.fields(PretrainedCfg))


@register_model("timm")
def build(
    architecture: str,
    num_classes: int | None = None,
    global_pool: str | None = None,
    model_args: Mapping[str, Any] | None = None,
    pretrained_cfg: Mapping[str, Any] | None = None,
) -> nn.Module:
    """A network of timm with new parameters; nothing is downloaded.

    Args:
        architecture: a name that timm knows, such as `resnet18`.
        num_classes, global_pool, model_args: further arguments of `timm.create_model`.
        pretrained_cfg: what timm keeps of how the network was trained, such as `mean` and `std`.

    Raises:
        Invalid: if timm has no such architecture, or an argument is none of the network's.
    """
    if not isinstance(architecture, str) or not timm.is_model(architecture):
        raise Invalid(f"timm {timm.__version__} has no architecture {quoted(str(architecture))}")
    given = {"global_pool": global_pool, **(model_args or {})}
    if num_classes is not None:
        given["num_classes"] = num_classes
    if wrong := sorted(_OWN & given.keys()):
        raise Invalid(f"{quoted(wrong[0])} is not an argument of a network of timm")
    about = {key: _as_tuple(value) for key, value in (pretrained_cfg or {}).items() if key in _FIELDS}
    given = {key: _as_tuple(value) for key, value in given.items() if value is not None}
    made: nn.Module = timm.create_model(architecture, pretrained=False, pretrained_cfg=about or None, **given)
    return made


def _as_tuple(value: Any) -> Any:
    """A size as timm has it; JSON has lists."""
    return tuple(value) if isinstance(value, list) else value
