"""Online fine-tuning of text-to-image flow models: the LightningModule of all algorithms.

One ``training_step``, which is one Lightning epoch, is one epoch of the algorithm: draw images with the old
policy, have them rewarded, make the optimizer steps, let the old policy follow. So ``global_step`` counts
optimizer steps, and what happens every n epochs (evaluations, checkpoints) is said to the trainer as usual.

Shapes: M images of this process, N images of an epoch on all processes.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from thalweg.diffusion.nft import diagnostics
from thalweg.diffusion.nft.advantage import group_advantage
from thalweg.diffusion.nft.collect import Artist, Samples, collect, spread
from thalweg.diffusion.nft.data import EpochPlan
from thalweg.diffusion.nft.geometry import Geometry
from thalweg.diffusion.nft.policies.module import PolicyModule
from thalweg.diffusion.nft.training import Loss, Terms, steps_of_epoch


class OnlineModule(PolicyModule):
    """Training as all algorithms do it; they differ in their losses."""

    def training_step(self, batch: EpochPlan, batch_idx: int) -> None:
        """Draw, reward, train, follow."""
        clock = diagnostics.Clock()
        shape = self.shape_of_epoch
        self.scene.encode(self._texts(batch["prompts"]), self.device)
        artist = Artist(
            scene=self.scene, policy=self.policy, rollout=self.rollout, seed=self.seed, noise=self.noise
        )
        samples = collect(
            artist,
            self.pool,
            batch,
            batch_size=self.rollout.batch_size or shape.batch,
            device=self.device,
            timeout=self.reward_timeout,
            progress=self.progress,
        )
        clock.lap("rollout")
        rewards, parts, groups = self._share(samples, shape.images)
        advantage = group_advantage(rewards, groups, std=self.advantage_std)
        own = advantage[torch.tensor(batch["numbers"])].to(self.device)
        metrics = self._train(samples, own, shape, artist)
        clock.lap("train")
        eta = self.decay(self.global_step)
        self.policy.follow("old", eta)
        metrics |= diagnostics.of_rewards(rewards, groups, parts)
        metrics |= diagnostics.of_weights(self.weights_of(advantage))
        metrics |= {"decay": eta, "images": float((batch["epoch"] + 1) * shape.images), **clock.seconds()}
        metrics |= self._start if self.trainer.num_sanity_val_steps == float("inf") else {}
        self._start = {}
        diagnostics.warn_if_constant(rewards)
        named = {k if k.startswith("start/") else f"train/{k}": float(v) for k, v in metrics.items()}
        self.log_dict(named, batch_size=1, on_step=False, on_epoch=True, sync_dist=True)

    def _share(self, samples: Samples, total: int) -> tuple[Tensor, dict[str, Tensor], list[int]]:
        """Rewards, their parts and the groups of all images of the epoch, in the order of their numbers."""
        names = sorted(samples.rewards.parts)
        groups = torch.tensor(samples.plan["groups"])
        values = [samples.rewards.scores, groups, *(samples.rewards.parts[name] for name in names)]
        table = self._sum(spread(values, samples.plan["numbers"], total))
        return table[0], dict(zip(names, table[2:], strict=True)), table[1].long().tolist()

    def _sum(self, table: Tensor) -> Tensor:
        """Sum over processes, on the CPU."""
        if self.trainer.world_size == 1:
            return table
        on_device: Tensor = self.trainer.strategy.reduce(table.to(self.device), reduce_op="sum")
        return on_device.cpu()

    def _train(
        self, samples: Samples, advantage: Tensor, shape: Geometry, artist: Artist
    ) -> dict[str, float | Tensor]:
        """The optimizer steps of an epoch; means of their metrics over images of all processes."""
        optimizer: Any = self.optimizers()
        schedule: Any = self.lr_schedulers()
        terms = Terms(
            policy=self.policy,
            samples=samples,
            advantage=advantage,
            condition=lambda prompts: self.scene.condition(prompts, self.device),
            batch=shape.batch,
            seed=self.seed,
        )
        steps = steps_of_epoch(samples.plan["numbers"], shape, seed=self.seed, epoch=samples.plan["epoch"])
        means = diagnostics.Means()
        self._grad_norms = []
        for positions in steps:
            count = self.losses_of_image(artist)
            todo = -(-len(positions) // shape.batch) * count
            optimizer.zero_grad()
            for done, (loss, metrics) in enumerate(self.losses(terms, positions, artist)):
                if self.progress and done % count == 0:
                    self.progress("train", done, todo)
                with self._synchronised(done + 1 == todo):
                    self.manual_backward(loss / (shape.accumulation * count))
                means.add(metrics)
            optimizer.step()
            schedule.step()
            self.policy.follow_ema(self.global_step, self.policy_config.ema_cap)
        found = means.result(self._sum)
        return found | {"grad_norm": torch.stack(self._grad_norms).mean(), "lr": schedule.get_last_lr()[0]}

    def _synchronised(self, last: bool) -> Any:
        """Gradients are averaged over processes once per optimizer step, with the last backward pass."""
        blocker = getattr(self.trainer.strategy, "block_backward_sync", None)
        return nullcontext() if last or blocker is None else blocker()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip gradients, which a loss scaler has unscaled by now.

        Raises:
            ValueError: If they are not finite, and no scaler would leave the step out.
        """
        norm = nn.utils.clip_grad_norm_(list(self.policy.trainable().values()), self.max_grad_norm)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        if getattr(self.trainer.precision_plugin, "scaler", None) is None and not torch.isfinite(norm):
            raise ValueError(
                f"the gradient's norm is {norm.item()} at step {self.global_step}: lower the learning rate"
            )
        self._grad_norms.append(norm.detach())

    @abstractmethod
    def losses(self, terms: Terms, positions: Sequence[int], artist: Artist) -> Iterator[Loss]:
        """Losses of an optimizer step, in micro-batches."""

    def losses_of_image(self, artist: Artist) -> int:
        """How many losses each image is part of."""
        return self.times.of(len(artist.sampler().levels))

    def weights_of(self, advantage: Tensor) -> Tensor | None:
        """Probabilities r that images are optimal (N,), where there are any."""
        return None
