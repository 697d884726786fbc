"""Prediction types: all pairs both ways, the table's formulas, and levels where a type is undetermined."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thalweg.diffusion.parameterization import KINDS, convert, from_data, from_pair, to_data, to_noise

levels = st.floats(0.01, 1.5)


def state(alpha: float, sigma: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Data, noise and the state made of them, all (4, 3, 2, 2)."""
    g = torch.Generator().manual_seed(7)
    data, noise = (torch.randn(4, 3, 2, 2, dtype=torch.float64, generator=g) for _ in range(2))
    return data, noise, alpha * data + sigma * noise


@pytest.mark.parametrize(("kind", "wanted"), list(itertools.product(KINDS, KINDS)))
@given(alpha=levels, sigma=levels)
def test_every_pair_of_types_both_ways(kind: str, wanted: str, alpha: float, sigma: float) -> None:
    data, noise, x = state(alpha, sigma)
    output, expected = (from_pair(data, noise, alpha, sigma, k) for k in (kind, wanted))
    found = convert(output, x, alpha, sigma, kind, wanted)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-8)
    back = convert(found, x, alpha, sigma, wanted, kind)
    torch.testing.assert_close(back, output, rtol=1e-9, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@given(alpha=levels, sigma=levels)
def test_data_and_noise_of_an_output_and_back(kind: str, alpha: float, sigma: float) -> None:
    data, noise, x = state(alpha, sigma)
    output = from_pair(data, noise, alpha, sigma, kind)
    torch.testing.assert_close(to_data(output, x, alpha, sigma, kind), data, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(to_noise(output, x, alpha, sigma, kind), noise, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(from_data(data, x, alpha, sigma, kind), output, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_one_level_per_sample(kind: str) -> None:
    alpha = torch.tensor([0.1, 0.4, 0.7, 0.9], dtype=torch.float64)
    sigma = (1 - alpha**2).sqrt()
    data, noise, _ = state(1.0, 1.0)
    a, s = alpha.reshape(-1, 1, 1, 1), sigma.reshape(-1, 1, 1, 1)
    x = a * data + s * noise
    output = from_data(data, x, a, s, kind)
    for k in range(4):
        each = from_data(data[k], x[k], float(alpha[k]), float(sigma[k]), kind)
        torch.testing.assert_close(output[k], each, rtol=1e-13, atol=1e-13)
        each = to_data(output[k], x[k], float(alpha[k]), float(sigma[k]), kind)
        torch.testing.assert_close(to_data(output, x, a, s, kind)[k], each, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_the_type_of_the_numbers_is_kept(kind: str) -> None:
    x = torch.ones(2, 3, dtype=torch.bfloat16)
    for function in (to_data, to_noise, from_data):
        assert function(x, x, 0.6, 0.8, kind).dtype == torch.bfloat16


def test_rectified_flow_and_v_by_hand() -> None:
    x, o = torch.tensor([2.0]), torch.tensor([0.5])
    assert to_data(o, x, 0.75, 0.25, "flow").item() == 2.0 - 0.25 * 0.5
    assert to_noise(o, x, 0.75, 0.25, "flow").item() == 2.0 + 0.75 * 0.5
    assert to_data(o, x, 0.6, 0.8, "v").item() == pytest.approx(0.6 * 2.0 - 0.8 * 0.5)
    assert to_noise(o, x, 0.6, 0.8, "v").item() == pytest.approx(0.6 * 0.5 + 0.8 * 2.0)
    assert to_noise(o, x, 0.6, 0.8, "score").item() == pytest.approx(-0.4)


@pytest.mark.parametrize("kind", ["data", "v", "edm", "flow"])
def test_pure_noise_still_has_a_data_prediction(kind: str) -> None:
    data, noise, x = state(0.0, 1.0)
    output = from_pair(data, noise, 0.0, 1.0, kind)
    torch.testing.assert_close(to_data(output, x, 0.0, 1.0, kind), data)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: to_data(x, x, 0.0, 1.0, "noise"), "noise to data is not determined at alpha = 0"),
        (lambda x: to_data(x, x, 0.0, 1.0, "score"), "score to data is not determined at alpha = 0"),
        (lambda x: to_noise(x, x, 1.0, 0.0, "data"), "data to noise is not determined at sigma = 0"),
        (lambda x: from_data(x, x, 1.0, 0.0, "v"), "data to v is not determined at sigma = 0"),
        (lambda x: from_pair(x, x, 1.0, 0.0, "score"), "noise to score is not determined at sigma = 0"),
        (lambda x: to_data(x, x, 0.6, 0.8, "eps"), "'eps'.*noise, data, v, edm, score, flow"),
        (lambda x: to_noise(x, x, 0.6, 0.8, "eps"), "'eps'"),
        (lambda x: from_data(x, x, 0.6, 0.8, "eps"), "'eps'"),
        (lambda x: convert(x, x, 0.6, 0.8, "eps", "eps"), "'eps'"),
    ],
)
def test_what_is_undetermined_or_unknown_is_refused(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.ones(2, 2))  # type: ignore[operator]
