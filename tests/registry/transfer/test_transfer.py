"""Plans: what is loaded, what is refused, and that applying one is all or nothing."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

from registry import Registry, TransferPlan, diff, freeze, plan_transfer, unfreeze
from registry.live.builders import on_meta
from registry.models import LeNet5, LeNet6
from registry.store.errors import Conflict, Incompatible, Invalid, NotFound
from registry.transfer import finite
from registry.transfer.matching import match
from registry.transfer.sources import side_of

MEANT = {"fc.5.*": "skip", "fc.7.*": "new"}


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    found = Registry(tmp_path / "r")
    torch.manual_seed(0)
    with found.run("lenet5") as run:
        run.save(model=LeNet5())
    return found


def values(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def unchanged(module: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


# -- the textbook's case -------------------------------------------------------------------------------------


def test_lenet5_to_lenet6(registry: Registry, caplog: pytest.LogCaptureFixture) -> None:
    target = LeNet6()
    own = values(target)
    plan = plan_transfer("lenet5", target, expect=MEANT, freeze="loaded", registry=registry)
    assert plan.summary == "loaded 8 of 12 tensors, 90.9% of parameters"
    assert "freezes 8 parameters; 6,090 elements stay trainable" in str(plan)
    assert unchanged(target, own)
    assert plan.apply(target, registry=registry) is target
    source = registry["lenet5"].state_dict()
    for name, tensor in target.state_dict().items():
        loaded = name in source and not name.startswith("fc.5")
        assert torch.equal(tensor, source[name] if loaded else own[name]), name
    assert {n for n, p in target.named_parameters() if p.requires_grad} == {
        "fc.5.weight",
        "fc.5.bias",
        "fc.7.weight",
        "fc.7.bias",
    }
    built = registry.from_pretrained(LeNet6, "lenet5", freeze=True)
    (logged,) = [record for record in caplog.records if record.name == "registry.transfer.planning"]
    # Warnings are shown without any set-up of logging.
    assert (logged.getMessage(), logged.levelname) == (plan.summary, "WARNING")
    assert torch.equal(built.conv[0].weight, source["conv.0.weight"])
    assert not built.conv[0].weight.requires_grad


# -- 1: loading nothing --------------------------------------------------------------------------------------


def layer(**given: Any) -> dict[str, torch.Tensor]:
    return {f"{given.get('prefix', '')}a.weight": torch.randn(given.get("shape", (3, 4)))}


@pytest.mark.parametrize(
    ("source", "told"),
    [
        (
            {"backbone.a.weight": torch.randn(3, 4)},
            r"all 1 source names start with backbone\.; maybe: rename=\['backbone\.\*=\*'\]",
        ),
        ({"x": {"y": {"a.weight": torch.randn(3, 4)}}}, r"another container; give source\['x'\]\['y'\]"),
        (
            {f"module.{i}.b": torch.ones(3) for i in range(9)},
            "the target with a.weight; another architecture",
        ),
        ({"a.weight": torch.randn(4, 3)}, "1 shapes are transposed, such as a.weight"),
        ({"a.weight": torch.randn(7, 7)}, r"every shape differs, a.weight is \[3, 4\] against \[7, 7\]"),
        (
            {"x.y": torch.randn(2)},
            "the source begins with x.y, the target with a.weight; another architecture",
        ),
        ({"b.weight": torch.randn(3, 4)}, r"maybe: rename=\['b.weight=a.weight'\]  \(the only ones of shape"),
    ],
)
def test_loading_nothing_is_an_error_that_says_why(source: dict[str, torch.Tensor], told: str) -> None:
    net = nn.ModuleDict({"a": nn.Linear(4, 3, bias=False)})
    for everything in (True, False):
        with pytest.raises(Incompatible, match=told):
            plan_transfer(source, net, everything=everything)


def test_buffers_alone_are_nothing() -> None:
    source = {"1.running_mean": torch.ones(3), "1.running_var": torch.ones(3)}
    with pytest.raises(Incompatible, match="nothing would be loaded"):
        plan_transfer(source, nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)), everything=True)


def test_coverage_is_guarded() -> None:
    with pytest.raises(Incompatible, match=r"90.9% of parameters, less than the 95% that"):
        plan_transfer(LeNet5(), LeNet6(), expect=MEANT, min_coverage=0.95)
    assert plan_transfer(LeNet5(), LeNet6(), expect=MEANT, min_coverage=0.9).coverage > 0.9


# -- 2: expectations -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expect", "told"),
    [
        ({}, r"fc.5.weight has shape \[64, 84\], the source \[10, 84\].*expect=.*'fc.7.\*': 'new'"),
        ({"fc.5.*": "skip"}, "fc.7.weight is in the target only"),
        ({**MEANT, "fc.9.*": "skip"}, r"the expected pattern 'fc.9.\*' matches nothing; it is a typo"),
        ({**MEANT, "conv.*": "new"}, r"the expected pattern 'conv.\*' matches nothing that can be 'new'"),
        ({"fc.5.*": "maybe"}, "'maybe', not one of skip, new, unused, adapt"),
    ],
)
def test_only_expected_differences_pass(expect: dict[str, str], told: str) -> None:
    with pytest.raises((Incompatible, Invalid), match=told):
        plan_transfer(LeNet5(), LeNet6(), expect=expect)


def test_unused_is_for_the_source_only() -> None:
    plan = plan_transfer(LeNet6(), LeNet5(), expect={"fc.5.*": "skip", "fc.7.*": "unused"})
    assert {step.source for step in plan.steps if step.action == "unused"} == {"fc.7.weight", "fc.7.bias"}
    with pytest.raises(Incompatible, match=r"fc\.7\.weight is in the source only"):
        plan_transfer(LeNet6(), LeNet5(), expect={"fc.5.*": "skip"})


def test_skip_keeps_a_head_of_the_same_shape() -> None:
    source, net = LeNet5(), LeNet5()
    before = values(net)
    plan = plan_transfer(source, net, expect={"fc.5.*": "skip"})
    assert plan.summary.startswith("loaded 8 of 10")
    plan.apply(net, source)
    assert torch.equal(net.state_dict()["fc.5.weight"], before["fc.5.weight"])
    assert torch.equal(net.state_dict()["fc.3.weight"], source.state_dict()["fc.3.weight"])


# -- 3, 4: shapes, all or nothing ----------------------------------------------------------------------------


def test_a_vector_never_fills_a_scalar() -> None:
    source = {"a.weight": torch.ones(2, 2), "s": torch.ones(1)}
    net = nn.Module()
    net.a = nn.Linear(2, 2, bias=False)
    net.register_parameter("s", nn.Parameter(torch.tensor(5.0)))
    with pytest.raises(Incompatible, match=r"s has shape \[\], the source \[1\]"):
        plan_transfer(source, net)
    plan_transfer(source, net, everything=True).apply(net, source)
    assert net.s.item() == 5.0


def test_applying_is_all_or_nothing(registry: Registry) -> None:
    target = LeNet6()
    plan = plan_transfer("lenet5", target, expect=MEANT, registry=registry)
    before = values(target)
    bad = {name: tensor.clone() for name, tensor in registry["lenet5"].state_dict().items()}
    bad["fc.3.bias"][0] = float("nan")
    open_plan = plan.model_copy(update={"source_digest": None})
    with pytest.raises(Invalid, match=r"fc\.3\.bias of a state dict holds NaN or infinity"):
        open_plan.apply(target, bad)
    assert unchanged(target, before)
    open_plan.model_copy(update={"allow_nan": True}).apply(target, bad)
    assert torch.isnan(target.fc[3].bias[0])


def test_stored_tensors_are_looked_at_for_nan_once_and_others_each_time(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[int] = []
    look = finite._are_finite

    def looking(tensors: Iterable[torch.Tensor]) -> bool:
        found = list(tensors)
        looked.append(len(found))
        return look(found)

    monkeypatch.setattr(finite, "_found_finite", set())
    monkeypatch.setattr(finite, "_are_finite", looking)
    target = LeNet6()
    plan = plan_transfer("lenet5", target, expect=MEANT, registry=registry)
    plan.apply(target, registry=registry)
    plan.apply(target, registry=registry)
    kept = sum(step.action == "keep" for step in plan.steps)
    assert looked == [len(plan.loaded), kept, 0, kept]
    open_plan = plan.model_copy(update={"source_digest": None})
    live = LeNet5()
    open_plan.apply(target, live)
    with torch.no_grad():
        live.fc[1].weight[0, 0] = float("inf")
    with pytest.raises(Invalid, match="holds NaN or infinity"):
        open_plan.apply(target, live)
    bad = {name: tensor.clone() for name, tensor in registry["lenet5"].state_dict().items()}
    bad["fc.1.weight"][0, 0] = float("nan")
    registry.save("bad", {"model": bad})
    for _ in range(2):
        with pytest.raises(Invalid, match=r"fc\.1\.weight of bad:v1 holds NaN or infinity"):
            open_plan.apply(target, "bad", registry=registry)


@pytest.mark.parametrize(
    ("source", "target", "told"),
    [
        (LeNet5(), LeNet6(), "with other tensors; make a new plan"),
        ("lenet5", LeNet5(), "made for another LeNet6"),
    ],
)
def test_a_plan_is_for_one_source_and_one_network(
    registry: Registry, source: Any, target: nn.Module, told: str
) -> None:
    plan = plan_transfer("lenet5", LeNet6(), expect=MEANT, registry=registry)
    before = values(target)
    with pytest.raises(Incompatible, match=told):
        plan.apply(target, source, registry=registry)
    assert unchanged(target, before)


@pytest.mark.parametrize("as_state_dict", [False, True])
def test_a_plan_knows_the_live_source_that_it_was_made_from(tmp_path: Path, as_state_dict: bool) -> None:
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    source: Any = first.state_dict() if as_state_dict else first
    plan = plan_transfer(source, second)
    assert torch.equal(plan.state_dict(second)["weight"], first.weight)
    plan.apply(second)
    assert torch.equal(second.weight, first.weight)
    plan.save(tmp_path / "plan.json")
    loaded = TransferPlan.load(tmp_path / "plan.json")
    assert loaded == plan
    for one in (loaded, copy.deepcopy(plan), pickle.loads(pickle.dumps(plan))):
        with pytest.raises(Invalid, match=r"which its file does not hold: pass source="):
            one.apply(nn.Linear(3, 3))
        one.apply(second, source)


def test_a_plan_knows_the_registry_that_it_was_made_with(registry: Registry) -> None:
    target = LeNet6()
    plan_transfer("lenet5", target, expect=MEANT, registry=registry).apply(target)
    assert torch.equal(target.conv[0].weight, registry["lenet5"].state_dict()["conv.0.weight"])


def test_source_and_target_must_differ() -> None:
    net = LeNet5()
    with pytest.raises(Invalid, match="the same network"):
        plan_transfer(net, net)


# -- 5: casts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b", "lossless"),
    [
        (torch.float16, torch.float32, True),
        (torch.bfloat16, torch.float32, True),
        (torch.float32, torch.float16, False),
        (torch.float32, torch.bfloat16, False),
        (torch.float16, torch.bfloat16, False),
        (torch.int32, torch.float32, False),
        (torch.float32, torch.int64, False),
    ],
)
def test_casts_that_lose_something_need_consent(a: torch.dtype, b: torch.dtype, lossless: bool) -> None:
    source = {"w": torch.tensor([1.5, 2.5]).to(a), "v": torch.ones(3)}
    target = nn.Module()
    target.register_parameter("w", nn.Parameter(torch.zeros(2).to(b), requires_grad=False))
    target.register_parameter("v", nn.Parameter(torch.zeros(3)))
    if not lossless:
        with pytest.raises(Incompatible, match=r"w is .*, the source .*; if that is meant: allow_cast=True"):
            plan_transfer(source, target)
    plan = plan_transfer(source, target, allow_cast=True)
    (step,) = [step for step in plan.steps if step.target == "w"]
    assert step.cast
    plan.apply(target, source)
    assert torch.equal(target.w, source["w"].to(b))


# -- 9: positions --------------------------------------------------------------------------------------------


def test_shifted_numbers_are_not_copied_without_consent() -> None:
    a = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Flatten(), nn.Linear(4, 2))
    b = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    with pytest.raises(Incompatible, match="allow_positional"):
        plan_transfer(a, b)
    plan = plan_transfer(a, b, everything=True)
    assert {step.target for step in plan.loaded} == {"4.weight", "4.bias"}
    assert len(plan_transfer(a, b, everything=True, allow_positional=True).loaded) > 2


def test_a_layer_that_is_said_to_be_new_shifts_nothing() -> None:
    a = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    c = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2), nn.Linear(4, 2))
    assert {p.category for p in match(side_of(a), side_of(c)) if p.name.startswith("2.")} == {"POSITIONAL"}
    plan = plan_transfer(a, c, expect={"3.*": "new"})
    assert len(plan.loaded) == 4
    with pytest.raises(
        Invalid, match=r"the expected pattern '2\.\*' matches nothing"
    ):  # it is on both sides, whatever was said of it
        plan_transfer(a, c, expect={"2.*": "new", "3.*": "new"})


# -- 10: adapters --------------------------------------------------------------------------------------------


def test_adapters_are_named_and_keep_what_they_promise() -> None:
    colour, grey = (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(2, 2)),
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.Linear(2, 2)),
    )
    expect = {"0.weight": "adapt"}
    with pytest.raises(Incompatible, match=r"0.weight has shape \[4, 1, 3, 3\]"):
        plan_transfer(colour, grey)
    with pytest.raises(Invalid, match="no adapter is named for it"):
        plan_transfer(colour, grey, expect=expect)
    with pytest.raises(Invalid, match="there is no adapter 'sum'; the adapters are channels-sum"):
        plan_transfer(colour, grey, expect=expect, adapters={"0.weight": "sum"})
    image = torch.rand(2, 1, 8, 8)
    plan = plan_transfer(colour, grey, expect=expect, adapters={"0.weight": "channels-sum"})
    before = values(grey)
    wrong = plan.model_copy(
        update={
            "steps": tuple(s.model_copy(update={"adapter": s.adapter and "positions"}) for s in plan.steps)
        }
    )
    with pytest.raises(Incompatible, match="the adapter positions takes"):
        wrong.apply(grey, colour)
    assert unchanged(grey, before)
    plan.apply(grey, colour)
    assert torch.allclose(grey[0](image), colour[0](image.expand(2, 3, 8, 8)), atol=1e-5)
    back = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(2, 2))
    plan = plan_transfer(grey, back, expect=expect, adapters={"0.weight": "channels-repeat"})
    plan.apply(back, grey)
    assert torch.allclose(back[0](image.expand(2, 3, 8, 8)), grey[0](image), atol=1e-5)


def test_rows_of_a_classifier_go_by_class_name() -> None:
    source, target = nn.ModuleDict({"fc": nn.Linear(4, 3)}), nn.ModuleDict({"fc": nn.Linear(4, 4)})
    own = values(target)
    classes = (["cat", "dog", "cow"], ["cow", "fox", "cat", "elk"])
    plan = plan_transfer(source, target, adapters={"fc.*": "class-rows"}, classes=classes)
    assert plan.summary == "loaded 2 of 2 tensors, 50% of parameters"
    TransferPlan.from_json(plan.to_json()).apply(target, source)
    old, new = source.state_dict(), target.state_dict()
    for leaf in ("fc.weight", "fc.bias"):
        assert torch.equal(new[leaf][[0, 2]], old[leaf][[2, 0]])
        assert torch.equal(new[leaf][[1, 3]], own[leaf][[1, 3]])
    reordered = nn.ModuleDict({"fc": nn.Linear(4, 3)})
    same = plan_transfer(
        source, reordered, adapters={"fc.*": "class-rows"}, classes=(classes[0], classes[0][::-1])
    )
    same.apply(reordered, source)
    assert torch.equal(reordered.state_dict()["fc.bias"], old["fc.bias"].flip(0))
    for wrong, told in (
        ((["a", "b", "c"], ["x", "y", "z", "w"]), "no class of the target is one of the source's"),
        ((["a", "a", "c"], ["a", "y", "z", "w"]), "the class 'a' is named twice"),
        ((["a", "b", "c"], ["a", "b"]), "was given 2 classes of the target"),
    ):
        with pytest.raises((Invalid, Incompatible), match=told):
            plan_transfer(source, target, adapters={"fc.*": "class-rows"}, classes=wrong)
    with pytest.raises(Incompatible, match="needs the classes of both sides"):
        plan_transfer(source, target, adapters={"fc.*": "class-rows"})


@pytest.mark.parametrize(
    ("layer", "image"),
    [(nn.Linear(6, 6), (5, 6)), (nn.Conv2d(6, 6, 3, padding=1), (2, 6, 8, 8))],
    ids=["linear", "conv"],
)
def test_a_new_square_layer_after_a_relu_can_begin_as_the_identity(
    layer: nn.Module, image: tuple[int, ...]
) -> None:
    import copy

    first = nn.Linear(6, 6) if len(image) == 2 else nn.Conv2d(6, 6, 1)
    source = nn.ModuleDict({"body": nn.Sequential(first, nn.ReLU())})
    deeper = nn.ModuleDict(
        {"body": nn.Sequential(copy.deepcopy(first), nn.ReLU(), nn.Dropout(0.0), layer, nn.ReLU())}
    )
    plan = plan_transfer(source, deeper, adapters={"body.3.*": "identity"})
    assert {step.target: step.action for step in plan.steps if step.adapter} == {
        "body.3.weight": "make",
        "body.3.bias": "make",
    }
    assert len(plan.loaded) == 2
    assert not plan.notes
    TransferPlan.from_json(plan.to_json()).apply(deeper, source)
    x = torch.randn(image)
    assert torch.equal(deeper["body"](x), source["body"](x))
    deeper["body"][1] = nn.Sigmoid()
    with pytest.raises(Incompatible, match="cannot begin as the identity: before it stands Sigmoid"):
        plan_transfer(source, deeper, adapters={"body.3.*": "identity"})


def test_an_identity_needs_a_square_and_says_when_the_relu_is_not_known() -> None:
    source = nn.ModuleDict({"a": nn.Linear(2, 2)})
    wide = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 3)})
    with pytest.raises(Incompatible, match=r"the adapter identity makes square tensors .* not \[3, 2\]"):
        plan_transfer(source, wide, adapters={"b.*": "identity"})
    square = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    plan = plan_transfer(source, square, adapters={"b.*": "identity"})
    assert "exact after a ReLU only; none is known before it" in str(plan)


def test_position_embeddings_fit_another_grid() -> None:
    source, target = {"p": torch.randn(1, 1 + 16, 8)}, nn.Module()
    target.register_parameter("p", nn.Parameter(torch.zeros(1, 1 + 64, 8)))
    plan_transfer(source, target, adapters={"p": "positions"}).apply(target, source)
    assert torch.equal(target.p[:, 0], source["p"][:, 0])
    assert 0.5 < float(target.p.detach()[:, 1:].std() / source["p"][:, 1:].std()) < 1.2
    odd = nn.Module()
    odd.register_parameter("p", nn.Parameter(torch.zeros(1, 1 + 60, 8)))
    with pytest.raises(Incompatible, match="one class token and a square grid, not"):
        plan_transfer(source, odd, adapters={"p": "positions"})


# -- 11, 12: ties and buffers --------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight


def test_tied_weights_are_copied_once_and_stay_tied() -> None:
    source, target = Tied(), Tied()
    plan_transfer(source, target).apply(target, source)
    assert target.head.weight is target.embed.weight
    assert torch.equal(target.embed.weight, source.embed.weight)
    alone = {"embed.weight": torch.randn(5, 3)}
    plan_transfer(alone, target).apply(target, alone)
    assert torch.equal(target.head.weight, alone["embed.weight"])


def test_two_values_for_one_memory_are_refused() -> None:
    source = {"embed.weight": torch.zeros(5, 3), "head.weight": torch.ones(5, 3)}
    target = Tied()
    before = values(target)
    with pytest.raises(Conflict, match=r"embed.weight and head.weight share memory .* different values"):
        plan_transfer(source, target).apply(target, source)
    assert unchanged(target, before)


def test_counters_that_old_files_lack_are_harmless() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    old = {name: t for name, t in net.state_dict().items() if "num_batches" not in name}
    plan = plan_transfer(old, nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)))
    (step,) = [step for step in plan.steps if step.action == "keep"]
    assert step.why == "harmless: old files lack it"
    assert plan.coverage == 1.0


# -- 13: what is not loaded -------------------------------------------------------------------------------------


def test_what_is_not_loaded_keeps_its_own_values_which_must_be_some() -> None:
    source, target = LeNet5(), LeNet6()
    plan = plan_transfer(source, target, expect=MEANT, freeze="loaded")
    listed = {step.target for step in plan.steps if step.action == "keep"}
    assert listed == {"fc.5.weight", "fc.5.bias", "fc.7.weight", "fc.7.bias"}
    lines = {tuple(line.split()[:2]) for line in str(plan).splitlines()}
    assert {("keep", name) for name in listed} <= lines
    with torch.no_grad():
        target.fc[7].bias[0] = float("nan")
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    with pytest.raises(Invalid, match=r"fc\.7\.bias is not loaded, and holds NaN .* initialise it first"):
        plan.apply(target, source)
    assert all(torch.equal(before[n], t) for n, t in target.state_dict().items() if n != "fc.7.bias")
    with pytest.raises(Invalid, match="on the meta device; give it memory"):
        plan.apply(on_meta(LeNet6), source)


# -- 7: the versions of layers ---------------------------------------------------------------------------------


def test_metadata_follows_renamed_keys() -> None:
    source = nn.ModuleDict({"old": nn.BatchNorm1d(3), "fc": nn.Linear(3, 3)})
    target = nn.ModuleDict({"new": nn.BatchNorm1d(3), "fc": nn.Linear(3, 3)})
    plan = plan_transfer(source, target, rename=["old.*=new.*"])
    state = plan.state_dict(target, source)
    assert list(state) == [step.target for step in plan.loaded]
    assert state._metadata["new"] == source.state_dict()._metadata["old"] == {"version": 2}
    assert "old" not in state._metadata
    target.load_state_dict(state)
    assert torch.equal(target["fc"].weight, source["fc"].weight)


# -- 14: a plan is data --------------------------------------------------------------------------------------


def test_a_plan_is_saved_edited_and_replayed(registry: Registry, tmp_path: Path) -> None:
    plan = plan_transfer("lenet5", LeNet6(), expect=MEANT, registry=registry)
    plan.save(tmp_path / "plan.json")
    assert TransferPlan.load(tmp_path / "plan.json") == plan
    document = json.loads((tmp_path / "plan.json").read_text())
    for step in document["steps"]:
        if step["target"] == "fc.3.bias":
            step["action"] = "keep"
    edited = TransferPlan.from_json(json.dumps(document))
    target = LeNet6()
    before = values(target)
    edited.apply(target, registry=registry)
    assert torch.equal(target.fc[3].bias, before["fc.3.bias"])
    assert not torch.equal(target.fc[3].weight, before["fc.3.weight"])


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        (lambda d: d["steps"][0].update(target=d["steps"][1]["target"]), Conflict, "both go to conv.0.bias"),
        (lambda d: d["steps"][0].update(source="conv.9.weight"), Incompatible, "has no conv.9.weight"),
        (lambda d: d["steps"][0].update(source="fc.1.weight"), Incompatible, "fc.1.weight has shape"),
        (lambda d: d["steps"].pop(0), Incompatible, "the plan has no step for conv.0.weight"),
        (lambda d: d["steps"][0].update(target="x"), Incompatible, "the network has no x|has no step for"),
        (lambda d: d["steps"][0].update(action="burn"), Invalid, "action"),
        (lambda d: d["steps"][0].update(typo=1), Invalid, "typo"),
        (lambda d: d.update(schema=9), Invalid, "has schema 9, this version knows 1"),
        (lambda d: d["steps"][0].pop("source"), Invalid, "needs a source and a target"),
        (lambda d: d["steps"][0].update(action="make"), Invalid, "needs a target and the adapter identity"),
        (lambda d: d.update(freeze=["cnv.*"]), Invalid, "'cnv.*' matches nothing; it is a typo"),
        (lambda d: d.update(freeze=["*"]), Invalid, "leaves no parameter to train"),
        (lambda d: d.update(min_coverage=0.99), Incompatible, "less than the 99% that the plan asks for"),
    ],
)
def test_a_plan_that_was_edited_wrongly_changes_nothing(
    registry: Registry, change: Any, error: type[Exception], told: str
) -> None:
    plan = plan_transfer("lenet5", LeNet6(), expect=MEANT, registry=registry)
    document = json.loads(plan.to_json())
    change(document)
    target = LeNet6()
    before = values(target)
    with pytest.raises(error, match=told):
        TransferPlan.from_json(json.dumps(document)).apply(target, registry=registry)
    assert unchanged(target, before)


def test_files_that_are_no_plan(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        TransferPlan.load(tmp_path / "none.json")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(Invalid, match=r"x\.json"):
        TransferPlan.load(tmp_path / "x.json")


def test_a_plan_is_recorded_with_what_came_of_it(registry: Registry) -> None:
    target = LeNet6()
    plan = plan_transfer("lenet5", target, expect=MEANT, freeze="loaded", registry=registry)
    plan.apply(target, registry=registry)
    with registry.run("lenet6", plan=plan) as run:
        run.save(model=target)
        run.save(model=target)
    first, second = registry["lenet6:v1"], registry["lenet6:v2"]
    assert first.lineage == [{"kind": "transferred-from", "parent": registry["lenet5"].id}]
    assert TransferPlan.from_json(json.dumps(first.provenance["plan"])) == plan
    assert second.lineage == []
    assert len(second.provenance["frozen"]["model"]) == 8


# -- freezing in a plan, and torchvision ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("freeze", "told"),
    [("cnv.*", "matches nothing; it is a typo"), ("*", "leaves no parameter to train")],
)
def test_a_freeze_that_makes_no_sense_is_refused(freeze: str, told: str) -> None:
    with pytest.raises(Invalid, match=told):
        plan_transfer(LeNet5(), LeNet6(), expect=MEANT, freeze=freeze)


@pytest.mark.parametrize("name", torchvision.models.list_models(torchvision.models))
def test_every_classifier_of_torchvision_transfers_all_but_its_head(name: str) -> None:
    given: dict[str, Any] = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    source = on_meta(lambda: torchvision.models.get_model(name, weights=None, **given))
    target = on_meta(lambda: torchvision.models.get_model(name, weights=None, num_classes=10, **given))
    plan = plan_transfer(source, target, everything=True)
    kept = [step for step in plan.steps if step.action != "copy"]
    heads = {step.target.rpartition(".")[0] for step in kept if step.target}
    assert 1 <= len(heads) <= 3
    assert all(step.why == "SHAPE" for step in kept)
    assert all(isinstance(target.get_submodule(head), nn.Linear | nn.Conv2d) for head in heads)
    assert len(plan.loaded) + len(kept) == len(target.state_dict())


# -- names with brackets ---------------------------------------------------------------------------------------


class Bracketed(nn.Module):
    """A network whose names have brackets, as those of a `ParameterDict` may."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({"block[0]": nn.Linear(4, 4), "block0": nn.Linear(4, 4)})
        self.heads = nn.ParameterDict({"head[a*]": torch.randn(outputs), "plain": torch.randn(3)})


