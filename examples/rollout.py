"""Roll a trained network out in time from Python, and draw it beside the truth.

    python examples/rollout.py --network my-scot --data data/NS-Sines.nc --steps 7 --out runs/rollout.png

NETWORK is a folder of ``thalweg export``, or a hub id. Each step predicts one seventh of the horizon and is
fed back; density and pressure, which do not evolve in this set, are fed back from the truth.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from thalweg.pde.data.normalize import normalizer_for
from thalweg.pde.data.pairs import part_range
from thalweg.pde.data.recognise import spec_for_file
from thalweg.pde.data.trajectories import open_problem
from thalweg.pde.errors import group_edges, relative_lp_error
from thalweg.pde.plots import rollout_panels, save
from thalweg.pde.poseidon import ScOT
from thalweg.pde.poseidon.rollout import rollout


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", required=True, help="folder or hub id")
    parser.add_argument("--data", required=True, type=Path, help="file of a data set")
    parser.add_argument("--steps", type=int, default=7, help="equal steps; must divide the horizon")
    parser.add_argument("--channel", default="u", help="channel to draw")
    parser.add_argument("--out", type=Path, default=Path("runs/rollout.png"))
    options = parser.parse_args(argv)

    network = ScOT.from_pretrained(options.network).eval()
    spec = spec_for_file(options.data)
    reader = open_problem(spec, options.data)
    normalizer = normalizer_for(spec, reader.constants, "auto", reader)
    if spec.horizon % options.steps:
        parser.error(f"--steps {options.steps} does not divide the horizon of {spec.horizon} snapshots")
    stride = spec.horizon // options.steps
    frames = [stride * (k + 1) for k in range(options.steps)]

    sample = [part_range(reader.splits, "test")[0]]
    x = torch.from_numpy(normalizer.normalize_inputs(reader.inputs(sample, 0)))
    truth = torch.from_numpy(normalizer.normalize_outputs(reader.outputs(sample, frames)))
    static = [k for k, channel in enumerate(spec.outputs) if channel.role != "state"]
    with torch.inference_mode():
        states = rollout(
            network, x, spec.horizon / spec.time_scale, options.steps, static_channels=static
        ).states

    edges = group_edges(spec.groups)
    for k, frame in enumerate(frames):
        errors = relative_lp_error(states[:, k], truth[:, k], edges=edges)[0]
        named = zip(spec.groups, errors.tolist())
        words = [f"{''.join(group)} {error:.1f} %" for group, error in named if group in spec.scored_groups]
        print(f"t = {reader.times[frame]:.2f}: relative L1 error of {', '.join(words)}")

    channel = [c.name for c in spec.outputs].index(options.channel)
    fields = (normalizer.denormalize_outputs(states[0]), normalizer.denormalize_outputs(truth[0]))
    prediction, target = (field[:, channel].numpy() for field in fields)
    times = [float(reader.times[frame]) for frame in frames]
    print(f"wrote {save(rollout_panels(target, prediction, times, options.channel), options.out)}")


if __name__ == "__main__":
    main()
