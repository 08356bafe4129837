"""Remembered digests: never another one than hashing gives, and no hashing where nothing has changed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from registry.store import fingerprints as module
from registry.store.digest import ALL_CORES, tensor_digest, tensor_hasher
from registry.store.fingerprints import Copies, Remembered
from registry.store.store import Store

VALUES = 2_048  # of float32: above the size from which on digests are remembered


class Seen:
    """One tensor that is saved again and again; counts how often it is hashed, and only compared."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch | None = None) -> None:
        self.values = np.zeros(VALUES, np.float32)
        self.remembered = Remembered()
        self.hashed = self.compared = 0
        if monkeypatch:
            for name in ("tensor_digest", "tensor_hasher"):
                monkeypatch.setattr(module, name, self._counted(getattr(module, name)))
            compare = Remembered._fingerprint

            def counted(remembered: Remembered, data: memoryview, into: memoryview | None = None) -> bytes:
                self.compared += 1
                return compare(remembered, data, into)

            monkeypatch.setattr(Remembered, "_fingerprint", counted)

    def digest(self) -> str:
        address = self.values.__array_interface__["data"][0]
        return self.remembered.digest(address, "float32", (VALUES,), self.values.view(np.uint8).data)

    def expected(self) -> str:
        return tensor_digest("float32", (VALUES,), self.values.view(np.uint8).data)

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def count(*given: Any, **named: Any) -> Any:
            self.hashed += 1
            return function(*given, **named)

        return count


class Meddling:
    """A hasher during whose work another thread changes the values."""

    def __init__(self, hasher: Any, values: Any, moment: str) -> None:
        self.hasher, self.values, self.moment = hasher, values, moment

    def update(self, part: memoryview) -> None:
        self.values += self.moment == "before"
        self.hasher.update(part)
        self.values += self.moment == "behind"

    def hexdigest(self) -> str:
        return str(self.hasher.hexdigest())


@given(st.lists(st.sampled_from([0.0, 0.0, 1.0, -0.0]), min_size=1, max_size=12))
def test_the_digest_is_always_that_of_the_bytes(history: list[float]) -> None:
    seen = Seen()
    for value in history:
        seen.values[VALUES // 2] = value
        assert seen.digest() == seen.expected()


def test_what_stays_is_hashed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Seen(monkeypatch)
    assert len({seen.digest() for _ in range(5)}) == 1
    assert (seen.hashed, seen.compared) == (1, 4)


def test_what_changes_every_time_is_not_read_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Seen(monkeypatch)
    for i in range(10):
        seen.values += 1
        assert seen.digest() == seen.expected(), i
    assert (seen.hashed, seen.compared) == (10, 1)


def test_what_stops_changing_is_remembered_again(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Seen(monkeypatch)
    for _ in range(3):
        seen.values += 1
        seen.digest()
    for _ in range(10):
        assert seen.digest() == seen.expected()
    assert seen.hashed == 3 + 2  # once to see that it has stopped, once to remember it


@pytest.mark.parametrize("moment", ["before", "behind"])
@pytest.mark.parametrize("come_back", [False, True])
def test_values_that_change_while_they_are_hashed_are_not_taken_for_those_that_were(
    monkeypatch: pytest.MonkeyPatch, moment: str, come_back: bool
) -> None:
    """Another thread swaps averaged weights in, and back again, say."""
    seen = Seen()
    with monkeypatch.context() as patched:
        patched.setattr(
            module, "tensor_hasher", lambda *given: Meddling(tensor_hasher(*given), seen.values, moment)
        )
        seen.digest()
    seen.values -= come_back
    assert seen.digest() == seen.expected()


def test_another_type_or_shape_at_the_same_place_is_another_tensor() -> None:
    seen = Seen()
    data, address = seen.values.view(np.uint8).data, seen.values.__array_interface__["data"][0]
    views = [("float32", (VALUES,)), ("float32", (2, VALUES // 2)), ("int32", (VALUES,))] * 2
    found = [seen.remembered.digest(address, dtype, shape, data) for dtype, shape in views]
    assert found == [tensor_digest(dtype, shape, data) for dtype, shape in views]


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST", 10)
    remembered = Remembered()
    data = memoryview(bytes(2 * module.SMALLEST))
    for address in range(1, 101):
        remembered.digest(address, "uint8", (len(data),), data)
        assert len(remembered._entries) <= 10


def test_a_save_sees_every_change_however_it_was_made(tmp_path: Path) -> None:
    """Not only those that PyTorch counts in a tensor's version."""
    store = Store(tmp_path)
    weight = torch.zeros(VALUES)
    before = weight._version
    for number, change in enumerate(
        [
            lambda: None,
            lambda: None,
            lambda: weight.data.add_(1),
            lambda: None,
            lambda: np.copyto(weight.numpy()[-1:], 5),
            lambda: weight.untyped_storage().fill_(1),
        ]
    ):
        change()
        stored = store.put({"model": {"weight": weight}}, {"number": number})
        assert torch.equal(store.get(stored.digest)["model"]["weight"], weight)
    assert weight._version == before


def test_a_tensor_of_many_parts_has_the_same_digest() -> None:
    data = memoryview(np.random.default_rng(0).bytes(20_000_000))
    for threads in (1, ALL_CORES):
        remembered = Remembered()
        for _ in range(2):
            found = remembered.digest(1, "uint8", (len(data),), data, threads=threads)
            assert found == tensor_digest("uint8", (len(data),), data)


def test_memory_for_copies_is_lent_to_one_tensor_at_a_time_and_used_again() -> None:
    pool = Copies()
    first, second = pool.take(1_000_000), pool.take(1_000_000)
    assert first.obj is not second.obj
    pool.give_back(first)
    again = pool.take(600_000)
    assert (again.obj, len(again)) == (first.obj, 600_000)
    assert pool.take(1_000_000).obj is not first.obj
    pool.give_back(again)
    assert pool.take(100).obj is not first.obj  # small tensors do not keep large memory
    assert pool.take(2_000_000).obj is not first.obj


def test_little_memory_is_kept_for_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_KEPT", 3_000_000)
    pool = Copies()
    taken = [pool.take(1_000_000) for _ in range(10)]
    for memory in taken:
        pool.give_back(memory)
    assert sum(map(len, pool._free.values())) <= 3_000_000
    assert pool.take(1_000_000).obj is taken[-1].obj  # what was used last, and is still in the cache


def test_threads_never_share_memory_for_copies() -> None:
    pool = Copies()

    def work(number: int) -> None:
        for size in (5_000, 9_000, 7_000) * 300:
            values = np.frombuffer(pool_memory := pool.take(size), np.uint8)
            values[:] = number
            assert (values == number).all()
            pool.give_back(pool_memory)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(8)))
