"""What a `.pt` file may hold besides tensors and plain values, and what it becomes. None of it runs code.

`torch.load(weights_only=True)` refuses every class and function that it is not told to allow. Those that are common in
files of research code have stand-ins here: `argparse.Namespace` becomes a dict, a scalar of NumPy a number of Python, a
path a text, an array of numbers a plain array.
"""

from __future__ import annotations

import codecs
import math
import pickle
import types
from collections.abc import Callable
from typing import Any

import numpy

from registry.store.errors import Invalid

_NUMBERS = "biufc"
_TEXT = "US"
_LONGEST = 1 << 20
"""Bytes of the longest scalar of NumPy that is read."""


class _Namespace(dict[str, Any]):
    """Stands for `argparse.Namespace`."""

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict) and all(isinstance(name, str) for name in state):
            self.update(state)
        else:
            raise pickle.UnpicklingError("a Namespace with odd attributes")


class _DType:
    """Stands for `numpy.dtype`."""

    def __init__(self, text: str, *_: Any) -> None:
        if not isinstance(text, str) or text[:1] not in _NUMBERS + _TEXT or not text[1:].isdigit():
            raise pickle.UnpicklingError(f"a value of NumPy of dtype {text!r:.40}")
        self.text = text

    def __setstate__(self, state: Any) -> None:
        order = state[1] if isinstance(state, tuple) and len(state) > 1 else None
        self.text = f"{order}{self.text}" if order in ("<", ">") else self.text


class _Array:
    """Stands for `numpy.ndarray`; `value` is a view of the bytes in the file's pickle."""

    value: numpy.ndarray[Any, Any] | None = None

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise pickle.UnpicklingError("an array of NumPy with an odd state")
        _, shape, kind, is_fortran, data = state
        is_shape = isinstance(shape, tuple) and all(type(size) is int and size >= 0 for size in shape)
        if not is_shape or not isinstance(kind, _DType) or not isinstance(data, bytes):
            raise pickle.UnpicklingError("an array of NumPy that holds no plain numbers")
        dtype = numpy.dtype(kind.text)
        if dtype.kind not in _NUMBERS or not dtype.isnative or math.prod(shape) * dtype.itemsize != len(data):
            raise pickle.UnpicklingError("an array of NumPy that holds no plain numbers")
        self.value = numpy.frombuffer(data, dtype).reshape(shape, order="F" if is_fortran else "C")


def _reconstruct(*_: Any) -> _Array:
    """Stands for `numpy.core.multiarray._reconstruct`, which makes an array that gets its values later."""
    return _Array()


def _scalar(dtype: Any, data: Any) -> Any:
    """Stands for `numpy.core.multiarray.scalar`."""
    if not isinstance(dtype, _DType) or not isinstance(data, bytes) or len(data) > _LONGEST:
        raise pickle.UnpicklingError("a scalar of NumPy that is none")
    kind = numpy.dtype(dtype.text)
    if kind.itemsize != len(data):
        raise pickle.UnpicklingError("a scalar of NumPy that is none")
    return numpy.frombuffer(data, kind)[0].item()


def _path(*parts: Any) -> str:
    """Stands for `pathlib.Path`."""
    text = "/".join(part for part in parts if isinstance(part, str))
    return text[1:] if text.startswith("//") else text


def _empty() -> bytes:
    """Stands for `bytes`, which would make as many zeros as a file says."""
    return b""


class _Version(str):
    """Stands for `torch.torch_version.TorchVersion`."""


_STAND_INS = (_Namespace, _Version, _Array, tuple)
"""What `plain` looks for in a tuple."""

ALLOWED: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (_Namespace, "argparse.Namespace"),
    (_DType, "numpy.dtype"),
    (_Array, "numpy.ndarray"),
    (_reconstruct, "numpy._core.multiarray._reconstruct"),
    (_reconstruct, "numpy.core.multiarray._reconstruct"),
    (_scalar, "numpy._core.multiarray.scalar"),
    (_scalar, "numpy.core.multiarray.scalar"),
    *((_path, f"pathlib.{name}") for name in ("Path", "PurePath", "PosixPath", "PurePosixPath")),
    *((_path, f"pathlib._local.{name}") for name in ("Path", "PurePath", "PosixPath", "PurePosixPath")),
    (_empty, "__builtin__.bytes"),
    (_empty, "builtins.bytes"),
    (_Version, "torch.torch_version.TorchVersion"),
]
"""The stand-ins with the names that they stand for, as `torch.serialization.safe_globals` takes them."""


def plain(tree: Any) -> tuple[Any, int]:
    """A tree with plain values in the place of stand-ins, and how many namespaces there were.

    The tree itself is changed.

    Raises:
        Invalid: if an array has no values.
    """
    count = 0

    def replaced(value: Any) -> Any:
        nonlocal count
        if isinstance(value, _Namespace):
            count += 1
            value = dict(value)
        elif isinstance(value, _Version):
            value = str(value)
        elif isinstance(value, _Array):
            if value.value is None:
                raise Invalid("an array of NumPy has no values")
            value = value.value
        elif type(value) is tuple and any(isinstance(item, _STAND_INS) for item in value):
            value = tuple(map(replaced, value))
        return value

    tree = replaced(tree)
    seen: set[int] = set()
    stack = [tree]
    while stack:
        value = stack.pop()
        if not isinstance(value, dict | list | tuple) or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            for key, item in value.items():
                value[key] = replaced(item)
            stack += value.values()
        else:
            if isinstance(value, list):
                value[:] = map(replaced, value)
            stack += value
    return tree, count


class _Pickler(pickle._Pickler):
    """Writes empty bytes in a way that `torch.load` reads; it does not read a call of `bytes`."""

    def save_bytes(self, value: bytes) -> None:
        self.save_reduce(codecs.encode, (value.decode("latin1"), "latin1"), obj=value)  # type: ignore[attr-defined]

    dispatch = {**pickle._Pickler.dispatch, bytes: save_bytes}  # type: ignore[dict-item]


FOR_EMPTY_BYTES = types.SimpleNamespace(__name__="pickle", Pickler=_Pickler)
"""For `torch.save(pickle_module=)` of a tree with empty bytes; slower than `pickle` itself."""
