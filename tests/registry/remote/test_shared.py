"""A shared registry: hosts with a folder of their own each, over a bucket in a folder or on a real S3 server."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from hosts import entries_of, state
from servers import Fault, Layer

from registry import Registry
from registry.log import entries
from registry.remote import remote, shared_log
from registry.remote.folder import FolderBucket
from registry.remote.packs import RemotePacks
from registry.remote.shared_log import packed, unpacked
from registry.remote.urls import Address
from registry.store import durable
from registry.store.errors import (
    Conflict,
    Corrupt,
    Invalid,
    NotFound,
    RegistryError,
    StorageError,
    Unsupported,
)

Hosts = Callable[[str], Registry]


pytestmark = pytest.mark.usefixtures("asks_at_once")


@pytest.fixture
def bucket(tmp_path: Path) -> FolderBucket:
    return FolderBucket(tmp_path / "bucket")


def value(registry: Registry, reference: str) -> float:
    return float(registry[reference].load()["model"]["w"][0])


def places(registry: Registry, reference: str) -> list[Any]:
    """Where the tensors of a version lie."""
    return list(registry.catalog.locate([digest for *_, digest in registry[reference].parameters()]).values())


# -- several hosts -----------------------------------------------------------------------------------------


def test_hosts_see_one_another(host: Hosts) -> None:
    a, b = host("a"), host("b")
    a.save("net", state(1), epoch=1, metrics={"accuracy": 0.5})
    assert value(b, "net:v1") == 1
    b.save("net", state(2), epoch=2, metrics={"accuracy": 0.7})
    b.set_alias("net:v1", "production")
    assert value(a, "net") == 2
    assert a["net@production"].version == 1
    assert [model.name for model in a.models()] == ["net"]
    assert a["net"].metrics == {"accuracy": 0.7}
    assert entries_of(a) == entries_of(b)
    for registry in (a, b):
        assert registry.verify().problems == ()


def test_a_tensor_that_another_host_has_stored_is_not_stored_again(host: Hosts, bucket: FolderBucket) -> None:
    a, b = host("a"), host("b")
    a.save("net", state(1, 100_000))
    b.save("net", state(1, 100_000) | {"extra": {"n": 1}})
    (first,) = (held.size for held in bucket.list("packs"))
    b.save("net", state(2, 100_000))
    second = sum(held.size for held in bucket.list("packs")) - first
    # Of the second pack, only what is new: 400,000 bytes and not 800,000.
    assert second < 0.6 * first


def test_what_only_reads_structure_brings_no_pack(host: Hosts) -> None:
    host("a").save("net", state(1))
    b = host("b")
    b.versions("net")
    assert [path for path, *_ in b["net"].parameters()] == ["model/w", "model/same"]
    b.diff("net:v1", "net:v1")
    assert list(b.root.glob("packs/*/*")) == []
    b["net"].load()
    assert len(list(b.root.glob("packs/*/*"))) == 1


def test_runs_are_resumed_on_another_host(host: Hosts) -> None:
    a, b = host("a"), host("b")
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    with a.run("net", monitor="accuracy") as run:
        run.save(model=model, optimizer=optimizer, epoch=1, metrics={"accuracy": 0.5})
    other = torch.nn.Linear(3, 2)
    others = torch.optim.Adam(other.parameters())
    with b.run("net", resume="net", monitor="accuracy") as run:
        b["net"].restore(model=other, optimizer=others)
        run.save(model=other, optimizer=others, epoch=2, metrics={"accuracy": 0.6})
    assert torch.equal(model.weight, other.weight)
    assert a["net@best"].version == 2
    assert a["net:v2"].parent == "net:v1"
    assert [a.runs[name].state for name in ("net/run-1", "net/run-2")] == ["finished"] * 2


def test_results_of_functions_are_shared(host: Hosts) -> None:
    calls = []

    def compute(n: int) -> torch.Tensor:
        calls.append(n)
        return torch.arange(n)

    assert torch.equal(host("a").cached(compute)(5), torch.arange(5))
    assert torch.equal(host("b").cached(compute)(5), torch.arange(5))
    assert calls == [5]


def test_a_host_folder_is_opened_as_the_shared_registry_that_it_is_for(host: Hosts) -> None:
    a = host("a")
    a.save("net", state(1))
    again = Registry(a.root, create=False)
    assert again.place == a.place
    assert repr(again).startswith(f"<Registry {a.place}: 1 model, 1 version, ")
    host("b").save("net", state(2))
    assert value(again, "net:v2") == 2


def test_compacting_on_one_host_is_seen_on_the_other(host: Hosts) -> None:
    a, b = host("a"), host("b")
    torch.manual_seed(0)
    weights = torch.randn(20_000)
    saved = []
    for _ in range(4):
        weights = weights + 1e-4 * torch.randn(20_000)
        saved.append(weights.clone())
        a.save("net", {"model": {"w": weights.clone()}})
    assert torch.equal(b["net:v1"].load()["model"]["w"], saved[0])
    a.compact()
    a.collect_garbage(grace=0)
    for number, expected in enumerate(saved):
        assert torch.equal(b[f"net:v{number + 1}"].load()["model"]["w"], expected)
        assert torch.equal(host("c")[f"net:v{number + 1}"].load()["model"]["w"], expected)
    assert b.verify().problems == ()


def saves(url: str, home: str, number: int, count: int) -> None:
    os.environ["XDG_DATA_HOME"] = home
    registry = Registry(url)
    for i in range(count):
        registry.save("net", state(100 * number + i))


def test_hosts_that_save_at_once_lose_nothing(host: Hosts, url: str, tmp_path: Path) -> None:
    host("a")
    context = multiprocessing.get_context("spawn")
    places = [(url, str(tmp_path / f"host-{n}"), n, 5) for n in range(4)]
    processes = [context.Process(target=saves, args=place) for place in places]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    hosts = [host(str(n)) for n in range(4)]
    for registry in hosts:
        assert [version.version for version in registry.versions("net")] == list(range(20, 0, -1))
        assert registry.verify().problems == ()
    assert len({tuple(entries_of(registry)) for registry in hosts}) == 1
    values = {value(hosts[0], f"net:v{n}") for n in range(1, 21)}
    assert values == {100.0 * n + i for n in range(4) for i in range(5)}


# -- collecting --------------------------------------------------------------------------------------------


def test_what_is_collected_is_gone_from_the_bucket_and_what_is_needed_stays(
    host: Hosts, bucket: FolderBucket
) -> None:
    a, b = host("a"), host("b")
    for number in (1, 2, 3):
        a.save("net", state(number))
    assert value(b, "net:v2") == 2
    a.remove(["net:v2"])
    a.collect_garbage(grace=0)
    assert len(list(bucket.list("packs"))) == 2
    with pytest.raises(NotFound):
        b["net:v2"]
    assert [value(b, f"net:v{n}") for n in (1, 3)] == [1, 3]
    assert [value(host("c"), f"net:v{n}") for n in (1, 3)] == [1, 3]
    b.save("net", state(2))
    assert value(a, "net:v4") == 2
    for registry in (a, b):
        registry.collect_garbage(grace=0)
        assert registry.verify().problems == ()


def test_a_pack_that_no_entry_names_is_doomed_before_it_goes(
    host: Hosts, bucket: FolderBucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = host("a"), host("b")
    a.save("net", state(1))
    commit = a.catalog.commit

    def after_a_collection(compute: Any) -> Any:
        monkeypatch.setattr(a.catalog, "commit", commit)
        assert b.collect_garbage(grace=0).packs == 1
        return commit(compute)

    monkeypatch.setattr(a.catalog, "commit", after_a_collection)
    a.save("net", state(2))
    assert value(b, "net:v2") == 2
    assert value(host("c"), "net:v2") == 2
    assert len(list(bucket.list("packs"))) == 2


def test_a_pack_of_a_save_that_failed_is_collected_by_the_same_program(
    host: Hosts, bucket: FolderBucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = host("a"), host("b")
    a.save("net", state(1))
    with monkeypatch.context() as patch:
        patch.setattr(FolderBucket, "create", lambda *_: False)
        patch.setattr(shared_log, "_PATIENCE", 0.0)
        patch.setenv("REGISTRY_UNREACHABLE", "fail")
        with pytest.raises(StorageError, match="repeat"):
            a.save("net", state(2))
    assert len(list(bucket.list("packs"))) == 2
    assert a.collect_garbage(grace=0).packs >= 1
    assert len(list(bucket.list("packs"))) == 1
    a.save("net", state(2))
    assert value(b, "net:v2") == 2


def test_a_header_that_is_damaged_on_a_host_does_not_get_into_the_log(
    host: Hosts, bucket: FolderBucket
) -> None:
    a = host("a")
    a.save("net", state(1))
    packs = RemotePacks(bucket, a.root)
    (digest,) = a.store.pack_digests()
    (header,) = packs.headers([digest])
    for path in (a.store.pack_path(digest), *a.root.glob("heads/*/*")):
        path.chmod(0o600)
        data = bytearray(path.read_bytes())
        data[20] ^= 1
        path.write_bytes(data)
    assert packs.headers([digest]) == [header]


def test_a_save_whose_pack_is_collected_before_it_is_uploaded_writes_it_again(
    host: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = host("a"), host("b")
    a.save("net", state(1))
    upload, other = RemotePacks.upload, host("a")
    calls = iter([True])

    def late(packs: RemotePacks, digests: Collection[str]) -> None:
        if next(calls, False):
            other.collect_garbage(grace=0)
        upload(packs, digests)

    monkeypatch.setattr(RemotePacks, "upload", late)
    a.save("net", state(2))
    assert value(b, "net:v2") == 2


def test_a_young_pack_that_no_entry_names_stays(host: Hosts, bucket: FolderBucket, tmp_path: Path) -> None:
    a = host("a")
    a.save("net", state(1))
    pack = a.store.put({"model": {"w": torch.zeros(100)}}).pack
    assert pack is not None
    assert a.catalog.shared is not None
    a.catalog.shared.upload([pack.digest])
    assert a.collect_garbage(grace=3600).packs == 0
    assert len(list(bucket.list("packs"))) == 2
    assert a.collect_garbage(grace=0, dry_run=True).packs > 0
    assert len(list(bucket.list("packs"))) == 2


def test_a_pack_that_no_entry_names_is_collected_by_two_hosts_at_once(
    host: Hosts, bucket: FolderBucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = host("a"), host("b")
    a.save("net", state(1))
    pack = a.store.put({"model": {"w": torch.zeros(100)}}).pack
    assert pack is not None
    assert a.catalog.shared is not None
    a.catalog.shared.upload([pack.digest])
    # It is known in memory alone, as where another process of this host has made room.
    a.store.pack_path(pack.digest).unlink()
    upload = RemotePacks.upload

    def late(packs: RemotePacks, digests: Collection[str]) -> None:
        monkeypatch.setattr(RemotePacks, "upload", upload)
        assert b.collect_garbage(grace=0).packs == 1
        upload(packs, digests)

    monkeypatch.setattr(RemotePacks, "upload", late)
    a.collect_garbage(grace=0)
    assert RemotePacks.upload is upload
    assert len(list(bucket.list("packs"))) == 1
    assert a.verify().problems == b.verify().problems == ()


def test_a_save_on_tensors_that_are_being_collected_writes_them_again(
    host: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = host("a"), host("b")
    a.save("net", state(1))
    b.save("net", state(5))
    commit = a.catalog.commit

    def after_a_removal(compute: Any) -> Any:
        monkeypatch.setattr(a.catalog, "commit", commit)
        b.remove(["net:v1"])
        b.collect_garbage(grace=0)
        return commit(compute)

    monkeypatch.setattr(a.catalog, "commit", after_a_removal)
    a.save("net", state(1))
    assert [value(host(name), "net:v3") for name in "abc"] == [1, 1, 1]
    assert a.verify().problems == ()


# -- faults ------------------------------------------------------------------------------------------------


@pytest.mark.damages
def test_a_history_that_was_put_back_is_noticed_and_nothing_written(
    host: Hosts, bucket: FolderBucket
) -> None:
    a = host("a")
    a.save("net", state(1))
    b = host("b")
    b.save("net", state(2))
    last = [held.key for held in bucket.list("journal")][-1]
    bucket.delete([last])
    before = [held.key for held in bucket.list("journal")]
    with pytest.raises(Corrupt, match=r"history of the registry changed: entry 3, .* is missing there"):
        b.save("net", state(3))
    assert [held.key for held in bucket.list("journal")] == before
    # A host that never had the lost entry goes on, and then the others see another one.
    a.save("net", state(4))
    with pytest.raises(Corrupt, match="history of the registry changed"):
        b.save("net", state(3))
    assert value(b, "net:v1") == 1


@pytest.mark.damages
@pytest.mark.parametrize("damage", ["flip", "cut", "other", "empty", "rewritten"])
def test_an_entry_that_was_edited_is_refused(host: Hosts, bucket: FolderBucket, damage: str) -> None:
    a = host("a")
    a.save("net", state(1))
    a.save("net", state(2))
    keys = [held.key for held in bucket.list("journal")]
    data = bucket.get(keys[-1], 1 << 20)
    assert data is not None
    if damage == "flip":
        data = data[:50] + bytes([data[50] ^ 1]) + data[51:]
    elif damage == "cut":
        data = data[:-3]
    elif damage == "other":
        data = bucket.get(keys[-2], 1 << 20)
    elif damage == "empty":
        data = b""
    else:
        entry, headers = unpacked(data)
        data = packed(entries.write(entry.seq, "0" * 64, entry.records), headers)
    bucket.delete([keys[-1]])
    bucket.create(keys[-1], data or b"")
    with pytest.raises(Corrupt, match=r"[nN]othing is written"):
        host("b").save("net", state(3))
    assert [held.key for held in bucket.list("journal")] == keys


@pytest.mark.damages
@pytest.mark.parametrize(
    ("records", "headers", "said"),
    [
        ([{"op": "later"}], [], "upgrade with"),
        (
            None,
            [{"digest": "../" * 4, "size": 99, "head": 50, "header": "{}"}],
            "[0-9]{16}.zst: pack .* nothing is",
        ),
        (
            None,
            [{"digest": "a" * 64, "size": 99, "head": 50, "header": "\ud800"}],
            "[0-9]{16}.zst: pack .* nothing is",
        ),
    ],
)
def test_what_cannot_be_understood_in_the_bucket_is_read_past_and_not_written_behind(
    host: Hosts, bucket: FolderBucket, records: Any, headers: list[dict[str, Any]], said: str
) -> None:
    a = host("a")
    a.save("net", state(1))
    last = [item.entry for item in a.catalog.journal.read() if item.entry][-1]
    tag = {"op": "tag", "id": a["net"].id, "tag": "new"}
    entry = entries.write(last.seq + 1, last.digest, records or [tag])
    bucket.create(f"journal/{entry.seq:016d}.zst", packed(entry, headers))
    again = host("a")
    assert value(again, "net") == 1
    with pytest.raises((Corrupt, Unsupported), match=said):
        again.save("net", state(2))
    with pytest.raises((Corrupt, Unsupported), match=said):
        host("b")
    assert len(list(bucket.list("journal"))) == entry.seq


def test_a_pack_that_was_edited_is_refused_and_not_kept(host: Hosts, bucket: FolderBucket) -> None:
    host("a").save("net", state(1))
    (held,) = bucket.list("packs")
    path = bucket.root / held.key
    whole = path.read_bytes()
    path.chmod(0o644)
    b = host("b")
    for damaged in (whole[:-1], whole[:20] + b"x" + whole[21:], b""):
        path.write_bytes(damaged)
        with pytest.raises(Corrupt):
            b["net"].load()
        assert list(b.root.glob("packs/*/*")) == []
    path.write_bytes(whole[:-1] + b"x")
    with pytest.raises(Corrupt, match="model/"):
        b["net"].load()


def test_many_entries_are_taken_in_at_once(host: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    a = host("a")
    a.save("net", state(1))
    for number in range(60):
        a.set_tag("net", f"tag-{number}")
    synced = 0
    sync = durable.disk.sync

    def counted(fd: int, path: Path) -> None:
        nonlocal synced
        synced += 1
        sync(fd, path)

    monkeypatch.setattr(durable.disk, "sync", counted)
    b = host("b")
    assert len(b["net"].tags) == 60
    assert synced < 30
    assert entries_of(a) == entries_of(b)


def test_headers_that_a_host_has_lost_are_fetched(host: Hosts) -> None:
    host("a").save("net", state(1))
    b = host("b")
    for path in b.root.glob("heads/*/*"):
        path.chmod(0o644)
        path.write_bytes(b"damaged")
    assert value(host("b"), "net") == 1
    for path in b.root.glob("heads/*/*"):
        path.unlink()
    for path in b.root.glob("packs/*/*"):
        path.unlink()
    (b.root / "catalog.sqlite").unlink()
    again = host("b")
    assert value(again, "net") == 1
    assert again.verify().problems == ()


def damage_log(registry: Registry, number: int) -> None:
    """Damage an entry of a host's copy of the log, of which the catalog was a second copy."""
    (path,) = registry.root.glob("journal/*.log")
    lines = path.read_bytes().splitlines(keepends=True)
    lines[number - 1] = b"x" + lines[number - 1][1:]
    path.write_bytes(b"".join(lines))
    for path in registry.root.glob("catalog.sqlite*"):
        path.unlink()


