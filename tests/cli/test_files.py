"""Files through the command line: import, export, config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from conftest import Run

from registry import Registry


@pytest.fixture
def checkpoint(filled: Registry, tmp_path: Path) -> dict[str, Any]:
    """A training checkpoint, which lies in best.pt."""
    net = torch.nn.Linear(4, 2)
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    tree = {"epoch": 7, "loss": 0.25, "model": net.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(tree, tmp_path / "best.pt")
    return tree


def test_an_import_stores_equal_tensors_once_and_exports_the_same_tree(
    filled: Registry, run: Run, checkpoint: dict[str, Any]
) -> None:
    first = run("import", "best.pt", "--name", "net", "--metric", "accuracy=0.91", "--meta", "seed=3")
    assert first.status == 0
    assert first.out.startswith("net:v1  ")
    assert "0 B more on the disk" in run("import", "best.pt", "--name", "net").out
    shown = run("show", "net:v1", "--json").json
    assert (shown["epoch"], shown["loss"], shown["metrics"]) == (7, 0.25, {"accuracy": 0.91})
    assert shown["meta"] == {"seed": 3}
    assert shown["source"]["file"] == "best.pt"
    assert run("export", "net:v1", "back.pt").status == 0
    back = torch.load("back.pt", weights_only=True)
    assert list(back) == list(checkpoint)
    assert all(torch.equal(back["model"][name], tensor) for name, tensor in checkpoint["model"].items())
    assert back["optimizer"]["param_groups"] == checkpoint["optimizer"]["param_groups"]


def test_meta_fills_the_named_fields_and_overrides_the_file(
    filled: Registry, run: Run, checkpoint: dict[str, Any]
) -> None:
    words = ["--meta", "epoch=9", "--meta", "loss=nan", "--meta", "step=100", "--meta", "data=digits"]
    document = run("import", "best.pt", "--name", "net", *words, "--tag", "old", "--json").json["imported"][0]
    assert (document["epoch"], document["step"], document["loss"]) == (9, 100, None)
    assert document["meta"] == {"data": "digits"}
    assert document["tags"] == ["old"]
    assert document["written"] > 0
    for words, message in {
        ("--meta", "epoch=x"): "epoch is 'x', expected a whole number",
        ("--meta", "loss=x"): "--meta loss is 'x', expected a number",
        ("--metric", "accuracy=high"): "--metric accuracy is 'high', expected a number",
        ("--metric", " a=1"): "' a' cannot be the name of a metric",
        ("--tag", "a b"): "'a b' cannot be the name of a tag",
    }.items():
        done = run("import", "best.pt", "--name", "bad", *words)
        assert (done.status, done.out) == (1, "")
        assert message in done.err
    assert run("import", "best.pt", "--name", "bad", "--meta", "epoch").status == 2
    assert run("import", "best.pt", "--name", "bad", "--meta", "a=1", "--meta", "a=2").status == 2
    assert run("import", "none.pt", "--name", "bad").status == 2
    assert run("show", "bad").status == 1


def test_a_file_that_cannot_be_imported_is_named_and_the_others_are(
    filled: Registry, run: Run, checkpoint: dict[str, Any]
) -> None:
    Path("bad.pt").write_bytes(b"no checkpoint")
    Path("loop.pt").symlink_to("loop.pt")
    assert run("import", "loop.pt", "best.pt", "--name", "beside").status == 1
    assert run("show", "beside:v1").status == 0
    files = ["best.pt", "bad.pt", "missing.pt", "best.pt"]
    done = run("import", *files, "--name", "several")
    assert done.status == 1
    assert [line.split()[0] for line in done.out.splitlines()] == ["several:v1", "several:v2"]
    assert done.err.splitlines() == [
        "error: bad.pt: not a file of torch.save, by its first bytes",
        "error: missing.pt: there is no such file",
        "error: 2 of 4 files were imported; these were not: bad.pt, missing.pt",
    ]
    found = run("import", *files, "--name", "several", "--json")
    assert found.status == 1
    assert [one["name"] for one in found.json["imported"]] == ["several:v3", "several:v4"]
    assert [one["file"] for one in found.json["failed"]] == ["bad.pt", "missing.pt"]
    assert "there is no such file" in found.json["failed"][1]["error"]


def test_a_folder_goes_in_and_out_with_all_its_files(filled: Registry, run: Run) -> None:
    Path("llama/.git").mkdir(parents=True)
    tensors = {"a": torch.randn(300), "b": torch.randn(300).bfloat16()}
    safetensors.torch.save_file(tensors, "llama/model.safetensors")
    torch.save(tensors, "llama/pytorch_model.bin")
    kept = {"config.json": b'{"model_type": "llama"}', "tokenizer.json": b"{}"}
    for name, data in kept.items():
        Path("llama", name).write_bytes(data)
    done = run("import", "llama", "--name", "llama")
    assert done.out.splitlines()[1:] == [
        "left out: .git (a hidden folder)",
        "left out: pytorch_model.bin (by its name the same parameters in another format)",
    ]
    document = run("import", "llama", "--name", "llama", "--json").json["imported"][0]
    assert document["left_out"][".git"] == "a hidden folder"
    assert run("export", "llama", "out/", "--max-shard-size", "1.5 kB").status == 0
    index = json.loads(Path("out/model.safetensors.index.json").read_text())
    assert index == {
        "metadata": {"total_size": 1_800},
        "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"},
    }
    for name, tensor in tensors.items():
        assert torch.equal(safetensors.torch.load_file(f"out/{index['weight_map'][name]}")[name], tensor)
    assert {name: Path("out", name).read_bytes() for name in kept} == kept
    assert len(list(Path("out").iterdir())) == 5
    for words, message in {
        (
            "out",
        ): "out: the folder is not empty, and a folder is never overwritten\nhint:  choose another name",
        ("out", "--force"): "a folder is never overwritten",
        ("best.pt",): "the file exists",
        (
            "new.pt",
            "--max-shard-size",
            "1GB",
        ): "new.pt: only a folder has shards\nhint:  end it in / for a folder",
        ("a.onnx",): "or end it in / for a folder",
        ("none/out",): "none: there is no such folder",
    }.items():
        Path("best.pt").touch()
        done = run("export", "llama", *words)
        assert (done.status, done.out) == (1, "")
        assert message in done.err
    for amount in ("0GB", "٣GB", "5\N{KELVIN SIGN}B", "9" * 400):
        done = run("export", "llama", "x", "--max-shard-size", amount)
        assert (done.status, "is not an amount such as 500MB or 5GB" in done.err) == (2, True)
    assert not Path("x").exists()


def test_two_files_are_two_versions(filled: Registry, run: Run, checkpoint: dict[str, Any]) -> None:
    torch.save({"w": torch.ones(2)}, "other.pt")
    assert [
        line.split()[0] for line in run("import", "best.pt", "other.pt", "--name", "net").out.splitlines()
    ] == [
        "net:v1",
        "net:v2",
    ]


def test_a_configuration_file_is_recorded(filled: Registry, run: Run, checkpoint: dict[str, Any]) -> None:
    Path("train.yaml").write_text("optimizer:\n  lr: 1e-3\n")
    run("import", "best.pt", "--name", "net", "--config", "train.yaml")
    assert run("config", "show", "net").out == "# optimizer.lr = 0.001\n"
    assert filled["net"].config == {"optimizer": {"lr": 0.001}}


def test_safetensors_go_in_and_out(filled: Registry, run: Run) -> None:
    tensors = {"a.weight": torch.randn(3, 4), "a.bias": torch.randn(3).bfloat16()}
    safetensors.torch.save_file(tensors, "in.safetensors", metadata={"made": "here"})
    assert run("import", "in.safetensors", "--name", "net").status == 0
    assert run("export", "net", "out.safetensors", "--json").json["name"] == "net:v1"
    back = safetensors.torch.load_file("out.safetensors")
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


def test_a_file_is_overwritten_only_with_force(
    filled: Registry, run: Run, checkpoint: dict[str, Any]
) -> None:
    before = Path("best.pt").read_bytes()
    done = run("export", "lenet5", "best.pt")
    assert done.status == 1
    assert "or overwrite it: --force" in done.err
    assert Path("best.pt").read_bytes() == before
    assert run("export", "lenet5", "best.pt", "--force").status == 0
    assert run("export", "lenet5", "one.pt", "--component", "optimizer").status == 0
    assert torch.load("one.pt", weights_only=True) == {"lr": 0.1, "steps": [4]}
    assert "has no component 'ema'" in run("export", "lenet5", "x.pt", "--component", "ema").err


def test_a_pickle_that_would_run_code_is_refused_by_name(filled: Registry, run: Run, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "canary",)

    torch.save({"model": Evil()}, "evil.pt")
    done = run("import", "evil.pt", "--name", "net")
    assert done.status == 1
    assert "would run code" in done.err
    assert "builtins.getattr" in done.err
    assert not (tmp_path / "canary").exists()


def test_configurations_are_shown_checked_and_compared(filled: Registry, run: Run) -> None:
    Path("a.json").write_text('{"optimizer": {"lr": 0.1}, "epochs": 3}')
    Path("b.toml").write_text("epochs = 4\n[optimizer]\nlr = 0.1\nname = 'sgd'\n")
    assert (
        run("config", "show", "a.json", "--set", "optimizer.lr=1e-3").out
        == "# optimizer.lr = 0.001\n# epochs = 3\n"
    )
    assert run("config", "diff", "a.json", "b.toml").out == "~ epochs = 3 → 4\n+ optimizer.name = sgd\n"
    assert run("config", "diff", "a.json", "a.json").out == "no difference\n"
    (row,) = run("config", "diff", "lenet5:v1", "lenet5:v2", "--json").json["differences"]
    assert row == {"key": "optimizer.lr", "kind": "changed", "left": 0.1, "right": 0.2}
    assert run("config", "validate", "a.json", "b.toml").out == "a.json: valid\nb.toml: valid\n"
    Path("bad.json").write_text('{"a": 1, "a": 2}')
    done = run("config", "validate", "bad.json")
    assert (done.status, done.err) == (1, "error: bad.json: the key 'a' is given twice\n")
    assert "was saved without a configuration" in run("config", "show", "resnet").err
    assert json.loads(run("config", "show", "a.json", "--json").out)["epochs"] == 3


def test_a_configuration_is_checked_against_a_class(
    filled: Registry, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("mine.py").write_text(
        "from registry import Config\nclass Train(Config):\n    epochs: int\nother = 1\n"
    )
    Path("a.json").write_text('{"epochs": 3}')
    Path("b.json").write_text('{"epochs": "three"}')
    monkeypatch.syspath_prepend(".")
    done = run("config", "validate", "a.json", "--class", "mine:Train", "--json")
    assert len(done.json["valid"][0]["digest"]) == 64
    done = run("config", "validate", "b.json", "--class", "mine:Train")
    assert done.err == 'error: b.json: epochs is "three"; expected a valid integer\n'
    assert run("config", "validate", "b.json", "--class", "mine:Train", "--set", "epochs=2").status == 1
    for target, message in {
        "mine": "write it as MODULE:CLASS",
        "mine:Nothing": "has no attribute",
        "nothing_there:X": "No module named",
        "mine:other": "is not a class derived from registry.Config",
    }.items():
        assert message in run("config", "validate", "a.json", "--class", target).err


def test_one_file_that_cannot_be_imported_is_a_document_too(
    tmp_path: Path, filled: Registry, run: Run
) -> None:
    bad = tmp_path / "bad.pt"
    bad.write_bytes(b"no checkpoint")
    found = run("import", bad, "--name", "net", "--json")
    assert (found.status, found.json["imported"]) == (1, [])
    assert [one["file"] for one in found.json["failed"]] == [str(bad)]


def test_files_are_attached_listed_and_written(filled: Registry, run: Run) -> None:
    Path("model.onnx").write_bytes(b"onnx")
    name = run("show", "lenet5", "--json").json["name"]
    assert run("files", "lenet5") == (0, "", f"{name} has no files\n")
    assert run("attach", "lenet5", "model.onnx").out == f"model.onnx → {name}  4 B\n"
    listed = run("files", "lenet5").out.splitlines()
    assert [line.split()[:3] for line in listed] == [["FILE", "SIZE", "ATTACHED"], ["model.onnx", "4", "B"]]
    (one,) = run("files", name, "--json").json
    assert (one["name"], one["size"]) == ("model.onnx", 4)
    assert run("files", "lenet5", "model.onnx", "--output", "back").out == "model.onnx → back  4 B\n"
    assert Path("back").read_bytes() == b"onnx"
    for words, message in {
        ("files", "lenet5", "model.onnx", "-o", "back"): "back: the file exists",
        ("files", "lenet5", "none", "-o", "new"): "has no file 'none'",
        ("attach", "lenet5", "none"): "none: there is no such file",
        ("checkout", "lenet5", "out"): "did not come from transformers",
    }.items():
        done = run(*words)
        assert (done.status, done.out) == (1, "")
        assert message in done.err
    Path("model.onnx").write_bytes(b"other")
    assert "or replace it: --force" in run("attach", "lenet5", "model.onnx").err
    assert run("attach", "lenet5", "model.onnx", "--force").status == 0
    assert run("files", "lenet5", "model.onnx").status == 2


def test_a_checkpoint_folder_of_a_trainer_is_checked_out(filled: Registry, run: Run) -> None:
    Path("checkpoint-3").mkdir()
    safetensors.torch.save_file({"w": torch.ones(2)}, "checkpoint-3/model.safetensors")
    Path("checkpoint-3/trainer_state.json").write_text('{"global_step": 3}')
    torch.save({"param_groups": []}, "checkpoint-3/optimizer.pt")
    assert run("import", "checkpoint-3", "--name", "bert").status == 0
    assert run("show", "bert", "--json").json["step"] == 3
    assert run("checkout", "bert", "resume", "--json").json["file"] == "resume"
    assert {path.name for path in Path("resume").iterdir()} == {
        path.name for path in Path("checkpoint-3").iterdir()
    }
