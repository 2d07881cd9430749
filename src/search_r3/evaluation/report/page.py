"""The page of an evaluation: one HTML file that needs nothing else, with tables, plots and a browser of single queries.

Texts of queries, documents and reasoning are untrusted. They stand in the page as escaped JSON alone, its script shows
them as text, and its content policy lets no script run but that one and lets nothing be fetched.
"""

from __future__ import annotations

import base64
import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

from ...errors import DataError
from ...files import write_text
from ...retrieval.metrics import MAIN
from ..frontier.record import COLUMNS, Split, cells
from ..results import Result
from ..significance import check_same_state
from ..table import AVERAGED, averages, cell, columns, direct_of, notes, summary
from .plots import (
    dark_theme,
    plot_account,
    plot_frontier,
    plot_latency,
    plot_reasoning,
    plot_rewards,
    plot_scores,
    plot_training,
    system_colours,
)

SHOWN_QUERIES = 300
"""Queries of a split that can be looked at one by one; sums and histograms are over all."""
SHOWN_RELEVANT = 20
"""Relevant documents of a query that are listed though no system found them."""
SAME = 2e-6
"""nDCG@10 within which two systems did the same; the page holds 6 decimals."""

ResultPlace = tuple[str, str]


@dataclass(frozen=True)
class Plot:
    """A plot as it stands in the page: data URIs for light and dark, and its size in CSS pixels."""

    light: str
    dark: str
    width: int
    height: int
    caption: str


@dataclass(frozen=True)
class Row:
    """A row of the headline table: (key, text, number) of its cells, and the keys in which no other is better."""

    result: Result
    cells: list[tuple[str, str, float | None]]
    best: set[str]


def write_page(
    results: Sequence[Result],
    folder: Path,
    *,
    title: str,
    rewards: Mapping[str, Sequence[float]] | None = None,
    metrics: Sequence[Mapping[str, Any]] = (),
    comparisons: Sequence[Mapping[str, Any]] = (),
    frontiers: Sequence[Split] = (),
) -> Path:
    """Write `folder/report.html`, and its plots as PNG files into `folder/plots/`.

    Args:
        results: what is shown, in this order.
        folder: where it is written; each file in one step.
        title: of the page.
        rewards: `before` / `after` -> nDCG of sampled rollouts.
        metrics: rows of stage 2's `metrics.jsonl`, for the training curves.
        comparisons: records of `significance.Comparison`.
        frontiers: of splits, as `frontier.record.frontier` gives them.

    Returns:
        The path of the page.

    Raises:
        DataError: no results, or results of one split that are of two states of its collection.
    """
    if not results:
        raise DataError(f"no results to write {folder / 'report.html'} from; run search-r3 evaluate first")
    results = _rename_twins(results)
    places = _by_place(results)
    colours = system_colours(results)
    number = {name: i for i, name in enumerate(colours)}
    html = _render(
        "".join(f".s{i} {{ --system: {colour}; }}\n" for i, colour in enumerate(colours.values())),
        title=title,
        written=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        places=list(places),
        number=number,
        gain=_gain(places),
        header=list(columns(results).values()),
        rows=_rows(results),
        notes=[f"{', '.join(place)}: {note}" for place, there in places.items() for note in notes(there)],
        means=averages(results),
        averaged=AVERAGED,
        keys=list(columns(results)),
        comparisons=comparisons,
        frontiers=[(split, [cells(row) for row in split["points"]]) for split in frontiers],
        frontier_columns=COLUMNS,
        plots=_plots(results, folder / "plots", rewards or {}, metrics, frontiers),
        blocks=[embed_json(_split_data(systems, number)) for systems in places.values()],
        records=results,
    )
    write_text(folder / "report.html", html)
    return folder / "report.html"


