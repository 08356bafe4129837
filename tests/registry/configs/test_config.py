"""Configurations: filled from files, checked, overridden, digested, logged."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shlex
import subprocess
import sys
from datetime import date
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, ValidationError, computed_field, field_validator

from registry import Config, ModelConfig
from registry.store.errors import Invalid, StorageError, Unsupported

BERT = {
    "architectures": ["BertForMaskedLM"],
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_size": 768,
    "model_type": "bert",
    "id2label": {"0": "NEG", "1": "POS"},
    "pad_token_id": 0,
}


class Kind(Enum):
    SGD = "sgd"
    ADAM = "adam"


class Optimizer(Config):
    kind: Kind = Kind.SGD
    lr: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)


class TrainConfig(Config):
    model: str
    epochs: int = 3
    optimizer: Optimizer = Optimizer()
    data: Path | None = None
    started: date | None = None
    limit: float = math.inf
    shuffle: bool = True

    @field_validator("epochs")
    @classmethod
    def _some(cls, value: int) -> int:
        if value < 1:
            raise ValueError("expected at least one epoch")
        return value


class Momentum(Optimizer):
    momentum: float = 0.9


class Wide(Config):
    """What a class may hold besides plain fields: optional, listed, aliased and computed ones."""

    first: Optimizer | None = None
    rest: list[Optimizer] = []
    named: dict[str, Optimizer] = {}
    either: Momentum | TrainConfig | None = None
    size: int = Field(1, alias="batch-size")
    tags: frozenset[str] = frozenset()
    deep: dict[str, list[set[int]]] = {}

    @computed_field  # type: ignore[prop-decorator]
    @property
    def twice(self) -> int:
        return 2 * self.size


def from_text(tmp_path: Path, text: str, name: str = "train.json") -> TrainConfig:
    path = tmp_path / name
    path.write_text(text)
    return TrainConfig.from_file(path)


def test_a_file_fills_the_fields_and_defaults_the_rest(tmp_path: Path) -> None:
    text = '{"model": "lenet5", "optimizer": {"kind": "adam", "lr": 1, "betas": [0.5, 0.9]}, "data": "d", '
    config = from_text(tmp_path, text + '"started": "2026-11-23"}')
    assert config.optimizer == Optimizer(kind=Kind.ADAM, lr=1.0, betas=(0.5, 0.9))
    assert (config.data, config.started, config.epochs) == (Path("d"), date(2026, 11, 23), 3)


@pytest.mark.parametrize("name", ["train.yaml", "train.json"])
def test_a_saved_configuration_comes_back_equal(tmp_path: Path, name: str) -> None:
    config = TrainConfig(model="ü ✓", data=Path("a/b"), limit=-math.inf, optimizer=Optimizer(lr=1e-10))
    config.save(tmp_path / name)
    assert TrainConfig.from_file(tmp_path / name) == config
    assert TrainConfig.from_file(tmp_path / name).digest() == config.digest()


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        TrainConfig(model="x").epochs = 4  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"model": "x", "epochs": "ten"}', 'epochs is "ten"; expected a valid integer'),
        ('{"model": "x", "epochs": "10"}', 'epochs is "10"; expected a valid integer'),
        ('{"model": "x", "epochs": 1.5}', "epochs is 1.5; expected a valid integer"),
        ('{"model": "x", "epochs": true}', "epochs is true; expected a valid integer"),
        ('{"model": "x", "epochs": 0}', "epochs is 0; expected at least one epoch"),
        ('{"model": 5}', "model is 5; expected a valid string"),
        ('{"epochs": 3}', "model is missing; add it"),
        ('{"model": "x", "epoch": 3}', "epoch is not a known key; did you mean epochs?"),
        ('{"model": "x", "zzz": 3}', "zzz is not a known key; known are model, epochs"),
        ('{"model": "x", "optimizer": {"lrr": 1}}', "optimizer.lrr is not a known key; did you mean lr?"),
        (
            '{"model": "x", "optimizer": {"kind": "rms"}}',
            "optimizer.kind is \"rms\"; expected 'sgd' or 'adam'",
        ),
        ('{"model": "x", "optimizer": {"betas": [1]}}', "optimizer.betas"),
        ('{"model": "x", "epochs": "a", "shuffle": 3}', "(and 1 more)"),
    ],
)
def test_an_error_names_file_field_value_and_expectation(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(Invalid) as caught:
        from_text(tmp_path, text)
    assert str(caught.value).startswith(f"{tmp_path / 'train.json'}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"first": {"lrr": 1}}, "first.lrr is not a known key; did you mean lr?"),
        ({"rest": [{}, {"lrr": 1}]}, "rest.1.lrr is not a known key; did you mean lr?"),
        ({"named": {"a": {"bets": []}}}, "named.a.bets is not a known key; did you mean betas?"),
        ({"either": {"momentun": 1}}, "either.Momentum.momentun is not a known key; did you mean momentum?"),
    ],
)
def test_a_mistyped_key_is_recognised_at_any_depth(document: dict[str, Any], message: str) -> None:
    with pytest.raises(Invalid) as caught:
        Wide.from_dict(document)
    what, _, advice = message.partition("; ")
    assert caught.value.message.startswith(what)
    assert caught.value.for_command_line()[1] == advice


def test_aliased_and_computed_fields_do_not_hinder_an_override() -> None:
    config = Wide.from_dict({"batch-size": 3}).override('tags=["a"]')
    assert (config.size, config.twice, config.tags) == (3, 6, frozenset({"a"}))
    assert config.override("size=4").size == 4


def test_values_of_a_derived_class_are_not_lost() -> None:
    config = Wide(first=Momentum(momentum=0.5))
    assert config.to_dict()["first"]["momentum"] == 0.5
    assert config.digest() != Wide(first=Momentum(momentum=0.6)).digest()


def test_sets_have_the_same_digest_in_every_process() -> None:
    document = {"tags": ["b", "a", "é", "10", "9"], "deep": {"x": [[3, 1, 2], []]}}
    config = Wide.from_dict(document)
    assert config.to_dict()["tags"] == ["10", "9", "a", "b", "é"]
    program = (
        "import json, sys; from registry import Config\n"
        "class Tagged(Config):\n    tags: frozenset[str]\n"
        "print(Tagged.from_dict(json.loads(sys.argv[1])).digest())"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", program, json.dumps({"tags": document["tags"]})],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(found) == 1


def test_a_hostile_value_is_printed_harmlessly_and_short(tmp_path: Path) -> None:
    with pytest.raises(Invalid) as caught:
        from_text(tmp_path, json.dumps({"model": "x", "epochs": "\x1b[31m" * 1000}))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


def test_overrides_are_checked_like_a_file() -> None:
    config = TrainConfig(model="x")
    changed = config.override(
        "optimizer.lr=1e-3", "epochs=10", "data=d", "optimizer.kind=adam", "shuffle=false"
    )
    assert (changed.optimizer.lr, changed.epochs, changed.data) == (0.001, 10, Path("d"))
    assert (changed.optimizer.kind, changed.shuffle) == (Kind.ADAM, False)
    assert config == TrainConfig(model="x")
    for assignment, message in {
        "optimizer.lrr=1": "did you mean lr?",
        "epochs=ten": "expected a valid integer",
        "epochs.x=1": "'epochs' is '3', not a table",
        "epochs": "write an override as key=value",
        "data.x=1": "'data' is 'None', not a table",
        "optimiser.lr=1": "did you mean optimizer?",
    }.items():
        with pytest.raises(Invalid) as caught:
            config.override(assignment)
        assert message in str(caught.value)
        assert assignment in str(caught.value)
    with pytest.raises(Invalid) as caught:
        config.override("model=\x1b[31m", f"epochs=two\nlines{'x' * 1000}")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


def test_a_model_configuration_keeps_what_it_does_not_declare(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(BERT))
    config = ModelConfig.from_json_file(path)
    assert config.to_dict() == BERT
    assert config.hidden_size == 768  # type: ignore[attr-defined]
    assert config.override("hidden_size=1024").to_dict() == {**BERT, "hidden_size": 1024}


def test_a_subclass_of_a_model_configuration_checks_what_it_declares() -> None:
    class Bert(ModelConfig):
        hidden_size: int
        layers: int = 12

    assert Bert.from_dict(BERT).layers == 12
    with pytest.raises(Invalid, match="hidden_size is missing"):
        Bert.from_dict({})


def test_the_digest_depends_on_values_alone() -> None:
    config = TrainConfig(model="x")
    assert config.digest() == TrainConfig.from_dict({"epochs": 3, "model": "x"}).digest()
    assert config.digest() == TrainConfig.from_dict({"model": "x", "optimizer": {"lr": 0.1}}).digest()
    assert re.fullmatch("[0-9a-f]{64}", config.digest())
    assert config.digest() != config.override("optimizer.lr=0.2").digest()
    kinds = [
        ModelConfig.from_dict({"a": value}).digest() for value in (1, 1.0, "1", True, None, [1], math.nan)
    ]
    assert len(set(kinds)) == len(kinds)


@given(st.floats(), st.lists(st.floats()))
def test_floats_are_kept_to_the_last_bit(lr: float, others: list[float]) -> None:
    config = ModelConfig.from_dict({"lr": lr, "others": others})
    again = ModelConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert repr(again) == repr(config)
    assert repr(again.to_dict()) == repr({"lr": lr, "others": others})
    assert again.digest() == config.digest()


@given(st.dictionaries(st.text(min_size=1), st.integers() | st.floats() | st.text() | st.booleans()))
def test_the_digest_does_not_depend_on_the_order_of_keys(document: dict[str, Any]) -> None:
    backwards = dict(reversed(document.items()))
    assert ModelConfig.from_dict(document).digest() == ModelConfig.from_dict(backwards).digest()


def test_what_is_no_plain_value_is_refused() -> None:
    with pytest.raises(Invalid, match="plain values"):
        ModelConfig.from_dict({"a": object()})


def test_only_json_and_yaml_are_written(tmp_path: Path) -> None:
    config = TrainConfig(model="x")
    with pytest.raises(Unsupported, match=r"\.json or \.yaml"):
        config.save(tmp_path / "a.toml")
    with pytest.raises(StorageError):
        config.save(tmp_path / "missing" / "a.json")
    assert list(tmp_path.iterdir()) == []


def test_logging_writes_one_line_a_value_from_the_callers_place(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        TrainConfig(model="lenet5", data=Path("a\n\x1b[31m")).log()
    assert caplog.messages[:3] == ["# model = lenet5", "# epochs = 3", "# optimizer.kind = sgd"]
    assert r"# data = a\n\x1b[31m" in caplog.messages
    assert {record.filename for record in caplog.records} == {Path(__file__).name}


GUIDE = Path(__file__).parents[3] / "docs" / "configs.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", GUIDE.read_text(), re.DOTALL)


@pytest.fixture
def folder_of_the_guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the files that the guide speaks of."""
    monkeypatch.chdir(tmp_path)
    for form in ("json", "yaml", "toml"):
        Path(f"lenet5.{form}").write_text(blocks(form)[0])
    Path("bert.json").write_text(json.dumps(BERT))
    Path("mypackage").mkdir()
    Path("mypackage/configs.py").write_text(blocks("python")[0])
    return tmp_path


