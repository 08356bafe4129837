"""Power cuts: the system calls of a program, and the states of the disk that a cut between them can leave.

`record` runs a function in a child process under strace and gives the calls that change files, SQLite's among them.
A `Volume` follows them. It knows for each file what it holds and what was synced, and for each folder likewise which
names it has. `Volume.cut` then gives the contents of a disk after a cut: what was synced is there, and of everything
else what a file system happened to write.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from support import fork, wait

SECTOR = 512
"""Bytes that a disk writes whole or not at all."""

_TRACED = (
    "openat,open,creat,write,pwrite64,pwritev,pwritev2,writev,ftruncate,truncate,fallocate,fsync,fdatasync,"
    "rename,renameat,renameat2,unlink,unlinkat,rmdir,mkdir,mkdirat,link,linkat,symlink,symlinkat,"
    "close,dup,dup2,dup3,fcntl,lseek,mmap,copy_file_range,sendfile,io_uring_setup"
)
_CALL = re.compile(r"(\d+) +(\w+)\((.*)\) += (-?\d+)(?:<([^>]*)>)?")
_UNFINISHED = re.compile(r"(\d+) +(\w+)\((.*) <unfinished \.\.\.>")
_RESUMED = re.compile(r"(\d+) +<\.\.\. (\w+) resumed>(.*)")
_HEX = re.compile(r"(?:\\x[0-9a-f]{2})*\Z")
_SYNCS = ("fsync", "fdatasync")


class Call(NamedTuple):
    """One change, as the kernel was asked for it.

    Attributes:
        kind: create, write, truncate, extend, sync, rename, unlink, mkdir, map or said.
        path: relative to the recorded folder.
        other: the new path of a file that is renamed.
        offset: of what is written; -1 for the end of the file. A size where a file is cut or extended.
        data: what is written, or said.
        during: how many calls were noted between the beginning of a sync and its end.
    """

    kind: str
    path: str
    other: str = ""
    offset: int = 0
    data: bytes = b""
    during: int = 0


def record(base: Path, run: Callable[[Callable[[str, str], None]], None]) -> list[Call]:
    """Run a function in a child process and note what it changes below a folder.

    Args:
        run: is given a function that says something about a path. It becomes a call of the kind `said` in its place
            among the others.
    """
    base = base.resolve()
    told, trace = base.with_name(f"{base.name}.told"), base.with_name(f"{base.name}.trace")

    def child() -> None:
        ledger = os.open(told, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.kill(os.getpid(), signal.SIGSTOP)
        run(lambda path, text: _say(ledger, path, text))

    pid = fork(child)
    os.waitpid(pid, os.WUNTRACED)
    command = ["strace", "-f", "-y", "-xx", "-s", "1000000000", "-e", f"trace={_TRACED}", "-o", str(trace)]
    with subprocess.Popen([*command, "-p", str(pid)], stderr=subprocess.PIPE, text=True) as tracer:
        assert tracer.stderr is not None
        assert "attached" in tracer.stderr.readline()
        os.kill(pid, signal.SIGCONT)
        status = wait(pid)
        tracer.wait()
    assert status == 0, f"the recorded program ended with {status}"
    with trace.open() as lines:
        calls = list(_Reader(str(base), str(told)).read(lines))
    trace.unlink()
    told.unlink()
    return calls


def _say(ledger: int, path: str, text: str) -> None:
    os.write(ledger, f"{path}\t{text}".encode())


def parts(calls: list[Call]) -> dict[str, list[Call]]:
    """Calls by the first folder of their paths, with paths relative to it."""
    found: dict[str, list[Call]] = {}
    for call in calls:
        first, _, path = call.path.partition("/")
        if not first:  # A sync of the folder that holds them all.
            continue
        other = call.other.partition("/")[2]
        found.setdefault(first, []).append(call._replace(path=path, other=other))
    return found


@dataclass
class _Opened:
    """What a file descriptor refers to: the place of the next write; -1 for the end of the file."""

    position: int = 0


class _Reader:
    """Reads strace's text."""

    def __init__(self, base: str, told: str) -> None:
        self._base = base
        self._told = told
        self._opened: dict[int, _Opened] = {}
        self._pending: dict[str, tuple[str, int]] = {}
        self._count = 0

    def read(self, lines: Iterator[str]) -> Iterator[Call]:
        for line in lines:
            begun = self._count
            if match := _UNFINISHED.match(line):
                self._pending[match[1]] = (f"{match[1]} {match[2]}({match[3]}", begun)
                continue
            if match := _RESUMED.match(line):
                start, begun = self._pending.pop(match[1])
                line = start + match[3]
            match = _CALL.match(line)
            if match is None or int(match[4]) < 0:
                continue
            for call in self._call(match[2], _arguments(match[3]), int(match[4]), match[5], begun):
                self._count += 1
                yield call

    def _inside(self, path: str) -> str | None:
        """A path relative to the recorded folder, which itself is empty; None if it is elsewhere."""
        if path != self._base and not path.startswith(self._base + "/"):
            return None
        return path[len(self._base) + 1 :]

    def _of(self, descriptor: str) -> tuple[int, str]:
        """The number of a descriptor, and the path that it has now; empty if its file is gone."""
        number, _, rest = descriptor.partition("<")
        path, _, gone = rest.partition(">")
        return int(number) if number != "AT_FDCWD" else -1, "" if gone else _text(path)

    def _at(self, folder: str, name: str) -> str | None:
        path = os.path.join(self._of(folder)[1], _text(name.strip('"')))
        return self._inside(path)

    def _call(
        self, name: str, arguments: list[str], result: int, result_path: str | None, begun: int
    ) -> Iterator[Call]:
        if name in ("openat", "open", "creat"):
            yield from self._open(arguments[-2:] if name == "creat" else arguments, result, result_path)
        elif name == "close":
            self._opened.pop(self._of(arguments[0])[0], None)
        elif name in ("dup", "dup2", "dup3") or (name == "fcntl" and arguments[1].startswith("F_DUPFD")):
            self._opened[result] = self._opened.setdefault(self._of(arguments[0])[0], _Opened())
        elif name == "lseek":
            opened = self._opened.setdefault(self._of(arguments[0])[0], _Opened())
            if opened.position >= 0:
                opened.position = result
        elif name in ("write", "pwrite64"):
            yield from self._write(name, arguments, result)
        elif name in _SYNCS:
            path = self._inside(self._of(arguments[0])[1])
            if path is not None:
                yield Call("sync", path, during=self._count - begun)
        elif name == "ftruncate":
            path = self._inside(self._of(arguments[0])[1])
            if path is not None:
                yield Call("truncate", path, offset=int(arguments[1]))
        elif name == "fallocate":
            path = self._inside(self._of(arguments[0])[1])
            if path is not None:
                assert arguments[1] == "0", f"unknown mode of fallocate: {arguments[1]}"
                yield Call("extend", path, offset=int(arguments[2]) + int(arguments[3]))
        elif name in ("rename", "renameat", "renameat2"):
            names = (
                ["AT_FDCWD<>", arguments[0], "AT_FDCWD<>", arguments[1]] if name == "rename" else arguments
            )
            source, target = self._at(names[0], names[1]), self._at(names[2], names[3])
            if source is not None or target is not None:
                assert source is not None
                assert target is not None
                yield Call("rename", source, target)
        elif name in ("unlink", "unlinkat", "rmdir"):
            names = arguments if name == "unlinkat" else ["AT_FDCWD<>", arguments[0]]
            path = self._at(names[0], names[1])
            if path is not None:
                yield Call("unlink", path)
        elif name in ("mkdir", "mkdirat"):
            names = arguments if name == "mkdirat" else ["AT_FDCWD<>", arguments[0]]
            path = self._at(names[0], names[1])
            if path is not None:
                yield Call("mkdir", path)
        elif name == "mmap":
            shared = "PROT_WRITE" in arguments[2] and "MAP_SHARED" in arguments[3] and "<" in arguments[4]
            path = self._inside(self._of(arguments[4])[1]) if shared else None
            if path is not None:
                yield Call("map", path)
        else:
            touched = [argument for argument in arguments if self._touches(argument)]
            assert not touched or name == "fcntl", f"a call that is not understood: {name}({arguments})"

    def _touches(self, argument: str) -> bool:
        text = argument.partition("<")[2].rstrip(">") if "<" in argument else argument.strip('"')
        return bool(_HEX.match(text)) and bool(self._inside(_text(text)))

    def _open(self, arguments: list[str], result: int, result_path: str | None) -> Iterator[Call]:
        flags = next(argument for argument in arguments if argument.startswith("O_"))
        self._opened[result] = _Opened(-1 if "O_APPEND" in flags else 0)
        path = self._inside(_text(result_path or ""))
        if path is not None and "O_TMPFILE" not in flags and "O_DIRECTORY" not in flags:
            if "O_CREAT" in flags:
                yield Call("create", path)
            if "O_TRUNC" in flags:
                yield Call("truncate", path)

    def _write(self, name: str, arguments: list[str], result: int) -> Iterator[Call]:
        number, full = self._of(arguments[0])
        path = self._inside(full)
        if path is None and full != self._told:
            return
        data = _bytes(arguments[1].strip('"'))[:result]
        if path is None:
            about, _, text = data.partition(b"\t")
            yield Call("said", about.decode(), data=text)
            return
        if name == "pwrite64":
            yield Call("write", path, offset=int(arguments[3]), data=data)
            return
        opened = self._opened.setdefault(number, _Opened())
        yield Call("write", path, offset=opened.position, data=data)
        if opened.position >= 0:
            opened.position += result


