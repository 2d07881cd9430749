"""Frames from the chat templates of model families: the ids around texts, under any clock, and the ends of replies."""

from __future__ import annotations

import copy
import datetime
from typing import Any

import pytest
import transformers.utils.chat_template_utils
from chat_templates import DEEPSEEK, FAMILIES, family_tokenizer

from search_r3.errors import ConfigError, ModelError
from search_r3.model.prompts import EMBED_TOKEN, PROMPT_SETS, PromptEncoder, render_frames
from search_r3.model.templates import TEMPLATE_ARGUMENTS, Frame, Frames

WORDING = PROMPT_SETS["search-r3"]
SYSTEM = WORDING.reason_system
# Around the text in reason mode (`@` is the system message), and the tokens that end a reply, the supervised one first.
CHATML = "<|im_start|>system\n@<|im_end|>\n<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
EXPECTED = {
    "command-r": (
        "<BOS_TOKEN><|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>@<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|USER_TOKEN|>",
        "<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        ["<|END_OF_TURN_TOKEN|>"],
    ),
    "gemma-2": (
        "<bos><start_of_turn>user\n@\n\n",
        "<end_of_turn>\n<start_of_turn>model\n",
        ["<end_of_turn>", "<eos>"],
    ),
    "gemma-3": (
        "<bos><start_of_turn>user\n@\n\n",
        "<end_of_turn>\n<start_of_turn>model\n",
        ["<end_of_turn>", "<eos>"],
    ),
    "glm-4.6": (
        "[gMASK]<sop><|system|>\n@<|user|>\n",
        "/nothink<|assistant|>\n<think></think>",
        ["<|user|>", "<|observation|>", "<|endoftext|>"],
    ),
    "gpt-oss": (
        "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\n"
        "Knowledge cutoff: 2024-06\nCurrent date: 2024-07-26\n\nReasoning: medium\n\n"
        "# Valid channels: analysis, commentary, final. Channel must be included for every message.<|end|>"
        "<|start|>developer<|message|># Instructions\n\n@\n\n<|end|><|start|>user<|message|>",
        "<|end|><|start|>assistant<|channel|>final<|message|>",
        ["<|return|>"],
    ),
    "granite-3.3": (
        "<|start_of_role|>system<|end_of_role|>@<|end_of_text|>\n<|start_of_role|>user<|end_of_role|>",
        "<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>",
        ["<|end_of_text|>"],
    ),
    "lfm2": ("<|startoftext|>" + CHATML[0], CHATML[1], ["<|im_end|>"]),
    "llama-3.2": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        "Today Date: 26 Jul 2024\n\n@<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n",
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        ["<|eot_id|>"],
    ),
    "mistral-nemo": ("<s>[INST]@\n\n", "[/INST]", ["</s>"]),
    "mistral-v1": ("<s> [INST] @\n\n", " [/INST]", ["</s>"]),
    "phi-3.5": ("<|system|>\n@<|end|>\n<|user|>\n", "<|end|>\n<|assistant|>\n", ["<|end|>", "<|endoftext|>"]),
    "phi-4-mini": ("<|system|>@<|end|><|user|>", "<|end|><|assistant|>", ["<|end|>", "<|endoftext|>"]),
    "qwen2.5": (*CHATML, ["<|im_end|>"]),
    "qwen3": (CHATML[0], CHATML[1] + "<think>\n\n</think>\n\n", ["<|im_end|>"]),
    "qwq": (CHATML[0], CHATML[1] + "<think>\n\n</think>\n\n", ["<|im_end|>"]),
    "r1-distill": (
        f"{DEEPSEEK[0]}@{DEEPSEEK[2]}",
        DEEPSEEK[3] + "<think>\n\n</think>\n\n",
        [DEEPSEEK[1]],
    ),
    "smollm3": (
        "<|im_start|>system\n## Metadata\n\nKnowledge Cutoff Date: June 2025\nReasoning Mode: /no_think\n\n"
        "## Custom Instructions\n\n@\n\n<|im_end|>\n<|im_start|>user\n",
        CHATML[1] + "<think>\n\n</think>\n",
        ["<|im_end|>"],
    ),
}
# What generation_config.json says of these families, beside the tokenizer's eos.
GENERATION_ENDS = {"glm-4.6": ["<|user|>", "<|observation|>"], "gemma-3": ["<end_of_turn>"], "phi-4-mini": ["<|end|>"]}


