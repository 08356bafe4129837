"""Folders of transformers, PEFT and timm go in, come out, and open with their own functions."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from killed import commands_of
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)

from registry import Registry
from registry.checkpoints.checkpoint import Checkpoint
from registry.files.exporting import export
from registry.files.importing import import_checkpoint
from registry.files.reading import read_checkpoint_file

BERT = BertConfig(
    vocab_size=40,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=16,
    max_position_embeddings=16,
)
GPT2 = GPT2Config(
    vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0
)
MIXTRAL = MixtralConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    num_local_experts=2,
)


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")


def imported(registry: Registry, folder: Path, model: str = "net") -> Checkpoint:
    return import_checkpoint(registry, read_checkpoint_file(folder), model)


def same(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


def tokenizer() -> PreTrainedTokenizerFast:
    """One that was trained on a sentence."""
    made = Tokenizer(models.WordLevel(unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.train_from_iterator(["the cat sat on the mat"], trainers.WordLevelTrainer(special_tokens=["?"]))
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?")


@pytest.mark.parametrize("shards", [None, 2_000])
@pytest.mark.parametrize(
    "net",
    [
        BertForSequenceClassification(BERT),
        GPT2LMHeadModel(copy.deepcopy(GPT2)).to(torch.bfloat16),
        MixtralForCausalLM(MIXTRAL),
    ],
    ids=lambda net: type(net).__name__,
)
def test_a_folder_of_transformers_opens_as_before(
    tmp_path: Path, registry: Registry, net: nn.Module, shards: int | None
) -> None:
    folder = tmp_path / "in"
    net.save_pretrained(folder, **({"max_shard_size": shards} if shards else {}))
    tokenizer().save_pretrained(folder)
    checkpoint = imported(registry, folder)
    out = export(checkpoint, tmp_path / "out", max_shard_size=shards)
    assert len(list(out.glob("*.safetensors"))) > 1 if shards else (out / "model.safetensors").is_file()
    opened = type(net).from_pretrained(out, dtype="auto")
    assert same(opened, net)
    assert AutoTokenizer.from_pretrained(out)("the cat")["input_ids"] == tokenizer()("the cat")["input_ids"]
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    again = imported(registry, out, "again")
    digests = [{path: digest for path, *_, digest in one.parameters()} for one in (checkpoint, again)]
    assert digests[0] == digests[1]


def test_a_live_network_with_tied_parameters_opens(tmp_path: Path, registry: Registry) -> None:
    net = GPT2LMHeadModel(copy.deepcopy(GPT2))
    registry.save("net", {"model": net.state_dict()})
    out = export(registry["net"], tmp_path / "out")
    net.config.save_pretrained(out)
    assert same(GPT2LMHeadModel.from_pretrained(out), net)


def test_an_adapter_opens(tmp_path: Path, registry: Registry) -> None:
    BertForSequenceClassification(BERT).save_pretrained(tmp_path / "base")

    def base() -> nn.Module:
        return BertForSequenceClassification.from_pretrained(tmp_path / "base")

    net = get_peft_model(base(), LoraConfig(target_modules=["query"], r=2, init_lora_weights=False))
    net.add_adapter("other", LoraConfig(target_modules=["value"], r=2, init_lora_weights=False))
    net.save_pretrained(tmp_path / "in")
    out = export(imported(registry, tmp_path / "in"), tmp_path / "out")
    assert (out / "adapter_model.safetensors").is_file()
    opened = PeftModel.from_pretrained(base(), out)
    opened.load_adapter(str(out / "other"), "other")
    state = opened.state_dict()
    assert {name for name in state if "lora" in name} == {name for name in net.state_dict() if "lora" in name}
    assert all(torch.equal(state[name], tensor) for name, tensor in net.state_dict().items())


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_a_folder_of_timm_opens_by_local_dir(tmp_path: Path, registry: Registry, name: str) -> None:
    net = timm.create_model(name, num_classes=3)
    timm.models.save_for_hf(net, tmp_path / "in", safe_serialization=True)
    out = export(imported(registry, tmp_path / "in"), tmp_path / "out")
    assert same(timm.create_model(f"local-dir:{out}", pretrained=True), net)


def test_automodel_opens_a_folder_of_pickled_parameters(tmp_path: Path, registry: Registry) -> None:
    net = BertForSequenceClassification(BERT)
    net.config.save_pretrained(tmp_path / "in")
    torch.save(net.state_dict(), tmp_path / "in" / "pytorch_model.bin")
    out = export(imported(registry, tmp_path / "in"), tmp_path / "out")
    assert same(AutoModel.from_pretrained(out), net.bert)


def test_the_commands_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("REGISTRY_ROOT", raising=False)
    Registry()
    for folder in ("llama", "checkpoint-14"):
        GPT2LMHeadModel(copy.deepcopy(GPT2)).save_pretrained(folder)
    Path("checkpoint-14/trainer_state.json").write_text('{"global_step": 14}')
    Path("model.onnx").write_bytes(b"onnx")
    commands = commands_of("Folders")
    assert len(commands) == 7
    for command in commands:
        done = subprocess.run(
            [sys.executable, "-m", "registry.cli", *command.split()],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    assert Path("copy.onnx").read_bytes() == b"onnx"
    assert GPT2LMHeadModel.from_pretrained("llama-out").num_parameters() > 0
    assert Path("resume/trainer_state.json").is_file()
