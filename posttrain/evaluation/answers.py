"""A policy's answers to problems: one greedy and several sampled answers each, scored, with entropy and KL to a reference.

Example:
    The share of pairs whose chosen response is more probable; equal responses count half:

    >>> from posttrain.models.tiny import TinyShape, tiny_model
    >>> model, _ = tiny_model(TinyShape(hidden_size=16, intermediate_size=16, layers=1, heads=2, kv_heads=1), seed=0)
    >>> same = Tokens((5,), (6, 7))
    >>> preferred_share(Policy(model), [(same, same)], micro_batch_tokens=64)
    0.5
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from posttrain.data.tokens import TextEncoder, Tokens
from posttrain.evaluation.processes import ONE_PROCESS, Processes
from posttrain.models.policy import Policy
from posttrain.rewards.combination import known
from posttrain.rewards.sources import RewardSource
from posttrain.rollouts.engine import Completion, Engine, SamplingSettings
from posttrain.rollouts.groups import Problem, judged_text, request, reward_batch


@dataclass(frozen=True)
class EvaluatedAnswer:
    """One answer with its measurements.

    Attributes:
        sample: 0 is the greedy answer.
        tokens: length in tokens.
        entropy: mean entropy per token, in nats.
        kl: log pi - log reference summed over the response, in nats.
    """

    prompt_id: int
    sample: int
    problem: Problem
    text: str
    tokens: int
    truncated: bool
    entropy: float
    kl: float
    rewards: dict[str, float | None]
    messages: tuple[Mapping[str, Any], ...] = ()
    """Turns after the prompt, if there may be several; `text` is then the last one."""


@dataclass(frozen=True)
class EvaluationSettings:
    """Settings of an evaluation; `micro_batch_tokens` is the size of one forward pass in tokens."""

    max_new_tokens: int
    samples: int
    temperature: float
    seed: int
    micro_batch_tokens: int
    bf16: bool = False


def evaluate(
    policy: Policy,
    reference: Policy | None,
    engine: Engine,
    encoder: TextEncoder,
    problems: Sequence[Problem],
    rewards: Sequence[RewardSource],
    settings: EvaluationSettings,
    processes: Processes = ONE_PROCESS,
) -> list[EvaluatedAnswer]:
    """Return answers ordered by problem and sample. Seeds depend only on problem and sample, so that all models get the same ones.

    Args:
        processes: share sampling and forward passes; rank 0 scores the answers, and all return the same.
    """
    first = [request(p, ((0,),)) for p in problems]
    greedy = processes.sample(engine, first, SamplingSettings(settings.max_new_tokens, 0.0))
    seeds = [tuple((settings.seed, i, j) for j in range(settings.samples)) for i in range(len(problems))]
    requests = [request(p, s) for p, s in zip(problems, seeds, strict=True)]
    sampled = processes.sample(engine, requests, SamplingSettings(settings.max_new_tokens, settings.temperature))
    flat: list[tuple[int, int, Completion]] = [
        (i, j, completion)
        for i, (first, others) in enumerate(zip(greedy, sampled, strict=True))
        for j, completion in enumerate([*first, *others])
    ]
    tokens = [Tokens(problems[i].ids, completion.tokens, weights=completion.weights) for i, _, completion in flat]
    passes = settings.micro_batch_tokens, settings.bf16
    own = processes.token_logprobs(policy, tokens, *passes)
    other = own if reference is None else processes.token_logprobs(reference, tokens, *passes)
    texts = [judged_text(encoder, completion) for _, _, completion in flat]
    answers = reward_batch([problems[i] for i, _, _ in flat], texts, tokens, [completion for _, _, completion in flat])
    scored = processes.on_rank_0(lambda: {reward.name: reward.score(answers) for reward in rewards})
    return [
        EvaluatedAnswer(
            i,
            j,
            problems[i],
            texts[row],
            completion.sampled,
            not completion.finished,
            _mean_entropy(own[row].entropy, completion),
            float((own[row].logprobs - other[row].logprobs).sum()),
            {name: known(values[row]) for name, values in scored.items()},
            completion.messages,
        )
        for row, (i, j, completion) in enumerate(flat)
    ]


def _mean_entropy(entropy: np.ndarray, completion: Completion) -> float:
    """Return the mean over the sampled tokens of `entropy` [time]."""
    sampled = entropy if completion.weights is None else entropy[np.asarray(completion.weights) != 0]
    return float(sampled.mean())


def preferred_share(
    policy: Policy,
    pairs: Sequence[tuple[Tokens, Tokens]],
    micro_batch_tokens: int,
    bf16: bool = False,
    processes: Processes = ONE_PROCESS,
) -> float:
    """Return the share of (chosen, rejected) pairs whose chosen response is more probable; ties count half."""
    numbers = processes.token_logprobs(policy, [t for pair in pairs for t in pair], micro_batch_tokens, bf16)
    sums = [float(n.logprobs.sum()) for n in numbers]
    gaps = [sums[i] - sums[i + 1] for i in range(0, len(sums), 2)]
    return sum(1.0 if gap > 0 else 0.5 if gap == 0 else 0.0 for gap in gaps) / len(gaps)
