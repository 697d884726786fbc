"""GenEval's detector: preparation, scores and boxes by hand, colours, and the reward with both."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from thalweg.diffusion.metrics.colors import TEMPLATES, ColorClassifier, crop
from thalweg.diffusion.metrics.geneval import COLORS, score_image
from thalweg.diffusion.metrics.mask2former import (
    MEAN,
    STD,
    Mask2FormerDetector,
    at_size,
    boxes_of,
    instances,
    prepare,
    resized,
)
from thalweg.diffusion.nft.prompt_sets import CLASSES
from thalweg.diffusion.rewards.base import RewardError, evaluate
from thalweg.diffusion.rewards.registry import open_reward
from thalweg.diffusion.rewards.server import serving


@pytest.mark.parametrize(
    ("size", "seen"),
    [
        ((512, 512), (800, 800)),
        ((480, 640), (800, 1067)),
        ((1024, 1024), (800, 800)),
        ((300, 900), (444, 1333)),
    ],
)
def test_sides_are_those_of_the_published_program(size: tuple[int, int], seen: tuple[int, int]) -> None:
    assert resized(*size) == seen
    pixels = np.full((*size, 3), 128, dtype=np.uint8)
    x = prepare(pixels)
    assert x.shape == (1, 3, -(-seen[0] // 32) * 32, -(-seen[1] // 32) * 32)
    assert (x[..., seen[0] :, :] == 0).all()
    assert (x[..., seen[1] :] == 0).all()
    inside = x[0, :, : seen[0], : seen[1]]
    for channel, mean, std in zip(inside, MEAN, STD, strict=True):
        assert torch.allclose(channel, torch.tensor((128 - mean) / std))


def test_the_flag_exchanges_red_and_blue_before_the_means() -> None:
    pixels = np.zeros((64, 64, 3), dtype=np.uint8)
    pixels[..., 0] = 255
    right, swapped = (prepare(pixels, flag)[0, :, 0, 0] for flag in (False, True))
    assert torch.allclose(
        right, torch.tensor([(255 - MEAN[0]) / STD[0], -MEAN[1] / STD[1], -MEAN[2] / STD[2]])
    )
    assert torch.allclose(
        swapped, torch.tensor([-MEAN[0] / STD[0], -MEAN[1] / STD[1], (255 - MEAN[2]) / STD[2]])
    )


def logits(probability: float) -> float:
    return float(np.log(probability / (1 - probability)))


def test_scores_are_probabilities_times_the_mean_inside_the_mask() -> None:
    # two queries, two classes and no object
    classes = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]]).log()
    masks = torch.full((2, 4, 5), logits(0.2))
    masks[0, 1:3, 2:4] = torch.tensor([[logits(0.9), logits(0.7)], [logits(0.8), logits(0.6)]])
    masks[1, 3, 0] = logits(0.75)
    found = instances(classes, masks)
    pairs = {(label, round(score, 4)) for label, score in zip(found.labels.tolist(), found.scores.tolist())}
    assert pairs == {(0, 0.525), (1, 0.15), (1, 0.225), (0, 0.075)}
    order = found.scores.argsort(descending=True)
    assert found.boxes[order[0]].tolist() == [2, 1, 4, 3]
    assert found.boxes[order[1]].tolist() == [0, 3, 1, 4]
    assert found.masks[order[0]].sum() == 4
    best = instances(classes, masks, most=1)
    assert (best.labels.tolist(), len(best.masks)) == ([0], 1)


def test_an_empty_mask_has_no_score_and_no_box() -> None:
    found = instances(torch.zeros(1, 3), torch.full((1, 4, 4), -1.0))
    assert found.scores.tolist() == [0, 0]
    assert found.boxes.tolist() == [[0, 0, 0, 0]] * 2
    assert boxes_of(torch.zeros(0, 4, 4, dtype=torch.bool)).shape == (0, 4)


def test_of_all_pairs_only_the_best_hundred_are_kept() -> None:
    g = torch.Generator().manual_seed(0)
    classes, masks = torch.randn(7, 81, generator=g), torch.randn(7, 3, 3, generator=g)
    found = instances(classes, masks)
    assert len(found.labels) == 100
    least = classes.softmax(-1)[:, :-1].flatten().sort(descending=True).values[99]
    assert ((classes.softmax(-1)[:, :-1] >= least).sum(0) == found.labels.bincount(minlength=80)).all()


def test_masks_are_enlarged_cut_and_resized_in_that_order() -> None:
    masks = torch.randn(2, 8, 12, generator=torch.Generator().manual_seed(0))
    step = F.interpolate(masks[None], (32, 48), mode="bilinear", align_corners=False)[..., :30, :41]
    expected = F.interpolate(step, (15, 20), mode="bilinear", align_corners=False)[0]
    assert torch.equal(at_size(masks, (32, 48), (30, 41), (15, 20)), expected)


class Halves:
    """In place of a network: a car at the left and a dog at the right, each almost certain."""

    device, dtype = torch.device("cpu"), torch.float32

    def __call__(self, pixel_values: Tensor) -> Any:
        height, width = (side // 4 for side in pixel_values.shape[2:])
        masks = torch.full((1, 2, height, width), -9.0)
        masks[0, 0, :, : width // 2] = 9
        masks[0, 1, :, width // 2 :] = 9
        classes = torch.zeros(1, 2, 81)
        classes[0, 0, CLASSES.index("car")] = classes[0, 1, CLASSES.index("dog")] = 12
        return SimpleNamespace(masks_queries_logits=masks, class_queries_logits=classes)


class Named:
    """In place of CLIP: the colour whose bytes are nearest to the mean of the object."""

    asked: list[str]

    def __init__(self) -> None:
        self.asked = []

    def __call__(self, pixels: np.ndarray, name: str, boxes: Any, masks: np.ndarray) -> list[str]:
        self.asked.append(name)
        means = [pixels[mask].mean(axis=0) for mask in masks]
        return ["red" if mean[0] > mean[2] else "blue" for mean in means]


def picture() -> np.ndarray:
    pixels = np.zeros((64, 96, 3), dtype=np.uint8)
    pixels[:, :48, 0] = pixels[:, 48:, 2] = 250
    return pixels


CAR_AND_DOG = {
    "tag": "color_attr",
    "include": [{"class": "car", "count": 1, "color": "red"}, {"class": "dog", "count": 1, "color": "blue"}],
}


def test_detections_are_those_of_the_picture_with_colours_where_asked_for() -> None:
    colors: Any = Named()
    detect = Mask2FormerDetector(model=Halves(), colors=colors)
    found = detect(picture(), CAR_AND_DOG)
    assert [found[name][0]["color"] for name in ("car", "dog")] == ["red", "blue"]
    for name, box in (("car", [0, 0, 48, 64]), ("dog", [48, 0, 96, 64])):
        assert np.abs(np.array(found[name][0]["box"]) - box).max() <= 1
    assert score_image(CAR_AND_DOG, found).strict
    plain = {"tag": "single_object", "include": [{"class": "car", "count": 1}]}
    colors.asked.clear()
    assert score_image(plain, detect(picture(), plain)).strict
    assert colors.asked == []


def test_a_crop_is_the_object_on_grey() -> None:
    pixels = picture()
    mask = np.zeros((64, 96), dtype=bool)
    mask[10:30, 4:44] = True
    mask[10:20, 4:24] = False
    x = crop(pixels, [4.0, 10.0, 44.0, 30.0], mask)
    assert x.shape == (3, 224, 224)
    std, mean = (torch.tensor(v).view(3, 1, 1) for v in ((0.26862954, 0.26130258, 0.27577711),
                                                        (0.48145466, 0.4578275, 0.40821073)))  # fmt: skip
    shown = ((x * std + mean) * 255).round()
    # 40 x 20 pixels become 448 x 224, of which columns 112 to 336 are seen: pixels 10 to 30 of the box
    assert shown[:, -1, 112].tolist() == [250, 0, 0]
    assert shown[:, 20, 20].tolist() == [0x99] * 3


WORDS = ["a</w>", "photo</w>", "of</w>", "car</w>", "object</w>", *(f"{color}</w>" for color in COLORS)]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP that knows some words."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "-</w>", "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config={**size, "vocab_size": len(words), "max_position_embeddings": 77,
                     "eos_token_id": len(words) - 1},
        vision_config={**size, "image_size": 224, "patch_size": 112},
        projection_dim=12,
    )  # fmt: skip
    CLIPModel(config).save_pretrained(folder)
    return folder


def test_colours_are_the_nearest_of_averaged_prompts(clip: Path) -> None:
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

    model, words = CLIPModel.from_pretrained(clip).eval(), CLIPTokenizer.from_pretrained(clip)
    classify = ColorClassifier(model=model, tokenizer=words)
    g = np.random.default_rng(0)
    pixels = g.integers(0, 256, (40, 50, 3), dtype=np.uint8)
    masks = np.stack([g.random((40, 50)) < 0.7 for _ in range(20)])
    # margins beside the middle square are even: transformers rounds odd ones in another way than open_clip
    boxes = [[i, i, i + 10, i + (10 if i % 2 else 20)] for i in range(20)]
    found = classify(pixels, "car", boxes, masks)
    process = CLIPImageProcessor(size={"shortest_edge": 224}, crop_size=224)
    with torch.no_grad():
        texts = []
        for color in COLORS:
            lines = [t.format(color=color, name="car") for t in TEMPLATES]
            tokens = words(lines, padding=True, return_tensors="pt")
            each = model.get_text_features(**tokens).pooler_output
            texts.append((each / each.norm(dim=-1, keepdim=True)).mean(0))
        for i, (box, mask) in enumerate(zip(boxes, masks, strict=True)):
            grey = Image.new("RGB", (50, 40), "#999")
            cut = Image.composite(Image.fromarray(pixels), grey, Image.fromarray(mask)).crop(box)
            seen = process(images=cut, return_tensors="pt")["pixel_values"]
            assert (seen[0] - crop(pixels, box, mask)).abs().max() < 1e-5
            image = model.get_image_features(pixel_values=seen).pooler_output[0]
            scores = torch.stack([F.cosine_similarity(image, text, dim=0) for text in texts])
            assert found[i] == COLORS[int(scores.argmax())]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny detector with random weights."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    folder = tmp_path_factory.mktemp("detector")
    torch.manual_seed(0)
    swin = SwinConfig(
        image_size=224, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=7,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=swin, num_labels=80, hidden_dim=32, feature_size=32, mask_feature_size=32,
        encoder_layers=1, decoder_layers=2, encoder_feedforward_dim=16, dim_feedforward=16, num_queries=4,
    )  # fmt: skip
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    return folder


def test_the_reward_runs_the_detector_and_a_server_can_do_it(weights: Path, clip: Path) -> None:
    images = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    given = images, ["a photo of a red car and a blue dog"] * 2, [CAR_AND_DOG] * 2
    reward = open_reward("geneval", detector="mask2former", weights=str(weights), clip=str(clip))
    here = evaluate(reward, *given)
    assert here.scores.shape == (2,)
    assert set(here.parts) >= {"correct", "strict", "strict/color_attr"}
    with serving({"geneval": reward}) as server:
        there = evaluate(open_reward("geneval", detector="remote", url=server.url), *given)
    assert torch.equal(there.scores, here.scores)


def test_shapes_is_a_detector_by_name() -> None:
    from thalweg.diffusion.shapes.dataset import ShapesDataset

    example = ShapesDataset(size=1)[0]
    given = example["image"][None], [example["prompt"]], [example["metadata"]]
    assert evaluate(open_reward("geneval", detector="shapes"), *given).scores.tolist() == [1.0]


def test_what_is_missing_is_named(weights: Path, clip: Path, tmp_path: Path) -> None:
    bad: list[tuple[dict[str, Any], str]] = [
        (
            {},
            "needs 'weights', the folder that `thalweg import mask2former_swin-s.*--layout mmdet-mask2former",
        ),
        ({"weights": str(tmp_path)}, "has no detector in weights .*, needed: a folder that `thalweg import"),
        ({"weights": str(weights)}, "needs 'clip', the folder of openai/clip-vit-large-patch14"),
        ({"weights": str(clip), "clip": str(clip)}, "holds no whole Mask2Former"),
        ({"weights": str(weights), "clip": str(weights)}, "holds no whole CLIP"),
        ({"threshold": 0.5}, r"detector 'mask2former' with options \['threshold'\]"),
    ]
    for options, message in bad:
        with pytest.raises(RewardError, match=message):
            open_reward("geneval", detector="mask2former", **options)
    with pytest.raises(RewardError, match="needs 'url'"):
        open_reward("geneval", detector="remote")
    with pytest.raises(RewardError, match="is an option of the server's geneval"):
        open_reward("geneval", detector="remote", url="http://x", reference_quirks=True)
