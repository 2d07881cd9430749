"""Real pretrained models, untrained by us: their vectors, their prompts and replies, and what they cost.

`python benchmarks/real_models.py MODEL.gguf ... --out FOLDER` does three things with each model, or those of `--parts`:

- `parity`: vectors and log-probabilities of both engines, in float32, against the model's own forward pass over each
  sequence alone, by a model that transformers loaded without us.
- `replies`: a page, `replies.md`, with a prompt as the model sees it and its greedy reasoning on ten queries.
- `timing`: seconds per query and documents per second, in float32 and bfloat16, against transformers' `generate` in the
  same batch and a plain forward pass over padded batches, in alternating runs; a table, `timing.md`.

A model is saved once, as a directory under `--out`. One JSON object goes to stdout and `record.json`.
"""

from __future__ import annotations

import argparse
import random
import sys
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from common import (
    GenerateThenEmbed,
    alternating,
    atlas_texts,
    check_vectors,
    fastest,
    finish,
    machine,
    need,
    never_ending,
    prepare,
    ratio_of_medians,
    say,
    versions,
)

PARTS = ("parity", "replies", "timing")
QUERIES = [
    "What is the capital of France?",
    "why do leaves turn red in autumn",
    "How do I reverse a list in Python without changing the original?",
    "the author of the book about a whale and the captain who hunts it",
    "side effects of taking ibuprofen with aspirin",
    "Which river flows through Vienna, Budapest and Belgrade?",
    "cheap way to keep a house cool in summer",
    "What happens to the boiling point of water on a high mountain?",
    "function that removes duplicate rows from a table in SQL",
    "Who was the first woman to win a Nobel Prize, and in what field?",
]
NEW_TOKENS = 48
NEAR = {"vectors": 1e-5, "logprobs": 1e-4}
"""What rounding in float32 may change: in a coordinate of a vector of length 1, and in a log-probability."""


