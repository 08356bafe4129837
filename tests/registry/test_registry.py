"""The registry: saving, finding, naming and removing checkpoints."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from registry import Checkpoint, Registry
from registry.catalog.versions import list_versions, rank_versions
from registry.store.errors import Conflict, Incompatible, Invalid, NotFound


def save(registry: Registry, value: float, model: str = "net", **fields: Any) -> Checkpoint:
    return registry.save(model, {"model": {"w": torch.full((3,), float(value))}}, **fields)


def test_a_saved_checkpoint_has_everything_that_was_given(registry: Registry) -> None:
    checkpoint = save(
        registry,
        1,
        epoch=3,
        step=100,
        loss=torch.tensor(0.5),
        metrics={"accuracy": 0.9},
        config={"lr": 0.1, "layers": [6, 16]},
        meta={"who": "me"},
        lineage=[{"kind": "resumed-from", "parent": "abc"}],
    )
    for found in (checkpoint, registry["net"], registry["net:v1"], registry[checkpoint.id[:6]]):
        assert (found.name, found.model, found.version, found.id) == ("net:v1", "net", 1, checkpoint.id)
        assert (found.epoch, found.step, found.loss, found.metrics) == (3, 100, 0.5, {"accuracy": 0.9})
        assert (found.config, found.meta) == ({"lr": 0.1, "layers": [6, 16]}, {"who": "me"})
        assert found.record["lineage"] == [{"kind": "resumed-from", "parent": "abc"}]
        assert found.components == ("model",)
        assert found.size == 12
        assert torch.equal(found.state_dict()["w"], torch.ones(3))


@pytest.mark.parametrize("parent", ["net", "net@best", "net:vx", "../net", ""])
def test_a_parent_is_the_name_of_a_version(registry: Registry, parent: str) -> None:
    with pytest.raises(Invalid):
        registry.save("net", {"model": {"weight": torch.ones(1)}}, parent=parent)
    assert registry.names() == []


def test_versions_count_up_for_each_model_and_are_never_given_again(registry: Registry) -> None:
    assert [save(registry, i).name for i in range(3)] == ["net:v1", "net:v2", "net:v3"]
    assert save(registry, 0, "other").name == "other:v1"
    registry.remove(["net:v3", "net:v2"])
    registry.collect_garbage(grace=0)
    registry.rebuild()
    assert save(registry, 3).name == "net:v4"
    assert registry["net@latest"].name == "net:v4"


def test_equal_values_saved_at_the_same_instant_are_two_versions(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by two processes: the record tells versions of the same values apart by the time."""
    monkeypatch.setattr("registry.checkpoints.saving.now", lambda: "2026-11-25T03:29:44.000001Z")
    monkeypatch.setattr("registry.catalog.commit.now", lambda: "2026-11-25T03:29:44.000002Z")
    state = {"model": {"weight": torch.ones(3)}}
    assert [registry.save("net", state).name for _ in range(2)] == ["net:v1", "net:v2"]
    assert registry["net:v1"].id != registry["net:v2"].id
    assert registry["net:v2"].created == "2026-11-25T03:29:44.000002Z"


def test_at_least_four_digits_of_an_id_name_a_checkpoint(registry: Registry) -> None:
    first = save(registry, 1).id
    assert registry[first[:4]].id == first
    with pytest.raises(Invalid, match="is a run or a path"):
        registry["../" + first]
    with pytest.raises(NotFound):
        registry[first[:3]]
    with pytest.raises(NotFound):
        registry["0" * 64]


@pytest.mark.damages
def test_two_ids_with_the_same_beginning_are_a_conflict(registry: Registry) -> None:
    first, second = save(registry, 1), save(registry, 2)
    connection = registry.catalog.connection()
    connection.execute("BEGIN")
    connection.execute("PRAGMA defer_foreign_keys = ON")
    forged = first.id[:10] + second.id[10:]
    for table in ("manifests", "versions", "uses"):
        connection.execute(f"UPDATE {table} SET id = ? WHERE id = ?", (forged, second.id))
    connection.execute("COMMIT")
    with pytest.raises(Conflict, match=r"is the beginning of several ids: net:v2 .*net:v1"):
        registry[first.id[:8]]
    assert registry[first.id[:40]].name == "net:v1"


def test_a_model_may_be_called_like_an_id(registry: Registry) -> None:
    save(registry, 1, "abcdef")
    assert registry["abcdef"].name == "abcdef:v1"


