"""The store: what goes in comes out, once, three ways, and is checked on the way."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision

from registry.store import loading
from registry.store.errors import Corrupt, Incompatible, Invalid, Missing, NotFound
from registry.store.locating import Locator
from registry.store.store import Store, Written

TREE = {
    "model": {
        "conv.0.weight": torch.randn(6, 1, 5, 5),
        "conv.3.weight": torch.randn(16, 6, 5, 5),
        "fc.1.weight": torch.randn(120, 256),
    },
    "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "lr": 0.1},
}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "s")


def test_equal_tensors_are_stored_once(store: Store) -> None:
    weights = torch.randn(100, 100)
    first = store.put({"model": {"w": weights, "again": weights.clone()}})
    second = store.put({"model": {"w": weights.clone()}})
    assert first.pack is not None
    assert len(first.pack.tensors) == 1
    assert second.pack is None
    assert torch.equal(store.get(second.digest)["model"]["w"], weights)


def test_a_new_head_costs_only_the_head(store: Store) -> None:
    net = torchvision.models.resnet18(weights=None)
    store.put({"model": net.state_dict()})
    torch.nn.init.normal_(net.fc.weight)
    pack = store.put({"model": net.state_dict()}).pack
    assert pack is not None
    assert [tensor.shape for tensor in pack.tensors] == [(1000, 512)]


def test_a_manifest_is_found_by_its_digest_alone(store: Store) -> None:
    digests = {store.put({"model": {"n": n}}).digest for n in range(3)}
    assert set(store) == digests
    assert all(store.has(digest) for digest in digests)
    assert not store.has("0" * 64)
    assert not store.has("../../etc/passwd")
    with pytest.raises(NotFound, match="the manifest is missing"):
        store.get("0" * 64)
    with pytest.raises(Invalid, match="is not a digest of 64 hex digits"):
        store.get("../../etc/passwd")


def test_the_record_comes_along_exactly(store: Store) -> None:
    record = {"loss": float("inf"), "nested": {"list": [1, 2.5, None, True, "x"]}}
    assert store.manifest(store.put({}, record).digest).record == record


def test_selecting_names_reads_only_their_bytes(store: Store) -> None:
    stored = store.put(TREE)
    assert stored.pack is not None
    path = store.pack_path(stored.pack.digest)
    (fc,) = (t for t in stored.pack.tensors if t.shape == (120, 256))
    data = bytearray(path.read_bytes())
    data[fc.start] ^= 1  # loading it would be an error
    path.chmod(0o644)
    path.write_bytes(data)
    found = store.get(stored.digest, only="model/conv.*")
    assert list(found) == ["model"]
    assert list(found["model"]) == ["conv.0.weight", "conv.3.weight"]
    assert store.get(stored.digest, only=["optimizer"])["optimizer"]["state"] == {
        0: {"step": torch.tensor(3.0)}
    }
    assert store.get(stored.digest, only="optimizer/state/0/step") == {
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}}
    }
    with pytest.raises(Corrupt, match=r"model/fc\.1\.weight"):
        store.get(stored.digest, only="model")
    with pytest.raises(
        NotFound, match=r"nothing matches 'model/conv\.0\.wieght'; did you mean 'model/conv\.0\.weight'"
    ):
        store.get(stored.digest, only=["optimizer", "model/conv.0.wieght"])


def test_a_loaded_tensor_may_be_trained_in_place_and_never_changes_the_store(store: Store) -> None:
    digest = store.put(TREE).digest
    for copy in (False, True):
        loaded = store.get(digest, copy=copy)["model"]["fc.1.weight"]
        loaded.requires_grad_()
        optimizer = torch.optim.SGD([loaded], lr=1.0)
        loaded.sum().backward()
        optimizer.step()
        assert not torch.equal(loaded, TREE["model"]["fc.1.weight"])
        assert torch.equal(store.get(digest)["model"]["fc.1.weight"], TREE["model"]["fc.1.weight"])


def test_each_load_has_memory_of_its_own(store: Store) -> None:
    digest = store.put(
        {"a": torch.ones(300_000), "b": torch.ones(300_000), "c": torch.ones(3), "d": torch.ones(3)}
    ).digest
    loaded = store.get(digest)
    assert len({tensor.data_ptr() for tensor in loaded.values()}) == 4
    loaded["a"].zero_()
    loaded["c"].zero_()
    assert loaded["b"].all()
    assert loaded["d"].all()


def test_saving_one_loaded_tensor_elsewhere_takes_only_its_own_bytes(store: Store, tmp_path: Path) -> None:
    digest = store.put({"large": torch.randn(1_000_000), "small": torch.randn(10)}).digest
    for copy in (False, True):
        torch.save(store.get(digest, copy=copy)["small"], tmp_path / "small.pt")
        if not copy:
            assert (tmp_path / "small.pt").stat().st_size < 10_000


def test_live_tensors_are_filled_whatever_their_layout(store: Store) -> None:
    digest = store.put(TREE).digest
    live = {
        "conv.0.weight": torch.zeros(6, 1, 5, 5),
        "conv.3.weight": torch.zeros(16, 6, 5, 5).to(memory_format=torch.channels_last),
        "fc.1.weight": torch.nn.Parameter(torch.zeros(256, 120).T),
    }
    before = {name: tensor.data_ptr() for name, tensor in live.items()}
    store.load_into(digest, {"model": live})
    for name, tensor in live.items():
        assert torch.equal(tensor, TREE["model"][name])
        assert tensor.data_ptr() == before[name]


def test_a_real_model_is_filled_with_equal_tensors_in_their_places(store: Store) -> None:
    net, other = (torchvision.models.resnet18(weights=None) for _ in range(2))
    digest = store.put({"model": net.state_dict()}).digest
    for verify in (True, False):
        for parameter in other.parameters():
            torch.nn.init.zeros_(parameter)
        store.load_into(digest, {"model": other.state_dict()}, verify=verify)
        assert all(map(torch.equal, net.state_dict().values(), other.state_dict().values()))


@pytest.mark.parametrize("verify", [True, False])
def test_of_live_tensors_that_share_memory_the_last_one_counts(store: Store, verify: bool) -> None:
    parts = {name: torch.full((3_000,), float(number)) for number, name in enumerate("abcd")}
    digest = store.put({"model": parts}).digest
    memory = torch.zeros(4_500)
    live = {"d": memory[:3_000], "b": memory[1_500:], "a": torch.ones(3_000), "c": torch.zeros(6_000)[::2]}
    store.load_into(digest, {"model": live}, verify=verify)
    assert memory.tolist() == [3.0] * 1_500 + [1.0] * 3_000
    assert live["c"].tolist() == [2.0] * 3_000
    assert not live["a"].any()


@pytest.mark.parametrize("verify", [True, False])
def test_a_live_tensor_with_gaps_that_shares_memory_counts_where_it_is_the_last(
    store: Store, verify: bool
) -> None:
    parts = {"whole": torch.full((3_000,), 1.0), "every second": torch.full((1_500,), 2.0)}
    digest = store.put({"model": parts}).digest
    memory = torch.zeros(3_000)
    store.load_into(digest, {"model": {"whole": memory, "every second": memory[::2]}}, verify=verify)
    assert memory.tolist() == [2.0, 1.0] * 1_500


def test_what_does_not_fit_is_listed_and_nothing_is_changed(store: Store) -> None:
    digest = store.put(TREE).digest
    live = {
        "conv.0.weight": torch.zeros(6, 1, 5, 5),
        "conv.3.weight": torch.zeros(16, 6, 3, 3),
        "fc.1.weight": torch.zeros(120, 256).double(),
        "fc.9.weight": torch.zeros(1),
    }
    with pytest.raises(Incompatible) as caught:
        store.load_into(digest, {"model": live}, label="net:v1")
    assert str(caught.value) == (
        "net:v1: model/conv.3.weight has shape [16, 6, 3, 3], stored is [16, 6, 5, 5]; "
        "model/fc.1.weight is torch.float64, stored is torch.float32; model/fc.9.weight is not in the checkpoint"
    )
    assert not any(tensor.any() for tensor in live.values())


def test_a_wrong_byte_is_handed_out_only_on_request(store: Store) -> None:
    stored = store.put({"w": torch.zeros(10)})
    assert stored.pack is not None
    path = store.pack_path(stored.pack.digest)
    data = bytearray(path.read_bytes())
    data[stored.pack.tensors[0].start] = 1
    path.chmod(0o644)
    path.write_bytes(data)
    for copy in (False, True):
        with pytest.raises(Corrupt):
            store.get(stored.digest, copy=copy)
        assert store.get(stored.digest, copy=copy, verify=False)["w"].any()


@pytest.mark.parametrize(
    ("parts", "offsets"),
    [
        ([torch.ones(2, 3), torch.ones(2, 3, dtype=torch.float64)], [[0, 0], [2, 0]]),
        ([torch.ones(2, 3), torch.zeros(2, 3)], [[0, 0], [1, 0]]),
        ([torch.ones(2, 3)], [[0, 0]]),
    ],
    ids=["two types", "an overlap", "a hole"],
)
def test_shards_that_make_up_no_tensor_are_refused_when_they_are_saved(
    store: Store, parts: list[torch.Tensor], offsets: list[list[int]]
) -> None:
    state = store.encode({"x": parts})
    pack = store.add(state)
    assert pack is not None
    shards = [[offset, slot] for slot, offset in enumerate(offsets)]
    trees = {"model": {"w": {"$shards": shards, "shape": [4, 3]}}}
    with pytest.raises(Corrupt, match="do not make up a tensor"):
        store.put(Written(trees, state.tensors(), [pack]))
    assert list(store) == []


def test_a_load_that_is_interrupted_stops_verifying(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = store.put({"model": {str(i): torch.full((50_000,), float(i)) for i in range(100)}}).digest
    begun, ended = threading.Event(), threading.Event()
    checked = []

    class Pool(loading.ThreadPoolExecutor):
        def shutdown(self, *given: Any, **named: Any) -> None:
            if self._thread_name_prefix == "registry-verify":
                ended.set()
            super().shutdown(*given, **named)

    def check(*given: Any) -> None:
        begun.set()
        ended.wait()
        checked.append(given)

    def interrupt(*_: Any) -> None:
        begun.wait()
        raise KeyboardInterrupt

    monkeypatch.setattr(loading, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(loading, "_check", check)
    monkeypatch.setattr(loading.Mapped, "tensor", interrupt)
    with pytest.raises(KeyboardInterrupt):
        store.get(digest)
    assert len(checked) < 50


def test_where_a_pack_is_gone_the_index_is_asked_to_look_again() -> None:
    """Otherwise it might say for a while what it said before."""

    class Lagging:
        place = "gone"

        def look_again(self) -> None:
            self.place = "there"

    index: Any = Lagging()
    locator = Locator(index, packs=None)  # type: ignore[arg-type]

    def use(wanted: Sequence[Any]) -> str:
        if wanted == ["gone"]:
            raise Missing("a pack is missing")
        return "used"

    assert locator.while_packs_move(lambda: [index.place], use) == "used"
    with pytest.raises(Missing):
        locator.while_packs_move(lambda: ["gone"], use)  # type: ignore[list-item]
