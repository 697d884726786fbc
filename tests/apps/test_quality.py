"""``thalweg evaluate --pipeline``: what it writes, that it can be repeated, and its errors."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import DDIMScheduler
from PIL import Image
from tiny_pipeline import tiny_unet
from tiny_pipelines import build

from thalweg.apps.cli import main
from thalweg.apps.quality import as_bytes, evaluate_pipeline
from thalweg.diffusion.draw import draw
from thalweg.diffusion.metrics.features import embed, extractor
from thalweg.diffusion.metrics.quality import fid, real_images
from thalweg.diffusion.pipeline import ClassImagePipeline


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("THALWEG_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Ten classes of 8 x 8 images, from random weights."""
    unet = tiny_unet(num_class_embeds=11)
    path = tmp_path_factory.mktemp("pipeline")
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    names = [str(k) for k in range(10)]
    ClassImagePipeline(unet, scheduler, class_names=names, null_label=10).save_pretrained(path)
    return str(path)


COMMON: dict[str, Any] = {"images": "digits", "samples": 30, "device": "cpu"}


def rows(out: Path) -> list[dict[str, Any]]:
    return json.loads((out / "results.json").read_text())["rows"]


def test_the_numbers_are_those_of_the_images_and_can_be_repeated(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a"
    evaluate_pipeline(
        pipeline=folder, nfe=(2, 3), metrics=("fid", "kid", "accuracy"), seeds=2, out=str(out), **COMMON
    )
    shown = capsys.readouterr().out
    report = json.loads((out / "results.json").read_text())
    real, *found = report["rows"]
    assert [(row["nfe"], row["seed"]) for row in found] == [(2, 0), (2, 30), (3, 0), (3, 30)]
    assert [row["evaluations"] for row in found] == [2, 2, 3, 3]
    assert all(real["fid"] < row["fid"] and real["kid"] < row["kid"] for row in found)
    assert all(0 <= row["accuracy"] <= 1 for row in found)
    assert report["protocol"]["real"] == 1797
    assert "test accuracy 0.9" in report["protocol"]["features"]
    assert report["protocol"]["features"] in shown
    assert "+-" in shown
    assert {path.name for path in out.iterdir()} == {"results.json", "grid_2.png", "grid_3.png"}
    # The number by hand, in batches of another size.
    pipe = ClassImagePipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    images = [image for part in draw(pipe, [*range(10)] * 3, nfe=3, batch=7) for image in part]
    network = extractor("classifier", images="digits", size=8, channels=1)
    others = embed(network, real_images("digits", size=8, channels=1)[0])
    assert fid(embed(network, as_bytes(images)), others) == pytest.approx(found[2]["fid"], rel=1e-3)


def test_the_command_takes_a_scheduler_and_the_parts_of_training(folder: str, tmp_path: Path) -> None:
    words = ["--nfe=[3]", "--metrics=[fid]", "--images=digits", "--samples=20", "--device=cpu"]
    other = ["--scheduler=UniPCMultistepScheduler", "--split=val", "--num_val=100"]
    for out, more in (("own", []), ("other", other)):
        main(["evaluate", f"--pipeline={folder}", f"--out={tmp_path / out}", *words, *more])
    report = json.loads((tmp_path / "other" / "results.json").read_text())
    assert report["scheduler_class"] == "UniPCMultistepScheduler"
    assert report["protocol"]["real"] == 100
    assert rows(tmp_path / "own")[1]["fid"] != report["rows"][1]["fid"]
    assert "kid" not in report["rows"][1]


def test_a_latent_pipeline_in_colour_is_evaluated_too(tmp_path: Path) -> None:
    build("sd", tmp_path).save_pretrained(tmp_path / "sd")
    evaluate_pipeline(
        pipeline=str(tmp_path / "sd"),
        nfe=(2,),
        metrics=("fid",),
        images="digits",
        samples=3,
        prompts=("a fox", "a tree"),
        guidance_scale=2.0,
        device="cpu",
        out=str(tmp_path / "out"),
    )
    report = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (report["protocol"]["size"], report["protocol"]["channels"]) == (16, 3)
    assert report["rows"][1]["fid"] > report["rows"][0]["fid"]


def test_pictures_become_bytes_of_that_layout() -> None:
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    colour = np.arange(36, dtype=np.uint8).reshape(3, 4, 3)
    assert as_bytes([Image.fromarray(grey)] * 2).shape == (2, 1, 3, 4)
    found = as_bytes([Image.fromarray(colour)])
    assert found.shape == (1, 3, 3, 4)
    assert found[0, 2, 1, 3] == colour[1, 3, 2]


BAD: list[tuple[dict[str, Any], str]] = [
    ({"metrics": ("fid", "ssim")}, r"metrics are \['fid', 'ssim'\], allowed: fid, kid, accuracy, clip"),
    ({"metrics": ("clip",)}, "--clip FOLDER"),
    ({"samples": 1}, "samples is 1, allowed: 2 and more"),
    ({"seeds": 0}, "seeds is 0, allowed: 1 and more"),
    ({"nfe": (3, 3)}, r"nfe is \[3, 3\], allowed: different numbers"),
    ({"images": "cats"}, "images 'cats' is no folder and no packaged set: mnist5k, digits"),
    ({"features": "vgg"}, "features 'vgg' are unknown, allowed: classifier"),
    ({"features": "inception"}, "need weights, the file pt_inception"),
    ({"prompts": ("a fox",)}, "ClassImagePipeline takes classes, but prompts were given"),
    ({"scheduler": "NoScheduler"}, "'NoScheduler' is no folder, no file and no class"),
    ({"pipeline": "/nowhere"}, "there is no folder /nowhere"),
    ({"split": "test"}, "split is 'test', allowed: all, train, val"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_what_is_wrong_is_named(options: dict[str, Any], message: str, folder: str, tmp_path: Path) -> None:
    given = {"pipeline": folder, "nfe": (3,), "metrics": ("fid",), **COMMON, "out": str(tmp_path)}
    with pytest.raises(ValueError, match=message):
        evaluate_pipeline(**{**given, **options})
    assert not list(tmp_path.iterdir())


def test_accuracy_needs_the_classes_of_the_classifier(tmp_path: Path) -> None:
    build("ddpm", tmp_path).save_pretrained(tmp_path / "ddpm")
    with pytest.raises(ValueError, match=r"needs a pipeline of the classes \['0', .*this has \[\]"):
        evaluate_pipeline(pipeline=str(tmp_path / "ddpm"), nfe=(2,), metrics=("accuracy",), **COMMON)
