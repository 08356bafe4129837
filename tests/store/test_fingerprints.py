"""Remembered digests: never another one than hashing gives, and no hashing where nothing has changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from registry.store import fingerprints as module
from registry.store.digest import ALL_CORES, digest, tensor_digest, tensor_hasher
from registry.store.fingerprints import Remembered
from registry.store.store import Store

VALUES = 2_048  # of float32: above the size from which on digests are remembered


class Seen:
    """One tensor that is saved again and again; counts how often it is hashed, and only compared."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch | None = None, count: int = VALUES) -> None:
        self.values = np.zeros(count, np.float32)
        self.remembered = Remembered()
        self.hashed = self.compared = 0
        if monkeypatch:
            for name in ("digest", "tensor_digest", "tensor_hasher"):
                monkeypatch.setattr(module, name, self._counted(getattr(module, name)))
            compare = Remembered.fingerprint

            def counted(remembered: Remembered, data: memoryview) -> bytes:
                self.compared += 1
                return compare(remembered, data)

            monkeypatch.setattr(Remembered, "fingerprint", counted)

    def digest(self) -> str:
        address = self.values.__array_interface__["data"][0]
        return self.remembered.find(
            address, "float32", self.values.shape, self.values.view(np.uint8).data
        ).digest

    def expected(self) -> str:
        return tensor_digest("float32", self.values.shape, self.values.view(np.uint8).data)

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
@pytest.mark.parametrize("count", [VALUES, 16 * VALUES], ids=["small", "large"])
def test_values_that_change_while_they_are_hashed_are_not_taken_for_those_that_were(
    monkeypatch: pytest.MonkeyPatch, moment: str, come_back: bool, count: int
) -> None:
    """Another thread swaps averaged weights in, and back again, say."""
    seen = Seen(count=count)

    def digest_meanwhile(data: bytes) -> str:
        seen.values[:] += moment == "before"
        found = digest(data)
        seen.values[:] += moment == "behind"
        return found

    with monkeypatch.context() as patched:
        patched.setattr(
            module, "tensor_hasher", lambda *given: Meddling(tensor_hasher(*given), seen.values, moment)
        )
        patched.setattr(module, "digest", digest_meanwhile)
        seen.digest()
        assert seen.values.any()
    seen.values -= come_back
    assert seen.digest() == seen.expected()


def test_another_type_or_shape_at_the_same_place_is_another_tensor() -> None:
    seen = Seen()
    data, address = seen.values.view(np.uint8).data, seen.values.__array_interface__["data"][0]
    views = [("float32", (VALUES,)), ("float32", (2, VALUES // 2)), ("int32", (VALUES,))] * 2
    found = [seen.remembered.find(address, dtype, shape, data).digest for dtype, shape in views]
    assert found == [tensor_digest(dtype, shape, data) for dtype, shape in views]


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST", 10)
    remembered = Remembered()
    data = memoryview(bytes(2 * module.SMALLEST))
    for address in range(1, 101):
        remembered.find(address, "uint8", (len(data),), data)
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
            found = remembered.find(1, "uint8", (len(data),), data, threads=threads)
            assert found.digest == tensor_digest("uint8", (len(data),), data)


@pytest.mark.parametrize("threads", [1, ALL_CORES])
def test_what_is_given_on_has_the_digest_whatever_another_thread_does(
    monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    values = np.zeros(6_000_000, np.float32)
    data, given = values.view(np.uint8).data, bytearray()
    monkeypatch.setattr(
        module, "tensor_hasher", lambda *given: Meddling(tensor_hasher(*given), values, "before")
    )
    found = Remembered().find(
        1, "float32", values.shape, data, threads=threads, is_live=True, use=given.extend
    )
    assert len(set(np.frombuffer(given, np.float32))) > 1
    assert found.digest == tensor_digest("float32", values.shape, memoryview(given))


def test_a_small_tensor_that_changes_is_described_by_the_copy_that_is_given_on() -> None:
    seen, kept = Seen(), []

    def keep(part: memoryview) -> None:
        kept.append(part)
        seen.values[:] += 1

    address, data = seen.values.__array_interface__["data"][0], seen.values.view(np.uint8).data
    found = seen.remembered.find(address, "float32", (VALUES,), data, is_live=True, use=keep)
    (part,) = kept
    assert bytes(part) == bytes(4 * VALUES)
    assert found.digest == tensor_digest("float32", (VALUES,), part)
    assert found.fingerprint == seen.remembered.fingerprint(part)


def test_nothing_is_given_on_of_what_is_remembered() -> None:
    seen, given = Seen(), bytearray()
    seen.digest()
    address, data = seen.values.__array_interface__["data"][0], seen.values.view(np.uint8).data
    found = seen.remembered.find(address, "float32", (VALUES,), data, is_live=True, use=given.extend)
    assert (found.digest, bytes(given)) == (seen.expected(), b"")
    check = seen.remembered.fingerprinting()
    check.update(data)
    assert found.fingerprint == check.digest()


@pytest.mark.parametrize("count", [VALUES, 16 * VALUES], ids=["small", "large"])
def test_a_fingerprint_is_that_of_the_bytes_with_the_digest(count: int) -> None:
    seen = Seen(count=count)
    digest, address = seen.digest(), seen.values.__array_interface__["data"][0]
    assert seen.remembered.fingerprint_of(
        digest, address, "float32", (count,)
    ) == seen.remembered.fingerprint(seen.values.tobytes())
    assert seen.remembered.fingerprint_of("0" * 64, address, "float32", (count,)) is None
    assert seen.remembered.fingerprint_of(digest, address, "int32", (count,)) is None
