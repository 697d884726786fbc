"""Requests with a limit of time and several tries, and then one clear error."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from thalweg.diffusion.rewards.base import RewardError

Result = TypeVar("Result")

TRANSIENT = (408, 425, 429, 500, 502, 503, 504)
"""Answers after which another try may help."""
WAIT = 0.5
"""Seconds before the second try; twice as long before each further one."""
LONGEST = 30.0
"""Seconds between tries at most."""


class Transient(Exception):
    """A failure after which another try may help."""


def retry(call: Callable[[], Result], retries: int, wait: float, on: type[Exception] = Transient) -> Result:
    """Result of a call that is repeated when it fails with that kind of error; the last one is passed on."""
    for attempt in range(retries + 1):
        try:
            return call()
        except on:
            if attempt == retries:
                raise
            time.sleep(min(wait * 2**attempt, LONGEST))
    raise ValueError(f"retries {retries}, allowed: at least 0")


def request_json(
    url: str,
    body: bytes | None = None,
    *,
    headers: Mapping[str, str] | None = None,
    timeout: float = 60.0,
    retries: int = 3,
    wait: float = WAIT,
) -> Any:
    """JSON answer to a request, a POST where there is a body.

    Args:
        url: http or https.
        body: What is sent.
        headers: Of the request.
        timeout: Seconds that a try may wait for the next byte.
        retries: Tries after the first, where the server is not there, is slow, or says that it may work
            later.
        wait: Seconds before the second try.

    Raises:
        RewardError: If no try works, the server refuses the request, or the answer is no JSON.
    """
    if not url.startswith(("http://", "https://")):
        raise RewardError(f"url {url!r}, allowed: http:// and https://")

    def call() -> Any:
        return _once(url, body, dict(headers or {}), timeout)

    try:
        return retry(call, retries, wait)
    except Transient as error:
        tries = f"{retries + 1} tries" if retries else "1 try"
        raise RewardError(f"{url} gave no result in {tries}, the last: {error}") from None


def _once(url: str, body: bytes | None, headers: dict[str, str], timeout: float) -> Any:
    request = urllib.request.Request(url, data=body, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            content = answer.read()
    except urllib.error.HTTPError as error:
        with error:
            said = f"HTTP {error.code}: {_message(error.read(2000))}"
        if error.code in TRANSIENT:
            raise Transient(said) from None
        raise RewardError(f"{url} refused: {said}") from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        slow = isinstance(reason, TimeoutError)
        raise Transient(f"no answer within {timeout} s" if slow else str(reason) or repr(reason)) from None
    try:
        return json.loads(content)
    except ValueError:
        raise RewardError(f"{url} answered with no JSON: {content[:100]!r}") from None


def _message(content: bytes) -> str:
    try:
        return str(json.loads(content)["error"])
    except (ValueError, KeyError, TypeError):
        return content.decode(errors="replace").strip()
