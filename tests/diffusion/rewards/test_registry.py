"""Rewards: the registry, what every one of them has to give, weighted sums, and errors with a name."""

import importlib
import inspect
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from golden import golden_files
from torch import Tensor

from thalweg.diffusion.rewards.base import RewardError, RewardResult, as_bytes, checked, evaluate
from thalweg.diffusion.rewards.registry import REWARDS, WeightedSum, combine, open_reward, open_rewards
from thalweg.diffusion.shapes.dataset import ShapesDataset

GOLDEN = json.loads(golden_files("nft", "rewards.json")[0].read_text())
WITHOUT_WEIGHTS = ("jpeg_compressibility", "jpeg_incompressibility", "shapes", "saturation", "smoothness")
MESSAGES = {
    "geneval": "needs 'detector'",
    "ocr": "thalweg\\[ocr\\]",
    "clipscore": "openai/clip-vit-large-patch14",
    "pickscore": "yuvalkirstain/PickScore_v1",
    "hpsv2": "HPS_v2.1_compressed.pt",
    "imagereward": "ImageReward.pt",
    "aesthetic": "sac\\+logos\\+ava1-l14-linearMSE.pth",
    "unifiedreward": "needs 'url'",
    "remote": "needs 'url'",
}
"""What errors say of the rewards that need something."""


def batch(count: int = 6) -> tuple[Tensor, list[str], list[Any]]:
    data = ShapesDataset(size=count, seed=2)
    examples = [data[i] for i in range(count)]
    images = torch.stack([e["image"] for e in examples])
    return images, [e["prompt"] for e in examples], [e["metadata"] for e in examples]


class Constant:
    """Gives the same scores, whatever it sees."""

    name = "constant"

    def __init__(self, scores: Any, **parts: Any) -> None:
        self.result = RewardResult(scores=scores, parts=parts)

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[str], metadata: Sequence[Any]) -> RewardResult:
        return self.result


def test_every_reward_is_tested_here_and_says_where_weights_come_from() -> None:
    assert set(REWARDS) == {*WITHOUT_WEIGHTS, *MESSAGES}
    for name, reference in REWARDS.items():
        module, function = reference.split(":")
        factory = getattr(importlib.import_module(module), function)
        assert next(iter(inspect.signature(factory).parameters)) == "device", name
        assert inspect.getdoc(factory), name
        if name in ("clipscore", "pickscore", "hpsv2", "imagereward", "aesthetic"):
            assert "Weights:" in inspect.getdoc(factory), name
            assert "icence" in inspect.getdoc(factory), name


@pytest.mark.parametrize("name", WITHOUT_WEIGHTS)
def test_scores_are_finite_and_do_not_depend_on_the_rest_of_the_batch(name: str) -> None:
    images, prompts, metadata = batch()
    reward = open_reward(name)
    assert reward.name == name
    whole = evaluate(reward, images, prompts, metadata)
    assert whole.scores.dtype == torch.float64
    for i in range(len(prompts)):
        alone = evaluate(open_reward(name), images[i : i + 1], prompts[i : i + 1], metadata[i : i + 1])
        assert torch.equal(alone.scores, whole.scores[i : i + 1])
    assert not whole.scores.requires_grad
    again = evaluate(reward, images.requires_grad_(), prompts, metadata)
    assert torch.equal(again.scores, whole.scores)


@pytest.mark.parametrize("name", MESSAGES)
def test_a_reward_without_what_it_needs_says_so_in_one_error(name: str) -> None:
    if name == "ocr" and importlib.util.find_spec("rapidocr"):
        pytest.skip("rapidocr is installed")
    with pytest.raises(RewardError, match=MESSAGES[name]):
        open_reward(name)


@pytest.mark.parametrize("case", GOLDEN["multi_reward"], ids=lambda c: "-".join(c["weights"]))
def test_sums_of_raw_scores_are_golden(case: dict[str, Any]) -> None:
    results = {k: RewardResult(scores=torch.tensor(v).double()) for k, v in case["components"].items()}
    found = combine(results, case["weights"])
    assert found.scores.tolist() == pytest.approx(case["result"]["avg"], rel=1e-6, abs=1e-9)
    for name in case["weights"]:
        assert found.parts[name].tolist() == pytest.approx(case["result"][name], rel=1e-6)


def test_images_become_bytes_as_in_the_golden_table() -> None:
    table = GOLDEN["to_uint8"]
    for dtype in (torch.float32, torch.float64):
        x = torch.tensor(table["x"], dtype=dtype).view(1, 1, 1, -1).expand(1, 3, 1, -1)
        assert as_bytes(x)[0, 0, :, 1].tolist() == table["value"]
    assert as_bytes(torch.zeros(2, 3, 4, 5)).shape == (2, 4, 5, 3)


