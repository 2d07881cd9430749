from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from huggingface_hub import ModelCard
from model_folders import (
    RL_ROWS,
    SFT_ROWS,
    add_results,
    make_adapter,
    make_evaluation,
    make_run,
    result_of,
)

from search_r3 import __version__
from search_r3.errors import DataError, ModelError, RunError, SearchR3Error
from search_r3.evaluation.table import cell, summary
from search_r3.files import hash_folder
from search_r3.publishing.card import is_own_card, model_card
from search_r3.publishing.facts import find_model, gather_facts

REPO = "someone/tiny"


@pytest.fixture
def run(tmp_path: Path, tiny_path: Path) -> Path:
    return make_run(tmp_path / "run", tiny_path)


def card_of(model: Path, *folders: Path, license_id: str | None = None) -> str:
    return model_card(gather_facts(find_model(model), folders), REPO, license_id)


def row_of(card: str, system: str) -> list[str]:
    [row] = [line for line in card.splitlines() if f"| `{system}` | 0." in line]
    return [part.strip() for part in row.strip("|").split(" | ")]


def test_the_front_matter_holds_the_results_of_the_model_in_the_format_of_the_hub(run: Path, tmp_path: Path) -> None:
    results = add_results(run)
    (tmp_path / "card.md").write_text(card_of(run, license_id="mit"))
    data = ModelCard.load(tmp_path / "card.md").data
    assert (data.library_name, data.pipeline_tag, data.license) == ("search-r3", "feature-extraction", "mit")
    assert "search-r3" in data.tags and data.datasets == ["someone/facts"]
    assert data.model_name == "tiny" and data.base_model is None  # the base is a folder
    found = {(one.metric_type, one.metric_args["mode"]): one for one in data.eval_results}
    own = {result.system.mode: result for result in results if result.system.name.endswith("/rl")}
    assert len(found) == 8 and set(own) == {"direct", "reason"}
    for mode, result in own.items():
        for kind, measure in (("ndcg_at_10", "ndcg@10"), ("recall_at_100", "recall@100"), ("map", "map")):
            one = found[kind, mode]
            assert one.metric_value == result.scores[measure]
            assert one.metric_args["interval_95"] == list(result.intervals[measure])
            assert (one.dataset_name, one.dataset_split) == result.place
            assert one.dataset_args == {"sha256": result.collection.hash}


def test_the_table_holds_the_model_its_state_before_rl_and_baselines(run: Path) -> None:
    results = {result.system.name: result for result in add_results(run)}
    card = card_of(run)
    shown = {
        "direct": "direct/rl", "reason": "reason/rl", "direct, before RL": "direct/sft",
        "reason, before RL": "reason/sft", "bm25": "bm25",
    }  # fmt: skip
    for name, stored in shown.items():
        row = row_of(card, name)
        numbers = summary(results[stored], list(results.values()))
        assert row[4:8] == [cell(numbers, key) for key in ("ndcg@10", "recall@100", "mrr@10", "map")]
    tests = [one for one in json.loads((run / "report.json").read_text())["comparisons"] if "/rl" in str(one)]
    lines = [line for line in card.splitlines() if re.search(r"\| [+-]\d\.\d{3} \| \d", line)]
    assert sorted(re.findall(r"[+-]\d.*\d", line)[0] for line in lines) == sorted(
        f"{one['difference']:+.3f} | {one['p']:.4f} | {one['p_holm']:.4f}" for one in tests
    )
    assert "Of 512 rollouts sampled on queries of the test split, 81.2% (37.5% before RL)" in card
    assert "Sampled rollouts on the test split: forced for 3.4%" in card


def test_training_is_told_from_settings_and_metrics(run: Path) -> None:
    card = card_of(run)
    assert "- Seed: 7" in card and "[someone/facts:plain@main](https://huggingface.co/datasets/someone/facts)" in card
    assert "20 steps, 24 queries per step, peak learning rate 0.0015, 10 s in steps." in card
    assert "5 steps, 16 queries per step, 8 rollouts per query, peak learning rate 0.0003." in card
    end = fmean(row["loss"] for row in SFT_ROWS[-10:])
    assert f"| `loss` | weighted sum of the four | 8 | {end:.4g} |" in card
    tokens = fmean(row["reasoning_tokens"] for row in RL_ROWS[1:])
    assert f"| `reasoning_tokens` | mean per rollout | 11 | {tokens:.4g} |" in card
    assert "| `forced_share` | share of rollouts whose embed token was forced | 0.5 |" in card
    assert "| `dev_ndcg@10_reason` | nDCG@10 on the dev split, steps 0 and 5 | 0.6125 | 0.7375 |" in card
    assert "`triplet`" not in card and "`share_ge_half`" not in card  # no row of this run has them
    assert f"`{hash_folder(run / 'model')}`" in card


