"""Notebooks: what things show of themselves there, whatever they hold, and whatever has become of them."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import nbformat
import pytest
import sample_reports
import torch
from nbclient import NotebookClient
from nbconvert import HTMLExporter
from torch import nn

from registry import Registry
from registry.catalog.listings import Versions
from registry.catalog.runs import RunInfo
from registry.catalog.versions import Version
from registry.checkpoints.checkpoint import Checkpoint
from registry.reports import notebook
from registry.reports.blocks import Column
from registry.transfer.plan import Step

HOSTILE = "<script>alert(1)</script>|`*x*`_\x1b[31m\n\u202e\"><img src=x onerror=alert(1)>'"

TAGS = {
    "style",
    "div",
    "span",
    "strong",
    "table",
    "thead",
    "tbody",
    "tr",
    "th",
    "td",
    "code",
    "pre",
    "details",
}
TAGS |= {"summary"}
ATTRIBUTES = {"class", "style", "title", "scope", "open"}
LOOKS = {
    "width": r"[0-9.e+-]+(%|px)",
    "max-width": r"[0-9]+px",
    "height": r"[0-9]+px",
    "float": "left",
    "clear": "left",
    "text-align": "left|right",
    "color": "#[0-9a-f]{6}",
    "background-color": "#[0-9a-f]{6}",
}
"""What JupyterLab keeps in a notebook that it does not trust, but for the element `style`."""


class Checker(HTMLParser):
    """Sees that a page has nothing that is not kept, and that all that is opened is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in TAGS
        self.open.append(tag)
        for name, value in attrs:
            assert name in ATTRIBUTES
            for look in (value or "").split(";") if name == "style" else ():
                key, _, given = look.partition(":")
                assert re.fullmatch(LOOKS[key], given), look

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += "" if self.open[-1:] == ["style"] else data


def text_of(thing: Any) -> str:
    """The text that a notebook shows of a thing, once the whole answer was checked."""
    found = thing._repr_mimebundle_(include=None, exclude=None)
    assert set(found) == {"text/plain", "text/html", "text/markdown"}
    assert found["text/plain"] == repr(thing)
    assert "\n" not in found["text/plain"]
    assert len(found["text/html"].encode()) <= notebook.MOST_BYTES
    assert not {"\x1b", "\u202e"} & set("".join(found.values()))
    assert "<script" not in found["text/html"] + found["text/markdown"]
    checker = Checker()
    checker.feed(found["text/html"])
    checker.close()
    assert checker.open == []
    return checker.text


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    monkeypatch.chdir(tmp_path)
    found = Registry(tmp_path / "r")
    net = network()
    with found.run("net", config={"lr": 0.1}, monitor="accuracy") as run:
        for epoch in range(3):
            with torch.no_grad():
                net[0].weight += 1
            run.save(
                model=net, epoch=epoch, step=100_000, loss=1 / (epoch + 1), metrics={"accuracy": epoch / 3}
            )
    found.set_alias("net", "production")
    found.set_tag("net", "paper")
    return found


def test_a_registry_shows_its_models(registry: Registry) -> None:
    assert re.fullmatch(r"<Registry r: 1 model, 3 versions, [0-9.]+ kB>", repr(registry))
    text = text_of(registry)
    for said in ("Registry r", "1 model, 3 versions", "v3 production", "accuracy 0.66667", "▁"):
        assert said in text
    for i in range(30):
        registry.save(f"m{i}", {})
    assert "and 11 more" in text_of(registry)


def test_listings_show_tables_with_bars(registry: Registry) -> None:
    text = text_of(registry.versions("net", by="accuracy"))
    assert "net:v3" in text
    assert "best production paper" in text
    assert text.index("accuracy") < text.index("loss")
    html = registry.versions("net", by="accuracy")._repr_mimebundle_()["text/html"]
    assert re.search(r"0\.66667<.*?width:100%", html)
    assert re.search(r"0\.33333<.*?width:50%", html)
    assert "own size" in text_of(registry.models()).lower()
    assert text_of(registry.versions("net", tag="nobody")) == "Versions of net: 0"


