from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from search_r3 import SearchR3
from search_r3.errors import ConfigError, ModelError
from search_r3.model.backbone import Backbone
from search_r3.model.embeddings import QueryEmbeddings
from search_r3.model.engine.attention import SlotCache
from search_r3.model.engine.decoding import Decoder, DecodeRequest, Rollout
from search_r3.model.engine.sampling import Chooser, Sampling, choose_tokens
from tests.conftest import favour

TEXTS = ["where is the red house?", "river", "a black horse and a white chair", "the green lamp"]


@pytest.fixture
def quiet(backbone: Backbone) -> Backbone:
    """A model that never ends a reply by itself, so that budgets are lengths."""
    favour(backbone, backbone.embed_token_id, -1e9)
    backbone.causal_lm.get_output_embeddings().bias.data[backbone.prompt_encoder.end_token_id] = -1e9
    return backbone


def prompt(backbone: Backbone, place: int, kind: str = "reason") -> list[int]:
    return backbone.prompt_encoder.encode(TEXTS[place % len(TEXTS)], kind).ids  # type: ignore[arg-type]


def choose(
    logits: torch.Tensor, temperatures: list[float], top_p: list[float], draws: list[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    sampling = Sampling.of(temperatures, top_p, torch.device("cpu"))
    return choose_tokens(logits, sampling, torch.tensor(draws, dtype=torch.float64))


def computed_tokens(backbone: Backbone) -> list[int]:
    """Fills with the number of tokens of every forward pass from now on."""
    counts: list[int] = []
    backbone.causal_lm.base_model.embed_tokens.register_forward_hook(
        lambda module, inputs, output: counts.append(inputs[0].numel())
    )
    return counts


def assert_same(one: Rollout, other: Rollout) -> None:
    assert one.completion_ids == other.completion_ids
    assert one.completion_mask == other.completion_mask
    assert one.soft_tokens == other.soft_tokens
    np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)
    torch.testing.assert_close(one.vector, other.vector, atol=1e-5, rtol=1e-5)
    assert one.writes == pytest.approx(other.writes, abs=1e-5)


def mixed_requests(backbone: Backbone) -> list[DecodeRequest]:
    return [
        DecodeRequest(prompt(backbone, 0), 9),
        DecodeRequest(prompt(backbone, 1), 3, temperature=1.0, seed=5),
        DecodeRequest(prompt(backbone, 2, "direct"), 0),
        DecodeRequest(prompt(backbone, 0), 14, temperature=0.7, top_p=0.8, seed=6),
        DecodeRequest(prompt(backbone, 3), 1),
        DecodeRequest(prompt(backbone, 1), 5, temperature=1.0, seed=5),
        DecodeRequest(prompt(backbone, 1, "direct"), 0),
        DecodeRequest(prompt(backbone, 2), 2, temperature=2.0, seed=7),
        DecodeRequest(prompt(backbone, 0), 9, temperature=0.7, top_p=0.1, seed=8),
        DecodeRequest(prompt(backbone, 0, "latent"), 4, latent=True),
        DecodeRequest(prompt(backbone, 3, "latent"), 1, latent=True),
        DecodeRequest(prompt(backbone, 2, "latent"), 6, latent=True),
        DecodeRequest(prompt(backbone, 1), 7, first="own"),
        DecodeRequest(prompt(backbone, 3), 5, temperature=1.0, seed=9, first="text"),
        DecodeRequest(prompt(backbone, 0), 4, first="embed"),
    ]


@pytest.fixture(params=["fast", "fallback"])
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize(("slots", "look_every"), [(1, 1), (2, 1), (3, 1), (8, 1), (100, 1), (1, 8), (3, 3), (100, 8)])
def test_every_request_gets_what_it_would_get_alone(
    backbone: Backbone, slots: int, look_every: int, engine: str
) -> None:
    favour(backbone, backbone.embed_token_id, 1.0)
    requests = mixed_requests(backbone)
    alone = [Decoder(backbone, 1).run([request])[0] for request in requests]
    backbone.engine = engine  # type: ignore[assignment]
    decoder = Decoder(backbone, slots, look_every)
    for one, other in zip(alone, decoder.run(requests), strict=True):
        assert_same(one, other)
    for one, other in zip(alone, decoder.run(requests[::-1])[::-1], strict=True):
        assert_same(one, other)


class Waits(TorchDispatchMode):
    """Notes what would wait for a device: numbers read from it, or brought to it from a list."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operation.overloadpacket.__name__
        lists = name == "index" and any(one is not None and one.dtype == torch.bool for one in args[1])
        if lists or name in ("_local_scalar_dense", "nonzero", "lift_fresh", "masked_select"):
            self.seen.append(name)
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("seed", range(3))
def test_room_is_reserved_for_all_that_wait_and_all_in_work(
    quiet: Backbone, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """However many wait, without a look at each of them."""
    decoder, rng, tickets = Decoder(quiet, 3, look_every=4), random.Random(seed), list[int]()
    count = Decoder._room

    def checked(self: Decoder) -> tuple[int, int | None]:
        rows = [*self._rows, *self._waiting]
        longest = max(len(row.prompt) + row.request.max_new_tokens for row in rows)
        assert count(self) == (min(3, len(rows)), longest + 4)
        checks.append(len(rows))
        return count(self)

    checks: list[int] = []
    monkeypatch.setattr(Decoder, "_room", checked)
    for _ in range(12):
        tickets += [
            decoder.submit(DecodeRequest(prompt(quiet, rng.randrange(3)), rng.randint(1, 20), seed=0)) for _ in range(2)
        ]
        decoder.step()
        decoder.cancel(rng.choice(tickets))
    while len(decoder):
        decoder.step()
    assert max(checks) > 6 and not decoder._lengths and not decoder._wanted


def test_the_host_looks_once_per_several_tokens(quiet: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, lengths = Decoder(quiet, 3, look_every=8), list[int]()
    look = Chooser.look
    monkeypatch.setattr(Chooser, "look", lambda chooser: lengths.append(chooser.steps) or look(chooser))
    for place in range(3):
        decoder.submit(DecodeRequest(prompt(quiet, place), 41, temperature=0.8, top_p=0.9, seed=place))
    decoder.step()
    room = decoder._engine._cache.values.shape  # type: ignore[union-attr]
    decoder.step()
    waited: list[list[str]] = []
    for decoder.look_every in (8, 2):
        with Waits() as waits:
            decoder.step()
        waited.append(waits.seen)
    assert len(waited[0]) == len(waited[1]), "eight tokens wait for no more than two do"
    assert "lift_fresh" in waited[0], "what one look brings is seen"
    decoder.look_every = 8
    while len(decoder):
        decoder.step()
    assert lengths == [1, 8, 8, 2, 8, 8, 6]
    assert decoder._engine._cache.values.shape == room, "reserved once"  # type: ignore[union-attr]


@pytest.mark.parametrize("look_every", [1, 8])
def test_no_row_is_computed_beyond_the_context(quiet: Backbone, look_every: int) -> None:
    """Positions that are learned are a table, and those beyond it an error of the whole device."""
    ids = prompt(quiet, 0)
    full = DecodeRequest([*ids * 9][: quiet.context_length - 2], 2)
    places: list[int] = []
    quiet.causal_lm.base_model.rotary_emb.register_forward_hook(
        lambda module, inputs, output: places.append(int(inputs[1].max()))
    )
    Decoder(quiet, 2, look_every).run([full, DecodeRequest(ids, 30)])
    assert max(places) == quiet.context_length - 1


@pytest.mark.parametrize("look_every", [1, 3, 8])
def test_a_reply_whose_states_become_other_than_finite_ends_there(
    quiet: Backbone, look_every: int, engine: str
) -> None:
    requests = [DecodeRequest(prompt(quiet, i), 12, temperature=1.0, seed=i) for i in range(3)]
    good = Decoder(quiet).run(requests)
    reply = good[1].completion_ids
    others = {token for one in good for token in (*one.prompt_ids, *(one.completion_ids if one is not good[1] else []))}
    place = next(i for i, token in enumerate(reply) if i > 1 and token not in (*others, *reply[:i]))
    with torch.no_grad():
        table = quiet.causal_lm.get_input_embeddings()
        table.weight = torch.nn.Parameter(table.weight.clone())  # the output layer's stays whole
        table.weight[reply[place]] = float("nan")
    quiet.engine = engine  # type: ignore[assignment]
    decoder = Decoder(quiet, look_every=look_every)
    tickets, done = [decoder.submit(request) for request in requests], dict[int, Rollout]()
    while len(decoder):
        done.update(decoder.step())
    assert_same(done[tickets[0]], good[0])
    assert_same(done[tickets[2]], good[2])
    bad = done[tickets[1]]
    assert bad.completion_ids == [*reply[: place + 1], quiet.embed_token_id]
    assert bad.completion_mask == [*[1] * (place + 1), 0]
    assert bad.vector.isnan().all()


def test_a_direct_request_gives_the_vector_of_its_prompt(backbone: Backbone) -> None:
    ids = prompt(backbone, 2, "direct")
    [rollout] = Decoder(backbone).run([DecodeRequest(ids, 0)])
    torch.testing.assert_close(rollout.vector, backbone.embed([ids])[0].detach(), atol=1e-5, rtol=1e-5)
    assert (rollout.completion_ids, rollout.reasoning, rollout.reasoning_tokens, rollout.forced) == ([], "", 0, False)


def test_a_reasoning_prompt_without_a_budget_is_refused(model: SearchR3) -> None:
    for ask in (model.encode_query, lambda text, **options: list(model.stream_query(text, **options))):
        with pytest.raises(ConfigError, match="max_new_tokens=0: expected at least 1, for the embed token"):
            ask(TEXTS[0], max_new_tokens=0)  # type: ignore[operator]


def test_one_long_reply_does_not_hold_up_the_others(quiet: Backbone) -> None:
    decoder = Decoder(quiet, slots=2)
    long = decoder.submit(DecodeRequest(prompt(quiet, 0), 40))
    short = [decoder.submit(DecodeRequest(prompt(quiet, i), 4)) for i in range(6)]
    ended: list[int] = []
    steps = 0
    while len(decoder):
        ended += [ticket for ticket, _ in decoder.step()]
        steps += 1
    assert ended == [*short, long]
    # One step takes a request in and chooses its first token, then one per further token and one for the vector.
    assert steps == 41


def test_a_token_is_computed_once_and_the_vector_needs_no_second_pass(quiet: Backbone) -> None:
    quiet.prefixes.stop()
    counts = computed_tokens(quiet)
    ids = prompt(quiet, 0)
    [rollout] = Decoder(quiet).run([DecodeRequest(ids, 7)])
    assert counts == [len(ids), *[1] * 7]
    assert len(rollout.completion_ids) == 7


@pytest.mark.parametrize("slots", [16, 5])
def test_what_prompts_share_is_computed_once(quiet: Backbone, slots: int) -> None:
    """Groups of one prompt, also when a group does not fit into the slots."""
    counts = computed_tokens(quiet)
    prompts = [prompt(quiet, place) for place in (0, 1) for _ in range(8)]
    requests = [DecodeRequest(ids, 3, temperature=1.0, seed=seed) for seed, ids in enumerate(prompts)]
    rollouts = Decoder(quiet, slots).run(requests)
    shared = len(quiet.prompt_encoder.prefix_of(prompts[0]))
    assert shared > 5
    decoded = sum(len(rollout.completion_ids) for rollout in rollouts)
    padding = abs(len(prompts[0]) - len(prompts[-1]))
    assert sum(counts) - decoded <= len(prompts[0]) + len(prompts[-1]) + padding
    assert len({tuple(rollout.completion_ids) for rollout in rollouts}) > 8, "each of a group goes its own way"


def test_prompts_are_kept_as_long_as_a_request_waits_for_them(quiet: Backbone, engine: str) -> None:
    quiet.engine = engine  # type: ignore[assignment]
    decoder = Decoder(quiet, slots=1)
    one, other = tuple(prompt(quiet, 0)), tuple(prompt(quiet, 1))
    tickets = [decoder.submit(DecodeRequest(ids, 4, 1.0, seed=seed)) for seed, ids in enumerate((one, one, other, one))]
    decoder.step()
    kept: Any = decoder._engine
    assert set(kept._prompts) == {one}
    decoder.cancel(tickets[1])
    assert set(kept._prompts) == {one}, "the last one waits for it"
    decoder.cancel(tickets[0])
    decoder.cancel(tickets[3])
    assert not kept._prompts and dict(decoder._wanted) == {other: 1}
    while len(decoder):
        decoder.step()
    assert not kept._prompts and not decoder._wanted
    with pytest.raises(ModelError, match="exceed the model's context"):
        decoder.run([DecodeRequest(one, 4), DecodeRequest(one, 4000)])
    assert not kept._prompts and not decoder._wanted


def test_rows_that_come_one_by_one_copy_the_cache_seldom() -> None:
    cache, sizes = SlotCache(torch.zeros(1, 2, 1, 4, 2)), list[int]()
    for count in range(1, 65):
        cache.reserve(count, 8, 64)
        sizes.append(cache.values.shape[2])
        assert count <= cache.values.shape[2] <= max(64, count)
    assert len(set(sizes)) <= 12, "it grows by a half each time, and not by one"
    cache.values[:, :, :64] = 1
    cache.reserve(66, 8, 64)
    assert cache.values.shape[2] == 66 and bool((cache.values[:, :, :64] == 1).all())


def test_cancelling_frees_the_slot_and_leaves_the_others(quiet: Backbone, engine: str) -> None:
    requests = [DecodeRequest(prompt(quiet, i), 6, temperature=1.0, seed=i) for i in range(5)]
    expected = [Decoder(quiet).run([request])[0] for request in requests]
    quiet.engine = engine  # type: ignore[assignment]
    decoder = Decoder(quiet, slots=2)
    tickets = [decoder.submit(request) for request in requests]
    decoder.step()
    decoder.step()
    assert [len(decoder.reply(ticket)) for ticket in tickets] == [2, 2, 0, 0, 0]
    assert decoder.cancel(tickets[0])
    assert decoder.cancel(tickets[3])
    assert not decoder.cancel(tickets[3])
    decoder.step()
    assert len(decoder.reply(tickets[2])) == 1, "a waiting request has taken the slot"
    done: dict[int, Rollout] = {}
    while len(decoder):
        done.update(decoder.step())
    assert sorted(done) == [tickets[i] for i in (1, 2, 4)]
    for place in (1, 2, 4):
        assert_same(done[tickets[place]], expected[place])
    assert not decoder.cancel(tickets[1]), "it has ended"
    assert decoder.step() == []


def test_a_decoder_serves_again_after_it_was_empty(quiet: Backbone, engine: str) -> None:
    quiet.engine = engine  # type: ignore[assignment]
    decoder = Decoder(quiet, slots=2)
    first = decoder.run([DecodeRequest(prompt(quiet, 0), 3), DecodeRequest(prompt(quiet, 1), 5)])
    later = decoder.run([DecodeRequest(prompt(quiet, i), 9) for i in (0, 1, 2)])
    assert_same(later[0], Decoder(quiet).run([DecodeRequest(prompt(quiet, 0), 9)])[0])
    assert_same(first[1], Decoder(quiet).run([DecodeRequest(prompt(quiet, 1), 5)])[0])


def test_progress_counts_requests_and_tokens(quiet: Backbone) -> None:
    seen: list[tuple[int, int]] = []
    budgets = [2, 5, 5, 3]
    Decoder(quiet, slots=2).run(
        [DecodeRequest(prompt(quiet, i), budget) for i, budget in enumerate(budgets)],
        lambda *counts: seen.append(counts),
    )
    assert (sum(done for done, _ in seen), sum(tokens for _, tokens in seen)) == (4, sum(budgets))


def test_streaming_gives_the_same_query_in_pieces(model: SearchR3) -> None:
    expected = model.encode_query([TEXTS[0]], max_new_tokens=12, sampling_temperature=1.0, seed=3)
    *pieces, last = model.stream_query(TEXTS[0], max_new_tokens=12, sampling_temperature=1.0, seed=3)
    assert isinstance(last, QueryEmbeddings)
    assert len(pieces) > 3
    assert "".join(map(str, pieces)) == expected.reasoning[0] == last.reasoning[0]
    np.testing.assert_allclose(last.vectors, expected.vectors, atol=1e-5)
    assert (last.reasoning_tokens, last.forced) == (expected.reasoning_tokens, expected.forced)
    [direct] = model.stream_query(TEXTS[0], "direct")
    np.testing.assert_allclose(np.asarray(direct), model.encode_query(TEXTS[0], "direct").vectors, atol=1e-5)


def test_closing_a_stream_stops_the_model(model: SearchR3) -> None:
    model.backbone.prefixes.stop()
    counts = computed_tokens(model.backbone)
    stream = model.stream_query(TEXTS[0], max_new_tokens=40, sampling_temperature=1.0, seed=3)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    passes = len(counts)
    assert passes < 10
    model.encode_document(["river"])
    assert len(counts) == passes + 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens of at least 0"),
        ({"max_new_tokens": 4, "temperature": 1.0}, "sampling needs a seed"),
        ({"max_new_tokens": 4, "temperature": -1.0, "seed": 1}, "temperature=-1.0"),
        ({"max_new_tokens": 4, "temperature": 1.0, "top_p": 0.0, "seed": 1}, "top_p=0.0"),
    ],
)
def test_requests_that_make_no_sense_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecodeRequest([1, 2], **options)  # type: ignore[arg-type]


@settings(deadline=None, max_examples=60)
@given(
    size=st.integers(1, 700),
    draw=st.floats(0, 1, exclude_max=True),
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
    top_p=st.sampled_from([1.0, 0.9, 0.3]),
    seed=st.integers(0, 1000),
)
def test_a_draw_picks_the_token_where_the_distribution_passes_it(
    size: int, draw: float, temperature: float, top_p: float, seed: int
) -> None:
    logits = 3 * torch.randn(2, size, generator=torch.Generator().manual_seed(seed))
    logits[0, torch.rand(size, generator=torch.Generator().manual_seed(seed)) < 0.3] = -1e9
    chosen, logprobs = choose(logits, [temperature] * 2, [top_p] * 2, [draw, draw])
    for row in range(2):
        probabilities = (logits[row].double() / temperature).softmax(-1)
        order = probabilities.sort(descending=True)
        inside = order.indices[(order.values.cumsum(-1) - order.values < top_p) | torch.tensor(top_p == 1)]
        nucleus = torch.zeros_like(probabilities)
        nucleus[inside] = probabilities[inside]
        upto = (nucleus / nucleus.sum()).cumsum(-1)
        token = int(chosen[row])
        # float32 weights against float64 ones: a draw at the very edge of two tokens may fall to either.
        assert (upto[token - 1] if token else 0) <= draw + 1e-5
        assert upto[token] >= draw - 1e-5
        assert nucleus[token] > 0 or (probabilities[probabilities > probabilities[token]].sum() - top_p).abs() < 1e-5
        assert logprobs[row].item() == pytest.approx(probabilities[token].log().item(), abs=1e-4)


def test_greedy_rows_take_the_likeliest_and_their_logprob_at_temperature_one() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [5.0, 0.0, 0.0]])
    chosen, logprobs = choose(logits, [0.0, 1.0], [1.0, 1.0], [0.0, 0.9999])
    assert chosen.tolist() == [1, 2]
    torch.testing.assert_close(logprobs, logits.log_softmax(-1)[[0, 1], [1, 2]])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("top_p", [1.0, 0.5])
def test_a_row_of_logits_that_are_not_finite_has_no_logprob_and_spoils_no_other(bad: float, top_p: float) -> None:
    logits = torch.tensor([[0.0, 1.0], [bad, 0.0], [0.0, 2.0]])
    tokens, logprobs = choose(logits, [0.0, 1.0, 1.0], [top_p] * 3, [0.5] * 3)
    assert logprobs.isnan().tolist() == [False, True, False]
    assert tokens[[0, 2]].tolist() == [1, 1]
    assert 0 <= tokens[1] < 2


def test_devices_without_float64_sample_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    class Elsewhere(torch.Tensor):
        """Logits that say they are on a Mac's GPU."""

        @property
        def device(self) -> torch.device:  # type: ignore[override]
            return torch.device("mps")

        def cpu(self) -> torch.Tensor:  # type: ignore[override]
            return logits

    logits = torch.randn(2, 300, generator=torch.Generator().manual_seed(0))
    expected = choose(logits, [1.0, 0.5], [0.9, 1.0], [0.3, 0.6])
    for one, two in zip(
        choose(logits.as_subclass(Elsewhere), [1.0, 0.5], [0.9, 1.0], [0.3, 0.6]), expected, strict=True
    ):
        assert type(one) is torch.Tensor
        assert torch.equal(one, two)


def reply_of(decoder: Decoder, request: DecodeRequest) -> list[int]:
    decoder.submit(request)
    while not (results := decoder.step()):
        pass
    return results[0][1].completion_ids


def spoil(backbone: Backbone, word: str) -> None:
    """Let every sequence that holds this word have states of NaN."""
    [*_, token] = backbone.tokenizer(f"red {word}", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        table = backbone.causal_lm.get_input_embeddings()
        table.weight = torch.nn.Parameter(table.weight.clone())  # the output layer's stays whole
        table.weight[token] = float("nan")


def test_a_request_with_states_that_are_not_finite_ends_alone(quiet: Backbone, engine: str) -> None:
    texts = ["the green lamp and the red house " * 2, TEXTS[3], TEXTS[1], TEXTS[0]]
    good = [DecodeRequest(quiet.prompt_encoder.encode(text, "reason").ids, 9) for text in texts]
    expected = [Decoder(quiet).run([request])[0] for request in good]
    spoil(quiet, "horse")
    quiet.engine = engine  # type: ignore[assignment]
    bad = DecodeRequest(quiet.prompt_encoder.encode("the horse and the green lamp", "reason").ids, 6, 1.0, seed=3)
    decoder = Decoder(quiet, slots=3)
    # The bad one is the last of the three, and a shorter one takes its place beside a longer one.
    tickets = [decoder.submit(request) for request in (good[0], good[1], bad, good[2], good[3])]
    done = dict(decoder.step())
    assert list(done) == [tickets[2]]
    assert done[tickets[2]].vector.isnan().all()
    assert (done[tickets[2]].completion_ids, done[tickets[2]].completion_mask) == ([quiet.embed_token_id], [0])
    while len(decoder):
        done.update(decoder.step())
    for ticket, rollout in zip([tickets[i] for i in (0, 1, 3, 4)], expected, strict=True):
        assert_same(done[ticket], rollout)


@pytest.mark.parametrize("look_every", [1, 8])
def test_a_reply_whose_vector_is_not_finite_leaves_nothing_in_its_slot(quiet: Backbone, look_every: int) -> None:
    texts = ["the green lamp and the red house " * 2, TEXTS[2], TEXTS[1]]
    prompts = [quiet.prompt_encoder.encode(text, "reason").ids for text in texts]
    requests = [DecodeRequest(ids, budget) for ids, budget in zip(prompts, (40, 3, 9), strict=True)]
    with torch.no_grad():
        table = quiet.causal_lm.get_input_embeddings()
        table.weight = torch.nn.Parameter(table.weight.clone())  # the output layer's stays whole
        table.weight[quiet.embed_token_id] = float("nan")
    texts_alone = [reply_of(Decoder(quiet), request) for request in requests]
    decoder = Decoder(quiet, 2, look_every)
    tickets, done = [decoder.submit(request) for request in requests], dict[int, Rollout]()
    while len(decoder):
        done.update(decoder.step())
    # The last one takes the slot of the second, beside the first, which has more keys than it writes.
    assert [done[ticket].completion_ids for ticket in tickets] == texts_alone
    assert all(done[ticket].vector.isnan().all() for ticket in tickets)


def test_a_run_that_fails_names_the_request_and_leaves_nothing_behind(quiet: Backbone) -> None:
    other = DecodeRequest(prompt(quiet, 0), 3)
    [expected] = Decoder(quiet).run([other])
    spoil(quiet, "horse")
    decoder = Decoder(quiet, slots=2)
    with pytest.raises(ModelError, match="not finite in request 1 of those given"):
        decoder.run([DecodeRequest(prompt(quiet, 1), 4), DecodeRequest(prompt(quiet, 2), 4)])
    with pytest.raises(ModelError, match="exceed the model's context"):
        decoder.run([DecodeRequest(prompt(quiet, 1), 4), DecodeRequest(prompt(quiet, 1), 400)])
    assert len(decoder) == 0
    assert_same(decoder.run([other])[0], expected)


def test_a_run_is_not_mixed_with_requests_of_others(quiet: Backbone) -> None:
    decoder = Decoder(quiet)
    decoder.submit(DecodeRequest(prompt(quiet, 0), 3))
    with pytest.raises(ValueError, match="1 requests are waiting or in work"):
        decoder.run([DecodeRequest(prompt(quiet, 1), 3)])
    assert len(decoder) == 1


def test_requests_wait_on_where_their_prompts_cannot_be_taken_in(
    quiet: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = Decoder(quiet)
    decoder.submit(DecodeRequest(prompt(quiet, 0), 3))
    for part in ("prompt_states", "admit"):
        with monkeypatch.context() as patch:
            patch.setattr(decoder._engine, part, lambda *arguments: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                decoder.step()
    assert len(decoder) == 1
    decoder.step()
    assert len(decoder.reply(1)) == 1


def test_a_prompt_that_does_not_fit_is_refused_before_anything_is_computed(backbone: Backbone) -> None:
    counts = computed_tokens(backbone)
    decoder = Decoder(backbone)
    with pytest.raises(ModelError, match="exceed the model's context of 256 tokens"):
        decoder.submit(DecodeRequest(prompt(backbone, 0), 250))
    assert counts == []
    assert len(decoder) == 0