def test_the_patterns_that_an_error_advises_fit_names_with_brackets() -> None:
    source, target = Bracketed(2), Bracketed(5)
    with pytest.raises(Incompatible, match="not expected") as caught:
        plan_transfer(source, target)
    advised = eval(f"dict({caught.value.fixes[-1].python})")
    assert advised == {"expect": {"heads.head[[]a[*]]": "skip"}}
    plan = plan_transfer(source, target, **advised)
    assert [step.target for step in plan.steps if step.action == "keep"] == ["heads.head[a*]"]
    del source.layers["block[0]"]
    with pytest.raises(Incompatible) as caught:
        plan_transfer(source, target, everything=False)
    advised = eval(f"dict({caught.value.fixes[-1].python})")
    assert advised["expect"]["layers.block[[]0].*"] == "new"
    assert len(plan_transfer(source, target, **advised).loaded) == 3


def test_a_name_with_brackets_fits_itself_and_nothing_else() -> None:
    model = Bracketed(2)
    freeze(model, "layers.block[0].weight")
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["layers.block[0].weight"]
    unfreeze(model, "layers.block[0].weight")
    assert all(p.requires_grad for p in model.parameters())
    del model.layers["block0"]
    with pytest.raises(
        Invalid, match=r"brackets stand for one of several characters; write it as layers.block\[\[\]0\].\*"
    ):
        freeze(model, "layers.block[0].*")
    freeze(model, "layers.block[[]0].*")
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == [
        "layers.block[0].weight",
        "layers.block[0].bias",
    ]


