"""Mode latent: stage 1 trains it, and it is a mode wherever there are modes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from search_r3.config import SFTSettings, load_recipe
from search_r3.data.collection import Collection
from search_r3.errors import ModelError
from search_r3.model.encoder import SearchR3
from search_r3.serving.engine import EngineThread
from search_r3.training import losses
from search_r3.training.batches import Batch
from search_r3.training.modes.latent import latent_losses
from search_r3.training.sft import train_sft
from tests.conftest import call, save_tiny

SETTINGS = [
    "max_length=120", "max_new_tokens=16", "sft.steps=40", "sft.batch_size=4", "sft.learning_rate=1e-2",
    "sft.splits={train: 1.0}", "sft.reasoning_styles={restate: 1.0}", "sft.latent_steps=2", "sft.evaluate_every=40",
]  # fmt: skip
TEXTS = ["where is the red house?", "a blue boat", "the white chair"]
NAMES = {"gircse": {"latent_info_nce", "latent_rise"}, "laser": {"latent_info_nce", "latent_kl"}}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base") / "base", tokenizer, spare_rows=16)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, base: Path, collection_path: Path) -> Path:
    folder = tmp_path_factory.mktemp("latent")
    where = [f"run_dir={folder}/run", f"base={base}", f"collection={collection_path}"]
    result = train_sft(load_recipe(None, [*SETTINGS, *where]))
    assert 0 <= result.metrics["dev_ndcg@10_latent"] <= 1
    assert result.metrics["latent_info_nce"] < result.log_history[0]["latent_info_nce"]
    return result.model_path


@pytest.fixture
def model(trained: Path) -> SearchR3:
    return SearchR3(trained, device="cpu")


def test_a_query_has_one_vector_alone_and_in_any_company(model: SearchR3) -> None:
    together = model.encode_query(TEXTS, "latent")
    assert together.reasoning_tokens == [2, 2, 2], "soft tokens are paid for as others are"
    assert (together.reasoning, together.forced) == ([""] * 3, [False] * 3)
    for text, vector in zip(TEXTS, together.vectors, strict=True):
        np.testing.assert_allclose(model.encode_query(text, "latent").vectors[0], vector, atol=1e-5)
        *pieces, last = model.stream_query(text, "latent")
        assert pieces == []
        np.testing.assert_allclose(last.vectors[0], vector, atol=1e-5)  # type: ignore[union-attr]
    for mode in ("direct", "reason"):
        assert np.abs(model.encode_query(TEXTS, mode).vectors - together.vectors).max() > 1e-3  # type: ignore[arg-type]
    shorter = model.encode_query(TEXTS, "latent", max_new_tokens=2)
    assert shorter.reasoning_tokens == [1, 1, 1]
    assert np.abs(shorter.vectors - together.vectors).max() > 1e-4


def test_the_server_thread_gives_the_same_beside_other_modes(model: SearchR3) -> None:
    expected = {mode: model.encode_query(TEXTS, mode).vectors for mode in ("latent", "reason", "direct")}  # type: ignore[arg-type]
    with EngineThread(model, slots=2) as engine:
        futures = {mode: engine.submit(TEXTS, mode) for mode in expected}  # type: ignore[arg-type]
        for mode, future in futures.items():
            np.testing.assert_allclose(future.result(20).vectors, expected[mode], atol=1e-5)
        assert [one.reasoning_tokens for one in futures["latent"].result().texts] == [2, 2, 2]


def test_it_is_saved_with_its_number_of_soft_tokens(trained: Path, model: SearchR3, tmp_path: Path) -> None:
    assert json.loads((trained / "search_r3.json").read_text())["latent_steps"] == 2
    model.save_pretrained(tmp_path / "again")
    again = SearchR3(tmp_path / "again", device="cpu")
    np.testing.assert_array_equal(again.encode_query(TEXTS, "latent"), model.encode_query(TEXTS, "latent").vectors)


def test_a_model_that_was_not_trained_for_it_says_how_it_is(tiny_path: Path) -> None:
    untrained = SearchR3(tiny_path, device="cpu")
    asks = [
        lambda: untrained.encode_query(TEXTS, "latent"),
        lambda: next(untrained.stream_query(TEXTS[0], "latent")),
        lambda: EngineThread(untrained).submit(TEXTS, "latent"),
    ]
    for ask in asks:
        with pytest.raises(ModelError, match=r"not trained with soft tokens, .* sft\.latent_steps=3"):
            ask()


@pytest.mark.parametrize("objective", ["gircse", "laser"])
def test_micro_batches_change_no_gradient(base: Path, collection_path: Path, tmp_path: Path, objective: str) -> None:
    found = []
    for size in ("null", "3"):
        more = [
            f"sft.latent_objective={objective}",
            f"sft.micro_batch_size={size}",
            "sft.steps=2",
            "sft.evaluate_every=0",
        ]
        where = [f"run_dir={tmp_path}/{size}", f"base={base}", f"collection={collection_path}"]
        found.append(train_sft(load_recipe(None, [*SETTINGS, *more, *where])).log_history[0])
    assert NAMES[objective] <= found[0].keys()
    for name in ("loss", "grad_norm", "tokens", *NAMES[objective]):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-4, abs=1e-6), name


def unit(*shape: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape), dim=-1)


def batch_of(owners: list[int], steps: int) -> Batch:
    excluded = torch.zeros(2, 4, dtype=torch.bool)
    excluded[0, 3] = True
    examples: Any = [None, None]
    return Batch(examples, ["", ""], list("abcd"), torch.tensor([0, 1]), torch.empty(2, 0), excluded, owners,
                 latent_steps=steps)  # fmt: skip


def test_gircse_takes_every_number_of_soft_tokens_and_punishes_a_rise() -> None:
    torch.manual_seed(0)
    settings = SFTSettings(latent_steps=3, latent_objective="gircse", contrastive_temperature=0.5)
    batch, queries, documents, latents = batch_of([0, 1, 0, 1], 3), unit(4, 8), unit(4, 8), unit(2, 3, 8)
    latents[:, 1] = -documents[:2]  # one more soft token made it worse
    found = latent_losses([queries, documents, latents.flatten(0, 1)], batch, settings)
    each = [
        float(losses.info_nce(latents[:, i], documents, batch.positives, batch.excluded, 0.5)) for i in range(3)
    ]  # fmt: skip
    assert float(found["latent_info_nce"]) == pytest.approx(sum(each) / 3, rel=1e-5)
    rises = [max(0.0, float(np.log(b) - np.log(a))) for a, b in ((each[0], each[1]), (each[1], each[2]))]
    assert float(found["latent_rise"]) == pytest.approx(sum(rises) / 2, rel=1e-5)
    assert sum(rises) > 0


def test_gircse_learns_on_where_all_queries_are_told_apart() -> None:
    settings = SFTSettings(latent_steps=2, latent_objective="gircse", contrastive_temperature=0.02)
    batch, documents = batch_of([0, 1], 2), torch.eye(4)
    latents = documents[[0, 0, 1, 1]].requires_grad_()
    found = latent_losses([documents[:2], documents, latents], batch, settings)
    assert float(found["latent_info_nce"].detach()) == 0
    assert float(found["latent_rise"].detach()) == 0
    sum(found.values(), torch.zeros(())).backward()
    assert latents.grad is not None
    assert latents.grad.isfinite().all()


def test_laser_learns_the_scores_of_the_written_view_and_does_not_teach_it() -> None:
    torch.manual_seed(0)
    settings = SFTSettings(latent_steps=3, latent_objective="laser", contrastive_temperature=0.5)
    batch, queries, documents, latents = batch_of([0, 1, 1], 3), unit(3, 8), unit(4, 8), unit(2, 3, 8)
    queries.requires_grad_()
    latents.requires_grad_()
    found = latent_losses([queries, documents, latents.flatten(0, 1)], batch, settings)
    views = [
        torch.distributions.Categorical(logits=documents @ view.detach() / 0.5) for view in (queries[2], latents[1, 2])
    ]
    expected = float(torch.distributions.kl_divergence(*views))
    assert float(found["latent_kl"].detach()) == pytest.approx(expected, rel=1e-4), "of the query with a trace alone"
    found["latent_kl"].backward()
    assert queries.grad is None
    assert latents.grad is not None
    assert latents.grad[:, :2].abs().max() == 0


def test_evaluation_and_mteb_count_soft_tokens(
    trained: Path, model: SearchR3, collection: Collection, collection_path: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    where = ["--collections", collection_path, "--out", tmp_path / "results", "--modes", "direct", "latent"]
    assert call(monkeypatch, "evaluate", "--model", trained, *where) == 0
    rows = json.loads((tmp_path / "results" / "summary.json").read_text())["rows"]
    assert {row["system"]: row["tokens_per_query"] for row in rows} == {"direct": 0, "latent": 2}
    pytest.importorskip("mteb")
    from search_r3.evaluation.mteb import SearchR3MTEB

    assert SearchR3MTEB(model, mode="latent").mteb_model_meta.experiment_kwargs["soft_tokens"] == 2
