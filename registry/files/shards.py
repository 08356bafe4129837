"""Shards: a model in several files, with an index that says which tensor is in which, and what lies beside them.

Folders and their index are read as Hugging Face writes them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import stat
from pathlib import Path
from typing import Any

import torch

from registry.files.formats import INDEX
from registry.files.imported import Imported, check_content, file_status, source_of, stamp_of
from registry.files.layouts import MAX_CONFIG, is_config
from registry.files.safetensors_files import read_tensors
from registry.files.torch_files import read_torch_file
from registry.store import header
from registry.store.errors import Invalid, NotFound, naming
from registry.store.places import open_regular
from registry.store.text import printable, quoted

SAFETENSORS = ".safetensors"
_SHARDS = (SAFETENSORS, ".bin")
"""What the names of shards end in; an index has the suffix of its shards before its own."""

INDEXES = tuple(suffix + INDEX for suffix in _SHARDS)
"""What the names of indexes end in; the better format first."""

_MAX_INDEX = 64 << 20
_MAX_SHARDS = 10_000


def inside(folder: Path, name: str) -> Path:
    """The path of a file of a folder, by a name that others wrote.

    Raises:
        Invalid: if the name is a path, or a link that leaves the folder.
    """
    shown = quoted(name)
    header.check_name(name)
    if not name or name in (".", "..") or set(name) & set("/\\:") or len(os.fsencode(name)) > 255:
        raise Invalid(f"{shown} is not a plain file name", "shards must lie beside their index")
    path = folder / name
    if leaves(path, folder):
        raise Invalid(f"{shown} is a link that leaves the folder", "copy the folder with: cp -rL")
    return path


def leaves(path: Path, folder: Path) -> bool:
    """Whether a path in a folder is a link that leads out of it.

    In the cache of the Hugging Face hub a snapshot consists of links, each straight to a file in `blobs`, which stands
    beside `snapshots`. These do not count.
    """
    if Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        return False
    snapshot = Path(os.path.realpath(folder))
    if snapshot.parent.name != "snapshots" or not path.is_symlink():
        return True
    target = Path(os.path.normpath(Path(os.path.realpath(path.parent), os.readlink(path))))
    blobs = snapshot.parent.parent / "blobs"
    if target.parent != blobs or blobs.is_symlink() or not os.path.lexists(target):
        return True
    return not stat.S_ISREG(os.lstat(target).st_mode)


def read_index(path: Path) -> Imported:
    """What the shards hold that an index names: the component `model`, and the configuration of its folder.

    Raises:
        NotFound: if a shard is not there.
        Invalid: if the index is malformed, names a file elsewhere, or the shards hold something else.
    """
    status = file_status(path)
    shown = printable(str(path))
    text = read_whole(path, _MAX_INDEX)
    kind = next(suffix for suffix in _SHARDS if path.name.lower().endswith(suffix + INDEX))
    with naming(shown):
        weight_map = _weight_map(strict_json(text))
        shards: dict[str, list[str]] = {}
        for tensor, shard in weight_map.items():
            shards.setdefault(shard, []).append(tensor)
        if len(shards) > _MAX_SHARDS:
            raise Invalid(f"the index names {len(shards)} shards; at most {_MAX_SHARDS} are read")
        places = {shard: inside(path.parent, shard) for shard in shards}
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
    return with_config(Imported({"model": model}, source=source, stamps=stamps), path.parent)


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
    if path.name.endswith(SAFETENSORS):
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


def with_config(imported: Imported, folder: Path) -> Imported:
    """The same, with the `config.json` of its folder, if there is one.

    Raises:
        Invalid: if that is no table of plain values.
    """
    if not os.path.lexists(folder / "config.json"):
        return imported
    path = inside(folder, "config.json")
    file_status(path)
    with naming(printable(str(path))):
        config = strict_json(read_whole(path, MAX_CONFIG))
        if not isinstance(config, dict) or not (is_config(config) or not config):
            raise Invalid("not a table of plain values, or a name in it starts with '$'", "mend or remove it")
    return dataclasses.replace(imported, config=config or None)


def read_whole(path: Path, limit: int) -> bytes:
    """The bytes of a small file.

    Raises:
        Invalid: if it is larger than `limit`.
    """
    with open_regular(Path(os.path.realpath(path))) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise Invalid(f"{printable(str(path))}: larger than {limit >> 20} MB, the limit for this file")
    return data


def strict_json(data: bytes) -> Any:
    """JSON in which no key comes twice, bounded before it is parsed.

    Raises:
        Invalid: saying what is wrong with it.
    """
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
