"""Exporting: what other programs find in the files that we write."""

from __future__ import annotations

import os
import resource
import stat
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from registry.files.exporting import export
from registry.files.formats import FORMATS
from registry.files.importing import import_checkpoint
from registry.files.reading import read_checkpoint_file
from registry.registry import Registry
from registry.store import durable
from registry.store.errors import Conflict, Corrupt, Invalid, NotFound, StorageError, Unsupported

EVERY_FORMAT = pytest.mark.parametrize("name", [f"a{row.suffixes[0]}" for row in FORMATS])


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o002)
    yield
    os.umask(before)


def same(left: Any, right: Any) -> bool:
    """Whether two trees have the same types, keys in the same order, and bits."""
    if type(left) is not type(right):
        return False
    if isinstance(left, torch.Tensor):
        alike = (left.dtype, left.shape) == (right.dtype, right.shape)
        return alike and (
            not left.numel()
            or torch.equal(
                left.contiguous().reshape(-1).view(torch.uint8),
                right.contiguous().reshape(-1).view(torch.uint8),
            )
        )
    if isinstance(left, dict):
        return (
            list(map(repr, left)) == list(map(repr, right))
            and all(same(left[key], right[key]) for key in left)
            and same(getattr(left, "_metadata", None), getattr(right, "_metadata", None))
        )
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(same(a, b) for a, b in zip(left, right, strict=True))
    return repr(left) == repr(right)


def trained(optimizer_type: type[torch.optim.Optimizer], **options: Any) -> dict[str, Any]:
    net = torchvision.models.resnet18(weights=None, num_classes=10)
    optimizer = optimizer_type(net.parameters(), **options)
    net(torch.randn(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    return {"model": net.state_dict(), "optimizer": optimizer.state_dict()}


TIED = torch.randn(3, 2)
LAYOUTS: dict[str, Any] = {
    "bare": OrderedDict({"b": torch.randn(2), "a": TIED}),
    "plain dict": {"b": torch.randn(2), "a": torch.tensor(1)},
    "with metadata": torch.nn.Sequential(torch.nn.BatchNorm1d(2)).state_dict(),
    "usual": {
        "epoch": 3,
        "model": {"w": TIED},
        "optimizer": {"state": {0: {"step": torch.tensor(2.0)}}},
        "loss": 0.5,
    },
    "fields last": {"state_dict": {"w": TIED}, "iteration": 3, "val_loss": -0.0, "best": None},
    "scalar tensors": {"epoch": torch.tensor(3), "model": {"w": TIED}, "loss": torch.tensor(0.5).bfloat16()},
    "odd numbers": {
        "epoch": 3.0,
        "step": True,
        "loss": float("nan"),
        "model": {"w": TIED},
        "train_loss": 10**40,
    },
    "two models": {"net": {"w": TIED}, "model": {"w": TIED + 1}, "weights": "imagenet"},
    "ordered": OrderedDict({"model": {"w": TIED}, "epoch": 1}),
    "whole numbers as keys": {
        "model": {"w": TIED},
        0: {"x": 1},
        -1: (1, "two", b"3"),
        "extra": {"extra": TIED},
    },
    "dollars": {"model": {"$tensor": TIED}, "$x": {"$y": 1}},
    "lightning": {
        "epoch": 1,
        "global_step": 2,
        "state_dict": OrderedDict({"w": TIED}),
        "optimizer_states": [{"state": {}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999)}]}],
        "lr_schedulers": [],
        "hyper_parameters": {"lr": 0.1},
    },
    "no model": {"optimizer": {"state": {0: TIED}}, "epoch": 1},
    "own names": {"generator": {"w": TIED}, "critic": OrderedDict({"w": TIED}), "epoch": 2},
    "a tensor": torch.randn(3),
    "a list": [torch.randn(3), {"a": 1}],
    "all sorts": {
        "model": {
            "half": torch.randn(3).half(),
            "b": torch.randn(3).bfloat16(),
            "nan": torch.tensor([float("nan"), -0.0]),
            "none": torch.empty(0, 3),
            "bool": torch.tensor([True, False]),
            "c": torch.randn(2, dtype=torch.complex64),
            "size": torch.Size([1, 2]),
            "dtype": torch.float16,
        }
    },
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_an_imported_torch_file_comes_back_in_the_same_layout(
    tmp_path: Path, registry: Registry, name: str
) -> None:
    torch.save(LAYOUTS[name], tmp_path / "in.pt")
    checkpoint = import_checkpoint(registry, read_checkpoint_file(tmp_path / "in.pt"), "net", epoch=99)
    assert export(checkpoint, tmp_path / "out.pt") == tmp_path / "out.pt"
    assert same(torch.load(tmp_path / "out.pt"), torch.load(tmp_path / "in.pt"))


