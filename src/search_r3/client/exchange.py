"""How a request is asked again, and what becomes of an error: the same for both clients, without any input or output.

What is asked is a generator (`Steps`) that yields a `Call` and is sent its response, or yields seconds to wait.
"""

from __future__ import annotations

import math
import random
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any, TypeVar

import httpx2

from ..errors import (
    ConfigError,
    DataError,
    DeadlineError,
    ModelError,
    NotFoundError,
    OverloadedError,
    SearchR3Error,
    TooLargeError,
    UnavailableError,
)

LONGEST_WAIT = 60.0
"""Seconds. A server that says to wait longer is not asked again."""
_FIRST_WAIT = 0.5
_BUSY = (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)
_ERRORS: dict[int, type[SearchR3Error]] = {
    400: DataError,
    404: NotFoundError,
    413: TooLargeError,
    422: DataError,
    424: ModelError,
    504: DeadlineError,
}

T = TypeVar("T")


@dataclass(frozen=True)
class Call:
    """One request: method, path behind the server's address, body; `stream`: its answer is read piece by piece."""

    method: str
    path: str
    body: bytes | None = None
    params: Mapping[str, str | int] | None = None
    stream: bool = False


Steps = Generator[Call | float, httpx2.Response | None, T]
"""What is done for one call of a method, and what it returns."""


def exchange(call: Call, max_retries: int) -> Steps[httpx2.Response]:
    """Send a request; where the server is busy (429, 503), again as soon as it says, so many times at most.

    Raises:
        SearchR3Error: the server refused it; the message is the server's.
    """
    attempt = 0
    while True:
        response = yield call
        assert response is not None
        if response.status_code == HTTPStatus.OK:
            return response
        wait = _seconds_to_wait(response, attempt)
        if response.status_code not in _BUSY or attempt >= max_retries or wait > LONGEST_WAIT:
            raise _error_of(response, wait)
        yield wait
        attempt += 1


@contextmanager
def one_error(url: str) -> Iterator[None]:
    """Make one of the package's errors of what can go wrong between here and a server."""
    try:
        yield
    except httpx2.ConnectTimeout as error:
        raise UnavailableError(f"{url} does not answer; is a server there (search-r3 serve)?") from error
    except httpx2.TimeoutException as error:
        raise DeadlineError(
            f"{url} has not answered in time; ask for less at once, or give a longer timeout="
        ) from error
    except httpx2.ConnectError as error:
        raise UnavailableError(f"cannot reach {url}: {error}; is a server there (search-r3 serve)?") from error
    except httpx2.SSEError as error:
        raise ConfigError(f"{url} is no server of search-r3 ({error}); check the address") from error
    except httpx2.TransportError as error:
        raise UnavailableError(f"{url} ended the connection before its answer was whole: {error}; ask again") from error
    except (httpx2.InvalidURL, httpx2.RequestError) as error:
        raise ConfigError(f"{url}: {error}; check the address") from error


def content_of(response: httpx2.Response) -> Any:
    """The JSON of an answer.

    Raises:
        ConfigError: it is none, so the address is that of something else.
    """
    try:
        return response.json()
    except ValueError as error:
        raise ConfigError(
            f"{response.url} is no server of search-r3: its answer is not JSON; check the address"
        ) from error


def error_of(status: int, message: str) -> SearchR3Error:
    """The error of the package that a status stands for."""
    if status == HTTPStatus.UNAUTHORIZED:
        message += "; give token= to the client, or set SEARCH_R3_TOKEN"
    return _ERRORS.get(status, ConfigError if status < HTTPStatus.INTERNAL_SERVER_ERROR else UnavailableError)(message)


def _error_of(response: httpx2.Response, wait: float) -> SearchR3Error:
    if response.status_code == HTTPStatus.TOO_MANY_REQUESTS:
        return OverloadedError(_message_of(response), math.ceil(wait))
    return error_of(response.status_code, _message_of(response))


def _message_of(response: httpx2.Response) -> str:
    """The server's own words, in each of its forms; of whatever else answers, its first line."""
    try:
        error = response.json()["error"]
        return str(error if isinstance(error, str) else error["message"])
    except (ValueError, KeyError, TypeError):
        lines = response.text.strip().splitlines()
        said = lines[0][:200] if lines else response.reason_phrase
        return f"{response.url} answered {response.status_code}: {said}"


def _seconds_to_wait(response: httpx2.Response, attempt: int) -> float:
    """What `Retry-After` says, else twice as long each time; a little more, so that not all come back at once."""
    text = response.headers.get("Retry-After", "")
    seconds = _FIRST_WAIT * 2.0**attempt
    if text.isdigit():
        seconds = float(text)
    elif text:
        try:
            seconds = max(0.0, (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds())
        except (ValueError, TypeError):  # no date, or one without a zone
            pass
    return seconds * (1 + random.random() / 4)
