"""Which file systems are known to belong to this machine alone."""

from __future__ import annotations

from pathlib import Path

from registry.store.places import is_local


def test_a_folder_on_a_disk_is_local_and_one_of_the_system_is_not(tmp_path: Path) -> None:
    assert is_local(tmp_path)
    assert not is_local(Path("/proc/self"))
    (tmp_path / "link").symlink_to("/proc")
    assert not is_local(tmp_path / "link" / "self")
    assert not is_local(tmp_path / "missing")