@pytest.mark.parametrize(
    ("kind", "options"),
    [(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}), (torch.optim.AdamW, {"amsgrad": True})],
)
def test_a_training_checkpoint_comes_back_bit_for_bit(
    tmp_path: Path, registry: Registry, kind: type[torch.optim.Optimizer], options: dict[str, Any]
) -> None:
    tree = {"epoch": 1, **trained(kind, **options)}
    torch.save(tree, tmp_path / "in.pt")
    export(import_checkpoint(registry, read_checkpoint_file(tmp_path / "in.pt"), "net"), tmp_path / "out.pt")
    loaded = torch.load(tmp_path / "out.pt")
    assert same(loaded, torch.load(tmp_path / "in.pt"))
    net = torchvision.models.resnet18(weights=None, num_classes=10)
    net.load_state_dict(loaded["model"])
    kind(net.parameters(), **options).load_state_dict(loaded["optimizer"])


def test_tied_tensors_are_tied_in_a_torch_file_and_written_twice_in_safetensors(
    tmp_path: Path, registry: Registry
) -> None:
    equal = TIED.clone()
    checkpoint = registry.save(
        "net", {"model": {"in": TIED, "out": TIED, "equal": equal}, "ema": {"in": TIED}}
    )
    loaded = torch.load(export(checkpoint, tmp_path / "a.pt"))
    tied = [loaded["model"]["in"], loaded["model"]["out"], loaded["ema"]["in"]]
    assert len({tensor.data_ptr() for tensor in tied}) == 1
    assert loaded["model"]["equal"].data_ptr() != tied[0].data_ptr()
    flat = load_file(export(checkpoint, tmp_path / "a.safetensors"))
    assert torch.equal(flat["in"], TIED)
    assert torch.equal(flat["out"], TIED)


def test_an_imported_torch_file_that_was_cut_down_to_its_weights_is_exported_without_the_rest(
    tmp_path: Path, registry: Registry
) -> None:
    tree = {
        "model": {"w": torch.ones(3)},
        "optimizer": {"state": {}, "param_groups": []},
        "note": "x",
        "epoch": 3,
    }
    torch.save(tree, tmp_path / "a.pt")
    import_checkpoint(registry, read_checkpoint_file(tmp_path / "a.pt"), "net")
    registry.thin("net")
    export(registry["net"], tmp_path / "b.pt")
    assert same(torch.load(tmp_path / "b.pt"), {name: tree[name] for name in ("model", "note", "epoch")})


def test_a_checkpoint_saved_here_has_the_usual_layout(tmp_path: Path, registry: Registry) -> None:
    checkpoint = registry.save(
        "net",
        {"model": {"w": TIED}, "optimizer": {"state": {}}},
        epoch=4,
        step=5,
        loss=float("nan"),
        metrics={"f1": 0.5, "auc": float("nan")},
        config={"lr": 0.1},
    )
    loaded = torch.load(export(checkpoint, tmp_path / "a.pt"))
    expected = {
        "model": {"w": TIED},
        "optimizer": {"state": {}},
        "epoch": 4,
        "step": 5,
        "loss": float("nan"),
        "metrics": {"auc": float("nan"), "f1": 0.5},
        "config": {"lr": 0.1},
    }
    assert same(loaded, expected)
    again = import_checkpoint(registry, read_checkpoint_file(tmp_path / "a.pt"), "again")
    assert (again.epoch, again.step, again.config) == (4, 5, {"lr": 0.1})


