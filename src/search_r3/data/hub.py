"""Collections from the Hugging Face hub, and from local directories in its format, through the library `datasets`.

Three layouts are known. Each gives the parts of a data set as configs:

- BEIR: `corpus` and `queries`; the judgements are the data set `NAME-qrels`.
- MTEB: `corpus`, `queries`, `default` or `qrels`, and where there is one `top_ranked`, `instruction`, `qrel_diff`;
  with several subsets `SUBSET-corpus` or `corpus-SUBSET` and so on.
- BRIGHT: `examples` and `documents` (or `long_documents`), each with one split per domain.

A directory without configs in its README.md may hold one sub-folder for each of them. Code of a data set is never
run: the versions of `datasets` that this package admits cannot.

Published data has rows that cannot be used: judgements of unknown queries, doubled ids, texts that are empty. As mteb
and BEIR do, they are left out, and counted (`Collection.dropped`), unless `strict` is asked for.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..errors import DataError
from .collection import Collection, Document, Query
from .rows import (
    Judgements,
    KnownIds,
    NamedRows,
    check_documents,
    check_judgements,
    check_lists,
    check_queries,
    instructed,
    string,
    strings,
)
from .tables import Columns, Repository, Table, find_layouts, is_bright, quoted

EXPECTED = (
    "the configs 'corpus' and 'queries' with judgements in 'default', in 'qrels' or in a data set NAME-qrels (BEIR, "
    "MTEB; of several subsets SUBSET-corpus and so on), or 'documents' and 'examples' (BRIGHT)"
)

DOCUMENT: Columns = {"_id": ("_id", "id"), "text": ("text",), "title": ("title",)}
QUERY: Columns = {"_id": ("_id", "id"), "text": ("text",), "instruction": ("instruction",)}
JUDGEMENT: Columns = {"query-id": ("query-id",), "corpus-id": ("corpus-id",), "score": ("score",)}
INSTRUCTION: Columns = {"query-id": ("query-id",), "instruction": ("instruction",)}
LIST: Columns = {"query-id": ("query-id",), "corpus-ids": ("corpus-ids",)}
BRIGHT_DOCUMENT: Columns = {"_id": ("id",), "text": ("content",)}
T = TypeVar("T")


def load_hub(
    source: str,
    *,
    revision: str | None = None,
    skip_empty_documents: bool = False,
    subset: str | None = None,
    strict: bool = False,
) -> Collection:
    """Read a data set of the hub, or a local directory in the hub's format.

    Args:
        source: `owner/name`, or a directory.
        revision: branch, tag or commit on the hub; of a data set `NAME-qrels` always the newest is read.
        skip_empty_documents: as in `Collection.load`.
        subset: one of several subsets, or one of BRIGHT's domains (`DOMAIN/long` for its long documents); where the
            splits have documents of their own, a split: `SPLIT` or `SUBSET/SPLIT`.
        strict: raise where a row cannot be used, as `Collection.load` does, instead of leaving it out.

    Raises:
        DataError: the data set cannot be read, has none of the known layouts, has several subsets of which none was
            asked for, or lacks a column, a field is of another type, or, with `strict`, a row is broken as in
            `Collection.load`; data set, config, split and row (counted from 0) are named.
    """
    with tempfile.TemporaryDirectory() as scratch:
        repository = Repository(source, revision, scratch)
        if repository.local and revision is not None:
            raise DataError(f"{source} is a folder and has no revision {revision!r}; leave the revision out")
        configs = repository.configs()
        skipped: set[str] | None = set() if skip_empty_documents or not strict else None
        dropped = None if strict else Counter[str]()
        if layouts := find_layouts(configs):
            name, split = _choose(source, layouts, subset)
            return _Reader(repository, layouts[name], name, split, skipped, dropped).read(_name(repository, subset))
        if is_bright(configs):
            return _read_bright(repository, subset, skipped, dropped)
    raise DataError(f"{source}: no known layout; it has the configs {quoted(configs)}; expected {EXPECTED}")


@dataclass(frozen=True)
class _Reader:
    """Reads one subset in the BEIR or MTEB layout."""

    repository: Repository  # what is read
    layout: dict[str, str]  # part -> config
    subset: str  # name of the subset; empty where there are none
    split: str | None  # the only split that is read; None for all
    skipped: set[str] | None  # as in `check_documents`
    dropped: Counter[str] | None  # counts rows that are left out; None where they raise

    def read(self, name: str) -> Collection:
        judgements = self._judgement_tables()
        if self.split is not None and self.split not in judgements:
            raise DataError(
                f"{self.repository.source}: no subset or split {self.split!r}; the splits are {quoted(judgements)}"
            )
        splits = list(judgements) if self.split is None else [self.split]
        documents = self._part("corpus", splits, self._documents, whole=True)
        instructions = self._part("instruction", splits, _instructions)
        queries = self._part(
            "queries",
            splits,
            lambda table: _queries(table.rows(QUERY, optional=("instruction",)), instructions, self.dropped),
        )
        ids = _ids_of(documents, queries, self.skipped, self.dropped, self.layout["corpus"], self.layout["queries"])
        judged = {split: self._judged(judgements[split], ids) for split in splits}
        query_ids = {query_id for one in judged.values() for query_id in one.qrels}
        if instructions and (missing := sorted(query_ids - instructions.keys())):
            place = f"{self.repository.source}, config {self.layout['instruction']!r}"
            more = f" (and {len(missing) - 1} more)"
            raise DataError(f"{place}: no instruction for the judged query {missing[0]!r}{more}")
        return Collection(
            name,
            documents,
            queries,
            {split: one.qrels for split, one in judged.items()},
            pools=self._part("top_ranked", splits, lambda t: check_lists(t.rows(LIST), "corpus-ids", ids, "pools")),
            changed=self._part("qrel_diff", splits, lambda t: check_lists(t.rows(LIST), "corpus-ids", ids, "changed")),
            without_text=len(self.skipped or ()),
            absent={split: one.absent for split, one in judged.items() if one.absent},
            dropped=dict(self.dropped or {}),
        )

    def _judgement_tables(self) -> dict[str, Table]:
        if "qrels" in self.layout:
            return self.repository.tables(self.layout["qrels"])
        source = self.repository.source
        if self.subset:
            raise DataError(f"{source}: subset {self.subset!r} has no judgements; expected '{self.subset}-qrels'")
        path = Path(source).resolve()
        sibling = str(path.with_name(f"{path.name}-qrels")) if self.repository.local else f"{source}-qrels"
        try:
            repository = Repository(sibling, None, self.repository.scratch)
            configs = repository.configs()
            return repository.tables("default" if "default" in configs else configs[0])
        except DataError as error:
            raise DataError(f"{source}: no judgements, neither in a config nor beside it: {error}") from error

    def _part(
        self, part: str, splits: Iterable[str], read: Callable[[Table], Mapping[str, T]], *, whole: bool = False
    ) -> dict[str, T]:
        """A part over all splits; `whole` where its splits must be the same, else they may only not contradict."""
        if part not in self.layout:
            return {}
        tables = self.repository.tables(self.layout[part])
        place = f"{self.repository.source}, config {self.layout[part]!r}"
        values: dict[str, T] = {}
        tables_read: list[Table] = []
        for split in splits:
            if split not in tables and len(tables) > 1:
                raise DataError(f"{place}: no split {split!r}, which has judgements; it has {quoted(tables)}")
            table = tables[split] if split in tables else next(iter(tables.values()))
            if table in tables_read:
                continue
            new = read(table)
            if tables_read and (
                new != values if whole else any(values.get(key, value) != value for key, value in new.items())
            ):
                choices = quoted(f"{self.subset}/{one}" if self.subset else one for one in splits)
                raise DataError(
                    f"{place}: split {split!r} contradicts an earlier one; each split is a collection of its own, so "
                    f"ask for one of them as the subset: {choices}"
                )
            values.update(new)
            tables_read.append(table)
        return values

    def _documents(self, table: Table) -> dict[str, Document]:
        return _documents(table, DOCUMENT, self.skipped, self.dropped)

    def _judged(self, table: Table, ids: KnownIds) -> Judgements:
        rows = (
            (place, string(row, "query-id", place), string(row, "corpus-id", place), row["score"])
            for place, row in table.rows(JUDGEMENT)
        )
        judgements = check_judgements(rows, ids, repeats=True)
        _not_empty(judgements.qrels, table)
        return judgements


def _read_bright(
    repository: Repository, subset: str | None, skipped: set[str] | None, dropped: Counter[str] | None
) -> Collection:
    domain, _, kind = (subset or "").partition("/")
    prefix, suffix = ("long_", "_long") if kind == "long" else ("", "")
    examples, documents_in = repository.tables("examples"), f"{prefix}documents"
    corpora = repository.tables(documents_in) if domain in examples and kind in ("", "long") else {}
    if domain not in corpora:
        fault = "it has several domains" if subset is None else f"no domain {subset!r}"
        raise DataError(f"{repository.source}: {fault}; ask for one as the subset: {quoted(examples)}; or DOMAIN/long")
    columns = {"_id": ("id",), "text": ("query",), "gold-ids": (f"gold_ids{suffix}",), "excluded": ("excluded_ids",)}
    rows = list(examples[domain].rows(columns))
    documents = _documents(corpora[domain], BRIGHT_DOCUMENT, skipped, dropped)
    queries = _queries(rows, {}, dropped)
    ids = _ids_of(documents, queries, skipped, dropped, documents_in, "examples")
    gold = ((place, row["_id"], doc_id, 1) for place, row in rows for doc_id in strings(row, "gold-ids", place))
    qrels, absent = check_judgements(gold, ids, repeats=True)
    _not_empty(qrels, examples[domain])
    # Without excluded documents a row lists "N/A", which is none.
    excluded = check_lists(
        ((place, {**row, "query-id": row["_id"]}) for place, row in rows), "excluded", ids, "excluded"
    )
    return Collection(
        _name(repository, subset),
        documents,
        queries,
        {"test": qrels},
        excluded=excluded,
        without_text=len(skipped or ()),
        absent={"test": absent} if absent else {},
        dropped=dict(dropped or {}),
    )


def _documents(
    table: Table, columns: Columns, skipped: set[str] | None, dropped: Counter[str] | None
) -> dict[str, Document]:
    rows = check_documents(table.rows(columns, optional=("title",)), skipped, dropped)
    return _not_empty({doc_id: Document(doc_id, text, title) for doc_id, title, text in rows}, table)


def _queries(rows: NamedRows, instructions: Mapping[str, str], dropped: Counter[str] | None) -> dict[str, Query]:
    """The queries, each with its instruction, which may also be in a config of its own."""
    queries = {}
    for query_id, text, _, instruction in check_queries(rows, dropped):
        other = instructions.get(query_id, "")
        both = instructed(instruction, other) if instruction else other
        queries[query_id] = Query(query_id, instructed(text, other), instruction=both)
    return queries


def _instructions(table: Table) -> dict[str, str]:
    return {
        string(row, "query-id", place): "" if row["instruction"] is None else string(row, "instruction", place)
        for place, row in table.rows(INSTRUCTION)
    }


def _ids_of(
    documents: Mapping[str, Document],
    queries: Mapping[str, Query],
    skipped: set[str] | None,
    dropped: Counter[str] | None,
    *configs: str,
) -> KnownIds:
    """The ids of documents and queries, which are in these two configs."""
    corpus_config, queries_config = (f"config {config!r}" for config in configs)
    return KnownIds(queries, documents, skipped or frozenset(), queries_config, corpus_config, dropped)


def _not_empty(parts: dict[str, T], table: Table) -> dict[str, T]:
    if not parts:
        raise DataError(f"{table.place}: nothing is left of its rows; they name or are documents without text")
    return parts


def _choose(source: str, layouts: Mapping[str, Any], subset: str | None) -> tuple[str, str | None]:
    """The subset and the split that were asked for."""
    if subset is None and ("" in layouts or len(layouts) == 1):
        return ("" if "" in layouts else next(iter(layouts))), None
    name, _, split = (subset or "").rpartition("/")
    if subset is not None and subset in layouts:
        return subset, None
    if subset is not None and name in layouts:
        return name, split
    fault = "it has several subsets" if subset is None else f"no subset {subset!r}"
    raise DataError(f"{source}: {fault}; ask for one of {quoted(filter(None, layouts))}")


def _name(repository: Repository, subset: str | None) -> str:
    return "-".join([repository.name, *(subset or "").split("/")]) if subset else repository.name
