"""Generated input, half of it wrong: no traceback, no status 500, and every error says where and what to do.

    pip install search-r3[serve,dev]
    python benchmarks/fuzz.py --out runs/bench/fuzz.json          # 10,000 cases, 10 minutes
    python benchmarks/fuzz.py --cases 400                         # a minute

Cases are drawn by hypothesis from --seed: requests, made from the app's own OpenAPI page and sent to it in this process
(60 %); JSON lines, read as a collection and as documents (20 %); recipes (10 %); files of all kinds (10 %). Half of
each are as they should be, the others have parts exchanged, removed, added, cut or drawn at random.

A fault is an exception that is none of the package's own, a log record with a traceback, a status of 500, 424 or 503,
an error without a place or a remedy, and a valid case that is refused. The JSON object counts statuses and messages,
digits and quotations aside. The exit status is 1 where there is a fault.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from common import Shape, finish, machine, make_model, need, prepare, say, versions
from fuzz_cases import NAMES, WORDS, files, lines, recipes, requests
from hypothesis import HealthCheck, Phase, given, seed, settings

SHARES = {"requests": 0.6, "lines": 0.2, "recipes": 0.1, "files": 0.1}
REMEDY = re.compile(r"; |should|required|expected|must|give|send|takes?|choose|not permitted|not? JSON", re.IGNORECASE)
"""What a remedy is known by."""


class Faults:
    """What was found; tracebacks that are logged count."""

    def __init__(self) -> None:
        self.cases: Counter[str] = Counter()
        self.outcomes: Counter[str] = Counter()
        self.messages: Counter[str] = Counter()
        self.found: list[dict[str, Any]] = []
        self._logged: list[str] = []
        handler = logging.Handler(logging.WARNING)
        handler.emit = self._emit  # type: ignore[method-assign]
        logging.getLogger().addHandler(handler)

    def _emit(self, record: logging.LogRecord) -> None:
        if record.exc_info:
            self._logged.append(f"{record.getMessage()}: {record.exc_info[1]!r}")

    def add(self, what: str, case: Any) -> None:
        """One fault."""
        self.found.append({"fault": what[:600], "case": repr(case)[:600]})
        say(f"{self.found[-1]}")

    def message(self, text: str, place: Iterable[str], case: Any) -> None:
        """An error's text: it names one of these places and a remedy."""
        plain = re.sub(r"'(?:[^']|(?<=\w)'(?=\w))*'|\"[^\"]*\"|/\S+|\d[\d,.]*|\{.*\}", "_", text, flags=re.DOTALL)
        self.messages[plain[:160]] += 1
        if not text or "Traceback" in text or not REMEDY.search(text):
            self.add(f"no remedy: {text!r}", case)
        if not any(one and one in text for one in place):
            self.add(f"no place: {text!r}", case)

    def ended(self, case: Any) -> None:
        """The case is over; what it logged is known."""
        for line in self._logged:
            self.add(f"a traceback in the log: {line}", case)
        self._logged.clear()


