"""Safetensors headers: what two parsers could understand differently, or what could do harm, is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from registry.store import header
from registry.store.dtypes import BY_CODE, ELEMENT_TYPES
from registry.store.errors import Invalid


def framed(text: bytes | str, data: bytes = b"", length: int | None = None) -> bytes:
    text = text.encode() if isinstance(text, str) else text
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(start: Any = 0, end: Any = 4, dtype: Any = "F32", shape: Any = (1,)) -> str:
    return json.dumps({"dtype": dtype, "shape": shape, "data_offsets": [start, end]})


def named(*pairs: tuple[str, str]) -> str:
    return "{" + ",".join(f"{json.dumps(name)}:{value}" for name, value in pairs) + "}"


def one(text: str, data: bytes = bytes(4)) -> bytes:
    return framed('{"a":' + text + "}", data)


def parse(content: bytes) -> header.Header:
    return header.parse(content, len(content))


REFUSED: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "too few"),
    "seven bytes": (bytes(7), "too few"),
    "N is 0": (framed("", bytes(10), 0), r"does not start with '\{'"),
    "N is 1": (framed("{}", bytes(10), 1), "not JSON"),
    "N is odd and cuts the JSON": (framed(named(("a", entry())), bytes(4), 31), "not JSON"),
    "N reaches into the tensors": (framed(named(("a", entry())), bytes(4), 59), "not JSON"),
    "N is one more than the file": (framed("{}", length=3), "claims 3 bytes but the file has only 10"),
    "N is one more than is read": (framed("{}", bytes(9), (32 << 20) + 1), "at most 33554432"),
    "N is the largest signed number": (framed("{}", bytes(9), (1 << 63) - 1), "at most"),
    "N is the largest number": (framed("{}", bytes(9), (1 << 64) - 1), "at most"),
    "space first": (framed(" {}"), "does not start with"),
    "byte order mark": (framed(b"\xef\xbb\xbf{}"), "does not start with"),
    "a list": (framed("[1]"), "does not start with"),
    "half a document": (framed('{"a":'), "not JSON"),
    "two documents": (framed("{}{}"), "not JSON"),
    "comma too many": (framed("{,}"), "not JSON"),
    "padded with zeros": (framed(b"{}\0\0"), "not JSON"),
    "not UTF-8": (framed(b'{"\xff":1}'), r"not UTF-8 \(byte 2\)"),
    "UTF-16": (framed("{}".encode("utf-16-le")), "not JSON"),
    "NaN": (one("NaN"), "whole numbers"),
    "infinity": (one("-Infinity"), "whole numbers"),
    "fraction": (one('{"dtype":"F32","shape":[1.0],"data_offsets":[0,4]}'), "whole numbers"),
    "exponent": (one('{"dtype":"F32","shape":[1],"data_offsets":[0,4e0]}'), "whole numbers"),
    "negative offset": (one(entry(-4, 0)), "expected 0 to 2"),
    "offset of 20 digits": (one(entry(0, 10**19)), "expected 0 to 2"),
    "offset of 2^63": (one(entry(0, 1 << 63)), r"expected 0 to 2\^63-1"),
    "offset of thousands of digits": (
        one(f'{{"dtype":"U8","shape":[1],"data_offsets":[0,{"9" * 5_000}]}}'),
        "many digits",
    ),
    "offset that is text": (one(entry("0", "4")), "malformed data_offsets"),
    "offset that is a truth": (one(entry(False, 4)), "malformed data_offsets"),
    "offset that is null": (one(entry(None, 4)), "malformed data_offsets"),
    "one offset": (one('{"dtype":"F32","shape":[1],"data_offsets":[4]}'), "malformed data_offsets"),
    "three offsets": (one('{"dtype":"F32","shape":[1],"data_offsets":[0,2,4]}'), "malformed data_offsets"),
    "offsets reversed": (one(entry(4, 0)), "malformed data_offsets"),
    "offsets missing": (one('{"dtype":"F32","shape":[1]}'), "exactly dtype, shape and data_offsets"),
    "field too many": (one('{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":1}'), "exactly dtype"),
    "entry that is a list": (one("[0,4]"), "exactly dtype"),
    "entry that is null": (one("null"), "exactly dtype"),
    "unknown dtype": (one(entry(dtype="F33")), "unknown dtype 'F33'"),
    "dtype in lower case": (one(entry(dtype="f32")), "unknown dtype"),
    "dtype that is a number": (one(entry(dtype=32)), "unknown dtype"),
    "dtype that cannot be looked up": (one(entry(dtype=["F32"])), "unknown dtype"),
    "shape that is a number": (one(entry(shape=1)), "malformed shape"),
    "shape of text": (one(entry(shape=["1"])), "malformed shape"),
    "shape of truths": (one(entry(shape=[True])), "malformed shape"),
    "shape of lists": (one(entry(shape=[[1]])), "malformed shape"),
    "negative size": (one(entry(shape=[-1])), "expected 0 to 2"),
    "65 dimensions": (one(entry(shape=[1] * 65)), "malformed shape"),
    "shape that overflows": (one(entry(shape=[1 << 62, 1 << 62])), "malformed shape"),
    "shape that overflows to the size": (one(entry(shape=[1 << 32, 1 << 32, 1])), "malformed shape"),
    "shape that overflows to nothing": (one(entry(0, 0, shape=[1 << 62, 4, 0]), b""), "malformed shape"),
    "shape and offsets differ": (one(entry(shape=[2])), "does not fit"),
    "half a byte": (one(entry(0, 1, "F4", [3]), bytes(1)), "does not fit"),
    "name twice": (framed(named(("a", entry()), ("a", entry())), bytes(4)), "names 'a' twice"),
    "name twice, once escaped": (framed(f'{{"a":{entry()},"\\u0061":{entry()}}}', bytes(4)), "'a' twice"),
    "metadata twice": (framed('{"__metadata__":{},"__metadata__":{}}'), "'__metadata__' twice"),
    "metadata key twice": (framed('{"__metadata__":{"a":"1","a":"2"}}'), "'a' twice"),
    "dtype twice": (one('{"dtype":"F32","dtype":"I32","shape":[1],"data_offsets":[0,4]}'), "'dtype' twice"),
    "hole at the start": (framed(named(("a", entry(4, 8))), bytes(8)), "'a' leaves a hole"),
    "hole between": (framed(named(("a", entry()), ("b", entry(8, 12))), bytes(12)), "'b' leaves a hole"),
    "same bytes twice": (framed(named(("a", entry()), ("b", entry())), bytes(4)), "'b' overlaps"),
    "overlap": (framed(named(("a", entry()), ("b", entry(2, 6))), bytes(6)), "'b' overlaps"),
    "nothing inside another": (
        framed(named(("a", entry()), ("b", entry(2, 2, shape=[0]))), bytes(4)),
        "'b' overlaps",
    ),
    "trailing byte": (framed(named(("a", entry())), bytes(5)), "the tensors end at byte"),
    "byte missing": (framed(named(("a", entry())), bytes(3)), "the tensors end at byte"),
    "metadata that is null": (framed('{"__metadata__":null}'), "not a table of strings"),
    "metadata that is a list": (framed('{"__metadata__":[]}'), "not a table of strings"),
    "metadata of numbers": (framed('{"__metadata__":{"a":1}}'), "not a table of strings"),
    "metadata of tables": (framed('{"__metadata__":{"a":{}}}'), "not a table of strings"),
    "half a character": (framed('{"__metadata__":{"a":"\\ud800"}}'), "half a character"),
    "nested lists": (one("[" * 50_000 + "]" * 50_000), "nested too deep"),
    "nested tables": (one('{"a":' * 50_000 + "1" + "}" * 50_000), "nested too deep"),
    "endless number": (one("9" * 5_000), "expected 0 to 2"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_header_that_breaks_a_rule_is_refused(case: str) -> None:
    content, told = REFUSED[case]
    with pytest.raises(Invalid, match=told) as caught:
        parse(content)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "bad", ["\0", "\n", "\x1b[31m", "\x7f", "\x9b", "\u061c", "\u200e", "\u2028", "\u202e"]
)
@pytest.mark.parametrize("place", ["{}", "a{}", "{}.weight"])
def test_a_name_that_would_disturb_a_terminal_is_refused(bad: str, place: str) -> None:
    with pytest.raises(Invalid, match="control or bidirectional") as caught:
        parse(framed(named((place.format(bad), entry())), bytes(4)))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["..", "../x", "a/../b", "a/..", "/etc/passwd", "\\\\host\\x", "a\\b"])
def test_a_name_that_looks_like_a_path_is_refused(name: str) -> None:
    with pytest.raises(Invalid, match="looks like a path"):
        parse(framed(named((name, entry())), bytes(4)))


def test_a_name_has_a_limit() -> None:
    assert parse(framed(named(("x" * 1_024, entry())), bytes(4))).entries[0].end
    with pytest.raises(Invalid, match="has 1025 characters; at most 1024"):
        parse(framed(named(("x" * 1_025, entry())), bytes(4)))


@pytest.mark.parametrize(
    "name", ["", "weight", "a.b/c", "..a", "größe", "層.0", "a b", "__class__", "$tensor"]
)
def test_an_odd_but_harmless_name_is_a_name(name: str) -> None:
    assert [item.name for item in parse(framed(named((name, entry())), bytes(4))).entries] == [name]


def test_entries_come_in_the_order_of_their_bytes_whatever_the_order_of_their_names() -> None:
    text = named(("c", entry(8, 12)), ("a", entry(0, 0, shape=[0])), ("d", entry(0, 8, shape=[2])))
    content = framed(text + "  \n", bytes(12))
    parsed = parse(content)
    assert [item.name for item in parsed.entries] == ["a", "d", "c"]
    assert parsed.size == len(content) - 12
    assert [(item.start - parsed.size, item.end - parsed.size) for item in parsed.entries] == [
        (0, 0),
        (0, 8),
        (8, 12),
    ]


@st.composite
def layouts(draw: st.DrawFn) -> list[tuple[str, str, list[int], int, int]]:
    position, found = 0, []
    for i in range(draw(st.integers(0, 5))):
        code = draw(st.sampled_from(sorted(BY_CODE)))
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        size = ELEMENT_TYPES[BY_CODE[code]].size
        for n in shape:
            size *= n
        found.append((f'{i}"é層\\u0041'.replace("\\", "."), code, shape, position, position + size))
        position += size
    return found


@settings(max_examples=150)
@given(
    layouts(),
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=4),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=4),
        max_size=3,
    ),
)
def test_the_public_library_reads_every_header_that_we_write(
    entries: list[tuple[str, str, list[int], int, int]], metadata: dict[str, str]
) -> None:
    text = header.render(entries, metadata)
    size = header.padded(len(text))
    assert size % header.PAGE == 0
    data = bytes(i % 251 for i in range(entries[-1][4] if entries else 0))
    content = header.framed(text, size) + data
    assert len(content) == size + len(data)
    parsed = parse(content)
    theirs = dict(safetensors.deserialize(content))
    assert parsed.metadata == metadata
    assert {item.name for item in parsed.entries} == set(theirs)
    for name, code, shape, start, end in entries:
        assert (theirs[name]["dtype"], list(theirs[name]["shape"])) == (code, shape)
        assert bytes(theirs[name]["data"]) == data[start:end]
        assert header.Entry(name, code, tuple(shape), size + start, size + end) in parsed.entries