@pytest.mark.parametrize(
    "name", ["", ".x", "-x", "a b", "a/b", "a:b", "a@b", "ü", "a" * 129, "a\n", "\x1b[31m", "a\0"]
)
def test_names_that_would_disturb_are_refused(registry: Registry, name: str) -> None:
    for use in (
        lambda: save(registry, 1, name),
        lambda: registry.save("net", {name: {}}),
    ):
        with pytest.raises(Invalid) as caught:
            use()
        assert str(caught.value).isprintable()
    save(registry, 1)
    for use in (lambda: registry.set_alias("net", name), lambda: registry.set_tag("net", name)):
        with pytest.raises(Invalid):
            use()
    assert list_versions(registry.catalog, None)[1] == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"epoch": -1},
        {"epoch": 1.5},
        {"epoch": True},
        {"step": "3"},
        {"loss": "low"},
        {"loss": True},
        {"metrics": {"a": None}},
    ],
)
def test_fields_of_the_wrong_type_are_refused(registry: Registry, fields: dict[str, Any]) -> None:
    with pytest.raises(Invalid, match=r"expected a (whole )?number"):
        save(registry, 1, **fields)
    assert list(registry.store) == []


def test_what_a_record_cannot_hold_is_refused_by_its_path(registry: Registry) -> None:
    with pytest.raises(Invalid, match=r"config\.net\[0\]"):
        save(registry, 1, config={"net": [object()]})
    with pytest.raises(Invalid, match="meta"):
        save(registry, 1, meta={1: "x"})


def test_nan_is_kept_exactly_and_never_the_best(registry: Registry) -> None:
    for value in (0.1, math.nan, 0.3, 0.3, math.inf):
        save(registry, 0, loss=value, metrics={"accuracy": value})
    assert math.isnan(registry["net:v2"].loss or 0)
    assert math.isnan(registry["net:v2"].metrics["accuracy"])
    record = registry.store.manifest(registry["net:v2"].id).record
    assert math.isnan(record["loss"])
    assert registry.best("net", "accuracy").name == "net:v5"
    assert registry.best("net", "accuracy", smallest=True).name == "net:v1"
    assert registry.best("net", "loss", smallest=True).name == "net:v1"
    registry.remove(["net:v5"])
    assert registry.best("net", "accuracy").name == "net:v3"  # the earlier of two equals
    assert registry.best("net", "loss", smallest=False).name == "net:v3"
    ranked, total = rank_versions(registry.catalog, "net", "accuracy")
    assert ([version.version for version in ranked], total) == ([3, 4, 1], 3)
    with pytest.raises(NotFound, match="no version of net has the metric 'f1'"):
        registry.best("net", "f1")
    with pytest.raises(NotFound, match="there is no model 'nex'; did you mean 'net'"):
        registry.best("nex", "f1")


def test_an_alias_moves_and_goes_with_its_checkpoint(registry: Registry) -> None:
    for i in range(3):
        save(registry, i)
    registry.set_alias("net:v1", "good")
    assert registry["net@good"].aliases == ("good",)
    registry.set_alias("net:v2", "good")
    assert registry["net@good"].name == "net:v2"
    assert registry["net:v1"].aliases == ()
    for reserved in ("latest", "best"):
        with pytest.raises(Invalid, match="is kept by the registry"):
            registry.set_alias("net", reserved)
    with pytest.raises(Conflict, match="net:v2 is held by alias good"):
        registry.remove(["net:v2"])
    registry.remove(["net:v2"], force=True)
    with pytest.raises(NotFound, match="net has no alias 'good'"):
        registry["net@good"]


def test_removing_is_all_or_nothing_and_can_be_tried(registry: Registry) -> None:
    for i in range(3):
        save(registry, i)
    registry.set_tag("net:v2", "paper")
    for references in (["net:v1", "net:v2"], ["net:v1", "net:v9"]):
        with pytest.raises((Conflict, NotFound)):
            registry.remove(references)
    assert [v.name for v in registry.remove(["net:v1", "net", "net:v3"], dry_run=True)] == [
        "net:v1",
        "net:v3",
    ]
    assert list_versions(registry.catalog, "net")[1] == 3
    assert [v.name for v in registry.remove(["net:v1", "net", "net:v3"])] == ["net:v1", "net:v3"]
    assert list_versions(registry.catalog, "net")[1] == 1