def test_a_configuration_names_rewards_weights_and_options() -> None:
    images, prompts, metadata = batch()
    both = open_rewards(
        {
            "shapes": {"weight": 2},
            "quirky": {"reward": "shapes", "reference_quirks": True, "weight": 0},
            "saturation": {"weight": 0.5},
        }
    )
    found = evaluate(both, images, prompts, metadata)
    assert torch.allclose(found.scores, 2.0 + 0.5 * found.parts["saturation"])
    assert "shapes/strict/counting" in found.parts
    tags = [m["tag"] for m in metadata]
    expected = [1.0 if tag == "counting" else math.nan for tag in tags]
    assert found.parts["shapes/strict/counting"].tolist() == pytest.approx(expected, nan_ok=True)


def test_pixels_and_shapes_give_what_they_should() -> None:
    images, prompts, metadata = batch()
    grey, red = torch.full((1, 3, 8, 8), 0.5), torch.zeros(1, 3, 8, 8)
    red[:, 0] = 1
    args = ([""], [{}])
    assert evaluate(open_reward("saturation"), grey, *args).scores.item() == 0
    assert evaluate(open_reward("saturation"), red, *args).scores.item() == 1
    assert evaluate(open_reward("smoothness"), grey, *args).scores.item() == 0
    stripes = torch.zeros(1, 3, 8, 8)
    stripes[..., ::2] = 1
    assert evaluate(open_reward("smoothness"), stripes, *args).scores.item() == -1
    clean = evaluate(open_reward("shapes"), images, prompts, metadata)
    assert clean.scores.tolist() == [1.0] * 6
    assert clean.parts["unknown"].tolist() == [0.0] * 6
    same = open_reward("geneval", detector="thalweg.diffusion.rewards.shapes:detector")
    assert torch.equal(evaluate(same, images, prompts, metadata).scores, clean.scores)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (
            RewardResult(scores=torch.tensor([0.0, math.nan])),
            "'constant' gave nan for 1 of 2 .* image 1 of .*'b'",
        ),
        (RewardResult(scores=torch.tensor([math.inf, 0.0])), "gave inf"),
        (RewardResult(scores=torch.zeros(3)), r"shape \(3,\) for 2 images"),
        (RewardResult(scores=torch.zeros(2, 1)), r"shape \(2, 1\)"),
        (RewardResult(scores=torch.zeros(2), parts={"p": torch.zeros(1)}), r"part 'p' of shape \(1,\)"),
        (torch.zeros(2), "gave a Tensor, needed: a RewardResult"),
        (None, "gave a NoneType"),
    ],
)
def test_results_that_are_no_rewards_are_refused(result: Any, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        checked("constant", result, ["a", "b"])


def test_parts_may_be_absent_and_scores_of_numpy_are_taken() -> None:
    found = checked("x", RewardResult(scores=np.array([1.0, 2.0]), parts={"p": [math.nan, 1.0]}), ["a", "b"])
    assert found.scores.tolist() == [1.0, 2.0]
    assert math.isnan(found.parts["p"][0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: open_reward("clip"), "'clip' is unknown, allowed: jpeg_compressibility"),
        (lambda: open_reward("no.such.module:f"), "cannot be imported"),
        (lambda: open_reward("math:no_such"), "cannot be imported"),
        (lambda: open_reward("saturation", strength=2), r"\['strength'\]"),
        (lambda: WeightedSum(rewards={}, weights={}), r"rewards \[\]"),
        (
            lambda: WeightedSum(rewards={"a": Constant([1])}, weights={"b": 1}),
            r"\['a'\] with weights of \['b'\]",
        ),
        (lambda: combine({}, {}), "no reward to add"),
        (
            lambda: open_reward("geneval", detector="math:no"),
            "'math:no' is none of mask2former, shapes, remote",
        ),
        (lambda: evaluate(Constant([1.0]), torch.zeros(1, 1, 8, 8), [""], [{}]), r"\(1, 1, 8, 8\)"),
        (lambda: evaluate(Constant([1.0]), torch.zeros(1, 3, 8, 8).byte(), [""], [{}]), "uint8"),
        (lambda: evaluate(Constant([1.0]), torch.zeros(1, 3, 8, 8), [], [{}]), "1 images, 0 prompts"),
    ],
)
def test_bad_input_is_named(call: Any, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        call()


def test_metadata_of_no_task_is_named() -> None:
    images, prompts, _ = batch(2)
    with pytest.raises(RewardError, match="'shapes': metadata of GenEval without 'tag'"):
        evaluate(open_reward("shapes"), images, prompts, [{"prompt": p} for p in prompts])
