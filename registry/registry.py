"""The registry: one method for each thing that a user can ask; it calls the part that does it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from registry.catalog import naming
from registry.catalog.listings import Models, Versions, select_versions
from registry.catalog.resolving import direction_of, no_such_metric, resolve
from registry.catalog.versions import Version, best_version, list_models, list_names
from registry.home import Home
from registry.log.forking import no_fork
from registry.log.reference import check_name
from registry.progress import Progress, silent
from registry.store.errors import Conflict, Invalid, NotFound
from registry.store.text import printable, texts

if TYPE_CHECKING:
    from argparse import Namespace

    from torch import nn

    from registry.cache.artifacts import Artifacts
    from registry.catalog.attached import Attached
    from registry.catalog.catalog import Catalog
    from registry.catalog.runs import Runs
    from registry.checkpoints.checkpoint import Checkpoint
    from registry.checkpoints.files import File
    from registry.configs.config import Config
    from registry.log.metrics import Monitor
    from registry.runs.run import Run
    from registry.store.saving import Encoded
    from registry.store.store import Written
    from registry.transfer.plan import TransferPlan
    from registry.transfer.report import DiffReport
    from registry.transfer.sources import Source
    from registry.upkeep.compaction import Compacted, CompactionProgress
    from registry.upkeep.copying import Copied
    from registry.upkeep.garbage import Collected
    from registry.upkeep.outbox import Outbox
    from registry.upkeep.rebuilding import Rebuilt
    from registry.upkeep.repairing import Repaired
    from registry.upkeep.status import Status
    from registry.upkeep.verification import Verification


class Registry(Home):
    """A registry in a folder, with everything that can be asked of it.

    The class is long because each thing that can be asked is a method, whose docstring an editor shows to the user.

    Args:
        root: the folder; `REGISTRY_ROOT` or `./.registry` unless given.
        create: make a new registry if the folder does not hold one.

    Raises:
        NotFound: if there is no registry and `create` is false.
        Unsupported: if a newer version of this package made it.
    """

    @property
    def artifacts(self) -> Artifacts:
        """The results of cached functions."""
        # Lazy: start-up.
        from registry.cache.artifacts import Artifacts

        return Artifacts(self)

    def cached(self, function: Callable[..., Any] | None = None, **options: Any) -> Any:
        """Keep a function's results in this registry, as a decorator or in a call.

            registry.cached(key=["size"])(function)

        See `registry.cache.decorator.cached`.
        """
        # Lazy: loads torch.
        from registry.cache.decorator import cached

        return cached(function, **options, registry=self)

    @property
    def runs(self) -> Runs:
        """The training sessions that the registry knows."""
        # Lazy: start-up.
        from registry.catalog.runs import Runs

        return Runs(self.catalog, self.root)

    @property
    def outbox(self) -> Outbox:
        """What was saved while a shared registry could not be reached; see `registry.upkeep.outbox`."""
        # Lazy: start-up.
        from registry.upkeep.outbox import Outbox

        return Outbox(self)

    def run(
        self,
        model: str,
        *,
        config: Config | Mapping[str, Any] | Namespace | None = None,
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
        together: bool = True,
    ) -> Run:
        """A training session, for use in a `with` statement. Processes that train together all call this.

            with registry.run("lenet5", config=config, monitor="accuracy") as run:
                run.save(model=model, optimizer=optimizer, epoch=1, metrics={"accuracy": 0.97})

        Args:
            model: the model that gets new versions.
            config: the hyperparameters; every checkpoint records them as plain values, paths, dtypes and enums too.
            name: what to call the run below the model; `run-1`, `run-2` and so on unless given.
            dataset: digest of the data.
            builder: name under which the network is registered, if its class does not tell.
            resume: the checkpoint that training goes on from.
            plan: the transfer that gave the network its parameters.
            monitor: a metric, or `loss`; the alias `best` follows the version that has its best value.
            mode: `min` or `max`: which value is the best. By default the metric's name decides, such as `max` for an
                accuracy.
            keep_last, keep_best: keep this many of the run's newest versions, and of its best ones. Others are
                removed, but never one with an alias, a tag or a descendant. Without either, all stay.
            keep_optimizer: keep this many of the newest versions whole; older ones are thinned, see `thin`.
            compact: once the run has finished, store the model's older versions as differences; see `compact`.
            timeout: seconds that processes which train together wait for one another.
            together: False for a run of this process alone, as where a framework saves in its first process only.

        Raises:
            Invalid: if a name or a rule is malformed, or the metric's name does not tell which value is better.
            Conflict: if the model has a run of this name.
            NotFound: if there is no checkpoint to resume.
        """
        # Lazy: loads torch.
        from registry.runs.run import Run

        # Lazy: start-up.
        from registry.upkeep.retention import Retention

        return Run(
            self,
            model,
            retention=Retention.of(
                monitor=monitor,
                mode=mode,
                keep_last=keep_last,
                keep_best=keep_best,
                keep_optimizer=keep_optimizer,
            ),
            config=config,
            name=name,
            dataset=dataset,
            builder=builder,
            resumed=self[resume] if isinstance(resume, str) else resume,
            plan=plan,
            compact=compact,
            timeout=timeout,
            together=together,
        )

    def build(self, reference: str, *, component: str = "model") -> nn.Module:
        """The network of a checkpoint, with its parameters and buffers, in evaluation mode.

        Its builder must be registered (see `registry.register_model`). See `registry.checkpoints.building.build`.
        """
        # Lazy: loads torch.
        from registry.checkpoints.building import build

        return build(self, reference, component=component)

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
        """Compare two models by name, shape, dtype and value; see `registry.transfer.diffing.diff`."""
        # Lazy: loads torch.
        from registry.transfer.diffing import diff

        return diff(a, b, registry=self, values=values, rename=rename, exclude=exclude, plan=plan)

    def from_pretrained(
        self, make: Any, source: Source, *, freeze: bool | str | Sequence[str] = False, **given: Any
    ) -> nn.Module:
        """A new network with whatever fits from a source; see `registry.transfer.planning.from_pretrained`."""
        # Lazy: loads torch.
        from registry.transfer.planning import from_pretrained

        return from_pretrained(self, make, source, freeze=freeze, **given)

    def save(
        self,
        model: str,
        components: Mapping[str, Any] | Encoded | Written,
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

        When this returns, the version survives a crash or a power cut. Tensors that are stored already are not written
        again.

        Args:
            model: name of the model family.
            components: state trees by name, such as `{"model": net.state_dict()}`, or what `store.encode` or
                `store.add` gave.
            epoch, step, loss, metrics: plain numbers; NaN is recorded and never counts as best.
            config, meta: the hyperparameters, and anything else; as plain values.
            lineage: edges to other checkpoints or files, each with `kind` and `parent`.
            source: where an imported checkpoint came from.
            run, parent: the training session that saves it, and the checkpoint that training went on from.
            provenance: how it was made, as plain values.
            dcp: how a flat state dict is laid out in the trees; see `registry.checkpoints.sharded_trees`.
            best_by: move the alias `best` to the version with the best value of this metric.
            progress: told the bytes done and the bytes in all.

        Raises:
            Invalid: if a name or a number has the wrong form.
            Unsupported: if a value cannot be stored, naming its path and type; nothing is written.
            StorageError: if the disk is full or refuses; no version is made.
        """
        # A child that is forked meanwhile would wait for the import without end.
        with no_fork():
            # Lazy: loads torch.
            from registry.checkpoints.saving import Facts, save

        about = Facts(
            epoch=epoch,
            step=step,
            loss=loss,
            metrics=metrics,
            config=config,
            meta=meta,
            lineage=lineage,
            source=source,
            run=run,
            parent=parent,
            provenance=provenance,
            dcp=dcp,
        )
        return save(self, model, components, about=about, best_by=best_by, progress=progress)

    def __getitem__(self, reference: str) -> Checkpoint:
        """The checkpoint that a reference names: `lenet5`, `lenet5:v3`, `lenet5@best`, or an id prefix.

        Raises:
            Invalid: if the text is no reference.
            NotFound: if nothing has that name; suggests the nearest.
            Conflict: if an id prefix is ambiguous.
        """
        # Lazy: start-up.
        from registry.checkpoints.checkpoint import Checkpoint

        return Checkpoint.named(self, reference)

    def __contains__(self, reference: object) -> bool:
        """Whether a text names a checkpoint."""
        try:
            return isinstance(reference, str) and bool(self.resolve(reference))
        except (Invalid, NotFound, Conflict):
            return False

    def __iter__(self) -> Iterator[str]:
        """The names of the models."""
        return iter(self.names())

    def __len__(self) -> int:
        """How many models there are."""
        return len(self.names())

    def __bool__(self) -> bool:
        """True, also for a registry without a model."""
        return True

    def __repr__(self) -> str:
        place = getattr(self, "place", "")
        try:
            # Lazy: start-up.
            from registry.upkeep.overview import nearby, summary

            place = nearby(place)
            told = summary(self)
        # Who prints a registry that cannot be read is told why, as an error in its place would hide it.
        except Exception as error:
            told = f"cannot be read ({error or type(error).__name__})"
        return printable(f"<{type(self).__name__} {place}: {told}>")

    def _repr_mimebundle_(self, **_: object) -> dict[str, str]:
        # Lazy: start-up.
        from registry.reports.notebook import bundle
        from registry.upkeep.overview import overview

        return bundle(repr(self), overview(self))

    def models(self) -> Models:
        """Every model that has a version, by name: how many it has, the latest, the best, and the bytes of its own.

        registry.models().to_pandas()
        """
        return Models(list_models(self.catalog))

    def versions(
        self,
        model: str | None = None,
        *,
        by: str | None = None,
        smallest: bool | None = None,
        tag: str | None = None,
        before: int | None = None,
        where: str | None = None,
        limit: int | None = None,
    ) -> Versions:
        """The versions of a model, or of all: the newest first, or the best.

            registry.versions("lenet5", by="accuracy", limit=3)
            registry.versions("lenet5", where="accuracy > 0.95 and val/loss < 0.2", before=120).to_pandas()

        See `registry.catalog.listings.select_versions`. `where` joins comparisons by `and`; see
        `registry.catalog.conditions.parse_condition`.
        """
        if model is not None:
            model = self.resolve(model).model
        return select_versions(
            self.catalog,
            model,
            by=by,
            smallest=smallest,
            tag=tag,
            before=before,
            where=where,
            limit=limit,
        )

    def resolve(self, text: str) -> Version:
        """What the catalog has of the checkpoint that a reference names; raises as `__getitem__`."""
        return resolve(self.catalog, text) if self.remote is None else self[text].row

    def best(self, model: str, metric: str, *, smallest: bool | None = None) -> Checkpoint:
        """The version with the best value of a metric, or of `loss`. NaN never wins; of equal values the earlier does.

        Args:
            smallest: whether the smallest value is the best; without it the metric's name decides, as in `run`.

        Raises:
            Invalid: if the name does not tell which value is better.
            NotFound: if no version of the model has the metric.
        """
        # Lazy: start-up.
        from registry.checkpoints.checkpoint import Checkpoint

        check_name(model, "model")
        found = best_version(
            self.catalog, model, metric, smallest=direction_of(self.catalog, model, metric, smallest=smallest)
        )
        if found is None:
            self.resolve(model)
            raise no_such_metric(self.catalog, model, metric)
        return Checkpoint(self.store, found, self.catalog)

    def names(self, prefix: str = "") -> list[str]:
        """References that begin with a text, for completion."""
        return list_names(self.catalog, prefix)

    def _ipython_key_completions_(self) -> list[str]:
        """What a notebook completes between brackets."""
        return self.names()

    def set_alias(self, reference: str, alias: str) -> Checkpoint:
        """Point an alias of the checkpoint's model at the checkpoint; see `registry.catalog.naming.set_alias`."""
        self._check_numbered([reference])
        return self[naming.set_alias(self.catalog, reference, alias).name]

    def remove_alias(self, model: str, alias: str) -> None:
        """Take an alias away; the checkpoint stays."""
        naming.remove_alias(self.catalog, model, alias)

    def set_tag(self, reference: str, tag: str) -> Checkpoint:
        """Attach a tag to a checkpoint."""
        return self._described(reference, lambda catalog, name: naming.set_tag(catalog, name, tag))

    def remove_tag(self, reference: str, tag: str) -> Checkpoint:
        """Take a tag off a checkpoint."""
        return self._described(reference, lambda catalog, name: naming.remove_tag(catalog, name, tag))

    def add_note(self, reference: str, text: str) -> Checkpoint:
        """Attach a note, any text, to a checkpoint; see `registry.catalog.naming.add_note`."""
        return self._described(reference, lambda catalog, name: naming.add_note(catalog, name, text))

    def _described(self, reference: str, change: Callable[[Catalog, str], Version]) -> Checkpoint:
        """A checkpoint whose tags or notes were changed: in the outbox, where it waits to be shared."""
        pending = self.outbox.change(reference, change) if self.remote else None
        if pending is None:
            return self[change(self.catalog, reference).name]
        with contextlib.suppress(NotFound):
            return self[pending.name]
        # Another process has shared it meanwhile.
        return self[pending.id]

    def attach(self, reference: str, *paths: Path | str, force: bool = False) -> list[Attached]:
        """Attach files to a checkpoint, such as what was made from it; see `registry.checkpoints.files.attach`."""
        # Lazy: start-up.
        from registry.checkpoints.files import attach

        self._check_numbered([reference])
        return attach(self, reference, paths, force=force)

    def files(self, reference: str) -> list[File]:
        """The files that came with a checkpoint's folder, and those that are attached to it."""
        # Lazy: start-up.
        from registry.checkpoints.files import files_of

        return files_of(self, reference)

    def read_file(self, reference: str, name: str) -> bytes:
        """The bytes of a file of a checkpoint; see `registry.checkpoints.files.read_file`."""
        # Lazy: start-up.
        from registry.checkpoints.files import read_file

        return read_file(self, reference, name)

    def thin(self, reference: str) -> Checkpoint:
        """Drop what only further training of a version needs; its id changes. See `registry.upkeep.thinning.thin`."""
        # Lazy: start-up.
        from registry.upkeep.thinning import thin

        self._check_numbered([reference])
        return self[thin(self.catalog, self.store, reference)]

    def remove(
        self, references: str | Sequence[str], *, force: bool = False, dry_run: bool = False
    ) -> list[Version]:
        """Remove versions from the catalog, all or none; `collect_garbage` frees their space later.

        Where others need less than half of a pack that these needed, that is copied to a pack of its own. See
        `registry.catalog.naming.remove`.
        """
        # Lazy: start-up.
        from registry.upkeep.repacking import packs_of, tidy_behind

        self._check_numbered(texts(references))
        found = naming.remove(self.catalog, references, force=force, dry_run=True)
        if dry_run:
            return found
        packs = packs_of(self.catalog.query, [version.id for version in found])
        found = naming.remove(self.catalog, references, force=force)
        tidy_behind(self.catalog, self.store, packs)
        return found

    def _check_numbered(self, references: Iterable[str]) -> None:
        """Refuse pending versions; see `registry.upkeep.outbox.Outbox.check_numbered`."""
        if self.remote:
            self.outbox.check_numbered(references)

    def verify(self, references: str | Iterable[str] = (), *, progress: Progress = silent) -> Verification:
        """Compare every stored byte, or those that some checkpoints need, with its digest.

        Damaged packs are noted, so that the next save of their tensors writes them again.

        Returns:
            What was checked, and the problems found: damage is reported, not raised.
        """
        # Lazy: start-up.
        from registry.upkeep.verification import verify

        references = texts(references)
        self._check_numbered(references)
        return verify(self.catalog, self.store, references, progress=progress)

    def compact(
        self,
        models: str | Sequence[str] = (),
        *,
        similar: bool = False,
        alone: bool = False,
        dry_run: bool = False,
        progress: CompactionProgress = lambda done, total, saved: None,
    ) -> list[Compacted]:
        """Store older versions as differences from a neighbour; see `registry.upkeep.compaction.compact`."""
        # Lazy: start-up.
        from registry.upkeep.compaction import compact

        return compact(
            self.catalog,
            self.store,
            models,
            similar=similar,
            alone=alone,
            dry_run=dry_run,
            progress=progress,
        )

    def expand(
        self,
        models: str | Sequence[str] = (),
        *,
        dry_run: bool = False,
        progress: CompactionProgress = lambda done, total, saved: None,
    ) -> list[Compacted]:
        """Store versions as they are again, which undoes `compact`; see `registry.upkeep.compaction.expand`."""
        # Lazy: start-up.
        from registry.upkeep.compaction import expand

        return expand(self.catalog, self.store, models, dry_run=dry_run, progress=progress)

    def collect_garbage(
        self,
        *,
        grace: float = 3_600.0,
        dry_run: bool = False,
        tell: Callable[[Path, int], None] | None = None,
    ) -> Collected:
        """Free what no checkpoint, artifact or running save needs.

        Args:
            grace: seconds for which unneeded files are left alone.
            dry_run: report what would be removed, and remove nothing.
            tell: called with the path and the size in bytes of each file that is removed.
        """
        # Lazy: start-up.
        from registry.upkeep.garbage import collect_garbage

        return collect_garbage(self.catalog, self.store, grace=grace, dry_run=dry_run, tell=tell)

    def follow(
        self,
        reference: str,
        *,
        into: nn.Module | Mapping[str, Any] | None = None,
        component: str = "model",
        every: float = 5.0,
    ) -> Iterator[Checkpoint]:
        """Each version that a reference comes to name, put into a live network; see `registry.checkpoints.following.follow`.

        for checkpoint in registry.follow("net@production", into=model):
            print("serving", checkpoint.name)
        """
        # Lazy: start-up.
        from registry.checkpoints.following import follow

        return follow(self, reference, into=into, component=component, every=every)

    def copy_to(
        self, other: Path | str | Home, references: Sequence[str] = (), *, progress: Progress = silent
    ) -> list[Copied]:
        """Copy versions to another registry, such as a shared one; see `registry.upkeep.copying.copy_versions`.

        for copied in registry.copy_to("s3://models/team", ["lenet5@best"]):
            print(copied.source, "->", copied.target)

        Args:
            other: a folder, a URL, a name that `registry remote add` gave to one, or another registry.
        """
        # Lazy: start-up.
        from registry.remote.names import place_of
        from registry.upkeep.copying import copy_versions

        if not isinstance(other, Home):
            other = Home(place_of(other) if isinstance(other, str) else other, create=False)
        self._check_numbered(references)
        return copy_versions(self, other, references, progress=progress)

    def rebuild(self, *, adopt: bool = False, progress: Progress = silent) -> Rebuilt:
        """Make the catalog anew from the log, and take in what it has lost; see `registry.upkeep.rebuilding.rebuild`.

        Args:
            adopt: accept as lost what cannot be read, and take in checkpoints that the log does not know.
        """
        # Lazy: start-up.
        from registry.upkeep.rebuilding import rebuild

        return rebuild(self.catalog, self.store, adopt=adopt, progress=progress)

    def repair(
        self, other: Path | str | Home, *, dry_run: bool = False, progress: Progress = silent
    ) -> Repaired:
        """Put back what is damaged or missing from a second copy, by digest; see `registry.upkeep.repairing.repair`.

        Args:
            other: a folder, a URL, a name that `registry remote add` gave to one, or another registry.
            dry_run: only say what would be put back.

        Returns:
            What was put back, and the problems that are left.
        """
        # Lazy: start-up.
        from registry.upkeep.repairing import repair

        place = other.place if isinstance(other, Home) else other
        return repair(self, place, dry_run=dry_run, progress=progress)

    def status(self) -> Status:
        """What the registry holds, from the catalog alone."""
        # Lazy: start-up.
        from registry.upkeep.status import status

        return status(self.root, self.catalog)
