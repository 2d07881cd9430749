"""What can be evaluated, and Search-R3 in a mode; `baselines` has the others.

A system indexes a collection and ranks its documents for queries, under the restrictions that the collection sets:
documents left out of a ranking, and pools that are the only ones ranked.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar

import numpy as np

from ..data.collection import Collection, Document
from ..model.encoder import SearchR3
from ..model.modes.auto import gate_of
from ..model.modes.first import decides
from ..model.modes.gate import Gate
from ..model.prompts import Mode
from ..retrieval.approximate import ApproximateIndex
from ..retrieval.encode import check_finished, encode_corpus, load_corpus
from ..retrieval.encoding.fingerprint import documents_key
from ..retrieval.index import ExactIndex
from ..retrieval.kinds import set_index_type
from ..retrieval.lexical import Scored
from ..retrieval.protocol import VectorIndex
from ..retrieval.ranking import RankRequest, ranked
from ..retrieval.storage import alone, read_manifest, readable
from ..types import Array, Progress
from .instructions import OWN, choose
from .results import Cost, SystemInfo

T = TypeVar("T")
Index = ExactIndex | ApproximateIndex
AT_A_TIME = 1024
AUDITED = 100
"""Queries by which the recall of an approximate index is measured."""


class Ranking(NamedTuple):
    """The documents of a request, best first, and their scores (float32): a tenth of what a list of pairs takes."""

    doc_ids: list[str]
    scores: Array

    def best(self, k: int) -> Scored:
        """The first `k` as pairs."""
        return list(zip(self.doc_ids[:k], self.scores[:k].tolist(), strict=True))


@dataclass(frozen=True)
class Answers:
    """What a system says about requests, in their order; what is said of reasoning is empty for systems that do not.

    `truncated` counts queries that lost their end, `notes` are sentences for those who read the results. `thought` and
    `gate` are those of `QueryEmbeddings`, and empty but for mode auto.
    """

    rankings: list[Ranking]
    reasoning: list[str] = field(default_factory=list)
    reasoning_tokens: list[int] = field(default_factory=list)
    forced: list[bool] = field(default_factory=list)
    truncated: int = 0
    notes: list[str] = field(default_factory=list)
    thought: list[bool] = field(default_factory=list)
    gate: list[dict[str, float]] = field(default_factory=list)


class Searchable(Protocol):
    """A collection as a system holds it."""

    @property
    def documents_per_second(self) -> float | None:
        """Speed of the indexing; None where nothing had to be indexed."""
        ...

    @property
    def truncated_documents(self) -> int:
        """Documents that lost their end."""
        ...

    def answer(self, requests: Sequence[RankRequest], depth: int, progress: Progress | None = None) -> Answers:
        """Rank at most `depth` documents for each request."""
        ...


class System(Protocol):
    """What can be evaluated."""

    @property
    def info(self) -> SystemInfo:
        """Name and provenance; results are cached under it."""
        ...

    @property
    def before(self) -> Cost | None:
        """The price of what it searches for, where another system wrote that."""
        ...

    def index(self, collection: Collection, progress: Progress | None = None) -> Searchable:
        """Prepare a collection."""
        ...


class PerCollection(Generic[T]):
    """Keeps the index of the last collection, for its other splits and for other systems that share it."""

    before: Cost | None = None
    _last: tuple[str, T] | None = None

    def index(self, collection: Collection, progress: Progress | None = None) -> T:
        """Index all documents, unless they are those of the last call."""
        key = collection.content_hash()
        if self._last is None or self._last[0] != key:
            self._last = None  # the old index is let go before the next is made
            self._last = key, self._make_index(collection, progress)
        return self._last[1]

    def _make_index(self, collection: Collection, progress: Progress | None) -> T:
        raise NotImplementedError


class EncodedCollections(PerCollection[tuple[Index, float | None]]):
    """The collections that one Search-R3 model has encoded; both of its modes search the same vectors.

    Where there is a folder, so do other models that encode documents as it does. `index` gives the index and the
    documents encoded per second (None where they were on the disk).

    Args:
        model: the encoder.
        folder: where a collection is kept while it is encoded, so that a kill costs one block; in memory without it.
        instruction: of the documents.
        index: the documents as `encode_corpus` wrote them, instead of encoding them here.
        index_type: how they are searched, where they are encoded here: a graph, or exactly.

    Raises:
        VectorIndexError: there is no such index.
    """

    def __init__(
        self,
        model: SearchR3,
        folder: Path | None = None,
        instruction: str = "",
        *,
        index: Path | None = None,
        index_type: Literal["exact", "hnsw"] = "exact",
    ) -> None:
        self.model, self.instruction = model, instruction.strip()
        self.revision = model.backbone.revision
        self._folder, self._given, self._type = folder, index, index_type
        self._cut = "", 0
        self.index_settings: dict[str, str] = {"index_type": "hnsw"} if index_type == "hnsw" else {}
        """What results depend on beside the model; nothing where vectors are of 32 bits and searched exactly."""
        if index is not None:
            check_finished(index)
            with readable(index):
                manifest, _ = read_manifest(index)
                self.index_settings = {"index_type": manifest.get("index_type", "exact"), "vectors": manifest["dtype"]}
                precision = manifest.get("origin", {}).get("precision", model.backbone.dtype)
                if precision != model.backbone.dtype:
                    self.index_settings["encoded_in"] = precision

    def _make_index(self, collection: Collection, progress: Progress | None) -> tuple[Index, float | None]:
        if self._given is not None:
            return load_corpus(self.model, collection.pairs(), self._given, instruction=self.instruction), None
        started, count = time.perf_counter(), len(collection.documents)
        if self._folder is None:
            index = index_documents(self.model, collection.documents, instruction=self.instruction, progress=progress)
            seconds = time.perf_counter() - started
            return (ApproximateIndex(index) if self._type == "hnsw" else index), count / seconds

        def begin(total: int, resume_at: int) -> None:
            nonlocal started, count
            started, count = time.perf_counter(), total - resume_at

        with alone(self._lock(collection)):
            encode_corpus(
                self.model,
                collection.pairs(by_id=True),  # the key is that of the documents in any order
                self._path(collection),
                instruction=self.instruction,
                dtype="float32",
                on_start=begin,
                progress=progress,
            )
            speed = count / (time.perf_counter() - started) if count else None
            return set_index_type(self._path(collection), self._type), speed

    def truncated_documents(self, collection: Collection) -> int:
        """The documents of the collection that are longer than the model's `max_length`."""
        key = collection.content_hash()
        if self._cut[0] != key:
            self._cut = key, count_truncated(self.model, (text for _, text in collection.pairs()), self.instruction)
        return self._cut[1]

    def forget(self, collection: Collection) -> None:
        """Remove what is on the disk of a collection whose results are complete."""
        self._last = None
        if self._folder is not None and self._folder.is_dir():
            with alone(lock := self._lock(collection)):
                shutil.rmtree(self._path(collection), ignore_errors=True)
                lock.unlink(missing_ok=True)

    @cached_property  # hashing reads all weights
    def _key(self) -> str:
        return documents_key(self.model, self.instruction)

    def _path(self, collection: Collection) -> Path:
        assert self._folder is not None
        return self._folder / f"{self._key[:16]}-{collection.content_hash()[:12]}"

    def _lock(self, collection: Collection) -> Path:
        """Held while files come or go: an evaluation of another model may share them at the same time."""
        return self._path(collection).with_suffix(".lock")


