"""Any optimizer trains any app: real modules, real data, Lightning's loop, from a config alone."""

from pathlib import Path
from typing import Any

import nft_runs
import poseidon_runs
import pytest
import torch
from torch import nn

from thalweg.apps.optim_callbacks import SAMGuard, ScheduleFreeMode
from thalweg.apps.zeroth_order import ZerothOrder
from thalweg.core_optim.build import WITHOUT_GRADIENTS
from thalweg.core_optim.config import OptimConfig, SAMConfig, ScheduleConfig
from thalweg.core_optim.registry import names

QUIET = (*poseidon_runs.QUIET, "ignore:.*module.s. in eval mode")
pytestmark = [pytest.mark.filterwarnings(text) for text in QUIET]
RATES = {"mezo": 1e-6, "zo2": 1e-6, "mfac": 1e-6}
OPTIONS = {"mfac": {"num_grads": 4, "damping": 1e-3}}
ALL = [*names(), *WITHOUT_GRADIENTS]


def config(name: str, **more: Any) -> OptimConfig:
    options = OPTIONS.get(name, {})
    constant = ScheduleConfig(name="constant")
    return OptimConfig(name=name, lr=RATES.get(name, 1e-3), options=options, schedule=constant, **more)


def callbacks() -> list[Any]:
    return [SAMGuard(), ScheduleFreeMode(), ZerothOrder()]


def assert_trained(before: dict[str, torch.Tensor], network: nn.Module) -> None:
    after = network.state_dict()
    assert all(value.isfinite().all() for value in after.values())
    assert any(not torch.equal(before[key], after[key]) for key in before)


@pytest.fixture(scope="module")
def fields(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return poseidon_runs.write_data(tmp_path_factory.mktemp("data"), "CE-RP")


@pytest.mark.parametrize("name", ALL)
def test_poseidon_trains_with(name: str, fields: Path, tmp_path: Path) -> None:
    module = poseidon_runs.module(optim=config(name))
    before = {key: value.clone() for key, value in module.network.state_dict().items()}
    trainer = poseidon_runs.trainer(tmp_path, max_steps=2, limit_val_batches=1, callbacks=callbacks())
    trainer.fit(module, poseidon_runs.data(fields, "CE-RP", num_trajectories=4))
    assert trainer.global_step == 2
    assert_trained(before, module.network)


@pytest.mark.parametrize("name", ["adamw", "lion", "muon", "frugal"])
def test_sharpness_aware_steps_from_a_config(name: str, fields: Path, tmp_path: Path) -> None:
    module = poseidon_runs.module(optim=config(name, sam=SAMConfig(rho=0.01)))
    before = {key: value.clone() for key, value in module.network.state_dict().items()}
    trainer = poseidon_runs.trainer(tmp_path, max_steps=2, limit_val_batches=1, callbacks=callbacks())
    trainer.fit(module, poseidon_runs.data(fields, "CE-RP", num_trajectories=4))
    assert type(trainer.optimizers[0]).__name__ == "SAM"
    assert_trained(before, module.network)


def test_sharpness_needs_gradients(fields: Path, tmp_path: Path) -> None:
    module = poseidon_runs.module(optim=config("mezo", sam=SAMConfig()))
    trainer = poseidon_runs.trainer(tmp_path, max_steps=1)
    with pytest.raises(ValueError, match="sam needs gradients, which 'mezo' does without"):
        trainer.fit(module, poseidon_runs.data(fields, "CE-RP", num_trajectories=4))


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    nft_runs.folder_of_pipeline(folder)
    return folder


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[] if n in ("muon", "soap", "lion", "sgdsai", "frugal") else pytest.mark.slow)
        for n in names()
        if n != "schedulefree_adamw"  # its weights for evaluation would need exchanging around roll-outs
    ],
)
def test_online_fine_tuning_of_adapters_trains_with(name: str, policy: Path) -> None:
    """LoRA: the gradients of A are zero at the first step."""
    found = nft_runs.fit(policy, epochs=2, optim=config(name))
    trained = {k: v for k, v in found.networks.named_parameters() if v.requires_grad}
    assert all(value.isfinite().all() for value in trained.values())
    assert any(value.abs().max() > 0 for key, value in trained.items() if "lora_B" in key)
