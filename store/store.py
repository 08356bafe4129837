"""The store: named trees in, a manifest's digest out, and back."""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import os
import stat
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from registry.store import durable
from registry.store.digest import digest as digest_of
from registry.store.digest import is_digest
from registry.store.durable import storage_errors
from registry.store.errors import Corrupt, Incompatible, Invalid, NotFound
from registry.store.location import Index, Location
from registry.store.manifest import MAX_SIZE, Listed, Manifest, TensorInfo, parse, record_document, slots_of
from registry.store.pack import PackInfo, open_regular, pack_path, read_pack_info
from registry.store.text import quoted

if TYPE_CHECKING:
    import torch

    from registry.store.loading import Wanted
    from registry.store.saving import State

_MAX_CHAIN = 8
FOLDERS = ("packs", "manifests", "tmp")


@dataclass(frozen=True, slots=True)
class Stored:
    """What a put left behind: the manifest, its digest, and the packs with the tensors that were new."""

    digest: str
    manifest: Manifest
    packs: Sequence[PackInfo]

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

        record_document(record or {})  # refused before a byte is written
        if isinstance(components, Written):
            written = components
        else:
            state = components if isinstance(components, State) else self.encode(components)
            pack = self.add(state, progress=progress)
            written = Written(state.components, state.tensors(), [pack] if pack else [])
        manifest = Manifest(dict(record or {}), written.components, written.tensors)
        if written is components:
            _ = manifest.listed  # the shards that several processes wrote must make up whole tensors
        with storage_errors(self.root):
            return Stored(self.write_manifest(manifest), manifest, written.packs)

    def add(
        self, state: State, *, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> PackInfo | None:
        """Store the tensors of a state, for a manifest that is written later.

        Returns:
            The pack with those that were new, if any were.
        """
        from registry.store.saving import write_new

        with storage_errors(self.root):
            for folder in (self.packs, self.manifests, self.tmp):
                durable.make_folder(folder)
            packs: list[PackInfo | None] = []

            def write() -> None:
                packs.append(write_new(state, self._intact, self.tmp, self.packs, progress))

            durable.twice_on_io_error(write)
            if packs[-1]:
                self.distrusted.discard(packs[-1].digest)  # a pack of this name was written anew
            return packs[-1]

    def write_manifest(self, manifest: Manifest) -> str:
        """Write a manifest, durably, and return its digest.

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
        durable.write_file(self.manifest_path(digest), data, folder=self.tmp, read_only=True)
        return digest

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
            return copy_to_new_pack(self, digests, bases or {})

    def wanted(self, digests: Collection[str]) -> list[Wanted]:
        """Stored tensors by digest alone, in the order of their places; their types are those in the packs."""
        from registry.store.loading import Wanted

        located = self.index.locate(digests)
        bases = self.bases(located)
        found: list[Wanted] = []
        for name in {place.pack for place in located.values()}:
            for tensor in read_pack_info(self.pack_path(name)).tensors:
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
        from registry.store import loading
        from registry.store.tree import decode

        with loading.naming(label or digest[:12]), self._noting_damage():
            manifest = self._recent_manifest(digest)
            documents = self._chosen(manifest, only)
            wanted = self._locate(manifest, documents)
            tensors: dict[int, torch.Tensor]
            if copy:
                tensors = loading.owned(self.packs, wanted, check=verify)
            else:
                mapped = loading.Mapped(self.packs)
                mapped.decode(wanted)
                checking = (
                    loading.verifying(self.packs, wanted, mapped) if verify else contextlib.nullcontext()
                )
                with checking:
                    tensors = {item.slot: mapped.tensor(item) for item in wanted}
            return {name: decode(document, tensors.__getitem__) for name, document in documents.items()}

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

        from registry.store import loading
        from registry.store.tree import box, is_plain, memory_of, tensor_paths, torch_type, unfillable

        with loading.naming(label or digest[:12]), self._noting_damage(), torch.no_grad():
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
            wanted = self._wanted(manifest, chosen)
            mapped = loading.Mapped(self.packs)
            mapped.decode(wanted)
            mapped.open(wanted)
            if verify:
                loading.verify(self.packs, wanted, mapped)
            direct = []
            for item in wanted:
                if item.size and not item.base and is_plain(tensors[item.slot]):
                    direct.append(item)
                else:
                    tensors[item.slot].copy_(mapped.tensor(item))
            loading.read_into(self.packs, direct, lambda item: memory_of(tensors[item.slot], item.info.dtype))

    def tensors_at(
        self, digest: str, slots: Mapping[int, str], *, verify: bool = True, label: str = ""
    ) -> dict[int, torch.Tensor]:
        """Tensors of a manifest by position, mapped copy-on-write.

        Args:
            slots: the positions, and what to call each in an error.

        Raises:
            Corrupt: as for `get`.
        """
        from registry.store import loading

        with loading.naming(label or digest[:12]), self._noting_damage():
            manifest = self._recent_manifest(digest)
            wanted = self._wanted(manifest, [(slot, slot, name) for slot, name in slots.items()])
            mapped = loading.Mapped(self.packs)
            mapped.decode(wanted)
            if verify:
                loading.verify(self.packs, wanted, mapped)
            return {item.slot: mapped.tensor(item) for item in wanted}

    def has(self, digest: str) -> bool:
        """Whether a manifest of this digest is stored."""
        return is_digest(digest) and self.manifest_path(digest).is_file()

    def manifest(self, digest: str) -> Manifest:
        """Read a manifest and check it against its digest; needs no torch.

        Raises:
            NotFound: if it is not stored.
            Corrupt: if its bytes are not what was saved.
        """
        if not is_digest(digest):
            raise Invalid(f"{quoted(digest)} is not a digest of 64 hex digits")
        path = self.manifest_path(digest)
        if not os.path.lexists(path):
            raise NotFound(f"{path}: the manifest is missing")
        with open_regular(path) as file:
            data = file.read(MAX_SIZE + 1)
        if digest_of(data) != digest:
            raise Corrupt(f"{path}: the manifest is not what was saved; restore it from a backup")
        return parse(data)

    def _recent_manifest(self, digest: str) -> Manifest:
        """As `manifest`, parsed once for loads of the same one in a row, while its file stays as it was."""
        path = self.manifest_path(digest) if is_digest(digest) else None
        if path and path.exists():
            status = path.lstat()
            state = (digest, status.st_ino, status.st_size, status.st_mtime_ns)
            if self._recent is None or self._recent[0] != state:
                self._recent = state, self.manifest(digest)
            return self._recent[1]
        return self.manifest(digest)

    def __iter__(self) -> Iterator[str]:
        """The digests of all stored manifests, sorted."""
        return iter(sorted(path.stem for path in self.manifests.glob("??/*.json") if is_digest(path.stem)))

    def pack_digests(self) -> Iterator[str]:
        """The digests of all pack files, sorted."""
        return iter(FolderIndex.names(self.packs))

    def manifest_path(self, digest: str) -> Path:
        if not is_digest(digest):
            raise Corrupt(
                f"the catalog names a manifest {quoted(digest)}, which is no digest; run: registry rebuild"
            )
        return self.manifests / digest[:2] / f"{digest}.json"

    def pack_path(self, digest: str) -> Path:
        return pack_path(self.packs, digest)

    def pack_is_whole(self, digest: str, size: int) -> bool:
        """Whether a pack's file is there in its full size."""
        try:
            status = self.pack_path(digest).lstat()
            return stat.S_ISREG(status.st_mode) and status.st_size == size
        except FileNotFoundError:
            return False

    @contextlib.contextmanager
    def _noting_damage(self) -> Iterator[None]:
        try:
            yield
        except Corrupt as error:
            if error.pack:
                self.distrusted.add(error.pack)
            raise

    def _intact(self, digests: Collection[str]) -> Collection[str]:
        located = self.index.locate(digests)
        bases = self.bases(located)
        packs = {place.pack: place.pack_size for place in (*located.values(), *bases.values())}
        whole = {pack for pack, size in packs.items() if self.pack_is_whole(pack, size)} - self.distrusted

        def intact(place: Location | None, depth: int = 0) -> bool:
            if place is None or place.pack not in whole or depth > _MAX_CHAIN:
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
        present = self.names(self._packs)
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

    @staticmethod
    def names(packs: Path) -> list[str]:
        stems = (path.name.removesuffix(".safetensors") for path in packs.glob("??/*.safetensors"))
        return sorted(stem for stem in stems if is_digest(stem))
