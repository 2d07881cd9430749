"""Write the direct mode of a model as a directory that sentence-transformers loads by itself.

sentence-transformers puts a prompt before the text and tokenizes both together; `PromptEncoder` tokenizes the text
by itself, between the ids of the template. Three changes to the copy of the tokenizer make both give the same ids:
its post-processor appends what follows the text, its normalizer strips the text behind the prompt, and its special
tokens get names of their own, so that a text which spells `<|im_end|>` keeps it as plain text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..errors import ModelError
from ..files import atomic_directory, check_replaceable, write_json, write_text
from .adapters import merged_queries
from .backbone import Backbone, storage_state, without_bars
from .prompts import Kind

_KINDS: dict[str, Kind] = {"query": "direct", "document": "document"}
_MARK = "\u2402"  # before the name of each special token; a text would have to spell both to be misread
_SPACE = r"[\s\x1c-\x1f]"  # what str.strip() removes: Unicode's white space and four control characters
# transformers 5 builds the tokenizer of some architectures (Qwen2) anew from the vocabulary, without the normalizer,
# whatever tokenizer_class says. A type whose class takes tokenizer.json as it stands, and that class, prevent it.
_PLAIN_TYPE, _PLAIN_CLASS = "glm", "PreTrainedTokenizerFast"
# Every one is written: sentence-transformers before 6 also pools by the mean unless told not to.
_POOLING_MODES = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
_PROBES = ("a", " \t\n red\r\nhouse \n\u3000", "1", ".", "'s", "\u0301e", "日本", "🙂", "red house " * 20)

_README = """---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
tags:
- sentence-transformers
- feature-extraction
- search-r3
---

# Search-R3 model, direct mode

