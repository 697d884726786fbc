"""A reward on a server of :mod:`thalweg.diffusion.rewards.server`.

Shapes: B images, C = 3 channels, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from thalweg.diffusion.rewards.base import Metadata, RewardError, RewardResult
from thalweg.diffusion.rewards.http import WAIT, request_json
from thalweg.diffusion.rewards.wire import from_json, pack


@dataclass(frozen=True, kw_only=True)
class RemoteReward:
    """Sends images as bytes, in requests of at most ``batch``, one after the other."""

    url: str
    """Of the server."""
    name: str
    """Of the reward there."""
    batch: int = 64
    """Images of a request."""
    timeout: float = 120.0
    """Seconds that the server may be silent."""
    retries: int = 3
    """Tries after the first."""
    wait: float = WAIT
    """Seconds before the second try."""

    def __call__(
        self, images_BCHW: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> RewardResult:
        """Scores that the server gives.

        Raises:
            RewardError: If it gives none.
        """
        results = []
        for start in range(0, len(prompts), self.batch):
            rows = slice(start, start + self.batch)
            results.append(self._ask(images_BCHW[rows], prompts[rows], metadata[rows]))
        parts = {name: torch.cat([r.parts[name] for r in results]) for name in results[0].parts}
        return RewardResult(scores=torch.cat([r.scores for r in results]), parts=parts)

    def _ask(self, images_BCHW: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> RewardResult:
        answer = request_json(
            f"{self.url.rstrip('/')}/score/{self.name}",
            pack(images_BCHW, prompts, metadata),
            headers={"Content-Type": "application/octet-stream"},
            timeout=self.timeout,
            retries=self.retries,
            wait=self.wait,
        )
        return from_json(answer)


def remote(
    device: str = "cpu",
    *,
    url: str | None = None,
    name: str = "",
    batch: int = 64,
    timeout: float = 120.0,
    retries: int = 3,
    wait: float = WAIT,
) -> RemoteReward:
    """A reward on a server; that it is there and knows the reward is asked at once.

    Args:
        device: Not used, the server has its own.
        url: Of the server, such as http://127.0.0.1:18085.
        name: Of the reward there.
        batch: Images of a request.
        timeout: Seconds that the server may be silent.
        retries: Tries after the first.
        wait: Seconds before the second try, twice as long before each further one.

    Raises:
        RewardError: If there is no url, nobody answers, or the reward is not there.
    """
    if url is None:
        raise RewardError("reward 'remote' needs 'url', that of a server, such as http://127.0.0.1:18085")
    if batch < 1:
        raise RewardError(f"batch {batch}, allowed: at least 1")
    found = request_json(f"{url.rstrip('/')}/health", timeout=timeout, retries=retries, wait=wait)
    known = found.get("rewards") if isinstance(found, dict) else None
    if not isinstance(known, list) or name not in known:
        raise RewardError(f"no reward {name!r} at {url}, there are: {known}")
    return RemoteReward(url=url, name=name, batch=batch, timeout=timeout, retries=retries, wait=wait)
