"""Trees that are encoded at once: as they are step by step, and left to that where a tensor or a value is not usual."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from registry.store.errors import Unsupported
from registry.store.tree import Leaf, _Encoder, encode
from registry.store.usual import encode_usual


def step_by_step(trees: dict[str, Any]) -> tuple[dict[str, Any], list[Leaf]]:
    encoder = _Encoder()
    return {name: encoder.encode(tree, (name,)) for name, tree in trees.items()}, encoder.leaves


def trained() -> dict[str, Any]:
    """A network with tied parameters and buffers, and its optimizer."""
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    net[2].weight = net[0].weight
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    return {
        "model": net.state_dict(),
        "live": net.state_dict(keep_vars=True),
        "optimizer": optimizer.state_dict(),
    }


def plain_values() -> dict[str, Any]:
    base = torch.arange(12.0)
    return {
        "views": [base[:4], base[4:], base[:4].view(2, 2), base[:4], base.view(torch.int32)[:4]],
        "numbers": (1, -(2**4_000), 0.5, float("inf"), -0.0, float("nan"), True, None, "text"),
        "keys": {0: "a", 1.5: "b", None: "c", True: torch.ones(2), "d": {}},
        "signs": {"$tensor": 1, "price in $": OrderedDict(a=[()])},
    }


@pytest.mark.parametrize("made", [trained, plain_values])
def test_trees_get_the_documents_and_the_tensors_that_they_get_step_by_step(
    made: Callable[[], dict[str, Any]],
) -> None:
    trees = made()
    assert encode_usual(trees) is not None
    (documents, leaves), (expected, others) = encode(trees), step_by_step(trees)
    assert repr(documents) == repr(expected)
    assert [leaf._replace(source=None) for leaf in leaves] == [leaf._replace(source=None) for leaf in others]
    assert all(leaf.source is other.source for leaf, other in zip(leaves, others, strict=True))


def freed() -> torch.Tensor:
    tensor = torch.ones(8)
    tensor.untyped_storage().resize_(0)
    return tensor


def cut() -> torch.Tensor:
    """A view whose memory ends before its last element, though it is long enough for so many."""
    tensor = torch.ones(8)[4:]
    tensor.untyped_storage().resize_(4 * 4)
    return tensor


UNUSUAL: dict[str, Callable[[], Any]] = {
    "transposed": lambda: torch.ones(2, 3).T,
    "conjugated": lambda: torch.ones(2, dtype=torch.complex64).conj(),
    "negated": lambda: torch._neg_view(torch.ones(2)),
    "empty": lambda: torch.empty(0),
    "array": lambda: np.ones(3),
    "large bytes": lambda: bytes(1_000),
    "dtype": lambda: torch.float32,
    "size": lambda: torch.Size([2]),
    "scalar": lambda: np.float32(1),
    "complex": lambda: 1j,
}

REFUSED: dict[str, Callable[[], Any]] = {
    "freed": freed,
    "cut": cut,
    "meta": lambda: torch.ones(2, device="meta"),
    "sparse": lambda: torch.ones(2, 2).to_sparse(),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8),
    "subclass": lambda: torch.ones(2).as_subclass(type("Mine", (torch.Tensor,), {})),
    "object": object,
    "key": lambda: {(1, 2): 3},
    "long": lambda: 1 << 5_000,
    "attribute": lambda: vars(found := OrderedDict()).update(mine=1) or found,
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_what_is_not_usual_is_encoded_step_by_step(name: str) -> None:
    trees = {"model": {"first": torch.ones(3), "odd": UNUSUAL[name]()}}
    (documents, leaves), (expected, others) = encode(trees), step_by_step(trees)
    assert documents == expected
    assert [leaf._replace(source=None) for leaf in leaves] == [leaf._replace(source=None) for leaf in others]


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_stored_is_named_among_usual_values(name: str) -> None:
    with pytest.raises(Unsupported, match="model/odd"):
        encode({"model": {"first": torch.ones(3), "odd": REFUSED[name](), "last": torch.ones(3)}})


def test_a_tree_that_is_too_deep_is_refused() -> None:
    tree: Any = torch.ones(1)
    for _ in range(200):
        tree = [tree]
    with pytest.raises(Unsupported, match="nested deeper than 200"):
        encode({"model": tree})
    assert encode({"model": tree[0]})[1]