def _arguments(text: str) -> list[str]:
    """The arguments of a call; every string in them is written in hexadecimal digits, so none has a comma."""
    return text.split(", ")


def _bytes(text: str) -> bytes:
    return bytes.fromhex(text.replace("\\x", ""))


def _text(text: str) -> str:
    return os.fsdecode(_bytes(text)) if text.startswith("\\x") else text


# -- the disk ------------------------------------------------------------------------------------------------


class Change(NamedTuple):
    """Bytes written to a file at some time, or, without data, another size of it."""

    time: int
    offset: int
    data: bytes | None = None


@dataclass
class File:
    """A file: what a cut cannot take of it, and what has changed since.

    Attributes:
        is_mapped: whether a program has it mapped and changes it without a call.
    """

    safe: bytes = b""
    changes: list[Change] = field(default_factory=list)
    is_mapped: bool = False

    @property
    def now(self) -> bytes:
        return _applied(self.safe, self.changes)

    @property
    def size(self) -> int:
        return _sizes(len(self.safe), self.changes)[-1]


@dataclass
class Folder:
    """A folder: the names that a cut cannot take, and at what times which names have changed since."""

    safe: dict[str, File | Folder] = field(default_factory=dict)
    now: dict[str, File | Folder] = field(default_factory=dict)
    changes: list[tuple[int, str, File | Folder | None]] = field(default_factory=list)

    def set(self, time: int, name: str, node: File | Folder | None) -> None:
        self.changes.append((time, name, node))
        if node is None:
            self.now.pop(name, None)
        else:
            self.now[name] = node


