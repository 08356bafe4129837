"""Manifests: what the document may say, and which part of it a pattern selects."""

from __future__ import annotations

import contextlib
import json
import math
import struct
from collections import Counter, OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from registry.store.digest import digest
from registry.store.errors import Corrupt, NotFound, RegistryError, Unsupported
from registry.store.manifest import Manifest, TensorInfo, parse
from registry.store.store import Store

HEX = "ab" * 32
TENSOR = ["float32", [2, 3], HEX]


def document(**changes: Any) -> dict[str, Any]:
    return {
        "format": 1,
        "record": {"kind": "checkpoint"},
        "components": {"model": {"w": {"$tensor": 0}}},
        "tensors": [TENSOR],
        **changes,
    }


def rendered(value: Any) -> bytes:
    return json.dumps(value).encode()


def test_a_manifest_is_read_as_it_was_written() -> None:
    components = {
        "model": {"w": {"$tensor": 0}, "again": {"$tensor": 0}, "b": {"$tensor": 1}},
        "extra": [1, "x"],
    }
    tensors = [TensorInfo("float32", (2, 3), HEX), TensorInfo("bool", (), "cd" * 32)]
    manifest = Manifest({"loss": 0.1, "tags": ["a"], "none": None}, components, tensors)
    assert parse(manifest.render()) == manifest
    assert list(manifest.slots) == [("model/w", 0), ("model/again", 0), ("model/b", 1)]
    assert (tensors[0].elements, tensors[0].size, tensors[1].size) == (6, 24, 1)


def test_the_contents_count_names_and_tensors_wherever_they_stand(tmp_path: Path) -> None:
    tied = torch.zeros(3, 2)
    ordered: OrderedDict[Any, Any] = OrderedDict(a=tied, b=torch.ones(4, dtype=torch.float16))
    ordered._metadata = {"inside": torch.ones(5)}  # type: ignore[attr-defined]
    tree = {
        "list": [torch.ones(1), {1: torch.ones(2), "$x": (torch.ones(3), None)}],
        "ordered": ordered,
        "counter": Counter({"n": 2}),
        "tied": tied,
        "array": np.arange(6, dtype=np.int16),
        "bytes": b"x" * 5000,
        "plain": [1.5, math.inf, "text", 1 + 2j, torch.float32, torch.Size([1])],
    }
    store = Store(tmp_path)
    manifest = store.manifest(store.put(store.encode({"c": tree, "none": {}}), {}).digest)
    assert len(manifest.listed) == 9
    sizes = [(1, 4), (2, 8), (3, 12), (6, 24), (4, 8), (5, 20), (6, 12), (5000, 5000)]
    assert manifest.contents == {
        "c": {"tensors": 9, "elements": sum(n for n, _ in sizes), "bytes": sum(size for _, size in sizes)},
        "none": {"tensors": 0, "elements": 0, "bytes": 0},
    }


def test_the_bytes_of_a_manifest_are_those_of_the_format() -> None:
    manifest = Manifest({"n": 1}, {"model": {"w": {"$tensor": 0}}}, [TensorInfo("float32", (2, 3), HEX)])
    assert manifest.render() == (
        b'{"format":1,"record":{"n":1},"components":{"model":{"w":{"$tensor":0}}},"tensors":[["float32",[2,3],"'
        + HEX.encode()
        + b'"]]}'
    )


