"""Suites: their prompts, pictures that are continued where they were stopped, and what tables are made of."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from thalweg.diffusion.metrics.geneval import TAGS, task_table
from thalweg.diffusion.nft.prompt_sets import geneval_prompts, to_jsonl
from thalweg.diffusion.order import generator
from thalweg.diffusion.rewards.base import Reward, RewardError, RewardResult
from thalweg.diffusion.rewards.registry import REWARDS, open_reward
from thalweg.diffusion.shapes.captions import is_held_out
from thalweg.diffusion.suites.known import SUITES, Item, items_of, rewards_of, suite_of
from thalweg.diffusion.suites.pictures import Arm, Picture, complete, pictures_of, settings_match
from thalweg.diffusion.suites.tables import MACRO, MICRO, Cell, cells, table_of


@pytest.mark.parametrize("suite", SUITES.values(), ids=SUITES)
def test_every_suite_names_rewards_of_the_registry_and_its_prompts(suite: Any) -> None:
    assert set(suite.rewards) <= set(REWARDS)
    assert suite.samples >= 1
    if suite.make is None:
        with pytest.raises(ValueError, match=r"needs --prompts FILE; the published one is dataset/\w+/test"):
            items_of(suite)
    else:
        assert len(items_of(suite)) >= suite.count * 0.8


def test_captions_of_shapesworld_are_balanced_and_some_are_held_out() -> None:
    items = items_of(suite_of("shapes"), seed=3)
    parts = {split: [item for item in items if item.split == split] for split in ("train", "held_out")}
    assert [item.index for item in items] == list(range(320))
    assert Counter(item.tag for item in parts["train"]) == dict.fromkeys(TAGS, 40)
    assert Counter(item.tag for item in parts["held_out"]) == {"position": 40, "color_attr": 40}
    assert all(is_held_out(dict(item.metadata)) for item in parts["held_out"])
    assert not any(is_held_out(dict(item.metadata)) for item in parts["train"])
    assert items == items_of(suite_of("shapes"), seed=3)
    assert items != items_of(suite_of("shapes"))


def test_prompts_of_genevals_grammar_are_different_ones_of_all_tasks() -> None:
    items = items_of(suite_of("geneval"), None, 120)
    assert len({item.text for item in items}) == len(items)
    counts = Counter(item.tag for item in items)
    assert set(counts) == set(TAGS)
    assert all(15 <= count <= 20 for count in counts.values())


def test_lines_of_a_file_that_are_equal_are_one_prompt(tmp_path: Path) -> None:
    prompts = geneval_prompts(6, seed=0)
    path = tmp_path / "test_metadata.jsonl"
    path.write_text(to_jsonl([prompts[i] for i in (0, 1, 0, 2, 1, 3, 4, 5)]))
    items = items_of(suite_of("geneval"), path)
    assert [item.text for item in items] == [prompt.text for prompt in prompts]
    assert [item.metadata for item in items] == [prompt.metadata for prompt in prompts]
    assert items_of(suite_of("geneval"), path, 2) == items[:2]


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("geneval", "a photo of a dog", "has no task of GenEval; needed: a .jsonl file"),
        ("shapes", "a circle", "has no task of GenEval"),
        ("ocr", "a sign", "needs a text in double quotes"),
    ],
)
def test_prompts_that_cannot_be_judged_are_refused_at_once(
    name: str, line: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text(line + "\n")
    with pytest.raises(ValueError, match=message):
        items_of(suite_of(name), path)


def test_other_numbers_and_names_are_refused() -> None:
    with pytest.raises(ValueError, match="suite is 'imagenet', allowed: geneval, ocr, drawbench"):
        suite_of("imagenet")
    with pytest.raises(ValueError, match="num_prompts is 0"):
        items_of(suite_of("shapes"), None, 0)
    with pytest.raises(ValueError, match="samples_per_prompt is 0"):
        pictures_of([], 0)


def test_a_users_rewards_come_after_the_suites_and_give_them_options() -> None:
    given = {"clipscore": {"folder": "a"}, "shapes": {"reference_quirks": True}, "saturation": None}
    assert rewards_of(suite_of("shapes"), given) == {
        "shapes": {"reference_quirks": True},
        "clipscore": {"folder": "a"},
        "saturation": {},
    }
    assert rewards_of(suite_of("geneval"), {"geneval": {"weights": "w"}}) == {
        "geneval": {"detector": "mask2former", "weights": "w"}
    }
    with pytest.raises(ValueError, match=r"drawbench has no reward of its own.*imagereward, pickscore"):
        rewards_of(suite_of("drawbench"), {})


ITEMS = [Item(index=i, text=f"prompt {i}", metadata={"tag": TAGS[i % 3]}) for i in range(5)]
PICTURES = pictures_of(ITEMS, 2)


class Brush:
    """Draws noise by prompt and number, and fails in a batch that it is told of."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.calls, self.fails_at = 0, fails_at

    def __call__(self, pictures: Sequence[Picture]) -> list[Image.Image]:
        if self.calls == self.fails_at:
            raise KeyboardInterrupt
        self.calls += 1
        drawn = [torch.rand(6, 7, 3, generator=generator(p.item.index, p.copy)) for p in pictures]
        return [Image.fromarray((255 * image).byte().numpy()) for image in drawn]


