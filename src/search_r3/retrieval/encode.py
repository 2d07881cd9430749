"""Encoding a corpus that need not fit into memory, into an index folder; what was killed goes on where it was.

The documents are read twice. The first reading finds what is wrong with them before hours are spent on the others,
and where each of them stands in the index, whose rows are in descending order of doc_id; so the second reading writes
every vector to its final place, and the vectors are on the disk only once. After each block the file of vectors is
flushed, and then a manifest of the unfinished state says how many documents are done. The manifest of the index comes
last. Texts and vectors of one block are in memory, and the doc_ids of all documents.

Shapes: `N` documents, `D` vector size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..data.rows import instructed
from ..errors import DataError, VectorIndexError
from ..model.documents import unusable_rows
from ..model.encoder import SearchR3
from ..types import Array, Progress, Rows
from . import storage
from .index import DType, ExactIndex, descending

# A GPU's batches of many tokens need a large block to find texts of like length in: of 1024 texts they would be
# padded by 40 %, of these by 4 % (of log-normal lengths). A CPU's small batches are full either way, and it is slow.
BLOCK_SIZES = {"cpu": 1024, "cuda": 16384}
"""Documents encoded between two records of what is done, by device."""
PROBE = "What do people pay with in Tashkent? The Uzbekistani Som is the currency of Uzbekistan."
"""The text whose vector tells one model from another."""
ALIKE = 0.9999
"""Least cosine of two vectors of the probe for one model; devices and batches move it by less."""

Documents = Iterable[tuple[str, str]]
"""Pairs of doc_id and text, the same in every iteration."""


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


@dataclass(frozen=True)
class _Survey:
    """What the first reading of the documents found."""

    doc_ids: list[str]
    """In descending order."""
    rows: Rows
    """The row of each document, in the order of reading, `N`."""
    digests: list[str]
    """The hash of all documents up to the end of each block."""


def encode_corpus(
    model: SearchR3 | Peer,
    documents: Documents,
    folder: str | Path,
    *,
    instruction: str = "",
    dtype: DType = "float16",
    block_size: int | None = None,
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
            texts of like length together.
        on_start: called once, before anything is encoded, with the numbers of all documents and of those done already.
        progress: called with the numbers of documents and of tokens done since it was called last.

    Returns:
        The index, its vectors memory-mapped.

    Raises:
        DataError: no documents, a doubled doc_id, a text without a visible character, or documents that change while
            they are read.
        VectorIndexError: `folder` belongs to another model, other documents, another instruction of documents or
            another dtype, or is damaged; a vector is not finite or too large for `dtype`; the disk is full. What is
            done stays done.
    """
    if block_size is None:
        block_size = BLOCK_SIZES.get(_device_type(model), BLOCK_SIZES["cuda"])
    elif block_size < 1:
        raise VectorIndexError(f"a block holds at least 1 document; block_size was {block_size}")
    folder, survey = Path(folder), _survey_documents(documents, block_size)
    count = len(survey.doc_ids)
    facts, probe = _identity(model, survey, instruction)
    facts["dtype"] = dtype
    complete = _read_state(folder, storage.MANIFEST, facts, probe)
    resume_at, paths = complete or _open_state(folder, facts, probe)
    if on_start is not None:
        on_start(count, resume_at)
    if complete:
        storage.sweep(folder, {path.name for path in paths.values()})
    else:
        facts["origin"] |= _state_of(model)
        for start, block in _remaining(documents, survey, block_size, resume_at):
            vectors, end = _vectors(model, block, instruction, dtype, progress), start + len(block)
            with storage.writable(folder):
                storage.write_rows(paths["vectors.npy"], survey.rows[start:end].tolist(), vectors)
            storage.save_state(folder, paths, {**facts, "done": end}, storage.UNFINISHED)
        labels = storage.label_writers(survey.doc_ids, np.zeros(count, dtype=np.int64))
        storage.save_state(folder, {**paths, **labels}, facts)
    return ExactIndex.load(folder, mmap=True)


def load_corpus(model: SearchR3, documents: Documents, folder: str | Path, *, instruction: str = "") -> ExactIndex:
    """The index that `encode_corpus` made of these documents with this model, its vectors memory-mapped.

    Raises:
        DataError: as in `encode_corpus`.
        VectorIndexError: there is none, or it is of another model or of other documents, or has another instruction.
    """
    folder = Path(folder)
    facts, probe = _identity(model, _survey_documents(documents, BLOCK_SIZES["cpu"]), instruction)
    if _read_state(folder, storage.MANIFEST, facts, probe) is None:
        unfinished = (folder / storage.UNFINISHED).exists()
        content = "an encoding that is not finished" if unfinished else "no index"
        raise VectorIndexError(f"{folder} holds {content}; encode the corpus into it (search-r3 encode) first")
    return ExactIndex.load(folder, mmap=True)


def _blocks(documents: Documents, size: int) -> Iterator[tuple[list[tuple[str, str]], str]]:
    """Each block of documents and the hash of all up to its end."""
    source, digest = iter(documents), hashlib.sha256()
    while block := list(islice(source, size)):
        for doc_id, text in block:
            if not isinstance(text, str) or not text.strip():
                raise DataError(f"document {doc_id!r} has the text {text!r}; expected at least one visible character")
            try:
                # With the lengths, no two corpora have the same bytes.
                digest.update(f"{len(doc_id)} {len(text)} {doc_id}{text}".encode())
            except UnicodeEncodeError as error:
                raise DataError(
                    f"document {doc_id!r} holds half a surrogate pair, which is no text; mend or remove it"
                ) from error
        yield block, digest.hexdigest()


