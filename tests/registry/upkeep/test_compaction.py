"""Compaction: every bit comes back, the usual load stays plain, and nothing that others need goes."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from registry import Registry
from registry.store import classes, differences, durable, header, planes
from registry.store.errors import Corrupt, NotFound, StorageError
from registry.store.folder_index import PackFolder
from registry.store.loading import Mapped
from registry.store.pack import PackWriter, pack_path, read_pack_info
from registry.store.store import Store, Written
from registry.upkeep import choosing, repacking, verification
from registry.upkeep.choosing import REACH

VERSIONS = 20
GENERATOR = torch.Generator().manual_seed(0)
State = dict[str, dict[str, torch.Tensor]]


def states(count: int = VERSIONS) -> Iterator[State]:
    """A training: weights that move a little, moments, a half of them in bf16, and what never changes."""
    torch.manual_seed(0)
    weights = {f"layer{i}.weight": torch.randn(64, 64) * 0.02 for i in range(4)}
    frozen = torch.randn(5_000)
    for step in range(count):
        weights = {name: value + 1e-5 * torch.randn_like(value) for name, value in weights.items()}
        rest = {
            "steps": torch.tensor(step),
            "half": weights["layer0.weight"].bfloat16(),
            "double": weights["layer1.weight"].double(),
            "frozen": frozen,
            "grows": torch.full((1_500 + step,), float(step)),
            "mask": torch.ones(5_000, dtype=torch.bool),
        }
        yield {"model": weights | rest, "extra": {"note": torch.ones(3) * step}}


def saved(root: Path, count: int = VERSIONS) -> tuple[Registry, list[State]]:
    registry, all_of_them = Registry(root), list(states(count))
    for state in all_of_them:
        registry.save("net", state)
    return registry, all_of_them


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def coded(registry: Registry, reference: str) -> set[str]:
    """Paths of a version that are stored as differences."""
    named = {path: digest for path, _, _, digest in registry[reference].parameters()}
    located = registry.catalog.locate(named.values())
    return {path for path, digest in named.items() if located[digest].base}


def flip(pack: Path, place: int) -> None:
    """Change a byte."""
    data = bytearray(pack.read_bytes())
    data[place] ^= 1
    pack.chmod(0o644)
    pack.write_bytes(data)


def check(registry: Registry, expected: list[State]) -> None:
    for number, state in enumerate(expected, 1):
        checkpoint = registry[f"net:v{number}"]
        assert same(checkpoint.load(), state)
        assert same(checkpoint.load(copy=True), state)
        assert same(checkpoint.load(verify=False), state)
        into = {name: torch.zeros_like(value) for name, value in state["model"].items()}
        checkpoint.load_into(model=into)
        assert same(into, state["model"])
    assert registry.verify().problems == ()


def test_every_bit_comes_back_and_less_is_stored(tmp_path: Path) -> None:
    registry, expected = saved(tmp_path)
    registry.set_alias("net:v5", "production")
    before = registry.status().stored
    (planned,) = registry.compact(dry_run=True)
    assert planned.after is None
    assert registry.status().stored == before
    seen: list[tuple[int, int, int]] = []
    (done,) = registry.compact(["net"], progress=lambda *given: seen.append(given))
    assert (done.versions, done.packs, done.before) == (planned.versions, planned.packs, planned.before)
    assert done.after is not None
    assert done.after < 0.65 * done.before
    assert seen[-1] == (done.before, done.before, done.before - done.after)
    plain = [number for number in range(1, VERSIONS + 1) if not coded(registry, f"net:v{number}")]
    assert plain == [5, 20]  # the alias and the newest, which are anchors too
    assert coded(registry, "net:v2") == {
        *(f"model/layer{i}.weight" for i in range(4)),
        *("model/half", "model/double"),
    }
    check(registry, expected)
    collected = registry.collect_garbage(grace=0)
    assert collected.bytes == done.before
    assert registry.status().stored == before - done.before + done.after
    check(Registry(tmp_path), expected)


def test_one_version_in_many_stays_plain(tmp_path: Path) -> None:
    def plain(registry: Registry, count: int) -> list[int]:
        return [number for number in range(1, count + 1) if not coded(registry, f"net:v{number}")]

    count = 2 * (2 * REACH + 1)
    at_once, every_time = Registry(tmp_path / "a"), Registry(tmp_path / "b")
    expected = [{"model": {"w": torch.randn(1_500, generator=GENERATOR) * 1e-5 + 1}} for _ in range(count)]
    for number, state in enumerate(expected, 1):
        at_once.save("net", state)
        every_time.save("net", state)
        every_time.compact()
        assert len(plain(every_time, number)) <= 2 + number // REACH
    at_once.compact()
    assert plain(at_once, count) == [1, count - 2 * REACH - 1, count]
    for registry in (at_once, every_time):
        check(registry, expected)


def test_what_is_compact_stays_so_and_later_versions_follow(tmp_path: Path) -> None:
    registry, expected = saved(tmp_path, 10)
    registry.compact()
    first = {n: coded(registry, f"net:v{n}") for n in range(1, 11)}
    assert all(one.packs == 0 for one in registry.compact())
    more = list(states(24))[10:]
    for state in more:
        registry.save("net", state)
    registry.compact()
    assert {n: coded(registry, f"net:v{n}") for n in range(1, 9)} == {n: first[n] for n in range(1, 9)}
    assert coded(registry, "net:v12")
    assert not coded(registry, "net:v24")
    registry.collect_garbage(grace=0)
    check(registry, expected + more)


def test_a_difference_that_is_saved_again_costs_nothing(tmp_path: Path) -> None:
    registry, expected = saved(tmp_path, 5)
    registry.compact()
    registry.collect_garbage(grace=0)
    packs = set(registry.store.pack_digests())
    registry.save("copy", expected[2])
    assert set(registry.store.pack_digests()) == packs
    registry.remove([f"net:v{n}" for n in range(1, 6)])
    registry.collect_garbage(grace=0)
    assert same(registry["copy"].load(), expected[2])  # with what it is a difference from
    assert registry.verify().problems == ()


def test_an_anchor_may_be_removed_or_thinned(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    expected = list(states(6))
    for state in expected:
        moments = {name: value * 2 for name, value in state["model"].items() if name.startswith("layer")}
        optimizer = {"state": moments, "param_groups": [{"lr": 0.1}]}
        registry.save("net", {**state, "optimizer": optimizer})
    registry.compact()
    registry.collect_garbage(grace=0)
    registry.thin("net:v6")
    registry.thin("net:v3")
    registry.collect_garbage(grace=0)
    assert coded(registry, "net:v3")
    registry.remove(["net:v6"])
    registry.collect_garbage(grace=0)
    registry.thin("net:v4")  # which looks at the pack of what it is a difference from
    registry.collect_garbage(grace=0)
    for number, state in enumerate(expected[:5], 1):
        assert same(registry[f"net:v{number}"].load(["model", "extra"]), state)
    assert registry["net:v2"].load("optimizer")["optimizer"]["param_groups"] == [{"lr": 0.1}]
    assert registry.verify().problems == ()


@pytest.mark.parametrize("collected", [True, False])
def test_a_catalog_is_rebuilt_and_a_store_needs_none(tmp_path: Path, collected: bool) -> None:
    registry, expected = saved(tmp_path, 12)
    registry.compact()
    if collected:
        registry.collect_garbage(grace=0)
    ids = [registry[f"net:v{n}"].id for n in range(1, 13)]
    alone = Store(tmp_path)
    assert all(same(alone.get(id), state) for id, state in zip(ids, expected, strict=True))
    registry.catalog.close()
    (tmp_path / "catalog.sqlite").unlink()
    again = Registry(tmp_path, create=False)
    again.rebuild()
    found = [coded(again, f"net:v{n}") != set() for n in range(2, 12)]
    assert found == [True] * 10  # What was replaced does not come back.
    check(again, expected)
    again.collect_garbage(grace=0)
    check(again, expected)


def damage(registry: Registry, digest: str, offset: int = 0) -> None:
    place = registry.catalog.locate([digest])[digest]
    path = registry.store.pack_path(place.pack)
    data = bytearray(path.read_bytes())
    data[place.start + offset] ^= 255
    path.chmod(0o644)
    path.write_bytes(data)


@pytest.mark.parametrize("where", ["difference", "table", "base"])
def test_damage_is_found_named_and_healed(tmp_path: Path, where: str) -> None:
    registry, expected = saved(tmp_path, 4)
    registry.compact()
    registry.collect_garbage(grace=0)
    version = "net:v4" if where == "base" else "net:v3"
    named = {path: digest for path, _, _, digest in registry[version].parameters()}
    damage(registry, named["model/layer2.weight"], 200 if where == "difference" else 9)
    with pytest.raises(Corrupt, match=r"net:v3: model/layer2\.weight: the bytes .* are not what was saved"):
        registry["net:v3"].load()
    into = {name: torch.zeros_like(value) for name, value in expected[2]["model"].items()}
    with pytest.raises(Corrupt):
        registry["net:v3"].load_into(model=into)
    assert not any(value.any() for value in into.values())
    problems = registry.verify().problems
    assert any("net:v3" in problem.checkpoints for problem in problems)
    again = Registry(tmp_path)
    with pytest.raises(Corrupt):
        again[version].load()
    again.save("net", expected[3])
    again.save("net", expected[2])  # what was found damaged is written again
    assert same(again["net:v3"].load(), expected[2])


def test_a_version_that_comes_meanwhile_is_not_harmed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry, expected = saved(tmp_path, 4)
    real = Store.copy_to_new_pack
    calls = []

    def interrupted(self: Store, digests: Any, bases: Any = None, **how: Any) -> Any:
        new = real(self, digests, bases, **how)
        if not calls:
            Registry(tmp_path).save("other", expected[1])  # relies on the pack that is being rewritten
        calls.append(1)
        return new

    monkeypatch.setattr(Store, "copy_to_new_pack", interrupted)
    registry.compact(["net"])
    assert len(calls) == 3
    check(registry, expected)
    assert same(registry["other"].load(), expected[1])
    registry.collect_garbage(grace=0)
    check(registry, expected)
    assert same(registry["other"].load(), expected[1])


def test_a_difference_from_itself_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    tensor = torch.arange(4_000.0)
    stored = store.put({"model": {"w": tensor}})
    (digest,) = {info.digest for info in stored.manifest.tensors}
    assert stored.pack is not None
    store.pack_path(stored.pack.digest).unlink()
    writer = PackWriter(store.tmp, [("float32", (4_000,))], coded=[("float32", (4_000,))])
    writer.add_coded(digest, "float32", (4_000,), digest, memoryview(bytes(8)))
    writer.finish(store.packs)
    with pytest.raises(Corrupt, match="which it is a difference from"):
        Store(tmp_path).get(stored.digest)
    again = Store(tmp_path)
    assert again.put({"model": {"w": tensor}}).pack is not None  # it does not count as stored
    assert torch.equal(again.get(stored.digest)["model"]["w"], tensor)


def test_a_full_disk_leaves_all_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry, expected = saved(tmp_path, 4)
    packs = set(registry.store.pack_digests())

    def full(fd: int, path: Path, data: memoryview) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(durable.disk, "write", full)
        with pytest.raises(StorageError, match="no space left"):
            registry.compact()
    assert set(registry.store.pack_digests()) == packs
    assert not list((tmp_path / "tmp").iterdir())
    check(registry, expected)
    assert registry.compact()[0].packs == 3


def test_what_a_difference_needs_stays_though_nothing_else_needs_it(tmp_path: Path) -> None:
    registry, expected = Registry(tmp_path), []
    for state in states(4):
        weights = {name: value for name, value in state["model"].items() if name.startswith("layer")}
        expected.append({"model": weights})  # the versions have nothing in common
        registry.save("net", expected[-1])
    registry.compact()
    registry.remove(["net:v4"])
    registry.collect_garbage(grace=0)
    registry.collect_garbage(grace=0)
    for number in (1, 2, 3):
        assert same(registry[f"net:v{number}"].load(), expected[number - 1])


def test_what_comes_to_be_needed_meanwhile_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry, moments = Registry(tmp_path), []
    for state in states(4):
        moments.append({"m": torch.randn(20_000)})
        optimizer = {"state": moments[-1], "param_groups": []}
        registry.save("net", {**state, "optimizer": optimizer})
    monkeypatch.setattr("registry.upkeep.repacking._WASTE", 1.0)
    registry.thin("net:v2")  # nobody needs its moments now, but they are still there
    of_v2 = {path: digest for path, _, _, digest in registry["net:v2"].parameters()}
    real = Store.copy_to_new_pack

    def interrupted(self: Store, digests: Any, bases: Any = None, **how: Any) -> Any:
        new = real(self, digests, bases, **how)
        if of_v2["model/layer0.weight"] in digests:
            Registry(tmp_path).save("other", {"optimizer": moments[1]})
        return new

    monkeypatch.setattr(Store, "copy_to_new_pack", interrupted)
    registry.compact(["net"])
    for _ in range(2):
        registry.collect_garbage(grace=0)
    assert same(registry["other"].load()["optimizer"], moments[1])
    assert registry.verify().problems == ()


def test_what_others_are_differences_from_stays_plain(tmp_path: Path) -> None:
    registry, expected = saved(tmp_path, 4)
    registry.compact()
    far = list(states(6))
    for state in (far[5], expected[3], far[4]):  # the anchor of one model is in the middle of another
        registry.save("other", state)
    registry.compact(["other"])
    registry.collect_garbage(grace=0)
    check(registry, expected)
    for number, state in enumerate((far[5], expected[3], far[4]), 1):
        assert same(registry[f"other:v{number}"].load(), state)


def test_shards_become_differences_too(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    wholes = [state["model"]["layer0.weight"] for state in states(4)]
    for whole in wholes:
        encoded = registry.store.encode({"x": [whole[:24], whole[24:]]})
        pack = registry.store.add(encoded)
        assert pack is not None
        slots = [node["$tensor"] for node in encoded.components["x"]]
        tree = {"w": {"$shards": [[[0, 0], slots[0]], [[24, 0], slots[1]]], "shape": [64, 64]}}
        registry.save("net", Written({"model": tree}, encoded.tensors(), [pack]))
    (done,) = registry.compact()
    assert done.versions == 3
    for number, whole in enumerate(wholes, 1):
        assert torch.equal(registry[f"net:v{number}"].state_dict()["w"], whole)


def test_a_run_compacts_when_it_has_finished_and_only_if_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(root: Path, compact: bool = True) -> Registry:
        registry, model = Registry(root), torch.nn.Linear(100, 50)
        with registry.run("net", compact=compact) as run:
            for number in range(1, 5):
                with torch.no_grad():
                    model.weight += 1e-5 * torch.randn_like(model.weight)
                run.save(model=model)
                assert not coded(registry, f"net:v{number}")
        return registry

    plain, small = train(tmp_path / "plain", compact=False), train(tmp_path / "small")
    assert not coded(plain, "net:v1")
    assert coded(small, "net:v1")
    assert "compacted 3 versions" in (tmp_path / "small/runs/net/run-1/run.log").read_text()
    with small.run("other", compact=True) as run, pytest.raises(KeyboardInterrupt):
        raise KeyboardInterrupt
    assert run.name == "other/run-1"

    def failing(*_: Any, **__: Any) -> None:
        raise StorageError("no space left on the disk")

    monkeypatch.setattr("registry.runs.run.compact", failing)
    failed = train(tmp_path / "failed")  # nothing is raised: the versions are there
    assert failed.runs["net/run-1"].state == "finished"
    assert "net was not compacted: no space left" in (tmp_path / "failed/runs/net/run-1/run.log").read_text()


MEMORY = """
import sys, threading, time
from pathlib import Path
import torch
from registry import Registry

