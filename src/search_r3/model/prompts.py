"""The only place where text becomes token ids.

A prompt is the frame that the model's chat template gives (`templates.py`), around the user's text. That text is
tokenized with special tokens switched off, so that a query which contains `<|im_end|>` or `<|embed_token|>` stays plain
text and cannot end a turn or move the vector.
"""

from __future__ import annotations

import re
import reprlib
import threading
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..data.rows import check_text, instructed
from ..errors import ConfigError, DataError, ModelError
from ..modes import MODES as MODES
from ..modes import PLAIN_MODES as PLAIN_MODES
from ..modes import Mode as Mode
from ..modes import PlainMode as PlainMode
from .templates import ChatTemplate, Frame, Frames

_TOKENIZING = threading.Lock()
"""A tokenizer's settings change from call to call, so one thread at a time uses it."""
_SENTENCE_END = re.compile(r"[.!?]+(?=\s)|[\u3002\uff01\uff1f]+|\n+")
EMBED_TOKEN = "<|embed_token|>"  # noqa: S105 - the token's name in the paper, no secret
Kind = Literal["direct", "reason", "latent", "auto", "document"]


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
    thinks: bool = Field(
        False, description="Reason mode reasons in the thought tags of the model's own template (<think>...</think>)."
    )


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
    # For models that think by themselves: their thoughts are the reasoning.
    "thinking": PromptSet(
        name="thinking",
        direct_system=_PUBLISHED_DIRECT,
        reason_system=_REASON,
        document_system="Represent the document.",
        thinks=True,
    ),
}


def prompt_set(prompts: str | PromptSet) -> PromptSet:
    """A prompt set by its name in `PROMPT_SETS`, or as it is.

    Raises:
        ConfigError: there is none of this name.
    """
    if isinstance(prompts, PromptSet):
        return prompts
    if not isinstance(prompts, str) or prompts not in PROMPT_SETS:
        raise ConfigError(f"prompts={prompts!r} is no prompt set; expected {', '.join(PROMPT_SETS)}, or a PromptSet")
    return PROMPT_SETS[prompts]


def render_frames(
    tokenizer: Any,
    prompts: PromptSet,
    embed_token_id: int,
    arguments: Mapping[str, Any] | None,
    eos_token_ids: Iterable[int] = (),
) -> Frames:
    """The token ids that the tokenizer's chat template puts around texts and at the ends of replies.

    Args:
        tokenizer: a fast Hugging Face tokenizer with a chat template.
        prompts: the wording.
        embed_token_id: the id of the embed token.
        arguments: for the template; None passes nothing and mends nothing in what it renders.
        eos_token_ids: of the model's generation settings.

    Raises:
        ModelError: the template is missing, cannot be rendered or loses a text, or nothing ends a reply.
        ConfigError: the prompts think, and the template has no thoughts.
    """
    template = ChatTemplate(tokenizer, arguments)
    tags = template.thought_tags()
    if prompts.thinks and not tags:
        raise ConfigError(
            f"prompts={prompts.name!r} reason in the model's thoughts, and its chat template has none: use search-r3"
        )
    ends = template.end_tokens(eos_token_ids)

    def ids_of(text: str, special: bool = True) -> tuple[int, ...]:
        """Where `special` is off, names of special tokens stay plain text."""
        return tuple(tokenizer.encode(text, add_special_tokens=False, split_special_tokens=not special)) if text else ()

    def frame(system: str, thinks: bool, reply: tuple[int, ...]) -> Frame:
        before, after = template.around(system, thinks)
        return Frame(before=ids_of(before), after=ids_of(after), reply=reply)

    reply = (*ids_of(prompts.reply_before, special=False), embed_token_id)
    return Frames(
        direct=frame(prompts.direct_system, False, reply),
        reason=frame(prompts.reason_system, prompts.thinks, ()),
        document=frame(prompts.document_system, False, reply),
        reply_end=(*ids_of(prompts.reply_after, special=False), ends[0]),
        thought_end=ids_of(f"\n{tags[1]}\n\n") if prompts.thinks else (),
        thought_tags=tags,
        end_token_id=ends[0],
        end_token_ids=tuple(sorted(ends[1] - {embed_token_id})),
    )


@dataclass(frozen=True)
class EncodedPrompt:
    """Token ids of one prompt. `truncated`: the text was longer than the context and lost its end."""

    ids: list[int]
    truncated: bool


@dataclass(frozen=True)
class Completion:
    """Token ids of one supervised reply; `embed_position` is the index of the embed token in `ids`.

    `truncated`: the reasoning was longer than its budget and lost its end.
    """

    ids: list[int]
    embed_position: int
    truncated: bool = False


