"""State trees: what a component may hold, and how it becomes a JSON document and a list of tensors.

A tree is made of dict, list, tuple, str, int, float, bool, None, tensors, and the few other types that real
state dicts hold. Anything else is refused by path and type, before a byte is written. `docs/FORMAT.md`
describes the document.

Both directions stand in one file, so that each form of a value is next to its counterpart.
"""

from __future__ import annotations

import functools
import itertools
import mmap
import struct
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from registry.store.dtypes import ELEMENT_TYPES
from registry.store.errors import Corrupt, Incompatible, Unsupported
from registry.store.pausing import collector_off
from registry.store.text import quoted
from registry.store.usual import CLASSES, MAX_DEPTH, MAX_INT_BITS, TORCH_TYPES, encode_usual, float_document

_INLINE_BYTES = 512
"""Bytes of a `bytes` value that stands in the document itself, at most."""

CUT = "a tensor whose memory was freed or cut"
"""What is said of a tensor without the memory that it should have."""

_NUMPY_TYPES = frozenset(ELEMENT_TYPES) & {np.dtype(t).name for t in "?bBhHiIqQefdFD"}

Path = tuple[object, ...]


class Leaf(NamedTuple):
    """One distinct tensor of a tree.

    Attributes:
        source: a torch tensor, a numpy array, bytes or a mapped file.
        size: bytes of the tensor.
        is_plain: whether `buffer` is a view of the caller's own memory, not a copy.
        address: of the first value in memory.
        is_live: whether other threads may change the values while they are saved.
    """

    dtype: str
    shape: tuple[int, ...]
    source: Any
    size: int
    is_plain: bool
    address: int = 0
    is_live: bool = True

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Leaf:
        """The leaf of a torch tensor of a dtype that can be stored."""
        kind, shape, size = TORCH_TYPES[tensor.dtype], tuple(tensor.shape), tensor.nbytes
        return cls(
            dtype=kind,
            shape=shape,
            source=tensor,
            size=size,
            is_plain=is_plain(tensor),
            address=tensor.data_ptr() if size else 0,
        )

    def copied(self) -> Leaf:
        """The leaf with a copy of its values as they are now, which nobody else can change."""
        return self._replace(source=bytes(self.buffer()), is_plain=True, address=0, is_live=False)

    def buffer(self) -> memoryview:
        """The contiguous little-endian bytes."""
        source = self.source
        if self.size == 0:
            return memoryview(b"")
        if isinstance(source, torch.Tensor):
            if source.requires_grad:
                source = source.detach()
            if not self.is_plain:
                source = source.resolve_conj().resolve_neg().to("cpu").contiguous()
            return memory_of(source, self.dtype)
        if isinstance(source, bytes | mmap.mmap):
            return memoryview(source)
        return np.ascontiguousarray(source).reshape(-1).view(np.uint8).data


def encode(components: Mapping[str, Any]) -> tuple[dict[str, Any], list[Leaf]]:
    """Turn named trees into JSON documents and the tensors that these refer to by position.

    Names that refer to the same view of the same memory refer to one leaf, so tied tensors stay tied.

    Raises:
        Unsupported: naming the path and the type of the first value that cannot be represented.
    """
    if sys.byteorder != "little":
        raise Unsupported("torch-registry runs on little-endian machines only")
    with collector_off():
        if usual := encode_usual(components):
            documents, tensors = usual
            columns = tensors.dtypes, tensors.shapes, tensors.sources, tensors.sizes
            rows = zip(
                *columns, itertools.repeat(True), tensors.addresses, itertools.repeat(True), strict=False
            )
            return documents, list(map(Leaf._make, rows))
    encoder = _Encoder()
    try:
        documents = {name: encoder.encode(tree, (name,)) for name, tree in components.items()}
    except RecursionError:
        raise Unsupported("a tree is nested too deep for the stack of this program", "flatten it") from None
    return documents, encoder.leaves


