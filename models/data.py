"""Data sets of small images, with fixed, seeded splits.

`digits` comes with scikit-learn and needs no download. The others are read from a folder. Torchvision downloads them to
that folder if you ask for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset, Subset, TensorDataset

from registry.store.digest import digest, tensor_digest
from registry.store.errors import Invalid, NotFound
from registry.store.text import quoted

Name = Literal["digits", "fashion-mnist", "mnist", "cifar10", "folder"]
NAMES: tuple[Name, ...] = ("digits", "fashion-mnist", "mnist", "cifar10", "folder")
"""The names that `load` takes."""

SIZE = 28
"""Height and width of every image, in pixels."""

_HELD_OUT = 0.2
"""The share of each class that is held out, where a data set has no split of its own."""

_TORCHVISION = {"fashion-mnist": "FashionMNIST", "mnist": "MNIST", "cifar10": "CIFAR10"}


@dataclass(frozen=True)
class Data:
    """Images and labels to train on and to test on.

    Attributes:
        train, test: pairs of an image, float32 [channels, 28, 28] from 0 to 1, and its class.
        classes: the names of the classes, in order.
        channels: of every image.
        digest: the digest of the content and its split. A run records it.
    """

    name: str
    train: Dataset[Any]
    test: Dataset[Any]
    classes: tuple[str, ...]
    channels: int
    digest: str


def load(name: str, directory: Path | str | None = None, *, download: bool = False, seed: int = 0) -> Data:
    """Read a data set.

    Args:
        name: one of `NAMES`.
        directory: the folder of the files. `digits` needs none.
        download: let torchvision download missing files to that folder.
        seed: the seed of the split, if the data set has no split of its own.

    Raises:
        NotFound: if the data is not there. The message says how to get it.
        Invalid: if the name is unknown, or the folder has another layout.
    """
    if name == "digits":
        return _digits(seed)
    if name in _TORCHVISION:
        return _torchvision(name, directory, download)
    if name == "folder":
        return _folder(directory, seed)
    raise Invalid(f"data is {quoted(name)}, expected one of {', '.join(NAMES)}")


def few(data: Data, samples: int) -> Data:
    """The data set with only some of its images to train on, always the same ones.

    Args:
        samples: the number of images to train on.

    Raises:
        Invalid: if the data set has fewer.
    """
    total = len(data.train)  # type: ignore[arg-type]
    if samples > total:
        raise Invalid(f"samples is {samples}, but {data.name} has {total} to train on")
    places = torch.randperm(total, generator=torch.Generator().manual_seed(0))[:samples]
    train = Subset(data.train, places.tolist())
    return replace(data, train=train, digest=digest(f"{data.digest} {samples}".encode()))


def resize(images: Tensor) -> Tensor:
    """Scale images, float32 [batch, channels, height, width], to [batch, channels, 28, 28]."""
    return functional.interpolate(images, size=(SIZE, SIZE), mode="bilinear", align_corners=False)


def split(labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Split a data set: hold out a fifth of each class, at least one sample.

    Args:
        labels: classes, int64 [samples].

    Returns:
        The positions to train on and the positions to test on, int64, in rising order.
    """
    generator = torch.Generator().manual_seed(seed)
    train, test = [], []
    for kind in torch.unique(labels):
        places = (labels == kind).nonzero().flatten()
        places = places[torch.randperm(len(places), generator=generator)]
        count = max(1, round(len(places) * _HELD_OUT))
        test.append(places[:count])
        train.append(places[count:])
    return torch.cat(train).sort().values, torch.cat(test).sort().values


def _digits(seed: int) -> Data:
    # Lazy: loads sklearn.
    from sklearn.datasets import load_digits

    found = load_digits()
    images = resize(torch.from_numpy(found.images.astype(np.float32) / 16).unsqueeze(1))
    labels = torch.from_numpy(found.target.astype(np.int64))
    train, test = split(labels, seed)
    return Data(
        name="digits",
        train=TensorDataset(images[train], labels[train]),
        test=TensorDataset(images[test], labels[test]),
        classes=tuple(map(str, range(10))),
        channels=1,
        digest=_digest_of(images[train], labels[train], images[test], labels[test]),
    )


def _torchvision(name: str, directory: Path | str | None, download: bool) -> Data:
    # Lazy: loads torchvision.
    from torchvision import datasets

    kind = getattr(datasets, _TORCHVISION[name])
    if directory is None:
        raise NotFound(
            f"{name} needs a folder: use --data-dir DIR, with --download to fetch it there (or put torchvision's "
            f"files of {kind.__name__} there by hand)"
        )
    try:
        train, test = (kind(str(directory), train=part, download=download) for part in (True, False))
    except RuntimeError as error:
        how = "the download failed" if download else "fetch it with --download"
        raise NotFound(f"{name} is not in {directory}: {how} ({str(error).splitlines()[0]})") from None
    except OSError as error:
        raise NotFound(f"{name} could not be fetched to {directory}: {error}") from None
    ours, held_out = _images_and_labels(train), _images_and_labels(test)
    return Data(
        name=name,
        train=TensorDataset(*ours),
        test=TensorDataset(*held_out),
        classes=tuple(train.classes),
        channels=ours[0].shape[1],
        digest=_digest_of(*ours, *held_out),
    )


def _images_and_labels(part: Any) -> tuple[Tensor, Tensor]:
    images = torch.as_tensor(part.data)
    images = images.unsqueeze(1) if images.dim() == 3 else images.permute(0, 3, 1, 2)
    return resize(images.float() / 255), torch.as_tensor(part.targets)


def _folder(directory: Path | str | None, seed: int) -> Data:
    # Lazy: loads torchvision.
    from torchvision.datasets import ImageFolder

    if directory is None:
        raise NotFound("your own images need --data-dir DIR, with a folder of images for each class")
    try:
        found = ImageFolder(str(directory), transform=to_tensor)
    except FileNotFoundError as error:
        raise NotFound(f"{directory}: {error}", "make a folder of images for each class") from None
    if len(found.classes) < 2:
        raise Invalid(f"{directory} has images of one class only", "make a folder of images for each class")
    labels = torch.as_tensor(found.targets)
    train, test = split(labels, seed)
    held_out = set(test.tolist())
    content = "".join(
        f"{digest(Path(file).read_bytes())} {Path(file).relative_to(directory).as_posix()} {i in held_out}\n"
        for i, (file, _) in enumerate(found.samples)
    )
    return Data(
        name="folder",
        train=Subset(found, train.tolist()),
        test=Subset(found, test.tolist()),
        classes=tuple(found.classes),
        channels=3,
        digest=digest(content.encode()),
    )


def to_tensor(image: Any) -> Tensor:
    """A PIL image as float32 [3, 28, 28] from 0 to 1."""
    pixels = np.asarray(image.convert("RGB"), np.float32) / 255
    return resize(torch.from_numpy(pixels).permute(2, 0, 1).unsqueeze(0))[0]


def _digest_of(*tensors: Tensor) -> str:
    parts: Sequence[str] = [
        tensor_digest(
            str(t.dtype).removeprefix("torch."), tuple(t.shape), t.contiguous().numpy().data.cast("B")
        )
        for t in tensors
    ]
    return digest("".join(parts).encode())
