"""vLLM servers that fail, hang, die, come back or are replaced: small ones of the tests' own."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from itertools import count
from threading import Event, Timer
from typing import Any

import pytest

from posttrain.errors import RolloutError, ServerError
from posttrain.rollouts.engine import Request, SamplingSettings
from posttrain.rollouts.vllm import fleet
from tests.models import small
from tests.rollouts.peer import Peer
from tests.rollouts.served import PROMPTS, SETTINGS, Setup


def undisturbed(setup: Setup) -> list[list[tuple[int, ...]]]:
    """Return the policy's answers through an undisturbed server."""
    peer = Peer(small.language_model(seed=9)).start()
    other = Setup(setup.folder.with_name("undisturbed"), setup.policy, [peer])
    tokens = [[c.tokens for c in g] for g in other.sample()]
    peer.stop()
    return tokens


@pytest.mark.parametrize("fault", [(500, {"error": "engine dead"}), (0, None)], ids=["500", "hangs up"])
def test_a_single_failure_costs_a_retry_and_no_answer(start: Callable[..., Setup], fault: Any) -> None:
    setup = start()
    # the first four completions are the probe's
    setup.peers[0].faults = lambda number: fault if number == 7 else None
    assert [[c.tokens for c in g] for g in setup.sample()] == undisturbed(setup)
    # it was proven anew before it was asked again
    assert setup.peers[0].paths.count("/collective_rpc") == 2


def test_where_one_dies_the_others_take_over(start: Callable[..., Setup], capsys: pytest.CaptureFixture[str]) -> None:
    setup = start(servers=3)
    setup.peers[1].faults = lambda number: (0, None) if number > 5 else None
    assert [[c.tokens for c in g] for g in setup.sample()] == undisturbed(setup)
    assert "2 of 3 vLLM servers continue" in capsys.readouterr().err
    # and it rejoins when it answers again
    setup.peers[1].faults = lambda number: None
    setup.update()
    setup.sample()
    assert all(len(peer.asked) > 8 for peer in setup.peers)
    assert setup.engine.fleet.lost == {}


def test_when_none_is_left_the_run_stops_and_names_each(
    start: Callable[..., Setup], capsys: pytest.CaptureFixture[str]
) -> None:
    setup = start(servers=2)
    setup.sample()
    for peer in setup.peers:
        peer.stop()
    setup.update()
    with pytest.raises(ServerError) as caught:
        setup.sample()
    assert all(f"{peer.url} does not answer /health" in str(caught.value) for peer in setup.peers)
    assert "run the same command" in str(caught.value)
    # reported when it happens, and not after the wait
    assert "Connection refused); waiting up to 2 s for one" in capsys.readouterr().err


def test_servers_that_never_answered_are_not_waited_for(
    start: Callable[..., Setup], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fleet, "FIRST_PATIENCE_SECONDS", 0.01)
    setup = start()
    setup.peers[0].stop()
    # waited for like a server that may come back, it would take longer than the test may
    setup.engine = setup.new_engine(patience_seconds=3600)
    with pytest.raises(ServerError, match=r"no vLLM server is left .*Connection refused.*Start them again"):
        setup.sample()
    assert "waiting up to 0.01 s for one" in capsys.readouterr().err


def sent(field: str, values: Any) -> Callable[[dict[str, Any]], None]:
    """Return an edit of one field of a choice."""

    def edit(choice: dict[str, Any]) -> None:
        if field in choice:
            choice[field] = values(choice[field])

    return edit


