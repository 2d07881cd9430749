"""Commands that keep a store of documents."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import console
from ..errors import ConfigError, DataError
from .common import (
    CollectionOption,
    ModelOptions,
    Untrained,
    app,
    load_encoder,
    say_without_text,
    takes_model_options,
)
from .documents import ChunkOverlap, ChunkTokens, ColumnOption, cut_for, own_documents

if TYPE_CHECKING:
    from ..model.encoder import SearchR3
    from ..serving import Store
    from ..serving.search import StoreSearcher

store_app = typer.Typer(no_args_is_help=True, help="Look after a store that `index` made.")
app.add_typer(store_app, name="store", rich_help_panel="Search and serve")

StoreArgument = Annotated[
    str, typer.Argument(metavar="STORE", help="Folder, or address in an object store (`s3://...`).")
]
AskedArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL|STORE", help="Model directory, GGUF file, hub id, `smol`; or a store, which knows its model."
    ),
]


def _option(help_text: str, *names: str) -> Any:
    return typer.Option(*names, help=help_text, rich_help_panel="Store")


Hybrid = Annotated[bool, _option("Fuse the ranks by words (BM25) and by vectors.", "--hybrid")]
Where = Annotated[
    list[str] | None,
    _option("Search only what fits: `parent_id=a.md`, `page>=3`, `year!=2020` (of metadata); repeat it.", "--where"),
]
OtherModel = Annotated[
    str | None, _option("Another model that encodes documents as the store's does.", "--model", "-m")
]


@app.command()
@takes_model_options
def index(
    store: StoreArgument,
    options: ModelOptions,
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            help="Folders, files, tables, data sets of the hub; PREFIX=SOURCE puts a prefix before its ids."
        ),
    ] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="For a new store; later it knows its own.")] = None,
    collection: CollectionOption = None,
    document_instruction: Annotated[str, typer.Option(help="Follows each document; for a new store.")] = "",
    column: ColumnOption = None,
    chunk_tokens: ChunkTokens = None,
    chunk_overlap: ChunkOverlap = 0,
    untrained: Untrained = False,
) -> None:
    """Encode documents into a store that can be searched; again later, only what changed, and what is gone is removed.

    Example: search-r3 index notes.store --model runs/quickstart/model ~/notes papers/*.pdf
    """
    from ..serving.indexing import index_documents, root_of

    if (collection is None) == (not sources):
        raise ConfigError("index takes folders and files, or --collection: name one of the two")
    own = own_documents(sources, column, None) if sources else None
    documents: Any = own
    if collection is not None:
        from ..data.documents import chunks_of
        from ..data.load import load_collection

        data = load_collection(collection, skip_empty_documents=True)
        say_without_text(data.without_text)
        source = f"collection {root_of(collection)}"
        each = data.documents.values()
        documents = (
            c for one in each for c in chunks_of(one.doc_id, one.text, one.title, chunking=None, source=source)
        )
    target, encoder = _open(store, model, options, untrained, document_instruction, chunk_tokens, chunk_overlap)
    if own is not None:
        cut_for(encoder, own, target.info.chunk_tokens, target.info.chunk_overlap, target.info.fingerprint.instruction)
    started = time.perf_counter()
    with console.bar("chunks") as bar:
        report = index_documents(
            *(target, encoder, documents),
            sources=[source] if own is None else own.sources,
            progress=lambda chunks, tokens: bar.advance(
                chunks, tokens, f"; {own.report.documents:,} documents read" if own else ""
            ),
        )
    if own is not None:
        for line in own.report.lines():
            console.say(f"not read: {line}")
    rate = report.documents / (time.perf_counter() - started)
    console.say(f"{store}: {report.summary}; {rate:,.1f} documents/s" + f", chunks {bar.speed}" * (bar.texts > 0))


def open_with_model(address: str, model: str | None, options: ModelOptions) -> tuple[Store, SearchR3]:
    """A store and its model, or another one that encodes documents as that does."""
    from ..serving.search import open_with_model

    return open_with_model(
        *(address, model, lambda name, **settings: load_encoder(name, replace(options, **settings))),
        max_length=options.max_length,
        prompts=options.prompts,
        revision=options.revision,
    )


def is_store(address: str) -> bool:
    """Whether there is a store to ask, rather than a model.

    Raises:
        StoreError: it is called one, and nothing is there.
    """
    from ..serving import Store
    from ..serving.database import exists

    found = exists(address)
    if not found and address.endswith(".store") and not Path(address).exists():
        Store.open(address)  # an error that says how to make one
    return found


def searcher_of(
    address: str,
    model: str | None,
    options: ModelOptions,
    instruction: str,
    hybrid: bool,
    where: list[str] | None,
    has_others: bool,
) -> tuple[StoreSearcher, str] | None:
    """What searches a store, and what is in it; None where there is no store.

    Raises:
        ConfigError: options that are for a store only, or that are for none.
    """
    from ..serving import Store
    from ..serving.filters import parse
    from ..serving.search import StoreSearcher

    if not is_store(address):
        if hybrid or where or model:
            raise ConfigError(f"{address} is no store, and --hybrid, --where and --model are for one (search-r3 index)")
        return None
    if has_others:
        raise ConfigError(f"{address} is a store and holds its documents; leave out what names or encodes others")
    condition = parse(where or ())
    Store.open(address).check_filter(condition)  # before a model is loaded
    store, encoder = open_with_model(address, model, options)
    searcher = StoreSearcher(encoder, store, instruction, hybrid=hybrid, where=condition)
    return searcher, f"{len(store):,} chunks"


def _open(
    address: str,
    model: str | None,
    options: ModelOptions,
    untrained: bool,
    instruction: str,
    chunk_tokens: int | None,
    chunk_overlap: int,
) -> tuple[Store, SearchR3]:
    """The store, a new one where there is none, and the model."""
    from ..model.documents import document_chunking
    from ..serving import Fingerprint, Store
    from ..serving.database import exists

    if exists(address):
        store, encoder = open_with_model(address, model, options)
        info = store.info
        settings = {
            "--document-instruction": (instruction, info.fingerprint.instruction),
            "--chunk-tokens": (chunk_tokens, info.chunk_tokens),
            "--chunk-overlap": (chunk_overlap, info.chunk_overlap),
        }
        for name, (given, kept) in settings.items():
            if given and given != kept:
                raise ConfigError(
                    f"{name} {given}, but {address} was made with {kept!r}; leave it out, or make another"
                )
        return store, encoder
    if model is None:
        raise ConfigError(f"{address} is new: name the model that will encode its documents (--model MODEL)")
    encoder = load_encoder(model, options, untrained)
    chunking = document_chunking(encoder.backbone, chunk_tokens, overlap=chunk_overlap, instruction=instruction)
    facts: dict[str, Any] = {
        "model": os.path.abspath(model) if Path(model).exists() else model,  # noqa: PTH100 - links stay
        "revision": options.revision,
        "prompts": options.prompts,
        "chunk_tokens": chunking.max_tokens,
        "chunk_overlap": chunk_overlap,
    }
    return Store.create(address, Fingerprint.of(encoder, instruction), **facts), encoder


@store_app.command("list")
def list_documents(
    store: StoreArgument,
    top: Annotated[int, typer.Option("--top", "-n", min=0, help="Documents to show.")] = 20,
    as_json: Annotated[
        bool, typer.Option("--json", help="All documents, one line of JSON each, and nothing else.")
    ] = False,
) -> None:
    """Show what a store holds."""
    from ..serving import Store

    opened = Store.open(store)
    entries = opened.documents()
    console.show_store(opened, entries, top) if not as_json else console.print_rows(one._asdict() for one in entries)


@store_app.command()
def verify(store: StoreArgument) -> None:
    """Read all of a store and compare it with the hashes that were written with it; status 2 where it is damaged."""
    from ..errors import StoreError
    from ..serving import Store
    from ..serving.upkeep import verify as find_problems

    opened = Store.open(store)
    if problems := find_problems(opened):
        raise StoreError(f"{store}: {'; '.join(problems)}")
    console.say(f"{store}: whole; {len(opened.documents()):,} documents, {len(opened):,} chunks")


@store_app.command()
def compact(store: StoreArgument) -> None:
    """Put the files of a store together, bring all into its indexes, remove old versions."""
    from ..serving import Store

    opened = Store.open(store)
    opened.compact()
    console.show_store(opened, opened.documents(), 0)


@store_app.command()
def delete(
    store: StoreArgument,
    ids: Annotated[list[str] | None, typer.Argument(help="Ids of documents.")] = None,
    source: Annotated[
        list[str] | None, typer.Option("--source", help="All documents of a source, as `list` shows it; repeat it.")
    ] = None,
) -> None:
    """Remove documents from a store."""
    from ..serving import Store

    if not ids and not source:
        raise ConfigError("delete takes ids of documents, or --source")
    opened = Store.open(store)
    entries = opened.documents()
    roots = {name: {name, os.path.abspath(name)} for name in source or ()}  # noqa: PTH100 - links stay
    unknown = set(ids or ()) - {one.doc_id for one in entries}
    unknown |= {name for name, names in roots.items() if not names & {one.source for one in entries}}
    if unknown:
        raise DataError(f"{store} holds no {', '.join(map(repr, sorted(unknown)))}; nothing was removed")
    wanted = {one.doc_id for one in entries if any(one.source in names for names in roots.values())}
    console.say(f"{store}: {opened.delete(sorted(wanted | set(ids or ()))):,} documents removed")


@store_app.command()
def backup(
    store: StoreArgument, target: Annotated[str, typer.Argument(help="A new place; a backup is a store.")]
) -> None:
    """Copy a store, whole or not at all; the copy is verified, and can be asked as it is."""
    _copy(store, target)


@store_app.command()
def restore(
    store: Annotated[str, typer.Argument(help="A new place.")], source: Annotated[str, typer.Argument(metavar="BACKUP")]
) -> None:
    """Make a store of a backup."""
    _copy(source, store)


def _copy(source: str, target: str) -> None:
    from ..serving import Store
    from ..serving.upkeep import copy_store

    copy = copy_store(Store.open(source), target)
    console.say(f"{target}: {len(copy.documents()):,} documents, {len(copy):,} chunks, verified")
