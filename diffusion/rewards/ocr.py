"""Does a picture show the text that its prompt puts in double quotes? One minus a share of wrong characters.

What is recognised is joined without spaces, in lower case, and compared with the target, treated alike: 1 if
it contains the target, otherwise 1 - min(d, n) / n with the Levenshtein distance d of both and the length n
of the target (Flow-GRPO, arXiv 2505.05470). The recogniser is a plug-in; the one by name is RapidOCR, whose
package ships its weights (PP-OCRv6 of PaddleOCR; code and models Apache-2.0).

Shapes: B images, C = 3 channels, H x W pixels.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from thalweg.diffusion.rewards.base import Metadata, RewardError, RewardResult, as_bytes
from thalweg.diffusion.rewards.weights import needed

Lines = Sequence[tuple[str, float]]
Recogniser = Callable[[np.ndarray], Lines | None]
"""Reads bytes (H, W, C): lines of text, each with its confidence, or None."""

QUOTED = re.compile(r'"(.*?)"|\u201c(.*?)\u201d', re.DOTALL)
"""The first span in straight or curly double quotes."""


def target(prompt: str) -> str:
    """Text that a picture is to show, normalised.

    Raises:
        RewardError: If there are no quotes, or nothing but spaces in them.
    """
    found = QUOTED.search(prompt)
    text = normalise(found.group(1) or found.group(2) or "") if found else ""
    if not text:
        raise RewardError(
            f"reward 'ocr' needs a text in double quotes, as in a sign \"OPEN\"; prompt: {prompt!r}"
        )
    return text


def normalise(text: str) -> str:
    """Lower case, without spaces; other white space counts."""
    return text.replace(" ", "").lower()


def text_score(lines: Lines | None, prompt: str) -> float:
    """Score, 0 to 1, of what was recognised; lines of no confidence do not count.

    Raises:
        RewardError: See :func:`target`.
    """
    wanted = target(prompt)
    read = normalise("".join(text for text, confidence in lines or () if confidence > 0))
    if wanted in read:
        return 1.0
    return 1.0 - min(levenshtein(read, wanted), len(wanted)) / len(wanted)


def levenshtein(a: str, b: str) -> int:
    """Fewest insertions, deletions and replacements of characters that turn one text into the other."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]


@dataclass(frozen=True, kw_only=True)
class OcrReward:
    """Scores by a recogniser."""

    recognise: Recogniser
    """Reads a picture."""
    failing: Literal["raise", "zero"] = "raise"
    """What a recogniser that fails leads to; zero, as in the published code, spoils the mean of a group."""
    name: str = "ocr"
    """In logs."""

    def __call__(
        self, images_BCHW: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> RewardResult:
        """Scores of images whose prompts quote a text."""
        pairs = zip(as_bytes(images_BCHW), prompts, strict=True)
        scores = torch.tensor([self._score(p, prompt) for p, prompt in pairs], dtype=torch.float64)
        return RewardResult(scores=scores, parts={"exact": (scores == 1).double()})

    def _score(self, pixels_HWC: np.ndarray, prompt: str) -> float:
        target(prompt)
        try:
            lines = self.recognise(pixels_HWC)
        except Exception as error:
            if self.failing == "zero":
                return 0.0
            raise RewardError(f"the recogniser of reward 'ocr' failed for {prompt!r}: {error!r}") from error
        return text_score(lines, prompt)


def ocr(
    device: str = "cpu", *, recogniser: str = "rapidocr", failing: Literal["raise", "zero"] = "raise"
) -> OcrReward:
    """Share of right characters in the quoted text.

    Args:
        device: Passed to a recogniser of the user; RapidOCR runs on the CPU.
        recogniser: ``rapidocr``; ``paddleocr``, which the paper uses and which downloads its weights; or
            ``module:function``, called with the device for a :data:`Recogniser`.
        failing: ``raise``, or ``zero`` as the published code.

    Raises:
        RewardError: If the recogniser is not installed or cannot be imported, or for another ``failing``.
    """
    if failing not in ("raise", "zero"):
        raise RewardError(f"failing {failing!r}, allowed: raise, zero")
    if recogniser == "rapidocr":
        return OcrReward(recognise=_rapidocr(), failing=failing)
    if recogniser == "paddleocr":
        return OcrReward(recognise=_paddleocr(), failing=failing)
    module, _, function = recogniser.partition(":")
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        allowed = "rapidocr, paddleocr or module:function"
        raise RewardError(f"recogniser {recogniser!r} is not {allowed}: {error}") from None
    return OcrReward(recognise=make(device), failing=failing)


def _rapidocr() -> Recogniser:
    """RapidOCR 3 with the weights of its package: detection and recognition, without orientation."""
    install = "pip install 'thalweg[ocr]'"
    needed("onnxruntime", "ocr", install)
    module = needed("rapidocr", "ocr", install)
    engine = module.RapidOCR(params={"Global.log_level": "error"})

    def read(pixels_HWC: np.ndarray) -> Lines | None:
        found: Any = engine(pixels_HWC[..., ::-1], use_cls=False)  # BGR, as OpenCV has it
        return None if found.txts is None else list(zip(found.txts, found.scores, strict=True))

    return read


def _paddleocr() -> Recogniser:
    """PaddleOCR in English without orientation; 2.9.1 is what published scores come from.

    Its interface changed with version 3, and both are understood. Neither was run with its own weights here.
    """
    module = needed("paddleocr", "ocr", "pip install 'thalweg[paddleocr]'")
    if hasattr(module.PaddleOCR, "predict"):
        off = ("use_doc_orientation_classify", "use_doc_unwarping", "use_textline_orientation")
        engine = module.PaddleOCR(lang="en", **dict.fromkeys(off, False))

        def predict(pixels_HWC: np.ndarray) -> Lines | None:
            found = engine.predict(np.ascontiguousarray(pixels_HWC[..., ::-1]))
            pages = [zip(page["rec_texts"], page["rec_scores"], strict=True) for page in found]
            return [line for page in pages for line in page]

        return predict
    engine = module.PaddleOCR(lang="en", use_angle_cls=False, show_log=False)

    def read(pixels_HWC: np.ndarray) -> Lines | None:
        (page,) = engine.ocr(np.ascontiguousarray(pixels_HWC[..., ::-1]), cls=False)
        return None if page is None else [(text, score) for _, (text, score) in page]

    return read
