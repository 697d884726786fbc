"""``thalweg reward-server``: rewards over HTTP, for trainers and evaluations in other processes."""

from __future__ import annotations

import signal
from typing import Any

LOCAL = ("127.0.0.1", "localhost", "::1")
"""Hosts that only this machine reaches."""
PATIENCE = 60.0
"""Seconds that requests under way have when the server is stopped."""


def reward_server(
    *,
    rewards: dict[str, dict[str, Any] | None],
    host: str = "127.0.0.1",
    port: int = 18085,
    device: str = "auto",
) -> None:
    """Serve rewards until Ctrl-C; requests that are under way then get their answers.

    ``GET /health`` lists the rewards; ``POST /score/NAME`` takes an npz file with pictures, prompts and
    metadata, and answers with JSON; nothing is pickled. The reward `remote` is the client: in a configuration
    it takes the place of NAME as "{NAME: {reward: remote, url: http://HOST:PORT, name: NAME}}". There is no
    authentication: whoever reaches the address can use it.

    Args:
        rewards: Options by name, "{shapes: {}, clipscore: {folder: clip-l14}}"; `reward: OTHER` serves
            another reward, or module:function, under this name.
        host: Address to listen on; 0.0.0.0 for all of this machine.
        port: 0 for any free one.
        device: cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.

    Raises:
        ValueError: If there are no rewards, one cannot be had, or the port cannot be listened on.
    """
    import torch

    from thalweg.diffusion.rewards.registry import open_rewards
    from thalweg.diffusion.rewards.server import RewardServer

    if not rewards:
        raise ValueError('there is nothing to serve: give rewards, as in --rewards "{shapes: {}}"')
    where = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    opened = open_rewards({name: options or {} for name, options in rewards.items()}, where).rewards
    try:
        server = RewardServer(opened, host, port)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"cannot listen on port {port} of {host}: {reason}") from None
    for number in (signal.SIGINT, signal.SIGTERM):  # shells start background jobs with SIGINT ignored
        signal.signal(number, signal.default_int_handler)
    with server:
        print(f"{server.url} serves {', '.join(opened)} on {where}; Ctrl-C stops it", flush=True)
        if host not in LOCAL:
            print(f"{host} can be reached from other machines, and asks nobody who they are", flush=True)
        try:
            server.serve_forever(poll_interval=0.1)
        finally:
            server.drain(PATIENCE)
