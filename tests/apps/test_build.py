"""Configuration trees become live objects, and errors name the class or argument that is wrong."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from poseidon_runs import SCOT
from torch import nn

from thalweg.apps.build import build_datamodule, build_module, build_network, instantiate, load_network
from thalweg.checkpoints.tensors import save

CONFIG = {
    "model": {
        "class_path": "thalweg.pde.poseidon.module.PoseidonModule",
        "init_args": {"network": SCOT, "optim": {"lr": 1e-3, "schedule": {"warmup_ratio": 0.1}}},
    },
    "data": {
        "class_path": "thalweg.pde.data.datamodule.PDEDataModule",
        "init_args": {"datasets": ["NS-Sines"], "data_dir": "data", "batch_size": 3},
    },
}


def changed(path: str, value: object) -> dict[str, Any]:
    """The configuration with one entry replaced."""
    config = copy.deepcopy(CONFIG)
    *parents, last = path.split(".")
    node: Any = config
    for name in parents:
        node = node[name]
    node[last] = value
    return config


def test_network_module_and_data_are_built_from_one_configuration() -> None:
    network, module, data = build_network(CONFIG), build_module(CONFIG), build_datamodule(CONFIG)
    assert (type(network).__name__, network.config.embed_dim) == ("ScOT", 8)
    assert module.network.state_dict().keys() == network.state_dict().keys()
    assert (module.optim.lr, module.optim.schedule.warmup_ratio) == (1e-3, 0.1)
    assert type(data).__name__ == "PDEDataModule"


NETWORK = "model.init_args.network"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (f"{NETWORK}.class_path", "thalweg.pde.poseidon.model.ScOTT", r"has no 'ScOTT'; did you mean ScOT\?"),
        (
            f"{NETWORK}.class_path",
            "nowhere.Net",
            r"class nowhere\.Net cannot be imported .*package installed",
        ),
        (f"{NETWORK}.class_path", "ScOT", "class 'ScOT' needs its full path"),
        (f"{NETWORK}.class_path", "collections.OrderedDict", "not correspond to a subclass of Module"),
        (f"{NETWORK}.init_args.config.embed_dims", 8, "embed_dims.*Did you mean embed_dim"),
        (f"{NETWORK}.init_args.config.embed_dim", "wide", r"^network\.config\.embed_dim: .*Got value: wide"),
        (f"{NETWORK}.init_args.config.window_size", -1, "^window_size must be at least 1, got -1$"),
        ("model.init_args.network", None, "configured without a network"),
        ("model", None, r"no 'model' with a class_path \(found: model, data\)"),
    ],
)
def test_errors_name_what_is_wrong(path: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message) as info:
        build_network(changed(path, value))
    assert "\n" not in str(info.value)


def test_configuration_is_checked_and_never_evaluated() -> None:
    code = "__import__('os').system('true')"
    with pytest.raises(ValueError, match="in_features"):
        instantiate(
            {"class_path": "torch.nn.Linear", "init_args": {"in_features": code, "out_features": 1}},
            nn.Module, "network",
        )  # fmt: skip


def write_linear(folder: Path) -> nn.Linear:
    linear = nn.Linear(2, 3)
    folder.mkdir()
    tree = {"class_path": "torch.nn.Linear", "init_args": {"in_features": 2, "out_features": 3}}
    (folder / "config.json").write_text(json.dumps(tree))
    save(linear.state_dict(), folder / "model.safetensors")
    return linear


def test_folder_may_name_classes_of_trusted_packages_only(tmp_path: Path) -> None:
    linear = write_linear(tmp_path / "m")
    with pytest.raises(ValueError, match=r"asks for torch\.nn\.Linear, allowed packages: thalweg"):
        load_network(tmp_path / "m")
    loaded = load_network(tmp_path / "m", packages=("torch",))
    assert torch.equal(loaded.weight, linear.weight)


def test_weights_must_fit_and_configuration_must_be_json(tmp_path: Path) -> None:
    write_linear(tmp_path / "m")
    save({"weight": torch.zeros(3, 2)}, tmp_path / "m" / "model.safetensors")
    with pytest.raises(ValueError, match=r"does not fit Linear: 1 tensors are missing \(bias\)"):
        load_network(tmp_path / "m", packages=("torch",))
    (tmp_path / "m" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is no valid JSON"):
        load_network(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="holds a list"):
        load_network(tmp_path / "m")
