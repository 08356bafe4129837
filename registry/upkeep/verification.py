"""Verification: compare every stored byte with its digest; and log, catalog, manifests and packs with one another.

What is found is looked at again before it is reported, as other processes may remove and move things meanwhile.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from registry.catalog.lookups import batches, marks
from registry.catalog.resolving import resolve
from registry.catalog.schema import UNUSED
from registry.log.facts import facts_of
from registry.progress import Progress, silent
from registry.store import durable, places
from registry.store.digest import digest as digest_of
from registry.store.digest import is_digest, tensor_digest
from registry.store.errors import Corrupt, Missing, RegistryError, StorageError, Unsupported
from registry.store.locating import Location
from registry.store.manifest import MAX_SIZE, parse
from registry.store.pack import INNER, PackInfo, read_pack_info
from registry.store.places import open_regular
from registry.store.text import texts

if TYPE_CHECKING:
    from registry.catalog.catalog import Catalog
    from registry.catalog.transactions import View
    from registry.log.entries import Record
    from registry.store.manifest import Manifest
    from registry.store.store import Store

_logger = logging.getLogger(__name__)

_PART = 8 << 20
"""Bytes that are read at a time."""

_TRIES = 20


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is not as it was saved, and the checkpoints that cannot be loaded whole because of it."""

    message: str
    checkpoints: tuple[str, ...] = ()
    path: str = ""


@dataclass(frozen=True, slots=True)
class Verification:
    """What was checked, and every problem found.

    Attributes:
        mended: what was not as it was saved, and was put back from the log.
    """

    checkpoints: int
    packs: int
    tensors: int
    bytes: int
    problems: tuple[Problem, ...]
    artifacts: int = 0
    mended: tuple[Problem, ...] = ()


def verify(
    catalog: Catalog, store: Store, references: str | Iterable[str] = (), progress: Progress = silent
) -> Verification:
    """Read every stored byte, or those that some checkpoints need, and compare it with its digest.

    Without references, the log and the catalog are compared with each other, too. Damaged packs are noted in the log,
    if it can be written. What is saved again is then written again, and does not rest on them. A manifest that is damaged or
    missing, such as after a power cut, is written again from the log.

    Returns:
        What was checked and every problem found; damage is reported, not raised.

    Raises:
        NotFound: if there is no such checkpoint.
        StorageError: if the bucket of a shared registry cannot be reached, which says nothing against its packs.
    """
    chosen = [resolve(catalog, reference).id for reference in texts(references)]
    check = _Check(catalog, store, chosen)
    check.manifests()
    check.packs(progress)
    _note(catalog, store, check.damaged)
    if not chosen:
        check.records()
    return Verification(
        checkpoints=check.checkpoints,
        packs=check.pack_count,
        tensors=check.tensor_count,
        bytes=check.byte_count,
        problems=tuple(check.problems),
        artifacts=check.artifacts,
        mended=tuple(check.mended),
    )


def _note(catalog: Catalog, store: Store, damaged: Collection[str]) -> None:
    """Record that packs are damaged."""
    store.distrusted.update(damaged)
    if not damaged or catalog.format == 1 or not catalog.is_writable:
        return

    def compute(view: View) -> list[Record]:
        return [
            {"op": "damaged", "pack": pack}
            for part in batches(sorted(damaged))
            for (pack,) in view.query(
                f"SELECT digest FROM packs WHERE damaged = 0 AND digest IN ({marks(part)})", part
            )
        ]

    # It is reported all the same.
    with contextlib.suppress(RegistryError):
        catalog.commit(compute)


