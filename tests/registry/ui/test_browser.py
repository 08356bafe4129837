"""The pages in a real browser: what they look like, keys, and what follows a save.

Pictures of every page go to `build/ui`.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from browsing import CHROMIUM, Client, fill, network

from registry import Registry
from registry.ui.server import Server

sync_api = pytest.importorskip("playwright.sync_api")
if CHROMIUM is None:
    pytest.skip("needs chromium: apt-get install chromium", allow_module_level=True)

PICTURES = Path(__file__).parents[3] / "build" / "ui"

PAGES = {
    "models": "/",
    "versions": "/m/net",
    "best-first": "/m/net?sort=accuracy",
    "zoomed": "/m/net?from=2&to=4",
    "version": "/m/net/v5",
    "diff": "/diff?a=net:v1&b=net:v5",
    "diff-of-networks": "/diff?a=net:v1&b=other:v1",
    "runs": "/runs",
    "run": "/r/net/run-1",
    "compare": "/compare?of=net/run-1+net/run-2",
    "lineage": "/lineage",
    "storage": "/storage",
    "data": "/data",
    "find": "/find?q=reviewers",
    "error": "/m/nothing",
}

LOOKS = {"light": (1280, "light"), "dark": (1280, "dark"), "phone": (390, "dark")}


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        with contextlib.closing(playwright.chromium.launch(executable_path=CHROMIUM, args=flags)) as found:
            yield found


Open = Callable[..., Any]


@pytest.fixture
def opened(browser: Any) -> Iterator[Open]:
    """Opens a page of a server in a browser of its own, and checks at the end that the browser had nothing to say."""
    with contextlib.ExitStack() as stack:
        said: list[str] = []

        def open_page(
            server: Server, path: str, *, width: int = 1280, scheme: str = "light", said_before: bool = True
        ) -> Any:
            context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
            stack.callback(context.close)
            page = context.new_page()
            page.on("console", lambda message: said.append(message.text))
            page.on("pageerror", lambda error: said.append(str(error)))
            page.on("request", lambda request: _is_here(request.url, server) or said.append(request.url))
            page.goto(server.address(path))
            return page

        yield open_page
        assert [text for text in said if "status of 404" not in text] == []


def _is_here(url: str, server: Server) -> bool:
    return url.startswith((f"http://localhost:{server.port}/", "data:"))


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("name", PAGES)
def test_a_page_fits_and_is_accessible(unchanged: Client, opened: Open, name: str, look: str) -> None:
    width, scheme = LOOKS[look]
    page = opened(unchanged.server, PAGES[name], width=width, scheme=scheme)
    page.wait_for_load_state()
    PICTURES.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=PICTURES / f"{name}-{look}.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("look", LOOKS)
def test_axe_finds_nothing(browser: Any, unchanged: Client, look: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    width, scheme = LOOKS[look]
    # The policy of the pages forbids the script that checks them.
    context = browser.new_context(
        viewport={"width": width, "height": 900},
        color_scheme=scheme,
        bypass_csp=True,
        reduced_motion="reduce",
    )
    found = {}
    with contextlib.closing(context):
        page = context.new_page()
        page.goto(unchanged.server.address())
        for name, path in PAGES.items():
            page.goto(f"http://localhost:{unchanged.server.port}{path}")
            results = axe.run(page)
            if results.violations_count:
                found[name] = results.generate_report()
    assert found == {}


def test_every_action_has_a_key(server: Server, opened: Open) -> None:
    page = opened(server, "/")
    at = f"http://localhost:{server.port}"

    def press(*keys: str) -> str:
        for key in keys:
            page.keyboard.press(key)
        page.wait_for_load_state()
        return str(page.url).removeprefix(at)

    def leads(keys: str, to: str) -> None:
        press(*keys.split())
        page.wait_for_url(f"{at}{to}")

    leads("j j k Enter", "/m/net")
    page.keyboard.press("j")
    page.keyboard.press("x")
    page.keyboard.press("j")
    page.keyboard.press("j")
    page.keyboard.press("x")
    assert page.locator("#chosen strong").inner_text() == "2 selected"
    leads("d", "/diff?a=net%3Av3&b=net%3Av5")
    page.goto(f"{at}/m/net")
    for keys in ("j x", "j j j x"):
        press(*keys.split())
    leads("c", "/compare?of=net%2Frun-2+net%2Frun-1")
    leads("g m", "/")
    leads("g r", "/runs")
    leads("j Enter", "/r/net/run-2")
    leads("u", "/runs")
    leads("g l", "/lineage")
    leads("g s", "/storage")
    page.goto(f"{at}/m/net/v4")
    leads("]", "/m/net/v5")
    leads("[", "/m/net/v4")
    leads("2", "/m/net/v4#tensors")
    leads("d", "/diff?a=net%3Av3&b=net%3Av4")
    page.goto(f"{at}/m/net/v4")
    leads("c", "/compare?of=net")
    page.keyboard.press("?")
    assert page.locator("#keys").is_visible()
    page.keyboard.press("Escape")
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.keyboard.press("t")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before
    page.keyboard.press("/")
    page.keyboard.type("net:v2")
    leads("Enter", "/m/net/v2")


def test_typing_and_modifiers_do_nothing_else(server: Server, opened: Open) -> None:
    page = opened(server, "/m/net")
    address = page.url
    page.focus("#find")
    page.keyboard.type("gmtdcxju?[")
    assert page.input_value("#find") == "gmtdcxju?["
    assert not page.locator("#keys").is_visible()
    page.keyboard.press("Escape")
    for key in ("Control+d", "Alt+c", "Meta+e"):
        page.keyboard.press(key)
    page.keyboard.press("?")
    page.uncheck("#keys-on")
    page.keyboard.press("Escape")
    page.keyboard.press("u")
    page.keyboard.press("t")
    assert page.url == address
    page.reload()
    page.keyboard.press("u")
    assert page.url == address
    page.keyboard.press("?")
    page.check("#keys-on")


def test_a_save_appears_while_the_selection_stays(filled: Registry, server: Server, opened: Open) -> None:
    page = opened(server, "/m/net")
    page.wait_for_selector("#live:not([hidden])", state="attached")
    page.check("#v3 input")
    filled.save("net", {"model": network(6).state_dict()}, metrics={"accuracy": 0.99})
    page.wait_for_selector("#v6")
    assert page.is_checked("#v3 input")
    assert page.locator("#chosen strong").inner_text() == "1 selected"
    assert [row.get_attribute("id") for row in page.locator("#rows tbody tr").all()] == [
        f"v{i}" for i in (6, 5, 4, 3, 2, 1)
    ]
    filled.remove("net:v2")
    page.wait_for_selector("#v2", state="detached")
    filled.set_tag("net:v1", "seen")
    page.wait_for_selector("#v1 .tag")


def test_ten_tabs_share_one_stream(filled: Registry, server: Server, browser: Any) -> None:
    with contextlib.closing(browser.new_context()) as context:
        streams: list[str] = []
        context.on(
            "request",
            lambda request: streams.append(request.url) if request.url.endswith("/events") else None,
        )
        pages = [context.new_page() for _ in range(10)]
        pages[0].goto(server.address("/m/net"))
        for page in pages[1:]:
            page.goto(f"http://localhost:{server.port}/m/net")
        for page in pages:
            page.wait_for_selector("#live:not([hidden])", state="attached")
        filled.save("net", {"model": network(6).state_dict()})
        for page in pages:
            page.bring_to_front()
            page.wait_for_selector("#v6")
        assert len(streams) == 1


def test_the_log_of_a_run_grows(filled: Registry, server: Server, opened: Open) -> None:
    with filled.run("net") as run:
        page = opened(server, f"/r/{run.name}")
        page.wait_for_selector("#live:not([hidden])", state="attached")
        with (filled.root / "runs" / run.name / "run.log").open("a") as log:
            log.write("a line that was not there\n")
        page.wait_for_selector("#lines:has-text('a line that was not there')")
        run.save(model=network(1), epoch=1, loss=0.5)
        page.wait_for_selector("#rows tr")


def test_a_point_of_the_curve_is_a_version(server: Server, opened: Open) -> None:
    page = opened(server, "/m/net")
    box = page.locator(".chart").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 20)
    assert page.locator(".curve output").inner_text() == "v3 0.8500"
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + 20)
    page.wait_for_url("**/m/net/v3")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_what_is_cut_on_a_phone_has_a_shade_at_its_edge(server: Server, opened: Open, scheme: str) -> None:
    page = opened(server, "/compare?of=net+other", width=390, scheme=scheme)
    table = page.locator(".scroll").first
    assert table.evaluate("one => one.scrollWidth > one.clientWidth")

    def edge() -> bytes:
        """The right end of the table, below the curves."""
        box = table.bounding_box()
        clip = {"x": box["x"] + box["width"] - 4, "y": box["y"] + box["height"] - 4, "width": 4, "height": 4}
        return bytes(page.screenshot(clip=clip))

    before = edge()
    table.evaluate("one => { one.scrollLeft = one.scrollWidth; }")
    assert edge() != before


def test_the_names_of_areas_can_be_read_on_a_phone(server: Server, opened: Open) -> None:
    page = opened(server, "/storage", width=390)
    texts = page.locator(".treemap text").all()
    assert texts
    for text in texts:
        own, area = text.bounding_box(), text.locator("xpath=../*[name()='rect']").bounding_box()
        assert own["height"] >= 11
        assert own["x"] + own["width"] <= area["x"] + area["width"]


def drag(page: Any, chart: Any, begin: float, end: float) -> None:
    """Drag the pointer over a part of a chart."""
    box = chart.bounding_box()
    page.mouse.move(box["x"] + box["width"] * begin, box["y"] + 20)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * end, box["y"] + 25, steps=4)
    assert page.locator(".chosen-part").bounding_box()["width"] > box["width"] * (end - begin) * 0.9
    page.mouse.up()


ZOOMED = {
    "/m/net": (0.25, 0.75, "from=2&to=4"),
    "/r/net/run-1": (0.5, 1.0, "from=2&to=3#curve-1"),
    "/compare?of=net": (0.25, 0.625, "from=1.98&to=4.03"),
}
"""For each page with curves: a part of the picture's width, and what the address says of it."""


