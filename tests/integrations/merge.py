"""A merge that is killed while its folder is written, and the base network that it is about."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from killed import kill_me
from transformers import LlamaConfig, LlamaForCausalLM

from registry import Registry
from registry.integrations.merging import export_merged
from registry.store import durable


def base_network(seed: int = 0, *, dtype: torch.dtype = torch.float32, **others: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    network: LlamaForCausalLM = LlamaForCausalLM(LlamaConfig(vocab_size=40, **sizes, **others)).to(dtype)
    return network


class Killed(durable.Disk):
    """A disk at whose step of a number the process is killed."""

    def __init__(self, left: int) -> None:
        self.left = left

    def _step(self) -> None:
        self.left -= 1
        if not self.left:
            kill_me()

    def write(self, *given: Any, **named: Any) -> Any:
        self._step()
        return super().write(*given, **named)

    def mkdir(self, *given: Any, **named: Any) -> Any:
        self._step()
        return super().mkdir(*given, **named)

    def rename(self, *given: Any, **named: Any) -> Any:
        self._step()
        return super().rename(*given, **named)


def export_killed(words: list[str]) -> str:
    root, out, step = words
    registry = Registry(root)
    durable.disk = Killed(int(step))
    return str(export_merged(registry, "tuned", Path(out), max_shard_size=5_000))
