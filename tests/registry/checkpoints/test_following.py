"""Following a reference: each new version into a live network, as the difference, whole or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from registry import Registry
from registry.store.errors import Incompatible, Invalid


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(20, 30), nn.BatchNorm1d(30), nn.Linear(30, 2))


def same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def test_each_version_of_an_alias_comes_once(registry: Registry) -> None:
    source, live = network(), network()
    registry.save("net", {"model": source.state_dict()})
    registry.save("net", {"model": network().state_dict()})
    registry.set_alias("net:v1", "production")
    following = registry.follow("net@production", into=live, every=0.01)
    assert next(following).name == "net:v1"
    assert same(live, source)
    threading.Timer(0.2, lambda: registry.set_alias("net:v2", "production")).start()
    assert next(following).name == "net:v2"
    assert not same(live, source)
    live.load_state_dict(source.state_dict())


def test_only_what_differs_is_read(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    source, live = network(), network()
    registry.save("net", {"model": source.state_dict()})
    following = registry.follow("net@latest", into=live, every=0.01)
    next(following)
    with torch.no_grad():
        source[2].weight.add_(1)
    registry.save("net", {"model": source.state_dict()})
    read: list[set[str]] = []
    load_into = registry.store.load_into

    def told(digest: str, targets: dict[str, dict[str, torch.Tensor]], **options: object) -> None:
        read.append(set(targets["model"]))
        load_into(digest, targets, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(registry.store, "load_into", told)
    next(following)
    assert read == [{"2.weight"}]
    assert same(live, source)


def test_it_waits_for_the_first_version_and_says_so_once(
    registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    following = registry.follow("net@latest", every=0.01)
    threading.Timer(0.2, lambda: registry.save("net", {"model": {"w": torch.ones(2)}})).start()
    assert next(following).name == "net:v1"
    assert caplog.text.count("there is no model 'net'; waiting until there is one") == 1


def test_a_damaged_version_leaves_the_network_as_it_was_until_it_is_whole(
    registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    source, live = network(), network()
    registry.save("net", {"model": source.state_dict()})
    following = registry.follow("net@latest", into=live, every=0.01)
    next(following)
    before = set(registry.root.glob("packs/*/*"))
    other = network()
    registry.save("net", {"model": other.state_dict()})
    (path,) = set(registry.root.glob("packs/*/*")) - before
    data = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))

    def mend() -> None:
        assert same(live, source)
        with open(path, "r+b") as file:  # the file is never shorter
            file.seek(-1, os.SEEK_END)
            file.write(data[-1:])

    threading.Timer(0.3, mend).start()
    assert next(following).name == "net:v2"
    assert same(live, other)
    assert caplog.text.count("the version before stays") == 1


def test_a_version_that_does_not_fit_is_an_error_and_changes_nothing(registry: Registry) -> None:
    source, live = network(), network()
    registry.save("net", {"model": source.state_dict()})
    following = registry.follow("net@latest", into=live, every=0.01)
    next(following)
    registry.save("net", {"model": nn.Sequential(nn.Linear(20, 31)).state_dict()})
    with pytest.raises(Incompatible):
        next(following)
    assert same(live, source)


def test_a_malformed_reference_is_an_error(registry: Registry) -> None:
    with pytest.raises(Invalid):
        next(registry.follow("net@@", every=0.01))


def test_versions_that_are_removed_and_collected_meanwhile_do_not_end_it(registry: Registry) -> None:
    live = network()
    registry.save("net", {"model": network().state_dict()})
    following = registry.follow("net@latest", into=live, every=0.001)
    next(following)
    last = network()

    def churn() -> None:
        other = Registry(registry.root)
        for _ in range(20):
            number = other.save("net", {"model": network().state_dict()}).version
            other.remove([f"net:v{number - 1}"])
            other.collect_garbage(grace=0)
        other.save("net", {"model": last.state_dict()}, epoch=99)

    thread = threading.Thread(target=churn)
    thread.start()
    while next(following).epoch != 99:
        pass
    thread.join()
    assert same(live, last)


def test_a_command_runs_for_each_version(registry: Registry, tmp_path: Path) -> None:
    registry.save("net", {"model": {"w": torch.ones(2)}})
    program = "import os, sys; print(sys.argv[1], os.environ['REGISTRY_CHECKPOINT_ID'][:4]); sys.exit(7)"
    words = [sys.executable, "-m", "registry.cli", "--root", str(registry.root), "follow", "net@latest"]
    command = f'"{sys.executable}" -c "{program}" {{}}'
    done = subprocess.run([*words, "--exec", command], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 7
    assert done.stdout.splitlines() == ["net:v1", f"net:v1 {registry['net'].id[:4]}"]
    done = subprocess.run([*words, "--once", "--json"], capture_output=True, text=True)
    assert '"name": "net:v1"' in done.stdout
    done = subprocess.run([*words, "--exec", "/nothing/here"], capture_output=True, text=True)
    assert done.returncode == 1
    assert (
        done.stderr
        == "error: /nothing/here: No such file or directory\nhint:  give a command that can be run\n"
    )
