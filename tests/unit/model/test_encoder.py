from __future__ import annotations

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest

from search_r3 import SearchR3
from search_r3.data.documents import read_documents
from search_r3.errors import ConfigError, DataError, ModelError
from search_r3.model.documents import document_chunking
from search_r3.model.prompts import PromptSet
from search_r3.model.settings import EmbeddingSettings

TEXTS = ["where is the red house?", "river", "a black horse and a white chair on a green boat"]


def test_vectors_do_not_depend_on_company_or_batch_size(model: SearchR3) -> None:
    for encode in (
        lambda texts, size: np.asarray(model.encode_query(texts, "direct")),
        lambda texts, size: np.asarray(model.encode_query(texts, "reason", batch_size=size, max_new_tokens=6)),
        lambda texts, size: model.encode_document(texts, batch_tokens=size * 20),
    ):
        together = encode(TEXTS, 3)
        assert together.shape == (3, 32)
        assert together.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1.0, atol=1e-5)
        np.testing.assert_allclose(encode(TEXTS, 1), together, atol=1e-5)
        np.testing.assert_allclose(encode(TEXTS[::-1], 2)[::-1], together, atol=1e-5)
        assert np.abs(together[0] - together[1]).max() > 1e-3, "different texts must give different vectors"


def test_an_instruction_follows_queries_and_documents(model: SearchR3) -> None:
    joined = [f"{text} Only red things." for text in TEXTS]
    for mode in ("direct", "reason"):
        told = model.encode_query(TEXTS, mode, instruction="Only red things.", max_new_tokens=4)
        expected = model.encode_query(joined, mode, max_new_tokens=4)
        np.testing.assert_array_equal(told, expected)
        assert np.abs(told.vectors - model.encode_query(TEXTS, mode, max_new_tokens=4).vectors).max() > 1e-3
        last = list(model.stream_query(TEXTS[0], mode, instruction="Only red things.", max_new_tokens=4))[-1]
        np.testing.assert_allclose(last.vectors, expected.vectors[:1], atol=1e-5)
    each = model.encode_document(TEXTS, instruction=["", "Only red things.", ""])
    np.testing.assert_array_equal(each, model.encode_document([TEXTS[0], joined[1], TEXTS[2]]))
    blocks = model.stream_document(TEXTS, instruction="Only red things.", window=2)
    np.testing.assert_allclose(np.concatenate(list(blocks)), model.encode_document(joined), atol=1e-5)
    with pytest.raises(DataError, match="2 instructions for 3 texts; give one for all, or one per text"):
        model.encode_document(TEXTS, instruction=["", ""])


def test_a_prompt_may_begin_with_the_text(tiny_path: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_path, tmp_path / "bare"))
    ends = "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}" + ends + "{% endfor %}")
    prompts = PromptSet(name="bare", direct_system="", reason_system="", document_system="")
    model = SearchR3(folder, device="cpu", prompts=prompts)
    assert model.backbone.prompt_encoder.frame("document")[0] == []
    alone = np.concatenate([model.encode_document([text]) for text in TEXTS])
    np.testing.assert_allclose(model.encode_document(TEXTS), alone, atol=1e-5)


def test_the_shared_beginning_is_computed_once_and_changes_nothing(model: SearchR3) -> None:
    backbone = model.backbone
    prompts = [backbone.prompt_encoder.encode(text, "document").ids for text in TEXTS]
    expected = [backbone.embed([prompt])[0].detach().numpy() for prompt in prompts]
    computed: list[int] = []
    backbone.causal_lm.base_model.embed_tokens.register_forward_hook(
        lambda module, inputs, output: computed.append(inputs[0].numel())
    )
    np.testing.assert_allclose(model.encode_document(TEXTS, batch_tokens=1), expected, atol=1e-5)
    shared = len(backbone.prompt_encoder.prefix_of(prompts[0]))
    assert shared > 5
    assert sorted(computed) == sorted([shared, *(len(prompt) - shared for prompt in prompts)])
    np.testing.assert_allclose(model.encode_document([TEXTS[0]] * 2), [expected[0]] * 2, atol=1e-5)


def test_document_tokens_are_counted_as_they_are_encoded(model: SearchR3) -> None:
    counts = model.count_document_tokens(TEXTS)
    assert counts == [len(model.backbone.prompt_encoder.encode(text, "document").ids) for text in TEXTS]
    assert counts[1] < counts[0] < counts[2]


