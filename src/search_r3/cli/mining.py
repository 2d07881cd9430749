"""Commands that give the queries of a collection hard negatives and reasoning traces."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from .. import console
from ..errors import ConfigError
from .common import (
    ManyValues,
    ModelOptions,
    ModeName,
    NewFolder,
    check_new,
    data_app,
    hush,
    load_encoder,
    say_left_out,
    takes_model_options,
)

if TYPE_CHECKING:
    from ..data.collection import Collection
    from ..data.writing.asking import Standing
    from ..data.writing.written import Writer, WrittenReport
    from ..mining.candidates import Judge, Retriever
    from ..mining.mining import MiningReport
    from ..types import Array

Source = Annotated[str, typer.Argument(help="`atlas`, `atlas-wide`, `stdlib`, a folder, or a hub id.")]
Out = Annotated[Path, typer.Argument(help="Folder to write; a stopped call goes on with the same command.")]
Splits = Annotated[
    list[str] | None, typer.Option("--splits", help="Splits whose queries are meant; `train` by default.")
]
With = Annotated[
    list[str],
    typer.Option(
        "--with", help="What proposes candidates: `bm25`, `bm25-unstemmed`, `sentence-transformers:NAME`, a model."
    ),
]

Endpoint = Annotated[str, typer.Option(help="OpenAI-compatible address, usually ending in /v1.")]
ModelName = Annotated[str, typer.Option(help="The model's name there.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Size of a random sample of the queries or articles.")]
Concurrency = Annotated[int, typer.Option(min=1, help="Requests under way at once.")]
MaxTokens = Annotated[int, typer.Option(min=1, help="Length of a reply; more for models that reason.")]
Temperature = Annotated[float, typer.Option(min=0, help="Of the sampling.")]
Seed = Annotated[int, typer.Option(min=0, help="Of what is drawn, and of the replies.")]
PriceIn = Annotated[float | None, typer.Option(help="Price of a million tokens read.")]
PriceOut = Annotated[float | None, typer.Option(help="Price of a million tokens written.")]
KeyVariable = Annotated[str, typer.Option(help="Environment variable that holds the key.")]


@data_app.command("mine", cls=ManyValues)
@takes_model_options
def data_mine(
    collection: Source,
    out: NewFolder,
    with_: With,
    options: ModelOptions,
    splits: Splits = None,
    cross_encoder: Annotated[
        str | None, typer.Option(help="Directory or hub id of a cross-encoder that scores them.")
    ] = None,
    per_query: Annotated[int, typer.Option(min=1, help="Negatives for each query.")] = 4,
    depth: Annotated[int, typer.Option(min=1, help="Candidates of each retriever.")] = 50,
    skip: Annotated[int, typer.Option(min=0, help="Best-ranked candidates of each that are left out.")] = 0,
    max_share: Annotated[
        float, typer.Option(help="Highest share of the positive's score that a negative may have.")
    ] = 0.95,
    margin: Annotated[float | None, typer.Option(min=0, help="Least distance from the positive's score, too.")] = None,
    unfiltered: Annotated[bool, typer.Option("--unfiltered", help="No limit on the scores of negatives.")] = False,
    sampling: Annotated[Literal["top", "random"], typer.Option(help="Take the highest scores, or draw.")] = "top",
    drop_old: Annotated[bool, typer.Option("--replace", help="Drop the negatives that queries have already.")] = False,
    mode: Annotated[ModeName, typer.Option(help="How a Search-R3 model encodes queries.")] = ModeName.direct,
    seed: Seed = 0,
    cache: Annotated[Path | None, typer.Option(help="Folder for vectors and scores; OUT.cache by default.")] = None,
) -> None:
    """Mine hard negatives, without the false ones; after a kill, the same command goes on.

    The scores are those of the cross-encoder, else of the first model, else of BM25.

    Example: search-r3 data mine my-set mined --with bm25 sentence-transformers:sentence-transformers/all-MiniLM-L6-v2
    """
    from ..data.load import load_collection
    from ..mining.mining import MiningSettings, mine_negatives

    check_new(out)
    settings = MiningSettings(
        per_query=per_query,
        depth=depth,
        skip=skip,
        max_share=None if unfiltered else max_share,
        margin=None if unfiltered else margin,
        sampling=sampling,
        seed=seed,
        keep=not drop_old,
    )
    data = load_collection(collection, skip_empty_documents=True)
    say_left_out(data)
    retrievers = {name: _retriever(name, mode, options, data) for name in with_}
    judge = _judge(cross_encoder, retrievers)
    cache = cache or out.parent / f"{out.name}.cache"
    with console.watching() as watch:
        report = mine_negatives(
            data,
            out,
            [*retrievers.values()],
            cache=cache,
            splits=splits or ["train"],
            judge=judge,
            settings=settings,
            watch=watch,
        )
    _show_mined(report, out)


@data_app.command("triples", cls=ManyValues)
def data_triples(
    collection: Annotated[str, typer.Argument(help="A collection with positives; with --articles, articles.")],
    out: Out,
    endpoint: Endpoint,
    model: ModelName,
    articles: Annotated[
        bool, typer.Option("--articles", help="Write queries, too: a JSONL file, a folder or a hub id of articles.")
    ] = False,
    splits: Splits = None,
    per_query: Annotated[
        int, typer.Option(min=0, help="Hard negatives for each query; 0 with --articles: queries alone.")
    ] = 1,
    per_article: Annotated[int, typer.Option(min=1, help="Queries for each article; several with --per-query 0.")] = 1,
    limit: Limit = None,
    concurrency: Concurrency = 8,
    max_tokens: MaxTokens = 1024,
    temperature: Temperature = 0.7,
    seed: Seed = 0,
    price_in: PriceIn = None,
    price_out: PriceOut = None,
    api_key_variable: KeyVariable = "OPENAI_API_KEY",
) -> None:
    """Have a language model write hard negatives for queries, or queries with or without them for articles.

    Example: search-r3 data triples my-set written --endpoint http://localhost:8000/v1 --model Qwen/Qwen3-32B
    """
    from ..data.load import load_articles, load_collection
    from ..data.writing.written import write_negatives, write_triples

    names = splits or ["train"]
    writer = _writer(endpoint, model, api_key_variable, concurrency, max_tokens, temperature, seed, price_in, price_out)
    _check_apart(collection, out)
    if articles:
        if len(names) > 1:
            raise ConfigError(f"--splits names {', '.join(names)}; queries that are written go into one split")
        documents = load_articles(collection, limit, seed)
        with _cost_bar("articles", writer) as writer:
            report = write_triples(
                documents, out, writer, splits={names[0]: 1.0}, per_query=per_query, per_article=per_article
            )
    elif per_article > 1:
        raise ConfigError(f"--per-article {per_article} goes with --articles; the queries of a collection are there")
    else:
        data = load_collection(collection)
        with _cost_bar("queries", replace(writer, limit=limit)) as writer:
            report = write_negatives(data, out, writer, splits=names, per_query=per_query)
    negatives = f"{report.passages:,} hard negatives for " if per_query else ""
    console.say(f"{out}: {negatives}{report.queries:,} queries")
    _show_report(report)


@data_app.command("traces", cls=ManyValues)
def data_traces(
    collection: Source,
    out: Out,
    endpoint: Endpoint,
    model: ModelName,
    splits: Splits = None,
    style: Annotated[str, typer.Option(help="Name of the traces; see sft.reasoning_styles.")] = "written",
    max_words: Annotated[int, typer.Option(min=1, help="Length of a trace, at most.")] = 120,
    limit: Limit = None,
    concurrency: Concurrency = 8,
    max_tokens: MaxTokens = 1024,
    temperature: Temperature = 0.7,
    seed: Seed = 0,
    price_in: PriceIn = None,
    price_out: PriceOut = None,
    api_key_variable: KeyVariable = "OPENAI_API_KEY",
) -> None:
    """Have a language model write the reasoning that leads from queries to their documents.

    Example: search-r3 data traces my-set traced --endpoint http://localhost:8000/v1 --model Qwen/Qwen3-32B
    """
    from ..data.load import load_collection
    from ..data.writing.written import write_traces

    writer = _writer(endpoint, model, api_key_variable, concurrency, max_tokens, temperature, seed, price_in, price_out)
    _check_apart(collection, out)
    data = load_collection(collection)
    with _cost_bar("queries", replace(writer, limit=limit)) as writer:
        report = write_traces(data, out, writer, splits=splits or ["train"], style=style, max_words=max_words)
    console.say(f"{out}: {report.written:,} reasoning traces")
    _show_report(report)


def _retriever(name: str, mode: ModeName, options: ModelOptions, data: Collection) -> Retriever:
    from ..evaluation.baselines import BM25_NAME, SENTENCE_TRANSFORMERS, UNSTEMMED, PeerModel
    from ..mining.candidates import DenseRetriever, LexicalRetriever
    from ..retrieval.encoding.identity import Peer

    if name in (BM25_NAME, UNSTEMMED):
        return LexicalRetriever(stemmed=name == BM25_NAME)
    if name.startswith(SENTENCE_TRANSFORMERS):
        hush()
        dense = PeerModel(name.removeprefix(SENTENCE_TRANSFORMERS), device=options.device, dtype=options.dtype)
        peer = Peer(dense.source, dense.settings, dense.encode)
        return DenseRetriever(peer, peer.encode_query, {**peer.origin, "revision": dense.revision})
    model = load_encoder(name, options)
    key = {
        "model": model.backbone.source,
        "revision": model.backbone.revision,
        "settings": model.backbone.settings.model_dump(mode="json"),
        "precision": model.backbone.dtype,
        "mode": mode.value,
    }
    queries = {query.text: query for query in data.queries.values()}

    def encode(texts: Sequence[str]) -> Array:
        """Apart, so that a long query loses its end and not its instruction."""
        bare, instructions = ([getattr(queries[text], part) for text in texts] for part in ("bare", "instruction"))
        return model.encode_query(bare, mode.value, instruction=instructions).vectors

    return DenseRetriever(model, encode, key)


def _judge(cross_encoder: str | None, retrievers: dict[str, Retriever]) -> Judge:
    from ..evaluation.baselines import BM25_NAME, UNSTEMMED
    from ..mining.candidates import CrossEncoderJudge

    if cross_encoder:
        return CrossEncoderJudge(cross_encoder)
    dense = (one for name, one in retrievers.items() if name not in (BM25_NAME, UNSTEMMED))
    return next(dense, next(iter(retrievers.values())))


def _show_mined(report: MiningReport, out: Path) -> None:
    dropped = ", ".join(f"{name} {number:,}" for name, number in report.dropped.items())
    console.say(f"{out}: {report.mined:,} hard negatives for {report.queries:,} queries")
    console.say(f"candidates: {report.candidates:,}; dropped: {dropped or 'none'}; left: {report.usable:,}")
    if report.listed:
        stay = report.listed - report.listed_dropped
        console.say(f"negatives that queries had: {report.listed:,}, of which {stay:,} stay")
    if report.fewer:
        console.say(
            f"{report.fewer:,} queries have fewer than {report.settings['per_query']}, {report.none:,} of them none"
        )


def _writer(
    endpoint: str,
    model: str,
    api_key_variable: str,
    concurrency: int,
    max_tokens: int,
    temperature: float,
    seed: int,
    price_in: float | None,
    price_out: float | None,
) -> Writer:
    from ..data.writing.asking import Prices
    from ..data.writing.written import Writer

    if (price_in is None) != (price_out is None):
        raise ConfigError("the cost needs both prices; give --price-in and --price-out (0 where nothing is paid)")
    return Writer(
        endpoint,
        model,
        os.environ.get(api_key_variable),
        concurrency,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        prices=None if price_in is None or price_out is None else Prices(price_in, price_out),
    )


def _check_apart(collection: str, out: Path) -> None:
    """Refuse to write over what is read: the next call could not go on from it."""
    if Path(collection).exists() and Path(collection).resolve() in (out.resolve(), (out / "corpus.jsonl").resolve()):
        raise ConfigError(f"{out} is what is read; choose another folder to write")


@contextmanager
def _cost_bar(what: str, writer: Writer) -> Iterator[Writer]:
    """The writer with a bar that shows its cost."""
    position = 0
    with console.bar(what) as bar:

        def start(whole: Standing) -> None:
            nonlocal position
            position = whole.done
            tokens = f"{whole.prompt_tokens:,} tokens read, {whole.completion_tokens:,} written"
            how = "by the mean so far" if whole.measured else "one reply each, as long as --max-tokens lets it"
            cost = "" if whole.cost is None else f"; cost {whole.cost:,.2f}"
            pending = whole.total - whole.done
            console.say(f"{pending:,} of {whole.total:,} {what} to ask about; in all {tokens}{cost} ({how})")
            bar.begin(whole.total, position)

        def advance(standing: Standing) -> None:
            nonlocal position
            note = "" if standing.cost is None else f", cost {standing.cost:,.2f}"
            bar.advance(standing.done - position, 0, note)
            position = standing.done

        yield replace(writer, on_start=start, progress=advance)


def _show_report(report: WrittenReport) -> None:
    for reason, number in report.failed.items():
        words = report.words.get(reason)
        console.say(f"{number:,} without: {reason}{f' ({words})' if words else ''}")
    cost = "; --price-in and --price-out show the cost" if report.cost is None else f"; cost {report.cost:,.2f}"
    tokens = f"{report.prompt_tokens:,} read, {report.completion_tokens:,} written"
    console.say(f"tokens: {tokens}; {report.requests:,} requests{cost}")
    if report.uncounted:
        console.say(f"the endpoint did not count the tokens of {report.uncounted:,}; they are not in the sum")
