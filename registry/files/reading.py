"""Reading: the way from a path to what it holds, for files and for folders of shards with their index.

The formats of files are the rows of `registry.files.formats`. Folders and their index are read as Hugging Face writes
them. Nothing that a file holds is ever run. What a file says of itself (epoch, step, loss, metrics, hyperparameters)
fills the checkpoint's fields.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import torch

from registry.files.foreign import kind_of, kind_of_folder
from registry.files.formats import FORMS, INDEX, format_of
from registry.files.imported import Imported, check_content, file_status, source_of, stamp_of
from registry.files.layouts import MAX_CONFIG, is_config
from registry.files.safetensors_files import read_tensors
from registry.files.torch_files import read_torch_file
from registry.store import header
from registry.store.errors import Invalid, NotFound, Unsupported, naming, storage_errors
from registry.store.places import open_regular
from registry.store.text import printable, quoted

_SAFETENSORS = ".safetensors"
_SHARDS = (_SAFETENSORS, ".bin")
"""What the names of shards end in; an index has the suffix of its shards before its own."""

_INDEXES = tuple(suffix + INDEX for suffix in _SHARDS)

_MAX_INDEX = 64 << 20
_MAX_SHARDS = 10_000


def read_checkpoint_file(path: Path | str) -> Imported:
    """Read a file of a known format, a folder of shards, or its index file.

    `read` of each format says what the file becomes.

    Raises:
        NotFound: if there is no such file.
        Invalid: if it is malformed, empty, holds no tensors, or is no regular file.
        Unsupported: if its form is unknown, or needs code to run.
        StorageError: if the system refuses.
    """
    path = Path(path)
    if os.path.isdir(path):
        imported = _read(_in_folder(path))
        imported = imported if imported.source.get("shards") else _with_config(imported, path)
        read = {"config.json", *(file.name for file in imported.stamps)}
        return dataclasses.replace(imported, left_out=tuple(sorted(set(os.listdir(path)) - read)))
    file_status(path)
    return _read(path)


def _read(path: Path) -> Imported:
    if path.name.lower().endswith(_INDEXES):
        return _read_index(path)
    form = format_of(path.name)
    if form is not None:
        return form.read(path)
    with storage_errors(path):
        kind = kind_of(path) or f"unknown kind of file; readable are {FORMS}"
    raise Unsupported(f"{printable(str(path))}: {kind}")


def _in_folder(folder: Path) -> Path:
    """The file that stands for a folder: its index, or its only file of tensors."""
    shown = printable(str(folder))
    with storage_errors(folder):
        names = sorted(os.listdir(folder))
    indexes = [name for name in names if name.endswith(_INDEXES)]
    whole = [name for name in names if name.endswith(_SAFETENSORS)]
    whole = whole or [name for name in names if name == "pytorch_model.bin"]
    for found in (indexes, whole):
        if len(found) == 1:
            return _inside(folder, found[0])
        if found:
            listed = ", ".join(quoted(name) for name in found[:3])
            raise Invalid(f"{shown}: holds {listed}{', ...' if len(found) > 3 else ''}; name one of them")
    kind = kind_of_folder(folder, names) or f"holds no index and no tensors; readable are {FORMS}"
    raise Invalid(f"{shown}: {kind}")


def _inside(folder: Path, name: str) -> Path:
    """The path of a file of a folder, by a name that others wrote.

    Raises:
        Invalid: if the name is a path, or a link that leaves the folder.
    """
    shown = quoted(name)
    header.check_name(name)
    if not name or name in (".", "..") or set(name) & set("/\\:") or len(os.fsencode(name)) > 255:
        raise Invalid(f"{shown} is not a plain file name; shards must lie beside their index")
    path = folder / name
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise Invalid(f"{shown} is a link that leaves the folder; copy the folder with: cp -rL")
    return path


def _read_index(path: Path) -> Imported:
    status = file_status(path)
    shown = printable(str(path))
    text = _read_whole(path, _MAX_INDEX)
    kind = next(suffix for suffix in _SHARDS if path.name.lower().endswith(suffix + INDEX))
    with naming(shown):
        weight_map = _weight_map(_strict_json(text))
        shards: dict[str, list[str]] = {}
        for tensor, shard in weight_map.items():
            shards.setdefault(shard, []).append(tensor)
        if len(shards) > _MAX_SHARDS:
            raise Invalid(f"the index names {len(shards)} shards; at most {_MAX_SHARDS} are read")
        places = {shard: _inside(path.parent, shard) for shard in shards}
        other = next((shard for shard in shards if not shard.endswith(kind)), None)
        if other is not None:
            raise Invalid(f"the index of {kind} files names the shard {quoted(other)}")
        missing = next((shard for shard in shards if not os.path.exists(places[shard])), None)
        if missing is not None:
            raise NotFound(f"the index names the shard {quoted(missing)}, which is not there")
        found: dict[str, torch.Tensor] = {}
        stamps = {path: stamp_of(status)}
        for shard, names in shards.items():
            stamps[places[shard]] = stamp_of(file_status(places[shard]))
            found |= _read_shard(places[shard], names)
    model = {name: found[name] for name in weight_map}
    source = source_of(path, status, f"{kind[1:]} shards") | {"shards": len(shards)}
    check_content(path, {"model": model})
    return _with_config(Imported({"model": model}, source=source, stamps=stamps), path.parent)


def _weight_map(document: Any) -> dict[str, str]:
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise Invalid("the index has no weight_map of tensor names to file names")
    if not 0 < len(weight_map) <= header.MAX_TENSORS:
        raise Invalid(f"the index lists {len(weight_map)} tensors; from 1 to {header.MAX_TENSORS} are read")
    for name in weight_map:
        header.check_name(name)
    return weight_map


def _read_shard(path: Path, names: list[str]) -> dict[str, torch.Tensor]:
    """A shard's tensors, which must be exactly those that the index says."""
    shard = quoted(path.name)
    if path.name.endswith(_SAFETENSORS):
        with naming(shard):
            tensors = read_tensors(path)
    else:
        tensors = read_torch_file(path)
        if not isinstance(tensors, dict) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
            raise Invalid(f"the shard {shard} is not a dict of tensors")
    listed = set(names)
    missing = next((name for name in names if name not in tensors), None)
    if missing is not None:
        raise Invalid(f"the index says that {quoted(missing)} is in the shard {shard}, but it is not")
    extra = next((name for name in tensors if name not in listed), None)
    if extra is not None:
        raise Invalid(f"the shard {shard} holds {quoted(str(extra))}, which the index does not list there")
    return tensors


