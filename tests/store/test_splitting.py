"""Splitting and joining: compiled and by numpy the same bits, every element in its class, nothing outside a buffer."""

from __future__ import annotations

import sys
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from registry.store import classes, splitting
from registry.store.errors import Corrupt
from registry.store.splitting import BY_NUMPY, COMPILED, Way

WAYS = [way for way in (BY_NUMPY, COMPILED) if way]
compiled = pytest.mark.skipif(COMPILED is None, reason="no compiler built it")
if COMPILED:
    from registry.store import _split

KINDS = [np.dtype(np.uint16), np.dtype(np.uint32)]
LIMITS = st.sets(st.integers(1, 255), max_size=255).map(lambda limits: bytes(sorted(limits)))


def elements(kind: Any, exponents: Any, seed: int = 0) -> Any:
    """Elements with these exponents, and anything around them."""
    random = np.random.default_rng(seed)
    shift = 7 if kind.itemsize == 2 else 23
    rest = random.integers(0, 1 << 8 * kind.itemsize, len(exponents), dtype=kind)
    return rest & kind.type(~(0xFF << shift) % (1 << 8 * kind.itemsize)) | np.array(exponents, kind) << shift


def expected(new: Any, old: Any, limits: bytes) -> list[list[int]]:
    """The differences of each class, one element at a time."""
    bits = 8 * old.itemsize
    parts: list[list[int]] = [[] for _ in range(len(limits) + 1)]
    for after, before in zip(new.tolist(), old.tolist(), strict=True):
        exponent = before >> (7 if bits == 16 else 23) & 0xFF
        parts[sum(limit <= exponent for limit in limits)].append((after - before) % (1 << bits))
    return parts


def joined(way: Way, old: Any, limits: bytes, parts: Any) -> Any:
    """What `way` joins, with None for each class of zeros."""

    def reader(part: Any) -> Any:
        if not np.any(part):
            return None

        def read(into: Any) -> None:
            # Assigning checks the length, too.
            into.view(old.dtype)[...] = np.array(part, old.dtype).reshape(len(into))

        return read

    out = np.empty_like(old)
    way.join(old, limits, [reader(part) for part in parts], out)
    same = old.copy()
    way.join(same, limits, [reader(part) for part in parts], same)
    assert out.tobytes() == same.tobytes()
    return out


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
@settings(max_examples=150)
@given(
    kind=st.sampled_from(KINDS),
    count=st.integers(0, 700) | st.sampled_from([255, 256, 257, 511, 512, 513]),
    exponents=st.lists(
        st.integers(0, 255) | st.sampled_from([0, 119, 120, 121, 255]), min_size=1, max_size=20
    ),
    limits=LIMITS | st.just(b"\x78") | st.just(b"\x77\x78\x79"),
    seed=st.integers(0, 1 << 30),
    moved=st.sampled_from([0.0, 0.2, 1.0]),
)
def test_every_element_is_in_its_class_and_comes_back(
    way: Way, kind: Any, count: int, exponents: list[int], limits: bytes, seed: int, moved: float
) -> None:
    random = np.random.default_rng(seed)
    old = elements(kind, random.choice(exponents, count), seed)
    other = random.integers(0, 1 << 8 * kind.itemsize, len(old), dtype=kind)
    new = np.where(random.random(len(old)) < moved, other, old)
    parts = way.split(new, old, limits)
    assert all(part.dtype == np.dtype(f"i{kind.itemsize}") for part in parts)
    assert [part.view(kind).tolist() for part in parts] == expected(new, old, limits)
    assert joined(way, old, limits, parts=[part.view(kind) for part in parts]).tobytes() == new.tobytes()


