r"""Make the folder of the package that `SearchR3("smol")` loads, of adapters that benchmarks/smol.py trained.

    python benchmarks/smol_ship.py runs/smol/out/sft --base MODEL.gguf --dev runs/smol/out/dev.json --data data/smol

Several adapters, each put into the model that the one before it made, become one set; `--rank` bounds its rank. Written
are the adapters in float16, the prompts and limits, what tells their base from another (`base.json`), the hashes of the
trained queries (`trained.bin.xz`) and the card. `--queries` adds what encodes queries (`queries/`): the adapters of a
model that a stage with frozen documents made of that one. To the adapters of the package, with their base:

    python benchmarks/smol_ship.py src/search_r3/smol --base MODEL.gguf --dev runs/smol-read/dev.json --data data/smol \
        --queries runs/smol-read/run/sft/model

`--check DATA_ROOT` looks for trained queries among those that the collections there ask outside their train splits.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import lzma
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import jinja2
import numpy as np
import torch
from common import say
from safetensors.torch import load_file, save_file
from smol_data import asked_elsewhere, normal
from torch import Tensor

from search_r3.config import Recipe, load_recipe
from search_r3.files import atomic_directory, read_jsonl, write_json, write_text
from search_r3.model.backbone import Backbone
from search_r3.model.checks import BASE_FILE, BaseFacts
from search_r3.model.encoder import SearchR3
from search_r3.model.loading import load_backbone
from search_r3.model.prompts import Mode
from search_r3.model.settings import QUERIES, SETTINGS_FILE, EmbeddingSettings, read_settings, settings_record
from search_r3.model.source import ADAPTER_CONFIG

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
HERE = Path(__file__).parent
OUT = HERE.parent / "src" / "search_r3" / "smol"
WEIGHTS, TRAINED, CARD = "adapter_model.safetensors", "trained.bin.xz", "MODEL_CARD.md"
HASH_BYTES = 5
ROW = "trainable_tokens_delta"
LICENCES = {
    "openbookqa": ("school science questions", "Apache-2.0"),
    "strategyqa_facts": ("questions of several steps", "MIT"),
    "entailmentbank": ("science questions with proofs", "CC BY 4.0"),
    "babi_support": ("made stories", "CC BY 3.0"),
    "openstax_textbooks": ("textbooks", "CC BY 3.0 and 4.0"),
    "medquad": ("medical questions", "CC BY 4.0"),
    "fairytale_qa": ("questions about stories", "Apache-2.0"),
    "factbook": ("countries", "public domain"),
    "qasc": ("science questions", "CC BY 4.0"),
    "wordnet_hops": ("words, two steps", "WordNet licence"),
    "creak": ("claims about entities", "MIT"),
    "aqua_rat": ("school algebra", "Apache-2.0"),
    "wordnet": ("words", "WordNet licence"),
    "jargon_file": ("words of programmers", "public domain"),
    "gene_ontology": ("terms of biology", "CC BY 4.0"),
    "powershell_docs": ("commands", "CC BY 4.0"),
    "tldr_pages": ("commands", "CC BY 4.0"),
    "code_search": ("functions and what they do", "permissive, by package"),
    "api_docstrings": ("interfaces", "permissive, by package"),
}
"""Source -> what it holds, and its licence."""
LEFT_OUT = {
    "not for commercial use, or in part": ("clutrr_relation", "dream", "acl_anthology"),
    "no licence is stated, or the texts are posts of third parties": ("conference_papers", "doctor_answers"),
    "its licence is stated in several ways, one of them non-commercial": ("scifact",),
    "share-alike": ("ecqa", "feverous", "comve"),
    "GPL or GFDL, whole or in part": ("gcide", "foldoc", "vera_acronyms", "nl2bash", "perl_faq"),
    "licences differ by package, copyleft among them": ("help_pages", "man_pages", "debian_packages"),
}
"""Why -> sources."""
WORSE = 0.02
"""Of nDCG: what the card calls below."""
SAME_DOCUMENTS = 0.9999
"""Least cosine of a document's vectors by the adapters and by the model whose queries are put beside them."""


