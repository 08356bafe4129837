"""The store: named trees in, a manifest's digest out, and back."""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import re
import stat
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from registry.store import durable, places
from registry.store.digest import digest as digest_of
from registry.store.digest import is_digest
from registry.store.errors import (
    Corrupt,
    Incompatible,
    Invalid,
    Missing,
    NotFound,
    StorageError,
    storage_errors,
)
from registry.store.location import Index, Location
from registry.store.manifest import (
    MAX_SIZE,
    Listed,
    Manifest,
    TensorInfo,
    parse,
    record_document,
    slots_of,
    untagged,
)
from registry.store.pack import INNER, PackInfo, pack_path, read_pack_info
from registry.store.places import open_regular
from registry.store.text import quoted

if TYPE_CHECKING:
    import torch

    from registry.store.loading import Wanted
    from registry.store.saving import State

Result = TypeVar("Result")

_MAX_CHAIN = 8
_MOST_KEPT = 200_000
"""Tensors in the indexes of packs that are kept in memory."""

_MOST_MANIFESTS = 256
_SHARD = re.compile(r"[0-9a-f]{2}\Z")
FOLDERS = ("packs", "manifests", "tmp")


@dataclass(frozen=True, slots=True)
class Stored:
    """What a put left behind: the manifest, its digest and bytes, and the packs with the tensors that were new."""

    digest: str
    manifest: Manifest
    packs: Sequence[PackInfo]
    text: bytes

    @property
    def pack(self) -> PackInfo | None:
        """The only pack, as of a put by one process; None if nothing was new."""
        return self.packs[0] if self.packs else None


@dataclass(frozen=True, slots=True)
class Written:
    """Trees whose tensors are stored already, as by several processes, and that still lack a manifest.

    Attributes:
        components: documents by name, which refer to tensors by position.
        packs: those that hold what was new.
    """

    components: Mapping[str, Any]
    tensors: Sequence[TensorInfo]
    packs: Sequence[PackInfo]


