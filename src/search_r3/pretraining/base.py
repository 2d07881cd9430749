"""A small base model made from scratch: what ships as `builtin`, and what `search-r3 base` remakes.

It learns the single facts of atlas as plain sentences and as one-hop questions in chat form. Sentences are packed in
random order, so that a fact can be recalled wherever in a text it is asked for. Given texts, it learns those instead.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ..config import BaseModelSettings
from ..data.generators.atlas import (
    Atlas,
    echo_dialogue,
    fact_dialogues,
    fact_probes,
    fact_sentences,
    open_dialogues,
    question_templates,
    read_atlas,
)
from ..data.generators.atlas_text import OPEN_QUESTIONS
from ..errors import ConfigError
from ..extras import extra
from ..model.backbone import storage_state
from ..model.prompts import PROMPT_SETS
from ..training.engine import warmup_cosine
from ..training.session import Callbacks
from .texts import read_texts
from .tokenizer import END_OF_TEXT, train_tokenizer

HEAD_SIZE = 32
KEY_VALUE_HEADS = 2
ECHO_PART = 3
"""One echo dialogue for so many dialogues about facts."""
SYSTEM_MESSAGES = (None, "Answer the query.", "You know geography.", "Reply in plain sentences.", "Be brief.")
"""System messages of the dialogues (None: the template's own), so that the model does not depend on one of them."""
PROMPT_REPEATS = 200
"""How often the prompts stand in the tokenizer's training text, so that their words become single tokens."""


def train_base(
    settings: BaseModelSettings, folder: Path, seed: int, callbacks: Iterable[Any] = (), texts: Sequence[Path] = ()
) -> dict[str, float]:
    """Train tokenizer and model, write them to `folder` (float16 safetensors) and measure what the model knows.

    Args:
        settings: sizes and steps.
        folder: where the model is written; it must not exist.
        seed: of the weights and of the order of the texts.
        callbacks: as in `train_sft`; they are told `on_train_begin`, `on_step_end`, `on_log` and `on_train_end`.
        texts: files and folders of texts (see `read_texts`); by default the facts of atlas.

    Returns:
        `parameters`, `seconds` (of training), and of atlas `recall_sentence`, `recall_chat`: share of facts completed
        rightly (greedy); of texts `held_out_loss`: nats per token of the texts that were not trained on.

    Raises:
        ConfigError: the folder exists, or the sizes do not fit together.
        DataError: the texts cannot be read.
    """
    with extra("train"):
        from accelerate import Accelerator
        from accelerate.utils import set_seed

    folder = Path(folder)
    if folder.exists():
        raise ConfigError(f"{folder} exists; nothing is overwritten: remove it or choose another folder")
    started = time.perf_counter()
    corpus = read_texts(texts) if texts else None
    atlas = read_atlas()
    words = _atlas_words(atlas) if corpus is None else [*corpus.words(), *_prompt_words() * PROMPT_REPEATS]
    tokenizer = train_tokenizer(words, settings.vocab_size)
    set_seed(seed)
    accelerator = Accelerator(cpu=True)
    model = make_model(settings, tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warmup_cosine(step, 50, settings.steps, floor=0.05)
    )
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    rng = random.Random(seed)
    tokens = packed_tokens(tokenizer, atlas, rng) if corpus is None else corpus.tokens(tokenizer, rng)
    shape = settings.batch_size, settings.sequence_length
    listeners = Callbacks(callbacks, settings, "base")
    listeners.state.max_steps = settings.steps
    listeners.tell("on_train_begin")
    for step in range(settings.steps):
        ids = torch.tensor([next(tokens) for _ in range(shape[0] * shape[1])]).view(shape)
        loss = model(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        listeners.step(step + 1, {"loss": loss.item()})
        if listeners.control.should_training_stop:
            break
    listeners.tell("on_train_end")
    seconds = time.perf_counter() - started
    model = accelerator.unwrap_model(model).eval()
    _save(model, tokenizer, folder)
    measures = measure_recall(model, tokenizer) if corpus is None else corpus.measure(model, tokenizer, shape[1])
    return {
        **measures,
        "parameters": float(sum(parameter.numel() for parameter in model.parameters())),
        "seconds": seconds,
    }


def make_model(settings: BaseModelSettings, tokenizer: Any) -> Any:
    """A random Qwen2 with tied embeddings and, as Qwen's own, a few spare vocabulary rows.

    Raises:
        ConfigError: the hidden size does not divide into heads.
    """
    from transformers import Qwen2Config, Qwen2ForCausalLM

    heads = settings.hidden_size // HEAD_SIZE
    if settings.hidden_size % HEAD_SIZE or heads % KEY_VALUE_HEADS:
        raise ConfigError(
            f"base_model.hidden_size={settings.hidden_size} must be a multiple of {HEAD_SIZE * KEY_VALUE_HEADS}"
        )
    config = Qwen2Config(
        vocab_size=(len(tokenizer) // 64 + 1) * 64,
        hidden_size=settings.hidden_size,
        num_hidden_layers=settings.layers,
        intermediate_size=settings.intermediate_size,
        num_attention_heads=heads,
        num_key_value_heads=KEY_VALUE_HEADS,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen2ForCausalLM(config)


def packed_tokens(tokenizer: Any, atlas: Atlas, rng: random.Random) -> Iterator[int]:
    """An endless stream of token ids: passes over all texts, two to six facts a paragraph, dialogues in between."""

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    facts = [encode(f" {sentence}") for sentence in fact_sentences(atlas)]
    dialogues = fact_dialogues(atlas)
    while True:
        rng.shuffle(facts)
        paragraphs, start = [], 0
        while start < len(facts):
            length = rng.randint(2, 6)
            paragraphs.append([token for fact in facts[start : start + length] for token in fact])
            start += length
        echoes = [echo_dialogue(rng) for _ in range(len(dialogues) // ECHO_PART)]
        paragraphs += [
            encode(chat(tokenizer, question, answer, rng.choice(SYSTEM_MESSAGES)))
            for question, answer in dialogues + echoes + open_dialogues(atlas, rng) + open_dialogues(atlas, rng)
        ]
        rng.shuffle(paragraphs)
        for paragraph in paragraphs:
            yield tokenizer.pad_token_id
            yield from paragraph


@torch.no_grad()
def measure_recall(model: Any, tokenizer: Any) -> dict[str, float]:
    """Share of single facts that greedy decoding completes rightly, as a sentence and as an answer in a chat."""
    atlas = read_atlas()
    probes, dialogues = fact_probes(atlas), fact_dialogues(atlas)
    questions = [chat(tokenizer, question) for question, _ in dialogues]
    return {
        "recall_sentence": completed_share(
            model, tokenizer, [f"{END_OF_TEXT} {p}" for p, _ in probes], [a for _, a in probes]
        ),
        "recall_chat": completed_share(model, tokenizer, questions, [answer for _, answer in dialogues]),
    }


def completed_share(model: Any, tokenizer: Any, prompts: list[str], answers: list[str]) -> float:
    """Share of prompts that greedy decoding continues with the wanted answer."""
    tokenizer.padding_side = "left"
    right = 0
    for start in range(0, len(prompts), 256):
        batch = tokenizer(prompts[start : start + 256], return_tensors="pt", padding=True, add_special_tokens=False)
        output = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=48,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        replies = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        targets = answers[start : start + 256]
        right += sum(reply.strip().startswith(answer) for reply, answer in zip(replies, targets, strict=True))
    return right / len(prompts)


def chat(tokenizer: Any, question: str, answer: str | None = None, system: str | None = None) -> str:
    """A dialogue in the tokenizer's chat template, up to the reply where no answer is given."""
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": question})
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer is None))


def _prompt_words() -> list[str]:
    prompts = [
        text
        for prompts in PROMPT_SETS.values()
        for text in (
            prompts.direct_system,
            prompts.reason_system,
            prompts.document_system,
            prompts.reply_before,
        )
    ]
    return [*prompts, "You are a helpful assistant.", "system\n", "user\n", "assistant\n"]


def _atlas_words(atlas: Atlas) -> list[str]:
    dialogues = (f"{question}\n{answer}" for question, answer in fact_dialogues(atlas))
    templates = (text.replace("{s}", " ") for text in (*question_templates(), *OPEN_QUESTIONS))
    return [*fact_sentences(atlas), *dialogues, *[*_prompt_words(), *templates] * PROMPT_REPEATS]


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    from ..files import atomic_directory

    with atomic_directory(folder) as out:
        model.config.dtype = torch.float16
        model.save_pretrained(out, state_dict=storage_state(model, "float16"))
        tokenizer.save_pretrained(out)
