"""Metrics that are called like a column, or like each other: both are shown, and each can be named."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Run

from registry import Registry


@pytest.fixture
def confusing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """A model whose metrics are called like what every version has."""
    registry = Registry(tmp_path / "r")
    monkeypatch.setenv("REGISTRY_ROOT", str(registry.root))
    for number in (1, 2, 3):
        metrics = {"epoch": number / 8, "loss": 4.0 - number, "name": number / 2, "F1": 0.5, "f1": 0.25}
        registry.save("net", {"model": {"w": [number]}}, epoch=10 * number, loss=number / 4, metrics=metrics)
    registry.save("other", {"model": {"w": [1]}}, metrics={"size": 7.0})
    return registry


def rows(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


def test_a_metric_that_is_called_like_a_column_has_a_column_of_its_own(confusing: Registry, run: Run) -> None:
    done = run("ls", "net", "--columns", "name,epoch,metrics.epoch,loss,metrics.loss,metrics.name,f1,F1")
    assert rows(done.out)[:2] == [
        ["NAME", "EPOCH", "METRICS.EPOCH", "LOSS", "METRICS.LOSS", "METRICS.NAME", "f1", "F1"],
        ["net:v3", "30", "0.375", "0.75", "1", "1.5", "0.25", "0.5"],
    ]
    assert "METRICS.SIZE" in run("ls", "other").out


def test_each_can_be_ordered_by(confusing: Registry, run: Run) -> None:
    def first(*words: str) -> str:
        return str(run("ls", "net", *words, "-q").out.splitlines()[0])

    assert (first("--sort", "loss"), first("--sort", "metrics.loss")) == ("net:v1", "net:v3")
    assert (first("--sort", "epoch", "--smallest"), first("--sort", "metrics.epoch")) == ("net:v1", "net:v3")
    assert first("--match", "metrics.loss < 1.5") == "net:v3"
    assert first("--match", "loss < 0.3") == "net:v1"
    assert run("best", "net", "--by", "metrics.loss").out.startswith("net:v3  metrics.loss 1")
    assert (
        "no version of net has the metric 'metrics.accuracy'"
        in run("ls", "net", "--sort", "metrics.accuracy").err
    )


def test_the_one_that_is_ordered_by_comes_right_after_the_name(confusing: Registry, run: Run) -> None:
    headings = rows(run("ls", "net", "--sort", "metrics.epoch").out)[0]
    assert headings[:3] == ["NAME", "METRICS.EPOCH", "EPOCH"]
    assert headings.count("METRICS.EPOCH") == 1


def test_a_version_shows_both(confusing: Registry, run: Run) -> None:
    shown = " ".join(run("show", "net:v2").out.split())
    assert "epoch 20 loss 0.5" in shown
    assert "metrics.epoch 0.25" in shown
    assert "metrics.loss 2" in shown
    assert confusing["net:v2"].metrics["epoch"] == 0.25
    assert "metrics.epoch=0.25" in repr(confusing["net:v2"])
    document = run("show", "net:v2", "--json").json
    assert (document["epoch"], document["metrics"]["epoch"]) == (20, 0.25)


def test_a_loss_that_was_taken_from_the_metrics_is_shown_once(confusing: Registry, run: Run) -> None:
    with confusing.run("again") as training:
        training.save(model={"w": 1}, metrics={"loss": 0.25, "accuracy": 0.5})
    headings = rows(run("ls", "again").out)[0]
    assert "LOSS" in headings
    assert "METRICS.LOSS" not in headings


def test_a_table_of_models_has_the_fields_too(tmp_path: Path, run: Run) -> None:
    with Registry(tmp_path / "one").run("again", monitor="metrics.epoch", mode="max") as training:
        training.save(model={"w": 1}, epoch=3, metrics={"epoch": 0.25})
    header, row = rows(run("--root", tmp_path / "one", "ls", "--columns", "model,epoch,metrics.epoch").out)
    assert header == ["MODEL", "EPOCH", "METRICS.EPOCH"]
    assert row == ["again", "3", "0.25"]


def test_completion_names_them_apart(confusing: Registry) -> None:
    from registry.cli.completing import metrics

    class Line:
        args = ("net",)

    assert {"metrics.loss", "loss", "metrics.epoch", "f1"} <= set(metrics(confusing, Line()))  # type: ignore[arg-type]
