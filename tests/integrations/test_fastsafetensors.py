"""Packs are safetensors files: fastsafetensors reads one as it is."""

from __future__ import annotations

from pathlib import Path

import torch
from fastsafetensors import SafeTensorsFileLoader, SingleGroup

from registry import Registry


def test_a_pack_opens_in_fastsafetensors(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "r")
    torch.manual_seed(0)
    model = {
        "weight": torch.randn(300, 70),
        "half": torch.randn(33).bfloat16(),
        "steps": torch.tensor([7, 8]),
        "flag": torch.tensor([True, False, True]),
    }
    version = registry.save("net", {"model": model})
    digests = {name.removeprefix("model/"): digest for name, _, _, digest in version.parameters()}
    (pack,) = (registry.root / "packs").rglob("*.safetensors")
    loader = SafeTensorsFileLoader(SingleGroup(), device="cpu", nogds=True)
    loader.add_filenames({0: [str(pack)]})
    found = loader.copy_files_to_device()
    assert set(digests.values()) <= set(loader.get_keys())
    for name, tensor in model.items():
        assert torch.equal(found.get_tensor(digests[name]), tensor), name
    found.close()
    loader.close()
