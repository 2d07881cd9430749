"""Dev results of a small model: both modes, and what the vector makes of a reasoning that is put into its mouth."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

from search_r3.data.collection import Collection
from search_r3.evaluation.swapped import measure_in, swapped_reasoning
from search_r3.model.encoder import SearchR3
from search_r3.retrieval.index import ExactIndex

ORDER = (
    "openbookqa",
    "strategyqa_facts",
    "babi_support",
    "entailmentbank",
    "clutrr_relation",
    "nq_qed",
    "hotpotqa_100",
    "cosqa",
)
SHOWN, KEPT = 2, 10


def evaluate(
    name: str,
    model: SearchR3,
    data: Path,
    out: Path,
    sizes: tuple[int, int],
    tell: Callable[[str], None],
    time_left: Callable[[], bool],
) -> dict[str, dict[str, float]]:
    """Collection -> measures, written to `dev.json` and `replies.json` under `name` as they come.

    `sizes`: queries of each collection at most, and documents beside those that they need.
    """
    true_traces = json.loads((data / "traces.json").read_text(encoding="utf-8"))
    folders = [one for one in ORDER if (data / "dev" / one).exists()]
    results: dict[str, dict[str, float]] = {}
    replies: list[dict[str, Any]] = []
    for folder in folders:
        if not time_left():
            tell(f"{name}: no time for {folder}")
            continue
        collection = Collection.load(data / "dev" / folder)
        results[folder], own = measured(model, smaller(collection, *sizes), true_traces.get(folder, {}))
        replies += own
        tell(f"{name} {folder}: " + " ".join(f"{key}={value:.3f}" for key, value in results[folder].items()))
        for reply in own[:SHOWN]:
            tell(f"    {reply['query'][-110:]!r} -> {reply['reasoning']!r}{' (forced)' if reply['forced'] else ''}")
        merge(out / "dev.json", name, results)
        merge(out / "replies.json", name, replies)
    return results


def merge(path: Path, name: str, value: Any) -> None:
    """Put a value under a name into a JSON object."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps({**known, name: value}, indent=1, ensure_ascii=False), encoding="utf-8")


def smaller(collection: Collection, queries: int, documents: int) -> Collection:
    """The first dev queries, and the first documents beside those that they need."""
    qrels = dict(list(collection.split("dev").items())[:queries])
    needed = {one for query_id, gains in qrels.items() for one in (*gains, *collection.pools.get(query_id, ()))}
    needed |= set(list(collection.documents)[:documents])
    kept = {one: document for one, document in collection.documents.items() if one in needed}
    return Collection(collection.name, kept, collection.queries, {"dev": qrels}, pools=collection.pools)


def measured(
    model: SearchR3, collection: Collection, traces: dict[str, str]
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Measures of one collection, and replies."""
    qrels = collection.split("dev")
    query_ids, documents = list(qrels), collection.texts()
    texts = [collection.queries[query_id].text for query_id in query_ids]
    index = ExactIndex(list(documents), model.encode_document(list(documents.values())))
    score = measure_in(index, collection, qrels)
    direct = score(model.encode_query(texts, "direct").vectors)
    started = time.perf_counter()
    reasoned = model.encode_query(texts, "reason")
    seconds = time.perf_counter() - started
    own = score(reasoned.vectors)
    values = {
        "queries": float(len(texts)),
        "direct": fmean(direct),
        "reason": fmean(own),
        "forced": fmean(reasoned.forced),
        "tokens": fmean(reasoned.reasoning_tokens),
        "ms": 1000 * seconds / len(texts),
        "distinct": len(set(reasoned.reasoning)) / len(texts),
    }
    true = {place: traces[one] for place, one in enumerate(query_ids) if traces.get(one)}
    swapped = swapped_reasoning(model, texts, reasoned.reasoning, score, true)
    values |= {name if name == "own_where_true" else f"swap_{name}": value for name, value in swapped.items()}
    if true:
        values["copied"] = fmean(_plain(reasoned.reasoning[place]) == _plain(trace) for place, trace in true.items())
    rows = [
        {
            "collection": collection.name,
            "query": texts[place],
            "reasoning": reasoned.reasoning[place],
            "forced": bool(reasoned.forced[place]),
            "true": traces.get(query_ids[place], ""),
            "direct": direct[place],
            "reason": own[place],
        }
        for place in range(min(len(texts), 40))
    ]
    return values, rows


def _plain(text: str) -> str:
    return text.strip().rstrip(".").lower()
