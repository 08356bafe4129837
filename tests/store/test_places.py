"""Places: which file systems are known to belong to this machine alone, and the end of a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from registry.store.errors import Corrupt
from registry.store.places import is_local, read_end


def test_a_folder_on_a_disk_is_local_and_one_of_the_system_is_not(tmp_path: Path) -> None:
    assert is_local(tmp_path)
    assert not is_local(Path("/proc/self"))
    (tmp_path / "link").symlink_to("/proc")
    assert not is_local(tmp_path / "link" / "self")
    assert not is_local(tmp_path / "missing")


def test_the_end_of_a_file_is_read_and_no_link_is_followed(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"0123456789")
    assert read_end(path, 3) == b"789"
    assert read_end(path, 99) == b"0123456789"
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(Corrupt):
        read_end(tmp_path / "link", 3)
    with pytest.raises(FileNotFoundError):
        read_end(tmp_path / "none", 3)
