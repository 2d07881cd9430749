"""SmolLM2-135M-Instruct out of its GGUF file: in parts that travel, and as a directory that transformers loads.

    python benchmarks/smol_base.py pack SmolLM2-135M-Instruct.Q4_1.gguf TOKENIZER OUT    # needs the package gguf
    python benchmarks/smol_base.py unpack OUT/part1.safetensors OUT/part2.safetensors BASE

The parts hold the file's own blocks of 4 and 8 bits; what they unpack to equals what transformers reads of the GGUF
file, to the bit. TOKENIZER is the folder that transformers saves of the file's tokenizer.
"""

from __future__ import annotations

import argparse
import json
import lzma
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

HEADS, KEY_HEADS, LAYERS = 9, 3, 30
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.02,
    "intermediate_size": 1536,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": KEY_HEADS,
    "pad_token_id": 2,
    "rms_norm_eps": 9.999999747378752e-06,
    "rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"},
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
    "vocab_size": 49152,
}
NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""Layer of the GGUF file -> layer of transformers."""
BLOCK = 32
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def pack(gguf_file: Path, tokenizer: Path, out: Path) -> None:
    """Write the tensors' blocks into two parts, and the tokenizer's files beside them."""
    from gguf import GGUFReader

    out.mkdir(parents=True, exist_ok=True)
    parts: list[dict[str, torch.Tensor]] = [{}, {}]
    facts: list[dict[str, str]] = [{}, {}]
    reader = GGUFReader(gguf_file)
    sizes = sorted((tensor.data.nbytes for tensor in reader.tensors), reverse=True)
    limit, used = 0.55 * sum(sizes), 0
    for tensor in reader.tensors:
        used += tensor.data.nbytes
        part = 0 if used < limit else 1
        parts[part][tensor.name] = torch.from_numpy(np.ascontiguousarray(tensor.data))
        facts[part][tensor.name] = json.dumps([tensor.tensor_type.name, [int(size) for size in tensor.shape[::-1]]])
    for number, (tensors, kinds) in enumerate(zip(parts, facts, strict=True), 1):
        save_file(tensors, out / f"part{number}.safetensors", metadata=kinds)
    for name in TOKENIZER:
        (out / f"{name}.xz").write_bytes(lzma.compress((tokenizer / name).read_bytes()))


def unpack(parts: Sequence[Path], out: Path) -> None:
    """Write a model directory in float32 from the parts and from the tokenizer beside one of them."""
    weights: dict[str, torch.Tensor] = {}
    for path in parts:
        with safe_open(path, "pt") as file:
            for name, fact in file.metadata().items():
                kind, shape = json.loads(fact)
                weights[renamed(name)] = reordered(name, dequantised(file.get_tensor(name).numpy(), kind, shape))
    out.mkdir(parents=True, exist_ok=True)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(CONFIG, indent=2), encoding="utf-8")
    folder = next(path.parent for path in parts if (path.parent / f"{TOKENIZER[0]}.xz").exists())
    for name in TOKENIZER:
        (out / name).write_bytes(lzma.decompress((folder / f"{name}.xz").read_bytes()))


def dequantised(data: Any, kind: str, shape: Sequence[int]) -> Any:
    """Numbers of blocks: Q8_0 (scale, 32 bytes) and Q4_1 (scale, minimum, 32 half bytes: low ones first)."""
    if kind == "F32":
        return data.reshape(shape)
    blocks = data.reshape(-1, {"Q8_0": 2 + BLOCK, "Q4_1": 4 + BLOCK // 2}[kind])
    scale = np.ascontiguousarray(blocks[:, :2]).view(np.float16).astype(np.float32)
    if kind == "Q8_0":
        return (np.ascontiguousarray(blocks[:, 2:]).view(np.int8).astype(np.float32) * scale).reshape(shape)
    lowest = np.ascontiguousarray(blocks[:, 2:4]).view(np.float16).astype(np.float32)
    halves = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1).astype(np.float32)
    return (halves * scale + lowest).reshape(shape)


def reordered(name: str, values: Any) -> torch.Tensor:
    """Rows of queries and keys in transformers' order; llama.cpp interleaves the halves of each head."""
    for layer, heads in (("attn_q.", HEADS), ("attn_k.", KEY_HEADS)):
        if layer in name:
            rows, columns = values.shape
            values = values.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
    return torch.from_numpy(np.ascontiguousarray(values))


def renamed(name: str) -> str:
    """Transformers' name of a tensor."""
    whole = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    if name in whole:
        return whole[name]
    _, number, layer, _ = name.split(".")
    return f"model.layers.{number}.{NAMES[layer]}.weight"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("pack", "unpack"))
    parser.add_argument("paths", type=Path, nargs=3)
    options = parser.parse_args()
    if options.command == "pack":
        pack(*options.paths)
    else:
        unpack(options.paths[:2], options.paths[2])


if __name__ == "__main__":
    main()
