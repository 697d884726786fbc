"""Batches are what a plain reading of the files gives, in every way of making them."""

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from thalweg.pde.data import catalog
from thalweg.pde.data.datamodule import DatasetConfig, PDEDataModule
from thalweg.pde.data.recycle import Recycler
from thalweg.pde.data.synthetic import write_synthetic

Batch = dict[str, torch.Tensor]
SETS = [
    "NS-Sines",
    "NS-SL",
    "CE-RP",
    "FNS-KF",
    "Wave-Layer",
    "ACE",
    "SE-AF.time",
    "Poisson-Gauss",
    "Helmholtz",
]


def module(names: list[str | DatasetConfig], folder: Path, **options: object) -> PDEDataModule:
    data = PDEDataModule(names, str(folder), batch_size=5, **options)
    data.setup()
    return data


def assert_equal(a: Batch, b: Batch) -> None:
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=0)


@pytest.mark.parametrize("name", SETS)
def test_batch_equals_a_plain_reading(name: str, tmp_path: Path) -> None:
    write_synthetic(name, tmp_path, samples=12, resolution=8)
    data = module([name], tmp_path)
    loader = data.train_dataloader()
    part, normalizer, reader = loader.dataset.parts[0], data.normalizers[0], data.readers[0]
    order = loader.sampler.order(0)
    seen = 0
    for batch in loader:
        for row in range(len(batch["time"])):
            trajectory, first, last, lead = part.locate(int(order[seen]))
            raw = reader.inputs([trajectory], first)
            labels = normalizer.normalize_outputs(reader.outputs([trajectory], [last])[:, 0])
            if reader.spec.mask_rule == "input_is_one":
                labels[raw == 1] = 1.0
            torch.testing.assert_close(
                batch["pixel_values"][row].numpy(), normalizer.normalize_inputs(raw)[0], rtol=1e-6, atol=1e-6
            )
            torch.testing.assert_close(batch["labels"][row].numpy(), labels[0], rtol=1e-6, atol=1e-6)
            assert batch["time"][row].item() == np.float32(lead)
            seen += 1
    assert seen == len(part) == len(order)


def test_raw_file_to_batch_by_hand(tmp_path: Path) -> None:
    path = write_synthetic("CE-KH", tmp_path, samples=12, resolution=8)
    batch = next(iter(module(["CE-KH"], tmp_path, fix_input_to_time_step=2).val_dataloader()[0]))
    with h5py.File(path) as file:
        first, last = file["data"][10, 2, :4], file["data"][10, 4, :4]
    mean = np.array([0.80, 0.0, 0.0, 1.0])[:, None, None]
    std = np.array([0.31, 0.391, 0.356, 0.185])[:, None, None]
    np.testing.assert_allclose(batch["pixel_values"][0].numpy(), (first - mean) / std, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(batch["labels"][0].numpy(), (last - mean) / std, rtol=1e-5, atol=1e-6)
    assert batch["time"].tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])


def test_masks(tmp_path: Path) -> None:
    for name in ("NS-Sines", "CE-RP", "SE-AF"):
        write_synthetic(name, tmp_path, samples=12)
    assert "pixel_mask" not in next(iter(module(["CE-RP"], tmp_path).train_dataloader()))
    for batch in module(["NS-Sines", "CE-RP"], tmp_path).train_dataloader():
        incompressible = batch["dataset"] == 0
        assert (batch["pixel_mask"][incompressible] == torch.tensor([False, False, False, True])).all()
        assert not batch["pixel_mask"][~incompressible].any()
    batch = next(iter(module(["SE-AF"], tmp_path).train_dataloader()))
    torch.testing.assert_close(batch["pixel_mask"], batch["pixel_values"] == 1)
    assert (batch["labels"][batch["pixel_mask"]] == 1).all()
    assert (batch["time"] == 1).all()


