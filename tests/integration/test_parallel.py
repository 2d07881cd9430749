"""Two processes that hold the corpus together end with the vectors, versions, rewards and dev evaluation of one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from search_r3.errors import RunError
from search_r3.parallel import Communicator, divide, make_communicator

WORKER = """
import os, sys
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
import numpy as np
import torch
import torch.distributed as dist
from search_r3.config import EvaluationSettings, RewardSettings
from search_r3.data.collection import Collection
from search_r3.environment.environment import RetrievalEnvironment
from search_r3.model.encoder import SearchR3
from search_r3.parallel import make_communicator
from search_r3.sections import RefreshSettings
from search_r3.training.dev import DevSplit

model_path, data, out, policies, rank, world_size, meeting = sys.argv[1:]
rank, world_size = int(rank), int(world_size)
if world_size > 1:
    store = dist.FileStore(meeting, world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=120))
collection, communicator = Collection.load(data), make_communicator()
rows = np.arange(len(collection.documents))


def work(policy, model, out):
    settings = {"policy": policy, "depth": 3, "audit_documents": 6}
    if policy == "selective":
        settings |= {"neighbours": 3, "correct_drift": True, "max_documents": 30, "drift_sample": 16}
    if policy == "shortlist":
        settings |= {"max_documents": 12, "max_tokens": 300}
    if policy in ("frozen", "approximate"):
        settings |= {"policy": "shortlist", "index": "approximate" if policy == "approximate" else "exact"}
    texts = []
    encode_document = model.encode_document
    model.encode_document = lambda own, **options: texts.extend(own) or encode_document(own, **options)

    def make(state=None):
        return RetrievalEnvironment(
            collection, collection.split("train"), model, RefreshSettings(**settings), RewardSettings(), k=10, depth=4,
            max_new_tokens=8, frozen=policy == "frozen", communicator=communicator, state=state,
        )

    environment = make()
    assert environment.sharded == (world_size > 1 and policy != "selective")
    everyone = sorted(environment.qrels)
    encoded = []
    for step in range(1, 4):
        torch.manual_seed(step)  # the same change of the weights in every process
        for parameter in model.backbone.model.parameters():
            parameter.data.add_(0.02 * torch.randn_like(parameter))
        query_ids = everyone[4 * step : 4 * step + 4]
        own = query_ids[rank * 4 // world_size : (rank + 1) * 4 // world_size]
        prompts = [model.backbone.prompt_encoder.encode(collection.queries[q].text, "reason").ids for q in own]
        seeds = [everyone.index(q) for q in own]
        rollouts = model.rollouts(prompts, max_new_tokens=8, sampling_temperature=1.0, seeds=seeds)
        feedback = environment.feedback(rollouts, own, step)
        encoded.append((feedback.refresh.documents_encoded, feedback.refresh.tokens_encoded))
    vectors, versions = environment.index.vectors_at(rows), environment.index.encoded_at_version.copy()
    environment.keep_near(own, feedback.scores)
    near = np.concatenate([score.nearest for score in feedback.scores])
    np.testing.assert_array_equal(environment.vectors_at(near), vectors[near])
    audit = [value for name, value in environment.audit(rollouts, own, 3).metrics().items() if "second" not in name]
    own_texts = list(texts)
    environment.save(out / "state")
    communicator.barrier()
    again = make(out / "state")
    np.testing.assert_array_equal(again.index.vectors_at(rows), vectors)
    np.testing.assert_array_equal(again.index.encoded_at_version, versions)
    if environment.sharded:
        assert len(again.index.shard) < len(rows), "no process holds all"
    dev = DevSplit(collection, EvaluationSettings())
    engine = SimpleNamespace(communicator=communicator, full_params=nullcontext)
    values = dev.evaluate(model, engine, environment.caught_up(4))
    if policy in ("full", "shortlist"):
        assert (environment.index.encoded_at_version == 4).all()
    del values["evaluation_seconds"]
    if policy != "frozen":
        fresh = dev.evaluate(model, engine)
        assert all(abs(fresh[name] - value) < 1e-6 for name, value in values.items())
    np.savez(out / f"rank{rank}.npz", vectors=vectors, encoded=encoded, versions=versions, audit=audit,
             rewards=feedback.rewards, texts=own_texts, dev=list(values.values()))


for policy in policies.split(","):
    folder = Path(out) / policy
    folder.mkdir(exist_ok=True)
    work(policy, SearchR3(model_path, device="cpu"), folder)
if world_size > 1:
    dist.destroy_process_group()
"""

DIES = """
import os, sys
from datetime import timedelta
import torch.distributed as dist
from search_r3.parallel import ProcessGroup
meeting, rank = sys.argv[1], int(sys.argv[2])
dist.init_process_group("gloo", store=dist.FileStore(meeting, 3), rank=rank, world_size=3)
communicator = ProcessGroup(patience=timedelta(seconds=3))
assert communicator.all_gather(rank) == [0, 1, 2]
if rank == 2:
    os._exit(9)
try:
    communicator.all_gather(rank)
finally:
    dist.destroy_process_group()
"""


LEAVES = """
import atexit, os, sys
import torch.distributed as dist
from search_r3.errors import RunError
from search_r3.parallel import leave_the_others, make_communicator
meeting, rank, who, how = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
# After what `make_communicator` has registered: gloo's threads may abort a process that ends with its group open.
atexit.register(lambda: dist.is_initialized() and os._exit(3))
dist.init_process_group("gloo", store=dist.FileStore(meeting, 2), rank=rank, world_size=2)
communicator = make_communicator()
assert make_communicator() is communicator and communicator.all_gather(rank) == [0, 1]
try:
    if rank == who:
        raise RunError("my own error")
    communicator.all_gather(rank)
except RunError as error:
    if how == "nothing":
        raise
    leave_the_others(error)
    assert not dist.is_initialized()
    sys.exit(str(error))
"""

ENDS = """
import atexit, os, sys
import torch.distributed as dist
from search_r3.parallel import make_communicator
meeting, rank = sys.argv[1], int(sys.argv[2])
atexit.register(lambda: dist.is_initialized() and os._exit(3))
for turn in "first", "second":
    dist.init_process_group("gloo", store=dist.FileStore(meeting + turn, 2), rank=rank, world_size=2)
    communicator = make_communicator()
    assert communicator.rank == rank and communicator.all_gather(rank) == [0, 1]
    if turn == "first":
        dist.destroy_process_group()
        rank = 1 - rank
"""


def run(script: str, arguments: list[list[str]], timeout: float = 120) -> list[subprocess.CompletedProcess[str]]:
    """One process per list of arguments, all at once; every one has ended when this returns."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, *own], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for own in arguments
    ]
    done = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=timeout)
            done.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    finally:
        for process in processes:
            process.kill()
    return done


