"""The array that encoding returns, and the arguments that people bring from sentence-transformers."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from search_r3 import QueryEmbeddings, SearchR3
from search_r3.errors import ConfigError, DataError, ModelError
from search_r3.model.engine import forward

TEXTS = ["where is the red house?", "river", "a black horse and a white chair on a green boat"]


def made() -> QueryEmbeddings:
    vectors = np.arange(6, dtype=np.float32).reshape(3, 2)
    return QueryEmbeddings(vectors, ["a", "b", "c"], [0, 1, 2], [False, True, False], [True, False, True])


def test_they_are_an_array() -> None:
    queries = made()
    assert isinstance(queries, np.ndarray)
    assert (queries.shape, len(queries), queries.ndim, queries.dtype) == ((3, 2), 3, 2, np.float32)
    assert queries.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert [row.tolist() for row in queries] == queries.tolist()
    plain = np.asarray(queries)
    assert type(plain) is type(queries.vectors) is np.ndarray and np.shares_memory(plain, queries)
    documents = np.ones((4, 2), dtype=np.float32)
    for product in (queries @ documents.T, (documents @ queries.T).T, np.dot(queries, documents.T)):
        np.testing.assert_array_equal(product, plain @ documents.T)
    assert type(queries @ documents.T) is type(queries * 2) is type(queries == queries) is np.ndarray
    assert isinstance(queries.sum(), np.float32) and type(queries.mean(axis=0)) is np.ndarray
    file = io.BytesIO()
    np.save(file, queries)
    file.seek(0)
    np.testing.assert_array_equal(np.load(file), plain)
    for tensor in (torch.as_tensor(queries), torch.from_numpy(queries), torch.tensor(queries)):
        assert tensor.tolist() == plain.tolist()


def test_rows_keep_their_facts() -> None:
    queries = made()
    for index, rows in [
        (slice(1, None), [1, 2]),
        (slice(None, None, -1), [2, 1, 0]),
        ([2, 0], [2, 0]),
        (np.array([True, False, True]), [0, 2]),
        (slice(3, 3), []),
    ]:
        part = queries[index]
        assert type(part) is QueryEmbeddings
        np.testing.assert_array_equal(part.vectors, queries.vectors[index])
        assert part.reasoning == ["abc"[row] for row in rows]
        assert part.reasoning_tokens == rows
        assert part.forced == [row == 1 for row in rows]
        assert part.truncated == [row != 1 for row in rows]
    for index in (1, -1, np.int64(0), (0, 1), (slice(None), 1), (slice(None), slice(0, 1)), np.ones((3, 2), bool)):
        assert not isinstance(queries[index], QueryEmbeddings)
        np.testing.assert_array_equal(queries[index], queries.vectors[index])
    for again in (pickle.loads(pickle.dumps(queries)), copy.deepcopy(queries)):
        assert again.reasoning == queries.reasoning and not np.shares_memory(again, queries)
        np.testing.assert_array_equal(again, queries)
    with pytest.raises(AttributeError, match="reasoning is with what encode_query returned"):
        _ = queries.T.reasoning
    assert type(pickle.loads(pickle.dumps(queries.T))) is np.ndarray
    with pytest.raises(ValueError, match="2 values of forced for 3 vectors"):
        QueryEmbeddings(np.eye(3), ["a"] * 3, [0] * 3, [False] * 2, [False] * 3)


def test_what_encoding_returns_is_one(model: SearchR3) -> None:
    queries, documents = model.encode_query(TEXTS, max_new_tokens=4), model.encode_document(TEXTS)
    np.testing.assert_allclose(queries @ documents.T, model.similarity(queries, documents))
    assert queries[1:].reasoning == queries.reasoning[1:]


def test_tensors_and_lists_of_tensors_are_given_where_asked_for(model: SearchR3) -> None:
    queries, documents = model.encode_query(TEXTS, "direct"), model.encode_document(TEXTS)
    for given, expected in [
        (model.encode_query(TEXTS, "direct", convert_to_tensor=True), queries),
        (model.encode_document(TEXTS, convert_to_tensor=True), documents),
    ]:
        assert isinstance(given, torch.Tensor) and given.device == model.device
        np.testing.assert_array_equal(given, expected)
    several = model.encode_document(TEXTS, convert_to_numpy=False)
    assert isinstance(several, list) and all(isinstance(one, torch.Tensor) for one in several)
    tensors = torch.as_tensor(queries), torch.from_numpy(documents)
    np.testing.assert_array_equal(model.similarity(*tensors), model.similarity(queries, documents))


def test_encode_is_that_of_the_export(model: SearchR3, caplog: pytest.LogCaptureFixture) -> None:
    np.testing.assert_array_equal(model.encode(TEXTS, "query"), model.encode_query(TEXTS, "direct"))
    np.testing.assert_array_equal(model.encode(TEXTS, prompt_name="document"), model.encode_document(TEXTS))
    reasoned = model.encode(TEXTS, "query", mode="reason", max_new_tokens=4)
    np.testing.assert_array_equal(reasoned, model.encode_query(TEXTS, max_new_tokens=4))
    one = model.encode("river", prompt_name="document", batch_size=1, convert_to_tensor=True)
    assert one.shape == (32,)
    assert not caplog.records
    for _ in range(2):
        np.testing.assert_array_equal(model.encode(TEXTS), model.encode_query(TEXTS, "direct"))
    assert [record.message for record in caplog.records] == [
        "encode takes texts for queries; of documents say prompt_name='document'"
    ]
    with pytest.raises(ConfigError, match="prompt_name='passage': expected 'query' or 'document'"):
        model.encode(TEXTS, "passage")


def test_dimensions_may_be_chosen_per_call(model: SearchR3) -> None:
    for encode in (model.encode_query, model.encode_document):
        short, whole = encode(TEXTS, truncate_dim=8), np.asarray(encode(TEXTS))[:, :8]
        np.testing.assert_allclose(short, whole / np.linalg.norm(whole, axis=1, keepdims=True), atol=1e-6)
        with pytest.raises(ModelError, match=r"truncate_dim=33, but the vectors of .* have 32 dimensions"):
            encode(TEXTS, truncate_dim=33)


def test_a_batch_has_no_more_texts_than_asked_for(model: SearchR3, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    plain = forward.prefill
    monkeypatch.setattr(
        "search_r3.model.engine.slots.prefill",
        lambda model, sequences, *args, **options: (
            sizes.append(len(sequences)),
            plain(model, sequences, *args, **options),
        )[1],
    )
    vectors = model.encode_document(TEXTS * 3, batch_size=4)
    assert sorted(sizes) == [1, 4, 4]
    np.testing.assert_allclose(vectors[:3], model.encode_document(TEXTS), atol=1e-5)
    with pytest.raises(ConfigError, match=r"batch_size=0.*expected at least 1"):
        model.encode_document(TEXTS, batch_size=0)


@pytest.mark.parametrize("wanted", [True, False, None])
def test_progress_is_shown_where_it_is_wanted(model: SearchR3, capsys: Any, wanted: bool | None) -> None:
    told: list[int] = []
    for encode in (model.encode_query, model.encode_document):
        encode(TEXTS, show_progress_bar=wanted, progress=lambda texts, tokens: told.append(texts))
    assert sum(told) == 6
    shown = capsys.readouterr()
    assert shown.out == ""
    assert ("queries: 100%" in shown.err and "documents: 100%" in shown.err) if wanted else shown.err == ""


@pytest.mark.parametrize(
    ("habits", "message"),
    [
        ({"precision": "int8"}, "precision='int8': vectors are float32; quantize what is returned"),
        ({"output_value": "token_embeddings"}, "output_value='token_embeddings': a text has one vector"),
        ({"prompt": "query: "}, "give what is asked of them as instruction="),
        ({"prompt_name": "passage"}, "takes the prompt of a (query|document), not 'passage'"),
        ({"device": ["cpu", "cuda:99"]}, "device 'cuda:99' cannot be used here"),
        ({"device": "gpu"}, "device 'gpu' cannot be used here"),
        ({"pool": {"processes": []}}, r"device=\['cuda:0', 'cuda:1'\] computes on several"),
    ],
)
def test_what_cannot_be_had_says_what_can(model: SearchR3, habits: dict[str, Any], message: str) -> None:
    for encode in (model.encode_query, model.encode_document):
        with pytest.raises(ConfigError, match=message):
            encode(TEXTS, **habits)


def test_several_devices_share_the_texts(model: SearchR3, monkeypatch: pytest.MonkeyPatch) -> None:
    threads, models = set(), set()
    gate: list[threading.Barrier] = []
    plain = forward.prefill

    def watched(causal_lm: Any, *args: Any, **options: Any) -> Any:
        if gate and threading.get_ident() not in threads:
            threads.add(threading.get_ident())
            models.add(causal_lm)
            gate[0].wait(60)  # until all are at work
        return plain(causal_lm, *args, **options)

    monkeypatch.setattr("search_r3.model.engine.slots.prefill", watched)
    devices = ["cpu", "cpu:0", "cpu"]  # the second is a device of another name: a copy
    texts = [f"{text} {number}" for number in range(3) for text in TEXTS]
    told: list[int] = []
    options = {"device": devices, "progress": lambda count, tokens: told.append(count)}
    for encode in (model.encode_document, model.encode_query, lambda *a, **o: model.encode_query(*a, "direct", **o)):
        threads.clear(), models.clear()
        gate.append(threading.Barrier(3))
        given = encode(texts, **options)
        gate.clear()
        assert len(threads) == 3 and len(models) == 2
        expected = encode(texts)
        np.testing.assert_allclose(given, expected, atol=1e-5)
        assert getattr(given, "reasoning", None) == getattr(expected, "reasoning", None)
    assert sum(told) == 27
    sampled = [
        model.encode_query(texts, sampling_temperature=1.0, seed=7, device=one).reasoning for one in (devices, "cpu")
    ]
    assert sampled[0] == sampled[1]
    with pytest.raises(DataError, match="document number 4 is ' '"):
        model.encode_document([*texts[:4], " "], device=["cpu"] * 2)
    assert model.encode_document(texts[:1], device=["cpu"] * 3).shape == (1, 32)


def test_what_means_nothing_here_changes_nothing(model: SearchR3) -> None:
    habits = {"normalize_embeddings": False, "precision": "float32", "convert_to_numpy": True, "chunk_size": 5}
    for encode, kind in ((model.encode_query, "query"), (model.encode_document, "document")):
        for device in (None, "cpu", ["cpu"], torch.device("cpu")):
            given = encode(TEXTS, prompt_name=kind, device=device, pool=None, **habits)
            np.testing.assert_array_equal(given, encode(TEXTS))


def test_other_names_are_answered_with_ours(model: SearchR3, tiny_path: Path) -> None:
    with pytest.raises(TypeError, match=r"encode_query\(\) takes no 'max_new_token'; did you mean 'max_new_tokens'\?"):
        model.encode_query(TEXTS, max_new_token=3)
    with pytest.raises(AttributeError, match=r"no 'get_sentence_embedding_dimension'; it is \.dimension"):
        model.get_sentence_embedding_dimension()
    with pytest.raises(AttributeError, match=r"SearchR3 has no 'nonsense'$"):
        _ = model.nonsense
    with pytest.raises(ConfigError, match="no code that a model brings is run; leave trust_remote_code out"):
        SearchR3(tiny_path, trust_remote_code=True)
    with pytest.raises(ConfigError, match="is no prompt set; expected search-r3, published"):
        SearchR3(tiny_path, prompts={"query": "query: "})


def test_a_closed_model_is_gone(tiny_path: Path) -> None:
    with SearchR3(tiny_path, device="cpu") as model:
        weights = [model.backbone.model.get_input_embeddings().weight]
        assert model.encode_document(TEXTS).shape == (3, 32)
    left = weakref.ref(weights.pop())
    gc.collect()
    assert left() is None
    for use in (lambda: model.encode_query(TEXTS), lambda: model.encode_document(TEXTS), lambda: model.dimension):
        with pytest.raises(ModelError, match="this model was closed; load it again"):
            use()
    model.close()


def test_two_threads_get_what_one_alone_gets(model: SearchR3, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = 0

    class Watched:
        """The tokenizer, which two threads may not be in at once: its settings are those of the last call."""

        def __init__(self, plain: Any) -> None:
            self._plain = plain

        def __getattr__(self, name: str) -> Any:
            return getattr(self._plain, name)

        def _alone(self, call: Any, *args: Any, **options: Any) -> Any:
            nonlocal inside
            inside += 1
            assert inside == 1, "two threads are in the tokenizer"
            time.sleep(0.005)
            try:
                return call(*args, **options)
            finally:
                inside -= 1

        def __call__(self, *args: Any, **options: Any) -> Any:
            return self._alone(self._plain, *args, **options)

        def decode(self, *args: Any, **options: Any) -> Any:
            return self._alone(self._plain.decode, *args, **options)

    sets = [[f"{text} {number}" for text in TEXTS] for number in range(2)]
    alone = [(model.encode_query(texts, max_new_tokens=6), model.encode_document(texts)) for texts in sets]
    encoder = model.backbone.prompt_encoder
    monkeypatch.setattr(encoder, "tokenizer", Watched(encoder.tokenizer))
    start, results = threading.Barrier(2), [[], []]

    def work(number: int) -> None:
        start.wait()
        for _ in range(4):
            queries = model.encode_query(sets[number], max_new_tokens=6)
            results[number].append((queries, model.encode_document(sets[number])))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(2):
        assert len(results[number]) == 4, "a thread failed"
        for queries, documents in results[number]:
            assert queries.reasoning == alone[number][0].reasoning
            np.testing.assert_allclose(queries, alone[number][0], atol=1e-6)
            np.testing.assert_allclose(documents, alone[number][1], atol=1e-6)