def test_the_step_that_was_kept_is_told(run: Path, tiny_path: Path) -> None:
    assert "peak learning rate 0.0003.\n\n| value" in card_of(run)
    settings = run / "settings.yaml"
    settings.write_text(settings.read_text().replace("keep: last", "of_another_version: 1"))
    assert "The model kept is" not in card_of(run)
    make_run(run, tiny_path, grpo={"keep": "best"})
    assert (
        "peak learning rate 0.0003. The model kept is that of step 5, the best on the dev split.\n\n| value"
        in card_of(run)
    )


def test_a_stage_1_model_is_told_without_what_came_after(run: Path) -> None:
    results = {result.system.name: result for result in add_results(run)}
    card = card_of(run / "sft" / "model")
    assert "Stage 1" in card and "Stage 2" not in card and "\ngrpo:" not in card and "before RL" not in card
    assert row_of(card, "reason")[4] == cell(summary(results["reason/sft"]), "ndcg@10")
    assert "37.5% had an nDCG" in card and "81.2%" not in card
    assert len(ModelCard(card).data.eval_results) == 8


def test_a_model_alone_has_a_card_without_any_number_but_its_own_limits(tmp_path: Path, run: Path) -> None:
    alone = (run / "model").rename(tmp_path / "alone")
    card = card_of(alone)
    assert "## Training" not in card and "## Results" not in card and "## Limits" not in card
    assert "model-index" not in card and "base_model" not in card and "license" not in card
    text = card.split("---\n", 2)[2]
    for known in (
        "2510.07048",
        "32 values of length 1",
        "at most 128 tokens",
        __version__,
        hash_folder(alone),
    ):
        assert known in text
        text = text.replace(known, "")
    text = re.sub(r"SHA-256|sha256 \w{64}|search_r3|Search-?R3|search-r3", "", text)
    assert not re.findall(r"\d+", text)


def test_a_run_without_metrics_or_results_says_nothing_of_them(run: Path) -> None:
    (run / "metrics.jsonl").unlink()
    card = card_of(run)
    assert "## Training" in card and "### Stage" not in card and "## Results" not in card and "## Limits" not in card


def test_a_line_that_is_being_written_is_no_row(run: Path) -> None:
    whole = card_of(run)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "grpo", "ste')
    assert card_of(run) == whole


def test_results_of_another_state_of_the_model_are_not_its_own(run: Path, tmp_path: Path) -> None:
    folder = make_evaluation(tmp_path / "out", add_results(run))
    assert row_of(card_of(run, folder), "reason")
    (run / "model" / "generation_config.json").write_text('{"changed": true}')
    card = card_of(run)
    assert "## Results" not in card and "model-index" not in card and "81.2%" not in card and "4,321" not in card
    with pytest.raises(DataError, match=r"no result in .*out/results is of this model as it is now; evaluate it"):
        card_of(run, folder)


def test_the_newest_result_counts_and_only_on_the_data_that_it_is_of(run: Path, tmp_path: Path) -> None:
    add_results(run)
    better = result_of(run / "model", "reason", "reason", day=2)
    better = better.model_copy(update={"scores": better.scores | {"ndcg@10": 0.987654}, "key": "b" * 64})
    assert row_of(card_of(run, make_evaluation(tmp_path / "newer", [better])), "reason")[4].startswith("0.988")
    older = better.model_copy(update={"provenance": {"date": "2020-01-01T00:00:00+00:00"}})
    assert not row_of(card_of(run, make_evaluation(tmp_path / "older", [older])), "reason")[4].startswith("0.988")
    moved = better.collection.model_copy(update={"hash": "f" * 64})
    card = card_of(run, make_evaluation(tmp_path / "moved", [better.model_copy(update={"collection": moved})]))
    assert "`bm25`" not in card and "`direct`" not in card.split("## Results")[1].split("\n", 3)[3]


