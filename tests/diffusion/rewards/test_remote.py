"""Rewards over HTTP: the same scores as here, tries, limits, one error for what is wrong, nothing pickled."""

import io
import json
import math
import pickle
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from thalweg.diffusion.rewards.base import RewardError, RewardResult, evaluate
from thalweg.diffusion.rewards.http import request_json
from thalweg.diffusion.rewards.pool import RewardPool
from thalweg.diffusion.rewards.registry import open_reward, open_rewards
from thalweg.diffusion.rewards.server import RewardServer, serving
from thalweg.diffusion.rewards.unified import INSTRUCTION, SIDE
from thalweg.diffusion.rewards.wire import from_json, pack, to_json, unpack
from thalweg.diffusion.shapes.dataset import ShapesDataset

NAMES = ("shapes", "jpeg_compressibility", "saturation")


def batch(count: int, seed: int = 0) -> tuple[Tensor, list[str], list[Any]]:
    data = ShapesDataset(size=count, seed=seed, wrong=0.5)
    examples = [data[i] for i in range(count)]
    images = torch.stack([e["image"] for e in examples])
    return images, [e["prompt"] for e in examples], [e["metadata"] for e in examples]


class Broken:
    """Raises what it is told to."""

    name = "broken"

    def __init__(self, error: Exception, failures: int = 10**9) -> None:
        self.error, self.failures, self.calls = error, failures, 0

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[str], metadata: Sequence[Any]) -> RewardResult:
        self.calls += 1
        if self.calls <= self.failures:
            raise self.error
        return RewardResult(scores=torch.zeros(len(prompts)))


@pytest.fixture(scope="module")
def server() -> Iterator[RewardServer]:
    with serving({name: open_reward(name) for name in NAMES}) as running:
        yield running


@contextmanager
def answering(answer: Callable[[bytes], tuple[int, bytes]]) -> Iterator[str]:
    """A server that answers everything as it is told to; its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            status, body = answer(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield f"http://127.0.0.1:{running.server_address[1]}"
        finally:
            running.shutdown()
            thread.join()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.mark.parametrize("name", NAMES)
def test_scores_over_http_are_those_of_a_direct_call(server: RewardServer, name: str) -> None:
    args = batch(10)
    here = evaluate(open_reward(name), *args)
    there = evaluate(open_reward("remote", url=server.url, name=name, batch=4), *args)
    assert torch.allclose(there.scores, here.scores, atol=1e-12)
    assert there.parts.keys() == here.parts.keys()
    for key, part in here.parts.items():
        assert torch.allclose(there.parts[key], part, atol=1e-12, equal_nan=True)


def test_remote_rewards_work_in_sums_and_workers(server: RewardServer) -> None:
    specs = {name: {"reward": "remote", "url": server.url + "/", "name": name} for name in NAMES}
    args = batch(6)
    expected = evaluate(open_rewards({name: {} for name in NAMES}), *args)
    with RewardPool(open_rewards(specs)) as pool:
        pending = [pool.submit(*args) for _ in range(3)]
        for p in pending:
            assert torch.allclose(p.result(timeout=60).scores, expected.scores, atol=1e-12)


def test_the_server_lists_its_rewards_and_unknown_ones_are_refused(server: RewardServer) -> None:
    assert request_json(f"{server.url}/health") == {"rewards": sorted(NAMES)}
    with pytest.raises(RewardError, match=r"no reward 'clip' at http.*'jpeg_compressibility'"):
        open_reward("remote", url=server.url, name="clip")
    with pytest.raises(RewardError, match="refused: HTTP 404: no reward 'clip' here, there are: jpeg"):
        request_json(f"{server.url}/score/clip", b"x")
    with pytest.raises(RewardError, match="HTTP 404: no page /score"):
        request_json(f"{server.url}/score")


def test_what_is_sent_comes_out_again_and_pixels_are_rounded_to_bytes() -> None:
    images = torch.rand(3, 3, 5, 7)
    prompts, metadata = ["a", "\u201cb\u201d \U0001f600", ""], [{"tag": "x", "n": [1, None]}, {}, {"p": 0.5}]
    found, words, extra = unpack(pack(images, prompts, metadata))
    assert (found - images).abs().max() <= 0.5 / 255 + 1e-6
    assert torch.equal(unpack(pack(found, prompts, metadata))[0], found)
    assert (words, extra) == (prompts, metadata)
    result = RewardResult(scores=torch.rand(3).double(), parts={"p": torch.tensor([1.0, math.nan, 2.0])})
    again = from_json(json.loads(json.dumps(to_json(result), allow_nan=False)))
    assert torch.equal(again.scores, result.scores)
    assert torch.allclose(again.parts["p"].float(), result.parts["p"], equal_nan=True)


def npz(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


class Bomb:
    """Would raise where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('unpickled')",))


