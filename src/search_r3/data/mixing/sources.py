"""Training examples from public data sets, each read in the schema that it has on the Hugging Face hub.

One reader per schema; it reads the hub as a stream (what is not read is not downloaded) and local folders and files in
the hub's formats alike. The paper names its sources and not how it cut them: what is decided here is in docs/data.md.
"""

from __future__ import annotations

import random
import reprlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import DataError
from ...extras import extra
from ..collection import Collection
from ..load import load_collection, split_name
from ..pairs import GUESSES, is_relevant
from ..rows import string
from ..tables import Columns, Repository, Table, plain_path, quoted
from ..triples import listed_negatives, reasoning_traces
from .sources_text import answer_passage, answer_pattern, first_paragraph, first_words, without_docstring

SUFFIXES = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
"""Ending of a local file -> the builder of `datasets` that reads it."""
MOST_NEGATIVES = 100
"""So many columns `negative_1`, `negative_2`, ... are read."""


class Passage(NamedTuple):
    """A document without an id."""

    title: str
    text: str


@dataclass(frozen=True)
class SourceExample:
    """One query of a source.

    Attributes:
        query: its text, without an instruction.
        positives: the documents that answer it; a row without any is for the caller to count.
        negatives: documents that do not, hardest first where the source orders them.
        reasoning: style -> trace.
        instruction: of this query alone, where the source has it apart.
    """

    query: str
    positives: tuple[Passage, ...]
    negatives: tuple[Passage, ...] = ()
    reasoning: Mapping[str, str] = field(default_factory=dict)
    instruction: str = ""


@dataclass(frozen=True)
class SourcePlace:
    """Where a source is.

    Attributes:
        path: `owner/name`, `owner/name:config` (with `@revision`), a folder (`:config`) in the hub's format, or a
            file `*.jsonl`, `*.json`, `*.parquet`.
        split: the split that is read.
        shuffle_buffer: rows held to draw from; 0 reads in order. The hub's files are shuffled too.
        seed: of the shuffling.
    """

    path: str
    split: str = "train"
    shuffle_buffer: int = 0
    seed: int = 0

    def parts(self) -> tuple[str, str | None, str | None]:
        """Source, config and revision."""
        if Path(self.path).exists():
            return self.path, None, None
        if (parts := split_name(self.path)) is None:
            raise DataError(f"no source at {self.path}: expected owner/name, owner/name:config, a folder or a file")
        return parts


def read_examples(
    reader: str, place: SourcePlace, scratch: str, *, passage_words: int = 100
) -> Iterator[SourceExample]:
    """The examples of a source, one row at a time.

    Args:
        reader: a name of `READERS`, or `beir`.
        place: where it is.
        scratch: a folder for what lasts no longer than the reading.
        passage_words: triviaqa: words of a passage.

    Raises:
        DataError: the source cannot be read, has no such split, lacks a column, or a row has a wrong type; data set,
            config, split and row are named, and the schema that the reader expects.
    """
    if reader == "beir":
        yield from _read_collection(place)
        return
    schema, table = READERS[reader], open_table(place, scratch)
    try:
        for where, row in table.rows(schema.columns, schema.optional):
            yield schema.read(where, row, passage_words)
    except DataError as error:
        expected = f"the reader {reader!r} expects {schema.schema}"
        raise DataError(f"{error}; {expected}; mend the source or choose another reader") from error


def open_table(place: SourcePlace, scratch: str) -> Table:
    """The table of a source.

    Raises:
        DataError: there is none, or it has several configs and none was asked for, or it has no such split.
    """
    source, config, revision = place.parts()
    path = Path(source)
    if path.is_file():
        table = _file_table(path, scratch)
    else:
        repository = Repository(source, revision, scratch)
        if repository.local and revision is not None:
            raise DataError(f"{source} is a folder and has no revision {revision!r}; leave the revision out")
        tables = repository.tables(config or _only_config(repository), streaming=True)
        if place.split not in tables:
            raise DataError(f"{source}: no split {place.split!r}; it has {quoted(tables)}")
        table = tables[place.split]
    if not place.shuffle_buffer:
        return table
    where = f"{table.place}, shuffled with seed {place.seed}"
    with table.repository.errors_at(table.place):
        return replace(table, place=where, data=table.data.shuffle(seed=place.seed, buffer_size=place.shuffle_buffer))


def _file_table(path: Path, scratch: str) -> Table:
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path}: expected a file that ends in {', '.join(SUFFIXES)}, or a folder in the hub's format")
    with extra("train"):
        from datasets import load_dataset

    repository = Repository(str(path.parent), None, scratch)
    with repository.errors_at(str(path)):
        data = load_dataset(
            SUFFIXES[path.suffix],
            data_files=plain_path(path, scratch),
            split="train",
            streaming=True,
            cache_dir=scratch,
        )
    return Table(repository, str(path), data)


