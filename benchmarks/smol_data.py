"""What benchmarks/smol.py trains on and looks at: a folder to train on with a split per source, and dev collections.

    python benchmarks/smol_data.py PAIRS DATA_ROOT OUT --profile ship

PAIRS holds a folder per source with `pairs.jsonl.gz` (`query`, `positive`, perhaps `title` and `reasoning`), DATA_ROOT
collections in the BEIR layout. `ship` takes only sources whose licence lets weights be given away. Hard negatives are
mined here (BM25, within the source). `manifest.json` has the SHA-256 of every trained query id and text; a query that
any collection asks outside its train split, or that is kept for dev, is never trained on.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import random
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from real_collections import divide
from smol_kinship import Kinship, Story
from smol_traces import (
    Topics,
    fact_trace,
    proof_trace,
    question_trace,
    support_trace,
)

from search_r3.data.collection import Collection, Document, Qrels, Query
from search_r3.files import atomic_directory, write_json
from search_r3.retrieval.lexical import BM25

CHARACTERS = 620
"""Of a document, about 150 tokens of prose."""
NEGATIVES = 4
LOOKED_AT = 200
"""Dev queries of each collection."""
CORPUS = 5000
"""Documents of a dev collection, at most: the relevant ones and a random choice of the others."""
STORY_TASKS = ("qa1", "qa2", "qa14", "qa15", "qa16", "qa19")
STORY_LINES = 16

PAIRS = {
    "openstax_textbooks": 12000,
    "medquad": 8000,
    "fairytale_qa": 4000,
    "factbook": 3000,
    "qasc": 2200,
    "wordnet_hops": 9000,
    "creak": 9000,
    "aqua_rat": 800,
    "wordnet": 9000,
    "jargon_file": 1500,
    "gene_ontology": 3000,
    "powershell_docs": 1500,
    "tldr_pages": 4000,
    "code_search": 9000,
    "api_docstrings": 5000,
}
"""Source whose licence lets weights be given away -> rows at most."""
RESEARCH_PAIRS = {
    "acl_anthology": 9000,
    "conference_papers": 5000,
    "doctor_answers": 2400,
    "dream": 1000,
    "ecqa": 7000,
    "feverous": 2500,
    "comve": 3000,
    "foldoc": 3000,
    "nl2bash": 3000,
    "help_pages": 3000,
    "man_pages": 3000,
    "debian_packages": 3000,
}
TRAINED = {"ship": ("openbookqa", "strategyqa_facts", "entailmentbank", "babi_support"), "research": ("scifact",)}
"""Collections whose train split is learned from; research: those too, and clutrr_relation."""
LOOKED_AT_ONLY = ("nq_qed", "hotpotqa_100", "cosqa")


@dataclass
class Union:
    """What is put together: texts, and one set of judgements per source."""

    documents: dict[str, Document]
    queries: dict[str, Query]
    splits: dict[str, Qrels]

    def add(self, split: str, rows: Sequence[tuple[Query, dict[str, int]]], documents: dict[str, Document]) -> None:
        """A source; ids get its name in front, and only documents that something names are kept."""
        named = {one for query, gains in rows for one in (*gains, *query.metadata.get("negatives", ()))}
        self.documents |= {
            f"{split}/{one}": Document(f"{split}/{one}", cut(documents[one].text), documents[one].title)
            for one in sorted(named)
        }
        self.splits[split] = {}
        for query, gains in rows:
            metadata = dict(query.metadata)
            metadata["negatives"] = [f"{split}/{one}" for one in metadata.get("negatives", ())]
            own = Query(f"{split}/{query.query_id}", query.text, metadata)
            self.queries[own.query_id] = own
            self.splits[split][own.query_id] = {f"{split}/{one}": 1 for one, gain in gains.items() if gain > 0}


def build(pairs: Path, root: Path, out: Path, profile: str, seed: int = 0) -> dict[str, Any]:
    """Write `train/`, `dev/<collection>/`, `traces.json` and `manifest.json`."""
    research = profile == "research"
    forbidden = asked_elsewhere(root)
    union = Union({}, {}, {})
    dev: dict[str, Collection] = {}
    true_traces: dict[str, dict[str, str]] = {}
    with atomic_directory(out) as scratch:
        names = [*TRAINED["ship"], *(TRAINED["research"] if research else ())]
        for name in [*names, "clutrr_relation"]:
            whole = stories(root / name) if name == "babi_support" else Collection.load(root / name)
            train, held_out = divide(whole)
            traces = collection_traces(name, whole, {**train, **held_out})
            dev[name] = looked_at(name, whole, held_out)
            true_traces[name] = {one: traces[one] for one in dev[name].queries if traces.get(one)}
            forbidden |= {normal(whole.queries[one].text) for one in held_out}
            if name in names or research:
                rows = judged_rows(whole, train, traces, forbidden)
                union.add(name, with_negatives(rows, whole.documents, whole.pools), whole.documents)
        for name in LOOKED_AT_ONLY:
            whole = Collection.load(root / name)
            dev[name] = looked_at(name, whole, whole.split("dev"))
        for name, most in {**PAIRS, **(RESEARCH_PAIRS if research else {})}.items():
            rows, documents = pair_rows(name, pairs / name / "pairs.jsonl.gz", most, forbidden, seed)
            union.add(name, with_negatives(rows, documents, {}), documents)
        Collection("train", union.documents, union.queries, union.splits).save(scratch / "train")
        for name, collection in dev.items():
            collection.save(scratch / "dev" / name)
        write_json(scratch / "traces.json", true_traces)
        manifest = manifest_of(union, forbidden, profile)
        write_json(scratch / "manifest.json", manifest)
    return manifest


def pair_rows(
    name: str, path: Path, most: int, forbidden: set[str], seed: int
) -> tuple[list[tuple[Query, dict[str, int]]], dict[str, Document]]:
    """Queries and documents of a source of pairs; equal queries become one, and so do equal texts."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    random.Random(f"{seed}/{name}").shuffle(rows)
    topics = Topics(row["query"] for row in rows)
    documents: dict[str, Document] = {}
    by_text: dict[str, str] = {}
    by_query: dict[str, tuple[Query, dict[str, int]]] = {}
    for row in rows:
        key = normal(row["query"])
        if not key or key in forbidden or (key not in by_query and len(by_query) == most):
            continue
        title = row.get("title", "")
        title = "" if normal(title) == key or name == "gene_ontology" else title
        text = cut(row["positive"])
        doc_id = by_text.setdefault(normal(f"{title} {text}"), f"d{len(by_text)}")
        documents.setdefault(doc_id, Document(doc_id, text, title))
        if key in by_query:
            by_query[key][1][doc_id] = 1
            continue
        trace = pair_trace(name, row, topics)
        metadata = {"reasoning": {"trace": trace}} if trace else {}
        by_query[key] = (Query(f"q{len(by_query)}", " ".join(row["query"].split()), metadata), {doc_id: 1})
    return list(by_query.values()), documents


