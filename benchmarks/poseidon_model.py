"""Speed and memory of scOT against a plain implementation of the same equations, in one process.

The plain network spreads the position bias over all pairs of tokens before its sigmoid and in every forward
pass, builds the shift mask anew, adds bias and mask to stored logits, normalises in separate steps and calls
every layer as torch has it. Both networks share their weights and are timed in turn; the best of several
repetitions counts.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/poseidon_model.py [--quick] [--json FILE]
"""

# ruff: noqa: D102

from __future__ import annotations

import argparse
import copy
import json
import math
import multiprocessing
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from thalweg.pde.poseidon import ScOT, ScOTConfig
from thalweg.pde.poseidon.attention import CosineAttention, offsets
from thalweg.pde.poseidon.blocks import WindowAttention
from thalweg.pde.poseidon.layers import ConditionalLayerNorm, PatchProjection, PatchRecovery


class PlainNorm(nn.Module):
    """Conditional layer norm from mean and mean square."""

    def __init__(self, norm: ConditionalLayerNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: Tensor, time_B: Tensor, residual: Tensor | None = None) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        variance = (x**2).mean(-1, keepdim=True) - mean**2
        x = (x - mean) / (variance + self.eps).sqrt()
        gain, shift = (m(time_B[:, None])[:, None, None] for m in (self.weight, self.bias))
        out = gain * x + shift
        return out if residual is None else residual + out


class PlainAttention(nn.Module):
    """Window attention with stored logits."""

    def __init__(self, attention: WindowAttention) -> None:
        super().__init__()
        self.inner: CosineAttention = attention.self
        self.dense, self.windows = attention.output.dense, attention.windows

    def forward(self, x: Tensor) -> Tensor:
        heads, (h, w) = self.inner.num_heads, self.windows.window
        x = self.windows.split(x)
        q, k, v = (
            linear(x).view(*x.shape[:2], heads, -1).permute(0, 2, 1, 3)
            for linear in (self.inner.query, self.inner.key, self.inner.value)
        )
        logits = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        logits = logits * torch.clamp(self.inner.logit_scale, max=math.log(100.0)).exp()
        logits = logits + self.bias(h, w).unsqueeze(0)
        if self.windows.shifted:
            mask = self.windows.shift_mask(x.device, x.dtype)
            stacked = logits.view(-1, mask.shape[0], heads, h * w, h * w)
            logits = (stacked + mask[None, :, None] / 2 + mask[None, :, None] / 2).view_as(logits)
        mixed = logits.softmax(-1) @ v
        mixed = mixed.permute(0, 2, 1, 3).contiguous().view_as(x)
        return self.windows.join(self.dense(mixed))

    def bias(self, h: int, w: int) -> Tensor:
        mlp = self.inner.continuous_position_bias_mlp
        rows, cols = (offsets(n, n, mlp[0].weight.device) for n in (h, w))
        table = torch.stack(torch.meshgrid(rows, cols, indexing="ij"), -1)
        table = mlp[2](mlp[1](mlp[0](table))).view(-1, self.inner.num_heads)
        i, j = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        di, dj = (t.flatten()[:, None] - t.flatten()[None, :] for t in (i, j))
        index = (di + h - 1) * (2 * w - 1) + dj + w - 1
        bias = table[index.view(-1)].view(h * w, h * w, -1).permute(2, 0, 1).contiguous()
        return 16 * torch.sigmoid(bias)


class PlainEmbedding(nn.Module):
    """Strided convolution, then tokens."""

    def __init__(self, embedding: PatchProjection) -> None:
        super().__init__()
        self.projection = embedding.projection

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(x).permute(0, 2, 3, 1)


class PlainRecovery(nn.Module):
    """Transposed convolution, then the joining convolution."""

    def __init__(self, recovery: PatchRecovery) -> None:
        super().__init__()
        self.projection, self.mixup = recovery.projection, recovery.mixup

    def forward(self, x: Tensor) -> Tensor:
        return self.mixup(self.projection(x.permute(0, 3, 1, 2).contiguous()))


PLAIN = {
    ConditionalLayerNorm: PlainNorm,
    WindowAttention: PlainAttention,
    PatchProjection: PlainEmbedding,
    PatchRecovery: PlainRecovery,
}


def plain(model: ScOT) -> ScOT:
    """Copy of a network with its fast parts replaced; parameters are shared."""
    memo = {id(p): p for p in model.parameters()}
    other = copy.deepcopy(model, memo)
    for name, module in list(other.named_modules()):
        if type(module) in PLAIN:
            other.set_submodule(name, PLAIN[type(module)](module))
    for module in other.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            # A hooked layer is called as it is, not taken apart.
            module.register_forward_hook(lambda *_: None)
    return other


