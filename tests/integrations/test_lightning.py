"""Lightning: a training that is killed goes on bit for bit, with each kind of loader, and in two processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from killed import train

from registry import Registry

SCRIPT = "train_lightning.py"

INSIDE = ["--every", "7"]
CASES: dict[str, tuple[int, list[str]]] = {
    "plain, at an epoch's end": (15, []),
    "plain with workers, at an epoch's end": (15, ["--workers", "2"]),
    "plain, after an epoch's last batch": (20, ["--every", "10"]),
    "StatefulDataLoader": (17, [*INSIDE, "--loader", "stateful"]),
    "StatefulDataLoader, at an epoch's end": (15, ["--loader", "stateful"]),
    "ResumableLoader": (17, [*INSIDE, "--loader", "resumable"]),
    "ResumableLoader with workers": (17, [*INSIDE, "--loader", "resumable", "--workers", "2"]),
    "ResumableLoader, at an epoch's end": (15, ["--loader", "resumable"]),
    "both": (17, [*INSIDE, "--loader", "resumable-stateful"]),
    "two optimizers": (17, [*INSIDE, "--loader", "resumable", "--two"]),
    "OneCycleLR": (17, [*INSIDE, "--loader", "resumable", "--onecycle"]),
    "validation inside an epoch": (17, ["--loader", "resumable", "--validate", "0.5", "--top", "2"]),
}


@pytest.mark.parametrize("case", CASES)
def test_a_training_that_is_killed_goes_on_exactly(tmp_path: Path, case: str) -> None:
    """A training without checkpoints, one with ours, one that is killed, and that one resumed."""
    kill, words = CASES[case]
    root = tmp_path / "r"
    several = [
        [tmp_path / "silent", "--silent"],
        [tmp_path / "whole"],
        [root, "--kill", kill],
        [root, "--kill", kill, "--resume"],
    ]
    silent, whole, killed, resumed = train_all(several, words)
    assert (killed, whole, resumed) == ("END killed", silent, silent)
    registry = Registry(root / "registry")
    saved = registry.versions("net")
    assert len({version.step for version in saved}) == len(saved)
    assert registry.resolve("net@last").id == saved[0].id
    assert [info.state for info in registry.runs.find("net")] == ["finished", "running"]
    assert registry.verify().problems == ()


def train_all(several: list[list[Any]], words: list[str]) -> list[str]:
    line: list[object] = []
    for one in several:
        line += [*one, *words, "then"]
    return train(SCRIPT, *line[:-1], in_order=True).splitlines()


def test_the_harness_tells_what_differs(tmp_path: Path) -> None:
    """Lightning's own checkpoints are not exact, and neither is ours where nobody knows the position."""
    for words in ([], [*INSIDE, "--loader", "stateful"], [*INSIDE, "--loader", "resumable"]):
        root = tmp_path / "-".join(words)
        whole, _, theirs = train_all(
            [
                [root / "whole", "--native"],
                [root / "r", "--native", "--kill", 17],
                [root / "r", "--native", "--kill", 17, "--resume"],
            ],
            words,
        )
        assert theirs != whole
    root = tmp_path / "plain"
    whole, _, ours = train_all(
        [[root / "whole"], [root / "r", "--kill", 17], [root / "r", "--kill", 17, "--resume"]], INSIDE
    )
    assert ours != whole


def test_two_processes_go_on_each_with_its_own_random_numbers(tmp_path: Path) -> None:
    words = ["--every", "3", "--loader", "resumable", "--count", 2]
    whole = train(SCRIPT, tmp_path / "whole", *words, count=2)
    assert len(whole.splitlines()) == 2
    train(SCRIPT, tmp_path / "r", "--kill", 8, *words, count=2, killed=True)
    assert train(SCRIPT, tmp_path / "r", "--kill", 8, "--resume", *words, count=2) == whole
    registry = Registry(tmp_path / "r" / "registry")
    assert [version.step for version in registry.versions("net")] == [15, 12, 9, 6, 3]
    assert registry["net"].provenance["processes"] == 2
