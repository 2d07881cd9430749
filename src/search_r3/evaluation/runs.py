"""Rankings and judgements as TREC files, for trec_eval, ir_measures and all that reads their formats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..data.collection import Collection
from ..errors import ConfigError
from ..files import write_text
from .results import Result
from .systems import Ranking


def run_path(folder: Path, result_name: str) -> Path:
    """Where the rankings of a result are."""
    return folder / f"{result_name.removesuffix('.json')}.run"


def write_run(folder: Path, result: Result, rankings: Sequence[Ranking]) -> Path:
    """Write all rankings of a result: `query Q0 document rank score system`, a document a line; returns the path.

    Scores are float32 in full, so who sorts by them, ties by the larger id first, has our ranking.
    """
    tag = "_".join(result.system.name.split())
    lines = (
        f"{query_id} Q0 {doc_id} {rank} {score:.9g} {tag}\n"
        for query_id, ranking in zip(result.query_ids, rankings, strict=True)
        for rank, (doc_id, score) in enumerate(ranking.best(len(ranking.doc_ids)), 1)
    )
    path = run_path(folder, result.file_name())
    write_text(path, lines)
    return path


def write_qrels(folder: Path, result: Result, qrels: Mapping[str, Mapping[str, int]]) -> Path:
    """Write the judgements that a result was measured by: `query 0 document relevance`; returns the path."""
    sample = f".sample-{len(qrels)}-{result.settings['seed']}" if result.collection.sample_of else ""
    collection, split, *_ = result.file_name().split(".")
    path = folder / f"{collection}.{split}{sample}.qrels"
    rows = ((query_id, doc_id, gain) for query_id, gains in qrels.items() for doc_id, gain in gains.items())
    write_text(path, "".join(f"{query_id} 0 {doc_id} {gain}\n" for query_id, doc_id, gain in rows))
    return path


def check_ids(collection: Collection) -> None:
    """See that ids can stand in TREC's files.

    Raises:
        ConfigError: one holds a blank, which separates columns there.
    """
    for kind, ids in (("query", collection.queries), ("document", collection.documents)):
        if wrong := [one for one in ids if len(one.split()) != 1]:
            raise ConfigError(
                f"--runs: columns of TREC's files are separated by blanks, and {collection.name!r} has the {kind} id "
                f"{wrong[0]!r}; rename it, or leave --runs out"
            )
