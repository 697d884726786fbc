"""``thalweg reward-server`` as a process of its own: scores, Ctrl-C, and what clients see when it dies."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from thalweg.apps.cli import main
from thalweg.diffusion.rewards.base import RewardError, RewardResult, evaluate
from thalweg.diffusion.rewards.http import request_json
from thalweg.diffusion.rewards.registry import open_reward
from thalweg.diffusion.shapes.dataset import ShapesDataset

SUPPORT = Path(__file__).parents[1] / "support"


@contextmanager
def served(rewards: str, port: int = 0) -> Iterator[tuple[str, "subprocess.Popen[str]"]]:
    """A server in another process, and its address."""
    command = [sys.executable, "-m", "thalweg.apps", "reward-server", "--rewards", rewards, f"--port={port}"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = {**os.environ, "PYTHONPATH": str(SUPPORT)}
    with subprocess.Popen([*command, "--device=cpu"], env=environment, **pipes) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            found = re.match(r"(http://127\.0\.0\.1:\d+) serves ", line)
            assert found, (line, process.stderr.read() if process.stderr else "")
            yield found[1], process
        finally:
            process.kill()


def batch(count: int) -> Any:
    examples = [ShapesDataset(size=count, wrong=0.5)[i] for i in range(count)]
    images = torch.stack([example["image"] for example in examples])
    return images, [e["prompt"] for e in examples], [e["metadata"] for e in examples]


def wait_for(path: Path) -> None:
    until = time.monotonic() + 60
    while not path.exists() and time.monotonic() < until:
        time.sleep(0.01)
    assert path.exists()


class Asking(threading.Thread):
    """Asks for scores beside the test."""

    def __init__(self, url: str, name: str, count: int, **options: Any) -> None:
        super().__init__(daemon=True)
        self.reward = open_reward("remote", url=url, name=name, **options)
        self.given, self.result, self.error = batch(count), None, None
        self.start()

    def run(self) -> None:
        try:
            self.result: RewardResult | None = evaluate(self.reward, *self.given)
        except RewardError as error:
            self.error: str | None = str(error)

    def outcome(self) -> tuple[RewardResult | None, str | None]:
        self.join(60)
        return self.result, self.error


def test_scores_are_those_of_here_and_ctrl_c_lets_requests_end(tmp_path: Path) -> None:
    slow = f"{{reward: 'slow_reward:slow', folder: {tmp_path}}}"
    specs = f"{{shapes: {{}}, jpeg_compressibility: null, slow: {slow}}}"
    with served(specs) as (url, process):
        assert request_json(f"{url}/health") == {"rewards": ["jpeg_compressibility", "shapes", "slow"]}
        for name in ("shapes", "jpeg_compressibility"):
            there = evaluate(open_reward("remote", url=url, name=name, batch=3), *batch(8))
            here = evaluate(open_reward(name), *batch(8))
            assert torch.allclose(there.scores, here.scores, atol=1e-12)
            assert there.parts.keys() == here.parts.keys()
        asking = Asking(url, "slow", 2)
        wait_for(tmp_path / "begun")
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert process.poll() is None  # it waits for the answer
        (tmp_path / "go").touch()
        result, error = asking.outcome()
        assert error is None
        assert result is not None
        assert torch.allclose(result.scores, batch(2)[0].double().mean((1, 2, 3)), atol=1e-6)
        assert process.wait(30) == 130
        assert process.stderr is not None
        assert process.stderr.read().splitlines()[-1] == "stopped"


def test_a_killed_server_is_one_error_and_a_new_one_is_found(tmp_path: Path) -> None:
    specs = f"{{slow: {{reward: 'slow_reward:slow', folder: {tmp_path}}}}}"
    with served(specs) as (url, process):
        hopeless = Asking(url, "slow", 2, retries=1, wait=0.05)
        patient = Asking(url, "slow", 2, retries=100, wait=0.5)
        wait_for(tmp_path / "begun")
        process.kill()
        process.wait(30)
        result, error = hopeless.outcome()
        assert result is None
        assert error is not None
        assert re.fullmatch(rf"{url}/score/slow gave no result in 2 tries, the last: .*refused.*", error)
        assert patient.is_alive()
        (tmp_path / "go").touch()
        with served(specs, int(url.rpartition(":")[2])):
            result, error = patient.outcome()
            assert error is None
            assert result is not None


def test_what_cannot_be_served_is_one_line(tmp_path: Path) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        cases = {
            (
                "{shapes: {}}",
                port,
            ): f"error: cannot listen on port {port} of 127.0.0.1: Address already in use",
            ("{shapes: {}}", 70000): "error: cannot listen on port 70000 of 127.0.0.1: .*must be 0-65535",
            ("{clipscore: {}}", 0): "error: reward 'clipscore' needs 'folder'",
            ("{}", 0): "error: there is nothing to serve",
        }
        for (rewards, number), message in cases.items():
            with pytest.raises(SystemExit) as caught:
                main(["reward-server", f"--rewards={rewards}", f"--port={number}"])
            assert re.match(message, str(caught.value.code)), caught.value.code
