"""Models of MLflow: parts of a hub's folder are put together, and no module is opened."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from registry import Registry
from registry.files.importing import import_checkpoint
from registry.files.reading import read_checkpoint_file
from registry.store.errors import Invalid, Unsupported

HUB = "flavors:\n  python_function: {}\n  transformers:\n    model_binary: model\n"


def model_in(folder: Path, described: str, files: dict[str, bytes]) -> Path:
    for name, data in {"MLmodel": described.encode(), "requirements.txt": b"torch", **files}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def test_a_tokenizer_lies_beside_the_parameters_as_on_a_hub(tmp_path: Path) -> None:
    files = {
        "model/config.json": b'{"a": 1}',
        "model/same.json": b"1",
        "model/.cache/x": b"",
        "components/tokenizer/tokenizer.json": b"{}",
        "components/processor/same.json": b"1",
        "components/processor/config.json": b"{}",
        "peft/adapter_config.json": b"{}",
    }
    folder = model_in(tmp_path / "in", f"{HUB}    peft_adaptor: peft\n", files)
    save_file({"w": torch.ones(2)}, folder / "model" / "model.safetensors")
    found = read_checkpoint_file(folder)
    assert found.components["files"] == {
        "config.json": b'{"a": 1}',
        "same.json": b"1",
        "tokenizer.json": b"{}",
    }
    assert found.config == {"a": 1}
    assert found.left_out == {
        "MLmodel": "a file of MLflow's own",
        "requirements.txt": "a file of MLflow's own",
        "components/processor/config.json": "another file has its name",
        "model/.cache": "a hidden folder",
        "peft/adapter_config.json": "parameters of their own; import their folder by itself",
    }
    checkpoint = import_checkpoint(Registry(tmp_path / "r"), found, "net")
    assert checkpoint.lineage == [{"kind": "imported-from", "parent": "model.safetensors"}]


@pytest.mark.parametrize(
    ("described", "error", "said"),
    [
        (
            "flavors:\n  pytorch: {model_data: data}\n",
            Unsupported,
            "runs code when it is opened; if you trust",
        ),
        (
            "flavors:\n  python_function: {}\n  sklearn: {}\n",
            Unsupported,
            "a model of MLflow for sklearn, which",
        ),
        ("flavors:\n  transformers: {source_model_name: org/x}\n", Invalid, "names a network of a hub"),
        ("flavors:\n  transformers: {model_binary: ../other}\n", Invalid, "names a network of a hub"),
        ("flavors:\n  transformers: {model_binary: [data]}\n", Invalid, "names a network of a hub"),
        ("[1]", Invalid, "expected a table"),
        ("flavors: 3", Unsupported, "a model of MLflow for python_function"),
    ],
)
def test_what_holds_no_tensors_that_can_be_read_is_named(
    tmp_path: Path, described: str, error: type[Exception], said: str
) -> None:
    folder = model_in(tmp_path / "in", described, {"data/model.pth": b"cos\nsystem\n(S'touch ran'\ntR."})
    with pytest.raises(error, match=said) as raised:
        read_checkpoint_file(folder)
    assert "\n" not in str(raised.value)
    assert not Path("ran").exists()
