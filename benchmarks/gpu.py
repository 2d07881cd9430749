"""The encoding engine on a GPU, in two minutes and a half: speed, memory and parity.

    pip install search-r3[benchmarks]
    python benchmarks/gpu.py --out gpu.json          # Qwen2.5-1.5B's shape, random weights, bfloat16
    python benchmarks/gpu.py --quick --device cpu    # the same code at a tiny size, to try it

Documents: tokens/s as a share of the device's measured matrix-product rate, and against sentence-transformers at its
best batch size; decoding with a look at the device after every token and after several, one kernel after the other and
as CUDA graphs; reasoning queries, in the fastest of these ways, against `transformers.generate` with a second forward
pass; peak memory of each; CUDA against the CPU (a small model in float32); what torch's kernels of attention cost.

A part that would start after --budget seconds is left out and named in `left_out`; runs are repeated while a part's own
seconds last, once at least. Each part's record is printed, and written to --out, as soon as it is there; Ctrl-C ends
with what there is. The last line is one JSON object of all of them.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from common import GenerateThenEmbed, Shape, make_model, need, never_ending, prepare, reasoning_lengths, say
from gpu_decoding import decoding
from gpu_record import Record, default_threads, made_up_texts, texts_of, timed

QWEN_1_5B = {"layers": 28, "hidden": 1536, "heads": 12, "key_heads": 2, "intermediate": 8960, "vocabulary": 151936}
TINY = {"layers": 2, "hidden": 64, "heads": 4, "key_heads": 2, "intermediate": 128, "vocabulary": 2048}


def against(
    options: argparse.Namespace,
    found: dict[str, Any],
    seconds: float,
    ours: Callable[[], Any],
    peer: Callable[[], Any],
) -> None:
    """Alternating runs, as many as `--runs` and these seconds allow, one at least; the ratio of the medians."""
    spent: dict[str, list[float]] = {"ours": [], "peer": []}
    peaks = {"ours": 0, "peer": 0}
    started = time.perf_counter()
    for run in range(options.runs):
        if run and (time.perf_counter() - started) * (run + 1) / run > seconds:
            break
        for side, work in (("ours", ours), ("peer", peer))[:: 1 if run % 2 == 0 else -1]:
            took, peak = timed(options.device, work)
            spent[side].append(took)
            peaks[side] = max(peaks[side], peak)
            say(f"run {run + 1}, {side}: {took:.2f} s")
        found["ratio"] = median(spent["peer"]) / median(spent["ours"])
        found |= {"seconds": spent, "peak_bytes": peaks}


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

    from search_r3.model.backbone import Backbone
    from search_r3.model.loading import load_backbone

    vocabulary = 2000 if options.quick else 8000
    texts = made_up_texts(options.seed)
    small = load_backbone(make_model(scratch / "small", texts, Shape(2, 128), vocabulary, 4096, options.seed))
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
    torch.backends.cuda.enable_cudnn_sdp(False)  # as `load_backbone` does, and so for the peers too
    with torch.device(options.device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, options.dtype)).eval()
    settings = small.settings.model_copy(update={"max_length": 1024, "max_new_tokens": 512})
    return Backbone(model, small.tokenizer, settings, small.embed_token_id, "random")


def parity(options: argparse.Namespace, scratch: Path, found: dict[str, Any]) -> None:
    """The same small model in float32 on the CPU and on the device, and in the half type on the device."""
    import numpy as np

    from search_r3 import SearchR3

    folder = make_model(scratch / "parity", made_up_texts(options.seed), Shape(4, 128), 2000, 2048, options.seed)
    texts = texts_of(32, 30, options.seed)
    exact = SearchR3(folder, device="cpu")
    expected, here = exact.encode_document(texts), exact.encode_query(texts[:16], max_new_tokens=24)
    for name, dtype in (("float32", "float32"), ("half", options.dtype)):
        other = SearchR3(folder, device=options.device, dtype=dtype)
        documents = other.encode_document(texts)
        there = other.encode_query(texts[:16], max_new_tokens=24)
        same = [i for i in range(16) if here.reasoning[i] == there.reasoning[i]]
        found[name] = {
            "documents_largest_difference": float(np.abs(documents - expected).max()),
            "documents_least_cosine": float((documents * expected).sum(-1).min()),
            "same_reasoning": len(same) / 16,
            "queries_largest_difference": float(np.abs(here.vectors - there.vectors)[same].max()) if same else None,
        }


def attention(options: argparse.Namespace, found: dict[str, Any]) -> None:
    """Milliseconds of torch's attention: shapes that are new with cuDNN's allowed, and grouped heads in float32.

    The first is why `load_backbone` forbids cuDNN's; the second tells what the engine's way costs in float32, where no
    fast kernel takes fewer heads of keys than of queries.
    """
    import torch

    heads, groups, size = options.size["heads"], options.size["key_heads"], 128
    attend = torch.nn.functional.scaled_dot_product_attention

    def tensors(batch: int, queries: int, keys: int, dtype: str) -> list[Any]:
        shapes = (batch, heads, queries, size), (batch, groups, keys, size), (batch, groups, keys, size)
        return [torch.randn(shape, device=options.device, dtype=getattr(torch, dtype)) for shape in shapes]

    def decode(keys: int) -> None:
        query, key, value = tensors(64, 1, keys, options.dtype)
        grouped = query.view(64, groups, heads // groups, size)
        mask = (torch.arange(keys, device=options.device) < keys - 1).expand(64, 1, heads // groups, keys)
        attend(grouped, key, value, attn_mask=mask)

    def causal(batch: int, length: int, dtype: str, repeat: bool = False) -> None:
        query, key, value = tensors(batch, length, length, dtype)
        if repeat:
            key, value = (part.repeat_interleave(heads // groups, 1) for part in (key, value))
        attend(query, key, value, is_causal=True, enable_gqa=not repeat)

    shapes: dict[str, Callable[[int], None]] = {
        "decoding": lambda run: decode(200 + run),
        "prefill": lambda run: causal(4, 300 + run, options.dtype),
    }
    for allowed in (False, True):
        torch.backends.cuda.enable_cudnn_sdp(allowed)
        name = "cudnn_allowed" if allowed else "cudnn_forbidden"
        found[name] = {}
        try:
            for kind, work in shapes.items():
                work(0)
                spent = [timed(options.device, lambda run=run, work=work: work(run))[0] for run in range(1, 5)]
                found[name][kind] = 1000 * median(spent)
        finally:
            torch.backends.cuda.enable_cudnn_sdp(False)
    batch, length = (2, 64) if options.quick else (32, 512)
    for name, dtype, repeat in (
        ("causal", options.dtype, False),
        ("float32_grouped", "float32", False),
        ("float32_repeated", "float32", True),
    ):
        causal(batch, length, dtype, repeat)
        spent = [
            timed(options.device, lambda dtype=dtype, repeat=repeat: causal(batch, length, dtype, repeat))[0]
            for _ in range(3)
        ]
        found[name] = 1000 * median(spent)


def documents(options: argparse.Namespace, backbone: Any, scratch: Path, found: dict[str, Any]) -> None:
    """Documents of 8 to 700 words against sentence-transformers.

    `share_of_rate` counts the tokens that are computed: the template before the text is computed once for all.
    """
    from sentence_transformers import SentenceTransformer

    from search_r3 import SearchR3
    from search_r3.model.export import export_sentence_transformers

    count = 48 if options.quick else 1536
    texts, model = texts_of(count, 120, options.seed), SearchR3(backbone)
    lengths = model.count_document_tokens(texts)
    tokens = sum(lengths)
    computed = tokens - count * len(backbone.prompt_encoder.frame("document")[0])
    rate = product_rate(options)
    flop = 2 * sum(weight.numel() for weight in backbone.causal_lm.base_model.layers.parameters()) * computed
    found |= {"documents": count, "tokens": tokens, "tokens_computed": computed, "longest": max(lengths)}
    found |= {"product_rate": rate, "by_batch_tokens": {}, "peer_by_batch_size": {}}
    say(f"{rate / 1e12:.3g} TFLOP/s in matrix products; {tokens} tokens")
    begun = time.perf_counter()
    backbone.prompt_encoder.encode_batch(texts, "document")
    found["tokenise_seconds"] = time.perf_counter() - begun
    kept: dict[str, Any] = {}
    for batch_tokens in (2048,) if options.quick else (16384, 32768, 65536):
        model.encode_document(texts[: count // 8], batch_tokens=batch_tokens)
        spent, _ = timed(
            options.device,
            lambda size=batch_tokens: kept.update(ours=model.encode_document(texts, batch_tokens=size)),
        )
        speed = {"seconds": spent, "tokens_per_second": tokens / spent, "share_of_rate": flop / spent / rate}
        found["by_batch_tokens"][str(batch_tokens)] = speed
        say(f"ours, {batch_tokens} tokens a batch: {spent:.2f} s, {flop / spent / rate:.3f} of the rate")
    best = max(found["by_batch_tokens"], key=lambda size: found["by_batch_tokens"][size]["tokens_per_second"])
    found |= {"batch_tokens": int(best), **found["by_batch_tokens"][best]}
    export_sentence_transformers(backbone, scratch / "sentence-transformers")
    peer = SentenceTransformer(
        str(scratch / "sentence-transformers"), device=options.device, model_kwargs={"dtype": options.dtype}
    )
    for size in (16,) if options.quick else (32, 128):
        peer.encode_document(texts[: count // 8], batch_size=size)
        spent, _ = timed(
            options.device, lambda size=size: kept.update(peer=peer.encode_document(texts, batch_size=size))
        )
        found["peer_by_batch_size"][str(size)] = spent
        say(f"sentence-transformers, {size} documents a batch: {spent:.2f} s")
    found["least_cosine_to_peer"] = float((kept["ours"] * kept["peer"]).sum(-1).min())
    fastest = min(found["peer_by_batch_size"], key=lambda size: found["peer_by_batch_size"][size])
    found["peer_batch_size"] = int(fastest)
    against(
        options,
        found,
        12.0,
        lambda: model.encode_document(texts, batch_tokens=int(best)),
        lambda: peer.encode_document(texts, batch_size=int(fastest)),
    )
    spent = median(found["seconds"]["ours"])
    found |= {"tokens_per_second": tokens / spent, "share_of_rate": flop / spent / rate}


def queries(options: argparse.Namespace, backbone: Any, found: dict[str, Any]) -> None:
    """Reasoning of 20 to 300 tokens against `generate` and a second forward pass, each side at its best batch size."""
    from search_r3 import SearchR3

    never_ending(backbone)
    model = SearchR3(backbone)
    peer = GenerateThenEmbed(backbone.model, backbone.tokenizer.pad_token_id, backbone.embed_token_id, 0.0)
    count, longest = (12, 40) if options.quick else (256, 300)
    lengths = reasoning_lengths(count, options.seed, longest)
    prompts = [prompt.ids for prompt in backbone.prompt_encoder.encode_batch(texts_of(count, 12, 1), "reason")]
    found |= {"by_batch_size": {}, "graphs": backbone.graphs}
    for size, rows, seconds in ((8, 12, 20.0),) if options.quick else ((256, 256, 20.0), (64, 128, 5.0)):
        asked, budgets = prompts[:rows], lengths[:rows]
        model.rollouts(asked[:size], max_new_tokens=9, batch_size=size)
        peer(asked[:size], [8] * min(size, rows), size)
        here: dict[str, Any] = {"queries": rows, "tokens": sum(budgets)}
        found["by_batch_size"][str(size)] = here
        against(
            options,
            here,
            seconds,
            lambda size=size, asked=asked, budgets=budgets: model.rollouts(
                asked, max_new_tokens=[n + 1 for n in budgets], batch_size=size
            ),
            lambda size=size, asked=asked, budgets=budgets: peer(asked, budgets, size),
        )
        here["tokens_per_second"] = {side: sum(budgets) / median(spent) for side, spent in here["seconds"].items()}
        speeds = [part["tokens_per_second"] for part in found["by_batch_size"].values()]
        best = {side: max(speed[side] for speed in speeds) for side in ("ours", "peer")}
        found |= {"ratio": best["ours"] / best["peer"], "tokens_per_second": best["ours"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--budget", type=float, default=130.0, help="seconds after which no further part starts")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--out", type=Path, help="write the JSON object here too")
    parser.add_argument("--quick", action="store_true", help="a tiny model, within a minute")
    options = parser.parse_args()
    record = Record(
        {"benchmark": "gpu", "peer": "sentence-transformers; transformers generate", "unit": "times the peer's speed"},
        options.out,
        options.budget,
        options.device,
    )
    need("torch", "transformers", "sentence_transformers")
    prepare(options)
    import torch

    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("this process sees no CUDA device; --quick --device cpu tries the script without one")
    options.size = TINY if options.quick else QWEN_1_5B
    record.values["settings"] = {
        "shape": options.size, "dtype": options.dtype, "runs": options.runs, "seed": options.seed,
        "threads": options.threads, "quick": options.quick,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        backbone = build(options, scratch)
        say(f"model built, {record.left:.0f} s are left")
        record.measure(
            [
                ("attention", lambda found: attention(options, found)),
                ("documents", lambda found: documents(options, backbone, scratch, found)),
                ("decoding", lambda found: decoding(options, backbone, found)),
                ("queries", lambda found: queries(options, backbone, found)),
                ("parity", lambda found: parity(options, scratch, found)),
            ]
        )
    record.finish("torch", "transformers", "sentence-transformers")


if __name__ == "__main__":
    main()
