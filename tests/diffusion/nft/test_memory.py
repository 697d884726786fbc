"""Estimates of memory agree with a real pipeline, its policies, its optimizer and its passes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_policy import SPEC, pipeline
from torch import Tensor

from thalweg.core_optim.build import build
from thalweg.core_optim.config import OptimConfig, ScheduleConfig
from thalweg.diffusion.nft.config import EvaluationConfig, PipelineConfig, PolicyConfig, RolloutConfig
from thalweg.diffusion.nft.live import inference_bytes, training_bytes
from thalweg.diffusion.nft.memory import REWARD_PARAMETERS, Estimate, Setup, estimate
from thalweg.diffusion.nft.policy import FullPolicy, LoraPolicy, ask
from thalweg.diffusion.nft.rollout import decode

OPTIM = OptimConfig(schedule=ScheduleConfig(name="constant"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("memory")
    pipeline(path).save_pretrained(path / "pipe")
    return path / "pipe"


def setup_of(folder: Path, **changes: Any) -> Setup:
    given: dict[str, Any] = {
        "pipeline": PipelineConfig(model=str(folder)),
        "optim": OPTIM,
        "policy": PolicyConfig(lora=SPEC),
        "batch": 3,
        "images": 12,
        "gpu": False,
    }
    return Setup(**given | changes)


def phases(found: Estimate) -> dict[str, dict[str, int]]:
    return {phase.name: dict(phase.parts) for phase in found.phases}


def size(tensors: Any) -> int:
    return sum(value.numel() * value.element_size() for value in tensors)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_parts_are_those_of_a_real_pipeline(folder: Path, kind: str, tmp_path: Path) -> None:
    pipe: Any = pipeline(tmp_path)
    frozen = size([*pipe.transformer.parameters(), *pipe.transformer.buffers()])
    policy = LoraPolicy(pipe.transformer, SPEC) if kind == "lora" else FullPolicy(pipe.transformer)
    weights = list(policy.trainable().values())
    found = phases(estimate(setup_of(folder, policy=PolicyConfig(kind=kind, lora=SPEC))))
    train = found["train"]
    assert train["transformer"] == frozen
    held = size([*policy.networks.parameters(), *policy.networks.buffers()])
    assert sum(value for name, value in train.items() if name.startswith("policies")) == held - frozen
    assert train["gradients"] == size(weights)
    assert train["autoencoder"] == size(pipe.vae.parameters())
    parts = (pipe.text_encoder, pipe.text_encoder_2)
    encoders = [value for part in parts for value in (*part.parameters(), *part.buffers())]
    assert train["text encoders"] == size(encoders)
    assert train["latents of the epoch"] == 12 * 4 * 8 * 8 * 4
    optimizer = build(policy.networks, OPTIM, None)["optimizer"]
    x, timestep, condition = inputs(pipe, 3)
    network = policy.networks["current"].train()
    given = [x, timestep, *condition.values()]
    waiting, peak = training_bytes(lambda: ask(network, x, timestep, condition), network, given, None)
    embeddings = size(condition.values())
    assert train["kept for the backward pass"] == waiting + embeddings
    assert train["activations"] == peak - waiting
    ask(network, x, timestep, condition).sum().backward()
    optimizer.step()
    assert train["optimizer"] == size(v for state in optimizer.state.values() for v in state.values())
    forward = inference_bytes(
        lambda: ask(network, x, timestep, condition), [*network.parameters(), *network.buffers(), *given]
    )
    decoded = inference_bytes(lambda: decode(pipe.vae, x), [*pipe.vae.parameters(), x])
    assert found["rollout"]["activations"] == max(forward + embeddings, decoded)
    assert found["rollout"]["images that wait for rewards"] == 3 * (3 * 3 * 16 * 16 * 4)


def inputs(pipe: Any, batch: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """States, times and embeddings with the 16 tokens of the tiny CLIP, and 128 for T5."""
    config = pipe.transformer.config
    condition = {
        "encoder_hidden_states": torch.zeros(batch, 16 + 128, config.joint_attention_dim),
        "pooled_projections": torch.zeros(batch, config.pooled_projection_dim),
    }
    return torch.zeros(batch, 4, 8, 8), torch.zeros(batch), condition


def test_what_settings_do(folder: Path) -> None:
    plain = setup_of(folder, gpu=True, autocast=torch.bfloat16)
    at = phases(estimate(plain))
    assert "text encoders" not in at["train"]
    assert at["encode"]["text encoders"] > 0
    on_cpu = phases(estimate(setup_of(folder)))
    freed = replace(plain.pipeline, encode_all=True)
    assert on_cpu["train"]["text encoders"] > 0
    assert "text encoders" not in phases(estimate(setup_of(folder, pipeline=freed)))["train"]
    again = phases(estimate(replace(plain, pipeline=replace(plain.pipeline, gradient_checkpointing=True))))
    key = "kept for the backward pass"
    assert again["train"][key] < at["train"][key] / 4
    assert sum(again["train"].values()) < sum(at["train"].values())
    assert phases(estimate(replace(plain, batch=6)))["train"][key] > 1.8 * at["train"][key] - 2**17
    half = phases(estimate(replace(plain, pipeline=replace(plain.pipeline, dtype="bfloat16"))))["train"]
    assert half["transformer"] == at["train"]["transformer"] / 2
    assert half["policies (current, old, ema)"] == at["train"]["policies (current, old, ema)"]
    assert phases(estimate(replace(plain, processes=2)))["train"]["gradients"] == 2 * at["train"]["gradients"]
    assert phases(estimate(replace(plain, kept=11)))["train"]["latents of the epoch"] == 11 * 12 * 1024
    guided = replace(plain, rollout=RolloutConfig(guidance=4.5, batch_size=6))
    assert phases(estimate(guided))["rollout"]["activations"] > 1.5 * at["rollout"]["activations"]
    small = replace(plain, evaluation=EvaluationConfig(batch_size=1))
    assert phases(estimate(small))["evaluate"]["activations"] < at["evaluate"]["activations"]
    full = replace(plain, policy=PolicyConfig(kind="full"), reference=False)
    assert "policies (old, ema)" in phases(estimate(full))["train"]


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_split_weights(folder: Path, kind: str, tmp_path: Path) -> None:
    whole = setup_of(folder, policy=PolicyConfig(kind=kind, lora=SPEC), processes=4)
    one, split = (phases(estimate(replace(whole, sharded=yes)))["train"] for yes in (False, True))
    network: Any = pipeline(tmp_path).transformer
    positions = size(network.buffers())
    assert split["transformer"] - positions == pytest.approx((one["transformer"] - positions) / 4, abs=4)
    assert split["gradients"] == pytest.approx(one["gradients"] / 8, abs=4)
    assert split["optimizer"] == pytest.approx(one["optimizer"] / 4, abs=4)
    if kind == "full":
        blocks = [size(block.parameters()) for block in network.transformer_blocks]
        outside = size(network.parameters()) - sum(blocks)
        assert split["blocks put together"] == outside + 2 * max(blocks)
    assert not one["blocks put together"]


def test_rewards_count_where_they_have_networks(folder: Path) -> None:
    found = estimate(setup_of(folder, rewards=("pickscore", "jpeg_compressibility")))
    assert phases(found)["train"]["rewards"] == 4 * REWARD_PARAMETERS["pickscore"]
    assert found.peak == max(phase.total for phase in found.phases) > 3.9e9


def test_sizes_of_clip_are_those_of_its_class() -> None:
    from transformers import CLIPConfig, CLIPModel

    def clip(text: int, vision: int, layers: tuple[int, int], width: int) -> int:
        config = CLIPConfig(
            text_config={
                "hidden_size": text, "intermediate_size": 4 * text, "num_hidden_layers": layers[0],
                "num_attention_heads": text // 64, "projection_dim": width,
            },
            vision_config={
                "hidden_size": vision, "intermediate_size": 4 * vision, "num_hidden_layers": layers[1],
                "num_attention_heads": 16, "patch_size": 14, "image_size": 224, "projection_dim": width,
            },
            projection_dim=width,
        )  # fmt: skip
        with torch.device("meta"):
            return sum(value.numel() for value in CLIPModel(config).parameters())

    assert clip(1024, 1280, (24, 32), 1024) == REWARD_PARAMETERS["pickscore"] == REWARD_PARAMETERS["hpsv2"]
    assert clip(768, 1024, (12, 24), 768) == REWARD_PARAMETERS["clipscore"]