def _only_config(repository: Repository) -> str:
    configs = repository.configs()
    if len(configs) == 1 or "default" in configs:
        return configs[0] if len(configs) == 1 else "default"
    raise DataError(f"{repository.source}: it has several configs; ask for one as PATH:CONFIG: {quoted(configs)}")


@contextmanager
def _field_errors(where: str, name: str, value: Any, expected: str) -> Iterator[None]:
    """Name the field whose value has not the type that the code inside relies on."""
    try:
        yield
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        shown = reprlib.repr(value)
        raise DataError(f"{where}: the field {name!r} is {shown}, which cannot be used; expected {expected}") from error


def _text(row: Mapping[str, Any], name: str, where: str) -> str:
    """A text; none at all is the empty one, which the caller counts."""
    return "" if row[name] is None else string(row, name, where)


def _records(row: Mapping[str, Any], name: str, fields: tuple[str, ...], where: str) -> list[tuple[Any, ...]]:
    """A sequence of structs, which the hub's parquet files hold as a struct of lists and JSON often as a list."""
    value = row[name]
    with _field_errors(where, name, value, f"a list with {' and '.join(fields)} in each"):
        if value is None:
            return []
        if isinstance(value, Mapping):
            return list(zip(*(value[one] or [] for one in fields), strict=True))
        return [tuple(record[one] for one in fields) for record in value]


def _passages(pairs: list[tuple[Any, ...]], name: str, where: str) -> tuple[Passage, ...]:
    """Passages from pairs of title and text; those without any text are left out."""
    passages = []
    for title, text in pairs:
        if not isinstance(text, str | None) or not isinstance(title, str | None):
            raise DataError(f"{where}: the field {name!r} holds {reprlib.repr((title, text))}; expected two strings")
        if text and text.strip():
            passages.append(Passage(title or "", text))
    return tuple(passages)


def _read_triviaqa(where: str, row: Mapping[str, Any], size: int) -> SourceExample:
    """A page that holds an answer is a positive, cut to the passage around it; one that does not is a negative."""
    query = _text(row, "question", where)
    with _field_errors(where, "answer", row["answer"], "value and aliases, all strings"):
        aliases = [] if row["answer"] is None else [row["answer"]["value"] or "", *(row["answer"]["aliases"] or ())]
        answer = answer_pattern(aliases)
    pages = _records(row, "entity_pages", ("title", "wiki_context"), where)
    results = _records(row, "search_results", ("title", "search_context"), where)
    positives, negatives = [], []
    for title, text in _passages([*pages, *results], "entity_pages or search_results", where):
        passage = answer_passage(text, answer, query, size) if answer else ""
        if passage:
            positives.append(Passage(title, passage))
        elif answer:
            negatives.append(Passage(title, first_words(text, size)))
    return SourceExample(query, tuple(positives), tuple(negatives))


def _read_msmarco(where: str, row: Mapping[str, Any], _: int) -> SourceExample:
    """A selected passage is a positive; the others of the query are negatives (some are unjudged answers)."""
    records = _records(row, "passages", ("is_selected", "passage_text"), where)
    if bad := [selected for selected, _ in records if selected not in (0, 1)]:
        raise DataError(f"{where}: the field 'passages' holds is_selected {bad[0]!r}; expected 0 or 1")
    positives, negatives = (
        _passages([("", text) for selected, text in records if selected == kind], "passages", where) for kind in (1, 0)
    )
    return SourceExample(_text(row, "query", where), positives, negatives)


def _read_codesearchnet(where: str, row: Mapping[str, Any], _: int) -> SourceExample:
    """The first paragraph of the documentation asks for the code without its documentation."""
    docstring, code = _text(row, "documentation", where), _text(row, "code", where)
    return SourceExample(
        first_paragraph(docstring), _passages([("", without_docstring(code, docstring))], "code", where)
    )


def _read_cosqa(where: str, row: Mapping[str, Any], _: int) -> SourceExample:
    """Code that answers a web query (label 1) or does not (label 0)."""
    code = _passages([("", _text(row, "code", where))], "code", where)
    query = _text(row, "doc", where)
    return SourceExample(query, code) if is_relevant(row["label"], where) else SourceExample(query, (), code)


def _read_miracl(where: str, row: Mapping[str, Any], _: int) -> SourceExample:
    positives, negatives = (
        _passages(_records(row, name, ("title", "text"), where), name, where)
        for name in ("positive_passages", "negative_passages")
    )
    return SourceExample(_text(row, "query", where), positives, negatives)


def _read_s2orc(where: str, row: Mapping[str, Any], _: int) -> SourceExample:
    """A title asks for its abstract; a title or an abstract asks for the paper that it cites."""
    cited = row["document"] if isinstance(row["document"], list) else [_text(row, "document", where)]
    return SourceExample(_text(row, "query", where), _passages([("", text) for text in cited], "document", where))


