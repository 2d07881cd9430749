"""Asking a language model about many things: bounded, validated, resumable, counted.

Every finished item goes at once to a progress file, so that an interrupted call can be made again and goes on where it
stopped. An unusable reply is asked for again with what was wrong with it; where the endpoint is down, the call ends.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import DataError
from ...files import read_jsonl
from .chat import ChatEndpoint, NoReplyError, Reply
from .replies import read_object

REPLIES_PER_ITEM = 3
"""How often an item is asked for before its replies count as unusable."""
STOP_AFTER = 16
"""So many items in a row without any reply end the call: the endpoint is down."""
CHARS_PER_TOKEN = 4
"""Of English under the usual tokenizers; for the estimate before the first reply."""
KEYS = {"id", "answer", "failed", "prompt_tokens", "completion_tokens"}
"""Of every line of a progress file but the first."""


Take = Callable[[dict[str, Any], Any], tuple[Any, str]]
"""`(object in a reply, answer so far) -> (answer, fault)`: takes what can be used, and says why more is needed.

Raises:
    ValueError: nothing can be read at all; the message says why.
"""


@dataclass
class Item:
    """One thing to ask about."""

    item_id: str  # unique among the items
    prompt: Callable[[], str]  # gives what is asked; many of them would fill the memory
    take: Take  # reads a reply
    answer: Any  # what was taken so far, for JSON; something false where that is nothing


@dataclass(frozen=True)
class Prices:
    """What an endpoint takes for a million tokens, in any currency.

    Attributes:
        read: of the prompts.
        written: of the replies.

    Example:
        >>> Prices(read=0.5, written=2.0).cost(3_000_000, 250_000)
        2.0

    Raises:
        DataError: a price is below 0 or not finite.
    """

    read: float
    written: float

    def __post_init__(self) -> None:
        if not (0 <= self.read < float("inf") and 0 <= self.written < float("inf")):
            raise DataError(f"the prices {self.read} and {self.written} cannot be used; expected 0 or more per million")

    def cost(self, prompt_tokens: float, completion_tokens: float) -> float:
        """The price of so many tokens."""
        return (prompt_tokens * self.read + completion_tokens * self.written) / 1e6


@dataclass(frozen=True)
class Standing:
    """How far a call is, and what that took; or, before it begins, what the whole takes (`Asking.estimate`)."""

    done: int  # items that are finished, without a usable reply or with one
    total: int  # items of the whole
    prompt_tokens: int  # read, by earlier calls that are continued too; so are the next
    completion_tokens: int  # written
    cost: float | None  # None without prices
    measured: bool = True  # False where the tokens are counted from the prompts, with one reply of full length each


class ProgressFile:
    """One line with the settings, then one line for every item that is done.

    Args:
        path: the file; an existing one is read, and a last line without its end (a killed process) is dropped.
        settings: what has to be the same for a file to be continued.

    Raises:
        DataError: the file was made with other settings, is damaged, or cannot be written.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.rows: dict[str, dict[str, Any]] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a+b") as file:
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
            lines = read_jsonl(path)
            first = next(lines, None)
            if first:
                self._compare(first[1].get("settings"), settings)
            for number, row in lines:
                if set(row) != KEYS:
                    raise DataError(f"{path}:{number}: expected the keys {', '.join(sorted(KEYS))}; remove the line")
                self.rows[row["id"]] = row
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise DataError(f"cannot write {path}: {error.strerror}; choose another folder") from error
        if not first:
            self._write({"settings": dict(settings)})

    def _compare(self, old: Any, new: Mapping[str, Any]) -> None:
        if not isinstance(old, dict):
            raise DataError(f"{self.path}:1: no progress file of this function; choose another folder")
        changed = [f"{name} {old.get(name)!r}, now {new[name]!r}" for name in new if old.get(name) != new[name]]
        if changed:
            raise DataError(
                f"{self.path} was made with other settings ({'; '.join(changed)}); go on with the old ones, remove the "
                "file to begin anew, or choose another folder"
            )

    def add(self, item: Item, fault: str, replies: Sequence[Reply]) -> None:
        """Write what is known of a finished item through to the disk."""
        row = {
            "id": item.item_id,
            "answer": item.answer,
            "failed": None if item.answer else fault,
            "prompt_tokens": sum(reply.prompt_tokens for reply in replies),
            "completion_tokens": sum(reply.completion_tokens for reply in replies),
        }
        self._write(row)
        self.rows[item.item_id] = row

    def _write(self, row: Mapping[str, Any]) -> None:
        try:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise DataError(f"cannot write {self.path}: {error.strerror}; then make the same call again") from error

    def __enter__(self) -> ProgressFile:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


