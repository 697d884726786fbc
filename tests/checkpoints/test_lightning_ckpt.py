"""Checkpoints written by Lightning itself: averaged and raw weights, configuration, errors."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from thalweg.checkpoints.lightning_ckpt import read

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]
CONFIG = {
    "model": {"class_path": "a.Module", "init_args": {"network": {"class_path": "a.Net"}}},
    "data": None,
}


class Module(L.LightningModule):
    """Linear network that remembers its weights step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Linear(2, 1, bias=False)
        self.history: list[Tensor] = []

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        self.history.append(self.network.weight.detach().clone())
        return self.network(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["app_config"] = CONFIG


def fit(folder: Path, callbacks: list[L.Callback], steps: int = 4) -> tuple[Module, Path]:
    module = Module()
    # Saving inside the fit: at its end Lightning overwrites the raw weights with the averaged ones.
    saver = ModelCheckpoint(dirpath=folder, filename="m")
    trainer = L.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, callbacks=[*callbacks, saver],
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    loader = DataLoader(
        TensorDataset(torch.randn(8, 2, generator=torch.Generator().manual_seed(0))), batch_size=4
    )
    trainer.fit(module, loader)
    return module, folder / "m.ckpt"


def by_hand(start: Tensor, steps: int) -> list[Tensor]:
    """Weights after each step of the same descent without Lightning."""
    x = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
    weight, path = start.clone().requires_grad_(), []
    for step in range(steps):
        (gradient,) = torch.autograd.grad((x[(step % 2) * 4 :][:4] @ weight.T).square().mean(), weight)
        weight = (weight - 0.1 * gradient).detach().requires_grad_()
        path.append(weight.detach())
    return path


def test_averaged_and_raw_weights_are_the_ones_computed_by_hand(tmp_path: Path) -> None:
    module, path = fit(tmp_path, [EMAWeightAveraging(decay=0.5)])
    steps = by_hand(module.history[0], 4)
    average = steps[0]
    for weight in steps[1:]:
        average = 0.5 * average + 0.5 * weight
    ema, raw = read(path, weights="ema"), read(path, weights="raw")
    torch.testing.assert_close(ema.state_dict["network.weight"], average)
    torch.testing.assert_close(raw.state_dict["network.weight"], steps[-1])
    assert (ema.weights, raw.weights, read(path).weights) == ("ema", "raw", "ema")
    assert torch.equal(read(path).state_dict["network.weight"], ema.state_dict["network.weight"])


def test_without_averaging_auto_is_raw_and_ema_is_refused(tmp_path: Path) -> None:
    module, path = fit(tmp_path, [])
    assert read(path).weights == "raw"
    assert torch.equal(read(path).state_dict["network.weight"], module.network.weight)
    with pytest.raises(ValueError, match="trained without weight averaging; ask for weights='raw'"):
        read(path, weights="ema")


def test_averages_that_have_not_begun_do_not_count(tmp_path: Path) -> None:
    """Lightning then stores the initial weights as the average."""
    module, path = fit(tmp_path, [EMAWeightAveraging(update_starting_at_step=100)])
    content = torch.load(path, weights_only=True)
    assert torch.equal(content["state_dict"]["network.weight"], module.history[0])
    assert read(path).weights == "raw"
    assert torch.equal(
        read(path).state_dict["network.weight"], content["current_model_state"]["network.weight"]
    )
    with pytest.raises(ValueError, match="averaging had not begun"):
        read(path, weights="ema")


def test_progress_and_configuration(tmp_path: Path) -> None:
    _, path = fit(tmp_path, [])
    checkpoint = read(path)
    assert checkpoint.global_step == 4
    assert checkpoint.epoch == torch.load(path, weights_only=True)["epoch"]
    assert checkpoint.require_config() == CONFIG


def test_network_is_picked_out_without_compile_marks(tmp_path: Path) -> None:
    state = {"network._orig_mod.a.weight": torch.ones(1), "network.b._orig_mod.bias": torch.zeros(1),
             "metric.total": torch.zeros(1)}  # fmt: skip
    torch.save({"state_dict": state}, tmp_path / "m.ckpt")
    checkpoint = read(tmp_path / "m.ckpt")
    assert list(checkpoint.network_state()) == ["a.weight", "b.bias"]
    with pytest.raises(ValueError, match=r"no weights under 'net\.', only under network\., metric\."):
        checkpoint.network_state("net.")
    with pytest.raises(ValueError, match="carries no 'app_config'"):
        checkpoint.require_config()


def test_errors_name_the_file_and_the_cure(tmp_path: Path) -> None:
    path = tmp_path / "m.ckpt"
    with pytest.raises(ValueError, match=r"m\.ckpt does not exist"):
        read(path)
    torch.save({"epoch": 1}, path)
    with pytest.raises(ValueError, match=r"is no Lightning checkpoint: .*\(found: epoch\)"):
        read(path)
    torch.save({"state_dict": {}, "x": Module}, path)
    with pytest.raises(ValueError, match=r"m\.ckpt is refused"):
        read(path)
    with pytest.raises(ValueError, match="weights is 'best', allowed: auto, ema, raw"):
        read(path, weights="best")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="is a folder, probably a sharded checkpoint"):
        read(tmp_path)


def test_truncated_checkpoint_is_refused(tmp_path: Path) -> None:
    _, path = fit(tmp_path, [])
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"m\.ckpt cannot be read: .*truncated or damaged"):
        read(path)
