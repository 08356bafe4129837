"""An adapter is merged into its base as PEFT does it, and parameters have the names in a folder that `save_pretrained` gives."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from killed import train_forked
from merge import base_network, export_killed
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from registry import Registry
from registry.checkpoints.checkpoint import Checkpoint
from registry.files.exporting import export
from registry.files.importing import import_checkpoint
from registry.files.reading import read_checkpoint_file
from registry.integrations import pretrained
from registry.integrations.merging import export_merged
from registry.integrations.peft import adapter
from registry.store.errors import Conflict, Incompatible, Invalid, NotFound, RegistryError, Unsupported

TARGETS = {"r": 2, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM"}


def mixtral(**others: Any) -> MixtralForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_local_experts": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return MixtralForCausalLM(MixtralConfig(vocab_size=40, **sizes, **heads, **others))


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")


def imported(registry: Registry, folder: Path, model: str) -> Checkpoint:
    return import_checkpoint(registry, read_checkpoint_file(folder), model)


def base_in(registry: Registry, folder: Path, network: Any, **others: Any) -> Checkpoint:
    """A base as people have it: a folder with a tokenizer beside the parameters, imported."""
    network.save_pretrained(folder, **others)
    (folder / "tokenizer.json").write_bytes(b'{"version": "1.0"}')
    return imported(registry, folder, "base")


def adapted(network: Any, **others: Any) -> Any:
    """The network under an adapter that changes it."""
    torch.manual_seed(1)
    model = get_peft_model(network, LoraConfig(**TARGETS | {"init_lora_weights": False} | others))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora" not in name:
                parameter.add_(0.25)
    return model


def saved(registry: Registry, model: Any, base: Checkpoint | None, name: str | None = None) -> Checkpoint:
    with registry.run("tuned") as run:
        return run.save(adapter=adapter(model, name, base=base))


def names_in(folder: Path) -> set[str]:
    found: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            found |= set(opened.keys())
    return found


def assert_same(a: nn.Module, b: nn.Module) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    different = [
        name
        for name in left
        if left[name].dtype != right[name].dtype or not torch.equal(left[name], right[name])
    ]
    assert different == []


@pytest.mark.parametrize(
    ("network", "others", "shards"),
    [
        ({}, {}, None),
        ({}, {"use_dora": True}, 5_000),
        ({}, {"modules_to_save": ["lm_head"]}, None),
        ({}, {"bias": "all", "use_rslora": True}, None),
        ({"tie_word_embeddings": True}, {}, None),
        ({"tie_word_embeddings": True}, {"target_modules": ["embed_tokens"]}, None),
        ({"tie_word_embeddings": True}, {"modules_to_save": ["lm_head"]}, None),
        ({"dtype": torch.bfloat16}, {}, 5_000),
        ({"dtype": torch.bfloat16}, {"use_dora": True, "modules_to_save": ["lm_head"]}, None),
    ],
    ids=[
        "lora",
        "dora, sharded",
        "a whole layer",
        "biases",
        "tied",
        "tied embeddings adapted",
        "tied head saved whole",
        "bf16, sharded",
        "bf16, dora",
    ],
)
def test_a_merged_folder_is_what_peft_gives(
    tmp_path: Path, registry: Registry, network: dict[str, Any], others: dict[str, Any], shards: int | None
) -> None:
    folder, shard = tmp_path / "base", shards or 10**9
    base = base_in(registry, folder, base_network(**network), max_shard_size=shard)
    kind: Any = LlamaForCausalLM
    model = adapted(kind.from_pretrained(folder), **others)
    saved(registry, model, base)
    out = export_merged(registry, "tuned@latest", tmp_path / "out", max_shard_size=shard)
    expected = model.merge_and_unload()
    opened: Any = AutoModelForCausalLM.from_pretrained(out)
    assert_same(opened, expected)
    assert len(list(out.glob("*.safetensors"))) > 1 if shards else (out / "model.safetensors").is_file()
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    assert not [one.name for one in out.iterdir() if "adapter" in one.name]
    assert registry.verify().problems == ()


def test_two_adapters_of_one_base_are_merged_apart(tmp_path: Path, registry: Registry) -> None:
    base = base_in(registry, tmp_path / "base", base_network())
    model = adapted(base_network())
    model.add_adapter("other", LoraConfig(**TARGETS | {"r": 4, "init_lora_weights": False}))
    first, second = saved(registry, model, base, "default"), saved(registry, model, base, "other")
    for version, name in ((first, "default"), (second, "other")):
        out = export_merged(registry, version.name, tmp_path / name)
        again = adapted(base_network())
        again.add_adapter("other", LoraConfig(**TARGETS | {"r": 4, "init_lora_weights": False}))
        for one in ("default", "other"):
            registry[f"tuned:v{1 + (one == 'other')}"].restore(adapter=adapter(again, one))
        opened: Any = LlamaForCausalLM.from_pretrained(out)
        assert_same(opened, again.merge_and_unload(adapter_names=[name]))


def test_a_folder_of_peft_is_merged_into_the_base_that_is_named(tmp_path: Path, registry: Registry) -> None:
    """So is an adapter that was saved before its base; the digest tells whether it is the right one."""
    base = base_in(registry, tmp_path / "base", base_network(dtype=torch.bfloat16))
    config = LoraConfig(**TARGETS | {"init_lora_weights": False})
    model: Any = get_peft_model(base_network(dtype=torch.bfloat16), config, autocast_adapter_dtype=False)
    model.save_pretrained(tmp_path / "half")
    saved(registry, model, None)
    imported(registry, tmp_path / "half", "folder")
    kept: Any = PeftModel.from_pretrained(base_network(dtype=torch.bfloat16), tmp_path / "half")
    expected = kept.merge_and_unload()
    for reference in ("folder", "tuned"):
        with pytest.raises(NotFound, match="name its version as base"):
            export_merged(registry, reference, tmp_path / reference)
        out = export_merged(registry, reference, tmp_path / reference, base=base.name)
        opened: Any = LlamaForCausalLM.from_pretrained(out, dtype="auto")
        assert_same(opened, expected)


@pytest.mark.parametrize("is_live", [True, False], ids=["base saved by a run", "base imported"])
def test_a_network_with_other_names_is_merged_and_written_under_those_on_disk(
    tmp_path: Path, registry: Registry, is_live: bool
) -> None:
    network = mixtral()
    if is_live:
        with registry.run("base") as run:
            base = run.save(model=network)
    else:
        base = base_in(registry, tmp_path / "base", network)
    model = adapted(network, target_modules=["q_proj"])
    saved(registry, model, base)
    out = export_merged(registry, "tuned", tmp_path / "out")
    expected = model.merge_and_unload()
    expected.save_pretrained(tmp_path / "expected")
    assert names_in(out) == names_in(tmp_path / "expected")
    opened: Any = MixtralForCausalLM.from_pretrained(out)
    assert_same(opened, expected)


def test_merging_draws_no_random_number(tmp_path: Path, registry: Registry) -> None:
    saved(registry, adapted(base_network()), base_in(registry, tmp_path / "base", base_network()))
    before = torch.get_rng_state()
    export_merged(registry, "tuned", tmp_path / "out")
    assert torch.equal(torch.get_rng_state(), before)


def test_what_cannot_be_merged_is_refused_in_one_line(tmp_path: Path, registry: Registry) -> None:
    network = base_network()
    base = base_in(registry, tmp_path / "base", network)
    bare = registry.save("bare", {"model": network.state_dict()})
    other = base_in(registry, tmp_path / "other", base_network(seed=5))
    saved(registry, adapted(base_network()), base)
    with registry.run("prompt") as run:
        prompt = get_peft_model(
            base_network(), PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
        )
        run.save(adapter=adapter(prompt, base=base))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    cases: list[tuple[type[RegistryError], str, str, str | None, str]] = [
        (Unsupported, r"base:v1 is no adapter of PEFT; export it without", "base:v1", None, "out"),
        (Unsupported, r"prompt:v1: PEFT cannot merge an adapter of the kind", "prompt", None, "out"),
        (Unsupported, r"bare:v1 does not say how its network is built", "tuned", bare.name, "out"),
        (
            Incompatible,
            r"tuned:v1: .*trained over base:v1 .* load that base first",
            "tuned",
            other.name,
            "out",
        ),
        (NotFound, "base", "tuned", "nothing", "out"),
        (Invalid, r"out.safetensors: a merged network becomes a folder", "tuned", None, "out.safetensors"),
        (Conflict, "the folder is not empty", "tuned", None, "full"),
    ]
    for kind, told, reference, named, out in cases:
        with pytest.raises(kind, match=told if kind is not NotFound else "nothing") as caught:
            export_merged(registry, reference, tmp_path / out, base=named)
        assert "\n" not in str(caught.value)
    registry.remove([base.name], force=True)
    with pytest.raises(NotFound, match=r"base network of tuned:v1 \([0-9a-f]{12}\) is not in the registry"):
        export_merged(registry, "tuned", tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_the_command_merges_and_says_what_is_missing(tmp_path: Path, registry: Registry) -> None:
    saved(registry, adapted(base_network()), base_in(registry, tmp_path / "base", base_network()))

    def called(*words: str, program: str = "from registry.cli import main; main()") -> tuple[int, str]:
        command = [sys.executable, "-c", program, "export", *words, "--root", str(registry.root)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    missing = """
