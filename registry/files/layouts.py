"""Layouts: where the parts of a checkpoint lie in the dict that a training program saved.

`split` takes such a dict apart into components and remembers how, `join` puts the same dict together again. `tree_of`
gives the dict of a checkpoint.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from registry.files.imported import values
from registry.log.metrics import is_metric
from registry.store.errors import Corrupt, naming
from registry.store.text import quoted

if TYPE_CHECKING:
    from registry.checkpoints.checkpoint import Checkpoint

COMPONENT_KEYS = {
    "model": ("model_state_dict", "state_dict", "model", "net", "weights"),
    "optimizer": ("optimizer_state_dict", "optimizer", "optim", "optimizer_states"),
    "scheduler": (
        "scheduler_state_dict",
        "lr_scheduler_state_dict",
        "scheduler",
        "lr_scheduler",
        "lr_schedulers",
    ),
    "scaler": ("scaler_state_dict", "scaler"),
    "ema": ("ema_state_dict", "model_ema", "ema", "state_dict_ema"),
    "rng": ("rng",),
}
"""Keys of a checkpoint dict that hold a component, the likeliest first."""

FIELD_KEYS = {
    "epoch": ("epoch",),
    "step": ("step", "global_step", "iteration"),
    "loss": ("loss", "val_loss", "train_loss"),
}
"""Keys of a checkpoint dict that hold a field of a version, the likeliest first."""

_CONFIG_KEYS = ("config", "hyper_parameters", "hparams", "args")

_WITH_LAYOUT = ("torch", "torch.distributed")
"""Formats whose layout is recorded when they are imported."""

LIGHTNING = "lightning"
"""The component in which a version that Lightning saved has the rest of its checkpoint dict."""

LIGHTNING_LISTS = {"optimizer_states": "optimizer", "lr_schedulers": "scheduler"}
"""Lists in a checkpoint dict of Lightning, and what one of their items is called as a component."""

_MAX_KEYS = 256
"""Keys of the largest dict that is taken apart into components."""

MAX_CONFIG = 4 << 20
"""Bytes of the largest configuration that is taken in."""


def split(tree: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Components of a loaded `.pt` file, and the layout from which `join` puts it together again.

    The layout is `{"whole": "model"}`, or `{"type": "dict", "keys": [...]}` with one entry for each key in
    order: `[key, component]` for a component, `[key, "extra"]` for a part of `extra`, `[key, None, number]`
    for a plain number that is recorded as a field. Where the only part is itself a dict called `extra`, as in a file that
    we exported, it is the component, and the layout has `"whole_extra": true`.
    """
    places = _places(tree)
    if not places:
        return {"model": tree}, {"whole": "model"}
    components = {component: tree[key] for key, component in places.items()}
    numbers = {key for keys in FIELD_KEYS.values() for key in keys}
    extra: dict[Any, Any] = {}
    keys: list[list[Any]] = []
    for key, value in tree.items():
        if key in places:
            keys.append([key, places[key]])
        elif key in numbers and type(value) in (int, float) and math.isfinite(value) and abs(value) < 1 << 63:
            keys.append([key, None, value])
        else:
            extra[key] = value
            keys.append([key, "extra"])
    layout = {"type": type(tree).__name__, "keys": keys}
    if set(extra) == {"extra"} and isinstance(extra["extra"], dict):
        return components | extra, layout | {"whole_extra": True}
    return components | ({"extra": extra} if extra else {}), layout


def join(layout: Any, components: Mapping[str, Any], *, is_thin: bool = False) -> Any:
    """The tree that `split` took apart.

    Args:
        is_thin: leave out components that the checkpoint no longer has.

    Raises:
        Corrupt: if the layout does not fit the components.
    """
    try:
        if set(layout) == {"whole"}:
            return components[layout["whole"]]
        tree: dict[Any, Any] = {"dict": dict, "OrderedDict": OrderedDict}[layout["type"]]()
        has_parts = not layout.get("whole_extra")
        for key, component, *number in layout["keys"]:
            if number:
                tree[key] = number[0]
            elif component in components or not is_thin:
                tree[key] = (
                    components["extra"][key] if component == "extra" and has_parts else components[component]
                )
        return tree
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Corrupt(f"the recorded layout does not fit the components ({quoted(str(error))})") from None


def lightning_tree(components: Mapping[str, Any]) -> dict[str, Any]:
    """The checkpoint dict of Lightning, from the components of a version that it saved.

    The states of optimizers and schedulers are left out if some are lost, as by thinning.
    """
    found = {**components[LIGHTNING], "state_dict": components["model"]}
    for key, name in LIGHTNING_LISTS.items():
        states = [components[name]] if name in components else list(components.get(f"{name}s", ()))
        # How many there were.
        if found.pop(name) == len(states):
            found[key] = states
    return found


