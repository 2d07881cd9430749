"""Stage 2 with frozen documents: what it writes, what encodes which side, and an index of stage 1 that stays valid."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from search_r3.config import Recipe, load_recipe
from search_r3.data.collection import Collection
from search_r3.errors import ConfigError, ModelError, VectorIndexError
from search_r3.evaluation.systems import EncodedCollections, SearchR3System
from search_r3.files import hash_file, hash_folder
from search_r3.model.adapters import merged_queries
from search_r3.model.encoder import SearchR3
from search_r3.model.export import export_sentence_transformers
from search_r3.model.source import find_files
from search_r3.publishing.card import model_card
from search_r3.publishing.facts import gather_facts
from search_r3.publishing.hub import _leftovers, check_files
from search_r3.retrieval.encode import encode_corpus, load_corpus
from search_r3.retrieval.index import ExactIndex
from search_r3.retrieval.metrics import ndcg
from search_r3.training.grpo import train_grpo
from search_r3.training.run import Run
from search_r3.training.sft import train_sft
from tests.conftest import Stop, StopAt, call, count_encoded, save_tiny
from tests.hub_server import Hub, Repository, reached_hub
from tests.model_folders import make_adapter

SETTINGS = [
    "max_length=120", "max_new_tokens=16", "sft.steps=120", "sft.batch_size=4", "sft.learning_rate=1e-2",
    "sft.splits={train: 1.0}", "sft.reasoning_styles={restate: 1.0}", "sft.evaluate_every=0", "sft.keep=last",
    "grpo.steps=4", "grpo.queries_per_step=4", "grpo.group_size=4", "grpo.splits=[train]", "grpo.learning_rate=5e-3",
    "grpo.documents=frozen", "grpo.refresh={policy: selective, audit_every: 1}", "grpo.evaluate_every=2",
    "grpo.keep=last", "save_every=2", "grpo.embedding_loss_weight=0.5",
]  # fmt: skip
KINDS = {"full-untied": [], "lora-tied": ["lora.rank=4", "grpo.learning_rate=1e-2"]}
TEXTS = ["where is the red house?", "a blue boat", "the white chair"]


@dataclass
class Frozen:
    kind: str
    base: Path
    stage_1: Path
    collection: Path
    folder: Path

    @property
    def path(self) -> Path:
        return self.folder / "model"

    @property
    def adapters(self) -> bool:
        return self.kind == "lora-tied"

    def recipe(self, folder: Path, *more: str) -> Recipe:
        where = [f"run_dir={folder}", f"base={self.base}", f"collection={self.collection}"]
        return load_recipe(None, [*SETTINGS, *KINDS[self.kind], *where, *more])


@pytest.fixture(scope="module", params=list(KINDS))
def frozen(request: Any, tmp_path_factory: pytest.TempPathFactory, tokenizer: Any, collection_path: Path) -> Frozen:
    folder = tmp_path_factory.mktemp(request.param)
    base = save_tiny(folder / "base", tokenizer, tied=request.param == "lora-tied", spare_rows=16)
    settings = load_recipe(None, [*SETTINGS, f"run_dir={folder}/1", f"base={base}", f"collection={collection_path}"])
    stage_1 = train_sft(settings).model_path
    made = Frozen(request.param, base, stage_1, collection_path, folder / "2")
    recipe = made.recipe(made.folder)
    train_grpo(recipe, model=stage_1)
    return made


@pytest.fixture(scope="module")
def trained(frozen: Frozen) -> SearchR3:
    return SearchR3(frozen.path, device="cpu")


@pytest.fixture(scope="module")
def before(frozen: Frozen) -> SearchR3:
    return SearchR3(frozen.stage_1, device="cpu")


def test_the_top_of_the_directory_is_the_model_of_stage_1(frozen: Frozen) -> None:
    names = {path.name for path in frozen.stage_1.iterdir()} - {"search_r3.json", "README.md"}
    assert {"model.safetensors", "tokenizer.json"} <= names
    assert {path.name for path in frozen.path.iterdir()} == {*names, "search_r3.json", "queries"}
    for name in names:
        assert hash_file(frozen.path / name) == hash_file(frozen.stage_1 / name), name
    then, now = (json.loads((path / "search_r3.json").read_text()) for path in (frozen.stage_1, frozen.path))
    assert now == {**then, "queries": "queries"}
    own = {"adapter_config.json", "adapter_model.safetensors"}
    if not frozen.adapters:
        own = {"config.json", "generation_config.json", "model.safetensors"}
    assert {path.name for path in (frozen.path / "queries").iterdir()} == own
    assert not (frozen.folder / "grpo" / "adapter").exists(), "adapters by themselves would be on for documents too"
    said = "".join(path.read_text() for path in (frozen.path / "queries").glob("*.json"))
    assert str(frozen.stage_1) not in said, "the directory may be moved"


def test_documents_are_encoded_by_stage_1_and_queries_by_what_was_learned(trained: SearchR3, before: SearchR3) -> None:
    documents = before.encode_document(TEXTS)
    np.testing.assert_array_equal(trained.encode_document(TEXTS), documents)
    for mode in ("direct", "reason"):
        moved = trained.encode_query(TEXTS, mode).vectors - before.encode_query(TEXTS, mode).vectors
        assert np.abs(moved).max() > 1e-3
    np.testing.assert_array_equal(trained.encode_document(TEXTS), documents)
    [streamed] = trained.stream_document(TEXTS)
    np.testing.assert_allclose(streamed, documents, atol=1e-6)


def test_queries_are_what_the_weights_on_the_disk_compute(frozen: Frozen, trained: SearchR3, tmp_path: Path) -> None:
    """By transformers and peft alone; the embed token's row is a part of it."""
    auto = transformers.AutoModelForCausalLM
    if frozen.adapters:
        names = load_file(frozen.path / "queries" / "adapter_model.safetensors")
        assert any("token" in name for name in names), "the row of the embed token learns too"
        alone = peft.PeftModel.from_pretrained(auto.from_pretrained(frozen.stage_1), frozen.path / "queries")
    else:
        alone = auto.from_pretrained(frozen.path / "queries")
    ids = [trained.backbone.prompt_encoder.encode(text, "direct").ids for text in TEXTS]
    for text, sequence in zip(TEXTS, ids, strict=True):
        output = alone.eval()(input_ids=torch.tensor([sequence]), output_hidden_states=True)
        vector = torch.nn.functional.normalize(output.hidden_states[-1][0, -1], dim=0).detach().numpy()
        np.testing.assert_allclose(trained.encode_query([text], "direct").vectors[0], vector, atol=1e-5)
        logits = trained.backbone.model(input_ids=torch.tensor([sequence])).logits
        assert (logits - output.logits).abs().max() < 1e-4
    shared = {id(one) for one in trained.backbone.model.parameters()}
    own = [one for one in trained.backbone.document_side.model.parameters() if id(one) not in shared]
    assert bool(own) == (not frozen.adapters), "adapters need no second copy of the weights"