@pytest.mark.parametrize("more", [{}, {"note": "kept"}])
def test_extra_is_the_same_however_often_it_is_exported_and_imported(
    tmp_path: Path, registry: Registry, more: dict[str, Any]
) -> None:
    tree = {"model": {"w": torch.ones(2)}, "extra": {"seen": 3, "extra": {"deep": True}}, **more}
    torch.save(tree, tmp_path / "first.pt")
    for name in ("a", "b"):
        path = tmp_path / ("first.pt" if name == "a" else "a.pt")
        checkpoint = import_checkpoint(registry, read_checkpoint_file(path), name)
        export(checkpoint, tmp_path / f"{name}.pt")
        assert same(torch.load(tmp_path / f"{name}.pt"), tree)
    assert checkpoint.load()["extra"] == (tree["extra"] if not more else {"extra": tree["extra"], **more})


def test_one_component_is_written_bare(tmp_path: Path, registry: Registry) -> None:
    tree = trained(torch.optim.SGD, lr=0.1, momentum=0.9)
    torch.save(tree, tmp_path / "in.pt")
    checkpoint = import_checkpoint(registry, read_checkpoint_file(tmp_path / "in.pt"), "net")
    assert same(torch.load(export(checkpoint, tmp_path / "m.pt", component="model")), tree["model"])
    assert same(torch.load(export(checkpoint, tmp_path / "o.pt", component="optimizer")), tree["optimizer"])
    with pytest.raises(NotFound, match="no component 'ema'"):
        export(checkpoint, tmp_path / "e.pt", component="ema")
    assert not (tmp_path / "e.pt").exists()


def test_a_safetensors_file_opens_in_the_public_library(tmp_path: Path, registry: Registry) -> None:
    net = torchvision.models.resnet18(weights=None)
    path = export(registry.save("net", {"model": net.state_dict()}), tmp_path / "a.safetensors")
    loaded = load_file(path)
    assert same(dict(sorted(loaded.items())), dict(sorted(net.state_dict().items())))
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert same(read_checkpoint_file(path).components["model"], loaded)


def test_every_element_type_that_safetensors_has_is_written(tmp_path: Path, registry: Registry) -> None:
    names = (
        "bool uint8 uint16 uint32 uint64 int8 int16 int32 int64 float16 bfloat16 float32 float64 complex64"
    )
    tensors = {name: torch.ones(3, 2).to(getattr(torch, name)) for name in names.split()}
    for name in ("float8_e4m3fn", "float8_e5m2", "float4_e2m1fn_x2"):
        tensors[name] = torch.arange(6, dtype=torch.uint8).reshape(3, 2).view(getattr(torch, name))
    tensors |= {"empty": torch.empty(0, 2), "scalar": torch.tensor(1.5), "turned": torch.randn(3, 4).t()}
    path = export(registry.save("net", {"model": tensors}), tmp_path / "a.safetensors")
    loaded = load_file(path)
    assert all(same(loaded[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    "metadata", [{"format": "np", "a": "b\x1b\u2028"}, {"$tensor": "0"}, {"t": "x" * 50_000}]
)
def test_the_metadata_of_a_safetensors_file_comes_back(
    tmp_path: Path, registry: Registry, metadata: dict[str, str]
) -> None:
    save_file({"w": TIED}, tmp_path / "in.safetensors", metadata=metadata)
    checkpoint = import_checkpoint(registry, read_checkpoint_file(tmp_path / "in.safetensors"), "net")
    with safe_open(export(checkpoint, tmp_path / "out.safetensors"), "pt") as file:
        assert file.metadata() == {"format": "pt", **metadata}


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ({"a": {"b": TIED}}, "'model/a' is of type dict"),
        ({"a": 1}, "'model/a' is of type int"),
        ({0: TIED}, "'model/0'"),
        ({"__metadata__": TIED}, "model/__metadata__"),
        ({"a": torch.zeros(1, dtype=torch.complex128)}, "'model/a': safetensors has no dtype for complex128"),
        ([TIED], "not a dict of tensors"),
    ],
)
def test_what_safetensors_cannot_hold_is_named(
    tmp_path: Path, registry: Registry, model: Any, told: str
) -> None:
    checkpoint = registry.save("net", {"model": model})
    with pytest.raises(Unsupported, match=told):
        export(checkpoint, tmp_path / "a.safetensors")
    assert same(torch.load(export(checkpoint, tmp_path / "a.pt", component="model")), model)
    assert sorted(os.listdir(tmp_path)) == ["a.pt", "registry"]


