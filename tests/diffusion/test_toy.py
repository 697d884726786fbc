"""The exact denoiser: golden predictions and states, one Gaussian in closed form, and identities."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import golden_files
from safetensors.torch import load_file

from thalweg.diffusion.toy import GaussianMixture, exact_states

(GOLDEN,) = golden_files("s3", "toy.json")
TOY = json.loads(Path(GOLDEN).read_text())
ARRAYS = load_file(Path(GOLDEN).with_suffix(".safetensors"))
NAMES = {"noise": "noise", "data": "data", "velocity_vp": "v", "velocity_flow": "flow"}


def mixture(name: str) -> GaussianMixture:
    """A golden mixture."""
    entry = TOY["mixtures"][name]
    return GaussianMixture.from_dict({key: ARRAYS[entry[key]] for key in ("weights", "means", "covariances")})


def levels(nodes: list[dict[str, float]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Alpha and sigma of golden nodes."""
    alpha, sigma = (torch.tensor([n[key] for n in nodes], dtype=torch.float64) for key in ("alpha", "sigma"))
    return alpha, sigma


@pytest.mark.parametrize("name", TOY["problems"])
def test_golden_predictions(name: str) -> None:
    problem = TOY["problems"][name]
    check = problem["prediction_check"]
    gm = mixture(problem["mixture"])
    x_BD = ARRAYS[check["x"]]
    alpha_B, sigma_B = levels(check["nodes"])
    for golden, kind in NAMES.items():
        expected_BD = ARRAYS[check["tensors"][golden]]
        found_BD = gm.predict(x_BD, alpha_B, sigma_B, kind)
        torch.testing.assert_close(found_BD, expected_BD, rtol=0, atol=1e-10)
        one_D = gm.predict(x_BD[3:4], float(alpha_B[3]), float(sigma_B[3]), kind)[0]
        torch.testing.assert_close(one_D, expected_BD[3], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", TOY["problems"])
def test_golden_exact_states(name: str) -> None:
    problem = TOY["problems"][name]
    alpha, sigma = levels(problem["exact"]["nodes"])
    found = exact_states(mixture(problem["mixture"]), ARRAYS[problem["x_T"]], alpha.tolist(), sigma.tolist())
    torch.testing.assert_close(found, ARRAYS[problem["exact"]["tensor"]], rtol=0, atol=1e-9)


def gaussian() -> GaussianMixture:
    """One Gaussian in three dimensions with correlations."""
    root = torch.tensor([[1.0, 0.0, 0.0], [0.4, 0.5, 0.0], [-0.3, 0.2, 0.1]], dtype=torch.float64)
    return GaussianMixture([1.0], [[0.5, -1.0, 2.0]], (root @ root.mT)[None])


@pytest.mark.parametrize("end", [(1.0, 0.0), (0.8, 0.6), (0.9, 0.1), (1.0, 3.0)])
def test_flow_of_one_gaussian_is_affine(end: tuple[float, float]) -> None:
    gm = gaussian()
    x_BD = torch.randn(5, 3, dtype=torch.float64)
    begin = (0.02, 1.0)
    found_BD = exact_states(gm, x_BD, (begin[0], end[0]), (begin[1], end[1]))[-1]
    variance, axes = torch.linalg.eigh(gm.covariances_KDD[0])
    gain = ((end[0] ** 2 * variance + end[1] ** 2) / (begin[0] ** 2 * variance + begin[1] ** 2)).sqrt()
    along = (x_BD - begin[0] * gm.means_KD) @ axes * gain
    torch.testing.assert_close(found_BD, end[0] * gm.means_KD + along @ axes.mT, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("alpha", "sigma"), [(0.3, 0.9), (1.0, 0.05), (0.0, 1.0), (1.0, 0.0), (1.0, 40.0)])
def test_noise_and_data_make_up_the_state(alpha: float, sigma: float) -> None:
    gm = mixture("gm16")
    x_BD = alpha * gm.sample(6, torch.Generator().manual_seed(1)) + sigma * torch.randn(
        6, 16, dtype=torch.float64
    )
    data, noise = gm.data(x_BD, alpha, sigma), gm.noise(x_BD, alpha, sigma)
    torch.testing.assert_close(alpha * data + sigma * noise, x_BD, rtol=1e-12, atol=1e-11)
    torch.testing.assert_close(gm.velocity(x_BD, alpha, sigma), noise - data)


def test_noise_is_the_scaled_score() -> None:
    gm = mixture("gm2")
    x_BD = torch.randn(7, 2, dtype=torch.float64, requires_grad=True)
    (score_BD,) = torch.autograd.grad(gm.log_density(x_BD, 0.7, 0.4).sum(), x_BD)
    torch.testing.assert_close(gm.noise(x_BD, 0.7, 0.4), -0.4 * score_BD, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gm.predict(x_BD, 0.7, 0.4, "score"), score_BD, rtol=1e-10, atol=1e-12)


def test_density_of_a_standard_normal() -> None:
    gm = GaussianMixture([2.0], [[0.0, 0.0]], [np.eye(2)])
    expected = -0.5 * (0.36 + 0.64) - math.log(2 * math.pi)
    assert gm.log_density(torch.tensor([[0.6, 0.8]])).item() == pytest.approx(expected, rel=1e-7)


def test_samples_have_the_mean_and_covariance_of_the_mixture() -> None:
    gm = mixture("gm2")
    x_BD = gm.sample(40_000, torch.Generator().manual_seed(0))
    mean = gm.weights_K @ gm.means_KD
    off = gm.means_KD - mean
    cov = torch.einsum("k,kde->de", gm.weights_K, gm.covariances_KDD + off[:, :, None] * off[:, None])
    scale = cov.diagonal().max().item()
    torch.testing.assert_close(x_BD.mean(0), mean, rtol=0, atol=5 * (scale / 40_000) ** 0.5)
    torch.testing.assert_close(x_BD.T.cov(), cov, rtol=0, atol=0.03 * scale)


def test_pictures_are_flattened_and_types_kept() -> None:
    gm = mixture("gm16")
    x = torch.randn(3, 1, 4, 4)
    alpha, sigma = torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0.9, 0.5, 0.1])
    found = gm.predict(x, alpha, sigma, "v")
    assert (found.shape, found.dtype) == (x.shape, torch.float32)
    flat = gm.predict(x.reshape(3, 16).double(), alpha.double(), sigma.double(), "v")
    torch.testing.assert_close(found.reshape(3, 16), flat.float(), rtol=1e-5, atol=1e-6)


