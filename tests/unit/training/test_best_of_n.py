"""Best of n: which reply wins, what is written, going on after a kill, rounds; on numbers and on tiny models."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from search_r3.config import load_recipe
from search_r3.data.collection import Collection
from search_r3.errors import ConfigError, DataError
from search_r3.evaluation.swapped import measure_in
from search_r3.model.encoder import SearchR3
from search_r3.model.engine.decoding import Rollout
from search_r3.model.source import find_files
from search_r3.retrieval.index import ExactIndex
from search_r3.training.best_of_n import BestOfNSettings, best_of_n, choose, train_best_of_n
from search_r3.training.rl import samples as sampling
from search_r3.training.rl.samples import Sample, Sampler
from tests.conftest import call, favour

NEAR = Sample("near", 5, "emitted", 0.63, 0.9, 0.4)
FAR = Sample("far", 5, "emitted", 0.0, 0.4, 0.1)
DIRECT = Sample("", 0, "emitted", 0.63, 0.9, 0.4)
KEEP_ALL = BestOfNSettings(samples=3, min_ndcg=0)


# The winner


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        ([FAR, NEAR], NEAR),
        ([FAR, replace(FAR, reasoning="nearer", log_rank=0.5)], "nearer"),
        ([replace(NEAR, reasoning="deep", log_rank=0.95, contrastive=0.2), NEAR], "deep"),
        ([NEAR, replace(NEAR, reasoning="sure", contrastive=0.5, tokens=60)], "sure"),
        ([NEAR, replace(NEAR, reasoning="short", tokens=4)], "short"),
        ([NEAR, replace(NEAR, reasoning="second")], "near"),
        ([NEAR, replace(NEAR, reasoning="noise", ndcg=0.63 + 1e-15, contrastive=0.3)], "near"),
        ([replace(NEAR, ending="cut", ndcg=1.0), FAR], FAR),
        ([replace(NEAR, ending="ended", ndcg=1.0), FAR], FAR),
        ([replace(NEAR, reasoning=" \n", ndcg=1.0), FAR], FAR),
        ([replace(NEAR, ending="cut"), replace(NEAR, ending="ended")], "forced"),
        ([replace(NEAR, reasoning=""), replace(NEAR, ending="cut")], "empty"),
    ],
)
def test_the_best_ranking_reply_that_ended_by_itself_wins(samples: list[Sample], expected: Any) -> None:
    result = choose(samples, DIRECT, KEEP_ALL)
    if isinstance(expected, Sample) or isinstance(result, str):
        assert result == expected
    else:
        assert result.reasoning == expected


def test_a_reply_that_ended_its_turn_wins_where_that_is_accepted() -> None:
    settings = replace(KEEP_ALL, accept_ended=True)
    ended = replace(NEAR, ending="ended")
    assert choose([ended, FAR], DIRECT, settings) == ended
    assert choose([replace(NEAR, ending="cut"), FAR], DIRECT, settings) == FAR


def test_a_winner_reaches_the_minimum_and_passes_direct_mode_where_asked() -> None:
    assert choose([NEAR, FAR], DIRECT, BestOfNSettings(min_ndcg=0.63)) == NEAR
    assert choose([NEAR, FAR], DIRECT, BestOfNSettings(min_ndcg=0.64)) == "below_min_ndcg"
    above = BestOfNSettings(above_direct=True, min_ndcg=0)
    assert choose([replace(NEAR, contrastive=0.9)], DIRECT, above) == "not_above_direct", "ranks decide"
    assert choose([NEAR], DIRECT, above) == "not_above_direct"
    assert choose([NEAR], replace(DIRECT, log_rank=0.8), above) == NEAR, "deeper ranks count"
    assert choose([NEAR], replace(DIRECT, ndcg=0.7, log_rank=0.8), above) == "not_above_direct"


@pytest.mark.parametrize(
    "values",
    [
        {"samples": 0}, {"sampling_temperature": -1}, {"sampling_temperature": 0}, {"min_ndcg": 1.1}, {"style": " "},
        {"limit": 0},
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"expected|one and the same"):
        BestOfNSettings(**values)
    assert BestOfNSettings(samples=1, sampling_temperature=0).samples == 1, "one greedy reply is fine"


# Sampling


@pytest.fixture
def writer(model: SearchR3) -> SearchR3:
    """A random model that emits the embed token after a few random tokens, or after none."""
    favour(model.backbone, model.backbone.embed_token_id, 3.0)
    model.backbone.settings = model.backbone.settings.model_copy(update={"max_new_tokens": 16})
    return model


def groups_of(writer: SearchR3, collection: Collection, cache: Path, query_ids: list[str], **options: Any) -> list[Any]:
    qrels = {one: collection.qrels["train"][one] for one in query_ids}
    return list(Sampler(writer, collection, qrels, cache, samples=4, sampling_temperature=1.0, **options).groups())


def test_a_model_that_decides_is_sampled_in_mode_reason_where_it_always_writes(
    writer: SearchR3, collection: Collection, tmp_path: Path
) -> None:
    favour(writer.backbone, writer.backbone.embed_token_id, 50.0)
    [free] = groups_of(writer, collection, tmp_path / "free", ["q00"])
    assert {one.tokens for one in free.samples} == {0}
    writer.backbone.settings = writer.backbone.settings.model_copy(update={"gate": "policy"})
    [held] = groups_of(writer, collection, tmp_path / "held", ["q00"])
    assert {one.tokens for one in held.samples} == {1}


def test_replies_are_scored_as_the_evaluation_scores_them(
    writer: SearchR3, collection: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    qrels, texts, rollouts = collection.qrels["train"], collection.texts(), list[Rollout]()
    roll_out = writer.rollouts

    def watched(*args: Any, **options: Any) -> list[Rollout]:
        replies = roll_out(*args, **options)
        rollouts.extend(replies if options.get("seeds") else [])
        return replies

    monkeypatch.setattr(writer, "rollouts", watched)
    groups = groups_of(writer, collection, tmp_path, list(qrels))
    index = ExactIndex(list(texts), writer.encode_document(list(texts.values())))
    measure = measure_in(index, collection, qrels)
    asked = [collection.queries[one].text for one in qrels]
    direct = measure(writer.encode_query(asked, "direct").vectors)
    assert [group.direct.ndcg for group in groups] == pytest.approx(direct)
    for place in range(4):
        replies = rollouts[place::4]
        own = [group.samples[place] for group in groups]
        assert [one.ndcg for one in own] == pytest.approx(measure(np.stack([one.vector for one in replies])))
        assert [one.reasoning for one in own] == [one.reasoning for one in replies]
        assert [one.tokens for one in own] == [one.reasoning_tokens for one in replies]
        assert [one.ending == "emitted" for one in own] == [not one.forced for one in replies]
        assert all((one.ndcg > 0) <= (one.log_rank > 1 / 3) for one in own), "rank 10 is 2/3"
    assert len({one.reasoning for group in groups for one in group.samples}) > 20


def test_how_a_reply_ended_is_told_apart(writer: SearchR3, collection: Collection, tmp_path: Path) -> None:
    [first, *_] = collection.qrels["train"]
    favour(writer.backbone, writer.backbone.embed_token_id, -1e4)
    [group] = groups_of(writer, collection, tmp_path / "cut", [first])
    assert {one.ending for one in group.samples} <= {"cut", "ended"} and "cut" in {one.ending for one in group.samples}
    favour(writer.backbone, writer.backbone.tokenizer.eos_token_id, 1e4)
    [group] = groups_of(writer, collection, tmp_path / "ended", [first])
    assert {one.ending for one in group.samples} == {"ended"}


def test_a_query_has_the_same_replies_in_any_company(writer: SearchR3, collection: Collection, tmp_path: Path) -> None:
    train = list(collection.qrels["train"])

    def written(query_ids: list[str], **options: Any) -> list[list[str]]:
        groups = groups_of(writer, collection, tmp_path, query_ids, **options)
        return [[one.reasoning for one in group.samples] for group in groups]

    whole = written(train)
    assert written(train[5:7]) == whole[5:7]
    assert written(train[5:7], seed=1) != whole[5:7]


def test_a_killed_call_goes_on_and_another_rule_samples_nothing(
    writer: SearchR3, collection: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "BLOCK", 6)
    whole = best_of_n(writer, collection, tmp_path / "whole", KEEP_ALL, cache=tmp_path / "a", splits=["train"])
    roll_out, calls = writer.rollouts, 0

    def killed(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:  # of a block: its replies, then direct mode
            raise KeyboardInterrupt
        return roll_out(*args, **options)

    monkeypatch.setattr(writer, "rollouts", killed)
    with pytest.raises(KeyboardInterrupt):
        best_of_n(writer, collection, tmp_path / "out", KEEP_ALL, cache=tmp_path / "b", splits=["train"])
    assert not (tmp_path / "out").exists()
    report = best_of_n(writer, collection, tmp_path / "out", KEEP_ALL, cache=tmp_path / "b", splits=["train"])
    assert report.resumed == 1 and whole.resumed == 0
    for name in ("queries.jsonl", "qrels/train.tsv"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    monkeypatch.setattr(writer, "rollouts", None)
    monkeypatch.setattr(writer, "encode_document", None)
    stricter = replace(KEEP_ALL, min_ndcg=0.3)
    best_of_n(writer, collection, tmp_path / "out", stricter, cache=tmp_path / "b", splits=["train"])


# What is written


def test_the_collection_holds_the_winners_and_the_other_splits(
    writer: SearchR3, collection: Collection, tmp_path: Path
) -> None:
    settings = replace(KEEP_ALL, min_ndcg=0.3)
    report = best_of_n(writer, collection, tmp_path / "out", settings, cache=tmp_path / "cache", splits=["train"])
    written = Collection.load(tmp_path / "out")
    train = list(collection.qrels["train"])
    qrels = {one: collection.qrels["train"][one] for one in train}
    sampler = Sampler(writer, collection, qrels, tmp_path / "cache", samples=3, sampling_temperature=1.0)
    groups = list(sampler.groups())
    results = {group.query_id: choose(group.samples, group.direct, settings) for group in groups}
    winners = {one: result for one, result in results.items() if isinstance(result, Sample)}
    assert 0 < len(winners) < len(train)
    assert written.qrels["train"] == {one: qrels[one] for one in winners}
    assert all(written.qrels[name] == collection.qrels[name] for name in ("dev", "test"))
    assert written.documents == collection.documents
    for query_id, query in written.queries.items():
        own = {"own": winners[query_id].reasoning} if query_id in winners else {}
        assert query.metadata["reasoning"] == collection.queries[query_id].metadata["reasoning"] | own
    assert json.loads((tmp_path / "out" / "best-of-n.json").read_text()) == json.loads(json.dumps(report.__dict__))
    assert report.queries == len(train) and report.kept == len(winners)
    assert report.kept + sum(report.left_out.values()) == report.queries
    replies = [group.samples for group in groups]
    assert report.ndcg_first == pytest.approx(np.mean([own[0].ndcg for own in replies]))
    assert report.ndcg_mean == pytest.approx(np.mean([[one.ndcg for one in own] for own in replies]))
    emitted = [[one.ndcg for one in own if one.ending == "emitted" and one.reasoning.strip()] for own in replies]
    assert report.ndcg_best == pytest.approx(np.mean([max(own, default=0) for own in emitted]))
    assert report.ndcg_direct == pytest.approx(np.mean([group.direct.ndcg for group in groups]))
    assert report.tokens == sum(one.tokens for own in replies for one in own)
    assert 0 < report.forced_share == np.mean([[one.ending != "emitted" for one in own] for own in replies]) < 1

    alone = replace(settings, replace=True, style="mine")
    best_of_n(writer, collection, tmp_path / "out", alone, cache=tmp_path / "cache", splits=["train"])
    queries = Collection.load(tmp_path / "out").queries
    assert all(queries[one].metadata["reasoning"] == {"mine": winner.reasoning} for one, winner in winners.items())
    assert "own" not in collection.queries[next(iter(winners))].metadata["reasoning"], "the given queries stay"


def test_a_limit_takes_a_sample_and_an_empty_split_is_left_out(
    writer: SearchR3, collection: Collection, tmp_path: Path
) -> None:
    [only] = list(collection.qrels["train"])[:1]
    split = replace(collection, qrels=collection.qrels | {"one": {only: collection.qrels["train"][only]}})
    settings = replace(KEEP_ALL, limit=3, seed=3)
    report = best_of_n(writer, split, tmp_path / "out", settings, cache=tmp_path / "cache", splits=["train", "one"])
    written = Collection.load(tmp_path / "out")
    assert report.queries == 3 and len(written.qrels["train"]) <= 3
    assert ("one" in written.qrels) == (only in written.qrels["train"])


def test_no_winner_at_all_is_an_error_and_leaves_what_was_there(
    writer: SearchR3, collection: Collection, tmp_path: Path
) -> None:
    favour(writer.backbone, writer.backbone.embed_token_id, -1e4)
    with pytest.raises(DataError, match=r"none of 20 queries .* \(forced 20\).* more samples"):
        best_of_n(writer, collection, tmp_path / "out", KEEP_ALL, cache=tmp_path / "cache", splits=["train"])
    assert not (tmp_path / "out").exists()
    favour(writer.backbone, writer.backbone.tokenizer.eos_token_id, 3.0)
    writer.backbone.model.get_output_embeddings().bias.data[writer.backbone.embed_token_id] = -1e4
    with pytest.raises(DataError, match=r"try accept_ended, since \d+ replies ended without the token, more samples"):
        best_of_n(writer, collection, tmp_path / "out", KEEP_ALL, cache=tmp_path / "ended", splits=["train"])
    (tmp_path / "notes").mkdir()
    with pytest.raises(DataError, match="is no collection"):
        best_of_n(writer, collection, tmp_path / "notes", KEEP_ALL, cache=tmp_path / "cache", splits=["train"])


# Commands


LEARN = ["sft.splits={train: 1}", "sft.reasoning_styles={own: 1}", "sft.steps=2", "sft.batch_size=4"]
LIMITS = ["max_length=120", "max_new_tokens=16"]


def test_stage_1_learns_from_what_the_command_writes(
    run_dir: Path, collection_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    model, out = run_dir / "sft" / "model", tmp_path / "own"
    where = ["--collection", collection_path, "--splits", "train", "-n", "2", "--min-ndcg", "0", "--seed", "1"]
    assert call(monkeypatch, "best-of-n", model, out, *where) == 0
    assert "of 20 queries have a winner" in capsys.readouterr().out
    report = json.loads((out / "best-of-n.json").read_text())
    assert report["settings"]["samples"] == 2 and report["splits"] == ["train"] and report["kept"] > 0
    learn = [f"run_dir={tmp_path / 'run'}", f"base={model}", f"collection={out}", *LEARN, *LIMITS]
    assert call(monkeypatch, "sft", *learn) == 0
    trained = json.loads((tmp_path / "run" / "sft" / "model" / "search_r3.json").read_text())
    assert trained == json.loads((model / "search_r3.json").read_text()), "wording and ids of the base are kept"
    origin = json.loads((tmp_path / "run" / "sft" / "begun-from.json").read_text())
    assert origin["source"] == str(model)
    assert call(monkeypatch, "best-of-n", model, out, *where) == 2
    assert "nothing is overwritten" in capsys.readouterr().err
    assert call(monkeypatch, "best-of-n", model, out, *where, "--rounds", "1") == 2
    assert "add --resume to go on with its rounds" in capsys.readouterr().err


def test_each_round_samples_with_the_model_of_the_one_before(
    run_dir: Path, collection: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(None, [*LEARN, *LIMITS])
    loaded: list[str] = []

    def load(source: str) -> SearchR3:
        loaded.append(source)
        return SearchR3(source, device="cpu")

    def rounds(count: int, settings: BestOfNSettings = KEEP_ALL, **options: Any) -> Path:
        return train_best_of_n(
            *(recipe, run_dir / "sft" / "model", collection, tmp_path / "out", settings),
            rounds=count, splits=["train"], load=load, **options,
        )  # fmt: skip

    assert rounds(1) == tmp_path / "out" / "round-1" / "sft" / "model"
    with pytest.raises(ConfigError, match="add --resume"):
        rounds(1)
    notes: list[Any] = []
    last = rounds(2, resume=True, note=notes.append)
    assert last == tmp_path / "out" / "round-2" / "sft" / "model"
    first = tmp_path / "out" / "round-1" / "sft" / "model"
    assert loaded == [str(run_dir / "sft" / "model"), str(first)], "the first round is not sampled again"
    assert [one.settings["seed"] for one in notes] == [1] and notes[0].model["source"] == str(first)
    assert load_recipe(tmp_path / "out" / "round-2" / "settings.yaml").base == str(first)
    assert rounds(2, resume=True) == last and len(loaded) == 2
    with pytest.raises(ConfigError, match=r"cannot resume: min_ndcg is 0.1 now but 0 in"):
        rounds(2, replace(KEEP_ALL, min_ndcg=0.1), resume=True)
    before, after = (SearchR3(one, device="cpu").encode_document(["a red house"]) for one in (first, last))
    assert np.abs(before - after).max() > 1e-6, "each round trains"


def test_a_model_that_no_stage_begins_from_is_refused_before_it_samples(
    run_dir: Path, collection: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = run_dir / "sft" / "model"
    files = replace(find_files(model), queries=model)
    monkeypatch.setattr("search_r3.training.best_of_n.find_files", lambda source: files)
    with pytest.raises(ConfigError, match="only a stage that keeps documents goes on from there"):
        train_best_of_n(
            *(load_recipe(None, [*LEARN, *LIMITS]), model, collection, tmp_path / "out", KEEP_ALL), splits=["train"]
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["max_length=100"], "sft.documents=frozen with max_length=100, but .* max_length=120; set that"),
        (["lora={rank: 4, target_modules: [no_such_layer]}"], "lora.target_modules"),
        (
            ["lora.rank=4", "sft.kl_weight=0.1"],
            "sft.kl_weight is 0.1, .* the second round cannot measure it, .* one round",
        ),
    ],
)
def test_what_cannot_keep_its_documents_is_refused_before_it_samples(
    run_dir: Path, collection: Collection, tmp_path: Path, more: list[str], message: str
) -> None:
    recipe = load_recipe(None, [*LEARN, *LIMITS, "sft.documents=frozen", *more])
    where = run_dir / "sft" / "model", collection, tmp_path / "out"
    with pytest.raises(ConfigError, match=message):
        train_best_of_n(recipe, *where, KEEP_ALL, rounds=2, splits=["train"])
    assert not (tmp_path / "out").exists()


def test_wrong_calls_are_told_so(
    run_dir: Path, collection_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    model = run_dir / "sft" / "model"

    def error(*args: object) -> str:
        assert call(monkeypatch, "best-of-n", model, tmp_path / "out", "--collection", collection_path, *args) == 2
        assert not (tmp_path / "out").exists()
        return " ".join(capsys.readouterr().err.split())

    assert "no split 'rl'" in error()
    assert "one and the same reply" in error("--splits", "train", "--temperature", "0")
    assert "min-ndcg" in error("--splits", "train", "--min-ndcg", "2")
    assert "add sft.splits='{train: 1}' sft.reasoning_styles='{own: 1}'" in error("--rounds", "1", "--splits", "train")
    assert "sft.steps=2 is a setting of stage 1" in error("sft.steps=2", "--splits", "train")
    assert "no split 'rl'" in error("evaluation.dev_split=dev"), "it says whose queries are not sampled for"
    rounds = ("--rounds", "1", "--splits", "train", "sft.stepz=2")
    assert "unknown setting 'sft.stepz'" in error(*rounds), "a setting is no split"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "in one process" in error("--splits", "train")
