"""Getting tensors out of packs: mapped, into live tensors, or into buffers of their own.

Every way verifies digests in parallel threads unless told not to.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from registry.store.digest import tensor_digest
from registry.store.durable import storage_errors
from registry.store.errors import Corrupt, RegistryError
from registry.store.location import Location
from registry.store.manifest import TensorInfo
from registry.store.pack import map_file, open_regular, pack_path
from registry.store.tree import torch_type

_THREADS = min(os.cpu_count() or 1, 16)
_ARENA = 64 << 20
_CHUNK = 1 << 20
_REMAP = 1 << 20  # a second use of the same stored tensor is mapped again from here on, and copied below


@dataclass(frozen=True, slots=True)
class Wanted:
    """A tensor to load: its position in the manifest, what it is, where it lies, its name for messages."""

    slot: int
    info: TensorInfo
    location: Location
    name: str


class Mapped:
    """Tensors that view packs mapped copy-on-write; they may be trained in place and never change the store."""

    def __init__(self, packs: Path) -> None:
        self._packs = packs
        self._maps: dict[tuple[str, int], mmap.mmap] = {}
        self._uses: dict[tuple[str, int], int] = {}

    def tensor(self, wanted: Wanted) -> torch.Tensor:
        """The tensor; each call gives memory of its own, also when two names hold equal tensors."""
        info, location = wanted.info, wanted.location
        if info.size == 0:
            return view(memoryview(b""), info, 0)
        use = self._uses.get((location.pack, location.start), 0)
        self._uses[location.pack, location.start] = use + 1
        if use and info.size < _REMAP:
            return self._view(wanted, 0).clone()
        return self._view(wanted, use)

    def bytes(self, wanted: Wanted) -> memoryview:
        start = wanted.location.start
        return memoryview(self._map(wanted.location, 0))[start : start + wanted.info.size]

    def _view(self, wanted: Wanted, use: int) -> torch.Tensor:
        return view(self._map(wanted.location, use), wanted.info, wanted.location.start)

    def _map(self, location: Location, use: int) -> mmap.mmap:
        mapping = self._maps.get((location.pack, use))
        if mapping is None:
            mapping = map_file(pack_path(self._packs, location.pack), location.pack_size)
            self._maps[location.pack, use] = mapping
        return mapping


def view(buffer: mmap.mmap | memoryview, info: TensorInfo, offset: int) -> torch.Tensor:
    """A tensor over a part of a writable buffer, without copying."""
    dtype = torch_type(info.dtype)
    if info.size == 0:
        return torch.empty(info.shape, dtype=dtype)
    count = info.size // dtype.itemsize
    return torch.frombuffer(buffer, dtype=dtype, count=count, offset=offset).reshape(info.shape)


def verify(packs: Path, items: Sequence[Wanted], mapped: Mapped) -> None:
    """Check the digests of mapped tensors, each stored tensor once.

    Raises:
        Corrupt: naming the tensor and the pack.
    """
    distinct = {item.info.digest: item for item in items if item.info.size}
    in_parallel(list(distinct.values()), lambda item: _check(packs, item, mapped.bytes(item)))


def _check(packs: Path, item: Wanted, data: memoryview, actual: str | None = None) -> None:
    if (actual or tensor_digest(item.info.dtype, item.info.shape, data, threads=1)) != item.info.digest:
        raise damaged(packs, item)


def damaged(packs: Path, item: Wanted) -> Corrupt:
    end = item.location.start + item.info.size
    return Corrupt(
        f"{item.name}: the bytes {item.location.start} to {end} of pack "
        f"{pack_path(packs, item.location.pack).name} are not what was saved; "
        "restore the pack from a backup, or load another version"
    )


def in_parallel(items: Sequence[Wanted], work: Callable[[Wanted], None]) -> None:
    """Run work over items on all cores, the largest first; the first error wins and stops the rest."""
    ordered = iter(sorted(items, key=lambda item: item.info.size, reverse=True))
    lock = threading.Lock()
    stop = threading.Event()

    def worker() -> None:
        while not stop.is_set():
            with lock:
                item = next(ordered, None)
            if item is None:
                return
            try:
                work(item)
            except BaseException:
                stop.set()
                raise

    total = sum(item.info.size for item in items)
    if total < _CHUNK or _THREADS == 1:
        worker()
        return
    with ThreadPoolExecutor(_THREADS, "registry-load") as pool:
        for future in [pool.submit(worker) for _ in range(_THREADS)]:
            future.result()


def read_into(packs: Path, items: Sequence[Wanted], targets: Mapping[int, torch.Tensor]) -> None:
    """Copy stored bytes into contiguous CPU tensors, straight from the files."""
    with _Files(packs) as files:

        def work(item: Wanted) -> None:
            files.read(item, _memory(targets[item.slot]))

        in_parallel([item for item in items if item.info.size], work)


def _memory(tensor: torch.Tensor) -> memoryview:
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def owned(packs: Path, items: Sequence[Wanted], *, check: bool) -> dict[int, torch.Tensor]:
    """Tensors in fresh memory of their own, ready to be trained in place at full speed.

    Memory comes in arenas of about 64 MB on huge pages where the system has them, since faulting in small
    pages costs more than reading; an arena is freed when its last tensor is.
    """
    buffers: dict[int, memoryview] = {}
    tensors: dict[int, torch.Tensor] = {}
    for arena, placed in _arenas(items):
        for item, offset in placed:
            buffers[item.slot] = arena[offset : offset + item.info.size]
            tensors[item.slot] = view(arena, item.info, offset)
    with _Files(packs) as files:

        def work(item: Wanted) -> None:
            files.read(item, buffers[item.slot])
            if check:
                _check(packs, item, buffers[item.slot])

        in_parallel([item for item in items if item.info.size], work)
    return tensors


def _arenas(items: Sequence[Wanted]) -> list[tuple[memoryview, list[tuple[Wanted, int]]]]:
    arenas: list[tuple[memoryview, list[tuple[Wanted, int]]]] = []
    placed: list[tuple[Wanted, int]] = []
    size = 0
    for item in items:
        if placed and size + item.info.size > _ARENA:
            arenas.append((_anonymous(size), placed))
            placed, size = [], 0
        placed.append((item, size))
        size += -(-item.info.size // 64) * 64
    if placed:
        arenas.append((_anonymous(size), placed))
    return arenas


def _anonymous(size: int) -> memoryview:
    mapping = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel built without huge pages
            mapping.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(mapping)


class _Files:
    """The packs that a load reads from, opened once each."""

    def __init__(self, packs: Path) -> None:
        self._packs = packs
        self._open: dict[str, open_regular] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._open.values():
            file.__exit__()

    def read(self, item: Wanted, target: memoryview) -> None:
        """Fill `target` with the tensor's bytes."""
        fd = self._descriptor(item)
        offset = item.location.start
        with storage_errors(pack_path(self._packs, item.location.pack)):
            while target:
                count = os.preadv(fd, [target[: 8 * _CHUNK]], offset)
                if count == 0:
                    raise damaged(self._packs, item)
                target = target[count:]
                offset += count

    def _descriptor(self, item: Wanted) -> int:
        pack = item.location.pack
        with self._lock:
            if pack not in self._open:
                path = pack_path(self._packs, pack)
                file = open_regular(path)
                size = os.fstat(file.fileno()).st_size
                if size != item.location.pack_size:
                    file.__exit__()
                    raise Corrupt(f"{path}: has {size} bytes instead of {item.location.pack_size}")
                self._open[pack] = file
            return self._open[pack].fileno()


@contextlib.contextmanager
def naming(label: str) -> Iterator[None]:
    """Prefix what went wrong with the checkpoint that was being read."""
    try:
        yield
    except RegistryError as error:
        raise type(error)(f"{label}: {error}") from error.__cause__
