"""Plans: which tensors of a source go where in a network, as data that can be read, edited and replayed."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError
from torch import nn

from registry.live import freezing
from registry.patterns import escaped
from registry.reports import notebook
from registry.reports.blocks import Block, Column, Lines, Table, Title
from registry.reports.text import render
from registry.reports.words import counted
from registry.store.durable import write_file
from registry.store.errors import Conflict, Incompatible, Invalid, NotFound, Unsupported, fix
from registry.store.filling import copy_all
from registry.store.text import printable, quoted
from registry.store.tree import unfillable
from registry.store.usual import CLASSES
from registry.transfer.adapters import ADAPTERS, adapt, needs_source
from registry.transfer.finite import first_not_finite
from registry.transfer.rows import Rows
from registry.transfer.sides import Side
from registry.transfer.sources import STATE_DICT, Source, side_of

if TYPE_CHECKING:
    from registry.home import Home

SCHEMA = 1
Action = Literal["copy", "make", "keep", "unused"]


class Step(BaseModel):
    """What happens to one name.

    Attributes:
        action: `copy` from the source, `make` by an adapter that needs no source, `keep` the target's own value, or
            leave a name of the source `unused`.
        target, source: the name in each; None where it has none.
        why: the category of the diff, or the expectation that covers it.
        adapter: the name of the adapter that makes the tensor, if there is one.
        rows: for the adapter `class-rows`.
        cast: whether the dtype may change.
        elements: of the target's tensor; of the source's for what is unused.
        buffer: whether the target's name is a buffer.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    action: Action
    target: str | None = None
    source: str | None = None
    why: str = ""
    adapter: str | None = None
    rows: Rows | None = None
    cast: bool = False
    elements: int = 0
    buffer: bool = False

    @property
    def loaded(self) -> int:
        """Elements of the target that come from the source."""
        if self.action != "copy":
            return 0
        return self.elements * len(self.rows.pairs) // self.rows.of if self.rows else self.elements

    @property
    def fate(self) -> str:
        """What becomes of the name: `loaded`, `kept`, `new` (in the network alone, or made), or `unused`."""
        if self.action in ("copy", "unused"):
            return "loaded" if self.action == "copy" else "unused"
        return "new" if self.action == "make" or self.source is None else "kept"

    @property
    def cells(self) -> tuple[str, str, str, str]:
        """What happens, the name, where it comes from if that has another name, and why."""
        other = "" if self.target == self.source else self.source or ""
        why = self.why + (f" ({self.adapter})" if self.adapter else "")
        return self.action, self.target or "-", other, why


_COLUMNS = (Column(""), Column("target", is_code=True), Column("source", is_code=True), Column("why"))


_TONES = {"loaded": "ok", "kept": "dim", "new": "", "unused": "warn"}
"""What becomes of names, each with the colour of its bar."""

_FATES = (
    Column("Tensor", is_code=True),
    Column("Source", is_code=True),
    Column("Why"),
    Column("Elements", is_number=True),
)


class FrozenPart(BaseModel):
    """What is frozen somewhere: names of parameters, their elements, and the elements of the others."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    where: str
    names: tuple[str, ...]
    elements: int
    trainable: int

    @classmethod
    def of(cls, where: str, sizes: Mapping[str, int], frozen: Container[str]) -> FrozenPart:
        """What is frozen, counted.

        Args:
            sizes: elements of each parameter by name.
            frozen: names that are frozen; names that are not in `sizes` are ignored.
        """
        names = tuple(name for name in sizes if name in frozen)
        elements = sum(sizes[name] for name in names)
        return cls(where=where, names=names, elements=elements, trainable=sum(sizes.values()) - elements)


class _Origin:
    """What a plan was made from. It does not belong to the plan's data: it is not compared, copied or pickled."""

    source: Source | None = None
    registry: Home | None = None

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[type[_Origin], tuple[()]]:
        return _Origin, ()


