"""What proposes hard negatives and what scores them: BM25, dense encoders, cross-encoders; and the cache of results.

Nothing is prepared before it is needed: where all that was asked for is in the cache, no corpus is encoded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from ..data.collection import Collection
from ..data.restrictions import Restrictions
from ..errors import DataError, ModelError
from ..extras import extra
from ..files import write_json
from ..model.encoder import SearchR3
from ..model.source import peer_files
from ..retrieval.encode import encode_corpus
from ..retrieval.encoding.identity import Peer
from ..retrieval.index import DType, ExactIndex
from ..retrieval.lexical import BM25
from ..retrieval.ranking import ranked
from ..retrieval.tokens import LexicalTokens
from ..types import Array, Progress, Watch


def quiet(what: str, total: int | None) -> Progress:
    """A `Watch` that shows nothing."""
    return lambda texts, tokens: None


class Scoring(Protocol):
    """A judge that holds a collection."""

    def score(self, texts: Sequence[str], doc_ids: Sequence[Sequence[str]]) -> list[list[float]]:
        """The score of each of these documents for the text at its place."""
        ...


class Searching(Scoring, Protocol):
    """A retriever that holds a collection."""

    def search(self, texts: Sequence[str], k: int, pools: Sequence[frozenset[str] | None]) -> list[list[str]]:
        """The `k` best documents of each text, of its pool where it has one, best first."""
        ...


class Judge(Protocol):
    """What scores documents for queries; its scores find the false negatives."""

    @property
    def key(self) -> Mapping[str, Any]:
        """All that its scores depend on, but for queries and documents; for JSON."""
        ...

    def prepare(self, collection: Collection, cache: Path, watch: Watch) -> Scoring:
        """Take in the documents; `cache` is a folder for what takes long."""
        ...


class Retriever(Judge, Protocol):
    """What proposes candidates; it can judge too."""

    def prepare(self, collection: Collection, cache: Path, watch: Watch) -> Searching:
        """Take in the documents; `cache` is a folder for what takes long."""
        ...


class LexicalRetriever:
    """BM25. A document without a word of the query has the score 0 and is no candidate.

    Args:
        stemmed: as the baseline `bm25` of evaluations; without it, as stage 1 mines when it starts.
    """

    def __init__(self, stemmed: bool = True) -> None:
        self._stemmed = stemmed
        self.key = {"kind": "bm25", "release": BM25.release(), **LexicalTokens(stemmed=stemmed).settings}

    def prepare(self, collection: Collection, cache: Path, watch: Watch) -> Searching:
        """Index the documents, which takes so little time that nothing is kept."""
        texts = collection.texts()
        return _LexicalSearch(BM25(list(texts), list(texts.values()), LexicalTokens(stemmed=self._stemmed)))


@dataclass
class _LexicalSearch:
    _index: BM25
    _last: tuple[tuple[str, ...], list[dict[str, float]]] = field(default=((), []))

    def search(self, texts: Sequence[str], k: int, pools: Sequence[frozenset[str] | None]) -> list[list[str]]:
        rankings = self._index.search_scored(texts, k, pools)
        self._last = tuple(texts), [dict(ranking) for ranking in rankings]
        return [[doc_id for doc_id, _ in ranking] for ranking in rankings]

    def score(self, texts: Sequence[str], doc_ids: Sequence[Sequence[str]]) -> list[list[float]]:
        """Those of the last search are kept: a retriever that judges too looks up only what it did not find."""
        scores = [dict(line) for line in self._last[1]] if self._last[0] == tuple(texts) else [{} for _ in texts]
        rest = [[doc_id for doc_id in ids if doc_id not in of] for ids, of in zip(doc_ids, scores, strict=True)]
        for of, ids, values in zip(scores, rest, self._index.scores(texts, rest), strict=True):
            of.update(zip(ids, values, strict=True))
        return [[of[doc_id] for doc_id in ids] for ids, of in zip(doc_ids, scores, strict=True)]


class DenseRetriever:
    """Cosine or dot product of vectors, which are kept in the cache while and after they are encoded.

    Args:
        documents: encodes documents.
        encode_query: texts -> vectors, `Q x D`.
        key: what the vectors of queries and documents depend on, the revision of the weights among it.
        dtype: how the vectors of documents are stored.
    """

    def __init__(
        self,
        documents: SearchR3 | Peer,
        encode_query: Callable[[Sequence[str]], Array],
        key: Mapping[str, Any],
        dtype: DType = "float16",
    ) -> None:
        self._documents, self._encode_query, self._dtype = documents, encode_query, dtype
        self.key = {"kind": "dense", **key, "dtype": dtype}

    def prepare(self, collection: Collection, cache: Path, watch: Watch) -> Searching:
        """Encode the documents, or what an interrupted call left of them."""
        texts = sorted(collection.texts().items())
        progress: Progress | None = None

        def start(total: int, resume_at: int) -> None:
            nonlocal progress
            progress = watch("documents", total)
            progress(resume_at, 0)

        folder = cache / f"vectors-{key_hash({'documents': _hash_texts(texts), **self.key})}"
        index = encode_corpus(
            self._documents,
            texts,
            folder,
            dtype=self._dtype,
            on_start=start,
            progress=lambda count, tokens: progress(count, tokens) if progress else None,
        )
        return _DenseSearch(_to_gpu(index), self._encode_query)


def _to_gpu(index: ExactIndex) -> ExactIndex:
    """The index on the GPU, where one has twice the room that its vectors take; else as it is, mapped from the disk."""
    if not torch.cuda.is_available():
        return index
    size = len(index) * index.dimension * np.dtype(index.dtype).itemsize
    return index.to("cuda") if 2 * size < torch.cuda.mem_get_info()[0] else index


@dataclass
class _DenseSearch:
    _index: ExactIndex
    _encode_query: Callable[[Sequence[str]], Array]
    _last: tuple[tuple[str, ...], Array] | None = field(default=None)

    def search(self, texts: Sequence[str], k: int, pools: Sequence[frozenset[str] | None]) -> list[list[str]]:
        rankings = ranked(self._index, self._vectors(texts), [Restrictions(pool=pool) for pool in pools], k)
        return [[doc_id for doc_id, _ in ranking] for ranking in rankings]

    def score(self, texts: Sequence[str], doc_ids: Sequence[Sequence[str]]) -> list[list[float]]:
        rows = [self._index.rows_of(ids) for ids in doc_ids]
        return [scores.tolist() for scores in self._index.scores_at(self._vectors(texts), rows)]

    def _vectors(self, texts: Sequence[str]) -> Array:
        """Those of the last call are kept: a retriever that judges too would encode the same queries twice."""
        if self._last is None or self._last[0] != tuple(texts):
            self._last = tuple(texts), self._encode_query(texts)
        return self._last[1]


class CrossEncoderJudge:
    """A cross-encoder of sentence-transformers: reads query and document together, which is slow and exact.

    Args:
        source: a directory or a hub id.
        batch_size: pairs read together.

    Raises:
        MissingExtraError: sentence-transformers is not installed.
        ModelError: there is no such model with one score a pair.
    """

    def __init__(self, source: str, batch_size: int = 32) -> None:
        with extra("integrations"):
            from sentence_transformers import CrossEncoder
        try:
            files = peer_files(source)
            self._model: Any = CrossEncoder(
                str(files.folder), trust_remote_code=False, model_kwargs={"use_safetensors": True}
            )
        except Exception as error:  # it raises whatever the library beneath it raises
            raise ModelError(
                f"cannot load the cross-encoder {source!r}: {str(error).splitlines()[0]}; give a directory or a hub id"
            ) from error
        if self._model.num_labels != 1:
            raise ModelError(f"{source!r} gives {self._model.num_labels} scores a pair; a judge gives one")
        self._batch_size, self._source = batch_size, source
        self.key = {
            "kind": "cross-encoder",
            "model": source,
            "revision": files.revision,
            "library": f"sentence-transformers {version('sentence-transformers')}",
        }

    def prepare(self, collection: Collection, cache: Path, watch: Watch) -> Scoring:
        """Nothing takes long before the pairs are read."""
        return _Crossing(collection, self)

    def scores(self, pairs: Sequence[tuple[str, str]]) -> Array:
        """One score for each query with its text.

        Raises:
            ModelError: one is not finite.
        """
        scores = np.asarray(
            self._model.predict(list(pairs), batch_size=self._batch_size, show_progress_bar=False), dtype=np.float32
        )
        if not np.isfinite(scores).all():
            raise ModelError(f"{self._source} gave NaN or infinity as a score; its weights are broken")
        return scores


@dataclass(frozen=True)
class _Crossing:
    _collection: Collection
    _judge: CrossEncoderJudge

    def score(self, texts: Sequence[str], doc_ids: Sequence[Sequence[str]]) -> list[list[float]]:
        documents = self._collection.documents
        pairs = [
            (text, documents[doc_id].full_text) for text, ids in zip(texts, doc_ids, strict=True) for doc_id in ids
        ]
        if not pairs:
            return [[] for _ in texts]
        scores = self._judge.scores(pairs)
        ends = np.cumsum([len(ids) for ids in doc_ids])[:-1]
        return [line.tolist() for line in np.split(scores, ends)]


class BlockCache:
    """Results of blocks of queries on the disk, each written whole or not at all.

    Args:
        folder: of all caches.
        kind: beginning of the name of this one.
        key: what the results depend on; another key is another folder.
    """

    def __init__(self, folder: Path, kind: str, key: Mapping[str, Any]) -> None:
        self.folder = folder / f"{kind}-{key_hash(key)}"
        self.hits = 0
        if not (self.folder / "key.json").exists():
            write_json(self.folder / "key.json", dict(key))

    def holds(self, blocks: int) -> bool:
        """Whether so many blocks are all there."""
        return all(self._path(number).exists() for number in range(blocks))

    def block(self, number: int, size: int, make: Callable[[], list[Any]]) -> list[Any]:
        """The result of a block: `size` values, read from the disk or made and written there.

        Raises:
            DataError: what is on the disk is damaged.
        """
        path = self._path(number)
        if not path.exists():
            values = make()
            write_json(path, values)
            return values
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(values, list) or len(values) != size:
                raise ValueError(f"expected a list of {size}")
        except ValueError as error:
            raise DataError(f"{path} is damaged ({error}); remove it and make the same call again") from error
        self.hits += 1
        return values

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.json"


def key_hash(key: Mapping[str, Any]) -> str:
    """16 hexadecimal digits for a key of a cache."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def _hash_texts(texts: Sequence[tuple[str, str]]) -> str:
    digest = hashlib.sha256()
    for pair in texts:
        digest.update(json.dumps(pair).encode())
    return digest.hexdigest()