MALFORMED: dict[str, bytes] = {
    "nothing": b"",
    "no JSON": b"{",
    "not UTF-8": b'{"format":1,"\xff":2}',
    "a list": b"[]",
    "a number": b"1",
    "no format": rendered({"record": {}, "components": {}, "tensors": []}),
    "format 0": rendered(document(format=0)),
    "format in text": rendered(document(format="1")),
    "format that is true": rendered(document(format=True)),
    "format with a point": rendered(document(format=1.0)),
    "no record": rendered({"format": 1, "components": {}, "tensors": []}),
    "record that is a list": rendered(document(record=[])),
    "components that are a list": rendered(document(components=[])),
    "tensors that are a table": rendered(document(tensors={})),
    "position beyond": rendered(document(components={"m": {"$tensor": 1}})),
    "position below": rendered(document(components={"m": {"$tensor": -1}})),
    "position with a point": rendered(document(components={"m": {"$tensor": 0.0}})),
    "position that is false": rendered(document(components={"m": {"$tensor": False}})),
    "position that is null": rendered(document(components={"m": {"$array": None}})),
    "position that is a list": rendered(document(components={"m": {"$bytes": [0]}})),
    "position beyond, in a key's value": rendered(
        document(components={"m": {"$dict": [[1, {"$tensor": 9}]]}})
    ),
    "position beyond, in metadata": rendered(
        document(components={"m": {"$ordered": {}, "metadata": [{"$tensor": 9}]}})
    ),
    "tensor of unknown type": rendered(document(tensors=[["float33", [1], HEX]])),
    "tensor whose type is no text": rendered(document(tensors=[[1, [1], HEX]])),
    "tensor of two fields": rendered(document(tensors=[["float32", [1]]])),
    "tensor without sizes": rendered(document(tensors=[["float32", None, HEX]])),
    "tensor of negative size": rendered(document(tensors=[["float32", [-1], HEX]])),
    "tensor of endless size": rendered(document(tensors=[["float32", [1 << 63], HEX]])),
    "tensor of 65 dimensions": rendered(document(tensors=[["float32", [1] * 65, HEX]])),
    "size that is true": rendered(document(tensors=[["float32", [True], HEX]])),
    "digest in capitals": rendered(document(tensors=[["float32", [1], HEX.upper()]])),
    "digest that is a path": rendered(document(tensors=[["float32", [1], "../" + HEX[3:]]])),
    "malformed number in the record": rendered(document(record={"loss": {"$float": "zz"}})),
    "record nested deep": b'{"format":1,"components":{},"tensors":[],"record":{"a":'
    + b"[" * 950
    + b"]" * 950
    + b"}}",
    "components nested deeper": b'{"format":1,"record":{},"tensors":[],"components":{"a":'
    + b"[" * 100_000
    + b"]" * 100_000
    + b"}}",
    "integer beyond any": b'{"format":1,"record":{"a":' + b"9" * 5_000 + b'},"components":{},"tensors":[]}',
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_manifest_is_corrupt(case: str) -> None:
    with pytest.raises(Corrupt) as caught:
        parse(MALFORMED[case])
    assert str(caught.value).isprintable()


def test_a_manifest_of_a_newer_version_is_refused_with_the_way_out() -> None:
    with pytest.raises(Unsupported, match=r"format 2.* reads up to 1; .*pip install -U torch-registry"):
        parse(rendered(document(format=2, tensors="in another form")))


def test_what_a_newer_version_adds_without_raising_the_format_is_passed_over() -> None:
    manifest = parse(rendered(document(more=[1], record={"kind": "checkpoint", "more": {"x": 1}})))
    assert manifest.record["more"] == {"x": 1}


MALFORMED_TREES: list[Any] = [
    {"$unknown": 1},
    {"$float": "zz"},
    {"$float": "00"},
    {"$float": 5},
    {"$complex": "00" * 8},
    {"$scalar": ["float32", "00"]},
    {"$scalar": ["float32", ""]},
    {"$scalar": ["object", "00" * 8]},
    {"$scalar": ["bfloat16", "0000"]},
    {"$scalar": []},
    {"$bytes": "zz"},
    {"$array": 1},
    {"$tuple": 5},
    {"$size": 5},
    {"$size": ["a"]},
    {"$size": [1.5]},
    {"$size": [1 << 63]},
    {"$dtype": "Tensor"},
    {"$dtype": "nonsense"},
    {"$dtype": 5},
    {"$device": "nonsense"},
    {"$device": 5},
    {"$device": "cuda:99999999999999999999"},
    {"$dict": 5},
    {"$dict": [1]},
    {"$dict": [[1, 2, 3]]},
    {"$dict": [[[1], 2]]},
    {"$counter": 5},
    {"$ordered": 5},
]


def forged(store: Store, text: bytes) -> str:
    """A manifest that somebody wrote by hand, under its right digest."""
    path = store.manifest_path(digest(text))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text)
    return path.stem


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, list[Any]]:
    """A store with a tensor of float32 and one of bfloat16, and its manifest's list of them."""
    store = Store(tmp_path_factory.mktemp("s"))
    stored = store.put({"m": [torch.arange(6.0), torch.ones(4).bfloat16()]})
    return store, json.loads(store.manifest_path(stored.digest).read_bytes())["tensors"]