class _Encoder:
    """Turns trees into documents, and collects their distinct tensors."""

    def __init__(self) -> None:
        self.leaves: list[Leaf] = []
        self._slots: dict[tuple[object, ...], int] = {}

    def encode(self, value: Any, path: Path) -> Any:
        if len(path) > MAX_DEPTH:
            raise Unsupported(f"{_shown(path[:4])}/…: nested deeper than {MAX_DEPTH} levels", "flatten it")
        kind = type(value)
        if value is None or kind is bool or kind is str:
            return value
        method = _PLAIN.get(kind)
        if method is not None:
            return method(self, value, path)
        if isinstance(value, torch.Tensor):
            return self._tensor(value, path)
        if isinstance(value, np.ndarray):
            return {"$array": self._array(value, path)}
        if isinstance(value, np.generic) and value.dtype.name in _NUMPY_TYPES:
            return {"$scalar": [value.dtype.name, value.tobytes().hex()]}
        for base, plain in _STANDS_FOR:
            if isinstance(value, base):
                return self.encode(plain(value), path)
        raise Unsupported(
            f"{_shown(path)}: a value of type {kind.__module__}.{kind.__qualname__} cannot be stored",
            "store tensors, arrays, numbers, strings, or dicts, lists and tuples of them",
        )

    def _int(self, value: int, path: Path) -> int:
        if value.bit_length() > MAX_INT_BITS:
            raise Unsupported(f"{_shown(path)}: an integer of {value.bit_length()} bits cannot be stored")
        return value

    def _float(self, value: float, path: Path) -> Any:
        return float_document(value)

    def _complex(self, value: complex, path: Path) -> Any:
        return {"$complex": struct.pack(">dd", value.real, value.imag).hex()}

    def _bytes(self, value: bytes | mmap.mmap, path: Path) -> Any:
        if len(value) <= _INLINE_BYTES:
            return {"$bytes": bytes(value).hex()}
        size = len(value)
        is_live = isinstance(value, mmap.mmap)
        leaf = Leaf("uint8", (size,), source=value, size=size, is_plain=True, is_live=is_live)
        return {"$bytes": self._add(leaf)}

    def _list(self, value: list[Any], path: Path) -> Any:
        return [self.encode(item, (*path, i)) for i, item in enumerate(value)]

    def _tuple(self, value: tuple[Any, ...], path: Path) -> Any:
        return {"$tuple": self._list(list(value), path)}

    def _size(self, value: torch.Size, path: Path) -> Any:
        return {"$size": list(value)}

    def _dtype(self, value: torch.dtype, path: Path) -> Any:
        return {"$dtype": str(value).removeprefix("torch.")}

    def _device(self, value: torch.device, path: Path) -> Any:
        return {"$device": str(value)}

    def _counter(self, value: Counter[Any], path: Path) -> Any:
        return {"$counter": self._dict(value, path)}

    def _ordered(self, value: OrderedDict[Any, Any], path: Path) -> Any:
        attributes = vars(value)
        if set(attributes) - {"_metadata"}:
            raise Unsupported(f"{_shown(path)}: an OrderedDict with the attributes {sorted(attributes)}")
        document = {"$ordered": self._dict(value, path)}
        if attributes:
            document["metadata"] = self.encode(attributes["_metadata"], (*path, "_metadata"))
        return document

    def _dict(self, value: Mapping[Any, Any], path: Path) -> Any:
        for key in value:
            if type(key) is not str or key[:1] == "$":
                break
        else:
            return {key: self.encode(item, (*path, key)) for key, item in value.items()}
        for key in value:
            if key is not None and not isinstance(key, str | int | float):
                raise Unsupported(f"{_shown(path)}: a dict key of type {type(key).__qualname__}")
        pairs = value.items()
        return {"$dict": [[self.encode(k, (*path, "key")), self.encode(v, (*path, k))] for k, v in pairs]}

    def _tensor(self, tensor: torch.Tensor, path: Path) -> Any:
        leaf = _usual(tensor)
        if leaf is None:
            if problem := _refusal(tensor):
                what, *advice = problem
                raise Unsupported(f"{_shown(path)}: {what}", *advice)
            leaf = Leaf.of(tensor)
        if not leaf.size:
            return {"$tensor": self._add(leaf)}
        view: tuple[object, ...] = (leaf.address, leaf.dtype, leaf.shape)
        if not leaf.is_plain:
            device = "cpu" if tensor.is_cpu else tensor.device
            view = (*view, device, tensor.stride(), tensor.is_conj(), tensor.is_neg())
        return {"$tensor": self._add(leaf, view)}

    def _array(self, array: np.ndarray[Any, Any], path: Path) -> int:
        if type(array) not in (np.ndarray, np.memmap):
            raise Unsupported(
                f"{_shown(path)}: a numpy array of the class {type(array).__qualname__}",
                "convert it to a plain array first",
            )
        name = array.dtype.name
        if name not in _NUMPY_TYPES or not array.dtype.isnative:
            raise Unsupported(f"{_shown(path)}: a numpy array of dtype {array.dtype.str}", "convert it first")
        plain = bool(array.flags.c_contiguous)
        if array.size == 0:
            return self._add(Leaf(name, array.shape, source=array, size=0, is_plain=plain))
        address = array.__array_interface__["data"][0]
        leaf = Leaf(name, array.shape, source=array, size=array.nbytes, is_plain=plain, address=address)
        return self._add(leaf, ("numpy", address, array.shape, array.strides, name))

    def _add(self, leaf: Leaf, identity: tuple[object, ...] | None = None) -> int:
        if identity is not None:
            known = self._slots.setdefault(identity, len(self.leaves))
            if known < len(self.leaves):
                return known
        self.leaves.append(leaf)
        return len(self.leaves) - 1