def _with_config(imported: Imported, folder: Path) -> Imported:
    """The same, with the `config.json` of its folder, if there is one."""
    if not os.path.lexists(folder / "config.json"):
        return imported
    path = _inside(folder, "config.json")
    file_status(path)
    with naming(printable(str(path))):
        config = _strict_json(_read_whole(path, MAX_CONFIG))
        if not isinstance(config, dict) or not (is_config(config) or not config):
            raise Invalid("not a table of plain values, or a name in it starts with '$'; mend or remove it")
    return dataclasses.replace(imported, config=config or None)


def _read_whole(path: Path, limit: int) -> bytes:
    with open_regular(Path(os.path.realpath(path))) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise Invalid(f"{printable(str(path))}: larger than {limit >> 20} MB, the limit for this file")
    return data


def _strict_json(data: bytes) -> Any:
    """JSON in which no key comes twice, bounded before it is parsed."""
    if max(data.count(b"{"), data.count(b"[")) > 100_000 or data.count(b",") > 2 * header.MAX_TENSORS:
        raise Invalid("too large to be read safely")
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except RecursionError:
        raise Invalid("the JSON is nested too deep") from None
    except UnicodeDecodeError as error:
        raise Invalid(f"not UTF-8 (byte {error.start})") from None
    except ValueError as error:
        raise Invalid(f"not JSON: {printable(str(error))[:120]}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for key, value in pairs:
        if key in table:
            raise Invalid(f"the JSON names {quoted(key)} twice")
        table[key] = value
    return table
