"""The one thread that owns a model: texts of all clients share its decoder.

What is not reasoned about is encoded between the decoder's steps, in pieces, so that no query waits for a long batch.
Callers come from any thread; asyncio takes the futures by `asyncio.wrap_future`.

Shapes: `N` texts, `D` vector size.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import contextmanager, suppress

import torch

from ..errors import DataError, DeadlineError, ModelError, OverloadedError, TooLargeError, UnavailableError
from ..model.documents import BATCH_TOKENS, check_finite
from ..model.embeddings import shorten
from ..model.encoder import SearchR3
from ..model.engine.decoding import Decoder, DecodeRequest, Rollout
from ..model.engine.engines import Engine, make_engine
from ..model.modes.latent import latent_budget
from ..model.prompts import EncodedPrompt, Kind
from ..types import Array
from .jobs import DECODED, Embedded, Job, Outcome, Row, line_of, read_texts, share_of

logger = logging.getLogger(__name__)

DRAIN = 30.0
"""Seconds for what is in work when the engine is closed."""
LONGEST_WAIT = 60
"""The most seconds that a client of a full queue is told to wait."""


class EngineThread:
    """Encodes texts for many callers at once.

    Args:
        model: nobody else may use it until the thread is closed.
        slots: reasoned queries in work at once.
        max_queue: texts that may wait or be in work: so many queries, and so many documents.
        piece_tokens: tokens computed between two steps of the decoder; by default what suits the device.
        clock: seconds.

    Example:
        >>> from search_r3 import SearchR3
        >>> with EngineThread(SearchR3("builtin")) as engine:
        ...     engine.submit(["Uzbek is a language."], "document").result().vectors.shape
        (1, 192)
    """

    def __init__(
        self,
        model: SearchR3,
        *,
        slots: int = 64,
        max_queue: int = 1024,
        piece_tokens: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.model, self.slots, self.max_queue, self._clock = model, slots, max_queue, clock
        backbone = model.backbone
        self._sides = {"document": backbone.document_side} | dict.fromkeys(("direct", "reason", "latent"), backbone)
        self._piece_tokens = piece_tokens or BATCH_TOKENS.get(backbone.device.type, BATCH_TOKENS["cuda"])
        self._changed = threading.Condition()  # guards what callers and the thread share
        self._inbox: list[Job] = []
        self._load: Counter[str] = Counter()  # texts waiting or in work
        self._closing = False
        self._stop_at = math.inf
        self.failure: BaseException | None = None
        self.counts: Counter[str] = Counter()
        # The thread's own.
        self._jobs: dict[Kind, list[Job]] = {"direct": [], "reason": [], "document": []}
        self._decoder = Decoder(backbone, slots)
        self.slots = self._decoder.slots
        self._tickets: dict[int, Row] = {}
        self._suspects: list[list[Row]] = []
        self._encoders: dict[Kind, Engine] = {}
        self._documents_from = -math.inf
        self._thread = threading.Thread(target=self._run, name="search-r3 engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> EngineThread:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        self.close(DRAIN if error is None else 0.0)

    @property
    def alive(self) -> bool:
        """Whether it takes requests."""
        return self._thread.is_alive() and not self._closing

    def submit(
        self,
        texts: Sequence[str],
        kind: Kind | None = None,
        *,
        instruction: str = "",
        max_new_tokens: int | None = None,
        truncate: bool = False,
        timeout: float = math.inf,
        on_piece: Callable[[str], None] | None = None,
    ) -> Future[Outcome]:
        """Queue texts of one request; cancelling the future frees what it holds.

        Args:
            texts: queries or documents.
            kind: `reason`, `latent`, `direct` or `document`; by default queries in the model's own mode, and reasoned
                about where that is auto, which is two requests (`serving.auto`).
            instruction: follows each text.
            max_new_tokens: reasoning budget; by default the model's own.
            truncate: a text that is too long may lose its end; else it is an error.
            timeout: seconds until it is given up.
            on_piece: called by the thread with pieces of the reasoning of the only text.

        Returns:
            Its exception is a `ModelError` where a vector is not finite, `DeadlineError`, `UnavailableError`, or what
            the model raised.

        Raises:
            DataError: no texts, or an empty one.
            TooLargeError: a text or a budget is too long for the model, or there are more texts than the queue takes.
            OverloadedError: the queue is full.
            UnavailableError: it is closed.
        """
        if kind is None:
            own = self.model.backbone.settings.mode
            kind = "reason" if own == "auto" else own
        if not texts:
            raise DataError("no text was given; give at least one")
        if len(texts) > self.max_queue:
            raise TooLargeError(f"{len(texts)} texts at once, and the queue takes {self.max_queue}; send fewer")
        with self._reserved(share_of(kind), len(texts)):
            prompts = read_texts(self._sides[kind].prompt_encoder, texts, kind, instruction, truncate)
            budget, now = self._budget(kind, prompts, max_new_tokens), self._clock()
            job = Job(kind, texts, budget, Future(), now, now + timeout, on_piece)
            rows = [Row(job, place, prompt) for place, prompt in enumerate(prompts)]
            # Texts of like length are computed together.
            job.waiting.extend(rows if kind in DECODED else sorted(rows, key=lambda row: -len(row.prompt.ids)))
            with self._changed:
                self._check_alive()
                self._inbox.append(job)
                self._changed.notify()
        return job.future

    @contextmanager
    def _reserved(self, share: str, count: int) -> Iterator[None]:
        """Places in the queue, before texts are read: under load that would cost as much as those that are served."""
        with self._changed:
            self._check_alive()
            load = self._load[share]
            if load + count > self.max_queue:
                self.counts["refused"] += 1
                raise OverloadedError(
                    f"{load} {share} are waiting or in work, and the queue takes {self.max_queue}; try again",
                    self._retry_after(load),
                )
            self._load[share] += count
        try:
            yield
        except BaseException:
            with self._changed:
                self._load[share] -= count
            raise

    def _check_alive(self) -> None:
        if not self.alive:
            raise UnavailableError("the server is ending, or its engine has; ask another one")

    def room(self, kind: Kind) -> int:
        """The tokens that a text may have, its instruction included."""
        return self._sides[kind].prompt_encoder.room(kind)

    def load(self) -> dict[str, int]:
        """Texts waiting or in work: `queries`, `documents`; `slots` in use."""
        with self._changed:
            return {name: self._load[name] for name in ("queries", "documents")} | {"slots": len(self._tickets)}

    def close(self, drain: float = DRAIN) -> None:
        """Take no more requests, finish those that are here within so many seconds, refuse the rest, and end."""
        with self._changed:
            self._closing = True
            self._stop_at = self._clock() + drain
            self._changed.notify()
        self._thread.join()

    def _budget(self, kind: Kind, prompts: Sequence[EncodedPrompt], wanted: int | None) -> int:
        if kind not in DECODED:
            return 0
        if kind == "latent":
            wanted = latent_budget(self.model.backbone, wanted)
        budget = self.model.backbone.settings.max_new_tokens if wanted is None else wanted
        room = self.model.backbone.context_length - max(len(prompt.ids) for prompt in prompts)
        if not 1 <= budget <= room:
            raise TooLargeError(f"max_new_tokens={budget}: beside this query the model has room for 1 to {room}")
        return budget

    def _retry_after(self, load: int) -> int:
        """Seconds until a quarter of the queue is done, as fast as texts went so far."""
        seconds = self.counts["busy_milliseconds"] / 1000 / max(1, self.counts["texts"])
        return min(LONGEST_WAIT, max(1, math.ceil(load * seconds / 4)))

    def _run(self) -> None:
        try:
            while self._wait():
                started = self._clock()
                self._round(started)
                self.counts["busy_milliseconds"] += round(1000 * (self._clock() - started))
        except BaseException as error:  # a fault of this file: nobody may wait for ever
            logger.exception("the engine has ended")
            self.failure = error
        with self._changed:
            self._closing = True
            self._take_in()
        for job in [job for jobs in self._jobs.values() for job in jobs]:
            self._end(job, UnavailableError("the server ended before this was done; ask again"))

    def _wait(self) -> bool:
        """Wait for something to do; whether there is something."""
        with self._changed:
            while True:
                self._take_in()
                if self._clock() >= self._stop_at:
                    return False
                if any(self._jobs.values()):
                    return True
                if self._closing:
                    return False
                self._changed.wait()

    def _take_in(self) -> None:
        for job in self._inbox:
            self._jobs[line_of(job.kind)].append(job)
        self._inbox.clear()

    def _round(self, now: float) -> None:
        """One step of the decoder, a piece of direct queries, a piece of documents."""
        for job in [job for jobs in self._jobs.values() for job in jobs]:
            if job.future.cancelled():
                self._end(job)
            elif now >= job.deadline:
                seconds = job.deadline - job.submitted
                self._end(job, DeadlineError(f"not done within {seconds:g} seconds; ask for less, or wait for longer"))
        self._fill()
        if self._tickets:
            self._step()
        self._encode(self._piece("direct"))
        # While queries are reasoned about, documents get half of the time.
        started = self._clock()
        if started >= self._documents_from or not self._tickets:
            self._encode(self._piece("document"))
            ended = self._clock()
            self._documents_from = 2 * ended - started

    def _fill(self) -> None:
        """Give the decoder queries, of each request in turn; some more than it has slots for, as it likes it."""
        if self._suspects:
            if not self._tickets:
                self._submit(self._suspects.pop())
            return
        for row in self._in_turn("reason", self.slots + self.slots // 8 - len(self._tickets)):
            self._submit([row])

    def _submit(self, rows: Sequence[Row]) -> None:
        for row in rows:
            request = DecodeRequest(row.prompt.ids, row.job.budget, latent=row.job.kind == "latent")
            self._tickets[self._decoder.submit(request)] = row

    def _in_turn(self, kind: Kind, count: int) -> list[Row]:
        """The next rows, of each request in turn."""
        rows: list[Row] = []
        while len(rows) < count and (jobs := [job for job in self._jobs[kind] if job.waiting]):
            for job in jobs[: count - len(rows)]:
                job.started = self._clock() if job.started is None else job.started
                rows.append(job.waiting.popleft())
        if served := {row.job for row in rows}:
            # Who was served last is first in line no more.
            self._jobs[kind].sort(key=lambda job: job in served)
        return rows

    def _step(self) -> None:
        try:
            results = self._decoder.step()
        except Exception as error:
            self._part(error)
            return
        for ticket, rollout in results:
            if row := self._tickets.pop(ticket, None):  # its request may just have failed for another text
                self._decoded(row, rollout)
        for ticket, row in list(self._tickets.items()):
            if row.job.on_piece is not None:
                self._show(row, self.model.backbone.prompt_encoder.decode(self._decoder.reply(ticket)))

    def _part(self, error: Exception) -> None:
        """What failed together is done again in halves, until who is at fault is alone and fails alone."""
        rows = list(self._tickets.values())
        self._tickets.clear()
        self._decoder = Decoder(self.model.backbone, self.slots)
        if len(rows) == 1:
            self._end(rows[0].job, error)
        else:
            logger.warning("%d queries failed together and are done again in halves: %s", len(rows), error)
            self._suspects += [rows[: len(rows) // 2], rows[len(rows) // 2 :]]

    def _show(self, row: Row, reasoning: str) -> None:
        """Say what is new of the reasoning; half a character is waited for."""
        if row.job.on_piece is None or not reasoning.startswith(row.shown) or reasoning.endswith("\ufffd"):
            return
        piece, row.shown = reasoning[len(row.shown) :], reasoning
        if piece:
            try:
                row.job.on_piece(piece)
            except Exception:  # who listens is gone
                row.job.future.cancel()

    def _decoded(self, row: Row, rollout: Rollout) -> None:
        self._show(row, rollout.reasoning)
        vector = shorten(rollout.vector.numpy()[None], self.model.truncate_dim)
        reasoned = rollout.reasoning, rollout.reasoning_tokens, rollout.forced
        self._done(row, Embedded(vector[0], len(row.prompt.ids), row.prompt.truncated, *reasoned, thought=True))

    def _piece(self, kind: Kind) -> list[Row]:
        """The next texts that are encoded together."""
        longest = [len(job.waiting[0].prompt.ids) for job in self._jobs[kind] if job.waiting]
        return self._in_turn(kind, max(1, self._piece_tokens // max(longest))) if longest else []

    def _encode(self, rows: list[Row]) -> None:
        """Encode texts of one kind without reasoning; if they fail together, in halves."""
        rows = [row for row in rows if not row.job.future.done()]
        if not rows:
            return
        try:
            vectors = self._vectors(rows)
        except Exception as error:
            if len(rows) == 1:
                self._end(rows[0].job, error)
                return
            self._encode(rows[: len(rows) // 2])
            self._encode(rows[len(rows) // 2 :])
            return
        short = shorten(vectors, self.model.truncate_dim)
        for row, vector, whole in zip(rows, short, vectors, strict=True):
            kept = whole if row.job.kind == "direct" else None
            self._done(row, Embedded(vector, len(row.prompt.ids), row.prompt.truncated, whole=kept))

    @torch.inference_mode()
    def _vectors(self, rows: Sequence[Row]) -> Array:
        kind = rows[0].job.kind
        side = self._sides[kind]
        if kind not in self._encoders:
            engine = make_engine(side)
            if before := side.prompt_encoder.frame(kind)[0]:
                engine.share(before)
            self._encoders[kind] = engine
        hidden = self._encoders[kind].encode([row.prompt.ids for row in rows])
        vectors: Array = side.vectors(hidden).cpu().numpy()
        return vectors

    def _done(self, row: Row, embedded: Embedded) -> None:
        job = row.job
        if job.future.done():
            return
        try:
            check_finite(embedded.vector[None], [job.texts[row.place]], self.model.backbone.source)
        except ModelError as error:
            self._end(job, error)
            return
        job.done[row.place] = embedded
        if len(job.done) == len(job.texts):
            self._end(job)

    def _end(self, job: Job, error: BaseException | None = None) -> None:
        """Answer a request, and drop what is left of it."""
        self._jobs[line_of(job.kind)].remove(job)
        for ticket in [ticket for ticket, row in self._tickets.items() if row.job is job]:
            self._decoder.cancel(ticket)
            del self._tickets[ticket]
        groups = ([row for row in group if row.job is not job] for group in self._suspects)
        self._suspects = [group for group in groups if group]
        now = self._clock()
        started = now if job.started is None else job.started
        outcome = Outcome([one for _, one in sorted(job.done.items())], started - job.submitted, now - started)
        with self._changed:
            self._load[share_of(job.kind)] -= len(job.texts)
            whole = error is None and not job.future.cancelled()
            self.counts["requests" if whole else "cancelled" if error is None else "failed"] += 1
            self.counts["texts"] += len(job.done)
            self.counts["prompt_tokens"] += outcome.prompt_tokens
            self.counts["reasoning_tokens"] += outcome.reasoning_tokens
        with suppress(InvalidStateError):  # cancelled
            job.future.set_result(outcome) if error is None else job.future.set_exception(error)
