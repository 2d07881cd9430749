"""`frontier.json` and `frontier.md`: points, areas and tests of each split."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...files import write_json, write_text
from ...retrieval.metrics import MAIN
from ..results import Result
from .curves import equal_cost_tests, family_areas
from .points import points_of

FRONTIER = "frontier.json"
COLUMNS = ("point", "nDCG@10", "of the gain", "tokens", "of reason's", "ms", "thinks")
"""Of a table of points."""

Split = dict[str, Any]


def frontier(results: Sequence[Result], permutations: int, seed: int) -> list[Split]:
    """The frontier of each split on which a model stands in both plain modes.

    Args:
        results: of any number of splits.
        permutations: of the paired tests.
        seed: of the tests.
    """
    splits = []
    for place in dict.fromkeys(result.place for result in results):
        found = points_of([result for result in results if result.place == place])
        if found is None:
            continue
        pair, points = found
        low, high = pair.direct.quality, pair.reason.quality
        rows = []
        for point in sorted(points, key=lambda one: (one.cost, one.quality)):
            gain = (point.quality - low) / (high - low) if high > low else None
            share = point.cost / pair.reason.cost if pair.reason.cost else None
            rows.append(point.record() | {"gain_share": gain, "token_share": share})
        splits.append(
            {
                "collection": place[0],
                "split": place[1],
                "queries": len(pair.direct.values),
                "direct": pair.direct.name,
                "reason": pair.reason.name,
                "points": rows,
                "areas": family_areas(pair, points),
                "tests": equal_cost_tests(pair, points, place, permutations, seed),
            }
        )
    return splits


def write_frontier(results: Sequence[Result], folder: Path, permutations: int, seed: int) -> list[Split]:
    """Write `frontier.json` and `frontier.md` over these results; returns the splits in them."""
    splits = frontier(results, permutations, seed)
    write_json(folder / FRONTIER, {"splits": splits})
    write_text(folder / "frontier.md", markdown(splits))
    return splits


def read_frontier(folder: Path) -> list[Split]:
    """What `write_frontier` wrote into a folder; empty where it did not."""
    path = folder / FRONTIER
    if not path.is_file():
        return []
    splits: list[Split] = json.loads(path.read_text(encoding="utf-8"))["splits"]
    return splits


def cells(row: Mapping[str, Any]) -> list[str]:
    """A point as text, in the order of the columns."""
    milliseconds, share, kept, used = (row.get(key) for key in ("ms_per_query", "share", "gain_share", "token_share"))
    return [
        row["name"],
        f"{row[MAIN]:.3f}",
        "" if kept is None else f"{kept:.0%}",
        f"{row['tokens_per_query']:.1f}",
        "" if used is None else f"{used:.0%}",
        "" if milliseconds is None else f"{milliseconds:.3g}",
        "" if share is None else f"{share:.0%}",
    ]


def markdown(splits: Sequence[Split]) -> str:
    """Tables of points, of areas and of tests."""
    lines = []
    for split in splits:
        lines += [f"## {split['collection']}, {split['split']}: {split['queries']:,} queries", ""]
        lines += _table(COLUMNS, [cells(row) for row in split["points"]])
        families = dict.fromkeys(family for areas in split["areas"].values() for family in areas)
        rows = [
            [family, *(f"{areas[family]:.3f}" if family in areas else "" for areas in split["areas"].values())]
            for family in families
        ]
        lines += _table(("area under", *split["areas"]), rows)
        tests = [
            [
                *(one["first"], one["second"], f"{one['tokens']:.1f}"),
                *(f"{one['difference']:+.3f}", f"{one['p']:.4f}", f"{one['p_holm']:.4f}"),
            ]
            for one in split["tests"]
        ]
        lines += _table(("nDCG@10 of", "minus that of", "at tokens", "difference", "p", "p (Holm)"), tests)
    return "\n".join(lines) + "\n"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    if not rows:
        return []
    lines = [header, ["---"] * len(header), *rows]
    return [*(f"| {' | '.join(line)} |" for line in lines), ""]
