"""Policies of a text-to-image model, their rewards, evaluations and checkpoints: a LightningModule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn

from thalweg.checkpoints.lightning_ckpt import POLICIES_KEY
from thalweg.core_optim.build import Optimization, build
from thalweg.core_optim.config import OptimConfig
from thalweg.diffusion.nft.advantage import Std
from thalweg.diffusion.nft.collect import Artist, Progress
from thalweg.diffusion.nft.config import (
    EvaluationConfig,
    GRPOObjective,
    PipelineConfig,
    PolicyConfig,
    RolloutConfig,
)
from thalweg.diffusion.nft.data import EvalBatch, PromptDataModule
from thalweg.diffusion.nft.decay import Decay
from thalweg.diffusion.nft.decay import decay as find_decay
from thalweg.diffusion.nft.evaluation import Evaluation
from thalweg.diffusion.nft.geometry import Geometry
from thalweg.diffusion.nft.policy import FullPolicy, LoraPolicy, Policy
from thalweg.diffusion.nft.sharding import shard
from thalweg.diffusion.nft.text_to_image import TextToImage
from thalweg.diffusion.nft.timesteps import TrainTimes
from thalweg.diffusion.rewards.pool import RewardPool
from thalweg.diffusion.rewards.registry import WeightedSum, open_rewards

RewardSpecs = dict[str, dict[str, Any]]
PREFIX = "policy."
"""Of the names of weights in checkpoints."""


class PolicyModule(L.LightningModule):
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
        self.sharded = False
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
        self.judged: dict[str, float] = {}
        self._start: dict[str, float | Tensor] = {}
        self._grad_norms: list[Tensor] = []

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
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            mesh = self.trainer.strategy.device_mesh["data_parallel"]
            shard(self.policy, mesh, self.shape_of_epoch)
            self.sharded, self.strict_loading = True, False

    @property
    def needs_reference(self) -> bool:
        """Whether the loss looks at the reference."""
        return True

    def configure_optimizers(self) -> Optimization:
        """Optimizer over the weights of the current policy."""
        return build(self.networks, self.optim, self.trainer.estimated_stepping_batches)

    def setup(self, stage: str) -> None:
        """Check the shape of epochs and open the rewards, before anything long begins.

        Raises:
            ValueError: If processes and groups do not fit, or a reward lacks its weights.
        """
        self.prompts.geometry(self.trainer.world_size)
        if hasattr(self, "pool"):
            return
        unweighted = {name: {**spec, "weight": 0.0} for name, spec in self.held_out.items()}
        device = self.reward_device
        device = str(self.trainer.strategy.root_device) if device == "auto" else device
        both = open_rewards({**self.rewards, **unweighted}, device)
        trained = {name: both.rewards[name] for name in self.rewards}
        weights = {name: both.weights[name] for name in self.rewards}
        self.pool = RewardPool(WeightedSum(rewards=trained, weights=weights), retries=self.reward_retries)
        self.eval_pool = RewardPool(both, retries=self.reward_retries)

    def _place(self) -> None:
        """Put the parts that nothing is learnt in on the device; processes share the work of encoding."""
        self.scene.vae.to(self.device)
        if self.pipeline.encode_all and self.scene.has_encoders:
            texts = self._texts(self.prompts.texts())
            self.scene.encode(texts[self.global_rank :: self.trainer.world_size], self.device)
            self.trainer.strategy.barrier()
            self.scene.free_encoders()

    def _texts(self, prompts: Sequence[str]) -> list[str]:
        """Prompts, and the empty one where guidance needs it."""
        guided = any(r.guidance != 1.0 for r in (self.rollout, self.evaluation.rollout))
        return [*prompts, *([""] if guided else [])]

    def on_fit_start(self) -> None:
        """Place what is frozen."""
        self._place()

    def on_validation_start(self) -> None:
        """The same where nothing is trained."""
        self._place()

    def teardown(self, stage: str) -> None:
        """Stop the threads of rewards."""
        for name in ("pool", "eval_pool"):
            if hasattr(self, name):
                getattr(self, name).close()
                delattr(self, name)

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
        """Log the means over all prompts; with ``num_sanity_val_steps: -1`` those of the start as well."""
        assert self.found is not None
        self.judged = self.found.means(self._sum, self.reward_timeout)
        if self.trainer.sanity_checking:
            self._start = {f"start/{name}": value for name, value in self.judged.items()}
        else:
            self.log_dict({f"val/{k}": value for k, value in self.judged.items()}, sync_dist=True)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Weights of the policies that move; what is frozen comes from the pipeline.

        Nothing where weights are split over processes: names would have to be those of parameters then, so
        the whole weights are put into checkpoints by ``on_save_checkpoint``.
        """
        return {} if self.sharded else self._named_state()

    def _named_state(self) -> dict[str, Tensor]:
        return {f"{PREFIX}{name}": value for name, value in self.policy.state_dict().items()}

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Continue with such weights.

        Raises:
            ValueError: If they do not fit.
        """
        if state_dict:
            self.policy.load_state_dict({name.removeprefix(PREFIX): v for name, v in state_dict.items()})
        return nn.modules.module._IncompatibleKeys([], [])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add weights that are split over processes, put together."""
        if self.sharded:
            checkpoint[POLICIES_KEY] = self._named_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Continue with weights of a run that was or is split over processes."""
        if self.sharded:
            state = checkpoint.get(POLICIES_KEY) or checkpoint.get("state_dict", {})
            checkpoint["state_dict"] = {}
            self.load_state_dict(state)
        elif POLICIES_KEY in checkpoint:
            checkpoint["state_dict"] = checkpoint[POLICIES_KEY]
