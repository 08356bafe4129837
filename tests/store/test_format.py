"""The format: a reader written from docs/FORMAT.md alone finds in a registry what torch put there."""

from __future__ import annotations

import importlib.util
import math
import re
from collections import Counter, OrderedDict
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torchvision

from registry import Registry
from registry.store.dtypes import ELEMENT_TYPES
from registry.store.store import Written

SOURCE = Path(__file__).with_name("format_reader.py")
DOCUMENT = Path(__file__).parents[2] / "docs" / "FORMAT.md"


@pytest.fixture(scope="module")
def reader() -> ModuleType:
    return load(SOURCE)


def load(source: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(source.stem, source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def same(read: Any, saved: Any) -> bool:
    """Whether the reader's plain value stands for what was saved."""
    if isinstance(saved, torch.Tensor):
        raw = saved.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return bool(read.tobytes() == raw and read.shape == tuple(saved.shape))
    if isinstance(saved, np.ndarray):
        return bool(np.array_equal(read, saved) and read.dtype == saved.dtype)
    if isinstance(saved, dict):
        return list(read) == list(saved) and all(same(read[key], saved[key]) for key in saved)
    if isinstance(saved, list | tuple):
        return type(read) is type(saved) and len(read) == len(saved) and all(map(same, read, saved))
    if isinstance(saved, float) and math.isnan(saved):
        return math.isnan(read)
    return bool(type(read) is type(saved) and read == saved)


def test_the_reader_is_short_and_independent() -> None:
    text = SOURCE.read_text()
    assert len(text.splitlines()) < 60
    assert "registry" not in {line.split()[1] for line in text.splitlines() if "import" in line.split()[:1]}
    assert "torch" not in text
    assert "safetensors import" not in text


def test_the_reader_finds_a_real_training_state(tmp_path: Path, reader: ModuleType) -> None:
    net = torchvision.models.resnet18(weights=None)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    net(torch.randn(2, 3, 64, 64)).sum().backward()
    optimizer.step()
    state = {"model": net.state_dict(), "optimizer": optimizer.state_dict()}
    checkpoint = Registry(tmp_path).save("net", state, epoch=3, loss=math.nan, metrics={"accuracy": 0.5})
    record, components = reader.read(tmp_path, checkpoint.id)
    assert (record["kind"], record["model"], record["epoch"]) == ("checkpoint", "net", 3)
    assert math.isnan(record["loss"])
    assert record["metrics"] == {"accuracy": 0.5}
    assert list(components["model"]) == list(state["model"])
    assert all(same(components["model"][name], tensor) for name, tensor in state["model"].items())
    assert same(components["optimizer"], state["optimizer"])


def test_the_reader_understands_every_tag_and_type(tmp_path: Path, reader: ModuleType) -> None:
    tied, brain = torch.randn(3), torch.ones(4, dtype=torch.bfloat16)
    extra = {
        "tied": [tied, tied],
        "types": [torch.ones(2, 3).to(kind) for kind in (torch.bfloat16, torch.float16, torch.complex128)],
        "eight": torch.ones(4).to(torch.float8_e4m3fn),
        "half complex": torch.ones(3, dtype=torch.complex32),
        **({"brain complex": brain.view(torch.bcomplex32)} if hasattr(torch, "bcomplex32") else {}),
        "empty": torch.empty(0, 7),
        "single": torch.tensor(True),
        "array": np.arange(6, dtype=np.int16).reshape(2, 3),
        "scalar": np.float32(0.1),
        "bytes": [b"short", bytes(range(256)) * 3],
        "floats": [math.inf, -math.inf, math.nan, -0.0, 1e-300],
        "complex": 1 + 2j,
        "tuple": (1, "two", None, True),
        "keys": {1: "int", None: "none", 2.5: "float", "$tensor": "text"},
        "nested": {"list": [[], {}, ()]},
    }
    tagged = {"size": torch.Size([2, 3]), "dtype": torch.float32, "device": torch.device("cpu")}
    counter, ordered = Counter({"a": 2}), OrderedDict(b=1, a=2)
    components = {"extra": extra, "tagged": {**tagged, "counter": counter, "ordered": ordered}}
    checkpoint = Registry(tmp_path).save("net", components)
    _, read = reader.read(tmp_path, checkpoint.id)
    assert same(read["extra"], extra)
    assert read["tagged"] == {
        "size": [2, 3],
        "dtype": "float32",
        "device": "cpu",
        "counter": {"a": 2},
        "ordered": {"b": 1, "a": 2},
    }


def test_the_document_lists_every_element_type() -> None:
    table = DOCUMENT.read_text().split("The names are torch's.")[0].split("| element type |")[-1]
    listed = re.findall(r"\| (\w+) \| (\d+) \| (\w+) \|", table)
    expected = [(name, str(kind.size), kind.pack_code or "opaque") for name, kind in ELEMENT_TYPES.items()]
    assert sorted(listed) == sorted(expected)


@pytest.mark.parametrize("name", [name for name in ELEMENT_TYPES if hasattr(torch, name)])
def test_the_reader_knows_the_element_type(tmp_path: Path, reader: ModuleType, name: str) -> None:
    raw = torch.randint(0, 2 if name == "bool" else 256, (6 * ELEMENT_TYPES[name].size,), dtype=torch.uint8)
    tensor = raw.view(getattr(torch, name)).reshape(2, 3)
    _, read = reader.read(tmp_path, Registry(tmp_path).save("net", {"x": {"w": tensor}}).id)
    assert same(read["x"]["w"], tensor)


def test_the_reader_puts_shards_together(tmp_path: Path, reader: ModuleType) -> None:
    registry = Registry(tmp_path)
    whole = torch.arange(24.0).reshape(4, 6)
    parts = {"a": whole[:3, :2], "b": whole[:3, 2:], "c": whole[3:]}
    state = registry.store.encode({"x": parts})
    pack = registry.store.add(state)
    assert pack is not None
    slots = {name: node["$tensor"] for name, node in state.components["x"].items()}
    shards = [[[0, 0], slots["a"]], [[0, 2], slots["b"]], [[3, 0], slots["c"]]]
    trees = {"model": {"w": {"$shards": shards, "shape": [4, 6]}}}
    checkpoint = registry.save("net", Written(trees, state.tensors(), [pack]))
    _, read = reader.read(tmp_path, checkpoint.id)
    assert same(read["model"]["w"], whole)
    assert torch.equal(checkpoint.state_dict()["w"], whole)
    into = torch.zeros(4, 6)
    checkpoint.load_into(model={"w": into})
    assert torch.equal(into, whole)
    turned = torch.zeros(6, 4).T  # not contiguous
    checkpoint.load_into(model={"w": turned})
    assert torch.equal(turned, whole)


def test_with_a_few_more_lines_the_reader_knows_names(tmp_path: Path, reader: ModuleType) -> None:
    registry = Registry(tmp_path)
    for number in range(1, 5):
        optimizer = {"state": {0: torch.full((9_000,), float(number))}, "param_groups": []}
        registry.save("net", {"model": {"w": torch.full((3,), float(number))}, "optimizer": optimizer})
    registry.set_alias("net:v1", "good")
    registry.set_alias("net:v2", "good")
    registry.set_alias("net:v3", "gone")
    registry.remove_alias("net", "gone")
    registry.remove(["net:v3"])
    registry.thin("net:v1")
    registry.collect_garbage(grace=0)
    names, texts, packs = load(SOURCE.with_name("format_reader_log.py")).names(tmp_path)
    expected = {f"net:v{n}": registry[f"net:v{n}"].id for n in (1, 2, 4)}
    assert names == {**expected, "net@good": expected["net:v2"]}
    assert packs == set(registry.store.pack_digests())
    for name, version_id in expected.items():
        _, components = reader.read(tmp_path, version_id)
        assert float(components["model"]["w"][0]) == float(name[-1])
        assert texts[version_id].encode() == registry.store.manifest_path(version_id).read_bytes()


@pytest.mark.parametrize(("is_alone", "coded"), [(False, 9), (True, 12)])
def test_with_a_few_more_lines_the_reader_knows_differences(
    tmp_path: Path, reader: ModuleType, monkeypatch: pytest.MonkeyPatch, is_alone: bool, coded: int
) -> None:
    more = load(SOURCE.with_name("format_reader_differences.py"))
    registry, saved = Registry(tmp_path), []
    torch.manual_seed(0)
    weight = torch.randn(80, 3_500) * 0.02
    for _ in range(4):
        weight = weight + 1e-5 * torch.randn_like(weight)
        saved.append({"w": weight, "half": weight.bfloat16(), "double": weight.double(), "n": torch.ones(2)})
        registry.save("net", {"model": saved[-1]})
    registry.compact(alone=is_alone)
    registry.collect_garbage(grace=0)
    plain = reader.packed
    monkeypatch.setattr(
        reader, "packed", lambda root: [*plain(root), *more.differences(root, dict(plain(root)))]
    )
    for number, state in enumerate(saved, 1):
        _, read = reader.read(tmp_path, registry[f"net:v{number}"].id)
        assert all(same(read["model"][name], tensor) for name, tensor in state.items())
    assert len([*more.differences(tmp_path, dict(plain(tmp_path)))]) == coded
    versions = {
        re.search(r"torch-registry pack (\d)", path.read_text(errors="replace"))[1]  # type: ignore[index]
        for path in tmp_path.glob("packs/*/*.safetensors")
    }
    assert versions == ({"2"} if is_alone else {"1", "2"})


def test_the_reader_refuses_a_flipped_byte(tmp_path: Path, reader: ModuleType) -> None:
    checkpoint = Registry(tmp_path).save("net", {"model": {"w": torch.ones(100)}})
    (pack,) = tmp_path.glob("packs/*/*.safetensors")
    data = bytearray(pack.read_bytes())
    data[-1] ^= 1
    pack.chmod(0o644)
    pack.write_bytes(data)
    with pytest.raises(AssertionError):
        reader.read(tmp_path, checkpoint.id)