def test_freezing_what_is_loaded_freezes_no_other_name_that_its_brackets_fit() -> None:
    source, target = Bracketed(2), Bracketed(2)
    del source.layers["block0"]
    plan = plan_transfer(source, target, everything=True, freeze="loaded")
    plan.apply(target)
    assert [name for name, p in target.named_parameters() if p.requires_grad] == [
        "layers.block0.weight",
        "layers.block0.bias",
    ]


# -- one rule for all names ------------------------------------------------------------------------------------


def encoder() -> nn.Sequential:
    return nn.Sequential(
        *(nn.ModuleDict({"attention": nn.Linear(4, 4), "output": nn.Linear(4, 4)}) for _ in range(3))
    )


def wrapped_by_peft(network: nn.Module) -> dict[str, torch.Tensor]:
    """A state dict with the names that PEFT's LoRA gives a network in which it wraps `attention`."""
    found = {}
    for name, value in network.state_dict().items():
        if ".attention." in name:
            layer, _, leaf = name.rpartition(".")
            found[f"base_model.model.{layer}.base_layer.{leaf}"] = value
            if leaf == "weight":
                found[f"base_model.model.{layer}.lora_A.default.weight"] = torch.randn(2, 4)
        else:
            found[f"base_model.model.{name}"] = value
    return found


