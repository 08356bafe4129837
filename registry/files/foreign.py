"""Foreign files: what a file or folder is that cannot be imported, told by its first bytes or its names."""

from __future__ import annotations

import os
import shlex
import zipfile
from collections.abc import Collection
from pathlib import Path

from registry.store.text import printable

_HEAD = 512
"""Bytes of a file that `kind_of` looks at."""

_STARTS = (
    (b"version https://git-lfs", "a pointer of Git LFS, not the file itself; fetch that with: git lfs pull"),
    (b"\x89HDF\r\n", "an HDF5 file, as Keras writes them; read it with h5py, and save its arrays as tensors"),
    (b"\x93NUMPY", "an array of NumPy; read it with numpy.load, and save it as tensors"),
    (b"GGUF", "a GGUF file, whose weights are quantized for inference; import what it was made from"),
    (b"\x1f\x8b", "compressed by gzip; unpack it first"),
    (b"BZh", "compressed by bzip2; unpack it first"),
    (b"\xfd7zXZ", "compressed by xz; unpack it first"),
    (b"(\xb5/\xfd", "compressed by zstd; unpack it first"),
)
"""First bytes of kinds of files, with what the kind is and what to do."""

_TAR = slice(257, 262)
"""Where a tar archive says that it is one."""

_LONGEST_HEADER = 100_000_000
"""Bytes of the longest header that safetensors allows."""


def kind_of(path: Path) -> str | None:
    """What a file is that cannot be read as what its name says, and what to do; None if unknown.

    Raises:
        OSError: if it cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD)
    for start, told in _STARTS:
        if head.startswith(start):
            return told
    if head[_TAR] == b"ustar":
        return "a tar archive; unpack it first"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html")):
        return "a web page, as where a download asks to log in; fetch the file itself"
    if head.startswith(b"PK\x03\x04"):
        return _archive(path)
    length = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and 2 <= length <= _LONGEST_HEADER and not path.name.endswith(".safetensors"):
        return "a safetensors file; rename it to end in .safetensors"
    return None


def kind_of_folder(folder: Path, names: Collection[str]) -> str | None:
    """What a folder without a checkpoint file of its own is, and what to do; None if unknown.

    Args:
        names: of what lies in it.
    """
    if ".metadata" in names and any(name.endswith(".distcp") for name in names):
        return (
            "a checkpoint of torch.distributed; make one file of it with: "
            f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {_shown(folder)} model.pt"
        )
    if "model_index.json" in names:
        parts = _parts(folder, names)
        listed = f", such as {_shown(folder / parts[0])}" if parts else ""
        return f"a pipeline of diffusers; import its parts one by one{listed}"
    inner = [name for name in sorted(names) if name.startswith("pytorch_model_fsdp")]
    if inner:
        return (
            "a state of accelerate whose network FSDP has sharded; make one file of it with: "
            f"accelerate merge-weights {_shown(folder / inner[0])} OUT"
        )
    steps = [name for name in sorted(names) if name.startswith("global_step")]
    if steps or "zero_to_fp32.py" in names:
        return "a checkpoint of DeepSpeed; make one file of it with its own zero_to_fp32.py"
    if any(name.startswith("random_states_") and name.endswith(".pkl") for name in names):
        return "a state of accelerate without the weights; save it again with accelerator.save_state"
    if "adapter_config.json" in names:
        return "an adapter of PEFT without its weights, adapter_model.safetensors"
    return None


def _archive(path: Path) -> str | None:
    """What a zip archive holds, if that is not what `torch.save` writes."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return None
    inner = {name.partition("/")[2] for name in names}
    if "constants.pkl" in inner and any(name.startswith("code/") for name in inner):
        return (
            "a TorchScript program, not a checkpoint; save its weights with: "
            "torch.save(torch.jit.load(file).state_dict(), 'weights.pt')"
        )
    if any(name.startswith("models/") for name in (*names, *inner)) and "archive_format" in {*names, *inner}:
        return "a program of torch.export; save its weights with: torch.save(torch.export.load(file).state_dict, 'weights.pt')"
    if names and all(name.endswith(".npy") for name in names):
        return "arrays of NumPy; save them as tensors: torch.save({k: torch.from_numpy(v) for k, v in numpy.load(file).items()}, 'weights.pt')"
    if not any(name.endswith("data.pkl") for name in names):
        return "a zip archive, not a file of torch.save; unpack it first"
    return None


def _shown(path: Path) -> str:
    """A path to be pasted into a command."""
    return shlex.quote(printable(str(path)))


def _parts(folder: Path, names: Collection[str]) -> list[str]:
    """The parts of a pipeline that hold tensors."""
    return [
        name
        for name in sorted(names)
        if os.path.isdir(folder / name)
        and any(one.endswith((".safetensors", ".bin")) for one in os.listdir(folder / name))
    ]
