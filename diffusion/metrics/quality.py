"""FID, KID and CLIP score through torchmetrics, and the protocol that makes their numbers comparable.

Shapes: N and M images, C channels, H = W pixels, F features.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from thalweg.diffusion.images import open_images, split

Part = Literal["all", "train", "val"]
KID_SUBSETS = 100
KID_SUBSET_SIZE = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class Protocol:
    """All that a number depends on; numbers of different protocols are not comparable."""

    features: str
    """Extractor, with a hash of its weights."""
    num_features: int
    """Its features."""
    images: str
    """Real images: a packaged set, or a folder."""
    split: Part
    """Part of them."""
    num_val: int
    """Images in the part ``val``."""
    real: int
    """Number of real images."""
    samples: int
    """Number of drawn images."""
    size: int
    """Pixels per side of both, before the extractor."""
    channels: int
    """Channels of both."""
    pixels: str = "bytes 0 to 255"
    """What the extractor is given."""
    resize: str = "real images: area or bilinear with antialiasing to size; both: by the extractor"
    """How images change their size."""
    dtype: str = "features float32, statistics float64"
    """Precision."""
    kid_subsets: int = KID_SUBSETS
    """Subsets whose mean the KID is."""
    kid_subset_size: int = KID_SUBSET_SIZE
    """Images in each."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def real_images(
    images: str, *, size: int, channels: int, part: Part = "all", num_val: int = 500, limit: int | None = None
) -> tuple[Tensor, Tensor]:
    """Real images, bytes (N, C, H, W), and their labels (N,).

    Args:
        images: Packaged set, or folder.
        size: Pixels per side.
        channels: 1 or 3.
        part: All, or the training or validation part of ``thalweg fit`` with the same ``num_val``.
        num_val: Images of the validation part.
        limit: Use so many, evenly spread over the part.

    Raises:
        ValueError: For an unknown part or set.
    """
    if part not in get_args(Part):
        raise ValueError(f"split is {part!r}, allowed: {', '.join(get_args(Part))}")
    found = open_images(images, size=size, channels=channels)
    labels = torch.tensor(list(found.labels))
    rows = list(range(len(labels)))
    if part != "all":
        train, val = split(len(labels), num_val)
        rows = train if part == "train" else val
    if limit is not None and limit < len(rows):
        rows = [rows[i * len(rows) // limit] for i in range(limit)]
    return torch.stack([found.image(i) for i in rows]), labels[rows]


class Given(nn.Module):
    """Stands for an extractor where features are there already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features_NF: Tensor) -> Tensor:
        """The features."""
        return features_NF


def fid(samples_NF: Tensor, real_MF: Tensor) -> float:
    """Frechet distance of two sets of features (Heusel et al. 2017), by torchmetrics.

    It falls with the number of samples; compare only at the same numbers.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=Given(samples_NF.shape[1])).set_dtype(torch.float64)
    metric.update(real_MF.double(), real=True)
    metric.update(samples_NF.double(), real=False)
    return float(metric.compute())


def kid(
    samples_NF: Tensor,
    real_MF: Tensor,
    subsets: int = KID_SUBSETS,
    subset_size: int = KID_SUBSET_SIZE,
    seed: int = 0,
) -> tuple[float, float]:
    """Kernel distance of two sets of features (Binkowski et al. 2018), by torchmetrics.

    Returns:
        Mean over the subsets, and the standard deviation between them.

    Raises:
        ValueError: If there are fewer images than a subset has.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    if subset_size > min(len(samples_NF), len(real_MF)):
        raise ValueError(
            f"subsets of {subset_size} images need as many, got {len(samples_NF)} samples and "
            f"{len(real_MF)} real ones"
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Metric `Kernel Inception Distance` will save all")
        metric = KernelInceptionDistance(
            feature=Given(samples_NF.shape[1]), subsets=subsets, subset_size=subset_size
        ).set_dtype(torch.float64)
    metric.update(real_MF.double(), real=True)
    metric.update(samples_NF.double(), real=False)
    with torch.random.fork_rng(devices=[]):  # it draws the subsets with the global generator
        torch.manual_seed(seed)
        mean, deviation = metric.compute()
    return float(mean), float(deviation)


def clip_score(
    images_NCHW: Tensor, prompts: Sequence[str], weights: str | None, batch: int = 32, device: str = "cpu"
) -> float:
    """Mean of 100 cos(image, prompt) in the space of a CLIP model (Hessel et al. 2021), by torchmetrics.

    Args:
        images_NCHW: Bytes with 3 channels, or 1, which is repeated.
        prompts: One for each image.
        weights: Folder of a CLIP model as transformers writes it.
        batch: Images at once.
        device: Where the model runs.

    Raises:
        ValueError: If there is no model, or prompts and images differ in number.
    """
    from torchmetrics.multimodal.clip_score import CLIPScore

    if len(prompts) != len(images_NCHW):
        raise ValueError(f"{len(images_NCHW)} images but {len(prompts)} prompts")
    model = _clip(weights)
    metric = CLIPScore(model_name_or_path=lambda: model).to(device)
    pictures = images_NCHW.expand(-1, 3, -1, -1)
    for start in range(0, len(prompts), batch):
        part = slice(start, start + batch)
        metric.update(list(pictures[part].to(device)), list(prompts[part]))
    return float(metric.compute())


class _Clip(nn.Module):
    """A CLIP model that gives plain tensors, as torchmetrics 1.9 expects; those of transformers 5 do not."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def get_image_features(self, *values: Tensor) -> Tensor:
        found = self.model.get_image_features(*values)
        return found if isinstance(found, Tensor) else found.pooler_output

    def get_text_features(self, *values: Tensor) -> Tensor:
        found = self.model.get_text_features(*values)
        return found if isinstance(found, Tensor) else found.pooler_output


def _clip(weights: str | None) -> tuple[Any, Any]:
    example = "huggingface_hub's `hf download openai/clip-vit-large-patch14 --local-dir FOLDER`"
    if weights is None:
        raise ValueError(f"the CLIP score needs the folder of a CLIP model, as written by {example}")
    if not (Path(weights) / "config.json").is_file():
        raise ValueError(f"{weights!r} is no folder of a CLIP model; {example} makes one")
    try:
        from transformers import CLIPModel, CLIPProcessor
    except ImportError:
        raise ValueError("the CLIP score needs transformers: pip install 'thalweg[diffusion]'") from None
    try:
        model = CLIPModel.from_pretrained(weights, local_files_only=True)
        processor = CLIPProcessor.from_pretrained(weights, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"{weights!r} holds no whole CLIP model with its processor: {error}") from None
    return _Clip(model.eval().requires_grad_(False)), processor
