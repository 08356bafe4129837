"""Metrics: what one may be called, and whether its smallest or its largest value is the best."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from registry.store.errors import Fix, Invalid
from registry.store.text import quoted

MAX_METRIC = 128
"""Characters that the name of a metric has at most."""


_WITHIN = "metrics."
"""Where documents have the metrics of a version: before the name of one that is called like a field."""


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


_FIELDS = _set(
    """
    name model version versions created epoch step loss metrics aliases tags size tensors id run parent own how made
    best trend updated
    """
)
"""What tables show of a version beside its metrics, in lower case."""


_LOSSES = _set(
    """
    loss losses logloss error errors err
    """
)
_SMALLEST = _LOSSES | _set(
    """
    perplexity ppl nll bce xent crossentropy kl kld mae mse rmse msle rmsle mape smape wer cer eer ter
    fid kid ece brier lpips bpb bpc bpd epe mpjpe chamfer regret
    """
)
_LARGEST = _set(
    """
    accuracy acc top1 top5 f1 f2 fbeta auc auroc auprc roc precision recall sensitivity specificity map
    ap iou miou dice bleu rouge rouge1 rouge2 rougel meteor chrf r2 psnr ssim mcc kappa ndcg mrr hits
    pearson spearman reward elbo likelihood
    """
)
_QUALIFIERS = _set(
    """
    at k top macro micro weighted pr total epoch step mean avg average ema val valid validation eval test
    train dev score rate overall all
    """
)
"""Words that may follow the name of a measure and leave its direction as it is."""

_TURNING = _set(
    """
    neg negative negated minus inv inverse inverted std stdev var variance gap diff difference delta non not without
    to until per before after time times steps epochs seconds minutes hours count number num cost latency
    fpr fnr far frr fdr miss missed failed failure wrong
    """
)
"""Words that may turn the direction round: a name with one of them does not tell."""

_SUBTRACTED = re.compile(r"(?:^|[\s/(])(?:1\s*)?[-\u2212](?=\s*[^\W\d])|^1-")
"""A sign before a name, as in `1-IoU` or `-elbo`."""

_PIECE = re.compile(r"[^\W_]+")
"""What stands between separators: `val` and `mAP50` in `val/mAP50`."""

_PART = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+|[^\W_A-Za-z0-9]+")
"""A word or a number within such a piece: `val` and `Loss` in `valLoss`."""


_ADD_A_MODE = Fix("", "add mode='min' or mode='max'", "")


def called(metric: str) -> str:
    """What a metric is called beside the fields of a version.

    >>> called("accuracy"), called("epoch")
    ('accuracy', 'metrics.epoch')
    """
    return f"{_WITHIN}{metric}" if metric.lower() in _FIELDS else metric


def bare(name: str) -> str:
    """The metric that is called so beside the fields of a version.

    >>> bare("accuracy"), bare("metrics.epoch"), bare("metrics.accuracy")
    ('accuracy', 'epoch', 'metrics.accuracy')
    """
    inner = name.removeprefix(_WITHIN)
    return inner if called(inner) == name else name


def with_metrics(fields: Mapping[str, Any], metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a version and its metrics, each under a name of its own.

    >>> with_metrics({"epoch": 3}, {"accuracy": 0.9, "epoch": 2.5})
    {'epoch': 3, 'accuracy': 0.9, 'metrics.epoch': 2.5}
    """
    return {**fields, **{called(name): value for name, value in metrics.items()}}


class Monitor(NamedTuple):
    """The metric (or `loss`) by which a version is the best, and whether that is the smallest value."""

    metric: str
    smallest: bool

    def value(self, loss: float | None, metrics: Mapping[str, float]) -> float | None:
        """What a version has of it; None if it was not recorded."""
        return loss if self.metric == "loss" else metrics.get(bare(self.metric))


def check_metric(name: str) -> str:
    """Check the name of a metric, such as `accuracy`, `val/loss` or `mAP@0.5`.

    Raises:
        Invalid: if it is empty, too long, begins or ends with a space, or holds what cannot be printed.
    """
    if not is_metric(name):
        raise Invalid(
            f"{quoted(str(name))} cannot be the name of a metric: use 1 to {MAX_METRIC} printable characters, "
            "without a space at the beginning or the end"
        )
    return name


def is_metric(name: object) -> bool:
    """Whether something is the name of a metric."""
    return (
        isinstance(name, str) and 0 < len(name) <= MAX_METRIC and name.isprintable() and name == name.strip()
    )


def is_smallest_best(name: str) -> bool | None:
    """Whether the smallest value of a metric is the best one, by the words of its name; None if they do not tell.

    >>> is_smallest_best("val_loss"), is_smallest_best("eval/mAP50"), is_smallest_best("depth")
    (True, False, None)
    """
    words = _words(name)
    if _TURNING & set(words) or _SUBTRACTED.search(name):
        return None
    while words and (words[-1] in _QUALIFIERS or words[-1].isdigit()):
        words.pop()
    # A name that ends in a loss is that of a loss, even `accuracy_loss`.
    if not words or words[-1] in _LOSSES:
        return True if words else None
    if words[-1] not in _SMALLEST | _LARGEST:
        return None
    directions = {word in _SMALLEST for word in words if word in _SMALLEST | _LARGEST}
    return directions.pop() if len(directions) == 1 else None


def smallest_is_best(name: str, advice: Fix) -> bool:
    """As `is_smallest_best`, but a name that does not tell is an error.

    Args:
        advice: what to add where the name does not tell.

    Raises:
        Invalid: if the name does not tell, or cannot be one.
    """
    smallest = is_smallest_best(check_metric(name))
    if smallest is None:
        raise Invalid(f"the name {quoted(name)} does not tell which value is better", advice)
    return smallest


def monitored(name: str, mode: str | None) -> Monitor:
    """The metric that says which version is the best.

    Args:
        mode: `min` or `max`; without it the name decides.

    Raises:
        Invalid: if the name or the mode cannot be one, or neither says which value is better.
    """
    check_metric(name)
    if mode not in (None, "min", "max"):
        raise Invalid(f"mode is {quoted(str(mode))}, expected 'min' or 'max'")
    smallest = mode == "min" if mode else smallest_is_best(name, _ADD_A_MODE)
    return Monitor(name, smallest)


def _words(name: str) -> list[str]:
    """The words of a name in lower case: `valLoss` has two, `mAP50` is `map`, `f1` stays as it is."""
    found: list[str] = []
    for piece in _PIECE.findall(name):
        whole = piece.lower()
        known = _SMALLEST | _LARGEST
        if whole in known or whole.isdigit():
            found.append(whole)
        elif (bare := whole.rstrip("0123456789")) in known:
            found.append(bare)
        else:
            found += [part.lower() for part in _PART.findall(piece)]
    return found
