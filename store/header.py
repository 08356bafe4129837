"""Safetensors headers, read strictly and written.

The public format is <https://github.com/huggingface/safetensors#format>: eight bytes of little-endian length N,
N bytes of JSON, then the tensors' bytes. The reader here refuses what two parsers could understand differently
or what could harm a reader: duplicate keys, holes, overlaps, names with path, control or bidirectional
characters, and sizes that do not add up. Everything is bounded before it is allocated.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from json.encoder import encode_basestring_ascii
from typing import Any, NamedTuple

from registry.store.dtypes import BITS
from registry.store.errors import Invalid
from registry.store.text import quoted

MAX_HEADER = 32 << 20
MAX_TENSORS = 1_000_000
MAX_NAME = 1_024
MAX_DIMENSIONS = 64
PAGE = 4_096

_MAX_ELEMENTS = (1 << 63) - 1
_EXPECTED = "expected 0 to 2^63-1"
_KEYS = {"dtype", "shape", "data_offsets"}
_SURROGATE = re.compile("[\ud800-\udfff]")
"""Half characters: JSON can spell them, UTF-8 cannot."""

_FORBIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")


class Entry(NamedTuple):
    """One tensor of a safetensors file; `start` and `end` count from the start of the file, in bytes."""

    name: str
    code: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """What the header of a safetensors file says."""

    entries: tuple[Entry, ...]
    """In the order of their bytes in the file."""
    metadata: Mapping[str, str]
    size: int
    """Bytes before the first tensor."""


def parse(head: bytes, file_size: int) -> Header:
    """Read a header.

    Args:
        head: the first bytes of the file; at least eight, and at least the header that they announce.
        file_size: size of the whole file in bytes.

    Raises:
        Invalid: with what is wrong, if any rule of the format is broken.
    """
    length = announced_length(head, file_size)
    document = _document(head[8 : 8 + length])
    metadata = document.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise Invalid("the header's __metadata__ is not a table of strings")
    if any(_SURROGATE.search(text) for pair in metadata.items() for text in pair):
        raise Invalid("the header's __metadata__ holds half a character")
    base = 8 + length
    entries = [_entry(name, value, base) for name, value in document.items()]
    entries.sort(key=lambda entry: (entry.start, entry.end))
    position = base
    for entry in entries:
        if entry.start != position:
            problem = "overlaps the tensor before it" if entry.start < position else "leaves a hole before it"
            raise Invalid(f"tensor {quoted(entry.name)} {problem}")
        position = entry.end
    if position != file_size:
        raise Invalid(f"the tensors end at byte {position} but the file has {file_size}")
    return Header(tuple(entries), metadata, base)


def announced_length(head: bytes, file_size: int) -> int:
    """Length of the JSON in bytes, from the first eight bytes of a file."""
    if len(head) < 8 or file_size < 10:
        raise Invalid(f"the file has {file_size} bytes, too few for a safetensors file")
    length = int.from_bytes(head[:8], "little")
    if length > MAX_HEADER:
        raise Invalid(f"the header claims {length} bytes; at most {MAX_HEADER} are read")
    if 8 + length > file_size:
        raise Invalid(f"the header claims {length} bytes but the file has only {file_size}")
    return length


def _document(text: bytes) -> dict[str, Any]:
    """The JSON of a header, parsed after its size was bounded."""
    if not text.startswith(b"{"):
        raise Invalid("the header does not start with '{'")
    if text.count(b"{") > MAX_TENSORS or text.count(b"[") > 2 * MAX_TENSORS:
        raise Invalid(f"the header lists more than {MAX_TENSORS} tensors")
    if text.count(b",") > 8 * MAX_TENSORS:
        raise Invalid("the header is too large to be read safely")
    try:
        document = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_float=_refuse_number,
            parse_constant=_refuse_number,
        )
    except UnicodeDecodeError as error:
        raise Invalid(f"the header is not UTF-8 (byte {error.start})") from None
    except RecursionError:
        raise Invalid("the header is nested too deep") from None
    except json.JSONDecodeError as error:
        raise Invalid(f"the header is not JSON: {error.msg} at byte {error.pos}") from None
    except ValueError:
        # Python reads no numbers of thousands of digits.
        raise Invalid(f"the header holds a number of many digits; {_EXPECTED}") from None
    assert isinstance(document, dict)
    return document


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise Invalid(f"the header names {quoted(twice)} twice")
    return table


def _refuse_number(text: str) -> Any:
    raise Invalid(f"the header holds the number {quoted(text[:32])}; only whole numbers are allowed")


def check_name(name: str) -> None:
    """Refuse a tensor name that could be mistaken for a path or that would disturb a terminal."""
    if len(name) > MAX_NAME:
        raise Invalid(f"a tensor name has {len(name)} characters; at most {MAX_NAME} are allowed")
    if _FORBIDDEN.search(name):
        raise Invalid(f"the tensor name {quoted(name)} holds control or bidirectional characters")
    if name.startswith("/") or "\\" in name or ".." in name.split("/"):
        raise Invalid(f"the tensor name {quoted(name)} looks like a path")


def _entry(name: str, value: Any, base: int) -> Entry:
    """One tensor of a header, after all checks.

    Args:
        base: the byte of the file from which offsets count.
    """
    check_name(name)
    if problem := _problem(value):
        raise Invalid(f"tensor {quoted(name)} {problem}")
    start, end = value["data_offsets"]
    return Entry(name, value["dtype"], tuple(value["shape"]), base + start, base + end)


def _problem(value: Any) -> str | None:
    """What is wrong with what a header says of a tensor, in words."""
    if type(value) is not dict or value.keys() != _KEYS:
        return "must have exactly dtype, shape and data_offsets"
    code, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if type(code) is not str or code not in BITS:
        return f"has the unknown dtype {quoted(str(code))}"
    if not _whole_numbers(shape) or len(shape) > MAX_DIMENSIONS or _overflows(shape):
        return "has a malformed shape"
    if not _whole_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return "has malformed data_offsets"
    if _byte_count(code, shape) != offsets[1] - offsets[0]:
        return f"of dtype {code} and shape {shape} does not fit its {offsets} bytes"
    return None


def _whole_numbers(value: Any) -> bool:
    """Whether it is a list of whole numbers.

    Raises:
        Invalid: if one of them is none that every reader takes.
    """
    if type(value) is not list:
        return False
    for number in value:
        if type(number) is not int:
            return False
        if not 0 <= number <= _MAX_ELEMENTS:
            raise Invalid(f"the header holds the number {quoted(str(number)[:32])}; {_EXPECTED}")
    return True


def _overflows(shape: list[int]) -> bool:
    """Whether another reader could fail to count the elements, even if a zero among the sizes makes them none."""
    count = 1
    for size in shape:
        count *= size or 1
    return count > _MAX_ELEMENTS


def _byte_count(code: str, shape: list[int]) -> int | None:
    """Bytes of a tensor; None if its elements end within a byte."""
    size, rest = divmod(math.prod(shape) * BITS[code], 8)
    return None if rest else size


def render(entries: Iterable[tuple[str, str, Iterable[int], int, int]], metadata: Mapping[str, str]) -> bytes:
    """The JSON of a header, unpadded; offsets count from the end of the header, as in the file.

    Args:
        entries: name, dtype code, shape, start and end of each tensor.
    """
    parts = [f'"__metadata__":{json.dumps(dict(metadata), separators=(",", ":"))}'] if metadata else []
    parts += [
        f'{encode_basestring_ascii(name)}:{{"dtype":"{code}","shape":[{",".join(map(str, shape))}],'
        f'"data_offsets":[{start},{end}]}}'
        for name, code, shape, start, end in entries
    ]
    return ("{" + ",".join(parts) + "}").encode()


def framed(text: bytes, size: int) -> bytes:
    """The length, the JSON, and spaces up to `size` bytes in all.

    Raises:
        ValueError: if it does not fit.
    """
    if len(text) > size - 8:
        raise ValueError(f"a header of {len(text)} bytes does not fit into {size - 8}")
    return (size - 8).to_bytes(8, "little") + text.ljust(size - 8, b" ")


def has_room(size: int) -> bool:
    """Whether a header of `size` bytes, padded, is one that a reader takes."""
    return padded(size) - 8 <= MAX_HEADER


def padded(size: int) -> int:
    """The smallest whole number of pages that holds a header of `size` bytes with its length."""
    return -(-(size + 8) // PAGE) * PAGE
