"""Texts to pretrain a small base model on: read from files, packed into a stream of tokens."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..data.rows import check_text
from ..errors import DataError
from ..files import read_jsonl, read_lines

Dialogue = tuple[tuple[str, str], ...]
"""Turns: `(role, content)`."""
HELD_OUT = 100
"""One text in so many is held out of training, for the loss that is reported."""
HELD_OUT_TOKENS = 20_000
"""The loss is measured on so many tokens of them, at most."""
SUFFIXES = (".jsonl", ".txt")


@dataclass(frozen=True)
class Texts:
    """What a base model is pretrained on; a text is a document or a dialogue."""

    train: list[str | Dialogue]
    held_out: list[str | Dialogue]

    def words(self) -> Iterator[str]:
        """All training text, for the tokenizer."""
        for text in self.train:
            yield text if isinstance(text, str) else "\n".join(content for _, content in text)

    def tokens(self, tokenizer: Any, rng: random.Random) -> Iterator[int]:
        """An endless stream of token ids: passes over all texts in random order, each after an end-of-text token."""
        order = list(self.train)
        while True:
            rng.shuffle(order)
            for text in order:
                yield tokenizer.pad_token_id
                yield from encode(tokenizer, text)

    @torch.no_grad()
    def measure(self, model: Any, tokenizer: Any, length: int) -> dict[str, float]:
        """`held_out_loss`: nats per token of texts that were not trained on; nothing where none was held out."""
        ids: list[int] = []
        for text in self.held_out:
            ids += [tokenizer.pad_token_id, *encode(tokenizer, text)]
        rows = [ids[start : start + length] for start in range(0, min(len(ids), HELD_OUT_TOKENS) - length + 1, length)]
        if not rows:
            return {}
        parts = [torch.tensor(rows[start : start + 16]) for start in range(0, len(rows), 16)]
        total = sum(model(input_ids=part, labels=part).loss.item() * len(part) for part in parts)
        return {"held_out_loss": total / len(rows)}


def read_texts(paths: Sequence[Path]) -> Texts:
    """Texts of files, or of all such files in folders.

    Args:
        paths: `.txt` files (texts end at blank lines), and JSON Lines with `text` and optionally `title` (a BEIR
            `corpus.jsonl`, for instance) or with `messages`, a dialogue as a list of `role` and `content`.

    Returns:
        The texts in the order of the files; one in `HELD_OUT`, chosen by its content, is held out.

    Raises:
        DataError: a path is missing, a row holds neither, or nothing was found.
    """
    everything: list[str | Dialogue] = []
    for path in paths:
        for file in _files(Path(path)):
            everything += _read_lines(file) if file.suffix == ".jsonl" else _paragraphs(file)
    if not everything:
        raise DataError(f"no text in {', '.join(map(str, paths))}; expected {' or '.join(SUFFIXES)} files with text")
    held_out = [text for text in everything if _is_held_out(text)]
    train = [text for text in everything if not _is_held_out(text)]
    return Texts(train, held_out) if train else Texts(everything, [])


def encode(tokenizer: Any, text: str | Dialogue) -> list[int]:
    """Token ids; a dialogue in the tokenizer's chat template."""
    if isinstance(text, str):
        return list(tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))
    messages = [{"role": role, "content": content} for role, content in text]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    return list(tokenizer.encode(rendered, add_special_tokens=False))


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
    if not path.is_file():
        raise DataError(f"no texts at {path}: there is no such file or folder")
    if path.suffix not in SUFFIXES:
        raise DataError(f"cannot read {path}: expected a file that ends in {' or '.join(SUFFIXES)}, or a folder")
    return [path]


def _read_lines(path: Path) -> Iterator[str | Dialogue]:
    for number, row in read_jsonl(path):
        messages, text = row.get("messages"), row.get("text")
        place = f"{path}:{number}"
        if isinstance(messages, list) and messages:
            yield tuple(_turn(message, place) for message in messages)
        elif isinstance(text, str):
            if full := check_text(f"{row.get('title') or ''} {text}".strip(), f"{place}: the text"):
                yield full
        else:
            raise DataError(f"{place}: expected a string 'text' or a list 'messages' of role and content")


def _turn(message: Any, place: str) -> tuple[str, str]:
    role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
    if not isinstance(role, str) or not isinstance(content, str):
        raise DataError(f"{place}: a message needs the strings 'role' and 'content'")
    return check_text(role, f"{place}: a role"), check_text(content, f"{place}: a message")


def _paragraphs(path: Path) -> Iterable[str]:
    text = "".join(line.replace("\r\n", "\n") for _, line in read_lines(path))
    return [" ".join(block.split()) for block in text.split("\n\n") if block.strip()]


def _is_held_out(text: str | Dialogue) -> bool:
    # By content, so that a text that stands in the files several times is held out everywhere.
    return int.from_bytes(hashlib.sha256(repr(text).encode()).digest()[:4]) % HELD_OUT == 0
