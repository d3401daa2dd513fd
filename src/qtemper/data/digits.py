"""scikit-learn's handwritten digits: real images that need no download, for first steps and fast tests."""

from __future__ import annotations

import numpy as np
import torch

from qtemper.data.images import ImageData, Split
from qtemper.errors import optional_module


def load_digits() -> ImageData:
    """1,797 handwritten digits of 8x8 pixels in one channel (E. Alpaydin and C. Kaynak, UCI, 1998).

    Grey values 0 .. 16 become `round(value * 255 / 16)`. Every fifth image is test (359), the other
    1,438 are train.

    Raises:
        ModuleNotFoundError: if scikit-learn is not installed.
    """
    digits = optional_module("sklearn.datasets", "train").load_digits()
    images = torch.from_numpy(np.rint(digits.images * (255 / 16)).astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(digits.target.astype(np.int64))
    is_test = torch.arange(len(labels)) % 5 == 4
    return ImageData(
        name="digits",
        train=Split(images[~is_test], labels[~is_test]),
        test=Split(images[is_test], labels[is_test]),
        classes=tuple(str(name) for name in digits.target_names),
    )
