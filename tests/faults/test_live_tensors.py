"""A pack never holds bytes that its digests deny, and what is restored is what was saved, whatever others do meanwhile."""

from __future__ import annotations

import errno
import itertools
import logging
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support import broken_rules, collect

from registry import Registry
from registry.store import durable, fingerprints, loading, pack, saving
from registry.store.digest import tensor_digest
from registry.store.errors import Corrupt, RegistryError, StorageError

COUNT = 100_000


@contextmanager
def changing(change: Callable[[], object]) -> Iterator[None]:
    """Another thread that changes something all the time."""
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            change()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def before_each_write(monkeypatch: pytest.MonkeyPatch, change: Callable[[int], object]) -> None:
    """Call something with 0, 1, 2 between a tensor's hashing and its writing.

    Where a tensor is written at once, it is between the hashing of the first part and its writing.
    """
    reserve, count = pack.PackWriter.reserve, itertools.count()

    def changed(self: pack.PackWriter, size: int) -> int:
        change(next(count))
        return reserve(self, size)

    monkeypatch.setattr(pack.PackWriter, "reserve", changed)


def write_at_once(monkeypatch: pytest.MonkeyPatch, at_once: bool = True) -> None:
    """Let all tensors but the first be written while they are hashed; or none."""
    monkeypatch.setattr(saving, "ALONE", 1 if at_once else 1 << 60)
    if not at_once:
        return
    monkeypatch.setattr(saving, "FIRST_BATCH", 1)
    monkeypatch.setattr(saving, "RUN", 1)
    monkeypatch.setattr(saving, "_THREADS", 1)
    find, work = saving._Hashing._hash, saving._write_new
    hashed = itertools.count()

    def write_new(*given: Any, **named: Any) -> Any:
        nonlocal hashed
        hashed = itertools.count()
        return work(*given, **named)

    def waiting(self: saving._Hashing, slot: int) -> Any:
        until = time.monotonic() + (1.0 if next(hashed) else 0.0)
        while self.writer is None and time.monotonic() < until:
            time.sleep(0.001)
        return find(self, slot)

    monkeypatch.setattr(saving, "_write_new", write_new)
    monkeypatch.setattr(saving._Hashing, "_hash", waiting)


HOW = pytest.mark.parametrize("at_once", [False, True], ids=["checked", "at once"])


def assert_whole(registry: Registry) -> None:
    assert list(registry.verify().problems) == []
    assert broken_rules(registry) == []


