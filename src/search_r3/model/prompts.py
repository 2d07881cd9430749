"""The only place where text becomes token ids.

A prompt is the tokenizer's own chat template around the user's text. The template is rendered once per mode and cut
at the user's text; that text is then tokenized with special tokens switched off, so that a query which contains
`<|im_end|>` or `<|embed_token|>` stays plain text and cannot end a turn or move the vector.
"""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..data.rows import instructed
from ..errors import DataError, ModelError

EMBED_TOKEN = "<|embed_token|>"  # noqa: S105 - the token's name in the paper, no secret
Mode = Literal["direct", "reason"]
MODES: tuple[Mode, ...] = ("direct", "reason")
Kind = Literal["direct", "reason", "document"]
_USER_TEXT = "\u2402user text\u2403"


class PromptSet(BaseModel):
    """The wording with which a model was trained; it is saved next to the weights.

    Example:
        >>> PROMPT_SETS["published"].direct_system
        'Please representation user queries.'
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    direct_system: str = Field(description="System message for queries in direct mode.")
    reason_system: str = Field(description="System message for queries in reason mode.")
    document_system: str = Field(description="System message for documents.")
    reply_before: str = Field("The embedding is ", description="Reply text before the embed token (direct, document).")
    reply_after: str = Field(".", description="Reply text after the embed token (direct, document).")


_PUBLISHED_DIRECT = "Please representation user queries."
_REASON = "Think about what the query asks for, then represent it."

PROMPT_SETS = {
    "search-r3": PromptSet(
        name="search-r3",
        direct_system=_PUBLISHED_DIRECT,
        reason_system=_REASON,
        document_system="Represent the document.",
    ),
    # Only the direct prompt of the published checkpoint is known (the odd word included), so its documents take it too.
    "published": PromptSet(
        name="published",
        direct_system=_PUBLISHED_DIRECT,
        reason_system=_REASON,
        document_system=_PUBLISHED_DIRECT,
    ),
}


@dataclass(frozen=True)
class EncodedPrompt:
    """Token ids of one prompt. `truncated`: the text was longer than the context and lost its end."""

    ids: list[int]
    truncated: bool


@dataclass(frozen=True)
class Completion:
    """Token ids of one supervised reply; `embed_position` is the index of the embed token in `ids`."""

    ids: list[int]
    embed_position: int


class PromptEncoder:
    """Turns queries, documents and replies into token ids.

    Args:
        tokenizer: a fast Hugging Face tokenizer with a chat template.
        prompts: the wording.
        embed_token_id: the id of the embed token.
        max_length: longest prompt in tokens, template and direct reply included; longer texts lose their end.

    Raises:
        ModelError: no chat template, a template that drops the user's text, or no room for any text.
    """

    def __init__(self, tokenizer: Any, prompts: PromptSet, embed_token_id: int, max_length: int) -> None:
        if not tokenizer.chat_template:
            raise ModelError(
                "the tokenizer has no chat template; Search-R3 needs a chat model, for instance an -Instruct one"
            )
        self.tokenizer = tokenizer
        self.prompts = prompts
        self.embed_token_id = embed_token_id
        self.max_length = max_length
        self.end_token_id: int = tokenizer.eos_token_id
        self.end_token_ids = frozenset({self.end_token_id})
        systems = {
            "direct": prompts.direct_system,
            "reason": prompts.reason_system,
            "document": prompts.document_system,
        }
        self._frames = {kind: self._frame(system) for kind, system in systems.items()}
        reply = [*self._plain(prompts.reply_before), embed_token_id]
        self._reply = {"direct": reply, "document": reply, "reason": []}
        self._after = [*self._plain(prompts.reply_after), self.end_token_id]
        for kind, (before, after) in self._frames.items():
            room = max_length - len(before) - len(after) - len(self._reply[kind])
            if room < 1:
                raise ModelError(f"max_length={max_length} leaves no room for text in the {kind} prompt; set it higher")

    def encode(self, text: str, kind: Kind, instruction: str = "") -> EncodedPrompt:
        """Token ids for a text.

        For `direct` and `document` they end with the embed token, for `reason` where the model's reply begins. The
        instruction follows the text; where both are too long, the text loses its end and the instruction stays whole.

        Raises:
            DataError: the text is empty or blank, or the instruction leaves no room for it.
        """
        return self.encode_batch([text], kind, instruction)[0]

    def encode_batch(
        self, texts: Sequence[str], kind: Kind, instruction: str | Sequence[str] = ""
    ) -> list[EncodedPrompt]:
        """`encode` for many texts at once, which is faster; with one instruction for all, or one per text.

        Raises:
            DataError: a text is empty or blank (its place is named), an instruction leaves no room, or there is another
                number of instructions than of texts.
        """
        if not texts:
            return []
        stripped = [text.strip() if isinstance(text, str) else "" for text in texts]
        if not all(stripped):
            place = stripped.index("")
            name = "document" if kind == "document" else "query"
            raise DataError(
                f"{name} number {place} is {texts[place]!r}; expected a text with at least one visible character"
            )
        before, after = self.frame(kind)
        room = self.room(kind)
        endings = [instruction] * len(texts) if isinstance(instruction, str) else instruction
        if len(endings) != len(texts):
            raise DataError(f"{len(endings)} instructions for {len(texts)} texts; give one for all, or one per text")
        whole = [instructed(text, end).strip() for text, end in zip(texts, endings, strict=True)]
        tokens = self.tokenizer(whole, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return [
            EncodedPrompt([*before, *self._cut(text, end, ids, room), *after], len(ids) > room)
            for text, end, ids in zip(whole, endings, tokens, strict=True)
        ]

    def _cut(self, whole: str, instruction: str, ids: list[int], room: int) -> list[int]:
        """The ids of a text with its instruction; of one without room, without the end of the text."""
        if len(ids) <= room or not instruction.strip():
            return ids[:room]
        offsets = self.tokenizer(
            whole, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
        )["offset_mapping"]
        text_length = len(whole[: -len(instruction.strip())].rstrip())
        ending = ids[sum(end <= text_length for _, end in offsets) :]
        if len(ending) >= room:
            raise DataError(
                f"the instruction {reprlib.repr(instruction)} takes {len(ending)} tokens, but max_length="
                f"{self.max_length} has room for {room} with the text; shorten it, or set max_length higher"
            )
        return [*ids[: room - len(ending)], *ending]

    def room(self, kind: Kind) -> int:
        """The tokens that a text may have, its instruction included, before it loses its end."""
        before, after = self.frame(kind)
        return self.max_length - len(before) - len(after)

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """The tokens of each text alone, however many; a blank one has none."""
        if not texts:
            return []
        stripped = [text.strip() for text in texts]
        tokens = self.tokenizer(stripped, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return [len(ids) for ids in tokens]

    def frame(self, kind: Kind) -> tuple[list[int], list[int]]:
        """The ids of a whole prompt before and after the user's text, the reply of `direct` and `document` included."""
        before, after = self._frames[kind]
        return before, [*after, *self._reply[kind]]

    def prefix_of(self, ids: Sequence[int]) -> tuple[int, ...]:
        """The template before the text with which these ids of a prompt begin (empty if with none)."""
        befores = [tuple(before) for before, _ in self._frames.values()]
        return max((before for before in befores if tuple(ids[: len(before)]) == before), key=len, default=())

    def direct_completion(self) -> Completion:
        """The supervised reply of direct mode: `The embedding is <|embed_token|>.` and the end of the turn."""
        return Completion([*self._reply["direct"], *self._after], len(self._reply["direct"]) - 1)

    def reason_completion(self, reasoning: str) -> Completion:
        """The supervised reply of reason mode: the reasoning, the embed token and the end of the turn."""
        ids = self._plain(reasoning)
        return Completion([*ids, self.embed_token_id, self.end_token_id], len(ids))

    def decode(self, ids: list[int]) -> str:
        """The text of generated ids, special tokens left out."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def _plain(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)) if text else []

    def _frame(self, system: str) -> tuple[list[int], list[int]]:
        """The template's ids before and after the user's text."""
        from jinja2 import TemplateError

        try:
            rendered = self._render([{"role": "system", "content": system}, {"role": "user", "content": _USER_TEXT}])
        except TemplateError:
            # Templates without a system role (Gemma, some Mistral) refuse it; their own guides put it before the text.
            rendered = self._render([{"role": "user", "content": f"{system}\n\n{_USER_TEXT}"}])
        before, text, after = rendered.partition(_USER_TEXT)
        if not text:
            raise ModelError("the chat template does not show the user's text; check chat_template in the tokenizer")
        encode = self.tokenizer.encode
        return list(encode(before, add_special_tokens=False)), list(encode(after, add_special_tokens=False))

    def _render(self, messages: list[dict[str, str]]) -> str:
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
