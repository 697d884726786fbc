"""Samples per second of PDEDataModule's training loader against a plain h5py data set.

Both read the same file in the same shuffled order and give the same batches, which is checked first. The
plain one does what most projects do: open the file, read two snapshots per item, normalise them, let PyTorch
collate. Runs alternate, and the ratio of medians is printed. "Cold" drops the file from the page cache before
every run.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python benchmarks/pde_loader.py
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from thalweg.pde.data.datamodule import PDEDataModule
from thalweg.pde.data.pair_dataset import PairDataset
from thalweg.pde.data.synthetic import synthetic_fields
from thalweg.pde.problem import ProblemSpec


class PlainPairs(Dataset[dict[str, Tensor]]):
    """One item is two reads; the channels, constants and pairs are those of `part`."""

    def __init__(self, path: Path, part: PairDataset) -> None:
        self.part = part
        self.spec: ProblemSpec = part.reader.spec
        stored = [c for c in self.spec.inputs if c.variable is not None]
        self.variable = h5py.File(path, "r")[stored[0].variable]
        self.stored = slice(stored[0].index, stored[-1].index + 1)
        self.place = [i for i, c in enumerate(self.spec.inputs) if c.variable is not None]
        constants = part.normalizer
        self.offset = torch.tensor(constants.input_shift + constants.input_mean).float()[:, None, None]
        self.std = torch.tensor(constants.input_std).float()[:, None, None]
        self.mask = torch.tensor([c.masked for c in self.spec.outputs])

    def __len__(self) -> int:
        return len(self.part)

    def snapshot(self, trajectory: int, frame: int) -> Tensor:
        """Normalised channels of one snapshot."""
        fields = torch.empty(len(self.spec.inputs), *self.part.reader.grid)
        for i, channel in enumerate(self.spec.inputs):
            if channel.variable is None:
                fields[i] = float(channel.formula)
        fields[self.place] = torch.from_numpy(self.variable[trajectory, frame, self.stored])
        return (fields - self.offset) / self.std

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        trajectory, first, last, lead = self.part.locate(index)
        item = {
            "pixel_values": self.snapshot(trajectory, first),
            "labels": self.snapshot(trajectory, last),
            "time": torch.tensor(lead, dtype=torch.float32),
            "dataset": torch.tensor(0),
        }
        return item if self.spec.mask_rule == "none" else {**item, "pixel_mask": self.mask}


def write_file(spec: ProblemSpec, path: Path, samples: int, resolution: int) -> None:
    """The published layout, one snapshot per chunk, written trajectory by trajectory."""
    variable = spec.variables[0]
    shape = (samples, *variable.shape[1:-2], resolution, resolution)
    with h5py.File(path, "w") as file:
        data = file.create_dataset(variable.name, shape, np.float32, chunks=(1, 1, *shape[2:]))
        for i in range(samples):
            data[i] = synthetic_fields(spec, 1, resolution, seed=i)[variable.name][0]
        file.flush()
        os.fsync(file.id.get_vfd_handle())


def drop_cache(path: Path) -> None:
    """Ask the kernel to forget the file's pages."""
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def samples_per_second(loader: Iterable[dict[str, Tensor]], batches: int) -> float:
    seen = 0
    start = time.perf_counter()
    iterator: Iterator[dict[str, Tensor]] = iter(loader)
    for _ in range(batches):
        seen += len(next(iterator)["time"])
    return seen / (time.perf_counter() - start)


def compare(name: str, resolution: int, args: argparse.Namespace, folder: Path) -> dict[str, object]:
    """Measure one data set and grid."""
    module = PDEDataModule([name], str(folder), batch_size=args.batch_size, num_workers=args.num_workers)
    module.setup("fit")
    ours = module.train_dataloader()
    path = module.readers[0].contents.path
    plain_set = PlainPairs(path, ours.dataset.parts[0])
    order = ours.sampler.order(0).tolist()
    plain = DataLoader(plain_set, batch_size=args.batch_size, sampler=order, num_workers=args.num_workers)
    for a, b, _ in zip(ours, plain, range(3)):
        assert a.keys() == b.keys()
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=1e-5, atol=1e-5)
    ours.sampler.set_epoch(0)
    batches = min(args.batches, len(ours))
    rows: dict[str, object] = {"data set": name, "grid": resolution, "batch": args.batch_size}
    for cold in (True, False):
        speeds: dict[str, list[float]] = {"ours": [], "plain": []}
        for _ in range(args.repeats):
            for key, loader in (("ours", ours), ("plain", plain)):
                if cold:
                    drop_cache(path)
                speeds[key].append(samples_per_second(loader, batches))
        label = "cold" if cold else "warm"
        medians = {key: statistics.median(values) for key, values in speeds.items()}
        ratio = medians["ours"] / medians["plain"]
        rows[label] = {**{k: round(v) for k, v in medians.items()}, "ratio": round(ratio, 2)}
        print(
            f"{name} {resolution}^2, batch {args.batch_size}, {label}: {medians['ours']:.0f} samples/s, "
            f"plain h5py {medians['plain']:.0f} samples/s, ratio {ratio:.2f}"
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-sets", nargs="+", default=["NS-Sines", "CE-RP"])
    parser.add_argument("--resolutions", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--samples", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--num-workers", type=int, default=0)
    parser.add_argument("--batches", type=int, default=60, help="batches per run")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="where the files are written; a temporary one by default")
    args = parser.parse_args()
    from thalweg.pde.data import catalog

    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        for name in args.data_sets:
            for resolution in args.resolutions:
                spec = catalog.get(name)
                write_file(spec, Path(temporary) / spec.file, args.samples, resolution)
                rows.append(compare(name, resolution, args, Path(temporary)))
    print(json.dumps({"torch": torch.__version__, "h5py": h5py.__version__, "results": rows}))


if __name__ == "__main__":
    main()
