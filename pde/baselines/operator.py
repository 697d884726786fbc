"""What the baselines share with scOT: one forward signature, the grouped loss, masks.

Shapes: B batch, C channels, H/W space.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn

from thalweg.pde.poseidon.loss import apply_mask, operator_loss
from thalweg.pde.poseidon.model import ScOTOutput


@dataclass(frozen=True, kw_only=True, slots=True)
class OperatorConfig:
    """Channels and loss of a baseline; the loss fields mean what they mean for scOT."""

    num_channels: int
    """Input channels."""
    num_out_channels: int
    """Output channels."""
    use_conditioning: bool = True
    """Give the network the lead time; False for steady problems without one."""
    p: int = 1
    """Exponent of the loss: 1 for mean absolute, 2 for mean squared error."""
    learn_residual: bool = False
    """Add the input to the output of a network with lead times, so that it learns what changes."""
    channel_slice_list_normalized_loss: tuple[int, ...] | None = None
    """Boundaries of channel groups with a relative loss each, e.g. (0, 1, 3, 4); None for the plain loss."""

    def __post_init__(self) -> None:
        """Refuse a residual between fields that do not match.

        Raises:
            ValueError: If there are more outputs than inputs to add.
        """
        if self.learn_residual and self.use_conditioning and self.num_out_channels > self.num_channels:
            raise ValueError(
                f"learn_residual adds {self.num_channels} input to {self.num_out_channels} output channels"
            )


class BaselineOperator(nn.Module, ABC):
    """Operator network that is called, trained and evaluated exactly like scOT."""

    config: OperatorConfig
    gradient_checkpointing = False

    @abstractmethod
    def predict(self, x_BCHW: Tensor, time_B: Tensor) -> Tensor:
        """Normalised output fields (B, num_out_channels, H, W) at lead times ``time_B``."""

    @abstractmethod
    def wrap_modules(self) -> list[nn.Module]:
        """Blocks to shard one by one under FSDP2."""

    def forward(
        self,
        pixel_values: Tensor,
        time: Tensor | None,
        pixel_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool = False,
    ) -> ScOTOutput:
        """Predict, and score the prediction if there are labels.

        Args:
            pixel_values: Normalised input, shape (B, C, H, W).
            time: Lead times, shape (B,); may be None for a network without conditioning.
            pixel_mask: True where the label replaces the prediction, shape (B, C) or (B, C, H, W).
            labels: Normalised target, shape (B, C, H, W).
            output_hidden_states: Only False; baselines expose none.

        Raises:
            ValueError: For a wrong channel count, a missing lead time, a mask without labels, or a request
                for hidden states.
        """
        config = self.config
        if pixel_values.shape[1] != config.num_channels:
            raise ValueError(
                f"{type(self).__name__} takes {config.num_channels} channels but the input has"
                f" {pixel_values.shape[1]}"
            )
        if output_hidden_states:
            raise ValueError(f"{type(self).__name__} has no hidden states to return")
        if config.use_conditioning and (time is None or time.numel() != len(pixel_values)):
            raise ValueError(f"{type(self).__name__} needs one lead time per sample")
        time = pixel_values.new_zeros(len(pixel_values)) if time is None else time.reshape(-1)
        output = self.predict(pixel_values, time)
        if config.learn_residual and config.use_conditioning:
            output = output + pixel_values[:, : output.shape[1]]
        output = apply_mask(output, labels, pixel_mask)
        loss = None
        if labels is not None:
            loss = operator_loss(output, labels, config.channel_slice_list_normalized_loss, config.p)
        return ScOTOutput(output, loss)