def make_model() -> ScOT:
    """Size T with weights strong enough that no branch vanishes."""
    torch.manual_seed(0)
    model = ScOT(ScOTConfig.preset("T"))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 2 and p.shape[1] > 1:
                p.normal_(std=p.shape[1] ** -0.5)
            elif "norm" in name and name.endswith("weight.bias"):
                p.fill_(1.0)
    return model.eval()


def sample(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random fields, lead times and labels."""
    generator = torch.Generator().manual_seed(batch)
    x, y = (torch.randn(batch, 4, 128, 128, generator=generator) for _ in range(2))
    return x, torch.rand(batch, generator=generator), y


def forward(model: ScOT, batch: int) -> Callable[[], None]:
    x, t, _ = sample(batch)

    def run() -> None:
        with torch.no_grad():
            model(x, t)

    return run


def forward_backward(model: ScOT, batch: int) -> Callable[[], None]:
    x, t, y = sample(batch)

    def run() -> None:
        model.zero_grad(set_to_none=True)
        model.train()
        model(x, t, labels=y).loss.backward()
        model.eval()

    return run


TASKS = {
    "forward, batch 1": (forward, 1, 20),
    "forward, batch 8": (forward, 8, 7),
    "forward + backward, batch 1": (forward_backward, 1, 7),
    "forward + backward, batch 8": (forward_backward, 8, 4),
}


def interleaved(jobs: list[Callable[[], None]], repeats: int) -> list[float]:
    """Best time of each job in seconds, jobs taking turns after one warm-up each."""
    best = [math.inf] * len(jobs)
    for job in jobs:
        job()
    for _ in range(repeats):
        for i, job in enumerate(jobs):
            start = time.perf_counter()
            job()
            best[i] = min(best[i], time.perf_counter() - start)
    return best


def matmul() -> Callable[[], None]:
    a, b, out = (torch.randn(2048, 2048) for _ in range(3))

    def run() -> None:
        torch.mm(a, b, out=out)

    return run


def agreement(fast: ScOT, slow: ScOT) -> float:
    """Relative L2 difference of the two networks."""
    x, t, _ = sample(2)
    with torch.no_grad():
        a, b = fast(x, t).output, slow(x, t).output
    return ((a - b).norm() / b.norm()).item()


def _peak(variant: str, task: str, queue: multiprocessing.Queue) -> None:
    torch.set_num_threads(1)
    model = make_model() if variant == "fast" else plain(make_model())
    kind, batch, _ = TASKS[task]
    job = kind(model, batch)
    before = _status("VmRSS")
    for _ in range(2):
        job()
    queue.put(max(_status("VmHWM") - before, 0.0))


def _status(field: str) -> float:
    """Memory of this process in MiB; unlike ru_maxrss it does not inherit the parent's peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def peak_memory(variant: str, task: str) -> float:
    """Growth of the resident set during a task in MiB, measured in a fresh process."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_peak, args=(variant, task, queue))
    process.start()
    result = queue.get()
    process.join()
    return result


def main() -> None:
    """Print the table; write it as JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few repetitions, batch 1 only, no memory")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    fast = make_model()
    slow = plain(fast)
    report = {"torch": torch.__version__, "machine": platform.machine(), "difference": agreement(fast, slow)}
    print(f"scOT-T, 4 x 128 x 128, float32, 1 thread, torch {torch.__version__}")
    print(f"relative difference of the outputs: {report['difference']:.1e}")
    print(
        f"{'task':30s}{'ours':>9s}{'plain':>9s}{'ratio':>8s}{'ours/mm':>9s}{'plain/mm':>9s}{'peak MiB':>16s}"
    )
    for task, (kind, batch, repeats) in TASKS.items():
        if args.quick and batch > 1:
            continue
        jobs = [kind(fast, batch), kind(slow, batch), matmul()]
        ours, theirs, mm = interleaved(jobs, 2 if args.quick else repeats)
        row = {"ours_s": ours, "plain_s": theirs, "matmul_s": mm, "ratio": theirs / ours}
        memory = ""
        if not args.quick:
            row["ours_mib"], row["plain_mib"] = (peak_memory(v, task) for v in ("fast", "plain"))
            memory = f"{row['ours_mib']:7.0f} /{row['plain_mib']:7.0f}"
        report[task] = row
        print(
            f"{task:30s}{ours * 1e3:7.0f}ms{theirs * 1e3:7.0f}ms{theirs / ours:8.2f}"
            f"{ours / mm:9.2f}{theirs / mm:9.2f}{memory:>16s}",
            flush=True,
        )
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
