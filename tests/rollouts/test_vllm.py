"""The vLLM engine against a small server of the tests' own: protocol, weights and their proof, lost servers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event, Timer
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from posttrain.data.tokens import Tokens
from posttrain.errors import RolloutError, ServerError, StaleWeightsError
from posttrain.models.inference import token_numbers
from posttrain.models.lora import Adapter, LoraSettings
from posttrain.models.policy import Policy
from posttrain.models.tiny import tiny_model
from posttrain.rollouts.engine import Completion, Request, SamplingSettings
from posttrain.rollouts.native import NativeEngine
from posttrain.rollouts.vllm import VllmEngine
from posttrain.rollouts.vllm.folder import plain_state, write_weights
from posttrain.rollouts.vllm.local import _free_port
from posttrain.rollouts.vllm.probe import Tolerance, sequences
from posttrain.rollouts.vllm.server import Server, server_seed
from tests.models import small
from tests.rollouts import two_processes
from tests.rollouts.peer import Peer

PROMPTS = [(5, 6, 7), (9, 10), (11, 3, 4, 8, 20, 30, 21)]
SETTINGS = SamplingSettings(8, 0.8)


def requests(samples: int = 3) -> list[Request]:
    return [Request(p, tuple((0, i, j) for j in range(samples))) for i, p in enumerate(PROMPTS)]


class Setup:
    """A policy, servers that began with other weights, and an engine between them. `version` counts the policy's updates."""

    def __init__(self, folder: Path, policy: Any, peers: list[Peer]) -> None:
        self.folder, self.policy, self.peers, self.version = folder, policy, peers, 0
        self.engine = self.new_engine()

    def new_engine(self, patience_seconds: float = 2.0, bf16: bool = False) -> VllmEngine:
        return VllmEngine(
            self.policy,
            small.EOS,
            [Server(peer.url) for peer in self.peers],
            version=lambda: self.version,
            folder=self.folder,
            probes=sequences(PROMPTS, self.policy.config.vocab_size, 64),
            bf16=bf16,
            patience_seconds=patience_seconds,
        )

    def update(self, by: float = 1.2) -> None:
        """What a training step does to the weights."""
        with torch.no_grad():
            for parameter in self.policy.parameters():
                parameter.mul_(by)
        self.version += 1

    def sample(self, settings: SamplingSettings = SETTINGS) -> list[list[Completion]]:
        return self.engine.sample(requests(), settings)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Setup]]:
    peers: list[Peer] = []

    def make(servers: int = 1, policy: Any = None, at_first: Any = None) -> Setup:
        own = [Peer(at_first or small.language_model(seed=9)).start() for _ in range(servers)]
        peers.extend(own)
        return Setup(tmp_path / "served", policy or small.language_model(), own)

    yield make
    for peer in peers:
        peer.stop()


def gap(model: Any, answers: list[list[Completion]], temperature: float) -> float:
    """The largest difference of the reported log-probabilities from a teacher-forced forward of `model`."""
    flat = [(p, c) for p, group in zip(PROMPTS, answers, strict=True) for c in group]
    forced = token_numbers(Policy(model), [Tokens(p, c.tokens) for p, c in flat], 400, temperature)
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
    with pytest.raises(StaleWeightsError, match="as before this update, so the load has changed nothing"):
        setup.sample()


def test_it_shows_even_where_the_tolerance_for_rounding_would_hide_it(start: Callable[..., Setup]) -> None:
    setup = start(at_first=small.language_model())
    setup.peers[0].loads = False
    setup.engine.probe.tolerance = Tolerance(mean=1e9, largest=1e9)
    setup.sample()
    setup.update(by=1.01)
    with pytest.raises(StaleWeightsError, match="so the load has changed nothing"):
        setup.sample()


def test_a_server_of_another_model_stops_the_run(start: Callable[..., Setup]) -> None:
    setup = start()
    setup.peers[0].loads = False
    with pytest.raises(StaleWeightsError, match=r"differs by \d\S* nats .*another architecture.*--dtype float32"):
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
    with pytest.raises(StaleWeightsError, match="so the load has changed nothing"):
        setup.sample()


def undisturbed(setup: Setup) -> list[list[tuple[int, ...]]]:
    """What the policy answers through a server that nothing happens to."""
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
    assert "2 of 3 vLLM servers go on" in capsys.readouterr().err
    # and it rejoins when it answers again
    setup.peers[1].faults = lambda number: None
    setup.update()
    setup.sample()
    assert all(len(peer.asked) > 8 for peer in setup.peers)
    assert setup.engine.fleet.lost == {}


