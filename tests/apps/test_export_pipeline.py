"""``thalweg export`` of an image denoiser: what ``thalweg fit`` leaves becomes a diffusers pipeline."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from thalweg.apps.cli import main
from thalweg.checkpoints import lightning_ckpt
from thalweg.diffusion.pipeline import ClassImagePipeline

NETWORK = "--model.init_args.network.init_args"
DATA = "--data.init_args"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fit")
    subprocess.run(
        [
            *(
                sys.executable,
                "-m",
                "thalweg.apps",
                "fit",
                "--config=s3/mnist.yaml",
                "--trainer.max_steps=3",
                "--trainer.max_epochs=1",
            ),
            *(f"{DATA}.images=digits", f"{DATA}.image_size=8", f"{DATA}.num_val=100"),
            f"{NETWORK}.sample_size=8",
            f"{NETWORK}.block_out_channels=[8,8]",
            f"{NETWORK}.down_block_types=[DownBlock2D,DownBlock2D]",
            f"{NETWORK}.up_block_types=[UpBlock2D,UpBlock2D]",
            f"{NETWORK}.norm_num_groups=4",
            f"{NETWORK}.attention_head_dim=4",
            "--trainer.enable_progress_bar=false",
            *(f"--trainer.logger.init_args.{key}" for key in (f"save_dir={folder}", "name=a", "version=b")),
        ],
        check=True,
        capture_output=True,
    )
    return folder / "a/b/checkpoints/last.ckpt"


def test_the_folder_holds_the_averaged_weights_and_the_names(checkpoint: Path, tmp_path: Path) -> None:
    main(["export", f"--ckpt={checkpoint}", f"--to={tmp_path / 'out'}"])
    pipe = ClassImagePipeline.from_pretrained(tmp_path / "out")
    assert list(pipe.config.class_names) == [str(k) for k in range(10)]
    assert pipe.config.null_label == 10
    wanted = lightning_ckpt.read(checkpoint, "ema").network_state()
    found = pipe.unet.state_dict()
    assert set(found) == set(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "class_labels='0'" in card
    assert json.loads((tmp_path / "out" / "provenance.json").read_text())["optimizer steps"] == 3


def test_the_folder_loads_without_this_package_and_draws_the_same(checkpoint: Path, tmp_path: Path) -> None:
    main(["export", f"--ckpt={checkpoint}", f"--to={tmp_path / 'out'}"])
    ours = ClassImagePipeline.from_pretrained(tmp_path / "out")
    theirs = DiffusionPipeline.from_pretrained(
        tmp_path / "out", custom_pipeline=str(tmp_path / "out"), trust_remote_code=True
    )
    images = []
    for pipe in (ours, theirs):
        pipe.set_progress_bar_config(disable=True)
        start = torch.Generator().manual_seed(0)
        images.append(pipe([1, "7"], num_inference_steps=3, generator=start, output_type="pt").images)
    assert torch.equal(*images)


def test_an_earlier_pipeline_is_replaced(checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    main(["export", f"--ckpt={checkpoint}", f"--to={target}"])
    (target / "unet" / "stale.safetensors").write_bytes(b"")
    main(["export", f"--ckpt={checkpoint}", f"--to={target}", "--overwrite", "--weights=raw"])
    assert not (target / "unet" / "stale.safetensors").exists()
    wanted = lightning_ckpt.read(checkpoint, "raw").network_state()
    found = ClassImagePipeline.from_pretrained(target).unet.state_dict()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
