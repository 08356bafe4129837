"""Lightning: a training that is killed goes on bit for bit, with each kind of loader, and in two processes."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from killed import train
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from registry import Registry, ResumableLoader
from registry.files.exporting import export
from registry.integrations import pointers
from registry.integrations.lightning import RegistryCheckpoint
from registry.integrations.scrubbing import scrubbed, unscrubbed
from registry.integrations.storing import recordable, storable
from registry.remote import shared_log
from registry.store.errors import Conflict, Incompatible, Invalid, NotFound, Unsupported

SCRIPT = "train_lightning.py"

INSIDE = ["--every", "7"]
CASES: dict[str, tuple[int, list[str]]] = {
    "plain, at an epoch's end": (15, []),
    "plain with workers, at an epoch's end": (15, ["--workers", "2"]),
    "plain, after an epoch's last batch": (20, ["--every", "10"]),
    "StatefulDataLoader": (17, [*INSIDE, "--loader", "stateful"]),
    "StatefulDataLoader, at an epoch's end": (15, ["--loader", "stateful"]),
    "ResumableLoader": (17, [*INSIDE, "--loader", "resumable"]),
    "ResumableLoader with workers": (17, [*INSIDE, "--loader", "resumable", "--workers", "2"]),
    "ResumableLoader, at an epoch's end": (15, ["--loader", "resumable"]),
    "both": (17, [*INSIDE, "--loader", "resumable-stateful"]),
    "two optimizers": (17, [*INSIDE, "--loader", "resumable", "--two"]),
    "OneCycleLR": (17, [*INSIDE, "--loader", "resumable", "--onecycle"]),
    "validation inside an epoch": (17, ["--loader", "resumable", "--validate", "0.5", "--top", "2"]),
    "killed in a save": (99, [*INSIDE, "--loader", "resumable", "--early", "14"]),
    "gradients inside a window": (15, ["--loader", "resumable", "--validate", "0.3", "--window", "2"]),
    "plain, inside an epoch": (17, INSIDE),
    "Lightning's own, at an epoch's end": (15, []),
    "Lightning's own, inside an epoch": (17, [*INSIDE, "--loader", "stateful"]),
}
THEIRS = [case for case in CASES if case.startswith("Lightning's own")]
DIFFERS = ["plain, inside an epoch", *THEIRS]


def trained(several: list[list[Any]], count: int = 1) -> list[list[str]]:
    """How trainings one after the other ended: for each a line of each process, or `killed`."""
    line: list[object] = []
    for words in several:
        line += ["then", *words]
    ends: list[list[str]] = [[] for _ in several]
    for end in train(SCRIPT, *line[1:], count=count).splitlines():
        _, number, found = end.split(" ", 2)
        ends[int(number)].append(found)
    return ends


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[list[str]]]]:
    """For each case: its folder, and how a training without checkpoints, a killed one and that one resumed ended."""
    several: list[list[Any]] = []
    roots = {case: tmp_path_factory.mktemp("case") for case in CASES}
    for case, (kill, words) in CASES.items():
        own = ["--native"] if case in THEIRS else []
        several += [
            [roots[case] / "silent", *words, "--silent"],
            [roots[case], *words, *own, "--kill", kill],
            [roots[case], *words, *own, "--kill", kill, "--resume"],
        ]
    found = trained(several)
    return {case: (roots[case], found[3 * i : 3 * i + 3]) for i, case in enumerate(CASES)}


@pytest.mark.parametrize("case", [case for case in CASES if case not in DIFFERS])
def test_a_training_that_is_killed_goes_on_exactly(
    ends: dict[str, tuple[Path, list[list[str]]]], case: str
) -> None:
    root, (silent, killed, resumed) = ends[case]
    assert killed == ["killed"]
    assert resumed == silent
    registry = Registry(root / "registry")
    saved = registry.versions("net")
    assert len({version.step for version in saved}) == len(saved)
    assert registry.resolve("net@last").id == saved[0].id
    assert set(pointers.in_folder(folder(root)).values()) <= {version.id for version in saved}
    assert [info.state for info in registry.runs.find("net")] == ["finished", "running"]
    assert registry.verify().problems == ()


@pytest.mark.parametrize("case", DIFFERS)
def test_the_harness_tells_what_differs(ends: dict[str, tuple[Path, list[list[str]]]], case: str) -> None:
    """Lightning's own checkpoints are not exact, and neither are ours where nobody knows the position."""
    _, (silent, killed, resumed) = ends[case]
    assert killed == ["killed"]
    assert resumed != silent


