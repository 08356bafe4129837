"""Classifiers of torchvision as starting points: replace their heads, read their pretrained weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from registry import Registry
from registry.checkpoints.checkpoint import Checkpoint
from registry.files.reading import read_checkpoint_file
from registry.store.digest import digest
from registry.store.errors import Incompatible, Invalid, NotFound
from registry.store.text import quoted
from registry.transfer.sources import torchvision_name

_AUXILIARY = "aux_classifier"
"""The name of the auxiliary head of torchvision's networks for segmentation."""


def find_head(model: nn.Module) -> str:
    """The name of a classifier's last layer, which is the last `Linear` or `Conv2d` of the network.

    Raises:
        Invalid: if the network has no such layer.
    """
    found: list[str] = [
        name
        for name, part in model.named_modules()
        if isinstance(part, nn.Linear | nn.Conv2d) and not name.startswith(f"{_AUXILIARY}.")
    ]
    if not found:
        raise Invalid(f"{type(model).__qualname__} has no Linear or Conv2d as its head", "name the head")
    return found[-1]


def replace_head(model: nn.Module, classes: int, name: str | None = None) -> str:
    """Give a classifier a new last layer for another number of classes. Returns the name of the layer.

    GoogLeNet, Inception v3 and the networks for segmentation have auxiliary heads, which are trained beside the last
    layer. These are replaced too, unless `name` is another layer than the last.

    Args:
        classes: the number of rows of the new layer.
        name: the layer to replace; by default the last `Linear` or `Conv2d`.

    Raises:
        NotFound: if there is no layer of that name.
        Invalid: if the layer is neither `Linear` nor `Conv2d`, or its groups do not divide the classes.
    """
    heads = _auxiliary_heads(model)
    if heads and name not in (None, find_head(model)):
        # Only the named layer is replaced.
        heads = []
    name = name or find_head(model)
    try:
        old = model.get_submodule(name)
    except AttributeError:
        raise NotFound(f"{type(model).__qualname__} has no layer {quoted(name)}") from None
    new: nn.Module
    if isinstance(old, nn.Linear):
        new = nn.Linear(old.in_features, classes, bias=old.bias is not None)
    elif isinstance(old, nn.Conv2d):
        if classes % old.groups:
            raise Invalid(f"{name} has {old.groups} groups, into which {classes} classes cannot be divided")
        new = nn.Conv2d(
            old.in_channels,
            classes,
            kernel_size=old.kernel_size,  # type: ignore[arg-type]
            stride=old.stride,  # type: ignore[arg-type]
            padding=old.padding,  # type: ignore[arg-type]
            dilation=old.dilation,  # type: ignore[arg-type]
            groups=old.groups,
            bias=old.bias is not None,
            padding_mode=old.padding_mode,
        )
    else:
        raise Invalid(f"{name} is a {type(old).__name__}; a head is a Linear or a Conv2d")
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)
    for part in heads:
        replace_head(part, classes)
    return name


def _auxiliary_heads(model: nn.Module) -> list[nn.Module]:
    """The auxiliary heads of torchvision's networks.

    GoogLeNet has `aux1` and `aux2`, Inception v3 has `AuxLogits`, and the networks for segmentation have
    `aux_classifier`.
    """
    parts = (getattr(model, name, None) for name in ("aux1", "aux2", "AuxLogits"))
    found = [part for part in parts if isinstance(part, nn.Module) and type(part).__name__ == "InceptionAux"]
    for_segmentation = getattr(model, _AUXILIARY, None)
    if isinstance(for_segmentation, nn.Module) and isinstance(getattr(model, "classifier", None), nn.Module):
        found.append(for_segmentation)
    return found


def import_torchvision(
    registry: Registry,
    source: str,
    name: str,
    *,
    weights: str | None = None,
    file: Path | None = None,
    seed: int | None = None,
) -> Checkpoint:
    """Store a network of torchvision as a new version. Exactly one of `weights`, `file` and `seed` is given.

    Args:
        source: `torchvision:NAME`.
        name: the model that gets the version.
        weights: the name of pretrained weights, such as `IMAGENET1K_V1`. Torchvision downloads them.
        file: a file of pretrained weights.
        seed: the seed of random parameters.

    Raises:
        NotFound: if there is no such network or no such weights, or if they cannot be downloaded. The message then
            says which file to fetch.
        Invalid: if not exactly one of `weights`, `file` and `seed` is given.
        Incompatible: if the file does not fit the network.
    """
    # Lazy: loads torchvision.
    import torchvision

    kind = torchvision_name(source)
    if sum(given is not None for given in (weights, file, seed)) != 1:
        raise Invalid(f"say how to fill {kind}: --weights NAME, --file FILE, or --random SEED")
    meta: dict[str, Any] = {"network": source}
    if seed is not None:
        torch.manual_seed(seed)
    model = torchvision.models.get_model(kind, weights=None)
    parent = f"{source} random, seed {seed}"
    if file is not None:
        state = read_checkpoint_file(file).components.get("model", {})
        parent = f"{file.name} {digest(file.read_bytes())[:12]}"
        _fill(model, state, what=file.name, kind=kind)
    if weights is not None:
        entry = _weights(kind, weights)
        _fill(model, _downloaded(entry, kind), what=weights, kind=kind)
        known = {
            key: value
            for key, value in entry.meta.items()
            if isinstance(value, str | int | float | list | dict)
        }
        meta |= {"weights": str(entry), "transforms": repr(entry.transforms()), "about": _plain(known)}
        parent = str(entry)
    return registry.save(
        name,
        {"model": model.state_dict()},
        meta=meta,
        lineage=[{"kind": "imported-from", "parent": parent}],
        provenance={"buffers": {"model": [buffer for buffer, _ in model.named_buffers()]}},
    )


def _weights(kind: str, name: str) -> Any:
    """The pretrained weights of that name, as torchvision lists them.

    Raises:
        NotFound: if there are none of that name.
    """
    # Lazy: loads torchvision.
    import torchvision

    found = torchvision.models.get_model_weights(kind)
    try:
        return found[name]
    except KeyError:
        raise NotFound(
            f"{kind} has no pretrained weights {quoted(name)}",
            f"there are {', '.join(one.name for one in found)}",
        ) from None


def _downloaded(entry: Any, kind: str) -> Any:
    """Download the state dict of pretrained weights.

    Raises:
        NotFound: if the download fails. The message says which file to fetch by hand.
    """
    try:
        return entry.get_state_dict(progress=False, check_hash=True)
    except Exception as error:
        raise NotFound(
            f"the pretrained weights of {kind} could not be downloaded ({error})",
            f"fetch {entry.url} by hand and use --file {Path(entry.url).name}",
        ) from None


def _fill(model: nn.Module, state: Any, *, what: str, kind: str) -> None:
    """Load a state dict into a network.

    Args:
        what: the origin of the state dict, for an error.
        kind: the name of the network, for an error.

    Raises:
        Incompatible: if it does not fit the network.
    """
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        first = str(error).splitlines()[-1].strip()
        raise Incompatible(f"{what} does not fit {kind}: {first}") from None


def _plain(value: Any) -> Any:
    """A value as plain JSON values. Anything else becomes its text."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)
