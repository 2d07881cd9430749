"""A user's own pairs of queries and documents, in one file, as a collection that can be trained on."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from itertools import starmap
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DataError
from .collection import Collection, Document, Query
from .documents import ReadReport
from .reading.records import SUFFIXES, read_rows
from .reading.texts import UnreadableError, clean
from .rows import folded
from .tables import quoted

GUESSES = {
    "query": ("query", "anchor", "question"),
    "document": ("positive", "positives", "pos", "positive_passages", "document", "answer", "passage", "text"),
    "negative": ("negative", "negatives", "neg", "negative_passages", "hard_negatives"),
    "label": ("label",),
    "title": ("title",),
    "reasoning": ("reasoning", "trace", "rationale"),
    "id": ("id", "_id", "query_id"),
}
"""Field -> the columns that are taken for it where none is named, the first that is there: the names of the data sets
of sentence-transformers, FlagEmbedding and Tevatron."""
NUMBERED = re.compile(r"negative_\d+")
"""Columns of one negative each, as `sentence_transformers.util.mine_hard_negatives` writes them."""
NEEDED = ("query", "document")
DEV_SHARE, MOST_DEV = 0.1, 500


@dataclass(frozen=True)
class Pairs:
    """What a file of pairs held.

    Attributes:
        collection: splits `train` and `dev`; traces and negatives, where the file has them, in the queries' metadata.
        columns: field -> the columns that were taken for it.
        duplicates: pairs that stood in the file before.
        report: rows that were read (`documents`) and what was passed over.
    """

    collection: Collection
    columns: Mapping[str, tuple[str, ...]]
    duplicates: int
    report: ReadReport


def read_pairs(
    path: str | Path,
    *,
    columns: Mapping[str, str | Sequence[str]] | None = None,
    dev_share: float = DEV_SHARE,
    rl_share: float = 0.0,
) -> Pairs:
    r"""Read pairs, or triples with negatives, from a `.jsonl`, `.csv`, `.tsv` or `.parquet` file.

    Rows with one query text are one query with several documents, and one document text is one document, wherever it
    stands; it has the first title that stands with it, unless that is the query itself. The queries of the split `dev`
    are those whose texts have the smallest hashes, at most 500: the same ones whatever the order of the rows, and no
    text (whatever its case and blanks) is in both splits.

    Args:
        path: the file.
        columns: field (`query`, `document`, `negative`, `label`, `title`, `reasoning`, `id`) -> column; of documents
            and negatives also several. What is not named is guessed by usual names. A document or negative may be a
            text, a mapping with `text` and `title`, or a list of these; `title` is that of a document that is a text.
            Where the label is 0, the row's documents are negatives.
        dev_share: share of the queries in `dev`.
        rl_share: share of the others in a split `rl`, for stage 2, which learns to reason from queries that stage 1 has
            not seen: what it has seen is found without reasoning.

    Raises:
        DataError: there is no such file, a line is not JSON, a column is missing, a label is neither 0 nor 1, or there
            are fewer than two queries or documents.
        MissingExtraError: Parquet, and the extra `documents` is not installed.
        ConfigError: an unknown field in `columns`, or a share that is none.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "tea.csv"
        >>> _ = file.write_text("question,answer\nfresh tea?,Green tea.\ndark tea?,Black tea.\nred tea?,Rooibos.\n")
        >>> pairs = read_pairs(file)
        >>> pairs.columns
        {'query': ('question',), 'document': ('answer',)}
        >>> {name: len(qrels) for name, qrels in pairs.collection.qrels.items()}
        {'train': 2, 'dev': 1}
    """
    path, named = Path(path), _named(columns)
    if not 0 < dev_share < 1:
        raise ConfigError(
            f"dev_share={dev_share}: expected a share of the queries between 0 and 1, such as {DEV_SHARE}"
        )
    if not 0 <= rl_share < 1:
        raise ConfigError(f"rl_share={rl_share}: expected a share of the queries from 0 to less than 1, such as 0.3")
    if not path.is_file():
        raise DataError(f"no file at {path}" + ("; it is a folder: give one file" if path.is_dir() else ""))
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(f"{path}: expected a file that ends in {', '.join(SUFFIXES)}")
    reader = _Reader(named)
    try:
        for number, row in read_rows(path, _refuse, lambda present: _flat(_choose(present, named))):
            reader.take(f"{path}:{number}", number, row)
    except UnreadableError as reason:
        raise DataError(f"{path}: {reason}") from reason
    return reader.finish(path, dev_share, rl_share)


def is_relevant(label: Any, place: str) -> bool:
    """Whether a label says that a row's documents answer its query.

    Raises:
        DataError: it is neither 0 nor 1.
    """
    text = str(label).strip().lower()
    if text in ("1", "1.0", "true"):
        return True
    if text in ("0", "0.0", "false"):
        return False
    raise DataError(
        f"{place}: the label is {label!r}; expected 1 (the document is relevant) or 0; rename a column that says "
        "something else"
    )


@dataclass
class _Reader:
    """Rows become queries and documents."""

    named: Mapping[str, tuple[str, ...]]
    columns: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # of all rows so far
    duplicates: int = 0
    report: ReadReport = field(default_factory=ReadReport)
    _of_row: dict[str, tuple[str, ...]] = field(default_factory=dict)
    _keys: tuple[str, ...] = ()
    _documents: dict[str, Document] = field(default_factory=dict)  # text -> document
    _queries: dict[str, Query] = field(default_factory=dict)  # text -> query
    _relevant: dict[str, dict[str, int]] = field(default_factory=dict)  # query_id -> doc_id -> 1
    _negatives: dict[str, dict[str, None]] = field(default_factory=dict)  # query_id -> doc_ids, in order

    def take(self, place: str, number: int, row: Mapping[str, Any]) -> None:
        if self._keys != tuple(row):  # rows of JSON Lines may differ
            self._of_row, self._keys = _choose(list(row), self.named, strict=not self.columns), tuple(row)
            self.columns = {name: self.columns.get(name) or own for name, own in self._of_row.items()}
        cells = {name: [row.get(column) for column in names] for name, names in self._of_row.items()}
        query = next(_texts(cells.get("query")), ("", ""))[1]
        title = next(_texts(cells.get("title")), ("", ""))[1]
        title = "" if title.casefold() == query.casefold() else title  # else finding it would be no task
        positives = [(own or title, text) for own, text in _texts(cells.get("document"))]
        if not query or not positives:
            self.report.skip(place, "a row without a query" if positives else "a row without a document")
            return
        self.report.documents += 1
        known = self._queries.setdefault(query, Query(f"q{number}", query))
        self._add_metadata(known, cells)
        relevant = self._relevant.setdefault(known.query_id, {})
        negatives = self._negatives.setdefault(known.query_id, {})
        label = next((one for one in cells.get("label", ()) if one is not None and one == one), 1)  # NaN: as in `_text`
        answers = is_relevant(label, place)
        for doc_id in starmap(self._document, positives):
            if answers:
                self.duplicates += doc_id in relevant
                relevant[doc_id] = 1
            else:
                negatives[doc_id] = None
        negatives.update(dict.fromkeys(starmap(self._document, _texts(cells.get("negative")))))

    def _document(self, title: str, text: str) -> str:
        known = self._documents.setdefault(text, Document(f"d{len(self._documents) + 1}", text, title))
        if title and not known.title:
            self._documents[text] = replace(known, title=title)
        return known.doc_id

    def _add_metadata(self, query: Query, cells: Mapping[str, list[Any]]) -> None:
        """The trace and the id of the first row that has one."""
        metadata = dict(query.metadata)
        for name in ("reasoning", "id"):
            if name not in metadata and (text := next(_texts(cells.get(name)), ("", ""))[1]):
                metadata[name] = text
        self._queries[query.text] = replace(query, metadata=metadata)

    def finish(self, path: Path, dev_share: float, rl_share: float) -> Pairs:
        for query in [one for one in self._queries.values() if not self._relevant[one.query_id]]:
            self.report.skip(f"{path}:{query.query_id[1:]}", "a query whose documents all have label 0")
            del self._queries[query.text], self._relevant[query.query_id]
        if len(self._queries) < 2 or len(self._documents) < 2:
            passed = f"; not read: {'; '.join(self.report.lines())}" if self.report.skipped else ""
            raise DataError(
                f"{path}: {len(self._queries)} different queries and {len(self._documents)} different documents; "
                f"expected at least two of each, to train on one query and measure on another{passed}"
            )
        queries = {}
        for query in self._queries.values():
            relevant = self._relevant[query.query_id]
            negatives = [doc_id for doc_id in self._negatives[query.query_id] if doc_id not in relevant]
            listed = {"negatives": negatives} if negatives else {}
            queries[query.query_id] = replace(query, metadata={**query.metadata, **listed})
        documents = {document.doc_id: document for document in self._documents.values()}
        places = _divided(list(self._queries.values()), dev_share, rl_share)
        qrels = {
            split: {query_id: gains for query_id, gains in self._relevant.items() if places[query_id] == split}
            for split in ("train", *(["rl"] if rl_share else []), "dev")
        }
        if not all(qrels.values()):
            raise DataError(f"{path}: too few queries of different texts for the splits {', '.join(qrels)}")
        columns = {name: self.columns[name] for name in GUESSES if self.columns.get(name)}
        return Pairs(Collection(path.stem, documents, queries, qrels), columns, self.duplicates, self.report)


def _divided(queries: Sequence[Query], dev_share: float, rl_share: float) -> dict[str, str]:
    """query_id -> split. In `dev` are the texts with the smallest hashes, in `rl` the next ones."""
    groups: dict[str, list[str]] = {}
    for query in queries:
        groups.setdefault(folded(query.text), []).append(query.query_id)
    order = sorted(groups, key=lambda text: blake2b(text.encode(), digest_size=8).digest())
    dev = min(max(1, round(dev_share * len(order))), MOST_DEV, len(order) - 1)
    rl = min(max(1, round(rl_share * (len(order) - dev))), len(order) - dev - 1) if rl_share else 0
    splits = ["dev"] * dev + ["rl"] * rl + ["train"] * (len(order) - dev - rl)
    return {query_id: split for text, split in zip(order, splits, strict=True) for query_id in groups[text]}


def _named(columns: Mapping[str, str | Sequence[str]] | None) -> dict[str, tuple[str, ...]]:
    """Field -> columns, as a user gives them."""
    named = {}
    if not isinstance(columns, Mapping | None):
        raise ConfigError(f"columns={columns!r}: expected field -> column, such as {{'query': 'question'}}")
    for name, value in (columns or {}).items():
        if name not in GUESSES:
            raise ConfigError(f"columns: unknown field {name!r}; expected {', '.join(GUESSES)}")
        named[name] = (value,) if isinstance(value, str) else tuple(value)
    return named


def _choose(
    present: Sequence[str], named: Mapping[str, tuple[str, ...]], *, strict: bool = True
) -> dict[str, tuple[str, ...]]:
    """Field -> columns, of those that a row has; with `strict` all that are named and the two that are needed."""
    taken = {column for several in named.values() for column in several}
    lower = {name.lower(): name for name in reversed(present) if name not in taken}
    columns: dict[str, tuple[str, ...]] = {
        name: next(((lower[guess],) for guess in guesses if guess in lower), ()) for name, guesses in GUESSES.items()
    }
    if numbered := tuple(name for name in present if NUMBERED.fullmatch(name.lower())):
        columns["negative"] = columns["negative"] or numbered
    columns |= named
    if strict:
        has = f"it has {quoted(present) or 'none'}"
        if missing := [column for several in columns.values() for column in several if column not in present]:
            raise UnreadableError(f"no column {missing[0]!r}; {has}")
        for name in NEEDED:
            if not columns[name]:
                usual = ", ".join(GUESSES[name])
                raise UnreadableError(f"no column for the {name} ({usual}); {has}; name it: --column {name}=COLUMN")
    return {name: tuple(one for one in several if one in present) for name, several in columns.items()}


def _flat(columns: Mapping[str, tuple[str, ...]]) -> list[str]:
    return list(dict.fromkeys(one for several in columns.values() for one in several))


def _texts(value: Any) -> Iterator[tuple[str, str]]:
    """Title and text of everything in a cell that has text."""
    if isinstance(value, Mapping):
        if text := _text(value.get("text")):
            yield _text(value.get("title")), text
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _texts(one)
    elif text := _text(value):
        yield "", text


def _text(value: Any) -> str:
    is_text = isinstance(value, str | int | float) and value == value  # NaN is how some write what is missing
    return clean(str(value)).strip() if is_text else ""


def _refuse(place: str, reason: str) -> None:
    raise DataError(f"{place}: {reason}; mend or remove it")
