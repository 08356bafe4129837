"""Runs: what `save` records, when it may go on behind the training, and what stays."""

from __future__ import annotations

import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from registry import Checkpoint, Config, Registry, register_model
from registry.catalog.versions import list_versions
from registry.store import durable
from registry.store.errors import Conflict, Incompatible, Invalid, NotFound, StorageError, Unsupported


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "r")


def made() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    return net, torch.optim.AdamW(net.parameters(), 0.1)


def step(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    net(torch.randn(5, 4)).square().sum().backward()
    optimizer.step()


def equal(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def copied(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


class Settings(Config):
    lr: float = 0.1
    epochs: int = 3


# -- what is recorded ----------------------------------------------------------------------------------------


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
    done = subprocess.run(command, cwd=place, check=True, env={**os.environ, "USER": "somebody-known"})
    assert done.returncode == 0
    (place / "train.py").write_text(SECRET + "# changed\n")
    subprocess.run(command, cwd=place, check=True)
    registry = Registry(place / "reg")
    first, second = registry["net:v1"].provenance, registry["net:v2"].provenance
    assert first["command"] == ["train.py", "reg", "--data=.../set", ".../y.txt"]
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


# -- snapshots -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wait", [True, False])
def test_training_on_never_changes_what_was_saved(registry: Registry, wait: bool) -> None:
    net, optimizer = made()
    expected = []
    with registry.run("net") as run:
        for _ in range(5):
            step(net, optimizer)
            best = net.state_dict()  # which only refers to the live tensors
            expected.append(copied(net))
            run.save(model=best, optimizer=optimizer, wait=wait)
            with torch.no_grad():
                net[0].weight.fill_(7)  # type: ignore[index, union-attr, operator]
    for number, state in enumerate(expected, 1):
        assert equal(registry[f"net:v{number}"].state_dict(), state)


def test_every_kind_of_value_survives_a_snapshot(registry: Registry) -> None:
    import numpy as np

    base = torch.arange(24.0).reshape(4, 6)
    tree = {
        "view": base[1:3, ::2],
        "transposed": base.T,
        "expanded": torch.tensor([2.0]).expand(3),
        "half": torch.randn(3).bfloat16(),
        "fp8": torch.randn(4).to(torch.float8_e4m3fn),
        "complex": torch.randn(3, dtype=torch.complex64).conj(),
        "flag": torch.tensor(True),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(5, dtype=torch.int8),
        "array": np.arange(6).reshape(2, 3),
        "text": "x",
    }
    shared = torch.ones(4)
    tree |= {"tied": shared, "tied too": shared}
    expected = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in tree.items()}
    array = tree["array"].copy()  # type: ignore[attr-defined]
    with registry.run("net") as run:
        run.save(model=tree, wait=False)
        base.zero_(), shared.zero_(), tree["array"].fill(9)  # type: ignore[attr-defined]
    found = registry["net"].state_dict()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert found[name].dtype == value.dtype
            both = [
                one.contiguous().reshape(-1).view(torch.uint8) for one in (found[name], value.resolve_conj())
            ]
            assert torch.equal(*both), name
    assert np.array_equal(found["array"], array)
    assert found["tied"].data_ptr() == found["tied too"].data_ptr()


def test_host_buffers_are_used_again(registry: Registry) -> None:
    net, _ = made()
    with registry.run("net") as run:
        run.save(model=net, wait=False)
        arena = run._arena
        assert arena is not None
        memory = arena._memory.data_ptr()
        run.save(model=net, wait=False)
        assert run._arena is arena
        assert arena._memory.data_ptr() == memory


class Slow(durable.Disk):
    """A disk whose syncs wait for leave."""

    def __init__(self) -> None:
        self.go = threading.Event()

    def sync(self, fd: int, path: Path) -> None:
        assert self.go.wait(20)
        super().sync(fd, path)


def test_one_save_is_in_flight_and_the_next_waits(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, _ = made()
    slow = Slow()
    with registry.run("net") as run:
        monkeypatch.setattr(durable, "disk", slow)
        assert run.save(model=net, wait=False) is None  # returns while the disk still waits
        threading.Timer(0.3, slow.go.set).start()
        began = time.monotonic()
        run.save(model=net, epoch=2, wait=False)
        assert time.monotonic() - began > 0.2
    assert [version.version for version in list_versions(registry.catalog, "net")[0]] == [2, 1]


class Full(durable.Disk):
    def write(self, fd: int, path: Path, data: memoryview) -> int:
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("where", ["save", "wait", "end"])
def test_an_error_behind_the_training_surfaces(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    net, optimizer = made()
    run = registry.run("net")
    with run:
        run.save(model=net)
    with pytest.raises(StorageError, match="no space left"), registry.run("net") as run:
        step(net, optimizer)
        monkeypatch.setattr(durable, "disk", Full())
        run.save(model=net, wait=False)
        assert run._in_flight is not None
        assert run._in_flight.exception() is not None
        monkeypatch.setattr(durable, "disk", durable.Disk())
        if where == "save":
            run.save(model=net)
        elif where == "wait":
            run.wait()
    assert [version.version for version in list_versions(registry.catalog, "net")[0]] == [1]
    assert registry.runs["net/run-2"].state == "failed: StorageError"


def test_an_error_of_the_program_is_not_hidden_by_one_of_the_disk(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, _ = made()
    run = registry.run("net")
    with pytest.raises(ZeroDivisionError), run:
        monkeypatch.setattr(durable, "disk", Full())
        run.save(model=net, wait=False)
        assert run._in_flight is not None
        assert run._in_flight.exception() is not None
        monkeypatch.setattr(durable, "disk", durable.Disk())
        _ = 1 / 0
    assert "the last save failed: " in run.log_file.read_text()


IN_FLIGHT = """
import os, sys, signal, threading, time, torch
from registry import Registry
from registry.store import durable

class Slow(durable.Disk):
    def sync(self, fd, path):
        if "packs" in str(path) or "tmp" in str(path):
            print("syncing", flush=True)
            time.sleep(1)
        super().sync(fd, path)

with Registry(sys.argv[1]).run("net") as run:
    durable.disk = Slow()
    run.save(model=torch.nn.Linear(3, 3), wait=False)
    time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_finish_what_is_in_flight(registry: Registry, number: int) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", IN_FLIGHT, str(registry.root)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "syncing\n"
    child.send_signal(number)
    status = child.wait(30)
    child.stdout.close()
    assert status in (143, 130, -signal.SIGINT)
    assert registry["net:v1"].load()["model"]["weight"].shape == (3, 3)
    assert registry.runs["net/run-1"].state == "interrupted"


# -- best, and what stays ------------------------------------------------------------------------------------


def saved(registry: Registry, values: list[float], **rules: Any) -> list[str]:
    """The names of the versions that stay after saves with these accuracies."""
    net, optimizer = made()
    with registry.run("net", monitor="accuracy", **rules) as run:
        for epoch, value in enumerate(values, 1):
            step(net, optimizer)
            run.save(model=net, optimizer=optimizer, epoch=epoch, metrics={"accuracy": value})
    return [version.name.partition(":")[2] for version in list_versions(registry.catalog, "net")[0]][::-1]


NAN = float("nan")


@pytest.mark.parametrize(
    ("values", "mode", "best"),
    [
        ([0.1, 0.3, 0.2], "max", 2),
        ([0.1, 0.3, 0.2], "min", 1),
        ([0.1, 0.3, 0.2], None, 2),
        ([NAN, 0.1, NAN], "max", 2),
        ([NAN, 0.1, NAN], "min", 2),
        ([0.5, 0.5, 0.5], "max", 1),
        ([0.1, float("inf"), 0.2], "max", 2),
    ],
)
def test_best_follows_the_metric(
    registry: Registry, values: list[float], mode: str | None, best: int
) -> None:
    saved(registry, values, mode=mode)
    assert registry["net@best"].version == best
    assert registry["net@latest"].version == len(values)


def test_nothing_but_nan_makes_no_best(registry: Registry) -> None:
    saved(registry, [NAN, NAN])
    with pytest.raises(NotFound, match="no alias 'best'"):
        registry["net@best"]


def test_the_smallest_loss_is_the_best(registry: Registry) -> None:
    net, _ = made()
    with registry.run("net", monitor="loss") as run:
        for loss in (0.5, 0.2, 0.3):
            run.save(model=net, loss=loss)
    assert registry["net@best"].loss == 0.2


@pytest.mark.parametrize(
    ("rules", "left"),
    [
        ({}, ["v1", "v2", "v3", "v4", "v5", "v6"]),
        ({"keep_last": 2}, ["v2", "v5", "v6"]),
        ({"keep_best": 1}, ["v2", "v6"]),
        ({"keep_last": 1, "keep_best": 2}, ["v2", "v4", "v6"]),
        ({"keep_last": 9}, ["v1", "v2", "v3", "v4", "v5", "v6"]),
    ],
    ids=str,
)
def test_the_rules_of_what_stays_unite(registry: Registry, rules: dict[str, int], left: list[str]) -> None:
    assert saved(registry, [0.1, 0.9, 0.3, 0.8, NAN, 0.2], **rules) == left
    assert registry["net@best"].name == "net:v2"


def test_an_alias_a_tag_and_a_descendant_keep_a_version(registry: Registry) -> None:
    net, optimizer = made()
    with registry.run("net", keep_last=1) as run:
        for number in range(1, 6):
            step(net, optimizer)
            run.save(model=net, optimizer=optimizer, epoch=number)
            if number == 1:
                registry.set_alias("net:v1", "good")
            if number == 2:
                registry.set_tag("net:v2", "paper")
            if number == 3:
                with registry.run("other", resume="net:v3") as other:
                    other.save(model=net)
    names = [version.name for version in list_versions(registry.catalog, "net")[0]]
    assert names == ["net:v5", "net:v3", "net:v2", "net:v1"]
    assert registry["other"].lineage == [{"kind": "resumed-from", "parent": registry["net:v3"].id}]


def test_other_runs_versions_are_left_alone(registry: Registry) -> None:
    saved(registry, [0.1, 0.2, 0.3])
    assert saved(registry, [0.1, 0.2, 0.3], keep_last=1) == ["v1", "v2", "v3", "v6"]


def test_versions_of_the_run_that_was_resumed_count(registry: Registry) -> None:
    net, optimizer = made()
    with registry.run("net", keep_last=2) as run:
        for _ in range(3):
            step(net, optimizer)
            run.save(model=net, optimizer=optimizer)
    with registry.run("net", keep_last=2, resume="net") as run:
        for _ in range(2):
            step(net, optimizer)
            run.save(model=net, optimizer=optimizer)
    names = [version.name for version in list_versions(registry.catalog, "net")[0]]
    assert names == ["net:v5", "net:v4", "net:v3"]  # v3 has a descendant


def test_older_versions_keep_their_weights_alone(registry: Registry) -> None:
    torch.manual_seed(0)
    net = nn.Linear(100, 100)
    optimizer = torch.optim.Adam(net.parameters())
    states = []
    registry_size = []
    with registry.run("net", monitor="accuracy", keep_optimizer=2) as run:
        for number in range(5):
            optimizer.zero_grad()
            net(torch.randn(5, 100)).square().sum().backward()
            optimizer.step()
            states.append(copied(net))
            run.save(model=net, optimizer=optimizer, metrics={"accuracy": -number})
            if number == 0:
                registry.set_tag("net:v1", "paper")
                registry.add_note("net:v1", "first")
            registry.collect_garbage(grace=0)
            registry_size.append(registry.status().stored)
    for number, state in enumerate(states, 1):
        checkpoint = registry[f"net:v{number}"]
        assert equal(checkpoint.state_dict(), state)
        assert ("optimizer" in checkpoint.components) == (number >= 4)
    assert registry["net@best"].name == "net:v1"
    assert (registry["net:v1"].tags, registry["net:v1"].notes[0][1]) == (("paper",), "first")
    assert registry.verify().problems == ()
    weights = 4 * 10_100
    assert registry_size[-1] < 5 * weights + 2 * 2 * weights + 60_000  # 5 weights, 2 states of an optimizer
    assert registry.rebuild().damaged == ()
    assert equal(registry["net:v1"].state_dict(), states[0])


def test_thinning_spares_what_others_descend_from(registry: Registry) -> None:
    net, optimizer = made()
    step(net, optimizer)
    with registry.run("net") as run:
        run.save(model=net, optimizer=optimizer)
    with registry.run("net", resume="net:v1", keep_optimizer=1) as run:
        for _ in range(2):
            step(net, optimizer)
            run.save(model=net, optimizer=optimizer)
    assert "optimizer" in registry["net:v1"].components
    assert "optimizer" not in registry.thin("net:v3").components


@pytest.mark.parametrize(
    ("rules", "told"),
    [
        ({"mode": "up", "monitor": "a"}, "mode is 'up', expected 'min' or 'max'"),
        ({"keep_best": 2}, "needs a metric: monitor="),
        ({"keep_last": 0}, "keep_last is '0', expected a whole number of 1 or more"),
        ({"keep_last": True}, "keep_last is 'True'"),
        ({"monitor": "a\nb"}, "cannot be the name of a metric"),
        ({"name": "../x"}, "cannot be the name of a run"),
        ({"dataset": "mnist"}, "expected a digest"),
        ({"resume": "net:v9"}, "no model 'net'"),
    ],
)
def test_rules_that_make_no_sense_are_refused(registry: Registry, rules: dict[str, Any], told: str) -> None:
    with pytest.raises((Invalid, NotFound), match=told):
        registry.run("net", **rules)
    assert registry.runs.find() == []


# -- what cannot be saved, and what does not fit ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "error", "told"),
    [
        ({}, Invalid, "nothing to save"),
        ({"model": 3}, Invalid, "model: int has no state_dict"),
        ({"model": nn.Linear(1, 1), "metrics": {"accuracy": "high"}}, Invalid, "expected a number"),
        ({"model": nn.Linear(1, 1), "loss": torch.ones(2)}, Invalid, "loss is"),
        ({"model": nn.Linear(1, 1), "epoch": -1}, Invalid, "epoch is '-1'"),
        ({"model": nn.Linear(1, 1), "extra": {"f": print}}, Unsupported, "extra/f"),
        ({"model": nn.Linear(1, 1), "rng": {}}, Invalid, "'rng' is not the name"),
    ],
)
@pytest.mark.parametrize("wait", [True, False])
def test_what_cannot_be_saved_is_refused_at_once(
    registry: Registry, given: dict[str, Any], error: type[Exception], told: str, wait: bool
) -> None:
    with registry.run("net") as run, pytest.raises(error, match=told):
        run.save(**given, wait=wait)
        run.wait()
    with pytest.raises(NotFound):
        registry["net"]
    assert list((registry.root / "packs").rglob("*.safetensors")) == []


def test_what_does_not_fit_changes_nothing(registry: Registry) -> None:
    net, optimizer = made()
    step(net, optimizer)
    with registry.run("net") as run:
        run.save(model=net, optimizer=optimizer)
    checkpoint = registry["net"]
    larger = nn.Sequential(nn.Linear(4, 9), nn.BatchNorm1d(9), nn.Linear(9, 2))
    more = nn.Sequential(*net, nn.Linear(2, 2))  # type: ignore[misc]
    cases: list[tuple[dict[str, Any], str]] = [
        ({"model": larger}, r"0.weight has shape \[9, 4\], stored is \[8, 4\].*; and \d more"),
        ({"model": more}, "3.weight is not in the checkpoint"),
        ({"model": nn.Linear(4, 8)}, "weight is not in the checkpoint"),
        ({"optimizer": torch.optim.SGD(net.parameters(), 0.1)}, "is a SGD, the checkpoint has .* a AdamW"),
        ({"optimizer": torch.optim.AdamW(net[0].parameters())}, "group 0 has 2 parameters, the checkpoint 6"),  # type: ignore[index]
        ({"optimizer": torch.optim.AdamW(larger.parameters())}, "exp_avg of parameter 0 has shape"),
        ({"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1)}, "no component 'scheduler'; it has"),
    ]
    fresh, other = made()
    with torch.no_grad():
        fresh[0].weight.zero_()  # type: ignore[index, union-attr, operator]
    for given, told in cases:
        live = {"model": fresh, **given}
        before = copied(fresh)
        state = torch.get_rng_state()
        with pytest.raises((Incompatible, NotFound), match=told) as caught:
            checkpoint.restore(**live)
        assert str(caught.value).startswith("net:v1")
        assert "\n" not in str(caught.value)
        assert equal(copied(fresh), before)
        assert torch.equal(torch.get_rng_state(), state)
    assert other.state == {}


class Stubborn:
    """A component that refuses every state."""

    def state_dict(self) -> dict[str, Any]:
        return {"value": 1}

    def load_state_dict(self, state: Any) -> None:
        raise RuntimeError("not today")


class Counter:
    def __init__(self) -> None:
        self.value = 0

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


def test_a_component_that_fails_undoes_the_others(registry: Registry) -> None:
    net, optimizer = made()
    step(net, optimizer)
    counter = Counter()
    counter.value = 5
    with registry.run("net") as run:
        run.save(model=net, optimizer=optimizer, counter=counter, stubborn=Stubborn())
    fresh, other = made()
    other.param_groups[0]["lr"] = 0.77
    mine = Counter()
    before = copied(fresh)
    with pytest.raises(Incompatible, match="stubborn: not today; all but stubborn is as before"):
        registry["net"].restore(model=fresh, counter=mine, optimizer=other, stubborn=Stubborn())
    assert equal(copied(fresh), before)
    assert (mine.value, other.param_groups[0]["lr"], dict(other.state)) == (0, 0.77, {})
    other.step()
    registry["net"].restore(model=fresh, counter=mine, optimizer=other)
    assert mine.value == 5


def test_anything_with_a_state_is_a_component(registry: Registry) -> None:
    net, optimizer = made()
    second = torch.optim.SGD(net.parameters(), 0.3, momentum=0.5)
    average = torch.optim.swa_utils.AveragedModel(net)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)  # type: ignore[attr-defined]
    step(net, optimizer), step(net, second), average.update_parameters(net)
    with registry.run("net") as run:
        run.save(model=net, optimizer=optimizer, second=second, ema=average, scaler=scaler)
    net2, optimizer2 = made()
    second2 = torch.optim.SGD(net2.parameters(), 0.1, momentum=0.5)
    average2 = torch.optim.swa_utils.AveragedModel(net2)
    scaler2 = torch.amp.GradScaler("cpu")  # type: ignore[attr-defined]
    registry["net"].restore(model=net2, optimizer=optimizer2, second=second2, ema=average2, scaler=scaler2)
    assert equal(average2.state_dict(), average.state_dict())
    assert second2.param_groups[0]["lr"] == 0.3
    assert scaler2.get_scale() == scaler.get_scale()


# -- wrappers ------------------------------------------------------------------------------------------------


class Nested(nn.Module):
    def __init__(self, wrap: bool) -> None:
        super().__init__()
        features = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.features = nn.DataParallel(features) if wrap else features
        self.module = nn.Linear(4, 2)  # a name that only looks like a wrapper's


def test_wrappers_are_seen_through_both_ways(registry: Registry) -> None:
    wraps = {
        "plain": lambda net: net,
        "parallel": nn.DataParallel,
        "compiled": torch.compile,
        "both": lambda net: torch.compile(nn.DataParallel(net)),
    }
    for name, wrap in wraps.items():
        for inside in (False, True):
            torch.manual_seed(hash(name) % 1_000 + inside)
            net = Nested(inside)
            live = wrap(net)  # type: ignore[no-untyped-call]
            with registry.run("net") as run:
                run.save(model=live)
            stored = registry["net"].state_dict()
            assert set(stored) == set(Nested(False).state_dict())
            assert registry["net"].provenance["kinds"] == {"model": "Nested"}
            for other in wraps.values():
                for other_inside in (False, True):
                    fresh = Nested(other_inside)
                    registry["net"].restore(model=other(fresh))  # type: ignore[no-untyped-call]
                    assert equal(
                        dict(enumerate(fresh.state_dict().values())),  # type: ignore[arg-type]
                        dict(enumerate(net.state_dict().values())),  # type: ignore[arg-type]
                    )


DISTRIBUTED = """
import os, sys, torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from registry import Registry

torch.distributed.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=0, world_size=1)
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
wrapped = DistributedDataParallel(net)
registry = Registry(sys.argv[1])
with registry.run("net") as run:
    run.save(model=wrapped)
assert list(registry["net"].state_dict()) == list(net.state_dict())
other = DistributedDataParallel(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)))
registry["net"].restore(model=other)
assert torch.equal(other.module[0].weight, net[0].weight)
torch.distributed.destroy_process_group()
"""


def test_distributed_data_parallel_is_seen_through(registry: Registry, tmp_path: Path) -> None:
    command = [sys.executable, "-c", DISTRIBUTED, str(registry.root), str(tmp_path / "meet")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    plain = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    registry["net"].restore(model=plain)
    plain.load_state_dict(registry["net"].state_dict())


# -- builders ------------------------------------------------------------------------------------------------


class NetConfig(Config):
    width: int = 3


@register_model("tests-net", config=NetConfig)
class Net(nn.Module):
    def __init__(self, config: NetConfig) -> None:
        super().__init__()
        self.config = config
        self.fc = nn.Linear(2, config.width)
        self.drop = nn.Dropout(0.5)


def test_a_network_is_built_again_from_what_was_recorded(registry: Registry) -> None:
    net = Net(NetConfig(width=7)).train()
    with registry.run("any-name") as run:
        run.save(model=nn.DataParallel(net))
    built = registry.build("any-name")
    assert isinstance(built, Net)
    assert built.config.width == 7
    assert not built.training
    assert equal(built.state_dict(), net.state_dict())
    state = random.getstate()
    registry.build("any-name")
    assert random.getstate() == state


def test_nothing_that_a_file_names_is_imported(registry: Registry) -> None:
    with registry.run("x", builder="this.module.does_not.exist") as run:
        run.save(model=nn.Linear(1, 1))
    with pytest.raises(NotFound, match=r"no builder 'this.module.does_not.exist' is registered; import"):
        registry.build("x")
    with registry.run("x", builder="tests-ent") as run:
        run.save(model=nn.Linear(1, 1))
    with pytest.raises(NotFound, match="did you mean 'tests-net'"):
        registry.build("x")
    with registry.run("x", builder="tests-net") as run:
        run.save(model=nn.Linear(1, 1))
    with pytest.raises(Incompatible, match=r"fc\.weight is not in the checkpoint"):
        registry.build("x")


def test_a_builders_name_is_its_own(registry: Registry) -> None:
    with pytest.raises(Conflict, match="registered already"):
        register_model("tests-net")(nn.Linear)
    with pytest.raises(Invalid, match="cannot be the name of a builder"):
        register_model("a/b")


# -- networks whose configuration is not ours ------------------------------------------------------------------


class ForeignConfig:
    """As those of Hugging Face: no `Config`, but it has `to_dict` and `from_dict`."""

    def __init__(self, width: int = 2) -> None:
        self.width = width

    def to_dict(self) -> dict[str, Any]:
        return {"width": self.width, "torch_dtype": torch.float32}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ForeignConfig:
        return cls(values["width"])


@register_model("tests-foreign")
class Foreign(nn.Linear):
    config_class = ForeignConfig

    def __init__(self, config: ForeignConfig | None = None) -> None:
        self.config = config or ForeignConfig()
        super().__init__(self.config.width, 1)


class Odd:
    """A configuration of which nothing is known."""


@register_model("tests-unrecorded")
class Unrecorded(nn.Linear):
    def __init__(self, width: int = 2) -> None:
        super().__init__(width, 1)
        self.config = Odd()


@register_model("tests-plain")
class WithoutConfig(nn.Linear):
    def __init__(self, width: int = 2) -> None:
        super().__init__(width, 1)


def test_a_configuration_with_to_dict_is_recorded_and_built_from(registry: Registry) -> None:
    net = Foreign(ForeignConfig(5))
    with registry.run("x") as run:
        run.save(model=net)
    assert registry["x"].provenance["network"] == {"width": 5, "torch_dtype": "torch.float32"}
    assert torch.equal(registry.build("x").weight, net.weight)


@pytest.mark.parametrize("config", [{"width": 5}, SimpleNamespace(width=5), Namespace(width=5)])
def test_a_configuration_of_plain_values_is_recorded(registry: Registry, config: Any) -> None:
    net = nn.Linear(2, 2)
    net.config = config
    with registry.run("x") as run:
        run.save(model=net)
    assert registry["x"].provenance["network"] == {"width": 5}


def test_labels_that_are_numbered_are_recorded_as_json_has_them(registry: Registry) -> None:
    """As transformers numbers its labels."""
    net = nn.Linear(2, 2)
    net.config = SimpleNamespace(to_dict=lambda: {"id2label": {0: "cat", 1: "dog"}, "nested": [{1: 2}]})
    with registry.run("x") as run:
        run.save(model=net)
    assert registry["x"].provenance["network"] == {
        "id2label": {"0": "cat", "1": "dog"},
        "nested": [{"1": 2}],
    }


@pytest.mark.parametrize(
    ("monitor", "saved"),
    [("val_loss", {"metrics": {"val/loss": 0.1}}), ("accuracy", {"loss": 0.1}), ("loss", {})],
)
def test_nothing_is_removed_before_the_monitored_value_appears(
    registry: Registry, caplog: pytest.LogCaptureFixture, monitor: str, saved: dict[str, Any]
) -> None:
    net = nn.Linear(2, 2)
    with registry.run("x", monitor=monitor, keep_best=1, keep_last=1) as run:
        for _ in range(3):
            run.save(model=net, **saved)
    assert len(registry.versions("x")) == 3
    told = [record.message for record in caplog.records if "no save has this metric" in record.message]
    assert len(told) == 1
    assert f"monitor='{monitor}'" in told[0]


def test_a_loss_among_the_metrics_is_the_loss(registry: Registry) -> None:
    net = nn.Linear(2, 2)
    with registry.run("x", monitor="loss", keep_best=1) as run:
        for loss in (0.5, 0.1, 0.9):
            run.save(model=net, metrics={"loss": loss})
    assert [version.loss for version in registry.versions("x")] == [0.9, 0.1]
    assert registry["x@best"].loss == 0.1


def test_a_teacher_that_was_frozen_wholly_is_restored_with_the_rest(registry: Registry) -> None:
    net, teacher = nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    with registry.run("x") as run:
        run.save(model=net, ema=teacher, optimizer=optimizer)
    other, ema = nn.Linear(2, 2), nn.Linear(2, 2)
    registry["x"].restore(model=other, ema=ema, optimizer=torch.optim.SGD(other.parameters(), 0.1))
    assert torch.equal(other.weight, net.weight)
    assert torch.equal(ema.weight, teacher.weight)
    assert not any(parameter.requires_grad for parameter in ema.parameters())


def test_values_that_differ_are_not_restored_into_a_network_that_ties_them(registry: Registry) -> None:
    checkpoint = registry.save(
        "x",
        {
            "model": {
                "embed.weight": torch.ones(5, 3),
                "head.weight": torch.zeros(5, 3),
                "head.bias": torch.ones(5),
            }
        },
    )
    target = Tied()
    before = target.embed.weight.detach().clone()
    with pytest.raises(
        Incompatible, match=r"embed\.weight and head\.weight share memory, and have different values"
    ):
        checkpoint.restore(model=target)
    assert torch.equal(target.embed.weight, before)


def test_a_configuration_that_is_not_recorded_is_said_and_no_default_is_built(registry: Registry) -> None:
    with registry.run("x") as run:
        run.save(model=Unrecorded(5))
    with pytest.raises(
        Invalid, match=r"does not record its network's configuration, a 'Odd': .*restore\(model="
    ):
        registry.build("x")


def test_a_default_that_does_not_fit_says_what_was_not_recorded(registry: Registry) -> None:
    for width in (2, 5):
        with registry.run("x") as run:
            run.save(model=WithoutConfig(width))
    registry.build("x:v1")
    with pytest.raises(
        Incompatible, match=r"x:v2 does not record how its network was made.*restore\(model=network\)"
    ):
        registry.build("x:v2")


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5)
        self.head.weight = self.embed.weight


@pytest.mark.parametrize("kept", ["embed.weight", "head.weight"])
def test_a_tied_tensor_that_a_file_has_once_is_restored(registry: Registry, kept: str) -> None:
    source, target = Tied(), Tied()
    state = {
        name: value
        for name, value in source.state_dict().items()
        if not name.endswith("weight") or name == kept
    }
    registry.save("net", {"model": state})
    registry["net"].restore(model=target)
    assert torch.equal(target.embed.weight, source.embed.weight)
    assert target.head.weight is target.embed.weight
    del state[kept]
    registry.save("net", {"model": state})
    with pytest.raises(Incompatible, match=r"embed\.weight is not in the checkpoint"):
        registry["net"].restore(model=target)


def test_an_untied_tensor_that_is_not_there_is_missed(registry: Registry) -> None:
    source, target = Tied(), Tied()
    target.head.weight = nn.Parameter(target.head.weight.detach().clone())
    state = source.state_dict()
    del state["head.weight"]
    registry.save("net", {"model": state})
    with pytest.raises(Incompatible, match=r"head\.weight is not in the checkpoint"):
        registry["net"].restore(model=target)


def test_an_error_in_somebody_elses_state_dict_names_the_component(registry: Registry) -> None:
    class Broken:
        def state_dict(self) -> dict[str, Any]:
            raise KeyError("moment")

        def load_state_dict(self, state: dict[str, Any]) -> None: ...

    with (
        registry.run("x") as run,
        pytest.raises(Invalid, match=r"sampler: state_dict\(\) of .*Broken failed: KeyError: 'moment'"),
    ):
        run.save(model=nn.Linear(1, 1), sampler=Broken())


@pytest.mark.damages
def test_an_old_version_that_is_damaged_fails_no_save(
    registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    """The rules of a run are applied once the new version is there: what they meet is said, and the training goes on."""
    net = nn.Linear(4, 400)
    optimizer = torch.optim.Adam(net.parameters())
    step(net, optimizer)
    with registry.run("net", keep_optimizer=1) as run:
        run.save(model=net, optimizer=optimizer, epoch=1)
        (pack,) = registry.store.packs.glob("*/*")
        info = registry.store.pack_info(pack.stem)
        pack.chmod(0o644)
        data = bytearray(pack.read_bytes())
        for place in info.places.values():
            data[place.start] ^= 1
        pack.write_bytes(data)
        for epoch in (2, 3):
            step(net, optimizer)
            saved = run.save(model=net, optimizer=optimizer, epoch=epoch)
            assert saved is not None
            assert saved.version == epoch
        assert "the rules of the run fail" in caplog.text
        step(net, optimizer)
        run.save(model=net, optimizer=optimizer, epoch=4, wait=False)
    rows = list_versions(registry.catalog, "net")[0]
    assert [(row.version, row.record.get("parent")) for row in rows] == [
        (4, "net:v3"),
        (3, "net:v2"),
        (2, "net:v1"),
        (1, None),
    ]