def test_two_processes_go_on_each_with_its_own_random_numbers(tmp_path: Path) -> None:
    words = ["--every", "3", "--loader", "resumable", "--workers", "1", "--count", 2]
    root = tmp_path / "r"
    several = [[tmp_path / "silent", "--silent"], [root, "--kill", 8], [root, "--kill", 8, "--resume"]]
    silent, killed, resumed = trained([[*one, *words] for one in several], count=2)
    assert (len(silent), killed) == (2, ["killed", "killed"])
    assert resumed == silent
    registry = Registry(root / "registry")
    assert [version.step for version in registry.versions("net")] == [15, 12, 9, 6, 3]
    assert registry["net"].provenance["processes"] == 2


class Net(L.LightningModule):
    """A network that is trained in a moment, whose loss is what the test says."""

    def __init__(self, width: int = 2, losses: tuple[float, ...] = (), **hyperparameters: Any) -> None:
        super().__init__()
        self.save_hyperparameters(ignore="losses")
        self.layer, self.losses = nn.Linear(2, width), list(losses)

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        loss = self.layer(batch[0]).square().mean()
        self.log("train/loss", loss, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val/loss", torch.tensor(self.losses[self.current_epoch]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def data() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.ones(4, 2)), batch_size=2)


def settings_of(root: Path, **others: Any) -> dict[str, Any]:
    return {
        "default_root_dir": root,
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 2,
        **others,
    }


def fit(
    kept: RegistryCheckpoint, root: Path, net: Net | None = None, ckpt_path: Any = None, **others: Any
) -> L.Trainer:
    net = net or Net()
    trainer = L.Trainer(**kept.for_trainer(**settings_of(root, **others)))
    trainer.fit(net, data(), data() if net.losses else None, ckpt_path=ckpt_path)
    return trainer


def folder(root: Path) -> Path:
    return root / "lightning_logs" / "net" / "checkpoints"


def test_the_best_follows_the_metric_and_the_rules_keep_what_they_say(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "r")
    kept = RegistryCheckpoint("net", registry, monitor="val/loss", keep_last=1, keep_best=1)
    net = Net(losses=(0.5, 0.1, 0.4, 0.3))
    fit(kept, tmp_path, net, max_epochs=4)
    best = registry["net@best"]
    assert (best.epoch, best.metrics["val/loss"]) == (1, pytest.approx(0.1))
    assert [version.version for version in registry.versions("net")] == [4, 2]
    assert best.config == {"width": 2}
    assert registry["net"].parent == "net:v3"
    registry["net"].restore(model=net, optimizer=torch.optim.SGD(net.parameters(), 0.1))
    # No pointer leads to a version that the rules have removed, and one from elsewhere says so.
    left = set(pointers.in_folder(folder(tmp_path)).values())
    assert left == {registry["net:v2"].id, registry["net:v4"].id}
    old = tmp_path / "old.ckpt"
    old.write_text(json.dumps({"torch-registry": "net:v1", "id": "0" * 64}))
    with pytest.raises(NotFound, match="points at net:v1, which is not, or no longer, in the registry"):
        fit(RegistryCheckpoint("net", registry), tmp_path, Net(), ckpt_path=old)


def test_a_pointer_leads_to_a_version_that_was_thinned(tmp_path: Path) -> None:
    """The rules of the run take the optimizer of the best version; Lightning removes it when it is the best no more."""
    registry = Registry(tmp_path / "r")
    kept = RegistryCheckpoint("net", registry, keep_optimizer=1)
    keep = ModelCheckpoint(monitor="val/loss", save_top_k=2)
    net = Net(losses=(0.5, 0.1, 0.4, 0.3, 0.2, 0.2))
    trainer = fit(kept, tmp_path, net, max_epochs=5, callbacks=[keep])
    assert [version.version for version in registry.versions("net")] == [5, 2]
    assert len(pointers.in_folder(folder(tmp_path))) == 2
    best = registry["net@best"]
    assert "optimizer" not in best.components
    trainer.validate(net, data(), ckpt_path="best")
    assert torch.equal(net.layer.weight, best.state_dict()["layer.weight"])
    with pytest.raises(Incompatible, match=r"net:v2 has no state of optimizers .* cannot go on from it"):
        fit(kept, tmp_path, Net(), ckpt_path=keep.best_model_path)


def test_what_a_model_checkpoint_removes_goes_unless_something_holds_it(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "r")

    class Tags(Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            if trainer.current_epoch == 1:
                registry.set_tag("net:v1", "mine")

    keep = ModelCheckpoint(monitor="val/loss", save_top_k=1)
    fit(
        RegistryCheckpoint("net", registry),
        tmp_path,
        Net(losses=(0.5, 0.4, 0.3, 0.2)),
        max_epochs=4,
        callbacks=[keep, Tags()],
    )
    # The tag holds the first one, and the others were each the best in their time.
    assert [version.version for version in registry.versions("net")] == [4, 1]
    assert registry["net@best"].version == 4
    assert [path.name for path in folder(tmp_path).iterdir()] == ["epoch=3-step=8.ckpt"]


def test_what_a_callback_puts_into_the_place_of_the_parameters_is_saved(tmp_path: Path) -> None:
    """An average of the parameters has their names, and other values."""
    registry = Registry(tmp_path / "r")
    average = EMAWeightAveraging(decay=0.5)
    net = Net()
    fit(RegistryCheckpoint("net", registry), tmp_path, net, callbacks=[average], max_epochs=1)
    stored = registry["net"].load()
    assert not torch.equal(
        stored["model"]["layer.weight"], stored["lightning"]["current_model_state"]["layer.weight"]
    )
    again = Net()
    trainer = fit(
        RegistryCheckpoint("net", registry),
        tmp_path,
        again,
        ckpt_path="net@latest",
        callbacks=[EMAWeightAveraging(decay=0.5)],
        max_epochs=2,
    )
    assert trainer.global_step == 4


def test_an_exported_version_is_a_file_of_lightnings_own(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "r")
    net = Net(width=3)
    fit(RegistryCheckpoint("net", registry), tmp_path, net)
    path = export(registry["net"], tmp_path / "out.ckpt")
    found = Net.load_from_checkpoint(path)
    assert found.hparams["width"] == 3
    assert torch.equal(found.layer.weight, net.layer.weight)
    again, trainer = Net(width=3), L.Trainer(**settings_of(tmp_path, logger=False, max_epochs=3))
    trainer.fit(again, data(), ckpt_path=path, weights_only=False)
    assert trainer.global_step == 6
    thin = export(registry.thin("net"), tmp_path / "thin.ckpt")
    assert "optimizer_states" not in torch.load(thin)


def test_a_step_of_plateau_that_lightning_leaves_out_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Plateau(Net):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), 0.1)
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": scheduler, "monitor": "train/loss"},
            }

    with caplog.at_level(logging.WARNING, "registry"):
        fit(RegistryCheckpoint("net", Registry(tmp_path / "r")), tmp_path, Plateau())
    assert caplog.text.count("before a ReduceLROnPlateau takes its step") == 1