def test_mixture_keeps_constants_apart_and_counts_visits(tmp_path: Path) -> None:
    for name in ("NS-Sines", "CE-RP"):
        write_synthetic(name, tmp_path, samples=12, resolution=8)
    sets = [DatasetConfig(name="NS-Sines", num_trajectories=2), DatasetConfig(name="CE-RP", weight=0.5)]
    data = module(sets, tmp_path, num_trajectories=4)
    ids = torch.cat([batch["dataset"] for batch in data.train_dataloader()])
    assert torch.bincount(ids).tolist() == [2 * 36, 4 * 36 // 2]
    for batch in data.train_dataloader():
        rho = batch["pixel_values"][batch["dataset"] == 0, 0]
        torch.testing.assert_close(rho, torch.full_like(rho, (1 - 0.8) / 0.31))
    first, second = data.val_dataloader()
    assert next(iter(first))["dataset"].unique().tolist() == [0]
    assert next(iter(second))["dataset"].unique().tolist() == [1]
    assert "pixel_mask" in next(iter(second))


def test_unequal_channels_cannot_be_mixed(tmp_path: Path) -> None:
    for name in ("NS-Sines", "FNS-KF"):
        write_synthetic(name, tmp_path)
    with pytest.raises(ValueError, match=r"NS-Sines has 4 input .*FNS-KF has 5 input"):
        module(["NS-Sines", "FNS-KF"], tmp_path)


def test_parts_use_their_own_trajectories_and_one_normaliser(tmp_path: Path) -> None:
    write_synthetic("ACE", tmp_path, samples=20, attributes={"num_val": 3, "num_test": 4})
    data = module(["ACE"], tmp_path, num_trajectories=8)
    train, val = data.train_dataloader().dataset.parts[0], data.val_dataloader()[0].dataset.parts[0]
    test = data.test_dataloader()[0].dataset.parts[0]
    assert (train.trajectories, val.trajectories, test.trajectories) == (
        range(8),
        range(13, 16),
        range(16, 20),
    )
    assert train.normalizer is val.normalizer is test.normalizer is data.normalizers[0]
    assert (len(train), len(val), len(test)) == (8 * 36, 3 * 36, 4)
    assert test.locate(3) == (19, 0, 14, pytest.approx(14 / 19))


def test_pairs_can_be_chosen(tmp_path: Path) -> None:
    write_synthetic("NS-Sines", tmp_path, samples=12)
    data = module(["NS-Sines"], tmp_path, max_num_time_steps=10, allowed_time_transitions=[1])
    part = data.train_dataloader().dataset.parts[0]
    assert part.pairs.tolist() == [[2 * i, 2 * i + 2] for i in range(10)]
    assert data.test_dataloader()[0].dataset.parts[0].pairs.tolist() == [[0, 20]]


def test_pairs_beyond_the_file_are_refused(tmp_path: Path) -> None:
    write_synthetic("NS-Sines", tmp_path, frames=6)
    with pytest.raises(
        ValueError, match=r"NS-Sines: .*needs snapshot 14, but .*NS-Sines\.nc has 6 snapshots"
    ):
        module(["NS-Sines"], tmp_path)
    assert len(module(["NS-Sines"], tmp_path, max_num_time_steps=2).train_dataloader()) > 0


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_give_the_same_batches(start: str, tmp_path: Path) -> None:
    for name in ("NS-Sines", "CE-RP"):
        write_synthetic(name, tmp_path, samples=4, resolution=8, shards=2)
    names: list[str | DatasetConfig] = ["NS-Sines", "CE-RP"]
    alone = list(module(names, tmp_path).train_dataloader())
    workers = module(names, tmp_path, num_workers=2, multiprocessing_context=start).train_dataloader()
    for a, b in zip(alone, workers, strict=True):
        assert_equal(a, b)


@pytest.mark.parametrize("options", [{"cache": "ram"}, {"check_finite": False}], ids=str)
@pytest.mark.parametrize("name", ["NS-Sines", "Helmholtz"])
def test_options_do_not_change_batches(name: str, options: dict, tmp_path: Path) -> None:
    write_synthetic(name, tmp_path, samples=12, resolution=8)
    plain, other = (module([name], tmp_path, **o).train_dataloader() for o in ({}, options))
    for a, b in zip(plain, other, strict=True):
        assert_equal(a, b)


def test_held_batches_keep_their_values(tmp_path: Path) -> None:
    # Memory is used again only after a batch is gone; a view keeps it.
    write_synthetic("CE-RP", tmp_path, samples=6, resolution=8)
    loader = module(["CE-RP"], tmp_path).train_dataloader()
    held = [batch["labels"][1:3, :, ::2] for batch in loader]
    loader.sampler.set_epoch(0)
    for labels, batch in zip(held, loader, strict=True):
        assert torch.equal(labels, batch["labels"][1:3, :, ::2])


def test_memory_is_used_again_when_free() -> None:
    memory = Recycler()
    first = memory.empty(2, 3)
    address = first.data_ptr()
    view = first[1:]
    del first
    assert memory.empty(2, 3).data_ptr() != address
    del view
    assert address in {memory.empty(2, 3).data_ptr(), memory.empty(2, 3).data_ptr()}


def test_nan_in_data_stops_training_with_its_place(tmp_path: Path) -> None:
    path = write_synthetic("ACE", tmp_path, samples=12)
    with h5py.File(path, "a") as file:
        file["solution"][3, 4] = np.nan
    with pytest.raises(ValueError, match=r"ACE\.nc.*NaN or infinity in sample 3, snapshot 4"):
        list(module(["ACE"], tmp_path).train_dataloader())


def test_file_can_describe_itself(tmp_path: Path) -> None:
    attributes = {
        "thalweg_problem": "CE-RP",
        "num_val": 1,
        "num_test": 2,
        "constants": json.dumps(
            {side: {c: [0.25, 4.0] for c in ("rho", "u", "v", "p")} for side in ("inputs", "outputs")}
        ),
    }
    path = write_synthetic("CE-RP", tmp_path, samples=8, attributes=attributes)
    moved = path.rename(tmp_path / "mine.nc")
    data = module([DatasetConfig(name="auto", path=str(moved))], tmp_path / "elsewhere")
    assert data.problems == [catalog.get("CE-RP")]
    assert data.normalizers[0].origin == "file"
    assert (data.readers[0].splits.val, data.readers[0].splits.test) == (1, 2)


def test_empty_list_and_unknown_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="datasets is empty"):
        PDEDataModule([])
    with pytest.raises(ValueError, match="unknown data set 'NS-Sine'; did you mean 'NS-Sines'"):
        module(["NS-Sine"], tmp_path)
