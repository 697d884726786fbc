"""PoseidonModule on two processes: replicas agree, shards train as replicas do."""

from pathlib import Path

import pytest
import torch
from poseidon_processes import fit_ddp, fit_sharded, fit_sharded_and_averaged, run
from poseidon_runs import write_data

pytestmark = pytest.mark.dist


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_data(tmp_path, "NS-Sines")


def test_processes_agree_on_weights_and_metrics(folder: Path) -> None:
    first, second = run(fit_ddp, folder)
    assert all(torch.equal(first["weights"][name], value) for name, value in second["weights"].items())
    assert first["metrics"] == second["metrics"]
    assert "val/median_relative_l1" in first["metrics"]


def test_shards_train_as_replicas_do(folder: Path) -> None:
    replicas, shards = run(fit_ddp, folder), run(fit_sharded, folder)
    total = sum(value.numel() for value in shards[0]["weights"].values())
    assert sum(part["local"] for part in shards) == total
    for name, value in shards[0]["weights"].items():
        assert torch.allclose(value, replicas[0]["weights"][name], rtol=1e-4, atol=1e-5), name


def test_averaging_of_shards_is_refused(folder: Path) -> None:
    for message in run(fit_sharded_and_averaged, folder):
        assert "weight averaging does not work on a sharded model" in message