@pytest.mark.parametrize("path", ZOOMED)
def test_dragging_zooms_and_a_double_click_or_escape_goes_back(
    server: Server, opened: Open, path: str
) -> None:
    begin, end, asked = ZOOMED[path]
    page = opened(server, path)
    chart = page.locator("svg[data-axis]").first
    whole = chart.get_attribute("data-axis")
    address = f"http://localhost:{server.port}{path}"
    for back in ("double click", "Escape", "link"):
        page.goto(address)
        drag(page, chart, begin, end)
        joint = "&" if "?" in path else "?"
        page.wait_for_url(f"{address}{joint}{asked}")
        assert chart.get_attribute("data-axis") != whole
        if back == "double click":
            chart.dblclick()
        elif back == "Escape":
            page.keyboard.press("Escape")
        else:
            page.click("text=whole curve")
        page.wait_for_url(address)
        assert chart.get_attribute("data-axis") == whole


def test_a_click_on_a_zoomed_curve_opens_the_version(server: Server, opened: Open) -> None:
    page = opened(server, "/m/net?from=2&to=4")
    box = page.locator(".chart").bounding_box()
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + 20)
    page.wait_for_url("**/m/net/v3")


def test_keys_zoom_and_move_along_the_curve(server: Server, opened: Open) -> None:
    page = opened(server, "/m/net")
    for key, place in (
        ("+", "?from=2&to=4"),
        ("ArrowRight", "?from=3&to=5"),
        ("ArrowLeft", "?from=2&to=4"),
        ("+", "?from=2.5&to=3.5"),
        ("Escape", ""),
    ):
        page.keyboard.press(key)
        page.wait_for_url(f"http://localhost:{server.port}/m/net{place}")
    page.keyboard.press("ArrowRight")
    page.fill("input[name=from]", "3")
    page.press("input[name=from]", "Tab")
    page.keyboard.type("5")
    page.keyboard.press("Enter")
    page.wait_for_url("**/m/net?metric=accuracy&from=3&to=5")
    assert page.locator(".chart").get_attribute("data-axis") == "3 5"


