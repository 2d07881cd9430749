"""A GRPO step: its rollouts beside transformers' `generate`, and the whole of it beside TRL's GRPOTrainer.

    pip install search-r3[benchmarks]
    python benchmarks/rollouts.py                   # half an hour on two cores
    python benchmarks/rollouts.py --shape 12x768 --micro-batch 16 --out runs/rollouts.json
    python benchmarks/rollouts.py --quick           # within a minute

Rollouts: 16 prompts x 8 replies, sampled at temperature 1, and their vectors. The peer samples with `generate` in fixed
batches (it tries all of --batch-sizes and keeps its best) and embeds with a second forward pass.

Step: `collect` and `update`, as `search-r3 grpo` calls them, beside GRPOTrainer with the reward in a callback: a second
forward pass embeds prompt and reply, and the vector is ranked in the same index of document vectors, encoded beforehand
on both sides. Same random Qwen2, same queries, same reward (nDCG of the whole ranking), same micro-batch, float32, one
pass over each batch, no KL term, no gradient checkpointing. After a warm-up step the sides alternate.

Replies end where a seeded list says, the same on both sides: random weights would end nearly none. In TRL, which ends a
reply at a token of its list, a logits processor then leaves the embed token as the only choice; ours forces it at the
end of the budget. Both train on it.

The ratios are steps (or batches of rollouts) per second, ours by the peer's. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from common import (
    GenerateThenEmbed,
    Shape,
    add_arguments,
    alternating,
    atlas_texts,
    check_vectors,
    fastest,
    finish,
    machine,
    make_model,
    need,
    never_ending,
    prepare,
    ratio_of_medians,
    reasoning_lengths,
    say,
    versions,
)

CONTEXT = 1024


class Parts:
    """Seconds that named parts of the current step took."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, which adds its seconds to a part."""

        def call(*arguments: Any, **options: Any) -> Any:
            started = time.perf_counter()
            found = function(*arguments, **options)
            self.steps[-1][name] = self.steps[-1].get(name, 0.0) + time.perf_counter() - started
            return found

        return call

    def begin(self) -> None:
        """Start a step."""
        self.steps.append({})
        self.started = time.perf_counter()

    def end(self, rest: str) -> None:
        """End the step; what no part took is the rest."""
        total = time.perf_counter() - self.started
        self.steps[-1] |= {rest: total - sum(self.steps[-1].values()), "total": total}

    def medians(self) -> dict[str, float]:
        """Over all steps but the first, which warms up."""
        return {name: median(step[name] for step in self.steps[1:]) for name in self.steps[-1]}


def schedule(options: argparse.Namespace) -> Iterator[list[int]]:
    """The lengths of each step's replies."""
    step = 0
    while True:
        yield reasoning_lengths(options.prompts * options.group_size, f"{options.seed}/{step}", options.longest)
        step += 1


def load(options: argparse.Namespace, folder: Path) -> tuple[Any, Any]:
    """Our model, as training loads it, and the recipe of the step."""
    from search_r3.config import load_recipe
    from search_r3.training.engine import load_model

    texts = atlas_texts()
    make_model(folder, texts[:3000] if options.quick else texts, options.shape, options.vocabulary, CONTEXT)
    settings = {
        "collection": "atlas",
        "seed": options.seed,
        "max_length": 128,
        "max_new_tokens": options.longest + 1,
        "grpo.steps": 10_000,
        "grpo.warmup_steps": 0,
        "grpo.learning_rate": options.learning_rate,
        "grpo.queries_per_step": options.prompts,
        "grpo.group_size": options.group_size,
        "grpo.micro_batch_size": options.micro_batch,
        "grpo.sampling_temperature": 1.0,
        "grpo.advantage_scale": "group",
        "grpo.refresh.policy": "never",
        "grpo.reward_k": 1000,  # all of atlas: a random model finds nothing among ten, and equal rewards teach nothing
        "grpo.reward.log_rank": 0,
        "grpo.reward.format": 0,
    }
    recipe = load_recipe(None, [f"{key}={value}" for key, value in settings.items()])
    model = load_model(recipe, folder)
    never_ending(model.backbone)
    return model, recipe