def test_a_checkpoint_shows_where_it_comes_from_what_it_holds_and_how_to_load_it(registry: Registry) -> None:
    with registry.run("tuned", resume="net:v2") as run:
        run.save(model=network(), epoch=3)
    text = text_of(registry["net:v2"])
    for said in (
        "net:v1 (same run)",
        "tuned:v1 (resumed-from)",
        "100,000",
        "checkpoint = registry['net:v2']",
        # 15 + 6 + 8: the buffers of the batch norm are no parameters.
        "model Sequential: 29 parameters in 9 tensors",
    ):
        assert said in text, said
    assert "used by" not in text_of(registry["net:v1"])
    assert "resumed-from" in text_of(registry["tuned"])
    assert "registry.build('net:v2')" not in text


def test_reports_and_plans_show_bars_and_folded_lists(registry: Registry) -> None:
    report = registry.diff("net:v1", "net:v3", values=True)
    assert repr(report) == "<DiffReport net:v1 → net:v3: SAME STRUCTURE>"
    text = text_of(report)
    for said in ("1 of 9 tensors", "VALUES: 1 tensor", "MATCH: 8 tensors", "Relative change"):
        assert said in text
    text = text_of(sample_reports.REPORT)
    for said in ("layers.{0,2-3,5}.weight", "configuration: 2 differences", "architecture: 2 differences"):
        assert said in text
    plan = sample_reports.PLAN
    assert repr(plan) == "<TransferPlan old:v3 → new|net: 3 of 4 tensors, 99.81%>"
    text = text_of(plan)
    for said in ("loaded: 3 tensors, 5,500 elements", "new: 1 tensor", "unused: 1 tensor", "kept: 0 tensors"):
        assert said in text


def test_a_run_shows_its_state_and_the_end_of_its_log(registry: Registry) -> None:
    with registry.run("net", name="mine") as run:
        assert repr(run) == "<Run net/mine: running>"
        run.save(model=network())
        assert "run net/mine began" in text_of(run)
    assert repr(run) == "<Run net/mine: finished, saved net:v4>"
    info = registry.runs["net/mine"]
    assert repr(info) == "<RunInfo net/mine: finished>"
    assert "run net/mine finished" in text_of(info)
    shutil.rmtree(run.folder)
    assert "began" in text_of(info)


def test_a_status_shows_what_sharing_saves(registry: Registry) -> None:
    registry.save("twin", {"model": registry["net"].state_dict()})
    text = text_of(registry.status())
    for said in ("in use", "saved by sharing", "free space", "2 models, 4 versions"):
        assert said in text


def hostile_things(registry: Registry) -> Iterator[Any]:
    record = {"components": {HOSTILE: {"tensors": 1, "elements": 1, "bytes": 1}}, "parent": HOSTILE}
    record |= {"run": HOSTILE, "lineage": [{"kind": HOSTILE, "parent": HOSTILE}]}
    record |= {"provenance": {"kinds": {HOSTILE: HOSTILE}}}
    row = Version("0" * 64, HOSTILE, 1, HOSTILE, 1, 1, math.nan, 1, 1, record)
    row = row._replace(
        aliases=(HOSTILE,),
        tags=(HOSTILE,),
        notes=((HOSTILE, HOSTILE),),
        metrics={HOSTILE: math.inf, "x": -1.0},
    )
    yield Versions([row] * 60)
    yield Checkpoint(registry.store, row, registry.catalog)
    yield Checkpoint(registry.store, row)
    yield RunInfo(HOSTILE, HOSTILE, HOSTILE, {"state": HOSTILE, "ended": HOSTILE}, Path(HOSTILE))
    yield registry.status()._replace(root=HOSTILE)
    side = sample_reports.REPORT.a.model_copy(update={"label": HOSTILE})
    rows = tuple(
        one.model_copy(update={"a": HOSTILE + str(i), "b": HOSTILE + str(i), "note": HOSTILE})
        for i, one in enumerate(sample_reports.ROWS * 100)
    )
    steps = (Step(action="copy", target=HOSTILE, source=HOSTILE, why=HOSTILE, adapter=HOSTILE),) * 900
    plan = sample_reports.PLAN.model_copy(
        update={"steps": steps, "source": HOSTILE, "target": HOSTILE, "notes": (HOSTILE,)}
    )
    yield plan
    yield sample_reports.REPORT.model_copy(
        update={"a": side, "b": side, "rows": rows, "plan": plan, "warnings": (HOSTILE,) * 9}
    )


