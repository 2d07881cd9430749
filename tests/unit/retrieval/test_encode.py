"""Encoding a corpus to disk: the index is that of one call, whatever kills it on the way, and nothing is done twice."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from search_r3.data.collection import Collection, CorpusFile
from search_r3.errors import DataError, VectorIndexError
from search_r3.model.encoder import SearchR3
from search_r3.model.settings import EmbeddingSettings
from search_r3.retrieval import storage
from search_r3.retrieval.encode import encode_corpus, load_corpus
from search_r3.retrieval.encoding.identity import PROBE
from search_r3.retrieval.index import ExactIndex

DOCUMENTS = [(f"d{i * 7 % 23}", f"text number {i}") for i in range(23)]


class FakeEncoder:
    """Every text has a vector of its own; `seen` are the texts that were encoded, the probe left out."""

    def __init__(self, name: str = "fake", dimension: int = 6, max_length: int = 64) -> None:
        self.dimension, self.seen = dimension, []
        settings = EmbeddingSettings(max_length=max_length)
        self.backbone = SimpleNamespace(
            source=name, settings=settings, device=torch.device("cpu"), revision="r1", dtype="bfloat16"
        )
        self.special: dict[str, np.ndarray] = {}

    def vector(self, text: str) -> np.ndarray:
        digest = hashlib.sha256(f"{self.backbone.source}/{text}".encode()).digest()
        random = np.random.default_rng(int.from_bytes(digest[:8])).normal(size=self.dimension)
        return self.special.get(text, (random / np.linalg.norm(random)).astype(np.float32))

    def encode_document(self, texts: list[str], *, instruction: str = "", progress: Any = None) -> np.ndarray:
        texts = [f"{text} {instruction}".strip() for text in texts]
        for text in texts:
            if text != PROBE:
                self.seen.append(text)
            if progress is not None:
                progress(1, len(text))
        return np.stack([self.vector(text) for text in texts])

    def index(self, documents: list[tuple[str, str]], dtype: str) -> ExactIndex:
        """The index that one call of the encoder gives."""
        vectors = np.stack([self.vector(text) for _, text in documents])
        return ExactIndex([doc_id for doc_id, _ in documents], vectors, dtype=dtype)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder but locks; those of a state by the names that the manifest gives them."""
    manifest = json.loads((folder / "manifest.json").read_text())
    names = {path: name for name, path in manifest.pop("files").items()}
    files = {names.get(path.name, path.name): path.read_bytes() for path in folder.iterdir() if path.suffix != ".lock"}
    return files | {"manifest.json": json.dumps(manifest).encode()}


def done_in(folder: Path) -> int:
    """How many documents are done, as the manifest of the index says, or else that of the unfinished state."""
    for name, fact in ((storage.MANIFEST, "documents"), (storage.UNFINISHED, "done")):
        if (folder / name).exists():
            return json.loads((folder / name).read_text())[fact]
    return 0


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_folder_is_that_of_an_index_encoded_in_one_call(dtype: str, tmp_path: Path) -> None:
    model = FakeEncoder()
    index = encode_corpus(model, DOCUMENTS, tmp_path / "streamed", dtype=dtype, block_size=5)
    expected = model.index(DOCUMENTS, dtype)
    expected.save(tmp_path / "whole")
    streamed, whole = contents(tmp_path / "streamed"), contents(tmp_path / "whole")
    for name in ("vectors.npy", "doc_ids.npy", "doc_id_ends.npy", "encoded_at_version.npy"):
        assert streamed[name] == whole[name], name
    assert set(streamed) - set(whole) == {"probe.npy"}, "nothing else is left"
    assert json.loads(whole["manifest.json"]).items() <= json.loads(streamed["manifest.json"]).items()
    for opened in (index, ExactIndex.load(tmp_path / "streamed")):
        assert opened.doc_ids == expected.doc_ids
        np.testing.assert_array_equal(opened.matrix, expected.matrix)
    if sys.platform == "linux":
        assert f"{tmp_path}/streamed/vectors-" in Path("/proc/self/maps").read_text(), "it is memory-mapped"


def test_the_manifest_says_where_the_vectors_came_from(tmp_path: Path) -> None:
    encode_corpus(FakeEncoder("my-model"), DOCUMENTS, tmp_path)
    origin = json.loads((tmp_path / "manifest.json").read_text())["origin"]
    assert origin["model"] == "my-model"
    assert origin["settings"]["max_length"] == 64
    assert origin["search_r3"]
    assert (origin["revision"], origin["precision"]) == ("r1", "bfloat16")


