"""Faults of a store that are really made: kills, and a disk that is full."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from search_r3.serving import Store
from search_r3.serving.upkeep import verify
from tests.stores import document, fingerprint, vectors

pytest.importorskip("lancedb")

ROOT = Path(__file__).parents[2]


def test_a_store_whose_writer_is_killed_opens_and_holds_what_was_acknowledged() -> None:
    """The short form of the benchmark; its moments are random, and none may matter."""
    script = ROOT / "benchmarks" / "store_faults.py"
    done = subprocess.run(
        [sys.executable, script, "--kills", "3", "--longest", "0.6"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    *kills, last = map(json.loads, done.stdout.splitlines())
    assert [kill["ok"] for kill in kills] == [True] * 3 and last["failed"] == 0


FULL = """
import resource, signal, sys
from search_r3.errors import StoreError
from search_r3.serving import Store
from tests.stores import document, vectors

store = Store.open(sys.argv[1])
chunks = document("small")
store.upsert(chunks, vectors(chunks))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
texts = ["".join(map(chr, range(200 + number, 1800 + number))) for number in range(60)]
chunks = [chunk for number, text in enumerate(texts) for chunk in document(f"d{number}", text)]
try:
    store.upsert(chunks, vectors(chunks))
except StoreError as error:
    print(error)
store.delete(["small"])
"""


def test_a_full_disk_is_one_error_and_loses_nothing(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "s", fingerprint())
    chunks = document("before", "1", "2")
    store.upsert(chunks, vectors(chunks))
    done = subprocess.run(
        [sys.executable, "-c", FULL, store.address], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    [message] = done.stdout.splitlines()
    assert message.startswith(f"{store.address}: cannot write: ") and "File too large" in message
    assert "what was acknowledged before is unchanged" in message
    assert [entry.doc_id for entry in store.documents()] == ["before"]
    assert verify(store) == []
    chunks = document("after")
    assert store.upsert(chunks, vectors(chunks)) == 1
