"""The cache decorator: a result is computed once, and found again by all that it depends on."""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Generic, Literal, ParamSpec, TypeVar, cast

from filelock import FileLock, Timeout

from registry.cache.artifacts import Artifact, Artifacts
from registry.cache.keys import Key, Keys
from registry.cache.results import pack, unpack
from registry.home import SETTINGS, Home, default_root
from registry.store.durable import make_folder
from registry.store.errors import Corrupt, Invalid, NotFound, StorageError, storage_errors

P = ParamSpec("P")
R = TypeVar("R")
LOCKS = "locks"
_POLL_SECONDS = 0.05

_logger = logging.getLogger(__name__)
_homes: dict[str, Home] = {}
_used: dict[str, dict[str, None]] = {}
"""Ids of artifacts that this process has made or loaded, by the registry's folder."""


def cached(
    function: Callable[P, R] | None = None,
    *,
    key: Sequence[str] | None = None,
    files: Sequence[str] | None = None,
    version: str | int | None = None,
    code: bool = False,
    verify: bool | Literal["once"] = "once",
    registry: Home | Path | str | None = None,
) -> Any:
    """Keep the results of a function in a registry, and load them while nothing that they depend on has changed.

        class LoadData:
            @cached(key=["max_len"])
            def data_process(self, file_path): ...

    The result depends on the function's qualified name, `version`, the parameters in `key`, and the content of `files`;
    on nothing else, not on global variables or other functions. A hit maps the stored result without copying it;
    writing to it changes neither the store nor the next hit.

    Args:
        key: names of parameters, or of attributes of `self` (`config.max_len` too); every parameter but `self` unless
            given.
        files: names of parameters that are paths of files or folders, whose content counts and not their name; those
            called `..._path` or annotated as `Path` unless given.
        version: change it when the function computes something else.
        code: the function's own source counts too.
        verify: check every byte of a hit against its digest: `True` always, `False` never, `once` the first time, and
            again if the size, the times or the inode of a file in the registry changed since.
        registry: the registry or its folder; the default one at the time of the call unless given.

    Returns:
        The decorator, or the function if it is given. The decorated function has `artifact(...)`, which gives the
        `Artifact` for the arguments of a call, computed if need be, and `key(...)`, the digest of its key.

    Raises:
        Invalid: if a name is no parameter of the function.
    """

    def decorate(target: Any) -> Any:
        if isinstance(target, staticmethod | classmethod):
            return type(target)(decorate(target.__func__))
        if not callable(target):
            raise Invalid(f"{target!r} is not a function", "put @cached(...) above one")
        keys = Keys(target, key=key, files=files, version=version, code=code)
        return _Cached(target, keys, version=version, verify=verify, registry=registry).wrapper()

    return decorate if function is None else decorate(function)


def used_artifacts(root: Path) -> list[str]:
    """Ids of the artifacts of a registry that this process has made or loaded, in order."""
    return list(_used.get(str(root.absolute()), ()))


