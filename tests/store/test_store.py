"""The store facade: what goes in comes out, once."""

from __future__ import annotations

from pathlib import Path

import torch

from registry.store.store import Store


def test_equal_tensors_are_stored_once(tmp_path: Path) -> None:
    store = Store(tmp_path)
    weights = torch.randn(100, 100)
    first = store.put({"model": {"w": weights, "again": weights.clone()}})
    second = store.put({"model": {"w": weights.clone()}})
    assert first.pack is not None
    assert len(first.pack.tensors) == 1
    assert second.pack is None
    assert torch.equal(store.get(second.digest)["model"]["w"], weights)