class Holder:
    """Something to save whose state is a live tensor."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.count = 0

    def state_dict(self) -> dict[str, torch.Tensor]:
        self.count += 1
        return {"w": self.tensor, "count": torch.tensor(self.count)}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.tensor.copy_(state["w"])


@pytest.mark.parametrize("size", [10, COUNT, 3_000_000])
@pytest.mark.parametrize(
    "wait", [True, False, None], ids=["run, waiting", "run, in the background", "registry"]
)
def test_what_is_saved_while_another_thread_trains_can_be_loaded(
    tmp_path: Path, size: int, wait: bool | None
) -> None:
    registry = Registry(tmp_path / "r")
    tensor = torch.zeros(size)
    with changing(lambda: tensor.add_(1)):
        if wait is None:
            names = [registry.save("net", {"model": {"w": tensor}}, epoch=i).name for i in range(6)]
        else:
            with registry.run("net") as run:
                holder = Holder(tensor)
                saved = [run.save(model=holder, wait=wait) or run.wait() for _ in range(6)]
                names = [checkpoint.name for checkpoint in saved if checkpoint is not None]
    assert len(names) == 6
    for name in names:
        registry[name].load()
    assert_whole(registry)


def test_a_tensor_that_changes_before_it_is_written_is_saved_as_it_was_at_one_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    registry = Registry(tmp_path / "r")
    tensor = torch.full((COUNT,), 1.0)
    with monkeypatch.context() as patched:
        before_each_write(patched, lambda i: i or tensor.fill_(2.0))
        with caplog.at_level(logging.WARNING, "registry"):
            first = registry.save("net", {"model": {"w": tensor, "still": torch.zeros(COUNT)}})
    assert "another thread changed 1 of 2 tensors" in caplog.text
    assert torch.equal(first.load()["model"]["w"], torch.full((COUNT,), 2.0))
    assert torch.equal(first.load()["model"]["still"], torch.zeros(COUNT))
    tensor.fill_(1.0)
    second = registry.save("net", {"model": {"w": tensor}})
    assert torch.equal(second.load()["model"]["w"], tensor)  # not spoiled by what the first save hashed
    assert_whole(registry)


def test_tensors_that_are_written_at_once_are_saved_as_they_were_hashed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    registry = Registry(tmp_path / "r")
    tensors = {str(i): torch.full((10 * COUNT,), float(i)) for i in range(8)}
    write_at_once(monkeypatch)
    added: list[bool] = []
    before_each_write(monkeypatch, lambda i: torch._foreach_add_(list(tensors.values())[1:], 0.37))
    write = pack.PackWriter._write_checked
    monkeypatch.setattr(
        pack.PackWriter, "_write_checked", lambda *given: (added.append(True), write(*given))[1]
    )
    with caplog.at_level(logging.WARNING, "registry"):
        found = registry.save("net", {"model": tensors}).load()["model"]
    assert len(added) == 1  # the first one alone is written behind its hashing
    assert caplog.text == ""
    # Parts of one tensor may come from several moments, and what was saved is what was hashed.
    assert all(len(set(values.tolist())) <= 8 for values in found.values())
    assert_whole(registry)


@pytest.mark.parametrize("size", [COUNT, 3_000_000])
def test_many_tensors_are_saved_while_another_thread_trains(tmp_path: Path, size: int) -> None:
    registry = Registry(tmp_path / "r")
    tensors = [torch.zeros(size) for _ in range(4_000_000 // size + 4)]
    with changing(lambda: torch._foreach_add_(tensors, 1)):
        names = [registry.save("net", {"model": dict(enumerate(tensors))}).name for _ in range(3)]
    for name in names:
        registry[name].load()
    assert_whole(registry)


@pytest.mark.parametrize("place", [1, 2, 3], ids=["between", "again", "at the end"])
@pytest.mark.parametrize("equal", [False, True], ids=["stored before", "equal in the save"])
def test_room_of_a_tensor_that_is_stored_already_holds_zeros(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int, equal: bool
) -> None:
    registry = Registry(tmp_path / "r")
    known = torch.randn(2 * COUNT)
    if not equal:
        registry.save("other", {"model": {"w": known.clone()}})
    tensors = {f"{i}": torch.randn(2 * COUNT) for i in range(4)}
    tensors[str(place)] = tensors["0"].clone() if equal else known
    write_at_once(monkeypatch)
    found = registry.save("net", {"model": tensors})
    assert all(torch.equal(values, tensors[name]) for name, values in found.load()["model"].items())
    assert_whole(registry)
    (path,) = (path for path in (tmp_path / "r").glob("packs/*/*") if len(load_file(path)) > 2)
    pads = [values for name, values in load_file(path).items() if name.startswith("pad.")]
    assert any(len(values) == known.nbytes for values in pads)
    assert not any(values.any() for values in pads)
    if not equal:
        registry.remove(["other"], force=True)
    collect(registry, grace=0)
    assert all(torch.equal(values, tensors[name]) for name, values in found.load()["model"].items())
    assert_whole(registry)


def test_nothing_more_is_written_at_once_behind_a_tensor_that_is_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program that goes on with a frozen network must not write it once more."""
    registry = Registry(tmp_path / "r")
    frozen = {str(i): torch.randn(COUNT) for i in range(10)}
    registry.save("net", {"model": frozen})
    fingerprints.remembered.forget()
    for name in ("FIRST_BATCH", "BATCH", "RUN", "_THREADS"):
        monkeypatch.setattr(saving, name, 1)
    find = saving._Hashing._hash

    def slow(self: saving._Hashing, slot: int) -> Any:
        time.sleep(0.03)  # in which the last one is looked up
        return find(self, slot)

    monkeypatch.setattr(saving._Hashing, "_hash", slow)
    before = sum(path.stat().st_size for path in (tmp_path / "r").glob("packs/*/*"))
    # The largest come first.
    registry.save("net", {"model": {**frozen, "head": torch.randn(COUNT + 1), "tail": torch.randn(10)}})
    after = sum(path.stat().st_size for path in (tmp_path / "r").glob("packs/*/*"))
    assert 4 * COUNT < after - before < 4 * 4 * COUNT
    assert_whole(registry)


@pytest.mark.parametrize("at", [0, 3, 9])
def test_a_disk_that_refuses_while_tensors_are_written_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    registry = Registry(tmp_path / "r")
    write_at_once(monkeypatch)
    write, count = durable.Disk.write_at, itertools.count()

    def refused(*given: Any) -> int:
        if next(count) == at:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*given)

    tensors = {str(i): torch.randn(2 * COUNT) for i in range(10)}
    with monkeypatch.context() as patched:
        patched.setattr(durable.Disk, "write_at", refused)
        with pytest.raises(StorageError, match="no space left"):
            registry.save("net", {"model": tensors})
    assert list(registry.store.tmp.iterdir()) == []
    assert list((tmp_path / "r").glob("packs/*/*")) == []
    found = registry.save("net", {"model": tensors}).load()["model"]
    assert all(torch.equal(values, tensors[name]) for name, values in found.items())
    assert_whole(registry)


