"""Conversations of several turns: ids as sampled, masks, log-probabilities, gradients by hand, and the policies at their ends."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from posttrain.algorithms import PRESETS
from posttrain.algorithms.specs import OnPolicy
from posttrain.data.tokens import TextEncoder, Tokens
from posttrain.environments.base import Conversation
from posttrain.errors import ConfigError, DataError, RolloutError
from posttrain.models.inference import token_logprobs
from posttrain.models.policy import Policy
from posttrain.models.tiny import byte_tokenizer
from posttrain.objectives.gae import gae
from posttrain.rollouts.engine import Completion, Request, SamplingSettings
from posttrain.rollouts.groups import Problem, ScoredAnswer
from posttrain.rollouts.native import NativeEngine
from posttrain.rollouts.turns import TurnEngine, Turns, reply_ids, transcript
from posttrain.settings import OptimizerSettings
from posttrain.training.onpolicy import Experience, OnPolicyObjective
from posttrain.training.trainer import Trainer
from tests.models import small
from tests.training.runs import source_of

TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] | trim }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer that merges letters, so that tokenising the text of sampled ids again gives other ids for most."""
    alphabet = [*"ab\n[]", "Ġ", *"</s>mtunorlicy"]
    pairs = [("a", "b"), ("b", "a"), ("a", "a"), ("ab", "ab"), ("ab", "a"), ("aa", "b")]
    pieces = dict.fromkeys(
        ["</s>", *pre_tokenizers.ByteLevel.alphabet(), *("".join(pair) for pair in pairs), *alphabet]
    )
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", chat_template=TEMPLATE)


class Letters:
    """An engine that draws letters a and b and their merges; sometimes white space, which the template cuts off; no log-probability."""

    def __init__(self, encoder: TextEncoder, end: float = 0.2) -> None:
        vocabulary = encoder.tokenizer.get_vocab()
        self.ids = [vocabulary[piece] for piece in ("a", "b", "ab", "ba", "aa", "Ġ")]
        self.eos, self.end = encoder.eos_id, end

    def sample(self, requests: Sequence[Request], settings: SamplingSettings) -> list[list[Completion]]:
        return [[self._answer(r.prompt, seed, settings) for seed in r.seeds] for r in requests]

    def _answer(self, prompt: Sequence[int], seed: tuple[int, ...], settings: SamplingSettings) -> Completion:
        rng = np.random.default_rng(list(seed))
        tokens = [int(i) for i in rng.choice(self.ids, int(rng.integers(1, settings.max_new_tokens)))]
        # the log-probability depends on the whole row, as a model's does
        given = [*prompt, *tokens, self.eos]
        logprobs = [-float(sum(given[: len(prompt) + i]) % 97) for i in range(len(tokens) + 1)]
        return Completion((*tokens, self.eos), tuple(logprobs), True)


def echo(conversation: Conversation) -> list[dict[str, Any]] | None:
    """Repeat the turn, which a tokenizer writes in a different way; end after three turns."""
    return None if conversation.turn == 3 else [{"role": "user", "content": f"{conversation.said} ab"}]


def test_a_thousand_conversations_keep_every_sampled_id_though_their_texts_have_others() -> None:
    encoder = TextEncoder(merging_tokenizer(), 4096)
    recorded: dict[tuple[int, ...], tuple[int, ...]] = {}

    class Recording(Letters):
        def _answer(self, prompt: Sequence[int], seed: tuple[int, ...], settings: SamplingSettings) -> Completion:
            drawn = super()._answer(prompt, seed, settings)
            recorded[(*prompt, -1, *drawn.tokens)] = drawn.tokens
            return drawn

    engine = TurnEngine(Recording(encoder), encoder, Turns(echo, limit=4))
    asked = [{"role": "user", "content": "ab"}]
    prompt = tuple(encoder.prompt(asked))
    requests = [Request(prompt, tuple((i, j) for j in range(10)), asked) for i in range(100)]
    answers = [a for group in engine.sample(requests, SamplingSettings(12, 1.0)) for a in group]
    assert len(answers) == 1000
    drifted = 0
    for answer in answers:
        assert answer.weights is not None
        assert [m["role"] for m in answer.messages] == ["assistant", "user", "assistant", "user", "assistant"]
        turns = sampled_parts(answer)
        assert len(turns) == 3
        before: tuple[int, ...] = prompt
        for start, stop in turns:
            drawn = answer.tokens[start:stop]
            # the model drew exactly these ids after exactly these: nothing was tokenised again
            assert recorded[(*prompt, *answer.tokens[:start], -1, *drawn)] == drawn
            assert answer.logprobs[start] == -float(sum((*prompt, *answer.tokens[:start])) % 97)
            before = (*prompt, *answer.tokens[:stop])
        assert before == (*prompt, *answer.tokens)
        drifted += again(encoder, asked, answer) != before
    assert drifted > 900, "the tokenizer must be one that would have drifted"


