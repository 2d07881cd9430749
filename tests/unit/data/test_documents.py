"""Own documents: what is read of folders, files and tables, under which ids, and what is passed over and why."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pypdf
import pytest

from search_r3.data.documents import Chunk, ReadReport, read_documents
from search_r3.data.reading.chunks import Chunking
from search_r3.errors import ConfigError, DataError
from search_r3.retrieval.encode import encode_corpus
from tests.documents_made import encrypted, pdf


def write(folder: Path, **files: str | bytes) -> Path:
    """Files in a folder; `a__b_md` is `a/b.md`."""
    for name, content in files.items():
        stem, _, suffix = name.rpartition("_")
        path = folder / f"{stem.replace('__', '/')}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def whole(source: Any, **options: Any) -> dict[str, str]:
    """parent_id -> text of the documents of a source."""
    return {chunk.doc_id: chunk.text for chunk in read_documents(source, chunking=None, **options)}


def report(source: Any, **options: Any) -> ReadReport:
    stream = read_documents(source, chunking=None, **options)
    assert list(stream)
    return stream.report


def message(source: Any, **options: Any) -> str:
    with pytest.raises(DataError) as error:
        whole(source, **options)
    return str(error.value)


def jsonl(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_a_folder_of_files_of_all_kinds_is_read_by_name(tmp_path: Path) -> None:
    folder = write(
        tmp_path, b_txt="plain", a__deep__x_md="# Tea\n\ngreen", page_html="<title>P</title><p>a<p>b", code_py="x = 1",
        paper_pdf=pdf(["first page", "second page"], "On tea"), script_sh="echo", table_csv="id,text\n7,row",
    )  # fmt: skip
    (folder / "README").write_text("no suffix")
    assert whole(folder) == {
        "README": "no suffix",
        "a/deep/x.md": "# Tea\n\ngreen",
        "b.txt": "plain",
        "code.py": "x = 1",
        "page.html": "a\n\nb",
        "paper.pdf": "first page\nsecond page",
        "script.sh": "echo",
        "table.csv:7": "row",
    }
    titles = {chunk.doc_id: chunk.title for chunk in read_documents(folder, chunking=None) if chunk.title}
    assert titles == {"a/deep/x.md": "Tea", "page.html": "P", "paper.pdf": "On tea"}


SKIPPED: dict[str, tuple[bytes | str, str]] = {
    "empty.txt": ("", "empty"),
    "blank.txt": (" \r\n\t", "without text"),
    "image.png": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "binary"),
    "packed.txt": (bytes(range(128, 160)) * 3 + b"\x01\x02", "binary"),
    "code.bin": (b"\xe9\x01\x02\x03 what Windows-1252 could be", "binary"),
    "nul.md": (b"text \0 text", "binary"),
    ".hidden.txt": ("secret", "hidden"),
    ".git/config": ("[core]", "hidden"),
    "node_modules/a/readme.md": ("# a", "a folder that programs made"),
    "env/pyvenv.cfg": ("home = /usr", "a folder that programs made"),
    "large.txt": ("x" * 3000, "larger than 0 MiB"),
    "scan.pdf": (pdf(["", ""]), "a PDF without text (scanned pages?)"),
    "locked.pdf": (encrypted(pdf(["secret"]), "password"), "an encrypted PDF"),
    "cut.pdf": (pdf(["a page"])[:200], "a damaged PDF"),
    "text.pdf": ("this is no PDF", "a damaged PDF"),
    "empty.pdf": ("", "a damaged PDF"),
    "empty.html": ("<html><script>1</script></html>", "without text"),
    "numbers.csv": ("a,b\n1,2\n", "no column that is known to hold text; it has 'a', 'b'"),
    "cut.parquet": (b"PAR1\0\0", "a damaged Parquet file"),
}


@pytest.mark.parametrize("name", SKIPPED)
def test_what_cannot_be_read_is_counted_with_the_reason_and_ends_nothing(tmp_path: Path, name: str) -> None:
    content, reason = SKIPPED[name]
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    (tmp_path / "zzz.txt").write_text("what comes after it")
    stream = read_documents(tmp_path, chunking=None, max_file_bytes=2900)
    assert [chunk.doc_id for chunk in stream] == ["zzz.txt"]
    assert stream.report.skipped == Counter({reason: 1})
    assert name.split("/")[0] in stream.report.examples[reason][0]
    assert f"1 x {reason}: " in stream.report.lines()[0]


def test_links_are_read_once_and_loops_and_pipes_not_at_all(tmp_path: Path) -> None:
    folder = write(tmp_path / "root", a_txt="a", sub__b_txt="b")
    (folder / "sub" / "up").symlink_to(folder, target_is_directory=True)
    (folder / "self").symlink_to(folder / "self")
    (folder / "gone").symlink_to(folder / "nowhere")
    (folder / "z.txt").symlink_to(folder / "a.txt")
    os.mkfifo(folder / "pipe")
    (tmp_path / "other.txt").write_text("elsewhere")
    (folder / "linked.txt").symlink_to(tmp_path / "other.txt")
    assert whole(folder) == {"a.txt": "a", "linked.txt": "elsewhere", "sub/b.txt": "b"}
    assert report(folder).skipped == {
        "a link to a folder (name the folder as a source)": 1,
        "a broken link": 2,
        "read already under another name": 1,
        "not a regular file": 1,
    }


def test_what_may_not_be_read_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, a_txt="a", b_txt="b", shut__c_txt="c")
    scandir, read = os.scandir, Path.read_bytes

    def guarded_scandir(path: Any) -> Any:
        if Path(path).name == "shut":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    def guarded_read(path: Path) -> bytes:
        if path.name == "a.txt":
            raise PermissionError(13, "Permission denied")
        return read(path)

    monkeypatch.setattr(os, "scandir", guarded_scandir)
    monkeypatch.setattr(Path, "read_bytes", guarded_read)
    assert whole(tmp_path) == {"b.txt": "b"}
    assert report(tmp_path).skipped == {"unreadable (Permission denied)": 2}


def test_a_folder_that_nests_deeper_than_calls_may_is_read(tmp_path: Path) -> None:
    start = Path.cwd()
    try:
        os.chdir(tmp_path)
        for _ in range(1100):
            Path("d").mkdir()
            os.chdir("d")
        Path("deep.txt").write_text("deep")
    finally:
        os.chdir(start)
    assert list(whole(tmp_path).values()) == ["deep"]
    # pytest's own clean-up calls itself for every folder.
    while (tmp_path / "d" / "d").exists():
        (tmp_path / "d" / "d").rename(tmp_path / "e")
        (tmp_path / "d").rmdir()
        (tmp_path / "e").rename(tmp_path / "d")


def test_names_that_no_id_can_hold_are_escaped(tmp_path: Path) -> None:
    for name in ("line\nbreak.txt", "tab\t.txt", "naïve ☕.txt", os.fsdecode(b"caf\xe9.txt")):
        (tmp_path / name).write_text(name.encode("utf-8", "replace").decode())
    ids = list(whole(tmp_path))
    assert sorted(ids) == [r"caf\udce9.txt", r"line\nbreak.txt", "naïve ☕.txt", r"tab\t.txt"]
    json.dumps(ids, ensure_ascii=False).encode("utf-8")


TEXTS: dict[str, tuple[bytes, str]] = {
    "bom": (b"\xef\xbb\xbfna\xc3\xafve\r\nline\rend", "naïve\nline\nend"),
    "utf-16": ("naïve 漢".encode("utf-16"), "naïve 漢"),
    "utf-16 big": (b"\xfe\xff" + "naïve".encode("utf-16-be"), "naïve"),
    "utf-32": ("naïve".encode("utf-32"), "naïve"),
    "cut utf-16": ("naïve".encode("utf-16")[:-1], "naïv�"),
    "latin-1": ("naïve café".encode("latin-1"), "naïve café"),
    "windows": (b"\x93quoted\x94, 5 \x80", "\u201cquoted\u201d, 5 €"),
    "damaged utf-8": ("ééé".encode() + b"\xff", "ééé�"),
    "surrogate": (b"half \xed\xa0\x80.", "half �."),
    "colours": (b"\x1b[31mred\x1b[0m\x0cpage", " [31mred [0m\npage"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_texts_of_any_encoding_become_clean_unicode(tmp_path: Path, name: str) -> None:
    data, text = TEXTS[name]
    (tmp_path / "a.txt").write_bytes(data)
    assert whole(tmp_path) == {"a.txt": text}


def test_html_is_decoded_as_it_declares(tmp_path: Path) -> None:
    page = '<meta charset="{}"><p>{}'
    write(
        tmp_path,
        a_html=page.format("koi8-r", "чай").encode("koi8-r"),
        b_html=page.format("x-none", "é").encode("cp1252"),
    )
    assert whole(tmp_path) == {"a.html": "чай", "b.html": "é"}


def test_a_pdf_whose_reader_needs_no_password_is_read_and_has_pages(tmp_path: Path) -> None:
    write(tmp_path, a_pdf=encrypted(pdf([f"page {number} " * 20 for number in (1, 2, 3)]), ""))
    chunks = list(read_documents(tmp_path, chunking=Chunking(max_tokens=60)))
    assert [chunk.page for chunk in chunks] == [1, 2, 3]
    assert chunks[2].place.startswith("page 3, characters ")


def test_an_encryption_that_needs_another_package_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def decrypt(self: pypdf.PdfReader, password: str) -> int:
        raise pypdf.errors.DependencyError("cryptography>=3.1 is required for AES algorithm")

    monkeypatch.setattr(pypdf.PdfReader, "decrypt", decrypt)
    write(tmp_path, a_pdf=encrypted(pdf(["a"]), ""), b_txt="b")
    assert report(tmp_path).skipped == {"an encrypted PDF that needs the package cryptography": 1}


def test_chunks_have_their_place_their_parent_and_the_hash_of_the_whole(tmp_path: Path) -> None:
    body = "# Tea\n\n## Green\n\n" + "Not oxidised. " * 40 + "\n\n## Black\n\n" + "Oxidised. " * 40
    stream = read_documents(write(tmp_path, tea_md=body), chunking=Chunking(max_tokens=80))
    chunks = list(stream)
    assert [chunk.doc_id for chunk in chunks] == [f"tea.md#{number}" for number in range(len(chunks))]
    assert {chunk.parent_id for chunk in chunks} == {"tea.md"}
    assert len({chunk.content_hash for chunk in chunks}) == 1
    assert all(body[chunk.start : chunk.end] == chunk.text for chunk in chunks)
    assert chunks[-1].headings == ("Tea", "Black")
    assert chunks[-1].full_text.startswith("Tea Black Oxidised. ")
    assert chunks[-1].path == str(tmp_path / "tea.md")
    assert stream.report.documents == 1
    assert stream.report.chunks == len(chunks)


def test_the_hash_is_that_of_the_text_and_not_of_its_place_or_its_line_ends(tmp_path: Path) -> None:
    write(tmp_path, a_txt="one\ntwo", b__c_txt="one\r\ntwo", d_txt="one two")
    first, same, other = (chunk.content_hash for chunk in read_documents(tmp_path))
    assert first == same != other


def test_every_iteration_reads_anew_and_a_stream_is_encoded(tmp_path: Path, model: Any) -> None:
    stream = read_documents(write(tmp_path / "docs", a_txt="red house", b_txt="blue boat"))
    assert encode_corpus(model, stream.texts(), tmp_path / "index").doc_ids == ["b.txt#0", "a.txt#0"]
    write(tmp_path / "docs", c_txt="black lamp")
    assert [chunk.doc_id for chunk in stream] == ["a.txt#0", "b.txt#0", "c.txt#0"]


def test_only_one_file_at_a_time_is_read(tmp_path: Path) -> None:
    write(tmp_path, a_txt="a", b_txt="b")
    chunks = iter(read_documents(tmp_path))
    next(chunks)
    (tmp_path / "b.txt").write_text("changed since")
    assert next(chunks).text == "changed since"


def test_single_files_take_their_name_and_several_sources_are_read_in_turn(tmp_path: Path) -> None:
    write(tmp_path, notes__a_txt="a", paper_pdf=pdf(["page"]), rows_jsonl=jsonl({"id": "r1", "text": "row"}))
    sources = [tmp_path / "paper.pdf", str(tmp_path / "notes"), tmp_path / "rows.jsonl"]
    assert whole(sources) == {"paper.pdf": "page", "a.txt": "a", "r1": "row"}


def test_sources_with_the_same_ids_need_a_prefix(tmp_path: Path) -> None:
    write(tmp_path, one__a_md="1", two__a_md="2")
    one, two = tmp_path / "one", tmp_path / "two"
    assert "the id 'a.md' already; give one another, name another column of ids, or" in message([one, two])
    assert whole({"x": one, "y": two}) == {"x/a.md": "1", "y/a.md": "2"}
    assert whole([one, f"y={two}"]) == {"a.md": "1", "y/a.md": "2"}
    (tmp_path / "a=b").mkdir()
    write(tmp_path / "a=b", c_txt="its own name goes first")
    assert list(whole(str(tmp_path / "a=b"))) == ["c.txt"]


def test_a_file_in_two_sources_is_read_once(tmp_path: Path) -> None:
    write(tmp_path, sub__a_md="1", b_md="2")
    assert whole([tmp_path, tmp_path / "sub", tmp_path / "b.md"]) == {"b.md": "2", "sub/a.md": "1"}


def test_without_any_document_the_error_says_what_was_passed_over(tmp_path: Path) -> None:
    assert ": it is empty" in message(tmp_path)
    write(tmp_path, scan_pdf=pdf([""]), empty_txt="")
    found = message(tmp_path)
    assert "1 x a PDF without text (scanned pages?)" in found
    assert "1 x empty" in found


@pytest.mark.parametrize("source", ["missing.txt", "~nobody-of-that-name/x", "x" * 5000, "a\0b", "p=missing"])
def test_a_source_that_does_not_exist_is_refused_at_once(source: str) -> None:
    with pytest.raises(DataError, match="expected a file, a folder, or a data set of the hub"):
        read_documents(source)
    with pytest.raises(DataError, match="no source of documents was given"):
        read_documents([])


ROWS = [
    {"_id": "1", "title": "Tea", "text": "green", "metadata": {"year": 2020}},
    {"_id": 2, "title": None, "text": "black"},
    {"_id": "3", "title": "Only a title", "text": ""},
]


def test_a_corpus_in_the_beir_layout_is_taken_as_it_is(tmp_path: Path) -> None:
    write(
        tmp_path, corpus_jsonl=b"\xef\xbb\xbf" + jsonl(*ROWS).encode(), queries_jsonl=jsonl({"_id": "q", "text": "?"})
    )
    for source in (tmp_path, tmp_path / "corpus.jsonl"):
        chunks = list(read_documents(source, chunking=None))
        assert [chunk.doc_id for chunk in chunks] == ["1", "2", "3"]
        assert [chunk.full_text for chunk in chunks] == ["Tea green", "black", "Only a title"]
        assert chunks[0].metadata == {"year": 2020}
    assert [chunk.doc_id for chunk in read_documents(tmp_path)] == ["1#0", "2#0", "3#0"]


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "tsv", "parquet"])
def test_columns_are_named_or_guessed_in_every_kind_of_table(tmp_path: Path, suffix: str) -> None:
    rows = [{"URL": "u1", "Content": 'one, "two"\nthree', "year": "1999"}, {"URL": "u2", "Content": "four", "year": ""}]
    path = tmp_path / f"t.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif suffix == "jsonl":
        path.write_text(jsonl(*rows))
    else:
        sep = "," if suffix == "csv" else "\t"
        lines = [[f'"{value.replace(chr(34), chr(34) * 2)}"' for value in row.values()] for row in rows]
        path.write_text("\r\n".join(sep.join(line) for line in [list(rows[0]), *lines]))
    assert whole(path) == {f"t.{suffix}:{number}": row["Content"] for number, row in enumerate(rows, 1)}
    columns = {"id": "URL", "text": ["year", "Content"], "metadata": "year"}
    chunks = list(read_documents(path, columns=columns, chunking=None))
    assert [chunk.doc_id for chunk in chunks] == ["u1", "u2"]
    assert chunks[0].text == f"1999\n\n{rows[0]['Content']}"
    assert chunks[0].metadata == {"year": 1999 if suffix in ("csv", "tsv") else "1999"}, "those know texts alone"
    assert "no column 'body'; it has 'Content', 'URL', 'year'" in message(path, columns={"text": "body"})
    with pytest.raises(ConfigError, match="unknown field 'txt'; expected id, title, text, metadata"):
        read_documents(path, columns={"txt": "body"})


def test_tables_as_people_save_them_are_read(tmp_path: Path) -> None:
    (tmp_path / "excel.csv").write_bytes("id;text\n1;naïve, or not\n".encode("cp1252"))
    (tmp_path / "unicode.tsv").write_bytes("id\ttext\n1\tnaïve\n".encode("utf-16"))
    (tmp_path / "long.csv").write_text("id,text\n1," + "x" * 200_000 + "\n")
    (tmp_path / "one.csv").write_text("sentence\nonly column\n")
    texts = whole(tmp_path)
    assert texts.pop("long.csv:1") == "x" * 200_000
    assert texts == {"excel.csv:1": "naïve, or not", "unicode.tsv:1": "naïve", "one.csv:1": "only column"}


def test_a_table_without_rows_and_rows_that_others_swallow_are_counted(tmp_path: Path) -> None:
    (tmp_path / "good.csv").write_text("id,text\n1,good\n2,good, and more\n")
    (tmp_path / "open.csv").write_text('"id,text\n1,a quotation that never ends\n')
    (tmp_path / "bare.csv").write_text("id,text\n")
    stream = read_documents(tmp_path)
    assert [chunk.parent_id for chunk in stream] == ["good.csv:1"]
    assert stream.report.examples == {
        "a table without rows": [str(tmp_path / "bare.csv")],
        "a row with more cells than there are columns": [f"{tmp_path}/good.csv:2"],
        'line 1: a quotation does not end where its cell does; write each " in one twice': [str(tmp_path / "open.csv")],
    }


def test_numbers_in_the_metadata_of_a_table_are_numbers(tmp_path: Path) -> None:
    cells = {"2021": 2021, "-1.50": -1.5, "0": 0, "007": "007", "1e3": "1e3", "12345678901234567": "12345678901234567"}
    rows = "".join(f"text {cell},{cell}\n" for cell in cells)
    (tmp_path / "t.csv").write_text(f"text,year\n{rows}")
    chunks = list(read_documents(tmp_path / "t.csv", columns={"metadata": "year"}))
    assert [chunk.metadata["year"] for chunk in chunks] == list(cells.values())
    assert [chunk.text for chunk in chunks] == [f"text {cell}" for cell in cells], "texts stay as they are"


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_what_is_no_utf_8_may_come_late_in_a_table(tmp_path: Path, suffix: str) -> None:
    row = "x" * 2000 if suffix == ".csv" else json.dumps({"text": "x" * 2000})
    last = "Café crème" if suffix == ".csv" else '{"text": "Café crème"}'
    text = "\n".join([*(["text"] if suffix == ".csv" else []), *[row] * 1100, last]) + "\n"
    for encoding in ("cp1252", "utf-8"):
        path = tmp_path / f"{encoding}{suffix}"
        path.write_bytes(text.encode(encoding))
        assert list(read_documents(path))[-1].text == "Café crème"


def test_broken_rows_are_counted_and_the_others_read(tmp_path: Path) -> None:
    lines = jsonl({"id": "a", "text": "good"}) + '{"id": "b", "te\n[1]\n\n' + jsonl(
        {"id": "c", "text": ["a", "list"]}, {"id": "d", "text": "  "}, {"id": "e"}, {"id": "f", "text": 7.5},
        {"id": "g", "text": "half \ud800", "metadata": "a text"},
    )  # fmt: skip
    path = tmp_path / "rows.jsonl"
    path.write_text(lines)
    stream = read_documents(path, chunking=None)
    assert {chunk.doc_id: chunk.text for chunk in stream} == {"a": "good", "f": "7.5", "g": "half �"}
    assert stream.report.skipped == {
        "a line that is not JSON": 1,
        "a line that is no JSON object": 1,
        "a row whose text is no string": 1,
        "a row without text": 2,
    }
    assert stream.report.examples["a line that is not JSON"] == [f"{path}:2"]


def test_rows_with_one_id_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, rows_jsonl=jsonl({"id": "a", "text": "1"}, {"id": "a", "text": "2"})) / "rows.jsonl"
    assert "rows.jsonl:2: another document has the id 'a' already" in message(path)
    assert whole(path, columns={"id": ""}) == {"rows.jsonl:1": "1", "rows.jsonl:2": "2"}


def test_a_data_set_in_the_hubs_format_gives_its_documents(tmp_path: Path) -> None:
    folder = write(
        tmp_path / "set",
        corpus__train_jsonl=jsonl(*({**row, "metadata": {"year": 1}} for row in ROWS)),
        queries__train_jsonl=jsonl({"_id": "q", "text": "a query"}),
    )  # fmt: skip
    assert whole(folder) == {"1": "green", "2": "black", "3": ""}
    plain = tmp_path / "plain"
    write(plain / "data", train_jsonl=jsonl({"url": "u", "body": "words", "year": 3}))
    (plain / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: data/train.jsonl\n---\n")
    assert whole(plain) == {"plain:train:0": "words"}
    [chunk] = read_documents(plain, columns={"id": "url", "metadata": ["year", "url"]}, chunking=None)
    assert (chunk.doc_id, chunk.metadata) == ("u", {"year": 3, "url": "u"})
    assert "no column 'nothing'" in message(plain, columns={"text": "nothing"})


def test_a_chunk_is_a_document(tmp_path: Path) -> None:
    [chunk] = read_documents(write(tmp_path, a_txt="text"))
    assert isinstance(chunk, Chunk)
    assert hash(chunk) == hash(next(iter(read_documents(tmp_path))))
