"""Settings of `search-r3 data mix`: which sources are read, how they are cleaned, what they may not contain."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from ...loader import Section, load_settings

ReaderName = Literal["triviaqa", "msmarco", "codesearchnet", "cosqa", "miracl", "s2orc", "pairs", "beir"]


class SourceSettings(Section):
    """One source, which becomes one split."""

    name: str = Field(pattern=r"^[A-Za-z0-9][\w.-]*$", description="The split of judgements that its queries make.")
    reader: ReaderName = Field(description="Its schema (docs/data.md); `beir` for collections in the BEIR layout.")
    path: str = Field(description="`owner/name[:config][@revision]`, a folder in the hub's format, or a file.")
    split: str = Field("train", description="The split that is read.")
    limit: int | None = Field(
        None, ge=1, description="Reading ends with so many queries kept; of the hub no more is downloaded."
    )
    shuffle_buffer: int = Field(
        0,
        ge=0,
        description="Rows held in memory to draw from at random; 0: the order of the files, a limit their head.",
    )
    instruction: str = Field("", description="Follows the text of each query, as `instruction` in queries.jsonl does.")
    max_positives: int = Field(4, ge=1, description="Positives per query; further ones are left out.")
    max_negatives: int = Field(4, ge=0, description="Negatives per query; further ones are left out.")
    passage_words: int = Field(100, ge=10, description="triviaqa: words of the passage cut around an answer.")


class QueryTable(Section):
    """Evaluation queries in a layout of their own: one column of one table."""

    path: str = Field(description="As the path of a source.")
    splits: tuple[str, ...] = Field(("test",), min_length=1, description="The splits that are read.")
    column: str = Field("query", description="The column of the queries.")


class ContaminationSettings(Section):
    """What training must not have seen, and what counts as seen (docs/data.md)."""

    collections: tuple[str, ...] = Field((), description="Evaluation collections, by name as in `evaluate`.")
    tables: tuple[QueryTable, ...] = Field((), description="Evaluation queries in other layouts.")
    splits: tuple[str, ...] = Field(
        (), description="Splits of the collections whose queries are held; none: every split but `train`."
    )
    query_ngram: int = Field(8, ge=2, description="Words of an n-gram between two queries (Tulu 3: 8).")
    coverage: float = Field(
        0.5,
        gt=0,
        le=1,
        description="Share of an evaluation query's words in shared n-grams that is a hit (Tulu 3: 0.5).",
    )
    positives: bool = Field(
        False, description="Compare positives too, with the evaluation queries and with their relevant documents."
    )
    document_ngram: int = Field(13, ge=2, description="Words of the n-gram that is a hit in a positive (GPT-3: 13).")


class MixSettings(Section):
    """Training data from several sources."""

    seed: int = Field(0, ge=0, description="Of shuffling; what is held out does not depend on it.")
    dev: float = Field(
        0.01, ge=0, lt=1, description="Share of all queries, by the hash of their text, held out as split `dev`."
    )
    max_dev: int = Field(
        500, ge=1, description="Held-out queries per source, at most; further ones are dropped, not trained on."
    )
    min_query_chars: int = Field(3, ge=1, description="Shorter queries are dropped.")
    max_query_chars: int = Field(2000, ge=1, description="Longer queries are dropped.")
    min_document_chars: int = Field(20, ge=1, description="Shorter documents are dropped.")
    max_document_chars: int = Field(20_000, ge=1, description="Longer documents are dropped.")
    sources: tuple[SourceSettings, ...] = Field(min_length=1, description="Read in this order.")
    contamination: ContaminationSettings = ContaminationSettings()

    @model_validator(mode="after")
    def _fits(self) -> MixSettings:
        repeated = [name for name, count in Counter(source.name for source in self.sources).items() if count > 1]
        if repeated:
            raise ValueError(f"two sources have the name {repeated[0]!r}; a source is one split, so give each its own")
        if "dev" in {source.name for source in self.sources}:
            raise ValueError("a source has the name 'dev', the split of held-out queries; choose another")
        for least, most in (("min_query_chars", "max_query_chars"), ("min_document_chars", "max_document_chars")):
            if getattr(self, least) > getattr(self, most):
                raise ValueError(f"{least}={getattr(self, least)} is more than {most}={getattr(self, most)}")
        return self


def load_mix(path: str | Path) -> MixSettings:
    """Read the settings of a mix from YAML.

    Raises:
        ConfigError: the file cannot be read, a key is unknown (the nearest known one is named) or a value does not fit.
    """
    return load_settings(MixSettings, path)
