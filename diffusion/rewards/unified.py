"""UnifiedReward (Wang et al. 2025): a vision-language model behind an OpenAI-compatible server gives 1 to 5.

Shapes: B images, C = 3 channels, H x W pixels.
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from thalweg.diffusion.rewards.base import Metadata, RewardError, RewardResult, as_bytes
from thalweg.diffusion.rewards.http import WAIT, request_json
from thalweg.diffusion.rewards.weights import needed

FINAL = re.compile(r"Final Score:\s*([1-5](?:\.\d+)?)")
"""Where an answer has its score: a digit from 1 to 5, with or without decimals; "10" reads 1."""
BEST = 5.0
"""Highest score."""
SIDE = 512
"""Pixels per side of the pictures that are sent."""
INSTRUCTION = (
    "The picture was made by a text-to-image model from this caption: {prompt}\n"
    "Judge how well the picture shows every object, attribute and relation of the caption, and how good it "
    "looks: composition, detail, absence of artefacts. Explain your judgement in a few sentences. Then write "
    "'Final Score: ' and a number from 1 (bad) to 5 (excellent), with up to two decimals."
)
"""Our own words for the published instruction; give that one as ``instruction`` to compare with tables."""


def parse_score(text: str) -> float:
    """Score that an answer names, 0 if it names none."""
    found = FINAL.search(text)
    return float(found.group(1)) if found else 0.0


def question(pixels_HWC: np.ndarray, prompt: str, instruction: str, model: str) -> bytes:
    """Body of a request for a chat completion, with the picture as a PNG file."""
    image = needed("PIL.Image", "unifiedreward", "pip install pillow")
    picture = image.fromarray(pixels_HWC)
    if picture.size != (SIDE, SIDE):
        picture = picture.resize((SIDE, SIDE), image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": instruction.replace("{prompt}", prompt)},
    ]
    messages = [{"role": "user", "content": content}]
    return json.dumps({"model": model, "messages": messages, "temperature": 0}).encode()


@dataclass(frozen=True, kw_only=True)
class UnifiedReward:
    """Asks a server about every image; the part ``answered`` is 1 where an answer names a score."""

    url: str
    """Of the server's API, such as http://127.0.0.1:17140/v1."""
    model: str
    """Name of the model there."""
    key: str
    """Sent as a bearer token."""
    instruction: str
    """With ``{prompt}`` where the prompt goes."""
    missing: Literal["zero", "raise"]
    """What an answer without a score leads to."""
    threads: int
    """Requests at once."""
    timeout: float
    """Seconds that one may take."""
    retries: int
    """Tries after the first."""
    wait: float
    """Seconds before the second try."""
    name: str = "unifiedreward"
    """In logs."""

    def __call__(
        self, images_BCHW: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> RewardResult:
        """Scores of images by their prompts, 0 to 1."""
        with ThreadPoolExecutor(self.threads) as pool:
            scores = list(pool.map(self._ask, as_bytes(images_BCHW), prompts))
        values = torch.tensor(scores, dtype=torch.float64)
        return RewardResult(scores=values / BEST, parts={"answered": (values > 0).double()})

    def _ask(self, pixels_HWC: np.ndarray, prompt: str) -> float:
        answer = request_json(
            f"{self.url.rstrip('/')}/chat/completions",
            question(pixels_HWC, prompt, self.instruction, self.model),
            headers={"Content-Type": "application/json", "Authorization": f"Bearer {self.key}"},
            timeout=self.timeout,
            retries=self.retries,
            wait=self.wait,
        )
        try:
            text = str(answer["choices"][0]["message"]["content"])
        except (KeyError, IndexError, TypeError):
            raise RewardError(f"{self.url} answered with no chat completion: {str(answer)[:200]}") from None
        score = parse_score(text)
        if not score and self.missing == "raise":
            raise RewardError(f"the answer about {prompt!r} names no 'Final Score: 1 to 5': {text[-200:]!r}")
        return score


def unifiedreward(
    device: str = "cpu",
    *,
    url: str | None = None,
    model: str = "UnifiedReward-7b-v1.5",
    key: str = "none",
    instruction: str = INSTRUCTION,
    missing: Literal["zero", "raise"] = "zero",
    threads: int = 8,
    timeout: float = 120.0,
    retries: int = 3,
    wait: float = WAIT,
) -> UnifiedReward:
    """Judgement of a vision-language model, 0 to 1.

    Weights: https://huggingface.co/CodeGoat24/UnifiedReward-7b-v1.5, served by sglang or vLLM. Licence: MIT,
    as the card of the 7b model states.

    Args:
        device: Not used, the server has its own.
        url: Of the server's API, such as http://127.0.0.1:17140/v1.
        model: Name of the model there.
        key: Sent as a bearer token.
        instruction: With ``{prompt}`` where the prompt goes.
        missing: An answer without a score counts ``zero``, as in the published code, or is an error
            (``raise``).
        threads: Requests at once.
        timeout: Seconds that one may take.
        retries: Tries after the first.
        wait: Seconds before the second try.

    Raises:
        RewardError: If there is no url, or for another ``missing``.
    """
    if url is None:
        raise RewardError(
            "reward 'unifiedreward' needs 'url', the API of an OpenAI-compatible server of "
            "https://huggingface.co/CodeGoat24/UnifiedReward-7b-v1.5, such as http://127.0.0.1:17140/v1"
        )
    if missing not in ("zero", "raise"):
        raise RewardError(f"missing {missing!r}, allowed: zero, raise")
    return UnifiedReward(
        url=url,
        model=model,
        key=key,
        instruction=instruction,
        missing=missing,
        threads=threads,
        timeout=timeout,
        retries=retries,
        wait=wait,
    )
