"""transformers: a training that is killed goes on bit for bit, where the Trainer's own checkpoint does not, too."""

from __future__ import annotations

from pathlib import Path

import pytest
from killed import train_forked
from train_transformers import main

from registry import Registry

CASES = {
    "bert, in the middle of an epoch": (10, []),
    "gpt2, at the end of an epoch": (9, ["--network", "gpt2", "--every", "7"]),
    "gpt2, accumulation": (3, ["--network", "gpt2", "--window", "3", "--every", "2"]),
    "mixtral": (10, ["--network", "mixtral"]),
    "an adapter": (10, ["--network", "adapter"]),
    "data that draw": (10, ["--draw"]),
    "mixtral, data that draw, workers": (10, ["--network", "mixtral", "--draw", "--workers", "2"]),
    "data that draw, at the end of an epoch": (9, ["--draw", "--every", "7"]),
    "data that draw, accumulation": (4, ["--draw", "--window", "3", "--every", "1"]),
    "saved behind the training": (10, ["--behind"]),
}


@pytest.mark.parametrize(("kill", "words"), CASES.values(), ids=CASES.keys())
def test_a_training_that_is_killed_goes_on_exactly(tmp_path: Path, kill: int, words: list[str]) -> None:
    whole = train_forked(main, tmp_path / "whole", *words)
    train_forked(main, tmp_path / "r", "--kill", kill, *words, killed=True)
    assert train_forked(main, tmp_path / "r", "--kill", kill, "--resume", *words) == whole
    registry = Registry(tmp_path / "r" / "registry")
    assert registry.verify().problems == ()
