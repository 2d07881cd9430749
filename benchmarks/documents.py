"""Encoding documents: ours beside sentence-transformers with the same weights, in speed and in memory.

    pip install search-r3[benchmarks]
    python benchmarks/documents.py --data DATA                        # an hour on two cores
    python benchmarks/documents.py --data DATA --shape 12x768 --documents 256 --out runs/documents.json
    python benchmarks/documents.py --data DATA --quick                # within a minute

DATA holds collections in the BEIR layout, one folder each; by default cranfield (long texts), scifact and
entailmentbank (short ones), of each a seeded sample. The model is a random Qwen2 whose tokenizer was trained on these
texts; the peer loads it from the directory that our own export writes, so both compute the same vectors (checked to
1e-4). Per collection the peer tries every batch size of --batch-sizes and keeps its best; its default, 32, is shown
too. Then the sides alternate. Memory is the peak of a process of its own, above what that process held after its
imports; `peak_bytes` counts from zero.

`share_of_rate`: the arithmetic that a side does, per second, by the rate at which this CPU multiplies float32 matrices
of the layers' sizes, measured in the same run. Arithmetic is 2 FLOP per parameter of the layers and token, plus
attention; the peer's counts whole sequences, ours leaves out what is computed once (the template before the text) or
never (most of the last layer, of which one position is read). Padding counts for nobody.

The ratio is documents/s, ours by the peer's at its best, the median over the collections. The last line is one JSON
object.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from common import (
    Shape,
    add_arguments,
    alternating,
    check_vectors,
    fastest,
    finish,
    machine,
    make_model,
    need,
    peak_memory,
    prepare,
    ratio_of_medians,
    say,
    seconds,
    versions,
)

COLLECTIONS = ["cranfield", "scifact", "entailmentbank"]
DEFAULT_BATCH = 32
ROWS = (512, 1024, 4096)
"""Tokens per matrix product; the fastest of them is the rate."""


def sample(options: argparse.Namespace, name: str) -> list[str]:
    from search_r3.data.collection import Collection

    documents = list(Collection.load(options.data / name, skip_empty_documents=True).documents.values())
    chosen = random.Random(f"{options.seed}/{name}").sample(documents, min(options.documents, len(documents)))
    return [document.full_text for document in chosen]


def product_rate(shape: Shape) -> float:
    """FLOP/s of float32 matrix products of the layers' sizes."""
    import torch

    weights = [torch.randn(size) for size in shape.matrices]
    rates = []
    for rows in ROWS:
        inputs = {weight.shape[1]: torch.randn(rows, weight.shape[1]) for weight in weights}

        def layer(inputs: dict[int, Any] = inputs) -> None:
            for weight in weights:
                torch.nn.functional.linear(inputs[weight.shape[1]], weight)

        layer()
        flop = 2 * rows * sum(weight.numel() for weight in weights)
        rates.append(flop / median(seconds(layer) for _ in range(15)))
    return max(rates)


def arithmetic(shape: Shape, sequences: Sequence[Sequence[int]]) -> dict[str, float]:
    """FLOP of each side for these documents; see above for what counts."""
    prefix = next(
        place for place, ids in enumerate(zip(min(sequences), max(sequences), strict=False)) if len({*ids}) > 1
    )
    per_layer, per_pair = 2 * shape.layer_parameters / shape.layers, 4 * shape.hidden
    keys_and_values = 2 * sum(rows * columns for rows, columns in shape.matrices[1:3])

    def pairs(start: int, stop: int) -> float:
        """Positions that the tokens from `start` to `stop` look at."""
        return (stop * (stop + 1) - start * (start + 1)) / 2

    peer = ours = 0.0
    for ids in [sequences[0][:prefix], *sequences]:
        start = 0 if len(ids) == prefix else prefix
        own = len(ids) - start
        ours += (shape.layers - 1) * (per_layer * own + per_pair * pairs(start, len(ids)))
        ours += keys_and_values * own + (per_layer - keys_and_values) + per_pair * len(ids)
    for ids in sequences:
        peer += shape.layers * (per_layer * len(ids) + per_pair * pairs(0, len(ids)))
    return {"ours": ours, "peer": peer}


