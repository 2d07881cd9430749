"""Whether a training query, or its positive, is known from an evaluation collection: shared word n-grams.

The rules are published ones. Queries: 8-grams that cover half of the evaluation query's words, or the whole query where
it is shorter (Tulu 3, arXiv 2411.15124, section 3.2, with words for its tokens). Documents: one shared 13-gram (GPT-3,
arXiv 2005.14165, appendix C). Words are compared in lower case without punctuation; letters of scripts that do not
part words by spaces count as words.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
import unicodedata
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ...errors import DataError
from ..collection import Collection
from ..load import load_collection
from ..rows import string
from .mix_settings import ContaminationSettings
from .sources import SourcePlace, open_table

_ALONE = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
"""Thai, Lao, Burmese, Khmer, kana and Han: each letter is a word."""
_WORD = re.compile(rf"[{_ALONE}]|[^\W{_ALONE}]+")


@dataclass(frozen=True)
class EvaluationText:
    """A text of an evaluation collection.

    Attributes:
        collection: its name.
        text_id: its query_id or doc_id.
        text: the text.
    """

    collection: str
    text_id: str
    text: str


def words(text: str) -> list[str]:
    """The words of a text as they are compared.

    Example:
        >>> words("Who's Åsa, the 2nd?  東京")
        ['who', 's', 'åsa', 'the', '2nd', '東', '京']
    """
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def ngrams(tokens: Sequence[str], size: int) -> list[int]:
    """The hashes (64 bits) of the runs of `size` words, in their order; none for a shorter text."""
    return [_hash(tokens[at : at + size]) for at in range(len(tokens) - size + 1)]


class Contamination:
    """The n-grams of evaluation texts, and the training texts that share them.

    n-grams are kept as sorted 64-bit hashes with the row of their text, 12 bytes each: about 100 bytes a query and
    2 kB a document.

    Args:
        settings: sizes of n-grams and what counts as a hit.

    Example:
        >>> check = Contamination(ContaminationSettings())
        >>> check.add_query(EvaluationText("set", "q1", "Who wrote War and Peace?"))
        >>> check.find_query("who wrote war and peace").text_id
        'q1'
        >>> check.find_query("who read war and peace")
    """

    def __init__(self, settings: ContaminationSettings) -> None:
        self.settings = settings
        self._whole: dict[int, EvaluationText] = {}
        self._bare: dict[int, EvaluationText] = {}
        self._queries, self._documents = _Index(), _Index()

    def __len__(self) -> int:
        """How many evaluation queries are held."""
        return len(self._whole)

    def add_query(self, evaluation_text: EvaluationText, bare: str = "") -> None:
        """Hold an evaluation query, and its text without its instruction, which training has under another one."""
        self._add_query(evaluation_text, self._whole)
        if bare and bare != evaluation_text.text:
            self._add_query(replace(evaluation_text, text=bare), self._bare)

    def _add_query(self, evaluation_text: EvaluationText, whole: dict[int, EvaluationText]) -> None:
        tokens = words(evaluation_text.text)
        if not tokens:  # nothing but punctuation, which any other such query would equal
            return
        whole.setdefault(_hash(tokens), evaluation_text)
        self._queries.add(evaluation_text, ngrams(tokens, self.settings.query_ngram))
        if self.settings.positives:
            self._documents.add(evaluation_text, ngrams(tokens, self.settings.document_ngram))

    def add_document(self, evaluation_text: EvaluationText) -> None:
        """Hold a document that is relevant to an evaluation query."""
        self._documents.add(evaluation_text, ngrams(words(evaluation_text.text), self.settings.document_ngram))

    def find_query(self, text: str) -> EvaluationText | None:
        """The evaluation query that a training query is a copy or a variant of."""
        tokens = words(text)
        if whole := self._whole.get(_hash(tokens)) or self._bare.get(_hash(tokens)):
            return whole
        shared = ngrams(tokens, self.settings.query_ngram)
        for evaluation_text in self._queries.find(shared):
            if self._coverage(evaluation_text, set(shared)) >= self.settings.coverage:
                return evaluation_text
        return None

    def find_document(self, text: str) -> EvaluationText | None:
        """The evaluation query or relevant document that shares an n-gram with a positive of a training query."""
        return next(self._documents.find(ngrams(words(text), self.settings.document_ngram)), None)

    def _coverage(self, evaluation_text: EvaluationText, shared: set[int]) -> float:
        """The share of an evaluation query's words that lie in shared n-grams."""
        tokens, size = words(evaluation_text.text), self.settings.query_ngram
        hits = [at for at, one in enumerate(ngrams(tokens, size)) if one in shared]
        return len({place for at in hits for place in range(at, at + size)}) / len(tokens)