POLICIES = ["full", "shortlist", "frozen", "approximate", "selective"]


@pytest.fixture(scope="module")
def worked(tmp_path_factory: pytest.TempPathFactory, tiny_path: Path, collection_path: Path) -> Path:
    """What one process and two have left of every policy, in folders `1` and `2`."""
    folder = tmp_path_factory.mktemp("worked")
    for world_size in (1, 2):
        out = folder / str(world_size)
        out.mkdir()
        common = [str(tiny_path), str(collection_path), str(out), ",".join(POLICIES)]
        arguments = [[*common, str(r), str(world_size), str(out / "store")] for r in range(world_size)]
        ended = run(WORKER, arguments, timeout=600)
        assert all(process.returncode == 0 for process in ended), "\n".join(process.stderr for process in ended)
    return folder


@pytest.mark.parametrize("policy", POLICIES)
def test_two_processes_refresh_search_and_evaluate_as_one_does(worked: Path, policy: str) -> None:
    results = {
        world_size: [np.load(worked / str(world_size) / policy / f"rank{rank}.npz") for rank in range(world_size)]
        for world_size in (1, 2)
    }
    one, two = results[1][0], results[2]
    for own in two:
        np.testing.assert_allclose(own["vectors"], one["vectors"], atol=1e-6)
        np.testing.assert_array_equal(own["versions"], one["versions"])
        np.testing.assert_array_equal(own["encoded"], one["encoded"])
        np.testing.assert_allclose(own["dev"], one["dev"], atol=1e-6)
        np.testing.assert_allclose(own["audit"], one["audit"], atol=1e-6)
    np.testing.assert_array_equal(two[0]["vectors"], two[1]["vectors"])
    np.testing.assert_allclose(np.concatenate([own["rewards"] for own in two]), one["rewards"], atol=1e-6)
    assert sorted([*two[0]["texts"], *two[1]["texts"]]) == sorted(one["texts"]), "each document is encoded once"
    assert abs(len(two[0]["texts"]) - len(two[1]["texts"])) <= 15, "and the work is shared"
    assert len(set(one["versions"].tolist())) > 1 or policy in ("full", "frozen")


