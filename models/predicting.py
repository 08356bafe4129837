"""Classifying image files with a network from the registry."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from registry.models.data import SIZE
from registry.store.errors import Incompatible, Invalid, NotFound
from registry.store.text import printable


class Prediction(NamedTuple):
    """The prediction for an image.

    Attributes:
        image: the path of the file.
        label, probability: the likeliest class, and its probability from 0 to 1.
        second, second_probability: the same for the second likeliest class.
    """

    image: str
    label: str
    probability: float
    second: str
    second_probability: float


@torch.inference_mode()
def predict(
    network: nn.Module,
    classes: Sequence[str],
    files: Sequence[Path],
    *,
    fit: bool = False,
    invert: bool = False,
) -> list[Prediction]:
    """Classify image files.

    Args:
        network: a network in evaluation mode. Its `config.channels` is the number of channels that it takes.
        classes: names of the classes, in order.
        files: the image files.
        fit: scale images of another size to 28 by 28 pixels, and turn colour into grey or grey into colour.
        invert: turn dark on bright into bright on dark, as in the data sets of digits.

    Returns:
        One prediction for each file, in the order of the files.

    Raises:
        NotFound: if a file does not exist.
        Invalid: if a file is not an image.
        Incompatible: if an image has another size or another kind of colour, and `fit` is not given.
    """
    channels = int(network.config.channels)  # type: ignore[union-attr, arg-type]
    images = torch.stack([_read(file, channels, fit) for file in files])
    chances = network(1 - images if invert else images).softmax(1)
    values, places = chances.topk(min(2, len(classes)), dim=1)
    found = []
    for file, value, place in zip(files, values.tolist(), places.tolist(), strict=True):
        found.append(
            Prediction(
                image=str(file),
                label=classes[place[0]],
                probability=value[0],
                second=classes[place[-1]],
                second_probability=value[-1],
            )
        )
    return found


def _read(file: Path, channels: int, fit: bool) -> Tensor:
    # Lazy: loads PIL.
    from PIL import Image, UnidentifiedImageError

    shown = printable(str(file))
    try:
        with Image.open(file) as opened:
            image = opened.convert("RGB" if opened.mode not in ("L", "1", "I;16") else "L")
    except FileNotFoundError:
        raise NotFound(f"{shown}: there is no such file") from None
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        raise Invalid(f"{shown}: not an image that can be read ({printable(str(error))})") from None
    if image.size != (SIZE, SIZE):
        if not fit:
            raise Incompatible(
                f"{shown}: has {image.width}x{image.height} pixels, but the network takes {SIZE}x{SIZE}",
                "scale it with --fit",
            )
        image = image.resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    kind = "L" if channels == 1 else "RGB"
    if image.mode != kind:
        if not fit:
            what = (
                "in colour, but the network takes grey"
                if channels == 1
                else "grey, but the network takes colour"
            )
            raise Incompatible(f"{shown}: is {what}", "convert it with --fit")
        image = image.convert(kind)
    pixels = np.asarray(image, np.float32).reshape(SIZE, SIZE, channels) / 255
    return torch.from_numpy(pixels).permute(2, 0, 1)
