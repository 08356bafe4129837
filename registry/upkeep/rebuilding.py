"""Rebuilding: make the catalog anew from the log, put back what one of two copies has lost, and name what both lost."""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from registry.log.entries import Record, manifest_text, pack_record
from registry.log.facts import facts_of
from registry.log.reference import check_name
from registry.log.strays import needed_strays, stray_manifests
from registry.progress import Progress, silent
from registry.store import places
from registry.store.errors import RegistryError, Unsupported, storage_errors
from registry.store.manifest import MAX_SIZE
from registry.store.pack import INNER

if TYPE_CHECKING:
    from registry.catalog.catalog import Catalog
    from registry.log.ledger import Ledger
    from registry.store.store import Store


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """What a rebuilt catalog holds, and what could not be brought back.

    Attributes:
        adopted: names of versions that the log does not know, and that were taken in.
        latest: those of them that are the latest of their model now.
        healed: how many entries of the log, and manifests, were put back from their second copy.
        unnamed: ids of manifests that no readable entry of the log names, and that were not taken in.
        damaged: what could not be brought back, in words.
        set_aside: the name that an unreadable catalog has now.
    """

    models: int
    versions: int
    packs: int
    adopted: tuple[str, ...]
    latest: tuple[str, ...]
    healed: int
    unnamed: tuple[str, ...]
    damaged: tuple[str, ...]
    set_aside: str | None


def rebuild(catalog: Catalog, store: Store, *, adopt: bool = False, progress: Progress = silent) -> Rebuilt:
    """Make the catalog anew from the log.

    Args:
        adopt: accept that entries which neither the log nor the catalog's copy has are lost, and take in the manifests
            that no entry names: under their own numbers where it is certain which these were, else under new ones.

    Raises:
        Corrupt: if the log and the catalog tell different histories.
        StorageError: if the folder cannot be written.
        Unsupported: if a shared registry is to adopt, whose log is not this host's to write.
    """
    if adopt and catalog.shared is not None:
        raise Unsupported(
            f"{catalog.shared.url}: --adopt is for the log of a folder",
            "a shared registry's is brought from its bucket by: registry rebuild",
        )
    with storage_errors(store.root):
        refolded = catalog.refold()
        if catalog.shared is not None:
            # Follows the bucket's log, which also puts back what this host's copy has lost.
            catalog.commit(lambda view: [])
            refolded = refolded._replace(ledger=catalog.ledger())
        healed = len(refolded.healed) + _heal_manifests(catalog, store, progress)
        # Of a shared registry, other hosts know nothing of them.
        unnamed = _unnamed(store, refolded.ledger) if catalog.shared is None else set()
        adopted: list[str] = []
        if adopt and (unnamed or refolded.ledger.has_gaps):
            records = catalog.adopt(lambda ledger: _adoption(store, ledger), "taken in by rebuild --adopt")
            adopted = [f"{one['model']}:v{one['version']}" for one in records if one["op"] == "publish"]
            unnamed = _unnamed(store, catalog.refold().ledger)
    ((versions, models, packs),) = catalog.query(
        "SELECT (SELECT COUNT(*) FROM versions), (SELECT COUNT(DISTINCT model) FROM versions), "
        "(SELECT COUNT(*) FROM packs)"
    )
    newest = dict(catalog.query("SELECT model, MAX(version) FROM versions GROUP BY model"))
    return Rebuilt(
        models=models,
        versions=versions,
        packs=packs,
        adopted=tuple(adopted),
        latest=tuple(name for name in adopted if _is_latest(name, newest)),
        healed=healed,
        unnamed=tuple(sorted(unnamed)),
        damaged=(*refolded.problems, *_damage(catalog, store)),
        set_aside=refolded.set_aside,
    )


def _is_latest(name: str, newest: Mapping[str, int]) -> bool:
    model, _, number = name.partition(":v")
    return newest.get(model) == int(number)


def _heal_manifests(catalog: Catalog, store: Store, progress: Progress) -> int:
    """Write again the manifests whose files are missing or damaged, and whose text the log has. Returns how many."""
    rows = catalog.query("SELECT id FROM manifests")
    healed = 0
    for i, (manifest_id,) in enumerate(rows):
        try:
            store.manifest(manifest_id, text_of=lambda _: None)
        except RegistryError:
            # What stays damaged `_damage` names, and `verify` where only its file does.
            with contextlib.suppress(RegistryError):
                store.manifest(manifest_id)
                store.manifest(manifest_id, text_of=lambda _: None)
                healed += 1
        progress(i + 1, len(rows))
    return healed


def _damage(catalog: Catalog, store: Store) -> Iterator[str]:
    """What could not be brought back, in words."""
    yield from catalog.gaps()
    yield from (str(void) for void in catalog.ledger().voids) if not catalog.gaps() else ()
    for (digest,) in catalog.query("SELECT digest FROM packs"):
        try:
            store.pack_info(digest)
        except RegistryError as error:
            if catalog.query("SELECT 1 FROM packs WHERE digest = ?", [digest]):
                yield f"pack {error}"
    names = dict(catalog.query("SELECT id, model || ':v' || version FROM versions"))
    for (manifest_id,) in catalog.query("SELECT id FROM manifests"):
        problem = _problem(catalog, store, manifest_id)
        # It is looked at twice: it may have been removed and stored again in between.
        if problem and (problem := _problem(catalog, store, manifest_id)):
            yield f"{names.get(manifest_id, f'artifact {manifest_id[:12]}')}: {problem}"


