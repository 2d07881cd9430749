from __future__ import annotations

from collections import Counter

import pytest

from search_r3.data.collection import Collection
from search_r3.data.generators.atlas import (
    MAX_QUERIES_PER_ANSWER,
    SPLIT_SHARES,
    TEMPLATES_PER_ENTITY,
    Atlas,
    build_atlas,
    build_atlas_wide,
    fact_dialogues,
    fact_sentences,
    follow,
    read_atlas,
    split_territories,
)
from search_r3.data.generators.atlas_text import PATHS, RELATIONS
from search_r3.data.generators.splits import divide_groups
from search_r3.data.load import load_collection


@pytest.fixture(scope="module")
def atlas() -> Atlas:
    return read_atlas()


@pytest.fixture(scope="module")
def built() -> Collection:
    return build_atlas()


def test_known_facts_are_right(atlas: Atlas) -> None:
    tashkent = next(doc_id for doc_id, entity in atlas.entities.items() if entity.name == "Tashkent")
    visited = follow(atlas, PATHS["city_script"].relations, tashkent)
    assert visited is not None
    assert [atlas.name(doc_id) for doc_id in visited] == ["Tashkent", "Uzbekistan", "Uzbek", "Latin script"]
    assert atlas.facts["territory_currency"]["territory:JP"] == "currency:JPY"
    assert atlas.facts["territory_language"]["territory:BR"] == "language:pt"
    assert atlas.facts["currency_territory"]["currency:JPY"] == "territory:JP"
    assert "currency:EUR" not in atlas.facts["currency_territory"], "many territories use the euro"
    assert "territory:ME" not in atlas.facts["territory_script"], (
        "Serbian in Latin letters is not Serbian's usual script"
    )


def test_the_collection_is_of_the_promised_size(built: Collection) -> None:
    kinds = Counter(doc_id.partition(":")[0] for doc_id in built.documents)
    assert kinds["city"] > 300
    assert kinds["territory"] > 230
    assert kinds["currency"] > 140
    assert kinds["language"] > 80
    assert kinds["script"] >= 20
    hops = {s: Counter(built.queries[q].metadata["hops"] for q in built.qrels[s]) for s in built.qrels}
    assert set(hops["facts"]) == {1}
    for split in SPLIT_SHARES:
        assert set(hops[split]) == {2, 3}
    assert len(built.qrels["test"]) > 150
    assert 140 <= len(built.qrels["dev"]) <= 170, "choices are made on dev alone, so it must tell 0.03 apart"


def test_the_same_seed_gives_the_same_collection_and_another_another(built: Collection) -> None:
    assert build_atlas(0).content_hash() == built.content_hash()
    assert build_atlas(1).content_hash() != built.content_hash()


def territory_of(atlas: Atlas, query_id: str) -> str:
    path, _, rest = query_id.partition("/")
    start = rest.rsplit("/", 1)[0]
    visited = follow(atlas, PATHS[path].relations, start)
    assert visited is not None
    return next(doc_id for doc_id in visited if doc_id.startswith("territory:"))


def test_every_split_has_its_share_of_the_territories(atlas: Atlas) -> None:
    weights = Counter([*atlas.facts["territory_currency"], *atlas.facts["city_territory"].values()])
    for seed in range(3):
        split_of, filled = split_territories(atlas, seed), Counter[str]()
        for territory, weight in weights.items():
            filled[split_of[territory]] += weight
        for split, share in SPLIT_SHARES.items():
            assert filled[split] / weights.total() == pytest.approx(share, abs=0.005), split


def test_no_territory_is_shared_between_multi_hop_splits(atlas: Atlas, built: Collection) -> None:
    seen = {split: {territory_of(atlas, query_id) for query_id in built.qrels[split]} for split in SPLIT_SHARES}
    for first in seen:
        for second in seen:
            assert first == second or not seen[first] & seen[second], f"{first} and {second} share a territory"
    assert set(split_territories(atlas, 0).values()) == set(SPLIT_SHARES)


