"""Where stored tensors lie, and which of them to load.

    Location    a tensor's place in a pack
    Index       what a store asks about all packs: where tensors lie
    Packs       what it asks about one of them
    Wanted      a tensor to load, with its place
    Locator     finds what to load, and what is intact

It loads no torch, as the catalog gives locations to commands that only read metadata.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

from registry.store.errors import Corrupt, Incompatible, Missing, RegistryError
from registry.store.manifest import Listed, Manifest, TensorInfo, slots_of

if TYPE_CHECKING:
    import torch

Result = TypeVar("Result")

Chosen = tuple[int, int, str]
"""A tensor to load: a key for the caller, its position in the manifest, its name for messages."""

Part = tuple[str, int]
"""A part of a pack: the pack, and the first byte in it."""

_MAX_CHAIN = 8
"""How many differences may lie on one another."""


class Location(NamedTuple):
    """A tensor's place: its pack, the first byte in it, and the size of the whole pack in bytes.

    Attributes:
        base: digest of the tensor that the bytes there are a difference from; None where they stand for themselves.
        coded: how many bytes are there if it is coded: as a difference, or by itself.
        is_damaged: whether a part of the pack is known to be damaged.
    """

    pack: str
    start: int
    pack_size: int
    base: str | None = None
    coded: int | None = None
    is_damaged: bool = False

    @property
    def is_coded(self) -> bool:
        """Whether the bytes there are not the tensor's own."""
        return self.coded is not None

    @property
    def rank(self) -> int:
        """What it takes to read the tensor: 0 if the bytes are its own, 1 if it is coded by itself, 2 if it has a base."""
        return (self.coded is not None) + (self.base is not None)


class Index(Protocol):
    """What a store asks about what it holds."""

    def locate(self, digests: Collection[str]) -> dict[str, Location]:
        """The locations of those of the digests that are stored."""
        ...

    def look_again(self) -> None:
        """Notice with the next question what other processes have changed."""
        ...

    def manifest_text(self, manifest_id: str) -> bytes | None:
        """A second copy of a manifest that counts; None if there is none."""
        ...

    def keeps(self, text: bytes) -> bool:
        """Whether there is a second copy of a manifest with this text, durably, before the manifest counts."""
        ...

    def was_removed(self, manifest_id: str) -> bool:
        """Whether a manifest counted once, and does not any more."""
        ...


class Packs(Protocol):
    """What a locator asks about single packs."""

    def bring_parts(self, parts: Mapping[Part, int], sizes: Mapping[str, int]) -> Mapping[Part, memoryview]:
        """Bring what is needed of packs that lie elsewhere.

        Args:
            parts: with their bytes.
            sizes: bytes of the whole packs.

        Returns:
            Parts that were brought into memory. The others can be read from the packs' files.

        Raises:
            Corrupt, StorageError: if that fails.
        """
        ...

    def is_whole(self, digest: str, size: int) -> bool:
        """Whether a pack's file is there in its full size."""
        ...

    def listed(self, digest: str, only: Container[str]) -> Iterable[tuple[TensorInfo, int]]:
        """Those of some tensors that a pack's header lists, and the first byte of each.

        Raises:
            Corrupt: if the header cannot be read.
        """
        ...


class Wanted(NamedTuple):
    """A tensor to load: a key for the caller, what it is, where it lies, its name for messages, its bytes.

    Attributes:
        base: the tensor that it is stored as a difference from, if it is.
        held: the bytes that stand for it in the pack, where these were brought into memory.
    """

    slot: int
    info: TensorInfo
    location: Location
    name: str
    size: int
    base: Wanted | None = None
    held: memoryview | None = None

    @property
    def is_coded(self) -> bool:
        """Whether the stored bytes are not the tensor's own."""
        return self.location.is_coded

    @property
    def stored_size(self) -> int:
        """Bytes that it takes in the pack."""
        return self.size if self.location.coded is None else self.location.coded

    @property
    def is_in_memory(self) -> bool:
        """Whether no file is read for it."""
        return self.held is not None and (self.base is None or self.base.is_in_memory)

    @property
    def chain(self) -> list[Wanted]:
        """It, and what it is a difference from."""
        return [self, *(self.base.chain if self.base else ())]

    @property
    def places(self) -> list[Location]:
        """Where it lies, and what it is a difference from."""
        return [self.location, *(self.base.places if self.base else ())]


