"""scOT, the scalable operator transformer: a U-shaped Swin v2 network conditioned on the lead time.

Herde et al. 2024, "Poseidon: Efficient Foundation Models for PDEs" (arXiv 2405.19101), section 2. Module
names reproduce the published state dict key for key.

Shapes: B batch, C channels, H/W space, R/S token rows and columns, D width, N = R*S tokens.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from thalweg.pde.poseidon.blocks import ConvNeXtBlock, ResNetBlock, SwinBlock
from thalweg.pde.poseidon.config import ScOTConfig
from thalweg.pde.poseidon.layers import Embeddings, PatchMerging, PatchRecovery, PatchUnmerging
from thalweg.pde.poseidon.loss import apply_mask, operator_loss
from thalweg.pde.poseidon.resize import spectral_resize


class ScOTOutput(NamedTuple):
    """What a forward pass returns."""

    output: Tensor
    """Prediction (B, C, H, W); where ``pixel_mask`` is set it equals the labels."""
    loss: Tensor | None = None
    """Scalar loss, if labels were given."""
    hidden_states: tuple[Tensor, ...] | None = None
    """Tokens (B, N, D): decoder input, decoder stages (coarse to fine), embedding, encoder stages."""


class Stage(nn.Module):
    """Blocks of one level, followed by a change of resolution called ``downsample`` or ``upsample``."""

    def __init__(self, blocks: list[SwinBlock], **resample: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        for name, module in resample.items():
            self.add_module(name, module)


class Stages(nn.Module):
    """Encoder or decoder: a list of stages under the name ``layers``."""

    def __init__(self, stages: list[Stage]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(stages)


class ScOT(nn.Module):
    """The operator network of Poseidon.

    The state dict holds the published tensors and nothing else; there are no hidden buffers, so the network
    can be built on the meta device, copied and cast freely. With conditioning every parameter takes part in
    every forward pass (the mask token only if patches are masked), as DistributedDataParallel expects. Fields
    of another size than ``config.image_size`` are resampled spectrally on the way in and out; use
    :meth:`at_resolution` to work on another grid natively.

    Args:
        config: architecture.
    """

    def __init__(self, config: ScOTConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        positions = config.grids[0][0] * config.grids[0][1] if config.use_absolute_embeddings else 0
        self.embeddings = Embeddings(
            config.num_channels,
            config.embed_dim,
            config.patch_size,
            conditioned=config.use_conditioning,
            num_positions=positions,
            mask_token=config.use_mask_token,
            dropout=config.hidden_dropout_prob,
        )
        self.encoder = _build_encoder(config)
        self.decoder = _build_decoder(config)
        self.residual_blocks = _build_skips(config)
        self.patch_recovery = PatchRecovery(
            config.embed_dim, config.num_out_channels, config.patch_size, config.image_shape
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw fresh weights as the reference does; the transposed convolution keeps torch's own default."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.normal_(module.weight, std=self.config.initializer_range)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.ConvTranspose2d | nn.LayerNorm | nn.BatchNorm2d):
                module.reset_parameters()
            elif isinstance(module, ConvNeXtBlock):
                nn.init.constant_(module.weight, 1e-6)

    def forward(
        self,
        pixel_values: Tensor,
        time: Tensor | None,
        pixel_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool = False,
        bool_masked_pos: Tensor | None = None,
    ) -> ScOTOutput:
        """Predict the fields one lead time ahead.

        Args:
            pixel_values: normalised fields (B, num_channels, H, W).
            time: lead times (B,), normalised so that training covers [0, 1]; ignored without conditioning.
            pixel_mask: True where the label replaces the prediction, (B, C) or (B, C, H, W); needs labels.
            labels: normalised targets (B, num_out_channels, H, W); their presence adds the loss.
            output_hidden_states: also return the tokens of every stage.
            bool_masked_pos: patches (B, N) replaced by the mask token, if the network has one.

        Raises:
            ValueError: if the shapes of inputs do not fit the configuration.
        """
        time = self._check_inputs(pixel_values, time)
        size = pixel_values.shape[-2:]
        x_BCHW = pixel_values
        if tuple(size) != self.config.image_shape:
            x_BCHW = spectral_resize(x_BCHW, self.config.image_shape)
        tokens, encoded, skips = self._encode(x_BCHW, time, bool_masked_pos)
        decoded = self._decode(skips, time)
        output = self.patch_recovery(decoded[-1]).to(pixel_values.dtype)
        if self.config.learn_residual and self.config.use_conditioning:
            output = output + x_BCHW[:, : self.config.num_out_channels]
        if tuple(size) != self.config.image_shape:
            output = spectral_resize(output, tuple(size))
        output = apply_mask(output, labels, pixel_mask)
        loss = None
        if labels is not None:
            loss = operator_loss(
                output, labels, self.config.channel_slice_list_normalized_loss, self.config.p
            )
        hidden = (*decoded, tokens, *encoded)
        states = tuple(h.flatten(1, 2) for h in hidden) if output_hidden_states else None
        return ScOTOutput(output, loss, states)

    def _check_inputs(self, pixel_values: Tensor, time: Tensor | None) -> Tensor:
        config = self.config
        if pixel_values.ndim != 4 or pixel_values.shape[1] != config.num_channels:
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}, "
                f"expected (batch, {config.num_channels}, H, W); "
                "replace_embedding_recovery adapts a network to other channels"
            )
        if not config.use_conditioning:
            return pixel_values.new_zeros(1)
        if time is None:
            raise ValueError("this network is conditioned on the lead time: pass time of shape (batch,)")
        if time.numel() not in (1, pixel_values.shape[0]):
            raise ValueError(f"time has shape {tuple(time.shape)}, expected ({pixel_values.shape[0]},)")
        return time.reshape(-1).to(pixel_values.dtype)

    def _encode(
        self, x_BCHW: Tensor, time_B: Tensor, masked_BN: Tensor | None
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        embedded = x = self.embeddings(x_BCHW, time_B, masked_BN)
        encoded, skips = [], []
        for stage, residual in zip(self.encoder.layers, self.residual_blocks):
            entry = x
            x = self._run(stage.blocks, x, time_B)
            encoded.append(x)
            skips.append(self._run(residual, x, time_B))
            if hasattr(stage, "downsample"):
                x = stage.downsample(x + entry, time_B)
        return embedded, encoded, skips

    def _decode(self, skips: list[Tensor], time_B: Tensor) -> list[Tensor]:
        x = skips[-1]
        decoded = [x]
        for m, stage in enumerate(self.decoder.layers):
            if m > 0:
                x = x + skips[-1 - m]
            x = self._run(stage.blocks, x, time_B)
            if hasattr(stage, "upsample"):
                x = stage.upsample(x, time_B)
            decoded.append(x)
        return decoded

    def _run(self, blocks: nn.ModuleList, x: Tensor, time_B: Tensor) -> Tensor:
        for block in blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, time_B, use_reentrant=False)
            else:
                x = block(x, time_B)
        return x

    def wrap_modules(self) -> list[nn.Module]:
        """Units for FSDP2's ``fully_shard``, activation checkpointing or regional compilation."""
        kinds = (SwinBlock, ConvNeXtBlock, ResNetBlock)
        return [m for m in self.modules() if isinstance(m, kinds)]

    def at_resolution(self, image_size: int | tuple[int, int], *, keep_position_scale: bool = False) -> ScOT:
        """The same network working natively on another grid; parameters are shared, not copied.

        Windows are clipped to the new grid as at construction. By default position offsets are measured in
        windows, as if the network had been built for this size; ``keep_position_scale`` measures them in the
        tokens of the present windows instead (Swin v2, section 3.3).

        Raises:
            ValueError: if absolute embeddings tie the network to its resolution.
        """
        if self.config.use_absolute_embeddings:
            raise ValueError("use_absolute_embeddings ties this network to its image_size")
        changes: dict[str, Any] = {"image_size": image_size}
        if keep_position_scale and self.config.pretrained_window_sizes is None:
            changes["pretrained_window_sizes"] = tuple(max(window) for window in self.config.windows)
        with torch.device("meta"):
            other = ScOT(self.config.replace(**changes))
        shared = dict(self.named_parameters()) | dict(self.named_buffers())
        for name, module in other.named_modules():
            for store in (module._parameters, module._buffers):
                for key, value in store.items():
                    if value is not None:
                        store[key] = shared[f"{name}.{key}".lstrip(".")]
        other.gradient_checkpointing = self.gradient_checkpointing
        return other.train(self.training)

    @classmethod
    def from_pretrained(
        cls, source: str | os.PathLike[str], *, replace_embedding_recovery: bool = False, **changes: Any
    ) -> ScOT:
        """Load a local folder or a hub repository, see ``pretrained.load_pretrained``."""
        from thalweg.pde.poseidon.pretrained import load_pretrained

        return load_pretrained(source, replace_embedding_recovery=replace_embedding_recovery, **changes)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``config.json`` and ``model.safetensors`` in the published layout."""
        from thalweg.pde.poseidon.pretrained import save_pretrained

        save_pretrained(self, folder)


def _drop_rates(config: ScOTConfig) -> list[float]:
    """Stochastic depth per block in forward order, from 0 to the largest rate."""
    count = 2 * sum(config.depths)
    return [config.drop_path_rate * i / (count - 1) for i in range(count)]


def _build_encoder(config: ScOTConfig) -> Stages:
    rates = iter(_drop_rates(config))
    stages = []
    for level, depth in enumerate(config.depths):
        blocks = [SwinBlock(config, level, shifted=j % 2 == 1, drop_path=next(rates)) for j in range(depth)]
        last = level == config.num_levels - 1
        merging = (
            {}
            if last
            else {"downsample": PatchMerging(config.widths[level], conditioned=config.use_conditioning)}
        )
        stages.append(Stage(blocks, **merging))
    return Stages(stages)


def _build_decoder(config: ScOTConfig) -> Stages:
    rates = iter(_drop_rates(config)[sum(config.depths) :])
    stages = []
    for level in reversed(range(config.num_levels)):
        depth = config.depths[level]
        # The published decoder mirrors the encoder, so its last block is the unshifted one.
        blocks = [
            SwinBlock(config, level, shifted=(depth - 1 - j) % 2 == 1, drop_path=next(rates))
            for j in range(depth)
        ]
        unmerging = {}
        if level > 0:
            unmerging["upsample"] = PatchUnmerging(
                config.widths[level], config.grids[level - 1], conditioned=config.use_conditioning
            )
        stages.append(Stage(blocks, **unmerging))
    return Stages(stages)


def _build_skips(config: ScOTConfig) -> nn.ModuleList:
    def block(width: int) -> nn.Module:
        if config.residual_model == "resnet":
            return ResNetBlock(width)
        return ConvNeXtBlock(width, conditioned=config.use_conditioning, eps=config.layer_norm_eps)

    counts = zip(config.widths, config.skip_connections)
    return nn.ModuleList(nn.ModuleList(block(width) for _ in range(count)) for width, count in counts)
