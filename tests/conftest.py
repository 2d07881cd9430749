"""Shared fixtures: a 40-document collection and tiny random models with a real tokenizer, on disk."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_ASSETS_CACHE"] = tempfile.mkdtemp(prefix="search-r3-assets-")  # and not the user's own

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from search_r3 import cli
from search_r3.data.collection import Collection, Document, Query
from search_r3.model.backbone import Backbone
from search_r3.model.encoder import SearchR3
from search_r3.model.loading import load_backbone
from search_r3.model.prompts import PROMPT_SETS
from search_r3.pretraining.tokenizer import train_tokenizer

transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)  # tiny models are faster so, and results do not depend on the machine


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-skips", action="store_true", help="A skipped test fails: here everything is installed.")


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["HF_ASSETS_CACHE"], ignore_errors=True)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    return unskipped(report) if item.config.getoption("--no-skips") else report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    report = yield
    return unskipped(report) if collector.config.getoption("--no-skips") else report


def unskipped(report: Any) -> Any:
    """A report as it is, or that of a failure where it says that something was skipped."""
    if report.outcome == "skipped" and not hasattr(report, "wasxfail"):
        report.outcome, report.longrepr = "failed", f"skipped, and --no-skips allows none: {report.longrepr[2]}"
    return report


COLOURS = ("red", "green", "blue", "black", "white")
THINGS = ("house", "boat", "horse", "stone", "lamp", "river", "apple", "chair")


def small_collection() -> Collection:
    documents = {
        f"d{i:02d}": Document(f"d{i:02d}", f"This one is about a {colour} {thing}.", f"{colour} {thing}")
        for i, (colour, thing) in enumerate((c, t) for c in COLOURS for t in THINGS)
    }
    queries, qrels = {}, {"train": {}, "dev": {}, "test": {}}
    for i, document in enumerate(documents.values()):
        text = f"where is the {document.title}?"
        traces = {"chain": f"It is the {document.title}.", "restate": "A thing."}
        queries[f"q{i:02d}"] = Query(f"q{i:02d}", text, {"reasoning": traces})
        qrels[("train", "train", "dev", "test")[i % 4]][f"q{i:02d}"] = {document.doc_id: 1}
    return Collection("small", documents, queries, qrels)


@pytest.fixture(scope="session")
def collection() -> Collection:
    return small_collection()


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    collection = small_collection()
    texts = [d.full_text for d in collection.documents.values()] + [q.text for q in collection.queries.values()]
    prompts = PROMPT_SETS["search-r3"]
    return train_tokenizer([*texts, prompts.direct_system, prompts.reason_system, prompts.document_system] * 5, 400)


def tiny_model(kind: str, tokenizer: Any, tied: bool = True, spare_rows: int = 0) -> Any:
    """A random causal LM of that architecture; `spare_rows` rows more than the tokenizer has entries."""
    torch.manual_seed(1)
    config = {
        "qwen2": transformers.Qwen2Config,
        "qwen3": transformers.Qwen3Config,
        "llama": transformers.LlamaConfig,
    }[kind](
        vocab_size=len(tokenizer) + spare_rows,
        hidden_size=32,
        num_hidden_layers=2,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.1,
    )
    return transformers.AutoModelForCausalLM.from_config(config)


def save_model(folder: Path, tokenizer: Any, model: Any) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_tiny(folder: Path, tokenizer: Any, kind: str = "qwen2", **options: Any) -> Path:
    return save_model(folder, tokenizer, tiny_model(kind, tokenizer, **options))


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A tiny Qwen2 directory with spare vocabulary rows, as Qwen's own have."""
    return save_tiny(tmp_path_factory.mktemp("tiny") / "qwen2", tokenizer, spare_rows=16)


def favour(backbone: Backbone, token: int, bias: float) -> None:
    """Make a token likely (or impossible) whatever the context, by an output layer of its own."""
    weight = backbone.model.get_output_embeddings().weight.detach().clone()
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight.data, layer.bias.data = weight, torch.zeros(weight.shape[0])
    layer.bias.data[token] = bias
    backbone.model.set_output_embeddings(layer)


@pytest.fixture
def backbone(tiny_path: Path) -> Backbone:
    return load_backbone(tiny_path)


@pytest.fixture
def model(tiny_path: Path) -> SearchR3:
    return SearchR3(tiny_path, device="cpu")


@pytest.fixture(scope="session")
def collection_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "small"
    small_collection().save(path)
    return path


SMALL = [
    "max_length=120", "max_new_tokens=16", "sft.steps=120", "sft.learning_rate=1e-2", "sft.batch_size=4",
    "sft.splits={train: 1.0}", "sft.reasoning_styles={restate: 1.0}", "grpo.steps=3", "grpo.queries_per_step=2",
    "grpo.group_size=3", "grpo.splits=[train]", "grpo.evaluate_every=2", "evaluation.rollout_queries=4",
    "evaluation.permutations=100", "evaluation.bootstrap=100",
    "grpo.refresh={policy: selective, max_documents: 10, audit_every: 1, audit_documents: 5}",
]  # fmt: skip


class Stop(Exception):
    """Stands for the interruption of a training."""


class StopAt(transformers.TrainerCallback):
    """Interrupts a training after that step is logged."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_log(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        if state.global_step == self.step:
            raise Stop


def count_encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of documents of every call of `encode_document` from now on."""
    encoded: list[int] = []
    encode = SearchR3.encode_document

    def counting(self: SearchR3, texts: Any, **options: Any) -> Any:
        encoded.append(len(texts))
        return encode(self, texts, **options)

    monkeypatch.setattr(SearchR3, "encode_document", counting)
    return encoded


def call(monkeypatch: pytest.MonkeyPatch, *args: object) -> int:
    monkeypatch.setattr(sys, "argv", ["search-r3", *map(str, args)])
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory: pytest.TempPathFactory, tiny_path: Path, collection_path: Path) -> Path:
    """A whole quickstart on a tiny model and 40 documents."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    with pytest.MonkeyPatch.context() as patch:
        where = [f"run_dir={folder}", f"base={tiny_path}", f"collection={collection_path}"]
        assert call(patch, "quickstart", *SMALL, *where) == 0
    return folder
