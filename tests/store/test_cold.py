"""Loads of what is not in the page cache: read past it, or read ahead into it, and verified all the same."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import random
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest
import torch

from registry import Registry
from registry.store import direct, loading, page_cache, parallel
from registry.store.digest import tensor_digest
from registry.store.errors import Corrupt, RegistryError
from registry.store.loading import Mapped
from registry.store.locating import Location, Wanted
from registry.store.manifest import TensorInfo
from registry.store.pack import map_file
from registry.store.store import Store
from tests.faults.support import fork

BLOCK = direct._BLOCK
SIZES = [0, 1, 3, 63, 64, 65, BLOCK - 64, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 70_001, 300_000]
O_DIRECT = getattr(os, "O_DIRECT", 0)


@pytest.fixture(autouse=True)
def cold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take everything for missing in the page cache, however small, and read it in small pieces."""
    monkeypatch.setattr(page_cache, "COLD", 1)
    monkeypatch.setattr(page_cache, "_seem_cached", lambda *_: False)
    monkeypatch.setattr(page_cache, "_PART", 64 << 10)
    monkeypatch.setattr(direct, "_SHORTEST", 1)
    monkeypatch.setattr(direct, "_PIECE", 2 * BLOCK)
    monkeypatch.setattr(direct, "_ARENA", 256 << 10)
    monkeypatch.setattr(parallel, "SMALL", 1)
    direct.direct_packs.forget()


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    chance = torch.Generator().manual_seed(seed)
    found = {
        f"t{size}": torch.randint(0, 256, (size,), dtype=torch.uint8, generator=chance) for size in SIZES
    }
    found |= {f"small{i}": torch.tensor([float(i), seed]) for i in range(300)}
    return found | {"again": found["t70001"].clone(), "again too": found["t3"].clone()}


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], expected[name]) for name in expected
    )


def way_past_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    pass


def way_refused_at_first(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, command: int, value: int = 0) -> int:
        if command == fcntl.F_SETFL and value & O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return 0

    monkeypatch.setattr(direct.fcntl, "fcntl", refuse)


def way_refused_by_the_first_read(monkeypatch: pytest.MonkeyPatch) -> None:
    read, control = os.preadv, fcntl.fcntl

    def refuse(fd: int, buffers: Sequence[Any], start: int, flags: int = 0) -> int:
        if control(fd, fcntl.F_GETFL) & O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return read(fd, buffers, start, flags)

    monkeypatch.setattr(os, "preadv", refuse)


def way_in_short_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    read = os.preadv
    sizes = itertools.cycle([BLOCK, 100, 2 * BLOCK, 1])

    def shortly(fd: int, buffers: Sequence[Any], start: int, flags: int = 0) -> int:
        is_whole = len(buffers) == 1 and len(buffers[0]) >= BLOCK and start % BLOCK == 0
        return min(read(fd, buffers, start, flags), next(sizes) if is_whole else 1 << 60)

    monkeypatch.setattr(os, "preadv", shortly)


def way_of_another_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "O_DIRECT", raising=False)
    monkeypatch.setattr(page_cache, "_populate", lambda part: False)


def way_of_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "is_local", lambda path: False)


WAYS: list[Callable[[pytest.MonkeyPatch], None]] = [
    way_past_the_cache,
    way_refused_at_first,
    way_refused_by_the_first_read,
    way_in_short_reads,
    way_of_another_system,
    way_of_a_network,
]