def test_without_scripts_a_form_zooms(server: Server, browser: Any) -> None:
    with contextlib.closing(browser.new_context(java_script_enabled=False)) as context:
        page = context.new_page()
        for path in ("/m/net", "/r/net/run-1", "/compare?of=net"):
            page.goto(server.address(path))
            page.fill("input[name=from]", "2")
            page.fill("input[name=to]", "3")
            page.press("input[name=to]", "Enter")
            assert page.locator("svg[data-axis]").first.get_attribute("data-axis") == "2 3"
            page.click("text=whole curve")
            assert page.locator("svg[data-axis]").first.get_attribute("data-axis") != "2 3"


def test_modules_fold(server: Server, opened: Open) -> None:
    page = opened(server, "/diff?a=net:v1&b=net:v5")
    leaf, head = page.locator("tbody:nth-of-type(1) td.leaf").first, page.locator("tr.module th").first
    assert leaf.is_visible()
    head.press("Enter")
    assert not leaf.is_visible()
    assert head.get_attribute("aria-expanded") == "false"


def test_without_scripts_two_versions_are_compared(server: Server, browser: Any) -> None:
    with contextlib.closing(browser.new_context(java_script_enabled=False)) as context:
        page = context.new_page()
        page.goto(server.address("/m/net"))
        page.check("#v5 input")
        page.check("#v2 input")
        page.click("noscript button, form#selection > button")
        assert "net:v2" in page.locator("h1").inner_text()
        assert "net:v5" in page.locator("h1").inner_text()


