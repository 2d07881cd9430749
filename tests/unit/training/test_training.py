"""Batches, gradients and bookkeeping of both stages, on a tiny model."""

from __future__ import annotations

import pickle
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from search_r3.config import GRPOSettings, Recipe, RefreshSettings, SFTSettings, load_recipe
from search_r3.data.collection import Collection, Document, Query
from search_r3.data.load import load_collection
from search_r3.data.triples import draw_negatives, reasoning_traces, training_examples
from search_r3.environment.environment import RetrievalEnvironment
from search_r3.errors import ConfigError, DataError, ModelError, RunError, SearchR3Error
from search_r3.model.backbone import shorten
from search_r3.model.encoder import SearchR3
from search_r3.parallel import Communicator
from search_r3.retrieval.lexical import BM25
from search_r3.retrieval.metrics import probe_cosine
from search_r3.training import grpo, sft
from search_r3.training.batches import (
    Batch,
    check_dimensions,
    collate,
    find_false_negatives,
    make_batch,
    micro_batches,
    tokenise,
)
from search_r3.training.engine import Engine, make_engine, warmup_cosine
from search_r3.training.rl import rollouts, signals
from search_r3.training.run import Run
from tests.conftest import favour


def world(model: SearchR3, collection: Collection, settings: GRPOSettings) -> RetrievalEnvironment:
    return RetrievalEnvironment(
        collection, collection.split("train"), model, RefreshSettings(policy="full"), settings.reward,
        k=10, max_new_tokens=6, depth=settings.embedding_depth,
    )  # fmt: skip


def recipe(**grpo_settings: object) -> Recipe:
    section = {"queries_per_step": 3, "group_size": 4, **grpo_settings}
    return Recipe(max_length=120, max_new_tokens=6, grpo=GRPOSettings(**section))  # type: ignore[arg-type]


def gradients(model: SearchR3) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.backbone.model.parameters() if p.grad is not None])


# Stage 1


def test_mined_negatives_are_never_judged_nor_a_positives_twin(collection: Collection) -> None:
    documents = dict(collection.documents)
    documents["twin"] = Document("twin", documents["d00"].text, documents["d00"].title)
    with_twin = Collection("t", documents, collection.queries, collection.qrels)
    bm25 = BM25(list(documents), [document.full_text for document in documents.values()])
    examples = training_examples(with_twin, "train", bm25.search, mined=5)
    assert len(examples) == 20
    for example in examples:
        assert len(example.negative_ids) == 5
        assert not {"twin", *example.positive_ids} & set(example.negative_ids) or example.query.query_id != "q00"
        assert not set(example.positive_ids) & set(example.negative_ids)
    mined = examples[0].negative_ids
    assert all("red" in documents[i].full_text or "house" in documents[i].full_text for i in mined), "hard, not random"


def test_negatives_that_mining_dropped_are_not_brought_back(collection: Collection) -> None:
    queries = {
        query_id: Query(query_id, query.text, {"negatives": [] if query_id == "q00" else ["d09"]})
        for query_id, query in collection.queries.items()
    }
    mined = Collection("mined", collection.documents, queries, {"train": {"q00": {"d00": 1}, "q01": {"d01": 1}}})

    def search(texts: object, count: int, pools: object) -> list[list[str]]:
        raise AssertionError("every query has been mined for")

    assert [example.negative_ids for example in training_examples(mined, "train", search, 3)] == [(), ("d09",)]


def test_drawn_negatives_have_the_asked_number_and_no_positive(collection: Collection) -> None:
    example = training_examples(collection, "train")[0]
    for seed in range(50):
        drawn = draw_negatives(example, list(collection.documents), 3, 2, random.Random(seed))
        assert len(set(drawn)) == 5
        assert example.positive_ids[0] not in drawn
    with pytest.raises(DataError, match="too small"):
        draw_negatives(example, ["d00", "d01"], 3, 0, random.Random(0))


def test_traces_are_read_and_checked() -> None:
    assert reasoning_traces(Query("q", "t", {"reasoning": "because"})) == {"trace": "because"}
    assert reasoning_traces(Query("q", "t", {"reasoning": {"a": "x", "b": " "}})) == {"a": "x"}
    assert reasoning_traces(Query("q", "t")) == {}
    with pytest.raises(DataError, match=r"query 'q': metadata.reasoning must be"):
        reasoning_traces(Query("q", "t", {"reasoning": [1]}))