@pytest.mark.parametrize("seed", range(4))
def test_no_territory_that_a_choice_has_seen_is_in_test(atlas: Atlas, seed: int) -> None:
    weights = Counter(atlas.facts["city_territory"].values()) + Counter(atlas.facts["territory_currency"].keys())
    of_0_1 = divide_groups(weights, {"sft": 0.30, "rl": 0.30, "dev": 0.10, "test": 0.30}, 0)
    split_of = split_territories(atlas, seed)
    assert {of_0_1[one] for one, split in split_of.items() if split == "test"} == {"sft", "rl"}
    assert {of_0_1[one] for one, split in split_of.items() if split == "dev"} >= {"dev", "test"}


def test_a_seed_in_the_name_divides_anew(built: Collection) -> None:
    assert load_collection("atlas").content_hash() == load_collection("atlas:0").content_hash() == built.content_hash()
    other = load_collection("atlas:1")
    assert other.name == "atlas:1"
    assert other.qrels["test"].keys() != built.qrels["test"].keys()
    assert other.documents == built.documents


def test_no_test_query_and_no_test_chain_stands_in_the_training_text(atlas: Atlas, built: Collection) -> None:
    training = set(fact_sentences(atlas)) | {text for dialogue in fact_dialogues(atlas) for text in dialogue}
    for split in ("facts", "sft", "rl"):
        for query_id in built.qrels[split]:
            training |= {built.queries[query_id].text, *built.queries[query_id].metadata["reasoning"].values()}
    for query_id in built.qrels["test"]:
        query = built.queries[query_id]
        assert query.text not in training
        assert query.metadata["reasoning"]["chain"] not in training


def test_a_constant_answer_cannot_score(built: Collection) -> None:
    for split in SPLIT_SHARES:
        answers = Counter(
            (built.queries[query_id].metadata["path"], next(iter(gains)))
            for query_id, gains in built.qrels[split].items()
        )
        assert max(answers.values()) <= MAX_QUERIES_PER_ANSWER * TEMPLATES_PER_ENTITY[split]


def test_documents_do_not_give_the_facts_away(atlas: Atlas, built: Collection) -> None:
    for relation in ("territory_currency", "territory_language", "language_script"):
        for subject, target in atlas.facts[relation].items():
            assert atlas.name(target) not in built.documents[subject].text


def test_chains_follow_the_facts_and_end_at_the_answer(atlas: Atlas, built: Collection) -> None:
    for split in SPLIT_SHARES:
        for query_id, gains in built.qrels[split].items():
            reasoning = built.queries[query_id].metadata["reasoning"]
            answer = built.documents[next(iter(gains))].title
            assert answer in reasoning["chain"]
            assert reasoning["chain"].startswith(reasoning["partial"])
            assert reasoning["chain"].count(".") >= built.queries[query_id].metadata["hops"]


def test_every_relation_with_questions_has_wordings() -> None:
    for name, relation in RELATIONS.items():
        if relation.questions:
            assert "{s}" in relation.statement and "{o}" in relation.statement, name
            assert all("{s}" in text for text in (*relation.paraphrases, *relation.questions))
    for path in PATHS.values():
        assert all("{s}" in text for text in path.questions)


def test_atlas_wide_adds_distractors_and_changes_no_query(built: Collection) -> None:
    wide = build_atlas_wide()
    assert len(wide.documents) > 15_000
    assert list(wide.documents)[: len(built.documents)] == list(built.documents)
    assert wide.queries == built.queries
    assert wide.qrels == built.qrels
    assert wide.documents["currency:UZS@de"].full_text == "Usbekistan-Sum A currency, in German."
    judged = {doc_id for qrels in wide.qrels.values() for gains in qrels.values() for doc_id in gains}
    assert not any("@" in doc_id for doc_id in judged), "a name in another language answers no query"
    texts = [document.full_text for document in wide.documents.values()]
    assert len(set(texts)) > 0.98 * len(texts)