def tree_of(checkpoint: Checkpoint, component: str | None = None, *, verify: bool = True) -> Any:
    """The tree that a file of a checkpoint holds.

    A checkpoint that was imported from a file of `torch.save` or a folder of `dcp.save` has the layout of that, and one that Lightning saved has
    that of its files, which `load_from_checkpoint` reads. Another one is a dict of its components and of `epoch`, `step`,
    `loss`, `metrics` and `config` where they are recorded.

    Args:
        component: the tree of this component alone.
        verify: check the digests of what is read.

    Raises:
        NotFound: if there is no such component.
        Corrupt: if a stored byte is not what was saved, or the recorded layout does not fit.
    """
    if component is not None:
        return checkpoint.state_dict(component, verify=verify)
    components = checkpoint.load(verify=verify)
    source = checkpoint.record.get("source") or {}
    if source.get("format") in _WITH_LAYOUT and "layout" in source:
        with naming(checkpoint.name):
            return join(source["layout"], components, is_thin="thinned-from" in checkpoint.record)
    if "pytorch-lightning_version" in components.get(LIGHTNING, {}):
        return lightning_tree(components)
    metrics = {key: math.nan if value is None else value for key, value in checkpoint.metrics.items()}
    fields = {"epoch": checkpoint.epoch, "step": checkpoint.step, "loss": _loss(checkpoint)}
    recorded = {**fields, "metrics": metrics or None, "config": checkpoint.config or None}
    missing = {key for key, value in recorded.items() if value is not None} - set(components)
    return {**components, **{key: recorded[key] for key in recorded if key in missing}}


def fields_of(tree: Any) -> dict[str, Any]:
    """What a loaded dict says of itself: epoch, step, loss, metrics and config, by the names of `Registry.save`.

    A field that it lacks is None. For anything but a dict, and for a dict of tensors alone, the result is empty.
    """
    if type(tree) not in (dict, OrderedDict) or all(isinstance(v, torch.Tensor) for v in tree.values()):
        return {}
    fields: dict[str, Any] = {}
    for name, keys in FIELD_KEYS.items():
        numbers = (_number(tree.get(key)) for key in keys)
        found = next((n for n in numbers if n is not None and (name == "loss" or _is_count(n))), None)
        fields[name] = found if found is None or name == "loss" else int(found)
    metrics = tree.get("metrics")
    if network_of_timm(tree):
        # The training script of timm keeps the one that decides which checkpoint is the best.
        metrics = {str(tree["args"].get("eval_metric", "metric")): tree.get("metric")}
    if isinstance(metrics, Mapping):
        measured = {key: _number(value) for key, value in metrics.items() if is_metric(key)}
        fields["metrics"] = {key: float(value) for key, value in measured.items() if value is not None}
    fields["config"] = next((tree[key] for key in _CONFIG_KEYS if is_config(tree.get(key))), None)
    return fields


def network_of_timm(tree: Any) -> dict[str, Any]:
    """How the network is made again whose checkpoint the training script of timm wrote: `builder` and `network`.

    Empty for any other tree.
    """
    if (
        type(tree) is not dict
        or not isinstance(tree.get("arch"), str)
        or type(tree.get("version")) is not int
    ):
        return {}
    args = tree.get("args")
    if not isinstance(args, dict) or not isinstance(args.get("model"), str):
        return {}
    given = {
        "in_chans": args.get("in_chans"),
        "img_size": args.get("img_size"),
        "global_pool": args.get("gp"),
    }
    further = args.get("model_kwargs")
    network = {
        "architecture": args["model"],
        "num_classes": args.get("num_classes"),
        "model_args": {key: value for key, value in given.items() if value is not None}
        | (further if isinstance(further, dict) else {}),
    }
    return {"builder": "timm", "network": network} if is_config(network) else {}


def is_config(value: Any) -> bool:
    """Whether a value can stand in a record: plain values and string keys, no larger than a config file."""
    if type(value) is not dict or not value:
        return False
    cost = 0
    for part in values(value):
        kind = type(part)
        if part is not None and kind not in (bool, int, float, str, list, tuple, dict):
            return False
        if kind is dict and not all(type(key) is str and key[:1] != "$" for key in part):
            return False
        cost += len(part) if kind is str else 8
        if cost > MAX_CONFIG:
            return False
    return True


def _loss(checkpoint: Checkpoint) -> float | None:
    return math.nan if checkpoint.record.get("loss_is_nan") else checkpoint.loss


def _places(tree: Any) -> dict[str, str]:
    """The component of each top-level key that holds one; none if the tree is no container of components."""
    if type(tree) not in (dict, OrderedDict) or not 0 < len(tree) <= _MAX_KEYS:
        return {}
    if vars(tree) if type(tree) is OrderedDict else False:
        # Attributes are the _metadata of a state dict.
        return {}
    if not all(type(key) in (str, int) for key in tree) or all(
        isinstance(v, torch.Tensor) for v in tree.values()
    ):
        return {}
    places = {}
    for component, keys in COMPONENT_KEYS.items():
        kinds = Mapping if component == "model" else (Mapping, list)
        found = next((key for key in keys if isinstance(tree.get(key), kinds)), None)
        if found is not None:
            places[found] = component
    return places


def _number(value: Any) -> int | float | None:
    if isinstance(value, torch.Tensor) and value.ndim == 0:
        plain = value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized
        value = value.item() if plain and not value.is_complex() else None
    if type(value) is int:
        return value if abs(value) < 1 << 63 else None
    return value if type(value) is float else None


def _is_count(number: float) -> bool:
    return 0 <= number < 1 << 63 and number == int(number) if math.isfinite(number) else False
