"""Settings of online fine-tuning, as configuration files give them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from thalweg.diffusion.nft.advantage import AdvMode
from thalweg.diffusion.nft.lora import LoraSpec
from thalweg.diffusion.nft.loss import Weighting
from thalweg.diffusion.nft.policy_gradient import Matching
from thalweg.diffusion.nft.samplers import FINAL_FIRST_ORDER, Deterministic, OdeSolver
from thalweg.diffusion.nft.stochastic import Stochastic

DType = Literal["float32", "bfloat16", "float16"]


def require(condition: bool, name: str, value: object, allowed: str) -> None:
    """Refuse a setting.

    Raises:
        ValueError: If the condition does not hold.
    """
    if not condition:
        raise ValueError(f"{name} is {value!r}, allowed: {allowed}")


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """The pipeline that is fine-tuned, and how it is kept in memory."""

    model: str
    """Folder of a diffusers pipeline like Stable Diffusion 3, ``shipped/NAME``, or its name on the Hub."""
    revision: str | None = None
    """Of a repository on the Hub."""
    dtype: DType = "float32"
    """Frozen weights of the transformer; full fine-tuning needs float32. Adapters always are float32."""
    text_dtype: DType = "float32"
    """Text encoders; the authors take float16."""
    vae_dtype: DType = "float32"
    """Autoencoder."""
    max_sequence_length: int | None = None
    """Tokens of T5; what the pipeline was trained with where its folder says so, and else 128."""
    cache: str = "runs/prompts"
    """Folder with embeddings of prompts, which may be shared by runs of any pipelines."""
    encode_all: bool = False
    """Encode all prompts before training, and free the text encoders; otherwise prompts are encoded when they
    are first used. 1.7 MB of disk for each prompt of SD3.5."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """Compile the repeated blocks of the transformer with torch.compile."""

    def __post_init__(self) -> None:
        """Check the settings."""
        for name in ("dtype", "text_dtype", "vae_dtype"):
            value = getattr(self, name)
            require(value in get_args(DType), name, value, ", ".join(get_args(DType)))
        length = self.max_sequence_length
        require(length is None or 0 <= length <= 512, "max_sequence_length", length, "0 to 512")


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """What is trained."""

    kind: Literal["lora", "full"] = "lora"
    """Adapters of a frozen transformer, or all of its weights."""
    lora: LoraSpec = field(default_factory=LoraSpec)
    """Adapters."""
    start_from: str | None = None
    """Folder of a LoRA (diffusers or PEFT) that all policies start from; the reference stays without it."""
    ema_cap: float = 0.9
    """Largest decay of the average that evaluation and exports use."""

    def __post_init__(self) -> None:
        """Check the settings."""
        require(self.kind in ("lora", "full"), "kind", self.kind, "lora, full")
        require(0 <= self.ema_cap < 1, "ema_cap", self.ema_cap, "0 to below 1")
        if self.kind == "full" and self.start_from:
            raise ValueError("start_from names a LoRA; allowed with kind 'lora' only")


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How images are drawn."""

    solver: str = "dpm2"
    """dpm1, dpm2 or Euler (flow, ddim, dance), on FlowMatchEuler's grid; or the folder of a
    SearchedScheduler, or the JSON file of a schedule of the suite."""
    steps: int | None = 10
    """Network evaluations of an image; of a SearchedScheduler with one schedule it may be left out."""
    shift: float | None = None
    """Of the grid; that of the pipeline's scheduler if not given."""
    final_first_order_steps: int = FINAL_FIRST_ORDER
    """Steps of first order at the end of dpm2."""
    legacy_dpm2: bool = False
    """Only the last step is of first order, as in the authors' program."""
    whole_timesteps: bool = False
    """Tell the network truncated timesteps, as the authors' program does."""
    guidance: float = 1.0
    """Of classifier-free guidance, 1 for none. Training is always without."""
    height: int | None = None
    """Pixels; those of the pipeline if not given."""
    width: int | None = None
    """As height."""
    batch_size: int | None = None
    """Images drawn at once; the micro-batch of training if not given. Results do not depend on it."""
    slice_size: int = 8
    """Images decoded at once."""

    def __post_init__(self) -> None:
        """Check the settings."""
        for name in ("steps", "batch_size"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "1 and more")
        require(self.slice_size >= 1, "slice_size", self.slice_size, "1 and more")
        require(self.guidance >= 0, "guidance", self.guidance, "0 and more; 1 for none")
        if self.solver in get_args(Deterministic):
            self.ode()

    def source(self) -> OdeSolver | str:
        """The solver, or the file or folder that it is in."""
        return self.ode() if self.solver in get_args(Deterministic) else self.solver

    def ode(self) -> OdeSolver:
        """The solver, where it is one by name."""
        return OdeSolver(
            name=self.solver,  # type: ignore[arg-type]
            final_first_order_steps=1 if self.legacy_dpm2 else self.final_first_order_steps,
            legacy_dpm2=self.legacy_dpm2,
            whole_timesteps=self.whole_timesteps,
        )


