"""Matching: every name of two sides in exactly one category; the known answers; numbers that shift."""

from __future__ import annotations

import json
import math
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from registry import Registry, diff
from registry.models import LeNet5, LeNet6
from registry.store.errors import Conflict, Invalid, NotFound, Unsupported
from registry.transfer import values as transfer_values
from registry.transfer.matching import Category, Pair, match
from registry.transfer.renames import without_wrappers
from registry.transfer.report import LayerDifference
from registry.transfer.report_rows import grouped
from registry.transfer.sources import side_of


def matched(a: Any, b: Any, **given: Any) -> list[Pair]:
    return match(side_of(a), side_of(b), **given)


def categories(a: Any, b: Any, **given: Any) -> dict[str, str]:
    return {pair.name: str(pair.category) for pair in matched(a, b, **given)}


def state(**shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    return {name.replace("__", "."): torch.randn(shape) for name, shape in shapes.items()}


# -- known answers -------------------------------------------------------------------------------------------


def test_resnet18_with_1000_and_with_10_classes() -> None:
    with torch.device("meta"):
        report = diff(torchvision.models.resnet18(), torchvision.models.resnet18(num_classes=10))
    assert report.headline == "COMPATIBLE, 2 differences"
    assert {c: n.names for c, n in report.counts.items()} == {"MATCH": 120, "SHAPE": 2}
    assert [row.name for row in report.rows if row.category == Category.SHAPE] == ["fc.weight", "fc.bias"]
    assert (report.loadable.elements, report.target.elements) == (11_176_512, 11_181_642)
    assert report.target.elements - report.loadable.elements == 5_130
    assert "(99.95%)" in str(report)


def test_lenet5_and_lenet6() -> None:
    found = categories(LeNet5(), LeNet6())
    assert Counter(found.values()) == {"MATCH": 8, "SHAPE": 2, "ONLY_B": 2}
    assert {name for name, category in found.items() if category == "SHAPE"} == {"fc.5.weight", "fc.5.bias"}
    assert {name for name, category in found.items() if category == "ONLY_B"} == {"fc.7.weight", "fc.7.bias"}


# -- categories ----------------------------------------------------------------------------------------------


def test_every_category() -> None:
    net = nn.Module()
    net.register_parameter("kind", nn.Parameter(torch.ones(2)))
    other = nn.Module()
    other.register_buffer("kind", torch.ones(2))
    assert categories(net, other) == {"kind": "KIND"}
    a = state(same=(2,), cast=(2,), shape=(2, 3), gone=(4,), old=(5,), left=(1,), module__pre=(3,))
    b = state(same=(2,), cast=(2,), shape=(3, 2), fresh=(4,), new=(5,), left=(1,), pre=(3,))
    b["cast"] = b["cast"].double()
    found = categories(a, b, rename=["old=new"], exclude=["left"])
    assert found == {
        "same": "MATCH",
        "cast": "CAST",
        "shape": "SHAPE",
        "gone": "ONLY_A",
        "fresh": "ONLY_B",
        "new": "RENAMED",
        "left": "EXCLUDED",
        "pre": "PREFIX",
    }
    (shape,) = [pair for pair in matched(a, b) if pair.category == Category.SHAPE]
    assert shape.note == "transposed"


NAMES = st.lists(
    st.lists(
        st.sampled_from(["module", "layer", "fc", "0", "1", "2", "_orig_mod", "weight"]),
        min_size=1,
        max_size=4,
    ),
    max_size=8,
)


@given(NAMES, NAMES, st.data())
@settings(max_examples=300)
def test_every_name_is_in_exactly_one_category(
    left: list[list[str]], right: list[list[str]], data: Any
) -> None:
    shapes = st.sampled_from([(), (2,), (2, 3), (3, 2)])
    a, b = (
        {".".join(parts): torch.zeros(data.draw(shapes)) for parts in names} | {"x": torch.zeros(1)}
        for names in (left, right)
    )
    pairs = matched(a, b)
    assert Counter(pair.a.name for pair in pairs if pair.a) == Counter(list(a))
    assert Counter(pair.b.name for pair in pairs if pair.b) == Counter(list(b))


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("module.fc.weight", "fc.weight"),
        ("module._orig_mod.module.fc.weight", "fc.weight"),
        ("features.module.0._fsdp_wrapped_module.weight", "features.0.weight"),
        ("layer._checkpoint_wrapped_module.bias", "layer.bias"),
        ("base_model.model.fc.base_layer.weight", "fc.weight"),
        ("module.base_model.model.model.fc.weight", "model.fc.weight"),
        ("model.fc.weight", "model.fc.weight"),
        ("fc.base_model.model.weight", "fc.base_model.model.weight"),
        ("mymodule.fc.weight", "mymodule.fc.weight"),
        ("fc_module.weight", "fc_module.weight"),
    ],
)
def test_wrappers_are_whole_components(name: str, plain: str) -> None:
    assert without_wrappers(name) == plain


