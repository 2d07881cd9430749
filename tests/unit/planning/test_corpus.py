"""What the corpus costs in a plan, against sums by hand, and against Python's own memory."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest

from search_r3.config import GRPOSettings, Recipe, RefreshSettings, SFTSettings
from search_r3.data.collection import Document
from search_r3.planning.corpus import DOCUMENT_BYTES, TEXT_BYTES, Corpus, Rates
from search_r3.planning.footprint import Job, Lengths
from search_r3.planning.plan import Speed, Work, plan
from search_r3.planning.shape import SHAPES
from search_r3.retrieval.index import ExactIndex

BASE = "Qwen/Qwen2.5-1.5B-Instruct"
WIDTH, DOCUMENTS, TOKENS = 1_536, 10_000, 100
LENGTHS = Lengths(query=20, document=TOKENS, reasoning=50, template=0)
RATES = Rates(index_tflops=0.002, tokens_per_second=1_000.0, threads=2)
ONE = 2 * DOCUMENTS * WIDTH
"""FLOP of one query's scores."""


def corpus(gpus: int = 4, stage: Any = "grpo", sft: SFTSettings | None = None, **settings: Any) -> Corpus:
    section = {"queries_per_step": 8, "group_size": 4, "evaluate_every": 10, "refresh": RefreshSettings(), **settings}
    recipe = Recipe(base=BASE, max_length=512, grpo=GRPOSettings(**section), sft=sft or SFTSettings())
    job = Job(recipe, SHAPES[BASE], stage, gpus, "ddp" if gpus > 1 else "single", DOCUMENTS, LENGTHS.within(recipe))
    return Corpus(job)


def test_memory_of_the_machine_and_of_the_index_by_hand() -> None:
    moving = corpus()
    assert moving.host()["processes"] == 4 * 2_000_000_000
    assert moving.host()["texts"] == 4 * DOCUMENTS * (100 * 5 + 420)
    assert moving.host()["index"] == 4 * 8 * DOCUMENTS
    assert moving.job.resident()["index"] == DOCUMENTS // 4 * WIDTH * 4, "each GPU holds its share"
    assert "evaluated index" not in moving.host(), "the live index is evaluated"
    never = corpus(refresh=RefreshSettings(policy="never", dtype="float16"))
    assert never.host()["evaluated index"] == DOCUMENTS * WIDTH * 4
    assert never.job.resident()["index"] == DOCUMENTS // 4 * WIDTH * 2
    assert "evaluated index" not in corpus(refresh=RefreshSettings(policy="never"), evaluate_every=0).host()
    selective = corpus(refresh=RefreshSettings(policy="selective", neighbours=6))
    assert selective.host()["index"] == 4 * DOCUMENTS * (8 + 6 * 8)
    assert selective.job.resident()["index"] == DOCUMENTS * WIDTH * 4, "its graph reads from everywhere"
    drift = corpus(refresh=RefreshSettings(policy="shortlist", correct_drift=True))
    assert drift.job.resident()["index"] == DOCUMENTS * WIDTH * 4
    frozen = corpus(documents="frozen", refresh=RefreshSettings(policy="selective"))
    assert frozen.host()["index"] == 4 * 8 * DOCUMENTS, "no graph where nothing moves"
    assert frozen.job.resident()["index"] == DOCUMENTS // 4 * WIDTH * 4
    sketched = corpus(refresh=RefreshSettings(policy="shortlist", dtype="bfloat16", index="approximate"))
    assert sketched.job.resident()["index"] == DOCUMENTS // 4 * WIDTH * 3, "16 bits, and for half of them 16 more"
    assert set(corpus(stage="sft").host()) == {"processes", "texts"}
    assert "index" not in corpus(stage="sft").job.resident()
    looked_up = corpus(stage="sft", sft=SFTSettings(documents="frozen", evaluate_every=10))
    assert looked_up.host().keys() == {"processes", "texts", "index"}, "what is looked up is evaluated, too"
    assert looked_up.host()["index"] == 4 * DOCUMENTS * WIDTH * 4
    assert looked_up.job.training()["activations"] < corpus(stage="sft").job.training()["activations"]
    assert looked_up.job.phases()["documents"].keys() == {"weights", "buckets", "activations"}, "no moments yet"
    assert "documents" not in corpus(stage="sft").job.phases()
    assert corpus(gpus=1).job.resident()["index"] == DOCUMENTS * WIDTH * 4
    assert corpus(gpus=3).job.resident()["index"] == 3_334 * WIDTH * 4, "the largest share"


