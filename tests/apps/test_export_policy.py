"""Exports of online fine-tuning: what diffusers loads equals the policy that was trained."""

from pathlib import Path
from typing import Any

import pytest
import torch
from nft_runs import folder_of_pipeline, prompts, trainer, whole
from nft_runs import module as make
from tiny_policy import question

from thalweg.apps.build import build_module
from thalweg.apps.export import export
from thalweg.diffusion.draw import open_pipeline
from thalweg.diffusion.nft.config import PolicyConfig

pytestmark = pytest.mark.filterwarnings("ignore:Found .* in eval mode")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder_of_pipeline(tmp_path)
    return tmp_path


def trained(home: Path, **changes: Any) -> tuple[Any, Path]:
    """A module after two epochs, and its checkpoint as ``thalweg fit`` writes it."""
    found = make(home, **changes)
    loop = trainer(home, 2)
    loop.fit(found, datamodule=prompts(home))
    file = home / "run.ckpt"
    loop.save_checkpoint(file)
    content = torch.load(file, weights_only=True)
    policy = {"kind": found.policy_config.kind, "lora": {"r": 4, "alpha": 8.0}}
    arguments = {"pipeline": {"model": str(home / "pipeline")}, "rewards": found.rewards, "policy": policy}
    content["app_config"] = {
        "model": {"class_path": "thalweg.diffusion.nft.module.NFTModule", "init_args": arguments},
        "data": {
            "class_path": "thalweg.diffusion.nft.data.PromptDataModule",
            "init_args": {"prompts": "x.txt"},
        },
    }
    torch.save(content, file)
    return found, file


@pytest.mark.parametrize(("weights", "who"), [("auto", "ema"), ("raw", "current")])
def test_diffusers_loads_the_trained_adapter(home: Path, weights: Any, who: Any) -> None:
    found, file = trained(home)
    folder = export(ckpt=file, to=home / "lora", weights=weights)
    pipe: Any = open_pipeline(str(home / "pipeline"))
    base = pipe.transformer
    x, t, condition = question()
    with torch.no_grad():
        before = base(x, timestep=t, return_dict=False, **condition)[0]
        pipe.load_lora_weights(folder)
        after = pipe.transformer(x, timestep=t, return_dict=False, **condition)[0]
    assert torch.equal(after, found.policy.velocity(who, x, t, condition))
    assert not torch.allclose(after, before)
    card = (folder / "README.md").read_text()
    assert "load_lora_weights" in card
    assert "brightness, weight 1.0" in card
    assert str(home) not in card


def test_a_transformer_that_was_trained_whole_is_exported_as_such(home: Path) -> None:
    from diffusers import SD3Transformer2DModel

    found, file = trained(home, policy=PolicyConfig(kind="full"))
    folder = export(ckpt=file, to=home / "whole", weights="raw")
    network = SD3Transformer2DModel.from_pretrained(folder, subfolder="transformer")
    weights = {f"current.{name}": value for name, value in network.named_parameters()}
    trained_weights = whole(found)
    assert all(torch.equal(value, trained_weights[name]) for name, value in weights.items())


def test_the_module_of_a_run_can_be_built_from_its_configuration(home: Path) -> None:
    _, file = trained(home)
    config = torch.load(file, weights_only=True)["app_config"]
    config["model"]["init_args"]["optim"] = {"lr": 1e-3}
    assert type(build_module(config)).__name__ == "NFTModule"
