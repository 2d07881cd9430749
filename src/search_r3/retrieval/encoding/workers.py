"""Encoding by the actors of a Ray cluster (Ray Data): blocks of a corpus go out, and come back, as Parquet files.

The texts of a block stand in a file before an actor is asked for it, and its vectors in another one before it is done;
both are in a folder that all machines must see. So an actor that dies costs the block that it had, and a run that is
killed the blocks that were under way. A block is what one process would encode at once, so its vectors are the same.

Shapes: `N` documents of a block, `D` vector size.
"""

from __future__ import annotations

import logging
import os
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...errors import ConfigError, SearchR3Error, VectorIndexError
from ...extras import extra
from ...files import atomic_file
from ...model.encoder import SearchR3
from ...types import Array, Progress
from .identity import Peer
from .survey import Block

CPUS = 0.5
"""Logical CPUs that an actor books. Where actors book all, none is left for Ray's own tasks, and nothing happens."""
TRIES = 4
"""Actors that a block may kill."""
OBJECTS = 128 * 2**20
"""Bytes that a Ray of our own takes for objects; names of files are all that it passes on."""


@dataclass(frozen=True)
class RayWorkers:
    """Actors that encode.

    Attributes:
        load: makes the model in every actor; what it reads must be where the actor is.
        address: of the cluster, as `ray.init` takes it (`auto`, `HOST:PORT`); `local` starts one on this machine for
            the time of the call. By default what `RAY_ADDRESS` says, else `local`.
        actors: by default one for each GPU, or for each machine where there is none.

    Raises:
        MissingExtraError: Ray is not installed.
    """

    load: Callable[[], SearchR3 | Peer]
    address: str | None = None
    actors: int | None = None

    def __post_init__(self) -> None:
        with extra("ray"):
            import ray.data  # noqa: F401 - said before hours are spent on the rest

    def encode(
        self, blocks: Iterable[tuple[int, Block]], folder: Path, instruction: str, progress: Progress | None
    ) -> None:
        """Encode those of the blocks, each with the number of its first document, whose vectors are not in `folder`.

        Raises:
            ConfigError: the cluster cannot be reached, or has no room for so many actors.
            SearchR3Error: a block cannot be encoded; what is done stays done.
        """
        with extra("ray"):
            import ray

        folder = folder.resolve()
        items = list(_written(blocks, folder))
        if not items:
            return
        with _joined(ray, self.address or os.environ.get("RAY_ADDRESS") or "local", self.actors):
            actors, threads, gpus = _room(ray, self.actors)
            options: dict[str, Any] = {"num_gpus": 1} if gpus else {}
            ray.data.DataContext.get_current().enable_progress_bars = False
            logging.getLogger("ray.data").setLevel(logging.ERROR)
            rows = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
                _Actor,
                batch_size=1,
                batch_format="numpy",
                compute=ray.data.ActorPoolStrategy(size=actors),
                fn_constructor_kwargs={"load": self.load, "instruction": instruction, "threads": threads},
                num_cpus=CPUS,
                **options,
            )
            try:
                for row in rows.iter_rows():
                    if row["fault"]:
                        raise VectorIndexError(str(row["fault"]))
                    if progress is not None:
                        progress(int(row["texts"]), int(row["tokens"]))
            except ray.exceptions.RayError as error:
                reason = textwrap.shorten(str(error).strip().splitlines()[-1], 240, placeholder=" ...")
                raise VectorIndexError(
                    f"Ray gave up: {reason} ({type(error).__name__}); what is done stays done: the same command goes on"
                ) from error