class _Index:
    """Hash -> the texts that have it."""

    def __init__(self) -> None:
        self._texts: list[EvaluationText] = []
        self._new_hashes, self._new_rows = array("Q"), array("i")
        self._hashes = np.zeros(0, dtype=np.uint64)
        self._rows = np.zeros(0, dtype=np.int32)

    def add(self, evaluation_text: EvaluationText, hashes: Sequence[int]) -> None:
        """Take a text; one shorter than an n-gram has no hashes and leaves nothing."""
        if hashes:
            self._new_hashes.extend(hashes)
            self._new_rows.extend([len(self._texts)] * len(hashes))
            self._texts.append(evaluation_text)

    def find(self, hashes: Sequence[int]) -> Iterator[EvaluationText]:
        """The texts that have one of the hashes, each once, in the order in which they were taken."""
        if self._new_hashes:
            self._sort()
        if not len(self._hashes) or not hashes:
            return
        keys = np.array(hashes, dtype=np.uint64)
        first, last = (np.searchsorted(self._hashes, keys, side) for side in ("left", "right"))
        for row in sorted({int(row) for at in np.nonzero(first < last)[0] for row in self._rows[first[at] : last[at]]}):
            yield self._texts[row]

    def _sort(self) -> None:
        hashes = np.concatenate([self._hashes, np.array(self._new_hashes, dtype=np.uint64)])
        rows = np.concatenate([self._rows, np.array(self._new_rows, dtype=np.int32)])
        order = np.argsort(hashes, kind="stable")
        self._hashes, self._rows = hashes[order], rows[order]
        self._new_hashes, self._new_rows = array("Q"), array("i")


def load_contamination(settings: ContaminationSettings, advance: Callable[[int, int], None]) -> Contamination:
    """Read the evaluation collections and hold their queries.

    Args:
        settings: names the collections.
        advance: called with (1, 0) after each of them.

    Raises:
        DataError: a collection or table cannot be read, or has none of the splits asked for.
    """
    check = Contamination(settings)
    for name in settings.collections:
        _add_collection(check, name, load_collection(name, skip_empty_documents=True))
        advance(1, 0)
    for table in settings.tables:
        for split in table.splits:
            with tempfile.TemporaryDirectory() as scratch:
                rows = open_table(SourcePlace(table.path, split), scratch).rows({table.column: (table.column,)})
                for number, (place, row) in enumerate(rows):
                    check.add_query(EvaluationText(table.path, f"{split} {number}", string(row, table.column, place)))
        advance(1, 0)
    return check


def _add_collection(check: Contamination, name: str, collection: Collection) -> None:
    names = check.settings.splits or [split for split in collection.qrels if split != "train"] or ["train"]
    splits = [split for split in names if split in collection.qrels]
    if not splits:
        raise DataError(f"{name}: no split {' or '.join(names)}; it has {', '.join(sorted(collection.qrels))}")
    relevant: dict[str, None] = {}
    for split in splits:
        for query_id, relevance in collection.qrels[split].items():
            query = collection.queries[query_id]
            check.add_query(EvaluationText(name, query_id, query.text), query.bare)
            relevant.update(dict.fromkeys(doc_id for doc_id, gain in relevance.items() if gain > 0))
    for doc_id in relevant if check.settings.positives else ():
        check.add_document(EvaluationText(name, doc_id, collection.documents[doc_id].full_text))


def _hash(tokens: Sequence[str]) -> int:
    return int.from_bytes(hashlib.blake2b(" ".join(tokens).encode("utf-8", "replace"), digest_size=8).digest())
