"""Commands that encode and search."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from .. import console
from ..errors import ConfigError
from .common import (
    DEFAULT_COLLECTION,
    CollectionOption,
    DocumentInstruction,
    IndexDType,
    ModelArgument,
    ModelOptions,
    ModeName,
    Untrained,
    WeightDType,
    app,
    check_new,
    load_encoder,
    mode_of,
    say_without_text,
    takes_model_options,
)
from .documents import ChunkOverlap, ChunkTokens, ColumnOption, DocumentsOption, cut_for, own_documents
from .store import AskedArgument, Hybrid, OtherModel, Where, is_store, searcher_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from ..data.collection import Document
    from ..evaluation.search import Searcher
    from ..model.encoder import SearchR3
    from ..retrieval.approximate import ApproximateIndex
    from ..retrieval.encoding.shards import Shard
    from ..retrieval.encoding.workers import RayWorkers
    from ..retrieval.index import ExactIndex


ShardOption = Annotated[
    str | None,
    typer.Option("--shard", metavar="I/N", help="Encode the I-th of N parts; when all are there, they are one index."),
]
RayOption = Annotated[
    bool,
    typer.Option("--ray", help="Encode by the actors of a Ray cluster, which sees the model and the index folder."),
]
RayAddress = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        help="Of --ray: `auto`, HOST:PORT, or `local`, which starts one here; by default what RAY_ADDRESS says, else "
        "`local`.",
    ),
]
RayActors = Annotated[
    int | None, typer.Option(min=1, help="Of --ray; by default one for each GPU, or for each machine without any.")
]
IndexTypeOption = Annotated[
    Literal["auto", "exact", "hnsw"] | None,
    typer.Option(
        help="How it is searched: exactly (by default), by a graph (its recall is shown), or `auto`: a graph from "
        "100,000 documents on. Nothing is encoded again for another one."
    ),
]
BlockSize = Annotated[
    int | None,
    typer.Option(min=1, help="Documents that a kill may cost; 1,024 on a CPU, else 16,384. The same for all shards."),
]


def _check_place(out: Path, sources: Iterable[str]) -> None:
    """Refuse a folder for an index that is a store, or that documents are read from."""
    if is_store(os.fspath(out)):
        raise ConfigError(f"{out} is a store; name another folder for the index")
    for source in filter(os.path.isdir, sources):
        if out.resolve().is_relative_to(Path(source).resolve()):
            raise ConfigError(f"{out} lies in {source}, whose files are read as documents; name a folder outside")


@app.command()
@takes_model_options
def encode(
    model: ModelArgument,
    out: Annotated[Path, typer.Argument(help="Index folder; an encoding that was begun there goes on.")],
    options: ModelOptions,
    collection: CollectionOption = None,
    vectors: Annotated[IndexDType, typer.Option(help="How vectors are stored; --dtype is the model's.")] = "float16",
    document_instruction: DocumentInstruction = "",
    documents: DocumentsOption = None,
    column: ColumnOption = None,
    chunk_tokens: ChunkTokens = None,
    chunk_overlap: ChunkOverlap = 0,
    untrained: Untrained = False,
    shard: ShardOption = None,
    ray: RayOption = False,
    ray_address: RayAddress = None,
    ray_actors: RayActors = None,
    index_type: IndexTypeOption = None,
    block_size: BlockSize = None,
) -> None:
    """Encode documents of any number into an index folder; after a kill, the same command goes on.

    Example: search-r3 encode MODEL INDEX -c COLLECTION --shard 1/4   (and 2/4, 3/4, 4/4, on as many machines)
    """
    from ..retrieval.encode import encode_corpus
    from ..retrieval.encoding.shards import Shard
    from ..retrieval.kinds import set_index_type

    part = Shard.parse(shard) if shard is not None else None
    workers = _workers(model, options, ray_address, ray_actors) if ray else None
    if workers is None and not (ray_address is None and ray_actors is None):
        raise ConfigError("--ray-address and --ray-actors are for --ray; add it")
    own = own_documents(documents, column, collection) if documents else None
    _check_place(out, [] if own is None else own.sources)
    encoder = load_encoder(model, options, untrained)
    if own is not None:
        cut_for(encoder, own, chunk_tokens, chunk_overlap, document_instruction)
    texts, without_text = _texts(collection or DEFAULT_COLLECTION) if own is None else (own.texts(), int)
    what = "documents" if own is None else "chunks"
    with console.bar(what) as bar:

        def start(total: int, done: int) -> None:
            if own is not None:
                console.say(own.report.summary)
            say_without_text(without_text())
            if done:
                console.say(f"{done:,} of {total:,} {what} are encoded already")
            bar.begin(total, done)

        index = encode_corpus(
            *(encoder, texts, out),
            instruction=document_instruction,
            dtype=vectors,
            shard=part,
            workers=workers,
            block_size=block_size,
            on_start=start,
            progress=bar.advance,
        )
    if _say_encoded(out, index, part, f"; {bar.speed}" if bar.texts else "") and index_type is not None:
        _say_recall(set_index_type(out, index_type))


def _say_encoded(out: Path, index: ExactIndex, part: Shard | None, speed: str) -> bool:
    """Say what is in the folder; whether it is an index of all documents."""
    from ..retrieval.encoding.shards import shards_in

    place, whole = "", True
    if part is not None and (finished := sum(shards_in(out).values())):
        whole = finished == part.of
        place = f"{finished} of {part.of} shards; in {part.number}/{part.of}: "
        place = f"all {part.of} shards, " if whole else place
    console.say(f"{out}: {place}{len(index):,} vectors of size {index.dimension} as {index.dtype}{speed}")
    return whole


def _say_recall(index: ExactIndex | ApproximateIndex) -> None:
    """Say how a graph searches, if one does."""
    recall = getattr(index, "last_recall", None)
    if recall is not None:
        console.aside(f"searched by a graph (hnsw): recall@10 {recall:.3f} against exact search, by its own documents")


def _workers(model: str, options: ModelOptions, address: str | None, actors: int | None) -> RayWorkers:
    """The actors that are asked for, each with this model."""
    from ..model.encoder import SearchR3
    from ..retrieval.encoding.workers import RayWorkers

    source = str(Path(model).resolve()) if Path(model).exists() else model
    return RayWorkers(partial(SearchR3, source, **options.loading()), address, actors)


@app.command()
@takes_model_options
def export(
    model: ModelArgument,
    out: Annotated[Path, typer.Argument(help="Folder to write, or file with --gguf; it must not exist.")],
    options: ModelOptions,
    weights: Annotated[WeightDType | None, typer.Option(help="How weights are stored; by default as --dtype.")] = None,
    gguf: Annotated[bool, typer.Option("--gguf", help="Write a GGUF file, for llama.cpp: both modes.")] = False,
    gguf_type: Annotated[
        Literal["f32", "f16", "bf16", "q8_0"] | None,
        typer.Option("--type", help="How a GGUF file stores matrices; f16 by default, q8_0 is half of it."),
    ] = None,
) -> None:
    """Write the direct mode of a model for sentence-transformers, or all of it for llama.cpp (--gguf)."""
    check_new(out)
    if gguf:
        if weights is not None:
            raise ConfigError("--weights is for sentence-transformers; say --type of a GGUF file")
        from ..model.llamacpp.writing import export_gguf

        files = export_gguf(load_encoder(model, options).backbone, out, gguf_type or "f16")
        beside = f" (and {files[1].name}, for queries)" if len(files) > 1 else ""
        console.say(f"{out}{beside}: search-r3 search {out} --backend llama.cpp, or SearchR3({str(out)!r})")
        return
    if gguf_type is not None:
        raise ConfigError("--type is for a GGUF file; add --gguf, or say --weights")
    from ..model.export import export_sentence_transformers

    export_sentence_transformers(load_encoder(model, options).backbone, out, weights)
    console.say(f"{out}: load it with SentenceTransformer({str(out)!r})")


@app.command()
@takes_model_options
def search(
    model: AskedArgument,
    options: ModelOptions,
    query: Annotated[str | None, typer.Argument(help="The query; without it, a prompt to type queries at.")] = None,
    collection: CollectionOption = None,
    mode: Annotated[
        ModeName | None,
        typer.Option(
            help="Reason first, in words or in soft tokens, embed at once, or let the gate say; by default the model's."
        ),
    ] = None,
    k: Annotated[int, typer.Option("--top", "-k", min=1, help="Documents to show.")] = 5,
    index: Annotated[
        Path | None, typer.Option(help="The documents as `encode` wrote them; else they are encoded.")
    ] = None,
    instruction: Annotated[str, typer.Option(help="Follows each query, e.g. `Find a passage that answers it.`")] = "",
    document_instruction: DocumentInstruction = "",
    documents: DocumentsOption = None,
    column: ColumnOption = None,
    chunk_tokens: ChunkTokens = None,
    chunk_overlap: ChunkOverlap = 0,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON for each query, and nothing else.")] = False,
    untrained: Untrained = False,
    hybrid: Hybrid = False,
    where: Where = None,
    other_model: OtherModel = None,
) -> None:
    """Search a store, a collection or own documents: shows the reasoning while it is written, then the best hits."""
    from ..data.load import load_collection
    from ..errors import DataError
    from ..evaluation.search import Searcher

    if query is not None and not query.strip():
        raise DataError("the query is empty; give a text with at least one visible character")
    others = [collection, index, documents, column, chunk_tokens, chunk_overlap, document_instruction]
    if stored := searcher_of(model, other_model, options, instruction, hybrid, where, any(others)):
        _ask(*stored, query, mode, k, as_json)
        return
    own = own_documents(documents, column, collection) if documents else None
    searched: Mapping[str, Document] = {}
    if own is None:
        mapped = index is not None
        data = load_collection(collection or DEFAULT_COLLECTION, skip_empty_documents=True, mapped=mapped)
        searched = data.documents
        say_without_text(data.without_text)
    encoder = load_encoder(model, options, untrained)
    if own is not None:
        cut_for(encoder, own, chunk_tokens, chunk_overlap, document_instruction)
        with console.bar("reading"):
            searched = {chunk.doc_id: chunk for chunk in own}
    summary = f"{len(searched):,} documents" if own is None else own.report.summary
    encoded = _index(encoder, searched, index, document_instruction)
    if own is not None and query is not None:
        console.aside(summary)
    _ask(Searcher(encoder, searched, encoded, instruction), summary, query, mode, k, as_json)


def _ask(searcher: Searcher, summary: str, query: str | None, mode: ModeName | None, k: int, as_json: bool) -> None:
    """Answer the query, or all that are typed."""
    show = console.print_answer if as_json else console.show_answer
    name = mode_of(searcher.model, mode)
    if query is not None:
        show(searcher.stream(query, name, k))
        return
    console.aside(f"{summary}; mode {name}. Type a query; an empty line ends.")
    while text := console.ask("" if as_json else "query> "):
        show(searcher.stream(text, name, k))


def _index(
    encoder: SearchR3, documents: Mapping[str, Document], folder: Path | None, instruction: str
) -> ExactIndex | ApproximateIndex:
    """The documents as they are encoded in a folder, or are encoded here."""
    from ..data.collection import Texts
    from ..evaluation.systems import index_documents
    from ..retrieval.encode import load_corpus

    if folder is not None:
        index = load_corpus(encoder, Texts(documents), folder, instruction=instruction)
        _say_recall(index)
        return index
    with console.bar("encoding", len(documents)) as bar:
        return index_documents(encoder, documents, instruction=instruction, progress=bar.advance)


def _texts(collection: str) -> tuple[Iterable[tuple[str, str]], Callable[[], int]]:
    """Doc_ids and texts, and how many were left out; those of a folder in the BEIR layout are read as needed."""
    from ..data.collection import CorpusFile
    from ..data.load import load_collection

    path = Path(collection) / "corpus.jsonl"
    if path.is_file():
        skipped: set[str] = set()
        return CorpusFile(path, skipped), lambda: len(skipped)
    data = load_collection(collection, skip_empty_documents=True)
    return data.texts().items(), lambda: data.without_text