def test_progress_counts_what_is_encoded_now(tmp_path: Path) -> None:
    starts, counts = [], []
    options = {
        "block_size": 4,
        "on_start": lambda *numbers: starts.append(numbers),
        "progress": lambda *numbers: counts.append(numbers),
    }
    model = FakeEncoder()
    model.special["text number 13"] = np.full(6, np.nan)
    with pytest.raises(VectorIndexError):
        encode_corpus(model, DOCUMENTS, tmp_path, **options)
    model.special.clear()
    counts.clear()
    for _ in range(2):
        encode_corpus(model, DOCUMENTS, tmp_path, **options)
    assert starts == [(23, 0), (23, 12), (23, 23)]
    assert counts == [(1, len(text)) for _, text in DOCUMENTS[12:]]


class Killed(BaseException):
    """Stops an encoding where no handler of errors can clean up."""


class Clock:
    """Kills at the `last`-th of the steps that change something outside or cost something."""

    def __init__(self, patch: pytest.MonkeyPatch, model: FakeEncoder, last: int) -> None:
        self.calls, self.last = 0, last
        for owner, name in (
            (storage, "write_json"),
            (storage, "flush"),
            (storage, "write_rows"),
            (Path, "open"),
            (Path, "unlink"),
            (os, "posix_fallocate"),
            (model, "encode_document"),
        ):
            if hasattr(owner, name):
                patch.setattr(owner, name, self.counted(getattr(owner, name)))

    def counted(self, step: Any) -> Any:
        def run(*arguments: Any, **options: Any) -> Any:
            self.calls += 1
            if self.calls > self.last:
                raise Killed
            return step(*arguments, **options)

        return run


@settings(max_examples=40, deadline=None)
@given(
    ids=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=3), unique=True, min_size=1, max_size=12),
    attempts=st.lists(st.tuples(st.integers(1, 14), st.integers(0, 60)), max_size=4),
    dtype=st.sampled_from(["float16", "float32"]),
)
def test_any_blocks_and_any_kills_give_the_bytes_of_an_unbroken_run(ids: list[str], attempts: Any, dtype: str) -> None:
    documents = [(doc_id, f"text {place}") for place, doc_id in enumerate(ids)]
    with tempfile.TemporaryDirectory() as scratch:
        broken, whole = Path(scratch) / "broken", Path(scratch) / "whole"
        for block_size, last in [*attempts, (3, 10_000)]:
            done, model = done_in(broken), FakeEncoder()
            with pytest.MonkeyPatch.context() as patch:
                Clock(patch, model, last)
                try:
                    encode_corpus(model, documents, broken, dtype=dtype, block_size=block_size)
                except Killed:
                    pass
            left = [text for _, text in documents[done:]]
            assert model.seen == left[: len(model.seen)], "what is done is not encoded again"
            if (broken / "manifest.json").exists():
                expected = FakeEncoder().index(documents, dtype)
                found = ExactIndex.load(broken)
                assert found.doc_ids == expected.doc_ids
                np.testing.assert_array_equal(found.matrix, expected.matrix)
        encode_corpus(FakeEncoder(), documents, whole, dtype=dtype)
        assert contents(broken) == contents(whole)


def test_a_kill_at_any_step_costs_one_block_at_most(tmp_path: Path) -> None:
    documents = DOCUMENTS[:9]
    encode_corpus(FakeEncoder(), documents, tmp_path / "whole", block_size=4)
    whole, kills = contents(tmp_path / "whole"), 0
    for last in range(200):
        model, folder = FakeEncoder(), tmp_path / str(last)
        with pytest.MonkeyPatch.context() as patch:
            Clock(patch, model, last)
            try:
                encode_corpus(model, documents, folder, block_size=4)
            except Killed:
                kills += 1
            else:
                break
        again = FakeEncoder()
        encode_corpus(again, documents, folder, block_size=4)
        assert len(model.seen) + len(again.seen) <= 9 + 4
        assert contents(folder) == whole, f"killed at step {last}"
    assert kills > 30