@pytest.mark.parametrize("last", [True, "link"])
def test_save_last_makes_no_version_of_its_own(tmp_path: Path, last: Any) -> None:
    registry = Registry(tmp_path / "r")
    for epochs in (1, 2):
        # The second run finds the pointer of the first, goes on in the same folder, and takes its place.
        keep = ModelCheckpoint(save_last=last, save_top_k=-1)
        path = "last" if epochs == 2 else None
        fit(
            RegistryCheckpoint("net", registry), tmp_path, callbacks=[keep], ckpt_path=path, max_epochs=epochs
        )
        assert [version.version for version in registry.versions("net")] == [*range(epochs, 0, -1)]
        newest = registry["net"]
        assert pointers.read(folder(tmp_path) / "last.ckpt") == (newest.name, newest.id)
        assert last == "link" or registry["net@last"].id == newest.id
    assert not (folder(tmp_path) / "last-v1.ckpt").exists()
    assert registry["net:v2"].lineage[0] == {"kind": "resumed-from", "parent": registry["net:v1"].id}


@pytest.mark.parametrize("keep_last", [None, 2])
def test_a_training_goes_on_while_a_shared_registry_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep_last: int | None
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "host"))
    monkeypatch.setattr(shared_log, "_REST", 0.0)
    bucket = tmp_path / "bucket"
    registry = Registry(bucket.as_uri())

    class Mount(L.Callback):  # type: ignore[misc]
        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            if trainer.current_epoch == 1:
                bucket.rename(tmp_path / "elsewhere")

    keep = ModelCheckpoint(save_last=True)
    fit(
        RegistryCheckpoint("net", registry, keep_last=keep_last),
        tmp_path,
        callbacks=[keep, Mount()],
        max_epochs=4,
    )
    # What a `ModelCheckpoint` and the rules remove goes from the outbox, too.
    assert [version.epoch for version in registry.outbox.versions()] == [3]
    assert pointers.read(folder(tmp_path) / "last.ckpt") == ("net:pending-3", registry["net"].id)
    (tmp_path / "elsewhere").rename(bucket)
    keep = ModelCheckpoint(save_last=True)
    fit(RegistryCheckpoint("net", registry), tmp_path, callbacks=[keep], max_epochs=5, ckpt_path="last")
    assert registry["net@last"].epoch == registry["net"].epoch == 4
    assert not registry.outbox
    assert registry.verify().problems == ()


