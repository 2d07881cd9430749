"""Stage 1 with frozen documents: it trains what encodes queries, from a trained model or from one with a query side."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from search_r3.config import load_recipe
from search_r3.errors import ConfigError, ModelError
from search_r3.files import hash_file
from search_r3.model.encoder import SearchR3
from search_r3.training.engine import make_engine
from search_r3.training.grpo import train_grpo
from search_r3.training.modes.distill import train_distill
from search_r3.training.modes.frozen import frozen_documents
from search_r3.training.rl.sampler import PolicyWeights
from search_r3.training.run import Run
from search_r3.training.sft import train_sft
from tests.conftest import Stop, StopAt, count_encoded, save_tiny

SETTINGS = [
    "max_length=120", "max_new_tokens=16", "sft.batch_size=4", "sft.learning_rate=1e-2", "sft.splits={train: 1.0}",
    "sft.reasoning_styles={restate: 1.0}", "sft.evaluate_every=0", "sft.keep=last", "sft.kl_weight=0", "save_every=2",
    "grpo.steps=2", "grpo.queries_per_step=4", "grpo.group_size=4", "grpo.splits=[train]", "grpo.learning_rate=5e-3",
    "grpo.evaluate_every=0", "grpo.keep=last", "distill.steps=2", "distill.batch_size=4", "distill.evaluate_every=0",
]  # fmt: skip
FROZEN = [
    "sft.documents=frozen", "sft.steps=4", "sft.random_negatives=6", "sft.evaluate_every=2", "sft.latent_steps=2",
]  # fmt: skip
KINDS = {"whole": [], "adapters": ["lora={rank: 4, alpha: 8}"]}
TEXTS = ["where is the red house?", "a blue boat", "the white chair"]


@pytest.fixture(scope="module")
def stage_1(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any, collection_path: Path) -> Path:
    folder = tmp_path_factory.mktemp("begin")
    base = save_tiny(folder / "base", tokenizer, tied=True, spare_rows=16)
    where = [f"run_dir={folder}/1", f"base={base}", f"collection={collection_path}"]
    return train_sft(load_recipe(None, [*SETTINGS, *where, "sft.steps=120"])).model_path


@pytest.fixture(scope="module")
def recipe(collection_path: Path) -> Callable[..., Any]:
    def make(folder: Path, base: Path, *more: str) -> Any:
        where = [f"run_dir={folder}", f"base={base}", f"collection={collection_path}"]
        return load_recipe(None, [*SETTINGS, *FROZEN, *where, *more])

    return make


@pytest.fixture(scope="module", params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def trained(kind: str, tmp_path_factory: pytest.TempPathFactory, stage_1: Path, recipe: Callable[..., Any]) -> Path:
    return Path(train_sft(recipe(tmp_path_factory.mktemp(kind) / "2", stage_1, *KINDS[kind])).model_path)


def vectors(path: Path) -> tuple[Any, Any, Any]:
    model = SearchR3(path, device="cpu")
    return (
        model.encode_document(TEXTS),
        model.encode_query(TEXTS, "direct").vectors,
        model.encode_query(TEXTS, "reason").vectors,
    )


def test_documents_stay_and_queries_learn(trained: Path, stage_1: Path) -> None:
    assert hash_file(trained / "model.safetensors") == hash_file(stage_1 / "model.safetensors")
    before, after = vectors(stage_1), vectors(trained)
    np.testing.assert_array_equal(before[0], after[0])
    assert all(np.abs(one - two).max() > 1e-3 for one, two in zip(before[1:], after[1:], strict=True))


def test_the_first_step_has_the_losses_of_moving_documents(
    kind: str, trained: Path, stage_1: Path, recipe: Callable[..., Any], tmp_path: Path
) -> None:
    moving = train_sft(recipe(tmp_path / "moving", stage_1, *KINDS[kind], "sft.documents=moving")).log_history
    frozen = Run(recipe(trained.parents[1], stage_1, *KINDS[kind])).metrics("sft")
    names = ("cross_entropy", "info_nce", "triplet", "latent_info_nce", "latent_triplet", "latent_words", "loss")
    assert {name: frozen[0][name] for name in names} == pytest.approx({n: moving[0][n] for n in names}, abs=1e-5)
    assert frozen[0]["tokens"] < moving[0]["tokens"], "of documents none is computed"
    assert "dev_ndcg@10_direct" in frozen[-1]


def test_no_document_is_encoded_after_the_first_time(
    stage_1: Path, recipe: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = count_encoded(monkeypatch)
    settings = recipe(tmp_path / "run", stage_1)
    with pytest.raises(Stop):
        train_sft(settings, callbacks=[StopAt(3)])
    train_sft(settings, resume=True)
    assert encoded == [40], "neither by a step, nor by a dev evaluation, nor by the run that goes on"


def test_a_resumed_run_equals_an_unbroken_one(
    kind: str, trained: Path, stage_1: Path, recipe: Callable[..., Any], tmp_path: Path
) -> None:
    settings = recipe(tmp_path / "run", stage_1, *KINDS[kind])
    with pytest.raises(Stop):
        train_sft(settings, callbacks=[StopAt(3)])
    found = train_sft(settings, resume=True).model_path
    for file in (trained / "queries").iterdir():
        assert hash_file(found / "queries" / file.name) == hash_file(file), file.name


def test_chunks_change_no_gradient(
    kind: str, trained: Path, stage_1: Path, recipe: Callable[..., Any], tmp_path: Path
) -> None:
    chunked = train_sft(recipe(tmp_path / "run", stage_1, *KINDS[kind], "sft.micro_batch_size=3")).log_history
    whole = Run(recipe(trained.parents[1], stage_1, *KINDS[kind])).metrics("sft")
    for one, two in zip(chunked, whole, strict=True):
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-3)
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-4)


def test_soft_tokens_learn_beside_frozen_documents(trained: Path) -> None:
    model = SearchR3(trained, device="cpu")
    found = model.encode_query(TEXTS, "latent")
    assert found.reasoning_tokens == [2, 2, 2]
    for mode in ("direct", "reason"):
        assert np.abs(found.vectors - model.encode_query(TEXTS, mode).vectors).max() > 1e-3  # type: ignore[arg-type]
    names = {"latent_info_nce", "latent_triplet", "latent_words"}
    rows = [json.loads(line) for line in (trained.parents[1] / "metrics.jsonl").read_text().splitlines()]
    assert all(names <= row.keys() for row in rows if "loss" in row)


def test_weights_of_documents_alone_are_given_back_when_these_are_encoded(
    kind: str, trained: Path, collection: Any, recipe: Callable[..., Any], tmp_path: Path
) -> None:
    settings = recipe(tmp_path / "run", trained, *KINDS[kind])
    expected = SearchR3(trained, device="cpu").encode_document(list(collection.texts().values()))
    for _ in range(2):  # and where they were encoded before
        model = SearchR3(trained, device="cpu")
        assert model.backbone.documents is not None
        weights = weakref.ref(model.backbone.documents.model.get_output_embeddings())
        engine = make_engine(model, settings, settings.distill)
        index = frozen_documents(model, collection, tmp_path / "kept", engine)
        np.testing.assert_array_equal(index.vectors_at(index.rows_of(list(collection.documents))), expected)
    gc.collect()
    assert (weights() is None) == (kind == "whole")
    model.save_pretrained(tmp_path / "saved")  # as callbacks may
    for one, other in zip(vectors(tmp_path / "saved"), vectors(trained), strict=True):
        np.testing.assert_array_equal(one, other)
    if kind == "whole":
        with pytest.raises(ModelError, match="was given back when the stage had encoded its own; load the model once"):
            model.encode_document(TEXTS)


class Side(TrainerCallback):
    """Looks whether what encodes documents has its weights while a stage trains."""

    def on_step_end(self, *_: Any, model: SearchR3, **__: Any) -> None:
        assert model.backbone.documents is not None
        self.has_weights = isinstance(model.backbone.documents.model, torch.nn.Module)


@pytest.mark.parametrize("stage", ["sft", "grpo", "distill"])
def test_a_stage_that_keeps_documents_goes_on_from_a_query_side(
    kind: str, trained: Path, stage_1: Path, recipe: Callable[..., Any], tmp_path: Path, stage: str
) -> None:
    more = [*KINDS[kind], "grpo.documents=frozen", "grpo.reward.forced_ranks=true"]
    settings, side = recipe(tmp_path / "run", trained, *more), Side()
    if stage == "sft":
        path = train_sft(settings, callbacks=[side]).model_path
    elif stage == "grpo":
        path = train_grpo(settings, model=trained, callbacks=[side]).model_path
    else:
        path = train_distill(trained, settings, callbacks=[side]).model_path
    assert side.has_weights == (kind == "adapters"), "adapters share them"
    first, before, after = vectors(stage_1), vectors(trained), vectors(path)
    np.testing.assert_array_equal(first[0], after[0])
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        assert hash_file(path / file) == hash_file(trained / file)
    moved = np.abs(after[1] - before[1]).max()
    assert 1e-4 < moved, "it learns"
    untrained = recipe(
        tmp_path / "still", trained, *more, "sft.learning_rate=1e-30", "sft.steps=1", "sft.evaluate_every=0"
    )
    if stage == "sft":
        still = vectors(train_sft(untrained).model_path)
        np.testing.assert_allclose(still[1], before[1], atol=1e-6)  # it begins from that side, and not from stage 1
    names = {file.name for file in (trained / "queries").iterdir()}
    assert {file.name for file in (path / "queries").iterdir()} == names


def test_a_sampler_that_holds_a_copy_gets_what_encodes_queries(
    kind: str, trained: Path, stage_1: Path, recipe: Callable[..., Any], tmp_path: Path
) -> None:
    settings, model = recipe(tmp_path / "run", trained, *KINDS[kind]), SearchR3(trained, device="cpu")
    PolicyWeights(make_engine(model, settings, settings.grpo), model, settings, 0).save(tmp_path / "copy")
    copy = SearchR3(tmp_path / "copy", device="cpu")
    assert copy.backbone.documents is None, "a server loads one model"
    for mode in ("direct", "reason"):
        found, expected = (one.encode_query(TEXTS, mode).vectors for one in (copy, SearchR3(trained, device="cpu")))
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_what_cannot_go_on_is_refused_with_the_remedy(
    kind: str, trained: Path, stage_1: Path, recipe: Callable[..., Any], tmp_path: Path
) -> None:
    other = "adapters" if kind == "whole" else "whole"
    said = (
        r"have whole weights; set lora.rank=0" if kind == "whole" else r"have adapters; set lora=\{rank: 4, alpha: 8\}"
    )
    cases: list[tuple[Path, list[str], str]] = [
        (trained, [*KINDS[kind], "sft.documents=moving"], "only a stage that keeps documents goes on from there"),
        (trained, KINDS[other], said),
        (stage_1, ["max_length=100"], "sft.documents=frozen with max_length=100, but .* max_length=120; set that"),
    ]
    if kind == "adapters":
        cases.append((trained, [*KINDS[kind], "sft.kl_weight=0.1"], "set sft.kl_weight=0"))
        cases.append(
            (trained, ["lora={rank: 4, alpha: 8, target_modules: [q_proj]}"], r"set lora.target_modules=\['down_proj")
        )
    for place, (base, more, message) in enumerate(cases):
        with pytest.raises(ConfigError, match=message):
            train_sft(recipe(tmp_path / str(place), base, *more))
    base = trained.parents[3] / "base"
    with pytest.raises(ConfigError, match=r"reload=vllm_adapter: adapters alone do not say what .*set reload=vllm"):
        train_grpo(
            recipe(
                *(tmp_path / "server", base, *KINDS[kind], "grpo.documents=frozen"),
                "grpo.sampler={url: 'http://localhost:1/v1', reload: vllm_adapter}",
            ),
            model=trained,
        )
