"""Networks of transformers and timm are built again from a version, and nothing that a record names is fetched or run."""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.utils import CheckpointSaver, ModelEmaV2
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
)

from registry import Registry
from registry.files.exporting import export
from registry.files.importing import import_checkpoint
from registry.files.reading import read_checkpoint_file
from registry.store.errors import Incompatible, Invalid, RegistryError, Unsupported

TINY = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
}
NETWORKS = {
    "bert": lambda: BertForSequenceClassification(BertConfig(**TINY, num_labels=3)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2)).bfloat16(),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**TINY, num_key_value_heads=1, num_local_experts=2)),
}


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")


def same(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return (
        type(a) is type(b)
        and left.keys() == right.keys()
        and all(
            left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
        )
    )


def imported(registry: Registry, path: Path) -> None:
    import_checkpoint(registry, read_checkpoint_file(path), "net")


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_network_of_transformers_is_built_from_a_run_and_from_a_folder(
    tmp_path: Path, registry: Registry, kind: str
) -> None:
    """Those of the folder have other names, as tied and converted parameters have."""
    net = NETWORKS[kind]()
    with registry.run("net") as run:
        run.save(model=net)
    built = registry.build("net")
    assert same(built, net)
    assert not built.training
    net.save_pretrained(tmp_path / "hub")
    imported(registry, tmp_path / "hub")
    assert same(registry.build("net:v2"), net)
    out = export(registry["net:v1"], tmp_path / "out")
    assert same(type(net).from_pretrained(out, dtype="auto"), net)


@pytest.mark.parametrize(
    ("name", "given"),
    [("test_resnet", {"num_classes": 3, "in_chans": 1}), ("test_vit", {"num_classes": 2, "img_size": 32})],
)
def test_a_network_of_timm_is_built_from_a_run_and_from_a_folder(
    tmp_path: Path, registry: Registry, name: str, given: dict[str, Any]
) -> None:
    net = timm.create_model(name, **given)
    net.reset_classifier(5)
    with registry.run("net") as run:
        run.save(model=net)
    built = registry.build("net")
    assert same(built, net)
    assert built.pretrained_cfg["mean"] == net.pretrained_cfg["mean"]
    timm.models.save_for_hf(net, tmp_path / "hub", safe_serialization=True)
    imported(registry, tmp_path / "hub")
    assert same(registry.build("net:v2"), net)
    for version in ("net:v1", "net:v2"):
        out = export(registry[version], tmp_path / version[-2:])
        assert same(timm.create_model(f"local-dir:{out}", pretrained=True), net)


def test_a_checkpoint_of_timms_training_script_is_built(tmp_path: Path, registry: Registry) -> None:
    args = argparse.Namespace(
        model="test_resnet", num_classes=3, in_chans=None, model_kwargs={}, gp=None, eval_metric="top1"
    )
    net = timm.create_model("test_resnet", num_classes=3)
    ema = ModelEmaV2(copy.deepcopy(net))
    with torch.no_grad():
        next(ema.module.parameters()).add_(1.0)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    saver = CheckpointSaver(
        model=net, optimizer=optimizer, args=args, model_ema=ema, checkpoint_dir=str(tmp_path)
    )
    saver.save_checkpoint(4, 0.75)
    imported(registry, tmp_path / "model_best.pth.tar")
    checkpoint = registry["net"]
    assert (checkpoint.epoch, dict(checkpoint.metrics)) == (4, {"top1": 0.75})
    assert {"model", "ema", "optimizer"} <= set(checkpoint.components)
    assert same(registry.build("net"), net)
    assert same(registry.build("net", component="ema"), ema.module)
    out = export(checkpoint, tmp_path / "out.pth.tar")
    again = timm.create_model("test_resnet", num_classes=3, checkpoint_path=str(out))
    assert same(again, ema.module)


def recorded(registry: Registry, builder: str, network: dict[str, Any]) -> None:
    registry.save("net", {"model": {"w": torch.ones(1)}}, provenance={"builder": builder, "network": network})


@pytest.mark.parametrize(
    ("builder", "network", "kind", "told"),
    [
        ("transformers", {"class": "Trainer", "config": {}}, Invalid, "has no network 'Trainer' of its own"),
        ("transformers", {"class": "os.system", "config": {}}, Invalid, "has no network"),
        ("transformers", {"class": 5}, Invalid, "has no network '5'"),
        ("transformers", {"class": "BertModel"}, Invalid, "configuration of BertModel is not recorded"),
        (
            "transformers",
            {"class": "BertModel", "config": {"hidden_size": "x"}},
            Invalid,
            "BertModel cannot take",
        ),
        (
            "transformers",
            {"class": "BertModel", "config": {"quantization_config": {"a": 1}}},
            Unsupported,
            "quantized",
        ),
        (
            "transformers",
            {"class": "BertModel", "config": TINY},
            Incompatible,
            r"net:v1: \d+ parameters of BertModel are",
        ),
        ("timm", {"architecture": "local-dir:/tmp"}, Invalid, "has no architecture 'local-dir:/tmp'"),
        ("timm", {"architecture": "hf-hub:timm/x"}, Invalid, "has no architecture"),
        ("timm", {"architecture": ["x"]}, Invalid, "has no architecture"),
        (
            "timm",
            {"architecture": "test_vit", "model_args": {"checkpoint_path": "x"}},
            Invalid,
            "not an argument",
        ),
        (
            "timm",
            {"architecture": "test_vit", "model_args": {"none": 1}},
            Invalid,
            "cannot take this configuration",
        ),
        ("timm", {"odd": 1}, Invalid, "cannot take this configuration"),
        ("timm", {"architecture": "test_vit"}, Incompatible, "net:v1"),
    ],
)
def test_a_record_that_does_not_fit_is_named(
    registry: Registry, builder: str, network: dict[str, Any], kind: type[RegistryError], told: str
) -> None:
    recorded(registry, builder, network)
    with pytest.raises(kind, match=told) as caught:
        registry.build("net")
    assert "\n" not in str(caught.value)


def test_a_configuration_fetches_no_code(tmp_path: Path, registry: Registry) -> None:
    net = NETWORKS["bert"]()
    net.save_pretrained(tmp_path / "hub")
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    config |= {
        "auto_map": {"AutoModel": "modeling_evil.Evil"},
        "_attn_implementation": "me/kernels",
        "attn_implementation": "me/kernels",
    }
    (tmp_path / "hub" / "config.json").write_text(json.dumps(config))
    (tmp_path / "hub" / "modeling_evil.py").write_text("raise SystemExit('this ran')")
    imported(registry, tmp_path / "hub")
    assert same(registry.build("net"), net)
    assert registry["net"].files["modeling_evil.py"] == b"raise SystemExit('this ran')"


def test_a_class_of_the_users_own_is_not_taken_for_transformers(registry: Registry) -> None:
    class Mine(BertForSequenceClassification):
        pass

    with registry.run("net") as run:
        run.save(model=Mine(BertConfig(**TINY)))
    assert registry["net"].provenance["builder"] == "net"
