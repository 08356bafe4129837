"""Saving: little memory, one pack, nothing left over, files that others may read."""

from __future__ import annotations

import errno
import os
import random
import stat
import subprocess
import sys
import time
import weakref
from collections.abc import Collection
from pathlib import Path

import numpy as np
import pytest
import torch

from registry.store import durable, header, saving
from registry.store.errors import StorageError, Unsupported
from registry.store.saving import Arena, Copying, Encoded
from registry.store.store import Store
from registry.store.tree import encode

PEAK = """
import sys, torch
from registry.store.store import Store

def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) << 10

state = {f"w{i}": torch.randn(2_500_000) for i in range(30)}          # 300 MB in tensors of 10 MB
state |= {f"v{i}": torch.randn(1_600, 1_600).T for i in range(8)}     # 80 MB that must be copied to be read
store = Store(sys.argv[1])
store.put({"warm": torch.ones(2_000_000)})
before = peak()
store.put({"model": state})
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_saving_needs_no_second_copy_in_memory(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PEAK, str(tmp_path / "s")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < (64 << 20) + 10_240_000


def files(root: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every file."""
    found = {}
    for path in root.rglob("*"):
        if path.is_file():
            found[str(path.relative_to(root))] = (path.stat().st_ino, path.stat().st_mtime_ns)
    return found


def test_a_save_leaves_one_pack_one_manifest_and_nothing_else(tmp_path: Path) -> None:
    store = Store(tmp_path)
    stored = store.put({"model": {"w": torch.ones(10), "b": torch.ones(3)}})
    assert stored.pack is not None
    paths = [store.pack_path(stored.pack.digest), store.manifest_path(stored.digest)]
    assert set(files(tmp_path)) == {str(path.relative_to(tmp_path)) for path in paths}


def test_saving_again_writes_no_pack(tmp_path: Path) -> None:
    store = Store(tmp_path)
    tree = {"model": {"w": torch.ones(10), "large": torch.randn(500_000)}}
    first = store.put(tree)
    before = files(store.packs)
    for again in (store, Store(tmp_path)):
        assert again.put(tree).digest == first.digest
        assert again.put({"model": {"w": torch.ones(10)}}).pack is None
    assert files(store.packs) == before


def test_a_state_without_tensors_has_no_pack(tmp_path: Path) -> None:
    store = Store(tmp_path)
    stored = store.put({"optimizer": {"lr": 0.1}, "empty": {}})
    assert stored.pack is None
    assert store.get(stored.digest) == {"optimizer": {"lr": 0.1}, "empty": {}}


