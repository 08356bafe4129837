"""The element types that a tensor in the store can have, by the names that torch gives them.

The table is the only list of them: what is allowed, how a pack and a safetensors file name them, how much room a pack's
header needs and what may be stored as a difference all follow from it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple


class ElementType(NamedTuple):
    """An element type of tensors.

    Attributes:
        size: bytes of an element.
        code: what safetensors calls it; None if safetensors has no such type.
        is_float: whether it is a real number in floating point.
        packed: how many numbers an element holds. Where that is several, safetensors counts them one by one.
    """

    size: int
    code: str | None
    is_float: bool = False
    packed: int = 1

    @property
    def pack_code(self) -> str | None:
        """The code in a pack; None for a type that stands there as raw U8."""
        return self.code if self.packed == 1 else None

    @property
    def bits(self) -> int:
        """Bits of what safetensors counts as an element."""
        return 8 * self.size // self.packed


ELEMENT_TYPES: dict[str, ElementType] = {
    "bool": ElementType(1, "BOOL"),
    "uint8": ElementType(1, "U8"),
    "uint16": ElementType(2, "U16"),
    "uint32": ElementType(4, "U32"),
    "uint64": ElementType(8, "U64"),
    "int8": ElementType(1, "I8"),
    "int16": ElementType(2, "I16"),
    "int32": ElementType(4, "I32"),
    "int64": ElementType(8, "I64"),
    "float8_e4m3fn": ElementType(1, "F8_E4M3", is_float=True),
    "float8_e4m3fnuz": ElementType(1, "F8_E4M3FNUZ", is_float=True),
    "float8_e5m2": ElementType(1, "F8_E5M2", is_float=True),
    "float8_e5m2fnuz": ElementType(1, "F8_E5M2FNUZ", is_float=True),
    "float8_e8m0fnu": ElementType(1, "F8_E8M0", is_float=True),
    "float4_e2m1fn_x2": ElementType(1, "F4", is_float=True, packed=2),
    "float16": ElementType(2, "F16", is_float=True),
    "bfloat16": ElementType(2, "BF16", is_float=True),
    "float32": ElementType(4, "F32", is_float=True),
    "float64": ElementType(8, "F64", is_float=True),
    "bcomplex32": ElementType(4, None),
    "complex32": ElementType(4, None),
    "complex64": ElementType(8, "C64"),
    "complex128": ElementType(16, None),
}

_FOREIGN = {"F6_E2M3": 6, "F6_E3M2": 6}
"""Codes of safetensors that stand for no type of torch, and the bits of an element."""

BY_CODE: dict[str, str] = {kind.pack_code: name for name, kind in ELEMENT_TYPES.items() if kind.pack_code}
"""Element types by their codes in a pack."""

_PACKED: dict[str, str] = {
    kind.code: name for name, kind in ELEMENT_TYPES.items() if kind.code and kind.packed > 1
}
"""Element types with several numbers in an element, by their codes in safetensors."""

BITS: dict[str, int] = _FOREIGN | {kind.code: kind.bits for kind in ELEMENT_TYPES.values() if kind.code}
"""Bits of an element by every code that safetensors has."""


def byte_count(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a contiguous tensor."""
    return _byte_count(dtype, tuple(shape))


@functools.lru_cache(maxsize=1024)
def _byte_count(dtype: str, shape: tuple[int, ...]) -> int:
    """As `byte_count`.

    State of the process: what was counted last is kept, as many tensors have the same. `_byte_count.cache_clear()` forgets it.
    """
    return ELEMENT_TYPES[dtype].size * math.prod(shape)


def to_safetensors(dtype: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]] | None:
    """What a safetensors file calls a tensor's type, and its shape there; None if it has no such tensors.

    >>> to_safetensors("float4_e2m1fn_x2", (3, 4))
    ('F4', (3, 8))
    """
    kind = ELEMENT_TYPES[dtype]
    if kind.code is None or (kind.packed > 1 and not shape):
        return None
    return kind.code, shape if kind.packed == 1 else (*shape[:-1], kind.packed * shape[-1])


def from_safetensors(code: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]] | None:
    """The element type and the shape in torch of a tensor of a safetensors file; None if torch cannot represent it.

    >>> from_safetensors("F4", (3, 8))
    ('float4_e2m1fn_x2', (3, 4))
    """
    if code in BY_CODE:
        return BY_CODE[code], shape
    dtype = _PACKED.get(code)
    packed = ELEMENT_TYPES[dtype].packed if dtype else 1
    if dtype is None or not shape or shape[-1] % packed:
        return None
    return dtype, (*shape[:-1], shape[-1] // packed)
