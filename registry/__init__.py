"""A model registry and checkpoint toolkit for PyTorch.

    >>> from registry import Registry

Names are loaded on first use, so that importing this package costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from registry.release import VERSION

if TYPE_CHECKING:
    from registry.cache.decorator import cached as cached
    from registry.cache.results import register_result as register_result
    from registry.checkpoints.checkpoint import Checkpoint as Checkpoint
    from registry.checkpoints.sharded_reader import RegistryReader as RegistryReader
    from registry.checkpoints.sharded_writer import RegistryWriter as RegistryWriter
    from registry.configs.config import Config as Config
    from registry.configs.config import ModelConfig as ModelConfig
    from registry.live.builders import register_model as register_model
    from registry.live.devices import get_devices as get_devices
    from registry.live.devices import parallelize as parallelize
    from registry.live.freezing import freeze as freeze
    from registry.live.freezing import unfreeze as unfreeze
    from registry.live.gradients import Gradients as Gradients
    from registry.live.optimizers import check_optimizer as check_optimizer
    from registry.live.optimizers import param_groups as param_groups
    from registry.live.optimizers import remap_optimizer as remap_optimizer
    from registry.live.proof import frozen_proof as frozen_proof
    from registry.live.resumable import ResumableLoader as ResumableLoader
    from registry.registry import Registry as Registry
    from registry.resuming.checking import check_resume as check_resume
    from registry.runs.logs import setup_logging as setup_logging
    from registry.runs.run import Run as Run
    from registry.store.errors import RegistryError as RegistryError
    from registry.transfer.diffing import diff as diff
    from registry.transfer.plan import TransferPlan as TransferPlan
    from registry.transfer.planning import plan_transfer as plan_transfer

__version__ = VERSION

_HOMES = {
    "Checkpoint": "registry.checkpoints.checkpoint",
    "Config": "registry.configs.config",
    "Gradients": "registry.live.gradients",
    "ModelConfig": "registry.configs.config",
    "Registry": "registry.registry",
    "RegistryError": "registry.store.errors",
    "RegistryReader": "registry.checkpoints.sharded_reader",
    "RegistryWriter": "registry.checkpoints.sharded_writer",
    "ResumableLoader": "registry.live.resumable",
    "Run": "registry.runs.run",
    "TransferPlan": "registry.transfer.plan",
    "cached": "registry.cache.decorator",
    "check_optimizer": "registry.live.optimizers",
    "check_resume": "registry.resuming.checking",
    "diff": "registry.transfer.diffing",
    "freeze": "registry.live.freezing",
    "frozen_proof": "registry.live.proof",
    "get_devices": "registry.live.devices",
    "param_groups": "registry.live.optimizers",
    "parallelize": "registry.live.devices",
    "plan_transfer": "registry.transfer.planning",
    "register_model": "registry.live.builders",
    "register_result": "registry.cache.results",
    "remap_optimizer": "registry.live.optimizers",
    "setup_logging": "registry.runs.logs",
    "unfreeze": "registry.live.freezing",
}
"""The module of each public name."""

__all__ = [
    "Checkpoint",
    "Config",
    "Gradients",
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
    "check_resume",
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
