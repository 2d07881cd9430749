"""Queries that reason before they embed: ours beside `transformers.generate` with a second forward pass.

    pip install search-r3[benchmarks]
    python benchmarks/queries.py                    # half an hour on two cores
    python benchmarks/queries.py --shape 12x768 --out runs/queries.json
    python benchmarks/queries.py --quick            # within a minute

Both sides hold the same random Qwen2 (its tokenizer is a real one), get the same prompt ids, decode greedily, and end
each reply at the same length; lengths are spread as those of real reasoning are. Beforehand the peer tries every batch
size of --batch-sizes and keeps its best. Then the sides alternate: all queries at once, and queries one at a time.
The vectors of both must agree to 1e-4 wherever both wrote the same ids; greedy decoding of a random model meets a near
tie now and then, which the order of additions decides, so a few replies may differ.

The ratio is queries/s, ours by the peer's; `latency` holds seconds per single query. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from common import (
    GenerateThenEmbed,
    Shape,
    add_arguments,
    alternating,
    atlas_texts,
    check_vectors,
    fastest,
    finish,
    machine,
    make_model,
    need,
    never_ending,
    prepare,
    ratio_of_medians,
    reasoning_lengths,
    say,
    seconds,
    versions,
)

SAME_REPLIES = 0.9
"""Share of replies that must be the same on both sides."""


def load(options: argparse.Namespace, folder: Path) -> tuple[Any, list[list[int]]]:
    """Our model, which holds the peer's weights too, and the prompts."""
    from search_r3 import SearchR3
    from search_r3.data.load import load_collection

    collection = load_collection(options.collection)
    texts = atlas_texts() if options.collection.startswith("atlas") else collection_texts(collection)
    make_model(folder, texts[:3000] if options.quick else texts, options.shape, options.vocabulary, 1024, options.seed)
    model = SearchR3(folder, device="cpu")
    never_ending(model.backbone)
    queries = sorted(query.text for query in collection.queries.values())
    chosen = [queries[i % len(queries)] for i in np.random.default_rng(options.seed).permutation(options.queries)]
    return model, [model.backbone.prompt_encoder.encode(text, "reason").ids for text in chosen]


def collection_texts(collection: Any) -> list[str]:
    documents = [document.full_text for document in collection.documents.values()]
    return documents + [query.text for query in collection.queries.values()]


def compare(ours: Any, peer: Any, lengths: list[int], embed_id: int) -> dict[str, Any]:
    """What must hold before speeds mean anything: lengths as asked for, same replies, same vectors."""
    vectors, replies = peer
    assert [rollout.reasoning_tokens for rollout in ours] == lengths == [len(reply) for reply in replies]
    assert all(rollout.completion_ids[-1] == embed_id for rollout in ours)
    same = [i for i, rollout in enumerate(ours) if rollout.completion_ids[:-1] == replies[i]]
    if len(same) < SAME_REPLIES * len(ours):
        sys.exit(f"only {len(same)} of {len(ours)} greedy replies are the same on both sides: nothing to compare")
    worst = check_vectors(np.stack([ours[i].vector.numpy() for i in same]), vectors[same])
    return {"same_replies": len(same) / len(ours), "largest_difference": worst}


def latencies(ours: Any, peer: Any, prompts: list[list[int]], lengths: list[int], runs: int) -> dict[str, Any]:
    """Seconds of queries that come one at a time: of each query the median, then p50 and p95 over the queries."""
    sides = {"ours": ours, "peer": lambda prompt, length: peer(prompt, length, 1)}
    spent: dict[str, list[list[float]]] = {name: [[] for _ in prompts] for name in sides}
    for run in range(runs):
        for place, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
            for name in list(sides)[:: 1 if (run + place) % 2 == 0 else -1]:
                spent[name][place].append(seconds(sides[name], [prompt], [length]))
        say(f"run {run + 1}/{runs} of single queries")
    values: dict[str, Any] = {}
    for share in (50, 95):
        found = {name: float(np.percentile([median(times) for times in spent[name]], share)) for name in sides}
        values |= {f"{name}_p{share}": value for name, value in found.items()}
        values[f"ratio_p{share}"] = found["ours"] / found["peer"]
    return {**values, "queries": len(prompts), "seconds": spent}


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    model, prompts = load(options, folder)
    backbone = model.backbone
    lengths = reasoning_lengths(len(prompts), options.seed, options.longest)
    peer = GenerateThenEmbed(backbone.model, backbone.tokenizer.pad_token_id, backbone.embed_token_id, 0.0)

    def ours(prompts: list[list[int]], lengths: list[int]) -> Any:
        budgets = [length + 1 for length in lengths]
        return model.rollouts(prompts, max_new_tokens=budgets, batch_size=options.batch_size)

    kept: dict[str, Any] = {}
    best, tried = fastest(lambda size: kept.update(peer=peer(prompts, lengths, size)), options.batch_sizes)
    checked = compare(ours(prompts, lengths), kept["peer"], lengths, backbone.embed_token_id)
    spent = alternating(
        {"ours": lambda: ours(prompts, lengths), "peer": lambda: peer(prompts, lengths, best)}, options.runs
    )
    some = slice(0, options.singles)
    return {
        "ratio": ratio_of_medians(spent["ours"], spent["peer"]),
        "queries_per_second": {name: len(prompts) / median(values) for name, values in spent.items()},
        "seconds": spent,
        "peer_batch_size": best,
        "peer_seconds_by_batch_size": tried,
        "latency": latencies(ours, peer, prompts[some], lengths[some], options.runs),
        **checked,
        "reasoning_tokens": {"mean": float(np.mean(lengths)), "median": median(lengths), "max": max(lengths)},
        "prompt_tokens": float(np.mean([len(prompt) for prompt in prompts])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, runs=3)
    parser.add_argument("--collection", default="atlas", help="whose queries; atlas, or a folder in the BEIR layout")
    parser.add_argument("--queries", type=int, default=256)
    parser.add_argument("--singles", type=int, default=64, help="queries timed one at a time")
    parser.add_argument("--longest", type=int, default=300, help="reasoning tokens at most")
    parser.add_argument("--batch-size", type=int, default=128, help="of our side")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8, 16, 32, 64, 128], help="the peer's choice")
    options = parser.parse_args()
    if options.quick:
        options.shape, options.vocabulary, options.queries, options.singles = Shape(2, 128), 2048, 40, 5
        options.batch_sizes, options.runs = [16, 32], min(options.runs, 2)
    need("torch", "transformers")
    prepare(options)
    with tempfile.TemporaryDirectory() as scratch:
        result = measure(options, Path(scratch) / "model")
    latency = result["latency"]
    say(
        f"{result['ratio']:.2f} times the peer's queries/s; single queries take {latency['ratio_p50']:.2f} (p50) and "
        f"{latency['ratio_p95']:.2f} (p95) of its time"
    )
    settings = {key: value for key, value in vars(options).items() if key not in ("out", "shape")}
    record = {"benchmark": "queries", "peer": "transformers generate in fixed batches, then a second forward pass"}
    record |= {"unit": "queries/s, ours / peer", "runs": options.runs, **result}
    record |= {"settings": {**settings, "shape": str(options.shape), **versions("torch", "transformers")}}
    finish({**record, "machine": machine()}, options.out)


if __name__ == "__main__":
    main()
