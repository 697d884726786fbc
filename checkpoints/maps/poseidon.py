"""From published and trained scOT layouts to the names of ``thalweg.pde.poseidon.ScOT``.

The canonical names are those of the published configuration files' layout, e.g.
``encoder.layers.0.blocks.0.attention.self.query.weight``. Rules are strings, no model is imported.
"""

from __future__ import annotations

from thalweg.checkpoints.keymap import Drop, KeyMap, Rename, Rule

RULES: tuple[Rule, ...] = (
    # torch.compile wraps whole models or single blocks, so its mark may sit anywhere in a name.
    Rename(pattern=r"(?<![^.])_orig_mod\.", to=""),
    # Wrappers of data-parallel training, of LightningModules and of the older hub class.
    Rename(pattern=r"^(?:(?:module|model|network|swinv2)\.)+", to=""),
    # Older files call the layer scale of ConvNeXt skip blocks gamma.
    Rename(
        pattern=r"^(residual_blocks\.\d+\.\d+)\.gamma$",
        to=r"\1.weight",
        back=(r"^(residual_blocks\.\d+\.\d+)\.weight$", r"\1.gamma"),
    ),
    Drop(
        pattern=r"\.(?:relative_coords_table|relative_position_index)$",
        reason="table that the model computes from its window size",
    ),
)
"""Ordered rules; reading them backwards writes the older layer-scale names."""

MAP = KeyMap(RULES)
"""The rules, ready to apply."""
