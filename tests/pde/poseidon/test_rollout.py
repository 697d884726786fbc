"""Rollouts of a network whose answer is known: it adds the lead time to every channel."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from thalweg.pde.poseidon.loss import apply_mask, operator_loss
from thalweg.pde.poseidon.model import ScOTOutput
from thalweg.pde.poseidon.rollout import rollout


class AddTime(nn.Module):
    """Predicts x + t for its first ``outputs`` channels, and counts the inputs it saw."""

    def __init__(self, outputs: int, conditioned: bool = True) -> None:
        super().__init__()
        self.outputs = outputs
        self.config = SimpleNamespace(use_conditioning=conditioned)
        self.seen: list[Tensor] = []

    def forward(
        self, x: Tensor, time: Tensor, pixel_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> ScOTOutput:
        self.seen.append(x)
        output = apply_mask(x[:, : self.outputs] + time[:, None, None, None], labels, pixel_mask)
        return ScOTOutput(output, None if labels is None else operator_loss(output, labels, None))


@pytest.mark.parametrize(
    ("steps", "times"), [(1, [0.8]), (4, [0.2, 0.4, 0.6, 0.8]), ((0.25, 0.75), [0.2, 0.8])]
)
def test_steps_add_up_to_the_lead_time(steps: int | tuple[float, ...], times: list[float]) -> None:
    result = rollout(AddTime(2), torch.zeros(3, 2, 4, 4), 0.8, steps)
    assert result.states.shape == (3, len(times), 2, 4, 4)
    assert result.states[0, :, 0, 0, 0].tolist() == pytest.approx(times)
    assert result.times[1].tolist() == pytest.approx(times)
    assert torch.equal(result.output, result.states[:, -1])
    assert result.loss is None


def test_lead_times_may_differ_between_samples() -> None:
    result = rollout(AddTime(1), torch.zeros(2, 1, 4, 4), torch.tensor([0.2, 1.0]), 2)
    assert result.output[:, 0, 0, 0].tolist() == pytest.approx([0.2, 1.0])


def test_surplus_input_channels_are_carried_along() -> None:
    model, x = AddTime(1), torch.randn(1, 3, 4, 4)
    rollout(model, x, 1.0, 3)
    assert all(torch.equal(seen[:, 1:], x[:, 1:]) for seen in model.seen)


def test_static_channels_are_fed_from_the_truth_or_as_predicted() -> None:
    x = torch.zeros(1, 2, 4, 4)
    fed = {}
    for source in ("truth", "prediction"):
        model = AddTime(2)
        rollout(model, x, 1.0, 2, static_channels=[1], feed_static=source)
        fed[source] = model.seen[1][0, :, 0, 0].tolist()
    assert fed == {"truth": [0.5, 0.0], "prediction": [0.5, 0.5]}


def test_static_channels_known_in_advance() -> None:
    model = AddTime(2)
    rollout(
        model,
        torch.zeros(1, 2, 4, 4),
        1.0,
        3,
        static_channels=[1],
        truth=lambda k: torch.full((1, 2, 4, 4), 10.0 + k),
    )
    assert [seen[0, 1, 0, 0].item() for seen in model.seen] == [0, 10, 11]


def test_masks_and_labels_of_the_last_step_or_of_every_step() -> None:
    x, mask = torch.zeros(1, 2, 4, 4), torch.tensor([[False, True]])
    final = torch.full((1, 2, 4, 4), 7.0)
    result = rollout(AddTime(2), x, 1.0, 2, pixel_mask=mask, labels=final)
    assert result.states[0, :, 1, 0, 0].tolist() == [7, 7]
    # Channel 0 is off by 6.5 and 6, channel 1 is exact.
    assert result.losses.tolist() == pytest.approx([6.5 / 2, 6.0 / 2])
    assert result.loss.item() == pytest.approx(6.25 / 2)
    every = torch.stack([torch.full((1, 2, 4, 4), v) for v in (0.5, 1.0)], 1)
    assert rollout(AddTime(2), x, 1.0, 2, labels=every).loss.item() == pytest.approx(0, abs=1e-7)


def test_gradients_reach_the_first_frame() -> None:
    x = torch.zeros(1, 1, 4, 4, requires_grad=True)
    rollout(AddTime(1), x, 1.0, 3).output.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "at least 1"),
        ({"steps": [0.5, -0.5]}, "positive fractions"),
        ({"steps": []}, "positive fractions"),
        ({"static_channels": [5]}, "does not exist among 2"),
        ({"feed_static": "label"}, "allowed: truth, prediction"),
        ({"steps": 2, "labels": torch.zeros(1, 3, 2, 4, 4)}, "3 steps for a rollout of 2"),
    ],
)
def test_contradicting_arguments_are_explained(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rollout(AddTime(2), torch.zeros(1, 2, 4, 4), 1.0, **arguments)


def test_networks_that_cannot_be_iterated_are_refused() -> None:
    with pytest.raises(ValueError, match="without conditioning"):
        rollout(AddTime(1, conditioned=False), torch.zeros(1, 1, 4, 4), 1.0, 2)
    with pytest.raises(ValueError, match="cannot feed 2 predicted channels"):
        rollout(_Widening(2), torch.zeros(1, 1, 4, 4), 1.0, 2)


class _Widening(AddTime):
    def forward(self, x: Tensor, time: Tensor, **_: object) -> ScOTOutput:
        return ScOTOutput(x.expand(-1, 2, -1, -1))
