"""From one network into another: plan, apply, transfer, advise."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from registry.catalog.documents import version_document
from registry.cli.options import NetworkType, ReferenceType, casts, command, pairs, registry_if_any, renames
from registry.cli.output import as_word, encodable, print_json, say
from registry.cli.suggestions import WrongUse
from registry.configs.documents import read_document
from registry.store.errors import Invalid, NotFound
from registry.store.text import quoted
from registry.transfer.adapters import ADAPTERS

if TYPE_CHECKING:
    from registry.registry import Registry
    from registry.transfer.plan import TransferPlan

_TAKE_ROWS = ", ".join(name for name, adapter in ADAPTERS.items() if adapter.takes_rows)
"""Names of the adapters that need the classes of both sides."""


@command(
    "plan",
    "registry plan lenet5@best lenet6 --everything --freeze loaded -o plan.json\n"
    "registry plan resnet.pth resnet18 --expect 'fc.*=skip' --freeze loaded\n"
    "registry plan resnet.pth resnet18 --adapt 'fc.*=class-rows' --classes c.json",
)
@click.argument("source", type=ReferenceType())
@click.argument("target", type=NetworkType())
@click.option(
    "--expect",
    multiple=True,
    callback=pairs,
    metavar="PATTERN=WHAT",
    help="A difference that you expect: skip, new or unused.",
)
@click.option("--everything", is_flag=True, help="Expect every difference, and load what fits.")
@renames
@click.option(
    "--adapt",
    multiple=True,
    callback=pairs,
    metavar="PATTERN=ADAPTER",
    help=f"Make tensors fit: 'conv1.*=channels-sum'. The adapters are {', '.join(ADAPTERS)}.",
)
@click.option(
    "--classes",
    type=click.Path(),
    metavar="FILE",
    help=f'For {_TAKE_ROWS}: {{"source": [...], "target": [...]}}.',
)
@click.option(
    "--freeze", metavar="loaded|PATTERN", help="Freeze loaded tensors, tensors that match, or first:N layers."
)
@click.option(
    "--min-coverage",
    type=click.FloatRange(0, 1),
    default=0.0,
    metavar="SHARE",
    help="The share of the parameters that must be loaded.",
)
@casts
@click.option(
    "--allow-positional",
    is_flag=True,
    help="Load tensors even if the numbers in their names may have shifted.",
)
@click.option("--allow-nan", is_flag=True, help="Load tensors that hold NaN or infinity.")
@click.option(
    "--output",
    "-o",
    type=click.Path(),
    metavar="FILE",
    help="Write the plan to a file, to edit and apply it.",
)
def plan(
    source: str,
    target: str,
    expect: dict[str, str],
    everything: bool,
    rules: tuple[str, ...],
    adapt: dict[str, str],
    classes: str | None,
    freeze: str | None,
    min_coverage: float,
    allow_cast: bool,
    allow_positional: bool,
    allow_nan: bool,
    output: str | None,
    root: str | None,
    as_json: bool,
) -> None:
    """Plan which tensors of SOURCE go where in TARGET.

    SOURCE and TARGET are each a reference, a file, torchvision:NAME, or the name of a network. A difference that you do
    not expect is an error.
    """
    # Lazy: loads torch.
    from registry.transfer.planning import plan_transfer

    made = plan_transfer(
        source,
        target,
        expect=expect,
        everything=everything,
        rename=rules,
        adapters=adapt,
        classes=_classes(classes),
        freeze=freeze,
        min_coverage=min_coverage,
        allow_cast=allow_cast,
        allow_positional=allow_positional,
        allow_nan=allow_nan,
        registry=registry_if_any(root),
    )
    if output:
        made.save(output)
    if as_json:
        click.echo(made.to_json(), nl=False)
    else:
        click.echo(encodable(str(made)))
        if output:
            say(f"wrote {output}")


def _classes(path: str | None) -> tuple[list[str], list[str]] | None:
    """Read the names of the classes on both sides from a JSON file."""
    if path is None:
        return None
    found = read_document(Path(path))
    sides = [found.get(key) for key in ("source", "target")]
    if not all(isinstance(side, list) and all(isinstance(name, str) for name in side) for side in sides):
        raise Invalid(f'{path}: expected {{"source": [names of classes], "target": [names of classes]}}')
    return sides[0], sides[1]  # type: ignore[return-value]


@command(
    "transfer",
    "registry transfer lenet5@best lenet6 --name lenet6\nregistry transfer lenet5@best lenet6 --plan plan.json --name lenet6",
)
@click.argument("source", type=ReferenceType())
@click.argument("target", type=NetworkType())
@click.option(
    "--plan",
    "file",
    type=click.Path(),
    metavar="FILE",
    help="The plan to apply. Without one, all that fits is loaded.",
)
@renames
@casts
@click.option(
    "--freeze", metavar="loaded|PATTERN", help="Freeze loaded tensors, tensors that match, or first:N layers."
)
@click.option("--name", required=True, metavar="MODEL", help="The model that gets a new version.")
def transfer(
    source: str,
    target: str,
    file: str | None,
    rules: tuple[str, ...],
    allow_cast: bool,
    freeze: str | None,
    name: str,
    registry: Registry,
    as_json: bool,
) -> None:
    """Make a new version with tensors of another, by a plan.

    TARGET is the name of a network or a version. A network is built anew. A version gives the tensors that SOURCE
    does not give.
    """
    # Lazy: loads torch.
    import torch

    # Lazy: loads torch.
    from registry.transfer.plan import TransferPlan
    from registry.transfer.planning import plan_transfer

    checkpoints = [_manifest_id(registry, text) for text in (source, target)]
    if checkpoints[0] and checkpoints[0] == checkpoints[1]:
        raise Invalid(f"source and target are the same version, {registry.resolve(source).name}")
    torch.manual_seed(0)
    network, builder = _network(registry, target)
    if file:
        if freeze or rules or allow_cast:
            raise WrongUse(
                "the plan says what is loaded and frozen", "leave --rename, --allow-cast and --freeze out"
            )
        made = TransferPlan.load(file)
    else:
        made = plan_transfer(
            source,
            network,
            everything=True,
            rename=rules,
            allow_cast=allow_cast,
            freeze=freeze,
            registry=registry,
        )
    _carry_out(registry, made, network, source, builder, name=name, as_json=as_json)


@command("apply", "registry apply plan.json --name lenet6-transferred")
@click.argument("file", type=click.Path(), metavar="FILE")
@click.option("--name", required=True, metavar="MODEL", help="The model that gets a new version.")
def apply(file: str, name: str, registry: Registry, as_json: bool) -> None:
    """Make a new version by a plan that was written to a file.

    The plan names its source and its target; registry transfer --plan takes others. A target that is a network is built
    anew. A target that is a version gives the tensors that the source does not give.
    """
    # Lazy: loads torch.
    import torch

    # Lazy: loads torch.
    from registry.transfer.plan import TransferPlan

    made = TransferPlan.load(file)
    rather = f"registry transfer SOURCE TARGET --plan {as_word(file)} --name {name}"
    if made.is_of_live_tensors:
        raise Invalid(
            f"{file}: the plan was made from tensors in memory", f"name a source and a target: {rather}"
        )
    source = made.source_id if made.source_id and made.source_id in registry else made.source
    torch.manual_seed(0)
    try:
        network, builder = _built(made.target) or _network(registry, made.target)
    except NotFound:
        what = quoted(made.target)
        raise NotFound(
            f"{file}: the plan is for {what}, which is no version or network here", f"name another: {rather}"
        ) from None
    _carry_out(registry, made, network, source, builder, name=name, as_json=as_json)


def _carry_out(
    registry: Registry,
    made: TransferPlan,
    network: Any,
    source: str,
    builder: str,
    *,
    name: str,
    as_json: bool,
) -> None:
    """Apply a plan to a network, save the network as a new version, and say so."""
    made.apply(network, source, registry=registry)
    with registry.run(name, plan=made, builder=builder) as run:
        saved = run.save(model=network)
    assert saved is not None
    if as_json:
        print_json({"plan": made.model_dump(by_alias=True), **version_document(registry.resolve(saved.name))})
        return
    say(f"{saved.name}: {made.summary} from {made.source}")


def _manifest_id(registry: Registry, text: str) -> str | None:
    """The id of the checkpoint that a text names; None if it names none."""
    try:
        return registry.resolve(text).id
    except (NotFound, Invalid):
        return None


def _network(registry: Registry, target: str) -> tuple[Any, str]:
    """The network that a reference or a builder's name stands for, and the name of its builder."""
    try:
        checkpoint = registry[target]
        return registry.build(target), checkpoint.provenance.get("builder", checkpoint.model)
    except NotFound:
        built = _built(target)
        if built is None:
            raise
        return built


