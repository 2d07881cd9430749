"""Kill a process that writes to a store, again and again, and look at what is left.

A worker indexes, deletes and compacts, and tells before each operation what it is about to do, and after it that it is
acknowledged. It gets SIGKILL at a random moment. Then the store must open, be whole (`verify`), and hold every
acknowledged document; each document of the operation that was cut is there as before it, or as after it.

With --serving it is `search-r3 serve` that is killed, while clients write (PUT) and remove (DELETE) documents over
HTTP, each of them its own; an answer with status 200 acknowledges. So that a life takes a few seconds, a process that
has imported everything forks the servers (POSIX only).

One JSON line for each kill, and one at the end; exit status 1 where one was not survived.

    python benchmarks/store_faults.py --kills 100
    python benchmarks/store_faults.py --kills 100 --serving         # five minutes
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from datetime import timedelta
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from search_r3.data.documents import Chunk
from search_r3.serving import Fingerprint, Store, index_documents
from search_r3.serving.upkeep import verify

SIZE, DOCUMENTS, CLIENTS = 32, 300, 4


class Encoder:
    """Vectors that are hashes of texts."""

    backbone = SimpleNamespace(device=SimpleNamespace(type="cpu"))

    def encode_document(self, texts: Any, **_: Any) -> np.ndarray:
        """`N x D`."""
        return np.stack(
            [np.random.default_rng(list(hashlib.sha256(text.encode()).digest())).normal(size=SIZE) for text in texts]
        )


def fingerprint() -> Fingerprint:
    return Fingerprint(
        model="hashes",
        dimension=SIZE,
        max_length=64,
        embed_token_id=1,
        frame=(1,),
        text_ids=(2,),
        weights="",
        backend="",
        probe="",
    )


def document(name: str, version: int) -> list[Chunk]:
    """A document of one to six chunks; another version of it has other texts, and another number of chunks."""
    chunks = 1 + (int(name[1:]) + version) % 6
    return [
        Chunk(
            f"{name}#{number}", f"version {version} of {name}, part {number}", parent_id=name,
            start=number, end=number + 1,
            content_hash=f"{name}/{version}", source="made", metadata={"version": version},
        )
        for number in range(chunks)
    ]  # fmt: skip


def work(address: str, seed: int, state: dict[str, int]) -> None:
    """Write until killed; a line before each operation with the documents that it changes, and one after it."""
    draw, store, model = random.Random(seed), Store.open(address), Encoder()
    print(json.dumps({"ready": True}), flush=True)
    version = max(state.values(), default=0)
    for number in range(10_000):
        version += 1
        some = draw.sample([f"d{place}" for place in range(DOCUMENTS)], draw.randint(1, 12))
        what = draw.choices(["index", "delete", "compact"], [6, 2, 1])[0]
        after = {"index": dict.fromkeys(some, version), "delete": dict.fromkeys(some), "compact": {}}[what]
        print(json.dumps({"begin": number, "what": what, "after": after}), flush=True)
        if what == "index":
            chunks = [chunk for name in some for chunk in document(name, version)]
            index_documents(store, model, chunks, sources=[], block=draw.choice([1, 100]))  # type: ignore[arg-type]
        elif what == "delete":
            store.delete(some)
        else:
            store.compact(keep=timedelta(seconds=1))
        print(json.dumps({"done": number}), flush=True)


def versions(store: Store) -> dict[str, int]:
    """The version of each document that is there."""
    rows = (row for batch in store.batches() for row in batch.select(["parent_id", "metadata"]).to_pylist())
    return {row["parent_id"]: json.loads(row["metadata"])["version"] for row in rows}


def kill_worker(address: str, seed: int, state: dict[str, int], delay: float) -> tuple[list[Any], list[Any], list[str]]:
    """Start a worker and kill it: what it acknowledged, what was cut, faults."""
    command = [sys.executable, __file__, "--work", address, "--seed", str(seed), "--state", json.dumps(state)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        ready = worker.stdout.readline()
        timer = threading.Timer(delay, worker.kill)
        timer.start()
        lines = [json.loads(line) for line in worker.stdout if line.endswith("\n")]
        timer.cancel()
    begun = [line for line in lines if "begin" in line]
    done = {line["done"] for line in lines if "done" in line}
    faults = [] if ready and worker.returncode == -signal.SIGKILL else [f"the worker ended with {worker.returncode}"]
    return *([one for one in begun if (one["begin"] in done) == ended] for ended in (True, False)), faults


def nurse() -> None:
    """Fork a server for each line on stdin: the store, and a pipe for what the server prints. Ends with its stdin."""
    for name in ("lancedb", "mcp.server", "transformers", "uvicorn", "search_r3.model.encoder"):
        import_module(name)
    import_module("search_r3.serving.server")
    from search_r3.cli import main as search_r3

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the dead
    warnings.simplefilter("ignore", RuntimeWarning)  # LanceDB's at a fork, for which it is made
    while line := sys.stdin.readline():
        address, pipe = json.loads(line)
        if not (pid := os.fork()):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.dup2(os.open(pipe, os.O_WRONLY), 1)
            sys.argv = ["search-r3", "serve", address, "--port", "0"]
            search_r3()
            sys.exit(0)
        print(pid, flush=True)


class Nursery:
    """Servers that are forked; `pipe` is a name for one."""

    def __init__(self, pipe: Path) -> None:
        os.mkfifo(pipe)
        self._pipe = pipe
        command = [sys.executable, __file__, "--nurse"]
        # One thread: those of torch would be there before the fork.
        environment = {name: value for name, value in os.environ.items() if name != "SEARCH_R3_TOKEN"}
        environment |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._nurse = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def bear(self, address: str) -> tuple[int, str]:
        """A server that listens: its process and its address."""
        assert self._nurse.stdin is not None and self._nurse.stdout is not None
        self._nurse.stdin.write(json.dumps([address, str(self._pipe)]) + "\n")
        self._nurse.stdin.flush()
        pid = int(self._nurse.stdout.readline())
        with self._pipe.open() as said:
            line = said.readline()
        if not line.startswith("http://"):
            raise RuntimeError(f"the server did not start: {line!r}")
        return pid, line.split(" ")[0].strip().removesuffix(":")

    def close(self) -> None:
        """End it."""
        self._nurse.communicate()


def kill_server(
    nursery: Nursery, address: str, seed: int, state: dict[str, int], delay: float
) -> tuple[list[Any], list[Any], list[str]]:
    """The same with a server and clients that write to it."""
    from http_load import WAIT, Client

    ended, first, stop = dict[int, tuple[list[Any], list[Any]]](), threading.Event(), threading.Event()
    faults: list[str] = []

    def write(number: int, url: str) -> None:
        draw, client, done = random.Random(f"{seed}/{number}"), Client(url), list[Any]()
        own = [f"d{place}" for place in range(number, DOCUMENTS, CLIENTS)]
        version = max(state.values(), default=0)
        ended[number] = done, []
        while True:
            version += 1
            call, one = operation(draw, draw.sample(own, draw.randint(1, 6)), version)
            ended[number] = done, [one]
            answer = client.ask(call)
            if answer.status != 200:
                if answer.status or not stop.is_set():
                    faults.append(f"{call.kind} was answered with {answer.status}: {answer.text.decode()}")
                return
            done.append(one)
            if call.kind == "put":
                first.set()

    pid, url = nursery.bear(address)
    threads = [threading.Thread(target=write, args=(number, url)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    first.wait(WAIT)  # the first one loads what all need
    time.sleep(delay)
    stop.set()
    os.kill(pid, signal.SIGKILL)
    for thread in threads:
        thread.join()
    done = [one for number in ended for one in ended[number][0]]
    return done, [one for number in ended for one in ended[number][1]], faults


def operation(draw: random.Random, some: list[str], version: int) -> tuple[Any, dict[str, Any]]:
    """A request that writes or removes these documents, and what it changes."""
    from http_load import Call

    if draw.random() < 0.3:
        call = Call("delete", "DELETE", "/v1/documents", {"ids": some})
        return call, {"what": "delete", "after": dict.fromkeys(some)}
    documents = [
        {
            "id": name,
            "metadata": {"version": version},
            "text": " ".join(chunk.text for chunk in document(name, version)),
        }
        for name in some
    ]
    call = Call("put", "PUT", "/v1/documents", {"documents": documents})
    return call, {"what": "put", "after": dict.fromkeys(some, version)}


def kill_once(kill: Any, address: str, seed: int, state: dict[str, int], longest: float) -> dict[str, Any]:
    """Let something write, kill it, and compare; `state` becomes what is there."""
    delay = random.Random(f"delay/{seed}").uniform(0, longest)
    done, cut, faults = kill(address, seed, state, delay)
    for one in done:
        apply(state, one["after"])
    row: dict[str, Any] = {"seed": seed, "during": "+".join(one["what"] for one in cut) or "between"}
    row |= {"acknowledged": len(done), "after_s": round(delay, 3)}
    changed = {name: version for one in cut for name, version in one["after"].items()}
    try:
        started = time.perf_counter()
        store = Store.open(address)
        row["open_ms"] = round(1000 * (time.perf_counter() - started), 1)
        faults += verify(store)
        found = versions(store)
        for name in sorted({*state, *found, *changed}):
            allowed = {state.get(name), changed[name]} if name in changed else {state.get(name)}
            if found.get(name) not in allowed:
                faults.append(f"{name} has the version {found.get(name)}, expected {sorted(map(str, allowed))}")
        state.clear()
        state.update(found)
        row["documents"] = len(found)
    except Exception as error:
        faults.append(f"{type(error).__name__}: {error}")
    return row | {"ok": not faults, "faults": faults}


def apply(state: dict[str, int], after: dict[str, int | None]) -> None:
    for name, version in after.items():
        if version is None:
            state.pop(name, None)
        else:
            state[name] = version


def create(address: str, model: str | None) -> None:
    """An empty store, of a model where there is one."""
    if model is None:
        Store.create(address, fingerprint())
        return
    from search_r3 import SearchR3

    place = str(Path(model).absolute()) if Path(model).exists() else model
    Store.create(address, Fingerprint.of(SearchR3(model)), model=place, chunk_tokens=64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest", type=float, default=1.5, help="seconds of writing before a kill, at most")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--state", default="{}", help=argparse.SUPPRESS)
    parser.add_argument("--nurse", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--serving", action="store_true", help="kill a server that clients write to")
    parser.add_argument("--model", default="builtin", help="of the server")
    options = parser.parse_args()
    if options.work:
        work(options.work, options.seed, json.loads(options.state))
        return
    if options.nurse:
        nurse()
        return
    folder = Path(tempfile.mkdtemp(prefix="store-faults-"))
    address, state = str(folder / "store"), dict[str, int]()
    create(address, options.model if options.serving else None)
    nursery = Nursery(folder / "said") if options.serving else None
    kill = kill_worker if nursery is None else partial(kill_server, nursery)
    rows = []
    for number in range(options.kills):
        rows.append(kill_once(kill, address, options.seed + number, state, options.longest))
        print(json.dumps(rows[-1]), flush=True)
    if nursery is not None:
        nursery.close()
    during = Counter(row["during"] for row in rows)
    failed = sum(not row["ok"] for row in rows)
    print(
        json.dumps(
            {
                "kills": len(rows),
                "failed": failed,
                "during": during,
                "acknowledged": sum(row["acknowledged"] for row in rows),
            }
        )
    )
    if not failed:
        shutil.rmtree(folder)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
