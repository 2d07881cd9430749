"""What came of `gpu_all.sh`: one line per finding, and all of them as summary.json.

python benchmarks/gpu_summary.py OUT_DIR
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

WANTED = {
    "engine.json": {
        "attention": ("cudnn_allowed", "cudnn_forbidden", "causal", "float32_grouped", "float32_repeated"),
        "documents": (
            "product_rate", "tokens_per_second", "share_of_rate", "batch_tokens", "ratio", "peer_batch_size",
            "least_cosine_to_peer", "peak_bytes", "by_batch_tokens", "peer_by_batch_size", "tokenise_seconds",
        ),
        "decoding": ("ratio", "64 rows", "4 rows", "1 rows", "graphs_say", "graphs_taken"),
        "queries": ("ratio", "tokens_per_second", "graphs", "by_batch_size"),
        "parity": ("float32", "half"),
    },
    "training.json": {
        "sft": (
            "seconds", "tokens_per_second", "share_of_rate", "peak_bytes", "plan_bytes", "over_plan",
            "held_before_bytes",
        ),
        "grpo": (
            "seconds", "phases", "training_seconds", "tokens_per_second", "share_of_rate", "decoded_per_second",
            "refresh_tokens_per_second", "reasoning_tokens", "peak_bytes", "plan_bytes", "over_plan",
            "held_before_bytes",
        ),
    },
}  # fmt: skip
"""Of each file and part, what the summary shows."""


def tests(path: Path) -> dict[str, Any]:
    """Counts, and the names of what failed."""
    cases = list(ElementTree.parse(path).getroot().iter("testcase"))
    failed = [
        f"{case.get('name')}: {found.get('message', '')[:300]}"
        for case in cases
        for found in case
        if found.tag in ("failure", "error")
    ]
    skipped = sum(child.tag == "skipped" for case in cases for child in case)
    return {"cases": len(cases), "skipped": skipped, "failed": failed}


def summary(folder: Path) -> dict[str, Any]:
    """All that is there."""
    found: dict[str, Any] = {"parts": {}}
    listed = folder / "parts.tsv"
    for line in listed.read_text(encoding="utf-8").splitlines() if listed.exists() else []:
        name, status, seconds, limit = line.split("\t")
        found["parts"][name] = {"status": int(status), "seconds": int(seconds), "limit": int(limit)}
    if (folder / "tests.xml").exists():
        found["tests"] = tests(folder / "tests.xml")
    for file, parts in WANTED.items():
        if not (folder / file).exists():
            continue
        record = json.loads((folder / file).read_text(encoding="utf-8"))
        found |= {name: record[name] for name in ("machine", "versions") if name in record}
        own = {name: record[name] for name in ("failed", "left_out") if record[name]}
        for part, keys in parts.items():
            values = record["parts"].get(part, {})
            own[part] = {key: values[key] for key in keys if key in values}
        found[file.removesuffix(".json")] = own
    return found


def main() -> None:
    folder = Path(sys.argv[1])
    found = summary(folder)
    (folder / "summary.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    (folder / "parts.tsv").unlink(missing_ok=True)  # it is in the summary
    for name, values in found.items():
        nested = isinstance(values, dict) and all(isinstance(value, dict) for value in values.values())
        for part, value in values.items() if nested else [("", values)]:
            print(json.dumps({f"{name} {part}".strip(): value}))


if __name__ == "__main__":
    main()
