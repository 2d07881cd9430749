"""Rollouts that something else than the decoder of this package writes."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from completion_server import Answer, CompletionServer, Kind, running

from search_r3 import SampledReply, train_grpo
from search_r3.config import GRPOSettings, Recipe, load_recipe
from search_r3.data.collection import Collection
from search_r3.errors import ConfigError, RunError
from search_r3.model.backbone import Backbone
from search_r3.model.encoder import SearchR3
from search_r3.model.engine.decoding import Decoder, DecodeRequest, Rollout
from search_r3.model.engine.forward import sequence_states
from search_r3.model.loading import load_backbone
from search_r3.sections import SamplerSettings
from search_r3.training import grpo
from search_r3.training.engine import Engine, make_engine
from search_r3.training.rl.endpoint import EndpointSampler
from search_r3.training.rl.sampler import LocalSampler, PolicyWeights, complete
from search_r3.training.saving import save_policy
from tests.conftest import save_model, tiny_model
from tests.unit.training.test_training import experience, gradients, recipe

TEXTS = ["where is the red house?", "river", "a black horse and a white chair", "the green lamp"]


@pytest.fixture(scope="module")
def talker_path(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A model with an output layer of its own that emits the embed token in some replies."""
    folder = tmp_path_factory.mktemp("talker")
    backbone = load_backbone(save_model(folder / "base", tokenizer, tiny_model("qwen2", tokenizer, tied=False)))
    prompts = [backbone.prompt_encoder.encode(text, "reason").ids for text in TEXTS]
    with torch.no_grad():
        states = [backbone.hidden_states(torch.tensor([ids]), None)[0, -1] for ids in prompts]
        towards = torch.stack(states).mean(0)
        head = backbone.model.get_output_embeddings().weight
        head[backbone.embed_token_id] = 4.0 * towards / towards.pow(2).sum()
    backbone.save(folder / "model")
    return folder / "model"


@pytest.fixture
def talker(talker_path: Path) -> SearchR3:
    return SearchR3(talker_path, device="cpu")


def requests_of(backbone: Backbone, budget: int = 6, temperature: float = 1.0) -> list[DecodeRequest]:
    prompts = [backbone.prompt_encoder.encode(text, "reason").ids for text in TEXTS for _ in range(3)]
    return [DecodeRequest(prompt, budget, temperature, seed=seed) for seed, prompt in enumerate(prompts)]


def weights_of(model: SearchR3, settings: Recipe | None = None, version: int = 0) -> PolicyWeights:
    settings = settings or recipe()
    return PolicyWeights(make_engine(model, settings, settings.grpo), model, settings, version)


def endpoint_of(server: CompletionServer, model: SearchR3, folder: Path, **settings: Any) -> EndpointSampler:
    sampler = EndpointSampler(SamplerSettings(url=server.url, **settings), folder, 4)
    sampler.update(weights_of(model))
    return sampler


# What is read off a reply


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama"])
def test_states_of_whole_sequences_are_those_of_the_model(kind: str, tokenizer: Any, tmp_path: Path) -> None:
    backbone = load_backbone(save_model(tmp_path / "m", tokenizer, tiny_model(kind, tokenizer)))
    sequences = [backbone.prompt_encoder.encode(text, "reason").ids for text in TEXTS]
    states = sequence_states(backbone, sequences)
    for row, ids in enumerate(sequences):
        expected = backbone.hidden_states(torch.tensor([ids]), None)[0]
        assert torch.allclose(states[row, : len(ids)], expected, atol=1e-5)


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_vectors_and_logprobs_are_read_as_the_decoder_has_them(talker: SearchR3, temperature: float) -> None:
    requests = requests_of(talker.backbone, temperature=temperature)
    local = LocalSampler(talker, 4).sample(requests)
    replies = [SampledReply(one.completion_ids, [-9.0] * len(one.completion_ids)) for one in local if not one.forced]
    own = [request for request, one in zip(requests, local, strict=True) if not one.forced]
    assert 0 < len(own) < len(requests) or temperature == 0
    for rollout, expected in zip(complete(talker, own, replies), [one for one in local if not one.forced], strict=True):
        assert torch.allclose(rollout.vector, expected.vector, atol=1e-5)
        assert rollout.logprobs == pytest.approx(expected.logprobs, abs=1e-5)
        assert rollout.sampler_logprobs == [-9.0] * len(expected.completion_ids)
        same = replace(rollout, vector=expected.vector, logprobs=expected.logprobs, sampler_logprobs=None)
        assert same == expected


