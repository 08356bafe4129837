"""Renderers: each draws every block, or says that it leaves it out, and shows a text as it is."""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import sample_reports

from registry.reports import charts, html, markdown, text
from registry.reports.blocks import (
    Block,
    Branch,
    Cell,
    Code,
    Column,
    Curves,
    Lines,
    Strip,
    Table,
    Title,
    Tree,
)
from registry.transfer import curves
from registry.transfer.matching import Category
from registry.transfer.report import MEANING


def main_of(page: str) -> str:
    """What a page shows, without its style and script."""
    return page[page.index("<main>") : page.index("</main>") + len("</main>")]


GOLDEN = Path(__file__).parent / "golden"
RENDER: dict[str, Callable[[Sequence[Block]], str]] = {
    "txt": text.render,
    "md": markdown.render,
    "html": html.render,
}
PARTS = RENDER | {"html": lambda blocks: f"<div>{main_of(html.render(blocks))}</div>\n"}
"""What the golden files hold: of a page, without its style and script."""
BLOCKS: dict[str, list[Block]] = {
    "report": sample_reports.REPORT.blocks(),
    "same": sample_reports.SAME.blocks(),
    "plan": sample_reports.PLAN.blocks(),
    "curves": curves.blocks(sample_reports.CURVES, "loss"),
}
HOSTILE = "<b>|`*x*`_[a](b)#&\x1b[31m\n\u202eend"


@pytest.mark.parametrize("form", PARTS)
@pytest.mark.parametrize("name", BLOCKS)
def test_a_report_looks_as_it_did(name: str, form: str) -> None:
    """The golden files are what the renderers drew when a person last looked at them: `sample_reports.py` writes them anew."""
    assert PARTS[form](BLOCKS[name]) == (GOLDEN / f"{name}.{form}").read_text()


def one_of_each(said: str) -> list[Block]:
    return [
        Title(said, between=(said, said), lines=[said]),
        Lines(said, [said, said]),
        Table(said, [Column(said), Column(said, is_number=True)], [(Cell(said, "ok"), said)], above=said),
        Strip([(said, said), (said, Cell(said, "ok"))]),
        Tree(
            said,
            [Column(said), Column(said)],
            [
                Branch((said, said), 0.5, [Branch((said, Cell(said)), 0.25)]),
                Branch((said, said), is_same=True),
            ],
            bar=said,
            is_deep=True,
        ),
        Curves(said, [(said, {1: 0.5})]),
        Code(said, said),
    ]


LEFT_OUT = {"txt": {Curves}, "md": {Curves}, "html": set()}


@pytest.mark.parametrize("form", RENDER)
def test_a_renderer_draws_every_block_or_says_that_it_leaves_it_out(form: str) -> None:
    blocks = one_of_each("said")
    assert {type(block) for block in blocks} == set(get_args(Block))
    opening = Title("opening")
    alone = RENDER[form]([opening])
    for block in blocks:
        if type(block) in LEFT_OUT[form]:
            assert RENDER[form]([opening, block]) == alone
        else:
            assert RENDER[form]([opening, block]).count("said") > alone.count("said")
    if LEFT_OUT[form]:
        assert "left out" in (RENDER[form].__doc__ or "")


@pytest.mark.parametrize("form", RENDER)
def test_whatever_a_text_holds_is_shown_and_does_nothing(form: str) -> None:
    found = RENDER[form](one_of_each(HOSTILE))
    assert not {"\x1b", "\u202e"} & set(found)
    if form == "html":
        assert "<b>" not in found
    if form == "md":
        assert "<b>" not in found.replace("    " + HOSTILE[:4], "")
        assert not re.search(
            r"(?<!\\)[*`]", "".join(line for line in found.splitlines() if line[:4] != "    ")
        )
    if form == "txt":
        assert all("\n" not in line for line in found.split("\n"))
        assert found.count("<b>") > 10


def test_a_table_of_text_stays_aligned_where_a_name_holds_control_characters() -> None:
    lines = text.render(
        [Table("t", [Column("a"), Column("b")], [("x\x1b", "7"), ("long name", "8")], opens=True)]
    )
    assert len({line.index(last) for line, last in zip(lines.split("\n"), "B78", strict=True)}) == 1


def test_a_block_for_pages_is_not_in_lines_and_the_other_way_round() -> None:
    blocks: list[Block] = [
        Title("title"),
        Lines("", ["both"]),
        Lines("", ["page alone"], where="pages"),
        Lines("", ["line alone"], where="lines"),
    ]
    for form, render in RENDER.items():
        found = render(blocks)
        assert "both" in found
        assert ("page alone" in found) == (form == "html")
        assert ("line alone" in found) == (form != "html")