HEADED = {"bert": encoder(), "head": nn.Linear(4, 2)}
SIDES: dict[str, tuple[Any, Any, int, str]] = {
    "into one with a head": (encoder(), nn.ModuleDict(HEADED), 12, "12 of 12 names fit with the prefix"),
    "out of one with a head": (nn.ModuleDict(HEADED), encoder(), 12, "12 of 14 names fit without the prefix"),
    "another prefix": (
        nn.ModuleDict({"bert": encoder(), "pooler": nn.Linear(2, 2)}),
        nn.ModuleDict({"roberta": encoder(), "head": nn.Linear(3, 3)}),
        12,
        "12 of 14 names fit with the other prefix",
    ),
}


@pytest.mark.parametrize("sides", SIDES)
def test_the_rule_that_maps_all_names_is_suggested_with_its_count(sides: str) -> None:
    source, target, count, evidence = SIDES[sides]
    with pytest.raises(Incompatible) as caught:
        plan_transfer(source, target)
    assert caught.value.fixes[0].evidence == evidence
    assert evidence in str(caught.value)
    advised = eval(f"dict({caught.value.fixes[0].python})")
    assert len(plan_transfer(source, target, everything=True, **advised).loaded) == count
    report = diff(source, target)
    assert report.suggestions[0].endswith(f"({evidence})")