def test_only_the_last_is_kept_without_the_others(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "r")
    fit(
        RegistryCheckpoint("net", registry),
        tmp_path,
        callbacks=[ModelCheckpoint(save_last=True, save_top_k=1)],
    )
    assert [version.version for version in registry.versions("net")] == [2]
    assert len(list(folder(tmp_path).iterdir())) == 2


def test_a_checkpoint_goes_on_in_another_folder_and_names_none(tmp_path: Path) -> None:
    registry, first, second = Registry(tmp_path / "r"), tmp_path / "first", tmp_path / "second"
    keep = {"monitor": "val/loss", "save_top_k": 2}
    fit(
        RegistryCheckpoint("net", registry),
        first,
        Net(losses=(0.5, 0.4)),
        callbacks=[ModelCheckpoint(**keep)],
    )
    state = registry["net"].state_dict("lightning")["callbacks"]
    assert str(tmp_path) not in repr(state)
    again = ModelCheckpoint(**keep)
    fit(
        RegistryCheckpoint("net", registry),
        second,
        Net(losses=(0.5, 0.4, 0.9)),
        callbacks=[again],
        ckpt_path="net@latest",
        max_epochs=3,
    )
    assert again.best_model_path == str(folder(second) / "epoch=1-step=4.ckpt")
    assert float(again.best_model_score) == pytest.approx(0.4)


def test_scrubbed_paths_come_back() -> None:
    state = {"/a/b/best.ckpt": [torch.tensor(1.0)], "x": ("/a/b", Path.cwd() / "x", "/ab", "b")}
    stored = scrubbed(state, {"checkpoints": "/a/b"})
    assert stored["x"] == ("torch-registry:checkpoints", "torch-registry:working/x", "/ab", "b")
    back = unscrubbed(stored, {"checkpoints": "/c"})
    assert back["x"] == ("/c", str(Path.cwd() / "x"), "/ab", "b")
    assert list(back) == ["/c/best.ckpt", "x"]


