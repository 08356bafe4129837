"""The benchmark suite itself: its arithmetic, its peers' processes, and the page that it writes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import __main__ as program
from benchmarks import (
    compaction,
    depth,
    exactness,
    floors,
    gpu,
    growth,
    peers,
    report,
    series,
    small,
    summary,
    tasks,
    training,
    worker,
)
from benchmarks.measure import Curve, Result, Scale, Section, Table, ratio, spoken, take_turns, together
from benchmarks.peers import Peer, PeerFailed, Worker
from registry import Registry
from registry.upkeep import choosing

LOSSY = """
import sys, tempfile, time
sys.path.insert(0, {folder!r})
import worker

class Lossy(worker.Torch):
    def load(self, number):
        tree = super().load(number)
        tempfile.mkdtemp(prefix="left-by-lossy-")
        tree["model"]["w"] += 1
        return tree

class Slow(worker.Torch):
    def save(self, state, number):
        time.sleep(60)

class Dying(worker.Torch):
    def save(self, state, number):
        sys.exit(3)

class Failing(worker.Torch):
    def save(self, state, number):
        print("this goes to nobody")
        raise ValueError("no such luck")

worker.PEERS |= {{"lossy": Lossy, "slow": Slow, "dying": Dying, "failing": Failing}}
worker.main()
"""


def state() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    moments = {0: {"step": torch.tensor(3.0), "exp_avg": torch.rand(400, generator=generator)}}
    return {
        "model": {"w": torch.rand(400, generator=generator), "n": torch.tensor(2)},
        "optimizer": {"state": moments, "param_groups": [{"lr": 0.1, "params": [0]}]},
    }


@pytest.fixture
def own_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "worker.py"
    script.write_text(LOSSY.format(folder=str(peers.WORKER.parent)))
    monkeypatch.setattr(peers, "WORKER", script)
    monkeypatch.setattr(peers, "ENVIRONMENTS", tmp_path / "environments")


def test_a_ratio_is_the_median_of_those_of_each_round() -> None:
    found = ratio("x", {"ours": [1.0, 2.0, 30.0], "peer": [2.0, 4.0, 20.0]}, "ours", "peer", 0.5)
    assert (found.value, found.low, found.high, found.holds) == (0.5, 0.5, 1.0, True)
    assert found.detail == "2.0 s against 4.0 s of peer"
    assert not Result("x", 0.51, 0.5, "").holds
    assert [spoken(s) for s in (5e-6, 0.0042, 0.042, 4.2)] == ["5 µs", "4.2 ms", "42 ms", "4.2 s"]


def test_runs_give_the_median_of_their_medians_and_say_if_they_differ() -> None:
    runs = [
        Section(
            [Result("save", value, 0.6, f"run {value}", low=value - 0.1, high=value + 0.1)],
            notes=[f"{value}"],
        )
        for value in (0.50, 0.61, 0.55)
    ]
    found = together(runs)
    (save,) = found.results
    assert (save.value, save.runs, save.low, save.high) == (0.55, [0.50, 0.61, 0.55], 0.40, 0.71)
    assert save.detail == "run 0.55"
    assert save.holds
    assert save.moves
    assert found.notes == ["0.55"]
    assert not Result("x", 1.0, None, "", runs=[1.0, 1.1]).moves
    assert not Result("x", 1.0, None, "").moves


def test_contenders_take_turns_after_a_round_to_warm_up() -> None:
    calls: list[str] = []
    times = take_turns(
        {name: (lambda: None, lambda name=name: calls.append(name)) for name in "ab"},  # type: ignore[misc]
        rounds=2,
    )
    assert "".join(calls) == "abbaab"
    assert [len(times[name]) for name in "ab"] == [2, 2]


def test_a_curve_knows_what_is_fixed_and_what_each_costs() -> None:
    curve = Curve("load", "tensors", [(n, 2e-3 + 5e-6 * n) for n in (10, 1_000, 100_000)])
    assert curve.fixed == pytest.approx(2e-3)
    assert curve.each == pytest.approx(5e-6)
    assert Curve("gc", "tensors", [(10, 1.0), (100, 100.0)]).power == pytest.approx(2)


def test_what_a_peer_changes_is_noticed() -> None:
    saved = {"a": torch.zeros(2), "b": [torch.ones(3)]}
    assert worker._difference({"a": torch.zeros(2), "b/0": torch.ones(3)}, saved) == ""
    assert (
        worker._difference({"a": torch.ones(2), "b/0": torch.ones(3)}, saved) == "1 tensors come back changed"
    )
    assert worker._difference({"a": torch.zeros(2)}, saved) == "b/0 does not come back"
    assert worker._difference({"a": torch.zeros(2).double(), "b/0": torch.ones(3)}, saved) != ""


def test_the_floors_do_what_they_say(tmp_path: Path) -> None:
    tensors = [torch.arange(5), torch.rand(3, 4), torch.tensor(1.0)]
    floors.plain_write(tensors, tmp_path / "plain")
    assert (tmp_path / "plain").read_bytes() == b"".join(t.numpy().tobytes() for t in tensors)
    large = torch.rand(700, 1000)
    floors.hashed_write([*tensors, large], tmp_path / "hashed")
    written = [large, *sorted(tensors, key=lambda tensor: -tensor.nbytes)]
    assert (tmp_path / "hashed").read_bytes() == b"".join(t.numpy().tobytes() for t in written)
    floors.hash_all(tensors)


@pytest.mark.usefixtures("own_worker")
def test_peers_side_by_side_and_those_that_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = tuple(peer for peer in peers.PEERS if peer.pinned is None)
    assert {peer.key for peer in ours} >= {"registry", "torch", "torch mmap", "safetensors", "dcp", "joblib"}
    others = [Peer(key, key, "torch") for key in ("lossy", "dying", "failing")]
    missing = Peer("dvc", "missing", "nothing-of-this-name", "0.0")

    def refuse(peer: Peer) -> Path:
        raise PeerFailed(f"pip: no {peer.package}")

    monkeypatch.setattr(peers, "environment", refuse)
    monkeypatch.setattr(peers, "PEERS", (*ours, *others, missing))
    monkeypatch.setattr(peers, "resnet50_with_adam", state)
    section = peers.measure(tmp_path, Scale(rounds=1))
    times, room, used = section.tables
    names = [peer.name for peer in (*ours, others[0])]
    assert [row[0] for row in times.rows] == names
    assert [row[0] for row in room.rows] == names
    told = {row[0]: row[2] for row in used.rows}
    assert told["missing"] == "pip: no nothing-of-this-name"
    assert told["failing"] == "save: ValueError: no such luck"
    assert told["dying"].startswith("save ended with status 3")
    assert [note for note in section.notes if "exact" in note] == [
        "lossy is not exact: 1 tensors come back changed."
    ]
    assert len(section.results) == 5
    left = [*Path(tempfile.gettempdir()).glob("left-by-*"), *peers.ENVIRONMENTS.glob("tmp-*")]
    assert not left


@pytest.mark.usefixtures("own_worker")
def test_a_peer_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    torch.save(state(), tmp_path / "state.pt")
    with Worker(Peer("slow", "slow", "torch"), 60.0) as slow:
        slow.ask("open", folder=str(tmp_path / "store"))
        slow.ask("state", file=str(tmp_path / "state.pt"))
        slow._limit = 0.5
        with pytest.raises(PeerFailed, match=r"save ended with status -9, or took more than"):
            slow.ask("save")


@pytest.mark.parametrize("peer", [peers.OURS, peers.COMPACTED], ids=lambda peer: peer.key)
def test_what_only_an_open_registry_has_is_not_counted(tmp_path: Path, peer: Peer) -> None:
    torch.save(state(), tmp_path / "state.pt")
    folder = tmp_path / "store"
    with Worker(peer, 60.0) as own:
        own.ask("open", folder=str(folder))
        own.ask("state", file=str(tmp_path / "state.pt"))
        own.ask("save")
        assert (folder / "catalog.sqlite-wal").exists()
        counted = own.ask("close")["bytes"]
        assert not (folder / "catalog.sqlite-wal").exists()
    assert counted == sum(file.lstat().st_blocks * 512 for file in folder.rglob("*") if file.is_file())


def test_an_environment_is_made_once_and_only_if_pip_succeeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With pip and venv replaced: what is installed for real takes minutes, and `make bench` does it."""
    calls: list[list[str]] = []
    answers = iter([1, 0])

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        return subprocess.CompletedProcess(command, next(answers), "", "WARNING: a\nERROR: no such version")

    def create(folder: Path, **_: Any) -> None:
        (folder / "lib/python3/site-packages").mkdir(parents=True, exist_ok=True)

    monkeypatch.setattr(peers, "ENVIRONMENTS", tmp_path)
    monkeypatch.setattr(peers.venv, "create", create)
    monkeypatch.setattr(peers.subprocess, "run", run)
    peer = Peer("dvc", "DVC", "dvc", "9.9")
    with pytest.raises(PeerFailed, match="pip: ERROR: no such version"):
        peers.environment(peer)
    python = peers.environment(peer)
    assert peers.environment(peer) == python == tmp_path / "dvc-9.9/bin/python"
    assert len(calls) == 2
    assert calls[1][-1] == "dvc==9.9"
    (link,) = tmp_path.glob("dvc-9.9/lib/*/site-packages/*.pth")
    assert (Path(link.read_text().strip()) / "torch").is_dir()


