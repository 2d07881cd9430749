"""Our clients and those of others at a real port; frameworks with our adapters, over a server and in the process."""

from __future__ import annotations

import asyncio
import importlib
import os
import re
import socket
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
import huggingface_hub
import numpy as np
import pytest
import uvicorn
from fastapi import FastAPI

from search_r3.client import AsyncClient, Client, SearchAnswer
from search_r3.data.documents import Chunk, chunks_of
from search_r3.errors import ConfigError, DataError, NotFoundError, TooLargeError, UnavailableError
from search_r3.integrations import InProcess
from search_r3.model.encoder import SearchR3
from search_r3.serving import Fingerprint, Store
from search_r3.serving.engine import EngineThread
from search_r3.serving.server import ServerSettings, create_app
from search_r3.serving.store import Hit
from tests.conftest import small_collection

os.environ["HAYSTACK_TELEMETRY_ENABLED"] = "False"
ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "integrations.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
BUDGET, WAIT = 8, 60
QUERY = "where is the red boat?"
FIELDS = ("parent_id", "title", "score", "reasoning")


class Served(NamedTuple):
    model: SearchR3
    store: Store
    url: str


@contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """An app at a real port."""
    server = uvicorn.Server(uvicorn.Config(app, log_config=None))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(WAIT)


