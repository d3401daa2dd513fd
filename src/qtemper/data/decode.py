"""Encoded images to pixels: the crops of training and evaluation, as pure functions.

The crop of a training image depends on (seed, epoch, the image's index) alone: no generator state, so that any
process can decode any image at any time. Needs Pillow.
"""

from __future__ import annotations

import io
import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qtemper.counter import counter_uniform, derive_key
from qtemper.data.encoded import Encoded, ImageError
from qtemper.errors import optional_module

# First word of the keys: keeps these streams apart from those of `images` and the quantizers' noise.
_CROP, _FLIP = 0x1D47A011, 0x1D47A012

_SCALE, _RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
"""Area of a training crop as a share of the image's, and its width by its height: Szegedy et al., CVPR 2015."""

_ATTEMPTS = 10

_MAX_ASPECT = 100
"""Longer by shorter side; resizing a line of pixels by its shorter side would need gigabytes."""


@dataclass(frozen=True)
class Crop:
    """A rectangle of an image, in pixels, and whether it is mirrored."""

    left: int
    top: int
    width: int
    height: int
    flip: bool


def random_resized_crop(width: int, height: int, *, seed: int, epoch: int, index: int, flip: bool = True) -> Crop:
    """The training crop of an image: area and logarithm of the aspect ratio uniform, place uniform.

    A rectangle that does not fit is drawn again, up to ten times; then it is the largest central one whose aspect
    ratio is allowed, as in torchvision.

    Args:
        width: of the image, in pixels.
        height: of the image, in pixels.
        seed: the run's seed.
        epoch: passes over the data set so far.
        index: the image's position in its data set.
        flip: whether to mirror with probability 1/2.
    """
    counter = torch.arange(4 * _ATTEMPTS, dtype=torch.int32)
    key = torch.tensor(derive_key(_CROP, seed, epoch, index), dtype=torch.int32)
    draws: list[float] = counter_uniform(counter, key).tolist()
    mirrored = flip and derive_key(_FLIP, seed, epoch, index)[0] < 0
    low, high = (math.log(ratio) for ratio in _RATIO)
    for attempt in range(_ATTEMPTS):
        u_area, u_ratio, u_left, u_top = draws[4 * attempt : 4 * attempt + 4]
        area = width * height * (_SCALE[0] + u_area * (_SCALE[1] - _SCALE[0]))
        ratio = math.exp(low + u_ratio * (high - low))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            # u < 1, so that the place is at most the last one.
            return Crop(int(u_left * (width - w + 1)), int(u_top * (height - h + 1)), w, h, mirrored)
    w = min(width, max(1, round(height * _RATIO[1])))
    h = min(height, max(1, round(width / _RATIO[0])))
    return Crop((width - w) // 2, (height - h) // 2, w, h, mirrored)


def train_pixels(encoded: Encoded, size: int, *, seed: int, epoch: int, index: int, flip: bool = True) -> Tensor:
    """The training crop of an image, resized (bilinear, antialiased) to `size`.

    Args:
        encoded: the image.
        size: side of the result, in pixels.
        seed: see `random_resized_crop`.
        epoch: see `random_resized_crop`.
        index: see `random_resized_crop`.
        flip: see `random_resized_crop`.

    Returns:
        uint8, shape (3, size, size).

    Raises:
        ImageError: if the image is damaged.
    """
    image = _decode(encoded)
    crop = random_resized_crop(*image.size, seed=seed, epoch=epoch, index=index, flip=flip)
    image = image.crop((crop.left, crop.top, crop.left + crop.width, crop.top + crop.height))
    pixels = _pixels(image.resize((size, size), resample=_bilinear()))
    return pixels.flip(2) if crop.flip else pixels


def eval_pixels(encoded: Encoded, size: int) -> Tensor:
    """An image for evaluation: shorter side resized to `size * 256 / 224` (bilinear, antialiased), then the centre.

    Returns:
        uint8, shape (3, size, size).

    Raises:
        ImageError: if the image is damaged.
    """
    image = _decode(encoded)
    width, height = image.size
    short = max(size, round(size * 256 / 224))
    # The longer side is rounded down and the centre to the nearest pixel, as in torchvision.
    shape = (short, short * height // width) if width <= height else (short * width // height, short)
    image = image.resize(shape, resample=_bilinear())
    left, top = (round((side - size) / 2) for side in shape)
    return _pixels(image.crop((left, top, left + size, top + size)))


def _decode(encoded: Encoded) -> Any:
    pil = optional_module("PIL.Image", "train")
    try:
        with warnings.catch_warnings():
            # A damaged Exif block, say, is no damage of the pixels, and the limit on their number raises by itself.
            warnings.simplefilter("ignore")
            image = pil.open(io.BytesIO(encoded.data), formats=("JPEG", "PNG", "WEBP")).convert("RGB")
    except Exception as error:  # a broken file can make the decoders raise almost any type
        reason = " ".join(str(error).split()).rstrip(".")[:120] or type(error).__name__
        raise ImageError(encoded.path, f"damaged or no image ({reason})") from error
    if max(image.size) > _MAX_ASPECT * min(image.size):
        raise ImageError(encoded.path, f"too narrow ({image.width}x{image.height} pixels)")
    return image


def _bilinear() -> Any:
    return optional_module("PIL.Image", "train").Resampling.BILINEAR


def _pixels(image: Any) -> Tensor:
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())
