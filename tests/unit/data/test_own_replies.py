from __future__ import annotations

from benchmarks.smol_own import with_own_replies
from search_r3.data.collection import Collection, Document, Query
from search_r3.model.encoder import SearchR3


def test_own_replies_stand_beside_true_traces_of_the_chosen_queries_alone() -> None:
    documents = {f"d{i}": Document(f"d{i}", f"document {i}") for i in range(3)}
    queries = {f"q{i}": Query(f"q{i}", f"what is {i}?", {"reasoning": {"trace": f"{i}."}, "n": i}) for i in range(3)}
    judged = {f"q{i}": {f"d{i}": 1} for i in range(3)}
    whole = Collection("tiny", documents, queries, {"a": judged, "b": {"q0": {"d0": 1}}})
    model = SearchR3("builtin", device="cpu")
    found = with_own_replies(model, whole, ["a"], 2, 0.7)
    assert list(found.qrels) == ["a"] and len(found.qrels["a"]) == 2
    for query_id, query in found.queries.items():
        reasoning = query.metadata["reasoning"]
        assert reasoning["trace"] == queries[query_id].metadata["reasoning"]["trace"]
        assert query.metadata["n"] == queries[query_id].metadata["n"]
        assert ("own" in reasoning) == (query_id in found.qrels["a"])
    assert "own" not in queries[next(iter(found.qrels["a"]))].metadata["reasoning"], "the given queries stay"
    again = with_own_replies(model, whole, ["a"], 2, 0.7)
    assert [again.queries[one].metadata for one in queries] == [found.queries[one].metadata for one in queries]
