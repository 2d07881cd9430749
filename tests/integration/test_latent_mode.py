"""Mode latent: stage 1 trains it, and it is a mode wherever there are modes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from search_r3.config import SFTSettings, load_recipe
from search_r3.data.collection import Collection, Query
from search_r3.data.triples import TrainingExample, likeliest_trace
from search_r3.errors import ModelError
from search_r3.model.encoder import SearchR3
from search_r3.serving.engine import EngineThread
from search_r3.training import losses
from search_r3.training.batches import Batch
from search_r3.training.modes.latent import LATENT_WEIGHTS, words_of
from search_r3.training.sft import latent_losses, train_sft, weight_of
from tests.conftest import call, save_tiny

SETTINGS = [
    "max_length=120", "max_new_tokens=16", "sft.steps=40", "sft.batch_size=4", "sft.learning_rate=1e-2",
    "sft.splits={train: 1.0}", "sft.reasoning_styles={chain: 1.0}", "sft.latent_steps=2", "sft.latent_weight=1",
    "sft.evaluate_every=40",
]  # fmt: skip
TEXTS = ["where is the red house?", "a blue boat", "the white chair"]
NAMES = {
    "words": {"latent_info_nce", "latent_triplet", "latent_words"},
    "gircse": {"latent_info_nce", "latent_rise"},
    "laser": {"latent_info_nce", "latent_kl"},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base") / "base", tokenizer, spare_rows=16)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, base: Path, collection_path: Path) -> Path:
    folder = tmp_path_factory.mktemp("latent")
    where = [f"run_dir={folder}/run", f"base={base}", f"collection={collection_path}"]
    result = train_sft(load_recipe(None, [*SETTINGS, *where]))
    assert 0 <= result.metrics["dev_ndcg@10_latent"] <= 1
    assert result.metrics["latent_info_nce"] < result.log_history[0]["latent_info_nce"]
    return result.model_path


@pytest.fixture
def model(trained: Path) -> SearchR3:
    return SearchR3(trained, device="cpu")


def test_a_query_has_one_vector_alone_and_in_any_company(model: SearchR3) -> None:
    together = model.encode_query(TEXTS, "latent")
    assert together.reasoning_tokens == [2, 2, 2], "soft tokens are paid for as others are"
    assert (together.reasoning, together.forced) == ([""] * 3, [False] * 3)
    for text, vector in zip(TEXTS, together.vectors, strict=True):
        np.testing.assert_allclose(model.encode_query(text, "latent").vectors[0], vector, atol=1e-5)
        *pieces, last = model.stream_query(text, "latent")
        assert pieces == []
        np.testing.assert_allclose(last.vectors[0], vector, atol=1e-5)  # type: ignore[union-attr]
    for mode in ("direct", "reason"):
        assert np.abs(model.encode_query(TEXTS, mode).vectors - together.vectors).max() > 1e-3  # type: ignore[arg-type]
    shorter = model.encode_query(TEXTS, "latent", max_new_tokens=2)
    assert shorter.reasoning_tokens == [1, 1, 1]
    assert np.abs(shorter.vectors - together.vectors).max() > 1e-4


def test_the_server_thread_gives_the_same_beside_other_modes(model: SearchR3) -> None:
    expected = {mode: model.encode_query(TEXTS, mode).vectors for mode in ("latent", "reason", "direct")}  # type: ignore[arg-type]
    with EngineThread(model, slots=2) as engine:
        futures = {mode: engine.submit(TEXTS, mode) for mode in expected}  # type: ignore[arg-type]
        for mode, future in futures.items():
            np.testing.assert_allclose(future.result(20).vectors, expected[mode], atol=1e-5)
        assert [one.reasoning_tokens for one in futures["latent"].result().texts] == [2, 2, 2]


def test_it_is_saved_with_its_number_of_soft_tokens(trained: Path, model: SearchR3, tmp_path: Path) -> None:
    assert json.loads((trained / "search_r3.json").read_text())["latent_steps"] == 2
    model.save_pretrained(tmp_path / "again")
    again = SearchR3(tmp_path / "again", device="cpu")
    np.testing.assert_array_equal(again.encode_query(TEXTS, "latent"), model.encode_query(TEXTS, "latent").vectors)


def test_a_model_that_was_not_trained_for_it_says_how_it_is(tiny_path: Path) -> None:
    untrained = SearchR3(tiny_path, device="cpu")
    asks = [
        lambda: untrained.encode_query(TEXTS, "latent"),
        lambda: next(untrained.stream_query(TEXTS[0], "latent")),
        lambda: EngineThread(untrained).submit(TEXTS, "latent"),
    ]
    for ask in asks:
        with pytest.raises(ModelError, match=r"not trained with soft tokens, .* sft\.latent_steps=3"):
            ask()


@pytest.mark.parametrize("objective", ["words", "gircse", "laser"])
def test_micro_batches_change_no_gradient_and_frozen_documents_no_loss(
    trained: Path, collection_path: Path, tmp_path: Path, objective: str
) -> None:
    found = {}
    for documents in ("moving", "frozen"):
        for size in ("null", "3"):
            more = [f"sft.latent_objective={objective}", f"sft.documents={documents}", f"sft.micro_batch_size={size}"]
            where = [f"run_dir={tmp_path}/{documents}-{size}", f"base={trained}", f"collection={collection_path}"]
            short = ["sft.steps=1", "sft.evaluate_every=0"]
            result = train_sft(load_recipe(None, [*SETTINGS, *more, *short, *where]))
            found[documents, size] = result.log_history[0]
    names = NAMES[objective]
    for (documents, _), row in found.items():
        assert {name for name in row if name.startswith("latent_")} == names
        for name in ("loss", *names):
            assert row[name] == pytest.approx(found["moving", "null"][name], rel=1e-4, abs=1e-6), name
        for name in ("grad_norm", "tokens"):
            assert row[name] == pytest.approx(found[documents, "null"][name], rel=1e-4), name


def unit(*shape: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape), dim=-1)


def batch_of(owners: list[int], steps: int) -> Batch:
    """Two queries, of which the first has no trace, and four documents; the first is not to be told from the last."""
    excluded = torch.zeros(2, 4, dtype=torch.bool)
    excluded[0, 3] = True
    examples: Any = [None, None]
    return Batch(examples, ["", "a trace"], list("abcd"), torch.tensor([0, 1]), torch.empty(2, 0), excluded, owners,
                 latent_steps=steps)  # fmt: skip


def test_beside_words_the_vector_after_all_soft_tokens_is_what_learns() -> None:
    torch.manual_seed(0)
    batch, documents, latents = batch_of([0, 1], 3), unit(4, 8), unit(2, 3, 8)
    settings = SFTSettings(latent_steps=3, contrastive_temperature=0.5)
    found = latent_losses([unit(2, 8), documents, latents.flatten(0, 1)], batch, settings)
    expected = losses.info_nce(latents[:, 2], documents, batch.positives, batch.excluded, 0.5)
    assert {name: float(value) for name, value in found.items()} == {"latent_info_nce": pytest.approx(float(expected))}


def test_gircse_takes_every_number_of_soft_tokens_and_punishes_a_rise() -> None:
    torch.manual_seed(0)
    settings = SFTSettings(latent_steps=3, latent_objective="gircse", contrastive_temperature=0.5)
    batch, queries, documents, latents = batch_of([0, 1, 0, 1], 3), unit(4, 8), unit(4, 8), unit(2, 3, 8)
    latents[:, 1] = -documents[:2]  # one more soft token made it worse
    found = latent_losses([queries, documents, latents.flatten(0, 1)], batch, settings)
    positives, excluded = batch.positives, batch.excluded
    each = [float(losses.info_nce(latents[:, i], documents, positives, excluded, 0.5)) for i in range(3)]
    assert float(found["latent_info_nce"]) == pytest.approx(sum(each) / 3, rel=1e-5)
    rises = [max(0.0, float(np.log(b) - np.log(a))) for a, b in ((each[0], each[1]), (each[1], each[2]))]
    assert float(found["latent_rise"]) == pytest.approx(sum(rises) / 2, rel=1e-5)
    assert sum(rises) > 0


def test_gircse_learns_on_where_all_queries_are_told_apart() -> None:
    settings = SFTSettings(latent_steps=2, latent_objective="gircse", contrastive_temperature=0.02)
    batch, documents = batch_of([0, 1], 2), torch.eye(4)
    latents = documents[[0, 0, 1, 1]].requires_grad_()
    found = latent_losses([documents[:2], documents, latents], batch, settings)
    assert float(found["latent_info_nce"].detach()) == 0
    assert float(found["latent_rise"].detach()) == 0
    sum(found.values(), torch.zeros(())).backward()
    assert latents.grad is not None
    assert latents.grad.isfinite().all()


def test_laser_learns_the_scores_of_the_written_view_and_does_not_teach_it() -> None:
    torch.manual_seed(0)
    settings = SFTSettings(latent_steps=3, latent_objective="laser", contrastive_temperature=0.5)
    batch, queries, documents, latents = batch_of([0, 1, 0, 1], 3), unit(4, 8), unit(4, 8), unit(2, 3, 8)
    batch.excluded[1, 3] = True
    queries.requires_grad_()
    latents.requires_grad_()
    found = latent_losses([queries, documents, latents.flatten(0, 1)], batch, settings)
    views = [
        torch.distributions.Categorical(logits=documents[:3] @ view.detach() / 0.5)
        for view in (queries[3], latents[1, 2])
    ]
    expected = float(torch.distributions.kl_divergence(*views))
    assert float(found["latent_kl"].detach()) == pytest.approx(expected, rel=1e-4), "of the query with a trace alone"
    nearest = losses.info_nce(latents[:, 2], documents, batch.positives, batch.excluded, 0.5)
    assert float(found["latent_info_nce"].detach()) == pytest.approx(float(nearest.detach()), rel=1e-5)
    found["latent_kl"].backward()
    assert queries.grad is None
    assert latents.grad is not None
    assert latents.grad[1, 2].abs().max() > 0
    assert latents.grad[0].abs().max() == latents.grad[:, :2].abs().max() == 0


def test_laser_has_no_teacher_in_traces_that_are_not_to_be_written() -> None:
    settings = SFTSettings(latent_steps=1, latent_objective="laser")
    documents = torch.eye(4)
    for batch in (batch_of([0, 1], 1), replace(batch_of([0, 1, 0, 1], 1), unwritten=frozenset({1}))):
        found = latent_losses([documents[batch.owners], documents, documents[2:]], batch, settings)
        assert float(found["latent_kl"]) == 0


TRACES = {"a": "It is a red house. It has a white chair.", "b": "It is a blue boat."}


def test_soft_tokens_are_to_say_the_rare_words_of_their_piece_of_the_trace(model: SearchR3) -> None:
    encoder = model.backbone.prompt_encoder
    sentences = [encoder.sentences(trace) for trace in TRACES.values()]
    assert [len(trace) for trace in sentences] == [2, 1]
    for trace, parts in zip(TRACES.values(), sentences, strict=True):
        assert encoder.tokenizer.decode([token for part in parts for token in part]) == trace
    words = words_of([*sentences, []], 2)

    def said(row: int, step: int) -> str:
        return "".join(encoder.tokenizer.decode([token]) for token in words[row][step])

    assert "house" in said(0, 0) and "chair" in said(0, 1) and "blue" in said(1, 0) and words[2] == [{}, {}]
    assert "It" not in said(0, 0) + said(1, 0), "what all of them say is no thought"
    assert all(sum(one.values()) == pytest.approx(1) for row in words[:2] for one in row)
    assert words[1][0] == words[1][1], "where there are fewer sentences, the last stands for the rest"


def test_a_word_weighs_more_where_fewer_traces_have_it() -> None:
    [[words], *_] = words_of([[[1, 2]], [[2]], [[3]], [[3]]], 1)
    assert words[1] / words[2] == pytest.approx((np.log(4) / np.log(2)) ** 2)
    assert words_of([[[1, 2]]], 1) == [[{}]], "one trace alone says nothing that others do not"


@pytest.mark.parametrize(("styles", "read", "expected"), [
    ({"chain": 0.7, "restate": 0.3}, (), "c"), ({"chain": 0.2, "restate": 0.8}, (), "r"),
    ({"chain": 0.7, "restate": 0.3}, ("chain",), "r"), ({"chain": 1.0, "restate": 0.0}, ("chain", "restate"), ""),
])  # fmt: skip
def test_they_say_the_trace_that_reason_mode_writes_most(styles: Any, read: Any, expected: str) -> None:
    example = TrainingExample(Query("q", "?"), ("d",), (), {"chain": "c", "restate": "r"})
    assert likeliest_trace(example, styles, read) == expected


def test_soft_tokens_learn_to_say_them(trained: Path) -> None:
    rows = [json.loads(line) for line in (trained.parents[1] / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["latent_words"] < 0.8 * rows[0]["latent_words"]


def test_latent_losses_weigh_as_they_do_in_the_other_modes() -> None:
    settings = SFTSettings(latent_steps=1, latent_weight=0.5, info_nce_weight=2.0, triplet_weight=3.0)
    names = ("latent_info_nce", "latent_triplet", "latent_words", "latent_rise", "latent_kl")
    own = [0.5 * LATENT_WEIGHTS["latent_words"], 0.5, 5.0]
    assert [weight_of(name, settings) for name in names] == [1.0, 1.5, *own]


def test_evaluation_and_mteb_count_soft_tokens(
    trained: Path, model: SearchR3, collection: Collection, collection_path: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    where = ["--collections", collection_path, "--out", tmp_path / "results", "--modes", "direct", "latent"]
    assert call(monkeypatch, "evaluate", "--model", trained, *where) == 0
    rows = json.loads((tmp_path / "results" / "summary.json").read_text())["rows"]
    assert {row["system"]: row["tokens_per_query"] for row in rows} == {"direct": 0, "latent": 2}
    pytest.importorskip("mteb")
    from search_r3.evaluation.mteb import SearchR3MTEB

    assert SearchR3MTEB(model, mode="latent").mteb_model_meta.experiment_kwargs["soft_tokens"] == 2
