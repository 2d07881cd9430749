"""The routes, each in the form that its clients speak."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from search_r3 import errors
from search_r3.data.documents import Chunking, chunks_of, read_documents
from search_r3.model.encoder import SearchR3
from search_r3.serving import Fingerprint, Store, index_documents
from search_r3.serving.engine import EngineThread
from search_r3.serving.server import ServerSettings, create_app
from tests.conftest import small_collection

WAIT = 60
BUDGET = 8


@pytest.fixture(scope="module")
def encoder(tiny_path: Path) -> SearchR3:
    return SearchR3(tiny_path, device="cpu", max_new_tokens=BUDGET)


@pytest.fixture(scope="module")
def store(encoder: SearchR3, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Four documents, one of them in two chunks."""
    store = Store.create(tmp_path_factory.mktemp("served") / "s", Fingerprint.of(encoder), chunk_tokens=60)
    documents = list(small_collection().documents.values())[:4]
    chunks = [c for one in documents for c in chunks_of(one.doc_id, one.text, one.title, metadata={"n": one.doc_id})]
    store.upsert(chunks, encoder.encode_document([chunk.full_text for chunk in chunks]))
    return store


@pytest.fixture(scope="module")
def engine(encoder: SearchR3) -> Iterator[EngineThread]:
    with EngineThread(encoder, slots=4, max_queue=40) as engine:
        yield engine


@pytest.fixture(scope="module")
def client(engine: EngineThread, store: Store) -> TestClient:
    settings = ServerSettings("tiny", max_batch=20, max_body=20_000, dimensions=(8,))
    return TestClient(create_app(engine, settings, store=store), raise_server_exceptions=False)


def test_openai_vectors_are_those_of_the_model_in_each_mode(client: TestClient, encoder: SearchR3) -> None:
    texts = ["where is the red house?", "a boat"]
    expected = {
        "tiny": encoder.encode_query(texts).vectors,
        "tiny:reason": encoder.encode_query(texts).vectors,
        "search-r3:direct": encoder.encode_query(texts, "direct").vectors,
        "tiny:document": encoder.encode_document(texts),
    }
    for model, vectors in expected.items():
        answer = client.post("/v1/embeddings", json={"model": model, "input": texts}).json()
        assert answer["object"] == "list" and answer["model"] == model
        assert [one["index"] for one in answer["data"]] == [0, 1] and answer["data"][0]["object"] == "embedding"
        assert np.allclose([one["embedding"] for one in answer["data"]], vectors, atol=1e-5)
    by_fields = {"input_type": "query", "mode": "direct"}
    answer = client.post("/v1/embeddings", json={"model": "tiny:document", "input": texts[0], **by_fields}).json()
    assert np.allclose(answer["data"][0]["embedding"], expected["search-r3:direct"][0], atol=1e-5)
    answer = client.post("/v1/embeddings", json={"input": texts, "input_type": "document"}).json()
    assert np.allclose(answer["data"][1]["embedding"], expected["tiny:document"][1], atol=1e-5)
    answer = client.post("/v1/embeddings", json={"input": "a", "instruction": "Only boats."}).json()
    vectors = encoder.encode_query("a", instruction="Only boats.").vectors
    assert np.allclose(answer["data"][0]["embedding"], vectors[0], atol=1e-5)