def joined(folders: Sequence[Path], rank: int | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """One set of adapters that does what several in a row do, of at most that rank, and its configuration."""
    configs = [json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8")) for folder in folders]
    sets = [load_file(folder / WEIGHTS) for folder in folders]
    config, width = configs[-1], sum(one["r"] for one in configs)
    row = {name: value for one in sets for name, value in one.items() if ROW in name}
    if len(sets) == 1 and (rank or width) >= width:
        return {name: value.half() for name, value in sets[0].items()}, config
    tensors: dict[str, Tensor] = {}
    for name in sorted({key for one in sets for key in one if "lora_A" in key}):
        other = name.replace("lora_A", "lora_B")
        parts = [
            (one[name], one[other] * each["lora_alpha"] / each["r"]) for one, each in zip(sets, configs, strict=True)
        ]
        down, up = torch.cat([part[0].float() for part in parts]), torch.cat([part[1].float() for part in parts], 1)
        tensors[name], tensors[other] = shortened(down, up, rank or width)
    config |= {"r": min(rank or width, width), "lora_alpha": min(rank or width, width)}
    return {name: value.half().contiguous() for name, value in (tensors | row).items()}, config


def shortened(down: Tensor, up: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The factors `R x I` and `O x R` of the nearest product of that rank, each with half of its length."""
    left, right = torch.linalg.qr(up), torch.linalg.qr(down.T)
    u, values, v = torch.linalg.svd(left.R @ right.R.T)
    roots = values[:rank].sqrt()
    return roots[:, None] * (v[:rank] @ right.Q.T), (left.Q @ u[:, :rank]) * roots


def ship(
    adapters: Sequence[Path],
    base: str,
    out: Path,
    measures: Mapping[str, Mapping[str, float]],
    queries: Sequence[Mapping[str, Any]],
    *,
    rank: int | None = None,
    recipe: Recipe | None = None,
    query_side: Path | None = None,
    mode: Mode | None = None,
    name: str = NAME,
) -> Path:
    """Write the folder; what lay there is replaced when all is written.

    `measures`: of collections on dev, as benchmarks/smol.py writes them. `queries`: those trained on (`_id`, `text`).
    `recipe`: has the prompts and limits where none lie beside the adapters. `query_side`: the model directory whose
    `queries/` is put beside them. `mode`: of queries where nobody says it; by default the better one of the measures.
    """
    tensors, config = joined(adapters, rank)
    if mode is None:
        mode = "reason" if fmean(one["reason"] - one["direct"] for one in measures.values()) > 0 else "direct"
    saved, limits = read_settings(adapters[-1]), recipe or Recipe()
    said = (
        {name: getattr(limits, name) for name in ("prompts", "max_length", "max_new_tokens")} if saved is None else {}
    )
    whole = load_backbone(base, dtype="float32", device="cpu", settings=saved, **said)
    facts = BaseFacts.of(name, whole.causal_lm, whole.tokenizer, whole.settings.embed_token)
    settings = whole.settings.model_copy(update={"mode": mode, "trained": True})
    with atomic_directory(out) as folder:
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        write_json(folder / SETTINGS_FILE, settings_record(settings, has_queries=False))
        write_json(folder / ADAPTER_CONFIG, config | {"base_model_name_or_path": str(base), "revision": None})
        documents = load_backbone(folder, dtype="float32", device="cpu")
        facts = facts.model_copy(update={"vector": vector_of(documents, facts.probe)})
        write_json(folder / BASE_FILE, facts.model_dump())
        write_json(folder / ADAPTER_CONFIG, config | {"base_model_name_or_path": name, "revision": None})
        if query_side is not None:
            settings = add_queries(folder, query_side, documents, facts.probe)
        (folder / TRAINED).write_bytes(packed(query["text"] for query in queries))
        write_text(folder / CARD, card(name, base, measures, queries, config["r"], settings, query_side is not None))
    return out


def add_queries(folder: Path, trained: Path, documents: Backbone, text: str) -> EmbeddingSettings:
    """Write what encodes queries beside what encodes documents; the settings that are then the model's.

    `trained`: the model directory that holds it. `text`: whose vector tells whether its documents are these.
    """
    if not (trained / QUERIES / WEIGHTS).is_file():
        raise ValueError(f"{trained / QUERIES} holds no adapters; give what a stage with frozen documents wrote")
    model = load_backbone(trained, dtype="float32", device="cpu")
    one, other = (SearchR3(side).encode_document([text])[0] for side in (model, documents))
    frames, limits = zip(
        *((side.settings.frames, side.settings.max_length) for side in (model, documents)), strict=True
    )
    if float(one @ other) < SAME_DOCUMENTS or frames[0] != frames[1] or limits[0] != limits[1]:
        raise ValueError(
            f"{trained} encodes documents otherwise than the adapters do; its queries are of another model"
        )
    tensors, config = joined([trained / QUERIES], None)
    (folder / QUERIES).mkdir()
    save_file(tensors, folder / QUERIES / WEIGHTS, metadata={"format": "pt"})
    write_json(folder / QUERIES / ADAPTER_CONFIG, config | {"base_model_name_or_path": None, "revision": None})
    settings = model.settings.model_copy(update={"mode": documents.settings.mode})
    write_json(folder / SETTINGS_FILE, settings_record(settings, has_queries=True))
    return settings


def vector_of(backbone: Backbone, text: str) -> str:
    """The vector of a text in direct mode, as base64."""
    vector = SearchR3(backbone).encode_query([text], mode="direct").vectors[0]
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()


def hashes(texts: Iterable[str]) -> np.ndarray:
    """The first bytes of the SHA-256 of each text's words, as numbers in order, each once."""
    digests = (hashlib.sha256(normal(text).encode()).digest()[:HASH_BYTES] for text in texts)
    return np.unique(np.fromiter((int.from_bytes(one, "big") for one in digests), dtype=np.int64))


def packed(texts: Iterable[str]) -> bytes:
    """The hashes as differences, byte by byte, compressed."""
    steps = np.diff(hashes(texts), prepend=0).astype("<i8")
    planes = steps.view(np.uint8).reshape(-1, 8)[:, :HASH_BYTES].T
    return lzma.compress(np.ascontiguousarray(planes).tobytes(), preset=9)


def unpacked(content: bytes) -> np.ndarray:
    """The hashes that `packed` wrote."""
    planes = np.frombuffer(lzma.decompress(content), dtype=np.uint8).reshape(HASH_BYTES, -1)
    steps = np.zeros((planes.shape[1], 8), dtype=np.uint8)
    steps[:, :HASH_BYTES] = planes.T
    return np.cumsum(steps.view("<i8")[:, 0])


def trained_among(content: bytes, texts: Iterable[str]) -> list[str]:
    """Those of some texts whose words were trained on as a query."""
    known = frozenset(unpacked(content).tolist())
    return [text for text in texts if known.intersection(hashes([text]).tolist())]


def card(
    name: str,
    base: str,
    measures: Mapping[str, Mapping[str, float]],
    queries: Sequence[Mapping[str, Any]],
    rank: int,
    settings: EmbeddingSettings,
    has_queries: bool = False,
) -> str:
    """The card, in Markdown."""
    counts = dict.fromkeys(LICENCES, 0)
    for query in queries:
        source = query["_id"].partition("/")[0]
        counts[source] = counts.get(source, 0) + 1
    unlicensed = sorted(counts.keys() - LICENCES.keys())
    if unlicensed:
        raise ValueError(f"no licence is stated for {unlicensed[0]}; add it to LICENCES, or leave the source out")
    template = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
    ).from_string((HERE / "smol_card.md.jinja").read_text(encoding="utf-8"))
    return template.render(
        base=name,
        file=Path(base).name,
        mode=settings.mode,
        measures=measures,
        worse=[one for one, row in measures.items() if row["reason"] < row["direct"] - WORSE],
        count=len(queries),
        trained=frozenset(one for one, count in counts.items() if count),
        sources=[(one, count, *LICENCES[one]) for one, count in counts.items() if count],
        left_out=LEFT_OUT,
        rank=rank,
        settings=settings,
        has_queries=has_queries,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapters", type=Path, nargs="*", help="folders of adapters, in the order of their training")
    parser.add_argument("--base", help="what they were put into: a directory, a GGUF file or a hub id")
    parser.add_argument(
        "--dev",
        type=Path,
        help="what it does on dev: the dev.json of benchmarks/smol.py, with --queries that of smol_read.py",
    )
    parser.add_argument("--stage", help="whose results in it; by default the last")
    parser.add_argument("--data", type=Path, help="what benchmarks/smol_data.py wrote")
    parser.add_argument("--rank", type=int, help="at most")
    parser.add_argument("--queries", type=Path, metavar="MODEL", help="a trained model directory that holds queries/")
    parser.add_argument("--mode", choices=("direct", "reason"), help="of queries; by default the better one on dev")
    parser.add_argument(
        "--recipe", type=Path, default=HERE.parent / "recipes" / "smol-sft.yaml", help="prompts, limits"
    )
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--check", type=Path, metavar="DATA_ROOT")
    options = parser.parse_args(arguments)
    if options.adapters:
        measures = json.loads(options.dev.read_text(encoding="utf-8"))
        queries = [row for _, row in read_jsonl(options.data / "train" / "queries.jsonl")]
        ship(
            *(options.adapters, options.base, options.out, measures[options.stage or list(measures)[-1]], queries),
            rank=options.rank,
            recipe=load_recipe(options.recipe),
            query_side=options.queries,
            mode=options.mode,
        )
        for path in sorted(filter(Path.is_file, options.out.rglob("*"))):
            say(f"{path.stat().st_size:>10,} {path}")
    if options.check:
        asked = asked_elsewhere(options.check)
        both = trained_among((options.out / TRAINED).read_bytes(), asked)
        say(
            f"{len(asked):,} queries are asked outside train splits, {len(both)} of them trained on"
            + str(both[:3]) * bool(both)
        )
        return int(bool(both))
    return 0


if __name__ == "__main__":
    sys.exit(main())
