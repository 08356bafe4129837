"""A disk that is full, fails or lies: a clear error, nothing lost, and saving goes on once there is room."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from support import Stepwise, check_whole, copy, dump, in_child, is_state, save

from registry import Registry
from registry.store import durable
from registry.store.errors import StorageError

SAVED = {"net:v1": 1, "net:v2": 2}
ADVICE = {
    errno.ENOSPC: "no space left on the device; free some and repeat",
    errno.EDQUOT: "the disk quota is used up",
    errno.EIO: "check the disk",
}


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    registry = Registry(tmp_path_factory.mktemp("golden") / "r")
    for number in (1, 2):
        save(registry, number)
    registry.catalog.close()
    return registry.root


def failing(step: int, number: int, *, lasting: bool) -> Stepwise:
    """A disk on which a step fails: once, or that and all that follow."""
    failed: list[int] = []

    def at(count: int, when: str, path: Path) -> None:
        if count >= step and when == "before" and (lasting or not failed):
            failed.append(count)
            raise OSError(number, os.strerror(number), str(path))

    return Stepwise(at)


def log_of(root: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted((root / "journal").glob("*.log")))


@pytest.mark.parametrize("number", ADVICE)
def test_a_save_fails_clearly_at_any_step_and_works_again(
    golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    # A connection that is closed late takes a step of its own, by which one may be passed over.
    assert any(phantoms_of_all_steps(golden, tmp_path, monkeypatch, number) for _ in range(3))


def phantoms_of_all_steps(golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> int:
    """Fail each step of a save in turn. Returns how many of the failed saves are in the log all the same.

    These are the ones that failed between writing the entry and its fsync.
    """
    phantoms = 0
    for step in range(1_000):
        root = copy(golden, tmp_path / "r")
        registry = Registry(root)
        lines = log_of(root).count(b"\n")
        disk = failing(step, number, lasting=True)
        with monkeypatch.context() as patch:
            patch.setattr(durable, "disk", disk)
            try:
                save(registry, 3)
            except StorageError as error:
                assert ADVICE[number] in str(error)
                assert "\n" not in str(error)
                assert str(root.parent) in str(error)
            else:
                assert disk.count <= step
                break
        # An entry that could be neither made durable nor taken back may have become a version.
        is_there = log_of(root).count(b"\n") > lines
        name = save(registry, 3)
        registry.catalog.close()
        assert name == ("net:v4" if is_there else "net:v3")
        check_whole(root, {**SAVED, name: 3}, {"net:v3": 3})
        phantoms += is_there
    assert 10 < step < 999
    return phantoms


def test_a_pack_or_manifest_is_written_again_after_one_io_error(
    golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = refused = 0
    for step in range(1_000):
        root = copy(golden, tmp_path / "r")
        registry = Registry(root)
        disk = failing(step, errno.EIO, lasting=False)
        with monkeypatch.context() as patch:
            patch.setattr(durable, "disk", disk)
            try:
                save(registry, 3)
                saved += 1
            except StorageError as error:
                assert "/journal/" in str(error)  # An entry must not be written twice.
                refused += 1
        if disk.count <= step:
            break
        registry.catalog.close()
        check_whole(root, SAVED, {"net:v3": 3})
    assert saved > 10
    assert refused > 1


class Lying(durable.Disk):
    """A disk that claims to have written what it threw away."""

    def __init__(self, lie: int) -> None:
        self.count = -1
        self.lie = lie

    def write(self, fd: int, path: Path, data: memoryview) -> int:
        self.count += 1
        return len(data) if self.count == self.lie else super().write(fd, path, data)

    def write_at(self, fd: int, path: Path, data: memoryview, offset: int) -> int:
        self.count += 1
        return len(data) if self.count == self.lie else super().write_at(fd, path, data, offset)


def test_a_write_that_did_not_happen_is_noticed(
    golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for lie in range(100):
        root = copy(golden, tmp_path / "r")
        registry = Registry(root)
        disk = Lying(lie)
        with monkeypatch.context() as patch:
            patch.setattr(durable, "disk", disk)
            if lie > 3:  # a save writes tensors, header, manifest and journal
                save(registry, 3)
                assert disk.count < lie
                return
            with pytest.raises(StorageError, match="did not keep what was written"):
                save(registry, 3)
        registry.catalog.close()
        check_whole(root, SAVED)


class Full(durable.Disk):
    """A disk without room for anything but what SQLite writes in place."""

    def write(self, fd: int, path: Path, data: memoryview) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def test_where_the_note_of_a_whole_catalog_is_lost_a_full_disk_can_be_read(
    golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = copy(golden, tmp_path / "r")
    (root / "catalog.sqlite-whole").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(durable, "disk", Full())
        registry = Registry(root)
        assert {one.name for one in registry.versions("net")} == SAVED.keys()
        with pytest.raises(StorageError, match="no space left on the device"):
            save(registry, 3)
    save(registry, 3)
    registry.catalog.close()
    check_whole(root, SAVED, {"net:v3": 3})


@contextlib.contextmanager
def small_disk(place: Path, megabytes: int) -> Iterator[Path]:
    """A file system of a few megabytes in memory; needs the right to mount."""
    place.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(place)]
    subprocess.run(["mount", *options], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def may_mount() -> bool:
    return os.geteuid() == 0 and subprocess.run(["unshare", "-m", "true"], check=False).returncode == 0


def fill(folder: Path, leave: int) -> Path:
    """Take all space of a small disk but some bytes."""
    free = os.statvfs(folder)
    path = folder / "ballast"
    path.write_bytes(bytes(max(0, free.f_bavail * free.f_frsize - leave)))
    return path


def on_a_full_disk(folder: Path) -> None:
    registry = Registry(folder / "r")
    save(registry, 1)
    save(registry, 2)
    failures = set()
    for leave in range(0, 400_000, 8_192):
        ballast = fill(folder, leave)
        try:
            registry.save("net", {"model": {"w": torch.rand(5_000)}})
        except StorageError as error:
            assert "no space left on the device; free some and repeat" in str(error)
            failures.add(str(error).partition(":")[0].rpartition("/")[2].partition("-")[0][:8])
            ballast.unlink()
        else:
            break
    else:
        pytest.fail("a save never fitted")
    assert len(failures) > 1  # it failed in different files
    ballast.unlink()
    registry.remove(["net:v3"])
    registry.catalog.close()
    check_whole(folder / "r", SAVED)


def test_a_full_disk_costs_only_the_new_version(tmp_path: Path) -> None:
    if may_mount():
        with small_disk(tmp_path / "small", 3) as folder:
            assert in_child(lambda: on_a_full_disk(folder)) == 0
    else:  # without the right to mount, a limit on the size of files stands in for the disk
        assert in_child(lambda: with_a_size_limit(tmp_path / "r", 30_000)) == 0


@pytest.mark.skipif(not may_mount(), reason="needs the right to mount")
def test_a_file_system_that_is_read_only_is_called_so_by_every_change(tmp_path: Path) -> None:
    with small_disk(tmp_path / "small", 3) as folder:
        registry = Registry(folder / "r")
        save(registry, 1)
        registry.catalog.close()
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        registry = Registry(folder / "r")
        changes: list[Callable[[], object]] = [
            lambda: save(registry, 2),
            lambda: registry.set_tag("net:v1", "seen"),
            lambda: registry.set_alias("net:v1", "production"),
            lambda: registry.add_note("net:v1", "seen"),
            lambda: registry.remove(["net:v1"]),
            registry.collect_garbage,
            registry.rebuild,
        ]
        for change in changes:
            with pytest.raises(
                StorageError, match="the file system is read-only; use another --root or remount it"
            ):
                change()
        assert [version.name for version in registry.versions("net")] == ["net:v1"]
        registry.catalog.close()


def with_a_size_limit(root: Path, limit: int) -> None:
    registry = Registry(root)
    save(registry, 1)
    save(registry, 2)
    before = dump(registry)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        registry.save("net", {"model": {"w": torch.rand(50_000)}})
        pytest.fail("the limit did not bite")
    except StorageError as error:
        assert "\n" not in str(error)
        assert str(root) in str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert dump(registry) == before
    assert save(registry, 3) == "net:v3"
    registry.catalog.close()
    check_whole(root, {**SAVED, "net:v3": 3})


@pytest.mark.parametrize("limit", [100, 500, 3_000, 30_000, 100_000])
def test_a_limit_on_the_size_of_files_costs_only_the_new_version(tmp_path: Path, limit: int) -> None:
    assert in_child(lambda: with_a_size_limit(tmp_path / "r", limit)) == 0


@pytest.mark.parametrize("call", ["pwrite64", "fdatasync", "ftruncate"])
@pytest.mark.parametrize("error", ["ENOSPC", "EIO"])
def test_trouble_inside_the_catalog_costs_nothing(
    golden: Path, tmp_path: Path, call: str, error: str
) -> None:
    """The log has what the catalog cannot take; it catches up by itself."""
    from test_killed import traced

    def change(registry: Registry) -> None:
        assert save(registry, 3) == "net:v3"
        assert save(registry, 4) == "net:v4"
        assert is_state(registry["net:v3"].load(), 3)

    for number in (1, 2, 3):
        root = copy(golden, tmp_path / "r")
        status, text = traced(change, root, f"{call}:error={error}:when={number}")
        assert status == 0, text
        check_whole(root, {**SAVED, "net:v3": 3, "net:v4": 4})
