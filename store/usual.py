"""Usual trees: what nearly every state dict is made of, encoded at once.

All tensors are looked at together, one property after the other, which costs a tenth of looking at them one by one. A tree that
holds anything else is left to `registry.store.tree`, which gives the same documents, and names what cannot be stored.
"""

from __future__ import annotations

import math
import operator
import struct
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from itertools import compress
from operator import attrgetter
from typing import Any, NamedTuple

import torch

from registry.store.dtypes import ELEMENT_TYPES

MAX_DEPTH = 200
MAX_INT_BITS = 4_096
CLASSES = (torch.Tensor, torch.nn.Parameter)
TORCH_TYPES = {getattr(torch, name): name for name in ELEMENT_TYPES if hasattr(torch, name)}

_AS_IT_IS = frozenset((type(None), bool, str))
_TEXT = frozenset((str,))
_KEYS = frozenset((type(None), bool, str, int, float))


class Tensors(NamedTuple):
    """Distinct tensors in the machine's own memory as they are stored, property by property.

    Attributes:
        sizes: in bytes.
        addresses: of the first values in memory.
    """

    dtypes: Sequence[str]
    shapes: Sequence[tuple[int, ...]]
    sources: Sequence[torch.Tensor]
    sizes: Sequence[int]
    addresses: Sequence[int]


class _Unusual(Exception):
    """A tree holds something that is not usual."""


def encode_usual(components: Mapping[str, Any]) -> tuple[dict[str, Any], Tensors] | None:
    """The documents of named trees and their distinct tensors; None if one of them holds anything that is not usual."""
    walk = _Walk()
    try:
        documents = dict(zip(components, walk.values(components.values(), depth=1), strict=True))
        return documents, _distinct(walk.references, _looked_at(walk.tensors))
    # Torch raises RuntimeError for tensors that have no memory of their own; a tree may be too deep for the stack.
    except (_Unusual, RuntimeError):
        return None


def float_document(value: float) -> Any:
    """The document of a number; JSON has none for those that are not finite."""
    return value if math.isfinite(value) else {"$float": struct.pack(">d", value).hex()}


class _Walk:
    """Turns trees into documents, and collects their tensors unseen.

    Attributes:
        tensors: all tensors, in the order of the trees.
        references: the document of each.
    """

    def __init__(self) -> None:
        self.tensors: list[torch.Tensor] = []
        self.references: list[dict[str, int]] = []

    def values(self, values: Iterable[Any], depth: int) -> list[Any]:
        """The documents of the values of a dict or a list.

        Args:
            depth: how deep in the trees they are.
        """
        if depth > MAX_DEPTH:
            raise _Unusual
        found: list[Any] = []
        tensors, references = self.tensors, self.references
        for value in values:
            kind = type(value)
            if kind in CLASSES:
                document: Any = {"$tensor": len(tensors)}
                tensors.append(value)
                references.append(document)
            elif kind in _AS_IT_IS:
                document = value
            elif kind is int:
                if value.bit_length() > MAX_INT_BITS:
                    raise _Unusual
                document = value
            elif kind is float:
                document = float_document(value)
            elif kind is dict:
                document = self._dict(value, depth)
            elif kind is list:
                document = self.values(value, depth + 1)
            elif kind is tuple:
                document = {"$tuple": self.values(value, depth + 1)}
            elif kind is OrderedDict:
                document = self._ordered(value, depth)
            else:
                raise _Unusual
            found.append(document)
        return found

    def _dict(self, value: dict[Any, Any], depth: int) -> Any:
        # Another thread may change the dict; of a copy the names and the values belong together.
        value = dict(value)
        kinds = set(map(type, value))
        # Few names have the sign at all.
        if kinds <= _TEXT and not ("$" in "".join(value) and any(key[:1] == "$" for key in value)):
            return dict(zip(value, self.values(value.values(), depth + 1), strict=True))
        if not kinds <= _KEYS:
            raise _Unusual
        keys, values = (self.values(part, depth + 1) for part in (value, value.values()))
        return {"$dict": [list(pair) for pair in zip(keys, values, strict=True)]}

    def _ordered(self, value: OrderedDict[Any, Any], depth: int) -> Any:
        attributes = vars(value)
        document = {"$ordered": self._dict(value, depth)}
        if attributes:
            if attributes.keys() != {"_metadata"}:
                raise _Unusual
            (document["metadata"],) = self.values((attributes["_metadata"],), depth + 1)
        return document


def _looked_at(tensors: Sequence[torch.Tensor]) -> Tensors:
    """The properties of tensors.

    Raises:
        _Unusual, RuntimeError: if one is not in the machine's own memory as it is stored.
    """

    def all_have(name: str) -> Iterable[Any]:
        return map(attrgetter(name), tensors)

    # What is asked first makes the rest safe to ask.
    if any(all_have("is_nested")) or not set(all_have("layout")) <= {torch.strided}:
        raise _Unusual
    if not all(all_have("is_cpu")) or not all(map(torch.Tensor.is_contiguous, tensors)):
        raise _Unusual
    if any(map(torch.Tensor.is_conj, tensors)) or any(map(torch.Tensor.is_neg, tensors)):
        raise _Unusual
    dtypes = [TORCH_TYPES.get(dtype, "") for dtype in all_have("dtype")]
    sizes = list(all_have("nbytes"))
    if not all(dtypes) or not all(sizes):
        raise _Unusual
    ends = sizes
    offsets = list(map(torch.Tensor.storage_offset, tensors))
    if any(offsets):
        ends = list(map(operator.add, sizes, map(operator.mul, offsets, all_have("itemsize"))))
    held = map(torch.UntypedStorage.nbytes, map(torch.Tensor.untyped_storage, tensors))
    # Memory that was freed or cut, as of a sharded parameter, does not reach as far as the last element.
    if not all(map(operator.ge, held, ends)):
        raise _Unusual
    return Tensors(
        dtypes=dtypes,
        shapes=list(map(tuple, all_have("shape"))),
        sources=tensors,
        sizes=sizes,
        addresses=list(map(torch.Tensor.data_ptr, tensors)),
    )


def _distinct(references: Sequence[dict[str, int]], tensors: Tensors) -> Tensors:
    """The tensors that are not the same view of the same memory as one before; the references then count these."""
    views = list(zip(tensors.addresses, tensors.dtypes, tensors.shapes, strict=True))
    slots: dict[tuple[object, ...], int] = {}
    if len(set(views)) == len(views):
        return tensors
    is_first = []
    for reference, view in zip(references, views, strict=True):
        is_first.append(view not in slots)
        reference["$tensor"] = slots.setdefault(view, len(slots))
    return Tensors._make(list(compress(column, is_first)) for column in tensors)
