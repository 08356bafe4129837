"""Listings: conditions over versions, sequences of versions and models, and tables of pandas."""

from __future__ import annotations

import math
import operator
import pickle
import sys
from pathlib import Path

import pandas
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from registry import Registry
from registry.catalog.listings import Models, Versions
from registry.store.errors import Invalid, NotFound, RegistryError, Unsupported

TIMES = [f"2026-11-0{day}T0{day}:00:00.000000Z" for day in range(1, 6)]
NAMES = ("accuracy", "val/loss", "mAP@0.5", "top 1", "1-IoU")
SIGNS = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "=": operator.eq,
    "==": operator.eq,
    "!=": operator.ne,
}


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    found = Registry(tmp_path_factory.mktemp("listings") / "r")
    for i in range(5):
        metrics = dict.fromkeys(NAMES, i / 4) if i != 3 else {"accuracy": math.nan}
        tree = {"model": {"w": torch.full((i + 1,), float(i))}}
        found.save("net", tree, epoch=i, step=10 * i, loss=None if i == 3 else 1 - i / 4, metrics=metrics)
    found.save("other", {"model": {"w": torch.ones(1)}}, metrics={"f1": 0.5})
    connection = found.catalog.connection()
    for number, stamp in enumerate(TIMES, 1):
        connection.execute(
            "UPDATE versions SET created = ? WHERE version = ? AND model = 'net'", (stamp, number)
        )
    return found


def numbers(registry: Registry, where: str) -> list[int]:
    return sorted(version.version for version in registry.versions("net", where=where))


@pytest.mark.parametrize(
    ("where", "found"),
    [
        ("accuracy > 0.5", [5]),
        ("accuracy>=.5", [3, 5]),
        ("accuracy != 0.5", [1, 2, 5]),
        ("accuracy >= 0.25 AND accuracy < 1e0 and epoch>1", [3]),
        ("val/loss <= 0.25", [1, 2]),
        ("mAP@0.5 == 1", [5]),
        ("'top 1' = 1", [5]),
        ('"1-IoU" = 1', [5]),
        ("1-IoU = 1", [5]),
        ("loss < 0.5", [5]),
        ("epoch >= 3 and step <= 30", [4]),
        ("version > 2 and version < 4", [3]),
        ("size >= 16", [4, 5]),
        ("size > 99999999999999999999999", []),
        ("size < 1e999", [1, 2, 3, 4, 5]),
        ("created >= 2026-11-03", [3, 4, 5]),
        ("created > 2026-11-03", [4, 5]),
        ("created <= 2026-11-03", [1, 2, 3]),
        ("created < 2026-11-03", [1, 2]),
        ("created = 2026-11-03", [3]),
        ("created != 2026-11-03", [1, 2, 4, 5]),
        ("created > 2026-11-03T03:00", [4, 5]),
        ("created >= '2026-11-03 05:00+02:00'", [3, 4, 5]),
    ],
)
def test_a_condition_chooses_versions(registry: Registry, where: str, found: list[int]) -> None:
    assert numbers(registry, where) == found


@given(
    st.sampled_from(NAMES), st.sampled_from(sorted(SIGNS)), st.floats(allow_nan=False, allow_infinity=False)
)
def test_a_comparison_means_what_python_means(registry: Registry, name: str, sign: str, value: float) -> None:
    having = {version: (version - 1) / 4 for version in (1, 2, 3, 5)}
    wanted = [version for version, one in having.items() if SIGNS[sign](one, value)]
    assert numbers(registry, f"'{name}' {sign} {value!r}") == wanted


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("", "where is empty; expected comparisons such as accuracy > 0.95, joined by and"),
        ("accuracy", "where has the beginning of a comparison, at character 1; expected"),
        ("accuracy > 1 and", "where has the beginning of a comparison, at character 17; expected"),
        ("accuracy > 1 or loss < 1", "where has 'or' where 'and' should be, at character 14; expected"),
        ("accuracy > high", "where has 'high' where a number should be, at character 12; expected"),
        ("accuracy > nan", "where has 'nan' where a number should be, at character 12; expected"),
        ("accuracy > 1_0", "where has '1_0' where a number should be, at character 12; expected"),
        ("accuracy is 1", "where has 'is' where a sign such as > should be, at character 10; expected"),
        ("> accuracy 1", "where has '>' where a name should be, at character 1; expected"),
        ("accuracy > <", "where has '<' where a value should be, at character 12; expected"),
        ("accuracy > 'x", "where has ''', at character 12; expected"),
        ("created > soon", "where has 'soon' where a date such as 2026-11-01 should be, at character 11"),
        ("created > 9999-12-31", "where has '9999-12-31' where a date"),
        (" and ".join(["loss > 0"] * 21), "where has more than 20 comparisons; give fewer"),
        (5, "where is '5', expected a text such as 'accuracy > 0.95'"),
    ],
)
def test_a_malformed_condition_says_where(registry: Registry, where: str, message: str) -> None:
    with pytest.raises(Invalid) as caught:
        registry.versions("net", where=where)
    assert str(caught.value).startswith(message)


def test_an_unknown_name_in_a_condition_lists_those_that_there_are(registry: Registry) -> None:
    with pytest.raises(NotFound) as caught:
        registry.versions("net", where="loss < 1 and acuracy > 0.9")
    assert str(caught.value) == (
        "where names 'acuracy' at character 14, which no version of net has; did you mean 'accuracy'? "
        "there are 1-IoU, accuracy, mAP@0.5, top 1, val/loss, loss, epoch, step, version, size, created"
    )
    with pytest.raises(NotFound, match=r"which no version of net has; there are 1-IoU"):
        registry.versions("net", where="f1 > 0")
    assert [version.name for version in registry.versions(where="f1 > 0")] == ["other:v1"]


