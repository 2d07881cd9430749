"""Chat templates: the token ids that stand around a text, and those that end a reply.

A template is a program: it may write today's date, refuse or drop a system message, open a thought, and it knows how
a turn ends. It is run under a clock that stands still and with arguments of ours, around a mark in the text's place.
What it writes becomes `Frames`, token ids, which are saved with the model, so that it is used with those that it was
trained with.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from ..errors import ModelError

Message = dict[str, str]
Ids = tuple[int, ...]

_THINKING_SWITCHES = ("enable_thinking", "thinking")  # Qwen3, SmolLM3, GLM; Granite, DeepSeek
TEMPLATE_ARGUMENTS: dict[str, Any] = {"date_string": "26 Jul 2024", **dict.fromkeys(_THINKING_SWITCHES, False)}
"""What templates are rendered with: the date where they ask for one, and no thinking of their own."""

_CLOCK = {
    "%Y": "2024", "%y": "24", "%m": "07", "%B": "July", "%b": "Jul", "%d": "26", "%A": "Friday", "%a": "Fri",
    "%H": "00", "%M": "00", "%S": "00",
}  # fmt: skip
# transformers passes plain data only, no function, so a macro of that name stands before the template.
_FROZEN_CLOCK = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f"|replace('{code}', '{text}')" for code, text in _CLOCK.items())
    + " }}{% endmacro %}\n"
)

_THOUGHT_TAGS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<|START_THINKING|>", "<|END_THINKING|>"))
_TEXT, _REPLY = "\u2402user text\u2403", "\u2402reply\u2403"  # marks, cut out of what is rendered


class Frame(BaseModel):
    """Token ids around a text: `before` it, `after` it, and the `reply` up to the vector (none in reason mode)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    before: Ids
    after: Ids
    reply: Ids


