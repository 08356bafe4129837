"""Traces: what counts as a difference, where a training went on, and the cause that a difference is known by."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from registry.resuming.causes import CAUSES, cause_of
from registry.resuming.observing import digest_of
from registry.resuming.trace import Batch, Observation, Trace, first_difference, unseeded


def observed(step: int, *, batch: str = "", **seen: str) -> Observation:
    """The observation before a step of a training whose batches hold two samples each."""
    own = {f"{kind}/x": f"{kind}-{step}" for kind in ("parameter", "optimizer", "gradient", "random")}
    rows = tuple((batch or f"{2 * step} {2 * step + 1}").split())
    given = {f"{kind}/x": value for kind, value in seen.items()}
    return Observation(seen=own | given, batches=(Batch("+".join(rows), rows),), has_loader=True)


def traces(after: int = 3, count: int = 8, **first: str) -> tuple[Trace, Trace]:
    """A training in one go and one resumed after some steps, whose first observation has other values."""
    steps = [observed(step) for step in range(1, count + 1)]
    end = observed(count + 1)
    return Trace(steps, end), Trace([observed(after + 1, **first), *steps[after + 1 :]], end)


def named(expected: Trace, found: Trace, after: int = 3) -> str | None:
    """The cause of the first difference of two trainings; None if they are equal."""
    first = first_difference([expected], [found], after=after)
    if first is None:
        return None
    cause = cause_of(*first, expected, found, after=after)
    return next(key for key, one in CAUSES.items() if one is cause)


def test_equal_traces_have_no_difference() -> None:
    assert named(*traces()) is None


@pytest.mark.parametrize(
    ("values", "cause"),
    [
        ({"parameter": "other"}, "parameters"),
        ({"optimizer": "other"}, "optimizer"),
        ({"schedule": "other"}, "scheduler"),
        ({"random": "other"}, "random"),
        ({"buffer": "other"}, "buffer"),
        ({"gradient": "other"}, "generator"),
        ({"batch": "2 3", "random": "other"}, "loader"),
        ({"batch": "3 2"}, "loader"),
        ({"batch": "new 2"}, "generator"),
        ({"batch": "new 2", "random": "other"}, "random"),
    ],
)
def test_a_cause_is_known_by_what_differs_first_after_the_resume(values: dict[str, str], cause: str) -> None:
    assert named(*traces(**values)) == cause


def test_a_later_epoch_in_another_order_is_named() -> None:
    expected, found = traces()
    assert named(expected, Trace([*found.steps[:-1], observed(8, batch="2 3")], found.end)) == "order"


def test_fewer_and_more_steps_are_told() -> None:
    expected, found = traces()
    for steps in (found.steps[:-1], [*found.steps, observed(9)]):
        assert named(expected, Trace(steps, found.end)) == "position"


def test_the_batches_before_a_save_inside_a_window_need_not_come_again() -> None:
    """They differ only where their gradients are lost."""
    expected, found = traces()
    window = replace(expected.steps[3], batches=(Batch("early", ("early",)), *expected.steps[3].batches))
    whole = Trace([*expected.steps[:3], window, *expected.steps[4:]], expected.end)
    assert named(whole, found) is None
    lost = replace(found.steps[0], seen={**found.steps[0].seen, "gradient/x": "other"})
    assert named(whole, Trace([lost, *found.steps[1:]], found.end)) == "window"


def test_the_step_of_the_resume_is_known_by_the_parameters() -> None:
    expected, found = traces(after=3)
    assert expected.resumed_at(found.steps[0], limit=5) == 3
    assert expected.resumed_at(expected.steps[0], limit=5) == 0
    assert expected.resumed_at(observed(1, parameter="other"), limit=5) is None
    same = [replace(one, seen={**one.seen, "parameter/x": "still"}) for one in expected.steps[2:5]]
    still = Trace([*expected.steps[:2], *same, *expected.steps[5:]])
    assert still.resumed_at(same[1], limit=5) == 3


def test_a_generator_without_a_seed_and_without_effect_is_left_out() -> None:
    expected, _ = traces()
    again = Trace([replace(one, seen={**one.seen, "random/x": "other"}) for one in expected.steps])
    assert first_difference([expected], [again], until=4) is not None
    idle = unseeded([expected], [again])
    assert idle == {"random/x"}
    assert first_difference([expected.without(idle)], [again.without(idle)], until=4) is None


def test_a_line_that_was_cut_is_left_out(tmp_path: Path) -> None:
    line = json.dumps({"end": False, "loader": True, "seen": {"parameter/x": "1"}, "batches": []})
    (tmp_path / "trace").write_text(f"{line}\n{line[:20]}")
    assert Trace.read(tmp_path / "trace").steps == [Observation({"parameter/x": "1"}, has_loader=True)]
    assert Trace.read(tmp_path / "missing") == Trace()


CLOSURES = """
import io, json, torch
from registry.resuming.observing import Observer

file = io.StringIO()
Observer(file, 0).attach()
net = torch.nn.Linear(2, 1)
optimizer = torch.optim.LBFGS(net.parameters(), max_iter=3)

def closure():
    optimizer.zero_grad()
    loss = net(torch.ones(1, 2)).sum() ** 2
    loss.backward()
    return loss

optimizer.step(closure)
optimizer.step(closure=closure)
print(file.getvalue())
"""


def test_a_step_that_computes_its_gradients_itself_is_observed_behind_them() -> None:
    """Lightning gives each step a closure; LBFGS calls it several times."""
    done = subprocess.run([sys.executable, "-c", CLOSURES], capture_output=True, text=True, check=True)
    first, second = map(json.loads, done.stdout.splitlines()[:2])
    assert (len(first["batches"]), first["batches"][0]) == (1, second["batches"][-1])
    assert all(any(name.startswith("gradient/") for name in one["seen"]) for one in (first, second))


def test_digests_tell_values_apart_and_are_the_same_in_every_process() -> None:
    values = [
        torch.zeros(2),
        torch.zeros(2, dtype=torch.bfloat16),
        torch.zeros(1, 2),
        torch.zeros(0),
        torch.zeros(2, dtype=torch.complex64),
        torch.zeros(2).to_sparse(),
        {"a": torch.zeros(2)},
        [1, 1.0],
        [1, 2],
        None,
        object(),
    ]
    digests = list(map(digest_of, values))
    # A sparse tensor is compared by its values.
    assert digests[0] == digests[5]
    assert len(set(digests)) == len(digests) - 1
    assert digest_of(object()) == digest_of(object())