@pytest.mark.parametrize("instruction", ["", "Represent it for retrieval of facts."])
def test_chunks_for_a_model_lose_no_end_and_fill_its_room(
    tiny_path: Path, tmp_path: Path, instruction: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = SearchR3(tiny_path, max_length=120)
    (tmp_path / "a.txt").write_text("The red house stands by the river. " * 80 + "x1y2" * 300)
    chunking = document_chunking(model.backbone, instruction=instruction)
    chunks = list(read_documents(tmp_path, chunking=chunking))
    encoder = model.backbone.prompt_encoder
    prompts = encoder.encode_batch([one.full_text for one in chunks], "document", instruction)
    assert not any(prompt.truncated for prompt in prompts)
    assert max(len(prompt.ids) for prompt in prompts) > 100
    assert encoder.count_tokens(["", " \n", "red"]) == [0, 0, len(encoder.count_tokens(["red"]))]
    with pytest.raises(ConfigError, match="chunks of 120 tokens, but with max_length=120 the model has room for "):
        document_chunking(model.backbone, 120)
    assert document_chunking(model.backbone, 20, overlap=3, instruction=instruction).max_tokens == 20
    assert "longer than" not in caplog.text


def test_reason_mode_returns_what_was_thought(model: SearchR3) -> None:
    result = model.encode_query(TEXTS, max_new_tokens=6)
    assert len(result) == len(result.reasoning) == len(result.forced) == 3
    for text, tokens, forced in zip(result.reasoning, result.reasoning_tokens, result.forced, strict=True):
        assert 0 <= tokens <= 5
        assert bool(text) == (tokens > 0) or forced
    direct = model.encode_query(TEXTS, "direct")
    assert direct.reasoning == ["", "", ""]
    assert direct.reasoning_tokens == [0, 0, 0]


def test_a_forced_token_in_reason_mode_is_flagged(model: SearchR3) -> None:
    result = model.encode_query(["river"], max_new_tokens=1)
    assert result.forced == [True] or result.reasoning_tokens == [0]


def test_modes_and_kinds_give_different_vectors(model: SearchR3) -> None:
    direct = np.asarray(model.encode_query("river", "direct"))
    document = model.encode_document("river")
    assert np.abs(direct - document).max() > 1e-3


def test_similarity_is_the_cosine(model: SearchR3) -> None:
    queries, documents = model.encode_query(TEXTS[:2], "direct"), model.encode_document(TEXTS)
    expected = np.einsum("qd,nd->qn", queries.vectors, documents)
    np.testing.assert_allclose(model.similarity(queries, documents), expected, atol=1e-6)


def test_a_saved_model_encodes_alike(tmp_path: Path, model: SearchR3) -> None:
    model.save_pretrained(tmp_path / "saved")
    again = SearchR3(str(tmp_path / "saved"), device="cpu")
    np.testing.assert_array_equal(
        np.asarray(model.encode_query(TEXTS, max_new_tokens=5)), np.asarray(again.encode_query(TEXTS, max_new_tokens=5))
    )


@pytest.mark.parametrize("texts", [["fine", " "], [""], ["fine", None]])
def test_an_empty_text_is_named_by_its_place(model: SearchR3, texts: list[str]) -> None:
    place = len(texts) - 1
    with pytest.raises(DataError, match=f"query number {place} is"):
        model.encode_query(texts, "direct")
    with pytest.raises(DataError, match=f"document number {place} is"):
        model.encode_document(texts)


def test_no_texts_and_unknown_modes_are_refused(model: SearchR3) -> None:
    with pytest.raises(DataError, match="no document was given"):
        model.encode_document([])
    with pytest.raises(DataError, match="unknown mode 'fast'"):
        model.encode_query(["x"], "fast")  # type: ignore[arg-type]


def test_truncation_is_counted(tiny_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = SearchR3(tiny_path, device="cpu", settings=EmbeddingSettings(max_length=80, max_new_tokens=4))
    long = "red house " * 100
    assert model.encode_query(["red", long], "direct").truncated == [False, True]
    assert model.encode_query(["red", long], "reason").truncated == [False, True]
    with caplog.at_level(logging.WARNING):
        model.encode_document(["red", long, long])
    assert "2 of 3 documents were cut to max_length=80 tokens" in caplog.text


def test_a_path_that_is_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no model directory at"):
        SearchR3(str(tmp_path / "nowhere"))


def test_truncated_vectors_are_the_normalised_beginnings_of_the_whole_ones(tiny_path: Path) -> None:
    whole, short = SearchR3(tiny_path, device="cpu"), SearchR3(tiny_path, device="cpu", truncate_dim=8)
    texts = ["a red house", "a blue boat"]
    assert short.dimension == 8
    for encode in ("encode_document", "encode_query"):
        expected = np.asarray(getattr(whole, encode)(texts))[:, :8]
        expected = expected / np.linalg.norm(expected, axis=1, keepdims=True)
        np.testing.assert_allclose(np.asarray(getattr(short, encode)(texts)), expected, atol=1e-6)
    [streamed] = short.stream_document(texts)
    assert streamed.shape == (2, 8)
    *_, query = short.stream_query("where is it?", "direct")
    assert query.vectors.shape == (1, 8)
    with pytest.raises(ModelError, match=r"truncate_dim=33, but the vectors of .* have 32 dimensions"):
        SearchR3(tiny_path, device="cpu", truncate_dim=33)
