"""Search-R3: a language model reasons about a query and then emits one token whose hidden state is the search vector.

The public names load on first use, so that importing the package and `--help` load no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.2.0"

_PUBLIC = {
    "SearchR3": "model.encoder",
    "QueryEmbeddings": "model.embeddings",
    "EmbeddingSettings": "model.settings",
    "PromptSet": "model.prompts",
    "PROMPT_SETS": "model.prompts",
    "Collection": "data.collection",
    "Document": "data.collection",
    "Query": "data.collection",
    "read_documents": "data.documents",
    "read_pairs": "data.pairs",
    "Recipe": "config",
    "load_recipe": "config",
    "train_sft": "training.sft",
    "train_grpo": "training.grpo",
    "train_distill": "training.modes.distill",
    "TrainingResult": "training.session",
    "RolloutSampler": "training.rl.sampler",
    "SampledReply": "training.rl.sampler",
    "SearchR3Error": "errors",
}
# These need the extra `mteb`; they are not in `__all__`, so that a star import works without it.
_WITH_MTEB = {
    "SearchR3MTEB": "evaluation.mteb",
    "collection_task": "evaluation.mteb_tasks",
    "run_mteb": "evaluation.mteb",
    "suite_tasks": "evaluation.mteb_tasks",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if module := _PUBLIC.get(name) or _WITH_MTEB.get(name):
        return getattr(import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
