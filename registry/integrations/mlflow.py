"""MLflow: a version as a version of a registered model, and the artifacts of runs as versions.

    from registry.integrations.mlflow import import_run, log

    log("lenet5@best")
    import_run("0ab1c2...", "lenet5")

MLflow holds the address of the version and what is recorded of it; its content stays in the registry.
"""

from __future__ import annotations

import json
import posixpath
import re
import tempfile
from datetime import datetime
from pathlib import Path
from urllib.parse import urlparse

from registry.checkpoints.checkpoint import Checkpoint
from registry.configs.documents import flatten, read_value
from registry.files.formats import format_of
from registry.files.importing import import_checkpoint
from registry.files.reading import read_checkpoint_file
from registry.integrations import check_release
from registry.integrations.tracked import address, facts, version_of, warn_of
from registry.log.metrics import is_metric
from registry.registry import Registry
from registry.store.errors import Invalid, NotFound
from registry.store.text import printable, quoted

check_release("mlflow")

import mlflow  # noqa: E402
from mlflow import MlflowClient  # noqa: E402
from mlflow.entities import Metric, Param, Run, RunTag  # noqa: E402
from mlflow.entities.model_registry import ModelVersion  # noqa: E402
from mlflow.exceptions import MlflowException  # noqa: E402

_ID = "torch-registry.id"
"""The tag that has the id of a version."""

_VERSION = "torch-registry.version"


def log(
    reference: str | Checkpoint, registry: Registry | None = None, run: Run | str | None = None
) -> ModelVersion | None:
    """Log a version to MLflow: its numbers and its configuration to a run, and a version of the registered model.

    The registered model has the model's name. Its version has the address as `source`, the aliases, and the tag
    `torch-registry.id`. Log a version again after an alias has moved to it: it becomes no second one. Where MLflow allows
    fewer characters in a name, `_` stands for the others.

    Args:
        reference: a version, such as `run.save` returns, or a reference such as `lenet5@best`.
        registry: where the reference leads; as for `Registry()` unless given.
        run: the run of MLflow, or its id; the active one unless given. A parameter that it has already stays as it is.

    Returns:
        The version of the registered model; None if MLflow failed, which the log tells. A version is stored before MLflow
        hears of it, so it is never lost.

    Raises:
        Invalid: if no run of MLflow is active, or the text is no reference.
        NotFound, Conflict: if the reference leads to no version, or to several.
    """
    checkpoint = version_of(reference, registry)
    run = mlflow.active_run() if run is None else run
    if run is None:
        raise Invalid("no run of MLflow is active", "call mlflow.start_run() first, or give run=")
    run_id = run if isinstance(run, str) else run.info.run_id
    try:
        client = MlflowClient()
        _log_numbers(client, run_id, checkpoint)
        return _log_version(client, run_id, checkpoint)
    # Whatever fails at a tracker, training goes on.
    except Exception as error:
        warn_of(checkpoint, "MLflow", error)
        return None


def import_run(
    run_id: str, model: str, *, artifact: str | None = None, registry: Registry | None = None
) -> Checkpoint:
    """Store what a run of MLflow has logged as the next version of a model.

    Args:
        run_id: the run.
        model: the model that gets the version.
        artifact: the path of an artifact, or the name of a logged model; needed where the run has several.
        registry: the registry that gets it; as for `Registry()` unless given.

    Returns:
        The version. The run's parameters are its configuration, and the run's latest metrics its metrics. Its lineage
        says `imported-from` and names the run.

    Raises:
        NotFound: if there is no such run or artifact.
        Invalid: if the run has no artifacts, or several and none is named.
        Unsupported: if the artifact holds a module, which runs code when it is opened; says what to do.
        Conflict, StorageError: as `registry.files.importing.import_checkpoint`.
    """
    client = MlflowClient()
    with tempfile.TemporaryDirectory() as folder:
        try:
            run = client.get_run(run_id)
            name, uri = _chosen(client, run, artifact)
            # A store on this machine gives the files themselves. From others they are fetched.
            is_local = urlparse(uri).scheme in ("", "file")
            path = mlflow.artifacts.download_artifacts(
                artifact_uri=uri, dst_path=None if is_local else folder
            )
        except (MlflowException, OSError) as error:
            said = printable(str(error).partition("\n")[0])[:300]
            raise NotFound(f"MLflow does not give the run {quoted(run_id)}: {said}") from None
        imported = read_checkpoint_file(Path(path))
        metrics = {key: value for key, value in run.data.metrics.items() if is_metric(key)}
        return import_checkpoint(
            registry or Registry(),
            imported,
            model,
            origin=f"mlflow:{run_id}/{name}",
            config={key: read_value(text) for key, text in run.data.params.items()} or None,
            loss=metrics.pop("loss", None),
            metrics=metrics,
            meta={"mlflow_run": run.info.run_name or run_id},
        )


