"""Write a model as a GGUF file, for llama.cpp and what is built on it, and for `SearchR3` again.

The file holds all that a model directory does but a gate: weights, tokenizer, chat template, and `search_r3.json` as
metadata.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ...errors import ConfigError, ModelError
from ...extras import extra
from ...files import atomic_file
from ..adapters import merged_queries
from ..backbone import Backbone
from ..export import check_exportable
from ..settings import settings_record
from ..templates import ChatTemplate
from .metadata import SETTINGS_KEY, queries_file, tokenizer_values
from .vocabulary import vocabulary_of

logger = logging.getLogger(__name__)

GGUFType = Literal["f32", "f16", "bf16", "q8_0"]
TYPES: tuple[GGUFType, ...] = get_args(GGUFType)
ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""Of transformers; GGUF calls them the same."""
_BIASED = ("attention", "mlp")
_FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}


def export_gguf(backbone: Backbone, path: str | Path, type: GGUFType = "f16") -> list[Path]:
    """Write a GGUF file that llama.cpp loads, and `SearchR3` with all its settings.

    Of a model whose documents stage 2 kept frozen, `path` gets what encodes documents, and a second file beside it,
    `NAME.queries.gguf`, what encodes queries; `SearchR3(path)` loads both.

    Args:
        backbone: the model; LoRA adapters must be merged into it (those of a query side are merged here).
        path: the file to write; nothing may be there.
        type: how matrices are stored; vectors of numbers (norms, biases) are float32 in every file.

    Returns:
        The files that were written.

    Raises:
        ConfigError: there is something at `path`, or it does not end with `.gguf`; or an unknown type.
        ModelError: an architecture, a tokenizer or weights that such a file cannot hold; the message names those that
            it can.
    """
    target = Path(path)
    if type not in TYPES:
        raise ConfigError(f"type={type!r}: expected {', '.join(TYPES)}; llama.cpp's llama-quantize makes smaller ones")
    if target.suffix != ".gguf":
        raise ConfigError(f"{target} does not end with .gguf, by which such a file is known; give another name")
    sides = {target: backbone}
    if backbone.documents is not None:
        sides = {target: backbone.documents, target.with_name(queries_file(target.name)): merged_queries(backbone)}
    for file, side in sides.items():
        if file.exists():
            raise ConfigError(f"{file} exists; nothing is overwritten: remove it or choose another")
        check_exportable(side, file)
        _check_architecture(side)
    with ExitStack() as stack:
        # The first file, by which the model is loaded, is in its place last.
        for file, side in sides.items():
            _write(side, stack.enter_context(atomic_file(file)), type, has_queries=file == target and len(sides) > 1)
    return list(sides)


def _check_architecture(backbone: Backbone) -> None:
    """Refuse what llama.cpp computes otherwise, or not at all."""
    config = backbone.causal_lm.config.get_text_config()
    kind = config.model_type
    if kind not in ARCHITECTURES:
        raise ModelError(
            f"{backbone.source} is of the architecture {kind}, and GGUF files are written of {', '.join(ARCHITECTURES)}"
        )
    rope = dict(config.rope_parameters)
    others = {
        "quantised weights": getattr(backbone.causal_lm, "quantization_method", None) is not None,
        "rotary positions of another kind": rope.get("rope_type", "default") != "default"
        or rope.get("partial_rotary_factor", 1.0) != 1.0,
        "windows of attention": not {"full_attention"}.issuperset(getattr(config, "layer_types", None) or ()),
        "biases": config.model_type != "qwen2" and any(getattr(config, f"{one}_bias", False) for one in _BIASED),
        f"the activation {config.hidden_act}": config.hidden_act != "silu",
    }
    if odd := [what for what, is_so in others.items() if is_so]:
        raise ModelError(f"{backbone.source} has {odd[0]}, which cannot be written to a GGUF file here")