def pair_trace(name: str, row: dict[str, Any], topics: Topics) -> str:
    """The trace of a row, where its source has what one is made of."""
    query, positive, reasoning = row["query"], row["positive"], row.get("reasoning", "")
    if name == "wordnet_hops":
        return reasoning
    if name == "qasc" and reasoning:
        parts = [part for part in re.split(r"(?<=[.?!])\s+", reasoning) if not part.startswith("So the answer")]
        return fact_trace(topics.of(query, [positive, *parts]), [positive], *parts[1:2])
    if name == "ecqa" and reasoning:
        return fact_trace(topics.of(query, [positive]), [re.split(r"(?<=[.?!])\s+", reasoning)[0], positive])
    if name == "creak" and not re.match(r"(My|It|This|That|The (sentence|statement|claim))\b", positive):
        return fact_trace(row.get("title", ""), [positive])
    return ""


def collection_traces(name: str, whole: Collection, judged: Qrels) -> dict[str, str]:
    """query_id -> trace, of the human proofs, decompositions, chains and facts."""
    topics = Topics(whole.queries[one].text for one in judged)
    relatives = Kinship(story_of(whole.queries[one], judged[one]) for one in judged if name == "clutrr_relation")
    found = {}
    for query_id, gains in judged.items():
        query, about = whole.queries[query_id], whole.queries[query_id].metadata
        facts = [whole.documents[one].text for one, gain in gains.items() if gain > 0]
        if name == "openbookqa":
            trace = fact_trace(topics.of(query.text, facts), facts[:1])
        elif name == "strategyqa_facts":
            term = about.get("term") or "-"
            named = re.search(re.escape(term), query.text, re.IGNORECASE)
            rest = query.text.replace(named[0], ", ") if named else query.text
            topic = ", ".join([*([named[0]] if named else []), topics.of(rest, facts, 1 if named else 2)]).strip(", ")
            trace = question_trace(topic, about.get("decomposition") or [])
        elif name == "entailmentbank":
            topic = topics.of(query.text[-300:], [*facts, about.get("hypothesis", "")])
            trace = proof_trace(topic, about.get("proof", ""), about.get("hypothesis", ""), facts)
        elif name == "babi_support":
            trace = support_trace(about["support"], about["answer"])
        elif name == "clutrr_relation":
            trace = relatives.trace(story_of(query, gains))
        else:
            trace = ""
        found[query_id] = trace
    return found