def test_searches_of_a_step_by_hand() -> None:
    shortlist = RefreshSettings(policy="shortlist")
    own, everyone = 2 * 4, 8 * 4  # rollouts
    assert corpus(refresh=shortlist).searches(50) == {"reward": everyone * ONE / 4}, "of all, in a quarter of them"
    assert corpus(gpus=1, refresh=shortlist).searches(50) == {"reward": everyone * ONE}
    selective = corpus(refresh=RefreshSettings(policy="selective")).searches(50)
    assert selective == {"reward": own * ONE, "choice": everyone * ONE, "graph": 50 * ONE}
    direct = corpus(baseline="direct", curriculum=3).searches(50)
    assert direct == {"reward": (everyone + 8 + 3 * 8) * ONE / 4}, "direct replies, of those that are looked at too"
    sketches = RefreshSettings(policy="shortlist", index="approximate")
    assert corpus(refresh=sketches).searches(50) == {"reward": everyone * ONE / 4 / 2}, "half of the coordinates"
    assert corpus(stage="sft").searches(50) == {}


def test_seconds_of_a_step_and_of_the_beginning_by_hand() -> None:
    selective = corpus(refresh=RefreshSettings(policy="selective"))
    found = selective.step_seconds(50, 7.0, RATES)
    assert found["search"] == pytest.approx((8 + 32 + 50) * ONE / 2e9)
    assert found["tokenizing"] == pytest.approx(50 / 4 * TOKENS / 2_000)
    assert found["evaluation"] == pytest.approx((7.0 + DOCUMENTS / 4 * TOKENS / 2_000) / 10)
    assert set(corpus(documents="frozen").step_seconds(0, 7.0, RATES)) == {"search"}
    start = selective.start_seconds(7.0, RATES)
    assert start["encoding"] == 7.0
    assert start["tokenizing"] == pytest.approx(DOCUMENTS / 4 * TOKENS / 2_000)
    assert start["graph"] == pytest.approx(DOCUMENTS * ONE / 2e9)
    assert "graph" not in corpus().start_seconds(7.0, RATES)
    assert corpus(stage="sft").start_seconds(7.0, RATES) == {}
    looked_up = corpus(stage="sft", sft=SFTSettings(documents="frozen"))
    assert looked_up.start_seconds(7.0, RATES).keys() == {"encoding", "tokenizing"}
    assert looked_up.step_seconds(0, 7.0, RATES) == {}
    assert Work(looked_up.job).kinds().keys() == {"direct", "reasoned"} and Work(looked_up.job).refreshed() == 0


def test_a_plan_adds_up_its_parts() -> None:
    recipe = corpus(refresh=RefreshSettings(policy="shortlist")).job.recipe
    speed = Speed(tokens_per_second=1_000.0, decoded_per_second=500.0, rates=RATES)
    found = plan(recipe, "grpo", gpus=4, strategy="ddp", documents=DOCUMENTS, lengths=LENGTHS, speed=speed)
    assert found.seconds["rollouts"] == pytest.approx(8 * 4 * 50 / 500)
    assert set(found.seconds) == {"rollouts", "model", "search", "tokenizing", "evaluation"}
    assert found.step_seconds == pytest.approx(sum(found.seconds.values()))
    # Encoding has a third of a trained token's work.
    assert found.start_seconds["encoding"] == pytest.approx(DOCUMENTS * TOKENS / 3_000, rel=0.01)
    once = sum(found.start_seconds.values())
    assert found.stage_seconds == pytest.approx(60 * found.step_seconds + once)
    assert [line.partition(":")[0] for line in found.time_lines()] == ["time", "before the first step"]
    assert found.context == 1_000_000_000
    one = plan(recipe, "grpo", gpus=1, documents=DOCUMENTS, lengths=LENGTHS)
    assert one.context == 500_000_000
    smallest = (one.peak + one.context) / 0.9
    assert one.fits(1.001 * smallest) and not one.fits(0.999 * smallest)
    whole = one.host["loading"] + sum(corpus(gpus=1, refresh=RefreshSettings(policy="shortlist")).host().values())
    assert sum(one.host.values()) == whole


def test_the_bytes_of_a_document_are_those_that_python_takes() -> None:
    count = 2_000
    words = "lorem ipsum dolor sit amet consectetur adipiscing elit sed do "
    tracemalloc.start()
    try:
        documents = {
            f"document-{i:06d}": Document(f"document-{i:06d}", f"{words * 8}{i}", f"title {i}") for i in range(count)
        }
        index = ExactIndex(list(documents), np.ones((count, 2), np.float32))
        taken = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert len(index) == count
    text = sum(len(one.text) + len(one.title) for one in documents.values())
    assert (taken - text) / count == pytest.approx(DOCUMENT_BYTES, rel=0.2)
    assert 4 <= TEXT_BYTES <= 5
