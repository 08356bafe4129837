"""What the files of a registry take."""

from __future__ import annotations

import torch

from registry import Registry
from registry.upkeep.usage import on_disk, usage


def test_every_file_counts_once_and_links_do_not(registry: Registry) -> None:
    with registry.run("net") as run:
        run.save(model=torch.nn.Linear(3, 3))
        (registry.root / "runs" / run.name / "run.log").write_text("x" * 10_000)
    (registry.root / "runs" / "elsewhere").symlink_to("/")
    registry.catalog.close()
    found = on_disk(registry.root)
    files = [path for path in registry.root.rglob("*") if path.is_file() and not path.is_symlink()]
    assert sum(found.values()) == sum(path.stat().st_size for path in files)
    assert found["tensors"] == usage(registry.catalog).stored
    assert found["runs"] >= 10_000
    assert on_disk(registry.root / "none") == dict.fromkeys(found, 0)