def story_of(query: Query, gains: dict[str, int]) -> Story:
    """A question of clutrr_relation, its chain of relations and its answer."""
    return query.text, query.metadata["chain"], next(iter(gains))


def stories(folder: Path, split: str = "train") -> Collection:
    """A split of babi_support with the story in the query: its distinct sentences are the pool."""
    bare = Collection.load(folder)
    queries, qrels, pools, documents = {}, {}, {}, {}
    for query_id, gains in bare.split(split).items():
        query, lines = bare.queries[query_id], sorted(bare.pools[query_id], key=line_number)
        if query.metadata["task"] not in STORY_TASKS or len(lines) > STORY_LINES:
            continue
        last = {bare.documents[one].text: one for one in lines}  # of equal sentences the last
        pools[query_id] = frozenset(last.values())
        qrels[query_id] = {last[bare.documents[one].text]: 1 for one in gains}
        documents |= {one: bare.documents[one] for one in last.values()}
        text = " ".join([*(bare.documents[one].text for one in lines), query.text])
        support = list(dict.fromkeys(bare.documents[one].text for one in gains))
        queries[query_id] = Query(query_id, text, {"answer": query.metadata["answer"], "support": support})
    return Collection("babi_support", documents, queries, {split: qrels}, pools=pools)


def line_number(doc_id: str) -> int:
    return int(doc_id.rsplit("-", 1)[1])


def judged_rows(
    whole: Collection, train: Qrels, traces: dict[str, str], forbidden: set[str]
) -> list[tuple[Query, dict[str, int]]]:
    """Train queries with their traces; doubles of what is kept apart are left out."""
    return [
        (Query(one, whole.queries[one].text, {"reasoning": {"trace": traces[one]}} if traces[one] else {}), gains)
        for one, gains in train.items()
        if normal(whole.queries[one].text) not in forbidden
    ]


def with_negatives(
    rows: list[tuple[Query, dict[str, int]]], documents: dict[str, Document], pools: dict[str, frozenset[str]]
) -> list[tuple[Query, dict[str, int]]]:
    """The rows with `metadata.negatives`: what BM25 finds, or the rest of the pool, unless it may well be relevant."""
    texts = {one: document.full_text for one, document in documents.items()}
    words = {one: frozenset(normal(text).split()) for one, text in texts.items()}
    unpooled = [query.text for query, _ in rows if query.query_id not in pools]
    searched = iter(BM25(list(texts), list(texts.values())).search(unpooled, 16) if unpooled else [])
    done = []
    for query, gains in rows:
        pool = pools.get(query.query_id)
        candidates = next(searched) if pool is None else sorted(pool)
        likely = [words[one] for one, gain in gains.items() if gain > 0]
        limit = 0.6 if pool is None else 1.0
        far = [
            one
            for one in candidates
            if gains.get(one, 0) <= 0 and all(alike(words[one], other) < limit for other in likely)
        ]
        metadata = {**query.metadata, "negatives": far[:NEGATIVES] if pool is None else far}
        done.append((Query(query.query_id, query.text, metadata), gains))
    return done