def test_a_process_that_dies_is_named_and_the_others_end(tmp_path: Path) -> None:
    ended = run(DIES, [[str(tmp_path / "store"), str(rank)] for rank in range(3)], timeout=60)
    assert [process.returncode for process in ended] == [1, 1, 9]
    for rank, process in enumerate(ended[:2]):
        assert f"RunError: rank {rank} of 3 lost another process: rank 2 did not come" in process.stderr


@pytest.mark.parametrize("how", ["leave", "nothing"])
@pytest.mark.parametrize("who", [0, 1])
def test_a_process_that_ends_by_its_own_error_tells_the_other(tmp_path: Path, who: int, how: str) -> None:
    """So does a program that trains from Python, which knows of no group."""
    ended = run(LEAVES, [[str(tmp_path / "store"), str(rank), str(who), how] for rank in range(2)], timeout=60)
    assert [process.returncode for process in ended] == [1, 1], ended
    assert ended[who].stderr.endswith("my own error\n") and "lost another" not in ended[who].stderr
    lost = f"rank {1 - who} of 2 lost another process: rank {who} ended by its own error: my own error; mend that"
    assert lost in ended[1 - who].stderr


def test_a_program_may_meet_the_others_twice_and_end_as_it_likes(tmp_path: Path) -> None:
    ended = run(ENDS, [[str(tmp_path / "store"), str(rank)] for rank in range(2)], timeout=60)
    assert [process.returncode for process in ended] == [0, 0], ended


def test_processes_that_cannot_meet_are_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    [ended] = run("from search_r3.parallel import make_communicator; make_communicator()", [[]], timeout=60)
    assert "RunError: WORLD_SIZE=2 says that this process is one of several, but they could not meet" in ended.stderr
    assert "MASTER_ADDR" in ended.stderr and "without WORLD_SIZE" in ended.stderr


def test_a_process_of_several_that_accelerate_takes_for_the_only_one_does_not_train_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a GPU without LOCAL_RANK."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr("accelerate.PartialState", lambda cpu: None)
    with pytest.raises(RunError, match=r"WORLD_SIZE=2 .* LOCAL_RANK is not set; start all of them with"):
        make_communicator()


def test_shares_are_even_in_tokens_and_lose_nothing() -> None:
    lengths = [5, 90, 10, 10, 40, 45, 7, 3]
    shares = divide(lengths, 2)
    assert sorted(shares[0] + shares[1]) == list(range(8))
    sums = [sum(lengths[place] for place in share) for share in shares]
    assert abs(sums[0] - sums[1]) <= max(lengths) / 2
    assert divide([3, 1], 4) == [[0], [1], [], []]
    assert divide(lengths, 1) == [sorted(range(8), key=lambda i: -lengths[i])]


def test_a_single_process_talks_to_itself() -> None:
    alone = Communicator()
    alone.barrier()
    assert alone.all_gather("x") == ["x"]
    rows = np.ones((2, 3), np.float32)
    assert alone.all_gather_rows(rows)[0] is rows


MATRICES = """
import sys
from datetime import timedelta
import numpy as np
import torch.distributed as dist
from search_r3.parallel import ProcessGroup, gather_queries
meeting, rank = sys.argv[1], int(sys.argv[2])
dist.init_process_group("gloo", store=dist.FileStore(meeting, 3), rank=rank, world_size=3)
communicator = ProcessGroup(patience=timedelta(seconds=20))
for dtype in (np.float32, np.int64, np.int16):
    parts = communicator.all_gather_rows(np.full((2 * rank, 3 + rank), rank, dtype)[:, ::-1])
    for number, part in enumerate(parts):
        np.testing.assert_array_equal(part, np.full((2 * number, 3 + number), number, dtype))
        assert part.dtype == dtype
assert [part.shape for part in communicator.all_gather_rows(np.empty((0, 0), np.float32))] == [(0, 0)] * 3
vectors = np.full((rank, 4), rank, np.float32)
whole, labels, own = gather_queries(communicator, vectors if rank else np.empty((0, 0), np.float32), [rank] * rank)
assert whole[:, 0].tolist() == labels == [1, 2, 2] and labels[own] == [rank] * rank
dist.destroy_process_group()
"""


def test_matrices_of_any_size_travel_as_they_are(tmp_path: Path) -> None:
    ended = run(MATRICES, [[str(tmp_path / "store"), str(rank)] for rank in range(3)], timeout=60)
    assert all(process.returncode == 0 for process in ended), "\n".join(process.stderr for process in ended)
