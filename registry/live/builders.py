"""Builders: how a model's network is made again, by a name that the running program registered.

Nothing that a stored file names is ever imported. A checkpoint records the builder's name; what that name means is
up to the program that loads it, or to the packages installed with it (entry points `registry.models`).
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from registry.configs.config import Config
from registry.configs.plain import plain_table
from registry.live.components import class_of, plain_module
from registry.log.reference import check_name
from registry.store.errors import Conflict, Invalid, NotFound
from registry.store.text import quoted

_logger = logging.getLogger(__name__)

GROUP = "registry.models"
"""The entry points by which installed packages register their networks."""

Built = TypeVar("Built", bound=Callable[..., nn.Module])

OnDisk = Callable[[nn.Module, Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]]
"""Takes a network, whose parameters have no values, and a state under its names."""


class Builder(NamedTuple):
    """A registered builder.

    Attributes:
        make: makes the network.
        config: the class of its configuration.
        load: gives the network with a stored state, where that may have other names than the network's own.
        on_disk: gives a state with the names that files of such networks have, where these are others.
    """

    name: str
    make: Callable[..., nn.Module]
    config: type[Config] | None
    load: Callable[[nn.Module, Mapping[str, torch.Tensor]], nn.Module] | None = None
    on_disk: OnDisk | None = None

    def build(self, config: Mapping[str, Any] | None) -> nn.Module:
        """The network for a recorded configuration, with newly initialised parameters.

        Raises:
            Invalid: if the configuration does not fit the builder.
        """
        if self.config is not None:
            return self.make(self.config.from_dict(config or {}, source=f"the configuration of {self.name}"))
        try:
            # Networks of Hugging Face name the class of their configuration.
            of_class = getattr(self.make, "config_class", None)
            if config and callable(from_dict := getattr(of_class, "from_dict", None)):
                return self.make(from_dict(dict(config)))
            return self.make(**(config or {}))
        except TypeError as error:
            raise Invalid(
                f"the builder {quoted(self.name)} cannot take this configuration: {error}"
            ) from None


_builders: dict[str, Builder] = {}


def register_model(
    name: str,
    *,
    config: type[Config] | None = None,
    load: Callable[[nn.Module, Mapping[str, torch.Tensor]], nn.Module] | None = None,
    on_disk: OnDisk | None = None,
) -> Callable[[Built], Built]:
    """Register a network's class, or a function that makes it, under a name.

    The builder is called with an instance of `config`, filled from what a checkpoint recorded; without `config`,
    with the recorded values as keyword arguments, or with what the class's `config_class` makes of them. A network's
    configuration is its attribute `config`: a `Config`, or anything with `to_dict()`, as in networks of Hugging Face.

    >>> @register_model("doctest-linear")
    ... class Net(nn.Linear):
    ...     def __init__(self) -> None:
    ...         super().__init__(2, 1)

    Args:
        load: takes the network, which has no values yet, and a stored state, and gives the network with that state. By
            default the names must be the network's own.
        on_disk: takes the network, which has no values, and a state under its names, and gives that state under the names
            that an exported folder has. By default these are the same.

    Raises:
        Invalid: if the name is malformed.
        Conflict: if another builder has this name.
    """
    check_name(name, "builder")

    def register(make: Built) -> Built:
        known = _builders.get(name)
        if known is not None and _place(known.make) != _place(make):
            raise Conflict(f"the builder {quoted(name)} is registered already, by {_place(known.make)}")
        _builders[name] = Builder(name, make, config, load, on_disk)
        return make

    return register


def builder(name: str) -> Builder:
    """The builder that is registered under a name, in this program or by an installed package.

    Raises:
        NotFound: saying how to register one.
    """
    if name not in _builders:
        for entry in entry_points(group=GROUP, name=name):
            # A package registers its builders as it is imported.
            try:
                entry.load()
            except ImportError as error:
                raise NotFound(f"the builder {quoted(name)} cannot be loaded: {error}") from None
    found = _builders.get(name)
    if found is None:
        near = difflib.get_close_matches(name, names(), 1)
        meant = f"did you mean {quoted(near[0])}? or " if near else ""
        raise NotFound(
            f"no builder {quoted(name)} is registered",
            f"{meant}import the module that has @register_model({quoted(name)}) above its network first",
        )
    return found


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    """Make a network on the meta device: without memory for its parameters, however large it is."""
    try:
        with torch.device("meta"):
            return make()
    except NotImplementedError:
        # The constructor computes with tensors, as RegNet's does.
        with _EmptyOnMeta():
            return make()


def names() -> list[str]:
    """The names of all builders, those of installed packages included."""
    return sorted({*_builders, *(entry.name for entry in entry_points(group=GROUP))})


def name_for(model: Any) -> str | None:
    """The name under which a network's class is registered."""
    kind = class_of(model)
    return next((found.name for found in _builders.values() if found.make is kind), None)