def alike(one: frozenset[str], other: frozenset[str]) -> float:
    """Words in common, as a share of the shorter text."""
    return len(one & other) / max(1, min(len(one), len(other)))


def looked_at(name: str, whole: Collection, held_out: Qrels) -> Collection:
    """A sample of the dev queries, over the relevant documents and a choice of the others."""
    rng = random.Random(name)
    chosen = {one: held_out[one] for one in rng.sample(sorted(held_out), min(LOOKED_AT, len(held_out)))}
    pools = {one: whole.pools[one] for one in chosen if one in whole.pools}
    needed = {one for gains in chosen.values() for one in gains} | {one for pool in pools.values() for one in pool}
    others = [] if pools else [one for one in whole.documents if one not in needed]
    needed |= set(rng.sample(others, min(len(others), max(0, CORPUS - len(needed)))))
    documents = {
        one: Document(one, cut(document.text), document.title)
        for one, document in whole.documents.items()
        if one in needed
    }
    queries = {one: Query(one, whole.queries[one].text) for one in chosen}
    return Collection(name, documents, queries, {"dev": chosen}, pools=pools)


def asked_elsewhere(root: Path) -> set[str]:
    """Normalised texts of all queries that a collection judges outside its train split."""
    found = set()
    for folder in sorted(path.parent for path in root.glob("**/queries.jsonl")):
        ids = {
            line.split("\t")[0]
            for path in (folder / "qrels").glob("*.tsv")
            if path.stem != "train"
            for line in path.read_text(encoding="utf-8").splitlines()[1:]
        }
        with (folder / "queries.jsonl").open(encoding="utf-8") as file:
            found |= {normal(row["text"]) for row in map(json.loads, file) if str(row["_id"]) in ids}
    return found


def manifest_of(union: Union, forbidden: set[str], profile: str) -> dict[str, Any]:
    """Counts and hashes; raises where a query is trained on that is kept apart."""
    both = [query.query_id for query in union.queries.values() if normal(query.text) in forbidden]
    if both:
        raise ValueError(f"{len(both)} trained queries are asked in dev or test, e.g. {both[0]}")
    return {
        "profile": profile,
        "queries": {split: len(qrels) for split, qrels in union.splits.items()},
        "with_trace": {
            split: sum("reasoning" in union.queries[one].metadata for one in qrels)
            for split, qrels in union.splits.items()
        },
        "documents": len(union.documents),
        "sha256": sorted(
            hashlib.sha256(f"{query.query_id}\n{query.text}".encode()).hexdigest() for query in union.queries.values()
        ),
    }


def cut(text: str) -> str:
    """The beginning of a text, up to a blank; line breaks stay."""
    if len(text) <= CHARACTERS:
        return text
    return re.sub(r"\s+\S*$", "", text[:CHARACTERS])


def normal(text: str) -> str:
    """Lower-case words and numbers alone."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def pack(folder: Path, archive: Path) -> None:
    """All in one compressed file, without the hashes."""
    with tarfile.open(archive, "w:xz", preset=6) as tar:
        for path in files_of(folder):
            tar.add(path, path.relative_to(folder))


def files_of(folder: Path) -> Iterator[Path]:
    yield from sorted(path for path in folder.rglob("*") if path.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("root", type=Path, metavar="DATA_ROOT")
    parser.add_argument("out", type=Path)
    parser.add_argument("--profile", choices=("ship", "research"), default="ship")
    parser.add_argument("--archive", type=Path, help="also write all into one .tar.xz")
    options = parser.parse_args()
    manifest = build(options.pairs, options.root, options.out, options.profile)
    if options.archive:
        pack(options.out, options.archive)
    print(json.dumps({**manifest, "sha256": len(manifest["sha256"])}, indent=1))


if __name__ == "__main__":
    main()
