"""Ends of a training that nobody planned: a signal, a loss that is no number, a process that died."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from ..errors import ModelError, RewardError, RunError, StoppedError, VectorIndexError
from ..files import write_json
from ..parallel import agree, is_of_a_collective, name_the_missing
from .engine import Engine, deepspeed_plugin
from .run import Run

TOGETHER_S = 10.0
"""Seconds in which a second SIGTERM counts as the first: scheduler and launcher may both signal a process."""


class Guard:
    """Watches over one stage of a run.

    Args:
        run: where it saves.
        stage: `sft` or `grpo`.
        engine: holds what it saves.
        save_extra: writes what the stage keeps beside that.
    """

    def __init__(
        self, run: Run, stage: str, engine: Engine, save_extra: Callable[[Path], None] = lambda folder: None
    ) -> None:
        self.run, self.stage, self.engine, self.save_extra = run, stage, engine, save_extra
        self.on_save: Callable[[], None] = lambda: None
        """Called after a checkpoint that was due, or asked for."""
        self._stop, self._stop_at = False, 0.0
        self._moved = -1  # the last step that has changed the weights

    @contextmanager
    def watching(self) -> Iterator[Guard]:
        """While the stage runs: SIGTERM waits for the end of the step, a second one does not; a lost process is named.

        Raises:
            RunError: another process died.
            StoppedError: SIGTERM came after the last step; the stage is complete.
        """
        main = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGTERM, self._on_signal) if main else None
        try:
            yield self
            if any(self.engine.communicator.all_gather(self._stop)):
                raise StoppedError(f"stopped by SIGTERM; {self.stage} is complete: what follows goes on with --resume")
        except RuntimeError as error:
            if is_of_a_collective(error):
                name_the_missing(self.engine.communicator)
            raise
        except (ModelError, RewardError, VectorIndexError) as error:
            if not _are_finite(self.engine.policy):
                raise self._not_finite_error(f"{error}") from error
            raise
        finally:
            if main:
                signal.signal(signal.SIGTERM, before)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._stop and now - self._stop_at > TOGETHER_S:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
        if not self._stop:
            self._stop, self._stop_at = True, now

    def after(self, step: int, save: bool = False) -> None:
        """What is due after a step: a checkpoint every `save_every` steps, and the end that SIGTERM asked for.

        Args:
            step: that is done.
            save: whether a checkpoint is wanted whatever its number; the same in all processes.

        Raises:
            RunError: the checkpoint cannot be written, or the weights are no numbers: they are not saved.
            StoppedError: SIGTERM came; all is saved.
        """
        communicator = self.engine.communicator
        stop = any(communicator.all_gather(self._stop))
        if stop or save or step % self.run.recipe.save_every == 0:
            if not all(communicator.all_gather(_are_finite(self.engine.policy))):
                raise self._not_finite_error("they are not saved")
            self.save(step)
            self.on_save()
        if stop:
            raise StoppedError(
                f"stopped by SIGTERM after step {step} of {self.stage}; all is saved: go on with --resume"
            )

    def save(self, step: int) -> None:
        """Write a checkpoint of the weights after `step`."""
        self.run.save_checkpoint(self.stage, step, self.engine, self.save_extra)

    def check(self, values: Mapping[str, float], step: int, batch: Mapping[str, Any]) -> None:
        """Refuse to go on from values that are no numbers; the weights before `step` are saved, if they are numbers.

        Args:
            values: losses and norms of this process, or of all.
            step: the step under way; it may be checked before each of several changes of the weights.
            batch: what it was computed from, in this process: lists of ids; all are written to `failed-batch.json`.

        Raises:
            RunError: a value is NaN or infinite; step, batch and what to do are named.
        """
        communicator, path = self.engine.communicator, self.run.folder / "failed-batch.json"
        faults = communicator.all_gather({name: value for name, value in values.items() if not math.isfinite(value)})
        nans = {name: value for own in faults for name, value in own.items()}
        if not nans:
            self._moved = step
            return
        everyone = communicator.all_gather(dict(batch))
        whole = {name: list(dict.fromkeys(item for own in everyone for item in own[name])) for name in batch}
        record = {"stage": self.stage, "step": step, "not_finite": list(nans), **whole}
        agree(communicator, path, lambda: write_json(path, record) if self.run.first else None)
        if not all(communicator.all_gather(_are_finite(self.engine.policy))):
            remedy = "the weights before that step hold NaN or infinity already, and are not saved again"
        elif self._moved == step or deepspeed_plugin(self.engine.accelerator) is not None:  # it steps in backward
            remedy = "the step had changed the weights already: they stand in the checkpoint before it"
        else:
            self.save(step - 1)
            remedy = "the weights before that step are saved"
        queries, (name, value) = whole["query_ids"], next(iter(nans.items()))
        raise RunError(
            f"{name} is {value} at step {step} of {self.stage}, in the batch of the queries "
            f"{', '.join(queries[:3])}{', ...' if len(queries) > 3 else ''} (all in {path}); {remedy}: look at the "
            f"batch, or start anew in another run_dir, lowering {self.stage}.learning_rate"
        )

    def _not_finite_error(self, reason: str) -> RunError:
        return RunError(
            f"the weights hold NaN or infinity after step {self._moved} of {self.stage} ({reason}); the checkpoints "
            f"are those of steps before: start anew in another run_dir, lowering {self.stage}.learning_rate"
        )


def _are_finite(policy: Any) -> bool:
    """Whether this process's part of the weights holds numbers only."""
    own = (getattr(parameter, "to_local", lambda held=parameter: held)() for parameter in policy.parameters())
    return all(bool(part.isfinite().all()) for part in own)
