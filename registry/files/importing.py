"""Importing: files that other programs wrote become checkpoints.

Readable are files of `torch.save`, safetensors files, and folders of shards with their index, as Hugging Face
writes them. Nothing that a file holds is ever run. What the file says of itself (epoch, step, loss, metrics,
hyperparameters) fills the checkpoint's fields. For a file of `torch.save`, the way its parts lay in it is
recorded, so that `registry.files.exporting` gives the same tree back.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from registry.catalog.naming import remove
from registry.checkpoints.checkpoint import Checkpoint
from registry.checkpoints.saving import Facts, save
from registry.files.foreign import kind_of, kind_of_folder
from registry.files.layouts import MAX_CONFIG, fields_of, is_config, split
from registry.files.torch_files import TORCH_SUFFIXES, file_status, read_torch_file, values
from registry.progress import Progress, silent
from registry.store import header
from registry.store.digest import digest
from registry.store.dtypes import ELEMENT_TYPES, from_safetensors
from registry.store.errors import Conflict, Invalid, NotFound, Unsupported, naming, storage_errors
from registry.store.loading import view
from registry.store.manifest import TensorInfo
from registry.store.pack import map_file
from registry.store.places import open_regular
from registry.store.text import printable, quoted

if TYPE_CHECKING:
    import mmap

    from registry.home import Home

SAFETENSORS = ".safetensors"
INDEX = ".index.json"
FORMS = f"{', '.join(TORCH_SUFFIXES)}, {SAFETENSORS}, a folder of shards or its *{INDEX}"

_MAX_INDEX = 64 << 20
_MAX_SHARDS = 10_000
_MAX_METADATA = 16 << 10

Stamp = tuple[int, int, int]


@dataclass(frozen=True)
class Imported:
    """What a file holds, ready for `Registry.save`; tensors are mapped from the file where possible."""

    components: dict[str, Any]
    epoch: int | None = None
    step: int | None = None
    loss: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    config: dict[str, Any] | None = None
    source: dict[str, Any] = field(default_factory=dict)
    """File name, format, size and digest (for shards: of the index), and the layout of a `.pt` file."""
    stamps: Mapping[Path, Stamp] = field(default_factory=dict, repr=False)
    """Inode, size and time of change of every file that was read."""
    left_out: tuple[str, ...] = ()
    """Of a folder: names of what lies there and was not read."""


def import_file(
    home: Home,
    path: Path | str,
    model: str,
    *,
    epoch: int | None = None,
    step: int | None = None,
    loss: float | None = None,
    metrics: Mapping[str, float] | None = None,
    config: Mapping[str, Any] | None = None,
    meta: Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> Checkpoint:
    """Store a file as the next version of a model; arguments override what the file says.

    >>> import_file(registry, "best.pt", "lenet5", epoch=3)  # doctest: +SKIP
    Checkpoint(name=lenet5:v1, id=5d41402abc4b, epoch=3)

    Raises:
        RegistryError: as `read_checkpoint_file` and `import_checkpoint`.
    """
    imported = read_checkpoint_file(path)
    fields: dict[str, Any] = {"epoch": epoch, "step": step, "loss": loss, "metrics": metrics}
    return import_checkpoint(home, imported, model, **fields, config=config, meta=meta, progress=progress)


def import_checkpoint(
    home: Home,
    imported: Imported,
    model: str,
    *,
    epoch: int | None = None,
    step: int | None = None,
    loss: float | None = None,
    metrics: Mapping[str, float] | None = None,
    config: Mapping[str, Any] | None = None,
    meta: Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> Checkpoint:
    """Store what `read_checkpoint_file` read; arguments override what the file says, metrics one by one.

    Raises:
        Conflict: if somebody wrote to the file meanwhile; no version is left.
        Unsupported, Invalid, StorageError: as `Registry.save`.
    """
    about = Facts(
        epoch=imported.epoch if epoch is None else epoch,
        step=imported.step if step is None else step,
        loss=imported.loss if loss is None else loss,
        metrics={**imported.metrics, **(metrics or {})},
        config=imported.config if config is None else config,
        meta=meta,
        lineage=[{"kind": "imported-from", "parent": printable(imported.source["file"])}],
        source=imported.source,
    )
    checkpoint = save(home, model, imported.components, about, progress=progress)
    for path, stamp in imported.stamps.items():
        if _was_rewritten(path, stamp):
            remove(home.catalog, [checkpoint.name], force=True)
            shown = printable(str(path))
            raise Conflict(f"{shown}: the file was written to during the import; repeat it when that is done")
    return checkpoint


def _stamp(status: os.stat_result) -> Stamp:
    return status.st_ino, status.st_size, status.st_mtime_ns


def _was_rewritten(path: Path, before: Stamp) -> bool:
    """Whether the file that was read has other bytes now; one that took its place does not count."""
    try:
        now = _stamp(os.stat(path))
    except OSError:
        return False
    return now[0] == before[0] and now != before


def read_checkpoint_file(path: Path | str) -> Imported:
    """Read a `.pt`, `.pth`, `.ckpt`, `.bin` or `.safetensors` file, a folder of shards, or its index file.

    A dict of tensors alone is the component `model`. In a dict of more, the keys of `COMPONENT_KEYS` are
    components, those of `FIELD_KEYS` fields, and the rest makes up the component `extra`; a dict without any
    component key, or anything else that has tensors, is `model` as it is.

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
    name = path.name.lower()
    if name.endswith((SAFETENSORS + INDEX, ".bin" + INDEX)):
        return _read_index(path)
    if name.endswith(SAFETENSORS):
        return _read_safetensors(path)
    if name.endswith(TORCH_SUFFIXES):
        return _read_torch(path)
    with storage_errors(path):
        kind = kind_of(path) or f"unknown kind of file; readable are {FORMS}"
    raise Unsupported(f"{printable(str(path))}: {kind}")