def test_what_is_chosen_in_a_form_is_shown(server: Server, opened: Open) -> None:
    page = opened(server, "/m/net")
    page.select_option("select[name=sort]", "accuracy")
    page.wait_for_url("**sort=accuracy**")
    assert page.locator("#rows tbody tr").first.get_attribute("id") == "v5"


def test_nothing_of_a_hostile_name_runs(registry: Registry, opened: Open) -> None:
    text = "\"><img src=x onerror=\"document.title='run'\"><script>document.title='run'</script>"
    fill(registry)
    registry.save("net", {"model": {text: network(1).state_dict()}}, config={text: text}, meta={text: text})
    registry.add_note("net:v6", text)
    with contextlib.closing(Server(registry.root, port=0)) as server:
        for path in ("/m/net/v6", "/diff?a=net:v5&b=net:v6", f"/find?q={text}"):
            page = opened(server, path)
            assert page.title() != "run"
            assert page.locator("main img").count() == 0


def test_the_statistics_of_tensors_in_view_appear(server: Server, opened: Open) -> None:
    page = opened(server, "/m/net/v5#tensors")
    page.wait_for_selector("[data-stat=picture] svg")
    assert float(page.locator("[data-stat=norm]").first.inner_text()) > 0


KEPT = Path(__file__).parents[3] / "docs" / "pictures"
"""The pictures of the README. With `UPDATE_PICTURES=1` this test makes them anew; look at them before they are committed."""


