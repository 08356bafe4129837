"""Configurations: frozen pydantic models that are filled from files, checked, overridden, logged and digested.

>>> class TrainConfig(Config):
...     lr: float = 0.1
...     epochs: int = 3
>>> TrainConfig().override("lr=1e-3")
TrainConfig(lr=0.001, epochs=3)
"""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, get_args

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from registry.configs.documents import assign, flatten, read_document, yaml_text
from registry.store import durable
from registry.store.digest import digest
from registry.store.errors import Invalid, Unsupported
from registry.store.text import printable, quoted


class Config(BaseModel):
    """A configuration whose fields you declare; a key that is not declared is an error.

    Values from files and overrides are checked strictly: a number in quotes is no number. Types that JSON lacks
    (paths, dates, enumerations, tuples) are read from text or a list.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        protected_namespaces=(),
        populate_by_name=True,
        ser_json_inf_nan="constants",
        validate_default=True,
    )

    @classmethod
    def from_file(cls, path: Path | str) -> Self:
        """Read a JSON, YAML or TOML file.

        Raises:
            NotFound: if there is no such file.
            Invalid: naming the file, the field, the value and what was expected.
        """
        return cls.from_dict(read_document(path), source=printable(str(path)))

    @classmethod
    def from_json_file(cls, path: Path | str) -> Self:
        """Read a JSON file, whatever its name ends in; raises as `from_file`."""
        return cls.from_dict(read_document(path, ".json"), source=printable(str(path)))

    @classmethod
    def from_dict(cls, document: Mapping[str, Any], *, source: str = "") -> Self:
        """Check plain values.

        Args:
            source: what to call the document in errors.

        Raises:
            Invalid: naming the field, the value and what was expected.
        """
        try:
            text = json.dumps(document)
        except (TypeError, ValueError, RecursionError) as error:
            raise Invalid(f"{_prefix(source)}not made of plain values ({printable(str(error))})") from None
        try:
            return cls.model_validate_json(text, strict=True)
        except ValidationError as error:
            what, advice = _explain(cls, error)
            raise Invalid(_prefix(source) + what, advice) from None

    def override(self, *assignments: str) -> Self:
        """A copy with values replaced, as by `--set`: `config.override("optimizer.lr=1e-3")`.

        Raises:
            Invalid: if an assignment is malformed, names an unknown key, or the value has the wrong type.
        """
        return type(self).from_dict(assign(self.to_dict(), assignments), source=quoted(" ".join(assignments)))

    def to_dict(self) -> dict[str, Any]:
        """The values as str, int, float, bool, None, lists and dicts; `from_dict` takes them back.

        Floats are exact; paths, dates and enumerations become text, tuples lists, and sets sorted lists.

        >>> ModelConfig.from_dict({"hidden_size": 768, "dropout": 0.1}).to_dict()
        {'hidden_size': 768, 'dropout': 0.1}
        """
        plain: dict[str, Any] = _sorted_sets(
            self.model_dump(mode="json", round_trip=True, serialize_as_any=True),
            self.model_dump(round_trip=True, serialize_as_any=True),
        )
        return plain

    def digest(self) -> str:
        """A digest of the values, in 64 hex digits.

        The same for the same values, in whatever order and from whatever file they came, defaults included.
        Types count where the class leaves them open: 1, 1.0, true and "1" differ; NaN equals itself.

        >>> left = ModelConfig.from_dict({"a": 1, "b": 2})
        >>> left.digest() == ModelConfig.from_dict({"b": 2, "a": 1}).digest()
        True
        """
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return digest(text.encode())

    def log(self, logger: logging.Logger | None = None) -> None:
        """Log each value at INFO as a line `# key = value`; nested values have dotted keys."""
        for key, value in flatten(self.to_dict()).items():
            (logger or logging.getLogger(__name__)).info(
                "# %s = %s", printable(key), printable(str(value)), stacklevel=2
            )

    def save(self, path: Path | str) -> None:
        """Write a JSON or YAML file, whole or not at all.

        Raises:
            Unsupported: if the name ends in anything else.
            StorageError: if the system refuses.
        """
        path = Path(path)
        if path.suffix.lower() == ".json":
            text = json.dumps(self.to_dict(), indent=2) + "\n"
        elif path.suffix.lower() in (".yaml", ".yml"):
            text = yaml_text(self.to_dict())
        else:
            raise Unsupported(f"{printable(str(path))}: name a file that ends in .json or .yaml")
        durable.write_file(path, text.encode())


class ModelConfig(Config):
    """The configuration of a network; keys that are not declared are kept, as attributes.

    >>> config = ModelConfig.from_dict({"hidden_size": 768, "vocab_size": 30522})
    >>> config.hidden_size
    768
    """

    model_config = ConfigDict(extra="allow")


def _sorted_sets(plain: Any, value: Any) -> Any:
    """The plain form of a value, its sets in an order that does not change from process to process."""
    if isinstance(value, set | frozenset) and isinstance(plain, list):
        return sorted(plain, key=lambda item: json.dumps(item, sort_keys=True, ensure_ascii=False))
    if isinstance(value, Mapping) and isinstance(plain, dict) and len(plain) == len(value):
        pairs = zip(plain.items(), value.values(), strict=True)
        return {key: _sorted_sets(item, below) for (key, item), below in pairs}
    if isinstance(value, list | tuple) and isinstance(plain, list) and len(plain) == len(value):
        return [_sorted_sets(item, below) for item, below in zip(plain, value, strict=True)]
    return plain


def _prefix(source: str) -> str:
    return f"{source}: " if source else ""


def _explain(cls: type[BaseModel], error: ValidationError) -> tuple[str, str]:
    """The first problem in full, and how many more there are; what to do, or an empty text."""
    problems = error.errors(include_url=False, include_context=False)
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    what, advice = _problem(cls, problems[0])
    return what + more, advice


def _problem(cls: type[BaseModel], problem: ErrorDetails) -> tuple[str, str]:
    place = problem["loc"]
    name = quoted(".".join(map(str, place)) or "the document").strip("'")
    if problem["type"] == "extra_forbidden":
        known = _fields_at(cls, place[:-1])
        near = difflib.get_close_matches(str(place[-1]), known, 1)
        hint = f"known are {', '.join(known[:8])}" if known else "remove it"
        return f"{name} is not a known key", f"did you mean {near[0]}?" if near else hint
    if problem["type"] == "missing":
        return f"{name} is missing", "add it"
    expected = problem["msg"].replace("Input should be", "expected").replace("Value error, ", "")
    given = quoted(json.dumps(problem["input"], default=str))[1:-1]
    return f"{name} is {given}; {printable(expected)}", ""


def _fields_at(cls: type[BaseModel], place: Sequence[int | str]) -> list[str]:
    """The fields of the class, or of the classes of a union, that a place in a document belongs to."""
    models = [cls]
    for key in place:
        fields = [model.model_fields[str(key)] for model in models if key in model.model_fields]
        if fields:
            models = [model for field in fields for model in _models(field.annotation)]
        else:
            # The key is an index of a list, a key of a table, or the name of a class in a union.
            models = [model for model in models if model.__name__ == key] or models
    return [name for model in models for name in model.model_fields]


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The configuration classes in an annotation such as `list[Optimizer] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models(part)
