"""Stored tensors copied into live ones."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from registry import Registry
from registry.store import filling, parallel
from registry.store.store import Store

CHECK = pytest.mark.parametrize("verify", [True, False])


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copy in small parts, on several threads."""
    monkeypatch.setattr(filling, "_PART", 1_000)
    monkeypatch.setattr(filling, "_FEW", 500)
    monkeypatch.setattr(parallel, "SMALL", 1)


@CHECK
def test_live_tensors_of_all_kinds_are_filled(tmp_path: Path, verify: bool) -> None:
    store = Store(tmp_path)
    chance = torch.Generator().manual_seed(0)
    values = {f"w{size}": torch.randn(size, generator=chance) for size in (0, 1, 249, 250, 251, 500, 10_000)}
    values |= {f"s{i}": torch.tensor(float(i)) for i in range(600)}
    values |= {
        "halves": torch.randn(3, 700, generator=chance).bfloat16(),
        "flags": torch.randn(2_001, generator=chance) > 0,
        "pairs": torch.randn(601, generator=chance).to(torch.complex64),
        "columns": torch.randn(70, 90, generator=chance),
        "every other": torch.randn(900, generator=chance),
        "conjugates": torch.randn(300, generator=chance).to(torch.complex64),
    }
    digest = store.put({"model": values}).digest
    live = {name: torch.zeros_like(tensor) for name, tensor in values.items()}
    live["columns"] = torch.zeros(90, 70).t()
    live["every other"] = torch.zeros(1_800)[::2]
    live["conjugates"] = torch.zeros(300, dtype=torch.complex64).conj()
    store.load_into(digest, {"model": live}, verify=verify)
    assert all(torch.equal(live[name], tensor) for name, tensor in values.items())


@CHECK
@pytest.mark.parametrize("last", ["a", "b"])
def test_of_live_tensors_that_overlap_the_last_one_counts(tmp_path: Path, verify: bool, last: str) -> None:
    store = Store(tmp_path)
    digest = store.put({"model": {"a": torch.full((20_000,), 1.0), "b": torch.full((20_000,), 2.0)}}).digest
    shared = np.zeros(30_000, np.float32)
    live = {"a": torch.from_numpy(shared[:20_000]), "b": torch.from_numpy(shared[10_000:])}
    first = "b" if last == "a" else "a"
    store.load_into(digest, {"model": {name: live[name] for name in (first, last)}}, verify=verify)
    assert (shared == np.repeat([1.0, 1.0 if last == "a" else 2.0, 2.0], 10_000)).all()


@CHECK
def test_a_backward_pass_notices_that_what_it_needs_was_filled_meanwhile(
    tmp_path: Path, verify: bool
) -> None:
    store = Store(tmp_path)
    digest = store.put({"model": {"w": torch.ones(1_000)}}).digest
    w = torch.zeros(1_000, requires_grad=True)
    loss = (w * w).sum()
    store.load_into(digest, {"model": {"w": w}}, verify=verify)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("seed", range(30))
def test_live_tensors_that_share_memory_are_found(seed: int) -> None:
    chance = random.Random(seed)
    room = np.zeros(60, np.uint8)
    starts = [chance.randrange(50) for _ in range(chance.randrange(1, 12))]
    live = {i: torch.from_numpy(room[at : at + chance.randrange(1, 10)]) for i, at in enumerate(starts)}
    taken = {i: set(range(starts[i], starts[i] + len(tensor))) for i, tensor in live.items()}
    sharing = {i for i in taken if any(taken[i] & taken[other] for other in taken if other != i)}
    assert filling._sharing({i: tensor.untyped_storage() for i, tensor in live.items()}) == sharing


@CHECK
def test_tensors_that_were_made_in_inference_mode_are_filled(tmp_path: Path, verify: bool) -> None:
    store, values = Store(tmp_path), {"a": torch.ones(1_000), "b": torch.full((1_000,), 2.0)}
    with torch.inference_mode():
        live = {"a": torch.zeros(1_000), "b": torch.zeros(1_000)}
    # Tied tensors are filled in another way, and no others.
    values |= {"tied": torch.full((1_000,), 3.0), "tied too": torch.full((1_000,), 3.0)}
    live["tied"] = live["tied too"] = torch.zeros(1_000)
    digest = store.put({"model": values}).digest
    store.load_into(digest, {"model": live}, verify=verify)
    assert all(torch.equal(live[name], tensor) for name, tensor in values.items())


