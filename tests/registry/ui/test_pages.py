"""What the pages show, as HTML, JSON and CSV."""

from __future__ import annotations

import csv
import gzip
import html
import io
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import torch
from browsing import Client, network

from registry import Registry
from registry.checkpoints import measured
from registry.reports import charts

ADDRESSES = (
    "/",
    "/m/net",
    "/m/net?sort=accuracy",
    "/m/net?sort=loss&tag=paper",
    "/m/net?before=v3",
    "/m/net?from=2&to=4",
    "/m/net?from=90",
    "/m/net/v5",
    "/m/net@production",
    "/m/other/v1",
    "/runs",
    "/runs?model=net",
    "/r/net/run-2",
    "/r/net/run-1?from=2&to=3",
    "/r/net/run-1?from=90",
    "/compare",
    "/compare?of=net&from=2&to=4",
    "/compare?of=net&to=-1",
    "/compare?of=net",
    "/compare?of=net/run-1+net/run-2&metric=accuracy",
    "/lineage",
    "/lineage?of=net&full=1",
    "/lineage?of=net/run-1",
    "/storage",
    "/data",
    "/diff",
    "/diff?a=net:v1&b=net:v5",
    "/diff?a=net:v5&b=other",
    "/diff?a=net&b=net",
    "/find",
    "/find?q=reviewers",
    "/find?q=nothing-like-it",
)


class Links(HTMLParser):
    """Collects where a page leads, and whether its elements nest."""

    EMPTY = frozenset(
        ["meta", "link", "input", "br", "rect", "line", "circle", "polyline", "polygon", "path", "option"]
    )

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.links += [value for name in ("href", "src") if (value := given.get(name)) and value != "#"]
        self.wrong += [f"{tag} {name}" for name in given if name == "style" or name.startswith("on")]
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.EMPTY and (not self.open or self.open.pop() != tag):
            self.wrong.append(f"/{tag}")


@pytest.mark.parametrize("address", ADDRESSES)
def test_a_page_is_whole_and_its_links_lead_somewhere(unchanged: Client, address: str) -> None:
    answer = unchanged.get(address)
    assert answer.status == 200
    found = Links(answer.text)
    assert (found.wrong, found.open) == ([], [])
    assert "{{" not in answer.text
    for link in dict.fromkeys(found.links):
        if link.startswith(("/", "?")) and "file=1" not in link:
            assert unchanged.get(link).status in (200, 302), link


@pytest.mark.parametrize(
    ("address", "command"),
    [
        ("/?format=json", ["list"]),
        ("/m/net?sort=accuracy&format=json", ["list", "net", "--sort", "accuracy"]),
        ("/m/net/v5.json", ["show", "net:v5", "--params"]),
        ("/runs.json", ["runs"]),
        ("/compare?of=net+other&metric=accuracy&format=json", ["compare", "net", "other"]),
        ("/data.json", ["cache", "list"]),
        ("/api/v1/models", ["list"]),
        ("/storage.json", ["du"]),
        ("/m/net?where=accuracy>0.8&format=json", ["ls", "net", "--match", "accuracy>0.8"]),
        ("/api/v1/diff?a=net:v1&b=net:v5", ["diff", "net:v1", "net:v5", "--values"]),
    ],
)
def test_a_page_for_programs_says_what_the_command_prints(
    unchanged: Client, address: str, command: list[str]
) -> None:
    words = [sys.executable, "-m", "registry.cli", *command, "--json", "--root", unchanged.place]
    printed = json.loads(subprocess.run(words, capture_output=True, text=True).stdout)
    shown = unchanged.get(address)
    assert shown.headers["content-type"].startswith("application/json")
    document = shown.json
    if isinstance(document, dict):
        document.pop("next", None)
    assert document == printed


def test_a_table_for_spreadsheets_has_a_row_for_each_version(unchanged: Client) -> None:
    answer = unchanged.get("/m/net.csv")
    rows = list(csv.DictReader(io.StringIO(answer.text)))
    assert answer.headers["content-type"].startswith("text/csv")
    assert [row["name"] for row in rows] == [f"net:v{i}" for i in (5, 4, 3, 2, 1)]
    assert float(rows[0]["accuracy"]) == pytest.approx(0.95)
    assert rows[0]["loss"] == ""


def test_a_cell_is_no_formula(client: Client, filled: Registry) -> None:
    filled.save("net", {"model": network(1).state_dict()}, metrics={"=1+1": 0.5})
    assert "'=1+1" in client.get("/m/net?format=csv").text.splitlines()[0]


