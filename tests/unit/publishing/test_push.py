from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from conftest import call
from hub_server import TOKEN, Hub, Repository, reached_hub
from huggingface_hub import ModelCard, constants
from model_folders import add_results, make_adapter, make_run

from search_r3 import SearchR3
from search_r3.errors import ModelError
from search_r3.publishing.card import is_own_card
from search_r3.publishing.hub import check_files

REPO = "someone/tiny"
pytestmark = pytest.mark.filterwarnings(
    "ignore:Use 'content=:DeprecationWarning"
)  # huggingface_hub's own call of httpx


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_path: Path) -> Path:
    folder = make_run(tmp_path_factory.mktemp("push") / "run", tiny_path)
    add_results(folder)
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub at which this process is logged in."""
    with reached_hub(monkeypatch, tmp_path) as hub:
        yield hub


def model_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "README.md"}


def tree_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        digest.update(str(path).encode() + (path.read_bytes() if path.is_file() else b""))
    return digest.hexdigest()


def download(hub: Hub, folder: Path, revision: str = "main") -> Path:
    return Path(
        huggingface_hub.snapshot_download(REPO, revision=revision, local_dir=folder, endpoint=hub.url, token=TOKEN)
    )


def test_the_command_puts_every_file_on_the_hub_and_what_arrives_is_the_same_model(
    hub: Hub, run: Path, tmp_path: Path
) -> None:
    before = tree_hash(run)
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "search_r3.cli", "push", str(run), REPO, "--license", "apache-2.0"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert f"{hub.url}/{REPO}/commit/" in done.stdout
    arrived = dict(hub.repositories[REPO].files())
    card = arrived.pop("README.md").decode()
    del arrived[".gitattributes"]
    assert arrived == model_files(run / "model")
    assert tree_hash(run) == before
    assert [path for method, path in hub.requests if method == "PUT"]  # the weights went as a large file
    folder = download(hub, tmp_path / "arrived")
    loaded = ModelCard.load(folder / "README.md")
    assert loaded.data.license == "apache-2.0" and len(loaded.data.eval_results) == 8
    assert "| `reason` |" in card
    texts = ["where is the red house?", "where is the blue boat?"]
    vectors = [SearchR3(source).encode_query(texts, "direct").vectors for source in (folder, run / "model")]
    np.testing.assert_array_equal(*vectors)


def test_a_push_is_one_commit_with_the_message(hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert call(monkeypatch, "push", run, REPO, "--message", "second stage") == 0
    assert hub.repositories[REPO].messages == ["initial commit", "second stage"]


def test_a_second_push_removes_the_weights_of_the_model_before(
    hub: Hub, run: Path, tmp_path: Path, tiny_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    adapter = make_adapter(tmp_path / "adapter", tiny_path, names="owner/base")
    assert call(monkeypatch, "push", run, REPO) == 0
    assert call(monkeypatch, "push", adapter, REPO) == 0
    names = hub.repositories[REPO].files()
    assert not {"config.json", "model.safetensors"} & set(names) and "adapter_model.safetensors" in names
    assert "removed (its history keeps them): config.json, model.safetensors" in capsys.readouterr().out
    assert b"library_name: peft" in names["README.md"]  # our own card of before was replaced
    first = list(hub.repositories[REPO].commits.values())[1]
    assert "model.safetensors" in first


def test_files_of_others_stay_in_the_repository(hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert call(monkeypatch, "push", run, REPO) == 0
    repository = hub.repositories[REPO]
    theirs = {"notes.txt": b"mine", "onnx/model.safetensors": b"theirs"}
    repository.commit("main", repository.files() | theirs)
    assert call(monkeypatch, "push", run / "sft" / "model", REPO) == 0
    assert theirs.items() <= repository.files().items()
    assert repository.files()["model.safetensors"] == (run / "sft" / "model" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("foreign", ["# My own card\n", "changed"])
def test_a_card_that_somebody_else_wrote_or_changed_stays_unless_asked(
    hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, foreign: str
) -> None:
    assert call(monkeypatch, "push", run, REPO) == 0
    repository = hub.repositories[REPO]
    ours = repository.files()["README.md"]
    theirs = ours.replace(b"# tiny", b"# Tiny, the best") if foreign == "changed" else foreign.encode()
    repository.commit("main", repository.files() | {"README.md": theirs})
    assert call(monkeypatch, "push", run / "sft" / "model", REPO) == 0
    assert repository.files()["README.md"] == theirs
    assert "stays; --replace-card replaces it" in capsys.readouterr().out
    assert call(monkeypatch, "push", run, REPO, "--replace-card") == 0
    assert repository.files()["README.md"] == ours and is_own_card(ours.decode())


def test_private_is_private_and_is_never_put_into_a_public_repository(
    hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert call(monkeypatch, "push", run, REPO, "--private") == 0
    assert hub.repositories[REPO].private
    assert call(monkeypatch, "push", run, "someone/open") == 0
    assert not hub.repositories["someone/open"].private
    commits = len(hub.repositories["someone/open"].commits)
    assert call(monkeypatch, "push", run / "sft" / "model", "someone/open", "--private") == 2
    assert "is there already and public; nothing was uploaded" in capsys.readouterr().err
    assert len(hub.repositories["someone/open"].commits) == commits


def test_a_branch_is_made_and_main_stays_as_it_was(hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert call(monkeypatch, "push", run, REPO) == 0
    main = hub.repositories[REPO].files()
    for _ in range(2):
        assert call(monkeypatch, "push", run / "sft" / "model", REPO, "--revision", "stage-1") == 0
    assert hub.repositories[REPO].files() == main
    branch = hub.repositories[REPO].files("stage-1")
    assert branch["model.safetensors"] == (run / "sft" / "model" / "model.safetensors").read_bytes()


def test_a_dry_run_asks_the_hub_nothing_and_shows_files_and_card(
    hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    assert call(monkeypatch, "push", run, REPO, "--dry-run") == 0
    shown = capsys.readouterr().out
    assert hub.requests == []
    for name, content in model_files(run / "model").items():
        assert re.search(rf"^ *{len(content):,}  {re.escape(name)}$", shown, re.MULTILINE)
    assert call(monkeypatch, "push", run, REPO) == 2
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert call(monkeypatch, "push", run, REPO) == 0
    assert hub.repositories[REPO].files()["README.md"].decode() in shown


@pytest.mark.filterwarnings("ignore:.*missing keys.*")
def test_an_adapter_arrives_whole_and_loads_as_its_card_says(
    hub: Hub, tmp_path: Path, tiny_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    adapter = make_adapter(tmp_path / "adapter", tiny_path, names="owner/base")
    assert call(monkeypatch, "push", adapter, REPO) == 0
    arrived = dict(hub.repositories[REPO].files())
    card, _ = arrived.pop("README.md").decode(), arrived.pop(".gitattributes")
    assert arrived == model_files(adapter)
    assert "note:" not in capsys.readouterr().out
    hub.repositories["owner/base"] = Repository()
    hub.repositories["owner/base"].commit("main", model_files(tiny_path))
    [code] = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    vectors = tmp_path / "vectors.npy"
    code += f"import numpy\nnumpy.save({str(vectors)!r}, model.encode_document(['a red house']))\n"
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    plain = SearchR3(tiny_path).encode_document(["a red house"])
    adapted = np.load(vectors)
    assert np.abs(adapted - plain).max() > 1e-3
    import peft

    merged = SearchR3(tiny_path)
    merged.backbone.model = peft.PeftModel.from_pretrained(merged.backbone.model, adapter).merge_and_unload()
    np.testing.assert_allclose(adapted, merged.encode_document(["a red house"]), atol=1e-5)


def test_an_adapter_of_a_model_that_others_lack_is_noted(
    hub: Hub, tmp_path: Path, tiny_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert call(monkeypatch, "push", make_adapter(tmp_path / "adapter", tiny_path), REPO, "--dry-run") == 0
    assert f"note: the adapter's base model is {tiny_path}, no model of the hub" in capsys.readouterr().out


@pytest.mark.parametrize(
    "where, status, said, message",
    [
        ("/api/repos", 401, "Invalid credentials in Authorization header", "does not accept the token (401); log in"),
        ("/api/repos", 403, "You don't have the rights", f"the token may not write to {REPO} (403); log in"),
        ("/api/repos", 404, "no such owner", f"the hub knows no {REPO} for this token (404)"),
        (f"/api/models/{REPO}/commit", 403, "read only", f"the token may not write to {REPO} (403)"),
        (f"/{REPO}.git", 403, "storage full", f"the token may not write to {REPO} (403)"),
        ("/lfs", 403, "signature expired", f"the token may not write to {REPO} (403)"),
        (f"/api/models/{REPO}/commit", 413, "too large for you", "refuses the push to someone/tiny (413): "),
    ],
)
def test_what_the_hub_refuses_is_one_line(
    hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, where: str, status: int, said: str, message: str
) -> None:
    hub.refuse[where] = status, said
    assert call(monkeypatch, "push", run, REPO) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and error.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in error
    if status == 413:
        assert said in error
    assert all(len(one.commits) == 1 for one in hub.repositories.values())


def test_a_repository_that_changes_during_the_push_is_left_alone(
    hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    hub.before_commit = lambda repository: repository.commit("main", {"theirs.txt": b"new"})
    assert call(monkeypatch, "push", run, REPO) == 2
    assert "was changed while files were uploaded (412); push again" in capsys.readouterr().err
    assert hub.repositories[REPO].files() == {"theirs.txt": b"new"}


def test_a_card_that_the_hub_refuses_stops_the_push(
    hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert call(monkeypatch, "push", run, REPO, "--license", "bad") == 2
    assert f'the hub refuses the push to {REPO} (400): "license" is wrong' in capsys.readouterr().err
    assert hub.large == {} and len(hub.repositories[REPO].commits) == 1


def test_no_token_no_connection_and_offline_are_one_line_with_a_remedy(
    hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    assert call(monkeypatch, "push", run, REPO) == 2
    assert "cannot reach http://127.0.0.1:1 (ConnectError" in capsys.readouterr().err
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert call(monkeypatch, "push", run, REPO) == 2
    assert "HF_HUB_OFFLINE is set; unset it to push" in capsys.readouterr().err
    monkeypatch.delenv("HF_TOKEN")
    assert call(monkeypatch, "push", run, REPO) == 2
    assert "no token for the hub; log in with `hf auth login`, or set HF_TOKEN" in capsys.readouterr().err
    assert hub.requests == []


@pytest.mark.parametrize("repo_id, message", [("tiny", "names no owner"), ("a/b/c", "'a/b/c'"), ("a/b--c", "'a/b--c'")])
def test_a_name_that_the_hub_cannot_have_is_refused(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, repo_id: str, message: str
) -> None:
    assert call(monkeypatch, "push", run, repo_id, "--dry-run") == 2
    assert message in capsys.readouterr().err


@pytest.fixture
def model(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run / "model", tmp_path / "model"))


def test_hidden_files_and_a_readme_stay_behind_and_folders_go(model: Path) -> None:
    for name in (".env", ".git/config", "README.md", "more/extra.json"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text("{}")
    names = set(check_files(model))
    assert "more/extra.json" in names and {"config.json", "tokenizer.json", "search_r3.json"} < names
    assert not names & {".env", ".git/config", "README.md"}


@pytest.mark.parametrize("name", ["pytorch_model.bin", "training_args.bin", "state.PT", "deep/scaler.pkl"])
def test_a_pickle_is_refused_by_its_name(model: Path, name: str) -> None:
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).write_text("x")
    with pytest.raises(ModelError, match=rf"{name} is a pickle.*only safetensors"):
        check_files(model)


def test_a_pickle_is_refused_by_its_content(model: Path) -> None:
    import pickle

    import torch

    (model / "notes.txt").write_bytes(pickle.dumps([1]))
    with pytest.raises(ModelError, match=r"notes\.txt is a pickle"):
        check_files(model)
    torch.save([1], model / "notes.txt")
    with pytest.raises(ModelError, match=r"notes\.txt is a pickle"):
        check_files(model)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "search_r3.json"])
def test_a_model_without_one_of_its_files_is_refused(model: Path, name: str) -> None:
    (model / name).unlink()
    with pytest.raises(ModelError, match=f"lacks {name}"):
        check_files(model)


def test_a_missing_shard_and_weights_that_end_early_are_refused(model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match="no complete safetensors file"):
        check_files(model)
    (model / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    with pytest.raises(ModelError, match="lacks model-00001-of-00002"):
        check_files(model)
    (model / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ModelError, match="is no index of weights"):
        check_files(model)