class Locator:
    """Finds stored tensors.

    Args:
        index: knows where tensors lie.
        packs: knows the single packs.
    """

    def __init__(self, index: Index, packs: Packs) -> None:
        self._index = index
        self._packs = packs

    def in_documents(self, manifest: Manifest, documents: Mapping[str, Any]) -> list[Wanted]:
        """The tensors that some of a manifest's documents refer to, each once, with its position as the key.

        Raises:
            Corrupt: as `chosen`.
        """
        first: dict[int, str] = {}
        for path, slot in manifest.slots if documents is manifest.components else slots_of(documents):
            first.setdefault(slot, path)
        return self.chosen(manifest, [(slot, slot, path) for slot, path in first.items()])

    def chosen(self, manifest: Manifest, chosen: Sequence[Chosen]) -> list[Wanted]:
        """Some of a manifest's tensors.

        Raises:
            Corrupt: naming the tensor that no pack holds.
        """
        located = self._index.locate({manifest.tensors[slot].digest for _, slot, _ in chosen})
        bases = self._bases(located)
        wanted = []
        for key, slot, path in chosen:
            info = manifest.tensors[slot]
            location = located.get(info.digest)
            if location is None:
                raise Corrupt(f"{path}: no pack holds tensor {info.digest}", "run: registry verify")
            base = _base(info, location, bases, path=path) if location.base else None
            wanted.append(
                Wanted(slot=key, info=info, location=location, name=path, size=info.size, base=base)
            )
        return self._brought(wanted)

    def by_digest(
        self, digests: Collection[str], *, broken: dict[str, RegistryError] | None = None
    ) -> list[Wanted]:
        """Stored tensors by digest alone, in the order of their places; their types are those in the packs.

        Args:
            broken: takes the errors of tensors that are differences from what no pack holds, by digest. Without it the
                first one is raised.

        Raises:
            Corrupt: if the header of a pack cannot be read, or the base of a difference is not there.
        """
        located = self._index.locate(digests)
        bases = self._bases(located)
        found: list[Wanted] = []
        for name in {place.pack for place in located.values()}:
            for info, start in self._packs.listed(name, located):
                place = located[info.digest]
                if (place.pack, place.start) != (name, start):
                    continue
                try:
                    base = _base(info, place, bases, path=info.digest) if place.base else None
                except Corrupt as error:
                    if broken is None:
                        raise
                    broken[info.digest] = error
                    continue
                found.append(
                    Wanted(
                        slot=len(found),
                        info=info,
                        location=place,
                        name=info.digest,
                        size=info.size,
                        base=base,
                    )
                )
        return self._brought(found)

    def intact(self, digests: Collection[str], distrusted: Collection[str]) -> Collection[str]:
        """Those of the digests whose tensors lie in whole packs, with all that they are differences from.

        Args:
            distrusted: packs that do not count as whole.
        """
        located = self._index.locate(digests)
        bases = self._bases(located)
        packs = {place.pack: place.pack_size for place in (*located.values(), *bases.values())}
        whole = {pack for pack, size in packs.items() if self._packs.is_whole(pack, size)}.difference(
            distrusted
        )

        def intact(place: Location | None, depth: int = 0) -> bool:
            if place is None or place.is_damaged or place.pack not in whole or depth > _MAX_CHAIN:
                return False
            return place.base is None or intact(bases.get(place.base), depth + 1)

        return {digest for digest, place in located.items() if intact(place)}

    def while_packs_move(
        self, locate: Callable[[], Sequence[Wanted]], use: Callable[[Sequence[Wanted]], Result]
    ) -> Result:
        """Use stored tensors. If a pack is gone, as another process has replaced it, look again where they lie.

        Raises:
            Missing: if a pack is gone and its tensors lie nowhere else.
        """
        told: set[str] = set()
        while True:
            try:
                return use(locate())
            except Missing as error:
                # To locate them brings packs that lie elsewhere, and may find one gone as well.
                if str(error) in told:
                    raise
                told.add(str(error))
                self._index.look_again()

    def with_bases(self, digests: Collection[str]) -> set[str]:
        """Some digests, and those of the tensors that theirs are stored as differences from."""
        return {*digests, *self._bases(self._index.locate(digests))}

    def _brought(self, wanted: list[Wanted]) -> list[Wanted]:
        """Tensors whose packs are here, or that are in memory."""
        links = [link for item in wanted for link in item.chain]
        # One without bytes may begin where another one does.
        parts = {
            (link.location.pack, link.location.start): link.stored_size for link in links if link.stored_size
        }
        sizes = {link.location.pack: link.location.pack_size for link in links}
        held = self._packs.bring_parts(parts, sizes)
        return [_holding(item, held) for item in wanted] if held else wanted

    def _bases(self, located: Mapping[str, Location]) -> dict[str, Location]:
        """Where the tensors lie that others are stored as differences from, by digest."""
        found: dict[str, Location] = {}
        wanted = {place.base for place in located.values() if place.base}
        while wanted:
            new = self._index.locate(wanted)
            found.update(new)
            wanted = {place.base for place in new.values() if place.base} - set(found)
        return found