_PLAIN: dict[type, Callable[[_Encoder, Any, Path], Any]] = {
    int: _Encoder._int,
    float: _Encoder._float,
    complex: _Encoder._complex,
    bytes: _Encoder._bytes,
    mmap.mmap: _Encoder._bytes,
    list: _Encoder._list,
    tuple: _Encoder._tuple,
    dict: _Encoder._dict,
    OrderedDict: _Encoder._ordered,
    Counter: _Encoder._counter,
    torch.Size: _Encoder._size,
    torch.dtype: _Encoder._dtype,
    torch.device: _Encoder._device,
    torch.Tensor: _Encoder._tensor,
    torch.nn.Parameter: _Encoder._tensor,
}


_STANDS_FOR: tuple[tuple[type, Callable[[Any], Any]], ...] = (
    (str, str.__str__),
    (int, int.__int__),
    (float, float.__float__),
    (deque, list),
    (defaultdict, dict),
)
"""Kinds of values that are stored as the plain kind that they are based on."""


def _usual(tensor: torch.Tensor) -> Leaf | None:
    """The leaf of a tensor as nearly all are: in the machine's own memory as it is stored. None for any other."""
    # Another class may answer anything.
    if type(tensor) not in CLASSES or tensor.is_nested or tensor.layout is not torch.strided:
        return None
    kind = TORCH_TYPES.get(tensor.dtype)
    if kind is None or not is_plain(tensor):
        return None
    size = tensor.nbytes
    try:
        held = tensor.untyped_storage().nbytes()
    except RuntimeError:
        return None
    if not size or held < size + tensor.storage_offset() * tensor.itemsize:
        return None
    return Leaf(kind, tuple(tensor.shape), tensor, size, is_plain=True, address=tensor.data_ptr())


def not_dense(tensor: torch.Tensor) -> Sequence[str]:
    """Why the elements of a tensor lie in no rows, and what to do; empty if they do."""
    if tensor.is_nested:
        return "a nested tensor", "store its parts with .unbind()"
    if tensor.layout != torch.strided:
        return f"a tensor of layout {tensor.layout}", "convert it with .to_dense()"
    return ()


