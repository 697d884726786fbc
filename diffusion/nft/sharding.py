"""Policies of large transformers on several GPUs: their weights are split between processes (FSDP2)."""

from __future__ import annotations

from typing import Any

from torch import nn

from thalweg.diffusion.nft.geometry import Geometry
from thalweg.diffusion.nft.policy import LoraPolicy, Policy

REPEATED = ("transformer_blocks", "single_transformer_blocks")
"""Lists of layers in transformers of diffusers."""


def shard(policy: Policy, mesh: Any, shape: Geometry) -> None:
    """Split the weights over a mesh of devices.

    Adapters are split as their layers are, all of them alike, so that averages need no other process.

    Raises:
        ValueError: If processes would have different numbers of batches; they must ask the network together.
    """
    if not shape.even:
        raise ValueError(
            f"groups is {shape.groups} on {shape.world_size} processes, allowed with sharded weights:"
            " a multiple of the number of processes"
        )
    for network in policy.networks.values():
        shard_network(network, mesh)
    if isinstance(policy, LoraPolicy):
        policy.rebind()


def shard_network(network: nn.Module, mesh: Any) -> None:
    """Split a transformer block by block."""
    from torch.distributed.fsdp import fully_shard

    for name in REPEATED:
        for block in getattr(network, name, ()):
            fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)
