"""Configuration documents: strict reading of JSON, YAML and TOML, and plain operations on nested tables.

A document is a table of plain values (str, int, float, bool, None, lists and tables of these). Whatever two
parsers could read differently is refused: a key given twice, YAML anchors and tags, dates, values that are no JSON.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from registry.store.errors import Invalid, NotFound, Unsupported, storage_errors
from registry.store.text import printable, quoted

if TYPE_CHECKING:
    import yaml

Document = dict[str, Any]

MAX_SIZE = 16 << 20
"""Bytes of the largest file that is read."""

MAX_DEPTH = 100
"""Levels of the deepest document that is read."""

_FLOAT = re.compile(
    r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?\Z|[-+]?\.(inf|Inf|INF)\Z|\.(nan|NaN|NAN)\Z"
)
_INT = re.compile(r"([-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)\Z")
_BOOL = re.compile(r"(true|True|TRUE|false|False|FALSE)\Z")
_NUMERIC = "-+0123456789."
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")
_PLAIN_KEY = re.compile(r'[^".=\s]([^.=]*[^.=\s])?')
_KEY = r'"(?:[^"\\\x00-\x1f]|\\["\\/bfnrt]|\\u[0-9a-fA-F]{4})*"|[^".=\s][^.=]*'
_ASSIGNMENT = re.compile(rf"(\s*(?:{_KEY})(?:\.\s*(?:{_KEY}))*)=(.*)", re.DOTALL)


def read_document(path: Path | str, form: str = "") -> Document:
    """Read a table from a JSON, YAML or TOML file.

    Args:
        form: the suffix to go by, such as `.json`; the file's own unless given.

    Raises:
        NotFound: if there is no such file.
        Unsupported: if the suffix is none of these formats.
        Invalid: if it is malformed, naming file and line, or holds what JSON cannot express, such as a date.
        StorageError: if the system refuses to read it.
    """
    path = Path(path)
    shown = printable(str(path))
    parse = _PARSERS.get(form or path.suffix.lower())
    if parse is None:
        raise Unsupported(f"{shown}: unknown kind of file", f"name one that ends in {', '.join(SUFFIXES)}")
    with storage_errors(path):
        if not path.is_file():
            raise NotFound(f"{shown}: there is no such file")
        with path.open("rb") as file:
            data = file.read(MAX_SIZE + 1)
    if len(data) > MAX_SIZE:
        raise Invalid(f"{shown}: larger than {MAX_SIZE >> 20} MB, the limit for a configuration")
    try:
        document = parse(data.decode("utf-8-sig"))
        _check(document, "", 0)
    except UnicodeDecodeError as error:
        raise Invalid(f"{shown}: not UTF-8 text (byte {error.start})") from None
    except RecursionError:
        raise Invalid(f"{shown}: nested deeper than {MAX_DEPTH} levels") from None
    except Invalid as error:
        raise error.about(shown) from None
    except ValueError as error:
        # A number has too many digits, in any of the three formats.
        raise Invalid(f"{shown}: {printable(str(error).partition(';')[0])}") from None
    if not isinstance(document, dict):
        found = "nothing" if document is None else f"a {type(document).__name__}"
        raise Invalid(f"{shown}: holds {found}, expected a table of names and values")
    return document


def yaml_text(document: Mapping[str, Any]) -> str:
    """The document as YAML that `read_document` reads back as the same values."""
    # Lazy: loads yaml.
    import yaml

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

        def represent_text(self, text: str) -> yaml.ScalarNode:
            # YAML folds some line breaks when it reads; between double quotes they are spelled out.
            style = None if text.isprintable() else '"'
            return self.represent_scalar("tag:yaml.org,2002:str", text, style)

    _follow_version_1_2(Dumper)
    Dumper.add_representer(str, Dumper.represent_text)
    return str(yaml.dump(document, Dumper=Dumper, sort_keys=False, allow_unicode=True))


def read_value(text: str) -> Any:
    """The value of typed text: JSON if it parses as JSON, otherwise the text itself.

    Raises:
        Invalid: if it is a JSON table that gives a key twice.

    >>> read_value("1e-3"), read_value("true"), read_value("[6, 16]"), read_value("adam")
    (0.001, True, [6, 16], 'adam')
    """
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError):
        return text


def parse_assignment(text: str) -> tuple[tuple[str, ...], Any]:
    """Read `optimizer.lr=1e-3` as the path and the value.

    A key that itself holds a dot or an equals sign goes in double quotes, as `flatten` writes it.

    Raises:
        Invalid: if it has no equals sign, or an empty name.

    >>> parse_assignment('device_map."model.embed"=0')
    (('device_map', 'model.embed'), 0)
    """
    match = _ASSIGNMENT.fullmatch(text)
    if match is None:
        raise Invalid(f"{quoted(text)}: write an override as key=value, such as optimizer.lr=1e-3")
    keys = [read_value(key) if key[0] == '"' else key.strip() for key in re.findall(_KEY, match[1])]
    return tuple(keys), read_value(match[2])


def assign(document: Mapping[str, Any], assignments: Iterable[str]) -> Document:
    """A copy with values replaced or added, as by `--set optimizer.lr=1e-3`.

    Raises:
        Invalid: if an assignment is malformed or goes through something that is no table.
    """
    changed = dict(document)
    for text in assignments:
        keys, value = parse_assignment(text)
        table = changed
        for i, key in enumerate(keys[:-1]):
            below = table.get(key, {})
            if not isinstance(below, Mapping):
                name = quoted(".".join(keys[: i + 1]))
                raise Invalid(f"{quoted(text)}: {name} is {quoted(str(below))}, not a table with keys")
            table[key] = dict(below)
            table = table[key]
        table[keys[-1]] = value
    return changed


def flatten(document: Mapping[str, Any], prefix: str = "") -> Document:
    """Nested tables as one, with dotted keys; lists and empty tables are values.

    A key that itself holds a dot is put in double quotes, so that no two places share a name; so are others
    that `parse_assignment` could not tell apart.

    >>> flatten({"optimizer": {"lr": 0.1}, "layers": [6, 16]})
    {'optimizer.lr': 0.1, 'layers': [6, 16]}
    """
    flat: Document = {}
    for key, value in document.items():
        name = key if _PLAIN_KEY.fullmatch(key) else json.dumps(key, ensure_ascii=False)
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


@dataclass(frozen=True, slots=True)
class Difference:
    """One value in which two documents differ; it is None on the side that lacks it."""

    key: str
    left: Any
    right: Any
    kind: Literal["added", "removed", "changed"]


def differences(left: Mapping[str, Any], right: Mapping[str, Any]) -> list[Difference]:
    """The values in which two documents differ, by dotted key.

    Numbers are compared by value (1 and 1.0 are equal, NaN equals itself); true is not 1.
    """
    before, after = flatten(left), flatten(right)
    found = []
    for key in dict.fromkeys([*before, *after]):
        if key not in after:
            found.append(Difference(key=key, left=before[key], right=None, kind="removed"))
        elif key not in before:
            found.append(Difference(key=key, left=None, right=after[key], kind="added"))
        elif not _equal(before[key], after[key]):
            found.append(Difference(key=key, left=before[key], right=after[key], kind="changed"))
    return found


def _parse_json(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise Invalid(f"line {error.lineno}, column {error.colno}: {error.msg}") from None


def _unique(pairs: Sequence[tuple[str, Any]]) -> Document:
    """The table of a JSON object; a key that comes twice is refused."""
    table: Document = {}
    for key, value in pairs:
        if key in table:
            raise Invalid(f"the key {quoted(key)} is given twice")
        table[key] = value
    return table


def _parse_toml(text: str) -> Any:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise Invalid(printable(str(error))) from None


def _parse_yaml(text: str) -> Any:
    # Lazy: loads yaml.
    import yaml

    try:
        return _yaml_loader()(text).get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        raise Invalid(f"{where}{printable(problem)}", printable(error.note or "")) from None
    except yaml.YAMLError as error:
        raise Invalid(printable(str(error).partition("\n")[0])) from None


def _yaml_loader() -> type[yaml.SafeLoader]:
    """A safe loader that follows YAML 1.2 where 1.1 surprises: 1e-3 is a number, `no` is a word, 010 is ten."""
    # Lazy: loads yaml.
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            event = self.peek_event()  # type: ignore[no-untyped-call]
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                raise yaml.MarkedYAMLError(
                    problem="anchors and aliases are not read",
                    problem_mark=event.start_mark,
                    note="write the value out",
                )
            if getattr(event, "tag", None):
                raise yaml.MarkedYAMLError(
                    problem="tags are not read",
                    problem_mark=event.start_mark,
                    note="write the plain value, text in quotes",
                )
            return super().compose_node(parent, index)

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            seen = set()
            for key_node, _ in node.value:
                key = self.construct_object(key_node, deep=True)
                if not isinstance(key, str):
                    raise yaml.MarkedYAMLError(
                        problem=f"the key {quoted(str(key))} is not text",
                        problem_mark=key_node.start_mark,
                        note="put it in quotes",
                    )
                if key in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"the key {quoted(key)} is given twice", problem_mark=key_node.start_mark
                    )
                seen.add(key)
            return super().construct_mapping(node, deep=True)

        def construct_whole(self, node: yaml.ScalarNode) -> int:
            text = str(self.construct_scalar(node))
            return int(text, 0) if text.startswith(("0x", "0o")) else int(text)

    _follow_version_1_2(Loader)
    Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_whole)
    return Loader


def _follow_version_1_2(cls: type[yaml.SafeLoader] | type[yaml.SafeDumper]) -> None:
    """Make a class tell plain words from numbers and booleans as the core schema of YAML 1.2 does.

    Dates stay a type of their own, as in 1.1, so that they are refused and not taken for text.
    """
    ours = {f"tag:yaml.org,2002:{name}" for name in ("bool", "int", "float", "merge", "value")}
    cls.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in ours]
        for first, resolvers in cls.yaml_implicit_resolvers.items()
    }
    for name, pattern, first in (
        ("bool", _BOOL, "tTfF"),
        ("int", _INT, _NUMERIC),
        ("float", _FLOAT, _NUMERIC),
    ):
        cls.add_implicit_resolver(f"tag:yaml.org,2002:{name}", pattern, list(first))


_PARSERS: dict[str, Callable[[str], Any]] = {
    ".json": _parse_json,
    ".yaml": _parse_yaml,
    ".yml": _parse_yaml,
    ".toml": _parse_toml,
}
SUFFIXES = tuple(_PARSERS)


def _check(value: Any, path: str, depth: int) -> None:
    """Refuse too deep a document, values that JSON cannot express, and lone surrogates."""
    if depth > MAX_DEPTH:
        raise Invalid(f"nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, dict):
        for key, item in value.items():
            _check(key, "a key", depth)
            _check(item, f"{path}.{key}" if path else key, depth + 1)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            _check(item, f"{path}.{i}", depth + 1)
    elif value is not None and type(value) not in (str, int, float, bool):
        raise Invalid(f"{quoted(path)} is a {type(value).__name__}", "put it in quotes")
    elif isinstance(value, str) and _HALF_CHARACTER.search(value):
        raise Invalid(f"{quoted(path)} holds half a character (a lone surrogate)", "write the whole one")


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(_equal, left, right))
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        return left.keys() == right.keys() and all(_equal(left[key], right[key]) for key in left)
    if isinstance(left, bool) is not isinstance(right, bool):
        return False
    return bool(left == right) or (left != left and right != right)
