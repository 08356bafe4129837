"""Advice: fine-tune, or freeze? The four cases by the size of the new data and its similarity to the old."""

from __future__ import annotations

from typing import NamedTuple

from registry.transfer.plan import TransferPlan

SMALL = 10.0
"""Samples for 1,000 parameters, when all are trained, below which the data counts as small."""

_CASES = {
    (True, True): (
        "small and similar",
        "freeze what is loaded and train the new head",
        "fine-tuning everything on few samples overfits, and the old features fit",
        "--freeze {head}",
    ),
    (False, True): (
        "large and similar",
        "fine-tune everything",
        "there is enough data to improve the old features without losing them",
        "",
    ),
    (True, False): (
        "small and different",
        "keep the early layers as they are and train a small network on top",
        "late features belong to the old task (sources disagree: another pretrained model or more data may help more)",
        "--freeze first:{early}",
    ),
    (False, False): (
        "large and different",
        "fine-tune everything, from the loaded parameters",
        "even parameters of another task are a better start than random ones",
        "",
    ),
}

CAVEATS = (
    "this is a rule of thumb; judge the similarity of the data yourself, because measures of it are unreliable",
    "training the head first and then everything keeps more out-of-distribution accuracy (Kumar et al. 2022)",
    "which layers are best tuned depends on the kind of shift (Lee et al. 2023)",
)


class Counts(NamedTuple):
    """What is left to train after a transfer.

    Attributes:
        trainable: elements of the parameters that are trained when all are.
        head: elements of those that are trained when the rest is frozen.
        layers: how many layers have parameters.
        is_new: whether the head is what was not loaded; otherwise everything was, and the head is the last layer.
    """

    trainable: int
    head: int
    layers: int
    is_new: bool

    @classmethod
    def of(cls, plan: TransferPlan) -> Counts:
        """The counts of a plan."""
        loaded, trainable = plan.parameters
        layers: dict[str, int] = {}
        last = ""
        for step in plan.steps:
            if step.target and not step.buffer:
                last = step.target.rpartition(".")[0]
                layers[last] = layers.get(last, 0) + step.elements
        is_new = loaded < trainable
        head = trainable - loaded if is_new else layers[last]
        return cls(trainable=trainable, head=head, layers=len(layers), is_new=is_new)


class Advice(NamedTuple):
    """The case, what to do in it, why, and the numbers that it was judged by.

    Attributes:
        option: the options of `registry train` that do it; empty for none.
        trainable, head: as in `Counts`.
        per_sample_all, per_sample_head: `trainable` and `head` divided by the number of samples.
    """

    case: str
    advice: str
    why: str
    option: str
    samples: int
    trainable: int
    head: int
    per_sample_all: float
    per_sample_head: float


def advise(counts: Counts, *, samples: int, similar: bool) -> Advice:
    """Say which of the four cases it is.

    >>> advise(Counts(trainable=61_000, head=850, layers=5, is_new=True), samples=500, similar=True).case
    'small and similar'

    Args:
        counts: what a plan leaves to train; see `Counts.of`.
        samples: how many samples there are to train on.
        similar: whether they are like those before, in your judgement.
    """
    is_small = samples / max(1, counts.trainable) < SMALL / 1_000
    case, advice, why, option = _CASES[is_small, similar]
    head = "loaded" if counts.is_new else "first:-1"
    return Advice(
        case=case,
        advice=advice,
        why=why,
        option=option.format(head=head, early=max(1, counts.layers // 2)),
        samples=samples,
        trainable=counts.trainable,
        head=counts.head,
        per_sample_all=counts.trainable / max(1, samples),
        per_sample_head=counts.head / max(1, samples),
    )
