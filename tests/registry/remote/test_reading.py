"""Reading from a bucket: parts of packs, several packs at a time, the bound of what is kept, and processes that were forked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from servers import Fault, Layer
from torch.utils.data import DataLoader, Dataset

from registry import Registry
from registry.remote import forked, packs, remote, shared_log
from registry.remote.folder import FolderBucket
from registry.remote.packs import RemotePacks
from registry.remote.urls import Address
from registry.store.errors import Corrupt, StorageError

Hosts = Callable[[str], Registry]
SIZE = 250_000
"""Elements of a tensor, which has a megabyte."""


@pytest.fixture
def bucket(tmp_path: Path) -> FolderBucket:
    return FolderBucket(tmp_path / "bucket")


@pytest.fixture
def host(bucket: FolderBucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hosts:
    monkeypatch.setattr(shared_log, "_REFRESH", 0.0)

    def opened(name: str) -> Registry:
        monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / f"host-{name}"))
        return Registry(bucket.root.as_uri())

    return opened


def layers(number: float = 0, count: int = 12) -> dict[str, Any]:
    """A network of twelve megabytes."""
    return {"model": {f"w{i:02d}": torch.full((SIZE,), float(number + i)) for i in range(count)}}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of each request for a part of a pack."""
    found: list[int] = []
    get_range = FolderBucket.get_range

    def counted(self: FolderBucket, key: str, start: int, size: int) -> bytes | None:
        data = get_range(self, key, start, size)
        if key.startswith("packs/"):
            found.append(len(data or b""))
        return data

    monkeypatch.setattr(FolderBucket, "get_range", counted)
    return found


def kept(registry: Registry) -> list[Path]:
    return sorted(registry.root.glob("packs/*/*"))


def is_whole(components: dict[str, Any], names: Collection[str], number: float = 0) -> bool:
    return set(components["model"]) == set(names) and all(
        torch.equal(tensor, torch.full((SIZE,), float(number + int(name[1:]))))
        for name, tensor in components["model"].items()
    )


@pytest.mark.parametrize("copy", [False, True])
def test_a_few_names_are_read_in_ranges_and_nothing_is_kept(
    host: Hosts, asked: list[int], copy: bool
) -> None:
    host("a").save("net", layers())
    b = host("b")
    names = ["w03", "w04", "w09"]
    found = b["net"].load([f"model/{name}" for name in names], copy=copy)
    assert is_whole(found, names)
    # What lies near comes in one request. Which ones do depends on the threads that wrote the pack.
    digests = {path: digest for path, _, _, digest in b["net"].parameters()}
    places = b.catalog.locate([digests[f"model/{name}"] for name in names]).values()
    wanted: list[range] = []
    for start in sorted(place.start for place in places):
        is_near = wanted and start <= wanted[-1].stop + packs._GAP
        first = wanted.pop().start if is_near else start
        wanted.append(range(first, start + 4 * SIZE))
    assert sorted(asked) == sorted(map(len, wanted))
    assert kept(b) == []
    # They are memory of the caller's own.
    found["model"]["w03"].zero_()
    assert is_whole(b["net"].load("model/w03"), ["w03"])


def test_two_names_of_equal_tensors_that_are_read_in_ranges_share_no_memory(host: Hosts) -> None:
    state = layers()
    state["model"] |= {name: torch.arange(2.0 * SIZE) for name in ("w03", "again")}
    host("a").save("net", state)
    found = host("b")["net"].load(["model/w03", "model/again"])["model"]
    found["w03"].zero_()
    assert torch.equal(found["again"], state["model"]["w03"])


@pytest.mark.parametrize("copy", [False, True])
def test_a_tensor_without_bytes_is_read_in_ranges_beside_the_one_that_begins_where_it_is(
    host: Hosts, copy: bool
) -> None:
    state = layers()
    state["model"]["empty"] = torch.empty(0, 3)
    writer = host("a")
    writer.save("net", state)
    places = {
        path.removeprefix("model/"): writer.catalog.locate([digest])[digest].start
        for path, _, _, digest in writer["net"].parameters()
    }
    (beside,) = [name for name, start in places.items() if name != "empty" and start == places["empty"]]
    reader = host("b")
    for names in ([beside, "empty"], ["empty", beside], ["empty"]):
        loaded = reader["net"].load([f"model/{name}" for name in names], copy=copy)["model"]
        assert all(torch.equal(loaded[name], state["model"][name]) for name in names)
        assert loaded.keys() == {*names}
    assert kept(reader) == []