def _read_torch(path: Path) -> Imported:
    status = file_status(path)
    tree = read_torch_file(path)
    components, layout = split(tree)
    _check_content(path, components)
    source = _source(path, status, "torch") | {"layout": layout}
    return Imported(components, **fields_of(tree), source=source, stamps={path: _stamp(status)})


def _read_safetensors(path: Path) -> Imported:
    status = file_status(path)
    with naming(printable(str(path))):
        data, tensors, metadata = _tensors_of(path, status.st_size)
    source = _source(path, status, "safetensors", data)
    components: dict[str, Any] = {"model": tensors}
    if len(json.dumps(metadata)) > _MAX_METADATA or any(key.startswith("$") for key in metadata):
        components["extra"] = {"metadata": metadata}
    elif metadata:
        source["metadata"] = metadata
    _check_content(path, components)
    return Imported(components, source=source, stamps={path: _stamp(status)})


def _tensors_of(path: Path, size: int) -> tuple[mmap.mmap, dict[str, torch.Tensor], dict[str, str]]:
    """A safetensors file mapped copy-on-write, its tensors as views of that, and its `__metadata__`.

    Raises:
        Invalid: if a rule of the format is broken.
        Unsupported: if torch has no such element type.
    """
    real = Path(os.path.realpath(path))
    with open_regular(real) as file:
        head = file.read(8)
        try:
            head += file.read(header.announced_length(head, size))
            parsed = header.parse(head, size)
        except Invalid as error:
            kind = kind_of(real)
            if kind:
                raise Unsupported(kind) from error
            if head[:4] == b"PK\x03\x04" or head[:2] == b"\x80\x02":
                raise Invalid("a file of torch.save, not safetensors; rename it to end in .pt") from error
            raise
    data = map_file(real, size)
    return data, {entry.name: _tensor(data, entry) for entry in parsed.entries}, dict(parsed.metadata)


def _tensor(data: mmap.mmap, entry: header.Entry) -> torch.Tensor:
    found = from_safetensors(entry.code, entry.shape)
    if found is None:
        raise Unsupported(
            f"tensor {quoted(entry.name)} has dtype {entry.code} and shape {list(entry.shape)}, which torch cannot "
            "represent; convert it with the program that wrote it"
        )
    dtype, shape = found
    info = TensorInfo(dtype, shape, "")
    start, size = entry.start, entry.end - entry.start
    if (
        size and start % ELEMENT_TYPES[dtype].size
    ):  # the format allows tensors at any byte, processors not everywhere
        with memoryview(data) as whole:
            tensor = view(memoryview(bytearray(whole[start : start + size])), info, 0)
    else:
        tensor = view(data, info, start)
    if dtype == "bool" and size and bool((tensor.view(torch.uint8) > 1).any()):
        raise Invalid(f"tensor {quoted(entry.name)} is BOOL but holds bytes other than 0 and 1")
    return tensor