def _log_numbers(client: MlflowClient, run_id: str, checkpoint: Checkpoint) -> None:
    """Metrics, configuration and tags to a run."""
    told = facts(checkpoint)
    # The time of the save, so that MLflow takes the same numbers once.
    time = int(datetime.fromisoformat(checkpoint.created).timestamp() * 1000)
    step = checkpoint.epoch or 0 if checkpoint.step is None else checkpoint.step
    numbers = {**({} if checkpoint.loss is None else {"loss": checkpoint.loss}), **checkpoint.metrics}
    there = client.get_run(run_id).data.params
    params = {_name(key): str(value) for key, value in flatten(told.get("config", {})).items()}
    tags = {_ID: checkpoint.id, _VERSION: checkpoint.name}
    client.log_batch(
        run_id,
        metrics=[Metric(_name(key), value, time, step) for key, value in numbers.items()],
        params=[Param(key, value) for key, value in params.items() if key not in there],
        tags=[RunTag(key, value) for key, value in tags.items()],
    )


def _log_version(client: MlflowClient, run_id: str, checkpoint: Checkpoint) -> ModelVersion:
    """A version of the registered model, made unless it is there, with its aliases."""
    name = checkpoint.model
    try:
        client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        client.create_registered_model(name)
    found = [
        version
        for version in client.search_model_versions(f"name = '{name}'")
        if version.tags.get(_ID) == checkpoint.id
    ]
    if not found:
        tags = {_ID: checkpoint.id, _VERSION: checkpoint.name}
        if checkpoint.lineage:
            tags["torch-registry.lineage"] = json.dumps(facts(checkpoint)["lineage"])
        found = [client.create_model_version(name, source=address(checkpoint), run_id=run_id, tags=tags)]
    for alias in checkpoint.aliases:
        client.set_registered_model_alias(name, alias.replace(".", "_"), found[0].version)
    return client.get_model_version(name, found[0].version)


def _chosen(client: MlflowClient, run: Run, artifact: str | None) -> tuple[str, str]:
    """The name and the address of what a run has logged."""
    run_id = run.info.run_id
    found = {
        item.path: f"{run.info.artifact_uri}/{item.path}"
        for item in client.list_artifacts(run_id)
        if item.is_dir or format_of(posixpath.basename(item.path))
    }
    for output in run.outputs.model_outputs if run.outputs else ():
        logged = client.get_logged_model(output.model_id)
        found[logged.name] = logged.artifact_location
    if artifact is not None:
        return artifact, found.get(artifact, f"{run.info.artifact_uri}/{artifact}")
    if not found:
        raise Invalid(f"the run {quoted(run_id)} has logged no model and no checkpoint file")
    if len(found) > 1:
        listed = ", ".join(quoted(name) for name in list(found)[:5])
        raise Invalid(f"the run {quoted(run_id)} has logged {listed}", "name one of them with artifact=")
    return next(iter(found.items()))


def _name(text: str) -> str:
    """A name as MLflow takes it: letters, digits, and a few marks, and no path with odd parts.

    >>> _name("mAP@0.5"), _name("val/loss"), _name("../x")
    ('mAP_0.5', 'val/loss', '.._x')
    """
    name = re.sub(r"[^\w\-.: /]", "_", text)
    is_odd = posixpath.normpath(name) != name or name.startswith(("/", "..")) or name == "."
    return name.replace("/", "_") if is_odd else name
