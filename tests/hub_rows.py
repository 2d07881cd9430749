"""Rows of public training sets in their hub schemas, made by us, and how they are laid on the disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

Rows = list[dict[str, Any]]

PAGE = " ".join(f"word{number}" for number in range(300))
TRIVIAQA: Rows = [
    {
        "question": "What is the capital of Uzbekistan?",
        "question_id": "tc_1",
        "question_source": "made up",
        "entity_pages": {
            "doc_source": ["TagMe"],
            "filename": ["Tashkent.txt"],
            "title": ["Tashkent"],
            "wiki_context": [f"Tashkent was old. {PAGE} The capital of Uzbekistan is Tashkent, a city. {PAGE}"],
        },
        "search_results": {
            "description": ["", ""],
            "filename": ["1.txt", "2.txt"],
            "rank": [1, 2],
            "title": ["Toshkent", "Samarkand"],
            "url": ["http://a", "http://b"],
            "search_context": [f"TOSHKENT is large, says this page. {PAGE}", f"Samarkand was a capital once. {PAGE}"],
        },
        "answer": {"value": "Tashkent", "aliases": ["Tashkent", "Toshkent"], "normalized_value": "tashkent"},
    },
    {
        "question": "Which river has no page?",
        "question_id": "tc_2",
        "question_source": "made up",
        "entity_pages": {"doc_source": [], "filename": [], "title": [], "wiki_context": []},
        "search_results": {
            "description": [""],
            "filename": ["3.txt"],
            "rank": [1],
            "title": ["Rivers"],
            "url": ["http://c"],
            "search_context": ["This page of many rivers names none of them."],
        },
        "answer": {"value": "Zarafshon", "aliases": ["Zarafshon"], "normalized_value": "zarafshon"},
    },
]
MSMARCO: Rows = [
    {
        "query_id": 7,
        "query": "how long do cats sleep",
        "query_type": "NUMERIC",
        "answers": ["12 to 16 hours"],
        "wellFormedAnswers": [],
        "passages": {
            "is_selected": [0, 1, 0],
            "passage_text": [
                "Dogs sleep about half of the day.",
                "Cats sleep 12 to 16 hours a day.",
                "Cats eat meat twice.",
            ],
            "url": ["http://a", "http://b", "http://c"],
        },
    },
    {
        "query_id": 8,
        "query": "no passage was chosen for this",
        "query_type": "DESCRIPTION",
        "answers": ["No Answer Present."],
        "wellFormedAnswers": [],
        "passages": {"is_selected": [0], "passage_text": ["A passage about something else."], "url": ["http://d"]},
    },
]
CODE = '''def longest(rows):
    """Give the longest of the rows.

    :param rows: strings
    """
    return max(rows, key=len)'''
CODESEARCHNET: Rows = [
    {
        "repository_name": "owner/name",
        "func_path_in_repository": "a.py",
        "func_name": "longest",
        "whole_func_string": CODE,
        "language": "python",
        "func_code_string": CODE,
        "func_code_tokens": ["def", "longest"],
        "func_documentation_string": "Give the longest of the rows.\n\n    :param rows: strings",
        "func_documentation_tokens": ["Give", "the"],
        "split_name": "train",
        "func_code_url": "https://example.org/a.py",
    },
]
COSQA: Rows = [
    {
        "idx": "cosqa-train-0",
        "doc": "python sort a dict by value",
        "code": "def by_value(d):\n    return sorted(d)",
        "label": 1,
    },
    {
        "idx": "cosqa-train-1",
        "doc": "python open a file safely",
        "code": "def add_up(a, b):\n    return a + b",
        "label": 0,
    },
]
MIRACL: Rows = [
    {
        "query_id": "12",
        "query": "Wann wurde Taschkent gegründet?",
        "positive_passages": [{"docid": "1#0", "title": "Taschkent", "text": "Taschkent ist sehr alt und gross."}],
        "negative_passages": [
            {"docid": "2#0", "title": "Samarkand", "text": "Samarkand ist auch sehr alt und schön."},
            {"docid": "3#0", "title": "Leer", "text": ""},
        ],
    },
]
S2ORC_ABSTRACTS: Rows = [
    {"title": "A study of cats and of sleep", "abstract": "We watch cats while they sleep at night."}
]
S2ORC_CITED: Rows = [{"title": "A study of cats and of sleep", "citation": "An older study of the sleep of cats"}]
S2ORC_LISTS: Rows = [
    {
        "abstract": "We watch cats while they sleep at night.",
        "citation": ["Cats slept long before us.", "Dogs sleep as well."],
    }
]
PAIRS: Rows = [
    {
        "anchor": "who was the first queen of the hive",
        "positive": "The first queen of the hive was old Beatrice.",
        "negative_1": "The second queen of the hive was Anna.",
        "negative_2": "Hives have workers, drones and one queen.",
    }
]


def write_rows(path: Path, rows: Rows) -> Path:
    """A parquet file, a JSON array or JSON lines, by the ending of the name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_source(
    folder: Path, rows: Rows, suffix: str = "parquet", config: str = "default", split: str = "train"
) -> str:
    """A directory as a clone of a data set with one config and one split."""
    name = f"{split}-00000-of-00001.{suffix}"
    write_rows(folder / config / name, rows)
    files = [{"split": split, "path": f"{config}/{name}"}]
    head = yaml.safe_dump({"configs": [{"config_name": config, "data_files": files}]})
    (folder / "README.md").write_text(f"---\n{head}---\n# A data set\n")
    return str(folder)