@pytest.mark.parametrize("into", [False, True], ids=["from PEFT", "into PEFT"])
def test_a_network_under_peft_fits_the_network_itself(into: bool) -> None:
    plain, wrapped = encoder().state_dict(), wrapped_by_peft(encoder())
    source, target = (plain, wrapped) if into else (wrapped, plain)
    assert len(plan_transfer(source, target, everything=True).loaded) == 12
    with pytest.raises(Incompatible, match=r"lora_A\.default\.weight is in the"):  # no partner
        plan_transfer(source, target)


def test_peft_that_wraps_some_layers_of_a_name_is_told_from_the_others() -> None:
    base = {f"{part}.0.q.{leaf}": torch.randn(3) for part in ("enc", "dec") for leaf in ("weight", "bias")}
    wrapped = {
        f"base_model.model.{name.replace('q.', 'q.base_layer.') if 'enc' in name else name}": value
        for name, value in base.items()
    }
    for source, target in ((base, wrapped), (wrapped, base)):
        plan = plan_transfer(source, target)
        assert len(plan.loaded) == 4
        assert all(torch.equal(source[step.source], target[step.target]) for step in plan.loaded)


def test_what_peft_saves_whole_is_mapped_too() -> None:
    base = {"q.weight": torch.randn(3), "classifier.weight": torch.randn(2)}
    wrapped = {
        "base_model.model.q.base_layer.weight": base["q.weight"],
        "base_model.model.classifier.modules_to_save.default.weight": base["classifier.weight"],
        "base_model.model.classifier.original_module.weight": torch.randn(2),
    }
    for source, target in ((base, wrapped), (wrapped, base)):
        plan = plan_transfer(source, target, everything=True)
        assert all(torch.equal(source[step.source], target[step.target]) for step in plan.loaded)
        assert len(plan.loaded) == 2


