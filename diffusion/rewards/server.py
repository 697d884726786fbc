"""A server of rewards over HTTP: models with dependencies or devices of their own, away from the trainer.

``GET /health`` lists the rewards as JSON; ``POST /score/NAME`` takes an npz file (see
:mod:`thalweg.diffusion.rewards.wire`) and answers with JSON. Each reward is used by one request at a time.
There is no authentication: it listens on this machine unless told otherwise.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from thalweg.diffusion.rewards.base import Reward, RewardError, evaluate
from thalweg.diffusion.rewards.wire import LIMIT, to_json, unpack

SILENCE = 60.0
"""Seconds after which a connection that sends nothing is dropped."""


class RewardServer(ThreadingHTTPServer):
    """Serves rewards; ``serve_forever`` blocks.

    Args:
        rewards: By the name under which they are asked for.
        host: Address to listen on.
        port: 0 for any free one; see :attr:`url`.
        limit: Bytes that a request may have.
    """

    daemon_threads = True

    def __init__(
        self, rewards: Mapping[str, Reward], host: str = "127.0.0.1", port: int = 0, limit: int = LIMIT
    ) -> None:
        super().__init__((host, port), _Handler)
        self.rewards, self.limit = dict(rewards), limit
        self.locks = {name: threading.Lock() for name in rewards}
        self._busy, self._idle = 0, threading.Condition()

    @property
    def url(self) -> str:
        """Where it listens."""
        host, port = self.server_address[:2]
        return f"http://{host!s}:{port}"

    def score(self, name: str, body: bytes) -> dict[str, Any]:
        """Answer to a request.

        Raises:
            RewardError: If the request is none, or the reward refuses it.
        """
        images, prompts, metadata = unpack(body, self.limit)
        with self.locks[name]:
            return to_json(evaluate(self.rewards[name], images, prompts, metadata))

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Handle one connection, and count it while it lasts."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._idle:
                self._busy -= 1
                self._idle.notify_all()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a thread for a connection."""
        with self._idle:
            self._busy += 1
        super().process_request(request, client_address)

    def drain(self, timeout: float) -> bool:
        """Wait until no connection is under way, for so many seconds at most; whether there is none."""
        with self._idle:
            return self._idle.wait_for(lambda: self._busy == 0, timeout)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print what went wrong, unless a client that lost patience has hung up."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


@contextmanager
def serving(rewards: Mapping[str, Reward], host: str = "127.0.0.1", port: int = 0) -> Iterator[RewardServer]:
    """A server in a thread of this process, until the block ends."""
    with RewardServer(rewards, host, port) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: RewardServer
    timeout = SILENCE

    def do_GET(self) -> None:
        """List the rewards."""
        if self.path != "/health":
            return self._answer(
                404, {"error": f"no page {self.path}, there are: /health and POST /score/NAME"}
            )
        return self._answer(200, {"rewards": sorted(self.server.rewards)})

    def do_POST(self) -> None:
        """Score images."""
        name = self.path.removeprefix("/score/")
        if name not in self.server.rewards:
            known = ", ".join(sorted(self.server.rewards))
            return self._answer(404, {"error": f"no reward {name!r} here, there are: {known}"})
        length = self.headers.get("Content-Length", "")
        if not length.isdigit():
            return self._answer(411, {"error": "the request does not say how long it is"})
        if int(length) > self.server.limit:
            return self._answer(413, {"error": f"{length} bytes, allowed: {self.server.limit}"})
        body = self.rfile.read(int(length))
        try:
            status, content = 200, self.server.score(name, body)
        except RewardError as error:
            status, content = 422, {"error": str(error)}
        except Exception as error:  # whatever a model raises; the client may try again
            status, content = 500, {"error": repr(error)}
        return self._answer(status, content)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: one line for each request tells nobody anything."""

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