@pytest.mark.parametrize("how", ["non-contiguous", "twice"])
def test_tensors_of_inference_mode_that_are_filled_one_by_one(tmp_path: Path, how: str) -> None:
    checkpoint = Registry(tmp_path).save(
        "net", {"model": {"a": torch.arange(12.0).view(3, 4), "b": torch.ones(3, 4)}}
    )
    with torch.inference_mode():
        live = torch.zeros(4, 3).T if how == "non-contiguous" else torch.zeros(3, 4)
    normal = torch.zeros(4, 3).T
    checkpoint.load_into(model={"a": live, "b": live if how == "twice" else normal})
    assert torch.equal(live, torch.ones(3, 4) if how == "twice" else torch.arange(12.0).view(3, 4))
    assert how == "twice" or torch.equal(normal, torch.ones(3, 4))


def _networks(seed: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Live tensors of all kinds, and what is copied into them in this order."""
    chance = torch.Generator().manual_seed(seed)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=chance)

    tied, own, bytes_of = some(900), some(3_000), some(2_000)
    pairs = [
        (some(5_000).requires_grad_(), some(5_000)),
        (some(40, 50), some(40, 50)),
        (some(40, 50).T, some(50, 40)),
        (some(40, 50), some(50, 40).T),
        (some(700), some(700).double()),
        (some(700).bfloat16(), some(700).bfloat16()),
        (some(30, 40), some(40)),
        (some(601).to(torch.complex64), some(601).to(torch.complex64).conj()),
        (some(3_000) > 0, some(3_000) > 0),
        (torch.tensor(3), torch.tensor(4)),
        (some(0), some(0)),
        # The last one counts.
        (tied, some(900)),
        (tied[100:], some(800)),
        (tied[::2], some(450)),
        # One reads what the one before it writes.
        (own[:1_000], some(1_000)),
        (some(1_000), own[:1_000]),
        (own[1_000:2_000], some(1_000)),
        (some(1_000).double(), own[1_000:2_000]),
        (some(500), bytes_of[:1_000:2]),
        (bytes_of, some(2_000)),
    ]
    return [target for target, _ in pairs], [source for _, source in pairs]


def test_any_tensors_are_copied_one_after_the_other_as_they_were_before() -> None:
    targets, sources = _networks(0)
    expected, same = _networks(0)
    same = [source.clone() for source in same]
    versions = [target._version for target in targets]
    filling.copy_all(targets, sources)
    with torch.no_grad():
        for target, source in zip(expected, same, strict=True):
            target.copy_(source)
    for place, (target, right) in enumerate(zip(targets, expected, strict=True)):
        assert torch.equal(target, right), place
    assert all(target._version > version for target, version in zip(targets, versions, strict=True))
    assert targets[0].requires_grad
    assert targets[0].is_leaf


def test_large_tensors_are_copied_as_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[int] = []
    copy = filling._copy

    def copying(part: list[filling.Copy]) -> None:
        copied.extend(len(target) for target, _ in part)
        copy(part)

    monkeypatch.setattr(filling, "_copy", copying)
    few, many = torch.zeros(100), torch.zeros(10_000, requires_grad=True)
    filling.copy_all([few, many], [torch.ones(100), torch.ones(10_000)])
    assert sum(copied) == 40_000
    assert few.sum() + many.sum() == 10_100


@pytest.mark.parametrize("count", [10, 100_000])
def test_a_tensor_of_inference_mode_is_filled_outside_of_it(count: int) -> None:
    with torch.inference_mode():
        live = torch.zeros(count)
    filling.copy_all([live], [torch.ones(count)])
    assert bool((live == 1).all())


def test_a_tensor_of_another_class_is_copied_in_its_own_way() -> None:
    called: list[str] = []

    class Odd(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.append(getattr(func, "__name__", ""))
            return super().__torch_function__(func, types, args, kwargs or {})

    live = torch.zeros(10_000).as_subclass(Odd)
    filling.copy_all([live], [torch.ones(10_000)])
    assert "copy_" in called
    assert live.sum() == 10_000
