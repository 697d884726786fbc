"""Formulas of rewards against golden data: JPEG sizes, texts, answers of judges, embeddings, heads."""

import importlib
import json
import math
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from golden import golden_files, golden_roots
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from thalweg.checkpoints.tensors import save
from thalweg.diffusion.rewards.aesthetic import Head, aesthetic_score, load_head
from thalweg.diffusion.rewards.base import RewardError, evaluate
from thalweg.diffusion.rewards.clip import centre_crop, clip_score, hps_score, pad_to_square, pick_score
from thalweg.diffusion.rewards.imagereward import MEAN, STD, ImageReward, image_reward, own_prompts
from thalweg.diffusion.rewards.jpeg import jpeg_bytes
from thalweg.diffusion.rewards.ocr import OcrReward, levenshtein, ocr, text_score
from thalweg.diffusion.rewards.registry import open_reward
from thalweg.diffusion.rewards.unified import parse_score

GOLDEN = json.loads(golden_files("nft", "rewards.json")[0].read_text())
EMBEDDINGS = load_file(golden_files("nft", "rewards.safetensors")[0])
HEAD = json.loads(golden_files("nft", "aesthetic_mlp_shapes.json")[0].read_text())
EXACT = {"rel": 1e-9, "abs": 1e-12}


def lcg(count: int) -> np.ndarray:
    state, values = 12345, []
    for _ in range(count):
        state = (1103515245 * state + 12345) % 2**31
        values.append((state >> 16) % 256)
    return np.array(values)


