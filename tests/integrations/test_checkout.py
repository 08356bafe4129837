"""A folder that a training was killed behind is imported, its original is lost, and training goes on bit for bit."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from killed import train

from registry import Registry
from registry.files.folder_writing import checkout
from registry.files.importing import import_checkpoint
from registry.files.reading import read_checkpoint_file

SCRIPT = "train_folders.py"


@pytest.mark.parametrize(("kind", "last"), [("trainer", "checkpoint-14"), ("accelerate", "14")])
def test_a_training_goes_on_exactly_from_a_folder_that_was_imported(
    tmp_path: Path, kind: str, last: str
) -> None:
    whole = train(SCRIPT, kind, tmp_path / "whole")
    train(SCRIPT, kind, tmp_path / "killed", "--kill", 17, killed=True)
    registry = Registry(tmp_path / "r")
    folder = tmp_path / "killed" / last
    checkpoint = import_checkpoint(registry, read_checkpoint_file(folder), "net")
    assert {"model", "optimizer", "scheduler", "rng"} <= set(checkpoint.components)
    assert not [name for name in checkpoint.files if name.endswith((".pt", ".pth", ".pkl"))]
    names = {path.name for path in folder.iterdir()}
    if kind == "trainer":
        assert (checkpoint.step, checkpoint.epoch) == (14, 1)
        assert checkpoint.metrics["eval_loss"] > 0
        assert "training_args.bin" in checkpoint.files
    else:
        assert checkpoint.state_dict("registered")[1] == {"count": 14}
    shutil.rmtree(tmp_path / "killed")
    out = checkout(checkpoint, tmp_path / last)
    assert {path.name for path in out.iterdir()} == names
    assert train(SCRIPT, kind, tmp_path / "again", "--resume", out) == whole
    if kind == "accelerate":
        # The harness tells a resume that is not the same training.
        state = torch.load(out / "random_states_0.pkl", weights_only=False)
        state["torch_manual_seed"] = torch.Generator().manual_seed(5).get_state()
        torch.save(state, out / "random_states_0.pkl")
        assert train(SCRIPT, kind, tmp_path / "other", "--resume", out) != whole