def test_collections_of_several_folders_stand_side_by_side(run: Path, tmp_path: Path) -> None:
    add_results(run)
    names = ["second", "third"]
    folders = []
    for name in names:
        made = [result_of(run / "model", mode, mode) for mode in ("direct", "reason")]
        made = [one.model_copy(update={"collection": one.collection.model_copy(update={"name": name})}) for one in made]
        folders.append(make_evaluation(tmp_path / name, made))
    card = card_of(run, *folders)
    assert {one.dataset_name for one in ModelCard(card).data.eval_results} == {"first", *names}
    assert "mean over 3 splits" in card


def test_bm25_over_reasoning_stands_only_beside_the_model_that_reasoned(run: Path, tmp_path: Path) -> None:
    reason = result_of(run / "model", "reason", "reason")
    lexical = result_of(None, "bm25+reasoning/x", "")
    for texts, shown in ((reason.key, True), ("0" * 64, False)):
        system = lexical.system.model_copy(update={"settings": {"texts": texts}})
        made = [reason, lexical.model_copy(update={"system": system, "key": texts[::-1]})]
        folder = make_evaluation(tmp_path / texts[:4], made)
        assert ("`bm25+reasoning`" in card_of(run, folder)) == shown


def test_results_with_and_without_instructions_stand_beside_each_other(run: Path, tmp_path: Path) -> None:
    model = run / "model"
    own = result_of(model, "reason", "reason")
    without = result_of(model, "reason (none)", "reason", key="b" * 64)
    settings = without.system.settings | {"instruction": "none"}
    without = without.model_copy(
        update={"system": without.system.model_copy(update={"settings": settings}), "scores": own.scores | {"map": 0.1}}
    )
    lexical = [
        one.model_copy(update={"system": one.system.model_copy(update={"settings": {"texts": of.key}})})
        for one, of in ((result_of(None, "bm25+reasoning", ""), own), (result_of(None, "x", "", key="c" * 64), without))
    ]
    folder = make_evaluation(tmp_path / "evaluation", [own, without, *lexical])
    card = card_of(model, folder)
    for name in ("reason", "reason (none)", "bm25+reasoning", "bm25+reasoning (none)"):
        assert row_of(card, name), name
    (tmp_path / "card.md").write_text(card)
    found = ModelCard.load(tmp_path / "card.md").data.eval_results
    assert {(one.metric_name, one.metric_value) for one in found if one.metric_type == "map"} == {
        ("map, reason", own.scores["map"]), ("map, reason (none)", 0.1),
    }  # fmt: skip
    assert [one.metric_args.get("instruction") for one in found if one.metric_value == 0.1] == ["none"]


def test_shares_that_a_user_should_know_are_among_the_limits(run: Path, tmp_path: Path) -> None:
    reason = result_of(run / "model", "reason", "reason")
    cost = reason.cost.model_copy(update={"forced_share": 0.25, "truncated_queries": 3})
    info = reason.collection.model_copy(update={"without_text": 17})
    changed = reason.model_copy(update={"cost": cost, "collection": info})
    card = card_of(run, make_evaluation(tmp_path / "out", [changed]))
    limits = card.split("## Limits")[1].split("##")[0]
    assert "the embed token was forced for 25.0% of 12 queries" in limits
    assert "one training with seed 7" in limits
    results = card.split("## Results")[1].split("##")[0]
    assert "reason: 3 queries were longer than the model's limit and lost their end." in results
    assert "17 documents without any text were left out." in results


def test_a_sample_is_marked_in_the_card(run: Path, tmp_path: Path) -> None:
    reason = result_of(run / "model", "reason", "reason")
    info = reason.collection.model_copy(update={"sample_of": 400})
    card = card_of(run, make_evaluation(tmp_path / "out", [reason.model_copy(update={"collection": info})]))
    assert "| 12, a sample of 400 |" in card
    assert "name: ndcg@10, reason, a sample" in card and "sample_of: 400" in card


def test_provenance_names_versions_machine_data_and_settings(run: Path) -> None:
    add_results(run)
    provenance = card_of(run).split("## Provenance")[1]
    for known in ("search-r3 9.8.7; torch 2.99.0", "cpu, abacus", "2026-03-01T10:00:00+00:00", "4,321 s", "1.50 GiB"):
        assert known in provenance
    facts = gather_facts(run / "model")
    assert facts.recipe_hash in provenance and facts.own[0].collection.hash in provenance


