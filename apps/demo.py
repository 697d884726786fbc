"""``thalweg demo``: the whole story on two CPU cores, through the same commands that a user types.

Two pretraining sets and an unseen downstream set come from our solvers. A small scOT is pretrained and
fine-tuned on few trajectories, then compared with the same network and an FNO trained from scratch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

DOWNSTREAM = "NS-PwC"
PRETRAINING = ("NS-Sines", "NS-Gauss")
MODELS = ("finetuned", "scratch", "fno")


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Sizes of the demo."""

    resolution: int = 64
    """Grid points per side."""
    pretraining: int = 96
    """Trajectories in each of the two pretraining sets."""
    downstream: int = 56
    """Trajectories in the downstream set, of which ``test`` are held out and ``val`` steer nothing."""
    val: int = 4
    """Validation trajectories of each set."""
    test: int = 20
    """Test trajectories of the downstream set."""
    trajectories: tuple[int, ...] = (2, 8, 32)
    """Downstream trajectories to learn from: one point of the scaling curve each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One command of the demo."""

    name: str
    """Shown to the user, and name of the log file."""
    argv: tuple[str, ...]
    """Arguments of ``thalweg``."""
    done: Path
    """File that exists once the step has finished; a finished step is not run again."""
    threads: int = 1
    """Threads of the process."""


def demo(out: str = "runs/demo", fresh: bool = False) -> None:
    """Generate data, pretrain, fine-tune, train baselines, evaluate and write a report.

    A stopped demo continues where it was. Pictures, numbers and commands end up in OUT/report.html.

    Args:
        out: Folder for data, runs, results and the report.
        fresh: Start again: forget the finished steps of an earlier demo in this folder.

    Raises:
        ValueError: If a step fails; the message names its log file.
    """
    from thalweg.apps.demo_report import write_report

    start = time.perf_counter()
    folder, plan = Path(out), Plan()
    marks = folder / "steps"
    marks.mkdir(parents=True, exist_ok=True)
    if fresh:
        for mark in marks.glob("*.json"):
            mark.unlink()
    steps = plan_steps(folder, plan)
    cores = max(2, min(4, os.cpu_count() or 2))
    for stage in steps:
        run_stage(stage, marks, cores)
    report = write_report(folder, plan, [step for stage in steps for step in stage])
    print(f"done in {(time.perf_counter() - start) / 60:.1f} min: {report}")


def plan_steps(folder: Path, plan: Plan) -> list[list[Step]]:
    """The stages of the demo; steps within a stage are independent."""
    data, marks = folder / "data", folder / "steps"

    def step(name: str, *argv: str, threads: int = 1) -> Step:
        return Step(name=name, argv=argv, done=marks / f"{name}.json", threads=threads)

    def generate(name: str, samples: int, test: int) -> Step:
        sizes = (f"--samples={samples}", f"--num_val={plan.val}", f"--num_test={test}")
        return step(
            f"generate_{name}",
            *("data", "generate", name, f"--out={data}", f"--resolution={plan.resolution}", *sizes),
        )

    def fit(name: str, config: str, *flags: str, threads: int = 1) -> Step:
        logger = "--trainer.logger.init_args"
        where = (f"{logger}.save_dir={folder / 'fits'}", f"{logger}.name={name}", f"{logger}.version=run")
        flags = (f"--data.init_args.data_dir={data}", *where, *flags)
        return step(f"fit_{name}", "fit", "--config", config, *flags, threads=threads)

    def evaluate(model: str, count: int) -> Step:
        run = folder / "fits" / f"{model}_{count}" / "run" / "checkpoints" / "last.ckpt"
        where = (f"--path={data}", f"--out={folder / 'results' / model / str(count)}")
        return step(
            f"evaluate_{model}_{count}", "evaluate", f"--ckpt={run}", f"--dataset={DOWNSTREAM}", *where
        )

    pretrained = folder / "pretrained"
    small = [generate(name, plan.pretraining, plan.val) for name in PRETRAINING]
    export = step(
        "export_pretrained",
        *("export", f"--ckpt={folder / 'fits/pretrained/run/checkpoints/last.ckpt'}", f"--to={pretrained}"),
    )
    fits, scores = [], []
    for count in reversed(plan.trajectories):
        for model in MODELS:
            name = f"{model}_{count}"
            flags = [f"--data.init_args.num_trajectories={count}"]
            if model == "finetuned":
                flags.append(f"--model.init_args.pretrained={pretrained}")
            fits.append(fit(name, f"demo/{model}.yaml", *flags))
            scores.append(evaluate(model, count))
    curves = [f"--curve.{model}={folder / 'results' / model}" for model in MODELS]
    return [
        [*small, generate(DOWNSTREAM, plan.downstream, plan.test)],
        [fit("pretrained", "demo/pretrain.yaml", threads=2)],
        [export],
        fits,
        scores,
        [step("gains", "gains", *curves, "--reference=fno", f"--out={folder / 'gains'}")],
    ]


def run_stage(stage: Sequence[Step], marks: Path, cores: int) -> None:
    """Run the unfinished steps of a stage, as many at a time as the cores carry."""
    waiting = [step for step in stage if not step.done.is_file()]
    running: list[tuple[Step, subprocess.Popen[bytes], IO[bytes], float]] = []
    try:
        while waiting or running:
            busy = sum(step.threads for step, *_ in running)
            if waiting and (not running or busy + waiting[0].threads <= cores):
                running.append(start_step(waiting.pop(0), marks))
                continue
            time.sleep(0.2)
            for entry in list(running):
                if entry[1].poll() is not None:
                    running.remove(entry)
                    finish_step(*entry, marks)
    finally:
        for _, process, log, _ in running:
            process.terminate()
            process.wait()
            log.close()


def start_step(step: Step, marks: Path) -> tuple[Step, subprocess.Popen[bytes], IO[bytes], float]:
    """Start the command of a step, its output going to a log file."""
    command = [sys.executable, "-m", "thalweg.apps", *resumed(step)]
    env = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(step.threads)}
    log = (marks / f"{step.name}.log").open("wb")
    print(f"$ thalweg {' '.join(step.argv)}", flush=True)
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env)
    return step, process, log, time.perf_counter()


def finish_step(
    step: Step, process: subprocess.Popen[bytes], log: IO[bytes], start: float, marks: Path
) -> None:
    """Mark a finished step.

    Raises:
        ValueError: If the command failed.
    """
    log.close()
    path = marks / f"{step.name}.log"
    if process.returncode != 0:
        tail = "\n".join(path.read_text(errors="replace").strip().splitlines()[-4:])
        raise ValueError(f"{step.name} failed, see {path}:\n{tail}")
    seconds = time.perf_counter() - start
    step.done.write_text(json.dumps({"seconds": round(seconds, 1), "argv": step.argv}))
    print(f"  {step.name}: {seconds:.0f} s", flush=True)


def resumed(step: Step) -> tuple[str, ...]:
    """Arguments of a step; a fit that left a checkpoint behind continues from it."""
    if step.argv[0] != "fit":
        return step.argv
    settings = dict(flag.split("=", 1) for flag in step.argv if "=" in flag)
    logger = "--trainer.logger.init_args"
    last = Path(settings[f"{logger}.save_dir"]) / settings[f"{logger}.name"] / "run/checkpoints/last.ckpt"
    return (*step.argv, f"--ckpt_path={last}") if last.is_file() else step.argv