@dataclass
class Image:
    """The contents of a disk: the bytes of files, and folders, by their paths."""

    files: dict[str, bytes] = field(default_factory=dict)
    folders: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, base: Path) -> Image:
        """The contents that a folder has."""
        paths = sorted(base.rglob("*"))
        files = {str(path.relative_to(base)): path.read_bytes() for path in paths if path.is_file()}
        return cls(files, [str(path.relative_to(base)) for path in paths if path.is_dir()])

    def lay_out(self, target: Path) -> None:
        """Make a folder that has these contents and no others."""
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for path in self.folders:
            (target / path).mkdir()
        for path, data in self.files.items():
            (target / path).write_bytes(data)

    def digest(self) -> str:
        hasher = hashlib.blake2b("\n".join(sorted(self.folders)).encode(), digest_size=16)
        for path, data in sorted(self.files.items()):
            hasher.update(f"\n{path} {len(data)}\n".encode())
            hasher.update(data)
        return hasher.hexdigest()


KEPT, LOST = "kept", "lost"
_FATES = (KEPT, LOST, "first", "torn", "zeros", "garbage")


class Volume:
    """A file system: data is safe after a sync of the file, a name after a sync of its folder, and nothing else is.

    Args:
        image: contents that are safe.
    """

    def __init__(self, image: Image | None = None) -> None:
        self.root = Folder()
        self._time = 0
        self._committed = 0
        for path in image.folders if image else ():
            folder, name = self._place(path)
            folder.safe[name] = folder.now[name] = Folder()
        for path, data in image.files.items() if image else ():
            folder, name = self._place(path)
            folder.safe[name] = folder.now[name] = File(data)

    def do(self, call: Call) -> None:
        """Follow one call."""
        self._time += 1
        folder, name = self._place(call.path)
        if call.kind == "create":
            if name not in folder.now:
                folder.set(self._time, name, File())
        elif call.kind == "mkdir":
            folder.set(self._time, name, Folder())
        elif call.kind == "unlink":
            folder.set(self._time, name, None)
        elif call.kind == "rename":
            target, other = self._place(call.other)
            target.set(self._time, other, folder.now[name])
            folder.set(self._time, name, None)
        elif call.kind == "sync":
            self._sync(call)
        elif call.kind != "said":
            file = folder.now[name]
            assert isinstance(file, File)
            if call.kind == "map":
                file.is_mapped = True
            elif call.kind == "write":
                offset = file.size if call.offset < 0 else call.offset
                file.changes.append(Change(self._time, offset, call.data))
            elif call.kind == "truncate" or call.offset > file.size:
                file.changes.append(Change(self._time, call.offset))

    def _sync(self, call: Call) -> None:
        """Make safe what was changed before the sync began."""
        node = self._find(call.path)
        began = self._time - 1 - call.during
        count = sum(change[0] <= began for change in node.changes)
        if isinstance(node, Folder):
            for _, name, found in node.changes[:count]:
                _put(node.safe, name, found)
        else:
            node.safe = _applied(node.safe, node.changes[:count])
        del node.changes[:count]
        self._committed = max(self._committed, began)

    def _find(self, path: str) -> File | Folder:
        node: File | Folder = self.root
        for part in path.split("/") if path else ():
            assert isinstance(node, Folder)
            node = node.now[part]
        return node

    def _place(self, path: str) -> tuple[Folder, str]:
        head, _, name = path.rpartition("/")
        folder = self._find(head)
        assert isinstance(folder, Folder)
        return folder, name

    # -- states ----------------------------------------------------------------------------------------------

    def image(self, names: str, data: str) -> Image:
        """The state in which all that is not safe was kept or was lost.

        Args:
            names, data: what became of changes of names, and of the contents of files.
        """
        return _image(
            self.root,
            lambda folder: folder.now if names == KEPT else folder.safe,
            lambda file: file.now if data == KEPT else file.safe,
        )

    def cut(self, chance: random.Random) -> Image:
        """A state that a power cut may leave, drawn by chance."""
        order = chance.choice(("at once", "by folder", "by name"))
        time = chance.randint(self._committed, self._time)
        fates = chance.choices(_FATES, [chance.random() for _ in _FATES], k=16)

        def names(folder: Folder) -> dict[str, File | Folder]:
            if order == "by name":
                return _some_names(folder, chance)
            until = time if order == "at once" else chance.randint(0, self._time)
            return _names_at(folder, until)

        return _image(self.root, names, lambda file: torn(file, chance.choice(fates), chance))

    def is_safe(self) -> bool:
        """Whether a power cut would take nothing."""
        return self.image(LOST, LOST).digest() == self.image(KEPT, KEPT).digest()