@pytest.mark.parametrize("tree", MALFORMED_TREES, ids=json.dumps)
@pytest.mark.parametrize(
    "inside", [lambda x: x, lambda x: [{"a": x}], lambda x: {"$dict": [[1, {"$tuple": [x]}]]}]
)
def test_a_malformed_tree_is_corrupt(sound: tuple[Store, list[Any]], tree: Any, inside: Any) -> None:
    store, tensors = sound
    id = forged(store, rendered(document(components={"m": inside(tree)}, tensors=tensors)))
    with pytest.raises(Corrupt) as caught:
        store.get(id)
    assert str(caught.value).startswith(id[:12])
    assert str(caught.value).isprintable()


TAGS = [
    f"${name}"
    for name in ("tensor", "array", "bytes", "scalar", "float", "complex", "tuple", "size", "dtype")
]
TAGS += ["$device", "$dict", "$counter", "$ordered", "metadata"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=3) | st.just(HEX),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.text(max_size=2) | st.sampled_from(TAGS),
            inner,
            max_size=2,
        )
    ),
    max_leaves=8,
)


@given(
    st.dictionaries(st.text(max_size=2), JSON, max_size=2),
    st.dictionaries(st.text(max_size=2), JSON, max_size=2),
)
@settings(max_examples=400)
def test_no_manifest_makes_loading_fail_otherwise(
    sound: tuple[Store, list[Any]], components: dict[str, Any], record: dict[str, Any]
) -> None:
    store, tensors = sound
    id = forged(store, rendered(document(components=components, record=record, tensors=tensors)))
    for only in ("*/a*", None):
        with contextlib.suppress(RegistryError):
            store.get(id, only=only)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.text().filter(lambda text: text[:1] != "$"), inner, max_size=3)
        ),
        max_leaves=8,
    )
)
def test_a_record_comes_back_to_the_bit(value: Any) -> None:
    back = parse(Manifest({"value": value}, {}, []).render()).record["value"]
    assert bits(back) == bits(value)


def bits(value: Any) -> Any:
    """A value in a form in which NaNs and zeros of either sign can be compared."""
    if isinstance(value, float):
        return struct.pack(">d", value)
    if isinstance(value, list):
        return list(map(bits, value))
    return (
        {key: bits(item) for key, item in value.items()} if isinstance(value, dict) else (type(value), value)
    )


LOOP: dict[str, Any] = {}
LOOP["again"] = [LOOP]


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ({"a": {"b": [1, object()]}}, "'record/a/b/1': a record holds plain values only, not object"),
        ({"a": torch.ones(1)}, "not Tensor"),
        ({"a": {1: 2}}, "'record/a': .* not dict"),
        ({"a": {"$float": 1}}, "'record/a': .* not dict"),
        ({"a": {1, 2}}, "not set"),
        ({"a": b"x"}, "not bytes"),
        (LOOP, "nested too deep, or holds itself"),
    ],
    ids=["object", "tensor", "key", "reserved key", "set", "bytes", "loop"],
)
def test_a_record_that_cannot_be_kept_is_refused_before_a_byte_is_written(
    tmp_path: Path, record: dict[str, Any], told: str
) -> None:
    with pytest.raises(Unsupported, match=told):
        Store(tmp_path / "s").put({"model": {"w": torch.ones(100)}}, record)
    assert not (tmp_path / "s").exists()


