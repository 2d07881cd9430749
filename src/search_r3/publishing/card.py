"""The model card: README.md of a model on the hub, written from what the files of its run say and from nothing else.

Front matter is in the hub's own format (`ModelCardData`, `model-index`); a number that no file holds is left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import PureWindowsPath
from statistics import fmean
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from ..evaluation.benchmark import package_versions
from ..evaluation.table import AVERAGED, markdown
from ..retrieval.metrics import MAIN
from .facts import BEFORE_RL, Facts

PAPER = "https://arxiv.org/abs/2510.07048"
TAGS = ("search-r3", "retrieval", "reasoning", "sentence-similarity")
PIPELINE = "feature-extraction"
WINDOW = 10
"""Steps whose mean stands for the end of a training: single steps are noisy."""
LOGGED = {
    "sft": {
        "loss": "weighted sum of the four",
        "cross_entropy": "nats per reply token",
        "kl_to_base": "nats per prompt token, base to tuned",
        "info_nce": "nats",
        "triplet": "cosine",
    },
    "grpo": {
        "reward": "mean total reward",
        "reward_ranking": "mean nDCG of the rollouts' vectors",
        "share_ge_half": "share of rollouts with `reward_ranking` of 0.5 or more",
        "forced_share": "share of rollouts whose embed token was forced",
        "reasoning_tokens": "mean per rollout",
        "equal_reward_share": "share of groups whose rewards are all equal",
        "kl_to_reference": "to the stage-1 model, per token",
    },
}
"""Stage -> what of metrics.jsonl is shown, with its meaning."""
TITLES = {"sft": "Stage 1: supervised", "grpo": "Stage 2: reinforcement learning (GRPO, the reward is the ranking)"}
UNUSED = ("name", "run_dir", "base_model", "evaluation", "trackers")
"""Settings that did not form the model, or that name places on a machine."""
_MARK = "<!-- written by search-r3 push, sha256 "


def model_card(facts: Facts, repo_id: str, license_id: str | None = None) -> str:
    """README.md for a model folder.

    Args:
        facts: of the model, as `gather_facts` read them.
        repo_id: `owner/name` of the model on the hub.
        license_id: as the hub spells it, e.g. `apache-2.0`; no file says it.
    """
    sections = [
        _what_it_is(facts, repo_id),
        _use(facts, repo_id),
        _prompts(facts),
        _training(facts),
        _results(facts),
        _limits(facts),
        _provenance(facts),
    ]
    text = f"---\n{_front_matter(facts, repo_id, license_id).to_yaml()}\n---\n\n"
    text += "\n\n".join(filter(None, sections)) + "\n\n"
    return f"{text}{_MARK}{_digest(text)} -->\n"


def is_own_card(text: str) -> bool:
    """Whether `model_card` wrote this text and nobody changed it since."""
    body, found, end = text.partition(_MARK)
    return bool(found) and end.strip() == f"{_digest(body)} -->"


def _digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()


def _front_matter(facts: Facts, repo_id: str, license_id: str | None) -> ModelCardData:
    results = _eval_results(facts)
    datasets = facts.hub_id(str(facts.recipe.get("collection", "")))
    return ModelCardData(
        # Not `transformers`: the code that the hub would show for it gives no search vectors.
        library_name="peft" if facts.adapter else "search-r3",
        pipeline_tag=PIPELINE,
        tags=list(TAGS),
        base_model=facts.hub_id(facts.base),
        datasets=[datasets] if datasets else None,
        license=license_id,
        model_name=repo_id.rpartition("/")[2] if results else None,
        eval_results=results or None,
    )


def _eval_results(facts: Facts) -> list[EvalResult]:
    """The results of the model itself, in both modes."""
    return [
        EvalResult(
            task_type="information-retrieval",
            task_name="Information retrieval",
            dataset_type=facts.hub_id(result.collection.source) or result.collection.name,
            dataset_name=result.collection.name,
            dataset_split=result.collection.split,
            dataset_args={"sha256": result.collection.hash},
            metric_type=measure.replace("@", "_at_"),
            metric_name=f"{measure}, {result.system.mode}",
            metric_value=result.scores[measure],
            metric_args={"mode": result.system.mode, "interval_95": list(result.intervals[measure])},
        )
        for result in facts.own
        for measure in AVERAGED
        if measure in result.scores
    ]


def _what_it_is(facts: Facts, repo_id: str) -> str:
    token = facts.settings.embed_token
    size = facts.config.get("hidden_size")
    vector = f"a vector of {size} values" if size else "a vector"
    lines = [
        f"# {repo_id.rpartition('/')[2]}",
        "",
        f"A [Search-R3]({PAPER}) model: a language model that reasons about a query and then emits `{token}`, whose "
        f"hidden state is the search embedding, {vector} of length 1 to be compared by cosine similarity. Documents "
        "are encoded without reasoning. In direct mode a query is embedded at once, too.",
    ]
    if facts.adapter:
        rank = f" of rank {facts.config['r']}" if "r" in facts.config else ""
        lines += ["", f"This is an adapter (LoRA{rank}, peft) for {_source(facts, facts.base) or 'its base model'}."]
    return "\n".join(lines)


def _use(facts: Facts, repo_id: str) -> str:
    load = f'from search_r3 import SearchR3\n\nmodel = SearchR3("{repo_id}")\n'
    needs = "package `search-r3`"
    if facts.adapter:
        needs = "packages `search-r3` and `peft`"
        base = facts.hub_id(facts.base) or "BASE_MODEL"
        load = (
            "from pathlib import Path\n\n"
            "from huggingface_hub import hf_hub_download\n"
            "from peft import PeftModel\n"
            "from search_r3 import EmbeddingSettings, SearchR3\n\n"
            f'settings = Path(hf_hub_download("{repo_id}", "search_r3.json")).read_text(encoding="utf-8")\n'
            f'model = SearchR3("{base}", settings=EmbeddingSettings.model_validate_json(settings))\n'
            f'model.backbone.model = PeftModel.from_pretrained(model.backbone.model, "{repo_id}")\n'
        )
    text = (
        f"## How to use it\n\nWith the {needs}:\n\n```python\n{load}\n"
        'queries = model.encode_query(["what do people pay with in Tashkent?"], mode="reason")\n'
        'documents = model.encode_document(["The Uzbekistani som is a currency."])\n'
        "print(queries.reasoning, model.similarity(queries, documents))\n```"
    )
    if not facts.adapter:
        text += (
            f'\n\n```console\n$ search-r3 search {repo_id} --collection FOLDER_OR_HUB_ID "a query"\n'
            f"$ search-r3 evaluate --model {repo_id} --collections FOLDER_OR_HUB_ID\n```"
        )
    return text


def _prompts(facts: Facts) -> str:
    settings = facts.settings
    shown = json.dumps(settings.prompts.model_dump(), indent=2, ensure_ascii=False)
    return (
        "## Prompts and limits\n\nThe model was trained with this wording, in its own chat template; "
        f"`search_r3.json` holds it and the package uses it:\n\n```json\n{shown}\n```\n\n"
        f"- A prompt, the text included, has at most {settings.max_length} tokens; longer texts lose their end.\n"
        f"- Reasoning has at most {settings.max_new_tokens} tokens; then `{settings.embed_token}` is forced, and the "
        "result says so (`forced`)."
    )


def _training(facts: Facts) -> str:
    recipe = facts.recipe
    if not recipe:
        return ""
    lines = ["## Training", ""]
    if base := _source(facts, str(recipe.get("base", ""))):
        lines.append(f"- Base model: {base}")
    if collection := str(recipe.get("collection", "")):
        lines.append(f"- Collection: {_source(facts, collection, 'datasets/')}")
    if "seed" in recipe:
        lines.append(f"- Seed: {recipe['seed']}")
    for stage, rows in facts.metrics.items():
        if rows:
            lines += ["", f"### {TITLES[stage]}", "", *_stage(stage, rows, recipe.get(stage) or {})]
    unused = (*UNUSED, *(stage for stage in TITLES if stage not in facts.metrics))
    kept = {key: _without_places(facts, value) for key, value in recipe.items() if key not in unused}
    dump = yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)
    lines += ["", f"<details><summary>All settings</summary>\n\n```yaml\n{dump}```\n\n</details>"]
    return "\n".join(lines)


def _stage(stage: str, rows: list[dict[str, Any]], settings: Mapping[str, Any]) -> list[str]:
    """How one stage went: its length, and each logged value at its beginning and at its end."""
    steps = [row for row in rows if row["step"] > 0]
    if not steps:
        return []
    sizes = (
        ("batch_size", "{} queries per step"),
        ("queries_per_step", "{} queries per step"),
        ("group_size", "{} rollouts per query"),
        ("learning_rate", "peak learning rate {:g}"),
    )
    said = [
        f"{steps[-1]['step']} steps",
        *(form.format(settings[key]) for key, form in sizes if settings.get(key) is not None),
    ]
    if seconds := [row["seconds"] for row in steps if "seconds" in row]:
        said.append(f"{sum(seconds):,.0f} s in steps")
    last = steps[-WINDOW:]
    lines = [
        ", ".join(said) + ".",
        "",
        f"| value | meaning | first step | last {len(last)} steps |",
        "|---|---|---|---|",
    ]
    for key, meaning in LOGGED[stage].items():
        values = [row[key] for row in steps if key in row]
        ends = [row[key] for row in last if key in row]
        if ends:
            lines.append(f"| `{key}` | {meaning} | {values[0]:.4g} | {fmean(ends):.4g} |")
    for mode in ("direct", "reason"):
        looks = [(row["step"], row[f"dev_{MAIN}_{mode}"]) for row in rows if f"dev_{MAIN}_{mode}" in row]
        if looks:
            (first, start), (end, score) = looks[0], looks[-1]
            meaning = f"nDCG@10 on the dev split, steps {first} and {end}"
            lines.append(f"| `dev_{MAIN}_{mode}` | {meaning} | {start:.4g} | {score:.4g} |")
    return lines


def _results(facts: Facts) -> str:
    if not facts.own:
        return ""
    earlier = any(BEFORE_RL in result.system.name for result in facts.results)
    text = (
        f"## Results\n\n`direct` and `reason` are this model{f'; {BEFORE_RL} is its stage-1 model' * earlier}. "
        "Intervals are bootstrapped over the queries; times are of the machine named below.\n\n"
        f"{markdown(facts.results, facts.comparisons)}"
    )
    if facts.comparisons:
        text += "\np is of a paired randomisation test; Holm's correction is over all pairs of the same evaluation.\n"
    rollouts = facts.report.get("rollouts", {})
    shares = {"sft": ("share_ge_half_before",), "grpo": ("share_ge_half_before", "share_ge_half_after")}
    found = [rollouts[key] for key in shares.get(facts.stage, ()) if key in rollouts]
    if found and "count" in rollouts:
        ends = f"{found[-1]:.1%}" + (f" ({found[0]:.1%} {BEFORE_RL})" if len(found) > 1 else "")
        sampled = f"{rollouts['count']} rollouts sampled on queries of the test split"
        text += f"\nOf {sampled}, {ends} had a ranking reward of 0.5 or more.\n"
    return text.rstrip()


def _limits(facts: Facts) -> str:
    lines = []
    for result in facts.own:
        cost, where = result.cost, f"{result.collection.name}, {result.collection.split}"
        queries = result.collection.queries
        if result.system.mode == "reason":
            lines.append(f"- {where}: the embed token was forced for {cost.forced_share:.1%} of {queries} queries.")
        if cost.truncated_queries:
            lines.append(
                f"- {where}, {result.system.mode}: {cost.truncated_queries} of {queries} queries lost their end."
            )
    for result in {one.place: one for one in facts.own}.values():
        if result.collection.without_text:
            where = f"{result.collection.name}, {result.collection.split}"
            lines.append(f"- {where}: {result.collection.without_text} documents without text were left out.")
    rollouts = facts.report.get("rollouts", {})
    if facts.stage == "grpo" and "forced_share" in rollouts:
        lines.append(f"- Sampled rollouts on the test split: forced for {rollouts['forced_share']:.1%}.")
    if facts.own and "seed" in facts.recipe:
        lines.append(f"- All numbers are of one training with seed {facts.recipe['seed']}; other seeds give others.")
    if facts.adapter and facts.hub_id(facts.base) is None:
        lines.append("- The adapter does not name its base model by a hub id; it is of no use without that model.")
    return "\n".join(["## Limits", "", *dict.fromkeys(lines)]) if lines else ""


def _provenance(facts: Facts) -> str:
    rows = [
        ("Card written by", f"search-r3 {package_versions().get('search-r3', '')}".strip()),
        ("Files of the model, SHA-256", f"`{facts.revision}`"),
    ]
    if facts.recipe_hash:
        rows.append(("Settings of the run, SHA-256", f"`{facts.recipe_hash}`"))
    for result in {one.place: one for one in facts.own}.values():
        info = result.collection
        rows.append(
            (f"Data: {info.name}, {info.split}", f"{info.documents} documents, {info.queries} queries, `{info.hash}`")
        )
    known = [result.provenance for result in facts.own]
    packages = ("search-r3", "torch", "transformers")
    found = [one.get("versions", {}) for one in known]
    versions = (f"{name} {one[name]}" for name in packages for one in found if name in one)
    machines = (", ".join(str(one[key]) for key in ("device", "machine") if key in one) for one in known)
    rows += [
        ("Evaluated with", _each(versions)),
        ("Evaluated on", _each(machines)),
        ("Evaluated at", _each(str(one["date"]) for one in known if "date" in one)),
    ]
    if "seconds" in facts.report:
        rows.append(("Time of the process that ended the run", f"{facts.report['seconds']:,.0f} s"))
    if "peak_memory_bytes" in facts.report:
        rows.append(("Its peak memory", f"{facts.report['peak_memory_bytes'] / 2**30:.2f} GiB"))
    lines = [f"| {name} | {value} |" for name, value in rows if value]
    return "\n".join(["## Provenance", "", "| | |", "|---|---|", *lines])


def _each(values: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(filter(None, values)))


def _source(facts: Facts, source: str, kind: str = "") -> str:
    """A model or a collection in words; of a folder only its last name."""
    if source == "builtin":
        return "the small model that the package carries"
    if (known := facts.hub_id(source)) is not None:
        return f"[{source}](https://huggingface.co/{kind}{known})"
    return f"`{_last_name(source)}`" if source else ""


def _without_places(facts: Facts, value: Any) -> Any:
    """Settings without the folders of a machine: of each only its last name."""
    if isinstance(value, dict):
        return {key: _without_places(facts, one) for key, one in value.items()}
    if isinstance(value, list):
        return [_without_places(facts, one) for one in value]
    return _last_name(value) if isinstance(value, str) and facts.hub_id(value) is None else value


def _last_name(source: str) -> str:
    is_path = "/" in source or "\\" in source
    return (PureWindowsPath(source).name or source) if is_path else source
