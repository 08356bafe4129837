"""Advice: fine-tune, or freeze? The four cases by the size of the new data and its similarity to the old."""

from __future__ import annotations

from typing import NamedTuple

SMALL = 10.0
"""Samples for each parameter that is trained when all are, times 1,000, below which the data counts as small."""

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
        "late features belong to the old task; sources disagree here: another pretrained model or more data may help more",
        "--freeze first:{early}",
    ),
    (False, False): (
        "large and different",
        "fine-tune everything, from the loaded weights",
        "even weights of another task are a better start than random ones",
        "",
    ),
}

CAVEATS = (
    "a rule of thumb: only you can judge how similar the data is, measures of similarity are unreliable",
    "training the head first and then everything keeps more accuracy out of the distribution (Kumar et al. 2022)",
    "which layers are best tuned depends on the kind of shift (Lee et al. 2023)",
)


class Advice(NamedTuple):
    """The case, what to do in it, why, and the numbers that it was judged by."""

    case: str
    advice: str
    why: str
    option: str
    samples: int
    trainable: int
    head: int
    per_sample_all: float
    per_sample_head: float


def advise(
    *, samples: int, similar: bool, trainable: int, head: int, layers: int, is_new: bool = True
) -> Advice:
    """Which of the four cases it is.

    Args:
        samples: images or examples to train on.
        similar: your judgement.
        trainable: parameters that are trained when all are.
        head: parameters that are trained when the rest is frozen.
        layers: how many layers have parameters.
        is_new: whether the head is what was not loaded, or else the last layer.
    """
    small = samples / max(1, trainable) < SMALL / 1_000
    case, advice, why, option = _CASES[small, similar]
    option = option.format(head="loaded" if is_new else "first:-1", early=max(1, layers // 2))
    return Advice(
        *(case, advice, why, option, samples, trainable, head),
        per_sample_all=trainable / max(1, samples),
        per_sample_head=head / max(1, samples),
    )
