"""Commands that make test collections."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from .. import console
from .common import NewFolder, check_new, data_app


class BuiltIn(StrEnum):
    """Collections that are built here."""

    atlas = "atlas"
    atlas_wide = "atlas-wide"
    stdlib = "stdlib"


@data_app.command("build")
def data_build(
    name: Annotated[BuiltIn, typer.Argument(help="Which collection.")],
    out: NewFolder,
    seed: Annotated[int, typer.Option(help="Seed of the splits.")] = 0,
) -> None:
    """Build a collection into a folder in the BEIR layout."""
    from ..data.load import BUILDERS

    check_new(out)
    collection = BUILDERS[name.value](seed)
    collection.save(out)
    console.say(f"{out}: {len(collection.documents)} documents, {len(collection.queries)} queries")


@data_app.command("synthesize")
def data_synthesize(
    articles: Annotated[
        str, typer.Argument(help="JSONL file, folder with corpus.jsonl, or hub id (wikimedia/wikipedia:20231101.en).")
    ],
    out: Annotated[Path, typer.Argument(help="Folder to write; a stopped call goes on with the same command.")],
    endpoint: Annotated[str, typer.Option(help="OpenAI-compatible address, usually ending in /v1.")],
    model: Annotated[str, typer.Option(help="The model's name there.")],
    limit: Annotated[int | None, typer.Option(min=1, help="Size of a random sample of the articles.")] = None,
    queries: Annotated[int, typer.Option(min=1, help="Queries for each article.")] = 1,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests under way at once.")] = 8,
    max_tokens: Annotated[int, typer.Option(min=1, help="Length of a reply; more for models that reason.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="Of the sampling.")] = 0.7,
    seed: Annotated[int, typer.Option(min=0, help="Of the sample, of the replies and of the splits.")] = 0,
    api_key_variable: Annotated[str, typer.Option(help="Environment variable that holds the key.")] = "OPENAI_API_KEY",
) -> None:
    """Have a language model write queries for articles: the paper's synthetic Wikipedia set, rebuilt.

    Example: search-r3 data synthesize articles.jsonl my-set --endpoint http://localhost:8000/v1 --model Qwen/Qwen3-32B
    """
    from ..data.load import load_articles
    from ..data.writing.synthetic import synthesize

    found = load_articles(articles, limit, seed)
    with console.bar("articles", len(found)) as bar:
        done = 0

        def advance(finished: int, total: int) -> None:
            nonlocal done
            bar.advance(finished - done, 0)
            done = finished

        report = synthesize(
            found,
            out,
            endpoint=endpoint,
            model=model,
            api_key=os.environ.get(api_key_variable),
            queries_per_article=queries,
            concurrency=concurrency,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
            progress=advance,
        )
    console.say(f"{out}: {report.articles} documents, {report.queries} queries")
    for reason, count in report.failed.items():
        console.say(f"{count} articles without a query: {reason}")
    console.say(
        f"tokens: {report.prompt_tokens:,} read, {report.completion_tokens:,} written; {report.requests} requests"
    )
