"""Repair of a shared registry: packs and entries of the bucket are put back, from a host's folder or another copy."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from servers import Fault, Layer

from registry import Registry
from registry.log import entries
from registry.remote import remote
from registry.remote.folder import FolderBucket
from registry.remote.shared_log import packed, unpacked
from registry.remote.urls import Address
from registry.store.errors import Corrupt, Invalid, NotFound, StorageError

Hosts = Callable[..., Registry]


pytestmark = pytest.mark.usefixtures("asks_at_once")


@pytest.fixture
def bucket(tmp_path: Path) -> FolderBucket:
    return FolderBucket(tmp_path / "bucket")


def state(number: float) -> dict[str, Any]:
    return {"model": {"w": torch.full((3_000,), float(number)), "backbone": torch.arange(3_000.0)}}


def value(registry: Registry, reference: str) -> float:
    return float(registry[reference].load()["model"]["w"][0])


def objects(bucket: FolderBucket, folder: str) -> dict[str, bytes]:
    return {held.key: (bucket.root / held.key).read_bytes() for held in bucket.list(folder)}


def damage(path: Path, kind: str) -> None:
    path.chmod(0o600)
    data = path.read_bytes()
    if kind == "missing":
        path.unlink()
    elif kind == "cut":
        path.write_bytes(data[:-7])
    else:
        at = {"header": 40, "end": -1, "middle": len(data) // 2}[kind]
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + (data[at + 1 :] if at != -1 else b""))


def forget_packs(registry: Registry) -> None:
    for path in registry.root.glob("packs/*/*"):
        path.unlink()


def is_whole(registry: Registry, bucket: FolderBucket) -> bool:
    """Whether all is whole, read from the bucket."""
    forget_packs(registry)
    everything = [version.name for version in registry.versions()]
    return registry.verify(everything).problems == () and registry.verify().problems == ()


@pytest.mark.parametrize("kind", ["header", "end", "cut", "missing"])
@pytest.mark.parametrize("source", ["this host", "another host", "a copy of the bucket", "another registry"])
def test_packs_of_the_bucket_are_put_back(
    host: Hosts, bucket: FolderBucket, tmp_path: Path, kind: str, source: str
) -> None:
    a = host("a")
    for number in (1, 2):
        a.save("net", state(number))
    b = host("b")
    assert [value(b, f"net:v{number}") for number in (1, 2)] == [1, 2]
    shutil.copytree(bucket.root, tmp_path / "copy")
    other = Registry(tmp_path / "other")
    if source == "another registry":
        a.copy_to(other)
    if source != "this host":
        forget_packs(a)
    before = objects(bucket, "packs")
    for key in before:
        damage(bucket.root / key, kind)
    place = {
        "this host": a.root,
        "another host": b.root,
        "a copy of the bucket": (tmp_path / "copy").as_uri(),
        "another registry": other.root,
    }[source]
    a = host("a")
    assert (a.repair(place, dry_run=True).packs, objects(bucket, "packs") == before) == (2, False)
    found = a.repair(place)
    assert (found.packs, found.tensors, found.problems) == (2, 0, ())
    assert objects(bucket, "packs") == before
    assert is_whole(a, bucket)
    assert [value(host("c"), f"net:v{number}") for number in (1, 2)] == [1, 2]


def test_what_is_lost_of_a_pack_of_the_bucket_is_written_into_a_new_one(
    host: Hosts, bucket: FolderBucket, tmp_path: Path
) -> None:
    a, other = host("a"), Registry(tmp_path / "other")
    a.save("net", state(1) | {"extra": {"x": torch.ones(999)}})
    a.save("net", state(1))
    a.copy_to(other, ["net:v2"])
    a.remove(["net:v1"])
    forget_packs(a)
    (key,) = objects(bucket, "packs")
    damage(bucket.root / key, "missing")
    found = a.repair(other)
    assert (found.packs, found.tensors, found.problems) == (0, 2, ())
    assert is_whole(a, bucket)
    assert value(host("b"), "net") == 1
    assert a.collect_garbage(grace=0).packs >= 0
    assert is_whole(host("b"), bucket)


@pytest.mark.parametrize("kind", ["middle", "cut", "missing"])
@pytest.mark.parametrize("lost", [(2,), (3, 4), (5,), (1, 2, 3, 4, 5)])
@pytest.mark.parametrize("source", ["this host", "another host", "a copy of the bucket"])
def test_entries_of_the_bucket_are_put_back(
    host: Hosts, bucket: FolderBucket, tmp_path: Path, kind: str, lost: tuple[int, ...], source: str
) -> None:
    a, b = host("a"), host("b")
    for number in (1, 2, 3):
        a.save("net", state(number))
    a.set_alias("net:v2", "production")
    assert b["net@production"].version == 2
    shutil.copytree(bucket.root, tmp_path / "copy")
    before = {key: unpacked(data) for key, data in objects(bucket, "journal").items()}
    keys = list(before)
    assert len(keys) == 5
    for seq in lost:
        damage(bucket.root / keys[seq - 1], kind)
    place = {
        "this host": a.root,
        "another host": b.root,
        "a copy of the bucket": (tmp_path / "copy").as_uri(),
    }[source]
    a = host("a")
    assert a.repair(place, dry_run=True).entries == len(lost)
    found = a.repair(place)
    assert (found.entries, found.problems) == (len(lost), ())
    assert {key: unpacked(data) for key, data in objects(bucket, "journal").items()} == before
    a.save("net", state(4))
    assert [value(host("c"), f"net:v{number}") for number in range(1, 5)] == [1, 2, 3, 4]
    assert host("c")["net@production"].version == 2


def test_an_older_state_of_the_bucket_that_was_put_back_gets_what_a_host_knows(
    host: Hosts, bucket: FolderBucket
) -> None:
    a, b = host("a"), host("b")
    a.save("net", state(1))
    assert value(b, "net") == 1
    a.save("net", state(2))
    b_root = b.root
    before = objects(bucket, "journal")
    bucket.delete([list(before)[-1]])
    # The host that knows less is repaired from the folder of the one that knows more.
    assert host("b").repair(a.root).entries == 1
    assert objects(bucket, "journal") == before
    assert value(host("b"), "net:v2") == 2
    assert host("b").root == b_root
    a.save("net", state(3))
    assert value(host("b"), "net:v3") == 3


@pytest.mark.damages
def test_a_bucket_that_has_gone_another_way_is_not_overwritten(host: Hosts, bucket: FolderBucket) -> None:
    a, b = host("a"), host("b")
    a.save("net", state(1))
    assert value(b, "net") == 1
    a.save("net", state(2))
    bucket.delete([list(objects(bucket, "journal"))[-1]])
    b.save("net", state(7))
    before = objects(bucket, "journal")
    with pytest.raises(Corrupt, match="history of the registry changed: entry 3 is another one"):
        host("a").repair(b.root)
    assert host("b").repair(a.root).entries == 0
    assert objects(bucket, "journal") == before
    assert value(b, "net:v2") == 7


@pytest.mark.damages
def test_entries_of_another_log_are_not_put_into_the_bucket(
    host: Hosts, bucket: FolderBucket, tmp_path: Path
) -> None:
    a = host("a")
    for number in (1, 2, 3):
        a.save("net", state(number))
    shutil.copytree(bucket.root, tmp_path / "copy")
    key = list(objects(bucket, "journal"))[1]
    entry, headers = unpacked((bucket.root / key).read_bytes())
    forged = entries.write(
        entry.seq, entry.prev, [*entry.records, {"op": "next", "model": "x", "version": 9}]
    )
    (tmp_path / "copy" / key).chmod(0o600)
    (tmp_path / "copy" / key).write_bytes(packed(forged, headers))
    damage(bucket.root / key, "missing")
    shutil.rmtree(a.root / "journal")
    a = host("a")
    for path in a.root.glob("catalog.sqlite*"):
        path.unlink()
    before = objects(bucket, "journal")
    found = host("a").repair((tmp_path / "copy").as_uri())
    assert found.entries == 0
    assert any("no copy has entry 2 of the log whole" in problem.message for problem in found.problems)
    assert objects(bucket, "journal") == before


def test_where_there_is_no_second_copy_one_line_says_so(host: Hosts, url: str, tmp_path: Path) -> None:
    a = host("a")
    a.save("net", state(1))
    with pytest.raises(Invalid, match="is the registry itself"):
        a.repair(url)
    with pytest.raises(NotFound, match="no registry at"):
        a.repair((tmp_path / "nowhere").as_uri())
    with pytest.raises(Invalid, match="without keys"):
        a.repair("s3://key:secret@bucket/x")


@pytest.mark.damages  # its folders cannot be opened without the keys
def test_a_bucket_of_a_real_server_is_repaired_although_answers_are_lost(
    host: Hosts, address: Address, s3: Layer, monkeypatch: pytest.MonkeyPatch
) -> None:
    import obstore
    from obstore.store import S3Store

    monkeypatch.setattr(remote, "probe", lambda bucket: None)
    a, b = host("a", str(address)), host("b", str(address))
    for number in (1, 2):
        a.save("net", state(number))
    assert value(b, "net:v2") == 2
    store = S3Store("reg", prefix=address.prefix, client_options={"allow_http": True})
    keys = [meta["path"] for batch in obstore.list(store) for meta in batch]
    pack = next(key for key in keys if key.startswith("packs/"))
    data = bytes(obstore.get(store, pack).bytes())
    obstore.put(store, pack, data[:-1] + bytes([data[-1] ^ 1]))
    obstore.put(store, "journal/0000000000000002.zst", b"damaged")
    obstore.delete(store, "journal/0000000000000003.zst")
    a = host("a", str(address))
    with monkeypatch.context() as patch:
        patch.setattr(remote.SharedLog, "put_back", lambda *_: (_ for _ in ()).throw(StorageError("away")))
        with pytest.raises(StorageError, match="away"):
            a.repair(b.root)
    s3.faults += [Fault("PUT", "/journal/", "lose"), Fault("PUT", "/packs/", "500")]
    found = a.repair(b.root)
    assert (found.entries, found.packs, found.problems) == (2, 1, ())
    assert bytes(obstore.get(store, pack).bytes()) == data
    assert [value(host("c", str(address)), f"net:v{number}") for number in (1, 2)] == [1, 2]
    a.save("net", state(3))
    assert value(b, "net:v3") == 3