def test_a_real_submodule_called_module_survives() -> None:
    a = state(module__fc=(2,), body=(3,))
    assert categories(a, state(module__fc=(2,), body=(3,))) == {"module.fc": "MATCH", "body": "MATCH"}
    wrapped = state(module__module__fc=(2,), module__body=(3,))
    assert categories(wrapped, a) == {"module.fc": "PREFIX", "body": "PREFIX"}
    twice = state(module__fc=(2,), _orig_mod__fc=(2,))
    assert categories(twice, state(fc=(2,))) == {
        "module.fc": "AMBIGUOUS",
        "_orig_mod.fc": "AMBIGUOUS",
        "fc": "AMBIGUOUS",
    }


@pytest.mark.parametrize(
    ("rule", "old", "new"),
    [
        ("backbone.*=*", "backbone.conv1.weight", "conv1.weight"),
        ("backbone.*.weight=body.*.w", "backbone.conv1.weight", "body.conv1.w"),
        ("**.gamma=**.weight", "a.b.gamma", "a.b.weight"),
        ("layer*.x=stage*.x", "layer12.x", "stage12.x"),
        (r"re:(.*)\.gamma=\1.weight", "a.gamma", "a.weight"),
        (r"a\=1.*=b=2.*", "a=1.w", "b=2.w"),
        (r"re:([^\=]+)\=(\d)\.w=\1=\2", "a=1.w", "a=1"),
    ],
)
def test_renames(rule: str, old: str, new: str) -> None:
    a, b = {old: torch.ones(2), "x": torch.ones(1)}, {new: torch.ones(2), "x": torch.ones(1)}
    assert categories(a, b, rename=[rule])[new] == "RENAMED"
    assert categories({"other": torch.ones(2), old: torch.ones(2)}, b, rename=[rule])["other"] == "ONLY_A"


@pytest.mark.parametrize(
    ("rules", "error", "told"),
    [
        (["a.*=c", "b.*=c"], Conflict, "a.x and b.x are both renamed to c"),
        (["nothing.*=*"], Invalid, r"'nothing\.\*=\*' fits no name"),
        (["abc"], Invalid, "is malformed; write it as old=new"),
        (["re:(=x"], Invalid, "is malformed"),
        (["a=*"], Invalid, "more stars on the right"),
        (["a\\=c"], Invalid, "is malformed; write it as old=new"),
    ],
)
def test_renames_that_make_no_sense(rules: list[str], error: type[Exception], told: str) -> None:
    a, b = state(a__x=(2,), b__x=(2,)), state(c=(2,))
    with pytest.raises(error, match=told):
        matched(a, b, rename=rules)


def test_weight_norm_before_and_after_it_was_a_parametrization() -> None:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        old = nn.utils.weight_norm(nn.Linear(3, 2))
    new = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    for a, b in ((old, new), (new, old)):
        assert Counter(categories(a, b).values()) == {"MATCH": 1, "RENAMED": 2}