def test_openai_base64_dimensions_and_usage(client: TestClient, encoder: SearchR3) -> None:
    body = {"model": "tiny:reason", "input": "a boat", "encoding_format": "base64"}
    answer = client.post("/v1/embeddings", json=body).json()
    vector = np.frombuffer(base64.b64decode(answer["data"][0]["embedding"]), dtype="<f4")
    encoded = encoder.encode_query("a boat")
    assert np.allclose(vector, encoded.vectors[0], atol=1e-6)
    prompt = len(encoder.backbone.prompt_encoder.encode("a boat", "reason").ids)
    [reasoning] = encoded.reasoning_tokens
    assert reasoning > 0 and answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": reasoning}
    assert answer["usage"]["prompt_tokens"] == prompt and answer["usage"]["total_tokens"] == prompt + reasoning
    short = client.post("/v1/embeddings", json=body | {"dimensions": 8, "encoding_format": "float"}).json()
    head = vector[:8] / np.linalg.norm(vector[:8])
    assert np.allclose(short["data"][0]["embedding"], head, atol=1e-5)
    whole = client.post("/v1/embeddings", json=body | {"dimensions": encoder.dimension}).json()
    assert whole["data"] == answer["data"]
    assert [one["id"] for one in client.get("/v1/models").json()["data"]][1] == "tiny:reason"


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/v1/embeddings", {"input": []}, 400, "no text was given"),
        ("/v1/embeddings", {"input": ["a", " "]}, 400, "query number 1"),
        ("/v1/embeddings", {"input": [1, 2]}, 400, "token ids"),
        ("/v1/embeddings", {"input": [[1, 2]]}, 400, "token ids"),
        ("/v1/embeddings", {"input": "a", "dimensions": 9}, 400, "dimensions=9: this server has vectors of size 8, 32"),
        ("/v1/embeddings", {"input": "a", "model": "gpt"}, 404, "no model 'gpt' here; take one of tiny, tiny:reason"),
        ("/v1/embeddings", {"input": "a", "model": "tiny:auto"}, 404, "no model 'tiny:auto'"),
        ("/v1/embeddings", {"input": "red " * 900}, 413, "text number 0 is longer than"),
        ("/v1/embeddings", {"input": ["a"] * 21}, 413, "21 texts in one request, and the limit is 20"),
        ("/v1/embeddings", {"input": "a", "max_new_tokens": 9999}, 413, "room for 1 to"),
        ("/v1/embeddings", {"input": "a" * 21_000}, 413, "more than 20000 bytes"),
        ("/v1/embeddings", {"input": 3}, 422, "input"),
        ("/embed", {"inputs": "a", "normalize": False}, 422, "normalize"),
        ("/embed", {"inputs": []}, 400, "no text"),
        ("/rerank", {"query": "a", "texts": []}, 400, "no text to rank"),
        ("/v1/rerank", {"query": "a", "documents": ["b"], "model": "x"}, 404, "no model 'x'"),
        ("/v1/search", {"query": " "}, 400, "the query is empty"),
        ("/v1/search", {"query": "a", "stream": True, "max_new_tokens": 0}, 422, "greater than or equal to 1"),
        ("/v1/search", {"query": "a", "filter": {"n": {"$no": 1}}}, 400, "unknown operator"),
        ("/v1/search", {"query": "a", "filter": {"n": {"$no": 1}}, "stream": True}, 400, "unknown operator"),
        ("/v1/search", {"query": "a", "filter": {"page": 1.5}}, 400, "expected the number of a page"),
        ("/v1/search", {"query": "a", "mode": "latent"}, 400, "was not trained with soft tokens"),
        ("/v1/search", {"query": "a", "rerank": True}, 400, "no cross-encoder"),
        ("/v1/search", {"query": "a", "K": 3}, 422, "K: Extra inputs"),
        ("/v1/search", {"query": "a", "k": 0}, 422, "k: "),
        ("/retrieve", {"queries": ["red " * 900], "truncate": False}, 413, "longer than"),
        ("/nothing", {}, 404, "there is no route POST /nothing; /docs shows them all"),
    ],
)
def test_what_is_wrong_with_a_request_is_named(
    path: str, body: dict[str, Any], status: int, words: str, client: TestClient
) -> None:
    answer = client.post(path, json=body)
    assert answer.status_code == status
    error = answer.json()["error"]
    message = error if path in ("/embed", "/rerank") else error["message"]
    assert words in message
    if path in ("/embed", "/rerank"):
        assert answer.json()["error_type"] == ("Empty" if status == 400 else "Validation")
    else:
        assert error.keys() == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (errors.DataError("words"), 400, "Empty"),
        (errors.ConfigError("words"), 400, "Validation"),
        (errors.NotFoundError("words"), 404, "Validation"),
        (errors.TooLargeError("words"), 413, "Validation"),
        (errors.ModelError("words"), 424, "Backend"),
        (RuntimeError("words"), 424, "Backend"),
        (errors.OverloadedError("words", 7), 429, "Overloaded"),
        (errors.StoreError("words"), 503, "Unhealthy"),
        (errors.UnavailableError("words"), 503, "Unhealthy"),
        (errors.DeadlineError("words"), 504, "Backend"),
    ],
)
def test_each_error_of_the_engine_has_its_status_in_both_forms(
    error: Exception, status: int, kind: str, client: TestClient, engine: EngineThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    from concurrent.futures import Future

    def failing(*_: object, **__: object) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_exception(error)
        return future

    monkeypatch.setattr(engine, "submit", failing)
    tei = client.post("/embed", json={"inputs": "a"})
    ours = client.post("/v1/embeddings", json={"input": "a"})
    assert tei.status_code == ours.status_code == status
    assert tei.json()["error_type"] == kind and "words" in tei.json()["error"]
    assert "words" in ours.json()["error"]["message"]
    assert ours.headers.get("Retry-After") == ("7" if status == 429 else None)


def test_a_fault_of_the_server_says_nothing_of_its_inside(
    client: TestClient, engine: EngineThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "submit", lambda *_, **__: 1 / 0)
    answer = client.post("/v1/embeddings", json={"input": "a"})
    assert answer.status_code == 500 and "division" not in answer.text


def test_a_full_queue_is_said_with_the_time_to_wait(encoder: SearchR3) -> None:
    here, go = threading.Event(), threading.Event()
    with EngineThread(encoder, slots=1, max_queue=1) as engine:
        step = engine._decoder.step
        engine._decoder.step = lambda: (here.set(), go.wait(WAIT), step())[-1]  # type: ignore[method-assign,func-returns-value]
        first = engine.submit(["a"])
        assert here.wait(WAIT)
        answer = TestClient(create_app(engine)).post("/v1/embeddings", json={"input": "a"})
        go.set()
        first.result(WAIT)
    assert answer.status_code == 429 and int(answer.headers["Retry-After"]) >= 1
    assert answer.json()["error"]["type"] == "rate_limit_error"


def test_a_body_that_comes_in_pieces_is_weighed_too(client: TestClient) -> None:
    pieces = (b" " * 10_000 for _ in range(3))
    assert client.post("/embed", content=pieces, headers={"content-type": "application/json"}).status_code == 413


def test_tei_vectors_and_prices(client: TestClient, encoder: SearchR3) -> None:
    expected = {None: encoder.encode_query("a boat").vectors, "document": encoder.encode_document("a boat")}
    expected["direct"] = encoder.encode_query("a boat", "direct").vectors
    for name, vectors in expected.items():
        answer = client.post("/embed", json={"inputs": "a boat", "prompt_name": name})
        assert np.allclose(answer.json(), vectors, atol=1e-5)
        times = ("x-total-time", "x-queue-time", "x-inference-time")
        assert all(answer.headers[one].isdigit() for one in times) and int(answer.headers["x-compute-tokens"]) > 0
    long = {"inputs": ["red " * 900, "a"], "prompt_name": "document"}
    assert client.post("/embed", json=long).status_code == 413
    assert len(client.post("/embed", json=long | {"truncate": True, "dimensions": 8}).json()[0]) == 8


def test_tei_similarity_and_rerank_are_cosines_with_the_reasoned_query(client: TestClient, encoder: SearchR3) -> None:
    texts = ["a boat", "the red house", "a lamp"]
    query = "where is the house?"
    cosines = encoder.similarity(encoder.encode_query(query), encoder.encode_document(texts))[0]
    inputs = {"source_sentence": query, "sentences": texts}
    assert np.allclose(client.post("/similarity", json={"inputs": inputs}).json(), cosines, atol=1e-5)
    order = np.argsort(-cosines).tolist()
    hits = client.post("/rerank", json={"query": query, "texts": texts, "return_text": True}).json()
    assert [hit["index"] for hit in hits] == order and [hit["text"] for hit in hits] == [texts[i] for i in order]
    assert np.allclose([hit["score"] for hit in hits], cosines[order], atol=1e-5)
    assert "text" not in client.post("/rerank", json={"query": query, "texts": texts}).json()[0]
    body = {"model": "tiny", "query": query, "documents": [texts[0], {"text": texts[1]}, texts[2]], "top_n": 2}
    for path, with_text in (("/v1/rerank", True), ("/v2/rerank", False)):
        answer = client.post(path, json=body).json()
        assert [hit["index"] for hit in answer["results"]] == order[:2] and answer["id"]
        assert answer["results"][0]["relevance_score"] == pytest.approx(cosines.max(), abs=1e-5)
        assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0
        assert [hit.get("document") for hit in answer["results"]] == [
            {"text": texts[i]} if with_text else None for i in order[:2]
        ]


def test_queries_are_in_the_models_own_mode_unless_the_server_has_one(encoder: SearchR3, store: Store) -> None:
    backbone = replace(encoder.backbone, settings=encoder.backbone.settings.model_copy(update={"mode": "direct"}))
    text, written = "where is the red house?", []
    with EngineThread(SearchR3(backbone)) as engine:
        assert engine.submit([text]).result(WAIT).reasoning_tokens == 0
        for settings in (ServerSettings(), ServerSettings(mode="reason")):
            client = TestClient(create_app(engine, settings, store=store))
            bodies = {
                "/v1/embeddings": {"input": text},
                "/v1/search": {"query": text},
                "/v2/rerank": {"query": text, "documents": ["a boat"]},
            }
            usages = [client.post(path, json=body).json()["usage"] for path, body in bodies.items()]
            written.append([usage["completion_tokens"] > 0 for usage in usages])
            assert client.get("/info").json()["default_mode"] == (settings.mode or "direct")
    assert written == [[False] * 3, [True] * 3]


def test_a_cross_encoder_ranks_where_there_is_one(engine: EngineThread, store: Store) -> None:
    def lengths(query: str, texts: Sequence[str]) -> list[float]:
        return [-float(len(text)) for text in texts]

    client = TestClient(create_app(engine, store=store, reranker=lengths))
    hits = client.post("/rerank", json={"query": "a", "texts": ["aaa", "a", "aa"]}).json()
    assert hits == [{"index": 1, "score": -1.0}, {"index": 2, "score": -2.0}, {"index": 0, "score": -3.0}]
    found = client.post("/v1/search", json={"query": "house", "rerank": True}).json()["hits"]
    assert [hit["score"] for hit in found] == sorted((hit["score"] for hit in found), reverse=True)
    assert all(hit["score"] <= -1 for hit in found) and len(found) == 4


def test_info_publishes_the_limits(client: TestClient, encoder: SearchR3) -> None:
    info = client.get("/info").json()
    assert info["max_client_batch_size"] == 20 and info["max_body_bytes"] == 20_000 and info["model_id"] == "tiny"
    assert info["max_input_length"]["document"] == encoder.backbone.prompt_encoder.room("document")
    assert info["max_concurrent_requests"] == 40 and info["dimensions"] == [8] and info["store"] is True
    paths = client.get("/openapi.json").json()["paths"]
    assert {"/v1/embeddings", "/embed", "/rerank", "/v1/search", "/retrieve", "/queries"} <= paths.keys()


@pytest.mark.parametrize(
    ("method", "path", "content", "kind", "status", "message"),
    [
        ("GET", "/nowhere", b"", "", 404, "there is no route GET /nowhere; /docs shows them all"),
        ("PATCH", "/info", b"", "", 405,
         "there is no route PATCH /info; it takes another method, and /docs shows which"),
        ("POST", "/embed", b'{"inputs": ', "application/json", 422,
         "body: not JSON at character 11 (Expecting value); send a JSON object"),
        ("POST", "/embed", b'{"inputs": "a"}', "text/plain", 422,
         "body: expected a JSON object, with Content-Type: application/json"),
        ("POST", "/embed", b"\xff\xfe\xfd", "application/json", 400,
         "the body cannot be read as JSON; send a JSON object in UTF-8"),
        ("POST", "/embed", b'{"inputs": ' + b"[" * 9999, "application/json", 400,
         "the body cannot be read as JSON; send a JSON object in UTF-8"),
    ],
)  # fmt: skip
def test_what_no_route_reads_is_refused_with_place_and_remedy(
    method: str, path: str, content: bytes, kind: str, status: int, message: str, client: TestClient
) -> None:
    answer = client.request(method, path, content=content, headers={"content-type": kind} if kind else {})
    found = answer.json()["error"]
    assert (answer.status_code, found if path == "/embed" else found["message"]) == (status, message)


def test_metrics_count_answers_by_route_and_tokens(encoder: SearchR3, store: Store) -> None:
    with EngineThread(encoder) as engine:
        client = TestClient(create_app(engine, store=store))
        tokens = client.post("/v1/embeddings", json={"input": "a boat"}).json()["usage"]
        client.post("/v1/embeddings", json={"input": ""})
        client.get("/v1/documents/d00")
        lines = client.get("/metrics").text.splitlines()
    assert 'search_r3_http_answers_total{route="/v1/embeddings",status="200"} 1.0' in lines
    assert 'search_r3_http_answers_total{route="/v1/embeddings",status="400"} 1.0' in lines
    assert 'search_r3_http_answers_total{route="/v1/documents/{doc_id:path}",status="200"} 1.0' in lines
    assert f"search_r3_prompt_tokens_total {tokens['prompt_tokens']:.1f}" in lines
    assert "search_r3_queries_in_work 0.0" in lines


def test_health_follows_the_engine(encoder: SearchR3) -> None:
    engine = EngineThread(encoder)
    with TestClient(create_app(engine)) as client:
        assert client.get("/health").status_code == 200
    assert not engine.alive  # the app has closed it
    client = TestClient(create_app(engine), raise_server_exceptions=False)
    assert client.get("/health").status_code == 503
    assert client.post("/v1/embeddings", json={"input": "a"}).status_code == 503


def test_a_token_is_asked_for_everywhere_but_for_health_and_pages(engine: EngineThread, store: Store) -> None:
    client = TestClient(create_app(engine, ServerSettings(token="secret"), store=store))
    paths = ["/info", "/metrics", "/v1/documents", "/v1/fields", "/openapi.json", "/mcp"]
    assert [client.get(path).status_code for path in paths] == [401] * len(paths)
    assert client.post("/", json={"inputs": "a"}).status_code == 401  # at the page's address
    assert client.get("/info", headers={"Host": "here/health?"}).status_code == 401  # its address ends there
    wrong = client.post("/v1/search", json={"query": "a"}, headers={"Authorization": "Bearer other"})
    assert wrong.status_code == 401 and wrong.headers["WWW-Authenticate"] == "Bearer"
    assert client.get("/health").status_code == 200
    assert client.get("/info", headers={"Authorization": "Bearer secret"}).status_code == 200


@pytest.mark.parametrize("token", ["", " "])
def test_an_empty_token_which_everybody_has_is_refused(token: str) -> None:
    with pytest.raises(errors.ConfigError, match="the token is empty"):
        ServerSettings(token=token)


def test_no_other_origin_is_let_in(client: TestClient) -> None:
    answer = client.get("/info", headers={"Origin": "https://elsewhere.example"})
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_search_is_that_of_the_model_and_the_store(client: TestClient, encoder: SearchR3, store: Store) -> None:
    query = "where is the red boat?"
    for mode in ("reason", "direct"):
        encoded = encoder.encode_query(query, mode)  # type: ignore[arg-type]
        [expected] = store.search(encoded.vectors, k=3)
        answer = client.post("/v1/search", json={"query": query, "k": 3, "mode": mode}).json()
        assert [hit["id"] for hit in answer["hits"]] == [hit.chunk.doc_id for hit in expected]
        assert answer["reasoning"] == encoded.reasoning[0] and answer["query"] == query
        assert answer["usage"]["completion_tokens"] == encoded.reasoning_tokens[0]
        assert answer["seconds"]["total"] >= answer["seconds"]["inference"] >= 0
    words = client.post("/v1/search", json={"query": "boat", "mode": "bm25"}).json()
    assert [hit["parent_id"] for hit in words["hits"]] == ["d01"] and words["usage"]["total_tokens"] == 0
    some = client.post("/v1/search", json={"query": query, "filter": {"n": ["d00", "d02"]}, "hybrid": True}).json()
    assert {hit["parent_id"] for hit in some["hits"]} == {"d00", "d02"}


def events_of(text: str) -> list[tuple[str, Any]]:
    lines = [block.split("\n") for block in text.strip().split("\n\n")]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in lines]


