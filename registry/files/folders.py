"""Folders: a hub's, a Trainer's checkpoint, Accelerate's state, an adapter of PEFT, that of torch.distributed.checkpoint, a
tracker's with one checkpoint file.

No file in one is passed over.

The parameters become components, and so do the states that training goes on from. Every other file is kept byte for byte
in the component `files`, or it is named with the reason why it is not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import re
import stat
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from registry.checkpoints.files import FILES
from registry.files.distributed import METADATA, PARTS, read_distributed
from registry.files.foreign import kind_of_folder
from registry.files.formats import FORMS, INDEX, format_of
from registry.files.imported import Imported, Stamp, file_status, stamp_of
from registry.files.outgoing import check_relative
from registry.files.shards import (
    INDEXES,
    SAFETENSORS,
    inside,
    leaves,
    read_index,
    read_whole,
    strict_json,
    with_config,
)
from registry.files.states import read_states, trainer_of
from registry.files.torch_files import read_torch_file
from registry.live.builders import network_of
from registry.log.metrics import is_metric
from registry.store.errors import Conflict, Invalid, Missing, RegistryError, Unsupported, storage_errors
from registry.store.pack import contents_of
from registry.store.text import printable, quoted
from registry.store.tree import encode

_MAX_NAMES = 10_000
_MAX_DEPTH = 16
_MAX_STATE = 64 << 20

_WEIGHTS = (
    "model.safetensors",
    "adapter_model.safetensors",
    "diffusion_pytorch_model.safetensors",
    "pytorch_model.bin",
    "adapter_model.bin",
    "diffusion_pytorch_model.bin",
)
"""Names of the file that holds all parameters, the better format first."""

_FURTHER = re.compile(r"(model_[1-9][0-9]*\.safetensors|pytorch_model_[1-9][0-9]*\.bin)\Z")
"""Further networks of Accelerate's state."""

_OTHER_PROGRAMS = r"tf_model.*\.h5|flax_model.*\.msgpack|rust_model\.ot"
_BIN = r"(-[0-9]{5}-of-[0-9]{5})?\.bin(\.index\.json)?"
_OTHER_FORMATS = {
    "model.safetensors": re.compile(rf"(pytorch_model{_BIN}|{_OTHER_PROGRAMS})\Z"),
    "adapter_model.safetensors": re.compile(rf"adapter_model{_BIN}\Z"),
    "diffusion_pytorch_model.safetensors": re.compile(rf"diffusion_pytorch_model{_BIN}\Z"),
    "pytorch_model.bin": re.compile(rf"({_OTHER_PROGRAMS})\Z"),
}
"""How the other formats of a network are called, by the name of the file that was read, or that its index is of."""

_logger = logging.getLogger(__name__)


def read_folder(folder: Path) -> Imported:
    """What a folder holds: networks, the states that training goes on from, and the component `files`.

    Accelerate's state with several networks becomes lists, such as `models`. A file that cannot be read as what its name
    says, such as one that would run code, is kept as bytes.

    Raises:
        Invalid: if it holds no tensors, more names than can be kept, or its index leads out of it.
        Conflict: if a file in it goes or changes while it is read.
        NotFound, Unsupported, StorageError: as for the files in it.
    """
    names, left_out = listing(folder)
    weights = _weights(folder, names, left_out)
    imported, *others = [_read(inside(folder, name)) for name in weights]
    if not weights[0].endswith(INDEXES):
        imported = with_config(imported, folder)
    stamps: dict[Path, Stamp] = dict(imported.stamps)
    for other in others:
        stamps |= other.stamps
    components = dict(imported.components)
    if others:
        components["models"] = [components.pop("model"), *(other.components["model"] for other in others)]
    used = {path.name for path in stamps}
    other_formats = _OTHER_FORMATS.get(weights[0].removesuffix(INDEX))
    for name in names:
        if other_formats and name not in used and other_formats.match(name):
            left_out[name] = "by its name the same parameters in another format"
    trainer = trainer_of(names)
    processes = 1
    if trainer is not None:
        states, read, processes = read_states(trainer, names, lambda name: _tree(folder, name, stamps))
        components |= states
        used |= read
    kept = {}
    for name in names:
        if name not in used and name not in left_out:
            with _there(folder, name):
                status, kept[name] = contents_of(Path(os.path.realpath(folder / name)))
            stamp = stamp_of(status)
            # A state may be unreadable only because somebody was writing to it.
            if stamps.setdefault(folder / name, stamp) != stamp:
                shown = printable(str(folder / name))
                raise Conflict(f"{shown}: changed while it was read", "repeat it when nobody writes to it")
    if kept:
        components[FILES] = kept
    source = imported.source | {"weights": list(weights)} | ({"folder": trainer.name} if trainer else {})
    return dataclasses.replace(
        imported,
        components=components,
        source=source,
        stamps=stamps,
        left_out=left_out | dict(imported.left_out),
        provenance=imported.provenance
        | network_of(imported.config)
        | ({"processes": processes} if processes > 1 else {}),
        **(_progress_of(folder) if "trainer_state.json" in kept else {}),
    )


def listing(folder: Path) -> tuple[list[str], dict[str, str]]:
    """The names of the files in a folder and below it, sorted, and what is left out with the reason."""
    names: list[str] = []
    left_out: dict[str, str] = {}
    pending = [""]
    while pending:
        below = pending.pop()
        with storage_errors(folder / below), _there(folder, below):
            entries = sorted(os.listdir(folder / below))
        for entry in entries:
            name = f"{below}/{entry}" if below else entry
            with storage_errors(folder / name), _there(folder, name):
                reason = _why_not(folder, name)
            if reason is not None:
                left_out[name] = reason
            elif os.path.isdir(folder / name):
                pending.append(name)
            else:
                names.append(name)
            if len(names) + len(left_out) + len(pending) > _MAX_NAMES:
                raise Invalid(
                    f"{printable(str(folder))}: holds more than {_MAX_NAMES:,} files and folders",
                    "import a folder of its own for each checkpoint",
                )
    return sorted(names), left_out