def test_vectors_are_on_the_disk_before_they_are_called_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[tuple[str, Any]] = []

    def logged(name: str, what: Any) -> None:
        step = getattr(storage, name)

        def run(*arguments: Any) -> None:
            events.append((name, what(*arguments)))
            step(*arguments)

        monkeypatch.setattr(storage, name, run)

    logged("write_rows", lambda path, rows, values: path.name)
    logged("flush", lambda path: path.name)
    logged("write_json", lambda path, value: value.get("done") if isinstance(value, dict) else path.name)
    encode_corpus(FakeEncoder(), DOCUMENTS, tmp_path, block_size=10)
    unflushed, recorded = set(), []
    for name, what in events:
        if name == "write_rows":
            unflushed.add(what)
        elif name == "flush":
            unflushed.discard(what)
        else:
            assert not unflushed
            recorded.append(what)
    assert [what for what in recorded if what is None or isinstance(what, int)] == [0, 10, 20, 23, None]


KILLING = """
import os, signal, sys, time
from tests.unit.retrieval.test_encode import DOCUMENTS, PROBE, FakeEncoder, done_in
from search_r3.retrieval.encode import encode_corpus
from pathlib import Path

class Slow(FakeEncoder):
    shown = 0

    def vector(self, text):
        if text != PROBE:
            os.write(writer, f"{text}\\n".encode())
            self.shown += 1
        if self.shown == wanted:
            time.sleep(60)  # here it is killed
        return super().vector(text)

folder = Path(sys.argv[1])
for wanted in (2, 5, 4, 9):
    done = done_in(folder)
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        encode_corpus(Slow(), DOCUMENTS, folder, block_size=3)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as lines:
        encoded = [next(lines).strip() for _ in range(wanted)]
    os.kill(child, signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert encoded == [text for _, text in DOCUMENTS[done : done + wanted]], encoded
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no fork, no SIGKILL")
def test_a_killed_process_goes_on_and_writes_the_bytes_of_an_unbroken_run(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLING, str(tmp_path / "killed")]
    killed = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[3])
    assert killed.returncode == 0, killed.stderr
    assert done_in(tmp_path / "killed") == 0 + 3 + 3 + 6, "the complete blocks of each attempt"
    model = FakeEncoder()
    encode_corpus(model, DOCUMENTS, tmp_path / "killed", block_size=3)
    assert model.seen == [text for _, text in DOCUMENTS[12:]]
    encode_corpus(FakeEncoder(), DOCUMENTS, tmp_path / "whole", block_size=3)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


class Generated:
    """Long documents that nobody holds."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return ((f"{i:07}", f"{i} " + "x" * 3000) for i in range(self.count))


def test_memory_does_not_grow_with_texts_and_vectors(tmp_path: Path) -> None:
    peaks = []
    for count in (500, 2500):
        tracemalloc.start()
        encode_corpus(Forgetful(dimension=512), Generated(count), tmp_path / str(count), dtype="float32", block_size=50)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (peaks[1] - peaks[0]) / 2000 < 600, "bytes per document: ids, places; a text has 3000 and a vector 2048"


class Forgetful(FakeEncoder):
    def encode_document(self, texts: list[str], **options: Any) -> np.ndarray:
        return np.stack([self.vector(text[:20]) for text in texts])


def interrupted(folder: Path, **options: Any) -> FakeEncoder:
    """An encoding of DOCUMENTS that broke after 8 of 23."""
    model = FakeEncoder()
    model.special["text number 9"] = np.full(6, np.inf)
    with pytest.raises(VectorIndexError):
        encode_corpus(model, DOCUMENTS, folder, block_size=4, **options)
    assert done_in(folder) == 8
    model.special.clear()
    model.seen.clear()
    return model