class Store:
    """Content-addressed storage of tensor trees in a folder.

    Args:
        root: a folder; `packs`, `manifests` and `tmp` below it are created when first needed.
        index: finds stored tensors; without one, the packs' own headers are read.
    """

    def __init__(self, root: Path | str, index: Index | None = None) -> None:
        self.root = Path(root)
        self.packs, self.manifests, self.tmp = (self.root / name for name in FOLDERS)
        self.index: Index = index or FolderIndex(self.packs)
        self.distrusted: set[str] = set()
        """Packs that were found damaged; what is saved again is written again, and heals them."""
        self._recent: tuple[tuple[object, ...], Manifest] | None = None
        self._kept = _Kept()

    def __repr__(self) -> str:
        return f"Store({str(self.root)!r})"

    def encode(self, components: Mapping[str, Any]) -> State:
        """Check and encode trees for `put`, without reading a tensor's values.

        Raises:
            Unsupported: naming the path and the type of what cannot be stored.
        """
        from registry.store.saving import State
        from registry.store.tree import encode

        return State(*encode(components))

    def put(
        self,
        components: Mapping[str, Any] | State | Written,
        record: Mapping[str, Any] | None = None,
        *,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Stored:
        """Store named trees: durably, each distinct tensor once.

        Args:
            components: trees of plain values and tensors (see `docs/FORMAT.md`), by name, or what `encode` or `add`
                made of them.
            record: plain values that the manifest carries along.
            progress: told the bytes done and the bytes in all.

        Returns:
            The manifest and its digest, under which `get` finds the trees again.

        Raises:
            Unsupported: if a value cannot be represented; nothing is written.
            Corrupt: if shards that `add` stored do not make up whole tensors; no manifest is written.
            StorageError: if the system refuses; at most an orphan file is left, which `gc` removes.
        """
        from registry.store.saving import State

        plain = untagged(record_document(record or {}))  # Refused before a byte is written.
        if isinstance(components, Written):
            written = components
        else:
            state = components if isinstance(components, State) else self.encode(components)
            pack = self.add(state, progress=progress)
            written = Written(state.components, state.tensors(), [pack] if pack else [])
        manifest = Manifest(plain, written.components, written.tensors)
        if written is components:
            _ = manifest.listed  # the shards that several processes wrote must make up whole tensors
        with storage_errors(self.root):
            digest, text = self.write_manifest(manifest)
        self._kept.add_manifest(digest, manifest)
        for pack in written.packs:
            self._kept.add_pack(pack)
        return Stored(digest, manifest, written.packs, text)

    def add(
        self, state: State, *, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> PackInfo | None:
        """Store the tensors of a state, for a manifest that is written later.

        Returns:
            The pack with those that were new, if any were.
        """
        from registry.store.saving import write_new

        with storage_errors(self.root):
            packs: list[PackInfo | None] = []

            def write() -> None:
                for folder in (self.packs, self.manifests, self.tmp):
                    durable.make_folder(folder, inner=1)
                packs.append(write_new(state, self._intact, self.tmp, self.packs, progress))

            durable.again_on_trouble(write)
            return packs[-1]

    def write_manifest(self, manifest: Manifest) -> tuple[str, bytes]:
        """Write a manifest, durably, and return its digest and its bytes.

        Raises:
            Invalid: if it is too large.
        """
        data = manifest.render()
        if len(data) > MAX_SIZE:
            raise Invalid(
                f"the plain values of this checkpoint take {len(data) >> 20} MB, at most {MAX_SIZE >> 20} are "
                "stored; put long lists into tensors or arrays"
            )
        digest = digest_of(data)
        self._write_manifest_file(digest, data)
        return digest, data

    def _write_manifest_file(self, digest: str, data: bytes) -> None:
        durable.write_file(self.manifest_path(digest), data, folder=self.tmp, inner=INNER, read_only=True)

    def copy_to_new_pack(self, digests: Collection[str], bases: Mapping[str, str] | None = None) -> PackInfo:
        """Copy stored tensors to a pack of their own, verified, so that the packs they are in can go.

        Args:
            bases: by digest, the stored tensor of the same dtype and shape that one may be stored as a difference from;
                it is, where that saves a tenth.

        Raises:
            Corrupt: if a byte is not what was saved.
        """
        from registry.store.recoding import copy_to_new_pack

        with storage_errors(self.root):
            bases = bases or {}
            wanted, stored_bases = self.wanted(digests), self.wanted({*bases.values()})
            return copy_to_new_pack(wanted, stored_bases, bases, packs=self.packs, tmp=self.tmp)

    def discard_pack(self, digest: str) -> None:
        """Remove a pack that was written for nothing: nobody else can have come to rely on it, as its name is new."""
        with storage_errors(self.root):
            durable.unlink(self.pack_path(digest), inner=INNER)

    def wanted(self, digests: Collection[str]) -> list[Wanted]:
        """Stored tensors by digest alone, in the order of their places; their types are those in the packs."""
        from registry.store.loading import Wanted

        located = self.index.locate(digests)
        bases = self.bases(located)
        found: list[Wanted] = []
        for name in {place.pack for place in located.values()}:
            for tensor in self.pack_info(name).tensors:
                place = located.get(tensor.digest)
                if place and (place.pack, place.start) == (name, tensor.start):
                    info = TensorInfo(tensor.dtype, tensor.shape, tensor.digest)
                    base = self._base(info, place, bases, tensor.digest) if place.base else None
                    found.append(Wanted(len(found), info, place, tensor.digest, info.size, base))
        return found

    def get(
        self,
        digest: str,
        *,
        only: str | Sequence[str] | None = None,
        copy: bool = False,
        verify: bool = True,
        label: str = "",
    ) -> dict[str, Any]:
        """Load stored trees.

        Tensors view the packs, mapped copy-on-write: loading is instant, and training on them in place is safe
        but slow on the first write to each page.

        Args:
            digest: the manifest's.
            only: glob patterns over `component/name` paths, such as `model/conv.*`; a pattern that names a
                dict or list selects all of it. Only the bytes of what is selected are read.
            copy: read into fresh memory instead, for training in place at full speed.
            verify: check digests of what is read, in parallel.
            label: what to call the checkpoint in errors.

        Returns:
            The trees by component name; dicts are cut down to what `only` selects.

        Raises:
            NotFound: if there is no such manifest, or a pattern selects nothing.
            Corrupt: naming component, tensor and pack, if a byte is not what was saved.
        """
        from registry.store.tree import decode

        with self._reading(digest, label):
            manifest = self._recent_manifest(digest)
            documents = self._chosen(manifest, only)
            tensors = self._while_packs_move(
                lambda: self._locate(manifest, documents),
                lambda wanted: self._tensors(wanted, copy=copy, verify=verify),
            )
            return {name: decode(document, tensors.__getitem__) for name, document in documents.items()}

    @contextlib.contextmanager
    def borrowed(
        self, digest: str, only: str | Sequence[str], *, verify: bool = True, label: str = ""
    ) -> Iterator[dict[str, Any]]:
        """Stored trees whose tensors the body copies to where they are needed; as `get`, and read again behind it.

        Raises:
            Corrupt: as `get`, and if a byte was changed on the disk meanwhile, so that it is not known what was copied.
        """
        from registry.store import loading
        from registry.store.tree import decode

        with contextlib.ExitStack() as checks:
            with self._reading(digest, label):
                manifest = self._recent_manifest(digest)
                documents = self._chosen(manifest, only)

                def tensors(wanted: Sequence[Wanted]) -> dict[int, torch.Tensor]:
                    mapped = loading.Mapped(self.packs)
                    mapped.decode(wanted)
                    if verify:
                        checks.enter_context(loading.steady(self.packs, wanted, mapped))
                    return {item.slot: mapped.tensor(item) for item in wanted}

                found = self._while_packs_move(lambda: self._locate(manifest, documents), tensors)
                trees = {name: decode(document, found.__getitem__) for name, document in documents.items()}
            yield trees
            with self._reading(digest, label):
                checks.close()

    def _tensors(self, wanted: Sequence[Wanted], *, copy: bool, verify: bool) -> dict[int, torch.Tensor]:
        from registry.store import loading

        if copy:
            return loading.owned(self.packs, wanted, check=verify)
        mapped = loading.Mapped(self.packs)
        mapped.decode(wanted)
        with loading.verifying(self.packs, wanted, mapped) if verify else contextlib.nullcontext():
            return {item.slot: mapped.tensor(item) for item in wanted}

    def load_into(
        self, digest: str, targets: Mapping[str, Any], *, verify: bool = True, label: str = ""
    ) -> None:
        """Copy stored values into live tensors, such as those of `{"model": model.state_dict()}`.

        All or nothing: names, shapes, dtypes and (with `verify`) digests are checked before the first byte is
        copied. Names that the targets do not mention are left in the store.

        Raises:
            Incompatible: listing what differs; nothing was changed.
            Corrupt: as for `get`; nothing was changed.
        """
        import torch

        from registry.store.tree import box, tensor_paths, torch_type, unfillable

        with self._reading(digest, label), torch.no_grad():
            manifest = self._recent_manifest(digest)
            stored: dict[str, Listed] = {}
            live = tensor_paths(targets)
            problems = []
            for path, tensor in live.items():
                one = manifest.named.get(path)
                if one is None:
                    known = path in manifest.named
                    what = "names several tensors of the checkpoint" if known else "is not in the checkpoint"
                    problems.append(f"{path} {what}")
                    continue
                stored[path] = one
                if reason := unfillable(tensor):
                    problems.append(f"{path} is {reason}")
                    continue
                info = one.info
                if info.shape != tuple(tensor.shape):
                    problems.append(f"{path} has shape {list(tensor.shape)}, stored is {list(info.shape)}")
                elif torch_type(info.dtype) != tensor.dtype:
                    problems.append(f"{path} is {tensor.dtype}, stored is torch.{info.dtype}")
            if problems:
                more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
                raise Incompatible("; ".join(problems[:3]) + more)
            tensors: list[torch.Tensor] = []
            chosen = []
            for path, tensor in live.items():
                target = tensor.detach() if tensor.requires_grad else tensor
                for offsets, slot in stored[path].shards:
                    chosen.append((len(tensors), slot, path))
                    shape = manifest.tensors[slot].shape
                    tensors.append(target if offsets is None else box(target, offsets, shape))
            self._while_packs_move(
                lambda: self._wanted(manifest, chosen), lambda wanted: self._fill(tensors, wanted, verify)
            )

    def _fill(self, tensors: Sequence[torch.Tensor], wanted: Sequence[Wanted], verify: bool) -> None:
        from registry.store import loading

        mapped = loading.Mapped(self.packs)
        mapped.decode(wanted)
        mapped.open(wanted)
        with loading.steady(self.packs, wanted, mapped) if verify else contextlib.nullcontext():
            for item in wanted:
                if item.size:
                    tensors[item.slot].copy_(loading.view(mapped.bytes(item), item.info, 0))

    def tensors_at(
        self, digest: str, slots: Mapping[int, str], *, verify: bool = True, label: str = ""
    ) -> dict[int, torch.Tensor]:
        """Tensors of a manifest by position, mapped copy-on-write.

        Args:
            slots: the positions, and what to call each in an error.

        Raises:
            Corrupt: as for `get`.
        """
        with self._reading(digest, label):
            manifest = self._recent_manifest(digest)
            chosen = [(slot, slot, name) for slot, name in slots.items()]
            return self._while_packs_move(
                lambda: self._wanted(manifest, chosen),
                lambda wanted: self._tensors(wanted, copy=False, verify=verify),
            )

    def has(self, digest: str) -> bool:
        """Whether a manifest of this digest is stored."""
        status = places.status_of(self.manifest_path(digest), inner=INNER) if is_digest(digest) else None
        return status is not None and stat.S_ISREG(status.st_mode)

    def manifest(self, digest: str, *, text_of: Callable[[str], bytes | None] | None = None) -> Manifest:
        """Read a manifest and check it against its digest; needs no torch.

        Args:
            text_of: gives a second copy, where the file is missing or damaged; by default the index does, and the file
                is written again.

        Raises:
            NotFound: if it is not stored.
            Corrupt: if its bytes are not what was saved.
        """
        if not is_digest(digest):
            raise Invalid(f"{quoted(digest)} is not a digest of 64 hex digits")
        path = self.manifest_path(digest)
        try:
            with open_regular(path, inner=INNER) as file:
                data = file.read(MAX_SIZE + 1)
            if digest_of(data) != digest:
                raise Corrupt(f"{path}: the manifest is not what was saved; restore it from a backup")
        except Corrupt as error:
            text = (text_of or self.index.manifest_text)(digest)
            if text is None or digest_of(text) != digest:
                if isinstance(error, Missing):
                    raise NotFound(f"{path}: the manifest is missing") from None
                raise
            data = text
            if text_of is None:
                with contextlib.suppress(StorageError):
                    self._write_manifest_file(digest, data)
        return parse(data)

    def just_written(self, digest: str) -> Manifest | None:
        """The manifest of this digest, if it is the last one that was written here."""
        return self._kept.manifest(digest)

    def tensors_of(
        self, digest: str, *, text_of: Callable[[str], bytes | None] | None = None
    ) -> frozenset[str]:
        """The digests of a manifest's tensors; kept, since a manifest never changes.

        Raises:
            NotFound, Corrupt: as for `manifest`.
        """
        found = self._kept.tensors(digest)
        if found is None:
            tensors = (self._kept.manifest(digest) or self.manifest(digest, text_of=text_of)).tensors
            found = self._kept.add_tensors(digest, frozenset(tensor.digest for tensor in tensors))
        return found

    def pack_info(self, digest: str) -> PackInfo:
        """What a pack holds, from its header; kept, since a pack never changes.

        Raises:
            Corrupt: if the header is not the one that the pack's name covers.
        """
        found = self._kept.pack(digest)
        if found is None:
            found = read_pack_info(self.pack_path(digest))
            self._kept.add_pack(found)
        return found

    def _recent_manifest(self, digest: str) -> Manifest:
        """As `manifest`, parsed once for loads of the same one in a row, while its file stays as it was."""
        status = places.status_of(self.manifest_path(digest), inner=INNER) if is_digest(digest) else None
        if status is None:
            return self.manifest(digest)
        state = (digest, status.st_ino, status.st_size, status.st_mtime_ns)
        if self._recent is None or self._recent[0] != state:
            self._recent = state, self.manifest(digest)
        return self._recent[1]

    def __iter__(self) -> Iterator[str]:
        """The digests of all stored manifests, sorted."""
        return iter(names_of(self.manifests, ".json"))

    def pack_digests(self) -> Iterator[str]:
        """The digests of all pack files, sorted."""
        return iter(names_of(self.packs, ".safetensors"))

    def manifest_path(self, digest: str) -> Path:
        """Where a manifest's file is.

        Raises:
            Corrupt: if that is no digest, and so might name any file.
        """
        if not is_digest(digest):
            raise Corrupt(f"{quoted(digest)} names no manifest, as it is no digest")
        return self.manifests / digest[:2] / f"{digest}.json"

    def pack_path(self, digest: str) -> Path:
        """Where a pack's file is; see `registry.store.pack.pack_path`."""
        return pack_path(self.packs, digest)

    def pack_is_whole(self, digest: str, size: int) -> bool:
        """Whether a pack's file is there in its full size."""
        status = places.status_of(self.pack_path(digest), inner=INNER)
        return status is not None and stat.S_ISREG(status.st_mode) and status.st_size == size

    @contextlib.contextmanager
    def _reading(self, digest: str, label: str) -> Iterator[None]:
        """Name the checkpoint in what goes wrong, remember damage, and tell damage from removal."""
        from registry.store.loading import naming

        label = label or digest[:12]
        try:
            with naming(label), storage_errors(self.root):
                yield
        except (Corrupt, NotFound) as error:
            if is_digest(digest) and self.index.was_removed(digest):
                raise NotFound(f"{label} was removed while it was read") from error
            if isinstance(error, Corrupt) and error.pack and not isinstance(error, Missing):
                self.distrusted.add(error.pack)
            raise

    @staticmethod
    def _while_packs_move(
        locate: Callable[[], Sequence[Wanted]], use: Callable[[Sequence[Wanted]], Result]
    ) -> Result:
        """Use stored tensors, and look again where they lie if a pack is gone that others have replaced meanwhile."""
        wanted = locate()
        while True:
            try:
                return use(wanted)
            except Missing:
                again = locate()
                if [item.places for item in again] == [item.places for item in wanted]:
                    raise
                wanted = again

    def _intact(self, digests: Collection[str]) -> Collection[str]:
        located = self.index.locate(digests)
        bases = self.bases(located)
        packs = {place.pack: place.pack_size for place in (*located.values(), *bases.values())}
        whole = {pack for pack, size in packs.items() if self.pack_is_whole(pack, size)} - self.distrusted

        def intact(place: Location | None, depth: int = 0) -> bool:
            if place is None or place.is_damaged or place.pack not in whole or depth > _MAX_CHAIN:
                return False
            return place.base is None or intact(bases.get(place.base), depth + 1)

        return {digest for digest, place in located.items() if intact(place)}

    def bases(self, located: Mapping[str, Location]) -> dict[str, Location]:
        """Where the tensors lie that others are stored as differences from, by digest."""
        found: dict[str, Location] = {}
        wanted = {place.base for place in located.values() if place.base}
        while wanted:
            new = self.index.locate(wanted)
            found.update(new)
            wanted = {place.base for place in new.values() if place.base} - set(found)
        return found

    def _chosen(self, manifest: Manifest, only: str | Sequence[str] | None) -> Mapping[str, Any]:
        if only is None:
            return manifest.components
        patterns = [only] if isinstance(only, str) else list(only)
        names = [path for path, _ in manifest.slots]
        for pattern in patterns:
            if not manifest.select([pattern]):
                near = difflib.get_close_matches(pattern, [*manifest.components, *names], 1, 0.4)
                hint = f"; did you mean {quoted(near[0])}?" if near else ""
                if any(fnmatch.fnmatchcase(name, pattern) for name in names):
                    hint = "; the items of a list or tuple are selected together, by its own name"
                raise NotFound(f"nothing matches {quoted(pattern)}{hint}")
        return manifest.select(patterns)

    def _locate(self, manifest: Manifest, documents: Mapping[str, Any]) -> list[Wanted]:
        first: dict[int, str] = {}
        for path, slot in manifest.slots if documents is manifest.components else slots_of(documents):
            first.setdefault(slot, path)
        return self._wanted(manifest, [(slot, slot, path) for slot, path in first.items()])

    def _wanted(self, manifest: Manifest, chosen: Sequence[tuple[int, int, str]]) -> list[Wanted]:
        """What to load, from (key, slot in the manifest, path)."""
        from registry.store.loading import Wanted

        located = self.index.locate({manifest.tensors[slot].digest for _, slot, _ in chosen})
        bases = self.bases(located)
        wanted = []
        for key, slot, path in chosen:
            info = manifest.tensors[slot]
            location = located.get(info.digest)
            if location is None:
                raise Corrupt(f"{path}: no pack holds tensor {info.digest}; run: registry verify")
            base = self._base(info, location, bases, path) if location.base else None
            wanted.append(Wanted(key, info, location, path, info.size, base))
        return wanted

    def _base(
        self, info: TensorInfo, place: Location, bases: Mapping[str, Location], path: str, depth: int = 0
    ) -> Wanted:
        """What a tensor is a difference from, and what that is, if it is one too."""
        from registry.store.loading import Wanted

        assert place.base is not None
        its_place = bases.get(place.base)
        if its_place is None or depth > _MAX_CHAIN:
            raise Corrupt(f"{path}: no pack holds tensor {place.base}, which it is a difference from")
        its_info = TensorInfo(info.dtype, info.shape, place.base)
        further = self._base(its_info, its_place, bases, path, depth + 1) if its_place.base else None
        return Wanted(-1, its_info, its_place, path, info.size, further)


class FolderIndex:
    """Finds tensors by reading the headers of the packs in a folder; for a store without a catalog."""

    def __init__(self, packs: Path) -> None:
        self._packs = packs
        self._read: set[str] = set()
        self._located: dict[str, Location] = {}
        self._lock = threading.Lock()

    def locate(self, digests: Collection[str]) -> dict[str, Location]:
        with self._lock:
            self._refresh()
            return {digest: self._located[digest] for digest in digests if digest in self._located}

    def _refresh(self) -> None:
        present = names_of(self._packs, ".safetensors")
        gone = self._read.difference(present)
        if gone:
            self._read.clear()
            self._located.clear()
        for name in present:
            if name not in self._read:
                info = read_pack_info(pack_path(self._packs, name))
                self._read.add(name)
                for digest, place in info.places.items():
                    known = self._located.setdefault(digest, place)
                    if known.base and not place.base:  # what needs no other tensor is better
                        self._located[digest] = place

    def manifest_text(self, manifest_id: str) -> bytes | None:
        """There is no second copy."""
        return None

    def was_removed(self, manifest_id: str) -> bool:
        """What is in a folder was not removed."""
        return False


class _Kept:
    """What was read of packs and manifests, which never change; the oldest goes first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._packs: OrderedDict[str, PackInfo] = OrderedDict()
        self._tensors: OrderedDict[str, frozenset[str]] = OrderedDict()
        self._manifests: OrderedDict[str, Manifest] = OrderedDict()
        self._size = 0

    def pack(self, digest: str) -> PackInfo | None:
        with self._lock:
            return self._packs.get(digest)

    def add_pack(self, info: PackInfo) -> None:
        with self._lock:
            if info.digest not in self._packs:
                self._packs[info.digest] = info
                self._size += len(info.tensors)
                while self._size > _MOST_KEPT and len(self._packs) > 1:
                    _, oldest = self._packs.popitem(last=False)
                    self._size -= len(oldest.tensors)

    def tensors(self, digest: str) -> frozenset[str] | None:
        with self._lock:
            return self._tensors.get(digest)

    def add_tensors(self, digest: str, tensors: frozenset[str]) -> frozenset[str]:
        with self._lock:
            self._tensors[digest] = tensors
            while len(self._tensors) > _MOST_MANIFESTS:
                self._tensors.popitem(last=False)
        return tensors

    def manifest(self, digest: str) -> Manifest | None:
        with self._lock:
            return self._manifests.get(digest)

    def add_manifest(self, digest: str, manifest: Manifest) -> None:
        """Keep a manifest that was just written, until the next one is."""
        with self._lock:
            self._manifests.clear()
            self._manifests[digest] = manifest


def names_of(folder: Path, suffix: str) -> list[str]:
    """The digests that files below a folder of packs or manifests are named by, sorted.

    Raises:
        Corrupt: if a folder on the way is none.
    """
    found = []
    for part in places.names_in(folder, inner=1):
        if _SHARD.match(part):
            names = places.names_in(folder / part, inner=INNER)
            found += [name.removesuffix(suffix) for name in names if name.endswith(suffix)]
    return sorted(filter(is_digest, found))