def test_any_hyperparameter_and_any_state_is_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    registry = Registry(tmp_path / "r")

    class Odd(Callback):
        def state_dict(self) -> dict[str, Any]:
            return {"count": 3, "thing": object()}

    fit(
        RegistryCheckpoint("net", registry),
        tmp_path,
        Net(act=nn.ReLU(), sizes={"a": {1}}, classes={0: "cat", 1: "dog"}),
        callbacks=[Odd()],
    )
    config = {"width": 2, "act": "ReLU()", "sizes": {"a": [1]}, "classes": {"0": "cat", "1": "dog"}}
    assert registry["net"].config == config
    states = registry["net"].state_dict("lightning")["callbacks"]
    assert [state for key, state in states.items() if "Odd" in key] == [{"count": 3}]
    assert "thing (a object)" in caplog.text
    assert recordable({"a": 1}) == storable({"a": 1}) == {"a": 1}


def test_a_tuner_begins_no_run_and_saves_nothing(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "r")
    kept = RegistryCheckpoint("net", registry)
    net = Net()
    trainer = L.Trainer(**kept.for_trainer(**settings_of(tmp_path)))
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    Tuner(trainer).lr_find(net, data(), num_training=3, update_attr=False)
    assert registry.runs.find() == []
    assert "net" not in registry
    assert all(torch.equal(net.state_dict()[name], tensor) for name, tensor in before.items())
    assert list(tmp_path.glob(".lr_find*")) == []
    trainer.fit(net, data())
    assert [info.state for info in registry.runs.find()] == ["finished"]


def test_a_trainer_that_measures_speed_is_refused(tmp_path: Path) -> None:
    kept = RegistryCheckpoint("net", Registry(tmp_path / "r"))
    with pytest.raises(Invalid, match="barebones=True measures speed without checkpoints"):
        kept.for_trainer(barebones=True)
    trainer = L.Trainer(barebones=True, max_epochs=1, default_root_dir=tmp_path, callbacks=[kept])
    with pytest.raises(Invalid, match="lacks parts of RegistryCheckpoint"):
        trainer.fit(Net(), data())


def test_a_training_that_fails_ends_its_run(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "r")

    class Fails(Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            if trainer.current_epoch == 1:
                raise ZeroDivisionError

    kept = RegistryCheckpoint("net", registry)
    assert kept.latest is None
    with pytest.raises(ZeroDivisionError):
        fit(kept, tmp_path, callbacks=[Fails()])
    assert kept.latest == "net@latest"
    assert [info.state for info in registry.runs.find()] == ["failed: ZeroDivisionError"]
    # The same object goes on, and a checkpoint after the end of training is a version too.
    trainer = fit(kept, tmp_path, ckpt_path=kept.latest)
    trainer.save_checkpoint(tmp_path / "mine.ckpt")
    assert pointers.read(tmp_path / "mine.ckpt") == ("net:v3", registry["net"].id)
    assert registry.runs.find()[0].state == "finished"
    assert list(kept.run.folder.glob("events.*"))


def test_validating_and_testing_take_a_reference(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "r")
    kept = RegistryCheckpoint("net", registry)
    fit(kept, tmp_path)
    net = Net(losses=(0.7,) * 9)
    trainer = L.Trainer(**kept.for_trainer(**settings_of(tmp_path, logger=False)))
    trainer.validate(net, data(), ckpt_path="net@latest")
    assert torch.equal(net.layer.weight, registry["net"].state_dict()["layer.weight"])
    assert len(registry.versions("net")) == 2


def test_a_checkpoint_of_lightning_itself_is_read(tmp_path: Path) -> None:
    trainer = L.Trainer(**settings_of(tmp_path, logger=False))
    trainer.fit(Net(), data())
    trainer.save_checkpoint(tmp_path / "stock.ckpt")
    registry = Registry(tmp_path / "r")
    fit(RegistryCheckpoint("net", registry), tmp_path, ckpt_path=tmp_path / "stock.ckpt", max_epochs=3)
    assert [version.epoch for version in registry.versions("net")] == [2]


def test_what_does_not_fit_is_said_before_training(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "r")
    fit(RegistryCheckpoint("net", registry), tmp_path)
    kept = RegistryCheckpoint("net", registry)
    with pytest.raises(
        Incompatible, match=r"^net:v2: model: layer.weight has shape \[3, 2\], stored is \[2, 2\]"
    ):
        fit(kept, tmp_path, Net(width=3), ckpt_path="net@latest")

    class Other(Net):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters())

    with pytest.raises(Incompatible, match="optimizer is a Adam, the checkpoint has the state of a SGD"):
        fit(kept, tmp_path, Other(), ckpt_path="net@latest")
    with pytest.raises(NotFound, match="nets"):
        fit(kept, tmp_path, ckpt_path="nets@best")
    with pytest.raises(
        NotFound, match=r"there is no file .*gone.ckpt; give one, or a reference such as net@best"
    ):
        fit(kept, tmp_path, ckpt_path=tmp_path / "gone.ckpt")
    registry.save("plain", {"model": Net().state_dict()})
    with pytest.raises(Incompatible, match="plain:v1 was not saved by Lightning; take its parameters alone"):
        fit(kept, tmp_path, ckpt_path="plain")
    registry.thin("net:v1")
    with pytest.raises(Incompatible, match="training cannot go on from it"):
        fit(kept, tmp_path, ckpt_path="net:v1")
    assert [info.state for info in registry.runs.find()] == ["finished"]


