"""Encoding many texts: batches by tokens, the template before the text computed once, a stream in and a stream out.

Shapes: `N` texts, `D` hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray

from ..data.reading.chunks import Chunking
from ..errors import ConfigError, ModelError
from ..types import Array, Progress, Rows
from .backbone import Backbone
from .engine.engines import Engine, make_engine
from .engine.forward import length_batches
from .prompts import EncodedPrompt, Kind

# On a CPU a batch should fit into the caches; a GPU wants to be filled (benchmarks/documents.py).
BATCH_TOKENS = {"cpu": 1024, "mps": 8192, "cuda": 32768}
WINDOW = 4096
CHUNK_TOKENS = 512
"""The largest chunk of a document where nothing else is asked for and the model has room for it."""


def encode_stream(
    backbone: Backbone,
    texts: Iterable[str],
    kind: Kind,
    *,
    instruction: str | Sequence[str] = "",
    batch_size: int | None = None,
    batch_tokens: int | None = None,
    window: int = WINDOW,
    progress: Progress | None = None,
) -> Iterator[tuple[list[EncodedPrompt], Array]]:
    """Encode texts in blocks of up to `window`, in their order; only one block is in memory.

    Args:
        backbone: the model.
        texts: read as far as the next block needs.
        kind: `direct` or `document`.
        instruction: one that follows each text, or one per text where all are one block.
        batch_size: texts computed together, at most.
        batch_tokens: tokens computed together, at most, padding included; it changes vectors by rounding only.
        window: texts per block; within it texts of like length share a batch.
        progress: called after each batch with the numbers of texts and of their tokens.

    Yields:
        The block's prompts and its vectors, `N x D`, float32, L2-normalised.

    Raises:
        DataError: a text is empty (its place in the block is named), or an instruction leaves no room for its text.
        ModelError: a vector holds NaN or infinity.
    """
    if batch_tokens is None:
        batch_tokens = BATCH_TOKENS.get(backbone.device.type, BATCH_TOKENS["cuda"])
    if batch_tokens < 1:
        raise ConfigError(f"batch_tokens={batch_tokens}: expected at least 1")
    engine = make_engine(backbone)
    source = iter(texts)
    while block := list(islice(source, window)):
        prompts = backbone.prompt_encoder.encode_batch(block, kind, instruction)
        prefix = backbone.prompt_encoder.prefix_of(prompts[0].ids)  # a bare template may have nothing before a text
        if prefix and not engine.beginning and (len(block) > 1 or backbone.prefixes.keeps):
            with torch.inference_mode():
                engine.share(prefix)
        limits = batch_tokens, batch_size or len(block)
        vectors = _vectors(backbone, [prompt.ids for prompt in prompts], engine, limits, progress)
        check_finite(vectors, block, backbone.source)
        yield prompts, vectors


def document_chunking(
    backbone: Backbone, max_tokens: int | None = None, *, overlap: int = 0, instruction: str = ""
) -> Chunking:
    """How documents are cut for a model, in its own tokens, so that none loses its end.

    Args:
        backbone: the model.
        max_tokens: the largest chunk; by default 512, or what the model has room for.
        overlap: as in `Chunking`.
        instruction: of the documents.

    Raises:
        ConfigError: the model has no room for such chunks.
    """
    encoder = backbone.prompt_encoder
    # One more for the blank before the instruction.
    room = encoder.room("document") - (encoder.count_tokens([instruction])[0] + 1 if instruction.strip() else 0)
    if max_tokens is not None and max_tokens > room:
        raise ConfigError(
            f"chunks of {max_tokens} tokens, but with max_length={encoder.max_length} the model has room for {room} "
            "beside its prompt; make the chunks smaller or max_length larger"
        )
    return Chunking(min(CHUNK_TOKENS, room) if max_tokens is None else max_tokens, overlap, encoder.count_tokens)


def check_finite(vectors: NDArray[np.floating], texts: Sequence[str], source: str) -> None:
    """Refuse vectors (`N x D`) that cannot be compared.

    Raises:
        ModelError: one holds NaN or infinity; the model and the beginning of the text are named.
    """
    places = unusable_rows(vectors)
    if len(places):
        raise ModelError(
            f"{source} gave NaN or infinity in the vectors of {len(places)} of {len(texts)} texts (first: "
            f"{texts[places[0]][:60]!r}): its weights are broken, or its dtype is too narrow; try float32 or bfloat16"
        )


def unusable_rows(vectors: NDArray[np.floating], dtype: str = "float32") -> Rows:
    """The vectors (`N x D`) that cannot be compared, or stored as `dtype`: they hold NaN, infinity or too much."""
    # NaN fails every comparison.
    return np.flatnonzero(~(np.abs(vectors) <= np.finfo(dtype).max).all(axis=1))


@torch.inference_mode()
def _vectors(
    backbone: Backbone,
    sequences: Sequence[Sequence[int]],
    engine: Engine,
    limits: tuple[int, int],
    progress: Progress | None,
) -> Array:
    vectors = np.empty((len(sequences), backbone.dimension), dtype=np.float32)
    start = len(engine.beginning)
    for batch in length_batches([sequence[start:] for sequence in sequences], *limits):
        hidden = engine.encode([sequences[i] for i in batch])
        vectors[batch] = backbone.vectors(hidden).cpu().numpy()
        if progress is not None:
            progress(len(batch), sum(len(sequences[i]) for i in batch))
    return vectors
