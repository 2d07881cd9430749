"""The examples in public docstrings run and give what they show."""

from __future__ import annotations

import doctest
from importlib import import_module

import pytest

MODULES = (
    "model.encoder",
    "model.prompts",
    "data.asking",
    "data.collection",
    "data.contamination",
    "data.sources_text",
    "data.replies",
    "data.traces",
    "data.stdlib",
    "data.synthetic",
    "retrieval.metrics",
    "evaluation.statistics",
    "evaluation.systems",
    "evaluation.runner",
    "training.mining",
    "training.plan",
    "config",
)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str) -> None:
    result = doctest.testmod(import_module(f"search_r3.{name}"))
    assert result.attempted > 0
    assert result.failed == 0
