"""What benchmarks/real_training.py trains and is measured on: collections, and texts for pretraining."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from traces import join_sentences, pair_query, query_traces

from search_r3.data.collection import Collection, Document, Qrels, Query
from search_r3.files import atomic_directory, write_text
from search_r3.model.prompts import PROMPT_SETS

FOLDERS = {
    "entailmentbank": "entailmentbank",
    "strategyqa": "strategyqa_facts",
    "openbookqa": "openbookqa",
    "scifact": "scifact",
}
"""Name of the split in the union -> folder in the data root."""
FIFTH = 5
"""Where a collection has no dev split, one in so many of its train queries, by the hash of the id, is dev."""
DEV_SAMPLE = 25
"""Dev queries of each collection that are looked at during training."""
GENERAL = {"nq_qed": 1343, "hotpotqa_100": 994, "xquad_en": 240, "climate_fever_sentences": 2500, "pubmedqa": 500}
"""Other collections whose documents are read in pretraining -> how many, at most."""
PACKAGES = ("wordnet-base", "dict-foldoc", "debian-reference-en")
SENSES, PARAGRAPHS = 25_000, 2_500
"""Senses of WordNet, and paragraphs of the other packages each, at most."""


def build(root: Path, out: Path, seed: int = 0) -> None:
    """Write `union/` (to train on) and one folder per collection with its dev split (to be measured on)."""
    documents: dict[str, Document] = {}
    queries: dict[str, Query] = {}
    splits: dict[str, Qrels] = {}
    dev: Qrels = {}
    rng = random.Random(seed)
    with atomic_directory(out) as scratch:
        for name, folder in FOLDERS.items():
            collection = Collection.load(root / folder)
            train, held_out = divide(collection)
            bare = {query_id: Query(query_id, collection.queries[query_id].text) for query_id in held_out}
            Collection(name, collection.documents, bare, {"dev": held_out}).save(scratch / name)
            for document in collection.documents.values():
                own = replace(document, doc_id=f"{name}/{document.doc_id}")
                documents[own.doc_id] = own
            splits[name] = {}
            for query_id, gains in train.items():
                positives = [collection.documents[doc_id] for doc_id, gain in gains.items() if gain > 0]
                traces = query_traces(collection.queries[query_id], positives)
                query = Query(f"{name}/{query_id}", collection.queries[query_id].text, {"reasoning": traces})
                queries[query.query_id] = query
                splits[name][query.query_id] = {f"{name}/{doc_id}": gain for doc_id, gain in gains.items()}
            for query_id in rng.sample(sorted(held_out), DEV_SAMPLE):
                queries[f"{name}/{query_id}"] = Query(f"{name}/{query_id}", bare[query_id].text)
                dev[f"{name}/{query_id}"] = {f"{name}/{doc_id}": gain for doc_id, gain in held_out[query_id].items()}
        splits |= {"pairs": {}, "dev": dev}
        for document in documents.values():
            trace = {"facts": join_sentences([document.title or document.text])}
            query = Query(f"pairs/{document.doc_id}", pair_query(document, rng), {"reasoning": trace})
            queries[query.query_id] = query
            splits["pairs"][query.query_id] = {document.doc_id: 1}
        Collection("union", documents, queries, splits).save(scratch / "union")


def divide(collection: Collection) -> tuple[Qrels, Qrels]:
    """Train and dev judgements with a relevant document each."""
    train = {query_id: gains for query_id, gains in collection.split("train").items() if max(gains.values()) > 0}
    if "dev" in collection.qrels:
        return train, collection.split("dev")
    chosen = {query_id for query_id in train if hashlib.sha256(query_id.encode()).digest()[0] % FIFTH == 0}
    return (
        {query_id: gains for query_id, gains in train.items() if query_id not in chosen},
        {query_id: train[query_id] for query_id in sorted(chosen)},
    )


def write_pretraining(root: Path, collections: Path, packages: Path, out: Path, seed: int = 0) -> None:
    """Write the JSON Lines that `search-r3 base --texts` reads: documents, dialogues, and what Debian documents."""
    rng = random.Random(seed)
    rows = [{"text": text} for text in general_texts(root, rng)]
    rows += [{"text": text} for text in package_texts(packages, rng)]
    rows += list(dialogues(Collection.load(collections / "union"), rng))
    rng.shuffle(rows)
    write_text(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def general_texts(root: Path, rng: random.Random) -> Iterator[str]:
    """Documents: short ones whole, of long ones title and beginning."""
    for folder in FOLDERS.values():
        for document in Collection.load(root / folder).documents.values():
            yield join_sentences([f"{document.title}." if document.title else "", *_sentences(document.text)], 90)
    for folder, count in GENERAL.items():
        documents = [Document(row["_id"], row["text"]) for row in _rows(root / folder / "corpus.jsonl")]
        for document in rng.sample(documents, min(count, len(documents))):
            yield join_sentences(_sentences(document.text), 150)


def dialogues(union: Collection, rng: random.Random) -> Iterator[dict[str, Any]]:
    """A train query and one of its traces; half of the queries made of documents likewise."""
    system = PROMPT_SETS["search-r3"].reason_system
    for split in [*FOLDERS, "pairs"]:
        for query_id in union.split(split):
            query = union.queries[query_id]
            traces = query.metadata["reasoning"]
            if traces and (split != "pairs" or rng.random() < 0.5):
                said = {"system": system, "user": query.text, "assistant": rng.choice(sorted(traces.values()))}
                yield {"messages": [{"role": role, "content": content} for role, content in said.items()]}


def fetch_packages(out: Path) -> None:
    """Download and unpack Debian packages; where there is no apt-get, leave the folder empty."""
    with atomic_directory(out) as scratch:
        if shutil.which("apt-get") is None:
            return
        for package in PACKAGES:
            subprocess.run(["apt-get", "download", "-q", package], cwd=scratch, check=True, stdout=subprocess.DEVNULL)
        for path in sorted(scratch.glob("*.deb")):
            subprocess.run(["dpkg", "-x", path.name, "."], cwd=scratch, check=True)
            path.unlink()


def package_texts(packages: Path, rng: random.Random) -> Iterator[str]:
    """Senses of WordNet (`words: gloss`), and paragraphs of prose from the other packages."""
    senses = [sense for path in sorted(packages.rglob("wordnet/data.*")) for sense in _senses(path)]
    yield from rng.sample(senses, min(SENSES, len(senses)))
    files = sorted([*packages.rglob("foldoc.dict.dz"), *packages.rglob("*reference.en.txt.gz")])
    for path in files:
        with gzip.open(path, "rt", encoding="utf-8", errors="replace") as file:
            blocks = [re.sub(r"[{}]", "", " ".join(block.split())) for block in file.read().split("\n\n")]
        prose = [block for block in blocks if len(block.split()) > 15 and block[0].isupper() and block[-1] == "."]
        yield from rng.sample(prose, min(PARAGRAPHS, len(prose)))


def _senses(path: Path) -> Iterator[str]:
    """From lines such as `00211786 04 n 02 finish 0 end 0 003 ... | gloss; "example"`."""
    for line in path.read_text(encoding="utf-8").splitlines():
        head, found, gloss = line.partition(" | ")
        if found and not line.startswith(" "):
            fields = head.split()
            words = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
            meaning, _, _ = gloss.partition('; "')
            yield f"{', '.join(words).replace('_', ' ')}: {meaning.strip()}."


def _sentences(text: str) -> Iterable[str]:
    return re.split(r"(?<=[.?!])\s+", text.strip())


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)