def _render(palette: str, **content: Any) -> str:
    """The template with its style, its script and a content policy that names these two by their hashes."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    room = Path(__file__).parent
    style = "".join((room / name).read_text(encoding="utf-8") for name in ("look.css", "page.css")) + palette
    script = (room / "page.js").read_text(encoding="utf-8")
    policy = (
        "default-src 'none'; base-uri 'none'; form-action 'none'; img-src data:; "
        f"style-src '{_source_hash(style)}'; script-src '{_source_hash(script)}'"
    )
    environment = Environment(
        loader=FileSystemLoader(room), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html").render(style=style, script=script, policy=policy, **content)


def embed_json(value: Any) -> str:
    r"""JSON that can stand in a `<script>` element whatever its texts hold.

    Example:
        >>> embed_json("</script>")
        '"\\u003c/script\\u003e"'
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _source_hash(text: str) -> str:
    """How a content policy names an inline script or style."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _rename_twins(results: Sequence[Result]) -> list[Result]:
    """The results; systems that have one name on the same split bear the beginning of their keys too."""
    counts = Counter((result.place, result.system.name) for result in results)
    twice = {name for (_, name), count in counts.items() if count > 1}
    return [
        result.renamed(f"{result.system.name} ({result.key[:7]})") if result.system.name in twice else result
        for result in results
    ]


def _by_place(results: Sequence[Result]) -> dict[ResultPlace, list[Result]]:
    """Collection and split -> results."""
    places: dict[ResultPlace, list[Result]] = {}
    for result in results:
        systems = places.setdefault(result.place, [])
        systems.append(result)
        check_same_state(systems[0], result)
    return places


def default_pair(results: Sequence[Result]) -> tuple[Result, Result]:
    """Whom the browser compares at first: the direct and the reason mode of a model, else the first and last system.

    Args:
        results: of one split. Of several models that reason the last is taken.
    """
    plain = [result for result in results if result.system.mode == "reason" and not result.system.varied]
    for result in [*reversed(plain), *reversed(results)]:
        direct = direct_of(result, results)
        if direct is not None:
            return direct, result
    return results[0], results[-1]


def choose_queries(differences: Sequence[float], limit: int) -> list[int]:
    """Which queries are shown: a third for the largest gains, a third for the largest losses, the rest evenly spread.

    Args:
        differences: of each query; above 0 is a gain.
        limit: how many at most.

    Returns:
        Positions in `differences`, ascending.

    Example:
        >>> choose_queries([0.0, 0.5, 0.0, -0.2, 0.0, 0.1], 3)
        [0, 1, 3]
    """
    if len(differences) <= limit:
        return list(range(len(differences)))
    order = sorted(range(len(differences)), key=differences.__getitem__)
    losses = islice((i for i in order if differences[i] < -SAME), limit // 3)
    gains = islice((i for i in reversed(order) if differences[i] > SAME), limit // 3)
    extremes = {*losses, *gains}
    rest = [i for i in range(len(differences)) if i not in extremes]
    room = limit - len(extremes)
    return sorted([*extremes, *(rest[i * len(rest) // room] for i in range(room))])


def _split_data(results: Sequence[Result], numbers: Mapping[str, int]) -> dict[str, Any]:
    """All that the browser shows of one split. Documents are positions in `documents`."""
    base, other = default_pair(results)
    differences = [b - a for a, b in zip(base.per_query[MAIN], other.per_query[MAIN], strict=True)]
    queries = choose_queries(differences, SHOWN_QUERIES)
    snippets: dict[str, str] = {}
    for result in results:
        snippets |= result.snippets
    documents: dict[str, int] = {}

    def place_of(doc_id: str) -> int:
        return documents.setdefault(doc_id, len(documents))

    relevant = []
    for i in queries:
        grades = results[0].relevant[i]
        hits = {doc_id for result in results for doc_id, _ in result.top[i]}
        misses = sorted(grades.keys() - hits, key=lambda doc_id: (-grades[doc_id], doc_id))
        doc_ids = [doc_id for doc_id in grades if doc_id in hits] + misses[:SHOWN_RELEVANT]
        relevant.append([[place_of(doc_id), grades[doc_id]] for doc_id in doc_ids])
    runs = [
        {
            "name": result.system.name,
            "number": numbers[result.system.name],
            "values": [round(value, 6) for value in result.per_query[MAIN]],
            "top": [[[place_of(doc_id), round(score, 4)] for doc_id, score in result.top[i]] for i in queries],
            "reasoning": [result.reasoning[i] for i in queries] if result.reasoning else None,
            "tokens": [result.reasoning_tokens[i] for i in queries] if result.reasoning_tokens else None,
            "gate": [{"thought": result.thought[i], **result.gate[i]} for i in queries] if result.gate else None,
        }
        for result in results
    ]
    return {
        "collection": base.collection.name,
        "split": base.collection.split,
        "pair": [i for one in (base, other) for i, result in enumerate(results) if result is one],
        "same": SAME,
        "listed": queries,
        "ids": [base.query_ids[i] for i in queries],
        "queries": [base.queries[i] for i in queries],
        "relevant": relevant,
        "relevant_in_all": [len(base.relevant[i]) for i in queries],
        "runs": runs,
        "documents": [[doc_id, snippets.get(doc_id, "")] for doc_id in documents],
    }


def _rows(results: Sequence[Result]) -> list[Row]:
    """The headline table."""
    values, keys = [summary(result, results) for result in results], list(columns(results))
    best: dict[tuple[ResultPlace, str], float] = {}
    for result, row in zip(results, values, strict=True):
        for key in AVERAGED:
            best[result.place, key] = max(best.get((result.place, key), 0.0), row[key])
    return [
        Row(
            result,
            [(key, cell(row, key), row.get(key)) for key in keys],
            {key for key in AVERAGED if row[key] and row[key] == best[result.place, key]},
        )
        for result, row in zip(results, values, strict=True)
    ]


def _gain(places: Mapping[ResultPlace, Sequence[Result]]) -> dict[str, Any] | None:
    """What reasoning adds to direct embedding, over the splits that have both modes of a model."""
    pairs = [
        (base, other) for base, other in map(default_pair, places.values()) if direct_of(other, [base, other]) is base
    ]
    if not pairs:
        return None
    differences = [
        b - a for base, other in pairs for a, b in zip(base.per_query[MAIN], other.per_query[MAIN], strict=True)
    ]
    return {
        "splits": len(pairs),
        "systems": list(dict.fromkeys((base.system.name, other.system.name) for base, other in pairs)),
        "direct": fmean(base.scores[MAIN] for base, _ in pairs),
        "reason": fmean(other.scores[MAIN] for _, other in pairs),
        "tokens": fmean(other.cost.tokens_per_query for _, other in pairs),
        "helps": sum(difference > SAME for difference in differences),
        "hurts": sum(difference < -SAME for difference in differences),
        "queries": len(differences),
    }


def _plots(
    results: Sequence[Result],
    folder: Path,
    rewards: Mapping[str, Sequence[float]],
    metrics: Sequence[Mapping[str, Any]],
    frontiers: Sequence[Split],
) -> list[Plot]:
    """Draw all that can be drawn; the PNG files are the light ones."""
    drawings: Iterable[tuple[str, str, Callable[[Path], bool]]] = [
        ("ndcg", "nDCG@10 with 95 % intervals over queries.", lambda path: plot_scores(results, path)),
        (
            "latency",
            "Quality against cost. Large points are means over the splits that all systems share, small ones single "
            "splits.",
            lambda path: plot_latency(results, path),
        ),
        (
            "frontier",
            "What thinking is worth: quality against its price. The line is the upper edge of mode auto.",
            lambda path: plot_frontier(frontiers, path),
        ),
        ("reasoning", "How much the model writes before it embeds.", lambda path: plot_reasoning(results, path)),
        (
            "rollout_rewards",
            "Rewards of sampled rollouts before and after reinforcement learning.",
            lambda path: plot_rewards(rewards, path),
        ),
        ("reward", "Reward and dev quality during stage 2.", lambda path: plot_training(metrics, path)),
        (
            "account",
            "What the live index cost in accuracy: held against freshly encoded vectors.",
            lambda path: plot_account(metrics, path),
        ),
    ]
    plots = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, caption, draw in drawings:
            path, dark = folder / f"{name}.png", Path(scratch) / f"{name}.png"
            if draw(path):
                with dark_theme():
                    draw(dark)
                plots.append(_plot(path.read_bytes(), dark.read_bytes(), caption))
    return plots


def _plot(light: bytes, dark: bytes, caption: str) -> Plot:
    # Width and height stand in the header of every PNG; two of its pixels are one of the page.
    width, height = (int.from_bytes(light[at : at + 4], "big") // 2 for at in (16, 20))
    first, second = (f"data:image/png;base64,{base64.b64encode(data).decode()}" for data in (light, dark))
    return Plot(first, second, width, height, caption)