GARBAGE: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "NaN for the prompt": (
        sent("prompt_logprobs", lambda old: [None, *({key: {"logprob": float("nan")} for key in e} for e in old[1:])]),
        "prompt_logprobs = [null, ",
    ),
    "nothing for the prompt": (sent("prompt_logprobs", lambda old: [None] * len(old)), "prompt_logprobs = [null, null"),
    "one number": (sent("token_ids", lambda old: 5), "token_ids = 5 in place of whole numbers from 0 to 258"),
    "fractions": (sent("token_ids", lambda old: [token + 0.5 for token in old]), "token_ids = ["),
    "foreign tokens": (sent("token_ids", lambda old: [10**6 for _ in old]), "token_ids = [1000000"),
    "too many": (sent("token_ids", lambda old: old * 9), "9 tokens with 1 log-probabilities"),
    "words": (sent("logprobs", lambda old: {"token_logprobs": ["x"]}), 'token_logprobs = ["x"]'),
    "above 0": (sent("logprobs", lambda old: {"token_logprobs": [1.0]}), "token_logprobs = [1.0]"),
}


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_is_neither_taken_for_the_policy_nor_trained_on(start: Callable[..., Setup], name: str) -> None:
    setup = start()
    setup.engine = setup.new_engine(patience_seconds=0)
    edit, words = GARBAGE[name]

    def garbles(number: int) -> tuple[int, Any]:
        choice = setup.peers[0].complete(setup.peers[0].asked[-1])
        edit(choice)
        return 200, {"choices": [choice]}

    setup.peers[0].faults = garbles
    with pytest.raises(ServerError, match=re.escape(words)):
        setup.sample()


def test_a_server_that_fails_for_good_is_not_asked_for_ever(start: Callable[..., Setup]) -> None:
    setup = start()
    probes = 4
    setup.peers[0].faults = lambda number: None if number % (probes + 1) else (500, {"error": "this prompt kills me"})
    with pytest.raises(ServerError, match="this prompt kills me"):
        setup.engine.sample([Request(PROMPTS[0], ((0,),))], SETTINGS)
    # at first, and once for each of three revivals
    assert len([body for body in setup.peers[0].asked if "stop_token_ids" in body]) == 4


def test_a_run_that_is_stopped_waits_for_no_server(start: Callable[..., Setup]) -> None:
    setup, answered, over = start(), Event(), list[int]()

    def hangs(number: int) -> Any:
        if number > 4:
            Timer(0.2, setup.engine.close).start()
            if not answered.wait(60):
                over.append(number)

    setup.peers[0].faults = hangs
    with pytest.raises(ServerError, match="the run is stopping"):
        setup.sample()
    assert not over, "a request outlived the stop"
    answered.set()


def test_a_server_that_makes_no_tokens_any_more_is_left_long_before_its_time_limit(start: Callable[..., Setup]) -> None:
    setup, over = start(servers=2), Event()
    hung, other = setup.peers
    made = count()
    hung.counted, other.counted = lambda: 7.0, lambda: float(next(made))
    hung.faults = lambda number: (0, None) if number > 4 and over.wait(300) else None
    for server in setup.engine.fleet.servers:
        server.look_seconds, server.stall_seconds = 0.1, 0.2
    try:
        assert [[c.tokens for c in g] for g in setup.sample()] == undisturbed(setup)
    finally:
        over.set()
    (error,) = setup.engine.fleet.lost.values()
    assert str(error).startswith(f"{hung.url} does not answer /v1/completions and makes no tokens any more")


def test_a_server_that_still_makes_tokens_is_waited_for(start: Callable[..., Setup]) -> None:
    setup, looks = start(), list[float]()
    go_on = Event()

    def counted() -> float:
        looks.append(len(looks))
        if len(looks) > 3:
            go_on.set()
        return looks[-1]

    peer = setup.peers[0]
    peer.counted = counted
    peer.faults = lambda number: None if number != 6 or go_on.wait(300) else (0, None)
    setup.engine.fleet.servers[0].look_seconds, setup.engine.fleet.servers[0].stall_seconds = 0.2, 0.5
    assert [[c.tokens for c in g] for g in setup.sample()] == undisturbed(setup)
    assert len(looks) > 3
    assert setup.engine.fleet.lost == {}