@HOW
def test_an_equal_tensor_does_not_suffer_from_one_that_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: bool
) -> None:
    registry = Registry(tmp_path / "r")
    write_at_once(monkeypatch, at_once)
    changes, stays = torch.full((COUNT,), 1.0), torch.full((COUNT,), 1.0)
    before_each_write(monkeypatch, lambda i: i or changes.fill_(2.0))
    found = registry.save("net", {"model": {"a": changes, "b": stays}}).load()["model"]
    assert torch.equal(found["a"], changes) or torch.equal(found["a"], stays)
    assert torch.equal(found["b"], stays)
    assert_whole(registry)


@HOW
def test_a_save_ends_however_often_its_tensors_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: bool
) -> None:
    registry = Registry(tmp_path / "r")
    write_at_once(monkeypatch, at_once)
    tensors = {str(i): torch.full((COUNT,), float(i)) for i in range(20)}

    def change(i: int) -> None:
        tensors[str(i % 20)].add_(100)  # each time another one, behind its hash

    before_each_write(monkeypatch, change)
    registry.save("net", {"model": tensors}).load()
    assert_whole(registry)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.full((300, 400), 1.0).t(),
        lambda: torch.full((20,), 1.0),
        lambda: torch.full((5_000,), 1.0),
        lambda: torch.full((COUNT,), 1.0).bfloat16(),
        lambda: np.full(COUNT, 1.0),
        lambda: np.full((300, 400), 1.0).T,
    ],
    ids=["view", "small", "of one part", "bfloat16", "array", "array view"],
)
@pytest.mark.parametrize("many", [False, True], ids=["few", "more than are hashed at a time"])
@HOW
def test_every_kind_of_tensor_may_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[], Any], many: bool, at_once: bool
) -> None:
    registry = Registry(tmp_path / "r")
    write_at_once(monkeypatch, at_once)
    tensor = make()
    before_each_write(monkeypatch, lambda i: tensor.__iadd__(1))
    if many:  # all are hashed before the first is written
        find_digests = saving._hash
        monkeypatch.setattr(saving, "_may_be_known", lambda state, known: True)
        monkeypatch.setattr(saving, "_hash", lambda state: (find_digests(state), tensor.__iadd__(1)))
    registry.save("net", {"model": {"w": tensor}}).load()
    assert_whole(registry)