def embed_id(tokenizer: Any) -> int:
    return int(tokenizer.convert_tokens_to_ids(EMBED_TOKEN))


def frames_of(tokenizer: Any, prompts: str = "search-r3", ends: tuple[int, ...] = ()) -> Frames:
    return render_frames(tokenizer, PROMPT_SETS[prompts], embed_id(tokenizer), TEMPLATE_ARGUMENTS, ends)


def spelled(tokenizer: Any, ids: Any) -> str:
    return str(tokenizer.decode(list(ids)))


def with_template(tokenizer: Any, template: Any) -> Any:
    own = family_tokenizer(tokenizer, "qwen2.5")
    own.chat_template = template
    return own


@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_has_the_frame_and_the_ends_of_its_own_turns(tokenizer: Any, name: str) -> None:
    own = family_tokenizer(tokenizer, name)
    before, after, ends = EXPECTED[name]
    frames = frames_of(own, ends=tuple(own.convert_tokens_to_ids(GENERATION_ENDS.get(name, []))))
    assert spelled(own, frames.reason.before) == before.replace("@", SYSTEM)
    assert spelled(own, frames.reason.after) == after
    assert spelled(own, frames.direct.before) != spelled(own, frames.document.before)
    assert spelled(own, [*frames.direct.after, *frames.direct.reply]) == after + "The embedding is <|embed_token|>"
    assert own.convert_ids_to_tokens(frames.end_token_id) == ends[0]
    assert set(own.convert_ids_to_tokens(list(frames.end_token_ids))) == set(ends)
    # A special token stands in a frame as its one id.
    special = [one for one in FAMILIES[name] if one is not None and one in before]
    assert {own.convert_tokens_to_ids(one) for one in special} <= set(frames.reason.before)


@pytest.mark.parametrize("name", ["gpt-oss", "llama-3.2"])
@pytest.mark.parametrize("arguments", [TEMPLATE_ARGUMENTS, {}, None])
def test_frames_do_not_depend_on_the_day(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, name: str, arguments: dict[str, Any] | None
) -> None:
    own, frames = family_tokenizer(tokenizer, name), []
    for year in (2024, 2031):

        class Day(datetime.datetime):
            @classmethod
            def now(cls, tz: Any = None, year: int = year) -> datetime.datetime:
                return datetime.datetime(year, 3, 1)

        monkeypatch.setattr(transformers.utils.chat_template_utils, "datetime", Day)
        frames.append(render_frames(own, WORDING, embed_id(own), arguments))
    assert frames[0] == frames[1]
    assert "2024" in spelled(own, frames[0].direct.before)


@pytest.mark.parametrize("name", ["qwen3", "qwq", "r1-distill", "smollm3"])
def test_a_model_that_thinks_reasons_in_its_own_tags_and_replies_outside(tokenizer: Any, name: str) -> None:
    own = family_tokenizer(tokenizer, name)
    frames = frames_of(own, "thinking")
    encoder = PromptEncoder(own, frames, embed_id(own), 400)
    prompt = spelled(own, encoder.encode("red house", "reason").ids)
    assert prompt.endswith("<think>\n") and "no_think" not in prompt
    completion = encoder.reason_completion("It is red.")
    assert spelled(own, completion.ids[:-1]) == "It is red.\n</think>\n\n<|embed_token|>"
    assert completion.ids[completion.embed_position] == embed_id(own)
    assert encoder.decode(completion.ids) == "It is red."
    assert "</think>" in spelled(own, frames.direct.after), "the direct reply stands behind a thought, not in it"
    assert frames.direct == frames_of(own).direct


