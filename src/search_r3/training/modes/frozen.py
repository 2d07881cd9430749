"""Documents that stay as they are while a stage trains what encodes queries."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...config import Recipe
from ...data.collection import Collection
from ...errors import ConfigError, ModelError
from ...mining.candidates import key_hash
from ...model.backbone import Backbone
from ...model.encoder import SearchR3
from ...model.settings import read_settings
from ...model.source import ModelFiles
from ...parallel import agree, divide, encode_sharded
from ...retrieval.index import ExactIndex
from ...retrieval.storage import MANIFEST

if TYPE_CHECKING:
    from ..engine import Engine

logger = logging.getLogger(__name__)


def keeps_documents(recipe: Recipe, stage: str) -> bool:
    """Whether documents keep the weights that the stage begins from."""
    section = recipe.stage(stage)
    return stage == "distill" or getattr(section, "documents", None) == "frozen"


def frozen_documents(model: SearchR3, collection: Collection, kept: Path, engine: Engine) -> ExactIndex:
    """The documents as the model encodes them, by all processes together.

    What encodes them alone is given back then.

    Args:
        model: as the stage begins with it.
        collection: holds them.
        kept: a folder of the run, where they are kept for a run that goes on.
        engine: around the model.
    """
    index = _encoded(model, collection, kept, engine)
    give_back_documents(model)
    return index


def give_back_documents(model: SearchR3) -> None:
    """Let go of weights that encode documents alone: no step computes one, and their files are written as they were."""
    queries, side = model.backbone.model, model.backbone.documents
    shared = {id(one) for one in queries.parameters()}  # weights under adapters
    if side is not None and not any(id(one) in shared for one in side.model.parameters()):
        assert side.files is not None
        model.backbone.documents = replace(side, model=_GivenBack(side.files))


class _GivenBack:
    """In the place of weights that were given back; callbacks, who have the model, may save it, and encode queries."""

    def __init__(self, files: ModelFiles) -> None:
        self._files = files

    def state_dict(self) -> dict[str, Any]:
        """Nothing: `save_pretrained` has the files."""
        return {}

    def save_pretrained(self, folder: Path, **_: Any) -> None:
        """Write the weights as they were."""
        self._files.copy_to(folder)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ModelError(
            f"what encodes documents in {self._files.name} was given back when the stage had encoded its own; load the "
            "model once more to encode others"
        )


def _encoded(model: SearchR3, collection: Collection, kept: Path, engine: Engine) -> ExactIndex:
    communicator, texts = engine.communicator, collection.texts()
    key = key_hash({"model": model.backbone.revision, "collection": collection.content_hash()})
    folder = kept / f"documents-{key}"
    if communicator.all_gather((folder / MANIFEST).exists())[0]:
        return ExactIndex.load(folder)
    listed = list(texts.values())
    shares = [sorted(share) for share in divide([len(text) for text in listed], communicator.world_size)]
    vectors = encode_sharded(
        communicator, shares, lambda places: model.encode_document([listed[place] for place in places])
    )  # fmt: skip
    index = ExactIndex(list(texts), vectors)
    agree(communicator, folder, lambda: index.save(folder) if engine.rank == 0 else None)
    return index


def check_begins(files: ModelFiles, source: str | Path, frozen: bool) -> None:
    """Refuse a model that a stage cannot begin from.

    Raises:
        ConfigError: it has a query side of its own, which a stage wrote, and the stage would move its documents.
    """
    if files.queries is not None and files.base is None and not frozen:
        raise ConfigError(
            f"{source} encodes queries with other weights than documents (documents=frozen or distill made it), and "
            "only a stage that keeps documents goes on from there; set documents=frozen in the stage's section, or "
            "begin from the model that it was made from"
        )


def without_queries(backbone: Backbone) -> Backbone:
    """What encodes documents: there a stage that moves them begins, from adapters with a query side, such as `smol`."""
    if backbone.documents is not None:
        logger.warning(
            "%s has adapters of their own for queries (queries/); this stage moves documents, begins from what encodes "
            "those, and leaves these out",
            backbone.source,
        )
        backbone.documents.model.requires_grad_(True)  # adapters froze the weights that they share
    return backbone.document_side


def check_documents(backbone: Backbone, stage: str) -> None:
    """Refuse a model whose documents cannot stay as they are in a stage that keeps them.

    Raises:
        ConfigError: no stage has trained it, it is no directory of whole weights, or it was saved with another
            `max_length`.
    """
    what, else_ = stage, ""
    if stage != "distill":
        what, else_ = f"{stage}.documents=frozen", f", or set {stage}.documents=moving"
    files, limit = backbone.files, backbone.settings.max_length
    if not backbone.trained:
        raise ConfigError(
            f"{what} keeps the document vectors of {backbone.source}, which no stage has trained; train stage 1 "
            f"(search-r3 sft) first{else_}"
        )
    if files is None or files.base is not None or files.gguf is not None:
        raise ConfigError(
            f"{what} copies the weights of {backbone.source}, which is no directory of whole weights (adapters, or "
            f"GGUF); begin from a merged model, such as stage 1 or save_pretrained writes{else_}"
        )
    saved = read_settings(files.folder)
    if saved is not None and saved.max_length != limit:
        raise ConfigError(
            f"{what} with max_length={limit}, but {backbone.source} encodes documents with max_length="
            f"{saved.max_length}; set that{else_}"
        )


def check_query_side(accelerator: Any, recipe: Recipe, backbone: Backbone, kl: str | None) -> None:
    """Refuse what cannot be done to adapters whose weights encode documents, too.

    Args:
        accelerator: says how the processes were launched.
        recipe: says whether adapters learn.
        backbone: the model.
        kl: the name of the setting that asks for a KL, if any does.

    Raises:
        ConfigError: as said.
    """
    if backbone.documents is None or not recipe.lora.rank:
        return
    if kl is not None:
        raise ConfigError(
            f"{kl} is above 0, a KL to the model that the stage begins from: without its adapters {backbone.source} is "
            f"what encodes its documents, and not that; set {kl}=0"
        )
    if str(accelerator.distributed_type.value) in ("FSDP", "DEEPSPEED"):
        raise ConfigError(
            f"the adapters of {backbone.source} share their weights with what encodes documents, which FSDP and "
            "DeepSpeed would take apart; launch with DDP (recipes/accelerate/ddp-*.yaml)"
        )
