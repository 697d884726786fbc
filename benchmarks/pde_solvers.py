"""Speed and accuracy of the solvers that generate data: seconds per trajectory, orders, conservation.

Times are CPU seconds of this process with one thread, per trajectory of all published snapshots (or per
sample of a steady problem), after one run to warm up. The accuracy figures come from the ``checks`` functions
of the solver families, which run in float64; the column on the right says what theory gives.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python benchmarks/pde_solvers.py
    ... --names NS-Sines ACE --resolutions 64 128     only these sets
    ... --checks no                                    only times
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import torch

from thalweg.pde.solvers import recipes
from thalweg.pde.solvers.recipes import Check


def seconds_per_sample(name: str, resolution: int, batch: int, dtype: str) -> float:
    """CPU seconds for one sample, in a batch of ``batch`` after a short warm-up."""
    recipe = recipes.get(name)
    warm_up = recipe.request(
        (0,), seed=0, resolution=resolution, frames=2 if recipe.times else None, dtype=dtype
    )
    recipe.sample(warm_up)
    request = recipe.request(tuple(range(1, batch + 1)), seed=0, resolution=resolution, dtype=dtype)
    start = time.process_time()
    recipe.sample(request)
    return (time.process_time() - start) / batch


def checks_of(names: list[str]) -> list[Check]:
    """Checks of the families behind some data sets, each once."""
    found: dict[str, Check] = {}
    for name in names:
        make = getattr(recipes.family(name), "checks", list)
        found |= {check.name: check for check in make()}
    return list(found.values())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--names", nargs="*", default=recipes.names(), help="data sets (all)")
    parser.add_argument("--resolutions", nargs="*", type=int, default=[64, 128])
    parser.add_argument("--batch", type=int, default=2, help="samples per run")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64"])
    parser.add_argument("--checks", default="yes", choices=["yes", "no", "only"])
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    return parser.parse_args()


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    protocol = {
        "torch": torch.__version__,
        "cpu": platform.processor() or platform.machine(),
        "threads": 1,
        "dtype": options.dtype,
        "batch": options.batch,
        "clock": "process CPU time",
    }
    print(", ".join(f"{key}: {value}" for key, value in protocol.items()))
    times: dict[str, dict[int, float]] = {}
    if options.checks != "only":
        print(f"\n{'seconds per trajectory':<24}" + "".join(f"{f'{n}x{n}':>10}" for n in options.resolutions))
        for name in options.names:
            print(f"{name:<24}", end="", flush=True)
            times[name] = {}
            for resolution in options.resolutions:
                times[name][resolution] = seconds_per_sample(name, resolution, options.batch, options.dtype)
                print(f"{times[name][resolution]:>10.3f}", end="", flush=True)
            print()
    figures: dict[str, dict[str, object]] = {}
    if options.checks != "no":
        print(f"\n{'check':<72}{'measured':>12}  expected")
        for check in checks_of(options.names):
            value = check.measure()
            figures[check.name] = {"measured": value, "expected": check.expected}
            print(f"{check.name:<72}{value:>12.3g}  {check.expected}", flush=True)
    if options.json:
        report = {"protocol": protocol, "seconds_per_sample": times, "checks": figures}
        options.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
