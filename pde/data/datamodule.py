"""PDE data sets for Lightning: one set or a weighted mixture, all2all pairs, one normaliser per set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from thalweg.pde.data import catalog
from thalweg.pde.data.loader import ResumableLoader
from thalweg.pde.data.normalize import Mode, Normalizer, normalizer_for
from thalweg.pde.data.pair_dataset import MixtureDataset, PairDataset, as_is
from thalweg.pde.data.pairs import PairRule, Part, part_range
from thalweg.pde.data.sampler import PairSampler
from thalweg.pde.data.trajectories import TrajectoryReader, open_problem
from thalweg.pde.problem import ProblemSpec

Batch = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetConfig:
    """One data set of a mixture."""

    name: str
    """Name in the table (``thalweg data list``), or ``auto`` to read what `path` says about itself."""
    path: str | None = None
    """File or folder; by default it is looked for in the module's `data_dir`."""
    num_trajectories: int | None = None
    """Training trajectories; by default the module's number."""
    weight: float = 1.0
    """How often each pair is visited per epoch; 0.5 means a random half of them."""
    num_val: int | None = None
    """Size of the validation part; by default the file's own, the published one, or a tenth."""
    num_test: int | None = None
    """Size of the test part, likewise."""


class PDEDataModule(L.LightningDataModule):
    """Batches of (input snapshot, lead time, label snapshot) from PDE trajectories.

    Training and validation use all2all pairs. Testing and prediction go from the first snapshot (or
    `fix_input_to_time_step`) to the last one, K * s, in one step per test trajectory. Validation and test
    give one loader per data set. Batches are described in `MixtureDataset`.

    After ``setup()``: `problems`, `normalizers` and `readers`, in the order of `datasets`.

    Args:
        datasets: names, or configs with options of single sets; all need equal channels and grids.
        data_dir: folder with the files.
        num_trajectories: training trajectories per set; -1 all, -2 half, -8 an eighth.
        batch_size: training batch per process.
        eval_batch_size: batch of the other loaders; `batch_size` by default.
        num_workers: worker processes per loader.
        max_num_time_steps: K of the pairs; the table's value by default.
        time_step_size: stride s of the pairs; the table's value by default.
        fix_input_to_time_step: train and validate on pairs that start at this snapshot only.
        allowed_time_transitions: keep only pairs (i, j) whose j - i, in steps of s, is among these.
        normalization: ``published`` constants, those of the ``file``, ``compute``, or ``auto`` (the file's if
            it has them, else the published ones).
        resolution: coarser grid, resampled spectrally; periodic problems only.
        seed: seed of the visiting order.
        pairs_per_trajectory: how many pairs of a trajectory follow each other in training, see `PairSampler`.
        cache: ``ram`` holds the training snapshots in memory, for sets that fit.
        check_finite: refuse NaN and infinity in the data; each snapshot is checked at its first reading.
        multiprocessing_context: how workers start, ``fork``, ``spawn`` or ``forkserver``.
    """

    problems: list[ProblemSpec]
    normalizers: list[Normalizer]
    readers: list[TrajectoryReader]

    def __init__(
        self,
        datasets: list[DatasetConfig | str],
        data_dir: str = "data",
        num_trajectories: int = -1,
        batch_size: int = 16,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        max_num_time_steps: int | None = None,
        time_step_size: int | None = None,
        fix_input_to_time_step: int | None = None,
        allowed_time_transitions: list[int] | None = None,
        normalization: Mode = "auto",
        resolution: int | None = None,
        seed: int = 0,
        pairs_per_trajectory: int = 1,
        cache: Literal["none", "ram"] = "none",
        check_finite: bool = True,
        multiprocessing_context: Literal["fork", "spawn", "forkserver"] | None = None,
    ) -> None:
        super().__init__()
        if not datasets:
            raise ValueError("datasets is empty; name at least one, see `thalweg data list`")
        self.configs = [DatasetConfig(name=d) if isinstance(d, str) else d for d in datasets]
        self.data_dir = data_dir
        self.num_trajectories = num_trajectories
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        self.num_workers = num_workers
        self.max_num_time_steps = max_num_time_steps
        self.time_step_size = time_step_size
        self.fix_input_to_time_step = fix_input_to_time_step
        self.allowed_time_transitions = (
            None if allowed_time_transitions is None else tuple(allowed_time_transitions)
        )
        self.normalization = normalization
        self.resolution = resolution
        self.seed = seed
        self.pairs_per_trajectory = pairs_per_trajectory
        self.cache = cache
        self.check_finite = check_finite
        self.multiprocessing_context = multiprocessing_context
        self._parts: dict[Part, list[PairDataset]] = {}
        self._loader: ResumableLoader | None = None
        self._place: dict[str, Any] = {}

    def setup(self, stage: str | None = None) -> None:
        """Open the files and decide on the constants; opening is repeated cheaply for each stage."""
        if not self._parts:
            self.readers = [self._open(config) for config in self.configs]
            self.problems = [reader.spec for reader in self.readers]
            self.normalizers = [
                normalizer_for(reader.spec, reader.constants, self.normalization, reader)
                for reader in self.readers
            ]
        parts: dict[Part, bool] = {"train": stage in ("fit", None), "val": stage in ("fit", "validate", None)}
        parts["test"] = stage in ("test", "predict", None)
        for part, wanted in parts.items():
            if wanted and part not in self._parts:
                self._parts[part] = [self._part(k, part) for k in range(len(self.readers))]
                MixtureDataset(self._parts[part])  # refuses sets that do not fit together
        for reader in self.readers:
            # Workers that are forked later must not inherit open files.
            reader.close()

    def _open(self, config: DatasetConfig) -> TrajectoryReader:
        from thalweg.pde.data.recognise import spec_for_file

        path = Path(self.data_dir if config.path is None else config.path)
        if config.path is not None and not path.is_absolute() and not path.exists():
            path = Path(self.data_dir) / config.path
        spec = spec_for_file(path) if config.name == "auto" else catalog.get(config.name)
        return open_problem(
            spec,
            path,
            num_val=config.num_val,
            num_test=config.num_test,
            resolution=self.resolution,
            check_finite=self.check_finite,
        )

    def _part(self, k: int, part: Part) -> PairDataset:
        reader, config = self.readers[k], self.configs[k]
        count = self.num_trajectories if config.num_trajectories is None else config.num_trajectories
        return PairDataset(
            reader,
            self.normalizers[k],
            part_range(reader.splits, part, count),
            None if reader.spec.steady else self.pair_rule(reader.spec, part),
            cache=self.cache == "ram" and part == "train",
        )

    def pair_rule(self, spec: ProblemSpec, part: Part) -> PairRule:
        """Rule of a time-dependent problem's pairs in a part."""
        steps = spec.max_num_time_steps if self.max_num_time_steps is None else self.max_num_time_steps
        stride = spec.time_step_size if self.time_step_size is None else self.time_step_size
        if part == "test":
            return PairRule(
                max_num_time_steps=1,
                time_step_size=steps * stride,
                fix_input_to_time_step=self.fix_input_to_time_step or 0,
            )
        return PairRule(
            max_num_time_steps=steps,
            time_step_size=stride,
            fix_input_to_time_step=self.fix_input_to_time_step,
            allowed_time_transitions=self.allowed_time_transitions,
        )

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled mixture of all data sets; continues in the middle of an epoch."""
        parts = self._parts["train"]
        sampler = PairSampler(
            [(len(part.trajectories), len(part.pairs)) for part in parts],
            [config.weight for config in self.configs],
            seed=self.seed,
            pairs_per_trajectory=self.pairs_per_trajectory,
            num_replicas=self.trainer.world_size if self.trainer else 1,
            rank=self.trainer.global_rank if self.trainer else 0,
        )
        self._loader = ResumableLoader(
            MixtureDataset(parts), batch_size=self.batch_size, sampler=sampler, **self._options()
        )
        self._loader.load_state_dict(self._place)
        self._place = {}
        return self._loader

    def state_dict(self) -> dict[str, Any]:
        """Place in the training data, for checkpoints.

        Lightning stores it as well, but gives it back only to loaders that were made after a checkpoint was
        read, not when ``trainer.estimated_stepping_batches`` has asked for the loader before.
        """
        return {} if self._loader is None else {"train": self._loader.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue at that place."""
        self._place = state_dict.get("train", {})
        if self._loader is not None:
            self._loader.load_state_dict(self._place)

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """One loader per data set over its validation pairs."""
        return self._eval_loaders("val")

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """One loader per data set, one pair per test trajectory."""
        return self._eval_loaders("test")

    def predict_dataloader(self) -> list[DataLoader[Any]]:
        """The test loaders."""
        return self._eval_loaders("test")

    def _eval_loaders(self, part: Part) -> list[DataLoader[Any]]:
        rules: Sequence[str] = [spec.mask_rule for spec in self.problems]
        return [
            DataLoader(
                MixtureDataset([dataset], ids=[k], mask_rules=rules),
                batch_size=self.eval_batch_size,
                shuffle=False,
                **self._options(),
            )
            for k, dataset in enumerate(self._parts[part])
        ]

    def _options(self) -> dict[str, Any]:
        return {
            "collate_fn": as_is,
            "num_workers": self.num_workers,
            "pin_memory": torch.cuda.is_available(),
            "persistent_workers": self.num_workers > 0,
            "multiprocessing_context": self.multiprocessing_context if self.num_workers else None,
        }

    def teardown(self, stage: str | None = None) -> None:
        """Close the files; the next ``setup()`` or read opens them again."""
        for reader in getattr(self, "readers", []):
            reader.close()
