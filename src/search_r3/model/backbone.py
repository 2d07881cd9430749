"""Load, check and save a causal LM together with its tokenizer, embed token and prompt set.

Shapes: `B` sequences, `T` tokens, `D` hidden size, `V` vocabulary.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from ..errors import ModelError
from ..extras import extra
from ..files import atomic_directory, hash_folder, write_json
from .prompts import EMBED_TOKEN, PROMPT_SETS, PromptEncoder, PromptSet

SETTINGS_FILE = "search_r3.json"
EmbedStart = Literal["mean", "end_of_turn"]
"""Where the row of an embed token that the model lacks starts."""
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class EmbeddingSettings(BaseModel):
    """What a model directory says about its vectors, in `search_r3.json` next to the weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    embed_token: str = Field(EMBED_TOKEN, description="The token whose hidden state is the search embedding.")
    prompts: PromptSet = Field(PROMPT_SETS["search-r3"], description="The wording the model was trained with.")
    max_length: int = Field(1024, ge=8, description="Longest prompt in tokens; longer texts lose their end, counted.")
    max_new_tokens: int = Field(512, ge=1, description="Reasoning budget in tokens, the embed token included.")


@dataclass
class Backbone:
    """A causal LM ready to embed. `prompt_encoder` is the only way from text to ids."""

    model: Any
    tokenizer: Any
    settings: EmbeddingSettings
    embed_token_id: int
    source: str

    def __post_init__(self) -> None:
        self.prompt_encoder = PromptEncoder(
            self.tokenizer, self.settings.prompts, self.embed_token_id, self.settings.max_length
        )

    @property
    def causal_lm(self) -> Any:
        """The causal LM itself, out of the wrapper of adapters where there is one; adapters stay in force."""
        unwrap = getattr(self.model, "get_base_model", None)
        return self.model if unwrap is None else unwrap()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = next(iter(self.model.parameters())).device
        return device

    @property
    def dtype(self) -> str:
        """The precision of the weights, e.g. `float32`."""
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def dimension(self) -> int:
        """`D`, the size of a search embedding."""
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def revision(self) -> str:
        """What names one state of the model: its commit on the hub, or the SHA-256 of the files in its directory."""
        path = Path(self.source)
        if path.is_dir():
            return hash_folder(path)
        return str(getattr(self.model.config, "_commit_hash", None) or "unknown")

    @property
    def context_length(self) -> int:
        """The longest sequence the model was made for, in tokens."""
        return int(self.model.config.get_text_config().max_position_embeddings)

    def hidden_states(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Output of the final norm, `B x T x D`, where the output layer reads.

        Padding on either side is allowed. None for the mask is right where padding stands on the right and the model
        `looks_back_only`: then no real token sees it, and attention needs no mask.
        """
        positions = None if mask is None else position_ids(mask)
        output = self.causal_lm.base_model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
        hidden: Tensor = output.last_hidden_state
        return hidden

    @torch.no_grad()
    def looks_back_only(self) -> bool:
        """Whether no token's state depends on later ones, found out from two sequences with one beginning."""
        token = self.embed_token_id
        ids = torch.tensor([[token] * 6, [token] * 2 + [token - 1, 0, 1, token - 2]], device=self.device)
        one, other = self.hidden_states(ids, None)[:, :2].float()
        return bool((one - other).abs().max() <= 1e-3 * one.abs().max())

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits `... x V` for hidden states `... x D`, in float32."""
        scores: Tensor = self.causal_lm.get_output_embeddings()(hidden)
        return scores.float()

    def embed(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """Vectors `B x D` (float32, L2-normalised) of sequences that end with the embed token, with gradients."""
        ids, mask = pad(sequences, self.tokenizer.pad_token_id, self.device)
        return vectors_at(self.hidden_states(ids, mask), mask.sum(-1) - 1)

    def frozen_copy(self, dtype: str | None = None) -> Backbone:
        """The same model with weights of its own that do not learn: the reference of a KL term.

        Args:
            dtype: their precision; as they are by default.
        """
        model = copy.deepcopy(self.model).eval().requires_grad_(False)
        if dtype is not None:
            for parameter in model.parameters():  # and no buffers: the rotary frequencies need float32
                parameter.data = parameter.data.to(DTYPES[dtype])
        return Backbone(model, self.tokenizer, self.settings, self.embed_token_id, self.source)

    def save(self, folder: str | Path, dtype: str | None = None, *, state: Mapping[str, Tensor] | None = None) -> None:
        """Write weights (safetensors), tokenizer and settings; an existing folder is replaced when all is written.

        Args:
            folder: the model directory.
            dtype: storage type of the weights (`float16` halves the file); as they are by default.
            state: the weights by name, where the model itself holds only a part of them.
        """
        with atomic_directory(Path(folder)) as out:
            self.model.save_pretrained(out, state_dict=storage_state(self.model, dtype, state))
            self.save_companions(out)

    def save_companions(self, folder: Path) -> None:
        """Write what stands beside the weights: tokenizer and settings."""
        self.tokenizer.save_pretrained(folder)
        write_json(folder / SETTINGS_FILE, self.settings.model_dump())


def load_backbone(
    source: str | Path,
    *,
    settings: EmbeddingSettings | None = None,
    dtype: str = "float32",
    device: str | torch.device = "cpu",
    revision: str | None = None,
    embed_start: EmbedStart = "mean",
) -> Backbone:
    """Load a causal LM from a directory or the hub; add the embed token where the tokenizer lacks it.

    Args:
        source: a model directory, a directory of adapters (peft), or a hub id such as `Qwen/Qwen2.5-1.5B-Instruct`.
        settings: wording and limits; by default those saved with the model, else the `search-r3` set.
        dtype: `float32`, `bfloat16` or `float16`.
        device: where the weights go.
        revision: branch, tag or commit on the hub.
        embed_start: the row of an embed token that the model lacks: the mean of all rows, or the end of turn's.

    Raises:
        ModelError: files are missing or do not fit together; the message names the remedy.
    """
    path = Path(source)
    if not path.is_dir() and (isinstance(source, Path) or source.startswith((".", "/")) or source.count("/") > 1):
        raise ModelError(f"no model directory at {source}; give a directory with config.json, or a hub id")
    if path.is_dir() and not any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise ModelError(f"{source} is no model directory: config.json is missing")
    tokenizer = _load_tokenizer(source, revision)
    model, report = _load_model(source, tokenizer, dtype, revision)
    # Adapters write the embed token's row of tied tables once, and transformers misses it in the other.
    absent = sorted(key for key in report["missing_keys"] if "token_adapter" not in key)
    if absent:
        raise ModelError(f"{source} lacks {len(absent)} weights of its architecture (first: {absent[0]}); wrong files?")
    embed_token = (settings or EmbeddingSettings()).embed_token
    if settings is None:
        settings = _saved_settings(source, model, revision)
        embed_token = settings.embed_token
    embed_token_id = _ensure_embed_token(model, tokenizer, embed_token, embed_start)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if torch.device(device).type == "cuda":
        # On Hopper and Blackwell torch prefers cuDNN's attention, which builds a plan for every new shape, some tenths
        # of a second each (torch 2.11). Here every decoding step and nearly every batch has a new one.
        torch.backends.cuda.enable_cudnn_sdp(False)
    model.to(device).eval()
    backbone = Backbone(model, tokenizer, settings, embed_token_id, str(source))
    _check_output_layer(backbone)
    return backbone


def storage_state(model: Any, dtype: str | None, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The weights in their storage type; tied ones stay one tensor, so that they are written once."""
    by_address: dict[int, Tensor] = {}
    return {
        name: by_address.setdefault(value.data_ptr(), value if dtype is None else value.to(DTYPES[dtype]))
        for name, value in (model.state_dict() if state is None else state).items()
    }


def pad(
    sequences: Sequence[Sequence[int]], pad_id: int, device: torch.device, left: bool = False
) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, each `B x T` (int64), padded on the right or on the left."""
    width = max(len(sequence) for sequence in sequences)
    ids = torch.full((len(sequences), width), pad_id, dtype=torch.long)
    mask = torch.zeros((len(sequences), width), dtype=torch.long)
    for row, sequence in enumerate(sequences):
        start = width - len(sequence) if left else 0
        ids[row, start : start + len(sequence)] = torch.tensor(sequence, dtype=torch.long)
        mask[row, start : start + len(sequence)] = 1
    return ids.to(device), mask.to(device)


def position_ids(mask: Tensor) -> Tensor:
    """Positions from 0 at each row's first token, `B x T`, whichever side is padded."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def vectors_at(hidden: Tensor, positions: Tensor) -> Tensor:
    """Search embeddings `B x D` from hidden states `B x T x D` at one position per row: float32, L2-normalised."""
    rows = torch.arange(hidden.shape[0], device=hidden.device)
    return torch.nn.functional.normalize(hidden[rows, positions].float(), dim=-1)


def shorten(vectors: Tensor, size: int) -> Tensor:
    """The first `size` dimensions of vectors `... x D`, L2-normalised."""
    return torch.nn.functional.normalize(vectors[..., :size], dim=-1)


def _load_tokenizer(source: str | Path, revision: str | None) -> Any:
    import transformers

    path = Path(source)
    if path.is_dir() and not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise ModelError(f"{source} has no tokenizer (tokenizer.json is missing); copy it next to the weights")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, revision=revision)
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"cannot load a tokenizer from {source}: {_first_line(error)}") from error
    if not tokenizer.is_fast:
        raise ModelError(f"the tokenizer of {source} is a slow one; a tokenizer.json (fast tokenizer) is needed")
    return tokenizer