@pytest.mark.parametrize("finished", [False, True])
def test_another_job_is_refused_and_nothing_is_lost(finished: bool, tmp_path: Path) -> None:
    model = interrupted(tmp_path)
    if finished:
        encode_corpus(model, DOCUMENTS, tmp_path, block_size=4)
        model.seen.clear()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    same_probe = FakeEncoder("fake", max_length=63)
    swapped = [DOCUMENTS[1], DOCUMENTS[0], *DOCUMENTS[2:]]
    retold = [*DOCUMENTS[:5], (DOCUMENTS[5][0], "another text"), *DOCUMENTS[6:]]
    wordy = FakeEncoder()
    wordy.backbone.settings = EmbeddingSettings(
        max_length=64, prompts=wordy.backbone.settings.prompts.model_copy(update={"document_system": "Passage:"})
    )
    for other, documents, options, message in (
        (FakeEncoder("other"), DOCUMENTS, {}, r"by another model, fake: cosine -?0\.\d+ between their vectors"),
        (FakeEncoder(dimension=5), DOCUMENTS, {}, "by another model, fake, with vectors of size 6, not 5"),
        (same_probe, DOCUMENTS, {}, "with max_length=64, not 63"),
        (wordy, DOCUMENTS, {}, "document_system='Represent the document.', not 'Passage:'"),
        (model, DOCUMENTS[:-1], {}, r"from other documents, .* \(23 then, 22 now\)"),
        (model, swapped, {}, "in another order"),
        (model, retold, {}, "from other documents"),
        (model, DOCUMENTS, {"dtype": "float32"}, "as float16, not as float32"),
        (model, DOCUMENTS, {"instruction": "A page."}, "with document_instruction='', not 'A page.'"),
    ):
        with pytest.raises(VectorIndexError, match=message) as caught:
            encode_corpus(other, documents, tmp_path, **options)
        assert str(tmp_path) in str(caught.value)
        assert "nothing in it was changed: go on with those, or choose another folder" in str(caught.value)
        assert other.seen == []
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    encode_corpus(model, DOCUMENTS, tmp_path)
    assert model.seen == ([] if finished else [text for _, text in DOCUMENTS[8:]])


def test_vectors_that_differ_by_rounding_are_of_the_same_model(tmp_path: Path) -> None:
    model = interrupted(tmp_path)
    noise = np.random.default_rng(0).normal(size=6).astype(np.float32)
    model.special[PROBE] = model.vector(PROBE) + 2e-3 * noise / np.linalg.norm(noise)
    encode_corpus(model, DOCUMENTS, tmp_path)
    model.special[PROBE] = FakeEncoder().vector(PROBE) + 3e-2 * noise / np.linalg.norm(noise)
    with pytest.raises(VectorIndexError, match="by another model"):
        encode_corpus(model, DOCUMENTS, tmp_path)


def test_an_index_of_unknown_origin_is_not_overwritten(tmp_path: Path) -> None:
    FakeEncoder().index(DOCUMENTS, "float16").save(tmp_path)
    before = contents(tmp_path)
    for call in (encode_corpus, load_corpus):
        with pytest.raises(VectorIndexError, match=r"does not say by which model .*: choose another folder"):
            call(FakeEncoder(), DOCUMENTS, tmp_path)
    assert contents(tmp_path) == before


def test_what_killed_encodings_left_is_deleted_and_nothing_else(tmp_path: Path) -> None:
    for name in ("notes.txt", ".unfinished.json.x81_k2", "vectors-0123456789abcdef.npy"):
        (tmp_path / name).write_text("mine")
    encode_corpus(FakeEncoder(), DOCUMENTS, tmp_path)
    assert len(contents(tmp_path)) == 7
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_gpu_gets_larger_blocks_than_a_cpu(tmp_path: Path) -> None:
    documents = [(f"d{i}", f"text {i}") for i in range(1100)]
    for device, blocks in (("cpu", [1024, 76]), ("cuda", [1100]), ("mps", [1100])):
        model, calls = FakeEncoder(), []
        model.backbone.device = torch.device(device)
        whole = model.encode_document
        model.encode_document = lambda texts, calls=calls, whole=whole, **options: (
            calls.append(len(texts)) or whole(texts, **options)
        )
        encode_corpus(model, documents, tmp_path / device)
        assert calls == [1, *blocks], "the probe comes first"