def test_growth_is_measured_at_each_size(tmp_path: Path) -> None:
    def content(size: int) -> Any:
        return growth._content(size, growth._many_tensors)

    curves = growth._curves((5, 10), "tensors", content, tmp_path, 1)
    curves += growth._curves((2, 4), "checkpoints", growth._checkpoints, tmp_path, 1)
    assert {curve.what for curve in curves} >= {
        "save, all new",
        "load, verified",
        "diff",
        "list",
        "verify",
        "gc",
    }
    assert all(seconds > 0 for curve in curves for _, seconds in curve.points)
    assert [size for size, _ in curves[0].points] == [5, 10]


def test_what_a_save_adds_to_steps_is_spread_over_the_time_to_the_next() -> None:
    times = {"saving": [2.2, 2.4, 9.0], "alone": [2.0, 2.0, 8.7]}
    found = training._slowdown("steps", times, "saving", 200)
    assert (found.value, found.low, found.high) == pytest.approx((1.03, 1.025, 1.035))
    assert found.detail == "200 steps and one save 2.4 s against 2.0 s of 200 steps"
    assert not found.holds
    beside = training._slowdown("steps", times | {"beside": times["saving"]}, "beside", 200)
    assert (beside.value, beside.goal) == (found.value, None)


def test_steps_last_long_enough_for_a_save(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.1, 0.0, 10.0])
    monkeypatch.setattr(training, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    assert training._enough(lambda: None) == 400
    assert training._enough(lambda: None) == 200


def test_steps_are_measured_beside_saves_of_another_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[str] = []
    monkeypatch.setattr(training, "_enough", lambda step: 2)
    monkeypatch.setattr(training, "_resnet50", lambda: torch.nn.Linear(3, 3))
    monkeypatch.setattr(training, "_python_step", lambda: lambda: taken.append("python"))
    found = training._slowed(tmp_path / "behind", 1)
    assert [one.what.partition(",")[0] for one in found] == [
        "steps of Python over small tensors",
        "steps of Python over small tensors",
        "steps of LeNet5",
        "steps of LeNet5",
    ]
    # Three contenders, each with a turn to warm up.
    assert len(taken) == 2 * 3 * 2
    assert not (tmp_path / "behind").exists()


def test_many_small_tensors_and_small_saves_are_measured_against_plain_writes(tmp_path: Path) -> None:
    times = small._many(20, 64, folder=tmp_path, rounds=2)
    assert {name: len(seconds) for name, seconds in times.items()} == {
        "plain": 2,
        "safetensors": 2,
        "save": 2,
    }
    assert {path.name for path in tmp_path.iterdir()} == {"registry"}
    assert "of a plain write" in small._little(tmp_path, 1).detail


def test_the_parts_of_a_save_are_named_in_the_order_of_the_columns(tmp_path: Path) -> None:
    each, *parts = small._parts(20, 64, folder=tmp_path, rounds=2)
    assert each == "20 tensors of 64 bytes"
    assert len(parts) == 5
    assert list(tmp_path.iterdir()) == []


def test_a_process_saves_when_it_is_told_to(tmp_path: Path) -> None:
    with training._apart(tmp_path / "r") as save:
        save()()
        save()()
    assert [version.version for version in Registry(tmp_path / "r").versions("model")] == [2]


def test_pcodec_alone_turns_back_what_it_codes() -> None:
    old = torch.arange(1.0, 700_000.0)
    coding, decoding = compaction._by_pcodec(old * 1.001, old, 1)
    assert len(coding) == len(decoding) == 2


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace counts them")
def test_syncs_of_a_save_are_counted_without_those_of_the_registry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = {1: 30, 11: 100}
    monkeypatch.setattr(small, "_syncs_of", lambda root, saves: counts[saves])
    found = small._syncs(tmp_path)
    assert (found.value, found.detail) == (3.5, "7.0 syncs against 2 of a plain write")
    monkeypatch.undo()
    assert small._syncs_of(tmp_path / "1", 1) > 2


def test_every_coding_of_the_comparison_is_applied_to_every_kind() -> None:
    new = torch.arange(400_000, dtype=torch.float32)
    task = tasks.Task("ramp", torch.nn.Identity(), lambda network, number: new, settling=0)
    table = compaction._comparison(task, {"ramp": [new, new, new]}, Scale(quick=True))
    assert [row[0] for row in table.rows] == [coding.name for coding in compaction.CODINGS]
    shares = {row[0]: float(row[1].rstrip("%")) for row in table.rows}
    ours = [share for name, share in shares.items() if "ours" in name]
    assert len(ours) == 2
    assert max(ours) < 1 < shares["no anchor, zstd 1"]


def learning(seed: int = 0) -> tasks.Task:
    """A line that learns to be another one."""
    chance = torch.Generator().manual_seed(seed)
    batches = [torch.randn(8, 3, generator=chance) for _ in range(5)]

    def loss(network: torch.nn.Module, number: int) -> torch.Tensor:
        given = batches[number % len(batches)]
        wrong: torch.Tensor = network(given) - given
        return wrong.square().mean()

    torch.manual_seed(seed)
    return tasks.Task("line", torch.nn.Linear(3, 3), loss, settling=6)


def test_a_series_settles_and_then_gives_a_checkpoint_every_few_steps() -> None:
    task = learning()
    before = {name: value.clone() for name, value in task.network.state_dict().items()}
    first, second = (
        {name: value.clone() for name, value in one["model"].items()}
        for one, _ in zip(tasks.fine_tuned(task, 1e-2), range(2), strict=False)
    )
    states = tasks.fine_tuned(task, 1e-2)
    steps = [one["optimizer"]["state"][0]["step"].item() for one, _ in zip(states, range(2), strict=False)]
    assert steps == [6, 9]
    assert torch.equal(task.network.state_dict()["weight"], before["weight"])
    assert not torch.equal(first["weight"], before["weight"])
    assert not torch.equal(first["weight"], second["weight"])


def test_each_network_of_a_series_is_trained_once_and_written_as_it_is_and_in_bfloat16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = [series._whole(1e-2, None), series._in_bfloat16(1e-2, None)]
    task = learning()
    monkeypatch.setattr(
        series, "_trainings", lambda scale: iter([(task, tasks.fine_tuned(task, 1e-2), both)] * 2)
    )
    kinds = []
    for name, _, files in series._written(tmp_path, Scale(), 3):
        weights = [torch.load(file)["model"]["weight"] for file in files]
        assert len({tuple(weight.flatten().tolist()) for weight in weights}) == 3
        kinds.append((name, weights[0].dtype))
    assert kinds == 2 * [
        ("line, AdamW 0.01, fp32", torch.float32),
        ("line, AdamW 0.01, bf16 parameters", torch.bfloat16),
    ]
    assert list(tmp_path.iterdir()) == []


def test_a_flatter_tree_has_no_more_levels_than_it_may() -> None:
    for levels in depth.DEPTHS:
        found = []
        for position in range(1, 21):
            deep = 0
            while position:
                position, deep = depth._on_the_way(levels, position, 0, ()), deep + 1
            found.append(deep)
        assert max(found) == levels
    for side in (-1, 1):
        for distance in range(1, 21):
            ours = choosing._on_the_way(side * distance, 0, range(-20, 21))
            assert depth._on_the_way(depth.TREE, side * distance, 0, ()) == ours


def test_what_is_measured_on_a_device_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "SMALL", 50)
    monkeypatch.setattr(gpu, "FEW", 5)
    section = gpu.on(torch.device("cpu"), tmp_path, width=16, layers=2, rounds=1)
    assert [result.goal for result in section.results] == [0.02, 1.05, 1.0, 1 / 12, 1.0]
    assert all(result.value > 0 for result in section.results)


