"""Runs: what they record, and how they end."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_network import made, step
from torch import nn

from registry import Checkpoint, Config, Registry
from registry.store import durable
from registry.store.errors import Conflict, NotFound


class Settings(Config):
    lr: float = 0.1
    epochs: int = 3


def test_a_checkpoint_records_how_it_was_made(registry: Registry) -> None:
    net, optimizer = made()
    config = Settings(lr=0.5)
    dataset = "ab" * 32
    with registry.run("net", config=config, dataset=dataset) as run:
        step(net, optimizer)
        first = run.save(model=net, optimizer=optimizer, epoch=1, loss=torch.tensor(0.5), extra={"note": [1]})
        second = run.save(model=net, epoch=2, step=9, metrics={"accuracy": torch.tensor([0.25])})
    assert isinstance(first, Checkpoint)
    assert isinstance(second, Checkpoint)
    assert (first.epoch, first.loss, first.extra, first.config) == (1, 0.5, {"note": [1]}, config.to_dict())
    assert (second.step, dict(second.metrics)) == (9, {"accuracy": 0.25})
    assert (first.run, first.parent, second.parent) == ("net/run-1", None, "net:v1")
    about = first.provenance
    assert about["kinds"] == {"model": "Sequential", "optimizer": "AdamW"}
    assert (about["config_digest"], about["dataset"]) == (config.digest(), dataset)
    assert about["devices"] == ["cpu"]
    assert about["torch"] == torch.__version__
    assert set(first.components) == {"model", "optimizer", "extra", "rng"}


SECRET = """
import sys, torch
from registry import Registry
registry = Registry(sys.argv[1])
with registry.run("net") as run:
    run.save(model=torch.nn.Linear(1, 1))
"""


def test_nothing_recorded_names_a_person_a_machine_or_a_place_outside(tmp_path: Path) -> None:
    place = tmp_path / "home" / "somebody-known" / "project"
    place.mkdir(parents=True)
    (place / "train.py").write_text(SECRET)
    subprocess.run(["git", "init", "-q"], cwd=place, check=True)
    subprocess.run(["git", "add", "."], cwd=place, check=True)
    who = ["-c", "user.name=somebody-known", "-c", "user.email=somebody-known@example.org"]
    subprocess.run(["git", *who, "commit", "-qm", "x"], cwd=place, check=True)
    command = [sys.executable, str(place / "train.py"), "reg", "--data=/mnt/somebody-known/set", "~/x/y.txt"]
    command += ["--root=s3://key:somebody-known@models/team?x=somebody-known", "s3://a:somebody-known@models"]
    done = subprocess.run(command, cwd=place, check=True, env={**os.environ, "USER": "somebody-known"})
    assert done.returncode == 0
    (place / "train.py").write_text(SECRET + "# changed\n")
    subprocess.run(command, cwd=place, check=True)
    registry = Registry(place / "reg")
    first, second = registry["net:v1"].provenance, registry["net:v2"].provenance
    words = ["train.py", "reg", "--data=.../set", ".../y.txt", "--root=.../team", ".../"]
    assert first["command"] == words
    assert [first["git"]["dirty"], second["git"]["dirty"]] == [False, True]
    assert len(first["git"]["commit"]) == 40
    stored = b"".join(
        path.read_bytes() for path in (place / "reg" / "manifests").rglob("*") if path.is_file()
    )
    assert b"somebody-known" not in stored
    assert durable.host().encode() not in stored


def test_the_log_of_a_run_has_the_configuration_and_every_modules_lines(registry: Registry) -> None:
    root = logging.getLogger()
    before = (root.level, list(root.handlers))
    with registry.run("net", config=Settings()) as run:
        logging.getLogger("mine").info("hello")
        logging.getLogger("mine").debug("not this")
    assert (root.level, list(root.handlers)) == before
    logging.getLogger("mine").warning("after the run")
    text = run.log_file.read_text()
    assert (
        text.index("# lr = 0.1") < text.index("# epochs = 3") < text.index("hello") < text.index("finished")
    )
    assert "not this" not in text
    assert "after the run" not in text


def test_warnings_still_reach_the_console(registry: Registry, capfd: pytest.CaptureFixture[str]) -> None:
    program = (
        "import logging, sys; from registry import Registry\n"
        "with Registry(sys.argv[1]).run('net'):\n"
        "    logging.warning('look'); logging.info('quiet')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(registry.root)], capture_output=True, text=True, check=True
    )
    assert "look" in done.stderr
    assert "quiet" not in done.stderr


def test_runs_are_numbered_named_and_end_as_they_ended(registry: Registry) -> None:
    with registry.run("net") as first:
        assert registry.runs[first.name].state == "running"
        assert not registry.runs.is_lost(registry.runs[first.name])
    with pytest.raises(ZeroDivisionError), registry.run("net"):
        _ = 1 / 0
    with pytest.raises(KeyboardInterrupt), registry.run("net", name="mine"):
        raise KeyboardInterrupt
    found = {info.name: info.state for info in registry.runs.find("net")}
    assert found == {
        "net/run-1": "finished",
        "net/run-2": "failed: ZeroDivisionError",
        "net/mine": "interrupted",
    }
    with pytest.raises(Conflict, match="net has a run 'mine' already"):
        registry.run("net", name="mine")
    with pytest.raises(NotFound, match="did you mean 'net/mine'"):
        registry.runs["net/mne"]
    assert registry.rebuild().damaged == ()
    assert {info.name: info.state for info in registry.runs.find()} == found


def test_a_run_whose_process_was_killed_is_lost(registry: Registry) -> None:
    program = "import os, sys; from registry import Registry\nRegistry(sys.argv[1]).run('net').__enter__(); os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", program, str(registry.root)], check=False)
    info = registry.runs["net/run-1"]
    assert info.state == "running"
    assert registry.runs.is_lost(info)


def test_a_loss_among_the_metrics_is_the_loss(registry: Registry) -> None:
    net = nn.Linear(2, 2)
    with registry.run("x", monitor="loss", keep_best=1) as run:
        for loss in (0.5, 0.1, 0.9):
            run.save(model=net, metrics={"loss": loss})
    assert [version.loss for version in registry.versions("x")] == [0.9, 0.1]
    assert registry["x@best"].loss == 0.1


def test_runs_are_a_collection_of_names(registry: Registry) -> None:
    assert list(registry.runs) == []
    for _ in range(2):
        with registry.run("net"):
            pass
    assert sorted(registry.runs) == ["net/run-1", "net/run-2"]
    assert list(registry.runs) == [info.name for info in registry.runs.find()]
    assert len(registry.runs) == 2
    assert repr(registry.runs) == "<Runs: 2>"
    assert "net/run-1" in registry.runs
    assert "net/run-3" not in registry.runs