@dataclass(frozen=True)
class Effort:
    """How much a mode may think; by default as much as it does.

    Attributes:
        price: in mode auto what a token must earn, in place of the gate's own price.
        budget: tokens of a reply, the embed token included, which is forced as the last; in place of the model's own.
        samples: replies to each query, at temperature 1, whose vectors' mean is taken; 1 is one greedy reply.
    """

    price: float | None = None
    budget: int | None = None
    samples: int = 1

    def settings(self, mode: Mode, gate: Gate | None) -> dict[str, Any]:
        """What of it is in the record of a result."""
        record: dict[str, Any] = {}
        if mode == "auto" and gate is None:
            record = {"gate": {"policy": True}}
        elif mode == "auto" and gate is not None:
            terms = gate.model_dump(include={"price", "measure", "gain", "loss", "tokens"})
            record = {"gate": terms | {"hash": gate.digest}}
        own = {"price": self.price, "budget": self.budget, "samples": self.samples if self.samples > 1 else None}
        return record | {name: value for name, value in own.items() if value is not None}


class SearchR3System:
    """One model in one mode; reasoning is greedy.

    Args:
        collections: the model and what it has encoded, shared by its modes.
        mode: of `MODES`.
        name: as in the tables; by default the mode.
        batch_size: queries reasoned about at once; it changes results by rounding only.
        instruction: of the queries, see `instructions.choose`.
        effort: how much it may think.

    Raises:
        ModelError: mode auto, and neither the model decides nor has it a gate.
    """

    before: Cost | None = None

    def __init__(
        self,
        collections: EncodedCollections,
        mode: Mode,
        name: str | None = None,
        batch_size: int = 128,
        instruction: str = OWN,
        effort: Effort = Effort(),
    ) -> None:
        backbone = collections.model.backbone
        self.mode: Mode = mode
        self.collections, self.batch_size, self.instruction = collections, batch_size, instruction
        self.effort = effort
        # Without instructions a result has the key that it had before there were any.
        instructions = {} if instruction == OWN else {"instruction": instruction}
        if collections.instruction:
            instructions["document_instruction"] = collections.instruction
        shortened = {} if collections.model.truncate_dim is None else {"truncate_dim": collections.model.truncate_dim}
        gate = gate_of(backbone) if mode == "auto" and not decides(backbone) else None
        self.info = SystemInfo(
            name=name or mode,
            kind="search-r3",
            model=backbone.source,
            revision=collections.revision,
            mode=mode,
            settings={
                **backbone.settings.model_dump(exclude={"frames"}),  # a part of the revision
                "dtype": backbone.dtype,
                "sampling_temperature": 0.0 if effort.samples == 1 else 1.0,
                **instructions,
                **shortened,
                **collections.index_settings,
                **effort.settings(mode, gate),
            },
        )

    def index(self, collection: Collection, progress: Progress | None = None) -> Searchable:
        """Encode all documents, unless the other mode has."""
        index, speed = self.collections.index(collection, progress)
        return _Reasoning(self, index, speed, self.collections.truncated_documents(collection))


