"""What encoding returns, and what of sentence-transformers' arguments it takes.

Shapes: `Q` queries, `N` texts, `D` vector size.
"""

from __future__ import annotations

import difflib
import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import Any, TypedDict

import numpy as np
import torch

from ..errors import ConfigError, DataError
from ..types import Array, Progress
from .precision import torch_device

FACTS = ("reasoning", "reasoning_tokens", "forced", "truncated", "thought", "gate")


class QueryEmbeddings(np.ndarray[tuple[int, int], np.dtype[np.float32]]):
    """What `encode_query` returns: an array of vectors, `Q x D`, float32, L2-normalised, with facts about each query.

    A slice of it, a mask or a list of rows keeps the facts of its rows. A single row is a plain vector, and what is
    computed from it is a plain array without facts.

    Attributes:
        reasoning: the text each query's reply held before the embed token (empty in direct mode).
        reasoning_tokens: its length in tokens.
        forced: whether the embed token had to be forced.
        truncated: whether the query was longer than the model's `max_length` and lost its end.
        thought: whether it was reasoned about: in mode auto the gate decides, query by query.
        gate: in mode auto what the gate saw: the `probability` that reasoning pays, and what each thing adds to its
            log-odds; else empty.

    Example:
        >>> queries = QueryEmbeddings(np.eye(3), ["a", "b", "c"], [1, 2, 3], [False] * 3, [False] * 3)
        >>> queries[1:].reasoning, queries[[0, 2]].reasoning_tokens, (queries @ queries.T).shape
        (['b', 'c'], [1, 3], (3, 3))
    """

    reasoning: list[str]
    reasoning_tokens: list[int]
    forced: list[bool]
    truncated: list[bool]
    thought: list[bool]
    gate: list[dict[str, float]]

    def __new__(
        cls,
        vectors: Any,
        reasoning: Sequence[str],
        reasoning_tokens: Sequence[int],
        forced: Sequence[bool],
        truncated: Sequence[bool],
        thought: Sequence[bool] | None = None,
        gate: Sequence[dict[str, float]] | None = None,
    ) -> QueryEmbeddings:
        """Put facts beside vectors; by default those thought that wrote something.

        Raises:
            ValueError: there are more or fewer of them.
        """
        result = np.asarray(vectors, dtype=np.float32).view(cls)
        thought = [tokens > 0 for tokens in reasoning_tokens] if thought is None else thought
        gate = [{} for _ in reasoning_tokens] if gate is None else gate
        facts = (reasoning, reasoning_tokens, forced, truncated, thought, gate)
        for name, values in zip(FACTS, facts, strict=True):
            if len(values) != len(result):
                raise ValueError(f"{len(values)} values of {name} for {len(result)} vectors")
            setattr(result, name, list(values))
        return result

    @property
    def vectors(self) -> Array:
        """The vectors as a plain array; nothing is copied."""
        return np.asarray(self)

    def shortened(self, dimensions: int | None) -> QueryEmbeddings:
        """The first dimensions of the vectors, normalised again, with the same facts; all of them for None."""
        return self if dimensions is None else QueryEmbeddings(shorten(self.vectors, dimensions), *(self._facts or ()))

    @property
    def _facts(self) -> list[list[Any]] | None:
        """The lists of facts; None for what was computed from such an array."""
        return [getattr(self, name) for name in FACTS] if hasattr(self, FACTS[0]) else None

    def __getitem__(self, index: Any) -> Any:
        part = self.vectors[index]
        if isinstance(index, tuple) or part.ndim != 2 or self._facts is None:
            return part
        rows = np.arange(len(self))[index]
        return QueryEmbeddings(part, *([values[row] for row in rows] for values in self._facts))

    def __array_wrap__(self, array: Any, context: Any = None, return_scalar: bool = False) -> Any:
        return array[()] if return_scalar else np.asarray(array)

    def __reduce__(self) -> Any:
        return self.vectors.__reduce__() if self._facts is None else (QueryEmbeddings, (self.vectors, *self._facts))

    def __deepcopy__(self, memo: Any) -> Any:
        return self.vectors.copy() if self._facts is None else QueryEmbeddings(self.vectors.copy(), *self._facts)

    def __getattr__(self, name: str) -> Any:
        if name in FACTS:
            raise AttributeError(
                f"{name} is with what encode_query returned and its rows, not with what is computed from it"
            )
        raise AttributeError(f"an array of vectors has no {name!r}")


