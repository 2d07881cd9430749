"""Hold and save a causal LM together with its tokenizer, embed token and prompt set.

Shapes: `B` sequences, `T` tokens, `D` hidden size, `V` vocabulary.
"""

from __future__ import annotations

import copy
import inspect
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from ..errors import ConfigError
from ..files import atomic_directory, check_replaceable, write_json
from .engine.prefixes import KeptPrefixes
from .modes.gate import Gate
from .precision import bare_layer, float32_scores, torch_dtype
from .prompts import PromptEncoder
from .settings import QUERIES, SETTINGS_FILE, EmbeddingSettings, settings_record
from .source import ADAPTER_CONFIG, CONFIG, ModelFiles

# What a configuration calls the factor on its logits (Granite, Cohere, Falcon-H1); Granite's divides them.
LOGIT_FACTORS = {"logits_scaling": -1, "logit_scale": 1, "lm_head_multiplier": 1}
NO_LIMIT = 2**31 - 1
T = TypeVar("T")
U = TypeVar("U")


@dataclass
class Backbone:
    """A causal LM ready to embed, with settings that have their frames. `prompt_encoder` is the only way to ids.

    `engine` computes what is encoded: ours (`fast`), the one that serves every architecture (`fallback`), or llama.cpp;
    which of the first two is right for a model is found out when it is loaded. Where `documents` is set, this one
    encodes queries only. `gate` says in mode auto which queries think. Training sets `float32_logits`: logits are then
    not rounded to half precision, neither those that tokens are sampled from nor those that are learned from. With
    `graphs` decoding replays its steps as CUDA graphs (`engine.graphs`), which no GPU has tried yet.
    """

    model: Any
    tokenizer: Any
    settings: EmbeddingSettings
    embed_token_id: int
    source: str
    files: ModelFiles | None = None
    engine: Literal["fast", "fallback", "llama.cpp"] = "fast"
    documents: Backbone | None = None
    gate: Gate | None = None
    float32_logits: bool = False
    graphs: bool = False

    def __post_init__(self) -> None:
        assert self.settings.frames is not None
        self.prompt_encoder = PromptEncoder(
            self.tokenizer, self.settings.frames, self.embed_token_id, self.settings.max_length
        )
        self.prefixes = KeptPrefixes()

    @cached_property
    def _logit_scale(self) -> tuple[float, float | None]:
        """The factor on logits, and what they are capped at."""
        config = self.model.config.get_text_config()
        factors = {name: getattr(config, name, None) or 1.0 for name in LOGIT_FACTORS}
        factor = math.prod(factors[name] ** power for name, power in LOGIT_FACTORS.items())
        return factor, getattr(config, "final_logit_softcapping", None)

    @property
    def causal_lm(self) -> Any:
        """The causal LM itself, out of the wrapper of adapters where there is one; adapters stay in force."""
        unwrap = getattr(self.model, "get_base_model", None)
        return self.model if unwrap is None else unwrap()

    @property
    def document_side(self) -> Backbone:
        """What encodes documents: this one, unless a stage kept them frozen."""
        return self.documents or self

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
        """What names one state of the model: its commit on the hub, or the SHA-256 of its files (`ModelFiles`)."""
        return "unknown" if self.files is None else self.files.revision

    @property
    def trained(self) -> bool:
        """Whether a stage has trained the embed token; before, vectors mean nothing."""
        return self.settings.trained

    @property
    def context_length(self) -> int:
        """The longest sequence the model was made for, in tokens; `NO_LIMIT` where it has none (states, ALiBi)."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or NO_LIMIT

    @property
    def most_rows(self) -> int:
        """How many replies can be decoded at once."""
        return NO_LIMIT

    def hidden_states(self, ids: Tensor | None, mask: Tensor | None, inputs: Tensor | None = None) -> Tensor:
        """Output of the final norm, `B x T x D`, where the output layer reads; of ids, or of inputs `B x T x D`.

        Padding on either side is allowed. None for the mask is right where padding stands on the right and the model
        `looks_back_only`: then no real token sees it, and attention needs no mask.
        """
        base = self.causal_lm.base_model
        options: dict[str, Any] = {}
        if mask is not None and "position_ids" in inspect.signature(base.forward).parameters:
            options["position_ids"] = position_ids(mask)
        options |= {"input_ids": ids} if inputs is None else {"inputs_embeds": inputs}
        hidden: Tensor = base(attention_mask=mask, use_cache=False, **options).last_hidden_state
        return hidden

    @torch.no_grad()
    def looks_back_only(self) -> bool:
        """Whether no token's state depends on later ones, found out from two sequences with one beginning."""
        token = self.embed_token_id
        ids = torch.tensor([[token] * 6, [token] * 2 + [token - 1, 0, 1, token - 2]], device=self.device)
        one, other = self.hidden_states(ids, None)[:, :2].float()
        return bool((one - other).abs().max() <= 1e-3 * one.abs().max())

    def logits(self, hidden: Tensor, *, adapters: bool = True) -> Tensor:
        """Next-token logits `... x V` for hidden states `... x D`, in float32, scaled and capped as the model does.

        Without `adapters` those of the output layer as it was before any were put around it.
        """
        head = self.causal_lm.get_output_embeddings()
        head = head if adapters else bare_layer(head)
        scores = float32_scores(head, hidden) if self.float32_logits else torch.as_tensor(head(hidden)).float()
        factor, cap = self._logit_scale
        if factor != 1.0:
            scores = scores * factor
        return scores if cap is None else cap * torch.tanh(scores / cap)

    def vectors(self, states: Tensor) -> Tensor:
        """Search embeddings `B x D` (float32, L2-normalised) of an engine's states at the embed token."""
        return torch.nn.functional.normalize(states.float(), dim=-1)

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
                parameter.data = parameter.data.to(torch_dtype(dtype))
        return replace(self, model=model)

    def on(self, devices: Sequence[torch.device]) -> list[Backbone]:
        """This model for each of the devices: itself where it is, copies elsewhere.

        Raises:
            ConfigError: it is quantised, packed or has a map of devices, and cannot be copied elsewhere.
        """
        sides = [self.model] if self.documents is None else [self.model, self.documents.model]
        models = []
        for device in devices:
            if device.type == self.device.type and device.index in (None, self.device.index):
                models.append(self)
                continue
            bound = "hf_device_map", "quantization_method", "is_packed"
            if any(getattr(self.causal_lm, name, None) for name in bound):
                raise ConfigError(
                    f"{self.source} is quantised, packed for this CPU or has a device_map, and stays where it is; "
                    f"leave device={device} out"
                )
            memo: dict[int, Any] = {}  # so that weights go there at once, and those that both sides share stay one
            for side in sides:
                memo |= {id(one): torch.nn.Parameter(one.detach().to(device), False) for one in side.parameters()}
                memo |= {id(one): one.to(device) for one in side.buffers()}
            copies = copy.deepcopy(sides, memo)
            documents = None if self.documents is None else replace(self.documents, model=copies[1])
            models.append(replace(self, model=copies[0], documents=documents))
        return models

    def save(self, folder: str | Path, dtype: str | None = None, *, state: Mapping[str, Tensor] | None = None) -> None:
        """Write weights (safetensors), tokenizer and settings; an existing folder is replaced when all is written.

        Args:
            folder: the model directory.
            dtype: storage type of the weights (`float16` halves the file); as they are by default.
            state: the weights by name, where the model itself holds only a part of them.

        Raises:
            ConfigError: the folder holds something else than a model.
        """
        check_replaceable(Path(folder), (CONFIG, ADAPTER_CONFIG, SETTINGS_FILE))
        with atomic_directory(Path(folder)) as out, without_bars():
            if self.documents is None:
                self.model.save_pretrained(out, state_dict=storage_state(self.model, dtype, state))
            else:
                self.documents.model.save_pretrained(out, state_dict=storage_state(self.documents.model, dtype))
                self.save_queries(out / QUERIES, dtype, state=state)
            self.save_companions(out)

    def save_queries(
        self, folder: Path, dtype: str | None = None, *, state: Mapping[str, Tensor] | None = None
    ) -> None:
        """Write what encodes queries beside what encodes documents: weights, or adapters that name no place as base."""
        weights = storage_state(self.model, dtype, state)
        if not hasattr(self.model, "peft_config"):
            self.model.save_pretrained(folder, state_dict=weights)
            return
        self.model.save_pretrained(folder, state_dict=weights, save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # peft's, of the place where they were trained
        path = folder / ADAPTER_CONFIG
        config = json.loads(path.read_text(encoding="utf-8"))
        write_json(path, config | {"base_model_name_or_path": None, "revision": None})

    def save_companions(self, folder: Path) -> None:
        """Write what stands beside the weights: tokenizer, settings, and the gate where there is one."""
        self.tokenizer.save_pretrained(folder)
        self.save_settings(folder, has_queries=self.documents is not None)
        if self.gate is not None:
            self.gate.save(folder)

    def save_settings(self, folder: Path, *, has_queries: bool) -> None:
        """Write `search_r3.json`, which also says whether the folder has a query side of its own."""
        write_json(folder / SETTINGS_FILE, settings_record(self.settings, has_queries=has_queries))


def in_parallel(
    backbones: Sequence[Backbone], items: Sequence[T], work: Callable[[Backbone, Sequence[T]], Iterable[U]]
) -> list[U]:
    """What `work` gives for each item, in their order; every model has its share of them, and a thread."""
    ends = [round(len(items) * place / len(backbones)) for place in range(len(backbones) + 1)]
    shares = [
        (one, items[start:end]) for one, start, end in zip(backbones, ends, ends[1:], strict=False) if start < end
    ]
    if len(shares) < 2:
        return [result for share in shares for result in work(*share)]
    with ThreadPoolExecutor(len(shares)) as pool:
        return [result for results in pool.map(lambda share: work(*share), shares) for result in results]


@contextmanager
def without_bars() -> Iterator[None]:
    """Keep transformers' progress bars, of loading and of saving, to itself; those of the user's other models stay."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging as bars

    shown, hub_shown = bars.is_progress_bar_enabled(), not are_progress_bars_disabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()  # the hub's too
        (enable_progress_bars if hub_shown else disable_progress_bars)()


def storage_state(model: Any, dtype: str | None, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The weights in their storage type; tied ones stay one tensor, so that they are written once."""
    by_address: dict[int, Tensor] = {}
    return {
        name: by_address.setdefault(value.data_ptr(), value if dtype is None else value.to(torch_dtype(dtype)))
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