def test_a_request_that_begins_while_the_run_stops_is_not_sent(start: Callable[..., Setup]) -> None:
    setup = start()
    server, peer = setup.engine.fleet.servers[0], setup.peers[0]
    server.connect()
    server.close()
    sent = len(peer.asked)
    with pytest.raises(ServerError, match="the run is stopping"):
        server.complete((5, 6), (0, 0), SamplingSettings(2, 1.0), (2,), vocabulary=8)
    assert len(peer.asked) == sent


def test_a_server_that_comes_back_with_its_first_weights_gets_those_of_now(start: Callable[..., Setup]) -> None:
    setup = start()
    expected = undisturbed(setup)
    peer = setup.peers[0]

    def dies_once(number: int) -> Any:
        if number == 7:
            peer.model, peer.unhealthy, peer.paths = small.language_model(seed=9), 2, []
        return (0, None) if peer.unhealthy else None

    peer.faults = dies_once
    setup.engine = setup.new_engine(patience_seconds=20)
    assert [[c.tokens for c in g] for g in setup.sample()] == expected
    assert peer.paths.count("/collective_rpc") == 1


def test_a_server_that_was_replaced_between_two_rounds_of_a_step_is_noticed(start: Callable[..., Setup]) -> None:
    setup = start(servers=2)
    answers = setup.sample()
    setup.peers[1].model = small.language_model(seed=9)
    assert [[c.tokens for c in g] for g in setup.sample()] == [[c.tokens for c in g] for g in answers]
    assert [peer.paths.count("/collective_rpc") for peer in setup.peers] == [2, 2]


def test_what_no_other_server_would_do_better_stops_at_once(start: Callable[..., Setup]) -> None:
    setup = start()
    setup.peers[0].faults = lambda number: (400, {"error": "out of vocabulary"}) if number > 4 else None
    with pytest.raises(RolloutError, match=r"refused /v1/completions with 400: .*out of vocabulary"):
        setup.sample()
    for attribute, message in [("development", "VLLM_SERVER_DEV_MODE=1"), ("token_ids", "sends no token_ids")]:
        setup = start()
        setattr(setup.peers[0], attribute, False)
        with pytest.raises(RolloutError, match=message):
            setup.sample()


def test_a_prompt_that_does_not_fit_is_refused_before_it_is_sent(start: Callable[..., Setup]) -> None:
    setup = start()
    with pytest.raises(RolloutError, match=r"7 tokens and 58 new ones exceed the 64 tokens.*--max-model-len"):
        setup.sample(SamplingSettings(58, 1.0))


SHORT = SamplingSettings(2, 0.8)


def limit(setup: Setup) -> None:
    for server in setup.engine.fleet.servers:
        server.look_seconds = server.stall_seconds = server.pause_seconds = 0.2


@pytest.mark.parametrize("pages", [{"/metrics", "/v1/completions"}, {"/v1/completions"}])
def test_a_server_that_accepts_and_never_answers_is_left_in_seconds(
    start: Callable[..., Setup], pages: set[str]
) -> None:
    setup = start(servers=2)
    expected = setup.sample(SHORT)
    hung = setup.peers[0]
    hung.silent, hung.counted = pages, lambda: 7.0
    limit(setup)
    began = time.monotonic()
    assert [[c.tokens for c in g] for g in setup.sample(SHORT)] == [[c.tokens for c in g] for g in expected]
    # several times the limits above, and far less than a request's 900 s
    assert time.monotonic() - began < 60
    assert hung.url in {server.url for server in setup.engine.fleet.lost}


def test_a_server_that_begins_an_answer_and_sends_nothing_more_is_left_in_seconds(start: Callable[..., Setup]) -> None:
    setup = start(servers=2)
    expected = setup.sample(SHORT)
    setup.peers[0].cut = True
    limit(setup)
    assert [[c.tokens for c in g] for g in setup.sample(SHORT)] == [[c.tokens for c in g] for g in expected]
    (error,) = setup.engine.fleet.lost.values()
    assert str(error).startswith(f"{setup.peers[0].url} does not answer /v1/completions: timed out")
