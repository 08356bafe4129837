"""Repair: what is damaged or missing of a registry is put back from a second copy, by digest.

A pack's name covers its header, and that names the digest of each tensor. So a pack is put together again from bytes that have
these digests, wherever they lie: in the damaged file, in the second copy's file of this name, or in any pack of either. If a part
of it is lost, what is needed of the rest is written into a new pack, as a save does that finds a pack damaged.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from registry.catalog.invariants import invariants
from registry.catalog.lookups import are_doomed, batches, marks
from registry.catalog.mending import leading_to
from registry.catalog.schema import UNUSED
from registry.log.entries import MAX_NUMBER, Entry, pack_record
from registry.log.sharing import history_changed
from registry.progress import Progress, silent
from registry.remote.names import place_of
from registry.store import durable
from registry.store.digest import digest as digest_of
from registry.store.digest import is_digest
from registry.store.errors import Conflict, Corrupt, Invalid, RegistryError, Unsupported, storage_errors
from registry.store.manifest import Manifest, TensorInfo
from registry.store.pack import INNER, PackInfo, PackWriter
from registry.upkeep.gathering import Gathering, Lost
from registry.upkeep.second_copies import BucketCopy, FolderCopy, Head, SecondCopy, second_copy
from registry.upkeep.verification import Problem

if TYPE_CHECKING:
    from registry.catalog.transactions import View
    from registry.home import Home
    from registry.log.entries import Record
    from registry.remote.remote import Remote

_ATTEMPTS = 3
_MOST = 20_000
"""Tensors of one new pack."""


@dataclass(frozen=True, slots=True)
class Repaired:
    """What was put back, or would be, and what stays damaged.

    Attributes:
        entries: of the log.
        tensors: those of packs that stay damaged, which were written into new packs.
        bytes: of the packs and tensors.
        problems: what neither copy has whole.
    """

    entries: int
    manifests: int
    packs: int
    tensors: int
    bytes: int
    problems: tuple[Problem, ...]


def repair(home: Home, other: Path | str, *, dry_run: bool = False, progress: Progress = silent) -> Repaired:
    """Put back what is damaged or missing of a registry, from a second copy.

    Every byte of the packs is read; those of a shared registry from its bucket. Nothing is removed, and nothing of the second copy
    is believed: only bytes that have the digest of what is missing are taken. An interrupted repair is repeated.

    Args:
        other: a folder, a URL, or a name of `registry.remote.names`: a backup, a registry that versions were copied to or
            from, or a computer's folder for a shared registry.
        dry_run: write nothing.
        progress: told the bytes of the packs that were looked at, and of all.

    Raises:
        NotFound: if there is no registry at `other`.
        Invalid: if `other` is the registry itself.
        Corrupt: if the second copy is one of the shared log, and tells another history.
        StorageError: if a place cannot be reached, or refuses. What was put back until then stays.
        Conflict: if others change the registry again and again.
    """
    copy = second_copy(place_of(other) if isinstance(other, str) else str(other))
    if copy.place in (home.place, str(home.root)) and (home.remote is None or copy.place == home.place):
        raise Invalid(f"{copy.place} is the registry itself", "give the folder or the URL of a second copy")
    if home.catalog.format == 1:
        raise Unsupported(f"{home.root} has format 1, which registry rebuild takes to the present one first")
    if not dry_run:
        home.catalog.check_writable()
    with storage_errors(home.root):
        return _Repair(home, copy, dry_run=dry_run, progress=progress).run()


class _Repair:
    """One repair, and what it has put back."""

    def __init__(self, home: Home, other: SecondCopy, *, dry_run: bool, progress: Progress) -> None:
        self._home = home
        self._catalog, self._store = home.catalog, home.store
        self._other = other
        self._dry_run = dry_run
        self._progress = progress
        own = FolderCopy(home.root)
        self._target: SecondCopy = BucketCopy(home.remote.bucket) if home.remote else own
        # A host's folder has packs that its bucket may have lost.
        copies = dict.fromkeys([self._target, own, other])
        self._gathering = Gathering(self._catalog.query, list(copies))
        self._own = own
        self._counts = {"entries": 0, "manifests": 0, "packs": 0, "tensors": 0, "bytes": 0}
        self._broken: set[str] = set()
        """Packs that could not be put together again."""
        self._problems: list[Problem] = []

    def run(self) -> Repaired:
        """Put back entries, manifests and packs, in this order, as each tells what the next ones must be."""
        if self._home.remote:
            self._mend_shared_log(self._home.remote)
        else:
            self._mend_log()
        self._refold()
        self._put_back_manifests()
        self._put_back_packs()
        self._refold()
        self._put_back_tensors()
        self._refold(invariants(self._catalog.query, self._store))
        return Repaired(**self._counts, problems=tuple(self._problems))

    def _refold(self, more: Iterable[str] = ()) -> None:
        """Make the catalog anew, unless it is what follows from the log, the manifests and the packs as they are now.

        Args:
            more: other reasons to make it anew.
        """
        catalog = self._catalog
        if not self._dry_run and any([*catalog.gaps(), *catalog.problems(), *more]):
            self._counts["entries"] += len(catalog.refold().healed)

    def _mend_log(self) -> None:
        mended = self._catalog.mend(self._other.entries, dry_run=self._dry_run)
        self._counts["entries"] += len(mended.found)
        for gap in mended.gaps:
            self._problems.append(
                Problem(f"{gap}; {self._other.place} does not have what belongs there either")
            )

    def _mend_shared_log(self, remote: Remote) -> None:
        known: dict[int, str] = {}
        lost: list[int] = []
        for seq, entry in remote.log.entries():
            if entry is None:
                lost.append(seq)
            else:
                known |= {seq - 1: entry.prev, seq: entry.digest}
        last = max([0, *known, *lost])
        for entry in self._own.entries(range(1, MAX_NUMBER)):
            if known.setdefault(entry.seq, entry.digest) != entry.digest:
                raise history_changed(remote.url, f": entry {entry.seq} is another one on this computer")
        lost += range(last + 1, max([last, *known]) + 1)
        found = self._entries(lost, known, remote.url)
        for _, entry in sorted(found.items()):
            if self._put_back_entry(remote, entry):
                self._counts["entries"] += 1
        for seq in sorted(set(lost) - found.keys()):
            self._problems.append(Problem(f"{remote.url}: no copy has entry {seq} of the log whole"))
        if found and not self._dry_run:
            with contextlib.suppress(RegistryError):
                self._catalog.commit(lambda view: [])

    def _entries(self, lost: Sequence[int], known: Mapping[int, str], url: str) -> dict[int, Entry]:
        """The entries that a shared log lacks, from this host's folder and from the second copy.

        Args:
            known: the digests of entries of the log, by number.
        """
        found: dict[int, Entry] = {}
        for copy in (self._own, self._other):
            missing = [seq for seq in lost if seq not in found]
            if missing:
                numbers = range(missing[0], missing[-1] + 1)
                candidates = [entry for entry in copy.entries(numbers) if entry.seq in missing]
                found |= leading_to(known, candidates)
        if isinstance(self._other, FolderCopy) and self._other.url == url:
            # Whatever a host's folder has was in the bucket.
            digests = {**known, **{seq: entry.digest for seq, entry in found.items()}}
            for entry in self._other.entries(range(1, MAX_NUMBER)):
                is_new = entry.seq not in digests and digests.get(entry.seq - 1) == entry.prev
                if is_new:
                    found[entry.seq], digests[entry.seq] = entry, entry.digest
        return found

    def _put_back_entry(self, remote: Remote, entry: Entry) -> bool:
        if self._dry_run:
            return True
        packs = [record["digest"] for record in entry.records if record["op"] == "pack"]
        for pack in packs:
            for copy in (self._own, self._other):
                header = copy.header(pack)
                with contextlib.suppress(Corrupt):
                    if header is not None:
                        remote.packs.keep_header(header)
                        break
        try:
            remote.log.put_back(entry)
        except Corrupt as error:
            self._problems.append(Problem(f"entry {entry.seq} of the log is not put back: {error}"))
            return False
        return True

    def _put_back_manifests(self) -> None:
        for manifest_id, name in self._names().items():
            try:
                self._store.manifest(manifest_id, text_of=lambda _: None)
            except RegistryError as error:
                text = self._catalog.manifest_text(manifest_id)
                if text is not None and self._home.remote:
                    # The file is written where it is needed.
                    continue
                text = text or self._other.manifest(manifest_id)
                if digest_of(text) != manifest_id:
                    message = f"{error}; {self._other.place} does not have it whole either"
                    self._problems.append(Problem(message, (name,)))
                    continue
                if not self._dry_run:
                    path = self._store.manifest_path(manifest_id)
                    durable.write_file(path, text, folder=self._store.tmp, inner=INNER, read_only=True)
                self._counts["manifests"] += 1

    def _names(self) -> dict[str, str]:
        """The version or artifact of each manifest that counts."""
        found: dict[str, str] = {}
        for name, table in (("'artifact ' || key", "artifacts"), ("model || ':v' || version", "versions")):
            found |= dict(self._catalog.query(f"SELECT id, {name} FROM {table}"))
        return {manifest_id: name for manifest_id, name in found.items() if is_digest(manifest_id)}

    def _put_back_packs(self) -> None:
        """Look at all packs that count, those first that others rest on."""
        # It is not known whether one whose header could not be read is used.
        is_known = "number IN (SELECT pack FROM tensors)"
        rows = self._catalog.query(
            f"SELECT digest, size FROM packs WHERE NOT (damaged = 1 AND {UNUSED} AND {is_known}) "
            "ORDER BY differences, number"
        )
        done, total = 0, sum(size for _, size in rows)
        for pack, size in rows:
            self._progress(done, total)
            if not self._gathering.is_whole(self._target, pack, size) and not self._put_together(pack, size):
                self._broken.add(pack)
            done += size
        self._progress(total, total)

    def _put_together(self, pack: str, size: int) -> bool:
        """Write a pack anew, in the place of the damaged one; false if a part of it is lost."""
        head = self._gathering.head(pack, size)
        if head is None:
            return False
        try:
            if self._dry_run:
                for _ in self._gathering.pieces(head):
                    pass
            else:
                durable.again_on_trouble(lambda: self._write(head))
        except Lost:
            return False
        if self._home.remote and not self._dry_run:
            self._home.remote.packs.put_back(pack)
        self._store.distrusted.discard(pack)
        self._counts["packs"] += 1
        self._counts["bytes"] += size
        return True

    def _write(self, head: Head) -> None:
        durable.make_folder(self._store.tmp, inner=1)
        file = durable.NewFile(self._store.tmp)
        try:
            for piece in self._gathering.pieces(head):
                file.write(piece)
            file.sync(head.data)
            file.publish(self._store.pack_path(head.info.digest), inner=INNER)
        except BaseException:
            file.discard()
            raise

    def _put_back_tensors(self) -> None:
        lacking = self._lacking()
        is_changeable = not self._dry_run and not self._catalog.gaps()
        lost: set[str] = set()
        left = list(lacking.values())
        for start in range(0, len(left), _MOST):
            part = left[start : start + _MOST]
            if is_changeable:
                lost |= self._write_anew(part)
            else:
                lost |= {info.digest for info in part if self._counted(info) is None}
        if self._broken and is_changeable:
            self._catalog.commit(lambda view: self._notes(view))
        self._name(lost)

    def _lacking(self) -> dict[str, TensorInfo]:
        """The tensors that manifests need, and that lie in no pack, or in one that stays damaged."""
        lacking: dict[str, TensorInfo] = {}
        seen: set[str] = set()
        for manifest in self._manifests().values():
            wanted = {info.digest: info for info in manifest.tensors if info.digest not in seen}
            while wanted:
                seen |= wanted.keys()
                places = self._catalog.locate(wanted)
                further = {}
                for digest, info in wanted.items():
                    place = places.get(digest)
                    if place is None or place.pack in self._broken:
                        lacking[digest] = info
                    elif place.base and place.base not in seen:
                        further[place.base] = TensorInfo(info.dtype, info.shape, place.base)
                wanted = further
        return lacking

    def _manifests(self) -> dict[str, Manifest]:
        """The manifests that can be read, by the names of their versions and artifacts."""
        found = {}
        for manifest_id, name in self._names().items():
            with contextlib.suppress(RegistryError):
                found[name] = self._store.manifest(manifest_id, text_of=self._catalog.manifest_text)
        return found

    def _counted(self, info: TensorInfo) -> bytes | None:
        data = self._gathering.tensor(info)
        if data is not None:
            self._counts["tensors"] += 1
            self._counts["bytes"] += len(data)
        return data

    def _write_anew(self, infos: Sequence[TensorInfo]) -> set[str]:
        """Write tensors into a new pack, and make it known. Returns the digests of those that no copy has."""
        before = dict(self._counts)
        for _ in range(_ATTEMPTS):
            self._counts = dict(before)
            lost, pack = self._new_pack(infos)
            if pack is None or self._publish(pack):
                return lost
        raise Conflict(f"other processes kept changing {self._home.place} during the repair", "repeat it")

    def _new_pack(self, infos: Sequence[TensorInfo]) -> tuple[set[str], PackInfo | None]:
        for folder in (self._store.packs, self._store.tmp):
            durable.make_folder(folder, inner=1)
        lost = set()
        writer = PackWriter(self._store.tmp, [(info.dtype, info.shape) for info in infos])
        try:
            for info in infos:
                data = self._counted(info)
                if data is None:
                    lost.add(info.digest)
                else:
                    writer.add(info.digest, info.dtype, info.shape, data=memoryview(data))
            if len(lost) == len(infos):
                writer.discard()
                return lost, None
            return lost, writer.finish(self._store.packs)
        except BaseException:
            writer.discard()
            raise

    def _publish(self, pack: PackInfo) -> bool:
        """Make a new pack known; false if others have collected it meanwhile."""
        if self._catalog.shared:
            self._catalog.shared.upload([pack.digest])

        def compute(view: View) -> list[Record]:
            if are_doomed(view, [pack.digest]) or not self._store.pack_is_whole(pack.digest, pack.size):
                return []
            return [*self._notes(view), pack_record(pack)]

        done = False
        try:
            done = self._catalog.commit(compute) is not None
        finally:
            if not done:
                self._catalog.discard([pack.digest])
        return done

    def _notes(self, view: View) -> list[Record]:
        """The records which say that packs are damaged, where the log does not say it yet."""
        return [
            {"op": "damaged", "pack": pack}
            for part in batches(sorted(self._broken))
            for (pack,) in view.query(
                f"SELECT digest FROM packs WHERE damaged = 0 AND digest IN ({marks(part)})", part
            )
        ]

    def _name(self, lost: Iterable[str]) -> None:
        """Name the tensors that no copy has, and the versions and artifacts that are not whole without them."""
        lost = self._with_what_rests_on(set(lost))
        users: dict[str, list[str]] = {}
        for name, manifest in self._manifests().items() if lost else ():
            for path, slot in manifest.slots:
                if manifest.tensors[slot].digest in lost:
                    users.setdefault(path, []).append(name)
        for path, names in users.items():
            message = f"{path}: neither {self._home.place} nor {self._other.place} has it whole"
            self._problems.append(Problem(message, tuple(names)))

    def _with_what_rests_on(self, lost: set[str]) -> set[str]:
        """Some tensors, and those that are stored as differences from them."""
        wanted = set(lost)
        while wanted:
            found = {
                digest
                for part in batches(wanted)
                for (digest,) in self._catalog.query(
                    f"SELECT digest FROM tensors WHERE base IN ({marks(part)})", part
                )
            }
            places = self._catalog.locate(found)
            wanted = {digest for digest, place in places.items() if place.base in wanted} - lost
            lost |= wanted
        return lost
