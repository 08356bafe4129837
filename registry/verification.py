"""Verification: read every stored byte and compare it with its digest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from registry.progress import Progress, silent
from registry.store.digest import tensor_digest
from registry.store.errors import RegistryError
from registry.store.pack import map_file, read_pack_info

if TYPE_CHECKING:
    from registry.registry import Registry


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is not as it was saved, and the checkpoints that cannot be loaded whole because of it."""

    message: str
    checkpoints: tuple[str, ...] = ()
    path: str = ""


@dataclass(frozen=True, slots=True)
class Verification:
    checkpoints: int
    packs: int
    tensors: int
    bytes: int
    problems: tuple[Problem, ...]
    artifacts: int = 0


def verify(registry: Registry, references: Iterable[str] = (), progress: Progress = silent) -> Verification:
    """Read every stored byte, or those that some checkpoints need, and compare it with its digest.

    Returns:
        What was checked and every problem found; damage is reported, not raised.
    """
    chosen = [registry.resolve(reference).id for reference in references]
    check = _Check(registry, chosen)
    check.manifests()
    check.packs(progress)
    if not chosen:
        check.catalog()
    return Verification(
        check.checkpoints,
        check.pack_count,
        check.tensor_count,
        check.byte_count,
        tuple(check.problems),
        check.artifacts,
    )


class _Check:
    def __init__(self, registry: Registry, chosen: list[str]) -> None:
        self._registry = registry
        self._store = registry.store
        self._chosen = chosen
        self.problems: list[Problem] = []
        self.checkpoints = self.artifacts = self.pack_count = self.tensor_count = self.byte_count = 0
        self._names: dict[str, list[tuple[str, str]]] = {}
        """Checkpoint and path of each tensor by digest."""

    def manifests(self) -> None:
        query = self._registry.catalog.query
        named = dict(query("SELECT id, model || ':v' || version FROM versions"))
        named |= {id: f"artifact {key}" for id, key in query("SELECT id, key FROM artifacts")}
        for id in self._chosen or named:
            if named.get(id, "").startswith("artifact "):
                self.artifacts += 1
            else:
                self.checkpoints += 1
            try:
                manifest = self._store.manifest(id)
            except RegistryError as error:
                self.problems.append(Problem(str(error), (named[id],)))
                continue
            for path, slot in manifest.slots:
                self._names.setdefault(manifest.tensors[slot].digest, []).append((named[id], path))

    def packs(self, progress: Progress) -> None:
        located = self._registry.catalog.locate(self._names if self._chosen else [])
        needed = {location.pack for location in located.values()}
        query = self._registry.catalog.query
        rows = [
            row
            for row in query("SELECT digest, size, number FROM packs")
            if not self._chosen or row[0] in needed
        ]
        total = sum(size for _, size, _ in rows)
        for digest, size, number in rows:
            placed = dict(query("SELECT digest, start FROM tensors WHERE pack = ?", [number]))
            self._pack(digest, size, placed)
            self.pack_count += 1
            self.byte_count += size
            progress(self.byte_count, total)
        known = {digest for (digest,) in query("SELECT digest FROM tensors")}
        for digest, uses in self._names.items():
            if digest not in known:
                self._damaged(digest, "no pack holds it", uses)

    def _pack(self, digest: str, size: int, placed: Mapping[str, int]) -> None:
        path = self._store.pack_path(digest)
        try:
            info = read_pack_info(path)
            mapping = map_file(path, size)
        except RegistryError as error:
            affected = {name for tensor in placed for name, _ in self._names.get(tensor, ())}
            self.problems.append(Problem(f"pack {error}", tuple(sorted(affected)), str(path)))
            return
        inside = {tensor.digest: tensor for tensor in info.tensors}
        differences: list[str] = []
        with memoryview(mapping) as data:
            end = info.size if not info.tensors else info.tensors[0].start
            for tensor in info.tensors:
                self._filler(path, data, end, tensor.start)
                end = tensor.start + tensor.size
                self.tensor_count += 1
                if tensor.base:
                    if placed.get(tensor.digest) == tensor.start:
                        differences.append(tensor.digest)
                    continue
                with data[tensor.start : tensor.start + tensor.size] as part:
                    if tensor_digest(tensor.dtype, tensor.shape, part) != tensor.digest:
                        self._damaged(tensor.digest, f"its bytes in {path} are not what was saved")
        self._differences(differences)
        for tensor_name, start in placed.items():
            if tensor_name not in inside or inside[tensor_name].start != start:
                self._damaged(
                    tensor_name, f"{path} does not hold it where the catalog says; run: registry rebuild"
                )

    def _differences(self, digests: list[str]) -> None:
        """Check tensors that are stored as differences, by making them."""
        if not digests:
            return
        from registry.store import loading

        store = self._store
        try:
            items = store.wanted(digests)
        except RegistryError as error:
            self.problems.append(Problem(str(error)))
            return
        for item in items:
            try:
                loading.verify(store.packs, [item], loading.Mapped(store.packs))
            except RegistryError as error:
                self._damaged(item.info.digest, str(error).removeprefix(f"{item.name}: "))

    def _filler(self, path: Path, data: memoryview, start: int, end: int) -> None:
        if any(data[start:end]):
            self.problems.append(
                Problem(f"pack {path}: the filler at byte {start} is not zero", (), str(path))
            )

    def _damaged(self, digest: str, problem: str, uses: list[tuple[str, str]] | None = None) -> None:
        uses = self._names.get(digest, []) if uses is None else uses
        if self._chosen and not uses:
            return
        if not uses:
            self.problems.append(Problem(f"tensor {digest[:12]}, which no checkpoint uses: {problem}"))
        for path in dict.fromkeys(path for _, path in uses):
            names = tuple(name for name, used in uses if used == path)
            self.problems.append(Problem(f"{path}: {problem}", names))

    def catalog(self) -> None:
        catalog = self._registry.catalog
        for (text,) in catalog.query("PRAGMA integrity_check"):
            if text != "ok":
                self.problems.append(Problem(f"{catalog.path}: {text}; run: registry rebuild"))
        if catalog.query("PRAGMA foreign_key_check"):
            self.problems.append(
                Problem(f"{catalog.path}: broken references between rows; run: registry rebuild")
            )
        damaged = sum(line.record is None for line in catalog.journal.read())
        if damaged:
            lines = "1 line is" if damaged == 1 else f"{damaged} lines are"
            self.problems.append(
                Problem(f"{catalog.journal.path}: {lines} damaged; what the catalog holds is not affected")
            )
