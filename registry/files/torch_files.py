"""`.pt` files, which are pickles, and read only through `torch.load(weights_only=True)`.

`weights_only` keeps a file from running code, but not from asking for more memory than there is. What such a
file can ask for is bounded here: compressed entries, buffers that are made by their length alone, trees that
refer to themselves, and tensors that unfold to many times the file.
"""

from __future__ import annotations

import io
import logging
import mmap
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from registry.files import pickled
from registry.files.foreign import kind_of
from registry.files.imported import Imported, check_content, file_status, source_of, stamp_of, values
from registry.files.layouts import fields_of, network_of_timm, split, tree_of
from registry.store.errors import Invalid, Unsupported, storage_errors
from registry.store.text import printable, quoted

if TYPE_CHECKING:
    from registry.checkpoints.checkpoint import Checkpoint
    from registry.files.outgoing import Outgoing

_logger = logging.getLogger(__name__)

_ADVICE = "save it again from its own program as a plain state dict: torch.save(model.state_dict(), ...)"

_LEGACY = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""The pickled number that every file of torch.save before 1.6 starts with."""

_ZIP = b"PK\x03\x04"
"""What every other file of torch.save starts with."""

_BYTEARRAY = re.compile(rb"c(?:__builtin__|builtins)\nbytearray\n")
"""The pickled name of `bytearray`, which makes as many zeros as a file says."""

_MAX_VALUES = 20_000_000
"""Values of the largest tree that is read."""

_MAX_TEXT = 256 << 20
"""Characters and bytes of all its strings together."""

_UNFOLDING = 16
"""Times a file's size: the bytes that its tensors may take in memory, and the number of its values."""

_SLACK = 64 << 20
"""Bytes that the tensors of even the smallest file may take in memory."""


def read(path: Path) -> Imported:
    """What a file of `torch.save` holds, taken apart into components and fields.

    A dict of tensors alone is the component `model`. In a dict of more, the keys of `layouts.COMPONENT_KEYS` are
    components, those of `layouts.FIELD_KEYS` fields, and the rest makes up the component `extra`; a dict without any
    component key, or anything else that has tensors, is `model` as it is.

    Raises:
        NotFound, Invalid, Unsupported: as `read_torch_file`.
        Invalid: if it holds no tensors.
    """
    status = file_status(path)
    tree = read_torch_file(path)
    components, layout = split(tree)
    check_content(path, components)
    source = source_of(path, status, "torch") | {"layout": layout}
    return Imported(
        components,
        **fields_of(tree),
        source=source,
        provenance=network_of_timm(tree),
        stamps={path: stamp_of(status)},
    )


def write(checkpoint: Checkpoint, component: str | None, file: Outgoing, *, verify: bool = True) -> None:
    """Write a checkpoint, or one component of it, as a `.pt` file; see `layouts.tree_of` for how it is laid out.

    Tensors are written contiguous and without `requires_grad`; tied tensors stay tied.

    Raises:
        NotFound: if the checkpoint has no such component.
        Unsupported: if torch cannot write a value.
        Corrupt: if a stored byte is not what was saved.
        Conflict, StorageError: as `Outgoing.opened`.
    """
    tree = tree_of(checkpoint, component, verify=verify)
    contents = checkpoint.record["components"]
    total = sum(held["bytes"] for name, held in contents.items() if component in (None, name))
    with file.opened(total) as take:
        write_torch_file(tree, take)


def read_torch_file(path: Path) -> Any:
    """What a `.pt` or `.pth` file holds, on the CPU; tensors are mapped from the file where it allows that.

    Raises:
        NotFound: if there is no such file.
        Unsupported: if it needs code to run, naming what; nothing falls back to unsafe pickle.
        Invalid: if it is not a file of `torch.save`, or one that is made to exhaust memory.
    """
    try:
        return _tree_in(path)
    except (Invalid, Unsupported) as error:
        with storage_errors(path):
            kind = kind_of(path) if path.is_file() else None
        if kind is None:
            raise
        raise kind.about(printable(str(path))) from error


def read_torch_bytes(data: bytes, shown: str) -> Any:
    """What the bytes of a file of `torch.save` hold, such as one of those inside a file of torch.distributed.checkpoint.

    Args:
        shown: what errors call it.

    Raises:
        Unsupported, Invalid: as `read_torch_file`.
    """
    if not data.startswith(_ZIP):
        raise Invalid(f"{shown}: not a file of torch.save, by its first bytes")
    return _loaded(io.BytesIO(data), len(data), shown, zipped=True)


def write_torch_file(tree: Any, write: Callable[[memoryview], object]) -> None:
    """Write a tree as a `.pt` file, front to back, one tensor at a time.

    Args:
        write: takes the next bytes; what it raises comes out of here.

    Raises:
        Unsupported: if torch cannot write the tree.
    """
    sink = _Sink(write)
    try:
        has_empty_bytes = any(type(value) is bytes and not value for value in values(tree))
        module = pickled.FOR_EMPTY_BYTES if has_empty_bytes else pickle
        torch.save(tree, sink, pickle_module=module)  # type: ignore[arg-type]
    except Exception as error:
        if sink.error is not None:
            # Torch reports only that the writing stopped.
            raise sink.error from None
        text = str(error).partition("\n")[0]
        raise Unsupported(f"torch cannot write this as a .pt file: {quoted(text)}") from error


