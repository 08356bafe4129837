"""Files and folders that cannot be imported: an error says what they are and what to do."""

from __future__ import annotations

import os
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import safetensors.torch
import torch
from torch import nn

from registry import Registry
from registry.files.importing import import_checkpoint
from registry.files.reading import read_checkpoint_file
from registry.store.errors import Invalid, RegistryError, Unsupported

TENSORS = {"w": torch.ones(2, 3)}


def script(path: Path) -> None:
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)


def exported(path: Path) -> None:
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),)), path)


def a_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("weights/model.bin", b"x")


def a_tar(path: Path) -> None:
    torch.save(TENSORS, path.with_name("inner.pt"))
    with tarfile.open(path, "w") as archive:
        archive.add(path.with_name("inner.pt"))


def arrays(path: Path) -> None:
    with path.open("wb") as file:
        numpy.savez(file, w=numpy.ones(3))


def an_array(path: Path) -> None:
    with path.open("wb") as file:
        numpy.save(file, numpy.ones(3))


def bytes_of(data: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(data) and None


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
FILES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "TorchScript": ("a.pt", script, r"a TorchScript program.*torch\.jit\.load\(file\)\.state_dict"),
    "torch.export": ("a.pt2", exported, r"a torch\.export program.*torch\.export\.load"),
    "LFS": ("a.pt", bytes_of(POINTER), "a Git LFS pointer.*git lfs pull"),
    "LFS, safetensors": ("a.safetensors", bytes_of(POINTER), "a Git LFS pointer.*git lfs pull"),
    "web page": (
        "a.pth",
        bytes_of(b"\n<!DOCTYPE html><html>log in</html>"),
        "a web page.*download the file itself",
    ),
    "web page, safetensors": ("a.safetensors", bytes_of(b"<HTML><body>404"), "a web page"),
    "zip": ("a.pt", a_zip, "a zip archive, not a file of torch.save; unpack it first"),
    "zip by name": ("a.zip", a_zip, "a zip archive.*unpack it first"),
    "npz": ("a.npz", arrays, r"NumPy arrays.*numpy\.load"),
    "npz called pt": ("a.pt", arrays, "NumPy arrays"),
    "npy": ("a.npy", an_array, r"a NumPy array.*numpy\.load"),
    "tar": ("a.pt", a_tar, "a tar archive; unpack it first"),
    "gzip": ("a.tar.gz", bytes_of(b"\x1f\x8b\x08\0\0"), "compressed with gzip; unpack it first"),
    "safetensors called pt": (
        "a.pt",
        lambda path: safetensors.torch.save_file(TENSORS, path),
        "a safetensors file; rename it to end in .safetensors",
    ),
    "pt called safetensors": (
        "a.safetensors",
        lambda path: torch.save(TENSORS, path),
        "a file of torch.save, not safetensors; rename it to end in .pt",
    ),
    "HDF5": ("a.h5", bytes_of(b"\x89HDF\r\n\x1a\n"), "an HDF5 file.*h5py"),
    "GGUF": ("a.gguf", bytes_of(b"GGUF\3\0\0\0"), "a GGUF file"),
    "unknown": ("a.xyz", bytes_of(b"what?"), "unknown kind of file; readable are .pt"),
    "not UTF-8": (
        os.fsdecode(b"a\xff.pt"),
        lambda path: torch.save(TENSORS, path.with_name("b.pt")) or path.with_name("b.pt").rename(path),
        r"a\\udcff\.pt: its name is not UTF-8, and torch cannot open it; rename it",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", FILES)
def test_a_file_that_cannot_be_imported_says_what_it_is_and_what_to_do(tmp_path: Path, kind: str) -> None:
    name, make, told = FILES[kind]
    make(tmp_path / name)
    with pytest.raises((Unsupported, Invalid), match=told) as caught:
        read_checkpoint_file(tmp_path / name)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path}/a")


def test_safetensors_under_a_name_that_is_not_utf8_are_imported(tmp_path: Path) -> None:
    safetensors.torch.save_file(TENSORS, tmp_path / "b.safetensors")
    path = tmp_path / os.fsdecode(b"a\xff.safetensors")
    (tmp_path / "b.safetensors").rename(path)
    checkpoint = import_checkpoint(Registry(tmp_path / "r"), read_checkpoint_file(path), "net")
    assert torch.equal(checkpoint.state_dict()["w"], TENSORS["w"])
    assert checkpoint.record["source"]["file"] == r"a\udcff.safetensors"


FOLDERS: dict[str, tuple[list[str], str]] = {
    "diffusers": (["model_index.json", "unet/diffusion.safetensors"], r"a diffusers pipeline.*/unet$"),
    "accelerate, FSDP": (
        ["pytorch_model_fsdp_0/x", "random_states_0.pkl"],
        r"an accelerate state that FSDP has sharded; import .*/pytorch_model_fsdp_0$",
    ),
    "DeepSpeed": (["global_step500/x", "latest"], "a DeepSpeed checkpoint.*zero_to_fp32.py"),
    "accelerate": (["random_states_0.pkl", "scheduler.bin"], "an accelerate state without the model"),
    "PEFT": (["adapter_config.json"], "a PEFT adapter without its tensors"),
    "nothing": (["readme.txt"], "holds no index and no tensors; readable are"),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_that_cannot_be_imported_says_what_it_is_and_what_to_do(tmp_path: Path, kind: str) -> None:
    names, told = FOLDERS[kind]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(RegistryError, match=told):
        read_checkpoint_file(tmp_path)


def test_a_state_that_cannot_be_read_is_kept_as_bytes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    safetensors.torch.save_file(TENSORS, tmp_path / "model.safetensors")
    names = ("optimizer.bin", "random_states_0.pkl", "scheduler.bin")
    for name in names:
        shutil.copy(tmp_path / "model.safetensors", tmp_path / name)
    imported = read_checkpoint_file(tmp_path)
    assert list(imported.components["model"]) == ["w"]
    assert tuple(imported.components["files"]) == names
    assert imported.left_out == {}
    assert all(f"{name} is kept as bytes and was not read" in caplog.text for name in names)
