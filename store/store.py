"""The store: named trees in, a manifest's digest out, and back."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from registry.store import durable
from registry.store.digest import is_digest
from registry.store.errors import Corrupt, Missing, NotFound, RegistryError, naming, storage_errors
from registry.store.folder_index import Elsewhere, FolderIndex, ManifestFolder, PackFolder
from registry.store.locating import Index, Locator, Result, Wanted, filling
from registry.store.manifest import Manifest, TensorInfo, record_document, untagged
from registry.store.pack import INNER, PackInfo

if TYPE_CHECKING:
    import torch

    from registry.store.saving import Encoded

FOLDERS = ("packs", "manifests", "tmp")

_TRIES = 3
"""How often packs are brought that lie elsewhere, while other processes of this host need their place."""


@dataclass(frozen=True, slots=True)
class Stored:
    """What `put` has stored: the manifest, its digest and bytes, and the packs with the tensors that were new."""

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
        elsewhere: has the packs that are not in the folder.
    """

    def __init__(
        self, root: Path | str, index: Index | None = None, elsewhere: Elsewhere | None = None
    ) -> None:
        self.root = Path(root)
        self.packs, self.manifests, self.tmp = (self.root / name for name in FOLDERS)
        self.index: Index = index or FolderIndex(self.packs)
        self.distrusted: set[str] = set()
        """Packs that were found damaged; what is saved again is written again, and heals them."""
        self.elsewhere = elsewhere
        self._packs = PackFolder(self.packs, elsewhere)
        self._manifests = ManifestFolder(self.manifests, self.tmp, self.index)
        self._locator = Locator(self.index, self._packs)

    def __repr__(self) -> str:
        return f"Store({str(self.root)!r})"

    def encode(self, components: Mapping[str, Any]) -> Encoded:
        """Check and encode trees for `put`, without reading a tensor's values.

        Raises:
            Unsupported: naming the path and the type of what cannot be stored.
        """
        # Lazy: loads torch.
        from registry.store.saving import Encoded
        from registry.store.tree import encode

        documents, leaves = encode(components)
        return Encoded(documents, leaves)

    def put(
        self,
        components: Mapping[str, Any] | Encoded | Written,
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
        # Lazy: loads torch.
        from registry.store.saving import Encoded

        # Refused before a byte is written.
        plain = untagged(record_document(record or {}))
        if isinstance(components, Written):
            written = components
        else:
            state = components if isinstance(components, Encoded) else self.encode(components)
            pack = self.add(state, progress=progress)
            written = Written(state.components, state.tensors(), [pack] if pack else [])
        manifest = Manifest(plain, written.components, written.tensors)
        if written is components:
            # The shards that several processes wrote must make up whole tensors.
            _ = manifest.listed
        with storage_errors(self.root):
            digest, text = self.write_manifest(manifest)
        self._manifests.keep(digest, manifest)
        for pack in written.packs:
            self._packs.keep(pack)
        return Stored(digest=digest, manifest=manifest, packs=written.packs, text=text)

    def add(
        self, state: Encoded, *, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> PackInfo | None:
        """Store the tensors of a state, for a manifest that is written later.

        Returns:
            The pack with those that were new, if any were.

        Raises:
            StorageError: if the system refuses.
        """
        # Lazy: loads torch.
        from registry.store.saving import write_new

        known = functools.partial(self._locator.intact, distrusted=self.distrusted)
        with storage_errors(self.root):
            packs: list[PackInfo | None] = []

            def write() -> None:
                for folder in (self.packs, self.manifests, self.tmp):
                    durable.make_folder(folder, inner=1)
                packs.append(write_new(state, known, tmp=self.tmp, packs=self.packs, progress=progress))

            durable.again_on_trouble(write)
            return packs[-1]

    def copy_to_new_pack(
        self,
        digests: Collection[str],
        bases: Mapping[str, Sequence[str]] | None = None,
        into: Store | None = None,
        *,
        alone: Collection[str] = (),
        whole: Collection[str] = (),
    ) -> PackInfo:
        """Copy stored tensors to a pack of their own; see `registry.store.recoding.copy_to_new_pack`.

        Args:
            into: the store that gets the pack; this one unless given.
        """
        # Lazy: loads torch.
        from registry.store.recoding import copy_to_new_pack

        into = into or self
        with storage_errors(into.root):
            for folder in (into.packs, into.manifests, into.tmp):
                durable.make_folder(folder, inner=1)
            return self._read(
                lambda: copy_to_new_pack(
                    self._locator,
                    digests,
                    bases or {},
                    alone=alone,
                    whole=whole,
                    source=self.packs,
                    packs=into.packs,
                    tmp=into.tmp,
                )
            )

    def intact(self, digests: Iterable[str]) -> set[str]:
        """Those of the digests whose tensors are stored, with all that they are differences from, in whole packs."""
        return set(self._locator.intact(set(digests), distrusted=self.distrusted))

    def with_bases(self, digests: Collection[str]) -> set[str]:
        """Some digests, and those of the tensors that theirs are stored as differences from."""
        return self._locator.with_bases(digests)

    def discard_pack(self, digest: str) -> None:
        """Remove a pack that was written for nothing. Nobody else relies on it, as its name is new."""
        with storage_errors(self.root):
            durable.unlink(self.pack_path(digest), inner=INNER)

    def wanted(
        self, digests: Collection[str], *, broken: dict[str, RegistryError] | None = None
    ) -> list[Wanted]:
        """Stored tensors by digest alone; see `registry.store.locating.Locator.by_digest`."""
        return self._locator.by_digest(digests, broken=broken)

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
        # Lazy: loads torch.
        from registry.store.loading import load
        from registry.store.tree import decode

        with self._reading(digest, label):
            manifest = self._manifests.recent(digest)
            documents = manifest.chosen(only)
            tensors = self._read(
                lambda: self._locator.while_packs_move(
                    lambda: self._locator.in_documents(manifest, documents),
                    lambda wanted: load(self.packs, wanted, copy=copy, check=verify),
                )
            )
            return {name: decode(document, tensors.__getitem__) for name, document in documents.items()}

    @contextlib.contextmanager
    def borrowed(
        self, digest: str, only: str | Sequence[str], *, verify: bool = True, label: str = ""
    ) -> Iterator[dict[str, Any]]:
        """As `get`, for a body that copies the tensors elsewhere; behind it they are checked again.

        Raises:
            Corrupt: as `get`, and if a byte changed on the disk meanwhile, so that it is not known what was copied.
        """
        # Lazy: loads torch.
        from registry.store.loading import lent
        from registry.store.tree import decode

        with contextlib.ExitStack() as checks:
            with self._reading(digest, label):
                manifest = self._manifests.recent(digest)
                documents = manifest.chosen(only)

                found = self._read(
                    lambda: self._locator.while_packs_move(
                        lambda: self._locator.in_documents(manifest, documents),
                        lambda wanted: lent(self.packs, wanted, checks if verify else None),
                    )
                )
                trees = {name: decode(document, found.__getitem__) for name, document in documents.items()}
            yield trees
            with self._reading(digest, label):
                checks.close()

    def load_into(
        self, digest: str, targets: Mapping[str, Any], *, verify: bool = True, label: str = ""
    ) -> None:
        """Copy stored tensors into live tensors, such as those of `{"model": model.state_dict()}`.

        All or nothing: names, shapes, dtypes and (with `verify`) digests are checked before the first byte is
        copied. Names that the targets do not mention are left in the store.

        Raises:
            Incompatible: listing what differs; nothing was changed.
            Corrupt: as for `get`; nothing was changed.
        """
        # Lazy: loads torch.
        import torch

        from registry.store.filling import fill
        from registry.store.tree import tensor_paths

        with self._reading(digest, label), torch.no_grad():
            manifest = self._manifests.recent(digest)
            tensors, chosen = filling(manifest, tensor_paths(targets))
            self._read(
                lambda: self._locator.while_packs_move(
                    lambda: self._locator.chosen(manifest, chosen),
                    lambda wanted: fill(self.packs, tensors, wanted, check=verify),
                )
            )

    def tensors_at(
        self, digest: str, slots: Mapping[int, str], *, verify: bool = True, label: str = ""
    ) -> dict[int, torch.Tensor]:
        """Tensors of a manifest by position, mapped copy-on-write.

        Args:
            slots: the positions, and what to call each in an error.

        Raises:
            Corrupt: as for `get`.
        """
        # Lazy: loads torch.
        from registry.store.loading import load

        with self._reading(digest, label):
            manifest = self._manifests.recent(digest)
            chosen = [(slot, slot, name) for slot, name in slots.items()]
            return self._read(
                lambda: self._locator.while_packs_move(
                    lambda: self._locator.chosen(manifest, chosen),
                    lambda wanted: load(self.packs, wanted, copy=False, check=verify),
                )
            )

    def __iter__(self) -> Iterator[str]:
        """The digests of all stored manifests, sorted."""
        return iter(self._manifests.digests())

    def has(self, digest: str) -> bool:
        """Whether a manifest of this digest is stored."""
        return self._manifests.has(digest)

    def manifest(self, digest: str, *, text_of: Callable[[str], bytes | None] | None = None) -> Manifest:
        """Read a manifest; see `registry.store.folder_index.ManifestFolder.read`."""
        return self._manifests.read(digest, text_of=text_of)

    def just_written(self, digest: str) -> Manifest | None:
        """The manifest of this digest, if it is the last one that was written here."""
        return self._manifests.just_written(digest)

    def tensors_of(
        self, digest: str, *, text_of: Callable[[str], bytes | None] | None = None
    ) -> frozenset[str]:
        """The digests of a manifest's tensors; see `registry.store.folder_index.ManifestFolder.tensors_of`."""
        return self._manifests.tensors_of(digest, text_of=text_of)

    def write_manifest(self, manifest: Manifest) -> tuple[str, bytes]:
        """Write a manifest; see `registry.store.folder_index.ManifestFolder.write`."""
        return self._manifests.write(manifest)

    def manifest_path(self, digest: str) -> Path:
        """Where a manifest's file is; see `registry.store.folder_index.ManifestFolder.path`."""
        return self._manifests.path(digest)

    def pack_digests(self) -> Iterator[str]:
        """The digests of all pack files, sorted."""
        return iter(self._packs.digests())

    def pack_info(self, digest: str) -> PackInfo:
        """What a pack holds, from its header; see `registry.store.folder_index.PackFolder.info`."""
        return self._packs.info(digest)

    def pack_path(self, digest: str) -> Path:
        """Where a pack's file is; see `registry.store.pack.pack_path`."""
        return self._packs.path(digest)

    def pack_is_whole(self, digest: str, size: int) -> bool:
        """Whether a pack's file is there in its full size, in bytes."""
        return self._packs.is_whole(digest, size)

    def pack_is_here(self, digest: str, size: int) -> bool:
        """Whether a pack's file is in this folder in its full size, in bytes."""
        return self._packs.is_here(digest, size)

    def bring(self, packs: Mapping[str, int]) -> None:
        """Bring packs that lie elsewhere; see `registry.store.folder_index.PackFolder.bring`."""
        with storage_errors(self.root):
            self._packs.bring(packs)

    def _read(self, read: Callable[[], Result]) -> Result:
        """Read from packs. One that lies elsewhere as well is brought again if it is damaged here, or went meanwhile."""
        with contextlib.ExitStack() as undisturbed:
            for attempt in range(_TRIES):
                try:
                    return read()
                except Corrupt as error:
                    is_gone = isinstance(error, Missing)
                    tries = _TRIES if is_gone else 2 if error.pack else 1
                    if self.elsewhere is None or attempt + 1 >= tries:
                        raise
                    if error.pack and not is_gone:
                        durable.unlink(self.pack_path(error.pack), inner=INNER)
                    elif not attempt:
                        # Another process of this host, or another thread, needed its place.
                        undisturbed.enter_context(self.elsewhere.undisturbed())
        raise AssertionError

    @contextlib.contextmanager
    def _reading(self, digest: str, label: str) -> Iterator[None]:
        """Name the checkpoint in what goes wrong, remember damage, and tell damage from removal."""
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
