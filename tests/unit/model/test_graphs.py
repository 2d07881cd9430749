"""Decoding steps that are captured once and repeated, with a tape in the place of a GPU's graphs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from search_r3.config import LoRASettings
from search_r3.model.adapters import add_adapters
from search_r3.model.backbone import Backbone
from search_r3.model.engine import graphs
from search_r3.model.engine.attention import SlotAttention, SlotCache
from search_r3.model.engine.decoding import Decoder, DecodeRequest, Rollout
from tests.unit.model.test_decoding import assert_same, mixed_requests, prompt


class Tape(TorchDispatchMode):
    """As a CUDA graph: what was computed is computed again, with the numbers and the memory that it had."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        self.log.append((operation, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        for operation, args, kwargs, kept in self.log:
            taken = {one.untyped_storage().data_ptr() for one in tensors((args, kwargs))}
            for old, new in zip(tensors(kept), tensors(operation(*args, **kwargs)), strict=True):
                if old.untyped_storage().data_ptr() not in taken:  # neither a view nor the same tensor
                    old.copy_(new)


def tensors(values: Any) -> list[torch.Tensor]:
    return [one for one in tree_leaves(values) if isinstance(one, torch.Tensor)]


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Graphs are tapes; fills with the rows of each replay."""
    rows: list[int] = []

    def capture(step: Callable[[], torch.Tensor], where: Any) -> Callable[[], torch.Tensor]:
        with Tape() as tape:
            output = step()

        def replay() -> torch.Tensor:
            tape.replay()
            rows.append(len(output))
            return output

        return replay

    monkeypatch.setattr(graphs, "capture", capture)
    return rows


def alone(backbone: Backbone, requests: list[DecodeRequest]) -> list[Rollout]:
    backbone.graphs = False
    rollouts = [Decoder(backbone, 1).run([request])[0] for request in requests]
    backbone.graphs = True
    return rollouts


@pytest.mark.parametrize(("slots", "look_every"), [(1, 1), (3, 4), (100, 8)])
def test_steps_that_are_repeated_give_what_a_request_gets_alone(
    backbone: Backbone, replays: list[int], slots: int, look_every: int
) -> None:
    requests = mixed_requests(backbone)
    expected = alone(backbone, requests)
    decoder = Decoder(backbone, slots, look_every)
    for turn in (requests, requests[::-1]):
        found = decoder.run(turn)
        for one, other in zip(found, expected if turn is requests else expected[::-1], strict=True):
            assert_same(one, other)
    assert len(replays) > 10
    assert set(replays) <= {1, 2, 3, 4, 8, 15}, "rounded up, to as many as there are slots"


def test_replies_that_grow_take_more_keys(backbone: Backbone, replays: list[int]) -> None:
    requests = [DecodeRequest(prompt(backbone, place), 150, 1.0, seed=place) for place in range(3)]
    expected = alone(backbone, requests)
    decoder = Decoder(backbone, 3, 8)
    for one, other in zip(decoder.run(requests), expected, strict=True):
        assert_same(one, other)
    kept: Any = decoder._engine
    assert len(kept._graphs._replays) >= 2


def test_what_has_moved_is_captured_anew(backbone: Backbone, replays: list[int]) -> None:
    requests = [DecodeRequest(prompt(backbone, 0), 12), DecodeRequest(prompt(backbone, 1), 20)]
    backbone.graphs = True
    decoder = Decoder(backbone, 2, 4)
    decoder.run(requests)
    kept: Any = decoder._engine
    first = kept._graphs
    decoder.run(requests)
    assert kept._graphs is first
    expected = alone(backbone, requests)
    for weight in backbone.model.parameters():
        before, weight.data = weight.data, weight.data.clone()
        before.fill_(float("nan"))
    for one, other in zip(decoder.run(requests), expected, strict=True):
        assert_same(one, other)
    second = kept._graphs
    assert second is not first
    longer = [DecodeRequest(prompt(backbone, 2), 60)]
    assert_same(decoder.run(longer)[0], alone(backbone, longer)[0])
    assert kept._graphs is not second, "the cache has grown"


@pytest.mark.parametrize("how", ["fails", "differs"])
def test_without_graphs_that_work_decoding_goes_on(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    def capture(step: Callable[[], torch.Tensor], where: Any) -> Callable[[], torch.Tensor]:
        if how == "fails":
            raise RuntimeError("operation not permitted when stream is capturing\nmore of it")
        return lambda: 2 * step()

    monkeypatch.setattr(graphs, "capture", capture)
    requests = mixed_requests(backbone)
    expected = alone(backbone, requests)
    with caplog.at_level(logging.WARNING):
        for one, other in zip(Decoder(backbone, 3, 4).run(requests), expected, strict=True):
            assert_same(one, other)
    [said] = [record.getMessage() for record in caplog.records if "CUDA graphs" in record.getMessage()]
    assert ("not permitted when stream is capturing" if how == "fails" else "its states are off by") in said


def test_models_that_are_not_driven_or_bring_numbers_with_every_pass_are_not_captured(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert graphs.can_capture(backbone.causal_lm)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not graphs.can_capture(backbone.causal_lm)
    with monkeypatch.context() as patch:
        patch.setattr(backbone.causal_lm.config, "model_type", "gemma3_text")
        assert not graphs.can_capture(backbone.causal_lm)
    add_adapters(backbone, LoRASettings(rank=2))
    assert not graphs.can_capture(backbone.causal_lm), "the embed token's row is a trained one"


@pytest.mark.parametrize("window", [None, 3, 100])
@pytest.mark.parametrize("lengths", [[4, 9, 7], [5, 5], [6]])
def test_keys_that_nobody_has_written_are_not_seen(lengths: list[int], window: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    caches = [SlotCache(torch.zeros(1, 2, 2, 1, 8)) for _ in range(2)]
    held = torch.randn(1, 2, 4, 2, 32, 8, generator=generator)
    query, key, value = (torch.randn(len(lengths), heads, 1, 8, generator=generator) for heads in (4, 2, 2))
    found = []
    for cache, (keys, known) in zip(caches, ((max(lengths) + 1, lengths), (32, None)), strict=True):
        cache.values = held.clone()
        attention = SlotAttention(cache, torch.tensor(lengths), keys, known)
        found.append((attention(0, query, key, value, 0.3, window), cache.values))
    torch.testing.assert_close(found[1][0], found[0][0], atol=1e-6, rtol=1e-6)
    assert torch.equal(found[1][1], found[0][1]), "what is written is the same"