def test_ties() -> None:
    tied = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
    tied["head"].weight = tied["embed"].weight
    assert categories(tied.state_dict(), {"embed.weight": torch.randn(5, 3)}) == {
        "embed.weight": "MATCH",
        "head.weight": "TIED",
    }
    assert categories({"embed.weight": torch.randn(5, 3)}, tied)["head.weight"] == "TIED"


# -- positions -----------------------------------------------------------------------------------------------


def layers(*sizes: tuple[int, int], every: int = 2) -> nn.Sequential:
    parts: list[nn.Module] = []
    for a, b in sizes:
        parts += [nn.Linear(a, b), nn.ReLU()][:every]
    return nn.Sequential(*parts)


def test_an_inserted_layer_of_the_same_shape_is_flagged() -> None:
    found = categories(layers((4, 4), (4, 4)), layers((4, 4), (4, 4), (4, 4)))
    assert {found[name] for name in ("0.weight", "2.weight")} == {"POSITIONAL"}


def test_an_appended_layer_of_another_shape_is_not() -> None:
    found = categories(layers((4, 5), (5, 6)), layers((4, 5), (5, 6), (6, 7)))
    assert {name: c for name, c in found.items() if c != "ONLY_B"} == dict.fromkeys(
        ("0.weight", "0.bias", "2.weight", "2.bias"), "MATCH"
    )


def test_another_class_at_the_same_place_is_flagged() -> None:
    a = nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
    b = nn.Sequential(nn.InstanceNorm2d(4, affine=True, track_running_stats=True), nn.Conv2d(4, 4, 1))
    found = categories(a, b)
    assert found["0.weight"] == "POSITIONAL"
    assert found["1.weight"] == "MATCH"


def test_blocks_of_a_deeper_resnet_are_flagged() -> None:
    found = categories("torchvision:resnet18", "torchvision:resnet34")
    assert found["conv1.weight"] == "MATCH"
    assert found["layer1.1.conv1.weight"] == "POSITIONAL"
    assert found["layer2.0.conv1.weight"] == "MATCH"  # the only one with a stride


def test_no_alignment_is_offered_where_several_fit() -> None:
    deeper = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Linear(4, 4))
    report = diff(nn.Sequential(nn.Linear(4, 4)), deeper)
    assert report.counts[Category.POSITIONAL].names == 1
    assert not report.suggestions


def test_an_alignment_is_offered_where_only_one_fits() -> None:
    a, b = layers((4, 5), (5, 6)), layers((3, 4), (4, 5), (5, 6))
    report = diff(a, b)
    assert {str(row.category) for row in report.rows if row.name.startswith("0.")} == {"SHAPE"}
    mixed = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 5))
    deeper = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 5))
    assert {p.category for p in matched(mixed, deeper) if p.name == "1.bias"} == {"SHAPE"}
    a, b = nn.Sequential(nn.Linear(3, 3)), nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3))
    a.append(nn.BatchNorm1d(3))
    b.append(nn.BatchNorm1d(3))
    found = diff(a, b)
    assert {str(row.category) for row in found.rows if row.name == "1.bias"} == {"POSITIONAL"}
    rules = "--rename '0.*=1.*' --rename '1.*=2.*'  (the only order in which the layers fit)"
    assert rules in found.suggestions
    moved = categories(a, b, rename=["0.*=1.*", "1.*=2.*"])
    assert {moved[name] for name in ("1.weight", "2.weight", "2.running_mean")} == {"RENAMED"}


