"""The text-to-image model that comes with the package: found by name, small, and as good as its card says."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from thalweg.apps.trainer_cli import find_config
from thalweg.checkpoints import hub
from thalweg.checkpoints.model_card import read_front_matter
from thalweg.diffusion.draw import draw, open_pipeline
from thalweg.diffusion.metrics.geneval import TAGS, score_image
from thalweg.diffusion.shapes.captions import prompts
from thalweg.diffusion.shapes.codec import standard_codec
from thalweg.diffusion.shapes.detect import detect

NAME = "shipped/shapes"
FOLDER = hub.resolve(NAME)


def strict(guidance_scale: float, each: int = 16) -> float:
    """Share of pictures that show exactly their caption, over the six tasks, after 10 Euler steps."""
    chosen = [m for tag in TAGS for m in np.random.default_rng(0).choice(prompts(tag, "train"), each)]
    pipe = open_pipeline(NAME)
    drawn = draw(pipe, [m["prompt"] for m in chosen], nfe=10, guidance_scale=guidance_scale, batch=96)
    images = [image for batch in drawn for image in batch]
    scores = [score_image(m, detect(np.asarray(x))).strict for m, x in zip(chosen, images, strict=True)]
    return float(np.mean(scores))


def test_it_is_mediocre_without_guidance_and_better_with_it() -> None:
    alone, guided = strict(1.0), strict(2.0)
    assert 0.12 < alone < 0.32  # 96 pictures: standard error 0.04
    assert 0.24 < guided < 0.44
    assert guided > alone


def test_it_is_small_and_loads_in_single_precision() -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*")) < 3.2e6
    pipe = open_pipeline(NAME)
    assert {str(value.dtype) for value in pipe.transformer.parameters()} == {"torch.float32"}
    assert np.allclose(pipe.vae.decoder, standard_codec().decoder, atol=1e-3)


def test_loading_it_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    open_pipeline(NAME)
    assert capfd.readouterr() == ("", "")


def test_it_was_trained_as_the_shipped_configuration_says() -> None:
    written = yaml.safe_load(find_config("nft/shapes_pretrain.yaml").read_text())
    provenance = json.loads((FOLDER / "provenance.json").read_text())
    ran = provenance["app_config"]
    assert provenance["optimizer steps"] == written["trainer"]["max_steps"]
    for section in ("model", "data"):
        told = written[section]["init_args"]
        assert contains(ran[section]["init_args"], told), section


def contains(whole: object, part: object) -> bool:
    """Whether all that a tree says is in another."""
    if isinstance(part, dict):
        assert isinstance(whole, dict)
        return all(contains(whole[key], value) for key, value in part.items())
    return whole == part


def test_its_card_names_the_licence() -> None:
    assert read_front_matter((FOLDER / "README.md").read_text())["license"] == "apache-2.0"


def test_a_folder_of_the_same_name_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shipped" / "shapes").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub.resolve(NAME) == Path(NAME)
    with pytest.raises(ValueError, match="shipped/shapes is no pipeline's folder"):
        open_pipeline(NAME)


def test_what_is_not_shipped_is_refused_with_what_is() -> None:
    for find in (hub.resolve, open_pipeline):
        with pytest.raises(ValueError, match="nothing is shipped as 'shipped/cats', allowed: shipped/shapes"):
            find("shipped/cats")
    with pytest.raises(ValueError, match="has no revision 'main'"):
        hub.resolve(NAME, revision="main")
    assert hub.shipped("org/shapes") is None
