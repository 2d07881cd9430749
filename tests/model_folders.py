"""A finished run made by hand: two stages of a tiny model, their metrics and results; what a card is written from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from example_results import make_result

from search_r3.config import Recipe, dump_recipe
from search_r3.evaluation.results import Result, save_result
from search_r3.evaluation.runner import write_summary
from search_r3.evaluation.significance import compare
from search_r3.files import hash_folder, write_json, write_text
from search_r3.model.loading import load_backbone

DATE = "2026-03-0{day}T10:00:00+00:00"
VERSIONS = {"search-r3": "9.8.7", "torch": "2.99.0"}
SFT_ROWS = [
    {"stage": "sft", "step": step, "loss": 8.0 / step, "info_nce": 3.0 / step, "seconds": 0.5} for step in range(1, 21)
]
RL_ROWS = [
    {"stage": "grpo", "step": 0, "dev_ndcg@10_direct": 0.5125, "dev_ndcg@10_reason": 0.6125},
    *(
        {
            "stage": "grpo",
            "step": step,
            "reward": 0.1 * step,
            "forced_share": 0.5 / step,
            "reasoning_tokens": 10.0 + step,
        }
        for step in range(1, 5)
    ),
    {"stage": "grpo", "step": 5, "reward": 0.5, "forced_share": 0.0625, "reasoning_tokens": 31.0}
    | {"dev_ndcg@10_direct": 0.5375, "dev_ndcg@10_reason": 0.7375},
]


def make_run(folder: Path, base: Path, **recipe: Any) -> Path:
    """Settings, metrics and the models of both stages; no results."""
    settings = {"run_dir": str(folder), "base": str(base), "seed": 7, "collection": "someone/facts:plain@main"} | recipe
    write_text(folder / "settings.yaml", dump_recipe(Recipe.model_validate(settings)))
    write_text(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in SFT_ROWS + RL_ROWS))
    backbone = load_backbone(base)
    backbone.save(folder / "sft" / "model")
    with torch.no_grad():
        backbone.model.get_input_embeddings().weight += 0.01
    backbone.save(folder / "model")
    return folder


def result_of(model: Path | None, name: str, mode: str, day: int = 1, **changes: Any) -> Result:
    """A result of that model, or of a baseline."""
    made = make_result(name, "search-r3" if model else "bm25", mode, {"reason": 0.8, "direct": 0.4}.get(mode, 0.2))
    system = made.system.model_copy(update={"revision": hash_folder(model)} if model else {})
    provenance = {"date": DATE.format(day=day), "versions": VERSIONS, "machine": "abacus", "device": "cpu"}
    return made.model_copy(update={"system": system, "provenance": provenance} | changes)


def add_results(run: Path) -> list[Result]:
    """The results and the report of a run of `quickstart`."""
    results = [result_of(None, "bm25", "")]
    for stage, model in (("sft", run / "sft" / "model"), ("rl", run / "model")):
        results += [result_of(model, f"{mode}/{stage}", mode) for mode in ("direct", "reason")]
    for result in results:
        save_result(result, run / "results")
    report = {
        "rows": {},
        "comparisons": [one.record() for one in compare(results, 100, 0)],
        "rollouts": {"share_ge_half_before": 0.375, "share_ge_half_after": 0.8125, "forced_share": 0.034, "count": 512},
        "seconds": 4321.0,
        "peak_memory_bytes": 3 * 2**29,
    }
    write_json(run / "report.json", report)
    return results


def make_evaluation(folder: Path, results: list[Result]) -> Path:
    """A folder of `evaluate`."""
    for result in results:
        save_result(result, folder / "results")
    write_summary(results, folder, 100, 0)
    return folder


def make_adapter(folder: Path, base: Path, names: str | None = None, seed: int = 3) -> Path:
    """A LoRA adapter with the embed token's row, as `sft` writes it; `names`: what it calls its base."""
    import peft

    backbone = load_backbone(base)
    torch.manual_seed(seed)
    config = peft.LoraConfig(
        r=2,
        target_modules=["q_proj", "v_proj"],
        init_lora_weights=False,
        trainable_token_indices={"embed_tokens": [backbone.embed_token_id]},  # as `lora` of a recipe has it
    )
    adapted = peft.get_peft_model(backbone.model, config)
    adapted.peft_config["default"].base_model_name_or_path = names or str(base)
    adapted.save_pretrained(folder, save_embedding_layers=False)  # else peft asks the hub about the base
    backbone.tokenizer.save_pretrained(folder)
    write_json(folder / "search_r3.json", backbone.settings.model_dump())
    return folder


def add_query_side(folder: Path, adapter: Path) -> Path:
    """Put an adapter beside what encodes documents, as a stage with frozen documents writes it."""
    queries = folder / "queries"
    queries.mkdir()
    shutil.copyfile(adapter / "adapter_model.safetensors", queries / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    write_json(queries / "adapter_config.json", config | {"base_model_name_or_path": None, "revision": None})
    settings = json.loads((folder / "search_r3.json").read_text(encoding="utf-8"))
    write_json(folder / "search_r3.json", settings | {"queries": "queries"})
    return folder
