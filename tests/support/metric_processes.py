"""A metric computed by several processes, in a module that spawned processes can import."""

import json
from pathlib import Path

import torch
from torch import Tensor
from torchmetrics import Metric


def gather(
    rank: int, world: int, store: str, results: str, metric: Metric, pred: Tensor, target: Tensor
) -> None:
    """One of several processes: sees every ``world``-th sample, reports the statistics over all."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    metric.update(pred[rank::world], target[rank::world])
    report = {key: value.item() for key, value in metric.compute().items()}
    Path(results, f"{rank}.json").write_text(json.dumps(report))
    torch.distributed.destroy_process_group()
