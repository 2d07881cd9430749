"""The functions of llama-cpp-python that are used, computed by torch, so that what is asked of llama.cpp can be tested.

It is strict where llama.cpp is: positions follow each other, a cache has its size, and states come only where they are
switched on, then for every token.
"""

from __future__ import annotations

import ctypes
import itertools
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from search_r3.errors import ModelError
from search_r3.files import hash_file
from search_r3.model.llamacpp.metadata import read_metadata
from search_r3.model.reading.parts import load_causal_lm
from search_r3.model.source import find_files

LLAMA_POOLING_TYPE_NONE = 0


class FakeLlama:
    """Stands for the module `llama_cpp`."""

    LLAMA_POOLING_TYPE_NONE = LLAMA_POOLING_TYPE_NONE

    def __init__(self) -> None:
        self.decoded: list[int] = []  # tokens of each call
        self.freed: list[str] = []

    def llama_supports_gpu_offload(self) -> bool:
        return False

    def llama_model_default_params(self) -> Any:
        return SimpleNamespace()

    def llama_model_load_from_file(self, path: bytes, _: Any) -> Any:
        file = Path(os.fsdecode(path))
        try:
            weights, _ = load_causal_lm(find_files(file), torch.float32, False, {})
        except ModelError:
            return None
        return SimpleNamespace(weights=weights.eval(), value=read_metadata(file, file.name, lambda: hash_file(file)))

    def llama_model_free(self, _: Any) -> None:
        self.freed.append("model")

    def llama_model_n_embd(self, model: Any) -> int:
        return int(model.weights.config.hidden_size)

    def llama_model_get_vocab(self, model: Any) -> Any:
        return model

    def llama_vocab_n_tokens(self, model: Any) -> int:
        return len(model.weights.get_input_embeddings().weight)

    def llama_model_n_ctx_train(self, model: Any) -> int:
        return int(model.weights.config.max_position_embeddings)

    def llama_model_meta_val_str(self, model: Any, key: bytes, text: Any, size: int) -> int:
        value = model.value(key.decode())
        if value is None:
            return -1
        if text is not None:
            text.value = value.encode()[: size - 1]
        return len(value.encode())

    def llama_model_desc(self, _: Any, text: Any, size: int) -> int:
        text.value = b"llama 1B all F32"
        return size

    def llama_context_default_params(self) -> Any:
        return SimpleNamespace()

    def llama_init_from_model(self, model: Any, parameters: Any) -> Any:
        assert parameters.kv_unified and parameters.pooling_type == LLAMA_POOLING_TYPE_NONE
        return FakeContext(model.weights, parameters.n_ctx, parameters.n_seq_max)

    def llama_free(self, _: Any) -> None:
        self.freed.append("context")

    def llama_batch_init(self, tokens: int, _: int, sequences: int) -> Any:
        lists = {name: [0] * tokens for name in ("token", "pos", "n_seq_id", "logits")}
        return SimpleNamespace(n_tokens=0, seq_id=[[0] * sequences for _ in range(tokens)], **lists)

    def llama_batch_free(self, _: Any) -> None:
        self.freed.append("batch")

    def llama_get_memory(self, context: FakeContext) -> FakeContext:
        return context

    def llama_memory_seq_cp(self, context: FakeContext, source: int, target: int, start: int, end: int) -> None:
        assert (start, end) == (-1, -1) and not context.sequences[target]
        context.sequences[target] = list(context.sequences[source])

    def llama_memory_seq_rm(self, context: FakeContext, sequence: int, start: int, end: int) -> bool:
        assert (start, end) == (-1, -1)
        context.sequences[sequence] = []
        return True

    def llama_set_embeddings(self, context: FakeContext, on: bool) -> None:
        context.has_states = on

    def llama_decode(self, context: FakeContext, batch: Any) -> int:
        self.decoded.append(batch.n_tokens)
        return context.decode(batch)

    def llama_get_logits_ith(self, context: FakeContext, place: int) -> Any:
        return pointer(context.logits.get(place))

    def llama_get_embeddings_ith(self, context: FakeContext, place: int) -> Any:
        return pointer(context.states.get(place))


class FakeContext:
    """Sequences of cells; those that begin alike share them."""

    def __init__(self, weights: Any, cells: int, sequences: int) -> None:
        self.weights, self.cells, self.has_states = weights, cells, False
        self.sequences: list[list[tuple[int, int]]] = [[] for _ in range(sequences)]
        self.states: dict[int, Any] = {}
        self.logits: dict[int, Any] = {}
        self._cell = itertools.count()

    @torch.no_grad()
    def decode(self, batch: Any) -> int:
        self.states, self.logits = {}, {}
        if len(set().union(*self.sequences)) + batch.n_tokens > self.cells:
            return 1
        for place in range(batch.n_tokens):
            sequence = self.sequences[batch.seq_id[place][0]]
            if batch.n_seq_id[place] != 1 or batch.pos[place] != len(sequence):
                return -1
            sequence.append((next(self._cell), batch.token[place]))
            if batch.logits[place] or self.has_states:
                ids = torch.tensor([[token for _, token in sequence]])
                state = self.weights.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, -1]
                self.logits[place] = self.weights.get_output_embeddings()(state).numpy()
                if self.has_states:
                    self.states[place] = state.numpy()
        return 0


def pointer(values: Any) -> Any:
    return None if values is None else values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