def test_a_state_of_many_batches_is_stored_whole_and_once(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    tree: dict[str, torch.Tensor] = {}
    for i, size in enumerate(random.integers(0, 300_000, 200)):
        tensor = torch.from_numpy(random.integers(0, 256, int(size), np.uint8))
        tree[f"{i}"] = tensor
        if i % 7 == 0:
            tree[f"{i}.equal"] = tensor.clone()
        if i % 5 == 0:
            tree[f"{i}.view"] = tensor[::2]
    tree["large"] = torch.randn(saving.BATCH // 4 + 1_000)
    for i in range(6):  # more than may be copied at a time
        tree[f"copied.{i}"] = torch.randn(1_500, 1_500).T
    assert saving.COPIES_IN_FLIGHT < 6 * 9_000_000
    tree["last equals first"] = tree["1"].clone()
    store = Store(tmp_path)
    stored = store.put({"model": tree})
    assert stored.pack is not None
    contents = {(str(t.dtype), tuple(t.shape), t.numpy().tobytes()) for t in tree.values()}
    assert len(stored.pack.tensors) == len(contents)
    loaded = store.get(stored.digest)["model"]
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tree.items())


def test_progress_counts_every_byte_once(tmp_path: Path) -> None:
    tree = {"a": torch.randn(6_000_000), "b": torch.randn(100), "c": torch.randn(5_000_000)}
    total = sum(4 * tensor.numel() for tensor in tree.values())
    told: list[tuple[int, int]] = []
    for _ in range(2):
        told.clear()
        Store(tmp_path).put({"model": tree}, progress=lambda done, all: told.append((done, all)))
        assert told == sorted(told)
        assert {all for _, all in told} == {total}
        assert told[-1] == (total, total)


def test_a_pack_that_is_lost_or_cut_short_is_written_again(tmp_path: Path) -> None:
    tree = {"model": {"w": torch.ones(1_000), "b": torch.ones(3)}}
    first = Store(tmp_path).put(tree)
    assert first.pack is not None
    Store(tmp_path).pack_path(first.pack.digest).unlink()
    second = Store(tmp_path).put(tree)
    assert second.pack is not None
    assert second.pack.digest != first.pack.digest  # A name is never used again.
    assert torch.equal(Store(tmp_path).get(first.digest)["model"]["w"], torch.ones(1_000))


def test_training_on_after_a_save_does_not_change_what_is_stored(tmp_path: Path) -> None:
    net = torch.nn.Linear(3, 3)
    store = Store(tmp_path)
    expected = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    digest = store.put({"model": net.state_dict()}).digest
    with torch.no_grad():
        net.weight.add_(1)
    loaded = store.get(digest)["model"]
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
    assert store.put({"model": net.state_dict()}).digest != digest


def test_more_tensors_than_a_pack_has_room_for_are_refused_before_a_byte_is_written(tmp_path: Path) -> None:
    parts = torch.arange(150_000).split(1)
    store = Store(tmp_path)
    with pytest.raises(Unsupported, match="at most 32 are stored; stack small tensors"):
        store.put({"model": list(parts)})
    assert files(tmp_path) == {}
    halves = [store.put({"model": list(parts[:75_000])}), store.put({"model": list(parts[75_000:])})]
    digest = store.put({"model": list(parts)}).digest  # nothing of it is new
    assert all(half.pack is not None for half in halves)
    assert Store(tmp_path).get(digest)["model"][-1] == parts[-1]


def test_many_tensors_that_are_stored_already_take_no_room_in_the_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(header, "MAX_HEADER", 64 << 10)
    monkeypatch.setattr(saving, "MANY", 100)
    store = Store(tmp_path)
    halves = [list(torch.arange(start, start + 150).split(1)) for start in (0, 150)]
    for half in halves:
        store.put({"model": {str(i): part for i, part in enumerate(half)}})
    everything = {str(i): part for i, part in enumerate(halves[0] + halves[1])}
    with pytest.raises(Unsupported, match="stack small tensors"):
        store.put({"model": {name: part + 1_000 for name, part in everything.items()}})
    stored = store.put({"model": everything | {"large": torch.ones(2_000_000)}})
    assert stored.pack is not None
    assert len(stored.pack.tensors) == 1
    assert len(store.get(stored.digest)["model"]) == 301


def test_of_many_tensors_all_are_hashed_first_only_if_some_are_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "MANY", 1_000)
    hash_all, hashed = saving._hash, []

    def note(state: saving.Encoded) -> None:
        hashed.append(len(state.leaves))
        hash_all(state)

    monkeypatch.setattr(saving, "_hash", note)
    store = Store(tmp_path)
    trees = [{str(i): part for i, part in enumerate(torch.arange(2_000.0).split(1))} for _ in range(2)]
    trees[1]["7"] = torch.tensor([-1.0])
    for tree, expected in zip(trees, ([saving._TRIED], [saving._TRIED, 2_000]), strict=True):
        hashed.clear()
        loaded = store.get(store.put({"model": tree}).digest)["model"]
        assert hashed == expected
        assert all(torch.equal(loaded[name], tensor) for name, tensor in tree.items())