class _Cached(Generic[P, R]):
    """One decorated function."""

    def __init__(
        self,
        function: Callable[P, R],
        keys: Keys,
        version: str | int | None,
        verify: bool | Literal["once"],
        registry: Home | Path | str | None,
    ) -> None:
        self._function = function
        self._keys = keys
        self._version = version
        self._verify = verify
        self._given = registry

    def wrapper(self) -> Callable[P, R]:
        if inspect.iscoroutinefunction(self._function):

            @functools.wraps(self._function)
            async def call_async(*args: P.args, **kwargs: P.kwargs) -> Any:
                return await self._call_async(args, kwargs)

            wrapper: Any = call_async
        else:

            @functools.wraps(self._function)
            def call(*args: P.args, **kwargs: P.kwargs) -> R:
                return cast(R, self._call(args, kwargs)[0])

            wrapper = call
        wrapper.artifact = self._artifact
        wrapper.key = lambda *args, **kwargs: self._keys.key(args, kwargs, self._home().root).digest
        return cast("Callable[P, R]", wrapper)

    def _home(self) -> Home:
        if isinstance(self._given, Home):
            return self._given
        return _opened(str(self._given) if self._given is not None else default_root())

    def _artifact(self, *args: Any, **kwargs: Any) -> Artifact:
        if inspect.iscoroutinefunction(self._function):
            # In a thread of its own, as a loop may run in this one, such as in a notebook.
            with ThreadPoolExecutor(1, "registry-cache") as pool:
                _, key = pool.submit(asyncio.run, self._call_async(args, kwargs, with_key=True)).result()
        else:
            _, key = self._call(args, kwargs)
        return Artifacts(self._home())[key.digest]

    def _call(self, args: Any, kwargs: Any) -> tuple[Any, Key]:
        home = self._home()
        key = self._keys.key(args, kwargs, home.root)
        found = self._find(home, key)
        if found:
            return found[0], key
        lock = self._lock(home, key)
        if lock and not _try(lock):
            _logger.info("cache %s: another process computes it; waiting", key.function)
            lock.acquire()
        try:
            found = self._find(home, key)
            if found:
                return found[0], key
            began = time.perf_counter()
            result = self._function(*args, **kwargs)
            self._keep(home, key, result, seconds=time.perf_counter() - began)
            return result, key
        finally:
            if lock:
                lock.release()

    async def _call_async(self, args: Any, kwargs: Any, with_key: bool = False) -> Any:
        home = self._home()
        key = await asyncio.to_thread(self._keys.key, args, kwargs, home.root)
        found = await asyncio.to_thread(self._find, home, key)
        if not found:
            lock = self._lock(home, key)
            while lock and not _try(lock):
                await asyncio.sleep(_POLL_SECONDS)
            try:
                found = await asyncio.to_thread(self._find, home, key)
                if not found:
                    began = time.perf_counter()
                    result = await cast(Any, self._function(*args, **kwargs))
                    seconds = time.perf_counter() - began
                    await asyncio.to_thread(self._keep, home, key, result, seconds)
                    found = (result,)
            finally:
                if lock:
                    lock.release()
        return (found[0], key) if with_key else found[0]

    def _find(self, home: Home, key: Key) -> tuple[Any] | None:
        """The stored result, if there is one and it is whole."""
        began = time.perf_counter()
        artifacts = Artifacts(home)
        artifact_id = artifacts.id_for(key.digest)
        if artifact_id is None:
            return None
        try:
            result = unpack(artifacts.load(artifact_id, verify=self._verify))
        except (Corrupt, NotFound) as error:
            if artifacts.id_for(key.digest) == artifact_id:
                _logger.warning("cache %s: %s; it is computed again", key.function, error)
            return None
        self._note(home, artifact_id)
        _logger.info("cache hit %s: loaded in %.3f s", key.function, time.perf_counter() - began)
        return (result,)

    def _keep(self, home: Home, key: Key, result: Any, seconds: float) -> None:
        if not key.is_unchanged():
            _logger.warning("cache %s: a file changed meanwhile; the result is not kept", key.function)
            return
        try:
            tree = pack(result)
            artifact_id = Artifacts(home).put(key, tree, version=self._version, seconds=seconds)
        except StorageError as error:
            _logger.warning("cache %s: the result is not kept: %s", key.function, error)
            return
        self._note(home, artifact_id)
        _logger.info("cache miss %s: processed in %.3f s", key.function, seconds)

    @staticmethod
    def _note(home: Home, artifact_id: str) -> None:
        """Note that this process has used an artifact."""
        _used.setdefault(str(home.root.absolute()), {})[artifact_id] = None

    @staticmethod
    def _lock(home: Home, key: Key) -> FileLock | None:
        """A lock that the system takes back from a process that has ended; None where nothing can be written."""
        folder = home.root / LOCKS
        try:
            with storage_errors(folder):
                make_folder(folder, inner=1)
        except (StorageError, Corrupt):
            return None
        return FileLock(folder / f"{key.digest}.lock", thread_local=False)


def _try(lock: FileLock) -> bool:
    """Take a lock if it is free; returns whether it was."""
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return False
    return True


def _opened(root: str) -> Home:
    """The registry at a place, opened once, as opening the catalog takes longer than a small hit."""
    where = root if "://" in root else os.path.abspath(root)
    if where not in _homes or not (_homes[where].root / SETTINGS).is_file():
        _homes[where] = Home(root)
    return _homes[where]
