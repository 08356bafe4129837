"""The element types that a tensor in the store can have, by the names that torch gives them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class ElementType(NamedTuple):
    """Size in bytes of one element, and the safetensors code; types without a code are stored as raw U8."""

    size: int
    code: str | None


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
    "float8_e4m3fn": ElementType(1, "F8_E4M3"),
    "float8_e4m3fnuz": ElementType(1, "F8_E4M3FNUZ"),
    "float8_e5m2": ElementType(1, "F8_E5M2"),
    "float8_e5m2fnuz": ElementType(1, "F8_E5M2FNUZ"),
    "float8_e8m0fnu": ElementType(1, "F8_E8M0"),
    "float4_e2m1fn_x2": ElementType(1, None),
    "float16": ElementType(2, "F16"),
    "bfloat16": ElementType(2, "BF16"),
    "float32": ElementType(4, "F32"),
    "float64": ElementType(8, "F64"),
    "bcomplex32": ElementType(4, None),
    "complex32": ElementType(4, None),
    "complex64": ElementType(8, "C64"),
    "complex128": ElementType(16, None),
}

BY_CODE: dict[str, str] = {kind.code: name for name, kind in ELEMENT_TYPES.items() if kind.code}


def byte_count(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a contiguous tensor."""
    return ELEMENT_TYPES[dtype][0] * math.prod(shape)