# -- suggestions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b", "told"),
    [
        (
            state(backbone__a__w=(2,), backbone__b__w=(3,)),
            state(a__w=(2,), b__w=(3,)),
            ["--rename 'backbone.*=*'  (2 of 2 names fit without the prefix)"],
        ),
        (
            state(a__w=(2,), b__w=(3,)),
            state(net__a__w=(2,), net__b__w=(3,)),
            ["--rename '**=net.**'  (2 of 2 names fit with the prefix)"],
        ),
        (
            state(c1__weight=(2, 2), c1__bias=(2,), c2__weight=(2, 2), c2__bias=(2,)),
            state(d1__weight=(2, 2), d1__bias=(2,), d2__weight=(2, 2), d2__bias=(2,)),
            ["--rename 'c1.*=d1.*' --rename 'c2.*=d2.*'  (the same 2 shapes in the same order)"],
        ),
        (
            state(x__one=(7,), same=(1,)),
            state(y__two=(7,), same=(1,)),
            ["--rename x.one=y.two  (the only ones of shape [7])"],
        ),
        (
            state(x__gamma=(4,), x__beta=(4,), z=(9, 9)),
            state(y__beta=(4,), y__alpha=(4,)),
            ["--rename x.beta=y.beta  (the only beta of shape [4])"],
        ),
        (
            state(x__gamma=(4,), y__gamma=(4,), q=(1, 1)),
            state(x__weight=(4,), z__scale=(4,)),
            ["--rename x.gamma=x.weight  (the only ones of shape [4] in x)"],
        ),
        (
            {"x=1.one": torch.ones(7), "same": torch.ones(1)},
            {"y=2.two": torch.ones(7), "same": torch.ones(1)},
            [r"--rename 'x\=1.one=y=2.two'  (the only ones of shape [7])"],
        ),
        (
            {"net=a.one": torch.ones(7), "net=a.two": torch.ones(8)},
            {"one": torch.ones(7), "two": torch.ones(8)},
            [r"--rename 'net\=a.*=*'  (2 of 2 names fit without the prefix)"],
        ),
        (state(a=(4,), b=(4,)), state(c=(4,), d=(4,), e=(4,)), []),  # ambiguous: nothing is chosen
    ],
    ids=["prefix", "added", "order", "shape", "leaf", "parent", "equals sign", "and prefix", "ambiguous"],
)
def test_renames_are_suggested_with_their_evidence(a: Any, b: Any, told: list[str]) -> None:
    report = diff(a, b)
    assert list(report.suggestions) == told
    assert not {"RENAMED"} & {str(row.category) for row in report.rows}  # and never applied
    for line in told:
        rules = line.partition("  (")[0].removeprefix("--rename ").split(" --rename ")
        assert "RENAMED" in categories(a, b, rename=[rule.strip("'") for rule in rules]).values()


# -- architecture --------------------------------------------------------------------------------------------


def test_layers_without_parameters_are_compared_too() -> None:
    def net(stride: int, p: float, eps: float, act: nn.Module) -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 2, 3, stride), nn.BatchNorm2d(2, eps), act, nn.Dropout(p))

    report = diff(net(1, 0.5, 1e-5, nn.ReLU()), net(2, 0.1, 1e-3, nn.Tanh()))
    found = {layer.path: (layer.a, layer.b) for layer in report.architecture}
    assert found["2"] == ("ReLU()", "Tanh()")
    assert found["3"] == ("Dropout(p=0.5, inplace=False)", "Dropout(p=0.1, inplace=False)")
    assert ["eps=1e-05" in text for text in found["1"]] == [True, False]  # type: ignore[operator,union-attr]
    assert "stride=(2, 2)" in str(found["0"][1])
    assert diff(LeNet5(), LeNet6()).architecture[0] == LayerDifference(path="", a="LeNet5", b="LeNet6")
    assert not diff(LeNet5(), LeNet5()).architecture


# -- sides and reports ---------------------------------------------------------------------------------------