def test_a_name_that_ends_like_a_form_is_a_name_first(client: Client, filled: Registry) -> None:
    filled.save("net.json", {"model": network(1).state_dict()})
    assert "<h1>net.json</h1>" in client.get("/m/net.json").text
    assert client.get("/m/net.json.json").json["total"] == 1
    assert client.get("/m/net.json?format=json").json["total"] == 1


def test_pages_of_versions_meet_without_gap_or_double(client: Client, filled: Registry) -> None:
    tree = {"model": {}}
    for step in range(230):
        filled.save("long", tree, step=step, metrics={"accuracy": (step * 7 % 230) / 230})
    filled.remove(["long:v100", "long:v131"])
    for first in ("/m/long?format=json", "/m/long?sort=accuracy&format=json"):
        seen: list[str] = []
        following = first
        while following:
            document = client.get(f"{following}&format=json" if "format" not in following else following).json
            seen += [version["name"] for version in document["versions"]]
            following = document["next"]
        assert len(seen) == len(set(seen)) == 228
    assert client.get("/m/long?before=v101&format=json").json["versions"][0]["name"] == "long:v99"


def test_pages_of_runs_meet_without_gap_or_double(client: Client, filled: Registry) -> None:
    rows = [
        {
            "op": "run",
            "name": f"many/r{i}",
            "model": "many",
            "at": f"2026-01-01T00:{i % 60:02d}:00.000000Z",
            "record": {},
        }
        for i in range(230)
    ]
    filled.catalog.commit(lambda view: rows)
    for first in ("/runs?format=json", "/runs?model=many&format=json", "/api/v1/runs?format=json"):
        seen: list[str] = []
        following = first
        while following:
            document = client.get(f"{following}&format=json" if "format" not in following else following).json
            assert len(document["runs"]) <= 100
            seen += [run["name"] for run in document["runs"]]
            following = document["next"]
        wanted = [info.name for info in filled.runs.find("many" if "model" in first else None)]
        assert seen == wanted
        assert len(seen) >= 230
    text = client.get("/runs").text
    assert text.count("<tr id=") == 100
    older = re.search(r'href="([^"]+)" data-key="\["', text)
    assert older
    assert 'href="/runs" data-key="]"' in client.get(html.unescape(older[1])).text
    assert client.get("/runs?before=net/run-99").status == 404
    assert "There are no older runs" in client.get(f"/runs?before={filled.runs.find()[-1].name}").text


def test_a_page_is_drawn_once_until_the_registry_changes(client: Client, filled: Registry) -> None:
    first = client.get("/m/net")
    tag = first.headers["etag"]
    assert client.get("/m/net", If_None_Match=tag).status == 304
    filled.add_note("net:v1", "a note")
    filled.save("net", {"model": network(7).state_dict()})
    second = client.get("/m/net", If_None_Match=tag)
    assert second.status == 200
    assert "/m/net/v6" in second.text


def test_pages_travel_compressed(unchanged: Client) -> None:
    plain = unchanged.get("/m/net")
    packed = unchanged.get("/m/net", Accept_Encoding="gzip")
    assert packed.headers["content-encoding"] == "gzip"
    assert len(packed.body) < len(plain.body) / 2
    assert gzip.decompress(packed.body) == plain.body


def test_a_page_of_a_hundred_versions_is_small(client: Client, filled: Registry) -> None:
    with filled.run("long") as run:
        for step in range(300):
            measured = {"accuracy": math.sin(step), "val/loss": math.cos(step)}
            run.save(model={}, epoch=step, step=100 * step, loss=1 / (step + 1), metrics=measured)
    plain = client.get("/m/long")
    packed = client.get("/m/long", Accept_Encoding="gzip")
    assert plain.text.count("<tr id=") == 100
    assert len(plain.body) < 65_000
    assert len(packed.body) < 10_000


@pytest.mark.parametrize(
    ("address", "status", "says"),
    [
        ("/m/nett", 404, "did you mean 'net'?"),
        ("/m/net/v99", 404, "its newest are v5, v4"),
        ("/m/net/v0", 400, "v0"),
        ("/r/net/run-9", 404, "there is no run"),
        ("/nothing", 404, "there is no page /nothing"),
        ("/m/net?before=x", 400, "before is not a number"),
        ("/diff?a=net&b=nett", 404, "nett"),
        ("/compare?of=net&metric=f1", 404, "f1"),
        ("/m/net?format=xml", 400, "format"),
        ("/c/ffffff", 404, "ffffff"),
        ("/m/net?sort=f1", 404, "f1"),
        ("/?metric=f1", 404, "f1"),
        ("/lineage?of=net/run-9", 404, "net/run-9"),
        ("/m/net?from=x", 400, "from is not a number"),
        ("/r/net/run-1?to=nan", 400, "to is not a number"),
        ("/compare?of=net&from=1e999", 400, "from is not a number"),
    ],
)
def test_an_error_says_what_is_wrong(unchanged: Client, address: str, status: int, says: str) -> None:
    answer = unchanged.get(address)
    assert answer.status == status
    assert says in re.sub("&#39;|&#x27;", "'", answer.text)
    joint = "&" if "?" in address else "?"
    if "format" not in address:
        document = unchanged.get(f"{address}{joint}format=json")
        assert document.status == status
        assert set(document.json["error"]) == {"kind", "message", "hint"}


