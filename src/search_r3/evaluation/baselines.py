"""What models are compared with: BM25, BM25 on a model's reasoning, sentence-transformers."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from ..data.collection import Collection
from ..data.rows import instructed
from ..errors import ModelError
from ..extras import extra
from ..model.documents import check_finite
from ..model.precision import torch_device, torch_dtype
from ..model.source import peer_files
from ..retrieval.index import ExactIndex
from ..retrieval.lexical import BM25, Scored
from ..retrieval.ranking import RankRequest, without
from ..retrieval.tokens import AUTO, LexicalTokens
from ..types import Array, Progress
from .instructions import OWN, choose
from .results import Cost, SystemInfo
from .systems import AT_A_TIME, Answers, PerCollection, Searchable, rank_in_blocks, rank_vectors

SENTENCE_TRANSFORMERS = "sentence-transformers:"
BM25_NAME, UNSTEMMED = "bm25", "bm25-unstemmed"
"""BM25 as mteb has it, and with English stop words alone: what stage 1 mines with."""
_TASK = re.compile(r"(\s*Instruct(?:ion)?: ?)(.*?)(\n+Quer(?:y|ies): ?)", re.DOTALL | re.IGNORECASE)
"""How prompts of many models that take instructions begin: the instruction stands in the second group."""


class BM25System(PerCollection[Searchable]):
    """BM25 on the queries, or on other `texts` by query_id.

    Args:
        name: as in the tables.
        texts: what is searched instead of a query, e.g. a model's reasoning; the query itself where it is blank.
        origin: what names the texts, for the cache.
        before: what the texts cost.
        language: as of `LexicalTokens`.
        stemmed: as mteb's baseline; without it, words as they are and English stop words.
    """

    def __init__(
        self,
        name: str = BM25_NAME,
        texts: Mapping[str, str] | None = None,
        origin: str = "",
        before: Cost | None = None,
        *,
        language: str = AUTO,
        stemmed: bool = True,
    ) -> None:
        self._texts, self.before = texts or {}, before
        self._language, self._stemmed = language, stemmed
        settings = LexicalTokens(language, stemmed).settings | ({"texts": origin} if texts is not None else {})
        self.info = SystemInfo(name=name, kind="bm25", model="bm25s", revision=BM25.release(), settings=settings)

    def _make_index(self, collection: Collection, progress: Progress | None) -> Searchable:
        started = time.perf_counter()
        tokens = LexicalTokens(self._language, self._stemmed)
        # Joined as mteb joins them: where characters are counted, the line break is one.
        texts = [f"{document.title}\n{document.text}" for document in collection.documents.values()]
        index = BM25(list(collection.documents), texts, tokens)
        seconds = time.perf_counter() - started
        if progress is not None:
            progress(len(collection.documents), 0)
        return _Lexical(index, tokens, self._texts, len(collection.documents) / seconds)


@dataclass(frozen=True)
class _Lexical:
    _index: BM25
    _tokens: LexicalTokens
    _texts: Mapping[str, str]
    documents_per_second: float | None
    truncated_documents: int = 0

    def answer(self, requests: Sequence[RankRequest], depth: int, progress: Progress | None = None) -> Answers:
        texts = [self._texts.get(request.query_id, "").strip() or request.text for request in requests]
        deepest = depth + max(len(request.left_out) for request in requests)

        def rank(part: slice) -> list[Scored]:
            pools = [request.pool for request in requests[part]]
            found = self._index.search_scored(texts[part], deepest, pools)
            if progress is not None:
                progress(len(found), 0)
            return [without(ranking, request, depth) for ranking, request in zip(found, requests[part], strict=True)]

        rankings, notes = rank_in_blocks(len(requests), rank), []
        if self._tokens.by_character:
            notes.append(f"texts were read character by character, as language {self._tokens.language}")
        if self._tokens.stemmed and not self._tokens.familiar:
            notes.append(f"no stems and no stop words of language {self._tokens.language} are known")
        if lost := sum(not ranking.doc_ids for ranking in rankings):
            language = f"read as language {self._tokens.language}"
            notes.append(f"{lost:,} of {len(rankings):,} queries share no word with a document ({language})")
        return Answers(rankings, notes=notes)


class PeerModel(PerCollection[tuple[ExactIndex, float, int]]):
    """A dense model of sentence-transformers, with what it has encoded last.

    `index` gives the index, the documents encoded per second, and how many are longer than the model reads.

    Args:
        source: a directory, an installed package that carries a model, or a hub id; `SOURCE@REVISION` names a commit,
            tag or branch on the hub.
        batch_size: texts encoded together.
        device: as of `SearchR3`.
        dtype: as of `SearchR3`.

    Raises:
        MissingExtraError: sentence-transformers is not installed.
        ModelError: there is no such model.
    """

    def __init__(self, source: str, batch_size: int = 32, *, device: str | None = None, dtype: str = "auto") -> None:
        with extra("integrations"):
            from sentence_transformers import SentenceTransformer
        place = torch_device(device)
        precision = torch_dtype(dtype, place)
        name, _, revision = source.partition("@") if not Path(source).exists() else (source, "", "")
        try:
            files = peer_files(str(_package_folder(name) or name), revision or None)
            self._model: Any = SentenceTransformer(
                str(files.folder), trust_remote_code=False, model_kwargs={"use_safetensors": True}, device=str(place)
            ).to(precision)
        except Exception as error:  # it raises whatever the library beneath it raises
            raise ModelError(
                f"cannot load {source!r} with sentence-transformers: {str(error).splitlines()[0]}; give a directory, "
                "an installed package that carries a model, or a hub id"
            ) from error
        self.source, self.batch_size, self.revision = name, batch_size, files.revision
        similarity = self._model.similarity_fn_name
        if similarity not in ("cosine", "dot"):
            raise ModelError(f"{source!r} compares vectors by {similarity}; only cosine and dot are supported")
        self._normalize = similarity == "cosine"
        self.settings = {
            "max_seq_length": self._model.max_seq_length,
            "similarity": similarity,
            "library": f"sentence-transformers {metadata.version('sentence-transformers')}",
            "dtype": str(precision).removeprefix("torch."),
        }

    def prompt(self, task: str, kind: str) -> str:
        """The model's own prompt for a side of a task, by the names that mteb has for them; else that of the side."""
        names = {name.casefold(): text for name, text in (self._model.prompts or {}).items()}
        keys = (f"{task}-{kind}", task, f"retrieval-{kind}", "retrieval", kind)
        return next((str(names[key.casefold()]) for key in keys if names.get(key.casefold())), "")

    def encode(self, texts: Sequence[str], kind: str, task: str = "", instruction: str = "") -> Array:
        """Vectors of queries or documents, `N x D`.

        Args:
            texts: without their instruction.
            kind: `query` or `document`.
            task: the name of the collection, for models with prompts for some.
            instruction: takes the place of the task in a prompt that begins `Instruct: ...`, else follows each text.

        Raises:
            ModelError: a vector holds NaN or infinity.
        """
        prompt, encode = self.prompt(task, kind), getattr(self._model, f"encode_{kind}")
        if instruction and (match := _TASK.match(prompt)):
            prompt = f"{match[1]}{instruction}{match[3]}{prompt[match.end() :]}"
        else:
            texts = [instructed(text, instruction) for text in texts]
        vectors = encode(
            list(texts),
            prompt=prompt or None,
            batch_size=self.batch_size,
            normalize_embeddings=self._normalize,
            show_progress_bar=False,
        )
        check_finite(vectors, texts, self.source)
        return np.asarray(vectors, dtype=np.float32)

    def _truncated(self, texts: Sequence[str], task: str) -> int:
        limit, prompt = self._model.max_seq_length, self.prompt(task, "document")
        long = [prompt + text for text in texts if limit and len((prompt + text).encode()) + 2 > limit]
        cut = 0
        for start in range(0, len(long), AT_A_TIME):
            ids = self._model.tokenizer(long[start : start + AT_A_TIME], truncation=False, verbose=False)["input_ids"]
            cut += sum(len(line) > limit for line in ids)
        return cut

    def _make_index(self, collection: Collection, progress: Progress | None) -> tuple[ExactIndex, float, int]:
        texts = collection.texts()
        cut = self._truncated(list(texts.values()), collection.name)
        started = time.perf_counter()
        vectors = self.encode(list(texts.values()), "document", collection.name)
        seconds = time.perf_counter() - started
        if progress is not None:
            progress(len(texts), 0)
        return ExactIndex(list(texts), vectors), len(texts) / seconds, cut


