"""Folders that torch.distributed.checkpoint wrote are imported as torch itself reads them, and run nothing."""

from __future__ import annotations

import os
import pickle
import shutil
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from together import together
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import metadata as torch_metadata
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from registry import Registry
from registry.files.exporting import export
from registry.files.importing import import_checkpoint
from registry.files.reading import read_checkpoint_file
from registry.store.errors import RegistryError


def state() -> dict[str, Any]:
    """Tensors of several kinds, and values beside them."""
    return {
        "model": OrderedDict(
            weight=torch.arange(12.0).reshape(3, 4),
            half=torch.randn(5).to(torch.bfloat16),
            eighth=torch.randn(4).to(torch.float8_e4m3fn),
            number=torch.tensor(7),
            empty=torch.empty(0, 4),
            turned=torch.arange(6).reshape(2, 3).T,
        ),
        "optimizer": {
            "state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.ones(3, 4)}},
            "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99), "params": [0]}],
        },
        "list": [torch.ones(1), {"deep": [torch.zeros(2)]}],
        "pair": (torch.ones(1), torch.ones(2)),
        "epoch": 3,
        "name": "mine",
    }


def as_torch_reads(folder: Path, file: Path) -> Any:
    dcp_to_torch_save(folder, file)
    return torch.load(file, weights_only=False)


def assert_same(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype
        assert found.shape == expected.shape
        assert torch.equal(
            found.contiguous().view(-1).view(torch.uint8), expected.contiguous().view(-1).view(torch.uint8)
        )
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert found == expected


def assert_imported_as_torch_reads(folder: Path, tmp_path: Path) -> None:
    """The state goes into a registry and out again, and is what torch makes of the folder."""
    registry = Registry(tmp_path / "registry")
    checkpoint = import_checkpoint(registry, read_checkpoint_file(folder), "net")
    export(checkpoint, tmp_path / "exported.pt")
    exported = torch.load(tmp_path / "exported.pt", weights_only=True)
    assert_same(exported, as_torch_reads(folder, tmp_path / "theirs.pt"))
    assert registry.verify().problems == ()


def test_a_folder_of_one_process_is_what_torch_reads(tmp_path: Path) -> None:
    dcp.save(state(), checkpoint_id=tmp_path / "one")
    assert_imported_as_torch_reads(tmp_path / "one", tmp_path)


def test_flat_names_stay_flat_where_the_planner_did_not_flatten(tmp_path: Path) -> None:
    flat = {"a.weight": torch.ones(2), "b.weight": torch.zeros(3)}
    dcp.save(flat, checkpoint_id=tmp_path / "f", planner=dcp.DefaultSavePlanner(flatten_state_dict=False))
    assert_same(read_checkpoint_file(tmp_path / "f").components, {"model": flat})


def save_sharded(folder: str) -> None:
    """In each of two processes: a network of FSDP2 after a step, saved both ways."""
    from torch.distributed.checkpoint.state_dict import get_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(5)
    network = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 1))
    fully_shard(network, mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.ones(2, 5)).sum().backward()
    optimizer.step()
    model, optim = get_state_dict(network, optimizer)
    own = {"model": model, "optimizer": optim, "plain": torch.arange(4), "step": 9}
    dcp.save(own, checkpoint_id=f"{folder}/saved")
    dcp.async_save(own, checkpoint_id=f"{folder}/async").result()


def test_shards_of_two_processes_become_whole_tensors(tmp_path: Path) -> None:
    together(2, save_sharded, tmp_path)
    for name in ("saved", "async"):
        assert len(list((tmp_path / name).glob("*.distcp"))) == 2
        (tmp_path / f"{name}-out").mkdir()
        assert_imported_as_torch_reads(tmp_path / name, tmp_path / f"{name}-out")
    imported = read_checkpoint_file(tmp_path / "saved")
    assert imported.components["model"]["0.weight"].shape == (7, 5)
    assert imported.step == 9


class Odd:
    """What no state dict holds."""


def test_a_value_that_would_run_code_is_left_out_and_named(tmp_path: Path) -> None:
    own = {"w": torch.ones(2), "odd": Odd(), "list": [torch.ones(1), Odd()]}
    dcp.save(own, checkpoint_id=tmp_path / "f")
    (tmp_path / "f" / "notes.txt").write_text("kept")
    imported = read_checkpoint_file(tmp_path / "f")
    assert set(imported.left_out) == {"odd", "list.1"}
    assert all("would run code" in reason for reason in imported.left_out.values())
    checkpoint = import_checkpoint(Registry(tmp_path / "registry"), imported, "net")
    assert list(checkpoint.files) == ["notes.txt"]
    assert_same(checkpoint.state_dict("model"), {"w": torch.ones(2), "list": [torch.ones(1), None]})