def hash_slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the first batch hold a tensor or two, so that the header is made while the others are not hashed yet."""
    hash_one = saving._Hashing._hash

    def slowly(hashing: saving._Hashing, slot: int) -> saving._Hashed:
        time.sleep(0.001)
        return hash_one(hashing, slot)

    monkeypatch.setattr(saving._Hashing, "_hash", slowly)
    for name, size in (("MANY", 100), ("FIRST_BATCH", 1), ("BATCH", 1), ("RUN", 1)):
        monkeypatch.setattr(saving, name, size)


def test_equal_ones_of_many_tensors_take_room_in_the_header_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(header, "MAX_HEADER", 64 << 10)  # room for some 250
    hash_slowly(monkeypatch)
    tree = {str(i): torch.full((16,), float(i % 200)) for i in range(1_000)}
    store = Store(tmp_path)
    stored = store.put({"model": tree})
    assert stored.pack is not None
    assert len(stored.pack.tensors) == 200
    loaded = store.get(stored.digest)["model"]
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tree.items())


def test_what_changed_at_equal_distances_of_many_tensors_leaves_the_header_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hash_slowly(monkeypatch)
    store = Store(tmp_path)
    tree = {str(i): part for i, part in enumerate(torch.arange(640.0).split(1))}
    store.put({"model": tree})
    before = random.getstate()
    for first in (0, 1):
        for i in range(first, 640, 640 // saving._TRIED):
            tree[str(i)] = tree[str(i)] + 0.5
        stored = store.put({"model": tree})
        assert stored.pack is not None
        assert stored.pack.size < 60_000
    assert random.getstate() == before


def test_tensors_that_another_process_removes_meanwhile_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hash_slowly(monkeypatch)
    folders = {name: tmp_path / name for name in ("tmp", "packs")}
    for folder in folders.values():
        folder.mkdir()
    state = Encoded(*encode({"model": {str(i): part for i, part in enumerate(torch.arange(300.0).split(1))}}))
    saving._hash(state)
    asked: list[Collection[str]] = []

    def known(digests: Collection[str]) -> Collection[str]:
        """At first all but one."""
        asked.append(digests)
        return [*digests][1:] if len(asked) == 1 else ()

    pack = saving.write_new(state, known, **folders, progress=lambda done, total: None)
    assert len(asked[0]) == 300
    assert pack is not None
    assert {tensor.digest for tensor in pack.tensors} == set(state.digests)
    assert [path.stat().st_size for path in folders["packs"].glob("*/*")] == [pack.size]
    assert not [*folders["tmp"].iterdir()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex32, torch.float32, torch.float8_e5m2])
@pytest.mark.parametrize("is_copied", [False, True])
def test_one_element_with_an_odd_step_is_stored(tmp_path: Path, dtype: torch.dtype, is_copied: bool) -> None:
    """torch calls it contiguous."""
    row = torch.tensor([3.0, 0.0, 5.0]).to(dtype)
    tree = {"a": row[2::2], "b": row.reshape(1, 3)[:1, 2:], "c": row[:2][::2]}
    assert [tensor.is_contiguous() for tensor in tree.values()] == [True] * 3
    store = Store(tmp_path)
    state = store.encode({"model": tree})
    stored = store.put(Arena().snapshot(state) if is_copied else state)
    loaded = store.get(stored.digest)["model"]
    targets = {name: torch.zeros(2, dtype=dtype)[::2].view(tensor.shape) for name, tensor in tree.items()}
    store.load_into(stored.digest, {"model": targets})
    for name, tensor in tree.items():
        assert bytes_of(loaded[name]) == bytes_of(targets[name]) == bytes_of(tensor)


def bytes_of(tensor: torch.Tensor) -> bytes:
    """Those of a tensor of one element."""
    start = tensor.storage_offset() * tensor.itemsize
    return bytes(tensor.untyped_storage())[start : start + tensor.itemsize]


class FailingOnce(durable.Disk):
    """Reports an I/O error at the first sync of a large file: a pack is then written again from memory."""

    failed = False

    def sync(self, fd: int, path: Path) -> None:
        if not self.failed and os.fstat(fd).st_size > 1 << 20:
            self.failed = True
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        super().sync(fd, path)


def test_a_pack_that_is_written_a_second_time_has_room_for_all_of_its_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Digests are known by then; the tensors are still new."""
    disk = FailingOnce()
    monkeypatch.setattr(durable, "disk", disk)
    monkeypatch.setattr(saving, "COPIES_IN_FLIGHT", 1 << 20)  # several batches, also when nothing is hashed
    tree = {f"w{i}": torch.randn(100, 128).T for i in range(200)}  # not contiguous: copied to be read
    store = Store(tmp_path)
    stored = store.put({"model": tree})
    assert disk.failed
    loaded = Store(tmp_path).get(stored.digest)["model"]
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tree.items())


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o027, 0o077])
def test_modes_follow_the_umask_and_packs_and_manifests_are_read_only(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        Store(tmp_path / "s").put({"model": torch.ones(3)})
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "s").rglob("*")}
    assert {mode for path, mode in modes.items() if path.is_file()} == {0o444 & ~mask}
    assert {mode for path, mode in modes.items() if path.is_dir()} == {0o777 & ~mask}
    assert sum(path.is_file() for path in modes) == 2