def test_a_page_takes_nothing_from_a_network() -> None:
    page = html.render(sample_reports.REPORT.blocks())
    assert not re.search(r"https?:|//[a-z]|<link|<img|@import|url\(", page)
    assert page.count("<script>") == 1
    assert "default-src 'none'" in page
    assert "unsafe" not in page
    for tag in ("style", "script"):
        text = re.search(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        assert text
        digest = base64.b64encode(hashlib.sha256(text[1].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in page


def test_what_is_not_finite_is_left_out_of_a_picture() -> None:
    for values in ({1: math.nan}, {1: math.inf, 2: -math.inf}, {}, {1: 1e308, 2: -1e308}, {3: 0.25}):
        found = html.render([Title("t"), Curves("c", [("x", values)])])
        drawn = re.findall(r'(?:cx|cy|points|y1)="([^"]*)"', found)
        assert not any(re.search("nan|inf", place) for place in drawn)
        assert found.count("<circle") == sum(map(math.isfinite, values.values()))


def test_the_bar_of_the_largest_change_fills_its_place_and_the_smallest_is_seen() -> None:
    rows = [Branch((name,), share) for name, share in (("a", 1.0), ("b", 0.5), ("c", 0.0001), ("d", None))]
    lines = text.render([Tree("", [Column("name")], rows, bar="bar")]).splitlines()
    assert [line[4:].strip() for line in lines[1:]] == ["█" * 24, "█" * 12, "▏", ""]
    page = html.render([Title("t"), Tree("", [Column("name")], rows, bar="bar")])
    assert re.findall(r'<rect width="([\d.]+)%"', page) == ["100", "50", "0.01"]


@pytest.mark.parametrize("width", [24, 30, 40, 50, 60, 80, 120])
def test_a_narrow_terminal_gets_fewer_columns_and_is_told_which_are_missing(width: int) -> None:
    columns = [Column("module"), Column("value", is_number=True), Column("status"), Column("size")]
    rows = [Branch(("features.0", "0.25", "2 of 2 changed", "156 values"), 0.5)]
    table = Table("differs", columns, [("layer1.0.conv1", "4.5", "another shape", "3×3 → 5×5")])
    facts = Strip([("tensors changed", "4 of 4"), ("changed most", "conv"), ("loss", "1 → 2")])
    lines = text.render(
        [facts, Tree("modules", columns, rows, bar="relative change"), table], width
    ).splitlines()
    assert max(map(len, lines)) <= width
    full = text.render([facts, Tree("modules", columns, rows, bar="relative change"), table]).splitlines()
    hidden = [line.strip() for line in lines if "hidden" in line]
    if width < 50:
        assert hidden[0] == ("hidden: size" if width >= 40 else "hidden: status, size")
    if width == 80:
        assert lines == full
    assert all(name in "\n".join(lines) for name in ("features.0", "layer1.0.conv1", "0.25", "4.5"))
    assert any("█" in line for line in lines) == (width >= 80)


def test_lines_show_modules_and_with_all_tensors_these_too() -> None:
    tree = Tree(
        "", [Column("name")], [Branch(("mod",), rows=[Branch(("leaf",))]), Branch(("same",), is_same=True)]
    )
    assert text.render([tree]).split() == ["NAME", "mod", "and", "1", "equal"]
    assert text.render([replace(tree, is_deep=True)]).split() == ["NAME", "mod", "leaf", "and", "1", "equal"]


def test_the_modules_of_a_report_have_what_moved_together() -> None:
    by_path = {module.path: module for module in sample_reports.REPORT.modules_changed()}
    assert by_path["layers.0"].relative == 0.25
    assert by_path["layers.1"].relative == 0.0
    assert by_path["layers.5"].changed == 2
    assert {tensor.sign for tensor in by_path["aux|x.<b>*w*".rpartition(".")[0]].tensors} == {"-"}


def test_every_category_has_a_meaning() -> None:
    assert set(MEANING) == set(Category)


def test_each_curve_has_a_colour_of_its_own_or_dashes() -> None:
    names = [f"net/run-{i}" for i in range(7)]
    found = charts.colours_of(names)
    assert found[0] == charts.colour_of("net")
    assert sorted(found[: charts.COLOURS]) == [f"c{i}" for i in range(charts.COLOURS)]
    assert found[charts.COLOURS :] == ["c0 dashed", "c1 dashed"]
    # A model keeps its colour although another one that is named before it needs one.
    other = next(f"m{i}" for i in range(50) if charts.colour_of(f"m{i}") != charts.colour_of("net"))
    assert charts.colours_of(["net:v1", "net@best", other])[::2] == [
        charts.colour_of("net"),
        charts.colour_of(other),
    ]
    assert charts.colours_of([]) == []
