"""Detectors of the reward ``geneval`` by name; anything else is a ``module:function`` of the user."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from thalweg.diffusion.rewards.base import RewardError
from thalweg.diffusion.rewards.weights import model_folder, needed, whole_model

INSTALL = "pip install 'thalweg[diffusion]'"


def open_detector(name: str, device: str, options: dict[str, Any]) -> Any:
    """A function from bytes (H, W, C) and metadata to detections by class.

    Args:
        name: One of :data:`DETECTORS`, or ``module:function``, called with the device and the options.
        device: Where it runs.
        options: Of its own.

    Raises:
        RewardError: If it cannot be imported, takes other options, or weights are missing.
    """
    make = DETECTORS.get(name) or _imported(name)
    try:
        inspect.signature(make).bind(device, **options)
    except TypeError as error:
        raise RewardError(f"detector {name!r} with options {sorted(options)}: {error}") from None
    return make(device, **options)


def _imported(name: str) -> Callable[..., Any]:
    module, _, function = name.partition(":")
    known = ", ".join((*DETECTORS, "remote"))
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise RewardError(f"detector {name!r} is none of {known}, and not module:function: {error}") from None


def mask2former(
    device: str = "cpu", *, weights: str | None = None, clip: str | None = None, legacy_bgr: bool = False
) -> Any:
    """GenEval's own detector, and its colours by CLIP.

    Weights: ``thalweg import FILE --layout mmdet-mask2former --to FOLDER`` makes the folder of the official
    file, mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco_20220504_001756-743b7d99.pth of
    https://download.openmmlab.com/mmdetection/v2.0/mask2former/ (mmdet, Apache-2.0, trained on COCO). The
    folder of facebook/mask2former-swin-small-coco-instance has the same network with other weights (licence
    "other"), whose scores differ. CLIP: https://huggingface.co/openai/clip-vit-large-patch14, MIT code.
    Agreement with mmdet was not measured; see :mod:`thalweg.diffusion.metrics.mmdet`.

    Args:
        device: Where both networks run.
        weights: Folder of the detector as transformers writes it.
        clip: Folder of the CLIP model.
        legacy_bgr: Exchange red and blue for the detector, as the published training code does by mistake.

    Raises:
        RewardError: If a folder is missing, or its model is another one.
    """
    from thalweg.diffusion.metrics.colors import ColorClassifier
    from thalweg.diffusion.metrics.mask2former import Mask2FormerDetector
    from thalweg.diffusion.metrics.mmdet import FILE, UNUSED
    from thalweg.diffusion.nft.prompt_sets import CLASSES

    transformers = needed("transformers", "geneval", INSTALL)
    if weights is None or not (Path(weights) / "config.json").is_file():
        said = (
            "needs 'weights', the"
            if weights is None
            else f"has no detector in weights {weights!r}, needed: a"
        )
        raise RewardError(
            f"reward 'geneval' {said} folder that `thalweg import {FILE} --layout mmdet-mask2former --to"
            " FOLDER` makes; the file is on download.openmmlab.com"
        )
    folder = model_folder(clip, "geneval", "clip", "openai/clip-vit-large-patch14")
    model = whole_model(transformers.Mask2FormerForUniversalSegmentation, weights, UNUSED)
    if model.config.num_labels != len(CLASSES):
        raise RewardError(f"{weights!r} knows {model.config.num_labels} classes, needed: those of COCO, 80")
    return Mask2FormerDetector(
        model=model.eval().requires_grad_(False).to(device),
        colors=ColorClassifier(
            model=whole_model(transformers.CLIPModel, folder).eval().requires_grad_(False).to(device),
            tokenizer=_tokenizer(transformers.CLIPTokenizer, folder),
        ),
        legacy_bgr=legacy_bgr,
    )


def _tokenizer(kind: Any, folder: str) -> Any:
    try:
        return kind.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise RewardError(f"{folder!r} holds no whole {kind.__name__}: {error}") from None


def shapes(device: str = "cpu") -> Any:
    """The exact detector of ShapesWorld."""
    from thalweg.diffusion.rewards.shapes import detector

    return detector(device)


DETECTORS: dict[str, Callable[..., Any]] = {"mask2former": mask2former, "shapes": shapes}
"""By name; the reward itself knows ``remote``, which leaves detection and scoring to a server."""
