"""Training states of realistic shape, built without downloads."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import torchvision

from registry import Registry
from registry.store.fingerprints import remembered

Tree = dict[str, Any]
"""A state with components, such as `model` and `optimizer`."""


def resnet50_with_adam() -> Tree:
    """A torchvision ResNet50 with Adam's moments: 803 tensors, 307 MB."""
    model = torchvision.models.resnet50(weights=None)
    return {"model": model.state_dict(), "optimizer": _adam(list(model.parameters()))}


def gpt2_small_with_adam() -> Tree:
    """Parameters with the names and shapes of GPT-2 small, with Adam's moments: 592 tensors, 1.5 GB."""
    width, layers = 768, 12
    shapes = {"wte.weight": (50_257, width), "wpe.weight": (1_024, width)}
    for i in range(layers):
        for name, shape in {
            "ln_1": (width,),
            "attn.c_attn": (width, 3 * width),
            "attn.c_proj": (width, width),
            "ln_2": (width,),
            "mlp.c_fc": (width, 4 * width),
            "mlp.c_proj": (4 * width, width),
        }.items():
            shapes[f"h.{i}.{name}.weight"] = shape
            shapes[f"h.{i}.{name}.bias"] = shape[-1:]
    shapes |= {"ln_f.weight": (width,), "ln_f.bias": (width,)}
    model = {name: torch.randn(shape) * 0.02 for name, shape in shapes.items()}
    return {"model": model, "optimizer": _adam(list(model.values()))}


def _adam(parameters: list[torch.Tensor]) -> Tree:
    moments = {
        i: {
            "step": torch.tensor(100.0),
            "exp_avg": torch.randn_like(p) * 1e-3,
            "exp_avg_sq": torch.rand_like(p) * 1e-6,
        }
        for i, p in enumerate(parameters)
    }
    group = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "params": list(range(len(parameters)))}
    return {"state": moments, "param_groups": [group]}


def flat(tree: Any, path: str = "") -> dict[str, torch.Tensor]:
    """The tensors of a state by path, as `safetensors.torch.save_file` takes them."""
    if isinstance(tree, torch.Tensor):
        return {path: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return {name: t for key, item in items for name, t in flat(item, f"{path}/{key}".strip("/")).items()}


def new_registry(root: Path) -> Registry:
    """Make an empty registry, as in a process that has saved nothing yet. No digest of a tensor is remembered."""
    shutil.rmtree(root, ignore_errors=True)
    remembered.forget()
    return Registry(root)


def with_new_head(state: Tree) -> Tree:
    """The state with about one per cent of it replaced: the last tensors of the model."""
    model = dict(state["model"])
    budget = sum(t.numel() for t in flat(state).values()) // 100
    for name in reversed(model):
        if model[name].is_floating_point() and model[name].numel() <= budget:
            model[name] = torch.randn_like(model[name])
            budget -= model[name].numel()
    return {**state, "model": model}


def zeroed(tree: Any) -> Any:
    """A tree with the same names and shapes, whose tensors are zeros."""
    if isinstance(tree, torch.Tensor):
        return torch.zeros_like(tree)
    if isinstance(tree, dict):
        return {key: zeroed(item) for key, item in tree.items()}
    return [zeroed(item) for item in tree] if isinstance(tree, list) else tree
