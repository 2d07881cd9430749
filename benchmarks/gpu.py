"""The encoding engine on a GPU, in one call of under eight minutes: speed, memory and parity.

    pip install search-r3[benchmarks]
    python benchmarks/gpu.py --out gpu.json          # Qwen2.5-1.5B's shape, random weights, bfloat16
    python benchmarks/gpu.py --quick --device cpu    # the same code at a tiny size, to try it

In this order, so that what matters most is there if time runs out: CUDA against the CPU (a small model in float32);
documents: tokens/s as a share of the device's measured matrix-product rate, and against sentence-transformers;
reasoning queries against `transformers.generate` with a second forward pass; peak memory of each. A part that would
start after --budget seconds is left out and named in `left_out`. Each part's record is printed as soon as it is there;
the last line is one JSON object of all of them.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from common import (
    GenerateThenEmbed,
    Shape,
    atlas_texts,
    finish,
    machine,
    make_model,
    need,
    never_ending,
    prepare,
    reasoning_lengths,
    say,
    versions,
)

QWEN_1_5B = {"layers": 28, "hidden": 1536, "heads": 12, "key_heads": 2, "intermediate": 8960, "vocabulary": 151936}
TINY = {"layers": 2, "hidden": 64, "heads": 4, "key_heads": 2, "intermediate": 128, "vocabulary": 2048}


def timed(device: str, work: Callable[[], Any]) -> tuple[float, int]:
    """Seconds of one run, and the peak of the device's memory meanwhile (0 on a CPU)."""
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    work()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        return time.perf_counter() - started, torch.cuda.max_memory_allocated()
    return time.perf_counter() - started, 0


def against(device: str, runs: int, ours: Callable[[], Any], peer: Callable[[], Any]) -> dict[str, Any]:
    """Alternating runs after one warm-up each; the ratio of the medians."""
    ours(), peer()
    found: dict[str, list[tuple[float, int]]] = {"ours": [], "peer": []}
    for _ in range(runs):
        found["ours"].append(timed(device, ours))
        found["peer"].append(timed(device, peer))
    spent = {side: [seconds for seconds, _ in values] for side, values in found.items()}
    return {
        "ratio": median(spent["peer"]) / median(spent["ours"]),
        "seconds": spent,
        "peak_bytes": {side: max(peak for _, peak in values) for side, values in found.items()},
    }


def product_rate(options: argparse.Namespace) -> float:
    """FLOP/s of the best matrix product of the MLP's shape."""
    import torch

    rows = 8192 if not options.quick else 512
    dtype = getattr(torch, options.dtype)
    values = torch.randn(rows, options.size["hidden"], device=options.device, dtype=dtype)
    weight = torch.randn(options.size["intermediate"], options.size["hidden"], device=options.device, dtype=dtype)

    def products() -> None:
        for _ in range(20):
            torch.nn.functional.linear(values, weight)

    products()
    flop = 20 * 2 * rows * weight.numel()
    return max(flop / timed(options.device, products)[0] for _ in range(7))


def build(options: argparse.Namespace, scratch: Path) -> Any:
    """The model under test on its device, with random weights and a real tokenizer."""
    import torch
    import transformers

    from search_r3.model.backbone import Backbone, EmbeddingSettings, load_backbone

    vocabulary = 2000 if options.quick else 16_000
    small = load_backbone(make_model(scratch / "small", atlas_texts(), Shape(2, 128), vocabulary, 4096, options.seed))
    size, config = options.size, small.model.config
    config = transformers.Qwen2Config(
        vocab_size=size["vocabulary"],
        hidden_size=size["hidden"],
        num_hidden_layers=size["layers"],
        intermediate_size=size["intermediate"],
        num_attention_heads=size["heads"],
        num_key_value_heads=size["key_heads"],
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    torch.manual_seed(options.seed)
    with torch.device(options.device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, options.dtype)).eval()
    limits = EmbeddingSettings(max_length=1024, max_new_tokens=512)
    return Backbone(model, small.tokenizer, limits, small.embed_token_id, "random")


def texts_of(count: int, median_words: int, seed: int) -> list[str]:
    """Texts of the tokenizer's own words, their lengths spread log-normally."""
    rng = random.Random(f"texts/{seed}")
    words = " ".join(atlas_texts()[:4000]).split()
    lengths = [int(min(700, max(8, rng.lognormvariate(0, 0.7) * median_words))) for _ in range(count)]
    return [" ".join(rng.choices(words, k=length)) for length in lengths]