def anonymous():
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))

def filled(root, tensors, size):
    registry = Registry(root)
    for number in range(3):
        registry.save("net", {"model": {f"w{i}": torch.full((size,), 1 + 1e-5 * number + i) for i in range(tensors)}})
    return registry

filled(Path(sys.argv[1]) / "small", 2, 100_000).compact()  # loads what it needs
registry = filled(Path(sys.argv[1]) / "large", 12, 2_000_000)
peak, done = 0, False

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.001)

before = anonymous()
watcher = threading.Thread(target=watch)
watcher.start()
(found,) = registry.compact()
done = True
watcher.join()
print(found.before, peak - before)
"""


def test_memory_is_bounded_by_the_largest_tensor(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, check=True
    )
    rewritten, taken = map(int, done.stdout.split())
    largest = 8_000_000
    assert rewritten > 20 * largest
    assert taken < 4 * largest


def test_where_the_index_has_room_for_some_differences_only_the_largest_become_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for a network with 100,000 tensors."""
    registry = Registry(tmp_path / "r")
    sizes = [1_100 + i for i in range(200)]
    saved = {}
    for number in range(4):
        model = {f"w{i}": torch.arange(float(size)) + 1e-4 * number for i, size in enumerate(sizes)}
        saved[registry.save("net", {"model": model}).name] = model
    monkeypatch.setattr(header, "MAX_HEADER", 134_000)
    (done,) = registry.compact(["net"])
    assert done.problem is None
    assert done.after < 0.9 * done.before
    differences = registry.catalog.query("SELECT digest FROM tensors WHERE base IS NOT NULL")
    assert 30 < len(differences) < 2 * len(sizes)
    largest = {
        tensor.digest
        for tensor in registry.store.manifest(registry["net:v2"].id).tensors
        if tensor.size > 4 * 1_290
    }
    assert largest <= {digest for (digest,) in differences}
    monkeypatch.undo()
    registry.collect_garbage(grace=0)
    assert not registry.verify().problems
    for name, model in saved.items():
        loaded = registry[name].state_dict()
        assert all(torch.equal(loaded[key], value) for key, value in model.items())