class Asking:
    """A call: the items, and the state that all its workers share.

    Args:
        items: in the order in which they are asked for; `rows` of the file that are of none of them are left alone.
        what: what the items are called in messages, e.g. `articles`.
        settings: `model`, `max_tokens`, `temperature` and `seed` go to the endpoint.
        file: takes every finished item.
        chat: the endpoint, not entered yet.
        prices: for the cost.
        progress: called after every item.
    """

    def __init__(
        self,
        items: Sequence[Item],
        what: str,
        settings: Mapping[str, Any],
        file: ProgressFile,
        chat: ChatEndpoint,
        *,
        prices: Prices | None = None,
        progress: Callable[[Standing], None] | None = None,
    ) -> None:
        self.items, self.what, self.settings, self.file, self.chat = items, what, settings, file, chat
        self.rows = {item.item_id: file.rows[item.item_id] for item in items if item.item_id in file.rows}
        self.resumed = len(self.rows)
        self.unanswered: dict[str, str] = {}
        self.words: dict[str, str] = {}  # reason -> what the endpoint said the first time
        self.prompt_tokens = sum(row["prompt_tokens"] for row in self.rows.values())
        self.completion_tokens = sum(row["completion_tokens"] for row in self.rows.values())
        self._prices, self._progress, self._in_a_row = prices, progress, 0

    def estimate(self) -> Standing:
        """What the whole takes: by the mean of finished items where there are any, else by one reply for each item."""
        if self.prompt_tokens:
            share = len(self.items) / len(self.rows)
            return self._standing(round(self.prompt_tokens * share), round(self.completion_tokens * share))
        pending = [item for item in self.items if item.item_id not in self.rows]
        characters = sum(len(item.prompt()) for item in pending)
        return self._standing(characters // CHARS_PER_TOKEN, len(pending) * self.settings["max_tokens"], measured=False)

    def standing(self) -> Standing:
        """How far the call is."""
        return self._standing(self.prompt_tokens, self.completion_tokens)

    def _standing(self, read: int, written: int, measured: bool = True) -> Standing:
        cost = None if self._prices is None else self._prices.cost(read, written)
        done = len(self.rows) + len(self.unanswered)
        return Standing(done, len(self.items), read, written, cost, measured)

    def answers(self) -> dict[str, Any]:
        """item_id -> answer of every item that has one, in the order of the items."""
        answers = {item.item_id: self.rows[item.item_id]["answer"] for item in self.items if item.item_id in self.rows}
        return {item_id: answer for item_id, answer in answers.items() if answer}

    def failed(self) -> dict[str, int]:
        """Reason -> items without an answer for it, the most frequent first."""
        unusable = Counter(row["failed"] for row in self.rows.values() if row["failed"])
        return dict((unusable + Counter(self.unanswered.values())).most_common())

    def uncounted(self) -> int:
        """Finished items whose tokens the endpoint did not count, so that the cost lacks them."""
        return sum(row["prompt_tokens"] == 0 for row in self.rows.values())

    def nothing(self, result: str) -> DataError:
        """The error for a call without any answer; `result` names what was asked for, e.g. `a query`."""
        reasons = ", ".join(f"{reason}: {number}" for reason, number in self.failed().items())
        words = "".join(f"; to {reason} the endpoint says {text!r}" for reason, text in self.words.items() if text)
        return DataError(
            f"none of the {len(self.items)} {self.what} got {result} ({reasons}){words}; see what "
            f"{self.settings['model']!r} at {self.chat.url} replies, remove {self.file.path} and call again"
        )

    def run(self, concurrency: int) -> None:
        """Ask for every item that is not in the progress file, `concurrency` at a time.

        Raises:
            DataError: the endpoint refuses key or model, or gives no reply to many items in a row.
        """
        if self.resumed < len(self.items):
            asyncio.run(self._ask_all(concurrency))

    async def _ask_all(self, concurrency: int) -> None:
        pending = iter([item for item in self.items if item.item_id not in self.rows])
        try:
            async with self.chat, asyncio.TaskGroup() as group:
                for _ in range(concurrency):
                    group.create_task(self._work(pending))
        except ExceptionGroup as errors:
            first = errors.exceptions[0]
            raise first from first.__cause__

    async def _work(self, pending: Iterator[Item]) -> None:
        for item in pending:  # all workers draw from the same iterator
            try:
                await self._ask(item)
                self._in_a_row = 0
            except NoReplyError as error:
                self.unanswered[item.item_id] = error.reason
                self.words.setdefault(error.reason, error.detail)
                self._in_a_row += 1
                if self._in_a_row == STOP_AFTER:
                    raise DataError(
                        f"{self.chat.url} gave no reply to {STOP_AFTER} {self.what} in a row (the last: {error.reason}"
                        f"{error.detail and ': '}{error.detail}); what is finished is in {self.file.path}: when the "
                        "endpoint works, make the same call again"
                    ) from error
            if self._progress:
                self._progress(self.standing())

    async def _ask(self, item: Item) -> None:
        """Ask for one item until its replies can be used or are too many, and write it to the file."""
        fault, replies = "", list[Reply]()
        for attempt in range(REPLIES_PER_ITEM):
            # Not the same seed twice, else a deterministic endpoint would give the same unusable reply again.
            seed = hashlib.sha256(f"{self.settings['seed']}/{item.item_id}/{attempt}".encode()).digest()
            complaint = f"\n\nAn earlier reply could not be used: {fault}." if fault else ""
            reply = await self.chat.complete(
                {
                    **{name: self.settings[name] for name in ("model", "max_tokens", "temperature")},
                    "messages": [{"role": "user", "content": item.prompt() + complaint}],
                    "seed": int.from_bytes(seed[:4]) >> 1,
                }
            )
            replies.append(reply)
            self.prompt_tokens += reply.prompt_tokens
            self.completion_tokens += reply.completion_tokens
            try:
                item.answer, fault = item.take(read_object(reply.text), item.answer)
            except ValueError as error:
                fault = "the reply was cut at max_tokens" if reply.cut else str(error)
            if not fault:
                break
        self.file.add(item, fault, replies)
        self.rows[item.item_id] = self.file.rows[item.item_id]


def check_output(out: Path) -> None:
    """Refuse to replace a folder that is no collection.

    Raises:
        DataError: `out` is there and has no `corpus.jsonl`.
    """
    if out.exists() and not (out / "corpus.jsonl").is_file():
        raise DataError(f"{out} exists and is no collection, so it is not replaced; choose another folder")
