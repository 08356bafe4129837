"""Documents: strict reading of JSON, YAML and TOML, overrides, and differences."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.configs.documents import (
    assign,
    differences,
    flatten,
    parse_assignment,
    read_document,
    read_value,
    yaml_text,
)
from registry.store.errors import Invalid, NotFound, RegistryError, StorageError, Unsupported

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


def written(tmp_path: Path, name: str, text: str | bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def same(left: Any, right: Any) -> bool:
    """Equality in which NaN equals itself and types count."""
    return repr(left) == repr(right)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", '{"lr": 1e-3, "layers": [6, 16], "deep": {"x": true}, "none": null}'),
        ("a.yaml", "lr: 1e-3\nlayers: [6, 16]\ndeep:\n  x: true\nnone: ~\n"),
        ("a.yml", "{lr: 0.001, layers: [6, 16], deep: {x: True}, none: null}"),
    ],
)
def test_json_and_yaml_give_the_same_document(tmp_path: Path, name: str, text: str) -> None:
    expected = {"lr": 0.001, "layers": [6, 16], "deep": {"x": True}, "none": None}
    assert same(read_document(written(tmp_path, name, text)), expected)


def test_toml_is_read(tmp_path: Path) -> None:
    path = written(tmp_path, "a.toml", 'lr = 1e-3\nname = "x"\n[deep]\nlayers = [6, 16]\n')
    assert read_document(path) == {"lr": 0.001, "name": "x", "deep": {"layers": [6, 16]}}


def test_yaml_follows_version_1_2_where_1_1_surprises(tmp_path: Path) -> None:
    text = "a: no\nb: on\nc: 1e-3\nd: 010\ne: 0o17\nf: 0x1F\ng: 12:30:00\nh: .inf\ni: 1_000\nj: 1e5\nk: yes\n"
    text += "l: =\nm: 1e٣\n"
    expected = {"a": "no", "b": "on", "c": 0.001, "d": 10, "e": 15, "f": 31, "g": "12:30:00", "h": math.inf}
    expected |= {"i": "1_000", "j": 100000.0, "k": "yes", "l": "=", "m": "1e٣"}
    assert same(read_document(written(tmp_path, "a.yaml", text)), expected)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", '{"a": 1, "a": 2}', "the key 'a' is given twice"),
        ("a.json", '{"x": {"a": 1, "a": 2}}', "the key 'a' is given twice"),
        ("a.json", '{"a": 1', "line 1, column 8"),
        ("a.json", "[1, 2]", "holds a list, expected a table"),
        ("a.json", '{"a":' + "[" * 100_000, "nested deeper than 100 levels"),
        ("a.json", '{"a":' + "[" * 150 + "]" * 150 + "}", "nested deeper than 100 levels"),
        ("a.json", b'{"a": "\xff"}', "not UTF-8"),
        ("a.json", '{"a": ' + "1" * 5_000 + "}", "Exceeds the limit"),
        ("a.yaml", "a: 1\na: 2\n", "line 2, column 1: the key 'a' is given twice"),
        ("a.yaml", "a: &x 1\nb: *x\n", "anchors and aliases are not read"),
        ("a.yaml", "a: &x [1]\n", "anchors and aliases are not read"),
        ("a.yaml", "a: 2020-01-01\n", "'a' is a date; put it in quotes"),
        ("a.json", '{"a": "\\ud800"}', "'a' holds half a character"),
        ("a.json", '{"\\ud800": 1}', "half a character"),
        ("a.yaml", "1: 2\n", "line 1, column 1: the key '1' is not text"),
        ("a.yaml", f"? [{'1, ' * 9000}]\n: 3\n", "is not text"),
        ("a.yaml", "? [1, 2]\n: 3\n", "is not text"),
        ("a.yaml", "a: [\n", "line 2"),
        ("a.yaml", "a: !!python/object/apply:os.system [x]\n", "line 1, column 4: tags are not read"),
        ("a.yaml", "a: !!bool x\n", "tags are not read"),
        ("a.yaml", "a: !!timestamp x\n", "tags are not read"),
        ("a.yaml", "a: !!float ''\n", "tags are not read"),
        ("a.yaml", "a: " + "1" * 5_000 + "\n", "Exceeds the limit"),
        ("a.yaml", "a: 'x\x01'\n", "unacceptable character"),
        ("a.yaml", "a: 1\n---\nb: 2\n", "expected a single document"),
        ("a.yaml", "a: !!binary aGVsbG8=\n", "tags are not read"),
        ("a.yaml", "a: !!set {x, y}\n", "tags are not read"),
        ("a.yaml", "", "holds nothing, expected a table"),
        ("a.yaml", "a: " + "[" * 3_000 + "\n", "nested deeper"),
        ("a.toml", "a = 1\na = 2\n", "Cannot overwrite a value"),
        ("a.toml", "a = 2020-01-01\n", "'a' is a date; put it in quotes"),
        ("a.toml", "a = ", "Invalid value"),
        ("a.toml", "a = " + "1" * 5_000, "Exceeds the limit"),
        ("a.toml", ".".join("a" * 5_000) + " = 1", "nested deeper than 100 levels"),
    ],
)
def test_what_two_readers_could_read_differently_is_refused(
    tmp_path: Path, name: str, text: str | bytes, message: str
) -> None:
    with pytest.raises(Invalid) as caught:
        read_document(written(tmp_path, name, text))
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / name))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < len(str(tmp_path)) + 200


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="there is no such file"):
        read_document(tmp_path / "none.json")
    with pytest.raises(Unsupported, match=r"\.json, \.yaml, \.yml, \.toml"):
        read_document(written(tmp_path, "a.ini", "x"))
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(NotFound):
        read_document(tmp_path / "folder.json")
    with pytest.raises((StorageError, NotFound)):
        read_document("a\0b.json")


def test_a_file_larger_than_any_configuration_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, "a.json", b"")
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(Invalid, match="larger than 16 MB"):
        read_document(path)


@given(st.text())
def test_no_yaml_text_raises_anything_but_our_errors(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with contextlib.suppress(RegistryError):
        assert isinstance(read_document(path), dict)


@given(st.dictionaries(st.text(), VALUES))
def test_a_document_written_as_yaml_is_read_back_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, document: dict[str, Any]
) -> None:
    path = written(tmp_path_factory.getbasetemp(), "back.yaml", yaml_text(document))
    assert same(read_document(path), document)


@pytest.mark.parametrize(
    "word", ["08", "1e-3", "1e5", "0o17", "no", "~", "<<", "=", "2020-01-01", "\x85", "- a"]
)
def test_text_that_looks_like_another_value_stays_text_in_yaml(tmp_path: Path, word: str) -> None:
    document = {"value": word, word: [word]}
    assert read_document(written(tmp_path, "a.yaml", yaml_text(document))) == document


@given(VALUES)
def test_a_value_in_json_is_read_as_itself(value: Any) -> None:
    assert same(read_value(json.dumps(value)), value)


@pytest.mark.parametrize("text", ["adam", "", "1.2.3", "{", "[1,", "a=b", '{"a": 1, "a": 2', "[" * 100_000])
def test_what_is_no_json_is_text(text: str) -> None:
    assert read_value(text) == text


def test_an_assignment_is_a_path_and_a_value() -> None:
    assert parse_assignment("optimizer.lr=1e-3") == (("optimizer", "lr"), 0.001)
    assert parse_assignment("note=a=b") == (("note",), "a=b")
    assert parse_assignment('map."model.embed".x=0') == (("map", "model.embed", "x"), 0)
    assert parse_assignment(" a . b=x ") == (("a", "b"), "x ")
    assert parse_assignment("note=two\nlines") == (("note",), "two\nlines")
    for text in ("lr", "=1", "a..b=1", ".a=1", "a.=1", "a. =1", " =1", '"a=1', '"\\q"=1', '"a"b=1', ""):
        with pytest.raises(Invalid, match="write an override as key=value"):
            parse_assignment(text)


def test_assigning_changes_a_copy() -> None:
    document = {"optimizer": {"lr": 0.1, "name": "sgd"}, "epochs": 3}
    changed = assign(document, ["optimizer.lr=1", "data.path=x", "epochs=null"])
    assert changed == {"optimizer": {"lr": 1, "name": "sgd"}, "epochs": None, "data": {"path": "x"}}
    assert document == {"optimizer": {"lr": 0.1, "name": "sgd"}, "epochs": 3}
    with pytest.raises(Invalid, match="'epochs' is '3', not a table"):
        assign(document, ["epochs.first=1"])


def test_differences_name_what_was_added_removed_and_changed() -> None:
    left = {"a": 1, "b": {"x": 1, "y": [1, 2]}, "same": math.nan, "flag": True}
    right = {"a": 1.0, "b": {"x": 2, "y": [1, 3]}, "same": math.nan, "flag": 1, "new": {}}
    found = [dataclasses.astuple(difference) for difference in differences(left, right)]
    assert found == [
        ("b.x", 1, 2, "changed"),
        ("b.y", [1, 2], [1, 3], "changed"),
        ("flag", True, 1, "changed"),
        ("new", None, {}, "added"),
    ]
    assert [d.kind for d in differences(right, left)] == ["changed", "changed", "changed", "removed"]


def test_a_key_with_a_dot_is_not_taken_for_two() -> None:
    left, right = {"a.b": 1}, {"a": {"b": 1}}
    assert [(d.key, d.kind) for d in differences(left, right)] == [('"a.b"', "removed"), ("a.b", "added")]
    assert len(flatten({**left, **right, '"a': {'b"': 1}})) == 3


@given(st.dictionaries(st.text(), VALUES))
def test_a_document_does_not_differ_from_itself(document: dict[str, Any]) -> None:
    assert differences(document, json.loads(json.dumps(document))) == []


KEYS = st.text(' ."\\a=\n') | st.text()


@given(st.dictionaries(KEYS, st.dictionaries(KEYS, st.integers(), min_size=1)))
def test_a_flat_key_is_an_assignment_to_the_same_place(document: dict[str, dict[str, int]]) -> None:
    places = [((key, below), value) for key, table in document.items() for below, value in table.items()]
    assert [parse_assignment(f"{key}={value}") for key, value in flatten(document).items()] == places
