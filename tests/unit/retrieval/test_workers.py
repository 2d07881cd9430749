"""Encoding by the actors of Ray: the bytes of one process, whatever dies on the way.

A strict stand-in for Ray runs here; `tests/integration/test_ray.py` asks Ray itself.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_ray import Died, FakeRay
from test_encode import DOCUMENTS, FakeEncoder, contents

from search_r3.errors import ConfigError, MissingExtraError, ModelError, VectorIndexError
from search_r3.retrieval import storage
from search_r3.retrieval.encode import BLOCKS, encode_corpus
from search_r3.retrieval.encoding import workers
from search_r3.retrieval.encoding.shards import Shard
from search_r3.retrieval.encoding.workers import RayWorkers


class Encoder(FakeEncoder):
    """Notes what it encodes in a file, as it may live in another process."""

    def __init__(self, log: Path, fault: Callable[[Path], None] | None = None) -> None:
        super().__init__()
        self.log, self.fault = log, fault

    def encode_document(self, texts: list[str], **options: Any) -> np.ndarray:
        if self.fault is not None and "text number 9" in texts:
            self.fault(self.log.with_suffix(".fault"))
        with self.log.open("a") as file:
            file.writelines(f"{text}\n" for text in texts)
        return super().encode_document(texts, **options)


def once(error: BaseException, mark: Path) -> None:
    """Die, or raise, the first time only."""
    if not mark.exists():
        mark.touch()
        raise error


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    fake = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", fake)
    monkeypatch.setitem(sys.modules, "ray.data", fake.data)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return fake


def encoded(log: Path) -> list[str]:
    return sorted(log.read_text().splitlines()) if log.exists() else []


def test_actors_write_the_index_that_one_process_writes(ray: FakeRay, tmp_path: Path) -> None:
    counts, log = [], tmp_path / "log"
    actors = RayWorkers(partial(Encoder, log), actors=2)
    encode_corpus(
        *(FakeEncoder(), DOCUMENTS, tmp_path / "ray"),
        workers=actors,
        block_size=4,
        progress=lambda *numbers: counts.append(numbers),
    )
    encode_corpus(FakeEncoder(), DOCUMENTS, tmp_path / "one", block_size=4)
    assert contents(tmp_path / "ray") == contents(tmp_path / "one")
    assert encoded(log) == sorted(text for _, text in DOCUMENTS)
    assert sum(count for count, _ in counts) == 23
    assert sum(tokens for _, tokens in counts) == sum(len(text) for _, text in DOCUMENTS)
    assert ray.starts == 2 and not ray.is_initialized(), "a Ray of our own ends with the call"


def test_an_actor_that_dies_costs_its_block(ray: FakeRay, tmp_path: Path) -> None:
    log = tmp_path / "log"
    actors = RayWorkers(partial(Encoder, log, partial(once, Died())), actors=2)
    encode_corpus(FakeEncoder(), DOCUMENTS, tmp_path / "ray", workers=actors, block_size=4)
    encode_corpus(FakeEncoder(), DOCUMENTS, tmp_path / "one", block_size=4)
    assert contents(tmp_path / "ray") == contents(tmp_path / "one")
    assert encoded(log) == sorted(text for _, text in DOCUMENTS), "the others were not encoded again"
    assert ray.starts == 3


def always(mark: Path) -> None:
    """Die every time."""
    raise Died


def test_a_block_that_kills_every_actor_ends_the_run(ray: FakeRay, tmp_path: Path) -> None:
    actors = RayWorkers(partial(Encoder, tmp_path / "log", always), actors=1)
    for _ in range(2):
        ray.starts = 0
        with pytest.raises(VectorIndexError, match=r"texts-000000000008-000000000012.parquet have killed 4 actors"):
            encode_corpus(FakeEncoder(), DOCUMENTS, tmp_path / "ray", workers=actors, block_size=4)
        assert ray.starts == 1 + workers.TRIES and not ray.is_initialized(), "the next run tries again"


def test_what_else_goes_wrong_in_an_actor_is_one_line(ray: FakeRay, tmp_path: Path) -> None:
    actors = RayWorkers(partial(Encoder, tmp_path / "log", partial(once, RuntimeError("out of memory"))), actors=1)
    with pytest.raises(VectorIndexError, match=r"^Ray gave up: out of memory \(RayError\); what is done stays done"):
        encode_corpus(FakeEncoder(), DOCUMENTS, tmp_path / "ray", workers=actors, block_size=4)


def test_a_run_that_ended_goes_on_with_the_documents_that_have_no_vectors(ray: FakeRay, tmp_path: Path) -> None:
    log, folder = tmp_path / "log", tmp_path / "ray"
    actors = RayWorkers(partial(Encoder, log, partial(once, ModelError("its weights are broken"))), actors=1)
    with pytest.raises(VectorIndexError, match="its weights are broken"):
        encode_corpus(FakeEncoder(), DOCUMENTS, folder, workers=actors, block_size=4)
    assert not ray.is_initialized()
    done = encoded(log)
    assert 0 < len(done) < 23 and not (folder / storage.MANIFEST).exists()
    starts: list[tuple[int, int]] = []
    for other in (FakeEncoder("other"), FakeEncoder(dimension=5)):
        with pytest.raises(VectorIndexError, match="by another model"):
            encode_corpus(other, DOCUMENTS, folder, workers=actors, block_size=4)
    begun = {"workers": actors, "block_size": 4, "on_start": lambda *numbers: starts.append(numbers)}
    encode_corpus(FakeEncoder(), DOCUMENTS, folder, **begun)
    assert encoded(log) == sorted(text for _, text in DOCUMENTS), "no document was encoded twice"
    assert starts == [(23, len(done))], "what actors have done is not to be done"
    encode_corpus(FakeEncoder(), DOCUMENTS, tmp_path / "one", block_size=4)
    assert contents(folder) == contents(tmp_path / "one")


def test_one_process_goes_on_where_actors_stopped(ray: FakeRay, tmp_path: Path) -> None:
    folder = tmp_path / "ray"
    actors = RayWorkers(partial(Encoder, tmp_path / "log", partial(once, ModelError("broken"))), actors=1)
    with pytest.raises(VectorIndexError, match="broken"):
        encode_corpus(FakeEncoder(), DOCUMENTS, folder, workers=actors, block_size=4)
    encode_corpus(FakeEncoder(), DOCUMENTS, folder, block_size=4)
    encode_corpus(FakeEncoder(), DOCUMENTS, tmp_path / "one", block_size=4)
    assert contents(folder) == contents(tmp_path / "one"), "nothing else is left"


@pytest.mark.parametrize("damage", ["missing", "broken", "other"])
def test_vectors_that_are_not_those_of_the_documents_are_refused(damage: str, ray: FakeRay, tmp_path: Path) -> None:
    class Careless(RayWorkers):
        def encode(self, blocks: Any, folder: Path, *rest: Any) -> None:
            super().encode(blocks, folder, *rest)
            first, second = sorted(folder.glob("vectors-*"))[:2]
            if damage == "other":
                first.write_bytes(second.read_bytes())
            elif damage == "broken":
                first.write_bytes(b"PAR1")
            else:
                first.unlink()

    message = {"other": "holds the vectors of other documents; remove it"}.get(damage, "holds no vectors")
    with pytest.raises(VectorIndexError, match=message):
        encode_corpus(
            *(FakeEncoder(), DOCUMENTS, tmp_path / "ray"),
            workers=Careless(partial(Encoder, tmp_path / "log"), actors=1),
            block_size=4,
        )


def test_a_shard_may_be_encoded_by_actors(ray: FakeRay, tmp_path: Path) -> None:
    actors = RayWorkers(partial(Encoder, tmp_path / "log"), actors=1)
    for number in (1, 2):
        index = encode_corpus(
            *(FakeEncoder(), DOCUMENTS, tmp_path / "parts"), shard=Shard(number, 2), workers=actors, block_size=4
        )
    whole = encode_corpus(FakeEncoder(), DOCUMENTS, tmp_path / "one", block_size=4)
    np.testing.assert_array_equal(index.matrix, whole.matrix)
    assert not list((tmp_path / "parts").rglob(BLOCKS))


def test_a_cluster_is_joined_and_left_as_it_was(ray: FakeRay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = partial(Encoder, tmp_path / "log")
    with pytest.raises(ConfigError, match="no Ray cluster at 'auto': could not find any running Ray"):
        encode_corpus(FakeEncoder(), DOCUMENTS, tmp_path / "no", workers=RayWorkers(make, "auto"))
    ray.cluster = {"CPU": 8, "GPU": 3}
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    encode_corpus(FakeEncoder(), DOCUMENTS, tmp_path / "ray", workers=RayWorkers(make))
    assert ray.starts == 3, "an actor for each GPU"
    ray.resources = {"CPU": 2}
    encode_corpus(FakeEncoder(), DOCUMENTS, tmp_path / "two", workers=RayWorkers(make))
    assert ray.is_initialized(), "who had joined it stays in it"
    for resources, actors, message in (
        ({"CPU": 2}, 3, r"3 actors need 1.5 CPUs and one to spare; the cluster has 2 CPUs and 0 GPUs: use fewer"),
        ({"CPU": 9, "GPU": 1}, 2, "2 actors need 1 CPUs and one to spare, and 2 GPUs"),
    ):
        ray.resources = resources
        with pytest.raises(ConfigError, match=message):
            encode_corpus(FakeEncoder(), DOCUMENTS, tmp_path / "no", workers=RayWorkers(make, actors=actors))


def test_an_actor_computes_with_its_share_of_the_threads(ray: FakeRay, monkeypatch: pytest.MonkeyPatch) -> None:
    before, threads = torch.get_num_threads(), []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    workers._Actor(FakeEncoder, "", 3)
    assert threads == [3] and torch.get_num_threads() == before
    ray.resources = {"CPU": 7}
    assert workers._room(ray, 2) == (2, 3, 0)


def test_without_ray_it_is_said_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setitem(sys.modules, "ray.data", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'search-r3\[ray\]'"):
        RayWorkers(FakeEncoder)
