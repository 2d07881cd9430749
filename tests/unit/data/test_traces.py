from __future__ import annotations

import doctest
import random

import pytest

from benchmarks import traces as module
from benchmarks.traces import join_sentences, pair_query, proof_conclusions, query_traces, standing_questions
from search_r3.data.collection import Document, Query

FACTS = [Document("d1", "a kettle boils water"), Document("d2", "Steam is hot .")]
PROOF = "sent1 & sent2 -> int1: a kettle makes steam; int1 & sent3 -> int2: steam burns; int2 & sent4 -> hypothesis;"


def test_a_proof_tells_what_follows_up_to_the_hypothesis() -> None:
    query = Query("q", "Why is a kettle dangerous?", {"proof": PROOF, "hypothesis": "a kettle can burn", "answer": "b"})
    traces = query_traces(query, FACTS)
    assert traces["proof"] == "A kettle makes steam. Steam burns. So a kettle can burn."
    assert traces["hypothesis"] == "A kettle can burn."
    assert set(traces) == {"proof", "hypothesis", "facts"}, "the bare answer stands in the hypothesis"


def test_a_proof_of_one_step_is_its_hypothesis() -> None:
    query = Query("q", "Why?", {"proof": "sent1 & sent2 -> hypothesis;", "hypothesis": "a kettle can burn"})
    assert set(query_traces(query, FACTS)) == {"hypothesis", "facts"}
    assert proof_conclusions("sent1 & sent2 -> hypothesis;") == []


def test_a_decomposition_keeps_the_questions_that_stand_alone() -> None:
    questions = ["What boils water?", "Is #1 hot?", "What is steam?"]
    assert standing_questions(questions) == ["What boils water?", "What is steam?"]
    traces = query_traces(Query("q", "Is a kettle hot?", {"answer": True, "decomposition": questions}), FACTS)
    assert traces["decomposition"] == "What boils water? What is steam? A kettle boils water. Steam is hot."
    assert "answer" not in traces, "true is no text"


def test_an_answer_comes_before_the_facts() -> None:
    traces = query_traces(Query("q", "What boils?", {"answer": "water"}), FACTS)
    assert traces["answer"] == "The answer is water. A kettle boils water. Steam is hot."


def test_titles_stand_for_long_documents() -> None:
    traces = query_traces(Query("q", "Kettles?"), [Document("d", "A long text. " * 50, "On kettles")])
    assert traces == {"facts": "On kettles."}


def test_a_query_without_anything_has_no_trace() -> None:
    assert query_traces(Query("q", "Kettles?"), []) == {}


def test_traces_end_with_a_whole_sentence_within_the_limit() -> None:
    assert join_sentences(["one two three", "four five six seven", "eight"], words=4) == "One two three. Eight."
    assert join_sentences(["one two three four"], words=2) == "One two."
    assert join_sentences(["is it ?", "", "yes !"]) == "Is it? Yes!"


@pytest.mark.parametrize("seed", range(5))
def test_a_query_made_of_a_short_document_is_a_part_of_it_in_its_order(seed: int) -> None:
    words = "a big copper kettle boils cold water on the stove".split()
    chosen = pair_query(Document("d", " ".join(words)), random.Random(seed)).split()
    assert 0 < len(chosen) < len(words)
    places = [words.index(word) for word in chosen]
    assert places == sorted(places)


def test_a_query_made_of_a_long_document_is_another_sentence_or_the_title() -> None:
    document = Document("d", "Kettles are made of copper. They boil water on a stove. Short one.", "On kettles")
    seen = {pair_query(document, random.Random(seed)) for seed in range(30)}
    assert seen == {"They boil water on a stove.", "On kettles"}


def test_a_document_of_one_word_is_its_own_query() -> None:
    assert pair_query(Document("d", "kettle"), random.Random(0)) == "kettle"


def test_the_examples_in_docstrings_give_what_they_show() -> None:
    result = doctest.testmod(module)
    assert result.attempted > 0 and result.failed == 0
