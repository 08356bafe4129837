"""What metrics may be called, and which of their values is the best."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from registry import Registry
from registry.log.metrics import is_smallest_best
from registry.store.errors import Invalid, NotFound

SMALLEST = (
    "loss val_loss val/loss eval_loss valLoss validation.loss ValidationError top1_error perplexity eval/perplexity "
    "mae MSE rmse wer word_error_rate cer fid fid_score brier_score f1_loss accuracy_loss loss_total log_loss "
    "train_loss_epoch"
)
LARGEST = (
    "accuracy val/acc acc acc1 acc@1 top1 val_acc_top1 top_5_accuracy mAP mAP50 mAP@0.5:0.95 mIoU f1 f1_macro "
    "roc_auc AUC auc_pr precision recall recall_at_k hits@10 bleu BLEU bleu4 rougeL R2 r2_score test/accuracy/mean"
)
NEITHER = (
    "depth score dist lr time acc_gap acc_std neg_loss neg_mean_squared_error loss_scale fid_at_best_acc @ 1 loss_of_x "
    + (
        "1-IoU 1-acc 1-SSIM FPR@95recall fpr_at_95_recall steps_to_accuracy epochs_to_acc time_to_acc seconds_per_map -elbo -loss"
    )
)


@pytest.mark.parametrize(
    ("names", "expected"), [(SMALLEST, True), (LARGEST, False), (NEITHER, None)], ids=["min", "max", "ask"]
)
def test_a_name_says_which_value_is_the_best(names: str, expected: bool | None) -> None:
    assert {name: is_smallest_best(name) for name in names.split()} == dict.fromkeys(names.split(), expected)


def weights(number: float) -> dict[str, dict[str, torch.Tensor]]:
    return {"model": {"w": torch.full((3,), number)}}


@pytest.mark.parametrize("name", ["val_loss", "val/loss", "eval loss"])
def test_the_smallest_of_a_loss_of_any_name_is_kept(tmp_path: Path, name: str) -> None:
    registry = Registry(tmp_path / "r")
    with registry.run("net", monitor=name, keep_best=1, keep_last=1) as run:
        for value in (0.5, 0.1, 0.9, 0.3):
            run.save(model=torch.nn.Linear(2, 1), metrics={name: value})
    assert registry["net@best"].metrics == {name: 0.1}
    assert registry["net@best"].name == "net:v2"
    assert registry.best("net", name).name == "net:v2"
    assert registry["net"].name == "net:v4"


def test_a_name_that_does_not_tell_is_asked_about_before_training(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "r")
    with pytest.raises(
        Invalid, match=r"'depth' does not tell which value is better; add mode='min' or mode='max'"
    ):
        registry.run("net", monitor="depth", keep_best=1)
    with registry.run("net", monitor="depth", mode="min") as run:
        for value in (2.0, 1.0, 3.0):
            run.save(model=torch.nn.Linear(2, 1), metrics={"depth": value})
    assert registry["net@best"].metrics == {"depth": 1.0}
    with pytest.raises(Invalid, match="add smallest=True or smallest=False"):
        registry.best("net", "depth")
    assert registry.best("net", "depth", smallest=False).name == "net:v3"


@pytest.mark.parametrize("name", ["", " acc", "acc ", "a\nb", "a\x1b[2Jb", "a\u202eb", "\ud800", "x" * 129])
def test_what_cannot_be_a_metric_is_refused_before_training(tmp_path: Path, name: str) -> None:
    registry = Registry(tmp_path / "r")
    with pytest.raises(Invalid, match="cannot be the name of a metric"):
        registry.run("net", monitor=name, mode="min")
    with pytest.raises(Invalid, match="cannot be the name of a metric"):
        registry.save("net", weights(1), metrics={name: 1.0})
    assert registry.names() == []


@pytest.mark.parametrize("name", ["val/acc", "val acc", "mAP@0.5:0.95", "точность", "acc (top-1), %"])
def test_names_that_the_field_uses_are_kept_found_and_rebuilt(tmp_path: Path, name: str) -> None:
    registry = Registry(tmp_path / "r")
    for value in (0.25, 0.5, 0.125):
        registry.save("net", weights(value), metrics={name: value})
    registry.rebuild()
    assert registry["net"].metrics == {name: 0.125}
    assert registry.best("net", name, smallest=False).name == "net:v2"
    with pytest.raises(NotFound, match=r"(did you mean|there are) "):
        registry.best("net", name[:3] + "x", smallest=True)


def test_the_field_loss_and_not_a_metric_of_that_name_is_monitored(tmp_path: Path) -> None:
    """The best alias and the retention go by the same values."""
    registry = Registry(tmp_path / "r")
    with registry.run("net", monitor="loss", keep_best=1, keep_last=1) as run:
        for loss, other in ((0.1, 9.0), (0.5, 1.0), (0.9, 5.0)):
            run.save(model=torch.nn.Linear(2, 1), loss=loss, metrics={"loss": other})
    assert registry["net@best"].name == "net:v1"
