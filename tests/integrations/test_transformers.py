"""transformers: a training that is killed goes on bit for bit, where the Trainer's own checkpoint does not, too."""

from __future__ import annotations

import argparse
import gc
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import PartialState
from killed import HERE, examples_of, train_forked
from train_transformers import Data, arguments, main, network
from transformers import Trainer, TrainerCallback, set_seed

from registry import Registry
from registry.files.importing import import_checkpoint
from registry.files.reading import read_checkpoint_file
from registry.integrations.peft import adapter
from registry.integrations.transformers import RegistryCallback, ResumableData, checkout
from registry.store.errors import Corrupt, Incompatible, Invalid, NotFound, Unsupported

CASES = {
    "bert, in the middle of an epoch": (["--kill", "10"], []),
    "gpt2, at the end of an epoch": (["--kill", "9"], ["--network", "gpt2", "--every", "7"]),
    "gpt2, accumulation": (["--kill", "3"], ["--network", "gpt2", "--window", "3", "--every", "2"]),
    "mixtral": (["--kill", "10"], ["--network", "mixtral"]),
    "an adapter": (["--kill", "10"], ["--network", "adapter"]),
    "mixtral, data that draw, workers": (
        ["--kill", "10"],
        ["--network", "mixtral", "--draw", "--workers", "2"],
    ),
    "data that draw, at the end of an epoch": (["--kill", "9"], ["--draw", "--every", "7"]),
    "data that draw, accumulation": (["--kill", "4"], ["--draw", "--window", "3", "--every", "1"]),
    "during a save behind the training": (["--kill", "8"], ["--behind"]),
    "while the Trainer writes its folder": (["--inside", "8"], []),
}
"""When a training is killed, and what is trained."""


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Offline, and without runs that another test has left open."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delattr(sys, "last_value", raising=False)
    yield
    gc.collect()


@pytest.mark.parametrize(("end", "words"), CASES.values(), ids=CASES.keys())
def test_a_training_that_is_killed_goes_on_exactly(tmp_path: Path, end: list[str], words: list[str]) -> None:
    """The resuming process has other random numbers before."""
    whole = train_forked(main, tmp_path / "whole", *words)
    train_forked(main, tmp_path / "r", *end, *words, killed=True)
    assert train_forked(main, tmp_path / "r", "--resume", *words) == whole
    registry = Registry(tmp_path / "r" / "registry")
    assert registry.verify().problems == ()
    assert len(registry.versions("net")) <= 4
    assert registry.runs["net/run-2"].record["resumed"] is not None


@pytest.mark.parametrize("words", [["--network", "mixtral"], ["--draw"]], ids=["mixtral", "data that draw"])
def test_the_harness_tells_what_the_trainers_own_checkpoint_loses(tmp_path: Path, words: list[str]) -> None:
    """Saving with ours changes nothing, and the Trainer's own folder does not resume exactly."""
    whole = train_forked(main, tmp_path / "whole", *words)
    assert whole == train_forked(main, tmp_path / "silent", *words, "--silent")
    train_forked(main, tmp_path / "r", "--kill", 10, *words, "--native", killed=True)
    assert train_forked(main, tmp_path / "r", "--resume", *words, "--native") != whole


def test_data_that_draw_need_the_mixin(tmp_path: Path) -> None:
    words = ["--draw", "--plain"]
    whole = train_forked(main, tmp_path / "whole", *words)
    train_forked(main, tmp_path / "r", "--kill", 10, *words, killed=True)
    assert train_forked(main, tmp_path / "r", "--resume", *words) != whole


def test_two_processes_go_on_exactly(tmp_path: Path) -> None:
    """Each with its own random numbers and position."""
    words = ["--draw", "--network", "gpt2"]
    whole = train_forked(main, tmp_path / "whole", *words, count=2)
    train_forked(main, tmp_path / "r", *words, "--kill", 6, count=2, killed=True)
    assert train_forked(main, tmp_path / "r", *words, "--resume", count=2) == whole
    versions = Registry(tmp_path / "r" / "registry").versions("net")
    assert len({version.step for version in versions}) == len(versions)


class Stops(TrainerCallback):
    """Ends a training after a step: by an error, or as its user asks for."""

    def __init__(self, step: int, error: type[BaseException] | None = None) -> None:
        self.step = step
        self.error = error

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            if self.error is not None:
                raise self.error("of the test")
            control.should_training_stop = True


