"""Differences: every bit comes back, whatever the numbers; small changes take little; bad bytes are refused."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from pcodec import ChunkConfig, DeltaSpec, ModeSpec
from pcodec.wrapped import FileCompressor

from registry.store import classes, differences, planes, splitting
from registry.store.errors import Corrupt
from registry.store.pack import version_of
from registry.store.parallel import in_parallel

Encode = Callable[[memoryview, memoryview, int], bytes]


def run(jobs: Any, work: Callable[[Any], None]) -> None:
    in_parallel(jobs, work, [1 << 20] * len(jobs))


def in_planes(data: memoryview, base: memoryview, size: int) -> bytes:
    return planes.encode(data, base, size, run)


def in_one_class(data: memoryview, base: memoryview, size: int) -> bytes:
    return classes.encode(data, base, size, run, limits=b"")


def in_classes(data: memoryview, base: memoryview, size: int) -> bytes:
    return classes.encode(data, base, size, run, limits=classes.limits_of(base, size))


def as_floats(data: memoryview, base: memoryview, size: int) -> bytes:
    return differences.encode(data, base, size, run, is_float=True)


def as_others(data: memoryview, base: memoryview, size: int) -> bytes:
    return differences.encode(data, base, size, run, is_float=False)


CODINGS = [
    *((in_planes, size) for size in differences.ITEM_SIZES),
    *((code, size) for code in (in_one_class, in_classes) for size in classes.ITEM_SIZES),
    *((code, size) for code in (as_floats, as_others) for size in differences.ITEM_SIZES),
]
"""Codings, and bytes of an element that each takes."""


WAYS = [way for way in (splitting.BY_NUMPY, splitting.COMPILED) if way]


def decoded(coded: bytes, old: bytes, size: int) -> bytes:
    """What comes back in each way, also where it takes the place of its base."""
    found: set[bytes] = set()
    refused: list[Corrupt] = []
    for way in WAYS:
        out, same = bytearray(len(old)), bytearray(old)
        with patch.object(classes, "WAY", way):
            try:
                for base, into in ((memoryview(old), out), (memoryview(same), same)):
                    decoding = differences.decoding(memoryview(coded), base, size, memoryview(into))
                    run(range(decoding.chunks), decoding.work)
            except Corrupt as error:
                refused.append(error)
            else:
                found |= {bytes(out), bytes(same)}
    if refused:
        assert not found
        assert len({str(error) for error in refused}) == 1
        raise refused[0]
    (one,) = found
    return one


def there_and_back(new: bytes, old: bytes, size: int, code: Encode = as_floats) -> bytes:
    coded = code(memoryview(new), memoryview(old), size)
    assert decoded(coded, old, size) == new
    return coded


@settings(max_examples=100)
@given(st.sampled_from(CODINGS), st.integers(0, 2_000), st.randoms(use_true_random=False), st.floats(0, 1))
def test_any_bytes_come_back(coding: tuple[Encode, int], count: int, random: Any, changed: float) -> None:
    code, size = coding
    old = random.randbytes(size * count)
    new = b"".join(
        random.randbytes(size) if random.random() < changed else old[i : i + size]
        for i in range(0, len(old), size)
    )
    there_and_back(new, old, size, code)
    there_and_back(old, old, size, code)


@settings(max_examples=60)
@given(
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]),
    st.lists(st.floats(width=16) | st.sampled_from([0.0, -0.0, 1e-40, -1e-45, 5e-324]), max_size=50),
    st.lists(st.floats(width=32), max_size=50),
    st.integers(1, 3_000),
)
def test_any_numbers_come_back(dtype: torch.dtype, old: list[float], new: list[float], count: int) -> None:
    tensors = [torch.tensor(np.resize(part or [1.0], count)).to(dtype) for part in (new, old)]
    data, base = (tensor.view(torch.uint8).numpy().tobytes() for tensor in tensors)
    for code, size in CODINGS:
        if size == dtype.itemsize:
            there_and_back(data, base, size, code)


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("code", [in_planes, in_one_class, in_classes, as_floats])
def test_special_numbers_and_many_chunks_come_back(kind: type, code: Encode) -> None:
    if (code, np.dtype(kind).itemsize) not in CODINGS:
        return
    tiny = np.finfo(kind).smallest_subnormal
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, np.finfo(kind).max, tiny, 5 * tiny], kind)
    old = np.resize(special, 2 * classes.BLOCK + 5)
    new = np.resize(special[::-1], len(old))
    there_and_back(new.tobytes(), old.tobytes(), new.itemsize, code)
    new[: classes.BLOCK + 3] = old[: classes.BLOCK + 3]
    there_and_back(new.tobytes(), old.tobytes(), new.itemsize, code)


def moved(dtype: torch.dtype, count: int = 500_000) -> tuple[bytes, bytes]:
    """Parameters that a training has moved a little, and what they were."""
    torch.manual_seed(0)
    old = torch.randn(count) * 0.02
    new = old + 1e-5 * torch.randn_like(old)
    data, base = (part.to(dtype).view(torch.uint8).numpy().tobytes() for part in (new, old))
    return data, base


def test_small_steps_take_little() -> None:
    for dtype, most in ((torch.float32, 0.5), (torch.bfloat16, 0.07), (torch.float64, 0.4)):
        data, base = moved(dtype)
        coded = there_and_back(data, base, dtype.itemsize)
        assert len(coded) < most * len(data)
        if dtype.itemsize in classes.ITEM_SIZES:
            # Which parameters have moved depends on how large they were.
            alone = [in_planes, in_one_class]
            others = [len(code(memoryview(data), memoryview(base), dtype.itemsize)) for code in alone]
            assert len(coded) < 0.98 * min(others)
    assert len(there_and_back(base, base, 8)) < 200


def test_each_tensor_has_the_coding_that_suits_it() -> None:
    data, base = (np.frombuffer(part, np.uint16) for part in moved(torch.bfloat16))
    # Every ninth row is new: zstd sees the rows, which pcodec does not.
    rows = base.copy().reshape(-1, 500)
    rows[::9] = np.random.default_rng(0).integers(0, 1 << 16, rows[::9].shape)
    coded = there_and_back(rows.tobytes(), base.tobytes(), 2)
    assert version_of(memoryview(coded)) == 1
    for dtype, version in ((torch.float32, 2), (torch.float16, 2), (torch.float64, 1)):
        given_ = moved(dtype)
        assert version_of(memoryview(there_and_back(*given_, dtype.itemsize))) == version
        assert version_of(memoryview(there_and_back(*given_, dtype.itemsize, as_others))) == 1
    # A small tensor has one class.
    small = there_and_back(data[:20_000].tobytes(), base[:20_000].tobytes(), 2)
    assert small[4:6] == bytes([classes.CODER, 1])


def of_one_class(stream: bytes) -> bytes:
    head = struct.pack("<IBBII", 0, 2, 1, classes.BLOCK, len(stream))
    return head + bytes(FileCompressor().write_header()) + stream


def stream_of(values: Any, **how: Any) -> bytes:
    how = {"mode_spec": ModeSpec.classic(), "delta_spec": DeltaSpec.no_op(), **how}
    coder = FileCompressor().chunk_compressor(values, ChunkConfig(**how))
    return bytes(coder.write_meta()) + bytes(coder.write_page(0))


def damaged() -> dict[str, bytes]:
    old = np.arange(10, dtype=np.uint32)
    good = in_planes((old + 300).data.cast("B"), old.data.cast("B"), 4)
    head = struct.Struct("<II")
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 26))
    table = struct.pack("<4I", len(bomb), 0, 0, 0)
    steps = np.arange(10, dtype=np.int32)
    fine = of_one_class(stream_of(steps))
    constant = stream_of(np.full(10, 7, np.int32))
    second = struct.Struct("<IBBI")
    block = classes.BLOCK
    return {
        "empty": b"",
        "no head": good[:7],
        "no planes": good[:20],
        "cut": good[:-1],
        "longer": good + b"x",
        "no chunks": head.pack(0, 1) + good[8:],
        "more chunks": head.pack(10, 2) + good[8:],
        "very many chunks": head.pack(1 << 17, 1 << 30),
        "no zstd": head.pack(1 << 17, 1) + struct.pack("<4I", 5, 0, 0, 0) + b"12345",
        "a bomb": head.pack(1 << 17, 1) + table + bomb,
        "classes: no head": fine[:9],
        "classes: no table": fine[:12],
        "classes: no streams": fine[:14],
        "classes: cut": fine[:-1],
        "classes: longer": fine + b"x",
        "classes: another coder": second.pack(0, 3, 1, block) + fine[10:],
        "classes: none": second.pack(0, 2, 0, block) + fine[10:],
        "classes: many": second.pack(0, 2, 255, block) + fine[10:],
        "classes: no block": second.pack(0, 2, 1, 0) + fine[10:],
        "classes: tiny blocks": second.pack(0, 2, 1, 1) + fine[10:],
        "classes: a huge block": second.pack(0, 2, 1, (1 << 20) + 1) + fine[10:],
        "classes: a huge stream": fine[:10] + struct.pack("<I", 0xFFFFFFFF) + fine[14:],
        "classes: not in order": second.pack(0, 2, 3, block) + b"\x07\x07" + bytes(12) + fine[14:16],
        "classes: a newer pcodec": fine[:14] + b"\xff\xff" + fine[16:],
        "classes: no elements of it": second.pack(0, 2, 2, block)
        + b"\x01"
        + struct.pack("<II", 0, len(constant))
        + fine[14:16]
        + constant,
        "classes: too many numbers": of_one_class(stream_of(np.arange(600, dtype=np.int32))),
        "classes: others": of_one_class(stream_of(np.arange(10, dtype=np.int16))),
        "classes: differences of differences": of_one_class(
            stream_of(steps, delta_spec=DeltaSpec.try_consecutive(1))
        ),
        "classes: a look far back": of_one_class(stream_of(steps, delta_spec=DeltaSpec.try_lookback())),
        "classes: no pcodec": of_one_class(b"\x00" * 7),
    }


@pytest.mark.parametrize("coded", damaged().values(), ids=damaged())
def test_malformed_bytes_are_refused(coded: bytes) -> None:
    with pytest.raises(Corrupt) as caught:
        decoded(coded, bytes(40), 4)
    assert "\n" not in str(caught.value)


def test_elements_of_other_sizes_have_no_classes() -> None:
    data, base = moved(torch.float32, 1_000)
    coded = in_classes(memoryview(data), memoryview(base), 4)
    with pytest.raises(Corrupt, match="elements of 8 bytes"):
        differences.decoding(memoryview(coded), memoryview(base), 8, memoryview(bytearray(base)))


@settings(max_examples=400)
@given(
    st.sampled_from([torch.bfloat16, torch.float32]),
    st.lists(st.tuples(st.integers(0, 400) | st.integers(0, 1 << 20), st.integers(0, 255)), max_size=4),
    st.integers(0, 1 << 20) | st.none(),
)
def test_changed_bytes_give_other_numbers_or_are_refused(
    dtype: torch.dtype, changes: list[tuple[int, int]], cut: int | None
) -> None:
    data, base = moved(dtype, 3_000)
    coded = bytearray(in_classes(memoryview(data), memoryview(base), dtype.itemsize))
    for place, value in changes:
        coded[place % len(coded)] = value
    if cut is not None:
        del coded[cut % len(coded) :]
    try:
        decoded(bytes(coded), base, dtype.itemsize)
    except Corrupt as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("item_size", [1, 16])
def test_a_difference_of_elements_that_have_none_is_damage(item_size: int) -> None:
    coded = planes.encode(memoryview(bytes(64)), memoryview(bytes(64)), 4, run)
    with pytest.raises(Corrupt, match="cannot be"):
        planes.Decoding(memoryview(coded), memoryview(bytes(64)), item_size, memoryview(bytearray(64)))