ORDERS = {
    "at the top": ({"cls": (3,), "a.w": (2,)}, {"tok.cls": (3,), "b.w": (2,)}),
    "nested": ({"fc.w": (2,), "fc.sub.w": (3,)}, {"head.w": (2,), "body.w": (3,)}),
}


@pytest.mark.parametrize("kind", ORDERS)
def test_rules_by_the_order_of_layers_work_as_they_are_told(kind: str) -> None:
    source, target = ({n: torch.randn(shape) for n, shape in side.items()} for side in ORDERS[kind])
    with pytest.raises(Incompatible) as caught:
        plan_transfer(source, target)
    advised = eval(f"dict({caught.value.fixes[0].python})")
    assert len(plan_transfer(source, target, **advised).loaded) == len(source)


def test_a_source_of_another_dtype_altogether_is_told_as_that() -> None:
    with pytest.raises(
        Incompatible,
        match="no dtype fits, weight is float32 against float64; if that is meant: allow_cast=True",
    ):
        plan_transfer(nn.Linear(2, 2).double(), nn.Linear(2, 2))


def test_thousands_of_differences_are_told_in_a_line_that_can_be_read() -> None:
    names = [f"layers.{i}.experts.{j}.w" for i in range(40) for j in range(40)]
    source = {name: torch.ones(2) for name in names} | {"x.y": torch.ones(7)}
    target = {name.replace("experts", "other").replace(".w", ".v"): torch.ones(2) for name in names}
    target |= {"x.y": torch.ones(7)}
    with pytest.raises(Incompatible, match="if that is meant: everything=True") as caught:
        plan_transfer(source, target)
    assert len(str(caught.value)) < 1_000