def test_when_none_is_left_the_run_stops_and_names_each(start: Callable[..., Setup]) -> None:
    setup = start(servers=2)
    setup.sample()
    for peer in setup.peers:
        peer.stop()
    setup.update()
    with pytest.raises(ServerError) as caught:
        setup.sample()
    assert all(f"{peer.url} does not answer /health" in str(caught.value) for peer in setup.peers)
    assert "run the same command" in str(caught.value)


def test_a_server_that_fails_for_good_is_not_asked_for_ever(start: Callable[..., Setup]) -> None:
    setup = start()
    probes = 4
    setup.peers[0].faults = lambda number: None if number % (probes + 1) else (500, {"error": "this prompt kills me"})
    with pytest.raises(ServerError, match="this prompt kills me"):
        setup.engine.sample([Request(PROMPTS[0], ((0,),))], SETTINGS)
    # at first, and once for each of three revivals
    assert len([body for body in setup.peers[0].asked if "stop_token_ids" in body]) == 4


def test_a_run_that_is_stopped_waits_for_no_server(start: Callable[..., Setup]) -> None:
    setup, answered = start(), Event()

    def hangs(number: int) -> Any:
        if number > 4:
            Timer(0.2, setup.engine.close).start()
            answered.wait(60)

    setup.peers[0].faults = hangs
    with pytest.raises(ServerError, match="the run is being stopped"):
        setup.sample()
    assert not answered.is_set()
    answered.set()


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


def test_what_is_written_is_the_model_with_its_adapter(tmp_path: Path) -> None:
    model = small.language_model()
    adapter = Adapter(model, LoraSettings(rank=2, alpha=4.0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    write_weights(model, plain_state(model, torch.float32), tmp_path / "served")
    adapter.merge()
    served = AutoModelForCausalLM.from_pretrained(tmp_path / "served")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(served(ids).logits, model(ids).logits)
    assert not torch.equal(
        served.model.layers[0].mlp.up_proj.weight, small.language_model().model.layers[0].mlp.up_proj.weight
    )


@pytest.mark.parametrize(
    "model", [small.tied_llama, lambda: small.language_model(shape=small.MOE)], ids=["tied", "experts"]
)
def test_what_is_written_loads_as_the_policy(tmp_path: Path, model: Callable[[], Any]) -> None:
    lm = model()
    write_weights(lm, plain_state(lm, torch.float32), tmp_path / "served")
    served = AutoModelForCausalLM.from_pretrained(tmp_path / "served")
    assert served.config.tie_word_embeddings is False
    assert [path.name for path in (tmp_path / "served").glob("*.safetensors")] == ["model.safetensors"]
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert torch.equal(served(ids).logits, lm(ids).logits)
    # the policy itself is as it was
    assert lm.config.tie_word_embeddings is (lm.get_output_embeddings().weight is lm.get_input_embeddings().weight)


@pytest.mark.parametrize(
    "model", [small.tied_llama, lambda: small.language_model(shape=small.MOE)], ids=["tied", "experts"]
)
def test_the_weights_are_those_of_the_state_dict(model: Callable[[], Any]) -> None:
    lm = model()
    lm.register_buffer("kept", torch.ones(2))
    state, own = plain_state(lm, torch.float32), lm.state_dict()
    assert sorted(state) == sorted(own)
    assert all(torch.equal(state[name], own[name]) for name in own)
    assert {tensor.dtype for tensor in plain_state(lm, torch.bfloat16).values()} == {torch.bfloat16}


def test_a_disk_that_refuses_is_said_in_one_paragraph(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    lm = small.language_model()
    with pytest.raises(RolloutError, match="cannot write the weights that the vLLM server is to load"):
        write_weights(lm, plain_state(lm, torch.float32), tmp_path / "file" / "served")


def test_two_processes_sample_their_shares_from_servers_that_one_of_them_keeps_up_to_date(
    start: Callable[..., Setup], root: Path, tmp_path: Path
) -> None:
    peer = start().peers[0]
    command = [sys.executable, "-m", "tests.rollouts.two_processes", peer.url, str(tmp_path / "shared")]
    together = os.environ | {
        "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()),
        "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(root),
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
