"""The durable steps: short writes, links, modes, and errors that say what to do."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from registry.store import durable
from registry.store.durable import NewFile, append, extend, write_file
from registry.store.errors import StorageError, storage_errors


class Stingy(durable.Disk):
    """A disk that takes at most seven bytes at a time."""

    def write(self, fd: int, path: Path, data: memoryview) -> int:
        return super().write(fd, path, data[:7])

    def write_at(self, fd: int, path: Path, data: memoryview, offset: int) -> int:
        return super().write_at(fd, path, data[:7], offset)


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durable, "disk", Stingy())
    data = os.urandom(1_000)
    write_file(tmp_path / "a", data)
    append(tmp_path / "b", data)
    append(tmp_path / "b", data)
    file = NewFile(tmp_path, inner=0)
    file.skip_to(50)
    file.write(data)
    file.write_at(data[:50], 0)
    file.sync(data[:50])
    file.publish(tmp_path / "c", inner=0)
    assert (tmp_path / "a").read_bytes() == data
    assert (tmp_path / "b").read_bytes() == data + data
    assert (tmp_path / "c").read_bytes() == data[:50] + data


def test_a_users_file_follows_links_and_the_umask(tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_text("old")
    link.symlink_to(real)
    before = os.umask(0o027)
    try:
        write_file(link, b"new")
    finally:
        os.umask(before)
    assert link.is_symlink()
    assert real.read_bytes() == b"new"
    assert stat.S_IMODE(real.stat().st_mode) == 0o640
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


def test_a_file_of_the_store_is_read_only(tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    write_file(tmp_path / "new" / "deep" / "file", b"x", folder=tmp_path / "tmp", read_only=True)
    assert stat.S_IMODE((tmp_path / "new" / "deep" / "file").stat().st_mode) & 0o222 == 0
    assert list((tmp_path / "tmp").iterdir()) == []


def test_lines_begin_on_a_line_of_their_own_after_a_torn_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(durable, "disk", Stingy())
    path = tmp_path / "a"
    extend(path, b"a whole line\nanother, which is torn")
    extend(path, b"and a third line\n")
    extend(path, b"the last\n")
    assert path.read_bytes() == b"a whole line\nanother, which is torn\nand a third line\nthe last\n"


def test_a_failed_append_leaves_the_file_as_long_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "journal"
    append(path, b"first\n")

    class Full(Stingy):
        calls = 0

        def write(self, fd: int, path: Path, data: memoryview) -> int:
            self.calls += 1
            if self.calls > 2:
                raise OSError(errno.ENOSPC, "full", str(path))
            return super().write(fd, path, data)

    with monkeypatch.context() as patch:
        patch.setattr(durable, "disk", Full())
        with pytest.raises(StorageError, match="no space left on the device"), storage_errors(path):
            append(path, b"x" * 100)
    assert path.read_bytes() == b"first\n"


def test_a_new_file_that_is_given_up_leaves_nothing(tmp_path: Path) -> None:
    file = NewFile(tmp_path, inner=0)
    file.write(b"half")
    assert len(list(tmp_path.iterdir())) == 1
    file.discard()
    file.discard()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "no space left on the device; free some and repeat"),
        (errno.EROFS, "the file system is read-only"),
        (errno.EMFILE, "too many open files; raise the limit (ulimit -n)"),
        (errno.EACCES, "permission denied"),
        (errno.ENOTDIR, "Not a directory"),
    ],
)
def test_an_error_of_the_system_names_the_file_and_what_to_do(
    tmp_path: Path, number: int, advice: str
) -> None:
    with pytest.raises(StorageError) as caught, storage_errors(tmp_path):
        raise OSError(number, os.strerror(number), str(tmp_path / "x"))
    assert str(caught.value).startswith(f"{tmp_path / 'x'}: ")
    assert advice in str(caught.value)


class Syncs(durable.Disk):
    """A disk that notes which folders were synced."""

    def __init__(self) -> None:
        self.folders: list[Path] = []

    def sync_folder(self, path: Path, folder: int) -> None:
        self.folders.append(path)
        super().sync_folder(path, folder)


def test_the_name_of_a_folder_that_somebody_else_made_is_made_durable_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who made it may have been killed, or not have come to that yet; a power cut would take it, and all that is in it."""
    monkeypatch.setattr(durable, "disk", disk := Syncs())
    root = tmp_path / "r"
    (root / "packs" / "ab").mkdir(parents=True)
    write_file(root / "packs" / "ab" / "c", b"1", folder=root, inner=2)
    assert disk.folders == [tmp_path, root, root / "packs", root / "packs" / "ab"]
    write_file(root / "packs" / "ab" / "d", b"1", folder=root, inner=2)
    assert disk.folders[4:] == [root / "packs" / "ab"]


def test_a_registry_in_a_folder_that_cannot_be_read_is_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Foreign(durable.Disk):
        def sync_folder(self, path: Path, folder: int) -> None:
            if path == tmp_path:
                raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(durable, "disk", Foreign())
    (tmp_path / "r").mkdir()
    durable.make_folder(tmp_path / "r" / "packs", inner=1)
    with pytest.raises(PermissionError):
        durable.make_folder(tmp_path / "new" / "packs", inner=1)


def test_a_folder_that_is_not_durable_does_not_pass_for_one_that_was(tmp_path: Path) -> None:
    durable.make_folder(tmp_path / "r", inner=1)
    durable.make_folder(tmp_path / "r" / "a", inner=2)
    folder = os.stat(tmp_path / "r" / "a")
    assert (folder.st_dev, folder.st_ino) in durable.disk.safe_folders
    (tmp_path / "r" / "a").rmdir()
    durable.make_folder(tmp_path / "r" / "a", inner=2, is_durable=False)
    folder = os.stat(tmp_path / "r" / "a")
    assert (folder.st_dev, folder.st_ino) not in durable.disk.safe_folders
