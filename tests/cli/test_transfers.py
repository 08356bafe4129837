"""Comparing and transferring from the command line, and the HTML report in a browser."""

from __future__ import annotations

import json
import re
import shutil
import webbrowser
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from conftest import Run
from torch import nn

from registry import Registry, freeze
from registry.live.builders import on_meta
from registry.models import LeNet5, LeNet6, ResNet18, ResNet18Config
from registry.models.classifiers import find_head, replace_head
from registry.store.errors import Invalid, NotFound
from registry.transfer.planning import plan_transfer

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two versions of LeNet5, one of LeNet6, and a working directory beside them."""
    registry = Registry(tmp_path / "r")
    torch.manual_seed(0)
    net = LeNet5()
    with registry.run("lenet5", monitor="accuracy") as run:
        run.save(model=net, epoch=1, metrics={"accuracy": 0.5})
        with torch.no_grad():
            net.conv[0].weight.add_(0.1)
        run.save(model=net, epoch=2, metrics={"accuracy": 0.75})
    with registry.run("lenet6") as run:
        run.save(model=LeNet6(), epoch=2, metrics={"accuracy": 0.625})
    monkeypatch.setenv("REGISTRY_ROOT", str(registry.root))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_exit_status_of_diff(run: Run, root: Path) -> None:
    assert run("diff", "lenet5", "lenet5@best").status == 0
    done = run("diff", "lenet5:v1", "lenet5:v2")
    assert (done.status, done.out.splitlines()[0]) == (1, "SAME STRUCTURE: lenet5:v1 → lenet5:v2")
    done = run("diff", "lenet5", "lenet7")
    assert (done.status, done.out) == (2, "")
    assert done.err.startswith("error: there is no model 'lenet7'\nhint:  did you mean 'lenet")


def test_diff_in_every_form(run: Run, root: Path) -> None:
    text = run("diff", "lenet5:v1", "lenet5:v2", "--values").out
    assert re.search(r"conv\.0 +█{24}  0\.820  1 of 2 changed", text)
    assert "and 4 equal" in text
    assert re.search(
        r"  weight +█+ +0\.\d+  changed", run("diff", "lenet5:v1", "lenet5:v2", "--values", "--tensors").out
    )
    assert "again: registry diff lenet5:v1 lenet5:v2 --values" in text
    document = run("diff", "lenet5", "lenet6", "--json").json
    assert (document["schema"], document["verdict"], document["exceptions"]) == (1, "COMPATIBLE", 4)
    assert json.loads(run("diff", "lenet5", "lenet6", "--format", "json").out) == document
    assert run("diff", "lenet5", "lenet6", "--format", "md").out.startswith("# COMPATIBLE, 4 differences")
    run("diff", "lenet5", "lenet6", "--format", "html", "-o", "d.html")
    assert (root / "d.html").read_text().startswith("<!DOCTYPE html>")


@pytest.mark.parametrize(
    ("browser", "says"), [("/bin/true", ""), ("/bin/false", "no browser could be opened")]
)
def test_a_diff_is_opened_in_the_browser(
    run: Run, root: Path, monkeypatch: pytest.MonkeyPatch, browser: str, says: str
) -> None:
    monkeypatch.setenv("BROWSER", browser)
    monkeypatch.setattr(webbrowser, "_tryorder", None)
    done = run("diff", "lenet5:v1", "lenet5:v2", "--open")
    assert (done.status, done.out.startswith("wrote "), says in done.err) == (1, True, True)
    assert Path(done.out.removeprefix("wrote ").strip()).read_text().startswith("<!DOCTYPE html>")


def test_files_are_compared_without_a_registry(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("REGISTRY_ROOT", raising=False)
    net = LeNet5()
    torch.save(net.state_dict(), "a.pt")
    torch.save(nn.DataParallel(net).state_dict(), "b.pt")
    done = run("diff", "a.pt", "b.pt")
    assert done.out.startswith("COMPATIBLE: a.pt → b.pt\n")
    assert "prefix 10" in done.out
    assert not (tmp_path / ".registry").exists()


def test_plan_transfer_and_lineage(run: Run, root: Path) -> None:
    refused = run("plan", "lenet5@best", "lenet6")
    assert (refused.status, refused.out) == (1, "")
    assert "if that is meant: --expect 'fc.5.*=skip' --expect 'fc.7.*=new'" in refused.err
    words = ["--expect", "fc.5.*=skip", "--expect", "fc.7.*=new", "--freeze", "loaded", "-o", "plan.json"]
    done = run("plan", "lenet5@best", "lenet6", *words)
    assert "loads 8 of 12 tensors, 90.9% of parameters" in done.out
    assert "freezes 8 parameters; 6,090 elements stay trainable" in done.out
    done = run("transfer", "lenet5@best", "lenet6", "--plan", "plan.json", "--name", "student")
    assert done.out == "student:v1: loaded 8 of 12 tensors, 90.9% of parameters from lenet5:v2\n"
    registry = Registry(root / "r")
    source, made = registry["lenet5:v2"].state_dict(), registry["student"].state_dict()
    assert all(torch.equal(made[name], source[name]) for name in source if not name.startswith("fc.5"))
    graph = run("log", "student").out.splitlines()
    assert re.match(r"○  student:v1 .* transferred ", graph[1])
    assert graph[2].split()[1].startswith("lenet5:v1…v2")
    other = run("transfer", "lenet5:v1", "lenet6", "--plan", "plan.json", "--name", "student")
    assert (other.status, "made from lenet5:v2 with other tensors" in other.err) == (1, True)
    assert len(registry.runs.find("student")) == 1


def test_a_plan_in_a_file_is_applied_by_its_own_names(run: Run, root: Path) -> None:
    run("plan", "lenet5:v1", "lenet6", "--everything", "--freeze", "loaded", "-o", "my plan.json")
    done = run("apply", "my plan.json", "--name", "lenet6-new")
    assert done.out == "lenet6-new:v1: loaded 8 of 12 tensors, 90.9% of parameters from lenet5:v1\n"
    same = run("transfer", "lenet5:v1", "lenet6", "--plan", "my plan.json", "--name", "lenet6-new", "--json")
    registry = Registry(root / "r")
    first, second = (registry[f"lenet6-new:v{n}"].state_dict() for n in (1, 2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    document = run("apply", "my plan.json", "--name", "lenet6-new", "--json").json
    assert document.keys() == same.json.keys()
    assert document["plan"] == same.json["plan"]


def test_a_plan_that_names_nothing_here_says_what_to_type(run: Run, root: Path) -> None:
    plan = plan_transfer("lenet5:v1", LeNet6(), everything=True, registry=Registry(root / "r"))
    plan.save("live target.json")
    done = run("apply", "live target.json", "--name", "x")
    assert done.status == 1
    assert done.err.splitlines() == [
        "error: live target.json: the plan is for 'LeNet6', which is no version or network here",
        "hint:  name another: registry transfer SOURCE TARGET --plan 'live target.json' --name x",
    ]
    plan_transfer(LeNet5(), LeNet6(), everything=True).save("live.json")
    done = run("apply", "live.json", "--name", "x")
    assert done.err.startswith(
        "error: live.json: the plan was made from tensors in memory\nhint:  name a source"
    )
    assert run("show", "x").status == 1


def test_source_and_target_must_differ(run: Run, root: Path) -> None:
    for words in (["plan", "lenet5", "lenet5@best"], ["transfer", "lenet5", "lenet5:v2", "--name", "x"]):
        done = run(*words)
        assert (done.status, done.out) == (1, "")
        assert done.err == "error: source and target are the same version, lenet5:v2\n"
    assert run("show", "x").status == 1


def test_what_is_frozen_is_verified(run: Run, root: Path) -> None:
    registry = Registry(root / "r")
    from registry import freeze

    net = LeNet5()
    freeze(net, "conv.*")
    with registry.run("frozen") as session:
        session.save(model=net)
        with torch.no_grad():
            net.fc[5].weight.add_(1)
        session.save(model=net)
        with torch.no_grad():
            net.conv[3].bias.add_(1)
        session.save(model=net)
    good = run("verify", "--frozen", "frozen:v1", "frozen:v2")
    assert (good.status, good.out) == (
        0,
        "all 4 frozen tensors are equal in frozen:v1 and frozen:v2, bit for bit\n",
    )
    bad = run("verify", "--frozen", "frozen:v1", "frozen:v3")
    assert bad.status == 1
    assert bad.out.startswith("conv.3.bias: something wrote to it")
    assert run("verify", "--frozen", "frozen:v1", "frozen:v3", "--json").json["moved"].keys() == {
        "conv.3.bias"
    }
    assert "was saved without anything frozen" in run("verify", "--frozen", "lenet5:v1", "lenet5:v2").err


def test_statistics_of_frozen_layers_that_went_on_are_named(run: Run, root: Path) -> None:
    registry = Registry(root / "r")
    net = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1))
    net[0].requires_grad_(False)
    with registry.run("loose") as session:
        session.save(model=net)
        net(torch.randn(8, 3))
        session.save(model=net)
    done = run("verify", "--frozen", "loose:v1", "loose:v2")
    assert done.status == 0
    assert done.out.splitlines() == [
        *(
            f"0.{name} moved: the parameters of its layer are frozen, and it was not held"
            for name in STATISTICS
        ),
        "all 2 frozen tensors are equal in loose:v1 and loose:v2, bit for bit",
    ]
    found = run("verify", "--frozen", "loose:v1", "loose:v2", "--json").json
    assert (found["moved"], found["went_on"]) == ({}, [f"0.{name}" for name in STATISTICS])
    freeze(net, "0.*", bn="update")
    with registry.run("loose") as session:
        session.save(model=net)
        net(torch.randn(8, 3))
        session.save(model=net)
    done = run("verify", "--frozen", "loose:v3", "loose:v4")
    assert done.out.splitlines()[0] == "0.running_mean moved: its statistics go on, as was asked for"


def test_training_from_other_weights(run: Run, root: Path) -> None:
    done = run(
        "train", "lenet6", "--from", "lenet5@best", "--freeze", "loaded", "--epochs", 2, "--name", "tuned"
    )
    assert done.status == 0, done.err
    assert done.out.startswith("loaded 8 of 12 tensors, 90.9% of parameters from lenet5:v2\n")
    assert run("verify", "--frozen", "tuned:v1", "tuned:v2").status == 0
    registry = Registry(root / "r")
    source, tuned = registry["lenet5@best"].state_dict(), registry["tuned"].state_dict()
    assert torch.equal(tuned["conv.3.weight"], source["conv.3.weight"])
    assert not torch.equal(registry["tuned:v1"].state_dict()["fc.7.weight"], tuned["fc.7.weight"])
    run("train", "--resume", "tuned:v1", "--name", "again")
    assert registry.diff("tuned:v2", "again").verdict == "IDENTICAL"
    assert run("train", "lenet6", "--freeze", "loaded").status == 2
    assert run("train", "--resume", "tuned:v1", "--freeze", "conv.*").status == 2


def test_what_an_error_advises_can_be_pasted(run: Run, root: Path) -> None:
    state = {f"m.{name}": value.double() for name, value in LeNet5().state_dict().items()}
    torch.save(state, root / "pre.pt")
    for words in (
        ["transfer", "pre.pt", "lenet5", "--name", "pasted"],
        ["train", "lenet5", "--from", "pre.pt", "--epochs", 1, "--name", "pasted"],
        ["plan", "pre.pt", "lenet5"],
    ):
        refused = run(*words)
        assert refused.status == 1
        assert "--rename 'm.*=*'" in refused.err
        refused = run(*words, "--rename", "m.*=*")
        assert "no dtype fits" in refused.err
        assert refused.err.endswith("if that is meant: --allow-cast\n")
        assert run(*words, "--rename", "m.*=*", "--allow-cast").status == 0
    assert run("train", "lenet5", "--rename", "a=b").status == 2


def test_a_file_is_planned_into_a_network_without_a_registry(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("REGISTRY_ROOT", raising=False)
    torch.save(LeNet5().state_dict(), "lenet5.pt")
    assert run("plan", "lenet5.pt", "lenet5").status == 0
    assert not (tmp_path / ".registry").exists()


def test_both_heads_of_a_network_for_segmentation_are_replaced() -> None:
    network = torchvision.models.segmentation.fcn_resnet50(weights=None, weights_backbone=None, aux_loss=True)
    assert replace_head(network, 5) == "classifier.4"
    found = network.eval()(torch.randn(1, 3, 32, 32))
    assert (found["out"].shape[1], found["aux"].shape[1]) == (5, 5)


def test_a_convolution_as_a_head_keeps_its_form() -> None:
    network = nn.Sequential(
        nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2, padding_mode="circular")
    )
    replace_head(network, 8)
    new = network[0]
    assert (new.out_channels, new.padding, new.dilation, new.groups) == (8, (1, 1), (2, 2), 2)
    assert (new.stride, new.padding_mode) == ((2, 2), "circular")
    with pytest.raises(Invalid, match="2 groups, into which 5 classes cannot be divided"):
        replace_head(network, 5)


def test_compare(run: Run, root: Path) -> None:
    lines = run("compare", "lenet5", "lenet6").out.splitlines()
    assert [line.split() for line in lines] == [
        ["EPOCH", "lenet5", "lenet6"],
        ["1", "0.5000"],
        ["2", "0.7500", "0.6250"],
    ]
    assert run("compare", "lenet5", "--at", "2", "--format", "md").out.splitlines()[-1] == "| 2 | 0.7500 |"
    found = run("compare", "lenet5", "lenet6", "--json").json
    assert found["models"]["lenet5"] == {"1": 0.5, "2": 0.75}
    run("compare", "lenet5", "lenet6", "--format", "html", "-o", "c.html")
    assert (root / "c.html").read_text().count("<polyline") == 2
    assert "no version of lenet5 has the metric 'x'" in run("compare", "lenet5", "--metric", "x").err
    assert run("compare", "lenet5", "--at", "one").status == 2


def test_runs_and_versions_are_compared(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGISTRY_ROOT", str(tmp_path / "r"))
    registry = Registry(tmp_path / "r")
    for scale in (1, 2):
        with registry.run("net") as training:
            for epoch in (1, 2):
                training.save(model=nn.Linear(1, 1), epoch=epoch, metrics={"accuracy": epoch * scale / 8})
    lines = [line.split() for line in run("compare", "net/run-1", "net/run-2", "net:v1").out.splitlines()]
    assert lines == [
        ["EPOCH", "net/run-1", "net/run-2", "net:v1"],
        ["1", "0.1250", "0.2500", "0.1250"],
        ["2", "0.2500", "0.5000"],
    ]
    # Two trainings that did not go on from one another make no curve together.
    assert set(run("compare", "net", "--json").json["models"]) == {"net/run-1", "net/run-2"}
    with registry.run("net", resume="net:v4") as training:
        training.save(model=nn.Linear(1, 1), epoch=3, metrics={"accuracy": 0.75})
    found = run("compare", "net", "--json").json["models"]
    assert {name: len(values) for name, values in found.items()} == {"net/run-3": 3, "net/run-1": 2}
    registry.set_alias("net:v2", "kept")
    assert list(run("compare", "net@kept", "--json").json["models"]) == ["net:v2"]
    assert "there is no run 'net/run-9'" in run("compare", "net/run-9").err
    assert "net:v1 does not have the metric 'x'" in run("compare", "net:v1", "--metric", "x").err


@pytest.mark.parametrize(
    ("samples", "similar", "case"),
    [
        (500, "yes", "small and similar: freeze"),
        (500, "no", "small and different: keep the early layers"),
        (60_000, "yes", "large and similar: fine-tune everything"),
        (60_000, "no", "large and different: fine-tune everything"),
    ],
)
def test_advice(run: Run, root: Path, samples: int, similar: str, case: str) -> None:
    done = run("advise", "lenet5", "--samples", samples, "--similar", similar, "--model", "lenet6")
    assert done.out.startswith(case)
    assert "loaded 8 of 12 tensors" in done.out
    assert "a rule of thumb" in done.out
    assert f"{66_946 / samples:,.1f} parameters a sample" in done.out


def test_advice_is_a_command_that_works(run: Run, root: Path) -> None:
    own = run("advise", "lenet5", "--samples", 50, "--similar", "yes")
    assert "loaded 10 of 10 tensors" in own.out
    assert "17.0 when all but the last layer is frozen" in own.out
    assert "--freeze first:-1" in own.out
    other = run("advise", "lenet5", "--samples", 50, "--similar", "no", "--model", "lenet6")
    assert "--freeze first:3" in other.out
    for advice in (own, other):
        (line,) = [line for line in advice.out.splitlines() if line.startswith("  try: registry ")]
        done = run(
            *line.removeprefix("  try: registry ").split(),
            "--epochs",
            1,
            "--set",
            "samples=20",
            "--name",
            "x",
        )
        assert done.status == 0, done.err


# -- torchvision ---------------------------------------------------------------------------------------------


def test_networks_of_torchvision_come_in(run: Run, root: Path) -> None:
    done = run("import", "torchvision:resnet18", "--random", 3, "--name", "resnet")
    assert re.match(r"resnet:v1  [0-9a-f]{12}  122 tensors, 46\.7 MB, 46\.\d MB more on the disk\n", done.out)
    torch.manual_seed(3)
    network = torchvision.models.resnet18()
    torch.save(network.state_dict(), "resnet18.pth")
    assert run("import", "torchvision:resnet18", "--file", "resnet18.pth", "--name", "resnet").status == 0
    assert run("diff", "resnet:v1", "resnet:v2").status == 0
    plan = run("plan", "resnet", "resnet18", "--expect", "fc.*=skip", "--freeze", "loaded")
    assert "loads 120 of 122 tensors, 99.95% of parameters" in plan.out
    assert "5,130 elements stay trainable" in plan.out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("torchvision:resnet19 --random 0", "did you mean resnet"),
        (
            "torchvision:resnet18",
            "say how to fill resnet18: --weights NAME, --file FILE, or --random SEED",
        ),
        (
            "torchvision:resnet18 --weights V9",
            "has no pretrained weights 'V9'\nhint:  there are IMAGENET1K_V1",
        ),
        ("torchvision:resnet18 --file none.pth", "none.pth"),
        ("torchvision:resnet18 --file lenet.pth", "lenet.pth does not fit resnet18"),
    ],
)
def test_networks_that_cannot_come_in(run: Run, root: Path, words: str, told: str) -> None:
    torch.save(LeNet5().state_dict(), "lenet.pth")
    done = run("import", *words.split(), "--name", "x")
    assert (done.status, done.out) == (1, "")
    assert told in done.err
    assert len(done.err.splitlines()) <= 2


def test_weights_that_cannot_be_downloaded_say_what_to_fetch(
    run: Run, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)  # a network that is down
    done = run("import", "torchvision:resnet18", "--weights", "IMAGENET1K_V1", "--name", "x")
    assert done.status == 1
    assert re.search(
        r"fetch https://\S+/resnet18-f37072fd\.pth by hand and use --file resnet18-f37072fd\.pth", done.err
    )


def test_resnet18_of_the_textbook() -> None:
    net = ResNet18(ResNet18Config(frozen=True))
    x, labels = torch.randn(2, 3, 64, 64), torch.tensor([1, 2])
    loss, logits = net(x, labels)
    assert (logits.shape, loss.dim()) == ((2, 10), 0)
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == 5_130
    reference = torchvision.models.resnet18(num_classes=10)
    reference.load_state_dict(net.state_dict())
    assert torch.allclose(net.eval()(x), reference.eval()(x), atol=1e-5)


@pytest.mark.parametrize("name", torchvision.models.list_models(torchvision.models))
def test_every_head_of_torchvision_can_be_replaced(name: str) -> None:
    given = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model = on_meta(lambda: torchvision.models.get_model(name, weights=None, **given))
    head = replace_head(model, 10)
    assert find_head(model) == head
    new = model.get_submodule(head)
    assert (new.out_features if isinstance(new, nn.Linear) else new.out_channels) == 10  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("kind", "heads"), [("googlenet", ["aux1.fc2", "aux2.fc2"]), ("inception_v3", ["AuxLogits.fc"])]
)
def test_auxiliary_heads_are_replaced_with_the_last_layer(kind: str, heads: list[str]) -> None:
    model = torchvision.models.get_model(kind, weights=None, init_weights=False, aux_logits=True)
    assert replace_head(model, 7) == "fc"
    assert {model.get_submodule(name).out_features for name in ["fc", *heads]} == {7}
    assert replace_head(model, 5, heads[0]) == heads[0]
    assert [model.get_submodule(name).out_features for name in ["fc", *heads]] == [
        7,
        5,
        *[7] * (len(heads) - 1),
    ]


def test_a_head_that_is_none() -> None:
    with pytest.raises(Invalid, match="no Linear or Conv2d"):
        replace_head(nn.Sequential(nn.ReLU()), 3)
    with pytest.raises(NotFound, match="has no layer 'fc9'"):
        replace_head(LeNet5(), 3, "fc9")
    with pytest.raises(Invalid, match="a head is a Linear or a Conv2d"):
        replace_head(LeNet5(), 3, "fc.0")


FORMS = ("text", "json", "md", "html")


# -- a browser -----------------------------------------------------------------------------------------------


def browse(root: Path, page: str, *scripts: str, width: int = 1280, scheme: str = "light") -> list[Any]:
    """Open a page in a headless browser, run scripts in it, and return what they give; the browser has nothing to say."""
    pytest.importorskip("playwright.sync_api")
    (root / "seen.html").write_text(page)
    # In a thread of its own: in this one another test may keep a browser open.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_browse, root / "seen.html", scripts, width=width, scheme=scheme).result()


def _browse(path: Path, scripts: Sequence[str], width: int, scheme: str) -> list[Any]:
    from playwright import sync_api

    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        opened = browser.new_page(viewport={"width": width, "height": 640}, color_scheme=scheme)
        said: list[str] = []
        opened.on("console", lambda message: said.append(message.text))
        opened.on("pageerror", lambda error: said.append(str(error)))
        opened.goto(path.as_uri())
        found = [opened.evaluate(script) for script in scripts]
        browser.close()
    assert said == []
    return found


@pytest.fixture
def page(run: Run, root: Path) -> str:
    """A report with every section, of networks with a hostile name in them."""
    run("plan", "lenet5:v2", "lenet6:v1", "--everything", "--freeze", "loaded", "-o", "plan.json")
    run("transfer", "lenet5:v2", "lenet6:v1", "--plan", "plan.json", "--name", "student")
    run("diff", "lenet5:v2", "student", "--values", "--format", "html", "-o", "first.html")
    run(
        "diff",
        "lenet5:v2",
        "lenet6:v1",
        "--values",
        "--plan",
        "plan.json",
        "--format",
        "html",
        "-o",
        "d.html",
    )
    return (root / "d.html").read_text()


@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome is installed")
def test_the_page_in_a_browser(page: str, root: Path) -> None:
    shown, folded = (
        "document.querySelector('[data-shown]').textContent",
        "document.querySelectorAll('.folded').length",
    )

    def named(text: str) -> str:
        names = "document.querySelector('[data-names]')"
        return f"({names}.value = {text!r}, {names}.dispatchEvent(new Event('input')), {shown})"

    found = browse(
        root,
        page,
        shown,
        named("conv.*"),
        named("fc.7"),
        named(""),
        f"(document.querySelector('[data-only]').click(), {shown})",
        folded,
        f"(document.querySelector('tr.module th').click(), {folded})",
        "[...document.querySelectorAll('h1,h2')].map(h => h.textContent).join('|')",
    )
    # Every value differs, so that there are none to hide.
    assert found[:5] == [f"{count} of 12 tensors" for count in (12, 4, 2, 12, 12)]
    assert found[5:7] == [0, 1]
    assert found[7].split("|") == [
        *("COMPATIBLE, 4 differences", "Warnings", "What differs", "Modules", "Architecture"),
        *("Plan", "Frozen", "Again"),
    ]


@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome is installed")
def test_the_page_on_a_phone_in_the_dark_and_read_aloud(page: str, root: Path) -> None:
    (width,) = browse(root, page, "document.documentElement.scrollWidth", width=360)
    assert width <= 360
    colour = "getComputedStyle(document.body).backgroundColor"
    assert browse(root, page, colour) == ["rgb(255, 255, 255)"]
    assert browse(root, page, colour, scheme="dark") == ["rgb(20, 23, 26)"]
    nameless = """[document.documentElement.lang, document.querySelectorAll('main,h1').length,
        [...document.querySelectorAll('input')].filter(i => !i.labels.length).length,
        [...document.querySelectorAll('th')].filter(t => !t.scope || !t.textContent).length,
        [...document.querySelectorAll('svg')].filter(s => !s.getAttribute('aria-label') && !s.ariaHidden).length,
        [...document.querySelectorAll('.scroll')].filter(s => !s.getAttribute('aria-label')).length,
        document.querySelectorAll('[aria-live]').length]"""
    assert browse(root, page, nameless) == [["en", 2, 0, 0, 0, 0, 1]]


def test_a_report_shows_a_plan_and_what_is_frozen(run: Run, root: Path) -> None:
    run("plan", "lenet5", "lenet6", "--everything", "--freeze", "loaded", "-o", "plan.json")
    run("train", "lenet6", "--from", "lenet5", "--freeze", "conv.*", "--epochs", 1, "--name", "tuned")
    text = run("diff", "lenet5", "tuned", "--format", "text").out
    assert re.search(r"tuned:v1 +4 +2,572 +64,374", text)
    both = {
        form: run("diff", "lenet5", "lenet6", "--plan", "plan.json", "--format", form).out for form in FORMS
    }
    for out in both.values():
        assert "fc.7.weight" in out
        assert "6,090" in out.replace("6090", "6,090")
    assert "loads 8 of 12 tensors" in both["text"]
    assert json.loads(both["json"])["plan"]["freeze"]
    assert json.loads(both["json"])["frozen"][0]["trainable"] == 6_090
    other = run("diff", "lenet5:v1", "lenet6", "--plan", "plan.json")
    assert (other.status, "made from lenet5:v2 with other tensors" in other.err) == (2, True)


def test_plans_with_adapters(run: Run, root: Path) -> None:
    torch.save(nn.Sequential(nn.Flatten(), nn.Linear(784, 3)).state_dict(), "a.pt")
    torch.save(nn.Sequential(nn.Flatten(), nn.Linear(784, 2)).state_dict(), "b.pt")
    (root / "c.json").write_text('{"source": ["cat", "dog", "cow"], "target": ["cow", "fox"]}')
    words = ["plan", "a.pt", "b.pt", "--adapt", "1.*=class-rows"]
    done = run(*words, "--classes", "c.json", "--json")
    assert done.json["steps"][0]["rows"] == {"pairs": [[2, 0]], "of": 2}
    assert "50% of parameters" in run(*words, "--classes", "c.json").out
    (root / "c.json").write_text('{"source": "cat"}')
    assert 'expected {"source": [names of classes]' in run(*words, "--classes", "c.json").err
    assert (
        "there is no adapter 'x'\nhint:  the adapters are channels-sum"
        in run("plan", "a.pt", "b.pt", "--adapt", "1.*=x").err
    )
