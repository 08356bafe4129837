"""W&B and MLflow: they are told of versions, a failure of theirs costs nothing, and what they hold becomes versions."""

from __future__ import annotations

import json
import logging
import os
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
import wandb
from killed import train_forked
from mlflow import MlflowClient
from mlflow.models import Model
from tokenizers import Tokenizer, models
from train_trackers import main
from transformers import AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerFast
from wandb.proto import wandb_internal_pb2

from registry import Registry
from registry.checkpoints.checkpoint import Checkpoint
from registry.files.exporting import export
from registry.integrations import check_release
from registry.integrations import mlflow as with_mlflow
from registry.integrations import wandb as with_wandb
from registry.store.errors import Invalid, NotFound, Unsupported

STATE = {"w": torch.arange(3.0)}


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of its own as working directory, and no connection to anywhere."""
    connect = socket.socket.connect

    def refuse(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and address[0] != "127.0.0.1":
            raise AssertionError(f"a connection to {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", refuse)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for name in ("DIR", "DATA_DIR", "CACHE_DIR", "CONFIG_DIR"):
        monkeypatch.setenv(f"WANDB_{name}", str(tmp_path / "wandb"))
    (tmp_path / "wandb").mkdir()
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    # A process that has used it, as a test of the page does, keeps the folders of that time.
    wandb.teardown()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A local store of MLflow, which takes seconds to make its tables."""
    folder = tmp_path_factory.mktemp("mlflow")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        # MLflow writes what it is set to into the environment.
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        MlflowClient().create_experiment("tests", artifact_location=(folder / "artifacts").as_uri())
        yield os.environ["MLFLOW_TRACKING_URI"]


@pytest.fixture
def run(store: str) -> Iterator[mlflow.ActiveRun]:
    mlflow.set_tracking_uri(store)
    experiment = mlflow.get_experiment_by_name("tests")
    with mlflow.start_run(experiment_id=experiment.experiment_id) as started:
        yield started
        mlflow.set_tracking_uri(store)


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")


@pytest.fixture
def saved(registry: Registry, request: pytest.FixtureRequest, tmp_path: Path) -> Checkpoint:
    """A version of a model that no other test has."""
    registry.save(
        f"net-{request.node.name.partition('[')[0]}",
        {"model": STATE},
        epoch=3,
        step=7,
        loss=0.5,
        metrics={"mAP@0.5": 0.25, "val/ppl": float("inf")},
        config={"optimizer": {"lr": 0.1}, "data": str(Path.cwd() / "data")},
    )
    return registry.set_alias(next(iter(registry)), "good.1")


def logged_to_wandb() -> list[Any]:
    """The artifacts in the file that an offline run leaves to be synced.

    It is a log of LevelDB behind a header of 7 bytes: blocks of 32 KB, with chunks of records, each behind a checksum, its
    length and its kind. A kind above 2 ends a record that began in an earlier chunk, or goes on with it.
    """
    wandb.teardown()
    until = time.monotonic() + 20
    while not (paths := list(Path(os.environ["WANDB_DIR"]).rglob("*.wandb"))) and time.monotonic() < until:
        time.sleep(0.1)
    (path,) = paths
    data, place, text, found = path.read_bytes(), 7, b"", []
    while place < len(data):
        left = -place % 32_768
        if 0 < left < 7:
            place += left
            continue
        size, kind = struct.unpack_from("<HB", data, place + 4)
        text = (b"" if kind <= 2 else text) + data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):
            record = wandb_internal_pb2.Record.FromString(text)
            if record.HasField("artifact"):
                found.append(record.artifact)
    return found


