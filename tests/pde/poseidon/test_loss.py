"""The relative loss and its masks, against numbers done by hand."""

import pytest
import torch

from thalweg.pde.poseidon.loss import apply_mask, operator_loss


def fields() -> tuple[torch.Tensor, torch.Tensor]:
    """Two samples, three channels, one point; labels 2, (4, -4) and errors 1, (1, 3)."""
    labels = torch.tensor([[2.0, 4.0, -4.0]] * 2)[..., None, None]
    return labels + torch.tensor([[1.0, 1.0, 3.0]] * 2)[..., None, None], labels


@pytest.mark.parametrize(
    ("slices", "p", "expected"),
    [
        (None, 1, (1 + 1 + 3) / 3),
        (None, 2, (1 + 1 + 9) / 3),
        ((0, 1, 3), 1, (1 / 2 + 4 / 8) / 2),
        ((0, 1, 3), 2, (1 / 4 + 10 / 32) / 2),
        ((0, 1, 2, 3), 1, (1 / 2 + 1 / 4 + 3 / 4) / 3),
    ],
)
def test_loss_by_hand(slices: tuple[int, ...] | None, p: int, expected: float) -> None:
    assert operator_loss(*fields(), slices, p).item() == pytest.approx(expected, rel=1e-6)


def test_loss_is_a_ratio_of_batch_means() -> None:
    labels = torch.tensor([1.0, 3.0]).view(2, 1, 1, 1)
    pred = labels + torch.tensor([1.0, 0.0]).view(2, 1, 1, 1)
    # Not the mean of per-sample ratios, which would be 1/2.
    assert operator_loss(pred, labels, (0, 1)).item() == pytest.approx(1 / 4)


@pytest.mark.parametrize("whole_channels", [True, False])
def test_masked_values_carry_no_error_and_no_gradient_but_their_group_counts(whole_channels: bool) -> None:
    pred, labels = fields()
    pred.requires_grad_()
    mask = torch.tensor([[False, True, True]] * 2)
    if not whole_channels:
        mask = mask[..., None, None]
    loss = operator_loss(pred, labels, (0, 1, 3), 1, mask)
    assert loss.item() == pytest.approx((1 / 2 + 0) / 2)
    loss.backward()
    assert pred.grad[:, 1:].abs().max() == 0
    assert pred.grad[:, 0].abs().min() > 0


def test_masking_leaves_the_prediction_untouched() -> None:
    pred, labels = fields()
    kept = pred.clone()
    masked = apply_mask(pred, labels, torch.tensor([[True, False, False]] * 2))
    assert torch.equal(pred, kept)
    assert torch.equal(masked[:, 0], labels[:, 0])
    assert torch.equal(masked[:, 1:], pred[:, 1:])


def test_half_precision_predictions_are_compared_in_float32() -> None:
    labels = torch.rand(1, 1, 64, 64) + 100
    loss = operator_loss(labels.bfloat16(), labels, None)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx((labels.bfloat16().float() - labels).abs().mean().item())


def test_wrong_arguments_are_explained() -> None:
    pred, labels = fields()
    with pytest.raises(ValueError, match="pass labels"):
        apply_mask(pred, None, torch.zeros(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"pixel_mask has shape \(2, 2\)"):
        apply_mask(pred, labels, torch.zeros(2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="p must be 1 or 2"):
        operator_loss(pred, labels, None, 3)
    with pytest.raises(ValueError, match="differ in shape"):
        operator_loss(pred, labels[:, :2], None)