def test_false_negatives_are_masked(collection: Collection) -> None:
    documents = dict(collection.documents)
    documents["twin"] = Document("twin", documents["d00"].text, documents["d00"].title)
    qrels = {"train": {"q00": {"d00": 1, "d05": 1}, "q01": {"d01": 1}}}
    examples = training_examples(Collection("t", documents, collection.queries, qrels), "train")
    chosen = ["d00", "d01"]
    columns = {doc_id: column for column, doc_id in enumerate(("d00", "d01", "d05", "twin", "d09"))}
    mask = find_false_negatives(examples, chosen, columns, Collection("t", documents, collection.queries, qrels))
    assert mask.tolist() == [[False, False, True, True, False], [False] * 5]


def test_a_batch_points_at_its_embed_tokens_and_documents(model: SearchR3, collection: Collection) -> None:
    settings = SFTSettings(batch_size=6, latent_steps=2)
    examples = training_examples(collection, "train")[:6]
    batch = make_batch(collection, list(collection.documents), examples, settings, random.Random(0))
    encoder = model.backbone.prompt_encoder
    share = tokenise(batch, collection, encoder, range(6), range(len(batch.doc_ids)), 60)
    for row, (example, direct, reasoned) in enumerate(zip(examples, share.direct, share.reason, strict=True)):
        for sequence in (direct, reasoned):
            assert sequence.ids[sequence.embed_position] == model.backbone.embed_token_id
        # Up to the embed token the direct sequence is what encode_query feeds: one vector in training and in use.
        assert direct.ids[: direct.embed_position + 1] == encoder.encode(example.query.text, "direct").ids
        assert reasoned.ids[: reasoned.prompt_length] == encoder.encode(example.query.text, "reason").ids
        assert (direct.place, reasoned.place) == (row, row + 6)
    for row, example in enumerate(examples):
        text = collection.documents[example.positive_ids[0]].full_text
        assert share.documents[batch.positives[row]].ids == encoder.encode(text, "document").ids
        assert batch.positives[row] not in batch.negatives[row]
    chunk = collate([*share.direct, *share.reason], model.backbone.tokenizer.pad_token_id, torch.device("cpu"))
    assert chunk.words is None
    for row, (example, latent) in enumerate(zip(examples, share.latent, strict=True)):
        assert latent.ids == encoder.encode(example.query.text, "latent").ids and latent.place == row
        rare = encoder.sentences(example.reasoning["chain"])[0]
        assert all(set(words) < set(rare) and sum(words.values()) == pytest.approx(1) for words in latent.words)
    words = collate(share.latent, model.backbone.tokenizer.pad_token_id, torch.device("cpu")).words
    assert words is not None
    for row, latent in enumerate(share.latent):
        for step, own in enumerate(latent.words):
            found = {int(i): float(w) for i, w in zip(words.ids[row, step], words.weights[row, step], strict=True) if w}
            assert found == pytest.approx(own)
    others = sum(one.length for one in (*share.documents, *share.latent))
    assert share.counts() == {
        "cross_entropy": int(chunk.replies.sum()), "kl_to_base": int(chunk.prompts.sum()), "latent_words": 12,
        "tokens": int(chunk.mask.sum()) + others, "traces_cut": 0,
    }  # fmt: skip
    assert chunk.targets.tolist() == [
        token for item in (*share.direct, *share.reason) for token in item.ids[item.prompt_length :]
    ]
    part = tokenise(batch, collection, encoder, range(2, 4), [1], 60)
    assert part.direct == share.direct[2:4]
    assert part.documents == share.documents[1:2]


def test_a_query_that_teaches_direct_mode_alone_is_in_the_kl_too(model: SearchR3, collection: Collection) -> None:
    settings = SFTSettings(batch_size=6, untraced="direct")
    examples = training_examples(collection, "train")[:6]
    examples[:3] = [replace(example, reasoning={}) for example in examples[:3]]
    batch = make_batch(collection, list(collection.documents), examples, settings, random.Random(0))
    share = tokenise(batch, collection, model.backbone.prompt_encoder, range(6), range(len(batch.doc_ids)), 60)
    assert len(share.reason) == 3 and all(one.in_kl for one in share.reason)
    assert [one.in_kl for one in share.direct] == [True] * 3 + [False] * 3, "each query once"


def test_a_trace_is_cut_to_the_budget_and_counted(model: SearchR3, collection: Collection) -> None:
    example = training_examples(collection, "train")[0]
    settings = SFTSettings(reasoning_styles={"chain": 1.0})
    batch = make_batch(collection, list(collection.documents), [example], settings, random.Random(0))
    encoder = model.backbone.prompt_encoder
    whole = encoder.reason_completion(batch.traces[0])
    length = whole.embed_position
    assert length > 3
    for budget, kept in ((length + 1, length), (length, length - 1), (3, 2), (1, 0)):
        share = tokenise(batch, collection, encoder, [0], [0], budget)
        [one] = share.reason
        assert one.ids[one.prompt_length :] == [*whole.ids[:kept], *whole.ids[length:]]
        assert one.ids[one.embed_position] == model.backbone.embed_token_id
        assert share.counts()["traces_cut"] == (kept < length)


