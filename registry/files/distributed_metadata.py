"""The `.metadata` file of torch.distributed.checkpoint: which name lies in which part of which file.

It is a pickle. Nothing of torch is made from it: each class that such a file has is stood for by a record that only keeps
what it is given, and any other name, or any operation that such a file does not need, is refused.

Place: some bytes of a file. Piece: a box of a tensor, and its place. Entry: a tensor or another value, and its pieces.
"""

from __future__ import annotations

import io
import math
import pickle
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import numpy
import torch

from registry.store import header
from registry.store.errors import Invalid, Unsupported
from registry.store.text import printable, quoted

_MAX_DEPTH = 64
"""Keys of the longest path."""

_MAX_PIECES = 20_000
"""Pieces of one tensor."""

_MODULE = "torch.distributed.checkpoint.metadata"


@dataclass(frozen=True)
class Place:
    """Bytes of a file beside the metadata."""

    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class Piece:
    """A box of a tensor; `offsets` and `sizes` have one number for each of its dimensions. A value has none."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    place: Place


@dataclass(frozen=True)
class Entry:
    """A tensor, or another value, which has no dtype and a single piece.

    Attributes:
        path: where it stands in the state dict; a number is a place in a list.
        pieces: those that hold at least one element; they fill the tensor and do not overlap.
    """

    name: str
    path: tuple[str | int, ...]
    dtype: torch.dtype | None
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


def parse(data: bytes) -> list[Entry]:
    """What a `.metadata` file lists.

    Raises:
        Unsupported: if it names anything but the classes of torch's own metadata, or something that cannot be stored.
        Invalid: if it is malformed, its pieces do not make up its tensors, or two of them share bytes.
    """
    try:
        root = _fields(_Unpickler(io.BytesIO(data)).load(), _Metadata)
        entries = list(_entries(root))
    except (Invalid, Unsupported):
        raise
    except Exception as error:
        # The file decides which error an operation of pickle ends with.
        raise Invalid(
            f"not the metadata of a torch.distributed checkpoint ({type(error).__name__})"
        ) from None
    if not 0 < len(entries) <= header.MAX_TENSORS:
        raise Invalid(f"lists {len(entries):,} names; from 1 to {header.MAX_TENSORS:,} are read")
    _check_places(entries)
    return entries


class _Record:
    """Stands for a class of torch; `state` is what an instance was pickled with."""

    state: Any = None


class _Metadata(_Record): ...


class _TensorMetadata(_Record): ...


class _BytesMetadata(_Record): ...


class _Chunk(_Record): ...


class _Properties(_Record): ...


class _Index(_Record): ...


class _Storage(_Record): ...


class _About(_Record): ...


def _numbers(values: Any = ()) -> tuple[int, ...]:
    """Stands for `torch.Size`."""
    if not isinstance(values, tuple | list) or not all(type(value) is int and value >= 0 for value in values):
        raise Invalid("a shape in it is not made of whole numbers")
    return tuple(values)


def _word(*values: Any) -> Any:
    """Stands for what is called with a name or a number and matters no further, such as a memory format."""
    return values[0] if values else None


_STAND_INS: dict[tuple[str, str], Any] = {
    (_MODULE, "Metadata"): _Metadata,
    (_MODULE, "TensorStorageMetadata"): _TensorMetadata,
    (_MODULE, "BytesStorageMetadata"): _BytesMetadata,
    (_MODULE, "ChunkStorageMetadata"): _Chunk,
    (_MODULE, "TensorProperties"): _Properties,
    (_MODULE, "MetadataIndex"): _Index,
    (_MODULE, "StorageMeta"): _About,
    (_MODULE, "_MEM_FORMAT_ENCODING"): _word,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _Storage,
    ("torch", "Size"): _numbers,
    ("torch", "device"): _word,
    ("torch.serialization", "_get_layout"): _word,
    ("collections", "OrderedDict"): OrderedDict,
    **{
        (module, name): _word
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")
    },
}
"""What is made in the place of each name that may be in the file, besides the dtypes of torch."""

_OPERATIONS = (
    *(pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.GLOBAL, pickle.STACK_GLOBAL),
    *(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BININT, pickle.BININT1, pickle.BININT2),
    *(pickle.LONG1, pickle.LONG4, pickle.BINFLOAT),
    *(pickle.SHORT_BINUNICODE, pickle.BINUNICODE, pickle.BINUNICODE8),
    *(pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3),
    *(pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS, pickle.EMPTY_DICT, pickle.SETITEM, pickle.SETITEMS),
    *(pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE, pickle.BINGET, pickle.LONG_BINGET),
)
"""The operations of pickle that such a file needs, besides those that make objects."""


class _Unpickler(pickle._Unpickler):
    """Reads a pickle of records and plain values.

    It is the one in Python, not the one in C: that makes room for as many objects as a file says.
    """

    stack: list[Any]

    def find_class(self, module: str, name: str) -> Any:
        found = _STAND_INS.get((module, name))
        if found is None and module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            found = getattr(torch, name)
        if found is None:
            named = printable(f"{module}.{name}")[:80]
            raise Unsupported(
                f"loading it could run code ({named})",
                "save it again with dcp.save, from plain dicts of tensors and numbers",
            )
        return found

    def make(self) -> None:
        """An instance of a record, in the place of its class."""
        arguments, kind = self.stack.pop(), self.stack[-1]
        if arguments or not (isinstance(kind, type) and issubclass(kind, _Record)):
            raise Invalid("makes an object that such a file does not have")
        self.stack[-1] = kind()

    def call(self) -> None:
        """What a function of the table gives, in its place."""
        arguments, function = self.stack.pop(), self.stack[-1]
        if not any(function is allowed for allowed in _STAND_INS.values()):
            raise Invalid("calls what such a file does not call")
        self.stack[-1] = function(*arguments)

    def fill(self) -> None:
        """A record gets its state."""
        state, record = self.stack.pop(), self.stack[-1]
        if not isinstance(record, _Record):
            raise Invalid("fills an object that such a file does not have")
        record.state = state

    dispatch: ClassVar[dict[int, Any]] = {
        **{operation[0]: pickle._Unpickler.dispatch[operation[0]] for operation in _OPERATIONS},
        pickle.NEWOBJ[0]: make,
        pickle.REDUCE[0]: call,
        pickle.BUILD[0]: fill,
    }


def _fields(record: Any, kind: type[_Record]) -> dict[str, Any]:
    """The state of a record of a kind, which must be a table."""
    if not isinstance(record, kind) or not isinstance(record.state, dict):
        raise Invalid(f"malformed: something else stands in the place of a {kind.__name__[1:]}")
    return record.state


def _table(value: Any, about: str) -> Mapping[Any, Any]:
    if not isinstance(value, dict):
        raise Invalid(f"malformed: {about} is not a table")
    return value


def _entries(root: Mapping[str, Any]) -> Iterator[Entry]:
    """The entries, in the order of the file."""
    places: dict[tuple[str, tuple[int, ...] | None], Place] = {}
    for record, storage in _table(root["storage_data"], "the list of places").items():
        index = _fields(record, _Index)
        offset = index.get("offset")
        key = (index["fqn"], None if offset is None else _numbers(offset))
        if key in places:
            raise Invalid(f"lists a part of {quoted(str(key[0]))} twice")
        places[key] = _place(key[0], _fields(storage, _Storage))
    planned = root.get("planner_data")
    paths = {} if planned is None else _table(planned, "the list of paths")
    for name, about in _table(root["state_dict_metadata"], "the list of names").items():
        header.check_name(name)
        path = _path(name, paths.get(name, (name,)))
        if isinstance(about, _BytesMetadata):
            yield Entry(name, path, None, (), (Piece((), (), _at(places, name, None)),))
        else:
            yield _tensor(name, path, _fields(about, _TensorMetadata), places)


def _place(name: str, storage: Mapping[str, Any]) -> Place:
    file, offset, length = (storage[key] for key in ("relative_path", "offset", "length"))
    if not isinstance(file, str) or not (type(offset) is int and type(length) is int):
        raise Invalid(f"malformed: the place of {quoted(str(name))} is none")
    if offset < 0 or length <= 0:
        raise Invalid(f"the place of {quoted(str(name))} is outside its file")
    if storage.get("transform_descriptors"):
        raise Unsupported(
            f"{quoted(str(name))} was changed by extensions while it was written",
            "load it in the program that has them, and save it with dcp.save without extensions",
        )
    return Place(file, offset, length)


def _path(name: str, path: Any) -> tuple[str | int, ...]:
    if not isinstance(path, tuple | list) or not 0 < len(path) <= _MAX_DEPTH:
        raise Invalid(f"malformed: the path of {quoted(name)} is none")
    if not all(type(key) is str or (type(key) is int and key >= 0) for key in path):
        raise Invalid(f"malformed: the path of {quoted(name)} is not made of names and places")
    return tuple(path)


def _at(places: Mapping[Any, Place], name: str, offset: tuple[int, ...] | None) -> Place:
    place = places.get((name, offset))
    if place is None:
        where = f" at {list(offset)}" if offset else ""
        raise Invalid(f"does not say where {quoted(name)}{where} lies")
    return place


def _tensor(name: str, path: tuple[str | int, ...], about: Mapping[str, Any], places: Any) -> Entry:
    properties = about["properties"]
    if not isinstance(properties, _Properties) or not isinstance(properties.state, tuple):
        raise Invalid(f"malformed: the properties of {quoted(name)} are none")
    dtype, layout = properties.state[:2]
    if not isinstance(dtype, torch.dtype):
        raise Invalid(f"malformed: {quoted(name)} has no dtype")
    if layout != "torch.strided":
        raise Unsupported(
            f"{quoted(name)} is a tensor of layout {quoted(str(layout))[:40]}", "make it dense first"
        )
    shape = _numbers(about["size"])
    if math.prod(max(size, 1) for size in shape) >= 1 << 62:
        raise Invalid(f"{quoted(name)} has a shape that no tensor has")
    chunks = about["chunks"]
    if not isinstance(chunks, list) or len(chunks) > _MAX_PIECES:
        raise Invalid(f"malformed: {quoted(name)} has no list of at most {_MAX_PIECES:,} pieces")
    pieces = []
    for chunk in chunks:
        box = _fields(chunk, _Chunk)
        offsets, sizes = _numbers(box["offsets"]), _numbers(box["sizes"])
        if len(offsets) != len(shape) or len(sizes) != len(shape):
            raise Invalid(f"a piece of {quoted(name)} has another number of dimensions than the tensor")
        if math.prod(sizes):
            pieces.append(Piece(offsets, sizes, _at(places, name, offsets)))
    _check_pieces(name, shape, dtype, pieces)
    return Entry(name, path, dtype, shape, tuple(pieces))


def _check_pieces(name: str, shape: tuple[int, ...], dtype: torch.dtype, pieces: list[Piece]) -> None:
    """Refuse pieces that leave their tensor, overlap, leave something out, or have fewer bytes than elements."""
    for piece in pieces:
        if any(
            start + size > whole for start, size, whole in zip(piece.offsets, piece.sizes, shape, strict=True)
        ):
            raise Invalid(f"a piece of {quoted(name)} at {list(piece.offsets)} lies outside the tensor")
        if math.prod(piece.sizes) * dtype.itemsize > piece.place.length:
            raise Invalid(f"a piece of {quoted(name)} at {list(piece.offsets)} is larger than its bytes")
    filled = sum(math.prod(piece.sizes) for piece in pieces)
    if filled < math.prod(shape):
        raise Invalid(f"the pieces of {quoted(name)} have {filled:,} of its {math.prod(shape):,} elements")
    form = (len(pieces), len(shape))
    starts = numpy.array([piece.offsets for piece in pieces], numpy.int64).reshape(form)
    ends = starts + numpy.array([piece.sizes for piece in pieces], numpy.int64).reshape(form)
    for one in range(len(pieces) - 1):
        rest = slice(one + 1, None)
        if ((starts[one] < ends[rest]) & (starts[rest] < ends[one])).all(axis=1).any():
            raise Invalid(f"pieces of {quoted(name)} overlap")


def _check_places(entries: list[Entry]) -> None:
    """Refuse places that share bytes, by which a small file would become large."""
    places = sorted((piece.place for entry in entries for piece in entry.pieces), key=_order)
    for one, other in pairwise(places):
        if one.file == other.file and one.offset + one.length > other.offset:
            raise Invalid(f"two pieces share bytes of {quoted(one.file)}")


def _order(place: Place) -> tuple[str, int]:
    return place.file, place.offset
