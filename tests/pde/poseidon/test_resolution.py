"""Spectral resampling, rectangular grids and native work at other resolutions."""

import math

import pytest
import torch
from golden_scot import CASES
from torch import Tensor

from thalweg.pde.poseidon import ScOT, ScOTConfig
from thalweg.pde.poseidon.resize import spectral_resize

SMALL = ScOTConfig.preset(
    "T", image_size=32, patch_size=2, embed_dim=12, depths=(2, 1), num_heads=(3, 6), skip_connections=(1, 0)
).replace(window_size=8)


def strong(config: ScOTConfig) -> ScOT:
    """Network in which no branch is negligible."""
    torch.manual_seed(1)
    model = ScOT(config)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return model.double().eval()


def wave(shape: tuple[int, int], k: tuple[int, int]) -> Tensor:
    """A periodic wave with k periods along each axis, sampled without its end points."""
    axes = (torch.arange(n, dtype=torch.float64) / n for n in shape)
    x, y = torch.meshgrid(*axes, indexing="ij")
    return torch.sin(2 * math.pi * (k[0] * x + k[1] * y) + 0.3)[None, None]


@pytest.mark.parametrize("target", [(32, 32), (64, 64), (24, 80), (33, 31), (128, 20)])
@pytest.mark.parametrize("source", [(48, 48), (32, 64), (45, 40)])
def test_band_limited_fields_are_resampled_exactly(source: tuple[int, int], target: tuple[int, int]) -> None:
    for k in [(0, 0), (3, -4), (7, 9)]:
        resized = spectral_resize(wave(source, k), target)
        assert torch.allclose(resized, wave(target, k), atol=1e-12)


def test_unresolved_waves_disappear_and_half_precision_is_resampled_in_float32() -> None:
    assert spectral_resize(wave((64, 64), (20, 0)), (32, 32)).abs().max() < 1e-12
    x = wave((64, 64), (3, 1)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        resized = spectral_resize(x, (32, 32))
    assert resized.dtype == torch.bfloat16
    assert torch.allclose(resized.double(), wave((32, 32), (3, 1)), atol=1e-2)


def test_inputs_of_another_size_pass_through_the_configured_grid() -> None:
    model = strong(SMALL)
    x = torch.cat([wave((32, 32), (k, 1 - k)) for k in range(4)], 1)
    with torch.no_grad():
        small, large = (
            model(spectral_resize(x, n), torch.tensor([0.5])).output for n in ((32, 32), (48, 40))
        )
    assert large.shape == (1, 4, 48, 40)
    assert torch.allclose(spectral_resize(small, (48, 40)), large, atol=1e-9)


def test_learned_residual_is_added_on_the_configured_grid() -> None:
    model = ScOT.from_pretrained(CASES["learn_residual"]).double().eval()
    x, t = torch.randn(1, 5, 48, 48, dtype=torch.float64), torch.tensor([0.5])
    inner = spectral_resize(x, (32, 32))
    with torch.no_grad():
        assert torch.allclose(
            model(x, t).output, spectral_resize(model(inner, t).output, (48, 48)), atol=1e-10
        )


def test_transposing_weights_and_fields_commutes_on_rectangular_grids() -> None:
    """The architecture treats both axes alike, so a network with swapped kernels works on swapped fields."""
    wide = strong(SMALL.replace(image_size=(24, 44), use_conditioning=True))
    tall = strong(SMALL.replace(image_size=(44, 24), use_conditioning=True))
    width = SMALL.embed_dim
    state = {}
    for name, value in wide.state_dict().items():
        if value.ndim == 4:
            value = value.transpose(2, 3)
        elif name.endswith("continuous_position_bias_mlp.0.weight"):
            value = value.flip(1)
        elif name.endswith("reduction.weight"):
            # The four merged tokens come in the order (0,0), (1,0), (0,1), (1,1).
            value = value.unflatten(1, (4, width))[:, [0, 2, 1, 3]].flatten(1)
        elif name.endswith("upsample.upsample.weight"):
            value = value.unflatten(0, (4, width))[[0, 2, 1, 3]].flatten(0, 1)
        state[name] = value
    tall.load_state_dict(state)
    x, t = torch.randn(2, 4, 24, 44, dtype=torch.float64), torch.tensor([0.3, 0.8])
    with torch.no_grad():
        expected = wide(x, t).output
        assert torch.allclose(tall(x.mT, t).output.mT, expected, atol=1e-9)
    assert expected.std() > 0.1


@pytest.mark.parametrize("size", [48, (32, 64), (20, 28), 34])
def test_another_resolution_natively_shares_weights(size: int | tuple[int, int]) -> None:
    model = strong(SMALL)
    other = model.at_resolution(size)
    assert all(a is b for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert other.config == SMALL.replace(image_size=size)
    assert not other.training
    fresh = ScOT(other.config).double().eval()
    fresh.load_state_dict(model.state_dict())
    x, t = torch.randn(1, 4, *other.config.image_shape, dtype=torch.float64), torch.tensor([0.5])
    with torch.no_grad():
        assert torch.equal(other(x, t).output, fresh(x, t).output)
        resampled = model(x, t).output
    assert resampled.shape == x.shape
    other(x, t).output.sum().backward()
    assert model.embeddings.norm.weight.weight.grad is not None


def test_position_scale_can_stay_with_the_trained_windows() -> None:
    model = strong(SMALL.replace(image_size=16))
    windows = model.config.windows
    kept = model.at_resolution(32, keep_position_scale=True)
    assert kept.config.pretrained_window_sizes == tuple(w for w, _ in windows)
    bias = {
        name: net.encoder.layers[1].blocks[0].attention.self.continuous_position_bias_mlp.table()
        for name, net in (("small", model), ("kept", kept), ("scaled", model.at_resolution(32)))
    }
    # Level 1 grows from windows of 4 to 8 tokens: equal offsets keep their bias, or equal fractions do.
    assert torch.allclose(bias["kept"][:, 4:-4, 4:-4], bias["small"])
    assert not torch.allclose(bias["scaled"][:, 4:-4, 4:-4], bias["small"])
    assert torch.allclose(bias["scaled"][:, [0, 7, -1]][..., 7], bias["small"][:, [0, 3, -1]][..., 3])


def test_absolute_positions_tie_a_network_to_its_resolution() -> None:
    model = ScOT.from_pretrained(CASES["unconditioned"])
    with pytest.raises(ValueError, match="use_absolute_embeddings"):
        model.at_resolution(64)
