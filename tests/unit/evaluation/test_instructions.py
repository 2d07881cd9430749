"""Evaluations with the queries' own instructions, without them, and with a given one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from search_r3.config import EvaluationSettings, GRPOSettings, Recipe
from search_r3.data.collection import Collection
from search_r3.errors import ConfigError
from search_r3.evaluation.benchmark import EvaluationOptions, evaluate
from search_r3.evaluation.instructions import choose
from search_r3.evaluation.report import report
from search_r3.evaluation.runner import EvaluationPlan, reasoning_baseline, run_plan, write_summary
from search_r3.evaluation.search import Searcher
from search_r3.evaluation.systems import EncodedCollections, SearchR3System, index_documents
from search_r3.model.encoder import SearchR3
from search_r3.model.prompts import PLAIN_MODES
from search_r3.training.dev import DevSplit
from search_r3.training.engine import make_engine
from tests.conftest import call, favour

OWN = "Only red things."
QUICK = EvaluationOptions(latency_queries=0, bootstrap=100)


@pytest.fixture
def instructed(collection: Collection) -> Collection:
    """Every second query has an instruction of its own."""
    queries = {
        query_id: replace(query, text=f"{query.text} {OWN}", instruction=OWN) if int(query_id[1:]) % 8 < 4 else query
        for query_id, query in collection.queries.items()
    }
    return replace(collection, name="instructed", queries=queries)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The queries that models encode, with their instructions, collected."""
    texts: list[str] = []
    whole = SearchR3.encode_query

    def encode(self: SearchR3, queries: list[str], *args: Any, **options: Any) -> Any:
        instructions = options.get("instruction", "")
        instructions = [instructions] * len(queries) if isinstance(instructions, str) else instructions
        texts.extend(f"{text}|{instruction}" for text, instruction in zip(queries, instructions, strict=True))
        return whole(self, queries, *args, **options)

    monkeypatch.setattr(SearchR3, "encode_query", encode)
    return texts


@pytest.mark.parametrize(
    ("choice", "with_own", "without"), [("own", OWN, ""), ("none", "", ""), ("Find it.", OWN, "Find it.")]
)
def test_a_choice_of_instructions_reaches_every_query(
    choice: str, with_own: str, without: str, model: SearchR3, instructed: Collection, asked: list[str]
) -> None:
    system = SearchR3System(EncodedCollections(model), "direct", instruction=choice)
    evaluate(system, instructed, "test", QUICK)
    expected = []
    for query_id in instructed.split("test"):
        query = instructed.queries[query_id]
        expected.append(f"{query.bare}|{with_own if query.instruction else without}")
    assert asked == expected and len(set(asked)) == 10


def test_an_instruction_is_in_the_key_and_in_the_settings(
    model: SearchR3, instructed: Collection, tmp_path: Path
) -> None:
    def result(choice: str, documents: str = "", folder: Path | None = tmp_path) -> Any:
        system = SearchR3System(EncodedCollections(model, None, documents), "direct", instruction=choice)
        return evaluate(system, instructed, "test", QUICK, folder=folder)

    results = [result("own"), result("none"), result("Find it."), result("Find a page."), result("own", "A page.")]
    assert len({one.key for one in results}) == 5
    assert [one.system.settings.get("instruction") for one in results] == [
        None, "none", "Find it.", "Find a page.", None,
    ]  # fmt: skip
    assert results[4].system.settings["document_instruction"] == "A page."
    assert results[1].per_query != results[0].per_query, "the model reads it"
    assert result("none") == results[1], "not even the date differs: it was read"


def test_the_documents_of_an_evaluation_have_their_instruction(
    model: SearchR3, instructed: Collection, tmp_path: Path
) -> None:
    texts = [f"{text} A page." for text in instructed.texts().values()]
    expected = model.encode_document(texts)
    for folder in (None, tmp_path):
        index, _ = EncodedCollections(model, folder, "A page.").index(instructed)
        rows = [index.row(doc_id) for doc_id in instructed.documents]
        np.testing.assert_allclose(index.vectors_at(rows), expected, atol=1e-5)
    EncodedCollections(model, tmp_path).index(instructed)
    assert sum(path.is_dir() for path in tmp_path.iterdir()) == 2, "with and without stand beside each other"


