"""Best of n: of several replies to a training query keep the one whose own vector ranks best, for stage 1 to learn.

In the field's words rejection sampling, or RAFT (Dong et al., arXiv 2304.06767); in rounds, each from the model that
the one before trained, expert iteration (Anthony et al., arXiv 1705.08439). It needs the labels that GRPO needs and no
policy gradient, so it is the baseline that GRPO has to beat; for a model that can reason already it is the cold start,
since the traces are the model's own.

What was sampled and scored stays in a cache: a killed call goes on, and another rule for the winner samples nothing.
"""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from ..config import Recipe
from ..data.collection import Collection, Qrels
from ..data.triples import judged_queries, reasoning_traces
from ..data.writing.asking import check_output
from ..errors import ConfigError, DataError
from ..mining.candidates import quiet
from ..model.adapters import choose_what_learns
from ..model.encoder import SearchR3
from ..model.source import find_files
from ..types import Watch
from .engine import load_model
from .modes.frozen import check_begins, keeps_documents
from .rl.samples import Group, Sample, Sampler
from .run import Run
from .sft import train_sft

REPORT = "best-of-n.json"
Left = Literal["forced", "empty", "below_min_ndcg", "not_above_direct"]


@dataclass(frozen=True)
class BestOfNSettings:
    """How replies are sampled, and which of them wins.

    Attributes:
        samples: n, replies to each query.
        sampling_temperature: of the sampling.
        seed: of it; a query's replies depend on this and its id, whatever other queries there are.
        style: the name that the winner gets among the query's traces (`sft.reasoning_styles`).
        min_ndcg: the nDCG@10 that a winner reaches; 0 keeps the best reply however little it finds.
        above_direct: whether a winner ranks better than direct mode does, so that only reasoning that adds something
            is learnt.
        accept_ended: whether a reply that ended its turn without the embed token can win: the cold start of a model
            that reasons, and has not been taught to emit the token after it.
        replace: whether the winner takes the place of all other traces of its query, or stands beside them.
        limit: size of a random sample of the queries; None takes all.
        batch_size: replies decoded at once; it changes them by rounding only.

    Raises:
        ConfigError: a value is out of range.
    """

    samples: int = 8
    sampling_temperature: float = 1.0
    seed: int = 0
    style: str = "own"
    min_ndcg: float = 0.5
    above_direct: bool = False
    accept_ended: bool = False
    replace: bool = False
    limit: int | None = None
    batch_size: int = 128

    def __post_init__(self) -> None:
        if self.samples < 1 or self.sampling_temperature < 0 or not 0 <= self.min_ndcg <= 1 or not self.style.strip():
            raise ConfigError(
                f"samples {self.samples}, temperature {self.sampling_temperature}, min_ndcg {self.min_ndcg}, style "
                f"{self.style!r}: expected 1 or more, 0 or more, 0 to 1, and a name"
            )
        if self.samples > 1 and self.sampling_temperature == 0:
            raise ConfigError(
                f"{self.samples} samples at temperature 0 are one and the same reply; raise the temperature, or set "
                "samples to 1"
            )
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"limit {self.limit}: expected 1 or more")


@dataclass(frozen=True)
class BestOfNReport:
    """What was sampled and kept; it stands in `best-of-n.json` beside the collection.

    Attributes:
        model: what wrote the replies, and the revision of its weights.
        collection: the name of the collection, and its content hash.
        splits: whose queries.
        settings: as `BestOfNSettings`.
        queries: of these splits.
        kept: queries with a winner.
        left_out: reason -> queries without one: all replies `forced`, none with any text (`empty`), the best one
            `below_min_ndcg` or `not_above_direct`.
        ndcg_direct: mean nDCG@10 of direct mode over all queries; so are the next.
        ndcg_first: of the first reply, which is what one sample is worth.
        ndcg_mean: of all replies.
        ndcg_best: of the best reply, kept or not; 0 where none can win.
        tokens_first: mean reasoning tokens of the first reply.
        tokens_kept: of the winners.
        tokens: reasoning tokens of all replies together.
        forced_share: of the replies.
        resumed: blocks of queries read from the cache.
        seconds: duration of this call.
    """

    model: dict[str, Any]
    collection: dict[str, str]
    splits: list[str]
    settings: dict[str, Any]
    queries: int
    kept: int
    left_out: dict[str, int]
    ndcg_direct: float
    ndcg_first: float
    ndcg_mean: float
    ndcg_best: float
    tokens_first: float
    tokens_kept: float
    tokens: int
    forced_share: float
    resumed: int
    seconds: float


