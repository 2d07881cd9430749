"""Whose reasoning helps a model of benchmarks/real_training.py: its own, the true one, none; the last line is JSON.

    python benchmarks/real_traces.py DATA_ROOT runs/real --seeds 0 1 2      # minutes

The stage-1 model embeds the dev queries in reason mode after texts that are put into its mouth, and the vectors rank
the collection. True traces are made of the dev queries' metadata and relevant documents, as those of training are: what
they score is a bound on what writing alone can gain, not a system.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import numpy as np
import real_collections
from common import machine, say, spread

DIRECT_REPLY = "The embedding is "


def score(root: Path, out: Path, name: str, seed: int) -> dict[str, float]:
    """nDCG@10 on dev of one collection, by what was written."""
    from traces import query_traces

    from search_r3.data.collection import Collection
    from search_r3.evaluation.swapped import measure_in, vectors_after
    from search_r3.model.encoder import SearchR3
    from search_r3.retrieval.index import ExactIndex

    model = SearchR3(out / f"seed{seed}" / "sft" / "model", device="cpu")
    source = Collection.load(root / real_collections.FOLDERS[name])
    qrels = Collection.load(out / "collections" / name).split("dev")
    texts = source.texts()
    index = ExactIndex(list(texts), np.asarray(model.encode_document(list(texts.values()))))
    queries = [source.queries[query_id].text for query_id in qrels]
    traces = [query_traces(source.queries[i], [source.documents[d] for d in gains]) for i, gains in qrels.items()]

    measure = measure_in(index, source, qrels)

    def ranked(vectors: np.ndarray) -> float:
        return float(np.mean(measure(vectors)))

    scores = {"direct mode": ranked(model.encode_query(queries, "direct").vectors)}
    scores["its own"] = ranked(model.encode_query(queries, "reason").vectors)
    given = {"nothing": [""] * len(queries), "the reply of direct mode": [DIRECT_REPLY] * len(queries)}
    given["the query again"] = queries
    for style in sorted(set.intersection(*map(set, traces))):
        given[f"true: {style}"] = [trace[style] for trace in traces]
        given[f"another query's: {style}"] = random.Random(0).sample(given[f"true: {style}"], len(queries))
    return scores | {what: ranked(vectors_after(model, queries, said)) for what, said in given.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, metavar="DATA_ROOT")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--collections", nargs="+", default=list(real_collections.FOLDERS))
    options = parser.parse_args()
    found: dict[str, dict[str, list[float]]] = {}
    for name in options.collections:
        by_seed = [score(options.root, options.out, name, seed) for seed in options.seeds]
        found[name] = {what: [scores[what] for scores in by_seed] for what in by_seed[0]}
        say(f"\n| {name}: written before the vector | nDCG@10 |\n|---|---|")
        for what, values in found[name].items():
            say(f"| {what} | {spread(values)} |")
    print(json.dumps({"benchmark": "real_traces", "seeds": options.seeds, "ndcg@10": found, "machine": machine()}))


if __name__ == "__main__":
    main()
