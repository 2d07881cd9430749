"""Processes, micro-batches and cached gradients change memory and speed only: losses and gradients stay, to 1e-5."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from search_r3.data.collection import Collection
from search_r3.files import hash_file
from tests.distributed import train

TOLERANCE = 1e-5
LAYER = "model.layers.0.self_attn"
MICRO = "sft.micro_batch_size"
CHOSEN = [
    "grpo.baseline=direct", "grpo.redraws=2", "grpo.curriculum=2", "grpo.reward.contrastive=0.5",
    "grpo.embedding_loss_on=winners", "grpo.direct_loss_weight=0.2", "grpo.embedding_depth=5",
    "grpo.refresh.policy=shortlist",
]  # fmt: skip
VARIANTS: dict[str, tuple[str, list[str]]] = {
    "sft-whole": ("sft", []),
    "sft-1": ("sft", [f"{MICRO}=1"]),
    "sft-3": ("sft", [f"{MICRO}=3"]),
    "sft-tokens": ("sft", ["sft.micro_batch_tokens=200"]),
    "sft-3-recomputed": ("sft", [f"{MICRO}=3", "gradient_checkpointing=true"]),
    "sft-adapters-whole": ("sft", ["lora.rank=4"]),
    "sft-adapters-2": ("sft", ["lora.rank=4", f"{MICRO}=2"]),
    "grpo-whole": ("grpo", []),
    "grpo-1": ("grpo", ["grpo.micro_batch_size=1", "grpo.rollout_batch_size=4"]),
    "grpo-4": ("grpo", ["grpo.micro_batch_size=4"]),
    "grpo-tokens": ("grpo", ["grpo.micro_batch_tokens=300"]),
    "grpo-chosen-whole": ("grpo", CHOSEN),
    "grpo-chosen-2": ("grpo", [*CHOSEN, "grpo.micro_batch_size=2"]),
}
TOGETHER = ("sft-whole", "sft-3", "sft-tokens", "sft-adapters-2", "grpo-whole", "grpo-tokens", "grpo-chosen-2")
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "Qwen2DecoderLayer", "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}  # fmt: skip
SHARDED = ("sft-whole", "sft-3-recomputed", "sft-adapters-2", "grpo-tokens", "grpo-chosen-2")


def launch(out: Path, trainings: dict[str, Any], collection: Path, *, world_size: int = 2, **environment: str) -> None:
    """Run the trainings in several processes over gloo; every process has ended when this returns."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    out.mkdir()
    given = {"out": str(out), "collection": str(collection), "trainings": trainings, "fsdp": bool(environment)}
    meeting = {"WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    common = {**os.environ, **{name: str(value) for name, value in meeting.items()}, **environment}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.distributed", json.dumps(given)],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(world_size)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), "\n".join(said)


@pytest.fixture(scope="module")
def stage_1(tmp_path_factory: pytest.TempPathFactory, tiny_path: Path, collection_path: Path) -> Path:
    """A tiny model that emits the embed token in some rollouts."""
    options = ["sft.steps=120", "sft.batch_size=4", "sft.learning_rate=1e-2", "sft.reasoning_styles={restate: 1.0}"]
    options += ["sft.evaluate_every=0", "sft.keep=last"]
    kept = train("sft", tmp_path_factory.mktemp("stage1") / "run", str(tiny_path), str(collection_path), options)
    return Path(kept["path"])


@pytest.fixture(scope="module")
def alone(
    tmp_path_factory: pytest.TempPathFactory, tiny_path: Path, stage_1: Path, collection_path: Path
) -> dict[str, dict[str, Any]]:
    """Every variant in this process."""
    folder = tmp_path_factory.mktemp("alone")
    bases = {"sft": str(tiny_path), "grpo": str(stage_1)}
    return {
        name: train(stage, folder / name, bases[stage], str(collection_path), options)
        for name, (stage, options) in VARIANTS.items()
    }


