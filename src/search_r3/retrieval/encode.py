"""Encoding a corpus that need not fit into memory, into an index folder; what was killed goes on where it was.

The documents are read twice. The first reading finds what is wrong with them before hours are spent on the others,
and where each of them stands in the index, whose rows are in descending order of doc_id; so the second reading writes
every vector to its final place, and the vectors are on the disk only once. After each block the file of vectors is
flushed, and then a manifest of the unfinished state says how many documents are done. The manifest of the index comes
last. Texts and vectors of one block are in memory, and the doc_ids of all documents.

Shapes: `N` documents, `D` vector size.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import VectorIndexError
from ..model.documents import unusable_rows
from ..model.encoder import SearchR3
from ..types import Array, Progress
from . import storage
from .approximate import ApproximateIndex
from .encoding.identity import Peer, identity, read_state, state_of
from .encoding.shards import Shard, check_cut, merge_shards, shards_in
from .encoding.survey import Block, Documents, Span, Survey, remaining, span_of, survey_documents
from .encoding.workers import RayWorkers, count_done, read_block
from .index import DType, ExactIndex
from .kinds import open_index

# A GPU's batches of many tokens need a large block to find texts of like length in: of 1024 texts they would be
# padded by 40 %, of these by 4 % (of log-normal lengths). A CPU's small batches are full either way, and it is slow.
BLOCK_SIZES = {"cpu": 1024, "cuda": 16384}
"""Documents encoded between two records of what is done, by device."""
BLOCKS = "blocks"
"""Below an index folder: what goes to workers and comes back."""


def encode_corpus(
    model: SearchR3 | Peer,
    documents: Documents,
    folder: str | Path,
    *,
    instruction: str = "",
    dtype: DType = "float16",
    block_size: int | None = None,
    shard: Shard | None = None,
    workers: RayWorkers | None = None,
    on_start: Callable[[int, int], None] | None = None,
    progress: Progress | None = None,
) -> ExactIndex:
    """Encode documents into an index folder; after a kill the same call goes on after the last complete block.

    Where the folder holds the finished index of the same model and documents, nothing is encoded.

    Args:
        model: the encoder.
        documents: doc_ids and texts; they are iterated over twice, so a generator will not do.
        folder: made if missing.
        instruction: of the documents, as in `SearchR3.encode_document`.
        dtype: how vectors are stored.
        block_size: documents that a kill may cost, by default what suits the device; within a block the model puts
            texts of like length together. The same for all shards.
        shard: encode this part of the documents only, into a folder below `folder`; whoever finishes the last one
            makes one index of all. Where shards lie that were encoded elsewhere, a call without it does.
        workers: encode, instead of `model`, which must be the same; `folder` must be where they see it, too.
        on_start: called once, before anything is encoded, with the numbers of all documents and of those done already.
        progress: called with the numbers of documents and of tokens done since it was called last.

    Returns:
        The index, its vectors memory-mapped; as long as other shards are not finished, that of the shard.

    Raises:
        DataError: no documents, a doubled doc_id, a text without a visible character, or documents that change while
            they are read.
        VectorIndexError: `folder` belongs to another model, other documents, another instruction of documents, another
            dtype or other shards, or is damaged; a vector is not finite or too large for `dtype`; the disk is full.
            What is done stays done.
        ConfigError: more shards than blocks.
    """
    folder, survey = Path(folder), survey_documents(documents, _block_size(model, block_size))
    facts, probe = identity(model, survey, instruction)
    job = _Job(model, documents, survey, instruction, {**facts, "dtype": dtype}, probe, workers, on_start, progress)
    if not (folder / storage.MANIFEST).exists() and (shard is not None or shards_in(folder)):
        check_cut(folder, shard)
        if shard is not None:
            span = shard.span(survey)
            job.encode(folder / shard.folder, span, shard.facts(span, survey))
        if not merge_shards(folder):
            assert shard is not None
            return ExactIndex.load(folder / shard.folder, mmap=True)
        if shard is not None:
            return ExactIndex.load(folder, mmap=True)
    job.encode(folder, span_of(survey), {})
    return ExactIndex.load(folder, mmap=True)


def load_corpus(
    model: SearchR3, documents: Documents, folder: str | Path, *, instruction: str = ""
) -> ExactIndex | ApproximateIndex:
    """The index that `encode_corpus` made of these documents with this model, memory-mapped.

    Raises:
        DataError: as in `encode_corpus`.
        VectorIndexError: there is none, or it is of another model or of other documents, or has another instruction.
    """
    folder = Path(folder)
    check_finished(folder)
    facts, probe = identity(model, survey_documents(documents, BLOCK_SIZES["cpu"]), instruction)
    read_state(folder, storage.MANIFEST, facts, probe)
    return open_index(folder)


def check_finished(folder: Path) -> None:
    """Refuse a folder in which no encoding was finished.

    Raises:
        VectorIndexError: it is one.
    """
    if not (folder / storage.MANIFEST).exists():
        unfinished = (folder / storage.UNFINISHED).exists() or shards_in(folder)
        content = "an encoding that is not finished" if unfinished else "no index"
        raise VectorIndexError(f"{folder} holds {content}; encode the corpus into it (search-r3 encode) first")


@dataclass(frozen=True)
class _Job:
    """What is encoded, and by which model."""

    model: SearchR3 | Peer
    documents: Documents
    survey: Survey
    instruction: str
    facts: dict[str, Any]
    """Of the manifest."""
    probe: Array
    workers: RayWorkers | None
    on_start: Callable[[int, int], None] | None
    progress: Progress | None

    def encode(self, folder: Path, span: Span, more: dict[str, Any]) -> None:
        """Encode what is not done of some documents into a folder; `more` its manifest says, too."""
        facts = {**self.facts, **more}
        complete = read_state(folder, storage.MANIFEST, facts, self.probe)
        resume_at, paths = complete or self._open_state(folder, facts)
        start, blocks = span.first + resume_at, folder / BLOCKS
        if self.on_start is not None:
            by_workers = self.workers is not None and not complete
            waiting = count_done(blocks, start, span.end, self.survey.block_size) if by_workers else 0
            self.on_start(len(span), resume_at + waiting)
        if complete:
            storage.sweep(folder, {path.name for path in paths.values()})
            return
        facts["origin"] = {**facts["origin"], **state_of(self.model)}
        rest = (self.documents, self.survey, start, span.end)
        if self.workers is not None:
            self.workers.encode(remaining(*rest), blocks, self.instruction, self.progress)
        for number, block in remaining(*rest):
            if self.workers is not None:
                vectors = read_block(blocks, number, block)
            else:
                texts = [text for _, text in block]
                vectors = self.model.encode_document(texts, instruction=self.instruction, progress=self.progress)
            place = number - span.first
            end = place + len(block)
            with storage.writable(folder):
                storage.write_rows(paths["vectors.npy"], span.rows[place:end], self._checked(vectors, block))
            storage.save_state(folder, paths, {**facts, "done": end}, storage.UNFINISHED)
        labels = storage.label_writers(span.doc_ids, np.zeros(len(span), dtype=np.int64))
        storage.save_state(folder, {**paths, **labels}, facts)
        shutil.rmtree(blocks, ignore_errors=True)

    def _open_state(self, folder: Path, facts: dict[str, Any]) -> tuple[int, dict[str, Path]]:
        """How many documents are done, and the data files; of a new state where there is none."""
        state = read_state(folder, storage.UNFINISHED, facts, self.probe)
        if state is not None:
            return state
        # An index of the probe alone refuses an unknown dtype and a broken model before anything is written.
        ExactIndex(["probe"], self.probe, dtype=facts["dtype"])
        writers = {
            "vectors.npy": storage.reserve_array((facts["documents"], facts["dimension"]), facts["dtype"]),
            "probe.npy": storage.write_array(torch.from_numpy(self.probe), 1),
        }
        return 0, storage.save_state(folder, writers, {**facts, "done": 0}, storage.UNFINISHED)

    def _checked(self, vectors: Array, block: Block) -> NDArray[Any]:
        """The vectors of a block in the dtype of the index."""
        dimension, dtype = self.facts["dimension"], self.facts["dtype"]
        vectors = np.asarray(vectors)
        if vectors.shape != (len(block), dimension):
            raise VectorIndexError(
                f"expected {len(block)} vectors of size {dimension} from the model, found shape {vectors.shape}"
            )
        places = unusable_rows(vectors, dtype)
        if len(places):
            finite = np.isfinite(vectors[places[0]]).all()
            fault = f"more than {dtype} can; encode as float32" if finite else "NaN or infinity; the model is broken"
            raise VectorIndexError(f"the vector of document {block[places[0]][0]!r} holds {fault}")
        return vectors.astype(dtype)


def _block_size(model: SearchR3 | Peer, asked: int | None) -> int:
    if asked is None:
        gpu = torch.cuda.is_available() if isinstance(model, Peer) else model.backbone.device.type != "cpu"
        return BLOCK_SIZES["cuda" if gpu else "cpu"]
    if asked < 1:
        raise VectorIndexError(f"a block holds at least 1 document; block_size was {asked}")
    return asked