def test_a_reply_ends_by_the_decoders_rule(talker: SearchR3) -> None:
    backbone = talker.backbone
    embed, [end, *_] = backbone.embed_token_id, sorted(backbone.prompt_encoder.end_token_ids)
    request = DecodeRequest(backbone.prompt_encoder.encode("river", "reason").ids, 4, 1.0, seed=1)
    cases: dict[tuple[int, ...], tuple[list[int], list[int]]] = {
        (5, 6, embed): ([5, 6, embed], [1, 1, 1]),
        (embed,): ([embed], [1]),
        (5, end): ([5, embed], [1, 0]),  # the embed token takes the place of the end
        (5, 6, 7, 8): ([5, 6, 7, embed], [1, 1, 1, 0]),  # and that of the last token of the budget
        (5, 6, 7, embed): ([5, 6, 7, embed], [1, 1, 1, 1]),
        (5, embed, 7, 8): ([5, embed], [1, 1]),  # by a server that does not know where to stop
        (5, end, embed): ([5, embed], [1, 0]),
        (5, 6, 7, 8, embed): ([5, 6, 7, embed], [1, 1, 1, 0]),
    }
    for written, (ids, mask) in cases.items():
        said = [-0.5 - i for i in range(len(written))]
        [rollout] = complete(talker, [request], [SampledReply(written, said)])
        assert (rollout.completion_ids, rollout.completion_mask) == (ids, mask), written
        chosen = [value if kept else 0.0 for value, kept in zip(said, mask, strict=False)]
        assert rollout.sampler_logprobs == chosen
        assert [bool(value) for value in rollout.logprobs] == [bool(one) for one in mask]
        assert rollout.forced == (mask[-1] == 0)


def test_replies_that_cannot_be_used_are_named(talker: SearchR3) -> None:
    requests = requests_of(talker.backbone)[:1]
    with pytest.raises(RunError, match="reply 0 of the sampler stops after 2 tokens, without the embed token"):
        complete(talker, requests, [SampledReply([5, 6], [-1.0, -1.0])])
    with pytest.raises(RunError, match="3 tokens and 2 log-probabilities; it has to give one for each token"):
        complete(talker, requests, [SampledReply([5, 6, 7], [-1.0, -1.0])])
    with pytest.raises(RunError, match="gave 0 replies to 1 prompts"):
        complete(talker, requests, [])
    talker.backbone.model.get_input_embeddings().weight.data[5] = math.nan
    with pytest.raises(RunError, match="states are not finite in a reply"):
        complete(talker, requests, [SampledReply([5, talker.backbone.embed_token_id], [-1.0, -1.0])])