def _in_folder(folder: Path) -> Path:
    """The file that stands for a folder: its index, or the weights themselves."""
    shown = printable(str(folder))
    with storage_errors(folder):
        names = sorted(os.listdir(folder))
    indexes = [name for name in names if name.endswith((SAFETENSORS + INDEX, ".bin" + INDEX))]
    whole = [name for name in names if name.endswith(SAFETENSORS)]
    whole = whole or [name for name in names if name == "pytorch_model.bin"]
    for found in (indexes, whole):
        if len(found) == 1:
            return inside(folder, found[0])
        if found:
            listed = ", ".join(quoted(name) for name in found[:3])
            raise Invalid(f"{shown}: holds {listed}{', ...' if len(found) > 3 else ''}; name one of them")
    kind = kind_of_folder(folder, names) or f"holds no index and no weights; readable are {FORMS}"
    raise Invalid(f"{shown}: {kind}")


def inside(folder: Path, name: str) -> Path:
    """The path of a file of a folder, by a name that others wrote.

    Raises:
        Invalid: if the name is a path, or a link that leaves the folder.
    """
    shown = quoted(name)
    header.check_name(name)
    if not name or name in (".", "..") or set(name) & set("/\\:") or len(os.fsencode(name)) > 255:
        raise Invalid(f"{shown} is no plain file name; shards must lie beside their index")
    path = folder / name
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise Invalid(f"{shown} is a link that leaves the folder; copy the folder with: cp -rL")
    return path


def _read_index(path: Path) -> Imported:
    status = file_status(path)
    shown = printable(str(path))
    text = _read_whole(path, _MAX_INDEX)
    kind = SAFETENSORS if path.name.lower().endswith(SAFETENSORS + INDEX) else ".bin"
    with naming(shown):
        weight_map = _weight_map(_strict_json(text))
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
        stamps = {path: _stamp(status)}
        for shard, names in shards.items():
            stamps[places[shard]] = _stamp(file_status(places[shard]))
            found |= _read_shard(places[shard], names)
    model = {name: found[name] for name in weight_map}
    source = _source(path, status, f"{kind[1:]} shards") | {"shards": len(shards)}
    _check_content(path, {"model": model})
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
    if path.name.endswith(SAFETENSORS):
        with naming(shard):
            _, tensors, _ = _tensors_of(path, file_status(path).st_size)
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
    """With the `config.json` beside the weights, if there is one."""
    if not os.path.lexists(folder / "config.json"):
        return imported
    path = inside(folder, "config.json")
    file_status(path)
    with naming(printable(str(path))):
        config = _strict_json(_read_whole(path, MAX_CONFIG))
        if not isinstance(config, dict) or not (is_config(config) or not config):
            raise Invalid("not a table of plain values whose names do not start with '$'; mend or remove it")
    return dataclasses.replace(imported, config=config or None)


def _read_whole(path: Path, limit: int) -> bytes:
    with open_regular(Path(os.path.realpath(path))) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise Invalid(f"{printable(str(path))}: larger than {limit >> 20} MB, which no such file is")
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


def _source(path: Path, status: os.stat_result, form: str, data: mmap.mmap | None = None) -> dict[str, Any]:
    data = data or map_file(Path(os.path.realpath(path)), status.st_size)
    with memoryview(data) as whole:
        return {"file": printable(path.name), "format": form, "size": status.st_size, "digest": digest(whole)}


def _check_content(path: Path, components: Mapping[str, Any]) -> None:
    """Refuse what is no checkpoint at all, such as a number or an empty dict."""
    if set(components) <= {"model", "extra"} and not any(_tensors(components)):
        raise Invalid(f"{printable(str(path))}: holds no tensors, so it is no checkpoint")


def _tensors(tree: Any) -> Iterator[bool]:
    return (True for value in values(tree) if isinstance(value, torch.Tensor))
