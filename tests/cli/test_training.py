"""Training from the command line: train, interrupt, resume, evaluate, predict, look back, and TensorBoard in a browser."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from conftest import Run
from PIL import Image
from terminal import Session, on_a_terminal

from registry import Registry
from registry.catalog.versions import own_sizes
from registry.cli.epochs import _COLUMNS, _WIDEST, EpochTable
from registry.cli.tables import Growing
from registry.models import data, training
from registry.models.training import Epoch

PROGRAM = [sys.executable, "-m", "registry.cli"]
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry with a training of two epochs, and another that went on from it."""
    root = tmp_path_factory.mktemp("trained") / "r"
    for words in (
        ["init"],
        ["train", "lenet5", "--epochs", "2"],
        ["train", "--resume", "lenet5:v2", "--set", "epochs=3"],
    ):
        subprocess.run([*PROGRAM, *words, "--root", str(root)], check=True, capture_output=True)
    return root


@pytest.fixture
def root(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REGISTRY_ROOT", str(trained))
    return trained


# -- training ------------------------------------------------------------------------------------------------


def test_training_shows_its_progress_and_where_to_look(run: Run, tmp_path: Path) -> None:
    Registry(tmp_path / "r")
    done = run("train", "lenet5", "--epochs", 1, "--set", "lr=0.01", "--root", tmp_path / "r")
    assert done.status == 0, done.err
    first, head, row, *_ = done.out.splitlines()
    assert first == "lenet5/run-1   digits: 1,438 to train, 359 to test   61,706 parameters   cpu"
    assert head.split() == [
        "EPOCH",
        "LOSS",
        "ACCURACY",
        "TEST",
        "LOSS",
        "TEST",
        "ACCURACY",
        "TIME",
        "SAVED",
        "AS",
    ]
    assert re.fullmatch(
        r"  1/1  \d\.\d{4}     0\.\d{3}     \d\.\d{4}         0\.\d{4}  +\d+\.\d s  v1 best", row
    )
    assert "lenet5/run-1 finished: the best is lenet5:v1, accuracy 0." in done.out
    config = Registry(tmp_path / "r")["lenet5"].config
    assert config is not None
    assert (config["lr"], config["epochs"]) == (0.01, 1)


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    monkeypatch.setenv("REGISTRY_ROOT", str(tmp_path / "r"))
    return Registry(tmp_path / "r")


def test_best_is_marked_where_the_alias_points_and_nowhere_else(empty: Registry, run: Run) -> None:
    first = run("train", "lenet5", "--epochs", 2, "--set", "lr=0.01", "--set", "samples=400").out
    # Far too small a rate to come near the versions of the first run.
    second = run("train", "lenet5", "--epochs", 2, "--set", "lr=1e-7", "--set", "samples=40").out
    marked = re.findall(r"(v\d) best$", first + second, re.MULTILINE)
    rising = (
        [1, 2] if empty["lenet5:v2"].metrics["accuracy"] > empty["lenet5:v1"].metrics["accuracy"] else [1]
    )
    assert marked == [f"v{number}" for number in rising]
    best, own = empty["lenet5@best"], empty.versions("lenet5", by="accuracy", where="version > 2")[0]
    assert best.name == f"lenet5:{marked[-1]}"
    assert f"lenet5/run-1 finished: the best is {best.name}, accuracy 0." in first
    assert f"lenet5/run-2 finished: its best is {own.name}, accuracy 0." in second
    assert f"; the best of lenet5 stays {best.name}, accuracy 0." in second


LIVE = r"^2/50 .* \d+/45 loss \d\.\d{3} [\d,]+ images/s"


def test_a_terminal_shows_a_table_and_one_live_line(empty: Registry) -> None:
    session = Session("train", "lenet5", "--epochs", "50")
    assert session.wait_for("loading digits") == [session.shown()[0]]
    assert "loss" not in session.shown()[0]  # nobody has measured it yet
    lines = session.wait_for(LIVE)
    assert lines[0].startswith("lenet5/run-1   digits: 1,438 to train")
    assert lines[1].split()[0] == "EPOCH"
    assert lines[2].split()[0] == "1/50"
    assert len(lines) == 4
    session.type("\x03")
    assert session.end() == 130
    *rows, told, advice = session.shown()
    assert not any("━" in line or "^C" in line for line in rows)
    match = re.fullmatch(r"interrupted (?:in|after) epoch (\d+).*; saved as (lenet5:v\d+)", told)
    assert match
    assert advice == f"hint:  go on with: registry train --resume {match[2]}"
    assert empty[match[2]].name == empty["lenet5"].name
    assert empty["lenet5"].epoch in (int(match[1]), int(match[1]) - 1)


def test_an_epoch_names_its_version_even_if_the_next_one_is_stored_already(
    empty: Registry, capsys: pytest.CaptureFixture[str]
) -> None:
    first = empty.save("net", {"model": {}}, epoch=1, metrics={"accuracy": 0.5})
    second = empty.save("net", {"model": {}}, epoch=2, metrics={"accuracy": 0.6}, parent=first.name)
    stopped = empty.save("net", {"model": {}}, epoch=2, parent=second.name)
    for number, saved, name in ((1, first, "v1"), (1, second, "v1"), (2, second, "v2"), (2, stopped, "v2")):
        table = EpochTable()
        table._table = Growing(_COLUMNS, ("9/9", *_WIDEST), None)
        table.finishes(Epoch(number, 0.1, 0.2, 0.3, 0.4, 1.0, False), cast(Any, SimpleNamespace(saved=None)))
        run = SimpleNamespace(saved=saved, registry=empty, model="net")
        table._tell_saved(cast(Any, run))
        # Each was better than those before.
        assert capsys.readouterr().out.split()[-2:] == [name, "best"]


def test_a_reader_that_stops_reading_does_not_end_the_training(empty: Registry) -> None:
    line = f"{' '.join(map(str, PROGRAM))} train lenet5 --epochs 3 --set samples=64 | head -1"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("lenet5/run-1   digits: 64 to train")
    assert "Traceback" not in done.stderr
    assert empty["lenet5"].epoch == 3
    assert empty.runs["lenet5/run-1"].state == "finished"


def test_ctrl_c_twice_ends_at_once_with_one_message(empty: Registry) -> None:
    session = Session("train", "lenet5", "--epochs", "50")
    session.wait_for(LIVE)
    session.type("\x03\x03")
    assert session.end() == 130
    told = [line for line in session.shown() if "interrupted" in line]
    assert len(told) == 1
    assert "Traceback" not in "".join(session.shown())


def test_ctrl_c_before_the_first_batch_says_that_nothing_was_saved(empty: Registry) -> None:
    session = Session("train", "lenet5", "--epochs", "50")
    session.wait_for("loading digits")
    session.type("\x03")
    assert session.end() == 130
    told = "\n".join(session.shown())
    assert "interrupted" in told
    assert "Traceback" not in told
    if empty.models():  # it came to a batch all the same
        assert "saved as lenet5:v" in told
    else:
        assert "interrupted before the first batch; nothing was saved" in told


@pytest.mark.parametrize("columns", [40, 60, 200])
def test_the_table_of_a_training_fits_the_terminal(empty: Registry, columns: int) -> None:
    shown = on_a_terminal(
        "train", "lenet5", "--epochs", "1", "--set", "samples=64", "--name", "x", columns=columns
    )
    assert shown.status == 0
    rows = [line for line in shown.text.replace("\r", "\n").splitlines() if "v1 best" in line]
    assert rows
    assert all(len(row) <= columns and row.strip().startswith("1/1") for row in rows)


def test_training_as_json(run: Run, tmp_path: Path) -> None:
    Registry(tmp_path / "r")
    (tmp_path / "c.toml").write_text('model = "lenet6"\nepochs = 1\n')
    done = run(
        *("train", "--config", tmp_path / "c.toml", "--name", "mine", "--root", tmp_path / "r", "--json"),
        *("--keep-last", 1),
    )
    found = done.json
    assert (found["run"], found["latest"]["name"], found["best"]["name"]) == (
        "mine/run-1",
        "mine:v1",
        "mine:v1",
    )
    assert Path(found["log"]).is_file()


@pytest.mark.parametrize(
    ("words", "status", "told"),
    [
        ("train", 2, "name a network, such as: registry train lenet5"),
        ("train lenet7", 1, "no builder 'lenet7' is registered\nhint:  did you mean 'lenet"),
        ("train lenet5 --epochs 0", 1, "epochs is 0; expected"),
        ("train lenet5 --set learning_rate=1", 1, "learning_rate is not a known key"),
        ("train lenet5 --set epoch=1", 1, "did you mean epochs?"),
        ("train lenet5 --data mnist", 1, "mnist needs a folder: use --data-dir DIR"),
        ("train lenet5 --data nothing", 1, "data is 'nothing', expected one of digits"),
        ("train lenet5 --devices 0,3", 1, "there is no device 'cuda:0'\nhint:  there is cpu"),
        ("train lenet5 --devices 0,0", 1, "names one of them twice"),
        ("train lenet5 --device cuda:9", 1, "there is no device 'cuda:9'\nhint:  there is cpu"),
        ("train --resume lenet6", 1, "there is no model 'lenet6'\nhint:  did you mean 'lenet5'"),
        (
            "train --resume lenet5",
            1,
            "lenet5:v3 is complete after 3 epochs\nhint:  to train on: --set epochs=6",
        ),
        ("train lenet6 --resume lenet5", 1, "lenet5:v3 is a lenet5, not a lenet6"),
        ("train --resume lenet5 --set seed=3 --epochs 9", 1, "was trained on other data"),
        ("train lenet5 --name ../x", 1, "cannot be the name of a model"),
        ("train lenet5 --keep-last 0", 1, "keep_last is '0'"),
        ("eval lenet5@bst", 1, "no alias 'bst'\nhint:  did you mean 'best'"),
        ("eval lenet5 --data cifar10", 1, "cifar10 needs a folder"),
        ("predict lenet5 nothing.png", 1, "nothing.png: there is no such file"),
        ("best lenet5 --by acc", 1, "no version of lenet5 has the metric 'acc'"),
        ("log lenet5/run-9", 1, "there is no run 'lenet5/run-9'\nhint:  did you mean"),
        ("board lenet4", 1, "there is no model 'lenet4'"),
        ("runs lenet4", 1, "there is no model 'lenet4'"),
    ],
)
def test_bad_input_is_one_line_and_leaves_everything_as_it_was(
    run: Run, root: Path, words: str, status: int, told: str
) -> None:
    before = sorted(path for path in root.rglob("*") if path.is_file() and "catalog" not in path.name)
    done = run(*words.split())
    assert (done.status, done.out) == (status, "")
    assert told in done.err
    assert len(done.err.splitlines()) <= 2
    after = sorted(path for path in root.rglob("*") if path.is_file() and "catalog" not in path.name)
    assert after == before


def test_a_checkpoint_without_an_optimizer_cannot_be_resumed(run: Run, root: Path, tmp_path: Path) -> None:
    registry = Registry(tmp_path / "r")
    registry.save("weights", Registry(root)["lenet5"].load("model"), config={"model": "lenet5"})
    done = run("train", "--resume", "weights", "--root", registry.root)
    assert (done.status, done.err) == (1, "error: weights:v1 cannot be resumed: it has no optimizer\n")


def wait_for(path: Path, text: str, child: subprocess.Popen[str]) -> None:
    for _ in range(4_000):
        if child.poll() is not None:
            raise AssertionError(f"ended with {child.returncode}")
        if any(text in found.read_text() for found in path.glob("runs/*/*/run.log")):
            return
        time.sleep(0.05)
    raise AssertionError(text)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_training_that_is_stopped_ends_as_one_that_was_not(tmp_path: Path, number: int) -> None:
    root = tmp_path / "r"
    words = ["--epochs", "5", "--set", "batch_size=64", "--root", str(root)]
    subprocess.run([*PROGRAM, "init", "--root", str(root)], check=True, capture_output=True)
    child = subprocess.Popen(
        [*PROGRAM, "train", "lenet5", "--name", "part", *words], stderr=subprocess.PIPE, text=True
    )
    wait_for(root, "Epochs[3/5] -- batch", child)
    child.send_signal(number)
    _, err = child.communicate(timeout=60)
    assert child.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[number]  # type: ignore[index]
    registry = Registry(root)
    assert registry["part"].epoch in (2, 3)
    if number != signal.SIGKILL:
        assert re.match(
            rf"interrupted (after epoch 3|in epoch [34], batch \d+ of 23); saved as {registry['part'].name}\n"
            rf"hint:  go on with: registry --root {re.escape(str(root))} train --resume {registry['part'].name}\n",
            err,
        )
    resume = [*PROGRAM, "train", "--resume", "part", "--root", str(root)]
    subprocess.run(resume, check=True, capture_output=True)
    subprocess.run([*PROGRAM, "train", "lenet5", "--name", "whole", *words], check=True, capture_output=True)
    part, whole = registry["part"], registry["whole"]
    assert part.epoch == whole.epoch == 5
    tensors = [
        {path: digest for path, _, _, digest in one.parameters() if not path.startswith(("rng", "loader"))}
        for one in (part, whole)
    ]
    assert tensors[0] == tensors[1]
    assert part.metrics == whole.metrics
    assert registry.verify().problems == ()


# -- using what was trained ----------------------------------------------------------------------------------


def test_evaluating(run: Run, root: Path) -> None:
    found = run("eval", "lenet5@best", "--json").json
    assert found["accuracy"] == Registry(root)["lenet5@best"].metrics["accuracy"]
    assert found["images"] == sum(one["images"] for one in found["classes"]) == 359
    done = run("eval", "lenet5@best", "--data", "digits")
    assert re.search(r"CLASS +IMAGES +ACCURACY", done.out)


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    test = data.load("digits").test
    paths = []
    for i in range(6):
        pixels = (test[i][0][0].numpy() * 255).astype(np.uint8)
        paths.append(tmp_path / f"{i}.png")
        Image.fromarray(pixels).save(paths[-1])
    return paths


def test_predicting(run: Run, root: Path, images: list[Path], tmp_path: Path) -> None:
    test = data.load("digits").test
    found = run("predict", "lenet5@best", *images, "--json").json["predictions"]
    assert [one["image"] for one in found] == list(map(str, images))
    right = sum(one["label"] == str(int(test[i][1])) for i, one in enumerate(found))
    assert right >= 5
    assert all(0.1 <= one["second_probability"] + one["probability"] <= 1.0001 for one in found)
    large = tmp_path / "large.png"
    picture = Image.open(images[0]).resize((56, 56)).convert("RGB")
    Image.eval(picture, lambda value: 255 - value).save(large)
    (same,) = run("predict", "lenet5@best", large, "--fit", "--invert", "--json").json["predictions"]
    assert same["label"] == found[0]["label"]
    assert "PROBABILITY" in run("predict", "lenet5@best", images[0]).out


def test_images_that_do_not_fit_are_named(run: Run, root: Path, tmp_path: Path) -> None:
    Image.new("L", (64, 48)).save(tmp_path / "wide.png")
    Image.new("RGB", (28, 28)).save(tmp_path / "red.png")
    (tmp_path / "text.png").write_text("no image")
    for name, told in (
        ("wide.png", "has 64x48 pixels, but the network takes 28x28\nhint:  scale it with --fit"),
        ("red.png", "is in colour, but the network takes grey\nhint:  convert it with --fit"),
        ("text.png", "not an image that can be read"),
    ):
        done = run("predict", "lenet5", tmp_path / name)
        assert (done.status, done.out) == (1, "")
        assert f"{name}: " in done.err
        assert told in done.err


# -- looking back --------------------------------------------------------------------------------------------


def test_looking_back(run: Run, root: Path) -> None:
    registry = Registry(root)
    runs = run("runs", "--json").json["runs"]
    assert [(one["name"], one["state"], one["versions"]) for one in runs] == [
        ("lenet5/run-2", "finished", 1),
        ("lenet5/run-1", "finished", 2),
    ]
    assert "lenet5/run-1  finished         2" in run("runs").out
    history = run("history", "lenet5", "--json").json["versions"]
    assert [(one["name"], one["parent"], one["run"]) for one in history] == [
        ("lenet5:v3", "lenet5:v2", "lenet5/run-2"),
        ("lenet5:v2", "lenet5:v1", "lenet5/run-1"),
        ("lenet5:v1", None, "lenet5/run-1"),
    ]
    packs = sum(path.stat().st_size for path in (root / "packs").rglob("*.safetensors"))
    assert sum(one["own"] for one in history) == packs
    assert run("history", "lenet5", "--limit", "1", "--json").json["versions"] == history[:1]
    sizes = own_sizes(registry.catalog, "lenet5", since=3)  # what v3 shares with earlier ones is theirs
    assert sizes == {registry["lenet5:v3"].id: history[0]["own"]}
    best = run("best", "lenet5", "--by", "accuracy", "--json").json
    assert best["name"] == registry["lenet5@best"].name
    lowest = run("best", "lenet5", "--by", "loss").out
    assert lowest.startswith(
        min((registry[f"lenet5:v{n}"] for n in (1, 2, 3)), key=lambda c: c.loss or 9).name
    )
    graph = run("log", "lenet5:v3").out.splitlines()
    assert [line.split()[1] for line in graph[1:]] == ["lenet5:v3", "lenet5:v1…v2"]
    assert "resumed" in graph[1].split()
    assert run("log", "lenet5:v2").out.splitlines() == graph
    of_run = run("log", "lenet5/run-2")
    assert of_run.out.splitlines() == graph
    assert of_run.err == "hint:  its log file: registry logs lenet5/run-2\n"
    assert "did you mean 'lenet5/run-" in run("log", "lenet5/run-9").err
    assert run("log", "lenet5/run-2", "--json").status == 2
    tree = run("log", "lenet5:v3", "--json").json
    assert [(one["kind"], one["name"]) for one in tree["from"]] == [("resumed-from", "lenet5:v2")]
    assert tree["from"][0]["from"][0]["kind"] == "continued from"
    assert run("log", "--json").status == 2
    shown = run("show", "lenet5").out
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    assert lines[1].startswith("LeNet5, 61,706 parameters (0 frozen), float32")
    assert any(line.startswith("from lenet5:v2 (resumed), data ") for line in lines)
    assert "run lenet5/run-2" in lines


def test_the_log_of_a_checkpoint_is_its_runs(run: Run, root: Path) -> None:
    done = run("logs", "lenet5:v1")
    assert done.out == (root / "runs/lenet5/run-1/run.log").read_text()
    assert run("logs", "lenet5/run-2").out != done.out
    assert run("logs", "lenet5:v1", "--json").json["lines"] == done.out.splitlines()
    assert run("logs", "lenet5:v1", "--json", "-f").status == 2
    assert run("logs", "lenet5:v1", "-f").out == done.out  # which ends, as the run has ended


def test_of_a_huge_log_the_end_is_shown(run: Run, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = root / "runs/lenet5/run-1/run.log"
    lines = path.read_text().splitlines()
    monkeypatch.setattr("registry.cli.runs._LONGEST_LOG", len(lines[-1]) + len(lines[-2]) + 4)
    done = run("logs", "lenet5:v1")
    assert done.out.splitlines() == lines[-2:]
    assert "the whole log is" in done.err
    assert run("logs", "lenet5:v1", "--json").json["lines"] == lines[-2:]


def test_following_a_log_ends_with_the_run(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "r")
    with registry.run("net") as session:
        child = subprocess.Popen(
            [*PROGRAM, "logs", "net/run-1", "-f", "--root", str(registry.root)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert child.stdout is not None
        assert "began" in child.stdout.readline()
        import logging

        logging.getLogger("x").info("while it runs")
        assert "while it runs" in child.stdout.readline()
        assert session.name == "net/run-1"
    assert "finished" in child.stdout.read()
    assert child.wait(20) == 0


@pytest.mark.parametrize(
    "words", ["runs", "history lenet5", "best lenet5 --by accuracy", "lineage lenet5", "log lenet5"]
)
def test_looking_back_loads_nothing_heavy(root: Path, words: str) -> None:
    program = (
        "import sys\nfrom registry.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print(*{name.partition('.')[0] for name in sys.modules}, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *words.split()], capture_output=True, text=True, check=True
    )
    assert done.stdout
    assert (
        set(done.stderr.split()) & {"torch", "torchvision", "tensorboard", "numpy", "pydantic", "rich"}
        == set()
    )


# -- TensorBoard ---------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def board(root: Path, request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    """The address of a board, and what the command has printed."""
    environment = {**os.environ, "SSH_CONNECTION": "192.0.2.1 5000 192.0.2.9 22", "USER": "somebody"}
    child = subprocess.Popen(
        [*PROGRAM, "board", *getattr(request, "param", ()), "--port", str(free_port())],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    )
    assert child.stdout is not None
    printed = child.stdout.readline() + child.stdout.readline() + child.stdout.readline()
    match = re.search(r"http://\S+", printed)
    assert match, printed
    yield match[0].rstrip("/"), printed
    child.send_signal(signal.SIGINT)
    assert child.wait(20) == 0
    child.stdout.close()


def ask(address: str) -> object:
    with urllib.request.urlopen(address, timeout=20) as reply:
        return json.load(reply)


def runs_of(address: str, count: int) -> list[str]:
    found: list[str] = []
    for _ in range(200):
        found = list(ask(f"{address}/data/runs"))  # type: ignore[call-overload]
        if len(found) >= count:
            break
        time.sleep(0.1)
    return sorted(found)


def test_the_board_serves_all_runs_by_their_names(board: tuple[str, str]) -> None:
    address, printed = board
    assert runs_of(address, 2) == ["lenet5/run-1", "lenet5/run-2"]
    port = address.rpartition(":")[2]
    assert f"run: ssh -L {port}:127.0.0.1:{port} somebody@192.0.2.9" in printed
    tags = ask(f"{address}/data/plugin/scalars/tags")
    assert isinstance(tags, dict)
    assert {"Training/Loss", "Testing/Accuracy"} <= set(tags["lenet5/run-1"])
    points = ask(f"{address}/data/plugin/scalars/scalars?run=lenet5%2Frun-1&tag=Testing%2FAccuracy")
    assert [step for _, step, _ in points] == [1, 2]  # type: ignore[attr-defined]


@pytest.mark.parametrize("board", [("lenet5:v3",)], indirect=True)
def test_the_board_serves_chosen_runs(board: tuple[str, str]) -> None:
    assert runs_of(board[0], 1) == ["lenet5/run-2"]


def test_a_taken_port_names_a_free_one(run: Run, root: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = run("board", "--port", port)
    assert (done.status, done.out) == (1, "")
    match = re.search(rf"port {port} of 127.0.0.1 is taken\nhint:  --port (\d+) is free", done.err)
    assert match
    assert int(match[1]) > port


@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome is installed")
def test_a_browser_shows_the_run_and_its_scalars(board: tuple[str, str], tmp_path: Path) -> None:
    address, _ = board
    runs_of(address, 2)
    command = [
        *(str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}"),
        *("--window-size=1600,1400", "--virtual-time-budget=20000", "--timeout=40000"),
    ]
    page = ""
    for _ in range(5):
        done = subprocess.run(
            [*command, "--dump-dom", f"{address}/?darkMode=false#timeseries"],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        page = done.stdout
        if "Testing/Accuracy" in page:
            break
    for word in ("lenet5/run-1", "lenet5/run-2", "Testing/Accuracy", "Training/Loss"):
        assert word in page


def test_a_training_that_diverges_is_recorded_to_its_end(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REGISTRY_ROOT", str(Registry(tmp_path / "r").root))
    done = run("train", "lenet5", "--epochs", 2, "--set", "lr=1e6", "--set", "optimizer=sgd")
    assert (done.status, done.err.count("error:")) == (0, 0)
    assert re.search(r"1/2 +nan .* v1", done.out)
    assert re.search(r"2/2 +nan .* v2", done.out)
    assert "a smaller lr may help" in done.out


@pytest.mark.parametrize(
    ("when", "place", "hint"),
    [
        (1, "after epoch 1", "go on with:  registry train --resume lenet5:v1"),
        (2, "after epoch 2, which was the last", "registry train --resume lenet5:v2 --set epochs=4"),
    ],
)
def test_an_interruption_in_an_evaluation_says_how_to_go_on(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: int, place: str, hint: str
) -> None:
    monkeypatch.setenv("REGISTRY_ROOT", str(Registry(tmp_path / "r").root))
    measure, calls = training.evaluate_together, iter(range(1, 100))

    def interrupted(*given: Any, **named: Any) -> Any:
        if next(calls) == when:
            os.kill(os.getpid(), signal.SIGINT)
        return measure(*given, **named)

    monkeypatch.setattr(training, "evaluate_together", interrupted)
    done = run("train", "lenet5", "--epochs", 2)
    assert f"interrupted {place}" in done.err
    assert hint.replace(":  ", ": ") in done.err.replace(":  ", ": ")
    # Each epoch that is complete and stored has its line.
    assert len(re.findall(r"^ *\d/2 ", done.out, re.MULTILINE)) == when
    command = re.search(r"registry (train --resume .*)", done.err)
    assert command
    monkeypatch.undo()
    monkeypatch.setenv("REGISTRY_ROOT", str(tmp_path / "r"))
    assert run(*command[1].split()).status == 0