class TransferPlan(BaseModel):
    """Which tensors of a source go where in a target: made, printed, edited, saved and replayed.

    Attributes:
        source, target: labels for people.
        source_id: the id of the source, if it is a checkpoint.
        source_digest: digest of the names and the contents of the source's tensors, unless it is a live network; checked when the plan is
            applied.
        target_digest: digest of the target's names, dtypes and shapes; likewise.
        freeze: patterns of names to freeze after the copy.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = Field(default=SCHEMA, alias="schema")
    source: str
    source_id: str | None = None
    source_digest: str | None
    target: str
    target_digest: str
    steps: tuple[Step, ...]
    freeze: tuple[str, ...] = ()
    bn: Literal["freeze", "update"] = "freeze"
    min_coverage: float = Field(default=0.0, ge=0, le=1)
    allow_nan: bool = False
    notes: tuple[str, ...] = ()
    _origin: _Origin = PrivateAttr(default_factory=lambda: _Origin())

    def remember(self, source: Source, registry: Home | None) -> None:
        """Note what the plan was made from, for `apply`; a plan that is read from a file does not have it."""
        self._origin.source, self._origin.registry = source, registry

    @property
    def is_of_live_tensors(self) -> bool:
        """Whether the source was a live network or a state dict, which a file of the plan does not hold."""
        return self.source_digest is None or self.source == STATE_DICT

    @property
    def loaded(self) -> tuple[Step, ...]:
        """The steps that copy."""
        return tuple(step for step in self.steps if step.action == "copy")

    @property
    def parameters(self) -> tuple[int, int]:
        """Elements of the target's parameters that are loaded, and all of them."""
        own = [step for step in self.steps if step.target and not step.buffer]
        return sum(step.loaded for step in own), sum(step.elements for step in own)

    @property
    def coverage(self) -> float:
        """Share of the elements of the target's parameters that are loaded."""
        loaded, all_of_them = self.parameters
        return loaded / all_of_them if all_of_them else 0.0

    @property
    def frozen_part(self) -> FrozenPart | None:
        """What is frozen after the copy."""
        if not self.freeze:
            return None
        sizes = {step.target: step.elements for step in self.steps if step.target and not step.buffer}
        covers = freezing.Freeze(self.freeze).covers
        return FrozenPart.of("the plan", sizes, {name for name in sizes if covers(name)})

    @property
    def summary(self) -> str:
        """What is loaded, in one line."""
        targets = sum(step.target is not None for step in self.steps)
        return f"loaded {len(self.loaded)} of {targets} tensors, {percent(self.coverage)} of parameters"

    @property
    def headline(self) -> str:
        """What would be loaded, in one line."""
        return self.summary.replace("loaded", "loads", 1)

    def blocks(self, *, level: Literal[1, 2] = 1) -> list[Block]:
        """The plan for a renderer: what is loaded, what is not and why, what is frozen.

        Args:
            level: 2 within a report.
        """
        blocks: list[Block] = [
            Title(
                "plan", between=(self.source, self.target), lines=(self.headline, *self.notes), level=level
            ),
            Table("", _COLUMNS, [step.cells for step in self.steps]),
        ]
        if part := self.frozen_part:
            names = f"{len(part.names)} parameter{'s' if len(part.names) != 1 else ''}"
            blocks.append(Lines("", [f"freezes {names}; {part.trainable:,} elements stay trainable"]))
        return blocks

    def __str__(self) -> str:
        return render(self.blocks())

    def __repr__(self) -> str:
        targets = sum(step.target is not None for step in self.steps)
        told = f"{len(self.loaded)} of {targets} tensors, {percent(self.coverage)}"
        return printable(f"<TransferPlan {self.source} → {self.target}: {told}>")

    def _repr_mimebundle_(self, **_: object) -> dict[str, str]:
        return notebook.bundle(repr(self), self.parts())

    def parts(self) -> Iterator[notebook.Part]:
        """What a notebook shows of it: a bar of what becomes of all elements, and the names one by one, folded."""
        yield notebook.heading(f"Plan {self.source} → {self.target}", self.headline)
        groups: dict[str, list[Step]] = {name: [] for name in _TONES}
        for step in self.steps:
            groups[step.fate].append(step)
        yield notebook.pieces(
            [
                notebook.Piece(
                    name,
                    elements := sum(step.elements for step in steps),
                    f"{counted(len(steps), 'tensor')}, {elements:,} elements",
                    _TONES[name],
                )
                for name, steps in groups.items()
            ]
        )
        for note in self.notes:
            yield notebook.sentence(note)
        if part := self.frozen_part:
            frozen = counted(len(part.names), "parameter")
            yield notebook.sentence(f"freezes {frozen}; {part.trainable:,} elements stay trainable")
        for name, steps in groups.items():
            rows = [(step.target or step.source, *step.cells[2:], f"{step.elements:,}") for step in steps]
            yield notebook.folded(f"{name}: {counted(len(steps), 'tensor')}", notebook.table(_FATES, rows))

    def to_json(self) -> str:
        """The plan as JSON, which `from_json` reads."""
        return self.model_dump_json(by_alias=True, indent=2, exclude_defaults=False) + "\n"

    def save(self, path: Path | str) -> None:
        """Write the plan as JSON, whole or not at all.

        Raises:
            StorageError: if the system refuses.
        """
        write_file(Path(path), self.to_json().encode())

    @classmethod
    def load(cls, path: Path | str) -> TransferPlan:
        """Read a plan that was saved, and perhaps edited.

        Raises:
            NotFound: if there is no such file.
            Invalid: naming what is wrong with it.
        """
        path = Path(path)
        try:
            text = path.read_text("utf-8")
        except FileNotFoundError:
            raise NotFound(f"{path}: there is no such file") from None
        except (OSError, UnicodeDecodeError) as error:
            raise Invalid(f"{path}: cannot be read ({printable(str(error))})") from None
        return cls.from_json(text, source=printable(str(path)))

    @classmethod
    def from_json(cls, text: str, *, source: str = "the plan") -> TransferPlan:
        """Read and check a plan that is written as JSON.

        Args:
            source: what to call it in an error.

        Raises:
            Invalid: naming what is wrong with it.
            Conflict: if two steps go to one name.
        """
        try:
            plan = cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise Invalid(f"{source}: {quoted(where)}: {printable(first['msg'])}") from None
        if plan.schema_version != SCHEMA:
            raise Invalid(f"{source}: has schema {plan.schema_version}, this version knows {SCHEMA}")
        seen: dict[str, str | None] = {}
        for step in plan.steps:
            if step.action == "copy" and (step.target is None or step.source is None):
                raise Invalid(f"{source}: a step that copies needs a source and a target")
            if step.action == "make" and (
                step.target is None or not step.adapter or needs_source(step.adapter)
            ):
                makers = " or ".join(name for name, adapter in ADAPTERS.items() if not adapter.needs_source)
                raise Invalid(f"{source}: a step that makes needs a target and the adapter {makers}")
            if step.target is not None:
                if step.target in seen:
                    raise Conflict(
                        f"{source}: {seen[step.target]} and {step.source} both go to {step.target}",
                        "keep one",
                    )
                seen[step.target] = step.source
        return plan

    def apply(
        self, model: nn.Module, source: Source | None = None, *, registry: Home | None = None
    ) -> nn.Module:
        """Copy what the plan says into a live network and freeze what it says: all of it, or nothing.

        Args:
            source: where the tensors come from; by default what the plan was made from. A plan that was read from a file
                knows a reference, a file or a name, and not a live network or a state dict.
            registry: where references are looked up; by default as when the plan was made.

        Returns:
            The network.

        Raises:
            Incompatible: if the source or the network is another than the plan was made for, or a step does not fit.
            Invalid: if a tensor holds NaN or infinity and the plan does not allow it.
            Corrupt: if a stored byte is not what was saved.
        """
        left, right = self._side_of(source, registry), side_of(model)
        if not right.has_values:
            raise Invalid(f"{right.label} is on the meta device", "give it memory and values first")
        self.check(left, right)
        _check_memory(self.steps, right)
        copies = list(self._values(left, right))
        _check_casts(copies, left, right)
        _check_finite(copies, left, right, self.allow_nan)
        _check_kept(self.steps, right)
        if self.freeze:
            freezing.rule_for(model, self.freeze)
        copy_all([right.tensor(step.target) for step, _ in copies], [value for _, value in copies])  # type: ignore[arg-type]
        if self.freeze:
            freezing.freeze(model, self.freeze, bn=self.bn)
        return model

    def state_dict(
        self, model: nn.Module, source: Source | None = None, *, registry: Home | None = None
    ) -> OrderedDict[str, torch.Tensor]:
        """What the plan loads, as a state dict under the network's names; the network is not changed.

        Load it with `load_state_dict(..., strict=False)`, such as before a network is sharded. The versions of layers
        (`_metadata`), by which torch's own layers read old state dicts, follow their names.

        Args:
            model: the network that the plan was made for; its tensors fill what an adapter leaves.
            source, registry: as for `apply`.

        Raises:
            Incompatible, Invalid, Corrupt: as for `apply`.
        """
        left, right = self._side_of(source, registry), side_of(model)
        self.check(left, right)
        found: OrderedDict[str, torch.Tensor] = OrderedDict()
        metadata: OrderedDict[str, Any] = OrderedDict()
        for step, value in self._values(left, right):
            assert step.target is not None
            found[step.target] = value
            old, new = ((name or "").rpartition(".")[0] for name in (step.source, step.target))
            if left.metadata and old in left.metadata:
                metadata[new] = left.metadata[old]
        found._metadata = metadata  # type: ignore[attr-defined]
        return found

    def check(self, left: Side, right: Side) -> None:
        """See that the plan fits its two sides as they are now.

        Raises:
            Incompatible, Unsupported: saying what does not fit.
        """
        if right.structure != self.target_digest:
            raise Incompatible(
                f"the plan was made for another {self.target}: names, shapes or dtypes of this network differ",
                "make a new plan",
            )
        if self.source_digest is not None and left.content != self.source_digest:
            raise Incompatible(f"the plan was made from {self.source} with other tensors", "make a new plan")
        if self.coverage < self.min_coverage:
            raise Incompatible(
                f"{self.summary}, less than the {percent(self.min_coverage)} that the plan asks for"
            )
        named = {step.target for step in self.steps if step.target}
        for name in right.entries:
            if name not in named:
                raise Incompatible(f"the plan has no step for {name}", "add one that copies or keeps it")
        for step in self.steps:
            if step.target is not None and step.target not in right.entries:
                raise Incompatible(f"the network has no {step.target}, which the plan names")
            if step.source is not None and step.source not in left.entries:
                raise Incompatible(f"{left.label} has no {step.source}, which the plan names")
            if step.action in ("copy", "make") and step.target in right.derived:
                raise Unsupported(
                    f"{step.target} is made by the network's own state_dict()",
                    fix("leave it out", expect={escaped(step.target): "skip"}),
                )
            if step.action == "copy":
                _check_copy(step, left, right)

    def _side_of(self, source: Source | None, registry: Home | None) -> Side:
        """The side of a source; without one, of what the plan was made from."""
        if source is None and self._origin.source is None:
            if self.is_of_live_tensors:
                what = STATE_DICT if self.source == STATE_DICT else f"a live network, {quoted(self.source)}"
                raise Invalid(f"the plan was made from {what}, which its file does not hold: pass source=")
            source = self.source
        elif source is None:
            source, registry = self._origin.source, registry or self._origin.registry
        return side_of(source, registry)

    def _values(self, left: Side, right: Side) -> Iterator[tuple[Step, torch.Tensor]]:
        """The steps that give the target a tensor, each with the tensor."""
        for step in self.steps:
            if step.action not in ("copy", "make"):
                continue
            assert step.target is not None
            value = left.tensor(step.source) if step.source else None
            if step.adapter:
                value = adapt(step.adapter, value, right.tensor(step.target), rows=step.rows)
            assert value is not None
            yield step, value.detach()