class _Actor:
    """Encodes one block after the other; lives in a process of Ray's."""

    def __init__(self, load: Callable[[], SearchR3 | Peer], instruction: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self._model, self._instruction = load(), instruction

    def __call__(self, batch: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        tokens, texts, fault = 0, 0, ""

        def count(done: int, read: int) -> None:
            nonlocal tokens
            tokens += read

        for source, target in zip(batch["source"].tolist(), batch["target"].tolist(), strict=True):
            try:
                _note_try(Path(source))
                texts += self._encode(Path(source), Path(target), count)
            except SearchR3Error as error:  # an error of Ray's would be pages long
                fault = str(error)
        return {"texts": np.array([texts]), "tokens": np.array([tokens]), "fault": np.array([fault])}

    def _encode(self, source: Path, target: Path, count: Progress) -> int:
        """Encode a block, unless it is done: an actor that died may have had more than one."""
        with extra("ray"):
            import pyarrow as pa
            from pyarrow import parquet

        if target.exists():
            return 0
        block = parquet.read_table(source)
        texts = block["text"].to_pylist()
        vectors = np.asarray(self._model.encode_document(texts, instruction=self._instruction, progress=count))
        values = pa.FixedSizeListArray.from_arrays(pa.array(vectors.astype(np.float32).ravel()), vectors.shape[1])
        with atomic_file(target) as path:
            parquet.write_table(pa.table({"id": block["id"], "vector": values}), path, compression="none")
        source.unlink(missing_ok=True)  # an actor of a run that was killed may be at it, too
        return len(texts)


def _note_try(source: Path) -> None:
    """Count how often a block was begun, and refuse one that kills every actor; Ray itself would go on for ever."""
    tries = source.with_suffix(".tries")
    with tries.open("ab") as file:
        file.write(b".")
    if tries.stat().st_size > TRIES:
        raise VectorIndexError(
            f"the texts in {source} have killed {TRIES} actors, perhaps for want of memory; give actors more, or try "
            "a smaller block size in another folder"
        )


def read_block(folder: Path, start: int, block: Block) -> Array:
    """The vectors of a block, `N x D`, as an actor wrote them.

    Raises:
        VectorIndexError: the file is missing or damaged, or of other documents.
    """
    with extra("ray"):
        from pyarrow import parquet

    path = _path(folder, "vectors", start, start + len(block))
    try:
        table = parquet.read_table(path)
        ids, column = table["id"].to_pylist(), table["vector"].combine_chunks()
        vectors: Array = column.flatten().to_numpy().reshape(len(ids), -1)
    except (OSError, ValueError, KeyError) as error:  # pyarrow's own errors are among them
        raise VectorIndexError(f"{path} holds no vectors ({error}); remove it, and encode again") from error
    if ids != [doc_id for doc_id, _ in block]:
        raise VectorIndexError(f"{path} holds the vectors of other documents; remove it, and encode again")
    return vectors


def count_done(folder: Path, start: int, end: int, block_size: int) -> int:
    """How many of the documents from number `start` to before `end` have vectors, of the blocks they are cut into."""
    cuts = [start, *range(start // block_size * block_size + block_size, end, block_size), end]
    return sum(upper - lower for lower, upper in pairwise(cuts) if _path(folder, "vectors", lower, upper).exists())


def _path(folder: Path, kind: str, start: int, end: int) -> Path:
    return folder / f"{kind}-{start:012}-{end:012}.parquet"


def _written(blocks: Iterable[tuple[int, Block]], folder: Path) -> Iterator[dict[str, str]]:
    """Write the texts of each block that has no vectors yet; the files of both."""
    with extra("ray"):
        import pyarrow as pa
        from pyarrow import parquet

    folder.mkdir(parents=True, exist_ok=True)
    for start, block in blocks:
        source, target = (_path(folder, kind, start, start + len(block)) for kind in ("texts", "vectors"))
        source.with_suffix(".tries").unlink(missing_ok=True)
        if target.exists():
            continue
        if not source.exists():
            ids, texts = zip(*block, strict=True)
            with atomic_file(source) as path:
                parquet.write_table(pa.table({"id": pa.array(ids), "text": pa.array(texts)}), path)
        yield {"source": str(source), "target": str(target)}


@contextmanager
def _joined(ray: Any, address: str, actors: int | None) -> Iterator[None]:
    """A connection to the cluster; one that is there already is used, and stays."""
    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {}
    if address == "local":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Two more than actors book: one CPU alone would be all of the machine to Ray.
        cpus = max(os.cpu_count() or 1, 2 + int(CPUS * (actors or 1)))
        options = {"num_cpus": cpus, "object_store_memory": OBJECTS, "include_dashboard": False}
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **options)
    except Exception as error:  # a node that does not start in time is no more than that
        raise ConfigError(
            f"no Ray cluster at {address!r}: {error}; start one (ray start --head), or say local"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _room(ray: Any, actors: int | None) -> tuple[int, int, int]:
    """How many actors there are, with how many threads each, and the GPUs of the cluster."""
    resources = ray.cluster_resources()
    cpus, gpus = float(resources.get("CPU", 0)), int(resources.get("GPU", 0))
    machines = sum(bool(node["Alive"]) for node in ray.nodes())
    actors = actors or gpus or machines
    if CPUS * actors > cpus - 1 or 0 < gpus < actors:
        raise ConfigError(
            f"{actors} actors need {CPUS * actors:g} CPUs and one to spare"
            + (f", and {actors} GPUs" if gpus else "")
            + f"; the cluster has {cpus:g} CPUs and {gpus} GPUs: use fewer (--ray-actors), or add machines"
        )
    return actors, max(1, int(cpus) // actors), gpus