def peer_of(backbone: Any, model: Any) -> GenerateThenEmbed:
    return GenerateThenEmbed(model, backbone.tokenizer.pad_token_id, backbone.embed_token_id, 1.0)


def measure_rollouts(options: argparse.Namespace, model: Any, recipe: Any) -> dict[str, Any]:
    """The rollout part of a step on both sides."""
    from search_r3.data.load import load_collection
    from search_r3.training.rl.rollouts import queries_of_step

    collection = load_collection("atlas")
    query_ids = queries_of_step(sorted(collection.split("rl")), options.prompts, options.seed, 0)
    encode = model.backbone.prompt_encoder.encode
    prompts = [encode(collection.queries[query_id].text, "reason").ids for query_id in query_ids]
    prompts = [prompt for prompt in prompts for _ in range(options.group_size)]
    lengths = next(schedule(options))
    peer = peer_of(model.backbone, model.backbone.model)

    def ours() -> Any:
        return model.rollouts(
            prompts,
            max_new_tokens=[length + 1 for length in lengths],
            sampling_temperature=1.0,
            seeds=range(len(prompts)),
            batch_size=len(prompts),
        )

    rollouts = ours()
    assert [rollout.reasoning_tokens for rollout in rollouts] == lengths
    replies = [[*rollout.prompt_ids, *rollout.completion_ids] for rollout in rollouts]
    worst = check_vectors(np.stack([rollout.vector.numpy() for rollout in rollouts]), peer.embed(replies, 32))
    best, tried = fastest(lambda size: peer(prompts, lengths, size), options.batch_sizes)
    spent = alternating({"ours": ours, "peer": lambda: peer(prompts, lengths, best)}, options.runs)
    return {
        "ratio": ratio_of_medians(spent["ours"], spent["peer"]),
        "tokens_per_second": {name: sum(lengths) / median(values) for name, values in spent.items()},
        "seconds": spent,
        "peer_batch_size": best,
        "peer_seconds_by_batch_size": tried,
        "largest_difference": worst,
        "reasoning_tokens": {"mean": float(np.mean(lengths)), "max": max(lengths)},
    }


def our_step(
    options: argparse.Namespace, model: Any, recipe: Any, environment: Any
) -> tuple[Callable[..., Any], Parts]:
    """The step of `train_grpo`, by its number, and what its parts took."""
    from search_r3.training.engine import make_engine
    from search_r3.training.grpo import update
    from search_r3.training.rl.rollouts import collect

    parts, lengths, decode = Parts(), schedule(options), model.rollouts
    engine = make_engine(model, recipe, recipe.grpo)

    def rollouts(prompts: Sequence[Sequence[int]], **given: Any) -> Any:
        given["max_new_tokens"] = [length + 1 for length in next(lengths)]
        # As if the model had chosen the embed token: the peer trains on the token that ends a reply, and so do we.
        return [replace(found, completion_mask=[1] * len(found.completion_ids)) for found in decode(prompts, **given)]

    model.rollouts = parts.timed("rollouts", rollouts)
    environment.feedback = parts.timed("environment", environment.feedback)

    def step(number: int) -> None:
        parts.begin()
        experience = collect(model, environment, recipe, number, engine)
        values = update(model, engine, environment, experience, recipe.grpo)
        parts.end("update")
        say(f"step {number}: ours {parts.steps[-1]}, gradient norm {values['grad_norm']:.3f}")

    return step, parts


class EmbedAtEnd:
    """A logits processor that leaves a row nothing but the embed token once its reasoning is as long as it shall be."""

    def __init__(self, lengths: Sequence[int], prompt_width: int, embed_id: int) -> None:
        import torch

        self.ends, self.embed_id = torch.tensor(lengths) + prompt_width, embed_id

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """The scores, changed in place."""
        rows = (self.ends == input_ids.shape[1]).nonzero()[:, 0]
        if len(rows):
            scores[rows] = -float("inf")
            scores[rows, self.embed_id] = 0.0
        return scores


