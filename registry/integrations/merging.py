"""Merging: an adapter of PEFT and its base network as one network, in a folder that `from_pretrained` opens.

    from registry.integrations.merging import export_merged

    export_merged(registry, "tuned@best", "out/")

PEFT itself merges, on the CPU and in the dtype of the base network.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from registry.catalog.versions import by_id
from registry.checkpoints.building import build
from registry.checkpoints.checkpoint import Checkpoint
from registry.files.exporting import names_folder
from registry.files.folder_writing import SHARD, adapter_config, export_folder
from registry.files.outgoing import OutgoingFolder
from registry.files.shards import strict_json
from registry.home import Home
from registry.integrations.peft import adapter
from registry.progress import Progress, silent
from registry.store.errors import Invalid, NotFound, Unsupported, naming
from registry.store.text import printable, quoted

# `registry.integrations.peft` has checked the release.
from peft import PeftConfig, get_peft_model  # isort: skip


def export_merged(
    home: Home,
    reference: str,
    folder: Path | str,
    *,
    base: str | None = None,
    max_shard_size: int = SHARD,
    progress: Progress = silent,
) -> Path:
    """Write an adapter, merged into its base network, to a folder, whole or not at all.

    The folder has the parameters that `merge_and_unload()` of PEFT gives, and the configuration and files of the base.

        export_merged(registry, "tuned@best", "out/")

    Args:
        reference: a version that was saved by `run.save(adapter=adapter(model))`, or imported from a folder of PEFT.
        folder: must not exist, or be empty.
        base: the version of the base network; by default the one that the lineage of the adapter leads to.
        max_shard_size: bytes of tensors in one file; larger networks become several files, with an index.
        progress: called with the bytes that are written, and of all.

    Returns:
        `folder`, as a Path.

    Raises:
        Conflict: if there is a folder that is not empty, or something else.
        Invalid: if `folder` names a file, or the base network cannot be built as it is recorded.
        NotFound: if a version is not there, the base is not in the registry, or the folder above does not exist.
        Incompatible: if the adapter was trained over other parameters than those of the base, or does not fit them.
        Unsupported: if the version is no adapter, one that PEFT cannot merge, or the base does not say how it is built.
        Corrupt: if a stored byte is not what was saved.
        StorageError: if the system refuses; nothing is left behind.
    """
    if not names_folder(folder):
        raise Invalid(f"{printable(str(folder))}: a merged network becomes a folder", "end it in /")
    # Nothing is merged in vain.
    OutgoingFolder(Path(folder))
    checkpoint = Checkpoint.named(home, reference)
    config, state = _adapter_in(checkpoint)
    found = Checkpoint.named(home, base) if base is not None else _base_of(home, checkpoint)
    # PEFT draws the parameters of an adapter before it loads them.
    with torch.random.fork_rng(devices=[]):
        merged = _merged(home, checkpoint, found, config=config, state=state)
    return export_folder(
        found, folder, state=merged.state_dict(), max_shard_size=max_shard_size, progress=progress
    )


def _adapter_in(checkpoint: Checkpoint) -> tuple[PeftConfig, Mapping[str, torch.Tensor]]:
    """The configuration and the parameters of an adapter."""
    weights = (checkpoint.record.get("source") or {}).get("weights") or ("",)
    config: Any = None
    if "adapter" in checkpoint.components:
        state = checkpoint.state_dict("adapter")
        config = adapter_config(state)
    elif str(weights[0]).startswith("adapter_model"):
        state = checkpoint.state_dict()
        with naming(f"{checkpoint.name}: adapter_config.json"):
            config = strict_json(checkpoint.files.get("adapter_config.json", b"null"))
    else:
        raise Unsupported(f"{checkpoint.name} is no adapter of PEFT", "export it without merging")
    if not isinstance(config, Mapping):
        raise Unsupported(f"{checkpoint.name} does not have the configuration of its adapter")
    try:
        found: PeftConfig = cast(Any, PeftConfig).from_peft_type(**config)
        return found, state
    except (KeyError, TypeError, ValueError) as error:
        raise Unsupported(
            f"{checkpoint.name}: PEFT cannot take the configuration of the adapter: {quoted(str(error))}"
        ) from None


def _base_of(home: Home, checkpoint: Checkpoint) -> Checkpoint:
    """The version of the base network, by the lineage."""
    parents = [edge["parent"] for edge in checkpoint.lineage if edge["kind"] == "adapter-of"]
    if not parents:
        raise NotFound(f"{checkpoint.name} does not say what its base network is", "name its version as base")
    version = by_id(home.catalog, parents[0])
    if version is None:
        raise NotFound(
            f"the base network of {checkpoint.name} ({parents[0][:12]}) is not in the registry under this id",
            "import or save it, and name its version as base",
        )
    return Checkpoint(home.store, version, home.catalog)


def _merged(
    home: Home,
    checkpoint: Checkpoint,
    base: Checkpoint,
    *,
    config: PeftConfig,
    state: Mapping[str, torch.Tensor],
) -> nn.Module:
    if "builder" not in base.provenance:
        raise Unsupported(
            f"{base.name} does not say how its network is built",
            "save it with run.save(model=network), or import its folder",
        )
    model = get_peft_model(build(home, base.id), config)
    with naming(checkpoint.name):
        adapter(model).load_state_dict(state)
    if not hasattr(model, "merge_and_unload"):
        raise Unsupported(f"{checkpoint.name}: PEFT cannot merge an adapter of the kind {config.peft_type}")
    try:
        merged: nn.Module = model.merge_and_unload()
    except (ValueError, NotImplementedError, RuntimeError) as error:
        raise Unsupported(f"{checkpoint.name}: PEFT cannot merge it: {quoted(str(error))}") from None
    return merged
