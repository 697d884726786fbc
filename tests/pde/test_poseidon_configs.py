"""The shipped Poseidon configs fit the data sets they name and keep to the published recipe."""

from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml

from thalweg.pde.baselines.fno import FNOConfig
from thalweg.pde.baselines.unet import UNetConfig
from thalweg.pde.data import catalog
from thalweg.pde.poseidon.config import PRESETS, ScOTConfig
from thalweg.pde.poseidon.matching import check_network

ROOT = Path(str(resources.files("thalweg.configs"))) / "poseidon"
CONFIGS = {path.stem: yaml.safe_load(path.read_text()) for path in sorted(ROOT.glob("*.yaml"))}
KINDS = {"ScOT": ScOTConfig, "FNOOperator": FNOConfig, "UNetOperator": UNetConfig}
PRETRAINING = [name for name, spec in catalog.PROBLEMS.items() if spec.pretraining]


def network_of(config: dict) -> Any:
    tree = config["model"]["init_args"]["network"]
    return KINDS[tree["class_path"].rpartition(".")[2]](**tree["init_args"]["config"])


def problems_of(config: dict) -> list:
    return [catalog.get(name) for name in config["data"]["init_args"]["datasets"]]


@pytest.mark.parametrize("name", CONFIGS)
def test_networks_fit_their_data_sets(name: str) -> None:
    check_network(network_of(CONFIGS[name]), problems_of(CONFIGS[name]))


def test_every_downstream_task_has_a_config() -> None:
    tasks = {
        name
        for name, spec in catalog.PROBLEMS.items()
        if not spec.pretraining and not name.endswith((".out", ".time"))
    }
    assert len(tasks) == 15
    assert {name.removeprefix("finetune_") for name in CONFIGS if name.startswith("finetune_")} == tasks


@pytest.mark.parametrize("name", [name for name in CONFIGS if name.startswith("finetune_")])
def test_fine_tuning_follows_the_published_recipe(name: str) -> None:
    config = CONFIGS[name]
    model, data = config["model"]["init_args"], config["data"]["init_args"]
    assert (model["optim"]["lr"], model["optim"]["weight_decay"]) == (5e-5, 1e-6)
    assert (model["lr_embedding_recovery"], model["lr_time_embedding"]) == (5e-4, 5e-4)
    assert (data["batch_size"], data["num_trajectories"]) == (40, 128)
    assert (config["trainer"]["max_epochs"], config["trainer"]["gradient_clip_val"]) == (200, 5.0)
    network = network_of(config)
    other_channels = (network.num_channels, network.num_out_channels) != (4, 4)
    assert model["replace_embedding_recovery"] == other_channels
    changed = ("num_channels", "num_out_channels", "channel_slice_list_normalized_loss")
    assert network == ScOTConfig.preset("T", **{field: getattr(network, field) for field in changed})


@pytest.mark.parametrize("size", ["T", "B", "L"])
def test_pretraining_uses_the_published_size_and_mixture(size: str) -> None:
    config = CONFIGS[f"pretrain_{size}"]
    assert network_of(config) == ScOTConfig.preset(size)
    assert config["data"]["init_args"]["datasets"] == PRETRAINING
    assert (
        config["data"]["init_args"]["max_num_time_steps"],
        config["data"]["init_args"]["time_step_size"],
    ) == (10, 2)


def test_the_scratch_baseline_has_size_s() -> None:
    assert network_of(CONFIGS["scratch_scot"]) == ScOTConfig.preset("S")
    assert set(PRESETS) == {"T", "S", "B", "L"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_channels": 3},
            r"'NS-PwC' has 4 input channels \(rho, u, v, p\) but the network 3: set .* to 4",
        ),
        ({"num_out_channels": 5}, r"4 output channels .* but the network 5.*replace_embedding_recovery"),
        (
            {"channel_slice_list_normalized_loss": (0, 4)},
            r"at \[0, 4\] but .* at \[0, 1, 3, 4\] \[rho\],\[u,v\],\[p\]",
        ),
        ({"use_conditioning": False}, r"needs the lead time.*use_conditioning to true"),
    ],
)
def test_networks_that_do_not_fit_are_told_what_to_change(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_network(ScOTConfig.preset("T", **changes), [catalog.get("NS-PwC")])


def test_steady_problems_without_lead_time_point_to_their_variant() -> None:
    config = ScOTConfig.preset(
        "T", num_channels=1, num_out_channels=1, channel_slice_list_normalized_loss=(0, 1)
    )
    with pytest.raises(ValueError, match=r"'\.time' variant"):
        check_network(config, [catalog.get("Poisson-Gauss")])
    check_network(config, [catalog.get("Poisson-Gauss.time")])
