"""What the relatives of Adam share: two moments and their corrections for the start at 0."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from thalweg.core_optim.engine.rule import LIKE, ElementRule, StateSpec, bias_corrections


class Adam(ElementRule):
    """A rule with the moments of Adam; the correction of the first scales the step."""

    state_size = "2"

    def states(self, shape: torch.Size, o: Mapping[str, Any]) -> dict[str, StateSpec]:
        """Two moments."""
        return {"exp_avg": LIKE, "exp_avg_sq": LIKE}

    def scalars(self, t: int, o: Mapping[str, Any]) -> dict[str, float]:
        """Bias corrections; that of the first moment scales the step."""
        found = bias_corrections(t, o)
        return {"root_bias2": found["root_bias2"], "step_scale": 1.0 / found["bias1"]}
