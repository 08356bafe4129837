"""Data sets: real digits, fixed splits, folders of images, and errors that say how to get what is missing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from registry.models import data
from registry.store.errors import Invalid, NotFound


def test_the_digits_are_real_split_once_and_held_apart() -> None:
    found, again, other = data.load("digits"), data.load("digits"), data.load("digits", seed=1)
    assert (len(found.train), len(found.test)) == (1_438, 359)
    assert found.digest == again.digest != other.digest
    image, label = found.train[0]
    assert (image.shape, image.dtype) == ((1, 28, 28), torch.float32)
    assert 0 <= float(image.min()) < float(image.max()) <= 1
    train = {found.train[i][0].numpy().tobytes() for i in range(len(found.train))}
    test = {found.test[i][0].numpy().tobytes() for i in range(len(found.test))}
    assert len(train & test) == 0
    counts = torch.bincount(torch.tensor([int(found.test[i][1]) for i in range(len(found.test))]))
    assert counts.min() >= 34
    assert int(label) in range(10)


def write_images(root: Path, classes: dict[str, int], mode: str = "RGB") -> None:
    chance = np.random.default_rng(0)
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = chance.integers(0, 256, (20, 30, 3), np.uint8)
            Image.fromarray(pixels).convert(mode).save(root / name / f"{i}.png")


def test_a_folder_of_images(tmp_path: Path) -> None:
    write_images(tmp_path / "set", {"cat": 10, "dog": 5})
    found = data.load("folder", tmp_path / "set")
    assert (found.classes, found.channels, len(found.train), len(found.test)) == (("cat", "dog"), 3, 12, 3)
    assert found.train[0][0].shape == (3, 28, 28)
    assert data.load("folder", tmp_path / "set").digest == found.digest
    Image.new("RGB", (20, 30)).save(tmp_path / "set" / "cat" / "0.png")
    assert data.load("folder", tmp_path / "set").digest != found.digest


def test_files_of_torchvision_are_read(tmp_path: Path) -> None:
    """The format of the MNIST files, written here; the real ones are fetched by `--download`."""
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 6), ("t10k", 3)):
        images = np.arange(count * 784, dtype=np.uint32).astype(np.uint8)
        head = b"".join(n.to_bytes(4, "big") for n in (0x803, count, 28, 28))
        (raw / f"{part}-images-idx3-ubyte").write_bytes(head + images.tobytes())
        labels = bytes(i % 10 for i in range(count))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(
            b"".join(n.to_bytes(4, "big") for n in (0x801, count)) + labels
        )
    found = data.load("fashion-mnist", tmp_path)
    assert (len(found.train), len(found.test), found.channels) == (6, 3, 1)
    assert found.classes[0] == "T-shirt/top"
    assert found.train[0][0][0, 0, 5] == pytest.approx(5 / 255)


@pytest.mark.parametrize(
    ("name", "folder", "told"),
    [
        ("mnist", None, r"mnist needs a folder: use --data-dir DIR, with --download"),
        ("cifar10", ".", r"cifar10 is not in .*: fetch it with --download"),
        ("folder", None, r"your own images need --data-dir"),
        ("folder", "nowhere", r"make a folder of images for each class"),
    ],
)
def test_missing_data_says_how_to_get_it(tmp_path: Path, name: str, folder: str | None, told: str) -> None:
    with pytest.raises(NotFound, match=told):
        data.load(name, tmp_path / folder if folder else None)


def test_what_is_no_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Invalid, match="data is 'digit', expected one of digits"):
        data.load("digit")
    write_images(tmp_path / "set", {"cat": 3})
    with pytest.raises(Invalid, match="images of one class only"):
        data.load("folder", tmp_path / "set")
