"""Strays: packs and manifests that no readable entry of the log names.

An interrupted save leaves strays, and nothing needs them. Where entries are lost, a stray may be what one of these
named.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from registry.log.ledger import LivePack
from registry.store.errors import RegistryError

if TYPE_CHECKING:
    from registry.log.ledger import Ledger
    from registry.store.pack import PackInfo
    from registry.store.store import Store


def stray_packs(store: Store, ledger: Ledger) -> list[PackInfo]:
    """The packs that no entry names."""
    found = []
    for digest in store.pack_digests():
        if digest not in ledger.packs and digest not in ledger.doomed:
            try:
                found.append(store.pack_info(digest))
            except RegistryError:
                continue
    return found


def stray_manifests(store: Store, ledger: Ledger) -> Iterator[str]:
    """The manifests that no entry names."""
    for manifest_id in store:
        is_known = manifest_id in ledger.released or manifest_id in ledger.doomed
        if not is_known and not ledger.is_live(manifest_id):
            yield manifest_id


def needed_strays(
    store: Store, ledger: Ledger, manifest_ids: Iterable[str]
) -> tuple[dict[str, PackInfo], list[str]]:
    """The stray packs that some manifests need, and the ids of the manifests that are whole with them."""
    strays = stray_packs(store, ledger)
    held: set[str] = set()
    for digest in ledger.packs:
        try:
            held.update(store.pack_info(digest).places)
        except RegistryError:
            continue
    chosen: dict[str, PackInfo] = {}
    whole = []
    for manifest_id in manifest_ids:
        try:
            tensors = store.tensors_of(manifest_id, text_of=lambda _: None)
        except RegistryError:
            continue
        more = _closure(tensors - held, strays, held)
        if more is not None:
            chosen |= more
            whole.append(manifest_id)
    return chosen, whole


def use_strays(store: Store, ledger: Ledger) -> None:
    """Let the stray packs count that live manifests need: a lost entry may have named them."""
    chosen, _ = needed_strays(store, ledger, ledger.live_manifests())
    for number, (digest, pack) in enumerate(sorted(chosen.items()), ledger.pack_count + 1):
        has_differences = any(tensor.base for tensor in pack.tensors)
        ledger.packs[digest] = LivePack(number, pack.size, has_differences)
        ledger.strays[digest] = pack


def _closure(wanted: frozenset[str], strays: list[PackInfo], held: set[str]) -> dict[str, PackInfo] | None:
    """The strays that hold the wanted tensors, and in turn their bases; None if one tensor is in no pack at all.

    Args:
        held: digests of the tensors that packs of the log hold.
    """
    found: dict[str, PackInfo] = {}
    left = set(wanted)
    while left:
        chosen = {pack.digest: pack for pack in strays if not left.isdisjoint(pack.places)}
        inside = {digest for pack in chosen.values() for digest in pack.places}
        if not left <= inside:
            return None
        found |= chosen
        bases = {place.base for pack in chosen.values() for place in pack.places.values() if place.base}
        left = bases - held - {digest for pack in found.values() for digest in pack.places}
    return found