class Frames(BaseModel):
    """All token ids that a model has around texts and at the ends of replies."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    direct: Frame
    reason: Frame
    document: Frame
    reply_end: Ids = Field(description="After the embed token of a direct reply, the end of the turn included.")
    thought_end: Ids = Field(description="Between the reasoning and the embed token, where the model thinks in tags.")
    thought_tags: tuple[str, ...] = Field(description="What opens and closes a thought in this model's texts.")
    end_token_id: int = Field(description="Ends a turn in the template; supervised at the end of replies.")
    end_token_ids: Ids = Field(description="All tokens that end a reply.")

    def check(self, tokenizer: Any, embed_token_id: int) -> None:
        """Refuse frames that cannot be this tokenizer's.

        Raises:
            ModelError: an id is outside the vocabulary, or the embed token is not where the vector is read.
        """
        kinds = (self.direct, self.reason, self.document)
        around = [*self.reply_end, *self.thought_end, self.end_token_id, *self.end_token_ids]
        around += [one for kind in kinds for one in (*kind.before, *kind.after, *kind.reply[:-1])]
        if outside := [one for one in around if not 0 <= one < len(tokenizer)]:
            fault = f"hold the id {outside[0]}, and the tokenizer has {len(tokenizer)} tokens"
        elif embed_token_id in around or {kind.reply[-1:] for kind in kinds} != {(embed_token_id,), ()}:
            fault = f"do not have the embed token (id {embed_token_id}) at the ends of the direct and document replies"
        else:
            return
        raise ModelError(
            f"the saved frames {fault}: the tokenizer is not the one they were saved with; put that one back, or "
            "remove `frames` from search_r3.json to have them rendered anew"
        )


@dataclass(frozen=True)
class ChatTemplate:
    """The chat template of a tokenizer, with what it is rendered with.

    Attributes:
        tokenizer: a fast Hugging Face tokenizer.
        arguments: for the template; None passes nothing and mends nothing in what it renders.
    """

    tokenizer: Any
    arguments: Mapping[str, Any] | None

    @property
    def source(self) -> str:
        """The template's text.

        Raises:
            ModelError: there is none, or none by the name `default`.
        """
        source = self.tokenizer.chat_template
        if not source:
            raise ModelError(
                "the tokenizer has no chat template; take a chat model, for instance an -Instruct one, or give this "
                "one the template of its family: SearchR3(..., tokenizer_kwargs={'chat_template': TEXT}), whose "
                "save_pretrained keeps it"
            )
        if isinstance(source, Mapping):
            if "default" not in source:
                raise ModelError(
                    f"the tokenizer has chat templates by the names {', '.join(source)}, and none by the name default; "
                    "set tokenizer.chat_template to the one that is meant and save the tokenizer"
                )
            source = source["default"]
        return str(source)

    def render(self, messages: list[Message], thinking: bool = False, generation_prompt: bool = True) -> str:
        """What the template writes.

        Raises:
            ModelError: it fails, or refuses these messages.
        """
        arguments = dict(self.arguments or {})
        if thinking:
            arguments |= dict.fromkeys(_THINKING_SWITCHES, True)
        source = _FROZEN_CLOCK + self.source
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages,
                    chat_template=source,
                    tokenize=False,
                    add_generation_prompt=generation_prompt,
                    **arguments,
                )
            )
        except Exception as error:  # a template is a program and may raise anything
            fault = " ".join(f"{type(error).__name__}: {error}".split())
            raise ModelError(
                f"the chat template cannot be rendered ({fault}); mend chat_template in the tokenizer"
            ) from error

    def conversation(self, system: str) -> list[Message]:
        """The messages of a prompt: the system message in its own turn, or before the text where it would be lost.

        Raises:
            ModelError: the template cannot be rendered, or does not show the system message or the text.
        """
        own_turn = [{"role": "system", "content": system}, {"role": "user", "content": _TEXT}]
        try:
            rendered = self.render(own_turn)
        except ModelError:
            rendered = None  # templates without a system role refuse it (Gemma 2), or drop it silently
        if rendered is not None and (system.strip() in rendered or self.arguments is None):
            messages = own_turn
        else:
            messages = [{"role": "user", "content": f"{system}\n\n{_TEXT}".strip()}]
            rendered = self.render(messages)
            if system.strip() not in rendered:
                raise ModelError(
                    f"the chat template shows {system!r} neither as a system message nor before the user's text; "
                    "check chat_template in the tokenizer"
                )
        if rendered.count(_TEXT) != 1:
            raise ModelError(
                f"the chat template shows the user's text {rendered.count(_TEXT)} times, expected once; check "
                "chat_template in the tokenizer"
            )
        return messages

    def thought_tags(self) -> tuple[str, ...]:
        """What opens and closes a thought in this template; empty where it knows none."""
        return next((tags for tags in _THOUGHT_TAGS if tags[1] in self.source), ())

    def around(self, system: str, thinks: bool) -> tuple[str, str]:
        """What stands before the user's text and between it and the reply.

        Args:
            system: the system message.
            thinks: the reply begins within a thought; else it is outside of one.
        """
        messages = self.conversation(system)
        before, _, after = self.render(messages, thinks).partition(_TEXT)
        if self.arguments is None:
            return before, after
        tags = self.thought_tags()
        opened = bool(tags) and after.rfind(tags[0]) > after.rfind(tags[1])
        if thinks:
            return before, after if opened else f"{after}{tags[0]}\n"
        # Some templates have more before a reply than they prompt with: a channel, an empty thought.
        between = self._around_reply(messages)[0]
        if between.startswith(after) and between[len(after) :].strip():
            return before, between
        return before, f"{after.rstrip()}\n\n{tags[1]}\n\n" if opened else after

    def end_tokens(self, eos_token_ids: Iterable[int]) -> tuple[int, set[int]]:
        """The token that ends a turn in this template, and all that end a reply.

        Args:
            eos_token_ids: of the generation settings.

        Raises:
            ModelError: nothing ends one.
        """
        ends = {one for one in (self.tokenizer.eos_token_id, *eos_token_ids) if one is not None}
        ends = {one for one in ends if 0 <= one < len(self.tokenizer)}
        messages = self.conversation("Reply.")
        own = self._first_special(self._around_reply(messages)[1])
        if own is None:  # some end a turn with the next one's beginning (GLM)
            following = self._first_special(self._around_reply(messages, [{"role": "user", "content": "Go on."}])[1])
            own = following if following in ends else self.tokenizer.eos_token_id
        if own is None:
            own = min(ends, default=None)
        if own is None:
            raise ModelError(
                "nothing ends a reply: the tokenizer has no eos_token, and neither the chat template nor "
                "generation_config.json names one; set eos_token in tokenizer_config.json"
            )
        return int(own), ends | {int(own)}

    def _around_reply(self, messages: list[Message], then: Sequence[Message] = ()) -> tuple[str, str]:
        """What stands between text and reply, and behind the reply, where the template renders a whole turn."""
        try:
            whole = self.render([*messages, {"role": "assistant", "content": _REPLY}, *then], generation_prompt=False)
        except ModelError:
            return "", ""
        between, _, behind = whole.partition(_TEXT)[2].partition(_REPLY)
        return between, behind

    def _first_special(self, text: str) -> int | None:
        added = self.tokenizer.added_tokens_decoder
        special = {one for one, token in added.items() if token.special} | set(self.tokenizer.all_special_ids)
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return next((int(one) for one in ids if one in special), None)