def _base(
    info: TensorInfo, place: Location, bases: Mapping[str, Location], *, path: str, depth: int = 0
) -> Wanted:
    """The base of a tensor that is stored as a difference, with a base of its own if it is one too."""
    assert place.base is not None
    its_place = bases.get(place.base)
    if its_place is None or depth > _MAX_CHAIN:
        raise Corrupt(f"{path}: no pack holds tensor {place.base}, which it is a difference from")
    its_info = TensorInfo(info.dtype, info.shape, place.base)
    further = None
    if its_place.base:
        further = _base(its_info, its_place, bases, path=path, depth=depth + 1)
    return Wanted(slot=-1, info=its_info, location=its_place, name=path, size=info.size, base=further)


def _holding(item: Wanted, held: Mapping[Part, memoryview]) -> Wanted:
    """A tensor with what was brought of it."""
    data = held.get((item.location.pack, item.location.start)) if item.stored_size else None
    return item._replace(held=data, base=item.base and _holding(item.base, held))


def filling(manifest: Manifest, live: Mapping[str, torch.Tensor]) -> tuple[list[torch.Tensor], list[Chosen]]:
    """Which stored tensors fill live ones.

    Args:
        live: tensors by `component/name` path.

    Returns:
        Parts of the live tensors, and the stored tensor for each, with its place in that list as the key. A tensor that
        several processes stored in shards takes a part for each of them.

    Raises:
        Incompatible: listing names that are not stored, and shapes and dtypes that differ.
    """
    # Lazy: loads torch.
    from registry.store.tree import box, torch_type, unfillable

    stored: dict[str, Listed] = {}
    problems = []
    for path, tensor in live.items():
        one = manifest.named.get(path)
        if one is None:
            known = path in manifest.named
            what = "names several tensors of the checkpoint" if known else "is not in the checkpoint"
            problems.append(f"{path} {what}")
            continue
        stored[path] = one
        info = one.info
        if reason := unfillable(tensor):
            problems.append(f"{path} is {reason}")
        elif info.shape != tuple(tensor.shape):
            problems.append(f"{path} has shape {list(tensor.shape)}, stored is {list(info.shape)}")
        elif torch_type(info.dtype) != tensor.dtype:
            problems.append(f"{path} is {tensor.dtype}, stored is torch.{info.dtype}")
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise Incompatible("; ".join(problems[:3]) + more)
    parts: list[torch.Tensor] = []
    chosen = []
    for path, tensor in live.items():
        target = tensor.detach() if tensor.requires_grad else tensor
        for offsets, slot in stored[path].shards:
            chosen.append((len(parts), slot, path))
            shape = manifest.tensors[slot].shape
            parts.append(target if offsets is None else box(target, offsets, shape))
    return parts, chosen