def test_what_does_not_move_in_a_series_is_counted(tmp_path: Path) -> None:
    moments = {0: {"exp_avg": torch.tensor([0.0, 1.0]), "exp_avg_sq": torch.tensor([0.0, 0.0])}}
    old = {"model": {"w": torch.tensor([1.0, 2.0, 3.0, 4.0]), "n": torch.tensor(1)}}
    new = {"model": {"w": torch.tensor([1.0, 2.0, 3.0, 5.0]), "n": torch.tensor(2)}}
    torch.save(old, tmp_path / "old")
    torch.save(new | {"optimizer": {"state": moments}}, tmp_path / "new")
    still = series._still(tmp_path / "old", tmp_path / "new")
    assert still == (0.75, 0.75)
    assert (
        str(still) == "75% of the moments zero, 75% of the parameters unchanged since the checkpoint before"
    )
    assert series._still(tmp_path / "new", tmp_path / "old") == (None, 0.75)


def test_a_difference_says_what_of_it_does_not_move() -> None:
    old = torch.rand(50_000, generator=torch.Generator().manual_seed(0))
    new = old.clone()
    new[:12_500] += 1e-6
    found = compaction._left("x", {"parameters": [new, old, old]}, ["parameters"], goal=0.5)
    assert found.holds
    assert found.detail.endswith("times smaller; 0% of the elements zero, 75% unchanged")


