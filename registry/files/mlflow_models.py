"""Models of MLflow: folders with a file `MLmodel`, which says what the model is and which of the folders hold it.

A model of transformers is a hub's folder in parts, which are put together again. A module of torch is kept as a pickle or
as a program. Both run when they are opened, so neither is.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from registry.checkpoints.files import FILES
from registry.configs.documents import read_document
from registry.files.folders import listing, read_folder
from registry.files.imported import Imported, stamp_of
from registry.store.errors import Invalid, Unsupported
from registry.store.pack import contents_of
from registry.store.text import printable

MLMODEL = "MLmodel"
"""The file that makes a folder a model of MLflow."""

_PARTS = ("model_binary", "peft_adaptor")
"""What the description of transformers calls the folder that holds the parameters."""


def read_mlflow_model(folder: Path) -> Imported:
    """What a model of MLflow holds, as `registry.files.folders.read_folder` gives it.

    The files of its tokenizer lie beside the parameters, as on a hub. MLflow's own files are left out.

    Raises:
        Unsupported: if it holds a module of torch, or no tensors that can be read; says what to do.
        Invalid: if it is malformed, or names a network that it does not hold.
        NotFound, StorageError: as `read_folder`.
    """
    flavors = read_document(folder / MLMODEL, ".yaml").get("flavors")
    flavors = flavors if isinstance(flavors, dict) else {}
    shown = printable(str(folder))
    if isinstance(flavors.get("transformers"), dict):
        return _read_parts(folder, flavors["transformers"])
    if "pytorch" in flavors:
        raise Unsupported(
            f"{shown}: a model of MLflow that holds a module, which runs code when it is opened",
            "if you trust it, save its "
            "state dict: torch.save(mlflow.pytorch.load_model(...).state_dict(), 'model.pt'), and import that",
        )
    listed = ", ".join(printable(name) for name in flavors if name != "python_function") or "python_function"
    raise Unsupported(
        f"{shown}: a model of MLflow for {listed}, which holds no tensors that can be read",
        "if a file in it does, import that file",
    )


def _read_parts(folder: Path, flavor: dict[str, Any]) -> Imported:
    """A model of transformers, whose parameters lie in one folder and whose tokenizer lies in another."""
    names, outer = listing(folder)
    held = {name.partition("/")[0] for name in names if "/" in name}
    parts = [part for key in _PARTS if isinstance(part := flavor.get(key), str) and part in held]
    if not parts:
        raise Invalid(
            f"{printable(str(folder))}: names a network of a hub and does not hold it",
            "import the hub's folder, or log the model with save_pretrained=True",
        )
    part, *others = parts
    imported = read_folder(folder / part)
    files = dict(imported.components.get(FILES, {}))
    stamps = dict(imported.stamps)
    left_out = {name: reason for name, reason in outer.items() if not name.startswith(f"{part}/")}
    left_out |= {f"{part}/{name}": reason for name, reason in imported.left_out.items()}
    for name in names:
        top, _, rest = name.partition("/")
        if top == part:
            continue
        _, _, own = rest.partition("/")
        if top in others:
            left_out[name] = "parameters of their own; import their folder by itself"
            continue
        if top != "components" or not own:
            left_out[name] = "a file of MLflow's own"
            continue
        path = folder / name
        status, data = contents_of(Path(os.path.realpath(path)))
        if files.setdefault(own, data) != data:
            left_out[name] = "another file has its name"
        stamps[path] = stamp_of(status)
    components = imported.components | ({FILES: files} if files else {})
    return dataclasses.replace(imported, components=components, stamps=stamps, left_out=left_out)
