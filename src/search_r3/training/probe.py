"""What stage 2 would have to work with, before it is paid for: groups of rollouts, and the swapped-reasoning test."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from ..config import Recipe
from ..data.collection import Collection, Query
from ..data.draws import step_rng
from ..data.triples import judged_queries, reasoning_traces
from ..environment.environment import rollout_vectors
from ..environment.reward import DEEPEST
from ..environment.scoring import Scorer
from ..errors import DataError
from ..evaluation.swapped import measure_in, swapped_reasoning
from ..model.encoder import SearchR3
from ..retrieval.index import ExactIndex
from .rl.rollouts import answer_directly, roll_out
from .rl.signals import group_cosines, group_signals

NOTABLE = 0.05
"""nDCG, or a share, that makes a finding."""
ENOUGH_MIXED = 0.3
"""Share of groups with different ranks below which most of a step teaches nothing."""
WRITING, READING, NEITHER = "the writing", "the reading", "neither"
ALIKE = 0.98
"""Cosine within groups from which on the vectors hardly depend on what is written."""


@dataclass(frozen=True)
class Finding:
    """One sentence, and what it says is to be mended: `the writing`, `the reading` or `neither`."""

    mend: str
    text: str


@dataclass(frozen=True)
class ProbeReport:
    """What was found.

    Attributes:
        queries: how many were looked at.
        values: by the names of `metrics.jsonl`; `ndcg_direct` and `ndcg_reason` of the two modes, greedy; `ndcg_own`,
            `ndcg_other`, `ndcg_none`, `ndcg_true`, `ndcg_own_where_true` of the swapped-reasoning test.
        findings: what they say.
    """

    queries: int
    values: dict[str, float]
    findings: list[Finding]


def probe(
    model: SearchR3,
    collection: Collection,
    recipe: Recipe,
    queries: int = 64,
    note: Callable[[str], None] = lambda text: None,
) -> ProbeReport:
    """Roll out a sample of the queries that stage 2 would train on, and put texts into the model's mouth.

    Args:
        model: what stage 2 would begin from.
        collection: documents, queries and judgements.
        recipe: the reward, groups and splits of its section `grpo`; its seed.
        queries: how many, spread over the splits.
        note: told what is being done.

    Raises:
        DataError: an unknown split, a query without a relevant document, or fewer than two queries.
    """
    settings = recipe.grpo
    judged = judged_queries(collection, settings.splits)
    places = np.unique(np.linspace(0, len(judged) - 1, min(queries, len(judged))).round().astype(int))
    query_ids = [list(judged)[place] for place in places]
    if len(query_ids) < 2:
        raise DataError(f"a probe needs two queries at least; {', '.join(settings.splits)} gave {len(query_ids)}")
    qrels = {query_id: judged[query_id] for query_id in query_ids}
    asked = [collection.queries[query_id] for query_id in query_ids]
    documents = collection.texts()
    note(f"encoding {len(documents)} documents")
    index = ExactIndex(list(documents), model.encode_document(list(documents.values())))
    budget = model.backbone.settings.max_new_tokens
    scorer = Scorer(collection, qrels, settings.reward, k=settings.reward_k, max_new_tokens=budget)
    note(f"rolling out {len(asked)} queries, {settings.group_size} times each")
    values = _groups(model, asked, index, scorer, recipe)
    note("putting texts into the model's mouth")
    traces = [reasoning_traces(query) for query in asked]
    styles = recipe.sft.reasoning_styles
    true = {
        place: own[max(own, key=lambda style: styles.get(style, 0.0))] for place, own in enumerate(traces) if own
    }  # fmt: skip
    texts, instructions = [query.bare for query in asked], [query.instruction for query in asked]
    answers = model.encode_query(
        texts, "reason", instruction=instructions, batch_size=settings.rollout_batch_size
    )  # fmt: skip
    measure = measure_in(index, collection, qrels, settings.reward_k)
    values |= {"ndcg_reason": fmean(measure(answers.vectors))}
    values |= {"distinct_reasoning": len(set(answers.reasoning)) / len(texts)}
    swapped = swapped_reasoning(model, texts, answers.reasoning, measure, true, instructions)
    values |= {f"ndcg_{name}": value for name, value in swapped.items()}
    return ProbeReport(len(texts), values, judge(values))


def _groups(
    model: SearchR3, asked: Sequence[Query], index: ExactIndex, scorer: Scorer, recipe: Recipe
) -> dict[str, float]:
    """What groups of rollouts, and the direct replies, say."""
    settings, group_size, rng = recipe.grpo, recipe.grpo.group_size, step_rng(recipe.seed, "probe", 0)
    seeds = [rng.getrandbits(62) for _ in range(len(asked) * group_size)]
    rollouts = roll_out(model, settings, asked, seeds)
    replies = answer_directly(model, asked, settings.rollout_batch_size)
    targets = [scorer.query_rows(index, query.query_id) for query in asked]
    direct = scorer.score(index, replies, rollout_vectors(replies), targets)
    vectors, owners = rollout_vectors(rollouts), [target for target in targets for _ in range(group_size)]
    parts = [score.parts for score in scorer.score(index, rollouts, vectors, owners)]
    values = {
        "reward": fmean(part.total(settings.reward) for part in parts),
        "direct_reward": fmean(score.parts.total(settings.reward) for score in direct),
        "share_ge_half": fmean(part.ndcg >= 0.5 for part in parts),
        "forced_share": fmean(rollout.forced for rollout in rollouts),
        "reasoning_tokens": fmean(rollout.reasoning_tokens for rollout in rollouts),
        "group_cosine": fmean(group_cosines(vectors, group_size)),
        "direct_rank_2_to_1000": fmean(1 < score.best_rank <= DEEPEST for score in direct),
        "ndcg_direct": fmean(score.parts.ndcg for score in direct),
    }
    return values | group_signals(parts, settings.reward, group_size)


def judge(values: Mapping[str, float]) -> list[Finding]:
    """One sentence for each thing that the values say, and what it says is to be mended.

    Args:
        values: as `probe` names them.
    """
    return [*_judge_writing(values), *_judge_reading(values), *_judge_signal(values)]


def _judge_writing(values: Mapping[str, float]) -> Iterator[Finding]:
    forced, distinct = values["forced_share"], values["distinct_reasoning"]
    if forced > NOTABLE:
        remedy = "train stage 1 longer, or raise max_new_tokens, before RL"
        yield Finding(WRITING, f"{forced:.0%} of the replies never emit the embed token: {remedy}.")
    if distinct < 0.5:
        yield Finding(WRITING, f"Only {distinct:.0%} of the greedy replies differ: they are not about the query.")
    own, true = (values.get(f"ndcg_{name}", 0.0) for name in ("own_where_true", "true"))
    if true - own >= NOTABLE:
        worth = f"{true - own:.3f} more than the model's own ({true:.3f} against {own:.3f})"
        yield Finding(WRITING, f"True reasoning would be worth {worth}: better writing pays.")
    gain = values["ndcg_reason"] - values["ndcg_direct"]
    if gain <= -NOTABLE:
        yield Finding(WRITING, f"Reasoning costs {-gain:.3f} nDCG beside direct mode.")
    else:
        adds = f"adds {gain:.3f} nDCG to" if gain >= NOTABLE else f"stands level ({gain:+.3f} nDCG) with"
        yield Finding(NEITHER, f"Reasoning {adds} direct mode.")


def _judge_reading(values: Mapping[str, float]) -> Iterator[Finding]:
    own, other, direct, cosine = (values[name] for name in ("ndcg_own", "ndcg_other", "ndcg_direct", "group_cosine"))
    if cosine > ALIKE:
        effect = "what is written hardly moves them, and RL has hardly a signal"
        yield Finding(READING, f"Vectors of one query's rollouts have cosine {cosine:.3f}: {effect}.")
    if own - other >= NOTABLE:
        yield Finding(NEITHER, f"Another query's reasoning costs {own - other:.3f} nDCG: what is written is read.")
    else:
        beside = f"{other:.3f} against {own:.3f}"
        yield Finding(READING, f"Another query's reasoning serves as well ({beside}): what is written is not read.")
    if values.get("ndcg_true", 1.0) < direct - NOTABLE:
        beside = f"{values['ndcg_true']:.3f} against {direct:.3f}"
        yield Finding(READING, f"After true reasoning the vector finds less than in direct mode ({beside}).")


def _judge_signal(values: Mapping[str, float]) -> Iterator[Finding]:
    if values["groups_mixed"] < ENOUGH_MIXED:
        remedies = {
            "groups_all_0": "nothing is found (give log_rank a weight, or grpo.curriculum=3)",
            "groups_all_1": "nothing is left to find (other queries, or grpo.redraws=2)",
            "groups_tied": "replies rank alike (sample hotter, or larger groups)",
        }
        dead = remedies[max(remedies, key=lambda name: values[name])]
        mixed = f"{values['groups_mixed']:.0%} of the groups rank differently"
        yield Finding(NEITHER, f"Only {mixed}, and RL learns most from those; in most others {dead}.")