def test_a_log_that_is_damaged_on_a_host_is_brought_again(host: Hosts) -> None:
    a, b = host("a"), host("b")
    for number in (1, 2, 3):
        a.save("net", state(number))
    damage_log(a, 3)
    again = host("a")
    assert [value(again, f"net:v{number}") for number in (1, 2, 3)] == [1, 2, 3]
    again.save("net", state(4))
    assert value(b, "net:v4") == 4
    assert entries_of(again) == entries_of(b)
    assert again.verify().problems == ()


@pytest.mark.damages
def test_a_damaged_log_is_not_brought_again_from_an_older_state(host: Hosts, bucket: FolderBucket) -> None:
    a = host("a")
    for number in (1, 2, 3):
        a.save("net", state(number))
    damage_log(a, 2)
    bucket.delete(["journal/0000000000000004.zst"])
    again = host("a")
    assert value(again, "net:v3") == 3
    with pytest.raises(Corrupt, match="history of the registry changed"):
        again.save("net", state(4))


def test_rebuilding_follows_the_log_of_the_bucket_alone(host: Hosts) -> None:
    a, b = host("a"), host("b")
    for number in (1, 2):
        a.save("net", state(number))
    # As a save that was killed leaves it.
    a.store.put({"model": {"w": torch.ones(3)}}, {"kind": "checkpoint", "model": "net"})
    damage_log(a, 3)
    again = host("a")
    with pytest.raises(Unsupported, match="from its bucket by: registry rebuild"):
        again.rebuild(adopt=True)
    found = again.rebuild()
    assert (found.versions, found.unnamed, found.damaged) == (2, (), ())
    again.save("net", state(3))
    assert value(b, "net:v3") == 3
    assert entries_of(again) == entries_of(b)