def test_verify_reads_the_index_of_a_pack_a_few_times_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for each of its differences would take hours for 100,000 of them."""
    registry = Registry(tmp_path / "r")
    for number in range(3):
        registry.save(
            "net", {"model": {f"w{i}": torch.arange(1_100.0) + i + 1e-4 * number for i in range(100)}}
        )
    registry.compact()
    assert len(coded(registry, "net:v1")) == 100
    walked: list[str] = []
    listed = PackFolder.listed

    def counted(self: PackFolder, digest: str, only: Any) -> Any:
        walked.append(digest)
        return listed(self, digest, only)

    monkeypatch.setattr(PackFolder, "listed", counted)
    assert not registry.verify().problems
    assert 1 <= len(walked) <= 2 * len(list(registry.store.pack_digests()))


@pytest.mark.damages
def test_verify_names_the_tensors_whose_base_is_nowhere_and_no_other(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "r")
    for number in range(3):
        registry.save(
            "net", {"model": {f"w{i}": torch.arange(1_100.0) + i + 1e-4 * number for i in range(6)}}
        )
    registry.compact()
    digests = {path: digest for path, _, _, digest in registry["net:v1"].parameters()}
    with contextlib.closing(sqlite3.connect(tmp_path / "r/catalog.sqlite")) as catalog, catalog:
        for path in ("model/w1", "model/w4"):
            catalog.execute("UPDATE tensors SET base = ? WHERE digest = ?", ("f" * 64, digests[path]))
    problems = [one.message for one in registry.verify(["net:v1"]).problems]
    assert [one for one in problems if "which it is a difference from" in one] == [
        f"{path}: no pack holds tensor {'f' * 64}, which it is a difference from"
        for path in ("model/w1", "model/w4")
    ]


@pytest.mark.damages
def test_a_model_that_cannot_be_compacted_does_not_stop_the_others(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "r")
    for model in ("bad", "good"):
        for number in range(5):
            registry.save(model, {"model": {"w": torch.arange(30_000.0) + number * 1e-3 + (model == "bad")}})
    pack = registry.store.pack_path(
        registry.catalog.query(
            "SELECT p.digest FROM packs p JOIN uses u ON u.pack = p.number JOIN versions v ON v.id = u.id "
            "WHERE v.model = 'bad' AND v.version = 2"
        )[0][0]
    )
    flip(pack, -1)
    bad, good = registry.compact()
    assert (bad.model, good.model, good.problem) == ("bad", "good", None)
    assert pack.name[:12] in bad.problem
    assert good.after < good.before


def test_on_the_command_line(tmp_path: Path) -> None:
    registry, expected = saved(tmp_path / "r", 6)

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "registry.cli", "--root", str(tmp_path / "r"), *words]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert run("compact", "--dry-run").stdout.startswith("net: 5 versions in 5 packs, ")
    wrong = run("compact", "nett")
    assert (wrong.returncode, "did you mean 'net'" in wrong.stderr) == (1, True)
    assert "cannot be the name of a model" in run("compact", "net:v3").stderr
    done = run("compact", "net")
    assert done.returncode == 0, done.stderr
    assert "became" in done.stdout
    assert f"registry --root {tmp_path / 'r'} gc frees the space" in done.stdout
    assert run("compact").stdout == "net: nothing to compact\n"
    document = json.loads(run("compact", "--json").stdout)
    assert document == {
        "dry_run": False,
        "models": [
            {
                "model": "net",
                "versions": 0,
                "packs": 0,
                "before": 0,
                "after": 0,
                "problem": None,
                "measured": {},
            }
        ],
    }
    run("gc", "--grace", "0")
    exported = run("export", "net:v3", str(tmp_path / "v3.safetensors"))
    assert exported.returncode == 0, exported.stderr
    assert same(
        dict(sorted(load_file(tmp_path / "v3.safetensors").items())),
        dict(sorted(expected[2]["model"].items())),
    )
    assert run("diff", "net:v2", "net:v3").returncode == 1
    assert run("verify").returncode == 0
    with pytest.raises(NotFound):
        registry.compact(["nothing"])


def beside(shared: torch.Tensor, number: int) -> State:
    return {"model": {"own": torch.full((50_000,), float(number)), "shared": shared}}


def stored(registry: Registry) -> int:
    registry.collect_garbage(grace=0)
    return sum(path.stat().st_size for path in (registry.root / "packs").rglob("*.safetensors"))


@pytest.mark.parametrize("how", ["remove", "keep_last", "compact"])
def test_removed_versions_free_their_space_though_others_need_a_little_of_their_packs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    registry, shared = Registry(tmp_path / "r"), torch.arange(3_000.0)
    if how == "compact":  # as after a process that died in between, or in a shared registry
        monkeypatch.setattr(repacking, "tidy_behind", lambda *_: None)
    with registry.run("net", keep_last=1 if how == "keep_last" else None) as run:
        for number in range(4):
            run.save(**beside(shared, number))
    if how != "keep_last":
        registry.remove([f"net:v{n}" for n in (1, 2, 3)])
    if how == "compact":
        assert stored(registry) > 400_000
        (planned,) = registry.compact(dry_run=True)
        (done,) = registry.compact()
        assert (planned.packs, planned.before) == (done.packs, done.before) == (1, done.before)
        assert done.after is not None
        assert done.after < 40_000
    assert stored(registry) < 240_000
    assert same(registry["net"].load(["model"]), beside(shared, 3))
    assert registry.verify().problems == ()


def depths(registry: Registry, reference: str) -> dict[str, int]:
    """How many differences lead from each tensor of a version to a whole one."""
    bases = dict(registry.catalog.query("SELECT digest, base FROM tensors"))
    found = {}
    for path, _, _, digest in registry[reference].parameters():
        found[path] = 0
        while digest := bases[digest]:
            found[path] += 1
    return found


def walk(count: int) -> list[State]:
    """A training: some elements of the weights move with each step. The moments are new each time."""
    torch.manual_seed(0)
    weights, found = torch.randn(20_000).bfloat16(), []
    for _ in range(count):
        weights = weights.clone()
        weights[torch.randint(20_000, (1_500,))] *= 1.01
        found.append({"model": {"weights": weights, "moments": 1 + 0.3 * torch.rand(3_000)}})
    return found


def test_differences_rest_on_near_ones_as_deep_as_that_saves_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, sizes = walk(21), {}
    for name in ("tree", "star"):
        registry = Registry(tmp_path / name)
        for state in expected:
            registry.save("net", state)
        if name == "star":
            monkeypatch.setattr(choosing, "_on_the_way", lambda position, anchor, resting: anchor)
        registry.compact()
        sizes[name] = stored(registry)
        found = {n: depths(registry, f"net:v{n}") for n in range(1, 22)}
        assert {one["model/moments"] for one in found.values()} <= {0, 1}
        deepest = max(one["model/weights"] for one in found.values())
        assert deepest == (4 if name == "tree" else 1)
        check(registry, expected)
    assert sizes["tree"] < 0.93 * sizes["star"]


def test_a_growing_series_stays_a_tree_and_parts_of_it_may_go(tmp_path: Path) -> None:
    registry, expected = Registry(tmp_path), walk(24)
    for number, state in enumerate(expected, 1):
        registry.save("net", state)
        if number % 3 == 0:
            registry.compact()
            registry.collect_garbage(grace=0)
    found = [depths(registry, f"net:v{n}")["model/weights"] for n in range(1, 25)]
    assert 3 <= max(found) <= 4
    gone = {2, 5, 8, 9, 13, 16, 17, 22}  # with others that rest on some of them
    registry.remove([f"net:v{n}" for n in gone])
    for _ in range(2):
        registry.collect_garbage(grace=0)
        registry.compact()
    for number, state in enumerate(expected, 1):
        if number not in gone:
            assert same(registry[f"net:v{number}"].load(), state)
    assert registry.verify().problems == ()


def test_a_deep_difference_is_turned_back_in_memory_for_itself_alone(tmp_path: Path) -> None:
    registry, expected = Registry(tmp_path), walk(21)
    for state in expected:
        registry.save("net", state)
    registry.compact()
    deep = next(n for n in range(1, 22) if depths(registry, f"net:v{n}")["model/weights"] == 4)
    wanted = registry.store._locator.by_digest(
        {digest for _, _, _, digest in registry[f"net:v{deep}"].parameters()}
    )
    mapped = Mapped(registry.store.packs)
    mapped.decode(wanted)
    assert set(mapped._decoded) == {item.info.digest for item in wanted if item.base}
    # What rests on one another is turned back once each.
    chain = next(item for item in wanted if item.info.dtype == "bfloat16").chain
    together = Mapped(registry.store.packs)
    together.decode(chain)
    assert len(together._decoded) == 4
    assert bytes(together.bytes(chain[0])) == bytes(mapped.bytes(chain[0]))


def test_many_versions_that_share_a_little_of_a_pack_do_not_keep_the_rest(tmp_path: Path) -> None:
    """As those that were trained on a frozen backbone, which the first of them has brought."""
    registry, shared = Registry(tmp_path / "r"), torch.arange(2_000.0)
    for number in range(30):
        model = {"shared": shared, "own": torch.full((20,), float(number))}
        if not number:
            model["large"] = torch.randn(100_000)
        registry.save("net", {"model": model})
    registry.remove(["net:v1"])
    registry.compact()
    assert stored(registry) < 300_000
    assert registry.verify().problems == ()


def test_values_that_two_versions_have_swapped_become_differences(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "r")
    a, b, z = (state["model"]["weights"] for state in (walk(2)[0], walk(2)[1], walk(3)[2]))
    swapped = [{"x": b, "y": a}, {"x": a, "y": b}, {}, {}]
    expected = [{"model": {"z": z * (1 + number / 100), **more}} for number, more in enumerate(swapped)]
    for state in expected:
        registry.save("net", state)
    registry.compact()
    assert "model/z" in coded(registry, "net:v1")
    assert registry.compact()[0].packs == 0
    check(registry, expected)


CODINGS = {
    "planes": lambda data, base, size, run: planes.encode(data, base, size, run),
    "one class": lambda data, base, size, run: classes.encode(data, base, size, run, limits=b""),
    "classes": lambda data, base, size, run: classes.encode(
        data, base, size, run, limits=classes.limits_of(base, size)
    ),
}


@pytest.mark.parametrize(
    "levels",
    [
        [("planes", 1_100), ("planes", 1_500), ("planes", 1_500)],
        [("classes", 1_500), ("planes", 1_100), ("one class", 512)],
        [("planes", 512), ("classes", 1_024), ("planes", 256)],
        [("one class", 4_096), ("classes", 700), ("classes", 1_024)],
    ],
)
def test_a_difference_may_rest_on_others_of_any_coding_and_size_of_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, levels: list[tuple[str, int]]
) -> None:
    registry, expected = Registry(tmp_path / "r"), []
    for state in walk(4):
        expected.append({"model": {"w": state["model"]["weights"][:4_001]}})
        registry.save("net", expected[-1])
    digests = [next(iter(registry[f"net:v{n}"].parameters()))[3] for n in (1, 2, 3, 4)]
    for place, (coding, chunk) in enumerate(levels, 1):
        monkeypatch.setattr(planes, "CHUNK", chunk)
        monkeypatch.setattr(classes, "BLOCK", chunk)
        monkeypatch.setattr(
            differences,
            "encode",
            lambda data, base, item_size, run, is_float, code=CODINGS[coding]: code(
                data, base, item_size, run
            ),
        )
        pack = registry.catalog.locate([digests[place]])[digests[place]].pack
        bases = {digests[place]: [digests[place - 1]]}
        assert repacking.repack(registry.catalog, registry.store, pack, [digests[place]], bases)
    assert depths(registry, "net:v4") == {"model/w": 3}
    check(registry, expected)


def test_a_tree_of_both_codings_outlives_all_that_happens_to_its_versions(tmp_path: Path) -> None:
    torch.manual_seed(0)
    registry, expected = Registry(tmp_path / "r"), []
    weights = torch.randn(300, 1_000) * 0.02
    for number in range(9):
        weights = weights + 1e-5 * torch.randn_like(weights)
        model = {"half": weights.bfloat16(), "whole": weights[:50], "double": weights[:9].double()}
        moments = {"state": {0: {"exp_avg": weights[100:200] * 1e-3}}, "param_groups": [{"lr": 0.1}]}
        expected.append({"model": model, "optimizer": moments})
        registry.save("net", expected[-1])
        if number in (3, 8):
            registry.compact()
    registry.collect_garbage(grace=0)
    assert {text_of(path) for path in registry.root.glob("packs/*/*")} == {"1", "2"}
    check_all(registry, expected, range(1, 10))
    registry.thin("net:v2")
    registry.thin("net:v5")
    registry.remove(["net:v3", "net:v6"])
    registry.compact()
    registry.collect_garbage(grace=0)
    left = [1, 2, 4, 5, 7, 8, 9]
    check_all(registry, expected, left)
    other = Registry(tmp_path / "other")
    registry.copy_to(other)
    registry.catalog.close()
    (registry.root / "catalog.sqlite").unlink()
    again = Registry(tmp_path / "r", create=False)
    again.rebuild()
    check_all(again, expected, left)
    copied = [version for version in range(1, 10) if version in left]
    for there, number in enumerate(copied, 1):
        assert same(other[f"net:v{there}"].load(["model"])["model"], expected[number - 1]["model"])
    assert other.verify().problems == ()


def text_of(pack: Path) -> str:
    """The version that a pack says it has."""
    with safe_open(pack, "pt") as file:
        return str(file.metadata()["format"]).removeprefix("torch-registry pack ")


def check_all(registry: Registry, expected: list[dict[str, Any]], numbers: Iterable[int]) -> None:
    """Versions, of which 2 and 5 may have been thinned, load bit for bit."""
    for number in numbers:
        loaded = registry[f"net:v{number}"].load()
        assert same(loaded["model"], expected[number - 1]["model"])
        if "optimizer" in loaded:
            there, saved = (one["optimizer"]["state"][0] for one in (loaded, expected[number - 1]))
            assert same(there, saved)
    assert registry.verify().problems == ()


def fine_tuned(count: int = 4) -> dict[str, State]:
    """A network and fine-tunes of it, one of them under other names and in another order."""
    chance = torch.Generator().manual_seed(0)

    def noise(like: torch.Tensor) -> torch.Tensor:
        return torch.randn(like.shape, generator=chance)

    # Layers of one shape, as the blocks of a transformer have them.
    base = {f"block{i}.weight": noise(torch.empty(64, 128)) * 0.02 for i in range(3)}
    tuned = [
        {name: value * (1 + 0.004 * noise(value)) + 1e-5 * noise(value) for name, value in base.items()}
        for _ in range(count)
    ]
    tuned[1] = {f"net.{name}": value for name, value in reversed(tuned[1].items())}
    named = {"base": base} | {f"tuned{i}": state for i, state in enumerate(tuned)}
    order = sorted(named, key=lambda name: name[::-1])
    return {name: {"model": {key: value.bfloat16() for key, value in named[name].items()}} for name in order}


def stored_in(registry: Registry, reference: str) -> set[tuple[bool, bool]]:
    """How the tensors of a version are stored: whether coded, and whether with a base."""
    digests = {digest for _, _, _, digest in registry[reference].parameters()}
    return {(place.is_coded, place.base is not None) for place in registry.catalog.locate(digests).values()}


def all_are(registry: Registry, expected: dict[str, State]) -> None:
    for name, state in expected.items():
        assert same(registry[name].load(), state)
        assert same(registry[name].load(copy=True), state)
        into = {key: torch.zeros_like(value) for key, value in state["model"].items()}
        registry[name].load_into(model=into)
        assert same(into, state["model"])
    assert registry.verify().problems == ()


def test_fine_tunes_without_a_history_become_differences_from_what_they_came_from(tmp_path: Path) -> None:
    registry, expected = Registry(tmp_path), fine_tuned()
    for name, state in expected.items():
        registry.save(name, state)
    assert all(not one.versions for one in registry.compact())
    planned = {one.model: one.measured for one in registry.compact(similar=True, dry_run=True)}
    assert planned == {"base": {}} | {f"tuned{i}": {f"tuned{i}:v1": "base:v1"} for i in range(4)}
    done = {one.model: one for one in registry.compact(similar=True)}
    assert {name: one.measured for name, one in done.items()} == planned
    assert all(one.after and one.after < 0.4 * one.before for name, one in done.items() if name != "base")
    assert stored_in(registry, "base") == {(False, False)}
    all_are(registry, expected)
    registry.collect_garbage(grace=0)
    all_are(Registry(tmp_path), expected)
    # What others rest on stays when its version goes.
    registry.remove(["base:v1"], force=True)
    registry.collect_garbage(grace=0)
    del expected["base"]
    all_are(registry, expected)


def test_only_the_named_models_become_similar_and_an_alias_stays(tmp_path: Path) -> None:
    registry, expected = Registry(tmp_path), fine_tuned()
    for name, state in expected.items():
        registry.save(name, state)
    registry.set_alias("tuned0:v1", "production")
    (done,) = registry.compact(["tuned1"], similar=True)
    assert done.measured == {"tuned1:v1": "base:v1"}
    registry.compact(similar=True)
    assert stored_in(registry, "tuned0") == {(False, False)}
    assert stored_in(registry, "tuned3") == {(True, True)}
    all_are(registry, expected)


def test_coded_by_itself_and_back(tmp_path: Path) -> None:
    registry, expected = saved(tmp_path, 3)
    registry.set_alias("net:v1", "production")
    (planned,) = registry.compact(alone=True, dry_run=True)
    (done,) = registry.compact(alone=True)
    assert done[1:4] == planned[1:4]
    assert done.after < 0.75 * done.before
    # The alias stays as it is; the newest version does not.
    assert stored_in(registry, "net:v1") == {(False, False)}
    assert (True, False) in stored_in(registry, "net:v3")
    status = registry.status()
    assert status.alone > 0
    assert status.coded.endswith(f"{status.alone} coded by themselves")
    check(registry, expected)
    (again,) = registry.compact(alone=True)
    assert again.packs == 0
    registry.collect_garbage(grace=0)
    # Others may rest on what is coded by itself.
    registry.save("net", expected[1] | {"more": {"w": torch.arange(9_000.0)}})
    registry.compact()
    check(registry, expected)
    assert registry.rebuild().damaged == ()
    check(registry, expected)
    (whole,) = registry.expand()
    assert whole.after > whole.before
    assert all(stored_in(registry, f"net:v{number}") == {(False, False)} for number in range(1, 5))
    registry.collect_garbage(grace=0)
    check(Registry(tmp_path), expected)
    assert registry.expand()[0].packs == 0


def test_what_is_coded_by_itself_becomes_a_difference_where_that_is_smaller(tmp_path: Path) -> None:
    registry, expected = saved(tmp_path, 1)
    registry.compact(alone=True)
    assert (True, False) in stored_in(registry, "net:v1")
    for state in states(2):
        registry.save("net", state)
    registry.compact()
    assert {f"model/layer{i}.weight" for i in range(4)} <= coded(registry, "net:v1")
    expected = [expected[0], *states(2)]
    check(registry, expected)


@pytest.mark.damages
@pytest.mark.parametrize("at", [0.3, 0.6, 0.9])
def test_damage_in_what_is_coded_by_itself_is_found(tmp_path: Path, at: float) -> None:
    registry = Registry(tmp_path)
    registry.save("net", {"model": {"w": torch.randn(100_000, generator=GENERATOR)}})
    registry.compact(alone=True)
    registry.collect_garbage(grace=0)
    (pack,) = tmp_path.glob("packs/*/*.safetensors")
    flip(pack, int(at * pack.stat().st_size))
    for how in ({}, {"copy": True}):
        with pytest.raises(Corrupt, match="w"):
            registry["net"].load(**how)
    assert registry.verify().problems
    # Saved again, it is written again.
    GENERATOR.manual_seed(0)


def test_a_pack_that_claims_a_giant_is_refused(tmp_path: Path) -> None:
    writer = PackWriter(tmp_path, [("float32", (1 << 50,))], coded=[("float32", (1 << 50,))])
    writer.add_coded("ab" * 32, "float32", (1 << 50,), base=None, coded=memoryview(bytes(100)))
    info = writer.finish(tmp_path / "packs")
    with pytest.raises(Corrupt, match="malformed type"):
        read_pack_info(pack_path(tmp_path / "packs", info.digest))


def test_similar_and_alone_on_the_command_line(tmp_path: Path) -> None:
    registry, expected = Registry(tmp_path / "r"), fine_tuned()
    for name, state in expected.items():
        registry.save(name, state)

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "registry.cli", "--root", str(tmp_path / "r"), *words]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert "  tuned2:v1 would rest on base:v1 (measured)\n" in run("compact", "--similar", "-n").stdout
    done = run("compact", "--similar", "--json")
    assert json.loads(done.stdout)["models"][1]["measured"] == {"tuned0:v1": "base:v1"}
    assert "base: 1 version in 1 pack, " in run("compact", "--alone").stdout
    wrong = run("compact", "--plain", "--alone")
    assert (wrong.returncode, "give one or the other" in wrong.stderr) == (2, True)
    assert "became" in run("compact", "--plain").stdout
    assert run("compact", "--plain").stdout.splitlines()[0] == "base: nothing to turn back"
    all_are(registry, expected)


def test_a_chunk_of_planes_that_would_take_much_memory_is_refused() -> None:
    count = (1 << 20) + 1
    coded = memoryview(count.to_bytes(4, "little") + (1).to_bytes(4, "little") + bytes(4 * 8))
    zeros = memoryview(bytearray(8 * count))
    with pytest.raises(Corrupt, match="malformed"):
        differences.decoding(coded, zeros, item_size=8, out=zeros)


@pytest.mark.damages
def test_verify_forgets_what_it_could_not_turn_back(tmp_path: Path) -> None:
    registry, _ = saved(tmp_path, 3)
    registry.compact()
    registry.collect_garbage(grace=0)
    digests = [digest for _, _, _, digest in registry["net:v1"].parameters()]
    places = registry.catalog.locate(digests)
    base = next(place.base for place in places.values() if place.base)
    place = registry.catalog.locate([base])[base]
    pack = registry.store.pack_path(place.pack)
    flip(pack, place.start)
    check = verification._Check(registry.catalog, registry.store, [])
    of_pack = next(other.pack for other in places.values() if other.base == base)
    coded = [digest for digest, other in places.items() if other.pack == of_pack and other.base]
    problems = check._undecodable(coded, of_pack)
    assert problems
    assert all(
        error.__traceback__ is error.__cause__ is error.__context__ is None for error in problems.values()
    )
