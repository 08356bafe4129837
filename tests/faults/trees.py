"""Trees of every kind that can be saved, and whether two of them are the same."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import torch

Tree = dict[str, Any]

UNSEEN: Any = object()
"""Stands for a part of a tree that nobody can foretell, such as random state, until it is read for the first time."""


def _near(family: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor that differs from the others of its family in some rows: the nearer the number, the fewer."""
    chance = torch.Generator().manual_seed(family)
    tensor, moved = torch.randn(40, 64, generator=chance), torch.randn(40, 64, generator=chance)
    tensor[: k % 40] += 0.01 * moved[: k % 40]
    tensor[-1, -1] = k
    return tensor.to(dtype)


def _odd(k: int) -> Tree:
    return {
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(k),
        "half": torch.tensor([1.5, -0.0, math.inf, k]).bfloat16(),
        "small": torch.tensor([0.5, k]).to(torch.float8_e4m3fn),
        "flags": torch.tensor([True, False]),
        "nan": torch.tensor([0x7FC00001 + k, 0x7F800002], dtype=torch.int32).view(torch.float32),
        "turned": torch.arange(6.0 + k)[:6].reshape(2, 3).T,
    }


def _tied(k: int) -> Tree:
    weight = torch.full((6, 5), float(k))
    return {"in": weight, "out": weight, "equal": weight.clone(), "part": weight[2:4]}


def _values(k: int) -> Tree:
    ordered = OrderedDict([("b", (1, [2.5, None])), ("a", True)])
    complex_one = torch.tensor([1 + 2j, k], dtype=torch.complex128)
    return {
        "$odd": k,
        "c": complex_one,
        "ordered": ordered,
        "numbers": {3: -0.0, "nan": math.nan, "large": 2**62 + k},
    }


MODELS = {
    "plain": lambda k: {"shared": torch.arange(600.0), "own": torch.full((20,), float(k))},
    "near": lambda k: {"shared": torch.arange(600.0), "emb": _near(0, k, torch.float32)},
    "near halves": lambda k: {
        "emb": _near(1, k, torch.bfloat16),
        "head": _near(2, k // 2, torch.float64)[:20],
    },
    "odd": _odd,
    "tied": _tied,
    "values": _values,
}
"""Makes the component `model` of a tree from a number, by kind."""


def tree_of(kind: str, k: int, *, optimizer: bool) -> Tree:
    """A tree of some kind; trees of two numbers differ, and share what they can."""
    tree: Tree = {"model": MODELS[kind](k)}
    if optimizer:
        group = {"lr": 1e300, "betas": (0.9, 0.999), "params": [0]}
        state = {0: {"step": torch.tensor(float(k)), "exp_avg": torch.full((700,), -float(k))}}
        tree["optimizer"] = {"state": state, "param_groups": [group]}
    return tree


def tensors_in(tree: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a tree, with its path."""
    if isinstance(tree, torch.Tensor):
        yield path, tree
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from tensors_in(value, f"{path}/{key}")
    elif isinstance(tree, list | tuple):
        for i, value in enumerate(tree):
            yield from tensors_in(value, f"{path}/{i}")


def ties(tree: Any) -> set[frozenset[str]]:
    """The paths that share memory, by what they share."""
    found: dict[object, set[str]] = {}
    for path, tensor in tensors_in(tree):
        if tensor.numel():
            place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            found.setdefault(place, set()).add(path)
    return {frozenset(paths) for paths in found.values() if len(paths) > 1}


def is_same(a: Any, b: Any) -> bool:
    """Whether two trees are equal to the bit, of the same types, and in the same order."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return (a.dtype, a.shape) == (b.dtype, b.shape) and _bytes(a) == _bytes(b)
    if isinstance(a, Mapping):
        return list(a) == list(b) and all(is_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(is_same, a, b))
    if isinstance(a, float):
        return exactly(a) == exactly(b)
    return bool(a == b)


def _bytes(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def exactly(value: Any) -> Any:
    """A plain value in which NaN equals NaN."""
    if isinstance(value, Mapping):
        return {key: exactly(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [exactly(one) for one in value]
    return value.hex() if isinstance(value, float) else value


def artifact(content: int) -> Tree:
    """The tree of an artifact; some have tensors that versions have too."""
    part = tree_of("near" if content % 2 else "plain", content, optimizer=False)["model"]
    return {**part, "rows": [content, content + 1]}