class PromptEncoder:
    """Turns queries, documents and replies into token ids.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        frames: the ids around texts.
        embed_token_id: the id of the embed token.
        max_length: longest prompt in tokens, template and direct reply included; longer texts lose their end.

    Attributes:
        end_token_id: the token that ends a turn; supervised at the ends of replies.
        end_token_ids: all tokens that end a reply.

    Raises:
        ModelError: no room for any text.
    """

    def __init__(self, tokenizer: Any, frames: Frames, embed_token_id: int, max_length: int) -> None:
        self.tokenizer = tokenizer
        self.frames = frames
        self.embed_token_id = embed_token_id
        self.max_length = max_length
        self.end_token_id = frames.end_token_id
        self.end_token_ids = frozenset(frames.end_token_ids)
        self._frames: dict[Kind, Frame] = {
            "direct": frames.direct,
            "reason": frames.reason,
            # The embed token says that no text comes: what reason mode begins with is taught there as a certainty.
            "latent": frames.reason.model_copy(update={"reply": (embed_token_id,)}),
            "auto": frames.reason,  # what may be written, as it is said there
            "document": frames.document,
        }
        for kind in self._frames:
            if self.room(kind) < 1:
                raise ModelError(f"max_length={max_length} leaves no room for text in the {kind} prompt; set it higher")

    def encode(self, text: str, kind: Kind, instruction: str = "") -> EncodedPrompt:
        """Token ids for a text.

        For `direct`, `document` and `latent` they end with the embed token, else where the model's reply begins. The
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
        self.check(texts, kind, instruction)
        before, after = self.frame(kind)
        room = self.room(kind)
        endings = [instruction] * len(texts) if isinstance(instruction, str) else instruction
        whole = [instructed(text, end).strip() for text, end in zip(texts, endings, strict=True)]
        tokens = self._tokenized(whole, "document" if kind == "document" else "query")["input_ids"]
        return [
            EncodedPrompt([*before, *self._cut(text, end, ids, room), *after], len(ids) > room)
            for text, end, ids in zip(whole, endings, tokens, strict=True)
        ]

    def check(self, texts: Sequence[str], kind: Kind, instruction: str | Sequence[str] = "") -> None:
        """Refuse what `encode_batch` would refuse before it tokenizes anything.

        Raises:
            DataError: as there.
        """
        for place, text in enumerate(texts):
            if not isinstance(text, str) or not text.strip():
                name = "document" if kind == "document" else "query"
                raise DataError(
                    f"{name} number {place} is {text!r}; expected a text with at least one visible character"
                )
        if not isinstance(instruction, str | Sequence):
            raise DataError(f"the instruction is {instruction!r}; expected a text ('' for none), or one per text")
        if not isinstance(instruction, str) and len(instruction) != len(texts):
            raise DataError(
                f"{len(instruction)} instructions for {len(texts)} texts; give one for all, or one per text"
            )

    def _cut(self, whole: str, instruction: str, ids: list[int], room: int) -> list[int]:
        """The ids of a text with its instruction; of one without room, without the end of the text."""
        if len(ids) <= room or not instruction.strip():
            return ids[:room]
        [offsets] = self._tokenized([whole], return_offsets_mapping=True)["offset_mapping"]
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
        return [len(ids) for ids in self._tokenized([text.strip() for text in texts])["input_ids"]]

    def frame(self, kind: Kind) -> tuple[list[int], list[int]]:
        """The ids of a whole prompt before and after the user's text, what it ends with included."""
        frame = self._frames[kind]
        return list(frame.before), [*frame.after, *frame.reply]

    def prefix_of(self, ids: Sequence[int]) -> tuple[int, ...]:
        """The template before the text with which these ids of a prompt begin (empty if with none)."""
        befores = [frame.before for frame in self._frames.values()]
        return max((before for before in befores if tuple(ids[: len(before)]) == before), key=len, default=())

    def direct_completion(self) -> Completion:
        """The supervised reply of direct mode: `The embedding is <|embed_token|>.` and the end of the turn."""
        reply = self.frames.direct.reply
        return Completion([*reply, *self.frames.reply_end], len(reply) - 1)

    def reason_completion(self, reasoning: str, max_new_tokens: int | None = None) -> Completion:
        """The supervised reply of reason mode: the reasoning, the embed token and the end of the turn.

        Args:
            reasoning: the trace.
            max_new_tokens: the budget, the embed token included; what does not fit loses its end, since no reply will
                be longer. The tag that ends a thought stays.
        """
        ids = self._plain(reasoning)
        room = len(ids) + len(self.frames.thought_end) if max_new_tokens is None else max_new_tokens - 1
        thought_end = self.frames.thought_end[:room]
        kept = ids[: room - len(thought_end)]
        head = [*kept, *thought_end]
        return Completion([*head, self.embed_token_id, self.end_token_id], len(head), len(kept) < len(ids))

    def sentences(self, text: str) -> list[list[int]]:
        """Token ids of a text, a list for each sentence or line that has any."""
        tokens = self._tokenized([text], return_offsets_mapping=True)
        ends = [match.end() for match in _SENTENCE_END.finditer(text)]
        parts: list[list[int]] = [[] for _ in range(len(ends) + 1)]
        for token, (_, end) in zip(tokens["input_ids"][0], tokens["offset_mapping"][0], strict=True):
            parts[bisect_left(ends, end)].append(token)
        return [part for part in parts if part]

    def decode(self, ids: list[int]) -> str:
        """The text of generated ids, special tokens and tags of thoughts left out."""
        with _TOKENIZING:
            text = str(self.tokenizer.decode(ids, skip_special_tokens=True))
        for tag in self.frames.thought_tags:
            text = text.replace(tag, "")
        return text.strip()

    def _plain(self, text: str) -> list[int]:
        return list(self._tokenized([text])["input_ids"][0]) if text else []

    def _tokenized(self, texts: list[str], name: str = "text", **options: Any) -> Any:
        """What the tokenizer says of texts, in which names of special tokens stay plain text.

        Raises:
            DataError: one cannot be written as UTF-8.
        """
        try:
            with _TOKENIZING:
                return self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True, **options)
        except (TypeError, UnicodeEncodeError):
            for place, text in enumerate(texts):
                check_text(text, f"{name} number {place}")
            raise
