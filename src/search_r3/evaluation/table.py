"""Results side by side: quality, its interval and its price."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from ..retrieval.metrics import MAIN
from .results import Result
from .significance import Comparison

COLUMNS = {
    MAIN: "nDCG@10 (95 %)",
    "recall@100": "recall@100",
    "mrr@10": "MRR@10",
    "map": "MAP",
    "ndcg@5": "nDCG@5",
    "p-mrr": "p-MRR",
    "tokens_per_query": "tokens/query",
    "thinking_share": "thinks",
    "ms_per_query": "ms/query",
    "queries_per_second": "queries/s",
    "documents_per_second": "documents/s",
    "gain_per_100_tokens": "gain/100 tokens",
}
"""Key in `summary` -> heading."""
FOLLOWIR = ("ndcg@5", "p-mrr")
"""Columns that are there where instructions change."""
EFFORT = ("gate", "price", "budget", "samples", "sampling_temperature")
"""Settings of a system that change nothing about its direct mode."""
AVERAGED = (MAIN, "recall@100", "mrr@10", "map")


def summary(result: Result, results: Sequence[Result] = ()) -> dict[str, Any]:
    """One row of a table: all scores, the interval of nDCG@10, the cost, and the gain per 100 tokens of reasoning.

    Args:
        result: the row.
        results: among which the direct mode of the same model is looked for.
    """
    return {
        **result.scores,
        f"{MAIN}_interval": list(result.intervals[MAIN]),
        **result.cost.model_dump(),
        "gain_per_100_tokens": gain_per_100_tokens(result, results),
        "queries": result.collection.queries,
        "sample_of": result.collection.sample_of,
        f"{MAIN}_with_0": with_zeros(result),
    }


def with_zeros(result: Result) -> float:
    """nDCG@10 where queries without a relevant document count as 0 (trec_eval, mteb) instead of being left out.

    Of a sample, as if it held its share of them.
    """
    info = result.collection
    every = info.sample_of or info.queries
    return result.scores[MAIN] * every / (every + info.without_relevant)


def queries_text(result: Result) -> str:
    """The number of queries, and of how many they are a sample."""
    info = result.collection
    return f"{info.queries:,}, a sample of {info.sample_of:,}" if info.sample_of else f"{info.queries:,}"


def notes(results: Sequence[Result]) -> list[str]:
    """What a reader of the table of one split should know: what was left out, cut, or counted otherwise."""
    info, lines = results[0].collection, []
    if info.sample_of:
        lines.append(f"a sample: {info.queries:,} of {info.sample_of:,} queries, drawn by the seed")
    if info.without_text:
        lines.append(f"{info.without_text:,} documents without any text were left out")
    lines += [f"{count:,} {what} were left out" for what, count in info.dropped.items()]
    if info.absent:
        lines.append(
            f"{info.absent:,} judgements name documents that are not in the corpus: counted and never found, as "
            "trec_eval does"
        )
    if info.identical_ids:
        lines.append(f"{info.identical_ids:,} documents were left out of the ranking of the query whose id they bear")
    if info.without_relevant:
        values = ", ".join(f"{result.system.name} {with_zeros(result):.3f}" for result in results)
        lines.append(
            f"{info.without_relevant:,} queries without a relevant document are left out; counted as 0, as trec_eval "
            f"and mteb do, nDCG@10 is: {values}"
        )
    for result in results:
        name, cost = result.system.name, result.cost
        lines += truncation_notes(name, cost.truncated_queries, cost.truncated_documents)
        if cost.thinking_share is not None:
            lines.append(f"{name}: the gate let {cost.thinking_share:.0%} of the queries think")
        lines += [f"{name}: {note}" for note in result.notes]
    return lines


def truncation_notes(name: str, queries: int, documents: int) -> list[str]:
    """What to say of texts that were cut."""
    return [
        f"{name}: {count:,} {what} were longer than the model's limit and lost their end"
        for count, what in ((queries, "queries"), (documents, "documents"))
        if count
    ]


def gain_per_100_tokens(result: Result, results: Sequence[Result]) -> float | None:
    """nDCG@10 that reasoning adds to the direct mode of the same model, for each 100 tokens it writes.

    None where the result is not of a mode that reasons, wrote nothing, or stands without its direct mode.
    """
    tokens = result.cost.tokens_per_query
    direct = direct_of(result, results)
    if direct is None or not tokens:
        return None
    return 100 * (result.scores[MAIN] - direct.scores[MAIN]) / tokens


def direct_of(result: Result, results: Sequence[Result]) -> Result | None:
    """The direct mode of the model that reasoned in `result` (where it reasons), on the same split."""
    if result.system.mode in ("", "direct"):
        return None
    for other in results:
        if other.system.mode == "direct" and _model_and_place(other) == _model_and_place(result):
            return other
    return None


def _model_and_place(result: Result) -> tuple[Any, ...]:
    system = result.system
    own = {name: value for name, value in system.settings.items() if name not in EFFORT}
    return result.place, result.collection.hash, result.settings, system.kind, system.revision, own


def columns(results: Sequence[Result]) -> dict[str, str]:
    """Those of `COLUMNS` that say something: some only where instructions change, or a gate decides."""
    hidden = set() if any("p-mrr" in result.scores for result in results) else {*FOLLOWIR}
    if all(result.cost.thinking_share is None for result in results):
        hidden.add("thinking_share")
    return {key: heading for key, heading in COLUMNS.items() if key not in hidden}


def cell(row: dict[str, Any], key: str) -> str:
    """One value of `summary` as text; nothing where there is none."""
    value = row.get(key)
    if value is None:
        return ""
    if key == MAIN:
        low, high = row[f"{MAIN}_interval"]
        return f"{value:.3f} ({low:.3f} to {high:.3f})"
    if key in ("ms_per_query", "queries_per_second", "documents_per_second"):
        return shorten(value)
    if key in ("p-mrr", "gain_per_100_tokens"):
        return f"{value:+.3f}"
    if key == "thinking_share":
        return f"{value:.0%}"
    return f"{value:.1f}" if key == "tokens_per_query" else f"{value:.3f}"


def averages(results: Sequence[Result]) -> dict[str, dict[str, float]]:
    """System -> mean scores over splits, for systems that stand on every one of several splits."""
    places = {result.place for result in results}
    names = dict.fromkeys(result.system.name for result in results)
    means = {}
    for name in names:
        rows = [result for result in results if result.system.name == name]
        if len(places) > 1 and {result.place for result in rows} == places:
            means[name] = {key: fmean(row.scores[key] for row in rows) for key in AVERAGED}
    return means


def markdown(results: Sequence[Result], comparisons: Sequence[Comparison]) -> str:
    """Tables of results, with notes, of means over splits, and of comparisons."""
    headings = columns(results)
    lines = [_line("collection", "split", "queries", "system", *headings.values()), _rule(4 + len(headings))]
    for result in results:
        row = summary(result, results)
        lines.append(
            _line(*result.place, queries_text(result), f"`{result.system.name}`", *(cell(row, key) for key in headings))
        )
    places = {result.place: [other for other in results if other.place == result.place] for result in results}
    said = [f"- {', '.join(place)}: {note}." for place, there in places.items() for note in notes(there)]
    lines += ["", *said] if said else []
    if means := averages(results):
        splits = len(places)
        lines += ["", _line(f"mean over {splits} splits", *AVERAGED), _rule(1 + len(AVERAGED))]
        lines += [_line(f"`{name}`", *(f"{row[key]:.3f}" for key in AVERAGED)) for name, row in means.items()]
    if comparisons:
        lines += ["", _line("collection", "split", "nDCG@10 of", "minus that of", "difference", "p", "p (Holm)")]
        lines.append(_rule(7))
        for one in comparisons:
            numbers = f"{one.difference:+.3f}", f"{one.p:.4f}", f"{one.p_holm:.4f}"
            lines.append(_line(one.collection, one.split, f"`{one.first}`", f"`{one.second}`", *numbers))
    return "\n".join(lines) + "\n"


def shorten(value: float | None) -> str:
    """A time or a speed in three digits; nothing where it was not measured."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _line(*parts: str) -> str:
    return f"| {' | '.join(parts)} |"


def _rule(columns: int) -> str:
    return "|" + "---|" * columns
