"""Handwritten digits: 1,797 real images of 8 x 8 pixels, and random affine copies of them.

They are scikit-learn's (`load_digits`: Alpaydin and Kaynak 1998, UCI), which ships them with its package.
"""

import hashlib
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

Split = Literal["train", "test"]
SIDE, TEST_IMAGES = 8, 297
ROTATION, SCALE, SHIFT, NOISE = 0.22, 0.1, 1.0, 0.1  # radians, share, pixels, standard deviation


@dataclass(frozen=True, slots=True, eq=False)
class Handwriting:
    """images (n 8 8) float32 from 0 to 1, labels (n) int64, and what they are."""

    images: NDArray[np.float32]
    labels: NDArray[np.int64]
    source: str


def load_handwriting(split: Split) -> Handwriting:
    """1,500 images to train on, or the 297 others. An image's own pixels decide where it belongs.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        import sklearn
        from sklearn.datasets import load_digits
    except ImportError:
        raise ImportError(
            "the handwritten digits are part of scikit-learn, which is not installed: pip install "
            "scikit-learn, or pip install '.[senses]' in a clone of the repository."
        ) from None
    data = cast("Any", load_digits())  # with other arguments it returns a tuple
    pixels = data.images.astype(np.uint8)  # 0 to 16
    chosen = split_by_content(pixels, split)
    images = (pixels[chosen] / 16).astype(np.float32)
    words = {"train": "to train on", "test": "held out"}[split]
    source = f"{len(images)} handwritten digits {words} (scikit-learn {sklearn.__version__})"
    return Handwriting(images, data.target[chosen].astype(np.int64), source)


def split_by_content(pixels: NDArray[np.uint8], split: Split) -> NDArray[np.int64]:
    """The numbers of the images (n 8 8) of a split: those with the least hashes are held out."""
    order = sorted(range(len(pixels)), key=lambda i: hashlib.sha256(pixels[i].tobytes()).digest())
    chosen = order[:TEST_IMAGES] if split == "test" else order[TEST_IMAGES:]
    return np.sort(np.array(chosen, np.int64))


def affine_copies(rng: np.random.Generator, images: NDArray[np.float32], copies: int) -> NDArray[np.float32]:
    """The images (n h w) and `copies` of each (n copies+1 h w): turned, scaled, moved, noisy, from 0 to 1.

    A copy takes each pixel from where the inverse map puts it, between its four neighbours; outside is 0.
    """
    n, height, width = images.shape
    angle = rng.uniform(-ROTATION, ROTATION, (n, copies, 1, 1))
    scale = 1 + rng.uniform(-SCALE, SCALE, (n, copies, 1, 1))
    down, right = rng.uniform(-SHIFT, SHIFT, (2, n, copies, 1, 1))
    y, x = np.mgrid[:height, :width].astype(np.float64)
    y, x = y - (height - 1) / 2, x - (width - 1) / 2
    from_y = (np.cos(angle) * y - np.sin(angle) * x) / scale + (height - 1) / 2 + down
    from_x = (np.sin(angle) * y + np.cos(angle) * x) / scale + (width - 1) / 2 + right
    moved = _between_pixels(images, from_y, from_x) + rng.normal(0, NOISE, (n, copies, height, width))
    return np.concatenate([images[:, None], moved.clip(0, 1).astype(np.float32)], axis=1)


def _between_pixels(
    images: NDArray[np.float32], y: NDArray[np.float64], x: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Images (n h w) at real places (n c h w), bilinear."""
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2)))
    top, left = np.floor(y).astype(np.int64), np.floor(x).astype(np.int64)
    number = np.arange(len(images))[:, None, None, None]
    result = np.zeros(y.shape)
    for dy in (0, 1):
        for dx in (0, 1):
            weight = np.abs(1 - dy - (y - top)) * np.abs(1 - dx - (x - left))
            rows = (top + dy + 2).clip(0, padded.shape[1] - 1)
            columns = (left + dx + 2).clip(0, padded.shape[2] - 1)
            result += weight * padded[number, rows, columns]
    return result