@EVERY_FORMAT
def test_a_file_is_overwritten_only_by_force(tmp_path: Path, registry: Registry, name: str) -> None:
    checkpoint = registry.save("net", {"model": {"w": TIED}})
    (tmp_path / name).write_bytes(b"mine")
    with pytest.raises(Conflict, match="exists"):
        export(checkpoint, tmp_path / name)
    assert (tmp_path / name).read_bytes() == b"mine"
    export(checkpoint, tmp_path / name, force=True)
    assert same(read_checkpoint_file(tmp_path / name).components["model"], {"w": TIED})
    assert sorted(os.listdir(tmp_path)) == [name, "registry"]


@EVERY_FORMAT
@pytest.mark.usefixtures("umask")
def test_the_mode_follows_the_umask(tmp_path: Path, registry: Registry, name: str) -> None:
    path = export(registry.save("net", {"model": {"w": TIED}}), tmp_path / name)
    assert stat.S_IMODE(path.stat().st_mode) == 0o664


def test_a_link_is_followed(tmp_path: Path, registry: Registry) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link.pt").symlink_to("there/real.pt")
    export(registry.save("net", {"model": {"w": TIED}}), tmp_path / "link.pt")
    assert (tmp_path / "link.pt").is_symlink()
    assert os.listdir(tmp_path / "there") == ["real.pt"]


def test_what_is_no_file_is_never_replaced(tmp_path: Path, registry: Registry) -> None:
    checkpoint = registry.save("net", {"model": {"w": TIED}})
    (tmp_path / "folder.pt").mkdir()
    os.mkfifo(tmp_path / "pipe.pt")
    for name in ("folder.pt", "pipe.pt"):
        with pytest.raises(Conflict, match="not a regular file"):
            export(checkpoint, tmp_path / name, force=True)
    with pytest.raises(NotFound, match="there is no such folder"):
        export(checkpoint, tmp_path / "none" / "a.pt")
    with pytest.raises(Unsupported, match=r"\.safetensors"):
        export(checkpoint, tmp_path / "a.onnx")
    with pytest.raises(Invalid):
        export(checkpoint, tmp_path / "a\0.pt")


@EVERY_FORMAT
@pytest.mark.parametrize("kept", [0, 2000])
def test_a_full_disk_leaves_the_earlier_file(
    tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch, name: str, kept: int
) -> None:
    checkpoint = registry.save("net", {"model": {"w": torch.randn(1000)}})
    (tmp_path / name).write_bytes(b"mine")

    class Full(durable.Disk):
        room = kept

        def write(self, fd: int, path: Path, data: memoryview) -> int:
            if len(data) > self.room:
                raise OSError(28, "No space left on device")
            self.room -= len(data)
            return super().write(fd, path, data)

    monkeypatch.setattr(durable, "disk", Full())
    with pytest.raises(StorageError, match="no space left"):
        export(checkpoint, tmp_path / name, force=True)
    assert (tmp_path / name).read_bytes() == b"mine"
    assert sorted(os.listdir(tmp_path)) == [name, "registry"]