@pytest.mark.parametrize("place", ["sft/adapter", "grpo/adapter"])
def test_an_adapter_names_its_base_and_has_the_results_of_its_merged_weights(
    run: Path, tiny_path: Path, place: str
) -> None:
    results = {result.system.name: result for result in add_results(run)}
    adapter = make_adapter(run / place, tiny_path, names="owner/base")
    card = card_of(adapter)
    data = ModelCard(card).data
    assert (data.library_name, data.base_model) == ("peft", "owner/base")
    stage = "sft" if place.startswith("sft") else "rl"
    assert row_of(card, "reason")[4] == cell(summary(results[f"reason/{stage}"]), "ndcg@10")
    assert "LoRA of rank 2" in card and f'SearchR3("{REPO}")' in card and f"search-r3 search {REPO}" in card


def test_no_folder_of_this_machine_is_in_a_card(run: Path, tiny_path: Path, tmp_path: Path) -> None:
    add_results(run)
    local = tmp_path / "data" / "mine"
    local.mkdir(parents=True)
    make_run(run, tiny_path, collection=str(local))
    relative = make_run(tmp_path / "other", tiny_path, collection="data/mine")
    for card in (card_of(run), card_of(relative), card_of(make_adapter(run / "sft" / "adapter", tiny_path))):
        assert str(tmp_path) not in card and str(tiny_path.parent) not in card
        assert "`mine`" in card or "`qwen2`" in card
        assert ModelCard(card).data.datasets is None
    assert "does not name its base model by a hub id" in card


def test_a_card_is_ours_until_somebody_changes_it(run: Path) -> None:
    card = card_of(run)
    assert is_own_card(card)
    for other in (
        "",
        "# Mine",
        card.replace("Seed: 7", "Seed: 8"),
        card + "More.\n",
        card.replace("---\n", "---\na: b\n", 1),
    ):
        assert not is_own_card(other)


def test_the_newest_model_of_a_run_is_found(run: Path, tmp_path: Path) -> None:
    assert find_model(run) == run / "model"
    (run / "model").rename(tmp_path / "elsewhere")
    assert find_model(run) == run / "sft" / "model"
    (run / "sft").rename(tmp_path / "gone")
    with pytest.raises(ModelError, match="has no model yet; end its training first"):
        find_model(run)
    with pytest.raises(ModelError, match="is neither a model nor a run"):
        find_model(tmp_path / "nothing")


@pytest.mark.parametrize(
    "name, content, kind, message",
    [
        ("settings.yaml", "a: [", RunError, "is not valid YAML"),
        ("settings.yaml", "just text", RunError, "expected `key: value` lines, found str"),
        (
            "metrics.jsonl",
            '{"stage": "sft", "step": 1}\nnonsense\n',
            RunError,
            r"metrics.jsonl:2: not a JSON object",
        ),
        ("metrics.jsonl", "[1]\n", RunError, r"metrics.jsonl:1: not a JSON object"),
        ("model/search_r3.json", None, ModelError, "search_r3.json is missing: prompts and limits"),
        ("model/search_r3.json", "{}}", ModelError, "not usable as model settings"),
        ("model/config.json", "[]", RunError, "expected a JSON object, found list"),
        ("report.json", "{", RunError, "is not valid JSON"),
        ("results/a.b.c.d.json", "{}", DataError, "is no result of this version"),
    ],
)
def test_a_damaged_file_is_named(
    run: Path, name: str, content: str | None, kind: type[SearchR3Error], message: str
) -> None:
    add_results(run)
    (run / name).unlink(missing_ok=True)
    if content is not None:
        (run / name).write_text(content)
    with pytest.raises(kind, match=message):
        gather_facts(run / "model")


def test_unknown_settings_of_another_version_are_repeated(run: Path, tiny_path: Path) -> None:
    settings = (run / "settings.yaml").read_text()
    (run / "settings.yaml").write_text(settings + "new_in_2030: 5\n")
    card: Any = card_of(run)
    assert "new_in_2030: 5" in card


def test_what_was_trained_from_smol_names_the_base_of_its_adapters(tmp_path: Path, tiny_path: Path) -> None:
    run = make_run(tmp_path / "run", tiny_path)
    settings = (run / "settings.yaml").read_text(encoding="utf-8")
    (run / "settings.yaml").write_text(settings.replace(f"base: {tiny_path}", "base: smol"), encoding="utf-8")
    data = ModelCard(card_of(run / "model")).data
    assert data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