def call(function: str, *arguments: str) -> bytes:
    """A pickle that calls a function with texts."""
    module, name = function.split(":")
    words = b"".join(b"\x8c" + bytes([len(word)]) + word.encode() for word in arguments)
    return b"\x80\x04c" + f"{module}\n{name}\n".encode() + b"(" + words + b"tR."


PLANTED = "touch planted"
CHUNK = b"c" + torch_metadata.__name__.encode() + b"\nChunkStorageMetadata\n"
HOSTILE: dict[str, tuple[bytes, str]] = {
    "os.system": (call("os:system", PLANTED), "could run code .os.system.;"),
    "posix.system": (call("posix:system", PLANTED), "posix.system"),
    "eval": (call("builtins:eval", "open('planted', 'w')"), "builtins.eval"),
    "getattr": (call("builtins:getattr", "x", "y"), "builtins.getattr"),
    "a dotted name": (
        b"\x80\x04\x8c\x05torch\x8c\x09os.system\x93\x8c\x0d" + PLANTED.encode() + b"\x85R.",
        "torch.os.system",
    ),
    "an old instance": (b"(S'" + PLANTED.encode() + b"'\nios\nsystem\n.", "not the metadata"),
    "an old object": (b"(cos\nsystem\nS'" + PLANTED.encode() + b"'\no.", "os.system"),
    "a class is changed": (b"\x80\x04" + CHUNK + b"N}\x8c\x05state\x8c\x01xs\x86b.", "fills an object"),
    "a class is called": (b"\x80\x04" + CHUNK + b")R.", "something else stands"),
    "a dtype is called": (b"\x80\x04ctorch\nfloat32\n)R.", "calls what"),
    "a function of torch": (call("torch:load", "planted"), "torch.load"),
    "an extension": (b"\x80\x04\x82\x01.", "not the metadata|something else"),
    "a persistent object": (b"\x80\x04Pplanted\n.", "not the metadata|something else"),
    "a long bytearray": (
        b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b".",
        "not the metadata|something else",
    ),
    "a long text": (b"\x80\x04\x8d" + struct.pack("<Q", 1 << 40) + b".", "not the metadata|something else"),
    "a long frame": (b"\x80\x04\x95" + struct.pack("<Q", 1 << 40) + b"N.", "not the metadata|something else"),
    "a far memo": (b"\x80\x04Nr\xff\xff\xff\xff.", "not the metadata|something else"),
    "deep": (b"\x80\x04" + b")" + b"\x85" * 100_000 + b".", "not the metadata|something else"),
    "itself": (b"\x80\x04]\x94h\x00a.", "not the metadata|something else"),
    "no pickle": (b"hello", "not the metadata|something else"),
    "ends early": (b"\x80\x04", "not the metadata|something else"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_metadata_file_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    dcp.save({"w": torch.ones(2)}, checkpoint_id=tmp_path / "f")
    data, told = HOSTILE[kind]
    (tmp_path / "f" / ".metadata").write_bytes(data)
    monkeypatch.chdir(tmp_path)
    assert_refused(tmp_path / "f", told)
    assert not (tmp_path / "planted").exists()


def assert_refused(folder: Path, told: str) -> None:
    with pytest.raises(RegistryError, match=told) as caught:
        read_checkpoint_file(folder)
    assert "\n" not in str(caught.value)


@contextmanager
def rewritten(folder: Path) -> Iterator[torch_metadata.Metadata]:
    """The metadata of a folder, to be changed."""
    path = folder / ".metadata"
    changed = pickle.loads(path.read_bytes())
    yield changed
    path.write_bytes(pickle.dumps(changed))


def _cut(folder: Path) -> None:
    part = next(folder.glob("*.distcp"))
    os.truncate(part, part.stat().st_size - 1)


def _linked(folder: Path) -> None:
    part = next(folder.glob("*.distcp"))
    outside = folder.parent / "outside"
    part.rename(outside)
    part.symlink_to(outside)
    (folder / "other.distcp").touch()


def _overwritten(folder: Path) -> None:
    part = next(folder.glob("*.distcp"))
    part.write_bytes(bytes(part.stat().st_size))


def _of_place(**changes: Any) -> Callable[[Path], None]:
    """The places of the tensor `w` change; a function gets the old value."""

    def change(folder: Path) -> None:
        with rewritten(folder) as metadata:
            for index, place in metadata.storage_data.items():
                if index.fqn == "w":
                    vars(place).update({key: new(getattr(place, key)) for key, new in changes.items()})

    return change


def _of_tensor(change: Callable[[Any], object]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        with rewritten(folder) as metadata:
            change(metadata.state_dict_metadata["w"])

    return changed


def _of_metadata(change: Callable[[Any], object]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        with rewritten(folder) as metadata:
            change(metadata)

    return changed


def _two_pieces(metadata: Any) -> None:
    """The tensor `w` in two pieces, which are the same one."""
    (chunk,) = metadata.state_dict_metadata["w"].chunks
    metadata.state_dict_metadata["w"].chunks = [chunk, chunk]


def _one_place(metadata: Any) -> None:
    """The tensors `v` and `w` lie in the same place."""
    places = {index.fqn: place for index, place in metadata.storage_data.items()}
    vars(places["v"]).update(vars(places["w"]))


def _exchanged(metadata: Any) -> None:
    places = {index.fqn: place for index, place in metadata.storage_data.items()}
    one, other = dict(vars(places["w"])), dict(vars(places["n"]))
    vars(places["w"]).update(other)
    vars(places["n"]).update(one)


HUGE = torch.Size([1 << 40])
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "a part is missing": (
        lambda folder: shutil.move(folder / "__0_0.distcp", folder / "x.distcp"),
        "is not there",
    ),
    "cut short": (_cut, "is cut short"),
    "a link that leaves": (_linked, "a link that leaves the folder"),
    "zeros": (_overwritten, "not a file of torch.save"),
    "behind the end": (_of_place(offset=lambda old: old + (1 << 40)), "is cut short"),
    "before the beginning": (_of_place(offset=lambda old: -1), "outside its file"),
    "no length": (_of_place(length=lambda old: 0), "outside its file"),
    "a few bytes": (_of_place(length=lambda old: 4), "larger than its bytes"),
    "half an archive": (_of_place(length=lambda old: old - 100), "not a readable file"),
    "another folder": (_of_place(relative_path=lambda old: f"../f/{old}"), "not called like one"),
    "a file by number": (_of_place(relative_path=lambda old: 5), "malformed"),
    "an extension": (_of_place(transform_descriptors=lambda old: ["zstd"]), "extensions"),
    "a huge tensor": (_of_tensor(lambda w: vars(w).update(size=HUGE)), "have 4 of its"),
    "a huge piece": (
        _of_tensor(lambda w: (vars(w).update(size=HUGE), vars(w.chunks[0]).update(sizes=HUGE))),
        "larger than its bytes",
    ),
    "no such shape": (_of_tensor(lambda w: vars(w).update(size=torch.Size([0, 1 << 62]))), "no tensor has"),
    "no piece": (_of_tensor(lambda w: w.chunks.clear()), "have 0 of its 4"),
    "a piece outside": (
        _of_tensor(lambda w: vars(w).update(size=torch.Size([3]))),
        "lies outside the tensor",
    ),
    "a piece of a plane": (
        _of_tensor(lambda w: vars(w).update(size=torch.Size([2, 2]))),
        "number of dimensions",
    ),
    "a piece twice": (_of_metadata(_two_pieces), "overlap"),
    "a place twice": (_of_metadata(_one_place), "share bytes"),
    "another tensor there": (_of_metadata(_exchanged), "holds something else"),
    "another dtype": (
        _of_tensor(lambda w: vars(w.properties).update(dtype=torch.int32)),
        "holds something else",
    ),
    "sparse": (_of_tensor(lambda w: vars(w.properties).update(layout=torch.sparse_coo)), "make it dense"),
    "no place": (_of_metadata(lambda m: m.storage_data.clear()), "does not say where"),
    "no list of places": (_of_metadata(lambda m: vars(m).update(storage_data=None)), "malformed"),
    "no names": (_of_metadata(lambda m: m.state_dict_metadata.clear()), "lists 0 names"),
    "a path to nowhere": (_of_metadata(lambda m: m.planner_data.update(w=())), "malformed"),
    "a path inside a tensor": (_of_metadata(lambda m: m.planner_data.update(w=("v", "w"))), "another value"),
    "a path twice": (_of_metadata(lambda m: m.planner_data.update(w=("v",))), "another value"),
    "a far place in a list": (_of_metadata(lambda m: m.planner_data.update(w=("l", 1 << 40))), "gaps"),
    "a list and a dict": (
        _of_metadata(lambda m: m.planner_data.update(w=("l", 0), v=("l", "x"))),
        "list and a dict",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_folder_that_is_wrong_is_refused_in_one_line(tmp_path: Path, kind: str) -> None:
    torn, told = BROKEN[kind]
    dcp.save({"v": torch.zeros(4), "w": torch.ones(4), "n": torch.tensor(1)}, checkpoint_id=tmp_path / "f")
    torn(tmp_path / "f")
    assert_refused(tmp_path / "f", told)


def test_a_folder_without_its_metadata_says_that_the_save_did_not_end(tmp_path: Path) -> None:
    dcp.save({"w": torch.ones(2)}, checkpoint_id=tmp_path / "f")
    (tmp_path / "f" / ".metadata").unlink()
    assert_refused(tmp_path / "f", "without its .metadata.*the save did not end")