def plan(model: Path, folder: Path, **options: Any) -> EvaluationPlan:
    return EvaluationPlan({"": str(model)}, ["direct"], [], [str(folder)], options=QUICK, **options)


def test_where_queries_have_instructions_both_are_reported(
    tiny_path: Path, collection: Collection, instructed: Collection, tmp_path: Path
) -> None:
    for one in (collection, instructed):
        one.save(tmp_path / one.name)
    results = list(run_plan(plan(tiny_path, tmp_path / "instructed"), tmp_path / "out"))
    assert [one.system.name for one in results] == ["direct", "direct (none)"]
    write_summary(results, tmp_path / "out", 100, 0)
    table = (tmp_path / "out" / "summary.md").read_text()
    assert "| `direct` |" in table and "| `direct (none)` |" in table
    assert [one.system.name for one in run_plan(plan(tiny_path, tmp_path / "small"), tmp_path / "out")] == ["direct"]
    only = plan(tiny_path, tmp_path / "instructed", instructions=["own"])
    assert [one.system.name for one in run_plan(only, tmp_path / "out")] == ["direct"]
    several = plan(tiny_path, tmp_path / "small", instructions=["none", "Find [a] page|now."])
    assert [one.system.name for one in run_plan(several, tmp_path / "out")] == [
        "direct (none)", "direct (Find a page now.)",
    ]  # fmt: skip
    alike = [f"Given a question, retrieve passages that answer {end}" for end in ("it", "the question")]
    with pytest.raises(ConfigError, match=r"two instructions begin alike and are both called 'direct \(Given a quest"):
        list(run_plan(plan(tiny_path, tmp_path / "small", instructions=alike), tmp_path / "out"))


def test_an_evaluation_of_changed_instructions_leaves_none_out(
    tiny_path: Path, instructed: Collection, tmp_path: Path
) -> None:
    own = instructed.queries["q03"]
    queries = {name: replace(own, query_id=name) for name in ("q-og", "q-changed")}
    qrels = {"test": {name: {"d03": 1, "d05": 1} for name in queries}}
    following = replace(instructed, queries=queries, qrels=qrels, changed={"q": frozenset({"d03"})})
    following.save(tmp_path / "follow")
    [result] = run_plan(plan(tiny_path, tmp_path / "follow"), tmp_path / "out")
    assert result.system.name == "direct" and own.instruction and "p-mrr" in result.scores


def test_reasoning_of_each_instruction_is_a_baseline_of_its_own(model: SearchR3, instructed: Collection) -> None:
    favour(model.backbone, model.backbone.embed_token_id, 2.0)
    for name, expected in (
        ("reason", "bm25+reasoning"),
        ("reason (none)", "bm25+reasoning (none)"),
        ("reason/rl (none)", "bm25+reasoning/rl (none)"),
    ):
        system = SearchR3System(EncodedCollections(model), "reason", name)
        assert reasoning_baseline(evaluate(system, instructed, "test", QUICK)).info.name == expected


