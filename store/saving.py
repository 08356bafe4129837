"""The save pipeline: hash, look up, write.

A thread hashes tensors ahead of the writer (BLAKE3 releases the GIL). The writer starts once it holds enough
new tensors, so that a small save gets an exactly sized header and an unchanged one writes no pack at all.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Collection, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from registry.store.digest import tensor_digest
from registry.store.manifest import TensorInfo
from registry.store.pack import PackInfo, PackWriter
from registry.store.tree import Leaf

START_WRITING = 32 << 20
COPIES_IN_FLIGHT = 32 << 20
"""Bytes of host copies (of device tensors and views that are not contiguous) that may wait for the writer."""


@dataclass(slots=True)
class State:
    """Encoded components, ready to be put: the trees' documents and their distinct tensors."""

    components: dict[str, Any]
    leaves: list[Leaf]
    digests: list[str | None] = field(init=False)

    def __post_init__(self) -> None:
        self.digests = [None] * len(self.leaves)

    def tensors(self) -> list[TensorInfo]:
        """What the manifest lists; every digest must be known."""
        pairs = zip(self.leaves, self.digests, strict=True)
        return [TensorInfo(leaf.dtype, leaf.shape, digest or "") for leaf, digest in pairs]


class Known(Protocol):
    def __call__(self, digests: Collection[str]) -> Collection[str]:
        """Those of the digests whose tensors are stored and intact."""
        ...


def write_new(
    state: State, known: Known, tmp: Path, packs: Path, progress: Callable[[int, int], None]
) -> PackInfo | None:
    """Hash a state's tensors and write those that are not known into one pack.

    Returns:
        The published pack, or None if every tensor was known. Fills in `state.digests`.
    """
    writer: PackWriter | None = None
    pending: list[_Hashed] = []
    waiting = done = 0
    total = sum(leaf.size for leaf in state.leaves)
    seen: set[str] = set()
    hashing = _Hashing(state)
    try:
        with contextlib.closing(hashing.batches()) as batches:
            for batch, must_write in batches:
                stored = known({item.digest for item in batch} - seen)
                for item in batch:
                    if item.digest in stored or item.digest in seen:
                        hashing.release(item)
                        done += item.leaf.size
                        continue
                    seen.add(item.digest)
                    pending.append(item)
                    waiting += item.leaf.size
                if pending and (writer or must_write or waiting >= START_WRITING):
                    if writer is None:
                        rest = [
                            leaf for leaf, d in zip(state.leaves, state.digests, strict=True) if d is None
                        ]
                        candidates = [item.leaf for item in pending] + rest
                        writer = PackWriter(tmp, [(leaf.dtype, leaf.shape) for leaf in candidates])
                    _drain(writer, pending, hashing)
                    done += waiting
                    waiting = 0
                progress(done, total)
        if pending:
            writer = writer or PackWriter(tmp, [(item.leaf.dtype, item.leaf.shape) for item in pending])
            _drain(writer, pending, hashing)
        return writer.finish(packs) if writer else None
    except BaseException:
        if writer:
            writer.discard()
        raise


class _Hashed(NamedTuple):
    slot: int
    digest: str
    leaf: Leaf
    data: memoryview | None
    """The bytes, where they were copied to be hashed; None where they can be had from the leaf for nothing."""


def _drain(writer: PackWriter, pending: list[_Hashed], hashing: _Hashing) -> None:
    for item in pending:
        data = item.leaf.buffer() if item.data is None else item.data
        writer.add(item.digest, item.leaf.dtype, item.leaf.shape, data)
        hashing.release(item)
    pending.clear()


class _Hashing:
    """A thread that hashes a state's tensors in order, and bounds the copies that it has to make."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._queue: queue.SimpleQueue[_Hashed | BaseException | str | None] = queue.SimpleQueue()
        self._room = threading.Condition()
        self._copied = 0
        self._stopped = False

    def batches(self) -> Generator[tuple[list[_Hashed], bool]]:
        """Hashed tensors as they come; the flag asks to write what is pending, as hashing waits for room."""
        thread = threading.Thread(target=self._run, name="registry-hash", daemon=True)
        thread.start()
        try:
            done = False
            while not done:
                batch: list[_Hashed] = []
                must_write = False
                item = self._queue.get()
                while True:
                    if isinstance(item, BaseException):
                        raise item
                    if item is None:
                        done = True
                        break
                    if isinstance(item, str):
                        must_write = True
                    else:
                        self._state.digests[item.slot] = item.digest
                        batch.append(item)
                    try:
                        item = self._queue.get_nowait()
                    except queue.Empty:
                        break
                yield batch, must_write
        finally:
            with self._room:
                self._stopped = True
                self._room.notify()
            thread.join()

    def release(self, item: _Hashed) -> None:
        """The bytes of an item are no longer needed."""
        if item.data is not None:
            with self._room:
                self._copied -= item.leaf.size
                self._room.notify()

    def _run(self) -> None:
        try:
            for slot, leaf in enumerate(self._state.leaves):
                plain = leaf.is_plain
                if not plain and not self._wait_for_room(leaf.size):
                    return
                data = leaf.buffer()
                name = self._state.digests[slot] or tensor_digest(leaf.dtype, leaf.shape, data)
                self._queue.put(_Hashed(slot, name, leaf, None if plain else data))
                if self._stopped:
                    return
            self._queue.put(None)
        except BaseException as error:  # reaches the caller of batches()
            self._queue.put(error)

    def _wait_for_room(self, size: int) -> bool:
        with self._room:
            if self._copied and self._copied + size > COPIES_IN_FLIGHT:
                self._queue.put("write")
                self._room.wait_for(
                    lambda: self._stopped or not self._copied or self._copied + size <= COPIES_IN_FLIGHT
                )
            self._copied += size
            return not self._stopped
