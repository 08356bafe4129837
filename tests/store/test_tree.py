"""The tree codec: whatever a state dict holds comes back bit for bit, and what cannot is refused by name."""

from __future__ import annotations

import json
import math
import struct
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from registry.store.dtypes import ELEMENT_TYPES
from registry.store.errors import Unsupported
from registry.store.store import Store
from registry.store.tree import decode, encode

DTYPES = [getattr(torch, name) for name in ELEMENT_TYPES if hasattr(torch, name)]
NAN = struct.unpack(">d", bytes.fromhex("7ff8000000abcdef"))[0]


def bits(tensor: torch.Tensor) -> bytes:
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return b"" if plain.numel() == 0 else plain.reshape(-1).view(torch.uint8).numpy().tobytes()


def same(left: Any, right: Any) -> bool:
    """Equality of type, order and bits."""
    if isinstance(left, torch.Tensor):
        kinds = isinstance(right, torch.Tensor) and (left.dtype, left.shape) == (right.dtype, right.shape)
        return kinds and bits(left) == bits(right)
    if type(left) is not type(right):
        return False
    if isinstance(left, np.ndarray | np.generic):
        return bool(
            left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()
        )
    if isinstance(left, dict):
        if isinstance(left, OrderedDict) and not same(vars(left), vars(right)):
            return False
        keys = len(left) == len(right) and all(map(same, left, right))
        return keys and all(map(same, left.values(), right.values()))
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, float):
        return struct.pack(">d", left) == struct.pack(">d", right)
    if isinstance(left, complex):
        return same((left.real, left.imag), (right.real, right.imag))
    return bool(left == right)


def tensors() -> st.SearchStrategy[torch.Tensor]:
    shapes = st.lists(st.integers(0, 3), max_size=3)
    return st.builds(
        lambda kind, shape, seed: raw_tensor(kind, shape, seed),
        st.sampled_from(DTYPES),
        shapes,
        st.integers(0, 99),
    )


def raw_tensor(kind: torch.dtype, shape: list[int], seed: int) -> torch.Tensor:
    """A tensor of arbitrary bits, NaNs of all kinds among them."""
    size = math.prod(shape) * kind.itemsize
    data = np.random.default_rng(seed).integers(0, 2 if kind is torch.bool else 256, size, np.uint8)
    if size == 0:
        return torch.empty(shape, dtype=kind)
    return torch.from_numpy(data).view(kind).reshape(shape)


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**200), 2**200)
    | st.floats()
    | st.just(NAN)
    | st.complex_numbers()
    | st.text()
    | st.binary(max_size=600)
    | st.sampled_from([torch.float32, torch.bfloat16, torch.device("cpu"), torch.device("cuda:1")])
    | st.builds(torch.Size, st.lists(st.integers(0, 9), max_size=3))
    | st.builds(np.float32, st.floats(width=32))
    | st.builds(
        lambda shape: np.arange(math.prod(shape), dtype=np.int16).reshape(shape),
        st.lists(st.integers(0, 3), max_size=2),
    )
    | tensors()
)
KEYS = st.text() | st.integers() | st.floats(allow_nan=False) | st.none() | st.booleans() | st.just("$tensor")


def with_metadata(items: dict[Any, Any], metadata: Any) -> OrderedDict[Any, Any]:
    ordered = OrderedDict(items)
    ordered._metadata = metadata  # type: ignore[attr-defined]
    return ordered


TREES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(), inner, max_size=3)
        | st.dictionaries(KEYS, inner, max_size=3)
        | st.dictionaries(KEYS, inner, max_size=3).map(OrderedDict)
        | st.builds(with_metadata, st.dictionaries(st.text(), inner, max_size=2), inner)
        | st.dictionaries(st.text(), st.integers(), max_size=3).map(Counter)
    ),
    max_leaves=8,
)


def through_json(tree: Any) -> Any:
    """Encode a tree, write and read its document as JSON, and decode it."""
    documents, leaves = encode({"x": tree})
    document = json.loads(json.dumps(documents["x"], allow_nan=False))

    def tensor(slot: int) -> torch.Tensor:
        leaf = leaves[slot]
        kind = getattr(torch, leaf.dtype)
        if leaf.size == 0:
            return torch.empty(leaf.shape, dtype=kind)
        return torch.frombuffer(bytearray(leaf.buffer()), dtype=torch.uint8).view(kind).reshape(leaf.shape)

    return decode(document, tensor)