class Habits(TypedDict, total=False):
    """What encoding takes of sentence-transformers' arguments, beside its own."""

    show_progress_bar: bool | None
    """A bar on stderr; without it where the log shows information."""
    convert_to_tensor: bool
    """Return a `torch.Tensor` of the vectors, on the model's device, without the facts about queries."""
    convert_to_numpy: bool
    """Off, and without `convert_to_tensor`: a list of tensors."""
    truncate_dim: int | None
    """In place of the model's."""
    normalize_embeddings: bool
    """Vectors always have length 1."""
    prompt_name: str | None
    """`query` or `document`, as the method says already."""
    prompt: str | None
    """None; see `instruction`, and `prompts` of `SearchR3`."""
    output_value: str | None
    """`sentence_embedding`."""
    precision: str
    """`float32`."""
    device: Any
    """By default the model's own; of several each takes a share of the texts, on a copy of the model for this call."""
    pool: None
    """There are no pools of processes; see `device`."""
    chunk_size: int | None
    """Without a pool it says nothing."""


def check_habits(habits: Habits, kind: str, method: Callable[..., Any]) -> None:
    """Refuse what cannot be done.

    Args:
        habits: the arguments.
        kind: `query` or `document`.
        method: whose arguments they are.

    Raises:
        TypeError: an argument that nobody knows.
        ConfigError: one that asks for something else than can be had; the message says what to do instead.
    """
    for name in habits:
        if name not in Habits.__annotations__:
            names = [*Habits.__annotations__, *inspect.signature(method).parameters]
            near = difflib.get_close_matches(name, names, n=1)
            raise TypeError(f"{method.__name__}() takes no {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    if habits.get("prompt_name") not in (None, kind):
        raise ConfigError(
            f"{method.__name__} takes the prompt of a {kind}, not {habits['prompt_name']!r}; there are encode_query, "
            "encode_document, and encode(texts, prompt_name=...)"
        )
    if habits.get("prompt"):
        raise ConfigError(
            "no text stands before the texts (prompt=...): give what is asked of them as instruction=, and the wording "
            "that a model was trained with as SearchR3(..., prompts=...)"
        )
    if habits.get("output_value", "sentence_embedding") != "sentence_embedding":
        raise ConfigError(f"output_value={habits['output_value']!r}: a text has one vector; leave it out")
    if habits.get("precision", "float32") != "float32":
        raise ConfigError(
            f"precision={habits['precision']!r}: vectors are float32; quantize what is returned, or store float16 with "
            "`search-r3 encode --vectors float16`"
        )
    if habits.get("pool") is not None:
        raise ConfigError("pool: there are no pools of processes; device=['cuda:0', 'cuda:1'] computes on several")


def devices_of(habits: Habits, own: torch.device) -> list[torch.device]:
    """Where is computed.

    Raises:
        ConfigError: a device is not there.
    """
    asked = habits.get("device")
    several = asked if isinstance(asked, list | tuple) else [] if asked is None else [asked]
    return [torch_device(one) for one in several] or [own]


@contextmanager
def telling(what: str, total: int, progress: Progress | None, bar: bool | None) -> Iterator[Progress | None]:
    """What is told of the progress, by one thread at a time: `progress`, and a bar where one is wanted."""
    if bar is None:
        bar = logging.getLogger(__package__).isEnabledFor(logging.INFO)
    if not bar and progress is None:
        yield None
        return
    from tqdm.auto import tqdm

    lock = Lock()
    with tqdm(total=total, desc=what, unit=" texts", disable=not bar) as shown:

        def told(texts: int, tokens: int) -> None:
            with lock:
                shown.update(texts)
                if progress is not None:
                    progress(texts, tokens)

        yield told


def as_asked(vectors: Array, habits: Habits, device: torch.device) -> Any:
    """The vectors, `N x D`, as the arguments say: as they are, or as tensors."""
    tensor = habits.get("convert_to_tensor", False)
    if not tensor and habits.get("convert_to_numpy", True):
        return vectors
    result = torch.from_numpy(np.asarray(vectors)).to(device)
    return result if tensor else list(result)


def shorten(vectors: Array, dimensions: int | None) -> Array:
    """The first dimensions of each vector, normalised again; all of them for None."""
    if dimensions is None:
        return vectors
    head = vectors[:, :dimensions]
    result: Array = head / np.linalg.norm(head, axis=1, keepdims=True)
    return result


def as_list(texts: str | Sequence[str], kind: str) -> list[str]:
    """The texts; a single one counts as one.

    Raises:
        DataError: there are none, or something else than texts.
    """
    if isinstance(texts, Mapping | bytes) or not isinstance(texts, Iterable):
        raise DataError(f"the texts are of type {type(texts).__name__}; expected a list of strings")
    result = [texts] if isinstance(texts, str) else list(texts)
    if not result:
        raise DataError(f"no {kind} was given; give at least one text")
    return result


def plain(vectors: Any) -> Array:
    """Vectors as a float32 array, also those of a tensor on whatever device.

    Raises:
        DataError: they are no numbers.
    """
    if isinstance(vectors, torch.Tensor):
        vectors = vectors.detach().float().cpu()
    try:
        return np.asarray(vectors, dtype=np.float32)
    except (ValueError, TypeError) as error:
        raise DataError("expected vectors, found something else; encode texts first") from error