import importlib.metadata as metadata
found = metadata.version
def version(name):
    if name == "peft":
        raise metadata.PackageNotFoundError(name)
    return found(name)
metadata.version = version
from registry.cli import main; main()
"""
    code, told = called("tuned", f"{tmp_path}/out/", "--merge", program=missing)
    assert code == 1
    assert (
        told.strip()
        == "error: --merge: peft is not installed\nhint:  run: pip install 'torch-registry[peft]'"
    )
    assert called("tuned", f"{tmp_path}/out/", "--base", "base")[0] == 2
    assert not (tmp_path / "out").exists()
    code, told = called("tuned", f"{tmp_path}/out/", "--merge", "--max-shard-size", "5KB")
    assert code == 0, told
    assert re.search(r"tuned:v1 → \S+/out  \d", told)
    opened: Any = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert_same(opened, adapted(base_network()).merge_and_unload())


def test_a_merge_that_is_killed_leaves_no_folder_or_a_whole_one(tmp_path: Path, registry: Registry) -> None:
    saved(registry, adapted(base_network()), base_in(registry, tmp_path / "base", base_network()))
    whole = export_merged(registry, "tuned", tmp_path / "whole", max_shard_size=5_000)
    content = {one.name: one.read_bytes() for one in whole.iterdir()}
    left = 0
    for step in (1, 2, 5, 9, 14):
        train_forked(export_killed, registry.root, tmp_path / "out", step, killed=True)
        assert not (tmp_path / "out").exists()
        left += len(list(tmp_path.glob(".out*")))
    assert left >= 3
    out = export_merged(registry, "tuned", tmp_path / "out", max_shard_size=5_000)
    assert {one.name: one.read_bytes() for one in out.iterdir()} == content
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("shards", [None, 5_000])
@pytest.mark.parametrize("others", [{}, {"tie_word_embeddings": True}, {"dtype": torch.bfloat16}], ids=str)
def test_a_live_network_is_exported_under_the_names_on_disk(
    tmp_path: Path, registry: Registry, others: dict[str, Any], shards: int | None
) -> None:
    net = mixtral(**others)
    net = net.to(others.get("dtype", torch.float32))
    with registry.run("net") as run:
        run.save(model=net)
    net.save_pretrained(tmp_path / "theirs")
    out = export(registry["net"], tmp_path / "out", max_shard_size=shards)
    assert len(list(out.glob("*.safetensors"))) > 1 if shards else (out / "model.safetensors").is_file()
    tied = {"lm_head.weight"} if others.get("tie_word_embeddings") else set()
    assert names_in(out) == names_in(tmp_path / "theirs") | tied
    opened: Any = MixtralForCausalLM.from_pretrained(out, dtype="auto")
    assert_same(opened, net)
    again = imported(registry, out, "again")
    back = export(again, tmp_path / "back", max_shard_size=shards)
    assert names_in(back) == names_in(out)
    once_more = imported(registry, back, "again")
    assert list(once_more.parameters()) == list(again.parameters())


def test_where_the_network_cannot_be_built_the_names_stay_and_a_line_says_so(
    tmp_path: Path, registry: Registry, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a program whose transformers is older than the network."""
    net = mixtral()
    with registry.run("odd") as run:
        run.save(model=net)
    monkeypatch.setattr(pretrained.transformers, "MixtralForCausalLM", None)
    with caplog.at_level(logging.WARNING):
        out = export(registry["odd"], tmp_path / "out")
    (line,) = [one.getMessage() for one in caplog.records if "names" in one.getMessage()]
    assert line.startswith("odd:v1: its parameters keep the names that they have in the live network")
    assert names_in(out) == set(net.state_dict())