def test_a_folder_without_permission_is_named(
    tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = registry.save("net", {"model": {"w": TIED}})

    real = os.open

    def refuse(path: Any, flags: int, *options: Any, **more: Any) -> int:
        if flags & os.O_CREAT and "registry" not in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, flags, *options, **more)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(StorageError, match=rf"{tmp_path}: permission denied"):
        export(checkpoint, tmp_path / "a.pt")


@EVERY_FORMAT
def test_a_damaged_checkpoint_is_not_exported(tmp_path: Path, registry: Registry, name: str) -> None:
    checkpoint = registry.save("net", {"model": {"w": torch.zeros(1000)}})
    (pack,) = registry.store.pack_digests()
    path = registry.store.pack_path(pack)
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\1")
    with pytest.raises(Corrupt, match="model/w"):
        export(checkpoint, tmp_path / name)
    assert os.listdir(tmp_path) == ["registry"]


@EVERY_FORMAT
def test_progress_is_told_in_bytes_of_tensors(tmp_path: Path, registry: Registry, name: str) -> None:
    tree = {"model": {f"w{i}": torch.full((1 << 18,), float(i)) for i in range(4)}, "extra": torch.ones(5)}
    checkpoint = registry.save("net", tree)
    told: list[tuple[int, int]] = []
    export(checkpoint, tmp_path / name, component="model", progress=lambda *t: told.append(t))
    assert {total for _, total in told} == {4 << 20}
    done = [done for done, _ in told]
    assert done == sorted(done)
    assert done[-1] == 4 << 20
    assert any(1 << 20 <= at < 2 << 20 for at in done)


_EXPORT_LARGE = """
import resource, sys
from pathlib import Path
from registry.files.exporting import export
from registry.registry import Registry
import torch
checkpoint = Registry(Path(sys.argv[1]))["net"]
base = int(next(l for l in open("/proc/self/status") if l.startswith("VmData")).split()[1]) << 10
resource.setrlimit(resource.RLIMIT_DATA, (base + (208 << 20),) * 2)
export(checkpoint, Path(sys.argv[2]), verify=False)
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_DATA") or sys.platform != "linux", reason="Linux only")
@EVERY_FORMAT
def test_a_large_checkpoint_is_not_built_in_memory(tmp_path: Path, registry: Registry, name: str) -> None:
    """Private mappings count as data as soon as they are writable, so one copy of the tensors must fit."""
    registry.save("net", {"model": {f"w{i}": torch.full((2 << 20,), float(i)) for i in range(16)}})
    command = [sys.executable, "-c", _EXPORT_LARGE, str(registry.root), str(tmp_path / name)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "place", ["packs/a.pt", "packs/aa/a.pt", "tmp/a.pt", "link/a.safetensors", "registry.toml.pt"]
)
def test_nothing_is_written_among_what_a_registry_keeps_to_itself(
    tmp_path: Path, registry: Registry, place: str
) -> None:
    checkpoint = registry.save("net", {"model": {"w": torch.ones(2)}})
    target = registry.root / place
    (registry.root / "link").symlink_to("packs")
    target.parent.mkdir(exist_ok=True)
    for force in (False, True):
        with pytest.raises(Invalid, match="belongs to the registry; choose another place"):
            export(checkpoint, target, force=force)
    with pytest.raises(Invalid, match="belongs to the registry"):
        durable.write_file(target, b"a report")
    assert not target.exists()
    (registry.root / "link").unlink()
    for name in ("beside.pt", "tmp.pt", "packs-old.pt"):
        export(checkpoint, registry.root / name)