def config_of(model: Any) -> dict[str, Any] | None:
    """A network's own configuration as plain values; None if it has none, or one that cannot be recorded.

    It is the attribute `config`, if that is a `Config`, a mapping, a namespace, a dataclass, or has `to_dict()`. Keys
    that are numbers become text; transformers numbers its labels.
    """
    config = getattr(plain_module(model), "config", None)
    if isinstance(config, Config):
        return config.to_dict()
    if config is None or isinstance(config, type):
        return None
    try:
        found = config.to_dict() if callable(getattr(config, "to_dict", None)) else config
        return plain_table(_with_text_keys(found), "the network's configuration")
    except Exception as error:
        _logger.warning("the network's configuration is not recorded: %s", error)
        return None


def network_of(config: Mapping[str, Any] | None) -> dict[str, Any]:
    """How the network of a folder is made again, by its `config.json`: `builder` and `network` of a provenance.

    Returns:
        Those of transformers and timm; empty for any other configuration.
    """
    config = config or {}
    classes = config.get("architectures")
    if isinstance(config.get("model_type"), str) and isinstance(classes, list) and classes:
        return {"builder": "transformers", "network": {"class": classes[0], "config": dict(config)}}
    if isinstance(config.get("architecture"), str) and isinstance(config.get("pretrained_cfg"), Mapping):
        known = ("architecture", "num_classes", "global_pool", "model_args", "pretrained_cfg")
        return {"builder": "timm", "network": {key: config[key] for key in known if key in config}}
    return {}


def recorded(model: Any) -> tuple[str | None, dict[str, Any] | None]:
    """The builder and the configuration by which a live network is made again; None for what is not known.

    A network's class may be registered. Otherwise those of transformers and timm have builders of their own.
    """
    name, config = name_for(model), config_of(model)
    if name is not None:
        return name, config
    kind = class_of(model)
    if kind.__module__.startswith("transformers.models.") and config is not None:
        return "transformers", {"class": kind.__name__, "config": config}
    if kind.__module__.startswith("timm.models."):
        plain = plain_module(model)
        about = getattr(plain, "pretrained_cfg", None) or {}
        # The classifier may have been replaced since the network was made.
        classes = {"num_classes": getattr(plain, "num_classes", None)}
        network = {
            "architecture": about.get("architecture"),
            **classes,
            "model_args": {**getattr(plain, "_model_args", {}), **classes},
            "pretrained_cfg": {**about, **classes},
        }
        try:
            return "timm", plain_table(network, "the network's configuration")
        except Invalid as error:
            _logger.warning("the network's configuration is not recorded: %s", error)
    return None, config


def config_kind(model: Any) -> str | None:
    """The class of a network's configuration, if it has one."""
    config = getattr(plain_module(model), "config", None)
    return None if config is None else type(config).__qualname__


def _with_text_keys(value: Any) -> Any:
    """A tree with its numeric keys as text, as JSON writes them."""
    if isinstance(value, Mapping):
        return {
            str(key) if type(key) in (int, float) else key: _with_text_keys(item)
            for key, item in value.items()
        }
    return [_with_text_keys(item) for item in value] if isinstance(value, list | tuple) else value


def _place(make: Callable[..., Any]) -> str:
    """Where a builder is defined."""
    return f"{make.__module__}.{make.__qualname__}"


class _EmptyOnMeta(TorchFunctionMode):
    """Puts the uninitialised memory that layers ask for on the meta device, and nothing else."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if function is torch.empty:
            given["device"] = "meta"
        return function(*args, **given)
