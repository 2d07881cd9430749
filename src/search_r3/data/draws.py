"""Which examples a step of stage 1 learns from: any step's batch follows from the seed, so nothing has to be saved."""

from __future__ import annotations

import logging
import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import islice

from ..config import SFTSettings
from ..errors import ConfigError, DataError
from .collection import Collection
from .triples import TrainingExample

logger = logging.getLogger(__name__)

Keys = Callable[[TrainingExample], frozenset[str]]
"""What two examples of one batch may not share: the query's text and its positives' texts."""


class Draws:
    """The examples of each step.

    Args:
        examples: split -> its examples.
        settings: shares of the splits, size of a batch, and how it is put together.
        seed: of the recipe.
        keys: of an example, for `batching: homogeneous`.
        least: examples that each batch needs, one for every process.

    Raises:
        ConfigError: `batching: homogeneous` would give some step a batch of fewer than `least` examples.
        DataError: a split holds no query.
    """

    def __init__(
        self,
        examples: Mapping[str, Sequence[TrainingExample]],
        settings: SFTSettings,
        seed: int,
        keys: Keys,
        least: int = 1,
    ) -> None:
        self.examples, self.settings, self.seed, self.keys = examples, settings, seed, keys
        self._passes = {split: _Passes() for split in settings.splits}
        self._drawn: list[tuple[str, int]] = []  # of every step so far: its split, and which batch of it
        for split in settings.splits:
            if not examples[split]:
                raise DataError(f"split {split!r} holds no query; leave it out of sft.splits")
        if settings.batching == "homogeneous":
            self._check(least)

    def _check(self, least: int) -> None:
        size = self.settings.batch_size
        for step in range(self.settings.steps if least > 1 else 0):  # the passes of a split differ
            if (count := len(self.batch(step, random.Random()))) < least:
                raise ConfigError(
                    f"sft.batching=homogeneous gives step {step + 1} a batch of {count} of sft.batch_size={size} "
                    f"queries, of split {self._drawn[step][0]!r}, too few for {least} processes; raise batch_size, "
                    "launch fewer, or set batching=mixed"
                )
        for split in self.settings.splits:
            if (first := len(self._batch_of(split, 0))) < size / 2:
                logger.warning(
                    "split %r: no more than %d of sft.batch_size=%d queries share no text and no positive; a batch "
                    "from it is that small, and sft.batching=mixed would not be",
                    *(split, first, size),
                )

    def batch(self, step: int, rng: random.Random) -> list[TrainingExample]:
        """The examples of one step; steps may be asked for in any order.

        Args:
            step: from 0.
            rng: of that step; only `batching: mixed` draws from it.
        """
        splits, shares = list(self.settings.splits), list(self.settings.splits.values())
        if self.settings.batching == "mixed":
            chosen = rng.choices(splits, shares, k=self.settings.batch_size)
            return [rng.choice(self.examples[split]) for split in chosen]
        while len(self._drawn) <= step:
            split = step_rng(self.seed, "split", len(self._drawn)).choices(splits, shares)[0]
            self._drawn.append((split, self._passes[split].drawn))
            self._passes[split].drawn += 1
        split, number = self._drawn[step]
        return self._batch_of(split, number)

    def _batch_of(self, split: str, number: int) -> list[TrainingExample]:
        """The batch with this number of a split: pass after pass over its examples, each in its own order."""
        passes = self._passes[split]
        if number < passes.before:
            passes.before, passes.number, passes.batches = 0, -1, []
        while number >= passes.before + len(passes.batches):
            passes.before += len(passes.batches)
            passes.number += 1
            order = list(self.examples[split])
            step_rng(self.seed, f"pass/{split}", passes.number).shuffle(order)
            passes.batches = split_without_conflicts(order, self.settings.batch_size, self.keys)
        return passes.batches[number - passes.before]


@dataclass
class _Passes:
    """The pass over a split that was looked at last."""

    drawn: int = 0  # batches that the steps so far have taken of the split
    number: int = -1  # of the pass
    before: int = 0  # batches of the passes before it
    batches: list[list[TrainingExample]] = field(default_factory=list)


def split_without_conflicts(order: Sequence[TrainingExample], size: int, keys: Keys) -> list[list[TrainingExample]]:
    """Batches of up to `size` examples of which no two share a key, in the order of the examples where possible.

    An example that shares one with its batch waits for the next; of those that wait for one key a batch takes one. So
    the work grows with the number of examples and not with its square. Batches of less than half the size are left out,
    unless all are: then the largest is the only one.
    """
    batches: list[list[TrainingExample]] = []
    largest: list[TrainingExample] = []
    fresh, waiting = iter(order), dict[str, deque[TrainingExample]]()
    while True:
        chosen: list[TrainingExample] = []
        taken: set[str] = set()

        for key in list(islice(waiting, size)):
            if _shared(waiting[key][0], keys, chosen, taken) is None:
                waiting[key].popleft()
                if line := waiting.pop(key):
                    waiting[key] = line  # the others come first in the next batch
        while len(chosen) < size and (example := next(fresh, None)) is not None:
            if (conflict := _shared(example, keys, chosen, taken)) is not None:
                waiting.setdefault(conflict, deque()).append(example)
        if not chosen:
            return batches or [largest]
        if len(chosen) >= size / 2:
            batches.append(chosen)
        largest = max(largest, chosen, key=len)


def _shared(example: TrainingExample, keys: Keys, chosen: list[TrainingExample], taken: set[str]) -> str | None:
    """A key that the batch has already; without one the example is taken into it."""
    own = keys(example)
    if own & taken:
        return min(own & taken)  # the same in every process
    chosen.append(example)
    taken |= own
    return None


def text_keys(collection: Collection, settings: SFTSettings) -> Keys:
    """The query's text, in small letters, and the texts of its positives: as short hashes, since they are many.

    Args:
        collection: holds the texts.
        settings: whether queries are trained without their instructions; then their texts are compared without.
    """

    def keys(example: TrainingExample) -> frozenset[str]:
        text = example.query.bare if settings.uninstructed else example.query.text
        texts = [f"query {text.casefold()}"]
        texts += [collection.documents[doc_id].full_text for doc_id in example.positive_ids]
        return frozenset(blake2b(text.encode(), digest_size=8).hexdigest() for text in texts)

    return keys


def step_rng(seed: int, stage: str, step: int) -> random.Random:
    """The random numbers of one step: a resumed run draws the same ones without a saved state."""
    return random.Random(f"{seed}/{stage}/{step}")