def test_the_page_has_every_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    section = Section(
        [Result("save", 0.5, 0.6, "1 s", low=0.4, high=0.7), Result("load", 0.05, 0.01, "2 s")],
        [Curve("verify", "tensors", [(10, 0.1), (100, 1.0)])],
        [Table("a table", ["", "b|c"], [["d", "e"]])],
        ["coral is not exact"],
    )
    monkeypatch.setattr(program, "GROUPS", {"fake": ("A section", lambda folder, scale: section)})
    command = ["benchmarks", "--folder", str(tmp_path), "--write", str(tmp_path / "out"), "fake"]
    monkeypatch.setattr(sys, "argv", command)
    assert program.main() == 0
    assert "missed" in capsys.readouterr().out
    page = (tmp_path / "out/benchmarks.md").read_text()
    assert "| save | 0.50 | 0.40 to 0.70 | 0.60 | holds | 1 s |" in page
    assert "| load | 0.050 |  | 0.010 | missed | 2 s |" in page
    assert "|  | b\\|c |" in page
    assert "1 of 2 goals hold" in page
    assert "Coral is not exact" in page
    assert "`python -m benchmarks fake`" in page
    assert "<svg" in (tmp_path / "out/benchmarks-growth.svg").read_text()
    figures = json.loads((tmp_path / "out/benchmarks.json").read_text())
    assert figures["sections"]["fake"]["results"][1]["holds"] is False
    assert figures["sections"]["fake"]["curves"][0]["power"] == pytest.approx(1)
    assert set(report.machine()) == set(figures["machine"])
    monkeypatch.setattr(sys, "argv", [*command, "--strict", "--json"])
    assert program.main() == 1
    assert json.loads(capsys.readouterr().out)["command"] == "python -m benchmarks fake"


