"""Callbacks of online fine-tuning on a run of two epochs, and on numbers made up for them."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from nft_runs import fit, folder_of_pipeline
from PIL import Image

from thalweg.diffusion.nft.callbacks import EpochProgress, RewardHackGuard, SampleGrid

pytestmark = pytest.mark.filterwarnings("ignore:Found .* in eval mode")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nft")
    folder_of_pipeline(folder)
    return folder


def test_each_evaluation_leaves_a_picture(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = fit(home, epochs=2, callbacks=[SampleGrid(columns=2), EpochProgress()], num_sanity_val_steps=-1)
    files = sorted((home / "samples").glob("*.png"))
    assert [file.name for file in files] == [f"epoch_000{i}.png" for i in range(3)]
    pictures = []
    for file in files:
        with Image.open(file) as picture:
            pictures.append((picture.size, picture.tobytes()))
    assert len({size for size, _ in pictures}) == 1
    assert pictures[0] != pictures[2]  # the policy has changed
    assert "start/reward" in found.trainer.callback_metrics
    assert "2/2" in capsys.readouterr().err


class Run:
    """A trainer and a module that give a guard made-up evaluations."""

    def __init__(self, guard: RewardHackGuard) -> None:
        self.guard = guard
        self.trainer: Any = SimpleNamespace(sanity_checking=False, should_stop=False)

    def judge(self, reward: float, beauty: float) -> None:
        module = SimpleNamespace(judged={"reward": reward, "beauty": beauty})
        self.guard.on_validation_end(self.trainer, module)


def test_a_guard_warns_when_a_watched_reward_falls_while_the_trained_one_rises() -> None:
    run = Run(RewardHackGuard({"beauty": 0.1}, patience=2))
    run.judge(0.2, 1.0)
    run.judge(0.3, 0.95)  # within what is tolerated
    run.judge(0.4, 0.8)
    run.judge(0.1, 0.2)  # both fall: not a hack
    run.judge(0.5, 0.8)
    with pytest.warns(UserWarning, match=r"rose from 0\.2 to 0\.6, but beauty went from 1 to 0\.7"):
        run.judge(0.6, 0.7)
    assert not run.trainer.should_stop


def test_a_guard_can_stop_the_run_and_watch_for_a_rise() -> None:
    run = Run(RewardHackGuard({"beauty": -0.1}, patience=1, action="stop"))
    run.judge(0.2, 1.0)
    run.judge(0.3, 0.5)
    run.judge(0.3, 1.05)
    with pytest.warns(UserWarning, match="training stops"):
        run.judge(0.4, 1.2)
    assert run.trainer.should_stop


def test_a_guard_goes_on_where_it_was() -> None:
    first = Run(RewardHackGuard({"beauty": 0.1}, patience=2))
    first.judge(0.2, 1.0)
    first.judge(0.3, 0.5)
    second = Run(RewardHackGuard({"beauty": 0.1}, patience=2))
    second.guard.load_state_dict(first.guard.state_dict())
    with pytest.warns(UserWarning, match="went from 1 to"):
        second.judge(0.3, 0.5)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"watch": {}}, "watch is {}"),
        ({"watch": {"a": 0.1}, "patience": 0}, "patience is 0"),
        ({"watch": {"a": 0.1}, "action": "cry"}, "action is 'cry', allowed: warn, stop"),
    ],
)
def test_a_guard_is_told_something_sensible(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        RewardHackGuard(**options)


def test_a_guard_knows_which_rewards_there_are() -> None:
    run = Run(RewardHackGuard({"ugliness": 0.1}))
    with pytest.raises(ValueError, match="watches 'ugliness', allowed: beauty, reward"):
        run.judge(0.1, 0.1)