def test_unusable_documents_are_named_before_anything_is_encoded(tmp_path: Path) -> None:
    model = FakeEncoder()
    for documents, message in (
        ([], "the corpus is empty"),
        ([("a", "x"), ("b", "y"), ("a", "z")], "two documents have the id 'a'"),
        ([("a", "x"), ("b", " \n")], r"document 'b' has the text ' \\n'; expected at least one visible character"),
        ([("a", "x"), ("b", None)], "document 'b' has the text None"),
        ([("a", "x"), ("b", "\ud800")], "document 'b' holds half a surrogate pair"),
        ([("a", "x"), ("\ud800", "y")], "holds half a surrogate pair"),
        (iter(DOCUMENTS), "can be read only once"),
    ):
        with pytest.raises(DataError, match=message):
            encode_corpus(model, documents, tmp_path / "x")
    for options, message in (
        ({"dtype": "int8"}, "cannot hold 'int8'; choose one of float32, float16"),
        ({"block_size": 0}, "block_size was 0"),
    ):
        with pytest.raises(VectorIndexError, match=message):
            encode_corpus(model, DOCUMENTS, tmp_path / "x", **options)
    assert model.seen == []
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("vector", "message"),
    [
        (np.array([0, 0, np.nan, 0, 0, 0]), "document 'd13' holds NaN or infinity; the model is broken"),
        (np.array([0, 0, -np.inf, 0, 0, 0]), "document 'd13' holds NaN or infinity; the model is broken"),
        (np.array([0, 0, -7e4, 0, 0, 0]), "document 'd13' holds more than float16 can; encode as float32"),
    ],
)
def test_an_unusable_vector_names_its_document(vector: np.ndarray, message: str, tmp_path: Path) -> None:
    model = FakeEncoder()
    assert DOCUMENTS[15] == ("d13", "text number 15")
    model.special["text number 15"] = vector
    with pytest.raises(VectorIndexError, match=message):
        encode_corpus(model, DOCUMENTS, tmp_path, block_size=6)
    assert done_in(tmp_path) == 12, "what was done before stays"
    if abs(vector[2]) < 1e5:
        encode_corpus(model, DOCUMENTS, tmp_path / "wide", dtype="float32")