def test_each_run_is_a_process_and_named_groups_replace_their_sections_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        asked.append(command[3:])
        section = Section([Result("save", 0.5 + 0.06 * len(asked), 0.6, "1 s")])
        return subprocess.CompletedProcess(command, 0, json.dumps(report.document({command[3]: section}, "")))

    def once(folder: Path, scale: Scale) -> Section:
        return Section([Result("bytes", 0.1, None, "1 MB")])

    monkeypatch.setattr(program.subprocess, "run", run)
    monkeypatch.setattr(program, "GROUPS", {"fake": ("A section", once), "series": ("Bytes", once)})
    common = ["benchmarks", "--folder", str(tmp_path), "--write", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", [*common, "series"])
    assert program.main() == 0
    monkeypatch.setattr(sys, "argv", [*common, "--runs", "3", "fake"])
    assert program.main() == 0
    assert asked == [["fake", "--json", "--rounds", "3", "--folder", str(tmp_path)]] * 3
    page = (tmp_path / "out/benchmarks.md").read_text()
    assert (
        "| save | 0.62 |  | 0.56, 0.62, 0.68; it moves | 0.60 | missed, in 1 of 3 runs it holds | 1 s |"
        in page
    )
    assert "| bytes | 0.10 |" in page
    assert re.search(r"`python -m benchmarks series`, \d{4}-\d\d-\d\d, load \d+\.\d before", page)


def test_the_page_is_written_after_each_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fine(name: str) -> Section:
        return Section([Result(name, 0.1, None, "1 MB")])

    def measured(name: str, options: Any, *, in_process: bool) -> Section:
        if name == "third" and fails:
            raise OSError("the disk is full")
        return fine(name)

    names = ["first", "second", "third"]
    monkeypatch.setattr(program, "GROUPS", {name: (name, lambda *_: Section()) for name in names})
    monkeypatch.setattr(program, "_measured", measured)
    folder = tmp_path / "out"
    report.write(folder, {"old": fine("old"), "third": fine("before")}, {"old": "", "third": ""}, "")
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--write", str(folder)])
    fails = True
    with pytest.raises(OSError, match="full"):
        program.main()
    assert [section.results[0].what for section in report.read(folder).values()] == [
        "first",
        "second",
        "before",
    ]
    fails = False
    assert program.main() == 0
    assert [*report.read(folder)] == names


def test_the_readme_has_the_figures_of_the_page(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    sections = report.read(root / "docs")
    text = (root / "README.md").read_text()
    assert text.partition(summary.BEGIN)[2].partition(summary.END)[0] == summary.tables(sections)
    (save,) = (
        one
        for one in sections["resnet50"].results
        if one.what.endswith("all new") and "torch.save" in one.detail
    )
    sections["resnet50"].results[sections["resnet50"].results.index(save)] = replace(
        save, value=0.99, runs=[0.9, 0.99, 1.2]
    )
    readme = tmp_path / "README.md"
    readme.write_text(text)
    summary.write(readme, sections)
    assert (
        "| save, everything new, durable | `torch.save` + fsync | 0.99 (0.90 to 1.20) |" in readme.read_text()
    )
    assert readme.read_text().partition(summary.END)[2] == text.partition(summary.END)[2]


def test_the_table_of_exactness_goes_into_its_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert all((exactness.SCRIPTS / case.script).is_file() for case in exactness.CASES)
    monkeypatch.setattr(exactness, "verdict", lambda case, *more: "differs: batches" if more else "**exact**")
    case = exactness.Case("torch", "inside an epoch", "plain.py", "", 17)
    monkeypatch.setattr(exactness, "CASES", [case])
    page = tmp_path / "integrations.md"
    page.write_text(f"before\n\n{exactness.BEGIN}old\n{exactness.END}\nbehind\n")
    monkeypatch.setattr(
        sys, "argv", ["benchmarks", "exactness", "--folder", str(tmp_path), "--write", str(tmp_path)]
    )
    assert program.main() == 0
    row = f"| torch {torch.__version__.partition('+')[0]} | inside an epoch | differs: batches | **exact** |"
    assert page.read_text().split("\n")[2:6] == [
        exactness.BEGIN.strip(),
        "|  | killed | its own checkpoint | ours |",
        "| --- | --- | --- | --- |",
        row,
    ]
    assert page.read_text().endswith(f"{exactness.END}\nbehind\n")
    missing = exactness.Case("not-a-framework", "", "plain.py", "", 1)
    monkeypatch.setattr(exactness, "CASES", [case, missing])
    section = exactness.measure(tmp_path, Scale())
    with pytest.raises(ValueError, match="not-a-framework is not installed"):
        exactness.write(tmp_path, section)


def test_the_page_has_a_place_and_a_row_for_every_case() -> None:
    text = (Path(__file__).parents[1] / "docs" / exactness.PAGE).read_text()
    table = text.partition(exactness.BEGIN)[2].partition(exactness.END)[0]
    assert [line.split(" | ")[1] for line in table.splitlines()[2:]] == [
        case.name for case in exactness.CASES
    ]
