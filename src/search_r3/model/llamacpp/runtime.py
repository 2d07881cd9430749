"""llama.cpp itself: a model, and a context whose cache holds many sequences, some of which begin alike.

Shapes: `B` tokens with an output, `D` hidden size, `V` vocabulary.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...errors import ConfigError, ModelError
from ...extras import extra
from ...types import Array

logger = logging.getLogger(__name__)

_BATCH, _UBATCH = 2048, 512  # tokens per call, and computed together
_AT_ONCE = 12  # documents, or prompts of direct mode, that are computed together
_BEGINNINGS = 4  # kept beginnings of prompts; a model has three
_SPARE_TOKENS = 1024  # room in the cache beside the replies, for documents
_ERRORS: deque[str] = deque(maxlen=3)
_CALLBACKS: list[Any] = []  # which llama.cpp holds, and nobody else would


@cache
def _library() -> Any:
    """The binding's C functions; what llama.cpp prints goes to our log."""
    with extra("llamacpp"):
        import llama_cpp

    def log(level: int, text: bytes, _: Any) -> None:
        line = text.decode("utf-8", "replace").strip()
        if level == 4 and line:  # of ggml's levels, an error
            _ERRORS.append(line)
        logger.debug("%s", line)

    _CALLBACKS.append(llama_cpp.llama_log_callback(log))
    llama_cpp.llama_log_set(_CALLBACKS[-1], ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    return llama_cpp


class LlamaModel:
    """The weights of a GGUF file.

    Args:
        path: of the file.
        name: what the model is called, for messages.
        gpu_layers: on a GPU; -1 for all.

    Raises:
        ModelError: llama.cpp cannot load it.
    """

    def __init__(self, path: Path, name: str, gpu_layers: int) -> None:
        self.library, self.name = _library(), name
        parameters = self.library.llama_model_default_params()
        parameters.n_gpu_layers = gpu_layers if gpu_layers >= 0 else 2**31 - 1
        if gpu_layers and not self.library.llama_supports_gpu_offload():
            raise ConfigError(
                "the llama.cpp that is installed was built without a GPU; leave device and n_gpu_layers out"
            )
        _ERRORS.clear()
        self.handle = self.library.llama_model_load_from_file(os.fsencode(path), parameters)
        if not self.handle:
            raise ModelError(f"llama.cpp cannot load {name}: {_ERRORS[0] if _ERRORS else 'it does not say why'}")
        weakref.finalize(self, self.library.llama_model_free, self.handle)
        self.dimension = int(self.library.llama_model_n_embd(self.handle))
        self.rows = int(self.library.llama_vocab_n_tokens(self.library.llama_model_get_vocab(self.handle)))
        self.context_length = int(self.library.llama_model_n_ctx_train(self.handle))

    def value(self, key: str) -> str | None:
        """What the file's metadata says."""
        size = self.library.llama_model_meta_val_str(self.handle, key.encode(), None, 0)
        if size < 0:
            return None
        text = ctypes.create_string_buffer(size + 1)
        self.library.llama_model_meta_val_str(self.handle, key.encode(), text, size + 1)
        return text.value.decode("utf-8")

    @property
    def type(self) -> str:
        """How matrices are stored, e.g. `q8_0`."""
        text = ctypes.create_string_buffer(256)  # as "llama 135M Q8_0", "qwen2 1B all F32", "llama 1B Q4_K - Medium"
        self.library.llama_model_desc(self.handle, text, len(text))
        return text.value.decode().split(" ", 2)[-1].removeprefix("all ").replace(" - ", "_").lower()


class Token(NamedTuple):
    """One token of a sequence; `has_output`: what it gives is wanted."""

    id: int
    position: int
    sequence: int
    has_output: bool


class Cache:
    """A context: keys and values of sequences, by number. Threads may share it.

    Args:
        model: what computes.
        parallel: replies in work at once.
        longest: tokens of a prompt with its reply, at most.
        prompt: tokens of a prompt, at most.
        threads: of the CPU.

    Raises:
        ConfigError: a number below 1, or too many at once.
        ModelError: there is no memory for it.
    """

    def __init__(self, model: LlamaModel, *, parallel: int, longest: int, prompt: int, threads: int) -> None:
        self.model, library = model, model.library
        sequences = _BEGINNINGS + 3 * parallel + _AT_ONCE
        for name, value, limit in (("n_parallel", parallel, 64), ("n_threads", threads, 512)):
            if not isinstance(value, int) or not 1 <= value <= limit:
                raise ConfigError(f"{name}={value!r}: expected a whole number from 1 to {limit}")
        parameters = library.llama_context_default_params()
        # The last prompt is kept beside the replies.
        parameters.n_ctx = parallel * longest + prompt + max(_SPARE_TOKENS, prompt) + 256
        parameters.n_batch, parameters.n_ubatch, parameters.n_seq_max = _BATCH, _UBATCH, sequences
        parameters.n_threads = parameters.n_threads_batch = threads
        parameters.pooling_type = library.LLAMA_POOLING_TYPE_NONE
        parameters.kv_unified = parameters.swa_full = parameters.no_perf = True
        self._handle = library.llama_init_from_model(model.handle, parameters)
        if not self._handle:
            raise ModelError(
                f"llama.cpp has no memory for {model.name}: {' '.join(_ERRORS)}; lower n_parallel, max_length"
            )
        weakref.finalize(self, library.llama_free, self._handle)
        self._batch = library.llama_batch_init(_BATCH, 0, 1)
        weakref.finalize(self, library.llama_batch_free, self._batch)
        self._memory = library.llama_get_memory(self._handle)
        self._lock = threading.RLock()
        self._free, self._given_back = set(range(sequences)), deque[int]()
        self._beginnings: dict[tuple[int, ...], int] = {}

    def take(self, count: int) -> list[int]:
        """Numbers of empty sequences.

        Raises:
            ModelError: so many are not left.
        """
        with self._lock:
            self._sweep()
            if count > len(self._free):
                raise self._full()
            return [self._free.pop() for _ in range(count)]

    def release(self, sequences: Iterable[int]) -> None:
        """Give sequences back; from any thread at any time, also when nobody refers to them any more."""
        self._given_back.extend(sequences)

    def copy(self, source: int, target: int) -> None:
        """Let a sequence begin with all that another holds; nothing is computed or stored anew."""
        with self._lock:
            self.model.library.llama_memory_seq_cp(self._memory, source, target, -1, -1)

    def begin(self, ids: tuple[int, ...], sequence: int) -> int:
        """Let an empty sequence begin with these tokens, which are computed at the first call only; their number."""
        if not ids:
            return 0
        with self._lock:
            if ids not in self._beginnings:
                if len(self._beginnings) == _BEGINNINGS:
                    self.release([self._beginnings.pop(next(iter(self._beginnings)))])
                [place] = self.take(1)
                self._decode([Token(one, at, place, False) for at, one in enumerate(ids)], False)
                self._beginnings[ids] = place
            self.copy(self._beginnings[ids], sequence)
        return len(ids)

    def room(self, lengths: Sequence[int]) -> int:
        """How many of the first of these sequences, by their tokens, are computed together; at least one."""
        tokens = 0
        for count, length in enumerate(lengths[:_AT_ONCE]):
            tokens += length
            if count and tokens > _SPARE_TOKENS:
                return count
        return min(len(lengths), _AT_ONCE)

    def compute(self, tokens: Sequence[Token], embed_token: int) -> Array:
        """Take tokens into their sequences, in their order.

        Args:
            tokens: of each sequence those that follow what it holds.
            embed_token: of which the state is wanted; of other tokens the logits.

        Returns:
            For each token with an output, `B x (D + V)`: the state and the logits; what is not wanted is zero.

        Raises:
            ModelError: the cache is full, or llama.cpp fails.
        """
        dimension, rows = self.model.dimension, [token for token in tokens if token.has_output]
        results = np.zeros((len(rows), dimension + self.model.rows), dtype=np.float32)
        row_of = {(token.sequence, token.position): row for row, token in enumerate(rows)}
        # Where states are wanted llama.cpp gives outputs for every token of a batch, so these have one of their own.
        embeds = [token for token in rows if token.id == embed_token]
        others = [token for token in tokens if not (token.has_output and token.id == embed_token)]
        with self._lock:
            for part, has_states in ((others, False), (embeds, True)):
                columns = slice(0, dimension) if has_states else slice(dimension, None)
                for start in range(0, len(part), _BATCH):
                    batch = part[start : start + _BATCH]
                    self._decode(batch, has_states)
                    for place, token in enumerate(batch):
                        if token.has_output:
                            results[row_of[token.sequence, token.position], columns] = self._output(place, has_states)
        return results

    def _decode(self, tokens: Sequence[Token], has_states: bool) -> None:
        self._sweep()
        batch, library = self._batch, self.model.library
        batch.n_tokens = len(tokens)
        for place, token in enumerate(tokens):
            batch.token[place], batch.pos[place] = token.id, token.position
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, token.sequence
            batch.logits[place] = token.has_output
        library.llama_set_embeddings(self._handle, has_states)
        _ERRORS.clear()
        code = library.llama_decode(self._handle, batch)
        if code == 1:
            raise self._full()
        if code:
            raise ModelError(f"llama.cpp cannot compute {self.model.name} (code {code}): {' '.join(_ERRORS)}")

    def _output(self, place: int, has_states: bool) -> Array:
        library = self.model.library
        get = library.llama_get_embeddings_ith if has_states else library.llama_get_logits_ith
        values = get(self._handle, place)
        if not values:
            raise ModelError(f"llama.cpp gives no {'states' if has_states else 'logits'}; install a newer one")
        size = self.model.dimension if has_states else self.model.rows
        return np.ctypeslib.as_array(values, shape=(size,))

    def _sweep(self) -> None:
        """Empty the sequences that were given back."""
        while self._given_back:
            sequence = self._given_back.popleft()
            self.model.library.llama_memory_seq_rm(self._memory, sequence, -1, -1)
            self._free.add(sequence)

    def _full(self) -> ModelError:
        return ModelError(
            f"llama.cpp's cache for {self.model.name} is full of what other calls have in work; let them end, or load "
            "the model with a larger model_kwargs={'n_parallel': ...}"
        )