@pytest.fixture(params=["disk", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    if request.param == "disk":
        yield tmp_path
        return
    if not os.access("/dev/shm", os.W_OK):
        pytest.skip("this system has no file system in memory")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        yield Path(name)


@pytest.mark.parametrize("way", WAYS)
def test_tensors_of_all_sizes_come_back_by_every_way(
    folder: Path, monkeypatch: pytest.MonkeyPatch, way: Callable[[pytest.MonkeyPatch], None]
) -> None:
    store, state = Store(folder), tensors()
    first = store.put({"model": state}).digest
    more = {**tensors(1), "t300000": state["t300000"]}
    second = store.put({"model": more}).digest
    way(monkeypatch)
    for _ in range(2):
        for copy in (True, False):
            assert same(store.get(first, copy=copy)["model"], state)
            assert same(store.get(second, copy=copy)["model"], more)
        live = {name: torch.zeros_like(tensor) for name, tensor in more.items()}
        store.load_into(second, {"model": live})
        assert same(live, more)
        some = store.get(second, only=["model/small1*", "model/t65", "model/t70001"], copy=True)["model"]
        assert same(some, {name: tensor for name, tensor in more.items() if name in some})
        assert len(some) == 113


def test_what_is_copied_has_memory_of_its_own(tmp_path: Path) -> None:
    store, state = Store(tmp_path), tensors()
    digest = store.put({"model": state}).digest
    for tensor in store.get(digest, copy=True)["model"].values():
        tensor.zero_()
    assert same(store.get(digest, copy=True)["model"], state)
    found = store.get(digest, copy=True)["model"]
    found["t70001"].zero_()
    assert torch.equal(found["again"], state["again"])


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each piece that is read, whether it was read past the page cache."""
    found = []
    read = direct._read

    def told(piece: direct._Piece, damaged: Any) -> None:
        found.append(bool(fcntl.fcntl(piece.fd, fcntl.F_GETFL) & O_DIRECT))
        read(piece, damaged)

    monkeypatch.setattr(direct, "_read", told)
    return found


def takes_direct_reads(folder: Path) -> bool:
    (folder / "probe").touch()
    with open(folder / "probe", "rb") as file:
        return direct.is_local(folder) and direct._make_direct(file.fileno())


def test_the_second_load_of_a_process_goes_through_the_page_cache(tmp_path: Path, reads: list[bool]) -> None:
    if not takes_direct_reads(tmp_path):
        pytest.skip("this file system refuses direct reads")
    store = Store(tmp_path)
    digest = store.put({"model": tensors()}).digest
    store.get(digest, copy=True)
    assert reads
    assert all(reads)
    reads.clear()
    store.get(digest, copy=True)
    assert reads
    assert not any(reads)


def test_few_bytes_cached_ones_and_unverified_ones_are_read_as_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: list[bool]
) -> None:
    store = Store(tmp_path)
    digest = store.put({"model": tensors()}).digest
    store.get(digest, copy=True, verify=False)
    monkeypatch.setattr(page_cache, "COLD", 1 << 20)
    store.get(digest, copy=True)
    monkeypatch.setattr(page_cache, "COLD", 1)
    monkeypatch.setattr(page_cache, "_seem_cached", lambda *_: True)
    store.get(digest, copy=True)
    assert reads == []


def damaged_store(folder: Path, name: str, at: int) -> tuple[Store, str, dict[str, torch.Tensor], str]:
    """A store in which one byte of a tensor is wrong, and what errors say of it."""
    store, state = Store(folder), tensors()
    stored = store.put({"model": state})
    assert stored.pack is not None
    place = stored.pack.places[tensor_digest("uint8", tuple(state[name].shape), state[name].numpy().data)]
    path = store.pack_path(stored.pack.digest)
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(place.start + at)
        byte = file.read(1)
        file.seek(place.start + at)
        file.write(bytes([byte[0] ^ 1]))
    words = rf"model/{name}: the bytes {place.start} to {place.start + len(state[name])} of pack {path.name}"
    return store, stored.digest, state, words


DAMAGES = [("t1", 0), ("t4096", 4095), ("t300000", 0), ("t300000", 2 * BLOCK), ("t300000", 299_999)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("name", "at"), DAMAGES)
def test_a_wrong_byte_is_named_and_nothing_is_handed_on(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    way: Callable[[pytest.MonkeyPatch], None],
    name: str,
    at: int,
) -> None:
    store, digest, state, words = damaged_store(tmp_path, name, at)
    way(monkeypatch)
    live = {key: torch.zeros_like(tensor) for key, tensor in state.items()}
    for read in (
        lambda: store.get(digest, copy=True),
        lambda: store.get(digest),
        lambda: store.load_into(digest, {"model": live}),
    ):
        with pytest.raises(Corrupt, match=words):
            read()
    assert not any(tensor.any() for tensor in live.values())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [0, 1, 100_000])
def test_a_pack_that_is_cut_short_while_it_is_copied_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: Callable[[pytest.MonkeyPatch], None], size: int
) -> None:
    store = Store(tmp_path)
    stored = store.put({"model": tensors()})
    assert stored.pack is not None
    path = store.pack_path(stored.pack.digest)
    path.chmod(0o644)
    way(monkeypatch)
    fill_piece, is_cut = direct._fill, []

    def cut(piece: direct._Piece) -> int:
        if not is_cut:
            is_cut.append(True)
            os.truncate(path, size)
        return fill_piece(piece)

    monkeypatch.setattr(direct, "_fill", cut)
    with pytest.raises(Corrupt, match="are not what was saved"):
        store.get(stored.digest, copy=True)
    assert is_cut


def test_a_pack_that_ends_before_zeros_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    digest = store.put({"model": {"w": torch.zeros(300_000)}}).digest
    fill_piece = direct._fill
    monkeypatch.setattr(direct, "_fill", lambda piece: fill_piece(piece) - (piece.start > 1_000_000))
    with pytest.raises(Corrupt, match="model/w: the bytes"):
        store.get(digest, copy=True)


def test_a_pack_that_changes_while_it_is_copied_is_never_handed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, state = Store(tmp_path), tensors()
    stored = store.put({"model": state})
    assert stored.pack is not None
    path = store.pack_path(stored.pack.digest)
    path.chmod(0o644)
    whole = path.read_bytes()
    fill_piece = direct._fill
    chance = random.Random(0)
    for when, is_before in itertools.product(range(0, 60, 7), (True, False)):
        count = itertools.count()

        def change(
            piece: direct._Piece, when: int = when, is_before: bool = is_before, count: Any = count
        ) -> int:
            found = None if is_before else fill_piece(piece)
            if next(count) == when:
                with path.open("r+b") as file:
                    file.seek(chance.randrange(len(whole) - 50_000))
                    file.write(os.urandom(50_000))
            return fill_piece(piece) if found is None else found

        monkeypatch.setattr(direct, "_fill", change)
        try:
            assert same(store.get(stored.digest, copy=True)["model"], state)
        except Corrupt as error:
            assert "are not what was saved" in str(error)
        path.write_bytes(whole)


@pytest.mark.parametrize("copy", [True, False])
def test_a_link_in_the_place_of_a_pack_is_not_followed(tmp_path: Path, copy: bool) -> None:
    store = Store(tmp_path / "store")
    stored = store.put({"model": tensors()})
    assert stored.pack is not None
    path = store.pack_path(stored.pack.digest)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Corrupt, match="is a symbolic link"):
        store.get(stored.digest, copy=copy)


def test_an_error_of_the_disk_is_told_with_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, state = Store(tmp_path), tensors()
    stored = store.put({"model": state})
    read = os.preadv

    def fail(fd: int, buffers: Sequence[Any], start: int, flags: int = 0) -> int:
        if start > 50_000:
            raise OSError(errno.EIO, "Input/output error")
        return read(fd, buffers, start, flags)

    monkeypatch.setattr(os, "preadv", fail)
    assert stored.pack is not None
    with pytest.raises(RegistryError, match=store.pack_path(stored.pack.digest).name):
        store.get(stored.digest, copy=True)
    # What reads ahead says nothing: the mapping has the bytes.
    monkeypatch.setattr(page_cache, "_populate", lambda part: False)
    assert same(store.get(stored.digest)["model"], state)


@pytest.mark.parametrize("seed", range(20))
def test_pieces_are_hashed_in_their_order_in_whatever_order_they_come(seed: int) -> None:
    chance = random.Random(seed)
    data = chance.randbytes(chance.randrange(1, 5_000))
    info = TensorInfo("uint8", (len(data),), tensor_digest("uint8", (len(data),), data))
    item = Wanted(slot=0, info=info, location=Location("p", 0, len(data)), name="t", size=len(data))
    cuts = sorted({0, len(data), *(chance.randrange(len(data)) for _ in range(chance.randrange(12)))})
    pieces = list(itertools.pairwise(cuts))
    chance.shuffle(pieces)
    for is_wrong in (False, True):
        memory = bytearray(data)
        memory[chance.randrange(len(data))] ^= is_wrong
        tensor = direct._Tensor(item, memoryview(memory))
        with ThreadPoolExecutor(2) as pool:
            results = list(pool.map(lambda piece, tensor=tensor: tensor.take(*piece), pieces))  # type: ignore[misc]
        assert results.count(False) == is_wrong
        assert tensor._hashed == len(data)


def test_the_system_is_asked_what_is_in_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    path = tmp_path / "file"
    path.write_bytes(os.urandom(4 << 20))
    item = Wanted(0, TensorInfo("uint8", (4 << 20,), ""), Location("p", 0, 4 << 20), "t", 4 << 20)
    with path.open("rb") as file:
        os.fsync(file.fileno())
        assert page_cache._seem_cached(file.fileno(), [item])
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        try:
            os.preadv(file.fileno(), [bytearray(1)], 3 << 20, os.RWF_NOWAIT)
        except BlockingIOError:
            assert not page_cache._seem_cached(file.fileno(), [item])
        else:
            pytest.skip("this file system keeps everything in memory")

        def cannot_tell(*_: Any) -> int:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")

        monkeypatch.setattr(os, "preadv", cannot_tell)
        assert page_cache._seem_cached(file.fileno(), [item])


def test_reading_ahead_needs_no_pack_that_is_mapped_already(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, state = Store(tmp_path), tensors()
    stored = store.put({"model": state})
    assert stored.pack is not None
    path = store.pack_path(stored.pack.digest)
    ask, asked = page_cache.uncached, []

    def gone(*given: Any) -> list[Wanted]:
        asked.append(True)
        path.unlink(missing_ok=True)
        return ask(*given)

    monkeypatch.setattr(page_cache, "uncached", gone)
    live = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    # It has a pack mapped before it asks.
    store.load_into(stored.digest, {"model": live})
    assert asked
    assert same(live, state)
    with pytest.raises(Corrupt, match=r"missing|no pack holds"):
        store.get(stored.digest, copy=True)


def read_ahead_of(folder: Path) -> tuple[page_cache.ReadAhead, Wanted]:
    """What reads one tensor of ten parts ahead."""
    size = 10 * page_cache._PART
    path = folder / "file"
    path.write_bytes(bytes(size))
    item = Wanted(0, TensorInfo("uint8", (size,), ""), Location("p", 0, size), "t", size)
    return page_cache.ReadAhead([item], {"p": map_file(path, size)}, {"p": -1}), item


def test_the_verification_waits_for_what_is_read_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead, item = read_ahead_of(tmp_path)
    read, go = set(), threading.Event()

    def populate(part: page_cache._Part) -> bool:
        if part.start == page_cache._PART:
            assert go.wait(60)
        read.add(part.start // page_cache._PART)
        return True

    monkeypatch.setattr(page_cache, "_populate", populate)
    with ahead.reading(), ThreadPoolExecutor(1) as pool:
        ahead.wait_for(item, page_cache._PART)
        assert 0 in read
        second = pool.submit(ahead.wait_for, item, page_cache._PART + 1)
        assert not wait([second], timeout=0.1).done
        go.set()
        second.result(60)
        assert 1 in read
        ahead.wait_for(item, item.size)
        assert len(read) == 10


def test_a_load_that_is_interrupted_ends_what_reads_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead, _ = read_ahead_of(tmp_path)
    read = []

    def populate(part: page_cache._Part) -> bool:
        read.append(part)
        return ahead._stop.wait(2)

    monkeypatch.setattr(page_cache, "_populate", populate)
    monkeypatch.setattr(page_cache, "_REQUESTS", 2)
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt), ahead.reading():
        raise KeyboardInterrupt
    assert len(read) <= 2
    assert threading.active_count() == before


def test_small_differences_are_turned_back_a_few_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Registry(tmp_path / "r")
    values = {f"w{i}": torch.randn(5_000) for i in range(20)}
    for number in range(2):
        registry.save("net", {"model": {name: tensor + number * 1e-6 for name, tensor in values.items()}})
    registry.compact()
    registry.collect_garbage(grace=0)
    decode, held = Mapped.decode, []

    def decoded(self: Mapped, items: Any) -> None:
        decode(self, items)
        held.append(len(self._decoded))

    monkeypatch.setattr(Mapped, "decode", decoded)
    monkeypatch.setattr(loading, "_BATCH", 100_000)
    for number in range(2):
        found = registry[f"net:v{1 + number}"].load(copy=True)["model"]
        assert same(found, {name: tensor + number * 1e-6 for name, tensor in values.items()})
    assert max(held) == 5


def series(folder: Path, count: int, size: int) -> tuple[Registry, list[dict[str, torch.Tensor]]]:
    """Versions of one model that are near one another."""
    registry = Registry(folder)
    chance = torch.Generator().manual_seed(0)
    values = torch.randn(size, generator=chance)
    states = []
    for i in range(count):
        states.append(
            {"w": values + i * 1e-6, "head": torch.full((2_000,), float(i)), "b": values[:30_000] + i * 1e-6}
        )
        registry.save("net", {"model": states[-1]})
    return registry, states


@pytest.mark.parametrize("way", WAYS)
def test_differences_come_back_by_every_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: Callable[[pytest.MonkeyPatch], None]
) -> None:
    registry, states = series(tmp_path / "r", 5, 300_000)
    registry.compact()
    registry.collect_garbage(grace=0)
    assert registry.catalog.query("SELECT count(*) FROM tensors WHERE base IS NOT NULL")[0][0] > 4
    way(monkeypatch)
    for number, state in enumerate(states, 1):
        version = registry[f"net:v{number}"]
        assert same(version.load(copy=True)["model"], state)
        assert same(version.load()["model"], state)
        live = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
        version.load_into(model=live)
        assert same(live, state)


def test_cold_loads_beside_compaction_and_gc_give_what_was_saved(tmp_path: Path) -> None:
    registry, states = series(tmp_path / "r", 6, 50_000)

    def maintain() -> None:
        other = Registry(tmp_path / "r", create=False)
        for i in range(6):
            other.compact()
            other.collect_garbage(grace=0)
            other.save("net", {"model": {name: tensor + 1 + i for name, tensor in states[i].items()}})
            other.thin(f"net:v{len(states) + 1 + i}")
            other.collect_garbage(grace=0)

    child = fork(maintain)
    rounds = 0
    status: int | None = None
    while status is None or rounds < 3:
        direct.direct_packs.forget()
        for number, state in enumerate(states, 1):
            version = registry[f"net:v{number}"]
            assert same(version.load(copy=True)["model"], state)
            assert same(version.load()["model"], state)
            live = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
            version.load_into(model=live)
            assert same(live, state)
        rounds += 1
        if status is None:
            done, code = os.waitpid(child, os.WNOHANG)
            status = code if done else None
    assert status == 0
    assert registry.verify().problems == ()
    assert registry.store.distrusted == set()


def peak_beyond(act: Callable[[], object]) -> int:
    """Bytes of memory that a call takes at most, beyond what the process had."""

    def of(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) << 10

    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("this system does not forget how much memory was used before")
    before = of("VmRSS")
    kept = act()
    peak = of("VmHWM") - before
    del kept
    return peak


@pytest.mark.parametrize("is_difference", [False, True])
def test_a_copy_takes_the_memory_of_one_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_difference: bool
) -> None:
    registry = Registry(tmp_path / "r")
    states = [{"w": torch.zeros(20 << 20, dtype=torch.uint8).random_(0, 256)} for _ in range(5)]
    state = {f"w{i}": one["w"].view(torch.float16) for i, one in enumerate(states)}
    registry.save("net", {"model": state})
    if is_difference:
        changed = {name: tensor.clone() for name, tensor in state.items()}
        for tensor in changed.values():
            tensor[::7] *= 2
        registry.save("net", {"model": changed})
        registry.compact()
        registry.collect_garbage(grace=0)
    monkeypatch.setattr(direct, "_PIECE", 2 << 20)
    monkeypatch.setattr(direct, "_ARENA", 64 << 20)
    for name in ("net:v1", "net:v2")[: 1 + is_difference]:
        # The pages of a mapped base are the page cache's, and count as the process's own all the same.
        room = (64 << 20) + is_difference * (100 << 20)
        assert peak_beyond(lambda name=name: registry[name].load(copy=True)) < (100 << 20) + room  # type: ignore[misc]