def test_sides_of_every_kind_agree(tmp_path: Path) -> None:
    import safetensors.torch

    registry = Registry(tmp_path / "r")
    net = LeNet5()
    with registry.run("lenet5") as run:
        run.save(model=net)
    torch.save({"epoch": 1, "model_state_dict": net.state_dict()}, tmp_path / "a.pt")
    safetensors.torch.save_file(net.state_dict(), tmp_path / "a.safetensors")
    names = list(net.state_dict())
    (tmp_path / "shards").mkdir()
    for i, part in enumerate((names[:4], names[4:])):
        tensors = {name: net.state_dict()[name] for name in part}
        safetensors.torch.save_file(tensors, tmp_path / "shards" / f"{i}.safetensors")
    index = {"weight_map": {name: f"{int(name in names[4:])}.safetensors" for name in names}}
    (tmp_path / "shards" / "model.safetensors.index.json").write_text(json.dumps(index))
    sides = [
        tmp_path / "shards" / "model.safetensors.index.json",
        "lenet5:v1",
        tmp_path / "a.pt",
        str(tmp_path / "a.safetensors"),
        net,
        (LeNet5(), "lenet5"),
    ]
    for a in sides:
        for b in sides:
            assert registry.diff(a, b).verdict == "IDENTICAL"
    assert registry.diff("lenet5", "lenet6").headline == "COMPATIBLE, 4 differences"
    notes = registry.diff(tmp_path / "a.pt", net).a.notes
    assert notes == (
        "a.pt: the tensors are under the key 'model_state_dict'; the file also holds: extra",
    ) or ("'model_state_dict'" in notes[0])


def test_what_is_no_side_says_so(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "r")
    cases: list[tuple[Any, type[Exception], str]] = [
        ("nothing", NotFound, "there is no model 'nothing'"),
        ("torchvision:resnet19", NotFound, "did you mean resnet1"),
        (tmp_path / "none.pt", NotFound, r"none\.pt"),
        (5, Invalid, "a int cannot be compared"),
        ({}, Invalid, "holds no tensors"),
        (nn.ReLU(), Invalid, "has no parameters"),
        (nn.LazyLinear(3), Unsupported, "is not initialised yet; run one batch"),
    ]
    for source, error, told in cases:
        with pytest.raises(error, match=told):
            registry.diff(source, LeNet5())


@pytest.mark.damages
def test_structure_is_compared_without_reading_a_tensor(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "r")
    for seed in (0, 1):
        torch.manual_seed(seed)
        with registry.run("lenet5") as run:
            run.save(model=LeNet5())
    for pack in (registry.root / "packs").rglob("*.safetensors"):
        pack.unlink()
    report = registry.diff("lenet5:v1", "lenet5:v2")
    assert (report.verdict, report.exceptions) == ("SAME STRUCTURE", 0)
    assert {row.equal for row in report.rows} == {False}


def test_values_are_measured_in_double_precision() -> None:
    a = {"w": torch.tensor([1.0, 2.0, -2.0]), "same": torch.ones(2), "odd": torch.tensor([1.0, float("nan")])}
    b = {"w": torch.tensor([1.0, 2.0, 4.0]), "same": torch.ones(2), "odd": torch.tensor([2.0, float("nan")])}
    report = diff(a, b, values=True)
    found = {change.name: change for change in report.changes}
    assert set(found) == {"w", "odd"}
    assert found["w"].norm == 6.0
    assert found["w"].relative == 2.0
    assert found["w"].cosine == pytest.approx((1 + 4 - 8) / (3 * 21**0.5))
    assert (found["w"].largest, found["w"].changed) == (6.0, pytest.approx(1 / 3))
    assert (found["odd"].nonfinite_a, found["odd"].changed, found["odd"].norm) == (1, 0.5, 1.0)
    big = {"w": torch.full((10,), 1e30)}
    (change,) = diff(big, {"w": torch.full((10,), 3e30)}, values=True).changes
    assert change.relative == pytest.approx(2.0)
    with warnings.catch_warnings():  # squares that overflow are no news
        warnings.simplefilter("error")
        huge = torch.full((10_000,), 1e200, dtype=torch.float64)
        (change,) = diff({"w": huge}, {"w": 2 * huge}, values=True).changes
    assert (change.changed, change.largest) == (1.0, 1e200)