def test_the_examples_of_the_guide_run(folder_of_the_guide: Path) -> None:
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    try:
        exec(
            compile("\n".join(blocks("python")), str(GUIDE), "exec", dont_inherit=True), {"__name__": "guide"}
        )
        (log,) = Path("logs").iterdir()
        assert "# optimizer.lr = 0.01" in log.read_text()
    finally:
        for handler in [handler for handler in root.handlers if handler not in before]:
            root.removeHandler(handler)
            handler.close()
        root.setLevel(level)
        logging.captureWarnings(False)
    assert len(blocks("python")) > 5


def test_the_commands_of_the_guide_print_what_it_shows(folder_of_the_guide: Path) -> None:
    (console,) = blocks("console")
    for part in console.split("$ ")[1:]:
        line, _, shown = part.partition("\n")
        program = [sys.executable, "-c", "from registry.cli import main; main()", *shlex.split(line)[1:]]
        assert subprocess.run(program, capture_output=True, text=True, check=True).stdout == shown


def test_the_errors_of_the_guide_are_those_that_are_raised(folder_of_the_guide: Path) -> None:
    scope: dict[str, Any] = {"__name__": "guide"}
    exec(compile(blocks("python")[0], str(GUIDE), "exec", dont_inherit=True), scope)
    found = []
    for document in ({"epoch": 10}, {"epochs": "ten"}):
        Path("lenet5.json").write_text(json.dumps({"model": "lenet5", **document}))
        with pytest.raises(Invalid) as caught:
            scope["TrainConfig"].from_json_file("lenet5.json")
        found.append(str(caught.value))
    assert found == blocks("text")[0].splitlines()
