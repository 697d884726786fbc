"""Two processes with half a batch each take the steps of one with all of it, and stay equal bit by bit."""

from pathlib import Path

import pytest
import torch
from zeroth_processes import run, train


@pytest.mark.dist
def test_two_processes_equal_one(tmp_path: Path) -> None:
    first, second = run(tmp_path)
    alone = train("MeZO", slice(None))
    for name in ("MeZO", "ZO2"):
        assert first[name]["gradients"] == second[name]["gradients"]
        torch.testing.assert_close(first[name]["gradients"], alone["gradients"], rtol=1e-3, atol=1e-4)
        for key, wanted in alone["weights"].items():
            assert torch.equal(first[name]["weights"][key], second[name]["weights"][key])
            assert torch.equal(first["MeZO"]["weights"][key], first["ZO2"]["weights"][key])
            torch.testing.assert_close(first[name]["weights"][key], wanted, rtol=1e-4, atol=1e-5)
    for found in (first, second):
        assert "differs between ranks" in found["error"]
