"""``thalweg search`` killed with SIGKILL and given again ends with the files of a search left alone."""

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from tiny_pipeline import save_tiny_pipeline

BUDGET = 96
SIZES = ["--nfe=[3,4]", f"--budget={BUDGET}", "--samples=[4,8]", "--fresh=8", "--compare=false", "--seed=3"]
SIZES += ["--fit=40", "--options.teacher_steps=20"]
PATIENCE = 120.0


def start(pipeline: Path, out: Path, workers: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "thalweg.apps", "search", f"--model={pipeline}", f"--out={out}"]
    with open(f"{out}.log", "ab") as log:
        return subprocess.Popen([*command, f"--workers={workers}", *SIZES], stdout=log, stderr=log)


def finish(pipeline: Path, out: Path, workers: int) -> dict[str, bytes]:
    """Files of the result, and the states of the searches."""
    process = start(pipeline, out, workers)
    assert process.wait(PATIENCE) == 0, Path(f"{out}.log").read_text()
    files = [*(out / "scheduler").iterdir(), *out.glob("*_[34].json")]
    return {path.name: path.read_bytes() for path in sorted(files)}


def kill_after(process: subprocess.Popen[bytes], state: Path) -> int:
    """Kill a search that has saved its state and gone on; how many candidates had a score then."""
    until = time.monotonic() + PATIENCE
    while not state.is_file():
        assert process.poll() is None, "the search ended before it was killed"
        assert time.monotonic() < until, f"no {state.name} after {PATIENCE} seconds"
        time.sleep(0.01)
    time.sleep(0.2)
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    assert process.wait(PATIENCE) == -9
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive, "workers outlive their search"
    return len(json.loads(state.read_text())["scores"])


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    save_tiny_pipeline(folder)
    return folder


@pytest.fixture(scope="module")
def undisturbed(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return finish(pipeline, tmp_path_factory.mktemp("undisturbed") / "run", workers=1)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("workers", "kills"), [(1, ("times_3", "search_4")), (2, ("search_4",))])
def test_a_killed_search_ends_as_if_nothing_had_happened(
    workers: int, kills: tuple[str, ...], pipeline: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    for name in kills:  # in the first part of the first search, in the last of the second
        state = out / f"{name}.json"
        assert 0 < kill_after(start(pipeline, out, workers), state) < BUDGET
        assert not (out / "scheduler").exists()
    assert len(undisturbed) > 2
    assert finish(pipeline, out, workers) == undisturbed
    assert [p for p in out.rglob("*") if p.name.startswith(".") or p.suffix == ".tmp"] == []
