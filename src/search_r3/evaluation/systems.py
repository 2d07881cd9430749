"""What can be evaluated: Search-R3 in a mode, BM25, BM25 on a model's reasoning, sentence-transformers.

A system indexes a collection and ranks its documents for queries, under the restrictions that the collection sets:
documents left out of a ranking, and pools that are the only ones ranked.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from ..data.collection import Collection, Document
from ..errors import ModelError
from ..extras import extra
from ..model.documents import check_finite
from ..model.encoder import SearchR3
from ..model.prompts import Mode
from ..model.source import peer_files
from ..retrieval.encode import encode_corpus
from ..retrieval.index import ExactIndex
from ..retrieval.lexical import BM25, Scored
from ..retrieval.ranking import RankRequest, ranked, without
from ..types import Array, Progress
from .instructions import OWN, choose, file_label
from .results import Cost, SystemInfo

T = TypeVar("T")
SENTENCE_TRANSFORMERS = "sentence-transformers:"


@dataclass(frozen=True)
class Answers:
    """What a system says about requests, in their order; the last four are empty for systems that do not reason."""

    rankings: list[Scored]
    reasoning: list[str] = field(default_factory=list)
    reasoning_tokens: list[int] = field(default_factory=list)
    forced: list[bool] = field(default_factory=list)
    truncated: int = 0


class Searchable(Protocol):
    """A collection as a system holds it."""

    @property
    def documents_per_second(self) -> float | None:
        """Speed of the indexing; None where nothing had to be indexed."""
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


class _PerCollection(Generic[T]):
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


class BM25System(_PerCollection[Searchable]):
    """BM25 on the queries, or on other `texts` by query_id.

    Args:
        name: as in the tables.
        texts: what is searched instead of a query, e.g. a model's reasoning; the query itself where it is blank.
        origin: what names the texts, for the cache.
        before: what the texts cost.
    """

    def __init__(
        self,
        name: str = "bm25",
        texts: Mapping[str, str] | None = None,
        origin: str = "",
        before: Cost | None = None,
    ) -> None:
        self._texts, self.before = texts or {}, before
        settings = {"stop_words": "en", "stemming": "none", **({"texts": origin} if texts is not None else {})}
        self.info = SystemInfo(name=name, kind="bm25", model="bm25s", revision=BM25.release(), settings=settings)

    def _make_index(self, collection: Collection, progress: Progress | None) -> Searchable:
        started = time.perf_counter()
        index = BM25(list(collection.documents), list(collection.texts().values()))
        seconds = time.perf_counter() - started
        if progress is not None:
            progress(len(collection.documents), 0)
        return _Lexical(index, self._texts, len(collection.documents) / seconds)


@dataclass(frozen=True)
class _Lexical:
    _index: BM25
    _texts: Mapping[str, str]
    documents_per_second: float | None

    def answer(self, requests: Sequence[RankRequest], depth: int, progress: Progress | None = None) -> Answers:
        texts = [self._texts.get(request.query_id, "").strip() or request.text for request in requests]
        deepest = depth + max(len(request.left_out) for request in requests)
        rankings = self._index.search_scored(texts, deepest, [request.pool for request in requests])
        if progress is not None:
            progress(len(requests), 0)
        return Answers([without(ranking, request, depth) for ranking, request in zip(rankings, requests, strict=True)])


class EncodedCollections(_PerCollection[tuple[ExactIndex, float | None]]):
    """The collections that one Search-R3 model has encoded; both of its modes search the same vectors.

    `index` gives the index and the documents encoded per second (None where it was on the disk).

    Args:
        model: the encoder.
        folder: where a collection is kept while it is encoded, so that a kill costs one block; in memory without it.
        instruction: of the documents.
    """

    def __init__(self, model: SearchR3, folder: Path | None = None, instruction: str = "") -> None:
        self.model, self.instruction = model, instruction.strip()
        self.revision = model.backbone.revision
        self._folder = folder

    def _make_index(self, collection: Collection, progress: Progress | None) -> tuple[ExactIndex, float | None]:
        started, count = time.perf_counter(), len(collection.documents)
        if self._folder is None:
            index = index_documents(self.model, collection.documents, instruction=self.instruction, progress=progress)
            return index, count / (time.perf_counter() - started)

        def begin(total: int, resume_at: int) -> None:
            nonlocal started, count
            started, count = time.perf_counter(), total - resume_at

        index = encode_corpus(
            self.model,
            sorted(collection.texts().items()),  # the key is that of the documents in any order
            self._path(collection),
            instruction=self.instruction,
            dtype="float32",
            on_start=begin,
            progress=progress,
        )
        return index, count / (time.perf_counter() - started) if count else None

    def forget(self, collection: Collection) -> None:
        """Remove what is on the disk of a collection whose results are complete."""
        self._last = None
        if self._folder is not None:
            shutil.rmtree(self._path(collection), ignore_errors=True)

    def _path(self, collection: Collection) -> Path:
        assert self._folder is not None
        short = "+".join(part[:12] for part in self.revision.split("+"))
        used = f"{self.model.truncate_dim} {self.model.backbone.settings.model_dump_json(exclude={'frames'})}"
        used = hashlib.sha256(used.encode()).hexdigest()[:8]  # limits and prompts may be given at each call
        name = f"{short}-{self.model.backbone.dtype}-{used}-{collection.content_hash()[:12]}"
        return self._folder / (f"{name}-{file_label(self.instruction)}" if self.instruction else name)


class SearchR3System:
    """One model in one mode; reasoning is greedy.

    Args:
        collections: the model and what it has encoded, shared by its modes.
        mode: `direct` or `reason`.
        name: as in the tables; by default the mode.
        batch_size: queries reasoned about at once; it changes results by rounding only.
        instruction: of the queries, see `instructions.choose`.
    """

    before: Cost | None = None

    def __init__(
        self,
        collections: EncodedCollections,
        mode: Mode,
        name: str | None = None,
        batch_size: int = 128,
        instruction: str = OWN,
    ) -> None:
        backbone = collections.model.backbone
        self.mode: Mode = mode
        self.collections, self.batch_size, self.instruction = collections, batch_size, instruction
        # Without instructions a result has the key that it had before there were any.
        instructions = {} if instruction == OWN else {"instruction": instruction}
        if collections.instruction:
            instructions["document_instruction"] = collections.instruction
        shortened = {} if collections.model.truncate_dim is None else {"truncate_dim": collections.model.truncate_dim}
        self.info = SystemInfo(
            name=name or mode,
            kind="search-r3",
            model=backbone.source,
            revision=collections.revision,
            mode=mode,
            settings={
                **backbone.settings.model_dump(exclude={"frames"}),  # a part of the revision
                "dtype": backbone.dtype,
                "sampling_temperature": 0.0,
                **instructions,
                **shortened,
            },
        )

    def index(self, collection: Collection, progress: Progress | None = None) -> Searchable:
        """Encode all documents, unless the other mode has."""
        index, speed = self.collections.index(collection, progress)
        return _Reasoning(self.collections.model, self.mode, self.batch_size, self.instruction, index, speed)


@dataclass(frozen=True)
class _Reasoning:
    _model: SearchR3
    _mode: Mode
    _batch_size: int
    _instruction: str
    _index: ExactIndex
    documents_per_second: float | None

    def answer(self, requests: Sequence[RankRequest], depth: int, progress: Progress | None = None) -> Answers:
        queries = self._model.encode_query(
            [request.bare for request in requests],
            self._mode,
            instruction=[choose(self._instruction, request.instruction) for request in requests],
            batch_size=self._batch_size,
            progress=progress,
        )
        rankings, truncated = ranked(self._index, queries.vectors, requests, depth), sum(queries.truncated)
        if self._mode == "direct":
            return Answers(rankings, truncated=truncated)
        return Answers(rankings, queries.reasoning, queries.reasoning_tokens, queries.forced, truncated)


class SentenceTransformersSystem(_PerCollection[Searchable]):
    """A dense peer.

    Args:
        source: a directory, an installed package that carries a model, or a hub id.
        batch_size: texts encoded together.

    Raises:
        MissingExtraError: sentence-transformers is not installed.
        ModelError: there is no such model.
    """

    def __init__(self, source: str, batch_size: int = 32) -> None:
        with extra("integrations"):
            from sentence_transformers import SentenceTransformer
        try:
            files = peer_files(str(_package_folder(source) or source))
            self._model: Any = SentenceTransformer(
                str(files.folder), trust_remote_code=False, model_kwargs={"use_safetensors": True}
            )
        except Exception as error:  # it raises whatever the library beneath it raises
            raise ModelError(
                f"cannot load {source!r} with sentence-transformers: {str(error).splitlines()[0]}; give a directory, "
                "an installed package that carries a model, or a hub id"
            ) from error
        self.source, self.batch_size = source, batch_size
        similarity = self._model.similarity_fn_name
        if similarity not in ("cosine", "dot"):
            raise ModelError(f"{source!r} compares vectors by {similarity}; only cosine and dot are supported")
        self._normalize = similarity == "cosine"
        self.info = SystemInfo(
            name=Path(source).name,
            kind="sentence-transformers",
            model=source,
            revision=files.revision,
            settings={
                "max_seq_length": self._model.max_seq_length,
                "similarity": similarity,
                "library": f"sentence-transformers {metadata.version('sentence-transformers')}",
            },
        )

    def _make_index(self, collection: Collection, progress: Progress | None) -> Searchable:
        texts = collection.texts()
        started = time.perf_counter()
        vectors = self.encode(list(texts.values()), "document")
        seconds = time.perf_counter() - started
        if progress is not None:
            progress(len(texts), 0)
        return _Dense(self, ExactIndex(list(texts), vectors), len(texts) / seconds)

    def encode(self, texts: Sequence[str], kind: str) -> Array:
        """Vectors of queries or documents, `N x D`.

        Raises:
            ModelError: a vector holds NaN or infinity.
        """
        encode = self._model.encode_query if kind == "query" else self._model.encode_document
        vectors = encode(
            list(texts),
            batch_size=self.batch_size,
            normalize_embeddings=self._normalize,
            show_progress_bar=False,
        )
        check_finite(vectors, texts, self.source)
        return np.asarray(vectors, dtype=np.float32)


@dataclass(frozen=True)
class _Dense:
    _system: SentenceTransformersSystem
    _index: ExactIndex
    documents_per_second: float | None

    def answer(self, requests: Sequence[RankRequest], depth: int, progress: Progress | None = None) -> Answers:
        vectors = self._system.encode([request.text for request in requests], "query")
        if progress is not None:
            progress(len(requests), 0)
        return Answers(ranked(self._index, vectors, requests, depth))


def short_name(source: str) -> str:
    """What a model is called in tables.

    Example:
        >>> short_name("runs/quickstart/model"), short_name("Qwen/Qwen2.5-1.5B-Instruct")
        ('quickstart', 'Qwen2.5-1.5B-Instruct')
    """
    path = Path(source)
    return path.parent.name if path.name == "model" and path.parent.name else path.name


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


def _package_folder(source: str) -> Path | None:
    """The directory of the model that an installed package of this name carries."""
    try:
        files = metadata.files(source) or []
    except (metadata.PackageNotFoundError, ValueError):
        return None
    for file in files:
        if file.name == "modules.json":
            return Path(str(file.locate())).parent
    return None
