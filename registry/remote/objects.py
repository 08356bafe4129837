"""Buckets of object stores through obstore: what is the same for all services.

obstore's threads do not outlive a fork: once used, every call in a forked child waits for ever. So a child is refused, and
`registry.remote.forked` helps it.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, Protocol
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)

from registry.progress import Progress, silent
from registry.remote.bucket import Denied, Held, Unreachable, check_key, too_large
from registry.store.errors import Invalid, NotFound, StorageError, storage_errors
from registry.store.places import open_regular
from registry.store.text import printable

if TYPE_CHECKING:
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

    from registry.remote.urls import Address

_PART = 16 << 20
_MOST_PARTS = 9_000
_AT_ONCE = 4
_TIMEOUT = "10s"
"""For an answer to begin. An upload gets one for each part."""
_UPLOAD_TIMEOUT = "300s"
_RETRIES: RetryConfig = {"max_retries": 3, "retry_timeout": datetime.timedelta(seconds=20)}
_REASON = re.compile(r"(?:<Code>|\(code: )([A-Za-z]{1,64}|403)[<)]")
_SKEWED = "RequestTimeTooSkewed"
_STATUS = re.compile(r"status code: ([0-9]{3})")
_NO_TOKEN = re.compile(r"token request: .*status code: (4[0-9]{2})")
"""How an error begins if the server that gives tokens for keys refuses them."""
_LOOPBACK = ("127.0.0.1", "localhost", "::1")

_used_by: int | None = None
"""State of the process: its own number, once it has used obstore."""


class Forked(StorageError):
    """This process was forked from one that uses a bucket, and cannot use it itself."""


class Service(NamedTuple):
    """What a service calls things.

    Attributes:
        bucket: its word for a bucket.
        no_bucket: the code of its answer if there is none.
        keys: the variables that give keys, for a message.
        keys_refused: codes of its answers to keys that it does not take.
        rights: those that it takes to `get`, `list`, `put` and `delete` objects.
        endpoint: the variable that says where it is.
        allow_http: the variable that allows an endpoint without TLS.
    """

    bucket: str
    no_bucket: str
    keys: str
    keys_refused: Collection[str]
    rights: Mapping[str, str]
    endpoint: str
    allow_http: str


class Opener(Protocol):
    """Makes a client of a bucket."""

    def __call__(self, *, client_options: ClientConfig, retry_config: RetryConfig) -> ObjectStore:
        """Make it; it asks nothing of the network."""
        ...


class ObjectBucket:
    """A bucket of an object store; a `registry.remote.bucket.Bucket`. A subclass for each service opens it by its address.

    Args:
        address: where it is.
        service: what the service calls things.
        endpoint: where the service is; empty for the service's own place.
        opener: makes a client, with keys of the environment.

    Raises:
        Invalid: if the keys are malformed, or the endpoint is not one to send them to.
    """

    def __init__(self, address: Address, service: Service, endpoint: str, opener: Opener) -> None:
        self._address, self._service, self._endpoint = address, service, endpoint
        allow_http = _allows_http(endpoint, service)

        def store(timeout: str) -> ObjectStore:
            options: ClientConfig = {
                "allow_http": allow_http,
                "timeout": timeout,
                "connect_timeout": "5s",
            }
            try:
                return opener(client_options=options, retry_config=_RETRIES)
            except (BaseError, ValueError):
                # What it says may repeat a part of the keys.
                raise Invalid(
                    f"{address}: keys or endpoint in the environment are malformed, or a file of keys cannot be read",
                    f"check {service.keys}",
                ) from None

        self._store, self._uploads = store(_TIMEOUT), store(_UPLOAD_TIMEOUT)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    def __reduce__(self) -> tuple[type[ObjectBucket], tuple[Address]]:
        return type(self), (self._address,)

    @property
    def url(self) -> str:
        """Where it is."""
        return str(self._address)

    def create(self, key: str, data: bytes) -> bool:
        """Make an object if there is none of this key; False where it is not known."""
        with self._errors(key, "put"):
            try:
                obstore.put(self._store, check_key(key), data, mode="create", use_multipart=False)
            except (AlreadyExistsError, PreconditionError):
                return False
            except BaseError as error:
                if isinstance(error, FileNotFoundError) or self._is_refused(error):
                    raise
                # The answer may be lost, or the store asks to repeat (409).
                return False
            return True

    def put(self, key: str, data: bytes) -> None:
        """Put a small object in the place of one that has the key."""
        with self._errors(key, "put"):
            obstore.put(self._store, check_key(key), data, use_multipart=False)

    def put_file(self, key: str, path: Path, progress: Progress = silent) -> None:
        """Upload a file in parts, in the place of an object that has the key."""
        check_key(key)
        with storage_errors(path), open_regular(path) as opened:
            size = os.fstat(opened.fileno()).st_size
            part = part_size(size)
            with os.fdopen(os.dup(opened.fileno()), "rb") as file, self._errors(key, "put"):
                obstore.put(
                    self._uploads,
                    key,
                    _told(file, size, part, progress),
                    use_multipart=size > _PART,
                    chunk_size=part,
                    max_concurrency=_AT_ONCE,
                )

    def get(self, key: str, limit: int) -> bytes | None:
        """An object's bytes; None if it is not there."""
        with self._errors(key, "get"):
            try:
                found = obstore.get(self._store, check_key(key))
            except FileNotFoundError as error:
                self._check_bucket(error)
                return None
            if found.meta["size"] > limit:
                raise too_large(self.url, key, limit)
            return bytes(found.bytes())

    def get_range(self, key: str, start: int, size: int) -> bytes | None:
        """Bytes of an object; None if it is not there."""
        with self._errors(key, "get"):
            try:
                end = start + size
                found = obstore.get(self._store, check_key(key), options={"range": (start, end)})
                return bytes(found.bytes())
            except FileNotFoundError as error:
                self._check_bucket(error)
                return None
            except BaseError as error:
                if _reason(error) == "InvalidRange":
                    return b""
                raise

    def head(self, key: str) -> Held | None:
        """An object's size and age; None if it is not there."""
        with self._errors(key, "get"):
            try:
                meta = obstore.head(self._store, check_key(key))
            except FileNotFoundError as error:
                self._check_bucket(error)
                return None
            return Held(key, meta["size"], meta["last_modified"].timestamp())

    def list(self, folder: str, after: str = "") -> Iterator[Held]:
        """The objects below a folder that come behind `after`, sorted by key."""
        with self._errors(folder, "list"):
            for batch in obstore.list(self._store, check_key(folder), offset=after or None, chunk_size=1000):
                for meta in batch:
                    yield Held(meta["path"], meta["size"], meta["last_modified"].timestamp())

    def delete(self, keys: Sequence[str]) -> None:
        """Delete objects; one that is not there is fine."""
        if not keys:
            return
        with self._errors(keys[0], "delete"):
            try:
                obstore.delete(self._store, [check_key(key) for key in keys])
            except FileNotFoundError as error:
                self._check_bucket(error)
                # S3 does not mind. Elsewhere one that is not there may have ended it before the others were deleted.
                for key in keys:
                    with contextlib.suppress(FileNotFoundError):
                        obstore.delete(self._store, key)

    def uploads(self, older_than: float) -> None:
        """obstore cannot list unfinished uploads; a lifecycle rule of the bucket ends them."""
        return

    def _check_bucket(self, error: Exception) -> None:
        """Tell an object that is not there from a bucket that is not there.

        Raises:
            NotFound: if it is the bucket.
        """
        if self._service.no_bucket in str(error):
            raise NotFound(
                f"{self.url}: there is no {self._service.bucket} {self._address.bucket}",
                "make it, or correct the URL",
            ) from None

    @contextlib.contextmanager
    def _errors(self, key: str, right: str) -> Iterator[None]:
        global _used_by
        if not is_usable():
            raise Forked(
                f"{self.url}: this process was forked from one that uses the bucket already",
                "start it with the method spawn or forkserver",
            )
        _used_by = os.getpid()
        try:
            yield
        except FileNotFoundError as error:
            self._check_bucket(error)
            raise NotFound(f"{self.url}/{key}: is not there") from None
        except BaseError as error:
            self._check_bucket(error)
            if self._is_refused(error):
                problem, *advice = self._refusal(_reason(error), right)
                raise Denied(f"{self.url}/{key}: {problem}", *advice) from None
            at = f" at {self._endpoint}" if self._endpoint else ""
            raise Unreachable(
                f"{self.url}: the store{at} does not answer ({_reason(error)})", "repeat"
            ) from None

    def _is_refused(self, error: BaseError) -> bool:
        """Whether the store has answered that it does not do this for these keys."""
        if isinstance(error, PermissionDeniedError | UnauthenticatedError):
            return True
        # Some of this comes as a malformed request (400), and in the text alone.
        reason = _reason(error)
        status = _STATUS.search(str(error))
        return (
            reason in (*self._service.keys_refused, _SKEWED, "403")
            or reason.startswith("no token")
            or "AccessDenied" in str(error)
            or (status is not None and status[1] in ("401", "403"))
        )

    def _refusal(self, reason: str, right: str) -> Sequence[str]:
        """Why the store refuses, and what to do, if that is known.

        Args:
            right: what the request needs.
        """
        if reason in self._service.keys_refused or reason.startswith("no token"):
            return f"the store does not take these keys ({reason})", f"check {self._service.keys}"
        if reason == _SKEWED:
            return f"this computer's clock is wrong ({reason})", "set it"
        return (f"these keys lack the right {self._service.rights[right]} ({reason})",)


