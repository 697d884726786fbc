"""Tests of the optimizer core."""

import pytest

from thalweg.core_optim.engine import buckets


@pytest.fixture(autouse=True)
def _compiled_kernels_for_small_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that ask for compiled kernels get them for their small tensors too."""
    monkeypatch.setattr(buckets, "SMALL", 2)
