"""Folders: every file is kept byte for byte or named, and comes back whole or not at all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from registry import Registry
from registry.checkpoints.checkpoint import Checkpoint
from registry.files.exporting import export
from registry.files.folder_writing import checkout
from registry.files.importing import import_checkpoint
from registry.files.reading import read_checkpoint_file
from registry.files.states import trainer_of
from registry.files.torch_files import read_torch_file
from registry.live import rng
from registry.store.durable import host, try_lock
from registry.store.errors import Conflict, Corrupt, Invalid, NotFound, RegistryError, Unsupported
from registry.store.places import opened_folder

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")


def folder_of(path: Path, files: dict[str, bytes], tensors: dict[str, torch.Tensor] = TENSORS) -> Path:
    path.mkdir(parents=True)
    save_file(tensors, path / "model.safetensors")
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def imported(registry: Registry, folder: Path) -> Checkpoint:
    return import_checkpoint(registry, read_checkpoint_file(folder), "net")


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


FILES = {
    "config.json": b'{"hidden_size": 3}',
    "tokenizer.json": os.urandom(3_000),
    "1_Pooling/config.json": b"{}",
    "empty.txt": b"",
    "$odd name.txt": b"x",
    "large.onnx": os.urandom(2 << 20),
    "training_args.bin": b"cos\nsystem\n(S'touch ran'\ntR.",
    "modeling_mine.py": b"raise SystemExit('this ran')",
}


def test_every_other_file_comes_back_byte_for_byte(tmp_path: Path, registry: Registry) -> None:
    checkpoint = imported(registry, folder_of(tmp_path / "in", FILES))
    assert checkpoint.files == FILES
    out = export(checkpoint, tmp_path / "out")
    found = files_in(out)
    assert {name: found[name] for name in FILES} == FILES
    assert set(found) == {*FILES, "model.safetensors"}
    back = load_file(out / "model.safetensors")
    assert all(torch.equal(back[name], tensor) for name, tensor in TENSORS.items())
    assert not list(tmp_path.glob(".out*"))
    again = imported(registry, out)
    assert again.files == FILES
    stored = registry.status().stored
    imported(registry, out)
    assert registry.status().stored - stored < 10_000
    assert not Path("ran").exists()


def test_a_version_without_files_has_none(registry: Registry) -> None:
    assert registry.save("net", {"model": TENSORS}).files == {}


def test_what_is_not_kept_is_named_with_the_reason(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "in", {".git/config": b"", "checkpoint-500/model.bin": b"", "kept": b"x"})
    (folder / "out.txt").symlink_to(tmp_path / "secret")
    (folder / "up").symlink_to("../..")
    (folder / "within.txt").symlink_to("kept")
    (folder / "loop").symlink_to("loop")
    (folder / "self").symlink_to(".")
    os.mkfifo(folder / "pipe")
    (folder / "a\nb").touch()
    (folder / os.fsdecode(b"\xff")).touch()
    found = read_checkpoint_file(folder)
    assert dict(found.components["files"]) == {"kept": b"x", "within.txt": b"x"}
    assert found.left_out == {
        ".git": "a hidden folder",
        "a\nb": "its name cannot be shown; rename it",
        "checkpoint-500": "a checkpoint of its own; import it by itself",
        "loop": "a broken link",
        "out.txt": "a link that leaves the folder",
        "pipe": "not a regular file",
        "self": "a link to a folder",
        "up": "a link that leaves the folder",
        os.fsdecode(b"\xff"): "its name cannot be shown; rename it",
    }


def test_a_folder_of_very_many_files_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("registry.files.folders._MAX_NAMES", 20)
    folder = folder_of(tmp_path / "in", {f"{i}/{i}": b"" for i in range(20)})
    with pytest.raises(Invalid, match="holds more than 20 files and folders"):
        read_checkpoint_file(folder)


def cache_entry(path: Path) -> Path:
    """A snapshot as the cache of the Hugging Face hub has it."""
    files = folder_of(path / "plain", {"config.json": b"{}", "sub/x.txt": b"x"})
    snapshot = path / "models--me--net" / "snapshots" / "0123abc"
    (blobs := snapshot.parents[1] / "blobs").mkdir(parents=True)
    for i, name in enumerate(files_in(files)):
        (files / name).rename(blobs / str(i))
        link = snapshot / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blobs / str(i), link.parent))
    return snapshot


def test_the_links_of_the_hubs_cache_are_followed(tmp_path: Path, registry: Registry) -> None:
    snapshot = cache_entry(tmp_path)
    checkpoint = imported(registry, snapshot)
    assert checkpoint.files == {"config.json": b"{}", "sub/x.txt": b"x"}
    assert torch.equal(checkpoint.state_dict()["a"], TENSORS["a"])


@pytest.mark.parametrize("way", ["elsewhere", "two links", "a folder", "another entry", "missing"])
def test_no_other_link_of_a_cache_is_followed(tmp_path: Path, way: str) -> None:
    snapshot = cache_entry(tmp_path)
    blobs = snapshot.parents[1] / "blobs"
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    link = snapshot / "tokenizer.json"
    target = blobs / "x"
    if way == "elsewhere":
        target = secret
    elif way == "two links":
        target.symlink_to(secret)
    elif way == "a folder":
        target.mkdir()
    elif way == "another entry":
        target = tmp_path / "models--other" / "blobs" / "x"
        target.parent.mkdir(parents=True)
        target.write_bytes(b"other")
    link.symlink_to(os.path.relpath(target, snapshot))
    found = read_checkpoint_file(snapshot)
    assert found.left_out == {"tokenizer.json": "a link that leaves the folder"}
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(os.path.relpath(target, snapshot))
    with pytest.raises(RegistryError, match="a link that leaves the folder"):
        read_checkpoint_file(snapshot)


@pytest.mark.parametrize(
    ("read", "left_out", "kept"),
    [
        (
            "model.safetensors",
            ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "tf_model.h5", "flax_model.msgpack"],
            [
                "adapter_model.safetensors",
                "diffusion_pytorch_model.safetensors",
                "model.bin",
                "adapter_model.bin",
            ],
        ),
        ("pytorch_model.bin", ["rust_model.ot"], ["adapter_model.bin", "model-00001-of-00002.safetensors"]),
        ("adapter_model.safetensors", ["adapter_model.bin"], ["model.bin", "tf_model.h5"]),
        (
            "diffusion_pytorch_model.safetensors",
            ["diffusion_pytorch_model.bin"],
            ["pytorch_model.bin.index.json.txt", "model.bin"],
        ),
        ("net.safetensors", [], ["tf_model.h5", "model.bin"]),
    ],
)
def test_only_other_formats_of_the_same_network_are_left_out(
    tmp_path: Path, registry: Registry, read: str, left_out: list[str], kept: list[str]
) -> None:
    folder = folder_of(tmp_path / "in", {name: os.urandom(50) for name in (*left_out, *kept)})
    (folder / "model.safetensors").rename(folder / read)
    if read.endswith(".bin"):
        torch.save(TENSORS, folder / read)
    found = read_checkpoint_file(folder)
    assert found.source["file"] == read
    assert found.left_out == dict.fromkeys(left_out, "by its name the same parameters in another format")
    checkpoint = import_checkpoint(registry, found, "net")
    assert checkpoint.files == {name: (folder / name).read_bytes() for name in kept}
    out = files_in(export(checkpoint, tmp_path / "out"))
    assert set(out) == {*kept, "model.safetensors" if read == "pytorch_model.bin" else read}


@pytest.mark.parametrize("name", ["my.model.v2.safetensors", "diffusion_pytorch_model.safetensors"])
def test_a_file_of_parameters_keeps_its_name(tmp_path: Path, registry: Registry, name: str) -> None:
    folder = folder_of(tmp_path / "in", {})
    (folder / "model.safetensors").rename(folder / name)
    assert list(files_in(export(imported(registry, folder), tmp_path / "out"))) == [name]


def test_a_folder_that_is_called_like_a_file_of_parameters_is_named(
    tmp_path: Path, registry: Registry
) -> None:
    (folder := tmp_path / "in" / "model.safetensors").mkdir(parents=True)
    (folder / "keep").touch()
    with pytest.raises(Invalid, match=r"is a folder that is called like a file of parameters; rename it$"):
        read_checkpoint_file(folder.parent)
    torch.save(TENSORS, folder.parent / "pytorch_model.bin")
    found = read_checkpoint_file(folder.parent)
    assert list(found.left_out) == ["model.safetensors"]
    assert list(files_in(export(import_checkpoint(registry, found, "net"), tmp_path / "out"))) == [
        "model.safetensors"
    ]


def test_a_trainers_checkpoint_becomes_components_and_fields(tmp_path: Path, registry: Registry) -> None:
    state = {
        "global_step": 7,
        "epoch": 1.75,
        "log_history": [
            {"loss": 0.5, "step": 5},
            {"eval_loss": 0.75, "eval_accuracy": 0.25, "step": 5},
            {"loss": 0.25, "step": 7},
        ],
    }
    files = {"trainer_state.json": json.dumps(state).encode(), "training_args.bin": b"cos\nsystem\n"}
    folder = folder_of(tmp_path / "checkpoint-7", files)
    optimizer = {"state": {0: {"step": torch.tensor(7.0)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    torch.save(optimizer, folder / "optimizer.pt")
    torch.save({"last_epoch": 7}, folder / "scheduler.pt")
    captured = [rng.capture(), rng.capture()]
    captured[1]["torch"] = torch.Generator().manual_seed(5).get_state()
    for rank, one in enumerate(captured):
        torch.save(rng.as_transformers(one, True), folder / f"rng_state_{rank}.pth")
    checkpoint = imported(registry, folder)
    assert set(checkpoint.components) == {"model", "optimizer", "scheduler", "rng", "ranks", "files"}
    assert (checkpoint.step, checkpoint.epoch, checkpoint.loss) == (7, 1, 0.25)
    assert dict(checkpoint.metrics) == {"eval_loss": 0.75, "eval_accuracy": 0.25}
    assert checkpoint.provenance["processes"] == 2
    assert checkpoint.files == files
    out = checkout(checkpoint, tmp_path / "resume")
    assert set(files_in(out)) == set(files_in(folder))
    assert torch.load(out / "optimizer.pt") == optimizer
    back = torch.load(out / "rng_state_1.pth", weights_only=False)
    assert back["numpy"][1].dtype == np.uint32
    assert torch.equal(back["cpu"], captured[1]["torch"])
    assert isinstance(back["python"][1], tuple)


@pytest.mark.parametrize("state", [b"no JSON", b"[]", b'{"log_history": 3}', b'{"global_step": -1}'])
def test_a_trainers_state_that_is_malformed_says_nothing(
    tmp_path: Path, registry: Registry, state: bytes
) -> None:
    checkpoint = imported(registry, folder_of(tmp_path / "in", {"trainer_state.json": state}))
    assert checkpoint.step is None
    assert checkpoint.files["trainer_state.json"] == state


@pytest.mark.parametrize(
    "odd",
    [
        {"python": 1},
        [],
        {"python": (3, (1,), None), "numpy": 5, "cpu": torch.ones(1)},
        {"npu": torch.ones(1)},
    ],
)
def test_odd_random_numbers_are_kept_as_they_are(tmp_path: Path, registry: Registry, odd: Any) -> None:
    folder = folder_of(tmp_path / "in", {"trainer_state.json": b"{}"})
    torch.save(odd, folder / "rng_state.pth")
    checkpoint = imported(registry, folder)
    assert "rng" not in checkpoint.components
    assert checkpoint.files["rng_state.pth"] == (folder / "rng_state.pth").read_bytes()


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"step": 1, "torch_cuda_manual_seed": torch.zeros(2, 3)},
        {"step": 1, "numpy_random_seed": ("x", torch.zeros(2, requires_grad=True), 0, 0, 0)},
    ],
)
def test_odd_random_numbers_of_accelerate_are_kept_as_they_are(
    tmp_path: Path, registry: Registry, more: dict[str, Any]
) -> None:
    folder = folder_of(tmp_path / "in", {})
    torch.save({**rng.as_accelerate(rng.capture(), False), **more}, folder / "random_states_0.pkl")
    checkpoint = imported(registry, folder)
    assert not {"rng", "accelerator"} & set(checkpoint.components)
    assert checkpoint.files == {"random_states_0.pkl": (folder / "random_states_0.pkl").read_bytes()}
    assert files_in(checkout(checkpoint, tmp_path / "out")).keys() == files_in(folder).keys()


@pytest.mark.parametrize("odd", [torch.ones(2, device="meta"), torch.eye(2).to_sparse()])
def test_a_state_that_no_component_can_hold_is_kept_as_bytes(
    tmp_path: Path, registry: Registry, odd: torch.Tensor
) -> None:
    folder = folder_of(tmp_path / "in", {"trainer_state.json": b"{}"})
    torch.save({"state": {0: odd}, "param_groups": []}, folder / "optimizer.pt")
    checkpoint = imported(registry, folder)
    assert checkpoint.files["optimizer.pt"] == (folder / "optimizer.pt").read_bytes()
    assert "optimizer" not in checkpoint.components


@pytest.mark.parametrize("several", [False, True])
def test_random_numbers_are_converted_both_ways(several: bool) -> None:
    state = rng.capture() | {"cuda": [torch.ones(16, dtype=torch.uint8)]}
    for to, back in (
        (rng.as_transformers, rng.of_transformers),
        (rng.as_accelerate, rng.of_accelerate),
    ):
        found = back(to(state, several))
        assert repr(found) == repr(state)
        assert torch.equal(found["python"]["state"], state["python"]["state"])
        assert torch.equal(found["numpy"]["keys"], state["numpy"]["keys"])
        assert torch.equal(found["torch"], state["torch"])


def test_a_version_with_a_trainers_state_among_its_files_is_checked_out(
    tmp_path: Path, registry: Registry
) -> None:
    components = {"model": TENSORS, "optimizer": {"param_groups": []}, "files": {"trainer_state.json": b"{}"}}
    out = checkout(registry.save("net", components), tmp_path / "out")
    assert sorted(files_in(out)) == ["model.safetensors", "optimizer.pt", "trainer_state.json"]


def test_only_what_training_goes_on_from_is_checked_out(tmp_path: Path, registry: Registry) -> None:
    plain = imported(registry, folder_of(tmp_path / "in", FILES))
    with pytest.raises(Unsupported, match=r"did not come from .* resume it in its program"):
        checkout(plain, tmp_path / "out")
    folder = folder_of(tmp_path / "trainer", {"trainer_state.json": b"{}"})
    torch.save({"state": {}, "param_groups": []}, folder / "optimizer.pt")
    checkpoint = imported(registry, folder)
    with pytest.raises(Unsupported, match="has been thinned and has no optimizer any more"):
        checkout(registry.thin(checkpoint.name), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name", ["../out.txt", "/dev/null/x", "a/../../b", "", "a//b", ".", "a\0b", "x" * 300, "a\nb", "a/" * 99]
)
def test_a_stored_name_cannot_lead_out_of_the_folder(tmp_path: Path, registry: Registry, name: str) -> None:
    checkpoint = registry.save("net", {"model": TENSORS, "files": {name: b"x"}})
    with pytest.raises(Corrupt, match="cannot be written below a folder"):
        export(checkpoint, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["registry"]


@pytest.mark.parametrize("weights", [5, [], [5], {}, "", [""]])
def test_a_source_that_is_malformed_gives_the_usual_name(
    tmp_path: Path, registry: Registry, weights: Any
) -> None:
    checkpoint = registry.save("net", {"model": TENSORS}, source={"weights": weights, "folder": weights})
    assert list(files_in(export(checkpoint, tmp_path / "out"))) == ["model.safetensors"]


def test_files_that_are_no_files_are_refused(tmp_path: Path, registry: Registry) -> None:
    for files in ({"a": b"x", "a/b": b"x"}, {"a": torch.ones(1)}, ["a"], {1: b"x"}):
        checkpoint = registry.save("net", {"model": TENSORS, "files": files})
        with pytest.raises(RegistryError):
            export(checkpoint, tmp_path / "out")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["registry"]


def test_a_folder_is_never_replaced(tmp_path: Path, registry: Registry) -> None:
    checkpoint = registry.save("net", {"model": TENSORS})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(Conflict, match="is not empty, and a folder is never overwritten"):
        export(checkpoint, tmp_path / "full", force=True)
    (tmp_path / "file").touch()
    with pytest.raises(Conflict, match="something that is not a folder"):
        export(checkpoint, f"{tmp_path}/file/")
    with pytest.raises(NotFound, match="there is no such folder"):
        export(checkpoint, tmp_path / "none" / "out")
    (tmp_path / "empty").mkdir()
    assert export(checkpoint, tmp_path / "empty") == tmp_path / "empty"
    assert [path.name for path in (tmp_path / "empty").iterdir()] == ["model.safetensors"]
    with pytest.raises(Invalid, match="max_shard_size is '0'"):
        export(checkpoint, tmp_path / "out", max_shard_size=0)
    with pytest.raises(NotFound, match="has no component model; name one of optimizer"):
        export(registry.save("odd", {"optimizer": {}}), tmp_path / "out")


def test_several_networks_are_numbered_and_shards_are_not_cut(tmp_path: Path, registry: Registry) -> None:
    networks = [{"w": torch.full((8,), float(i))} for i in range(3)]
    out = export(registry.save("net", {"models": networks}), tmp_path / "out", max_shard_size=1)
    assert sorted(files_in(out)) == ["model.safetensors", "model_1.safetensors", "model_2.safetensors"]
    out = export(registry.save("big", {"model": TENSORS}), tmp_path / "big", max_shard_size=1)
    assert len(files_in(out)) == 3
    assert dict(read_checkpoint_file(out).components["model"]).keys() == TENSORS.keys()


KILLED = """
import os, signal, sys
from pathlib import Path
from registry import Registry
from registry.files.exporting import export
from registry.store import durable

