"""Chunks as rows of a table, and back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..data.documents import Chunk
from ..data.rows import check_text
from ..errors import DataError
from ..extras import extra
from ..types import Array

if TYPE_CHECKING:
    import pyarrow as pa

Rows = Callable[[str, Sequence[str], Sequence[str]], Iterable[Mapping[str, Any]]]
"""Column, values, columns -> the rows in which the column has one of these values."""
CHUNK = (
    *("id", "parent_id", "title", "headings", "text", "start", "end", "page"),
    *("content_hash", "path", "source", "metadata"),
)
"""The columns that a chunk is made of."""


def schema_of(dimension: int, facts: Mapping[str, str] | None = None) -> pa.Schema:
    """The columns of a table of vectors of this size; `facts` stay with it for good."""
    with extra("serve"):
        import pyarrow as pa

    text, whole = pa.string(), pa.int64()
    return pa.schema(
        [
            pa.field("id", text, nullable=False),
            pa.field("parent_id", text, nullable=False),
            pa.field("title", text),
            pa.field("headings", pa.list_(text)),
            pa.field("text", text),
            pa.field("full_text", text),  # what is encoded, and searched for words
            pa.field("start", whole),
            pa.field("end", whole),
            pa.field("page", pa.int32()),
            pa.field("content_hash", text),
            pa.field("path", text),
            pa.field("source", text),
            pa.field("metadata", pa.json_(text)),
            pa.field("revision", text),
            pa.field("vector", pa.list_(pa.float32(), dimension)),
        ],
        metadata=dict(facts or {}),
    )


def to_table(chunks: Sequence[Chunk], vectors: Array) -> pa.Table:
    """Chunks and their vectors (`N x D`) as rows.

    Raises:
        DataError: a metadata that JSON cannot hold, or half a surrogate pair; the document is named.
    """
    with extra("serve"):
        import pyarrow as pa

    # The table's own schema has the metadata as bytes, and would take JSON for what it makes of it.
    schema = schema_of(vectors.shape[1])
    revisions = {name: revision_of(of_one) for name, of_one in by_document(chunks).items()}
    columns: dict[str, Any] = {name: [_cell(chunk, name) for chunk in chunks] for name in (*CHUNK, "full_text")}
    columns["revision"] = [revisions[chunk.parent_id] for chunk in chunks]
    columns["vector"] = pa.FixedSizeListArray.from_arrays(vectors.ravel(), vectors.shape[1])
    return pa.table({field.name: pa.array(columns[field.name], field.type) for field in schema}, schema=schema)


def chunk_of(row: Mapping[str, Any]) -> Chunk:
    """The chunk in a row."""
    values = {name: row[name] for name in CHUNK if name != "id"}
    values |= {"headings": tuple(row["headings"]), "metadata": json.loads(row["metadata"])}
    return Chunk(doc_id=row["id"], **values)


def by_document(chunks: Iterable[Chunk]) -> dict[str, list[Chunk]]:
    """The chunks of each document."""
    documents: dict[str, list[Chunk]] = {}
    for chunk in chunks:
        documents.setdefault(chunk.parent_id, []).append(chunk)
    return documents


def check_names(chunks: Sequence[Chunk], rows: Rows) -> None:
    """Refuse documents with the id of another one's chunk: `a#0` is either a document or the first chunk of `a`.

    Args:
        chunks: to be written.
        rows: looks up rows by the values of a column.

    Raises:
        DataError: there is one, and the store does not hold both already.
    """
    owners, parents = {chunk.doc_id: chunk.parent_id for chunk in chunks}, {chunk.parent_id for chunk in chunks}
    signed = {name for name in parents if "#" in name}
    stored = {row["parent_id"] for row in rows("parent_id", sorted(owners.keys() | signed), ["parent_id"])}
    clashes = {(name, owner) for name, owner in owners.items() if name != owner and name in parents | stored}
    names = sorted(signed | {name for name, _ in clashes})
    held = {(row["id"], row["parent_id"]) for row in rows("id", names, ["id", "parent_id"])}
    clashes |= {(name, owner) for name, owner in held if name in parents and owner not in {*parents, name}}
    # What an older version let in can be written anew, as long as neither loses a chunk by it.
    clashes -= {(name, owner) for name, owner in held if name in stored and owners.get(name, owner) == owner}
    if clashes:
        name, other = min(clashes)
        raise DataError(
            f"document {name!r} has the id of a chunk of document {other!r}; give one of them another id, or its "
            "source a prefix (PREFIX=SOURCE)"
        )


def revision_of(chunks: Iterable[Chunk]) -> str:
    """SHA-256 (hex) over all that is stored of a document but its vectors."""
    return revision_of_rows(map(row_digest, chunks))


def revision_of_rows(digests: Iterable[str]) -> str:
    """The same from the `row_digest` of each chunk, in any order."""
    return hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()


def row_digest(chunk: Chunk) -> str:
    """SHA-256 (hex) over what is stored of a chunk."""
    return hashlib.sha256(json.dumps([_cell(chunk, name) for name in CHUNK]).encode()).hexdigest()


def _cell(chunk: Chunk, name: str) -> Any:
    if name == "metadata":
        try:
            # JSON has no NaN; of a table's empty cells it becomes null.
            plain = json.loads(json.dumps(dict(chunk.metadata)), parse_constant=lambda _: None)
            text = json.dumps(plain, ensure_ascii=False, sort_keys=True)
        except (TypeError, ValueError) as error:
            raise DataError(f"document {chunk.parent_id!r}: its metadata is nothing for JSON ({error})") from error
        return check_text(text, f"document {chunk.parent_id!r}: its metadata")
    value = getattr(chunk, "doc_id" if name == "id" else name)
    if isinstance(value, str):
        return check_text(value, f"document {chunk.parent_id!r}: its {name}")
    return list(value) if isinstance(value, tuple) else value