def test_a_network_without_other_names_is_exported_as_before(tmp_path: Path, registry: Registry) -> None:
    net = base_network()
    with registry.run("net") as run:
        run.save(model=net)
    one = export(registry["net"], tmp_path / "one", max_shard_size=5_000)
    registry.save("bare", {"model": net.state_dict()})
    other = export(registry["bare"], tmp_path / "other", max_shard_size=5_000)
    for file in other.glob("model*"):
        assert (one / file.name).read_bytes() == file.read_bytes()


def test_the_commands_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the registry. What the converters would have made is made up."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("REGISTRY_ROOT", raising=False)
    registry = Registry()
    base = base_in(registry, tmp_path / "base", base_network())
    with registry.run("llama", monitor="loss") as run:
        run.save(model=base_network(), loss=1.0)
    with registry.run("tuned", monitor="loss") as run:
        run.save(adapter=adapter(adapted(base_network()), base=base), loss=1.0)
    for name in ("model.onnx", "model.onnx.data"):
        Path(name).write_bytes(b"onnx")
    page = (Path(__file__).parents[2] / "docs" / "converting.md").read_text()
    commands = re.findall(r"^\$ registry (.*)$", page, re.MULTILINE)
    assert len(commands) == 4
    for command in commands:
        line = [sys.executable, "-m", "registry.cli", *command.split()]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert "model.onnx.data" in done.stdout
    for folder in ("llama-out", "out"):
        opened: Any = AutoModelForCausalLM.from_pretrained(folder)
        assert opened.num_parameters() == base_network().num_parameters()
