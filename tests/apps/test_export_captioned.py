"""The shipped pre-training through the command line, at a small size: fit, export, load, draw."""

import json
import sys
import warnings
from pathlib import Path

import pytest
import torch

from thalweg.apps.cli import main
from thalweg.checkpoints import lightning_ckpt
from thalweg.diffusion.draw import open_pipeline
from thalweg.diffusion.shapes.captions import WORDS

NETWORK = "--model.init_args.network.init_args"
DATA = "--data.init_args"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fit")
    small = {"layers": 1, "heads": 2, "head_dim": 8, "text_width": 8}
    arguments = [
        "--config=nft/shapes_pretrain.yaml",
        *("--trainer.max_steps=3", "--trainer.enable_progress_bar=false"),
        *(f"{DATA}.num_train=64", f"{DATA}.num_val=8", f"{DATA}.batch_size=16"),
        "--model.init_args.optim.schedule.warmup_steps=1",
        *(f"{NETWORK}.{key}={value}" for key, value in small.items()),
        *(f"--trainer.logger.init_args.{key}" for key in (f"save_dir={folder}", "name=a", "version=b")),
    ]
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's and jsonargparse's own
        patch.setattr(sys, "argv", sys.argv)
        main(["fit", *arguments])
    return folder / "a/b/checkpoints/last.ckpt"


@pytest.fixture(scope="module")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("export") / "out"
    main(["export", f"--ckpt={checkpoint}", f"--to={target}"])
    return target


def test_the_folder_holds_the_averaged_weights(checkpoint: Path, exported: Path) -> None:
    wanted = lightning_ckpt.read(checkpoint, "ema").network_state()
    pipe = open_pipeline(str(exported))
    for part in ("transformer", "text_encoder", "text_encoder_2"):
        found = getattr(pipe, part).state_dict()
        assert found
        for name, value in found.items():
            assert torch.equal(value, wanted[f"{part}.{name}"])
    assert json.loads((exported / "provenance.json").read_text())["optimizer steps"] == 3
    assert len({path.stat().st_mode for path in exported.rglob("*") if path.is_file()}) == 1


def test_the_card_says_how_to_call_it(exported: Path) -> None:
    card = (exported / "README.md").read_text()
    assert "max_sequence_length=0" in card
    assert ", ".join(WORDS[1:]) in card


def test_half_precision_is_for_storage(checkpoint: Path, exported: Path, tmp_path: Path) -> None:
    main(["export", f"--ckpt={checkpoint}", f"--to={tmp_path / 'half'}", "--dtype=float16"])
    size, half = (
        sum(path.stat().st_size for path in folder.rglob("*.safetensors")) for folder in (exported, tmp_path)
    )
    assert half < 0.6 * size
    pipe = open_pipeline(str(tmp_path / "half"))
    parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    assert len(parts) == 4
    assert {value.dtype for part in parts for value in part.parameters()} == {torch.float32}


def test_thalweg_sample_draws_from_it(exported: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    main(["sample", f"--pipeline={exported}", '--prompts=["a red circle"]', "--nfe=2", f"--out={out}"])
    assert sorted(path.name for path in out.glob("0*.png")) == ["00000.png"]
