"""Losses that were found once: each of these ended with acknowledged versions gone."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from support import Stepwise, all_versions, copy, is_state, save, state

from registry import Registry
from registry.garbage import GRACE, collect_garbage
from registry.store import durable
from registry.store.errors import RegistryError


def collect_twice(registry: Registry) -> None:
    """Two ordinary collections, more than a grace period apart."""
    for later in (1.1, 2.2):
        collect_garbage(registry, grace=GRACE, now=time.time() + later * GRACE)


def check_all_load(registry: Registry, names: list[str]) -> None:
    assert {version.name for version in all_versions(registry)} == set(names)
    for name in names:
        registry[name].load()
    assert [problem.message for problem in registry.verify().problems] == []
    registry.rebuild()
    assert {version.name for version in all_versions(registry)} == set(names)


# -- a pack that takes its own place -------------------------------------------------------------------------


def test_thinning_versions_that_share_a_small_backbone_keeps_all(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "r")
    names = []
    for n in (1, 2, 3):
        model = {"frozen": torch.arange(300.0), "head": torch.full((20,), float(n))}
        optimizer = {"state": {0: torch.full((20,), -float(n))}, "param_groups": []}
        names.append(registry.save("net", {"model": model, "optimizer": optimizer}).name)
    registry.thin("net:v1")
    registry.thin("net:v2")
    collect_twice(registry)
    check_all_load(registry, names)


def test_equal_saves_then_thin_then_gc_keeps_both(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "r")
    tree = {"model": {"w": torch.arange(300.0)}, "optimizer": {"state": {0: torch.ones(9)}, "param_groups": []}}
    names = [registry.save("net", tree).name for _ in range(2)]
    registry.thin("net:v1")
    registry.thin("net:v1")
    collect_twice(registry)
    check_all_load(registry, names)


def test_training_a_new_head_with_keep_optimizer_keeps_all(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "r")
    net = torch.nn.Sequential(torch.nn.Linear(16, 20), torch.nn.ReLU(), torch.nn.Linear(20, 4))
    names = [registry.save("source", {"model": net.state_dict()}).name]
    for parameter in net[0].parameters():
        parameter.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.1, momentum=0.9)
    with registry.run("mine", keep_optimizer=1, monitor="loss") as run:
        for epoch in range(6):
            net(torch.randn(8, 16)).pow(2).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            saved = run.save(model=net, optimizer=optimizer, epoch=epoch, loss=float(epoch))
            assert saved is not None
            names.append(saved.name)
    collect_twice(registry)
    check_all_load(registry, names)


def test_thinning_after_compaction_keeps_all(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "r")
    embedding = torch.randn(20_000, 16)
    names = []
    for n in range(1, 7):
        embedding[n] += 0.001
        optimizer = {"state": {0: torch.full((900,), float(n))}, "param_groups": []}
        names.append(registry.save("emb", {"model": {"emb": embedding.clone()}, "optimizer": optimizer}).name)
    registry.compact(["emb"])
    for _ in range(2):
        for n in range(1, 5):
            registry.thin(f"emb:v{n}")
    collect_twice(registry)
    check_all_load(registry, names)