TREE = {
    "model": {"conv.0.weight": 0, "conv.0.bias": 1, "fc.weight": 2},
    "optimizer": {
        "state": {0: {"step": 3, "exp_avg": 4}, 1: {"step": 5}},
        "groups": [{"lr": 0.1, "params": [0, 1]}],
    },
}


def tree_with_tensors() -> dict[str, Any]:
    def grown(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: grown(item) for key, item in value.items()}
        return torch.tensor([value, 0]) if isinstance(value, int) else value

    return {
        "model": grown(TREE["model"]),
        "optimizer": {"state": grown(TREE["optimizer"]["state"]), "groups": TREE["optimizer"]["groups"]},
    }


def names(value: Any, path: str = "") -> list[str]:
    if isinstance(value, dict):
        return [name for key, item in value.items() for name in names(item, f"{path}/{key}")]
    return [path[1:]]


@pytest.mark.parametrize(
    ("only", "selected"),
    [
        ("model", ["model/conv.0.weight", "model/conv.0.bias", "model/fc.weight"]),
        ("model/*", ["model/conv.0.weight", "model/conv.0.bias", "model/fc.weight"]),
        ("model/conv.*", ["model/conv.0.weight", "model/conv.0.bias"]),
        ("*.weight", ["model/conv.0.weight", "model/fc.weight"]),
        ("*/conv.?.bias", ["model/conv.0.bias"]),
        ("model/[cf]*.weight", ["model/conv.0.weight", "model/fc.weight"]),
        (["*.bias", "optimizer/state/1"], ["model/conv.0.bias", "optimizer/state/1/step"]),
        ("optimizer/state/0/step", ["optimizer/state/0/step"]),
        ("*/step", ["optimizer/state/0/step", "optimizer/state/1/step"]),
        ("optimizer/groups", ["optimizer/groups"]),
        (["model/fc.weight", "model"], ["model/conv.0.weight", "model/conv.0.bias", "model/fc.weight"]),
    ],
    ids=str,
)
def test_patterns_select_by_name(tmp_path: Path, only: str | list[str], selected: Sequence[str]) -> None:
    store = Store(tmp_path)
    assert names(store.get(store.put(tree_with_tensors()).digest, only=only)) == selected


@pytest.mark.parametrize(
    ("only", "told"),
    [
        ("modle", "nothing matches 'modle'; did you mean 'model'"),
        ("Model", "nothing matches 'Model'"),
        ("conv.*", "nothing matches"),
        (["model", "optimiser"], "nothing matches 'optimiser'; did you mean 'optimizer'"),
        ("", "nothing matches ''"),
        ("list/items/0", "the items of a list or tuple are selected together"),
    ],
)
def test_a_pattern_that_selects_nothing_is_an_error(tmp_path: Path, only: str | list[str], told: str) -> None:
    store = Store(tmp_path)
    id = store.put({**tree_with_tensors(), "list": {"items": (torch.ones(1), 2)}}).digest
    with pytest.raises(NotFound, match=told):
        store.get(id, only=only)


def test_no_pattern_selects_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.get(store.put(tree_with_tensors()).digest, only=[]) == {}


def test_an_unusual_number_in_a_record_survives() -> None:
    record = {
        "loss": math.nan,
        "bits": struct.unpack(">d", bytes.fromhex("7ff8000000abcdef"))[0],
        "big": 1 << 4_000,
    }
    back = parse(Manifest(record, {}, []).render()).record
    assert bits(back) == bits(record)