def test_an_index_of_stage_1_is_accepted_unchanged(
    frozen: Frozen, trained: SearchR3, before: SearchR3, collection: Collection, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    texts, folder = collection.texts(), tmp_path / "index"
    encode_corpus(before, list(texts.items()), folder, dtype="float32")
    written, done = hash_folder(folder), []
    index = encode_corpus(
        *(trained, list(texts.items()), folder), dtype="float32", on_start=lambda total, at: done.append((total, at))
    )
    assert done == [(40, 40)] and hash_folder(folder) == written
    vectors = trained.encode_document(list(texts.values()))
    np.testing.assert_allclose(index.vectors_at(index.rows_of(list(texts))), vectors, atol=1e-6)
    load_corpus(trained, list(texts.items()), folder)
    search = ["search", frozen.path, TEXTS[0], "-c", frozen.collection, "--index", folder, "--mode", "direct"]
    assert call(monkeypatch, *search, "--json", "-k", 1) == 0
    [best] = index.search(trained.encode_query(TEXTS[:1], "direct").vectors, 1).doc_ids[0]
    assert json.loads(capsys.readouterr().out)["hits"][0]["id"] == best
    assert hash_folder(folder) == written
    moved = SearchR3(replace(trained.backbone, documents=None))  # as a moving corpus would have it
    with pytest.raises(VectorIndexError, match="by another model"):
        load_corpus(moved, list(texts.items()), folder)


def test_no_document_is_encoded_after_the_first_time(
    frozen: Frozen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = count_encoded(monkeypatch)
    recipe = frozen.recipe(tmp_path / "run")
    run = Run(recipe)
    train_grpo(recipe, model=frozen.stage_1)
    assert encoded == [40], "by the first ranking; neither by a step, nor by an audit, nor by a dev evaluation"
    rows = run.metrics("grpo")[1:]
    for name in ("documents_encoded", "tokens_encoded", "staleness_max", "staleness_mean"):
        assert [row[name] for row in rows] == [0] * 4
    assert not any("audit_reward_error" in row for row in rows)


def test_the_dev_split_is_measured_as_the_model_will_be_used(
    frozen: Frozen, trained: SearchR3, collection: Collection
) -> None:
    last, qrels = Run(frozen.recipe(frozen.folder)).metrics("grpo")[-1], collection.split("dev")
    index = ExactIndex(list(collection.documents), trained.encode_document(list(collection.texts().values())))
    for mode in ("direct", "reason"):
        vectors = trained.encode_query([collection.queries[one].text for one in qrels], mode).vectors
        rankings = index.search(vectors, 10).doc_ids
        scores = [ndcg(ranking, gains, 10) for ranking, gains in zip(rankings, qrels.values(), strict=True)]
        assert last[f"dev_ndcg@10_{mode}"] == pytest.approx(fmean(scores), abs=1e-6)


@pytest.mark.parametrize("keep", ["last", "best"])
def test_a_resumed_run_equals_an_unbroken_one(frozen: Frozen, tmp_path: Path, keep: str) -> None:
    whole, broken = (frozen.recipe(tmp_path / name, f"grpo.keep={keep}") for name in ("whole", "broken"))
    expected = train_grpo(whole, model=frozen.stage_1).model_path

    with pytest.raises(Stop):
        train_grpo(broken, model=frozen.stage_1, callbacks=[StopAt(3)], resume=True)
    assert hash_folder(train_grpo(broken, model=frozen.stage_1, resume=True).model_path) == hash_folder(expected)
    if keep == "last":
        assert hash_folder(expected) == hash_folder(frozen.path)


def test_a_saved_model_is_the_same_one(trained: SearchR3, tmp_path: Path) -> None:
    trained.save_pretrained(tmp_path / "again")
    again = SearchR3(tmp_path / "again", device="cpu")
    np.testing.assert_array_equal(again.encode_document(TEXTS), trained.encode_document(TEXTS))
    one, two = (model.encode_query(TEXTS) for model in (again, trained))
    assert one.reasoning == two.reasoning
    np.testing.assert_array_equal(one.vectors, two.vectors)


def test_evaluation_and_mteb_use_both_sides_and_say_so(
    trained: SearchR3, before: SearchR3, collection: Collection, tmp_path: Path
) -> None:
    pytest.importorskip("mteb")
    from search_r3.evaluation.mteb import SearchR3MTEB

    systems = [SearchR3System(EncodedCollections(model, tmp_path), "direct") for model in (trained, before)]
    assert systems[0].info.revision != systems[1].info.revision, "cached results are of both sides"
    assert systems[0].info.settings == systems[1].info.settings
    encoder = SearchR3MTEB(trained, "direct")
    both = {id(one): one.numel() for side in (trained.backbone, trained.backbone.document_side)
            for one in side.model.parameters()}  # fmt: skip
    assert encoder.mteb_model_meta.n_parameters == sum(both.values())
    assert encoder.mteb_model_meta.revision == trained.backbone.revision


def test_the_evaluation_runs(frozen: Frozen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = ["--collections", frozen.collection, "--out", tmp_path / "results"]
    assert call(monkeypatch, "evaluate", "--model", frozen.path, *where) == 0


def test_sentence_transformers_gets_a_router(trained: SearchR3, tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    documents = trained.encode_document(TEXTS)
    export_sentence_transformers(trained.backbone, tmp_path / "exported")
    loaded = library.SentenceTransformer(str(tmp_path / "exported"), device="cpu")
    queries = trained.encode_query(TEXTS, "direct").vectors
    assert np.abs(loaded.encode_document(TEXTS) - documents).max() < 1e-5
    assert np.abs(loaded.encode_query(TEXTS) - queries).max() < 1e-5
    assert np.abs(loaded.encode(TEXTS) - queries).max() < 1e-5
    assert "weights of their own" in (tmp_path / "exported" / "README.md").read_text()
    assert not hasattr(merged_queries(trained.backbone).model, "peft_config")
    np.testing.assert_array_equal(trained.encode_document(TEXTS), documents)
    np.testing.assert_array_equal(trained.encode_query(TEXTS, "direct").vectors, queries)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with reached_hub(monkeypatch, tmp_path) as hub:
        yield hub


def test_it_goes_to_the_hub_and_back(frozen: Frozen, trained: SearchR3, hub: Hub) -> None:
    files = check_files(frozen.path)
    other = "model.safetensors" if frozen.adapters else "adapter_config.json"
    names = [*files, f"queries/{other}", "onnx/model.safetensors"]
    assert _leftovers(names, files) == [f"queries/{other}"], "two query sides in one folder would be one too many"
    assert any(name.startswith("queries/") for name in files)
    facts = gather_facts(frozen.path)
    assert "an index that the stage-1 model made stays valid" in model_card(facts, "o/m")
    assert "stays valid" not in model_card(gather_facts(frozen.stage_1), "o/m")
    repository = hub.repositories["o/m"] = Repository()
    commit = repository.commit("main", {name: path.read_bytes() for name, path in files.items()})
    fetched = SearchR3("o/m", device="cpu")
    assert fetched.backbone.revision == commit
    np.testing.assert_array_equal(fetched.encode_query(TEXTS).vectors, trained.encode_query(TEXTS).vectors)
    np.testing.assert_array_equal(fetched.encode_document(TEXTS), trained.encode_document(TEXTS))


def test_a_query_side_that_is_not_whole_is_refused(frozen: Frozen, tmp_path: Path) -> None:
    broken = shutil.copytree(frozen.path, tmp_path / "broken")
    weights = next((broken / "queries").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(ModelError, match="damaged or not whole"):
        SearchR3(broken)
    weights.unlink()
    with pytest.raises(ModelError, match=r"queries (lacks|has no) "):
        find_files(broken)
    with pytest.raises(ModelError, match=f"lacks queries/{weights.name}"):
        check_files(broken)
    shutil.rmtree(broken / "queries")
    with pytest.raises(
        ModelError, match=r"but these are missing: queries/config\.json or queries/adapter_config\.json"
    ):
        SearchR3(broken)


def test_what_cannot_be_frozen_is_refused_with_the_remedy(frozen: Frozen, tmp_path: Path) -> None:
    adapters = make_adapter(tmp_path / "adapters", frozen.stage_1)
    for base, more, message in (
        (frozen.path, ["grpo.documents=moving"], "only a stage that keeps documents goes on from there; set"),
        (frozen.base, [], "which no stage has trained; train stage 1"),
        (adapters, ["lora.rank=0"], "no directory of whole weights .*; begin from a merged model"),
        (frozen.stage_1, ["max_length=100"], "max_length=100, but .* with max_length=120; set that"),
    ):
        recipe = frozen.recipe(tmp_path / "run", *more)
        with pytest.raises(ConfigError, match=message):
            train_grpo(recipe, model=base)
        shutil.rmtree(tmp_path / "run")
