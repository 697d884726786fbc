"""Memory and time of training steps with and without gradients, each contender in a process of its own.

    OMP_NUM_THREADS=1 python benchmarks/zeroth_order.py [--blocks 12] [--width 512] [--tokens 256]

The network is a stack of pre-norm transformer blocks (attention of 8 heads, perceptron of 4 times the width)
with a linear head, in float32; a batch is one sequence of random tokens, the loss a mean square. Peak is the
largest resident memory of the process during the steps minus that before the optimizer was made, when the
weights were there; seconds are the least CPU time of the process over the steps. "slots" copies blocks
between two places of the same memory, as to a device: its peak is what a device has to hold.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from thalweg.core_optim.mezo import MeZO
from thalweg.core_optim.zo2 import ZO2, SlotBackend

CONTENDERS = ("AdamW", "SGD", "MeZO", "ZO2 in place", "ZO2 slots", "ZO2 slots, bfloat16 host")
STEPS = 4


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Tokens to tokens."""
        q, k, v = self.qkv(self.first(x_BLD)).unflatten(-1, (3, 8, -1)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        x_BLD = x_BLD + self.out(mixed.transpose(1, 2).flatten(2))
        return x_BLD + self.down(nn.functional.gelu(self.up(self.second(x_BLD))))


def make(blocks: int, width: int) -> nn.Sequential:
    """The network."""
    torch.manual_seed(0)
    return nn.Sequential(*(Block(width) for _ in range(blocks)), nn.Linear(width, width))


def optimizer_of(name: str, net: nn.Sequential) -> torch.optim.Optimizer:
    """A contender."""
    if name == "AdamW":
        return torch.optim.AdamW(net.parameters(), lr=1e-4, foreach=False)
    if name == "SGD":
        return torch.optim.SGD(net.parameters(), lr=1e-4, foreach=False)
    if name == "MeZO":
        return MeZO(net.parameters())
    found = ZO2(net.parameters())
    slots = SlotBackend("cpu") if "slots" in name else None
    host = torch.bfloat16 if "bfloat16" in name else None
    found.attach(net, list(net)[:-1], backend=slots, host_dtype=host)
    return found


def peak() -> int:
    """Largest resident memory so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident() -> int:
    """Resident memory now, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def warm_up() -> None:
    """Let libraries load what they need, on a small network."""
    net, x = make(1, 64), torch.randn(1, 16, 64)
    optimizer = torch.optim.AdamW(net.parameters(), foreach=False)
    net(x).square().mean().backward()
    optimizer.step()
    zo2 = optimizer_of("ZO2 slots", make(1, 64))
    zo2.step(lambda: net(x).mean())


def measure(name: str, blocks: int, width: int, tokens: int) -> dict[str, Any]:
    """Peak memory and least time of a step."""
    warm_up()
    x = torch.randn(1, tokens, width)
    net = make(blocks, width)
    before = resident()
    optimizer = optimizer_of(name, net)

    def closure() -> Tensor:
        loss = (net(x) - x).square().mean()
        if torch.is_grad_enabled():
            loss.backward()
        return loss

    times = []
    for _ in range(STEPS):
        start = time.process_time()
        optimizer.zero_grad()
        optimizer.step(closure)
        times.append(time.process_time() - start)
    weights = sum(p.numel() * 4 for p in net.parameters())
    state = sum(v.numel() * v.element_size() for s in optimizer.state.values() for v in s.values())
    return {
        "contender": name,
        "weights_MB": weights / 2**20,
        "block_MB": sum(p.numel() * 4 for p in net[0].parameters()) / 2**20,
        "state_MB": state / 2**20,
        "peak_MB": (peak() - before) / 2**20,
        "seconds": min(times),
    }


def main() -> None:
    """Measure all contenders, one after another."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", help="used by the script itself")
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(args.only, args.blocks, args.width, args.tokens)))
        return
    sizes = [f"--{name}={getattr(args, name)}" for name in ("blocks", "width", "tokens")]
    rows = []
    for name in CONTENDERS:
        command = [sys.executable, __file__, *sizes, "--only", name]
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1048576"}  # what is freed goes back at once
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        rows.append(json.loads(done.stdout))
        if name == CONTENDERS[0]:
            print(f"weights {rows[0]['weights_MB']:.0f} MB, one block {rows[0]['block_MB']:.1f} MB")
            print(f"{'':26}{'state MB':>10}{'peak MB':>10}{'s per step':>12}")
        row = rows[-1]
        print(f"{name:26}{row['state_MB']:10.0f}{row['peak_MB']:10.0f}{row['seconds']:12.3f}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