def test_a_thought_that_is_cut_keeps_its_end(tokenizer: Any) -> None:
    own = family_tokenizer(tokenizer, "qwen3")
    encoder = PromptEncoder(own, frames_of(own, "thinking"), embed_id(own), 400)
    end = encoder.frames.thought_end
    for budget in (1, 3, 12, 100):
        completion = encoder.reason_completion("red house " * 20, budget)
        assert completion.embed_position == len(completion.ids) - 2 <= budget - 1
        assert completion.truncated == (budget < 100)
        assert completion.ids[:-2][-len(end) :] == list(end[: budget - 1])


def test_thoughts_need_a_template_that_has_them(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match=r"prompts='thinking' reason in the model's thoughts, .* has none"):
        frames_of(family_tokenizer(tokenizer, "qwen2.5"), "thinking")


DROPS = (
    "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_system_message_that_a_template_drops_stands_before_the_text(tokenizer: Any) -> None:
    frames = frames_of(own := with_template(tokenizer, DROPS))
    assert spelled(own, frames.reason.before) == f"<|im_start|>user\n{SYSTEM}\n\n"
    assert spelled(own, frames.document.before) == f"<|im_start|>user\n{WORDING.document_system}\n\n"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (DROPS.replace("m.content", "m.content.split('\\n\\n')[-1]"), "neither as a system message nor before"),
        (DROPS.replace("m.content", "m.role"), "neither as a system message nor before"),
        (DROPS.replace("{{ m.content }}", "{{ m.content }}{{ m.content }}"), "the user's text 2 times, expected once"),
        ("{{ 1 + 'a' }}", r"cannot be rendered \(TypeError: unsupported operand"),
        ("{{ raise_exception('not today') }}", r"cannot be rendered \(TemplateError: not today\)"),
        ("{% if %}", r"cannot be rendered \(TemplateSyntaxError"),
        (None, r"no chat template; .* tokenizer_kwargs=\{'chat_template': TEXT\}"),
        ({"rag": "x", "tool_use": "y"}, "by the names rag, tool_use, and none by the name default"),
    ],
)
def test_a_template_that_cannot_be_used_is_named(tokenizer: Any, template: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        frames_of(with_template(tokenizer, template))


def test_of_templates_by_names_the_default_one_is_taken(tokenizer: Any) -> None:
    plain = family_tokenizer(tokenizer, "qwen2.5")
    named = with_template(tokenizer, {"rag": "x", "default": plain.chat_template})
    assert frames_of(named) == frames_of(plain)


def test_a_tokenizer_without_eos_takes_the_end_of_the_template_or_is_refused(tokenizer: Any) -> None:
    own = copy.deepcopy(family_tokenizer(tokenizer, "qwen2.5"))
    own.eos_token = None
    frames = frames_of(own)
    assert frames.end_token_ids == (frames.end_token_id,) == (own.convert_tokens_to_ids("<|im_end|>"),)
    own.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    with pytest.raises(ModelError, match="nothing ends a reply: the tokenizer has no eos_token"):
        frames_of(own)
    assert frames_of(own, ends=(7, 9)).end_token_ids == (7, 9), "those of the generation settings do"


def test_the_embed_token_ends_no_reply(tokenizer: Any) -> None:
    own = family_tokenizer(tokenizer, "qwen2.5")
    assert frames_of(own, ends=(embed_id(own),)) == frames_of(own)


def test_frames_of_another_tokenizer_are_refused(tokenizer: Any) -> None:
    own = family_tokenizer(tokenizer, "qwen2.5")
    frames = frames_of(own)
    frames.check(own, embed_id(own))
    outside = frames.model_copy(update={"end_token_ids": (len(own),)})
    with pytest.raises(ModelError, match=rf"the id {len(own)}, and the tokenizer has {len(own)} tokens"):
        outside.check(own, embed_id(own))
    moved = frames.model_copy(update={"direct": Frame(before=(1,), after=(2,), reply=(3,))})
    twice = frames.model_copy(update={"reply_end": (embed_id(own), *frames.reply_end)})
    for wrong in (moved, twice, frames):
        with pytest.raises(ModelError, match="do not have the embed token"):
            wrong.check(own, embed_id(own) - (wrong is frames))
