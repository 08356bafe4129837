"""A bucket in processes that were forked: what its client cannot do there, a process of its own does for them.

The threads of obstore stay behind in the parent. A child that calls it waits for ever, so it asks a fresh interpreter, which
`python -m registry.remote.forked` runs, over two pipes. A message is a line of JSON and as many bytes as the line says.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

from registry.progress import Progress, silent
from registry.remote.bucket import Bucket, Denied, Held, Unreachable
from registry.remote.urls import parse
from registry.store import errors
from registry.store.errors import RegistryError, StorageError

_ERRORS: dict[str, type[RegistryError]] = {
    found.__name__: found
    for found in (Denied, Unreachable, *vars(errors).values())
    if isinstance(found, type) and issubclass(found, RegistryError)
}


class ForkSafe:
    """A bucket that also works behind a fork; a `registry.remote.bucket.Bucket`.

    Args:
        bucket: the bucket.
        is_usable: whether this process may use it.
    """

    def __init__(self, bucket: Bucket, is_usable: Callable[[], bool]) -> None:
        self._bucket = bucket
        self._is_usable = is_usable
        self._helpers: dict[int, _Helper] = {}

    def __repr__(self) -> str:
        return repr(self._bucket)

    @property
    def url(self) -> str:
        """Where it is."""
        return self._bucket.url

    def create(self, key: str, data: bytes) -> bool:
        """See `Bucket.create`."""
        return self._here.create(key, data)

    def put(self, key: str, data: bytes) -> None:
        """See `Bucket.put`."""
        self._here.put(key, data)

    def put_file(self, key: str, path: Path, progress: Progress = silent) -> None:
        """See `Bucket.put_file`."""
        self._here.put_file(key, path, progress)

    def get(self, key: str, limit: int) -> bytes | None:
        """See `Bucket.get`."""
        return self._here.get(key, limit)

    def get_range(self, key: str, start: int, size: int) -> bytes | None:
        """See `Bucket.get_range`."""
        return self._here.get_range(key, start, size)

    def head(self, key: str) -> Held | None:
        """See `Bucket.head`."""
        return self._here.head(key)

    def list(self, folder: str, after: str = "") -> Iterator[Held]:
        """See `Bucket.list`."""
        return self._here.list(folder, after)

    def delete(self, keys: Sequence[str]) -> None:
        """See `Bucket.delete`."""
        self._here.delete(keys)

    def uploads(self, older_than: float) -> Sequence[str] | None:
        """See `Bucket.uploads`."""
        return self._bucket.uploads(older_than)

    @property
    def _here(self) -> Bucket:
        if self._is_usable():
            return self._bucket
        # A child that was forked from a child has a helper of its own.
        return self._helpers.setdefault(os.getpid(), _Helper(self.url))


class _Helper:
    """A process that does for this one what a bucket is asked; a `registry.remote.bucket.Bucket`."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def create(self, key: str, data: bytes) -> bool:
        return bool(self._ask("create", [key], data)[0])

    def put(self, key: str, data: bytes) -> None:
        self._ask("put", [key], data)

    def put_file(self, key: str, path: Path, progress: Progress = silent) -> None:
        self._ask("put_file", [key, str(path)])

    def get(self, key: str, limit: int) -> bytes | None:
        found, data = self._ask("get", [key, limit])
        return None if found is None else data

    def get_range(self, key: str, start: int, size: int) -> bytes | None:
        found, data = self._ask("get_range", [key, start, size])
        return None if found is None else data

    def head(self, key: str) -> Held | None:
        found, _ = self._ask("head", [key])
        return None if found is None else Held(*found)

    def list(self, folder: str, after: str = "") -> Iterator[Held]:
        found, _ = self._ask("list", [folder, after])
        return (Held(*held) for held in found)

    def delete(self, keys: Sequence[str]) -> None:
        self._ask("delete", [[*keys]])

    def uploads(self, older_than: float) -> Sequence[str] | None:
        raise NotImplementedError

    def _ask(self, call: str, given: Sequence[Any], data: bytes = b"") -> tuple[Any, bytes]:
        """What a method of the bucket returns there: plain values, and bytes.

        Raises:
            RegistryError: as the method does.
            StorageError: if the process cannot be started, or ends.
        """
        with self._lock:
            process = self._process = self._process or self._started()
            answer = None
            try:
                # What is interrupted here, as by Ctrl-C, has no answer, either.
                with contextlib.suppress(OSError):
                    _send(cast(BinaryIO, process.stdin), {"call": call, "given": given}, data)
                    answer = _receive(cast(BinaryIO, process.stdout))
            finally:
                if answer is None:
                    self._process = None
                    process.kill()
        if answer is None:
            raise Unreachable(
                f"{self.url}: the process that uses the bucket for this one, which was forked, has ended",
                "repeat, or start worker processes with the method spawn",
            )
        document, found = answer
        if "error" in document:
            raise _ERRORS.get(document["error"], StorageError)(document["message"], *document["advice"])
        return document["value"], found

    def _started(self) -> subprocess.Popen[bytes]:
        words = [sys.executable, "-P", "-m", "registry.remote.forked", self.url]
        path = os.pathsep.join(os.path.abspath(one) for one in sys.path)
        try:
            return subprocess.Popen(
                words,
                env={**os.environ, "PYTHONPATH": path},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        except OSError as error:
            raise StorageError(
                f"{self.url}: this process was forked from one that uses the bucket, and cannot start another one to use it "
                f"({error.strerror})",
                "start it with the method spawn",
            ) from None


def _send(file: BinaryIO, document: dict[str, Any], data: bytes) -> None:
    file.write(json.dumps({**document, "size": len(data)}).encode() + b"\n")
    file.write(data)
    file.flush()


def _receive(file: BinaryIO) -> tuple[dict[str, Any], bytes] | None:
    """The next message; None if the other side has ended."""
    line = file.readline()
    if not line.endswith(b"\n"):
        return None
    document = json.loads(line)
    data = file.read(document.pop("size"))
    return document, data


def _serve(bucket: Bucket, requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer requests until there are no more."""
    while (request := _receive(requests)) is not None:
        document, data = request
        call, given = document["call"], document["given"]
        try:
            if call in ("create", "put"):
                given = [*given, data]
            elif call == "put_file":
                given = [given[0], Path(given[1])]
            value: Any = getattr(bucket, call)(*given)
            found = value if isinstance(value, bytes) else b""
            if isinstance(value, bytes):
                value = True
            elif call == "list":
                value = list(value)
            _send(answers, {"value": value}, found)
        except RegistryError as error:
            _send(answers, _told(error), b"")


def _told(error: RegistryError) -> dict[str, Any]:
    """An error as a document."""
    advice = [fix.told(fix.python) for fix in error.fixes]
    return {"error": type(error).__name__, "message": error.message, "advice": advice}


def main() -> None:
    """Serve the bucket whose URL is given, until the standard input ends."""
    # Lazy: loads obstore.
    from registry.remote.services import open_bucket

    # The process that asked may end at any moment, and a Ctrl-C is its own to handle.
    with contextlib.suppress(BrokenPipeError, KeyboardInterrupt):
        try:
            bucket = open_bucket(parse(sys.argv[1]))
        except RegistryError as error:
            _receive(sys.stdin.buffer)
            _send(sys.stdout.buffer, _told(error), b"")
            return
        _serve(bucket, sys.stdin.buffer, sys.stdout.buffer)


if __name__ == "__main__":
    main()
