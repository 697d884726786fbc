import pytest
from golden_trajectory import follow, load, trajectories


@pytest.mark.parametrize("path", trajectories("soap_*.safetensors"), ids=lambda path: path.stem)
def test_golden_trajectory(path) -> None:
    assert follow(*load(path)) < 1.0
