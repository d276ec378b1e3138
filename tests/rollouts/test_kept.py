"""Turns that continue kept keys and values: the same samples as turns that compute the whole conversation, from fewer tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from posttrain.data.tokens import TextEncoder
from posttrain.environments.base import Conversation
from posttrain.models.tiny import byte_tokenizer
from posttrain.rollouts.decoder import Decoder, decoder_of
from posttrain.rollouts.engine import Completion, Request, SamplingSettings
from posttrain.rollouts.kept import KeptStates, closed_up
from posttrain.rollouts.native import NativeEngine
from posttrain.rollouts.turns import TurnEngine, Turns
from tests.models import small
from tests.models.test_reach import model as windowed

ENDS = range(60, 300)
TURNS = 4


class WithoutKeeping:
    """A native engine that computes every prompt whole."""

    def __init__(self, engine: NativeEngine) -> None:
        self.engine = engine

    def sample(self, requests: Sequence[Request], settings: SamplingSettings) -> list[list[Completion]]:
        return self.engine.sample(requests, settings)


def replies(conversation: Conversation) -> list[dict[str, Any]]:
    return [{"role": "user", "content": "more" + "!" * (3 * conversation.turn)}]


def conversations(engine: Any, asked: Sequence[str] = ("say", "say it again", "so"), samples: int = 3) -> Any:
    encoder = TextEncoder(byte_tokenizer(256), 256)
    requests = [
        Request(tuple(encoder.prompt(text)), tuple((i, j) for j in range(samples)), text)
        for i, text in enumerate(asked)
    ]
    turns = TurnEngine(engine, encoder, Turns(replies, limit=TURNS))
    return [answer for group in turns.sample(requests, SamplingSettings(9, 1.0)) for answer in group], requests


def assert_same(found: list[Completion], expected: list[Completion]) -> None:
    assert [a.tokens for a in found] == [a.tokens for a in expected]
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)


def prefilled(engine: NativeEngine) -> int:
    assert isinstance(engine.decoder, Decoder)
    return engine.decoder.prefilled_tokens


@pytest.mark.parametrize("make", [small.language_model, lambda: small.language_model(shape=small.MOE)])
def test_a_turn_computes_only_its_new_tokens_and_draws_the_same(make: Any) -> None:
    lm = make()
    kept, whole = NativeEngine(lm, ENDS), NativeEngine(lm, ENDS)
    found, requests = conversations(kept)
    assert_same(found, conversations(WithoutKeeping(whole))[0])
    assert sum(len(a.messages) for a in found) > 2 * len(found), "the conversations must have several turns"
    # by hand: each prompt once, then for each later turn the reply's tokens and the end token before them, which was only drawn
    new = sum(len(a.tokens) - a.sampled + sum(m["role"] == "user" for m in a.messages) for a in found)
    assert prefilled(kept) == sum(len(r.prompt) for r in requests) + new
    assert prefilled(whole) > 2 * prefilled(kept)


def test_padded_attention_and_bfloat16_continue_as_well() -> None:
    lm = small.language_model()
    engine = NativeEngine(lm, ENDS)
    engine.decoder = Decoder(lm, shared=False)
    found, _ = conversations(engine)
    assert_same(found, conversations(WithoutKeeping(NativeEngine(lm, ENDS)))[0])
    bf16 = NativeEngine(lm, ENDS, bf16=True)
    assert [len(a.logprobs) == len(a.tokens) for a in conversations(bf16)[0]] == [True] * 9
    assert prefilled(bf16) < prefilled(engine) * 1.5


def test_what_has_no_room_is_computed_whole() -> None:
    lm = small.language_model()
    engine = NativeEngine(lm, ENDS, max_tokens=400)
    found, _ = conversations(engine)
    whole = NativeEngine(lm, ENDS)
    assert_same(found, conversations(WithoutKeeping(whole))[0])
    ample = NativeEngine(lm, ENDS)
    conversations(ample)
    assert prefilled(ample) < prefilled(engine) < prefilled(whole)


def test_equal_conversations_share_states_and_nothing_is_kept_afterwards() -> None:
    lm = small.language_model()
    engine = NativeEngine(lm, ENDS)
    encoder = TextEncoder(byte_tokenizer(256), 256)
    request = Request(tuple(encoder.prompt("say")), ((0,), (1,), (2,)), "say")
    turns = TurnEngine(engine, encoder, Turns(replies, limit=TURNS))
    ((first, *others),) = turns.sample([request], SamplingSettings(9, 0.0))
    assert {a.tokens for a in others} == {first.tokens}
    assert len(first.messages) >= 3
    assert engine._kept is None
    before = prefilled(engine)
    engine.sample([request], SamplingSettings(9, 0.0))
    assert prefilled(engine) == before + len(request.prompt)


def test_a_model_with_a_window_computes_whole_turns() -> None:
    lm = windowed("mistral", sliding_window=8)
    decoder = decoder_of(lm, bf16=False)
    assert isinstance(decoder, Decoder)
    assert decoder.reach is None
    assert not decoder.continues()


def test_a_model_whose_continued_logits_differ_computes_whole_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = small.language_model()
    decoder = Decoder(lm, shared=True)
    forward = type(lm.base_model).forward

    def misplaced(self: Any, *args: Any, position_ids: Any = None, **kwargs: Any) -> Any:
        several = position_ids is not None and position_ids.shape[1] > 1
        return forward(self, *args, position_ids=0 * position_ids if several else position_ids, **kwargs)

    assert Decoder(lm, shared=True).continues()
    monkeypatch.setattr(type(lm.base_model), "forward", misplaced)
    assert not decoder.continues()
    with decoder.decoding(), pytest.raises(ValueError, match="logits by slots differ"):
        decoder.check_continued()


def test_columns_close_up_behind_what_is_known() -> None:
    # two rows with 1 and 3 known columns of 3, and two new ones each
    keys = torch.tensor([[10.0, 0, 0, 11, 12], [20, 21, 22, 23, 24]])[:, None, :, None]
    found, same = closed_up((keys, keys + 100), torch.tensor([1, 3]), longest=3, new=2)
    assert found[0, 0, :3, 0].tolist() == [10, 11, 12]
    assert found[1, 0, :, 0].tolist() == [20, 21, 22, 23, 24]
    assert same[0, 0, :3, 0].tolist() == [110, 111, 112]


def test_states_are_dropped_with_their_last_use() -> None:
    kept, states = KeptStates(max_tokens=6), (torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 3, 2))
    assert kept.add((1, 2, 3), states)
    assert kept.add((4, 5, 6), states)
    assert not kept.add((7,), states)
    kept.expect([((1, 2, 3, 9, 9), 4), ((1, 2, 3, 9, 9), 4), ((8, 8), 2)])
    assert kept.tokens == 3
    assert [kept.holds(p) for p in ((1, 2, 3, 9, 9), (4, 5, 6, 9), (8, 8))] == [True, False, False]
    assert kept.take((1, 2, 3, 9, 9)) is states
    assert kept.holds((1, 2, 3, 9, 9))
    kept.take((1, 2, 3, 9, 9))
    assert kept.tokens == 0
    assert not kept.holds((1, 2, 3, 9, 9))
