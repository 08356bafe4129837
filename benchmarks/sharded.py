"""`torch.distributed.checkpoint` on the registry, against its own files, in one process."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from benchmarks.measure import Contender, Result, Scale, Section, ratio, take_turns
from benchmarks.states import Tree, flat, new_registry, resnet50_with_adam, zeroed
from registry import Registry, RegistryReader, RegistryWriter


def measure(folder: Path, scale: Scale) -> Section:
    """Measure saving and loading the state of a ResNet50 with Adam's moments."""
    # dcp warns that it runs in one process.
    warnings.simplefilter("ignore")
    state = resnet50_with_adam()
    files, root = folder / "files", folder / "registry"
    live: Tree = {key: zeroed(tree) for key, tree in state.items()}

    def forget() -> None:
        shutil.rmtree(files, ignore_errors=True)
        new_registry(root)

    def save() -> Any:
        return dcp.save(state, storage_writer=RegistryWriter(Registry(root), "net"))

    def save_files() -> Any:
        return dcp.save(state, storage_writer=dcp.FileSystemWriter(files))

    def first(writer: Callable[[], Any]) -> Callable[[], None]:
        return lambda: (forget(), writer())[0]  # type: ignore[func-returns-value]

    saves: dict[str, Contender] = {
        "files": (forget, save_files),
        "new": (forget, save),
        "unchanged": (first(save), save),
    }
    t = take_turns(saves, scale.rounds)
    forget()
    save()
    save_files()
    registry = Registry(root)
    loads: dict[str, Contender] = {
        "load files": (lambda: None, lambda: dcp.load(live, storage_reader=dcp.FileSystemReader(files))),
        "load": (lambda: None, lambda: dcp.load(live, storage_reader=RegistryReader(registry, "net"))),
    }
    t |= take_turns(loads, scale.rounds)
    assert all(torch.equal(a, b) for a, b in zip(flat(live).values(), flat(state).values(), strict=True))

    def against(what: str, ours: str, peer: str) -> Result:
        return ratio(f"DCP: {what}", t, ours=ours, peer=peer, goal=None, name="torch's own files")

    return Section(
        [
            against("save, all new", "new", "files"),
            against("save, unchanged", "unchanged", "files"),
            against("load, verified", "load", "load files"),
        ]
    )
