"""What release 0.1 wrote (models, indexes, runs) loads or is refused with the remedy; its own code made the files."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from search_r3 import SearchR3
from search_r3.data.collection import Collection
from tests.conftest import call

FILES = Path(__file__).parents[1] / "written_by_0_1"
QUERY = "where is the red house?"
STEPS = ("sft.steps=3", "sft.warmup_steps=1", "sft.batch_size=4", "sft.splits={train: 1.0}", "sft.random_negatives=1")
SAME = (*STEPS, "sft.kl_weight=1.0", "max_new_tokens=8", "save_every=1", "collection=collection", "base=base")


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the files, where they were made: in the current folder."""
    shutil.copytree(FILES, tmp_path / "files")
    monkeypatch.chdir(tmp_path / "files")
    return tmp_path / "files"


def test_a_model_gives_its_vectors(there: Path) -> None:
    model = SearchR3("run/sft/model")
    texts = [document.full_text for document in Collection.load(there / "collection").documents.values()]
    np.testing.assert_allclose(model.encode_document(texts), np.load(there / "documents.npy"), atol=1e-5)
    np.testing.assert_allclose(model.encode_query([QUERY], "direct").vectors, np.load(there / "query.npy"), atol=1e-5)


def test_an_index_is_searched(there: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["-c", "collection", "--index", "encoded", "--mode", "direct"]
    assert call(monkeypatch, "search", "run/sft/model", QUERY, *where) == 0
    printed = capsys.readouterr().out
    documents = np.load(there / "documents.npy")
    best = int((documents @ np.load(there / "query.npy")[0]).argmax())
    assert list(Collection.load(there / "collection").documents)[best] in printed


def test_a_run_that_is_complete_stays_so_once_its_setting_has_the_new_name(
    there: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call_again = ["sft", "run_dir=run", *SAME, "sft.hard_negatives=1", "--resume"]
    assert call(monkeypatch, *call_again) == 2
    assert "'sft.bm25_negatives' is called 'sft.hard_negatives' now" in capsys.readouterr().err
    rename(there / "run" / "settings.yaml", "bm25_negatives", "hard_negatives")
    assert call(monkeypatch, *call_again) == 2
    assert "'grpo.reward.ranking' is called 'grpo.reward.ndcg' now" in capsys.readouterr().err
    rename_all(there / "run" / "settings.yaml")
    assert call(monkeypatch, *call_again) == 0


def test_a_training_that_was_stopped_is_refused_with_the_remedy(
    there: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call_again = ["sft", "run_dir=stopped", *SAME, "sft.hard_negatives=1", "--resume"]
    rename_all(there / "stopped" / "settings.yaml")
    assert call(monkeypatch, *call_again) == 2, "norms and biases have a group of their own in the optimizer now"
    printed = " ".join(capsys.readouterr().err.split())
    assert "step-000001 does not fit this training" in printed and "another version of search-r3 wrote it" in printed
    assert (there / "stopped" / "sft" / "checkpoints" / "step-000001" / "optimizer.bin").exists()
    shutil.rmtree(there / "stopped" / "sft" / "checkpoints")
    assert call(monkeypatch, *call_again) == 0
    assert (there / "stopped" / "sft" / "model" / "model.safetensors").exists()


def rename(settings: Path, old: str, new: str) -> None:
    settings.write_text(settings.read_text().replace(old, new))


def rename_all(settings: Path) -> None:
    rename(settings, "bm25_negatives", "hard_negatives")
    rename(settings, "    ranking: 1.0\n    similarity: 0.1\n", "    ndcg: 1.0\n")
