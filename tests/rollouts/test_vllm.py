"""The vLLM engine against a small server of the tests' own: protocol, weights and their proof."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from posttrain.data.tokens import Tokens
from posttrain.errors import StaleWeightsError
from posttrain.models.inference import token_logprobs
from posttrain.models.policy import Policy
from posttrain.models.tiny import tiny_model
from posttrain.network import free_port
from posttrain.rollouts.engine import Completion, Request, SamplingSettings
from posttrain.rollouts.native import NativeEngine
from posttrain.rollouts.tolerance import Tolerance
from posttrain.rollouts.vllm.server import server_seed
from tests.models import small
from tests.reliability.workspace import CLIENT, Warm
from tests.rollouts import two_processes
from tests.rollouts.served import PROMPTS, SETTINGS, Setup, requests


def gap(model: Any, answers: list[list[Completion]], temperature: float) -> float:
    """Return the largest difference of the reported log-probabilities from a teacher-forced forward of `model`."""
    flat = [(p, c) for p, group in zip(PROMPTS, answers, strict=True) for c in group]
    forced = token_logprobs(Policy(model), [Tokens(p, c.tokens) for p, c in flat], 400, temperature)
    return max(
        abs(said - own)
        for (_, c), n in zip(flat, forced, strict=True)
        for said, own in zip(c.logprobs, n.logprobs.tolist(), strict=True)
    )


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_answers_are_drawn_from_the_policy_whatever_the_server_began_with(
    start: Callable[..., Setup], temperature: float
) -> None:
    setup = start()
    answers = setup.sample(SamplingSettings(8, temperature))
    assert [len(group) for group in answers] == [3, 3, 3]
    assert gap(setup.policy, answers, temperature) < 1e-5
    assert gap(small.language_model(seed=9), answers, temperature) > 0.5


def test_greedy_is_what_the_native_engine_says(start: Callable[..., Setup]) -> None:
    setup = start()
    native = NativeEngine(setup.policy, small.EOS).sample(requests(), SamplingSettings(8, 0.0))
    assert [[c.tokens for c in g] for g in setup.sample(SamplingSettings(8, 0.0))] == [
        [c.tokens for c in g] for g in native
    ]


def test_an_answer_ends_with_its_end_of_sequence_or_at_the_limit(start: Callable[..., Setup]) -> None:
    # a vocabulary of 40, so that some answers end by themselves
    policy = small.tied_llama()
    answers = [c for group in start(policy=policy, at_first=small.tied_llama(3)).sample() for c in group]
    assert {c.finished for c in answers} == {True, False}
    for completion in answers:
        assert len(completion.tokens) == len(completion.logprobs)
        assert small.EOS not in completion.tokens[:-1]
        assert completion.finished == (completion.tokens[-1] == small.EOS)
        assert completion.finished or len(completion.tokens) == 8


def test_a_sample_depends_on_weights_prompt_and_seed_and_on_nothing_that_a_server_remembers(
    start: Callable[..., Setup],
) -> None:
    setup = start(servers=2)
    answers = setup.sample()
    backwards = setup.engine.sample(requests()[::-1], SETTINGS)[::-1]
    again = setup.new_engine().sample([Request(PROMPTS[1], ((0, 1, 2),))], SETTINGS)
    assert [[c.tokens for c in g] for g in backwards] == [[c.tokens for c in g] for g in answers]
    assert again[0][0].tokens == answers[1][2].tokens
    seeds = {body["seed"] for peer in setup.peers for body in peer.asked if "stop_token_ids" in body}
    assert seeds == {server_seed((0, i, j)) for i in range(3) for j in range(3)}
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_no_default_of_the_server_or_of_the_model_acts(start: Callable[..., Setup]) -> None:
    setup = start()
    setup.sample()
    neutral = {
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "ignore_eos": True,
        "temperature": 0.8,
    }
    assert all(body[name] == value for body in setup.peers[0].asked for name, value in neutral.items())


def test_weights_are_sent_when_they_have_changed_and_only_then(start: Callable[..., Setup]) -> None:
    setup = start()
    peer = setup.peers[0]
    setup.sample()
    setup.sample()
    assert peer.paths.count("/collective_rpc") == 1
    setup.update()
    answers = setup.sample()
    assert gap(setup.policy, answers, 0.8) < 1e-5
    assert peer.paths.count("/collective_rpc") == peer.paths.count("/reset_prefix_cache") == 2
    assert [path.name for path in setup.folder.iterdir()] == ["weights-1"]
    setup.engine.close()
    assert not setup.folder.exists()


def test_a_tied_head_is_sent_as_a_weight_of_its_own(start: Callable[..., Setup]) -> None:
    setup = start(policy=small.tied_llama(), at_first=small.tied_llama(3))
    for _ in range(3):
        assert gap(setup.policy, setup.sample(), 0.8) < 1e-5
        setup.update()


def test_a_stale_output_head_stops_the_run_and_says_what_to_do(start: Callable[..., Setup]) -> None:
    policy = small.tied_llama()
    setup = start(policy=policy, at_first=small.tied_llama())
    setup.peers[0].tied = True
    setup.sample()
    asked = len(setup.peers[0].asked)
    # a single small step
    setup.update(by=1.02)
    with pytest.raises(StaleWeightsError) as caught:
        setup.sample()
    text = str(caught.value)
    assert "tied embeddings keeps its old output head" in text
    assert f"start it on {setup.folder / 'weights-1'}" in text
    assert "nats" in text
    # four probes, and no sample
    assert len(setup.peers[0].asked) == asked + 4
    # the folder that the message names is there to start the server on, also after the run
    setup.engine.close()
    assert (setup.folder / "weights-1" / "config.json").exists()


def test_a_server_that_loads_nothing_stops_the_run(start: Callable[..., Setup]) -> None:
    setup = start(at_first=small.language_model())
    setup.peers[0].loads = False
    setup.sample()
    setup.update()
    with pytest.raises(StaleWeightsError, match="since before this update, so the load had no effect"):
        setup.sample()


def test_it_shows_even_where_the_tolerance_for_rounding_would_hide_it(start: Callable[..., Setup]) -> None:
    setup = start(at_first=small.language_model())
    setup.peers[0].loads = False
    setup.engine.probe.tolerance = Tolerance(mean=1e9, largest=1e9)
    setup.sample()
    setup.update(by=1.01)
    with pytest.raises(StaleWeightsError, match="so the load had no effect"):
        setup.sample()


def test_a_server_of_another_model_stops_the_run(start: Callable[..., Setup]) -> None:
    setup = start()
    setup.peers[0].loads = False
    with pytest.raises(StaleWeightsError, match=r"differs by \d\S* nats .*different architecture.*--dtype float32"):
        setup.sample()


def test_log_probabilities_before_the_temperature_stop_the_run(start: Callable[..., Setup]) -> None:
    setup = start()
    setup.peers[0].raw = True
    setup.engine.sample(requests(), SamplingSettings(8, 1.0))
    with pytest.raises(StaleWeightsError, match="--logprobs-mode processed_logprobs"):
        setup.engine.sample(requests(), SamplingSettings(8, 0.5))


def test_rounding_to_bfloat16_is_no_other_model_and_a_server_that_loads_nothing_still_is(
    start: Callable[..., Setup],
) -> None:
    policy = tiny_model(small.SHAPE, 0)[0]
    setup = start(policy=policy, at_first=tiny_model(small.SHAPE, 1)[0])
    setup.engine = setup.new_engine(bf16=True)
    answers = setup.sample()
    assert 0 < gap(policy, answers, 0.8) < 0.1
    written = load_file(setup.folder / "weights-0" / "model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    setup.peers[0].loads = False
    setup.update(by=1.3)
    with pytest.raises(StaleWeightsError, match="so the load had no effect"):
        setup.sample()


def test_two_processes_sample_their_shares_from_servers_that_one_of_them_keeps_up_to_date(
    start: Callable[..., Setup], root: Path, tmp_path: Path, warm: Warm
) -> None:
    peer = start().peers[0]
    command = [sys.executable, "-c", CLIENT, "tests.rollouts.two_processes", peer.url, str(tmp_path / "shared")]
    together = os.environ | {
        "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
        "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(root), "POSTTRAIN_WARM": str(warm.socket),
    }  # fmt: skip
    processes = [
        subprocess.Popen(command, cwd=root, env=together | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                         stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]  # fmt: skip
    try:
        told = [json.loads(process.stdout.readline() or "null") for process in processes if process.stdout]
        # once for each of two versions, whoever asks
        assert peer.paths.count("/collective_rpc") == 2
        peer.loads = False
        for process in processes:
            assert process.stdin
            process.stdin.write("\n")
            process.stdin.flush()
        outputs = [process.communicate(timeout=60) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [p.returncode for p in processes] == [0, 0], outputs
    assert [out.strip() for out, _ in outputs] == ["refused", "refused"]
    peer.loads = True
    version = [0]
    alone = two_processes.new_engine(peer.url, tmp_path / "alone", version, Accelerator())
    expected = [[list(tokens) for tokens in step] for step in two_processes.steps(alone, version, Accelerator())]
    assert [len(step) for step in expected] == [6, 2]
    # every process sees all answers, and nobody waited for ever for the one that had nothing to ask for
    assert told == [expected, expected]
