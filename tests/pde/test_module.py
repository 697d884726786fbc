"""PoseidonModule: what it optimises, reports, loads, freezes and refuses; resume is exact."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray
from lightning.pytorch.callbacks import ModelCheckpoint
from poseidon_runs import QUIET, data, module, scot, trainer, write_data

from thalweg.apps.callbacks import EMA
from thalweg.checkpoints import lightning_ckpt
from thalweg.core_optim.config import OptimConfig
from thalweg.pde.baselines.fno import FNOConfig, FNOOperator
from thalweg.pde.baselines.unet import UNetConfig, UNetOperator
from thalweg.pde.errors import median, relative_lp_error
from thalweg.pde.poseidon.loss import operator_loss
from thalweg.pde.writer import PredictionWriter

pytestmark = [pytest.mark.filterwarnings(text) for text in QUIET]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), "NS-Sines", "CE-RP", "Wave-Layer", "Poisson-Gauss")


def fno(seed: int = 0) -> FNOOperator:
    torch.manual_seed(seed)
    slices = (0, 1, 3, 4)
    return FNOOperator(
        FNOConfig(
            num_channels=4,
            num_out_channels=4,
            channel_slice_list_normalized_loss=slices,
            modes=4,
            width=8,
            depth=1,
        )
    )


def unet() -> UNetOperator:
    return UNetOperator(UNetConfig(num_channels=4, num_out_channels=4, width=8, multipliers=(1, 2), blocks=1))


def weights_of(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in network.state_dict().items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("build", [scot, fno, unet])
def test_training_lowers_the_loss_of_every_network(build: Any, folder: Path, tmp_path: Path) -> None:
    model = module(build(), optim=OptimConfig(lr=1e-2))
    source = data(folder, "CE-RP", num_trajectories=1)
    run = trainer(tmp_path, max_steps=25, limit_val_batches=0)
    before = trainer(tmp_path).validate(model, source, verbose=False)[0]
    run.fit(model, datamodule=source)
    after = run.callback_metrics["train/loss"].item()
    assert after < 0.8 * before["val/loss"]


def test_validation_reports_medians_per_data_set_and_their_mean(folder: Path, tmp_path: Path) -> None:
    model, source = module(), data(folder, "NS-Sines", "CE-RP", batch_size=5)
    run = trainer(tmp_path)
    run.validate(model, source, verbose=False)
    report = run.callback_metrics
    source.setup("validate")
    medians, losses = [], []
    for problem, loader in zip(source.problems, source.val_dataloader()):
        errors, weighted, count = [], 0.0, 0
        for batch in loader:
            with torch.no_grad():
                output = model(batch["pixel_values"], batch["time"])
            mask = batch["pixel_mask"][:, :, None, None]
            output = torch.where(mask, batch["labels"], output)
            edges = problem.channel_slices
            errors.append(relative_lp_error(output, batch["labels"], edges=edges))
            weighted += operator_loss(output, batch["labels"], edges, 1).item() * len(output)
            count += len(output)
        scored = [i for i, group in enumerate(problem.groups) if group in problem.scored_groups]
        medians.append(median(torch.cat(errors))[scored].mean().item())
        losses.append(weighted / count)
        assert report[f"val/{problem.name}/median_relative_l1"] == pytest.approx(medians[-1], rel=1e-5)
        assert report[f"val/{problem.name}/loss"] == pytest.approx(losses[-1], rel=1e-5)
    assert report["val/median_relative_l1"] == pytest.approx(sum(medians) / 2, rel=1e-5)
    assert report["val/loss"] == pytest.approx(sum(losses) / 2, rel=1e-5)


def test_four_groups_share_one_cosine_per_step(folder: Path, tmp_path: Path) -> None:
    model = module(
        optim=OptimConfig(lr=5e-5, weight_decay=1e-6), lr_embedding_recovery=5e-4, lr_time_embedding=2e-4
    )
    run = trainer(tmp_path, max_steps=4, limit_val_batches=0)
    rates: list[list[float]] = []

    def record(*_: Any) -> None:
        rates.append([group["lr"] for group in run.optimizers[0].param_groups])

    model.on_train_batch_start = record  # type: ignore[method-assign]
    run.fit(model, datamodule=data(folder, "NS-Sines"))
    groups = {group["name"]: group for group in run.optimizers[0].param_groups}
    peaks = {name: group["initial_lr"] for name, group in groups.items()}
    assert peaks == {
        "embedding_recovery": 5e-4,
        "time_embedding": 2e-4,
        "no_weight_decay": 5e-5,
        "standard": 5e-5,
    }
    decays = {name: group["weight_decay"] for name, group in groups.items()}
    assert decays == {
        "embedding_recovery": 1e-6,
        "time_embedding": 0.0,
        "no_weight_decay": 0.0,
        "standard": 1e-6,
    }
    cosine = [1.0, 0.8535533905932737, 0.5, 0.14644660940672627]
    for step, factor in enumerate(cosine):
        assert rates[step] == pytest.approx([factor * peak for peak in peaks.values()], rel=1e-9)
    counted = sum(p.numel() for group in groups.values() for p in group["params"])
    assert counted == sum(p.numel() for p in model.network.parameters())


def train(
    network: torch.nn.Module, folder: Path, out: Path, *, epoch: int, averaged: bool, ckpt: Path | None = None
) -> dict[str, torch.Tensor]:
    """Four steps with a checkpoint after each, or what is left of them; the resulting weights."""
    saver = ModelCheckpoint(
        out, filename="{step}", every_n_train_steps=1, save_top_k=-1, enable_version_counter=False
    )
    callbacks = [saver, *([EMA(decay=0.5)] if averaged else [])]
    options = {"limit_train_batches": epoch, "limit_val_batches": 2, "enable_checkpointing": True}
    run = trainer(out, max_steps=4, callbacks=callbacks, **options)
    model = module(network, optim=OptimConfig(lr=1e-2))
    run.fit(model, datamodule=data(folder, "NS-Sines", batch_size=2), ckpt_path=ckpt)
    assert run.global_step == 4
    return weights_of(model.network)


@pytest.mark.parametrize("averaged", [False, True], ids=["raw", "ema"])
@pytest.mark.parametrize("build", [scot, fno])
@pytest.mark.parametrize("epoch", [2, 3, 6], ids=["at_epoch_end", "mid_second_epoch", "mid_first_epoch"])
def test_resume_is_bitwise(build: Any, averaged: bool, epoch: int, folder: Path, tmp_path: Path) -> None:
    options = {"epoch": epoch, "averaged": averaged}
    straight = train(build(seed=1), folder, tmp_path / "a", **options)
    # Other fresh weights, which a resumed run must not depend on.
    saved = tmp_path / "a" / "step=2.ckpt"
    resumed = train(build(seed=2), folder, tmp_path / "b", ckpt=saved, **options)
    assert equal(straight, resumed)
    for weights in ("ema", "raw") if averaged else ("raw",):
        paths = (tmp_path / name / "step=4.ckpt" for name in "ab")
        assert equal(*(lightning_ckpt.read(path, weights).state_dict for path in paths))
    if averaged:
        ema, raw = (lightning_ckpt.read(saved, weights).state_dict for weights in ("ema", "raw"))
        assert not equal(ema, raw)


def test_pretrained_weights_are_loaded_and_the_ends_replaced(folder: Path, tmp_path: Path) -> None:
    source = scot()
    source.save_pretrained(tmp_path / "hub")
    channels = {
        "num_channels": 2,
        "num_out_channels": 2,
        "channel_slice_list_normalized_loss": (0, 1, 2),
    }
    refused = module(scot(**channels), pretrained=str(tmp_path / "hub"))
    with pytest.raises(ValueError, match=r"4 to 4 channels, the one here 2 to 2.*replace_embedding_recovery"):
        trainer(tmp_path).validate(refused, data(folder, "Wave-Layer"), verbose=False)

    target = scot(seed=3, **channels)
    model = module(target, pretrained=str(tmp_path / "hub"), replace_embedding_recovery=True)
    trainer(tmp_path).validate(model, data(folder, "Wave-Layer"), verbose=False)
    old, new = source.state_dict(), target.state_dict()
    same = {name for name in new if new[name].shape == old[name].shape and torch.equal(new[name], old[name])}
    assert set(new) - same == {
        "embeddings.patch_embeddings.projection.weight",
        "patch_recovery.projection.weight",
        "patch_recovery.projection.bias",
        "patch_recovery.mixup.weight",
    }
    assert all(value.isfinite().all() for value in new.values())


def test_pretrained_networks_of_another_shape_are_refused(folder: Path, tmp_path: Path) -> None:
    scot(embed_dim=16).save_pretrained(tmp_path / "wide")
    model = module(pretrained=str(tmp_path / "wide"))
    with pytest.raises(ValueError, match=r"built differently: embed_dim \(16 there, 8 here\)"):
        trainer(tmp_path).validate(model, data(folder, "NS-Sines"), verbose=False)
    baseline = module(fno(), pretrained=str(tmp_path / "wide"))
    with pytest.raises(ValueError, match="needs a scOT network, not FNOOperator"):
        trainer(tmp_path).validate(baseline, data(folder, "NS-Sines"), verbose=False)


def test_pretrained_weights_are_not_read_on_resume(folder: Path, tmp_path: Path) -> None:
    hub = tmp_path / "hub"
    scot().save_pretrained(hub)
    source = data(folder, "NS-Sines")
    run = trainer(tmp_path, max_steps=1, limit_val_batches=0)
    first = module(pretrained=str(hub))
    run.fit(first, datamodule=source)
    run.save_checkpoint(tmp_path / "one.ckpt")
    (hub / "model.safetensors").unlink()
    again = module(pretrained=str(hub))
    trainer(tmp_path).validate(
        again, data(folder, "NS-Sines"), ckpt_path=tmp_path / "one.ckpt", verbose=False
    )
    assert equal(weights_of(first.network), weights_of(again.network))


def test_averaging_starts_from_the_pretrained_weights(folder: Path, tmp_path: Path) -> None:
    source = scot()
    source.save_pretrained(tmp_path / "hub")
    network = scot(seed=3)
    model = module(network, pretrained=str(tmp_path / "hub"), optim=OptimConfig(lr=0.0))
    callbacks = [EMA(decay=0.5)]
    trainer(tmp_path, max_steps=2, num_sanity_val_steps=2, callbacks=callbacks).fit(
        model, datamodule=data(folder, "NS-Sines")
    )
    assert equal(weights_of(source), weights_of(network))


def test_frozen_latent_trains_the_ends_and_conditional_norms_only(folder: Path, tmp_path: Path) -> None:
    model = module(freeze="latent", optim=OptimConfig(lr=1e-2, weight_decay=0.1))
    before = weights_of(model.network)
    trainer(tmp_path, max_steps=2, limit_val_batches=0).fit(model, datamodule=data(folder, "NS-Sines"))
    after = weights_of(model.network)
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    free = {
        name
        for name in after
        if name.startswith(("embeddings", "patch_recovery"))
        or ".norm." in name
        or ".layernorm_before." in name
        or ".layernorm_after." in name
    }
    assert changed == free
    with pytest.raises(ValueError, match="FNOOperator has no embedding"):
        trainer(tmp_path).validate(module(fno(), freeze="latent"), data(folder, "NS-Sines"), verbose=False)


def test_gradient_checkpointing_changes_no_weight(folder: Path, tmp_path: Path) -> None:
    results = []
    for flag in (False, True):
        model = module(gradient_checkpointing=flag)
        trainer(tmp_path, max_steps=2, limit_val_batches=0).fit(model, datamodule=data(folder, "NS-Sines"))
        assert model.network.gradient_checkpointing is flag
        results.append(weights_of(model.network))
    assert equal(*results)


def test_compiled_networks_keep_their_parameter_names(folder: Path, tmp_path: Path) -> None:
    model = module(compile=True)
    run = trainer(tmp_path)
    run.strategy.connect(model)
    model.trainer = run
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # inside torch's compiler
        model.configure_model()
    assert model.network._compiled_call_impl is not None
    assert set(model.network.state_dict()) == set(scot().state_dict())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_network_trains_as_the_plain_one(folder: Path, tmp_path: Path) -> None:
    results = []
    for flag in (False, True):
        model = module(compile=flag)
        trainer(tmp_path, max_steps=2, limit_val_batches=1).fit(model, datamodule=data(folder, "NS-Sines"))
        results.append(weights_of(model.network))
    for name in results[0]:
        assert torch.allclose(results[0][name], results[1][name], rtol=1e-4, atol=1e-5), name


def test_predictions_are_in_physical_units(folder: Path, tmp_path: Path) -> None:
    model, source = module(), data(folder, "CE-RP", batch_size=3)
    outputs = trainer(tmp_path).predict(model, source)
    (batch,) = source.predict_dataloader()[0]
    with torch.no_grad():
        expected = source.normalizers[0].denormalize_outputs(model(batch["pixel_values"], batch["time"]))
    assert torch.allclose(outputs[0], expected)
    assert outputs[0][:, 3].mean() != pytest.approx(0, abs=1e-3)


def test_a_loss_that_is_not_a_number_says_where(folder: Path, tmp_path: Path) -> None:
    source = data(folder, "CE-RP")
    model = module()
    step = model.training_step

    def broken(batch: dict, batch_idx: int) -> torch.Tensor:
        if batch_idx == 2:
            batch["labels"][0, 0, 0, 0] = float("nan")
        return step(batch, batch_idx)

    model.training_step = broken  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"at step 2 \(epoch 0, batch 2\) on data set CE-RP; its labels"):
        trainer(tmp_path, max_steps=4, limit_val_batches=0).fit(model, datamodule=source)
    model = module()
    torch.nn.init.constant_(model.network.patch_recovery.mixup.weight, float("inf"))
    with pytest.raises(ValueError, match="training diverged"):
        trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(model, datamodule=data(folder, "CE-RP"))


def test_user_errors_name_the_remedy(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_channels to 2"):
        trainer(tmp_path).validate(module(), data(folder, "Wave-Layer"), verbose=False)
    channels = {"num_channels": 1, "num_out_channels": 1, "channel_slice_list_normalized_loss": (0, 1)}
    with pytest.raises(ValueError, match=r"\.time"):
        trainer(tmp_path).validate(module(scot(**channels)), data(folder, "Poisson-Gauss"), verbose=False)
    with pytest.raises(ValueError, match="give pretrained as well"):
        module(replace_embedding_recovery=True)
    model = module(fno(), lr_time_embedding=1e-3)
    with pytest.raises(ValueError, match="belong to scOT, not to FNOOperator"):
        trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(model, datamodule=data(folder, "NS-Sines"))
    loader = torch.utils.data.DataLoader([0])
    with pytest.raises(ValueError, match="PDEDataModule"):
        trainer(tmp_path).validate(module(), loader, verbose=False)


def test_predictions_can_be_written_as_netcdf(folder: Path, tmp_path: Path) -> None:
    model, source = module(), data(folder, "NS-Sines", "CE-RP", batch_size=1)
    run = trainer(tmp_path, callbacks=[PredictionWriter(str(tmp_path / "out"))])
    outputs = run.predict(model, source, return_predictions=True)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"NS-Sines.nc", "CE-RP.nc"}
    with xarray.open_dataset(tmp_path / "out" / "CE-RP.nc", engine="h5netcdf") as found:
        reader = source.readers[1]
        assert found["time"].values.tolist() == pytest.approx([reader.times[4]])
        samples = found["sample"].values.tolist()
        assert samples == list(range(len(reader)))[-reader.splits.test :]
        raw = reader.outputs(samples, [4])[:, 0, 0]
        assert np.allclose(found["rho"].sel(source="truth").values[:, 0], raw, atol=1e-5)
        written = found["rho"].sel(source="prediction").values[:, 0]
        assert np.allclose(written, torch.cat(outputs[1])[:, 0].numpy(), atol=1e-6)