def _built(name: str) -> tuple[Any, str] | None:
    """A new network of a builder, and the builder's name; None if there is no builder of this name."""
    # Lazy: loads torch.
    from registry.live import builders

    return (builders.builder(name).build(None), name) if name in builders.names() else None


@command("advise", "registry advise lenet5@best --samples 500 --similar yes --model lenet6")
@click.argument("reference", type=ReferenceType())
@click.option("--samples", required=True, type=click.IntRange(1), help="The number of samples to train on.")
@click.option(
    "--similar",
    required=True,
    type=click.Choice(["yes", "no"]),
    help="Whether they are like those of the version's training.",
)
@click.option("--model", metavar="NAME", help="The network to train. [default: the version's own]")
def advise(
    reference: str, samples: int, similar: str, model: str | None, registry: Registry, as_json: bool
) -> None:
    """Say whether to fine-tune or freeze, by a rule of thumb."""
    # Lazy: loads torch.
    from registry.live import builders
    from registry.transfer.advice import CAVEATS, Counts
    from registry.transfer.advice import advise as judge
    from registry.transfer.planning import plan_transfer

    checkpoint = registry[reference]
    target = model or checkpoint.provenance.get("builder", checkpoint.model)
    config = checkpoint.provenance.get("network") if model is None else None
    known = target in builders.names()
    network = builders.on_meta(lambda: builders.builder(target).build(config)) if known else target
    made = plan_transfer(checkpoint.name, network, everything=True, registry=registry)
    counts = Counts.of(made)
    found = judge(counts, samples=samples, similar=similar == "yes")
    if as_json:
        print_json({**found._asdict(), "caveats": CAVEATS, "plan": made.summary})
        return
    say(f"{found.case}: {found.advice}")
    say(f"  because {found.why}")
    say(f"  {made.summary} of {target} from {checkpoint.name}")
    say(f"  {samples:,} samples; {found.per_sample_all:,.1f} parameters a sample when all are trained,")
    frozen = "what was loaded" if counts.is_new else "all but the last layer"
    say(f"  {found.per_sample_head:,.1f} when {frozen} is frozen")
    say(f"  try: registry train {target} --from {checkpoint.name} {found.option}".rstrip())
    for caveat in CAVEATS:
        say(f"- {caveat}")
