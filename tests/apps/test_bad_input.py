"""What users get wrong is told in one line that names the file or option, and nothing of theirs is lost."""

import os
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from poseidon_runs import QUIET, fit_config, write_data

from thalweg.apps.cli import main

pytestmark = [pytest.mark.filterwarnings(text) for text in QUIET]


@pytest.fixture(autouse=True)
def words_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainer commands set the process's words."""
    monkeypatch.setattr(sys, "argv", ["thalweg"])


class Evil:
    """A pickle of it leaves a file behind when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    data = write_data(folder / "data", "CE-RP", "Wave-Layer", samples=20, frames=9)
    path = folder / "fit.yaml"
    path.write_text(yaml.safe_dump(fit_config(data, folder)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["thalweg"])
        main(["fit", "--config", str(path)])
    return path


@pytest.fixture
def checkpoint(config: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(last(config), weights_only=True)
    return content


def last(config: Path) -> Path:
    return config.parent / "run" / "one" / "checkpoints" / "last.ckpt"


def fails(command: str, config: Path, *words: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main([command, "--config", str(config), *words])
    message = str(caught.value.code)
    assert message.startswith("error: ")
    assert len(message.splitlines()) == 1
    return message


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_a_malicious_checkpoint_is_refused(
    command: str, config: Path, checkpoint: dict[str, Any], tmp_path: Path
) -> None:
    path, trace = tmp_path / "evil.ckpt", tmp_path / "trace"
    torch.save({**checkpoint, "extra": Evil(trace)}, path)
    assert "evil.ckpt is refused" in fails(command, config, f"--ckpt_path={path}")
    path.write_bytes(pickle.dumps(Evil(trace)))
    assert "evil.ckpt is refused" in fails(command, config, f"--ckpt_path={path}")
    assert not trace.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:30_000]), "truncated or damaged"),
        (lambda path: path.write_bytes(b""), "it is empty"),
        (lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n"), "is no PyTorch file"),
        (lambda path: path.unlink(), "does not exist"),
    ],
    ids=["truncated", "empty", "other", "missing"],
)
@pytest.mark.parametrize("command", ["fit", "validate"])
def test_damaged_checkpoints_are_named(
    command: str, change: Any, message: str, config: Path, tmp_path: Path
) -> None:
    path = tmp_path / "my.ckpt"
    path.write_bytes(last(config).read_bytes())
    change(path)
    told = fails(command, config, f"--ckpt_path={path}")
    assert "my.ckpt" in told
    assert message in told


def test_what_is_no_training_state_cannot_be_resumed(
    config: Path, checkpoint: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "weights.ckpt"
    torch.save({"state_dict": checkpoint["state_dict"]}, path)
    assert "start from its weights with --model.init_args.pretrained" in fails(
        "fit", config, f"--ckpt_path={path}"
    )
    del checkpoint["optimizer_states"]
    torch.save(checkpoint, path)
    assert "it holds weights only" in fails("fit", config, f"--ckpt_path={path}")


NETWORK = "--model.init_args.network.init_args.config"


def test_a_checkpoint_of_another_network_is_told_in_one_line(config: Path) -> None:
    told = fails("validate", config, f"--ckpt_path={last(config)}", f"{NETWORK}.embed_dim=16")
    assert "does not fit the configured network" in told
    assert "network.embeddings" in told


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([f"{NETWORK}.num_heads=[1,3]"], "width 16 (embed_dim 8) is not divisible by 3 heads"),
        ([f"{NETWORK}.embeddim=12"], "Did you mean embed_dim"),
        (["--model.class_path=thalweg.pde.poseidon.module.PoseidonModul"], "Did you mean PoseidonModule?"),
        (["--trainr.max_epochs=3"], "Did you mean trainer?"),
        (["--data.init_args.datasets=[CE-RB]"], "did you mean 'CE-RP'"),
        (["--data.init_args.datasets=[Wave-Layer]"], "has 2 input channels"),
        (["--data.init_args.data_dir=nowhere"], "neither CE-RP.nc nor shards"),
    ],
)
def test_mistakes_in_a_configuration_are_told_in_one_line(
    words: list[str], message: str, config: Path
) -> None:
    assert message in fails("fit", config, *words)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"model: [a\n", "bad.yaml is no valid YAML in line 2"),
        (b"\x89HDF\r\n\x1a\n", "bad.yaml is no YAML file: it is not text"),
        (b"- a\n- b\n", "bad.yaml holds a list"),
    ],
)
def test_files_that_are_no_configuration_are_named(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    assert message in fails("fit", path)


def test_a_debug_run_leaves_no_checkpoint(config: Path, tmp_path: Path) -> None:
    """Lightning's own would, and --resume last would find it."""
    words = ["--config", "trainer/debug.yaml", f"--trainer.default_root_dir={tmp_path}"]
    main(["fit", "--config", str(config), *words])
    assert list(tmp_path.rglob("*.ckpt")) == []


def test_a_prediction_that_is_not_written_says_so(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["predict", "--config", str(config), f"--ckpt_path={last(config)}"])
    assert "add --trainer.callbacks+=thalweg.pde.writer.PredictionWriter" in capsys.readouterr().out


def test_a_command_without_a_configuration_says_what_it_needs() -> None:
    with pytest.raises(SystemExit, match="give --app NAME or --config"):
        main(["test"])
