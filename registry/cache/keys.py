"""Keys: what the result of a cached function depends on, as one digest that is the same in every process."""

from __future__ import annotations

import dataclasses
import enum
import functools
import inspect
import json
import os
import textwrap
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel

from registry.cache.contents import Content, content_of
from registry.store.digest import digest, tensor_digest
from registry.store.errors import Invalid, RegistryError, Unsupported
from registry.store.text import quoted
from registry.store.tree import Leaf, encode


class Key(NamedTuple):
    """What a call's result depends on.

    Attributes:
        digest: of all that the result depends on.
        function: the function's qualified name.
        parameters: chosen parameters and attributes, as plain values.
        contents: files and folders by parameter.
    """

    digest: str
    function: str
    parameters: dict[str, Any]
    contents: dict[str, list[Content]]

    @property
    def files(self) -> dict[str, list[str]]:
        """Digests of the files' contents by parameter."""
        return {name: [content.digest for content in found] for name, found in self.contents.items()}

    def is_unchanged(self) -> bool:
        """Whether no file was changed since its content was taken into the key."""
        return all(content.is_unchanged() for found in self.contents.values() for content in found)


class Keys:
    """Makes the keys of one function's calls.

    Args:
        key, files, version, code: as for `registry.cache.decorator.cached`.

    Raises:
        Invalid: if a name is no parameter, and no attribute can have it.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        key: Sequence[str] | None,
        files: Sequence[str] | None,
        version: str | int | None,
        code: bool,
    ) -> None:
        self.name = function.__qualname__.replace("<locals>.", "")
        self._module = function.__module__
        self._signature = inspect.signature(function)
        parameters = self._signature.parameters
        first = next(iter(parameters), "")
        self._owner = first if first in ("self", "cls") else None
        self._names = [name for name in parameters if name != self._owner]
        self._files = (
            [name for name in self._names if _is_path(name, function)] if files is None else list(files)
        )
        for name in [*(key or ()), *self._files]:
            if name.partition(".")[0] not in self._names and self._owner is None:
                raise Invalid(
                    f"{self.name} has no parameter {quoted(name)}",
                    f"it has {', '.join(self._names) or 'none'}",
                )
        chosen = self._names if key is None else list(key)
        self._key = [name for name in chosen if name not in self._files]
        self._fixed: dict[str, Any] = {
            "function": f"{self._module}.{function.__qualname__}",
            "version": version,
        }
        if code:
            self._fixed["code"] = digest(_source(function).encode())

    def key(self, args: Sequence[Any], kwargs: Mapping[str, Any], root: Path) -> Key:
        """The key of one call, however its arguments are given.

        Raises:
            TypeError: if the arguments do not fit the function.
            Invalid: if a parameter has no stable value, or an attribute does not exist.
            NotFound: if a file is missing.
        """
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        parameters = {name: canonical(self._value(name, bound), f"{self.name}: {name}") for name in self._key}
        contents = {name: self._contents(name, bound, root) for name in self._files}
        files = {name: [content.digest for content in found] for name, found in contents.items()}
        document = {**self._fixed, "parameters": parameters, "files": files}
        text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return Key(digest=digest(text.encode()), function=self.name, parameters=parameters, contents=contents)

    def _value(self, name: str, bound: inspect.BoundArguments) -> Any:
        head, *rest = name.split(".")
        if head in bound.arguments and head != self._owner:
            value = bound.arguments[head]
        else:
            value, rest = bound.arguments.get(self._owner or ""), [head, *rest]
        for part in rest:
            try:
                value = getattr(value, part)
            except AttributeError:
                there = (
                    sorted(n for n in (*vars(value), *vars(type(value))) if not n.startswith("_"))
                    if hasattr(value, "__dict__")
                    else []
                )
                raise Invalid(
                    f"{self.name} has no parameter {quoted(name)}, and {type(value).__qualname__} no attribute "
                    f"{quoted(part)}",
                    f"there are {', '.join(dict.fromkeys([*self._names, *there])) or 'none'}",
                ) from None
        return value

    def _contents(self, name: str, bound: inspect.BoundArguments, root: Path) -> list[Content]:
        value = self._value(name, bound)
        paths = list(value) if isinstance(value, list | tuple) else [] if value is None else [value]
        found = []
        for path in paths:
            if not isinstance(path, str | os.PathLike):
                raise Invalid(
                    f"{self.name}: {name} is a {type(path).__qualname__}, expected the path of a file or a folder"
                )
            try:
                found.append(content_of(Path(path), root))
            except RegistryError as error:
                raise error.about(f"{self.name}: {name}") from None
        return found


def canonical(value: Any, path: str) -> Any:
    """A value as plain JSON; equal values become equal JSON in every process.

    Raises:
        Invalid: naming the part that has no stable value.
    """
    if value is None or (isinstance(value, str) and type(value) is str) or isinstance(value, bool):
        return value
    if isinstance(value, enum.Enum):
        return {"enum": f"{type(value).__qualname__}.{value.name}"}
    if isinstance(value, np.generic):
        return canonical(value.item(), path)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return {"float": repr(float(value))}
    if isinstance(value, complex):
        return {"complex": repr(value)}
    if isinstance(value, str | os.PathLike):
        return os.fspath(value)
    if isinstance(value, bytes | bytearray):
        return {"bytes": digest(bytes(value))}
    if isinstance(value, list | tuple):
        return [canonical(item, f"{path}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        items = [[canonical(k, path), canonical(v, f"{path}[{k!r}]")] for k, v in value.items()]
        return {"dict": sorted(items, key=lambda item: json.dumps(item[0], sort_keys=True))}
    if isinstance(value, set | frozenset):
        items = [canonical(item, path) for item in value]
        return {"set": sorted(items, key=lambda item: json.dumps(item, sort_keys=True))}
    if isinstance(value, torch.dtype | torch.device):
        return {"torch": str(value)}
    if isinstance(value, torch.Tensor | np.ndarray):
        return {"tensor": _tensor(value, path)}
    if isinstance(value, BaseModel):
        return {type(value).__qualname__: canonical(dict(value), path)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {type(value).__qualname__: canonical(fields, path)}
    raise Invalid(
        f"{path} is a {type(value).__qualname__}, which has no stable value",
        "choose what the result depends on with key=[...]",
    )


def _is_path(name: str, function: Callable[..., Any]) -> bool:
    """Whether a parameter is called `..._path`, or annotated as a `Path`."""
    if name.endswith("_path"):
        return True
    hint = _hints(function).get(name)
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return any(isinstance(one, type) and issubclass(one, PurePath) for one in options)


@functools.lru_cache(maxsize=256)
def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function)
    except Exception:
        # An annotation that cannot be evaluated here says nothing.
        return {}


def _source(function: Callable[..., Any]) -> str:
    try:
        return textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError):
        raise Invalid(
            f"the source of {function.__qualname__} cannot be read", "use version=... instead of code=True"
        ) from None


def _tensor(value: Any, path: str) -> str:
    try:
        _, (leaf, *_) = encode({"value": value})
    except Unsupported as error:
        raise Invalid(f"{path} cannot be part of a key: {error.message}", *error.fixes) from None
    assert isinstance(leaf, Leaf)
    return tensor_digest(leaf.dtype, leaf.shape, leaf.buffer())
