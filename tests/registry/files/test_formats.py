"""The formats of files: whatever is a row of the table is written, read, and told to the user."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
import torch

from registry.cli.app import app
from registry.files.exporting import export
from registry.files.formats import FORMATS, SUFFIXES, Format, format_of
from registry.files.importing import import_checkpoint
from registry.files.reading import read_checkpoint_file
from registry.registry import Registry
from registry.store.errors import Unsupported
from registry.transfer.sources import side_of

ROWS = pytest.mark.parametrize("row", FORMATS, ids=lambda row: row.suffixes[0])


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")


def tensors() -> dict[str, torch.Tensor]:
    """Tensors as a network has them."""
    return {
        "conv.weight": torch.randn(4, 3, 2, 2),
        "conv.bias": torch.tensor([0.0, -0.0, float("nan"), float("inf")]),
        "norm.num_batches_tracked": torch.tensor(7),
        "turned": torch.randn(3, 4).t(),
        "empty": torch.empty(0, 2),
        "mask": torch.tensor([True, False]),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "double": torch.randn(2, dtype=torch.float64),
        "half": torch.randn(2).half(),
    }


def bits(tree: dict[str, torch.Tensor]) -> dict[str, tuple[torch.dtype, torch.Size, bytes]]:
    """Dtype, shape and bytes of each tensor."""
    return {
        name: (tensor.dtype, tensor.shape, tensor.contiguous().numpy().tobytes())
        for name, tensor in tree.items()
    }


@pytest.mark.parametrize("suffix", [*SUFFIXES, *(suffix.upper() for suffix in SUFFIXES)])
def test_what_is_exported_is_imported_bit_for_bit(tmp_path: Path, registry: Registry, suffix: str) -> None:
    checkpoint = registry.save("net", {"model": tensors()})
    path = export(checkpoint, tmp_path / f"a{suffix}")
    again = import_checkpoint(registry, read_checkpoint_file(path), "again")
    assert bits(again.state_dict()) == bits(checkpoint.state_dict())
    assert registry.status().packs == 1


@ROWS
def test_a_diff_takes_whatever_can_be_imported(tmp_path: Path, registry: Registry, row: Format) -> None:
    path = export(registry.save("net", {"model": tensors()}), tmp_path / f"a{row.suffixes[-1]}")
    report = registry.diff("net", str(path), values=True)
    assert report.verdict == "IDENTICAL"


@ROWS
def test_one_component_is_written_alone(tmp_path: Path, registry: Registry, row: Format) -> None:
    checkpoint = registry.save("net", {"model": tensors(), "ema": {"w": torch.ones(3)}})
    path = export(checkpoint, tmp_path / f"a{row.suffixes[0]}", component="ema")
    assert bits(read_checkpoint_file(path).components["model"]) == bits({"w": torch.ones(3)})


@ROWS
def test_a_format_holds_all_or_the_model_alone(tmp_path: Path, registry: Registry, row: Format) -> None:
    checkpoint = registry.save("net", {"model": tensors(), "ema": {"w": torch.ones(3)}})
    found = read_checkpoint_file(export(checkpoint, tmp_path / f"a{row.suffixes[0]}"))
    assert set(found.components) == ({"model", "ema"} if row.holds_all else {"model"})


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_suffix_is_told_to_the_user(tmp_path: Path, registry: Registry, suffix: str) -> None:
    checkpoint = registry.save("net", {"model": tensors()})
    with pytest.raises(Unsupported) as refused:
        export(checkpoint, tmp_path / "a.onnx")
    assert suffix in str(refused.value)
    (tmp_path / "a.onnx").write_bytes(b"what?")
    with pytest.raises(Unsupported) as unread:
        read_checkpoint_file(tmp_path / "a.onnx")
    assert suffix in str(unread.value)
    assert suffix in help_of("import")


@ROWS
def test_the_help_of_export_tells_of_every_format(row: Format) -> None:
    words = help_of("export")
    assert row.suffixes[0] in words
    assert row.about in words
    assert (f"all components in a {row.suffixes[0]}" in words) or not row.holds_all


def help_of(command: str) -> str:
    """The help of a command on one line."""
    context = click.Context(app)
    found = app.get_command(context, command)
    assert found is not None
    return " ".join(found.get_help(context).split())


@ROWS
def test_the_name_of_a_file_is_never_taken_for_a_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registry: Registry, row: Format
) -> None:
    name = f"a{row.suffixes[0]}"
    export(registry.save("net", {"model": tensors()}), tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert side_of(name).label == name


def test_no_two_formats_share_a_suffix() -> None:
    assert len(set(SUFFIXES)) == len(SUFFIXES)
    assert [format_of(f"x{suffix}") for suffix in SUFFIXES] == [row for row in FORMATS for _ in row.suffixes]
    assert format_of("x.onnx") is None
    assert format_of("") is None
