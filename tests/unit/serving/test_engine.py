"""The engine thread: many callers, one model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from search_r3.errors import DataError, DeadlineError, ModelError, OverloadedError, TooLargeError, UnavailableError
from search_r3.model.encoder import SearchR3
from search_r3.serving.engine import EngineThread
from tests.conftest import favour

WAIT = 20
TEXTS = [f"where is the {colour} {thing}?" for colour in ("red", "green", "blue") for thing in ("house", "boat", "tea")]


class Held:
    """Holds the engine's thread within its first piece of reasoning until `go`."""

    def __init__(self, engine: EngineThread, budget: int = 100) -> None:
        self._here, self._go = threading.Event(), threading.Event()
        self.future = engine.submit(["where is it?"], max_new_tokens=budget, on_piece=self._piece)
        assert self._here.wait(WAIT)

    def _piece(self, _: str) -> None:
        self._here.set()
        assert self._go.wait(WAIT)

    def go(self) -> None:
        self._go.set()


@pytest.fixture
def endless(model: SearchR3) -> SearchR3:
    """A model that reasons in words, to the end of its budget."""
    favour(model.backbone, model.backbone.embed_token_id, -1e4)
    tokenizer, layer = model.backbone.tokenizer, model.backbone.model.get_output_embeddings()
    words = [token for token in range(len(tokenizer)) if tokenizer.decode([token]).strip().isascii()]
    words = [token for token in words if tokenizer.decode([token]).strip().isalpha()]
    layer.bias.data += -1e4
    layer.bias.data[words] = 0
    return model


@pytest.fixture
def engine(endless: SearchR3) -> Iterator[EngineThread]:
    engine = EngineThread(endless, slots=2, max_queue=12)
    yield engine
    engine.close(0.0)


def test_many_threads_at_once_get_what_one_alone_gets(model: SearchR3) -> None:
    alone = {text: model.encode_query([text], max_new_tokens=12) for text in TEXTS}
    direct, documents = model.encode_query(TEXTS, "direct").vectors, model.encode_document(TEXTS)
    with EngineThread(model, slots=4, piece_tokens=60) as engine, ThreadPoolExecutor(16) as pool:
        reasoned = [pool.submit(lambda t=t: engine.submit([t], max_new_tokens=12).result(WAIT)) for t in TEXTS * 2]
        others = [pool.submit(lambda k=k: engine.submit(TEXTS, k).result(WAIT)) for k in ("direct", "document")]
        outcomes = [future.result(WAIT) for future in reasoned]
        for text, outcome in zip(TEXTS * 2, outcomes, strict=True):
            assert outcome.texts[0].reasoning == alone[text].reasoning[0]
            assert outcome.reasoning_tokens == alone[text].reasoning_tokens[0]
            assert np.abs(outcome.vectors - alone[text].vectors).max() < 1e-5
        for future, expected in zip(others, (direct, documents), strict=True):
            assert np.abs(future.result(WAIT).vectors - expected).max() < 1e-5
        assert engine.load() == {"queries": 0, "documents": 0, "slots": 0}


def test_a_model_that_keeps_fewer_dimensions_does_so_here(model: SearchR3) -> None:
    model.truncate_dim = 8
    with EngineThread(model) as engine:
        for kind in ("direct", "document"):
            vectors = engine.submit(TEXTS[:2], kind).result(WAIT).vectors
            assert vectors.shape == (2, 8) and np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


def test_the_pieces_of_reasoning_make_the_whole(engine: EngineThread) -> None:
    pieces: list[str] = []
    outcome = engine.submit(["where is it?"], max_new_tokens=20, on_piece=pieces.append).result(WAIT)
    assert "".join(pieces) == outcome.texts[0].reasoning and len(pieces) > 1


def test_cancelling_frees_the_slot_and_the_queue(engine: EngineThread) -> None:
    steps = counted(engine)
    held = [Held(engine)]
    waiting = engine.submit(TEXTS[:2], max_new_tokens=100)
    assert held[0].future.cancel() and waiting.cancel()
    held[0].go()
    assert engine.submit(["another"], max_new_tokens=4).result(WAIT).reasoning_tokens == 3
    assert len(steps) < 50 and engine.load() == {"queries": 0, "documents": 0, "slots": 0}
    assert len(engine._decoder) == 0
    with pytest.raises(CancelledError):
        waiting.result(WAIT)


def test_a_listener_that_fails_gives_its_slot_back(engine: EngineThread) -> None:
    def gone(_: str) -> None:
        raise RuntimeError("the event loop is closed")

    future = engine.submit(["where is it?"], max_new_tokens=100, on_piece=gone)
    with pytest.raises(CancelledError):
        future.result(WAIT)
    assert engine.submit(["another"], max_new_tokens=4).result(WAIT).texts


