"""Checkpoints of `torch.distributed.checkpoint` in the registry: written in shards, read in other shards or whole."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from together import start, together
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    _EmptyStateDictLoadPlanner,
)
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from registry import Config, Registry, RegistryReader, RegistryWriter, register_model
from registry.store import durable
from registry.store.errors import Corrupt, Incompatible, Invalid, NotFound, RegistryError, Unsupported
from registry.store.manifest import parse


class NetConfig(Config):
    width: int = 10


@register_model("tests-sharded", config=NetConfig)
class Net(nn.Module):
    """Sizes that four processes cannot share evenly, and a layer of which two of them get nothing."""

    def __init__(self, config: NetConfig) -> None:
        super().__init__()
        self.config = config
        self.first = nn.Linear(6, config.width)
        self.norm = nn.BatchNorm1d(config.width)
        self.last = nn.Linear(config.width, 2)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(self.first(inputs)).relu())  # type: ignore[no-any-return]


def trained(shard: bool = True) -> tuple[Net, torch.optim.Optimizer]:
    """The same network and optimizer state in each process, before it is sharded and after."""
    torch.manual_seed(1)
    net = Net(NetConfig())
    if shard:
        fully_shard(net)
    optimizer = torch.optim.AdamW(net.parameters(), 0.01)
    for _ in range(2):
        optimizer.zero_grad()
        net(torch.ones(4, 6) + torch.arange(4.0)[:, None]).square().mean().backward()
        optimizer.step()
    return net, optimizer


def state_of(net: nn.Module, optimizer: torch.optim.Optimizer, **more: Any) -> dict[str, Any]:
    model, moments = get_state_dict(net, optimizer)
    return {"model": model, "optimizer": moments, **more}


def whole(state: Any) -> Any:
    """A state with whole tensors as lists of numbers, for JSON."""
    if isinstance(state, dict):
        return {key: whole(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [whole(value) for value in state]
    if isinstance(state, DTensor):
        state = state.full_tensor()
    return state.tolist() if isinstance(state, torch.Tensor) else state


# -- four processes save -------------------------------------------------------------------------------------


def save_in_shards(root: str) -> Any:
    registry = Registry(root)
    net, optimizer = trained()
    found = []
    with registry.run("net", name="one", config=NetConfig(), monitor="loss") as run:
        state = state_of(net, optimizer, step=7, note={"names": ["a", "b"], "$odd": None})
        saved = dcp.save(state, storage_writer=run.sharded(epoch=1, loss=0.5, network=net))
        found.append(saved.storage_data)
        saved = dcp.save(state, storage_writer=run.sharded(epoch=2, loss=0.25, network=net))
        found.append(saved.storage_data)
        writer = RegistryWriter(registry)
        future = dcp.async_save(state, checkpoint_id="later", storage_writer=writer)
        found.append(future.result().storage_data)  # type: ignore[union-attr]
        with pytest.raises(Unsupported, match=r"^model is sharded over processes.*run.sharded"):
            run.save(model=net)
    return [found, whole(state)]


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    root = tmp_path_factory.mktemp("sharded")
    results = together(4, save_in_shards, root)
    for result in results:
        assert result[0] == ["net:v1", "net:v2", "later:v1"]
        assert result[1] == results[0][1]
    return root, results[0][1]


def load_in_shards(root: str, reference: str) -> Any:
    registry = Registry(root, create=False)
    torch.manual_seed(5)
    net = Net(NetConfig())
    if dist.get_world_size() > 1:
        fully_shard(net)
    optimizer = torch.optim.AdamW(net.parameters(), 0.5)
    state = state_of(net, optimizer, step=0, note={"names": [], "$odd": 1})
    dcp.load(state, storage_reader=RegistryReader(registry, reference))
    set_state_dict(net, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return whole(state_of(net, optimizer, step=state["step"], note=state["note"]))


@pytest.mark.parametrize("count", [1, 2, 4])
def test_what_four_saved_any_number_loads(sharded: tuple[Path, Any], count: int) -> None:
    root, expected = sharded
    for result in together(count, load_in_shards, root, "net:v1"):
        assert result == expected


def test_each_process_writes_its_shards_once(sharded: tuple[Path, Any]) -> None:
    root, _ = sharded
    registry = Registry(root, create=False)
    first, second, later = (registry[name] for name in ("net:v1", "net:v2", "later"))
    assert len(list(registry.store.pack_digests())) == 4  # what is saved again is there already
    stored = [name for pack in root.glob("packs/*/*.safetensors") for name in load_file(pack)]
    for path, info, shards in registry.store.manifest(first.id).listed:
        if shards[0][0] is None and info.elements > 1:
            assert stored.count(info.digest) == 1, path  # what all of them have is stored once
    digests = {path: digest for path, _, _, digest in first.parameters()}
    assert digests == {path: digest for path, _, _, digest in second.parameters()}
    assert digests == {path: digest for path, _, _, digest in later.parameters()}
    assert first.components == ("model", "optimizer", "note", "extra")
    assert (second.epoch, second.loss, second.parent, second.run) == (2, 0.25, "net:v1", "net/one")
    assert registry["net@best"].version == 2
    assert first.provenance["processes"] == 4
    assert first.provenance["builder"] == "tests-sharded"
    assert first.provenance["kinds"] == {"model": "Net"}
    manifest = json.loads(registry.store.manifest_path(first.id).read_text())
    shards = manifest["components"]["model"]["first.weight"]
    assert [offsets for offsets, _ in shards["$shards"]] == [[0, 0], [3, 0], [6, 0], [9, 0]]
    assert shards["shape"] == [10, 6]
    assert len(manifest["components"]["model"]["last.bias"]["$shards"]) == 2  # two have nothing of it
    assert manifest["components"]["model"]["norm.num_batches_tracked"].keys() == {"$tensor"}
    assert "dcp" not in first.record  # which is large, and of no use in a listing


def test_one_process_reads_it_whole(sharded: tuple[Path, Any], tmp_path: Path) -> None:
    root, expected = sharded
    registry = Registry(root, create=False)
    checkpoint = registry["net:v1"]
    assert whole(dict(checkpoint.state_dict())) == expected["model"]
    shapes = {path: shape for path, _, shape, _ in checkpoint.parameters()}
    assert shapes["model/first.weight"] == (10, 6)
    assert shapes["optimizer/state/last.bias/exp_avg"] == (2,)

    net = registry.build("net:v1")
    assert whole(net.state_dict()) == expected["model"]
    fresh = Net(NetConfig())
    optimizer = torch.optim.AdamW(fresh.parameters(), 0.5)
    checkpoint.restore(model=fresh, optimizer=optimizer)
    assert whole(fresh.state_dict()) == expected["model"]
    moments = optimizer.state[fresh.first.weight]["exp_avg"]
    assert moments.tolist() == expected["optimizer"]["state"]["first.weight"]["exp_avg"]
    assert optimizer.param_groups[0]["lr"] == 0.01

    into = {key: torch.zeros_like(value) for key, value in net.state_dict().items()}
    checkpoint.load_into(model=into)
    assert whole(into) == expected["model"]
    assert list(checkpoint.load("model/first.*")["model"]) == ["first.weight", "first.bias"]

    plain = registry.save("plain", {"model": net.state_dict()})
    report = registry.diff("net:v1", plain.name, values=True)
    assert report.is_same
    command = [sys.executable, "-m", "registry.cli", "--root", str(root)]
    done = subprocess.run(
        [*command, "export", "net:v1", str(tmp_path / "net.safetensors")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert whole(load_file(tmp_path / "net.safetensors")) == expected["model"]
    done = subprocess.run([*command, "diff", "net:v1", plain.name, "--json"], capture_output=True, text=True)
    assert '"changed": 0' in done.stdout or "changed" not in done.stdout, done.stdout
    done = subprocess.run([*command, "show", "net:v1", "--params"], capture_output=True, text=True)
    assert "10×6" in done.stdout or "10, 6" in done.stdout or "10x6" in done.stdout, done.stdout


def test_it_is_kept_verified_and_rebuilt_as_others_are(sharded: tuple[Path, Any], tmp_path: Path) -> None:
    root, expected = sharded
    copied = tmp_path / "copy"
    shutil.copytree(root, copied)
    registry = Registry(copied, create=False)
    assert registry.verify().problems == ()
    registry.collect_garbage(grace=0)
    (copied / "catalog.sqlite").unlink()
    Registry(copied, create=False).rebuild()
    again = Registry(copied, create=False)
    assert whole(dict(again["net:v1"].state_dict())) == expected["model"]
    state: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _load_state_dict(
            state,
            storage_reader=RegistryReader(again, "net:v1"),
            planner=_EmptyStateDictLoadPlanner(),
            no_dist=True,
        )
    assert whole(state) == expected
    (_, slot), *_ = next(
        one.shards
        for one in again.store.manifest(again["net:v1"].id).listed
        if one.path == "model/first.weight"
    )
    digest = again.store.manifest(again["net:v1"].id).tensors[slot].digest
    place = again.catalog.locate([digest])[digest]
    pack = again.store.pack_path(place.pack)
    data = bytearray(pack.read_bytes())
    data[place.start] ^= 1
    pack.chmod(0o644)
    pack.write_bytes(data)
    assert again.verify().problems
    target = {"model": Net(NetConfig()).state_dict()}
    before = whole(target)
    with pytest.raises(CheckpointException, match="are not what was saved"):
        alone(lambda: dcp.load(target, storage_reader=RegistryReader(again, "net:v1")))
    assert whole(target) == before


def alone(call: Callable[[], Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dcp says that it is alone
        return call()


# -- what a user of dcp relies on, in one process ------------------------------------------------------------

NESTED = {
    "model": {"w": torch.arange(6.0).reshape(2, 3), "half": torch.ones(3, dtype=torch.bfloat16)},
    "deep": {
        "list": [torch.ones(2), {"x": 1.5, "t": torch.zeros(())}],
        "words": ["a", None, True],
        "empty": {},
    },
    "epoch": 3,
    "history": [0.1, float("nan")],
}


def zeroed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: zeroed(item) for key, item in value.items()}
    if isinstance(value, list):
        return [zeroed(item) for item in value]
    return torch.zeros_like(value) if isinstance(value, torch.Tensor) else None


@pytest.mark.parametrize("flatten", [True, False])
def test_nested_values_survive_with_and_without_flattening(tmp_path: Path, flatten: bool) -> None:
    registry = Registry(tmp_path)
    writer = RegistryWriter(registry, "net", epoch=3, metrics={"accuracy": 0.5})
    planner = DefaultSavePlanner(flatten_state_dict=flatten, flatten_sharded_tensors=flatten)
    alone(lambda: dcp.save(NESTED, storage_writer=writer, planner=planner, no_dist=True))
    assert writer.checkpoint is not None
    assert writer.checkpoint.name == "net:v1"
    assert registry["net"].metrics == {"accuracy": 0.5}
    assert set(registry["net"].components) == {"model", "deep", "extra"}
    assert repr(registry["net"].load("extra")) == "{'extra': {'epoch': 3, 'history': [0.1, nan]}}"
    assert torch.equal(registry["net"].state_dict()["w"], NESTED["model"]["w"])  # type: ignore[index]
    target = zeroed(NESTED)
    reader = RegistryReader(registry)
    alone(
        lambda: dcp.load(
            target,
            checkpoint_id="net:v1",
            storage_reader=reader,
            planner=DefaultLoadPlanner(flatten_state_dict=flatten, flatten_sharded_tensors=flatten),
            no_dist=True,
        )
    )
    assert repr(target) == repr(NESTED)


def test_a_state_dict_without_mappings_is_the_model(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    net = Net(NetConfig())
    alone(
        lambda: dcp.save(dict(net.state_dict()), checkpoint_id="net", storage_writer=RegistryWriter(registry))
    )
    assert registry["net"].components == ("model",)
    fresh = Net(NetConfig())
    registry["net"].restore(model=fresh)
    assert whole(fresh.state_dict()) == whole(net.state_dict())
    state = {key: torch.zeros_like(value) for key, value in net.state_dict().items()}
    alone(lambda: dcp.load(state, storage_reader=RegistryReader(registry, "net")))
    assert whole(state) == whole(dict(net.state_dict()))


def test_an_optimizer_of_one_process_goes_back_without_dcp(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    net, optimizer = trained(shard=False)
    state = {
        "model": net.state_dict(),
        "optimizer": optimizer.state_dict(),
    }  # by number, which dcp makes text
    alone(lambda: dcp.save(state, storage_writer=RegistryWriter(registry, "net")))
    fresh = Net(NetConfig())
    other = torch.optim.AdamW(fresh.parameters(), 0.5)
    registry["net"].restore(model=fresh, optimizer=other)
    assert whole(other.state_dict()) == whole(optimizer.state_dict())


class Renaming(DefaultSavePlanner):
    """As torch's documentation has it: other names in the checkpoint than in the program."""

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        named = {"model": {f"net.{key}": value for key, value in state_dict["model"].items()}}
        super().set_up_planner(named, storage_meta, is_coordinator)