def _tree_in(path: Path) -> Any:
    size = file_status(path).st_size
    shown = printable(str(path))
    if any("\ud800" <= character <= "\udfff" for character in str(path)):
        raise Unsupported(f"{shown}: its name is not UTF-8, and torch cannot open it", "rename it")
    with storage_errors(path), path.open("rb") as file:
        head = file.read(32)
    zipped = head.startswith(_ZIP)
    if not zipped and _LEGACY not in head:
        if head[:1] == b"\x80":
            raise Unsupported(f"{shown}: a bare pickle, reading it could run code", _ADVICE)
        raise Invalid(f"{shown}: not a file of torch.save, by its first bytes")
    if not zipped and _names_bytearray(path):
        raise _bytearray_error(shown)
    with storage_errors(path):
        return _loaded(path, size, shown, zipped=zipped)


def _loaded(source: Path | io.BytesIO, size: int, shown: str, *, zipped: bool) -> Any:
    """What a file of `size` bytes holds; see `read_torch_file`. From a path its tensors are mapped."""
    if zipped:
        _check_archive(source, size, shown)
    if isinstance(source, io.BytesIO):
        source.seek(0)
    mapped = zipped and isinstance(source, Path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with torch.serialization.safe_globals(pickled.ALLOWED):
                tree = torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)
    except OSError:
        raise
    except Exception as error:
        raise _refused(source, shown, zipped, error) from error
    try:
        _check_extent(tree, size)
        tree, count = pickled.plain(tree)
    except Invalid as error:
        raise error.about(shown) from None
    except RecursionError:
        raise Invalid(f"{shown}: its tuples nest deeper than anything that can be stored") from None
    if count:
        _logger.warning("%s: an argparse.Namespace is read as a dict", shown)
    return tree


def _check_archive(source: Path | io.BytesIO, size: int, shown: str) -> None:
    """Refuse archives that unpack to more than they take, which `torch.save` never writes."""
    try:
        with zipfile.ZipFile(source) as archive:
            entries = archive.infolist()
            packed = next((e for e in entries if e.compress_type != zipfile.ZIP_STORED), None)
            if packed or sum(entry.file_size for entry in entries) > size:
                raise Invalid(f"{shown}: a compressed archive, not a file of torch.save", "unpack it first")
            pickles = [entry for entry in entries if entry.filename.endswith("data.pkl")]
            if any(_BYTEARRAY.search(archive.read(entry)) for entry in pickles):
                raise _bytearray_error(shown)
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        text = printable(str(error).partition("\n")[0])[:160]
        raise Invalid(f"{shown}: not a readable file of torch.save ({text})", "it may be cut short") from None


def _names_bytearray(path: Path) -> bool:
    """Whether a file that is no archive names `bytearray`."""
    with (
        storage_errors(path),
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
        return _BYTEARRAY.search(data) is not None


def _bytearray_error(shown: str) -> Unsupported:
    """The error for a file that holds a bytearray."""
    return Unsupported(
        f"{shown}: holds a bytearray, which cannot be stored", f"convert it to bytes, then {_ADVICE}"
    )


def _refused(source: Path | io.BytesIO, shown: str, zipped: bool, error: Exception) -> Invalid | Unsupported:
    """The error for a file that `torch.load` has refused."""
    blocked = _blocked(source) if zipped else ()
    if blocked:
        names = ", ".join(printable(name[:80]) for name in sorted(blocked)[:5])
        return Unsupported(f"{shown}: loading it would run code ({names})", _ADVICE)
    text = str(error)
    if re.search("Unsupported|Weights only|weights_only", text):
        return Unsupported(
            f"{shown}: not a plain state dict, loading it could run code ({_reason(error)})", _ADVICE
        )
    first = printable(text.strip().partition("\n")[0])[:160] or type(error).__name__
    return Invalid(f"{shown}: not a readable file of torch.save ({first})")


def _blocked(source: Path | io.BytesIO) -> set[str]:
    """The names in a file that are not allowed; empty if they cannot be told."""
    try:
        if isinstance(source, io.BytesIO):
            source.seek(0)
        with torch.serialization.safe_globals(pickled.ALLOWED):
            return set(torch.serialization.get_unsafe_globals_in_checkpoint(source))
    except Exception:
        return set()


def _reason(error: Exception) -> str:
    """What `torch.load` says that it refuses."""
    text = str(error)
    named = re.search(r"GLOBAL (\S+)", text)
    if named:
        return printable(named[1][:80])
    telling = [line for line in text.splitlines() if re.search("nsupported|weights_only", line)]
    return printable(telling[0].strip())[:160] if telling else type(error).__name__


def _check_extent(tree: Any, size: int) -> None:
    """Refuse a tree that a small file can describe but no disk can hold.

    Raises:
        Invalid: with what unfolds beyond reason.
    """
    seen: set[tuple[object, ...]] = set()
    unfolded = text = 0
    limit = min(_UNFOLDING * size + 10_000, _MAX_VALUES)
    for count, value in enumerate(values(tree)):
        if isinstance(value, torch.Tensor):
            if value.layout != torch.strided or value.device.type == "meta" or value.is_nested:
                # The store refuses these by name.
                continue
            view = (value.data_ptr(), tuple(value.shape), value.stride(), value.dtype)
            if view not in seen:
                seen.add(view)
                unfolded += value.numel() * value.element_size()
        elif isinstance(value, str | bytes):
            text += len(value)
        if count > limit or text > _MAX_TEXT:
            raise Invalid(
                "its values refer to each other so often that they unfold beyond what can be stored"
            )
        if unfolded > _UNFOLDING * size + _SLACK:
            raise Invalid(f"its tensors unfold to over {unfolded} bytes, the file has only {size}")


class _Sink:
    """What `torch.save` needs of a file."""

    def __init__(self, write: Callable[[memoryview], object]) -> None:
        self._write = write
        self.error: BaseException | None = None

    def write(self, data: memoryview) -> int:
        if self.error is None:
            try:
                self._write(data)
            except BaseException as error:
                self.error = error
                raise
        return len(data)

    def flush(self) -> None:
        """Nothing is held back."""