def test_whatever_a_name_holds_is_shown_and_does_nothing(registry: Registry) -> None:
    for thing in hostile_things(registry):
        assert "script" in text_of(thing)


def test_a_place_with_hostile_names_is_shown(tmp_path: Path) -> None:
    place = tmp_path / "<script>\x1b[31m\u202e&\udc80"
    found = Registry(place)
    assert "\\x1b[31m" in text_of(found)


def test_a_large_model_fits(registry: Registry) -> None:
    """2,000 tensors, whose names do and do not fall together."""
    tensors = {f"layers.{i}.block.{i % 7}.weight": torch.zeros(i % 5 + 1) for i in range(1000)}
    letters = "abcdefghij"
    tensors |= {
        f"{a}{b}{c}.weight_of_something_long": torch.zeros(1)
        for a in letters
        for b in letters
        for c in letters
    }
    saved = registry.save("large", {"model": tensors})
    assert saved.row.tensors == 2000
    text = text_of(saved)
    assert "layers.{" in text
    assert "more" in text
    text_of(registry.diff("large", "net"))


def test_ten_thousand_versions_fit(registry: Registry) -> None:
    row = registry.resolve("net")
    found = Versions([row._replace(version=i) for i in range(10_000, 0, -1)])
    text = text_of(found)
    assert "net:v10000" in text
    assert "and 9,950 more" in text


@pytest.mark.damages
def test_things_of_a_registry_that_is_gone_or_damaged_say_so(registry: Registry) -> None:
    things = [registry, registry["net"], registry.runs["net/run-1"], registry.models(), registry.status()]
    with (registry.root / "catalog.sqlite").open("r+b") as file:
        file.write(b"\0" * 500)
    for thing in things:
        text_of(thing)
    registry.catalog.close()
    shutil.rmtree(registry.root)
    assert re.match(r"<Registry r: cannot be read \(.*\)>$", repr(registry))
    assert "not shown: " in text_of(registry)
    for thing in things[1:]:
        text_of(thing)
    assert "not shown: " in text_of(things[1])


def test_an_object_that_never_came_to_be_still_has_a_repr() -> None:
    assert repr(Registry.__new__(Registry)).startswith("<Registry : cannot be read (")


def test_a_piece_of_nothing_and_numbers_that_are_none_draw_no_bars() -> None:
    assert "width:110px" not in notebook.table([Column("a")], [[None], [""]]).html
    assert notebook.pieces([notebook.Piece("a", 0, "0 B")]).html.count("float") == 0
    assert notebook.shares_of([math.nan, math.inf, -1.0, None]) == [0.0] * 4
    assert notebook.shares_of([]) == []


CELLS = """
from registry import Registry, plan_transfer
registry = Registry("r")
registry
---
registry.versions("net", by="accuracy")
---
registry.models()
---
registry["net@best"]
---
registry.diff("net:v1", "net:v3", values=True)
---
import torch
from torch import nn
net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 5))
plan_transfer("net@best", net, expect={"2.*": "skip"}, registry=registry)
---
registry.runs["net/run-1"]
---
registry.status()
"""


@pytest.mark.slow
def test_a_real_notebook_shows_everything(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    for kind in ("CONFIG", "DATA", "RUNTIME"):
        monkeypatch.setenv(f"JUPYTER_{kind}_DIR", str(tmp_path / "jupyter"))
    book = nbformat.v4.new_notebook()
    book.cells = [nbformat.v4.new_code_cell(cell.strip()) for cell in CELLS.split("---")]
    NotebookClient(
        book, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    for cell in book.cells:
        (output,) = [one for one in cell.outputs if one.output_type == "execute_result"]
        assert set(output.data) == {"text/plain", "text/html", "text/markdown"}
        assert "not shown" not in output.data["text/html"]
    page, _ = HTMLExporter().from_notebook_node(book)
    assert page.count('class="tr-root"') == len(book.cells)
