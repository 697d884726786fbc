"""Fine-tune a pretrained scOT on fields of one's own that lie in a NetCDF file.

    python examples/finetune_own_netcdf.py                                # everything is made on the spot
    python examples/finetune_own_netcdf.py --pretrained FOLDER --data my.nc --epochs 200

The file holds ``temperature`` with the axes sample, time, x, y. Here it is written with xarray: heat that is
carried by a constant wind and diffuses, an exact solution. The pretrained network has four channels and the
data one, so patch embedding and recovery start afresh and everything else from the pretrained weights.
FOLDER is what ``thalweg export`` or ``thalweg import`` wrote; without it a small untrained network stands in.
"""

from __future__ import annotations

import argparse
import itertools
import math
from pathlib import Path

import lightning as L
import numpy as np
import xarray as xr

from thalweg.core_optim.config import OptimConfig, ScheduleConfig
from thalweg.pde.data import catalog
from thalweg.pde.data.datamodule import PDEDataModule
from thalweg.pde.data.pairs import part_range
from thalweg.pde.evaluation import Evaluator, plan
from thalweg.pde.poseidon import ScOT, ScOTConfig
from thalweg.pde.poseidon.module import PoseidonModule
from thalweg.pde.problem import Channel, ProblemSpec, Splits, Variable

TEMPERATURE = Channel(name="T", variable="temperature", units="K")
HEAT = ProblemSpec(
    name="Heat",
    summary="Heat in a constant wind, on the periodic unit square",
    equation="T_t + c . grad T = D Lap T",
    boundary="periodic",
    file="Heat.nc",
    variables=(
        Variable(name="temperature", dims=("sample", "time", "x", "y"), shape=(0, 11, 0, 0)),
    ),  # a 0 is the file's own affair
    inputs=(TEMPERATURE,),
    outputs=(TEMPERATURE,),
    groups=(("T",),),
    splits=Splits(total=0, val=0, test=0),  # files of another length keep a tenth for each
    frames=11,
    time_step=0.1,
    time_scale=10,  # lead times reach 1 after ten snapshots
    max_num_time_steps=5,  # pairs of the snapshots 0, 2, ..., 10
    time_step_size=2,
)


def write_heat(path: Path, samples: int, resolution: int, seed: int = 0) -> None:
    """Exact solutions: Fourier modes that move with the wind and decay, around 300 K."""
    rng = np.random.default_rng(seed)
    x = np.arange(resolution) / resolution
    time = np.arange(HEAT.frames) * HEAT.time_step
    wind, diffusivity = (0.3, 0.1), 5e-3
    temperature = np.full((samples, len(time), resolution, resolution), 300.0)
    later = time[:, None, None]
    for k, m in itertools.product((-1, 0, 1), (1, 2)):
        amplitude, phase = rng.normal(size=(2, samples, 1, 1, 1))
        carried = k * (x[:, None] - wind[0] * later) + m * (x - wind[1] * later)
        decay = np.exp(-diffusivity * (2 * math.pi) ** 2 * (k**2 + m**2) * later)
        temperature += 5 * amplitude * decay * np.cos(2 * math.pi * (carried + phase))
    dims = ("sample", "time", "x", "y")
    fields = xr.Dataset({"temperature": (dims, temperature.astype(np.float32), {"units": "K"})})
    fields.to_netcdf(path, engine="h5netcdf")


def untrained_folder(folder: Path, resolution: int) -> Path:
    """A small four-channel network in the published layout."""
    config = ScOTConfig(
        image_size=resolution,
        num_channels=4,
        num_out_channels=4,
        embed_dim=24,
        depths=(2, 2),
        num_heads=(3, 6),
        skip_connections=(1, 0),
        window_size=8,
        use_conditioning=True,
    )
    ScOT(config).save_pretrained(folder)
    return folder


def module_for(pretrained: Path, lr: float) -> PoseidonModule:
    """Module whose network has the pretrained shape, but one channel; it loads the weights by itself."""
    config = ScOTConfig.from_json(pretrained / "config.json")
    config = config.replace(num_channels=1, num_out_channels=1, channel_slice_list_normalized_loss=(0, 1))
    return PoseidonModule(
        network=ScOT(config),
        optim=OptimConfig(lr=lr, weight_decay=1e-6, schedule=ScheduleConfig(name="cosine")),
        lr_embedding_recovery=10 * lr,
        lr_time_embedding=10 * lr,
        pretrained=str(pretrained),
        replace_embedding_recovery=True,
    )


def median_error(module: PoseidonModule, data: PDEDataModule) -> float:
    """Median relative L1 error [%] over the test part at the last snapshot, in normalised units."""
    reader, normalizer = data.readers[0], data.normalizers[0]
    evaluator = Evaluator(module.network, reader, normalizer, plan(HEAT, reader.frames))
    report = evaluator.run(list(part_range(reader.splits, "test"))).report()
    return float(report["metrics"]["normalised"]["scored_median_relative_l1_error"])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pretrained", type=Path, help="folder with config.json and weights")
    parser.add_argument("--data", type=Path, help="NetCDF file with `temperature`")
    parser.add_argument("--out", type=Path, default=Path("runs/own"))
    parser.add_argument("--samples", type=int, default=20, help="trajectories to write")
    parser.add_argument("--resolution", type=int, default=32, help="grid points per axis to write")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--lr", type=float, default=1e-3)
    options = parser.parse_args(argv)

    options.out.mkdir(parents=True, exist_ok=True)
    pretrained = options.pretrained or untrained_folder(options.out / "untrained", options.resolution)
    file = options.data or options.out / HEAT.file
    if options.data is None:
        write_heat(file, options.samples, options.resolution)

    L.seed_everything(0)
    catalog.register(HEAT)
    data = PDEDataModule(datasets=["Heat"], data_dir=str(file), batch_size=16, normalization="compute")
    module = module_for(pretrained, options.lr)
    trainer = L.Trainer(
        max_epochs=options.epochs, gradient_clip_val=5.0, logger=False, enable_checkpointing=False
    )
    trainer.fit(module, data)
    data.setup("test")
    module.network.save_pretrained(options.out / "finetuned")
    print(f"median relative L1 error at the last snapshot: {median_error(module, data):.1f} %")
    print(f"written to {options.out / 'finetuned'}")


if __name__ == "__main__":
    main()