def again(encoder: TextEncoder, asked: list[dict[str, Any]], answer: Completion) -> tuple[int, ...]:
    text = encoder.template.render([*asked, *answer.messages])
    return tuple(encoder.tokenizer(text, add_special_tokens=False)["input_ids"])


def sampled_parts(answer: Completion) -> list[tuple[int, int]]:
    """Return [start, stop) of each run of sampled tokens."""
    assert answer.weights is not None
    edges = np.flatnonzero(np.diff([0.0, *answer.weights, 0.0]))
    return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]


def test_what_the_template_writes_between_two_turns_is_between_them() -> None:
    encoder = TextEncoder(byte_tokenizer(512), 512)
    asked = [{"role": "user", "content": "2+2?"}]
    said, reply = [{"role": "assistant", "content": "calc(2+2)"}], [{"role": "tool", "content": "4"}]
    request = Request(tuple(encoder.prompt(asked)), ((0,),), asked)
    between = reply_ids(encoder, request, said, reply)
    own = encoder.completion("calc(2+2)")
    whole = encoder.template.render([*asked, *said, *reply], generate=True)
    closing = encoder.template.render([*asked, *said])
    assert encoder.tokenizer.decode([*request.prompt, *own, *between]).replace(
        encoder.tokenizer.eos_token, ""
    ) == whole.replace(encoder.tokenizer.eos_token, "")
    assert whole.startswith(closing)


def more(conversation: Conversation) -> list[dict[str, Any]] | None:
    return [{"role": "user", "content": "more"}] if conversation.turn == 1 else None


def two_turns() -> tuple[Policy, list[Completion], Request]:
    """Return a model in float64 and four conversations of two turns that it has sampled."""
    lm = small.language_model().double()
    encoder = TextEncoder(byte_tokenizer(256), 256)
    ends = range(60, 300)
    engine = TurnEngine(NativeEngine(lm, ends), encoder, Turns(more, limit=2))
    request = Request(tuple(encoder.prompt("say")), tuple((3, j) for j in range(4)), "say")
    (answers,) = engine.sample([request], SamplingSettings(7, 1.0))
    return Policy(lm), answers, request