def _image(
    root: Folder, names: Callable[[Folder], dict[str, File | Folder]], data: Callable[[File], bytes]
) -> Image:
    image = Image()
    known: dict[int, bytes] = {}

    def walk(folder: Folder, path: str) -> None:
        for name, node in names(folder).items():
            if isinstance(node, Folder):
                image.folders.append(path + name)
                walk(node, f"{path}{name}/")
            else:
                if id(node) not in known:  # A file that has two names has one content.
                    known[id(node)] = data(node)
                image.files[path + name] = known[id(node)]

    walk(root, "")
    return image


def _names_at(folder: Folder, until: int) -> dict[str, File | Folder]:
    """The names of a folder if what was done up to a time reached the disk."""
    found = dict(folder.safe)
    for time, name, node in folder.changes:
        if time <= until:
            _put(found, name, node)
    return found


def _some_names(folder: Folder, chance: random.Random) -> dict[str, File | Folder]:
    """The names of a folder if for each of them on its own some of what was done reached the disk."""
    found = dict(folder.safe)
    for name in {name: None for _, name, _ in folder.changes}:
        history = [node for _, changed, node in folder.changes if changed == name]
        seen = chance.randint(0, len(history))
        if seen:
            _put(found, name, history[seen - 1])
    return found


def _put(names: dict[str, File | Folder], name: str, node: File | Folder | None) -> None:
    if node is None:
        names.pop(name, None)
    else:
        names[name] = node