def test_a_request_past_its_deadline_ends_and_others_go_on(engine: EngineThread) -> None:
    held = Held(engine)
    late = [engine.submit(TEXTS[:1], kind, timeout=0) for kind in ("reason", "direct", "document")]
    held.go()
    for future in late:
        with pytest.raises(DeadlineError, match="within 0 seconds"):
            future.result(WAIT)
    assert held.future.result(WAIT).reasoning_tokens == 99


def test_a_deadline_ends_what_is_being_decoded(endless: SearchR3) -> None:
    now = [0.0]
    with EngineThread(endless, slots=1, clock=lambda: now[0]) as engine:
        steps, here, go = counted(engine), threading.Event(), threading.Event()

        def piece(_: str) -> None:
            here.set()
            assert go.wait(WAIT)

        future = engine.submit(["where is it?"], max_new_tokens=100, timeout=5, on_piece=piece)
        assert here.wait(WAIT)
        now[0] = 6
        go.set()
        with pytest.raises(DeadlineError, match="within 5 seconds"):
            future.result(WAIT)
        assert len(steps) < 50


def test_a_full_queue_refuses_queries_and_still_takes_documents(engine: EngineThread) -> None:
    held = Held(engine)
    engine.submit(TEXTS, max_new_tokens=2)
    with pytest.raises(OverloadedError, match="10 queries are waiting or in work, and the queue takes 12") as refusal:
        engine.submit(TEXTS[:3], "direct")
    assert 1 <= refusal.value.retry_after <= 60
    documents = engine.submit(TEXTS, "document")
    with pytest.raises(OverloadedError, match="9 documents"):
        engine.submit(TEXTS, "document")
    with pytest.raises(TooLargeError, match="13 texts at once, and the queue takes 12"):
        engine.submit(["x"] * 13)
    held.go()
    assert len(documents.result(WAIT).texts) == 9