def best_of_n(
    model: SearchR3,
    collection: Collection,
    out: str | Path,
    settings: BestOfNSettings,
    *,
    cache: str | Path,
    splits: Sequence[str] = ("rl",),
    watch: Watch = quiet,
) -> BestOfNReport:
    """Sample, choose, and save the collection with the winners as traces; of these splits only queries with one stay.

    The same call after a kill goes on where it stopped and gives the same result.

    Args:
        model: writes the replies, and its vectors rank.
        collection: documents, queries, judgements; splits but these stay as they are.
        out: the folder; a collection there is replaced at the end.
        settings: how many replies, and which wins.
        cache: a folder for replies and scores; several calls may use it one after another.
        splits: whose queries.
        watch: begins a progress bar.

    Raises:
        DataError: an unknown split, a query without a relevant document, no winner at all, or a damaged cache.
        ModelError: the model gives NaN.
    """
    out, started = Path(out).absolute(), time.monotonic()
    check_output(out)
    sampler = Sampler(
        *(model, collection, _drawn(judged_queries(collection, splits), settings), Path(cache)),
        samples=settings.samples,
        sampling_temperature=settings.sampling_temperature,
        seed=settings.seed,
        batch_size=settings.batch_size,
        watch=watch,
    )
    groups = list(sampler.groups())
    results = {group.query_id: choose(group.samples, group.direct, settings) for group in groups}
    winners = {query_id: result for query_id, result in results.items() if isinstance(result, Sample)}
    left_out = dict(sorted(Counter(str(one) for one in results.values() if not isinstance(one, Sample)).items()))
    if not winners:
        raise _no_winner_error(groups, left_out, settings)
    report = BestOfNReport(
        model={"source": model.backbone.source, "revision": model.backbone.revision},
        collection={"name": collection.name, "content_hash": collection.content_hash()},
        splits=list(splits),
        settings=asdict(settings),
        kept=len(winners),
        left_out=left_out,
        tokens_kept=fmean(one.tokens for one in winners.values()),
        resumed=sampler.resumed,
        seconds=time.monotonic() - started,
        **_means(groups, settings),
    )
    _with_winners(collection, splits, winners, settings).save(out, reports={REPORT: asdict(report)})
    return report


def _no_winner_error(groups: Sequence[Group], left_out: Mapping[str, int], settings: BestOfNSettings) -> DataError:
    reasons = ", ".join(f"{name} {count:,}" for name, count in left_out.items())
    lenient = replace(settings, accept_ended=True)
    ended = sum(len(usable(one.samples, lenient)) - len(usable(one.samples, settings)) for one in groups)
    hint = f"accept_ended, since {ended:,} replies ended without the token, " if ended else ""
    return DataError(
        f"none of {len(groups):,} queries has a winner ({reasons}); try {hint}more samples, a lower min_ndcg, or train "
        "first"
    )


def _drawn(qrels: Qrels, settings: BestOfNSettings) -> Qrels:
    """Those of as many queries as the limit lets."""
    if settings.limit is None or settings.limit >= len(qrels):
        return qrels
    drawn = set(random.Random(settings.seed).sample(sorted(qrels), settings.limit))
    return {query_id: relevance for query_id, relevance in qrels.items() if query_id in drawn}