def test_a_reader_does_not_wait_for_a_process_that_waits_for_the_network(host: Hosts) -> None:
    a = host("a")
    a.save("net", state(1))
    with a.catalog.journal.locked():
        begun = time.monotonic()
        again = host("a")
        assert value(again, "net") == 1
        assert again["net"].version == 1
        assert time.monotonic() - begun < 5


def test_a_copy_of_a_pack_that_is_damaged_on_a_host_is_not_copied_on(host: Hosts, tmp_path: Path) -> None:
    a = host("a")
    a.save("net", {"model": {"w": torch.arange(20_000.0)}})
    (path,) = a.root.glob("packs/*/*")
    path.chmod(0o600)
    path.write_bytes(path.read_bytes()[:-4] + b"xxxx")
    other = Registry(tmp_path / "other")
    host("a").copy_to(other)
    assert other.verify().problems == ()
    assert float(other["net"].load()["model"]["w"][-1]) == 19_999


@pytest.mark.parametrize("at", [20, -20])
def test_a_copy_of_a_pack_that_is_damaged_on_a_host_is_no_damage_of_the_registry(
    host: Hosts, at: int
) -> None:
    a, b = host("a"), host("b")
    for number in (1, 2):
        a.save("net", {"model": {"w": torch.arange(20_000.0) + number / 8}})
    for path in a.root.glob("packs/*/*"):
        path.chmod(0o600)
        data = bytearray(path.read_bytes())
        data[at] ^= 1
        path.write_bytes(data)
    again = host("a")
    assert again.verify().problems == ()
    assert again.verify(["net:v1"]).problems == ()
    assert value(again, "net:v2") == 0.25
    # Nothing of it is said to other hosts.
    assert value(b, "net:v2") == 0.25
    assert entries_of(again) == entries_of(b)