def _refusal(tensor: torch.Tensor) -> Sequence[str]:
    """Why a tensor cannot be stored, and what to do, if that is known; empty if it can."""
    if type(tensor) not in CLASSES:
        return f"a tensor subclass {type(tensor).__qualname__}", "convert it with .as_subclass(torch.Tensor)"
    if reason := not_dense(tensor):
        return reason
    if tensor.is_meta:
        return ("a tensor on the meta device, which has no values",)
    if tensor.dtype not in TORCH_TYPES:
        if tensor.is_quantized:
            return "a quantized tensor", "store .int_repr() with its scale and zero point"
        return (f"a tensor of dtype {tensor.dtype}",)
    if tensor.numel() and not has_memory(tensor):
        return (
            "a tensor whose memory was freed or cut, as of a sharded parameter, or that a transform made",
        )
    return ()


def is_cut(tensor: torch.Tensor) -> bool:
    """Whether a tensor should have memory, and has too little; other classes of tensors may have none at all."""
    if type(tensor) not in CLASSES or not_dense(tensor) or tensor.is_meta:
        return False
    return tensor.numel() > 0 and not has_memory(tensor)


def has_memory(tensor: torch.Tensor) -> bool:
    """Whether the memory behind a tensor reaches as far as its last element."""
    try:
        held = tensor.untyped_storage().nbytes()
    except RuntimeError:
        return False
    if tensor.is_contiguous():
        reach = tensor.nbytes
    else:
        last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
        reach = (last + 1) * tensor.itemsize
    return bool(held >= tensor.storage_offset() * tensor.itemsize + reach)


def _shown(path: Path) -> str:
    """A path as `component/name/name`, harmless to print."""
    return quoted("/".join(map(str, path))).strip("'")


def decode(document: Any, tensor_at: Callable[[int], torch.Tensor]) -> Any:
    """Rebuild a tree from its document.

    Args:
        tensor_at: gives the tensor at a position; called once for each use of it.

    Raises:
        Corrupt: if the document has a form that `encode` never writes.
    """
    try:
        return _decode(document, tensor_at)
    except RecursionError:
        raise Corrupt("the manifest is nested too deep") from None
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError, struct.error) as error:
        raise Corrupt(f"the manifest holds a malformed value: {error}") from error


def _decode(document: Any, tensor_at: Callable[[int], torch.Tensor]) -> Any:
    if isinstance(document, list):
        return [_decode(item, tensor_at) for item in document]
    if not isinstance(document, dict):
        return document
    tag = next(iter(document), "")
    if not tag.startswith("$"):
        return {key: _decode(value, tensor_at) for key, value in document.items()}
    body = document[tag]
    match tag:
        case "$tensor":
            return tensor_at(body)
        case "$shards":
            return _whole(document["shape"], [(offsets, tensor_at(slot)) for offsets, slot in body])
        case "$array":
            return tensor_at(body).numpy()
        case "$bytes":
            return tensor_at(body).numpy().tobytes() if isinstance(body, int) else bytes.fromhex(body)
        case "$scalar":
            return np.frombuffer(bytes.fromhex(body[1]), dtype=_numpy_type(body[0]))[0]
        case "$float":
            return struct.unpack(">d", bytes.fromhex(body))[0]
        case "$complex":
            return complex(*struct.unpack(">dd", bytes.fromhex(body)))
        case "$tuple":
            return tuple(_decode(body, tensor_at))
        case "$size":
            return torch.Size(_sizes(body))
        case "$dtype":
            return _torch_type(body)
        case "$device":
            return torch.device(_text(body))
        case "$dict":
            return {_decode(key, tensor_at): _decode(value, tensor_at) for key, value in body}
        case "$counter":
            return Counter(_decode(body, tensor_at))
        case "$ordered":
            ordered = OrderedDict(_decode(body, tensor_at))
            if "metadata" in document:
                ordered._metadata = _decode(document["metadata"], tensor_at)  # type: ignore[attr-defined]
            return ordered
    raise Corrupt(f"the manifest holds the unknown tag {quoted(tag)}")


