"""What is verified of a model when it is loaded: that its vectors and log-probabilities can be computed here.

And of adapters that say in `base.json` what they were put into, that this is the base.

Shapes: `T` tokens, `D` hidden size.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ..errors import ModelError
from .backbone import Backbone
from .engine.attention import OURS, WindowRecorder, register
from .engine.engines import Engine
from .engine.fallback import FallbackEngine
from .engine.forward import is_drivable, last_hidden, layer_windows
from .engine.rope import freeze_rope
from .engine.slots import SlotEngine
from .prompts import PromptEncoder
from .settings import read_settings
from .source import ModelFiles

logger = logging.getLogger(__name__)

# How far a state may be from the model's own, as a share of its length: many times the rounding of deep models.
_TOLERANCES = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 0.1}


def check_backbone(backbone: Backbone) -> None:
    """Make a loaded model ready: fix its rotary frequencies, and choose the engine that computes as it does itself.

    Raises:
        ModelError: its weights are broken, its logits cannot be computed from its hidden states, or no engine computes
            as its own forward pass does.
    """
    longest = min(backbone.settings.max_length + backbone.settings.max_new_tokens, backbone.context_length)
    freeze_rope(backbone.causal_lm, longest)
    with _naming(backbone):
        probe = _Probe(backbone)
        _check_output_layer(backbone, probe)
    if _has_plain_layers(backbone.causal_lm) and _suits_slots(backbone, probe):
        backbone.engine = "fast"
        return
    backbone.engine = "fallback"
    with _naming(backbone):
        error = probe.deviation(FallbackEngine(backbone))
    if not error <= probe.tolerance:
        raise _unsupported(backbone, f"its states are off by {error:.0e} of their length")
    name = type(backbone.causal_lm).__name__
    logger.warning("%s (%s) is encoded through transformers' own cache, which is slower", backbone.source, name)


@contextmanager
def _naming(backbone: Backbone) -> Iterator[None]:
    """Make one `ModelError` of whatever an unknown architecture trips over."""
    try:
        yield
    except (ModelError, torch.OutOfMemoryError):
        raise
    except Exception as problem:
        raise _unsupported(backbone, f"{type(problem).__name__}: {str(problem).strip()[:120]}") from problem


def _unsupported(backbone: Backbone, why: str) -> ModelError:
    return ModelError(
        f"{backbone.source}: {type(backbone.causal_lm).__name__} cannot be encoded here as its own forward pass "
        f"computes it ({why}); choose a base of another architecture (docs/models.md lists those that work)"
    )


@torch.no_grad()
def _check_output_layer(backbone: Backbone, probe: _Probe) -> None:
    """Refuse broken weights, and architectures that do to their logits what `Backbone.logits` does not."""
    ids = torch.tensor([probe.sequences[0][:2]], device=backbone.device)
    expected = backbone.model(input_ids=ids).logits[0].float()
    # Of the very same pass: in bfloat16 a longer one rounds otherwise, by more than a cap or a factor would show.
    logits = backbone.logits(backbone.hidden_states(ids, None)[0])
    if not (torch.isfinite(expected).all() and torch.isfinite(logits).all()):
        raise ModelError(
            f"{backbone.source} computes NaN or infinity from a prompt of two tokens: its weights are broken, or its "
            "dtype is too narrow; try float32 or bfloat16"
        )
    if not torch.allclose(expected, logits, atol=1e-2, rtol=1e-2):
        raise _unsupported(backbone, "its logits are not those of its output layer")


def _has_plain_layers(model: Any) -> bool:
    """Whether all layers are attention, causal or within a window, as far as class and configuration tell."""
    config = model.config.get_text_config()
    plain = {"full_attention", "sliding_attention"}.issuperset(getattr(config, "layer_types", None) or ())
    ours = is_drivable(model) or model.config._attn_implementation in ("sdpa", OURS)
    return plain and ours and not getattr(model, "_is_stateful", False)


def _suits_slots(backbone: Backbone, probe: _Probe) -> bool:
    """Whether the fast engine is right; a model that is not driven keeps our attention only then."""
    model = backbone.causal_lm
    before = model.config._attn_implementation
    try:
        if not is_drivable(model):
            register()
            model.set_attn_implementation(OURS)
        if _windows(backbone) == layer_windows(model.config.get_text_config()):
            error = probe.deviation(SlotEngine(backbone))
            if error <= probe.tolerance:
                return True
            logger.debug("%s: the fast engine is off by %.0e", backbone.source, error)
    except torch.OutOfMemoryError:
        raise
    except Exception as problem:
        logger.debug("%s: the fast engine fails: %s", backbone.source, problem)
    if not is_drivable(model):
        model.set_attn_implementation(before)
    return False


def _windows(backbone: Backbone) -> list[int | None]:
    """By layer, the window that the attention asks for; what is longer than a window, no short probe shows."""
    token = torch.tensor([[backbone.embed_token_id]], device=backbone.device)
    place, recorder = torch.zeros_like(token), WindowRecorder()
    last_hidden(backbone.causal_lm, token, place, place[:, 0], recorder)
    return [recorder.windows[layer] for layer in sorted(recorder.windows)]


class _Probe:
    """Two short sequences of a model's own tokens with one beginning, and their states by its own forward pass.

    They are equally long there, so that nothing is padded; engines get them cut to unlike lengths.
    """

    def __init__(self, backbone: Backbone) -> None:
        before, after = backbone.prompt_encoder.frame("direct")
        tokens = [*before, *after][-12:]
        one = (tokens * 12)[:12]
        self.sequences = [one, [*one[:3], *one[:2:-1]]]
        self.tolerance = _TOLERANCES.get(next(backbone.causal_lm.parameters()).dtype, 0.1)
        with torch.no_grad():
            self.states = backbone.hidden_states(torch.tensor(self.sequences, device=backbone.device), None)

    def deviation(self, engine: Engine) -> float:
        """How far an engine's states are from the model's own, at most, as a share of their length."""
        pairs = [
            (state.float(), self.states[sequence, place].float())
            for states, places in self._computed(engine)
            for state, (sequence, place) in zip(states, places, strict=True)
        ]
        return max(float(((state - own).norm() / own.norm()).nan_to_num(torch.inf)) for state, own in pairs)

    @torch.no_grad()
    def _computed(self, engine: Engine) -> Iterator[tuple[Tensor, list[tuple[int, int]]]]:
        """States, with sequence and place of each: whole, after a shared beginning, and token by token."""
        one, two = self.sequences
        prompts = [tuple(one[:9]), tuple(two[:5])]
        yield engine.prompt_states(prompts), [(0, 8), (1, 4)]
        engine.admit(prompts)
        yield engine.advance(torch.tensor([one[9], two[5]])), [(0, 9), (1, 5)]
        engine.remove([0])
        yield engine.advance(torch.tensor([two[6]])), [(1, 6)]
        engine.share(one[:3])
        yield engine.encode([one, two[:8]]), [(0, 11), (1, 7)]


BASE_FILE = "base.json"
PROBE = "In what year was the first paper mill of Nuremberg built, and what did it cost? In 1390: 24 guilders."
SAME, ALIKE = 0.999, 0.75
"""Least cosines of the probe's vector: for a base in which nothing has to be said, and for one that is taken at all."""
_SHAPE = (
    "model_type hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "max_position_embeddings tie_word_embeddings"
).split()


