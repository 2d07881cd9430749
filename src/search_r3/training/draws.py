"""Which examples a step of stage 1 learns from: any step's batch follows from the seed, so nothing has to be saved."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from ..config import SFTSettings
from ..data.triples import TrainingExample
from .engine import step_rng

Keys = Callable[[TrainingExample], frozenset[str]]
"""What two examples of one batch may not share: the query's text and its positives' texts."""


class Draws:
    """The examples of each step.

    Args:
        examples: split -> its examples.
        settings: shares of the splits, size of a batch, and how it is put together.
        seed: of the recipe.
        keys: of an example, for `batching: homogeneous`.
    """

    def __init__(
        self, examples: Mapping[str, Sequence[TrainingExample]], settings: SFTSettings, seed: int, keys: Keys
    ) -> None:
        self.examples, self.settings, self.seed, self.keys = examples, settings, seed, keys
        self._passes = {split: _Passes() for split in settings.splits}
        self._drawn: list[tuple[str, int]] = []  # of every step so far: its split, and which batch of it

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
    """The pass over a split that was looked at last.

    Attributes:
        drawn: batches that the steps so far have taken of the split.
        number: of the pass.
        before: batches of the passes before it.
        batches: its batches.
    """

    drawn: int = 0
    number: int = -1
    before: int = 0
    batches: list[list[TrainingExample]] = field(default_factory=list)


def split_without_conflicts(order: Sequence[TrainingExample], size: int, keys: Keys) -> list[list[TrainingExample]]:
    """Batches of up to `size` examples of which no two share a key, in the order of the examples where possible.

    A last batch of less than half the size is left out, unless it is the only one.
    """
    batches: list[list[TrainingExample]] = []
    waiting = list(order)
    while waiting:
        chosen: list[TrainingExample] = []
        taken: set[str] = set()
        later: list[TrainingExample] = []
        for place, example in enumerate(waiting):
            if len(chosen) == size:
                later += waiting[place:]
                break
            own = keys(example)
            if own & taken:
                later.append(example)
            else:
                chosen.append(example)
                taken |= own
        if batches and len(chosen) < size / 2:
            break
        batches.append(chosen)
        waiting = later
    return batches
