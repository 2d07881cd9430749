"""By which model and from which documents an index was encoded, as its manifest says, and whether they are these.

Shapes: `N` documents, `Q` queries, `D` vector size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from ...data.rows import instructed
from ...errors import VectorIndexError
from ...model.encoder import SearchR3
from ...types import Array, Progress
from .. import storage
from .survey import Survey

PROBE = "What do people pay with in Tashkent? The Uzbekistani Som is the currency of Uzbekistan."
"""The text whose vector tells one model from another."""
ALIKE = 0.9999
"""Least cosine of two vectors of the probe for one model; devices and batches move it by less."""


@dataclass(frozen=True)
class Peer:
    """An encoder that is no Search-R3 model.

    Attributes:
        model: its name.
        settings: what its vectors depend on, for JSON.
        encode: `(texts, "query" or "document") -> vectors`.
    """

    model: str
    settings: Mapping[str, Any]
    encode: Callable[[Sequence[str], str], Array]

    @property
    def origin(self) -> Mapping[str, Any]:
        """`model` and `settings`."""
        return {"model": self.model, "settings": dict(self.settings)}

    @cached_property
    def dimension(self) -> int:
        """The size of a vector, `D`."""
        return int(self.encode(["size"], "document").shape[1])

    def encode_document(
        self, texts: Sequence[str], *, instruction: str = "", progress: Progress | None = None
    ) -> Array:
        """The vectors of these texts, `N x D`; an instruction follows each text."""
        vectors = self.encode([instructed(text, instruction) for text in texts], "document")
        if progress is not None:
            progress(len(texts), 0)
        return vectors

    def encode_query(self, texts: Sequence[str]) -> Array:
        """The vectors of these texts, `Q x D`."""
        return self.encode(texts, "query")


def _origin(model: SearchR3 | Peer) -> Mapping[str, Any]:
    if isinstance(model, Peer):
        return model.origin
    settings = model.backbone.settings
    return {
        "model": model.backbone.source,
        "settings": {
            "embed_token": settings.embed_token,
            "max_length": settings.max_length,
            "document_system": settings.prompts.document_system,
            "reply_before": settings.prompts.reply_before,
        },
    }


def state_of(model: SearchR3 | Peer) -> Mapping[str, Any]:
    """What the manifest says of the weights, for people: it is the probe that is compared."""
    if isinstance(model, Peer):
        return {}
    return {"revision": model.backbone.revision, "precision": model.backbone.dtype}


def identity(model: SearchR3 | Peer, survey: Survey, instruction: str) -> tuple[dict[str, Any], Array]:
    """What a manifest says about model and documents, and the model's vector of the probe, `1 x D`."""
    origin = dict(_origin(model))
    if instruction.strip():
        origin["settings"] = {**origin["settings"], "document_instruction": instruction.strip()}
    origin |= {"documents_sha256": survey.digests[-1], "search_r3": version("search-r3")}
    facts = {"documents": len(survey.doc_ids), "dimension": model.dimension, "origin": origin}
    return facts, model.encode_document([PROBE])


def read_state(folder: Path, name: str, facts: dict[str, Any], probe: Array) -> tuple[int, dict[str, Path]] | None:
    """How many documents are done, and the data files, as the manifest `name` says; None where there is none.

    Raises:
        VectorIndexError: the state is damaged, or of another model, other documents or another dtype.
    """
    if not (folder / name).exists():
        return None
    with storage.readable(folder):
        manifest, paths = storage.read_manifest(folder, name)
        if "origin" not in manifest:
            raise VectorIndexError(
                f"{folder} holds an index that does not say by which model and from which documents it was encoded; "
                "nothing in it was changed: choose another folder"
            )
        stored_probe = storage.read_array(paths["probe.npy"], (1, manifest["dimension"]), "float32")
        storage.read_vectors(manifest, paths, mmap=True)
        difference = difference_of(manifest, facts, stored_probe, probe)
        count = manifest["documents"] if name == storage.MANIFEST else manifest["done"]
    if difference:
        raise VectorIndexError(
            f"{folder} was encoded {difference}; nothing in it was changed: go on with those, or choose another folder"
        )
    return count, paths


def difference_of(then: dict[str, Any], now: dict[str, Any], stored_probe: Array, probe: Array) -> str | None:
    """In what a stored state differs from that of this call; both with the model's vector of the probe."""
    stored_settings, settings = then["origin"]["settings"], now["origin"]["settings"]
    if then["origin"]["documents_sha256"] != now["origin"]["documents_sha256"]:
        return (
            f"from other documents, or from these in another order ({then['documents']} then, {now['documents']} now)"
        )
    cuts = [one.get("shard") for one in (then, now)]
    if cuts[0] != cuts[1]:
        text = "shard {number}/{of} in blocks of {block_size}"
        labels = [text.format_map(cut) if cut else "a whole" for cut in cuts]
        return f"as {labels[0]}, not as {labels[1]}"
    if then["dtype"] != now.get("dtype", then["dtype"]):
        return f"as {then['dtype']}, not as {now['dtype']}"
    if stored_settings != settings:
        changes = [
            f"{name}={stored_settings.get(name, '')!r}, not {settings.get(name, '')!r}"
            for name in {**stored_settings, **settings}
            if stored_settings.get(name) != settings.get(name)
        ]
        return f"with {'; '.join(changes)}"
    model = f"by another model, {then['origin']['model']}"
    if stored_probe.shape != probe.shape:
        return f"{model}, with vectors of size {stored_probe.shape[1]}, not {probe.shape[1]}"
    cosine = float(np.sum(stored_probe * probe) / (np.linalg.norm(stored_probe) * np.linalg.norm(probe)))
    if not cosine >= ALIKE:
        return f"{model}: cosine {cosine:.4f} between their vectors of one text"
    return None
