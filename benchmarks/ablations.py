"""What each part of both stages is worth: trainings that differ in one thing; choices by dev alone.

    python benchmarks/ablations.py --out runs/ablations                       # every arm, 3 seeds: hours
    python benchmarks/ablations.py --out runs/ablations --arms reward-ndcg winners --seeds 0
    python benchmarks/ablations.py --out runs/quick --quick                   # a few steps, minutes

One stage-1 model per seed serves all arms of stage 2 (`--stage-1 runs/seeds` takes those of benchmarks/quickstart.py);
arms of stage 1 train their own. What is complete is read, not repeated, and a training that was stopped goes on. Each
training is a process of one thread, so several calls with one `--out` share a machine: give them different seeds, or
different arms once the references `stage-1` and `grpo` are there.

Measured on the dev split: nDCG@10 of both modes (greedy), tokens, seconds of training, and nDCG@10 after another
query's reasoning and after the true one, which say whether what is written is still read. A difference to the reference
exceeds the seeds' spread where all seeds agree on its sign and its mean is larger than its range. `--test` reads the
test split, once, for the arm of stage 2 that is best on dev and for its reference.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import fmean, median
from typing import Any

from common import machine, say, spread

BENCHMARKS = Path(__file__).parent
STAGE_1 = {
    "stage-1": [],
    "stage-1-without-ce": ["sft.cross_entropy_weight=0"],
    "stage-1-with-kl": ["sft.kl_weight=1"],
    "stage-1-without-infonce": ["sft.info_nce_weight=0"],
    "stage-1-without-triplet": ["sft.triplet_weight=0"],
}
BARE = ["grpo.reward.ndcg=0", "grpo.reward.log_rank=0"]
STAGE_2 = {
    "grpo": [],
    "reward-ndcg": ["grpo.reward.log_rank=0"],
    "reward-log-rank": ["grpo.reward.ndcg=0", "grpo.reward.log_rank=1"],
    "reward-contrastive": [*BARE, "grpo.reward.contrastive=1"],
    "reward-all": ["grpo.reward.contrastive=0.5"],
    "reward-cosine": [*BARE, "grpo.reward.function=ablations:cosine"],
    "reward-0.1": ["grpo.reward.log_rank=0", "grpo.reward.function=ablations:cosine", "grpo.reward.custom=0.1"],
    "forced-earn": ["grpo.reward.forced_ranks=true"],
    "price-per-token": ["grpo.reward.tokens=0.1"],
    "pathwise": ["grpo.embedding_loss_weight=0.1"],
    "pathwise-strong": ["grpo.embedding_loss_weight=1"],
    "winners": ["grpo.embedding_loss_weight=0.1", "grpo.embedding_loss_on=winners"],
    "winners-strong": ["grpo.embedding_loss_weight=1", "grpo.embedding_loss_on=winners"],
    "direct-too": ["grpo.direct_loss_weight=0.1"],
    "winners-direct-too": [
        "grpo.embedding_loss_weight=0.1",
        "grpo.embedding_loss_on=winners",
        "grpo.direct_loss_weight=0.1",
    ],
    "documents-never": ["grpo.refresh.policy=never"],
    "documents-shortlist": ["grpo.refresh.policy=shortlist"],
    "documents-frozen": ["grpo.documents=frozen"],
    "leave-one-out": ["grpo.baseline=leave_one_out", "grpo.advantage_scale=none"],
    "no-scale": ["grpo.advantage_scale=none"],
    "baseline-direct": ["grpo.baseline=direct"],
    "redraws": ["grpo.redraws=2"],
    "curriculum": ["grpo.curriculum=3"],
    "splits-of-both": ["grpo.splits=[rl,sft]"],
    "hotter": ["grpo.sampling_temperature=1"],
    "two-passes": ["grpo.num_iterations=2"],
    "best-of-n": [
        "sft.splits={rl: 1}",
        "sft.reasoning_styles={own: 1}",
        "sft.steps=20",
        "sft.warmup_steps=4",
        "sft.batch_size=64",
        "sft.learning_rate=1e-4",
    ],
}
"""Arm -> what it changes. The first of each stage is the reference of the others."""
ROUNDS = 3
SAMPLING = ["--rounds", ROUNDS, "--samples", 8, "--temperature", 0.8, "--replace"]
"""Of the arm best-of-n, so that it has the queries, the steps and about the replies (8,112 for 7,680) of `grpo`."""
MEASURES = ("reason", "direct", "tokens", "seconds", "other", "true", "forced")
QUICK = ["sft.steps=60", "sft.batch_size=12", "grpo.steps=2", "grpo.queries_per_step=8", "grpo.group_size=4"]


def cosine(outcome: Any) -> float:
    """The reward of an arm: (1 + mean cosine to the relevant documents) / 2."""
    return (1 + fmean(outcome.cosines)) / 2


def reference_of(arm: str) -> str:
    """The arm that this one is compared with."""
    return next(iter(STAGE_1 if arm in STAGE_1 else STAGE_2))


def train(arm: str, seed: int, options: argparse.Namespace) -> Path:
    """Train an arm, or go on with it; returns its run directory."""
    folder = options.out / f"seed{seed}" / arm
    if arm == "best-of-n":
        folder /= f"round-{ROUNDS}"  # itself a run
    stage, changes = stage_of(arm), (STAGE_1 | STAGE_2)[arm]
    if model_of(folder, stage).joinpath("config.json").exists():
        return folder
    settings = [*(QUICK if options.quick else []), *options.set, f"seed={seed}", f"run_dir={folder}", *changes]
    command = [stage, *settings]
    if arm in STAGE_2:
        own = None if options.stage_1 is None else options.stage_1 / f"seed{seed}"
        begin = model_of(own or train("stage-1", seed, options), "sft")
        command += ["--model", begin]
        if arm == "best-of-n":
            command = [arm, begin, folder.parent, *settings, *SAMPLING, "--seed", seed]
    command = [sys.executable, "-m", "search_r3.cli", *command, "--recipe", options.recipe, "--resume"]
    paths = os.pathsep.join([str(BENCHMARKS), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    say(f"seed {seed}: {arm}")
    subprocess.run([str(word) for word in command], check=True, env=environment, stdout=subprocess.DEVNULL)
    return folder


def stage_of(arm: str) -> str:
    """The stage that leaves an arm's model."""
    return "sft" if arm in STAGE_1 or arm == "best-of-n" else "grpo"