class Sum:
    """A reward whose part applies to every second picture only; fails where it is told to."""

    def __init__(self, name: str = "sum", fails: bool = False) -> None:
        self.name, self.fails, self.calls = name, fails, 0

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Any]) -> RewardResult:
        self.calls += 1
        if self.fails and self.calls == 2:
            raise RewardError("the server is gone")
        total = images.double().sum((1, 2, 3))
        half = torch.where(torch.arange(len(total)) % 2 == 0, total / 2, math.nan)
        return RewardResult(scores=total, parts={"half": half, "correct/position": total})


def run(folder: Path, draw: Any, rewards: dict[str, Reward]) -> Arm:
    arm = Arm(folder=folder, name="pictures")
    assert sum(complete(arm, PICTURES, draw, rewards, 4)) == len(PICTURES)
    return arm


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_scores_are_those_of_the_files_and_lines_say_whose(tmp_path: Path) -> None:
    arm = run(tmp_path, Brush(), {"sum": Sum()})
    rows = [json.loads(line) for line in arm.scores_file.read_text().splitlines()]
    assert [(row["index"], row["copy"]) for row in rows] == [(i, k) for i in range(5) for k in range(2)]
    for row, picture in zip(rows, PICTURES, strict=True):
        with Image.open(tmp_path / "pictures" / row["file"]) as image:
            pixels = np.asarray(image)
        assert row["scores"]["sum"] == pytest.approx(pixels.sum() / 255)
        assert set(row["scores"]) == {"sum", "sum/half"}  # those of tasks follow from the tags
        assert (row["scores"]["sum/half"] is None) == (picture.copy == 1)
    assert arm.read(PICTURES) == [row["scores"] for row in rows]


@pytest.mark.parametrize("batch", [0, 1, 2])
def test_what_was_stopped_while_drawing_ends_with_the_same_bytes(batch: int, tmp_path: Path) -> None:
    whole = run(tmp_path / "a", Brush(), {"sum": Sum()})
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", Brush(fails_at=batch), {"sum": Sum()})
    brush = Brush()
    run(tmp_path / "b", brush, {"sum": Sum()})
    assert brush.calls == 3 - batch
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert len(files(whole.folder)) == len(PICTURES) + 1


def test_what_was_stopped_while_scoring_is_not_drawn_again(tmp_path: Path) -> None:
    run(tmp_path / "a", Brush(), {"sum": Sum()})
    with pytest.raises(RewardError, match="the server is gone"):
        run(tmp_path / "b", Brush(), {"sum": Sum(fails=True)})
    brush = Brush()
    run(tmp_path / "b", brush, {"sum": Sum()})
    assert brush.calls == 1
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_a_batch_with_a_lost_picture_is_drawn_again_as_a_whole(tmp_path: Path) -> None:
    arm = run(tmp_path, Brush(), {"sum": Sum()})
    before = files(tmp_path)
    arm.path(PICTURES[5]).unlink()
    brush, reward = Brush(), Sum()
    run(tmp_path, brush, {"sum": reward})
    assert (brush.calls, reward.calls) == (1, 0)
    assert files(tmp_path) == before