def _euler() -> RolloutConfig:
    return RolloutConfig(solver="flow", steps=40)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How a policy is judged while it is trained."""

    who: Literal["ema", "current"] = "ema"
    """The average, or the weights themselves."""
    rollout: RolloutConfig = field(default_factory=_euler)
    """How images are drawn: 40 steps of Euler's method in the paper."""
    batch_size: int = 16
    """Images drawn at once on a process."""
    grid: int = 16
    """Images in the picture of each evaluation, 0 for none."""
    seed: int = 0
    """Of noises, the same in each evaluation."""

    def __post_init__(self) -> None:
        """Check the settings."""
        require(self.who in ("ema", "current"), "who", self.who, "ema, current")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "1 and more")
        require(self.grid >= 0, "grid", self.grid, "0 and more")


@dataclass(frozen=True, kw_only=True)
class NFTObjective:
    """DiffusionNFT; see :func:`thalweg.diffusion.nft.nft_loss`."""

    beta: float = 1.0
    """Strength of the guidance is 1 / beta."""
    kl_weight: float = 1e-4
    """Weight of the distance to the reference, whose forward pass is left out at 0."""
    adv_clip_max: float = 5.0
    """Where advantages are clipped."""
    adv_mode: AdvMode = "all"
    """What is left of advantages."""
    weighting: Weighting = "adaptive_x0"
    """Which errors are compared."""
    negative: bool = True
    """Fit the policy that is led away from bad samples as well; only comparisons go without."""

    def __post_init__(self) -> None:
        """Check the settings."""
        require(self.beta > 0, "beta", self.beta, "any positive number")
        require(self.adv_mode in get_args(AdvMode), "adv_mode", self.adv_mode, ", ".join(get_args(AdvMode)))
        known = get_args(Weighting)
        require(self.weighting in known, "weighting", self.weighting, ", ".join(known))
        _check_weights(self.kl_weight, self.adv_clip_max)


@dataclass(frozen=True, kw_only=True)
class AWMObjective:
    """Advantage Weighted Matching; see :func:`thalweg.diffusion.nft.policy_gradient.awm_loss`."""

    kl_weight: float = 1e-3
    """Weight of the distance to the reference."""
    old_weight: float = 0.0
    """Weight of the distance to the policy that samples."""
    adv_clip_max: float = 1.0
    """Where advantages are clipped."""
    clip_range: float | None = None
    """Largest distance of ratios from 1; none are formed without it."""
    weighting: Matching = "huber"
    """Weight of matching losses over time."""
    power: float = 0.25
    """Power of huber."""

    def __post_init__(self) -> None:
        """Check the settings."""
        known = get_args(Matching)
        require(self.weighting in known, "weighting", self.weighting, ", ".join(known))
        require(0 < self.power <= 1, "power", self.power, "above 0 to 1")
        require(self.old_weight >= 0, "old_weight", self.old_weight, "0 and more")
        _check_weights(self.kl_weight, self.adv_clip_max)


@dataclass(frozen=True, kw_only=True)
class GRPOObjective:
    """Flow-GRPO; see :func:`thalweg.diffusion.nft.policy_gradient.grpo_loss`."""

    clip_range: float = 1e-4
    """Largest useful distance of ratios from 1."""
    kl_weight: float = 0.04
    """Weight of the divergence from the reference."""
    adv_clip_max: float = 5.0
    """Where advantages are clipped."""
    solver: Stochastic = "flow"
    """How noise enters rollouts."""
    eta: float = 0.7
    """Its strength."""
    window: tuple[int, int] | None = None
    """First step with noise and the one behind the last; all but the last step if not given."""

    def __post_init__(self) -> None:
        """Check the settings."""
        require(self.eta > 0, "eta", self.eta, "above 0: without noise there are no probabilities")
        require(0 < self.clip_range <= 1, "clip_range", self.clip_range, "above 0 to 1")
        _check_weights(self.kl_weight, self.adv_clip_max)


def _check_weights(kl_weight: float, adv_clip_max: float) -> None:
    require(kl_weight >= 0, "kl_weight", kl_weight, "0 and more")
    require(adv_clip_max > 0, "adv_clip_max", adv_clip_max, "any positive number")
