"""The engine on llama.cpp, against ours: the same prompts, replies and vectors from the same weights.

Each test runs with what stands for llama.cpp's functions, and with llama.cpp itself where `-m real` says so: it takes
minutes to install (extra `llamacpp`).
"""

from __future__ import annotations

import gc
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import call, save_tiny, small_collection
from fake_llama import FakeLlama
from test_gguf import two_sides

from search_r3 import SearchR3
from search_r3.errors import ConfigError, ModelError
from search_r3.model.llamacpp import runtime
from search_r3.model.llamacpp.writing import export_gguf
from search_r3.model.loading import load_backbone
from search_r3.retrieval.encoding.fingerprint import Fingerprint

TEXTS = [document.full_text for document in small_collection().documents.values()][:11]
BACKEND = {"backend": "llama.cpp", "model_kwargs": {"n_threads": 1}}


def exported(
    folder: Path, tokenizer: Any, kind: str = "qwen2", type_: Any = "f32", **options: Any
) -> tuple[SearchR3, Path]:
    """A model, and its file."""
    model = SearchR3(save_tiny(folder / "model", tokenizer, kind, **options), device="cpu", max_new_tokens=12)
    [path] = export_gguf(model.backbone, folder / "model.gguf", type_)
    return model, path


@pytest.fixture(autouse=True, params=["fake", pytest.param("real", marks=pytest.mark.real)])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What computes."""
    if request.param == "real":
        return pytest.importorskip("llama_cpp")
    fake = FakeLlama()
    monkeypatch.setattr(runtime, "_library", lambda: fake)
    return fake


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> tuple[SearchR3, Path]:
    return exported(tmp_path_factory.mktemp("pair"), tokenizer, tied=False, spare_rows=16)


@pytest.fixture(scope="module")
def ours(pair: tuple[SearchR3, Path]) -> SearchR3:
    return pair[0]


@pytest.fixture
def theirs(pair: tuple[SearchR3, Path]) -> SearchR3:
    return SearchR3(pair[1], **BACKEND)


def cosines(one: Any, other: Any) -> Any:
    return (np.asarray(one) * np.asarray(other)).sum(1)


@pytest.mark.parametrize(("kind", "tied"), [("qwen2", True), ("qwen2", False), ("llama", True), ("qwen3", False)])
def test_vectors_and_replies_are_ours(tmp_path: Path, tokenizer: Any, kind: str, tied: bool) -> None:
    ours, path = exported(tmp_path, tokenizer, kind, tied=tied)
    theirs = SearchR3(path, **BACKEND)
    assert theirs.backbone.settings == ours.backbone.settings and theirs.dimension == ours.dimension
    assert cosines(ours.encode_document(TEXTS), theirs.encode_document(TEXTS)).min() > 0.9999
    assert cosines(ours.encode_query(TEXTS, "direct"), theirs.encode_query(TEXTS, "direct")).min() > 0.9999
    own, result = ours.encode_query(TEXTS, "reason"), theirs.encode_query(TEXTS, "reason")
    assert result.reasoning == own.reasoning and result.reasoning_tokens == own.reasoning_tokens
    assert result.forced == own.forced and cosines(own, result).min() > 0.9999


@pytest.mark.parametrize(("type_", "least"), [("f16", 0.999), ("q8_0", 0.99)])
def test_smaller_types_stay_close(tmp_path: Path, tokenizer: Any, type_: str, least: float) -> None:
    ours, path = exported(tmp_path, tokenizer, type_=type_)
    theirs = SearchR3(path, **BACKEND)
    assert theirs.backbone.dtype.endswith("-llama.cpp")
    assert cosines(ours.encode_document(TEXTS), theirs.encode_document(TEXTS)).min() >= least


def test_company_changes_nothing_and_more_queries_than_rows_are_done_in_turns(theirs: SearchR3) -> None:
    together = theirs.encode_query(TEXTS, "reason")
    alone = [theirs.encode_query(text, "reason") for text in TEXTS]
    assert [one.reasoning[0] for one in alone] == together.reasoning
    assert cosines(np.concatenate(alone), together).min() > 0.9999
    reverse = theirs.encode_document(TEXTS[::-1])[::-1]
    assert cosines(reverse, theirs.encode_document(TEXTS)).min() > 0.9999
    many = TEXTS * 4
    assert theirs.encode_query(many, "reason", max_new_tokens=3).reasoning[: len(TEXTS)] == [
        theirs.encode_query(text, "reason", max_new_tokens=3).reasoning[0] for text in TEXTS
    ]
    np.testing.assert_allclose(theirs.encode_document(many)[:3], theirs.encode_document(many)[11:14], atol=1e-3)


def test_a_reply_can_be_read_while_it_is_written_and_others_are_encoded(theirs: SearchR3) -> None:
    expected = theirs.encode_query(TEXTS, "reason")
    place = int(np.argmax([len(text) for text in expected.reasoning]))
    pieces = theirs.stream_query(TEXTS[place], "reason")
    first = next(pieces)
    others = theirs.encode_query(TEXTS, "reason")
    theirs.encode_document(TEXTS)
    *rest, result = pieces
    assert others.reasoning == expected.reasoning and len(rest) > 1
    assert first + "".join(rest) == expected.reasoning[place] == result.reasoning[0]
    assert cosines(result, expected[place : place + 1]).min() > 0.9999


def test_budgets_seeds_and_the_forced_token_are_as_everywhere(ours: SearchR3, theirs: SearchR3) -> None:
    for budget in (1, 3):
        own = ours.encode_query(TEXTS, "reason", max_new_tokens=budget)
        result = theirs.encode_query(TEXTS, "reason", max_new_tokens=budget)
        assert result.forced == own.forced and max(result.reasoning_tokens) < budget
        assert result.reasoning == own.reasoning and cosines(own, result).min() > 0.9999
    drawn = theirs.encode_query(TEXTS, "reason", sampling_temperature=1.0, seed=3)
    assert drawn.reasoning == theirs.encode_query(TEXTS, "reason", sampling_temperature=1.0, seed=3).reasoning
    assert drawn.reasoning != theirs.encode_query(TEXTS, "reason", sampling_temperature=1.0, seed=4).reasoning
    [rollout] = theirs.rollouts([theirs.backbone.prompt_encoder.encode(TEXTS[0], "reason").ids])
    [own] = ours.rollouts([ours.backbone.prompt_encoder.encode(TEXTS[0], "reason").ids])
    np.testing.assert_allclose(rollout.logprobs, own.logprobs, atol=1e-2)


def test_a_full_cache_is_one_error_and_is_emptied(pair: tuple[SearchR3, Path]) -> None:
    loaded = SearchR3(pair[1], backend="llama.cpp", model_kwargs={"n_parallel": 1, "n_threads": 1})
    expected = loaded.encode_query(TEXTS, "reason")
    long, streams = " ".join(TEXTS) * 3, []
    with pytest.raises(ModelError, match=r"cache for .* is full of what other calls have in work; .*'n_parallel'"):
        for _ in range(20):
            streams.append(loaded.stream_query(long, "reason"))
            next(streams[-1])
    streams.clear()
    assert cosines(loaded.encode_query(TEXTS, "reason"), expected).min() > 0.9999


def test_a_store_of_one_can_be_asked_by_the_other(ours: SearchR3, theirs: SearchR3) -> None:
    made, asking = Fingerprint.of(ours), Fingerprint.of(theirs)
    assert made.difference(asking) is None and asking.backend == f"{theirs.backbone.dtype} on cpu, llama.cpp"
    assert asking.weights == theirs.backbone.revision


def test_the_beginning_of_a_prompt_is_computed_once(theirs: SearchR3, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    decode = theirs.backbone.cache._decode

    def counted(tokens: Any, *more: Any) -> Any:
        counts.append(len(tokens))
        return decode(tokens, *more)

    monkeypatch.setattr(theirs.backbone.cache, "_decode", counted)
    encoder = theirs.backbone.prompt_encoder
    before, prompt = len(encoder.frame("direct")[0]), len(encoder.encode(TEXTS[0], "direct").ids)
    theirs.encode_query(TEXTS[0], "direct")
    assert sum(counts) == prompt
    counts.clear()
    theirs.encode_query(TEXTS[0], "direct")
    assert sum(counts) == prompt - before > 0


def test_long_texts_are_cut_where_ours_are(ours: SearchR3, theirs: SearchR3) -> None:
    texts = [" ".join(TEXTS) * 3, TEXTS[0]]
    own, result = ours.encode_query(texts, "reason"), theirs.encode_query(texts, "reason")
    assert own.truncated == result.truncated == [True, False]
    assert cosines(own, result).min() > 0.9999
    assert cosines(ours.encode_document(texts), theirs.encode_document(texts)).min() > 0.9999


def test_threads_may_share_it(theirs: SearchR3) -> None:
    expected = theirs.encode_query(TEXTS, "reason")
    results: list[Any] = []

    def work() -> None:
        results.append(theirs.encode_query(TEXTS, "reason"))
        results.append(theirs.encode_document(TEXTS))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 6
    assert all(cosines(one, expected).min() > 0.9999 for one in results if hasattr(one, "reasoning"))


def test_what_is_given_up_leaves_its_place(theirs: SearchR3) -> None:
    expected = theirs.encode_query(TEXTS, "reason")
    for _ in range(40):
        next(theirs.stream_query(TEXTS[0], "reason"))
    assert cosines(theirs.encode_query(TEXTS, "reason"), expected).min() > 0.9999


def test_frozen_documents_have_weights_of_their_own(tmp_path: Path, tokenizer: Any) -> None:
    backbone = two_sides(save_tiny(tmp_path / "model", tokenizer))
    files = export_gguf(backbone, tmp_path / "model.gguf", "f32")
    ours, theirs = SearchR3(backbone), SearchR3(files[0], **BACKEND)
    assert cosines(ours.encode_document(TEXTS), theirs.encode_document(TEXTS)).min() > 0.9999
    assert cosines(ours.encode_query(TEXTS, "direct"), theirs.encode_query(TEXTS, "direct")).min() > 0.9999
    assert cosines(theirs.encode_document(TEXTS), theirs.encode_query(TEXTS, "direct")).max() < 0.999
    with torch.no_grad():  # queries that learned on
        for name, one in backbone.model.named_parameters():
            if "lora_B" in name:
                one.mul_(0.5)
    learned = SearchR3(export_gguf(backbone, tmp_path / "learned" / "model.gguf", "f32")[0], **BACKEND)
    assert learned.backbone.revision != theirs.backbone.revision
    assert Fingerprint.of(theirs).difference(Fingerprint.of(learned)) is None
    files[1].unlink()
    with pytest.raises(ModelError, match=r"model\.queries\.gguf.* is missing"):
        SearchR3(files[0], **BACKEND)


def test_what_it_cannot_do_says_what_can(pair: tuple[SearchR3, Path], tmp_path: Path) -> None:
    path = pair[1]
    folder = path.with_name("model")
    with pytest.raises(ModelError, match=r"llama\.cpp reads GGUF files.*search-r3 export .*model model\.gguf --gguf"):
        SearchR3(folder, backend="llama.cpp")
    with pytest.raises(ConfigError, match=r"backend='onnx': expected 'torch' or 'llama\.cpp'"):
        SearchR3(folder, backend="onnx")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"dtype=float16: a GGUF file has its own"):
        SearchR3(path, backend="llama.cpp", dtype="float16")
    with pytest.raises(ConfigError, match=r"n_threads, n_parallel, n_gpu_layers, not 'n_ctx'"):
        SearchR3(path, backend="llama.cpp", model_kwargs={"n_ctx": 5})
    for name in ("n_threads", "n_parallel"):
        with pytest.raises(ConfigError, match=f"{name}=0: expected"):
            SearchR3(path, backend="llama.cpp", model_kwargs={name: 0})
    with pytest.raises(ConfigError, match="built without a GPU"):
        SearchR3(path, backend="llama.cpp", model_kwargs={"n_gpu_layers": 3})
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ModelError, match=r"llama\.cpp cannot load .*broken\.gguf"):
        SearchR3(broken, backend="llama.cpp")
    loaded = SearchR3(path, **BACKEND)
    for call_ in (
        lambda: loaded.save_pretrained(tmp_path / "x"),
        lambda: export_gguf(loaded.backbone, tmp_path / "x.gguf"),
    ):
        with pytest.raises(ModelError, match=r"which only encodes: to train, save, export .* without backend="):
            call_()
    with pytest.raises(ConfigError, match="leave device out of this call"):
        loaded.encode_query(TEXTS, "direct", device=["cpu", "cpu"])
    with pytest.raises(ModelError, match="exceed the model's context of 256"):
        loaded.encode_query(TEXTS, "reason", max_new_tokens=400)


def test_another_gguf_file_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    from test_loading import write_gguf

    write_gguf(tmp_path / "base.gguf", tokenizer, tokenizer.chat_template)
    with pytest.raises(ModelError, match=r"does not say how it embeds.*search-r3 export MODEL OUT --gguf"):
        SearchR3(tmp_path / "base.gguf", backend="llama.cpp")


def test_limits_can_be_given_and_memory_is_let_go(pair: tuple[SearchR3, Path]) -> None:
    loaded = SearchR3(pair[1], **BACKEND, max_length=60, max_new_tokens=5)
    assert (loaded.backbone.settings.max_length, loaded.backbone.settings.max_new_tokens) == (60, 5)
    assert loaded.encode_query(" ".join(TEXTS), "reason").truncated == [True]
    cache = weakref.ref(loaded.backbone.cache)
    loaded.close()
    gc.collect()
    assert cache() is None


def test_it_serves_searches_and_evaluates(
    pair: tuple[SearchR3, Path], collection_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from search_r3.serving.engine import EngineThread

    theirs = SearchR3(pair[1], **BACKEND)
    expected = theirs.encode_query(TEXTS, "reason"), theirs.encode_document(TEXTS)
    with EngineThread(theirs) as engine:
        assert engine.slots == 4
        jobs = engine.submit(TEXTS, "reason"), engine.submit(TEXTS, "document")
        results = [job.result(60).vectors for job in jobs]
    assert all(cosines(*two).min() > 0.9999 for two in zip(results, expected, strict=True))
    options = ["--backend", "llama.cpp", "--collection", collection_path, "--untrained"]
    assert call(monkeypatch, "search", pair[1], "red house", *options, "--json") == 0
    assert '"reasoning"' in capsys.readouterr().out
    options = ["--backend", "llama.cpp", "--collections", collection_path, "--modes", "direct", "--bootstrap", 100]
    assert call(monkeypatch, "evaluate", "--model", pair[1], *options, "--out", tmp_path / "e") == 0
    assert (tmp_path / "e" / "summary.md").is_file()
    assert call(monkeypatch, "evaluate", "--model", pair[1].with_name("model"), *options, "--out", tmp_path / "f") == 2
    assert "llama.cpp reads GGUF files" in " ".join(capsys.readouterr().err.split())


def test_vectors_behind_given_words_are_ours(ours: SearchR3, theirs: SearchR3) -> None:
    ids = [theirs.backbone.prompt_encoder.encode(text, "direct").ids for text in TEXTS]
    with torch.no_grad():
        own = ours.backbone.embed(ids)
    assert cosines(own, theirs.backbone.embed(ids)).min() > 0.9999
    assert load_backbone(theirs.backbone.source, backend="llama.cpp").trained == ours.backbone.trained


def test_mteb_names_what_computes(theirs: SearchR3) -> None:
    mteb = pytest.importorskip("search_r3.evaluation.mteb")
    meta = mteb._model_meta(theirs, "direct", None, "none")
    assert meta.framework == ["GGUF"] and meta.n_parameters is None
    assert meta.experiment_kwargs["dtype"] == theirs.backbone.dtype


@pytest.mark.real
@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_llama_cpps_own_tokenizer_reads_texts_as_ours(tmp_path: Path, tokenizer: Any, kind: str) -> None:
    """The names of tokens, their types, merges and the split: what other programs on llama.cpp go by."""
    llama_cpp = pytest.importorskip("llama_cpp")
    ours, path = exported(tmp_path, tokenizer, kind)
    model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    own = ours.backbone.tokenizer
    for text in ("where is the red house?", "It's 1984,\n\n  and 日本語 🙂 <|im_end|> don't", "a  b\t c"):
        ids = own(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert model.tokenize(text.encode(), add_bos=False, special=False) == ids, text
    chat = own.apply_chat_template([{"role": "user", "content": "red"}], tokenize=False, add_generation_prompt=True)
    assert model.tokenize(chat.encode(), add_bos=False, special=True) == own(chat)["input_ids"]
    assert model.token_eos() == own.eos_token_id
