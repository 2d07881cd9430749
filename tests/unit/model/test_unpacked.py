"""What was read from a GGUF file is kept: it is read once, the model is the same, and nothing depends on it."""

from __future__ import annotations

import copy
import logging
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import save_tiny
from filelock import FileLock
from huggingface_hub import constants

from search_r3 import SearchR3
from search_r3.errors import ModelError
from search_r3.files import hash_file
from search_r3.model.llamacpp.writing import export_gguf
from search_r3.model.loading import load_backbone
from search_r3.model.reading import parts, unpacked
from search_r3.model.reading.unpacked import Unpacked

gguf = pytest.importorskip("gguf")
TEXTS = ["where is the red house?", "1984 and 日本語", "red house " * 60]


@pytest.fixture
def assets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where it is kept; nothing is there yet."""
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "assets"))
    return tmp_path / "assets" / "search-r3" / "gguf"


@pytest.fixture
def file(assets: Path, tmp_path: Path, tokenizer: Any) -> Path:
    """A file that is not ours, so that transformers makes the tokenizer, too."""
    backbone = load_backbone(save_tiny(tmp_path / "model", tokenizer, "llama", spare_rows=16), device="cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("search_r3.model.llamacpp.writing.tokenizer_values", lambda tokenizer: {})
        patch.setattr("search_r3.model.llamacpp.writing.SETTINGS_KEY", "another.settings")
        [path] = export_gguf(backbone, tmp_path / "model.gguf", "q8_0")
    return path


def vectors(path: Path, **options: Any) -> np.ndarray:
    model = SearchR3(path, device="cpu", **options)
    return np.concatenate([model.encode_document(TEXTS), model.encode_query(TEXTS, mode="direct").vectors])


def parts_kept(assets: Path) -> list[str]:
    return sorted(path.parent.name for path in assets.rglob("unpacked.json"))


def forbid_reading(patch: pytest.MonkeyPatch) -> None:
    def refuse(*values: Any, **options: Any) -> Any:
        raise AssertionError("the GGUF file is read again")

    patch.setattr(gguf, "GGUFReader", refuse)


@pytest.mark.filterwarnings("ignore:.*no stage has trained")
def test_the_second_time_nothing_of_the_file_is_unpacked_and_all_bits_are_the_same(
    file: Path, assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = SearchR3(file, device="cpu").backbone
    expected = vectors(file)
    assert parts_kept(assets) == ["float32", "tokenizer"]
    forbid_reading(monkeypatch)
    moved = shutil.move(file, tmp_path / "moved.gguf")
    again = SearchR3(moved, device="cpu").backbone
    assert np.array_equal(vectors(moved), expected)
    assert again.revision == first.revision and again.settings == first.settings
    assert again.tokenizer.backend_tokenizer.to_str() == first.tokenizer.backend_tokenizer.to_str()
    assert again.tokenizer.chat_template == first.tokenizer.chat_template
    assert all(one.data_ptr() % 16 == 0 for one in again.model.parameters()), "a mapped file begins where it likes"
    with pytest.raises(ModelError, match="read again"):
        vectors(moved, dtype="bfloat16")


def test_of_a_file_of_ours_the_settings_are_kept_too(
    assets: Path, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny(tmp_path / "model", tokenizer, "qwen3", spare_rows=16)
    own = load_backbone(folder, device="cpu", max_length=100, prompts="published")
    [path] = export_gguf(own, tmp_path / "model.gguf", "f16")
    expected = vectors(path)
    assert parts_kept(assets) == ["float32", "metadata"]
    forbid_reading(monkeypatch)
    assert np.array_equal(vectors(path), expected)
    assert load_backbone(path).settings == own.settings


def test_another_file_in_the_same_place_is_another_model(file: Path, assets: Path) -> None:
    before, times = vectors(file), file.stat()
    content = bytearray(file.read_bytes())
    weights = next(one for one in gguf.GGUFReader(file).tensors if one.name == "blk.0.ffn_down.weight")
    start = int(weights.data_offset)
    content[start : start + 2] = np.array([0.7], np.float16).tobytes()  # the scale of its first block
    file.write_bytes(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert not np.array_equal(vectors(file), before)
    assert len(list(assets.iterdir())) == 2


@pytest.mark.parametrize("damage", ["cut", "gone", "versions", "manifest", "weights", "tokenizer"])
def test_what_is_not_whole_or_of_other_versions_is_made_anew(
    damage: str, file: Path, assets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = vectors(file)
    [folder] = (path for path in assets.rglob("float32") if path.is_dir())
    weights = folder / "model.safetensors"
    size = weights.stat().st_size
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "gone":
        weights.unlink()
    elif damage == "manifest":
        (folder / "unpacked.json").write_text("{")
    elif damage == "weights":
        weights.write_bytes(b"x" * size)
    elif damage == "tokenizer":
        [other] = assets.rglob("tokenizer.json")
        other.write_bytes(b"x" * other.stat().st_size)
    else:
        monkeypatch.setattr(unpacked, "version", lambda name: "99.0")
        assert Unpacked(file.name, "float32").find() is None
    assert np.array_equal(vectors(file), expected)
    assert weights.stat().st_size == size
    forbid_reading(monkeypatch)
    assert np.array_equal(vectors(file), expected)


def test_environments_of_other_versions_keep_their_own_and_the_oldest_goes(
    file: Path, assets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = vectors(file)
    for number in ("1", "2"):
        monkeypatch.setattr(unpacked, "version", lambda name, number=number: number)
        assert Unpacked(hash_file(file), "float32").find() is None
        vectors(file)
        [digest] = assets.iterdir()
        assert len(list(digest.iterdir())) == 2
    forbid_reading(monkeypatch)
    for number in ("1", "2"):
        monkeypatch.setattr(unpacked, "version", lambda name, number=number: number)
        assert np.array_equal(vectors(file), expected)


def test_metadata_of_the_right_size_that_are_damaged_are_read_again(
    assets: Path, tmp_path: Path, tokenizer: Any
) -> None:
    own = load_backbone(save_tiny(tmp_path / "model", tokenizer, "qwen3", spare_rows=16), device="cpu")
    [path] = export_gguf(own, tmp_path / "model.gguf", "f16")
    expected = vectors(path)
    [kept_file] = (one for one in assets.rglob("metadata/*.json") if one.name != "unpacked.json")
    kept_file.write_bytes(b"x" * kept_file.stat().st_size)
    assert np.array_equal(vectors(path), expected)
    assert kept_file.read_bytes()[:1] == b"{"


def test_what_does_not_fit_into_memory_is_not_taken_for_damaged(assets: Path, tmp_path: Path) -> None:
    def write(out: Path) -> None:
        (out / "some.txt").write_text("kept", encoding="utf-8")

    def lacks_memory(folder: Path) -> None:
        raise MemoryError

    file = tmp_path / "some.gguf"
    file.write_bytes(b"some")
    kept = Unpacked(hash_file(file), "some")
    kept.keep(file, write)
    with pytest.raises(MemoryError):
        kept.read(lacks_memory)
    assert kept.read(lambda folder: (folder / "some.txt").read_text(encoding="utf-8")) == "kept"


def test_what_was_read_of_a_file_that_changed_meanwhile_is_not_kept(
    file: Path, assets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, content, read = vectors(file), file.read_bytes(), parts._config
    shutil.rmtree(assets)

    def replaced_first(files: Any) -> Any:
        weights = next(one for one in gguf.GGUFReader(file).tensors if one.name == "blk.0.ffn_down.weight")
        start = int(weights.data_offset)
        file.write_bytes(content[:start] + np.array([0.7], np.float16).tobytes() + content[start + 2 :])
        return read(files)

    with monkeypatch.context() as patch:
        patch.setattr(parts, "_config", replaced_first)
        assert not np.array_equal(vectors(file), before)
    assert parts_kept(assets) == ["tokenizer"], "which was read before"
    file.write_bytes(content)
    assert np.array_equal(vectors(file), before)


def test_without_the_package_that_reads_such_files_nothing_is_found(
    assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "source").write_text("text")
    one = kept(tmp_path / "source", lambda out: None)
    assert one.find() is not None

    def lacking(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(unpacked, "version", lacking)
    assert one.find() is None


@pytest.mark.parametrize("hindrance", ["no room", "no folder", "unlike"])
def test_a_model_that_cannot_be_kept_is_loaded_all_the_same(
    hindrance: str, file: Path, assets: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if hindrance == "no room":
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    elif hindrance == "no folder":
        (assets.parent.parent).parent.mkdir(exist_ok=True)
        assets.parent.parent.write_text("a file")
    else:
        monkeypatch.setattr(parts, "_OF_SAVING", ())  # what the writer's name and place differ in
    with caplog.at_level(logging.INFO):
        first = vectors(file)
    assert "is not kept for the next time" in caplog.text
    assert "float32" not in parts_kept(assets)
    assert np.array_equal(vectors(file), first)
    assert not [path for path in assets.rglob(".*")], "nothing half written is left"


def test_a_tokenizer_that_would_be_read_otherwise_is_not_kept(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = copy.deepcopy(tokenizer)
    own.truncation_side = "left"
    monkeypatch.setattr(own, "save_pretrained", tokenizer.save_pretrained)
    with pytest.raises(ModelError, match="would read another tokenizer"):
        parts._write_tokenizer(own, tmp_path)


def kept(source: Path, write: Callable[[Path], None]) -> Unpacked:
    """A part of a file, which is kept."""
    one = Unpacked(hash_file(source), "part")
    one.keep(source, write)
    return one


def test_only_the_first_of_several_at_once_writes(
    assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, waiting = list[Path](), threading.Semaphore(0)

    class Announced(FileLock):
        def acquire(self, *values: Any, **options: Any) -> Any:
            waiting.release()
            return super().acquire(*values, **options)

    def write(out: Path) -> None:
        assert all(waiting.acquire(timeout=30) for _ in range(2)), "the other one wants the lock, too"
        written.append(out)
        (out / "file").write_text("whole")

    (tmp_path / "source").write_text("text")
    monkeypatch.setattr(unpacked, "FileLock", Announced)
    with ThreadPoolExecutor(2) as pool:
        for one in pool.map(lambda _: kept(tmp_path / "source", write), range(2)):
            folder = one.find()
            assert folder is not None and (folder / "file").read_text() == "whole"
    assert len(written) == 1
