"""Work for two processes, in a module that spawned processes can import."""

import os
from collections.abc import Callable
from pathlib import Path

import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from poseidon_runs import data, module, scot, trainer

WORLD = 2


def launch(rank: int, work: Callable[[Path], object], port: int, folder: str) -> None:
    """Run ``work`` as one of two processes that Lightning did not start itself."""
    os.environ |= {
        "LOCAL_RANK": str(rank),
        "NODE_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    torch.save(work(Path(folder)), Path(folder) / f"{work.__name__}_{rank}.pt")
    torch.distributed.destroy_process_group()


def run(work: Callable[[Path], object], folder: Path) -> list:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(launch, (work, port, str(folder)), nprocs=WORLD)
    return [torch.load(folder / f"{work.__name__}_{rank}.pt", weights_only=True) for rank in range(WORLD)]


def fit_ddp(folder: Path) -> dict:
    loop = trainer(folder, strategy=DDPStrategy(), devices=WORLD, max_steps=3, val_check_interval=3)
    model = module(scot(seed=loop.global_rank))
    loop.fit(model, datamodule=data(folder, "NS-Sines"))
    metrics = {name: float(value) for name, value in loop.callback_metrics.items() if name.startswith("val")}
    return {"weights": dict(model.network.state_dict()), "metrics": metrics}


def fit_sharded(folder: Path) -> dict:
    strategy = ModelParallelStrategy(data_parallel_size=WORLD, tensor_parallel_size=1)
    loop = trainer(folder, strategy=strategy, devices=WORLD, max_steps=3, gradient_clip_val=5.0)
    model = module(scot())
    loop.fit(model, datamodule=data(folder, "NS-Sines"))
    local = sum(p.to_local().numel() for p in model.network.parameters())
    full = {name: p.full_tensor().detach() for name, p in model.network.named_parameters()}
    return {"weights": full, "local": local}


def fit_sharded_and_averaged(folder: Path) -> str:
    strategy = ModelParallelStrategy(data_parallel_size=WORLD, tensor_parallel_size=1)
    callbacks = [EMAWeightAveraging()]
    loop = trainer(folder, strategy=strategy, devices=WORLD, max_steps=1, callbacks=callbacks)
    try:
        loop.fit(module(scot()), datamodule=data(folder, "NS-Sines"))
    except ValueError as error:
        return str(error)
    return "no error"