The direct mode of a [Search-R3](https://arxiv.org/abs/2510.07048) model: a query or a document goes into the model's
chat prompt, and the hidden state of the embed token that ends the prompt is its vector ({dimension} values, length 1).
Reason mode, which thinks about a query first, needs the `search-r3` package and the model this copy was made from.

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("path/to/this/directory")
queries = model.encode_query(["what do people pay with in Tashkent?"])
documents = model.encode_document(["The Uzbekistani som is a currency."])
print(model.similarity(queries, documents))
```

- Texts longer than {max_length} tokens, prompt included, lose their end.
- `encode` without a prompt name encodes a query. The prompts are in `config_sentence_transformers.json`; special tokens
  are written there with the sign `{mark}` before their name. Only a text that spells that sign and such a name is read
  as the token; `<|im_end|>` and the like in a text stay plain text.
- `tokenizer.json` holds the rest of the prompt and has to be loaded as it stands. sentence-transformers does so;
  `AutoTokenizer` by itself may build another tokenizer, which does not strip the text.
{sides}"""

_TWO_SIDES = """- Queries and documents have weights of their own (a `Router`, since sentence-transformers 5): call
  `encode_query` and `encode_document`. `encode` takes those of queries, whatever its prompt.
"""


def export_sentence_transformers(backbone: Backbone, folder: str | Path, dtype: str | None = None) -> None:
    """Write a directory for `SentenceTransformer(folder)`, which then needs neither this package nor remote code.

    Its `encode_query` gives the vectors of `SearchR3.encode_query(texts, mode="direct")` and its `encode_document`
    those of `SearchR3.encode_document(texts)`, to 1e-5 in float32. Written are the weights without the output layer, a
    tokenizer that adds the rest of the prompt, the prompts, and a model card; an existing folder is replaced when all
    is written. Where documents have weights of their own, a Router holds both sides.

    Known limits: a text that spells a special token with the sign U+2402 before it is read as that token (the token's
    plain name stays text); a blank text gets a vector instead of an error; nothing tells that a text was cut.

    Args:
        backbone: the model; LoRA adapters must be merged into it.
        folder: the directory to write.
        dtype: storage type of the weights (`float16` halves the file); as they are by default.

    Raises:
        ModelError: adapters are not merged, the folder holds the model itself, or the prompt or the tokenizer cannot
            be expressed in sentence-transformers.
        ConfigError: the folder holds something else than such an export.
    """
    sides = {"": backbone}
    if backbone.documents is not None:
        sides = {"query": merged_queries(backbone), "document": backbone.documents}
    for side in sides.values():
        check_exportable(side, Path(folder))
    check_replaceable(Path(folder), ("modules.json",))
    frames = {name: backbone.prompt_encoder.frame(kind) for name, kind in _KINDS.items()}
    suffix = frames["query"][1]
    if frames["document"][1] != suffix:
        raise ModelError("the prompt goes on differently after a query and after a document; use one chat template")
    special = _special_names(backbone)
    pieces = {name: _spell(backbone, before, special) for name, (before, _) in frames.items()}
    prompts = {name: "".join(parts) for name, parts in pieces.items()}
    tokenizer = _tokenizer(backbone, list(pieces.values()), suffix, special)
    _check_ids(backbone, tokenizer, prompts)
    with atomic_directory(Path(folder)) as out, without_bars():
        for name, side in sides.items():
            _save_weights(side.model.base_model, out / name, dtype)
            _write_tokenizer(out / name, backbone, tokenizer, special)
        _write_settings(out, backbone, prompts, list(sides))


def check_exportable(backbone: Backbone, target: Path) -> None:
    """Refuse unmerged adapters, and to write over the model itself.

    Raises:
        ModelError: it is so.
    """
    if hasattr(backbone.model, "peft_config"):
        raise ModelError("the model has unmerged adapters (LoRA); call its merge_and_unload() and export the result")
    source = Path(backbone.source)
    if source.exists() and source.resolve().is_relative_to(target.resolve()):
        raise ModelError(f"an export to {target} would replace the model in {source}; give another folder")


def _special_names(backbone: Backbone) -> dict[int, str]:
    """The name that each special token has in the export, by id."""
    added = backbone.tokenizer.backend_tokenizer.get_added_tokens_decoder()
    return {token_id: _MARK + token.content for token_id, token in added.items() if token.special}


def _spell(backbone: Backbone, ids: Sequence[int], special: dict[int, str]) -> list[str]:
    """The text that the exported tokenizer turns into these ids: plain, special, plain, ..., special, plain."""
    decode = backbone.tokenizer.backend_tokenizer.decode
    pieces: list[str] = []
    run: list[int] = []
    for token_id in ids:
        if token_id in special:
            pieces += [decode(run, skip_special_tokens=False), special[token_id]]
            run = []
        else:
            run.append(token_id)
    return [*pieces, decode(run, skip_special_tokens=False)]


def _tokenizer(
    backbone: Backbone, prompts: Sequence[Sequence[str]], suffix: Sequence[int], special: dict[int, str]
) -> Any:
    """A copy of the tokenizer (of the `tokenizers` library) for prompts in pieces, as `_spell` gives them."""
    from tokenizers import Tokenizer, normalizers
    from tokenizers.processors import TemplateProcessing

    spec = json.loads(backbone.tokenizer.backend_tokenizer.to_str())
    _rename(spec, special)
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    strip = [normalizers.Replace(pattern, "") for pattern in _strip_patterns(prompts)]
    own = [] if tokenizer.normalizer is None else [tokenizer.normalizer]
    tokenizer.normalizer = normalizers.Sequence([*strip, *own])
    # Truncation leaves room for these ids, as for any special token: it cuts the text and keeps them.
    names = [tokenizer.id_to_token(token_id) for token_id in suffix]
    reply = {"id": "reply", "ids": list(suffix), "tokens": names}
    tokenizer.post_processor = TemplateProcessing(single="$A reply", special_tokens=[reply])
    return tokenizer


def _rename(spec: dict[str, Any], special: dict[int, str]) -> None:
    """Give special tokens their new names in a tokenizer.json, wherever it spells them."""
    new = {token["content"]: special[token["id"]] for token in spec["added_tokens"] if token["special"]}
    for token in spec["added_tokens"]:
        # The others are still found in a text; only after the normalizer, which has to see the text in one piece.
        token["normalized"] = token["normalized"] or not token["special"]
        token["content"] = new.get(token["content"], token["content"])
    model = spec["model"]
    if isinstance(model["vocab"], dict):  # a list is Unigram's, which finds special tokens in a text anyway: refused
        model["vocab"] = {new.get(name, name): token_id for name, token_id in model["vocab"].items()}
    if model.get("unk_token") in new:
        model["unk_token"] = new[model["unk_token"]]


def _strip_patterns(prompts: Sequence[Sequence[str]]) -> list[Any]:
    """Patterns of the white space around a user's text, for a normalizer that sees one plain piece at a time.

    The text is in the piece that begins with a prompt's last piece. Every other piece belongs to the prompt and keeps
    the white space at its end. The patterns never look back over the text, so that long texts cost linear time.
    """
    from tokenizers import Regex

    before_text = _any_of(pieces[-1] for pieces in prompts)
    whole = _any_of(piece for pieces in prompts for piece in pieces[::2])
    return [Regex(rf"(?<={before_text}){_SPACE}++(?!\z)"), Regex(rf"(?<!{_SPACE}){_SPACE}++\z(?<!{whole})")]


def _any_of(texts: Iterable[str]) -> str:
    """A pattern for any of these texts at the start, each character written as its number."""
    return "|".join(r"\A" + "".join(rf"\x{{{ord(char):x}}}" for char in text) for text in sorted(set(texts)))


def _check_ids(backbone: Backbone, tokenizer: Any, prompts: dict[str, str]) -> None:
    """Refuse a tokenizer that reads a text differently behind a prompt than by itself."""
    names = " ".join(token.content for token in backbone.tokenizer.added_tokens_decoder.values())
    tokenizer.enable_truncation(backbone.settings.max_length)
    for name, prompt in prompts.items():
        for text in (*_PROBES, f"a {names} b"):
            if tokenizer.encode(prompt + text).ids != backbone.prompt_encoder.encode(text, _KINDS[name]).ids:
                raise ModelError(
                    f"the tokenizer of {backbone.source} reads {text[:40]!r} differently behind the {name} prompt, so "
                    "sentence-transformers cannot give this model's vectors; encode with SearchR3"
                )
    tokenizer.no_truncation()


def _save_weights(model: Any, out: Path, dtype: str | None) -> None:
    architectures = model.config.architectures
    try:
        model.save_pretrained(out, state_dict=storage_state(model, dtype))
    finally:
        # transformers writes the class it saves into the configuration, which the whole model shares.
        model.config.architectures = architectures


def _write_settings(out: Path, backbone: Backbone, prompts: dict[str, str], sides: Sequence[str]) -> None:
    """The files of sentence-transformers, in the spelling that its versions 4 to 6 read, and the model card."""
    first = "Transformer"
    if len(sides) > 1:
        first = "Router"  # since version 5
        types = dict.fromkeys(sides, "sentence_transformers.models.Transformer")
        routes = {"types": types, "structure": {side: [side] for side in sides}}
        write_json(out / "router_config.json", {**routes, "parameters": {"default_route": sides[0]}})
    modules = [("", first), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    write_json(
        out / "modules.json",
        [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{module}"}
            for i, (path, module) in enumerate(modules)
        ],
    )
    max_length = backbone.settings.max_length
    limits = {"max_seq_length": max_length, "do_lower_case": False, "tokenizer_args": {"tokenizer_type": _PLAIN_TYPE}}
    for side in sides:
        write_json(out / side / "sentence_bert_config.json", limits)
    write_json(
        out / "config_sentence_transformers.json",
        {"prompts": prompts, "default_prompt_name": "query", "similarity_fn_name": "cosine"},
    )
    pooling = {f"pooling_mode_{mode}": mode == "lasttoken" for mode in _POOLING_MODES}
    write_json(
        out / "1_Pooling" / "config.json",
        {"word_embedding_dimension": backbone.dimension, **pooling, "include_prompt": True},
    )
    write_json(out / "2_Normalize" / "config.json", {})
    note = _TWO_SIDES if len(sides) > 1 else ""
    card = _README.format(dimension=backbone.dimension, max_length=max_length, mark=_MARK, sides=note)
    write_text(out / "README.md", card)


def _write_tokenizer(out: Path, backbone: Backbone, tokenizer: Any, special: dict[int, str]) -> None:
    tokenizer.save(str(out / "tokenizer.json"))
    source = backbone.tokenizer
    tokens = {role: getattr(source, role) for role in ("bos_token", "eos_token", "pad_token", "unk_token")}
    write_json(
        out / "tokenizer_config.json",
        {
            # The first is for AutoTokenizer, the second for AutoProcessor, which sentence-transformers 6 calls.
            "tokenizer_class": _PLAIN_CLASS,
            "processor_class": _PLAIN_CLASS,
            **{
                role: special.get(source.convert_tokens_to_ids(token), token)
                for role, token in tokens.items()
                if token is not None
            },
        },
    )
