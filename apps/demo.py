"""``thalweg demo``: the whole story on two CPU cores, through the same commands that a user types.

A small image model learns handwritten digits, and schedules are searched that draw them in few steps. A small
text-to-image model that comes with the package is fine-tuned online by a reward.
Two pretraining sets and an unseen downstream set come from our solvers. A small scOT is pretrained and
fine-tuned on few trajectories, then compared with the same network and an FNO trained from scratch.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO

DOWNSTREAM = "NS-PwC"
PRETRAINING = ("NS-Sines", "NS-Gauss")
MODELS = ("finetuned", "scratch", "fno")
PARTS = ("steps", "data", "fits", "pretrained", "results", "gains", "digits", "search", "lora", "shapes")


@dataclass(frozen=True, kw_only=True)  # without slots: jsonargparse reads the default from __dict__
class Plan:
    """Sizes of the demo."""

    resolution: int = 32
    """Grid points per side."""
    pretraining: int = 280
    """Trajectories in each of the two pretraining sets."""
    downstream: int = 48
    """Trajectories in the downstream set, of which ``test`` are held out and ``val`` steer nothing."""
    val: int = 4
    """Validation trajectories of each set."""
    test: int = 24
    """Test trajectories of each set."""
    final_time: int = 6
    """Snapshot to predict from the first, t = 0.3."""
    trajectories: tuple[int, ...] = (1, 4, 16)
    """Downstream trajectories to learn from: one point of the scaling curve each."""
    pretraining_steps: int = 2400
    """Optimizer steps of the pretraining."""
    steps: int = 300
    """Optimizer steps of every other training."""
    digits_epochs: int = 8
    """Epochs of the image model on 4500 digits."""
    nfe: tuple[int, ...] = (5, 8)
    """Network evaluations for which solver schedules are searched."""
    schedules: int = 48
    """Schedules that each search tries."""
    fitted: int = 36
    """How many of them have weights that are fitted to a fine solver."""
    online_epochs: int = 20
    """Epochs of online fine-tuning, of 192 images each."""
    judged: int = 240
    """Captions that judge it, and a third more with combinations that were held out."""


_PLAN = Plan()


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One command of the demo."""

    name: str
    """Shown to the user, and name of the log file."""
    argv: tuple[str, ...]
    """Arguments of ``thalweg``."""
    done: Path
    """File that exists once the step has finished; a finished step is not run again."""
    needs: tuple[str, ...] = ()
    """Names of the steps that must have finished before."""


@dataclass(frozen=True, slots=True)
class Running:
    """A step at work."""

    step: Step
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    start: float


def demo(out: str = "runs/demo", fresh: bool = False, plan: Plan = _PLAN) -> None:
    """Generate data, pretrain, fine-tune, train baselines, search samplers, evaluate and write a report.

    A stopped demo continues where it was. Pictures, numbers and commands end up in OUT/report.html.

    Args:
        out: Folder for data, runs, results and the report.
        fresh: Start again: remove what an earlier demo in this folder has made.
        plan: Sizes.

    Raises:
        ValueError: If a step fails; the message names its log file. If the folder holds other sizes.
    """
    from thalweg.apps.demo_report import write_report

    start = time.perf_counter()
    folder = Path(out)
    marks = folder / "steps"
    if fresh:
        for part in PARTS:
            shutil.rmtree(folder / part, ignore_errors=True)
    marks.mkdir(parents=True, exist_ok=True)
    keep_plan(plan, marks / "plan.json")
    steps = plan_steps(folder, plan)
    run_steps(steps, marks, cores=max(2, min(4, os.cpu_count() or 2)))
    report = write_report(folder, plan, steps)
    print(f"done in {(time.perf_counter() - start) / 60:.1f} min: {report}")


def keep_plan(plan: Plan, path: Path) -> None:
    """Note the sizes, or see that they are those noted before.

    Raises:
        ValueError: If they are not.
    """
    sizes = json.loads(json.dumps(asdict(plan)))
    if not path.is_file():
        path.write_text(json.dumps(sizes))
    earlier = json.loads(path.read_text())
    if earlier != sizes:
        changed = ", ".join(
            f"{k}={earlier.get(k)} (now {v})" for k, v in sizes.items() if earlier.get(k) != v
        )
        raise ValueError(
            f"{path.parent.parent} holds a demo with {changed}; add --fresh or choose another --out"
        )


