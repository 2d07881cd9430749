"""Commands that look ahead of a training: at what it takes, and at what stage 2 would learn from."""

from __future__ import annotations

import json
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .. import console
from .common import (
    DEFAULT_COLLECTION,
    CollectionOption,
    ModelArgument,
    ModelOptions,
    Overrides,
    RecipeOption,
    app,
    load_encoder,
    load_settings,
    takes_model_options,
)

if TYPE_CHECKING:
    from ..planning.footprint import Stage


StrategyName = Literal["single", "ddp", "fsdp2", "zero2", "zero3"]


class StageName(StrEnum):
    """What trains a model."""

    sft = "sft"
    grpo = "grpo"
    distill = "distill"


@app.command()
def plan(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe.")],
    overrides: Overrides = None,
    stage: Annotated[list[StageName] | None, typer.Option(help="By default sft and grpo.")] = None,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs, one process on each.")] = 8,
    gpu_memory: Annotated[float, typer.Option(min=0.1, help="Memory of a GPU in GB (10^9 bytes).")] = 80.0,
    strategy: Annotated[StrategyName | None, typer.Option(help="By default fsdp2; of one GPU single.")] = None,
    documents: Annotated[int, typer.Option(min=1, help="Documents of the corpus.")] = 100_000,
    queries: Annotated[int, typer.Option(min=1, help="Queries that distill learns from.")] = 10_000,
    query_tokens: Annotated[int, typer.Option(min=1, help="Mean tokens of a query.")] = 24,
    document_tokens: Annotated[int, typer.Option(min=1, help="Mean tokens of a document.")] = 180,
    reasoning_tokens: Annotated[int, typer.Option(min=1, help="Mean tokens of reasoning.")] = 120,
    longest_query: Annotated[int, typer.Option(min=1, help="Tokens of the longest query.")] = 128,
    tokens_per_second: Annotated[
        float | None, typer.Option(min=0.001, help="Trained tokens per second of all GPUs, as measured.")
    ] = None,
    decoded_per_second: Annotated[
        float | None, typer.Option(min=0.001, help="Tokens of rollouts per second of all GPUs, as measured.")
    ] = None,
    tflops: Annotated[float, typer.Option(min=0.001, help="A GPU's peak (H100, H200: 990 in bfloat16).")] = 990.0,
    utilisation: Annotated[float, typer.Option(min=0.001, max=1, help="Share of the peak that is reached.")] = 0.4,
    threads: Annotated[int, typer.Option(min=1, help="Threads of a process on the CPU (OMP_NUM_THREADS).")] = 8,
    config: Annotated[Path | None, typer.Option(help="A config.json instead of that of the recipe's base.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Say what a recipe takes: parameters, memory per GPU by part, tokens per step, time. Nothing is loaded.

    Example: search-r3 plan recipes/qwen2.5-7b-sft.yaml --gpus 8 --stage sft sft.micro_batch_size=16
    """
    from ..config import load_recipe
    from ..planning import plan as planning
    from ..planning.corpus import Rates
    from ..planning.footprint import Lengths

    settings = load_recipe(recipe, overrides or [])
    gpu_bytes = gpu_memory * 1e9
    arguments: dict[str, Any] = {
        "gpus": gpus,
        "strategy": strategy,
        "documents": documents,
        "queries": queries,
        "lengths": Lengths(query_tokens, document_tokens, reasoning_tokens, longest_query),
        "speed": planning.Speed(tokens_per_second, tflops, utilisation, decoded_per_second, Rates(threads=threads)),
        "config": config,
    }
    records = {}
    for name in dict.fromkeys(stage or (StageName.sft, StageName.grpo)):
        key: Stage = name.value
        memory_plan = planning.plan(settings, key, **arguments)
        fits = memory_plan.fits(gpu_bytes)
        remedy = "" if fits else planning.suggest(settings, key, gpu_bytes, **arguments)
        records[name.value] = memory_plan.record() | {"fits": fits, "change": remedy}
        if not as_json:
            console.show_plan(memory_plan, settings.base, gpu_bytes, remedy)
    if as_json:
        console.say(json.dumps(records))


@app.command()
@takes_model_options
def probe(
    model: ModelArgument,
    options: ModelOptions,
    overrides: Overrides = None,
    collection: CollectionOption = None,
    recipe: RecipeOption = None,
    queries: Annotated[int, typer.Option(min=2, help="Queries looked at, spread over grpo.splits.")] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Say what RL would have to work with: rewards within groups, and whether what is written is read.

    Example: search-r3 probe runs/quickstart/sft/model --collection atlas grpo.group_size=8
    """
    from ..data.load import load_collection
    from ..training.probe import probe as look

    settings = load_settings(recipe, overrides)
    data = load_collection(collection or DEFAULT_COLLECTION)
    encoder = load_encoder(model, options)
    report = look(encoder, data, settings, queries, (lambda text: None) if as_json else console.say)
    if as_json:
        console.say(json.dumps(asdict(report)))
    else:
        console.show_probe(report)