def test_tokens_count_by_how_much_likelier_they_are_here(
    model: SearchR3, collection: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = recipe(sampler={"importance_cap": 1.5})
    environment, batch = experience(model, collection, settings)
    monkeypatch.setattr(Engine, "clip", lambda self, norm: 0.0)
    monkeypatch.setattr(Engine, "step", lambda self: None)
    engine = make_engine(model, settings, settings.grpo)

    def update(shift: float, scale: float = 1.0) -> tuple[dict[str, float], torch.Tensor]:
        """Where the sampler gave every token a probability lower by that factor."""
        replies = [replace(one, sampler_logprobs=[value - shift for value in one.logprobs]) for one in batch.rollouts]
        changed = replace(batch, rollouts=replies, advantages=scale * batch.advantages)
        model.backbone.model.zero_grad()
        return grpo.update(model, engine, environment, changed, settings.grpo), gradients(model)

    plain, expected = update(0.0)
    assert plain["importance_weight"] == pytest.approx(1) and plain["sampler_gap"] < 1e-5
    below, found = update(math.log(0.5))
    assert below["importance_weight"] == pytest.approx(0.5), "half as likely here as at the sampler"
    assert torch.allclose(found, 0.5 * expected, atol=1e-6)
    assert below["sampler_gap"] == pytest.approx(math.log(2), abs=1e-4) and below["clipped_share"] == 0
    above, found = update(math.log(4.0))
    assert above["importance_weight"] == pytest.approx(1.5), "capped"
    assert torch.allclose(found, update(0.0, 1.5)[1], atol=1e-6)


# A server


@pytest.mark.parametrize("side", [None, 0, 2])
def test_the_whole_of_stage_2_equals_that_of_the_own_decoder(
    talker_path: Path, collection: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side: int | None
) -> None:
    """From a model with a query side, too: whole weights, or adapters of rank 2."""
    settings = {"queries_per_step": 3, "group_size": 3, "steps": 3, "evaluate_every": 0, "learning_rate": 1e-2}
    settings |= {"warmup_steps": 0, "splits": ["train"], "refresh": {"policy": "never"}}
    common: dict[str, Any] = {"max_length": 120, "max_new_tokens": 6}
    begin = talker_path
    if side is not None:
        trained_before = load_backbone(talker_path, max_length=120, max_new_tokens=6)
        trained_before.settings = trained_before.settings.model_copy(update={"trained": True})
        trained_before.save(tmp_path / "stage-1")
        common |= {"lora": {"rank": side}}
        settings |= {"documents": "frozen", "kl_coefficient": 0.0}
        where = {"run_dir": tmp_path / "side", "model": tmp_path / "stage-1", "collection": collection}
        begin = train_grpo(common | {"grpo": settings}, **where).model_path
        assert (begin / "queries").exists()

    def train(name: str, **sampler: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, torch.Tensor]]:
        values = common | {"grpo": settings | {"sampler": sampler}}
        result = train_grpo(values, run_dir=tmp_path / name, model=begin, collection=collection)
        rows = [json.loads(line) for line in (tmp_path / name / "rollouts.jsonl").read_text().splitlines()]
        return rows, result.log_history, SearchR3(result.model_path).backbone.model.state_dict()

    rows, history, weights = train("local")
    assert {row["forced"] for row in rows} == {True, False} and len({row["reasoning"] for row in rows}) > 3
    kinds: tuple[Kind, ...] = ("vllm", "sglang")
    for kind in kinds:
        with running(talker_path, monkeypatch, kind) as server:
            others, values, trained = train(kind, url=server.url, reload=kind)
            paths = {path for path, _ in server.calls}
            [kept] = (tmp_path / kind / "sampler").glob("*")
        assert paths - {"/v1/models", "/v1/completions"} == (
            {"/collective_rpc", "/reset_prefix_cache"} if kind == "vllm" else {"/update_weights_from_disk"}
        )
        assert kept.name == "weights-000002", "weights that were read are dropped"
        for other, row in zip(others, rows, strict=True):
            for name in ("query", "reasoning", "reasoning_tokens", "forced", "best_rank"):
                assert other[name] == row[name], (kind, name)
            assert other["reward"] == pytest.approx(row["reward"], abs=1e-4)
        for other, step in zip(values, history, strict=True):
            assert other["sampler_gap"] < 1e-4 and other["importance_weight"] == pytest.approx(1, abs=1e-4)
            assert other["loss"] == pytest.approx(step["loss"], abs=1e-4)
        for name, value in weights.items():
            assert torch.allclose(trained[name], value, atol=1e-3), name
        assert len(server.bodies()) == 3 * 3 * 3