def test_a_tensor_without_bytes_is_copied_from_a_pack_that_is_not_here(host: Hosts, tmp_path: Path) -> None:
    state = layers()
    state["model"]["empty"] = torch.empty(0, 3)
    host("a").save("net", state)
    reader, other = host("b"), Registry(tmp_path / "other")
    wanted = {path: digest for path, _, _, digest in reader["net"].parameters()}
    pack = reader.store.copy_to_new_pack([wanted["model/empty"], wanted["model/w03"]], into=other.store)
    assert {tensor.digest for tensor in pack.tensors} == {wanted["model/empty"], wanted["model/w03"]}
    assert kept(reader) == []


def test_what_is_needed_for_the_greater_part_is_brought_whole_and_kept(host: Hosts, asked: list[int]) -> None:
    host("a").save("net", layers())
    b = host("b")
    names = [f"w{i:02d}" for i in range(7)]
    assert is_whole(b["net"].load([f"model/{name}" for name in names]), names)
    assert len(kept(b)) == 1
    before = len(asked)
    assert is_whole(b["net"].load("model/w11"), ["w11"])
    assert len(asked) == before


def test_who_asks_for_one_name_after_the_other_gets_the_pack(host: Hosts, asked: list[int]) -> None:
    host("a").save("net", layers())
    b = host("b")
    for i in range(12):
        assert is_whole(b["net"].load(f"model/w{i:02d}"), [f"w{i:02d}"])
    assert len(kept(b)) == 1
    assert sum(asked) < 1.5 * 12 * 4 * SIZE


def test_a_small_pack_is_brought_whole(host: Hosts) -> None:
    host("a").save("net", {"model": {f"w{i}": torch.full((100,), float(i)) for i in range(9)}})
    b = host("b")
    b["net"].load("model/w1")
    assert len(kept(b)) == 1


def test_live_tensors_are_filled_from_ranges(host: Hosts) -> None:
    host("a").save("net", layers())
    b = host("b")
    live = {"w05": torch.zeros(SIZE)}
    b["net"].load_into(model=live)
    assert is_whole({"model": live}, ["w05"])
    module = torch.nn.Module()
    module.register_buffer("w07", torch.zeros(SIZE))
    b["net"].load_into(model=module.state_dict())
    assert float(module.w07[0]) == 7
    assert kept(b) == []


def test_differences_are_read_in_ranges_with_what_they_rest_on(host: Hosts, asked: list[int]) -> None:
    a = host("a")
    torch.manual_seed(0)
    weights, saved = [torch.randn(SIZE) for _ in range(8)], []
    for _ in range(4):
        weights = [one + 1e-4 * torch.randn(SIZE) for one in weights]
        saved.append(weights)
        a.save("net", {"model": {f"w{i}": one.clone() for i, one in enumerate(weights)}})
    assert a.compact()[0].packs
    a.collect_garbage(grace=0)
    b = host("b")
    for copy in (False, True):
        for number, expected in enumerate(saved, 1):
            found = Registry(b.root)[f"net:v{number}"].load("model/w3", copy=copy)
            assert torch.equal(found["model"]["w3"], expected[3])
    assert kept(b) == []
    live = {"w2": torch.zeros(SIZE)}
    Registry(b.root)["net:v1"].load_into(model=live)
    assert torch.equal(live["w2"], saved[0][2])


def test_ranges_are_verified(host: Hosts, bucket: FolderBucket) -> None:
    a = host("a")
    a.save("net", layers())
    (place,) = a.catalog.locate([d for path, *_, d in a["net"].parameters() if path == "model/w05"]).values()
    (held,) = bucket.list("packs")
    path = bucket.root / held.key
    whole = path.read_bytes()
    path.chmod(0o644)
    at = place.start + 10
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    root = host("b").root
    for read in (
        lambda: Registry(root)["net"].load("model/w05"),
        lambda: Registry(root)["net"].load("model/w05", copy=True),
        lambda: Registry(root)["net"].load_into(model={"w05": torch.zeros(SIZE)}),
    ):
        with pytest.raises(Corrupt, match="model/w05"):
            read()
    path.write_bytes(whole[: place.start + 100])
    with pytest.raises(Corrupt, match="cut short"):
        Registry(root)["net"].load("model/w05")
    path.unlink()
    with pytest.raises(Corrupt, match="the pack is missing"):
        Registry(root)["net"].load("model/w05")
    path.write_bytes(whole)
    assert is_whole(Registry(root)["net"].load("model/w05"), ["w05"])


