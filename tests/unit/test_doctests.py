"""The examples in public docstrings run and give what they show."""

from __future__ import annotations

import doctest
from importlib import import_module

import pytest

MODULES = (
    "files",
    "model.embeddings",
    "model.encoder",
    "model.engine.decoding",
    "model.loaded",
    "model.modes.gate",
    "model.prompts",
    "data.writing.asking",
    "data.collection",
    "data.load",
    "data.documents",
    "data.pairs",
    "data.reading.texts",
    "data.reading.html",
    "data.reading.chunks",
    "data.reading.files",
    "data.mixing.contamination",
    "data.mixing.sources_text",
    "data.writing.replies",
    "data.generators.stdlib",
    "retrieval.metrics",
    "evaluation.significance",
    "evaluation.systems",
    "evaluation.runner",
    "evaluation.frontier.curves",
    "mining.mining",
    "planning.plan",
    "serving.engine",
    "serving.filters",
    "retrieval.encoding.fingerprint",
    "serving.store",
    "integrations.source",
    "training.best_of_n",
    "training.modes.logistic",
    "training.sft",
    "training.grpo",
    "training.modes.distill",
    "config",
    "extras",
)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str) -> None:
    if name == "serving.store":
        pytest.importorskip("lancedb")
    result = doctest.testmod(import_module(f"search_r3.{name}"))
    assert result.attempted > 0
    assert result.failed == 0
