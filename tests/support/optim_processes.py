"""Optimizer steps in two processes, in a module that spawned processes can import.

All cases run in one pair of processes. What comes out is compared by the tests, which know the steps of one.
"""

import os
import socket
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from optim_cases import SHAPES, SPECTRAL, Case, Shapes, cases, element_rules, gradients, make, weights
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

Found = dict[str, Any]
WORLD = 2
STEPS = 5
WIDE: Shapes = {"odd": (5, 7), "conv": (4, 3, 2, 2), "short": (3, 1), "even": (4, 4)}
"""Shapes that can be cut along their second dimension."""
EVEN: Shapes = {"conv": (4, 3, 2, 2), "even": (4, 4)}
"""Shapes that tensor parallelism and FSDP can both cut."""
TRAINED = ("adamw", "adamp", "kron")
WHOLE = StateDictOptions(full_state_dict=True)


class Weights(nn.Module):
    """Parameters without a purpose; the gradients of ``forward`` are its arguments."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        super().__init__()
        for name, value in values.items():
            self.register_parameter(name, nn.Parameter(value))

    def forward(self, wanted: dict[str, Tensor]) -> Tensor:
        return sum((p * wanted[name]).sum() for name, p in self.named_parameters())


def give(module: nn.Module, step: int, shapes: Shapes, dtype: torch.dtype) -> None:
    """Gradients of a step, cut as the parameters are."""
    for name, g in gradients(step, shapes, dtype).items():
        p = module.get_parameter(name)
        if not isinstance(p, DTensor):
            p.grad = g
        elif all(isinstance(placement, Shard | Replicate) for placement in p.placements):
            p.grad = distribute_tensor(g, p.device_mesh, p.placements)
        else:
            part = g.chunk(WORLD)[dist.get_rank()]
            p.grad = DTensor.from_local(part, p.device_mesh, p.placements, shape=g.shape, stride=g.stride())


def whole(x: Tensor) -> Tensor:
    x = x.detach()
    return (x.full_tensor() if isinstance(x, DTensor) else x).clone()


def values(module: nn.Module) -> dict[str, Tensor]:
    return {name: whole(p) for name, p in module.named_parameters()}


def alone(case: Case, shapes: Shapes, dtype: torch.dtype = torch.float32, **options: Any) -> Found:
    """What one process does: weights and state after all steps."""
    module = Weights(weights(shapes, dtype))
    optimizer = make(case, module.named_parameters(), **options)
    for step in range(STEPS):
        give(module, step, shapes, dtype)
        optimizer.step()
    return {"weights": values(module), "state": get_optimizer_state_dict(module, optimizer)["state"]}


def sharded(case: Case, shapes: Shapes, dtype: torch.dtype, build: Any, **options: Any) -> Found:
    module = build(Weights(weights(shapes, dtype)))
    optimizer = make(case, module.named_parameters(), **options)
    for step in range(STEPS):
        give(module, step, shapes, dtype)
        optimizer.step()
    state = get_optimizer_state_dict(module, optimizer, options=WHOLE)["state"]
    return {"weights": values(module), "state": state}


def attempted(case: Case, *args: Any) -> Found:
    try:
        return sharded(case, *args)
    except ValueError as error:
        return {"error": str(error)}


def resumed(case: Case, shapes: Shapes, build: Any, file: str | None = None) -> Found:
    """Three steps, a state dict, perhaps through a file, and the rest in a new optimizer."""
    module = build(Weights(weights(shapes)))
    optimizer = make(case, module.named_parameters())
    for step in range(STEPS):
        if step == 3:
            saved = get_optimizer_state_dict(module, optimizer)
            module = build(Weights(values(module)))
            optimizer = make(case, module.named_parameters())
            if file:
                checkpoint.save(saved, checkpoint_id=file)
                saved = get_optimizer_state_dict(module, optimizer)
                checkpoint.load(saved, checkpoint_id=file)
            set_optimizer_state_dict(module, optimizer, saved)
        give(module, step, shapes, torch.float32)
        optimizer.step()
    return {"weights": values(module)}


def replicated(case: Case, shapes: Shapes, dtype: torch.dtype, **options: Any) -> Found:
    """DDP on gradients that differ between the processes and have the wanted mean."""
    module = DistributedDataParallel(Weights(weights(shapes, dtype)))
    optimizer = make(case, module.module.named_parameters(), **options)
    sign = 1 if dist.get_rank() == 0 else -1
    for step in range(STEPS):
        off = gradients(1000 + step, shapes, dtype)
        optimizer.zero_grad()
        module({k: g + sign * off[k] for k, g in gradients(step, shapes, dtype).items()}).backward()
        optimizer.step()
    return {"weights": values(module.module)}


def trained(case: Case, rows: slice, build: Any = None) -> Found:
    """Steps on true gradients of a network, with some rows of a batch."""
    torch.manual_seed(0)
    net: nn.Module = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))
    net = net if build is None else build(net)
    optimizer = make(case, net.named_parameters())
    for step in range(STEPS):
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))[rows]
        optimizer.zero_grad()
        (net(x) - x[:, :1]).square().mean().backward()
        optimizer.step()
    return {"weights": values(net)}


def shard_layers(mesh: Any) -> Any:
    """FSDP2 for each layer and the rest."""

    def build(net: nn.Module) -> nn.Module:
        for layer in net:
            fully_shard(layer, mesh=mesh)
        return fully_shard(net, mesh=mesh)

    return build


def cut(mesh: Any, placements: list[Any]) -> Any:
    """Cuts all parameters of a module by hand."""

    def build(module: nn.Module) -> nn.Module:
        for name, p in list(module.named_parameters()):
            setattr(module, name, nn.Parameter(distribute_tensor(p.detach(), mesh, placements)))
        return module

    return build


def work(rank: int, port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    line, square = init_device_mesh("cpu", (WORLD,)), init_device_mesh("cpu", (WORLD, 1))

    grid = init_device_mesh("cpu", (1, WORLD), mesh_dim_names=("data", "tensor"))

    def fsdp(module: nn.Module) -> nn.Module:
        return fully_shard(module, mesh=line)

    def tensor_parallel(module: nn.Module) -> nn.Module:
        return fully_shard(cut(grid["tensor"], [Shard(0)])(module), mesh=grid["data"])

    found: dict[str, dict[str, Any]] = {}
    single, half = torch.float32, torch.bfloat16

    def record(kind: str, case: Case, function: Any, *args: Any, **options: Any) -> None:
        found.setdefault(kind, {})[case.label] = function(case, *args, **options)

    for case in cases():
        record("fsdp", case, sharded, SHAPES, single, fsdp)
        record("resumed", case, resumed, SHAPES, fsdp)
        if set(case.options) <= {"weight_decay"}:
            record("file", case, resumed, SHAPES, fsdp, str(Path(folder, case.rule)))
        record("ddp", case, replicated, SHAPES, single)
        record("columns", case, sharded, WIDE, single, cut(line, [Shard(1)]))
        record("hybrid", case, sharded, SHAPES, single, cut(square, [Replicate(), Shard(0)]))
        record("twice", case, sharded, SHAPES, single, cut(square, [Shard(0), Shard(0)]))
        record("strided", case, attempted, EVEN, single, tensor_parallel)
        record("rounded", case, sharded, SHAPES, half, fsdp, stochastic_rounding=True)
        record("rounded columns", case, sharded, WIDE, half, cut(line, [Shard(1)]), stochastic_rounding=True)
        record("rounded ddp", case, replicated, SHAPES, half, stochastic_rounding=True)
        if case.rule in element_rules():
            record("complex", case, sharded, SPECTRAL, torch.complex64, cut(line, [Shard(0)]))
    record("compiled", Case("lion"), sharded, SHAPES, single, fsdp, compile=True)
    for rule in TRAINED:
        record("trained", Case(rule), trained, slice(4 * rank, 4 * rank + 4), shard_layers(line))
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
    # a process that used gloo ends in an abort now and then (torch 2.13: 1 of 48) unless it leaves at once
    os._exit(0)


def run(folder: Path) -> list[dict[str, Any]]:
    """What each of the processes has found, by kind of distribution and case."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(work, (port, str(folder)), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]