def test_a_single_text_names_one_version_and_one_model(registry: Registry) -> None:
    for value in range(3):
        registry.save("n", {"model": {"w": torch.full((4,), value)}})
    assert registry.verify("n:v3").checkpoints == 1
    assert [version.name for version in registry.remove("n:v3")] == ["n:v3"]
    assert [version.version for version in registry.versions("n")] == [2, 1]
    assert [one.model for one in registry.compact("n")] == ["n"]


def test_a_live_model_is_filled_or_left_alone(registry: Registry) -> None:
    checkpoint = save(registry, 2)
    live = {"w": torch.zeros(3)}
    checkpoint.load_into(model=live)
    assert torch.equal(live["w"], torch.full((3,), 2.0))
    with pytest.raises(Incompatible, match=r"^net:v1: model/w has shape \[4\], stored is \[3\]$"):
        checkpoint.load_into(model={"w": torch.zeros(4)})
    with pytest.raises(NotFound, match="net:v1 has no component 'ema'; it has model"):
        checkpoint.state_dict("ema")


@pytest.mark.damages
def test_parameters_are_listed_without_reading_them(registry: Registry) -> None:
    checkpoint = registry.save(
        "net", {"model": {"a": torch.ones(2, 3), "b": torch.ones((), dtype=torch.int8)}}
    )
    for path in registry.root.glob("packs/*/*"):
        path.unlink()
    assert [(p, d, s) for p, d, s, _ in checkpoint.parameters()] == [
        ("model/a", "float32", (2, 3)),
        ("model/b", "int8", ()),
    ]


def test_things_print_themselves_well(registry: Registry) -> None:
    checkpoint = save(registry, 1, epoch=2, loss=0.5, metrics={"accuracy": 0.9})
    expected = f"Checkpoint(name=net:v1, id={checkpoint.id[:12]}, epoch=2, loss=0.5, accuracy=0.9)"
    assert repr(checkpoint) == expected
    console = Console(width=200)
    with console.capture() as capture:
        console.print(checkpoint)
    assert "net:v1" in capture.get()
    assert repr(registry) == f"<Registry {registry.root}: 1 model, 1 version, 4.11 kB>"


def test_the_folder_comes_from_the_environment_unless_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("REGISTRY_ROOT", raising=False)
    assert Registry().root == Path(".registry").absolute()
    monkeypatch.setenv("REGISTRY_ROOT", str(tmp_path / "other"))
    assert Registry().root == tmp_path / "other"
    with pytest.raises(NotFound, match="make one with: registry init"):
        Registry(tmp_path / "none", create=False)
    assert not (tmp_path / "none").exists()


def test_a_registry_is_a_collection_of_models(registry: Registry) -> None:
    assert (len(registry), list(registry), bool(registry), registry.models()) == (0, [], True, [])
    assert "net" not in registry
    for number in range(1, 5):
        registry.save(
            "net",
            {"model": {"w": torch.full((3,), float(number))}},
            metrics={"acc": number % 3},
            loss=float(number),
        )
    registry.save("other", {"model": {"w": torch.ones(1)}})
    registry.set_tag("net:v2", "paper")
    assert (len(registry), list(registry)) == (2, ["net", "other"])
    assert [(m.name, m.versions, m.latest.name) for m in registry.models()] == [
        ("net", 4, "net:v4"),
        ("other", 1, "other:v1"),
    ]
    for text in ("net", "net:v2", "net@latest", registry["net"].id[:8]):
        assert text in registry
    for wrong in ("nets", "net:v9", "net@best", "../x", "", 5, None):
        assert wrong not in registry

    def names(*arguments: Any, **options: Any) -> str:
        return " ".join(
            version.name.removeprefix("net:") for version in registry.versions(*arguments, **options)
        )

    assert names("net") == "v4 v3 v2 v1"
    assert names("net", limit=2) == "v4 v3"
    assert names("net", by="acc") == "v2 v1 v4 v3"
    assert names("net", by="acc", smallest=True, limit=1) == "v3"
    assert names("net", by="loss") == "v1 v2 v3 v4"
    assert names("net", tag="paper") == "v2"
    assert names("net", tag="nobody", by="acc") == ""
    assert names() == "v4 v3 v2 v1 other:v1"
    with pytest.raises(NotFound, match="did you mean 'acc'"):
        registry.versions("net", by="accc", smallest=True)
    with pytest.raises(NotFound, match="did you mean 'net'"):
        registry.versions("nett")
    with pytest.raises(Invalid, match="limit is '0'"):
        registry.versions("net", limit=0)
