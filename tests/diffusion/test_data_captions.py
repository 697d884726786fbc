"""Captioned images: what they are, that a seed fixes them, and that a resume goes on where it was."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from thalweg.diffusion.caption_sets import open_captions
from thalweg.diffusion.data_captions import CaptionDataModule
from thalweg.diffusion.metrics.geneval import TAGS, score_image
from thalweg.diffusion.shapes.captions import WORDS, prompts
from thalweg.diffusion.shapes.detect import detect

GIVEN: dict[str, Any] = {"num_train": 96, "num_val": 16, "batch_size": 16}


def module(**options: Any) -> CaptionDataModule:
    data = CaptionDataModule(**(GIVEN | options))
    data.setup()
    return data


def batches(data: CaptionDataModule, count: int) -> list[dict[str, torch.Tensor]]:
    found: list[dict[str, torch.Tensor]] = []
    while len(found) < count:
        found += list(data.train_dataloader())
    return found[:count]


def test_pictures_decode_from_latents_and_agree_with_their_captions() -> None:
    data = module()
    shown = data.val_dataloader().dataset
    by_prompt = {m["prompt"]: m for tag in TAGS for m in prompts(tag)}
    words = ("", "", "", "", *data.vocabulary.words)
    for example in shown:
        picture = data.codec.decode(example["images"][None])[0]
        pixels = ((picture + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
        prompt = " ".join(words[i] for i in example["labels"].tolist()).strip()
        assert score_image(by_prompt[prompt], detect(pixels)).strict


def test_latents_have_unit_variance_and_the_shape_that_is_promised() -> None:
    data = module(num_train=1024)
    latents = data.train_dataloader().dataset.latents
    assert latents.shape == (1024, data.channels, data.image_size, data.image_size)
    assert (latents.var(dim=(0, 2, 3)) - 1).abs().max() < 0.2


def test_wrong_captions_are_as_many_as_asked_for() -> None:
    honest, other = (
        open_captions("shapes", num_train=2000, num_val=0, wrong=wrong, seed=3).train for wrong in (0.0, 0.35)
    )
    assert torch.equal(honest.images_NCHW, other.images_NCHW)
    changed = np.mean([a != b for a, b in zip(honest.captions, other.captions, strict=True)])
    assert changed == pytest.approx(0.35 * 0.97, abs=0.03)  # a few captions are drawn twice


def test_a_seed_fixes_pictures_captions_and_order() -> None:
    first, again, other = (batches(module(seed=seed), 4) for seed in (0, 0, 1))
    for name in ("images", "labels"):
        assert all(torch.equal(a[name], b[name]) for a, b in zip(first, again, strict=True))
        assert not torch.equal(first[0][name], other[0][name])


def test_validation_shows_other_pictures() -> None:
    data = module()
    train = data.train_dataloader().dataset.latents
    val = data.val_dataloader().dataset.latents
    assert len(val) == GIVEN["num_val"]
    assert not torch.equal(train[: len(val)], val)
    assert module(num_val=0).val_dataloader() == []


def test_a_resume_goes_on_in_the_same_order() -> None:
    whole = batches(module(), 10)
    data = module()
    stream = iter(data.train_dataloader())
    for _ in range(4):
        next(stream)
    resumed = module()
    resumed.load_state_dict(data.state_dict())
    rest = batches(resumed, 6)
    for a, b in zip(rest, whole[4:], strict=True):
        assert torch.equal(a["labels"], b["labels"])
        assert torch.equal(a["images"], b["images"])


def test_facts_are_words_length_and_codec() -> None:
    data = module()
    assert data.facts["words"] == list(WORDS[1:])
    assert data.facts["length"] == 12
    assert torch.equal(data.facts["codec"]["decoder"], data.codec.decoder)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"captions": "nowhere"}, "captions 'nowhere' is no folder, and no set by name: shapes"),
        ({"wrong": 1.5}, "share of wrong captions 1.5, allowed: 0 to 1"),
        ({"pixels": 64}, "shapes cannot have 64 pixels per side, allowed: 32"),
        ({"channels": 4}, "shapes has 12 latent channels, but channels is 4"),
        ({"length": 5}, "allowed: at most 3"),
    ],
)
def test_what_is_not_there_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        module(**options)


def write_pictures(folder: Path, count: int = 24) -> None:
    rng = np.random.default_rng(0)
    for i in range(count):
        place = folder / ("left" if i % 2 else "right")
        place.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{i}.png")
        (place / f"{i}.txt").write_text(f"\n Picture number {i}.\nde: Bild\n", encoding="utf-8")


def test_a_folder_holds_pictures_with_texts_of_their_names(tmp_path: Path) -> None:
    write_pictures(tmp_path)
    data = module(captions=str(tmp_path), num_val=4, batch_size=4, pixels=16, channels=20)
    assert data.vocabulary.words == tuple(sorted(["picture", "number", *map(str, range(24))]))
    train, val = data.train_dataloader().dataset, data.val_dataloader().dataset
    assert (len(train), len(val)) == (20, 4)
    assert train.latents.shape == (20, 20, 2, 2)
    assert train.latents.var(dim=(0, 2, 3)).numpy() == pytest.approx(1.0, abs=0.1)
    told = {int(word) for part in (train, val) for tokens in part.tokens for word in words(data, tokens)}
    assert told == set(range(24))
    again = module(captions=str(tmp_path), num_val=4, batch_size=4, pixels=16, channels=20)
    assert torch.equal(train.tokens, again.train_dataloader().dataset.tokens)


def words(data: CaptionDataModule, tokens: torch.Tensor) -> list[str]:
    known = ("", "", "", "", *data.vocabulary.words)
    return [known[i] for i in tokens.tolist() if known[i].isdigit()]


def test_captions_of_a_folder_may_go_wrong_in_training_only(tmp_path: Path) -> None:
    write_pictures(tmp_path)
    right, wrong = (open_captions(str(tmp_path), num_train=0, num_val=4, wrong=share) for share in (0.0, 1.0))
    assert wrong.val.captions == right.val.captions
    assert sorted(wrong.train.captions) == sorted(right.train.captions)
    changed = [a != b for a, b in zip(wrong.train.captions, right.train.captions, strict=True)]
    assert sum(changed) >= 15  # of 20


def test_a_picture_without_a_caption_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no images"):
        open_captions(str(tmp_path), num_train=0, num_val=0, wrong=0.0)
    write_pictures(tmp_path)
    with pytest.raises(ValueError, match="cannot have 20 pixels per side, allowed: multiples of 8"):
        open_captions(str(tmp_path), num_train=0, num_val=0, wrong=0.0, size=20)
    (tmp_path / "left" / "3.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"3.png has no caption: 3.txt beside it is missing or empty"):
        open_captions(str(tmp_path), num_train=0, num_val=0, wrong=0.0)