def _applied(safe: bytes, changes: list[Change]) -> bytes:
    content = bytearray(safe)
    for change in changes:
        if change.data is None:
            del content[change.offset :]
            content.extend(bytes(change.offset - len(content)))
        else:
            content.extend(bytes(max(0, change.offset - len(content))))
            content[change.offset : change.offset + len(change.data)] = change.data
    return bytes(content)


def _sizes(size: int, changes: list[Change]) -> list[int]:
    """The sizes that a file had, before the changes and after each."""
    sizes = [size]
    for change in changes:
        end = change.offset if change.data is None else max(size, change.offset + len(change.data))
        sizes.append(size := end)
    return sizes


def torn(file: File, fate: str, chance: random.Random) -> bytes:
    """What a file may hold after a power cut.

    Args:
        fate: what became of what was not synced: it was kept, was lost, the first of it was kept, each sector was kept or
            not on its own; or the size is the new one, and what was added holds zeros or garbage.
    """
    if file.is_mapped:
        return _scribbled(file, chance)
    if not file.changes or fate == LOST:
        return file.safe
    if fate == KEPT:
        return file.now
    if fate == "first":
        return _applied(file.safe, file.changes[: chance.randint(0, len(file.changes))])
    sizes = _sizes(len(file.safe), file.changes)
    size = chance.choice(sizes)
    if chance.random() < 0.3:
        size = max(min(sizes), chance.randint(min(sizes), max(sizes)) // SECTOR * SECTOR)
    if fate != "torn":
        size, seen = max(sizes), 0
    content = bytearray(max(*sizes, size))
    content[: len(file.safe)] = file.safe
    written = bytearray(len(content))
    written[: len(file.safe)] = b"\x01" * len(file.safe)
    share = chance.random()
    until: dict[int, int] = {}
    for i, change in enumerate(file.changes):
        if change.data is None:
            continue
        for start, end in _sectors(change.offset, change.offset + len(change.data)):
            sector = start // SECTOR
            if sector not in until:
                is_kept = fate == "torn" and chance.random() < share
                until[sector] = chance.randint(1, len(file.changes)) if is_kept else 0
                if is_kept and chance.random() < 0.5:
                    until[sector] = len(file.changes)
            seen = until[sector]
            if i < seen:
                content[start:end] = change.data[start - change.offset : end - change.offset]
                written[start:end] = b"\x01" * (end - start)
    garbage = fate == "garbage" or (fate == "torn" and chance.random() < 0.3)
    for start, end in _sectors(0, len(content)):
        if garbage and not any(written[start:end]):
            content[start:end] = junk(end - start, chance)
    return bytes(content[:size])


def junk(size: int, chance: random.Random) -> bytes:
    """What lies on a disk where nothing of ours was written."""
    kind = chance.randrange(3)
    return b"\xa5" * size if kind == 0 else b"\xff" * size if kind == 1 else chance.randbytes(size)


def _scribbled(file: File, chance: random.Random) -> bytes:
    """A file that was mapped: any part of it may have reached the disk, or not."""
    size = chance.choice((0, len(file.safe), file.size))
    content = bytearray(file.now.ljust(size, b"\0")[:size])
    for start, end in _sectors(0, size):
        if chance.random() < 0.5:
            content[start:end] = chance.choice((bytes(end - start), junk(end - start, chance)))
    return bytes(content)


def _sectors(start: int, end: int) -> Iterator[tuple[int, int]]:
    while start < end:
        stop = min(end, (start // SECTOR + 1) * SECTOR)
        yield start, stop
        start = stop