def test_a_mixture_returns_from_json() -> None:
    gm = mixture("gm2")
    back = GaussianMixture.from_dict(json.loads(json.dumps(gm.to_dict())))
    x = torch.randn(2, 2, dtype=torch.float64)
    assert torch.equal(gm.data(x, 0.6, 0.8), back.data(x, 0.6, 0.8))


def test_wrong_mixtures_and_states_are_refused() -> None:
    eye = np.eye(2)[None]
    with pytest.raises(ValueError, match="missing: covariances"):
        GaussianMixture.from_dict({"weights": [1.0], "means": [[0.0]]})
    with pytest.raises(ValueError, match=r"means are K D numbers, got shape \(2,\)"):
        GaussianMixture([1.0], [0.0, 0.0], eye)
    with pytest.raises(ValueError, match=r"weights \(1,\).*\(2,\)"):
        GaussianMixture([0.5, 0.5], [[0.0, 0.0]], eye)
    with pytest.raises(ValueError, match="positive, got"):
        GaussianMixture([-1.0], [[0.0, 0.0]], eye)
    with pytest.raises(ValueError, match="covariances must be symmetric"):
        GaussianMixture([1.0], [[0.0, 0.0]], -eye)
    gm = GaussianMixture([1.0], [[0.0, 0.0]], eye)
    with pytest.raises(ValueError, match=r"B and 2 numbers, got shape \(4, 3\)"):
        gm.data(torch.zeros(4, 3), 1.0, 1.0)
    with pytest.raises(ValueError, match="'eps'"):
        gm.predict(torch.zeros(4, 2), 1.0, 1.0, "eps")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must fall in noise"):
        exact_states(gm, torch.zeros(4, 2), (1.0, 0.5), (0.1, 0.5))