def test_each_weight_of_stage_1_reaches_the_total(model: SearchR3, collection: Collection) -> None:
    settings = SFTSettings(batch_size=4, kl_weight=1.0)
    engine = make_engine(model, Recipe(sft=settings), settings)
    with torch.no_grad():
        for parameter in model.backbone.model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    examples = training_examples(collection, "train")[:4]
    batch = make_batch(collection, list(collection.documents), examples, settings, random.Random(0))
    share = sft.take_share(engine, batch, collection, model)

    def values(settings: SFTSettings) -> dict[str, float]:
        model.backbone.model.zero_grad()
        return sft.compute_gradients(engine, model.backbone, batch, share, settings)

    whole = values(settings)
    assert whole.pop("traces_cut") == 0
    assert whole.pop("tokens") == sum(len(one.ids) for one in (*share.direct, *share.reason, *share.documents))
    assert list(whole) == ["loss", "cross_entropy", "kl_to_base", "info_nce", "triplet"]
    assert whole["kl_to_base"] > 0, "the tuned model differs from its base"
    assert whole["loss"] == pytest.approx(sum(whole.values()) - whole["loss"], rel=1e-5)
    gradient = gradients(model)
    for name in ("cross_entropy", "kl_to_base", "info_nce", "triplet"):
        without = values(settings.model_copy(update={"kl_weight" if name == "kl_to_base" else f"{name}_weight": 0.0}))
        assert whole["loss"] - without["loss"] == pytest.approx(whole[name], rel=1e-4)
        assert (gradients(model) - gradient).abs().max() > 1e-6, f"{name} has a gradient"


def test_shorter_prefixes_share_the_contrastive_losses(model: SearchR3, collection: Collection) -> None:
    settings = SFTSettings(batch_size=3, matryoshka_dimensions=(8,))
    examples = training_examples(collection, "train")[:3]
    batch = make_batch(collection, list(collection.documents), examples, settings, random.Random(0))
    generator = torch.Generator().manual_seed(0)
    queries, documents = (
        torch.nn.functional.normalize(torch.randn(count, 32, generator=generator), dim=-1)
        for count in (6, len(batch.doc_ids))
    )
    both = sft.contrastive_losses(queries, documents, batch, range(6), settings)
    alone = settings.model_copy(update={"matryoshka_dimensions": ()})
    long = sft.contrastive_losses(queries, documents, batch, range(6), alone)
    short = sft.contrastive_losses(shorten(queries, 8), shorten(documents, 8), batch, range(6), alone)
    for name in ("info_nce", "triplet"):
        assert both[name].item() == pytest.approx((long[name] + short[name]).item() / 2)
        assert long[name].item() != pytest.approx(short[name].item())
    with pytest.raises(ConfigError, match="matryoshka_dimensions holds 32; expected prefixes of a vector of 32"):
        check_dimensions(32, SFTSettings(matryoshka_dimensions=(8, 32)))


def test_a_frozen_copy_in_bfloat16_keeps_its_frequencies(model: SearchR3) -> None:
    frozen = model.backbone.frozen_copy("bfloat16").model
    assert {parameter.dtype for parameter in frozen.parameters()} == {torch.bfloat16}
    assert frozen.model.rotary_emb.inv_freq.dtype == torch.float32


def test_a_stage_goes_on_only_from_the_model_it_began_from(model: SearchR3, tmp_path: Path) -> None:
    run = Run(Recipe(run_dir=str(tmp_path / "run")))
    run.begin_from("grpo", model.backbone, "data")
    model.save_pretrained(tmp_path / "other", dtype="float16")
    other = SearchR3(tmp_path / "other", device="cpu").backbone
    run.begin_from("grpo", other, "more data")  # nothing was trained yet
    checkpoint = tmp_path / "run" / "grpo" / "checkpoints" / "step-000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "checkpoint.json").write_text("{}")
    run.begin_from("grpo", other, "more data")
    with pytest.raises(ConfigError, match=r"'grpo' learns from .*qwen2 now, but it began from"):
        run.begin_from("grpo", model.backbone, "more data")
    with pytest.raises(ConfigError, match=r"the collection has other documents, .* bring them back, or set run_dir="):
        run.begin_from("grpo", other, "data")


