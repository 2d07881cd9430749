"""Mode auto over a server, a store and in this process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient

from search_r3.data.documents import chunks_of
from search_r3.integrations.source import InProcess
from search_r3.model.encoder import SearchR3
from search_r3.serving import Fingerprint, Store
from search_r3.serving.engine import EngineThread
from search_r3.serving.search import StoreSearcher, top_scores
from search_r3.serving.server import ServerSettings, create_app
from tests.conftest import small_collection
from tests.gates import gate_for, of_scores

TEXTS = [one.text for one in small_collection().queries.values()][:6]


@pytest.fixture
def model(tiny_path: Path) -> SearchR3:
    model = SearchR3(tiny_path, device="cpu", max_new_tokens=6)
    model.backbone.gate = gate_for(model, TEXTS)
    return model


@pytest.fixture
def store(model: SearchR3, tmp_path: Path) -> Store:
    store = Store.create(tmp_path / "s", Fingerprint.of(model))
    documents = list(small_collection().documents.values())[:12]
    chunks = [chunk for one in documents for chunk in chunks_of(one.doc_id, one.text, one.title)]
    store.upsert(chunks, model.encode_document([chunk.full_text for chunk in chunks]))
    return store


@pytest.fixture
def client(model: SearchR3, store: Store) -> Iterator[TestClient]:
    with EngineThread(model, slots=4) as engine:
        app = create_app(engine, ServerSettings("tiny"), store=store)
        yield TestClient(app, raise_server_exceptions=False)


def thinkers(model: SearchR3) -> list[bool]:
    return list(model.encode_query(TEXTS, "auto").thought)


def test_vectors_are_those_of_the_mode_that_the_gate_chose(client: TestClient, model: SearchR3) -> None:
    expected = model.encode_query(TEXTS, "auto")
    assert 0 < sum(expected.thought) < len(TEXTS)
    direct, reason = model.encode_query(TEXTS, "direct"), model.encode_query(TEXTS, "reason")
    for body in ({"model": "tiny:auto"}, {"mode": "auto"}):
        answer = client.post("/v1/embeddings", json=body | {"input": TEXTS}).json()
        vectors = np.array([one["embedding"] for one in answer["data"]])
        assert np.abs(vectors - expected.vectors).max() < 1e-5
        assert answer["usage"]["completion_tokens"] == sum(expected.reasoning_tokens)
    for text, thought, one, other in zip(TEXTS, expected.thought, direct, reason, strict=True):
        [vector] = client.post("/embed", json={"inputs": text, "prompt_name": "auto"}).json()
        assert np.abs(np.array(vector) - (other if thought else one)).max() < 1e-5
    assert "tiny:auto" in [one["id"] for one in client.get("/v1/models").json()["data"]]
    assert client.get("/info").json()["auto"] is True


def test_a_search_says_who_thought_and_why(client: TestClient, model: SearchR3, store: Store) -> None:
    seen = set()
    for text, thought in zip(TEXTS, thinkers(model), strict=True):
        body = {"query": text, "mode": "auto", "k": 3}
        answer = client.post("/v1/search", json=body).json()
        alone = client.post("/v1/search", json=body | {"mode": "reason" if thought else "direct"}).json()
        assert answer["thought"] is thought and (answer["gate"]["probability"] > 0.5) is thought
        assert [hit["id"] for hit in answer["hits"]] == [hit["id"] for hit in alone["hits"]]
        assert answer["reasoning"] == alone["reasoning"] and "gate" not in alone
        assert (answer["usage"]["prompt_tokens"] > alone["usage"]["prompt_tokens"]) is thought
        events = client.post("/v1/search", json=body | {"stream": True}).text
        [hits] = [json.loads(block.split("data: ")[1]) for block in events.split("\n\n") if "event: hits" in block]
        assert {key: hits[key] for key in ("thought", "gate", "reasoning")} == {
            key: answer[key] for key in ("thought", "gate", "reasoning")
        }
        assert ("event: reasoning" in events) is bool(answer["reasoning"])
        searched = StoreSearcher(model, store).search(text, "auto", 3)
        assert searched.thought is thought and [one.doc_id for one, _ in searched.documents] == [
            hit["id"] for hit in answer["hits"]
        ]
        seen.add(thought)
    assert seen == {True, False}


def test_a_store_tells_the_gate_its_scores(model: SearchR3, store: Store) -> None:
    vectors = model.encode_query(TEXTS, "direct").vectors
    scores = top_scores(store, vectors)
    assert scores.shape == (6, 10) and (np.diff(scores, axis=1) <= 0).all()
    top = np.sort(scores[:, 0])
    assert top[2] < top[3]
    head = of_scores(model.dimension, top=1e5)
    head = head.model_copy(update={"bias": -1e5 * float(top[2:4].mean())})
    model.backbone.gate = gate_for(model, TEXTS, head)
    expected = (scores[:, 0] > top[2:4].mean()).tolist()
    assert expected != thinkers(model)
    with InProcess(model, store) as source:
        assert [source.search(text, mode="auto").thought for text in TEXTS] == expected
        alone = [model.encode_query([t], "auto", top_scores=partial(top_scores, store)).vectors[0] for t in TEXTS]
        assert np.abs(source.encode_query(TEXTS, "auto").vectors - np.array(alone)).max() < 1e-5


def test_the_gate_sees_what_is_searched_and_nothing_else(client: TestClient, model: SearchR3, store: Store) -> None:
    model.backbone.gate = gate_for(model, TEXTS, of_scores(model.dimension, top=1.0))
    [[best]] = store.search(model.encode_query(TEXTS[0], "direct").vectors, k=1)
    where = {"title": {"$ne": best.chunk.title}}
    body = {"query": TEXTS[0], "k": 1, "filter": where}
    top = client.post("/v1/search", json=body | {"mode": "direct"}).json()["hits"][0]["score"]
    assert top < best.score
    streamed = client.post("/v1/search", json=body | {"mode": "auto", "stream": True}).text
    [hits] = [json.loads(block.split("data: ")[1]) for block in streamed.split("\n\n") if "event: hits" in block]
    with InProcess(model, store) as source:
        gates = [
            client.post("/v1/search", json=body | {"mode": "auto"}).json()["gate"],
            hits["gate"],
            source.search(TEXTS[0], mode="auto", filter=where).gate,
            StoreSearcher(model, store, where=where).search(TEXTS[0], "auto", 1).gate,
        ]
    assert [gate["top"] for gate in gates] == pytest.approx([top] * 4, abs=1e-5)


def test_an_empty_store_leaves_the_decision_to_the_vector(model: SearchR3, tmp_path: Path) -> None:
    empty = Store.create(tmp_path / "empty", Fingerprint.of(model))
    assert model.encode_query(TEXTS, "auto", top_scores=partial(top_scores, empty)).thought == thinkers(model)


def test_without_a_gate_every_way_says_how_to_fit_one(client: TestClient, model: SearchR3) -> None:
    model.backbone.gate = None
    assert client.get("/info").json()["auto"] is False
    for path, body in (
        ("/v1/embeddings", {"input": TEXTS, "mode": "auto"}),
        ("/v1/search", {"query": TEXTS[0], "mode": "auto"}),
        ("/v1/search", {"query": TEXTS[0], "mode": "auto", "stream": True}),
    ):
        answer = client.post(path, json=body)
        assert answer.status_code >= 400 and "search-r3 gate" in answer.text
    assert "tiny:auto" not in client.get("/v1/models").text


def test_dimensions_that_are_left_out_change_no_decision(model: SearchR3) -> None:
    expected = thinkers(model)
    model.truncate_dim = 8
    with InProcess(model) as source:
        vectors = source.encode_query(TEXTS, "auto").vectors
    whole = model.encode_query(TEXTS, "auto")
    assert whole.thought == expected and vectors.shape == (6, 8)
    assert np.abs(vectors - whole.vectors).max() < 1e-5
