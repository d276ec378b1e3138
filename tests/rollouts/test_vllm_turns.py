"""Conversations of several turns whose turns come from servers: ids as the servers gave them, masks, log-probabilities, a lost server."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from posttrain.data.tokens import TextEncoder, Tokens
from posttrain.environments.base import Conversation
from posttrain.models.inference import token_logprobs
from posttrain.models.policy import Policy
from posttrain.models.tiny import byte_tokenizer
from posttrain.rollouts.engine import Completion, Engine, Request, SamplingSettings
from posttrain.rollouts.native import NativeEngine
from posttrain.rollouts.turns import TurnEngine, Turns
from posttrain.rollouts.vllm import VllmEngine
from posttrain.rollouts.vllm.probe import sequences
from posttrain.rollouts.vllm.server import VllmServer
from tests.rollouts.served import Setup

ENDS = tuple(range(60, 300))
"""Enough tokens that turns end by themselves."""
PROMPT = (5, 6, 7)


def more(conversation: Conversation) -> list[dict[str, Any]] | None:
    return [{"role": "user", "content": "more"}] if conversation.turn < 3 else None


def conversations(engine: Engine, temperature: float) -> list[Completion]:
    """Return six conversations of up to three turns."""
    turns = TurnEngine(engine, TextEncoder(byte_tokenizer(64), 64), Turns(more, limit=3))
    request = Request(PROMPT, tuple((3, j) for j in range(6)), "say")
    (answers,) = turns.sample([request], SamplingSettings(7, temperature))
    return answers


def served(setup: Setup, folder: Path) -> VllmEngine:
    return VllmEngine(
        setup.policy,
        ENDS,
        [VllmServer(peer.url) for peer in setup.peers],
        version=lambda: setup.version,
        folder=folder,
        probes=sequences([PROMPT], setup.policy.config.vocab_size, 64),
        patience_seconds=2.0,
    )


def test_greedy_conversations_are_those_of_the_native_engine(start: Callable[..., Setup], tmp_path: Path) -> None:
    setup = start()
    native = conversations(NativeEngine(setup.policy, ENDS), 0.0)
    found = conversations(served(setup, tmp_path / "weights"), 0.0)
    assert [(a.tokens, a.weights, a.finished) for a in found] == [(a.tokens, a.weights, a.finished) for a in native]
    assert {len(a.messages) for a in found} == {5}


def test_a_server_is_asked_with_the_ids_that_servers_gave_and_log_probabilities_are_those_of_one_pass(
    start: Callable[..., Setup], tmp_path: Path
) -> None:
    setup = start(servers=2)
    answers = conversations(served(setup, tmp_path / "weights"), 1.0)
    several = [a for a in answers if len(a.messages) > 1]
    assert len(several) >= 3
    asked = {tuple(body["prompt"]) for peer in setup.peers for body in peer.asked}
    for answer in several:
        sampled = np.asarray(answer.weights)
        starts = np.flatnonzero(np.diff(sampled) == 1) + 1
        assert all((*PROMPT, *answer.tokens[:place]) in asked for place in starts)
    rows = [Tokens(PROMPT, a.tokens, weights=a.weights) for a in answers]
    for answer, numbers in zip(answers, token_logprobs(Policy(setup.policy), rows, 1000), strict=True):
        assert numbers.logprobs == pytest.approx(np.asarray(answer.logprobs), abs=1e-5)


def test_a_server_that_is_lost_between_two_turns_changes_no_conversation(
    start: Callable[..., Setup], tmp_path: Path
) -> None:
    setup = start(servers=2)
    whole = conversations(served(setup, tmp_path / "whole"), 1.0)
    lost, refused = setup.peers[1], list[int]()

    def hangs_up(number: int) -> tuple[int, Any] | None:
        prompt = tuple(lost.asked[-1]["prompt"])
        if prompt[: len(PROMPT)] != PROMPT or len(prompt) == len(PROMPT):
            return None  # a first turn, or a probe of the weights
        refused.append(number)
        return 0, None

    lost.faults = hangs_up
    again = conversations(served(setup, tmp_path / "again"), 1.0)
    assert refused
    assert [a.tokens for a in again] == [a.tokens for a in whole]