def test_loss_and_gradient_of_two_turns_are_those_written_by_hand() -> None:
    policy, answers, request = two_turns()
    several = [a for a in answers if len(a.messages) == 3]
    assert len(several) >= 2
    spec = PRESETS["grpo"]
    assert isinstance(spec, OnPolicy)
    rewards = [float(i) for i in range(len(answers))]
    mean = sum(rewards) / len(rewards)
    advantages = [reward - mean for reward in rewards]
    rows = [
        Experience(
            Tokens(request.prompt, a.tokens, weights=a.weights),
            np.full(len(a.tokens), advantage, dtype=np.float32),
            np.asarray(a.logprobs, dtype=np.float32),
            np.zeros(len(a.tokens), dtype=np.float32),
            old_logprobs=np.full(len(a.tokens), -4.0, dtype=np.float32),
        )
        for a, advantage in zip(answers, advantages, strict=True)
    ]
    objective = OnPolicyObjective(spec, 14, 1.0)
    counts = objective.counts(rows)
    terms = objective.terms(policy, rows)
    total = sum(numerator * weight / counts[name] for numerator, name, weight in terms.losses.values())
    parameters = [p for p in policy.parameters() if p.requires_grad]
    found = torch.autograd.grad(total, parameters, allow_unused=True)

    by_hand = torch.zeros((), dtype=torch.float64)
    tokens = 0
    for a, advantage in zip(answers, advantages, strict=True):
        ids = torch.tensor([[*request.prompt, *a.tokens]])
        table = policy.lm(input_ids=ids).logits[0].log_softmax(-1)
        each = []
        for t, (token, weight) in enumerate(zip(a.tokens, a.weights or (), strict=True)):
            if not weight:
                continue
            logprob = table[len(request.prompt) + t - 1, token]
            ratio = (logprob + 4.0).exp()
            clipped = ratio.clamp(1 - spec.clip_low, 1 + spec.clip_high)
            k3 = (0.0 - logprob).exp() - (0.0 - logprob) - 1
            each.append(-torch.minimum(ratio * advantage, clipped * advantage) + spec.kl_coefficient * k3)
            tokens += 1
        by_hand = by_hand + (sum(each) / len(each) if spec.aggregate == "sequence_mean" else sum(each))
    by_hand = by_hand / (len(answers) if spec.aggregate == "sequence_mean" else tokens)
    assert counts["tokens"] == tokens
    assert total.item() == pytest.approx(by_hand.item(), rel=1e-9)
    for mine, theirs in zip(found, torch.autograd.grad(by_hand, parameters, allow_unused=True), strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            assert torch.allclose(mine, theirs, rtol=1e-7, atol=1e-9)


def test_log_probabilities_of_every_turn_are_those_of_one_pass_over_the_whole() -> None:
    policy, answers, request = two_turns()
    rows = [Tokens(request.prompt, a.tokens, weights=a.weights) for a in answers]
    for a, numbers in zip(answers, token_logprobs(policy, rows, 1000), strict=True):
        assert numbers.logprobs == pytest.approx(np.asarray(a.logprobs), abs=1e-5)
        assert {p for p, w in zip(a.logprobs, a.weights or (), strict=True) if not w} <= {0.0}


@pytest.mark.parametrize("name", ["grpo", "gspo", "ppo", "dr_grpo", "reinforce_pp"])
def test_an_update_on_conversations_starts_on_policy_and_trains_sampled_tokens_only(name: str) -> None:
    spec = PRESETS[name]
    assert isinstance(spec, OnPolicy)
    policy = small.policy(critic=spec.has_critic)
    encoder = TextEncoder(byte_tokenizer(64), 64)
    source, objective = source_of(spec, policy, prompts=2)
    source.sampler.engine = TurnEngine(NativeEngine(policy.lm, range(3, 300, 2)), encoder, Turns(more, limit=2))
    (batch, *_) = source.next(0).batches
    several = [row for row in batch if isinstance(row, Experience) and row.tokens.weights and 0.0 in row.tokens.weights]
    assert several
    for row in several:
        sampled = np.asarray(row.tokens.weights) != 0
        assert len(row.advantages) == len(row.rollout_logprobs) == len(sampled)
        if row.old_logprobs is not None:
            assert row.old_logprobs[sampled] == pytest.approx(row.rollout_logprobs[sampled], abs=1e-5)
            assert not row.old_logprobs[~sampled].any()
    trainer: Trainer[Any] = Trainer(policy, OptimizerSettings(1e-3), total_steps=1, micro_batch_tokens=60)
    metrics = trainer.update(batch, objective)
    assert metrics["mismatch/max"] < 1e-4
    assert metrics["ratio/max"] == pytest.approx(1.0, abs=1e-4)
    assert metrics["entropy"] > 1.0


def test_advantages_with_a_critic_are_those_of_the_sampled_tokens_alone() -> None:
    """Generalised advantage estimation over two turns, against the same numbers without the environment's tokens between them."""
    weights, reward = np.array([1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0]), 2.0
    spec, sampled = PRESETS["ppo"], weights != 0
    assert isinstance(spec, OnPolicy)
    spec = replace(spec, whiten=False)
    policy = small.policy(critic=True)
    source, _ = source_of(spec, policy)
    tokens = Tokens((3, 4), (5, 6, 7, 8, 9, 10, 11), weights=tuple(weights))
    completion = Completion(tokens.response, (0.0,) * 7, True, tokens.weights)
    answer = ScoredAnswer(tokens, completion, "", 0, Problem("", (3, 4), {}), reward, {})
    (own,), (ref,) = (token_logprobs(p, [tokens], 100, 0.9) for p in (policy, small.policy(seed=1)))
    (advantages,), returns, _ = source._advantages([answer], [own], [ref])
    per_token = -spec.kl_coefficient * (own.logprobs - ref.logprobs)[sampled]
    per_token[-1] += reward
    values = torch.from_numpy(own.values[sampled])[None]
    expected, to_go = gae(
        torch.from_numpy(per_token)[None], values, torch.ones(1, 4, dtype=torch.bool), spec.gamma, spec.lam
    )
    assert advantages[sampled] == pytest.approx(expected[0].numpy(), abs=1e-6)
    assert returns is not None
    assert returns[0][sampled] == pytest.approx(to_go[0].numpy(), abs=1e-6)
    assert not advantages[~sampled].any()


class Says:
    """An engine that gives the same answer in every turn."""

    def __init__(self, encoder: TextEncoder, text: str, finished: bool = True) -> None:
        self.ids, self.finished = tuple(encoder.completion(text)), finished

    def sample(self, requests: Sequence[Request], settings: SamplingSettings) -> list[list[Completion]]:
        ids = self.ids if self.finished else self.ids[:-1]
        return [[Completion(ids, (-1.0,) * len(ids), self.finished) for _ in r.seeds] for r in requests]


def talk(step: Any, limit: int = 3, finished: bool = True, **policy: Any) -> Completion:
    encoder = TextEncoder(byte_tokenizer(256), 256)
    engine = TurnEngine(Says(encoder, "x", finished), encoder, Turns(step, limit, **policy))
    [[answer]] = engine.sample([Request(tuple(encoder.prompt("?")), ((0,),), "?")], SamplingSettings(4, 1.0))
    return answer


def broken(conversation: Conversation) -> Any:
    raise KeyError("tool")


def test_the_limit_ends_a_conversation_after_the_models_turn() -> None:
    answer = talk(lambda c: [{"role": "user", "content": str(c.turn)}])
    assert transcript(answer.messages) == "assistant: x\nuser: 1\nassistant: x\nuser: 2\nassistant: x"
    assert answer.finished
    assert answer.sampled == 3 * 2


def test_a_turn_that_is_cut_off_ends_the_conversation_unfinished() -> None:
    answer = talk(lambda c: [{"role": "user", "content": "go on"}], finished=False)
    assert (len(answer.messages), answer.finished) == (1, False)


def test_a_conversation_that_would_leave_the_context_ends_unfinished() -> None:
    answer = talk(lambda c: [{"role": "user", "content": "y" * 120}], limit=9)
    assert (len(answer.messages), answer.finished) == (5, False)


def test_an_error_stops_the_run_ends_the_conversation_or_is_told_to_the_model() -> None:
    with pytest.raises(RolloutError, match=r"step failed after turn 1 of the prompt '\?' \(KeyError: 'tool'\)"):
        talk(broken)
    assert transcript(talk(broken, on_error="end").messages) == "assistant: x"
    answer = talk(broken, limit=2, on_error="tell")
    assert transcript(answer.messages) == "assistant: x\nuser: error: KeyError: 'tool'\nassistant: x"


def test_a_step_that_takes_too_long_is_an_error() -> None:
    with pytest.raises(RolloutError, match=r"TimeoutError: it ran for more than 0\.05 s"):
        talk(lambda c: time.sleep(60), seconds=0.05)


def test_policies_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ConfigError, match="Turns: limit = 0; it must be a whole number"):
        Turns(echo, 0)
    with pytest.raises(ConfigError, match=r"on_error = 'go on'; it is one of stop, end, tell"):
        Turns(echo, 1, on_error="go on")  # type: ignore[arg-type]


