"""What `search-r3 push` does: a model directory is checked, and goes with its card to the hub in one commit."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError, HubError, ModelError, SearchR3Error
from ..model.modes.gate import GATE_FILE
from ..model.settings import QUERIES, SETTINGS_FILE, read_settings
from ..model.source import ADAPTER_CONFIG, CONFIG
from .card import is_own_card

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

CARD, MAIN_BRANCH = "README.md", "main"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")
_PICKLE_STARTS = tuple(b"\x80" + bytes([protocol]) for protocol in range(2, 6))
_ZIP_START = b"PK\x03\x04"  # torch.save writes a zip file of pickles
_REMEDY = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"


@dataclass(frozen=True)
class Upload:
    """What a push did: the commit's address, and what the user should know of it."""

    url: str
    notes: list[str]


def check_repo_id(repo_id: str) -> None:
    """Refuse what is no `owner/name`."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ConfigError(f"no repository can be called {repo_id!r}: {error}") from error
    if repo_id.count("/") != 1:
        raise ConfigError(f"{repo_id!r} names no owner; give OWNER/NAME")


def check_files(folder: Path) -> dict[str, Path]:
    """What of a model directory goes to the hub: name there -> file; hidden files and a README stay behind.

    Raises:
        ModelError: weights, tokenizer or search_r3.json are missing, a shard is, or a file is a pickle.
    """
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    files = {name: path for name, path in paths.items() if name != CARD and not _hidden(name)}
    for path in files.values():
        if _is_pickle(path):
            raise ModelError(
                f"{path} is a pickle, or a zip file that may hold one, and can run code when it is loaded: only "
                "safetensors are pushed; save the model again as safetensors, or remove the file"
            )
    weights = _weights(files, folder)
    settings = read_settings(folder)
    if settings is not None and settings.queries is not None:
        own = {name.removeprefix(f"{QUERIES}/"): path for name, path in files.items() if name.startswith(f"{QUERIES}/")}
        weights |= {f"{QUERIES}/{name}" for name in _weights(own, folder / QUERIES)}
    for name in (*sorted(weights), "tokenizer.json", SETTINGS_FILE):
        if name not in files:
            raise ModelError(f"{folder} lacks {name}; save the model with search-r3 (`sft`, `grpo`, save_pretrained)")
    for name in weights:
        _check_weights(files[name])
    return files


def _weights(files: Mapping[str, Path], folder: Path) -> set[str]:
    """The names of the files that have to hold the weights."""
    if CONFIG in files:
        return _shards(files) or {"model.safetensors"}
    if ADAPTER_CONFIG in files:
        return {"adapter_model.safetensors"}
    raise ModelError(f"{folder} is no model directory: it has neither {CONFIG} nor {ADAPTER_CONFIG}")


def _check_weights(path: Path) -> None:
    """Refuse a file that is no safetensors, or not all of one; only its header is read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np"):
            return
    except SafetensorError as error:
        raise ModelError(f"{path} is no complete safetensors file ({error}); save the model again") from error


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in Path(name).parts)


def _is_pickle(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(4)
    return path.suffix.lower() in PICKLES or start == _ZIP_START or start[:2] in _PICKLE_STARTS


def _shards(files: Mapping[str, Path]) -> set[str]:
    """The files that the index of a sharded model names."""
    index = files.get("model.safetensors.index.json")
    if index is None:
        return set()
    try:
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} is no index of weights; save the model again") from error