def test_a_request_asks_for_the_plain_distribution_and_for_ids(
    talker: SearchR3, talker_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(talker_path, monkeypatch) as server:
        monkeypatch.setenv("OUR_KEY", "sk-1")
        sampler = endpoint_of(server, talker, tmp_path, api_key_variable="OUR_KEY")
        requests = requests_of(talker.backbone, temperature=0.7)
        replies = sampler.sample(requests)
        bodies = server.bodies()
    assert {one["authorization"] for one in server.headers} == {"Bearer sk-1"}
    embed, ends = talker.backbone.embed_token_id, talker.backbone.prompt_encoder.end_token_ids
    for body in bodies:
        [request] = [one for one in requests if one.seed == body["seed"]]
        assert body["prompt"] == request.prompt_ids and body["max_tokens"] == 6 and body["temperature"] == 0.7
        assert set(body["stop_token_ids"]) == {embed, *ends} and body["return_token_ids"] is True
        assert body["top_k"] == -1 and body["top_p"] == body["repetition_penalty"] == 1.0
        assert body["min_p"] == body["presence_penalty"] == body["frequency_penalty"] == 0.0
    for rollout, expected in zip(
        complete(talker, requests, replies), Decoder(talker.backbone).run(requests), strict=True
    ):
        assert rollout.completion_ids == expected.completion_ids
        assert rollout.sampler_logprobs == pytest.approx(expected.logprobs, abs=1e-4)


def test_a_server_without_new_weights_is_warned_of(
    talker: SearchR3,
    talker_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with running(talker_path, monkeypatch) as server, caplog.at_level(logging.WARNING):
        endpoint_of(server, talker, tmp_path)
        assert "reload=none" in caplog.text and "grow stale" in caplog.text
        assert [path for path, _ in server.calls] == ["/v1/models"]
        caplog.clear()
        sampler = endpoint_of(server, talker, tmp_path, reload="vllm", reload_every=2)
        assert not caplog.text
        for version in (1, 2, 3, 4):
            sampler.update(weights_of(talker, version=version))
        assert len(server.bodies("/collective_rpc")) == 3, "0, 2 and 4"


def test_adapters_alone_are_loaded_under_a_name_of_their_own(
    talker: SearchR3, talker_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = recipe().model_copy(update={"lora": load_recipe(None, ["lora.rank=2"]).lora})
    weights = weights_of(talker, settings)
    torch.manual_seed(5)
    for name, parameter in talker.backbone.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    with running(talker_path, monkeypatch) as server:
        sampler = EndpointSampler(SamplerSettings(url=server.url, reload="vllm_adapter"), tmp_path, 4)
        for version in (0, 1):
            sampler.update(replace(weights, version=version))
        requests = requests_of(talker.backbone)
        rollouts = complete(talker, requests, sampler.sample(requests))
        assert {body["model"] for body in server.bodies()} == {"search-r3"}
        assert len(server.bodies("/v1/unload_lora_adapter")) == len(server.bodies("/v1/load_lora_adapter")) == 2
    for rollout in rollouts:
        assert rollout.sampler_logprobs == pytest.approx(rollout.logprobs, abs=1e-4), "the adapters have an effect"
    base = complete(SearchR3(talker_path), requests, [SampledReply(r.completion_ids, r.logprobs) for r in rollouts])
    assert base[0].logprobs != pytest.approx(rollouts[0].logprobs, abs=1e-3)
    named = pytest.raises(ConfigError, match=r"lora.rank is 0; have whole models loaded")
    with running(talker_path, monkeypatch) as server, named:
        endpoint_of(server, SearchR3(talker_path), tmp_path, reload="vllm_adapter")


def say(answer: Answer) -> Any:
    return lambda path, body, regular: answer if path == "/v1/completions" else regular


def choose(**changes: Any) -> Any:
    """The regular answer with another choice in it."""

    def answer(path: str, body: dict[str, Any], regular: Answer) -> Answer:
        if path != "/v1/completions":
            return regular
        [choice] = regular[1]["choices"]
        return 200, regular[1] | {"choices": [choice | changes]}

    return answer


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (say((404, {"error": {"message": "The model `x` does not exist."}})), r"404 \(The model `x` does not exist"),
        (say((400, {"object": "error", "message": "too long"})), r"400 \(too long\); it has to take prompts"),
        (say((401, {"error": "Unauthorized: sk-1"})), r"401 \(Unauthorized: \*\*\*\); put its key into"),
        (say((500, "Internal Server Error")), r"HTTP 500 \(Internal Server Error\); look at the server's own messages"),
        (say((200, "<html>")), "something else than JSON: '<html>'"),
        (say((200, {"choices": []})), "gave no completion"),
        (choose(token_ids=None), "a completion without token ids.*return_token_ids"),
        (choose(logprobs=None), "a completion without log-probabilities"),
        (choose(prompt_token_ids=[1, 2]), "changed the prompt: .* and 2 read"),
        (choose(finish_reason="abort"), r"broke a reply off \(finish_reason 'abort'\)"),
    ],
)  # fmt: skip
def test_what_a_server_does_wrong_is_one_clear_error(
    answer: Any, message: str, talker: SearchR3, talker_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(talker_path, monkeypatch) as server:
        monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
        sampler = endpoint_of(server, talker, tmp_path)
        server.answer = answer
        with pytest.raises(RunError, match=message):
            sampler.sample(requests_of(talker.backbone)[:1])


def test_a_server_that_is_busy_is_asked_again_and_one_that_hangs_is_left(
    talker: SearchR3, talker_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(talker_path, monkeypatch) as server:
        sampler = endpoint_of(server, talker, tmp_path)
        faults = iter([(503, "busy"), (429, "slower")])
        server.answer = lambda path, body, regular: next(faults, regular)
        request = requests_of(talker.backbone)[0]
        [reply] = sampler.sample([request])
        assert complete(talker, [request], [reply])[0].completion_ids and len(server.bodies()) == 3
        server.answer = lambda path, body, regular: time.sleep(0.2) or regular  # type: ignore[func-returns-value]
        slow = EndpointSampler(SamplerSettings(url=server.url, timeout=1.0, retries=0), tmp_path, 4)
        slow._settings = SamplerSettings(url=server.url, timeout=0.05, retries=1)
        with pytest.raises(RunError, match=r"no answer within 0.05 s; raise grpo.sampler.timeout"):
            slow.sample([request])
    with pytest.raises(RunError, match=r"cannot be reached .*; start the server, or mend grpo.sampler.url"):
        sampler.sample([request])
    with pytest.raises(ConfigError, match=r"grpo.sampler: .*/v1/models cannot be reached"):
        EndpointSampler(SamplerSettings(url=server.url, retries=0), tmp_path, 4)


def test_a_reload_that_fails_is_named(
    talker: SearchR3, talker_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures: list[tuple[Kind, str, Answer, str]] = [
        ("vllm", "/collective_rpc", (404, {"detail": "Not Found"}), "404 .*; start it with VLLM_SERVER_DEV_MODE"),
        ("vllm", "/reset_prefix_cache", (200, {"success": False}), "was refused, and prompts would keep states"),
        ("sglang", "/update_weights_from_disk", (200, {"success": False, "message": "other shapes"}), "other shapes"),
    ]  # fmt: skip
    for kind, route, wrong, message in failures:
        with running(talker_path, monkeypatch, kind) as server:
            server.answer = lambda path, body, regular, at=route, say=wrong: say if path == at else regular
            with pytest.raises(RunError, match=message):
                endpoint_of(server, talker, tmp_path, reload=kind)


def test_the_servers_model_is_found_by_its_name(
    talker_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(talker_path, monkeypatch) as server:
        for address in (server.url, server.url.removesuffix("/v1"), f"{server.url}/completions"):
            assert EndpointSampler(SamplerSettings(url=address), tmp_path, 4)._model == "trained"
        with pytest.raises(ConfigError, match=r"has the models trained, and sampler.model is 'other'; set it"):
            EndpointSampler(SamplerSettings(url=server.url, model="other"), tmp_path, 4)
        server.names["second"] = server.backbone
        with pytest.raises(ConfigError, match=r"has the models trained, second, and sampler.model names none"):
            EndpointSampler(SamplerSettings(url=server.url), tmp_path, 4)
        assert EndpointSampler(SamplerSettings(url=server.url, model="second"), tmp_path, 4)._model == "second"


# From Python


class Parrot:
    """Says the same to everyone, and remembers what it was given."""

    def __init__(self, embed: int) -> None:
        self.embed, self.versions, self.budgets = embed, list[int](), set[int]()

    def sample(self, requests: Sequence[DecodeRequest]) -> list[SampledReply | Rollout]:
        self.budgets |= {request.max_new_tokens for request in requests}
        return [SampledReply([5 + i % 2, self.embed], [-0.7, -0.1]) for i, _ in enumerate(requests)]

    def update(self, weights: PolicyWeights) -> None:
        self.versions.append(weights.version)
        assert "lm_head.weight" in weights.state_dict()


def test_a_sampler_of_ones_own_writes_the_rollouts(talker_path: Path, collection: Collection, tmp_path: Path) -> None:
    parrot = Parrot(SearchR3(talker_path).backbone.embed_token_id)
    section = GRPOSettings(queries_per_step=2, group_size=2, steps=2, evaluate_every=0, splits=("train",))
    settings = Recipe(max_length=120, max_new_tokens=6, grpo=section)
    where = {"run_dir": tmp_path / "run", "model": talker_path, "collection": collection}
    result = train_grpo(settings, sampler=parrot, **where)  # type: ignore[arg-type]
    assert parrot.versions == [0, 1] and parrot.budgets == {6}
    assert result.metrics["reasoning_tokens"] == 1 and result.metrics["forced_share"] == 0
    assert result.metrics["sampler_gap"] > 0.1 and result.metrics["importance_weight"] != 1
    named = settings.model_copy(
        update={"grpo": section.model_copy(update={"sampler": SamplerSettings(url="http://h")})}
    )
    where["run_dir"] = tmp_path / "other"
    with pytest.raises(ConfigError, match=r"a sampler was given, and grpo.sampler.url=http://h names another"):
        train_grpo(named, sampler=parrot, **where)  # type: ignore[arg-type]
    at_once = settings.model_copy(update={"grpo": section.model_copy(update={"at_once": True})})
    where["run_dir"] = tmp_path / "at-once"
    with pytest.raises(ConfigError, match="which only the own decoder takes"):
        train_grpo(at_once, sampler=parrot, **where)  # type: ignore[arg-type]


def test_settings_that_name_no_server_are_refused() -> None:
    for override, message in {
        "grpo.sampler=http://h/v1": "sampler is a section; write sampler.url=http://h/v1",
        "grpo.sampler.reload=vllm": "reload=vllm tells a server of new weights, and url=null names none",
        "grpo.sampler.url=localhost": "grpo.sampler.url",
    }.items():
        with pytest.raises(ConfigError, match=message):
            load_recipe(None, [override])


def test_weights_for_a_server_are_stored_as_they_are_computed_with(talker: SearchR3, tmp_path: Path) -> None:
    weights = weights_of(talker)
    save_policy(weights.engine, talker.backbone, weights.recipe, tmp_path / "m", "bfloat16")
    saved = load_backbone(tmp_path / "m")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    own = talker.backbone.model.get_output_embeddings().weight
    assert torch.equal(saved.model.get_output_embeddings().weight, own.bfloat16().float())