def test_the_report_of_a_run_has_both(
    model: SearchR3, instructed: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    favour(model.backbone, model.backbone.embed_token_id, 2.0)
    monkeypatch.setattr(report, "SearchR3", lambda path, dtype: model)
    recipe = Recipe(
        max_length=120,
        max_new_tokens=4,
        grpo=GRPOSettings(group_size=2),
        evaluation=EvaluationSettings(bootstrap=100, rollout_queries=2),
    )
    models = {"sft": tmp_path, "rl": tmp_path}
    results, _, _ = report.evaluate_run(recipe, instructed, models, tmp_path / "results", lambda text: None)
    systems = [f"{mode}/{stage}{end}" for stage in ("sft", "rl") for mode in PLAIN_MODES for end in ("", " (none)")]
    assert [result.system.name for result in results] == ["bm25", "bm25+reasoning", *systems]
    by_name = {result.system.name: result for result in results}
    assert by_name["bm25+reasoning"].system.settings["texts"] == by_name["reason/rl"].key


def test_sampled_rollouts_of_a_report_have_the_queries_own_instructions(
    model: SearchR3, instructed: Collection, asked: list[str]
) -> None:
    index = index_documents(model, instructed.documents)
    recipe = Recipe(evaluation=EvaluationSettings(rollout_queries=10), grpo=GRPOSettings(group_size=2))
    report.sampled_rewards(recipe, instructed, model, index)
    queries = [instructed.queries[query_id] for query_id in instructed.split("test")]
    assert asked == [f"{query.bare}|{query.instruction}" for query in queries for _ in range(2)]


def test_training_measures_dev_queries_with_their_own_instructions(
    model: SearchR3, instructed: Collection, asked: list[str]
) -> None:
    recipe = Recipe(max_length=120, max_new_tokens=4, grpo=GRPOSettings())
    DevSplit(instructed, EvaluationSettings()).evaluate(model, make_engine(model, recipe, recipe.grpo))
    queries = [instructed.queries[query_id] for query_id in instructed.split("dev")]
    assert sorted(set(asked)) == sorted(f"{query.bare}|{query.instruction}" for query in queries)
    assert any(query.instruction for query in queries)


def test_a_search_asks_with_its_instruction(model: SearchR3, collection: Collection) -> None:
    plain, told = (Searcher(model, collection.documents, instruction=one) for one in ("", OWN))
    joined = plain.search(f"a house {OWN}", "direct")
    assert told.search("a house", "direct").documents == joined.documents
    assert list(told.stream("a house", "direct"))[-1].documents == joined.documents
    assert plain.search("a house", "direct").documents != joined.documents


def test_a_given_instruction_does_not_replace_the_own_one() -> None:
    assert [choose(choice, "Own.", "Task's.") for choice in ("own", "none", "Given.")] == ["Own.", "", "Own."]
    assert [choose(choice, "", "Task's. ") for choice in ("own", "none", "Given.")] == ["Task's.", "", "Given."]


def test_the_commands_leave_documents_without_text_out_and_say_so(
    tiny_path: Path, instructed: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    instructed.save(tmp_path / "data")
    with (tmp_path / "data" / "corpus.jsonl").open("a") as corpus:
        corpus.write('{"_id": "zz", "text": ""}\n')
    model = [tiny_path, "a house", "-c", tmp_path / "data", "--mode", "direct", "--untrained"]
    for args in (
        ["encode", tiny_path, tmp_path / "index", "-c", tmp_path / "data", "--untrained"],
        ["search", *model, "--index", tmp_path / "index"],
        ["search", *model],
        ["data", "mine", tmp_path / "data", tmp_path / "mined", "--with", "bm25", "--splits", "test"],
    ):
        assert call(monkeypatch, *args) == 0
        assert "1 documents without any text are left out" in capsys.readouterr().err


def test_the_commands_take_instructions(
    tiny_path: Path, instructed: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    instructed.save(tmp_path / "data")
    index, where = tmp_path / "index", ["-c", tmp_path / "data"]
    assert (
        call(monkeypatch, "encode", tiny_path, index, *where, "--document-instruction", "A page.", "--untrained") == 0
    )
    search = ["search", tiny_path, "a house", *where, "--mode", "direct", "--untrained", "-k", 3, "--index", index]
    capsys.readouterr()
    assert call(monkeypatch, *search) == 2
    assert "with document_instruction='A page.', not ''; nothing in it was changed" in capsys.readouterr().err
    shown = []
    for instruction in ("", OWN):
        told = [*search, "--document-instruction", "A page.", "--instruction", instruction]
        assert call(monkeypatch, *told) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] != shown[1], "the instruction of the query is read too"
    args = ["evaluate", "-m", tiny_path, *where, "--modes", "direct", "--out", tmp_path / "out"]
    args += ["--bootstrap", 100, "--permutations", 100, "--latency-queries", 0]
    assert call(monkeypatch, *args, "--instruction", "none", "Find it.") == 0
    out = capsys.readouterr().out
    assert "direct (none)" in out and "direct (Find it.)" in out
    assert call(monkeypatch, *args, "--instruction", " ") == 2
    assert "--instruction is empty; give a text, `own`, or `none`" in capsys.readouterr().err