def test_an_id_and_a_find_lead_to_the_page(client: Client, filled: Registry) -> None:
    assert client.get(f"/c/{filled['net:v2'].id[:12]}").headers["location"] == "/m/net/v2"
    for text, place in [
        ("net:v2", "/m/net/v2"),
        ("net@production", "/m/net/v5"),
        ("net", "/m/net"),
        ("net/run-1", "/r/net/run-1"),
    ]:
        assert client.get(f"/find?q={text.replace('/', '%2F')}").headers["location"] == place
    assert client.get("/r/latest").headers["location"] == "/r/net/run-2"
    assert client.get("/find?q=paper&format=json").json["versions"][0]["name"] == "net:v4"
    found = client.get("/find?q=accuracy+>+0.93&format=json".replace(">", "%3E")).json["versions"]
    assert [version["name"] for version in found] == ["net:v5", "net:v4"]


def test_the_worker_alone_loads_torch(filled: Registry) -> None:
    program = (
        "import sys, urllib.request\nfrom registry.ui.server import Server\n"
        "server = Server(sys.argv[1], port=0, has_token=False)\n"
        "for path in ('/', '/m/net', '/m/net/v5', '/diff?a=net:v1%26b=net:v2'.replace('%26', '&'), '/runs', '/lineage', '/storage', '/data'):\n"
        "    assert urllib.request.urlopen(f'http://127.0.0.1:{server.port}{path}').status == 200\n"
        "server.close()\nprint(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", program, str(filled.root)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not {"torch", "numpy", "pydantic", "tensorboard"} & set(done.stdout.split())


def test_a_tensor_has_statistics_that_stay_for_ever(unchanged: Client) -> None:
    rows = re.findall(r'data-stats="([^"]+)"', unchanged.get("/m/net/v5").text)
    address = html.unescape(rows[0])
    answer = unchanged.get(address)
    assert answer.json["elements"] == sum(answer.json["histogram"])
    assert answer.json["picture"].startswith("<svg")
    assert "immutable" in answer.headers["cache-control"]
    digest = re.search("[0-9a-f]{64}", address)
    assert digest
    kept = measured.known(digest[0])
    assert kept is not None
    assert kept["histogram"] == answer.json["histogram"]
    wrong = re.sub("tensors/[0-9a-f]{64}", f"tensors/{'0' * 64}", address)
    assert unchanged.get(wrong).status == 404


def axis(text: str) -> str:
    """Where the first curve of a page begins and ends."""
    found = re.search(r'data-axis="([^"]+)"', text)
    assert found
    return found[1]


def test_an_address_has_the_part_of_a_curve(client: Client, filled: Registry) -> None:
    path = filled.root / "runs" / "net" / "run-1" / "scalars.jsonl"
    path.write_text("".join(f'{{"s": {i}, "t": {i}.0, "k": "Loss", "v": {i % 7}}}\n' for i in range(5_000)))
    for address, whole, part in (
        ("/m/net?metric=accuracy", "1 5", "2 4"),
        ("/r/net/run-1?x=step", "0 4999", "2 4"),
        ("/compare?of=net/run-1&metric=Loss", "0 4998", "2 4"),
        ("/compare?of=net", "1 5", "2 4"),
    ):
        assert axis(client.get(address).text) == whole
        for asked in ("from=2&to=4", "from=4&to=2", "from=v2&to=+4.5"):
            shown = client.get(f"{address}&{asked}").text
            assert axis(shown) == part
            assert f'href="{html.escape(address)}" data-key="Escape"' in shown.replace("%2F", "/")
        assert 'data-key="Escape"' not in client.get(f"{address}&from=&to=").text
    rows = client.get("/compare?of=net&from=2&to=4&format=csv").text.splitlines()
    assert [row.partition(",")[0] for row in rows] == ["epoch", "2.0", "3.0", "4.0"]
    # Only a part of so many points is drawn, unless fewer are asked for.
    assert client.get("/compare?of=net/run-1&metric=Loss").text.count(",") < 2_000
    assert axis(client.get("/compare?of=net/run-1&metric=Loss&from=4999").text) == "4999 4999"


def test_a_part_of_a_smoothed_curve_goes_on_from_what_stands_before_it(
    client: Client, filled: Registry
) -> None:
    address = "/compare?of=net&metric=accuracy&smooth=60"
    ends = [
        re.findall(r"<title>net: ([^<]+) at 5</title>", client.get(f"{address}{part}").text)
        for part in ("", "&from=4")
    ]
    assert ends[0] == ends[1] != []


def test_places_and_orders_keep_the_part_of_the_curve(client: Client, filled: Registry) -> None:
    for step in range(101):
        filled.save("long", {"model": {}}, step=step, metrics={"accuracy": step / 101})
    following = client.get("/m/long.json?from=3&to=8").json["next"]
    assert "from=3&to=8" in following
    assert axis(client.get(following).text) == "3 8"
    assert "/m/long?sort=loss&amp;from=3&amp;to=8" in client.get("/m/long?from=3&to=8").text


def test_a_model_has_its_colour_on_every_page(unchanged: Client) -> None:
    for name in ("net", "other"):
        tone = charts.colour_of(name)
        assert f'class="chart {tone}"' in unchanged.get(f"/m/{name}").text or name == "other"
        assert f'class="curve {tone}"' in unchanged.get("/compare?of=net+other&metric=accuracy").text
        assert f'class="curve {tone}"' in unchanged.get(f"/compare?of={name}:v1&metric=accuracy").text
    assert f'class="chart {charts.colour_of("net")}"' in unchanged.get("/r/net/run-1").text


def test_a_diff_says_how_the_loss_went(unchanged: Client) -> None:
    text = unchanged.get("/diff?a=net:v1&b=net:v3").text
    assert re.search(r"<dt>loss</dt><dd>1\.0000 → 0\.3333 <span class=\"delta ok\">−0\.6667</span>", text)
    assert "<dt>accuracy</dt>" in text
    assert re.search(r"<dt>loss</dt><dd>1\.0000 → - *</dd>", unchanged.get("/diff?a=net:v1&b=net:v5").text)
    assert "<dt>loss</dt>" not in unchanged.get("/diff?a=net:v4&b=net:v5").text


def test_the_lineage_of_a_run_is_that_of_its_versions(client: Client, filled: Registry) -> None:
    chains = client.get("/lineage?of=net/run-2&full=1&format=json").json["chains"]
    assert [chain["versions"] for chain in chains] == [[f"net:v{i}"] for i in (5, 4, 3, 2, 1)]
    assert len(client.get("/lineage?of=net/run-1&full=1&format=json").json["chains"]) == 6
    assert "/lineage?of=net%2Frun-2" in client.get("/r/net/run-2").text
    with filled.run("empty") as run:
        assert f"{run.name} saved no version." in client.get(f"/lineage?of={run.name}").text


@pytest.mark.parametrize(
    ("address", "says", "typed"),
    [
        ("/m/net?where=accurcy>0.5", "accurcy", "accurcy&gt;0.5"),
        ("/m/net?where=accuracy>", "where", "accuracy&gt;"),
        ("/compare?of=net+nett", "nett", "net nett"),
        ("/compare?of=net&metric=f1", "f1", "net"),
    ],
)
def test_a_mistake_in_a_form_leaves_the_page_with_what_was_typed(
    unchanged: Client, address: str, says: str, typed: str
) -> None:
    answer = unchanged.get(address)
    assert answer.status in (400, 404)
    assert re.search(r'<p role="alert"><strong class="bad">error:</strong>[^<]*' + says, answer.text)
    assert f'value="{typed}"' in answer.text
    assert unchanged.get(f"{address}&format=json").status == answer.status
    if "/m/" in address:
        assert answer.text.count('name="v"') == 5  # as without a condition


def test_what_was_made_with_cached_data_leads_to_its_page(filled: Registry, client: Client) -> None:
    data = filled.cached(lambda size: [torch.zeros(size)])
    data(4)
    (one,) = (
        one for one in filled.artifacts.find() if not one.runs and one.record["parameters"] == {"size": 4}
    )
    with filled.run("named", dataset=one.id) as run:
        run.save(model=network(21))
    with filled.run("unknown", dataset="ab" * 32) as run:
        run.save(model=network(22))
    link = f'<a href="/data/{one.key[:12]}">'
    for page in ("/m/named/v1", "/r/named/run-1"):
        assert link in client.get(page).text
        assert client.get(f"/data/{one.key[:12]}").status == 200
    text = client.get("/m/unknown/v1").text
    assert "made with the data" in text
    assert "abababababab" in text
    assert "/data/ab" not in text
    assert "made with the data" not in client.get("/m/other/v1").text