def test_the_folder_may_be_a_link_a_relative_path_and_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    digest = Store(tmp_path / "link").put({"model": torch.ones(3)}).digest
    assert (tmp_path / "link").is_symlink()
    assert Store(tmp_path / "real").has(digest)
    monkeypatch.chdir(tmp_path)
    assert torch.equal(Store("link").get(digest)["model"], torch.ones(3))
    assert Store("real").put({"model": torch.ones(3)}).pack is None
    (tmp_path / "real").rename(tmp_path / "elsewhere")
    assert torch.equal(Store("elsewhere").get(digest)["model"], torch.ones(3))


def test_what_is_saved_in_a_mode_of_torch_is_saved_as_it_is(tmp_path: Path) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    store = Store(tmp_path / "s")
    small = torch.arange(3.0)
    with FakeTensorMode():
        saved = store.put({"model": {"w": small}})
    assert torch.equal(store.get(saved.digest)["model"]["w"], small)


def test_a_snapshot_knows_where_its_tensors_lie_now() -> None:
    one, other = {"a": torch.ones(4), "b": torch.zeros(4)}, {"a": torch.ones(4)}
    arena, copies = Arena(), []
    for tensors in (one, one | other, one):
        documents, leaves = encode({"model": tensors})
        found = arena.snapshot(Encoded(documents, leaves)).leaves
        assert [leaf.address for leaf in found] == [tensor.data_ptr() for tensor in tensors.values()]
        assert [
            torch.equal(leaf.source, tensor) for leaf, tensor in zip(found, tensors.values(), strict=True)
        ]
        copies.append([leaf.source.data_ptr() for leaf in found])
    assert copies[0] == copies[1] == copies[2]


class Late:
    """A device that copies only when it is waited for, as real ones may."""

    def __init__(self, into: torch.Tensor, value: float) -> None:
        self.into, self.value = into, value

    def synchronize(self) -> None:
        self.into.fill_(self.value)


class Broken:
    """A device that failed."""

    def synchronize(self) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_what_a_device_has_still_to_copy_is_waited_for(tmp_path: Path) -> None:
    documents, leaves = encode({"model": {"w": torch.zeros(100_000)}})
    source = torch.ones(3)
    is_alive = weakref.ref(source)
    copying = Copying([Late(leaves[0].source, 7.0)], [source])
    del source
    assert is_alive() is not None
    store = Store(tmp_path / "s")
    saved = store.put(Encoded(documents, leaves, copying))
    assert torch.equal(store.get(saved.digest)["model"]["w"], torch.full((100_000,), 7.0))
    assert is_alive() is None


def test_a_device_that_fails_costs_the_save_alone(tmp_path: Path) -> None:
    documents, leaves = encode({"model": {"w": torch.zeros(100_000)}})
    store = Store(tmp_path / "s")
    with pytest.raises(StorageError, match="did not copy what was to be saved: CUDA error"):
        store.put(Encoded(documents, leaves, Copying([Broken()])))
    assert files(tmp_path) == {}
    assert torch.equal(store.get(store.put({"w": torch.ones(2)}).digest)["w"], torch.ones(2))