def test_a_digest_is_remembered_for_the_bytes_that_were_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that changes a tensor to and fro must not make a later save refer to values that it never had."""
    tensor = np.full(COUNT, 1.0, np.float32)
    data = tensor.data.cast("B")
    hasher_of = fingerprints.tensor_hasher

    class Hasher:
        def __init__(self, *args: Any) -> None:
            self._hasher = hasher_of(*args)

        def update(self, part: Any) -> None:
            tensor.fill(2.0)
            self._hasher.update(part)
            tensor.fill(1.0)

        def hexdigest(self) -> str:
            return self._hasher.hexdigest()

    digests = fingerprints.Remembered()
    with monkeypatch.context() as patched:
        patched.setattr(fingerprints, "tensor_hasher", Hasher)
        digests.find(tensor.ctypes.data, "float32", (COUNT,), data)
    again = digests.find(tensor.ctypes.data, "float32", (COUNT,), data)
    assert again.digest == tensor_digest("float32", (COUNT,), data)


def test_copying_to_a_new_pack_notices_a_change_of_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Registry(tmp_path / "r")
    tensor = torch.arange(float(COUNT))
    registry.save("net", {"model": {"w": tensor}})
    ((digest,),) = registry.catalog.query("SELECT digest FROM tensors")
    (path,) = (tmp_path / "r").glob("packs/*/*")
    before_each_write(monkeypatch, lambda i: overwrite(path))
    with pytest.raises(Corrupt, match=path.stem):
        registry.store.copy_to_new_pack([digest])
    assert list((tmp_path / "r").glob("packs/*/*")) == [path]
    assert list(registry.store.tmp.iterdir()) == []


# -- restoring ---------------------------------------------------------------------------------------


def overwrite(path: Path) -> None:
    """Change a byte in the middle of a file."""
    os.chmod(path, 0o644)
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 0xFF]))


def write_through_a_mapping(path: Path) -> None:
    os.chmod(path, 0o644)
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as mapping:
        mapping[len(mapping) // 2] ^= 0xFF


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(COUNT))


def saved_net(tmp_path: Path, *, age: float) -> tuple[Registry, Path, torch.Tensor]:
    registry = Registry(tmp_path / "r")
    net = Net()
    with torch.no_grad():
        net.w.copy_(torch.arange(float(COUNT)))
    registry.save("net", {"model": net.state_dict()})
    time.sleep(age)
    (path,) = (tmp_path / "r").glob("packs/*/*")
    return registry, path, net.w.detach().clone()


FILL: list[Callable[[Registry, Net], None]] = [
    lambda registry, net: registry["net"].restore(model=net, rng=False),
    lambda registry, net: registry["net"].load_into(model=net.state_dict()),
]


@pytest.mark.parametrize("fill", FILL, ids=["restore", "load_into"])
@pytest.mark.parametrize("change", [overwrite, write_through_a_mapping])
@pytest.mark.parametrize("age", [0.0, 0.3], ids=["new", "older"])
def test_a_pack_that_changes_between_its_check_and_the_copy_is_noticed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fill: Callable[[Registry, Net], None],
    change: Callable[[Path], None],
    age: float,
) -> None:
    registry, path, _ = saved_net(tmp_path, age=age)
    verify, calls = loading.verify, []

    def verified(*args: Any) -> None:
        verify(*args)
        calls.append(1)
        if len(calls) == 1:
            change(path)

    monkeypatch.setattr(loading, "verify", verified)
    with pytest.raises(Corrupt, match=r"what was filled may be wrong; load it again"):
        fill(registry, Net())
    assert calls == [1]


@pytest.mark.parametrize("fill", FILL, ids=["restore", "load_into"])
def test_a_settled_pack_is_verified_once_and_others_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fill: Callable[[Registry, Net], None]
) -> None:
    registry, _, values = saved_net(tmp_path, age=0.3)
    verify, calls = loading.verify, []
    monkeypatch.setattr(loading, "verify", lambda *args: (verify(*args), calls.append(1)))
    net = Net()
    fill(registry, net)
    assert torch.equal(net.w, values)
    assert len(calls) == 1
    monkeypatch.setattr(loading, "is_local", lambda path: False)
    fill(registry, net)
    assert torch.equal(net.w, values)
    assert len(calls) == 3


@pytest.mark.parametrize("fill", FILL, ids=["restore", "load_into"])
def test_a_pack_that_is_removed_while_it_is_copied_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fill: Callable[[Registry, Net], None]
) -> None:
    registry, path, values = saved_net(tmp_path, age=0.0)
    registry.save("other", {"model": {"x": torch.ones(3)}})
    verify, calls = loading.verify, []

    def verified(*args: Any) -> None:
        verify(*args)
        calls.append(1)
        if len(calls) == 1:
            registry.remove(["net"], force=True)
            collect(registry, grace=0)

    monkeypatch.setattr(loading, "verify", verified)
    net = Net()
    fill(registry, net)
    assert not path.exists()
    assert torch.equal(net.w, values)


def test_a_module_may_change_the_state_that_it_is_given(tmp_path: Path) -> None:
    class Scaled(Net):
        def _load_from_state_dict(self, state_dict: dict[str, Any], *args: Any) -> None:
            state_dict["w"].mul_(2)
            super()._load_from_state_dict(state_dict, *args)

    registry, _, values = saved_net(tmp_path, age=0.0)
    net = Scaled()
    registry["net"].restore(model=net, rng=False)
    assert torch.equal(net.w, 2 * values)
    assert_whole(registry)


@pytest.mark.damages
def test_verifying_a_pack_with_differences_that_shrinks_meanwhile_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Registry(tmp_path / "r")
    values = torch.randn(COUNT)
    for i in range(4):
        registry.save("net", {"model": {"w": values + i * 1e-6}})
    registry.compact(["net"])
    assert registry.catalog.query("SELECT count(*) FROM tensors WHERE base IS NOT NULL")[0][0] > 0
    read = loading.Read.stored

    def shrunk(self: loading.Read, wanted: loading.Wanted) -> memoryview:
        path = pack.pack_path(registry.store.packs, wanted.location.pack)
        os.chmod(path, 0o644)
        os.truncate(path, 8192)
        return read(self, wanted)

    monkeypatch.setattr(loading.Read, "stored", shrunk)
    assert registry.verify().problems
    with pytest.raises(RegistryError):
        registry["net:v2"].load()