class Halving(DefaultSavePlanner):
    """What is stored is not what the program has."""

    def transform_object(self, write_item: Any, object: Any) -> Any:
        return super().transform_object(write_item, object // 2 if isinstance(object, int) else object)


def test_planners_of_the_users_are_obeyed(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    state = {"model": {"w": torch.ones(2)}, "step": 8}
    alone(lambda: dcp.save(state, storage_writer=RegistryWriter(registry, "a"), planner=Renaming()))
    assert list(registry["a"].state_dict()) == ["net.w"]
    alone(lambda: dcp.save(state, storage_writer=RegistryWriter(registry, "b"), planner=Halving()))
    assert registry["b"].extra == {"step": 4}
    partial = {"model": {"w": torch.zeros(2), "new": torch.full((3,), 5.0)}}
    planner = DefaultLoadPlanner(allow_partial_load=True)
    alone(lambda: dcp.load(partial, storage_reader=RegistryReader(registry, "b"), planner=planner))
    assert whole(partial) == {"model": {"w": [1.0, 1.0], "new": [5.0, 5.0, 5.0]}}


def test_saving_in_the_background_keeps_the_values_of_the_call(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    state = {"model": {"w": torch.ones(1000)}}
    future = alone(lambda: dcp.async_save(state, storage_writer=RegistryWriter(registry, "net")))
    state["model"]["w"].fill_(2)
    assert future.result().storage_data == "net:v1"
    assert registry["net"].state_dict()["w"].sum() == 1000


# -- bad input -----------------------------------------------------------------------------------------------


def saved_by_processes(root: str) -> None:
    from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

    with Registry(root).run("net", keep_last=2, monitor="loss") as run:
        for number in range(4):
            state = {"model": {"w": torch.full((4,), float(number))}}
            dcp.async_save(
                state,
                storage_writer=run.sharded(step=number, loss=4.0 - number),
                async_checkpointer_type=AsyncCheckpointerType.PROCESS,
            ).result()
        run.save(model=nn.Linear(1, 1), step=4, loss=9.0)


def test_what_another_process_publishes_belongs_to_the_run(tmp_path: Path) -> None:
    """It goes on from the version before, older ones are removed, and the next save goes on from it."""
    together(1, saved_by_processes, str(tmp_path / "r"))
    registry = Registry(tmp_path / "r")
    parents = {version.name: version.record.get("parent") for version in registry.versions("net")}
    assert parents == {"net:v4": "net:v3", "net:v5": "net:v4"}
    assert registry["net@best"].name == "net:v4"
    assert registry.verify().problems == ()


def test_what_cannot_be_saved_or_loaded_is_said(tmp_path: Path) -> None:
    registry = Registry(tmp_path)

    def save(state: Any, model: str | None = "net") -> None:
        alone(lambda: dcp.save(state, storage_writer=RegistryWriter(registry, model)))

    def load(state: Any, reference: str | None) -> None:
        alone(lambda: dcp.load(state, storage_reader=RegistryReader(registry, reference)))

    with pytest.raises(CheckpointException, match="Invalid: which model"):
        save({"model": {"w": torch.ones(1)}}, None)
    with pytest.raises(Invalid, match="cannot be the name of a model"):
        save({}, "a b")
    with pytest.raises(
        CheckpointException, match=r"Unsupported: model\.odd: a value of type builtins\.object"
    ):
        save({"model": {"w": torch.ones(1), "odd": object()}})
    with pytest.raises(CheckpointException, match=r"Unsupported: model\.w: a tensor of layout"):
        save({"model": {"w": torch.ones(1).to_sparse()}})
    with pytest.raises(CheckpointException, match=r"Invalid: '\$a' cannot be the name of a component"):
        save({"$a": {"w": torch.ones(1)}})
    with pytest.raises(CheckpointException, match="Invalid: 'w' stands beside 'extra'"):
        save({"w": torch.ones(1), "extra": {"w": 1}})
    with pytest.raises(Unsupported, match=r"^use_collectives=False"):
        alone(
            lambda: dcp.save({"a": 1}, storage_writer=RegistryWriter(registry, "net"), use_collectives=False)
        )
    assert registry.names() == []
    registry.collect_garbage(grace=0)
    assert not list(registry.store.pack_digests())

    save({"model": {"w": torch.ones(2, 3)}})
    registry.save("plain", {"model": {"w": torch.ones(2, 3)}})
    target = {"model": {"w": torch.zeros(2, 3)}}
    with pytest.raises(CheckpointException, match="which checkpoint"):
        load(target, None)
    with pytest.raises(NotFound, match="did you mean"):
        load(target, "nett")
    with pytest.raises(Incompatible, match=r"^plain:v1 was not written by dcp\.save; restore it before"):
        load(target, "plain")
    with pytest.raises(CheckpointException, match=r"Missing key in checkpoint state_dict: model\.v"):
        load({"model": {"v": torch.zeros(1)}}, "net")
    with pytest.raises(
        CheckpointException, match=r"Size mismatch between saved .*\[2, 3\].*\[3, 2\].*model\.w"
    ):
        load({"model": {"w": torch.zeros(3, 2)}}, "net")
    assert whole(target) == {"model": {"w": [[0.0] * 3] * 2}}


def save_on_hosts(root: str) -> list[float]:
    """Save from processes that share no folder but the bucket."""
    os.environ["XDG_DATA_HOME"] = f"{root}/host-{os.environ['RANK']}"
    registry = Registry(Path(root, "bucket").as_uri())
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for epoch in (1, 2):
        whole = distribute_tensor(torch.arange(8000.0) + epoch / 4, mesh, [Shard(0)])
        dcp.save({"model": {"w": whole}}, storage_writer=RegistryWriter(registry, "net", epoch=epoch))
    dist.barrier()
    found = Registry(Path(root, "bucket").as_uri())["net:v2"].load()
    return [float(found["model"]["w"][0]), float(found["model"]["w"][-1])]


def test_processes_on_different_hosts_save_shards_into_a_shared_registry(tmp_path: Path) -> None:
    for result in together(2, save_on_hosts, tmp_path):
        assert result == [0.5, 7999.5]


def bad_on_every_rank(root: str) -> list[str]:
    registry = Registry(root)
    rank = dist.get_rank()
    net, optimizer = trained()
    good = state_of(net, optimizer)
    dcp.save(good, storage_writer=RegistryWriter(registry, "net"))
    registry.save(f"plain-{rank}", {"model": {"w": torch.ones(1)}})
    found = []

    def note(attempt: Callable[[], Any]) -> None:
        try:
            attempt()
            found.append("fine")
        except CheckpointException as error:
            failed = {str(wrapped[0]) for wrapped in error.failures.values()}
            found.append(f"{sorted(error.failures)} {sorted(failed)}")
        except RegistryError as error:
            found.append(f"{type(error).__name__}: {error}")

    def load(state: Any, reference: str = "net:v1") -> None:
        dcp.load(state, storage_reader=RegistryReader(registry, reference))

    odd = {"model": good["model"], "mine": object()}
    note(lambda: dcp.save(odd, storage_writer=RegistryWriter(registry, "net")))
    if rank == 1:
        durable.disk.rename = _refuse  # type: ignore[method-assign]
    new = {"model": {key: value + 1 for key, value in good["model"].items()}}
    note(lambda: dcp.save(new, storage_writer=RegistryWriter(registry, "net")))
    if rank == 1:
        del durable.disk.rename  # type: ignore[method-assign]
    note(lambda: load({"model": {"nothing": torch.ones(1)}}))
    note(lambda: load({"model": {"first.bias": torch.ones(3)}}))
    note(lambda: load({"model": good["model"]}, "plain-0"))
    note(lambda: load({"model": good["model"]}, "net:v9"))
    note(lambda: load(good))
    return found


def _refuse(*_: object) -> None:
    raise OSError(5, "Input/output error")


def test_every_rank_gets_the_same_error(tmp_path: Path) -> None:
    results = together(3, bad_on_every_rank, tmp_path)
    assert results == [results[0]] * 3
    odd, broken, missing, shape, plain, absent, fine = results[0]
    assert "mine: a value of type builtins.object" in odd
    assert broken.startswith("[1] ")
    assert "the disk reports an I/O error" in broken
    assert "Missing key in checkpoint state_dict: model.nothing" in missing
    assert missing.startswith("[0, 1, 2] ")
    assert "Size mismatch" in shape
    assert plain.startswith("Incompatible: plain-0:v1 was not written by dcp.save")
    assert absent.startswith("NotFound: ")
    assert fine == "fine"
    registry = Registry(tmp_path, create=False)
    assert registry["net"].name == "net:v1"
    assert registry.verify().problems == ()


def other_versions(root: str) -> str:
    registry = Registry(root)
    state = {"model": {"w": torch.ones(dist.get_rank() + 1)}}
    try:
        dcp.load(state, storage_reader=RegistryReader(registry, f"net:v{dist.get_rank() + 1}"))
    except CheckpointException as error:
        (failed,) = {str(wrapped[0]) for wrapped in error.failures.values()}
        return failed
    return ""


def test_processes_that_found_different_checkpoints_stop(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    for size in (1, 2):
        alone(
            lambda size=size: dcp.save(
                {"model": {"w": torch.ones(size)}}, storage_writer=RegistryWriter(registry, "net")
            )
        )
    for told in together(2, other_versions, tmp_path):
        assert told == ("the processes would read different checkpoints, net:v1, net:v2; name the version")


def killed_in_a_save(root: str, who: str) -> None:
    registry = Registry(root)
    net, optimizer = trained()
    state = state_of(net, optimizer)
    dcp.save(state, storage_writer=RegistryWriter(registry, "net"))
    changed = {"model": {key: value * 2 for key, value in state["model"].items()}}
    if dist.get_rank() == int(who):
        durable.disk.rename = lambda *_: os._exit(9)  # type: ignore[method-assign]
    dcp.save(changed, storage_writer=RegistryWriter(registry, "net"))


@pytest.mark.parametrize("who", [0, 2])
def test_a_process_killed_in_a_save_leaves_the_earlier_checkpoint(tmp_path: Path, who: int) -> None:
    processes = start(3, killed_in_a_save, tmp_path, who)
    for process in processes:
        process.wait()
    assert [process.status != 0 for process in processes] == [True] * 3
    registry = Registry(tmp_path, create=False)
    before = {path: digest for path, _, _, digest in registry["net"].parameters()}
    assert registry["net"].name == "net:v1"
    assert registry.verify().problems == ()
    registry.collect_garbage(grace=0)
    assert len(list(registry.store.pack_digests())) == 3
    assert not list((tmp_path / "tmp").iterdir())
    assert before == {path: digest for path, _, _, digest in registry["net"].parameters()}


# -- hostile manifests ---------------------------------------------------------------------------------------


def shards_of(*shards: Any, shape: Any = (4, 2)) -> dict[str, Any]:
    return {"$shards": [list(shard) for shard in shards], "shape": list(shape)}


def manifests() -> Iterator[dict[str, Any]]:
    yield {"$shards": [], "shape": [4, 2]}
    yield {"$shards": 3, "shape": [4, 2]}
    yield {"$shards": [[[0, 0], 0], [[2, 0], 0]]}
    yield {"$shards": [[[0, 0]]], "shape": [4, 2]}
    yield {"$shards": [0, 1], "shape": [4, 2]}
    yield shards_of(([0, 0], 0))  # a half is missing
    yield shards_of(([0, 0], 0), ([1, 0], 0))  # they overlap
    yield shards_of(([0, 0], 0), ([0, 0], 0))
    yield shards_of(([0, 0], 0), ([3, 0], 0))  # behind the end
    yield shards_of(([0, 0], 0), ([-2, 0], 0))
    yield shards_of(([0], 0), ([2], 0))
    yield shards_of(([0, 0], 0), ([2, 0], 1))  # of another type
    yield shards_of(([0, 0], 0), ([2, 0], 7))
    yield shards_of(([0, 0], 0), ([2, 0], "0"))
    yield shards_of(([0, 0], 0), ([2, 0], 0), shape=[4, 2, 1])
    yield shards_of(([0, 0], 0), ([2, 0], 0), shape=[4.0, 2])


@pytest.mark.parametrize("node", [*manifests()], ids=str)
def test_shards_that_do_not_fit_are_refused(node: dict[str, Any]) -> None:
    def document(tree: Any) -> bytes:
        tensors = [["float32", [2, 2], "a" * 64], ["int32", [2, 2], "b" * 64]]
        parts = {"record": {}, "components": {"model": {"w": tree}}, "tensors": tensors}
        return json.dumps({"format": 1, **parts}).encode()

    fine = parse(document(shards_of(([0, 0], 0), ([2, 0], 0))))
    assert [one.info.shape for one in fine.listed] == [(4, 2)]
    with pytest.raises(Corrupt):
        parse(document(node))