def test_a_template_that_hides_the_newest_turn_is_refused() -> None:
    tokenizer = byte_tokenizer(64)
    tokenizer.chat_template = "{{ messages[-1]['content'] }}"
    encoder = TextEncoder(tokenizer, 64)
    asked = [{"role": "user", "content": "?"}]
    with pytest.raises(DataError, match="shows the assistant's newest turn 0 times"):
        reply_ids(encoder, Request((1,), ((0,),), asked), [{"role": "assistant", "content": "x"}], [asked[0]])


def test_a_template_that_leaves_out_the_tools_result_is_refused() -> None:
    tokenizer = byte_tokenizer(512)
    tokenizer.chat_template = TEMPLATE.replace("in messages %}", "in messages if m['role'] != 'tool' %}", 1)
    encoder, asked = TextEncoder(tokenizer, 512), [{"role": "user", "content": "23 * 48?"}]
    said = [{"role": "assistant", "content": "calc(23 * 48)"}]
    with pytest.raises(DataError, match=r"leaves out the text of turn 2 \(tool\)"):
        reply_ids(encoder, Request((1,), ((0,),), asked), said, [{"role": "tool", "content": "1104"}])
    user = reply_ids(encoder, Request((1,), ((0,),), asked), said, [{"role": "user", "content": "1104"}])
    assert tokenizer.decode(user) == "</s>\n[user]1104</s>\n[assistant]"