def long_texts(count: int, words: int) -> list[str]:
    """Texts of about that many words, made of the facts of the collection `atlas-wide`."""
    facts = atlas_texts()
    random.Random(0).shuffle(facts)
    flow = " ".join(facts).split()
    step = words + words // 7  # so that texts are of unlike lengths
    return [" ".join(flow[i * step : i * step + words * 3 // 4 + i * 37 % (words // 2)]) for i in range(count)]


def unpacked(path: Path, out: Path, chat_template: Path | None) -> Path:
    """The model as a directory that holds the embed token's row, too; a GGUF file takes minutes, once."""
    from search_r3 import SearchR3
    from search_r3.errors import ModelError

    if (path / "search_r3.json").is_file():
        return path
    folder = out / path.name.removesuffix(".gguf")
    if not folder.is_dir():
        say(f"unpacking {path.name}")
        options: dict[str, Any] = {"dtype": "float32", "device": "cpu"}
        try:
            model = SearchR3(path, **options)
        except ModelError as error:
            if chat_template is None or "no chat template" not in str(error):
                raise
            more = {"chat_template": chat_template.read_text(encoding="utf-8")}
            model = SearchR3(path, tokenizer_kwargs=more, **options)
        model.save_pretrained(folder)
    return folder


def own_model(folder: Path, dtype: str) -> Any:
    """The model as transformers alone loads it."""
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def parity(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """How far both engines are at most from the model's own forward pass, and whether that is rounding."""
    import torch

    from search_r3 import SearchR3

    backbone = SearchR3(folder, dtype="float32", device="cpu").backbone
    own = own_model(folder, "float32")

    @torch.no_grad()
    def forward(ids: list[int], reply: int = 0) -> tuple[Any, Any]:
        options = {"use_cache": False, "output_hidden_states": True, "logits_to_keep": reply + 1}
        output = own(input_ids=torch.tensor([ids]), **options)
        vector = torch.nn.functional.normalize(output.hidden_states[-1][0, -1], dim=-1)
        return vector, output.logits[0, :-1].log_softmax(-1)

    encode = backbone.prompt_encoder.encode_batch
    texts = [QUERIES[0], *long_texts(2, 100), " ".join(long_texts(7, 75))]
    prompts = [prompt.ids for prompt in encode(texts, "document")]
    assert 600 < max(map(len, prompts)) < backbone.settings.max_length, "longer than a window of 512, and whole"
    documents = [forward(ids)[0] for ids in prompts]
    found: dict[str, Any] = {"engine": backbone.engine, "tokens": list(map(len, prompts))}
    engines = {"fallback": replace(backbone, model=own, engine="fallback"), backbone.engine: backbone}
    for name, one in engines.items():
        model = SearchR3(one)
        vectors = torch.from_numpy(model.encode_document(texts, batch_tokens=10**6))  # all in one batch
        worst = {"vectors": float((vectors - torch.stack(documents)).abs().max()), "logprobs": 0.0, "behind_best": 0.0}
        asked = [QUERIES[0], QUERIES[2], texts[-1]]
        asked_ids = [prompt.ids for prompt in encode(asked, "reason")]
        for reply in model.rollouts(asked_ids, max_new_tokens=8 if options.quick else NEW_TOKENS):
            vector, logprobs = forward([*reply.prompt_ids, *reply.completion_ids], len(reply.completion_ids))
            chosen = logprobs.gather(-1, torch.tensor(reply.completion_ids)[:, None])[:, 0]
            mask = torch.tensor(reply.completion_mask)
            gap = float(((chosen - torch.tensor(reply.logprobs)) * mask).abs().max())
            behind = float(((logprobs.max(-1).values - chosen) * mask).max())
            off = {"vectors": float((vector - reply.vector).abs().max()), "logprobs": gap, "behind_best": behind}
            worst = {key: max(worst[key], off[key]) for key in worst}  # `behind_best`: greedy, so none was likelier
        found[name] = worst
        say(f"{folder.name} {name}: {worst}")
        if worst["vectors"] > NEAR["vectors"] or max(worst["logprobs"], worst["behind_best"]) > NEAR["logprobs"]:
            found["wrong"] = True
    return found


def replies(folder: Path, options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The model's reasoning on the queries, and its part of the page."""
    from search_r3 import SearchR3

    model = SearchR3(folder, dtype="float32", device="cpu")
    queries = QUERIES[:2] if options.quick else QUERIES
    result = model.encode_query(queries, max_new_tokens=8 if options.quick else 128)
    encoder, tokenizer = model.backbone.prompt_encoder, model.backbone.tokenizer
    shown = {kind: tokenizer.decode(encoder.encode(queries[0], kind).ids) for kind in ("reason", "document")}
    ends = ", ".join(f"`{one}`" for one in tokenizer.convert_ids_to_tokens(sorted(encoder.end_token_ids)))
    lines = [f"## {folder.name}", "", f"A reply ends at {ends}.", ""]
    for kind, text in shown.items():
        lines += [f"Prompt ({kind}):", "", "```", text, "```", ""]
    rows = zip(queries, result.reasoning, result.reasoning_tokens, result.forced, strict=True)
    for query, reasoning, count, forced in rows:
        lines += [f"**{query}** ({count} tokens{', embed token forced' if forced else ''})", ""]
        lines += ["```", reasoning, "```", ""]
    return {"prompts": shown, "queries": queries, "reasoning": result.reasoning}, "\n".join(lines)


def timing(folder: Path, dtype: str, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of both sides on the same work: reasoning, direct queries, documents."""
    from search_r3 import SearchR3

    queries = QUERIES[:2] if options.quick else QUERIES
    documents = long_texts(4 if options.quick else 48, 100)
    budget = 8 if options.quick else NEW_TOKENS
    model, own = SearchR3(folder, dtype=dtype, device="cpu"), own_model(folder, dtype)
    backbone, encode = model.backbone, model.backbone.prompt_encoder.encode_batch
    work_texts = {"reason": queries, "direct": queries, "document": documents}
    reason, direct, document_ids = ([one.ids for one in encode(texts, kind)] for kind, texts in work_texts.items())
    never_ending(backbone)  # so that both sides write as many tokens
    own.set_output_embeddings(backbone.causal_lm.get_output_embeddings())
    peer = GenerateThenEmbed(own, backbone.tokenizer.pad_token_id, backbone.embed_token_id, 0.0)
    lengths = [budget - 1] * len(queries)
    size, tried = fastest(lambda size: peer.embed(document_ids, size), (4, 32))
    work = {
        "reason": (
            lambda: model.encode_query(queries, max_new_tokens=budget),
            lambda: peer(reason, lengths, len(queries)),
        ),
        "direct": (lambda: model.encode_query(queries, mode="direct"), lambda: peer.embed(direct, len(queries))),
        "documents": (lambda: model.encode_document(documents), lambda: peer.embed(document_ids, size)),
    }
    found: dict[str, Any] = {"peer_batch": size, "peer_batches_tried": tried}
    for name, (ours, theirs) in work.items():
        a, b = ours(), theirs()  # also a warm-up
        if name == "reason":
            assert a.reasoning_tokens == lengths
            texts = map(backbone.prompt_encoder.decode, b[1])
            found["replies_alike"] = sum(x == y for x, y in zip(a.reasoning, texts, strict=True))  # near ties may tip
        elif dtype == "float32":
            check_vectors(getattr(a, "vectors", a), b, NEAR["vectors"])
        spent = alternating({"search-r3": ours, "peer": theirs}, options.runs)
        count = len(documents) if name == "documents" else len(queries)
        found[name] = {"count": count, "seconds": spent, "ratio": ratio_of_medians(*spent.values())}
    return found


def timing_rows(name: str, found: dict[str, Any]) -> list[str]:
    """A model's rows of the table."""
    rows = []
    for dtype, one in found.items():
        cells = []
        for kind in ("reason", "direct", "documents"):
            ours, peer = (median(values) / one[kind]["count"] for values in one[kind]["seconds"].values())
            cells += [f"{1 / ours:.1f} | {1 / peer:.1f}" if kind == "documents" else f"{ours:.3f} | {peer:.3f}"]
        rows.append(f"| {name} | {dtype} | {' | '.join(cells)} |")
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL", help="a GGUF file or a model directory")
    parser.add_argument("--out", type=Path, required=True, help="folder of unpacked models and of what is found")
    parser.add_argument("--chat-template", type=Path, help="a file for models that have none, such as bases")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--runs", type=int, default=3, help="alternating runs; medians count")
    parser.add_argument("--threads", type=int, default=machine()["cores"])
    parser.add_argument("--quick", action="store_true", help="few texts, few tokens, one run")
    options = parser.parse_args()
    need("babel", "gguf", "accelerate")
    options.runs, options.seed = 1 if options.quick else options.runs, 0
    prepare(options)
    options.out.mkdir(parents=True, exist_ok=True)
    packages = versions("torch", "transformers", "search-r3")
    record: dict[str, Any] = machine() | {"threads": options.threads, "versions": packages, "models": {}}
    pages = [f"# Replies of models that no stage has trained\n\nGreedy, float32; {packages}\n"]
    table = ["| model | precision | reasoning, s/query | `generate` | direct, s/query | plain | documents/s | plain |"]
    table.append("|---" * 8 + "|")
    for path in options.models:
        folder = unpacked(path, options.out, options.chat_template)
        found = record["models"][folder.name] = {}
        if "parity" in options.parts:
            found["parity"] = parity(folder, options)
        if "replies" in options.parts:
            found["replies"], page = replies(folder, options)
            pages.append(page)
        if "timing" in options.parts:
            found["timing"] = {dtype: timing(folder, dtype, options) for dtype in ("float32", "bfloat16")}
            table += timing_rows(folder.name, found["timing"])
    for name, lines in {"replies": pages, "timing": table}.items():
        if name in options.parts:
            (options.out / f"{name}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    finish(record, options.out / "record.json")
    return int(any(one.get("parity", {}).get("wrong", False) for one in record["models"].values()))


if __name__ == "__main__":
    sys.exit(main())
