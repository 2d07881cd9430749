"""What makes document vectors: stored with them, and compared whenever a model is to search or to add to them.

An evaluation names by it what it has encoded (`documents_key`).

What encodes queries is no part of it: adapters and instructions of queries, the mode, the wording of their prompts. So
a model after stage 2 with frozen documents opens the store of the model before it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from ...errors import StoreError
from ...heap import give_back
from ...types import Array

if TYPE_CHECKING:
    from ...model.backbone import Backbone
    from ...model.encoder import SearchR3

logger = logging.getLogger(__name__)

ALIKE = 0.999
"""Least cosine of two vectors of one text for models that differ in precision or device only."""
SAME = 1 - 1e-6
"""The same for the same weights in two files."""
_REFUSED = {
    "dimension": "vectors of size {}",
    "truncate_dim": "truncate_dim={}",
    "max_length": "max_length={}",
    "instruction": "the document instruction {!r}",
    "embed_token_id": "the embed token's id {}",
    "frame": "other token ids around a document",
    "text_ids": "another tokenizer",
}


class Fingerprint(BaseModel):
    """What document vectors depend on.

    Example:
        >>> from search_r3 import SearchR3
        >>> made = Fingerprint.of(SearchR3("builtin"))
        >>> made.difference(made.model_copy(update={"max_length": 64}))
        'max_length=512, not max_length=64'
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(description="What the model was called.")
    dimension: int = Field(description="Of a vector.")
    truncate_dim: int | None = Field(None, description="Dimensions kept of the model's own.")
    max_length: int = Field(description="Longest prompt in tokens.")
    instruction: str = Field("", description="Follows each document.")
    embed_token_id: int
    frame: tuple[int, ...] = Field(description="Token ids around a document.")
    text_ids: tuple[int, ...] = Field(description="Token ids of a text, for the tokenizer.")
    weights: str = Field(description="SHA-256 over what encodes documents, rounded to bfloat16.")
    backend: str = Field(description="Precision, device and engine.")
    probe: str = Field(description="Vector of a text: base64 of little-endian float32.")

    @classmethod
    def of(cls, model: SearchR3, instruction: str = "") -> Fingerprint:
        """That of a model, with the instruction that follows each document."""
        from .identity import PROBE

        vector = model.encode_document([PROBE], instruction=instruction)[0]
        return cls(
            model=model.backbone.source,
            **_facts(model, instruction),
            weights=_digest(model.backbone.document_side),
            probe=base64.b64encode(vector.astype("<f4").tobytes()).decode(),
        )

    @property
    def vector(self) -> Array:
        """Of the probe, `D`."""
        return np.frombuffer(base64.b64decode(self.probe), dtype="<f4").astype(np.float32)

    def difference(self, other: Fingerprint) -> str | None:
        """In what another model's vectors of documents would differ; None where they can be compared.

        What other precision does to them is a warning, where it is much.
        """
        for name, what in _REFUSED.items():
            then, now = getattr(self, name), getattr(other, name)
            if then != now:
                return what if "{" not in what else f"{what.format(then)}, not {what.format(now)}"
        cosine = float(self.vector @ other.vector)
        models = f"({self.model}, not {other.model}; cosine of one text {cosine:.4f})"
        # Rounding to float16 and then to bfloat16 is not rounding to bfloat16. Of llama.cpp's files the same weights
        # may stand in two, of which one says that queries have a file of their own.
        needed = ALIKE if self.backend != other.backend else SAME if "llama.cpp" in self.backend else np.inf
        if self.weights != other.weights and not cosine >= needed:
            return f"other weights of documents {models}"
        if not cosine >= ALIKE:
            if self.backend == other.backend:
                return f"the same weights in another configuration {models}"
            logger.warning(
                "the documents were encoded with %s, now it is %s: the vectors of one text have the cosine %.4f, and "
                "rankings will suffer; use the same precision, or index anew",
                *(self.backend, other.backend, cosine),
            )
        return None

    def check(self, other: Fingerprint, place: str) -> None:
        """Refuse a model whose vectors cannot be compared with those of the store at `place`.

        Raises:
            StoreError: it says in what they differ.
        """
        if difference := self.difference(other):
            raise StoreError(
                f"{place} holds vectors of another model: {difference}. Take the model of the store ({self.model}), or "
                "index the documents into another store"
            )


def documents_key(model: SearchR3, instruction: str = "") -> str:
    """A name (hex) for document vectors: one for models that differ in nothing but what encodes queries.

    Where a fingerprint lets vectors be compared, this says that they are the same: weights count to the last bit, what
    the configuration says of computing with them, and all of the tokenizer.
    """
    from ...model.reading.parts import config_facts

    side = model.backbone.document_side
    tokenizer = json.loads(side.tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
    facts = _facts(model, instruction) | {"weights": _digest(side, rounded=False), "tokenizer": tokenizer}
    if side.engine != "llama.cpp":  # whose file says it
        facts["config"] = config_facts(side.causal_lm.config)
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _facts(model: SearchR3, instruction: str) -> dict[str, Any]:
    """What a fingerprint says beside weights, a vector and a name."""
    from .identity import PROBE

    side = model.backbone.document_side
    encoder = side.prompt_encoder
    before, after = encoder.frame("document")
    return {
        "dimension": model.dimension,
        "truncate_dim": model.truncate_dim,
        "max_length": side.settings.max_length,
        "instruction": instruction.strip(),
        "embed_token_id": side.embed_token_id,
        "frame": (*before, *after),
        "text_ids": tuple(encoder.encode(PROBE, "document").ids[len(before) : -len(after)]),
        "backend": f"{side.dtype} on {side.device.type}, {side.engine}",
    }


def _digest(side: Backbone, rounded: bool = True) -> str:
    """Over names and values of all weights below the output layer; rounded, whatever precision they were loaded in."""
    import torch

    if side.engine == "llama.cpp":  # of which nobody sees the weights but in their file; that for queries is another
        assert side.files is not None
        return side.files.digest

    def digest(item: tuple[str, Any]) -> str:
        name, tensor = item
        value = tensor.detach().flatten()  # a single number has no bytes to view
        value = value.to("cpu", torch.bfloat16 if rounded and value.is_floating_point() else None).contiguous()
        return f"{name} {tuple(tensor.shape)} {hashlib.sha256(value.view(torch.uint8).numpy()).hexdigest()}"

    with ThreadPoolExecutor(8) as pool:  # hashing large buffers leaves Python's lock
        lines = pool.map(digest, sorted(side.causal_lm.base_model.state_dict().items()))
        total = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    give_back()  # packed weights were unpacked
    return total