def test_the_change_of_a_module_is_that_of_its_tensors() -> None:
    a = {"m.w": torch.zeros(2), "m.b": torch.tensor([3.0]), "n.w": torch.ones(1)}
    b = {"m.w": torch.tensor([2.0, 1.0]), "m.b": torch.tensor([5.0]), "n.w": torch.ones(1)}
    (module,) = diff(a, b, values=True).modules
    assert (module.module, module.tensors, module.norm) == ("m", 2, 3.0)
    assert module.relative == 1.0


def test_a_counter_says_nothing_of_how_far_its_module_moved() -> None:
    """BatchNorm counts its batches."""
    a = {"m.w": torch.ones(4), "m.num_batches_tracked": torch.tensor(100), "n.ids": torch.tensor([1, 2])}
    b = {
        "m.w": torch.ones(4) * 1.01,
        "m.num_batches_tracked": torch.tensor(900),
        "n.ids": torch.tensor([1, 3]),
    }
    report = diff(a, b, values=True)
    assert {one.name for one in report.changes} == set(a)
    relative = {one.module: one.relative for one in report.modules}
    assert relative["m"] == pytest.approx(0.01, rel=1e-3)
    assert relative["n"] > 0.4
    in_tree = {one.path: one.relative for one in report.modules_changed()}
    assert in_tree["m"] == pytest.approx(0.01, rel=1e-3)


def test_large_tensors_are_measured_whole_and_every_dtype_is() -> None:
    torch.manual_seed(0)
    a = torch.randn(1_000_003)
    b = a + torch.randn_like(a) * 0.01
    b[::2] = a[::2]
    (change,) = diff({"w": a}, {"w": b}, values=True).changes
    step = (b - a).double()
    assert change.norm == pytest.approx(float(step.norm()), rel=1e-6)
    assert change.changed == pytest.approx(float((step != 0).double().mean()))
    cosine = torch.cosine_similarity(a.double(), b.double(), dim=0)
    assert change.cosine == pytest.approx(float(cosine), rel=1e-9)
    for dtype in (
        torch.bfloat16,
        torch.float16,
        torch.float8_e4m3fn,
        torch.int8,
        torch.bool,
        torch.complex64,
    ):
        one, other = torch.tensor([1, 0, 1]).to(dtype), torch.tensor([1, 1, 1]).to(dtype)
        (change,) = diff({"w": one}, {"w": other}, values=True).changes
        assert (change.norm, change.largest) == (1.0, 1.0), dtype
        assert not diff({"w": one}, {"w": one.clone()}, values=True).changes


