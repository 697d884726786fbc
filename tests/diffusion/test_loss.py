"""Pieces of the training loss: weights, times, dropped labels."""

from typing import get_args

import pytest
import torch

from thalweg.diffusion.loss import Kind, corrupt, drop_labels, spread_times, weights
from thalweg.diffusion.order import generator
from thalweg.diffusion.parameterization import from_pair, to_data


@pytest.mark.parametrize("kind", get_args(Kind))
@pytest.mark.parametrize("flow", [False, True])
def test_min_snr_weighs_the_error_of_the_data(kind: Kind, flow: bool) -> None:
    sigma = torch.linspace(0.05, 0.95, 10, dtype=torch.float64)[:, None]
    alpha = 1 - sigma if flow else (1 - sigma**2).sqrt()
    stream = generator(1)
    x0, noise, wrong = (torch.randn(10, 7, generator=stream, dtype=torch.float64) for _ in range(3))
    x = corrupt(x0, noise, alpha, sigma)
    error = (wrong - from_pair(x0, noise, alpha, sigma, kind)).square()
    data_error = (to_data(wrong, x, alpha, sigma, kind) - x0).square()
    expected = torch.clamp(alpha**2 / sigma**2, max=5.0) * data_error
    torch.testing.assert_close(weights(alpha, sigma, kind, "min-snr", 5.0) * error, expected)


def test_min_snr_by_hand() -> None:
    alpha, sigma = torch.tensor([0.8]), torch.tensor([0.6])  # signal-to-noise ratio 16 / 9
    assert weights(alpha, sigma, "noise", "min-snr", 1.0).item() == pytest.approx(9 / 16)
    assert weights(alpha, sigma, "v", "min-snr", 1.0).item() == pytest.approx(0.36)
    assert weights(alpha, sigma, "data", "min-snr", 5.0).item() == pytest.approx(16 / 9)
    assert weights(alpha, sigma, "data", "none").item() == 1.0


@pytest.mark.parametrize("kind", get_args(Kind))
def test_weights_are_finite_at_both_ends_of_a_flow(kind: Kind) -> None:
    ends = torch.tensor([0.0, 1.0])
    assert weights(1 - ends, ends, kind, "min-snr").isfinite().all()


def test_times_fill_the_interval_evenly() -> None:
    times = spread_times(50, "uniform", generator(0))
    assert torch.equal((times * 50).floor(), torch.arange(50, dtype=torch.float64))
    normal = torch.logit(spread_times(4000, "logit-normal", generator(0)))
    assert normal.mean().abs() < 0.01
    assert (normal.std() - 1).abs() < 0.01


def test_labels_are_dropped_at_the_rate() -> None:
    labels = torch.arange(10).repeat(2000)
    kept = drop_labels(labels, 10, 0.1, generator(3))
    dropped = kept == 10
    assert abs(dropped.float().mean().item() - 0.1) < 4 * (0.1 * 0.9 / 20000) ** 0.5
    assert torch.equal(kept[~dropped], labels[~dropped])
    assert torch.equal(drop_labels(labels, 10, 0.0, generator(3)), labels)
    assert (drop_labels(labels, 10, 1.0, generator(3)) == 10).all()