def test_the_pictures_of_the_readme_are_of_pages_as_they_are(tmp_path: Path, browser: Any) -> None:
    """They show the trainings of the README: LeNet5 in two runs."""
    root = tmp_path / "project" / ".registry"
    for words in (
        ["init"],
        ["train", "lenet5", "--epochs", "4"],
        ["train", "--resume", "lenet5", "--set", "epochs=6"],
        ["alias", "lenet5:v6", "production"],
    ):
        program = [sys.executable, "-m", "registry.cli", "--root", str(root), *words]
        subprocess.run(program, check=True, capture_output=True)
    with contextlib.closing(Server(root, port=0)) as server:
        context = browser.new_context(viewport={"width": 1280, "height": 720}, color_scheme="light")
        page = context.new_page()
        page.goto(server.address("/m/lenet5"))
        page.wait_for_selector("#live:not([hidden])", state="attached")
        taken = {"versions": page.screenshot()}
        page.goto(f"http://localhost:{server.port}/diff?a=lenet5:v1&b=lenet5:v6")
        # The bars of the largest change are there.
        page.wait_for_selector(".meter.heat4")
        taken["diff"] = page.screenshot()
        context.close()
    readme = (Path(__file__).parents[3] / "README.md").read_text()
    for name, picture in taken.items():
        path = KEPT / f"{name}.png"
        if os.environ.get("UPDATE_PICTURES"):
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(picture)
        assert path.read_bytes()[:8] == picture[:8]
        assert f"docs/pictures/{name}.png" in readme


def test_a_form_adds_a_tag_in_the_browser(filled: Registry, opened: Open) -> None:
    with contextlib.closing(Server(filled.root, port=0, allows_changes=True)) as server:
        page = opened(server, "/m/net/v1")
        page.select_option("select[name=kind]", "tag")
        page.fill("#text", "seen")
        page.click("text=Add >> nth=-1")
        page.wait_for_selector(".badge.tag")
    assert filled["net:v1"].tags == ("seen",)


def test_values_that_are_not_finite_leave_the_page_at_work(
    filled: Registry, server: Server, opened: Open
) -> None:
    for value in (float("inf"), float("-inf"), float("nan"), 0.5, 0.6):
        filled.save("odd", {"model": {}}, metrics={"m": value})
    page = opened(server, "/m/odd#100%")
    page.keyboard.press("j")
    page.keyboard.press("x")
    assert page.locator("#chosen strong").inner_text() == "1 selected"


def test_a_row_that_did_not_change_is_not_touched(filled: Registry, server: Server, opened: Open) -> None:
    page = opened(server, "/m/net")
    page.wait_for_selector("#live:not([hidden])", state="attached")
    page.keyboard.press("j")
    page.keyboard.press("j")
    page.evaluate("document.getElementById('v4').mark = 1")
    filled.save("net", {"model": network(6).state_dict()}, metrics={"accuracy": 0.9})
    page.wait_for_selector("#v6")
    assert page.evaluate("document.getElementById('v4').mark") == 1
    assert page.evaluate("document.activeElement.closest('tr').id") == "v4"
    page.keyboard.press("j")
    assert page.locator("tr.current").get_attribute("id") == "v3"
    # The curve has the new version, and its points are still versions.
    box = page.locator(".chart").bounding_box()
    page.mouse.move(box["x"] + box["width"] - 2, box["y"] + 20)
    assert page.locator(".curve output").inner_text().startswith("v6")


def test_a_refresh_that_failed_is_repeated(filled: Registry, server: Server, browser: Any) -> None:
    with contextlib.closing(browser.new_context()) as context:
        page = context.new_page()
        page.goto(server.address("/m/net"))
        page.wait_for_selector("#live:not([hidden])", state="attached")
        refused = iter([True])
        page.route(
            "**/m/net", lambda route: route.fulfill(status=500) if next(refused, False) else route.continue_()
        )
        filled.set_tag("net:v1", "seen")
        page.wait_for_selector("#v1 .tag")


def test_a_change_before_the_stream_begins_is_shown(filled: Registry, server: Server, browser: Any) -> None:
    with contextlib.closing(browser.new_context()) as context:
        page = context.new_page()

        def late(route: Any) -> None:
            filled.set_tag("net:v1", "seen")
            route.continue_()

        page.route("**/ui.js", late)
        page.goto(server.address("/m/net"))
        page.wait_for_selector("#v1 .tag")


def test_a_log_opens_at_its_end(filled: Registry, server: Server, opened: Open) -> None:
    (filled.root / "runs" / "net" / "run-1" / "run.log").write_text("a line\n" * 500)
    page = opened(server, "/r/net/run-1")
    assert page.evaluate("document.querySelector('.log').scrollTop") > 0