FETCH = """
import sys, time
from pathlib import Path
from registry import Registry
from registry.remote.folder import FolderBucket
get_range = FolderBucket.get_range
def counted(self, key, start, size):
    data = get_range(self, key, start, size)
    if key.startswith("packs/"):
        time.sleep(0.5)
        with open(sys.argv[2], "a") as file:
            print(key, start, file=file)
    return data
FolderBucket.get_range = counted
print("ready", flush=True)
sys.stdin.readline()
registry = Registry(sys.argv[1])
assert float(registry["net"].load()["model"]["w03"][5]) == 3
"""


def test_two_processes_that_need_a_pack_bring_it_once(
    host: Hosts, bucket: FolderBucket, tmp_path: Path
) -> None:
    host("a").save("net", layers())
    b = host("b")
    words = [sys.executable, "-c", FETCH, bucket.root.as_uri(), str(tmp_path / "asked")]
    children = [
        subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    for child in children:
        assert child.stdout is not None
        child.stdout.readline()
    for child in children:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
    assert [child.wait() for child in children] == [0, 0]
    assert len((tmp_path / "asked").read_text().splitlines()) == 1
    assert len(kept(b)) == 1
    assert list(b.store.tmp.iterdir()) == []


def test_a_process_that_died_while_it_brought_a_pack_keeps_nobody(
    host: Hosts, bucket: FolderBucket, tmp_path: Path
) -> None:
    host("a").save("net", layers())
    b = host("b")
    program = FETCH.replace("time.sleep(0.5)", "print('in', flush=True); time.sleep(99)")
    words = [sys.executable, "-c", program, bucket.root.as_uri(), str(tmp_path / "asked")]
    child = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write("go\n")
    child.stdin.flush()
    assert [child.stdout.readline() for _ in range(2)] == ["ready\n", "in\n"]
    child.kill()
    child.wait()
    assert is_whole(b["net"].load(), [f"w{i:02d}" for i in range(12)])


def test_a_bound_that_is_smaller_than_a_pack_holds_it_back_from_nobody(
    host: Hosts, bucket: FolderBucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = host("a")
    for number in (100, 200):
        a.save("net", layers(number))
    monkeypatch.setenv("REGISTRY_CACHE_SIZE", "0.001GB")
    b = host("b")
    names = [f"w{i:02d}" for i in range(12)]
    first = b["net:v1"].load()
    for _ in range(2):
        for version, number in ((1, 100), (2, 200)):
            assert is_whole(b[f"net:v{version}"].load(), names, number)
            assert len(kept(b)) == 1
    # It was evicted while it was mapped.
    assert is_whole(first, names, 100)
    environment = {**os.environ}
    program = (
        "import sys; from registry import Registry\n"
        "for _ in range(3):\n"
        "    for n in (sys.argv[2], '1', '2'): assert float(Registry(sys.argv[1])[f'net:v{n}'].load(copy=True)"
        "['model']['w03'][0]) == 100 * int(n) + 3"
    )
    children = [
        subprocess.Popen([sys.executable, "-c", program, bucket.root.as_uri(), n], env=environment)
        for n in ("1", "2")
    ]
    assert [child.wait() for child in children] == [0, 0]
    assert len(kept(b)) <= 2


def test_a_reader_whose_pack_is_always_evicted_by_others_ends_all_the_same(
    host: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the bound is smaller than what several processes and threads need at once."""
    host("a").save("net", layers())
    b = host("b")
    fetch = RemotePacks.fetch

    def and_evicted(packs: RemotePacks, wanted: Any) -> None:
        fetch(packs, wanted)
        other = RemotePacks(packs._bucket, b.root)
        other.bound = 0
        other._trim(set())

    monkeypatch.setattr(RemotePacks, "fetch", and_evicted)
    for _ in range(2):
        assert is_whole(b["net"].load(), [f"w{i:02d}" for i in range(12)])
    # Nobody holds it any more.
    assert b.remote is not None
    and_evicted(b.remote.packs, {})
    assert kept(b) == []


def test_a_pack_that_another_process_evicts_before_it_is_mapped_is_brought_again(
    host: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    host("a").save("net", layers())
    b = host("b")
    fetch, left = RemotePacks.fetch, iter([True])

    def evicted(packs: RemotePacks, wanted: Any) -> None:
        fetch(packs, wanted)
        for path in kept(b) if next(left, False) else ():
            path.unlink()

    monkeypatch.setattr(RemotePacks, "fetch", evicted)
    for read in (
        lambda: b["net"].load(),
        lambda: b["net"].load(copy=True),
        lambda: b["net"].load_into(model={name: torch.zeros(SIZE) for name in layers()["model"]}),
    ):
        for path in kept(b):
            path.unlink()
        left = iter([True])
        read()


class Loads(Dataset[float]):
    """Loads a version in each worker."""

    def __init__(self, registry: Registry, saves: bool = False) -> None:
        self._registry = registry
        self._saves = saves

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> float:
        found = self._registry[f"net:v{1 + i % 2}"].load()["model"]["w"]
        if self._saves:
            self._registry.save("of-worker", {"model": {"w": torch.full((1_000,), float(i))}})
        return float(found[0])


@pytest.fixture
def within_20_seconds() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.damages  # its folders cannot be opened without the keys
class TestOnS3:
    @pytest.fixture
    def opened(self, address: Address, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hosts:
        monkeypatch.setattr(remote, "probe", lambda bucket: None)
        monkeypatch.setattr(shared_log, "_REFRESH", 0.0)

        def opened(name: str) -> Registry:
            monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / f"host-{name}"))
            return Registry(str(address))

        return opened

    def test_few_bytes_are_sent_for_one_name(self, opened: Hosts, s3: Layer) -> None:
        opened("a").save("net", layers())
        b = opened("b")
        assert b["net"].version == 1
        s3.requests.clear()
        s3.sent = 0
        assert is_whole(b["net"].load("model/w03"), ["w03"])
        assert s3.sent < 4 * SIZE + 20_000
        assert len([one for one in s3.requests if "/packs/" in one]) == 1

    def test_a_large_pack_comes_in_parts_and_each_of_them_may_be_asked_for_twice(
        self, opened: Hosts, s3: Layer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from registry.remote import packs

        monkeypatch.setattr(packs, "_PART", 1 << 20)
        opened("a").save("net", layers())
        b = opened("b")
        s3.faults += [Fault("GET", "/packs/", "503"), Fault("GET", "/packs/", "lose", skip=2)]
        assert is_whole(b["net"].load(), [f"w{i:02d}" for i in range(12)])
        assert len([one for one in s3.requests if one.startswith("GET") and "/packs/" in one]) == 14

    @pytest.mark.usefixtures("within_20_seconds")
    @pytest.mark.parametrize("saves", [False, True])
    def test_workers_of_a_loader_load_and_save(self, opened: Hosts, saves: bool) -> None:
        a, b = opened("a"), opened("b")
        for number in (1, 2):
            a.save("net", {"model": {"w": torch.full((1_000,), float(number))}})
        assert b["net"].version == 2
        loader = DataLoader(Loads(b, saves), batch_size=None, num_workers=2, multiprocessing_context="fork")
        assert list(loader) == [1, 2, 1, 2]
        assert len(kept(b)) >= 2
        assert float(b["net:v1"].load()["model"]["w"][0]) == 1
        if saves:
            found = {float(a[f"of-worker:v{n}"].load()["model"]["w"][0]) for n in (1, 2, 3, 4)}
            assert found == {0, 1, 2, 3}

    @pytest.mark.usefixtures("within_20_seconds")
    def test_where_no_process_can_help_a_child_one_line_says_what_to_do(
        self, opened: Hosts, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        opened("a").save("net", {"model": {"w": torch.ones(1_000)}})
        b = opened("b")
        assert b["net"].version == 1
        for program, said in (("/nowhere/python", "cannot start another one"), ("/bin/false", "has ended")):
            monkeypatch.setattr(forked.sys, "executable", program)
            child = os.fork()
            if not child:
                try:
                    b["net"].load()
                except StorageError as error:
                    os._exit(3 if said in str(error) and "method spawn" in str(error) else 4)
                except BaseException:
                    os._exit(5)
                os._exit(6)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3

    @pytest.mark.usefixtures("within_20_seconds")
    def test_an_error_of_the_bucket_is_the_same_in_a_child(self, opened: Hosts, s3: Layer) -> None:
        a = opened("a")
        a.save("net", {"model": {"w": torch.ones(1_000)}})
        s3.faults.append(Fault("PUT", "/journal/", "403", times=99))
        child = os.fork()
        if not child:
            try:
                a.save("net", {"model": {"w": torch.zeros(1_000)}})
            except StorageError as error:
                os._exit(3 if "lack the right" in str(error) else 4)
            except BaseException:
                os._exit(5)
            os._exit(6)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
        s3.faults.clear()
        a.save("net", {"model": {"w": torch.zeros(1_000)}})
        assert a["net"].version == 2