@compiled
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 255, 256, 257, classes.BLOCK, 2 * classes.BLOCK + 5])
def test_both_ways_make_the_same_bytes_and_read_them(kind: Any, count: int) -> None:
    random = np.random.default_rng(count)
    floats = random.normal(scale=0.02, size=count).astype(np.float32)
    old = floats.view(np.uint32) if kind.itemsize == 4 else (floats.view(np.uint32) >> 16).astype(kind)
    new = old + random.integers(-1, 2, count).astype(kind)
    data, base = (memoryview(part.tobytes()) for part in (new, old))
    limits = classes.limits_of(base, kind.itemsize)
    coded = []
    for way in WAYS:
        with patch.object(classes, "WAY", way):
            coded.append(classes.encode(data, base, kind.itemsize, one_by_one, limits=limits))
    assert coded[0] == coded[1]
    for way in WAYS:
        with patch.object(classes, "WAY", way):
            out = bytearray(len(base))
            decoding = classes.Decoding(memoryview(coded[0]), base, kind.itemsize, memoryview(out))
            one_by_one(range(decoding.chunks), decoding.work)
            assert out == data


def one_by_one(jobs: Any, work: Any) -> None:
    for job in jobs:
        work(job)


def test_what_a_compiler_built_is_used() -> None:
    assert classes.WAY is (COMPILED or BY_NUMPY)


@compiled
def test_memory_of_any_alignment() -> None:
    for kind in KINDS:
        memory = bytearray(np.random.default_rng(0).bytes(100 * kind.itemsize + 1))
        odd = np.frombuffer(memory, kind, offset=1)
        even = odd.copy()
        for ways in (splitting._split_compiled, splitting._split_by_numpy):
            parts = ways(even[::-1].copy(), odd, b"\x40\x80")
            assert [part.tolist() for part in parts] == [
                part.tolist() for part in BY_NUMPY.split(even[::-1].copy(), even, b"\x40\x80")
            ]


@compiled
@pytest.mark.parametrize("kind", KINDS)
def test_wrong_counts_are_noticed_and_nothing_outside_is_read(kind: Any) -> None:
    old = elements(kind, [1] * 2 + [9] * 298)
    room = np.zeros(600, kind)
    room[300:] = 7
    out = np.zeros_like(old)
    for counts in ((1, 299), (3, 297), (2, 297), (300, 0), (0, 300)):
        with pytest.raises(ValueError, match="another number of elements"):
            _split.join(old, b"\x05", counts, room[:300], out)
    for counts in ((2, 299), (301, 0), (-1, 301), (300, 1)):
        with pytest.raises(ValueError, match="more elements"):
            _split.join(old, b"\x05", counts, room[:300], out)
    out[:] = 0
    with pytest.raises(ValueError, match="another number of elements"):
        _split.join(old[2:], b"\x05", (298, 0), room[2:300], out[2:])
    assert not out.any()
    _split.join(old, b"\x05", (2, 298), room[:300], out)
    assert (out == old).all()


@compiled
def test_a_base_that_changes_meanwhile_is_noticed() -> None:
    assert COMPILED is not None
    for before, after in (([1] * 300 + [9] * 300, [9] * 600), ([1] * 300 + [9] * 300, [1] * 299 + [9] * 301)):
        old = elements(KINDS[0], before)

        def read(into: Any, old: Any = old, after: list[int] = after) -> None:
            into.fill(7)
            old[:] = elements(KINDS[0], after)

        with pytest.raises(Corrupt, match="another number of elements"):
            COMPILED.join(old, b"\x05", [read, None], np.empty_like(old))


SIZES = st.integers(0, 40)
BYTES = st.integers(0, 40).map(lambda count: bytes(range(count)))


