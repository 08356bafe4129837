"""The registry: saves, finds and keeps checkpoints in a folder."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import registry
from registry.catalog import Catalog
from registry.journal import now
from registry.progress import Progress, silent
from registry.reference import RESERVED_ALIASES, check_name, check_text
from registry.resolving import hint, resolve
from registry.store.errors import Conflict, Invalid, NotFound, StorageError, Unsupported
from registry.store.text import quoted
from registry.versions import Version, best_version, list_names

if TYPE_CHECKING:
    from torch import nn

    from registry.artifacts import Artifacts
    from registry.change import Change
    from registry.checkpoint import Checkpoint
    from registry.compacting import Compacted
    from registry.config import Config
    from registry.diffing import DiffReport
    from registry.garbage import Collected
    from registry.plans import TransferPlan
    from registry.rebuilding import Rebuilt
    from registry.retention import Monitor
    from registry.run import Run
    from registry.runs import Runs
    from registry.sides import Source
    from registry.status import Status
    from registry.store.saving import State
    from registry.store.store import Store, Written
    from registry.verification import Verification

Result = TypeVar("Result")

FORMAT = 1
SETTINGS = "registry.toml"
_ATTEMPTS = 6
_AS_WRITTEN = re.compile(r'format = (\d{1,9})\ncreated_by = "[^"\\]*"\n\Z')


def default_root() -> Path:
    """`REGISTRY_ROOT`, or `.registry` in the working directory."""
    return Path(os.environ.get("REGISTRY_ROOT") or ".registry")


class Registry:
    """A registry in a folder.

    Args:
        root: the folder; `REGISTRY_ROOT` or `./.registry` unless given.
        create: make a new registry if the folder does not hold one.

    Raises:
        NotFound: if there is none and `create` is false.
        Unsupported: if a newer version of this package made it.
    """

    def __init__(self, root: Path | str | None = None, *, create: bool = True) -> None:
        self.root = Path(root) if root is not None else default_root()
        self.catalog = Catalog(self.root, lambda: self.store)
        if not (self.root / SETTINGS).is_file():
            if not create:
                raise NotFound(f"there is no registry at {self.root}; make one with: registry init")
            self._create()
        self._check_format()

    @functools.cached_property
    def store(self) -> Store:
        """The store, which the catalog tells where tensors lie."""
        from registry.store.store import Store

        return Store(self.root, self.catalog)

    def __repr__(self) -> str:
        return f"Registry({str(self.root)!r})"

    def __reduce__(self) -> tuple[type[Registry], tuple[str]]:
        return Registry, (str(self.root.absolute()),)

    def _create(self) -> None:
        from registry.store import durable
        from registry.store.store import FOLDERS

        holds_something = any(any((self.root / name).glob("*")) for name in ("packs", "manifests"))
        if (
            holds_something and not (self.root / SETTINGS).is_file()
        ):  # which another process may just have made
            raise Conflict(
                f"{self.root} holds a registry without {SETTINGS}; if the file was lost, recreate it with one line: "
                f"format = {FORMAT}"
            )
        with durable.storage_errors(self.root):
            for folder in FOLDERS:
                durable.make_folder(self.root / folder)
            self.catalog.create()
            text = f'format = {FORMAT}\ncreated_by = "torch-registry {registry.__version__}"\n'
            durable.write_file(self.root / SETTINGS, text.encode(), folder=self.root / "tmp")

    def _check_format(self) -> None:
        path = self.root / SETTINGS
        try:
            text = path.read_text("utf-8", errors="replace")
        except OSError as error:
            raise StorageError(f"{path}: {error.strerror}; ask its owner for access") from error
        match = _AS_WRITTEN.match(text)
        found = int(match[1]) if match else _format_in(text, path)
        if not isinstance(found, int) or found < 1:
            raise Invalid(f"{path}: format is {quoted(str(found))}, expected the number {FORMAT}")
        if found > FORMAT:
            raise Unsupported(
                f"{self.root} has format {found}, torch-registry {registry.__version__} reads format {FORMAT}; "
                "upgrade with: pip install -U torch-registry"
            )

    # -- artifacts ---------------------------------------------------------------------------------------

    @property
    def artifacts(self) -> Artifacts:
        """The results of cached functions."""
        from registry.artifacts import Artifacts

        return Artifacts(self)

    def cached(self, function: Callable[..., Any] | None = None, **options: Any) -> Any:
        """Keep a function's results in this registry, as a decorator or without one; see `registry.caching.cached`.

        registry.cached(key=["size"])(function)
        """
        from registry.caching import cached

        return cached(function, **options, registry=self)

    # -- training ----------------------------------------------------------------------------------------

    @property
    def runs(self) -> Runs:
        """The training sessions that the registry knows."""
        from registry.runs import Runs

        return Runs(self.catalog, self.root)

    def run(
        self,
        model: str,
        *,
        config: Config | Mapping[str, Any] | None = None,
        name: str | None = None,
        dataset: str | None = None,
        builder: str | None = None,
        resume: str | Checkpoint | None = None,
        plan: TransferPlan | None = None,
        monitor: str | None = None,
        mode: str | None = None,
        keep_last: int | None = None,
        keep_best: int | None = None,
        keep_optimizer: int | None = None,
        compact: bool = False,
        timeout: float = 1_800.0,
    ) -> Run:
        """A training session, for use in a `with` statement. Processes that train together all call this.

            with registry.run("lenet5", config=config, monitor="accuracy") as run:
                run.save(model=model, optimizer=optimizer, epoch=1, metrics={"accuracy": 0.97})

        Args:
            model: the model that gets new versions.
            config: the hyperparameters, which every checkpoint records.
            name: what to call the run below the model; `run-1`, `run-2` and so on unless given.
            dataset: digest of the data.
            builder: name under which the network is registered, if it is not found by its class.
            resume: the checkpoint that training goes on from.
            plan: the transfer by which the network got its first weights; it is recorded.
            monitor: a metric, or `loss`; the alias `best` follows the version that has its best value.
            mode: `max` or `min`; by default `min` for `loss` and `max` for anything else.
            keep_last, keep_best: keep that many of the run's newest versions, and of its best ones; others are
                removed, but never one with an alias, a tag or a descendant. Without either all stay.
            keep_optimizer: older versions than that many keep their weights and lose everything else.
            compact: once the run has finished, store the model's older versions as differences; see `compact`.
            timeout: seconds that processes which train together wait for one another.

        Raises:
            Invalid: if a name or a rule is malformed.
            Conflict: if the model has a run of this name.
            NotFound: if there is no checkpoint to resume.
        """
        from registry.retention import Retention
        from registry.run import Run

        retention = Retention.of(monitor, mode, keep_last, keep_best, keep_optimizer)
        resumed = self[resume] if isinstance(resume, str) else resume
        return Run(
            *(self, model),
            config=config,
            name=name,
            dataset=dataset,
            builder=builder,
            resumed=resumed,
            plan=plan,
            retention=retention,
            compact=compact,
            timeout=timeout,
        )

    def build(self, reference: str, *, component: str = "model") -> nn.Module:
        """The network of a checkpoint, with its weights, in evaluation mode.

        Its builder must be registered (see `registry.register_model`); no code that a file names is run.

        Raises:
            NotFound: if there is no such checkpoint, or its builder is not registered.
            Incompatible: if the builder's network does not fit the weights.
        """
        from registry.builders import builder

        checkpoint = self[reference]
        about = checkpoint.provenance
        network = builder(about.get("builder", checkpoint.model)).build(about.get("network"))
        live: dict[str, Any] = {component: network}
        checkpoint.restore(rng=False, **live)
        return network.eval()

    # -- transfer ----------------------------------------------------------------------------------------

    def diff(
        self,
        a: Source,
        b: Source,
        *,
        values: bool = False,
        rename: Iterable[str] = (),
        exclude: Iterable[str] = (),
        plan: TransferPlan | None = None,
    ) -> DiffReport:
        """Compare two models by name, shape, dtype and value; see `registry.diffing.diff`."""
        from registry.diffing import diff

        return diff(a, b, registry=self, values=values, rename=rename, exclude=exclude, plan=plan)

    def from_pretrained(
        self, make: Any, source: Source, *, freeze: bool | str | Sequence[str] = False, **given: Any
    ) -> nn.Module:
        """A new network with whatever fits from a source; see `registry.transfer.from_pretrained`."""
        from registry.transfer import from_pretrained

        return from_pretrained(self, make, source, freeze=freeze, **given)

    # -- saving ------------------------------------------------------------------------------------------

    def save(
        self,
        model: str,
        components: Mapping[str, Any] | State | Written,
        *,
        epoch: int | None = None,
        step: int | None = None,
        loss: float | None = None,
        metrics: Mapping[str, float] | None = None,
        config: Mapping[str, Any] | None = None,
        meta: Mapping[str, Any] | None = None,
        lineage: Sequence[Mapping[str, str]] = (),
        source: Mapping[str, Any] | None = None,
        run: str | None = None,
        parent: str | None = None,
        provenance: Mapping[str, Any] | None = None,
        best_by: Monitor | None = None,
        dcp: Mapping[str, Any] | None = None,
        progress: Progress = silent,
    ) -> Checkpoint:
        """Save named state trees as the next version of a model.

        When this returns, the version survives a crash or a power cut. Equal tensors that the registry holds
        already are not written again.

        Args:
            model: name of the model family.
            components: state trees by component name, such as `{"model": net.state_dict()}`, or what
                `store.encode` or `store.add` made of them.
            loss, metrics: plain numbers; NaN is recorded and never counts as best.
            config: the hyperparameters, as plain values.
            meta: anything else, as plain values.
            lineage: edges to other checkpoints or files, each with `kind` and `parent`.
            source: where an imported checkpoint came from.
            run: the training session that saves it; see `run`.
            parent: name of the checkpoint that training went on from.
            provenance: how it was made, as plain values.
            dcp: how a flat state dict is laid out in the trees; see `registry.sharded`.
            best_by: move the alias `best` to the version with the best value of this metric.
            progress: told the bytes done and the bytes in all.

        Raises:
            Invalid: if a name or a number has the wrong form.
            Unsupported: if a value cannot be stored, naming its path and type; nothing is written.
            StorageError: if the disk is full or refuses; no version is made.
        """
        from registry.store.saving import State as Encoded
        from registry.store.store import Written

        check_name(model, "model")
        state = components if isinstance(components, Encoded | Written) else None
        for component in state.components if state else components:  # type: ignore[union-attr]
            check_name(component, "component")
        record: dict[str, Any] = {
            "kind": "checkpoint",
            "model": model,
            "created": now(),
            "epoch": _whole(epoch, "epoch"),
            "step": _whole(step, "step"),
            "loss": None if loss is None else _number(loss, "loss"),
            "metrics": {
                check_name(k, "metric"): _number(v, f"metric {k}") for k, v in (metrics or {}).items()
            },
            "config": config,
            "meta": dict(meta or {}),
            "lineage": [_edge(edge) for edge in lineage],
            "source": source,
            "run": run,
            "parent": parent,
            "provenance": provenance,
            "dcp": dcp,
        }
        record = {key: value for key, value in record.items() if value not in (None, {}, [])}
        record["torch-registry"] = registry.__version__
        if state is None:
            state = self.store.encode(components)  # type: ignore[arg-type]

        def publish(change: Change, id: str) -> int:
            version = change.publish(id, model)
            if best_by:
                change.point_to_best(model, best_by.metric, smallest=best_by.smallest)
            return version

        _, version = self.commit(state, record, publish, what=model, progress=progress)
        return self[f"{model}:v{version}"]

    def commit(
        self,
        state: State | Written,
        record: dict[str, Any],
        publish: Callable[[Change, str], Result],
        *,
        what: str,
        progress: Progress = silent,
    ) -> tuple[str, Result]:
        """Store trees and make them known in one transaction, again while other processes remove what they rely on.

        Args:
            publish: makes the manifest known in the transaction that it is given.
            what: what to call it in an error.

        Returns:
            The manifest's digest, and what `publish` returned.

        Raises:
            StorageError: if the disk is full or refuses; nothing is made known.
        """
        from registry.change import Stale, Taken
        from registry.store.store import Written

        again = not isinstance(state, Written)  # what other processes wrote cannot be written again here
        for attempt in range(_ATTEMPTS):
            alone = attempt == _ATTEMPTS - 1  # the last time nobody else may change anything meanwhile
            stored = None if alone else self.store.put(state, record, progress=progress)
            try:
                with self.catalog.change() as change:
                    stored = stored or self.store.put(state, record, progress=progress)
                    strict = again and attempt < _ATTEMPTS // 2
                    change.use(stored.digest, stored.manifest, stored.packs, strict=strict)
                    result = publish(change, stored.digest)
                return stored.digest, result
            except Stale as error:
                stays = isinstance(error, Taken) and not again
                for pack in stored.packs if stored and not stays else ():
                    self.discard_pack(pack.digest)
                if not (again or stays):
                    break
                if "created" in record:
                    record["created"] = now()
        raise Conflict(f"{what}: other processes kept changing the registry during the save; repeat it")

    def discard_pack(self, digest: str) -> None:
        """Remove a pack file that no catalog row names."""
        from registry.store import durable

        with self.catalog.change() as change:
            if not change.connection.execute("SELECT 1 FROM packs WHERE digest = ?", (digest,)).fetchone():
                durable.unlink(self.store.pack_path(digest))

    # -- finding -----------------------------------------------------------------------------------------

    def __getitem__(self, reference: str) -> Checkpoint:
        """The checkpoint that a reference names: `lenet5`, `lenet5:v3`, `lenet5@best`, or an id prefix.

        Raises:
            Invalid: if the text is no reference.
            NotFound: if nothing has that name; suggests the nearest.
            Conflict: if an id prefix is ambiguous.
        """
        from registry.checkpoint import Checkpoint

        return Checkpoint(self.store, self.resolve(reference))

    def resolve(self, text: str) -> Version:
        """The catalog's row for a reference; raises as `__getitem__`."""
        return resolve(self.catalog, text)

    def best(self, model: str, metric: str, *, smallest: bool = False) -> Checkpoint:
        """The version with the best value of a metric; NaN never wins, the earlier of two equals does.

        Raises:
            NotFound: if no version of the model has the metric.
        """
        from registry.checkpoint import Checkpoint

        check_name(model, "model")
        check_name(metric, "metric")
        found = best_version(self.catalog, model, metric, smallest=smallest)
        if found is None:
            self.resolve(model)
            raise NotFound(f"no version of {model} has the metric {quoted(metric)}")
        return Checkpoint(self.store, found)

    def names(self, prefix: str = "") -> list[str]:
        """References that begin with a text, for completion."""
        return list_names(self.catalog, prefix)

    def _ipython_key_completions_(self) -> list[str]:
        return self.names()

    # -- naming ------------------------------------------------------------------------------------------

    def set_alias(self, reference: str, alias: str) -> Checkpoint:
        """Point an alias of the checkpoint's model at the checkpoint.

        Raises:
            Invalid: if the alias is malformed or kept by the registry (`latest`, `best`).
        """
        self._check_alias(alias)
        version = self.resolve(reference)
        record = {"op": "alias", "model": version.model, "alias": alias, "id": version.id}
        self._apply(record)
        return self[version.name]

    def remove_alias(self, model: str, alias: str) -> None:
        """Take an alias away; the checkpoint stays."""
        self._check_alias(alias)
        self.resolve(f"{model}@{alias}")
        self._apply({"op": "unalias", "model": model, "alias": alias})

    @staticmethod
    def _check_alias(alias: str) -> None:
        check_name(alias, "alias")
        if alias in RESERVED_ALIASES:
            raise Invalid(f"the alias {quoted(alias)} is kept by the registry; choose another name")

    def set_tag(self, reference: str, tag: str) -> Checkpoint:
        """Attach a tag to a checkpoint."""
        version = self.resolve(reference)
        self._apply({"op": "tag", "id": version.id, "tag": check_name(tag, "tag")})
        return self[version.name]

    def remove_tag(self, reference: str, tag: str) -> Checkpoint:
        """Take a tag off a checkpoint."""
        version = self.resolve(reference)
        if tag not in version.tags:
            raise NotFound(f"{version.name} has no tag {quoted(tag)}{hint(tag, version.tags)}")
        self._apply({"op": "untag", "id": version.id, "tag": tag})
        return self[version.name]

    def add_note(self, reference: str, text: str) -> Checkpoint:
        """Attach a note, any text, to a checkpoint."""
        check_text(text, "note")
        version = self.resolve(reference)
        self._apply({"op": "note", "id": version.id, "at": now(), "text": text})
        return self[version.name]

    def with_descendants(self, ids: Sequence[str]) -> set[str]:
        """Those of the ids that other checkpoints were resumed or transferred from."""
        marks = ",".join("?" * len(ids))
        return {
            row[0] for row in self.catalog.query(f"SELECT parent FROM lineage WHERE parent IN ({marks})", ids)
        }

    def thin(self, reference: str) -> Checkpoint:
        """Keep only the weights of a version: its other components are dropped, and its id changes.

        A version that others descend from, or that has no network under the name `model`, stays as it is.
        `collect_garbage` frees the space.
        """
        from registry.thinning import thin

        return thin(self, reference)

    def remove(
        self, references: Sequence[str], *, force: bool = False, dry_run: bool = False
    ) -> list[Version]:
        """Remove versions from the catalog, all or none; `collect_garbage` frees their space later.

        Args:
            force: also versions that have an alias or a tag.
            dry_run: only say which versions it would be.

        Raises:
            Conflict: if an alias or a tag holds one of them.
        """
        versions = [self.resolve(reference) for reference in references]
        versions = list({version.id: version for version in versions}.values())
        for version in versions:
            held = [f"alias {name}" for name in version.aliases] + [f"tag {name}" for name in version.tags]
            if held and not force:
                raise Conflict(
                    f"{version.name} is held by {', '.join(held)}; take that off first, or use --force"
                )
        if not dry_run:
            self._apply(*({"op": "remove", "id": version.id} for version in versions))
        return versions

    # -- keeping house -----------------------------------------------------------------------------------

    def verify(self, references: Iterable[str] = (), *, progress: Progress = silent) -> Verification:
        """Compare every stored byte, or those that some checkpoints need, with its digest.

        Returns:
            What was checked, and the problems found: damage is reported, not raised.
        """
        from registry.verification import verify

        return verify(self, references, progress)

    def compact(
        self,
        models: Sequence[str] = (),
        *,
        dry_run: bool = False,
        progress: Callable[[int, int, int], None] = lambda done, total, saved: None,
    ) -> list[Compacted]:
        """Store older versions as differences from a neighbour, bit for bit; `collect_garbage` frees the space.

        The newest version of each model, those with an alias, and one in some forty stay as they are.

        Args:
            models: all of them unless given.
            dry_run: only say which packs would be rewritten.
            progress: told the bytes done, the bytes in all, and the bytes saved so far.

        Raises:
            Corrupt: if a byte is not what was saved; nothing is lost.
        """
        from registry.compacting import compact

        return compact(self, models, dry_run=dry_run, progress=progress)

    def collect_garbage(
        self,
        *,
        grace: float = 3_600.0,
        dry_run: bool = False,
        tell: Callable[[Path, int], None] | None = None,
    ) -> Collected:
        """Free what no checkpoint, artifact or running save needs.

        Args:
            grace: seconds that something unneeded is left alone first.
            dry_run: report what would be removed, and remove nothing.
            tell: called with the path and the bytes of each file that goes.
        """
        from registry.garbage import collect_garbage

        return collect_garbage(self, grace=grace, dry_run=dry_run, tell=tell)

    def rebuild(self, *, adopt: bool = False, progress: Progress = silent) -> Rebuilt:
        """Recreate the catalog from packs, manifests and the journal.

        Args:
            adopt: take in checkpoints that the journal does not know, as after an older one was restored.
        """
        from registry.rebuilding import rebuild

        return rebuild(self, adopt=adopt, progress=progress)

    def status(self) -> Status:
        """What the registry holds, from the catalog alone."""
        from registry.status import status

        return status(self)

    def _apply(self, *records: Mapping[str, Any]) -> None:
        with self.catalog.change() as change:
            for record in records:
                change.apply(record)


def _format_in(text: str, path: Path) -> Any:
    """The format in settings that somebody has edited."""
    import tomllib

    try:
        return tomllib.loads(text).get("format")
    except tomllib.TOMLDecodeError as error:
        raise Invalid(f"{path}: {error}") from None


def _edge(edge: Mapping[str, str]) -> dict[str, str]:
    if set(edge) != {"kind", "parent"}:
        raise Invalid("lineage: an edge has the keys kind and parent")
    return {key: check_text(edge[key], f"lineage {key}") for key in ("kind", "parent")}


def _whole(value: Any, what: str) -> int | None:
    if value is None or (type(value) is int and 0 <= value < 1 << 63):
        return value
    raise Invalid(f"{what} is {quoted(str(value))}, expected a whole number of 0 or more")


def _number(value: Any, what: str) -> float:
    try:
        if isinstance(value, str | bool):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        shown = quoted(str(value))
        raise Invalid(f"{what} is {shown}, expected a number") from None
