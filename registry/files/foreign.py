"""Foreign files: recognize a file or folder that cannot be imported, by its first bytes or its names."""

from __future__ import annotations

import os
import shlex
import zipfile
from collections.abc import Collection
from pathlib import Path

from registry.store.errors import Unsupported
from registry.store.text import printable

_HEAD = 512
"""Bytes of a file that `kind_of` looks at."""

_STARTS = (
    (
        b"version https://git-lfs",
        "a Git LFS pointer, not the file itself",
        "fetch the file with: git lfs pull",
    ),
    (b"\x89HDF\r\n", "an HDF5 file, as Keras writes it", "read it with h5py and save its arrays as tensors"),
    (b"\x93NUMPY", "a NumPy array", "read it with numpy.load and save it as a tensor"),
    (b"GGUF", "a GGUF file of quantized tensors", "import the checkpoint that it was made from"),
    (b"\x1f\x8b", "compressed with gzip", "unpack it first"),
    (b"BZh", "compressed with bzip2", "unpack it first"),
    (b"\xfd7zXZ", "compressed with xz", "unpack it first"),
    (b"(\xb5/\xfd", "compressed with zstd", "unpack it first"),
)
"""First bytes of kinds of files, with what the kind is, and what to do."""

_TAR = slice(257, 262)
"""Where a tar archive says that it is one."""

_LONGEST_HEADER = 100_000_000
"""Bytes of the longest header that safetensors allows."""


def kind_of(path: Path) -> Unsupported | None:
    """The error about a file that cannot be read as what its name says: what it is, and what to do; None if unknown.

    Raises:
        OSError: if it cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD)
    for start, what, advice in _STARTS:
        if head.startswith(start):
            return Unsupported(what, advice)
    if head[_TAR] == b"ustar":
        return Unsupported("a tar archive", "unpack it first")
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html")):
        return Unsupported("a web page, perhaps a login page", "download the file itself")
    if head.startswith(b"PK\x03\x04"):
        return _archive(path)
    length = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and 2 <= length <= _LONGEST_HEADER and not path.name.endswith(".safetensors"):
        return Unsupported("a safetensors file", "rename it to end in .safetensors")
    return None


def kind_of_folder(folder: Path, names: Collection[str]) -> Unsupported | None:
    """The error about a folder without a checkpoint file of its own: what it is, and what to do; None if unknown.

    Args:
        names: of what lies in it.
    """
    if any(name.endswith(".distcp") for name in names):
        return Unsupported(
            "a torch.distributed checkpoint without its .metadata, which is written last: "
            "the save did not end, or the folder was copied in part"
        )
    if "model_index.json" in names:
        parts = _parts(folder, names)
        listed = f", such as {_shown(folder / parts[0])}" if parts else ""
        return Unsupported("a diffusers pipeline", f"import its parts one by one{listed}")
    inner = [name for name in sorted(names) if name.startswith("pytorch_model_fsdp")]
    if inner:
        return Unsupported(
            "an accelerate state that FSDP has sharded",
            f"import the folder of its parameters: {_shown(folder / inner[0])}",
        )
    steps = [name for name in sorted(names) if name.startswith("global_step")]
    if steps or "zero_to_fp32.py" in names:
        return Unsupported("a DeepSpeed checkpoint", "convert it into one file with its own zero_to_fp32.py")
    if any(name.startswith("random_states_") and name.endswith(".pkl") for name in names):
        return Unsupported(
            "an accelerate state without the model", "save it again with accelerator.save_state"
        )
    if "adapter_config.json" in names:
        return Unsupported("a PEFT adapter without its tensors", "put its adapter_model.safetensors there")
    return None


def _archive(path: Path) -> Unsupported | None:
    """The error about a zip archive that holds what `torch.save` does not write: what it holds, and what to do."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return None
    inner = {name.partition("/")[2] for name in names}
    if "constants.pkl" in inner and any(name.startswith("code/") for name in inner):
        return Unsupported(
            "a TorchScript program, not a checkpoint",
            "save its state dict with: torch.save(torch.jit.load(file).state_dict(), 'model.pt')",
        )
    if any(name.startswith("models/") for name in (*names, *inner)) and "archive_format" in {*names, *inner}:
        return Unsupported(
            "a torch.export program, not a checkpoint",
            "save its state dict with: torch.save(torch.export.load(file).state_dict, 'model.pt')",
        )
    if names and all(name.endswith(".npy") for name in names):
        return Unsupported(
            "NumPy arrays", "read them with numpy.load and save them as a dict of tensors with torch.save"
        )
    if not any(name.endswith("data.pkl") for name in names):
        return Unsupported("a zip archive, not a file of torch.save", "unpack it first")
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