def test_a_reader_who_cannot_write_here_is_told_that_news_are_not_seen(
    host: Hosts, url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    a, b = host("a"), host("b")
    a.save("net", state(1))
    assert value(b, "net") == 1
    a.save("net", state(2))
    with monkeypatch.context() as patch:
        patch.setattr("registry.catalog.database.Database.is_writable", False)
        assert value(host("b"), "net") == 1
    assert f"what other hosts add to {url} is not seen" in caplog.text


def test_the_status_says_where_the_registry_is(host: Hosts, url: str) -> None:
    host("a").save("net", state(1))
    program = [sys.executable, "-m", "registry.cli", "--root", url, "status"]
    done = subprocess.run(program, capture_output=True, text=True, check=True)
    assert f"registry    {url}\n" in done.stdout


def test_files_that_a_file_system_leaves_in_a_bucket_are_passed_over(
    host: Hosts, bucket: FolderBucket
) -> None:
    host("a").save("net", state(1))
    for name in ("packs/.DS_Store", "packs/a b", "journal/.nfs0001", "journal/x y"):
        (bucket.root / name).write_bytes(b"x")
    b = host("b")
    assert value(b, "net") == 1
    b.collect_garbage(grace=0)
    assert b.verify().problems == ()


def test_an_entry_that_nobody_could_read_again_is_not_written(
    host: Hosts, bucket: FolderBucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = host("a")
    monkeypatch.setattr(shared_log, "_LARGEST", 1000)
    with pytest.raises(Invalid, match="in smaller steps"):
        a.save("net", {"model": {f"w{number}": torch.full((3,), float(number)) for number in range(100)}})
    monkeypatch.undo()
    assert len(list(bucket.list("journal"))) == 1
    a.save("net", state(1))
    assert a["net"].version == 1


def test_a_host_that_has_lost_its_folder_begins_anew(host: Hosts, tmp_path: Path) -> None:
    import shutil

    a = host("a")
    a.save("net", state(1))
    shutil.rmtree(tmp_path / "host-a")
    again = host("a")
    assert value(again, "net") == 1
    again.save("net", state(2))
    assert again["net"].version == 2


def test_a_registry_that_is_not_there_is_not_made_by_reading(host: Hosts, url: str, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="make one with: registry init"):
        host("a", create=False)
    assert not (tmp_path / "bucket").exists()


# -- on a real server --------------------------------------------------------------------------------------


@pytest.fixture
def s3_host(address: Address, host: Hosts, monkeypatch: pytest.MonkeyPatch) -> Hosts:
    """As `host`, on a real server, which is not probed again for each test, as it takes seconds where clients race."""
    monkeypatch.setattr(remote, "probe", lambda bucket: None)
    return lambda name, **options: host(name, str(address), **options)


def test_a_host_keeps_the_packs_that_were_used_last(
    host: Hosts, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    a = host("a")
    for number in range(1, 5):
        a.save("net", {"model": {"w": torch.full((250_000,), float(number))}})
    assert len(list(a.root.glob("packs/*/*"))) == 4
    monkeypatch.setenv("REGISTRY_CACHE_SIZE", "0.0025GB")
    b = host("b")
    kept = b["net:v1"].load()["model"]["w"]
    times = iter(range(1, 9))

    def age() -> None:
        for path in b.root.glob("packs/*/*"):
            os.utime(path, (time.time() - 9_000 + 100 * next(times),) * 2)

    age()
    assert value(b, "net:v2") == 2
    age()
    assert value(b, "net:v1") == 1  # used again, and so kept
    assert value(b, "net:v3") == 3
    held = {path.stem for path in b.root.glob("packs/*/*")}
    assert held == {place.pack for n in (1, 3) for place in places(b, f"net:v{n}")}
    assert value(b, "net:v2") == 2
    assert float(kept[0]) == 1
    # A save of this host that is not in the log yet stays, whatever the bound.
    pack = b.store.put({"model": {"w": torch.zeros(900_000)}}).pack
    assert pack is not None
    assert value(b, "net:v4") == 4
    assert b.store.pack_path(pack.digest).exists()


def test_a_bound_that_is_no_amount_is_an_error(host: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGISTRY_CACHE_SIZE", "much")
    with pytest.raises(RegistryError, match="such as 20GB"):
        host("a")


def test_who_reads_does_not_wait_for_a_process_that_adds_an_entry(
    host: Hosts, url: str, tmp_path: Path
) -> None:
    a = host("a")
    a.save("net", state(1))
    program = (
        "import sys, time; from registry import Registry; r = Registry(sys.argv[1]); "
        "r.catalog.commit(lambda view: [print('in', flush=True), time.sleep(8)] and [])"
    )
    environment = {**os.environ, "XDG_DATA_HOME": str(tmp_path / "host-a")}
    child = subprocess.Popen([sys.executable, "-c", program, url], env=environment, stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    assert value(a, "net") == 1
    assert child.poll() is None
    child.wait()


def test_plain_values_that_no_entry_holds_are_refused(host: Hosts, bucket: FolderBucket) -> None:
    a = host("a")
    with pytest.raises(Unsupported, match="more than the 16 MB"):
        a.save("net", {"model": {"w": torch.ones(3)}, "extra": {"long": list(range(3_000_000))}})
    assert list(a.models()) == []
    assert len(list(bucket.list("journal"))) == 1


@pytest.mark.damages  # its folders cannot be opened without the keys
class TestOnS3:
    def test_hosts_see_one_another(self, s3_host: Hosts) -> None:
        a, b = s3_host("a"), s3_host("b")
        a.save("net", {"model": {"w": torch.ones(5)}})
        b.save("net", state(2))
        assert [value(registry, "net:v1") for registry in (a, b, s3_host("c"))] == [1, 1, 1]
        assert value(a, "net:v2") == 2
        a.remove(["net:v1"])
        assert a.collect_garbage(grace=0).packs >= 1
        assert value(b, "net:v2") == 2
        assert b.verify().problems == ()
        assert entries_of(a) == entries_of(b)

    @pytest.mark.parametrize("do", ["lose", "409", "503", "500"])
    def test_a_commit_whose_answer_is_lost_happens_once(self, s3_host: Hosts, s3: Layer, do: str) -> None:
        a = s3_host("a")
        a.save("net", state(1))
        s3.faults.append(Fault("PUT", "/journal/", do))
        a.save("net", state(2))
        b = s3_host("b")
        assert [version.version for version in b.versions("net")] == [2, 1]
        assert value(b, "net:v2") == 2

    def test_a_commit_that_the_server_keeps_refusing_is_an_error_and_no_version(
        self, s3_host: Hosts, s3: Layer
    ) -> None:
        a = s3_host("a")
        a.save("net", state(1))
        s3.faults.append(Fault("PUT", "/journal/", "403", times=99))
        with pytest.raises(StorageError, match="lack the right"):
            a.save("net", state(2))
        s3.faults.clear()
        assert [version.version for version in a.versions("net")] == [1]
        a.save("net", state(3))
        assert value(s3_host("b"), "net:v2") == 3

    def test_a_server_that_is_away_is_read_past_and_not_written(
        self, s3_host: Hosts, s3: Layer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("REGISTRY_UNREACHABLE", "fail")
        a = s3_host("a")
        a.save("net", state(1))
        s3.faults += [Fault(method, "", "503", times=9_999) for method in ("GET", "PUT", "HEAD")]
        assert value(a, "net") == 1
        assert "does not answer" in caplog.text
        with pytest.raises(StorageError, match="does not answer"):
            a.save("net", state(2))
        s3.faults.clear()
        assert a["net"].version == 1
        a.save("net", state(2))
        assert value(a, "net:v2") == 2

    def test_a_store_that_is_not_atomic_is_refused(self, address: Address, host: Hosts, s3: Layer) -> None:
        s3.faults.append(Fault("PUT", "", "blind", times=999))
        with pytest.raises(Unsupported, match="this store cannot hold a shared registry: it overwrites"):
            host("a", str(address))

    def test_a_save_killed_at_each_request_loses_nothing(
        self, s3_host: Hosts, s3: Layer, address: Address, tmp_path: Path
    ) -> None:
        a = s3_host("a")
        a.save("net", state(1))
        program = (
            "import sys, torch; from registry import Registry; r = Registry(sys.argv[1]); "
            "r.save('net', {'model': {'w': torch.full((1000,), float(sys.argv[2])), 'same': torch.ones(1000)}})"
        )
        environment = {**os.environ, "XDG_DATA_HOME": str(tmp_path / "host-k")}
        number, ended = 0, False
        while not ended:
            for moment in ("before", "after"):
                number += 1
                child = subprocess.Popen(
                    [sys.executable, "-c", program, str(address), str(number)],
                    env=environment,
                    stderr=subprocess.PIPE,
                )

                def kill(child: subprocess.Popen[bytes] = child) -> None:
                    child.send_signal(signal.SIGKILL)
                    child.wait()

                fault = Fault("PUT", "/(packs|journal)/", skip=(number - 1) // 2, **{moment: kill})
                s3.faults[:] = [fault]
                _, said = child.communicate()
                ended = fault.times == 1
                assert child.returncode in (0, -signal.SIGKILL), said
                versions = {version.version for version in a.versions("net")}
                assert versions == set(range(1, len(versions) + 1))
                if not child.returncode:
                    assert value(a, "net") == number
        s3.faults.clear()
        assert number >= 5  # a pack and an entry, each before and after
        k = s3_host("k")
        k.save("net", state(99))
        assert value(a, "net") == 99
        assert a.collect_garbage(grace=0).packs >= 0
        for registry in (a, k, s3_host("new")):
            assert registry.verify().problems == ()
            assert entries_of(registry) == entries_of(a)

    def test_no_key_is_written_anywhere(
        self, s3_host: Hosts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("AWS_SESSION_TOKEN", "")
        a = s3_host("a")
        with a.run("net", config={"lr": 0.1}) as run:
            run.save(model=torch.nn.Linear(2, 2), epoch=1)
        found = [
            path for path in tmp_path.rglob("*") if path.is_file() and b"testsecret" in path.read_bytes()
        ]
        assert found == []


# -- folders and buckets that are taken for one another ----------------------------------------------------------


def test_the_registry_of_a_folder_is_not_taken_for_a_bucket(tmp_path: Path) -> None:
    folder = Registry(tmp_path / "r")
    folder.save("net", state(1))
    before = sorted(folder.root.rglob("*"))
    for create in (True, False):
        with pytest.raises(
            Conflict, match="holds the registry of a folder, which is not shared; open the folder"
        ):
            Registry(f"file://{folder.root}", create=create)
    assert sorted(folder.root.rglob("*")) == before


def test_a_bucket_is_not_taken_for_the_registry_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "team").mkdir()
    shared = Registry(f"file://{tmp_path}/team")
    shared.save("net", state(1))
    before = sorted((tmp_path / "team").rglob("*"))
    with pytest.raises(Conflict, match=f"is the bucket of a shared registry; .*file://{tmp_path}/team"):
        Registry(tmp_path / "team")
    assert sorted((tmp_path / "team").rglob("*")) == before


def test_a_registry_is_not_made_over_packs_that_no_log_names(tmp_path: Path) -> None:
    (tmp_path / "team").mkdir()
    shared = Registry(f"file://{tmp_path}/team")
    shared.save("net", state(1))
    shutil.rmtree(tmp_path / "team" / "journal")
    shutil.rmtree(shared.root)
    with pytest.raises(Conflict, match="has packs, and no log that names them"):
        Registry(f"file://{tmp_path}/team")
    assert len(list((tmp_path / "team" / "packs").rglob("*.safetensors"))) == 1