def _why_not(folder: Path, name: str) -> str | None:
    """Why something in a folder cannot be kept; None if it can."""
    path = folder / name
    leaf = path.name
    if path.is_symlink():
        if leaves(path, folder):
            return "a link that leaves the folder"
        if not path.exists():
            return "a broken link"
        if path.is_dir():
            return "a link to a folder"
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        if leaf.startswith("."):
            return "a hidden folder"
        if leaf.endswith((SAFETENSORS, *INDEXES)):
            return "a folder that is called like a file of parameters; rename it"
        if re.match(r"(checkpoint|global_step|epoch)[-_]?[0-9]+\Z", leaf):
            return "a checkpoint of its own; import it by itself"
        if name.count("/") >= _MAX_DEPTH:
            return "a folder that lies too deep"
        return None
    if not stat.S_ISREG(status.st_mode):
        return "not a regular file"
    try:
        check_relative(name)
    except RegistryError:
        return "its name cannot be shown; rename it"
    return None


def _weights(folder: Path, names: Collection[str], left_out: Mapping[str, str]) -> list[str]:
    """The files that hold the parameters, one for each network; an index stands for its shards."""
    top = [name for name in names if "/" not in name]
    known = [form for name in _WEIGHTS for form in (name, f"{name}.index.json") if form in top]
    if known:
        stem = re.escape(known[0].partition(".")[0])
        further = [name for name in top if _FURTHER.match(name) and re.match(rf"{stem}_[0-9]+\.", name)]
        return [known[0], *sorted(further, key=lambda name: (len(name), name))]
    for found in (
        [name for name in top if name.endswith(INDEXES)],
        [name for name in top if name.endswith(SAFETENSORS)],
    ):
        if found:
            return _single(folder, found)
    if METADATA in top and any(name.endswith(PARTS) for name in top):
        return [METADATA]
    kind: Invalid | Unsupported | None = kind_of_folder(folder, os.listdir(folder))
    for name in left_out:
        if name in _WEIGHTS or name.endswith((SAFETENSORS, *INDEXES)):
            advice = "copy the folder with: cp -rL" if (folder / name).is_symlink() else ""
            kind = Invalid(f"{quoted(name)} is {left_out[name]}", advice)
    if kind is None and (found := [name for name in top if format_of(name)]):
        return _single(folder, found)
    kind = kind or Invalid("holds no index and no tensors", f"readable are {FORMS}")
    raise Invalid(f"{printable(str(folder))}: {kind.message}", *kind.fixes)


def _single(folder: Path, found: list[str]) -> list[str]:
    """The files that were found, which must be one.

    Raises:
        Invalid: naming them.
    """
    if len(found) > 1:
        listed = ", ".join(quoted(name) for name in found[:3])
        more = ", ..." if len(found) > 3 else ""
        raise Invalid(f"{printable(str(folder))}: holds {listed}{more}", "name one of them")
    return found


def _read(path: Path) -> Imported:
    if path.name == METADATA:
        return read_distributed(path)
    if path.name.endswith(INDEXES):
        return read_index(path)
    form = format_of(path.name)
    assert form is not None
    return form.read(path)


def _tree(folder: Path, name: str, stamps: dict[Path, Stamp]) -> Any:
    """What a file of `torch.save` in a folder holds; None if no component can hold that, or code would have to run.

    Args:
        stamps: get the file's stamp, from before it is read.
    """
    path = folder / name
    try:
        stamps[path] = stamp_of(file_status(path))
        tree = read_torch_file(path)
        encode({name: tree})
        return tree
    except RegistryError as error:
        _logger.warning("%s is kept as bytes and was not read: %s", printable(name), error)
        return None


@contextlib.contextmanager
def _there(folder: Path, name: str) -> Iterator[None]:
    """Say that a listed file has gone meanwhile."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, Missing) as error:
        shown = printable(str(folder / name))
        raise Conflict(
            f"{shown}: was removed while the folder was read", "repeat it when nobody writes there"
        ) from error


def _progress_of(folder: Path) -> dict[str, Any]:
    """What a Trainer's state says of a checkpoint: step, epoch, loss, and the last evaluation."""
    path = folder / "trainer_state.json"
    try:
        state = strict_json(read_whole(path, _MAX_STATE))
        history = [entry for entry in state.get("log_history", []) if isinstance(entry, dict)]
        step, epoch = state.get("global_step"), state.get("epoch")
    except (RegistryError, AttributeError, TypeError) as error:
        _logger.warning("%s says nothing of the step: %s", printable(str(path)), error)
        return {}
    metrics: dict[str, float] = {}
    loss = None
    for entry in history:
        evaluated = {key: entry[key] for key in entry if key.startswith("eval_") and _is_number(entry[key])}
        metrics = {key: float(value) for key, value in evaluated.items() if is_metric(key)} or metrics
        loss = float(entry["loss"]) if _is_number(entry.get("loss")) else loss
    return {
        "step": step if type(step) is int and 0 <= step < 1 << 63 else None,
        "epoch": int(epoch) if _is_number(epoch) and 0 <= epoch < 1 << 63 else None,
        "loss": loss,
        "metrics": metrics,
    }


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1 << 1000 and not math.isinf(value)
