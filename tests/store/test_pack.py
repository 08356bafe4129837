"""Packs: safetensors files that any reader opens, aligned, named by their content."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors
from hypothesis import example, given, settings
from hypothesis import strategies as st

from registry.store import header
from registry.store.digest import digest, tensor_digest
from registry.store.dtypes import ELEMENT_TYPES, byte_count
from registry.store.errors import Corrupt, Unsupported
from registry.store.pack import PackInfo, PackWriter, pack_path, read_pack_info

TENSORS = st.lists(
    st.tuples(
        st.sampled_from(sorted(ELEMENT_TYPES)), st.lists(st.integers(0, 5), max_size=4), st.integers(0, 9)
    ),
    max_size=12,
)


def write(
    root: Path, tensors: list[tuple[str, list[int], int]], *, is_sure: bool = True
) -> tuple[PackInfo, dict[str, bytes]]:
    """A pack of tensors of arbitrary bytes, and the bytes by digest."""
    (root / "tmp").mkdir(exist_ok=True)
    writer = PackWriter(root / "tmp", [(kind, shape) for kind, shape, _ in tensors])
    contents: dict[str, bytes] = {}
    for kind, shape, seed in tensors:
        data = np.random.default_rng(seed).bytes(byte_count(kind, shape))
        name = tensor_digest(kind, shape, data)
        if name not in contents:
            contents[name] = data
            writer.add(name, kind, shape, memoryview(data), is_sure=is_sure)
    return writer.finish(root / "packs"), contents


@given(TENSORS, st.booleans())
@example([("uint8", [3], 0), ("uint8", [0], 0)], False)
@settings(max_examples=60)
def test_any_safetensors_reader_opens_a_pack(
    tmp_path_factory: pytest.TempPathFactory, tensors: list[tuple[str, list[int], int]], is_sure: bool
) -> None:
    root = tmp_path_factory.mktemp("p")
    info, contents = write(root, tensors, is_sure=is_sure)
    path = pack_path(root / "packs", info.digest)
    assert read_pack_info(path) == info
    data = path.read_bytes()
    for tensor in info.tensors:
        assert tensor.start % 64 == 0
        assert data[tensor.start : tensor.start + tensor.size] == contents[tensor.digest]
    with safetensors.safe_open(path, "numpy") as file:
        names = set(file.keys())
        assert {name for name in names if len(name) == 64} == set(contents)
        assert all(name.startswith("pad.") for name in names - set(contents))
    head = 8 + int.from_bytes(data[:8], "little")
    assert head % 4_096 == 0
    assert info.digest == digest(data[:head])


def test_no_two_packs_have_one_name(tmp_path: Path) -> None:
    tensors = [("float32", [3, 4], 1), ("bool", [5], 2), ("complex128", [2], 3)]
    found = [write(tmp_path, tensors)[0] for _ in range(2)]
    assert found[0].digest != found[1].digest
    assert found[0].tensors == found[1].tensors


def test_a_pack_of_very_many_tensors_has_room_in_its_header(tmp_path: Path) -> None:
    tensors = [("float4_e2m1fn_x2", [1] * (1 + i % 7), i) for i in range(5_000)]
    info, contents = write(tmp_path, tensors)
    assert len(info.tensors) == len(contents)
    assert read_pack_info(pack_path(tmp_path / "packs", info.digest)) == info


def with_differences(root: Path, *coded: bytes) -> Path:
    """A pack that holds some bytes as differences."""
    writer = PackWriter(root, [], coded=[("float32", [9])] * len(coded))
    for number, part in enumerate(coded):
        writer.add_coded(f"{number:064}", "float32", [9], base="f" * 64, coded=memoryview(part))
    return pack_path(root / "packs", writer.finish(root / "packs").digest)


def test_a_pack_says_what_a_reader_must_know(tmp_path: Path) -> None:
    first, second = struct.pack("<II", 1 << 17, 1), struct.pack("<IBBI", 0, 2, 1, 1 << 18)
    for version, coded in ((1, ()), (1, (first,)), (2, (second,)), (2, (first, second, first))):
        path = with_differences(tmp_path, *coded)
        with safetensors.safe_open(path, "numpy") as file:
            assert file.metadata()["format"] == f"torch-registry pack {version}"
        assert len(read_pack_info(path).tensors) == len(coded)


def test_a_pack_of_a_newer_version_is_not_called_damaged(tmp_path: Path) -> None:
    content = with_differences(tmp_path, bytes(10)).read_bytes()
    for version in (b"3", b"9" * 9):
        text = content[8:4_096].rstrip().replace(b"pack 2", b"pack " + version)
        head = header.framed(text, 4_096)
        path = pack_path(tmp_path / "packs", digest(head))
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(head + content[4_096:])
        with pytest.raises(
            Unsupported, match=r"was written by a newer torch-registry.*upgrade with: pip install"
        ):
            read_pack_info(path)


def test_a_pack_under_a_name_that_is_not_its_own_is_refused(tmp_path: Path) -> None:
    info, _ = write(tmp_path, [("float32", [3], 1)])
    path = pack_path(tmp_path / "packs", info.digest)
    other = path.with_name("0" * 64 + ".safetensors")
    path.rename(other)
    with pytest.raises(Corrupt, match="the header is not the one that the file's name covers"):
        read_pack_info(other)


@pytest.mark.parametrize("is_sure", [True, False])
@pytest.mark.parametrize("size", [1, 100_001])
def test_a_tensor_without_bytes_may_be_the_last_one(tmp_path: Path, size: int, is_sure: bool) -> None:
    writer = PackWriter(tmp_path, [("float32", [size]), ("float32", [0])])
    for length in (size, 0):
        data = np.ones(length, np.float32).tobytes()
        name = tensor_digest("float32", [length], memoryview(data))
        writer.add(name, "float32", [length], data=memoryview(data), is_sure=is_sure)
    info = writer.finish(tmp_path / "packs")
    path = pack_path(tmp_path / "packs", info.digest)
    assert path.stat().st_size == info.size
    assert read_pack_info(path) == info
    assert [tensor.shape for tensor in info.tensors] == [(0,), (size,)]
    with safetensors.safe_open(path, "np") as file:
        assert file.get_tensor(info.tensors[0].digest).shape == (0,)
