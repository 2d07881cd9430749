"""Mode auto of a model that decides itself, over a server, a store and in this process."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient

from search_r3.data.documents import chunks_of
from search_r3.integrations.source import InProcess
from search_r3.model.encoder import SearchR3
from search_r3.serving import Fingerprint, Store
from search_r3.serving.engine import EngineThread
from search_r3.serving.search import StoreSearcher
from search_r3.serving.server import ServerSettings, create_app
from tests.conftest import small_collection
from tests.gates import let_it_decide

TEXTS = [one.text for one in small_collection().queries.values()][:6]


@pytest.fixture
def model(tiny_path: Path) -> SearchR3:
    model = SearchR3(tiny_path, device="cpu", max_new_tokens=6)
    let_it_decide(model, TEXTS)
    return model


def test_every_way_to_ask_has_the_models_own_decisions(model: SearchR3, tmp_path: Path) -> None:
    expected = model.encode_query(TEXTS, "auto")
    assert 0 < sum(expected.thought) < len(TEXTS)
    store = Store.create(tmp_path / "s", Fingerprint.of(model))
    documents = list(small_collection().documents.values())[:12]
    chunks = [chunk for one in documents for chunk in chunks_of(one.doc_id, one.text, one.title)]
    store.upsert(chunks, model.encode_document([chunk.full_text for chunk in chunks]))
    with EngineThread(model, slots=4) as engine:
        client = TestClient(create_app(engine, ServerSettings("tiny"), store=store), raise_server_exceptions=False)
        assert "tiny:auto" in [one["id"] for one in client.get("/v1/models").json()["data"]]
        answer = client.post("/v1/embeddings", json={"model": "tiny:auto", "input": TEXTS}).json()
        assert np.abs(np.array([one["embedding"] for one in answer["data"]]) - expected.vectors).max() < 1e-5
        assert answer["usage"]["completion_tokens"] == sum(expected.reasoning_tokens)
        for text, thought, gate in zip(TEXTS, expected.thought, expected.gate, strict=True):
            body = {"query": text, "mode": "auto", "k": 3}
            answer = client.post("/v1/search", json=body).json()
            assert answer["thought"] is thought and answer["gate"] == pytest.approx(gate, abs=1e-5)
            events = client.post("/v1/search", json=body | {"stream": True}).text
            [hits] = [json.loads(block.split("data: ")[1]) for block in events.split("\n\n") if "event: hits" in block]
            assert (hits["thought"], hits["hits"]) == (thought, answer["hits"])
            searched = StoreSearcher(model, store).search(text, "auto", 3)
            assert searched.thought is thought
            assert [one.doc_id for one, _ in searched.documents] == [hit["id"] for hit in answer["hits"]]
    with InProcess(model, store) as source:
        assert np.abs(source.encode_query(TEXTS, "auto").vectors - expected.vectors).max() < 1e-5
        assert [source.search(text, mode="auto").thought for text in TEXTS] == expected.thought