def _problem(catalog: Catalog, store: Store, manifest_id: str) -> str:
    """What is wrong with a manifest; empty if nothing is, or if it does not count any more."""
    try:
        tensors = {tensor.digest for tensor in store.manifest(manifest_id).tensors}
        lost = len(tensors) - len(catalog.locate(tensors))
        problem = (
            f"no pack has {'1 of its tensors' if lost == 1 else f'{lost} of its tensors'}" if lost else ""
        )
    except RegistryError as error:
        problem = str(error)
    counts = problem and catalog.query("SELECT 1 FROM manifests WHERE id = ?", [manifest_id])
    return problem if counts else ""


def _unnamed(store: Store, ledger: Ledger) -> set[str]:
    """Manifests of versions that no readable entry names."""
    found = set()
    for manifest_id in stray_manifests(store, ledger):
        try:
            if store.manifest(manifest_id, text_of=lambda _: None).record.get("kind") == "checkpoint":
                found.add(manifest_id)
        except RegistryError:
            continue
    return found


class _Orphan(NamedTuple):
    """A version that the log does not know."""

    model: str
    created: str
    id: str


def _adoption(store: Store, ledger: Ledger) -> Sequence[Record]:
    """The records that take in the versions which no entry names, and the names that entries give them."""
    packs, whole = needed_strays(store, ledger, _unnamed(store, ledger))
    orphans = []
    for manifest_id in whole:
        manifest = store.manifest(manifest_id, text_of=lambda _: None)
        with contextlib.suppress(RegistryError):
            model = check_name(str(manifest.record.get("model")), "model")
            orphans.append(_Orphan(model, facts_of(manifest).created, manifest_id))
    numbers = _numbers(store, ledger, sorted(orphans))
    publishes: list[Record] = []
    for orphan in sorted(orphans, key=lambda one: (one.model, numbers[one.id])):
        text = places.read_file(store.manifest_path(orphan.id), MAX_SIZE, inner=INNER)
        publish = {"op": "publish", "id": orphan.id, "model": orphan.model, "version": numbers[orphan.id]}
        publishes.append({**publish, "adopted": True, **manifest_text(text)})
    names = _names(ledger, {one.id for one in orphans})
    return [*map(pack_record, (ledger.strays | packs).values()), *publishes, *names]


def _numbers(store: Store, ledger: Ledger, orphans: Sequence[_Orphan]) -> dict[str, int]:
    """The numbers under which versions are taken in.

    A model's numbers that no entry accounts for are those of its orphans, in the order of their creation, if there are
    as many and each was created between its neighbours. Otherwise it is not certain which were theirs, as an interrupted
    save leaves an orphan, too, and they get new ones.
    """
    numbers: dict[str, int] = {}
    for model in {one.model for one in orphans}:
        own = [one for one in orphans if one.model == model]
        found = sorted(number for missing in ledger.missing.get(model, ()) for number in missing)
        given = dict(zip(found, own, strict=False))
        if len(found) != len(own) or not _fit(store, ledger, model, given):
            following = ledger.next.get(model, 1)
            found = [*range(following, following + len(own))]
        numbers |= {one.id: number for one, number in zip(own, found, strict=True)}
    return numbers


def _fit(store: Store, ledger: Ledger, model: str, given: Mapping[int, _Orphan]) -> bool:
    """Whether versions that would get these numbers were created behind the one before and before the one behind."""
    known = {}
    for manifest_id, (name, number) in ledger.versions.items():
        if name == model:
            with contextlib.suppress(RegistryError):
                known[number] = facts_of(store.manifest(manifest_id)).created
    known = {number: created for number, created in known.items() if created}
    numbers = sorted(known)
    for number, orphan in given.items():
        i = bisect.bisect(numbers, number)
        around = [
            *(known[one] for one in numbers[i - 1 : i] if i),
            orphan.created,
            *(known[one] for one in numbers[i : i + 1]),
        ]
        if around != sorted(around):
            return False
    return True


def _names(ledger: Ledger, adopted: set[str]) -> Iterator[Record]:
    """The records of the aliases, tags and notes that readable entries give to versions which are taken in.

    An adoption that was interrupted may have taken in the versions already, or some of the names.
    """
    found: dict[tuple[str, str, str], Record] = {}
    for record in ledger.skipped:
        op, manifest_id = record["op"], str(record.get("id"))
        if op == "alias":
            found["alias", record["model"], record["alias"]] = record
        elif op == "tag":
            found["tag", manifest_id, record["tag"]] = record
        elif op == "untag":
            found.pop(("tag", manifest_id, record["tag"]), None)
        elif op == "note":
            found["note", manifest_id, f"{record['at']} {record['text']}"] = record
    for (op, model, name), record in found.items():
        manifest_id = record["id"]
        if manifest_id not in adopted and manifest_id not in ledger.versions:
            continue
        if op == "alias":
            if (model, name) not in ledger.aliases:
                yield {**record, "was": None}
        elif op == "tag":
            if name not in ledger.tags.get(manifest_id, ()):
                yield record
        elif (record["at"], record["text"]) not in ledger.notes.get(manifest_id, ()):
            yield record