def percent(share: float) -> str:
    """A share in percent, rounded down, so that only the whole is 100%.

    >>> percent(0.99954), percent(1.0), percent(0.999999), percent(0.909), percent(0.0)
    ('99.95%', '100%', '99.99%', '90.9%', '0%')
    """
    return f"{math.floor(share * 10_000) / 100:g}%"


def plan_document(plan: TransferPlan) -> dict[str, Any]:
    """The plan as plain values, as it is recorded with the checkpoint that came of it."""
    return plan.model_dump(mode="json", by_alias=True)


def _check_copy(step: Step, left: Side, right: Side) -> None:
    assert step.target is not None
    assert step.source is not None
    a, b = left.entries[step.source], right.entries[step.target]
    if not step.adapter and a.shape != b.shape:
        raise Incompatible(f"{step.source} has shape {list(a.shape)}, {step.target} has {list(b.shape)}")
    if a.dtype != b.dtype and not step.cast:
        raise Incompatible(
            f"{step.source} is {a.dtype}, {step.target} is {b.dtype}, and the plan does not cast it"
        )


def _check_memory(steps: tuple[Step, ...], right: Side) -> None:
    """Refuse tensors of the network without the memory that they should have, and those that cannot be filled."""
    for step in steps:
        if not step.target:
            continue
        tensor = right.tensor(step.target)
        is_filled = step.action in ("copy", "make")
        # Other classes of tensors may have no memory at all.
        if is_filled and type(tensor) in CLASSES and (reason := unfillable(tensor)):
            raise Invalid(f"{step.target} of {right.label} is {reason}")


