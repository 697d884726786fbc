"""Time of an optimizer step and bytes of state, ours beside torch and the peers, interleaved in one process.

    python -m pip install --no-deps --target PEERS pytorch_optimizer==4.1.0 timm==1.0.31 heavyball==3.2.1
    OMP_NUM_THREADS=1 python benchmarks/optim_step.py --peers PEERS [--rules AdamW Muon] [--json FILE]

Elementwise rules step a list of 25 million parameters in the shapes of a transformer (embedding 12000 x 512,
6 blocks of width 512 with inner width 2048, norms and biases), matrix rules the six matrices of one block. In
each round every contender takes one step (SOAP: as many as its work repeats after) with the same fresh
gradients; its time is the least CPU time of the process over the rounds (SOAP: the median), its ratio that to
the foreach AdamW of torch beside it. The first step, which compiles, allocates and initialises, is given in
seconds of the clock; the compiler starts without a cache. Peers run in each of their modes, heavyball
compiled. One thread; without --peers only torch and ours.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from optim_peers import CASES, Case, Make, load_peers, peer_contenders, torch_contenders
from torch.optim import Optimizer

from thalweg.core_optim import registry

WIDTH, INNER, VOCABULARY, BLOCKS = 512, 2048, 12000, 6
OURS = {
    "ours compiled": {"compile": True},
    "ours foreach": {"foreach": True},
    "ours loop": {"foreach": False},
}


def block_matrices() -> list[tuple[int, ...]]:
    """Shapes of the matrices of one block: attention, then the two layers of the perceptron."""
    return [(WIDTH, WIDTH)] * 4 + [(INNER, WIDTH), (WIDTH, INNER)]


def transformer() -> list[tuple[int, ...]]:
    """Shapes of all parameters, 25 million."""
    vectors = [(WIDTH,)] * 9 + [(INNER,)]
    return [(VOCABULARY, WIDTH), *(block_matrices() + vectors) * BLOCKS, (WIDTH,), (WIDTH,)]


def step_times(
    contenders: dict[str, Make], shapes: list[tuple[int, ...]], rounds: int, period: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Seconds of the first step, least CPU seconds per step and bytes of state of each contender."""
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(0.02 * torch.randn(s, generator=generator)) for s in shapes]
    gradients = [0.01 * torch.randn(s, generator=generator) for s in shapes]
    rows: dict[str, dict[str, Any]] = {}
    running: dict[str, Callable[[], float]] = {}
    for label, make in contenders.items():
        try:
            optimizer = make(parameters)
            timed = stepper(optimizer, parameters, gradients)
            start = time.perf_counter()
            timed()
            first = time.perf_counter() - start
            for _ in range(period):
                timed()
        except Exception as error:
            warnings.warn(f"{label}: {type(error).__name__}: {str(error).splitlines()[0]}", stacklevel=1)
            continue
        running[label] = timed
        rows[label] = {"first_s": first, "state_bytes": state_bytes(optimizer)}
    times: dict[str, list[float]] = {label: [] for label in running}
    for _ in range(rounds):
        for label, timed in running.items():
            times[label].append(sum(timed() for _ in range(period)) / period)
    for label, row in rows.items():
        # where work repeats after several steps it may drift against the rounds, whose least has less of it
        row["step_s"] = min(times[label]) if period == 1 else statistics.median(times[label])
        yield label, row


def stepper(
    optimizer: Optimizer, parameters: list[torch.nn.Parameter], gradients: list[torch.Tensor]
) -> Callable[[], float]:
    """A function that takes one step with the given gradients and returns its CPU seconds."""

    def timed() -> float:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
        start = time.process_time()
        optimizer.step()
        return time.process_time() - start

    if hasattr(optimizer, "train"):
        optimizer.train()  # schedule-free ones refuse to step otherwise
    return timed


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of all tensors in the state, each storage once."""
    found: dict[int, int] = {}

    def visit(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, dict):
            for item in value.values():
                visit(item)
        elif isinstance(value, list | tuple):
            for item in value:
                visit(item)

    visit(dict(optimizer.state))
    return sum(found.values())


def ours(title: str, case: Case) -> dict[str, Make]:
    """Our rule in its modes."""
    name = registry.CLASSES[title]
    modes: dict[str, dict[str, Any]] = {"ours": {}} if case.matrices else OURS
    if hasattr(registry.rule(name), "fused"):
        modes = {**modes, "ours fused": {"kernel": "fused"}}

    def constructor(mode: dict[str, Any]) -> Make:
        return lambda parameters: registry.create(
            name, parameters, lr=1e-4, weight_decay=0.01, **case.options, **mode
        )

    return {label: constructor(mode) for label, mode in modes.items()}


def run(title: str, case: Case, libraries: dict[str, Any], rounds: int) -> dict[str, dict[str, Any]]:
    """Time one rule against its peers and print the table."""
    gc.collect()
    shapes = block_matrices() if case.matrices else transformer()
    contenders = {**torch_contenders(title), **ours(title, case), **peer_contenders(case, libraries)}
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        rows = dict(step_times(contenders, shapes, rounds, case.period))
    unit = rows["torch AdamW foreach"]["step_s"]
    size = 4 * sum(torch.Size(s).numel() for s in shapes)
    peers = {label: row["step_s"] for label, row in rows.items() if label.split()[0] in libraries}
    best = min(peers, key=peers.__getitem__) if peers else None
    print(f"\n{title}: {size / 4e6:.1f}M parameters, official state {case.official_state} x")
    print(f"  {'':44} {'ms':>9} {'/ torch':>8} {'/ best peer':>11} {'state x':>8} {'first s':>8}")
    for label, row in rows.items():
        row["ratio"] = row["step_s"] / unit
        row["of_best_peer"] = row["step_s"] / peers[best] if best else None
        row["state_x"] = row["state_bytes"] / size
        relative = f"{row['of_best_peer']:11.2f}" if best else f"{'':11}"
        print(
            f"  {label:44} {1e3 * row['step_s']:9.1f} {row['ratio']:8.2f} {relative} {row['state_x']:8.3f}"
            f" {row['first_s']:8.1f}",
            flush=True,
        )
    return rows


def main() -> None:
    """Read the command line, run the rules, write the numbers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", metavar="DIR", help="folder with the peers installed")
    parser.add_argument("--rules", nargs="+", choices=CASES, default=list(CASES), metavar="RULE")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        libraries = load_peers(arguments.peers)
        results = {title: run(title, CASES[title], libraries, arguments.rounds) for title in arguments.rules}
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
