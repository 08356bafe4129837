"""Importing: what a file of another program becomes."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import pickle
import types
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file

from registry.files.exporting import export
from registry.files.importing import import_checkpoint
from registry.files.reading import read_checkpoint_file
from registry.registry import Registry
from registry.store.digest import digest
from registry.store.errors import Conflict, Invalid, NotFound, RegistryError, Unsupported

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")


def saved(path: Path, tree: Any) -> Path:
    torch.save(tree, path)
    return path


def same(left: Any, right: Any) -> bool:
    """Whether two trees have the same types, keys in the same order, and bits."""
    if isinstance(left, torch.Tensor):
        return (
            isinstance(right, torch.Tensor)
            and (left.dtype, left.shape) == (right.dtype, right.shape)
            and left.contiguous().numpy(force=True).tobytes()
            == right.contiguous().numpy(force=True).tobytes()
            if left.dtype != torch.bfloat16
            else same(left.view(torch.int16), right.view(torch.int16))
        )
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return (
            list(left) == list(right)
            and all(type(a) is type(b) for a, b in zip(left, right, strict=True))
            and all(same(left[key], right[key]) for key in left)
            and same(getattr(left, "_metadata", None), getattr(right, "_metadata", None))
        )
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(same(a, b) for a, b in zip(left, right, strict=True))
    return bool(left == right)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt", ".bin", ".PT"])
def test_a_bare_state_dict_is_the_component_model(tmp_path: Path, registry: Registry, suffix: str) -> None:
    net = torchvision.models.resnet18(weights=None)
    checkpoint = import_checkpoint(
        registry, read_checkpoint_file(saved(tmp_path / f"net{suffix}", net.state_dict())), "resnet18"
    )
    assert checkpoint.components == ("model",)
    fresh = torchvision.models.resnet18(weights=None)
    fresh.load_state_dict(checkpoint.state_dict())
    assert same(fresh.state_dict(), net.state_dict())


@pytest.mark.parametrize("optimizer_type", ["sgd", "adam"])
def test_a_training_checkpoint_fills_components_and_fields(
    tmp_path: Path, registry: Registry, optimizer_type: str
) -> None:
    net = torchvision.models.resnet18(weights=None, num_classes=10)
    optimizer: torch.optim.Optimizer
    if optimizer_type == "sgd":
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    else:
        optimizer = torch.optim.Adam(net.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    net(torch.randn(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    scheduler.step()
    tree = {
        "epoch": 7,
        "state_dict": net.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "loss": 0.25,
        "metrics": {"accuracy": 0.5, "no\nname": 1.0},
        "arch": "resnet18",
    }
    checkpoint = import_checkpoint(
        registry, read_checkpoint_file(saved(tmp_path / "last.pt", tree)), "resnet18"
    )
    assert set(checkpoint.components) == {"model", "optimizer", "scheduler", "extra"}
    assert (checkpoint.epoch, checkpoint.loss, dict(checkpoint.metrics)) == (7, 0.25, {"accuracy": 0.5})
    assert same(checkpoint.state_dict("optimizer"), optimizer.state_dict())
    assert checkpoint.state_dict("extra") == {"metrics": tree["metrics"], "arch": "resnet18"}
    optimizer.load_state_dict(checkpoint.state_dict("optimizer"))


@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict", "net", "weights"])
def test_every_usual_key_of_the_model_is_known(tmp_path: Path, key: str) -> None:
    imported = read_checkpoint_file(saved(tmp_path / "a.pt", {key: {"w": torch.ones(2)}, "iteration": 4}))
    assert same(imported.components, {"model": {"w": torch.ones(2)}})
    assert imported.step == 4


@pytest.mark.parametrize(
    ("key", "component"),
    [
        ("optimizer", "optimizer"),
        ("optimizer_state_dict", "optimizer"),
        ("optim", "optimizer"),
        ("scheduler", "scheduler"),
        ("scheduler_state_dict", "scheduler"),
        ("lr_scheduler", "scheduler"),
        ("scaler", "scaler"),
        ("scaler_state_dict", "scaler"),
        ("ema", "ema"),
        ("ema_state_dict", "ema"),
        ("model_ema", "ema"),
    ],
)
def test_every_usual_key_of_another_component_is_known(tmp_path: Path, key: str, component: str) -> None:
    tree = {"model": {"w": torch.ones(2)}, key: {"state": torch.zeros(1)}}
    imported = read_checkpoint_file(saved(tmp_path / "a.pt", tree))
    assert same(imported.components[component], {"state": torch.zeros(1)})
    assert set(imported.components) == {"model", component}


def test_a_lightning_checkpoint_is_understood(tmp_path: Path, registry: Registry) -> None:
    tree = {
        "epoch": 3,
        "global_step": 1200,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": OrderedDict({"net.weight": torch.randn(3, 3)}),
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.randn(3, 3)}}, "param_groups": [{"lr": 0.1}]}],
        "lr_schedulers": [{"last_epoch": 3}],
        "hyper_parameters": {"lr": 0.1, "layers": [1, 2]},
    }
    checkpoint = import_checkpoint(registry, read_checkpoint_file(saved(tmp_path / "a.ckpt", tree)), "net")
    assert (checkpoint.epoch, checkpoint.step) == (3, 1200)
    assert checkpoint.config == {"lr": 0.1, "layers": [1, 2]}
    assert same(checkpoint.state_dict("optimizer"), tree["optimizer_states"])
    assert same(checkpoint.state_dict("scheduler"), tree["lr_schedulers"])
    assert set(checkpoint.state_dict("extra")) == {
        "pytorch-lightning_version",
        "loops",
        "callbacks",
        "hyper_parameters",
    }


def test_an_architecture_name_under_model_is_not_taken_for_weights(tmp_path: Path) -> None:
    tree = {"model": "resnet18", "state_dict": {"w": torch.ones(2)}}
    imported = read_checkpoint_file(saved(tmp_path / "a.pt", tree))
    assert same(imported.components, {"model": {"w": torch.ones(2)}, "extra": {"model": "resnet18"}})


@pytest.mark.parametrize(
    ("value", "epoch"),
    [
        (3, 3),
        (torch.tensor(3), 3),
        (3.0, 3),
        (2.5, None),
        (-1, None),
        (True, None),
        ("3", None),
        (10**30, None),
    ],
)
def test_a_field_is_filled_from_a_plain_number_or_a_scalar_tensor(
    tmp_path: Path, value: Any, epoch: int | None
) -> None:
    tree = {"model": {"w": torch.ones(2)}, "epoch": value}
    imported = read_checkpoint_file(saved(tmp_path / "a.pt", tree))
    assert imported.epoch == epoch


def test_networks_under_names_of_their_own_stay_together_as_the_model(tmp_path: Path) -> None:
    tree = {"generator": {"w": torch.ones(2)}, "critic": {"w": torch.zeros(2)}, "epoch": 2}
    imported = read_checkpoint_file(saved(tmp_path / "gan.pt", tree))
    assert same(imported.components, {"model": tree})
    assert imported.epoch == 2


@pytest.mark.parametrize(
    "tree",
    [torch.ones(3), [torch.ones(3), 1], {0: torch.ones(3), "a": 1}, (torch.ones(1),), {None: torch.ones(1)}],
)
def test_any_tree_with_a_tensor_can_be_imported(tmp_path: Path, registry: Registry, tree: Any) -> None:
    checkpoint = import_checkpoint(registry, read_checkpoint_file(saved(tmp_path / "a.pt", tree)), "odd")
    assert same(checkpoint.state_dict(), tree)


@pytest.mark.parametrize("tree", [{}, [], 5, "weights", None, {"epoch": 3}, {"model": {}}])
def test_a_file_without_tensors_is_no_checkpoint(tmp_path: Path, tree: Any) -> None:
    with pytest.raises(Invalid, match="holds no tensors"):
        read_checkpoint_file(saved(tmp_path / "a.pt", tree))


def test_arguments_override_what_the_file_says(tmp_path: Path, registry: Registry) -> None:
    tree = {
        "model": {"w": torch.ones(2)},
        "epoch": 1,
        "step": 2,
        "loss": 3.0,
        "metrics": {"f1": 0.1, "auc": 0.2},
        "config": {"lr": 1},
    }
    checkpoint = import_checkpoint(
        registry,
        read_checkpoint_file(saved(tmp_path / "a.pt", tree)),
        "net",
        epoch=0,
        step=20,
        loss=30.0,
        metrics={"f1": 0.9},
        config={"lr": 2},
        meta={"who": "me"},
    )
    assert (checkpoint.epoch, checkpoint.step, checkpoint.loss) == (0, 20, 30.0)
    assert (dict(checkpoint.metrics), checkpoint.config) == ({"f1": 0.9, "auc": 0.2}, {"lr": 2})
    assert checkpoint.meta == {"who": "me"}


def test_the_source_names_the_file_without_its_folder(tmp_path: Path, registry: Registry) -> None:
    path = saved(tmp_path / "best \x1b[31m.pt", {"w": torch.ones(2)})
    before = path.read_bytes()
    checkpoint = import_checkpoint(registry, read_checkpoint_file(path), "net")
    source = checkpoint.record["source"]
    assert source["file"] == "best \\x1b[31m.pt"
    assert (source["format"], source["size"], source["digest"]) == ("torch", len(before), digest(before))
    assert checkpoint.record["lineage"] == [{"kind": "imported-from", "parent": source["file"]}]
    assert str(tmp_path) not in json.dumps(checkpoint.record)
    assert path.read_bytes() == before


def test_tied_tensors_stay_tied(tmp_path: Path, registry: Registry) -> None:
    weight = torch.randn(5, 4)
    checkpoint = import_checkpoint(
        registry,
        read_checkpoint_file(
            saved(tmp_path / "a.pt", {"model": {"in": weight, "out": weight}, "ema": {"in": weight}})
        ),
        "net",
    )
    loaded = checkpoint.load()
    pointers = {t.data_ptr() for t in (*loaded["model"].values(), loaded["ema"]["in"])}
    assert len(pointers) == 1


def test_importing_a_file_again_stores_no_tensor_twice(tmp_path: Path, registry: Registry) -> None:
    tensors = {"a": torch.randn(64, 64), "b": torch.randn(10).bfloat16()}
    import_checkpoint(registry, read_checkpoint_file(saved(tmp_path / "a.pt", tensors)), "net")
    packs = list(registry.store.pack_digests())
    save_file(tensors, tmp_path / "a.safetensors")
    second = import_checkpoint(registry, read_checkpoint_file(tmp_path / "a.safetensors"), "net")
    assert list(registry.store.pack_digests()) == packs
    assert same(dict(sorted(second.state_dict().items())), tensors)


def test_a_safetensors_file_is_read_with_every_element_type(tmp_path: Path, registry: Registry) -> None:
    names = (
        "bool uint8 uint16 uint32 uint64 int8 int16 int32 int64 float16 bfloat16 float32 float64 complex64"
    )
    tensors = {name: torch.ones(3, 2).to(getattr(torch, name)) for name in names.split()}
    tensors |= {f"empty {name}": torch.empty(0, 4, dtype=t.dtype) for name, t in tensors.items()}
    tensors["scalar"] = torch.tensor(2.5)
    for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"):
        tensors[name] = torch.arange(6, dtype=torch.uint8).reshape(3, 2).view(getattr(torch, name))
    tensors["float4"] = torch.arange(6, dtype=torch.uint8).reshape(3, 2).view(torch.float4_e2m1fn_x2)
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    checkpoint = import_checkpoint(registry, read_checkpoint_file(tmp_path / "a.safetensors"), "net")
    loaded = checkpoint.state_dict()
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        assert (loaded[name].dtype, loaded[name].shape) == (tensor.dtype, tensor.shape)
        if tensor.ndim:
            assert torch.equal(loaded[name].view(torch.uint8), tensor.view(torch.uint8))


def test_tensors_at_odd_bytes_are_read(tmp_path: Path) -> None:
    data = torch.arange(4, dtype=torch.float64)
    text = b'{"a":{"dtype":"F64","shape":[4],"data_offsets":[0,32]}}'
    path = tmp_path / "odd.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + data.numpy().tobytes())
    assert len(text) % 8
    assert same(read_checkpoint_file(path).components["model"]["a"], data)


def test_tensors_are_views_of_the_mapped_file(tmp_path: Path) -> None:
    tensors = {f"w{i}": torch.full((3, 5), float(i)) for i in range(3)}
    save_file(tensors, tmp_path / "a.safetensors")
    loaded = read_checkpoint_file(tmp_path / "a.safetensors").components["model"]
    pointers = sorted(tensor.data_ptr() for tensor in loaded.values())
    assert [b - a for a, b in itertools.pairwise(pointers)] == [60, 60]


def test_training_on_imported_tensors_leaves_the_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.ones(100)}, path)
    before = path.read_bytes()
    read_checkpoint_file(path).components["model"]["w"].zero_()
    assert path.read_bytes() == before


def test_metadata_of_any_size_and_name_is_kept(tmp_path: Path, registry: Registry) -> None:
    for i, metadata in enumerate([{"a": "b"}, {"$tensor": "0"}, {"tags": "x" * 100_000}]):
        save_file({"w": torch.ones(1)}, tmp_path / "a.safetensors", metadata=metadata)
        checkpoint = import_checkpoint(registry, read_checkpoint_file(tmp_path / "a.safetensors"), "net")
        kept = checkpoint.record["source"].get("metadata")
        assert (kept or checkpoint.state_dict("extra")["metadata"]) == metadata
        assert len(json.dumps(checkpoint.record)) < 30_000, i


def sharded(folder: Path, kind: str = "safetensors") -> Tensors:
    folder.mkdir(exist_ok=True)
    tensors = {f"layer.{i}.weight": torch.randn(4, 4) for i in range(4)}
    prefix = "model" if kind == "safetensors" else "pytorch_model"
    weight_map = {}
    for i, names in enumerate([list(tensors)[:2], list(tensors)[2:]]):
        shard = f"{prefix}-{i + 1:05}-of-00002.{kind}"
        part = {name: tensors[name] for name in names}
        if kind == "safetensors":
            save_file(part, folder / shard)
        else:
            torch.save(part, folder / shard)
        weight_map |= dict.fromkeys(names, shard)
    index = {"metadata": {"total_size": 256}, "weight_map": weight_map}
    (folder / f"{prefix}.{kind}.index.json").write_text(json.dumps(index))
    return tensors


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("by_index", [False, True])
def test_a_folder_of_shards_is_one_model(
    tmp_path: Path, registry: Registry, kind: str, by_index: bool
) -> None:
    folder = tmp_path / "hub"
    tensors = sharded(folder, kind)
    (folder / "config.json").write_text('{"hidden_size": 4, "layers": [1, null]}')
    index = next(folder.glob("*.index.json"))
    checkpoint = import_checkpoint(registry, read_checkpoint_file(index if by_index else folder), "bert")
    assert same(checkpoint.state_dict(), tensors)
    assert checkpoint.config == {"hidden_size": 4, "layers": [1, None]}
    source = checkpoint.record["source"]
    assert (source["file"], source["digest"], source["shards"]) == (index.name, digest(index.read_bytes()), 2)
    again = import_checkpoint(registry, read_checkpoint_file(folder), "bert", config={"mine": 1})
    assert again.config == {"mine": 1}


def test_a_folder_with_one_file_of_weights_needs_no_index(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"a": 1}')
    imported = read_checkpoint_file(tmp_path)
    assert (imported.config, imported.source["file"]) == ({"a": 1}, "model.safetensors")


def test_of_two_formats_the_better_one_is_read_and_the_other_is_left_out(tmp_path: Path) -> None:
    tensors = sharded(tmp_path, "safetensors")
    sharded(tmp_path, "bin")
    imported = read_checkpoint_file(tmp_path)
    assert same(imported.components["model"], tensors)
    assert set(imported.left_out.values()) == {"by its name the same parameters in another format"}
    assert sorted(imported.left_out) == sorted(path.name for path in tmp_path.glob("pytorch_model*"))
    read_checkpoint_file(tmp_path / "pytorch_model.bin.index.json")


def test_a_folder_with_two_networks_asks_for_one_of_them(tmp_path: Path) -> None:
    for name in ("actor.safetensors", "critic.safetensors"):
        save_file({"w": torch.ones(2)}, tmp_path / name)
    with pytest.raises(Invalid, match=r"holds 'actor.safetensors', 'critic.safetensors'; name one of them"):
        read_checkpoint_file(tmp_path)


def test_a_folder_without_weights_says_what_is_readable(tmp_path: Path) -> None:
    with pytest.raises(Invalid, match=r"no index and no tensors; readable are \.pt"):
        read_checkpoint_file(tmp_path)


def test_an_unknown_suffix_says_which_work(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1)}, tmp_path / "model.weights")
    with pytest.raises(
        Unsupported, match=r"readable are \.pt, \.pth, \.ckpt, \.bin, \.pth\.tar, \.safetensors"
    ):
        read_checkpoint_file(tmp_path / "model.weights")


HALF_OF_RESEARCH = {
    "zip": {},
    "legacy": {"_use_new_zipfile_serialization": False},
    "python's pickler": {
        "pickle_module": types.SimpleNamespace(__name__="pickle", Pickler=pickle._Pickler, dump=pickle.dump)
    },
}


@pytest.mark.parametrize("form", HALF_OF_RESEARCH)
def test_namespaces_scalars_of_numpy_and_paths_become_plain_values(
    tmp_path: Path, registry: Registry, form: str, caplog: pytest.LogCaptureFixture
) -> None:
    args = argparse.Namespace(
        lr=0.1, out=Path("/x/y"), rate=np.float64(0.25), inner=argparse.Namespace(names=["a"])
    )
    plain = {"lr": 0.1, "out": "/x/y", "rate": 0.25, "inner": {"names": ["a"]}}
    scalars = (
        np.bool_(True),
        np.int8(-3),
        np.uint64(2**63),
        np.float16(0.5),
        np.complex64(1 + 2j),
        np.str_("añ"),
    )
    tree = {
        "state_dict": {"w": torch.ones(3)},
        "args": args,
        "epoch": np.int64(3),
        "loss": np.float32(0.5),
        "nested": (1, (args, scalars)),
        "empty": b"",
        "torch": torch.__version__,
    }
    torch.save(tree, tmp_path / "a.pt", **HALF_OF_RESEARCH[form])
    found = import_checkpoint(registry, read_checkpoint_file(tmp_path / "a.pt"), "net")
    assert (found.epoch, found.loss, found.config) == (3, 0.5, plain)
    extra = found.load()["extra"]
    assert same(extra["args"], plain)
    assert same(extra["nested"], (1, (plain, (True, -3, 2**63, 0.5, 1 + 2j, "añ"))))
    assert same([extra["empty"], extra["torch"]], [b"", str(torch.__version__)])
    assert "an argparse.Namespace is read as a dict" in caplog.text
    back = export(found, tmp_path / "back.pt")
    assert same(torch.load(back, weights_only=True)["args"], plain)


class Call:
    """Pickled as a call of a function."""

    def __init__(self, function: Any, *arguments: Any, name: str = "") -> None:
        self._call = function, arguments

    def __reduce__(self) -> Any:
        return self._call


@pytest.mark.parametrize(
    "value",
    [
        Call(bytes, 1 << 40),
        Call(np.dtype, "O"),
        Call(np.dtype, "V9"),
        Call(np._core.multiarray.scalar, np.dtype("M8[ns]"), bytes(8)),
        Call(np._core.multiarray.scalar, np.dtype("f8"), bytes(4)),
        Call(np._core.multiarray.scalar, np.dtype("f8"), 5),
        Call(argparse.Namespace),
        Call(os.getcwd),
    ],
    ids=["bytes", "object", "void", "time", "short", "number", "call", "code"],
)
def test_a_stand_in_does_no_more_than_it_stands_for(tmp_path: Path, value: Any) -> None:
    torch.save({"w": torch.ones(2), "x": value}, tmp_path / "a.pt")
    if isinstance(value, Call) and value._call[0] is argparse.Namespace:
        assert read_checkpoint_file(tmp_path / "a.pt").components["model"]["x"] == {}
        return
    with pytest.raises((Invalid, Unsupported)) as caught:
        read_checkpoint_file(tmp_path / "a.pt")
    assert "\n" not in str(caught.value)


def test_tuples_that_nest_too_deeply_are_refused(tmp_path: Path) -> None:
    deep: Any = torch.__version__
    for _ in range(300):
        deep = (deep,)
    torch.save({"w": torch.ones(2), "x": deep}, tmp_path / "a.pt")
    with pytest.raises((Invalid, Unsupported)):
        import_checkpoint(Registry(tmp_path / "r"), read_checkpoint_file(tmp_path / "a.pt"), "net")


def test_a_whole_module_is_refused_with_advice(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", torch.nn.Linear(2, 2))
    with pytest.raises(Unsupported, match=r"Linear.*torch\.save\(model\.state_dict\(\)"):
        read_checkpoint_file(path)


def test_a_legacy_file_is_read(tmp_path: Path, registry: Registry) -> None:
    tensors = {"a": torch.randn(3), "b": torch.arange(3)}
    torch.save(tensors, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert same(
        import_checkpoint(registry, read_checkpoint_file(tmp_path / "old.pth"), "old").state_dict(), tensors
    )


def test_a_missing_file_is_not_found(tmp_path: Path) -> None:
    for name in ("none.pt", "none.safetensors", "none", "a.pt/b.pt"):
        with pytest.raises(NotFound, match="there is no such file"):
            read_checkpoint_file(tmp_path / name)
    with pytest.raises(Invalid):
        read_checkpoint_file("a\0.pt")


def test_a_link_to_a_file_is_followed(tmp_path: Path) -> None:
    for name in ("real.pt", "real.safetensors"):
        if name.endswith(".pt"):
            torch.save({"w": torch.ones(1)}, tmp_path / name)
        else:
            save_file({"w": torch.ones(1)}, tmp_path / name)
        link = tmp_path / f"best-{name}"
        link.symlink_to(name)
        assert same(read_checkpoint_file(link).components["model"]["w"], torch.ones(1))


def test_a_file_that_is_written_to_during_the_import_leaves_no_version(
    tmp_path: Path, registry: Registry
) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.ones(1000)}, path)

    def meddle(done: int, total: int) -> None:
        with path.open("r+b") as file:
            file.seek(-4, os.SEEK_END)
            file.write(b"\1\2\3\4")
        os.utime(path, ns=(1, 1))

    with pytest.raises(Conflict, match="written to during the import"):
        import_checkpoint(registry, read_checkpoint_file(path), "net", progress=meddle)
    assert registry.names() == []


def test_a_file_that_was_replaced_after_reading_does_no_harm(tmp_path: Path, registry: Registry) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.ones(1000)}, path)
    imported = read_checkpoint_file(path)
    save_file({"w": torch.zeros(10)}, tmp_path / "other")
    os.replace(tmp_path / "other", path)
    checkpoint = import_checkpoint(registry, imported, "net")
    assert same(checkpoint.state_dict(), {"w": torch.ones(1000)})


def test_a_tree_that_cannot_be_stored_is_refused_by_path(tmp_path: Path, registry: Registry) -> None:
    path = saved(tmp_path / "a.pt", {"model": {"w": torch.eye(3).to_sparse()}})
    with pytest.raises(RegistryError, match="model/w"):
        import_checkpoint(registry, read_checkpoint_file(path), "net")
    assert registry.names() == []
