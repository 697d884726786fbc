"""Shape of a scOT network, and the published sizes.

The fields and their defaults are those of the Hugging Face ``config.json`` that accompanies the published
weights, so that a stored configuration is read and written unchanged.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

Activation = Literal["gelu", "gelu_new", "relu", "silu", "tanh"]

PRESETS: dict[str, dict[str, Any]] = {
    #         width            blocks per level
    "T": {"embed_dim": 48, "depths": (4, 4, 4, 4)},  # 20.8 M parameters
    "S": {"embed_dim": 48, "depths": (8, 8, 8, 8)},  # 39.9 M, the "scOT from scratch" baseline
    "B": {"embed_dim": 96, "depths": (8, 8, 8, 8)},  # 157.7 M
    "L": {"embed_dim": 192, "depths": (8, 8, 8, 8)},  # 628.6 M
}
_PUBLISHED = {
    "image_size": 128,
    "num_channels": 4,
    "num_out_channels": 4,
    "num_heads": (3, 6, 12, 24),
    "skip_connections": (2, 2, 2, 0),
    "window_size": 16,
    "drop_path_rate": 0.0,
    "channel_slice_list_normalized_loss": (0, 1, 3, 4),
    "use_conditioning": True,
}


@dataclass(frozen=True, kw_only=True)
class ScOTConfig:
    """Architecture of scOT and the loss it computes (Poseidon, arXiv 2405.19101, section 2).

    Without slots, because jsonargparse reads instances through their ``__dict__``.
    """

    image_size: int | tuple[int, int] = 224
    """Grid the network works on: N for N x N points, or (H, W). Other inputs are resampled spectrally."""
    patch_size: int = 4
    """Side of the square patches that become tokens."""
    num_channels: int = 3
    """Input channels."""
    num_out_channels: int = 1
    """Output channels."""
    embed_dim: int = 96
    """Width of the finest level; every coarser level doubles it."""
    depths: tuple[int, ...] = (2, 2, 6, 2)
    """Swin blocks per level, fine to coarse; encoder and decoder both have that many."""
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    """Attention heads per level."""
    skip_connections: tuple[int, ...] = (1, 1, 1, 0)
    """Convolutional blocks on the skip connection of each level; 0 passes the tokens through."""
    window_size: int = 7
    """Side of the attention windows in tokens, clipped to the grid of a level."""
    mlp_ratio: float = 4.0
    """Hidden width of the feed-forward layers relative to their input."""
    qkv_bias: bool = True
    """Give query and value projections a bias (keys never have one)."""
    hidden_dropout_prob: float = 0.0
    """Dropout after the embedding and the feed-forward layers."""
    attention_probs_dropout_prob: float = 0.0
    """Dropout on attention probabilities and after the attention output."""
    drop_path_rate: float = 0.1
    """Largest stochastic-depth rate, reached linearly from 0 over encoder then decoder blocks."""
    hidden_act: Activation = "gelu"
    """Activation of the feed-forward layers; ``gelu`` is the exact one."""
    use_absolute_embeddings: bool = False
    """Add a learned position embedding, which ties the network to one resolution."""
    use_mask_token: bool = False
    """Learn a token that replaces the patches marked in ``bool_masked_pos``."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights."""
    layer_norm_eps: float = 1e-5
    """Epsilon of the norms in Swin and ConvNeXt blocks; all other norms use 1e-5."""
    p: int = 1
    """Exponent of the loss: 1 for mean absolute, 2 for mean squared error."""
    channel_slice_list_normalized_loss: tuple[int, ...] | None = None
    """Boundaries of channel groups with a relative loss each, e.g. (0, 1, 3, 4); None for the plain loss."""
    residual_model: Literal["convnext", "resnet"] = "convnext"
    """Blocks on the skip connections."""
    use_conditioning: bool = False
    """Let the lead time modulate all norms. Without it the network ignores time."""
    learn_residual: bool = False
    """Predict the change of the first input channels; has an effect only with ``use_conditioning``."""
    pretrained_window_sizes: tuple[int, ...] | None = None
    """Windows per level that position offsets are scaled by; 0 or None: the actual window (Swin v2, 3.3)."""

    def __post_init__(self) -> None:
        """Bring sequences into tuples of ints and refuse what no network can be built from."""
        for name in ("depths", "num_heads", "skip_connections"):
            object.__setattr__(self, name, tuple(int(n) for n in getattr(self, name)))
        for name in ("channel_slice_list_normalized_loss", "pretrained_window_sizes"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(int(n) for n in getattr(self, name)))
        if not isinstance(self.image_size, int):
            object.__setattr__(self, "image_size", tuple(int(n) for n in self.image_size))
        _check_sizes(self)
        _check_levels(self)
        _check_loss(self)

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width of the grid the network works on."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size

    @property
    def num_levels(self) -> int:
        """Number of resolution levels."""
        return len(self.depths)

    @property
    def widths(self) -> tuple[int, ...]:
        """Token width per level."""
        return tuple(self.embed_dim * 2**i for i in range(self.num_levels))

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """Token grid (rows, columns) per level; odd grids are padded before they are halved."""
        rows, cols = (-(-n // self.patch_size) for n in self.image_shape)
        return tuple((-(-rows // 2**i), -(-cols // 2**i)) for i in range(self.num_levels))

    @property
    def windows(self) -> tuple[tuple[int, int], ...]:
        """Attention window (rows, columns) per level, clipped to the grid rounded down."""
        rows, cols = (n // self.patch_size for n in self.image_shape)
        clip = [
            [max(1, min(self.window_size, n // 2**i)) for n in (rows, cols)] for i in range(self.num_levels)
        ]
        return tuple((h, w) for h, w in clip)

    @property
    def shifts(self) -> tuple[tuple[int, int], ...]:
        """Displacement (rows, columns) of windows in every second block; 0 where one window covers all."""
        rows, cols = (n // self.patch_size for n in self.image_shape)
        shift = self.window_size // 2
        return tuple(
            (shift * (rows // 2**i > h), shift * (cols // 2**i > w)) for i, (h, w) in enumerate(self.windows)
        )

    @classmethod
    def preset(cls, name: str, **changes: Any) -> ScOTConfig:
        """Published size ``T``, ``S``, ``B`` or ``L`` (4 channels on 128 x 128), with changes.

        Raises:
            ValueError: for an unknown size or an unknown field.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown scOT size {name!r}; known: {', '.join(PRESETS)}")
        _check_names(changes)
        return cls(**{**_PUBLISHED, **PRESETS[name], **changes})

    def replace(self, **changes: Any) -> ScOTConfig:
        """Copy with some fields changed; an unknown name raises ValueError with the nearest known ones."""
        _check_names(changes)
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_json(cls, source: str | os.PathLike[str] | dict[str, Any]) -> ScOTConfig:
        """Read a ``config.json`` (or its parsed content), ignoring the keys that only its writer needs.

        Hub files carry derived and library-specific keys (``hidden_size``, ``architectures``,
        ``transformers_version``, ...). Boolean skip connections count as one block.
        """
        values = source if isinstance(source, dict) else _read_json(Path(source))
        known = {f.name: values[f.name] for f in dataclasses.fields(cls) if f.name in values}
        sizes = known.get("pretrained_window_sizes")
        if sizes is not None and not any(sizes):  # written with four entries whatever the depth
            known["pretrained_window_sizes"] = None
        # The reference default names one skip fewer than there are levels: the bottleneck has none.
        skips = known.get("skip_connections")
        if skips is not None and "depths" in known and len(skips) == len(known["depths"]) - 1:
            known["skip_connections"] = [*skips, 0]
        return cls(**known)

    def to_json(self) -> dict[str, Any]:
        """Content of ``config.json`` as users of the published weights know it."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        if not self.use_mask_token:
            del values["use_mask_token"]
        values["pretrained_window_sizes"] = self.pretrained_window_sizes or (0,) * 4
        values |= {
            "architectures": ["ScOT"],
            "hidden_size": self.widths[-1],
            "model_type": "swinv2",
            "num_layers": self.num_levels,
            "torch_dtype": "float32",
        }
        return {k: list(v) if isinstance(v, tuple) else v for k, v in sorted(values.items())}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}, expected an object with scOT fields")
    return values


def _check_names(changes: dict[str, Any]) -> None:
    known = [f.name for f in dataclasses.fields(ScOTConfig)]
    for name in changes:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
            raise ValueError(f"unknown scOT field {name!r}; did you mean {', '.join(near or known)}?")


def _check_sizes(c: ScOTConfig) -> None:
    if len(c.image_shape) != 2:
        raise ValueError(f"image_size must be one number or a pair (H, W), got {c.image_size!r}")
    positive = {"patch_size", "num_channels", "num_out_channels", "embed_dim", "window_size"}
    for name in sorted(positive):
        if getattr(c, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(c, name)}")
    if min(c.image_shape) < c.patch_size:
        raise ValueError(f"image_size {c.image_size} is smaller than one patch of {c.patch_size} points")
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"):
        if not 0 <= getattr(c, name) < 1:
            raise ValueError(f"{name} must lie in [0, 1), got {getattr(c, name)}")
    if c.use_absolute_embeddings and any(n % c.patch_size for n in c.image_shape):
        raise ValueError(
            f"absolute embeddings need image_size divisible by the patch: {c.image_size} / {c.patch_size}"
        )


def _check_levels(c: ScOTConfig) -> None:
    if not c.depths or min(c.depths) < 1:
        raise ValueError(f"depths needs at least one block on every level, got {c.depths}")
    for name in ("num_heads", "skip_connections", "pretrained_window_sizes"):
        values = getattr(c, name)
        if values is not None and len(values) != c.num_levels:
            raise ValueError(f"{name} needs one entry per level: {values} for depths {c.depths}")
    for width, heads in zip(c.widths, c.num_heads):
        if heads < 1 or width % heads:
            raise ValueError(f"width {width} (embed_dim {c.embed_dim}) is not divisible by {heads} heads")
    if min(c.skip_connections) < 0:
        raise ValueError(f"skip_connections must not be negative, got {c.skip_connections}")
    for name, allowed in (("residual_model", ("convnext", "resnet")), ("hidden_act", Activation.__args__)):
        if getattr(c, name) not in allowed:
            raise ValueError(f"{name} {getattr(c, name)!r} is unknown; known: {', '.join(allowed)}")


def _check_loss(c: ScOTConfig) -> None:
    if c.p not in (1, 2):
        raise ValueError(f"p must be 1 or 2, got {c.p}")
    if c.learn_residual and c.use_conditioning and c.num_out_channels > c.num_channels:
        raise ValueError(
            f"learn_residual adds {c.num_channels} input to {c.num_out_channels} output channels"
        )
    edges = c.channel_slice_list_normalized_loss
    if edges is None:
        return
    if len(edges) < 2 or any(b <= a for a, b in pairwise(edges)) or edges[0] < 0:
        raise ValueError(f"channel_slice_list_normalized_loss must increase, like (0, 1, 3, 4); got {edges}")
    if edges[-1] > c.num_out_channels:
        raise ValueError(
            f"channel_slice_list_normalized_loss {edges} exceeds num_out_channels {c.num_out_channels}"
        )