class SentenceTransformersSystem:
    """A dense peer, with its prompts.

    Args:
        model: the model, shared by the instructions that it is measured with.
        name: as in the tables; by default the model's.
        instruction: of the queries, see `instructions.choose`.
    """

    before: Cost | None = None

    def __init__(self, model: PeerModel, name: str | None = None, instruction: str = OWN) -> None:
        self.model, self.instruction = model, instruction
        self.info = SystemInfo(
            name=name or Path(model.source).name,
            kind="sentence-transformers",
            model=model.source,
            revision=model.revision,
            settings=model.settings | ({} if instruction == OWN else {"instruction": instruction}),
        )

    def index(self, collection: Collection, progress: Progress | None = None) -> Searchable:
        """Encode all documents, unless those of the last call are these."""
        return _Dense(self.model, self.instruction, collection.name, *self.model.index(collection, progress))


@dataclass(frozen=True)
class _Dense:
    _model: PeerModel
    _instruction: str
    _task: str
    _index: ExactIndex
    documents_per_second: float | None
    truncated_documents: int

    def answer(self, requests: Sequence[RankRequest], depth: int, progress: Progress | None = None) -> Answers:
        rows: dict[str, list[int]] = {}
        for row, request in enumerate(requests):
            rows.setdefault(choose(self._instruction, request.instruction), []).append(row)
        vectors = np.empty((len(requests), self._index.dimension), dtype=np.float32)
        for instruction, places in rows.items():
            texts = [requests[row].bare for row in places]
            vectors[places] = self._model.encode(texts, "query", self._task, instruction)
            if progress is not None:
                progress(len(places), 0)
        return Answers(rank_vectors(self._index, vectors, requests, depth))


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