def plan_steps(folder: Path, plan: Plan) -> list[Step]:
    """The steps of the demo, the longest chain first."""
    steps = [
        generate_step(folder, plan, name, plan.downstream if name == DOWNSTREAM else plan.pretraining)
        for name in (*PRETRAINING, DOWNSTREAM)
    ]
    pretraining = fit_step(folder, "pretrained", "demo/pretrain.yaml", plan.pretraining_steps)
    pretrained = folder / "pretrained"
    weights = folder / "fits/pretrained/run/checkpoints/last.ckpt"
    argv = ("export", f"--ckpt={weights}", f"--to={pretrained}", "--overwrite")
    export = step_of(folder, "export_pretrained", *argv)
    steps += [*image_steps(folder, plan), *online_steps(folder, plan)]
    steps += [
        replace(pretraining, needs=tuple(f"generate_{name}" for name in PRETRAINING)),
        replace(export, needs=(pretraining.name,)),
    ]
    for count in reversed(plan.trajectories):
        for model in MODELS:
            flags = [f"--data.init_args.num_trajectories={count}"]
            needs = [f"generate_{DOWNSTREAM}"]
            if model == "finetuned":
                flags.append(f"--model.init_args.pretrained={pretrained}")
                needs.append(export.name)
            fit = fit_step(folder, f"{model}_{count}", f"demo/{model}.yaml", plan.steps, *flags)
            steps += [replace(fit, needs=tuple(needs)), evaluation_step(folder, plan, model, count)]
    curves = [f"--curve.{model}={folder / 'results' / model}" for model in MODELS]
    gains = step_of(folder, "gains", "gains", *curves, "--reference=fno", f"--out={folder / 'gains'}")
    scores = tuple(step.name for step in steps if step.argv[0] == "evaluate")
    return [*steps, replace(gains, needs=scores)]


def image_steps(folder: Path, plan: Plan) -> list[Step]:
    """Train the image model, make it a pipeline, and search its schedules."""
    logger = "--trainer.logger.init_args"
    where = (f"{logger}.save_dir={folder / 'fits'}", f"{logger}.name=digits", f"{logger}.version=run")
    size = (f"--trainer.max_epochs={plan.digits_epochs}", "--trainer.check_val_every_n_epoch=4")
    fit = step_of(folder, "fit_digits", "fit", "--config", "s3/mnist.yaml", *size, *where)
    weights, model = folder / "fits/digits/run/checkpoints/last.ckpt", folder / "digits"
    argv = ("export", f"--ckpt={weights}", f"--to={model}", "--overwrite")
    export = step_of(folder, "export_digits", *argv)
    search = step_of(
        folder,
        "search_digits",
        *("search", f"--model={model}", f"--out={folder / 'search'}", f"--nfe={list(plan.nfe)}"),
        *(f"--budget={plan.schedules}", f"--fit={plan.fitted}", "--samples=[16,48]"),
        *("--fresh=100", "--variants=4"),
    )
    return [fit, replace(export, needs=(fit.name,)), replace(search, needs=(export.name,))]


def online_steps(folder: Path, plan: Plan) -> list[Step]:
    """Fine-tune the text-to-image model by its reward, make a LoRA of it, and judge it."""
    logger = "--trainer.logger.init_args"
    where = (f"{logger}.save_dir={folder / 'fits'}", f"{logger}.name=online", f"{logger}.version=run")
    cache = f"--model.init_args.pipeline.cache={folder / 'fits' / 'prompts'}"
    size = (f"--trainer.max_epochs={plan.online_epochs}", cache)
    fit = step_of(folder, "fit_online", "fit", "--config", "nft/shapes.yaml", *size, *where)
    weights, lora = folder / "fits/online/run/checkpoints/last.ckpt", folder / "lora"
    argv = ("export", f"--ckpt={weights}", f"--to={lora}", "--weights=raw", "--overwrite")
    export = step_of(folder, "export_online", *argv)
    judge = step_of(
        folder,
        "evaluate_online",
        *("evaluate", "--suite=shapes", "--model=shipped/shapes", f"--lora={lora}", "--steps=20"),
        *(f"--num_prompts={plan.judged}", "--batch_size=80", f"--out={folder / 'shapes'}"),
    )
    return [fit, replace(export, needs=(fit.name,)), replace(judge, needs=(export.name,))]


