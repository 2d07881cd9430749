"""Peak memory of the output layer and of the losses on it, at the vocabulary of Qwen2.5: by chunks, and all at once.

    python benchmarks/head_memory.py --out head_memory.json
    python benchmarks/head_memory.py --quick

Both sides compute the same loss of the same states, forward and backward: ours is what training asks its policy for,
the peer takes the logits of all positions. `peak_bytes` is what torch allocates meanwhile (on a CPU by its profiler),
gradients included; weights and states are there before. The head learns or, as with adapters, only passes gradients
on. `ratio` is ours over the peer's, `error` the largest difference of a value or of a gradient, over the largest of
the peer's.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import Shape, add_arguments, atlas_texts, finish, machine, make_model, prepare, say, versions

KINDS = ("cross_entropy", "logprobs", "kl")


def peak_allocated(work: Callable[[], Any]) -> int:
    """Bytes that some work allocates at its peak, over what is there before."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    gc.collect()
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    assert found.profiler is not None
    events = [one for one in found.profiler.kineto_results.events() if one.name() == "[memory]"]
    changes = sorted((event.start_ns(), event.nbytes()) for event in events)
    return max(itertools.accumulate(size for _, size in changes))


def sides(policy: Any, states: Any, reference: Any, targets: Any, kind: str) -> dict[str, Callable[[], Any]]:
    """What gives the loss, ours and the peer's."""
    import torch
    from torch.nn import functional

    from search_r3.training.policy import Tokens

    backbone, ids = policy.backbone, targets[None]
    places = torch.ones_like(ids, dtype=torch.bool)

    def ours() -> Any:
        if kind == "kl":
            return policy(ids, places, kl=(places, reference)).kl.mean()
        return -policy(ids, places, tokens=Tokens(places, targets)).logprobs.mean()

    def peer() -> Any:
        logits = backbone.logits(states)
        if kind == "cross_entropy":
            return functional.cross_entropy(logits, targets)
        if kind == "logprobs":
            return -torch.log_softmax(logits / 1.0, dim=-1).gather(-1, targets[:, None]).mean()
        with torch.no_grad():
            others = backbone.logits(reference)
        base, own = torch.log_softmax(others, dim=-1), torch.log_softmax(logits, dim=-1)
        return (base.exp() * (base - own)).sum(-1).mean()

    return {"ours": ours, "peer": peer}


def measure(policy: Any, positions: int, kind: str, learns: bool) -> dict[str, Any]:
    """Both sides of one case."""
    import torch

    generator = torch.Generator().manual_seed(0)
    backbone = policy.backbone
    device, head = backbone.device, backbone.causal_lm.get_output_embeddings()
    head.requires_grad_(learns)
    states, reference = (torch.randn(positions, backbone.dimension, generator=generator).to(device) for _ in range(2))
    targets = torch.randint(0, policy.vocabulary, (positions,), generator=generator).to(device)
    backbone.hidden_states = lambda ids, mask: states[None]  # the head alone is measured
    learning = [states.requires_grad_(), *([head.weight] if learns else [])]
    found: dict[str, Any] = {}
    kept: dict[str, list[Any]] = {}
    for side, loss_of in sides(policy, states, reference, targets, kind).items():

        def work(loss_of: Callable[[], Any] = loss_of, side: str = side) -> None:
            loss = loss_of()
            kept[side] = [loss.detach(), *torch.autograd.grad(loss, learning)]

        started = time.perf_counter()
        found[side] = {"peak_bytes": peak_allocated(work), "seconds": time.perf_counter() - started}
    pairs = zip(kept["ours"], kept["peer"], strict=True)
    found["error"] = max(float((one - two).abs().max() / two.abs().max()) for one, two in pairs)
    found["ratio"] = found["ours"]["peak_bytes"] / found["peer"]["peak_bytes"]
    say(
        f"{kind}, head {'learns' if learns else 'frozen'}: {found['ours']['peak_bytes'] / 2**20:,.0f} of "
        f"{found['peer']['peak_bytes'] / 2**20:,.0f} MiB ({found['ratio']:.3f}), error {found['error']:.1e}"
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, runs=1)
    parser.set_defaults(shape=Shape(1, 128), vocabulary=151_936)
    parser.add_argument("--positions", type=int, default=2048, help="sampled or supervised tokens of a pass")
    options = parser.parse_args()
    if options.quick:
        options.shape, options.positions, options.vocabulary = Shape(1, 64), 1024, 50_000
    prepare(options)
    import torch

    from search_r3.model.loading import load_backbone
    from search_r3.training.policy import LOGITS_AT_A_TIME, Policy

    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = make_model(Path(name) / "model", atlas_texts()[:500], options.shape, 1024, 256, options.seed)
        backbone = load_backbone(folder, device="cuda" if torch.cuda.is_available() else "cpu")
        backbone.model.resize_token_embeddings(options.vocabulary, mean_resizing=False)
        policy = Policy(backbone)
        cases = {
            f"{kind}, {'learns' if learns else 'frozen'}": measure(policy, options.positions, kind, learns)
            for learns in (False, True)
            for kind in KINDS
        }
    record = {
        "benchmark": "head_memory",
        "peer": "the same loss of the logits of all positions",
        "unit": "peak over peak",
        "ratio": {name: case["ratio"] for name, case in cases.items()},
        "runs": 1,
        "cases": cases,
        "settings": {
            **{"positions": options.positions, "vocabulary": options.vocabulary, "hidden": options.shape.hidden},
            **{"logits_at_a_time": LOGITS_AT_A_TIME, "threads": options.threads, "quick": options.quick},
        },
        "seconds": time.perf_counter() - started,
        "machine": machine(),
        "versions": versions("torch", "transformers"),
    }
    finish(record, options.out)


if __name__ == "__main__":
    main()
