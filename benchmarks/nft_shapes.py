"""Head to head on ShapesWorld: DiffusionNFT, AWM and Flow-GRPO from the same pretrained model.

    python benchmarks/nft_shapes.py --tune                   # short runs over equally many settings of both
    python benchmarks/nft_shapes.py --arms nft grpo --seeds 0 1 2
    python benchmarks/nft_shapes.py --report                 # table and curves of the runs there are

Every run is ``thalweg fit`` on configs/nft/shapes.yaml with the changes below, evaluated without guidance on
240 captions, 40 of each task, with the same noise. A run that is there already is not repeated. The arms and
their settings were fixed after the tuning, before the runs that are reported.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
MODULE = "thalweg.diffusion.nft.module."
OUT = Path("runs/nft_shapes")
Changes = dict[str, Any]


def grpo(lr: float, kl: float = 0.0, window: tuple[int, int] | None = None, **more: Any) -> Changes:
    objective = {"kl_weight": kl, "window": list(window) if window else None, **more}
    return {"class": "FlowGRPOModule", "objective": objective, "decay": "hard_copy", "lr": lr}


def nft(lr: float, rate: float = 0.02, cap: float = 0.8, **more: Any) -> Changes:
    return {"class": "NFTModule", "decay": {"rate": rate, "cap": cap}, "lr": lr, **more}


TUNING: dict[str, Changes] = {
    **{
        f"nft_lr{lr}_cap{cap}": nft(lr, rate, cap)
        for lr in (2e-3, 4e-3, 8e-3)
        for rate, cap in ((0.02, 0.8), (0.01, 0.5))
    },
    **{f"grpo_lr{lr}_kl{kl}": grpo(lr, kl) for lr in (1e-3, 2e-3, 4e-3) for kl in (0.0, 0.04)},
    # added when the best of the six was at the end of its range
    "nft_lr0.016_cap0.8": nft(1.6e-2),
    "nft_lr0.008_two_steps": {**nft(8e-3), "gradient_steps": 2},
    "grpo_lr0.008_kl0.0": grpo(8e-3),
    "grpo_lr0.008_two_steps": {**grpo(8e-3), "gradient_steps": 2},
}
COSINE = {"schedule": "cosine"}  # of both: constant rates of 8e-3 rise no more after 6000 images
ARMS: dict[str, Changes] = {
    "nft": {**nft(8e-3), **COSINE},
    "grpo": {**grpo(8e-3), **COSINE},
    "nft_paper": {
        "class": "NFTModule", "lr": 8e-3, "decay": "linear_to_0_5", "rollout": {"legacy_dpm2": True},
        "times": {"choice": "subset", "fraction": 0.99, "count": None}, "objective": {"kl_weight": 1e-4},
        **COSINE,
    },
    "grpo_constant": grpo(4e-3, 0.04),
    "grpo_window": {**grpo(8e-3, window=(0, 2)), **COSINE},
    "awm": {"class": "AWMModule", "lr": 8e-3, "decay": {"rate": 0.02, "cap": 0.8},
            "objective": {"kl_weight": 0.0, "weighting": "t", "adv_clip_max": 5.0}, **COSINE},
    "nft_positive": {**nft(8e-3, objective={"kl_weight": 0.0, "negative": False}), **COSINE},
}  # fmt: skip


def configuration(name: str, changes: Changes, seed: int, epochs: int, every: int) -> dict[str, Any]:
    config = yaml.safe_load((ROOT / "configs/nft/shapes.yaml").read_text())
    arguments = config["model"]["init_args"]
    config["model"]["class_path"] = MODULE + changes["class"]
    if changes["class"] != "NFTModule":
        arguments.pop("objective")
    for key in ("objective", "rollout", "times"):
        if key in changes:
            arguments[key] = {**arguments.get(key, {}), **changes[key]}
    arguments["rewards"]["shapes"] = changes.get("reward", {})
    if "policy" in changes:
        arguments["policy"]["lora"] |= changes["policy"]
    arguments["decay"] = changes["decay"]
    config["data"]["init_args"]["gradient_steps"] = changes.get("gradient_steps", 1)
    arguments["optim"]["lr"] = changes["lr"]
    arguments["optim"]["schedule"]["name"] = changes.get("schedule", "constant")
    arguments["seed"] = config["data"]["init_args"]["seed"] = 100 + seed
    config["seed_everything"] = seed
    config["trainer"] |= {"max_epochs": epochs, "check_val_every_n_epoch": every}
    config["trainer"]["logger"]["init_args"] |= {"save_dir": str(OUT), "name": name, "version": f"seed{seed}"}
    return config


def run(name: str, changes: Changes, seed: int, epochs: int, every: int) -> None:
    folder = OUT / name / f"seed{seed}"
    if (folder / "done").is_file() and int((folder / "done").read_text()) >= epochs:
        return
    file = OUT / "configs" / f"{name}_{seed}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(configuration(name, changes, seed, epochs, every)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, "-m", "thalweg.apps", "fit", "--config", str(file)]
    with (file.with_suffix(".log")).open("w") as log:
        subprocess.run(command, check=True, env=environment, stdout=log, stderr=subprocess.STDOUT)
    (folder / "done").write_text(str(epochs))
    print(name, seed, " ".join(f"{p['images']}:{p['strict']:.3f}" for p in curve(folder)), flush=True)


def curve(folder: Path) -> list[dict[str, float]]:
    """Scores by images and CPU-seconds."""
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    trained = [row for row in rows if row.get("train/images")]
    start = next(row for row in trained if row["start/shapes/strict"])
    points = [{"images": 0, "cpu": 0.0, **scores(start, "start")}]
    for row in rows:
        if row["val/shapes/strict"]:
            before = [r for r in trained if int(r["epoch"]) <= int(row["epoch"])]
            cpu = sum(float(r["train/seconds_cpu"]) for r in before)
            points.append(
                {"images": int(float(before[-1]["train/images"])), "cpu": cpu, **scores(row, "val")}
            )
    return points


def scores(row: dict[str, str], prefix: str) -> dict[str, float]:
    partial = row.get(f"{prefix}/shapes/partial") or row[f"{prefix}/reward"]
    found = {"strict": float(row[f"{prefix}/shapes/strict"]), "partial": float(partial)}
    mark = f"{prefix}/shapes/strict/"
    found |= {name.removeprefix(mark): float(value) for name, value in row.items() if name.startswith(mark)}
    return found | {"unknown": float(row[f"{prefix}/shapes/unknown"])}


def runs() -> dict[str, dict[int, list[dict[str, float]]]]:
    found: dict[str, dict[int, list[dict[str, float]]]] = {}
    for done in sorted(OUT.glob("*/seed*/done")):
        seed = int(done.parent.name.removeprefix("seed"))
        found.setdefault(done.parents[1].name, {})[seed] = curve(done.parent)
    return found


def report(names: list[str]) -> None:
    found = {name: seeds for name, seeds in runs().items() if name in names}
    print(f"{'arm':<22} seeds   start   best  (images)     end  (images, CPU-s)   unknown")
    for name, seeds in found.items():
        means = averaged(seeds)
        best, end = max(means, key=lambda p: p["strict"]), means[-1]
        ends = [points[-1]["strict"] for points in seeds.values()]
        deviation = statistics.stdev(ends) if len(ends) > 1 else float("nan")
        start = f"{name:<22} {len(seeds):>5}   {means[0]['strict']:.3f}  {best['strict']:.3f}"
        effort = f"({end['images']:.0f}, {end['cpu']:.0f})   {end['unknown']:.2f}"
        print(f"{start} ({best['images']:>6.0f})   {end['strict']:.3f} +- {deviation:.3f} {effort}")
        print("    by task: " + ", ".join(f"{k} {end[k]:.2f}" for k in end if k in TASKS))
    if {"nft", "grpo"} <= set(found):
        compare(found)
    (OUT / "report.json").write_text(json.dumps(found, indent=1))
    plot(found)


TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")


def compare(found: dict[str, dict[int, list[dict[str, float]]]]) -> None:
    """Images that NFT needs for the best score of Flow-GRPO."""
    curves = {name: averaged(found[name]) for name in ("nft", "grpo")}
    goal = max(curves["grpo"], key=lambda p: p["strict"])
    reached = next((p for p in curves["nft"] if p["strict"] >= goal["strict"]), None)
    needed = f"{reached['images']:.0f}" if reached else "more than were drawn"
    print(f"Flow-GRPO's best {goal['strict']:.3f} took {goal['images']:.0f} images, NFT needs {needed}")


def averaged(seeds: dict[int, list[dict[str, float]]]) -> list[dict[str, float]]:
    """Means over seeds of each point of a curve."""
    together = zip(*seeds.values(), strict=True)
    return [{key: statistics.fmean(p[key] for p in points) for key in points[0]} for points in together]


def plot(found: dict[str, dict[int, list[dict[str, float]]]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for i, (name, seeds) in enumerate(found.items()):
        for axis, key in zip(axes, ("images", "cpu"), strict=True):
            for points in seeds.values():
                axis.plot([p[key] for p in points], [p["strict"] for p in points], color=f"C{i}", alpha=0.25)
            means = averaged(seeds)
            shown = {"color": f"C{i}", "marker": "o", "label": name}
            axis.plot([p[key] for p in means], [p["strict"] for p in means], **shown)
    axes[0].set(xlabel="images generated", ylabel="strict score of 240 captions")
    axes[1].set(xlabel="CPU-seconds of training")
    axes[0].legend(frameon=False)
    figure.savefig(OUT / "curves.png", dpi=120)
    print(OUT / "curves.png")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arms", nargs="*", default=[], choices=list(ARMS))
    parser.add_argument("--tune", nargs="?", const="", help="names of settings that contain this; all")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    if options.tune is not None:
        for name, changes in TUNING.items():
            if options.tune in name:
                run(f"tune_{name}", changes, 0, 20, 5)
        report([f"tune_{name}" for name in TUNING])
    for seed in options.seeds:
        for name in options.arms:
            run(name, ARMS[name], seed, options.epochs, options.every)
    if options.arms or options.report:
        report(list(ARMS))


if __name__ == "__main__":
    main()