class _Check:
    """One verification: what it has checked, and the problems that it has found."""

    def __init__(self, catalog: Catalog, store: Store, chosen: list[str]) -> None:
        self._catalog = catalog
        self._store = store
        self._chosen = chosen
        self.problems: list[Problem] = []
        self.damaged: set[str] = set()
        """Packs with bytes that are not what was saved."""
        self.checkpoints = self.artifacts = self.pack_count = self.tensor_count = self.byte_count = 0
        self._names: dict[str, list[tuple[str, str]]] = {}
        """Checkpoint and path of each tensor by digest."""
        self._ids: dict[str, str] = {}
        """Id of each checkpoint's manifest when it was read. Thinning gives the checkpoint another one."""
        self.mended: list[Problem] = []
        self._ages: Mapping[str, tuple[float, int]] | None = None

    def manifests(self) -> None:
        """Check the manifests, and note which tensors each checkpoint has."""
        for manifest_id, name in self._live_names().items():
            manifest: Manifest | None
            try:
                manifest = self._read_manifest(manifest_id)
            except RegistryError as error:
                if manifest_id not in self._live_names([manifest_id]):
                    # It was removed meanwhile.
                    continue
                manifest = self._from_log(manifest_id, name, error)
                if manifest is None:
                    continue
            if name.startswith("artifact "):
                self.artifacts += 1
            else:
                self.checkpoints += 1
                for problem in facts_of(manifest).problems:
                    self.problems.append(Problem(f"{name}: {problem}", (name,)))
            self._ids[name] = manifest_id
            for path, slot in manifest.slots:
                self._names.setdefault(manifest.tensors[slot].digest, []).append((name, path))

    def packs(self, progress: Progress) -> None:
        """Check the packs, and that each tensor of the checkpoints is in one."""
        rows = self._pack_rows()
        total = sum(size for _, size, _ in rows)
        for digest, size, number in rows:
            self._check_pack(digest, size, number)
            self.pack_count += 1
            self.byte_count += size
            progress(self.byte_count, total)
        for part in batches(self._names):
            found = {
                row[0]
                for row in self._catalog.query(
                    f"SELECT DISTINCT digest FROM tensors WHERE digest IN ({marks(part)})", part
                )
            }
            for digest in part:
                if digest not in found and self._is_lost(digest):
                    self._report(digest, "no pack holds it")

    def records(self) -> None:
        """Compare the log, the catalog's copy of it, and the tables."""
        for message in self._catalog.problems():
            self.problems.append(Problem(message))

    def _live_names(self, ids: Iterable[str] | None = None) -> dict[str, str]:
        """The version or artifact of each manifest that counts, or of each of some."""
        chosen = list(ids) if ids is not None else self._chosen
        if not chosen and ids is None:
            return self._named("", [])
        named: dict[str, str] = {}
        for part in batches(chosen):
            named |= self._named(f"WHERE id IN ({marks(part)})", part)
        return named

    def _named(self, where: str, parameters: list[str]) -> dict[str, str]:
        named: dict[str, str] = {}
        for name, table in (("'artifact ' || key", "artifacts"), ("model || ':v' || version", "versions")):
            rows = self._catalog.query(f"SELECT id, {name} FROM {table} {where}", parameters)
            # A damaged row may hold anything.
            named |= {str(manifest_id): str(found) for manifest_id, found in rows}
        return named

    def _read_manifest(self, manifest_id: str) -> Manifest:
        """The manifest as its file has it."""
        path = self._store.manifest_path(manifest_id)
        with open_regular(path, inner=INNER) as file:
            data = file.read(MAX_SIZE + 1)
        if digest_of(data) != manifest_id:
            raise Corrupt(f"{path}: the manifest is not what was saved")
        return parse(data)

    def _from_log(self, manifest_id: str, name: str, error: RegistryError) -> Manifest | None:
        """The manifest as the log has it. Its file is written again, and what was wrong with it is noted."""
        text = self._catalog.manifest_text(manifest_id)
        path = str(self._store.manifest_path(manifest_id))
        if text is None or digest_of(text) != manifest_id:
            self.problems.append(
                Problem(f"{error}; put it back with: registry repair --from A-COPY", (name,), path)
            )
            return None
        if isinstance(error, Missing) and self._store.elsewhere is not None:
            # Hosts that share a registry have a manifest's file only where it was needed.
            return parse(text)
        with contextlib.suppress(RegistryError):
            self._store.manifest(manifest_id)
        try:
            found = self._read_manifest(manifest_id)
            self.mended.append(Problem(f"{error}; it was written again from the log", (), path))
            return found
        except RegistryError:
            # Nobody may write here.
            self.problems.append(
                Problem(f"{error}; the log has it, and registry rebuild puts it back", (), path)
            )
        with contextlib.suppress(RegistryError):
            return parse(text)
        return None

    def _pack_rows(self) -> list[tuple[str, int, int]]:
        rows = self._catalog.query(
            f"SELECT digest, size, number FROM packs WHERE NOT (damaged = 1 AND {UNUSED}) ORDER BY number"
        )
        if self._chosen:
            needed = {place.pack for place in self._catalog.locate(self._names).values()}
            rows = [row for row in rows if row[0] in needed]
        sound = [row for row in rows if is_digest(row[0]) and type(row[1]) is type(row[2]) is int]
        if len(sound) < len(rows):
            self.problems.append(Problem("the catalog holds a damaged row of a pack; run: registry rebuild"))
        return [(str(digest), int(size), int(number)) for digest, size, number in sound]

    def _is_at_hand(self, digest: str, size: int) -> bool:
        """Whether a pack is to be read. One that lies elsewhere, and is not asked for by name, is not brought for that.

        Raises:
            Corrupt: if it is not there either, in its full size.
            StorageError: if the place cannot be reached.
        """
        elsewhere = self._store.elsewhere
        if elsewhere is None:
            return True
        if self._chosen:
            self._store.bring({digest: size})
            return True
        if self._store.pack_is_here(digest, size):
            return True
        if self._ages is None:
            self._ages = elsewhere.ages()
        if digest not in self._ages or self._ages[digest][1] != size:
            found = (
                f"has {self._ages[digest][1]} bytes instead of {size}"
                if digest in self._ages
                else "is missing"
            )
            raise Corrupt(f"pack {digest} {found} in the registry's bucket")
        return False

    def _counts(self, pack: str) -> bool:
        """Whether a pack still counts."""
        if self._store.elsewhere is not None:
            # Another host may have doomed it a moment ago.
            with contextlib.suppress(StorageError):
                self._catalog.commit(lambda view: [])
        self._catalog.look_again()
        return bool(self._catalog.query("SELECT 1 FROM packs WHERE digest = ?", [pack]))

    def _is_lost(self, digest: str) -> bool:
        """Whether no pack has a tensor, and a manifest that needs it still counts."""
        ids = {self._ids[name] for name, _ in self._names.get(digest, ())}
        return not self._catalog.locate([digest]) and bool(self._live_names(ids))

    def _check_pack(self, digest: str, size: int, number: int) -> None:
        """Check a pack. If a copy is damaged of one that lies elsewhere as well, the copy goes, and that one counts."""
        before = len(self.problems), self.tensor_count
        self._check_file(digest, size, number)
        path = self._store.pack_path(digest)
        if (
            digest not in self.damaged
            or self._store.elsewhere is None
            or places.status_of(path, inner=INNER) is None
        ):
            return
        try:
            durable.unlink(path, inner=INNER)
        except OSError:
            return
        _logger.warning("%s, a copy of what the registry has, was damaged; it was removed", path)
        del self.problems[before[0] :]
        self.tensor_count = before[1]
        self.damaged.discard(digest)
        self._check_file(digest, size, number)

    def _check_file(self, digest: str, size: int, number: int) -> None:
        """Compare a pack with its name and with the catalog, and its bytes with their digests."""
        placed = {
            name: Location(pack=digest, start=start, pack_size=size, base=base, coded=coded)
            for name, start, base, coded in self._catalog.query(
                "SELECT digest, start, base, coded FROM tensors WHERE pack = ?", [number]
            )
        }
        path = self._store.pack_path(digest)
        try:
            # That a store does not answer says nothing against the pack, and is raised.
            if not self._is_at_hand(digest, size):
                return
        except Corrupt as error:
            self._note_damage(digest, placed, error)
            return
        try:
            info = read_pack_info(path)
            if info.size != size:
                raise Corrupt(f"{path}: has {info.size} bytes instead of {size}")
            with open_regular(path, inner=INNER) as file:
                self._check_contents(info, file.fileno())
        except Unsupported as error:
            # A newer program wrote it, so this one cannot tell whether it is whole.
            self.problems.append(Problem(str(error), (), str(path)))
            return
        except RegistryError as error:
            self._note_damage(digest, placed, error)
            return
        self._check_coded([tensor.digest for tensor in info.tensors if tensor.is_coded], digest)
        if placed != info.places and self._counts(digest):
            self.problems.append(
                Problem(f"{path} does not hold what the catalog says; run: registry rebuild", (), str(path))
            )

    def _note_damage(self, digest: str, tensors: Iterable[str], error: RegistryError) -> None:
        """Note what is wrong with a pack, if it still counts."""
        if self._counts(digest):
            self.damaged.add(digest)
            affected = {name for tensor in tensors for name, _ in self._names.get(tensor, ())}
            path = str(self._store.pack_path(digest))
            self.problems.append(Problem(f"pack {error}", tuple(sorted(affected)), path))

    def _check_contents(self, info: PackInfo, fd: int) -> None:
        """Compare the bytes of a pack with their digests; read, not mapped, since it may shrink meanwhile."""
        path = self._store.pack_path(info.digest)
        end = info.size if not info.tensors else info.tensors[0].start
        for tensor in info.tensors:
            if any(self._read(fd, end, tensor.start - end)):
                message = f"pack {path}: the padding at byte {end} is not zero"
                self.problems.append(Problem(message, (), str(path)))
            end = tensor.start + tensor.size
            self.tensor_count += 1
            if tensor.is_coded:
                continue
            data = self._read(fd, tensor.start, tensor.size)
            if tensor_digest(tensor.dtype, tensor.shape, data) != tensor.digest and self._counts(info.digest):
                self.damaged.add(info.digest)
                self._report(tensor.digest, f"its bytes in {path} are not what was saved")

    @staticmethod
    def _read(fd: int, start: int, size: int) -> bytearray:
        data = bytearray(size)
        done = 0
        with memoryview(data) as view:
            while done < size:
                count = os.preadv(fd, [view[done : done + _PART]], start + done)
                if count == 0:
                    break
                done += count
        return data

    def _check_coded(self, digests: list[str], pack: str) -> None:
        """Check tensors that are stored coded, by making them."""
        problems: dict[str, RegistryError] = {}
        left: Sequence[str] = digests
        for _ in range(_TRIES):
            if not left:
                break
            found = self._undecodable(left, pack)
            for digest in left:
                problems.pop(digest, None)
            problems |= found
            # Another process may just have replaced the pack of a base.
            left = [digest for digest, error in found.items() if isinstance(error, Missing)]
        if problems and self._counts(pack):
            self.damaged.add(pack)
            for digest, error in problems.items():
                self._report(digest, str(error).removeprefix(f"{digest}: "))

    def _undecodable(self, digests: Sequence[str], pack: str) -> dict[str, RegistryError]:
        """Why some of the tensors that a pack holds coded cannot be made, by digest."""
        # Lazy: loads torch.
        from registry.store import loading

        problems: dict[str, RegistryError] = {}
        try:
            wanted = self._store.wanted(digests, broken=problems)
        except RegistryError as error:
            return dict.fromkeys(digests, error)
        for item in wanted:
            if item.location.pack == pack:
                try:
                    loading.verify(self._store.packs, [item], loading.Read(self._store.packs))
                except RegistryError as error:
                    # Its traceback would keep the memory of what was turned back.
                    error.__cause__ = error.__context__ = None
                    problems[item.info.digest] = error.with_traceback(None)
        return problems

    def _report(self, digest: str, problem: str) -> None:
        """Add a problem for each place where checkpoints use a tensor."""
        uses = self._names.get(digest, [])
        if self._chosen and not uses:
            return
        if not uses:
            self.problems.append(Problem(f"tensor {digest[:12]}, which no checkpoint uses: {problem}"))
        for path in dict.fromkeys(path for _, path in uses):
            names = tuple(name for name, used in uses if used == path)
            self.problems.append(Problem(f"{path}: {problem}", names))
