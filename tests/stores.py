"""Stores without a model: an encoder whose vectors are hashes of texts, its fingerprint, documents of some chunks."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from search_r3.data.documents import Chunk
from search_r3.serving import Fingerprint

SIZE = 8


def vector(text: str) -> np.ndarray:
    """A unit vector that belongs to the text."""
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])
    values = np.random.default_rng(seed).normal(size=SIZE)
    return (values / np.linalg.norm(values)).astype(np.float32)


class HashEncoder:
    """Stands for a model; `seen` are the texts that were encoded."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.backbone = SimpleNamespace(device=SimpleNamespace(type="cpu"))

    def encode_document(self, texts: Sequence[str], *, instruction: str = "", progress: Any = None) -> np.ndarray:
        self.seen += texts
        if progress is not None:
            progress(len(texts), 3 * len(texts))
        return np.stack([vector(text) for text in texts])


def fingerprint(**changes: Any) -> Fingerprint:
    values = {
        "model": "hashes",
        "dimension": SIZE,
        "max_length": 64,
        "embed_token_id": 7,
        "frame": (1, 2, 7),
        "text_ids": (3, 4),
        "weights": "0" * 64,
        "backend": "float32 on cpu, fast",
        "probe": base64.b64encode(vector("probe").tobytes()).decode(),
    }
    return Fingerprint.model_validate(values | changes)


def document(name: str, *texts: str, source: str = "/notes", **facts: Any) -> list[Chunk]:
    """The chunks of a document; by default one, of its name."""
    content = hashlib.sha256(repr(texts).encode()).hexdigest()
    return [
        Chunk(
            f"{name}#{number}", text, facts.get("title", ""), parent_id=name, start=number, end=number + 1,
            content_hash=content, path=f"{source}/{name}", source=source, metadata=facts.get("metadata", {}),
        )
        for number, text in enumerate(texts or (f"the text of {name}",))
    ]  # fmt: skip


def vectors(chunks: Sequence[Chunk]) -> np.ndarray:
    return np.stack([vector(chunk.full_text) for chunk in chunks])