def _means(groups: Sequence[Group], settings: BestOfNSettings) -> dict[str, Any]:
    """The part of the report that looks at all replies."""
    replies = [one for group in groups for one in group.samples]
    best = [max((one.ndcg for one in usable(group.samples, settings)), default=0.0) for group in groups]
    return {
        "queries": len(groups),
        "ndcg_direct": fmean(group.direct.ndcg for group in groups),
        "ndcg_first": fmean(group.samples[0].ndcg for group in groups),
        "ndcg_mean": fmean(one.ndcg for one in replies),
        "ndcg_best": fmean(best),
        "tokens_first": fmean(group.samples[0].tokens for group in groups),
        "tokens": sum(one.tokens for one in replies),
        "forced_share": fmean(one.ending != "emitted" for one in replies),
    }


def _with_winners(
    collection: Collection, splits: Sequence[str], winners: Mapping[str, Sample], settings: BestOfNSettings
) -> Collection:
    queries, qrels = dict(collection.queries), dict(collection.qrels)
    for query_id, winner in winners.items():
        traces = {} if settings.replace else reasoning_traces(queries[query_id])
        metadata = {**queries[query_id].metadata, "reasoning": {**traces, settings.style: winner.reasoning}}
        queries[query_id] = replace(queries[query_id], metadata=metadata)
    for name in splits:
        qrels[name] = {query_id: judged for query_id, judged in qrels[name].items() if query_id in winners}
    # A file without judgements could not be read again.
    return replace(collection, queries=queries, qrels={name: judged for name, judged in qrels.items() if judged})


def choose(samples: Sequence[Sample], direct: Sample, settings: BestOfNSettings) -> Sample | Left:
    """The winner of a query's replies, or why it has none.

    The highest nDCG@10 wins, then the higher `log_rank`, which tells apart what lies below the first ten, then the
    higher `contrastive`, then fewer tokens, and of equal ones the first. Where reasoning is often not needed, most
    replies of a group rank alike, and the shortest of them says least: a model that learnt those forgot to reason. The
    surest one is the reply that would rank best among more documents.

    A reply whose token was forced never wins: it was cut off, or ended its turn instead, and would be learnt as if the
    token had come of itself (`accept_ended` lets the second kind win). Nor does one without any text, which would be no
    trace.

    Example:
        >>> near = Sample("a city", 2, "emitted", ndcg=0.63, log_rank=0.9, contrastive=0.4)
        >>> exact = Sample("its country", 2, "emitted", ndcg=1.0, log_rank=1.0, contrastive=0.7)
        >>> choose([near, exact], near, BestOfNSettings()).reasoning
        'its country'
        >>> choose([near], near, BestOfNSettings(above_direct=True))
        'not_above_direct'
    """
    candidates = usable(samples, settings)
    if not candidates:
        return "empty" if any(one.ending == "emitted" for one in samples) else "forced"
    best = max(candidates, key=lambda one: (one.ranked, one.contrastive, -one.tokens))  # the first of equal ones
    if best.ranked[0] < settings.min_ndcg:
        return "below_min_ndcg"
    if settings.above_direct and best.ranked <= direct.ranked:
        return "not_above_direct"
    return best


def usable(samples: Sequence[Sample], settings: BestOfNSettings) -> list[Sample]:
    """The replies that can win."""
    endings = ("emitted", "ended") if settings.accept_ended else ("emitted",)
    return [one for one in samples if one.ending in endings and one.reasoning.strip()]


