"""Feature extractors: what is trained, kept, given by users, and what is missing; quality with them."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from thalweg.diffusion.metrics import classifier as classifiers
from thalweg.diffusion.metrics.classifier import Classifier, as_floats
from thalweg.diffusion.metrics.features import embed, extractor
from thalweg.diffusion.metrics.quality import clip_score, fid, kid, real_images


@pytest.fixture(scope="module")
def trained() -> Classifier:
    return classifiers.train("digits", size=8)


def test_the_classifier_knows_images_it_was_not_trained_on(trained: Classifier) -> None:
    assert trained.about["test_images"] == 359
    assert trained.about["test_accuracy"] > 0.93
    assert "digits at 8 pixels" in trained.name
    assert not any(p.requires_grad for p in trained.parameters())
    train, _ = real_images("digits", size=8, channels=1)
    assert embed(trained, train).square().mean().item() == pytest.approx(1, rel=0.05)


def test_training_is_the_same_again_and_another_with_another_seed() -> None:
    def weights(seed: int) -> Tensor:
        return classifiers.train("digits", size=4, seed=seed).last.weight

    before = torch.random.get_rng_state()
    first = weights(0)
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(first, weights(0))
    assert not torch.equal(first, weights(1))


def test_a_saved_classifier_is_the_same(trained: Classifier, tmp_path: Path) -> None:
    path = tmp_path / "classifier.safetensors"
    classifiers.save(trained, path)
    again = extractor("classifier", weights=str(path))
    images, _ = real_images("digits", size=8, channels=1, limit=20)
    assert torch.equal(again(images), trained(images))
    assert again.about == trained.about
    with pytest.raises(ValueError, match="does not exist"):
        extractor("classifier", weights=str(tmp_path / "none.safetensors"))


def test_the_cache_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THALWEG_CACHE", str(tmp_path))
    first = extractor("classifier", images="digits", size=4)
    assert [path.name for path in tmp_path.iterdir()] == ["classifier-v2-digits-4-1-0.safetensors"]
    monkeypatch.setattr(classifiers, "train", lambda *_, **__: pytest.fail("trained again"))
    again = extractor("classifier", images="digits", size=4)
    images, _ = real_images("digits", size=4, channels=1, limit=20)
    assert torch.equal(again(images), first(images))


def test_bytes_and_floats_and_grey_and_colour_mean_the_same(trained: Classifier) -> None:
    images, _ = real_images("digits", size=8, channels=1, limit=20)
    features = embed(trained, images, batch=7)
    assert features.shape == (20, trained.num_features)
    assert features.dtype == torch.float64
    torch.testing.assert_close(embed(trained, images / 255), features, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(embed(trained, images.expand(-1, 3, -1, -1)), features, rtol=1e-4, atol=1e-4)
    assert as_floats(images, 3, 16).shape == (20, 3, 16, 16)
    with pytest.raises(ValueError, match="needed: \\(B, 1 or 3, H, W\\)"):
        trained(images.expand(-1, 2, -1, -1))


def test_noise_makes_images_worse_in_order(trained: Classifier) -> None:
    images, _ = real_images("digits", size=8, channels=1)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(900, 1, 8, 8, generator=generator)
    real = embed(trained, images[::2])
    sets = [(images[1::2][:898] / 255 + width * noise[:898]).clamp(0, 1) for width in (0.0, 0.1, 0.2, 0.4)]
    features = [embed(trained, found) for found in sets]
    assert sorted(values := [fid(x, real) for x in features]) == values
    assert sorted(values := [kid(x, real, subset_size=400, subsets=20)[0] for x in features]) == values
    assert fid(features[1], real) > 1.5 * fid(features[0], real)


def test_parts_of_the_real_images_are_those_of_training() -> None:
    part, labels = real_images("digits", size=8, channels=1, part="val", num_val=100)
    rest, _ = real_images("digits", size=8, channels=1, part="train", num_val=100)
    assert (len(part), len(labels), len(rest)) == (100, 100, 1697)
    with pytest.raises(ValueError, match="split is 'test', allowed: all, train, val"):
        real_images("digits", size=8, channels=1, part="test")  # type: ignore[arg-type]


class Mean(nn.Module):
    """Mean of each channel."""

    num_features = 1

    def forward(self, images: Tensor) -> Tensor:
        return as_floats(images, 1, None).mean(dim=(2, 3))


def means(weights: str | None) -> nn.Module:
    return Mean()


def number(weights: str | None) -> int:
    return 3


def test_a_function_of_the_user_gives_an_extractor(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "my_features", sys.modules[__name__])
    found = extractor("my_features:means")
    assert found.name.startswith("my_features:means")
    images = torch.full((2, 1, 4, 4), 51, dtype=torch.uint8)
    assert embed(found, images).flatten().tolist() == pytest.approx([0.2, 0.2])
    with pytest.raises(ValueError, match="gave a int"):
        extractor("my_features:number")
    with pytest.raises(ValueError, match="cannot be imported"):
        extractor("my_features:none")


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_torchscript_file_gives_an_extractor(trained: Classifier, tmp_path: Path) -> None:
    path = tmp_path / "network.pt"
    plain = nn.Sequential(nn.AvgPool2d(2), nn.Flatten())
    torch.jit.trace(plain, torch.zeros(1, 1, 8, 8)).save(str(path))
    images, _ = real_images("digits", size=8, channels=1, limit=5)
    torch.testing.assert_close(embed(extractor(str(path)), images), plain(images / 255).double())
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is no TorchScript file"):
        extractor(str(path))


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"features 'vgg' are unknown, allowed: classifier, efficientnet"):
        extractor("vgg")
    with pytest.raises(ValueError, match=r"need weights, the file pt_inception"):
        extractor("inception")
    with pytest.raises(ValueError, match="is no file"):
        extractor("inception", weights=str(tmp_path / "none.pth"))
    if importlib.util.find_spec("torch_fidelity") is None:
        (tmp_path / "some.pth").touch()
        with pytest.raises(ValueError, match="pip install torch-fidelity"):
            extractor("inception", weights=str(tmp_path / "some.pth"))
    if importlib.util.find_spec("efficientnet_lite_pytorch") is None:
        with pytest.raises(ValueError, match="pip install efficientnet-lite-pytorch"):
            extractor("efficientnet")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP model with random weights and the processor that belongs to it."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)
    shared = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    text = {**shared, "vocab_size": len(words), "max_position_embeddings": 16, "eos_token_id": len(words) - 1}
    vision = {**shared, "image_size": 16, "patch_size": 8}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    torch.manual_seed(1)
    size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    CLIPModel(config).save_pretrained(folder)
    CLIPProcessor(CLIPImageProcessor(**size), tokenizer).save_pretrained(folder)
    return folder


def test_the_clip_score_is_a_hundred_times_the_mean_cosine(clip: Path) -> None:
    from transformers import CLIPModel, CLIPProcessor

    images = torch.randint(0, 256, (5, 1, 16, 16), dtype=torch.uint8)
    prompts = ["a cat", "a dog", "two cats", "no dog", "a"]
    model, processor = CLIPModel.from_pretrained(clip), CLIPProcessor.from_pretrained(clip)
    inputs = processor(
        text=prompts, images=list(images.expand(-1, 3, -1, -1)), return_tensors="pt", padding=True
    )
    with torch.no_grad():
        found = model(**inputs)
    cosines = (found.image_embeds * found.text_embeds).sum(1)
    expected = 100 * cosines.mean().item()
    assert expected > 1
    assert clip_score(images, prompts, str(clip), batch=2) == pytest.approx(expected, abs=1e-3)
    with pytest.raises(ValueError, match="5 images but 1 prompts"):
        clip_score(images, prompts[:1], str(clip))


def test_without_a_clip_model_the_error_says_where_to_get_one(tmp_path: Path) -> None:
    images = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    for weights in (None, str(tmp_path)):
        with pytest.raises(ValueError, match="hf download"):
            clip_score(images, ["a"], weights)
