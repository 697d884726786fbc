"""Distances of feature sets: torchmetrics against closed forms, biases, errors of the estimates."""

import math

import pytest
import torch
from torch import Tensor

from thalweg.diffusion.metrics.distance import (
    frechet,
    gaussian,
    jackknife,
    polynomial_mmd,
    squared_frechet,
)
from thalweg.diffusion.metrics.quality import fid, kid

FEATURES = 12


def draw(count: int, seed: int, shift: float = 0.0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, FEATURES, generator=generator, dtype=torch.float64)
    mixing = torch.randn(FEATURES, FEATURES, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return scale * x @ mixing / FEATURES**0.5 + shift


def test_the_distance_of_gaussians_that_commute_is_that_of_their_deviations() -> None:
    mean = torch.zeros(3, dtype=torch.float64)
    s, r = torch.tensor([1.0, 2.0, 3.0]).double(), torch.tensor([2.0, 2.0, 0.0]).double()
    found = frechet((mean, torch.diag(s**2)), (mean + 1, torch.diag(r**2)))
    assert found == pytest.approx(3 + float((s - r).square().sum()))


def test_fid_of_torchmetrics_is_the_closed_form_and_nothing_for_a_set_with_itself() -> None:
    a, b = draw(400, 0), draw(300, 1, shift=0.3, scale=1.2)
    closed = frechet(gaussian(a), gaussian(b))
    assert fid(a, b) == pytest.approx(closed, rel=1e-8)
    assert fid(b, a) == pytest.approx(closed, rel=1e-8)
    assert abs(fid(a, a)) < 1e-8
    assert abs(frechet(gaussian(a), gaussian(a))) < 1e-8


def test_the_closed_form_holds_for_covariances_without_full_rank() -> None:
    a, b = draw(6, 0), draw(5, 1)  # fewer samples than features
    found = frechet(gaussian(a), gaussian(b))
    assert math.isfinite(found)
    assert found > 0
    assert found == pytest.approx(frechet(gaussian(b), gaussian(a)), rel=1e-6)
    assert frechet(gaussian(a), gaussian(a)) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("count", [40, 6])  # more samples than features, and fewer
def test_the_closed_form_differentiates_by_the_second_set(count: int) -> None:
    real, x = gaussian(draw(300, 0)), draw(count, 1, shift=0.3).requires_grad_()
    (slope,) = torch.autograd.grad(squared_frechet(real, gaussian(x)), x)
    way = draw(count, 2)
    after, before = (frechet(real, gaussian((x + h * way).detach())) for h in (1e-5, -1e-5))
    assert (after - before) / 2e-5 == pytest.approx(float((slope * way).sum()), rel=1e-5)


def test_distances_grow_with_what_is_wrong() -> None:
    real = draw(500, 0)
    for shift, scale in ((1, 0), (0, 1)):
        worse = [draw(500, 1, shift * k, 1 + scale * k) for k in (0.0, 0.2, 0.5, 1.0)]
        assert sorted(values := [fid(x, real) for x in worse]) == values
        assert sorted(values := [polynomial_mmd(x, real) for x in worse]) == values


def test_kid_is_nothing_on_average_for_equal_distributions_and_fid_is_not() -> None:
    values = [polynomial_mmd(draw(60, 2 * k), draw(90, 2 * k + 1)) for k in range(40)]
    mean = sum(values) / len(values)
    error = torch.tensor(values).std().item() / len(values) ** 0.5
    assert abs(mean) < 3 * error
    assert min(values) < 0 < max(values)
    assert min(fid(draw(60, 2 * k), draw(90, 2 * k + 1)) for k in range(5)) > 0.1


def test_a_set_is_at_no_kernel_distance_from_itself_only_where_pairs_are_left_out() -> None:
    x = draw(30, 0)
    assert polynomial_mmd(x, x, paired=True) == pytest.approx(0, abs=1e-9)
    assert polynomial_mmd(x, x) < -0.1


def test_kid_of_torchmetrics_on_one_subset_of_all_is_ours() -> None:
    a, b = draw(80, 0), draw(80, 1, shift=0.2)
    mean, deviation = kid(a, b, subsets=2, subset_size=80)
    assert mean == pytest.approx(polynomial_mmd(a, b), rel=1e-9)
    assert deviation == pytest.approx(0, abs=1e-9)
    before = torch.random.get_rng_state()
    assert kid(a, b, subset_size=40, seed=3) == kid(a, b, subset_size=40, seed=3)
    assert torch.equal(before, torch.random.get_rng_state())
    with pytest.raises(ValueError, match="subsets of 100 images need as many, got 80 samples"):
        kid(a, b, subset_size=100)


def test_the_jackknife_gives_the_error_of_a_mean() -> None:
    x = draw(1000, 0)[:, :1]
    error = jackknife(lambda rows: float(x[rows].mean()), 1000, groups=100)
    assert error == pytest.approx(float(x.std() / len(x) ** 0.5), rel=0.25)
    assert jackknife(lambda rows: float(x[rows].mean()), 2, least=2) == math.inf


def test_the_jackknife_gives_the_spread_of_the_kid() -> None:
    real = draw(400, 1000)
    sets = [draw(100, k, shift=0.2) for k in range(30)]
    spread = torch.tensor([polynomial_mmd(x, real) for x in sets]).std().item()
    errors = [jackknife(lambda rows, x=x: polynomial_mmd(x[rows], real), 100) for x in sets]
    assert sum(errors) / len(errors) == pytest.approx(spread, rel=0.5)


def test_one_sample_has_no_distance() -> None:
    with pytest.raises(ValueError, match="two samples or more"):
        gaussian(draw(1, 0))
    with pytest.raises(ValueError, match="got 1 and 5"):
        polynomial_mmd(draw(1, 0), draw(5, 0))