def train_best_of_n(
    recipe: Recipe,
    model: str | Path,
    collection: Collection,
    out: str | Path,
    settings: BestOfNSettings,
    *,
    rounds: int = 1,
    splits: Sequence[str] = ("rl",),
    resume: bool = False,
    load: Callable[[str], SearchR3] = SearchR3,
    note: Callable[[BestOfNReport], None] = lambda report: None,
    watching: Callable[[], AbstractContextManager[Watch]] = lambda: nullcontext(quiet),
    live: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Path:
    """Expert iteration: sample with a model, train stage 1 from it on the winners, and so on with what came of it.

    Each round is a run in `out/round-N`, with its `collection/` beside `sft/model/`, and has a seed of its own.

    Args:
        recipe: of stage 1; its `collection`, `base` and `run_dir` are those of the round.
        model: what the first round samples with and learns from.
        collection: what every round samples for.
        out: the folder of the rounds.
        settings: how many replies, and which wins.
        rounds: how many.
        splits: whose queries are sampled for.
        resume: go on with what is in `out`.
        load: loads a model for sampling.
        note: told of each round's winners.
        watching: a progress display while a round samples.
        live: one while it trains: a callback of `train_sft`, or None.

    Returns:
        The model directory of the last round.

    Raises:
        ConfigError: stage 1 would not learn from the winners, or not go on from the model, or a round has begun and
            `resume` is off or it began with other settings.
        DataError, ModelError, RunError, StoppedError: as `best_of_n` and `train_sft`.
    """
    _check_learns(recipe, splits, settings.style)
    _check_goes_on(recipe, model, rounds)
    source = str(model)
    for number in range(1, rounds + 1):
        folder = Path(out) / f"round-{number}"
        places = {"run_dir": str(folder), "collection": str(folder / "collection"), "base": source}
        stage_1 = recipe.model_copy(update=places)
        Run(stage_1).claim("sft", resume)
        own = replace(settings, seed=settings.seed + number - 1)
        report = folder / "collection" / REPORT
        if report.exists():
            _check_same(report, own, splits, collection)
        else:
            with watching() as watch:
                cache = folder / "cache"
                note(best_of_n(load(source), collection, report.parent, own, cache=cache, splits=splits, watch=watch))
        with live() as callback:
            source = str(train_sft(stage_1, callbacks=filter(None, [callback]), resume=resume).model_path)
    return Path(source)


def _check_goes_on(recipe: Recipe, model: str | Path, rounds: int) -> None:
    """Refuse a model that stage 1 would refuse after hours of sampling, in the second round too."""
    frozen = keeps_documents(recipe, "sft")
    check_begins(find_files(model), model, frozen)
    if frozen and rounds > 1 and recipe.lora.rank and recipe.sft.kl_weight > 0:
        raise ConfigError(
            f"sft.kl_weight is {recipe.sft.kl_weight:g}, a KL to the model that each round begins from: with frozen "
            "documents and adapters the second round cannot measure it, as without its adapters that model encodes "
            "documents; set sft.kl_weight=0, or ask for one round"
        )
    if frozen:
        choose_what_learns(load_model(recipe, model).backbone, recipe.lora)


def _check_learns(recipe: Recipe, splits: Sequence[str], style: str) -> None:
    """Refuse a recipe that would sample, and then learn from something else."""
    if not set(splits) <= set(recipe.sft.splits) or recipe.sft.reasoning_styles.get(style, 0.0) <= 0:
        shares = ", ".join(f"{split}: 1" for split in splits)
        raise ConfigError(
            f"sft.splits ({', '.join(recipe.sft.splits)}) and sft.reasoning_styles "
            f"({', '.join(recipe.sft.reasoning_styles)}) leave out winners of the splits {', '.join(splits)} in style "
            f"{style!r}; add sft.splits='{{{shares}}}' sft.reasoning_styles='{{{style}: 1}}'"
        )


def _check_same(path: Path, settings: BestOfNSettings, splits: Sequence[str], collection: Collection) -> None:
    before = json.loads(path.read_text(encoding="utf-8"))
    asked = {"splits": list(splits), "content_hash": collection.content_hash(), **asdict(settings)}
    old = {"splits": before["splits"], "content_hash": before["collection"]["content_hash"], **before["settings"]}
    for name, value in asked.items():
        if name != "batch_size" and old.get(name) != value:
            raise ConfigError(
                f"cannot resume: {name} is {value!r} now but {old.get(name)!r} in {path}; use the same, or another "
                "folder"
            )