def upload(
    files: Mapping[str, Path],
    card: str,
    repo_id: str,
    private: bool = False,
    revision: str = MAIN_BRANCH,
    message: str = "Model and card by search-r3 push",
    replace_card: bool = False,
) -> Upload:
    """Commit files and card to a repository, which is made where there is none.

    It is one commit, made only on the state that was looked at: nobody sees half of a model. Weights and configurations
    of another model that lie in the repository are removed in it; the history keeps them.

    Raises:
        HubError: there is no token, or the repository is public where a private one was asked for.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token

    token = get_token()
    if token is None:
        raise HubError(f"no token for the hub; {_REMEDY}")
    api = HfApi(token=token, library_name="search-r3")
    api.create_repo(repo_id, private=private or None, exist_ok=True)
    if revision != MAIN_BRANCH:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    state = api.model_info(repo_id, revision=revision)
    if private and not state.private:
        raise HubError(
            f"{repo_id} is there already and public; nothing was uploaded: make it private on the hub, choose another "
            "name, or leave --private out"
        )
    names = [sibling.rfilename for sibling in state.siblings or []]
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(name, str(path)) for name, path in files.items()
    ]
    leftovers = _leftovers(names, files)
    operations += [CommitOperationDelete(name, is_folder=False) for name in leftovers]
    notes = []
    if leftovers:
        notes.append(f"of another model in the repository, removed (its history keeps them): {', '.join(leftovers)}")
    if CARD not in names or replace_card or _is_ours(api, repo_id, str(state.sha)):
        operations.append(CommitOperationAdd(CARD, card.encode()))
    else:
        notes.append(f"{CARD} on the hub was written or changed by somebody else and stays; --replace-card replaces it")
    commit = api.create_commit(
        repo_id, operations, commit_message=message, revision=revision, parent_commit=str(state.sha)
    )
    return Upload(commit.commit_url, notes)


def _leftovers(there: list[str], files: Mapping[str, Path]) -> list[str]:
    """What would be read together with the new files and is not of them."""
    weights = (*PICKLES, ".safetensors", ".safetensors.index.json", ".bin.index.json")
    return [
        name
        for name in there
        if (own := name.removeprefix(f"{QUERIES}/")).count("/") == 0
        and name not in files
        and (own.endswith(weights) or own in (CONFIG, ADAPTER_CONFIG, GATE_FILE))
    ]


def _is_ours(api: HfApi, repo_id: str, commit: str) -> bool:
    """Whether the card on the hub is as `push` wrote it."""
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as scratch:
        path = api.hf_hub_download(repo_id, CARD, revision=commit, local_dir=scratch)
        return is_own_card(Path(path).read_bytes().decode("utf-8", errors="replace"))


@contextmanager
def hub_errors(repo_id: str) -> Iterator[None]:
    """Turn what the hub's library raises into one line with a remedy."""
    try:
        yield
    except SearchR3Error:
        raise
    except Exception as error:
        if (message := _explanation(error, repo_id)) is None:
            raise
        raise HubError(message) from error


def _explanation(error: BaseException, repo_id: str) -> str | None:
    """What an error of the hub's library means; None where it is none of its errors."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return f"{repo_id} cannot be reached: HF_HUB_OFFLINE is set; unset it to push"
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        status = error.response.status_code
        meanings = {
            401: f"the hub does not accept the token (401); {_REMEDY}",
            403: f"the token may not write to {repo_id} (403); {_REMEDY} there",
            404: f"the hub knows no {repo_id} for this token (404); check owner and name, or {_REMEDY}",
            409: f"{repo_id} is being changed by somebody else (409); push again",
            412: f"{repo_id} was changed while files were uploaded (412); push again",
        }
        message = error.server_message or " ".join(str(error).split())
        return meanings.get(status) or f"the hub refuses the push to {repo_id} ({status}): {message}"
    # The HTTP library beneath is httpx or its successor; LFS and Xet wrap its errors.
    if type(error).__module__.partition(".")[0] in ("httpx", "httpx2"):
        return f"cannot reach {constants.ENDPOINT} ({type(error).__name__}: {error}); check the connection, push again"
    if error.__cause__ is not None and (inner := _explanation(error.__cause__, repo_id)):
        return inner
    if isinstance(error, OSError | RuntimeError | ValueError):
        cause = f" ({error.__cause__})" if error.__cause__ is not None else ""
        return f"the push to {repo_id} failed: {' '.join(f'{error}{cause}'.split())}"
    return None