@given(st.text(alphabet=st.characters(codec=None) | st.sampled_from(list("<>=!'\" and;-")), max_size=60))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_is_a_condition_or_one_clear_error(registry: Registry, where: str) -> None:
    try:
        registry.versions("net", where=where)
    except RegistryError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("where", ["'; DROP TABLE versions; --' > 1", "loss > 1) OR (1 = 1", "v.loss > 0"])
def test_no_text_of_a_condition_is_run(registry: Registry, where: str) -> None:
    with pytest.raises(RegistryError):
        registry.versions("net", where=where)
    assert len(registry.versions("net")) == 5


def test_versions_are_asked_for_by_everything_at_once(registry: Registry) -> None:
    registry.set_tag("net:v2", "paper")
    registry.set_tag("net:v3", "paper")
    try:
        given = {"by": "accuracy", "tag": "paper", "where": "accuracy > 0"}
        assert [version.version for version in registry.versions("net", **given)] == [3, 2]
        assert [version.version for version in registry.versions("net", **given, before=3)] == [2]
        assert registry.versions("net", **given, before=2) == []
    finally:
        registry.remove_tag("net:v2", "paper")
        registry.remove_tag("net:v3", "paper")
    assert [version.version for version in registry.versions("net", before=3)] == [2, 1]
    assert len(registry.versions("net", before=10**30)) == 5
    for wrong in (0, -1, 1.0, "v3", True):
        with pytest.raises(Invalid, match=r"before is '.*', expected a whole number of 1 or more"):
            registry.versions("net", before=wrong)


def test_a_listing_is_an_immutable_sequence(registry: Registry) -> None:
    versions = registry.versions("net", limit=4)
    assert isinstance(versions, Versions)
    assert versions == list(versions)
    assert versions == tuple(versions)
    assert versions == versions[:]
    assert versions != versions[1:]
    assert versions != "net"
    assert versions[-1].name == "net:v2"
    assert [version.name for version in versions[:2]] == ["net:v5", "net:v4"]
    assert versions[0] in versions
    with pytest.raises(TypeError):
        versions[0] = versions[1]  # type: ignore[index]
    with pytest.raises(TypeError):
        hash(versions)
    again = pickle.loads(pickle.dumps(versions[1:3]))
    assert [version.name for version in again] == ["net:v4", "net:v3"]
    assert repr(again) == repr(versions[1:3])


def test_a_listing_prints_itself_in_a_line(registry: Registry) -> None:
    shown = [
        registry.versions("net"),
        registry.versions("net", limit=2),
        registry.versions("net", by="accuracy", limit=2)[:1],
        registry.versions(),
        registry.models(),
        Models(),
    ]
    assert list(map(repr, shown)) == [
        "<Versions of net: 5>",
        "<Versions of net: 2 of 5>",
        "<Versions of net by accuracy: 1 of 4>",
        "<Versions: 6>",
        "<Models: 2 with 6 versions>",
        "<Models: 0 with 0 versions>",
    ]


def test_a_model_knows_its_best_version_and_its_own_bytes(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "r")
    tree = {"model": {"w": torch.arange(1000.0)}}
    with registry.run("net", monitor="accuracy") as run:
        run.save(states=tree, metrics={"accuracy": 0.9})
        run.save(states={"model": {"w": torch.zeros(1000)}}, metrics={"accuracy": 0.5})
    registry.save("twin", tree)
    net, twin = registry.models()
    assert (net.best and net.best.name, net.latest.name, net.versions) == ("net:v1", "net:v2", 2)
    assert (twin.best, twin.own) == (None, 0)
    stored = registry.status().stored
    assert net.own == stored > 8000


def test_many_models_are_listed_by_as_many_queries_as_one(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "r")

    def queries() -> int:
        asked: list[str] = []
        connection = registry.catalog.connection()
        connection.set_trace_callback(asked.append)
        registry.models()
        connection.set_trace_callback(None)
        return sum("FROM" in one for one in asked)

    registry.save("a", {})
    few = queries()
    for i in range(30):
        registry.save(f"b{i}", {})
    assert queries() == few


def test_versions_and_models_become_tables_of_pandas(registry: Registry) -> None:
    table = registry.versions("net").to_pandas()
    assert isinstance(table, pandas.DataFrame)
    assert list(table["version"]) == [5, 4, 3, 2, 1]
    assert list(table["name"])[:2] == ["net:v5", "net:v4"]
    assert table["accuracy"].max() == 1.0
    assert table["accuracy"].isna().sum() == 1
    assert table.loc[table["name"] == "net:v3", "val/loss"].item() == 0.5
    models = registry.models().to_pandas()
    assert list(models["name"]) == ["net", "other"]
    assert list(models["versions"]) == [5, 1]
    empty = registry.versions("net", tag="nobody").to_pandas()
    assert (len(empty), list(empty)[:2]) == (0, ["name", "model"])


def test_a_metric_with_the_name_of_a_column_has_its_own_column(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "r")
    registry.save("net", {}, epoch=3, metrics={"epoch": 0.5})
    table = registry.versions().to_pandas()
    assert (table["epoch"].item(), table["metrics.epoch"].item()) == (3, 0.5)


def test_without_pandas_an_error_says_how_to_install_it(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(Unsupported, match=r"^to_pandas needs pandas, .*; run: pip install pandas$"):
        registry.versions().to_pandas()