@given(TREES)
@settings(max_examples=400)
def test_any_tree_of_supported_values_comes_back_bit_for_bit(tree: Any) -> None:
    assert same(through_json(tree), tree)


@given(
    st.dictionaries(st.text(st.characters(exclude_characters="/"), min_size=1), TREES, min_size=1, max_size=3)
)
@settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow])
def test_any_tree_comes_back_from_disk(
    tmp_path_factory: pytest.TempPathFactory, trees: dict[str, Any]
) -> None:
    store = Store(tmp_path_factory.mktemp("s"))
    digest = store.put(trees).digest
    assert same(store.get(digest), trees)
    assert same(store.get(digest, copy=True), trees)


def test_tied_tensors_stay_tied(tmp_path: Path) -> None:
    weight = torch.randn(4, 3)
    store = Store(tmp_path)
    tree = {"encoder": weight, "decoder": weight, "part": weight[:2], "equal": weight.clone()}
    back = store.get(store.put({"model": tree}).digest)["model"]
    assert back["encoder"].data_ptr() == back["decoder"].data_ptr()
    assert back["equal"].data_ptr() != back["encoder"].data_ptr()
    back["encoder"].zero_()
    assert not back["decoder"].any()
    assert same(back["equal"], weight)
    assert same(back["part"], weight[:2])


def ragged() -> torch.Tensor:
    return torch.nested.nested_tensor([torch.ones(1), torch.ones(2)])


class Subclass(torch.Tensor):
    """A tensor with behaviour that a store cannot keep."""


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "sparse": (lambda: torch.eye(3).to_sparse(), "to_dense"),
    "quantized": (lambda: torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8), "quantized"),
    "nested": (ragged, "nested tensor"),
    "meta": (lambda: torch.empty(3, device="meta"), "meta device"),
    "subclass": (lambda: torch.ones(2).as_subclass(Subclass), "Subclass"),
    "function": (lambda: len, "builtin_function_or_method"),
    "lambda": (lambda: lambda: None, "function"),
    "module": (lambda: torch.nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
    "object": (object, "builtins.object"),
    "set": (lambda: {1}, "builtins.set"),
    "generator": (lambda: torch.Generator(), "Generator"),
    "strings": (lambda: np.array(["a"]), "numpy array of dtype <U1"),
    "objects": (lambda: np.array([object()]), "numpy array of dtype"),
    "big-endian": (lambda: np.zeros(2, ">f4"), "numpy array of dtype >f4"),
    "tuple key": (lambda: {(1, 2): 3}, "a dict key of type tuple"),
    "list subclass": (lambda: type("L", (list,), {})([1]), "L cannot be stored"),
    "huge integer": (lambda: 1 << 5_000, "an integer of 5001 bits"),
    "ordered with more": (lambda: with_extra(), "an OrderedDict with the attributes"),
}


def with_extra() -> OrderedDict[str, int]:
    ordered = OrderedDict(a=1)
    ordered.other = 2  # type: ignore[attr-defined]
    return ordered


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_represented_is_refused_by_path_before_a_byte_is_written(
    tmp_path: Path, name: str
) -> None:
    make, message = REFUSED[name]
    store = Store(tmp_path / "s")
    with pytest.raises(Unsupported) as caught:
        store.put({"model": {"fine": torch.ones(100), "list": [{"bad": make()}]}})
    assert str(caught.value).startswith("model/list/0/bad")
    assert message in str(caught.value)
    assert not (tmp_path / "s").exists()


def test_a_tree_that_is_too_deep_or_holds_itself_is_refused(tmp_path: Path) -> None:
    loop: list[Any] = []
    loop.append(loop)
    deep: Any = 1
    for _ in range(300):
        deep = [deep]
    for tree in (loop, deep):
        with pytest.raises(Unsupported, match="nested deeper than 200 levels"):
            Store(tmp_path / "s").put({"model": tree})


def test_a_hostile_name_is_harmless_in_the_message(tmp_path: Path) -> None:
    with pytest.raises(Unsupported) as caught:
        Store(tmp_path).put({"model": {"\x1b[31m" + "x" * 5_000: object()}})
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


def test_a_subclass_that_answers_nothing_is_refused_by_its_class() -> None:
    class Mute(torch.Tensor):
        @classmethod
        def __torch_function__(cls, *args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("no")

    with pytest.raises(Unsupported, match="a tensor subclass"):
        encode({"model": {"a": torch.ones(2).as_subclass(Mute)}})