def _check_casts(copies: list[tuple[Step, torch.Tensor]], left: Side, right: Side) -> None:
    """Refuse casts that torch does not know, before anything changes. One element of each tensor is tried."""
    for step, value in copies:
        target = right.tensor(step.target)  # type: ignore[arg-type]
        if value.dtype == target.dtype:
            continue
        part = value[(slice(0, 1),) * value.dim()]
        try:
            torch.empty(part.shape, dtype=target.dtype, device=target.device).copy_(part)
        # NotImplementedError is one as well.
        except RuntimeError:
            raise Invalid(
                f"torch cannot cast {value.dtype} of {left.label} to {target.dtype} of {step.target}"
            ) from None


def _check_finite(copies: list[tuple[Step, torch.Tensor]], left: Side, right: Side, allowed: bool) -> None:
    if allowed:
        return
    # What an adapter makes of a stored tensor is another one.
    digests = [
        left.stored_digest(step.source) if step.source and not step.adapter else None for step, _ in copies
    ]
    place = first_not_finite([value for _, value in copies], digests)
    if place is not None:
        raise Invalid(
            f"{copies[place][0].source} of {left.label} holds NaN or infinity",
            fix("if it is to be loaded all the same", allow_nan=True),
        )
    for step, value in copies:
        dtype = right.tensor(step.target).dtype  # type: ignore[arg-type]
        if _is_narrower(dtype, value.dtype) and not _fits(value, dtype):
            raise Invalid(
                f"{step.source} of {left.label} holds numbers that are too large for {dtype} of {step.target}",
                fix("if it is to be loaded all the same", allow_nan=True),
            )