def step_of(folder: Path, name: str, *argv: str) -> Step:
    """A step that needs no other."""
    return Step(name=name, argv=argv, done=folder / "steps" / f"{name}.json")


def generate_step(folder: Path, plan: Plan, name: str, samples: int) -> Step:
    """Generate a data set."""
    sizes = (f"--samples={samples}", f"--num_val={plan.val}", f"--num_test={plan.test}")
    where = (f"--out={folder / 'data'}", f"--resolution={plan.resolution}")
    return step_of(folder, f"generate_{name}", "data", "generate", name, *where, *sizes)


def fit_step(folder: Path, name: str, config: str, steps: int, *flags: str) -> Step:
    """Train a network."""
    logger = "--trainer.logger.init_args"
    where = (f"{logger}.save_dir={folder / 'fits'}", f"{logger}.name={name}", f"{logger}.version=run")
    size = (f"--data.init_args.data_dir={folder / 'data'}", f"--trainer.max_steps={steps}")
    return step_of(folder, f"fit_{name}", "fit", "--config", config, *size, *where, *flags)


def evaluation_step(folder: Path, plan: Plan, model: str, count: int) -> Step:
    """Score a network on the downstream test set."""
    run = folder / "fits" / f"{model}_{count}" / "run" / "checkpoints" / "last.ckpt"
    where = (f"--path={folder / 'data'}", f"--out={folder / 'results' / model / str(count)}")
    step = step_of(
        folder,
        f"evaluate_{model}_{count}",
        *("evaluate", f"--ckpt={run}", f"--dataset={DOWNSTREAM}", f"--final_time={plan.final_time}", *where),
    )
    return replace(step, needs=(f"fit_{model}_{count}",))


def run_steps(steps: Sequence[Step], marks: Path, cores: int) -> None:
    """Run the unfinished steps, one per core at a time, each as soon as what it needs has finished."""
    finished = {step.name for step in steps if step.done.is_file()}
    waiting = [step for step in steps if step.name not in finished]
    running: list[Running] = []
    try:
        while waiting or running:
            ready = next((step for step in waiting if finished.issuperset(step.needs)), None)
            if ready is not None and len(running) < cores:
                waiting.remove(ready)
                running.append(start_step(ready, marks))
                continue
            assert running, f"steps wait for what nothing makes: {[step.name for step in waiting]}"
            time.sleep(0.1)
            for job in [job for job in running if job.process.poll() is not None]:
                running.remove(job)
                finish_step(job, marks)
                finished.add(job.step.name)
    finally:
        for job in running:
            job.process.terminate()
        for job in running:
            job.process.wait()
            job.log.close()


def start_step(step: Step, marks: Path) -> Running:
    """Start the command of a step, its output going to a log file."""
    command = [sys.executable, "-m", "thalweg.apps", *resumed(step)]
    env = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"}
    log = (marks / f"{step.name}.log").open("wb")
    print(f"$ thalweg {' '.join(step.argv)}", flush=True)
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env)
    return Running(step, process, log, time.perf_counter())


def finish_step(job: Running, marks: Path) -> None:
    """Mark a finished step.

    Raises:
        ValueError: If the command failed.
    """
    job.log.close()
    path = marks / f"{job.step.name}.log"
    if job.process.returncode != 0:
        tail = "\n".join(path.read_text(errors="replace").strip().splitlines()[-4:])
        raise ValueError(f"{job.step.name} failed, see {path}:\n{tail}")
    seconds = time.perf_counter() - job.start
    job.step.done.write_text(json.dumps({"seconds": round(seconds, 1), "argv": job.step.argv}))
    print(f"  {job.step.name}: {seconds:.0f} s", flush=True)


def resumed(step: Step) -> tuple[str, ...]:
    """Arguments of a step; a fit that left a checkpoint behind continues from it."""
    if step.argv[0] != "fit":
        return step.argv
    settings = dict(flag.split("=", 1) for flag in step.argv if "=" in flag)
    logger = "--trainer.logger.init_args"
    last = Path(settings[f"{logger}.save_dir"]) / settings[f"{logger}.name"] / "run/checkpoints/last.ckpt"
    return (*step.argv, f"--ckpt_path={last}") if last.is_file() else step.argv
