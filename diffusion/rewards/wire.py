"""What a reward server and its clients send: an npz file one way, JSON the other; nothing is pickled.

Shapes: B images, C = 3 channels, H x W pixels.
"""

from __future__ import annotations

import io
import json
import math
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from thalweg.diffusion.rewards.base import Metadata, RewardError, RewardResult, as_bytes

ENTRIES = {"images", "prompts"}
"""Arrays of a request: bytes (B, H, W, C), and JSON as bytes of UTF-8."""
LIMIT = 2**30
"""Bytes of a request at most, also when it is unpacked."""


def pack(images_BCHW: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> bytes:
    """Request for the scores of images, which are sent as bytes."""
    text = json.dumps({"prompts": list(prompts), "metadata": [dict(m) for m in metadata]})
    buffer = io.BytesIO()
    words = np.frombuffer(text.encode(), dtype=np.uint8)
    np.savez_compressed(buffer, images=as_bytes(images_BCHW), prompts=words)
    return buffer.getvalue()


def unpack(body: bytes, limit: int = LIMIT) -> tuple[Tensor, list[str], list[dict[str, Any]]]:
    """Images (B, C, H, W) from 0 to 1, prompts and metadata of a request.

    Raises:
        RewardError: If it is none, or would need more memory than the limit.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(body)) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > limit:
            raise RewardError(f"the request unpacks to {size} bytes, allowed: {limit}")
        with np.load(io.BytesIO(body), allow_pickle=False) as arrays:
            if set(arrays.files) != ENTRIES:
                raise RewardError(f"the request has {sorted(arrays.files)}, needed: {sorted(ENTRIES)}")
            pixels, text = arrays["images"], json.loads(arrays["prompts"].tobytes())
        prompts, metadata = text["prompts"], text["metadata"]
    except (zipfile.BadZipFile, OSError, ValueError, KeyError, TypeError, EOFError) as error:
        if isinstance(error, RewardError):
            raise
        raise RewardError(f"the request is no npz file of images and prompts: {error}") from None
    if pixels.ndim != 4 or pixels.shape[3] != 3 or pixels.dtype != np.uint8:
        raise RewardError(f"images {pixels.shape} of {pixels.dtype}, needed: (B, H, W, 3) of uint8")
    if not (isinstance(prompts, list) and all(isinstance(prompt, str) for prompt in prompts)):
        raise RewardError("prompts are no list of texts")
    if not (isinstance(metadata, list) and all(isinstance(entry, dict) for entry in metadata)):
        raise RewardError("metadata is no list of objects")
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255, prompts, metadata


def to_json(result: RewardResult) -> dict[str, Any]:
    """Answer to a request; NaN, which JSON does not have, becomes null."""
    parts = {name: _nulls(part) for name, part in result.parts.items()}
    return {"scores": result.scores.tolist(), "parts": parts}


def from_json(answer: Any) -> RewardResult:
    """Result of an answer.

    Raises:
        RewardError: If it is none.
    """
    try:
        parts: Mapping[str, Any] = answer["parts"]
        return RewardResult(
            scores=torch.tensor(answer["scores"], dtype=torch.float64),
            parts={name: torch.tensor(_nans(part), dtype=torch.float64) for name, part in parts.items()},
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RewardError(f"the server's answer is no result: {error!r}") from None


def _nulls(values: Tensor) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values.tolist()]


def _nans(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]
