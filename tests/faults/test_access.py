"""Folders that cannot be written, belong to others, or lie in odd places."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from support import check_whole, files, in_child, is_state, save

from registry import Registry
from registry.store.errors import RegistryError, StorageError

NOBODY = 65_534


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A registry that everybody may read."""
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.geteuid() and "pytest" in str(folder):
            folder.chmod(0o755)
    registry = Registry(tmp_path / "r")
    save(registry, 1)
    registry.catalog.close()
    return registry.root


def as_a_stranger(run: Callable[[], None]) -> int:
    """Run in a child that may not write what is ours: as another user, or without our own right to write."""

    def child() -> None:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        run()

    return in_child(child)


def test_a_folder_that_cannot_be_written_is_read_and_not_changed(root: Path) -> None:
    for folder, _, names in os.walk(root):
        os.chmod(folder, 0o555)
        for name in names:
            os.chmod(Path(folder, name), 0o444)

    def look() -> None:
        registry = Registry(root, create=False)
        assert is_state(registry["net"].load(), 1)
        assert registry.verify().problems == ()
        assert registry.status().versions == 1
        for change in (
            lambda: save(registry, 2),
            lambda: registry.set_alias("net", "good"),
            lambda: registry.remove(["net"]),
            lambda: registry.collect_garbage(grace=0),
            lambda: registry.rebuild(),
        ):
            with pytest.raises(StorageError, match=r"ask its owner for access|permission denied") as caught:
                change()
            assert "\n" not in str(caught.value)

    before = files(root)
    try:
        assert as_a_stranger(look) == 0
        assert files(root) == before
    finally:
        for folder, _, _ in os.walk(root):
            os.chmod(folder, 0o755)


def test_a_folder_of_another_user_is_named_with_its_owner(root: Path) -> None:
    if os.geteuid() != 0:
        root.chmod(0o500)

    def make() -> None:
        with pytest.raises(
            StorageError, match=rf"belongs to user {root.stat().st_uid}, this process runs as"
        ):
            Registry(root / "inner")

    try:
        assert as_a_stranger(make) == 0
    finally:
        root.chmod(0o755)


def test_a_file_that_cannot_be_read_is_an_error_of_ours(root: Path) -> None:
    for pattern in ("packs/*/*", "manifests/*/*.json", "catalog.sqlite", "registry.toml"):
        (path,) = root.glob(pattern)
        mode = path.stat().st_mode
        path.chmod(0)

        def look() -> None:
            with pytest.raises(RegistryError) as caught:
                Registry(root, create=False)["net"].load()
            assert "\n" not in str(caught.value)

        assert as_a_stranger(look) == 0
        path.chmod(mode)


@pytest.mark.parametrize("mask", [0o077, 0o022, 0o002, 0o000])
def test_the_modes_of_new_files_follow_the_umask(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        save(Registry(tmp_path / "r"), 1)
    finally:
        os.umask(before)
    for path in tmp_path.joinpath("r").rglob("*"):
        mode = stat.S_IMODE(path.stat().st_mode)
        if path.is_dir():
            assert mode == 0o777 & ~mask
        else:
            immutable = path.suffix in (".safetensors", ".json")
            assert mode == (0o444 if immutable else 0o666) & ~mask, path


def test_new_files_take_the_group_of_a_folder_that_passes_it_on(tmp_path: Path) -> None:
    root = tmp_path / "shared"
    root.mkdir()
    group = NOBODY if os.geteuid() == 0 else os.getegid()
    os.chown(root, -1, group)
    root.chmod(0o2775)
    save(Registry(root), 1)
    assert {path.stat().st_gid for path in root.rglob("*")} == {group}


def test_a_registry_may_be_moved_linked_and_named_relatively(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = root.rename(tmp_path / "moved ü%20#?")
    link = tmp_path / "link"
    link.symlink_to(moved)
    monkeypatch.chdir(tmp_path)
    registry = Registry("link")
    assert save(registry, 2) == "net:v2"
    assert link.is_symlink()
    monkeypatch.setenv("REGISTRY_ROOT", str(moved))
    assert is_state(Registry()["net:v2"].load(), 2)
    registry.catalog.close()
    check_whole(moved, {"net:v1": 1, "net:v2": 2})


@pytest.mark.damages
def test_a_folder_without_its_settings_is_not_taken_for_a_new_registry(root: Path) -> None:
    (root / "registry.toml").unlink()
    before = files(root)
    with pytest.raises(RegistryError, match="format = 2"):
        Registry(root)
    assert files(root) == before


def test_a_folder_that_cannot_be_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for place in ("file", "file/inner"):
        with pytest.raises(RegistryError):
            Registry(tmp_path / place)
    assert files(tmp_path) == {"file": b"x"}
