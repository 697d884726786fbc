"""ShapesWorld: the grammar, what is held out, pictures, the exact detector, the data set."""

import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from thalweg.diffusion.metrics.geneval import TAGS, score_image, task_table
from thalweg.diffusion.rewards.shapes import shapes
from thalweg.diffusion.shapes.captions import (
    LENGTH,
    WORDS,
    draw,
    is_held_out,
    prompts,
    tokens,
)
from thalweg.diffusion.shapes.dataset import ShapesDataset
from thalweg.diffusion.shapes.detect import UNKNOWN, detect
from thalweg.diffusion.shapes.render import Thing, arrange, picture, render
from thalweg.diffusion.shapes.world import COLORS, GRID, SHAPES, mask

EVERY = [metadata for tag in TAGS for metadata in prompts(tag)]


def pictures(count: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Metadata and detections of clean renderings, all tasks in turn."""
    rng = np.random.default_rng(0)
    found = [draw(rng, [TAGS[i % len(TAGS)]], "all") for i in range(count)]
    return found, [detect(picture(metadata, rng)) for metadata in found]


def test_captions_of_the_six_tasks() -> None:
    counts = {tag: len(prompts(tag)) for tag in TAGS}
    assert counts == {
        "single_object": 4,
        "two_object": 12,
        "counting": 12,
        "colors": 24,
        "position": 48,
        "color_attr": 360,
    }
    known = {metadata["prompt"]: metadata for metadata in EVERY}
    assert len(known) == sum(counts.values())
    assert known["three crosses"] == {
        "tag": "counting",
        "include": [{"class": "cross", "count": 3}],
        "exclude": [{"class": "cross", "count": 4}],
        "prompt": "three crosses",
    }
    left = known["a circle left of a cross"]["include"]  # the object referred to comes first
    assert left == [
        {"class": "cross", "count": 1},
        {"class": "circle", "count": 1, "position": ["left of", 0]},
    ]
    both = known["a red circle and a blue square"]["include"]
    assert [(i["color"], i["class"]) for i in both] == [("red", "circle"), ("blue", "square")]


def test_the_vocabulary_has_25_words_and_all_of_them_are_used() -> None:
    assert len(WORDS) == len(set(WORDS)) == 25
    used = set(itertools.chain(*(tokens(metadata["prompt"]) for metadata in EVERY)))
    assert used == set(range(25))
    assert tokens("") == [0] * LENGTH
    assert [WORDS[i] for i in tokens("a red square")[:3]] == ["a", "red", "square"]


def test_a_fifth_of_the_combinations_is_held_out_with_both_orders_of_the_same_scene() -> None:
    held = {metadata["prompt"] for metadata in EVERY if is_held_out(metadata)}
    assert len(prompts("color_attr", "held_out")) == 72  # of 360
    assert len(prompts("position", "held_out")) == 10  # of 48
    assert {m["tag"] for m in EVERY if is_held_out(m)} == {"position", "color_attr"}
    opposite = {"left": "right", "right": "left", "above": "below", "below": "above"}
    for prompt in held:
        words = prompt.split()
        if "and" in words:
            assert f"a {words[5]} {words[6]} and a {words[1]} {words[2]}" in held
        else:
            middle = [opposite.get(word, word) for word in words[2:-2]]
            assert " ".join(["a", words[-1], *middle, "a", words[1]]) in held
    for tag in TAGS:
        train, rest = prompts(tag, "train"), prompts(tag, "held_out")
        assert len(train) + len(rest) == len(prompts(tag))
        words = set(itertools.chain(*(m["prompt"].split() for m in train)))
        assert words == set(itertools.chain(*(m["prompt"].split() for m in prompts(tag))))


def test_clean_pictures_score_one_on_all_six_tasks() -> None:
    metadata, detections = pictures(1200)
    scores = [score_image(m, d) for m, d in zip(metadata, detections, strict=True)]
    assert {s.score for s in scores} == {1.0}
    for key in ("correct", "strict"):
        table = task_table([s[key] for s in scores], [m["tag"] for m in metadata])
        assert table.means == dict.fromkeys(TAGS, 1.0)
        assert set(table.counts.values()) == {200}
    assert {thing["score"] for d in detections for group in d.values() for thing in group} == {1.0}


def test_captions_of_other_pictures_score_low() -> None:
    metadata, detections = pictures(1200)
    order = np.random.default_rng(1).permutation(1200)
    scores = [score_image(m, detections[j], clip_counts=True) for m, j in zip(metadata, order, strict=True)]
    tags = [m["tag"] for m in metadata]
    assert task_table([s.strict for s in scores], tags).macro < 0.15
    assert task_table([s.score for s in scores], tags).macro < 0.35


def test_every_caption_can_be_drawn_and_is_understood() -> None:
    rng = np.random.default_rng(0)
    for metadata in EVERY:
        verdict = score_image(metadata, detect(picture(metadata, rng)))
        assert verdict.strict, f"{metadata['prompt']}: {verdict.reason}"
        assert verdict.correct


def test_the_detector_finds_what_was_drawn() -> None:
    rng = np.random.default_rng(3)
    for _ in range(100):
        cells = rng.permutation(GRID * GRID)[: rng.integers(1, 17)]
        things = [
            Thing(SHAPES[rng.integers(4)], COLORS[rng.integers(6)], int(c) // GRID, int(c) % GRID)
            for c in cells
        ]
        found = detect(render(things))
        drawn = Counter((t.shape, t.color, t.box) for t in things)
        seen = Counter((s, d["color"], tuple(d["box"])) for s, group in found.items() for d in group)
        assert seen == drawn


def test_the_detector_bears_noise_and_calls_strange_shapes_unknown() -> None:
    rng = np.random.default_rng(0)
    metadata = prompts("color_attr")[0]
    clean = picture(metadata, rng).astype(float)
    noisy = (clean + rng.normal(0, 12, clean.shape)).clip(0, 255).astype(np.uint8)
    assert score_image(metadata, detect(noisy)).strict
    bars = render([])
    bars[4:6, 2:30] = bars[2:10, 2:4] = (225, 45, 45)
    assert set(detect(bars)) == {UNKNOWN}
    assert detect(render([])) == {}


def test_masks_fill_their_box_in_one_piece_and_can_be_told_apart() -> None:
    for a, b in itertools.combinations(SHAPES, 2):
        assert (mask(a) & mask(b)).sum() / (mask(a) | mask(b)).sum() < 0.8
    for shape in SHAPES:
        assert mask(shape).any(axis=0).all()
        assert mask(shape).any(axis=1).all()
        assert (mask(shape) == mask(shape)[:, ::-1]).all()
        assert mask(shape, 14, 14).sum() == pytest.approx(4 * mask(shape).sum(), rel=0.2)


def test_the_data_set_is_a_function_of_seed_and_index() -> None:
    a, b = ShapesDataset(size=50, wrong=0.35), ShapesDataset(size=20, wrong=0.35)
    for i in (19, 0, 7):
        assert torch.equal(a[i]["image"], b[i]["image"])
        assert a[i]["metadata"] == b[i]["metadata"]
    other = ShapesDataset(size=20, seed=1, wrong=0.35)
    assert not all(torch.equal(other[i]["image"], b[i]["image"]) for i in range(20))
    example = a[0]
    assert example["image"].shape == (3, 32, 32)
    assert 0 <= float(example["image"].min()) < float(example["image"].max()) <= 1
    assert example["prompt"] == example["metadata"]["prompt"]
    with pytest.raises(IndexError):
        a[50]


def test_the_share_of_wrong_captions_and_the_parts_are_as_asked_for() -> None:
    def fitting(data: ShapesDataset) -> float:
        verdicts = []
        for i in range(len(data)):
            example = data[i]
            pixels = (example["image"] * 255).round().byte().permute(1, 2, 0).numpy()
            verdicts.append(score_image(example["metadata"], detect(pixels)).strict)
        return sum(verdicts) / len(verdicts)

    assert fitting(ShapesDataset(size=100)) == 1.0
    assert 0.5 < fitting(ShapesDataset(size=300, wrong=0.35)) < 0.8
    held = ShapesDataset(size=40, split="held_out", tags=("position", "color_attr"))
    assert all(is_held_out(held[i]["metadata"]) for i in range(40))
    train = ShapesDataset(size=300)
    assert not any(is_held_out(train[i]["metadata"]) for i in range(300))
    assert {train[i]["metadata"]["tag"] for i in range(300)} == set(TAGS)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: prompts("colours"), "no task 'colours', allowed: single_object"),
        (lambda: prompts("colors", "test"), "no part 'test', allowed: train"),  # type: ignore[arg-type]
        (lambda: draw(np.random.default_rng(0), ["counting"], "held_out"), "'counting' has no captions"),
        (lambda: tokens("a pink circle"), r"\['pink'\]"),
        (lambda: tokens("a a a a a a a a a a a"), "11 words, allowed: at most 10"),
        (lambda: mask("star"), "no shape 'star', allowed: circle"),
        (lambda: render([Thing("circle", "pink", 0, 0)]), "no colour 'pink', allowed: red"),
        (lambda: render([Thing("circle", "red", 4, 0)]), r"cell \(4, 0\)"),
        (
            lambda: arrange({"include": [{"class": "circle", "count": 17}]}, np.random.default_rng(0)),
            "17 objects",
        ),
        (lambda: detect(np.zeros((3, 32, 32), dtype=np.uint8)), r"\(3, 32, 32\) of uint8"),
        (lambda: ShapesDataset(size=1, wrong=1.5), "1.5, allowed: 0 to 1"),
        (lambda: ShapesDataset(size=-1), "size -1"),
    ],
)
def test_bad_input_is_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_what_is_right_in_everything_can_count_more() -> None:
    metadata = ShapesDataset(size=1, tags=("counting",))[0]["metadata"]
    images = torch.stack(
        [ShapesDataset(size=1, tags=("counting",))[0]["image"], torch.full((3, 32, 32), 0.2)]
    )
    plain, more = (shapes(strict_weight=w)(images, ["", ""], [metadata] * 2) for w in (0.0, 2.0))
    assert plain.scores.tolist() == [1.0, 0.0]
    assert more.scores.tolist() == [3.0, 0.0]
    assert more.parts["partial"].tolist() == plain.scores.tolist()