def _survey_documents(documents: Documents, block_size: int) -> _Survey:
    if isinstance(documents, Iterator):
        raise DataError(
            "the documents can be read only once, and encoding reads them twice; give a list, or an object whose "
            "__iter__ begins anew"
        )
    doc_ids: list[str] = []
    digests = []
    for block, digest in _blocks(documents, block_size):
        doc_ids += [doc_id for doc_id, _ in block]
        digests.append(digest)
    if not doc_ids:
        raise DataError("an index needs at least one document; the corpus is empty")
    order = descending(doc_ids)
    rows = np.empty_like(order)
    rows[order] = np.arange(len(order))
    descending_ids = [doc_ids[place] for place in order]
    for upper, lower in pairwise(descending_ids):
        if upper == lower:
            raise DataError(f"two documents have the id {upper!r}; ids must be unique")
    return _Survey(descending_ids, rows, digests)


def _device_type(model: SearchR3 | Peer) -> str:
    if isinstance(model, Peer):
        return "cuda" if torch.cuda.is_available() else "cpu"
    return model.backbone.device.type


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


def _state_of(model: SearchR3 | Peer) -> Mapping[str, Any]:
    """What the manifest says of the weights, for people: it is the probe that is compared."""
    if isinstance(model, Peer):
        return {}
    return {"revision": model.backbone.revision, "precision": model.backbone.dtype}


def _identity(model: SearchR3 | Peer, survey: _Survey, instruction: str) -> tuple[dict[str, Any], Array]:
    """What a manifest says about model and documents, and the model's vector of the probe, `1 x D`."""
    origin = dict(_origin(model))
    if instruction.strip():
        origin["settings"] = {**origin["settings"], "document_instruction": instruction.strip()}
    origin |= {"documents_sha256": survey.digests[-1], "search_r3": version("search-r3")}
    facts = {"documents": len(survey.doc_ids), "dimension": model.dimension, "origin": origin}
    return facts, model.encode_document([PROBE])


def _open_state(folder: Path, facts: dict[str, Any], probe: Array) -> tuple[int, dict[str, Path]]:
    """How many documents are done, and the data files; of a new state where there is none."""
    state = _read_state(folder, storage.UNFINISHED, facts, probe)
    if state is not None:
        return state
    # An index of the probe alone refuses an unknown dtype and a broken model before anything is written.
    ExactIndex(["probe"], probe, dtype=facts["dtype"])
    writers = {
        "vectors.npy": storage.reserve_array((facts["documents"], facts["dimension"]), facts["dtype"]),
        "probe.npy": storage.write_array(torch.from_numpy(probe), 1),
    }
    return 0, storage.save_state(folder, writers, {**facts, "done": 0}, storage.UNFINISHED)


def _read_state(folder: Path, name: str, facts: dict[str, Any], probe: Array) -> tuple[int, dict[str, Path]] | None:
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
        storage.read_array(
            paths["vectors.npy"], (manifest["documents"], manifest["dimension"]), manifest["dtype"], mmap=True
        )
        difference = _difference(manifest, facts, stored_probe, probe)
        count = manifest["documents"] if name == storage.MANIFEST else manifest["done"]
    if difference:
        raise VectorIndexError(
            f"{folder} was encoded {difference}; nothing in it was changed: go on with those, or choose another folder"
        )
    return count, paths


def _difference(then: dict[str, Any], now: dict[str, Any], stored_probe: Array, probe: Array) -> str | None:
    """In what a stored state differs from that of this call; both with the model's vector of the probe."""
    stored_settings, settings = then["origin"]["settings"], now["origin"]["settings"]
    if then["origin"]["documents_sha256"] != now["origin"]["documents_sha256"]:
        return (
            f"from other documents, or from these in another order ({then['documents']} then, {now['documents']} now)"
        )
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


def _remaining(
    documents: Documents, survey: _Survey, block_size: int, resume_at: int
) -> Iterator[tuple[int, list[tuple[str, str]]]]:
    """The documents that are not done, in blocks, each with the place of its first document.

    Blocks begin at multiples of `block_size` wherever an encoding stopped, so that it has the batches of an unbroken
    one, and vectors with the same bytes.
    """
    blocks = _blocks(documents, block_size)
    for start, surveyed_digest in zip(range(0, len(survey.doc_ids), block_size), survey.digests, strict=True):
        block, digest = next(blocks, ([], ""))
        if digest != surveyed_digest:
            raise DataError(
                f"the documents changed while they were encoded, somewhere between numbers {start} and "
                f"{start + block_size}; encode them again, unchanged or into another folder"
            )
        if rest := block[max(0, resume_at - start) :]:
            yield max(resume_at, start), rest


def _vectors(
    model: SearchR3 | Peer, block: list[tuple[str, str]], instruction: str, dtype: DType, progress: Progress | None
) -> NDArray[Any]:
    """The vectors of a block in the dtype of the index, each checked."""
    texts = [text for _, text in block]
    vectors = np.asarray(model.encode_document(texts, instruction=instruction, progress=progress))
    if vectors.shape != (len(block), model.dimension):
        raise VectorIndexError(
            f"expected {len(block)} vectors of size {model.dimension} from the model, found shape {vectors.shape}"
        )
    places = unusable_rows(vectors, dtype)
    if len(places):
        finite = np.isfinite(vectors[places[0]]).all()
        fault = f"more than {dtype} can; encode as float32" if finite else "NaN or infinity; the model is broken"
        raise VectorIndexError(f"the vector of document {block[places[0]][0]!r} holds {fault}")
    return vectors.astype(dtype)
