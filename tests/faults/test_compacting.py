"""SIGKILL at every durable step of a compaction: every version stays whole."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from support import Stepwise, check_whole, copy, in_child, kill_me, save

from registry import Registry
from registry.store import durable
from registry.upkeep.compaction import Compacted

SAVED = {f"net:v{number}": number for number in range(1, 6)}


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("golden") / "r"
    registry = Registry(root)
    for number in SAVED.values():
        save(registry, number)
    registry.catalog.close()
    return root


def compact_all(registry: Registry) -> Sequence[Compacted]:
    return registry.compact(similar=True, alone=True)


@pytest.mark.parametrize(("change", "packs"), [(Registry.compact, 4), (compact_all, 5), (Registry.expand, 5)])
def test_a_compaction_killed_at_any_of_our_steps(
    golden: Path, tmp_path: Path, change: Callable[[Registry], Sequence[Compacted]], packs: int
) -> None:
    if change == Registry.expand:
        golden = copy(golden, tmp_path / "compacted")
        registry = Registry(golden, create=False)
        compact_all(registry)
        registry.catalog.close()
    steps = 0
    for step in range(1_000):
        for moment in ("before", "half"):
            root = copy(golden, tmp_path / "r")

            def at(count: int, when: str, path: Path, step: int = step, moment: str = moment) -> None:
                if (count, when) == (step, moment):
                    kill_me()

            def run(at: Callable[[int, str, Path], None] = at, root: Path = root) -> None:
                durable.disk = Stepwise(at)
                registry = Registry(root, create=False)
                (done,) = change(registry)
                assert done.packs == packs
                registry.collect_garbage(grace=0)

            status = in_child(run)
            if status == 0:
                break
            assert status == -signal.SIGKILL
            steps += 1
            check_whole(root, SAVED, {})
            registry = Registry(root, create=False)
            # It can be done again.
            change(registry)
            check_whole(root, SAVED, {})
        else:
            continue
        if moment == "before":
            break
    assert steps > 10