@dataclass(frozen=True)
class _Reasoning:
    _system: SearchR3System
    _index: Index
    documents_per_second: float | None
    truncated_documents: int

    def answer(self, requests: Sequence[RankRequest], depth: int, progress: Progress | None = None) -> Answers:
        system, samples = self._system, self._system.effort.samples
        asked = [request for request in requests for _ in range(samples)]
        queries = system.collections.model.encode_query(
            [request.bare for request in asked],
            system.mode,
            instruction=[choose(system.instruction, request.instruction) for request in asked],
            batch_size=system.batch_size,
            max_new_tokens=system.effort.budget,
            sampling_temperature=0.0 if samples == 1 else 1.0,
            top_scores=self._index.top_scores,
            price=system.effort.price,
            progress=progress,
        )
        vectors, first = queries.vectors, queries[::samples]
        if samples > 1:
            means = vectors.reshape(len(requests), samples, -1).mean(axis=1)
            vectors = means / np.linalg.norm(means, axis=1, keepdims=True)
        rankings, truncated = rank_vectors(self._index, vectors, requests, depth), sum(first.truncated)
        notes = _recall(self._index, vectors) if len(requests) > 1 else []
        if system.mode == "direct":
            return Answers(rankings, truncated=truncated, notes=notes)
        tokens = np.reshape(queries.reasoning_tokens, (len(requests), samples)).sum(axis=1).tolist()
        of_gate = {"thought": first.thought, "gate": first.gate} if system.mode == "auto" else {}
        return Answers(rankings, first.reasoning, tokens, first.forced, truncated, notes, **of_gate)


def _recall(index: Index, vectors: Array) -> list[str]:
    """What an approximate index misses of some of these queries, in words."""
    if not isinstance(index, ApproximateIndex):
        return []
    asked = vectors[:AUDITED]
    return [
        f"searched by a graph (hnsw): recall@10 {index.audit(asked):.3f} against exact search, {len(asked)} queries"
    ]


def rank_in_blocks(count: int, rank: Callable[[slice], Iterable[Scored]]) -> list[Ranking]:
    """The rankings of many requests, a block of which `rank` ranks at once."""
    rankings = []
    for start in range(0, count, AT_A_TIME):
        for ranking in rank(slice(start, start + AT_A_TIME)):
            scores = np.array([score for _, score in ranking], dtype=np.float32)
            rankings.append(Ranking([doc_id for doc_id, _ in ranking], scores))
    return rankings


def rank_vectors(index: VectorIndex, vectors: Array, requests: Sequence[RankRequest], depth: int) -> list[Ranking]:
    """`ranked`, block after block."""
    return rank_in_blocks(len(requests), lambda part: ranked(index, vectors[part], requests[part], depth))


def short_name(source: str) -> str:
    """What a model is called in tables.

    Example:
        >>> short_name("runs/quickstart/model"), short_name("Qwen/Qwen2.5-1.5B-Instruct")
        ('quickstart', 'Qwen2.5-1.5B-Instruct')
    """
    path = Path(source)
    return path.parent.name if path.name == "model" and path.parent.name else path.name


def count_truncated(model: SearchR3, texts: Iterable[str], instruction: str = "") -> int:
    """The documents that are longer than the model's `max_length`."""
    side = model.backbone.document_side
    # A token takes at least one byte, so most short texts need not be read again.
    room = side.settings.max_length - len(side.prompt_encoder.encode("a", "document", instruction).ids)
    long = (text for text in texts if len(text.encode()) > room)
    cut = 0
    while some := list(islice(long, AT_A_TIME)):
        cut += sum(prompt.truncated for prompt in side.prompt_encoder.encode_batch(some, "document", instruction))
    return cut


def index_documents(
    model: SearchR3,
    documents: Mapping[str, Document],
    *,
    instruction: str = "",
    progress: Progress | None = None,
) -> ExactIndex:
    """Encode all documents (by their ids) into an exact index."""
    texts = [document.full_text for document in documents.values()]
    return ExactIndex(list(documents), model.encode_document(texts, instruction=instruction, progress=progress))