def check_same(found: dict[str, Any], expected: dict[str, Any], steps: int = 2) -> None:
    """Gradients of every step relative to the largest of that step; all metrics but times."""
    assert len(found["gradients"]) == len(expected["gradients"]) == steps
    for one, two in zip(found["gradients"], expected["gradients"], strict=True):
        assert one.keys() == two.keys()
        largest = max(gradient.abs().max().item() for gradient in two.values())
        assert largest > 1e-3
        for name, gradient in two.items():
            assert (one[name] - gradient).abs().max().item() <= TOLERANCE * largest, name
    if found["metrics"]:
        for one, two in zip(found["metrics"], expected["metrics"], strict=True):
            timeless = {name: value for name, value in two.items() if "second" not in name and name != "stage"}
            assert timeless == pytest.approx({name: one[name] for name in timeless}, abs=TOLERANCE, rel=TOLERANCE)


@pytest.mark.parametrize("name", [name for name in VARIANTS if not name.endswith("whole")])
def test_micro_batches_give_the_gradients_of_the_whole_batch(alone: dict[str, dict[str, Any]], name: str) -> None:
    whole = alone[f"{name.rpartition('-')[0].removesuffix('-3')}-whole"]
    check_same(alone[name], whole)
    assert {"cross_entropy", "kl_to_base", "info_nce", "triplet"} <= set(alone["sft-3"]["metrics"][0])


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_give_the_gradients_of_one(
    tmp_path: Path, alone: dict[str, dict[str, Any]], tiny_path: Path, stage_1: Path, collection_path: Path, kind: str
) -> None:
    names = TOGETHER if kind == "ddp" else SHARDED
    bases = {"sft": str(tiny_path), "grpo": str(stage_1)}
    trainings = {name: (VARIANTS[name][0], bases[VARIANTS[name][0]], VARIANTS[name][1]) for name in names}
    launch(tmp_path / kind, trainings, collection_path, **(FSDP2 if kind == "fsdp2" else {}))
    for name in names:
        for rank in range(2):
            check_same(torch.load(tmp_path / kind / f"{name}-{rank}.pt"), alone[name])
        saved, expected = (load_file(Path(path) / "model.safetensors") for path in (
            torch.load(tmp_path / kind / f"{name}-0.pt")["path"], alone[name]["path"],
        ))  # fmt: skip
        assert saved.keys() == expected.keys(), "whole weights under the usual names"
        assert all(torch.allclose(saved[key], expected[key], atol=1e-6, rtol=0) for key in expected)
        before, moved = load_file(Path(bases[VARIANTS[name][0]]) / "model.safetensors"), f"{LAYER}.q_proj.weight"
        assert (saved[moved] - before[moved]).abs().max() > 2e-5, "an optimizer that never stepped would pass as well"


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_a_process_whose_queries_have_no_trace_takes_part_in_all_that_the_others_compute(
    tmp_path: Path, collection: Collection, tiny_path: Path, kind: str
) -> None:
    traced = list(collection.split("train"))[:3]  # of 20, so that most batches of 7 leave one process without
    bare = {one: query if one in traced else replace(query, metadata={}) for one, query in collection.queries.items()}
    replace(collection, queries=bare).save(tmp_path / "bare")
    options = ["sft.untraced=direct", "sft.evaluate_every=0", "sft.keep=last"]
    variants = {"whole": options, "adapters-whole": [*options, "lora.rank=4"]}
    check_together(tmp_path, kind, variants, tiny_path, tmp_path / "bare")


def test_frozen_documents_are_shared_in_the_making_and_the_same_for_all(
    tmp_path: Path, stage_1: Path, collection_path: Path
) -> None:
    options = ["sft.documents=frozen", "sft.latent_steps=2", "sft.evaluate_every=0", "sft.keep=last"]
    variants = {"frozen": options, "frozen-chunks": [*options, "lora.rank=4", f"{MICRO}=2"]}
    check_together(tmp_path, "ddp", variants, stage_1, collection_path)


def test_a_process_whose_chunk_supervises_nothing_asks_the_reference_too(
    tmp_path: Path, tiny_path: Path, collection_path: Path
) -> None:
    options = ["sft.swapped_traces=0.5", "sft.batch_size=4", "lora.rank=4", f"{MICRO}=1", "sft.steps=4"]
    variants = {"swapped": [*options, "sft.evaluate_every=0", "sft.keep=last"]}
    check_together(tmp_path, "fsdp2", variants, tiny_path, collection_path, steps=4)