TEXT = np.frombuffer(b'{"prompts": ["a"], "metadata": [{}]}', dtype=np.uint8)
PIXELS = np.zeros((1, 4, 4, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "no npz file"),
        (b"not a zip", "no npz file"),
        (pickle.dumps(Bomb()), "no npz file"),
        (npz(images=PIXELS, prompts=np.array([Bomb()], dtype=object)), "no npz file"),
        (npz(images=PIXELS), r"\['images'\], needed: \['images', 'prompts'\]"),
        (npz(images=PIXELS.astype(float), prompts=TEXT), "of float64, needed"),
        (npz(images=PIXELS[0], prompts=TEXT), r"\(4, 4, 3\)"),
        (npz(images=PIXELS, prompts=np.zeros(3, np.uint8)), "no npz file"),
        (
            npz(images=PIXELS, prompts=np.frombuffer(b'{"prompts": [1], "metadata": []}', np.uint8)),
            "no list of texts",
        ),
        (
            npz(images=PIXELS, prompts=np.frombuffer(b'{"prompts": [], "metadata": [1]}', np.uint8)),
            "no list of objects",
        ),
        (npz(images=PIXELS, prompts=np.frombuffer(b'{"prompts": []}', np.uint8)), "no npz file"),
        (npz(images=PIXELS[:0], prompts=TEXT), "0 images, 1 prompts"),
    ],
)
def test_bad_requests_are_refused_with_the_reason(server: RewardServer, body: bytes, message: str) -> None:
    with pytest.raises(RewardError, match=f"refused: HTTP 422: .*{message}"):
        request_json(f"{server.url}/score/saturation", body, retries=0)
    assert request_json(f"{server.url}/health")  # it is still there


def test_requests_have_a_limit_also_once_they_are_unpacked() -> None:
    zeros = torch.zeros(8, 3, 64, 64)
    body = pack(zeros, [""] * 8, [{}] * 8)
    assert len(body) < 10_000
    with pytest.raises(RewardError, match=r"unpacks to .* bytes, allowed: 50000"):
        unpack(body, limit=50_000)
    with RewardServer({"saturation": open_reward("saturation")}, limit=100) as small:
        threading.Thread(target=small.serve_forever, kwargs={"poll_interval": 0.05}).start()
        with pytest.raises(RewardError, match="HTTP 413: 101 bytes, allowed: 100"):
            request_json(f"{small.url}/score/saturation", b"x" * 101, retries=0)
        small.shutdown()


def test_a_refusal_of_the_reward_arrives_as_such() -> None:
    images, prompts, _ = batch(2)
    broken = Broken(RewardError("no weights"))
    with serving({"broken": broken, "shapes": open_reward("shapes")}) as running:
        with pytest.raises(RewardError, match="refused: HTTP 422: no weights"):
            evaluate(open_reward("remote", url=running.url, name="broken"), images, prompts, [{}] * 2)
        assert broken.calls == 1
        with pytest.raises(RewardError, match=r"HTTP 422: .*metadata of GenEval without 'tag'"):
            evaluate(open_reward("remote", url=running.url, name="shapes"), images, prompts, [{}] * 2)


def test_a_reward_that_fails_there_is_tried_again() -> None:
    images, prompts, metadata = batch(2)
    broken = Broken(RuntimeError("out of memory"), failures=2)
    with serving({"broken": broken}) as running:
        reward = open_reward("remote", url=running.url, name="broken", retries=2, wait=0.0)
        assert evaluate(reward, images, prompts, metadata).scores.tolist() == [0.0, 0.0]
        assert broken.calls == 3
        broken.failures = 10**9
        with pytest.raises(
            RewardError, match=r"in 3 tries, the last: HTTP 500: RuntimeError\('out of memory'\)"
        ):
            evaluate(reward, images, prompts, metadata)


def test_a_server_that_is_down_is_named_and_one_that_comes_back_is_used() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(RewardError, match=f"{url}/health gave no result in 2 tries, the last: .*refused"):
        open_reward("remote", url=url, name="saturation", retries=1, wait=0.0)
    args = batch(2)
    with serving({"saturation": open_reward("saturation")}) as running:
        reward = open_reward("remote", url=running.url, name="saturation", retries=6, wait=0.05)
        port = int(running.server_address[1])
    enough = threading.Event()

    def again() -> None:
        with serving({"saturation": open_reward("saturation")}, port=port):
            enough.wait(30)

    back = threading.Timer(0.3, again)
    back.start()
    assert evaluate(reward, *args).scores.shape == (2,)
    enough.set()
    back.join()


