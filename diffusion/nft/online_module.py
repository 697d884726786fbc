"""Online fine-tuning of text-to-image flow models: the LightningModule of all algorithms.

One ``training_step``, which is one Lightning epoch, is one epoch of the algorithm: draw images with the old
policy, have them rewarded, make the optimizer steps, let the old policy follow. So ``global_step`` counts
optimizer steps, and what happens every n epochs (evaluations, checkpoints) is said to the trainer as usual.

Shapes: M images of this process, N images of an epoch on all processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from thalweg.core_optim.build import Optimization, build
from thalweg.core_optim.config import OptimConfig
from thalweg.diffusion.nft import diagnostics
from thalweg.diffusion.nft.advantage import Std, group_advantage
from thalweg.diffusion.nft.collect import Artist, Progress, Samples, collect, spread
from thalweg.diffusion.nft.config import (
    EvaluationConfig,
    GRPOObjective,
    PipelineConfig,
    PolicyConfig,
    RolloutConfig,
)
from thalweg.diffusion.nft.data import EpochPlan, EvalBatch, PromptDataModule
from thalweg.diffusion.nft.decay import Decay
from thalweg.diffusion.nft.decay import decay as find_decay
from thalweg.diffusion.nft.evaluation import Evaluation
from thalweg.diffusion.nft.geometry import Geometry
from thalweg.diffusion.nft.policy import FullPolicy, LoraPolicy, Policy
from thalweg.diffusion.nft.sharding import shard
from thalweg.diffusion.nft.text_to_image import TextToImage
from thalweg.diffusion.nft.timesteps import TrainTimes
from thalweg.diffusion.nft.training import Loss, Terms, steps_of_epoch
from thalweg.diffusion.rewards.pool import RewardPool
from thalweg.diffusion.rewards.registry import open_rewards

RewardSpecs = dict[str, dict[str, Any]]
PREFIX = "policy."
"""Of the names of weights in checkpoints."""


class OnlineModule(L.LightningModule):
    """What all algorithms share; works with ``PromptDataModule``.

    Everything random depends on the seed and on numbers of epochs and images alone, so that a resumed run
    equals an uninterrupted one, and two processes compute what one does.

    Args:
        pipeline: What is fine-tuned.
        rewards: By name: ``weight`` (1 by default), ``reward`` where the name is another, and options; see
            :func:`thalweg.diffusion.rewards.registry.open_rewards`.
        optim: Optimizer and learning-rate schedule, by optimizer steps.
        policy: What is trained.
        rollout: How images are drawn.
        times: Which noise levels of rollouts are trained on.
        evaluation: How the policy is judged.
        held_out: Rewards that only evaluations look at, as ``rewards``.
        advantage_std: Advantages are divided by the deviation of all rewards of an epoch, or by the group's.
        decay: How slowly the old policy follows: hard_copy, linear_to_0_5, delayed_linear_to_0_999, the
            authors' number (0, 1, 2), or flat, rate and cap.
        max_grad_norm: Gradients are scaled down to this norm.
        reward_device: Of networks in rewards; ``auto`` is that of the policy.
        reward_timeout: Seconds to wait for the rewards of a batch; no limit if not given.
        reward_retries: Tries after the first where a reward fails.
        seed: Of noises, times and the start of adapters.
    """

    noise: GRPOObjective | None = None
    scene: TextToImage
    policy: Policy
    pool: RewardPool

    def __init__(
        self,
        pipeline: PipelineConfig,
        rewards: RewardSpecs,
        optim: OptimConfig,
        policy: PolicyConfig = PolicyConfig(),  # noqa: B008
        rollout: RolloutConfig = RolloutConfig(),  # noqa: B008
        times: TrainTimes = TrainTimes(),  # noqa: B008
        evaluation: EvaluationConfig = EvaluationConfig(),  # noqa: B008
        held_out: RewardSpecs | None = None,
        advantage_std: Std = "global",
        decay: str | int | Decay = "linear_to_0_5",
        max_grad_norm: float = 1.0,
        reward_device: str = "auto",
        reward_timeout: float | None = None,
        reward_retries: int = 2,
        seed: int = 42,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.strict_loading = True
        self.pipeline, self.policy_config, self.optim = pipeline, policy, optim
        self.rollout, self.times, self.evaluation = rollout, times, evaluation
        self.rewards, self.held_out = rewards, held_out or {}
        if both := sorted(set(self.rewards) & set(self.held_out)):
            raise ValueError(f"reward {both[0]!r} is trained on and held out; allowed: one of them")
        self.advantage_std: Std = advantage_std
        self.decay = find_decay(decay)
        if not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm is {max_grad_norm}, allowed: any positive number")
        self.max_grad_norm = max_grad_norm
        self.reward_device, self.reward_timeout = reward_device, reward_timeout
        self.reward_retries = reward_retries
        self.seed = seed
        self.progress: Progress | None = None
        self.found: Evaluation | None = None
        self._grad_norms: list[Tensor] = []

    # ---- what is there -------------------------------------------------------------------------------------

    @property
    def prompts(self) -> PromptDataModule:
        """The data module.

        Raises:
            ValueError: If it is another one.
        """
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, PromptDataModule):
            kind = f"{PromptDataModule.__module__}.PromptDataModule"
            raise ValueError(f"data is a {type(data).__name__}, needed: {kind}")
        return data

    @property
    def shape_of_epoch(self) -> Geometry:
        """Groups and batches."""
        return self.prompts.geometry(self.trainer.world_size)

    def configure_model(self) -> None:
        """Open the pipeline and make the policies; done once."""
        if hasattr(self, "networks"):
            return
        self.scene = TextToImage(self.pipeline)
        config = self.policy_config
        if config.kind == "lora":
            self.policy = LoraPolicy(self.scene.network, config.lora, seed=self.seed)
            if config.start_from:
                from thalweg.diffusion.nft.lora import read_lora

                spec, state = read_lora(config.start_from)
                self.policy.start_from_lora(spec, state, config.start_from)
        else:
            self.policy = FullPolicy(self.scene.network, reference=self.needs_reference)
        self.networks: nn.ModuleDict = self.policy.networks
        for how in (self.rollout, self.evaluation.rollout):
            self.scene.sampler(how)
            self.scene.latents(how)
        shard(self.policy, self.trainer.strategy, self.shape_of_epoch)

    @property
    def needs_reference(self) -> bool:
        """Whether the loss looks at the reference."""
        return True

    def configure_optimizers(self) -> Optimization:
        """Optimizer over the weights of the current policy."""
        return build(self.networks, self.optim, self.trainer.estimated_stepping_batches)

    def setup(self, stage: str) -> None:
        """Open the rewards: what is missing there is to be known before anything long begins."""
        self.prompts.geometry(self.trainer.world_size)
        self._specs = {**self.rewards, **{name: {**s, "weight": 0.0} for name, s in self.held_out.items()}}

    def _open(self) -> None:
        """Rewards and embeddings, once the device is known."""
        device = str(self.device) if self.reward_device == "auto" else self.reward_device
        everything = open_rewards(self._specs, device)
        trained = type(everything)(
            rewards={k: everything.rewards[k] for k in self.rewards},
            weights={k: everything.weights[k] for k in self.rewards},
        )
        self.pool = RewardPool(trained, retries=self.reward_retries)
        self.eval_pool = RewardPool(everything, retries=self.reward_retries)
        self.scene.vae.to(self.device)
        if self.pipeline.encode_all:
            self.scene.encode(self._texts(self.prompts.texts()), self.device)
            self.scene.free_encoders()

    def _texts(self, prompts: Sequence[str]) -> list[str]:
        """Prompts, and the empty one where guidance needs it."""
        guided = any(r.guidance != 1.0 for r in (self.rollout, self.evaluation.rollout))
        return [*prompts, *([""] if guided else [])]

    def on_fit_start(self) -> None:
        """Open rewards and embeddings."""
        self._open()

    def on_validation_start(self) -> None:
        """The same where nothing is trained."""
        if not hasattr(self, "pool"):
            self._open()

    def teardown(self, stage: str) -> None:
        """Stop the threads of rewards."""
        for name in ("pool", "eval_pool"):
            if hasattr(self, name):
                getattr(self, name).close()
                delattr(self, name)

    # ---- an epoch ------------------------------------------------------------------------------------------

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
        diagnostics.warn_if_constant(rewards)
        named = {f"train/{k}": torch.as_tensor(v, dtype=torch.float32) for k, v in metrics.items()}
        self.log_dict(named, batch_size=1, on_step=False, on_epoch=True)

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

    # ---- evaluation ----------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Start a table of results."""
        self.found = Evaluation(self.prompts.num_evaluated, self.evaluation.grid)

    def validation_step(self, batch: EvalBatch, batch_idx: int) -> None:
        """Draw and judge images of the average, with the same noise in every evaluation."""
        assert self.found is not None
        config = self.evaluation
        if self.progress:
            self.progress("evaluate", batch_idx, self.trainer.num_val_batches[0])
        self.scene.encode(self._texts(batch["prompts"]), self.device)
        artist = Artist(scene=self.scene, policy=self.policy, rollout=config.rollout, seed=config.seed)
        _, images, _ = artist.draw(
            batch["prompts"], batch["numbers"], epoch=0, who=config.who, device=self.device
        )
        self.found.add(batch, images, self.eval_pool.submit(images, batch["prompts"], batch["metadata"]))

    def on_validation_epoch_end(self) -> None:
        """Log the means over all prompts."""
        assert self.found is not None
        means = self.found.means(self._sum, self.reward_timeout)
        self.log_dict({f"val/{name}": value for name, value in means.items()}, rank_zero_only=False)

    # ---- checkpoints ---------------------------------------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Weights of the policies that move; what is frozen comes from the pipeline."""
        return {f"{PREFIX}{name}": value for name, value in self.policy.state_dict().items()}

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Continue with such weights.

        Raises:
            ValueError: If they do not fit.
        """
        self.policy.load_state_dict({name.removeprefix(PREFIX): v for name, v in state_dict.items()})
        return nn.modules.module._IncompatibleKeys([], [])

    # ---- what algorithms differ in -------------------------------------------------------------------------

    def losses(self, terms: Terms, positions: Sequence[int], artist: Artist) -> Iterator[Loss]:
        """Losses of an optimizer step, in micro-batches."""
        raise NotImplementedError

    def losses_of_image(self, artist: Artist) -> int:
        """How many losses each image is part of."""
        return self.times.of(len(artist.sampler().levels))

    def weights_of(self, advantage: Tensor) -> Tensor | None:
        """Probabilities r that images are optimal (N,), where there are any."""
        return None