def check_together(
    folder: Path, kind: str, variants: dict[str, list[str]], base: Path, collection: Path, steps: int = 2
) -> None:
    """Two processes do the same in stage 1 as one."""
    trainings = {name: ("sft", str(base), options) for name, options in variants.items()}
    launch(folder / kind, trainings, collection, **(FSDP2 if kind == "fsdp2" else {}))
    for name, options in variants.items():
        expected = train("sft", folder / name, str(base), str(collection), options)
        for rank in range(2):
            check_same(torch.load(folder / kind / f"{name}-{rank}.pt"), expected, steps)


def test_shards_that_compute_in_bfloat16_give_losses_in_float32(
    tmp_path: Path, alone: dict[str, dict[str, Any]], tiny_path: Path, collection_path: Path
) -> None:
    options = [f"{MICRO}=3", "mixed_precision=bf16"]
    launch(tmp_path / "bf16", {"sft": ("sft", str(tiny_path), options)}, collection_path, **FSDP2)
    found, expected = torch.load(tmp_path / "bf16" / "sft-0.pt")["metrics"], alone["sft-3"]["metrics"]
    for one, two in zip(found, expected, strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-2)
    assert 0 <= found[0]["kl_to_base"] < 2e-4, "of equal models; rounded to bfloat16 it is below 0"
    assert found[0]["loss"] != expected[0]["loss"], "bfloat16 was used"
    weights = load_file(Path(torch.load(tmp_path / "bf16" / "sft-0.pt")["path"]) / "model.safetensors")
    assert all(value.dtype == torch.float32 for value in weights.values())


def test_shards_of_a_query_side_are_written_whole(tmp_path: Path, stage_1: Path, collection_path: Path) -> None:
    variants = {"full": ["grpo.documents=frozen"], "adapters": ["grpo.documents=frozen", "lora.rank=4"]}
    trainings = {name: ("grpo", str(stage_1), options) for name, options in variants.items()}
    launch(tmp_path / "shards", trainings, collection_path, **FSDP2)
    for name, options in variants.items():
        expected = train("grpo", tmp_path / name, str(stage_1), str(collection_path), options)
        found = torch.load(tmp_path / "shards" / f"{name}-0.pt")
        check_same(found, expected)
        folders = [Path(kept["path"]) for kept in (found, expected)]
        one, two = ({path.name: path for path in (folder / "queries").glob("*.safetensors")} for folder in folders)
        assert one.keys() == two.keys()
        for file in one:
            saved, whole = load_file(one[file]), load_file(two[file])
            assert saved.keys() == whole.keys()
            assert all(torch.allclose(saved[key], whole[key], atol=1e-6, rtol=0) for key in whole)
        assert hash_file(folders[0] / "model.safetensors") == hash_file(stage_1 / "model.safetensors")


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_soft_tokens_and_a_distillation_are_the_same_in_two_processes(
    tmp_path: Path, tiny_path: Path, stage_1: Path, collection_path: Path, kind: str
) -> None:
    latent = ["sft.latent_steps=2", "sft.evaluate_every=0", "sft.keep=last"]
    trainings = {
        "latent": ("sft", str(tiny_path), latent),
        "cached": ("sft", str(tiny_path), [*latent, f"{MICRO}=3"]),
        "gircse": ("sft", str(tiny_path), [*latent, f"{MICRO}=3", "sft.latent_objective=gircse"]),
        "laser": ("sft", str(tiny_path), [*latent, "sft.latent_objective=laser"]),
        "distill": ("distill", str(stage_1), ["distill.micro_batch_size=2"]),
        "bare": ("distill", str(stage_1), ["distill.target=vector", "distill.hold_weight=0", "distill.samples=2"]),
    }
    launch(tmp_path / kind, trainings, collection_path, **(FSDP2 if kind == "fsdp2" else {}))
    for name, (stage, base, options) in trainings.items():
        expected = train(stage, tmp_path / name, base, str(collection_path), options)
        for rank in range(2):
            check_same(torch.load(tmp_path / kind / f"{name}-{rank}.pt"), expected)