def test_a_server_that_is_slow_is_named_and_prints_nothing_about_it(
    capfd: pytest.CaptureFixture[str],
) -> None:
    class Slow(Broken):
        def __call__(self, *args: Any) -> RewardResult:
            time.sleep(0.5)
            return RewardResult(scores=torch.zeros(2))

    with serving({"slow": Slow(RuntimeError())}) as running:
        reward = open_reward("remote", url=running.url, name="slow", timeout=0.1, retries=1, wait=0.0)
        with pytest.raises(RewardError, match=r"in 2 tries, the last: no answer within 0\.1 s"):
            evaluate(reward, *batch(2))
        time.sleep(1.0)  # both answers find nobody
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<html>", "answered with no JSON: b'<html>'"),
        (b'{"scores": [1, 2]}', "is no result"),
        (b'{"scores": ["a", "b"], "parts": {}}', "is no result"),
        (b'{"scores": [1], "parts": {}}', r"shape \(1,\) for 2 images"),
        (b'{"scores": [1, NaN], "parts": {}}', "gave nan for 1 of 2"),
        (b"[]", "is no result"),
    ],
)
def test_answers_that_are_no_results_are_named(content: bytes, message: str) -> None:
    from thalweg.diffusion.rewards.remote import RemoteReward

    with (
        answering(lambda body: (200, content)) as url,
        pytest.raises(RewardError, match=message),
    ):
        evaluate(RemoteReward(url=url, name="x"), *batch(2))


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://127.0.0.1/x", "127.0.0.1:80"])
def test_only_http_is_asked(url: str) -> None:
    with pytest.raises(RewardError, match="allowed: http:// and https://"):
        request_json(url)


def test_a_request_without_a_length_is_refused(server: RewardServer) -> None:
    host, port = server.server_address[:2]
    with socket.create_connection((str(host), port), timeout=5) as raw:
        raw.sendall(b"POST /score/saturation HTTP/1.0\r\n\r\n")
        assert b"411" in raw.recv(1000).split(b"\r\n")[0]


def chat(*texts: str) -> Callable[[bytes], tuple[int, bytes]]:
    """Answers in turn as an OpenAI-compatible server."""
    asked: list[Any] = []
    lock = threading.Lock()

    def answer(body: bytes) -> tuple[int, bytes]:
        with lock:
            asked.append(json.loads(body))
            text = texts[(len(asked) - 1) % len(texts)]
        return 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()

    answer.asked = asked  # type: ignore[attr-defined]
    return answer


def test_unified_reward_sends_a_png_of_512_pixels_with_the_prompt_and_reads_the_score() -> None:
    import base64

    from PIL import Image

    answer = chat("Well done. Final Score: 4.5", "bad", "Final Score: 1")
    with answering(answer) as url:
        reward = open_reward("unifiedreward", url=f"{url}/v1", threads=1, model="judge")
        found = evaluate(reward, *batch(3))
    assert found.scores.tolist() == pytest.approx([0.9, 0.0, 0.2])
    assert found.parts["answered"].tolist() == [1.0, 0.0, 1.0]
    first = answer.asked[0]  # type: ignore[attr-defined]
    assert (first["model"], first["temperature"]) == ("judge", 0)
    picture, words = first["messages"][0]["content"]
    assert words["text"] == INSTRUCTION.replace("{prompt}", batch(3)[1][0])
    data = base64.b64decode(picture["image_url"]["url"].removeprefix("data:image/png;base64,"))
    image = Image.open(io.BytesIO(data))
    assert (image.format, image.size) == ("PNG", (SIDE, SIDE))


def test_unified_reward_keeps_the_order_with_several_requests_at_once() -> None:
    data = ShapesDataset(size=12)
    images, prompts = torch.stack([data[i]["image"] for i in range(12)]), [str(i % 5 + 1) for i in range(12)]

    def answer(body: bytes) -> tuple[int, bytes]:
        text = json.loads(body)["messages"][0]["content"][1]["text"]
        time.sleep(0.02 * (text[-1] in "135"))
        return 200, json.dumps({"choices": [{"message": {"content": f"Final Score: {text}"}}]}).encode()

    with answering(answer) as url:
        reward = open_reward("unifiedreward", url=url, threads=4, instruction="{prompt}")
        found = evaluate(reward, images, prompts, [{}] * 12)
    assert found.scores.tolist() == pytest.approx([int(p) / 5 for p in prompts])


def test_unified_reward_names_what_is_wrong() -> None:
    args = batch(1)
    wrong = [
        (chat("no number"), "names no 'Final Score: 1 to 5': 'no number'"),
        (lambda body: (401, b'{"error": {"message": "wrong key"}}'), "refused: HTTP 401: .*wrong key"),
        (lambda body: (200, b"{}"), "no chat completion"),
        (lambda body: (503, b"loading"), "in 2 tries, the last: HTTP 503: loading"),
    ]
    for answer, message in wrong:
        with answering(answer) as url, pytest.raises(RewardError, match=message):
            evaluate(open_reward("unifiedreward", url=url, missing="raise", retries=1, wait=0.0), *args)
    with pytest.raises(RewardError, match="'skip', allowed: zero, raise"):
        open_reward("unifiedreward", url="http://127.0.0.1", missing="skip")