def jpeg_images() -> np.ndarray:
    """The six pictures that the golden data defines by formulas, bytes (6, 48, 64, 3)."""
    y, x, c = np.meshgrid(np.arange(48), np.arange(64), np.arange(3), indexing="ij")
    gradient = np.stack([4 * x[..., 0], 5 * y[..., 0], 2 * (x + y)[..., 0]], axis=-1)
    inside = ((x - 30) ** 2 + (y - 20) ** 2 < 256)[..., :1]
    images = [
        np.full((48, 64, 3), 90),
        gradient % 256,
        np.where((x // 8 + y // 8) % 2, 255, 0),
        (x**2 + 7 * y**2 + 40 * c) % 256,
        lcg(48 * 64 * 3).reshape(48, 64, 3),
        np.where(inside, (200, 60, 30), (20, 90, 160)),
    ]
    return np.stack(images).astype(np.uint8)


def test_the_formulas_give_the_golden_pictures() -> None:
    for root in golden_roots("nft"):
        stored = load_file(root / "rewards.safetensors").get("jpeg.images")
        if stored is not None:
            assert np.array_equal(stored.numpy(), jpeg_images())


@pytest.mark.parametrize("case", GOLDEN["jpeg"]["images"], ids=lambda c: c["name"])
def test_sizes_as_jpeg_files_are_golden(case: dict[str, Any]) -> None:
    from PIL import features

    exact = features.version("libjpeg_turbo") == GOLDEN["jpeg"]["libjpeg_turbo"]
    tolerance = EXACT if exact else {"rel": 0.01}
    pixels = jpeg_images()[case["index"]]
    assert jpeg_bytes(pixels) == pytest.approx(case["bytes"], **tolerance)
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
    for name in ("incompressibility", "compressibility"):
        found = evaluate(open_reward(f"jpeg_{name}"), image, [""], [{}])
        assert found.scores.item() == pytest.approx(case[name], **tolerance)
        assert found.parts["kilobytes"].item() == pytest.approx(case["bytes"] / 1000, **tolerance)


@pytest.mark.parametrize("case", GOLDEN["ocr"], ids=lambda c: f"{c['lines']}-{c['prompt']}")
def test_scores_of_recognised_text_are_golden(case: dict[str, Any]) -> None:
    lines = case["lines"]

    def recognise(pixels_HWC: np.ndarray) -> Any:
        if lines == "error":
            raise OSError("no engine")
        return lines

    args = (torch.zeros(1, 3, 8, 8), [case["prompt"]], [{}])
    reward = OcrReward(recognise=recognise, failing="zero")
    if "\u201c" in case["prompt"]:  # the reference knows straight quotes only
        assert evaluate(reward, *args).scores.item() == 1.0
    elif "error" in case:
        with pytest.raises(RewardError, match="needs a text in double quotes"):
            evaluate(reward, *args)
    else:
        assert evaluate(reward, *args).scores.item() == pytest.approx(case["score"], **EXACT)
        if lines != "error":
            assert text_score(lines, case["prompt"]) == pytest.approx(case["score"], **EXACT)


def test_a_recogniser_that_fails_is_named_and_one_of_the_user_is_used() -> None:
    def fails(pixels_HWC: np.ndarray) -> Any:
        raise OSError("no engine")

    with pytest.raises(RewardError, match=r"failed for 'a \"sign\"': OSError\('no engine'\)"):
        evaluate(OcrReward(recognise=fails), torch.zeros(1, 3, 8, 8), ['a "sign"'], [{}])
    with pytest.raises(RewardError, match="'math:no' is not rapidocr, paddleocr"):
        ocr(recogniser="math:no")
    with pytest.raises(RewardError, match="'skip', allowed: raise, zero"):
        ocr(failing="skip")  # type: ignore[arg-type]
    found = ocr(
        recogniser="thalweg.diffusion.rewards.pixels:saturation"
    )  # any factory is called with the device
    assert found.recognise.name == "saturation"


def slow_distance(a: str, b: str) -> int:
    """By the definition."""
    if not a or not b:
        return max(len(a), len(b))
    return min(
        slow_distance(a[1:], b) + 1,
        slow_distance(a, b[1:]) + 1,
        slow_distance(a[1:], b[1:]) + (a[0] != b[0]),
    )


@given(st.text("abc", max_size=5), st.text("abc", max_size=5))
def test_the_distance_of_texts_is_that_of_the_definition(a: str, b: str) -> None:
    assert levenshtein(a, b) == levenshtein(b, a) == slow_distance(a, b)


@pytest.mark.parametrize("case", GOLDEN["unified_reward"], ids=lambda c: c["text"] or "empty")
def test_scores_in_answers_are_golden(case: dict[str, Any]) -> None:
    assert parse_score(case["text"]) == case["parsed"]
    assert parse_score(case["text"]) / 5 == pytest.approx(case["score"], **EXACT)


@pytest.mark.parametrize("row", GOLDEN["embedding_scores"]["rows"], ids=lambda r: str(r["logit_scale"]))
def test_scores_of_embeddings_are_golden(row: dict[str, Any]) -> None:
    image, text = EMBEDDINGS["embed.image"], EMBEDDINGS["embed.text"]
    formulas = {"pickscore": pick_score, "clipscore": clip_score, "hpsv2": hps_score}
    for name, formula in formulas.items():
        assert formula(image, text, row["logit_scale"]).tolist() == pytest.approx(row[name], **EXACT)
        assert formula(3 * image, text, row["logit_scale"]).tolist() == pytest.approx(row[name], **EXACT)


def test_image_reward_takes_images_with_their_own_prompts() -> None:
    golden = GOLDEN["imagereward"]
    matrix = torch.tensor(golden["matrix"])
    assert own_prompts(matrix).tolist() == pytest.approx(golden["scores"])
    with pytest.raises(RewardError, match=r"\(2, 3\)"):
        own_prompts(matrix[:2])

    class Model:
        def score(self, prompt: str, image: Any) -> float:
            return golden["matrix"][int(prompt)][np.asarray(image)[0, 0, 0]]

    images = torch.arange(3).view(3, 1, 1, 1).expand(3, 3, 4, 4) / 255
    found = evaluate(ImageReward(model=Model()), images, ["0", "1", "2"], [{}] * 3)
    assert found.scores.tolist() == pytest.approx(golden["scores"])


def golden_head(dtype: torch.dtype = torch.float64) -> Head:
    """The head with the weights that the golden data defines by formulas."""
    head = Head().to(dtype).eval()
    with torch.no_grad():
        for number, layer in enumerate(m for m in head.layers if isinstance(m, torch.nn.Linear)):
            rows, columns = (torch.arange(1, n + 1, dtype=dtype) for n in layer.weight.shape)
            angle = 0.37 * rows[:, None] * columns + 0.11 * number
            layer.weight.copy_(angle.sin() * math.sqrt(2 / layer.in_features))
            layer.bias.copy_(0.05 * torch.cos(rows + number))
    return head


def golden_embedding() -> Tensor:
    n, j = torch.arange(4, dtype=torch.float64), torch.arange(768, dtype=torch.float64)
    scale = torch.tensor([1, 2, 0.5, 7], dtype=torch.float64)
    return scale[:, None] * torch.cos(0.713 * (j + 1) * (n[:, None] + 1) ** 2)


def test_the_aesthetic_head_has_the_golden_shapes_and_scores() -> None:
    head = golden_head()
    shapes = {name: list(tensor.shape) for name, tensor in head.state_dict().items()}
    assert shapes == HEAD["state_dict"]
    assert sum(p.numel() for p in head.parameters()) == HEAD["parameters"]
    found = aesthetic_score(head, golden_embedding())
    assert found.tolist() == pytest.approx(HEAD["check"]["scores"], rel=1e-8)
    standard = image_reward(head, golden_embedding())
    assert (standard * STD + MEAN).tolist() == pytest.approx(head(golden_embedding()).tolist())


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_the_aesthetic_head_is_loaded_from_a_file(tmp_path: Any, suffix: str) -> None:
    path, head = tmp_path / f"head{suffix}", golden_head(torch.float32)
    if suffix == ".pth":
        torch.save(head.state_dict(), path)
    else:
        save(head.state_dict(), path)
    loaded = load_head(path)
    assert not loaded.training
    e = golden_embedding().float()
    assert torch.equal(aesthetic_score(loaded, e), aesthetic_score(head, e))
    save({"layers.0.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(RewardError, match="holds no aesthetic head"):
        load_head(tmp_path / "other.safetensors")


def test_pictures_of_any_size_become_what_clip_sees() -> None:
    for prepare in (centre_crop, pad_to_square):
        for shape in ((224, 224), (512, 512), (100, 300), (300, 101)):
            assert prepare(torch.rand(1, 3, *shape)).shape == (1, 3, 224, 224)
    same = torch.rand(1, 3, 224, 224)
    assert torch.allclose(centre_crop(same), pad_to_square(same), atol=1e-6)
    wide = torch.zeros(1, 3, 100, 300)
    wide[..., 100:200] = 1  # the middle third is all that the crop keeps
    black, white = centre_crop(torch.zeros(1, 3, 224, 224)), centre_crop(torch.ones(1, 3, 224, 224))
    assert torch.allclose(centre_crop(wide)[..., 5:-5], white[..., 5:-5], atol=0.05)
    assert torch.allclose(pad_to_square(wide)[:, :, :70], black[:, :, :70], atol=1e-5)
    assert torch.allclose(pad_to_square(wide)[:, :, 90:130, 80:140], white[:, :, 90:130, 80:140], atol=0.05)


class OldPaddle:
    """Version 2: a list of pages, each None or lines of box and (text, score)."""

    def __init__(self, lang: str, use_angle_cls: bool, show_log: bool) -> None:
        assert (lang, use_angle_cls) == ("en", False)

    def ocr(self, pixels: Any, cls: bool) -> list:
        box = [[0, 0], [9, 0], [9, 9], [0, 9]]
        return [None] if not pixels.any() else [[[box, ("OP", 0.9)], [box, ("EN", 0.8)]]]


class NewPaddle:
    """Version 3: a list of pages with texts and scores."""

    def __init__(self, lang: str, **off: bool) -> None:
        assert not any(off.values())

    def predict(self, pixels: Any) -> list:
        return [{"rec_texts": ["OP", "EN"], "rec_scores": [0.9, 0.8]} if pixels.any() else
                {"rec_texts": [], "rec_scores": []}]  # fmt: skip


@pytest.mark.parametrize("version", [OldPaddle, NewPaddle])
def test_both_interfaces_of_paddleocr_are_understood(version: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "paddleocr", SimpleNamespace(PaddleOCR=version))
    images = torch.stack([torch.zeros(3, 8, 8), torch.ones(3, 8, 8)])
    scores = ocr(recogniser="paddleocr")(images, ['a sign "open"'] * 2, [{}, {}]).scores
    assert scores.tolist() == [0.0, 1.0]


@pytest.mark.skipif(importlib.util.find_spec("rapidocr") is None, reason="pip install 'thalweg[ocr]'")
def test_rapidocr_reads_rendered_words() -> None:
    from PIL import Image, ImageDraw, ImageFont

    words = ["HELLO", "OPEN 24", "Thalweg"]
    images = []
    for word in words:
        image = Image.new("RGB", (256, 96), "white")
        ImageDraw.Draw(image).text((20, 20), word, fill="black", font=ImageFont.load_default(48))
        images.append(torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255)
    reward = open_reward("ocr")
    shown = evaluate(reward, torch.stack(images), [f'a sign "{w}"' for w in words], [{}] * 3)
    assert shown.scores.tolist() == [1.0] * 3
    other = evaluate(reward, torch.stack(images), ['a sign "closed"'] * 3, [{}] * 3)
    assert other.scores.max() < 0.5
    blank = evaluate(reward, torch.ones(1, 3, 96, 256), ['a sign "closed"'], [{}])
    assert blank.scores.item() == 0.0
