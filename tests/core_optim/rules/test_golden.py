"""Element rules follow the reference trajectories in every kernel.

The matrix rules have files of their own, since some need their random draws prescribed.
"""

from pathlib import Path

import pytest
from golden_trajectory import follow, load, trajectories

from thalweg.core_optim.engine.rule import ElementRule
from thalweg.core_optim.registry import CLASSES, rule

FILES = [
    path
    for path in trajectories("*.safetensors")
    if load(path)[0]["kind"] == "trajectory"
    and load(path)[0]["optimizer"] in CLASSES
    and isinstance(rule(CLASSES[load(path)[0]["optimizer"]]), ElementRule)
]


@pytest.mark.parametrize("kernel", ["loop", "foreach"])
@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_follows_the_reference(path: Path, kernel: str) -> None:
    entry, data = load(path)
    assert follow({**entry, "kwargs": {**entry["kwargs"], "kernel": kernel}}, data) <= 1.0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")
@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_compiled_follows_the_reference(path: Path) -> None:
    entry, data = load(path)
    assert follow({**entry, "kwargs": {**entry["kwargs"], "compile": True}}, data) <= 1.0


def test_every_element_rule_has_a_trajectory_or_an_equal() -> None:
    """AdamW and SGD are compared with torch, CAdamW and AdamMini with what they are made of."""
    covered = {load(path)[0]["optimizer"] for path in FILES}
    assert {
        "AdaBelief",
        "DiffGrad",
        "AdamP",
        "SGDSaI",
        "Lion",
        "MARS",
        "NAdamW",
        "ScheduleFreeAdamW",
    } <= covered