def trainer_of(
    root: Path, *callbacks: TrainerCallback, kind: str = "gpt2", cls: type[Trainer] = Trainer, **others: Any
) -> Trainer:
    set_seed(0)
    data = Data(draws=False, has_classes=kind == "bert")
    steps = {"save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 6}
    return cls(
        network(kind),
        arguments(root, **steps | others),
        train_dataset=data,
        eval_dataset=data,
        callbacks=list(callbacks),
    )


def equal(a: Any, b: Any) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Worse(TrainerCallback):
    """Makes each evaluation worse than the one before, so that the first is the best."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        with torch.no_grad():
            for parameter in filter(lambda parameter: parameter.requires_grad, model.parameters()):
                parameter.add_(torch.sign(parameter) * 0.5 * state.global_step)


@pytest.mark.parametrize("kind", ["gpt2", "mixtral", "adapter"])
def test_the_best_network_is_loaded_at_the_end(tmp_path: Path, kind: str) -> None:
    """Of Mixtral the Trainer alone loads a part. Its arguments say what is the best; it stays whatever is removed."""
    registry = Registry(tmp_path / "r")
    callback = RegistryCallback("net", registry, keep_last=1)
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "save_total_limit": 1}
    trainer = trainer_of(tmp_path, callback, Worse(), kind=kind, **best)
    trainer.train()
    assert [version.step for version in registry.versions("net")] == [6, 2]
    assert registry["net@best"].step == trainer.state.best_global_step == 2
    part = "adapter" if kind == "adapter" else "model"
    recorded = registry["net@best"].state_dict(part)
    live = adapter(trainer.model) if kind == "adapter" else trainer.model
    assert equal(live.state_dict(), recorded)
    assert registry.runs["net/run-1"].state == "finished"


def test_the_best_network_is_loaded_while_a_shared_registry_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "host"))
    bucket = tmp_path / "bucket"
    registry = Registry(bucket.as_uri())

    class Unmount(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 0:
                bucket.rename(tmp_path / "elsewhere")

    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss"}
    trainer = trainer_of(
        tmp_path / "out",
        RegistryCallback("net", registry, keep_last=1),
        Unmount(),
        Worse(),
        kind="mixtral",
        **best,
    )
    trainer.train()
    assert [version.step for version in registry.outbox.versions()] == [2, 6]
    # Of Mixtral the Trainer alone loads a part.
    assert equal(trainer.model.state_dict(), registry["net:pending-1"].state_dict())


def test_what_a_version_holds(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "r")
    callback = RegistryCallback("net", registry)
    trainer = trainer_of(tmp_path / "secret-folder", callback)
    trainer.train()
    assert callback.run is None
    found = registry["net:v2"]
    assert set(found.components) == {"model", "optimizer", "scheduler", "rng", "files"}
    assert found.step == 4
    assert found.epoch == 0
    assert set(found.metrics) == {"eval_loss"}
    assert found.loss is not None
    files = found.load("files")["files"]
    assert {"config.json", "trainer_state.json"} <= set(files)
    assert "training_args.bin" not in files
    assert found.config is not None
    assert found.config["learning_rate"] == 1e-2
    assert found.config["output_dir"] == "out"
    everything = json.dumps(found.record) + "".join(data.decode() for data in files.values())
    assert str(tmp_path) not in everything
    assert "secret-folder" not in everything


def test_a_training_that_fails_ends_its_run(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "r")
    callback = RegistryCallback("net", registry)
    with pytest.raises(ZeroDivisionError):
        trainer_of(tmp_path, callback, Stops(3, ZeroDivisionError)).train()
    assert registry.runs["net/run-1"].state == "running"
    trainer_of(tmp_path, callback).train()
    states = {run.name: run.state for run in registry.runs.find("net")}
    assert states == {"net/run-1": "interrupted", "net/run-2": "finished"}


def test_a_program_that_fails_ends_its_run(tmp_path: Path) -> None:
    """With the save that is under way."""
    program = (
        "from pathlib import Path\n"
        "from test_transformers import *\n"
        "root = Path(sys.argv[1])\n"
        "callback = RegistryCallback('net', Registry(root / 'r'), wait=False)\n"
        "trainer_of(root, callback, Stops(2, ZeroDivisionError), save_steps=1).train()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], cwd=HERE, capture_output=True, text=True, check=False
    )
    assert "ZeroDivisionError: of the test" in done.stderr
    registry = Registry(tmp_path / "r")
    assert registry.runs["net/run-1"].state == "failed: ZeroDivisionError"
    assert [version.step for version in registry.versions("net")] == [1]


def test_training_begins_anew_where_there_is_no_version(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    registry = Registry(tmp_path / "r")
    with caplog.at_level(logging.INFO):
        assert checkout("net@latest", registry) is False
    assert "training begins anew: there is no model 'net'" in caplog.text
    registry.save("net", {"model": {}})
    with pytest.raises(NotFound, match="net has no alias 'best'"):
        checkout("net@best", registry)
    with pytest.raises(Unsupported, match="net:v1 was not saved by RegistryCallback"):
        checkout("net", registry)


def test_a_version_without_an_optimizer_is_refused(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "r")
    trainer_of(tmp_path, RegistryCallback("net", registry), save_only_model=True).train()
    assert set(registry["net"].components) == {"model", "rng", "files"}
    with pytest.raises(Unsupported, match="net:v3 has no optimizer"):
        checkout("net", registry)


def test_a_folder_holds_what_a_trainer_reads_and_no_more(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "r")
    trainer_of(tmp_path, RegistryCallback("net", registry)).train()
    folder = checkout("net", registry)
    assert isinstance(folder, str)
    theirs = {path.name for path in (tmp_path / "out" / "checkpoint-6").iterdir()}
    assert {path.name for path in Path(folder).iterdir()} == theirs - {"training_args.bin"}
    assert (Path(folder) / "optimizer.pt").stat().st_size < 1.5 * (
        tmp_path / "out/checkpoint-6/optimizer.pt"
    ).stat().st_size


def test_a_file_name_that_leads_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "r")
    files = {"trainer_state.json": b"{}", "../escaped": b"x"}
    with registry.run("net") as run:
        run.save(states={"model": {}, "optimizer": {}}, files=files)
    with pytest.raises(Corrupt, match=r"a file called '\.\./escaped' cannot be written"):
        checkout("net", registry)


def test_lineage_leads_back_and_another_registry_is_refused(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "r")
    trainer_of(tmp_path, RegistryCallback("net", registry), Stops(2)).train()
    trainer_of(tmp_path, RegistryCallback("other", registry), max_steps=3).train(
        resume_from_checkpoint=checkout("net:v1", registry)
    )
    assert registry["other:v1"].lineage == [{"kind": "resumed-from", "parent": registry["net:v1"].id}]
    assert registry["other:v1"].step == 3
    again = trainer_of(tmp_path, RegistryCallback("net", Registry(tmp_path / "elsewhere")))
    with pytest.raises(NotFound, match=r"give checkout\(\) and RegistryCallback\(\) the same registry"):
        again.train(resume_from_checkpoint=checkout("net:v1", registry))


def test_sharded_networks_are_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Registry(tmp_path / "r")
    trainer = trainer_of(tmp_path, RegistryCallback("net", registry))
    kind = argparse.Namespace(name="FSDP")
    monkeypatch.setitem(PartialState._shared_state, "distributed_type", kind)
    (callback,) = [one for one in trainer.callback_handler.callbacks if isinstance(one, RegistryCallback)]
    with pytest.raises(Unsupported, match="networks under FSDP are sharded over processes"):
        callback.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)
    assert registry.runs.find() == []


class Drawing(ResumableData, Trainer):
    pass


def test_a_version_without_a_position_is_resumed_as_the_trainer_does(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "r")
    whole = trainer_of(tmp_path / "whole")
    whole.train()
    trainer_of(tmp_path, RegistryCallback("net", registry), Stops(4)).train()
    trainer = trainer_of(tmp_path, RegistryCallback("net", registry), cls=Drawing)
    trainer.train(resume_from_checkpoint=checkout("net", registry))
    assert equal(trainer.model.state_dict(), whole.model.state_dict())


def test_a_version_of_another_network_is_refused_in_one_line(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "r")
    trainer_of(tmp_path, RegistryCallback("net", registry), Stops(2)).train()
    other = trainer_of(tmp_path, RegistryCallback("net", registry), kind="bert")
    with pytest.raises(Incompatible, match=r"net:v1: model: .* is not in the checkpoint") as caught:
        other.train(resume_from_checkpoint=checkout("net", registry))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1_000


def test_an_adapter_over_another_base_is_refused_before_training(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "r")
    trainer_of(tmp_path, RegistryCallback("net", registry), kind="adapter").train()
    other = trainer_of(tmp_path, RegistryCallback("net", registry), kind="adapter")
    with torch.no_grad():
        other.model.get_input_embeddings().weight.add_(1)
    with pytest.raises(Incompatible, match="the base network here is another one"):
        other.train(resume_from_checkpoint=checkout("net", registry))


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        ("mixtral", "net:v3: model: .* is not in the checkpoint"),
        ("adapter", "net:v3 has no component 'adapter'"),
    ],
)
def test_a_version_of_another_network_is_refused_before_training(
    tmp_path: Path, kind: str, problem: str
) -> None:
    """The Trainer passes over names that it does not know."""
    registry = Registry(tmp_path / "r")
    trainer_of(tmp_path, RegistryCallback("net", registry)).train()
    folder = checkout("net", registry)
    other = trainer_of(tmp_path, RegistryCallback("net", registry), kind=kind)
    with pytest.raises(Incompatible, match=problem):
        checkout("net", registry)
    for name in ("optimizer.pt", "scheduler.pt"):
        # The Trainer looks at these before.
        Path(str(folder), name).unlink()
    with pytest.raises(Incompatible, match=problem):
        other.train(resume_from_checkpoint=folder)
    assert registry.runs.find("net")[0].name == "net/run-1"


def test_a_version_that_was_imported_is_gone_on_from(tmp_path: Path) -> None:
    """From a folder of the Trainer's own, where tied parameters are once."""
    registry = Registry(tmp_path / "r")
    trainer_of(tmp_path, Stops(4)).train()
    import_checkpoint(registry, read_checkpoint_file(tmp_path / "out" / "checkpoint-4"), "net")
    whole, trainer = trainer_of(tmp_path / "whole"), trainer_of(tmp_path, RegistryCallback("net", registry))
    whole.train()
    trainer.train(resume_from_checkpoint=checkout("net", registry))
    assert equal(trainer.model.state_dict(), whole.model.state_dict())
    assert registry["net"].lineage == [{"kind": "resumed-from", "parent": registry["net:v1"].id}]


def test_two_callbacks_are_refused_before_training(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "r")
    kept = RegistryCallback("net", registry)
    trainer = trainer_of(tmp_path, kept)
    trainer.add_callback(RegistryCallback("other", registry))
    with pytest.raises(Invalid, match="several callbacks of RegistryCallback"):
        trainer.train()
    assert "other" not in registry
    trainer.remove_callback(RegistryCallback)
    trainer.train()
    trainer.train()
    assert len(registry.runs) == 2 + 1  # the first one began a run, and failed


def test_a_wrong_use_is_refused_in_one_line(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "r")
    with pytest.raises(Invalid, match="keep_lats is no option; there are builder, compact, dataset"):
        RegistryCallback("net", registry, keep_lats=3)
    with pytest.raises(Invalid, match="'my net' cannot be the name of a model"):
        RegistryCallback("my net", registry)
    for given in (RegistryCallback, checkout):
        with pytest.raises(Invalid, match=r"registry is 'r', expected a Registry, such as Registry\("):
            given("net", "r")  # type: ignore[arg-type]


def test_a_training_that_ended_inside_an_epoch_warns_of_another_step(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As from the Trainer's own folder."""
    registry = Registry(tmp_path / "r")
    trainer_of(tmp_path, RegistryCallback("net", registry)).train()
    own = trainer_of(tmp_path / "own")
    own.train()
    trainer = trainer_of(tmp_path, RegistryCallback("net", registry))
    with caplog.at_level(logging.WARNING):
        trainer.train(resume_from_checkpoint=checkout("net", registry))
    assert "net:v3 is at the last step already" in caplog.text
    assert own.train(resume_from_checkpoint=True).global_step == trainer.state.global_step == 7


def test_the_lines_of_the_page_run_and_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("REGISTRY_ROOT", raising=False)
    first, mixin = examples_of("transformers")
    for expected in (7, 14):
        there: dict[str, Any] = {
            "Trainer": Trainer,
            "model": network("bert"),
            "data": Data(draws=False, has_classes=True),
            "arguments": arguments(
                Path("."), max_steps=expected, save_strategy="epoch", eval_strategy="epoch"
            ),
        }
        exec(compile(first + mixin, "page", "exec", dont_inherit=True), there)
        assert Registry()["bert"].step == expected
    assert Registry()["bert"].version == 2