@pytest.fixture(params=["compiled", "numpy"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How chunks of float32 are summed up; compiled only where a compiler was found."""
    if request.param == "numpy":
        monkeypatch.setattr(transfer_values, "_compiled", None)
    elif transfer_values._compiled is None:
        pytest.skip("no compiler built it")
    return str(request.param)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("scale", [1e-38, 1e-25, 1e-12, 1.0, 1e15, 1e30])
@pytest.mark.parametrize("distance", [1e-3, 1.0])
def test_norms_are_right_whatever_the_size_of_the_numbers(
    dtype: torch.dtype, scale: float, distance: float
) -> None:
    if dtype is torch.float16:
        scale = {1e-38: 1e-7, 1e-25: 1e-6, 1e-12: 1e-5, 1e15: 1e2, 1e30: 1e4}.get(scale, scale)
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(300_001, generator=generator, dtype=torch.float64)
    b = a + distance * torch.randn(300_001, generator=generator, dtype=torch.float64)
    b[::3] = a[::3]
    a[:70_000] = b[:70_000] = 0
    one, other = (scale * a).to(dtype), (scale * b).to(dtype)
    (change,) = diff({"w": one}, {"w": other}, values=True).changes
    before, step = one.double(), other.double() - one.double()
    assert change.norm == pytest.approx(float(step.norm()), rel=1e-7)
    assert change.relative == pytest.approx(float(step.norm() / before.norm()), rel=1e-7)
    assert change.largest == pytest.approx(float(step.abs().max()), rel=1e-6)
    assert change.changed == pytest.approx(float((step != 0).double().mean()))
    cosine = float(before @ other.double() / before.norm() / other.double().norm())
    assert change.cosine == pytest.approx(cosine, rel=1e-7)
    assert change.nonfinite_a == change.nonfinite_b == 0


@pytest.mark.usefixtures("way")
def test_numbers_that_are_not_finite_are_counted_in_large_tensors_and_the_rest_is_measured() -> None:
    a, b = torch.ones(200_000), torch.ones(200_000)
    b[150_000] = 3.0
    a[7], a[199_999], b[8], b[199_999] = math.nan, math.inf, -math.inf, math.inf
    (change,) = diff({"w": a}, {"w": b}, values=True).changes
    assert (change.norm, change.largest, change.nonfinite_a, change.nonfinite_b) == (2.0, 2.0, 2, 2)
    assert change.changed == pytest.approx(3 / 200_000)


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 1023, 1024, 1025, 5000, 40_001])
def test_compiled_sums_are_those_of_every_element(count: int) -> None:
    if transfer_values._compiled is None:
        pytest.skip("no compiler built it")
    random = np.random.default_rng(count)
    old = random.standard_normal(count).astype(np.float32)
    new = old + random.standard_normal(count).astype(np.float32)
    new[::3] = old[::3]
    step = (new - old).astype(np.float64)
    wide = old.astype(np.float64)
    moved, before, cross, largest, changed = transfer_values._compiled(old, new)
    assert (moved, before) == pytest.approx((step @ step, wide @ wide), rel=1e-6)
    assert cross == pytest.approx(wide @ step, abs=1e-6 * (wide @ wide + 1))
    assert (largest, changed) == (np.abs(step).max(initial=0), np.count_nonzero(step))
    for place in {0, count // 2, count - 1} & set(range(count)):
        for bad in (math.nan, math.inf, -math.inf):
            spoilt = new.copy()
            spoilt[place] = bad
            assert not math.isfinite(transfer_values._compiled(old, spoilt)[0])
            assert not math.isfinite(transfer_values._compiled(spoilt, new)[1])


def test_compiled_sums_are_of_aligned_float32_of_one_length_alone() -> None:
    if transfer_values._compiled is None:
        pytest.skip("no compiler built it")
    fine = np.ones(100, np.float32)
    shifted = np.frombuffer(bytes(401), np.uint8)[1:].view(np.float32)
    for wrong in (fine[1:], fine.astype(np.float64), fine.astype(np.float16), shifted):
        for one, other in ((fine, wrong), (wrong, fine), (wrong, wrong[:0])):
            with pytest.raises(ValueError, match=r"lengths|bytes"):
                transfer_values._compiled(one, other)


@pytest.mark.usefixtures("way")
def test_elements_may_begin_at_any_byte() -> None:
    memory = bytearray(4 * 20_000 + 1)
    shifted = torch.frombuffer(memory, dtype=torch.float32, offset=1)
    a = torch.linspace(1, 2, 20_000)
    shifted.copy_(a)
    shifted[7] += 3
    (change,) = diff({"w": a}, {"w": shifted}, values=True).changes
    assert (change.norm, change.changed) == (pytest.approx(3), 1 / 20_000)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int16, torch.float32, torch.complex128])
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 300_001])
def test_tensors_are_equal_if_each_of_their_bytes_is(dtype: torch.dtype, count: int) -> None:
    a = torch.arange(count).remainder(2).to(dtype)

    def is_equal(b: torch.Tensor) -> bool | None:
        (row,) = diff({"w": a}, {"w": b}).rows
        return row.equal

    assert is_equal(a.clone())
    for place in {0, count // 2, count - 1} & set(range(count)):
        other = a.clone()
        other[place] = int(a[place] == 0)
        assert not is_equal(other), place


def test_many_tensors_are_measured_in_their_order_each_for_itself() -> None:
    sizes = [0, 1, 3_000_000, 20_000, 5, 4_194_305, 70_000]
    a = {f"t{i}": torch.zeros(size) for i, size in enumerate(sizes)}
    b = {name: tensor + i for i, (name, tensor) in enumerate(a.items())}
    found = diff(a, b, values=True).changes
    assert [change.name for change in found] == [f"t{i}" for i in range(1, 7)]
    for change in found:
        i = int(change.name[1:])
        assert change.largest == i
        assert change.norm == pytest.approx(i * sizes[i] ** 0.5)
        assert change.changed == 1.0


def test_configurations_and_metrics_are_compared_beside(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "r")
    for name, lr, accuracy in (("a", 0.1, 0.5), ("b", 0.2, 0.75)):
        with registry.run(name, config={"lr": lr, "epochs": 3}) as run:
            run.save(model=LeNet5(), metrics={"accuracy": accuracy})
    report = registry.diff("a", "b")
    assert [(f.key, f.a, f.b) for f in report.config] == [("lr", 0.1, 0.2)]
    assert [(f.key, f.a, f.b) for f in report.metrics] == [("accuracy", 0.5, 0.75)]


def test_values_are_interpreted_only_where_the_lineage_ties_the_sides(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "r")
    net = LeNet5()
    with registry.run("lenet5") as run:
        run.save(model=net)
        with torch.no_grad():
            net.conv[0].weight.add_(1)
        run.save(model=net)
    with registry.run("stranger") as run:
        run.save(model=LeNet5())
    assert not registry.diff("lenet5:v1", "lenet5:v2", values=True).warnings
    (warning,) = registry.diff("lenet5:v1", "stranger", values=True).warnings
    assert "neither was trained from the other" in warning


def test_numbers_are_merged_only_where_everything_else_is_equal() -> None:
    a = {f"layers.{i}.weight": torch.zeros(2, 3 if i != 4 else 5) for i in range(6)}
    a |= {f"b.{i}.c.{j}.w": torch.zeros(1) for i in range(2) for j in range(2)}
    names = [(group.name, len(group.rows)) for group in grouped(diff(a, a).rows)]
    assert ("layers.{0-3,5}.weight", 5) in names
    assert ("layers.4.weight", 1) in names
    assert sorted(count for name, count in names if name.startswith("b.")) == [2, 2]  # never a cross product


def test_reports_come_in_every_form_and_are_harmless() -> None:
    from registry.reports import html, markdown
    from registry.transfer.report import DiffReport

    hostile = "<script>alert(1)</script>|`x`\x1b[31m"
    report = diff({hostile: torch.ones(1), "ok": torch.ones(2)}, {"ok": torch.ones(2), "n": torch.ones(3)})
    page = html.render(report.blocks())
    assert "<script>alert" not in page
    assert "http" not in page.replace("http-equiv", "")
    assert "\x1b" not in page + markdown.render(report.blocks()) + str(report)
    assert "<script>" not in markdown.render(report.blocks())
    assert DiffReport.model_validate_json(report.model_dump_json(by_alias=True)) == report


def test_a_digit_that_is_no_number_is_a_letter() -> None:
    """The power of two is a digit for Python, and no number."""
    a = {
        "layers.\u00b2.weight": torch.ones(2),
        "layers.0.weight": torch.ones(2),
        "layers.1.weight": torch.ones(2),
    }
    b = {name: torch.ones(3) for name in a}
    assert "layers.{0-1}.weight" in str(diff(a, b))