def _whole(shape: Sequence[int], parts: Sequence[tuple[Sequence[int], torch.Tensor]]) -> torch.Tensor:
    """A tensor of its own from the parts of one that several processes stored."""
    whole = torch.empty(shape, dtype=parts[0][1].dtype)
    for offsets, part in parts:
        target = box(whole, offsets, part.shape)
        # Not all types of one byte can be copied, but their bytes can.
        if part.itemsize == 1:
            target, part = target.view(torch.uint8), part.view(torch.uint8)
        target.copy_(part)
    return whole


def box(tensor: torch.Tensor, offsets: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
    """A view of a part of a tensor."""
    for dim, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
        tensor = tensor.narrow(dim, offset, size)
    return tensor


def _sizes(body: Any) -> list[int]:
    if not isinstance(body, list) or any(type(n) is not int or not -(1 << 63) <= n < 1 << 63 for n in body):
        raise ValueError("a size is not a list of whole numbers")
    return body


def _text(body: Any) -> str:
    if not isinstance(body, str):
        raise TypeError("a name is not text")
    return body


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether the tensor's bytes lie in the machine's own memory as they are stored."""
    return tensor.is_cpu and tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg())


def memory_of(tensor: torch.Tensor, dtype: str) -> memoryview:
    """The bytes of a contiguous CPU tensor that is not empty and needs no gradient."""
    if dtype not in _NUMPY_TYPES:
        # With one element, a tensor is contiguous whatever its steps are; bytes need a step of 1.
        tensor = tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)
    return tensor.numpy().data.cast("B")


@functools.cache
def torch_type(name: str) -> torch.dtype:
    """The torch dtype of an element type's name.

    Raises:
        Unsupported: if this torch has no such dtype.
    """
    if name not in ELEMENT_TYPES or not hasattr(torch, name):
        raise Unsupported(f"torch {torch.__version__} has no dtype {quoted(name)}", "upgrade torch")
    return _torch_type(name)


def _torch_type(name: str) -> torch.dtype:
    kind = getattr(torch, name)
    if not isinstance(kind, torch.dtype):
        raise ValueError(f"{quoted(name)} is not a dtype")
    return kind


def _numpy_type(name: str) -> np.dtype[Any]:
    if name not in _NUMPY_TYPES:
        raise ValueError(f"{quoted(name)} is not a numpy dtype")
    return np.dtype(name)


def unfillable(tensor: torch.Tensor) -> str | None:
    """Why values cannot be copied into a live tensor, or None."""
    if tensor.is_meta:
        return "on the meta device and has no memory; give the model some with .to_empty(device=...)"
    if not_dense(tensor) or tensor.is_quantized:
        return "not a dense tensor"
    if not tensor.is_contiguous() and any(
        step == 0 and size > 1 for size, step in zip(tensor.shape, tensor.stride(), strict=True)
    ):
        return "an expanded tensor, whose elements share memory; clone it first"
    if tensor.numel() and not has_memory(tensor):
        return CUT
    return None


def tensor_paths(trees: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of live trees by `component/name` path, for loading into them.

    Raises:
        Incompatible: if two of them have the same path.
    """
    found: dict[str, torch.Tensor] = {}

    def visit(value: Any, path: str) -> None:
        if isinstance(value, torch.Tensor):
            if path in found:
                raise Incompatible(f"two live tensors have the name {quoted(path)}")
            found[path] = value
        elif isinstance(value, Mapping):
            for key, item in value.items():
                visit(item, f"{path}/{key}")
        elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
            for i, item in enumerate(value):
                visit(item, f"{path}/{i}")

    for name, tree in trees.items():
        visit(tree, name)
    return found
