"""Verify that a server uses the policy's weights: log-probabilities of a few fixed sequences, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from posttrain.errors import StaleWeightsError
from posttrain.rollouts.tolerance import Tolerance
from posttrain.rollouts.vllm.server import VllmServer

PROMPTS, RANDOM_TOKENS = 3, 48
MOVED = 1e-3
"""Mean change of the policy's log-probabilities, in nats, above which no rounding can leave a server's values unchanged."""


def sequences(prompts: Sequence[tuple[int, ...]], vocabulary: int, context: int) -> list[tuple[int, ...]]:
    """Return the first few prompts, and tokens from the whole vocabulary; one token of the context is left for an answer.

    Example:
        >>> [len(ids) for ids in sequences([(1, 2), (3,)], vocabulary=10, context=16)]
        [2, 15]
    """
    anywhere = np.random.default_rng(0).integers(0, vocabulary, RANDOM_TOKENS)
    chosen = [*prompts[:PROMPTS], tuple(int(token) for token in anywhere)]
    return [ids[: context - 1] for ids in chosen if len(ids) > 1]


@dataclass(frozen=True)
class Expected:
    """The policy's log-probabilities of one sequence: ids[1:] at temperature 1, and every next token [vocabulary] at the sampler's."""

    ids: tuple[int, ...]
    logprobs: np.ndarray
    following: np.ndarray


@torch.no_grad()
def expected(lm: PreTrainedModel, probes: Sequence[tuple[int, ...]], temperature: float, bf16: bool) -> list[Expected]:
    """Compute the policy's log-probabilities of the probe's sequences."""
    training = lm.training
    lm.eval()
    made = []
    for ids in probes:
        tokens = torch.tensor([ids], device=lm.device)
        with torch.autocast(lm.device.type, torch.bfloat16, enabled=bf16):
            logits = lm(input_ids=tokens).logits[0].float()
        selected = logits[:-1].log_softmax(-1).gather(-1, tokens[0, 1:, None])[:, 0]
        following = (logits[-1] / (temperature or 1.0)).log_softmax(-1)
        made.append(Expected(ids, selected.cpu().numpy(), following.cpu().numpy()))
    lm.train(training)
    return made


class Probe:
    """Compare servers with the policy after every update, and remember each server's previous values."""

    def __init__(self, tolerance: Tolerance, dtype: str) -> None:
        self.tolerance, self.dtype = tolerance, dtype
        self._before: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def check(self, server: VllmServer, policy: Sequence[Expected], temperature: float, folder: Path) -> float:
        """Return the largest difference in nats.

        Raises:
            StaleWeightsError: the difference is too large for rounding.
            ServerError: the server does not answer.
        """
        answers = [server.probe(each.ids, temperature, len(each.following)) for each in policy]
        served = np.concatenate([np.asarray(logprobs) for logprobs, _, _ in answers])
        own = np.concatenate([each.logprobs for each in policy])
        difference = np.abs(served - own)
        drawn = max(
            abs(value - float(p.following[token])) for (_, token, value), p in zip(answers, policy, strict=True)
        )
        stuck = self._stuck(server, served, own)
        # NaN is within no tolerance
        alike = difference.mean() <= self.tolerance.mean and difference.max() <= self.tolerance.largest
        if stuck or not alike:
            raise StaleWeightsError(self._other_weights(server, policy, difference, folder, stuck))
        if not drawn <= self.tolerance.largest:
            raise StaleWeightsError(
                f"{server.url} has the policy's weights but reports other log-probabilities for the tokens that it samples, {drawn:.3g}"
                f" nats away at temperature {temperature:g}: start it with --logprobs-mode processed_logprobs (docs/rollouts.md)"
            )
        self._before[server.url] = served, own
        return float(max(difference.max(), drawn))

    def _stuck(self, server: VllmServer, served: np.ndarray, own: np.ndarray) -> bool:
        """Return True if no value of the server has changed although the policy's have: no rounding does that, however coarse."""
        if server.url not in self._before:
            return False
        served_before, own_before = self._before[server.url]
        return bool(np.array_equal(served, served_before) and np.abs(own - own_before).mean() > MOVED)

    def _other_weights(
        self, server: VllmServer, policy: Sequence[Expected], difference: np.ndarray, folder: Path, stuck: bool
    ) -> str:
        worst = int(difference.argmax())
        token = [token for each in policy for token in each.ids[1:]][worst]
        if stuck:
            cause = "Its log-probabilities are unchanged to the last digit since before this update, so the load had no effect: restart it"
        elif server.url in self._before:
            cause = (
                "Its weights were right before, so a part of them was not replaced. A model with tied embeddings keeps its old output head"
                f" when the server was started on a folder that ties them: start it on {folder}, where the head is a separate weight"
            )
        else:
            cause = (
                "Causes: it serves a model with a different architecture or tokenizer; it ties the embeddings and kept its old output"
                f" head; it computes in a different precision. Start it with --model {folder} --dtype {self.dtype}"
            )
        return (
            f"{server.url} uses other weights than the policy's, although it has reported that it loaded them: the log-probability of"
            f" token {token} differs by {difference[worst]:.3g} nats ({difference.mean():.3g} on average over {len(difference)} tokens;"
            f" {self.tolerance.largest:g} and {self.tolerance.mean:g} are allowed). {cause} (docs/rollouts.md)."
        )