def test_streamed_search_gives_pieces_then_the_same_hits(engine: EngineThread, client: TestClient) -> None:
    body = {"query": "where is the red boat?", "k": 2}
    whole = client.post("/v1/search", json=body).json()
    answer = client.post("/v1/search", json=body | {"stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    *pieces, hits, done = events_of(answer.text)
    assert {name for name, _ in pieces} <= {"reasoning"} and (hits[0], done[0]) == ("hits", "done")
    assert "".join(data["text"] for _, data in pieces) == whole["reasoning"]
    assert hits[1] == {name: whole[name] for name in hits[1]} and done[1]["usage"] == whole["usage"]
    words = events_of(client.post("/v1/search", json=body | {"stream": True, "mode": "bm25"}).text)
    assert [name for name, _ in words] == ["hits", "done"]


def test_what_fails_within_a_stream_is_an_event(
    client: TestClient, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object, **__: object) -> None:
        raise errors.StoreError("the disk is gone")

    monkeypatch.setattr(store, "search", failing)
    name, data = events_of(client.post("/v1/search", json={"query": "a", "stream": True}).text)[-1]
    assert name == "error" and data["error"]["message"] == "the disk is gone"


def test_search_r1_asks_with_and_without_scores(client: TestClient, encoder: SearchR3, store: Store) -> None:
    queries = ["the red house", "a boat"]
    expected = store.search(encoder.encode_query(queries).vectors, k=3)
    with_scores = client.post("/retrieve", json={"queries": queries, "topk": None, "return_scores": True}).json()
    without = client.post("/retrieve", json={"queries": queries, "topk": 1}).json()
    for hits, found, plain in zip(expected, with_scores["result"], without["result"], strict=True):
        assert [one["document"]["id"] for one in found] == [hit.chunk.doc_id for hit in hits]
        assert np.allclose([one["score"] for one in found], [hit.score for hit in hits], atol=1e-5)
        assert plain == [found[0]["document"]]
        title, text = plain[0]["contents"].split("\n", 1)
        assert title == f'"{hits[0].chunk.title}"' and text == hits[0].chunk.text


def test_queries_that_are_none_have_no_hits_and_long_ones_lose_their_ends(client: TestClient) -> None:
    queries = ["", "the red house", " \n", "red " * 900]
    for body in ({"return_scores": True}, {}):
        result = client.post("/retrieve", json={"queries": queries, **body}).json()["result"]
        alone = client.post("/retrieve", json={"queries": queries[1:2], **body}).json()["result"][0]
        assert result[0] == result[2] == [] and len(result[1]) == len(result[3]) == 3
        ids = [[one.get("document", one)["id"] for one in passages] for passages in (result[1], alone)]
        assert ids[0] == ids[1]
        assert client.post("/retrieve", json={"queries": [], **body}).json() == {"result": []}
    answers = client.post("/queries", json={"queries": queries, "k": 2}).json()["answers"]
    assert [len(one) for one in answers] == [0, 2, 0, 2]


def test_r1_searcher_gets_ids_and_texts(client: TestClient) -> None:
    answer = client.post("/queries", json={"queries": ["the red house"], "k": 2}).json()
    assert answer["queries"] == ["the red house"] and len(answer["answers"][0]) == 2
    doc_id, text = answer["answers"][0][0].split("\t")
    assert doc_id.startswith("d0") and text


def test_documents_are_written_found_read_and_removed(client: TestClient, encoder: SearchR3) -> None:
    text = "Green tea is not oxidised. " * 30
    one = {"id": "notes/tea one.md", "text": text.strip(), "title": "tea", "metadata": {"year": 2020}}
    written = client.put("/v1/documents", json={"documents": [one, {"id": "b", "text": "a stone"}]}).json()
    assert written["documents"] == 2 and written["chunks"] == written["encoded"] > 2
    read = client.get("/v1/documents/notes/tea one.md").json()
    assert read["text"].split() == one["text"].split() and read["metadata"] == {"year": 2020}
    assert (
        read["page"] is None
        and read["source"] == "api"
        and read["title"] == "tea"
        and len(read["chunks"]) == written["chunks"] - 1
    )
    part = client.get("/v1/documents/notes/tea one.md%231").json()
    assert part["parent_id"] == "notes/tea one.md" and part["text"] in text
    found = client.post("/v1/search", json={"query": "tea", "filter": {"year": {"$gte": 2000}}}).json()["hits"]
    assert [hit["parent_id"] for hit in found] == ["notes/tea one.md"]
    again = client.put("/v1/documents", json={"documents": [one | {"metadata": {"year": 1990}}]}).json()
    assert again["encoded"] == 0 and again["usage"]["total_tokens"] == 0
    listed = client.get("/v1/documents", params={"limit": 2}).json()
    assert [entry["id"] for entry in listed["documents"]] == ["b", "d00"] and listed["total"] == 6
    rest = client.get("/v1/documents", params={"after": listed["next"]}).json()
    assert [entry["id"] for entry in rest["documents"]] == ["d01", "d02", "d03", "notes/tea one.md"]
    assert rest["next"] is None and rest["documents"][-1]["chunks"] == len(read["chunks"])
    assert client.delete("/v1/documents/notes/tea one.md").json() == {"deleted": 1}
    assert client.request("DELETE", "/v1/documents", json={"ids": ["b", "unknown"]}).json() == {"deleted": 1}
    for method in ("GET", "DELETE"):
        assert client.request(method, "/v1/documents/b").status_code == 404


@pytest.mark.parametrize(
    ("documents", "status", "words"),
    [
        ([], 400, "no document was given"),
        ([{"id": "a", "text": " "}], 400, "document 'a' has no text"),
        ([{"id": "a", "text": "x"}, {"id": "a", "text": "y"}], 400, "the id 'a' is there twice"),
        ([{"id": "", "text": "x"}], 422, "documents.0.id"),
        ([{"id": "a\nb", "text": "x"}], 422, "documents.0.id"),
        ([{"id": "a"}], 422, "documents.0.text"),
        ([{"id": "a", "text": "x", "meta": 1}], 422, "documents.0.meta"),
        ([{"id": str(i), "text": "x"} for i in range(21)], 413, "21 documents, and the limit is 20"),
    ],
)
def test_of_wrong_documents_none_is_written(
    documents: list[dict[str, Any]], status: int, words: str, client: TestClient, store: Store
) -> None:
    before = store.version
    answer = client.put("/v1/documents", json={"documents": documents})
    assert answer.status_code == status and words in answer.json()["error"]["message"]
    assert store.version == before


def test_a_document_of_an_indexed_folder_is_changed_there(
    encoder: SearchR3, engine: EngineThread, tmp_path: Path
) -> None:
    (tmp_path / "notes").mkdir()
    text = "\n\n".join(f"def house_{number}():\n    color = 'red'\n    return color, {number}\n" for number in range(9))
    (tmp_path / "notes" / "a.py").write_text(text)
    store = Store.create(tmp_path / "s", Fingerprint.of(encoder), chunk_tokens=60)
    index_documents(store, encoder, read_documents(tmp_path / "notes", chunking=Chunking(60)))
    client = TestClient(create_app(engine, store=store))
    answer = client.put("/v1/documents", json={"documents": [{"id": "a.py", "text": "another"}]})
    assert answer.status_code == 400
    assert f"'a.py' was indexed from {tmp_path}/notes; change it there" in answer.json()["error"]["message"]
    read = client.get("/v1/documents/a.py").json()
    assert len(read["chunks"]) > 2 and read["text"] == text.strip(), "lines as they are"


@pytest.mark.parametrize(
    ("method", "path", "body", "words"),
    [
        ("POST", "/v1/search", {"query": "a\ud800", "mode": "bm25"}, "the query holds half a surrogate pair"),
        ("POST", "/v1/search", {"query": "a", "filter": {"x": "\ud800"}}, "in a condition holds half a surrogate pair"),
        ("PUT", "/v1/documents", {"documents": [{"id": "a", "text": "x", "metadata": {"\ud800": 1}}]}, "its metadata"),
        ("DELETE", "/v1/documents", {"ids": ["\ud800"]}, "in a condition holds half a surrogate pair"),
    ],
)
def test_half_a_surrogate_pair_is_refused(
    method: str, path: str, body: dict[str, Any], words: str, client: TestClient, store: Store
) -> None:
    before = store.version
    answer = client.request(method, path, content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert answer.status_code == 400 and words in answer.json()["error"]["message"]
    assert store.version == before


def test_a_server_without_a_store_says_so(engine: EngineThread) -> None:
    client = TestClient(create_app(engine))
    answers = [
        client.post("/v1/search", json={"query": "a"}),
        client.post("/retrieve", json={"queries": ["a"]}),
        client.put("/v1/documents", json={"documents": [{"id": "a", "text": "b"}]}),
    ]
    assert {answer.status_code for answer in answers} == {404}
    assert all("serve a store" in answer.json()["error"]["message"] for answer in answers)


def test_documents_are_encoded_with_the_stores_instruction_and_read_back_once(
    encoder: SearchR3, engine: EngineThread, tmp_path: Path
) -> None:
    store = Store.create(tmp_path / "s", Fingerprint.of(encoder, "Only tea."), chunk_tokens=60, chunk_overlap=20)
    client = TestClient(create_app(engine, store=store))
    text = " ".join(f"The house {number} is red." for number in range(40))
    client.put("/v1/documents", json={"documents": [{"id": "a", "text": text}]})
    read = client.get("/v1/documents/a").json()
    assert read["text"].split() == text.split()
    assert any(one["end"] > other["start"] for one, other in zip(read["chunks"], read["chunks"][1:], strict=False))
    for chunk in store.get("a"):
        expected = encoder.encode_document([chunk.full_text], instruction="Only tea.")[0]
        assert np.allclose(store.vectors_of([chunk])[chunk.full_text], expected, atol=1e-5)
