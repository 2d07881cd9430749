"""Commands that encode and search."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .. import console
from .common import (
    CollectionOption,
    DocumentInstruction,
    IndexDType,
    ModelArgument,
    ModelOptions,
    ModeName,
    NewFolder,
    Untrained,
    WeightDType,
    app,
    check_new,
    load_encoder,
    takes_model_options,
)

if TYPE_CHECKING:
    from collections.abc import Iterable


@app.command()
@takes_model_options
def encode(
    model: ModelArgument,
    out: Annotated[Path, typer.Argument(help="Index folder; an encoding that was begun there goes on.")],
    options: ModelOptions,
    collection: CollectionOption = "atlas",
    vectors: Annotated[IndexDType, typer.Option(help="How vectors are stored; --dtype is the model's.")] = "float16",
    instruction: Annotated[str, typer.Option(help="Follows each document; a search of the index names it too.")] = "",
    untrained: Untrained = False,
) -> None:
    """Encode a collection of any size into an index folder; after a kill, the same command goes on."""
    from ..retrieval.encode import encode_corpus

    encoder = load_encoder(model, options, untrained)
    with console.bar("documents") as bar:

        def start(total: int, done: int) -> None:
            if done:
                console.say(f"{done:,} of {total:,} documents are encoded already")
            bar.begin(total, done)

        documents = _documents(collection)
        index = encode_corpus(
            *(encoder, documents, out), instruction=instruction, dtype=vectors, on_start=start, progress=bar.advance
        )
    speed = f"; {bar.speed}" if bar.texts else ""
    console.say(f"{out}: {len(index):,} vectors of size {index.dimension} as {index.dtype}{speed}")


@app.command()
@takes_model_options
def export(
    model: ModelArgument,
    out: NewFolder,
    options: ModelOptions,
    weights: Annotated[WeightDType | None, typer.Option(help="How weights are stored; by default as --dtype.")] = None,
) -> None:
    """Write the direct mode of a model for sentence-transformers."""
    from ..model.export import export_sentence_transformers

    check_new(out)
    export_sentence_transformers(load_encoder(model, options).backbone, out, weights)
    console.say(f"{out}: load it with SentenceTransformer({str(out)!r})")


@app.command()
@takes_model_options
def search(
    model: ModelArgument,
    options: ModelOptions,
    query: Annotated[str | None, typer.Argument(help="The query; without it, a prompt to type queries at.")] = None,
    collection: CollectionOption = "atlas",
    mode: Annotated[ModeName, typer.Option(help="Reason first, or embed at once.")] = ModeName.reason,
    k: Annotated[int, typer.Option("-k", min=1, help="Documents to show.")] = 5,
    index: Annotated[Path | None, typer.Option(help="The collection as `encode` wrote it; else it is encoded.")] = None,
    instruction: Annotated[str, typer.Option(help="Follows each query, e.g. `Find a passage that answers it.`")] = "",
    document_instruction: DocumentInstruction = "",
    untrained: Untrained = False,
) -> None:
    """Search a collection: shows the reasoning as it is written, the ranked documents and their scores."""
    from ..data.load import load_collection
    from ..errors import DataError
    from ..evaluation.search import Searcher
    from ..evaluation.systems import index_documents
    from ..retrieval.encode import load_corpus

    if query is not None and not query.strip():
        raise DataError("the query is empty; give a text with at least one visible character")
    data = load_collection(collection)
    encoder = load_encoder(model, options, untrained)
    if index is None:
        with console.bar("documents", len(data.documents)) as bar:
            encoded = index_documents(encoder, data, instruction=document_instruction, progress=bar.advance)
    else:
        encoded = load_corpus(encoder, data.texts().items(), index, instruction=document_instruction)
    searcher = Searcher(encoder, data, encoded, instruction)
    if query is not None:
        console.show_answer(searcher.stream(query, mode.value, k))
        return
    console.say(f"{len(data.documents)} documents, mode {mode.value}. Type a query; an empty line ends.")
    while text := console.ask():
        console.show_answer(searcher.stream(text, mode.value, k))


def _documents(collection: str) -> Iterable[tuple[str, str]]:
    """Doc_ids and texts; those of a folder in the BEIR layout are read as they are needed."""
    from ..data.collection import CorpusFile
    from ..data.load import load_collection

    path = Path(collection) / "corpus.jsonl"
    return CorpusFile(path) if path.is_file() else load_collection(collection).texts().items()
