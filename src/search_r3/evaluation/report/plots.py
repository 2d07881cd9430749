"""Plots of results and of training; a system has the same colour in all of them.

Every `plot_...` writes a PNG to `path` and returns True, or writes nothing and returns False where there is nothing to
plot.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle, islice
from math import ceil, exp, log
from pathlib import Path
from statistics import fmean
from textwrap import fill
from typing import TYPE_CHECKING, Any

from ...extras import extra
from ...retrieval.metrics import MAIN
from ..frontier.curves import upper_edge
from ..results import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which most colour-blind readers can tell apart, and shades of them: blues reason, reds do
# not, greys are lexical.
COLOURS = {
    "reason": ("#0072B2", "#56B4E9", "#4B5FC1"),
    "direct": ("#D55E00", "#E69F00", "#A8501D"),
    "bm25": ("#6F7680", "#A9B0BA", "#94785F"),
    "": ("#009E73", "#CC79A7", "#8A7A00", "#7B4FA3"),
}
MARKERS = "osD^vP*X<>"
BARS_A_ROW = 36
INK_ON_DARK, DARK_GROUND = "#d7dce3", "#171b21"


def system_colours(results: Sequence[Result]) -> dict[str, str]:
    """System -> colour, by mode and kind. Of several models that reason the last has the strongest blue."""
    systems = {result.system.name: result.system for result in results}
    counts = dict.fromkeys(COLOURS, 0)
    colours = {}
    for name, system in reversed(systems.items()):
        family = next((key for key in (system.mode, system.kind) if key and key in COLOURS), "")
        colours[name] = COLOURS[family][counts[family] % len(COLOURS[family])]
        counts[family] += 1
    return {name: colours[name] for name in systems}


@contextmanager
def dark_theme() -> Iterator[None]:
    """Plots drawn inside have light ink on dark ground."""
    with extra("eval"):
        from matplotlib import rc_context

    ink = {"text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"}
    ground = {"figure.facecolor", "axes.facecolor", "savefig.facecolor", "legend.facecolor"}
    settings: dict[Any, str] = dict.fromkeys(ink, INK_ON_DARK) | dict.fromkeys(ground, DARK_GROUND)
    with rc_context(settings):
        yield


def plot_scores(results: Sequence[Result], path: Path) -> bool:
    """nDCG@10 with its 95 % interval: systems side by side on every split; many splits fill several rows."""
    if not results:
        return False
    colours, places = system_colours(results), list(dict.fromkeys(result.place for result in results))
    fields = ceil(len(places) / max(1, BARS_A_ROW // len(colours)))
    columns = ceil(len(places) / fields)
    lines = [places[i : i + columns] for i in range(0, len(places), columns)]
    rows = len(lines)
    count = columns * len(colours)
    figure, grid = _figure(rows, 1, width=min(11.0, max(6.5, 1.5 + 0.42 * count)), height=3.6 if rows == 1 else 2.3)
    for axes, line in zip(grid, lines, strict=True):
        for i, (system, colour) in enumerate(colours.items()):
            result_of = {result.place: result for result in results if result.system.name == system}
            bars = [(x, result_of[place]) for x, place in enumerate(line) if place in result_of]
            _bars(axes, bars, (i + 0.5) / len(colours) - 0.5, 0.84 / len(colours), colour, count <= 14)
        axes.set_xticks(range(len(line)), [f"{fill(name, 20)}\n{split}" for name, split in line])
        axes.set(ylabel="nDCG@10", ylim=(0, 1.05), xlim=(-0.55, columns - 0.45))
        axes.grid(axis="x", visible=False)
    _legend(figure, colours)
    return _save(figure, path)


def _bars(
    axes: Axes, bars: Sequence[tuple[int, Result]], offset: float, width: float, colour: str, labels: bool
) -> None:
    """The bars of one system on one row of splits; `offset` and `width` in units of the space of a split."""
    means = [result.scores[MAIN] for _, result in bars]
    intervals = [result.intervals[MAIN] for _, result in bars]
    # An interval of resamples may miss the mean by a hair where all queries score alike.
    below = [max(0.0, mean - low) for mean, (low, _) in zip(means, intervals, strict=True)]
    above = [max(0.0, high - mean) for mean, (_, high) in zip(means, intervals, strict=True)]
    at = [position + 0.84 * offset for position, _ in bars]
    error = {"elinewidth": 1, "capsize": 2.5 if labels else 1.5, "ecolor": _ink()}
    axes.bar(at, means, 0.92 * width, yerr=[below, above], color=colour, error_kw=error)
    if labels:
        for x, mean, rise in zip(at, means, above, strict=True):
            axes.text(x, mean + rise + 0.012, f"{mean:.3f}", ha="center", va="bottom", fontsize=7.5)


def plot_latency(results: Sequence[Result], path: Path) -> bool:
    """nDCG@10 against milliseconds per query: a point for each system over faint ones for each split.

    The points are averages over the splits on which all systems stand (over each one's own, if there is none). Time
    is that of queries asked one at a time (`Cost.ms_per_query`), or the mean within a batch where it was not measured.
    """
    if not results:
        return False
    colours = system_colours(results)
    figure, (axes,) = _figure(1, 1)
    results_of = {name: [result for result in results if result.system.name == name] for name in colours}
    common = set.intersection(*({result.place for result in group} for group in results_of.values()))
    for i, (name, colour) in enumerate(colours.items()):
        group, marker = results_of[name], MARKERS[i % len(MARKERS)]
        if len(group) > 1:
            scores = [result.scores[MAIN] for result in group]
            axes.scatter([_milliseconds(one) for one in group], scores, 16, colour, marker=marker, alpha=0.35, lw=0)
        core = [result for result in group if result.place in common or not common]
        x = exp(fmean(log(_milliseconds(result)) for result in core))
        y = fmean(result.scores[MAIN] for result in core)
        axes.scatter([x], [y], 90, colour, marker=marker, label=name, edgecolors=_ink(), linewidths=0.8, zorder=3)
    axes.set(xscale="log", xlabel="milliseconds per query", ylabel="nDCG@10", ylim=(0, 1.02))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.margins(x=0.12)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    return _save(figure, path)


def _milliseconds(result: Result) -> float:
    alone = result.cost.ms_per_query
    # Above 0 for the logarithm, whatever the clock's resolution.
    return max(1e-3, 1000 / result.cost.queries_per_second if alone is None else alone)


def plot_frontier(frontiers: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """Quality against tokens and against milliseconds, a row for each split; a line through the edge of mode auto.

    A colour is a way to think; so is a marker, or, where there are several models, the model.
    """
    if not frontiers:
        return False
    figure, grid = _figure(len(frontiers), 2, width=10.0, height=3.6 if len(frontiers) == 1 else 3.0)
    families = dict.fromkeys(point["family"] for split in frontiers for point in split["points"])
    ways = list(dict.fromkeys(family.partition("/")[0] for family in families))
    models = list(dict.fromkeys(family.partition("/")[2] for family in families))
    greens = iter(cycle(COLOURS[""]))
    named = {"direct": COLOURS["direct"][0], "reason": COLOURS["reason"][0], "budget": COLOURS["reason"][1]}
    named |= {"samples": COLOURS["reason"][2], "oracle": COLOURS["bm25"][0]}
    colours = {way: named.get(way) or next(greens) for way in ways}
    markers = dict(zip(models if len(models) > 1 else ways, cycle(MARKERS), strict=False))
    keys = ("tokens_per_query", "tokens of reasoning per query"), ("ms_per_query", "milliseconds per query")
    for row, split in enumerate(frontiers):
        for axes, (key, label) in zip(grid[2 * row : 2 * row + 2], keys, strict=True):
            known = [point for point in split["points"] if point[key] is not None]
            for family in families:
                at = [(point[key], point[MAIN]) for point in known if point["family"] == family]
                if at:
                    (x, y), (way, _, model) = zip(*at, strict=True), family.partition("/")
                    marker = markers[model if len(models) > 1 else way]
                    axes.scatter(x, y, 42, colours[way], marker=marker, zorder=3)
            line = [(one[key], one[MAIN]) for one in known if one["family"] in ("direct", "auto", "reason")]
            if len(line) > 1:
                axes.plot(*zip(*upper_edge(line), strict=True), color=_ink(), linewidth=1)
            axes.set(xlabel=label, ylabel="nDCG@10", title=f"{split['collection']} / {split['split']}")
    first = frontiers[0]["direct"].partition("/")[2] or "the first model"
    _legend(figure, colours, {name or first: markers[name] for name in models} if len(models) > 1 else {})
    return _save(figure, path)


def plot_reasoning(results: Sequence[Result], path: Path) -> bool:
    """Histograms of the reasoning's length, one field for each split."""
    histograms = [result for result in results if result.reasoning_tokens]
    if not histograms:
        return False
    colours, places = system_colours(results), list(dict.fromkeys(result.place for result in histograms))
    columns = min(len(places), 4)
    rows = ceil(len(places) / columns)
    longest = max(max(result.reasoning_tokens) for result in histograms)
    bins = [longest * i / 24 for i in range(25)] if longest > 24 else [i - 0.5 for i in range(longest + 2)]
    width, height = max(6.5, 2.75 * columns), 3.4 if rows == 1 else 1.9
    figure, grid = _figure(rows, columns, width=width, height=height)
    for axes, place in zip(grid, places, strict=False):
        for result in (one for one in histograms if one.place == place):
            colour = colours[result.system.name]
            share = [1 / len(result.reasoning_tokens)] * len(result.reasoning_tokens)
            axes.hist(result.reasoning_tokens, bins, weights=share, color=colour, alpha=0.3)
            axes.hist(result.reasoning_tokens, bins, weights=share, color=colour, histtype="step", linewidth=1.4)
        axes.set_title(" / ".join(place), fontsize=9)
    for axes in grid[len(places) :]:
        axes.set_visible(False)
    figure.supxlabel("tokens of reasoning", fontsize=9)
    figure.supylabel("share of queries", fontsize=9)
    _legend(figure, {result.system.name: colours[result.system.name] for result in histograms})
    return _save(figure, path)


def plot_training(metrics: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """Reward of each step's rollouts and nDCG@10 on dev over the steps of stage 2."""
    names = {name for row in metrics for name in ("reward_ndcg", "reward_ranking") if name in row}  # 0.1: the second
    if not names:
        return False
    figure, (axes,) = _figure(1, 1)
    for name in sorted(names):
        _curve(axes, metrics, name, color="0.6", label="rollouts: nDCG reward")
    for mode, marker in (("direct", "s"), ("reason", "o")):
        label = f"dev nDCG@10, {mode}"
        _curve(axes, metrics, f"dev_ndcg@10_{mode}", marker=marker, color=COLOURS[mode][0], label=label)
    axes.set(xlabel="GRPO step", ylabel="nDCG@10", ylim=(0, 1.02), title="Stage 2: what the policy learns")
    axes.legend(fontsize=8)
    return _save(figure, path)


def plot_account(metrics: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """The audits of the live index over the steps of stage 2; a run without audits gets no plot."""
    audits = [{**row, "missed": 1 - row["audit_top10_overlap"]} for row in metrics if "audit_reward_error" in row]
    if not audits:
        return False
    figure, (axes,) = _figure(1, 1)
    for marker, family, key, label in (
        ("o", "reason", "audit_reward_error", "mean error of the reward"),
        ("s", "direct", "missed", "top-10 documents missed"),
        ("^", "", "audit_drift_mean", "drift of a document, 1 - cos"),
    ):
        _curve(axes, audits, key, marker=marker, color=COLOURS[family][0], label=label)
    axes.set(xlabel="GRPO step", ylabel="held against freshly encoded vectors", title="The account of the live index")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)
    return _save(figure, path)


def _curve(axes: Axes, rows: Sequence[Mapping[str, Any]], key: str, **style: Any) -> None:
    """One metric over the steps that have it."""
    points = [(row["step"], row[key]) for row in rows if key in row]
    axes.plot(*zip(*points, strict=True), **style)


def plot_rewards(rewards: Mapping[str, Sequence[float]], path: Path) -> bool:
    """Distribution of the rollouts' nDCG before and after RL, with the share at or above 0.5."""
    samples = {name: values for name, values in rewards.items() if values}
    if not samples:
        return False
    figure, (axes,) = _figure(1, 1)
    shares = {name: fmean(value >= 0.5 for value in values) for name, values in samples.items()}
    axes.hist(
        list(samples.values()),
        bins=[i / 20 for i in range(21)],
        label=[f"{name} RL: {shares[name]:.0%} at 0.5 or more" for name in samples],
        weights=[[1 / len(values)] * len(values) for values in samples.values()],
        color=list(islice(cycle([COLOURS["bm25"][1], COLOURS["reason"][0], *COLOURS[""]]), len(samples))),
    )
    axes.axvline(0.5, color=_ink(), linestyle="--", linewidth=1)
    axes.set(
        xlabel="nDCG@10 of a sampled rollout's vector",
        ylabel="share of rollouts",
        title="Rollout rewards on test queries",
    )
    axes.legend(fontsize=8)
    return _save(figure, path)


def _figure(rows: int, columns: int, width: float = 7.5, height: float = 4.0) -> tuple[Figure, list[Axes]]:
    """A figure and its fields, row by row; `width` in all, `height` of each row, in inches."""
    # The object interface: no global pyplot state, no display needed.
    with extra("eval"):
        from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 0.6 * (rows > 1) + height * rows), layout="constrained")
    grid = [axes for line in figure.subplots(rows, columns, squeeze=False) for axes in line]
    for axes in grid:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8, length=3)
        axes.xaxis.label.set_size(9)
        axes.yaxis.label.set_size(9)
        axes.title.set_size(10)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.set_axisbelow(True)
    return figure, grid


def _ink() -> Any:
    with extra("eval"):
        from matplotlib import rcParams

    return rcParams["text.color"]


def _legend(figure: Figure, colours: Mapping[str, str], markers: Mapping[str, str] | None = None) -> None:
    """Systems and their colours, models and their markers above all fields, in as many columns as there is room for."""
    with extra("eval"):
        from matplotlib.lines import Line2D
        from matplotlib.patches import Patch

    handles: list[Patch | Line2D] = [Patch(color=colour, label=name) for name, colour in colours.items()]
    ink = {"color": _ink(), "linestyle": ""}
    handles += [Line2D([], [], marker=marker, label=name, **ink) for name, marker in (markers or {}).items()]
    inches = 0.08 * max(map(len, [*colours, *(markers or {})])) + 0.7
    columns = max(1, min(len(handles), int(figure.get_figwidth() / inches)))
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, frameon=False, fontsize=9)


def _save(figure: Figure, path: Path) -> bool:
    """Write the PNG in one step; True, which is what its callers return."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        figure.savefig(scratch, dpi=160, format="png")
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
    return True
