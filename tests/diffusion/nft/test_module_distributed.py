"""Two processes compute what one does, replicated or sharded, and average gradients once per step."""

from pathlib import Path

import pytest
import torch
from nft_runs import (
    fit,
    fit_replicas,
    fit_shards,
    folder_of_pipeline,
    resume_shards,
    spread_over_processes,
    whole,
)

from thalweg.checkpoints.lightning_ckpt import read
from thalweg.diffusion.nft.module import AWMModule, FlowGRPOModule, NFTModule

pytestmark = [pytest.mark.dist, pytest.mark.filterwarnings("ignore:Found .* in eval mode")]
TOLERANCE = {"rtol": 1e-6, "atol": 1e-6}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder_of_pipeline(tmp_path)
    return tmp_path


@pytest.mark.parametrize("kind", [NFTModule, AWMModule, FlowGRPOModule], ids=lambda kind: kind.__name__)
def test_two_processes_train_as_one_does(home: Path, kind: type) -> None:
    alone = fit(home, kind, batch_size=4)
    first, second = spread_over_processes(fit_replicas, home, kind.__name__, {"batch_size": 4})
    assert all(torch.equal(first["weights"][name], value) for name, value in second["weights"].items())
    for name, value in whole(alone).items():
        assert torch.allclose(first["weights"][name], value, **TOLERANCE), name
    for name, value in alone.trainer.callback_metrics.items():
        if "seconds" not in name and not name.endswith("_max"):
            assert first["metrics"][name] == pytest.approx(float(value), rel=1e-4, abs=1e-6), name


def test_processes_may_have_different_numbers_of_groups(home: Path) -> None:
    alone = fit(home, groups=3, batch_size=2)
    first, _ = spread_over_processes(fit_replicas, home, "NFTModule", {"groups": 3, "batch_size": 2})
    for name, value in whole(alone).items():
        assert torch.allclose(first["weights"][name], value, **TOLERANCE), name


def test_shards_train_as_replicas_do(home: Path) -> None:
    changes = {"batch_size": 4}
    replicas = spread_over_processes(fit_replicas, home, "NFTModule", changes)[0]
    shards = spread_over_processes(fit_shards, home, "NFTModule", changes)[0]
    for name, value in replicas["weights"].items():
        assert torch.allclose(shards["weights"][name], value, **TOLERANCE), name


def test_a_sharded_run_resumes_from_a_file_with_whole_weights(home: Path) -> None:
    found = spread_over_processes(resume_shards, home)[0]
    assert all(torch.equal(found["resumed"][name], value) for name, value in found["straight"].items())
    state = read(home / "half.ckpt").state_dict
    assert {f"policy.{name}" for name in found["straight"]} == set(state)
    assert all(
        value.shape == found["straight"][n.removeprefix("policy.")].shape for n, value in state.items()
    )
