"""FNO and U-Net: called like scOT, conditioned on time, and with the symmetries they should have."""

import io
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from thalweg.pde.baselines.fno import FNOConfig, FNOOperator
from thalweg.pde.baselines.operator import BaselineOperator
from thalweg.pde.baselines.unet import UNetConfig, UNetOperator
from thalweg.pde.poseidon.loss import operator_loss

CHANNELS = {"num_channels": 5, "num_out_channels": 4, "channel_slice_list_normalized_loss": (0, 1, 3, 4)}


def build(kind: str, **changes: object) -> BaselineOperator:
    if kind == "fno":
        return FNOOperator(FNOConfig(**{**CHANNELS, "modes": 6, "width": 8, "depth": 2, **changes}))
    return UNetOperator(UNetConfig(**{**CHANNELS, "width": 8, "multipliers": (1, 2), "blocks": 1, **changes}))


def double(network: BaselineOperator) -> BaselineOperator:
    """In float64; ``Module.double`` leaves complex weights as they are."""
    for parameter in network.parameters():
        parameter.data = parameter.data.to(torch.complex128 if parameter.is_complex() else torch.float64)
    return network.double().eval()


KINDS = pytest.mark.parametrize("kind", ["fno", "unet"])


@KINDS
def test_forward_returns_output_and_grouped_loss(kind: str) -> None:
    network = build(kind)
    x, labels, time = torch.randn(2, 5, 16, 24), torch.randn(2, 4, 16, 24), torch.tensor([0.1, 0.7])
    result = network(x, time, labels=labels)
    assert result.output.shape == labels.shape
    assert torch.equal(result.loss, operator_loss(result.output, labels, (0, 1, 3, 4), 1))
    assert network(x, time).loss is None


@KINDS
def test_masked_channels_equal_the_labels_and_carry_no_gradient(kind: str) -> None:
    network = build(kind)
    x, labels = torch.randn(2, 5, 16, 16), torch.randn(2, 4, 16, 16)
    mask = torch.tensor([[False, False, False, True]]).expand(2, 4)
    result = network(x, torch.ones(2), pixel_mask=mask, labels=labels)
    assert torch.equal(result.output[:, 3], labels[:, 3])
    result.output[:, 3].sum().backward()
    assert all(p.grad is None or not p.grad.abs().any() for p in network.parameters())


@KINDS
def test_a_residual_network_adds_its_input(kind: str) -> None:
    plain, residual = build(kind).eval(), build(kind, learn_residual=True).eval()
    residual.load_state_dict(plain.state_dict())
    x, time = torch.randn(2, 5, 16, 16), torch.tensor([0.1, 0.7])
    assert torch.equal(residual(x, time).output, plain(x, time).output + x[:, :4])


@KINDS
def test_a_residual_needs_an_input_for_every_output(kind: str) -> None:
    with pytest.raises(ValueError, match="adds 2 input to 4 output"):
        build(kind, num_channels=2, learn_residual=True)


@KINDS
def test_samples_see_their_own_lead_time_only(kind: str) -> None:
    network = double(build(kind))
    x = torch.randn(1, 5, 16, 16).double().expand(3, -1, -1, -1)
    times = torch.tensor([0.0, 0.35, 1.0]).double()
    together = network(x, times).output
    for index in range(3):
        alone = network(x[:1], times[index : index + 1]).output
        assert torch.allclose(together[index : index + 1], alone, rtol=0, atol=1e-12)
    assert (together[0] - together[1]).abs().max() > 1e-4


@KINDS
def test_without_conditioning_time_plays_no_role(kind: str) -> None:
    network = build(kind, use_conditioning=False).eval()
    x = torch.randn(2, 5, 16, 16)
    assert torch.equal(network(x, torch.zeros(2)).output, network(x, None).output)


@pytest.mark.parametrize(
    ("kind", "options", "shift"),
    [("fno", {"grid": False}, (3, 5)), ("unet", {"padding": "circular"}, (4, 6))],
)
def test_periodic_variants_commute_with_shifts(kind: str, options: dict, shift: tuple[int, int]) -> None:
    network = double(build(kind, **options))
    x, time = torch.randn(2, 5, 16, 16).double(), torch.tensor([0.2, 0.9]).double()
    moved = network(x.roll(shift, (-2, -1)), time).output
    # neuraloperator multiplies spectra in complex64, whatever the type of its input
    assert torch.allclose(moved, network(x, time).output.roll(shift, (-2, -1)), rtol=0, atol=1e-7)


def test_fno_of_a_band_limited_field_hardly_depends_on_the_grid() -> None:
    network = double(build("fno", modes=4, depth=1))

    def field(n: int) -> torch.Tensor:
        x = torch.arange(n).double() / n
        return (0.1 * torch.cos(2 * torch.pi * x)[:, None] * torch.sin(2 * torch.pi * x)).expand(1, 5, n, n)

    time = torch.ones(1).double()
    coarse, fine = network(field(32), time).output, network(field(64), time).output[..., ::2, ::2]
    assert (coarse - fine).norm() < 1e-3 * fine.norm()


@KINDS
def test_states_hold_tensors_only_and_reload(kind: str, tmp_path) -> None:
    network = build(kind)
    state = network.state_dict()
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    wrapped = torch.nn.ModuleDict({"network": network})
    assert all(name.startswith("network.") for name in wrapped.state_dict())
    save_file(state, tmp_path / "model.safetensors")
    other = build(kind)
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    x = torch.randn(1, 5, 16, 16)
    assert torch.equal(other.eval()(x, torch.ones(1)).output, network.eval()(x, torch.ones(1)).output)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=True).keys() == state.keys()


def test_gradient_checkpointing_changes_no_gradient() -> None:
    network = build("unet")
    x, labels = torch.randn(2, 5, 16, 16), torch.randn(2, 4, 16, 16)
    gradients = []
    for flag in (False, True):
        network.gradient_checkpointing = flag
        network.zero_grad()
        network(x, torch.ones(2), labels=labels).loss.backward()
        gradients.append([p.grad.clone() for p in network.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


@KINDS
def test_sharding_units_hold_most_parameters(kind: str) -> None:
    network = build(kind)
    inside = {p for block in network.wrap_modules() for p in block.parameters()}
    assert sum(p.numel() for p in inside) > 0.5 * sum(p.numel() for p in network.parameters())


@KINDS
def test_misuse_is_refused_with_a_reason(kind: str) -> None:
    network = build(kind)
    with pytest.raises(ValueError, match="takes 5 channels but the input has 4"):
        network(torch.zeros(1, 4, 16, 16), torch.ones(1))
    with pytest.raises(ValueError, match="labels"):
        network(torch.zeros(1, 5, 16, 16), torch.ones(1), pixel_mask=torch.ones(1, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="one lead time per sample"):
        network(torch.zeros(2, 5, 16, 16), torch.ones(1))
    with pytest.raises(ValueError, match="hidden states"):
        network(torch.zeros(1, 5, 16, 16), torch.ones(1), output_hidden_states=True)


def test_unet_refuses_grids_that_do_not_halve() -> None:
    with pytest.raises(ValueError, match="divisible by 2"):
        build("unet")(torch.zeros(1, 5, 15, 16), torch.ones(1))


def test_importing_the_fno_leaves_warning_filters_alone() -> None:
    before = list(warnings.filters)
    build("fno")
    assert warnings.filters == before
