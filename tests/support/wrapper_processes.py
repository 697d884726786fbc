"""SAM on shards and the trajectory store in two processes, in a module that spawned ones can import."""

import os
import socket
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from thalweg.core_optim.ema import EMA
from thalweg.core_optim.sam import SAM
from thalweg.core_optim.trajectory_store import TrajectoryStore

WORLD = 2
Found = dict[str, Tensor]


def train(shards: bool, rows: slice, adaptive: bool) -> Found:
    """Four steps on some rows of a batch: weights, and their average."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 3))
    if shards:
        mesh = init_device_mesh("cpu", (WORLD,))
        fully_shard(net[2], mesh=mesh)
        fully_shard(net, mesh=mesh)
    options = {"lr": 0.05, "momentum": 0.9}
    optimizer = SAM(net.parameters(), torch.optim.SGD, options, rho=0.5, adaptive=adaptive)
    ema = EMA(net)
    for step in range(4):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))[rows]

        def closure(x: Tensor = x) -> Tensor:
            loss: Tensor = (net(x) - x[:, :3]).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)
        ema.update(net)
    found = {**dict(net.named_parameters()), **{f"ema.{name}": w for name, w in ema.average.items()}}
    return {name: w.full_tensor().detach() if shards else w.detach() for name, w in found.items()}


def remember(rank: int, world: int) -> Found:
    """Past outputs of ten samples that change processes between epochs, in batches of unequal length."""
    store = TrajectoryStore(10, (2,), lag=1, dtype="bfloat16", rank=rank, world=world)
    found: Found = {}
    for epoch in range(4):
        order = torch.randperm(10, generator=torch.Generator().manual_seed(epoch))[: 10 - epoch]
        if world > 1:
            order = order[: 5 - epoch] if rank == 0 else order[5 - epoch :]
        past, valid = store.read(order, epoch)
        for index, row, ok in zip(order.tolist(), past, valid):
            found[f"{epoch}.{index}"] = torch.cat([row, ok[None].float()])
        store.write(order, torch.stack([order.float(), torch.full((len(order),), epoch)], 1), epoch)
    if world > 1:  # goes on with another number of processes
        alone = TrajectoryStore(10, (2,), lag=1, dtype="bfloat16")
        alone.load_state_dict(store.state_dict())
        found["alone"] = alone.read(torch.arange(10), 4)[0]
        store.load_state_dict(alone.state_dict())
        found["again"] = store.read(torch.arange(10), 4)[0]
    return found


def work(rank: int, port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    rows = slice(4 * rank, 4 * rank + 4)
    found = {f"sam.{adaptive}": train(True, rows, adaptive) for adaptive in (False, True)}
    found["store"] = remember(rank, WORLD)
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def run(folder: Path) -> list[dict[str, Found]]:
    """What each of the processes has found."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(work, (port, str(folder)), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]