def load(side: str, folder: Path) -> Callable[..., Any]:
    """A side's function from texts to vectors."""
    if side == "ours":
        from search_r3 import SearchR3

        return SearchR3(folder, device="cpu").encode_document
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu")
    return lambda texts, batch_size: model.encode_document(texts, batch_size=batch_size, show_progress_bar=False)


def work(options: argparse.Namespace) -> dict[str, int]:
    """One side alone in this process: its peak memory."""
    import transformers  # noqa: F401 - both sides need it, so it belongs to the baseline

    if options.worker == "ours":
        import search_r3.model.encoder  # noqa: F401
    else:
        import sentence_transformers  # noqa: F401
    texts = json.loads(options.texts.read_text(encoding="utf-8"))
    before = peak_memory()
    encode = load(options.worker, options.folder)
    loaded = peak_memory()
    encode(texts) if options.worker == "ours" else encode(texts, batch_size=options.batch_size)
    return {"imported_bytes": before, "loaded_bytes": loaded, "peak_bytes": peak_memory()}


def memory(options: argparse.Namespace, side: str, folder: Path, texts: Path, batch_size: int) -> dict[str, int]:
    command = [sys.executable, __file__, "--worker", side, "--folder", str(folder), "--texts", str(texts)]
    command += ["--batch-size", str(batch_size), "--threads", str(options.threads)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return {"bytes": found["peak_bytes"] - found["imported_bytes"], **found}


def memories(options: argparse.Namespace, texts: list[str], folders: dict[str, Path], best: int) -> dict[str, Any]:
    """What each side needs for these texts, in processes of their own."""
    asked = {"ours": ("ours", 0), "peer": ("peer", best), "peer_default": ("peer", DEFAULT_BATCH)}
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "texts.json"
        path.write_text(json.dumps(texts), encoding="utf-8")
        return {name: memory(options, side, folders[side], path, size) for name, (side, size) in asked.items()}


def measure(options: argparse.Namespace, name: str, texts: list[str], folders: dict[str, Path]) -> dict[str, Any]:
    """Both sides on one collection."""
    ours, peer = load("ours", folders["ours"]), load("peer", folders["peer"])
    encoder = ours.__self__.backbone.prompt_encoder
    sequences = [encoder.encode(text, "document").ids for text in texts]
    worst = check_vectors(ours(texts[:64]), peer(texts[:64], DEFAULT_BATCH))
    best, tried = fastest(lambda size: peer(texts, size), options.batch_sizes)
    sides = {"ours": lambda: ours(texts), "peer": lambda: peer(texts, best)}
    if best != DEFAULT_BATCH:
        sides["peer_default"] = lambda: peer(texts, DEFAULT_BATCH)
    spent = alternating(sides, options.runs)
    spent.setdefault("peer_default", spent["peer"])
    rate, flop = product_rate(options.shape), arithmetic(options.shape, sequences)
    # Every process imports for seconds, so a quick run asks for one collection only.
    used = {} if options.quick and name != options.collections[0] else memories(options, texts, folders, best)
    result = {
        "ratio": ratio_of_medians(spent["ours"], spent["peer"]),
        "ratio_to_default": ratio_of_medians(spent["ours"], spent["peer_default"]),
        "documents": len(texts),
        "tokens": {"mean": sum(map(len, sequences)) / len(texts), "max": max(map(len, sequences))},
        "documents_per_second": {side: len(texts) / median(values) for side, values in spent.items()},
        "seconds": spent,
        "peer_batch_size": best,
        "peer_seconds_by_batch_size": tried,
        "product_rate": rate,
        "share_of_rate": {side: flop[side] / median(spent[side]) / rate for side in flop},
        "memory": used,
        "memory_ratio": used["ours"]["bytes"] / min(used["peer"]["bytes"], used["peer_default"]["bytes"])
        if used
        else None,
        "largest_difference": worst,
    }
    say(row(name, result))
    return result


def row(name: str, result: dict[str, Any]) -> str:
    sides = ("ours", "peer", "peer_default")
    speeds = [f"{result['documents_per_second'][side]:.1f}" for side in sides]
    taken = " / ".join(f"{used['bytes'] / 2**20:.0f}" for used in result["memory"].values()) or "-"
    shares = " / ".join(f"{result['share_of_rate'][side]:.0%}" for side in ("ours", "peer"))
    speeds[1] += f" ({result['peer_batch_size']})"
    cells = [name, f"{result['tokens']['mean']:.0f}", *speeds, f"{result['ratio']:.2f}", shares, taken]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, runs=5)
    parser.add_argument("--data", type=Path, help="folder of collections in the BEIR layout")
    parser.add_argument("--collections", nargs="+", default=COLLECTIONS)
    parser.add_argument("--documents", type=int, default=512, help="sampled from each collection")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8, 16, 32, 64], help="the peer's choice")
    for hidden, kind in {"worker": str, "folder": Path, "texts": Path, "batch-size": int}.items():
        parser.add_argument(f"--{hidden}", type=kind, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.shape, options.vocabulary, options.documents = Shape(2, 128), 2048, 32
        options.batch_sizes, options.runs = [16, 32], min(options.runs, 2)
    need("torch", "transformers", "sentence_transformers")
    prepare(options)
    if options.worker:
        print(json.dumps(work(options)))
        return
    if options.data is None or not all((options.data / name).is_dir() for name in options.collections):
        parser.error(f"--data names the folder that holds {', '.join(options.collections)}, each in the BEIR layout")
    compare(options)


def compare(options: argparse.Namespace) -> None:
    """All collections; prints the table and the record."""
    from search_r3.model.export import export_sentence_transformers
    from search_r3.model.loading import load_backbone

    started = time.perf_counter()
    texts = {name: sample(options, name) for name in options.collections}
    with tempfile.TemporaryDirectory() as scratch:
        folders = {name: Path(scratch) / name for name in ("bare", "ours", "peer")}
        words = [text for some in texts.values() for text in some]
        make_model(folders["bare"], words, options.shape, options.vocabulary, 2048, options.seed)
        backbone = load_backbone(folders["bare"])
        backbone.save(folders["ours"])  # with the embed token and our settings, which a bare model directory lacks
        export_sentence_transformers(backbone, folders["peer"])
        say(f"{len(words)} documents and the model took {time.perf_counter() - started:.0f} s")
        results = {name: measure(options, name, some, folders) for name, some in texts.items()}
    print("| collection | tokens | ours, documents/s | peer at its best (batch) | peer's default | ratio ", end="")
    print("| share of the CPU's rate, ours / peer | memory, ours / peer / default, MiB |")
    print("|---|---|---|---|---|---|---|---|")
    for name, result in results.items():
        print(row(name, result))
    ratios = [result["ratio"] for result in results.values()]
    settings = {key: value for key, value in vars(options).items() if key not in ("out", "shape", "data", "worker")}
    settings = {key: value for key, value in settings.items() if key not in ("folder", "texts", "batch_size")}
    settings |= {"shape": str(options.shape), **versions("torch", "transformers", "sentence-transformers")}
    record = {"benchmark": "documents", "peer": "sentence-transformers", "ratio": median(ratios)}
    record |= {"worst_ratio": min(ratios), "unit": "documents/s, ours / peer", "runs": options.runs}
    record |= {"collections": results, "settings": settings}
    finish({**record, "machine": machine()}, options.out)


if __name__ == "__main__":
    main()
