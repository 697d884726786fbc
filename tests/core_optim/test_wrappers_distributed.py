"""SAM, EMA and the trajectory store in two processes equal one."""

from pathlib import Path

import pytest
import torch
import wrapper_processes
from wrapper_processes import Found, remember, train

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Found]]:
    folder: Path = tmp_path_factory.mktemp("processes")
    return wrapper_processes.run(folder)


@pytest.mark.parametrize("adaptive", [False, True])
def test_sam_and_averages_on_shards(found: list[dict[str, Found]], adaptive: bool) -> None:
    alone = train(False, slice(None), adaptive)
    for process in found:
        for name, weight in process[f"sam.{adaptive}"].items():
            torch.testing.assert_close(weight, alone[name], rtol=1e-5, atol=1e-6)


def test_the_store_finds_samples_that_other_processes_have_seen(found: list[dict[str, Found]]) -> None:
    alone = remember(0, 1)
    whole = {name: row for process in found for name, row in process["store"].items() if "." in name}
    assert whole.keys() == alone.keys()
    assert all(torch.equal(row, alone[name]) for name, row in whole.items())
    assert any(row[2] == 1.0 for row in whole.values())
    for process in found:
        assert torch.equal(process["store"]["alone"], process["store"]["again"])
        assert process["store"]["alone"][:, 1].max() == 3.0
