"""Chat completions of an OpenAI-compatible server: bounded in time, asked again where that helps.

The HTTP client is used directly. `huggingface_hub`'s own inference client refuses local servers in offline mode, and
sends the user's Hugging Face token to a server for which no key was given.
"""

from __future__ import annotations

import asyncio
import logging
import random
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from importlib import import_module
from importlib.util import find_spec
from typing import Any
from urllib.parse import urlsplit

from ...errors import DataError

logger = logging.getLogger(__name__)

BACKOFF_S, MAX_WAIT_S = 1.0, 300.0
"""Seconds before the first retry, doubled for each next one; and the longest wait, also for a `Retry-After`."""


OTHER_NAMES = {"max_tokens": "max_completion_tokens", "temperature": None, "seed": None}
"""What some servers refuse, and what they take in its place."""
REFUSAL = re.compile("not support|unsupported|unrecognized|unknown|unexpected|not permitted|not allowed|extra", re.I)


@dataclass(frozen=True)
class Reply:
    """What a model replied."""

    text: str  # "" where it said nothing
    cut: bool  # whether it ended because it reached the limit of tokens
    prompt_tokens: int  # as the server counts; 0 where it does not. So is the next.
    completion_tokens: int  # likewise


class NoReplyError(Exception):
    """A request that got no chat completion.

    Args:
        reason: what happened, in words that are equal for equal causes, to be counted.
        detail: what the server said.
        again: whether the same request may do better later.
        wait: seconds that the server asks to wait before that.
    """

    def __init__(self, reason: str, detail: str = "", *, again: bool = True, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.reason, self.detail, self.again, self.wait = reason, detail, again, wait


class ChatEndpoint:
    """A server, and the connection to it while the object is entered (`async with`).

    Args:
        address: base address, with or without `/v1` where nothing else follows the host.
        api_key: sent as a bearer token; None sends none. No message ever holds it, though a server may repeat it.
        concurrency: connections at one time, at most.
        timeout: seconds for one request, from connecting to the end of the reply.
        retries: how often a request is sent again after a timeout, a lost connection, or status 408, 429 or 5xx.

    Attributes:
        url: where requests go.
        requests: how many were sent, retries included.

    Raises:
        DataError: an argument cannot be used.
    """

    def __init__(self, address: str, api_key: str | None, *, concurrency: int, timeout: float, retries: int) -> None:
        if not re.fullmatch(r"https?://[^\s/]+\S*", address):
            raise DataError(f"the endpoint {address!r} is no address; expected one such as http://localhost:8000/v1")
        if api_key and not re.fullmatch(r"[!-~]+", api_key):
            raise DataError("the api key holds a blank, a line break or a letter beyond ASCII; copy it anew")
        if concurrency < 1 or timeout <= 0 or retries < 0:
            raise DataError(
                f"concurrency {concurrency}, timeout {timeout} and retries {retries} cannot be used; expected 1 or "
                "more requests at a time, a timeout above 0 seconds, and 0 or more retries"
            )
        base = address.rstrip("/").removesuffix("/chat/completions")
        self.url = f"{base}{'' if urlsplit(base).path else '/v1'}/chat/completions"
        self.requests = 0
        self._names: dict[str, str | None] = {}  # of arguments that this server refuses: another name, or none
        self._key, self._concurrency, self._timeout, self._retries = api_key or "", concurrency, timeout, retries
        # What huggingface_hub brings: httpx2, or httpx in its releases before 2.
        self._http: Any = import_module("httpx2" if find_spec("httpx2") else "httpx")
        self._client: Any = None

    async def __aenter__(self) -> ChatEndpoint:
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        limits = self._http.Limits(max_connections=self._concurrency)
        self._client = self._http.AsyncClient(headers=headers, timeout=None, limits=limits)
        await self._client.__aenter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._client.__aexit__(*error)

    async def complete(self, body: Mapping[str, Any]) -> Reply:
        """Send a request (`model`, `messages`, ...) and wait for its reply.

        Raises:
            NoReplyError: there was none, retries included.
            DataError: the server refuses the key or does not know the model.
        """
        attempt = 0
        while True:
            names = {name: self._names.get(name, name) for name in body}
            try:
                return await self._send({new: body[name] for name, new in names.items() if new is not None})
            except NoReplyError as error:
                if self._learn(error, names):
                    continue
                if not error.again or attempt == self._retries:
                    raise
                # Drawn at random, so that requests refused together do not come back together.
                backoff = BACKOFF_S * 2**attempt * random.uniform(0.5, 1)
                wait = min(max(error.wait, backoff), MAX_WAIT_S)
            attempt += 1
            await asyncio.sleep(wait)

    def _learn(self, error: NoReplyError, names: Mapping[str, str | None]) -> bool:
        """Whether the server refuses an argument of this name that can be named otherwise, or left out."""
        if error.reason not in ("HTTP 400", "HTTP 422"):
            return False
        for name, other in OTHER_NAMES.items():
            refused = names.get(name) == name and re.search(rf"\b{name}\b", error.detail)
            if refused and (other in error.detail if other else REFUSAL.search(error.detail)):
                if self._names.get(name, name) == name:
                    logger.warning(
                        "%s takes no %s: %s", self.url, name, f"{other} is sent" if other else "none is sent"
                    )
                self._names[name] = other
                return True
        return False

    async def _send(self, body: Mapping[str, Any]) -> Reply:
        self.requests += 1
        try:
            async with asyncio.timeout(self._timeout):
                response = await self._client.post(self.url, json=dict(body))
        except TimeoutError as error:
            raise NoReplyError(f"no reply within {self._timeout:g} s") from error
        except self._http.HTTPError as error:
            raise NoReplyError(f"no connection ({type(error).__name__})", self._without_key(str(error))) from error
        status, message = response.status_code, self._without_key(error_words(response))
        if status in (401, 403):
            raise DataError(
                f"{self.url} refuses the api key for the model {body['model']!r} (HTTP {status}: {message}); "
                "give a key that may use it"
            )
        if status == 404:
            raise DataError(
                f"{self.url} does not know the model {body['model']!r}, or chat completions are elsewhere "
                f"(HTTP 404: {message}); check the model's name, and the endpoint, which usually ends in /v1"
            )
        if status != 200:
            again = status in (408, 429) or status >= 500
            raise NoReplyError(
                f"HTTP {status}", message, again=again, wait=_seconds(response.headers.get("retry-after", ""))
            )
        try:
            return _read_reply(response.json())
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise NoReplyError("the reply was no chat completion", self._without_key(response.text)) from error

    def _without_key(self, text: str) -> str:
        text = text.replace(self._key, "***") if self._key else text
        return " ".join(text.split())[:300]


def error_words(response: Any) -> str:
    """What a server says of a request that it refuses, out of the JSON that it stands in."""
    try:
        body = response.json()
        error = body.get("error", body)
        words = error if isinstance(error, str) else error.get("message") or error.get("detail")
    except (ValueError, AttributeError):
        words = None
    return words if isinstance(words, str) and words.strip() else str(response.text)


def _read_reply(body: Any) -> Reply:
    choice, usage = body["choices"][0], body.get("usage") or {}
    return Reply(
        str(choice["message"].get("content") or ""),
        choice.get("finish_reason") == "length",
        int(usage.get("prompt_tokens") or 0),
        int(usage.get("completion_tokens") or 0),
    )


def _seconds(retry_after: str) -> float:
    """The wait that a `Retry-After` header asks for, in seconds or as a date; 0 where it holds neither."""
    if re.fullmatch(r"\d+(\.\d+)?", retry_after):
        return float(retry_after)
    try:
        return max(parsedate_to_datetime(retry_after).timestamp() - time.time(), 0.0)
    except (ValueError, OverflowError):
        return 0.0
