"""Tensors of every type and layout: stored as what they show, and nothing more."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from registry.store.dtypes import BITS, ELEMENT_TYPES, byte_count, from_safetensors, to_safetensors
from registry.store.store import Store

DTYPES = [getattr(torch, name) for name in ELEMENT_TYPES if hasattr(torch, name)]


def bits(tensor: torch.Tensor) -> bytes:
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return b"" if plain.numel() == 0 else plain.reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("kind", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 0, 3), (3, 4, 5)], ids=str)
@pytest.mark.parametrize("copy", [False, True])
def test_every_type_comes_back_bit_for_bit(
    tmp_path: Path, kind: torch.dtype, shape: tuple[int, ...], copy: bool
) -> None:
    count = torch.empty(shape).numel() * kind.itemsize
    high = 2 if kind is torch.bool else 256
    raw = torch.randint(0, high, (count,), dtype=torch.uint8)
    tensor = raw.view(kind).reshape(shape) if count else torch.empty(shape, dtype=kind)
    store = Store(tmp_path)
    back = store.get(store.put({"x": tensor}).digest, copy=copy)["x"]
    assert (back.dtype, back.shape) == (kind, tensor.shape)
    assert bits(back) == bits(tensor)


def test_no_type_of_torch_that_a_state_dict_can_hold_is_missing() -> None:
    kinds = {value for value in vars(torch).values() if isinstance(value, torch.dtype)}
    quantized = {kind for kind in kinds if str(kind).startswith("torch.q") or "quint" in str(kind)}
    packed = {kind for kind in kinds if str(kind).removeprefix("torch.").startswith(("int", "uint", "bits"))}
    odd = {kind for kind in packed if str(kind).removeprefix("torch.") not in ELEMENT_TYPES}
    assert kinds - set(DTYPES) - quantized - odd == set()
    assert all(str(kind).removeprefix("torch.").startswith("bits") or kind.itemsize == 1 for kind in odd)


@pytest.mark.parametrize("name", ELEMENT_TYPES)
@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3)], ids=str)
def test_a_type_that_safetensors_has_is_found_again_by_its_code(name: str, shape: tuple[int, ...]) -> None:
    found = to_safetensors(name, shape)
    if found is None:
        assert ELEMENT_TYPES[name].code is None or (ELEMENT_TYPES[name].packed > 1 and not shape)
        return
    code, there = found
    assert from_safetensors(code, there) == (name, shape)
    assert math.prod(there) * BITS[code] == 8 * byte_count(name, shape)


def test_what_torch_cannot_represent_has_no_type() -> None:
    assert from_safetensors("F4", (2, 3)) is None
    assert from_safetensors("F4", ()) is None
    assert from_safetensors("F6_E2M3", (4,)) is None


BASE = torch.arange(24.0).reshape(4, 6)
VIEWS: dict[str, Callable[[], torch.Tensor]] = {
    "transposed": lambda: BASE.T,
    "strided": lambda: BASE[::2, ::3],
    "sliced": lambda: BASE[1:2],
    "expanded": lambda: torch.ones(1).expand(5, 4),
    "conjugate": lambda: torch.randn(3, dtype=torch.complex64).conj(),
    "negative": lambda: torch.randn(3, dtype=torch.complex64).conj().imag,
    "channels last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "wanting a gradient": lambda: torch.randn(3, requires_grad=True),
    "with a history": lambda: torch.randn(3, requires_grad=True) * 2,
    "parameter": lambda: torch.nn.Parameter(torch.randn(3)),
}


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_is_stored_as_what_it_shows(tmp_path: Path, name: str) -> None:
    tensor = VIEWS[name]()
    store = Store(tmp_path)
    stored = store.put({"x": tensor})
    back = store.get(stored.digest)["x"]
    assert back.shape == tensor.shape
    assert bits(back) == bits(tensor)
    assert back.is_contiguous()
    assert not back.requires_grad


def test_of_a_slice_only_the_slice_is_stored(tmp_path: Path) -> None:
    large = torch.randn(1_000_000)
    pack = Store(tmp_path).put({"x": large[10:20]}).pack
    assert pack is not None
    assert pack.size < 10_000


def test_equal_bytes_of_another_type_or_shape_are_another_tensor(tmp_path: Path) -> None:
    zeros = [
        torch.zeros(4),
        torch.zeros(2, 2),
        torch.zeros(4, dtype=torch.int32),
        torch.zeros(2, dtype=torch.int64),
    ]
    pack = Store(tmp_path).put({"x": zeros}).pack
    assert pack is not None
    assert len(pack.tensors) == 4