class BaseFacts(BaseModel):
    """What adapters know of the model that they were put into: `base.json` beside them.

    Norms are no part of what GGUF files and other libraries quantise, and were trained in bfloat16, so that they tell a
    model from its descendants in every precision; what other precision does, the probe's vector tells.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(description="Of the base.")
    config: dict[str, Any] = Field(description="What its configuration says of its shape.")
    tokenizer: str = Field(description="SHA-256 of its vocabulary, the embed token left out.")
    norms: dict[str, str] = Field(description="Of three norms, SHA-256 of the weights as bfloat16.")
    probe: str = Field(PROBE, description="A text.")
    vector: str = Field("", description="Of the probe in direct mode, with adapters: base64 of little-endian float32.")

    @classmethod
    def of(cls, name: str, model: Any, tokenizer: Any, embed_token: str) -> BaseFacts:
        """Those of a model that was loaded without adapters; the vector is missing."""
        names = [key for key, value in model.named_parameters() if "norm" in key and value.ndim == 1]
        chosen = dict.fromkeys([names[0], names[len(names) // 2], names[-1]])
        return cls(
            name=name,
            config=_shape(model),
            tokenizer=_vocabulary(tokenizer, embed_token),
            norms={key: _norm(model, key) for key in chosen},
        )

    @classmethod
    def read(cls, files: ModelFiles) -> BaseFacts | None:
        """Those that lie beside adapters; None where there are none.

        Raises:
            ModelError: the file is damaged.
        """
        saved = files.json(BASE_FILE) if files.base is not None else {}
        try:
            return cls.model_validate(saved) if saved else None
        except ValueError as error:
            raise ModelError(f"{files.folder / BASE_FILE}: {str(error).splitlines()[0]}; fetch it again") from error

    def check(self, files: ModelFiles, model: Any, tokenizer: Any, embed_token: str) -> None:
        """Refuse another base, before adapters are put into it.

        Raises:
            ModelError: it says what differs.
        """
        assert files.base is not None
        own = _shape(model)
        # After a stage the norms are those of before, and its vectors are no further away than other precision is.
        saved = read_settings(files.base.folder)
        different = ["a stage has trained it already"] if saved is not None and saved.trained else []
        different += [f"{key} is {own[key]}, not {value}" for key, value in self.config.items() if own[key] != value]
        if not different and _vocabulary(tokenizer, embed_token) != self.tokenizer:
            different = ["it has another vocabulary"]
        if not different:
            different = [f"{key} has other values" for key, value in self.norms.items() if _norm(model, key) != value]
        if different:
            raise ModelError(f"{files.base.name} is not {self.name}, the base of {files.name}: {different[0]}")

    @torch.no_grad()
    def check_vector(self, backbone: Backbone) -> None:
        """Warn where the base has another precision than the one of the training, and say what that does to a vector.

        Raises:
            ModelError: the vector is another.
        """
        assert backbone.files is not None and backbone.files.base is not None
        settings = read_settings(backbone.files.folder)  # without what was said in their place
        if settings is None or settings.frames is None or not self.vector:
            return
        encoder = PromptEncoder(backbone.tokenizer, settings.frames, backbone.embed_token_id, settings.max_length)
        stored = torch.frombuffer(bytearray(base64.b64decode(self.vector)), dtype=torch.float32)
        cosine = float(backbone.embed([encoder.encode(self.probe, "direct").ids])[0].cpu() @ stored)
        name, base = backbone.source, backbone.files.base.name
        if not cosine >= ALIKE:
            raise ModelError(
                f"{base} has other weights than {self.name}, the base of {name}: a text's vector has the cosine "
                f"{cosine:.4f} with the one that it should have; take that model itself, in a finer precision"
            )
        if cosine < SAME:
            logger.warning(
                "%s is the base of %s in another precision than it was trained with: a text's vector has the cosine "
                "%.4f with the one of that precision. Use one file for documents and queries",
                *(base, name, cosine),
            )


def _shape(model: Any) -> dict[str, Any]:
    """What makes the shape of a model, and the numbers that no weight tells."""
    config = model.config.get_text_config()
    shape = {name: getattr(config, name, None) for name in _SHAPE}
    theta = (getattr(config, "rope_parameters", None) or {}).get("rope_theta")
    return shape | {"rope_theta": theta, "rms_norm_eps": float(f"{getattr(config, 'rms_norm_eps', 0.0):.5g}")}


def _vocabulary(tokenizer: Any, embed_token: str) -> str:
    entries = sorted((place, token) for token, place in tokenizer.get_vocab().items() if token != embed_token)
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def _norm(model: Any, name: str) -> str:
    values = dict(model.named_parameters())[name].detach().to("cpu", torch.bfloat16).contiguous()
    return hashlib.sha256(values.view(torch.uint8).numpy()).hexdigest()