def instructed(collection: Collection) -> Collection:
    """Two thirds of the queries have an instruction."""
    queries = {
        one: replace(query, text=f"{query.text} Find it.", instruction="Find it.")
        for one, query in collection.queries.items()
        if int(one[1:]) % 3
    }
    return replace(collection, queries={**collection.queries, **queries})


def test_a_share_of_the_queries_is_trained_without_instruction(model: SearchR3, collection: Collection) -> None:
    whole = instructed(collection)
    examples, doc_ids = training_examples(whole, "train"), list(whole.documents)

    def batch(share: float, seed: int = 0) -> Batch:
        return make_batch(whole, doc_ids, examples, SFTSettings(uninstructed=share), random.Random(seed))

    own, half, bare = batch(0.0), batch(0.5), batch(1.0)
    assert [one.query for one in own.examples] == [one.query for one in examples]
    assert not any(one.query.instruction for one in bare.examples)
    assert [one.query.text for one in bare.examples] == [
        collection.queries[one.query.query_id].text for one in examples
    ]
    count = sum(bool(one.query.instruction) for one in own.examples)
    assert 0 < sum(bool(one.query.instruction) for one in half.examples) < count
    assert half.examples == batch(0.5).examples != batch(0.5, 1).examples, "by the step's random numbers"
    for other in (half, bare):
        assert (other.traces, other.doc_ids, other.owners) == (own.traces, own.doc_ids, own.owners), "all else stays"
    encoder = model.backbone.prompt_encoder
    share = tokenise(half, whole, encoder, range(20), [], 60)
    for one, sequence in zip(half.examples, share.reason, strict=True):
        assert sequence.ids[: sequence.prompt_length] == encoder.encode(one.query.text, "reason").ids


