"""PEFT: an adapter is a component, and belongs to one base network, which is stored once and never changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from killed import commands_of, examples_of
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from registry import Registry
from registry.cli.app import app
from registry.files.exporting import export
from registry.files.importing import import_checkpoint
from registry.files.reading import read_checkpoint_file
from registry.integrations.peft import adapter, base_digest
from registry.store.errors import Incompatible, Invalid, Unsupported
from registry.transfer.matching import Category

IDS = torch.arange(16).reshape(2, 8)


def base_network(seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    ends = {"bos_token_id": 0, "eos_token_id": 1}
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=64, n_layer=2, n_head=2, **ends))


def config(**others: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True} | others)


def adapted(seed: int = 0, **others: Any) -> PeftModel:
    return get_peft_model(base_network(seed), config(**others))


def trained(model: nn.Module, steps: int = 2) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], 1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    return optimizer


def outputs(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


FORMS: dict[str, dict[str, Any]] = {
    "lora": {},
    "biases": {"bias": "all"},
    "a whole layer": {"modules_to_save": ["lm_head"]},
    "dora": {"use_dora": True},
    "embeddings": {"target_modules": ["c_attn", "wte"]},
}
"""Adapters of each form, as what is changed in a configuration."""


@pytest.mark.parametrize("others", FORMS.values(), ids=FORMS)
def test_an_adapter_comes_back_over_its_base(tmp_path: Path, others: dict[str, Any]) -> None:
    registry, model = Registry(tmp_path / "r"), adapted(**others)
    before = base_digest(model)
    optimizer = trained(model)
    assert base_digest(model) == before
    with registry.run("net") as run:
        run.save(adapter=adapter(model), optimizer=optimizer, step=2)
    expected = outputs(model)
    other = adapted(**others)
    again = trained(other, steps=1)
    registry["net"].restore(adapter=adapter(other), optimizer=again)
    assert torch.equal(outputs(other), expected)
    assert again.state_dict()["state"][0]["step"] == 2


def test_a_method_that_changes_the_base_comes_back_over_the_changed_one(tmp_path: Path) -> None:
    def made(way: str | bool) -> PeftModel:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        return get_peft_model(network, LoraConfig(r=2, target_modules=["0"], init_lora_weights=way))

    registry, model, x = Registry(tmp_path / "r"), made("olora"), torch.ones(1, 8)
    with torch.no_grad():
        adapter(model).state_dict()["base_model.model.0.lora_B.weight"].add_(1)
        with registry.run("net") as run:
            run.save(adapter=adapter(model))
        other = made("olora")
        registry["net"].restore(adapter=adapter(other))
        assert torch.equal(other(x), model(x))
        with pytest.raises(Incompatible, match="trained over another base network"):
            registry["net"].restore(adapter=adapter(made(True)))


def test_two_adapters_share_a_base_that_is_stored_once(tmp_path: Path) -> None:
    registry, network = Registry(tmp_path / "r"), base_network()
    base = registry.save("base", {"model": network.state_dict()})
    whole = registry.status().stored
    model = get_peft_model(network, config())
    model.add_adapter("other", config(r=4))
    sizes = []
    for name in ("default", "other"):
        model.set_adapter(name)
        optimizer = trained(model)
        with registry.run(name) as run:
            run.save(adapter=adapter(model, base=base), optimizer=optimizer)
            run.save(adapter=adapter(model, base=base), optimizer=optimizer)
        sizes.append(registry[name].state_dict("adapter"))
    assert registry.status().stored - whole < whole / 4
    assert [next(iter(size.values())).shape[0] for size in sizes] == [2, 4]
    assert all("default" not in name and "other" not in name for size in sizes for name in size)
    edge = {"kind": "adapter-of", "parent": base.id}
    assert all(edge in registry[name].lineage for name in ("default:v1", "default:v2", "other:v1"))
    assert registry.verify().problems == ()
    expected = outputs(model)
    fresh = get_peft_model(base_network(), config())
    fresh.add_adapter("mine", config(r=4))
    fresh.set_adapter("mine")
    registry["other"].restore(adapter=adapter(fresh))
    assert torch.equal(outputs(fresh), expected)


def test_another_base_is_refused_by_name(tmp_path: Path) -> None:
    registry, network = Registry(tmp_path / "r"), base_network()
    base = registry.save("base", {"model": network.state_dict()})
    with registry.run("net") as run:
        run.save(adapter=adapter(get_peft_model(network, config()), base=base))
    wrong = adapted(seed=1)
    before = outputs(wrong)
    with pytest.raises(
        Incompatible, match=r"adapter was trained over base:v1 .* base network here is another"
    ):
        registry["net"].restore(adapter=adapter(wrong))
    assert torch.equal(outputs(wrong), before)
    with pytest.raises(Incompatible, match="is not that of base:v1"):
        adapter(wrong, base=base)


def test_a_base_that_is_changed_is_noticed() -> None:
    model = adapted()
    before = base_digest(model)
    with torch.no_grad():
        model.get_input_embeddings().weight[0, 0] += 1
    assert base_digest(model) != before


@pytest.mark.parametrize(
    ("others", "problem"),
    [({"r": 4}, "has shape"), ({"target_modules": ["c_attn", "c_proj"]}, "is not in the checkpoint")],
    ids=["rank", "layers"],
)
def test_another_adapter_is_refused(tmp_path: Path, others: dict[str, Any], problem: str) -> None:
    registry, model = Registry(tmp_path / "r"), adapted(**others)
    with registry.run("net") as run:
        run.save(adapter=adapter(adapted()))
    before = adapter(model).state_dict()
    with pytest.raises(Incompatible, match=problem):
        registry["net"].restore(adapter=adapter(model))
    assert all(torch.equal(one, before[name]) for name, one in adapter(model).state_dict().items())


def test_bad_input_is_refused_in_one_line(tmp_path: Path) -> None:
    model = adapted()
    with pytest.raises(Invalid, match="GPT2LMHeadModel is no PeftModel; give what get_peft_model"):
        adapter(base_network())
    with pytest.raises(Invalid, match="there is no adapter 'mine'; there are default"):
        adapter(model, "mine")
    with pytest.raises(Invalid, match=r"base is 'base', expected a version: base=registry\['base'\]"):
        adapter(model, base="base")  # type: ignore[arg-type]
    model.get_input_embeddings().weight.requires_grad_(True)
    with (
        pytest.raises(Unsupported, match=r"wte.weight of the base network is trained.*modules_to_save"),
        Registry(tmp_path / "r").run("net") as run,
    ):
        run.save(adapter=adapter(model))


@pytest.mark.parametrize("others", FORMS.values(), ids=FORMS)
def test_an_exported_adapter_opens_with_peft(tmp_path: Path, others: dict[str, Any]) -> None:
    """Nothing of this machine is in the folder."""
    registry, network = Registry(tmp_path / "r"), base_network()
    network.name_or_path = str(tmp_path / "secret" / "tiny")
    model = get_peft_model(network, config(**others))
    optimizer = trained(model)
    with registry.run("net") as run:
        run.save(adapter=adapter(model), optimizer=optimizer)
    # PEFT reads one file, however large.
    folder = export(registry["net"], tmp_path / "out", max_shard_size=100)
    assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny"
    opened = PeftModel.from_pretrained(base_network(), folder)
    assert torch.equal(outputs(opened), outputs(model))
    content = import_checkpoint(registry, read_checkpoint_file(folder), "again")
    state = registry["net"].state_dict("adapter")
    assert content.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in content.state_dict().items())


def test_an_adapter_under_another_name_is_exported_by_it(tmp_path: Path) -> None:
    registry, model = Registry(tmp_path / "r"), adapted(init_lora_weights=False)
    with registry.run("net") as run:
        run.save(model=model, lora=adapter(model))
    folder = export(registry["net"], tmp_path / "out", component="lora")
    assert torch.equal(outputs(PeftModel.from_pretrained(base_network(), folder)), outputs(model))


def test_a_network_matches_itself_under_peft(tmp_path: Path) -> None:
    counts = Registry(tmp_path / "r").diff(base_network(), adapted()).counts
    assert counts[Category.PREFIX].names == len(base_network().state_dict())
    assert Category.ONLY_A not in counts


def test_the_lines_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other: saved, exported as an adapter, and merged."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("REGISTRY_ROOT", raising=False)
    registry, network = Registry(), base_network()
    (block,) = examples_of("PEFT")
    torch.manual_seed(1)
    there: dict[str, Any] = {
        "get_peft_model": get_peft_model,
        "registry": registry,
        "network": network,
        "config": config(init_lora_weights=False),
        "optimizer": torch.optim.SGD(network.parameters(), 0.1),
        "step": 1,
    }
    exec(compile(block, "page", "exec", dont_inherit=True), there)
    assert registry["tuned"].lineage == [{"kind": "adapter-of", "parent": registry["base"].id}]
    expected = outputs(there["model"])
    commands = commands_of("PEFT")
    assert len(commands) == 2
    for command in commands:
        result = CliRunner().invoke(app, command.split())
        assert result.exit_code == 0, result.output
    assert torch.equal(outputs(PeftModel.from_pretrained(base_network(), "adapter")), expected)
    assert not torch.equal(outputs(base_network()), expected)
    merged = GPT2LMHeadModel.from_pretrained("merged")
    assert torch.equal(outputs(merged), outputs(there["model"].merge_and_unload()))