@pytest.mark.parametrize(
    "reply",
    [
        "x",
        3,
        True,
        ["x"],
        {"role": "user", "content": "x"},
        [{"content": "x"}],
        [{"role": "user"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": "\ud800"}],
        [{"role": "assistant", "content": "x"}],
        [{"role": "wizard", "content": "x"}],
    ],
)
def test_a_reply_that_is_no_message_is_refused_by_the_turn_and_the_prompt(reply: Any) -> None:
    encoder = TextEncoder(merging_tokenizer(), 512)
    engine = TurnEngine(Letters(encoder), encoder, Turns(lambda conversation: reply, limit=2, on_error="tell"))
    for asked in ("ab", [{"role": "user", "content": "ab"}]):
        request = Request(tuple(encoder.prompt(asked)), ((0, 0),), asked)
        with pytest.raises(
            RolloutError, match=r"the environment's step returned, after turn 1 of the prompt .*, which "
        ):
            engine.sample([request], SamplingSettings(12, 1.0))


def test_a_step_changes_only_its_own_copy_of_the_conversation() -> None:
    def step(conversation: Conversation) -> list[dict[str, Any]]:
        conversation.columns["answer"] = "changed"  # type: ignore[index]
        conversation.messages[0]["content"] = "changed"  # type: ignore[index]
        return [{"role": "user", "content": "ab"}]

    encoder, asked, columns = (
        TextEncoder(merging_tokenizer(), 512),
        [{"role": "user", "content": "ab"}],
        {"answer": "7"},
    )
    engine = TurnEngine(Letters(encoder), encoder, Turns(step, limit=2))
    engine.sample([Request(tuple(encoder.prompt(asked)), ((0, 0),), asked, columns)], SamplingSettings(12, 1.0))
    assert (asked, columns) == ([{"role": "user", "content": "ab"}], {"answer": "7"})


def test_a_step_that_ends_the_program_fails_like_any_other() -> None:
    def step(conversation: Conversation) -> None:
        raise SystemExit(0)

    encoder = TextEncoder(merging_tokenizer(), 512)
    request = Request(tuple(encoder.prompt("ab")), ((0, 0),), "ab")
    with pytest.raises(RolloutError, match=r"step failed after turn 1 .*SystemExit"):
        TurnEngine(Letters(encoder), encoder, Turns(step, limit=2)).sample([request], SamplingSettings(12, 1.0))