def test_a_share_of_the_groups_is_rolled_out_without_instruction(model: SearchR3, collection: Collection) -> None:
    whole = instructed(collection)
    rolled = {}
    for share in (0.0, 0.5, 1.0):
        settings = recipe(uninstructed=share, queries_per_step=12)
        favour(model.backbone, model.backbone.embed_token_id, 3.5)
        engine = make_engine(model, settings, settings.grpo)
        batch = grpo.collect(model, world(model, whole, settings.grpo), settings, 1, engine)
        rolled[share] = batch.queries
        encode = model.backbone.prompt_encoder.encode
        for place, rollout in enumerate(batch.rollouts):
            query = batch.queries[place]
            assert query == batch.queries[place // 4 * 4]
            assert list(rollout.prompt_ids) == encode(query.text, "reason").ids, "a whole group asks alike"
        rows = grpo.rollout_rows(batch, step=1, group_size=4)
        assert [row["query"] for row in rows] == [query.text for query in batch.queries[: len(rows)]]
    assert [query.query_id for query in rolled[0.5]] == [query.query_id for query in rolled[0.0]]
    counts = [sum(bool(query.instruction) for query in rolled[share]) for share in (0.0, 0.5, 1.0)]
    assert counts[0] > counts[1] > counts[2] == 0


def test_a_style_without_weight_is_named(collection: Collection) -> None:
    settings = SFTSettings(reasoning_styles={"poem": 1.0})
    examples = training_examples(collection, "train")[:2]
    with pytest.raises(ConfigError, match="has reasoning styles chain, restate, none of which has a weight"):
        make_batch(collection, list(collection.documents), examples, settings, random.Random(0))


# Stage 2


def experience(
    model: SearchR3, collection: Collection, settings: Recipe
) -> tuple[RetrievalEnvironment, rollouts.Experience]:
    favour(model.backbone, model.backbone.embed_token_id, 3.5)  # emitted by some rollouts, not by all
    environment = world(model, collection, settings.grpo)
    prompts = [model.backbone.prompt_encoder.encode("where is the red house?", "reason").ids] * 12
    replies = model.rollouts(
        prompts, max_new_tokens=6, sampling_temperature=settings.grpo.sampling_temperature, seeds=range(12)
    )
    query_ids = [query_id for query_id in ("q00", "q01", "q04") for _ in range(4)]
    feedback = environment.feedback(replies, query_ids, 0)
    advantages = torch.randn(12, generator=torch.Generator().manual_seed(0))
    queries = [collection.queries[query_id] for query_id in query_ids]
    direct = rollouts.answer_directly(model, queries[::4], 8)
    scores = environment.score(direct, query_ids[::4])
    return environment, rollouts.Experience(
        queries, replies, feedback, advantages, 0.0, direct=direct, direct_scores=scores
    )


@pytest.mark.parametrize(
    "limits", [{"micro_batch_size": 1}, {"micro_batch_size": 5}, {"micro_batch_size": 12}, {"micro_batch_tokens": 90}]
)
def test_micro_batches_change_memory_only(
    model: SearchR3, collection: Collection, limits: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = recipe(embedding_loss_weight=0.5, direct_loss_weight=0.3, kl_coefficient=0.1, **limits)
    environment, batch = experience(model, collection, settings)
    engine = make_engine(model, settings, settings.grpo)
    monkeypatch.setattr(Engine, "clip", lambda self, norm: 0.0)
    monkeypatch.setattr(Engine, "step", lambda self: None)
    values = grpo.update(model, engine, environment, batch, settings.grpo)
    found = gradients(model)
    model.backbone.model.zero_grad()
    whole = settings.grpo.model_copy(update={"micro_batch_size": 12, "micro_batch_tokens": None})
    tokens = sum(sum(reply.completion_mask) for reply in batch.rollouts)
    totals = {"tokens": tokens, "computed_tokens": tokens, "rollouts": 12, "queries": 3}
    arguments = (model, engine, environment, batch)
    loss, expected = grpo._micro_loss(*arguments, range(12), whole, totals)
    direct_loss, direct = grpo._direct_loss(*arguments, range(3), whole, totals)
    (loss + direct_loss).backward()
    difference = (found - gradients(model)).abs().max().item()
    assert difference <= 1e-5 * gradients(model).abs().max().item()
    assert values["loss"] == pytest.approx(expected["loss"] + direct["loss"], abs=1e-5)
    assert values["direct_loss"] == pytest.approx(direct["direct_loss"], abs=1e-5) and values["direct_loss"] > 0
    assert values["sampler_gap"] < 1e-5, "decoding and training must agree on the log-probabilities"
    assert values["sampler_gap"] < values["sampler_gap_max"] == pytest.approx(expected["sampler_gap_max"], abs=1e-6)
    assert values["clipped_share"] == 0.0


@pytest.mark.parametrize(
    ("changes", "computed"),
    [
        ({}, 8),
        ({"kl_coefficient": 0.1}, 12),
        ({"embedding_loss_weight": 0.5}, 12),
        ({"embedding_loss_weight": 0.5, "embedding_loss_on": "winners"}, 8),
    ],
)
def test_rollouts_that_teach_nothing_are_not_computed(
    model: SearchR3, collection: Collection, changes: dict[str, Any], computed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = recipe(**changes)
    environment, batch = experience(model, collection, settings)
    batch.advantages[4:8] = 0  # a tied group
    engine = make_engine(model, settings, settings.grpo)
    monkeypatch.setattr(Engine, "clip", lambda self, norm: 0.0)
    monkeypatch.setattr(Engine, "step", lambda self: None)
    values = grpo.update(model, engine, environment, batch, settings.grpo)
    found = gradients(model)
    assert values["computed_share"] == computed / 12
    model.backbone.model.zero_grad()
    monkeypatch.setattr(grpo, "_rollouts_that_teach", lambda experience, settings: list(range(12)))
    whole = grpo.update(model, engine, environment, batch, settings.grpo)
    assert (found - gradients(model)).abs().max() <= 1e-5 * gradients(model).abs().max() > 0
    assert values["loss"] == pytest.approx(whole["loss"], abs=1e-6)


def test_a_step_in_which_every_group_is_tied_changes_nothing(model: SearchR3, collection: Collection) -> None:
    settings = recipe()
    environment, batch = experience(model, collection, settings)
    batch.advantages[:] = 0
    before = model.backbone.model.state_dict()["model.embed_tokens.weight"].clone()
    values = grpo.update(model, make_engine(model, settings, settings.grpo), environment, batch, settings.grpo)
    assert values["computed_share"] == values["loss"] == values["grad_norm"] == 0
    assert values["importance_weight"] == pytest.approx(1) and values["sampler_gap"] < 1e-5, "means, not sums"
    assert torch.equal(before, model.backbone.model.state_dict()["model.embed_tokens.weight"])


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_a_query_without_a_positive_is_left_out_and_counted_before_a_model_is_loaded(
    stage: str, tmp_path: Path, collection: Collection, caplog: pytest.LogCaptureFixture
) -> None:
    qrels = {**collection.qrels, "train": collection.qrels["train"] | {"q00": {"d00": 0}}}
    folder = tmp_path / "data"
    replace(collection, qrels=qrels).save(folder)
    settings = Recipe(
        collection=str(folder),
        run_dir=str(tmp_path / "run"),
        base="no/model/there",
        sft=SFTSettings(splits={"train": 1.0}),
        grpo=GRPOSettings(splits=("train",)),
    )
    with caplog.at_level("WARNING"), pytest.raises(ModelError, match=r"no/model/there|no-model"):
        if stage == "sft":
            sft.train_sft(settings)
        else:
            grpo.train_grpo(settings, model=tmp_path / "no-model")
    assert (
        "1 queries of train have no document with a score above 0 and are left out; the first is 'q00'" in caplog.text
    )
    examples = training_examples(load_collection(str(folder)), "train")
    assert [one.query.query_id for one in examples] == [one for one in qrels["train"] if one != "q00"]
    replace(collection, qrels={"train": {"q00": {"d00": 0}}}).save(folder)
    with pytest.raises(DataError, match="no query of train has a document of the corpus with a score above 0"):
        training_examples(load_collection(str(folder)), "train")


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_a_stage_that_trains_on_what_is_measured_on_says_so(
    stage: str, tmp_path: Path, collection: Collection, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "data"
    collection.save(folder)
    settings = Recipe(
        collection=str(folder),
        run_dir=str(tmp_path / "run"),
        base="no/model/there",
        sft=SFTSettings(splits={"test": 1.0}),
        grpo=GRPOSettings(splits=("dev",)),
    )
    with pytest.raises(SearchR3Error):  # for lack of a model, or of queries
        if stage == "sft":
            sft.train_sft(settings)
        else:
            grpo.train_grpo(settings, model=tmp_path / "no-model")
    assert f"the split '{'test' if stage == 'sft' else 'dev'}' is trained on" in caplog.text


def test_a_reward_function_that_is_not_there_is_named_before_a_model_is_loaded(
    tmp_path: Path, collection_path: Path
) -> None:
    where = [f"collection={collection_path}", f"run_dir={tmp_path / 'run'}"]
    settings = load_recipe(None, [*where, "grpo.splits=[train]", "grpo.reward.function=no_such_module:f"])
    with pytest.raises(ConfigError, match="No module named 'no_such_module'"):
        grpo.train_grpo(settings, model=tmp_path / "no-model")


def test_a_query_of_two_splits_has_the_positives_of_both(collection: Collection) -> None:
    twice = replace(collection, qrels={"train": {"q00": {"d00": 1}, "q01": {"d01": 1}}, "rl": {"q00": {"d05": 1}}})
    assert training_examples(twice, "rl")[0].positive_ids == ("d00", "d05")
    assert training_examples(twice, "train")[0].positive_ids == ("d00", "d05")


def test_metrics_of_several_passes_are_their_means(model: SearchR3, collection: Collection) -> None:
    settings = recipe(num_iterations=3, micro_batch_size=5, learning_rate=0.05, warmup_steps=0, kl_coefficient=0.1)
    environment, batch = experience(model, collection, settings)
    engine = make_engine(model, settings, settings.grpo)
    passes: list[dict[str, float]] = []
    values = grpo.update(model, engine, environment, batch, settings.grpo, lambda one: passes.append(dict(one)))
    assert len(passes) == 3
    for name in passes[0].keys() - {"sampler_gap", "sampler_gap_max"}:
        assert values[name] == pytest.approx(sum(one[name] for one in passes) / 3), name
    assert passes[0]["clipped_share"] == 0 < values["clipped_share"], "in the first pass every ratio is 1"
    assert values["sampler_gap"] == passes[0]["sampler_gap"] < 1e-5, "later passes have moved the weights on purpose"
    assert values["sampler_gap_max"] == passes[0]["sampler_gap_max"] < 1e-4 < passes[2]["sampler_gap_max"]


def test_the_largest_gap_to_the_sampler_is_found_whatever_pass_it_is_in(
    model: SearchR3, collection: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = recipe(micro_batch_size=2)
    environment, batch = experience(model, collection, settings)
    monkeypatch.setattr(Engine, "step", lambda self: None)
    engine = make_engine(model, settings, settings.grpo)
    place = next(i for i, one in enumerate(batch.rollouts) if one.completion_mask[0])
    batch.rollouts[place].logprobs[0] += 0.75
    values = grpo.update(model, engine, environment, batch, settings.grpo)
    assert values["sampler_gap_max"] == pytest.approx(0.75, abs=1e-4)
    assert values["sampler_gap"] < 0.1


def test_a_budget_in_tokens_counts_the_padding() -> None:
    lengths = [5, 30, 7, 12, 6, 12, 40]
    assert micro_batches(lengths, None, 24) == [[0, 4, 2], [3, 5], [1], [6]], "3 x 7 fit, 4 x 12 do not"
    assert micro_batches(lengths, 2, 24) == [[0, 4], [2, 3], [5], [1], [6]], "both limit"
    assert micro_batches(lengths, 3, None) == [[0, 4, 2], [3, 5, 1], [6]]
    assert micro_batches([], None, 24) == []


@pytest.mark.parametrize("tokens", [1, 150, 10**6])
def test_a_budget_in_tokens_changes_no_gradient_of_stage_1(
    model: SearchR3, collection: Collection, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = SFTSettings(batch_size=5, kl_weight=1.0, latent_steps=1)
    engine = make_engine(model, Recipe(sft=settings), settings)
    examples = training_examples(collection, "train")[:5]
    batch = make_batch(collection, list(collection.documents), examples, settings, random.Random(0))
    share = sft.take_share(engine, batch, collection, model)
    expected = sft.compute_gradients(engine, model.backbone, batch, share, settings)
    gradient = gradients(model)
    model.backbone.model.zero_grad()
    sizes, inner = [], sft.collate
    monkeypatch.setattr(sft, "collate", lambda *given: sizes.append(inner(*given).ids.shape) or inner(*given))
    limited = settings.model_copy(update={"micro_batch_tokens": tokens})
    values = sft.compute_gradients(engine, model.backbone, batch, share, limited)
    assert values == pytest.approx(expected, abs=1e-5, rel=1e-5)
    assert (gradients(model) - gradient).abs().max() <= 1e-5 * gradient.abs().max() > 0
    assert all(rows == 1 or rows * width <= tokens for rows, width in sizes)
    assert (max(rows for rows, _ in sizes) == 1) == (tokens == 1) and len(sizes) > (6 if tokens < 10**6 else 0)


def test_forced_tokens_are_not_trained_on(model: SearchR3, collection: Collection) -> None:
    settings = recipe()
    _, batch = experience(model, collection, settings)
    tokens = sum(len(rollout.completion_ids) for rollout in batch.rollouts)
    forced = sum(rollout.forced for rollout in batch.rollouts)
    assert 0 < forced < 12
    assert sum(sum(rollout.completion_mask) for rollout in batch.rollouts) == tokens - forced


def test_every_query_is_seen_once_a_pass_in_a_seeded_order() -> None:
    ids = [f"q{i}" for i in range(12)]
    first = [query_id for step in range(3) for query_id in rollouts.queries_of_step(ids, 4, 0, step)]
    assert sorted(first) == sorted(ids)
    second = [query_id for step in range(3, 6) for query_id in rollouts.queries_of_step(ids, 4, 0, step)]
    assert sorted(second) == sorted(ids)
    assert first != second
    assert rollouts.queries_of_step(ids, 4, 0, 1) == first[4:8]
    assert rollouts.queries_of_step(ids, 4, 1, 1) != first[4:8]
    with pytest.raises(DataError, match="a step needs 13 queries but there are 12"):
        rollouts.queries_of_step(ids, 13, 0, 0)


@pytest.mark.parametrize(("queries", "count"), [(12, 5), (11, 4), (7, 7), (7, 6), (9, 1)])
def test_a_pass_drops_no_query_and_a_step_repeats_none(queries: int, count: int) -> None:
    ids, steps = [f"q{i}" for i in range(queries)], -(-queries // count)
    for number in range(3):
        batches = [rollouts.queries_of_step(ids, count, 0, number * steps + step) for step in range(steps)]
        assert all(len(set(batch)) == count for batch in batches)
        assert {query_id for batch in batches for query_id in batch} == set(ids)


def test_a_policy_that_never_emits_the_token_is_named(model: SearchR3, collection: Collection) -> None:
    settings = recipe()
    favour(model.backbone, model.backbone.embed_token_id, -1000.0)
    engine = make_engine(model, settings, settings.grpo)
    with pytest.raises(RunError, match=r"none of 12 rollouts at step 5 emitted the embed token within \d+ tokens"):
        rollouts.collect(model, world(model, collection, settings.grpo), settings, 4, engine)


def test_the_collapse_alarm_tells_spread_from_collapsed_vectors() -> None:
    assert probe_cosine(np.eye(4)) == pytest.approx(0.0)
    assert probe_cosine(np.array([[1.0, 0.0]] * 4)) == pytest.approx(1.0)


def test_metrics_of_a_batch_by_hand(model: SearchR3, collection: Collection) -> None:
    settings = recipe()
    _, batch = experience(model, collection, settings)
    batch = replace(batch, rollout_seconds=2.0)
    values = signals.describe(batch, make_engine(model, settings, settings.grpo), settings.grpo.reward, 4)
    assert values["forced_share"] == pytest.approx(sum(r.forced for r in batch.rollouts) / 12)
    assert values["reward"] == pytest.approx(sum(batch.feedback.rewards) / 12)
    assert values["share_ge_half"] == pytest.approx(sum(p.ndcg >= 0.5 for p in batch.feedback.parts) / 12)
    assert values["reasoning_tokens_max"] == max(r.reasoning_tokens for r in batch.rollouts)
    sequences = sum(len(r.prompt_ids) + len(r.completion_ids) for r in batch.rollouts)
    decoded = sum(len(r.completion_ids) for r in batch.rollouts)
    assert values["tokens"] == sequences and values["decoded_tokens_per_second"] == pytest.approx(decoded / 2.0)
    rows = signals.rollout_rows(batch, step=3, group_size=4)
    assert [row["query_id"] for row in rows] == ["q00"] * 4 + ["q01"] * 4
    assert rows[0]["parts"]["ndcg"] == batch.feedback.parts[0].ndcg


def test_the_speed_of_several_processes_is_that_of_the_slowest(model: SearchR3, collection: Collection) -> None:
    class Two(Communicator):
        def all_gather(self, value: Any) -> list[Any]:
            return [value, (*value[:-1], [4.0])]

    settings = recipe()
    _, batch = experience(model, collection, settings)
    engine = replace(make_engine(model, settings, settings.grpo), communicator=Two())
    values = signals.describe(replace(batch, rollout_seconds=2.0), engine, settings.grpo.reward, 4)
    decoded = 2 * sum(len(r.completion_ids) for r in batch.rollouts)
    assert values["rollout_seconds"] == 4.0 and values["decoded_tokens_per_second"] == pytest.approx(decoded / 4.0)


def test_no_tensor_is_told_to_another_process(
    model: SearchR3, collection: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = recipe()
    engine = make_engine(model, settings, settings.grpo)
    _, batch = experience(model, collection, settings)
    gathered: list[object] = []
    monkeypatch.setattr(engine.communicator, "all_gather", lambda value: gathered.append(value) or [value])
    signals.describe(batch, engine, settings.grpo.reward, 4)
    assert gathered and b"torch" not in pickle.dumps(gathered), "unpickled on the sender's GPU"


# Bookkeeping


def test_the_schedule_warms_up_and_decays_to_nothing() -> None:
    factors = [warmup_cosine(step, 4, 20) for step in range(21)]
    assert factors[0] == pytest.approx(0.2)
    assert factors[4] == 1.0
    assert factors[20] == pytest.approx(0.0)
    assert factors[4:] == sorted(factors[4:], reverse=True)


def test_a_value_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    run = Run(Recipe(run_dir=str(tmp_path / "run")))
    run.log("grpo", 1, {"reward": 0.5})
    with pytest.raises(RunError, match="reward is nan at step 2 of grpo"):
        run.log("grpo", 2, {"reward": float("nan")})
    assert run.metrics("grpo") == [{"stage": "grpo", "step": 1, "reward": 0.5}]


def test_a_line_that_a_killed_process_left_unfinished_is_dropped(tmp_path: Path) -> None:
    run = Run(Recipe(run_dir=str(tmp_path / "run")))
    run.log("sft", 1, {"loss": 1.0})
    with run.metrics_path.open("a") as file:
        file.write('{"stage": "sft", "st')
    assert [row["step"] for row in run.metrics("sft")] == [1]


def test_a_run_directory_is_never_overwritten(tmp_path: Path) -> None:
    settings = Recipe(run_dir=str(tmp_path / "run"))
    Run(settings.model_copy(update={"base": "a/typo"}))
    run = Run(settings)
    assert "typo" not in (tmp_path / "run" / "settings.yaml").read_text(), "nothing had begun with it"
    run.claim("sft", resume=False)
    run.log("sft", 1, {"loss": 1.0})
    with pytest.raises(ConfigError, match="add --resume"):
        Run(settings).claim("sft", resume=False)
    Run(settings).claim("sft", resume=True)
    with pytest.raises(ConfigError, match="cannot resume: seed is 1 now but 0 in"):
        Run(settings.model_copy(update={"seed": 1}))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("precious")
    with pytest.raises(ConfigError, match="exists and holds no run"):
        Run(Recipe(run_dir=str(tmp_path / "other")))
    assert (tmp_path / "other" / "thesis.txt").read_text() == "precious"
