"""Saving and loading against torch.save, torch.load and safetensors, and against writing, hashing and copying alone."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from benchmarks.floors import hash_all, hashed_write, plain_write, second_in_a_row, sync, touch_free_memory
from benchmarks.measure import Contender, Result, Scale, Section, ratio, take_turns
from benchmarks.states import Tree, flat, new_registry, with_new_head, zeroed
from registry import Registry


def measure(name: str, state: Tree, folder: Path, scale: Scale) -> Section:
    """Measure all ratios for one state."""
    return Section(
        _saving(name, state, folder=folder, rounds=scale.rounds)
        + _loading(name, state, folder=folder, rounds=scale.rounds)
    )


def _saving(name: str, state: Tree, folder: Path, rounds: int) -> list[Result]:
    root = folder / "registry"
    tensors = flat(state)
    changed = with_new_head(state)

    def torch_save() -> None:
        torch.save(state, folder / "peer.pt")
        sync(folder / "peer.pt")

    def safetensors_save() -> None:
        safetensors.torch.save_file(tensors, folder / "peer.safetensors")
        sync(folder / "peer.safetensors")

    size = sum(tensor.nbytes for tensor in tensors.values())

    def settle() -> None:
        os.sync()
        touch_free_memory(folder, size)

    def save(tree: Tree) -> Callable[[], object]:
        return lambda: Registry(root).save("model", tree)

    def fresh() -> None:
        new_registry(root)
        settle()

    def with_first_save() -> None:
        new_registry(root).save("model", state)
        os.sync()

    def without(name: str) -> Callable[[], None]:
        def prepare() -> None:
            _forget(folder / name)
            settle()

        return prepare

    contenders: dict[str, Contender] = {
        "torch.save": (without("peer.pt"), torch_save),
        "safetensors": (without("peer.safetensors"), safetensors_save),
        "a plain write": (
            without("plain"),
            lambda: plain_write([*tensors.values()], folder / "plain"),
        ),
        "a write that hashes": (
            without("hashed"),
            lambda: hashed_write([*tensors.values()], folder / "hashed"),
        ),
        "hashing alone": (lambda: None, lambda: hash_all([*tensors.values()])),
        "new": (fresh, save(state)),
        "unchanged": (with_first_save, save(state)),
        "new head": (with_first_save, save(changed)),
    }
    t = take_turns(contenders, rounds)
    _forget(folder / "peer.safetensors")
    _forget(folder / "plain")
    _forget(folder / "hashed")
    return [
        ratio(f"{name}: save, all new", t, ours="new", peer="torch.save", goal=0.60),
        ratio(f"{name}: save, all new", t, ours="new", peer="safetensors", goal=1.00),
        ratio(f"{name}: save, unchanged", t, ours="unchanged", peer="torch.save", goal=0.20),
        ratio(f"{name}: save, 1% new", t, ours="new head", peer="torch.save", goal=0.25),
        ratio(f"{name}: save, all new", t, ours="new", peer="a plain write", goal=1.15),
        ratio(f"{name}: save, all new", t, ours="new", peer="a write that hashes", goal=None),
        ratio(f"{name}: save, unchanged", t, ours="unchanged", peer="hashing alone", goal=1.20),
    ]


def _loading(name: str, state: Tree, folder: Path, rounds: int) -> list[Result]:
    root = folder / "registry"
    new_registry(root).save("model", state)
    torch.save(state, folder / "peer.pt")
    checkpoint = Registry(root)["model"]
    live = {key: zeroed(tree) for key, tree in state.items()}
    targets, sources = list(flat(live).values()), list(flat(state).values())

    def torch_load() -> object:
        return torch.load(folder / "peer.pt", weights_only=True)

    def torch_load_update() -> object:
        return _update(torch_load())

    def copy() -> None:
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)

    loads: dict[str, Callable[[], object]] = {
        "torch.load": torch_load,
        "mapped": lambda: checkpoint.load(verify=False),
        "verified": lambda: checkpoint.load(),
        "torch.load + update": torch_load_update,
        "owned + update": lambda: _update(checkpoint.load(copy=True, verify=False)),
        "hashing alone": lambda: hash_all(sources),
        "memcpy": copy,
        "into a live model": lambda: checkpoint.load_into(verify=False, **live),
    }
    t = take_turns({name: second_in_a_row(load) for name, load in loads.items()}, rounds)
    _forget(root)
    _forget(folder / "peer.pt")
    return [
        ratio(f"{name}: load, mapped", t, ours="mapped", peer="torch.load", goal=0.10),
        ratio(f"{name}: load, mapped and verified", t, ours="verified", peer="torch.load", goal=0.50),
        ratio(f"{name}: load, mapped and verified", t, ours="verified", peer="hashing alone", goal=1.20),
        ratio(
            f"{name}: load, owned, then updated",
            t,
            ours="owned + update",
            peer="torch.load + update",
            goal=0.75,
        ),
        ratio(f"{name}: load into a live model", t, ours="into a live model", peer="memcpy", goal=1.50),
    ]


def _update(tree: Any) -> Any:
    for tensor in flat(tree).values():
        if tensor.is_floating_point():
            tensor.mul_(0.9)
    return tree


def _forget(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
