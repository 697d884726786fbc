"""DiffusionNFT and its siblings as LightningModules; all but their losses is :class:`OnlineModule`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from thalweg.diffusion.nft.advantage import optimality
from thalweg.diffusion.nft.collect import Artist, noisy_steps
from thalweg.diffusion.nft.config import AWMObjective, GRPOObjective, NFTObjective
from thalweg.diffusion.nft.decay import Decay
from thalweg.diffusion.nft.online import OnlineModule
from thalweg.diffusion.nft.training import Loss, Objective, Terms, forward_losses, grpo_losses


class ForwardModule(OnlineModule):
    """Algorithms that train on the forward process: on noised images, with any solver in rollouts."""

    objective: Objective

    @property
    def needs_reference(self) -> bool:
        """Whether the loss looks at the reference."""
        return self.objective.kl_weight > 0

    def losses(self, terms: Terms, positions: Sequence[int], artist: Artist) -> Iterator[Loss]:
        """Losses of an optimizer step, in micro-batches."""
        return forward_losses(
            terms,
            positions,
            self.objective,
            artist.sampler().levels,
            self.times,
            old_is_current=self.policy.old_is_current(),
        )


class NFTModule(ForwardModule):
    """DiffusionNFT (Zheng et al. 2025, arXiv 2509.16117).

    Args:
        objective: The loss.
        kwargs: See :class:`~thalweg.diffusion.nft.online.OnlineModule`.
    """

    objective: NFTObjective

    def __init__(self, objective: NFTObjective = NFTObjective(), **kwargs: Any) -> None:  # noqa: B008
        super().__init__(**kwargs)
        self.objective = objective

    def weights_of(self, advantage: Tensor) -> Tensor:
        """Probabilities r that images are optimal, (N,)."""
        objective = self.objective
        return optimality(advantage, adv_clip_max=objective.adv_clip_max, adv_mode=objective.adv_mode)


class AWMModule(ForwardModule):
    """Advantage Weighted Matching (Xue et al. 2025, arXiv 2509.25050).

    Args:
        objective: The loss.
        kwargs: See :class:`~thalweg.diffusion.nft.online.OnlineModule`.
    """

    def __init__(self, objective: AWMObjective = AWMObjective(), **kwargs: Any) -> None:  # noqa: B008
        super().__init__(**kwargs)
        self.objective = objective


class FlowGRPOModule(OnlineModule):
    """Flow-GRPO (Liu et al. 2025, arXiv 2505.05470): rollouts with noise, clipped policy gradients.

    The solver of ``rollout`` only tells the noise levels. Every step with noise is trained on; ``times`` is
    not used.

    Args:
        objective: The loss, and the noise of rollouts.
        decay: See OnlineModule; the policy that samples is the trained one by default.
        kwargs: See :class:`~thalweg.diffusion.nft.online.OnlineModule`.
    """

    def __init__(
        self,
        objective: GRPOObjective = GRPOObjective(),  # noqa: B008
        decay: str | int | Decay = "hard_copy",
        **kwargs: Any,
    ) -> None:
        super().__init__(decay=decay, **kwargs)
        self.objective = self.noise = objective

    @property
    def needs_reference(self) -> bool:
        """Whether the loss looks at the reference."""
        return self.objective.kl_weight > 0

    def losses(self, terms: Terms, positions: Sequence[int], artist: Artist) -> Iterator[Loss]:
        """Losses of an optimizer step, in micro-batches."""
        return grpo_losses(terms, positions, self.objective)

    def losses_of_image(self, artist: Artist) -> int:
        """Steps with noise."""
        return len(noisy_steps(self.objective, len(artist.sigmas()) - 1))