def test_more_rewards_score_pictures_that_are_there(tmp_path: Path) -> None:
    both: dict[str, Reward] = {"saturation": open_reward("saturation"), "sum": Sum()}
    run(tmp_path / "a", Brush(), both)
    run(tmp_path / "b", Brush(), {"sum": Sum()})
    brush, again = Brush(), Sum()
    run(tmp_path / "b", brush, {**both, "sum": again})
    assert (brush.calls, again.calls) == (0, 0)
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_broken_files_are_named(tmp_path: Path) -> None:
    arm = run(tmp_path, Brush(), {"sum": Sum()})
    arm.path(PICTURES[0]).write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"00000_00.png is no picture \(.*\); delete it"):
        arm.load(PICTURES[0])
    arm.scores_file.write_text('{"file": "a", "scores": {}}\n{"fi')
    with pytest.raises(ValueError, match=r"pictures.jsonl, line 2: .*; delete it"):
        arm.read(PICTURES)


def test_a_folder_takes_the_same_settings_and_more_rewards_only(tmp_path: Path) -> None:
    path = tmp_path / "suite.json"
    now: dict[str, Any] = {"steps": 4, "size": (8, 8), "rewards": {"a": {}}}
    settings_match(path, now)
    path.write_text(json.dumps(now))
    settings_match(path, now)
    settings_match(path, {**now, "rewards": {"a": {}, "b": {}}})
    settings_match(path, {**now, "rewards": {}})
    with pytest.raises(ValueError, match="whose steps is 4, not 5; choose another --out"):
        settings_match(path, {**now, "steps": 5})
    with pytest.raises(ValueError, match=r"whose reward a is \{\}, not \{'x': 1\}"):
        settings_match(path, {**now, "rewards": {"a": {"x": 1}}})
    path.write_text("{")
    with pytest.raises(ValueError, match="holds no settings"):
        settings_match(path, now)


def numbers(seed: int) -> list[dict[str, float | None]]:
    drawn = np.random.default_rng(seed).random(len(PICTURES))
    return [{"r": float(v), "r/part": None if i == 3 else float(v) ** 2} for i, v in enumerate(drawn)]


def test_tables_have_the_means_by_task_and_over_both() -> None:
    scores = numbers(0)
    known = table_of(cells(PICTURES, scores))
    expected = task_table([row["r"] or 0.0 for row in scores], [p.item.tag for p in PICTURES])
    for tag, mean in expected.means.items():
        cell = known["r", "test", tag]
        assert (cell.value, cell.pictures) == (pytest.approx(mean), expected.counts[tag])
    assert known["r", "test", MACRO].value == pytest.approx(expected.macro)
    assert known["r", "test", MICRO].value == pytest.approx(expected.micro)
    assert [task for metric, _, task in known if metric == "r"] == [*TAGS[:3], MACRO, MICRO]
    assert known["r/part", "test", MICRO].pictures == len(PICTURES) - 1
    values = np.array([row["r"] for row in scores])
    assert known["r", "test", MICRO].error == pytest.approx(values.std(ddof=1) / math.sqrt(10))
    errors = [known["r", "test", tag].error for tag in TAGS[:3]]
    assert known["r", "test", MACRO].error == pytest.approx(math.hypot(*errors) / 3)  # type: ignore[arg-type]


def test_differences_are_paired() -> None:
    before = numbers(1)
    after = [{"r": (row["r"] or 0.0) + 0.25} for row in before]
    cell = table_of(cells(PICTURES, after, before))["r", "test", MICRO]
    assert cell.difference == pytest.approx(0.25)
    assert cell.difference_error == pytest.approx(0.0, abs=1e-12)
    assert cell.error is not None
    assert cell.error > 0.05
    assert cell.before == pytest.approx(cell.value - 0.25)
    unknown = table_of(cells(PICTURES, after, [{} for _ in before]))["r", "test", MICRO]
    assert (unknown.before, unknown.difference, unknown.difference_error) == (None, None, None)


def test_parts_of_a_suite_and_prompts_without_tasks_have_columns_of_their_own() -> None:
    items = [Item(index=i, text="x", split="ab"[i // 2]) for i in range(3)]
    found = cells(pictures_of(items, 1), [{"r": v} for v in (1.0, 2.0, 6.0)])
    assert [(c.split, c.task, c.value, c.pictures) for c in found] == [
        ("a", "all", 1.5, 2),
        ("b", "all", 6.0, 1),
    ]
    assert found[1] == Cell(metric="r", split="b", task="all", pictures=1, value=6.0, error=None)