def test_a_version_is_an_artifact_that_refers_to_it(
    tmp_path: Path, registry: Registry, saved: Checkpoint
) -> None:
    with wandb.init(project="tests"):
        assert with_wandb.log(f"{saved.model}@good.1", registry) is not None
    (artifact,) = logged_to_wandb()
    assert (artifact.type, artifact.name, sorted(artifact.aliases)) == (
        "model",
        saved.model,
        ["good.1", "latest"],
    )
    told = json.loads(artifact.metadata)
    assert told == {
        "id": saved.id,
        "model": saved.model,
        "version": 1,
        "created": saved.created,
        "epoch": 3,
        "step": 7,
        "loss": 0.5,
        "metrics": {"mAP@0.5": 0.25, "val/ppl": "inf"},
        "config": {"optimizer": {"lr": 0.1}, "data": "torch-registry:working/data"},
    }
    (entry,) = artifact.manifest.contents
    assert (entry.path, entry.ref) == (f"{saved.model}-v1", f"torch-registry:{saved.id}")
    assert registry[entry.ref.removeprefix("torch-registry:")].id == saved.id
    assert str(tmp_path).encode() not in artifact.SerializeToString()


def test_a_failure_of_wandb_is_told_and_costs_nothing(
    registry: Registry, saved: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(Invalid, match=r"no run of W&B is active; call wandb\.init"):
        with_wandb.log(saved)
    run = wandb.init(project="tests")
    run.finish()
    with caplog.at_level(logging.WARNING):
        assert with_wandb.log(saved, run=run) is None
    assert f"{saved.name} is stored, but W&B was not told of it (UsageError: " in caplog.text
    assert registry[saved.name].id == saved.id
    with wandb.init(project="tests", mode="disabled"):
        with_wandb.log(saved)
    with pytest.raises(NotFound, match="there is no registry"):
        with_wandb.log("net", run=run)
    with pytest.raises(Invalid, match="expected a reference or a version, not NoneType"):
        with_wandb.log(None, run=run)  # type: ignore[arg-type]


def test_a_folder_that_an_artifact_was_downloaded_to_is_a_version(registry: Registry) -> None:
    folder = Path("artifacts/lenet5:v3")
    folder.mkdir(parents=True)
    torch.save({"state_dict": STATE, "epoch": 4}, folder / "model.ckpt")
    checkpoint = with_wandb.import_artifact(folder, "lenet5", registry)
    assert torch.equal(checkpoint.state_dict()["w"], STATE["w"])
    assert checkpoint.lineage == [{"kind": "imported-from", "parent": "wandb:lenet5:v3"}]
    assert checkpoint.epoch == 4


def test_an_artifact_is_downloaded_and_becomes_a_version(
    registry: Registry, saved: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path("there")
    folder.mkdir()
    torch.save(STATE, folder / "model.pt")
    artifact = wandb.Artifact("net", type="model", metadata={"accuracy": 0.5})
    artifact.add_dir(str(folder))
    monkeypatch.setattr(wandb.Artifact, "qualified_name", "team/project/net:v2")
    monkeypatch.setattr(wandb.Artifact, "download", lambda self: str(folder))
    checkpoint = with_wandb.import_artifact(artifact, "net", registry)
    assert checkpoint.lineage[0]["parent"] == "wandb:team/project/net:v2"
    assert checkpoint.meta == {"accuracy": 0.5}
    with wandb.init(project="tests"):
        ours = with_wandb.log(saved)
    with pytest.raises(Invalid, match=rf"does not hold it; .* registry\['{saved.id}'\]"):
        with_wandb.import_artifact(ours, "net", registry)


def test_a_version_is_one_of_a_registered_model(
    registry: Registry, saved: Checkpoint, run: mlflow.ActiveRun, tmp_path: Path
) -> None:
    """Once, however often it is logged, and with what the run has logged by itself untouched."""
    mlflow.log_param("optimizer.lr", "0.10")
    for _ in range(2):
        made = with_mlflow.log(f"{saved.model}@good.1", registry)
        assert made is not None
    (version,) = MlflowClient().search_model_versions(f"name = '{saved.model}'")
    assert (version.source, version.run_id) == (f"torch-registry:{saved.id}", run.info.run_id)
    assert version.tags == {"torch-registry.id": saved.id, "torch-registry.version": saved.name}
    found = MlflowClient().get_run(run.info.run_id).data
    assert found.params == {"optimizer.lr": "0.10", "data": "torch-registry:working/data"}
    assert found.metrics.keys() == {"loss", "mAP_0.5", "val/ppl"}
    history = MlflowClient().get_metric_history(run.info.run_id, "loss")
    assert [(one.step, one.value) for one in history] == [(7, 0.5)]
    assert found.tags["torch-registry.id"] == saved.id
    assert str(tmp_path) not in f"{version}{found.params}"
    edges = [{"kind": "resumed-from", "parent": saved.name}]
    registry.save(saved.model, {"model": STATE}, lineage=edges)
    second = with_mlflow.log(registry.set_alias(saved.model, "good.1"), run=run.info.run_id)
    assert second is not None
    told = json.loads(second.tags["torch-registry.lineage"])
    assert [edge["kind"] for edge in told] == ["resumed-from"]
    assert MlflowClient().get_model_version_by_alias(saved.model, "good_1").version == second.version


def test_a_failure_of_mlflow_is_told_and_costs_nothing(
    registry: Registry, saved: Checkpoint, run: mlflow.ActiveRun, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        mlflow.set_tracking_uri(f"http://127.0.0.1:{closed.getsockname()[1]}")
        with caplog.at_level(logging.WARNING):
            assert with_mlflow.log(saved, run=run) is None
    assert f"{saved.name} is stored, but MLflow was not told of it (MlflowException: " in caplog.text
    assert registry[saved.name].id == saved.id


def test_without_a_run_of_mlflow_that_is_said(saved: Checkpoint) -> None:
    with pytest.raises(
        Invalid, match=r"no run of MLflow is active; call mlflow\.start_run\(\) first, or give run="
    ):
        with_mlflow.log(saved)


def test_a_program_that_is_killed_while_it_logs_has_its_version(tmp_path: Path, store: str) -> None:
    """And what MLflow lacks is added when it is logged again."""
    for method in ("log_batch", "create_model_version", "set_registered_model_alias"):
        train_forked(main, tmp_path / "r", store, "killed", method, killed=True)
        registry = Registry(tmp_path / "r")
        assert registry["killed@good"].loss == 0.5
        assert registry.verify().problems == ()
    assert train_forked(main, tmp_path / "r", store, "killed") == ["0 1 good"]
    assert registry["killed"].version == 1


def test_what_a_run_has_logged_is_a_version(registry: Registry, run: mlflow.ActiveRun) -> None:
    """A state dict lies as `mlflow.pytorch.log_state_dict` writes it."""
    mlflow.log_params({"lr": 1e-3, "layers": [6, 16], "optimizer": "adam"})
    mlflow.log_metrics({"loss": 0.75, "val/acc": 0.25}, step=1)
    mlflow.log_metrics({"loss": 0.5, "val/acc": 0.5}, step=2)
    Path("state").mkdir()
    torch.save(STATE, "state/state_dict.pth")
    mlflow.log_artifacts("state", "model")
    Path("notes.txt").write_text("x")
    mlflow.log_artifact("notes.txt")
    found = with_mlflow.import_run(run.info.run_id, "net", registry=registry)
    assert torch.equal(found.state_dict()["w"], STATE["w"])
    assert found.config == {"lr": 1e-3, "layers": [6, 16], "optimizer": "adam"}
    assert (found.loss, dict(found.metrics)) == (0.5, {"val/acc": 0.5})
    assert found.lineage == [{"kind": "imported-from", "parent": f"mlflow:{run.info.run_id}/model"}]
    Path("last.pt").write_bytes(Path("state/state_dict.pth").read_bytes())
    mlflow.log_artifact("last.pt")
    with pytest.raises(Invalid, match=r"has logged 'last\.pt', 'model'; name one of them with artifact="):
        with_mlflow.import_run(run.info.run_id, "net", registry=registry)
    for name in ("last.pt", "model/state_dict.pth"):
        again = with_mlflow.import_run(run.info.run_id, "net", artifact=name, registry=registry)
        assert again.lineage[0]["parent"] == f"mlflow:{run.info.run_id}/{name}"
    assert len(registry.versions("net")) == 3


def test_what_a_run_does_not_have_is_said(registry: Registry, run: mlflow.ActiveRun) -> None:
    with pytest.raises(Invalid, match="has logged no model and no checkpoint file"):
        with_mlflow.import_run(run.info.run_id, "net", registry=registry)
    with pytest.raises(NotFound, match="MLflow does not give the run"):
        with_mlflow.import_run(run.info.run_id, "net", artifact="gone", registry=registry)
    with pytest.raises(NotFound, match="MLflow does not give the run 'nothing'"):
        with_mlflow.import_run("nothing", "net", registry=registry)
    assert not len(registry)


class Ran:
    """A module's stand-in, whose pickle runs code when it is opened."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


def log_model(flavor: str, **described: Any) -> Model:
    """Log the folder `described` as a model, as `mlflow.FLAVOR.log_model` does, in the run that is active."""
    model = mlflow.initialize_logged_model(name="net", source_run_id=mlflow.active_run().info.run_id)
    Model(model_id=model.model_id).add_flavor(flavor, **described).save("described/MLmodel")
    MlflowClient().log_model_artifacts(model.model_id, "described")
    mlflow.finalize_logged_model(model.model_id, "READY")
    MlflowClient().log_outputs(
        mlflow.active_run().info.run_id, [mlflow.entities.LoggedModelOutput(model.model_id, 0)]
    )
    return model


def test_a_module_that_was_logged_is_never_opened(registry: Registry, run: mlflow.ActiveRun) -> None:
    Path("described/data").mkdir(parents=True)
    torch.save(Ran(), "described/data/model.pth")
    log_model("pytorch", model_data="data")
    with pytest.raises(Unsupported, match=r"if you trust it, save its state dict: torch\.save"):
        with_mlflow.import_run(run.info.run_id, "net", registry=registry)
    assert not Path("ran").exists()
    assert not len(registry)


def test_a_network_of_transformers_that_was_logged_opens_again(
    tmp_path: Path, registry: Registry, run: mlflow.ActiveRun
) -> None:
    size = {"vocab_size": 9, "hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}
    net = BertModel(BertConfig(**size, intermediate_size=4, max_position_embeddings=8))
    net.save_pretrained("described/model")
    made = Tokenizer(models.WordLevel({"cat": 0, "?": 1}, unk_token="?"))
    PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?").save_pretrained(
        "described/components/tokenizer"
    )
    log_model("transformers", model_binary="model", components=["tokenizer"])
    checkpoint = with_mlflow.import_run(run.info.run_id, "bert", registry=registry)
    assert checkpoint.lineage[0]["parent"] == f"mlflow:{run.info.run_id}/net"
    out = export(checkpoint, tmp_path / "out")
    opened = BertModel.from_pretrained(out)
    assert all(torch.equal(opened.state_dict()[name], value) for name, value in net.state_dict().items())
    assert AutoTokenizer.from_pretrained(out)("cat")["input_ids"] == [0]


@pytest.mark.parametrize(("framework", "package"), [("wandb", "wandb"), ("mlflow", "mlflow-skinny")])
def test_a_release_that_is_not_supported_is_named(
    framework: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr("registry.integrations.version", lambda name: asked.append(name) or "0.1")
    with pytest.raises(
        ImportError, match=rf"{framework} 0.1 is not supported, .*torch-registry\[{framework}\]"
    ):
        check_release(framework)
    assert asked == [package]
