"""Options of the commands that read own documents."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import ConfigError
from .common import columns_of

if TYPE_CHECKING:
    from ..data.documents import DocumentStream
    from ..model.encoder import SearchR3

PANEL = "Own documents"
DocumentsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--documents",
        "-d",
        help="Instead of a collection: a folder, a file, a table (`.jsonl`, `.csv`, `.tsv`, `.parquet`) or a data set "
        "of the hub; more than one: repeat it. PREFIX=SOURCE puts a prefix before its ids.",
        rich_help_panel=PANEL,
    ),
]
ColumnOption = Annotated[
    list[str] | None,
    typer.Option(
        "--column",
        help="Which column of a table holds what, as FIELD=COLUMN; fields: id, title, text, metadata. By default usual "
        "names; repeat it.",
        rich_help_panel=PANEL,
    ),
]
ChunkTokens = Annotated[
    int | None,
    typer.Option(
        min=16,
        help="Largest chunk of a document; by default 512 or what the model has room for.",
        rich_help_panel=PANEL,
    ),
]
ChunkOverlap = Annotated[
    int, typer.Option(min=0, help="Tokens, at most, that a chunk repeats of the one before it.", rich_help_panel=PANEL)
]


def own_documents(sources: list[str], columns: list[str] | None, collection: str | None) -> DocumentStream:
    """The documents, not cut yet; what does not exist is refused before a model is loaded."""
    from ..data.documents import read_documents

    if collection is not None:
        raise ConfigError("--collection and --documents: give one of them")
    return read_documents(sources, columns=columns_of(columns), chunking=None)


def cut_for(
    encoder: SearchR3, documents: DocumentStream, tokens: int | None, overlap: int, instruction: str
) -> DocumentStream:
    """The documents in chunks that the model has room for."""
    from ..model.documents import document_chunking

    documents.chunking = document_chunking(encoder.backbone, tokens, overlap=overlap, instruction=instruction)
    return documents