class TheirReward:
    """nDCG of each reply's vector, from a second forward pass, in the index of the documents' vectors."""

    __name__ = "ndcg"

    def __init__(self, backbone: Any, environment: Any, model: Any, batch_size: int) -> None:
        from search_r3.retrieval.index import ExactIndex

        doc_ids = list(environment.index.doc_ids)
        self.index = ExactIndex(doc_ids, environment.index.vectors_at(environment.index.rows_of(doc_ids)))
        self.environment, self.batch_size, self.peer = environment, batch_size, peer_of(backbone, model)
        queries = environment.collection.queries
        encode = backbone.prompt_encoder.encode
        self.prompts = {query_id: encode(queries[query_id].text, "reason").ids for query_id in environment.qrels}
        self.lengths: list[int] = []
        self.mean = 0.0

    def __call__(self, completion_ids: list[list[int]], query_id: list[str], **_: Any) -> list[float]:
        """As GRPOTrainer asks for it."""
        from search_r3.retrieval.metrics import ndcg
        from search_r3.retrieval.ranking import make_requests, ranked

        assert [len(ids) for ids in completion_ids] == [length + 1 for length in self.lengths]
        sequences = [[*self.prompts[name], *ids] for name, ids in zip(query_id, completion_ids, strict=True)]
        vectors = self.peer.embed(sequences, self.batch_size)
        qrels = {name: self.environment.qrels[name] for name in query_id}
        request_of = {one.query_id: one for one in make_requests(self.environment.collection, qrels)}
        depth = self.environment.k
        rankings = ranked(self.index, vectors, [request_of[name] for name in query_id], depth)
        rewards = [
            ndcg([doc_id for doc_id, _ in ranking], qrels[name], depth)
            for ranking, name in zip(rankings, query_id, strict=True)
        ]
        self.mean = float(np.mean(rewards))
        return rewards


def their_trainer(
    options: argparse.Namespace, backbone: Any, recipe: Any, environment: Any, folder: Path
) -> tuple[Any, Parts]:
    """GRPOTrainer for the same steps."""
    from trl import GRPOConfig, GRPOTrainer

    model, parts = copy.deepcopy(backbone.model).float(), Parts()
    embed_id = backbone.embed_token_id
    model.generation_config.eos_token_id = [embed_id, backbone.tokenizer.eos_token_id]
    reward = TheirReward(backbone, environment, model, options.micro_batch)
    lengths, generate = schedule(options), model.generate

    def generate_to_length(**given: Any) -> Any:
        reward.lengths, width = next(lengths), given["input_ids"].shape[1]
        return generate(**given, logits_processor=[EmbedAtEnd(reward.lengths, width, embed_id)])

    model.generate = parts.timed("rollouts", generate_to_length)
    rollouts = options.prompts * options.group_size
    config = GRPOConfig(
        output_dir=str(folder),
        seed=options.seed,
        max_steps=options.runs + 1,
        learning_rate=options.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=recipe.grpo.max_grad_norm,
        per_device_train_batch_size=options.micro_batch,
        gradient_accumulation_steps=rollouts // options.micro_batch,
        num_generations=options.group_size,
        max_completion_length=options.longest + 1,
        temperature=1.0,
        beta=0.0,
        num_iterations=1,
        epsilon=recipe.grpo.clip_epsilon,
        scale_rewards="group",
        shuffle_dataset=False,
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        report_to="none",
        logging_strategy="no",
        save_strategy="no",
    )
    timed = parts.timed("environment", reward)
    timed.__name__ = reward.__name__
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=timed,
        args=config,
        train_dataset=their_queries(options, backbone, environment),
        processing_class=copy.deepcopy(backbone.tokenizer),
    )
    trainer.their_reward = reward
    return trainer, parts


def their_queries(options: argparse.Namespace, backbone: Any, environment: Any) -> Any:
    """The queries of all steps in our order, as chat messages; both sides' prompt ids must be the same."""
    from datasets import Dataset

    from search_r3.training.rl.rollouts import queries_of_step

    encoder, rows = backbone.prompt_encoder, []
    for step in range(options.runs + 1):
        for query_id in queries_of_step(sorted(environment.qrels), options.prompts, options.seed, step):
            text = environment.collection.queries[query_id].text
            messages = [
                {"role": "system", "content": backbone.settings.prompts.reason_system},
                {"role": "user", "content": text},
            ]
            ids = backbone.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
            assert ids["input_ids"] == encoder.encode(text, "reason").ids
            rows.append({"prompt": messages, "query_id": query_id})
    return Dataset.from_list(rows)


