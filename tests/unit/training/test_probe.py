"""The probe before stage 2, on a tiny model; its sentences, on numbers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from search_r3.config import load_recipe
from search_r3.data.collection import Collection
from search_r3.errors import DataError
from search_r3.evaluation.swapped import measure_in, swapped_reasoning, vectors_after
from search_r3.model.encoder import SearchR3
from search_r3.retrieval.index import ExactIndex
from search_r3.retrieval.metrics import ndcg
from search_r3.training.probe import judge, probe
from tests.conftest import call, favour

GOOD = {
    "forced_share": 0.0, "distinct_reasoning": 1.0, "group_cosine": 0.8, "groups_mixed": 0.7, "groups_all_0": 0.1,
    "groups_all_1": 0.2, "groups_tied": 0.0, "ndcg_direct": 0.5, "ndcg_reason": 0.7, "ndcg_own": 0.7, "ndcg_other": 0.1,
    "ndcg_none": 0.4, "ndcg_true": 0.72, "ndcg_own_where_true": 0.7,
}  # fmt: skip


# The swapped-reasoning test


def test_the_own_reasoning_put_back_gives_the_own_vector(model: SearchR3) -> None:
    favour(model.backbone, model.backbone.embed_token_id, 3.0)
    texts = ["where is the red house?", "where is the blue boat?", "where is the black horse?"]
    prompts = [model.backbone.prompt_encoder.encode(text, "reason").ids for text in texts]
    answers = model.rollouts(prompts, max_new_tokens=24)
    encoder = model.backbone.prompt_encoder
    whole = [
        place
        for place, one in enumerate(answers)
        if encoder.reason_completion(one.reasoning).ids[: len(one.completion_ids)] == one.completion_ids
    ]
    assert whole, "some reply survives being read as text"
    after = vectors_after(model, texts, [one.reasoning for one in answers])
    for place in whole:
        np.testing.assert_allclose(after[place], answers[place].vector, atol=1e-5)
    assert (after[0] * vectors_after(model, texts[:1], ["a chair"])[0]).sum() < 0.999, "what is written moves it"


def test_an_instruction_goes_with_its_query(model: SearchR3) -> None:
    texts, said = ["where is the red house?", "where is the blue boat?"], ["a chair", "a lamp"]
    apart = vectors_after(model, texts, said, ["in the green river", ""])
    together = vectors_after(model, [f"{texts[0]} in the green river", texts[1]], said)
    np.testing.assert_allclose(apart, together, atol=1e-5)
    assert (apart[0] * vectors_after(model, texts, said)[0]).sum() < 0.9999


def test_each_kind_of_text_is_measured(model: SearchR3, monkeypatch: pytest.MonkeyPatch) -> None:
    def vectors(model: object, queries: list[str], texts: list[str], instruction: str) -> Any:
        return list(zip(queries, texts, strict=True))

    monkeypatch.setattr("search_r3.evaluation.swapped.vectors_after", vectors)
    worth = {"": 0.25, "A": 0.5, "B": 0.75, "C": 1.0, "TRUE": 0.9}

    def measure(pairs: Any) -> list[float]:  # the own reasoning is worth its letter, another's nothing
        return [worth[text] if text in ("", "TRUE") or text == query.upper() else 0.0 for query, text in pairs]

    values = swapped_reasoning(model, ["a", "b", "c"], ["A", "B", "C"], measure, {1: "TRUE"})
    assert values == {"own": 0.75, "other": 0.0, "none": 0.25, "true": 0.9, "own_where_true": 0.75}
    assert "true" not in swapped_reasoning(model, ["a", "b"], ["A", "B"], measure)


def test_the_measure_follows_the_ranking_rule(model: SearchR3, collection: Collection) -> None:
    texts = collection.texts()
    index = ExactIndex(list(texts), model.encode_document(list(texts.values())))
    qrels = {"q00": {"d00": 1}, "q01": {"d01": 1}}
    vectors = model.encode_query([collection.queries[one].text for one in qrels], "direct").vectors
    found = index.search(vectors, 10).doc_ids
    expected = [ndcg(doc_ids, gains, 10) for doc_ids, gains in zip(found, qrels.values(), strict=True)]
    assert measure_in(index, collection, qrels)(vectors) == pytest.approx(expected)
    ahead = frozenset(texts) - {"d00"}
    limited = replace(collection, excluded={"q00": ahead})
    assert measure_in(index, limited, qrels)(vectors)[0] == 1.0


# The probe


def test_a_probe_measures_what_stage_2_would_see(
    model: SearchR3, collection: Collection, collection_path: Path, tiny_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    favour(model.backbone, model.backbone.embed_token_id, 3.0)
    recipe = load_recipe(None, ["grpo.splits=[train]", "grpo.group_size=3", "grpo.reward.contrastive=0.5"])
    notes: list[str] = []
    report = probe(model, collection, recipe, 6, notes.append)
    values = report.values
    assert report.queries == 6 and len(notes) == 3
    assert sum(values[f"groups_{name}"] for name in ("all_0", "all_1", "tied", "mixed")) == pytest.approx(1.0)
    shares = [value for name, value in values.items() if name.startswith("advantage_share")]
    assert len(shares) == 4 and sum(shares) == pytest.approx(1.0)
    assert 0 < values["group_cosine"] < 1
    texts, train = collection.texts(), collection.split("train")
    index = ExactIndex(list(texts), model.encode_document(list(texts.values())))
    qrels = {one: train[one] for one in [list(train)[place] for place in (0, 4, 8, 11, 15, 19)]}
    measure, queries = measure_in(index, collection, qrels), [collection.queries[one] for one in qrels]
    asked = [query.text for query in queries]
    assert values["ndcg_direct"] == pytest.approx(np.mean(measure(model.encode_query(asked, "direct").vectors)))
    true = measure(vectors_after(model, asked, [query.metadata["reasoning"]["chain"] for query in queries]))
    assert values["ndcg_true"] == pytest.approx(np.mean(true)), "of the style with the largest weight"
    assert probe(model, collection, recipe, 6).values == values, "drawn from the seed"

    where = [tiny_path, "--collection", collection_path, "--queries", "4", "grpo.splits=[train]", "grpo.group_size=2"]
    assert call(monkeypatch, "probe", *where, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["queries"] == 4 and set(printed["findings"][0]) == {"mend", "text"}
    assert call(monkeypatch, "probe", *where) == 0
    assert "Mend the " in capsys.readouterr().out


def test_a_split_that_is_not_there_and_a_single_query_are_refused(model: SearchR3, collection: Collection) -> None:
    with pytest.raises(DataError, match="rl"):
        probe(model, collection, load_recipe(None))
    with pytest.raises(DataError, match="two queries at least"):
        probe(model, collection, load_recipe(None, ["grpo.splits=[train]"]), 1)


@pytest.mark.parametrize(
    ("changes", "mend", "sentence"),
    [
        ({}, "neither", "Another query's reasoning costs 0.600 nDCG: what is written is read."),
        ({}, "neither", "Reasoning adds 0.200 nDCG to direct mode."),
        ({"ndcg_other": 0.68}, "the reading", "Another query's reasoning serves as well (0.680 against 0.700)"),
        ({"group_cosine": 0.99}, "the reading", "Vectors of one query's rollouts have cosine 0.990"),
        ({"ndcg_true": 0.4, "ndcg_own_where_true": 0.4}, "the reading", "After true reasoning the vector finds less"),
        ({"ndcg_true": 0.9}, "the writing", "True reasoning would be worth 0.200 more than the model's own"),
        ({"ndcg_reason": 0.4}, "the writing", "Reasoning costs 0.100 nDCG beside direct mode."),
        ({"ndcg_reason": 0.51}, "neither", "Reasoning stands level (+0.010 nDCG) with direct mode."),
        ({"distinct_reasoning": 0.1}, "the writing", "Only 10% of the greedy replies differ"),
        ({"forced_share": 0.3}, "the writing", "30% of the replies never emit the embed token: train stage 1 longer"),
        ({"groups_mixed": 0.1, "groups_all_0": 0.8}, "neither", "in most others nothing is found (give log_rank"),
        ({"groups_mixed": 0.1, "groups_all_1": 0.8}, "neither", "in most others nothing is left to find"),
        ({"groups_mixed": 0.1, "groups_tied": 0.8}, "neither", "in most others replies rank alike"),
    ],
)
def test_each_finding_says_what_to_mend(changes: dict[str, float], mend: str, sentence: str) -> None:
    findings = judge(GOOD | changes)
    [finding] = [one for one in findings if sentence in one.text]
    assert finding.mend == mend
    assert len(findings) == len({one.text for one in findings}) >= 2


def test_a_good_model_has_nothing_to_mend() -> None:
    assert {one.mend for one in judge(GOOD)} == {"neither"}
    unknown = {name: value for name, value in GOOD.items() if "true" not in name}
    assert len(judge(unknown)) == len(judge(GOOD)), "without true reasoning nothing is said of it"