def _read_pairs(where: str, row: Mapping[str, Any], _: int) -> SourceExample:
    negatives = []
    for name, value in row.items():
        if name.startswith("negative"):
            negatives += _cell(value)
    trace = _text(row, "reasoning", where) if "reasoning" in row else ""
    positives = _cell(row["positive"])
    if not is_relevant(row.get("label", 1), where):
        positives, negatives = [], positives + negatives
    return SourceExample(
        _text(row, "query", where),
        _passages(positives, "positive", where),
        _passages(negatives, "negative", where),
        {"trace": trace} if trace.strip() else {},
    )


def _cell(value: Any) -> list[tuple[Any, Any]]:
    """Title and text of what a cell holds: a text, a mapping of the two, or a list of these."""
    if isinstance(value, list):
        return [pair for one in value for pair in _cell(one)]
    return [(value.get("title"), value.get("text"))] if isinstance(value, Mapping) else [("", value)]


@dataclass(frozen=True)
class Reader:
    """How a schema is read.

    Attributes:
        columns: field -> the names that its column may have.
        read: place, row and words of a passage -> example.
        schema: the columns, for messages.
        optional: fields that may have no column.
    """

    columns: Columns
    read: Callable[[str, Mapping[str, Any], int], SourceExample]
    schema: str
    optional: tuple[str, ...] = ()


_NUMBERED = tuple(f"negative_{number}" for number in range(1, MOST_NEGATIVES + 1))


def _same(*names: str) -> Columns:
    return {name: (name,) for name in names}


READERS: Mapping[str, Reader] = {
    "triviaqa": Reader(
        _same("question", "answer", "entity_pages", "search_results"),
        _read_triviaqa,
        "question, answer {value, aliases}, entity_pages {title, wiki_context}, search_results {title, search_context}",
    ),
    "msmarco": Reader(_same("query", "passages"), _read_msmarco, "query, passages {is_selected, passage_text}"),
    "codesearchnet": Reader(
        {
            "documentation": ("func_documentation_string", "docstring", "comment"),
            "code": ("func_code_string", "whole_func_string", "code"),
        },
        _read_codesearchnet,
        "func_documentation_string and func_code_string or whole_func_string (or docstring, code; or comment, code)",
    ),
    "cosqa": Reader(_same("doc", "code", "label"), _read_cosqa, "doc, code, label (0 or 1)"),
    "miracl": Reader(
        _same("query", "positive_passages", "negative_passages"),
        _read_miracl,
        "query, positive_passages {title, text}, negative_passages {title, text}",
    ),
    "s2orc": Reader(
        {"query": ("title", "abstract"), "document": ("citation", "abstract")},
        _read_s2orc,
        "title and abstract, title and citation, or abstract and citation",
    ),
    "pairs": Reader(
        {
            "query": GUESSES["query"],
            "positive": GUESSES["document"],
            "label": GUESSES["label"],
            "reasoning": GUESSES["reasoning"],
            **_same(*_NUMBERED),
            "negative": GUESSES["negative"],
        },
        _read_pairs,
        f"{' or '.join(GUESSES['query'])}; {' or '.join(GUESSES['document'])}; and where there are some "
        f"{' or '.join(GUESSES['negative'])}, negative_1, ..., {' or '.join(GUESSES['reasoning'])}, label (0 or 1)",
        ("label", "reasoning", *_NUMBERED, "negative"),
    ),
}
"""Name -> reader. Ids on the hub and their state: docs/data.md."""


def _read_collection(place: SourcePlace) -> Iterator[SourceExample]:
    """A split of a collection in the BEIR or MTEB layout; documents judged as not relevant are negatives."""
    collection = load_collection(place.path, skip_empty_documents=True)
    query_ids = list(collection.split(place.split))
    if place.shuffle_buffer:
        random.Random(place.seed).shuffle(query_ids)
    for query_id in query_ids:
        yield _judged_example(collection, place.split, query_id)


def _judged_example(collection: Collection, split: str, query_id: str) -> SourceExample:
    relevance, query = collection.qrels[split][query_id], collection.queries[query_id]
    positives = [doc_id for doc_id, gain in relevance.items() if gain > 0]
    irrelevant = [doc_id for doc_id, gain in relevance.items() if gain <= 0]
    negatives = dict.fromkeys([*listed_negatives(collection, query, positives), *irrelevant])
    passages = [
        tuple(Passage(collection.documents[one].title, collection.documents[one].text) for one in doc_ids)
        for doc_ids in (positives, negatives)
    ]
    return SourceExample(query.bare, passages[0], passages[1], reasoning_traces(query), query.instruction)