@pytest.fixture(scope="module")
def served(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server of six documents, each with a year, at a real port."""
    model = SearchR3(tiny_path, device="cpu", max_new_tokens=BUDGET)
    store = Store.create(tmp_path_factory.mktemp("s") / "s", Fingerprint.of(model), model=str(tiny_path))
    documents = list(small_collection().documents.values())[:6]
    chunks: list[Chunk] = []
    for year, one in enumerate(documents, 2020):
        chunks += chunks_of(one.doc_id, one.text, one.title, metadata={"year": year})
    store.upsert(chunks, model.encode_document([chunk.full_text for chunk in chunks]))
    app = create_app(EngineThread(model, slots=4), ServerSettings("tiny", max_batch=5), store=store)
    with serving(app) as url:
        yield Served(model, store, url)


@pytest.fixture(params=["server", "process"])
def source(request: pytest.FixtureRequest, served: Served) -> Iterator[str | InProcess]:
    if request.param == "server":
        yield served.url
        return
    with InProcess(served.model, served.store) as own:
        yield own


def expected(served: Served, mode: str = "reason", **options: Any) -> tuple[list[Hit], str]:
    """Hits and reasoning, straight from the model and the store."""
    encoded = served.model.encode_query(QUERY, mode)  # type: ignore[arg-type]
    [hits] = served.store.search(encoded.vectors, **{"k": 10} | options)
    return hits, encoded.reasoning[0]


def check(found: list[tuple[str, str, dict[str, Any]]], hits: list[Hit], reasoning: str) -> None:
    """Ids, texts and metadata are those of the hits."""
    assert [(name, text) for name, text, _ in found] == [(hit.chunk.doc_id, hit.chunk.text) for hit in hits]
    for (_, _, facts), hit in zip(found, hits, strict=True):
        assert facts["parent_id"] == hit.chunk.parent_id and facts["title"] == hit.chunk.title
        assert facts["year"] == hit.chunk.metadata["year"] and facts["reasoning"] == reasoning
        assert facts["score"] == pytest.approx(hit.score, abs=1e-5)


def test_our_clients_do_all_that_a_server_does(served: Served, tmp_path: Path) -> None:
    store = Store.create(tmp_path / "s", Fingerprint.of(served.model))
    app = create_app(EngineThread(served.model), ServerSettings(token="secret", max_batch=3, max_body=400), store=store)
    texts = {f"a/{number} b.md": f"the {word} boat" for number, word in enumerate(("red", "blue", "new", "old"))}
    with serving(app) as url, Client(url, token="secret") as client:
        assert client.health() and client.info().max_client_batch_size == 3 and client.info().store
        documents = [{"id": name, "text": text, "metadata": {"n": text[4]}} for name, text in texts.items()]
        report = client.put_documents([*documents, {"id": "..", "text": "é" * 90}])
        assert (report.documents, report.encoded) == (5, 5) and report.usage.prompt_tokens > 0
        assert [one.id for one in client.list_documents()] == ["..", *texts]
        for name, text in {**texts, "..": "é" * 90}.items():
            assert client.get_document(name).text == text
        *pieces, answer = client.stream(QUERY, k=2, filter={"n": ["r", "b"]}, max_new_tokens=BUDGET)
        assert isinstance(answer, SearchAnswer) and "".join(map(str, pieces)) == answer.reasoning
        assert {hit.parent_id for hit in answer.hits} == {"a/0 b.md", "a/1 b.md"}
        whole = client.search(QUERY, k=2, filter={"n": ["r", "b"]}, max_new_tokens=BUDGET)
        assert answer.model_dump(exclude={"seconds"}) == whole.model_dump(exclude={"seconds"})
        assert whole.usage.completion_tokens == whole.reasoning_tokens > 0 and whole.seconds["total"] > 0
        cosines = served.model.similarity(
            served.model.encode_query(QUERY), served.model.encode_document(list(texts.values()))
        )[0]
        ranking = client.rerank(QUERY, list(texts.values()), top_n=3)
        assert [hit.index for hit in ranking.results] == np.argsort(-cosines)[:3].tolist()
        with pytest.raises(DataError, match=f"^{re.escape('document number 1')}"):
            client.encode_document(["a", ""])
        with pytest.raises(ConfigError, match="a token is needed"):
            Client(url, token="other").info()
        assert client.delete_documents([*texts, "unknown"]) == 4
        with pytest.raises(NotFoundError, match=r"no document 'a/0 b\.md'"):
            client.get_document("a/0 b.md")

        with pytest.raises(DataError, match=r"^the query is empty"):
            list(client.stream(" "))

        async def asked() -> tuple[Any, ...]:
            async with AsyncClient(url, token="secret") as other:
                with pytest.raises(DataError, match=r"^the query is empty"):
                    [one async for one in other.stream(" ")]
                both = await asyncio.gather(*(other.encode_query(text, "direct") for text in texts.values()))
                events = [one async for one in other.stream(QUERY, max_new_tokens=BUDGET)]
                return both, events, await other.health(), await other.list_documents()

        vectors, events, healthy, entries = asyncio.run(asked())
        direct = served.model.encode_query(list(texts.values()), "direct").vectors
        assert np.allclose(np.concatenate([one.vectors for one in vectors]), direct, atol=1e-5)
        assert events[-1].hits[0].id == "..#0" and healthy and [one.id for one in entries] == [".."]
    assert not Client(url).health()


def test_cohere_ranks(served: Served) -> None:
    cohere = pytest.importorskip("cohere")
    texts = ["a boat", "the red house", "a lamp"]
    cosines = served.model.similarity(served.model.encode_query(QUERY), served.model.encode_document(texts))[0]
    with cohere.ClientV2(api_key="none", base_url=served.url) as client:
        answer = client.rerank(model="search-r3", query=QUERY, documents=texts, top_n=2)
        with pytest.raises(cohere.NotFoundError, match="no model 'rerank-v3'"):
            client.rerank(model="rerank-v3", query=QUERY, documents=texts)
    assert [one.index for one in answer.results] == np.argsort(-cosines)[:2].tolist()
    assert answer.results[0].relevance_score == pytest.approx(cosines.max(), abs=1e-5)


def test_huggingface_hub_asks_as_it_asks_text_embeddings_inference(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # it is to ask this machine alone
    texts = ["a boat", "the red house"]
    for url in (served.url, f"{served.url}/embed"):
        client = huggingface_hub.InferenceClient(url)
        vectors = client.feature_extraction(texts, prompt_name="document", normalize=True, truncate=False)
        assert np.allclose(vectors, served.model.encode_document(texts), atol=1e-5)
        query = client.feature_extraction(QUERY, prompt_name="direct")
        assert np.allclose(query, served.model.encode_query(QUERY, "direct").vectors, atol=1e-5)
        with pytest.raises(huggingface_hub.errors.HfHubHTTPError) as caught:
            client.feature_extraction(["a"] * 6)
        assert caught.value.response.json()["error_type"] == "Validation"
    asked = [
        ("/embed", {"inputs": texts, "truncate": False}),  # as LlamaIndex asks
        ("/embed", {"inputs": texts[0], "truncate": True, "normalize": True, "prompt_name": None}),
        ("/rerank", {"query": QUERY, "texts": texts, "raw_scores": False, "return_text": True, "truncate": False}),
    ]
    embedded, alone, ranked = [httpx2.post(f"{served.url}{path}", json=body).json() for path, body in asked]
    assert np.allclose(embedded, served.model.encode_query(texts).vectors, atol=1e-5)
    assert np.allclose(alone, embedded[:1], atol=1e-5)
    assert {one["text"] for one in ranked} == set(texts) and ranked[0]["score"] >= ranked[1]["score"]


def test_langchain_retrieves(source: Any, served: Served) -> None:
    pytest.importorskip("langchain_core")
    from langchain_core.runnables import RunnableLambda

    from search_r3.integrations.langchain import SearchR3Retriever

    def rows(documents: list[Any]) -> list[tuple[str, str, dict[str, Any]]]:
        return [(one.id, one.page_content, one.metadata) for one in documents]

    retriever = SearchR3Retriever(source=source, k=3)
    check(rows(retriever.invoke(QUERY)), *expected(served, k=3))
    check(rows(asyncio.run(retriever.ainvoke(QUERY))), *expected(served, k=3))
    direct = SearchR3Retriever(source=source, mode="direct", filter={"year": {"$gte": 2024}}, hybrid=True)
    chain = direct | RunnableLambda(rows)
    hits, reasoning = expected(served, "direct", where={"year": {"$gte": 2024}}, texts=[QUERY])
    [found, again] = chain.batch([QUERY, QUERY])
    check(found, hits, reasoning)
    assert again == found and len(found) == 2
    with pytest.raises((ConfigError, DataError), match="cross-encoder"):
        SearchR3Retriever(source=source, rerank=True).invoke(QUERY)


def test_langchain_vector_stores_are_filled_and_asked(source: Any, served: Served) -> None:
    pytest.importorskip("langchain_core")
    from langchain_core.vectorstores import InMemoryVectorStore

    from search_r3.integrations.langchain import SearchR3Embeddings

    embeddings = SearchR3Embeddings(source, mode="direct")
    store = InMemoryVectorStore.from_texts(texts := [f"a {word}" for word in ("red boat", "lamp", "stone")], embeddings)
    similarity = served.model.similarity(
        served.model.encode_query(QUERY, "direct"), served.model.encode_document(texts)
    )[0]
    [(best, score)] = store.similarity_search_with_score(QUERY, k=1)
    assert best.page_content == texts[int(np.argmax(similarity))] and score == pytest.approx(similarity.max(), abs=1e-5)
    assert embeddings.embed_documents([]) == []
    assert np.allclose(asyncio.run(embeddings.aembed_documents(texts)), served.model.encode_document(texts), atol=1e-5)
    reasoned = SearchR3Embeddings(source, instruction="Only boats.")
    vector = served.model.encode_query(QUERY, instruction="Only boats.").vectors[0]
    assert np.allclose(asyncio.run(reasoned.aembed_query(QUERY)), vector, atol=1e-5)
    many = [f"text {number}" for number in range(12)]  # more than the server takes at once
    assert np.allclose(embeddings.embed_documents(many), served.model.encode_document(many), atol=1e-5)


def test_llama_index_retrieves(source: Any, served: Served) -> None:
    pytest.importorskip("llama_index.core")
    from llama_index.core.schema import MetadataMode

    from search_r3.integrations.llama_index import SearchR3Retriever

    retriever = SearchR3Retriever(source, k=3, filter={"year": [2020, 2021]})
    hits, reasoning = expected(served, k=3, where={"year": [2020, 2021]})
    for nodes in (retriever.retrieve(QUERY), asyncio.run(retriever.aretrieve(QUERY))):
        check([(one.node.node_id, one.node.get_content(), one.node.metadata) for one in nodes], hits, reasoning)
        assert [one.score for one in nodes] == pytest.approx([hit.score for hit in hits], abs=1e-5)
        shown = nodes[0].node.get_content(MetadataMode.LLM)
        assert f"title: {hits[0].chunk.title}" in shown and "year: 202" in shown
        assert "score" not in shown and "reasoning" not in shown


def test_llama_index_embeds_for_its_own_index(source: Any, served: Served) -> None:
    pytest.importorskip("llama_index.core")
    from llama_index.core import Document, VectorStoreIndex

    from search_r3.integrations.llama_index import SearchR3Embedding

    embedding = SearchR3Embedding(source, mode="direct")
    texts = [f"a {word}" for word in ("red boat", "lamp", "stone")]
    index = VectorStoreIndex.from_documents([Document(text=text) for text in texts], embed_model=embedding)
    [node] = index.as_retriever(similarity_top_k=1, embed_model=embedding).retrieve(QUERY)
    scores = served.model.similarity(served.model.encode_query(QUERY, "direct"), served.model.encode_document(texts))[0]
    assert node.node.get_content() == texts[int(np.argmax(scores))] and node.score == pytest.approx(
        scores.max(), abs=1e-5
    )
    reasoned = SearchR3Embedding(source, instruction="Only boats.")
    vector = served.model.encode_query(QUERY, instruction="Only boats.").vectors[0]
    assert np.allclose(asyncio.run(reasoned.aget_query_embedding(QUERY)), vector, atol=1e-5)
    assert np.allclose(
        asyncio.run(reasoned.aget_text_embedding_batch(texts)), served.model.encode_document(texts), atol=1e-5
    )
    assert np.allclose(asyncio.run(reasoned.aget_text_embedding("a")), served.model.encode_document("a")[0], atol=1e-5)


def test_haystack_runs_a_pipeline_and_saves_it(served: Served, tmp_path: Path) -> None:
    pytest.importorskip("haystack")
    from haystack import Document, Pipeline
    from haystack.components.retrievers.in_memory import InMemoryEmbeddingRetriever
    from haystack.document_stores.in_memory import InMemoryDocumentStore

    from search_r3.integrations.haystack import SearchR3DocumentEmbedder, SearchR3Retriever, SearchR3TextEmbedder

    own = InProcess(served.model, served.store)
    for source in (served.url, own):
        documents = [Document(content=f"a {word}", meta={"title": word}) for word in ("red boat", "lamp")]
        made = SearchR3DocumentEmbedder(source, meta_fields_to_embed=["title", "none"]).run(documents)
        vectors = served.model.encode_document([f"{one.meta['title']} {one.content}" for one in documents])
        assert np.allclose([one.embedding for one in made["documents"]], vectors, atol=1e-5)
        assert documents[0].embedding is None and made["meta"]["usage"]["prompt_tokens"] > 0
        assert SearchR3DocumentEmbedder(source).run([])["documents"] == []
        memory = InMemoryDocumentStore(embedding_similarity_function="dot_product")
        memory.write_documents(made["documents"])
        pipeline = Pipeline()
        pipeline.add_component("embedder", SearchR3TextEmbedder(source, mode="direct"))
        pipeline.add_component("retriever", InMemoryEmbeddingRetriever(memory, top_k=1))
        pipeline.connect("embedder.embedding", "retriever.query_embedding")
        [best] = pipeline.run({"embedder": {"text": QUERY}})["retriever"]["documents"]
        scores = vectors @ served.model.encode_query(QUERY, "direct").vectors[0]
        assert best.content == documents[int(np.argmax(scores))].content
        retriever = SearchR3Retriever(source, filters={"field": "meta.year", "operator": ">=", "value": 2022}, top_k=5)
        hits, reasoning = expected(served, k=5, where={"year": {"$gte": 2022}})
        answer = retriever.run(QUERY)
        check([(one.id, one.content, one.meta) for one in answer["documents"]], hits, reasoning)
        assert answer["reasoning"] == reasoning and answer["meta"]["usage"]["completion_tokens"] > 0
        several = {"field": "year", "operator": "in", "value": [2021, 2023]}
        both = {"operator": "AND", "conditions": [several, {"field": "meta.year", "operator": "<", "value": 2023}]}
        [one] = retriever.run(QUERY, filters=both, top_k=2)["documents"]
        assert one.meta["year"] == 2021 and one.score == one.meta["score"]
        with pytest.raises(DataError, match="with AND"):
            retriever.run(QUERY, filters={"operator": "OR", "conditions": [several]})
    with pytest.raises(ConfigError, match="an InProcess cannot be saved"):
        retriever.to_dict()
    own.close()
    pipeline = Pipeline()
    pipeline.add_component("retriever", SearchR3Retriever(served.url, top_k=2, hybrid=True, mode="direct"))
    pipeline.add_component("query", SearchR3TextEmbedder(served.url, instruction="Only boats."))
    pipeline.add_component("documents", SearchR3DocumentEmbedder(served.url, ["title"]))
    (tmp_path / "p.yaml").write_text(saved := pipeline.dumps())
    loaded = Pipeline.loads(saved, allowed_modules=["search_r3.integrations.haystack"])
    assert loaded.dumps() == saved
    hits, reasoning = expected(served, "direct", k=2, texts=[QUERY])
    found = loaded.run({"retriever": {"query": QUERY}, "query": {"text": QUERY}, "documents": {"documents": documents}})
    check([(one.id, one.content, one.meta) for one in found["retriever"]["documents"]], hits, reasoning)


def add_to_llm(served: Served, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the entry point names becomes a plugin, as it is where the package was installed with it."""
    from llm.plugins import load_plugins, pm

    monkeypatch.setenv("LLM_USER_PATH", str(folder))
    monkeypatch.setenv("SEARCH_R3_SOURCE", served.url)
    load_plugins()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    plugin = importlib.import_module(project["entry-points"]["llm"]["search_r3"])
    if not pm.is_registered(plugin):
        pm.register(plugin)


def test_llm_has_a_model_for_queries_and_one_for_documents(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = pytest.importorskip("llm")
    add_to_llm(served, tmp_path, monkeypatch)
    texts = [f"text {number}" for number in range(7)]
    query, document = llm.get_embedding_model("search-r3-query"), llm.get_embedding_model("search-r3-document")
    assert np.allclose(query.embed(QUERY), served.model.encode_query(QUERY).vectors[0], atol=1e-5)
    assert np.allclose(list(document.embed_multi(texts)), served.model.encode_document(texts), atol=1e-5)
    database = importlib.import_module("sqlite_utils").Database(memory=True)
    collection = llm.Collection("notes", database, model=document)
    collection.embed_multi((str(number), text) for number, text in enumerate(texts))
    [best] = collection.similar_by_vector(query.embed(QUERY), number=1)
    with pytest.raises(importlib.import_module("click").ClickException, match="is longer than"):  # shown as one line
        document.embed("red " * 9000)
    scores = served.model.similarity(served.model.encode_query(QUERY), served.model.encode_document(texts))[0]
    assert int(best.id) == int(np.argmax(scores)) and best.score == pytest.approx(scores.max(), abs=1e-5)


def test_a_store_or_a_model_is_opened_by_its_path(served: Served, tiny_path: Path) -> None:
    client, here = Client(served.url), InProcess.open(served.store.address)
    there = client.search(QUERY, k=3, max_new_tokens=BUDGET, instruction="Only boats.")
    own = here.search(QUERY, k=3, max_new_tokens=BUDGET, instruction="Only boats.")
    assert own.model_dump(exclude={"seconds", "hits"}) == there.model_dump(exclude={"seconds", "hits"})
    assert [hit.id for hit in own.hits] == [hit.id for hit in there.hits] and own.usage.completion_tokens > 0
    words = [one.search("boat", mode="bm25") for one in (client, here)]
    assert [hit.parent_id for hit in words[0].hits] == [hit.parent_id for hit in words[1].hits] == ["d01"]
    model = InProcess.open(tiny_path)
    assert np.allclose(model.encode_document("a").vectors, served.model.encode_document("a"), atol=1e-5)
    settings = served.model.backbone.settings.model_copy(update={"mode": "direct"})
    with InProcess(SearchR3(replace(served.model.backbone, settings=settings)), served.store) as source:
        assert source.encode_query(QUERY).usage.completion_tokens == source.search(QUERY).usage.completion_tokens == 0
        assert source.search(QUERY, mode="reason").usage.completion_tokens > 0
    expected = served.model.encode_document("a", instruction="Only tea.")
    with InProcess(served.model, Store.create("memory://tea", Fingerprint.of(served.model, "Only tea."))) as source:
        assert np.allclose(source.encode_document("a").vectors, expected, atol=1e-5)
    for one in (client, here):
        with pytest.raises(DataError, match="the query is empty"):
            one.search(" ", mode="bm25")
        with pytest.raises(TooLargeError, match="text number 0 is longer than"):
            one.encode_document("red " * 9000)
    with pytest.raises(NotFoundError, match="no store"):
        model.search(QUERY)
    here.close()
    model.close()
    with pytest.raises(UnavailableError):
        here.search(QUERY)


@pytest.mark.parametrize("code", BLOCKS, ids=lambda code: re.findall(r"(?:from|import) ([\w.]+)", code)[0])
def test_the_python_of_the_page_runs(
    code: str, served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in re.findall(r"^(?:from|import) (llama_index\.core|haystack|cohere|llm)\b", code, re.MULTILINE):
        pytest.importorskip(package)
    if "integrations.langchain" in code:
        pytest.importorskip("langchain_core")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # it is to ask this machine alone
    if "import llm" in code:
        add_to_llm(served, tmp_path, monkeypatch)
    exec(code.replace("http://127.0.0.1:8765", served.url), {"__name__": "__main__"})
    assert capsys.readouterr().out or "import llm" in code
    served.store.delete(["tea.md"])
