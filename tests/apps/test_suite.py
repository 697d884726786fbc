"""``thalweg evaluate --suite``: what it draws, writes, continues and compares, and its errors."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipelines import build
from tiny_policy import SPEC, pipeline

from thalweg.apps.cli import main
from thalweg.apps.suite import evaluate_suite
from thalweg.diffusion.draw import open_pipeline
from thalweg.diffusion.nft.lora import export_lora, export_peft, lora_shapes
from thalweg.diffusion.nft.samplers import OdeSolver
from thalweg.diffusion.nft.timesteps import flow_match_sigmas
from thalweg.diffusion.order import generator
from thalweg.diffusion.suites.drawing import STREAM

COMMON: dict[str, Any] = {
    "suite": "shapes",
    "num_prompts": 6,
    "steps": 3,
    "batch_size": 3,
    "rewards": {"saturation": {}},
    "device": "cpu",
}
"""Six captions and two that are held out."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline, an adapter as a file of diffusers and of PEFT, and a schedule."""
    folder = tmp_path_factory.mktemp("made")
    pipe = pipeline(folder)
    pipe.save_pretrained(folder / "sd3")
    g = torch.Generator().manual_seed(0)
    shapes = lora_shapes(pipe.transformer, SPEC)
    state = {name: 0.3 * torch.randn(shape, generator=g) for name, shape in shapes.items()}
    export_lora(folder / "lora", state, SPEC)
    export_peft(folder / "peft", state, SPEC)
    OdeSolver(name="dpm2").schedule(flow_match_sigmas(3, 3.0)).save(folder / "dpm2.json")
    return folder


@pytest.fixture(scope="module")
def evaluated(made: Path) -> Path:
    """The model with its adapter, before and after."""
    out = made / "evaluated"
    evaluate_suite(model=str(made / "sd3"), lora=str(made / "lora"), out=str(out), **COMMON)
    return out


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_pictures_are_those_of_the_pipeline_by_itself_with_a_noise_for_each(
    made: Path, evaluated: Path
) -> None:
    pipe: Any = open_pipeline(str(made / "sd3"))
    rows = [json.loads(line) for line in (evaluated / "prompts.jsonl").read_text().splitlines()]

    def drawn(index: int) -> np.ndarray:
        noise = generator(STREAM, 0, index, 0)
        options = {"num_inference_steps": 3, "guidance_scale": 1.0, "output_type": "np"}
        return 255 * pipe(rows[index]["prompt"], generator=noise, **options).images[0]

    assert np.abs(drawn(4) - pixels(evaluated / "before" / "00004_00.png")).max() <= 1
    pipe.load_lora_weights(made / "lora")
    assert np.abs(drawn(4) - pixels(evaluated / "after" / "00004_00.png")).max() <= 1
    assert not (pixels(evaluated / "before" / "00004_00.png") == drawn(4).round()).all()


def test_results_have_both_columns_their_difference_and_a_grid_of_pairs(evaluated: Path) -> None:
    results = json.loads((evaluated / "results.json").read_text())
    assert {cell["split"] for cell in results["table"]} == {"train", "held_out"}
    assert {cell["metric"] for cell in results["table"]} >= {"shapes", "shapes/strict", "saturation"}
    rows = list(csv.DictReader((evaluated / "pictures.csv").read_text().splitlines()))
    assert len(rows) == 8
    for split, count in (("train", 6), ("held_out", 2)):
        own = [row for row in rows if row["split"] == split]
        (cell,) = (
            cell
            for cell in results["table"]
            if (cell["metric"], cell["split"], cell["task"]) == ("saturation", split, "mean of pictures")
        )
        gaps = np.array([float(row["saturation"]) - float(row["saturation before"]) for row in own])
        assert cell["pictures"] == len(own) == count
        assert cell["difference"] == pytest.approx(gaps.mean()) != 0
        assert cell["difference_error"] == pytest.approx(gaps.std(ddof=1) / np.sqrt(count))
    tile, gap = 64, 8
    sheet = pixels(evaluated / "grid.png")
    assert sheet.shape == (2 * (tile + gap) - gap, 12 * (tile + gap) - gap, 3)
    assert (sheet[:tile:4, :tile:4] == pixels(evaluated / "before" / "00000_00.png")).all()
    assert results["settings"]["scheduler_class"] == "FlowMatchEulerDiscreteScheduler"
    assert results["grid"][4]["prompt"] == rows[4]["prompt"]


