"""Ends of a training that nobody planned: a signal, a loss that is no number, a process that died."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

from ..environment.exchange import Exchange
from ..errors import RunError, StoppedError
from ..files import write_json
from .run import Run, Trained

NAMING = timedelta(seconds=60)
"""How long the processes wait for each other to find out which of them has died."""


class Guard:
    """Watches over one stage of a run.

    Args:
        run: where it saves.
        stage: `sft` or `grpo`.
        trained: what it saves.
        save_extra: writes what the stage keeps beside that.
    """

    def __init__(
        self, run: Run, stage: str, trained: Trained, save_extra: Callable[[Path], None] = lambda folder: None
    ) -> None:
        self.run, self.stage, self.trained, self.save_extra = run, stage, trained, save_extra
        self._asked = False

    @contextmanager
    def watching(self) -> Iterator[Guard]:
        """While the stage runs: SIGTERM waits for the end of the step, and a lost process is named.

        Raises:
            RunError: another process died.
        """
        main = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGTERM, self._ask) if main else None
        try:
            yield self
        except RuntimeError:
            name_the_lost(self.trained.exchange)
            raise
        finally:
            if main:
                signal.signal(signal.SIGTERM, before)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def after(self, step: int) -> None:
        """What is due after a step: a checkpoint every `save_every` steps, and the end that SIGTERM asked for.

        Raises:
            StoppedError: SIGTERM came; all is saved.
        """
        asked = any(self.trained.exchange.gather(self._asked))
        if asked or step % self.run.recipe.save_every == 0:
            self.save(step)
        if asked:
            raise StoppedError(
                f"stopped by SIGTERM after step {step} of {self.stage}; all is saved: go on with --resume"
            )

    def save(self, step: int) -> None:
        """Write a checkpoint of the weights after `step`."""
        self.run.save_checkpoint(self.stage, step, self.trained, self.save_extra)

    def check(self, values: Mapping[str, float], step: int, batch: Mapping[str, Any]) -> None:
        """Refuse to go on from values that are no numbers; the weights are still those before `step`, and are saved.

        Args:
            values: losses and norms, the same in every process.
            step: the step under way.
            batch: what it was computed from; written to `failed-batch.json`.

        Raises:
            RunError: a value is NaN or infinite; step, batch and what to do are named.
        """
        wrong = [name for name, value in values.items() if not math.isfinite(value)]
        if not wrong:
            return
        path = self.run.folder / "failed-batch.json"
        if self.run.first:
            write_json(path, {"stage": self.stage, "step": step, "not_finite": wrong, **batch})
        self.save(step - 1)
        queries = list(batch["query_ids"])
        raise RunError(
            f"{wrong[0]} is {values[wrong[0]]} at step {step} of {self.stage}, in the batch of the queries "
            f"{', '.join(queries[:3])}{', ...' if len(queries) > 3 else ''} (all in {path}); the weights before that "
            f"step are saved: look at the batch, or start anew in another run_dir, lowering {self.stage}.learning_rate"
        )


def name_the_lost(exchange: Exchange) -> None:
    """After an error of a collective: meet, so that whoever does not come is named.

    Raises:
        RunError: a process did not come.
    """
    if exchange.world_size > 1:
        exchange.meet(NAMING)
