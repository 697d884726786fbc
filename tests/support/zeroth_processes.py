"""Zeroth-order steps in two processes, in a module that spawned processes can import."""

import os
import socket
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from thalweg.core_optim.mezo import MeZO
from thalweg.core_optim.zo2 import ZO2, SlotBackend

WORLD = 2


def train(name: str, rows: slice, seed: int = 3) -> dict:
    """Five steps on some rows of a batch: projected gradients and weights."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    options = {"lr": 1e-2, "weight_decay": 0.1, "seed": seed, "num_directions": 2}
    if name == "MeZO":
        optimizer = MeZO(net.parameters(), **options)
    else:
        optimizer = ZO2(net.parameters(), **options)
        optimizer.attach(net, [net[0], net[2], net[4]], backend=SlotBackend("cpu"))
    gradients = []
    for step in range(5):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))[rows]
        optimizer.step(lambda x=x: (net(x) - x[:, :1]).square().mean())
        gradients.append(list(optimizer.projected_gradients))
    if isinstance(optimizer, ZO2):
        optimizer.detach()
    return {"gradients": gradients, "weights": net.state_dict()}


def work(rank: int, port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    found = {name: train(name, slice(4 * rank, 4 * rank + 4)) for name in ("MeZO", "ZO2")}
    try:
        train("MeZO", slice(None), seed=rank)
        found["error"] = ""
    except ValueError as error:
        found["error"] = str(error)
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
    os._exit(0)  # a late thread of gloo may want the interpreter while it shuts down, and aborts the process


def fit_mezo_ddp(folder: Path) -> dict:
    """Weights of a rank after three steps under Lightning; for the processes of ``poseidon_processes``."""
    from lightning.pytorch.strategies import DDPStrategy
    from poseidon_runs import data, module, scot, trainer

    from thalweg.apps.zeroth_order import ZerothOrder
    from thalweg.core_optim.config import OptimConfig

    options = {"strategy": DDPStrategy(), "devices": WORLD, "callbacks": [ZerothOrder()]}
    loop = trainer(folder, max_steps=3, val_check_interval=3, **options)
    model = module(scot(seed=loop.global_rank), optim=OptimConfig(name="mezo", lr=1e-5, eps=1e-3))
    loop.fit(model, datamodule=data(folder, "NS-Sines"))
    gradient = float(loop.callback_metrics["train/projected_gradient"])
    return {"weights": dict(model.network.state_dict()), "gradient": gradient, "steps": loop.global_step}


def run(folder: Path) -> list[dict]:
    """What each of the processes has found."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(work, (port, str(folder)), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]
