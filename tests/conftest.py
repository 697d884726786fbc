"""Shared test set-up: few threads, no network, deterministic seeds."""

import os
import signal
from collections.abc import Iterator

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

HANDLERS = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
"""Handlers before any test."""


@pytest.fixture(autouse=True)
def _fresh_torch_state() -> Iterator[None]:
    """Seed the global generator and restore the default dtype after every test."""
    torch.manual_seed(0)
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)


@pytest.fixture(autouse=True)
def _fresh_signals() -> Iterator[None]:
    """Restore the handlers of signals: a fit that fails leaves Lightning's, and forked workers inherit it.

    A worker with that handler survives ``terminate``, and whoever joins it waits for ever.
    """
    yield
    for number, handler in HANDLERS.items():
        if signal.getsignal(number) is not handler:
            signal.signal(number, handler)
