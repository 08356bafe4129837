"""Power cuts: every state of the disk that a cut can leave is a whole registry.

A recorder takes the place of the durable steps and notes what each did. From any prefix of the notes follow the
states that a file system may be in after a power cut: data that was not synced is there, is cut off or is garbage;
names whose folder was not synced are there or not. SQLite's own files are taken as they were at that moment, since
SQLite syncs them itself (and is tested for it).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from support import check_whole, copy, save

from registry import Registry
from registry.store import durable

CUT, GARBAGE, KEPT = "cut off", "garbage", "kept"


@dataclass
class Step:
    """One durable step, and what was acknowledged and in SQLite's files when it was done."""

    kind: str
    path: str
    other: str = ""
    offset: int = 0
    data: bytes = b""
    saved: dict[str, int] = field(default_factory=dict)
    catalog: dict[str, bytes] = field(default_factory=dict)


class Recorder(durable.Disk):
    """Does each step, and notes it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.steps: list[Step] = []
        self.saved: dict[str, int] = {}

    def note(self, kind: str, path: Path, **more: Any) -> None:
        catalog = {found.name: found.read_bytes() for found in self.root.glob("catalog.sqlite*")}
        step = Step(kind, self._relative(path), **more, saved=dict(self.saved), catalog=catalog)
        self.steps.append(step)

    def _relative(self, path: Path) -> str:
        return str(path.relative_to(self.root))

    def write(self, fd: int, path: Path, data: memoryview) -> int:
        append = path.parent.name == "journal"
        offset = os.fstat(fd).st_size if append else os.lseek(fd, 0, os.SEEK_CUR)
        count = super().write(fd, path, data)
        self.note("write", path, offset=offset, data=bytes(data[:count]))
        return count

    def write_at(self, fd: int, path: Path, data: memoryview, offset: int) -> int:
        count = super().write_at(fd, path, data, offset)
        self.note("write", path, offset=offset, data=bytes(data[:count]))
        return count

    def sync(self, fd: int, path: Path) -> None:
        super().sync(fd, path)
        self.note("sync", path)

    def sync_folder(self, path: Path, folder: int) -> None:
        super().sync_folder(path, folder)
        self.note("sync folder", path)

    def rename(self, source: Path, target: Path, source_folder: int, target_folder: int) -> None:
        super().rename(source, target, source_folder, target_folder)
        self.note("rename", source, other=self._relative(target))

    def unlink(self, path: Path, folder: int) -> None:
        super().unlink(path, folder)
        self.note("unlink", path)

    def mkdir(self, path: Path, folder: int) -> None:
        super().mkdir(path, folder)
        self.note("mkdir", path)

    def truncate(self, fd: int, path: Path, size: int) -> None:
        super().truncate(fd, path, size)
        self.note("truncate", path, offset=size)


class File:
    """What a file holds now, and what of it a power cut cannot take."""

    def __init__(self, data: bytes = b"") -> None:
        self.now = bytearray(data)
        self.safe = bytes(data)

    def write(self, offset: int, data: bytes) -> None:
        self.now.extend(bytes(max(0, offset + len(data) - len(self.now))))
        self.now[offset : offset + len(data)] = data

    def after_cut(self, fate: str) -> bytes:
        if fate == KEPT or bytes(self.now) == self.safe:
            return bytes(self.now)
        if fate == CUT:
            return self.safe
        return self.safe + b"\xa5" * max(0, len(self.now) - len(self.safe))


class Model:
    """A file system in which data is safe after a sync of the file, and a name after a sync of its folder."""

    def __init__(self, root: Path) -> None:
        self.files = {
            str(path.relative_to(root)): File(path.read_bytes())
            for path in root.rglob("*")
            if path.is_file() and not path.name.startswith("catalog.sqlite")
        }
        self.pending: list[tuple[str, Callable[[dict[str, File]], object]]] = []
        """Changes of names that are not safe, each with the folder whose sync makes it so."""
        self.safe_names = dict(self.files)

    def do(self, step: Step) -> None:
        path, other = step.path, step.other
        folder = str(Path(other or path).parent)
        if step.kind == "write":
            if path not in self.files:
                self.files[path] = File()
                self.pending.append(
                    (folder, lambda names, file=self.files[path]: names.setdefault(path, file))
                )
            self.files[path].write(step.offset, step.data)
        elif step.kind == "truncate":
            del self.files[path].now[step.offset :]
        elif step.kind == "sync":
            self.files[path].safe = bytes(self.files[path].now)
        elif step.kind == "rename":
            file = self.files[other] = self.files.pop(path)

            def rename(names: dict[str, File]) -> None:
                names.pop(path, None)
                names[other] = file

            self.pending.append((folder, rename))
        elif step.kind == "unlink":
            self.files.pop(path, None)
            self.pending.append((folder, lambda names: names.pop(path, None)))
        elif step.kind == "sync folder":
            for where, change in self.pending:
                if where == path:
                    change(self.safe_names)
            self.pending = [(where, change) for where, change in self.pending if where != path]

    def states(self) -> Iterator[dict[str, bytes]]:
        """The contents that a power cut may leave."""
        names = [dict(self.safe_names), dict(self.files)]
        if len(self.pending) > 1:
            partly = dict(self.safe_names)
            self.pending[-1][1](partly)
            names.append(partly)
        seen = []
        for files in names:
            for fate in (KEPT, CUT, GARBAGE):
                found = {path: file.after_cut(fate) for path, file in files.items()}
                if found not in seen:
                    seen.append(found)
                    yield found


def lay_out(target: Path, contents: dict[str, bytes], catalog: dict[str, bytes]) -> None:
    shutil.rmtree(target, ignore_errors=True)
    for folder in ("packs", "manifests", "tmp", "journal"):
        (target / folder).mkdir(parents=True)
    for name, data in {**contents, **catalog}.items():
        (target / name).parent.mkdir(exist_ok=True)
        (target / name).write_bytes(data)


def save_twice(registry: Registry, recorder: Recorder) -> None:
    for number in (3, 4):
        recorder.saved[save(registry, number)] = number


def save_and_alias(registry: Registry, recorder: Recorder) -> None:
    recorder.saved[save(registry, 3)] = 3
    registry.set_alias("net:v3", "good")
    registry.add_note("net:v1", "text")


def remove_and_collect(registry: Registry, recorder: Recorder) -> None:
    del recorder.saved["net:v2"]
    registry.remove(["net:v2"])
    registry.collect_garbage(grace=0)


@pytest.mark.parametrize("workload", [save_twice, save_and_alias, remove_and_collect])
def test_every_state_that_a_power_cut_can_leave_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workload: Callable[[Registry, Recorder], None]
) -> None:
    registry = Registry(tmp_path / "before")
    for number in (1, 2):
        save(registry, number)
    registry.catalog.close()
    root = copy(tmp_path / "before", tmp_path / "run")
    recorder = Recorder(root)
    recorder.saved = {"net:v1": 1, "net:v2": 2}
    with monkeypatch.context() as patch:
        patch.setattr(durable, "disk", recorder)
        registry = Registry(root)
        workload(registry, recorder)
        recorder.note("end", root / "tmp")
        registry.catalog.close()
    model = Model(tmp_path / "before")
    everything = {"net:v1": 1, "net:v2": 2, "net:v3": 3, "net:v4": 4}
    count = 0
    for step in recorder.steps:
        model.do(step)
        for contents in model.states():
            lay_out(tmp_path / "cut", contents, step.catalog)
            check_whole(tmp_path / "cut", step.saved, everything)
            count += 1
    assert count > 10


def test_the_model_of_the_disk_loses_what_was_not_synced(tmp_path: Path) -> None:
    model = Model(tmp_path)
    model.do(Step("write", "tmp/a", data=b"1234"))
    assert {"tmp/a": b""} in list(model.states())
    model.do(Step("rename", "tmp/a", other="packs/b"))
    assert {"packs/b": b"\xa5" * 4} in list(model.states())
    model.do(Step("sync", "packs/b"))
    assert list(model.states()) == [{}, {"packs/b": b"1234"}]
    model.do(Step("sync folder", "packs"))
    assert list(model.states()) == [{"packs/b": b"1234"}]
