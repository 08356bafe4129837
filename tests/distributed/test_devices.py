"""Devices: what is there is used, what is not there is said.

This machine may have no accelerator. Where several are needed, torch is told that there are some (which is a mock)
and only the choice is looked at; tests marked `gpu` run on a real one.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from registry import Registry, RegistryReader, RegistryWriter, get_devices, parallelize
from registry.store.errors import Invalid, NotFound, RegistryError

CPU = [torch.device("cpu")]


@pytest.fixture
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


def cuda(*places: int) -> list[torch.device]:
    return [torch.device("cuda", place) for place in places]


@pytest.mark.usefixtures("four_gpus")
@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (None, cuda(0, 1, 2, 3)),
        (2, cuda(0, 1)),
        ("2", cuda(0, 1)),
        (9, cuda(0, 1, 2, 3)),
        ([0, 3], cuda(0, 3)),
        ((3, 0), cuda(3, 0)),
        ("0,3", cuda(0, 3)),
        ("cpu", CPU),
        ("cuda", cuda(0)),
        ("cuda:1", cuda(1)),
        (torch.device("cuda:2"), cuda(2)),
    ],
)
def test_what_is_there_is_given(wanted: object, expected: list[torch.device]) -> None:
    assert get_devices(wanted) == expected  # type: ignore[arg-type]


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("wanted", [None, 1, 2, "2", "cpu"])
def test_without_an_accelerator_it_is_the_cpu(wanted: object) -> None:
    assert get_devices(wanted) == CPU  # type: ignore[arg-type]


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("wanted", ["mps", "cuda", "cuda:1", [0], [0, 3], "nonsense", "cpu:7"])
def test_what_is_named_must_be_there(wanted: object) -> None:
    with pytest.raises(NotFound, match=r"^there is no device '.*'; there is cpu$"):
        get_devices(wanted)  # type: ignore[arg-type]


@pytest.mark.usefixtures("four_gpus")
def test_an_index_behind_the_last_is_refused_with_what_there_is() -> None:
    with pytest.raises(NotFound, match="no device 'cuda:4'; there is cpu, cuda:0, cuda:1, cuda:2, cuda:3"):
        get_devices([0, 4])


@pytest.mark.parametrize("wanted", [0, -1, True, [], [0, 0], [-1], ["cuda:0"], 1.5, ""])
def test_what_cannot_be_read_is_refused(wanted: object) -> None:
    with pytest.raises(RegistryError) as caught:
        get_devices(wanted)  # type: ignore[arg-type]
    assert isinstance(caught.value, Invalid if wanted != "" else NotFound)


@pytest.mark.usefixtures("no_gpu")
def test_what_was_chosen_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        get_devices(2)
    assert caplog.messages == ["2 devices were asked for, there are none but cpu", "training on cpu"]


@pytest.mark.usefixtures("four_gpus")
def test_each_process_gets_the_device_of_its_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert get_devices() == cuda(2)
    assert get_devices("cpu") == CPU
    assert get_devices([1, 3, 0]) == cuda(0)
    with pytest.raises(
        NotFound, match=r"process 2 of this machine has no device.*cuda:0, cuda:1 for 4.*per-node=2"
    ):
        get_devices(2)


def test_one_device_leaves_the_network_as_it_is() -> None:
    net = nn.Linear(2, 1)
    assert parallelize(net, CPU) is net


def test_several_devices_give_data_parallel_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made: list[object] = []
    monkeypatch.setattr(nn.Module, "to", lambda self, device: self)
    monkeypatch.setattr("registry.live.devices.DataParallel", lambda net, device_ids: made.append(device_ids))
    parallelize(nn.Linear(2, 1), cuda(0, 3))
    assert made == [cuda(0, 3)]
    assert "a batch must not be smaller than 2 samples" in caplog.text


@pytest.mark.gpu
def test_a_network_on_a_real_device_learns() -> None:
    devices = get_devices()
    assert devices[0].type == "cuda"
    net = parallelize(nn.Linear(2, 1), devices)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net(torch.ones(8, 2, device=devices[0])).mean().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


@pytest.mark.gpu
@pytest.mark.parametrize("wait", [True, False])
def test_training_on_a_real_device_resumes_exactly(tmp_path: Path, wait: bool) -> None:
    device = get_devices()[0]
    registry = Registry(tmp_path)

    def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        net = parallelize(nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1)), [device])
        return net, torch.optim.AdamW(net.parameters(), 0.1)

    def step(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        net(torch.randn(16, 4, device=device)).square().mean().backward()  # and dropout, on the device
        optimizer.step()

    net, optimizer = fresh()
    with registry.run("net") as run:
        step(net, optimizer)
        run.save(model=net, optimizer=optimizer, wait=wait)
        step(net, optimizer)
    other, its_optimizer = fresh()
    registry["net"].restore(model=other, optimizer=its_optimizer)
    step(other, its_optimizer)
    for ours, theirs in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.gpu
def test_a_save_that_does_not_wait_holds_the_values_of_its_moment_and_leaves_the_device_at_work(
    tmp_path: Path,
) -> None:
    weights = [torch.zeros(1 << 26, device="cuda") for _ in range(4)]
    parts = {"w": weights, "transposed": torch.rand(500, 700, device="cuda").T, "on the host": torch.ones(3)}
    expected = parts["transposed"].cpu()  # type: ignore[attr-defined]
    with Registry(tmp_path).run("net") as run:
        for number in range(1, 4):
            torch.cuda._sleep(1_000_000_000)  # half a second, behind which all that follows waits
            for weight in weights:
                weight.fill_(number)
            before = torch.cuda.Event()
            before.record()
            run.save(states={"model": parts}, wait=False)
            is_at_work = not before.query()
            for weight in weights:
                weight.fill_(-1)
            # The first one asks for pinned memory, which waits for the device.
            assert is_at_work or number == 1
    for number in range(1, 4):
        found = Registry(tmp_path)[f"net:v{number}"].load()["model"]
        assert all(bool((weight == number).all()) for weight in found["w"])
        assert torch.equal(found["transposed"], expected)


@pytest.mark.gpu
def test_a_sharded_checkpoint_of_a_real_device(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    state = {"model": {"w": torch.randn(100, 10, device="cuda")}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, storage_writer=RegistryWriter(registry, "net"))
        target = {"model": {"w": torch.zeros(100, 10, device="cuda")}}
        dcp.load(target, storage_reader=RegistryReader(registry, "net"))
    assert torch.equal(target["model"]["w"], state["model"]["w"])