def _write(backbone: Backbone, path: Path, kind: GGUFType, has_queries: bool) -> None:
    with extra("gguf"):
        import gguf

    config = backbone.causal_lm.config.get_text_config()
    writer = gguf.GGUFWriter(path, config.model_type)
    writer.add_name(Path(backbone.source).name)
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[kind]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    settings = backbone.settings
    if settings.mode == "auto" and settings.gate is None:
        logger.warning("%s: queries reason in the file, which holds no gate (mode auto)", backbone.source)
        settings = settings.model_copy(update={"mode": "reason"})
    record = settings_record(settings, has_queries=has_queries)
    writer.add_string(SETTINGS_KEY, json.dumps(record, ensure_ascii=False))
    _add_shape(writer, config)
    _add_tokenizer(writer, backbone)
    tensors = [(name, tensor, _stored_as(gguf, tensor, kind)) for name, tensor in _tensors(gguf, backbone)]
    for name, tensor, stored in tensors:
        shape: tuple[int, ...] = tuple(tensor.shape)
        dtype: Any = {gguf.GGMLQuantizationType.F32: np.float32, gguf.GGMLQuantizationType.F16: np.float16}.get(stored)
        if dtype is None:
            dtype, shape = np.uint8, gguf.quant_shape_to_byte_shape(shape, stored)
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        writer.add_tensor_info(name, shape, np.dtype(dtype), size, raw_dtype=stored)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor, stored in tensors:  # one at a time, so that the model is not in memory twice
            writer.write_tensor_data(_stored(gguf, tensor, stored, f"{backbone.source}: {name}"))
    finally:
        writer.close()


def _add_shape(writer: Any, config: Any) -> None:
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _add_tokenizer(writer: Any, backbone: Backbone) -> None:
    tokenizer, frames = backbone.tokenizer, backbone.settings.frames
    assert frames is not None
    words = vocabulary_of(tokenizer, len(backbone.causal_lm.get_input_embeddings().weight), backbone.source)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(words.split)
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.types)
    writer.add_token_merges(words.merges)
    for key, value in tokenizer_values(tokenizer).items():
        writer.add_string(key, value) if isinstance(value, str) else writer.add_uint32(key, value)
    writer.add_eot_token_id(frames.end_token_id)
    first = tokenizer.encode("a")[0]
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and first == tokenizer.bos_token_id)
    writer.add_chat_template(ChatTemplate(tokenizer, None).source)


def _tensors(gguf: Any, backbone: Backbone) -> Iterator[tuple[str, Tensor]]:
    """The weights by their names in GGUF; of tied tables the first alone, which then is the output layer, too."""
    model = backbone.causal_lm
    config = model.config.get_text_config()
    architecture = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[config.model_type]
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    weights = model.state_dict()  # of a packed model it alone gives them, and a tied table once
    output = weights.get("lm_head.weight")
    is_tied = output is None or output.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    for name, tensor in weights.items():
        if is_tied and name == "lm_head.weight":
            continue
        stem, _, last = name.rpartition(".")
        known = names.get_name(stem) if last in ("weight", "bias") and name != "lm_head.bias" else None
        if known is None:
            raise ModelError(f"{backbone.source} has the weight {name}, which a GGUF file of its architecture has not")
        if config.model_type == "llama" and stem.endswith(("q_proj", "k_proj")):
            heads = config.num_attention_heads if stem.endswith("q_proj") else config.num_key_value_heads
            tensor = _interleaved(tensor, heads)
        yield f"{known}.{last}", tensor


def _interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows of queries or keys as llama.cpp's `llama` turns them: pairs beside each other, not half a head apart."""
    halves = weight.reshape(heads, 2, -1, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)


def _stored_as(gguf: Any, tensor: Tensor, kind: GGUFType) -> Any:
    """The type of one tensor: quantised where its rows are whole blocks."""
    types = gguf.GGMLQuantizationType
    if tensor.dim() < 2:
        return types.F32
    chosen = types[kind.upper()]
    return chosen if tensor.shape[-1] % gguf.GGML_QUANT_SIZES[chosen][0] == 0 else types.F16


def _stored(gguf: Any, tensor: Tensor, stored: Any, name: str) -> NDArray[Any]:
    """A tensor's values in a type of GGUF.

    Raises:
        ModelError: they cannot be stored so.
    """
    values = tensor.detach().float().cpu().numpy()
    most = np.abs(values).max()
    limit = np.finfo(np.float16 if stored == gguf.GGMLQuantizationType.F16 else np.float32).max
    if not most <= limit:
        raise ModelError(
            f"{name} holds {most:.3g}, beyond what {stored.name.lower()} can hold ({limit:.3g}); take bf16"
        )
    stored_values: NDArray[Any] = gguf.quants.quantize(values, stored)
    return stored_values
