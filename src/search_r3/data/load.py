"""A collection by its name: built in, in a folder, or on the Hugging Face hub."""

from __future__ import annotations

import difflib
import os
import random
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from ..errors import DataError
from ..extras import extra
from ..files import must_be_path
from .collection import Collection, Document, iter_documents
from .generators.atlas import BUILT_IN
from .hub import load_hub
from .tables import Repository, is_hub_folder


def _stdlib(seed: int = 0) -> Collection:
    from .generators.stdlib import build_stdlib

    return build_stdlib(seed)


BUILDERS: Mapping[str, Callable[..., Collection]] = {**BUILT_IN, "stdlib": _stdlib}
"""What builds the collections that need no files; each takes the seed of its splits."""
NAME = re.compile(r"(?P<source>[^@]*?)(:(?P<subset>[^@:]+))?(@(?P<revision>[^@]+))?")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def load_collection(name: str, *, skip_empty_documents: bool = False, mapped: bool = False) -> Collection:
    """Load a collection.

    Args:
        name: a built-in collection (`atlas`, `atlas-wide`, `stdlib`; `atlas:SEED` divides its queries by another
            seed than 0), a folder in the BEIR layout or in the hub's format, or a data set of the hub: `owner/name`,
            `owner/name:subset`, `owner/name@revision` or `owner/name:subset@revision`. A folder in the hub's format
            may be followed by `:subset` too.
        skip_empty_documents: as in `Collection.load`.
        mapped: the same; what is no folder in the BEIR layout is in memory in any case.

    Raises:
        DataError: the name is none of these, or what it names cannot be read (see `Collection.load`, `load_hub`).
    """
    if (built_in := parse_built_in(name)) is not None:
        builder, seed = built_in
        return BUILDERS[builder](seed)
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "corpus.jsonl").is_file() and not is_hub_folder(folder):
            raise DataError(
                f"{folder} is no collection: expected corpus.jsonl, queries.jsonl and qrels/*.tsv (BEIR), or a "
                "README.md with configs, or the sub-folders corpus, queries and qrels (the hub's format). Documents "
                "alone are searched and encoded with --documents"
            )
        if _is_beir(folder):
            return Collection.load(folder, skip_empty_documents=skip_empty_documents, mapped=mapped)
        return load_hub(name, skip_empty_documents=skip_empty_documents)
    if (parts := split_name(name)) is None:
        raise _unknown(name)
    source, subset, revision = parts
    return load_hub(source, revision=revision, skip_empty_documents=skip_empty_documents, subset=subset)


def split_name(name: str) -> tuple[str, str | None, str | None] | None:
    """Source, subset and revision of `SOURCE:SUBSET@REVISION`; None where the source is neither a folder nor a hub id.

    Example:
        >>> split_name("wikimedia/wikipedia:20231101.en")
        ('wikimedia/wikipedia', '20231101.en', None)
    """
    match = NAME.fullmatch(name)
    if match is None:
        return None
    # A Path raises where a name is too long for one.
    if not os.path.isdir(match["source"]):  # noqa: PTH112
        local = match["revision"] is None and must_be_path(match["source"])
        if local or not HUB_ID.fullmatch(match["source"]):
            return None
    return match["source"], match["subset"], match["revision"]


def parse_built_in(name: str) -> tuple[str, int] | None:
    """The builder and the seed that `atlas` or `atlas:SEED` names; None for what is not built in.

    Raises:
        DataError: the seed is no whole number from 0 on.
    """
    builder, colon, seed = name.partition(":")
    if builder not in BUILDERS:
        return None
    if colon and not (seed.isascii() and seed.isdigit()):
        raise DataError(f"cannot read the seed of {name!r}: expected {builder}:SEED with a whole number from 0 on")
    return builder, int(seed or 0)


def load_articles(source: str, limit: int | None = None, seed: int = 0) -> dict[str, Document]:
    """Documents to write queries for: all of them, or a random sample.

    Args:
        source: a JSONL file (`_id`, `title`, `text`), a folder with a `corpus.jsonl`, or a data set of the hub with the
            columns `id` (or `_id`), `title` and `text`, e.g. `wikimedia/wikipedia:20231101.en`. Of the hub only as
            much is read as the sample needs, so it is drawn from the first articles alone.
        limit: size of the sample.
        seed: of the sample.

    Returns:
        doc_id -> document.

    Raises:
        DataError: there is no such source, it cannot be read, or it has no article with text.
    """
    path = Path(source)
    if path.is_file() or path.is_dir():
        articles = {one.doc_id: one for one in iter_documents(path / "corpus.jsonl" if path.is_dir() else path, set())}
        if limit is not None and limit < len(articles):
            articles = {doc_id: articles[doc_id] for doc_id in random.Random(seed).sample(sorted(articles), limit)}
    elif parts := split_name(source):
        articles = _stream_articles(*parts, limit, seed)
    else:
        raise DataError(f"no articles at {source}: expected a JSONL file, a folder with corpus.jsonl, or a hub id")
    if not articles:
        raise DataError(f"{source}: no article with text")
    return articles


def _stream_articles(
    source: str, subset: str | None, revision: str | None, limit: int | None, seed: int
) -> dict[str, Document]:
    with extra("train"):
        from datasets import load_dataset

    articles: dict[str, Document] = {}
    with Repository(source, revision, "").errors_at(source):
        rows = load_dataset(source, subset, split="train", revision=revision, streaming=True)
        if limit is not None:
            rows = rows.shuffle(seed=seed, buffer_size=10 * limit).take(limit)
        for row in rows:
            doc_id = str(row["_id"] if "_id" in row else row["id"])
            if row["text"].strip():
                articles[doc_id] = Document(doc_id, row["text"], row.get("title") or "")
    return articles


def _is_beir(folder: Path) -> bool:
    """Whether a folder is to be read in the BEIR layout; an incomplete one is, for the error that says what lacks."""
    complete = (folder / "corpus.jsonl").is_file() and any((folder / "qrels").glob("*.tsv"))
    return complete or not is_hub_folder(folder)


def _unknown(name: str) -> DataError:
    if any(sign in name for sign in "/\\~") or name.startswith("."):
        return DataError(f"no collection at {name}: the folder does not exist")
    near = difflib.get_close_matches(name, BUILDERS, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    return DataError(
        f"no collection {name!r}{hint} expected one that is built in "
        f"({', '.join(sorted(BUILDERS))}; NAME:SEED), a folder, or a data set of the hub as owner/name, "
        "owner/name:subset, owner/name@revision or owner/name:subset@revision"
    )