def test_a_broken_model_is_found_before_space_is_taken(tmp_path: Path) -> None:
    model = FakeEncoder()
    model.special[PROBE] = np.full(6, np.nan, dtype=np.float32)
    with pytest.raises(VectorIndexError, match="NaN or infinity"):
        encode_corpus(model, DOCUMENTS, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_vectors_of_another_size_than_promised_are_refused(tmp_path: Path) -> None:
    model = FakeEncoder()
    model.special = {text: np.ones(5) for _, text in DOCUMENTS}
    with pytest.raises(VectorIndexError, match=r"expected 23 vectors of size 6 from the model, found shape \(23, 5\)"):
        encode_corpus(model, DOCUMENTS, tmp_path)


class Edited:
    """Documents that someone edits after the first reading."""

    def __init__(self, later: list[tuple[str, str]]) -> None:
        self.versions = [DOCUMENTS, later]

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(self.versions.pop(0) if len(self.versions) > 1 else self.versions[0])


@pytest.mark.parametrize(
    "later", [[*DOCUMENTS[:9], ("d999", "new"), *DOCUMENTS[10:]], DOCUMENTS[:9], DOCUMENTS[:8]], ids=len
)
def test_documents_that_change_while_they_are_read_do_not_get_into_the_index(
    later: list[tuple[str, str]], tmp_path: Path
) -> None:
    model = FakeEncoder()
    with pytest.raises(DataError, match="changed while they were encoded, somewhere between numbers 8 and 12"):
        encode_corpus(model, Edited(later), tmp_path, block_size=4)
    assert done_in(tmp_path) == 8
    assert model.seen == [text for _, text in DOCUMENTS[:8]]


def refuse(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="the system reserves no space")
def test_a_disk_that_is_too_small_is_found_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = FakeEncoder()
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", refuse)
        with pytest.raises(VectorIndexError, match=f"cannot save the index to {tmp_path}: No space left on device"):
            encode_corpus(model, DOCUMENTS, tmp_path)
    assert (model.seen, list(tmp_path.iterdir())) == ([], [])
    interrupted(tmp_path)
    [vectors] = tmp_path.glob("vectors-*")
    assert vectors.stat().st_blocks * 512 >= vectors.stat().st_size, "space for all is taken when the first is written"


@pytest.mark.parametrize("step", ["write_rows", "write_json", "flush"])
def test_a_disk_that_fills_up_keeps_what_is_done(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = interrupted(tmp_path / "x")
    with monkeypatch.context() as patch:
        patch.setattr(storage, step, refuse)
        with pytest.raises(VectorIndexError, match="No space left on device; the state saved there before is unchang"):
            encode_corpus(model, DOCUMENTS, tmp_path / "x", block_size=4)
    assert done_in(tmp_path / "x") == 8
    model.seen.clear()
    encode_corpus(model, DOCUMENTS, tmp_path / "x", block_size=4)
    assert model.seen == [text for _, text in DOCUMENTS[8:]]
    encode_corpus(FakeEncoder(), DOCUMENTS, tmp_path / "whole", block_size=4)
    assert contents(tmp_path / "x") == contents(tmp_path / "whole")


def test_a_damaged_state_is_one_error_that_names_folder_and_remedy(tmp_path: Path) -> None:
    for finished, name in ((False, storage.UNFINISHED), (True, storage.MANIFEST)):
        folder = tmp_path / name
        model = interrupted(folder)
        if finished:
            encode_corpus(model, DOCUMENTS, folder)
            model.seen.clear()
        [vectors], [probe] = folder.glob("vectors-*"), folder.glob("probe-*")
        for path, content in (
            (folder / name, b"{"),
            (folder / name, b"[]"),
            (vectors, vectors.read_bytes()[:-1]),
            (vectors, None),
            (probe, b""),
        ):
            whole = path.read_bytes()
            path.unlink() if content is None else path.write_bytes(content)
            with pytest.raises(
                VectorIndexError, match=r"holds no usable index \(.+\); encode the corpus again"
            ) as error:
                encode_corpus(model, DOCUMENTS, folder)
            assert f"{folder} " in str(error.value)
            assert model.seen == []
            path.write_bytes(whole)
        encode_corpus(model, DOCUMENTS, folder)


def test_an_encoded_corpus_opens_for_its_model_and_documents_only(tmp_path: Path) -> None:
    with pytest.raises(VectorIndexError, match=r"holds no index; encode the corpus into it \(search-r3 encode\) first"):
        load_corpus(FakeEncoder(), DOCUMENTS, tmp_path / "x")
    model = interrupted(tmp_path / "x", dtype="float32")
    with pytest.raises(VectorIndexError, match="holds an encoding that is not finished"):
        load_corpus(model, DOCUMENTS, tmp_path / "x")
    encode_corpus(model, DOCUMENTS, tmp_path / "x", dtype="float32")
    assert load_corpus(model, DOCUMENTS, tmp_path / "x").dtype == "float32"
    with pytest.raises(VectorIndexError, match="by another model"):
        load_corpus(FakeEncoder("other"), DOCUMENTS, tmp_path / "x")
    with pytest.raises(VectorIndexError, match="from other documents"):
        load_corpus(model, [*DOCUMENTS, ("more", "text")], tmp_path / "x")


def test_an_instruction_of_documents_is_part_of_their_index(tmp_path: Path) -> None:
    model = FakeEncoder()
    index = encode_corpus(model, DOCUMENTS, tmp_path / "x", instruction="A page. ", dtype="float32")
    assert model.seen == [f"{text} A page." for _, text in DOCUMENTS]
    settings = json.loads((tmp_path / "x" / "manifest.json").read_text())["origin"]["settings"]
    assert settings["document_instruction"] == "A page."
    same = load_corpus(model, DOCUMENTS, tmp_path / "x", instruction="A page.")
    assert np.array_equal(same.vectors_at(np.arange(23)), index.vectors_at(np.arange(23)))
    for other in ("", "A book."):
        with pytest.raises(VectorIndexError, match=f"with document_instruction='A page.', not '{other}'; nothing"):
            load_corpus(model, DOCUMENTS, tmp_path / "x", instruction=other)


def test_a_real_model_streams_a_file_into_the_index_that_it_gives_in_memory(
    model: SearchR3, collection: Collection, collection_path: Path, tmp_path: Path
) -> None:
    documents = CorpusFile(collection_path / "corpus.jsonl")
    index = encode_corpus(model, documents, tmp_path, dtype="float32", block_size=7)
    texts = collection.texts()
    np.testing.assert_allclose(
        index.vectors_at(index.rows_of(list(texts))), model.encode_document(list(texts.values())), atol=1e-6
    )
    assert load_corpus(model, texts.items(), tmp_path).doc_ids == index.doc_ids
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.backbone, "settings", model.backbone.settings.model_copy(update={"max_length": 99}))
        with pytest.raises(VectorIndexError, match="not 99"):
            load_corpus(model, documents, tmp_path)
    next(model.backbone.model.parameters()).data += 0.05
    with pytest.raises(VectorIndexError, match="by another model"):
        encode_corpus(model, documents, tmp_path, dtype="float32")