def part_size(size: int) -> int:
    """Bytes of each part of an upload of so many: a store takes 10,000 parts at most."""
    return max(_PART, -(-size // _MOST_PARTS))


def is_usable() -> bool:
    """Whether this process may use obstore: it was not forked from one that has."""
    return _used_by in (None, os.getpid())


def _told(file: BinaryIO, size: int, part: int, progress: Progress) -> Iterator[bytes]:
    """A file in parts, whose progress is told."""
    done = 0
    progress(0, size)
    while data := file.read(part):
        yield data
        done += len(data)
        progress(done, size)


def _reason(error: Exception) -> str:
    """What a store or the network answered, in few words; nothing that was sent is repeated."""
    text = str(error)
    if match := _NO_TOKEN.search(text):
        return f"no token, {match[1]}"
    if match := _REASON.search(text):
        return match[1]
    if match := _STATUS.search(text):
        return f"status {match[1]}"
    for sign, reason in (
        ("timed out", "time is up"),
        ("dns error", "its name is not known"),
        ("Connection refused", "connection refused"),
        ("onnect", "no connection"),
        ("reset", "connection reset"),
    ):
        if sign in text:
            return reason
    return printable(type(error).__name__)


def _allows_http(endpoint: str, service: Service) -> bool:
    """Whether an endpoint without TLS may be used.

    Raises:
        Invalid: if it would send what is asked of it over a network in the open, or is no endpoint. It is not repeated in
            the message, as it may hold a password.
    """
    if not endpoint:
        return False
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
        raise Invalid(
            f"the endpoint in {service.endpoint}, or in the profile, is malformed; expected https://HOST or "
            "https://HOST:PORT, without keys"
        )
    if parts.scheme == "https":
        return False
    if parts.hostname in _LOOPBACK or os.environ.get(service.allow_http, "").lower() == "true":
        return True
    raise Invalid(
        f"the endpoint {parts.hostname} has no TLS",
        f"use https://, or set {service.allow_http}=true if you mean it",
    )
