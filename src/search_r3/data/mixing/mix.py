"""Training data from several sources in one BEIR folder: each source is one split of judgements.

How much of each batch comes from which split is a setting of the training (`sft.splits`); here the sources are read,
cleaned, freed of repetitions and of what evaluation collections hold, and written.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ...errors import DataError
from ...files import atomic_directory, write_json
from ...types import Watch
from ..collection import Collection, Document, Qrels, Query
from ..load import parse_built_in
from ..rows import instructed
from ..tables import Repository
from ..writing.replies import SURROGATE
from .contamination import Contamination, load_contamination
from .mix_settings import MixSettings, SourceSettings
from .sources import Passage, SourceExample, SourcePlace, read_examples

DEV = "dev"
SHOWN_EVERY = 100
"""So many rows or queries are counted before they are shown."""
EXAMPLES = 10
"""So many contaminated queries of each source are shown in the report."""


@dataclass
class SourceReport:
    """What became of one source.

    Attributes:
        path: as in the settings.
        revision: the commit on the hub; None for folders and files.
        read: its rows.
        queries: its queries in the mix, held-out ones included.
        dev: those held out.
        merged: rows whose query another row, here or in an earlier source, had asked: they gave it their documents.
        dropped: reason -> rows without a query in the mix.
        documents: reason -> documents left out of rows; those `kept before` are there once.
        contaminated: the first of the rows dropped for contamination, with what they were found in.
    """

    path: str
    revision: str | None
    read: int = 0
    queries: int = 0
    dev: int = 0
    merged: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    documents: Counter[str] = field(default_factory=Counter)
    contaminated: list[dict[str, str]] = field(default_factory=list)


@dataclass(slots=True)
class _MixQuery:
    """A query of the mix, with the doc_ids of its documents; `spare` are positives that found no room."""

    text: str
    instruction: str
    source: SourceSettings
    dev: bool = False
    positives: dict[str, None] = field(default_factory=dict)
    negatives: dict[str, None] = field(default_factory=dict)
    spare: set[str] = field(default_factory=set)
    reasoning: dict[str, str] = field(default_factory=dict)


def mix(settings: MixSettings, out: str | Path, watch: Watch | None = None) -> dict[str, SourceReport]:
    """Read the sources and write them as one BEIR folder with a report, `mix.json`.

    A query that is asked again with the same instruction (case, white space and the mark at its end do not count)
    stays in the split of its first row and takes the documents of the later one. Documents with the same
    text are one document, whatever source they are from. Ids are hashes of texts, so that they stay when sources are
    added. Nothing is written before all sources are read.

    Args:
        settings: the sources and how they are cleaned.
        out: the folder; it must not exist.
        watch: told of the evaluation collections and of each source how far the reading is.

    Returns:
        source -> what became of it.

    Raises:
        DataError: `out` exists, a source or an evaluation collection cannot be read (place and remedy are named), or no
            query of a source is left.
    """
    out = Path(out)
    if out.exists():
        raise DataError(f"{out} exists; nothing is overwritten: remove it or choose another folder")
    watch = watch or (lambda what, total: lambda done, _: None)
    sets = len(settings.contamination.collections) + len(settings.contamination.tables)
    check = load_contamination(settings.contamination, watch("evaluation collections", sets))
    mixer = _Mixer(settings, check)
    for source in settings.sources:
        mixer.read(source, watch(source.name, source.limit))
    collection = mixer.collect(out.name)
    with atomic_directory(out) as scratch:
        collection.save(scratch)
        write_json(scratch / "mix.json", mixer.describe(collection))
    return mixer.reports


class _Mixer:
    """What was read so far."""

    def __init__(self, settings: MixSettings, check: Contamination) -> None:
        self.settings = settings
        self.check = check
        self.reports: dict[str, SourceReport] = {}
        self.documents: dict[str, Document] = {}
        self.queries: dict[str, _MixQuery] = {}

    def read(self, source: SourceSettings, advance: Callable[[int, int], None]) -> None:
        """Take the examples of a source, up to its limit."""
        report = self.reports[source.name] = SourceReport(source.path, _revision(source))
        place = SourcePlace(source.path, source.split, source.shuffle_buffer, self.settings.seed)
        last_shown = 0
        with tempfile.TemporaryDirectory() as scratch:
            for example in read_examples(source.reader, place, scratch, passage_words=source.passage_words):
                self._take(example, source, report)
                report.read += 1
                # With a limit the display counts the queries kept, else the rows.
                count = report.queries if source.limit else report.read
                if count >= last_shown + SHOWN_EVERY:
                    advance(count - last_shown, 0)
                    last_shown = count
                if report.queries == source.limit:
                    break
        if not report.queries:
            reasons = {**report.dropped, "asked in an earlier source": report.merged}
            raise DataError(
                f"{source.path}: no query of its {report.read} rows is left: {reasons}; leave the source out"
            )
        if report.dev == report.queries:
            raise DataError(
                f"{source.path}: all of its {report.queries} queries are held out by dev={self.settings.dev}, none is "
                "left to train on; choose a smaller dev, or leave the source out"
            )

    def _take(self, example: SourceExample, source: SourceSettings, report: SourceReport) -> None:
        query = " ".join(_whole(example.query).split())
        if fault := self._fault(query, example, source, report):
            report.dropped[fault] += 1
            return
        instruction = " ".join(filter(str.strip, (_whole(example.instruction), source.instruction)))
        key = f"{_normal(query)}\n{instruction}"
        positives = self._documents(example.positives, report)
        entry, dev = self.queries.get(key), _share(query) < self.settings.dev
        if entry:
            report.merged += 1
        elif positives and dev and report.dev == self.settings.max_dev:
            report.dropped["one too many for dev"] += 1
            return
        elif positives:
            entry = self.queries[key] = _MixQuery(query, instruction, source, dev)
            report.queries += 1
            report.dev += dev
        else:
            report.dropped["no positive document"] += 1
            return
        for doc_id in positives:
            entry.negatives.pop(doc_id, None)
            if len(entry.positives) == entry.source.max_positives and doc_id not in entry.positives:
                entry.spare.add(doc_id)
        self._add(positives, entry.positives, entry.source.max_positives, report)
        negatives = self._documents(example.negatives, report)
        for doc_id in entry.positives.keys() | entry.spare:
            negatives.pop(doc_id, None)
        self._add(negatives, entry.negatives, entry.source.max_negatives, report)
        traces = {style: _whole(trace) for style, trace in example.reasoning.items()}
        entry.reasoning = {**traces, **entry.reasoning}

    def _add(self, documents: dict[str, Document], doc_ids: dict[str, None], most: int, report: SourceReport) -> None:
        """List documents while there is room, and keep them."""
        for doc_id, document in documents.items():
            if doc_id not in doc_ids and len(doc_ids) >= most:
                report.documents["one too many for its query"] += 1
                continue
            if doc_id in self.documents:
                report.documents["kept before"] += 1
            self.documents.setdefault(doc_id, document)
            doc_ids[doc_id] = None

    def _fault(self, query: str, example: SourceExample, source: SourceSettings, report: SourceReport) -> str | None:
        """Why a row is dropped; None where it is not."""
        if not re.search(r"\w", query):
            return "empty query"
        if len(query) < self.settings.min_query_chars:
            return "query too short"
        if len(query) > self.settings.max_query_chars:
            return "query too long"
        source_text = self.check.find_query(query)
        if source_text is None and self.settings.contamination.positives:
            texts = (f"{one.title} {one.text}" for one in example.positives)
            source_text = next(filter(None, map(self.check.find_document, texts)), None)
        if source_text is None:
            return None
        if len(report.contaminated) < EXAMPLES:
            report.contaminated.append({"query": query, **asdict(source_text), "text": source_text.text[:500]})
        return "contaminated"

    def _documents(self, passages: Iterable[Passage], report: SourceReport) -> dict[str, Document]:
        """The passages that can be documents, by id."""
        documents = {}
        for passage in passages:
            title, text = (_whole(part).strip() for part in passage)
            if len(text) < self.settings.min_document_chars:
                report.documents["too short"] += 1
            elif len(text) > self.settings.max_document_chars:
                report.documents["too long"] += 1
            else:
                doc_id = f"d-{_digest(f'{title} {text}')}"
                documents[doc_id] = Document(doc_id, text, title)
        return documents

    def collect(self, name: str) -> Collection:
        """The collection: a split per source, and the held-out queries."""
        queries: dict[str, Query] = {}
        qrels: dict[str, Qrels] = {source.name: {} for source in self.settings.sources}
        dev: Qrels = {}
        doc_ids: dict[str, None] = {}
        for key, entry in self.queries.items():
            query_id = f"{entry.source.name}-{_digest(key)}"
            metadata: dict[str, Any] = {"source": entry.source.name}
            if entry.reasoning:
                metadata["reasoning"] = entry.reasoning
            if entry.negatives:
                metadata["negatives"] = list(entry.negatives)
            text = instructed(entry.text, entry.instruction)
            queries[query_id] = Query(query_id, text, metadata, entry.instruction)
            split = dev if entry.dev else qrels[entry.source.name]
            split[query_id] = dict.fromkeys(entry.positives, 1)
            doc_ids.update(entry.positives | entry.negatives)
        documents = {doc_id: self.documents[doc_id] for doc_id in doc_ids}
        return Collection(name, documents, queries, {**qrels, **({DEV: dev} if dev else {})})

    def describe(self, collection: Collection) -> dict[str, Any]:
        """The report as JSON."""
        settings = self.settings.model_dump(mode="json")
        dropped = sum((report.dropped for report in self.reports.values()), Counter[str]())
        return {
            "documents": len(collection.documents),
            "queries": len(collection.queries),
            "splits": {name: len(split) for name, split in collection.qrels.items()},
            "dropped": dict(dropped),
            "evaluation_queries": len(self.check),
            "sources": {name: dict(vars(report)) for name, report in self.reports.items()},
            "content_hash": collection.content_hash(),
            "settings_hash": hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest(),
            "settings": settings,
            "versions": {name: version(name) for name in ("search-r3", "datasets")},
        }


def _revision(source: SourceSettings) -> str | None:
    """The commit of a data set on the hub that is read."""
    if parse_built_in(source.path) is not None:
        return None
    repository = Repository(*_hub_name(source), "")
    if repository.local or Path(repository.source).exists():
        return None
    from huggingface_hub import HfApi

    with repository.errors_at(source.path):
        return HfApi().dataset_info(repository.source, revision=repository.revision).sha


def _hub_name(source: SourceSettings) -> tuple[str, str | None]:
    name, _, revision = SourcePlace(source.path).parts()
    return name, revision


def _normal(text: str) -> str:
    """A query without case and without the marks at its end; others tell `c++` from `c#`."""
    return text.casefold().rstrip(" ?!.\uff1f\uff01\u3002")


def _share(query: str) -> float:
    """Where a query lies between 0 and 1: by its text alone, so that every mix that has it holds it out, or none."""
    return int(_digest(_normal(query)), 16) / 2**80


def _whole(text: str) -> str:
    """A text without half letters, which could not be written."""
    return text if text.isascii() else SURROGATE.sub("", text)


def _digest(text: str) -> str:
    return hashlib.blake2b(" ".join(text.split()).encode(), digest_size=10).hexdigest()