def _load_model(source: str | Path, tokenizer: Any, dtype: str, revision: str | None) -> tuple[Any, dict[str, Any]]:
    """The causal LM and transformers' report; the tables of a base grow first where adapters need it."""
    import transformers

    load = transformers.AutoModelForCausalLM.from_pretrained
    try:
        if (base := _base_without_the_row(Path(source), tokenizer)) is not None:
            model, report = load(base, dtype=DTYPES[dtype], output_loading_info=True)
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
            model.load_adapter(str(source))
        else:
            model, report = load(source, dtype=DTYPES[dtype], revision=revision, output_loading_info=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot load a causal LM from {source}: {_first_line(error)}") from error
    return model, report


def _base_without_the_row(path: Path, tokenizer: Any) -> str | None:
    """The base of a directory of adapters where its tables lack the rows of their tokenizer's new tokens, else None."""
    import transformers

    if not (path / "adapter_config.json").is_file():
        return None
    with extra("train"):
        import_module("peft")  # transformers loads adapters with it
    base = str(json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"])
    vocabulary = transformers.AutoConfig.from_pretrained(base).get_text_config().vocab_size
    return base if vocabulary < len(tokenizer) else None


def _saved_settings(source: str | Path, model: Any, revision: str | None) -> EmbeddingSettings:
    """The settings next to the weights; without them the defaults, cut to the model's context."""
    from transformers.utils import cached_file

    try:
        file = cached_file(str(source), SETTINGS_FILE, revision=revision, _raise_exceptions_for_missing_entries=False)
    except OSError:
        file = None
    if file is not None:
        try:
            return EmbeddingSettings.model_validate(json.loads(Path(file).read_text(encoding="utf-8")))
        except (ValidationError, json.JSONDecodeError) as error:
            raise ModelError(f"{file}: not usable as model settings: {_first_line(error)}") from error
    context = int(model.config.get_text_config().max_position_embeddings)
    return EmbeddingSettings(max_length=min(1024, context), max_new_tokens=max(1, min(512, context // 2)))


def _ensure_embed_token(model: Any, tokenizer: Any, embed_token: str, start: EmbedStart) -> int:
    """The id of the embed token, added where it is missing; the embedding table grows only if no spare row is left."""
    token_id = tokenizer.get_vocab().get(embed_token)
    if token_id is None:
        if start == "end_of_turn" and tokenizer.eos_token_id is None:
            raise ModelError(
                "embed_start=end_of_turn, but the tokenizer names no end (eos_token); set embed_start=mean"
            )
        tokenizer.add_special_tokens({"additional_special_tokens": [embed_token]}, replace_extra_special_tokens=False)
        token_id = tokenizer.convert_tokens_to_ids(embed_token)
        tables = [model.get_input_embeddings(), model.get_output_embeddings()]
        rows = tables[0].weight.shape[0]
        count = len(tokenizer) - 1
        if len(tokenizer) > rows:
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
            tables = [model.get_input_embeddings(), model.get_output_embeddings()]
        with torch.no_grad():
            # A spare row was never trained (or does not exist yet): the mean of the rows in use is a neutral start,
            # the same at every load. Tied tables are one tensor, so the second write repeats the first.
            ends = [tokenizer.eos_token_id] if start == "end_of_turn" else slice(count)
            rows_of_start = [table.weight[ends].float().mean(0) for table in tables]
            for table, row in zip(tables, rows_of_start, strict=True):
                table.weight[token_id] = row.to(table.weight.dtype)
    if len(tokenizer.encode(embed_token, add_special_tokens=False)) != 1:
        raise ModelError(f"{embed_token} is in the vocabulary but not as one special token; mend tokenizer.json")
    if token_id >= model.get_input_embeddings().weight.shape[0]:
        raise ModelError(
            f"{embed_token} has id {token_id}, outside the model's embedding table; tokenizer and weights differ"
        )
    return int(token_id)


def _check_output_layer(backbone: Backbone) -> None:
    """Refuse broken weights, and architectures that scale or cap logits after the output layer.

    Of those our log-probabilities would be wrong.
    """
    ids = torch.tensor([[backbone.embed_token_id] * 2], device=backbone.device)
    with torch.no_grad():
        expected = backbone.model(input_ids=ids).logits.float()
        logits = backbone.logits(backbone.hidden_states(ids, torch.ones_like(ids)))
    if not (torch.isfinite(expected).all() and torch.isfinite(logits).all()):
        raise ModelError(
            f"{backbone.source} computes NaN or infinity from a prompt of two tokens: its weights are broken, or its "
            "dtype is too narrow; try float32 or bfloat16"
        )
    if not torch.allclose(expected, logits, atol=1e-2, rtol=1e-2):
        name = type(backbone.model).__name__
        raise ModelError(f"{name} changes its logits after the output layer (scaling or capping): not supported yet")


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
