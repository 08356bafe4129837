"""Differences: every bit comes back, whatever the numbers; small changes take little; bad bytes are refused."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from registry.store import differences
from registry.store.errors import Corrupt
from registry.store.parallel import in_parallel


def run(jobs, work) -> None:  # type: ignore[no-untyped-def]
    in_parallel(jobs, work, [1 << 20] * len(jobs))


def there_and_back(new: bytes, old: bytes, size: int) -> bytes:
    coded = differences.encode(memoryview(new), memoryview(old), size, run)
    out = bytearray(len(new))
    decoding = differences.Decoding(memoryview(coded), memoryview(old), size, memoryview(out))
    run(range(decoding.chunks), decoding.work)
    assert bytes(out) == new
    return coded


@settings(max_examples=60)
@given(st.sampled_from([2, 4, 8]), st.integers(0, 300), st.randoms(use_true_random=False))
def test_any_bytes_come_back(size: int, count: int, random) -> None:  # type: ignore[no-untyped-def]
    new, old = random.randbytes(size * count), random.randbytes(size * count)
    there_and_back(new, old, size)
    there_and_back(old, old, size)


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_special_numbers_and_many_chunks_come_back(kind: type) -> None:
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, np.finfo(kind).max, np.finfo(kind).tiny], kind)
    old = np.resize(special, 2 * differences.CHUNK + 5)
    new = np.resize(special[::-1], len(old))
    there_and_back(new.tobytes(), old.tobytes(), new.itemsize)


def test_small_steps_take_little() -> None:
    torch.manual_seed(0)
    old = torch.randn(500_000) * 0.02
    new = old + 1e-5 * torch.randn_like(old)
    coded = there_and_back(new.numpy().tobytes(), old.numpy().tobytes(), 4)
    assert len(coded) < 4 * len(old) / 1.8
    same = there_and_back(old.numpy().tobytes(), old.numpy().tobytes(), 4)
    assert len(same) < 100
    old16, new16 = old.bfloat16(), new.bfloat16()
    as_bytes = [part.view(torch.uint8).numpy().tobytes() for part in (new16, old16)]
    assert len(there_and_back(*as_bytes, 2)) < 2 * len(old) / 5


def damaged() -> list[bytes]:
    old = np.arange(10, dtype=np.uint32)
    good = differences.encode((old + 300).data.cast("B"), old.data.cast("B"), 4, run)
    head = struct.Struct("<II")
    import zstandard

    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 26))
    table = struct.pack("<4I", len(bomb), 0, 0, 0)
    return [
        b"",
        good[:7],
        good[:20],
        good[:-1],
        good + b"x",
        head.pack(0, 1) + good[8:],
        head.pack(10, 2) + good[8:],
        head.pack(1 << 17, 1 << 30),
        head.pack(1 << 17, 1) + struct.pack("<4I", 5, 0, 0, 0) + b"12345",
        head.pack(1 << 17, 1) + table + bomb,
    ]


@pytest.mark.parametrize("coded", damaged(), ids=range(10))
def test_malformed_bytes_are_refused(coded: bytes) -> None:
    old = memoryview(bytes(40))
    with pytest.raises(Corrupt):
        decoding = differences.Decoding(memoryview(coded), old, 4, memoryview(bytearray(40)))
        run(range(decoding.chunks), decoding.work)