@compiled
@settings(max_examples=1_500)
@given(
    sizes=st.tuples(SIZES, SIZES, SIZES) | SIZES.map(lambda size: (size, size, size)),
    kinds=st.tuples(*[st.sampled_from("BHIQhif")] * 3) | st.sampled_from("HI").map(lambda kind: (kind,) * 3),
    limits=BYTES | st.just(bytes(255)) | st.just(bytes(256)) | st.just(b"\x40"),
    counts=st.lists(st.integers(-2, 41) | st.just(1 << 70) | st.just((1 << 63) - 1), max_size=3).map(tuple)
    | st.none(),
    seed=st.integers(0, 100),
)
def test_wrong_lengths_are_refused_and_nothing_outside_is_written(
    sizes: tuple[int, ...], kinds: tuple[str, ...], limits: bytes, counts: Any, seed: int
) -> None:
    random = np.random.default_rng(seed)
    room = np.frombuffer(bytearray(random.bytes(8 * 60)), np.uint8)
    before = room.copy()
    length = np.dtype(kinds[2]).itemsize * sizes[2]
    out = room[40 : 40 + length].view(kinds[2])
    first, second = (
        np.frombuffer(random.bytes(np.dtype(kind).itemsize * size), kind)
        for kind, size in zip(kinds[:2], sizes[:2], strict=True)
    )
    for call in (
        lambda: _split.count(first, limits),
        lambda: _split.split(second, first, limits, out),
        lambda: _split.join(
            first, limits, _split.count(first, limits) if counts is None else counts, second, out
        ),
    ):
        try:
            call()
        except (ValueError, OverflowError) as error:
            assert "\n" not in str(error)
        else:
            assert first.itemsize in (2, 4)
            assert len(limits) < 256
        assert (room[:40] == before[:40]).all()
        assert (room[40 + length :] == before[40 + length :]).all()


@compiled
def test_what_is_no_array_is_refused_and_let_go() -> None:
    old = np.arange(10, dtype=np.uint16)
    limits = bytearray(b"\x01")
    fine = old.copy(), old.copy()
    counts = _split.count(old, limits)
    bad = [None, "text", old[::2], bytearray(20), old.astype(np.uint32), np.arange(11, dtype=np.uint16)]
    held = [sys.getrefcount(one) for one in (old, *fine)]
    for one in bad:
        for call in (
            lambda one=one: _split.split(one, old, limits, fine[0]),
            lambda one=one: _split.split(fine[0], old, limits, one),
            lambda one=one: _split.split(fine[0], one, limits, fine[1]),
            lambda one=one: _split.join(old, limits, counts, one, fine[0]),
            lambda one=one: _split.join(old, limits, counts, fine[1], one),
            lambda one=one: _split.join(old, limits, one, fine[1], fine[0]),
            lambda one=one: _split.join(one, limits, (*counts, 1), fine[1], fine[0]),
        ):
            with pytest.raises((ValueError, TypeError, BufferError)):
                call()
    for wrong in ((), (10,), (*counts, 0), (1.5, 8.5), ("a", "b")):
        with pytest.raises((ValueError, TypeError)):
            _split.join(old, limits, wrong, fine[1], fine[0])
    frozen = old.copy()
    frozen.flags.writeable = False
    with pytest.raises((ValueError, BufferError)):
        _split.split(fine[0], old, limits, frozen)
    assert [sys.getrefcount(one) for one in (old, *fine)] == held
    # A buffer that is still held could not be resized.
    memory = bytearray(old.tobytes())
    with pytest.raises(ValueError, match="2 or 4 bytes"):
        _split.count(memory, b"")
    memory.append(0)
    limits.append(0)


@compiled
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [0, 1, 1_023, 1_024, 1_025, 5_000])
def test_an_element_with_all_bits_of_a_mask_is_found_wherever_it_is(kind: Any, count: int) -> None:
    from registry.store import _split

    mask = 0x7F80 if kind.itemsize == 2 else 0x7F800000
    without_one = mask & (mask - 1)
    values = np.full(count, without_one, kind)
    assert not _split.any_with(values, mask)
    for place in {0, count // 2, count - 1} if count else ():
        values[place] = mask
        assert _split.any_with(values, mask)
        values[place] = without_one


@compiled
def test_bits_of_other_elements_are_refused() -> None:
    from registry.store import _split

    with pytest.raises(ValueError, match="elements have 2 or 4 bytes"):
        _split.any_with(np.zeros(3), 1)
    with pytest.raises(ValueError, match="begin at a multiple"):
        _split.any_with(np.frombuffer(bytes(9), np.uint32, offset=1), 1)
