"""A model registry and checkpoint toolkit for PyTorch.

    >>> from registry import Registry

Names are loaded on first use, so that importing this package costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from registry.builders import register_model as register_model
    from registry.caching import cached as cached
    from registry.checkpoint import Checkpoint as Checkpoint
    from registry.config import Config as Config
    from registry.config import ModelConfig as ModelConfig
    from registry.devices import get_devices as get_devices
    from registry.devices import parallelize as parallelize
    from registry.diffing import diff as diff
    from registry.freezing import check_optimizer as check_optimizer
    from registry.freezing import freeze as freeze
    from registry.freezing import frozen_proof as frozen_proof
    from registry.freezing import param_groups as param_groups
    from registry.freezing import remap_optimizer as remap_optimizer
    from registry.freezing import unfreeze as unfreeze
    from registry.logs import setup_logging as setup_logging
    from registry.plans import TransferPlan as TransferPlan
    from registry.registry import Registry as Registry
    from registry.results import register_result as register_result
    from registry.resumable import ResumableLoader as ResumableLoader
    from registry.run import Run as Run
    from registry.sharded import RegistryReader as RegistryReader
    from registry.sharded import RegistryWriter as RegistryWriter
    from registry.store.errors import RegistryError as RegistryError
    from registry.transfer import plan_transfer as plan_transfer

__version__ = "0.1.0"

_HOMES = {
    "Checkpoint": "registry.checkpoint",
    "Config": "registry.config",
    "ModelConfig": "registry.config",
    "Registry": "registry.registry",
    "RegistryError": "registry.store.errors",
    "RegistryReader": "registry.sharded",
    "RegistryWriter": "registry.sharded",
    "ResumableLoader": "registry.resumable",
    "Run": "registry.run",
    "TransferPlan": "registry.plans",
    "cached": "registry.caching",
    "check_optimizer": "registry.freezing",
    "diff": "registry.diffing",
    "freeze": "registry.freezing",
    "frozen_proof": "registry.freezing",
    "get_devices": "registry.devices",
    "param_groups": "registry.freezing",
    "parallelize": "registry.devices",
    "plan_transfer": "registry.transfer",
    "register_model": "registry.builders",
    "register_result": "registry.results",
    "remap_optimizer": "registry.freezing",
    "setup_logging": "registry.logs",
    "unfreeze": "registry.freezing",
}

__all__ = [
    "Checkpoint",
    "Config",
    "ModelConfig",
    "Registry",
    "RegistryError",
    "RegistryReader",
    "RegistryWriter",
    "ResumableLoader",
    "Run",
    "TransferPlan",
    "cached",
    "check_optimizer",
    "diff",
    "freeze",
    "frozen_proof",
    "get_devices",
    "parallelize",
    "param_groups",
    "plan_transfer",
    "register_model",
    "register_result",
    "remap_optimizer",
    "setup_logging",
    "unfreeze",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