def test_a_wrong_use_is_refused_in_one_line(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "r")
    with pytest.raises(Invalid, match="keep_lats is no option; there are builder, compact, config"):
        RegistryCheckpoint("net", registry, keep_lats=3)
    with pytest.raises(Invalid, match="mode='min' or mode='max'"):
        RegistryCheckpoint("net", registry, monitor="depth")
    with pytest.raises(Invalid, match="registry is 'r', expected a Registry"):
        RegistryCheckpoint("net", "r")  # type: ignore[arg-type]
    kept = RegistryCheckpoint("net", registry)
    with pytest.raises(Invalid, match="have a RegistryCheckpoint already"):
        kept.for_trainer(callbacks=[kept])
    with pytest.raises(Invalid, match=r"make it with Trainer\(\*\*kept.for_trainer\(\)\)"):
        L.Trainer(**settings_of(tmp_path, callbacks=[kept], logger=False)).fit(Net(), data())

    class Nested(Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            fit(kept, tmp_path)

    with pytest.raises(Conflict, match="in use by another Trainer, whose run is net/run-1; make one each"):
        fit(kept, tmp_path, callbacks=[Nested()])
    trainer = L.Trainer(**kept.for_trainer(**settings_of(tmp_path)))
    trainer.strategy.__class__ = FSDPStrategy
    with pytest.raises(Unsupported, match="FSDPStrategy shards the network over processes"):
        kept.setup(trainer, Net(), "fit")
    assert registry.models() == []


def test_the_data_of_a_resumable_loader_must_be_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = RegistryCheckpoint("net", Registry(tmp_path / "r"))
    trainer = L.Trainer(**kept.for_trainer(**settings_of(tmp_path)))
    monkeypatch.setattr(type(trainer), "world_size", 2)
    with pytest.raises(Invalid, match=r"gives all its data to each of 2 processes; .*DistributedSampler"):
        trainer.fit(Net(), ResumableLoader(data()))


def test_a_save_inside_an_epoch_without_a_position_warns(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = RegistryCheckpoint("net", Registry(tmp_path / "r"))
    with caplog.at_level(logging.WARNING):
        fit(kept, tmp_path, callbacks=[ModelCheckpoint(every_n_train_steps=1, save_top_k=-1)])
    assert caplog.text.count("wrap the loader: ResumableLoader(loader)") == 1