def _is_narrower(dtype: torch.dtype, other: torch.dtype) -> bool:
    """Whether finite numbers of another type may be too large for a type of floats."""
    dtype, other = dtype.to_real(), other.to_real()
    if not dtype.is_floating_point or dtype == other:
        return False
    if not other.is_floating_point:
        return True
    own, its = torch.finfo(dtype), torch.finfo(other)
    return own.max < its.max or own.min > its.min


def _fits(value: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether no number of a tensor of finite ones is too large for a type of floats."""
    if first_not_finite([value.to(dtype)], [None]) is not None:
        return False
    # Some types of 8 bits have no infinity, and what is too large becomes their largest number. One has no zero and no sign.
    if dtype.itemsize > 1 or not value.numel():
        return True
    smallest, largest = value.real.double().aminmax()
    return torch.finfo(dtype).min <= smallest.item() and largest.item() <= torch.finfo(dtype).max


def _check_kept(steps: tuple[Step, ...], right: Side) -> None:
    """Refuse NaN and infinity in the network's own tensors that are kept."""
    kept = [step.target for step in steps if step.action == "keep" and step.target]
    place = first_not_finite([right.tensor(name).detach() for name in kept], [None] * len(kept))
    if place is not None:
        raise Invalid(
            f"{kept[place]} is not loaded, and holds NaN or infinity in the network",
            "initialise it first",
        )
