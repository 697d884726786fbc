"""Largest differences between scOT and recorded results of the published implementation.

Each case is a folder with a small network in the published layout and what the original code made of it. The
repository ships four; other folders can be named.

    OMP_NUM_THREADS=1 python benchmarks/poseidon_agreement.py [FOLDER ...]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from thalweg.pde.poseidon import ScOT
from thalweg.pde.poseidon.rollout import rollout

SHIPPED = Path(__file__).parents[1] / "tests" / "data" / "poseidon"


def agreement(folder: Path) -> dict[str, float]:
    """Differences of output, loss, gradients and rollouts of one case."""
    network, io = ScOT.from_pretrained(folder).eval(), load_file(folder / "io.safetensors")
    mask = io.get("pixel_mask")
    with torch.no_grad():
        single = network(io["pixel_values"], io["time"], mask, io["labels"]).output
    network.double()
    x, labels = io["pixel_values"].double(), io["labels"].double()
    result = network(x, io["time"], mask, labels)
    result.loss.backward()
    recorded = json.loads((folder / "grad_norms.json").read_text())
    norms = {name: p.grad.norm().item() for name, p in network.named_parameters() if p.grad is not None}
    known = {name.replace(".gamma", ".weight"): value for name, value in recorded.items()}
    return {
        "float64 output, largest |difference|": (result.output - io["output"]).abs().max().item(),
        "float64 loss, |difference|": abs(result.loss.item() - io["loss"].item()),
        "float64 gradient norms, largest relative": max(
            abs(norms[name] - value) / value for name, value in known.items() if value > 1e-9
        ),
        "float64 rollouts, largest |difference|": rollouts(network, folder, x, labels),
        "float32 output, relative L2": ((single - io["output"]).norm() / io["output"].norm()).item(),
    }


def rollouts(network: ScOT, folder: Path, x: torch.Tensor, labels: torch.Tensor) -> float:
    """Largest difference after the last step of the recorded rollouts; not a number where there are none."""
    if not (folder / "autoregressive.json").exists():
        return float("nan")
    states, worst = load_file(folder / "autoregressive.safetensors"), 0.0
    for record in json.loads((folder / "autoregressive.json").read_text()):
        mask = None
        if record["pixel_mask"] is not None:
            mask = torch.zeros(1, labels.shape[1], dtype=torch.bool)
            mask[:, -1] = True
        with torch.no_grad():
            path = rollout(
                network, x[:1], record["lead_time"], record["ar_steps"], labels=labels[:1], pixel_mask=mask
            )
        worst = max(worst, (path.output - states[f"{record['id']}.output"]).abs().max().item())
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="*", type=Path, help="cases, or folders of cases (the shipped ones)")
    named = parser.parse_args().folders or [SHIPPED]
    folders = sorted(path.parent for root in named for path in root.rglob("io.safetensors"))
    torch.set_num_threads(1)
    rows = {folder.name: agreement(folder) for folder in folders}
    for title in next(iter(rows.values())):
        print(title)
        for name, values in rows.items():
            if values[title] == values[title]:
                print(f"    {name:<20} {values[title]:.1e}")


if __name__ == "__main__":
    main()