class Disk(durable.Disk):
    count = 0

    def _step(self):
        Disk.count += 1
        if Disk.count == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)

for name in ("write", "sync", "sync_folder", "rename", "mkdir"):
    def step(self, *args, _name=name):
        self._step()
        return getattr(durable.Disk, _name)(self, *args)
    setattr(Disk, name, step)
registry = Registry(sys.argv[1])
durable.disk = Disk()
export(registry["net"], sys.argv[2])
"""


def test_an_export_that_is_killed_leaves_no_folder_or_a_whole_one(tmp_path: Path, registry: Registry) -> None:
    checkpoint = imported(registry, folder_of(tmp_path / "in", {"a/b": b"x", "config.json": b"{}"}))
    whole = files_in(export(checkpoint, tmp_path / "whole"))
    program = tmp_path / "programs" / "program.py"
    program.parent.mkdir()
    program.write_text(KILLED)
    leftovers: list[Path] = []
    for step in (*range(1, 40, 4), 10_000):
        out = tmp_path / f"out{step}"
        command = [sys.executable, str(program), str(registry.root), str(out), str(step)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        assert not out.exists() or files_in(out) == whole
        leftovers += list(tmp_path.glob(".out*"))
        if not out.exists():
            assert files_in(export(checkpoint, out)) == whole
        assert not list(tmp_path.glob(".out*"))
        if done.returncode == 0:
            break
    else:
        pytest.fail("no export ended")
    assert step > 10
    assert len(leftovers) > 3


def test_an_export_leaves_folders_of_living_processes_and_others_alone(
    tmp_path: Path, registry: Registry
) -> None:
    checkpoint = registry.save("net", {"model": TENSORS})
    gone = subprocess.Popen(["true"])
    gone.wait()
    random = "0123456789abcdef"
    others = [
        f".out-{host()}-{os.getpid()}-{random}",
        f".out-elsewhere-{gone.pid}-{random}",
        f".out-{host()}-{gone.pid}-mine",
        f".out2-{host()}-{gone.pid}-{random}",
    ]
    locked = f".out-{host()}-{gone.pid}-{random[::-1]}"
    for name in (*others, locked, f".out-{host()}-{gone.pid}-{random}"):
        (tmp_path / name).mkdir()
    with opened_folder(tmp_path / locked) as held:
        assert try_lock(held)
        export(checkpoint, tmp_path / "out")
    assert {path.name for path in tmp_path.glob(".out*")} == {*others, locked}


def test_an_error_leaves_nothing_behind(
    tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = imported(registry, folder_of(tmp_path / "in", {"config.json": b"{}"}))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "/somewhere/hidden")

    monkeypatch.setattr("registry.files.folder_writing.write_tensors", full)
    with pytest.raises(RegistryError, match=r"out: no space"):
        export(checkpoint, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "registry"]


def test_a_state_that_is_rewritten_while_it_is_read_leaves_no_version(
    tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(tmp_path / "in", {"trainer_state.json": b"{}"})
    path = folder / "optimizer.pt"
    torch.save({"state": {0: torch.ones(9)}, "param_groups": []}, path)
    os.utime(path, ns=(0, 0))

    def torn(path: Path) -> Any:
        tree = read_torch_file(path)
        os.utime(path)
        return tree

    monkeypatch.setattr("registry.files.folders.read_torch_file", torn)
    with pytest.raises(Conflict, match=r"optimizer.pt: the file was written to during the import"):
        imported(registry, folder)
    assert registry.names() == []


def test_a_state_that_cannot_be_read_as_it_is_being_written_leaves_no_version(
    tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(tmp_path / "in", {"trainer_state.json": b"{}", "optimizer.pt": b"half"})

    def torn(path: Path) -> Any:
        path.write_bytes(b"whole now")
        raise Invalid("not a readable file of torch.save")

    monkeypatch.setattr("registry.files.folders.read_torch_file", torn)
    with pytest.raises(Conflict, match=r"optimizer.pt: changed while it was read"):
        imported(registry, folder)
    assert registry.names() == []


def test_a_file_that_goes_while_the_folder_is_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(tmp_path / "in", {"a.txt": b"x", "b.txt": b"x"})
    listdir = os.listdir

    def without_b(path: Path) -> list[str]:
        names = listdir(path)
        (folder / "b.txt").unlink(missing_ok=True)
        return names

    monkeypatch.setattr(os, "listdir", without_b)
    with pytest.raises(Conflict, match=r"b.txt: was removed while the folder was read"):
        read_checkpoint_file(folder)
    monkeypatch.undo()
    (folder / "b.txt").touch()
    monkeypatch.setattr(
        "registry.files.folders.trainer_of", lambda names: (folder / "b.txt").unlink() or trainer_of(names)
    )
    with pytest.raises(Conflict, match=r"b.txt: was removed while the folder was read"):
        read_checkpoint_file(folder)


def test_a_file_that_changes_during_the_import_leaves_no_version(tmp_path: Path, registry: Registry) -> None:
    folder = folder_of(tmp_path / "in", {"a.txt": b"x" * 5_000})
    found = read_checkpoint_file(folder)

    def meddle(done: int, total: int) -> None:
        (folder / "a.txt").write_bytes(b"y" * 5_001)

    with pytest.raises(Conflict, match=r"a.txt: the file was written to during the import"):
        import_checkpoint(registry, found, "net", progress=meddle)
    assert registry.names() == []


def test_the_only_checkpoint_file_of_a_folder_is_read(tmp_path: Path, registry: Registry) -> None:
    """As trackers keep one: W&B downloads an artifact into a folder, MLflow logs `state_dict.pth` into one."""
    folder = tmp_path / "net:v3"
    folder.mkdir()
    torch.save({"state_dict": TENSORS, "epoch": 4}, folder / "model.ckpt")
    (folder / "notes.txt").write_bytes(b"x")
    checkpoint = imported(registry, folder)
    assert (checkpoint.epoch, checkpoint.files) == (4, {"notes.txt": b"x"})
    assert torch.equal(checkpoint.state_dict()["a"], TENSORS["a"])
    torch.save(TENSORS, folder / "last.ckpt")
    with pytest.raises(Invalid, match=r"holds 'last\.ckpt', 'model\.ckpt'; name one of them"):
        read_checkpoint_file(folder)