def test_what_finds_no_place_is_not_read_and_what_cannot_be_read_gives_its_place_back(
    engine: EngineThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(engine)
    with pytest.raises(TooLargeError, match="longer than"):
        engine.submit(["a boat " * 1000] * 10)
    engine.submit(TEXTS, max_new_tokens=2)
    monkeypatch.setattr("search_r3.serving.engine.read_texts", lambda *_: pytest.fail("it was read"))
    with pytest.raises(OverloadedError, match="10 queries are waiting"):
        engine.submit(TEXTS)
    held.go()


def test_a_request_of_many_queries_does_not_keep_a_later_one_waiting(engine: EngineThread) -> None:
    ended: list[str] = []
    held = Held(engine, 4)
    many = engine.submit(TEXTS, max_new_tokens=6)
    one = engine.submit(["another"], max_new_tokens=6)
    many.add_done_callback(lambda _: ended.append("many"))
    one.add_done_callback(lambda _: ended.append("one"))
    held.go()
    many.result(WAIT), one.result(WAIT)
    assert ended == ["one", "many"]


def test_documents_are_encoded_between_steps_and_not_before_queries(endless: SearchR3) -> None:
    now = [0.0]
    log: list[str] = []
    with EngineThread(endless, slots=1, piece_tokens=1, clock=lambda: now[0]) as engine:
        held = Held(engine, 40)
        documents = engine.submit(TEXTS, "document")
        passing(engine, now, log)
        held.go()
        held.future.result(WAIT), documents.result(WAIT)
    during = "".join(log)[: "".join(log).rindex("s")]
    # A document takes as long as five steps here, and then five steps are the queries'.
    assert during.count("d") >= 4 and "dd" not in during and "dsd" not in during


@pytest.mark.parametrize("kind", ["reason", "document"])
def test_a_row_that_the_model_cannot_bear_fails_alone(
    kind: Any, engine: EngineThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = {text: engine.submit([text], kind, max_new_tokens=5).result(WAIT).vectors for text in TEXTS}
    poison = engine.model.backbone.prompt_encoder.encode("poison", kind).ids
    poisoned(engine, monkeypatch, poison)
    held = Held(engine, 2)  # so that all are in one batch
    futures = {text: engine.submit([text], kind, max_new_tokens=5) for text in [*TEXTS[:4], "poison", *TEXTS[4:]]}
    held.go()
    with pytest.raises(RuntimeError, match="out of memory"):
        futures.pop("poison").result(WAIT)
    for text, future in futures.items():
        assert np.abs(future.result(WAIT).vectors - expected[text]).max() < 1e-5
    held.future.result(WAIT)
    assert engine.alive and engine.load() == {"queries": 0, "documents": 0, "slots": 0}


def test_a_vector_of_nan_fails_its_request_alone(model: SearchR3) -> None:
    with EngineThread(model) as engine:
        good = engine.submit(["red"], "document").result(WAIT).vectors
        table = model.backbone.model.get_input_embeddings().weight
        rows = {text: set(model.backbone.prompt_encoder.encode(text, "document").ids) for text in ("red", "stone")}
        with torch.no_grad():
            table[list(rows["stone"] - rows["red"])] = float("nan")
        futures = [engine.submit([text], "document") for text in ("stone", "red")]
        with pytest.raises(ModelError, match="NaN or infinity"):
            futures[0].result(WAIT)
        assert np.allclose(futures[1].result(WAIT).vectors, good, atol=1e-5)


def test_closing_finishes_what_is_here_and_takes_no_more(endless: SearchR3) -> None:
    engine = EngineThread(endless, slots=1)
    held = Held(engine, 10)
    waiting = engine.submit(TEXTS[:3], max_new_tokens=5)
    closing = threading.Thread(target=engine.close)
    closing.start()
    while engine.alive:
        pass
    with pytest.raises(UnavailableError, match="ending"):
        engine.submit(["too late"])
    held.go()
    closing.join(WAIT)
    assert held.future.result(0).reasoning_tokens == 9 and len(waiting.result(0).texts) == 3


def test_closing_refuses_what_it_has_no_time_for(endless: SearchR3) -> None:
    engine = EngineThread(endless, slots=1)
    held = Held(engine)
    waiting = engine.submit(TEXTS[:3])
    closing = threading.Thread(target=engine.close, args=[0.0])
    closing.start()
    while engine.alive:
        pass
    held.go()
    closing.join(WAIT)
    for future in (held.future, waiting):
        with pytest.raises(UnavailableError, match="ask again"):
            future.result(0)


def test_a_fault_of_the_engine_itself_leaves_nobody_waiting(
    engine: EngineThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(engine)
    waiting = engine.submit(TEXTS[:3], "document")
    monkeypatch.setattr(engine, "_fill", lambda: 1 / 0)
    held.go()
    for future in (held.future, waiting):
        with pytest.raises(UnavailableError):
            future.result(WAIT)
    assert not engine.alive and isinstance(engine.failure, ZeroDivisionError)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"texts": []}, DataError, "no text"),
        ({"texts": ["red", " "]}, DataError, "query number 1"),
        ({"texts": ["red", "red house " * 200], "kind": "document"}, TooLargeError, "text number 1 is longer than"),
        ({"texts": ["red"], "max_new_tokens": 0}, TooLargeError, "max_new_tokens=0"),
        ({"texts": ["red"], "max_new_tokens": 10**6}, TooLargeError, "room for 1 to"),
    ],
)
def test_what_cannot_be_done_is_refused_at_once(
    arguments: dict[str, Any], error: type[Exception], message: str, engine: EngineThread
) -> None:
    with pytest.raises(error, match=message):
        engine.submit(**arguments)
    assert engine.load()["queries"] == 0


def test_a_long_text_may_lose_its_end_where_that_is_said(engine: EngineThread) -> None:
    long = engine.submit(["red house " * 200, "red"], "document", truncate=True).result(WAIT)
    assert [one.truncated for one in long.texts] == [True, False]


def counted(engine: EngineThread) -> list[int]:
    """Grows by one with each step of the decoder."""
    steps: list[int] = []
    step = engine._decoder.step
    engine._decoder.step = lambda: steps.append(1) or step()  # type: ignore[method-assign,func-returns-value]
    return steps


def passing(engine: EngineThread, now: list[float], log: list[str]) -> None:
    """A clock for which a step takes one second, and a document five."""

    def timed(function: Callable[..., Any], seconds: float, sign: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            now[0] += seconds
            log.append(sign)
            return function(*args)

        return call

    engine._decoder.step = timed(engine._decoder.step, 1, "s")  # type: ignore[method-assign]
    engine._vectors = timed(engine._vectors, 5, "d")  # type: ignore[method-assign]


def poisoned(engine: EngineThread, monkeypatch: pytest.MonkeyPatch, poison: list[int]) -> None:
    """Make any batch with this prompt run out of memory."""
    from search_r3.model.engine.slots import SlotEngine

    for name in ("encode", "prompt_states"):
        whole = getattr(SlotEngine, name)

        def failing(self: Any, sequences: Any, whole: Any = whole) -> Any:
            if any(list(ids) == poison for ids in sequences):
                raise RuntimeError("out of memory")
            return whole(self, sequences)

        monkeypatch.setattr(SlotEngine, name, failing)
