"""Forward passes without gradient over any number of rows: log-probabilities, values and scores, in the order of the rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from posttrain.data.batches import collate, micro_batches
from posttrain.data.layout import ending
from posttrain.data.tokens import Tokens
from posttrain.data.transfer import to_host
from posttrain.models.allocator import give_back_gaps
from posttrain.models.packed import PROBE
from posttrain.models.policy import Policy, Scorer
from posttrain.models.shards import equal_passes, gathered


@dataclass(frozen=True)
class TokenLogprobs:
    """Measurements of the tokens of one response, [time] float32 each.

    Attributes:
        logprobs: log-probability of each token.
        entropy: entropy of each next-token distribution, in nats.
        values: the critic's values; empty without a critic.
        experts: [time, layers, experts per token] int16 ids that a mixture of experts chose; None for a dense model.
    """

    logprobs: np.ndarray
    entropy: np.ndarray
    values: np.ndarray
    experts: np.ndarray | None = None


@torch.no_grad()
def token_logprobs(
    policy: Policy, tokens: Sequence[Tokens], micro_batch_tokens: int, temperature: float = 1.0, bf16: bool = False
) -> list[TokenLogprobs]:
    """Return log-probability, entropy (nats) and value of every response token, in the order of `tokens`.

    Args:
        micro_batch_tokens: most tokens of one forward pass.

    Example:
        >>> from posttrain.data.tokens import Tokens
        >>> from posttrain.models.policy import Policy
        >>> from posttrain.models.tiny import TinyShape, tiny_model
        >>> model, _ = tiny_model(TinyShape(hidden_size=16, intermediate_size=16, layers=1, heads=2, kv_heads=1), seed=0)
        >>> long, short = token_logprobs(Policy(model), [Tokens((5, 6), (7, 8, 9)), Tokens((5,), (7,))], micro_batch_tokens=64)
        >>> len(long.logprobs), len(short.logprobs)
        (3, 1)
    """
    device = next(policy.parameters()).device
    numbers: list[TokenLogprobs | None] = [None] * len(tokens)
    groups = micro_batches([[t] for t in tokens], micro_batch_tokens) if tokens else []
    for group in equal_passes(policy, groups):
        # without a backward pass nothing else would give the gathered weights back
        with gathered(policy), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            output = policy(collate([tokens[i] for i in group] or PROBE).to(device), temperature)
        give_back_gaps()
        if not group:
            continue  # other processes have more rows
        given = {
            "logprobs": output.logprobs,
            "entropy": output.entropy,
            "values": output.values,
            "experts": None if output.routing is None else output.routing.chosen,
        }
        kept = {name: value for name, value in given.items() if value is not None}
        read = {name: value.numpy() for name, value in zip(kept, to_host([*kept.values()]), strict=True)}
        for row, i in enumerate(group):
            n = len(tokens[i].response)
            none = np.zeros(0, dtype=np.float32)
            numbers[i] = TokenLogprobs(
                read["logprobs"][row, :n],
                read["entropy"][row, :n],
                read["values"][row, :n] if "values" in read else none,
                read["experts"][row, :n] if "experts" in read else None,
            )
    return [n for n in numbers if n is not None]


def scores(scorer: Scorer, tokens: Sequence[Tokens], micro_batch_tokens: int, bf16: bool = False) -> list[float]:
    """Return the scorer's score of every row."""
    return [score for score, _ in scores_and_spreads(scorer, tokens, micro_batch_tokens, bf16)]


@torch.no_grad()
def scores_and_spreads(
    scorer: Scorer, tokens: Sequence[Tokens], micro_batch_tokens: int, bf16: bool = False
) -> list[tuple[float, float]]:
    """Return the scorer's score of every row, and the standard deviation of its heads."""
    device = next(scorer.parameters()).device
    result = [(0.0, 0.0)] * len(tokens)
    groups = micro_batches([[t] for t in tokens], micro_batch_tokens) if tokens else []
    for group in equal_passes(scorer, groups):
        with gathered(scorer), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            values = scorer(collate([tokens[i] for i in group] or PROBE).to(device, ending))
        give_back_gaps()
        if not group:
            continue  # other processes have more rows
        combined, spread = (column.tolist() for column in to_host(scorer.combined(values)))
        for i, score, width in zip(group, combined, spread, strict=True):
            result[i] = (score, width)
    return result