def test_the_command_continues_to_the_same_bytes(made: Path, evaluated: Path, tmp_path: Path) -> None:
    out = tmp_path / "again"
    words = [f"--{name}={value}" for name, value in COMMON.items() if name != "rewards"]
    words = ["evaluate", *words, f"--model={made / 'sd3'}", f"--lora={made / 'lora'}", f"--out={out}"]
    main([*words, "--rewards", "{saturation: {}}"])
    whole = files(evaluated)
    assert files(out) == whole
    (out / "after" / "00005_00.png").unlink()
    (out / "results.json").unlink()
    text = (out / "before.jsonl").read_text().splitlines(keepends=True)
    (out / "before.jsonl").write_text("".join(text[:3]))
    main([*words, "--rewards", "{saturation: {}}"])
    assert files(out) == whole


def test_a_folder_of_peft_is_the_same_adapter(made: Path, evaluated: Path, tmp_path: Path) -> None:
    options = {**COMMON, "model": str(made / "sd3"), "lora": str(made / "peft"), "before": False}
    evaluate_suite(**options, out=str(tmp_path))
    found = files(tmp_path)
    assert not [name for name in found if name.startswith("before")]
    assert found["after.jsonl"] == files(evaluated)["after.jsonl"]


def test_schedules_are_compared_on_equal_noises(
    made: Path, evaluated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = {**COMMON, "model": str(made / "sd3")}
    schedule = str(made / "dpm2.json")
    evaluate_suite(**common, scheduler=schedule, compare=str(evaluated), out=str(tmp_path / "dpm2"))
    results = json.loads((tmp_path / "dpm2" / "results.json").read_text())
    assert results["settings"]["scheduler_class"] == "SearchedScheduler"
    assert results["compared_with"] == str(evaluated / "after")
    assert "+-" in capsys.readouterr().out
    with pytest.raises(ValueError, match=f"{evaluated} cannot be compared with: its seed is 0, here 1"):
        evaluate_suite(**common, seed=1, compare=str(evaluated), out=str(tmp_path / "c"))
    shutil.copytree(evaluated, tmp_path / "half")
    (tmp_path / "half" / "after" / "00003_00.png").unlink()
    with pytest.raises(ValueError, match="half lacks 1 of 8 pictures or scores; finish it first"):
        evaluate_suite(**common, compare=str(tmp_path / "half"), out=str(tmp_path / "c"))
    with pytest.raises(ValueError, match="is no folder of thalweg evaluate --suite"):
        evaluate_suite(**common, compare=str(tmp_path), out=str(tmp_path / "c"))


def test_a_suite_without_tasks_takes_a_file_and_several_pictures(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "test.txt").write_text("a fox\na tree\na fox\n")
    evaluate_suite(
        suite="drawbench",
        model=str(made / "sd3"),
        prompts=str(tmp_path / "test.txt"),
        rewards={"jpeg_compressibility": None},
        samples_per_prompt=3,
        steps=2,
        guidance=2.0,
        max_sequence_length=8,
        size=(16, 32),
        device="cpu",
        out=str(tmp_path / "out"),
    )
    rows = (tmp_path / "out" / "pictures.jsonl").read_text().splitlines()
    assert len(rows) == 6
    assert pixels(tmp_path / "out" / "pictures" / "00001_02.png").shape == (16, 32, 3)
    assert len({pixels(path).tobytes() for path in (tmp_path / "out" / "pictures").iterdir()}) == 6
    shown = capsys.readouterr().out
    assert "jpeg_compressibility" in shown
    assert "mean of" not in shown


BAD: list[tuple[dict[str, Any], str]] = [
    ({"suite": "ocr"}, "suite ocr needs --prompts FILE; the published one is dataset/ocr/test.txt"),
    ({"suite": "drawbench", "prompts": "txt"}, "suite drawbench has no reward of its own"),
    ({"suite": "geneval"}, "reward 'geneval' needs 'weights', the folder that `thalweg import"),
    ({"samples_per_prompt": -1}, "samples_per_prompt is -1"),
    ({"batch_size": 0}, "batch_size is 0, allowed: 1 and more"),
    ({"steps": 0}, "cannot ask the network 0 times"),
    ({"rewards": {"beauty": {}}}, "reward 'beauty' is unknown, allowed: jpeg_compressibility"),
    ({"rewards": {"clipscore": {}}}, "'clipscore' needs 'folder', the folder of openai/clip"),
    ({"scheduler": "NoScheduler"}, "'NoScheduler' is no folder, no file and no class"),
    ({"model": "/nowhere"}, "there is no folder /nowhere"),
    ({"lora": "/nowhere"}, "/nowhere has no LoRA"),
    ({"compare": "/nowhere"}, "is no folder of thalweg evaluate --suite"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_what_is_wrong_is_named_before_anything_is_drawn(
    options: dict[str, Any], message: str, made: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    given = {**COMMON, "model": str(made / "sd3"), "out": str(out), **options}
    if options.get("suite") == "drawbench":
        (tmp_path / "a.txt").write_text("a fox\n")
        given |= {"prompts": str(tmp_path / "a.txt"), "rewards": None}
    with pytest.raises(ValueError, match=message):
        evaluate_suite(**given)
    assert not out.exists()


def test_other_pipelines_and_adapters_of_other_networks_are_refused(made: Path, tmp_path: Path) -> None:
    build("ddpm", tmp_path).save_pretrained(tmp_path / "ddpm")
    with pytest.raises(ValueError, match="DDPMPipeline, which takes no prompts"):
        evaluate_suite(**COMMON, model=str(tmp_path / "ddpm"), out=str(tmp_path / "out"))
    build("sd3", tmp_path).save_pretrained(tmp_path / "other")
    given = {**COMMON, "out": str(tmp_path / "out"), "lora": str(made / "lora")}
    with pytest.raises(ValueError, match=r"lora is not for this transformer: target 'attn.to_add_out'"):
        evaluate_suite(**given, model=str(tmp_path / "other"))
    build("sd", tmp_path).save_pretrained(tmp_path / "sd")
    with pytest.raises(ValueError, match="StableDiffusionPipeline has no transformer for the LoRA"):
        evaluate_suite(**given, model=str(tmp_path / "sd"))
    with pytest.raises(ValueError, match="StableDiffusionPipeline has no option max_sequence_length"):
        evaluate_suite(**given, model=str(tmp_path / "sd"), max_sequence_length=4)


def test_help_of_the_suite_is_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["evaluate", "--suite", "--help"])
    assert "--samples_per_prompt" in capsys.readouterr().out


@pytest.mark.slow
def test_a_killed_evaluation_continues_to_the_same_bytes(made: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "thalweg.apps", "evaluate", "--suite=shapes", f"--model={made / 'sd3'}"]
    command += ["--num_prompts=48", "--steps=20", "--batch_size=4", "--device=cpu", f"--lora={made / 'lora'}"]
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    subprocess.run([*command, f"--out={tmp_path / 'whole'}"], check=True, **quiet)
    for arm, stop in (("before", signal.SIGKILL), ("after", signal.SIGINT)):
        with subprocess.Popen([*command, f"--out={tmp_path / 'cut'}"], **quiet) as process:
            until = time.monotonic() + 120
            while len(list((tmp_path / "cut" / arm).glob("*.png"))) < 20 and time.monotonic() < until:
                time.sleep(0.01)
            os.kill(process.pid, stop)
            _, said = process.communicate()
        assert process.returncode == (130 if stop == signal.SIGINT else -signal.SIGKILL)
        if stop == signal.SIGINT:
            assert said.splitlines()[-1] == "stopped; the same command continues where it was"
    subprocess.run([*command, f"--out={tmp_path / 'cut'}"], check=True, **quiet)
    found, whole = files(tmp_path / "cut"), files(tmp_path / "whole")
    assert {k: v for k, v in found.items() if not k.endswith(".tmp")} == whole