def run(count: int, number: int, strategy: Callable[[bool], Any], check: Callable[[Any], None]) -> None:
    """So many cases, half of them valid, none of them shrunk or kept."""
    for valid in (True, False):
        checked = given(strategy(valid))(check)
        checked = settings(
            max_examples=max(1, count // 2), deadline=None, database=None, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )(checked)  # fmt: skip
        seed(number)(checked)()


def ask(client: Any, page: dict[str, Any], faults: Faults, count: int, number: int) -> None:
    """Requests."""

    def check(case: dict[str, Any]) -> None:
        faults.cases["requests valid" if case["valid"] else "requests spoiled"] += 1
        try:
            answer = client.request(case["method"], case["path"], content=case["content"], headers=case["headers"])
        except Exception as error:
            faults.add(f"{type(error).__name__}: {error}", case)
            return
        faults.outcomes[f"requests {answer.status_code}"] += 1
        if answer.status_code in (424, 500, 503):
            faults.add(f"status {answer.status_code}: {answer.text}", case)
        # There may be no such document.
        elif answer.status_code != 200 and case["valid"] and answer.status_code != 404:
            faults.add(f"a valid request is refused with {answer.status_code}: {answer.text}", case)
        elif answer.status_code >= 400:
            error = answer.json()["error"]
            text, param = (error, "") if isinstance(error, str) else (error["message"], error["param"] or "")
            words = re.findall(r"\w+", case["path"] + case["content"].decode(errors="replace"))
            param = param or next(iter(re.findall(r"^([\w.]+): ", text)), "")
            nouns = ["text", "query", "document", "body", "route", "request", "method", "path"]
            faults.message(text, [param, *nouns, *(word for word in words if len(word) > 3)], case)
        elif b"event: error" in answer.content:
            faults.add(f"events with an error: {answer.text}", case)
        faults.ended(case)

    run(count, number, lambda valid: requests(page, valid), check)


def attempt(faults: Faults, kind: str, case: tuple[bool, Any], place: Path, action: Callable[[], Any]) -> None:
    """Do something with a file; an error of the package must name the file and a remedy."""
    from search_r3.errors import SearchR3Error

    valid, content = case
    faults.cases[f"{kind} {'valid' if valid else 'spoiled'}"] += 1
    try:
        action()
        faults.outcomes[f"{kind} taken"] += 1
    except SearchR3Error as error:
        faults.outcomes[f"{kind} refused"] += 1
        if valid:
            faults.add(f"valid {kind} are refused: {error}", content)
        faults.message(str(error), [str(place), place.name], content)
    except Exception as error:
        faults.add(f"{kind}: {type(error).__name__}: {error}", content)
    faults.ended(content)


def read_lines(folder: Path, faults: Faults, count: int, number: int) -> None:
    """JSON lines: as a collection, and as documents of one's own."""
    from search_r3 import read_documents
    from search_r3.data.collection import Collection

    collection, own = folder / "collection", folder / "own.jsonl"
    (collection / "qrels").mkdir(parents=True)
    (collection / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq0\td0\t1\n")

    def check(case: tuple[bool, bytes]) -> None:
        (collection / "corpus.jsonl").write_bytes(case[1])
        (collection / "queries.jsonl").write_text('{"_id": "q0", "text": "where?"}\n')
        attempt(faults, "lines", case, collection, lambda: Collection.load(collection))
        own.write_bytes(case[1])
        attempt(faults, "tables", case, own, lambda: list(read_documents(own)))

    run(count // 2, number, lines, check)


def read_recipes(folder: Path, faults: Faults, count: int, number: int) -> None:
    """Recipes."""
    from search_r3.config import load_recipe

    root = Path(__file__).parents[1] / "recipes"
    shipped = [load_recipe(path).model_dump(mode="json") for path in sorted(root.glob("*.yaml"))]
    path = folder / "recipe.yaml"

    def check(case: tuple[bool, bytes]) -> None:
        path.write_bytes(case[1])
        attempt(faults, "recipes", case, path, lambda: load_recipe(path))

    run(count, number, lambda valid: recipes(shipped, valid), check)


def read_files(folder: Path, faults: Faults, count: int, number: int) -> None:
    """Files in a folder beside a good one: whatever they are, that one is read, and they are read or counted."""
    from search_r3 import read_documents

    root = folder / "files"
    root.mkdir()

    def check(case: tuple[bool, tuple[str, bytes]]) -> None:
        suffix, content = case[1]
        path = root / f"one{suffix}"
        path.write_bytes(content)
        (root / "good.txt").write_text("A good one.")

        def read() -> None:
            stream = read_documents(root)
            names = {chunk.parent_id for chunk in stream}
            if "good.txt" not in names:
                faults.add("a broken file keeps a good one from being read", case)
            if not names - {"good.txt"} and not stream.report.skipped and content.strip():
                faults.add("a file is neither read nor counted", case)

        attempt(faults, "files", case, root, read)
        path.unlink()

    run(count, number, files, check)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the JSON object here too")
    options = parser.parse_args()
    need("torch", "transformers", "fastapi", "lancedb", "hypothesis")
    prepare(options)
    from fastapi.testclient import TestClient

    from search_r3 import SearchR3
    from search_r3.serving import Fingerprint, Store
    from search_r3.serving.engine import EngineThread
    from search_r3.serving.server import ServerSettings, create_app

    logging.getLogger("search_r3").setLevel(logging.ERROR)
    faults, started = Faults(), time.monotonic()
    counts = {kind: round(share * options.cases) for kind, share in SHARES.items()}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = SearchR3(
            make_model(folder / "model", WORDS * 20, Shape(1, 64), 500, 512), device="cpu", max_new_tokens=4
        )
        store = Store.create(folder / "store", Fingerprint.of(model))
        with EngineThread(model) as engine:
            app = create_app(engine, ServerSettings(max_batch=64, max_body=100_000), store=store)
            client = TestClient(app, raise_server_exceptions=False)
            page = client.get("/openapi.json").json()
            documents = [
                {"id": name, "text": f"{word} {name}", "metadata": {"year": 3}}
                for name, word in zip(NAMES, WORDS, strict=False)
            ]
            assert client.put("/v1/documents", json={"documents": documents}).status_code == 200
            parts: dict[str, Callable[[int], None]] = {
                "requests": lambda count: ask(client, page, faults, count, options.seed),
                "lines": lambda count: read_lines(folder, faults, count, options.seed),
                "recipes": lambda count: read_recipes(folder, faults, count, options.seed),
                "files": lambda count: read_files(folder, faults, count, options.seed),
            }
            for kind, part in parts.items():
                part(counts[kind])
                say(f"{kind}: {sum(faults.cases.values())} cases so far, {len(faults.found)} faults")
    record = {"benchmark": "fuzz", "cases": faults.cases, "faults": len(faults.found), "found": faults.found}
    record |= {"outcomes": faults.outcomes, "messages": dict(faults.messages.most_common())}
    record |= {"seconds": round(time.monotonic() - started, 1), "seed": options.seed}
    finish({**record, "versions": versions("hypothesis", "fastapi", "pydantic"), "machine": machine()}, options.out)
    sys.exit(1 if faults.found else 0)


if __name__ == "__main__":
    main()
