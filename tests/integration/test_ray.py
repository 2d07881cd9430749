"""Encoding by Ray itself, in half a minute: `pytest -m real tests/integration/test_ray.py`, with the extra `ray`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from search_r3.data.collection import Collection, Document
from search_r3.model.encoder import SearchR3
from search_r3.retrieval.encode import BLOCKS
from tests.conftest import call
from tests.unit.retrieval.test_encode import contents

pytestmark = [pytest.mark.real, pytest.mark.filterwarnings("ignore")]  # Ray warns of itself
DOCUMENTS = {f"d{i * 7 % 300}": f"a house, {'very ' * (i % 7)} old, number {i}" for i in range(300)}
THREADS = max(2, os.cpu_count() or 1, 3) // 2
"""Of one of two actors."""


@pytest.fixture(scope="module")
def ray() -> Any:
    for module in ("ray.data", "pyarrow.parquet"):
        pytest.importorskip(module, reason="Ray Data is not installed: pip install 'search-r3[ray]'")
    return sys.modules["ray"]


class Noting(SearchR3):
    """A model that notes in a file what it encoded."""

    log = Path()

    def encode_document(self, texts: Any, **options: Any) -> Any:
        vectors = super().encode_document(texts, **options)
        with self.log.open("a") as file:
            file.writelines(f"{text}\n" for text in texts)
        return vectors


@pytest.fixture
def threads() -> Iterator[None]:
    """As many as an actor has."""
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


def wait_for(what: Callable[[], Any], process: subprocess.Popen[bytes]) -> Any:
    """The first true answer; an error where there is none in two minutes, or before the process ends."""
    limit = time.monotonic() + 120
    while not (answer := what()):
        assert process.poll() is None and time.monotonic() < limit, f"exit status: {process.poll()}"
        time.sleep(0.01)
    return answer


def actors_of(process: subprocess.Popen[bytes]) -> set[int]:
    """The processes of its actors; Ray names them."""
    ids = set()
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            ids |= {child.pid} if "MapWorker" in child.name() and child.status() != psutil.STATUS_ZOMBIE else set()
        except psutil.NoSuchProcess:
            continue
    return ids


def test_after_a_killed_actor_and_a_killed_run_no_document_is_encoded_twice_and_the_bytes_are_those_of_one_process(
    ray: Any, threads: None, tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from pyarrow import parquet

    folder = tmp_path / "ray"
    documents = {doc_id: Document(doc_id, text) for doc_id, text in DOCUMENTS.items()}
    Collection("houses", documents, {}, {}).save(tmp_path / "houses")
    encode = ["encode", tiny_path, "-c", tmp_path / "houses", "--untrained", "--device", "cpu", "--block-size", 2]
    by_actors = [*encode, "--ray", "--ray-address", "local", "--ray-actors", 2, folder]

    def done() -> list[Path]:
        return list((folder / BLOCKS).glob("vectors-*"))

    with (tmp_path / "output").open("wb") as output:
        command = [sys.executable, "-m", "search_r3.cli", *map(str, by_actors)]
        run = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    family = []
    try:
        wait_for(done, run)
        actors = actors_of(run)
        os.kill(min(actors), signal.SIGKILL)
        wait_for(lambda: actors_of(run) - actors, run)
        after = len(done())
        wait_for(lambda: len(done()) > after, run)
        family = psutil.Process(run.pid).children(recursive=True)
    finally:
        run.kill()
        run.wait()
        for process in family:  # Ray's agents outlive a run that is killed
            if process.is_running():
                process.kill()
        psutil.wait_procs(family)
    assert 0 < after < len(DOCUMENTS) / 2, "the actor was killed in the middle"
    assert len(actors) == 2 and not (folder / "manifest.json").exists()
    encoded = {
        DOCUMENTS[doc_id] for path in done() for doc_id in parquet.read_table(path, columns=["id"])["id"].to_pylist()
    }

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    Noting.log = tmp_path / "log"
    with monkeypatch.context() as patch:
        patch.setattr("search_r3.model.encoder.SearchR3", Noting)
        assert call(patch, *by_actors) == 0
    assert f"{len(encoded)} of 300 documents are encoded already" in capsys.readouterr().out
    by_this_process = 1  # the probe
    again = Noting.log.read_text().splitlines()[by_this_process:]
    assert sorted(again) == sorted(set(DOCUMENTS.values()) - encoded)
    assert call(monkeypatch, *encode, tmp_path / "one") == 0
    assert contents(folder) == contents(tmp_path / "one")