def alternate_steps(trainer: Any, theirs: Parts, step: Callable[[int], None]) -> None:
    """Let TRL train; after each of its steps ours takes one."""
    from transformers import PrinterCallback, TrainerCallback

    class Alternate(TrainerCallback):
        """Clocks TRL's step and then runs ours."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            """TRL is about to generate."""
            theirs.begin()

        def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
            """TRL has updated its weights."""
            theirs.end("update")
            number = state.global_step - 1
            say(f"step {number}: TRL {theirs.steps[-1]}, mean reward {trainer.their_reward.mean:.3f}")
            step(number)

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Alternate())
    trainer.train()


def measure_steps(options: argparse.Namespace, model: Any, recipe: Any, folder: Path) -> dict[str, Any]:
    """Whole steps on both sides, in turn."""
    from search_r3.data.load import load_collection
    from search_r3.environment.environment import RetrievalEnvironment

    collection = load_collection("atlas")
    environment = RetrievalEnvironment(
        collection,
        collection.split("rl"),
        model,
        recipe.grpo.refresh,
        recipe.grpo.reward,
        k=recipe.grpo.reward_k,
        max_new_tokens=recipe.max_new_tokens,
        seed=recipe.seed,
    )
    trainer, theirs = their_trainer(options, model.backbone, recipe, environment, folder)
    step, ours = our_step(options, model, recipe, environment)
    alternate_steps(trainer, theirs, step)
    spent = {name: [step["total"] for step in parts.steps[1:]] for name, parts in (("ours", ours), ("peer", theirs))}
    return {
        "ratio": ratio_of_medians(spent["ours"], spent["peer"]),
        "seconds": spent,
        "parts": {"ours": ours.medians(), "peer": theirs.medians()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, runs=5)
    parser.add_argument("--prompts", type=int, default=16, help="queries per step")
    parser.add_argument("--group-size", type=int, default=8, help="replies per query")
    parser.add_argument("--longest", type=int, default=300, help="reasoning tokens at most")
    parser.add_argument("--micro-batch", type=int, default=32, help="replies per forward and backward pass")
    parser.add_argument("--learning-rate", type=float, default=1e-6)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[16, 32, 64, 128], help="the peer's choice")
    options = parser.parse_args()
    if options.quick:
        options.shape, options.vocabulary, options.prompts, options.group_size = Shape(2, 128), 2048, 8, 4
        options.longest, options.batch_sizes, options.runs = 120, [16, 32], min(options.runs, 2)
        options.micro_batch = min(options.micro_batch, 16)
    if options.prompts * options.group_size % options.micro_batch:
        parser.error("--micro-batch must divide the number of replies, prompts x group size")
    need("torch", "transformers", "datasets", "trl")
    prepare(options)
    with tempfile.TemporaryDirectory() as scratch:
        model, recipe = load(options, Path(scratch) / "model")
        rollouts = measure_rollouts(options, model, recipe)
        say(f"rollouts: {rollouts['ratio']:.2f} times the peer's speed")
        steps = measure_steps(options, model, recipe, Path(scratch) / "trl")
        say(f"steps: {steps['ratio']:.2f} times TRL's speed")
    settings = {key: value for key, value in vars(options).items() if key not in ("out", "shape")}
    record = {"benchmark": "rollouts", "peer": "TRL GRPOTrainer", "ratio": steps["ratio"]}
    record |= {"unit": "GRPO steps/s, ours / peer", "runs": options.runs, "steps": steps}
    record |= {"rollouts": {"peer": "transformers generate, then a second forward pass", **rollouts}}
    record |= {"settings": {**settings, "shape": str(options.shape), **versions("torch", "transformers", "trl")}}
    finish({**record, "machine": machine()}, options.out)


if __name__ == "__main__":
    main()