def model_of(folder: Path, stage: str) -> Path:
    """The model that a stage left in a run directory."""
    return folder / "model" if stage == "grpo" else folder / "sft" / "model"


def measured(arm: str, seed: int, options: argparse.Namespace, split: str) -> dict[str, float]:
    """What an arm's model is worth on a split, from its folder where it stands there already."""
    import torch

    from search_r3.config import load_recipe
    from search_r3.data.load import load_collection
    from search_r3.data.triples import reasoning_traces
    from search_r3.evaluation.swapped import measure_in, swapped_reasoning
    from search_r3.model.encoder import SearchR3
    from search_r3.retrieval.index import ExactIndex

    folder = train(arm, seed, options)
    path = folder / f"measured-{split}.json"
    if path.exists():
        values: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
        return values
    torch.set_num_threads(1)
    recipe = load_recipe(folder / "settings.yaml")
    collection = load_collection(recipe.collection)
    qrels = {one: gains for one, gains in collection.split(split).items() if any(gain > 0 for gain in gains.values())}
    stage = stage_of(arm)
    model = SearchR3(model_of(folder, stage), device="cpu")
    documents, queries = collection.texts(), [collection.queries[query_id] for query_id in qrels]
    texts = [query.text for query in queries]
    measure = measure_in(
        ExactIndex(list(documents), model.encode_document(list(documents.values()))), collection, qrels
    )  # fmt: skip
    answers = model.encode_query(texts, "reason")
    traces = [reasoning_traces(query) for query in queries]
    styles = recipe.sft.reasoning_styles
    true = {i: own[max(own, key=lambda style: styles.get(style, 0.0))] for i, own in enumerate(traces) if own}
    runs = sorted(folder.parent.glob("round-*")) if arm == "best-of-n" else [folder]
    rows = [json.loads(line) for run in runs for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    sampled = [json.loads(path.read_text("utf-8")) for run in runs for path in run.glob("collection/best-of-n.json")]
    values = {
        "reason": fmean(measure(answers.vectors)),
        "direct": fmean(measure(model.encode_query(texts, "direct").vectors)),
        "tokens": fmean(answers.reasoning_tokens),
        "forced": fmean(answers.forced),
        "seconds": sum(row.get("seconds", 0.0) for row in rows if row["stage"] == stage)
        + sum(one["seconds"] for one in sampled),
        **swapped_reasoning(model, texts, answers.reasoning, measure, true),
    }
    path.write_text(json.dumps(values), encoding="utf-8")
    return values


def compare(arm: list[dict[str, float]], reference: list[dict[str, float]]) -> dict[str, Any]:
    """The differences in nDCG@10 of reason mode, seed by seed, and whether they exceed their spread."""
    differences = [one["reason"] - other["reason"] for one, other in zip(arm, reference, strict=True)]
    agreed = min(differences) > 0 or max(differences) < 0
    exceeds = len(differences) > 1 and agreed and abs(fmean(differences)) > max(differences) - min(differences)
    return {"differences": differences, "mean": fmean(differences), "exceeds_spread": exceeds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--arms", nargs="+", choices=[*STAGE_1, *STAGE_2], default=[*STAGE_1, *STAGE_2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--recipe", type=Path, default=Path("recipes/quickstart.yaml"))
    parser.add_argument("--stage-1", type=Path, help="folder with seed0/sft/model, ...: stage-1 models to begin from")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of all trainings")
    parser.add_argument("--test", action="store_true", help="read the test split for the chosen arm and the reference")
    parser.add_argument("--quick", action="store_true", help="one seed, a few steps")
    options = parser.parse_args()
    seeds = options.seeds[:1] if options.quick else options.seeds
    if options.stage_1 is not None:
        options.arms = [arm for arm in options.arms if arm != "stage-1"]
    arms = list(dict.fromkeys([*map(reference_of, options.arms), *options.arms]))
    if options.stage_1 is not None and "stage-1" in arms:
        parser.error("arms of stage 1 need a reference of their own: leave --stage-1 out")
    dev = {arm: [measured(arm, seed, options, "dev") for seed in seeds] for arm in arms}
    compared = {arm: compare(dev[arm], dev[reference_of(arm)]) for arm in arms}
    print(f"\n| arm, dev split | {' | '.join(MEASURES)} | minus its reference | exceeds the spread |")
    print("|---|" + "---|" * (len(MEASURES) + 2))
    for arm, values in dev.items():
        cells = [spread([one[name] for one in values], 0 if name == "seconds" else 3) for name in MEASURES[:2]]
        cells += [f"{median([one.get(name, float('nan')) for one in values]):.4g}" for name in MEASURES[2:]]
        one = compared[arm]
        cells += (
            ["", ""] if arm == reference_of(arm) else [f"{one['mean']:+.3f}", "yes" if one["exceeds_spread"] else ""]
        )
        print(f"| `{arm}` | {' | '.join(cells)} |")
    record: dict[str, Any] = {"benchmark": "ablations", "seeds": seeds, "dev": dev, "compared": compared}
    second = [arm for arm in arms if arm in STAGE_2]
    if second:
        record["chosen"] = chosen = max(second, key=lambda arm: fmean(one["reason"] for one in dev[arm]))
        say(f"best on dev: {chosen}")
        if options.test:
            both = dict.fromkeys([chosen, reference_of(chosen)])
            record["test"] = {arm: [measured(arm, seed, options, "test") for seed in seeds] for arm in both}
    record |= {"changes": {arm: (STAGE_1 | STAGE_2)[arm] for arm in arms}, "machine": machine()}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "ablations.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
