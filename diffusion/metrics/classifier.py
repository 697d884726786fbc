"""A small classifier of our own, whose last hidden layer serves as features where nothing can be downloaded.

It is trained in seconds on a labelled set, is the same for the same set, size and seed on one machine, and
is kept as safetensors with what it was trained on and how well it does on images it has not seen.

Shapes: B images, C channels, H = W pixels, F features.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from thalweg.checkpoints import tensors
from thalweg.diffusion.images import ImageSet, open_images, split

WIDTH = 64
EPOCHS = 8
BATCH = 128
RATE = 3e-3
TEST_PART = 0.2
"""Part of the images that it is not trained on, but tested."""


class Classifier(nn.Module):
    """Three convolutions and two linear layers; gives the ``num_features`` values before the last layer.

    They are scaled to a mean square of one on the images that it was trained on.

    Takes bytes (B, C, H, W) from 0 to 255, or floats from 0 to 1, of any size; other sizes than its own are
    resized bilinearly, with antialiasing, and channels are averaged or repeated to its own number.

    Args:
        classes: Number of classes.
        channels: Channels of its images, 1 or 3.
        size: Pixels per side of its images.
        about: What is known about it, as JSON.
    """

    num_features = WIDTH

    def __init__(self, classes: int, channels: int, size: int, about: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.channels, self.size, self.about = channels, size, dict(about or {})
        self.convolutions = nn.Sequential(
            nn.Conv2d(channels, 16, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
        )
        self.hidden = nn.Linear(64 * 16, WIDTH)
        self.last = nn.Linear(WIDTH, classes)
        self.register_buffer("scale", torch.ones(()))

    @property
    def name(self) -> str:
        """What it is, for protocols."""
        about = self.about
        return (
            f"classifier of {about.get('images')} at {self.size} pixels, seed {about.get('seed')}, "
            f"test accuracy {about.get('test_accuracy', 0):.4f}, {fingerprint(self)}"
        )

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Features, (B, F)."""
        return self.scale * self._hidden(images_BCHW)

    def logits(self, images_BCHW: Tensor) -> Tensor:
        """One number for each class, (B, classes)."""
        return self.last(self._hidden(images_BCHW))

    def _hidden(self, images_BCHW: Tensor) -> Tensor:
        x = as_floats(images_BCHW, self.channels, self.size) * 2 - 1
        return F.silu(self.hidden(self.convolutions(x)))


def as_floats(images_BCHW: Tensor, channels: int, size: int | None) -> Tensor:
    """Images as floats from 0 to 1 with so many channels and pixels.

    Raises:
        ValueError: If the images have neither 1 nor 3 channels.
    """
    if images_BCHW.ndim != 4 or images_BCHW.shape[1] not in (1, 3):
        raise ValueError(f"images have shape {tuple(images_BCHW.shape)}, needed: (B, 1 or 3, H, W)")
    x = images_BCHW.float()
    if not images_BCHW.is_floating_point():
        x = x / 255
    if x.shape[1] > channels:
        x = x.mean(dim=1, keepdim=True)
    x = x.expand(-1, channels, -1, -1)
    if size is not None and tuple(x.shape[-2:]) != (size, size):
        x = F.interpolate(x, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
    return x


def fingerprint(network: nn.Module) -> str:
    """A short hash of the weights, so that numbers of different extractors are not compared."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return f"sha256 {digest.hexdigest()[:12]}"


def stack(images: ImageSet, rows: list[int]) -> Tensor:
    """Some images of a set, bytes (N, C, H, W)."""
    return torch.stack([images.image(i) for i in rows])


def train(images: str = "mnist5k", *, size: int = 32, channels: int = 1, seed: int = 0) -> Classifier:
    """Train a classifier.

    Args:
        images: Packaged set, or folder with one sub-folder per class.
        size: Pixels per side.
        channels: 1 for grey, 3 for RGB.
        seed: Of weights and batches.

    Raises:
        ValueError: If the set has a single class.
    """
    found = open_images(images, size=size, channels=channels)
    if len(found.names) < 2:
        raise ValueError(f"a classifier needs classes, but images {images!r} have one: {found.names[0]}")
    labels = torch.tensor(list(found.labels))
    learn, test = split(len(labels), max(1, round(TEST_PART * len(labels))))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Classifier(len(found.names), channels, size)
    _fit(network, stack(found, learn), labels[learn], seed)
    network.eval().requires_grad_(False)
    squares = torch.cat([network(part).square().mean(1) for part in stack(found, learn).split(512)])
    network.scale.fill_(squares.mean() ** -0.5)
    right = network.logits(stack(found, test)).argmax(1) == labels[test]
    network.about = {
        "images": images,
        "size": size,
        "channels": channels,
        "classes": list(found.names),
        "seed": seed,
        "epochs": EPOCHS,
        "train_images": len(learn),
        "test_images": len(test),
        "test_accuracy": right.double().mean().item(),
    }
    return network


def _fit(network: Classifier, images_NCHW: Tensor, labels_N: Tensor, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=1e-2)
    steps = EPOCHS * -(-len(labels_N) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(labels_N), generator=generator).split(BATCH):
            loss = F.cross_entropy(network.logits(images_NCHW[rows]), labels_N[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def save(network: Classifier, path: str | Path) -> None:
    """Write weights, and what is known about them in the header."""
    tensors.save(network.state_dict(), path, network.about)


def load(path: str | Path) -> Classifier:
    """Read a classifier.

    Raises:
        ValueError: If the file holds something else.
    """
    about = tensors.read_metadata(path) if Path(path).is_file() else {}
    state = tensors.load(path)
    try:
        network = Classifier(len(about["classes"]), about["channels"], about["size"], about)
        network.load_state_dict(state)
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"{path} holds no classifier of thalweg.diffusion.metrics: {error}") from None
    return network.eval().requires_grad_(False)


def cached(images: str = "mnist5k", *, size: int = 32, channels: int = 1, seed: int = 0) -> Classifier:
    """The classifier of a set from the user's cache, after training it where it is not there.

    The cache is THALWEG_CACHE, or thalweg in XDG_CACHE_HOME or ~/.cache. Sets of folders are not cached,
    since their files may change.
    """
    from thalweg.diffusion.images import SETS

    if images not in SETS:
        return train(images, size=size, channels=channels, seed=seed)
    path = cache_folder() / f"classifier-v2-{images}-{size}-{channels}-{seed}.safetensors"
    if path.is_file():
        return load(path)
    network = train(images, size=size, channels=channels, seed=seed)
    save(network, path)
    return network


def cache_folder() -> Path:
    """Where trained extractors are kept."""
    given = os.environ.get("THALWEG_CACHE")
    if given:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "thalweg"