def parity(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """The same small model in float32 on the CPU and on the device, and in the half type on the device."""
    import numpy as np

    from search_r3 import SearchR3

    folder = make_model(scratch / "parity", atlas_texts()[:3000], Shape(4, 128), 2000, 2048, options.seed)
    texts = texts_of(64, 30, options.seed)
    exact = SearchR3(folder, device="cpu")
    found = {}
    for name, dtype in (("float32", "float32"), ("half", options.dtype)):
        other = SearchR3(folder, device=options.device, dtype=dtype)
        documents = other.encode_document(texts)
        expected = exact.encode_document(texts)
        here = exact.encode_query(texts[:16], max_new_tokens=24)
        there = other.encode_query(texts[:16], max_new_tokens=24)
        same = [i for i in range(16) if here.reasoning[i] == there.reasoning[i]]
        found[name] = {
            "documents_largest_difference": float(np.abs(documents - expected).max()),
            "documents_least_cosine": float((documents * expected).sum(-1).min()),
            "same_reasoning": len(same) / 16,
            "queries_largest_difference": float(np.abs(here.vectors - there.vectors)[same].max()) if same else None,
        }
    return found


def documents(options: argparse.Namespace, backbone: Any, scratch: Path) -> dict[str, Any]:
    """Documents of 20 to 700 words against sentence-transformers."""
    from sentence_transformers import SentenceTransformer

    from search_r3 import SearchR3
    from search_r3.model.export import export_sentence_transformers

    count = 64 if options.quick else 2048
    texts, model = texts_of(count, 120, options.seed), SearchR3(backbone)
    tokens = sum(model.count_document_tokens(texts))
    export_sentence_transformers(backbone, scratch / "sentence-transformers")
    peer = SentenceTransformer(
        str(scratch / "sentence-transformers"), device=options.device, model_kwargs={"dtype": options.dtype}
    )
    rate = product_rate(options)
    parameters = sum(weight.numel() for weight in backbone.causal_lm.base_model.layers.parameters())
    found: dict[str, Any] = {"tokens": tokens, "documents": count, "product_rate": rate, "by_batch_tokens": {}}
    for batch_tokens in (2048,) if options.quick else (16384, 32768, 65536):
        model.encode_document(texts, batch_tokens=batch_tokens)
        spent, _ = timed(options.device, lambda size=batch_tokens: model.encode_document(texts, batch_tokens=size))
        found["by_batch_tokens"][batch_tokens] = {
            "tokens_per_second": tokens / spent,
            "share_of_rate": 2 * parameters * tokens / spent / rate,
        }
    best = max(found["by_batch_tokens"], key=lambda size: found["by_batch_tokens"][size]["tokens_per_second"])
    sizes = {}
    for size in (16,) if options.quick else (32, 64, 128):
        peer.encode_document(texts, batch_size=size)
        sizes[size], _ = timed(options.device, lambda size=size: peer.encode_document(texts, batch_size=size))
    fastest = min(sizes, key=lambda size: sizes[size])
    compared = against(
        options.device,
        options.runs,
        lambda: model.encode_document(texts, batch_tokens=best),
        lambda: peer.encode_document(texts, batch_size=fastest),
    )
    share = 2 * parameters * tokens / median(compared["seconds"]["ours"]) / rate
    return found | compared | {"batch_tokens": best, "peer_batch_size": fastest, "share_of_rate": share}


def queries(options: argparse.Namespace, backbone: Any) -> dict[str, Any]:
    """Reasoning of 20 to 300 tokens against `generate` and a second forward pass."""
    from search_r3 import SearchR3

    count, longest = (12, 40) if options.quick else (256, 300)
    never_ending(backbone)
    lengths = reasoning_lengths(count, options.seed, longest)
    prompts = [prompt.ids for prompt in backbone.prompt_encoder.encode_batch(texts_of(count, 12, 1), "reason")]
    model = SearchR3(backbone)
    peer = GenerateThenEmbed(backbone.model, backbone.tokenizer.pad_token_id, backbone.embed_token_id, 0.0)
    found: dict[str, Any] = {}
    for size in (8,) if options.quick else (64, 256):
        compared = against(
            options.device,
            1 if options.quick else 2,
            lambda size=size: model.rollouts(prompts, max_new_tokens=[n + 1 for n in lengths], batch_size=size),
            lambda size=size: peer(prompts, lengths, size),
        )
        compared["tokens_per_second"] = sum(lengths) / median(compared["seconds"]["ours"])
        found[f"batch {size}"] = compared
    spent = {side: min(median(part["seconds"][side]) for part in found.values()) for side in ("ours", "peer")}
    return {"ratio": spent["peer"] / spent["ours"], "queries": count, **found}  # each side at its best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--budget", type=float, default=420.0, help="seconds after which no further part starts")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write the JSON object here too")
    parser.add_argument("--quick", action="store_true", help="a tiny model, within a minute")
    options = parser.parse_args()
    need("torch", "transformers", "sentence_transformers")
    prepare(options)
    import torch

    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("this process sees no CUDA device; --quick --device cpu tries the script without one")
    options.size = TINY if options.quick else QWEN_1_5B
    started = time.perf_counter()
    record: dict[str, Any] = {"benchmark": "gpu", "peer": "sentence-transformers; transformers generate", "parts": {}}
    left_out: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        backbone = build(options, scratch)
        parts: Sequence[tuple[str, Callable[[], dict[str, Any]]]] = (
            ("parity", lambda: parity(options, scratch)),
            ("documents", lambda: documents(options, backbone, scratch)),
            ("queries", lambda: queries(options, backbone)),
        )
        for part, measure in parts:
            if time.perf_counter() - started > options.budget:
                left_out.append(part)
                continue
            record["parts"][part] = measure()
            print(json.dumps({part: record["parts"][part]}), flush=True)
            say(f"{part} done after {time.perf_counter() - started:.0f} s")
    device = torch.cuda.get_device_name() if options.device.startswith("cuda") else "cpu"
    settings = {"shape": options.size, "dtype": options.dtype, "seed": options.seed, "quick": options.quick}
    record |= {"unit": "times the peer's speed", "runs": options.runs, "left_out": left_out, "settings": settings}
    record["ratio"] = {name: part["ratio"] for name, part in record["parts"].items() if "ratio" in part}
    record |= {"seconds": time.perf_counter() - started, "machine": machine() | {"device": device}}
    finish(record | {"versions": versions("torch", "transformers", "sentence-transformers")}, options.out)


if __name__ == "__main__":
    main()
