"""Saves that go on behind the training: what they hold, how many are in flight, and how their errors surface."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from small_network import copied, equal, made, step

from registry import Registry
from registry.catalog.versions import list_versions
from registry.store import durable
from registry.store.errors import StorageError, Unsupported


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


def test_the_same_tensors_are_copied_anew_at_each_save_and_others_of_their_kind_as_well(
    registry: Registry,
) -> None:
    """Also where memory is used again, changes hands among tensors, or is another than at the save before."""
    live = [torch.zeros(2_000) for _ in range(4)]
    order = [
        live,
        live,
        live[::-1],
        [live[0].clone(), *live[1:]],
        [live[0].view(torch.int32), *live[1:]],
        live,
    ]
    expected = []
    with registry.run("net") as run:
        for number, tensors in enumerate(order):
            for i, tensor in enumerate(tensors):
                tensor.fill_(10 * number + i)
            expected.append([tensor.clone() for tensor in tensors])
            run.save(states={"model": {str(i): tensor for i, tensor in enumerate(tensors)}}, wait=False)
            for tensor in tensors:
                tensor.fill_(-1)
    for number, tensors in enumerate(expected, 1):
        found = registry[f"net:v{number}"].state_dict()
        assert [*found] == [str(i) for i in range(4)]
        assert all(
            one.dtype == other.dtype and torch.equal(one, other)
            for one, other in zip(found.values(), tensors, strict=True)
        )


def test_values_of_the_program_may_change_at_once(registry: Registry) -> None:
    import numpy as np

    array, numbers, deep = np.arange(4.0), [1, 2], {"a": {"b": [torch.ones(2)]}}
    tree = {"array": array, "numbers": numbers, "deep": deep, "tensor": torch.ones(2)}
    with registry.run("net") as run:
        for _ in range(2):
            run.save(states={"model": tree}, wait=False)
            array += 1
            numbers.append(3)
            deep["a"]["b"][0].add_(1)
            deep["a"]["b"].append(torch.zeros(1))
            del tree["tensor"]
            tree["tensor"] = torch.ones(2)
    for number in range(2):
        found = registry[f"net:v{number + 1}"].state_dict()
        assert np.array_equal(found["array"], np.arange(4.0) + number)
        assert found["numbers"] == [1, 2] + number * [3]
        assert torch.equal(found["deep"]["a"]["b"][0], torch.ones(2) + number)
        assert len(found["deep"]["a"]["b"]) == 1 + number


def test_what_cannot_be_stored_is_refused_at_the_call_and_the_next_save_is_whole(registry: Registry) -> None:
    tensors = {f"{i}": torch.full((8,), float(i)) for i in range(3)}
    with registry.run("net") as run:
        run.save(states={"model": tensors}, wait=False)
        with pytest.raises(Unsupported, match="model/odd"):
            run.save(states={"model": tensors | {"odd": object()}}, wait=False)
        tensors["0"].fill_(5)
        run.save(states={"model": tensors}, wait=False)
    assert torch.equal(registry["net:v2"].state_dict()["0"], torch.full((8,), 5.0))
    assert torch.equal(registry["net:v1"].state_dict()["0"], torch.zeros(8))


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


def test_a_save_in_inference_mode_leaves_the_next_ones_alone(registry: Registry) -> None:
    with registry.run("net") as run:
        for number in range(1, 5):
            weight = torch.full((1_000,), float(number))
            with torch.inference_mode(number % 2 == 1):
                run.save(states={"model": {"w": weight, "of this mode": weight.clone()}}, wait=False)
    for number in range(1, 5):
        expected = torch.full((1_000,), float(number))
        assert torch.equal(registry[f"net:v{number}"].load()["model"]["w"], expected)


def test_the_default_device_and_mapped_files_do_not_matter(registry: Registry, tmp_path: Path) -> None:
    import mmap

    file = tmp_path / "file"
    file.write_bytes(b"a" * 100_000)
    with file.open("r+b") as opened, mmap.mmap(opened.fileno(), 0) as mapped, registry.run("net") as run:
        state = {"w": torch.ones(3), "empty": torch.empty(0), "mapped": mapped}
        torch.set_default_device("meta")
        try:
            run.save(states={"model": state}, wait=False)
            mapped[:] = b"b" * 100_000
            found = run.wait()
            assert found is not None
            loaded = found.load()["model"]
        finally:
            torch.set_default_device(None)
    assert torch.equal(loaded["w"], torch.ones(3))
    assert loaded["empty"].is_cpu
    assert loaded["mapped"] == b"a" * 100_000