@pytest.mark.parametrize(
    "options",
    [
        {"expect": "weight"},
        {"adapters": "identity"},
        {"rename": "a=b"},
        {"rename": {"a": "b"}},
        {"freeze": True},
    ],
)
def test_arguments_of_the_wrong_kind_are_refused_in_one_line(options: dict[str, Any]) -> None:
    with pytest.raises(Invalid, match="expected"):
        plan_transfer(LeNet5(), LeNet6(), **options)


def test_a_rule_that_would_cost_more_than_it_brings_is_not_suggested() -> None:
    """Most names fit as they are, and the rule would rename them, too."""
    source = {f"layer.{i}.w": torch.randn(i + 1) for i in range(9)} | {"extra.w": torch.randn(99)}
    target = {f"layer.{i}.w": torch.randn(i + 1) for i in range(9)} | {"net.extra.w": torch.randn(99)}
    assert list(diff(source, target).suggestions) == [
        "--rename extra.w=net.extra.w  (the only ones of shape [99])"
    ]


def test_errors_say_what_to_add_in_the_language_of_the_caller() -> None:
    source, target = LeNet5(), LeNet6()
    with pytest.raises(Incompatible) as caught:
        plan_transfer(source, target)
    assert "expect={'fc.5.*': 'skip', 'fc.7.*': 'new'}" in str(caught.value)
    assert "--" not in str(caught.value)
    what, advice = caught.value.for_command_line()
    assert what == "LeNet5 and LeNet6 differ in 4 tensors that were not expected to"
    assert advice == "if that is meant: --expect 'fc.5.*=skip' --expect 'fc.7.*=new'"
    assert caught.value.differences[0] == ("~", "fc.5.weight", "10×84 → 64×84", "other shape")
    assert [(one.sign, one.name) for one in caught.value.differences[2:]] == [
        ("+", "fc.7.weight"),
        ("+", "fc.7.bias"),
    ]
    copied = pickle.loads(pickle.dumps(caught.value))
    assert (str(copied), copied.for_command_line()) == (str(caught.value), (what, advice))
    assert copied.differences == caught.value.differences


def test_float8_is_cast_where_that_is_allowed() -> None:
    source = {"weight": torch.randn(3, 2).to(torch.float8_e4m3fn), "bias": torch.zeros(3)}
    with pytest.raises(Incompatible, match="allow_cast"):
        plan_transfer(source, nn.Linear(2, 3))
    net = plan_transfer(source, nn.Linear(2, 3), allow_cast=True).apply(nn.Linear(2, 3))
    assert torch.equal(net.weight, source["weight"].to(torch.float32))
